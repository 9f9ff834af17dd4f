"`icl-distill doctor`, the real command: hub switched off, hub out of reach, something broken."

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

command = str(Path(sys.executable).parent / "icl-distill")
NAMES = ["this is", "versions", "system", "processor", "device", "dtype", "threads", "memory"]
NAMES += ["cache disk", "run disk", "hub", "vLLM", "models", "runs"]


def doctor(folder, **extra):
    "What it prints, as lines and as a dictionary."
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= dict(OMP_NUM_THREADS="1", no_proxy="127.0.0.1", HF_HUB_OFFLINE="1") | extra
    done = subprocess.run(
        [command, "doctor"], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    lines, found, name = done.stdout.splitlines(), {}, ""
    for line in lines[:-2]:
        name = line[:12].strip() or name
        found[name] = f"{found.get(name, '')} {line[12:].strip()}".strip()
    return lines, found


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return doctor(tmp_path_factory.mktemp("empty"))


def test_one_screen(said):
    lines, found = said
    assert list(found) == NAMES
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "Paste these lines into an issue" in lines[-1]


def test_what_it_found(said):
    import torch
    import transformers

    found = said[1]
    assert [text for text in found.values() if "could not be told" in text] == []
    for package in (torch, transformers):
        assert f"{package.__name__} {package.__version__}" in found["versions"]
    assert re.match(r"(cpu|cuda|mps|xpu): \S", found["device"])
    assert re.match(r"(float32|bfloat16|float16): \S", found["dtype"])
    assert found["threads"].startswith("1 (OMP_NUM_THREADS=1")
    for name in ("memory", "cache disk", "run disk"):
        assert re.search(r"\d+\.\d (of \d+\.\d )?GiB free", found[name])
    assert "HF_HUB_OFFLINE" in found["hub"] and "runs/NAME" in found["runs"]


def test_it_writes_nothing(tmp_path):
    doctor(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_out_of_reach(tmp_path):
    found = doctor(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://me:secret@127.0.0.1:9")[1]
    assert found["hub"].startswith("127.0.0.1 does not answer")
    assert "secret" not in str(found)


def test_a_cache_elsewhere(tmp_path):
    cache, hub = str(tmp_path / "models" / "new"), str(tmp_path / "hub")
    found = doctor(tmp_path, ICL_DISTILL_CACHE=cache, HF_HUB_CACHE=hub)[1]
    joined = found["models"].replace(" ", "")
    assert "models/new" in joined and "hub" in joined and "GiB free" in found["cache disk"]
    assert list(tmp_path.iterdir()) == []


def test_home_is_a_tilde(tmp_path):
    (tmp_path / "work").mkdir()
    lines, found = doctor(tmp_path / "work", HOME=str(tmp_path))
    assert found["run disk"].endswith("for ~/work") and str(tmp_path) not in "\n".join(lines)


def test_something_broken_is_a_line(tmp_path):
    "torch that cannot be loaded: the other lines are there, and the exit code is 0."
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: no such file')\n")
    found = doctor(tmp_path, PYTHONPATH=str(tmp_path))[1]
    assert list(found) == NAMES
    assert "could not be told (OSError: libcudart.so.13" in found["threads"]
    assert "GiB free" in found["memory"]
