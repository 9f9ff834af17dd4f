"""Which device and dtype a machine gets, what a run keeps of them, and the lines that are said
before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icl_distill.core import devices
from icl_distill.core.checkpoints import Checkpoint
from icl_distill.core.config import Config, load_config, replace
from icl_distill.core.devices import (
    Machine,
    calm_threads,
    choose_device,
    choose_dtype,
    cores,
    gpu_count,
    machine_of,
    say_machine,
    settled,
    threads_each,
)
from icl_distill.core.files import InputError
from icl_distill.core.pace import Pace, estimate_line, say_estimate, span, too_long
from icl_distill.core.runs import Run
from icl_distill.evaluation.evaluate import evaluate
from icl_distill.models.engines import choose_engine, open_engine
from icl_distill.models.generation import TransformersEngine
from icl_distill.models.loading import kept_dtype, load_adapter, weights_hash
from icl_distill.testing import real_tokenizer, square_task, tiny_folder, tiny_model
from icl_distill.training import step
from icl_distill.training.loop import train

os.environ["ACCELERATE_USE_CPU"] = "true"

pytestmark = pytest.mark.usefixtures("one_thread")


def config(run, *over):
    settings = (
        "model.dtype=float32 prompt.template=chat context.n_shots=3 teacher.top_k=16 steps=6 "
        "save_every=2 batch_size=3 accumulation=2"
    )
    return load_config("quickstart", [*settings.split(), f"run={run}", *over], "train")


def trained(cfg, base=None):
    return train(cfg, base or tiny_model(), real_tokenizer(), square_task(), progress=False)


def go(run, *over, base=None):
    return trained(config(run, *over), base)


def auto(run, *over):
    return config(run, "model.dtype=auto", *over)


# --- the decisions, machine by machine


@pytest.fixture
def machine(monkeypatch):
    "Pretend to be another machine."

    def pretend(gpus=(), capability=(0, 0), macos=0, cpu=False):
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in gpus)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major
        )
        monkeypatch.setattr(devices, "cpu_bfloat16", lambda: cpu)

    return pretend


MACHINES = [
    ({}, "cpu", "float32"),
    (dict(cpu=True), "cpu", "bfloat16"),
    (dict(gpus=["cuda"], capability=(9, 0)), "cuda", "bfloat16"),
    (dict(gpus=["cuda"], capability=(8, 0)), "cuda", "bfloat16"),
    (dict(gpus=["cuda"], capability=(7, 5), cpu=True), "cuda", "float16"),
    (dict(gpus=["cuda"], capability=(7, 0)), "cuda", "float16"),
    (dict(gpus=["cuda"], capability=(6, 1)), "cuda", "float32"),
    (dict(gpus=["xpu"]), "xpu", "bfloat16"),
    (dict(gpus=["mps"], macos=14), "mps", "bfloat16"),
    (dict(gpus=["mps"], macos=13), "mps", "float32"),
    (dict(gpus=["mps", "cuda"], capability=(8, 6)), "cuda", "bfloat16"),
]


@pytest.mark.parametrize("what,device,dtype", MACHINES)
def test_what_auto_takes(machine, what, device, dtype):
    machine(**what)
    m = machine_of(Config())
    assert (m.device, m.dtype) == (device, dtype)
    assert settled(Config()).model.dtype == dtype
    named = choose_dtype("float32", device)
    assert named == ("float32", "as asked for")


@pytest.mark.parametrize("what,device,dtype", MACHINES)
def test_the_cpu_of_any_machine(machine, what, device, dtype):
    machine(**what)
    wanted = "bfloat16" if what.get("cpu") else "float32"
    m = machine_of(Config(device="cpu"))
    assert (m.device, m.dtype) == ("cpu", wanted)


@pytest.mark.parametrize("wanted", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_there(machine, wanted):
    machine()
    with pytest.raises(InputError, match=f"device={wanted}: torch sees none here; it sees cpu"):
        choose_device(wanted)
    with pytest.raises(InputError, match=f"device={wanted}"):
        train(replace(Config(), device=wanted), progress=False)
    machine([wanted])
    assert choose_device(wanted) == (wanted, "as asked for")


def test_accelerate_use_cpu(machine, monkeypatch):
    machine(["cuda"], (8, 0))
    for yes in ("true", "1", "TRUE", "yes"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", yes)
        assert choose_device() == ("cpu", "ACCELERATE_USE_CPU is set")
        assert choose_device("cpu") == ("cpu", "as asked for")
        with pytest.raises(InputError, match="ACCELERATE_USE_CPU is set"):
            choose_device("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert choose_device()[0] == "cuda"


def test_processors(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if hasattr(torch.cpu, name):
            monkeypatch.setattr(torch.cpu, name, lambda: False)
    info = "flags : avx2 fma\n"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: info)
    assert not devices.cpu_bfloat16()
    info = "processor : 0\nFeatures : fp asimd i8mm bf16 dgh\n"
    assert devices.cpu_bfloat16()
    info = "processor : 0\nFeatures : fp asimd notbf16\n"
    assert not devices.cpu_bfloat16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(amx_bf16=True), raising=False)
    assert devices.cpu_bfloat16()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not devices.cpu_bfloat16()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert devices.cpu_bfloat16()


def test_engines_follow(machine, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda n: object())
    machine(["cuda"], (8, 0))
    assert choose_engine("auto")[0] == "vllm"
    assert choose_engine("auto", "cpu") == ("transformers", "the device is cpu")
    cfg = load_config(None, ["device=cpu", "evaluate.engine=vllm", "model.dtype=float32"])
    with pytest.raises(InputError, match="evaluate.engine=vllm with device=cpu"):
        open_engine(cfg, None, [])
    machine(["mps"], macos=14)
    assert choose_engine("auto") == ("transformers", "the device is mps")


def test_gpus_are_counted(machine, monkeypatch):
    machine(["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [gpu_count(k) for k in ("auto", "cuda", "cpu", "mps")] == [4, 4, 0, 0]
    machine(["mps"])
    assert [gpu_count(k) for k in ("auto", "cuda", "mps")] == [1, 0, 1]


# --- a run keeps its dtype


def test_the_dtype_taken_is_recorded(tmp_path, machine):
    machine()
    folder = trained(auto(tmp_path, "steps=1", "teacher.cache=disk"))
    assert load_config(str(tmp_path / "config.yaml")).model.dtype == "float32"
    assert load_config(str(folder / "config.yaml")).model.dtype == "float32"
    assert json.loads((folder / "checkpoint.json").read_text())["dtype"] == "float32"
    go(tmp_path / "named", "steps=1", "teacher.cache=disk")
    targets = [
        sorted(p.name for p in (r / "targets").rglob("*.safetensors"))
        for r in (tmp_path, tmp_path / "named")
    ]
    assert targets[0] == targets[1] != []


def test_a_resume_keeps_it(tmp_path, machine):
    "Here float32; the machine on which it goes on would take bfloat16."
    machine()
    trained(auto(tmp_path, "steps=2"))
    machine(cpu=True)
    folder = trained(auto(tmp_path, "steps=4", "device=cpu"))
    assert folder.name == "step_000004" and Checkpoint.read(folder).dtype == "float32"
    with pytest.raises(InputError, match="model.dtype: float32 -> bfloat16"):
        trained(config(tmp_path, "model.dtype=bfloat16"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def asked(model_folder, tmp_path, *over):
    for name, start in (("train", 0), ("test", 50)):
        lines = [
            json.dumps(dict(question=f"{i} + 1?", answer=f"#### {i + 1}"))
            for i in range(start, start + 12)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return load_config(
        None,
        [
            f"model.name={model_folder}",
            "task.name=jsonl",
            f"task.path={tmp_path / 'train.jsonl'}",
            f"task.test_path={tmp_path / 'test.jsonl'}",
            "task.n_dev=2",
            "prompt.template=plain",
            "context.n_shots=2",
            "teacher.top_k=8",
            "batch_size=2",
            "accumulation=1",
            "steps=2",
            "evaluate.engine=transformers",
            "evaluate.max_new_tokens=4",
            "evaluate.conditions=[zero_shot]",
            f"evaluate.checkpoints={tmp_path / 'run'}",
            f"run={tmp_path / 'run'}",
            *over,
        ],
        "train",
    )


def test_an_evaluation_keeps_it(tmp_path, model_folder, machine, capsys):
    machine()
    train(asked(model_folder, tmp_path), progress=False)
    machine(cpu=True)
    cfg = asked(model_folder, tmp_path)
    capsys.readouterr()
    res = evaluate(cfg)
    assert res.config["model"]["dtype"] == "float32" and res.conditions["step_2"].n == 12
    assert "dtype float32 (the checkpoint's own)" in capsys.readouterr().err
    named = replace(cfg, model=replace(cfg.model, dtype="bfloat16"), run=str(tmp_path / "other"))
    res = evaluate(named, progress=False)
    assert res.config["model"]["dtype"] == "bfloat16" and res.conditions["step_2"].n == 12


def test_checkpoints_without_a_dtype(tmp_path, machine):
    "Those written before it stood in checkpoint.json have it in their config."
    machine()
    folder = go(tmp_path, "steps=1")
    info = json.loads((folder / "checkpoint.json").read_text())
    del info["dtype"]
    (folder / "checkpoint.json").write_text(json.dumps(info))
    assert Checkpoint.read(folder).dtype == "float32"
    assert kept_dtype([folder]) == ("float32", "the checkpoint's own")
    trained(auto(tmp_path, "steps=2"))
    (folder / "config.yaml").unlink()
    del info["files"]
    (folder / "checkpoint.json").write_text(json.dumps(info))
    assert Checkpoint.read(folder).dtype is None and kept_dtype([folder]) is None
    with pytest.raises(InputError, match="weights"):
        load_adapter(tiny_model(seed=1), folder, base_hash=weights_hash(tiny_model(seed=1)))


def test_checkpoints_of_two_dtypes(tmp_path):
    folders = []
    for dtype in ("float32", "float16"):
        folders.append(go(tmp_path / dtype, "steps=1"))
        info = json.loads((folders[-1] / "checkpoint.json").read_text()) | dict(dtype=dtype)
        (folders[-1] / "checkpoint.json").write_text(json.dumps(info))
    with pytest.raises(
        InputError, match="different dtypes.*float32.*float16.*name one model.dtype"
    ):
        kept_dtype(folders)


def test_the_model_given_has_the_say(tmp_path, machine):
    machine(cpu=True)
    folder = trained(auto(tmp_path, "steps=1"))
    assert Checkpoint.read(folder).dtype == "float32"


# --- float16


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_scale_changes_nothing_in_float32(monkeypatch, tmp_path, weight):
    "A power of two: the same gradients, bit for bit, where float16 is pretended."

    def run_with(scale):
        monkeypatch.setattr(step, "_LOSS_SCALE", scale)
        monkeypatch.setattr(torch, "float16", torch.float32)
        folder = go(tmp_path / str(scale), f"loss.weight={weight}", "steps=2")
        monkeypatch.undo()
        rows = Run(tmp_path / str(scale)).metrics()
        return load_file(folder / "adapter_model.safetensors"), [r["grad_norm"] for r in rows]

    (plain, norms), (scaled, norms_scaled) = run_with(1.0), run_with(1024.0)
    assert norms == norms_scaled and len(norms) == 2 and min(norms) > 0
    assert plain.keys() == scaled.keys() and all(torch.equal(plain[k], scaled[k]) for k in plain)


def test_float16_trains_with_a_float32_adapter(tmp_path):
    folder = go(tmp_path, "model.dtype=float16", "steps=2", base=tiny_model().half())
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < r["loss"] < 100 and 0 < r["grad_norm"] < 1e3 for r in rows)


def test_an_overflow_stops_the_run(tmp_path):
    base = tiny_model()
    base.model.norm.weight.data.fill_(1e5)
    with pytest.raises(InputError, match="not finite|loss is (nan|inf)"):
        go(tmp_path, "model.dtype=float16", "steps=2", base=base.half())


# --- threads


def spawned(code, **env):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=keep | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


WATCH = """
import builtins, os, sys
real, seen = builtins.__import__, []
def watch(name, *a, **k):
    if name == "torch" and not seen and "torch" not in sys.modules:
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
    return real(name, *a, **k)
