"Models, teacher and training: one copy of the weights, fast equals plain, the same curve however it is run, interrupted or resumed."

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.testing import assert_close

from icl_distill.data.alignment import pack
from icl_distill.core.config import LoraConfig, load_config
from icl_distill.core.files import InputError
from icl_distill.models.loading import (
    add_lora,
    adapter_off,
    answer_hidden,
    base_of,
    body_of,
    frozen_head,
    load_adapter,
    weights_hash,
)
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import Task
from icl_distill.models.teacher import CachedTargets, Teacher, TeacherOptions, plain_targets
import icl_distill.training.loop as loop
from icl_distill.core.checkpoints import Checkpoint
from icl_distill.training.loop import train
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step
from icl_distill.training.batches import micro_batches, prepare, step_indices
from helpers_training import (
    EXAMPLES,
    TOY,
    adapter,
    arguments,
    close,
    config,
    count,
    equal,
    go,
    here,
    lines,
    names,
    same,
    same_runs,
    start,
    tiny,
    tokenizer,
    toy_batch,
    wait_for,
    with_adapter,
)

os.environ["ACCELERATE_USE_CPU"] = "true"


# ---- law 5: one copy of the weights


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_teacher_is_the_base(kind):
    "Adapter and dropout off: the base model's own states, bit for bit; afterwards the student's as before."
    base = tiny(kind)
    als, _ = toy_batch()
    batch = pack([a.student_ids for a in als], [a.n_answer for a in als], tokenizer().pad_token_id)
    before, digest = answer_hidden(base, batch), weights_hash(base)
    model = with_adapter(base, dropout=0.5).eval()
    student = answer_hidden(model, batch)
    assert not torch.allclose(student, before, atol=1e-3), "the adapter is not at work"
    model.train()
    with adapter_off(model):
        off = answer_hidden(model, batch)
        assert not off.requires_grad
    assert torch.equal(off, before) and weights_hash(model) == digest
    model.eval()
    assert torch.equal(answer_hidden(model, batch), student)


@pytest.mark.parametrize("fail", [False, True])
def test_adapter_off_restores(fail):
    "Modes, gradient flags, checkpointing and the active adapter, after an exception too."
    model = with_adapter(tiny(), dropout=0.3).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.enable_input_require_grads()
    model.get_base_model().model.layers[0].eval()  # a mixed state
    state = lambda: (
        [
            (
                n,
                m.training,
                getattr(m, "gradient_checkpointing", None),
                getattr(m, "disable_adapters", None),
            )
            for n, m in model.named_modules()
        ],
        [(n, p.requires_grad, p._version) for n, p in model.named_parameters()],
        torch.is_grad_enabled(),
        model.active_adapters,
    )
    before = state()
    assert any(g for *_, g, _ in before[0])
    try:
        with adapter_off(model):
            assert (
                not any(
                    m.training or getattr(m, "gradient_checkpointing", False)
                    for m in model.modules()
                )
                and not torch.is_grad_enabled()
            )
            if fail:
                raise KeyError
    except KeyError:
        pass
    assert state() == before


