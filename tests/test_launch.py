"Training as a process of its own: launched, attached to, stopped, resumed, or refused."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from icl_distill.core.files import InputError
from icl_distill.app.cli import app
from icl_distill.app.launch import Plan, accelerate_configs, attach, launch
from icl_distill.app.launched import read_bar
from icl_distill.app.monitor import live, monitor, monitor_html
from icl_distill.evaluation.grid import read_study
from icl_distill.testing import tiny_folder

root = Path(__file__).resolve().parent.parent
REFUSED = ("FSDP", "DEEPSPEED")


@pytest.fixture(autouse=True)
def _env(monkeypatch):
    for k, v in dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTHONPATH=str(root)).items():
        monkeypatch.setenv(k, v)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A random Llama with SmolLM2's tokenizer."
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def args(model, tmp_path):
    return [
        "quickstart",
        f"model.name={model}",
        "model.dtype=float32",
        "task.n_train=30",
        "task.n_dev=5",
        "task.n_test=5",
        "context.n_shots=2",
        "teacher.top_k=16",
        "batch_size=4",
        "save_every=100000",
        "warmup_steps=0",
        f"run={tmp_path / 'run'}",
    ]


def until(test, run, limit=120):
    end = time.monotonic() + limit
    while not test() and time.monotonic() < end and run.process is not None:
        time.sleep(0.1)
    assert test(), run.log


def test_a_demonstration_ends_with_its_kernel(args):
    "The process that launched it is gone, and soon so is the run."
    script = (
        "from icl_distill.app.launch import launch\n"
        f"print(launch(*{args!r}, 'steps=1000000', with_kernel=True).info['pid'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    process, end = int(done.stdout), time.monotonic() + 120

    def lives():
        if not psutil.pid_exists(process):
            return False
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE

    while lives() and time.monotonic() < end:
        time.sleep(0.2)
    assert not lives()


def test_the_whole_life_of_a_run(args, tmp_path):
    "Started by a process that ends at once; found, watched and stopped here; restarted; finished."
    script = (
        "from icl_distill.app.launch import launch\n"
        f"print(launch(*{args!r}, 'steps=1000000').info['pid'])"
    )
    pid = int(
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
        ).stdout
    )
    run = attach(tmp_path / "run")
    assert run.process.pid == pid and os.getsid(pid) == pid
    until(lambda: len(run.rows()) > 2, run)
    s = run.status()
    assert (
        s["state"] == "running"
        and s["steps"] == 1000000
        and s["per_second"] > 0
        and s["left"]
        and s["loss"] > 0
    )
    assert "of 1000000" in monitor_html(run) and "data:image/png" in monitor_html(run)
    with pytest.raises(InputError, match=f"process {pid}.*attach"):
        launch(*args)
    run.stop()
    run.wait(60)
    s = run.status()
    assert (
        s["state"] == "stopped"
        and "SIGTERM" in s["said"]
        and (
            tmp_path / "run" / "checkpoints" / f"step_{s['step']:06d}" / "checkpoint.json"
        ).exists()
    )
    again = launch(*args, f"steps={s['step'] + 3}").wait(120)
    assert again.status()["state"] == "finished" and [r["step"] for r in run.rows()] == list(
        range(1, s["step"] + 4)
    )
    assert "finished" in monitor_html(attach(tmp_path / "run")) and "left" not in again.status()


def test_a_run_that_fails(args, tmp_path):
    run = launch(*args, "context.n_shots=50").wait(120)
    s = run.status()
    assert (
        s["state"] == "failed"
        and s["said"].startswith("error: context.n_shots is 50")
        and "context.n_shots is 50" in monitor_html(run)
    )


def test_a_killed_run(args, tmp_path):
    run = launch(*args, "steps=1000000")
    until(lambda: run.status()["state"] == "running", run)
    for p in [*run.process.children(recursive=True), run.process]:
        p.kill()
    run.wait(30)
    assert run.status()["state"] == "failed"
    (tmp_path / "run" / "launch.json").write_text(
        json.dumps(run.info | dict(pid=os.getpid()))
    )  # the number is another's now
    assert attach(tmp_path / "run").process is None


def test_two_processes_on_the_cpu(args, tmp_path):
    "One run, not two: the checkpoint says so. And without what makes them one, training refuses."
    run = launch(*args, "steps=2", accelerate_config="two_cpus").wait(240)
    assert run.status()["state"] == "finished", run.log
    assert (
        json.loads(
            (tmp_path / "run" / "checkpoints" / "step_000002" / "checkpoint.json").read_text()
        )["processes"]
        == 2
    )


def test_a_run_started_by_hand(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "ce": 2.0}\n{"step": 2, "loss": 1.0, "ce": 1.0}\n'
    )
    (tmp_path / "config.yaml").write_text("train: {steps: 2}\n")
    assert attach(tmp_path).status() == dict(state="finished", steps=2, loss=1.0, ce=1.0, step=2)
    with pytest.raises(InputError, match="no run there"):
        attach(tmp_path / "gone")


