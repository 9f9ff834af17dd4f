"""Kill training and evaluation at random moments, go on, compare: `python tests/kill_loop.py`.

A tiny model is trained by the real command, in a process of its own, with targets cached on disk,
in RAM, or not at all, on its own answers where a second labeller agrees, on policy, by two
processes that share the weights, with a base in four bits, or with filters of hidden states, and
then evaluated; or two runs are trained and evaluated as a study, by one command that is killed.
Each process gets a SIGKILL at a drawn moment: while it starts, a drawn number of answers or steps
later, while it writes a checkpoint, or while it evaluates. The same command goes on from there,
until it comes to its end. Metrics, every file of every checkpoint, answers, cached targets, records
and results must then be those of a run that was never interrupted, bit for bit. Ends with a count;
the exit code is 1 where something differs. `--times 100` kills a hundred times.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from safetensors.torch import load_file

from icl_distill.core.devices import environment
from icl_distill.testing import answering_folder, quiet_environment, tiny_folder

# where targets are cached; whose answers are learnt; several runs by one command; two processes
ARMS = ("disk", "ram", "off", "agreed", "student", "study", "shard", "nf4", "filters")
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
AGREED = ["task.n_questions=20", "answers.labeller_steps=6", "answers.shot_repeats=1"]
STUDENT = [
    "loss={kind: reverse_kl, weight: 1, ce: 0}",
    "answers={source: student, temperature: 1.0, refresh: 2}",
    "evaluate.max_new_tokens=24",
]
SHARD = ["teacher.cache=disk", "train.shard=true"]
NF4 = ["teacher.cache=disk", "model.quantization=nf4"]
FILTERS = ["hidden={weight: 1, layers: [], norm: std, filters: {steps: 5}}"]
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
EVALUATE = [
    "conditions=[zero_shot]",
    "steps=[12]",
    "max_new_tokens=24",
    "batch_size=2",
    "engine=transformers",
]
STUDY = """
title: Is it the same after a kill?
base: quickstart
axes: {{arm: {{sft: loss.weight=0, kl: loss.kind=forward_kl}}}}
against: {{arm: sft}}
seeds: [3]
conditions: [zero_shot]
retention: [task.name=names, task.n_train=8, task.n_test=6]
folder: {folder}
overrides: {overrides}
"""
CELLS = ("sft-3", "kl-3")
THE_COMMAND = "from icl_distill.app.cli import main\nmain()"


@dataclass
class Job:
    "A run of the tiny model: where, and what kind of one."

    model: Path
    run: Path
    arm: str  # one of `ARMS`

    @property
    def phases(self) -> tuple[str, ...]:
        more = {"agreed": ("answer",), "study": ("evaluate", "evaluate")}
        return (*more.get(self.arm, ()), *PHASES)

    @property
    def runs(self) -> list[Path]:
        return [self.run / cell for cell in CELLS] if self.arm == "study" else [self.run]

    @property
    def names(self) -> tuple[str, ...]:
        "Of its commands, in order."
        return ("study",) if self.arm == "study" else ("train", "evaluate")

    def command(self, name: str) -> list[str]:
        "What follows `python` to train, to evaluate, or to do both with several runs."
        if name == "study":
            return ["-c", THE_COMMAND, "study", str(self.study_file())]
        config = "bake" if self.arm == "agreed" else "quickstart"
        settings = {"agreed": AGREED, "student": STUDENT, "shard": SHARD, "nf4": NF4}
        settings |= {"filters": FILTERS}
        own = settings.get(self.arm, [f"teacher.cache={self.arm}"])
        given = [config, f"model.name={self.model}", f"run={self.run}", *own, *OVER]
        if name == "train":
            launcher = TWO if self.arm == "shard" else []
            return [*launcher, "-m", "icl_distill.train", *given, *TRAIN]
        checkpoints = f"checkpoints={self.run}"
        return ["-c", THE_COMMAND, "evaluate", *given, checkpoints, *EVALUATE]

    def study_file(self) -> Path:
        "Written anew, which changes nothing."
        path = self.run.with_name(f"{self.run.name}.yaml")
        own = [f"evaluate.{text}" for text in EVALUATE[2:]]
        mine = [text for text in OVER if not text.startswith("seed=")]
        overrides = json.dumps([f"model.name={self.model}", *mine, *TRAIN, *own])
        path.write_text(STUDY.format(folder=self.run, overrides=overrides))
        return path


# ---- what must not depend on being killed


def digests(path):
    "Of the tensors: the order of a file's metadata is not fixed."
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in load_file(path).items()
    }


def checkpoint_of(folder):
    "What its checkpoint.json says, with the hashes of its files."
    info = json.loads((folder / "checkpoint.json").read_text())
    info["files"].pop("config.yaml")  # names the run
    return info


def records_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((r for r in rows if "seconds" not in r), key=lambda r: r.get("id", ""))


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def results_of(path):
    "All but times and what names the run or the machine."
    results = json.loads(path.read_text())
    conditions = {
        name: without(condition, "seconds", "latency")
        for name, condition in results["conditions"].items()
    }
    return without(results, "config", "environment", "commit") | dict(conditions=conditions)


def outcome(job: Job) -> dict:
    "Name -> content of all that its runs hold, and of a study's results."
    out = {}
    for run in job.runs:
        out |= {f"{run.name}/{name}": value for name, value in outcome_of(run, job.arm).items()}
    if job.arm == "study":
        study = json.loads((job.run / "study.json").read_text())
        return out | {"study.json": without(study, "name", "file", "environment", "commits")}
    return {name.partition("/")[2]: value for name, value in out.items()}


def outcome_of(run: Path, arm: str) -> dict:
    "Name -> content of metrics, checkpoints, answers, cached targets, records and results."
    out = {
        "metrics.jsonl": (run / "metrics.jsonl").read_text(),
        "leftovers": [path.name for path in run.glob("checkpoints/.*")],
    }
    for path in sorted(run.glob("*/results.json")):  # evaluation; of a study also retention
        out[f"{path.parent.name}/results.json"] = results_of(path)
    for path in sorted(run.glob("checkpoints/step_*")):
        out[path.name] = checkpoint_of(path)
    for kind in ("evaluation/records", "retention/records", "answers"):
        for path in sorted(run.glob(f"{kind}/*.jsonl")):
            out[f"{kind}/{path.name}"] = records_of(path)
    for path in sorted(run.glob("labeller/checkpoints/step_*")):
        out[f"labeller/{path.name}"] = checkpoint_of(path)
    if arm in ("disk", "shard"):
        found = sorted(run.glob("targets/*/*.safetensors"))
        out["targets"] = {path.name: digests(path) for path in found}
    return out


def different(first: dict, second: dict) -> list[str]:
    "The names whose contents differ."
    return [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]


# ---- one kill


class State(NamedTuple):
    "How far a run has come."

    half_written: set  # checkpoints, each by name, inode and time
    steps: int  # lines of metrics
    answers: int  # lines of records


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def answers(runs):
    "Of the evaluations, and to the questions that are trained on."
    kinds = ("*/records/*.jsonl", "answers/*.jsonl")
    return sum(lines(path) for run in runs for kind in kinds for path in run.glob(kind))


def steps(runs):
    return sum(lines(run / "metrics.jsonl") for run in runs)


def half_written(runs):
    return {path for run in runs for path in run.glob("checkpoints/.step_*")}


def state(runs) -> State:
    files = set()
    for path in half_written(runs):
        with suppress(FileNotFoundError):  # a study's run may live a moment longer
            stat = path.stat()
            files.add((path.name, stat.st_ino, stat.st_ctime_ns))
    return State(files, steps(runs), answers(runs))


def where(before: State, now: State, name: str) -> str:
    "What a kill met."
    if name == "evaluate":
        return "evaluating" if now.answers > before.answers else "starting to evaluate"
    if now.half_written - before.half_written:
        return "within a checkpoint"
    if now.answers > before.answers and now.steps == before.steps:
        return "answering questions"
    moved = now.half_written != before.half_written or now.steps != before.steps
    return "between steps" if moved else "before the first step"


@dataclass
class Moment:
    "When to kill: so long after a test is first true."

    has_come: Callable[[], bool]
    delay: float  # seconds


def moment(phase: str, runs: list[Path], rng: random.Random) -> Moment:
    "A drawn one; of a phase of training, or of evaluation."
    if phase == "start":
        return Moment(lambda: True, rng.uniform(0, 6))
    if phase == "step":
        step = steps(runs) + rng.randint(1, 4)
        return Moment(lambda: steps(runs) >= step, rng.uniform(0, 0.05))
    if phase == "save":
        old = half_written(runs)
        delay = rng.choice([0, rng.uniform(0, 0.05)])
        return Moment(lambda: bool(half_written(runs) - old), delay)
    if phase == "evaluate" and rng.random() < 0.3:
        return Moment(lambda: True, rng.uniform(0, 8))
    answer = answers(runs) + rng.randint(1, 6)
    return Moment(lambda: answers(runs) >= answer, rng.uniform(0, 0.1))


def kill(process: subprocess.Popen):
    "With all that it has started."
    workers = []
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def strike(command: list[str], when: Moment | None = None) -> bool:
    "Run a command, killed at that moment. Whether it was; exits where the command itself fails."
    env = quiet_environment(TQDM_DISABLE="1")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], env=env, stdout=log, stderr=subprocess.STDOUT
        )
        while when and process.poll() is None:
            if when.has_come():
                time.sleep(when.delay)
                kill(process)
                break
            time.sleep(0.001)
        code = process.wait()
        if code not in (0, -signal.SIGKILL):
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read()}")
    return code == -signal.SIGKILL


# ---- many


class Loop:
    "Kills so many times, over as many runs as that takes, and counts."

    def __init__(self, times: int, seed: int, folder: Path, arms: Sequence[str] = ARMS):
        self.times = times
        self.arms = arms
        self.seed = seed
        self.folder = folder
        self.model = answering_folder(folder / "model")
        # one whose context matters, so that its own answers teach it something
        self.talkative = tiny_folder(folder / "talkative", initializer_range=0.3)
        self.rng = random.Random(seed)
        self.wanted: dict[str, dict] = {}  # by arm: the outcome of an uninterrupted run
        self.aimed_at: Counter = Counter()
        self.landed: Counter = Counter()
        self.runs = 0
        self.missed = 0
        self.differing: list[dict] = []

    @property
    def kills(self) -> int:
        return self.aimed_at.total()

    def run(self) -> dict:
        "All the kills; the counts."
        while self.kills < self.times:
            self.one_run()
        return dict(
            times=self.kills,
            seed=self.seed,
            aimed_at=dict(self.aimed_at),
            landed=dict(self.landed),
            runs=self.runs,
            came_to_their_end_first=self.missed,
            mismatches=len(self.differing),
            differing=self.differing,
        )

    def one_run(self):
        "Train and evaluate, killed and started again, and compare."
        arm = self.arms[self.runs % len(self.arms)]
        if arm not in self.wanted:
            self.wanted[arm] = self.uninterrupted(arm)
        job = self.job(arm, f"run{self.runs}")
        phases = [self.rng.choice(job.phases) for _ in range(self.rng.randint(2, 5))]
        evaluations = ["evaluate"] * self.rng.randint(1, 2)
        for name, aims in zip(job.names, (phases, evaluations), strict=False):
            self.to_its_end(job, name, aims)
        odd = different(self.wanted[arm], outcome(job))
        if odd:
            self.differing.append(dict(run=self.runs, arm=arm, differs=odd))
            print(f"MISMATCH in run {self.runs} ({arm}): {odd}", flush=True)
        self.runs += 1

    def job(self, arm: str, name: str) -> Job:
        model = self.talkative if arm == "student" else self.model
        return Job(model, self.folder / name, arm)

    def uninterrupted(self, arm: str) -> dict:
        "The outcome of a run that nobody kills."
        job = self.job(arm, arm)
        for name in job.names:
            strike(job.command(name))
        return outcome(job)

    def to_its_end(self, job: Job, name: str, phases: list[str]):
        "Kill a command in each of these phases, then let it end."
        for phase in phases:
            if self.kills >= self.times:
                break
            before = state(job.runs)
            if not strike(job.command(name), moment(phase, job.runs, self.rng)):
                self.missed += 1
                return  # it came to its end before the moment did
            now = state(job.runs)
            met = where(before, now, name)
            self.aimed_at[phase] += 1
            self.landed[met] += 1
            said = f"{self.kills}: run {self.runs} ({job.arm}), {phase}: {met}, {now.steps} steps"
            print(said, flush=True)
        strike(job.command(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=5, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which kinds of runs")
    parser.add_argument("--out", help="a results file to write")
    args = parser.parse_args()
    os.environ.update(quiet_environment())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = Loop(args.times, args.seed, Path(folder), args.arms).run()
    if args.out:
        result = counts | dict(environment=environment())
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    met = ", ".join(f"{name}: {n}" for name, n in counts["landed"].items())
    print(
        f"{counts['times']} kills in {counts['runs']} runs ({met}): "
        f"{counts['mismatches']} runs differ from the uninterrupted one"
    )
    return int(counts["mismatches"] > 0)


if __name__ == "__main__":
    sys.exit(main())
