"Figures: from files only, complaints name the file, same files give same bytes, all in words."

import copy
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from icl_distill.core.files import InputError
from icl_distill.core.metrics import read_metrics
from icl_distill.core.record_lines import RecordLine, read_records
from icl_distill.core.results import Results, read_results
from icl_distill.core.strict import checked
from icl_distill.evaluation import figures
from icl_distill.evaluation.figures import (
    REPORTED,
    evaluated,
    group_runs,
    load_reported,
    make_assets,
    make_figures,
    reported,
    reported_results,
)
from icl_distill.evaluation.plots import (
    checkpoint_curve,
    cost_accuracy,
    flips,
    loss_curves,
    main_comparison,
)
from icl_distill.evaluation.statistics import mean_se, wilson
from icl_distill.evaluation.style import LOOKS, MORE_LOOKS, alt_text, save

QWEN, LLAMA = "Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-3B-Instruct"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def cell(right, n=200):
    return {
        "accuracy": right / n,
        "n": n,
        "ci95": list(wilson(right, n)),
        "truncated": 0.0,
        "accuracy_flexible": right / n,
        "mean_tokens": 100.0,
        "mean_prompt_tokens": 90.0,
        "n_shots": 0,
        "context": "none",
    }


def results(weight=0.0, seed=42, **conditions):
    "What a results file holds."
    few_shot = cell(90) | {"mean_prompt_tokens": 1000.0}
    usual = {
        "zero_shot": cell(50),
        "few_shot": few_shot,
        "step_200": cell(120),
        "step_400": cell(130),
    }
    return {
        "schema_version": 1,
        "model": "m",
        "task": "t",
        "split": "test",
        "set": "test",
        "conditions": conditions or usual,
        "paired": [],
        "engine": {"name": "fake", "why": "it is a test"},
        "environment": {},
        "seed": seed,
        "commit": "0123456789",
        "config": {"loss": {"weight": weight}, "seed": seed},
    }


def typed(arms):
    "Results of a dict, a dict of dicts, or a dict of lists of them."
    if "conditions" in arms:
        return checked(Results, arms, "results")
    return {
        name: [typed(seed) for seed in one] if isinstance(one, list) else typed(one)
        for name, one in arms.items()
    }


@pytest.fixture
def arms():
    distill = results(0.5, step_200=cell(140), step_400=cell(139))
    return {"SFT": results(), "SFT + distillation": distill}


def record(item, right, condition="c"):
    texts = dict.fromkeys(("prompt_hash", "text", "strict", "flexible", "gold"), "x")
    counts = {"n_prompt_tokens": 9, "n_tokens": 3}
    flags = {"correct": right, "correct_flexible": right, "truncated": False}
    return {"id": item, "condition": condition, "set": "test", **texts, **counts, **flags}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


HEADER = {"identity": {}, "hash": "x"}


def write_run(folder, data, records=None):
    place = folder / "evaluation"
    write_lines(place / "results.json", [data])
    logged = [{"step": s, "ce": 1 / s, "loss": 2 / s} for s in range(10, 310, 10)]
    write_lines(folder / "metrics.jsonl", logged)
    for condition, rights in (records or {}).items():
        rows = [record(f"i{i}", right, condition) for i, right in enumerate(rights)]
        write_lines(place / "records" / f"{condition}.jsonl", [HEADER, *rows])
    return folder


def test_light_imports():
    heavy = {"torch", "transformers", "matplotlib"}
    code = f"import sys, icl_distill.evaluation.figures; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def heights(fig):
    return [bar.get_height() for bar in fig.axes[0].patches]


