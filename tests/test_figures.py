"Figures: drawn from files only, complaints name the file, same files give the same bytes, and every figure has words."
import copy, json, subprocess, sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from icl_distill.figures import (LOOKS, MORE, REPORTED, alt_text, checkpoint_curve, cost_accuracy, find_runs, flips, group_runs, load_metrics, load_records,
    load_reported, load_results, loss_curves, main_comparison, make_assets, make_figures, reported, save)
from icl_distill.hub import InputError
from icl_distill.statistics import mean_se, wilson


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def cell(k, n=200):
    return dict(accuracy=k/n, n=n, ci95=list(wilson(k, n)), truncated=0., accuracy_flexible=k/n, mean_tokens=100., mean_prompt_tokens=90.)


def results(weight=0., seed=42, **conditions):
    c = conditions or dict(zero_shot=cell(50), few_shot=cell(90)|dict(mean_prompt_tokens=1000.), step_200=cell(120), step_400=cell(130))
    return dict(model="m", task="t", split="test", conditions=c, paired=[], seed=seed, commit="0123456789", config=dict(loss=dict(weight=weight), seed=seed))


@pytest.fixture
def arms(): return {"SFT": results(), "SFT + distillation": results(.5, step_200=cell(140), step_400=cell(139))}


def write_run(d, r, records=None):
    (d/"evaluation"/"records").mkdir(parents=True)
    (d/"evaluation"/"results.json").write_text(json.dumps(r))
    (d/"metrics.jsonl").write_text("".join(json.dumps(dict(step=s, ce=1/s, loss=2/s))+"\n" for s in range(10, 310, 10)))
    for c, right in (records or {}).items():
        lines = [json.dumps(dict(config_hash="x"))]+[json.dumps(dict(id=f"i{i}", condition=c, set="test", correct=v)) for i, v in enumerate(right)]
        (d/"evaluation"/"records"/f"{c}.jsonl").write_text("\n".join(lines)+"\n")
    return d


def test_no_torch():
    code = "import sys, icl_distill.figures; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def heights(fig): return [p.get_height() for p in fig.axes[0].patches]


def test_bars_are_the_files_numbers(arms):
    fig = main_comparison(arms)
    np.testing.assert_allclose(heights(fig), [25, 45, 65, 69.5])          # base, base, last checkpoints
    np.testing.assert_allclose(heights(main_comparison(arms, step=200)), [25, 45, 60, 70])
    alt = alt_text(fig)
    for s in ("25.0%", "45.0%", "65.0%", "69.5%", "step 400", "n = 200", "0123456"): assert s in alt
    lo, hi = wilson(50, 200)
    assert f"({lo:.1%} to {hi:.1%})" in alt
    with pytest.raises(InputError, match=r"no checkpoint at step 300.*200, 400"): main_comparison(arms, step=300)


def test_dev_chooses(arms):
    for r in arms.values(): r["selected"] = dict(condition="step_200", accuracy_dev=.9, n_dev=50)
    for draw in (main_comparison, cost_accuracy): assert "SFT, step 200, chosen on dev" in alt_text(draw(arms))
    arms["SFT"]["selected"] = None
    assert "SFT, step 400 " in alt_text(main_comparison(arms))


def test_single_file_and_ax(arms):
    fig, ax = plt.subplots()
    assert main_comparison(arms["SFT"], ax) is fig and "SFT, step 400" in alt_text(fig)
    assert "student" in alt_text(main_comparison({k: v for k, v in results().items() if k != "config"}))


def test_unequal_base_is_shown_twice(arms):
    arms["SFT + distillation"]["conditions"]["zero_shot"] = cell(60)
    assert "zero_shot (SFT + distillation) 30.0%" in alt_text(main_comparison(arms))
    arms["SFT + distillation"]["conditions"]["zero_shot"] = cell(50)
    assert alt_text(main_comparison(arms)).count("0-shot") == 1


def test_curve(arms):
    fig = checkpoint_curve(arms)
    line = next(l for l in fig.axes[0].lines if l.get_label() == "SFT")
    np.testing.assert_allclose(line.get_xydata(), [[200, 60], [400, 65]])
    with pytest.raises(InputError, match="no condition is a checkpoint"): checkpoint_curve(results(zero_shot=cell(3)))


