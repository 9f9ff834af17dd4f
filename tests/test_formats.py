"Data that people bring: containers, shapes, conversations, system turns, refusals, the command."

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from helpers_data import tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from icl_distill.app.bake import bake_config, run_bake
from icl_distill.core.config import PromptConfig, TaskConfig, load_config
from icl_distill.core.files import InputError, digest
from icl_distill.core.hub import load_tokenizer
from icl_distill.core.runs import Run
from icl_distill.data.contexts import Context
from icl_distill.data.examples import Dialogue, folded, turns_of
from icl_distill.data.formats import read_all, read_examples, read_questions
from icl_distill.data.prompts import Prompter
from icl_distill.data.rows import hub_name, read_rows
from icl_distill.data.shapes import RowReader
from icl_distill.data.system_text import with_system
from icl_distill.data.tasks import load_task
from icl_distill.testing import answering_folder, quiet_environment, raises

command = str(Path(sys.executable).with_name("icl-distill"))


@pytest.fixture(autouse=True, scope="module")
def _no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def shell(*args, **env):
    return subprocess.run(
        [command, *map(str, args)],
        env={**os.environ, **quiet_environment(), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- the same conversations in every shape and container

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
texts = texts.filter(str.strip)
pairs = st.tuples(texts, texts)
single = st.tuples(st.just([]), texts, texts)  # earlier turns, question, answer
several = st.tuples(st.lists(pairs, max_size=2), texts, texts)


def turns_as(talk, role, content, names):
    earlier, question, answer = talk
    flat = [text for pair in earlier for text in pair] + [question, answer]
    return [{role: names[i % 2], content: text} for i, text in enumerate(flat)]


def messages(talk):
    return {"messages": turns_as(talk, "role", "content", ("user", "assistant"))}


def sharegpt(talk):
    return {"conversations": turns_as(talk, "from", "value", ("human", "gpt"))}


def question_answer(talk):
    return {"question": talk[1], "answer": talk[2]}


def prompt_completion(talk):
    return {"prompt": talk[1], "completion": talk[2]}


def conversational(talk):
    turns = messages(talk)["messages"]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def alpaca(talk):
    return {"instruction": talk[1], "input": "", "output": talk[2], "history": talk[0]}


SHAPES = {  # a row of a conversation, and which conversations it can hold
    "question_answer": (question_answer, single),
    "messages": (messages, several),
    "sharegpt": (sharegpt, several),
    "alpaca": (alpaca, several),
    "prompt_completion": (prompt_completion, single),
    "conversational": (conversational, several),
}


def as_table(rows, parted=","):
    out = io.StringIO()
    cells = [[x if isinstance(x, str) else json.dumps(x) for x in row.values()] for row in rows]
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, delimiter=parted)
    writer.writerows([list(rows[0]), *cells])
    return out.getvalue()


CONTAINERS = {
    "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "b.json": lambda rows: json.dumps(rows, indent=1),
    "c.csv": as_table,
    "d.tsv": lambda rows: as_table(rows, "\t"),
}


def check(path, talks, shape):
    read = read_all(path)
    assert read.reader.shape == shape.replace("conversational", "prompt_completion")
    assert not read.reader.unread
    got = [(list(map(tuple, turns_of(r.question)[0])), turns_of(r.question)[1]) for r in read.rows]
    assert got == [(list(map(tuple, earlier)), asked) for earlier, asked, _ in talks]
    assert [row.answer for row in read.rows] == [answer for *_, answer in talks]
    for row, example in zip(read.rows, read_examples(path, "t"), strict=True):
        assert (row.question, row.answer, row.where) == (
            example.question,
            example.answer,
            example.where,
        )


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_conversation_survives_every_text_container(shape, data):
    row_of, kind = SHAPES[shape]
    talks = data.draw(st.lists(kind, min_size=1, max_size=4))
    rows = [row_of(talk) for talk in talks]
    with tempfile.TemporaryDirectory() as tmp:
        for name, made in CONTAINERS.items():
            if shape == "conversational" and name[-3:] in ("csv", "tsv"):
                continue  # a text in a table is a text
            check(write(tmp, name, made(rows)), talks, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_conversation_survives_parquet_arrow_and_a_saved_folder(shape, tmp_path):
    row_of, _ = SHAPES[shape]
    talks = [([], "2+2?", "4"), ([], "Ünïcode 😀\n?", " x ")]
    if SHAPES[shape][1] is several:
        talks.append(([("Hi", "Hello!")], "And 3+3?", "6"))
    data = datasets.Dataset.from_list([row_of(talk) for talk in talks])
    data.to_parquet(str(tmp_path / "a[1].parquet"))
    data.save_to_disk(str(tmp_path / "folder"))
    shutil.copy(next((tmp_path / "folder").glob("*.arrow")), tmp_path / "b.arrow")
    for name in ("a[1].parquet", "folder", "b.arrow"):
        check(tmp_path / name, talks, shape)


def test_a_saved_folder_of_splits_is_asked_for_one(tmp_path):
    one = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    datasets.DatasetDict(train=one, extra=one).save_to_disk(str(tmp_path / "both"))
    assert len(read_examples(tmp_path / "both", "t", {"split": "extra"})) == 1
    with raises("no split 'test'", "'train', 'extra'", "task.formats"):
        read_examples(tmp_path / "both", "t", {"split": "test"})


def test_typed_values_are_what_they_stand_for(tmp_path):
    kinds = {
        "question": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["no", "ok"]),
    }
    labels = datasets.Dataset.from_dict(
        {"question": ["a", "b"], "answer": [1, 0]}, features=datasets.Features(kinds)
    )
    labels.to_parquet(str(tmp_path / "a.parquet"))
    assert [e.answer for e in read_examples(tmp_path / "a.parquet", "t")] == ["ok", "no"]
    datasets.Dataset.from_dict({"question": ["a"], "answer": [4.5]}).to_parquet(
        str(tmp_path / "b.parquet")
    )
    assert read_examples(tmp_path / "b.parquet", "t")[0].answer == "4.5"
    table = write(tmp_path, "c.csv", "question,answer\nprice,4.50\nagent,007\nnone,NA\n")
    assert [e.answer for e in read_examples(table, "t")] == ["4.50", "007", "NA"]
    missing = datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["x", None]})
    missing.to_parquet(str(tmp_path / "d.parquet"))
    with raises("d.parquet, row 2", "'answer'", "NoneType"):
        read_examples(tmp_path / "d.parquet", "t")