def test_head_apart_from_the_body():
    model = with_adapter(tiny("qwen3"))
    head = frozen_head(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_close(
            head(body_of(model)(input_ids=ids).last_hidden_state), model(input_ids=ids).logits
        )
    with pytest.raises(InputError, match="not in this model"):
        add_lora(tiny(), LoraConfig(target_modules=["q_proj", "query"]))


# ---- law 6: fast equals plain


@pytest.mark.parametrize("contexts", ["pool", "fixed", "per_example", "none", "wrong_task"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_cached_equals_plain(kind, contexts):
    "Targets with kept keys and values, of one context or several mixed in a batch; asked for twice; the plain path where nothing is shared."
    model = with_adapter(tiny(kind), dropout=0.5).train()
    head = frozen_head(model)
    als, prefixes = toy_batch(contexts)
    pad = tokenizer().pad_token_id
    teacher, plain = (
        Teacher(model, head, pad, 16, prefixes=prefixes),
        plain_targets(model, head, als, pad, 16),
    )
    first = teacher(als)
    close(first, plain)
    assert same(teacher(als), first) and teacher.stats["prefixes_read"] == len(
        {a.context_key for a in als} & set(prefixes)
    )
    one = teacher(als[2:3])
    start = sum(a.n_answer for a in als[:2])
    close(one, plain.rows(start, start + als[2].n_answer))
    small = Teacher(model, head, pad, 16, prefixes=prefixes, options=TeacherOptions(prefix_bytes=1))
    close(small(als), plain)
    close(small(als[::-1]), plain_targets(model, head, als[::-1], pad, 16))
    if contexts == "pool":
        assert (
            len(set(a.context_key for a in als)) > 1
            and len({len(p) for p in prefixes.values()}) > 1
        )


def test_prefix_longer_than_the_question_allows():
    "A kept prefix that goes on beyond what an example shares with it is used as far as it goes."
    model = with_adapter(tiny())
    head = frozen_head(model)
    als, _ = toy_batch("fixed")
    pad = tokenizer().pad_token_id
    for p in (
        als[0].teacher_ids,
        als[0].teacher_ids[:7],
    ):  # another example's whole sequence; only its beginning
        close(
            Teacher(model, head, pad, 16, prefixes={als[0].context_key: p})(als),
            plain_targets(model, head, als, pad, 16),
        )


def test_new_weights_are_noticed():
    model = with_adapter(tiny())
    als, prefixes = toy_batch()
    pad = tokenizer().pad_token_id
    teacher = Teacher(model, frozen_head(model), pad, 16, prefixes=prefixes)
    old = teacher(als)
    with torch.no_grad():
        base_of(model).model.layers[0].mlp.up_proj.base_layer.weight.mul_(3.0)
    new = teacher(als)
    assert not same(new, old)
    close(new, plain_targets(model, frozen_head(model), als, pad, 16))


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_remembered(where, tmp_path):
    "What is remembered is bit for bit what was computed, in any batch and order, new and known mixed, an example twice in a batch."
    model = with_adapter(tiny())
    als, prefixes = toy_batch()
    pad = tokenizer().pad_token_id
    memory = CachedTargets("f", tmp_path if where == "disk" else None)
    make = lambda: Teacher(
        model, frozen_head(model), pad, 16, prefixes=prefixes, options=TeacherOptions(cache=memory)
    )
    teacher = make()
    first = teacher(als)
    close(first, plain_targets(model, teacher.head, als, pad, 16))
    assert same(teacher(als), first) and teacher.stats["computed"] == teacher.stats[
        "remembered"
    ] == len(als)
    if where == "disk":  # another process finds them
        memory = CachedTargets("f", tmp_path)
        again = make()
        assert same(again(als), first) and again.stats["computed"] == 0
    starts = dict(
        zip((a.id for a in als), torch.tensor([0] + [a.n_answer for a in als]).cumsum(0).tolist())
    )
    for a in als[::-1]:
        assert same(teacher([a]), first.rows(starts[a.id], starts[a.id] + a.n_answer))
    memory = CachedTargets("g", tmp_path / "g" if where == "disk" else None)
    teacher = make()
    teacher(als[3:5])
    mixed = teacher([als[3], als[0], als[4], als[0]])
    close(mixed, plain_targets(model, teacher.head, [als[3], als[0], als[4], als[0]], pad, 16))
    assert memory.bytes > 0 and CachedTargets("other", memory.folder).get(als[3]) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_damaged_memory(damage, tmp_path):
    "A damaged file, and one that belongs to another example, are refused by name."
    model = with_adapter(tiny())
    als, prefixes = toy_batch()
    memory = CachedTargets("f", tmp_path)
    teacher = Teacher(
        model, frozen_head(model), 2, 16, prefixes=prefixes, options=TeacherOptions(cache=memory)
    )
    teacher(als[:2])
    path, other = (memory.path(memory.key(a)) for a in als[:2])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-7]
    if damage == "flip":
        data[-9] ^= 1
    if damage == "empty":
        data = b""
    if damage == "foreign":
        data = other.read_bytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"(?s){path.name}.*delete the file"):
        teacher(als[:2])


# ---- law 8: the same curve


@pytest.mark.parametrize("loss", ["mse", "forward_kl", "sft"])
def test_batch_shape_does_not_matter(loss):
    "8×1, 4×2, 1×8, and a size that leaves the last micro-batch incomplete: the same gradient, answers of uneven length."
    model, accelerator = with_adapter(tiny()), Accelerator(cpu=True)
    cfg = load_config(
        "quickstart",
        [
            "prompt.template=chat",
            "context.n_shots=3",
            "teacher.top_k=16",
            "loss.weight=0" if loss == "sft" else f"loss.kind={loss}",
        ],
    )
    data = prepare(cfg, TOY, Prompter(tokenizer(), cfg.prompt))
    batch = data.aligned[:8]
    assert len({a.n_answer for a in batch}) > 3
    head = frozen_head(model)
    student = Student(model)
    teacher = (
        None
        if loss == "sft"
        else Teacher(model, head, tokenizer().pad_token_id, 16, prefixes=data.prefixes)
    )
    pad = tokenizer().pad_token_id
    learner = Learner(student, teacher, head, accelerator, cfg.loss, pad)

    def gradient(size):
        model.zero_grad()
        sums = backward_step(learner, micro_batches(batch, size))
        return sums, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    sums, whole = gradient(8)
    assert whole.abs().max() > 0
    for size in (4, 1, 3, 5):
        s, g = gradient(size)
        assert_close(s, sums, rtol=1e-4, atol=1e-3)
        assert_close(g, whole, rtol=1e-4, atol=1e-6)


def test_micro_batches_are_a_partition():
    als, _ = toy_batch()
    for size in (1, 2, 4, 9, 20):
        for world in (1, 2, 3):
            if (k := -(-len(als) // size)) + (-k % world) > len(
                als
            ):  # some process would have an empty one
                with pytest.raises(InputError, match="processes"):
                    micro_batches(als, size, 0, world)
                continue
            parts = [micro_batches(als, size, r, world) for r in range(world)]
            assert len({len(p) for p in parts}) == 1 and all(
                0 < len(m) <= size for p in parts for m in p
            )
            assert sorted(a.id for p in parts for m in p for a in m) == sorted(a.id for a in als)
    assert all(
        sorted(i for s in range(e * 5, e * 5 + 5) for i in step_indices(s, 4, 20, 7))
        == list(range(20))
        for e in range(3)
    )  # every epoch, each once


def test_run_and_adapter(whole):
    "One line of metrics a step; the adapter moved, and loads."
    assert [json.loads(l)["step"] for l in lines(whole)] == [1, 2, 3, 4, 5, 6]
    assert names(whole) == ["step_000002", "step_000004", "step_000006"]
    base = tiny()
    als, _ = toy_batch()
    batch = pack([a.student_ids for a in als], [a.n_answer for a in als], 2)
    before = answer_hidden(base, batch)
    model = load_adapter(base, whole / "checkpoints/step_000006", base_hash=weights_hash(base))
    assert not torch.equal(answer_hidden(model, batch), before)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_resume_is_bit_exact(whole, tmp_path, first):
    go(tmp_path, f"steps={first}")
    go(tmp_path)
    assert equal(whole / "checkpoints/step_000006", tmp_path / "checkpoints/step_000006") and lines(
        tmp_path
    ) == lines(whole)


def test_resume_after_the_end_changes_nothing(whole):
    before, digest = lines(whole), adapter(whole / "checkpoints/step_000006")
    assert go(whole).name == "step_000006" and lines(whole) == before
    assert all(
        torch.equal(v, digest[k]) for k, v in adapter(whole / "checkpoints/step_000006").items()
    )


@pytest.mark.parametrize("first", [1, 4, 5])
@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_remembered_targets_resume(tmp_path, memory, first):
    "With remembered targets too, over more than one epoch: bit for bit, though an example's targets depend on who was computed with it."
    over = [f"teacher.cache={memory}", "steps=12"]
    go(tmp_path / "a", *over)
    go(tmp_path / "b", *over[:1], f"steps={first}")
    go(tmp_path / "b", *over)
    assert (
        equal(*(tmp_path / x / "checkpoints/step_000012" for x in "ab"))
        and lines(tmp_path / "a") == lines(tmp_path / "b")
        and len(lines(tmp_path / "a")) == 12
    )


def test_half_a_batch_remembered(tmp_path):
    "Killed while a batch's targets were being written: those that were, are computed again with the rest."
    go(tmp_path / "a", "teacher.cache=disk")
    a = {p.name: load_file(p) for p in tmp_path.glob("a/targets/*/*")}
    import icl_distill.models.teacher as T

    real, calls = T.CachedTargets.put, []

    def dies(self, *args):
        if len(calls) == 13:
            raise KeyboardInterrupt  # step 3: one of three is written
        calls.append(1)
        return real(self, *args)

    T.CachedTargets.put = dies
    try:
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "b", "teacher.cache=disk")
    finally:
        T.CachedTargets.put = real
    assert len(list(tmp_path.glob("b/targets/*/*"))) == 13
    go(tmp_path / "b", "teacher.cache=disk")
    b = {p.name: load_file(p) for p in tmp_path.glob("b/targets/*/*")}
    assert a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])
    assert equal(*(tmp_path / x / "checkpoints/step_000006" for x in "ab")) and lines(
        tmp_path / "a"
    ) == lines(tmp_path / "b")


