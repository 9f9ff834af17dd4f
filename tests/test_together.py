"""Two real processes on the CPU: what one of them cannot do ends both, with its message."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers_training import arguments, count

from icl_distill.core.config import load_config
from icl_distill.core.files import run_lock
from icl_distill.core.hub import load_tokenizer
from icl_distill.core.runs import Run
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task
from icl_distill.evaluation.evaluate import set_up
from icl_distill.models.loading import frozen_head, load_model, weights_hash
from icl_distill.testing import quiet_environment, raises, tiny_folder
from icl_distill.training.batches import prepare
from icl_distill.training.fill import Filling, fill_targets
from icl_distill.training.teachers import TeacherWeights, targets_cache

ACCELERATE = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
ACCELERATE += "--mixed_precision no --dynamo_backend no --main_process_port 0 -m icl_distill.train"
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2 --standalone -m icl_distill.train"
COMMAND = "-m torch.distributed.run --nproc_per_node 2 --standalone --no-python icl-distill"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def start(launcher, *args):
    words = launcher.replace("icl-distill", str(Path(sys.executable).with_name("icl-distill")))
    return subprocess.Popen(
        [sys.executable, *words.split(), *args],
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    "Its exit code and what it said; nothing of it is left running."
    workers = psutil.Process(process.pid).children(recursive=True)
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert not any(worker.is_running() for worker in workers), said
    return process.returncode, said


def failed(process, *words):
    code, said = finish(process)
    assert code != 0, said
    for word in words:
        assert word in said, said
    assert "Connection closed" not in said, said  # gloo's complaint about the other process
    return said


def shared(folder, tmp_path):
    "A run with targets in a folder, its config, and what would be in there."
    over = ["teacher.cache=disk", f"teacher.cache_folder={tmp_path / 'targets'}"]
    args = arguments(folder, tmp_path / "run", *over)
    cfg = load_config(args[0], args[1:], "train")
    tok = load_tokenizer(cfg.model.name)
    data = prepare(cfg, load_task(cfg.task), Prompter(tok, cfg.prompt))
    model = load_model(cfg.model)
    weights = TeacherWeights(model, frozen_head(model), weights_hash(model), cfg.model.dtype)
    cache = targets_cache(cfg, weights)
    return args, cfg, data, cache


@pytest.mark.parametrize(
    "launcher",
    [ACCELERATE, pytest.param(TORCHRUN, marks=pytest.mark.slow)],
    ids=["accelerate", "torchrun"],
)
def test_training(launcher, folder, tmp_path):
    "A damaged file of targets is read by one of the two, in the middle of the first epoch."
    args, cfg, data, cache = shared(folder, tmp_path)
    fill_targets(cfg, Filling(processes=2, progress=False))
    seen = data.batch(2, 2 * cfg.train.batch_size * cfg.train.accumulation, cfg.seed)
    path = cache.path(cache.key(seen[0]))
    path.write_bytes(path.read_bytes()[:100])
    said = failed(start(launcher, *args), f"error: cached targets {path} are damaged")
    assert "Traceback (most recent call last):\n  File" not in said.partition("elastic")[0], said
    assert count(tmp_path / "run") <= 2


def test_filling(folder, tmp_path):
    "One of the two cannot write its targets."
    args, cfg, data, cache = shared(folder, tmp_path)
    last = list(dict.fromkeys(map(cache.key, data.aligned)))[-1]
    obstacle = cache.path(last).parent
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where a folder should be")
    failed(
        start(COMMAND, "targets", *args, "--processes", "2"),
        "error: cached targets could not be written",
    )


@pytest.mark.slow
def test_filling_is_shared(folder, tmp_path):
    args, cfg, data, cache = shared(folder, tmp_path)
    code, said = finish(start(COMMAND, "targets", *args, "--processes", "2"))
    assert code == 0, said
    computed = [int(line.split()[-3]) for line in said.splitlines() if "computed now" in line]
    assert len(computed) == 2 and sum(computed) == len(data.aligned)
    assert all(map(cache.holds, data.aligned))


def evaluation(folder, run, *over):
    "The words of an evaluation, and where its records are."
    sizes = ["task.n_train=40", "task.n_dev=5", "task.n_test=300", "context.n_shots=2"]
    given = [f"model.name={folder}", "model.dtype=float32", *sizes, f"run={run}"]
    args = ["quickstart", *given, "conditions=[zero_shot]", "batch_size=4", *over]
    return ["evaluate", *args], Run(run).usual_evaluation("test")


def test_evaluation(folder, tmp_path):
    "Another process keeps the items of the second one."
    args, place = evaluation(folder, tmp_path / "run", "max_new_tokens=400")
    with run_lock(place.records_folder / "shard-2-of-2", "evaluating shard 2/2"):
        failed(start(COMMAND, *args), "error: another process is evaluating")
    assert not place.exists()


@pytest.mark.slow
def test_evaluation_is_shared(folder, tmp_path):
    args, place = evaluation(folder, tmp_path / "run", "max_new_tokens=2", "n_samples=9")
    code, said = finish(start(COMMAND, *args))
    assert code == 0, said
    assert place.results().conditions["zero_shot"].n == 9
    assert [path.name for path in place.records_folder.iterdir()] == ["zero_shot.jsonl"]
    with raises("shares its items among them by itself"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        set_up(load_config(args[1], [*args[2:], "shard=1/2"], "evaluate"))


def test_a_process_that_is_stuck(folder, tmp_path):
    "One of the two is stopped by the system: the other does not wait for ever, and says where."
    run = tmp_path / "run"
    args = arguments(folder, run, "steps=100000", "save_every=100000", "log_every=1")
    process = start(ACCELERATE, *args, "train.timeout=3")
    end = time.monotonic() + 120
    while count(run) < 3 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    stuck, waiting = workers
    stuck.suspend()
    psutil.wait_procs([waiting], timeout=60)
    stuck.resume()
    said = failed(process, "has not gone on for 3 s", "raise train.timeout")
    assert "process 0: step " in said and "process 1: step " in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "over",
    [
        ["hidden={weight: 1, layers: [], positions: last_prompt, norm: l2}"],
        ["teacher.keep=hidden", "teacher.cache=disk", "loss.kind=forward_kl"],
        ["answers.also=rationale", "loss={weight: 0, ce: 0.5}", "task.name=word_problems"],
        ["hidden={weight: 1, layers: [], norm: std, filters: {steps: 3, lr: 0.003}}"],
    ],
    ids=["states", "last_states", "rationales", "filters"],
)
def test_two_processes_take_the_steps_of_one(folder, tmp_path, over):
    "The same examples a step, in one process or shared by two: the same numbers."
    rows = []
    for name, size, launcher in (("one", 4, "-m icl_distill.train"), ("two", 2, TORCHRUN)):
        given = [*over, f"batch_size={size}", "accumulation=1", "steps=3", "save_every=3"]
        given += ["lora.dropout=0", "log_every=1"]
        code, said = finish(start(launcher, *arguments(folder, tmp_path / name, *given)))
        assert code == 0, said
        rows.append(Run(tmp_path / name).metrics())
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-5), key
