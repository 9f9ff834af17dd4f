"""Time and memory of one training step: SFT, the original's way of distilling, and ours, on the
same batches, interleaved in one process.

    python benchmarks/step_time.py --out results/bench/step_time.json

One step is forward and backward of one micro-batch; the context is one of eight shots, shared. Peak
memory: the high-water mark of a process of its own per mode (CUDA: max_memory_allocated). Ratios of
time are medians of the ratios on the same batch. `flop_share`: the fewest operations a step needs,
over what the machine's own matrix product would do in its time. Results files keep an older word
for cached targets, `remembered`. `--profile FILE` says where the time of a step of each mode goes.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from common import (
    MODES,
    Steps,
    arguments,
    batches_of,
    configure,
    data_of,
    described,
    least_flops,
    in_child,
    in_turn,
    machine,
    matmul_rate,
    median,
    paired,
    resident,
    shown,
    timed,
    write,
)
from icl_distill.core.hub import load_tokenizer

LIMITS = dict(
    cpu=dict(online=1.6, remembered=1.10, plain_over_online=2.0, memory=1.15),
    cuda=dict(online=1.5, remembered=1.05, plain_over_online=3.0, memory=1.10),
)


def setup(args, modes):
    cfg = configure(args)
    tok = load_tokenizer(cfg.model.name)
    data = data_of(cfg, args, tok)
    return Steps(cfg, args, data, tok, modes), batches_of(data, args)


def peak(args, mode):
    "Run the largest batch twice in this process and print its peak memory in bytes."
    steps, batches = setup(args, [mode])
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        steps(mode, max(batches, key=lambda b: max(len(a.student_ids) for a in b)))
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else resident())


def write_profile(path: Path, steps, batch):
    "The operators of a step of each mode, those with the most time of their own first."
    kinds, by = [ProfilerActivity.CPU], "self_cpu_time_total"
    if steps.acc.device.type == "cuda":
        kinds, by = [*kinds, ProfilerActivity.CUDA], "self_device_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for mode in MODES:
            with profile(activities=kinds) as found:
                steps(mode, batch)
            file.write(f"{shown(mode)}\n{found.key_averages().table(sort_by=by, row_limit=25)}\n")


def flop_share(args, steps, batches, seconds) -> tuple[float, dict]:
    "FLOP/s of the machine's own matrix product, and what share of it each mode reaches."
    tokens = max(len(example.student_ids) for example in batches[0]) * args.batch
    rate = matmul_rate(steps.model, tokens, steps.acc.device, getattr(torch, args.dtype))
    share = {}
    for mode in MODES:
        pairs = zip(batches, seconds[mode], strict=True)
        share[mode] = median(least_flops(steps.model, mode, b) / s / rate for b, s in pairs)
    return rate, share


def measured(args) -> dict:
    "The results file, without what is asked of it."
    steps, batches = setup(args, MODES)
    for mode in MODES:
        steps(mode, batches[0])  # warms up
    for batch in batches:
        steps("distill_remembered", batch)  # the first epoch
    seconds = in_turn({mode: partial(timed, steps, mode) for mode in MODES}, batches)
    rate, share = flop_share(args, steps, batches, seconds)
    if args.profile:
        write_profile(args.profile, steps, batches[0])
    del steps
    memory = {mode: int(in_child("--peak", mode)) for mode in MODES}
    return dict(
        what="seconds of forward and backward of one micro-batch",
        **described(args, batches),
        seconds=seconds,
        median={mode: median(each) for mode, each in seconds.items()},
        ratio_to_sft={mode: paired(seconds, mode, "sft") for mode in MODES},
        plain_over_online=paired(seconds, "distill_plain", "distill_online"),
        peak_bytes=memory,
        memory_ratio_to_sft={mode: peak / memory["sft"] for mode, peak in memory.items()},
        matmul_flops_per_second=rate,
        flop_share=share,
        environment=machine(),
    )


def met(out: dict, limits: dict) -> dict[str, bool]:
    "Which limits the figures keep."
    ratio, memory = out["ratio_to_sft"], out["memory_ratio_to_sft"]
    return dict(
        online=ratio["distill_online"] <= limits["online"],
        remembered=ratio["distill_remembered"] <= limits["remembered"],
        plain_over_online=out["plain_over_online"] >= limits["plain_over_online"],
        memory=memory["distill_online"] <= limits["memory"],
    )


def show(out: dict):
    for mode in MODES:
        print(
            f"{shown(mode):20} {out['median'][mode]:7.3f} s  "
            f"{out['ratio_to_sft'][mode]:5.2f} × sft   "
            f"peak {out['peak_bytes'][mode] / 2**20:7.0f} MiB  "
            f"{out['memory_ratio_to_sft'][mode]:5.2f} ×   "
            f"{100 * out['flop_share'][mode]:3.0f} % of the matrix product's rate"
        )
    limits = out["limits"]
    said = (
        f"{shown(name)} ({limits[name]}): {'yes' if kept else 'NO'}"
        for name, kept in out["met"].items()
    )
    print("; ".join(said))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--profile", type=Path, help="a text file: the operators of each mode")
    args = parser.parse_args()
    if args.peak:
        return peak(args, args.peak)
    out, limits = measured(args), LIMITS[args.device]
    out |= dict(met=met(out, limits), limits=limits)
    write(args.out, out)
    show(out)


if __name__ == "__main__":
    main()
