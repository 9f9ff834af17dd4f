"Each guard set off for real: broken numbers, memory and disk that run out, processes that die; and the same gradients however many processes there are."

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch.testing import assert_close

import icl_distill.training.loop as T
from icl_distill.data.alignment import Aligned
from icl_distill.core.files import InputError, run_lock
from icl_distill.models.loading import frozen_head
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step, explain_out_of_memory

from helpers_training import (
    names,
    arguments,
    config,
    environment,
    equal,
    go,
    here,
    lines,
    tiny,
    with_adapter,
)

# ---- numbers


def test_loss_that_runs_away(tmp_path):
    "A learning rate beyond all bounds: the step is named and its batch kept; what was saved before stays and is not gone on from silently."
    go(tmp_path, "lr=1e30", "warmup_steps=0", "steps=1")
    with pytest.raises(InputError, match="step 2: the loss is (nan|inf).*bad_batch_0.json"):
        go(tmp_path, "lr=1e30", "warmup_steps=0")
    bad = json.loads((tmp_path / "bad_batch_0.json").read_text())
    assert (
        bad["step"] == 2 and len(bad["batch"]) == 6 and all(a["student_ids"] for a in bad["batch"])
    )
    assert names(tmp_path) == ["step_000001"] and len(lines(tmp_path)) == 1


def test_gradient_that_is_not_finite(tmp_path, monkeypatch):
    "A finite loss whose gradient is not: caught by its norm."
    real = T.backward_step

    def broken(learner, *args, **kw):
        sums = real(learner, *args, **kw)
        next(p for p in learner.student.parameters() if p.requires_grad).grad[0, 0] = float("inf")
        return sums

    monkeypatch.setattr(T, "backward_step", broken)
    with pytest.raises(
        InputError, match="step 1: the loss is [0-9.]+ and the gradient's norm (inf|nan)"
    ):
        go(tmp_path)
    assert not names(tmp_path)


def test_batch_without_an_answer(tmp_path):
    "Nothing to learn from is an error, not a loss of 0/0."
    from accelerate import Accelerator

    model = with_adapter(tiny())
    loss = config(tmp_path).loss
    empty = [[Aligned("e", [5, 6, 7], [5, 6, 7], 0)]]
    with pytest.raises(InputError, match="without a single answer token"):
        backward_step(
            Learner(Student(model), None, frozen_head(model), Accelerator(cpu=True), loss, 2),
            empty,
        )


# ---- memory


def test_out_of_gpu_memory(tmp_path, monkeypatch):
    "What CUDA says becomes which example, how long, and what to lower."

    def full(*args, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(T, "backward_step", full)
    with pytest.raises(
        InputError,
        match=r"out of memory with 3 examples at once, the longest 'train-\d+': \d+ tokens for the student, \d+ for the teacher. Lower train.batch_size .*gradient_checkpointing",
    ):
        go(tmp_path)


def test_out_of_memory():
    "The same from a machine without a GPU, which really has no such memory."
    micro = [[Aligned("short", [1, 2], [1, 2, 3], 1), Aligned("long", [1, 2, 3], [1] * 9, 1)]]
    with (
        pytest.raises(
            InputError,
            match="2 examples at once, the longest 'long': 3 tokens for the student, 9 for the teacher",
        ),
        explain_out_of_memory(micro),
    ):
        torch.empty(2**46, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="same number of elements"):
        with explain_out_of_memory(micro):
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


@pytest.mark.parametrize(
    "what,size,over",
    [("adapter", 20_000, []), ("tokenizer", 1_500_000, []), ("state", 6_000_000, ["lora.r=1100"])],
)
def test_full_disk(what, size, over, whole, tmp_path):
    "While any part of a checkpoint is written: a clear error, the checkpoint before as it was, and from there on when there is room again."
    go(tmp_path, "steps=2", *over)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    with (
        disk_of(size),
        pytest.raises(
            InputError,
            match="checkpoint .*step_000004 could not be written .*earlier checkpoints are as they were",
        ),
    ):
        go(tmp_path, *over)
    assert before == {
        p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()
    }
    if not over:
        go(tmp_path)
        assert equal(
            whole / "checkpoints/step_000006", tmp_path / "checkpoints/step_000006"
        ) and lines(tmp_path) == lines(whole)


def test_full_disk_while_remembering(tmp_path):
    with (
        disk_of(6000),
        pytest.raises(InputError, match="targets could not be written to .*targets"),
    ):
        go(tmp_path / "r", "teacher.cache=disk", "teacher.top_k=256")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.safetensors"))


def test_full_disk_as_a_command(folder, tmp_path):
    "A message, exit code 2, no traceback; the checkpoint before is used by the next start."
    run = tmp_path / "full"
    here(folder, run, "steps=3")
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); from icl_distill.train import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(folder, run)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and "error: checkpoint" in done.stderr
        and "step_000006 could not be written" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    assert names(run) == ["step_000003"]