def test_seeds(arms):
    rs = [results(seed=i, step_200=cell(100+10*i)) for i in range(3)]
    mean, _, lo, hi = mean_se([.5, .55, .6])
    alt = alt_text(main_comparison({"SFT": rs}))
    assert f"3 seeds {mean:.1%} ({lo:.1%} to {hi:.1%})" in alt and "seed 0, 1, 2" in alt
    rs[1]["conditions"]["step_400"] = cell(1)
    with pytest.raises(InputError, match="different checkpoints"): checkpoint_curve({"SFT": rs})


@pytest.mark.parametrize("key,value", [("model", "other"), ("task", "other"), ("split", "dev"), ("set", "hard")])
def test_incomparable(arms, key, value):
    arms["SFT + distillation"][key] = value
    for draw in (main_comparison, checkpoint_curve, cost_accuracy):
        with pytest.raises(InputError, match=f"another {key}"): draw(arms)


def test_other_n(arms):
    arms["SFT"]["conditions"] = {"step_200": cell(5, 10)}
    with pytest.raises(InputError, match="another n"): main_comparison(arms)


def broken():
    r = results()
    zero = ("conditions", "zero_shot")
    for path, v in [(("model",), None), (("conditions",), None), (("conditions",), {}), (zero, 3),
                    ((*zero, "accuracy"), 25), ((*zero, "accuracy"), float("nan")),
                    ((*zero, "n"), None), ((*zero, "n"), 0), ((*zero, "ci95"), None), ((*zero, "ci95"), [.4, .2])]:
        b = d = copy.deepcopy(r)
        for p in path[:-1]: d = d[p]
        if v is None: del d[path[-1]]
        else: d[path[-1]] = v
        yield b


@pytest.mark.parametrize("bad", list(broken()))
def test_bad_results(bad, tmp_path):
    f = tmp_path/"results.json"
    f.write_text(json.dumps(bad))
    for x in (bad, f):
        with pytest.raises(InputError): load_results(x)
    with pytest.raises(InputError, match="results.json"): make_figures(f, tmp_path/"out")


def test_bad_files(tmp_path):
    f = tmp_path/"results.json"
    for text in ("", "{", "[]", "\x00"):
        f.write_text(text)
        with pytest.raises(InputError, match="results.json"): load_results(f)
    with pytest.raises(InputError, match="cannot be read"): load_results(tmp_path/"none.json")
    with pytest.raises(InputError, match="no such file"): make_figures(tmp_path/"none", tmp_path/"out")
    with pytest.raises(InputError): make_figures(tmp_path/"results.json", tmp_path/"out")
    (tmp_path/"empty").mkdir()
    with pytest.raises(InputError, match="train or evaluate first"): find_runs(tmp_path/"empty")


def test_metrics(tmp_path):
    f = tmp_path/"metrics.jsonl"
    f.write_text('{"step": 10, "ce": 2}\n\n{"step": 20, "ce": 1.5}\n{"step": 20, "ce": 1.5}\n{"step": 30, "ce": 1}\n')   # resumed at 10
    assert [r["step"] for r in load_metrics(tmp_path, "ce")] == [10, 20, 30]
    alt = alt_text(loss_curves({"SFT": tmp_path}))
    assert "from 2.00 at step 10 to 1.00" in alt
    bad = {'{"step": 40}': "line 6.*'ce'", '{"step": 40, "ce": NaN}': "line 6.*'ce'", "{": "line 6: not JSON", '{"ce": 1}': "'step'", "[1]": "'step'"}
    for line, what in bad.items():
        g = tmp_path/"bad.jsonl"
        g.write_text(f.read_text()+line+"\n")
        with pytest.raises(InputError, match=what): load_metrics(g, "ce")
    f.write_text("")
    with pytest.raises(InputError, match="no step"): load_metrics(f)
    with pytest.raises(InputError): loss_curves({})


def test_cost(arms):
    fig = cost_accuracy(arms)
    assert len(fig.axes) == 1 and "1,100" in alt_text(fig)
    for r in arms.values():
        for c in r["conditions"].values(): c.update(kv_bytes=2e6, latency=.5)
    labels = [ax.get_xlabel().split(",")[0] for ax in cost_accuracy(arms).axes]
    assert labels == ["tokens per question (prompt + answer)", "key-value cache per question (MB)", "seconds per question"]
    del arms["SFT"]["conditions"]["zero_shot"]["mean_tokens"]
    for r in arms.values():
        for c in r["conditions"].values(): [c.pop(k, None) for k in ("kv_bytes", "latency")]
    with pytest.raises(InputError, match="mean_tokens"): cost_accuracy(arms)


