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


def main():
    p = arguments(__doc__)
    p.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    p.add_argument("--profile", type=Path, help="a text file, written after the measurement")
    args = p.parse_args()
    if args.peak:
        return peak(args, args.peak)
    steps, batches = setup(args, MODES)
    for m in MODES:
        steps(m, batches[0])
    for b in batches:
        steps("distill_remembered", b)  # the first epoch
    seconds = in_turn({m: partial(timed, steps, m) for m in MODES}, batches)
    rate = matmul_rate(
        steps.model,
        max(len(a.student_ids) for a in batches[0]) * args.batch,
        steps.acc.device,
        getattr(torch, args.dtype),
    )
    share = {
        m: median(
            least_flops(steps.model, m, b) / s / rate
            for b, s in zip(batches, seconds[m], strict=True)
        )
        for m in MODES
    }
    if args.profile:
        write_profile(args.profile, steps, batches[0])
    del steps
    mid, memory = (
        {m: median(v) for m, v in seconds.items()},
        {m: int(in_child("--peak", m)) for m in MODES},
    )

    out = dict(
        what="seconds of forward and backward of one micro-batch",
        **described(args, batches),
        seconds=seconds,
        median=mid,
        ratio_to_sft={m: paired(seconds, m, "sft") for m in MODES},
        plain_over_online=paired(seconds, "distill_plain", "distill_online"),
        peak_bytes=memory,
        memory_ratio_to_sft={m: v / memory["sft"] for m, v in memory.items()},
        matmul_flops_per_second=rate,
        flop_share=share,
        environment=machine(),
    )
    limits = LIMITS[args.device]
    out["met"] = dict(
        online=out["ratio_to_sft"]["distill_online"] <= limits["online"],
        remembered=out["ratio_to_sft"]["distill_remembered"] <= limits["remembered"],
        plain_over_online=out["plain_over_online"] >= limits["plain_over_online"],
        memory=out["memory_ratio_to_sft"]["distill_online"] <= limits["memory"],
    )
    out["limits"] = limits
    write(args.out, out)
    for m in MODES:
        print(
            f"{shown(m):20} {mid[m]:7.3f} s  {out['ratio_to_sft'][m]:5.2f} × sft   "
            f"peak {memory[m] / 2**20:7.0f} MiB  {out['memory_ratio_to_sft'][m]:5.2f} ×   "
            f"{100 * share[m]:3.0f} % of the matrix product's rate"
        )
    met = {shown(k): f"({limits[k]}): {'yes' if v else 'NO'}" for k, v in out["met"].items()}
    print("; ".join(f"{k} {v}" for k, v in met.items()))


if __name__ == "__main__":
    main()
