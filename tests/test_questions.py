"Questions without answers, and shots: files of three kinds, caps, leaks and refusals."

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from helpers_data import changed, write
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_distill.core.config import TaskConfig
from icl_distill.data import shapes
from icl_distill.data.examples import Example, Question
from icl_distill.data.formats import read_examples, read_questions
from icl_distill.data.tasks import Task, check_leaks, check_shots, load_task
from icl_distill.testing import raises

texts = st.text(min_size=1, max_size=30).filter(str.strip)
rows_of_texts = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


def as_csv(rows, end="\r\n"):
    out = io.StringIO()
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    return out.getvalue()


def as_jsonl(rows):
    return "\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:])


def folded(text):
    return " ".join(text.split())


def distinct(questions):
    first = {}
    for question in questions:
        first.setdefault(folded(question), question)
    return list(first.values())


def said(capsys):
    "What stands on stderr, a line each."
    return capsys.readouterr().err.splitlines()


# --- examples in a table


@settings(max_examples=40, deadline=None)
@given(rows_of_texts, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_text_survives_a_table(rows, end, bom):
    with tempfile.TemporaryDirectory() as tmp:
        table = as_csv([("question", "answer"), *rows], end)
        path = write(tmp, "a.CSV", ("\ufeff" if bom else "") + table)
        assert [(e.question, e.answer) for e in read_examples(path, "t")] == rows


@settings(max_examples=40, deadline=None)
@given(rows_of_texts)
def test_a_table_and_json_lines_are_the_same(rows):
    with tempfile.TemporaryDirectory() as tmp:
        rows = [("q", "a"), *rows]
        table, lines = write(tmp, "a.csv", as_csv(rows)), write(tmp, "a.jsonl", as_jsonl(rows))
        names = {"question": "q", "answer": "a"}
        assert read_examples(table, "t", names) == read_examples(lines, "t", names)


def test_a_plain_table(tmp_path):
    text = "n,question,answer\n1,2+2?,4.50\n\n2,\"Who, then?\",'nobody'\n"
    assert read_examples(write(tmp_path, "a.csv", text), "train") == [
        Example("train-0", "2+2?", "4.50"),
        Example("train-1", "Who, then?", "'nobody'"),
    ]


BAD_TABLES = {
    "no such column": ("q,answer\na,b\n", "line 2", "'question'", "'q'"),
    "a field too many": ("question,answer\na,b\nc,d,e\n", "line 3", "3 fields", "quotation marks"),
    "a field too few": ("question,answer\na\n", "line 2", "1 fields"),
    "an open quotation": ('question,answer\na,b\n"c,d\ne,f\n', "line", "not CSV"),
    "after a quotation": ('question,answer\n"a"b,c\n', "line 2", "not CSV"),
    "a column twice": ("question,answer,answer\na,b,c\n", "line 1", "'answer' stands twice"),
    "an empty field": ("question,answer\na,b\n ,c\n", "line 3", "'question' is empty"),
    "a header alone": ("question,answer\n", "no examples"),
    "nothing": ("", "no examples"),
    "a huge field": (f"question,answer\na,{'b' * 200_000}\n", "line", "not CSV"),
    "half of a character": ("question,answer\na,\ud800\n", "not UTF-8"),
}


@pytest.mark.parametrize("text,words", [(t, w) for t, *w in BAD_TABLES.values()], ids=BAD_TABLES)
def test_a_bad_table_is_named(text, words, tmp_path):
    path = write(tmp_path, "mine.csv", text)
    with raises(path, *words):
        read_examples(path, "train")


def test_no_such_table(tmp_path):
    with raises("x.csv", "no such file"):
        read_examples(tmp_path / "x.csv", "train")
    with raises("x.csv", "no such file"):
        read_questions(tmp_path / "x.csv", 3)
    with raises("x.txt", "no such file"):
        read_questions(tmp_path / "x.txt", 3)
    with raises("no such file"):
        read_questions(tmp_path, 3)


# --- questions alone


@settings(max_examples=40, deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=8), st.integers(1, 9), st.sampled_from([".csv", ".jsonl"])
)
def test_any_question_survives(questions, most, kind):
    rows = [("question",), *((q,) for q in questions)]
    with tempfile.TemporaryDirectory() as tmp:
        path = write(tmp, f"a{kind}", as_csv(rows) if kind == ".csv" else as_jsonl(rows))
        expected = enumerate(distinct(questions)[:most])
        assert read_questions(path, most) == [Question(f"question-{i}", q) for i, q in expected]


line = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(line.filter(str.strip), min_size=1, max_size=8),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_line_of_a_text_is_a_question(lines, end):
    lines = [one for one in lines if not one.strip().startswith(("{", "Answer:", "\ufeff"))]
    if not lines:
        return
    with tempfile.TemporaryDirectory() as tmp:
        path = write(tmp, "a.txt", end.join(lines))
        assert [q.question for q in read_questions(path, 99)] == distinct(
            [x.strip() for x in lines]
        )


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.questions"])
def test_any_other_name_is_a_text(name, tmp_path):
    path = write(tmp_path, name, "\ufeffWho?\r\n\r\n  Why, then?  ")
    assert read_questions(path, 9) == [
        Question("question-0", "Who?"),
        Question("question-1", "Why, then?"),
    ]


def test_repeated_questions_are_counted(tmp_path, capsys):
    path = write(tmp_path, "a.txt", "Who?\nWhy?\nWho?\n Who? \nHow  so?\nHow so?\n")
    assert [q.question for q in read_questions(path, 9)] == ["Who?", "Why?", "How  so?"]
    (one,) = said(capsys)
    assert path in one and "3 lines repeat an earlier question" in one
    read_questions(write(tmp_path, "b.txt", "Who?\nWho?\n"), 9)
    assert "1 line repeats" in said(capsys)[0]


def test_a_cap_is_said(tmp_path, capsys):
    path = write(tmp_path, "a.txt", "Who?\nWhy?\nWho?\nHow?\n")
    assert len(read_questions(path, 2)) == 2
    assert any("the first 2 are taken" in x and "task.n_questions" in x for x in said(capsys))
    assert len(read_questions(path, 3)) == 3  # a repeat of one that is held is not one more
    assert not any("first" in x for x in said(capsys))


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_an_answer_is_not_read_and_this_is_said_once(kind, tmp_path, capsys):
    rows = [("question", "answer"), *((f"q{i}", f"secret {i}") for i in range(5))]
    path = write(tmp_path, f"a{kind}", as_csv(rows) if kind == ".csv" else as_jsonl(rows))
    questions = read_questions(path, 9)
    assert len(questions) == 5 and "secret" not in repr(questions)
    (one,) = said(capsys)
    assert path in one and "not read" in one and "'answer'" in one


def test_a_broken_answer_does_not_matter(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"question": "Who?", "answer": None}])
    assert read_questions(path, 9) == [Question("question-0", "Who?")]
    other = write(tmp_path, "b.jsonl", [{"q": 7}])
    assert read_questions(other, 9, {"question": "q"}) == [Question("question-0", "7")]


N = 20_000


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_reading_stops_early(kind, tmp_path, monkeypatch):
    "After `most` questions and one more nothing is read: the end of the file may be anything."
    rows = [("question",), *((f"What is {i} + {i}?",) for i in range(N))]
    text = {
        ".txt": lambda: "\n".join(q for (q,) in rows[1:]),
        ".csv": lambda: as_csv(rows),
        ".jsonl": lambda: as_jsonl(rows),
    }[kind]()
    path = write(tmp_path, f"a{kind}", text.encode() + b"\n\xff\xff")
    checked = []
    real = shapes._text
    monkeypatch.setattr(shapes, "_text", lambda *a: checked.append(a) or real(*a))
    questions = read_questions(path, 100)
    assert [q.question for q in questions] == [q for (q,) in rows[1:101]]
    assert len(checked) == 101
    with raises("not UTF-8"):
        read_questions(path, 2 * N)