def test_quickstart_arms_look_like_arms():
    r = results(zero_shot=cell(5), sft=cell(90), distill=cell(95))
    fig = cost_accuracy(r)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ["Base, 0-shot", "SFT", "SFT + distillation"]
    assert fig.axes[0].get_xscale() == "linear" and fig.axes[0].get_xlim()[0] == 0   # all cost about the same


def test_end_labels_keep_apart(tmp_path):
    for name, end in (("a", .30), ("b", .31)):
        (tmp_path/name).mkdir()
        (tmp_path/name/"metrics.jsonl").write_text("".join(json.dumps(dict(step=s, ce=end+1/s))+"\n" for s in range(1, 40)))
    fig = loss_curves({"SFT": tmp_path/"a", "SFT + distillation": tmp_path/"b"})
    a, b = sorted(t.xy[1] for t in fig.axes[0].texts if t.get_text().startswith("0.3"))
    assert b-a >= .04*fig.axes[0].get_ylim()[1]


def rec(i, ok): return dict(id=i, correct=ok)


def test_flips():
    a, b = [rec("x", True), rec("y", True), rec("z", False)], [rec("z", True), rec("y", False), rec("x", True)]
    assert "both right 1, only A 1, only B 1, neither 0" in alt_text(flips(a, b, ("A", "B")))
    with pytest.raises(InputError, match="same items"): flips(a, b[:2])
    with pytest.raises(InputError, match="twice"): flips(a, b+b)
    for bad in ([], [dict(id="x")], [dict(correct=True)], [dict(id="x", correct=1)], [3]):
        with pytest.raises(InputError): load_records(bad)


def test_records_file(tmp_path):
    f = tmp_path/"r.jsonl"
    f.write_text('{"config_hash": "h"}\n{"id": "x", "correct": true}\n{"seconds": 1.5, "n": 1}\n')
    assert load_records(f) == {("test", "x"): True}
    f.write_text('{"config_hash": "h"}\n{"id": "x", "corr')               # killed while writing
    with pytest.raises(InputError, match="run the evaluation again"): load_records(f)


def test_make_figures(tmp_path):
    right = {"step_200": [True]*120+[False]*80, "step_400": [False]*70+[True]*130}
    r = results()|dict(paired=[dict(a="step_200", b="step_400", n=200), dict(a="step_200", b="few_shot", n=200)])
    write_run(tmp_path/"runs"/"a", r, right)
    write_run(tmp_path/"runs"/"b", results(.5))
    made = make_figures(tmp_path/"runs", tmp_path/"out")
    assert [p.name for p in made] == ["main_comparison.png", "checkpoints.png", "cost.png", "flips_1.png", "loss.png", "alt.json"]
    alts = json.loads(made[-1].read_text())
    assert set(alts) == {p.name for p in made[:-1]} and all(len(a) > 60 for a in alts.values())
    assert "SFT + distillation, step 400" in alts["main_comparison.png"] and "only step_200 70" in alts["flips_1.png"] and str(tmp_path) not in json.dumps(alts)
    again = make_figures(tmp_path/"runs", tmp_path/"again")
    for p, q in zip(made, again): assert p.read_bytes() == q.read_bytes()
    with Image.open(made[0]) as im: assert set(im.info) <= {"dpi", "Description"} and im.info["Description"] == alts["main_comparison.png"]
    names = [p.name for p in make_figures(tmp_path/"runs"/"b", tmp_path/"one")]
    assert names == ["main_comparison.png", "checkpoints.png", "cost.png", "loss.png", "alt.json"]


def test_groups(tmp_path):
    runs = dict(a=results(seed=0), b=results(seed=1), c=results(.5), d=results(zero_shot=cell(50)), e=results()|dict(model="other"))
    for name, r in runs.items(): write_run(tmp_path/name, r)
    write_run(tmp_path/"f", results(.5)|dict(config=dict(loss=dict(weight=1.))))
    groups = group_runs(find_runs(tmp_path))
    assert [{k: len(v) for k, v in g.items()} for g in groups] == [{"SFT": 2, "SFT + distillation: c": 1, "base": 1, "SFT + distillation: f": 1}, {"SFT": 1}]
    names = [p.name for p in make_figures(tmp_path, tmp_path/"out")]
    assert {"main_comparison_1.png", "main_comparison_2.png", "loss.png"} <= set(names)


