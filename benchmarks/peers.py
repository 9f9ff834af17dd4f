"""One training step of ours and of other packages on the same examples, interleaved in one process,
and our generation against transformers' `generate`.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/peers.py --out results/bench/peers.json

What is compared with what, word for word: `peer_steps.py` for ours, `peer_trainers.py` for
transformers and TRL, `peer_swift.py` for ms-swift, `peer_generation.py` for generation. All start
from the same weights, LoRA rank, dtype and batch; seconds are of forward, backward, clipping and
optimiser of one micro-batch; ratios are medians of the ratios on the same batch. In the first step
the students are the same, so losses that are said to be the same are compared there.

ms-swift needs an environment of its own, which is named by its Python; its figures, and those of
our steps beside it in that process, then stand under `apart`:

    python -m venv swift && swift/bin/pip install torch==2.13.0 ms-swift==4.6.0 -e .
    python benchmarks/peers.py --out results/bench/peers.json --swift-python swift/bin/python

A package that is not installed is named with the command that installs it. Results files keep an
older word for cached targets, `remembered`.
"""

import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import ge, le
from pathlib import Path

from packaging.requirements import Requirement
from transformers.utils.logging import disable_progress_bar

from common import (
    arguments,
    batches_of,
    configure,
    data_of,
    described,
    in_turn,
    machine,
    median,
    paired,
    shown,
    timed,
    write,
)
from icl_distill.core.hub import load_tokenizer
from peer_generation import compare
from peer_steps import OURS, OurSteps
from peer_swift import swift_gkd
from peer_trainers import (
    Setting,
    transformers_sft,
    trl_distillation,
    trl_distillation_context,
    trl_sdft,
)

WHAT = "seconds of one training step (forward, backward, clipping, optimiser) of one micro-batch"
LIMITS = dict(distillation=2.5, sft=1.0)
SIGNS = dict(distillation="≥", sft="≤")  # at least, or at most?
BENCH = 'pip install -c constraints.txt -e ".[bench]"'
SWIFT = "pip install torch==2.13.0 ms-swift==4.6.0 -e . (in an environment of its own)"


@dataclass(frozen=True)
class Peer:
    "Another package's trainer."

    build: Callable  # (setting) -> step: a batch in, seconds out
    needs: tuple[str, ...]  # requirements
    install: str  # the command
    same_loss: str = ""  # our mode whose loss it has

    def missing(self) -> list[str]:
        "The requirements that this environment does not meet."
        return [need for need in self.needs if not met(Requirement(need))]


@dataclass(frozen=True)
class Pair:
    "A ratio: how many times the second's seconds the first takes."

    first: str
    second: str
    limit: str = ""  # the one of `LIMITS` that it is held to


PEERS = {
    "transformers_sft": Peer(transformers_sft, ("transformers",), BENCH, "sft"),
    "trl_sdft": Peer(trl_sdft, ("trl>=1.16",), BENCH),
    "trl_distillation": Peer(trl_distillation, ("trl>=1.16",), BENCH, "exact_no_context"),
    "trl_distillation_context": Peer(
        trl_distillation_context, ("trl>=1.16",), BENCH, "exact_online"
    ),
    "swift_gkd": Peer(swift_gkd, ("ms-swift>=4.6", "trl<1"), SWIFT, "exact_online"),
}
GENERATION = "generate"
PAIRS = {
    "trl_sdft_over_online": Pair("trl_sdft", "distill_online", "distillation"),
    "trl_sdft_over_remembered": Pair("trl_sdft", "distill_remembered"),
    "trl_distillation_over_no_context": Pair("trl_distillation", "exact_no_context"),
    "trl_distillation_context_over_online": Pair(
        "trl_distillation_context", "exact_online", "distillation"
    ),
    "swift_gkd_over_online": Pair("swift_gkd", "exact_online", "distillation"),
    "sft_over_transformers_sft": Pair("sft", "transformers_sft", "sft"),
}


