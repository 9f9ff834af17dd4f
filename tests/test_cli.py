"The real command: the whole arc on a tiny model, and what it says to input that it cannot use."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from icl_distill.app import cli
from icl_distill.app.quickstart import run_quickstart
from icl_distill.core.config import load_config
from icl_distill.core.files import InputError
from icl_distill.core.hub import load_tokenizer
from icl_distill.testing import tiny_folder

root = Path(__file__).resolve().parent.parent
command = str(Path(sys.executable).parent / "icl-distill")
env = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "COLUMNS": "100",
    "NO_COLOR": "1",
}  # the device stays the command's own choice
small = [
    "task.n_train=30",
    "task.n_dev=5",
    "task.n_test=10",
    "context.n_shots=2",
    "teacher.top_k=16",
    "evaluate.max_new_tokens=12",
    "evaluate.batch_size=10",
]
two = [
    "train.steps=2",
    "train.save_every=2",
    "train.batch_size=4",
    "train.warmup_steps=0",
    "train.lr=0.01",
]


def shell(*args, cwd=None, timeout=300):
    return subprocess.run(
        [command, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fine(*args, **kw):
    done = shell(*args, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other"
    return tiny_folder(folder, seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def on(model):
    return [f"model.name={model}", "model.dtype=float32", *small]  # any command


@pytest.fixture(scope="module")
def arc(on, tmp_path_factory):  # the quickstart: its folder, its arguments, what it printed
    run = tmp_path_factory.mktemp("arc") / "run"
    args = ["quickstart", "--paper", *on, *two, f"run={run}"]
    return run, args, fine(*args)


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    "In this process: exit code 2, one `error:` line with all the words, nothing like a result."

    def f(*args, words=(), nothing=None):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", ["icl-distill", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main()
        err = capsys.readouterr().err
        assert e.value.code == 2, err
        return said(err, words, nothing)

    return f


def said(err, words, nothing=None):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    for w in words:
        assert str(w) in lines[0], f"{w!r} is not in {lines[0]!r}"
    assert nothing is None or not Path(nothing).exists(), sorted(Path(nothing).rglob("*"))
    return lines[0]


# help


@pytest.mark.parametrize(
    "name",
    [
        "bake",
        "quickstart",
        "train",
        "evaluate",
        "report",
        "figures",
        "config",
        "align",
        "data",
        "doctor",
        "estimate",
        "targets",
        "export",
        "study",
        "push",
    ],
)
def test_help_has_an_example(name):
    "The example stands there as it has to be typed."
    out = " ".join(fine(name, "--help").split())
    info = next(c for c in cli.app.registered_commands if c.name == name)
    assert f"Example: icl-distill {name}" in out
    assert "'conditions='" not in out, "markup has eaten the brackets"
    assert info.callback.__doc__.split(".")[0].replace("`", "") in out.replace("`", "")


def test_help_of_the_app_names_every_command():
    out = fine("--help")
    for c in cli.app.registered_commands:
        assert re.search(rf"\b{c.name}\b", out)


# the whole arc


def test_quickstart_writes_the_results(arc):
    run, args, out = arc
    res = json.loads((run / "results.json").read_text())
    assert {"model", "task", "conditions", "paired", "environment", "config", "seed"} <= set(res)
    assert list(res["conditions"]) == ["zero_shot", "few_shot", "sft", "distill"]
    for c in res["conditions"].values():
        assert (
            {"accuracy", "n", "ci95", "truncated"} <= set(c)
            and c["n"] == 10
            and c["ci95"][0] <= c["accuracy"] <= c["ci95"][1]
        )
    pair = next(p for p in res["paired"] if (p["a"], p["b"]) == ("distill", "sft"))
    assert (
        0 <= pair["p_mcnemar"] <= 1
        and pair["difference"]
        == res["conditions"]["distill"]["accuracy"] - res["conditions"]["sft"]["accuracy"]
    )
    assert (
        res["config"]["train"]["steps"] == 2
        and res["seed"] == 42
        and res["environment"]["packages"]["torch"]
    )
    assert (
        (run / "results.csv").exists()
        and (run / "results.md").exists()
        and list((run / "figures").glob("*.png"))
    )
    for name in ("sft", "distill"):
        assert (run / name / "checkpoints" / "step_000002" / "checkpoint.json").exists()
    assert "Against SFT on the same data" in out and "McNemar" in out


def test_quickstart_says_before_it_starts_what_it_does(arc):
    said = " ".join(arc[2].split())
    for words in (
        "10 test items",
        "2 worked examples",
        "2 steps of 4 examples",
        "This takes about 1 minutes here",
    ):
        assert words in said
    assert said.index("This takes about") < said.index("Against SFT")


def test_timing_two_steps_first_leaves_no_trace(arc, tmp_path):
    "Without it the curves are the same, number for number."
    cfg = load_config("quickstart", [*arc[1][2:-1], f"run={tmp_path / 'run'}"], "train")
    run_quickstart(cfg, progress=False)
    for name in ("sft", "distill"):
        assert (tmp_path / "run" / name / "metrics.jsonl").read_bytes() == (
            arc[0] / name / "metrics.jsonl"
        ).read_bytes()


@pytest.mark.parametrize(
    "options,name,steps",
    [
        ([], "bake", 40),
        (["--small"], "bake_small", 30),
        (["--paper"], "quickstart", 40),
        (["--paper", "--small"], "quickstart_small", 20),
    ],
)
def test_small(options, name, steps, refused, monkeypatch):
    def stop(cfg):
        raise InputError(f"{cfg.run} would train {cfg.train.steps} steps with {cfg.train.lr}")

    monkeypatch.setattr("icl_distill.app.quickstart.run_quickstart", stop)
    monkeypatch.setattr("icl_distill.app.bake.run_bake", stop)
    refused(
        "quickstart",
        *options,
        "lr=0.25",
        words=[f"runs/{name} would", f"{steps} steps", "with 0.25"],
    )


def test_quickstart_again_does_nothing_anew(arc):
    run, args, _ = arc

    def files():
        return {
            p: p.read_bytes()
            for d in (run / "records", run / "sft" / "checkpoints", run / "distill" / "checkpoints")
            for p in d.rglob("*")
            if p.is_file()
        }

    was, res = files(), json.loads((run / "results.json").read_text())
    fine(*args)
    again = json.loads((run / "results.json").read_text())
    assert files() == was
    for k in ("conditions", "paired", "config", "seed"):
        assert again[k] == res[k]


def test_report_figures_and_align(arc, on, tmp_path):
    run, _, printed = arc
    table = fine("report", run)
    assert "distill" in table and "few_shot" in table and "McNemar" in table
    assert re.findall(r"│ \w+ .*", table) == re.findall(r"│ \w+ .*", printed)
    fine("figures", run, "--out", tmp_path / "figures")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(
        p.name for p in (run / "figures").iterdir()
    )
    out = fine("align", "quickstart", *on, "--index", "1")
    assert "student reads" in out and "Answer:" in out and "####" in out


def test_export_says_what_base_and_adapter_say(arc, model, tmp_path):
    from peft import PeftModel

    checkpoint, out = arc[0] / "distill" / "checkpoints" / "step_000002", tmp_path / "merged"
    assert "log-probabilities agree" in fine("export", checkpoint, out)

    def load(p):
        return AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval()

    ids = load_tokenizer(str(out))("Question: 2 + 3?\nAnswer:", return_tensors="pt").input_ids
    with torch.no_grad():
        base, merged = (load(p)(input_ids=ids).logits for p in (model, out))
        adapted = PeftModel.from_pretrained(load(model), str(checkpoint))(input_ids=ids).logits
    assert torch.allclose(merged, adapted, atol=1e-4) and not torch.allclose(
        merged, base, atol=1e-4
    )


def test_evaluate_a_run(arc, on, tmp_path):
    res = tmp_path / "ev" / "results.json"
    fine(
        "evaluate",
        "quickstart",
        *on,
        f"checkpoints={arc[0] / 'distill'}",
        "conditions=[zero_shot]",
        f"output={res}",
    )
    got, was = (
        json.loads(res.read_text())["conditions"],
        json.loads((arc[0] / "results.json").read_text())["conditions"],
    )
    assert (
        list(got) == ["zero_shot", "step_2"]
        and got["step_2"]["adapter"] == was["distill"]["adapter"]
    )

    def texts(p):
        lines = p.read_text().splitlines()
        return [json.loads(line)["text"] for line in lines if '"text"' in line]

    assert texts(res.parent / "records" / "step_2.jsonl") == texts(
        arc[0] / "records" / "distill.jsonl"
    )


def test_evaluate_reads_what_the_run_was_trained_with(arc, model, tmp_path):
    "A run's folder is enough: base model, task and context come from its own config."
    out = tmp_path / "ev" / "results.json"
    run = arc[0] / "distill"
    fine("evaluate", run, "conditions=[zero_shot]", f"output={out}")
    got = json.loads(out.read_text())
    assert got["config"]["model"]["name"] == str(model)
    assert list(got["conditions"]) == ["zero_shot", "step_2"]
    was = json.loads((arc[0] / "results.json").read_text())["conditions"]
    assert got["conditions"]["step_2"]["accuracy"] == was["distill"]["accuracy"]


@pytest.mark.parametrize(
    "words, runs, against",
    [
        (["A", "B", "--against", "C", "D"], ["A", "B"], ["C", "D"]),
        (["A", "B", "--against", "C", "--against", "D"], ["A", "B"], ["C", "D"]),
        (["A", "--against", "C"], ["A"], ["C"]),
    ],
    ids=" ".join,
)
def test_report_against_several(words, runs, against, monkeypatch):
    "After `--against`, every folder is a baseline."
    given = []
    monkeypatch.setattr("icl_distill.evaluation.seeds.report", lambda *a: given.append(a))
    monkeypatch.setattr(sys, "argv", ["icl-distill", "report", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert given == [([Path(r) for r in runs], [Path(c) for c in against])]


@pytest.mark.parametrize("first", ["package", "script"])
def test_names_of_the_package(first):
    "The four names are what they are, whether or not `icl_distill.train` was imported before."
    lines = [
        "from icl_distill import train, evaluate, load_config, Run",
        "import icl_distill.train",
    ]
    script = (
        "\n".join(lines if first == "package" else reversed(lines))
        + """
import icl_distill
from icl_distill.core.runs import Run as run_of_core
assert Run is run_of_core
assert callable(train) and callable(icl_distill.train) and callable(evaluate)
assert load_config("quickstart").seed is not None
"""
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# bad input, in a process of its own


@pytest.mark.parametrize(
    "args,words",
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "quickstart", "train.setps=3"], ["train.setps", "train.steps"]),
        (["evaluate", "quickstart", "model.name=./no-such-model"], ["./no-such-model"]),
    ],
)
def test_the_command_refuses(args, words, tmp_path):
    done = shell(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    said(done.stderr, words)
    assert not list(tmp_path.iterdir())


# bad input, in this process


@pytest.mark.parametrize(
    "args,words",
    [
        ("colour=red", ["colour"]),
        ("train.steps", ["train.steps", "key=value"]),
        ("task.name=", ["task.name"]),
        ("train.steps=many", ["train.steps"]),
        ("loss.kind=mes", ["loss.kind", "mse"]),
        ("model.name=", ["model.name"]),
        ("model.name=pypi:nothing", ["pypi:nothing"]),
        ("context.n_shots=30", ["context.n_shots is 30", "30"]),
        ("lora.target_modules=[none_proj]", ["none_proj"]),
        ("prompt.max_teacher_tokens=60", ["teacher", "train-", "prompt.max_teacher_tokens is 60"]),
        ("prompt.max_student_tokens=20", ["student", "train-", "prompt.max_student_tokens is 20"]),
        ("task.name=jsonl", ["task.path", "task.test_path"]),
        ("task.name=jsonl task.path=gone.jsonl task.test_path=gone.jsonl", ["gone.jsonl"]),
        ("task.name=gsm8k task.path=./gone", ["./gone"]),
    ],
)
def test_train_refuses(args, words, on, refused, tmp_path):
    refused(
        "train",
        "quickstart",
        *on,
        *two,
        f"run={tmp_path / 'run'}",
        *args.split(),
        words=words,
        nothing=tmp_path / "run",
    )


def good(n):
    return "".join(
        json.dumps(dict(question=f"What is {i} + 1?", answer=f"seven #### {i + 1}")) + "\n"
        for i in range(n)
    )


@pytest.mark.parametrize(
    "text,words",
    [
        (good(1) + "{oops\n", ["line 2", "not JSON"]),
        (good(2) + '{"question": "x"}\n', ["line 3", "'answer'"]),
        (good(1) + "[1]\n", ["line 2", "list"]),
        ("\n\n", ["no examples"]),
        ("", ["no examples"]),
        (good(2) + '{"question": "", "answer": "1"}\n', ["line 3", "'question'", "empty"]),
    ],
)
def test_a_data_file_is_refused(text, words, on, refused, tmp_path):
    (tmp_path / "mine.jsonl").write_text(text)
    refused(
        "train",
        "quickstart",
        *on,
        f"run={tmp_path / 'run'}",
        "task.name=jsonl",
        f"task.path={tmp_path / 'mine.jsonl'}",
        "task.test_path=unused.jsonl",
        words=["mine.jsonl", *words],
        nothing=tmp_path / "run",
    )


chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    "template,words",
    [
        (None, ["no chat template", "prompt.template=plain"]),
        ("{{ raise_exception('no such role') }}", ["template", "no such role"]),
        ("{% if %}", ["template"]),
        (
            chatml + "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}",
            ["not the beginning of prompt and answer"],
        ),
        (
            "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
            ["not a prefix of prompt and answer"],
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>"
            "{% endif %}{% endfor %}",
            ["assistant"],
        ),
    ],
)
def test_a_chat_template_is_refused(template, words, model, on, refused, tmp_path):
    shutil.copytree(model, mine := tmp_path / "model")
    (mine / "chat_template.jinja").unlink()
    if template:
        (mine / "chat_template.jinja").write_text(template)
    for name, n in (("train", 20), ("test", 0)):
        (tmp_path / f"{name}.jsonl").write_text(
            good(n) or json.dumps(dict(question="What is it?", answer="#### 1")) + "\n"
        )
    refused(
        "train",
        "quickstart",
        *on,
        *two,
        f"model.name={mine}",
        "prompt.template=chat",
        "task.name=jsonl",
        f"task.path={tmp_path / 'train.jsonl'}",
        f"task.test_path={tmp_path / 'test.jsonl'}",
        "task.n_train=10",
        "task.n_test=1",
        f"run={tmp_path / 'run'}",
        words=words,
        nothing=tmp_path / "run",
    )


def test_a_model_folder_is_refused(model, on, refused, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    refused(
        "train",
        "quickstart",
        *on,
        f"model.name={empty}",
        f"run={tmp_path / 'run'}",
        words=[empty, "config.json"],
        nothing=tmp_path / "run",
    )
    shutil.copytree(
        model, half := tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors")
    )
    refused(
        "train",
        "quickstart",
        *on,
        f"model.name={half}",
        f"run={tmp_path / 'run'}",
        words=[half],
        nothing=tmp_path / "run",
    )


@pytest.mark.parametrize("weight", [0, 0.5])
def test_a_loss_that_is_no_number(weight, on, refused, tmp_path):
    "The step and its examples are named, and nothing of it is saved."
    run = tmp_path / "run"
    line = refused(
        "train",
        "quickstart",
        *on,
        *two,
        "train.lr=1e30",
        "train.steps=5",
        "train.save_every=5",
        f"loss.weight={weight}",
        f"run={run}",
        words=["the loss is", "train-", "bad_batch_0.json", "train.lr"],
        nothing=run / "checkpoints",
    )
    step = int(re.match(r"error: step (\d+):", line)[1])
    assert 1 <= step <= 5 and len(json.loads((run / "bad_batch_0.json").read_text())["batch"]) == 4


def test_the_quickstart_refuses(on, refused, tmp_path):
    "Before anything is trained."
    for arg, words in (
        ("loss.weight=0", ["loss.weight"]),
        ("prompt.max_student_tokens=20", ["prompt.max_student_tokens"]),
        ("context.n_shots=30", ["context.n_shots"]),
    ):
        refused(
            "quickstart",
            "--paper",
            *on,
            *two,
            arg,
            f"run={tmp_path / 'run'}",
            words=words,
            nothing=tmp_path / "run",
        )


@pytest.mark.parametrize(
    "arg,words",
    [
        ("prompt.max_teacher_tokens=100", ["prompt.max_teacher_tokens"]),
        ("evaluate.n_samples=11", ["evaluate.n_samples=11"]),
        ("evaluate.max_new_tokens=3000", ["model can read"]),
    ],
)
def test_the_quickstart_refuses_before_it_trains(arg, words, on, refused, tmp_path):
    "What only the second arm or the evaluation would find."
    refused(
        "quickstart",
        "--paper",
        *on,
        *two,
        arg,
        f"run={tmp_path / 'run'}",
        words=words,
        nothing=tmp_path / "run" / "sft",
    )


# checkpoints


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_config.json", "checkpoint.json"]
)
def test_an_incomplete_checkpoint_is_refused(file, arc, on, refused, tmp_path):
    shutil.copytree(
        arc[0] / "distill" / "checkpoints" / "step_000002",
        bad := tmp_path / "step_000002",
        ignore=shutil.ignore_patterns(file),
    )
    refused(
        "evaluate",
        "quickstart",
        *on,
        f"checkpoints={bad}",
        f"output={tmp_path / 'ev' / 'results.json'}",
        words=["incomplete", file],
        nothing=tmp_path / "ev",
    )
    refused("export", bad, tmp_path / "out", words=["incomplete", file], nothing=tmp_path / "out")


@pytest.mark.parametrize(
    "file,text",
    [
        ("checkpoint.json", "{"),
        ("checkpoint.json", "{}"),
        ("adapter_model.safetensors", "cut"),
        ("adapter_config.json", "{"),
    ],
)
def test_a_damaged_checkpoint_is_refused(file, text, arc, on, refused, tmp_path):
    shutil.copytree(
        arc[0] / "distill" / "checkpoints" / "step_000002", bad := tmp_path / "step_000002"
    )
    (bad / file).write_text(text)
    refused(
        "evaluate",
        "quickstart",
        *on,
        f"checkpoints={bad}",
        "conditions=[]",
        f"output={tmp_path / 'ev' / 'results.json'}",
        words=[bad],
        nothing=tmp_path / "ev" / "results.json",
    )
    refused("export", bad, tmp_path / "out", words=[bad], nothing=tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(arc, model, other, on, refused, tmp_path):
    checkpoint = arc[0] / "distill" / "checkpoints" / "step_000002"
    refused(
        "evaluate",
        "quickstart",
        *on,
        f"model.name={other}",
        f"checkpoints={checkpoint}",
        "conditions=[]",
        f"output={tmp_path / 'ev' / 'results.json'}",
        words=[checkpoint, model, "weights"],
        nothing=tmp_path / "ev" / "results.json",
    )
    shutil.copytree(checkpoint, mine := tmp_path / "step_000002")
    (mine / "config.yaml").write_text(
        (mine / "config.yaml").read_text().replace(str(model), str(other))
    )
    refused(
        "export", mine, tmp_path / "out", words=[mine, model, "weights"], nothing=tmp_path / "out"
    )


def test_other_arguments_are_refused(arc, on, refused, tmp_path):
    checkpoint = arc[0] / "distill" / "checkpoints" / "step_000002"
    refused("export", tmp_path / "gone", tmp_path / "out", words=["gone"], nothing=tmp_path / "out")
    refused("export", checkpoint, arc[0], words=[arc[0], "exists"])
    refused("report", tmp_path / "gone", words=["gone"])
    refused(
        "figures",
        tmp_path / "gone",
        "--out",
        tmp_path / "f",
        words=["gone"],
        nothing=tmp_path / "f",
    )
    refused("align", "quickstart", *on, "--index", "28", words=["--index 28", "28"])
    refused(
        "evaluate",
        "quickstart",
        *on,
        "checkpoints=gone",
        f"output={tmp_path / 'ev' / 'results.json'}",
        words=["gone"],
        nothing=tmp_path / "ev",
    )
    refused(
        "evaluate",
        "quickstart",
        *on,
        "n_samples=11",
        f"output={tmp_path / 'ev' / 'results.json'}",
        words=["n_samples=11"],
        nothing=tmp_path / "ev",
    )


def test_export_refuses_a_dtype(arc, refused, tmp_path):
    refused(
        "export",
        arc[0] / "distill" / "checkpoints" / "step_000002",
        tmp_path / "out",
        "--dtype",
        "float12",
        words=["float12"],
        nothing=tmp_path / "out",
    )


def test_a_run_with_another_config_is_refused(arc, refused):
    refused(
        "train",
        "quickstart",
        *arc[1][2:],
        f"run={arc[0] / 'distill'}",
        "train.lr=0.02",
        words=["train.lr", "another `run`"],
    )


# the real files and the real model


@pytest.mark.slow
def test_gsm8k_with_the_small_model(tmp_path):
    data = Path(os.environ.get("ICL_DISTILL_GSM8K") or root.parent / "shared" / "data" / "gsm8k")
    if not (data / "train.jsonl").exists():
        pytest.skip(f"no GSM8K files in {data} (ICL_DISTILL_GSM8K)")
    args = [
        "quickstart",
        "task.name=gsm8k",
        f"task.path={data}",
        "task.n_train=200",
        "prompt.max_student_tokens=1024",
        f"run={tmp_path / 'run'}",
    ]
    fine("train", *args, "steps=20", "save_every=20", "batch_size=2", timeout=1200)
    fine(
        "evaluate",
        *args,
        f"checkpoints={tmp_path / 'run'}",
        "n_samples=40",
        "max_new_tokens=128",
        timeout=1200,
    )
    res = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert list(res["conditions"]) == ["zero_shot", "few_shot", "step_20"] and all(
        c["n"] == 40 for c in res["conditions"].values()
    )
    rows = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 21)) and sum(
        r["loss"] for r in rows[-5:]
    ) < sum(r["loss"] for r in rows[:5])