def test_changed_config_is_refused(whole):
    before = lines(whole)
    with pytest.raises(InputError, match="(?s)lora.r.*train.lr"):
        go(whole, "lora.r=8", "lr=1e-3", "steps=8")
    with pytest.raises(InputError, match="already holds checkpoints"):
        go(whole, "resume=false")
    assert lines(whole) == before


def test_incomplete_checkpoint_is_passed_over(whole, tmp_path, capsys):
    "A checkpoint without its last file, and one still being written, do not count."
    go(tmp_path)
    (tmp_path / "checkpoints/step_000006/checkpoint.json").unlink()
    (tmp_path / "checkpoints/.step_000005").mkdir()
    assert names(tmp_path) == ["step_000002", "step_000004"]
    assert (
        "warning: passed over" in (err := capsys.readouterr().err)
        and "step_000006" in err
        and "incomplete" in err
    )
    go(tmp_path)
    assert equal(whole / "checkpoints/step_000006", tmp_path / "checkpoints/step_000006") and lines(
        tmp_path
    ) == lines(whole)
    assert ".step_000005 was never finished" in capsys.readouterr().err and not list(
        tmp_path.glob("checkpoints/.*")
    )


@pytest.mark.parametrize(
    "file",
    ["state.pt", "process_0.pt", "adapter_model.safetensors", "config.yaml", "checkpoint.json"],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "flip"])
