"""Random input of every kind.

Each outcome is right by a plain definition written down here, or an `InputError` that names the
place. 2,000 examples and more in the usual run, five times as many with --slow; the same ones
everywhere (see conftest.py).
"""

import copy
import datetime
import json
import os
import math
import string
import tempfile
from pathlib import Path
from typing import Annotated, get_args, get_origin

import jinja2
import pytest
import yaml
from hypothesis import assume, given, is_hypothesis_test, settings
from hypothesis import strategies as st

from icl_distill.data.alignment import TooLong, align
from icl_distill.core.config import Config, PromptConfig, _Dumper, load_config
from icl_distill.core.files import InputError
from icl_distill.core.sections import choices_of, section_of, words_of
from icl_distill.data.prompts import Prompter
from icl_distill.data.templates import DATE
from icl_distill.data.contexts import Context
from icl_distill.data.examples import Example
from icl_distill.data.formats import read_examples
from icl_distill.data.tasks import Task

from helpers_data import (
    ARMS,
    LITERALS,
    PIECES,
    SHOTS,
    check_brute,
    lossless,
    n_control,
    prompter,
    tokenizer,
)


def many(n):
    return settings(max_examples=n * settings.default.max_examples // 100)


# ---- texts, through every template

pieces = st.one_of(
    st.sampled_from(LITERALS + ["####", "#### 7", "####\n"]),
    st.sampled_from(PIECES),
    st.text(max_size=6),
    st.text(st.characters(categories=["Cc", "Cf", "Co", "Zl", "Zp", "Mn"]), max_size=4),
)
wild = st.lists(pieces, max_size=6).map("".join)


@pytest.mark.parametrize("arm", ARMS)
@many(90)
@given(q=wild, a=wild, sq=wild, sa=wild, text=st.one_of(st.none(), wild))
def test_texts(arm, q, a, sq, sa, text):
    """Encoded as the definition says, or refused by name.

    Control characters, right to left, emoji, control tokens' literals, line breaks, nothing."""
    e, context = Example("wild-7", q, a), Context((Example("s", sq, sa),), text)
    try:
        al = align(prompter(arm), context, e)
    except InputError as err:
        assert "wild-7" in str(err)
        return
    check_brute(arm, al, context, e)


@pytest.mark.parametrize("arm", ARMS)
@many(5)
@given(
    st.one_of(
        st.sampled_from(["ab ", "<|im_end|>x", "🇩🇪 ", "#### 7\n", "שלום "]),
        wild.filter(lambda s: s.strip() and lossless(s)),
    ),
    st.integers(500, 3000),
    st.sampled_from([512, 10**6]),
)
def test_huge_texts(arm, piece, times, most):
    "Too long is said, with the length; nothing is cut to fit."
    e, p = (
        Example("huge-1", "Why? " + piece * times + "?", "So " + piece),
        prompter(arm, max_student_tokens=most, max_teacher_tokens=most),
    )
    try:
        al = align(p, Context(SHOTS), e)
    except TooLong as err:
        assert "huge-1" in str(err) and "tokens" in str(err)
        return
    except InputError as err:
        assert "huge-1" in str(err)
        return
    check_brute(arm, al, Context(SHOTS), e)
    assert len(al.teacher_ids) <= most


# ---- chat templates


def jinja(template, messages, is_open, tok):  # what transformers does, without its sandbox
    env = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return env.from_string(template).render(
        messages=messages,
        add_generation_prompt=is_open,
        enable_thinking=False,
        date_string=DATE,
        **tok.special_tokens_map,
    )


heads = st.sampled_from(
    [
        "",
        "{{ bos_token }}",
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}",
        "{{ date_string }}\n",
        "{{ messages|length }}\n",
        "{{ undefined_name.x }}",
        "x",
    ]
)
loops = st.sampled_from(
    [
        "{% for m in messages %}",
        "{%- for m in messages -%}",
        "{% for m in messages[1:] %}",
        "{% for m in messages|reverse %}",
        "{% for m in messages if m.role != 'system' %}",
        "{% for m in messages[-2:] %}",
    ]
)
bodies = st.lists(
    st.sampled_from(
        [
            "<|im_start|>",
            "{{ m.role }}",
            "\n",
            "\n\n",
            " ",
            "{{ m.content }}",
            "{{ m.content|trim }}",
            "{{- m.content -}}",
            "{{ m.content|upper }}",
            "{{ m.content[:3] }}",
            "<|im_end|>",
            "<|im_end|>\n",
            "{{ eos_token }}",
            "{% if m.role == 'assistant' %}<|im_end|>{% endif %}",
            "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% endif %}",
            "[{{ loop.index }}]",
            "{{ raise_exception('no') }}",
            "{{ m.nothing }}",
            "{{ 1/0 }}",
            "{% if x %}",
            "{{",
            "%}",
            "A:",
        ]
    ),
    max_size=6,
).map("".join)
usual = st.sampled_from(
    [
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>{{ m.role }}\n{{ m.content|trim }}<|im_end|>",
        "{{ m.role }}: {{ m.content }}{{ eos_token }}\n",
        "{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% else %}<|im_start|>{% endif %}",
    ]
)
opens = st.sampled_from(
    [
        "",
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "assistant: ",
        "A:",
        "<|im_start|>",
    ]
)
odd = st.builds(
    lambda h, loop, b, o: (
        f"{h}{loop}{b}{{% endfor %}}{{% if add_generation_prompt %}}{o}{{% endif %}}"
    ),
    heads,
    loops,
    st.one_of(usual, usual, bodies),
    opens,
)
turns = st.sampled_from(
    [
        ("<|im_start|>{{ m.role }}\n", "<|im_start|>assistant\n"),
        ("{{ m.role }}:\n", "assistant:\n"),
        ("[{{ m.role|upper }}]", "[ASSISTANT]"),
        ("{% if m.role == 'user' %}<|im_start|>{% endif %}", ""),
        ("{{ m.role }}: ", "assistant:"),
        ("<|im_start|>{{ m.role }}\n\n", "<|im_start|>assistant\n\n"),
    ]
)
even = st.builds(
    lambda h, t, c, e, more: (
        f"{h}{{% for m in messages %}}{t[0]}{c}{e}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{t[1]}{more}{{% endif %}}"
    ),
    st.one_of(st.just(""), heads),
    turns,  # a turn and its opening agree
    st.sampled_from(
        [
            "{{ m.content }}",
            "{{ m.content|trim }}",
            "{{ m['content'] }}",
            "{{- m.content -}}",
            "{{ '%s' % m.content }}",
        ]
    ),
    st.sampled_from(
        ["<|im_end|>", "<|im_end|>\n", "{{ eos_token }}\n\n", "<|endoftext|>", "\n<|im_end|>", ""]
    ),
    st.sampled_from(["", "", "", "A"]),
)
templates = st.one_of(even, even, even, odd)


