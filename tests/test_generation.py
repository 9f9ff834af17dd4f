"The engine against transformers' own generate, token for token, and against its own naive form."

import json
import random
from copy import deepcopy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from icl_distill.core.config import Config, EvaluateConfig
from icl_distill.models.generation import (
    TransformersEngine,
    check_prompts,
    evaluating,
    kv_bytes,
    left_pad,
)
from icl_distill.models.engines import check_applied, choose_engine, open_engine
from icl_distill.models.vllm_engine import lora_rank
from icl_distill.core.files import InputError
from icl_distill.models.loading import body_of
from icl_distill.models.shared_prefix import RowsLayer, common_prefix, sees_all

V = 200


class Words:
    "A tokenizer that decodes."

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def tiny(cls, config, seed=0, **kw):
    torch.manual_seed(seed)
    c = config(
        **(
            dict(
                vocab_size=V,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=256,
                initializer_range=0.3,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
            | kw
        )
    )
    return cls(c).eval()


MODELS = dict(
    qwen3=(Qwen3ForCausalLM, Qwen3Config, {}),
    llama=(LlamaForCausalLM, LlamaConfig, {}),
    qwen2=(Qwen2ForCausalLM, Qwen2Config, {}),
    one_kv_head=(LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=1)),
    no_gqa=(Qwen3ForCausalLM, Qwen3Config, dict(num_key_value_heads=4)),
    mistral=(MistralForCausalLM, MistralConfig, dict(sliding_window=None)),
    sliding=(MistralForCausalLM, MistralConfig, dict(sliding_window=7)),
    gemma2=(Gemma2ForCausalLM, Gemma2Config, dict(sliding_window=9, query_pre_attn_scalar=8)),
)
_made = {}


def model_of(kind):
    if kind not in _made:
        _made[kind] = tiny(*MODELS[kind][:2], **MODELS[kind][2])
    return _made[kind]


def prompts_of(seed=0, n=7, start=11, lengths=(1, 14)):
    r = random.Random(seed)
    head = [r.randrange(1, V) for _ in range(start)]
    return [head + [r.randrange(1, V) for _ in range(r.randint(*lengths))] for _ in range(n)]


def by_hf(model, ids, stop_ids, n):
    g = GenerationConfig(
        max_new_tokens=n, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    return model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), generation_config=g
    )[0, len(ids) :].tolist()


def ours(model, prompts, stop_ids, n, adapter=None, **kw):
    share = kw.pop("share_prefix", True)
    out = dict(
        TransformersEngine(model, Words(), stop_ids, **kw).generate(prompts, adapter, n, share)
    )
    assert sorted(out) == list(range(len(prompts)))
    return [out[i] for i in range(len(prompts))]


def stops(model, prompts, n=20):
    "Tokens that do occur, so that rows end at different times."
    free = [by_hf(model, p, [], n) for p in prompts]
    return [free[0][3], free[1][min(8, len(free[1]) - 1)]]


@pytest.mark.parametrize("kind", MODELS)
def test_equals_transformers(kind):
    model, prompts = model_of(kind), prompts_of()
    stop = stops(model, prompts)
    want = [by_hf(model, p, stop, 20) for p in prompts]
    assert len({len(w) for w in want}) > 1
    for share, attention, bs in product((True, False), ("auto", "own"), (2, 16)):
        for c, w in zip(
            ours(model, prompts, stop, 20, share_prefix=share, attention=attention, batch_size=bs),
            want,
        ):
            assert (
                c.ids == (w[:-1] if w[-1] in stop else w)
                and c.n_tokens == len(w)
                and c.truncated == (w[-1] not in stop)
            )
            assert c.text == " ".join(map(str, c.ids))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    start=st.integers(0, 20),
    bs=st.integers(1, 9),
    new=st.integers(1, 12),
    kind=st.sampled_from(["qwen3", "llama"]),
)
def test_any_prompts(seed, n, start, bs, new, kind):
    model, prompts = model_of(kind), prompts_of(seed, n, start)
    stop = [seed % V, (seed + 7) % V]
    want = [by_hf(model, p, stop, new) for p in prompts]
    assert [c.ids for c in ours(model, prompts, stop, new, batch_size=bs)] == [
        w[:-1] if w[-1] in stop else w for w in want
    ]


def test_equal_and_nested_prompts():
    model = model_of("qwen3")
    for prompts in ([[5, 6, 7]] * 4, [[5], [5, 6], [5, 6, 7]], [[9]], [[1, 2], [3]]):
        assert [c.ids for c in ours(model, prompts, [], 6)] == [
            by_hf(model, p, [], 6) for p in prompts
        ]
    assert ours(model, [], [], 6) == []


