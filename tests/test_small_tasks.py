"Generated small tasks: right answers, words apart, the same on every machine."

import datetime
import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_distill.core.config import TaskConfig
from icl_distill.data.examples import Question
from icl_distill.data.small_tasks import small_task_splits
from icl_distill.data.tasks import load_task
from icl_distill.testing import raises

NAMES = ("extraction", "dates", "past_tense", "names", "units")
by_task = pytest.mark.parametrize("name", NAMES)
few = st.integers(1, 12)


def splits_of(name, **keys):
    return small_task_splits(TaskConfig(name=name, **keys))


def learnt(splits):
    return splits["train"] + splits["questions"]


# --- sizes, order, seeds


@by_task
def test_the_sizes_of_a_study(name):
    splits = splits_of(name, n_questions=256)
    assert {k: len(v) for k, v in splits.items()} == {
        "train": 8,
        "questions": 256,
        "dev": 40,
        "test": 240,
    }
    questions = [e.question for examples in splits.values() for e in examples]
    assert len(set(questions)) == len(questions)
    for split, examples in splits.items():
        prefix = "question" if split == "questions" else split
        assert [e.id for e in examples] == [f"{prefix}-{i}" for i in range(len(examples))]


@by_task
def test_no_questions_by_default(name):
    splits = splits_of(name)
    assert splits["questions"] == [] and [len(e) for e in splits.values()] == [8, 0, 40, 240]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 99), few, few, few, few)
def test_a_size_changes_nothing_else(name, seed, n_train, n_questions, n_dev, n_test):
    sizes = {"n_train": n_train, "n_questions": n_questions, "n_dev": n_dev, "n_test": n_test}
    splits = splits_of(name, seed=seed, **sizes)
    assert [len(e) for e in splits.values()] == list(sizes.values())
    larger = splits_of(name, seed=seed, n_train=12, n_questions=12, n_dev=12, n_test=12)
    asked = [(e.question, e.answer) for e in learnt(splits)]
    assert asked == [(e.question, e.answer) for e in learnt(larger)][: len(asked)]
    assert splits["dev"] == larger["dev"][:n_dev] and splits["test"] == larger["test"][:n_test]
    assert splits == splits_of(name, seed=seed, **sizes)


@by_task
def test_another_seed_is_another_draw(name):
    one, two = splits_of(name, seed=0), splits_of(name, seed=1)
    assert {e.question for e in one["test"]} != {e.question for e in two["test"]}
    assert {e.question for e in one["train"]} != {e.question for e in two["train"]}


@pytest.mark.parametrize("name", ["past_tense", "names", "units"])  # of the others are millions
@pytest.mark.parametrize("key", ["n_train", "n_questions", "n_dev", "n_test"])
def test_they_run_out(name, key):
    with raises(name, "fewer than 200", key, "ask for"):
        splits_of(name, **{key: 20_000})


# --- words apart


def words(name, examples):
    "The drawn words of a task's examples."
    if name == "past_tense":
        return {verb(e) for e in examples}
    if name == "dates":
        return {e.answer[:4] for e in examples}
    if name == "units":
        return {amount(e) for e in examples}
    parts = {part for e in examples for part in re.split("; |, ", e.answer)}
    if name == "names":
        return {part for part in parts if not part.endswith(".")} | {
            first_name(e) for e in examples
        }
    return {word for part in parts for word in part.split()}


def verb(example):
    "The past form: what of the answer is not in the question."
    question, answer = (re.sub(r"\.", "", t).split() for t in (example.question, example.answer))
    (new,) = (b for a, b in zip(question, answer, strict=True) if a != b)
    return new


def amount(example):
    "The number before the larger unit."
    question, answer = example.question.split(" in ")[0].split(), example.answer.split()
    return answer[0] if float(answer[0]) < float(question[0]) else question[0]


def first_name(example):
    last = example.answer.split(",")[0].lower()
    plain = re.sub(r"^(dr|prof)\. |, phd$|,", "", example.question.lower())
    (first,) = (word for word in plain.split() if word != last)
    return first


@by_task
@pytest.mark.parametrize("seed", range(5))
def test_test_has_its_own_words(name, seed):
    splits = splits_of(name, seed=seed, n_questions=256)
    own = words(name, splits["test"])
    assert len(own) >= 12 and not own & words(name, learnt(splits) + splits["dev"])
    assert words(name, splits["dev"]) & words(name, learnt(splits))


