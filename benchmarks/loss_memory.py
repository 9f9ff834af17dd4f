"""Peak memory and time of the loss alone, forward and backward: chunked against plain PyTorch.

    python benchmarks/loss_memory.py --out results/bench/loss_memory.json

Plain is what one would write without this package: all logits at once, cross-entropy in float32, a
gather at the teacher's ids, autograd. On a CPU, memory is the high-water mark of the resident set
of a process that does nothing else (above what it held before); on CUDA, `max_memory_allocated`.
Time is taken in one process, the two ways in turn, after a warm-up; its ratio is the median of the
repetitions' ratios. The smaller the hidden size, the more of the time is the loss and not the
head's matrix product.
"""

import argparse
import gc
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from common import in_child, in_turn, machine, median, paired, resident, timed, write
from icl_distill.core.config import LossConfig
from icl_distill.objectives.chunked_loss import chunked_loss
from icl_distill.objectives.targets import Head, Targets

VOCABULARIES = (49152, 128256, 151936)  # of SmolLM2, Llama-3.2 and Qwen3
POSITIONS = (256, 1024, 4096)
LIMITS = dict(memory=0.25, time=1.1)  # chunked / plain: memory at 4,096 positions, time everywhere


def inputs(V: int, D: int, A: int, device: str, dtype: torch.dtype, K: int = 256):
    g = torch.Generator().manual_seed(0)
    weight = torch.empty(V, D, dtype=dtype).normal_(0, D**-0.5, generator=g).to(device)
    hidden = torch.randn(A, D, generator=g).to(device, dtype).requires_grad_()
    labels = torch.randint(V, (A,), generator=g).to(device)
    ids = (
        torch.stack([torch.randint(V // K, (A,), generator=g) + i * (V // K) for i in range(K)], 1)
        .int()
        .to(device)
    )
    return (
        hidden,
        labels,
        weight,
        Targets(
            torch.randn(A, K, generator=g).to(device, dtype),
            ids,
            torch.full((A,), 12.0, device=device),
        ),
    )


def plain(hidden, labels, weight, targets, chunk):
    logits = (hidden @ weight.T).float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    delta = logits.gather(1, targets.ids.long()) - targets.values.float()
    (loss + 0.5 * delta.square().mean(-1).sum()).backward()


def chunked(hidden, labels, weight, targets, chunk):
    chunked_loss(
        hidden, labels, Head(weight), targets, LossConfig(kind="mse", weight=0.5, chunk_size=chunk)
    ).total.backward()


WAYS = dict(plain=plain, chunked=chunked)


def peak(way: str, V: int, A: int, a: argparse.Namespace) -> int:
    "Bytes above the inputs; runs in a process of its own."
    x = inputs(V, a.hidden, A, a.device, getattr(torch, a.dtype))
    WAYS[way](
        *inputs(1024, 8, 8, a.device, getattr(torch, a.dtype), 8), a.chunk
    )  # libraries and threads are there
    if a.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](*x, a.chunk)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    before, mark = resident("VmRSS"), resident()
    WAYS[way](*x, a.chunk)
    if resident() == mark:
        raise RuntimeError("the loss stayed below what making its inputs took: no peak to report")
    return resident() - before


def seconds(V: int, A: int, a: argparse.Namespace) -> dict[str, list[float]]:
    "Wall-clock seconds of each repetition, the ways in turn."
    x = inputs(V, a.hidden, A, a.device, getattr(torch, a.dtype))

    def step(way):
        WAYS[way](*x, a.chunk)
        if a.device == "cuda":
            torch.cuda.synchronize()

    def run(way, _):
        x[0].grad = None
        return timed(step, way)

    for way in WAYS:
        run(way, 0)  # a warm-up
    return in_turn({w: partial(run, w) for w in WAYS}, range(a.repeats))


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="the results file (JSON)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument(
        "--chunk", type=int, default=256, help="answer positions per chunk (loss.chunk_size)"
    )
    p.add_argument("--repeats", type=int, default=5, help="timed repetitions of each way")
    p.add_argument("--hidden", type=int, default=576, help="hidden size")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    p.add_argument("--positions", type=int, nargs="+", default=POSITIONS)
    p.add_argument("--peak", nargs=3, metavar=("WAY", "V", "A"), help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine (or this build of PyTorch) has none")
    if a.peak:
        return print(peak(a.peak[0], *map(int, a.peak[1:]), a))
    rows = []
    for V in a.vocabularies:
        for A in a.positions:
            bytes_ = {w: int(in_child("--peak", w, str(V), str(A))) for w in WAYS}
            secs = seconds(V, A, a)
            mid = {w: median(s) for w, s in secs.items()}
            ratio = dict(
                memory=bytes_["chunked"] / bytes_["plain"], time=paired(secs, "chunked", "plain")
            )
            rows.append(dict(V=V, A=A, peak_bytes=bytes_, seconds=secs, median=mid, ratio=ratio))
            print(
                f"V={V:>6} A={A:>4}   peak {bytes_['plain'] / 2**20:>7.0f} -> "
                f"{bytes_['chunked'] / 2**20:>5.0f} MiB ({ratio['memory']:.2f})   "
                f"median {mid['plain']:.3f} -> {mid['chunked']:.3f} s ({ratio['time']:.2f})",
                flush=True,
            )
    met = dict(
        memory=all(
            r["ratio"]["memory"] <= LIMITS["memory"] for r in rows if r["A"] == max(a.positions)
        ),
        time=all(r["ratio"]["time"] <= LIMITS["time"] for r in rows),
    )
    write(
        a.out,
        dict(
            what="the loss alone, forward and backward: peak bytes above the inputs, and seconds",
            hidden=a.hidden,
            dtype=a.dtype,
            device=a.device,
            chunk=a.chunk,
            repeats=a.repeats,
            top_k=256,
            kind="mse",
            rows=rows,
            limits=LIMITS,
            met=met,
            environment=machine(),
        ),
    )
    print(
        f"memory <= {LIMITS['memory']} of plain at A={max(a.positions)}: "
        f"{'yes' if met['memory'] else 'NO'};  "
        f"time <= {LIMITS['time']} of plain: {'yes' if met['time'] else 'NO'}"
    )


if __name__ == "__main__":
    main()