# --- what was understood is said, and can be said otherwise


def said(capsys):
    return capsys.readouterr().err


def test_the_shape_and_what_is_not_read_are_said(tmp_path, capsys):
    rows = [{"instruction": "Add.", "input": "2+2?", "output": "4", "text": "…", "id": 7}]
    (one,) = read_examples(write(tmp_path, "a.jsonl", rows), "t")
    assert one.question == "Add.\n\n2+2?"
    lines = said(capsys)
    assert "read as alpaca" in lines and "not read: 'text', 'id'" in lines
    read_examples(write(tmp_path, "b.jsonl", [{"question": "q", "answer": "a"}]), "t")
    assert said(capsys) == ""
    tagged = messages(([], "q", "a"))
    tagged["messages"][0] |= {"name": "Bo", "weight": None}
    read_examples(write(tmp_path, "c.jsonl", [tagged]), "t")
    assert "not read: 'name of a turn'" in said(capsys)


def test_fields_are_named_for_each_file(tmp_path, capsys):
    shots = [{"Frage": f"q{i}", "Antwort": "a", "input": "lost?"} for i in range(9)]
    cfg = load_config(
        None,
        [
            f"task={{name: jsonl, n_dev: 1, path: {write(tmp_path, 'a.jsonl', shots)}}}",
            f"task.test_path={write(tmp_path, 'b.json', json.dumps([alpaca(([], 't', 'x'))]))}",
            "task.formats.path.question=Frage",
            "task.formats.path.answer=Antwort",
            "task.extract=exact",
        ],
    )
    task = load_task(cfg.task)
    assert (len(task.train), task.tests["test"][0].question) == (8, "t")
    assert "not read: 'input'" in said(capsys)
    with raises("'prompt'", "'Frage'", "task.formats.path.question"):
        read_examples(cfg.task.path, "t", {"shape": "prompt_completion"})
    both = [{**question_answer(([], "q", "a")), **messages(([], "m", "n"))}]
    path = write(tmp_path, "c.jsonl", both)
    assert read_examples(path, "t")[0].question == "q"
    assert "not read: 'messages'" in said(capsys)
    assert read_examples(path, "t", {"shape": "messages"})[0].question == "m"


