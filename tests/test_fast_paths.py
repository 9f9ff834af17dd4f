"Law 6, with its tolerances: every fast path equals the plain one. float32: logits within 1e-4, gradients within 1e-4 relatively; bfloat16: within 2 % of the largest."

import shutil

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing import assert_close

from icl_distill.data.alignment import pack
from icl_distill.objectives.losses import SUMS
from icl_distill.objectives.targets import Head
from icl_distill.models.loading import body_of, frozen_head
from icl_distill.models.teacher import CachedTargets, Teacher, TeacherOptions, plain_targets
from icl_distill.training.batches import Data, first_batches, micro_batches, step_indices
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

from helpers_training import (
    EXAMPLES,
    adapter,
    config,
    go,
    lines,
    tiny,
    toy_batch,
    with_adapter,
)

PAD = 2
kinds = pytest.mark.parametrize("kind", ["llama", "qwen3"])


def student_gradient(model, micro, teacher, head, cfg):
    model.zero_grad()
    sums = backward_step(
        Learner(Student(model), teacher, head, Accelerator(cpu=True), cfg.loss, PAD), micro
    )
    return sums, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def originals_way(model, als, cfg):
    "Full sequences, full logits, no cache, no chunks; the loss of the whole batch per answer token."
    model.zero_grad()
    targets = (
        plain_targets(model, lambda h: h @ head.weight.T, als, PAD, cfg.teacher.top_k)
        if (head := frozen_head(model))
        else None
    )
    p = pack([a.student_ids for a in als], [a.n_answer for a in als], PAD)
    logits = model(
        input_ids=p.input_ids, attention_mask=p.attention_mask, position_ids=p.position_ids
    ).logits[p.rows, p.cols]
    ce = nn.functional.cross_entropy(logits.float(), p.labels, reduction="sum")
    mse = (
        (logits.float().gather(1, targets.ids.long()) - targets.values.float())
        .square()
        .mean(1)
        .sum()
    )
    ((ce + cfg.loss.weight * mse) / len(p.labels)).backward()
    return torch.stack([ce, mse]), torch.cat(
        [x.grad.flatten() for x in model.parameters() if x.requires_grad]
    )


