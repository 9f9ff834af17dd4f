"""Trackers: what accelerate hands them, and what TensorBoard's files hold after a run."""

import json

import pytest
import yaml
from accelerate import tracking
from helpers_training import config, go
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from icl_distill.core.config import config_dict
from icl_distill.core.runs import Run
from icl_distill.testing import raises
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


def test_a_server_gets_project_name_config_and_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", StandIn)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.WANDB])
    monkeypatch.setattr(StandIn, "seen", [])
    go(tmp_path / "my-run", "log_every=3", "tracker=wandb")
    start, kept, *steps, end = StandIn.seen
    assert start == ("icl_distill", {"name": "my-run"})
    assert kept["loss.weight"] == config("x").loss.weight
    assert [step for step, _ in steps] == [3, 6] and "ce" in steps[0][1] and end == "end"


@pytest.mark.parametrize(
    "name,package",
    [("comet_ml", "comet-ml"), ("wandb", "wandb"), ("tensorboard", "'icl_distill[track]'")],
)
def test_a_missing_package_is_named_before_anything_runs(name, package, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with raises(f"train.tracker is {name}", f"pip install {package}"):
        check_tracker(name)
    with raises(f"pip install {package}"):
        go(tmp_path / "run", f"tracker={name}")
    assert not (tmp_path / "run" / "config.yaml").exists()
