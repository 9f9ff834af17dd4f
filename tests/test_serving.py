"Commands that serve a model: the shell runs them, and the request holds the run's own prompt."

import copy
import dataclasses
import json
import os
import subprocess

import pytest

from icl_distill.app.serving import _without_bos, how_to_load, serving_blocks
from icl_distill.app.usage import Usage
from icl_distill.core.config import ModelConfig, PromptConfig, load_config, replace
from icl_distill.data.contexts import Context
from icl_distill.data.prompts import Prompter
from icl_distill.testing import real_tokenizer

tok = real_tokenizer()
SERVER, GGUF, OLLAMA = "A vLLM server", "llama.cpp, from a GGUF file", "Ollama, from the same file"
QUESTIONS = ["What is 1 + 1?", 'It\'s `id` $(id) $HOME \\ "so"\nJSON\nand ☃?', "JSON"]


def usage_of(question=QUESTIONS[0], merged=False, **prompt):
    cfg = load_config("quickstart")
    model = ModelConfig(name="Qwen/Qwen3-1.7B", dtype="bfloat16", revision="v2")
    prompter = Prompter(tok, PromptConfig(**prompt))
    return Usage(replace(cfg, model=model), prompter, "me/my sums", question, 40, merged)


def run(code, tmp_path):
    "The commands, with programs that write down what they are given; program -> [args, input]."
    programs, seen = tmp_path / "bin", tmp_path / "seen"
    programs.mkdir()
    seen.mkdir()
    for name in ("vllm", "curl", "llama-server", "ollama", "python"):
        note = f'printf "%s\\0" "$@" > "{seen}/{name}.args"\n'
        note += f'cat > "{seen}/{name}.in"\n' if name == "curl" else ""
        (programs / name).write_text(f"#!/bin/bash\n{note}")
        (programs / name).chmod(0o755)
    env = os.environ | dict(PATH=f"{programs}:{os.environ['PATH']}")
    done = subprocess.run(
        ["bash", "-eu", "-c", f"{code}\nwait"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    args = {f.stem: f.read_text().split("\0")[:-1] for f in seen.glob("*.args")}
    return args, json.loads((seen / "curl.in").read_text())


forms = pytest.mark.parametrize(
    "prompt", [dict(template="plain"), dict(template="chat", system="Be brief.")], ids=str
)


@forms
@pytest.mark.parametrize("question", QUESTIONS)
def test_vllm_is_given_the_very_prompt(prompt, question, tmp_path):
    usage = usage_of(question, **prompt)
    args, request = run(serving_blocks(usage)[SERVER][1], tmp_path)
    assert args["vllm"][:2] == ["serve", "Qwen/Qwen3-1.7B"] and "--enable-lora" in args["vllm"]
    named = dict(zip(args["vllm"][3::2], args["vllm"][4::2], strict=False))
    assert named["--lora-modules"] == "baked=me/my sums"
    assert (named["--max-lora-rank"], named["--revision"]) == ("16", "v2")
    assert (named["--dtype"], named["--generation-config"]) == ("bfloat16", "vllm")
    assert args["curl"][0].endswith(":8000/v1/completions")
    assert request["model"] == "baked" and request["temperature"] == 0
    assert request["prompt"] == usage.prompter.prompt_ids(Context(), question)
    assert request["stop_token_ids"] == list(usage.prompter.stop_ids)
    assert request["max_tokens"] == usage.cfg.evaluate.max_new_tokens


def test_a_merged_model_is_served_by_its_name(tmp_path):
    args, request = run(serving_blocks(usage_of(merged=True))[SERVER][1], tmp_path)
    assert args["vllm"][:2] == ["serve", "me/my sums"] and "--enable-lora" not in args["vllm"]
    assert request["model"] == "me/my sums"


@pytest.mark.parametrize("merged", [False, True])
def test_llama_cpp_is_given_the_very_prompt(merged, tmp_path):
    usage = usage_of(QUESTIONS[1], merged, template="chat")
    args, request = run(serving_blocks(usage)[GGUF][1], tmp_path)
    folder = "me/my sums" if merged else "merged"
    assert args["python"][:2] == ["llama.cpp/convert_hf_to_gguf.py", folder]
    assert request["prompt"] == usage.prompter.prompt_ids(Context(), usage.question)
    assert request["stop"] == [tok.decode([i]) for i in usage.prompter.stop_ids]


@forms
@pytest.mark.parametrize("question", QUESTIONS)
def test_ollama_is_given_the_prompt_as_text(prompt, question, tmp_path):
    usage = usage_of(question, **prompt)
    args, request = run(serving_blocks(usage)[OLLAMA][1], tmp_path)
    assert args["ollama"] == ["create", "baked", "-f", "Modelfile"]
    assert (tmp_path / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert request["raw"] is True and request["stream"] is False
    assert request["prompt"] == usage.prompter.render(Context(), question).plain
    ids = tok(request["prompt"], add_special_tokens=False).input_ids
    assert ids == usage.prompter.prompt_ids(Context(), question)


def test_a_beginning_of_text_is_not_doubled():
    "Ollama puts one before a text, as the tokenizer does."
    from tokenizers.processors import TemplateProcessing

    bos = (tok.bos_token, tok.bos_token_id)
    adding = copy.deepcopy(tok)
    adding.backend_tokenizer.post_processor = TemplateProcessing(f"{bos[0]} $A", None, [bos])
    prompt = f"{bos[0]}user\nWhy?"
    assert adding(_without_bos(adding, prompt)).input_ids == tok(prompt).input_ids
    assert _without_bos(tok, prompt) == prompt


def test_a_card_has_every_way(tmp_path):
    for merged in (False, True):
        text = how_to_load(usage_of(merged=merged))
        for words in ("transformers", "pipeline", "vllm serve", "convert_hf_to_gguf.py", "ollama"):
            assert words in text
        assert ("PeftModel" in text) == ("--enable-lora" in text) == (not merged)
    huge = usage_of()
    huge = dataclasses.replace(huge, cfg=replace(huge.cfg, lora=replace(huge.cfg.lora, r=513)))
    assert SERVER not in serving_blocks(huge)


def test_a_base_model_of_a_wheel_is_found_by_python(tmp_path):
    usage = dataclasses.replace(usage_of(), cfg=load_config("quickstart"))
    code = serving_blocks(usage)[SERVER][1]
    args, _ = run(code, tmp_path)
    assert args["python"][0] == "-c"
    compile(args["python"][1], "base", "exec")
    assert "model_path" in args["python"][1]
