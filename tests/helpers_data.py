"What the tests of data share: files of examples, prompts of five kinds, odd texts."

import copy
import json
import os
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import bytes_to_unicode

from icl_distill.core.config import PromptConfig
from icl_distill.data.contexts import Context
from icl_distill.data.examples import Example
from icl_distill.data.prompts import Prompter
from icl_distill.testing import real_tokenizer

root = Path(__file__).resolve().parent.parent
GSM8K = Path(os.environ.get("ICL_DISTILL_GSM8K") or root.parent / "shared" / "data" / "gsm8k")
needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").is_file(),
    reason="GSM8K is not here: name its folder in ICL_DISTILL_GSM8K",
)


def changed(cfg, **keys):
    "A section of a config with other values, made anew."
    return type(cfg)(**{**vars(cfg), **keys})


def write(folder, name, rows):
    "A file of rows (a list of objects), of text (lone surrogates too), or of bytes. Its path."
    path = Path(folder) / name
    if isinstance(rows, str):
        rows = rows.encode("utf-8", "surrogatepass")
    if not isinstance(rows, bytes):
        rows = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(rows)
    return str(path)


# ---- prompts: templates as their models have them, shortened to system, user and assistant turns

QWEN3 = (
    "{%- for m in messages %}\n"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n')"
    " + '<|im_end|>\n' }}\n"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}"
    "{%- set s = messages[0].content|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set s = '' %}{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n'"
    " + s + '<|eot_id|>' }}\n"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{%- endfor %}\n"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SPLIT = (  # how both models split: line breaks stay together before a word; SmolLM2's do not
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ARMS = ("chatml", "qwen3", "llama3", "plain", "plain_bos")


@cache
def tokenizer(name):
    "The real tokenizer, with the template and the habits of another model."
    tok = copy.deepcopy(real_tokenizer())
    if name == "qwen3":
        tok.add_tokens(["<think>", "</think>"])
        tok.chat_template = QWEN3
    if name == "llama3":
        tok.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
        tok.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
        tok.chat_template = LLAMA3
    if name in ("qwen3", "llama3"):
        split = Split(Regex(SPLIT), "isolated")
        byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
        tok.backend_tokenizer.pre_tokenizer = Sequence([split, byte_level])
    if name in ("llama3", "plain_bos"):  # both write a BOS of their own accord
        tok.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tok.bos_token} $A", special_tokens=[(tok.bos_token, tok.bos_token_id)]
        )
        assert tok("hi").input_ids[0] == tok.bos_token_id
    return tok


@cache
def prompter(arm, **over):
    template = "plain" if arm.startswith("plain") else "chat"
    return Prompter(tokenizer(arm), PromptConfig(template=template, **over))


def ask(question):
    return f"Question: {question}"