def test_bars_are_the_files_numbers(arms):
    arms = typed(arms)
    fig = main_comparison(arms)
    np.testing.assert_allclose(heights(fig), [25, 45, 65, 69.5])  # base, base, last checkpoints
    np.testing.assert_allclose(heights(main_comparison(arms, step=200)), [25, 45, 60, 70])
    alt = alt_text(fig)
    for words in ("25.0%", "45.0%", "65.0%", "69.5%", "step 400", "n = 200", "0123456"):
        assert words in alt
    low, high = wilson(50, 200)
    assert f"({low:.1%} to {high:.1%})" in alt
    with pytest.raises(InputError, match=r"no checkpoint at step 300.*200, 400"):
        main_comparison(arms, step=300)


def test_dev_chooses(arms):
    for one in arms.values():
        one["selected"] = {"condition": "step_200", "accuracy_dev": 0.9, "n_dev": 50}
    for draw in (main_comparison, cost_accuracy):
        assert "SFT, step 200, chosen on dev" in alt_text(draw(typed(arms)))
    arms["SFT"]["selected"] = None
    assert "SFT, step 400 " in alt_text(main_comparison(typed(arms)))


def test_a_choice_on_test_data_is_said_to_be_one(arms):
    for one in arms.values():
        one["selected"] = {"condition": "step_200", "split": "test", "note": "the better one"}
    fig = main_comparison(typed(arms))
    assert "SFT, step 200*" in alt_text(fig)
    assert fig.axes[0].get_xlabel() == "* the better one"


def test_single_file_and_ax(arms):
    fig, ax = plt.subplots()
    assert main_comparison(typed(arms["SFT"]), ax) is fig
    assert "SFT, step 400" in alt_text(fig)
    assert "student" in alt_text(main_comparison(typed(results() | {"config": {}})))


def test_unequal_base_is_shown_twice(arms):
    conditions = arms["SFT + distillation"]["conditions"]
    conditions["zero_shot"] = cell(60)
    assert "zero_shot (SFT + distillation) 30.0%" in alt_text(main_comparison(typed(arms)))
    conditions["zero_shot"] = cell(50)
    assert alt_text(main_comparison(typed(arms))).count("0-shot") == 1


def test_curve(arms):
    fig = checkpoint_curve(typed(arms))
    line = next(line for line in fig.axes[0].lines if line.get_label() == "SFT")
    np.testing.assert_allclose(line.get_xydata(), [[200, 60], [400, 65]])
    with pytest.raises(InputError, match="no condition is a checkpoint"):
        checkpoint_curve(typed(results(zero_shot=cell(3))))


def test_seeds():
    seeds = [results(seed=i, step_200=cell(100 + 10 * i)) for i in range(3)]
    mean, _, low, high = mean_se([0.5, 0.55, 0.6])
    alt = alt_text(main_comparison(typed({"SFT": seeds})))
    assert f"3 seeds {mean:.1%} ({low:.1%} to {high:.1%})" in alt
    assert "seed 0, 1, 2" in alt
    seeds[1]["conditions"]["step_400"] = cell(1)
    with pytest.raises(InputError, match="different checkpoints"):
        checkpoint_curve(typed({"SFT": seeds}))


def test_cost_has_a_point_for_each_seed():
    seeds = [results(seed=i, step_200=cell(100 + 10 * i)) for i in range(2)]
    alt = alt_text(cost_accuracy(typed({"SFT": seeds})))
    assert "SFT, step 200 (seed 0) 190, 50.0%; SFT, step 200 (seed 1) 190, 55.0%" in alt


DIFFERENT = [("model", "other"), ("task", "other"), ("split", "dev"), ("set", "hard")]


@pytest.mark.parametrize(("key", "value"), DIFFERENT)
def test_incomparable(arms, key, value):
    arms["SFT + distillation"][key] = value
    for draw in (main_comparison, checkpoint_curve, cost_accuracy):
        with pytest.raises(InputError, match=f"another {key}"):
            draw(typed(arms))


def test_other_n(arms):
    arms["SFT"]["conditions"] = {"step_200": cell(5, 10)}
    with pytest.raises(InputError, match="another n"):
        main_comparison(typed(arms))


