"Scoring, reading, splits, generated problems."

import hashlib
import json
import operator
import random
import re
import tempfile

import pytest
from helpers_data import GSM8K, changed, needs_gsm8k, write
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_distill.core.config import TaskConfig
from icl_distill.data.examples import Example, extract_flexible, extract_strict, normalise
from icl_distill.data.formats import read_examples
from icl_distill.data.tasks import Task, check_leaks, load_task, split_dev
from icl_distill.data.word_problems import word_problem
from icl_distill.testing import raises

number = Task("numbers", [], [], {})


def gold(answer):
    return Example("e", "?", answer)


# --- extraction: what lm-evaluation-harness does, written down a second time


def harness(text, answer, pattern, pick):
    "Its regex filter, then its exact match, with the settings of its GSM8K task."
    found = re.findall(pattern, text)
    if found:
        m = found[pick]
        if isinstance(m, tuple):
            m = [g for g in m if g][0]
        text = m.strip()
    else:
        text = "[invalid]"
    for r in (",", r"\$", "(?s).*#### ", r"\.$"):
        text, answer = re.sub(r, "", text), re.sub(r, "", answer)
    return text.lower() == answer.lower()


def harness_strict(text, answer):
    return harness(text, answer, r"#### (\-?[0-9\.\,]+)", 0)


def harness_flexible(text, answer):
    return harness(text, answer, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)


HARD = [  # text, strict, flexible: normalised
    ("5 + 3 = 8\n#### 8", "8", "8"),
    ("#### -12", "-12", "-12"),
    ("It is -12.", None, "-12"),
    ("#### 1,234,567", "1234567", "1234567"),
    ("#### 0", "0", "0"),
    ("#### 18.50", "18.50", "18.50"),
    ("#### .5", ".5", ".5"),
    ("#### 18.0", "18.0", "18.0"),
    ("#### 72.", "72", "72"),
    ("Therefore 72.", None, "72"),
    ("#### $18", None, "18"),
    ("so $1,000.", None, "1000"),
    ("$-5", None, "-5"),
    ("-$5", None, "-5"),
    ("#### -$5", None, "-5"),
    ("#### 45%", "45", "45"),
    ("45.5%", None, "45.5"),
    ("#### 1/2", "1", "2"),
    ("#### 3 apples and 4 pears", "3", "4"),
    ("#### 1\n#### 2", "1", "2"),
    ("#### x\n#### 2", "2", "2"),
    ("#### 7\nQuestion: What is 9 + 1?", "7", "1"),
    ("#### 7\n\nLet us check: 3", "7", "3"),
    ("####8", None, "8"),
    ("###  8", None, "8"),
    ("####  8", None, "8"),
    ("##### 8", "8", "8"),
    ("#### 8 #### 9", "8", "9"),
    ("####\n8", None, "8"),
    ("no number at all", None, None),
    ("", None, None),
    ("####", None, None),
    ("#### ", None, None),
    ("#### none", None, None),
    ("in 2024-11-24", None, "-24"),
    ("10:30", None, "30"),
    ("1e5", None, "5"),
    ("3x", None, "3"),
    ("**42**", None, "42"),
    ("\\boxed{42}", None, "42"),
    ("So 5...", None, "5.."),
    ("Well...", None, ".."),
    ("5, then", None, "5"),
    ("#### 1.234,5", "1.2345", "1.2345"),
    ("#### 5\u00a0000", "5", "000"),
    ("#### −7", None, "7"),
    ("#### 007", "007", "007"),
]


@pytest.mark.parametrize("text,strict,flexible", HARD, ids=[repr(t)[:30] for t, *_ in HARD])
def test_hard_cases(text, strict, flexible):
    found = [x and normalise(x) for x in (extract_strict(text), extract_flexible(text))]
    assert found == [strict, flexible]
    for g in {strict, flexible, "8", "1,000"} - {None}:
        if not re.fullmatch(r"-?[\d.,]*\d[\d.,]*", g):
            continue
        s = number.score(text, gold(f"worked.\n#### {g}"))
        assert (s.correct, s.correct_flexible) == (
            harness_strict(text, f"worked.\n#### {g}"),
            harness_flexible(text, f"worked.\n#### {g}"),
        )


