"""Law 6 where layers have windows: what a shared prefix gives equals what whole sequences give.

Wherever the window ends: in the prefix, behind it, in the question, in the answer, behind it all.
"""

import random

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from icl_distill.data.alignment import Aligned
from icl_distill.core.config import LoraConfig, load_config
from icl_distill.app.plan import online_mode
from icl_distill.app.estimate import shape_of
from icl_distill.models.generation import TransformersEngine, kv_bytes
from icl_distill.core.files import InputError
from icl_distill.models.loading import add_lora, adapter_off, frozen_head
from icl_distill.models.shared_prefix import FAMILIES, read_prefix, sees_all, window_of
from icl_distill.models.teacher import CachedPrefix, Teacher, cached_targets, plain_targets

V, PAD, NEW_TOKENS = 120, 0, 4
COLUMNS = 204  # of the batches below: a prefix of 157 tokens and at most 47 behind it
WINDOWS = (40, 158, 200, COLUMNS)
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
SHAPE |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=PAD, max_position_embeddings=512)
GEMMA = SHAPE | dict(head_dim=8, query_pre_attn_scalar=8)
TINY_MOE = dict(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[])
EVERY_OTHER = dict(sliding_window_pattern=2)


def gemma3_that_sees(window):
    text = hf.Gemma3TextConfig(**GEMMA, **EVERY_OTHER, sliding_window=window)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, image_size=28, patch_size=14)
    tokens = dict(image_token_index=119, boi_token_index=118, eoi_token_index=117)
    return hf.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, **tokens
    )


WINDOWED = {
    "mistral": lambda w: hf.MistralConfig(**SHAPE, head_dim=8, sliding_window=w),
    "mixtral": lambda w: hf.MixtralConfig(**SHAPE, num_local_experts=2, sliding_window=w),
    "phi3": lambda w: hf.Phi3Config(**SHAPE, sliding_window=w),
    "starcoder2": lambda w: hf.Starcoder2Config(**SHAPE, sliding_window=w),
    "gemma2": lambda w: hf.Gemma2Config(**GEMMA, sliding_window=w),
    "gemma3": lambda w: hf.Gemma3TextConfig(**GEMMA, **EVERY_OTHER, sliding_window=w),
    "gemma3 that sees": gemma3_that_sees,
    "qwen2": lambda w: hf.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=w, max_window_layers=1
    ),
    "cohere2": lambda w: hf.Cohere2Config(**SHAPE, **EVERY_OTHER, sliding_window=w),
    "llama4": lambda w: hf.Llama4TextConfig(
        **SHAPE | TINY_MOE,
        attention_chunk_size=w,
        layer_types=["chunked_attention", "full_attention"],
    ),
}
WHOLE = {
    "llama": lambda _: hf.LlamaConfig(**SHAPE),
    "qwen3": lambda _: hf.Qwen3Config(**SHAPE, head_dim=8),
    "qwen2 without": lambda _: hf.Qwen2Config(**SHAPE, sliding_window=40),
    "mistral without": lambda _: hf.MistralConfig(**SHAPE, head_dim=8, sliding_window=None),
}
windowed = pytest.mark.parametrize("kind", WINDOWED)
windows = pytest.mark.parametrize("window", WINDOWS)
everything = pytest.mark.parametrize(
    "kind, window",
    [(kind, w) for kind in WINDOWED for w in WINDOWS] + [(kind, None) for kind in WHOLE],
)
cut = pytest.mark.parametrize("window", [w for w in WINDOWS if w < COLUMNS])


def config_of(kind, window):
    return (WINDOWED | WHOLE)[kind](window)


def wide(kind, window):
    "Wide enough for norms to weigh little, as the estimate demands."
    config = config_of(kind, window)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size = 256, 512
    if kind == "gemma3 that sees":
        config.vision_config.hidden_size = 64
    return config


