"""What the tests of training share: tiny runs, in this process and in others."""

import json
import os
import subprocess
import sys
import time
from functools import cache

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from icl_distill.core.config import ContextConfig, PromptConfig, load_config
from icl_distill.core.runs import Run
from icl_distill.data.alignment import align, pack
from icl_distill.data.contexts import Contexts
from icl_distill.data.prompts import Prompter
from icl_distill.testing import quiet_environment, real_tokenizer, square_task, tiny_model
from icl_distill.training.loop import train

os.environ["ACCELERATE_USE_CPU"] = "true"

TOY = square_task()
EXAMPLES = TOY.train
PAD = real_tokenizer().pad_token_id


@cache
def toy_batch(kind="pool"):
    "Aligned examples of several contexts, and the contexts' prefixes."
    prompter = Prompter(real_tokenizer(), PromptConfig())
    contexts = Contexts(ContextConfig(kind=kind, n_shots=2, pool_size=3), EXAMPLES)
    aligned = [
        align(prompter, contexts(example), example)
        for example in EXAMPLES[:9]
        if example.id not in contexts.reserved
    ]
    return aligned, {c.key: prompter.shared_prefix(c) for c in contexts.shared}


def logits_and_labels(model, batch, whose):
    "(A,V) logits by transformers, and the labels, of a batch's `student_ids` or `teacher_ids`."
    p = pack([getattr(a, whose) for a in batch], [a.n_answer for a in batch], PAD)
    mask, places = p.attention_mask, p.position_ids
    logits = model(p.input_ids, attention_mask=mask, position_ids=places).logits
    return logits[p.rows, p.cols], p.labels


def same(first, second):
    "Whether two sets of targets are equal bit for bit."
    pairs = (
        (first.values, second.values),
        (first.ids, second.ids),
        (first.logz, second.logz),
    )
    return all(torch.equal(a, b) for a, b in pairs)


def close(first, second):
    "Two sets of targets are equal but for rounding."
    assert_close(first.values, second.values, rtol=1e-5, atol=1e-5)
    assert_close(first.logz, second.logz, rtol=1e-5, atol=1e-5)
    assert (first.ids == second.ids).float().mean() > 0.98  # equal but for ties within rounding


def config(run, *over):
    return load_config(
        "quickstart",
        [
            "model.dtype=float32",
            "prompt.template=chat",
            "context.n_shots=3",
            "teacher.top_k=16",
            "steps=6",
            "save_every=2",
            "batch_size=3",
            "accumulation=2",
            f"run={run}",
            *over,
        ],
        "train",
    )


def go(run, *over, base=None, task=TOY):
    "Train in this process; the last checkpoint's folder."
    return train(config(run, *over), base or tiny_model(), real_tokenizer(), task, progress=False)


def gradient_of(model):
    "The gradient of what is trained, as one row."
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal_tensors(first, second):
    "Whether two dictionaries hold the same names and the same bits."
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def equal(first, second):
    "Whether two checkpoints hold the same adapter."
    return equal_tensors(adapter(first), adapter(second))


def files_of(folder):
    "The cached targets in a folder: by file, by name."
    return {path.name: load_file(path) for path in folder.glob("*/*.safetensors")}


def names(run):
    "Its whole checkpoints, oldest first."
    return [checkpoint.folder.name for checkpoint in Run(run).checkpoints()]


def lines(run):
    return (run / "metrics.jsonl").read_text().splitlines()


def steps_of(run):
    "The steps that its metrics name."
    return [json.loads(line)["step"] for line in lines(run)]


def same_runs(first, second, steps=12):
    "The same metrics, one line a step, and the same adapter at the end."
    last = f"checkpoints/step_{steps:06d}"
    assert equal(first / last, second / last)
    assert lines(first) == lines(second)
    assert steps_of(second) == list(range(1, steps + 1))


# ---- the command, in this process and in others


def arguments(folder, run, *over):
    return [
        "quickstart",
        f"model.name={folder}",
        "model.dtype=float32",
        "task.n_train=40",
        "task.n_test=5",
        "task.n_dev=5",
        "context.n_shots=2",
        "teacher.top_k=16",
        "steps=12",
        "save_every=3",
        "batch_size=4",
        f"run={run}",
        *over,
    ]


def start(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "icl_distill.train", *args],
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def here(folder, run, *over):
    name, *rest = arguments(folder, run, *over)
    return train(load_config(name, rest, "train"), progress=False)


def wait_for(test, process, seconds=60):
    end = time.monotonic() + seconds
    while not test() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def count(run):
    return len(lines(run)) if (run / "metrics.jsonl").exists() else 0
