"The wheel: built from the sources, installed away from this checkout, used in an empty folder."

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from test_docs import ELSEWHERE

from icl_distill.core.config import load_config, to_yaml

root = Path(__file__).resolve().parent.parent
SOURCES = ["setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"]
SOURCES += ["icl_distill", "configs", "results"]
QUICK = ["task.n_train=3", "task.n_questions=3", "task.n_dev=1", "task.n_test=2", "steps=1"]
QUICK += ["save_every=1", "batch_size=2", "answers.labeller_steps=1", "answers.shot_repeats=1"]
QUICK += ["evaluate.max_new_tokens=24"]


def run(*command, cwd, stdin=None):
    "Its output; it must succeed."
    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", NO_COLOR="1")
    env |= dict(COLUMNS="100", PIP_DISABLE_PIP_VERSION_CHECK="1")
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, in which no earlier build has left anything."
    tmp = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, tmp / name)
    for folder in tmp.rglob("__pycache__"):
        shutil.rmtree(folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--no-build-isolation", "--wheel-dir", tmp / "dist", tmp, cwd=tmp)
    (built,) = (tmp / "dist").glob("icl_distill-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The command, in an environment of its own that sees this one's other packages."
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    where = run(python, "-c", "import icl_distill; print(icl_distill.__file__)", cwd=folder).strip()
    assert Path(where).is_relative_to(packages), "the checkout would be tested, not the wheel"
    return folder / "bin" / "icl-distill"


def test_what_it_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    of = {p.relative_to(root).as_posix() for p in (root / "icl_distill").rglob("*.py")}
    for folder in (
        "configs",
        "configs/methods",
        "configs/plan",
        "configs/accelerate",
        "configs/studies",
    ):
        of |= {f"icl_distill/{folder}/{p.name}" for p in (root / folder).glob("*.yaml")}
    of.add("icl_distill/results/reported.json")
    info = {n for n in names if ".dist-info/" in n}
    assert names - info == of
    assert any(n.endswith("/LICENSE") for n in info) and len(info) <= 8


def test_the_commands_that_compute_nothing(installed, tmp_path):
    assert "quickstart" in run(installed, "--help", cwd=tmp_path)
    printed = run(installed, "config", "quickstart", cwd=tmp_path)
    assert printed == to_yaml(load_config("quickstart"))
    assert "steps: 20" in run(installed, "config", "quickstart_small", cwd=tmp_path)
    said = run(installed, "doctor", cwd=tmp_path)
    assert "icl_distill 0" in said and "could not be told" not in said
    assert "A100-80GB" in run(installed, "estimate", "quickstart", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    run(installed, "figures", "--out", "drawn", cwd=tmp_path)
    assert list((tmp_path / "drawn").iterdir())


def test_the_quickstart(installed, tmp_path):
    "With the real small model, and a few steps and items."
    said = run(installed, "quickstart", *QUICK, cwd=tmp_path)
    assert "The baked model answers" in said
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    place = tmp_path / "runs" / "bake"
    results = json.loads((place / "evaluation" / "results.json").read_text())
    assert list(results["conditions"]) == ["zero_shot", "few_shot", "sft", "baked"]
    assert {c["n"] for c in results["conditions"].values()} == {2}
    assert results["config"]["model"]["dtype"] == "float32"
    assert (place / "adapter" / "README.md").exists() and (place / "report.html").exists()


RUN_CELLS = """
import json, os, sys
from IPython.core.interactiveshell import InteractiveShell
sys.path = [p for p in sys.path if p not in ("", os.getcwd())]
shell = InteractiveShell.instance()
for text in json.loads(sys.stdin.read()):
    shell.run_cell(text, silent=False).raise_error()
import icl_distill
print("FROM", icl_distill.__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", ELSEWHERE)
def test_a_page_elsewhere(page, installed, tmp_path):
    """As in Colab: a folder that was empty, the stored results where the install cell's clone puts
    them, and the package from its wheel: the checkout's own is not there."""
    there = tmp_path / "icl_distill" / "nbs" / Path(page).parent
    there.mkdir(parents=True)
    shutil.copytree(root / "results", tmp_path / "icl_distill" / "results")
    cells = json.loads((root / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    code = [text for text in code if not re.search(r"^#\| (slow|eval: false)", text, re.MULTILINE)]
    python = installed.with_name("python")
    said = run(python, "-c", RUN_CELLS, cwd=there, stdin=json.dumps(code))
    where = Path(said.rpartition("FROM ")[2].strip())
    assert len(code) > 5 and where.is_relative_to(installed.parent.parent)