def test_measured_and_published_never_share_axes():
    published = reported_results(load_reported(), QWEN)["SFT"]
    same = {"model": QWEN, "task": "gsm8k"}
    ours = typed(results(step_200=cell(700, 1319)) | same)
    for arms in ({"ours": ours, "theirs": published}, {"theirs": published, "ours": ours}):
        for draw in (main_comparison, checkpoint_curve):
            with pytest.raises(InputError, match="another source"):
                draw(arms)


def broken():
    zero = ("conditions", "zero_shot")
    for path, value in [
        (("model",), None),
        (("conditions",), None),
        (("conditions",), {}),
        (zero, 3),
        ((*zero, "accuracy"), 25),
        ((*zero, "accuracy"), float("nan")),
        ((*zero, "n"), None),
        ((*zero, "n"), 0),
        ((*zero, "ci95"), None),
        ((*zero, "ci95"), [0.4, 0.2]),
    ]:
        data = inner = copy.deepcopy(results())
        for key in path[:-1]:
            inner = inner[key]
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        yield data


@pytest.mark.parametrize("bad", list(broken()))
def test_bad_results(bad, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(bad))
    with pytest.raises(InputError):
        checked(Results, bad, "results")
    with pytest.raises(InputError):
        read_results(file)
    with pytest.raises(InputError, match="results.json"):
        make_figures(file, tmp_path / "out")


def test_bad_files(tmp_path):
    file = tmp_path / "results.json"
    for text in ("", "{", "[]", "\x00"):
        file.write_text(text)
        for read in (read_results, main_comparison):
            with pytest.raises(InputError, match="results.json"):
                read(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "none.json")
    with pytest.raises(InputError, match="no such file"):
        make_figures(tmp_path / "none", tmp_path / "out")
    with pytest.raises(InputError):
        make_figures(file, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="train or evaluate first"):
        make_figures(tmp_path / "empty", tmp_path / "out")


def test_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    steps = ['{"step": 20, "ce": 1.5}\n'] * 2  # it was resumed at 10
    file.write_text('{"step": 10, "ce": 2}\n\n' + "".join(steps) + '{"step": 30, "ce": 1}\n')
    assert [row["step"] for row in read_metrics(file, "ce")] == [10, 20, 30]
    alt = alt_text(loss_curves({"SFT": tmp_path}))
    assert "from 2.00 at step 10 to 1.00" in alt
    bad = {
        '{"step": 40}': "line 6.*'ce'",
        '{"step": 40, "ce": NaN}': "line 6.*'ce'",
        "{": "line 6: not JSON",
        '{"ce": 1}': "'step'",
        "[1]": "'step'",
    }
    good = file.read_text()
    for line, what in bad.items():
        file.write_text(good + line + "\n")
        with pytest.raises(InputError, match=what):
            loss_curves({"SFT": tmp_path})
    file.write_text("")
    with pytest.raises(InputError, match="no step"):
        loss_curves({"SFT": tmp_path})
    with pytest.raises(InputError):
        loss_curves({})


def test_cost(arms):
    fig = cost_accuracy(typed(arms))
    assert len(fig.axes) == 1
    assert "1,100" in alt_text(fig)
    for one in arms.values():
        for condition in one["conditions"].values():
            condition.update(kv_bytes=2e6, latency=0.5)
    labels = [ax.get_xlabel().split(",")[0] for ax in cost_accuracy(typed(arms)).axes]
    assert labels == [
        "tokens per question (prompt + answer)",
        "key-value cache per question (MB)",
        "seconds per question",
    ]
    del arms["SFT"]["conditions"]["zero_shot"]["mean_tokens"]
    with pytest.raises(InputError, match="mean_tokens"):
        cost_accuracy(typed(arms))
    with pytest.raises(InputError, match="mean_tokens"):
        cost_accuracy(reported_results(load_reported(), QWEN))


