"""Trackers: what accelerate hands them, and what TensorBoard's files hold after a run."""

import json

import pytest
import yaml
from accelerate import tracking
from helpers_training import config, go
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from icl_distill.core.config import (
    Config,
    ContextConfig,
    EvaluateConfig,
    ModelConfig,
    PromptConfig,
    SamplingConfig,
    TaskConfig,
    TrainConfig,
    config_dict,
)
from icl_distill.core.runs import Run
from icl_distill.evaluation.conditions import Condition
from icl_distill.evaluation.evaluate import evaluate
from icl_distill.evaluation.shards import Shard
from icl_distill.testing import (
    REAL_MODEL,
    FakeEngine,
    counting_questions,
    raises,
    real_tokenizer,
)
from icl_distill.training.trackers import check_tracker


def test_tensorboard_has_the_runs_metrics_and_config(tmp_path):
    run = Run(tmp_path / "run")
    go(run.path, "log_every=2", "tracker=tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for key in ("ce", "lr", "loss"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert logged == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]
    kept = yaml.safe_load(next((run.path / "tensorboard").glob("*/hparams.yml")).read_text())
    assert kept["train.steps"] == 6 and kept["model.name"] == run.config.model.name
    sections = {key.partition(".")[0] for key in kept}
    assert sections == set(config_dict(run.config))


class StandIn(tracking.GeneralTracker):
    "A tracker with a server, without the server."

    name = "wandb"
    requires_logging_directory = False
    seen: list = []

    def __init__(self, run_name, **kwargs):
        super().__init__()
        self.seen.append((run_name, kwargs))

    def start(self):
        pass

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.seen.append(values)

    def log(self, values, step=None, **kwargs):
        self.seen.append((step, sorted(values)))

    def finish(self):
        self.seen.append("end")


def test_a_server_gets_project_name_config_and_steps(tmp_path, stand_in):
    go(tmp_path / "my-run", "log_every=3", "tracker=wandb")
    start, kept, *steps, end = stand_in
    assert start == ("icl_distill", {"name": "my-run"})
    assert kept["loss.weight"] == config("x").loss.weight
    assert [step for step, _ in steps] == [3, 6] and "ce" in steps[0][1] and end == "end"


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", StandIn)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.WANDB])
    monkeypatch.setattr(StandIn, "seen", [])
    return StandIn.seen


def test_a_tracker_is_closed_after_a_run_that_failed(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr("icl_distill.training.loop.save_checkpoint", _full)
    with raises("no space", kind=OSError):
        go(tmp_path / "run", "log_every=1", "save_every=2", "tracker=wandb")
    *_, last, end = stand_in
    assert last[0] == 2 and end == "end"


def _full(state):
    raise OSError("no space")


@pytest.fixture
def evaluated(tmp_path):
    "Evaluates a run with two checkpoints by an engine that only pretends."

    def evaluate_with(tracker, **sampling):
        files = {k: counting_questions(tmp_path / f"{k}.jsonl", k, 6) for k in ("train", "test")}
        cfg = Config(
            model=ModelConfig(name=REAL_MODEL, dtype="float32"),
            task=TaskConfig(name="jsonl", path=files["train"], test_path=files["test"], n_dev=1),
            prompt=PromptConfig(template="plain"),
            context=ContextConfig(n_shots=2),
            train=TrainConfig(tracker=tracker),
            evaluate=EvaluateConfig(max_new_tokens=6, sampling=SamplingConfig(**sampling)),
            run=str(tmp_path / "my-run"),
        )
        zero, few = Condition("zero_shot"), Condition("step_20", step=20)
        return evaluate(cfg, [few, zero], FakeEngine(real_tokenizer()), progress=False)

    return evaluate_with


def test_an_evaluation_stands_beside_the_training_in_tensorboard(tmp_path, evaluated):
    results = evaluated("tensorboard")
    folder = tmp_path / "my-run" / "tensorboard"
    events = EventAccumulator(str(folder)).Reload()
    for name, key, step in (("step_20", "checkpoints", 20), ("zero_shot", "zero_shot", 0)):
        (event,) = events.Scalars(f"test/{key}/accuracy")
        assert event.step == step
        assert event.value == pytest.approx(results.conditions[name].accuracy)
    kept = yaml.safe_load(next(folder.glob("*/hparams.yml")).read_text())
    assert kept["evaluate.max_new_tokens"] == 6


def test_a_server_gets_an_evaluation_as_a_run_of_its_own(evaluated, stand_in):
    evaluated("wandb")
    start, kept, *steps, end = stand_in
    assert start == ("icl_distill", {"name": "my-run-evaluation"}) and end == "end"
    assert kept["evaluate.split"] == "test" and [step for step, _ in steps] == [0, 20]
    assert {"test/checkpoints/accuracy", "test/checkpoints/truncated"} <= set(steps[1][1])


def test_several_processes_leave_the_tracker_alone_and_say_so(
    evaluated, stand_in, monkeypatch, capsys
):
    monkeypatch.setattr("icl_distill.evaluation.evaluate.process_of_launch", lambda: (1, 2))
    monkeypatch.setattr("icl_distill.evaluation.evaluate._part", lambda *_: Shard())
    evaluated("wandb")
    assert not stand_in and "not shown there yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,package",
    [("comet_ml", "comet-ml"), ("wandb", "wandb"), ("tensorboard", "'icl_distill[track]'")],
)
def test_a_missing_package_is_named_before_anything_runs(
    name, package, tmp_path, monkeypatch, evaluated
):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with raises(f"train.tracker is {name}", f"pip install {package}"):
        check_tracker(name)
    with raises(f"pip install {package}"):
        go(tmp_path / "run", f"tracker={name}")
    assert not (tmp_path / "run" / "config.yaml").exists()
    with raises(f"pip install {package}", "train.tracker=null"):
        evaluated(name)
    assert not (tmp_path / "my-run").exists()