@many(400)
@given(
    templates,
    st.sampled_from(["Why?", " What\nis it? "]),
    st.sampled_from(["Because.", "1 + 1 = 2\n#### 2", " so "]),
    st.sampled_from([Context(), Context(SHOTS), Context(SHOTS[:1], "Be brief.")]),
)
def test_chat_templates(template, question, answer, context):
    """A template is refused, or prompt and answer are what Jinja makes of it.

    The answer then ends in one control token, its only one."""
    tok = copy.copy(tokenizer("chatml"))
    tok.chat_template = template
    try:
        p = Prompter(tok, PromptConfig())
        al = align(p, context, Example("e-1", question, answer))
    except InputError as err:
        assert "template" in str(err) or "e-1" in str(err)
        return
    for ids, c in ((al.student_ids, Context()), (al.teacher_ids, context)):
        messages = p.renderer.messages(c, question, answer)
        prompt, whole = (
            jinja(template, messages[:-1], True, tok),
            jinja(template, messages, False, tok),
        )
        common = os.path.commonprefix([prompt, whole])
        if "</think>" in prompt[len(common) :]:  # an empty thought, which answers lack
            whole = prompt + whole[whole.index(answer.strip(), len(common)) :]
        if whole.startswith(prompt):  # a fixed piece before the answer belongs to the prompt
            rest = whole[len(prompt) :]
            between = rest.partition(answer if answer in rest else answer.strip())[0]
            prompt += between if between.strip() else ""
        if not any(x in whole[len(prompt) :] for x in p.control):  # ended by the next turn
            whole = jinja(template, [*messages, {"role": "user", "content": "x"}], True, tok)
        text = tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert (
            tok.decode(
                ids[: -al.n_answer], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            == prompt
            and whole.startswith(text)
            and text.startswith(prompt)
        )
        assert text[len(prompt) :].lstrip().startswith(answer.strip()) and n_control(
            "chatml", al.answer_ids
        ) == 1 == n_control("chatml", al.answer_ids[-1:])
        at = 0
        for m in messages:
            at = text.index(m["content"].strip(), at) + len(
                m["content"].strip()
            )  # every turn, in its place
    assert al.student_ids[-al.n_answer :] == al.teacher_ids[-al.n_answer :]


# ---- JSONL

texts = st.text(min_size=1, max_size=12).filter(str.strip)
numbers = st.sampled_from(
    ["7", "-3", "1.50", "1e22", "0", "12345678901234567890.5", "-0.0", "9" * 5000]
)


def line(q, a, extra, ascii, flip, pad):
    "A row, with what it says; a number stands as it is written."
    pairs = [
        f'"question":{pad}{q if isinstance(q, Raw) else json.dumps(q, ensure_ascii=ascii)}',
        f'"answer": {a if isinstance(a, Raw) else json.dumps(a, ensure_ascii=ascii)}',
    ] + [f'"more{i}": {x}' for i, x in enumerate(extra)]
    return pad + "{" + f",{pad}".join(pairs[::-1] if flip else pairs) + "}" + pad, (str(q), str(a))


class Raw(str):
    pass


values = st.one_of(texts, texts, numbers.map(Raw))
good = st.builds(
    line,
    values,
    values,
    st.lists(st.sampled_from(["null", "[1, {}]", '"x"', "true", "1e5"]), max_size=2),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", " ", "\t"]),
)


def no_json(s):
    try:
        json.loads(s)
        return False
    except ValueError:
        return bool(s.strip())


bad = st.one_of(
    st.sampled_from(
        [
            "{",
            "[1]",
            '"x"',
            "null",
            "7",
            "true",
            "NaN",
            '{"question": "a"}',
            '{"answer": "a"}',
            "{}",
            '{"question": "a", "answer": null}',
            '{"question": "a", "answer": true}',
            '{"question": "a", "answer": ["b"]}',
            '{"question": "a", "answer": NaN}',
            '{"question": "a", "answer": Infinity}',
            '{"question": "a", "more": -Infinity, "answer": "b"}',
            '{"question": "a", "question": "a", "answer": "b"}',
            '{"question": "a", "answer": "b", "x": {"y": 1, "y": 2}}',
            '{"question": "", "answer": "b"}',
            '{"question": "a", "answer": " \\t\\u2028"}',
            '{"question": "\\ud800", "answer": "b"}',
            '{"question": "a", "answer": "b"}}',
            '{"Question": "a", "answer": "b"}',
            "[" * 3000,
            '{"question": "a\x01", "answer": "b"}',
            "\ufeff{}",
        ]
    ),
    st.text(max_size=20).filter(lambda s: not set("\n\r\ufeff") & set(s)).filter(no_json),
).map(lambda s: (s, None))
blank = st.sampled_from(["", " ", "\t ", "\u2028", "\x0c"]).map(lambda s: (s, ""))


@many(650)
@given(
    st.one_of(
        st.lists(st.one_of(good, good, blank), max_size=6),
        st.lists(st.one_of(good, good, good, good, bad, blank), max_size=6),
    ),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
    st.sampled_from([None] * 7 + [0, 3, 40]),
)
def test_jsonl(rows, bom, end, last, broken):
    """The rows as they are written, in their order; or the first line that is none is named.

    Or the file, where it is not UTF-8 or empty."""
    data = bom + end.join(t.encode("utf-8", "surrogatepass") for t, _ in rows) + end * last
    if broken is not None:
        data = data[:broken] + b"\xff" + data[broken:]
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp, "mine.jsonl")
        path.write_bytes(data)
        wrong = next((i for i, (_, x) in enumerate(rows, 1) if x is None), None)
        try:
            got = read_examples(path, "train")
        except InputError as e:
            if broken is not None:
                assert str(e).startswith(f"{path}: not UTF-8")
            elif wrong:
                assert str(e).startswith(f"{path}, line {wrong}: ")
            else:
                assert not any(x for _, x in rows) and str(e).startswith(f"{path}: no examples")
            return
        assert broken is None and wrong is None
        assert [(e.question, e.answer) for e in got] == [x for _, x in rows if x] and [
            e.id for e in got
        ] == [f"train-{i}" for i in range(len(got))]


