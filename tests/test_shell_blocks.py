"""Every shell block of the README, the front page and the studies is run by bash as it stands, in
an empty folder, with a tiny model.

What a block calls is put on PATH as a stand-in. `icl-distill` runs for real, in a process forked
from one that has torch loaded (this file as a script), with overrides that make it small: two
steps, a few items. Before that the block's own words are read, so that a wrong option, key or value
is found even where it is overridden. What needs the network or GPUs (git, pip, accelerate, vLLM, a
data set of the hub) is checked as far as that goes without running it. A loop over seeds is cut to
its first, and of commands that differ only in values (the arms of a study) the first runs.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "nbs/index.ipynb"]
PAGES += sorted(str(p.relative_to(root)) for p in (root / "nbs" / "studies").glob("*.ipynb"))
STAND_INS = ("icl-distill", "git", "pip", "python3", "python", "accelerate", "vllm", "hf")
SMALL = [
    "model.dtype=float32",
    "train.steps=2",
    "train.save_every=2",
    "train.batch_size=2",
    "train.accumulation=1",
    "train.warmup_steps=0",
    "teacher.top_k=16",
    "evaluate.max_new_tokens=4",
    "evaluate.batch_size=8",
]
FEW = ["task.n_train=16", "task.n_dev=2", "task.n_test=4"]
FEW_QUESTIONS = ["task.n_questions=8", "task.n_dev=2", "task.n_test=4", "answers.labeller_steps=2"]
# As `icl_distill.testing.quiet_environment`, which would import torch here.
QUIET = dict(
    OMP_NUM_THREADS="1",
    ACCELERATE_USE_CPU="true",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)
# What a person has before the first command of a block that reads its own data.
DATA = {"train.jsonl": 12, "shots.jsonl": 8, "test.jsonl": 4}


def blocks_of(page: str) -> list[str]:
    "The text of each ```sh block."
    text = (root / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)


def named_blocks() -> dict[str, str]:
    "Page and number -> block; one that stands on two pages counts once."
    found: dict[str, str] = {}
    for page in PAGES:
        for i, block in enumerate(blocks_of(page), 1):
            if block not in found.values():
                found[f"{page}-{i}"] = block
    return found


BLOCKS = named_blocks()


# --- the stand-ins, each a function of its arguments; this part runs in the server's children


def say(what: str, why: str = ""):
    "One line of the log: `ran` or `checked`, the command, and why it was not run."
    with open(os.environ["BLOCKS_LOG"], "a") as log:
        log.write(f"{what}: {' '.join(sys.argv)}{' -- ' + why if why else ''}\n")


def stand_in_git(args: list[str]):
    "A clone is a folder with the repository's configs."
    assert args[0] == "clone" and len(args) == 2, args
    clone = Path(args[1].rstrip("/").split("/")[-1].removesuffix(".git"))
    clone.mkdir()
    for name in ("configs", "constraints.txt", "tests", "setup.py"):
        (clone / name).symlink_to(root / name)
    say("checked", "there is no network")


def stand_in_python(args: list[str]):
    "`-m venv FOLDER` makes a folder with the stand-ins; a script must exist."
    if args[:2] == ["-m", "venv"]:
        programs = Path(args[2]) / "bin"
        programs.mkdir(parents=True)
        for name in STAND_INS:
            (programs / name).symlink_to(Path(os.environ["BLOCKS_BIN"]) / name)
        return say("checked", "the packages are there")
    assert (root / args[0]).is_file(), f"no such script: {args[0]}"
    say("checked", "it would run this test")


def stand_in_pip(args: list[str]):
    "Constraints exist, extras are known, a named version is the one that is pinned."
    assert args[0] == "install", args
    pinned = (root / "constraints.txt").read_text()
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    for arg in args[1:]:
        assert not arg.endswith(".txt") or (root / arg).is_file(), arg
        for extra in re.findall(r"\[([\w,-]+)\]", arg):
            known = [f"{name}_requirements" in ini["DEFAULT"] for name in extra.split(",")]
            assert all(known), f"unknown extra: {arg}"
        assert "==" not in arg or arg in pinned.split(), f"{arg} is not in constraints.txt"
    say("checked", "there is no network")


def stand_in_accelerate(args: list[str]):
    "Its options and the config are read."
    from accelerate.commands.launch import launch_command_parser

    from icl_distill.core.config import load_config

    launch = launch_command_parser().parse_args(args[1:])
    assert args[0] == "launch" and launch.module, args
    assert launch.training_script == "icl_distill.train", args
    name, *overrides = launch.training_script_args
    load_config(name, overrides, "train")
    say("checked", "it needs GPUs")


def of_the_hub(cfg) -> str:
    "Why a config's command cannot run here; '' where it can."
    if cfg.evaluate.engine == "vllm":
        return "vLLM needs a GPU"
    return "its data are on the hub" if cfg.task.name == "gsm8k" and not cfg.task.path else ""


def planned(cfg=None) -> dict:
    "Run -> the steps that its own config would save; with a config, that run is added."
    path = Path(".planned.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    if cfg is not None:
        train = cfg.train
        steps = range(train.save_every, train.steps + 1, train.save_every)
        known[cfg.run] = sorted({*steps, train.steps})
        path.write_text(json.dumps(known))
    return known


def export_args(args: list[str]) -> list[str]:
    "The checkpoint that a block names, as the small run has it; its own step must be one it saves."
    path = Path(args[0])
    run = str(path.parent.parent)
    assert run in planned(), f"{run} was not trained before: {planned()}"
    steps = planned()[run]
    assert path.name in [f"step_{n:06d}" for n in steps], f"{path} is not one of steps {steps}"
    return [str(path.with_name("step_000002")), *args[1:]]


def like_another(command: str, args: list[str]) -> bool:
    "Was this command called in this block with the same keys and other values?"
    shape = " ".join([command, *(arg.split("=")[0] for arg in args if "=" in arg or arg[0] == "-")])
    path = Path(".shapes")
    known = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(line + "\n" for line in [*known, shape]))
    return shape in known


def bake_args(args: list[str], params: dict) -> tuple[list[str], str]:
    "As `small_args`, of a bake."
    from icl_distill.app.bake import bake_config

    model = os.environ["BLOCKS_MODEL"]
    files = {key: params[key] for key in ("shots", "questions", "dev", "test", "system")}
    planned(bake_config(model, files, params["out"], params["overrides"] or []))
    if params["model"] or params["push_to"]:
        return args, "its model or its place is on the hub"
    form = ["prompt.template=plain", "answers.labeller_steps=2"]
    return [*args, "--model", model, *SMALL, *form], ""


def small_args(command: str, args: list[str]) -> tuple[list[str], str]:
    "Arguments of the small run, and why it cannot be run; the block's own words are read first."
    import typer

    from icl_distill.app.cli import app
    from icl_distill.core.config import load_config, to_yaml
    from icl_distill.core.runs import Run
    from icl_distill.evaluation.evaluate import config_for_evaluation

    known = typer.main.get_command(app).commands
    assert command in known, f"icl-distill has no command {command!r}"
    params = known[command].make_context(command, list(args)).params
    if command == "export":
        args = export_args(args)
        return args, "" if Path(args[0]).is_dir() else f"{args[0]} was not trained here"
    if command == "study":
        from icl_distill.evaluation.grid import read_study

        return args, f"its {len(read_study(params['file']).cells)} cells would take an hour"
    if command == "report":
        runs = [*params["run"], *(params["against"] or [])]
        missing = [p for p in runs if not (p.is_file() or Run(p).evaluation("test").exists())]
        return args, f"{missing[0]} was not evaluated here" if missing else ""
    if "overrides" not in params:
        return args, ""
    name, over = params.get("config"), params["overrides"] or []
    if command == "quickstart":
        name = ("quickstart" if params["paper"] else "bake") + "_small" * params["small"]
    if command == "bake":
        return bake_args(args, params)
    if command == "evaluate":
        cfg = config_for_evaluation(name, over)
    else:
        cfg = load_config(name, over, "train" if command in ("train", "quickstart") else None)
    if why := of_the_hub(cfg):
        return args, why
    if command in ("train", "quickstart"):
        planned(cfg)
    if like_another(command, args):
        if command == "train":  # what an evaluation of the run reads
            Run(cfg.run).config_path.parent.mkdir(parents=True, exist_ok=True)
            Run(cfg.run).config_path.write_text(to_yaml(cfg))
        return args, "one with other values ran"
    few = FEW if cfg.task.name == "word_problems" else FEW_QUESTIONS * bool(cfg.task.n_questions)
    return [*args, f"model.name={os.environ['BLOCKS_MODEL']}", *SMALL, *few], ""


def stand_in_icl_distill(args: list[str]):
    "The command itself, made small, or its arguments and config read."
    from icl_distill.app.cli import main

    command, *rest = args
    rest, why = small_args(command, rest)
    if why:
        return say("checked", why)
    say("ran")
    sys.argv = ["icl-distill", command, *rest]
    main()


class Handler(socketserver.StreamRequestHandler):
    "One command of a block, in a process of its own."

    def handle(self):
        line = self.rfile.readline()
        if not line:
            return  # someone asked whether the server is there
        asked = json.loads(line)
        os.chdir(asked["cwd"])
        os.environ.update(asked["env"])
        for fd in (1, 2):
            os.dup2(self.connection.fileno(), fd)
        name, *args = asked["argv"]
        sys.argv = [name, *args]
        code = 0
        try:
            stand_in = "python" if name == "python3" else name.replace("-", "_")
            globals()[f"stand_in_{stand_in}"](args)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(bool(leave.code))
            if isinstance(leave.code, str):
                print(leave.code, file=sys.stderr)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        self.wfile.write(b"\0%d" % (code or 0))


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    "Forks for each command: torch is imported once."

    max_children = 4


def serve(path: str, model: str):
    import torch

    import icl_distill.app.cli
    import icl_distill.evaluation.evaluate
    import icl_distill.evaluation.figures
    import icl_distill.training.loop  # noqa: F401
    from icl_distill.testing import answering_folder

    torch.set_num_threads(1)
    answering_folder(Path(model))
    with Server(path, Handler) as server:
        server.serve_forever()


# --- the tests

CLIENT = """#!{python} -IS
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({path!r})
env = {{k: v for k, v in os.environ.items() if k.startswith("BLOCKS_")}}
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
s.sendall(json.dumps(dict(argv=argv, cwd=os.getcwd(), env=env)).encode() + b"\\n")
out = b""
while data := s.recv(65536):
    out += data
