"""Models, teacher and training: one copy of the weights, fast equals plain.

The same curve however a run is shaped, interrupted or resumed.
"""

import contextlib
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
from helpers_training import (
    EXAMPLES,
    PAD,
    TOY,
    adapter,
    arguments,
    close,
    config,
    count,
    equal,
    equal_tensors,
    go,
    gradient_of,
    here,
    lines,
    names,
    same,
    same_runs,
    start,
    steps_of,
    toy_batch,
    wait_for,
)
from safetensors.torch import load_file
from torch.testing import assert_close

from icl_distill.core.checkpoints import Checkpoint
from icl_distill.core.config import LoraConfig, load_config
from icl_distill.core.files import InputError
from icl_distill.core.runs import Run
from icl_distill.data.alignment import pack
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import Task
from icl_distill.models.loading import (
    adapter_off,
    add_lora,
    answer_hidden,
    base_of,
    body_of,
    frozen_head,
    load_adapter,
    weights_hash,
)
from icl_distill.models.teacher import CachedTargets, Teacher, TeacherOptions, plain_targets
from icl_distill.testing import noisy_adapter, raises, real_tokenizer, tiny_model
from icl_distill.training import batches, loop
from icl_distill.training.batches import micro_batches, prepare, step_indices
from icl_distill.training.loop import train
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

os.environ["ACCELERATE_USE_CPU"] = "true"


def student_batch(aligned):
    return pack([a.student_ids for a in aligned], [a.n_answer for a in aligned], PAD)


# ---- law 5: one copy of the weights


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_teacher_is_the_base(kind):
    """Adapter and dropout off: the base model's own states, bit for bit.

    Afterwards the student's are as before.
    """
    base = tiny_model(kind)
    batch = student_batch(toy_batch()[0])
    before, digest = answer_hidden(base, batch), weights_hash(base)
    model = noisy_adapter(base, dropout=0.5).eval()
    student = answer_hidden(model, batch)
    assert not torch.allclose(student, before, atol=1e-3), "the adapter is not at work"
    model.train()
    with adapter_off(model):
        off = answer_hidden(model, batch)
        assert not off.requires_grad
    assert torch.equal(off, before)
    assert weights_hash(model) == digest
    model.eval()
    assert torch.equal(answer_hidden(model, batch), student)


def state_of(model):
    "All that `adapter_off` changes, and the versions of the weights."
    modules = [
        (
            name,
            module.training,
            getattr(module, "gradient_checkpointing", None),
            getattr(module, "disable_adapters", None),
        )
        for name, module in model.named_modules()
    ]
    weights = [(name, p.requires_grad, p._version) for name, p in model.named_parameters()]
    return modules, weights, torch.is_grad_enabled(), model.active_adapters


@pytest.mark.parametrize("fail", [False, True])
def test_adapter_off_restores(fail):
    "Modes, gradient flags, checkpointing and the active adapter, after an exception too."
    model = noisy_adapter(tiny_model(), dropout=0.3).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.enable_input_require_grads()
    model.get_base_model().model.layers[0].eval()  # a mixed state
    before = state_of(model)
    assert any(checkpointing for *_, checkpointing, _ in before[0])
    with contextlib.suppress(KeyError), adapter_off(model):
        for module in model.modules():
            assert not module.training
            assert not getattr(module, "gradient_checkpointing", False)
        assert not torch.is_grad_enabled()
        if fail:
            raise KeyError
    assert state_of(model) == before


