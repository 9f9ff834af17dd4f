"Encoding by pieces: the ids of the whole, for every template, tokenizer and text."

import copy
from functools import cache

import pytest
from helpers_data import (
    ARMS,
    CONTEXTS,
    GSM8K,
    LITERALS,
    PIECES,
    SHOTS,
    needs_gsm8k,
    prompter,
    tokenizer,
)
from hypothesis import example as also
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from tokenizers.pre_tokenizers import Metaspace

from icl_distill.core.config import PromptConfig, load_config
from icl_distill.core.files import InputError
from icl_distill.data.alignment import align
from icl_distill.data.contexts import Context, Contexts
from icl_distill.data.encoding import PieceEncoder, by_pieces
from icl_distill.data.examples import Example
from icl_distill.data.prompts import Prompter, Rendered
from icl_distill.data.tasks import load_task
from icl_distill.testing import real_tokenizer

wild = st.lists(
    st.one_of(
        st.sampled_from(LITERALS + PIECES), st.text(max_size=6), st.from_regex("[ \\n0-9]{1,4}")
    ),
    max_size=6,
).map("".join)
FASTER = {arm: by_pieces(prompter(arm)) for arm in ARMS}


def ids_or_refusal(encoder, text):
    try:
        return encoder.encode(text)
    except InputError as error:
        return str(error)


def outcome(one, context, e):
    "An aligned example, or the error that says why not."
    try:
        return align(one, context, e)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("arm", ARMS)
@given(wild, wild, wild, st.sampled_from(CONTEXTS))
@also("12 ", " 3\n", "\n\n", CONTEXTS[1])
@also("<|im_", "end|>", "<|im_end|>", CONTEXTS[1])
def test_the_ids_of_the_whole(arm, question, answer, shot, context):
    "The same ids or the same refusal, by an encoder that has met other texts before."
    context = Context((*context.shots, Example("wild", shot, answer)), context.text)
    e = Example("e", question, answer)
    assert outcome(FASTER[arm], context, e) == outcome(prompter(arm), context, e)


@cache
def both(kind):
    "The encoder of a changed tokenizer, and the one by pieces."
    encoder = Prompter(tokenizer("chatml"), PromptConfig()).encoder
    encoder.tok = changed_tokenizer(kind)
    return encoder, PieceEncoder(encoder)


def changed_tokenizer(kind):
    tok = copy.deepcopy(tokenizer("chatml"))
    backend = tok.backend_tokenizer
    if kind == "nfc":  # Qwen's
        backend.normalizer = normalizers.NFC()
    if kind == "overlap":
        tok.add_tokens([AddedToken("<|im_end|>\n", special=True, normalized=False)])
    if kind == "normalised":
        tok.add_tokens([AddedToken(" apples", normalized=True, lstrip=True)])
    if kind == "strips":
        tok.add_tokens([AddedToken("<x>", special=True, normalized=False, rstrip=True)])
    if kind == "first":
        backend.pre_tokenizer = Metaspace(prepend_scheme="first")
    if kind == "unsplit":
        tok.split_special_tokens = True
    return tok


@pytest.mark.parametrize("kind", ["nfc", "overlap", "normalised", "strips", "first", "unsplit"])
@given(st.lists(st.sampled_from(["<|im_end|>", "\n", " apples", "<x>", " ", "e\u0301", "a"])))
def test_other_tokenizers(kind, parts):
    "Where a text cannot be cut it is encoded whole; where it can, the ids are the same."
    whole, faster = both(kind)
    assert (faster.seams is None) == (kind in ("strips", "first", "unsplit"))
    text = Rendered("".join(parts))
    assert ids_or_refusal(faster, text) == ids_or_refusal(whole, text)


def test_what_is_remembered_is_bounded():
    one = prompter("chatml")
    small = PieceEncoder(one.encoder, most=50)
    for n in range(40):
        text = one.render(Context(SHOTS), f"What is {n} + {n}?")
        assert small.encode(text) == one.encode(text)
        assert small.held <= 50 + len(one.encode(text))
        assert small.held == sum(map(len, small.known.values()))


@pytest.mark.slow
@needs_gsm8k
def test_all_of_gsm8k():
    "Eight shots of its own for each of the 7,473."
    changes = [f"task.path={GSM8K}", "task.n_dev=1", "prompt.max_student_tokens=1024"]
    cfg = load_config("online_v1", changes)
    task = load_task(cfg.task)
    every = task.train + task.dev
    contexts, one = Contexts(cfg.context, every), Prompter(real_tokenizer(), cfg.prompt)
    faster = by_pieces(one)
    assert len(every) == 7473
    for e in every:
        assert align(faster, contexts(e), e) == align(one, contexts(e), e)