def test_the_shots_show_every_form():
    shots = splits_of("extraction")["train"]
    assert len({bare(e) for e in shots}) == 8
    forms = {bare(e) for e in splits_of("extraction")["test"]}
    assert len(forms - {bare(e) for e in shots}) == 4 and len(forms) == 12


def bare(example):
    "A sentence of the extraction task with its words taken out."
    text = example.question
    for part in example.answer.split("; "):
        text = text.replace(part, "_")
    return text


# --- right answers, worked out apart from the generator


def test_extraction_is_in_the_sentence():
    for e in splits_of("extraction", n_questions=256)["questions"]:
        name, job, city = e.answer.split("; ")
        assert all(part in e.question for part in (name, job, city)) and bare(e).count("_") == 3
        assert len(name.split()) == 2 and job.islower() and city.istitle()


def test_dates_are_days():
    months = {f"{datetime.date(2000, m, 1):%b}": m for m in range(1, 13)}
    for e in splits_of("dates", n_questions=500)["questions"]:
        date = datetime.date.fromisoformat(e.answer)
        numbers = sorted(map(int, re.findall(r"\d+", e.question)))
        assert numbers == [date.day, date.year] and re.search(r"[A-Z][a-z]{2}", e.question)
        named = [m for short, m in months.items() if re.search(rf"\b{short}", e.question)]
        assert date.month in named
        days = re.findall(r"\w+day\b", e.question)
        assert days in ([], [f"{date:%A}"])
        for end in re.findall(r"\d(st|nd|rd|th)", e.question):
            third = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
            assert end == third.get(date.day, "th")


def test_past_tense_changes_one_word():
    seen = set()
    for e in splits_of("past_tense", n_questions=256)["questions"]:
        seen.add(verb(e))
    assert {"ed"} < {form[-2:] for form in seen} and len(seen) > 40


def test_names_are_in_one_form():
    for e in splits_of("names", n_questions=256)["questions"]:
        last, first = re.fullmatch(r"([A-Z][a-z]+), ([A-Z])\.", e.answer).groups()
        assert last.lower() in e.question.lower() and first_name(e)[0] == first.lower()


def test_units_are_equal():
    size = {"km": 1_000_000, "m": 1000, "cm": 10, "mm": 1, "t": 1_000_000, "kg": 1000, "g": 1}
    size |= {"l": 1000, "ml": 1, "h": 3600, "min": 60, "s": 1}
    pairs = set()
    for e in splits_of("units", n_questions=500)["questions"]:
        number, unit, to = re.fullmatch(r"([0-9.]+) (\w+) in (\w+)", e.question).groups()
        result, same = re.fullmatch(r"([0-9.]+) (\w+)", e.answer).groups()
        assert same == to and not result.endswith(".0")
        assert float(number) * size[unit] == pytest.approx(float(result) * size[to])
        pairs.add((unit, to))
    assert len(pairs) == 16


# --- the same on every machine


def test_the_same_on_every_machine():
    made = [
        f"{e.id} {e.question} {e.answer}"
        for name in NAMES
        for examples in splits_of(name, seed=3, n_questions=20).values()
        for e in examples
    ]
    text = "\n".join(made)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5c8f3a252b95babc"


# --- as tasks


@by_task
def test_as_a_task(name):
    task = load_task(TaskConfig(name=name, n_questions=30, n_dev=4, n_test=5))
    splits = splits_of(name, n_questions=30, n_dev=4, n_test=5)
    assert (task.name, task.extract, task.train) == (name, "exact", splits["train"])
    assert task.dev == splits["dev"] and task.tests == {"test": splits["test"]}
    assert task.questions == [Question(e.id, e.question) for e in splits["questions"]]
    right, wrong = task.tests["test"][:2]
    assert task.score(f" {right.answer}\n", right).correct
    assert not task.score(wrong.answer, right).correct
    assert load_task(TaskConfig(name=name)).questions == []


def test_word_problems_without_answers():
    keys = {"name": "word_problems", "n_dev": 3, "n_test": 4, "steps": [1]}
    task = load_task(TaskConfig(**keys, n_questions=30))
    all_answered = load_task(TaskConfig(**keys, n_train=38))
    assert task.train == all_answered.train[:8] and task.extract == "number"
    asked = [e.question for e in all_answered.train[8:]]
    assert task.questions == [Question(f"question-{i}", q) for i, q in enumerate(asked)]
    assert (task.dev, task.tests) == (all_answered.dev, all_answered.tests)
    assert len(load_task(TaskConfig(**keys, n_train=5, n_questions=3)).train) == 5