# ---- scoring


@many(150)
@given(
    wild,
    st.sampled_from(["number", "exact", "regex"]),
    st.sampled_from([r"#+ (\S+)", r"\d+", r"(a)|b", r"(?s).*", r"^$"]),
    wild,
)
def test_scoring(text, extract, regex, answer):
    """Never right without something found that equals what stands in the gold answer.

    The gold answer is right as an answer to itself, or is refused by name."""
    task, e = Task("t", [], [], {}, extract, regex), Example("gold-1", "?", answer)
    try:
        s, own = task.score(text, e), task.score(answer, e)
    except InputError as err:
        assert "gold-1" in str(err)
        return
    assert not s.correct or s.strict is not None
    assert own.correct_flexible or own.correct
    if text == answer:
        assert s == own
    if extract == "exact":
        assert s.correct == (text.strip() == answer.strip())


# ---- configs


def leaves_of(section, prefix=""):
    "Every key with its type; a section may hold another."
    for name in section.model_fields:
        kind = section.__annotations__[name]
        if inner := section_of(kind):
            yield from leaves_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


leaves = list(leaves_of(Config))
BETWEEN_0_AND_1 = (
    "a number strictly between 0 and 1 (for its two ends choose forward_kl or reverse_kl)"
)
SAID = {  # what the words of a type promise
    "a text": lambda x: True,
    "true or false": lambda x: True,
    "names, each with a text": lambda x: True,
    "names, each with names and their texts": lambda x: not x,  # a name is one of a file
    "a list of texts, at least one": bool,
    "a text that is not empty": lambda x: bool(x.strip()),
    "a text with {question} in it": lambda x: "{question}" in x,
    "a whole number greater than 0": lambda x: x > 0,
    "a whole number, 0 or more": lambda x: x >= 0,
    "a list of whole numbers": lambda x: True,
    "a list of whole numbers, each 0 or more": lambda x: min(x, default=0) >= 0,
    "a whole number from 0 to 2**32-1": lambda x: 0 <= x < 2**32,
    "a finite number greater than 0": lambda x: x > 0,
    "a finite number, 0 or more": lambda x: x >= 0,
    "a number, at least 0 and less than 1": lambda x: 0 <= x < 1,
    "a number greater than 0, and 1 at most": lambda x: 0 < x <= 1,
    "a number from 0 to 1": lambda x: 0 <= x <= 1,
    BETWEEN_0_AND_1: lambda x: 0 < x < 1,
    "a list of some of 1, 2, 3": lambda x: bool(x) and set(x) <= {1, 2, 3},
    "a list of some of zero_shot, few_shot, N_shot (such as 4_shot), teacher": lambda x: all(
        c in ("zero_shot", "few_shot", "teacher") or c.endswith("_shot") and c[:-5].isdigit()
        for c in x
    ),
    "i/n with 1 <= i <= n, such as 1/4": lambda x: (
        x.count("/") == 1
        and all(p.isdigit() for p in x.split("/"))
        and 1 <= int(x.split("/")[0]) <= int(x.split("/")[1])
    ),
}