@pytest.mark.parametrize(
    "formats,words",
    [
        ({"train": {"split": "x"}}, ["task.formats", "'train'", "questions_path"]),
        ({"path": {"shape": "alpacca"}}, ["task.formats.path.shape", "'alpacca'", "alpaca"]),
        ({"path": {"colour": "x"}}, ["task.formats.path", "'colour'", "split"]),
        ({"path": {"split": " "}}, ["task.formats.path.split", "empty"]),
    ],
)
def test_formats_that_cannot_be(formats, words):
    with raises(*words):
        TaskConfig(name="jsonl", formats=formats)


def test_names_of_files_and_of_the_hub():
    for name in ("openai/gsm8k", "hf://datasets/openai/gsm8k", "hf:/datasets/openai/gsm8k"):
        assert hub_name(name) == "openai/gsm8k"
    for name in ("mine", "a/b/c", "./a", "/a/b", "data/x.jsonl", "data/x.parquet", "data/x.txt"):
        assert hub_name(name) is None


# --- what is refused: one line that says what to write instead

GOOD = '{"question": "q", "answer": "a"}'
NO_TEXT = {
    "utf-16": ("a.jsonl", GOOD.encode("utf-16"), ["UTF-16", "iconv -f UTF-16 -t UTF-8 a.jsonl"]),
    "utf-16 without a mark": ("a.csv", "question,answer\nq,a".encode("utf-16-le"), ["UTF-16"]),
    "utf-16, a text": ("a.txt", "Who?\n".encode("utf-16-be"), ["UTF-16", "iconv"]),
    "latin-1": ("a.jsonl", GOOD.replace("q", "é").encode("latin-1"), ["not UTF-8", "LATIN1"]),
    "latin-1 in a table": ("a.csv", "question,answer\né,a".encode("latin-1"), ["LATIN1"]),
    "zip": ("a.jsonl", b"PK\x03\x04xx", ["archive", "CSV"]),
    "gzip": ("a.jsonl.gz", b"\x1f\x8bxx", ["gzip", "gunzip"]),
    "tar": ("a.json", b"x" * 257 + b"ustar", ["tar"]),
    "parquet by another name": ("a.csv", b"PAR1xx", ["Parquet", ".parquet"]),
    "no parquet": ("a.parquet", b"question,answer", ["a.parquet", "could not be read"]),
    "no arrow": ("a.arrow", b"question,answer", ["a.arrow", "could not be read"]),
}


@pytest.mark.parametrize("name,content,words", NO_TEXT.values(), ids=NO_TEXT)
def test_no_text(name, content, words, tmp_path):
    path = write(tmp_path, name, content)
    for read in (lambda: read_examples(path, "t"), lambda: read_questions(path, 9)):
        with pytest.raises(InputError) as e:
            read()
        assert all(word in str(e.value) for word in [path, *words]) and "\n" not in str(e.value)


def turns(*roles):
    return {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}


