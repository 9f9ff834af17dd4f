"The engine against transformers' own generate, token for token, and against its own naive form."

import importlib.util
import json
import random
import sys
from copy import deepcopy
from functools import cache
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from icl_distill.core.config import Config, EvaluateConfig, ModelConfig
from icl_distill.models.decoding import Sampling, left_pad
from icl_distill.models.engines import check_applied, choose_engine, open_engine
from icl_distill.models.generation import (
    TransformersEngine,
    check_prompts,
    evaluating,
    kv_bytes,
)
from icl_distill.models.loading import body_of
from icl_distill.models.shared_prefix import RowsLayer, common_prefix, sees_all
from icl_distill.models.vllm_engine import lora_rank
from icl_distill.testing import raises, tiny_model

V = 200


class Words:
    "A tokenizer that decodes."

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


SIZES = dict(
    vocab_size=V,
    intermediate_size=48,
    max_position_embeddings=256,
    initializer_range=0.3,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
MODELS = dict(
    qwen3=("qwen3", {}),
    llama=("llama", {}),
    qwen2=("qwen2", {}),
    one_kv_head=("llama", dict(num_key_value_heads=1)),
    no_gqa=("qwen3", dict(num_key_value_heads=4)),
    mistral=("mistral", dict(sliding_window=None)),
    sliding=("mistral", dict(sliding_window=7)),
    gemma2=("gemma2", dict(sliding_window=9, query_pre_attn_scalar=8)),
)


@cache
def model_of(name):
    kind, more = MODELS[name]
    return tiny_model(kind, **SIZES | more).requires_grad_(True)


def prompts_of(seed=0, n=7, start=11, lengths=(1, 14)):
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(1, V) for _ in range(length)]

    head = ids(start)
    return [head + ids(rng.randint(*lengths)) for _ in range(n)]


def by_hf(model, ids, stop_ids, n):
    settings = GenerationConfig(
        max_new_tokens=n, do_sample=False, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)).long(),
        generation_config=settings,
    )
    return out[0, len(ids) :].tolist()


def without_stop(ids, stop_ids):
    return ids[:-1] if ids[-1] in stop_ids else ids


def ours(model, prompts, stop_ids, n, adapter=None, **kw):
    share = kw.pop("share_prefix", True)
    engine = TransformersEngine(model, Words(), stop_ids, **kw)
    out = dict(engine.generate(prompts, adapter, n, share))
    assert sorted(out) == list(range(len(prompts)))
    return [out[i] for i in range(len(prompts))]


def ids_of(completions):
    return [completion.ids for completion in completions]


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
    for share, attention, size in product((True, False), ("auto", "own"), (2, 16)):
        options = dict(share_prefix=share, attention=attention, batch_size=size)
        for completion, ids in zip(ours(model, prompts, stop, 20, **options), want, strict=True):
            assert completion.ids == without_stop(ids, stop)
            assert completion.n_tokens == len(ids)
            assert completion.truncated == (ids[-1] not in stop)
            assert completion.text == " ".join(map(str, completion.ids))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    start=st.integers(0, 20),
    size=st.integers(1, 9),
    new=st.integers(1, 12),
    kind=st.sampled_from(["qwen3", "llama"]),
)
def test_any_prompts(seed, n, start, size, new, kind):
    model, prompts = model_of(kind), prompts_of(seed, n, start)
    stop = [seed % V, (seed + 7) % V]
    want = [without_stop(by_hf(model, p, stop, new), stop) for p in prompts]
    assert ids_of(ours(model, prompts, stop, new, batch_size=size)) == want


def test_equal_and_nested_prompts():
    model = model_of("qwen3")
    for prompts in ([[5, 6, 7]] * 4, [[5], [5, 6], [5, 6, 7]], [[9]], [[1, 2], [3]]):
        assert ids_of(ours(model, prompts, [], 6)) == [by_hf(model, p, [], 6) for p in prompts]
    assert ours(model, [], [], 6) == []


def test_first_token_stops():
    model = model_of("llama")
    prompt = [3, 4, 5]
    (out,) = ours(model, [prompt], by_hf(model, prompt, [], 1), 8)
    assert (out.ids, out.n_tokens, out.truncated, out.text) == ([], 1, False, "")


def test_stop_at_the_limit_is_no_truncation():
    model, prompt = model_of("llama"), [3, 4, 5]
    free = by_hf(model, prompt, [], 12)
    at = next(i for i in range(1, 12) if free[i] not in free[:i])
    assert not ours(model, [prompt], [free[at]], at + 1)[0].truncated
    assert ours(model, [prompt], [free[at]], at)[0].truncated


