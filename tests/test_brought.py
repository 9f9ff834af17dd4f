"What people bring: their questions, templates, tokenizers, models, adapters and files."

import copy
import itertools
import json
import shutil
import string
from functools import cache

import peft
import pytest
import shapes
import tokenizers
import torch
import transformers
from helpers_data import SHOTS, changed, tokenizer, write
from tokenizers import decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from icl_distill.app.estimate import shape_of
from icl_distill.app.export import PROMPT_FILE, export_model, record_prompt
from icl_distill.app.usage import prompt_code
from icl_distill.core.config import (
    ContextConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    TaskConfig,
    load_config,
    replace,
)
from icl_distill.core.files import InputError
from icl_distill.core.hub import generation_ends, load_tokenizer
from icl_distill.core.checkpoints import find_checkpoints
from icl_distill.data.alignment import align
from icl_distill.data.contexts import Context, Contexts
from icl_distill.data.examples import Example
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task, split_dev
from icl_distill.evaluation.conditions import Condition, check_checkpoint
from icl_distill.evaluation.evaluate import config_for_evaluation, evaluate
from icl_distill.evaluation.records import identity
from icl_distill.models.generation import TransformersEngine
from icl_distill.models.loading import (
    add_lora,
    frozen_head,
    load_adapter,
    load_model,
    weights_hash,
)
from icl_distill.testing import SIZES, answering_folder, fake_run, real_tokenizer, tiny_folder
from icl_distill.training.loop import train
from icl_distill.training.state import other_run

# --- the same question


def with_other_spaces(n):
    "Pairs of examples whose questions differ in white space alone, and as many single ones."
    spaces = itertools.cycle(["What is  {}?", " What is {}?", "What is {}?\n", "What\tis\u00a0{}?"])
    rows = []
    for i in range(n):
        rows += [f"What is {i}?", next(spaces).format(i), f"And {i}?"]
    return [Example(f"train-{i}", question, f"#### {i}") for i, question in enumerate(rows)]


@pytest.mark.parametrize("kind", ["per_example", "fixed", "pool", "shuffled_answers"])
def test_a_question_with_other_spaces_is_never_in_its_own_context(kind):
    train = with_other_spaces(8)
    contexts = Contexts(ContextConfig(kind=kind, n_shots=6, pool_size=4), train)
    asked = 0
    for example in train:
        if example.id in contexts.reserved:
            continue
        try:
            shown = contexts(example).shots
        except InputError:  # every context of the pool shows it
            assert kind == "pool"
            continue
        asked += 1
        own = example.question.split()
        assert all(shot.question.split() != own for shot in shown)
    assert asked >= 4


def test_n_dev_counts_the_questions_that_occur_once():
    train = with_other_spaces(4)
    with pytest.raises(InputError, match="12 training examples .4 questions occur once"):
        split_dev(train, 5, 0)


# --- gold answers


@pytest.mark.parametrize("gold", ["#### 3/4", "#### 12%", "#### 1 000", "#### 4\n#### 5", "12 %"])
def test_a_gold_answer_compared_by_a_part_is_named_with_its_line(gold, tmp_path, capsys):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(8)]
    rows[2]["answer"] = rows[6]["answer"] = gold
    path = write(tmp_path, "train.jsonl", rows)
    test = write(tmp_path, "test.jsonl", [{"question": "t", "answer": "#### 1,000"}])
    cfg = TaskConfig(name="jsonl", path=path, test_path=test, n_dev=1)
    load_task(cfg)
    said = capsys.readouterr().err
    assert "train.jsonl, line 3" in said and "lines 7" in said and "task.extract=exact" in said
    assert "test.jsonl" not in said
    load_task(changed(cfg, extract="exact"))
    assert capsys.readouterr().err == ""


# --- templates and tokenizers


def chat(template, *, added=(), special=(), **over):
    "A prompter with another template and more tokens; its tokenizer keeps line breaks together."
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.add_tokens(list(added))
    tok.add_tokens(list(special), special_tokens=True)
    tok.chat_template = template
    return Prompter(tok, PromptConfig(**over))


