"""What it costs to remember the teacher's last hidden state instead of its top-K logits.

    taskset -c 1 python benchmarks/last_states.py --threads 1 --out results/bench/last_states.json

The loss alone, forward and backward, with targets that are there already: over the top 256 and the
rest as one bucket, or over the whole vocabulary from the last hidden states; and the plain way to
the latter, whole rows of logits of both by autograd. Memory is the high-water mark of a process
that does nothing else, above its inputs. Time is taken in one process, the ways in turn, after a
warm-up; a ratio is the median of the repetitions' ratios. Bytes are what a cache keeps of a
position.
"""

import argparse
import gc
from functools import partial
from pathlib import Path

import torch

from common import in_child, in_turn, machine, median, paired, resident, timed, write
from icl_distill.core.config import LossConfig
from icl_distill.objectives.chunked_loss import chunked_loss
from icl_distill.objectives.losses import plain_loss
from icl_distill.objectives.targets import Head, HiddenTargets, topk_targets

SHAPES = {"SmolLM2-135M": (49152, 576, 256), "Qwen3-1.7B": (151936, 2048, 64)}  # V, D, A
KINDS = ("reverse_kl", "mse")
CHUNK = 32  # positions, less than there are
WAYS = ("topk", "hidden", "plain")
K = 256


def inputs(shape: tuple[int, int, int], way: str):
    "The student's states, labels, a head, and what was kept of a teacher near by."
    V, D, A = shape
    g = torch.Generator().manual_seed(0)
    head = Head(torch.empty(V, D).normal_(0, D**-0.5, generator=g))
    hidden, noise = torch.randn(2, A, D, generator=g)
    labels = torch.randint(V, (A,), generator=g)
    states = hidden + 0.3 * noise
    if way != "topk":
        return hidden.requires_grad_(), labels, head, HiddenTargets(states, head)
    parts = [topk_targets(head(h), K) for h in states.split(16)]
    return hidden.requires_grad_(), labels, head, parts[0].cat(parts)


def step(way: str, kind: str, given):
    "Loss and gradient."
    loss = plain_loss if way == "plain" else chunked_loss
    given[0].grad = None
    loss(*given, LossConfig(kind=kind, weight=0.5, chunk_size=CHUNK)).total.backward()


def peak(name: str, way: str, kind: str) -> int:
    "Bytes above the inputs; runs in a process of its own."
    given = inputs(SHAPES[name], way)
    step(way, kind, inputs((512, 8, 8), way))  # libraries are there
    gc.collect()
    before, mark = resident("VmRSS"), resident()
    step(way, kind, given)
    if resident() == mark:
        raise RuntimeError("the loss stayed below what making its inputs took: no peak to report")
    return resident() - before


def row(name: str, kind: str, repeats: int) -> dict:
    "One model's shape and one kind: seconds, peaks, bytes."
    given = {way: inputs(SHAPES[name], way) for way in WAYS}
    steps = {way: partial(step, way, kind, given[way]) for way in WAYS}
    for f in steps.values():
        f()  # a warm-up
    seconds = in_turn({way: lambda _, f=f: timed(f) for way, f in steps.items()}, range(repeats))
    kept = {way: given[way][3].tensors().values() for way in ("topk", "hidden")}
    V, D, A = SHAPES[name]
    return dict(
        model=name,
        V=V,
        D=D,
        A=A,
        kind=kind,
        seconds=seconds,
        median={way: median(x) for way, x in seconds.items()},
        ratio={way: paired(seconds, way, "topk") for way in ("hidden", "plain")},
        peak_bytes={way: int(in_child("--peak", name, way, kind)) for way in WAYS},
        kept_bytes={
            way: sum(x[0].numel() * x.element_size() for x in xs) for way, xs in kept.items()
        },
        kept_bytes_bfloat16=dict(topk=6 * K + 4, hidden=2 * D),
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="the results file (JSON)")
    p.add_argument("--repeats", type=int, default=5, help="timed repetitions of each way")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--peak", nargs=3, metavar=("MODEL", "WAY", "KIND"), help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak:
        return print(peak(*a.peak))
    rows = []
    for name in SHAPES:
        for kind in KINDS if name == "SmolLM2-135M" else KINDS[:1]:
            rows.append(r := row(name, kind, a.repeats))
            mib = {way: f"{n / 2**20:.0f}" for way, n in r["peak_bytes"].items()}
            times = {way: f"{s:.2f}" for way, s in r["median"].items()}
            print(f"{name} {kind}: seconds {times}, peak MiB {mib}", flush=True)
    write(
        a.out,
        dict(
            what="the loss from targets that are kept, forward and backward",
            dtype="float32",
            device="cpu",
            chunk=CHUNK,
            repeats=a.repeats,
            top_k=K,
            rows=rows,
            environment=machine(),
        ),
    )


if __name__ == "__main__":
    main()