def test_head_apart_from_the_body():
    model = noisy_adapter(tiny_model("qwen3"))
    head = frozen_head(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = body_of(model)(input_ids=ids).last_hidden_state
        assert_close(head(hidden), model(input_ids=ids).logits)
    with raises("not in this model"):
        add_lora(tiny_model(), LoraConfig(target_modules=["q_proj", "query"]))


# ---- law 6: fast equals plain


@pytest.mark.parametrize("contexts", ["pool", "fixed", "per_example", "none", "wrong_task"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_cached_equals_plain(kind, contexts):
    """Targets with kept keys and values, of one context or several mixed in a batch.

    Asked for twice; and by the plain path where nothing is shared.
    """
    model = noisy_adapter(tiny_model(kind), dropout=0.5).train()
    head = frozen_head(model)
    aligned, prefixes = toy_batch(contexts)
    teacher = Teacher(model, head, PAD, 16, prefixes=prefixes)
    plain = plain_targets(model, head, aligned, PAD, 16)
    first = teacher(aligned)
    close(first, plain)
    assert same(teacher(aligned), first)
    context_keys = {a.context_key for a in aligned}
    assert teacher.stats["prefixes_read"] == len(context_keys & set(prefixes))
    one = teacher(aligned[2:3])
    row = sum(a.n_answer for a in aligned[:2])
    close(one, plain.rows(row, row + aligned[2].n_answer))
    options = TeacherOptions(prefix_bytes=1)
    small = Teacher(model, head, PAD, 16, prefixes=prefixes, options=options)
    close(small(aligned), plain)
    close(small(aligned[::-1]), plain_targets(model, head, aligned[::-1], PAD, 16))
    if contexts == "pool":
        assert len(context_keys) > 1
        assert len({len(prefix) for prefix in prefixes.values()}) > 1


def test_prefix_longer_than_the_question_allows():
    "A kept prefix that goes on beyond what an example shares with it is used as far as it goes."
    model = noisy_adapter(tiny_model())
    head = frozen_head(model)
    aligned, _ = toy_batch("fixed")
    another = aligned[0].teacher_ids  # the whole sequence, then only its beginning
    for prefix in (another, another[:7]):
        teacher = Teacher(model, head, PAD, 16, prefixes={aligned[0].context_key: prefix})
        close(teacher(aligned), plain_targets(model, head, aligned, PAD, 16))


def test_new_weights_are_noticed():
    model = noisy_adapter(tiny_model())
    aligned, prefixes = toy_batch()
    teacher = Teacher(model, frozen_head(model), PAD, 16, prefixes=prefixes)
    old = teacher(aligned)
    with torch.no_grad():
        base_of(model).model.layers[0].mlp.up_proj.base_layer.weight.mul_(3.0)
    new = teacher(aligned)
    assert not same(new, old)
    close(new, plain_targets(model, frozen_head(model), aligned, PAD, 16))


def remembering(model, prefixes, memory):
    "A teacher that keeps its targets."
    options = TeacherOptions(cache=memory)
    return Teacher(model, frozen_head(model), PAD, 16, prefixes=prefixes, options=options)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_remembered(where, tmp_path):
    "What is remembered is bit for bit what was computed, in any batch and order."
    model = noisy_adapter(tiny_model())
    aligned, prefixes = toy_batch()
    teacher = remembering(
        model, prefixes, CachedTargets("f", tmp_path if where == "disk" else None)
    )
    first = teacher(aligned)
    close(first, plain_targets(model, teacher.head, aligned, PAD, 16))
    assert same(teacher(aligned), first)
    assert teacher.stats["computed"] == teacher.stats["remembered"] == len(aligned)
    if where == "disk":  # another process finds them
        again = remembering(model, prefixes, CachedTargets("f", tmp_path))
        assert same(again(aligned), first)
        assert again.stats["computed"] == 0
    row = first.values.shape[0]
    for a in aligned[::-1]:
        row -= a.n_answer
        assert same(teacher([a]), first.rows(row, row + a.n_answer))
    assert row == 0


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_remembered_beside_new(where, tmp_path):
    "New and known mixed, an example twice in a batch; another fingerprint finds nothing."
    model = noisy_adapter(tiny_model())
    aligned, prefixes = toy_batch()
    memory = CachedTargets("g", tmp_path if where == "disk" else None)
    teacher = remembering(model, prefixes, memory)
    teacher(aligned[3:5])
    batch = [aligned[3], aligned[0], aligned[4], aligned[0]]
    close(teacher(batch), plain_targets(model, teacher.head, batch, PAD, 16))
    assert memory.bytes > 0
    assert CachedTargets("other", memory.folder).get(aligned[3]) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_damaged_memory(damage, tmp_path):
    "A damaged file, and one that belongs to another example, are refused by name."
    model = noisy_adapter(tiny_model())
    aligned, prefixes = toy_batch()
    memory = CachedTargets("f", tmp_path)
    teacher = remembering(model, prefixes, memory)
    teacher(aligned[:2])
    path, other = (memory.path(memory.key(a)) for a in aligned[:2])
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
        teacher(aligned[:2])


# ---- law 8: the same curve


@pytest.mark.parametrize("loss", ["mse", "matched", "forward_kl", "sft"])
def test_batch_shape_does_not_matter(loss):
    """8×1, 4×2, 1×8, and a size that leaves the last micro-batch incomplete: the same gradient.

    The answers are of uneven length.
    """
    model, accelerator = noisy_adapter(tiny_model()), Accelerator(cpu=True)
    own = {"sft": ["loss.weight=0"], "matched": ["loss.match_gradient=true"]}
    over = own.get(loss, [f"loss.kind={loss}"])
    cfg = load_config(
        "quickstart", ["prompt.template=chat", "context.n_shots=3", "teacher.top_k=16", *over]
    )
    data = prepare(cfg, TOY, Prompter(real_tokenizer(), cfg.prompt))
    batch = data.aligned[:8]
    assert len({a.n_answer for a in batch}) > 3
    head = frozen_head(model)
    teacher = None if loss == "sft" else Teacher(model, head, PAD, 16, prefixes=data.prefixes)
    learner = Learner(Student(model), teacher, head, accelerator, cfg.loss, PAD)

    def step(size):
        model.zero_grad()
        sums = backward_step(learner, micro_batches(batch, size))
        return sums, gradient_of(model)

    sums, whole = step(8)
    assert whole.abs().max() > 0
    for size in (4, 1, 3, 5):
        other_sums, gradient = step(size)
        assert_close(other_sums, sums, rtol=1e-4, atol=1e-3)
        assert_close(gradient, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 9, 20])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_are_a_partition(size, world):
    aligned, _ = toy_batch()
    n_micro = -(-len(aligned) // size)
    if n_micro + (-n_micro % world) > len(aligned):  # some process would have an empty one
        with raises("processes"):
            micro_batches(aligned, size, 0, world)
        return
    parts = [micro_batches(aligned, size, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    micros = [micro for part in parts for micro in part]
    assert all(0 < len(micro) <= size for micro in micros)
    assert sorted(a.id for micro in micros for a in micro) == sorted(a.id for a in aligned)


def test_every_epoch_meets_each_example_once():
    for first in (0, 5, 10):
        met = [i for step in range(first, first + 5) for i in step_indices(step, 4, 20, 7)]
        assert sorted(met) == list(range(20))


def test_run_and_adapter(whole):
    "One line of metrics a step; the adapter moved, and loads."
    assert steps_of(whole) == [1, 2, 3, 4, 5, 6]
    assert names(whole) == ["step_000002", "step_000004", "step_000006"]
    base = tiny_model()
    batch = student_batch(toy_batch()[0])
    before = answer_hidden(base, batch)
    model = load_adapter(base, whole / "checkpoints/step_000006", base_hash=weights_hash(base))
    assert not torch.equal(answer_hidden(model, batch), before)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_resume_is_bit_exact(whole, tmp_path, first):
    go(tmp_path, f"steps={first}")
    go(tmp_path)
    same_runs(whole, tmp_path, 6)


def test_lambda_grows_from_zero(tmp_path):
    "Step by step, as it is logged; and after a resume within the warm-up, bit by bit."
    over = ["log_every=1", "loss.ce=0", "loss.weight=0.6", "loss.warmup_steps=3"]
    over += ["batch_size=2", "accumulation=1"]
    whole = go(tmp_path / "whole", *over, "steps=5")
    lines = Run(tmp_path / "whole").metrics()
    grown = [line["loss"] / line["distill"] for line in lines]
    assert_close(torch.tensor(grown), torch.tensor([0, 0.2, 0.4, 0.6, 0.6]), rtol=1e-4, atol=1e-6)
    go(tmp_path / "part", *over, "steps=2")
    assert equal(go(tmp_path / "part", *over, "steps=5"), whole)


def test_a_resume_reads_what_was_encoded(whole, tmp_path, monkeypatch):
    "Once encoded, the data is read; where its file is damaged it is encoded again."
    calls = []

    def counted(*args):
        calls.append(1)
        return prepare(*args)

    monkeypatch.setattr(batches, "prepare", counted)
    kept = tmp_path / "encoded.parquet"
    go(tmp_path, "steps=1")
    written = kept.stat().st_ino
    go(tmp_path, "steps=2")
    assert len(calls) == 1
    assert kept.stat().st_ino == written
    kept.write_bytes(kept.read_bytes()[:-9])
    go(tmp_path, "steps=3")
    go(tmp_path)
    assert len(calls) == 2
    same_runs(whole, tmp_path, 6)


def test_resume_after_the_end_changes_nothing(whole):
    last = whole / "checkpoints/step_000006"
    metrics, weights = lines(whole), adapter(last)
    assert go(whole).name == "step_000006"
    assert lines(whole) == metrics
    assert equal_tensors(weights, adapter(last))


@pytest.mark.parametrize("first", [1, 4, 5])
@pytest.mark.parametrize("memory", ["ram", "disk"])
def test_remembered_targets_resume(tmp_path, memory, first):
    """With remembered targets too, over more than one epoch: bit for bit.

    And yet an example's targets depend on the examples computed in the same batch.
    """
    over = [f"teacher.cache={memory}", "steps=12"]
    go(tmp_path / "a", *over)
    go(tmp_path / "b", *over[:1], f"steps={first}")
    go(tmp_path / "b", *over)
    same_runs(tmp_path / "a", tmp_path / "b", 12)


def test_half_a_batch_remembered(tmp_path, monkeypatch):
    "Killed while a batch's targets were written: those that were are computed again too."
    go(tmp_path / "a", "teacher.cache=disk")
    real, calls = CachedTargets.put, []

    def dies(self, *args):
        if len(calls) == 13:
            raise KeyboardInterrupt  # step 3: one of three is written
        calls.append(1)
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CachedTargets, "put", dies)
        go(tmp_path / "b", "teacher.cache=disk")
    assert len(list(tmp_path.glob("b/targets/*/*"))) == 13
    go(tmp_path / "b", "teacher.cache=disk")
    first, second = (
        {p.name: load_file(p) for p in tmp_path.glob(f"{run}/targets/*/*")} for run in "ab"
    )
    assert first.keys() == second.keys()
    assert all(equal_tensors(first[name], second[name]) for name in first)
    same_runs(tmp_path / "a", tmp_path / "b", 6)


def test_changed_config_is_refused(whole):
    before = lines(whole)
    with pytest.raises(InputError, match="(?s)lora.r.*train.lr"):
        go(whole, "lora.r=8", "lr=1e-3", "steps=8")
    with raises("already holds checkpoints"):
        go(whole, "resume=false")
    assert lines(whole) == before


def test_incomplete_checkpoint_is_passed_over(whole, tmp_path, capsys):
    "A checkpoint without its last file, and one still being written, do not count."
    go(tmp_path)
    (tmp_path / "checkpoints/step_000006/checkpoint.json").unlink()
    (tmp_path / "checkpoints/.step_000005").mkdir()
    assert names(tmp_path) == ["step_000002", "step_000004"]
    said = capsys.readouterr().err
    for words in ("warning: passed over", "step_000006", "incomplete"):
        assert words in said
    go(tmp_path)
    same_runs(whole, tmp_path, 6)
    assert ".step_000005 was never finished" in capsys.readouterr().err
    assert not list(tmp_path.glob("checkpoints/.*"))


@pytest.mark.parametrize(
    "file",
    ["state.pt", "process_0.pt", "adapter_model.safetensors", "config.yaml", "checkpoint.json"],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "flip"])
def test_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys, file, damage):
    """A file that is missing, cut short or changed by a bit: a warning that names it.

    The checkpoint before is used.
    """
    shutil.copytree(whole, tmp_path / "r")
    path = tmp_path / "r/checkpoints/step_000006" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "gone":
        path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-9])
    if damage == "flip":
        path.write_bytes(data)
    assert names(tmp_path / "r") == ["step_000002", "step_000004"]
    said = capsys.readouterr().err
    assert "warning: passed over" in said
    assert "step_000006" in said
    assert file in said or "damaged" in said