CLOCK = (
    "{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_reads_the_clock_reads_one_day():
    dated = chat(CLOCK)
    assert dated.render(Context(), "q").startswith("26 July 2024\n")
    assert "strftime_now=datetime(2024, 7, 26).strftime" in prompt_code(dated)
    assert "datetime" not in prompt_code(chat(CLOCK.replace("strftime_now('%d %B %Y')", "'x'")))


def test_a_condition_depends_on_the_rendered_prompt():
    cfg, item = load_config("quickstart"), Example("e", "q", "#### 1")
    one, other = chat(CLOCK), chat(CLOCK)
    other.renderer.template = chat(CLOCK.replace("%d", "day %d")).renderer.template
    ids = [identity(cfg, p, Condition("zero_shot"), [item], "e") for p in (one, other)]
    assert {key for key in ids[0] if ids[0][key] != ids[1][key]} == {"rendered"}


def test_added_pieces_of_text_stay_tokens_and_control_tokens_of_the_template_do_not():
    own = "{{ '<think>' }}" + tokenizer("chatml").chat_template
    p = chat(own, added=["<td>", "<think>"])
    td, think = p.tok.convert_tokens_to_ids(["<td>", "<think>"])
    ids = p.prompt_ids(Context(), "<td>1</td> <think>")
    assert ids.count(td) == 1 and ids.count(think) == 1  # the template's own
    assert p.decode([td]) == "<td>"


def test_an_answer_that_spells_a_control_token_is_said(capsys):
    p = chat(tokenizer("chatml").chat_template)
    for _ in range(2):
        p.answer_ids(Context(), "q", "it is <|im_end|>, no more")
    assert capsys.readouterr().err.count("<|im_end|>") == 1


def sentencepiece():
    "A tokenizer as SentencePiece's are converted: a space in front, characters, no bytes."
    letters = sorted(set("▁\n<|>_/#.?:0123456789" + string.ascii_letters))
    tokens = ["<unk>", "<s>", "</s>", *letters]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>")
    raw = tokenizers.Tokenizer(model)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tok.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}\n{% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    return tok


def test_a_sentencepiece_tokenizer_puts_no_space_into_a_literal():
    p = Prompter(sentencepiece(), PromptConfig(question_format="{question}"))
    ids = p.prompt_ids(Context(), "What is </s>?")
    assert p.tok.decode(ids).replace(" ", "") == "<s>Whatis</s>?\n"
    assert p.tok.eos_token_id not in ids and "</s>?" in p.tok.decode(ids)


def test_a_character_without_a_token_is_refused_by_every_tokenizer():
    p = Prompter(sentencepiece(), PromptConfig(question_format="{question}"))
    with pytest.raises(InputError, match="cannot write 'é'"):
        p.prompt_ids(Context(), "Caf\u00e9 or tea?")


# --- which tokens end an answer


def base_folder(folder):
    "As Qwen2.5's base: all configs end at <|endoftext|>, the template ends turns at <|im_end|>."
    tiny_folder(folder, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["eos_token"] = config["pad_token"] = "<|endoftext|>"
    path.write_text(json.dumps(config))
    ends = dict(bos_token_id=0, eos_token_id=[0, 17], pad_token_id=0)
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def test_generation_stops_at_the_union_and_the_exported_folder_too(tmp_path):
    folder = base_folder(tmp_path / "base")
    tok = load_tokenizer(str(folder))
    p = Prompter(tok, PromptConfig())
    assert p.stop_ids == [2, 0, 17]
    model = AutoModelForCausalLM.from_pretrained(folder)
    record_prompt(model, p, folder)
    again = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert again.eos_token_id == [2, 0, 17] and again.pad_token_id == 0
    about = json.loads((folder / PROMPT_FILE).read_text())
    assert about["prompt"]["question_format"] == "Question: {question}"
    assert about["rendered"].endswith("assistant\n") and about["stop_ids"] == [2, 0, 17]


def test_a_config_without_generation_config_names_the_ends(tmp_path):
    folder = base_folder(tmp_path)
    (folder / "generation_config.json").unlink()
    assert generation_ends(str(folder)) == (0,)


# --- shapes of templates: written here, shortened to what is special in each


def loop(user, assistant, opened, *, system="", end=""):
    "A template of pieces; each may use m.content."
    parts = [f"{{% if m.role == 'user' %}}{user}{{% elif m.role == 'assistant' %}}{assistant}"]
    parts.append(f"{{% else %}}{system}{{% endif %}}")
    body = "".join(["{% for m in messages %}", *parts, end, "{% endfor %}"])
    return f"{body}{{% if add_generation_prompt %}}{opened}{{% endif %}}"


USER = "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
SYSTEM = "<|im_start|>system\n{{ m.content }}<|im_end|>\n"
SAID = "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
LAST = "{{ '<think>\n\n</think>\n\n' if loop.last else '' }}"
CUT = "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LAST_TURN = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{{ s + '\n\n' if s and loop.last else '' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
SHAPES = {  # template, tokens it adds, how a prompt ends, how an answer ends
    "R1-distill": (
        loop(
            "<|User|>{{ m.content }}",
            f"<|Assistant|>{CUT}<|endoftext|>",
            "<|Assistant|><think>\n",
            system="{{ m.content }}",
        ),
        ("<|User|>", "<|Assistant|>", "<think>", "</think>"),
        "<|Assistant|><think>\n\n</think>\n\n",
        "<|endoftext|>",
    ),
    "DeepSeek V3": (
        loop(
            "<|User|>{{ m.content }}",
            "<|Assistant|></think>{{ m.content }}<|endoftext|>",
            "<|Assistant|>",
            system="{{ m.content }}",
        ),
        ("<|User|>", "<|Assistant|>", "</think>"),
        "<|Assistant|></think>",
        "<|endoftext|>",
    ),
    "QwQ": (
        loop(
            USER,
            f"<|im_start|>assistant\n{CUT}<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n",
            system=SYSTEM,
        ),
        ("<think>", "</think>"),
        "assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "Qwen3-Thinking-2507": (
        loop(
            USER,
            f"<|im_start|>assistant\n{LAST}{{{{ m.content }}}}<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n",
            system=SYSTEM,
        ),
        ("<think>", "</think>"),
        "assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "gpt-oss": (
        "{{ strftime_now('%Y-%m-%d') }}"
        + loop(
            "<|start|>user<|message|>{{ m.content }}<|end|>",
            "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
            "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}",
            "<|start|>assistant",
            system="<|start|>developer<|message|>{{ m.content }}<|end|>",
        ),
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"),
        "<|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "GLM-4": (
        loop(
            "<|user|>\n{{ m.content }}",
            "<|assistant|>\n{{ m.content }}",
            "<|assistant|>\n",
            system="<|system|>\n{{ m.content }}",
        ),
        ("<|user|>", "<|assistant|>", "<|system|>"),
        "<|assistant|>\n",
        "<|user|>",
    ),
    "Command R7B": (
        loop(
            "<|turn|><|user|>{{ m.content }}<|end|>",
            "<|turn|><|bot|><|response|>{{ m.content }}<|end_response|><|end|>",
            "<|turn|><|bot|>",
            system="<|turn|><|system|>{{ m.content }}<|end|>",
        ),
        (
            "<|turn|>",
            "<|user|>",
            "<|bot|>",
            "<|system|>",
            "<|end|>",
            "<|response|>",
            "<|end_response|>",
        ),
        "<|bot|><|response|>",
        "<|end_response|>",
    ),
    "Gemma 2": (
        REFUSES + loop(USER, SAID, "<|im_start|>assistant\n"),
        (),
        "assistant\n",
        "<|im_end|>",
    ),
    "Mistral": (LAST_TURN, ("[INST]", "[/INST]"), "[/INST]", "<|endoftext|>"),
    "SmolLM3": (
        "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}<|im_end|>\n"
        + loop(
            USER,
            "<|im_start|>assistant\n<think>\n\n</think>\n{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n{{ '' if enable_thinking else '<think>\n\n</think>\n' }}",
            system=SYSTEM,
        ),
        ("<think>", "</think>"),
        "<think>\n\n</think>\n",
        "<|im_end|>",
    ),
    "Granite": (
        loop(
            "<|role|>user<|role_end|>{{ m.content }}<|endoftext|>\n",
            "<|role|>assistant<|role_end|>{{ m.content }}<|endoftext|>\n",
            "<|role|>assistant<|role_end|>",
            system="<|role|>system<|role_end|>{{ strftime_now('%B %d, %Y') }}\n{{ m.content }}"
            "<|endoftext|>\n",
        ),
        ("<|role|>", "<|role_end|>"),
        "assistant<|role_end|>",
        "<|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_template_trains_with_shots_and_system_text(name):
    template, tokens, opened, end = SHAPES[name]
    p = chat(template, special=tokens)
    example = Example("e", "Why?", "Because.")
    for context in (Context(), Context(SHOTS), Context(SHOTS, "Be brief."), Context((), "Brief.")):
        al = align(p, context, example)
        read = p.tok.decode(al.teacher_ids[: -al.n_answer])
        assert read.endswith(opened) and read == p.render(context, "Why?").plain
        assert p.tok.decode(al.answer_ids).strip() == f"Because.{end}"
        places = [
            read.index(x) for x in (context.text or "", "1 + 1?", "2 + 3?", "Why?") if x in read
        ]
        assert places == sorted(places) and bool(context.text) == ("rief." in read)
        assert p.prompt_ids(context, "Why?") == al.teacher_ids[: -al.n_answer]
    assert p.stop_ids[0] == al.answer_ids[-1]


@cache
def with_all_tokens():
    "A tokenizer that knows the tokens of all shapes."
    tok = copy.deepcopy(tokenizer("qwen3"))
    tok.add_tokens(shapes.TOKENS, special_tokens=True)
    return tok


def asked_and_answered(shape, system, thinking):
    "The prompt after two shots, and the answer's tokens as text."
    tok = with_all_tokens()
    tok.chat_template, tok.eos_token = shape.template, shape.end
    ends = "eos" if shape.eos else "template"
    cfg = PromptConfig(system=system, enable_thinking=thinking, answer_end=ends)
    p = Prompter(tok, cfg)
    al = align(p, Context(SHOTS), Example("e", "Why?", "Because."))
    assert p.stop_ids[0] == al.answer_ids[-1]
    assert p.prompt_ids(Context(), "Why?") == al.student_ids[: -al.n_answer]
    return tok.decode(al.teacher_ids[: -al.n_answer]), tok.decode(al.answer_ids)


@pytest.mark.parametrize("name", [n for n in shapes.SHAPES if not shapes.SHAPES[n].refused])
def test_public_templates_train_in_all_settings(name):
    "With and without system text; where a thought is wanted they are asked, or trained too."
    shape = shapes.SHAPES[name]
    for system, thinking in itertools.product((None, "Be brief."), (False, True)):
        try:
            read, said = asked_and_answered(shape, system, thinking)
        except InputError as error:  # the thought is the model's to write
            assert thinking and "prompt.enable_thinking=false" in str(error)
            p = Prompter(with_all_tokens(), PromptConfig(system=system, enable_thinking=True))
            read, said = p.tok.decode(p.prompt_ids(Context(SHOTS), "Why?")), None
        places = [read.index(x) for x in (system or "", "1 + 1?", "2 + 3?", "Why?")]
        assert places == sorted(places)
        if said is not None:
            assert said.strip().removeprefix("Because.").strip() == shape.end
            assert not read.endswith(("<think>", "<think>\n"))


def test_few_public_templates_are_refused_and_say_why():
    refused = {name: shape for name, shape in shapes.SHAPES.items() if shape.refused}
    assert len(shapes.SHAPES) + len(SHAPES) >= 56 and len(refused) <= 6
    for shape in refused.values():
        with pytest.raises(InputError, match=shape.refused) as error:
            asked_and_answered(shape, None, False)
        assert "\n" not in str(error.value)


def test_an_answer_without_an_end_gets_the_end_of_text_where_asked():
    falcon = shapes.SHAPES["Falcon"]
    tok = with_all_tokens()
    tok.chat_template, tok.eos_token = falcon.template, falcon.end
    with pytest.raises(InputError, match="prompt.answer_end=eos"):
        Prompter(tok, PromptConfig()).answer_ids(Context(), "Why?", "Because.")
    ended = Prompter(tok, PromptConfig(answer_end="eos"))
    assert tok.decode(ended.answer_ids(Context(), "Why?", "Because.")) == " Because.<|endoftext|>"
    glm = chat(SHAPES["GLM-4"][0], special=SHAPES["GLM-4"][1], answer_end="eos")
    assert glm.answer_ids(Context(), "Why?", "Because.")[-1] == glm.tok.eos_token_id


def test_what_was_done_about_a_template_is_said():
    done = {name: chat(shape[0], special=shape[1]).notes for name, shape in SHAPES.items()}
    assert ["system text" in note for note in done["Gemma 2"] + done["Mistral"]] == [True, True]
    assert "final" in done["gpt-oss"][0] and "</think>" in done["R1-distill"][0]
    assert not done["GLM-4"] and not done["SmolLM3"] and not done["Granite"]


@pytest.mark.parametrize("name", ["R1-distill", "Qwen3-Thinking-2507", "QwQ"])
def test_a_thinking_model_may_think_when_asked_and_is_not_trained_so(name):
    template, tokens, *_ = SHAPES[name]
    thinking = chat(template, special=tokens, enable_thinking=True)
    assert thinking.render(Context(), "Why?").endswith("<think>\n") and thinking.stop_ids
    with pytest.raises(InputError, match="enable_thinking=false"):
        thinking.answer_ids(Context(), "Why?", "Because.")


def test_no_advice_that_does_not_apply():
    p = chat(
        loop(
            USER,
            "<|im_start|>assistant\n{{ m.content|length }}: {{ m.content }}<|im_end|>",
            "<|im_start|>assistant\n",
        )
    )
    with pytest.raises(InputError) as refused:
        p.answer_ids(Context(), "Why?", "Because.")
    assert "enable_thinking" not in str(refused.value)


def test_white_space_at_the_seam_is_named_and_can_be_taken_off():
    tok = copy.deepcopy(tokenizer("qwen3"))  # line breaks in one piece
    tok.chat_template = tokenizer("chatml").chat_template
    with pytest.raises(InputError, match="white space.*prompt.answer_space=strip"):
        Prompter(tok, PromptConfig()).answer_ids(Context(), "Why?", "\n\nBecause.")
    strip = Prompter(tok, PromptConfig(answer_space="strip"))
    ids = strip.answer_ids(Context(SHOTS), "Why?", "\n\nBecause. ")
    assert tok.decode(ids) == "Because.<|im_end|>"


LOUD = loop("LOUD " + USER, SAID, "<|im_start|>assistant\n", system=SYSTEM)


def test_one_of_several_templates_is_chosen_by_its_name(tmp_path):
    tok = tokenizer("chatml")
    tok.chat_template = {"default": tok.chat_template, "loud": LOUD}
    plain, loud = (Prompter(tok, PromptConfig(template_name=name)) for name in (None, "loud"))
    assert "LOUD" not in plain.render(Context(), "Why?")
    assert loud.render(Context(SHOTS), "Why?").plain.count("LOUD") == len(SHOTS) + 1
    with pytest.raises(InputError, match="template_name is 'quiet'.*'default', 'loud'"):
        Prompter(tok, PromptConfig(template_name="quiet"))
    del tok.chat_template["default"]
    with pytest.raises(InputError, match="no default template.*'loud'"):
        Prompter(tok, PromptConfig())


def test_an_export_keeps_the_template_of_the_run(elsewhere, tmp_path):
    base, adapter = elsewhere
    tok = load_tokenizer(str(base))
    tok.chat_template = {"default": tok.chat_template, "loud": LOUD}
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    tok.save_pretrained(moved)
    changes = [f"model.name={moved}", "prompt.template_name=loud"]
    export_model(adapter, tmp_path / "out", overrides=changes)
    assert load_tokenizer(str(tmp_path / "out")).chat_template == {"default": LOUD, "loud": LOUD}


# --- models


def test_a_model_without_sdpa_says_which_attention_it_has(tmp_path):
    sizes = dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
    transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes)).save_pretrained(tmp_path)
    cfg = ModelConfig(name=str(tmp_path), dtype="float32")
    with pytest.raises(InputError, match="no sdpa attention.*model.attention=eager"):
        load_model(cfg)
    assert load_model(replace(cfg, attention="eager")).config._attn_implementation == "eager"


def mamba(vocab_size):
    sizes = dict(hidden_size=16, num_hidden_layers=2, state_size=4)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return transformers.MambaConfig(vocab_size=vocab_size, **sizes, **ends)


def recurrent():
    return transformers.MambaForCausalLM(mamba(64))


def test_a_model_that_says_always_the_same_can_be_decoded(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(answering_folder(tmp_path / "model"))
    engine = TransformersEngine(model, real_tokenizer(), [2])
    assert len(list(engine.generate([[1, 2]], max_new_tokens=3))) == 1  # all its logits are 0


def test_a_model_that_cannot_be_decoded_in_a_batch_is_refused_before_it_answers():
    engine = TransformersEngine(with_noise(recurrent(), "", std=0.5).eval(), None, [2])
    with pytest.raises(InputError, match="cannot decode MambaForCausalLM"):
        next(engine.generate([[5, 6, 7], [8]]))


def test_a_recurrent_model_is_refused_in_one_line_by_evaluation_and_estimate(tmp_path):
    model = with_noise(transformers.MambaForCausalLM(mamba(len(real_tokenizer()))), "", std=0.5)
    model.save_pretrained(tmp_path)
    real_tokenizer().save_pretrained(tmp_path)
    few = ["task.n_train=8", "task.n_dev=2", "task.n_test=2", "conditions=[zero_shot]"]
    about = [f"model.name={tmp_path}", "model.dtype=float32", "model.attention=eager", *few]
    cfg = load_config("quickstart", [*about, f"run={tmp_path / 'r'}"], "evaluate")
    with pytest.raises(InputError, match="cannot decode MambaForCausalLM"):
        evaluate(cfg, progress=False)
    with pytest.raises(InputError, match="a mamba model .*there is no estimate for it"):
        shape_of(model.config)


def test_a_multimodal_model_without_a_language_model_of_its_own_has_no_estimate():
    with pytest.raises(InputError, match="no estimate for a mistral3 model") as error:
        shape_of(transformers.Mistral3Config())
    assert "\n" not in str(error.value)


def linear_with_adapters(model):
    return {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}


def with_noise(model, where="lora_B", std=0.1):
    for name, parameter in model.named_parameters():
        if where in name:
            parameter.data.normal_(0, std)
    return model


def test_adapters_of_a_multimodal_model_are_in_its_language_model():
    text = SIZES | dict(vocab_size=64)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, image_size=28)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | dict(num_attention_heads=2, patch_size=14),
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).float()
    wrapped = add_lora(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    found = linear_with_adapters(wrapped)
    assert len(found) == 4 and all("language_model" in name for name in found)


def test_gpt2s_conv1d_layers_take_adapters(capfd):
    sizes = dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    wrapped = add_lora(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"])).eval()
    assert torch.equal(wrapped(input_ids=ids).logits, before) and frozen_head(wrapped) is not None
    with_noise(wrapped)
    with_adapter = wrapped(input_ids=ids).logits
    merged = wrapped.merge_and_unload()(input_ids=ids).logits
    assert not torch.allclose(with_adapter, before, atol=1e-3)
    assert torch.allclose(merged, with_adapter, atol=1e-5)


def test_a_pad_token_beyond_the_embedding_is_replaced(tmp_path):
    tiny_folder(tmp_path)
    tok = load_tokenizer(str(tmp_path))
    tok.add_special_tokens({"pad_token": "[PAD]"})
    assert tok.pad_token_id == len(tok) - 1
    tok.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tok.eos_token_id


# --- adapters from elsewhere


@pytest.fixture
def elsewhere(tmp_path):
    "A base folder with a tied head, and an adapter on it as peft alone leaves it."
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    wrapped = with_noise(peft.get_peft_model(model, settings))
    wrapped.save_pretrained(tmp_path / "trl" / "checkpoint-100")
    return base, tmp_path / "trl" / "checkpoint-100"


def test_an_adapter_from_elsewhere_is_exported_with_the_base_named(elsewhere, tmp_path):
    base, adapter = elsewhere
    with pytest.raises(InputError, match="without checkpoint.json: name its base"):
        export_model(adapter, tmp_path / "out")
    _, info = export_model(adapter, tmp_path / "out", "float32", [f"model.name={base}"])
    assert info["foreign"]
    ids = torch.arange(5, 25)[None]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(plain, str(adapter)).eval()(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings  # the head has an adapter, the embedding none
    assert torch.allclose(merged(input_ids=ids).logits, want, atol=1e-4)


def test_an_adapter_from_elsewhere_is_evaluated_and_marked(elsewhere, tmp_path, capsys):
    base, adapter = elsewhere
    for place in (adapter, adapter.parent):
        assert list(find_checkpoints(place)) == ["step_100"]
    about = [f"model.name={base}", "model.dtype=float32", f"run={tmp_path / 'r'}"]
    few = ["task.n_train=8", "task.n_dev=2", "task.n_test=2", "max_new_tokens=2", "conditions=[]"]
    cfg = load_config("quickstart", [*about, *few, f"checkpoints={adapter}"], "evaluate")
    results = evaluate(cfg, progress=False)
    assert list(results.conditions) == ["step_100"]
    assert "from elsewhere" in capsys.readouterr().err
    records = tmp_path / "r" / "evaluation" / "records" / "step_100.jsonl"
    assert json.loads(records.read_text().splitlines()[0])["identity"]["foreign"] is True


def test_the_text_model_of_llama_4_is_trained_asked_and_exported(tmp_path):
    text = SIZES | dict(intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=64)
    text["vocab_size"] = len(real_tokenizer())
    vision = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, image_size=28)
    vision |= dict(num_attention_heads=2, patch_size=14, vision_output_dim=32)
    vision |= dict(projector_input_dim=32, projector_output_dim=32)
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    transformers.Llama4ForConditionalGeneration(config).float().save_pretrained(tmp_path / "base")
    real_tokenizer().save_pretrained(tmp_path / "base")
    few = ["task.n_train=12", "task.n_dev=2", "task.n_test=2", "context.n_shots=2", "lr=0.05"]
    few += ["steps=1", "batch_size=2", "accumulation=1", "warmup_steps=0", f"run={tmp_path / 'r'}"]
    few += ["model.dtype=float32", "lora.target_modules=[q_proj,v_proj]"]
    saved = train(load_config("quickstart", [f"model.name={tmp_path / 'base'}", *few], "train"))
    asked = config_for_evaluation(str(tmp_path / "r"), ["max_new_tokens=2"])
    assert list(evaluate(asked, progress=False).conditions) == ["step_1"]
    export_model(tmp_path / "r", tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    base = load_model(ModelConfig(name=str(tmp_path / "base"), dtype="float32"))
    assert type(base) is transformers.Llama4ForCausalLM
    want = load_adapter(base, saved)(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(merged(input_ids=ids).logits, want, atol=1e-4)


def test_vllm_takes_a_base_that_was_moved_by_its_weights(tmp_path):
    moved, other = tiny_folder(tmp_path / "moved"), tiny_folder(tmp_path / "other", seed=1)
    own = weights_hash(load_model(ModelConfig(name=str(moved), dtype="float32")))
    about = dict(base_model="/where/it/was", base_hash=own, dtype="float32")
    run = fake_run(tmp_path / "run", (1, 2), **about)
    cfg = load_config("quickstart", [f"model.name={moved}", "model.dtype=float32"])
    for checkpoint in run.checkpoints():
        assert check_checkpoint(cfg, str(checkpoint.folder), "vllm").step == checkpoint.step
    cfg = replace(cfg, model=replace(cfg.model, name=str(other)))
    with pytest.raises(InputError, match="was trained on '/where/it/was' with weights"):
        check_checkpoint(cfg, str(run.checkpoint_path(1)), "vllm")


def test_a_base_model_may_lie_elsewhere():
    was = load_config("quickstart")
    assert not other_run(was, load_config("quickstart", ["model.name=/elsewhere/the-same"]))
