"""Terms on hidden states: equal to brute force on full states, by every way a teacher reads."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers_training import (
    PAD,
    TOY,
    adapter,
    config,
    equal,
    equal_tensors,
    go,
    gradient_of,
    lines,
    toy_batch,
)
from safetensors.torch import load_file
from torch.testing import assert_close

from icl_distill.core.config import FiltersConfig, HiddenConfig, LossConfig
from icl_distill.core.runs import Run
from icl_distill.data.alignment import pack
from icl_distill.data.prompts import Prompter
from icl_distill.models.loading import adapter_off, body_of, frozen_head
from icl_distill.models.taps import Taps, remove_taps
from icl_distill.models.teacher import Teacher
from icl_distill.objectives.hidden_states import Filters, state_distance
from icl_distill.testing import noisy_adapter, raises, real_tokenizer, tiny_model
from icl_distill.training import filters as stage_one
from icl_distill.training import loop
from icl_distill.training.batches import prepare
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

FORMS = [
    HiddenConfig(weight=2.0),
    HiddenConfig(weight=50.0, layers=[], norm="l2"),  # Patient KD
    HiddenConfig(
        weight=3.0,
        layers=[],
        embeddings=True,
        positions="last_prompt",
        distance="smooth_l1",
        norm="std",
    ),  # CODI's
    HiddenConfig(weight=2.0, layers=[], positions="before_answer", distance="smooth_l1"),
    HiddenConfig(weight=0.5, layers=[], norm="l2"),  # Condition C
    HiddenConfig(weight=0.5, sum=True),
    HiddenConfig(weight=1.0, layers=[1, -1], distance="cosine"),
]


MARK = 19  # a token that each answer has once, in varied places


def marked(batch):
    "Answers with a mark in them, behind which nobody looks: the final answer begins with it."
    out = []
    for i, a in enumerate(batch):
        at = 1 + i % (a.n_answer - 1)
        answer = [20 if token == MARK else token for token in a.answer_ids]
        answer[at] = MARK
        both = (ids[: -a.n_answer] + answer for ids in (a.student_ids, a.teacher_ids))
        named = dict(zip(("student_ids", "teacher_ids"), both, strict=True))
        out.append(dataclasses.replace(a, final=at, **named))
    return out


def all_states(model, batch, whose):
    "(A,L+1,D) by transformers' own `hidden_states`."
    p = pack([getattr(a, whose) for a in batch], [a.n_answer for a in batch], PAD)
    out = body_of(model)(
        p.input_ids,
        attention_mask=p.attention_mask,
        position_ids=p.position_ids,
        output_hidden_states=True,
    )
    return torch.stack([x[p.rows, p.cols] for x in out.hidden_states], 1), p


def brute_force(model, batch, cfg):
    "The hidden term's mean over positions, from full states."
    ours, p = all_states(model, batch, "student_ids")
    with adapter_off(model):
        theirs, _ = all_states(model, batch, "teacher_ids")
    n_layers = ours.shape[1] - 1
    chosen = cfg.layers or range(0 if cfg.embeddings else 1, n_layers + 1)
    chosen = sorted({i % (n_layers + 1) for i in chosen})
    at = list(range(len(ours)))
    if cfg.positions == "last_prompt":
        at = [i for i in at if i == 0 or p.rows[i] != p.rows[i - 1]]
    if cfg.positions == "before_answer":
        at = [i for i in at if p.labels[i] == MARK]
        assert len(at) == len(batch)
    return state_distance(ours[at][:, chosen], theirs[at][:, chosen], cfg).mean()


def learner_of(model, cfg, prefixes, ce=0.0, filters=None):
    from accelerate import Accelerator

    head = frozen_head(model)
    teacher = Teacher(model, head, PAD, 16, prefixes=prefixes)
    loss = LossConfig(weight=0.0, ce=ce)
    taps = Taps(body_of(model), cfg)
    student = Student(model, filters)
    return Learner(student, teacher, head, Accelerator(cpu=True), loss, PAD, cfg, taps, filters)


@pytest.mark.parametrize("cfg", FORMS, ids=lambda cfg: f"{cfg.distance}-{cfg.norm}-{cfg.positions}")
@pytest.mark.parametrize("cached", [True, False])
def test_equals_brute_force(cfg, cached):
    "The same gradient, with the context's keys and values kept or read at once, in any batches."
    batch, prefixes = toy_batch()
    batch = marked(batch)
    model = noisy_adapter(tiny_model(initializer_range=0.2))
    brute_force(model, batch, cfg).mul(cfg.weight).backward()
    want = gradient_of(model)
    learner = learner_of(model, cfg, prefixes if cached else {})
    for micro in ([batch], [batch[:2], batch[2:]]):
        model.zero_grad()
        sums = backward_step(learner, micro)
        assert_close(gradient_of(model), want, rtol=2e-3, atol=2e-5 * want.abs().max().item())
    assert want.abs().max() > 1e-6 and sums[0] > 0
    remove_taps(body_of(model))


@pytest.mark.parametrize("cfg", FORMS, ids=lambda cfg: f"{cfg.distance}-{cfg.norm}-{cfg.positions}")
def test_zero_at_equality(cfg):
    "Law 7: a teacher that reads what the student reads, and an adapter that does nothing yet."
    batch, _ = toy_batch("none")
    model = noisy_adapter(tiny_model(), noise=0.0)
    learner = learner_of(model, cfg, {})
    sums = backward_step(learner, [batch])
    assert sums[0].abs() < 1e-5 and gradient_of(model).abs().max() < 1e-6
    remove_taps(body_of(model))


def test_the_position_before_the_final_answer(tmp_path):
    "A final answer begins where the scoring rule finds it, in the student's and teacher's ids."
    over = ["hidden={weight: 1, positions: before_answer}", "loss={weight: 0}"]
    cfg, tok = config(tmp_path, *over), real_tokenizer()
    data = prepare(cfg, TOY, Prompter(tok, cfg.prompt))
    golds = {example.id: example.answer for example in TOY.train}
    for a in data.aligned:
        rest = tok.decode(a.answer_ids[a.final :], skip_special_tokens=True)
        assert rest.strip() == golds[a.id].rpartition("#### ")[2] and a.final > 1
    row = [json.loads(line) for line in lines(go(tmp_path, *over, "steps=2").parent.parent)][-1]
    assert row["hidden"] > 0
    bare = dataclasses.replace(TOY.train[5], id="bare", answer="nobody knows")
    with raises(repr(bare.id), "no final answer", "choose last_prompt"):
        prepare(cfg, dataclasses.replace(TOY, train=[*TOY.train, bare]), Prompter(tok, cfg.prompt))
    with raises("choose answer or last_prompt"):
        own = ["answers.source=student", "loss={ce: 0, weight: 1}", "evaluate.max_new_tokens=4"]
        go(tmp_path / "own", over[0], *own)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    for cfg in FORMS:
        torch.autograd.gradcheck(
            lambda x, cfg=cfg: state_distance(x, t, cfg).sum(), (s.clone().requires_grad_(),)
        )


HIDDEN = ["hidden={weight: 1, layers: [], norm: l2}", "loss={weight: 0}", "log_every=1"]


def test_a_run_is_logged_and_goes_on_exactly(tmp_path):
    whole = go(tmp_path / "whole", *HIDDEN, "schedule=constant")
    go(tmp_path / "cut", *HIDDEN, "schedule=constant", "steps=4")
    model = tiny_model()
    cut = go(tmp_path / "cut", *HIDDEN, "schedule=constant", base=model)
    assert equal(whole, cut)
    for row in Run(tmp_path / "whole").metrics():
        assert row["loss"] == pytest.approx(row["ce"] + row["hidden"], rel=1e-5)
        assert row["hidden"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not equal(whole, go(tmp_path / "sft", "loss={weight: 0}", "schedule=constant"))


def test_what_cannot_be_is_refused(tmp_path):
    for key in ("teacher.cache=ram", "train.gradient_checkpointing=true", "train.compile=true"):
        with raises(f"which {key.partition('=')[0]}"):
            config(tmp_path, *HIDDEN, key)
    with raises("hidden.layers [9]"):
        go(tmp_path / "run", "hidden={weight: 1, layers: [9]}")
    with raises("nothing to learn"):
        config(tmp_path, "loss={weight: 0, ce: 0}")


# ---- behind filters (TED)

BEHIND = [
    HiddenConfig(weight=2.0, layers=[], norm="std"),  # TED's row
    HiddenConfig(weight=2.0, layers=[0, 1], distance="smooth_l1", positions="last_prompt"),
    HiddenConfig(weight=2.0, layers=[-1], distance="cosine"),
]
FILTERED = [
    "hidden={weight: 1, layers: [], norm: std, filters: {steps: 3, lr: 0.01}}",
    "loss={weight: 0}",
    "log_every=1",
    "schedule=constant",
]


def drawn_filters(n_layers, size=32):
    torch.manual_seed(1)
    filters = Filters(n_layers, size)
    for weight in filters.parameters():
        weight.data += 0.1 * torch.randn(size, size)
    return filters


def gradients_of(model, filters):
    return torch.cat([gradient_of(model), *(w.grad.flatten() for w in filters.student)])


@pytest.mark.parametrize("cfg, cached", zip(BEHIND, (True, False, True), strict=True))
def test_filtered_states_equal_brute_force(cfg, cached):
    "Gradients of adapter and filters, from full states by plain products, in any batches."
    batch, prefixes = toy_batch()
    model = noisy_adapter(tiny_model(initializer_range=0.2))
    ours, p = all_states(model, batch, "student_ids")
    with adapter_off(model):
        theirs, _ = all_states(model, batch, "teacher_ids")
    layers = sorted({i % 3 for i in cfg.layers or (1, 2)})
    at = [i for i in range(len(ours)) if i == 0 or p.rows[i] != p.rows[i - 1]]
    at = at if cfg.positions == "last_prompt" else list(range(len(ours)))
    filters = drawn_filters(len(layers))
    total = 0.0
    for layer, *maps in zip(layers, filters.student, filters.teacher, strict=True):
        s, t = ours[at, layer], theirs[at, layer]
        if cfg.norm == "std":
            s, t = (x / theirs[at, layer].std(-1, correction=0, keepdim=True) for x in (s, t))
        s, t = s @ maps[0].T, t @ maps[1].T
        if cfg.distance == "cosine":
            total = total + (1 - (F.normalize(s) * F.normalize(t)).sum(-1)).mean()
        else:
            by = F.mse_loss if cfg.distance == "mse" else F.smooth_l1_loss
            total = total + by(s, t)
    (total * cfg.weight / len(layers)).backward()
    want = gradients_of(model, filters)
    learner = learner_of(model, cfg, prefixes if cached else {}, filters=filters)
    for micro in ([batch], [batch[:2], batch[2:]]):
        learner.student.zero_grad()
        sums = backward_step(learner, micro)
        got = gradients_of(model, filters)
        assert_close(got, want, rtol=2e-3, atol=2e-5 * want.abs().max().item())
    assert sums[0] > 0 and not any(weight.requires_grad for weight in filters.teacher)
    remove_taps(body_of(model))


def test_filtered_states_at_equality():
    "Law 7: equal states behind equal filters; nothing pulls at the adapter or at the filters."
    batch, _ = toy_batch("none")
    model, filters = noisy_adapter(tiny_model(), noise=0.0), drawn_filters(2)
    filters.student.load_state_dict(filters.teacher.state_dict())
    sums = backward_step(learner_of(model, BEHIND[0], {}, filters=filters), [batch])
    assert sums[0].abs() < 1e-5 and gradients_of(model, filters).abs().max() < 1e-6
    remove_taps(body_of(model))


def test_gradient_behind_filters_by_finite_differences():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    filters = drawn_filters(2, 5).double()

    def distance(cfg, s, *maps):
        return state_distance(s, t, cfg, SimpleNamespace(student=maps, teacher=filters.teacher))

    for cfg in BEHIND:
        given = (s.clone().requires_grad_(), *filters.student)
        torch.autograd.gradcheck(partial(distance, cfg), given)


def losses_of(tmp_path, monkeypatch, *over):
    "What stage I of a run says, and what it leaves."
    seen, learn = [], stage_one.learn_filters
    with monkeypatch.context() as patch:
        patch.setattr(stage_one, "learn_filters", lambda *a: seen.append(learn(*a)) or seen[0])
        patch.setattr(loop, "_loop", lambda state, shown: setattr(state, "checkpoint", tmp_path))
        go(tmp_path, *FILTERED, *over, base=tiny_model(initializer_range=0.2))
    return seen[0], load_file(Run(tmp_path).filters_path)


def test_filters_learn_the_task(tmp_path, monkeypatch):
    "Each of them, of either model; and the same in any micro-batches, dropout or not."
    more = ["hidden.filters.steps=5", "lora.dropout=0.3"]
    losses, kept = losses_of(tmp_path / "few", monkeypatch, *more)
    assert losses.shape == (5, 4) and (losses[-1] < losses[0] - 0.3).all()
    over = ["batch_size=6", "accumulation=1"]
    again, others = losses_of(tmp_path / "one", monkeypatch, *more, *over)
    assert_close(again, losses, rtol=1e-3, atol=1e-3)
    for name, weight in kept.items():
        assert_close(weight, others[name], rtol=1e-2, atol=2e-3)
        assert not torch.equal(weight, torch.eye(32))


def killed(*_):
    raise KeyboardInterrupt


def test_filters_go_on_exactly_after_a_kill(tmp_path, monkeypatch):
    "Killed in stage I, behind it, and in stage II: always the curve of the run that was not."
    over, cut = [*FILTERED, "steps=4"], tmp_path / "cut"
    whole, kept = go(tmp_path / "whole", *over), Run(cut).filters_path
    for where, name in ((stage_one, "write_tensors"), (loop, "_optimiser_step")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, name, killed)
            go(cut, *over)
        assert kept.exists() == (where is loop)
    with raises("filters", "do not match their key"):
        go(cut, *over, "hidden.filters.lr=0.5")
    monkeypatch.setattr(stage_one, "learn_filters", killed)  # never made twice
    go(cut, *over, "steps=2")
    assert equal_tensors(load_file(kept), load_file(Run(tmp_path / "whole").filters_path))
    last = go(cut, *over)
    assert equal(whole, last) and lines(tmp_path / "whole") == lines(cut)
    trained = [torch.load(x / "state.pt", weights_only=True)["filters"] for x in (whole, last)]
    assert equal_tensors(*trained)
    assert not torch.equal(trained[0]["0"], load_file(kept)["student.0"])
    assert not any("filter" in name for name in adapter(last))  # it is used as any other
    kept.write_bytes(b"x")
    with raises("filters", "are damaged", "delete the file"):
        go(cut, *over)
    kept.unlink()
    with raises("filters.safetensors is missing", "choose another `run`"):
        go(cut, *over)


def test_what_filters_do_not_go_with(tmp_path):
    own = ["answers.source=student", "loss={ce: 0, weight: 1, kind: forward_kl}"]
    with raises("hidden.filters.steps=3", "'student'"):
        config(tmp_path, FILTERED[0], *own)
    with raises("train.shard=true does not go with hidden.filters.steps=3"):
        go(tmp_path, *FILTERED, "train.shard=true")
    with raises("hidden.filters.steps=3 learns filters by the output head"):
        go(tmp_path, *FILTERED, "lora.target_modules=[q_proj, lm_head]")
    for key in ("lora=null", "train.compile=true", "teacher.model=other", "teacher.cache=disk"):
        with raises(f"which {key.partition('=')[0]}"):
            config(tmp_path, *FILTERED, key)
    assert HiddenConfig(filters=FiltersConfig(steps=3)).filtered is False  # nothing is compared
