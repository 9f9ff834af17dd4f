"""A base in four bits: what must hold of it as of any other, and what is particular."""

import json
import sys

import pytest
import torch
from helpers_training import PAD, adapter, arguments, close, equal, here, names, toy_batch
from test_guards import finish, launch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from icl_distill.app.estimate import shape_of
from icl_distill.app.memory import weight_bytes
from icl_distill.app.export import export_model
from icl_distill.core.checkpoints import Checkpoint
from icl_distill.core.config import ModelConfig, load_config
from icl_distill.models.engines import open_engine
from icl_distill.models.loading import frozen_head, load_adapter, load_model, weights_hash
from icl_distill.models.quantization import check_quantization, quantization_state
from icl_distill.models.teacher import Teacher, plain_targets
from icl_distill.testing import noisy_adapter, raises, real_tokenizer, tiny_folder

NF4 = "model.quantization=nf4"
SIX = (NF4, "steps=6", "log_every=1")
IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = dict(hidden_size=64, intermediate_size=128, head_dim=16)
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", **sizes)


def quantised(folder):
    pytest.importorskip("bitsandbytes", reason="pip install 'icl_distill[quant]'")
    return load_model(ModelConfig(name=str(folder), dtype="float32", quantization="nf4"))


def test_without_bitsandbytes(folder, tmp_path, monkeypatch):
    "Said before anything is read, with what to install."
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with raises("needs bitsandbytes: pip install 'icl_distill[quant]'"):
        here(folder, tmp_path / "run", NF4)
    assert not (tmp_path / "run").exists()


def test_what_is_refused(folder, tmp_path):
    with raises("int8 would quantise activations too", "Choose nf4"):
        load_config("quickstart", ["model.quantization=int8"])
    with raises("train.compile=true"):
        load_config("quickstart", [NF4, "train.compile=true"])
    pytest.importorskip("bitsandbytes")
    with raises("not supported on Apple GPUs"):
        check_quantization(ModelConfig(quantization="nf4"), "mps")
    cfg = load_config("quickstart", [f"model.name={folder}", NF4, "evaluate.engine=vllm"])
    with raises("evaluate.engine=vllm does not read model.quantization=nf4"):
        open_engine(cfg, real_tokenizer(), [2])
    old = tiny_folder(tmp_path / "gpt2", "gpt2", n_embd=64, n_head=4, n_layer=1)
    with raises("Conv1D"):
        quantised(old)


def test_the_base_stays_what_it_is(folder):
    "Adapter off: equal to the bit. No forward pass changes the weights, in whatever mode."
    model = quantised(folder)
    known, alone = weights_hash(model), model(input_ids=IDS).logits
    adapted = noisy_adapter(model)
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=IDS).logits, alone)
    assert (adapted(input_ids=IDS).logits - alone).abs().max() > 1e-2
    adapted.train()
    assert_close(adapted(input_ids=IDS).logits, adapted.eval()(input_ids=IDS).logits)
    assert weights_hash(adapted) == known


def test_the_hash_covers_the_scales(folder):
    model = quantised(folder)
    known = weights_hash(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    parts = quantization_state(weight)
    assert {"absmax", "nested_absmax", "quant_map", "nested_quant_map"} < set(parts)
    state = weight.quant_state
    for x in (weight.data, state.absmax, state.state2.absmax, state.code, state.offset):
        kept = x.clone()
        x += 1
        assert weights_hash(model) != known
        x.copy_(kept)
        assert weights_hash(model) == known


def test_targets(folder):
    "Those from a cached context are the plain ones."
    model = noisy_adapter(quantised(folder))
    aligned, prefixes = toy_batch()
    head = frozen_head(model)
    teacher = Teacher(model, head, PAD, 16, prefixes)
    cached = teacher(aligned)
    assert teacher.stats["prefixes_read"] > 0
    close(cached, plain_targets(model, head, aligned, PAD, 16))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    "Six steps, uninterrupted."
    pytest.importorskip("bitsandbytes")
    path = tmp_path_factory.mktemp("runs") / "whole"
    here(folder, path, *SIX)
    return path


def test_training_and_resuming(folder, run, tmp_path):
    "It learns; what goes on after three steps ends like what was not interrupted, to the bit."
    here(folder, tmp_path / "two", *SIX, "steps=3")
    here(folder, tmp_path / "two", *SIX)
    last = f"checkpoints/{names(run)[-1]}"
    assert equal(tmp_path / "two" / last, run / last)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["ce"] < rows[0]["ce"]
    with raises("the model given has weights"):
        here(folder, run, "steps=7")


def test_gradient_checkpointing(folder, run, tmp_path):
    last = here(folder, tmp_path / "run", *SIX, "train.gradient_checkpointing=true")
    whole = adapter(run / "checkpoints" / last.name)
    for name, x in adapter(last).items():
        assert_close(x, whole[name], rtol=1e-3, atol=1e-5)


def test_export(folder, run, tmp_path):
    "Plain weights, dequantised before the adapter is merged; they say what the run's model says."
    checkpoint = run / "checkpoints" / names(run)[-1]
    off, _ = export_model(checkpoint, tmp_path / "out")
    assert off < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not any(hasattr(p, "quant_state") for p in merged.parameters())
    model = load_adapter(quantised(folder), checkpoint)
    assert_close(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    export_model(checkpoint, tmp_path / "half", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16


def test_another_base_is_refused(folder, run, tmp_path):
    "The adapter of a quantised base is not evaluated on the plain one."
    plain = load_model(ModelConfig(name=str(folder), dtype="float32"))
    with raises("the model given has weights"):
        load_adapter(plain, run / "checkpoints" / names(run)[-1], base_hash=weights_hash(plain))


def test_memory(tmp_path):
    "The estimate of the weights' bytes, and those that are there."
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    path = tiny_folder(tmp_path / "model", **sizes)
    model = quantised(path)
    there = sum(p.numel() * p.element_size() for p in model.parameters())
    parts = [x for p in model.parameters() for x in quantization_state(p).values()]
    there += sum(x.numel() * x.element_size() for x in parts)
    cfg = load_config("quickstart", [f"model.name={path}", "model.dtype=float32", NF4])
    assert weight_bytes(shape_of(model.config), cfg) == pytest.approx(there, rel=0.02)


@pytest.mark.slow
def test_two_processes_train_as_one(folder, tmp_path):
    "Half of each batch in each: the same adapter but for rounding, from the same base."
    pytest.importorskip("bitsandbytes")
    over = [NF4, "steps=4", "log_every=1", "teacher.cache=disk", "lora.dropout=0"]
    one = here(folder, tmp_path / "one", *over, "batch_size=4", "accumulation=2")
    args = arguments(folder, tmp_path / "two", *over, "batch_size=4", "accumulation=1")
    code, said = finish(launch("-m", "icl_distill.train", *args))
    assert code == 0, said[-3000:]
    two = tmp_path / "two" / "checkpoints" / one.name
    assert Checkpoint.read(two).base_hash == Checkpoint.read(one).base_hash
    for name, x in adapter(two).items():
        assert_close(x, adapter(one)[name], rtol=1e-3, atol=1e-5)
