"""Prompts and alignment, on the real tokenizer with several templates.

Exact strings, causal alignment, identical suffixes, no leak."""

import copy
import re

import pytest
import torch
from helpers_data import (
    ARMS,
    CONTEXTS,
    LITERALS,
    QWEN3,
    SHOTS,
    check_brute,
    prompter,
    read,
    tokenizer,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_distill.core.config import ContextConfig, PromptConfig, TaskConfig
from icl_distill.core.files import InputError
from icl_distill.data.alignment import TooLong, align, align_rows, pack
from icl_distill.data.contexts import WRONG_SHOTS, Context, Contexts
from icl_distill.data.examples import Example
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task
from icl_distill.data.templates import DATE

# ---- the rendered strings, in full

EXACT = {  # what stands before the shots, the question, the answer, a shot
    "chatml": (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
        "<|im_start|>user\nQuestion: Why?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
        "<|im_start|>user\nQuestion: What is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n1 + 1 = 2\n#### 2<|im_end|>\n",
    ),
    "qwen3": (
        "",
        "<|im_start|>user\nQuestion: Why?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Because.<|im_end|>",
        "<|im_start|>user\nQuestion: What is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n1 + 1 = 2\n#### 2<|im_end|>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nQuestion: Why?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Because.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nQuestion: What is 1 + 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n1 + 1 = 2\n#### 2<|eot_id|>",
    ),
    "plain": (
        "",
        "Question: Why?\nAnswer:",
        " Because.<|im_end|>",
        "Question: What is 1 + 1?\nAnswer: 1 + 1 = 2\n#### 2<|im_end|>\n",
    ),
}
EXACT["plain_bos"] = EXACT["plain"]


@pytest.mark.parametrize("arm", ARMS)
def test_rendered_strings(arm):
    "Law 3: what student and teacher read, character by character."
    p, (system, question, answer, shot) = prompter(arm), EXACT[arm]
    assert DATE == "26 Jul 2024"
    assert p.render(Context(), "Why?") == system + question
    assert p.render(Context(SHOTS[:1]), "Why?") == system + shot + question
    al = align(p, Context(SHOTS[:1]), Example("e", "Why?", "Because."))
    assert (
        read(arm, al.student_ids) == system + question + answer
        and read(arm, al.teacher_ids) == system + shot + question + answer
    )
    assert (
        p.tok.decode(al.answer_ids) == answer
        and p.decode(al.answer_ids) == answer[: answer.index("<|")]
    )
    assert p.stop_ids[0] == al.answer_ids[-1] and p.tok.eos_token_id in p.stop_ids
    for c in CONTEXTS:  # and the definition used below agrees
        assert p.render(c, "Why?") == written(arm, c, "Why?")


@pytest.mark.parametrize("arm", ARMS)
def test_bos_once(arm):
    "One BOS where the tokenizer or template writes one, never two, none in the answer."
    al = align(prompter(arm), Context(SHOTS), Example("e", "Why?", "Because."))
    bos = tokenizer(arm).bos_token_id
    if arm == "llama3":
        assert (
            al.student_ids[0] == bos and al.student_ids.count(bos) == al.teacher_ids.count(bos) == 1
        )
    if arm == "plain_bos":
        assert al.student_ids[0] == al.teacher_ids[0] == bos and al.student_ids.count(bos) == 1
    if arm == "plain":
        assert bos not in al.student_ids


def test_thinking_switch():
    "`enable_thinking` reaches the template; thoughts are in the prompt, and never supervised."
    assert prompter("qwen3").render(Context(), "Why?").endswith("<think>\n\n</think>\n\n")
    with pytest.raises(InputError, match="enable_thinking"):
        thinking = Prompter(tokenizer("qwen3"), PromptConfig(enable_thinking=True))
        thinking.answer_ids(Context(), "Why?", "Because.")
    al = align(prompter("qwen3"), Context(SHOTS), Example("e", "Why?", "Because."))
    think = tokenizer("qwen3").convert_tokens_to_ids(["<think>", "</think>"])
    assert (
        not set(think) & set(al.answer_ids)
        and al.student_ids.count(think[1]) == al.teacher_ids.count(think[1]) == 1
    )


# ---- laws 1 and 2 on texts of all kinds

tame = st.text(st.sampled_from("abcXYZ 0123456789.,+-=$?"), min_size=1, max_size=30).map(
    lambda s: "x" + s + "y"
)


@pytest.mark.parametrize("arm", ARMS)
@given(q=tame, a=tame)
@settings(max_examples=15)
def test_tame_texts_are_accepted(arm, q, a):
    e = Example("tame", q, a)
    for c in CONTEXTS:
        check_brute(arm, align(prompter(arm), c, e), c, e)


@pytest.mark.parametrize("literal", LITERALS[:8])
@pytest.mark.parametrize("arm", ARMS)
def test_control_literals_are_text(arm, literal):
    "A text that spells a control token is accepted, and adds none."
    e, c = (
        Example("lit", f"What does {literal} mean?", f"It is {literal}, no more"),
        Context((Example("s", f"a{literal}b", f"c{literal}d"),), f"Mind {literal}!"),
    )
    check_brute(arm, align(prompter(arm), c, e), c, e)


# ---- law 1: positions


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arm", ARMS)
@given(answers=st.lists(tame, min_size=1, max_size=4), context=st.sampled_from(CONTEXTS))
@settings(max_examples=10)
def test_positions(arm, side, answers, context):
    """Each answer token is predicted one position before it.

    The first is distilled, the position of the last is not."""
    p, tok = prompter(arm), tokenizer(arm)
    als = [align(p, context, Example(f"e{i}", f"What is {i}?", a)) for i, a in enumerate(answers)]
    n_prompt = [
        len(tok(written(arm, context, f"What is {i}?"), add_special_tokens=False).input_ids)
        + (arm == "plain_bos")
        for i in range(len(als))
    ]
    b = pack([al.teacher_ids for al in als], [al.n_answer for al in als], tok.pad_token_id, side)
    width, want = b.input_ids.shape[1], []
    for r, (al, n) in enumerate(zip(als, n_prompt, strict=True)):
        first = width - len(al.teacher_ids) if side == "left" else 0
        assert b.input_ids[r, first : first + len(al.teacher_ids)].tolist() == al.teacher_ids
        assert b.attention_mask[r].tolist() == [
            int(first <= i < first + len(al.teacher_ids)) for i in range(width)
        ]
        assert b.position_ids[r, first : first + len(al.teacher_ids)].tolist() == list(
            range(len(al.teacher_ids))
        )
        want += [(r, first + i - 1, al.teacher_ids[i]) for i in range(n, len(al.teacher_ids))]
        assert (
            (b.rows == r).sum() == len(al.teacher_ids) - n
            and b.cols[b.rows == r].min() == first + n - 1
            and b.cols[b.rows == r].max() == first + len(al.teacher_ids) - 2
        )
    assert list(zip(b.rows.tolist(), b.cols.tolist(), b.labels.tolist(), strict=True)) == want
    assert torch.equal(b.input_ids[b.rows, b.cols + 1], b.labels)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_padding_sides_agree(lengths, seed):
    """Left and right padding: the same tokens, positions and labels, elsewhere in the rows.

    The pad id may occur in a sequence."""
    g = torch.Generator().manual_seed(seed)
    seqs, ns = (
        [torch.randint(0, 3, (n + m,), generator=g).tolist() for n, m in lengths],
        [n for n, _ in lengths],
    )
    left, right = (pack(seqs, ns, 0, side) for side in ("left", "right"))
    shift = torch.tensor([max(map(len, seqs)) - len(s) for s in seqs])
    assert (
        torch.equal(left.rows, right.rows)
        and torch.equal(left.labels, right.labels)
        and torch.equal(left.cols, right.cols + shift[right.rows])
    )
    for x in (left, right):
        assert [x.position_ids[i][x.attention_mask[i] == 1].tolist() for i in range(len(seqs))] == [
            list(range(len(s))) for s in seqs
        ]


@pytest.mark.parametrize("n", [0, 3, 4])
def test_pack_refuses(n):
    with pytest.raises(InputError):
        pack([[5, 6, 7]], [n], 0)


def test_align_rows():
    "The table for people says the same."
    tok, al = (
        tokenizer("chatml"),
        align(prompter("chatml"), Context(SHOTS), Example("e", "Why?", "Because.")),
    )
    rows = align_rows(tok, al)
    for s, t, s_read, t_read, predicts in rows:
        assert tok.convert_ids_to_tokens([al.student_ids[s], al.teacher_ids[t]]) == [s_read, t_read]
        inside = s >= len(al.student_ids) - al.n_answer - 1 and s < len(al.student_ids) - 1
        assert predicts == (tok.convert_ids_to_tokens(al.student_ids[s + 1]) if inside else None)
    assert rows[-1][-1] is None and sum(r[-1] is not None for r in rows) == al.n_answer


# ---- what does not fit, or has no clean suffix


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("arm", ["chatml", "plain_bos"])
def test_too_long(arm, who):
    "At the limit it fits; one less is refused by name, nothing is cut."
    e, c = Example("train-77", "Why?", "Because."), Context(SHOTS)
    n = len(getattr(align(prompter(arm), c, e), f"{who}_ids"))

    def make(most):
        template = prompter(arm).cfg.template
        cfg = PromptConfig(template=template, **{f"max_{who}_tokens": most})
        return Prompter(tokenizer(arm), cfg)

    assert len(getattr(align(make(n), c, e), f"{who}_ids")) == n
    with pytest.raises(TooLong, match=f"'train-77'.*{who}.*{n} tokens"):
        align(make(n - 1), c, e)


def test_template_that_depends_on_the_context():
    "Student and teacher whose answers differ are refused, both shown."
    tok = copy.deepcopy(tokenizer("chatml"))
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ '<|endoftext|>' if messages|length > 3 else '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"(?s)'e9'.*im_end.*endoftext"):
        align(Prompter(tok, PromptConfig()), Context(SHOTS), Example("e9", "Why?", "So"))


def test_tokens_across_the_border():
    """A prompt whose last token changes when the answer follows (here: two line breaks) is refused.

    The message shows both ways of splitting."""
    tok = copy.deepcopy(tokenizer("chatml"))
    tok.add_tokens(["<think>", "</think>"])
    tok.chat_template = QWEN3
    with pytest.raises(InputError, match="'e9'.*not a prefix.*'ĊĊ'.*against.*'Ċ', 'Ċ'"):
        align(Prompter(tok, PromptConfig()), Context(SHOTS), Example("e9", "Why?", "So"))


def test_template_that_drops_a_turn():
    tok = copy.deepcopy(tokenizer("chatml"))
    tok.chat_template = (
        "{% for m in (messages if messages|length < 3 else messages[2:]) %}{{ m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% else %}<|im_start|>{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="'e9'.*did not render"):
        align(Prompter(tok, PromptConfig()), Context(SHOTS), Example("e9", "Why?", "So"))


# ---- law 4: no leak

KINDS = ("per_example", "fixed", "pool", "shuffled_answers", "wrong_task", "noise", "none", "text")


@pytest.mark.parametrize("kind", KINDS)
@given(
    questions=st.lists(st.integers(0, 40), min_size=6, max_size=30),
    n=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_no_leak(kind, questions, n, seed):
    """No example, and no duplicate of its question, stands in its context.

    It is given another context, or refused."""
    train = [Example(f"train-{i}", f"q{q}", f"a{i}") for i, q in enumerate(questions)]
    contexts = Contexts(
        ContextConfig(
            kind=kind, n_shots=n, seed=seed, pool_size=4, text="Think." if kind == "text" else None
        ),
        train,
    )
    for e in train:
        try:
            c = contexts(e)
        except InputError as err:
            assert e.id in str(err)
            if kind == "per_example":
                assert sum(x.question != e.question for x in train) < n
            else:
                assert all(
                    any(s.id == e.id or s.question == e.question for s in x.shots)
                    for x in contexts.shared
                )
            continue
        assert c == contexts(e)  # a second time too
        assert all(s.id != e.id and s.question != e.question for s in c.shots)
        assert len(c.shots) == (0 if kind in ("none", "text") else n) and len(
            {s.id for s in c.shots}
        ) == len(c.shots)
        if kind in ("fixed", "shuffled_answers"):
            assert e.id not in contexts.reserved
        if kind == "wrong_task":
            assert set(c.shots) <= set(WRONG_SHOTS)
    if kind in ("fixed", "shuffled_answers"):
        assert (
            contexts.reserved
            == {e.id for e in train if e.question in {s.question for s in contexts.shared[0].shots}}
            and len(contexts.reserved) >= n
        )
    else:
        assert not contexts.reserved


@pytest.mark.parametrize("kind", KINDS)
def test_test_items_get_train_contexts(kind):
    "An example from elsewhere: its context is made of training examples that ask something else."
    train = [Example(f"train-{i}", f"q{i}", f"a{i}") for i in range(12)]
    contexts = Contexts(
        ContextConfig(kind=kind, n_shots=3, pool_size=8, text="T" if kind == "text" else None),
        train,
    )
    c = contexts(Example("test-0", "other", "x"))
    if kind != "noise":
        assert {s.id for s in c.shots} <= {e.id for e in train} | {e.id for e in WRONG_SHOTS}
    if kind == "per_example":
        assert all(
            s.question != "q5"
            for i in range(30)
            for s in contexts(Example(f"test-{i}", "q5", "x")).shots
        )


def test_shuffled_answers():
    "The shots of `fixed` with every answer moved."
    train = [Example(f"train-{i}", f"q{i}", f"a{i}") for i in range(12)]
    (a,), (b,) = (
        Contexts(ContextConfig(kind=k, n_shots=4), train).shared
        for k in ("fixed", "shuffled_answers")
    )
    assert [s.question for s in a.shots] == [s.question for s in b.shots] and sorted(
        s.answer for s in a.shots
    ) == sorted(s.answer for s in b.shots)
    assert all(x.answer != y.answer for x, y in zip(a.shots, b.shots, strict=True))


@pytest.mark.parametrize("task", ["dates", "units"])
def test_noise_has_the_length_of_the_shots_and_nothing_else(task):
    "No word of the task is left; as many words, digits and, nearly, tokens."
    train = load_task(TaskConfig(name=task, n_train=40)).train
    (real,), (noise,) = (
        Contexts(ContextConfig(kind=kind, n_shots=8), train).shared for kind in ("fixed", "noise")
    )
    assert noise == Contexts(ContextConfig(kind="noise", n_shots=8), train).shared[0]
    tok, words, forms, n = tokenizer("chatml"), [], [], []
    for context in (real, noise):
        text = "\n".join(f"{shot.question}\n{shot.answer}" for shot in context.shots)
        words.append(set(re.findall(r"[^\W\d_]+", text)))
        forms.append(re.sub(r"[^\W\d_]+", "w", re.sub(r"\d", "0", text)))
        n.append(len(tok(text).input_ids))
    assert not words[0] & words[1] and forms[0] == forms[1]
    assert 0.8 < n[1] / n[0] < 1.2


@pytest.mark.parametrize("kind", ["per_example", "fixed", "pool", "shuffled_answers"])
def test_too_few_examples(kind):
    train = [Example(f"train-{i}", f"q{i}", "a") for i in range(4)]
    Contexts(ContextConfig(kind=kind, n_shots=3), train)
    with pytest.raises(InputError, match="n_shots"):
        Contexts(ContextConfig(kind=kind, n_shots=4), train)


@pytest.mark.parametrize("arm", ARMS)
@given(questions=st.lists(tame, min_size=1, max_size=4), context=st.sampled_from(CONTEXTS))
@settings(max_examples=10)
def test_shared_prefix_of_usual_questions(arm, questions, context):
    "The shared prefix begins the prompt, up to the question itself."
    p = prompter(arm)
    prefix = p.shared_prefix(context)
    for q in questions:
        assert p.prompt_ids(context, q)[: len(prefix)] == prefix