def test_first_token_stops():
    model = model_of("llama")
    p = [3, 4, 5]
    (c,) = ours(model, [p], [by_hf(model, p, [], 1)[0]], 8)
    assert (c.ids, c.n_tokens, c.truncated, c.text) == ([], 1, False, "")


def test_stop_at_the_limit_is_no_truncation():
    model, p = model_of("llama"), [3, 4, 5]
    free = by_hf(model, p, [], 12)
    at = next(i for i in range(1, 12) if free[i] not in free[:i])
    assert (
        not ours(model, [p], [free[at]], at + 1)[0].truncated
        and ours(model, [p], [free[at]], at)[0].truncated
    )


def test_prefix_is_read_once_and_finished_rows_leave():
    model, prompts, seen = model_of("qwen3"), prompts_of(n=16, start=30), []
    stop = stops(model, prompts)
    hook = body_of(model).register_forward_pre_hook(
        lambda m, a, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    try:
        out = ours(model, prompts, stop, 20, batch_size=8)
    finally:
        hook.remove()
    n = len(common_prefix(prompts))
    assert n >= 30 and seen[0] == (1, n) and all(q <= 15 for _, q in seen[1:])
    batches = [i for i, (_, q) in enumerate(seen) if i and q > 1] or [1]
    steps = [b for b, q in seen[1:] if q == 1]
    assert min(steps) < 8 and len(batches) == 2
    assert sum(steps) < 2 * 8 * 19 and sum(b for b, _ in seen[1:]) >= sum(c.n_tokens for c in out)


def test_longest_first():
    prompts = [[1] * n for n in (3, 9, 5, 1)]
    order = [
        i
        for i, _ in TransformersEngine(model_of("llama"), Words(), [], batch_size=1).generate(
            prompts, max_new_tokens=1
        )
    ]
    assert order == [1, 2, 0, 3]


def lora_of(kind, names=("one", "two"), seed=1):
    torch.manual_seed(seed)
    cfg = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=0.2,
        init_lora_weights=False,
    )
    model = get_peft_model(deepcopy(model_of(kind)), cfg, adapter_name=names[0])
    for n in names[1:]:
        model.add_adapter(n, cfg)
    return model


def state(m):
    cfg = (m.get_base_model() if hasattr(m, "get_base_model") else m).config
    return (
        [p.requires_grad for p in m.parameters()],
        [x.training for x in m.modules()],
        getattr(m, "active_adapter", None),
        cfg._attn_implementation,
        m.get_model_status() if hasattr(m, "get_model_status") else None,
    )


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_adapters(kind):
    model, prompts = lora_of(kind).train(), prompts_of(3)
    before, out = state(model), {}
    for a in (None, "one", "two", None):
        out[a] = [c.ids for c in ours(model, prompts, [], 10, a)]
        assert state(model) == before
    assert (
        out[None] == [by_hf(model_of(kind), p, [], 10) for p in prompts]
        and out["one"] != out[None] != out["two"] != out["one"]
    )
    model.eval()
    model.set_adapter("two")
    assert out["two"] == [by_hf(model, p, [], 10) for p in prompts]


def test_adapter_that_was_switched_off_is_applied():
    model, prompts = lora_of("qwen3"), prompts_of(3)
    want = [c.ids for c in ours(model, prompts, [], 10, "one")]
    model.base_model.disable_adapter_layers()
    before = state(model)
    assert [c.ids for c in ours(model, prompts, [], 10, "one")] == want and state(model) == before


def test_restored_after_interruption():
    model = lora_of("llama").train()
    before = state(model)
    it = TransformersEngine(model, Words(), []).generate(prompts_of(), "two", 5)
    next(it)
    it.close()
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), evaluating(model, "one", "icl_shared_prefix"):
        raise KeyboardInterrupt
    assert state(model) == before


def test_unknown_adapters():
    with pytest.raises(InputError, match="carries no adapters"):
        ours(model_of("qwen3"), [[1]], [], 2, "one")
    with pytest.raises(InputError, match="carries one, two"):
        ours(lora_of("qwen3"), [[1]], [], 2, "three")
    with pytest.raises(InputError, match="not the PeftModel itself"):
        TransformersEngine(lora_of("qwen3").get_base_model(), Words(), [])


