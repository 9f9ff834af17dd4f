"""Run notebooks, and compare what they print with what is stored in them.

    python tests/notebook.py nbs/data/08_alignment.ipynb           # compare
    python tests/notebook.py --write nbs/data/08_alignment.ipynb   # store the new outputs
    python tests/notebook.py --fold nbs/data/08_alignment.ipynb    # break long lines of the stored

Outputs are stored with lines of at most 100 characters: longer ones are folded at a space, as a
terminal of that width shows them. Both sides of a comparison are folded.

Cells marked `eval: false`, `slow` or `cuda` are not run, and keep the outputs they have. Each
notebook has a kernel of its own; all are forked from one process that has imported what takes long.
"""

import argparse
import difflib
import multiprocessing
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

import nbformat
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOT_RUN = re.compile(r"^#\|\s*(eval:\s*false|slow|cuda)\b", re.MULTILINE)
ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
TEXTS = ("text/plain", "text/html", "text/markdown", "text/latex")
SECONDS = 800
WIDTH = 100  # of the lines of a stored output
FORKS = multiprocessing.get_context("forkserver")
HEAVY = ["ipykernel.kernelapp", "accelerate", "peft", "transformers.models.auto"]  # not pandas:
# how wide its tables are depends on where it is imported


def kernel(ready, connection: str, folder: str | None, environment: dict[str, str]):
    "The kernel that a connection file describes, in this process."
    from ipykernel.kernelapp import launch_new_instance

    os.setsid()
    ready.send(True)
    with open(os.devnull, "w") as nowhere:  # its greeting
        os.dup2(nowhere.fileno(), 1)
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(folder or ".")
    launch_new_instance(["-f", connection])


class Forked:
    "A forked kernel with those methods of `subprocess.Popen` that a kernel's manager calls."

    stdin = stdout = stderr = None

    def __init__(self, command, cwd=None, env=None, **_):
        connection = command[command.index("-f") + 1]
        own, its = FORKS.Pipe()
        args = (its, connection, cwd, dict(env or {}))
        self.process = FORKS.Process(target=kernel, args=args)
        self.process.start()
        own.recv()  # it leads a group now, which is what signals go to
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def folded(text: str) -> str:
    "The text in lines of at most `WIDTH`; a table's rows stay whole."
    out = []
    for line in text.split("\n"):
        if len(line) <= WIDTH or line.startswith("|"):
            out.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        out += textwrap.wrap(
            line,
            WIDTH,
            subsequent_indent=indent,
            replace_whitespace=False,
            expand_tabs=False,
            break_on_hyphens=False,
        )
    return "\n".join(out)


def fold(notebook: nbformat.NotebookNode):
    "Fold what a notebook's cells show as plain text."
    for output in [x for cell in notebook.cells for x in cell.get("outputs", [])]:
        data = output.get("data", {})
        if "text" in output:
            output.text = folded(output.text)
        elif "text/plain" in data and not {"text/html", "text/markdown"} & data.keys():
            data["text/plain"] = folded(data["text/plain"])


def is_progress(output) -> bool:
    "A progress bar, as a widget."
    return "%|" in output.get("data", {}).get("text/plain", "")


def printed(cell) -> str:
    "All text that a cell shows; pictures, progress bars and stderr left out."
    out = []
    for output in cell.outputs:
        if is_progress(output):
            continue
        if output.output_type == "stream":
            out.append(output.text if output.name == "stdout" else "")
        else:
            shown = [output.data[kind] for kind in TEXTS if kind in output.get("data", {})]
            out.append("\n".join(map(str, shown)) + "\n")
    return ADDRESS.sub("at 0x…", "".join(out)).rstrip()


def run(path: Path) -> nbformat.NotebookNode:
    "The notebook with the outputs of this run."
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and NOT_RUN.search(cell.source):
            cell.metadata["tags"] = ["skip-execution"]
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    return notebook


def differences(path: Path, new: nbformat.NotebookNode) -> list[str]:
    "A diff of every cell that prints something else than is stored."
    old = nbformat.read(path, as_version=4)
    fold(old)
    fold(new)
    out = []
    for before, after in zip(old.cells, new.cells, strict=True):
        if before.cell_type != "code" or printed(before) == printed(after):
            continue
        lines = [printed(cell).splitlines() for cell in (before, after)]
        diff = difflib.unified_diff(*lines, "stored", "now", lineterm="")
        out.append(f"{path}, cell {before.id}:\n" + "\n".join(diff))
    return out


def whole_streams(outputs: list) -> list:
    "Neighbouring pieces of one stream as one: where a kernel cuts them is chance."
    out: list = []
    for output in outputs:
        same = out and output.output_type == "stream" == out[-1].output_type
        if same and output.name == out[-1].name:
            out[-1].text += output.text
        else:
            out.append(output)
    return out


def store(path: Path, new: nbformat.NotebookNode):
    "Write the new outputs and clean the notebook as nbdev does."
    from nbdev.clean import nbdev_clean

    for cell in new.cells:
        cell.metadata.pop("tags", None)
        if cell.cell_type == "code":
            cell.outputs = whole_streams([x for x in cell.outputs if not is_progress(x)])
    if not any("widget-view" in str(cell.get("outputs")) for cell in new.cells):
        new.metadata.pop("widgets", None)  # the state of bars that are not shown
    fold(new)
    nbformat.write(new, path)
    nbdev_clean(fname=str(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="store the new outputs")
    parser.add_argument("--fold", action="store_true", help="run nothing; break long lines")
    args = parser.parse_args()
    if args.fold:
        for path in args.notebooks:
            store(path, nbformat.read(path, as_version=4))
        return 0
    os.environ["TQDM_DISABLE"] = "1"
    local_provisioner.launch_kernel = Forked
    FORKS.set_forkserver_preload(HEAVY)
    failed = 0
    for path in args.notebooks:
        try:
            new = run(path.resolve())
        except CellExecutionError as error:
            print(f"{path}: {error}")
            failed += 1
            continue
        if args.write:
            store(path, new)
        elif found := differences(path, new):
            print("\n".join(found))
            failed += 1
        else:
            print(f"{path}: ok", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
