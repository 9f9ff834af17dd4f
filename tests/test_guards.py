"""Each guard set off for real: broken numbers, full memory and disk, processes that die.

And the same gradients however many processes there are.
"""

import contextlib
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from gradients import EXAMPLES, SIZES
from helpers_training import (
    PAD,
    arguments,
    config,
    equal,
    go,
    here,
    lines,
    names,
    same_runs,
    steps_of,
)
from torch.testing import assert_close

from icl_distill.core.files import InputError, run_lock
from icl_distill.data.alignment import Aligned
from icl_distill.models.loading import frozen_head
from icl_distill.testing import noisy_adapter, quiet_environment, raises, tiny_model
from icl_distill.training import loop
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step, explain_out_of_memory

HERE = Path(__file__).resolve().parent

# ---- numbers


def test_loss_that_runs_away(tmp_path):
    """A learning rate beyond all bounds: the step is named and its batch kept.

    What was saved before stays and is not gone on from silently.
    """
    go(tmp_path, "lr=1e30", "warmup_steps=0", "steps=1")
    with pytest.raises(InputError, match="step 2: the loss is (nan|inf).*bad_batch_0.json"):
        go(tmp_path, "lr=1e30", "warmup_steps=0")
    bad = json.loads((tmp_path / "bad_batch_0.json").read_text())
    assert bad["step"] == 2
    assert len(bad["batch"]) == 6
    assert all(example["student_ids"] for example in bad["batch"])
    assert names(tmp_path) == ["step_000001"]
    assert len(lines(tmp_path)) == 1


def test_gradient_that_is_not_finite(tmp_path, monkeypatch):
    "A finite loss whose gradient is not: caught by its norm."
    real = loop.backward_step

    def broken(learner, *args, **kw):
        sums = real(learner, *args, **kw)
        next(p for p in learner.student.parameters() if p.requires_grad).grad[0, 0] = float("inf")
        return sums

    monkeypatch.setattr(loop, "backward_step", broken)
    with pytest.raises(
        InputError, match="step 1: the loss is [0-9.]+ and the gradient's norm (inf|nan)"
    ):
        go(tmp_path)
    assert not names(tmp_path)


def test_batch_without_an_answer(tmp_path):
    "Nothing to learn from is an error, not a loss of 0/0."
    from accelerate import Accelerator

    model = noisy_adapter(tiny_model())
    loss = config(tmp_path).loss
    learner = Learner(Student(model), None, frozen_head(model), Accelerator(cpu=True), loss, PAD)
    with raises("without a single answer token"):
        backward_step(learner, [[Aligned("e", [5, 6, 7], [5, 6, 7], 0)]])


# ---- memory


def test_out_of_gpu_memory(tmp_path, monkeypatch):
    "What CUDA says becomes which example, how long, and what to lower."

    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(loop, "backward_step", full)
    said = (
        r"out of memory with 3 examples at once, the longest 'train-\d+': \d+ tokens for the "
        r"student, \d+ for the teacher. Lower train.batch_size .*gradient_checkpointing"
    )
    with pytest.raises(InputError, match=said):
        go(tmp_path)


def test_out_of_memory():
    "The same from a machine without a GPU, which really has no such memory."
    micro = [[Aligned("short", [1, 2], [1, 2, 3], 1), Aligned("long", [1, 2, 3], [1] * 9, 1)]]
    said = "2 examples at once, the longest 'long': 3 tokens for the student, 9 for the teacher"
    with raises(said), explain_out_of_memory(micro):
        torch.empty(2**46, dtype=torch.uint8)
    with raises("same number of elements", kind=RuntimeError), explain_out_of_memory(micro):
        torch.ones(2) @ torch.ones(3)  # another error stays what it is


# ---- disk