def head(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def written_chatml(context, question, answer):
    system = context.text or "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    out = f"<|im_start|>system\n{system}<|im_end|>\n"
    for s in context.shots:
        out += f"<|im_start|>user\n{ask(s.question)}<|im_end|>\n"
        out += f"<|im_start|>assistant\n{s.answer}<|im_end|>\n"
    out += f"<|im_start|>user\n{ask(question)}<|im_end|>\n<|im_start|>assistant\n"
    return out if answer is None else out + f"{answer}<|im_end|>"


def written_qwen3(context, question, answer):
    out = f"<|im_start|>system\n{context.text}<|im_end|>\n" if context.text else ""
    for s in context.shots:
        out += f"<|im_start|>user\n{ask(s.question)}<|im_end|>\n"
        out += f"<|im_start|>assistant\n{s.answer}<|im_end|>\n"
    out += f"<|im_start|>user\n{ask(question)}<|im_end|>\n"
    out += "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return out if answer is None else out + answer.lstrip("\n") + "<|im_end|>"


def written_llama3(context, question, answer):
    system = (context.text or "").strip()
    out = f"<|begin_of_text|>{head('system')}Today Date: 26 Jul 2024\n\n{system}<|eot_id|>"
    for s in context.shots:
        out += head("user") + ask(s.question).strip() + "<|eot_id|>"
        out += head("assistant") + s.answer.strip() + "<|eot_id|>"
    out += head("user") + ask(question).strip() + "<|eot_id|>" + head("assistant")
    return out if answer is None else out + answer.strip() + "<|eot_id|>"


def written_plain(context, question, answer):
    out = f"{context.text}\n\n" if context.text else ""
    for s in context.shots:
        out += f"{ask(s.question)}\nAnswer: {s.answer}<|im_end|>\n"
    out += f"{ask(question)}\nAnswer:"
    return out if answer is None else out + f" {answer}<|im_end|>"


WRITTEN = {
    "chatml": written_chatml,
    "qwen3": written_qwen3,
    "llama3": written_llama3,
    "plain": written_plain,
    "plain_bos": written_plain,
}


def written(arm, context, question, answer=None):
    "What an arm should read, written without Jinja: prompt, or prompt, answer and end-of-turn."
    return WRITTEN[arm](context, question, answer)


def read(arm, ids):
    "The string that ids stand for, a BOS that only `plain_bos` writes left out."
    tok = tokenizer(arm)
    if arm == "plain_bos":
        assert ids[0] == tok.bos_token_id
        ids = ids[1:]
    return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def n_control(arm, ids):
    "How many of the ids are control tokens."
    special = {
        i
        for i, t in tokenizer(arm).added_tokens_decoder.items()
        if t.special or t.content in ("<think>", "</think>")
    }
    return sum(i in special for i in ids)


# ---- examples, and texts of all kinds

SHOTS = (
    Example("s0", "What is 1 + 1?", "1 + 1 = 2\n#### 2"),
    Example("s1", "What is 2 + 3?", "2 + 3 = 5\n#### 5"),
)
CONTEXTS = (
    Context(),
    Context(SHOTS),
    Context((), "Show your work."),
    Context(SHOTS[:1], "Show your work."),
)
LITERALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|im_",
    "|im_end|>",
    "<repo_name>",
]
PIECES = [
    "\u202eשלום",
    "مرحبا",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "e\u0301",
    "\x00",
    "\x1b[0m",
    "\r\n",
    "\t",
    "\u2028",
    "\ufeff",
    "\ue000",
    "\ue0001\ue000",
    "12",
    " ",
    "\n",
    "\n\n",
    "{{ x }}",
    "{question}",
    "{}",
    "{% if %}",
]


@cache
def missing():
    "Bytes that SmolLM2's tokenizer has no token for: it drops them without a word."
    have = {token for token in tokenizer("chatml").get_vocab() if len(token) == 1}
    return {byte for byte, character in bytes_to_unicode().items() if character not in have}


def lossless(text):
    return not missing() & set(text.encode())


def check_brute(arm, al, context, e):
    "An aligned example against the definition: the strings as written, no control token added."
    neutral_shots = tuple(Example(s.id, "q", "a") for s in context.shots)
    neutral = Context(neutral_shots, "t" if context.text else None)
    tok, n = tokenizer(arm), al.n_answer
    for ids, c, bare in (
        (al.student_ids, Context(), Context()),
        (al.teacher_ids, context, neutral),
    ):
        assert read(arm, ids[:-n]) == written(arm, c, e.question)
        assert read(arm, ids) == written(arm, c, e.question, e.answer)
        templates_own = tok(written(arm, bare, "q", "a"), add_special_tokens=False).input_ids
        assert n_control(arm, ids) == n_control(arm, templates_own) + (arm == "plain_bos")
    assert 0 < n < len(al.student_ids) and al.student_ids[-n:] == al.teacher_ids[-n:]
    assert n_control(arm, al.answer_ids) == 1 and n_control(arm, al.answer_ids[-1:]) == 1
