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
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from icl_distill.data.alignment import align
from icl_distill.core.config import ContextConfig, PromptConfig, load_config
from icl_distill.data.contexts import Contexts
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import Task
from icl_distill.core.runs import Run
from icl_distill.testing import noisy_adapter, quiet_environment, real_tokenizer, squares
from icl_distill.training.loop import train

os.environ["ACCELERATE_USE_CPU"] = "true"

environment = quiet_environment
tokenizer = real_tokenizer
with_adapter = noisy_adapter


def tiny(kind="llama", seed=0, **over):
    torch.manual_seed(seed)
    sizes = (
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer()),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        | over
    )
    make = lambda c, m, **kw: m(c(**sizes, **kw))
    model = (
        make(LlamaConfig, LlamaForCausalLM)
        if kind == "llama"
        else make(Qwen3Config, Qwen3ForCausalLM, head_dim=8)
    )
    return model.requires_grad_(False).eval()


EXAMPLES = squares()
TOY = Task("toy", EXAMPLES, [], {})


@cache
def toy_batch(kind="pool"):
    "Aligned examples of several contexts, and the contexts' prefixes."
    p = Prompter(tokenizer(), PromptConfig())
    contexts = Contexts(ContextConfig(kind=kind, n_shots=2, pool_size=3), EXAMPLES)
    als = [align(p, contexts(e), e) for e in EXAMPLES[:9] if e.id not in contexts.reserved]
    return als, {c.key: p.shared_prefix(c) for c in contexts.shared}


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip((a.values, a.ids, a.logz), (b.values, b.ids, b.logz))
    )


def close(a, b):
    assert_close(a.values, b.values, rtol=1e-5, atol=1e-5)
    assert_close(a.logz, b.logz, rtol=1e-5, atol=1e-5)
    assert (a.ids == b.ids).float().mean() > 0.98  # equal but for ties within rounding


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


def go(run, *over, base=None):
    return train(config(run, *over), base or tiny(), tokenizer(), TOY, progress=False)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    a, b = adapter(a), adapter(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def names(run):
    "Its whole checkpoints, oldest first."
    return [checkpoint.folder.name for checkpoint in Run(run).checkpoints()]


def lines(run):
    return (run / "metrics.jsonl").read_text().splitlines()


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
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def here(folder, run, *over):
    c, *rest = arguments(folder, run, *over)
    return train(load_config(c, rest, "train"), progress=False)


def wait_for(test, process, seconds=60):
    end = time.monotonic() + seconds
    while not test() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def count(run):
    return len(lines(run)) if (run / "metrics.jsonl").exists() else 0


def same_runs(a, b):
    assert equal(a / "checkpoints/step_000012", b / "checkpoints/step_000012")
    assert lines(a) == lines(b) and [json.loads(l)["step"] for l in lines(b)] == list(range(1, 13))