@kinds
@pytest.mark.parametrize("memory", [False, True])
def test_the_whole_step_equals_the_originals_way(kind, memory, tmp_path):
    "Context cache, answer positions, chunks, micro-batches of similar lengths, remembered targets: all at once, against none of them."
    model = with_adapter(tiny(kind))
    als, prefixes = toy_batch()
    cfg = config(tmp_path)
    cfg.loss.chunk_size = 7
    teacher = Teacher(
        model,
        frozen_head(model),
        PAD,
        16,
        prefixes,
        TeacherOptions(cache=CachedTargets("m") if memory else None),
    )
    for _ in range(1 + memory):
        sums, fast = student_gradient(model, micro_batches(als, 2), teacher, teacher.head, cfg)
    (ce, mse), plain = originals_way(model, als, cfg)
    assert not memory or teacher.stats["remembered"] == len(als)
    assert_close(
        sums[[SUMS.index("ce"), SUMS.index("distill")]],
        torch.stack([ce, mse]),
        rtol=1e-4,
        atol=1e-4,
    )
    assert_close(fast, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@kinds
def test_cached_teacher_in_bfloat16(kind):
    "The cache's rounding in bfloat16 is no larger than bfloat16's own (plain float32 against plain bfloat16)."
    als, prefixes = toy_batch()
    wide = with_adapter(tiny(kind))
    truth = plain_targets(wide, lambda h: h @ frozen_head(wide).weight.T, als, PAD, 1)
    model = wide.to(torch.bfloat16)
    head = frozen_head(model)
    plain, cached = (
        plain_targets(model, head, als, PAD, 1),
        Teacher(model, head, PAD, 1, prefixes=prefixes)(als),
    )
    off = lambda x, y: (x.values.float() - y.values.float()).abs().max().item()
    assert (
        off(cached, plain) <= 0.02 * truth.values.abs().max()
        and off(cached, truth) <= 2 * off(plain, truth) + 1e-3
    )


@kinds
def test_head_sees_answer_positions_only(kind, tmp_path):
    "Neither student nor teacher applies the output head to more rows than there are answer tokens, in chunks; the model's own head is never called."
    model = with_adapter(tiny(kind))
    als, prefixes = toy_batch()
    cfg = config(tmp_path)
    seen = []

    class Watched(Head):
        def __call__(self, hidden):
            seen.append(len(hidden))
            return super().__call__(hidden)

    own = model.get_base_model().get_output_embeddings()
    head = frozen_head(model)
    teacher = Teacher(model, Watched(head.weight), PAD, 16, prefixes=prefixes)
    own.register_forward_hook(lambda *_: pytest.fail("full-sequence logits"))
    student_gradient(model, [als], teacher, head, cfg)
    assert sum(seen) == sum(a.n_answer for a in als) < sum(len(a.student_ids) for a in als)


def test_remembered_in_the_batch_of_first_sight():
    "What is remembered does not depend on what was known: forgotten, partly known, or asked for in another order, the same bits."
    model = with_adapter(tiny())
    als, prefixes = toy_batch()
    head = frozen_head(model)
    groups = [als[:4], als[4:]]
    first = lambda a: next(g for g in groups if a in g)

    def make(cache):
        options = TeacherOptions(cache=cache, first_batch=first)
        return Teacher(model, head, PAD, 16, prefixes, options)

    def bits(teacher, order):
        return {a.id: t for a, t in zip(order, teacher(order).split([a.n_answer for a in order]))}

    want = bits(make(CachedTargets("m")), als)
    partly = CachedTargets("m")
    for a in als[1:3]:
        partly.put(a, want[a.id])
    for memory, order in (
        (CachedTargets("m"), als[::-1]),
        (CachedTargets("m"), als[3:6]),
        (partly, als),
    ):
        for k, t in bits(make(memory), order).items():
            assert all(torch.equal(x, y) for x, y in zip(vars(t).values(), vars(want[k]).values()))


def test_first_batches_are_what_the_loop_meets(tmp_path):
    als = [a for a in toy_batch()[0]]
    cfg = config(tmp_path)
    for world in (1, 2):
        first = first_batches(Data(als, {}, {}), cfg.train, 5, world)
        size = cfg.train.batch_size * cfg.train.accumulation * world
        met = [
            m
            for s in range(3)
            for r in range(world)
            for m in micro_batches(
                [als[i] for i in step_indices(s, size, len(als), 5)], cfg.train.batch_size, r, world
            )
        ]
        for a in als:
            assert first(a) == next(m for m in met if a in m)


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_remembered_targets_resume_bit_for_bit(memory, tmp_path):
    "Killed in the second epoch: targets in RAM are lost, those on the disk may be ahead of the checkpoint; the run is the same to the bit."
    over = [f"teacher.cache={memory}", "steps=12"]
    whole = go(tmp_path / "whole", *over)
    go(tmp_path / "cut", f"teacher.cache={memory}", "steps=8")
    shutil.rmtree(
        tmp_path / "cut/checkpoints/step_000008"
    )  # steps 7 and 8 were made, but not saved
    resumed = go(tmp_path / "cut", *over)
    a, b = adapter(whole), adapter(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (
        lines(tmp_path / "whole") == lines(tmp_path / "cut") and len(EXAMPLES) - 3 < 12 * 6
    )  # more than an epoch


def test_compiled_step(kind="qwen3", tmp_path=None, backend="aot_eager"):
    "The step through torch.compile: adapter on and off, with and without a cache, several lengths."
    als, prefixes = toy_batch()
    cfg = config("unused")

    def run(compiled):
        model = with_adapter(tiny(kind)).train()
        head = frozen_head(model)
        if compiled:
            body_of(model).compile(dynamic=True, backend=backend)
        return student_gradient(
            model,
            micro_batches(als, 3),
            Teacher(model, head, PAD, 16, prefixes=prefixes),
            head,
            cfg,
        )

    torch._dynamo.reset()
    (s, g), (sc, gc) = run(False), run(True)
    assert_close(sc, s, rtol=1e-4, atol=1e-3)
    assert_close(gc, g, rtol=1e-4, atol=1e-5 * g.abs().max().item())
    assert (
        torch._dynamo.utils.counters["frames"]["ok"] > 1
        and not torch._dynamo.utils.counters["graph_break"]
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_for_real(tmp_path):
    "As above by inductor, through the setting itself: the same losses."
    test_compiled_step(backend="inductor")
    go(tmp_path / "a", "steps=2")
    go(tmp_path / "b", "steps=2", "train.compile=true")
    import json

    for a, b in zip(lines(tmp_path / "a"), lines(tmp_path / "b")):
        assert abs(json.loads(a)["loss"] - json.loads(b)["loss"]) < 1e-3 * json.loads(a)["loss"]