def test_quickstart_arms_look_like_arms():
    fig = cost_accuracy(typed(results(zero_shot=cell(5), sft=cell(90), distill=cell(95))))
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == [
        "Base, 0-shot",
        "SFT",
        "SFT + distillation",
    ]
    assert fig.axes[0].get_xscale() == "linear"  # all cost about the same
    assert fig.axes[0].get_xlim()[0] == 0


def test_end_labels_keep_apart(tmp_path):
    for name, end in (("a", 0.30), ("b", 0.31)):
        rows = [{"step": step, "ce": end + 1 / step} for step in range(1, 40)]
        write_lines(tmp_path / name / "metrics.jsonl", rows)
    fig = loss_curves({"SFT": tmp_path / "a", "SFT + distillation": tmp_path / "b"})
    ends = [text for text in fig.axes[0].texts if text.get_text().startswith("0.3")]
    low, high = sorted(text.xy[1] for text in ends)
    assert high - low >= 0.04 * fig.axes[0].get_ylim()[1]


def lines(**rights):
    return [RecordLine.model_validate(record(item, right)) for item, right in rights.items()]


def test_flips(tmp_path):
    a, b = lines(x=True, y=True, z=False), lines(z=True, y=False, x=True)
    assert "both right 1, only A 1, only B 1, neither 0" in alt_text(flips(a, b, ("A", "B")))
    with pytest.raises(InputError, match="same items"):
        flips(a, b[:2])
    with pytest.raises(InputError, match="twice"):
        flips(a, b + b)
    with pytest.raises(InputError, match="no items"):
        flips([], [])
    file = tmp_path / "r.jsonl"
    bad = record("x", True)
    for one in ({"id": "x"}, {"correct": True}, bad | {"correct": 1}, 3):
        write_lines(file, [HEADER, one])
        with pytest.raises(InputError):
            read_records(file)


def test_records_file(tmp_path):
    file = tmp_path / "r.jsonl"
    write_lines(file, [HEADER, record("x", True), record("y", True), {"seconds": 1.5, "n": 1}])
    whole = read_records(file)
    assert [(line.id, line.correct) for line in whole] == [("x", True), ("y", True)]
    write_lines(file, [HEADER, record("x", True)])
    with file.open("a") as f:
        f.write('{"id": "y", "corr')  # killed while writing
    with pytest.raises(InputError, match="run the evaluation again"):
        flips(whole, read_records(file))


def pair(a, b):
    numbers = {"n": 200, "difference": 0.0, "difference_ci95": [0, 0], "p_mcnemar": 1.0}
    return {"a": a, "b": b, "set": "test", "only_a": 0, "only_b": 0, **numbers}


def test_make_figures(tmp_path):
    right = {"step_200": [True] * 120 + [False] * 80, "step_400": [False] * 70 + [True] * 130}
    pairs = [pair("step_200", "step_400"), pair("step_200", "few_shot")]
    write_run(tmp_path / "runs" / "a", results() | {"paired": pairs}, right)
    write_run(tmp_path / "runs" / "b", results(0.5))
    made = make_figures(tmp_path / "runs", tmp_path / "out")
    assert [path.name for path in made] == [
        "main_comparison.png",
        "checkpoints.png",
        "cost.png",
        "flips_1.png",
        "loss.png",
        "alt.json",
    ]
    alts = json.loads(made[-1].read_text())
    assert set(alts) == {path.name for path in made[:-1]}
    assert all(len(alt) > 60 for alt in alts.values())
    assert "SFT + distillation, step 400" in alts["main_comparison.png"]
    assert "only step_200 70" in alts["flips_1.png"]
    assert str(tmp_path) not in json.dumps(alts)
    again = make_figures(tmp_path / "runs", tmp_path / "again")
    for first, second in zip(made, again, strict=True):
        assert first.read_bytes() == second.read_bytes()
    with Image.open(made[0]) as image:
        assert set(image.info) <= {"dpi", "Description"}
        assert image.info["Description"] == alts["main_comparison.png"]
    names = [path.name for path in make_figures(tmp_path / "runs" / "b", tmp_path / "one")]
    assert names == ["main_comparison.png", "checkpoints.png", "cost.png", "loss.png", "alt.json"]
    file = tmp_path / "runs" / "a" / "evaluation" / "results.json"
    names = [path.name for path in make_figures(file, tmp_path / "file")]
    assert names[-2:] == ["flips_1.png", "alt.json"]