def test_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys, file, damage):
    "A file that is missing, cut short or changed by a bit: a warning that names it, and the checkpoint before is used."
    shutil.copytree(whole, tmp_path / "r")
    path = tmp_path / "r/checkpoints/step_000006" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.unlink() if damage == "gone" else path.write_bytes(data if damage == "flip" else data[:-9])
    assert names(tmp_path / "r") == ["step_000002", "step_000004"]
    assert (
        "warning: passed over" in (err := capsys.readouterr().err)
        and "step_000006" in err
        and (file in err or "damaged" in err)
    )


def test_damaged_checkpoint_and_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    path = tmp_path / "r/checkpoints/step_000006/state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    go(tmp_path / "r")
    assert equal(
        whole / "checkpoints/step_000006", tmp_path / "r/checkpoints/step_000006"
    ) and lines(tmp_path / "r") == lines(whole)


def test_save_total_limit(whole, tmp_path):
    "The newest are kept, nothing of the others is left."
    go(tmp_path, "train.save_total_limit=2")
    assert (
        sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        == ["step_000004", "step_000006"]
        == names(tmp_path)
    )
    assert equal(whole / "checkpoints/step_000006", tmp_path / "checkpoints/step_000006")


def test_other_examples_are_refused(whole):
    "The same config, but a question in its file has changed since."
    other = Task("toy", [replace(EXAMPLES[0], question="What is nothing?"), *EXAMPLES[1:]], [], {})
    with pytest.raises(InputError, match="step_000006 was made with other examples"):
        train(config(whole), tiny(), tokenizer(), other, progress=False)


