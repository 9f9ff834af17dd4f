"""Do transformers and vLLM answer alike, and which is faster? Base model and adapters, by both.

    python benchmarks/gpu/engines.py --run runs/gsm8k_full/sft_0 --out results/engines [KEY=VALUE]

A trained run's checkpoints are the adapters, several at once, so vLLM's LoRA slots are in use; the
8-shot prompts begin alike, so its prefix cache is. Each engine is `icl-distill evaluate` of that
run, in a process of its own, and goes on where it was interrupted. A vLLM that is not installed is
an error: transformers' answers alone compare nothing.
"""

import argparse
import json
from pathlib import Path

from gsm8k import icl_distill
from icl_distill.core.runs import Evaluation

ENGINES = ("transformers", "vllm")


def answer(args, engine: str) -> Evaluation:
    "All conditions, answered by one engine."
    results = args.out / engine / "results.json"
    settings = [f"engine={engine}", f"output={results}", f"checkpoints={args.run}"]
    icl_distill("evaluate", str(args.run / "config.yaml"), *settings, *args.overrides)
    return Evaluation(results)


def compared(ours: Evaluation, theirs: Evaluation) -> list[dict]:
    "A row for each condition that both have answered."
    rows, others = [], theirs.results().conditions
    for name, condition in ours.results().conditions.items():
        texts = [{row.id: row.text for row in each.records(name)} for each in (ours, theirs)]
        same = [texts[0][item] == texts[1][item] for item in texts[0]]
        seconds = [condition.seconds, others[name].seconds]
        row = {"condition": name, "n": len(same), "same": sum(same)}
        row |= {"seconds": dict(zip(ENGINES, seconds, strict=True))}
        row |= {"accuracy": [condition.accuracy, others[name].accuracy]}
        rows.append(row)
    return rows


def parsed():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--run", type=Path, required=True, help="a trained run's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


def main():
    args = parsed()
    rows = compared(*(answer(args, engine) for engine in ENGINES))
    (args.out / "engines.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        seconds = ", ".join(f"{engine} {took:.1f} s" for engine, took in row["seconds"].items())
        print(f"{row['condition']:12} {seconds}; {row['same']} of {row['n']} answers are the same")


if __name__ == "__main__":
    main()