def test_damaged_checkpoint_and_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "r")
    path = tmp_path / "r/checkpoints/step_000006/state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    go(tmp_path / "r")
    same_runs(whole, tmp_path / "r", 6)


def test_save_total_limit(whole, tmp_path):
    "The newest are kept, nothing of the others is left."
    go(tmp_path, "train.save_total_limit=2")
    kept = ["step_000004", "step_000006"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == kept
    assert names(tmp_path) == kept
    assert equal(whole / "checkpoints/step_000006", tmp_path / "checkpoints/step_000006")


def test_other_examples_are_refused(whole):
    "The same config, but a question in its file has changed since."
    other = Task("toy", [replace(EXAMPLES[0], question="What is nothing?"), *EXAMPLES[1:]], [], {})
    with raises("step_000006 was made with other examples"):
        train(config(whole), tiny_model(), real_tokenizer(), other, progress=False)


def test_checkpoint_of_another_base(whole):
    other = tiny_model(seed=1)
    folder = whole / "checkpoints/step_000006"
    with raises("weights"):
        Checkpoint.read(folder, weights_hash(other))
    with raises("weights"):
        load_adapter(other, folder, base_hash=weights_hash(other))
    with raises("weights"):
        go(whole, base=tiny_model(seed=1))
    with raises("no such folder"):
        Checkpoint.read(whole / "checkpoints/step_000099")


def test_nan_stops(tmp_path, monkeypatch):
    """A loss that is not a number: the step is named, the batch and earlier checkpoints kept.

    Nothing of it is in the metrics.
    """
    go(tmp_path, "steps=2")
    real, calls = loop.backward_step, []

    def broken(*args, **kw):
        calls.append(1)
        sums = real(*args, **kw)
        return sums * float("nan") if len(calls) == 2 else sums

    monkeypatch.setattr(loop, "backward_step", broken)
    with pytest.raises(InputError, match="step 4: the loss is nan.*bad_batch_0.json"):
        go(tmp_path)
    bad = json.loads((tmp_path / "bad_batch_0.json").read_text())
    assert bad["step"] == 4
    assert len(bad["batch"]) == 6
    assert {"id", "student_ids", "teacher_ids"} <= set(bad["batch"][0])
    assert names(tmp_path) == ["step_000002"]
    assert steps_of(tmp_path) == [1, 2, 3]


def test_nan_weights_stop(tmp_path):
    "The same from a model that is broken itself."
    base = tiny_model()
    base.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="step 1: |logits|not a number|NaN"):
        go(tmp_path, base=base)
    assert not names(tmp_path)