@contextlib.contextmanager
def disk_of(size):
    "No file may become larger than this: a write beyond it fails as on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "what,size,over",
    [("adapter", 20_000, []), ("tokenizer", 1_500_000, []), ("state", 6_000_000, ["lora.r=1100"])],
)
def test_full_disk(what, size, over, whole, tmp_path):
    """While any part of a checkpoint is written: a clear error, the checkpoint before as it was.

    Training goes on from there when there is room again.
    """
    go(tmp_path, "steps=2", *over)
    before = contents(tmp_path / "checkpoints")
    said = "checkpoint .*step_000004 could not be written .*earlier checkpoints are as they were"
    with disk_of(size), pytest.raises(InputError, match=said):
        go(tmp_path, *over)
    assert contents(tmp_path / "checkpoints") == before
    if not over:
        go(tmp_path)
        same_runs(whole, tmp_path, 6)


def test_full_disk_while_remembering(tmp_path):
    with (
        disk_of(6000),
        pytest.raises(InputError, match="targets could not be written to .*targets"),
    ):
        go(tmp_path / "r", "teacher.cache=disk", "teacher.top_k=256")
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.safetensors"))


TRAIN_ON_A_FULL_DISK = """
import resource
import sys

from icl_distill.train import main

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


def test_full_disk_as_a_command(folder, tmp_path):
    "A message, exit code 2, no traceback; the checkpoint before is used by the next start."
    run = tmp_path / "full"
    here(folder, run, "steps=3")
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ON_A_FULL_DISK, *arguments(folder, run)],
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "error: checkpoint" in done.stderr, done.stderr
    assert "step_000006 could not be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert names(run) == ["step_000003"]


# ---- processes

OVER = ["save_every=2", "log_every=3", "teacher.cache=ram"]  # lines that span a checkpoint
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]
HOLD_A_RUN = """
import sys
import time
from pathlib import Path

from icl_distill.core.files import run_lock

with run_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_trainings_in_one_run(whole, tmp_path):
    "The second is refused and touches nothing; when the first is killed, the run is free."
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_RUN, run],
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with raises("another process is training"):
            go(run)
        assert [path.name for path in run.iterdir()] == [".lock"]
        process.kill()
        process.wait()
        assert equal(go(run), whole / "checkpoints" / names(whole)[-1])
        with run_lock(run, "training"):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    targets = tmp_path / "run" / "targets"
    left = targets / "ab" / "abc.1.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    go(tmp_path / "run", "teacher.cache=disk")
    assert not left.exists()
    assert list(targets.glob("*/*.safetensors"))


def launch(*args, **kw):
    return subprocess.Popen(
        [sys.executable, *LAUNCH, *args],
        env=quiet_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def launch_training(folder, run):
    return launch("-m", "icl_distill.train", *arguments(folder, run, *OVER, "teacher.cache=disk"))


def finish(process, seconds=240):
    "Its exit code, and what it said."
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


def seal(run, step):
    "The hashes of a checkpoint's files, but for the config's, which names the run."
    info = json.loads((run / f"checkpoints/step_{step:06d}/checkpoint.json").read_text())
    return {name: digest for name, digest in info["files"].items() if name != "config.yaml"}


def kill_a_worker(process, run):
    "Once a checkpoint is written, kill one of a launch's two processes. The numbers of both."
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if list(run.glob("checkpoints/step_*")):
            break
        time.sleep(0.005)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "icl_distill.train" in child.cmdline() and child.ppid() == process.pid
    ]
    assert len(workers) == 2, [worker.cmdline() for worker in workers]
    random.Random().choice(workers).kill()
    return [worker.pid for worker in workers]