def test_prefix_is_read_once_and_finished_rows_leave():
    model, prompts, seen = model_of("qwen3"), prompts_of(n=16, start=30), []
    stop = stops(model, prompts)
    hook = body_of(model).register_forward_pre_hook(
        lambda module, args, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    try:
        out = ours(model, prompts, stop, 20, batch_size=8)
    finally:
        hook.remove()
    prefix = len(common_prefix(prompts))
    assert prefix >= 30
    first, *rest = seen[4:]  # (rows, columns) of each forward pass, behind `check_decoding`
    assert first == (1, prefix)
    assert all(columns <= 15 for _, columns in rest)
    assert len([columns for _, columns in rest if columns > 1]) == 2  # batches
    steps = [rows for rows, columns in rest if columns == 1]
    assert min(steps) < 8
    assert sum(steps) < 2 * 8 * 19
    assert sum(rows for rows, _ in rest) >= sum(c.n_tokens for c in out)


def test_longest_first():
    prompts = [[1] * n for n in (3, 9, 5, 1)]
    engine = TransformersEngine(model_of("llama"), Words(), [], batch_size=1)
    order = [i for i, _ in engine.generate(prompts, max_new_tokens=1)]
    assert order == [1, 2, 0, 3]


def lora_of(kind, names=("one", "two"), seed=1):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        lora_dropout=0.2,
        init_lora_weights=False,
    )
    first, *rest = names
    model = get_peft_model(deepcopy(model_of(kind)), config, adapter_name=first)
    for name in rest:
        model.add_adapter(name, config)
    return model


def state(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        getattr(model, "active_adapter", None),
        base.config._attn_implementation,
        model.get_model_status() if hasattr(model, "get_model_status") else None,
    )


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_adapters(kind):
    model, prompts = lora_of(kind).train(), prompts_of(3)
    before, out = state(model), {}
    for adapter in (None, "one", "two", None):
        out[adapter] = ids_of(ours(model, prompts, [], 10, adapter))
        assert state(model) == before
    assert out[None] == [by_hf(model_of(kind), p, [], 10) for p in prompts]
    assert out["one"] != out[None] != out["two"] != out["one"]
    model.eval()
    model.set_adapter("two")
    assert out["two"] == [by_hf(model, p, [], 10) for p in prompts]


def test_adapter_that_was_switched_off_is_applied():
    model, prompts = lora_of("qwen3"), prompts_of(3)
    want = ids_of(ours(model, prompts, [], 10, "one"))
    model.base_model.disable_adapter_layers()
    before = state(model)
    assert ids_of(ours(model, prompts, [], 10, "one")) == want
    assert state(model) == before


def test_restored_after_interruption():
    model = lora_of("llama").train()
    before = state(model)
    answers = TransformersEngine(model, Words(), []).generate(prompts_of(), "two", 5)
    next(answers)
    answers.close()
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), evaluating(model, "one", "icl_shared_prefix"):
        raise KeyboardInterrupt
    assert state(model) == before


def test_unknown_adapters():
    with raises("carries no adapters"):
        ours(model_of("qwen3"), [[1]], [], 2, "one")
    with raises("carries one, two"):
        ours(lora_of("qwen3"), [[1]], [], 2, "three")
    with raises("not the PeftModel itself"):
        TransformersEngine(lora_of("qwen3").get_base_model(), Words(), [])