def test_groups(tmp_path):
    runs = {
        "a": results(seed=0),
        "b": results(seed=1),
        "c": results(0.5),
        "d": results(zero_shot=cell(50)),
        "e": results() | {"model": "other"},
        "f": results(0.5) | {"config": {"loss": {"weight": 1.0}}},
    }
    for name, data in runs.items():
        write_run(tmp_path / name, data)
    groups = group_runs(evaluated(tmp_path))
    assert [{name: len(seeds) for name, seeds in group.items()} for group in groups] == [
        {"SFT": 2, "SFT + distillation: c": 1, "base": 1, "SFT + distillation: f": 1},
        {"SFT": 1},
    ]
    names = [path.name for path in make_figures(tmp_path, tmp_path / "out")]
    assert {"main_comparison_1.png", "main_comparison_2.png", "loss.png"} <= set(names)


def test_only_a_training(tmp_path):
    write_run(tmp_path / "a", results())
    (tmp_path / "a" / "evaluation" / "results.json").unlink()
    names = [path.name for path in make_figures(tmp_path / "a", tmp_path / "out")]
    assert names == ["loss.png", "alt.json"]


def test_reported_numbers():
    published = load_reported()
    assert published.publication.label == "reported"
    assert published.publication.source.commit
    assert published.publication.caveats
    chosen = [one for one in published.results if one.selected]
    assert [(one.model, one.provenance.arm) for one in chosen] == [
        (model, arm) for model in (QWEN, LLAMA) for arm in ("SFT", "SFT + distillation")
    ]
    for one in chosen:
        best = max(condition.accuracy for condition in one.conditions.values())
        assert one.conditions[one.selected.condition].accuracy == best
        for key in ("final_ce", "loss_curve"):
            known = getattr(one.provenance, key) is not None
            assert known or one.provenance.notes[key].startswith("not available to us")
    for model in (QWEN, LLAMA):
        base = reported_results(published, model)["base"]
        controls = set(reported_results(published, model, "controls")) - {"base"}
        assert controls or base.provenance.notes["controls"].startswith("not available to us")
    for one in published.results:
        for condition in one.conditions.values():
            right = round(condition.accuracy * condition.n)  # a whole number of items
            assert round(right / condition.n, 4) == condition.accuracy


@pytest.mark.parametrize("kind", list(REPORTED))
@pytest.mark.parametrize("model", [QWEN, LLAMA])
def test_reported_figures(kind, model):
    fig = reported(kind, model)
    assert any("REPORTED" in text.get_text() for text in fig.axes[0].texts)
    assert "reported" in alt_text(fig)
    if kind in ("loss", "controls") and model == LLAMA:
        assert "not available to us" in alt_text(fig)


def test_reported_refuses(tmp_path):
    for wrong in ({"kind": "pie"}, {"model": "gpt"}, {"path": tmp_path / "none.json"}):
        with pytest.raises(InputError):
            reported(**wrong)
    file = tmp_path / "r.json"
    file.write_text('{"models": {}}')
    with pytest.raises(InputError, match="publication"):
        load_reported(file)
    published = json.loads(load_reported().model_dump_json())
    published["publication"]["label"] = "measured"
    file.write_text(json.dumps(published))
    with pytest.raises(InputError, match="label"):
        load_reported(file)


