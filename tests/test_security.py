"""Nothing of what a run reads can run code, leave its folder or look into the environment.

And nothing is fetched that nobody named.
"""

import contextlib
import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_training import arguments, go, toy_batch

from icl_distill.core.checkpoints import Checkpoint
from icl_distill.core.config import PromptConfig, load_config, replace
from icl_distill.core.files import InputError, file_hash
from icl_distill.core.hub import load_tokenizer
from icl_distill.core.runs import Run
from icl_distill.data.contexts import Context
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task
from icl_distill.models.loading import load_adapter, load_model
from icl_distill.models.teacher import CachedTargets
from icl_distill.testing import quiet_environment, raises, real_tokenizer, tiny_model


class Bomb:
    "Unpickled, it makes a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def reseal(checkpoint):
    "As someone would who means harm: with hashes that are right."
    info = json.loads((checkpoint / "checkpoint.json").read_text())
    info["files"] = {
        name: file_hash(checkpoint / name) for name in info["files"] if (checkpoint / name).exists()
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps(info))


# ---- pickles


@pytest.mark.parametrize("kind", ["torch", "plain"])
@pytest.mark.parametrize("file", ["state.pt", "process_0.pt"])
def test_a_pickle_in_a_checkpoint_does_not_run(whole, tmp_path, file, kind):
    shutil.copytree(whole, tmp_path / "r")
    last = tmp_path / "r/checkpoints/step_000006"
    bomb = dict(
        optimizer=Bomb(tmp_path / "gone_off"),
        random=Bomb(tmp_path / "gone_off"),
        sums=torch.zeros(1),
    )
    if kind == "torch":
        torch.save(bomb, last / file)
    else:
        (last / file).write_bytes(pickle.dumps(bomb))
    reseal(last)
    assert Run(tmp_path / "r").checkpoints()[-1].folder == last
    with raises("step_000006 is damaged"):
        go(tmp_path / "r")
    assert not (tmp_path / "gone_off").exists()
    with contextlib.suppress(Exception):
        torch.load(last / file, weights_only=False)
    assert (tmp_path / "gone_off").exists(), "the bomb is one"


def test_only_safetensors_adapters(whole, tmp_path):
    "`adapter_model.bin`, a pickle, is not read, neither beside the real file nor in its place."
    checkpoint = tmp_path / "c"
    shutil.copytree(whole / "checkpoints/step_000006", checkpoint)
    torch.save(dict(x=Bomb(tmp_path / "gone_off")), checkpoint / "adapter_model.bin")
    load_adapter(tiny_model(), checkpoint)
    (checkpoint / "adapter_model.safetensors").unlink()
    with raises("adapter_model.safetensors missing"):
        load_adapter(tiny_model(), checkpoint)
    (checkpoint / "adapter_model.safetensors").write_bytes(
        (checkpoint / "adapter_model.bin").read_bytes()
    )
    with raises("damaged"):
        load_adapter(tiny_model(), checkpoint)
    assert not (tmp_path / "gone_off").exists()


def test_only_safetensors_models(folder, tmp_path):
    "A model whose weights are a pickle is refused unread."
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save(dict(x=Bomb(tmp_path / "gone_off")), tmp_path / "m/pytorch_model.bin")
    with raises("could not be loaded"):
        load_model(load_config(None, [f"model.name={tmp_path / 'm'}"]).model)
    assert not (tmp_path / "gone_off").exists()


def test_code_that_comes_with_a_model_does_not_run(folder, tmp_path):
    "Unless model.trust_remote_code says so."
    shutil.copytree(folder, tmp_path / "m")
    conf = json.loads((tmp_path / "m/config.json").read_text())
    conf |= dict(
        model_type="mine", auto_map=dict(AutoConfig="mine.C", AutoModelForCausalLM="mine.M")
    )
    (tmp_path / "m/config.json").write_text(json.dumps(conf))
    (tmp_path / "m/mine.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'gone_off')!r}).touch()\n"
    )
    with raises("could not be loaded"):
        load_model(load_config(None, [f"model.name={tmp_path / 'm'}"]).model)
    assert not (tmp_path / "gone_off").exists()


def test_remembered_targets_are_no_pickles(tmp_path):
    aligned, _ = toy_batch()
    memory = CachedTargets("f", tmp_path / "t")
    path = memory.path(memory.key(aligned[0]))
    path.parent.mkdir(parents=True)
    torch.save(Bomb(tmp_path / "gone_off"), path)
    with raises("damaged"):
        memory.get(aligned[0])
    assert not (tmp_path / "gone_off").exists()


# ---- paths


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".", "/abs", "a\\b", "", " ", ".hidden", "a\nb", "\x00", "~"]
)
def test_a_test_sets_name_cannot_leave_the_folder(name, tmp_path):
    """It becomes the name of a file of records.

    What is named by path is the user's own: `run`, `evaluate.output`, `teacher.cache_folder`.
    """
    file = tmp_path / "hard.jsonl"
    file.write_text(json.dumps(dict(question="h", answer="#### 2")))
    task = replace(load_config("quickstart").task, n_train=5, n_dev=2, n_test=2)
    with raises("task.test_sets"):
        load_task(replace(task, test_sets={name: str(file)}))
    assert "hard-2.b_1" in load_task(replace(task, test_sets={"hard-2.b_1": str(file)})).tests


