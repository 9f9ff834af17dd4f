"""Law 6, with its tolerances: every fast path equals the plain one.

float32: logits within 1e-4, gradients within 1e-4 relatively; bfloat16: within 2 % of the largest.
"""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from helpers_training import (
    EXAMPLES,
    PAD,
    TOY,
    config,
    equal,
    go,
    gradient_of,
    lines,
    toy_batch,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from icl_distill.core.files import InputError
from icl_distill.data.alignment import pack
from icl_distill.models.loading import body_of, frozen_head
from icl_distill.models.teacher import CachedTargets, Teacher, TeacherOptions, plain_targets
from icl_distill.objectives.sums import SUMS
from icl_distill.objectives.targets import Head
from icl_distill.testing import noisy_adapter, real_tokenizer, tiny_model
from icl_distill.training.batches import Data, first_batches, micro_batches, step_indices
from icl_distill.training.fill import Filling, fill_targets
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

kinds = pytest.mark.parametrize("kind", ["llama", "qwen3"])


def student_gradient(model, micros, teacher, head, cfg):
    model.zero_grad()
    learner = Learner(Student(model), teacher, head, Accelerator(cpu=True), cfg.loss, PAD)
    sums = backward_step(learner, micros)
    return sums, gradient_of(model)


def originals_way(model, aligned, cfg):
    "Full sequences, full logits, no cache, no chunks; the batch's loss per answer token."
    model.zero_grad()
    head = frozen_head(model)
    targets = plain_targets(model, lambda h: h @ head.weight.T, aligned, PAD, cfg.teacher.top_k)
    batch = pack([a.student_ids for a in aligned], [a.n_answer for a in aligned], PAD)
    every_logit = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    ).logits
    logits = every_logit[batch.rows, batch.cols].float()
    ce = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    errors = logits.gather(1, targets.ids.long()) - targets.values.float()
    mse = errors.square().mean(1).sum()
    ((ce + cfg.loss.weight * mse) / len(batch.labels)).backward()
    return torch.stack([ce, mse]), gradient_of(model)


