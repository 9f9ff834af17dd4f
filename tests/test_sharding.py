"""Weights that are divided among processes: the same training, and a part of the bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers_training import PAD, equal, go, here, lines, names, toy_batch
from sharded import CASES
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from icl_distill.app.estimate import shape_of
from icl_distill.app.memory import held_weights, weight_bytes
from icl_distill.core.config import LoraConfig, load_config
from icl_distill.models.loading import add_lora, body_of, frozen_head, weights_hash
from icl_distill.models.sharding import check_sharding, shard
from icl_distill.models.taps import layers_of
from icl_distill.models.teacher import Teacher, TeacherOptions
from icl_distill.testing import quiet_environment, raises, tiny_folder, tiny_model
from icl_distill.training.fill import fill_targets
from icl_distill.training.state import other_run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where two tiny models are: one whose embedding is its head, and one with layers to spare."
    path = tmp_path_factory.mktemp("sharded")
    tiny_folder(path / "llama", num_hidden_layers=3)
    tiny_folder(path / "tied", "qwen3", tie_word_embeddings=True)
    return path


def two_processes(folder, cases, seconds):
    "What `sharded.py` does, by two processes."
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *words, str(HERE / "sharded.py"), str(folder), *cases],
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def same(folder, case):
    "The sharded run is the plain one, to the bit; each process held less; what they waited."
    plain, sharded = (folder / f"{case}-{name}" for name in ("ddp", "shard"))
    last = f"checkpoints/{names(plain)[-1]}"
    assert equal(sharded / last, plain / last)
    assert lines(sharded) == lines(plain)
    told = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    for one in told:
        assert one["refused"] == [True, True]
        half = one["head"] + (one["whole"] - one["head"]) / 2
        assert one["held"] == pytest.approx([half, half])
    return [sum(one["passes"]) for one in told]


def test_the_same_run(folder):
    """Contexts of a pool, a tied head, gradient checkpointing, targets on disk, stopped between.

    Some of its targets are lost meanwhile: one process has more to compute than the other.
    """
    two_processes(folder, ["pool"], 300)
    assert sum(same(folder, "pool")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("pool", "real")])
def test_the_same_run_in_other_ways(folder, case):
    "Contexts of their own, without a cache, hidden states, another teacher, bfloat16, a LoRA head."
    two_processes(folder, [case], 600)
    same(folder, case)


@pytest.mark.slow
def test_a_real_model(folder):
    two_processes(folder, ["real"], 1800)
    same(folder, "real")


def test_it_may_be_switched_between_two_starts():
    "Equal to the bit, so it is the same run."
    plain, divided = (load_config("quickstart", [f"train.shard={on}"]) for on in ("false", "true"))
    assert other_run(plain, divided) == []


# ---- one process that plays one of many


@pytest.fixture
def one_of_four():
    "A group in which nobody else is: what is gathered is noise, but its size is right."
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind, tied", [("llama", False), ("qwen3", True)])
def test_bytes(one_of_four, kind, tied):
    "The estimate, and what is there."
    sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    model = tiny_model(kind, tie_word_embeddings=tied, **sizes)
    shape, cfg = shape_of(model.config), load_config("quickstart", ["model.dtype=float32"])
    assert held_weights(shape, cfg, 4) == dict(weights=weight_bytes(shape, cfg))
    cfg = load_config("quickstart", ["model.dtype=float32", "train.shard=true"])
    said = held_weights(shape, cfg, 4)
    shard(add_lora(model, LoraConfig()), torch.device("cpu"))
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    mine = [p.to_local() if isinstance(p, DTensor) else p for p in base.values()]
    assert sum(p.nbytes for p in mine) == pytest.approx(said["weights"], rel=0.02)
    two = 2 * sum(p.nbytes for name, p in base.items() if ".layers.1." in name)
    assert two == pytest.approx(said["gathered_layers"], rel=0.02)


def test_the_hash_of_a_part_is_refused(one_of_four):
    model = shard(tiny_model(), torch.device("cpu"))
    with raises("holds a part of the weights only"):
        weights_hash(model)


def test_what_stays_whole(one_of_four):
    "The adapter, and the head with a tied embedding."
    model = add_lora(tiny_model("qwen3", tie_word_embeddings=True), LoraConfig())
    shard(model, torch.device("cpu"))
    whole = {name for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    assert {name for name in whole if "lora_" not in name} == {
        "base_model.model.model.embed_tokens.weight"
    }
    assert len([name for name in whole if "lora_" in name]) == 2 * 7 * len(
        layers_of(body_of(model))
    )


def test_contexts_that_do_not_fit():
    "All are read before the first targets, or none."
    model, (aligned, prefixes) = tiny_model(), toy_batch()
    options = TeacherOptions(most=lambda n: n, prefix_bytes=1)
    teacher = Teacher(model, frozen_head(model), PAD, 16, prefixes, options)
    assert len(prefixes) > 1
    with raises("more than teacher.prefix_gib", "lower context.pool_size"):
        teacher(aligned)
    roomy = TeacherOptions(most=lambda n: n)
    teacher = Teacher(model, frozen_head(model), PAD, 16, prefixes, roomy)
    teacher(aligned[:1])
    assert teacher.stats["prefixes_read"] == len(prefixes)


# ---- what is refused


@pytest.mark.parametrize(
    "over, why",
    [
        ("model.quantization=nf4", "scales stand beside its weight"),
        ("train.compile=true", "has not been tried"),
        ("teacher={model: x, device: cpu}", "teacher.device=cpu"),
        ("answers.source=teacher", "generated by one process"),
        ("answers.source=agreed", "generated by one process"),
    ],
)
def test_what_does_not_go_with_it(over, why):
    cfg = load_config("quickstart", ["train.shard=true", "task.n_questions=4", over])
    with raises("train.shard=true does not go with", why):
        check_sharding(cfg)


def test_on_policy_is_refused():
    own = ["answers={source: student}", "loss={kind: reverse_kl, weight: 1, ce: 0}"]
    with raises("does not go with answers.source=student"):
        check_sharding(load_config("quickstart", [*own, "train.shard=true"]))


def test_where_it_makes_no_sense(folder, tmp_path):
    "One process, a model that is whole already, targets of many runs."
    with raises("this one is alone", "--num_processes N"):
        here(folder / "llama", tmp_path / "run", "train.shard=true")
    with raises("the one that was given is whole"):
        go(tmp_path / "run", "train.shard=true")
    assert not (tmp_path / "run").exists()
    cfg = load_config("quickstart", ["train.shard=true", "teacher.cache=disk"])
    with raises("set train.shard=false here"):
        fill_targets(cfg)