def test_prepare(tmp_path):
    "Shots are not trained on; what is too long is named, and left out only where asked for."
    cfg = config(tmp_path, "context.kind=fixed")
    data = prepare(cfg, TOY, Prompter(real_tokenizer(), cfg.prompt))
    shots = set(data.left_out["shots_of_the_shared_context"])
    assert len(shots) == 3
    assert not shots & {a.id for a in data.aligned}
    assert len(data.aligned) == 27
    cfg.prompt.max_student_tokens = 60
    with pytest.raises(InputError, match="'train-.*too_long=drop"):
        prepare(cfg, TOY, Prompter(real_tokenizer(), cfg.prompt))
    cfg.prompt.too_long = "drop"
    short = prepare(cfg, TOY, Prompter(real_tokenizer(), cfg.prompt))
    long = {a.id for a in data.aligned if len(a.student_ids) > 60}
    assert long
    assert set(short.left_out["too_long"]) == long
    assert {a.id for a in short.aligned} == {a.id for a in data.aligned} - long


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    "Every limit, how many, the longest by name, what would do; nothing has run."
    cfg = config(tmp_path, "context.kind=per_example", "prompt.max_student_tokens=60")
    wide = config(tmp_path, "context.kind=per_example", "prompt.max_student_tokens=9999")
    prompter = Prompter(real_tokenizer(), cfg.prompt)
    every = prepare(wide, TOY, prompter).aligned
    longest = max(every, key=lambda a: len(a.student_ids))
    beyond = sum(len(a.student_ids) > 60 for a in every)
    n = sorted(len(a.teacher_ids) for a in every)[len(every) // 2]
    with pytest.raises(InputError) as found:
        train(cfg, tiny_model(max_position_embeddings=n), real_tokenizer(), TOY, progress=False)
    said = str(found.value)
    assert f"is 60, and the student's sequence is longer for {beyond}: " in said
    assert f"{longest.id!r} has {len(longest.student_ids)} tokens" in said
    assert f"({len(longest.student_ids)} would do)" in said
    n_teacher = sum(len(a.teacher_ids) > n for a in every)
    assert 0 < n_teacher < len(every)
    assert f"positions is {n}, and the teacher's sequence is longer for {n_teacher}: " in said
    assert "max_teacher_tokens" not in said
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
    most = max(len(a.teacher_ids) for a in every)
    assert len(prepare(wide, TOY, prompter, positions=most).aligned) == len(every)
    with pytest.raises(InputError, match="longer for 1: .*fewer or shorter shots would do"):
        prepare(wide, TOY, prompter, positions=most - 1)


def test_targets_in_ram_are_one_processes(tmp_path, monkeypatch):
    "With several processes, each would compute what another has."
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(InputError, match="teacher.cache is ram.* use disk"):
        go(tmp_path / "run", "teacher.cache=ram")
    assert not (tmp_path / "run").exists()


# ---- real processes


def test_kill_and_resume(folder, uninterrupted, tmp_path):
    """Killed at a random moment, and again while a checkpoint is written, then run to the end.

    As if nothing had happened.
    """
    run, rng = tmp_path / "killed", random.Random()
    line, delay = rng.randint(1, 8), rng.uniform(0, 0.05)
    process = start(*arguments(folder, run))
    wait_for(lambda: count(run) >= line, process)
    time.sleep(delay)
    process.kill()
    _, said = process.communicate()
    killed = process.returncode == -signal.SIGKILL
    assert killed, f"not killed (line {line}, {delay:.3f} s): {said}"
    process = start(*arguments(folder, run))
    wait_for(lambda: any(run.glob("checkpoints/.step_*/adapter_model.safetensors")), process)
    process.kill()
    process.communicate()
    here(folder, run)
    same_runs(uninterrupted, run)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_saves(folder, uninterrupted, tmp_path, sign):
    """SIGTERM, SIGINT: the step is finished and saved, the exit code says so.

    A rerun in a new process goes on from there.
    """
    run = tmp_path / "stopped"
    process = start(*arguments(folder, run))
    wait_for(lambda: count(run) >= 4, process)
    process.send_signal(sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + sign, said
    assert f"stopped by {sign.name} after step" in said, said
    assert "Traceback" not in said, said
    step = steps_of(run)[-1]
    assert 4 <= step < 12
    assert names(run)[-1] == f"step_{step:06d}"
    assert f"after step {step};" in said
    process = start(*arguments(folder, run))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    same_runs(uninterrupted, run)


def test_two_trainings_of_one_process_may_differ_in_autocast(tmp_path):
    first, half, again = (
        go(tmp_path / name, "steps=2", f"mixed_precision={autocast}")
        for name, autocast in (("a", "no"), ("b", "bf16"), ("c", "no"))
    )
    assert equal(first, again) and not equal(first, half)