# ---- processes

OVER = [
    "save_every=2",
    "log_every=3",
    "teacher.cache=ram",
]  # lines of metrics that span a checkpoint
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
HOLD = "import sys, time\nfrom pathlib import Path\nfrom icl_distill.core.files import run_lock\nwith run_lock(Path(sys.argv[1]), 'training'): print('held', flush=True); time.sleep(600)"


def test_two_trainings_in_one_run(whole, tmp_path):
    "The second is refused and touches nothing; when the first is killed, the run is free."
    p = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert p.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is training"):
            go(tmp_path / "run")
        assert [f.name for f in (tmp_path / "run").iterdir()] == [".lock"]
        p.kill()
        p.wait()
        assert equal(go(tmp_path / "run"), whole / "checkpoints" / names(whole)[-1])
        with run_lock(tmp_path / "run", "training"):
            pass
    finally:
        p.kill()
        p.wait()
        p.stdout.close()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / "run" / "targets" / "ab").mkdir(parents=True)
    (left := tmp_path / "run" / "targets" / "ab" / "abc.1.tmp").write_text("half")
    go(tmp_path / "run", "teacher.cache=disk")
    assert not left.exists() and list((tmp_path / "run" / "targets").glob("*/*.safetensors"))


def launch(*args, **kw):
    return subprocess.Popen(
        [sys.executable, *LAUNCH, *args],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def finish(p, seconds=240):
    try:
        out, _ = p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        p.kill()
        raise
    return p.returncode, out


def seal(run, step):
    return {
        k: v
        for k, v in json.loads((run / f"checkpoints/step_{step:06d}/checkpoint.json").read_text())[
            "files"
        ].items()
        if k != "config.yaml"
    }


def test_a_dead_process_ends_the_launch(folder, tmp_path):
    "Of two real processes one is killed: the launch ends with a message that says so. The same command then goes on, and ends as a launch that nobody disturbed, to the bit, both random states included."
    code, out = finish(
        launch("-m", "icl_distill.train", *arguments(folder, tmp_path / "calm", *OVER))
    )
    assert code == 0, out[-3000:]
    run = tmp_path / "killed"
    p = launch("-m", "icl_distill.train", *arguments(folder, run, *OVER))
    end = time.monotonic() + 120
    while not list(run.glob("checkpoints/step_*")) and p.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    workers = [
        c
        for c in psutil.Process(p.pid).children(recursive=True)
        if "icl_distill.train" in c.cmdline() and c.ppid() == p.pid
    ]
    assert len(workers) == 2, [c.cmdline() for c in workers]
    random.Random().choice(workers).kill()
    code, out = finish(p)
    assert code not in (0, None) and "SIGKILL" in out and "exitcode" in out, out[-3000:]
    assert not psutil.pid_exists(workers[0].pid) and not psutil.pid_exists(workers[1].pid)
    last = int(names(run)[-1][5:])
    assert 2 <= last < 12
    code, out = finish(launch("-m", "icl_distill.train", *arguments(folder, run, *OVER)))
    assert code == 0, out[-3000:]
    assert lines(run) == lines(tmp_path / "calm") and [
        json.loads(l)["step"] for l in lines(run)
    ] == [3, 6, 9, 12]
    assert seal(run, 12) == seal(tmp_path / "calm", 12) and {"process_0.pt", "process_1.pt"} <= set(
        seal(run, 12)
    )
    with pytest.raises(InputError, match="made by 2 processes; now there are 1"):
        here(folder, run, *OVER)


GRADIENTS = """
import sys, json, torch
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from helpers_training import TOY, tiny, tokenizer, with_adapter
from icl_distill.core.config import load_config
from icl_distill.core.files import InputError
from icl_distill.data.prompts import Prompter
from icl_distill.models.loading import frozen_head
from icl_distill.models.teacher import Teacher
from icl_distill.training.batches import micro_batches, prepare
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model = with_adapter(tiny()); head = frozen_head(model)
cfg = load_config("quickstart", ["prompt.template=chat", "context.n_shots=3", "teacher.top_k=16"])
data = prepare(cfg, TOY, Prompter(tokenizer(), cfg.prompt)); student = accelerator.prepare(Student(model))
teacher = Teacher(model, head, tokenizer().pad_token_id, 16, prefixes=data.prefixes)
out, rank, world = {}, accelerator.process_index, accelerator.num_processes
for n in (8, 7, 5):
    for size in (8, 4, 3, 2, 1):
        try: micro = micro_batches(data.aligned[3:3+n], size, rank, world)
        except InputError: continue # seven single ones in two processes
        model.zero_grad(); sums = backward_step(Learner(student, teacher, head, accelerator, cfg.loss, tokenizer().pad_token_id), micro)
        norm = accelerator.clip_grad_norm_(student.parameters(), 1e9)
        out[f"{n}/{size}"] = dict(grad=torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone(), sums=accelerator.reduce(sums, "sum"), norm=norm, shape=torch.tensor([len(m) for m in micro]))
torch.save(out, f"{sys.argv[2]}/{world}_{rank}.pt")
accelerator.end_training()
"""


def test_gradients_of_one_and_two_processes(tmp_path):
    "8×1, 4×2, 2×4, 1×8 and odd sizes, of 8, 7 and 5 examples with answers of uneven length, in one process and in two: one gradient."
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    args = [str(tmp_path / "gradients.py"), os.path.dirname(__file__), str(tmp_path)]
    code, out = finish(launch(*args))
    assert code == 0, out[-3000:]
    one = subprocess.run([sys.executable, *args], env=environment(), capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    runs = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in ("1_0", "2_0", "2_1")]
    for n in (8, 7, 5):
        whole = runs[0][f"{n}/8"]
        assert whole["grad"].abs().max() > 1e-4 and whole["shape"].tolist() == [n]
        for r in runs:
            for size in (8, 4, 3, 2, 1):
                if (x := r.get(f"{n}/{size}")) is None:
                    assert size == 1 and n % 2 and r is not runs[0]
                    continue
                assert_close(x["grad"], whole["grad"], rtol=1e-4, atol=1e-6)
                assert_close(x["sums"], whole["sums"], rtol=1e-4, atol=1e-3)
                assert_close(x["norm"], whole["norm"], rtol=1e-4, atol=1e-6)
    assert (
        runs[1]["7/4"]["shape"].tolist() == [3]
        and runs[2]["7/4"]["shape"].tolist() == [4]
        and runs[1]["8/4"]["shape"].tolist() == [4]
    )  # shared out, not repeated


def test_processes_that_do_not_find_each_other(tmp_path, monkeypatch):
    "Launched as two, but each alone: refused, rather than trained twice over."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes that do not find each other"):
        go(tmp_path)


def test_the_same_everywhere(folder, tmp_path):
    "Two processes, hashing differently: the same metrics, and every file of the last checkpoint."
    for name, seed in (("a", "1"), ("b", "2")):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "icl_distill.train",
                *arguments(folder, tmp_path / name, "steps=3"),
            ],
            env=environment() | dict(PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and seal(tmp_path / "a", 3) == seal(
        tmp_path / "b", 3
    )


# ---- the tool that kills


def test_kill_loop():
    done = subprocess.run(
        [sys.executable, os.path.join(os.path.dirname(__file__), "kill_loop.py"), "--times", "5"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (
        done.returncode == 0
        and done.stdout.strip().endswith("0 runs differ from the uninterrupted one")
        and "5 kills" in done.stdout
    ), done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused(kind, tmp_path, monkeypatch):
    "Where a process holds only shards, the teacher would read past the wrapper that gathers them."
    import accelerate

    class Sharded(accelerate.Accelerator):
        distributed_type = accelerate.DistributedType(kind)

    monkeypatch.setattr(accelerate, "Accelerator", Sharded)
    with pytest.raises(InputError, match=f"does not run under {kind}"):
        go(tmp_path)