def test_without_the_hardware(monkeypatch, tmp_path):
    "The exact command, what is missing, memory and time; nothing is started."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = launch("online_v1", "train.accumulation=2", "task.path=./gone", num_processes=4)
    assert isinstance(plan, Plan) and "4 GPUs" in plan.why and "has 2" in plan.why
    assert (
        plan.command
        == "accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--multi_gpu --num_processes 4 "
        "-m icl_distill.train online_v1 train.accumulation=2 task.path=./gone"
    )
    for text in (repr(plan), plan._repr_html_()):
        assert "A100-80GB" in text and "student activations" in text and "accumulation=2" in text
    assert (
        "--config_file configs/accelerate/four_a100.yaml"
        in launch("online_v1", "task.path=./gone", accelerate_config="four_a100").command
    )
    assert (
        "each, with its --machine_rank"
        in launch("online_v1", "task.path=./gone", accelerate_config="multi_node").why
    )
    assert (
        "lengths are not known"
        in launch("online_v1", "task.path=./gone", "context.n_shots=3", num_processes=4).needs
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (root / "configs" / "accelerate").glob("*.yaml"))
)
def test_accelerate_config(name, args, monkeypatch):
    "accelerate's own loader reads it."
    path = accelerate_configs()[name]
    conf = load_config_from_file(str(path))
    assert (
        conf.num_processes > 0
        and path.read_text().startswith("#")
        and yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_launch_type_that_is_refused(kind, args, tmp_path):
    "A file of one's own, as `accelerate config` writes it; what to do instead is said."
    own = tmp_path / "own.yaml"
    own.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind}\n")
    with pytest.raises(InputError, match="does not run.*MULTI_GPU.*train.shard=true"):
        launch(*args, accelerate_config=str(own))


def test_one_cpu(args):
    assert (
        launch(*args, "steps=2", accelerate_config="one_cpu").wait(120).status()["state"]
        == "finished"
    )


def test_bad_input(args, tmp_path):
    for over, kw, words in (
        (["setps=3"], {}, "train.steps"),
        ([], dict(accelerate_config="ten_gpus"), "ten_gpus.*four_a100"),
        ([], dict(accelerate_config=str(tmp_path / "bad.yaml")), "could not be read"),
    ):
        (tmp_path / "bad.yaml").write_text("nonsense: 1\n")
        with pytest.raises(InputError, match=words):
            launch(*args, *over, **kw)
    assert not (tmp_path / "run").exists()


def test_cluster_examples():
    assert subprocess.run(["bash", "-n", root / "configs" / "cluster" / "slurm.sh"]).returncode == 0
    sky = yaml.safe_load((root / "configs" / "cluster" / "skypilot.yaml").read_text())
    assert (
        "configs/accelerate/four_a100.yaml" in sky["run"]
        and "icl_distill.train" in sky["run"]
        and sky["resources"]["accelerators"] == "A100-80GB:4"
    )


def test_a_job_for_each_cell(tmp_path, monkeypatch):
    "Its script runs the line that `--commands` prints, with the bucket where the study looks."
    sky = yaml.safe_load((root / "configs" / "cluster" / "skypilot_study.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    out = CliRunner().invoke(app, ["study", "gsm8k", "--commands"], catch_exceptions=False)
    lines = out.output.splitlines()
    assert sky["envs"]["COMMAND"] == lines[0] and len(lines) == len(read_study("gsm8k").cells)
    assert sky["file_mounts"].keys() == {"/runs"} and sky["resources"]["use_spot"]
    assert subprocess.run(["bash", "-n"], input=sky["setup"], text=True).returncode == 0
    program = tmp_path / "icl" / "bin" / "icl-distill"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$@"; readlink runs\n')
    program.chmod(0o755)
    (program.parent / "activate").write_text(f"PATH={program.parent}:$PATH\n")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "COMMAND": lines[-1]}
    script = ["bash", "-euc", sky["run"]]
    told = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.splitlines() == [lines[-1].removeprefix("icl-distill "), "/runs"]


@pytest.mark.parametrize(
    "log,said",
    [
        ("", {}),
        ("no bar", {}),
        ("0/80 [00:00<?, ?step/s]", dict(step=0, steps=80)),
        (
            "1/80 [00:01<00:02, 2.00s/step]\r3/80 [00:01<01:02, 2.50step/s, loss=1.2]",
            dict(step=3, steps=80, per_second=2.5, left="01:02"),
        ),
    ],
)
def test_the_bar(log, said):
    assert read_bar(log) == said


def test_the_widget_follows(args, monkeypatch):
    "The same page as the static one, renewed; the button stops the run."
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert live()
    run = launch(*args, "steps=1000000")
    box = monitor(run)
    view, button = box.children
    until(lambda: "running" in view.value and "data:image/png" in view.value, run)
    button.click()
    run.wait(60)
    time.sleep(2.5)
    assert (
        "stopped" in view.value
        and button.layout.display == "none"
        and run.status()["state"] == "stopped"
    )