def test_checkpoint_of_another_base(whole):
    other = tiny(seed=1)
    folder = whole / "checkpoints/step_000006"
    for f in (
        lambda: Checkpoint.read(folder, weights_hash(other)),
        lambda: load_adapter(other, folder, base_hash=weights_hash(other)),
        lambda: go(whole, base=tiny(seed=1)),
    ):
        with pytest.raises(InputError, match="weights"):
            f()
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint.read(whole / "checkpoints/step_000099")


def test_nan_stops(tmp_path):
    "A loss that is not a number: the step is named, the batch kept, earlier checkpoints too, and nothing of it in the metrics."
    go(tmp_path, "steps=2")
    real, calls = loop.backward_step, []

    def broken(*args, **kw):
        calls.append(1)
        s = real(*args, **kw)
        return s * float("nan") if len(calls) == 2 else s

    loop.backward_step = broken
    try:
        with pytest.raises(InputError, match="step 4: the loss is nan.*bad_batch_0.json"):
            go(tmp_path)
    finally:
        loop.backward_step = real
    bad = json.loads((tmp_path / "bad_batch_0.json").read_text())
    assert (
        bad["step"] == 4
        and len(bad["batch"]) == 6
        and {"id", "student_ids", "teacher_ids"} <= set(bad["batch"][0])
    )
    assert names(tmp_path) == ["step_000002"] and [
        json.loads(l)["step"] for l in lines(tmp_path)
    ] == [1, 2, 3]


def test_nan_weights_stop(tmp_path):
    "The same from a model that is broken itself."
    base = tiny()
    base.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="step 1: |logits|not a number|NaN"):
        go(tmp_path, base=base)
    assert not names(tmp_path)


def test_prepare(tmp_path):
    "Shots are not trained on; what is too long is named, and left out only where that was asked for."
    cfg = config(tmp_path, "context.kind=fixed")
    data = prepare(cfg, TOY, Prompter(tokenizer(), cfg.prompt))
    shots = set(data.left_out["shots_of_the_shared_context"])
    assert len(shots) == 3 and not shots & {a.id for a in data.aligned} and len(data.aligned) == 27
    cfg.prompt.max_student_tokens = 60
    with pytest.raises(InputError, match="'train-.*too_long=drop"):
        prepare(cfg, TOY, Prompter(tokenizer(), cfg.prompt))
    cfg.prompt.too_long = "drop"
    short = prepare(cfg, TOY, Prompter(tokenizer(), cfg.prompt))
    assert {a.id for a in short.aligned} == {
        a.id for a in data.aligned if len(a.student_ids) <= 60
    } and set(short.left_out["too_long"]) == {
        a.id for a in data.aligned if len(a.student_ids) > 60
    } != set()


# ---- real processes


def test_kill_and_resume(folder, uninterrupted, tmp_path):
    "Killed at a random moment, killed again while a checkpoint is written, then run to the end: as if nothing had happened."
    run, rng = tmp_path / "killed", random.Random()
    at, delay = rng.randint(1, 8), rng.uniform(0, 0.05)
    p = start(*arguments(folder, run))
    wait_for(lambda: count(run) >= at, p)
    time.sleep(delay)
    p.kill()
    out, err = p.communicate()
    assert p.returncode == -signal.SIGKILL, f"not killed (line {at}, {delay:.3f} s): {err}"
    p = start(*arguments(folder, run))
    wait_for(lambda: any(run.glob("checkpoints/.step_*/adapter_model.safetensors")), p)
    p.kill()
    p.communicate()
    here(folder, run)
    same_runs(uninterrupted, run)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_saves(folder, uninterrupted, tmp_path, sign):
    "SIGTERM, SIGINT: the step is finished and saved, the exit code says so, and a rerun in a new process goes on from there."
    run = tmp_path / "stopped"
    p = start(*arguments(folder, run))
    wait_for(lambda: count(run) >= 4, p)
    p.send_signal(sign)
    out, err = p.communicate(timeout=60)
    assert (
        p.returncode == 128 + sign
        and f"stopped by {sign.name} after step" in err
        and "Traceback" not in err
    ), err
    step = json.loads(lines(run)[-1])["step"]
    assert 4 <= step < 12 and names(run)[-1] == f"step_{step:06d}" and f"after step {step};" in err
    p = start(*arguments(folder, run))
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    same_runs(uninterrupted, run)