numbers = st.one_of(
    st.integers(-(10**7), 10**7).map(str),
    st.integers(-(10**9), 10**9).map("{:,}".format),
    st.decimals(-999, 999, places=2).map(str),
    st.integers(0, 10**5).map("{:,}.00".format),
)


@given(st.text(alphabet="#0123456789.,$%- \nab", max_size=40), numbers)
def test_any_text_is_scored_as_the_harness_does(text, n):
    s = number.score(text, gold(f"3 - 1 = 2\n#### {n}"))
    assert (s.correct, s.correct_flexible) == (
        harness_strict(text, f"3 - 1 = 2\n#### {n}"),
        harness_flexible(text, f"3 - 1 = 2\n#### {n}"),
    )


@given(
    numbers,
    st.sampled_from(["", ".", "%", " apples", "\n", ".\n"]),
    st.sampled_from(["", "1 + 1 = 2\n", "words, and 3.5% of $9\n"]),
)
def test_the_right_number_is_right_however_it_is_dressed(n, after, before):
    s = number.score(f"{before}#### {n}{after}", gold(f"#### {n}"))
    assert s.correct and s.correct_flexible
    bare = number.score(f"{before}It is {n}{after}", gold(f"#### {n.replace(',', '')}"))
    assert not bare.correct and bare.strict is None and bare.correct_flexible


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers_are_equal_only_if_they_are(a, b):
    for text in (f"#### {a}", f"#### {a:,}", f"#### {a}."):
        assert number.score(text, gold(f"#### {b:,}")).correct == (a == b)


@given(st.text(max_size=60))
def test_any_text_can_be_scored(text):
    for task in (
        number,
        Task("x", [], [], {}, "exact"),
        Task("x", [], [], {}, "regex", r"#(a)?(\d+)?"),
    ):
        s = task.score(text, gold("#a\n#### 1"))
        assert not (s.correct and s.strict is None) and not (
            s.correct_flexible and s.flexible is None
        )


def test_gold_without_a_mark_is_its_last_number():
    assert number.score("#### 1000", gold("about 3, or 1,000")).correct
    with raises("'e'", "none", "number"):
        number.score("5", gold("none"))


def test_exact_and_regex():
    exact, regex = Task("x", [], [], {}, "exact"), Task("x", [], [], {}, "regex", r"name:\s*(\w+)")
    assert (
        exact.score(" went\n", gold("went")).correct
        and not exact.score("Went", gold("went")).correct
        and not exact.score("went out", gold("went")).correct_flexible
    )
    s = regex.score("name: Bo, name: Al", gold("it is name:  Bo "))
    assert (
        s.correct
        and s.strict == "Bo" == s.gold
        and regex.score("Bo", gold("name: Bo")).strict is None
    )
    with raises("'e'"):
        regex.score("name: Bo", gold("Bo"))
    assert (
        Task("x", [], [], {}, "regex", "a|b").score("xb", gold("b")).correct
    )  # no group: the whole match


# --- jsonl