OK = turns("user", "assistant")
ROWS = {
    "nested": ({"data": [OK]}, ["'data'", "jq"]),
    "an array of arrays": ([["q", "a"]], ["row 1", "expected an object"]),
    "text alone": ([{"text": "Q: q A: a"}], ["row 1", "'text' alone", "question and answer"]),
    "no shape": ([{"problem": "q"}], ["row 1", "'problem'", "task.question_field"]),
    "a list": ([{"question": ["q"], "answer": "a"}], ["row 1", "'question'", "list"]),
    "another shape": ([OK, {"question": "q", "answer": "a"}], ["row 2", "'messages'"]),
    "no answer": ([OK, turns("user", "assistant", "user")], ["row 2", "no answer"]),
    "no question": ([turns("assistant")], ["row 1", "begins with the assistant"]),
    "nothing asked": ([turns("system")], ["row 1", "no turn of a user"]),
    "no turns": ([{"messages": []}], ["row 1", "no turn of a user"]),
    "two users": ([turns("user", "user", "assistant")], ["row 1", "two turns of the user"]),
    "a late system turn": ([turns("user", "system", "assistant")], ["row 1", "not the first"]),
    "a tool": ([turns("user", "tool", "assistant")], ["row 1, turn 2", "'tool'"]),
    "no turn": ([{"messages": ["q", "a"]}], ["row 1, turn 1", "role and content"]),
    "no list of turns": ([{"messages": {"role": "user"}}], ["row 1", "a list of turns"]),
    "an empty turn": (
        [{"messages": [{"role": "user", "content": " "}]}],
        ["row 1, turn 1", "empty"],
    ),
    "a picture": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        ["row 1, turn 1", "content must be a text"],
    ),
    "a call": (
        [{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}],
        ["row 1, turn 1", "'tool_calls'"],
    ),
    "two answers": (
        [{"prompt": "q", "completion": OK["messages"]}],
        ["row 1", "'completion'", "one turn"],
    ),
    "an answer in the prompt": (
        [{"prompt": OK["messages"], "completion": "a"}],
        ["row 1", "'prompt'", "user's turn"],
    ),
    "a history of texts": (
        [{"instruction": "q", "output": "a", "history": ["x"]}],
        ["row 1", "'history'", "pairs"],
    ),
    "other system text": (
        [turns("system", "user", "assistant"), OK],
        ["row 2", "row 1", "prompt.system"],
    ),
}


@pytest.mark.parametrize("rows,words", ROWS.values(), ids=ROWS)
def test_a_bad_row_is_named(rows, words, tmp_path):
    path = write(tmp_path, "mine.json", json.dumps(rows))
    with raises(path, *words):
        read_examples(path, "t")


def test_a_table_with_other_marks_is_named(tmp_path):
    for mark in ";|":
        path = write(tmp_path, "a.csv", f"question{mark}answer\nq{mark}a\n")
        with raises(path, "line 1", repr(mark), "commas"):
            list(read_rows(path))


# --- conversations: earlier turns and system text


def talks(tmp_path, n, system=None, name="talks.jsonl", first=0):
    rows = []
    for i in range(first, first + n):
        row = messages(([("Hi", f"Hello {i}!")], f"Is {i} even?", "no" if i % 2 else "yes"))
        if system:
            row["messages"].insert(0, {"role": "system", "content": system})
        rows.append(row)
    return write(tmp_path, name, rows)


def test_earlier_turns_are_read_and_not_learnt(tmp_path):
    tok = tokenizer("qwen3")
    prompter = Prompter(tok, PromptConfig(question_format="{question}"))
    one, other = read_examples(talks(tmp_path, 2), "t")
    turns = [("user", "Hi"), ("assistant", "Hello 0!"), ("user", "Is 0 even?")]
    expected = [{"role": role, "content": text} for role, text in turns]
    how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
    prompt = tok.apply_chat_template(expected, **how)
    assert prompter.render(Context(), one.question).plain == prompt
    ids, answer = prompter.prompt_and_answer_ids(Context(), one.question, one.answer)
    assert tok.decode(ids) == prompt and tok.decode(answer).startswith("yes")
    shown = prompter.render(Context((other,)), one.question).plain
    assert shown.index("Hello 1!") < shown.index("no") < shown.index("Hello 0!")


def test_a_question_is_the_same_only_behind_the_same_turns(tmp_path):
    one, other = read_examples(talks(tmp_path, 2), "t")
    again = Dialogue([("Hi", "Hello  0! ")], " Is 0 even?")
    assert folded(again) == folded(one.question) != folded(other.question)
    assert folded(Dialogue([("Hi", "Ho")], "q")) != folded("q")