@kinds
@pytest.mark.parametrize("memory", [False, True])
def test_the_whole_step_equals_the_originals_way(kind, memory, tmp_path):
    """All at once, against none of them.

    Context cache, answer positions, chunks, micro-batches of similar lengths, remembered targets.
    """
    model = noisy_adapter(tiny_model(kind))
    aligned, prefixes = toy_batch()
    cfg = config(tmp_path)
    cfg.loss.chunk_size = 7
    options = TeacherOptions(cache=CachedTargets("m") if memory else None)
    teacher = Teacher(model, frozen_head(model), PAD, 16, prefixes, options)
    for _ in range(1 + memory):
        micros = micro_batches(aligned, 2)
        sums, fast = student_gradient(model, micros, teacher, teacher.head, cfg)
    plain_sums, plain = originals_way(model, aligned, cfg)
    assert not memory or teacher.stats["remembered"] == len(aligned)
    fast_sums = sums[[SUMS.index("ce"), SUMS.index("distill")]]
    assert_close(fast_sums, plain_sums, rtol=1e-4, atol=1e-4)
    assert_close(fast, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@kinds
def test_cached_teacher_in_bfloat16(kind):
    """The cache's rounding in bfloat16 is no larger than bfloat16's own.

    That one is the distance between plain float32 and plain bfloat16.
    """
    aligned, prefixes = toy_batch()
    wide = noisy_adapter(tiny_model(kind))
    truth = plain_targets(wide, lambda h: h @ frozen_head(wide).weight.T, aligned, PAD, 1)
    model = wide.to(torch.bfloat16)
    head = frozen_head(model)
    plain = plain_targets(model, head, aligned, PAD, 1)
    cached = Teacher(model, head, PAD, 1, prefixes=prefixes)(aligned)

    def distance(a, b):
        return (a.values.float() - b.values.float()).abs().max().item()

    assert distance(cached, plain) <= 0.02 * truth.values.abs().max()
    assert distance(cached, truth) <= 2 * distance(plain, truth) + 1e-3


@kinds
def test_head_sees_answer_positions_only(kind, tmp_path):
    """Neither student nor teacher applies the output head to more rows than answer tokens.

    They do so in chunks; the model's own head is never called.
    """
    model = noisy_adapter(tiny_model(kind))
    aligned, prefixes = toy_batch()
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
    student_gradient(model, [aligned], teacher, head, cfg)
    assert sum(seen) == sum(a.n_answer for a in aligned)
    assert sum(seen) < sum(len(a.student_ids) for a in aligned)


def test_remembered_in_the_batch_of_first_sight():
    """What is remembered does not depend on what was known.

    Forgotten, partly known, or asked for in another order: the same bits.
    """
    model = noisy_adapter(tiny_model())
    aligned, prefixes = toy_batch()
    head = frozen_head(model)
    groups = [aligned[:4], aligned[4:]]

    def first_batch(a):
        return next(group for group in groups if a in group)

    def targets(memory, order):
        options = TeacherOptions(cache=memory, first_batch=first_batch)
        teacher = Teacher(model, head, PAD, 16, prefixes, options)
        parts = teacher(order).split([a.n_answer for a in order])
        return {a.id: part for a, part in zip(order, parts, strict=True)}

    want = targets(CachedTargets("m"), aligned)
    partly = CachedTargets("m")
    for a in aligned[1:3]:
        partly.put(a, want[a.id])
    for memory, order in (
        (CachedTargets("m"), aligned[::-1]),
        (CachedTargets("m"), aligned[3:6]),
        (partly, aligned),
    ):
        for name, part in targets(memory, order).items():
            assert vars(part).keys() == vars(want[name]).keys()
            for field, tensor in vars(part).items():
                other = getattr(want[name], field)
                assert tensor is other is None or torch.equal(tensor, other)


@pytest.mark.parametrize("world", [1, 2])
def test_first_batches_are_what_the_loop_meets(world, tmp_path):
    aligned = toy_batch()[0]
    cfg = config(tmp_path)
    first = first_batches(Data(aligned, {}, {}), cfg.train, 5, world)
    size = cfg.train.batch_size * cfg.train.accumulation * world
    met = []
    for step in range(3):
        batch = [aligned[i] for i in step_indices(step, size, len(aligned), 5)]
        for rank in range(world):
            met += micro_batches(batch, cfg.train.batch_size, rank, world)
    for a in aligned:
        assert first(a) == next(micro for micro in met if a in micro)


@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_remembered_targets_resume_bit_for_bit(memory, tmp_path):
    """Killed in the second epoch: the run is the same to the bit.

    Targets in RAM are lost, those on the disk may be ahead of the checkpoint.
    """
    over = [f"teacher.cache={memory}", "steps=12"]
    whole = go(tmp_path / "whole", *over)
    go(tmp_path / "cut", f"teacher.cache={memory}", "steps=8")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_000008")  # steps 7 and 8 were not saved
    resumed = go(tmp_path / "cut", *over)
    assert equal(whole, resumed)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert len(EXAMPLES) - 3 < 12 * 6  # more than an epoch


def files(folder):
    "The targets in a folder, bit for bit, by name."
    return {
        path.name: {name: x.numpy().tobytes() for name, x in load_file(path).items()}
        for path in folder.glob("*/*.safetensors")
    }


def test_filled_targets_are_a_runs_own(tmp_path):
    """To the bit in a run's own micro-batches, stopped in between or not; else but for rounding.

    Runs of other seeds, weights, objectives and adapters compute nothing again."""

    def fill(name, *over, **how):
        folder = tmp_path / name
        over = ["teacher.cache=disk", f"teacher.cache_folder={folder}", *over]
        cfg = config(tmp_path / "run", "context.kind=per_example", *over)
        how = Filling(progress=False, **how)
        filled = fill_targets(cfg, how, tiny_model(), real_tokenizer(), TOY)
        assert filled.folder == folder
        return filled

    own = ["context.kind=per_example", "teacher.cache=disk"]
    alone = go(tmp_path / "alone", *own)
    shared = f"teacher.cache_folder={tmp_path / 'shared'}"
    assert fill("shared").computed == len(EXAMPLES)
    filled = files(tmp_path / "shared")
    assert filled == files(tmp_path / "alone" / "targets") and len(filled) == len(EXAMPLES)
    assert equal(alone, go(tmp_path / "after", *own, shared))
    others = ["seed=3", "loss.kind=centred_mse", "loss.weight=2", "lora.r=2"]
    for run, over in (("after", []), ("other", others)):
        if over:
            go(tmp_path / run, *own, shared, *over)
        assert json.loads((tmp_path / run / "teacher.json").read_text())["computed"] == 0
    for path in list((tmp_path / "shared").glob("*/*.safetensors"))[::2]:
        path.unlink()
    assert fill("shared").computed == len(EXAMPLES) // 2
    assert files(tmp_path / "shared") == filled
    assert fill("long", tokens=2000).computed == len(EXAMPLES)
    for path in (tmp_path / "shared").glob("*/*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / "long" / path.parent.name / path.name)
        for name in ("values", "logz"):
            assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)
        assert (one["ids"] == two["ids"]).float().mean() > 0.98


@pytest.mark.parametrize(
    "over,words",
    [
        ("teacher.cache=ram", "teacher.cache is ram"),
        ("loss.weight=0", "without a teacher"),
        ("answers.source=teacher", "answers.source is teacher"),
    ],
)
def test_targets_that_cannot_be_filled(over, words, tmp_path):
    cfg = config(tmp_path, "teacher.cache=disk", "task.n_questions=9", *over.split())
    with pytest.raises(InputError, match=words):
        fill_targets(cfg)
    assert not list(tmp_path.iterdir())


def compiled_equals_plain(kind, backend):
    "The step through torch.compile: adapter on and off, with and without a cache."
    aligned, prefixes = toy_batch()
    cfg = config("unused")

    def run(compiled):
        model = noisy_adapter(tiny_model(kind)).train()
        head = frozen_head(model)
        if compiled:
            body_of(model).compile(dynamic=True, backend=backend)
        teacher = Teacher(model, head, PAD, 16, prefixes=prefixes)
        return student_gradient(model, micro_batches(aligned, 3), teacher, head, cfg)

    torch._dynamo.reset()
    sums, gradient = run(compiled=False)
    compiled_sums, compiled_gradient = run(compiled=True)
    assert_close(compiled_sums, sums, rtol=1e-4, atol=1e-3)
    assert_close(compiled_gradient, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] > 1  # several lengths
    assert not counters["graph_break"]


def test_traced_step():
    compiled_equals_plain("qwen3", "eager")


@pytest.mark.slow
def test_compiled_step():
    "With the backward pass traced too."
    compiled_equals_plain("qwen3", "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_for_real(tmp_path):
    "As above by inductor, through the setting itself: the same losses."
    compiled_equals_plain("qwen3", "inductor")
    go(tmp_path / "a", "steps=2")
    go(tmp_path / "b", "steps=2", "train.compile=true")
    for plain, compiled in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        loss = json.loads(plain)["loss"]
        assert abs(loss - json.loads(compiled)["loss"]) < 1e-3 * loss
