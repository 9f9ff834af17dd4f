"""Every row of the related work runs, by the real command."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from icl_distill.app.cli import app
from icl_distill.app.methods import Method, methods
from icl_distill.core.config import load_config
from icl_distill.core.runs import Run
from icl_distill.testing import answering_folder, quiet_environment, raises, real_tokenizer
from icl_distill.training import batches, labels, loop

SMALL = ["task.n_test=4", "task.n_dev=4", "evaluate.max_new_tokens=4", "answers.labeller_steps=2"]
STEPS = ["train.steps=2", "train.save_every=2", "train.batch_size=4", "teacher.top_k=16"]
NAMES = [method.config for method in methods()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return answering_folder(tmp_path_factory.mktemp("methods") / "model")


def command(*given):
    "As a user starts it."
    start = "from icl_distill.app.cli import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", start, *given],
        env=quiet_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def in_process(monkeypatch, *given):
    "The same command without what takes most of its time: the tokenizer is read once for all."
    for module in (loop, labels):
        monkeypatch.setattr(module, "load_tokenizer", lambda *_: real_tokenizer())
    monkeypatch.setattr(batches, "by_pieces", lambda prompter: prompter)
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, model, tmp_path, monkeypatch):
    labelled = load_config(name).answers.source == "gold"
    sizes = ["task.n_train=24"] if labelled else ["task.n_questions=12"]
    given = [name, f"model.name={model}", f"run={tmp_path}", *sizes, *SMALL, *STEPS]
    if load_config(name).teacher.model:
        given += [f"teacher.model={model}"]
    if load_config(name).hidden.filtered:
        given += ["hidden.filters.steps=2"]
    if name == "methods/opcd":
        command("train", *given)
    else:
        in_process(monkeypatch, "train", *given)
    rows = Run(tmp_path).metrics()
    assert [row["step"] for row in rows] == [1, 2]
    loss = load_config(name).loss
    assert ("policy" in rows[0]) == (loss.policy > 0)
    assert ("also" in rows[0]) == (load_config(name).answers.also != "none")
    for row in rows:
        want = loss.ce * row["ce"] + loss.weight * row.get("distill", 0)
        want += load_config(name).hidden.weight * row.get("hidden", 0)
        want += load_config(name).answers.also_weight * row.get("also", 0) + row.get("policy", 0)
        assert row["loss"] == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_rows_differ_in_their_method_alone():
    "The same model, task seed, steps, batch and evaluation; as many questions or gold answers."
    base = load_config("methods/sft")
    for name in NAMES:
        cfg = load_config(name)
        assert (cfg.model, cfg.train, cfg.evaluate) == (base.model, base.train, base.evaluate)
        task = "word_problems" if cfg.answers.also == "rationale" else "dates"  # it has rationales
        assert (cfg.task.name, cfg.task.seed, cfg.seed) == (task, base.task.seed, base.seed)
        assert cfg.task.n_train + (cfg.task.n_questions or 0) == 128
        assert cfg.run == f"runs/{name}"


def test_list():
    said = CliRunner().invoke(app, ["methods"]).output
    assert all(m.config in said and m.source in said for m in methods())


def test_a_file_without_a_source_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("# Mine: something new.\nextends: sft.yaml\n")
    with raises("mine.yaml: it must begin with"):
        Method.read("methods/mine", tmp_path / "mine.yaml")