def test_questions_lose_their_last_answer_and_this_is_said(tmp_path, capsys):
    asked = read_questions(talks(tmp_path, 3), 9)
    assert [turns_of(q.question)[1] for q in asked] == [f"Is {i} even?" for i in range(3)]
    assert "not read: 'the last turn, an answer'" in said(capsys)


def task_of(tmp_path, **systems):
    train = talks(tmp_path, 6, systems.get("train"), "train.jsonl")
    test = talks(tmp_path, 3, systems.get("test"), "test.jsonl", first=10)
    return load_task(TaskConfig(name="jsonl", extract="exact", n_dev=1, path=train, test_path=test))


def test_the_system_turn_becomes_the_runs(tmp_path, capsys):
    task = task_of(tmp_path, train="Be brief.", test="Be brief.")
    cfg = with_system(load_config(), task)
    assert cfg.prompt.system == "Be brief." and with_system(cfg, task) == cfg
    assert "prompt.system" in said(capsys)
    assert with_system(load_config(), task_of(tmp_path)) == load_config()
    with raises("'Be brief.'", "'Be exact.'", "one system text"):
        with_system(load_config(), task_of(tmp_path, train="Be brief.", test="Be exact."))
    with raises("prompt.system is 'Be exact.'", "'Be brief.'"):
        with_system(load_config(None, ["prompt.system=Be exact."]), task)


# --- the command


def test_the_command_shows_what_was_understood(tmp_path, model):
    path = talks(tmp_path, 6, "Be brief.")
    rows = Path(path).read_text().splitlines()
    long = json.loads(rows[0])
    long["messages"][-1]["content"] = "yes " * 600
    Path(path).write_text("\n".join([*rows, rows[2].replace("Is 2", "Is  2"), json.dumps(long)]))
    done = shell("data", path, "--model", model)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert f"{path}: 8 examples" in out and "shape messages" in out
    assert "system text of every prompt: 'Be brief.'" in out
    assert out.count("<|im_start|>system\nBe brief.<|im_end|>") == 3
    assert "Hello 0!<|im_end|>" in out and "median" in out
    assert "repeat an earlier one: 2" in out and f"{path}, line 7: asks the same as" in out
    assert f"{path}, line 8: asks the same as {path}, line 1, with another answer" in out
    assert "will not fit: 1" in out and f"{path}, line 8: " in out
    assert "prompt.max_student_tokens is 512" in out