@pytest.mark.parametrize(
    "name,text,words",
    [
        (
            "a.txt",
            "Who?\nQuestion: Why?\nAnswer: so\n",
            ["line 3", "Answer:", "take the answers out"],
        ),
        ("a.txt", "Who?\n   Answer: so\n", ["line 2", "Answer:"]),
        ("a.txt", "Who?\nWhy?\tso\n", ["line 2", "tab", ".csv"]),
        ("a.txt", 'Who?\n{"question": "Why?"}\n', ["line 2", "JSON", ".jsonl"]),
        ("a.jsonl", '{"question": "Why?\\nAnswer: so"}', ["line 1", "Answer:"]),
        ("a.csv", 'question\nWho?\n"Why?\nAnswer: so"\n', ["line 4", "Answer:"]),
        ("a.jsonl", "Who?\n", ["line 1", "not JSON"]),
        ("a.jsonl", '{"q": "Who?"}\n', ["line 1", "'question'", "'q'", "task.question_field"]),
        ("a.jsonl", '["Who?"]\n', ["line 1", "an object with fields"]),
        ("a.jsonl", '[{"question": "Who?"}]\n', ["line 1", "an object", "name the file .json"]),
        ("a.csv", "Who?\nWhy?\n", ["line 2", "'question'", "'Who?'"]),
        ("a.csv", "question,answer\nWhy?\n", ["line 2", "1 fields"]),
        ("a.txt", "", ["no questions"]),
        ("a.txt", " \n\n \n", ["no questions"]),
        ("a.csv", "question\n", ["no questions"]),
        ("a.jsonl", "\n", ["no questions"]),
        ("a.txt", b"Who?\n\xff\n", ["not UTF-8"]),
    ],
)
def test_no_file_of_questions(name, text, words, tmp_path):
    path = write(tmp_path, name, text)
    with raises(path, *words):
        read_questions(path, 9)


def test_the_word_answer_is_no_answer(tmp_path):
    path = write(tmp_path, "a.txt", "What is the Answer: 4 or 5?\nAnswer me this.\n{x} is what?\n")
    assert len(read_questions(path, 9)) == 3


# --- shots and questions as a task


@pytest.fixture
def mine(tmp_path):
    shots = [{"question": f"verb {i}", "answer": f"past {i}"} for i in range(4)]
    return TaskConfig(
        name="jsonl",
        extract="exact",
        path=write(tmp_path, "shots.jsonl", shots),
        questions_path=write(tmp_path, "questions.txt", "to fly\nto see\nto go\n"),
    )


def test_shots_and_questions(mine, tmp_path):
    task = load_task(mine)
    assert [e.id for e in task.train] == [f"train-{i}" for i in range(4)]
    assert (task.dev, task.tests, task.name) == ([], {}, "jsonl")
    assert task.questions == [
        Question(f"question-{i}", q) for i, q in enumerate(("to fly", "to see", "to go"))
    ]
    table = write(
        tmp_path,
        "shots.csv",
        as_csv([("question", "answer"), *[("a", "b"), ("c", "d"), ("e", "f")]]),
    )
    assert [e.answer for e in load_task(changed(mine, path=table)).train] == ["b", "d", "f"]
    assert len(load_task(changed(mine, n_questions=2)).questions) == 2
    assert len(load_task(changed(mine, n_train=3)).train) == 3


def test_dev_and_test_are_files_of_their_own(mine, tmp_path):
    dev = write(tmp_path, "dev.jsonl", [{"question": "d", "answer": "x"}])
    test = write(
        tmp_path, "test.jsonl", [{"question": "t", "answer": "y"}, {"question": "u", "answer": "z"}]
    )
    more = write(tmp_path, "more.csv", "question,answer\nm,n\n")
    task = load_task(
        changed(mine, dev_path=dev, test_path=test, n_test=1, test_sets={"more": more})
    )
    assert len(task.train) == 4 and [e.id for e in task.dev] == ["dev-0"]
    assert {k: [e.id for e in v] for k, v in task.tests.items()} == {
        "test": ["test-0"],
        "more": ["more-0"],
    }
    assert load_task(changed(mine, n_dev=2)).dev == []  # never taken from the shots


def test_a_large_file_is_capped(mine, tmp_path, capsys):
    many = write(tmp_path, "many.txt", "\n".join(f"to do {i}" for i in range(1000)))
    assert len(load_task(changed(mine, questions_path=many)).questions) == 256
    assert "first 256" in said(capsys)[0]


@pytest.mark.parametrize("question", ["verb 2", " verb 2 ", "verb   2"])
def test_a_question_that_is_a_shot(question, mine, tmp_path):
    path = write(tmp_path, "q.txt", f"to fly\n{question}\n")
    with raises("question-1", "shot 'train-2'", "leak"):
        load_task(changed(mine, questions_path=path))