def checkpoint(model, name, folder, base_hash="h"):
    model.save_pretrained(folder, selected_adapters=[name])
    for file in (folder / name).iterdir():
        file.rename(folder / file.name)
    info = dict(step=1, base_model="tiny", base_hash=base_hash)
    (folder / "checkpoint.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("carries", [False, True])
def test_attach_and_detach(tmp_path, carries):
    source, prompts = lora_of("qwen3"), prompts_of(3)
    folders = {
        "step_0": checkpoint(source, "one", tmp_path / "one"),
        "step_1": checkpoint(source, "two", tmp_path / "two"),
    }
    model = lora_of("qwen3", ("mine",), 9).train() if carries else deepcopy(model_of("qwen3"))
    before, engine = state(model), TransformersEngine(model, Words(), [])
    for _ in range(2):
        engine.attach(folders, "h")
        for adapter, name in ((None, None), ("step_0", "one"), ("step_1", "two")):
            answers = [out for _, out in sorted(engine.generate(prompts, adapter, 8))]
            assert ids_of(answers) == ids_of(ours(source, prompts, [], 8, name))
        with raises("already carries"):
            engine.attach({"step_0": folders["step_0"]})
        engine.detach()
        assert engine.model is model
        assert state(model) == before
        assert not hasattr(model_of("qwen3"), "peft_config")
    with raises("was trained on"):
        engine.attach(folders, "another")


def test_adapter_without_effect_is_an_error():
    engine = TransformersEngine(lora_of("llama"), Words(), [])
    assert check_applied(engine, "one", [1, 2, 3]) > 1e-3
    for name, parameter in engine.model.named_parameters():
        if "lora_B.two" in name:
            parameter.data.zero_()
    with raises("does not change the logits"):
        check_applied(engine, "two", [1, 2, 3])


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=6))
def test_common_prefix(prompts):
    prefix = common_prefix(prompts)
    n = len(prefix)
    assert all(prompt[:n] == prefix and len(prompt) > n for prompt in prompts)
    one_more = {tuple(prompt[: n + 1]) for prompt in prompts}
    assert len(one_more) > 1 or min(map(len, prompts)) == n + 1


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_left_pad(lengths):
    ids, real = left_pad([list(range(1, n + 1)) for n in lengths])
    assert real.sum(1).tolist() == lengths
    assert (ids[:, -1] == torch.tensor(lengths)).all()
    assert (ids[~real] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_rows_layer_is_concatenation(chunks):
    layer, given = RowsLayer(3), torch.randn(2, 2, sum(chunks), 4)
    start = 0
    for n in chunks:
        end = start + n
        keys, values = layer.update(given[:, :, start:end], 2 * given[:, :, start:end])
        assert torch.equal(keys, given[:, :, :end])
        assert torch.equal(values, 2 * given[:, :, :end])
        start = end
    assert layer.get_seq_length() == 3 + sum(chunks)


def test_prompts_are_never_cut():
    model = model_of("llama")
    with raises("250 tokens; with 7"):
        ours(model, [[1], [2] * 250], [], 7)
    with raises("prompt 1 is empty"):
        check_prompts([[1], []], 4)
    assert len(ours(model, [[2] * 250], [], 6)[0].ids) == 6


def shares_one_copy(kind, n_tokens=256):
    engine = TransformersEngine(model_of(kind), Words(), [])
    return engine.one_copy and engine.shares(n_tokens)


def test_which_models_share():
    windowed = ["sliding", "gemma2"]
    assert [name for name in MODELS if not sees_all(model_of(name).config)] == windowed
    assert [name for name in MODELS if not shares_one_copy(name)] == windowed
    assert kv_bytes(model_of("qwen3").config, "float32") == 2 * 2 * 2 * 8 * 4


def test_engine_choice(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_engine() == ("transformers", "vllm is not installed")
    assert choose_engine("vllm") == ("vllm", "as asked for")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine() == ("transformers", "no GPU is visible")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine()[0] == "vllm"


def test_options_that_need_more():
    split = EvaluateConfig(engine="transformers", tensor_parallel_size=2)
    with raises("needs evaluate.engine=vllm"):
        open_engine(Config(evaluate=split), Words(), [0])


class FakeVLLM:
    "Notes what `LLM` is given."

    def __init__(self):
        self.given, self.closed, own = {}, 0, self

        class LLM:
            def __init__(self, **options):
                own.given = options
                core = SimpleNamespace(shutdown=lambda: setattr(own, "closed", own.closed + 1))
                longest = SimpleNamespace(max_model_len=99)
                self.llm_engine = SimpleNamespace(engine_core=core, model_config=longest)

        self.LLM = LLM


def test_a_model_spread_over_several_gpus(tmp_path, monkeypatch):
    "By vLLM: an adapter on a base, or a folder with a whole model, closed when it is done."
    fake = FakeVLLM()
    request = SimpleNamespace(LoRARequest=lambda *args: args)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    for file in ("config.json", "adapter_config.json"):
        (tmp_path / file).write_text(json.dumps(dict(r=24)))
    spread = EvaluateConfig(engine="vllm", tensor_parallel_size=4)
    cfg = Config(evaluate=spread, model=ModelConfig(name=str(tmp_path), dtype="bfloat16"))
    for adapters in ({}, {"step_2": str(tmp_path)}):
        engine = open_engine(cfg, Words(), [0], adapters, 50)
        assert fake.given["tensor_parallel_size"] == 4 and fake.given["model"] == str(tmp_path)
        assert fake.given["dtype"] == "bfloat16" and fake.given["max_model_len"] == 50
        assert fake.given.get("max_lora_rank") == (32 if adapters else None)
        assert list(engine.requests) == [None, *adapters]
    engine.close()
    assert fake.closed == 1


def test_rank(tmp_path):
    for name, rank in (("a", 4), ("b", 24)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(dict(r=rank)))
    assert lora_rank({"a": tmp_path / "a"}) == 8
    assert lora_rank({"a": tmp_path / "a", "b": tmp_path / "b"}) == 32


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_what_is_drawn_depends_on_its_seed_alone(kind):
    "Not on its batch, its order, the way the prefix is read, or when its neighbours end."
    model, prompts = model_of(kind), prompts_of(n=9)

    def drawn(at, stop_ids, size, share=True):
        engine = TransformersEngine(model, Words(), stop_ids, size)
        some, sampling = [prompts[i] for i in at], Sampling(1.0, [100 + i for i in at])
        out = dict(engine.generate(some, None, 20, share, sampling))
        return {i: out[place].ids for place, i in enumerate(at)}

    free = drawn(range(9), [], 9)
    stop = [free[0][3], free[1][8]]
    want = drawn(range(9), stop, 1)
    assert len({len(ids) for ids in want.values()}) > 1
    assert drawn([7, 3, 5, 0], stop, 3) == {i: want[i] for i in (7, 3, 5, 0)}
    assert drawn(range(9), stop, 4, share=False) == want
    said = TransformersEngine(model, Words(), []).generate(
        [prompts[0]] * 6, None, 8, sampling=Sampling(1.0, range(6))
    )
    assert len({tuple(answer.ids) for _, answer in said}) == 6