def plain(kind):
    "A type without range and words: its origin (list, dict or None), and the type of its values."
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if choices_of(kind):
        return None, str
    if get_origin(kind) in (list, dict):
        return get_origin(kind), plain(get_args(kind)[-1])[1]
    return None, kind


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.floats(0, 2),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    st.sampled_from(["no", "off", "1e-4", "${oc.env:HOME}", "???", "mse", "cosine", "{question}"]),
    st.sampled_from([datetime.date(2024, 1, 1), 10**400, "\x00"]),
)
anything = st.one_of(
    scalars,
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(
        st.one_of(st.text(st.characters(categories=["L", "N"]), max_size=4), st.integers()),
        scalars,
        max_size=2,
    ),
)


def fits(value, kind) -> bool:
    "Is the value of the key's type, and allowed? Only a whole number may stand for another type."
    if type(None) in get_args(kind):
        return value is None or fits(value, get_args(kind)[0])
    origin, of = plain(kind)

    def one(v):
        return type(v) is of or of is float and type(v) is int

    if origin is list:
        ok = type(value) is list and all(map(one, value))
    elif origin is dict:
        ok = type(value) is dict and all(type(k) is str and one(v) for k, v in value.items())
    else:
        ok = one(value)
    numbers = [v for v in (value if type(value) is list else [value]) if type(v) in (int, float)]
    if (
        not ok
        or not all(math.isfinite(v) if isinstance(v, float) else abs(v) < 10**300 for v in numbers)
        or any(abs(v) >= 1e300 for v in numbers)
    ):
        return False
    return value in choices_of(kind) if choices_of(kind) else SAID[words_of(kind)](value)