@pytest.mark.parametrize(
    "key,split", [("dev_path", "dev"), ("test_path", "test"), ("test_sets", "more")]
)
def test_a_question_that_is_judged_by(key, split, mine, tmp_path):
    path = write(
        tmp_path,
        "held.jsonl",
        [{"question": "h", "answer": "x"}, {"question": "to  see", "answer": "x"}],
    )
    cfg = changed(mine, **{key: {"more": path} if key == "test_sets" else path})
    with raises("'question-1'", f"{split} example '{split}-1'", "leak"):
        load_task(cfg)


def test_leaks_between_the_others_are_still_found(mine, tmp_path):
    held = write(tmp_path, "held.jsonl", [{"question": "verb 1", "answer": "x"}])
    with raises("test-0", "train-1", "leak"):
        load_task(changed(mine, test_path=held))
    with raises("dev-0", "train-1", "leak"):
        load_task(changed(mine, dev_path=held))


def test_only_a_task_with_questions_may_lack_splits():
    shots = [Example("s", "q", "a")]
    with raises("no examples in dev"):
        check_leaks(Task("x", shots, [], {"test": shots}))
    with raises("no examples in train"):
        check_leaks(Task("x", [], shots, {"test": shots}))
    check_leaks(Task("x", [], [], {}, questions=[Question("q", "w")]))
    check_leaks(Task("x", shots, [], {"test": []}, questions=[Question("q", "w")]))


@pytest.mark.parametrize("n,word", [(1, "1 worked example is"), (2, "2 worked examples are")])
def test_too_few_shots(n, word, mine, tmp_path):
    with raises(word, "3 or more"):
        load_task(changed(mine, n_train=n))
    rows = [{"question": f"q{i % n}", "answer": "a"} for i in range(6)]
    with raises(word):
        load_task(changed(mine, path=write(tmp_path, "few.jsonl", rows)))


def test_shots_that_contradict_each_other(mine, tmp_path):
    rows = [
        {"question": q, "answer": a} for q, a in [("a", "1"), ("b", "2"), ("c", "3"), (" a", "4")]
    ]
    path = write(tmp_path, "odd.jsonl", rows)
    with raises("'train-0'", "'train-3'", "'1'", "'4'", "keep"):
        load_task(changed(mine, path=path))
    rows[3]["answer"] = "1 "
    assert len(load_task(changed(mine, path=write(tmp_path, "fine.jsonl", rows))).train) == 4


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xy")), max_size=8))
def test_shots_are_refused_for_a_reason(pairs):
    shots = [Example(f"s{i}", q, a) for i, (q, a) in enumerate(pairs)]
    if len({q for q, _ in pairs}) < 3 or len(set(pairs)) > len({q for q, _ in pairs}):
        with raises():
            check_shots(shots)
    else:
        check_shots(shots)


def test_without_a_file_of_shots_there_are_none(mine):
    "Instructions may stand in their place."
    task = load_task(changed(mine, path=None))
    assert task.train == [] and task.questions


@pytest.mark.parametrize(
    "change,words",
    [
        ({"path": "gone.csv"}, ["gone.csv", "no such file"]),
        ({"questions_path": "gone.txt"}, ["gone.txt", "no such file"]),
        ({"test_path": "gone.jsonl"}, ["gone.jsonl"]),
        ({"name": "dates"}, ["task.questions_path", "'dates'", "task.path"]),
        ({"name": "gsm8k"}, ["task.questions_path", "'gsm8k'"]),
        ({"questions_path": None, "n_questions": 5}, ["task.n_questions", "task.questions_path"]),
        ({"n_train": 9}, ["task.n_train"]),
        ({"extract": "number", "regex": None, "path": "letters"}, ["train-0", "task.extract"]),
        ({"test_sets": {"dev": "x"}}, ["'dev'"]),
    ],
)
def test_no_task_with_questions(change, words, mine, tmp_path):
    if change.get("path") == "letters":
        rows = [{"question": q, "answer": q} for q in "abc"]
        change = change | {"path": write(tmp_path, "letters.jsonl", rows)}
    with raises(*words):
        load_task(changed(mine, **change))


def test_gsm8k_generates_no_questions(tmp_path):
    with raises("task.n_questions", "gsm8k"):
        load_task(TaskConfig(path=str(tmp_path), n_questions=4))


def test_nothing_is_written(mine, tmp_path):
    before = sorted(p.name for p in Path(tmp_path).iterdir())
    load_task(mine)
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == before
