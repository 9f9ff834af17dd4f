"""Full fine-tuning (`lora: null`): all weights learn, a frozen second copy teaches."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers_training import (
    PAD,
    TOY,
    arguments,
    config,
    equal_tensors,
    go,
    gradient_of,
    here,
    lines,
    logits_and_labels,
    start,
)
from huggingface_hub import RepoUrl
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from icl_distill.app.bake import bake_config, run_bake
from icl_distill.app.cli import export_command
from icl_distill.app.export import export_model
from icl_distill.app.push import Destination, chosen, push_run
from icl_distill.core.checkpoints import Checkpoint
from icl_distill.core.runs import Run
from icl_distill.data.prompts import Prompter
from icl_distill.evaluation.evaluate import config_for_evaluation, evaluate
from icl_distill.models.generation import TransformersEngine
from icl_distill.models.loading import load_adapter, load_model, trained_head, weights_hash
from icl_distill.testing import quiet_environment, raises, real_tokenizer, tiny_folder, tiny_model
from icl_distill.training.batches import prepare
from icl_distill.training.fill import Filling, fill_targets
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step
from icl_distill.training.teachers import other_weights, teacher_of
from icl_distill.training.whole_model import student_of

TOK = real_tokenizer()
V = len(TOK)
WHOLE = ("lora=null", "lr=1e-3", "schedule=constant", "save_every=5")
SMALL = dict(hidden_size=16, head_dim=4)
LOUD = dict(**SMALL, initializer_range=0.2)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_model(first, second):
    return equal_tensors(weights(first), weights(second))


@pytest.mark.parametrize("keep,tied", [("topk", True), ("hidden", False)])
def test_equals_brute_force(keep, tied, tmp_path):
    "½·CE + ½·T²·KL: value, and the gradient of every weight, tied ones once."
    over = [f"teacher.keep={keep}", f"teacher.top_k={V}", "loss.tail=false", "context.kind=pool"]
    over += ["loss={kind: forward_kl, ce: 0.5, weight: 0.5, temperature: 2}"]
    cfg, base = config(tmp_path, *WHOLE, *over), tiny_model(tie_word_embeddings=tied, **LOUD)
    model = student_of(base, cfg, given=True)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # some steps later
    data = prepare(cfg, TOY, Prompter(TOK, cfg.prompt))
    batch = data.aligned[:4]
    s, labels = logits_and_labels(model, batch, "student_ids")
    with torch.no_grad():
        t = logits_and_labels(base, batch, "teacher_ids")[0]
    q, p = (x.div(2).log_softmax(-1) for x in (s, t))
    d = 4 * (p.exp() * (p - q)).sum(-1)
    want = 0.5 * F.cross_entropy(s, labels) + 0.5 * d.mean()
    want.backward()
    gradient = gradient_of(model)
    assert d.mean() > 1e-3 and len(gradient) == sum(p.numel() for p in base.parameters())
    other = other_weights(cfg, TOK, "cpu", base)
    assert other.model is base and other.hash == weights_hash(base)
    for prefixes in (data.prefixes, {}):
        teacher = teacher_of(cfg, other, replace(data, prefixes=prefixes), PAD, None)
        head, accelerator = trained_head(model), Accelerator(cpu=True)
        learner = Learner(Student(model), teacher, head, accelerator, cfg.loss, PAD)
        model.zero_grad()
        sums = backward_step(learner, [batch[:2], batch[2:]])
        assert_close(sums[0] / sums[3], want.detach(), rtol=1e-4, atol=0)
        atol = 2e-5 * gradient.abs().max().item()
        assert_close(gradient_of(model), gradient, rtol=3e-3, atol=atol)


@pytest.mark.parametrize("cache", [pytest.param("off", marks=pytest.mark.slow), "disk"])
def test_a_run_goes_on_exactly(cache, tmp_path, capsys):
    "And the model that was given, which teaches, is afterwards what it was."
    base = tiny_model(tie_word_embeddings=cache == "disk", **SMALL)
    known = weights_hash(base)
    over = [*WHOLE, "log_every=1", "context.kind=pool", f"teacher.cache={cache}"]
    whole = go(tmp_path / "whole", *over, base=base)
    said = capsys.readouterr().err
    assert "are trained; they take" in said and "a frozen second copy of" in said
    assert ("its weights are let go" in said) == (cache == "disk")
    go(tmp_path / "cut", *over, "steps=5", base=base)
    cut = go(tmp_path / "cut", *over, base=base)
    assert cut.name == whole.name == "step_000006" and same_model(whole, cut)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert weights_hash(base) == known
    info = Checkpoint.read(whole, known, whole=True).info
    assert info["teacher"] == info["base_hash"] == known
    begun, ended = base.state_dict(), AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert not any(torch.equal(begun[name], x) for name, x in ended.items())
    with raises("another config", "lora"):
        go(tmp_path / "cut", *over, "lora={r: 4}", "steps=7", base=base)


def test_cached_targets_make_the_copy_needless(tmp_path, capsys):
    "Those that a folder holds already, of a run with an adapter: no pass of the teacher."
    shared = ["teacher.cache=disk", f"teacher.cache_folder={tmp_path / 'targets'}"]
    base, quiet = tiny_model(**LOUD), Filling(progress=False)
    whole, adapted = config(tmp_path / "x", *WHOLE, *shared), config(tmp_path / "y", *shared)
    assert fill_targets(adapted, quiet, base, TOK, TOY).computed == 27
    assert fill_targets(whole, quiet, base, TOK, TOY).computed == 0
    capsys.readouterr()
    first = go(tmp_path / "first", *WHOLE, *shared, "steps=3", base=base)
    assert "its weights are let go" in capsys.readouterr().err
    assert json.loads((tmp_path / "first" / "teacher.json").read_text())["computed"] == 0
    online = go(tmp_path / "second", *WHOLE, "teacher.cache=off", "steps=3", base=base)
    for name, x in weights(online).items():
        assert_close(x, weights(first)[name], rtol=1e-3, atol=1e-4)


def test_precision(tmp_path, request):
    "Products in bfloat16, weights in float32; the copy may be smaller, and is loaded as one."
    folder = tiny_folder(tmp_path / "model", **LOUD)
    named = f"model.name={folder}"
    cfg = config(tmp_path / "run", *WHOLE, named, "teacher.dtype=bfloat16", "model.dtype=auto")
    copy = other_weights(cfg, TOK, "cpu")
    assert copy.dtype == "bfloat16" and copy.model.dtype == torch.bfloat16
    over = ["model.dtype=auto", "teacher.dtype=bfloat16", "mixed_precision=bf16", "steps=1"]
    AcceleratorState._reset_state(reset_partial_state=True)  # of earlier tests, in float32
    request.addfinalizer(partial(AcceleratorState._reset_state, reset_partial_state=True))
    here(folder, tmp_path / "run", *WHOLE, *over)
    last = tmp_path / "run/checkpoints/step_000001"
    assert all(x.dtype == torch.float32 for x in weights(last).values())
    assert Checkpoint.read(last).dtype == "float32"


def test_what_is_refused(tmp_path):
    with raises("lora=null trains all weights, and those of model.quantization=nf4"):
        config(tmp_path, *WHOLE, "model.quantization=nf4")
    with raises("second labeller is an adapter"):
        config(tmp_path, *WHOLE, "answers.source=agreed", "task.n_questions=9")
    with raises("which lora=null does not leave"):
        config(tmp_path, *WHOLE, "hidden={weight: 1}")
    with raises("teacher.revision=x is of teacher.model"):
        config(tmp_path, *WHOLE, "teacher.revision=x")
    for base, dtype in ((None, "bfloat16"), (tiny_model().bfloat16(), "auto")):
        with raises("most steps would be rounded away"):
            go(tmp_path / "run", *WHOLE, f"model.dtype={dtype}", base=base)
    with raises("teacher.dtype is bfloat16, but the model that was given is in float32"):
        go(tmp_path / "run", *WHOLE, "teacher.dtype=bfloat16", "teacher.cache=off")
    bad = ["lora=null", "answers.source=teacher"]
    files = dict(shots=Path("x.jsonl"), questions=Path("q.txt"))
    with raises("a bake makes an adapter"):
        run_bake(bake_config(None, files, tmp_path, bad))


def test_own_answers(tmp_path):
    "The student that answers is the model itself; without a context it is its own teacher."
    own = ["answers.source=student", "loss={ce: 0, weight: 1, kind: reverse_kl}", "steps=1"]
    own += ["teacher.cache=off", "evaluate.max_new_tokens=4", "log_every=1"]
    for kind, least, most in (("none", -1e-5, 1e-5), ("fixed", 1e-4, 9)):
        last = go(tmp_path / kind, *WHOLE, *own, f"context.kind={kind}", base=tiny_model(**LOUD))
        assert least < json.loads(lines(tmp_path / kind)[0])["distill"] < most
        assert Checkpoint.read(last, whole=True).whole_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", **LOUD)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    "Six steps by the command's own function."
    path = tmp_path_factory.mktemp("runs") / "whole"
    here(folder, path, *WHOLE, "steps=6", "save_every=3")
    return path


def test_evaluated_each_as_a_model(folder, run, tmp_path):
    "Base and checkpoints in one evaluation, with and without a loaded engine; answers its own."
    over = ["conditions=[zero_shot]", "n_samples=4", "max_new_tokens=6", "steps=[3, 6]"]
    cfg = config_for_evaluation(str(run), [*over, f"output={tmp_path / 'results.json'}"])
    results = evaluate(cfg, progress=False)
    hashes = [results.conditions[name].adapter for name in ("zero_shot", "step_3", "step_6")]
    assert hashes[0] is None and None not in hashes[1:] and len(set(hashes)) == 3
    stops = Prompter(TOK, cfg.prompt).stop_ids
    model = load_model(cfg.model)
    again = config_for_evaluation(str(run), [*over, f"output={tmp_path / 'again' / 'r.json'}"])
    evaluate(again, engine=TransformersEngine(model, TOK, stops), progress=False)
    texts = {}
    for name in ("zero_shot", "step_3", "step_6"):
        file = f"records/{name}.jsonl"
        first, second = (answers(tmp_path / file), answers(tmp_path / "again" / file))
        assert first == second
        texts[name] = tuple(first.values())
    assert len(set(texts.values())) == 3
    with raises("is a whole model, no adapter"):
        load_adapter(model, run / "checkpoints/step_000006")


def answers(path):
    found = map(json.loads, path.read_text().splitlines())
    return {row["id"]: row["text"] for row in found if "text" in row}


class Hub:
    "Takes what is uploaded."

    def create_repo(self, name, **options):
        return RepoUrl(f"https://huggingface.co/{name}")

    def repo_info(self, repo):
        return SimpleNamespace(private=True)

    def upload_folder(self, folder_path, **options):
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


def test_the_command_says_what_was_exported(run, tmp_path, capsys):
    "Of a run's folder as of a checkpoint's."
    for n, place in enumerate((run, Run(run).checkpoints()[-1].folder)):
        export_command(Path(place), tmp_path / str(n))
        assert "all of whose weights were trained, 6 steps" in capsys.readouterr().out


def test_exported_and_published_as_a_model(run, tmp_path):
    "The checkpoint's weights, without the state of its training; a card that says what it is."
    last, hub = Run(run).checkpoints()[-1].folder, Hub()
    off, info = export_model(last, tmp_path / "out")
    assert off == 0 and info["step"] == 6 and same_model(last, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.pt"))
    assert json.loads((tmp_path / "out/prompt.json").read_text())["stop_ids"]
    export_model(last, tmp_path / "half", "bfloat16")
    half = load_file(tmp_path / "half/model.safetensors")
    assert all(x.dtype == torch.bfloat16 for x in half.values())
    sent = {}
    for merged in (False, True):
        published, _ = push_run(run, Destination("me/whole"), merged, api=hub)
        assert published.merged and published.checkpoint == chosen(run)[1]
        sent[merged] = hub.files
    assert sent[False] == sent[True] and "adapter_config.json" not in sent[True]
    assert sent[True]["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    card = sent[True]["README.md"].decode()
    assert "A plain model: all weights trained, beginning with" in card and "peft" not in card
    assert "lora: null" in card


def test_damage_is_seen(run, tmp_path):
    last = Run(run).checkpoints()[-1].folder
    for file in ("model.safetensors", "config.json"):
        copy = shutil.copytree(last, tmp_path / file / last.name)
        text = (copy / file).read_bytes()
        (copy / file).write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
        with raises("is damaged"):
            Checkpoint.read(copy)
        (copy / file).unlink()
        with raises("is incomplete"):
            Checkpoint.read(copy)


@pytest.mark.slow
def test_by_the_real_command(folder, tmp_path):
    "Trained, stopped by a smaller number of steps, gone on with, evaluated and exported."
    assert "step_000002" in finished(start(*arguments(folder, tmp_path / "run", *WHOLE, "steps=2")))
    finished(start(*arguments(folder, tmp_path / "run", *WHOLE, "steps=4")))
    here(folder, tmp_path / "whole", *WHOLE, "steps=4")
    last = "checkpoints/step_000004"
    assert same_model(tmp_path / "run" / last, tmp_path / "whole" / last)
    more = ["conditions=[zero_shot]", "n_samples=3", "max_new_tokens=4"]
    said = finished(command("evaluate", tmp_path / "run", *more))
    assert "step_4" in said and "zero_shot" in said
    said = finished(command("export", tmp_path / "run" / last, tmp_path / "out"))
    assert "all of whose weights were trained, 4 steps" in said
    assert same_model(tmp_path / "out", tmp_path / "run" / last)


@pytest.mark.slow
def test_two_processes_train_as_one(folder, tmp_path):
    "Half of each batch in each: the same weights but for rounding, and targets that are shared."
    from test_guards import launch

    for cache in ("off", "disk"):
        over = [*WHOLE, "steps=4", f"teacher.cache={cache}", "train.max_grad_norm=1e9"]
        here(folder, tmp_path / f"one-{cache}", *over, "batch_size=4", "accumulation=2")
        two = tmp_path / f"two-{cache}"
        args = arguments(folder, two, *over, "batch_size=4", "accumulation=1")
        finished(launch("-m", "icl_distill.train", *args))
        last = "checkpoints/step_000004"
        one = weights(tmp_path / f"one-{cache}" / last)
        for name, x in weights(two / last).items():
            assert_close(x, one[name], rtol=1e-3, atol=1e-4)


def command(*args):
    call = [sys.executable, "-c", "from icl_distill.app.cli import main; main()", *map(str, args)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(call, env=quiet_environment(), text=True, **pipes)


def finished(process):
    "What it printed."
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err or out
    return out