def likely(kind):
    "Values of the key's own type."
    origin, of = plain(get_args(kind)[0] if type(None) in get_args(kind) else kind)
    one = {
        str: st.one_of(
            st.sampled_from(choices_of(kind) or ("x",)),
            st.text(string.ascii_letters + " ${}#:'\"?é", max_size=8),
        ),
        int: st.integers(0, 5),
        float: st.floats(0.01, 5),
        bool: st.booleans(),
    }[of]
    return {
        list: st.lists(one, min_size=1, max_size=2),
        dict: st.dictionaries(st.text(string.ascii_letters, min_size=1), one, max_size=2),
    }.get(origin, one)


OF_A_MODEL = ("teacher.revision", "teacher.dtype", "teacher.device")
OF_ANSWERS = ("answers.source", "answers.n", "answers.also", "answers.teacher_share")
NEED_ANOTHER = (*OF_ANSWERS, "loss.policy", *OF_A_MODEL)  # a key without which they mean nothing


@many(400)
@given(st.sampled_from(leaves), st.data())
def test_config_values(leaf, data):
    "A value that fits its key arrives unchanged; any other is refused, the file and the key named."
    key, kind = leaf
    value = data.draw(st.one_of(likely(kind), anything))
    assume(
        not (value is False and {"no", "off"} & set(choices_of(kind)))
    )  # YAML's own word for these
    nested = value
    for k in reversed(key.split(".")):
        nested = {k: nested}
    try:
        text = yaml.dump(nested, Dumper=_Dumper, allow_unicode=True)
    except ValueError:
        return
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "c.yaml").write_text(text, encoding="utf-8", newline="")
        try:
            cfg = load_config(str(Path(tmp, "c.yaml")))
        except InputError as e:
            assert (
                ("c.yaml" in str(e) and repr(key) in str(e) or "c.yaml: not valid YAML" in str(e))
                and not fits(value, kind)
                or key.split(".")[-1] in str(e)
                and value in ("regex", "text")
                or key == "loss.temperature"
                and "has no effect" in str(e)
                and value != 1
                or key in NEED_ANOTHER
                and key in str(e)
            ), (str(e), text)
            return
    for k in key.split("."):
        cfg = getattr(cfg, k)
    assert (
        fits(value, kind)
        and cfg == (float(value) if type(cfg) is float else value)
        and type(cfg) in (type(value), float)
    )


@many(250)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(
                [
                    "seed",
                    "train",
                    "lr",
                    "loss",
                    "kind",
                    "extends",
                    ":",
                    ": ",
                    "\n",
                    "\n  ",
                    "{",
                    "}",
                    "[",
                    "]",
                    "- ",
                    "!!python/object:os.system",
                    "!x",
                    "&a",
                    "*a",
                    "<<",
                    "'",
                    '"',
                    "#",
                    "1",
                    "1e-4",
                    "null",
                    "\t",
                    "|",
                    ">",
                    "%",
                    "@",
                    "?",
                    "---\n",
                ]
            ),
            max_size=12,
        ).map("".join),
    ),
    st.booleans(),
)
def test_yaml(text, as_override):
    "Any text as a file, or as an override, is a config or an `InputError`."
    try:
        if as_override:
            load_config(None, [text], "train")
            return
        with tempfile.TemporaryDirectory() as tmp:
            Path(tmp, "c.yaml").write_text(
                text, encoding="utf-8", errors="surrogatepass", newline=""
            )
            load_config(str(Path(tmp, "c.yaml")))
    except InputError as e:
        assert "c.yaml" in str(e) or "config" in str(e) or as_override


# ---- how many


def test_how_many():
    "Counted, not believed: the examples of this file."
    n = 0
    for f in [f for f in globals().values() if callable(f) and is_hypothesis_test(f)]:
        cases = math.prod(
            len(m.args[1]) for m in getattr(f, "pytestmark", []) if m.name == "parametrize"
        )
        n += cases * f._hypothesis_internal_use_settings.max_examples
    print(f"{n} examples")
    assert n >= 2000 * settings.default.max_examples // 100 and settings.default.max_examples in (
        100,
        500,
    )