def test_the_command_refuses_in_one_line(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD.encode("utf-16"))
    done = shell("data", path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "iconv" in done.stderr


def cached_data_set(cache, name, splits):
    "Writes what `datasets` keeps of a data set that was loaded from the hub once."
    owner, short = name.split("/")
    files = {}
    for split, rows in splits.items():
        files[split] = str(cache / f"{split}.parquet")
        datasets.Dataset.from_list(rows).to_parquet(files[split])
    how = dict(data_files=files, cache_dir=str(cache / "made"))
    builder = datasets.load_dataset_builder("parquet", **how)
    builder.download_and_prepare()
    made, out = Path(builder.cache_dir), cache / f"{owner}___{short}/default/0.0.0/c0ffee"
    out.mkdir(parents=True)
    for file in made.glob("*.arrow"):
        shutil.copy(file, out / file.name.replace("parquet", short))
    info = json.loads((made / "dataset_info.json").read_text())
    kept = {f"hf://datasets/{name}@c0ffee/x.parquet": {"num_bytes": 1, "checksum": None}}
    info |= dict(config_name="default", dataset_name=short, download_checksums=kept)
    (out / "dataset_info.json").write_text(json.dumps(info))


HUB = """
from icl_distill.data.formats import read_examples, read_questions
from icl_distill.testing import raises
name = "nobody/tiny"
assert [e.question for e in read_examples(name, "t")] == ["a"]
(one, two) = read_examples(f"hf://datasets/{name}", "t", {"split": "test", "subset": "default"})
assert (two.question, two.answer, two.where) == ("e", "f", "nobody/tiny (test), row 2")
assert len(read_questions(name, 9, {"split": "test[:1]", "revision": "c0ffee"})) == 1
with raises("nobody/tiny", "'tst'", "train", "task.formats"):
    read_examples(name, "t", {"split": "tst"})
with raises("revision 'v2'", "c0ffee"):
    read_examples(name, "t", {"revision": "v2"})
with raises("nobody/nothing", "no such file", "hub"):
    read_examples("nobody/nothing", "t")
print("all of it")
"""


def test_a_data_set_of_the_hub_is_read_from_its_cache(tmp_path):
    ab, cd, ef = ({"question": q, "answer": a} for q, a in ("ab", "cd", "ef"))
    cached_data_set(tmp_path, "nobody/tiny", {"train": [ab], "test": [cd, ef]})
    env = {"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = [sys.executable, "-c", HUB]
    done = subprocess.run(code, env={**os.environ, **env}, capture_output=True, text=True)
    assert "all of it" in done.stdout, done.stderr


# --- from a file to an adapter

SMALL = ["model.dtype=float32", "train.steps=2", "train.save_every=2", "train.batch_size=2"]
SMALL += ["train.warmup_steps=0", "answers.labeller_steps=2", "answers.shot_repeats=1"]
SMALL += ["evaluate.max_new_tokens=6", "lora.r=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A tiny model that answers every question of a chat with yes."
    folder = tmp_path_factory.mktemp("models") / "yes"
    return str(answering_folder(folder, "llama", "yes", "\n"))


def even(n):
    return {"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"}


def test_from_a_newcomers_table_to_an_adapter_that_peft_loads(tmp_path, model):
    shots = write(tmp_path, "shots.csv", as_table([even(n) for n in range(6)]))
    test = write(tmp_path, "test.csv", as_table([even(n) for n in range(50, 56)]))
    asked = [{"question": even(n)["question"]} for n in range(20, 32)]
    questions, out = write(tmp_path, "questions.csv", as_table(asked)), tmp_path / "out"
    files = ["--shots", shots, "--questions", questions, "--test", test, "--out", out]
    done = shell("bake", *files, "--model", model, *SMALL)
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[1, 2, 3]])
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, str(out / "adapter"))(ids).logits
    assert not torch.equal(before, after)


def test_conversations_of_several_containers_are_baked(tmp_path, model, capsys):
    shots = talks(tmp_path, 6, "Be brief.")
    rows = [
        {"conversations": sharegpt(([("Hi", "Ho")], f"Is {n} even?", "?"))["conversations"][:-1]}
        for n in range(20, 30)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "questions.parquet"))
    test = [{"instruction": "Answer.", "input": f"Is {n} even?", "output": "yes"} for n in (50, 52)]
    files = {
        "shots": Path(shots),
        "questions": tmp_path / "questions.parquet",
        "test": Path(write(tmp_path, "test.json", json.dumps(test))),
    }
    baked = run_bake(bake_config(model, files, tmp_path / "out", SMALL), progress=False)
    run = Run(tmp_path / "out")
    assert run.config.prompt.system == baked.cfg.prompt.system == "Be brief."
    prompter = Prompter(load_tokenizer(model), run.config.prompt)
    task = load_task(run.config.task)
    context = Context(tuple(task.train))
    asked = {q.id: q.question for q in task.questions}
    lines = run.answers_path("teacher").read_text().splitlines()
    answers = [row for row in map(json.loads, lines) if "prompt_hash" in row]
    assert len(answers) == len(asked) == 10
    for row in answers:
        ids = prompter.prompt_ids(context, asked[row["id"]])
        assert digest(ids) == row["prompt_hash"] and "Ho" in prompter.decode(ids)
    card = (run.path / "adapter" / "README.md").read_text()
    assert "Be brief." in card and "User: Hi" not in card


@pytest.mark.parametrize(
    ("names", "shape", "row"),
    [
        (("prompt", "completion"), "prompt_completion", dict(prompt=[], completion=[])),
        (("messages", "answer"), "messages", turns("user", "assistant")),
    ],
)
def test_fields_that_are_named_may_hide_a_shape(names, shape, row):
    reader = RowReader(dict(zip(("question", "answer"), names, strict=True)))
    with raises(f"it has the shape {shape}, which is read where no fields are named"):
        reader("row 1", row)