def test_reported_missing_number(tmp_path):
    file = tmp_path / "r.json"
    published = json.loads((Path(__file__).parent.parent / "results" / "reported.json").read_text())
    arms = {
        one["provenance"]["arm"]: one["conditions"]
        for one in published["results"]
        if one["model"] == QWEN and one["provenance"]["study"] == "main"
    }
    del arms["base"]["few_shot"]
    del arms["SFT"]["step_800"]
    file.write_text(json.dumps(published))
    for kind in ("bars", "checkpoints"):
        fig = reported(kind, path=file)
        assert "few-shot not available to us" in alt_text(fig)
        texts = [text.get_text() for text in fig.axes[0].texts]
        assert any(
            text.startswith("Base, few-shot") and "not available to us" in text for text in texts
        )
        assert ("SFT not available to us" in alt_text(fig)) == (kind == "checkpoints")


def test_assets(arms, tmp_path):
    made = make_assets(tmp_path, main=typed(arms))
    alts = json.loads(made[-1].read_text())
    assert [path.name for path in made] == [
        "main_comparison.png",
        "llama_comparison.png",
        "loss_comparison.png",
        "alt.json",
    ]
    assert "eported" not in alts["main_comparison.png"]
    for name in ("llama_comparison.png", "loss_comparison.png"):
        assert "reported" in alts[name]


def test_the_front_page_shows_what_the_file_holds(tmp_path):
    made = make_assets(tmp_path)
    alts = json.loads(made[-1].read_text())
    for model, name in ((QWEN, "main_comparison.png"), (LLAMA, "llama_comparison.png")):
        for one in reported_results(load_reported(), model).values():
            for condition in one.conditions.values():
                assert f"{condition.accuracy:.2%}" in alts[name]
    assets = Path(__file__).parent.parent / "assets"
    assert json.loads((assets / "alt.json").read_text()) == alts


TELEPHONE, LEAST = 400, 8  # pixels: the width of a page, and of letters on it


def too_small(fig):
    "Texts of a figure that nobody can read on a telephone."
    scale = TELEPHONE / (72 * fig.get_figwidth())  # pixels to a point
    shown = [t for t in fig.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]
    return {t.get_text() for t in shown if t.get_fontsize() * scale < LEAST}


def test_text_is_readable_on_a_telephone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda fig, path: drawn.append(fig) or path)
    make_assets(tmp_path / "assets")
    results = Path(__file__).parent.parent / "results"
    for folder in ("quickstart", "objectives"):
        make_figures(results / folder, tmp_path / folder)
    assert len(drawn) > 10 and [small for fig in drawn if (small := too_small(fig))] == []
    fig = plt.figure(figsize=(9, 3))
    fig.text(0, 0, "too small", fontsize=8)
    assert too_small(fig) == {"too small"}


def linear(color):
    "Red, green and blue as light."
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lightness(color):
    "L* of CIELAB."
    return 116 * (linear(color) @ [0.2126, 0.7152, 0.0722]) ** (1 / 3) - 16


def test_colours():
    """Told apart by grey printers, and with the two common kinds of colour blindness.

    The matrices are those of Machado (2009) at full severity, deuteranopia and protanopia.
    """
    colors = [look.color for look in LOOKS.values()]
    light = [lightness(color) for color in colors]
    assert all(before - after > 12 for before, after in zip(light, light[1:], strict=False))
    deutan = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    protan = [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
    for matrix in (deutan, protan):
        light = np.array([linear(color) for color in colors])
        seen = np.clip(light @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(apart) > 0.15
    looks = [*LOOKS.values(), *MORE_LOOKS]
    assert len({look.marker for look in looks}) == len(looks)


def test_style_is_put_back(arms):
    before = dict(plt.rcParams)
    main_comparison(typed(arms))
    with pytest.raises(InputError):
        main_comparison(typed(arms), step=1)
    assert dict(plt.rcParams) == before


def test_save_makes_folders(arms, tmp_path):
    path = save(main_comparison(typed(arms)), tmp_path / "a" / "b.png")
    assert path.exists()
    assert not plt.get_fignums()