def test_only_a_training(tmp_path):
    write_run(tmp_path/"a", results())
    (tmp_path/"a"/"evaluation"/"results.json").unlink()
    assert [p.name for p in make_figures(tmp_path/"a", tmp_path/"out")] == ["loss.png", "alt.json"]


def test_reported_numbers():
    d = load_reported()
    assert d["label"] == "reported" and d["source"]["commit"] and d["caveats"]
    for m in d["models"].values():
        for arm in ("SFT", "SFT + distillation"): assert m["conditions"][arm]["accuracy"] == max(m["checkpoints"][arm])
        for acc in [c["accuracy"] for c in m["conditions"].values()]+m["checkpoints"]["SFT"]+m["checkpoints"]["SFT + distillation"]:
            assert round(round(acc*m["n"])/m["n"], 4) == acc              # a whole number of items
        for k, v in m.items(): assert v is not None or m[f"{k}_note"].startswith("not available to us")


@pytest.mark.parametrize("kind", list(REPORTED))
@pytest.mark.parametrize("model", ["Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-3B-Instruct"])
def test_reported_figures(kind, model):
    fig = reported(kind, model)
    assert any("REPORTED" in t.get_text() for t in fig.axes[0].texts) and "reported" in alt_text(fig)
    if kind in ("loss", "controls") and "Llama" in model: assert "not available to us" in alt_text(fig)


def test_reported_refuses(tmp_path):
    for kw in (dict(kind="pie"), dict(model="gpt"), dict(path=tmp_path/"none.json")):
        with pytest.raises(InputError): reported(**kw)
    (tmp_path/"r.json").write_text('{"models": {}}')
    with pytest.raises(InputError, match="label"): load_reported(tmp_path/"r.json")


def test_reported_missing_number(tmp_path):
    d = load_reported()
    d["models"]["Qwen/Qwen3-1.7B"]["conditions"]["few_shot"] = {"accuracy": None}
    d["models"]["Qwen/Qwen3-1.7B"]["checkpoints"]["SFT"][1] = None
    (tmp_path/"r.json").write_text(json.dumps(d))
    for kind in ("bars", "checkpoints"):
        fig = reported(kind, path=tmp_path/"r.json")
        assert "few-shot not available to us" in alt_text(fig)
        assert any(t.get_text().startswith("Base, few-shot") and "not available to us" in t.get_text() for t in fig.axes[0].texts)
        assert ("SFT not available to us" in alt_text(fig)) == (kind == "checkpoints")


def test_assets(arms, tmp_path):
    made = make_assets(tmp_path, main=arms)
    alts = json.loads(made[-1].read_text())
    assert [p.name for p in made] == ["main_comparison.png", "llama_comparison.png", "loss_comparison.png", "alt.json"]
    assert "eported" not in alts["main_comparison.png"] and all("reported" in alts[k] for k in ("llama_comparison.png", "loss_comparison.png"))


def lightness(color):
    r, g, b = [c/12.92 if c <= .04045 else ((c+.055)/1.055)**2.4 for c in matplotlib.colors.to_rgb(color)]
    return 116*(.2126*r+.7152*g+.0722*b)**(1/3)-16


def test_colours():
    "Grey printers, and the two common kinds of colour blindness (Machado 2009, full severity): no two main looks come close."
    L = [lightness(v["color"]) for v in LOOKS.values()]
    assert min(abs(a-b) for i, a in enumerate(L) for b in L[:i]) > 12
    deutan = np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]])
    protan = np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]])
    rgb = np.array([matplotlib.colors.to_rgb(v["color"]) for v in LOOKS.values()])
    lin = np.where(rgb <= .04045, rgb/12.92, ((rgb+.055)/1.055)**2.4)
    for m in (deutan, protan):
        seen = np.clip(lin@m.T, 0, 1)**(1/2.2)
        assert min(np.linalg.norm(a-b) for i, a in enumerate(seen) for b in seen[:i]) > .15
    looks = [*LOOKS.values(), *MORE]
    assert len({v["marker"] for v in looks}) == len(looks)


def test_style_is_put_back(arms):
    before = dict(plt.rcParams)
    main_comparison(arms)
    with pytest.raises(InputError): main_comparison(arms, step=1)
    assert dict(plt.rcParams) == before


def test_save_makes_folders(arms, tmp_path):
    assert save(main_comparison(arms), tmp_path/"a"/"b.png").exists() and not plt.get_fignums()
