"""What the paper's run costs over all of its epochs: each example has a context of its own, and the
teacher's targets are computed at each step (`off`) or kept in RAM or on disk.

    python benchmarks/paper_run.py --out results/bench/paper_run.json

The paper's 1000 steps of 32 read GSM8K 4.4 times; here fewer examples are read as often. Every
micro-batch is computed without a teacher (sft) and in each of these ways, in turn, in one process;
a ratio is that of the sums over all of the run's micro-batches, the first epoch included. With
`--processes N` the micro-batches of N processes are computed one after the other, each process with
a cache of its own in RAM and all with one on disk, so a ratio is that of their work.

`encoding` is the CPU time of encoding the training set (GSM8K with --gsm8k, else word problems)
with eight shots of its own for each example, by pieces and as a whole; the latter on `--old`
examples, spread evenly, where the ids are compared.
"""

import tempfile
import time
from dataclasses import replace as changed
from functools import partial
from pathlib import Path

from common import (
    Steps,
    arguments,
    configure,
    data_of,
    generated,
    in_turn,
    machine,
    settings,
    shown,
    timed,
    write,
)
from icl_distill.core.config import replace
from icl_distill.core.hub import load_tokenizer
from icl_distill.data.alignment import Aligned, align
from icl_distill.data.contexts import Contexts
from icl_distill.data.encoding import by_pieces
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task
from icl_distill.models.teacher import CachedTargets, Teacher, TeacherOptions
from icl_distill.training.batches import Data, first_batches, micro_batches

EPOCHS = 1000 * 32 / 7273  # GSM8K without its 200 development examples
WAYS = ("sft", "off", "ram", "disk")


def examples_of(cfg, args, tok) -> Data:
    "The first examples of the data set, each with a context of its own."
    if args.gsm8k:
        return data_of(cfg, args, tok)
    each = [generated(1, len(tok), args.context, seed=seed) for seed in range(args.examples)]
    return Data([changed(one.aligned[0], id=str(i)) for i, one in enumerate(each)], {}, {})


class Ways:
    "Forward and backward of a micro-batch of one of the run's processes, in each way."

    def __init__(self, cfg, args, data, tok, folder):
        self.steps = Steps(cfg, args, data, tok, modes=["sft"])
        first = first_batches(data, cfg.train, cfg.seed, args.processes)

        def teacher(cache):
            options = TeacherOptions(cache=cache, first_batch=first)
            model, head, pad = self.steps.model, self.steps.head, self.steps.pad
            return Teacher(model, head, pad, cfg.teacher.top_k, {}, options)

        ranks = range(args.processes)
        self.teachers = dict(
            sft=[None for _ in ranks],
            off=[teacher(None) for _ in ranks],
            ram=[teacher(CachedTargets("benchmark")) for _ in ranks],
            disk=[teacher(CachedTargets("benchmark", folder)) for _ in ranks],
        )

    def __call__(self, way, batch_and_rank):
        batch, rank = batch_and_rank
        self.steps.teachers[way] = self.teachers[way][rank]
        self.steps(way, batch)

    def computed(self) -> dict:
        "How many examples each way's teachers have read."
        return {
            way: sum(teacher.stats["computed"] for teacher in teachers)
            for way, teachers in self.teachers.items()
            if way != "sft"
        }


def encoding_seconds(one, context, example) -> tuple[float, Aligned]:
    "CPU seconds of encoding an example, and the example."
    start = time.process_time()
    found = align(one, context, example, limits=())
    return time.process_time() - start, found


def encoding(cfg, args, tok) -> dict:
    "CPU seconds of encoding all training examples by pieces, and some of them as a whole."
    task, prompter = load_task(cfg.task), Prompter(tok, cfg.prompt)
    contexts, faster = Contexts(cfg.context, task.train), by_pieces(prompter)
    some = set(range(0, len(task.train), max(1, len(task.train) // args.old)))
    seconds, equal = dict(pieces=0.0, whole=0.0), True
    for i, example in enumerate(task.train):
        context = contexts(example)
        took, pieces = encoding_seconds(faster, context, example)
        seconds["pieces"] += took
        if i in some:
            took, whole = encoding_seconds(prompter, context, example)
            seconds["whole"] += took
            equal = equal and pieces == whole
    counts = dict(pieces=len(task.train), whole=len(some))
    each = {name: seconds[name] / counts[name] for name in seconds}
    return dict(
        examples=counts["pieces"],
        compared=counts["whole"],
        equal=equal,
        cpu_seconds=seconds,
        cpu_seconds_per_example=each,
        ratio=each["whole"] / each["pieces"],
    )


def parsed():
    p = arguments(__doc__)
    p.add_argument("--examples", type=int, default=24, help="that are read in all epochs")
    p.add_argument("--epochs", type=float, default=EPOCHS)
    p.add_argument("--context", type=int, default=1567, help="tokens, of random contexts")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--old", type=int, default=40, help="examples that are encoded as a whole, too")
    p.set_defaults(batch=2)
    return p.parse_args()


def batches_of_all(cfg, args, data) -> list:
    "Of the whole run: each micro-batch, and the process that computes it."
    size = args.batch * args.processes
    return [
        (micro, rank)
        for step in range(round(args.epochs * len(data.aligned) / size))
        for rank in range(args.processes)
        for micro in micro_batches(
            data.batch(step, size, cfg.seed), args.batch, rank, args.processes
        )
    ]


def run_of(cfg, args, tok) -> dict:
    "Seconds of all micro-batches of the run, in each way, and what of them a results file says."
    few = replace(cfg, task=replace(cfg.task, n_train=args.examples))
    data = examples_of(few, args, tok)
    batches = batches_of_all(cfg, args, data)
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(few, args, data, tok, Path(folder))
        ways("sft", batches[0])  # warms up
        seconds = in_turn({way: partial(timed, ways, way) for way in WAYS}, batches)
        computed = ways.computed()
    total = {way: sum(x) for way, x in seconds.items()}
    return dict(
        examples=len(data.aligned),
        epochs=args.epochs,
        processes=args.processes,
        seconds=seconds,
        computed=computed,
        total=total,
        ratio_to_sft={way: total[way] / total["sft"] for way in WAYS},
        off_over_disk=total["off"] / total["disk"],
    )


def show(out: dict):
    for way in WAYS:
        read = out["computed"].get(way, 0)
        print(
            f"{shown(way):6} {out['total'][way]:8.2f} s  {out['ratio_to_sft'][way]:5.2f} × sft   "
            f"the teacher read {read} examples"
        )
    e = out["encoding"]
    print(
        f"encoding: {e['ratio']:.1f} times faster by pieces ({e['examples']} examples; "
        f"{e['compared']} compared, {'equal' if e['equal'] else 'NOT EQUAL'})"
    )


def main():
    args = parsed()
    own = ["context.kind=per_example", f"train.batch_size={args.batch}", "train.accumulation=1"]
    cfg = configure(args, "context.n_shots=8", *own)
    tok = load_tokenizer(cfg.model.name)
    every = replace(cfg, task=replace(cfg.task, n_train=None))
    out = dict(
        what="seconds of forward and backward of each micro-batch of a whole run",
        **settings(args),
        encoding=encoding(every, args, tok),
        **run_of(cfg, args, tok),
        environment=machine(),
    )
    write(args.out, out)
    show(out)


if __name__ == "__main__":
    main()