def met(need: Requirement) -> bool:
    try:
        return need.specifier.contains(importlib.metadata.version(need.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def parsed():
    p = arguments(__doc__)
    p.add_argument(
        "--only", nargs="+", choices=[*PEERS, GENERATION], help="compare with these alone"
    )
    p.add_argument("--swift-python", help="the Python of an environment with ms-swift")
    p.add_argument("--prompts", type=int, default=8, help="answered in a call of generation")
    p.add_argument("--max-new-tokens", type=int, default=48)
    return p.parse_args()


def ours_for(peers) -> list[str]:
    "Our modes that these peers are compared with."
    wanted = {
        x for pair in PAIRS.values() for x in (pair.first, pair.second) if involved(pair, peers)
    }
    return [mode for mode in OURS if mode in wanted]


def involved(pair: Pair, peers) -> bool:
    return pair.first in peers or pair.second in peers


def check_losses(ours: dict, theirs: dict, dtype: str):
    "Raises `SystemExit` where a peer's first loss is not ours."
    nearly = 1e-3 if dtype == "float32" else 0.05
    for name, loss in theirs.items():
        mode = PEERS[name].same_loss
        if mode and not math.isclose(loss, ours[mode], rel_tol=nearly, abs_tol=1e-5):
            raise SystemExit(f"{name}'s first loss is {loss}, that of our {mode} {ours[mode]}")


def training(setting: Setting, data, peers: list[str]) -> dict:
    "Seconds and ratios of our steps and these peers'."
    batches = batches_of(data, setting.args)
    steps = OurSteps(setting.cfg, setting.args, data, setting.tok)
    modes = ours_for(peers)
    first = {mode: steps.first_loss(mode, batches[0]) for mode in modes}
    theirs = {name: PEERS[name].build(setting) for name in peers}
    ways = {mode: partial(timed, steps, mode) for mode in modes} | theirs
    for way in ways.values():
        way(batches[0])
    first_of_peers = {name: way.loss for name, way in theirs.items()}
    check_losses(first, first_of_peers, setting.args.dtype)
    for batch in batches if "distill_remembered" in modes else []:
        steps("distill_remembered", batch)  # the first epoch
    seconds = in_turn(ways, batches)
    pairs = {name: pair for name, pair in PAIRS.items() if {pair.first, pair.second} <= set(ways)}
    return dict(
        **described(setting.args, batches),
        first_loss=first | first_of_peers,
        seconds=seconds,
        median={name: median(x) for name, x in seconds.items()},
        pairs={name: [pair.first, pair.second] for name, pair in pairs.items()},
        ratio={name: paired(seconds, pair.first, pair.second) for name, pair in pairs.items()},
    )


def in_other_environment(args) -> dict:
    "What this script finds of ms-swift with another Python."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "swift.json"
        command = [args.swift_python, *sys.argv, "--only", "swift_gkd", "--out", str(out)]
        subprocess.run([*command, "--swift-python", ""], stdout=subprocess.DEVNULL, check=True)
        return json.loads(out.read_text())


def judged(ratio: dict) -> dict[str, bool]:
    "Of each ratio that is held to a limit, whether it keeps it; and of each limit, whether all do."
    found, all_of = {}, {}
    for name, value in ratio.items():
        if limit := PAIRS[name].limit:
            keeps = ge if SIGNS[limit] == "≥" else le
            found[name] = keeps(value, LIMITS[limit])
            all_of[limit] = all_of.get(limit, True) and found[name]
    return found | all_of


def versions() -> dict:
    "Of the peers' packages that are installed here."
    found = {}
    for name in ("trl", "transformers", "peft", "ms-swift"):
        if met(Requirement(name)):
            found[name] = importlib.metadata.version(name)
    return found


def compared(args, folder: str) -> dict:
    "All that was asked for and can be had, as the results file holds it."
    cfg = configure(args, "lora.dropout=0")
    tok = load_tokenizer(cfg.model.name)
    data = data_of(cfg, args, tok)
    setting = Setting(args, cfg, tok, data.aligned[0], folder)
    wanted = args.only or [*PEERS, GENERATION]
    peers = [name for name in PEERS if name in wanted]
    here = [name for name in peers if not PEERS[name].missing()]
    out: dict = dict(what=WHAT) | (training(setting, data, here) if here else {})
    apart = {}
    if "swift_gkd" in peers and "swift_gkd" not in here and args.swift_python:
        apart["swift_gkd"] = in_other_environment(args)
    if GENERATION in wanted:
        out["generation"] = compare(setting, data)
    absent = [name for name in peers if name not in [*here, *apart]]
    ratios = out.get("ratio", {}) | {k: v for x in apart.values() for k, v in x["ratio"].items()}
    return out | dict(
        peers=versions(),
        apart=apart,
        not_installed={name: PEERS[name].install for name in absent},
        limits=LIMITS,
        met=judged(ratios),
        environment=machine(),
    )


def show(out: dict):
    for name, seconds in out.get("median", {}).items():
        print(f"{shown(name):26} {seconds:8.3f} s")
    for name, ratio in out.get("ratio", {}).items():
        limit, said = PAIRS[name].limit, ""
        if limit:
            kept = "met" if out["met"][name] else "NOT MET"
            said = f"   ({SIGNS[limit]} {LIMITS[limit]}: {kept})"
        print(f"{shown(name):40} {ratio:6.2f}{said}")


def main():
    args = parsed()
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        out = compared(args, folder)
    write(args.out, out)
    show(out)
    for name, other in out["apart"].items():
        print(f"{name}, in an environment of its own:")
        show(other)
    if found := out.get("generation"):
        print(f"generation, seconds per prompt: {found['median']}, {found['ratio']}")
    for name, install in out["not_installed"].items():
        needs = ", ".join(PEERS[name].missing())
        print(f"{name} was not compared with: it needs {needs}: {install}")


if __name__ == "__main__":
    main()
