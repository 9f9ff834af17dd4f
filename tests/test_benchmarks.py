"Benchmarks: results files say what their raw figures say; the GPU scripts name commands that exist."
import json, shlex, subprocess, sys
from pathlib import Path
from statistics import median

import pytest

root = Path(__file__).resolve().parent.parent
bench = root/"results"/"bench"

@pytest.mark.parametrize("name", ["step_time", "peers"])
def test_medians_and_ratios_are_those_of_the_raw_figures(name):
    r = json.loads((bench/f"{name}.json").read_text())
    assert r["data"] == "gsm8k" and r["repeats"] >= 5 and all(len(v) == r["repeats"] for v in r["seconds"].values())
    assert r["median"] == {k: median(v) for k, v in r["seconds"].items()}
    m = r["median"]
    if name == "peers": assert r["ratio"]["trl_sdft_over_online"] == m["trl_sdft"]/m["distill_online"] and r["ratio"]["sft_over_transformers_sft"] == m["sft"]/m["transformers_sft"]
    else:
        assert r["ratio_to_sft"] == {k: v/m["sft"] for k, v in m.items()} and r["memory_ratio_to_sft"] == {k: v/r["peak_bytes"]["sft"] for k, v in r["peak_bytes"].items()}
        assert r["met"]["online"] == (r["ratio_to_sft"]["distill_online"] <= r["limits"]["online"]) and all(len(v) == r["repeats"] for v in r["tokens"].values())

def test_gpu_commands_exist(tmp_path):
    "Every command that `measure.py` would run is accepted by the script that it names, as far as its arguments go."
    done = subprocess.run([sys.executable, "benchmarks/gpu/measure.py", "--out", tmp_path/"gpu", "--list"], cwd=root, capture_output=True, text=True)
    commands = [shlex.split(l) for l in done.stdout.splitlines()]
    assert done.returncode == 0 and len(commands) > 10 and {"step_time.py", "loss_memory.py", "scaling.py"} == {Path(c[1]).name for c in commands}
    for script in {c[1] for c in commands}:
        text = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
        assert {a for c in commands if c[1] == script for a in c if a.startswith("--")} <= set(text.replace(",", " ").replace("[", " ").split()), script
    assert not list((tmp_path/"gpu").iterdir())