def test_a_dead_process_ends_the_launch(folder, tmp_path):
    """Of two real processes one is killed: the launch ends with a message that says so.

    The same command then goes on, and ends as a launch that nobody disturbed, to the bit, both
    random states included.
    """
    calm, run = tmp_path / "calm", tmp_path / "killed"
    code, said = finish(launch_training(folder, calm))
    assert code == 0, said[-3000:]
    process = launch_training(folder, run)
    workers = kill_a_worker(process, run)
    code, said = finish(process)
    assert code not in (0, None), said[-3000:]
    assert "SIGKILL" in said, said[-3000:]
    assert "exitcode" in said, said[-3000:]
    assert not any(psutil.pid_exists(worker) for worker in workers)
    last = int(names(run)[-1].removeprefix("step_"))
    assert 2 <= last < 12
    code, said = finish(launch_training(folder, run))
    assert code == 0, said[-3000:]
    assert lines(run) == lines(calm)
    assert steps_of(run) == [3, 6, 9, 12]
    assert seal(run, 12) == seal(calm, 12)
    assert {"process_0.pt", "process_1.pt"} <= set(seal(run, 12))
    with raises("made by 2 processes; now there are 1"):
        here(folder, run, *OVER)


def test_gradients_of_one_and_two_processes(tmp_path):
    """One gradient, of 8, 7 and 5 examples with answers of uneven length.

    8×1, 4×2, 2×4, 1×8 and odd sizes, in one process and in two.
    """
    args = [str(HERE / "gradients.py"), str(tmp_path)]
    code, said = finish(launch(*args))
    assert code == 0, said[-3000:]
    alone = subprocess.run(
        [sys.executable, *args], env=quiet_environment(), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    runs = [torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("1_0", "2_0", "2_1")]
    for n in EXAMPLES:
        whole = runs[0][f"{n}/8"]
        assert whole["grad"].abs().max() > 1e-4
        assert whole["shape"].tolist() == [n]
        for run in runs:
            missing = {size for size in SIZES if f"{n}/{size}" not in run}
            assert missing <= ({1} if n % 2 and run is not runs[0] else set())
            for size in set(SIZES) - missing:
                part = run[f"{n}/{size}"]
                assert_close(part["grad"], whole["grad"], rtol=1e-4, atol=1e-6)
                assert_close(part["sums"], whole["sums"], rtol=1e-4, atol=1e-3)
                assert_close(part["norm"], whole["norm"], rtol=1e-4, atol=1e-6)
    # shared out, not repeated
    assert runs[1]["7/4"]["shape"].tolist() == [3]
    assert runs[2]["7/4"]["shape"].tolist() == [4]
    assert runs[1]["8/4"]["shape"].tolist() == [4]


def test_processes_that_do_not_find_each_other(tmp_path, monkeypatch):
    "Launched as two, but each alone: refused, rather than trained twice over."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises("2 processes that do not find each other"):
        go(tmp_path)


def test_the_same_everywhere(folder, tmp_path):
    "Two processes, hashing differently: the same metrics, and every file of the last checkpoint."
    for name, seed in (("a", "1"), ("b", "2")):
        args = arguments(folder, tmp_path / name, "steps=3")
        done = subprocess.run(
            [sys.executable, "-m", "icl_distill.train", *args],
            env=quiet_environment(PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert seal(tmp_path / "a", 3) == seal(tmp_path / "b", 3)


# ---- the tool that kills


@pytest.mark.parametrize(
    "times, arms",
    [(1, ("disk",)), pytest.param(12, (), marks=pytest.mark.slow)],
    ids=["one kind", "all kinds"],
)
def test_kill_loop(times, arms):
    which = ["--arms", *arms] if arms else []
    done = subprocess.run(
        [sys.executable, HERE / "kill_loop.py", "--times", str(times), *which],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert done.stdout.strip().endswith("0 runs differ from the uninterrupted one"), said
    assert f"{times} kills" in done.stdout, said


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused(kind, tmp_path, monkeypatch):
    "The teacher would read past accelerate's wrapper that gathers them; what to do is said."
    import accelerate

    class Sharded(accelerate.Accelerator):
        distributed_type = accelerate.DistributedType(kind)

    monkeypatch.setattr(accelerate, "Accelerator", Sharded)
    with raises(f"does not run under {kind}", "train.shard=true"):
        go(tmp_path)
