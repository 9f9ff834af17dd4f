"""A teacher that is another model of the same tokenizer: equal to brute force, in any size."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers_training import (
    PAD,
    TOY,
    config,
    equal,
    go,
    gradient_of,
    lines,
    logits_and_labels,
)
from torch.testing import assert_close

from icl_distill.core.config import load_config
from icl_distill.data.prompts import Prompter
from icl_distill.evaluation.conditions import base_condition
from icl_distill.models.loading import frozen_head, load_model
from icl_distill.testing import noisy_adapter, raises, real_tokenizer, tiny_folder, tiny_model
from icl_distill.training.batches import prepare
from icl_distill.training.fill import Filling, fill_targets
from icl_distill.training.labels import check_answers
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step
from icl_distill.training.teachers import on_common_vocabulary, other_weights, teacher_of

TOK = real_tokenizer()
V = len(TOK)
WIDER = dict(hidden_size=48, num_hidden_layers=3, initializer_range=0.2)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    "A folder with a model of another width and depth, with rows behind the tokenizer's last id."
    return tiny_folder(
        tmp_path_factory.mktemp("teacher") / "model", seed=7, vocab_size=V + 13, **WIDER
    )


@pytest.mark.parametrize("keep", ["topk", "hidden"])
@pytest.mark.parametrize("more", [0, 29])  # rows that the student has behind the last token
def test_equals_brute_force(keep, more, larger, tmp_path):
    "½·CE + ½·T²·KL on the smaller vocabulary, where the context is read whole or kept."
    over = [f"teacher.model={larger}", "teacher.dtype=float32", f"teacher.keep={keep}"]
    over += [f"teacher.top_k={V}"]
    over += ["loss={kind: forward_kl, ce: 0.5, weight: 0.5, temperature: 2}", "loss.tail=false"]
    cfg = config(tmp_path, *over)
    model = noisy_adapter(tiny_model(vocab_size=V + more, initializer_range=0.2))
    theirs = load_model(cfg.teacher.other(cfg.model))
    data = prepare(cfg, TOY, Prompter(TOK, cfg.prompt))
    batch, n = data.aligned[:4], min(V + more, V + 13)
    s, labels = logits_and_labels(model, batch, "student_ids")
    s = s[:, :n]
    with torch.no_grad():
        t = logits_and_labels(theirs, batch, "teacher_ids")[0][:, :n]
    top = t.topk(V).indices if keep == "topk" else torch.arange(n).expand(len(t), n)
    q, p = (x.gather(1, top).div(2).log_softmax(-1) for x in (s, t))
    d = 4 * (p.exp() * (p - q)).sum(-1)
    want = 0.5 * F.cross_entropy(s, labels) + 0.5 * d.mean()
    want.backward()
    gradient = gradient_of(model)
    assert d.mean() > 1e-3

    from accelerate import Accelerator

    head, weights = on_common_vocabulary(frozen_head(model), other_weights(cfg, TOK, "cpu"), TOK)
    assert len(head.weight) == len(weights.head.weight) == n
    for prefixes in (data.prefixes, {}):
        teacher = teacher_of(cfg, weights, replace(data, prefixes=prefixes), PAD, None)
        learner = Learner(Student(model), teacher, head, Accelerator(cpu=True), cfg.loss, PAD)
        model.zero_grad()
        sums = backward_step(learner, [batch[:2], batch[2:]])
        assert_close(sums[0] / sums[3], want.detach(), rtol=1e-4, atol=0)
        atol = 2e-5 * gradient.abs().max().item()
        assert_close(gradient_of(model), gradient, rtol=3e-3, atol=atol)


def test_a_run_goes_on_exactly_and_knows_its_teacher(larger, tmp_path):
    "Cached or not the same; another teacher's targets are others; changed weights are refused."
    named = f"teacher.model={larger}"
    own = ["schedule=constant", "log_every=1", "teacher.cache=disk"]
    over = [*own, named]
    whole = go(tmp_path / "whole", *over)
    go(tmp_path / "cut", *over, "steps=4")
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    moved = shutil.copytree(larger, tmp_path / "moved")
    elsewhere = [*own, f"teacher.model={moved}", "teacher.device=cpu"]
    assert equal(whole, go(tmp_path / "cut", *elsewhere))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    info = json.loads((whole / "checkpoint.json").read_text())
    assert info["teacher"] != info["base_hash"]
    shared = f"teacher.cache_folder={tmp_path / 'whole/targets'}"
    cfg = config(tmp_path / "x", *own, named, shared)
    assert fill_targets(cfg, Filling(progress=False), tiny_model(), TOK, TOY).computed == 0
    cfg = config(tmp_path / "x", *own, shared)
    assert fill_targets(cfg, Filling(progress=False), tiny_model(), TOK, TOY).computed == 27
    tiny_folder(moved, seed=8, vocab_size=V + 13, **WIDER)
    with raises("made with another teacher"):
        go(tmp_path / "other", *elsewhere)
    with raises("teacher.dtype"):
        go(tmp_path / "other", *over, "teacher.dtype=bfloat16")


def test_dtype_of_its_own(larger, tmp_path):
    over = [f"teacher.model={larger}", "teacher.dtype=bfloat16", "steps=1", "teacher.keep=hidden"]
    go(tmp_path / "run", *over, "teacher.cache=ram")
    cfg = config(tmp_path / "run", *over)
    weights = other_weights(cfg, TOK, "cpu")
    assert weights.dtype == "bfloat16" and weights.head.weight.dtype == torch.bfloat16


def test_who_cannot_teach_is_refused(larger, tmp_path):
    named = f"teacher.model={larger}"
    tokens = shutil.copytree(larger, tmp_path / "tokens")
    tok = real_tokenizer().__class__.from_pretrained(tokens)
    tok.add_tokens(["<more>"])
    tok.save_pretrained(tokens)
    with raises("has another tokenizer", "'<more>'"):
        go(tmp_path / "run", f"teacher.model={tokens}")
    with raises("no such folder"):
        go(tmp_path / "run", f"teacher.model={tmp_path / 'none'}")
    short = tiny_folder(tmp_path / "short", max_position_embeddings=40)
    with raises("number of the model's positions is 40", "teacher"):
        go(tmp_path / "run", f"teacher.model={short}")
    with raises("which teacher.model"):
        config(tmp_path, named, "hidden={weight: 1}")
    with raises("teacher.dtype=bfloat16 is of teacher.model"):
        config(tmp_path, "teacher.dtype=bfloat16")
    cfg = config(tmp_path, named, "answers.source=teacher", "task.n_questions=9")
    with raises("made by the student's base"):
        check_answers(cfg, TOY)
    with raises("is another model", "model.name="):
        base_condition("teacher", config(tmp_path, named), TOY.train)
    small = tiny_folder(tmp_path / "small", vocab_size=V - 1)
    with raises("cannot be compared"):
        go(tmp_path / "run", f"teacher.model={small}")
    wide = tiny_model(vocab_size=V + 20)
    with raises("is trained: take it out"):
        go(tmp_path / "run", named, "lora.target_modules=[q_proj, lm_head]", base=wide)


def test_the_row_names_a_model():
    cfg = load_config("methods/duan")
    assert cfg.teacher.model and cfg.has_teacher and cfg.loss.kind == "forward_kl"
