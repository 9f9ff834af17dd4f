"""The teacher's last hidden states, remembered: equal to the loss over whole rows of logits, by
every way a teacher reads and remembers."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers_training import PAD, config, equal, files_of, go, gradient_of, lines, toy_batch
from torch.testing import assert_close

from icl_distill.core.config import HiddenConfig, LossConfig
from icl_distill.data.alignment import pack
from icl_distill.models.loading import adapter_off, frozen_head
from icl_distill.models.target_cache import CachedTargets
from icl_distill.models.teacher import Teacher, TeacherOptions
from icl_distill.objectives.losses import KINDS
from icl_distill.objectives.sums import SUMS
from icl_distill.testing import noisy_adapter, raises, tiny_model
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

KEPT = "teacher.keep=hidden"


def whole_logits(model, batch, whose):
    "(A,V) as transformers makes them, and the labels."
    p = pack([getattr(a, whose) for a in batch], [a.n_answer for a in batch], PAD)
    mask, places = p.attention_mask, p.position_ids
    out = model(p.input_ids, attention_mask=mask, position_ids=places)
    return out.logits[p.rows, p.cols], p.labels


def standard(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)


def by_the_book(model, batch, loss):
    "The loss's mean over answer tokens, from whole rows of logits of two plain passes."
    s, labels = whole_logits(model, batch, "student_ids")
    with adapter_off(model):
        t, _ = whole_logits(model, batch, "teacher_ids")
    T = loss.temperature
    q, p = (s / T).softmax(-1), (t / T).softmax(-1)
    m, delta = loss.beta * p + (1 - loss.beta) * q, s - t
    d = {
        "mse": delta.square().mean(-1),
        "centred_mse": delta.var(-1, correction=0),
        "standardised_mse": (standard(s) - standard(t)).square().mean(-1),
        "forward_kl": T**2 * (p * (p / q).log()).sum(-1),
        "reverse_kl": T**2 * (q * (q / p).log()).sum(-1),
        "jsd": T**2 * (loss.beta * p * (p / m).log() + (1 - loss.beta) * q * (q / m).log()).sum(-1),
    }[loss.kind]
    return loss.ce * F.cross_entropy(s, labels) + loss.weight * d.mean(), d.mean()


def learner_of(model, loss, prefixes, cache):
    from accelerate import Accelerator

    head = frozen_head(model)
    if cache:
        cache.head = head
    teacher = Teacher(model, head, PAD, None, prefixes, TeacherOptions(loss.temperature, cache))
    return Learner(Student(model), teacher, head, Accelerator(cpu=True), loss, PAD)


EXACT = [(kind, "float64", 1e-9) for kind in KINDS]


@pytest.mark.parametrize("kind,dtype,tolerance", [*EXACT, ("reverse_kl", "float32", 3e-3)])
def test_equals_the_uncached_loss_over_all_logits(kind, dtype, tolerance, tmp_path):
    "Values and gradients: context read whole or behind its prefix, computed or remembered."
    batch, prefixes = toy_batch()
    batch = batch[:5]
    T = 1.0 if kind.endswith("mse") else 2.0
    loss = LossConfig(kind=kind, ce=0.3, weight=0.7, temperature=T, beta=0.3, chunk_size=7)
    model = noisy_adapter(tiny_model(initializer_range=0.2)).to(getattr(torch, dtype))
    total, d = by_the_book(model, batch, loss)
    total.backward()
    want = gradient_of(model)
    assert want.abs().max() > 1e-6 and d > 1e-4
    ways = ((prefixes, None), ({}, CachedTargets("ram")), (prefixes, CachedTargets("d", tmp_path)))
    for shared, cache in ways:
        learner = learner_of(model, loss, shared, cache)
        if cache:
            learner.teacher(batch)
        model.zero_grad()
        sums = backward_step(learner, [batch[:3], batch[3:]])
        atol = tolerance * 1e-2 * want.abs().max().item()
        assert_close(gradient_of(model), want, rtol=tolerance, atol=atol)
        n = sums[SUMS.index("positions")]
        assert_close(sums[0] / n, total.detach().float(), rtol=1e-4, atol=0)
        assert_close(sums[SUMS.index("distill")] / n, d.detach().float(), rtol=1e-4, atol=0)
        assert learner.teacher.stats["computed"] == len(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_at_equality(kind):
    "Law 7: a teacher that reads what the student reads, and an adapter that does nothing yet."
    batch, _ = toy_batch("none")
    model = noisy_adapter(tiny_model(), noise=0.0)
    learner = learner_of(model, LossConfig(kind=kind, ce=0, weight=1), {}, None)
    sums = backward_step(learner, [batch])
    assert sums[0].abs() < 1e-4 and gradient_of(model).abs().max() < 1e-6


OVER = [KEPT, "schedule=constant", "loss.kind=reverse_kl", "log_every=1"]


def test_a_run_is_the_uncached_one_and_resumes_bit_for_bit(tmp_path):
    over = [*OVER, "teacher.cache=disk"]
    whole = go(tmp_path / "whole", *over)
    four = "checkpoints/step_000004"  # in the first epoch: the same batches, the same bits
    go(tmp_path / "online", *OVER, "steps=4")
    assert equal(tmp_path / "online" / four, tmp_path / "whole" / four)
    go(tmp_path / "cut", *over, "steps=4")
    assert equal(whole, go(tmp_path / "cut", *over))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert json.loads((tmp_path / "whole/teacher.json").read_text())["remembered"] > 0
    assert not equal(whole, go(tmp_path / "topk", *OVER[1:]))


def test_one_memory_for_every_k_and_temperature(tmp_path):
    "The states of one run serve the others; top-K logits lie beside them under other keys."
    shared = [f"teacher.cache_folder={tmp_path / 'all'}", "teacher.cache=disk", "steps=2"]

    def computed(name, *over):
        go(tmp_path / name, *shared, *over)
        return json.loads((tmp_path / name / "teacher.json").read_text())["computed"]

    assert computed("one", KEPT) == 12
    hot = ["loss.kind=forward_kl", "loss.temperature=3", "teacher.top_k=8"]
    assert computed("two", KEPT, *hot) == 0
    assert computed("three", *hot) == 12
    kinds = [sorted(tensors) for tensors in files_of(tmp_path / "all").values()]
    assert len(kinds) == 24 and kinds.count(["states"]) == 12


def test_remembered_states_are_what_hidden_terms_compare(tmp_path):
    "hidden.layers=[-1] goes with a cache, for it is the state that is kept."
    for at in ("answer", "last_prompt"):
        over = [f"hidden={{weight: 1, norm: l2, positions: {at}}}", "loss={weight: 0}"]
        tapped = go(tmp_path / at / "tapped", *over)
        cached = [*over, KEPT, "teacher.cache=disk"]
        remembered = go(tmp_path / at / "remembered", *cached)
        a, b = (json.loads(lines(x.parent.parent)[-1]) for x in (tapped, remembered))
        assert a["hidden"] > 0 and b["hidden"] == pytest.approx(a["hidden"], rel=1e-3)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        report = json.loads((tmp_path / at / "remembered/teacher.json").read_text())
        assert report["computed"] < 36 and report["remembered"] > 0
    assert HiddenConfig().last_alone and not HiddenConfig(layers=[]).last_alone


def test_what_cannot_be_is_refused(tmp_path):
    with raises("take it out of lora.target_modules"):
        go(tmp_path / "head", KEPT, "lora.target_modules=[q_proj, lm_head]")
    with raises("keep the last state: teacher.keep=hidden"):
        config(tmp_path, "hidden={weight: 1}", "teacher.cache=disk")
    own = ["answers.source=student", "loss={ce: 0, weight: 1, kind: centred_mse}"]
    with raises("or teacher.keep=hidden"):
        config(tmp_path, *own)
    assert config(tmp_path, *own, KEPT).teacher.kept_k is None