def test_a_checkpoint_cannot_write_elsewhere(whole, tmp_path):
    """What its files say names no file that is written: a step that is no number is refused.

    A run writes into its own folder alone.
    """
    run = tmp_path / "r/run"
    shutil.copytree(whole, run)
    last = run / "checkpoints/step_000006"
    info = json.loads((last / "checkpoint.json").read_text())
    for step in ("../../x", -1, 1.5, True, None):
        (last / "checkpoint.json").write_text(json.dumps(info | dict(step=step)))
        with raises("damaged: step is"):
            Checkpoint.read(last)
    (last / "checkpoint.json").write_text(json.dumps(info))
    config = last / "config.yaml"
    elsewhere = f"run: {tmp_path / 'elsewhere'}"
    config.write_text(config.read_text().replace(f"run: {whole}", elsewhere))
    reseal(last)
    before = set(tmp_path.rglob("*"))
    go(run, "steps=8")
    assert all(run in path.parents for path in set(tmp_path.rglob("*")) - before)


@pytest.mark.parametrize(
    "name", ["../../etc", "a/../b", "..", "/etc", "~/x", "a/b/c", "file:///etc", "http://x.org/a"]
)
def test_a_models_name_is_a_folder_or_a_hub_id(name):
    with raises():
        load_tokenizer(name)


# ---- YAML and the environment


def test_a_config_reads_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "s3cr3t")
    for text in (
        "${oc.env:SECRET}",
        "${env:SECRET}",
        "$SECRET",
        "%(SECRET)s",
        "{SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
    ):
        (tmp_path / "c.yaml").write_text(json.dumps(dict(run=text, prompt=dict(system=text))))
        for config in (
            load_config(str(tmp_path / "c.yaml")),
            load_config(None, [f"run={text}", f"prompt.system={text}"]),
        ):
            assert config.run == config.prompt.system == text


# ---- chat templates

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch gone_off') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{% for i in range(10000000) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]

HARMLESS = [
    "{{ raise_exception.__globals__ }}",
    "{{ messages|attr('__class__')|attr('__mro__') }}",
    "{{ messages.__class__ }}",
]


@pytest.mark.parametrize("escape", ESCAPES + HARMLESS)
def test_templates_stay_in_their_sandbox(escape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tok = copy.copy(real_tokenizer())
    tok.chat_template = escape + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    try:
        text = Prompter(tok, PromptConfig()).render(Context(), "Why?")
    except InputError as error:
        assert "template" in str(error)
    else:
        assert escape in HARMLESS
        assert text == "Question: Why?<|im_end|>"  # what it asked for is nothing
    assert not (tmp_path / "gone_off").exists()


# ---- the network, and tokens

NO_NETWORK = """
import socket
import sys

tried = open(sys.argv[1], "a")


def refusing(name):
    def refuse(*args, **kw):
        tried.write(f"{name} {args}\\n")
        tried.flush()
        raise OSError("no network here")

    return refuse


def refusing_method(name):
    refuse = refusing(name)
    return lambda self, address: refuse(address)


for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, refusing_method(name))
for name in ("getaddrinfo", "create_connection"):
    setattr(socket, name, refusing(name))
"""
THE_COMMAND = """
from icl_distill.app.cli import main

sys.argv[1:] = sys.argv[2:]
main()
"""
TRAIN_WITHOUT_WAITING = """
import time

from icl_distill.train import main

time.sleep = lambda seconds: None  # between attempts
main(sys.argv[2:])
"""
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


def online_environment(tmp_path, **more):
    "With the hub switched on, a token, and an empty cache."
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    given = {name: value for name, value in quiet_environment().items() if name not in offline}
    return given | dict(HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "hf"), **more)


def test_nothing_is_fetched_and_no_token_is_kept(folder, tmp_path):
    """Training and evaluating a local model with the hub switched on: no connection is tried.

    A token in the environment stands in no output and no file.
    """
    run = tmp_path / "run"
    kept = [a for a in arguments(folder, run) if not a.startswith(("steps", "save_every"))]
    of_evaluation = [f"checkpoints={run}", "conditions=[zero_shot]", "max_new_tokens=4"]
    said = []
    for command in (
        ["train", *arguments(folder, run, "steps=2")],
        ["evaluate", *kept, *of_evaluation],
    ):
        done = subprocess.run(
            [sys.executable, "-c", NO_NETWORK + THE_COMMAND, str(tmp_path / "tried"), *command],
            env=online_environment(tmp_path, HUGGING_FACE_HUB_TOKEN=TOKEN),
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    assert (tmp_path / "tried").read_text() == ""
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert run / "evaluation/results.json" in files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "".join(said)


def test_a_hub_id_is_what_is_asked_for(tmp_path):
    """The guard of the test above works: a name on the hub is looked for there, and only there.

    Where that fails, the message says so without the token.
    """
    over = [
        "quickstart",
        "model.name=nobody/nothing",
        f"run={tmp_path / 'run'}",
        "task.n_train=5",
        "task.n_test=2",
        "task.n_dev=2",
    ]
    code = NO_NETWORK + TRAIN_WITHOUT_WAITING
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tried"), *over],
        env=online_environment(tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    said = "error: the tokenizer of model 'nobody/nothing' could not be loaded"
    assert said in done.stderr, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "huggingface.co" in (tmp_path / "tried").read_text()