def checkpoint(model, name, folder, base_hash="h"):
    model.save_pretrained(folder, selected_adapters=[name])
    for f in (folder / name).iterdir():
        f.rename(folder / f.name)
    (folder / "checkpoint.json").write_text(
        json.dumps(dict(step=1, base_model="tiny", base_hash=base_hash))
    )
    return folder


@pytest.mark.parametrize("carries", [False, True])
def test_attach_and_detach(tmp_path, carries):
    source, prompts = lora_of("qwen3"), prompts_of(3)
    folders = {
        f"step_{i}": checkpoint(source, n, tmp_path / n) for i, n in enumerate(("one", "two"))
    }
    model = lora_of("qwen3", ("mine",), 9).train() if carries else deepcopy(model_of("qwen3"))
    before, engine = state(model), TransformersEngine(model, Words(), [])
    for _ in range(2):
        engine.attach(folders, "h")
        for a, n in ((None, None), ("step_0", "one"), ("step_1", "two")):
            assert [c.ids for _, c in sorted(engine.generate(prompts, a, 8))] == [
                c.ids for c in ours(source, prompts, [], 8, n)
            ]
        with pytest.raises(InputError, match="already carries"):
            engine.attach({"step_0": folders["step_0"]})
        engine.detach()
        assert (
            engine.model is model
            and state(model) == before
            and not hasattr(model_of("qwen3"), "peft_config")
        )
    with pytest.raises(InputError, match="was trained on"):
        engine.attach(folders, "another")


def test_adapter_without_effect_is_an_error():
    engine = TransformersEngine(lora_of("llama"), Words(), [])
    assert check_applied(engine, "one", [1, 2, 3]) > 1e-3
    for n, p in engine.model.named_parameters():
        if "lora_B.two" in n:
            p.data.zero_()
    with pytest.raises(InputError, match="does not change the logits"):
        check_applied(engine, "two", [1, 2, 3])


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=6))
def test_common_prefix(prompts):
    p = common_prefix(prompts)
    n = len(p)
    assert all(x[:n] == p and len(x) > n for x in prompts)
    longer = min(map(len, prompts)) > n + 1 and len({tuple(x[: n + 1]) for x in prompts}) == 1
    assert not longer


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_left_pad(lengths):
    ids, real = left_pad([list(range(1, n + 1)) for n in lengths])
    assert (
        real.sum(1).tolist() == lengths
        and (ids[:, -1] == torch.tensor(lengths)).all()
        and (ids[~real] == 0).all()
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_rows_layer_is_concatenation(chunks):
    layer, k = RowsLayer(3), torch.randn(2, 2, sum(chunks), 4)
    for i, n in enumerate(chunks):
        a = sum(chunks[:i])
        keys, values = layer.update(k[:, :, a : a + n], 2 * k[:, :, a : a + n])
        assert torch.equal(keys, k[:, :, : a + n]) and torch.equal(values, 2 * k[:, :, : a + n])
    assert layer.get_seq_length() == 3 + sum(chunks)


def test_prompts_are_never_cut():
    model = model_of("llama")
    with pytest.raises(InputError, match="250 tokens; with 7"):
        ours(model, [[1], [2] * 250], [], 7)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        check_prompts([[1], []], 4)
    assert len(ours(model, [[2] * 250], [], 6)[0].ids) == 6


def shares_one_copy(kind, n_tokens=256):
    engine = TransformersEngine(model_of(kind), Words(), [])
    return engine.one_copy and engine.shares(n_tokens)


def test_which_models_share():
    assert [k for k in MODELS if not sees_all(model_of(k).config)] == ["sliding", "gemma2"]
    assert [k for k in MODELS if not shares_one_copy(k)] == ["sliding", "gemma2"]
    assert kv_bytes(model_of("qwen3").config, "float32") == 2 * 2 * 2 * 8 * 4


def test_engine_choice(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None)
    assert choose_engine() == ("transformers", "vllm is not installed") and choose_engine(
        "vllm"
    ) == ("vllm", "as asked for")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine() == ("transformers", "no GPU is visible")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine()[0] == "vllm"


def test_options_that_need_more():
    split = EvaluateConfig(engine="transformers", tensor_parallel_size=2)
    with pytest.raises(InputError, match="needs evaluate.engine=vllm"):
        open_engine(Config(evaluate=split), Words(), [0])


def test_rank(tmp_path):
    for i, r in enumerate((4, 24)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "adapter_config.json").write_text(json.dumps(dict(r=r)))
    assert (
        lora_rank({"a": tmp_path / "0"}) == 8
        and lora_rank({"a": tmp_path / "0", "b": tmp_path / "1"}) == 32
    )