def model_of(kind, window):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config_of(kind, window), dtype=torch.float32)
    return model.requires_grad_(False).eval()


def ids(n, seed):
    r = random.Random(seed)
    return [r.randrange(3, 110) for _ in range(n)]


CONTEXTS = {"long": ids(157, 1), "short": ids(101, 2)}


def example(i, key, n_behind, n_answer):
    rest = ids(n_behind, 10 + i)
    return Aligned(str(i), rest, CONTEXTS[key] + rest, n_answer, key)


BATCHES = {
    "one context": [example(i, "long", n, 9) for i, n in enumerate((43, 47, 40))],
    "two contexts": [
        example(i, key, n, a)
        for i, (key, n, a) in enumerate((("long", 43, 9), ("short", 47, 12), ("long", 40, 5)))
    ],
}


def part_of_the_prefix():
    "A row that begins like its context and leaves it early, as at a seam; 204 columns too."
    rows = BATCHES["one context"]
    early = CONTEXTS["long"][:90] + [111] + ids(46, 30)
    return [rows[0], Aligned("early", early[90:], early, 8, "long"), rows[2]]


BATCHES["part of a prefix"] = part_of_the_prefix()


def logits(targets):  # (A,V), by id
    return torch.empty_like(targets.values).scatter_(1, targets.ids.long(), targets.values)


@everything
def test_targets_equal_plain_ones(kind, window):
    "Where a window cuts, the teacher reads plainly: one batch shows it."
    model = model_of(kind, window)
    head = frozen_head(model)
    fits = window is None or window >= COLUMNS
    for batch in BATCHES.values() if fits else [BATCHES["two contexts"]]:
        teacher = Teacher(model, head, PAD, V, prefixes=CONTEXTS)
        plain = plain_targets(model, head, batch, PAD, V)
        got = teacher(batch)
        assert_close(logits(got), logits(plain), rtol=0, atol=1e-4)
        assert_close(got.logz, plain.logz, rtol=0, atol=1e-4)
        n_contexts = len({a.context_key for a in batch})
        assert teacher.stats["prefixes_read"] == (n_contexts if fits else 0)


def test_a_batch_just_outside_the_window_is_read_plainly():
    "Each kind of batch, one column too long."
    model = model_of("mistral", COLUMNS - 1)
    for batch in BATCHES.values():
        teacher = Teacher(model, frozen_head(model), PAD, V, prefixes=CONTEXTS)
        plain = plain_targets(model, teacher.head, batch, PAD, V)
        assert_close(logits(teacher(batch)), logits(plain), rtol=0, atol=1e-4)
        assert teacher.stats["prefixes_read"] == 0


@windowed
@cut
def test_a_prefix_that_a_window_cuts_is_silently_wrong(kind, window):
    "What the rule is for: kept regardless, targets are finite, and far from the model's."
    model, off = model_of(kind, window), []
    head = frozen_head(model)
    with adapter_off(model):
        cached = {key: CachedPrefix(ids, read_prefix(model, ids)) for key, ids in CONTEXTS.items()}
    for batch in BATCHES.values():
        rows = [(a, cached[a.context_key]) for a in batch]
        try:
            got = cached_targets(model, head, rows, PAD, V)
        except RuntimeError:  # layers of different lengths: not even silent
            return
        plain = plain_targets(model, head, batch, PAD, V)
        assert got.values.isfinite().all()
        off.append((logits(got) - logits(plain)).abs().max().item())
    assert max(off) > 1e-3


class Words:
    "A tokenizer that decodes."

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


PROMPTS = [CONTEXTS["long"] + ids(n, 50 + n) for n in (20, 28, COLUMNS - 157 - NEW_TOKENS)]


def naive(model, prompt):
    "Whole sequences, one after the other."
    out = list(prompt)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            out.append(model(input_ids=torch.tensor([out])).logits[0, -1].argmax().item())
    return out[len(prompt) :]