builtins.__import__ = watch
"""


@pytest.mark.parametrize(
    "env,policy", [({}, "PASSIVE"), (dict(OMP_WAIT_POLICY="ACTIVE"), "ACTIVE")]
)
def test_set_before_torch(env, policy):
    assert spawned(WATCH + "import icl_distill.train\nprint(seen)", **env) == f"[{policy!r}]"
    command = "from icl_distill.app import cli\nsys.argv = ['icl-distill', 'config', 'base']\n"
    command += "try: cli.main()\nexcept SystemExit: pass\nimport torch\nprint(seen)"
    assert spawned(WATCH + command, **env) == f"[{policy!r}]"


def test_importing_devices_does_not_import_torch():
    code = "import sys, icl_distill.core.devices as d; d.calm_threads(); d.cores(); "
    code += "print('torch' in sys.modules)"
    assert spawned(code) == "False"


def test_a_quota_is_kept_to(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "_OURS", {})
    monkeypatch.setattr(devices, "_allowed", lambda: 8)
    monkeypatch.setattr(devices, "_quota", lambda: None)
    assert cores() == 8 and calm_threads() == dict(OMP_WAIT_POLICY="PASSIVE")
    monkeypatch.setattr(devices, "_quota", lambda: 3)
    assert cores() == 3 and calm_threads() == dict(OMP_NUM_THREADS="3")
    assert threads_each(3) == 1 and threads_each(1) == 3 and threads_each(7) == 1
    monkeypatch.setattr(devices, "_OURS", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert calm_threads() == {} and threads_each(3) == 5


# --- what is said


def test_lines(machine):
    machine()
    threads = f"{(n := torch.get_num_threads())} thread{'s' * (n > 1)}"
    first = "device cpu (no GPU is visible), "
    first += "dtype float32 (bfloat16 would be emulated on this processor), "
    assert machine_of(Config()).line() == first + threads
    assert (
        machine_of(Config(), ("float16", "the run's own")).line().split(", ")[1]
        == "dtype float16 (the run's own)"
    )
    machine(["cuda"], (7, 5))
    assert (
        machine_of(Config())
        .line()
        .startswith("device cuda (a GPU is visible), dtype float16 (compute capability 7.5), ")
    )
    assert estimate_line(3.14, 240, "SFT", 3 * 2**29) == (
        "SFT: 3.1 s per step, about 13 min for the 240 steps left; 1.5 GiB of memory in use"
    )
    assert estimate_line(0.5, 1, "evaluation", 2**30, "answer") == (
        "evaluation: 0.5 s per answer, about 0.5 s for the 1 answer left; 1.0 GiB of memory in use"
    )
    assert [span(s) for s in (0, 9.94, 89, 90, 5399, 5400)] == [
        "0 s",
        "9.9 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
    ]
    small = load_config("bake_small")
    assert too_long(20) == "" and "quickstart --small" in too_long(21)
    for key in (f"n_questions={small.task.n_questions}", f"n_test={small.task.n_test}"):
        assert f"task.{key}" in too_long(21)
    assert f"train.steps={small.train.steps}" in too_long(21)


def test_said_once_and_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(devices, "_SAID", set())
    m = Machine("cpu", "a", "float32", "b", 1)
    say_machine(m)
    say_machine(m)
    say_estimate(2.0, 5, "SFT", hint="Do less.")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == m.line() and len(err.splitlines()) == 2
    assert err.splitlines()[1].startswith("SFT: 2 s per step, about 10 s for the 5 steps left; ")
    assert err.endswith("Do less.\n")


def test_pace():
    now = 0.0

    def clock():
        return now

    pace = Pace(clock)
    with pytest.raises(InputError):
        pace.each()
    for seconds, n, each, left in ((10, 2, 5.0, 90.0), (4, 4, 1.0, 14.0), (8, 4, 1.5, 15.0)):
        now += seconds
        pace.tick(n)
        assert pace.each() == each and pace.left(20) == left
    assert pace.left(3) == 0


def test_training_and_evaluation_say_it(tmp_path, model_folder, machine, monkeypatch, capsys):
    machine()
    monkeypatch.setattr(devices, "_SAID", set())
    train(asked(model_folder, tmp_path, "steps=4"))
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line]
    assert sum(line.startswith("device cpu") for line in said) == 1
    assert sum("for the 2 steps left; " in line for line in said) == 1
    monkeypatch.setattr(devices, "_SAID", set())
    evaluate(
        asked(model_folder, tmp_path, "steps=4", "evaluate.batch_size=2", "evaluate.steps=[4]")
    )
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line]
    assert sum(line.startswith("device cpu") for line in said) == 1
    assert sum("for the 20 answers left; " in line for line in said) == 1
    go(tmp_path / "quiet")
    assert "device cpu" not in (err := capsys.readouterr().err) and "left; " not in err


def test_results_of_a_given_engine_name_its_dtype(tmp_path, model_folder, machine):
    machine(cpu=True)
    cfg = asked(model_folder, tmp_path)
    cfg = replace(cfg, evaluate=replace(cfg.evaluate, checkpoints=None))
    engine = TransformersEngine(tiny_model(), real_tokenizer(), [2], 4)
    assert evaluate(cfg, engine=engine, progress=False).config["model"]["dtype"] == "float32"
