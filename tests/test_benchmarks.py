"""Benchmarks: results files say what their raw figures say; the GPU scripts name commands that
exist."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from icl_distill.core.results import read_results

root = Path(__file__).resolve().parent.parent
bench = root / "results" / "bench"


@pytest.mark.parametrize("name", ["step_time", "peers"])
def test_medians_and_ratios_are_those_of_the_raw_figures(name):
    r = json.loads((bench / f"{name}.json").read_text())
    assert (
        r["data"] == "gsm8k"
        and r["repeats"] >= 5
        and all(len(v) == r["repeats"] for v in r["seconds"].values())
    )
    assert r["median"] == {k: median(v) for k, v in r["seconds"].items()}

    def over(a, b):
        pairs = zip(r["seconds"][a], r["seconds"][b], strict=True)
        return median([x / y for x, y in pairs])

    if name == "peers":
        always = dict(
            trl_sdft_over_online=["trl_sdft", "distill_online"],
            trl_sdft_over_remembered=["trl_sdft", "distill_remembered"],
            sft_over_transformers_sft=["sft", "transformers_sft"],
        )
        pairs = r.get("pairs", always)  # an older file names none
        assert always.items() <= pairs.items()
        assert r["ratio"] == {key: over(*pair) for key, pair in pairs.items()}
    else:
        assert (
            r["ratio_to_sft"] == {k: over(k, "sft") for k in r["seconds"]}
            and r["plain_over_online"] == over("distill_plain", "distill_online")
            and r["memory_ratio_to_sft"]
            == {k: v / r["peak_bytes"]["sft"] for k, v in r["peak_bytes"].items()}
        )
        assert r["met"]["online"] == (
            r["ratio_to_sft"]["distill_online"] <= r["limits"]["online"]
        ) and all(len(v) == r["repeats"] for v in r["tokens"].values())


def run(name: str, tmp_path, *more: str) -> tuple[dict, str]:
    "What a benchmark writes and prints of a tiny model."
    from icl_distill.testing import tiny_folder

    model, out = tiny_folder(tmp_path / "model", max_position_embeddings=4096), tmp_path / "out"
    own = ["--out", out, "--model", model, "--threads", "1", "--batch", "1", "--repeats", "1"]
    command = [sys.executable, root / "benchmarks" / f"{name}.py", *own, *more]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_peers_compares_with_those_that_are_installed(tmp_path):
    "The same losses in the first step and the same answers, or the command fails; it names others."
    only = ["--only", "transformers_sft", "swift_gkd", "generate"]
    r, said = run("peers", tmp_path, *only, "--prompts", "2", "--max-new-tokens", "3")
    (sft,), (theirs,) = (r["seconds"][name] for name in ("sft", "transformers_sft"))
    assert r["ratio"] == {"sft_over_transformers_sft": sft / theirs}
    assert r["met"]["sft"] == (sft / theirs <= r["limits"]["sft"])
    assert r["first_loss"]["sft"] == pytest.approx(r["first_loss"]["transformers_sft"], rel=1e-3)
    assert r["generation"]["answers"] == 2 and r["generation"]["equal_share"] == 1
    assert "ms-swift==4.6.0" in r["not_installed"]["swift_gkd"] and "ms-swift>=4.6" in said


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_papers_run_reads_each_example_once_where_targets_are_kept(tmp_path, processes):
    few = ["--examples", "4", "--epochs", "2", "--context", "20", "--old", "2"]
    r, _ = run("paper_run", tmp_path, *few, "--processes", str(processes))
    assert r["computed"]["off"] == 8 and r["computed"]["disk"] == 4 and r["encoding"]["equal"]
    assert r["total"] == {way: pytest.approx(sum(s)) for way, s in r["seconds"].items()}


@pytest.mark.slow
def test_a_steps_time_is_said_for_each_mode_and_where_it_goes(tmp_path):
    r, said = run("step_time", tmp_path, "--profile", str(tmp_path / "profile.txt"))
    profile = (tmp_path / "profile.txt").read_text()
    for mode in ("sft", "distill_online", "distill_remembered", "distill_plain"):
        assert r["median"][mode] == r["seconds"][mode][0]
        assert mode.replace("remembered", "cached") in said and mode in profile.replace(
            "cached", "remembered"
        )
    assert profile.count("aten::mm") >= 4 and list(r["met"]) == list(r["limits"])


def test_losses_ratios_are_those_of_the_raw_figures():
    r = json.loads((bench / "loss_memory.json").read_text())
    assert {(x["V"], x["A"]) for x in r["rows"]} == {
        (V, A) for V in (49152, 128256, 151936) for A in (256, 1024, 4096)
    }
    for x in r["rows"]:
        seconds = x["seconds"]
        assert x["median"] == {k: median(v) for k, v in seconds.items()}
        assert all(len(v) == r["repeats"] >= 5 for v in seconds.values())
        assert x["ratio"] == dict(
            memory=x["peak_bytes"]["chunked"] / x["peak_bytes"]["plain"],
            time=median([a / b for a, b in zip(seconds["chunked"], seconds["plain"], strict=True)]),
        )
    assert r["met"] == dict(
        memory=all(
            x["ratio"]["memory"] <= r["limits"]["memory"] for x in r["rows"] if x["A"] == 4096
        ),
        time=all(x["ratio"]["time"] <= r["limits"]["time"] for x in r["rows"]),
    )


def test_last_states_ratios_are_those_of_the_raw_figures():
    r = json.loads((bench / "last_states.json").read_text())
    assert {row["model"] for row in r["rows"]} == {"SmolLM2-135M", "Qwen3-1.7B"}
    for row in r["rows"]:
        seconds = row["seconds"]
        assert row["median"] == {k: median(v) for k, v in seconds.items()}
        assert all(len(v) == r["repeats"] >= 5 for v in seconds.values())
        for way in ("hidden", "plain"):
            pairs = zip(seconds[way], seconds["topk"], strict=True)
            assert row["ratio"][way] == median([a / b for a, b in pairs])
        K, b = r["top_k"], 4 if r["dtype"] == "float32" else 2
        assert row["kept_bytes"] == dict(topk=K * (b + 4) + 4, hidden=row["D"] * b)
        assert row["kept_bytes_bfloat16"] == dict(topk=K * 6 + 4, hidden=row["D"] * 2)
        assert row["peak_bytes"]["hidden"] < row["peak_bytes"]["plain"] / 4


def test_scalings_growth_is_that_of_the_raw_figures():
    r = json.loads((bench / "scaling.json").read_text())
    rows = r["context"] + r["answer"]
    assert [x["shots"] for x in r["context"]] == [0, 4, 8, 16] and all(
        len(v) == r["repeats"] >= 5 for x in rows for v in x["seconds"].values()
    )
    assert all(x["median"] == {k: median(v) for k, v in x["seconds"].items()} for x in rows)
    first, last = (r["context"][i]["seconds"] for i in (0, -1))
    assert r["growth"] == {
        m: median([b - a for a, b in zip(first[m], last[m], strict=True)]) for m in r["growth"]
    }


def gpu(script: str, *arguments) -> str:
    "What one of the GPU scripts prints."
    command = [sys.executable, f"benchmarks/gpu/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_gpu_commands_exist(tmp_path):
    """Every command that `measure.py` would run is accepted by the script that it names, as far as
    its arguments go."""
    listed = gpu("measure.py", "--out", tmp_path / "gpu", "--list", "--", "--repeats", "3")
    commands = [shlex.split(line) for line in listed.splitlines()]
    scripts = {Path(command[1]).name for command in commands}
    assert scripts == {"step_time.py", "paper_run.py", "loss_memory.py", "scaling.py"}
    assert len({command[-1] for command in commands}) == len(commands) > 20
    for script in {command[1] for command in commands}:
        asked = [sys.executable, script, "--help"]
        text = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout
        known = text.replace(",", " ").replace("[", " ").split()
        given = [part for command in commands if command[1] == script for part in command]
        assert {part for part in given if part.startswith("--")} <= set(known), script
    assert not (tmp_path / "gpu").exists()


@pytest.mark.slow
def test_measuring_goes_on_where_it_stopped(tmp_path):
    how = ("--out", tmp_path, "--device", "cpu", "--only", "loss_memory")
    assert "left for the next time: loss_memory" in gpu("measure.py", *how, "--minutes", "-1")
    assert "== loss_memory" in gpu("measure.py", *how)
    assert json.loads((tmp_path / "loss_memory.json").read_text())["environment"]["device"] == "cpu"
    assert "== loss_memory" not in gpu("measure.py", *how)


@pytest.mark.slow
def test_gsm8k_and_the_engines_run_as_they_are_told(tmp_path):
    "Two steps and a few items, on a CPU; transformers stands for both engines."
    rows = [
        {"question": f"What is {i} + 2?", "answer": f"It is {i + 2}.\n#### {i + 2}"}
        for i in range(40)
    ]
    for split, some in (("train", rows[:30]), ("test", rows[30:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    runs, out = tmp_path / "runs", tmp_path / "out"
    few = ["task.n_dev=4", "train.steps=2", "train.save_every=1", "evaluate.max_new_tokens=4"]
    few += ["train.batch_size=2", "train.warmup_steps=0", "context.n_shots=2"]
    where = ("--gsm8k", tmp_path, "--runs", runs, "--out", out)
    gpu("gsm8k.py", *where, "--seeds", 0, "--arms", "distill", "--", *few)
    assert list(read_results(out / "distill_0" / "evaluation" / "results.json").conditions) == [
        *("step_1", "step_2")
    ]
    assert not list(out.rglob("*.safetensors"))
    sys.path.insert(0, str(root / "benchmarks" / "gpu"))
    import engines

    args = SimpleNamespace(run=runs / "distill_0", overrides=[])
    found = [engines.answer(args, "transformers") for args.out in (out / "a", out / "b")]
    rows = engines.compared(*found)
    assert [row["condition"] for row in rows] == ["zero_shot", "few_shot", "step_1", "step_2"]
    assert all(row["same"] == row["n"] == 10 for row in rows)