LINE = '{"question": "fine", "answer": "1"}\n'
BAD = {
    "half an object": "{",
    "a list": "[1]",
    "a text": '"x"',
    "null": "null",
    "no answer": '{"question": "a"}',
    "no question": '{"answer": "a"}',
    "null answer": '{"question": "a", "answer": null}',
    "true": '{"question": "a", "answer": true}',
    "a list in it": '{"question": ["a"], "answer": "b"}',
    "an object in it": '{"question": "a", "answer": {"b": 1}}',
    "NaN": '{"question": "a", "answer": NaN}',
    "Infinity": '{"question": "a", "answer": -Infinity}',
    "twice": '{"question": "a", "question": "b", "answer": "c"}',
    "empty": '{"question": "", "answer": "c"}',
    "blank": '{"question": "a", "answer": " \\n"}',
    "half a character": '{"question": "\\ud800", "answer": "c"}',
    "two on a line": LINE.strip() * 2,
    "single quotes": "{'question': 'a', 'answer': 'b'}",
    "trailing comma": '{"question": "a", "answer": "b",}',
    "deep": "[" * 100_000,
    "raw tab": '{"question": "a\tb", "answer": "c"}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_line_is_named(bad, tmp_path):
    path = write(tmp_path, "mine.jsonl", LINE + "\n" + LINE + bad + "\n" + LINE)
    with raises(f"{path}, line 4"):
        read_examples(path, "train")


def test_a_missing_field_says_which_there_are(tmp_path):
    path = write(tmp_path, "mine.jsonl", [{"prompt": "a", "answer": "b"}])
    with raises("'question'", "'prompt'", "task.question_field"):
        read_examples(path, "train")
    assert read_examples(path, "train", {"question": "prompt"}) == [Example("train-0", "a", "b")]


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", "\ufeff".encode(), b"\xff\xfe{", b"\x80"])
def test_not_a_file_of_examples(content, tmp_path):
    path = write(tmp_path, "mine.jsonl", content)
    with raises(path):
        read_examples(path, "train")


def test_no_such_file(tmp_path):
    with raises("x.jsonl", "no such file"):
        read_examples(tmp_path / "x.jsonl", "train")
    with raises("no such file"):
        read_examples(tmp_path, "train")


def test_what_is_accepted(tmp_path):
    text = (
        '\ufeff{"question": "a", "answer": 7, "more": [1]}\r\n'
        + '\r\n   \n{"answer": "ü\u2028\u0085 \\n x", "question": "سؤال 😀"}'
    )
    assert read_examples(write(tmp_path, "a.jsonl", text), "train") == [
        Example("train-0", "a", "7"),
        Example("train-1", "سؤال 😀", "ü\u2028\u0085 \n x"),
    ]
    row = '{"question": "a", "answer": %s}'
    for n in ("1.50", "-3", "1e22", "12345678901234567890.5", "9" * 5000):
        (e,) = read_examples(write(tmp_path, "b.jsonl", row % n), "train")
        assert e.answer == n and type(e.answer) is str  # as it is written


texts = st.text(min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
)
def test_any_text_survives(rows, end, ascii):
    with tempfile.TemporaryDirectory() as tmp:
        path = write(
            tmp,
            "a.jsonl",
            end.join(json.dumps({"question": q, "answer": a}, ensure_ascii=ascii) for q, a in rows),
        )
        assert [(e.question, e.answer) for e in read_examples(path, "t")] == rows


# --- your own task


@pytest.fixture
def mine(tmp_path):
    return TaskConfig(
        name="jsonl",
        n_dev=3,
        path=write(
            tmp_path,
            "train.jsonl",
            [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(10)],
        ),
        test_path=write(
            tmp_path, "test.jsonl", [{"question": f"t{i}", "answer": f"#### {i}"} for i in range(4)]
        ),
    )


def test_jsonl_task(mine, tmp_path):
    task = load_task(mine)
    assert (len(task.train), len(task.dev), list(task.tests), len(task.tests["test"])) == (
        7,
        3,
        ["test"],
        4,
    ) and task == load_task(mine)
    assert {e.id for e in task.train} | {e.id for e in task.dev} == {
        f"train-{i}" for i in range(10)
    }
    more = load_task(
        changed(
            mine,
            dev_path=write(tmp_path, "dev.jsonl", [{"question": "d", "answer": "#### 1"}]),
            test_sets={"hard": write(tmp_path, "hard.jsonl", [{"question": "h", "answer": "2"}])},
        )
    )
    assert (len(more.train), len(more.dev), list(more.tests)) == (10, 1, ["test", "hard"])
    assert load_task(changed(mine, n_train=2, n_test=1)).train == task.train[:2]


@pytest.mark.parametrize(
    "change,word",
    [
        ({"path": None}, "task.path"),
        ({"test_path": None}, "task.test_path"),
        ({"n_train": 8}, "task.n_train"),
        ({"n_test": 5}, "task.n_test"),
        ({"n_dev": 10}, "task.n_dev"),
        ({"extract": "regex"}, "task.regex"),
        ({"extract": "regex", "regex": "("}, "task.regex"),
        ({"extract": "regex", "regex": "x(.)"}, "gold"),
        ({"test_sets": {"test": "x"}}, "'test'"),
        ({"test_sets": {"more": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"question_field": "q"}, "'q'"),
        ({"name": "other"}, "other"),
    ],
)
def test_jsonl_task_refused(change, word, mine):
    with raises(word):
        load_task(changed(mine, **change))


def test_gold_answers_are_read_before_anything_runs(mine, tmp_path):
    with raises("test-0"):
        load_task(
            changed(
                mine, test_path=write(tmp_path, "t.jsonl", [{"question": "t", "answer": "none"}])
            )
        )


@pytest.mark.parametrize("q", ["q3", " q3\n", "q3 "])
def test_a_leak_names_both(q, mine, tmp_path):
    leaky = write(
        tmp_path,
        "leaky.jsonl",
        [{"question": "fine", "answer": "1"}, {"question": q, "answer": "1"}],
    )
    for key, other in (("test_path", "-3'"), ("dev_path", "'train-3'")):
        cfg = changed(mine, **{key: leaky})
        with raises(f"'{key[:-5]}-1'", other, "leak"):
            load_task(cfg)
    with raises("hard-1", "leak"):
        load_task(changed(mine, test_sets={"hard": leaky}))


# --- splits


@given(st.integers(2, 40), st.data())
def test_split(n, data):
    k, seed = data.draw(st.integers(1, n - 1)), data.draw(st.integers(0, 99))
    examples = [Example(f"train-{i}", f"q{i}", "a") for i in range(n)]
    train, dev = split_dev(examples, k, seed)
    assert (
        len(dev) == k
        and sorted(train + dev, key=examples.index) == examples
        and (train, dev) == split_dev(examples, k, seed)
    )
    check_leaks(Task("x", train, dev, {"test": [Example("t", "other", "a")]}))


def test_questions_that_occur_twice_stay_in_train():
    examples = [Example(f"train-{i}", f"q{i // 2}" if i < 10 else f"s{i}", "a") for i in range(15)]
    for seed in range(20):
        assert all(e.question.startswith("s") for e in split_dev(examples, 4, seed)[1])
    with raises("task.n_dev"):
        split_dev(examples, 6, 0)


# --- GSM8K


def test_gsm8k_folder_refused(tmp_path):
    with raises("train.jsonl"):
        load_task(TaskConfig(path=str(tmp_path)))
    with raises("nowhere"):
        load_task(TaskConfig(path="./nowhere"))
    with raises("owner/name"):
        load_task(TaskConfig(path="gsm8k"))
    for s in ("train", "test"):
        (tmp_path / f"{s}.jsonl").write_text("")
    with raises("train.jsonl", "no examples"):
        load_task(TaskConfig(path=str(tmp_path)))


@needs_gsm8k
def test_gsm8k():
    task = load_task(TaskConfig(path=str(GSM8K)))
    assert (len(task.train), len(task.dev), len(task.tests["test"])) == (
        7273,
        200,
        1319,
    ) and task.dev != load_task(TaskConfig(path=str(GSM8K), seed=1)).dev
    assert "<<48/2=24>>" in next(e.answer for e in task.train + task.dev if e.id == "train-0")
    for e in [
        *task.train,
        *task.dev,
        *task.tests["test"],
    ]:  # the gold text answers its own question, for us and for the harness
        s = task.score(e.answer, e)
        assert (
            s.correct
            and s.correct_flexible
            and harness_strict(e.answer, e.answer)
            and harness_flexible(e.answer, e.answer)
        ), e


@needs_gsm8k
def test_gsm8k_without_annotations():
    task, bare = (
        load_task(TaskConfig(path=str(GSM8K))),
        load_task(TaskConfig(path=str(GSM8K), strip_annotations=True)),
    )
    for a, b in zip(task.train, bare.train, strict=True):
        assert (
            "<<" not in b.answer
            and (a.id, a.question) == (b.id, b.question)
            and task.score(b.answer, a).correct
        )
    assert next(e.answer for e in bare.train + bare.dev if e.id == "train-0").startswith(
        "Natalia sold 48/2 = 24 clips in May."
    )


# --- word problems

OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def applied(op, x, y):
    "None where the result is not whole."
    if op == "/":
        return x // y if x % y == 0 else None
    return OPS[op](x, y)


def problems(**kw):
    return load_task(TaskConfig(name="word_problems", **kw))


def check_problem(e, steps):
    *lines, last = e.answer.split("\n")
    assert len(lines) in steps
    numbers = [int(x) for x in re.findall(r"\d+", e.question)]
    value = numbers[0]
    for line, b in zip(
        lines, numbers[1:], strict=True
    ):  # each step works on the result before, with the question's next number
        left, op, right, eq, result = line.split(" ")
        assert (int(left), int(right), eq) == (value, b, "=")
        assert applied(op, value, b) == int(result) > 0
        value = int(result)
    assert last == f"#### {value}" and number.score(e.answer, e).correct and value < 1000
    assert (
        "{" not in e.question
        and "  " not in e.question
        and e.question.endswith("?")
        and e.question[0].isupper()
    )


@pytest.mark.parametrize("steps", [[1], [2], [3], [1, 2, 3], [3, 1]])
def test_every_generated_answer_is_right(steps):
    t = problems(steps=steps)
    everything = [*t.train, *t.dev, *t.tests["test"]]
    assert [len(t.train), len(t.dev), len(t.tests["test"])] == [2000, 50, 300] and len(
        {e.id for e in everything}
    ) == 2350
    for e in everything:
        check_problem(e, steps)
    for s in (t.train, t.dev, t.tests["test"]):
        counts = [sum(e.answer.count(" = ") == k for e in s) for k in steps]
        assert sum(counts) == len(s) and max(counts) - min(counts) <= 1  # mixed evenly


@settings(max_examples=200)
@given(st.integers(1, 3), st.integers())
def test_any_problem(n, seed):
    q, a = word_problem(n, random.Random(seed))
    check_problem(Example("e", q, a), [n])
    assert (q, a) == word_problem(n, random.Random(seed))


@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    st.integers(1, 120),
    st.integers(1, 30),
    st.integers(1, 120),
)
def test_splits_are_disjoint_and_seeded(seed, steps, n_train, n_dev, n_test):
    kw = {"seed": seed, "steps": steps, "n_train": n_train, "n_dev": n_dev, "n_test": n_test}
    t = problems(**kw)
    splits = [t.train, t.dev, t.tests["test"]]
    assert [*map(len, splits)] == [n_train, n_dev, n_test] and t == problems(**kw)
    for key in ("question", "answer"):  # the same numbers in the same operations neither
        sets = [{getattr(e, key) for e in s} for s in splits]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert all(len({e.question for e in s}) == len(s) for s in splits)


def test_test_stays_when_train_grows():
    a, b = problems(n_train=50, steps=[1]), problems(n_train=500, steps=[1])
    assert (
        a.tests == b.tests
        and a.dev == b.dev
        and a.train == b.train[:50]
        and a.train != problems(n_train=50, steps=[1], seed=1).train
    )


def test_any_size():
    assert len(problems(n_train=15_000, steps=[1]).train) == 15_000


def test_one_step_problems_are_short_and_varied():
    t = problems(steps=[1])
    assert max(len(e.question.split()) for e in t.train) <= 32 and {
        e.answer.split(" ")[1] for e in t.train
    } == set("+-*/")
    capitalised = {w for e in t.train for w in re.findall(r"[A-Z][a-z]+", e.question)}
    names = capitalised - {"How", "What", "There", "Then"}
    things = {m for e in t.train for m in re.findall(r"(?:many|number of) (\w+)", e.question)}
    shapes = set()
    for e in t.train:
        shape = re.sub(r"\b(" + "|".join(names) + r")\b", "P", e.question)
        shape = re.sub(r"\b(" + "|".join(things) + r")\b", "T", shape)
        shapes.add(re.sub(r"\d+", "N", shape))
    assert len(names) == 20 and len(things) >= 16
    assert len(shapes) >= 60


def test_the_data_is_the_same_everywhere():
    "Written down: another machine, another Python, the same problems."
    t = problems(steps=[1, 2, 3])
    text = json.dumps(
        [(e.id, e.question, e.answer) for s in (t.train, t.dev, t.tests["test"]) for e in s]
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4869ec12b8c1ff02"


@pytest.mark.parametrize("steps", [[], [0], [4], [1, 5]])
def test_steps_refused(steps):
    with raises("task.steps"):
        problems(steps=steps)