text, _, code = out.rpartition(b"\\0")
sys.stderr.buffer.write(text)
sys.exit(int(code or 1))
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    "The environment in which a block runs."
    folder = tmp_path_factory.mktemp("b")
    path, model, programs = folder / "socket", folder / "model", folder / "bin"
    programs.mkdir()
    for name in STAND_INS:
        (programs / name).write_text(CLIENT.format(python=sys.executable, path=str(path)))
        (programs / name).chmod(0o755)
    env = os.environ | QUIET | dict(BLOCKS_MODEL=str(model), BLOCKS_BIN=str(programs))
    env["PATH"] = f"{programs}{os.pathsep}{env['PATH']}"
    server = subprocess.Popen([sys.executable, __file__, str(path), str(model)], env=env)
    try:
        wait_for(path, server)
        yield env
    finally:
        server.terminate()
        server.wait()


def wait_for(path: Path, server: subprocess.Popen, seconds: float = 180):
    "Until the server answers."
    for _ in range(int(seconds * 10)):
        assert server.poll() is None, "the server of the stand-ins ended"
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
            s.connect(str(path))
            return
        time.sleep(0.1)
    raise AssertionError(f"the server of the stand-ins was not there after {seconds} s")


def run_block(block: str, env: dict, folder: Path) -> tuple[subprocess.CompletedProcess, list[str]]:
    "What bash says, and the log: a line for each command."
    (folder / "configs").symlink_to(root / "configs")
    for name, n in DATA.items():
        rows = [dict(question=f"{name} {i}: {i} + 1?", answer=str(i + 1)) for i in range(n)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = re.sub(r"(for seed in \d+)[ \d]*;", r"\1;", block)
    asked = "".join(f"question {i}: {i} + 1?\n" for i in range(20))
    (folder / "questions.txt").write_text(asked)
    (folder / "icl_distill-1.0-py3-none-any.whl").touch()
    log = folder / "commands.log"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", short],
        cwd=folder,
        env=env | dict(BLOCKS_LOG=str(log)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_bash_is_here():
    assert shutil.which("bash") and len(BLOCKS) > 5


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name, stand_ins, tmp_path):
    done, log = run_block(BLOCKS[name], stand_ins, tmp_path)
    assert done.returncode == 0, f"{BLOCKS[name]}\n{done.stdout}{done.stderr[-3000:]}"
    print("\n".join(log))
    called = [line for line in log if line.startswith(("ran: ", "checked: "))]
    assert called and len(called) == len(log)


BAD = {
    "an option": ("icl-distill align quickstart --indx 3", "--indx"),
    "a key": ("icl-distill train quickstart los.weight=0", "los"),
    "a value that is overridden": ("icl-distill train quickstart train.steps=many", "train.steps"),
    "a config": ("icl-distill train quikstart", "quikstart"),
    "a command": ("icl-distill trian quickstart", "trian"),
    "a key of a command that needs the hub": (
        "icl-distill evaluate configs/base.yaml engin=vllm",
        "engin",
    ),
    "a config of accelerate": ("accelerate launch -m icl_distill.train configs/no.yaml", "no.yaml"),
    "an option of accelerate": (
        "accelerate launch --num_procs_ 2 -m icl_distill.train configs/base.yaml",
        "num_procs_",
    ),
    "an extra": ('pip install -c constraints.txt -e ".[nothing]"', "nothing"),
    "a step that is not saved": (
        "icl-distill train quickstart run=runs/x\n"
        "icl-distill export runs/x/checkpoints/step_000041 my-model",
        "step_000041",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_block_fails(what, stand_ins, tmp_path):
    block, word = BAD[what]
    done, _ = run_block(block, stand_ins, tmp_path)
    assert done.returncode != 0 and word in done.stderr, done.stderr


if __name__ == "__main__":
    serve(*sys.argv[1:])