@everything
def test_answers_equal_those_without_a_shared_prefix(kind, window):
    model, read = model_of(kind, window), []
    want = [naive(model, p) for p in PROMPTS]
    attentions = ("auto", "own") if model.config.model_type in FAMILIES else ("auto",)
    for attention in attentions:
        for share in (True, False):
            engine = TransformersEngine(model, Words(), [], attention=attention)
            watch = model.register_forward_pre_hook(
                lambda m, a, kw: read.append(kw["input_ids"].shape[1]), with_kwargs=True
            )
            out = dict(engine.generate(PROMPTS, None, NEW_TOKENS, share))
            watch.remove()
            assert [out[i].ids for i in range(len(PROMPTS))] == want
            shares = share and (window is None or window >= COLUMNS)
            longest = max(map(len, PROMPTS))
            assert max(read) == (longest - 157 if shares else longest)
            read.clear()


@pytest.mark.parametrize("kind", ["mistral", "gemma3 that sees"])
def test_targets_with_an_adapter_are_the_bases(kind):
    "The prefix is read with the adapter off, in a model that trains."
    model = model_of(kind, COLUMNS)
    head = frozen_head(model)
    plain = plain_targets(model, head, BATCHES["two contexts"], PAD, V)
    student = add_lora(model, LoraConfig(r=4, dropout=0.5, target_modules=["q_proj", "v_proj"]))
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    student.train()
    teacher = Teacher(student, head, PAD, V, prefixes=CONTEXTS)
    assert_close(logits(teacher(BATCHES["two contexts"])), logits(plain), rtol=0, atol=1e-4)
    assert teacher.stats["prefixes_read"] == 2 and student.training


@windowed
def test_windows_are_found(kind):
    config = config_of(kind, 40)
    assert window_of(config) == window_of(config.get_text_config()) == 40 and not sees_all(config)


@pytest.mark.parametrize("kind", WHOLE)
def test_models_without_windows(kind):
    assert sees_all(config_of(kind, None))


def test_a_window_that_no_layer_type_names_counts():
    "Mistral uses it for every layer, whatever the types say."
    full = ["full_attention"] * 2
    assert window_of(hf.MistralConfig(**SHAPE, sliding_window=40, layer_types=full)) == 40


def test_layers_without_keys_and_values_share_nothing():
    assert window_of(hf.Qwen3NextConfig()) == 0 and window_of(hf.Gemma3nTextConfig()) == 0


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gemma3 that sees"])
def test_the_estimate_knows_windows(kind, tmp_path):
    "As the teacher does: kept where the longest sequence that may come fits."
    shape = shape_of(wide(kind, 300))
    assert (shape.window, shape.layers, shape.hidden) == (300, 2, 256)
    for longest, mode in ((300, "cached"), (301, "whole")):
        more = [f"run={tmp_path}", f"prompt.max_teacher_tokens={longest}"]
        assert online_mode(load_config("quickstart", more), shape) == mode


def test_a_model_that_sees_is_measured_by_its_text_part():
    one, other = (config_of(kind, 40) for kind in ("gemma3", "gemma3 that sees"))
    assert kv_bytes(other, "float32") == kv_bytes(one, "float32") == 2 * 2 * 2 * 8 * 4
    text, both = (shape_of(wide(kind, 40)) for kind in ("gemma3", "gemma3 that sees"))
    assert text.linears == both.linears and text.body == both.body and text.params < both.params
    engine = TransformersEngine(model_of("gemma3 that sees", 40), Words(), [])
    assert engine.max_length == SHAPE["max_position_embeddings"]


def test_a_head_that_is_not_the_configurations_is_refused():
    "transformers' Gemma 3 that sees ignores a cap: what is not the model's own is an error."
    config = config_of("gemma3 that sees", 40)
    config.text_config.final_logit_softcapping = 2.0
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(InputError, match="not known here"):
        frozen_head(model.requires_grad_(False).eval())
