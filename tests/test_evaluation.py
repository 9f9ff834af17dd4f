"Records that can be interrupted, numbers that can be trusted, conditions that cannot be mixed up."

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from scipy import stats
from statsmodels.stats.multitest import multipletests

from icl_distill.core.config import (
    Config,
    ContextConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    PromptConfig,
    TaskConfig,
    TeacherConfig,
    config_dict,
    load_config,
    replace,
    to_yaml,
)
from icl_distill.core.files import InputError, run_lock
from icl_distill.core.record_lines import RecordLine
from icl_distill.core.results import ConditionResult, Results, read_results, write_results
from icl_distill.core.checkpoints import find_checkpoints
from icl_distill.core.runs import Evaluation, Run
from icl_distill.data.contexts import Context
from icl_distill.data.prompts import Prompter
from icl_distill.data.tasks import load_task
from icl_distill.evaluation.browse import SHOW, answered, browse, chosen, page, records_frame
from icl_distill.evaluation.conditions import (
    Condition,
    base_condition,
    find_conditions,
    item_sets,
    make_prompts,
)
from icl_distill.evaluation.evaluate import config_for_evaluation, evaluate
from icl_distill.evaluation.power import detectable_difference
from icl_distill.evaluation.scores import completed, detectable, pairs_of, selected, summary
from icl_distill.evaluation.seeds import report, what_matters, with_baseline
from icl_distill.evaluation.shards import Shard
from icl_distill.evaluation.statistics import combine_seeds, mcnemar_exact, wilson
from icl_distill.evaluation.tables import as_csv, markdown, print_table, table_rows
from icl_distill.models.generation import TransformersEngine
from icl_distill.models.loading import weights_hash
from icl_distill.testing import FakeEngine as Fake
from icl_distill.testing import counting_questions as write_set
from icl_distill.testing import fake_run as run_with_checkpoints
from icl_distill.testing import (
    REAL_MODEL,
    quiet_environment,
    real_tokenizer,
    square_task,
    tiny_folder,
    tiny_model,
)

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture(scope="session")
def tok():
    return real_tokenizer()


def squeezed(table: str) -> str:
    "A markdown table without the spaces that align it."
    return re.sub(r" +", " ", table)


@pytest.fixture
def cfg(tmp_path):
    f = {
        k: write_set(tmp_path / f"{k}.jsonl", k, n)
        for k, n in dict(train=30, dev=12, test=20, hard=6).items()
    }
    return Config(
        model=ModelConfig(name=REAL_MODEL, dtype="float32"),
        task=TaskConfig(
            name="jsonl",
            path=f["train"],
            dev_path=f["dev"],
            test_path=f["test"],
            test_sets={"hard": f["hard"]},
        ),
        prompt=PromptConfig(template="plain"),
        context=ContextConfig(n_shots=3),
        evaluate=EvaluateConfig(max_new_tokens=12, engine="transformers"),
        run=str(tmp_path / "run"),
    )


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def items(path):
    return [r for r in lines(path) if "id" in r]


def fake_run(folder, steps=(10, 20), **info):
    return str(run_with_checkpoints(folder, steps, **info).path)


def unsealed(checkpoint):
    "Without the hashes of its files, so that a test may put others in their place."
    path = Path(checkpoint) / "checkpoint.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "files"})
    )
    return Path(checkpoint)


def on(cfg, **kw):
    return replace(cfg, evaluate=replace(cfg.evaluate, **kw))


def go(cfg, engine, **kw):
    return evaluate(cfg, engine=engine, progress=False, **kw)


def test_results_and_files(cfg, tok):
    res = go(cfg, Fake(tok, lambda arm, i: i % 2 == 0 or arm == "few_shot" and i < 15))
    folder = Path(cfg.run) / "evaluation"
    assert read_results(folder / "results.json") == res
    assert {
        "model",
        "task",
        "split",
        "conditions",
        "paired",
        "environment",
        "config",
        "seed",
        "commit",
    } <= set(json.loads((folder / "results.json").read_text()))
    z, f = res.conditions["zero_shot"], res.conditions["few_shot"]
    assert (z.n, z.accuracy, z.ci95, z.truncated) == (20, 0.5, wilson(10, 20), 0.5)
    assert f.accuracy == 17 / 20
    assert z.sets["hard"].n == 6 and f.sets["hard"].accuracy == 1
    assert f.n_shots == 3 and z.n_shots == 0
    assert f.kv_bytes > z.kv_bytes > 0 and z.seconds > 0 and z.latency > 0
    assert f.mean_prompt_tokens > 2 * z.mean_prompt_tokens
    p = next(p for p in res.paired if p.set == "test")
    a, b = (
        [
            r["correct"]
            for r in sorted(items(folder / "records" / f"{c}.jsonl"), key=lambda r: r["id"])
        ]
        for c in ("few_shot", "zero_shot")
    )
    assert (p.a, p.b, p.n) == ("few_shot", "zero_shot", 20)
    assert p.difference == pytest.approx(0.35) and p.p_mcnemar == mcnemar_exact(a, b)
    assert {p.set for p in res.paired} == {"test", "hard"}
    row = items(folder / "records" / "zero_shot.jsonl")[0]
    assert set(row) == {
        "id",
        "condition",
        "set",
        "prompt_hash",
        "n_prompt_tokens",
        "text",
        "strict",
        "flexible",
        "gold",
        "correct",
        "correct_flexible",
        "n_tokens",
        "truncated",
    }
    assert (
        "| few_shot | 20 | 85.0 %" in squeezed(markdown(res))
        and "hard" in markdown(res)
        and as_csv(res).count("\n") == 5
    )
    assert (folder / "results.md").read_text() == markdown(res) and not list(folder.glob(".*"))


def test_the_same_call_asks_nothing_again(cfg, tok):
    e = Fake(tok)
    first = go(cfg, e)
    n = len(e.asked)
    assert go(cfg, e) == first and len(e.asked) == n == 52


def test_the_accuracy_so_far_is_counted_on(cfg, tok, monkeypatch):
    "An answer costs the same, however many there are: no row is looked at again."
    from icl_distill.evaluation.jobs import RunningAccuracy

    class Row:
        looked = 0

        @property
        def correct(self):
            Row.looked += 1
            return True

    class Made:  # a job with 50 answers
        label, records = "zero_shot", type("R", (), dict(rows={i: Row() for i in range(50)}))

    running = RunningAccuracy([Made])
    for i in range(50):
        running.add("zero_shot", i % 2 == 0)
        assert str(running)
    assert Row.looked == 50 and str(running) == "zero_shot 75.0 %"


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), torn=st.integers(0, 30))
def test_interrupted_anywhere(tok, tmp_path_factory, cuts, torn):
    tmp = tmp_path_factory.mktemp("cut")
    f = {k: write_set(tmp / f"{k}.jsonl", k, n) for k, n in dict(train=8, test=10).items()}
    cfg = Config(
        model=ModelConfig(name=REAL_MODEL),
        task=TaskConfig(name="jsonl", path=f["train"], test_path=f["test"], n_dev=2),
        prompt=PromptConfig(template="plain"),
        context=ContextConfig(n_shots=2),
        evaluate=EvaluateConfig(max_new_tokens=12),
        run=str(tmp / "run"),
    )
    asked = []
    for c in cuts:
        e = Fake(tok, stop_after=c)
        with suppress(KeyboardInterrupt):
            go(cfg, e)
        asked += e.asked
        for r in Path(cfg.run).rglob("*.jsonl"):
            text = r.read_text()
            if torn and len(text.splitlines()) > 2:
                r.write_text(text[: -1 - min(torn, len(text.splitlines()[-1]) - 1)])
    e = Fake(tok)
    res = go(cfg, e)
    for c in ("zero_shot", "few_shot"):
        rows = items(Path(cfg.run) / "evaluation" / "records" / f"{c}.jsonl")
        assert len(rows) == len({r["id"] for r in rows}) == 10 and res.conditions[c].accuracy == 0.5
    if not torn:
        assert len(set(asked + e.asked)) == len(asked + e.asked) == 20


@pytest.mark.parametrize(
    "change",
    [
        dict(evaluate=dict(max_new_tokens=13)),
        dict(prompt=dict(question_format="Q {question}")),
        dict(model=dict(dtype="bfloat16")),
        dict(evaluate=dict(n_samples=5)),
        dict(task=dict(extract="exact")),
        dict(prompt=dict(system="Be brief.")),
    ],
)
def test_other_config_is_not_mixed_in(cfg, tok, change):
    with pytest.raises(KeyboardInterrupt):
        go(cfg, Fake(tok, stop_after=3))
    other = replace(cfg, **{k: replace(getattr(cfg, k), **v) for k, v in change.items()})
    with pytest.raises(InputError, match="answers to something else"):
        go(other, Fake(tok))
    elsewhere = on(other, output=str(Path(cfg.run) / "other" / "x.json"))
    assert len(go(elsewhere, Fake(tok)).conditions) == 2
    assert len(go(cfg, Fake(tok)).conditions) == 2


def test_other_shots_are_not_mixed_in(cfg, tok):
    go(cfg, Fake(tok))
    with pytest.raises(InputError, match="few_shot.jsonl.*context"):
        go(replace(cfg, context=replace(cfg.context, seed=43)), Fake(tok))


def test_damaged_records(cfg, tok):
    go(cfg, Fake(tok))
    path = Path(cfg.run) / "evaluation" / "records" / "zero_shot.jsonl"
    good = path.read_text().splitlines()
    for bad, msg in (
        (good[:3] + ["{oops"] + good[3:], "line 4: not JSON"),
        (good + [good[2]], "is there twice"),
        (good[1:], "answers to something else"),
    ):
        path.write_text("\n".join(bad) + "\n")
        with pytest.raises(InputError, match=msg):
            go(cfg, Fake(tok))


def test_checkpoints(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path / "trained"))
    res = go(
        c, Fake(tok, lambda arm, i: i < dict(zero_shot=3, few_shot=12, step_10=9, step_20=15)[arm])
    )
    assert (
        list(res.conditions) == ["zero_shot", "few_shot", "step_10", "step_20"]
        and res.conditions["step_20"].step == 20
    )
    assert {(p.a, p.b) for p in res.paired} == {
        ("few_shot", "zero_shot"),
        ("step_10", "zero_shot"),
        ("step_20", "zero_shot"),
        ("step_10", "few_shot"),
        ("step_20", "few_shot"),
    }
    assert res.selected is None and "No checkpoint is marked" in markdown(res)
    other = Path(fake_run(tmp_path / "trained on")) / "checkpoints" / "step_000020"
    there = unsealed(tmp_path / "trained" / "checkpoints" / "step_000020")
    (there / "adapter_model.safetensors").write_bytes(
        (other / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match="step_20.jsonl.*adapter"):
        go(c, Fake(tok))


def test_idle_adapter(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path / "trained"))
    with pytest.raises(InputError, match="does not change the logits"):
        go(c, Fake(tok, effect=0.0))
    assert (
        not (Path(cfg.run) / "evaluation" / "results.json").exists()
        and not (Path(cfg.run) / "evaluation" / "records" / "step_10.jsonl").exists()
    )


def test_chosen_on_dev(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path / "trained", (10, 20, 30)))
    on_dev, on_test = dict(step_10=5, step_20=9, step_30=9), dict(step_10=10, step_20=8, step_30=20)
    dev = go(on(c, split="dev"), Fake(tok, lambda arm, i: i < on_dev.get(arm, 1)))
    assert dev.split == "dev" and dev.selected is None and dev.conditions["step_10"].n == 12
    res = go(c, Fake(tok, lambda arm, i: i < on_test.get(arm, 1)))
    s, table = res.selected, squeezed(markdown(res))
    assert (s.condition, s.accuracy_dev, s.n_dev, s.split) == ("step_20", 9 / 12, 12, "dev")
    assert "| step_20 * |" in table and "| step_30 | 20 | 100.0 %" in table
    changed = {
        k: c.model_copy(update=dict(adapter=c.adapter and "changed"))
        for k, c in res.conditions.items()
    }
    assert selected(dev, changed) is None


def test_difference_to_another_run(cfg, tok, tmp_path, capsys):
    runs = {}
    for name, k in (("sft", 8), ("ours", 14)):
        c = replace(
            on(cfg, checkpoints=fake_run(tmp_path / name, (10,)), conditions=["few_shot"]),
            run=str(tmp_path / name),
        )
        go(c, Fake(tok, lambda arm, i, k=k: i < (k if arm == "step_10" else 5)))
        runs[name] = c.run
    place = Evaluation.find(runs["ours"])
    res, base = with_baseline(place.results(), place, runs["sft"])
    row = next(r for r in table_rows(res, base) if r["condition"] == "step_10")
    assert (
        base == "sft:step_10"
        and row["against sft:step_10"] == "+30.0"
        and float(row["p"]) == pytest.approx(0.03125, rel=0.02)
    )
    report(runs["ours"], runs["sft"])
    assert "+30.0" in capsys.readouterr().out
    few = replace(on(cfg, checkpoints=runs["sft"], n_samples=5), run=str(tmp_path / "few"))
    go(few, Fake(tok))
    with pytest.raises(InputError, match="same items"):
        report(few.run, runs["sft"])


def test_report(cfg, tok, tmp_path, capsys):
    go(cfg, Fake(tok))
    for p in (cfg.run, Path(cfg.run) / "evaluation", Path(cfg.run) / "evaluation" / "results.json"):
        assert report(p).split == "test"
    assert "zero_shot" in capsys.readouterr().out
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "y.json").write_text("[]")
    for bad in ("none", "x.json", "y.json"):
        with pytest.raises(InputError):
            report(tmp_path / bad)
    with pytest.raises(InputError, match="no checkpoint to compare"):
        report(cfg.run, cfg.run)


def test_find_checkpoints(cfg, tmp_path):
    run = fake_run(tmp_path / "r", (20, 100, 3))
    assert list(find_checkpoints(run)) == ["step_3", "step_20", "step_100"] and list(
        find_checkpoints(run, [100, 3])
    ) == ["step_3", "step_100"]
    assert [
        c.name
        for c in find_conditions(on(cfg, checkpoints=run, steps=[3]), load_task(cfg.task).train)
    ] == ["zero_shot", "few_shot", "step_3"]
    with pytest.raises(InputError, match=r"steps \[4\]"):
        find_checkpoints(run, [4])
    with pytest.raises(InputError, match="steps is given"):
        find_conditions(on(cfg, steps=[3]), load_task(cfg.task).train)
    (tmp_path / "r" / "checkpoints" / "step_000020" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete"):
        find_checkpoints(run)
    with pytest.raises(InputError, match="neither a checkpoint"):
        find_checkpoints(tmp_path)


def test_asked_in_the_form_it_was_trained_in(cfg, tok, tmp_path):
    run = fake_run(tmp_path / "r", (1,))
    chat = replace(cfg, prompt=replace(cfg.prompt, template="chat"))
    there = unsealed(tmp_path / "r" / "checkpoints" / "step_000001")
    (there / "config.yaml").write_text(to_yaml(chat))
    with pytest.raises(InputError, match="prompt.template='chat'"):
        go(on(cfg, checkpoints=run), Fake(tok))
    (there / "config.yaml").write_text(to_yaml(cfg))
    assert "step_1" in go(on(cfg, checkpoints=run), Fake(tok)).conditions


def test_conditions(cfg):
    train = load_task(cfg.task).train
    assert (
        base_condition("zero_shot", cfg, train).context == Context()
        and len(base_condition("5_shot", cfg, train).context.shots) == 5
    )
    few = base_condition("few_shot", cfg, train).context
    assert len(few.shots) == 3 and few == base_condition("few_shot", cfg, train).context
    with pytest.raises(InputError, match="no one context"):
        base_condition("teacher", cfg, train)
    assert (
        base_condition(
            "teacher", replace(cfg, context=ContextConfig(kind="text", text="Count.")), train
        ).context.text
        == "Count."
    )
    with pytest.raises(InputError, match="expected zero_shot"):
        base_condition("many", cfg, train)


def test_what_does_not_fit_is_named(cfg, tok):
    with pytest.raises(
        InputError, match=r"item '.*' under condition 'few_shot'.*max_teacher_tokens"
    ):
        go(replace(cfg, prompt=replace(cfg.prompt, max_teacher_tokens=60)), Fake(tok))
    with pytest.raises(InputError, match="what the model can read"):
        make_prompts(cfg, Prompter(tok, cfg.prompt), Condition("c"), load_task(cfg.task).dev, 20)


def test_no_item_among_its_shots(cfg, tok):
    task = load_task(cfg.task)
    with pytest.raises(InputError, match="shown its own answer"):
        go(cfg, Fake(tok), conditions=[Condition("leak", Context(shots=(task.tests["test"][3],)))])


@pytest.mark.parametrize(
    "kw, msg",
    [
        (dict(n_samples=21), "only"),
        (dict(conditions=["zero_shot", "zero_shot"]), "same name|twice|duplicate"),
    ],
)
def test_refusals(cfg, tok, kw, msg):
    with pytest.raises(InputError, match=msg):
        go(on(cfg, **kw), Fake(tok))


def test_names_that_are_no_file_names(cfg, tok):
    with pytest.raises(InputError, match="cannot name"):
        go(cfg, Fake(tok), conditions=[Condition("../up")])


def record(i, correct, **more):
    "A made-up one."
    about = dict(condition="c", set="test", prompt_hash="0", text="", strict=None, flexible=None)
    about |= dict(gold="1", n_prompt_tokens=3, n_tokens=2, correct_flexible=True)
    return RecordLine(id=str(i), correct=correct, truncated=not correct, **(about | more))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_summary(right):
    s = summary([record(i, r) for i, r in enumerate(right)])
    assert s.accuracy == pytest.approx(sum(right) / len(right))
    assert s.truncated == pytest.approx(1 - s.accuracy)
    assert s.ci95[0] <= s.accuracy + 1e-12 <= s.ci95[1] + 2e-12


def test_pairs():
    assert pairs_of(["few_shot"]) == [] and pairs_of(["zero_shot", "sft", "few_shot", "x"]) == [
        ("zero_shot", "sft"),
        ("few_shot", "sft"),
        ("x", "sft"),
        ("x", "few_shot"),
    ]


LOUD = dict(initializer_range=0.3, tie_word_embeddings=True)  # an adapter changes its texts


def test_with_a_real_model(cfg, tok, tmp_path):
    "From a model's folder and a peft checkpoint to the table, by both ways in."
    tiny_folder(tmp_path / "model", **LOUD)
    c = on(
        replace(cfg, model=ModelConfig(name=str(tmp_path / "model"), dtype="float32")),
        checkpoints=str(tmp_path / "r"),
        n_samples=6,
    )
    fake_run(tmp_path / "r", (7,), base_hash=weights_hash(tiny_model(**LOUD)))
    there = unsealed(tmp_path / "r" / "checkpoints" / "step_000007")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(**LOUD), lora).save_pretrained(there)
    res = evaluate(c, progress=False)
    model = tiny_model(**LOUD)
    engine = TransformersEngine(model, tok, Prompter(tok, c.prompt).stop_ids, 4)
    again = evaluate(
        on(c, output=str(tmp_path / "other" / "r.json")), engine=engine, progress=False
    )
    assert engine.model is model and not any("lora" in n for n, _ in model.named_modules())
    for k in ("zero_shot", "few_shot", "step_7"):
        a, b = (
            {r["id"]: r["text"] for r in items(f / "records" / f"{k}.jsonl")}
            for f in (Path(c.run) / "evaluation", tmp_path / "other")
        )
        assert a == b and res.conditions[k].accuracy == again.conditions[k].accuracy
    texts = [
        {r["id"]: r["text"] for r in items(tmp_path / "other" / "records" / f"{k}.jsonl")}
        for k in ("zero_shot", "step_7")
    ]
    assert texts[0] != texts[1]
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(InputError, match="was trained on"):
        evaluate(on(c, output=str(tmp_path / "third" / "r.json")), engine=engine, progress=False)


# several comparisons, several seeds


def test_holm_and_the_detectable_difference_stand_in_the_table(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path / "trained"))
    two = go(
        on(c, checkpoints=None, output=str(tmp_path / "two" / "results.json")),
        Fake(tok, lambda arm, i: i < dict(zero_shot=3, few_shot=12)[arm]),
    )
    assert "p Holm" not in markdown(two) and "p Holm" not in table_rows(two)[0]
    res = go(
        c, Fake(tok, lambda arm, i: i < dict(zero_shot=3, few_shot=12, step_10=9, step_20=15)[arm])
    )
    shown = [d for d in res.paired if d.b == "zero_shot" and d.set == "test"]
    p = {d.a: d.p_mcnemar for d in shown}
    want = dict(zip(p, multipletests(list(p.values()), method="holm")[1], strict=True))
    assert {d.a: d.p_holm for d in shown} == want  # stored, not computed for the table
    rows = {r["condition"]: r for r in table_rows(res)}
    assert (
        {k: rows[k]["p Holm"] for k in want} == {k: f"{v:.2g}" for k, v in want.items()}
        and rows["zero_shot"]["p Holm"] == ""
        and len(want) == 3
    )
    assert "corrected for the 3 comparisons" in markdown(res)
    seen = detectable(res, "zero_shot")
    assert seen["few_shot"] == detectable_difference(
        20, 3 / 20, alpha=0.05 / 3, discordant=9 / 20
    ) and f"{100 * seen['few_shot']:.1f}" in markdown(res)
    same = go(
        on(c, checkpoints=None, output=str(tmp_path / "same" / "results.json")),
        Fake(tok, lambda arm, i: i < 3),
    )
    assert "disagree too rarely" in markdown(same)


def test_two_evaluations_of_one_output(cfg, tok):
    with (
        run_lock(Path(cfg.run) / "evaluation", "evaluating"),
        pytest.raises(InputError, match="another process is evaluating"),
    ):
        go(cfg, Fake(tok))
    assert set(go(cfg, Fake(tok)).conditions) == {"zero_shot", "few_shot"}


def seeds(cfg, tok, tmp_path, arm, right, **more):
    "Runs of an arm: step_10 is right below right[seed], the base model on the first 5."
    out = []
    for s, k in enumerate(right):
        c = replace(
            on(
                cfg,
                checkpoints=fake_run(tmp_path / f"{arm}{s}", (10,)),
                conditions=["few_shot"],
                **more,
            ),
            run=str(tmp_path / f"{arm}{s}"),
            seed=s,
        )
        go(c, Fake(tok, lambda a, i, k=k: i < (k if a == "step_10" else 5)))
        out.append(c.run)
    return out


def test_several_seeds_are_one_arm(cfg, tok, tmp_path, capsys):
    ours, sft = (
        seeds(cfg, tok, tmp_path, "ours", (14, 16, 18)),
        seeds(cfg, tok, tmp_path, "sft", (8, 12, 11)),
    )
    x = report(ours, sft)
    row, d = x.accuracy["step_10"], x.difference["step_10"]
    m = [[float(i < k) for i in range(20)] for k in (14, 16, 18)]
    s = combine_seeds(m)
    assert (x.n, x.seeds, row.per_seed) == (20, 3, [0.7, 0.8, 0.9])
    assert row.mean == pytest.approx(0.8) and row.se == pytest.approx(stats.sem([0.7, 0.8, 0.9]))
    assert row.interval == pytest.approx(s.wider, abs=0.02)
    assert row.interval == pytest.approx(stats.t.interval(0.95, 2, 0.8, row.se))
    diffs = [6 / 20, 4 / 20, 7 / 20]
    assert d.per_seed == pytest.approx(diffs)
    assert d.p == pytest.approx(stats.ttest_1samp(diffs, 0).pvalue)
    base = x.accuracy["few_shot"]
    assert base.se is None and base.mean == 0.25 and base.interval == wilson(5, 20)
    p = {k: r.p for k, r in x.difference.items()}
    assert set(p) == {"few_shot", "step_10"} and d.p_holm == pytest.approx(
        multipletests(list(p.values()), method="holm")[1][list(p).index("step_10")]
    )
    out = capsys.readouterr().out
    assert "80.0 ± 5.8" in out and "3 seeds" in out and "+28.3" in out
    assert report(ours).base == "few_shot" and "step_10" in capsys.readouterr().out
    assert report([ours[0]], [sft[0]]).conditions.keys() == {
        "few_shot",
        "step_10",
        "sft0:step_10",
    }


def test_seeds_that_are_none(cfg, tok, tmp_path):
    ours, more = (
        seeds(cfg, tok, tmp_path, "ours", (14, 16)),
        seeds(on(cfg, max_new_tokens=13), tok, tmp_path, "longer", (14,)),
    )
    go(replace(cfg, run=str(tmp_path / "base")), Fake(tok))
    for runs, against, why in (
        ([ours[0]] * 2, None, "one seed, evaluated twice"),
        ([ours[0], *more], None, "more than their seed"),
        (ours, ours[:1], "seeds are paired"),
        ([tmp_path / "base", ours[0]], None, "more than their seed|no checkpoint"),
        (ours[:1], ours, "compared with one"),
    ):
        with pytest.raises(InputError, match=why):
            report(runs, against)


def test_each_seed_has_its_own_choice(cfg, tok, tmp_path):
    runs = []
    for s, best in enumerate((10, 20)):
        c = replace(
            on(cfg, checkpoints=fake_run(tmp_path / f"r{s}"), conditions=["zero_shot"]),
            run=str(tmp_path / f"r{s}"),
            seed=s,
        )
        right = lambda a, i, best=best: i < (9 if a == f"step_{best}" else 2)  # noqa: E731
        go(on(c, split="dev"), Fake(tok, right))
        go(c, Fake(tok, lambda a, i: i < dict(zero_shot=2, step_10=10, step_20=14)[a]))
        runs.append(c.run)
    x = report(runs)
    assert x.accuracy["chosen on dev *"].per_seed == [0.5, 0.7]
    assert x.accuracy["step_10"].per_seed == [0.5, 0.5]


@pytest.mark.parametrize(
    "one, other, alike",
    [
        (dict(loss=dict(weight=0.0)), dict(loss=dict(weight=0.0, kind="forward_kl")), True),
        (dict(loss=dict(weight=0.5)), dict(loss=dict(weight=0.5, kind="forward_kl")), False),
        (
            dict(loss=dict(weight=0.0, kind="jsd")),
            dict(loss=dict(weight=0.0, kind="jsd", temperature=2.0, beta=0.1, tail=False)),
            True,
        ),
        (
            dict(loss=dict(weight=0.0)),
            dict(loss=dict(weight=0.0), teacher=dict(top_k=9, cache="ram")),
            True,
        ),
        (dict(loss=dict(weight=0.5)), dict(loss=dict(weight=0.5), teacher=dict(top_k=9)), False),
        (dict(loss=dict(weight=0.0)), dict(loss=dict(weight=0.0), context=dict(seed=5)), True),
        (
            dict(loss=dict(weight=0.0), context=dict(kind="fixed")),
            dict(loss=dict(weight=0.0), context=dict(kind="fixed", seed=5)),
            False,  # other examples are kept out of the training data
        ),
        (
            dict(loss=dict(weight=0.0), context=dict(kind="none")),
            dict(loss=dict(weight=0.0), context=dict(kind="fixed")),
            False,
        ),
        (
            dict(loss=dict(weight=0.0), context=dict(kind="fixed")),
            dict(loss=dict(weight=0.0), context=dict(kind="shuffled_answers")),
            True,
        ),
        (dict(loss=dict(weight=0.0)), dict(loss=dict(weight=0.0), train=dict(lr=0.1)), False),
    ],
)
def test_what_makes_no_difference_without_distillation(one, other, alike):
    a, b = (
        config_dict(Config(**{k: replace(getattr(Config(), k), **v) for k, v in x.items()}))
        for x in (one, other)
    )
    assert (what_matters(a) == what_matters(b)) == alike


def test_what_matters_in_an_older_file_and_in_one_with_labels():
    "Keys that came later are at their defaults in a file without them."
    now = config_dict(load_config("quickstart"))
    old = {key: part for key, part in now.items() if key != "answers"}
    later = ("questions_path", "n_questions")
    old["task"] = {key: value for key, value in now["task"].items() if key not in later}
    assert what_matters(old) == what_matters(now)
    agreed = config_dict(load_config("bake"))
    teacher = config_dict(load_config("bake", ["answers.source=teacher"]))
    assert what_matters(agreed) != what_matters(teacher)


def test_a_task_without_a_test_set_is_refused():
    task = square_task()
    with pytest.raises(InputError, match="no test set.*task.test_path.*split=dev"):
        item_sets(load_config("quickstart"), task)


def test_seeds_of_sft_may_name_another_objective(cfg, tok, tmp_path, capsys):
    runs = []
    for s, (kind, k) in enumerate((("mse", 14), ("forward_kl", 16))):
        c = replace(
            on(cfg, checkpoints=fake_run(tmp_path / f"s{s}", (10,)), conditions=["few_shot"]),
            run=str(tmp_path / f"s{s}"),
            seed=s,
            loss=LossConfig(weight=0, kind=kind),
            teacher=TeacherConfig(cache="off" if s else "ram"),
        )
        go(c, Fake(tok, lambda a, i, k=k: i < (k if a == "step_10" else 5)))
        runs.append(c.run)
    assert report(runs).accuracy["step_10"].per_seed == [0.7, 0.8]
    for run in runs:
        path = Path(run) / "evaluation" / "results.json"
        res = read_results(path)
        loss = res.config["loss"] | dict(weight=0.5)
        write_results(path, res.model_copy(update=dict(config=res.config | dict(loss=loss))))
    with pytest.raises(InputError, match="more than their seed.*loss.kind"):
        report(runs)
    capsys.readouterr()


# tables


def test_a_terminal_table_fits_80_columns(capsys, monkeypatch):
    "The widest of the stored ones; no name is cut, no interval broken."
    monkeypatch.setenv("COLUMNS", "80")
    for path in sorted(RESULTS.rglob("results.json")):
        res = report(path)
        said, rows = capsys.readouterr().out, table_rows(res)
        assert max(map(len, said.splitlines())) <= 80
        for row in rows:
            line = next(x for x in said.splitlines() if x.startswith(row["condition"] + " "))
            assert row["accuracy [95 %]"] in line and row["truncated"] in line
            assert "…" not in said
    rows = [{"condition": "sft", "accuracy [95 %]": "60.5 % [55.6, 65.2]"} for _ in range(2)]
    rows = [r | {f"set_{i}": "60.5 % [55.6, 65.2]" for i in range(4)} for r in rows]
    print_table([r | {"against few_shot": "+1.0", "p": "0.5"} for r in rows], [])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and said.count("60.5 % [55.6, 65.2]") == 10
    assert said.count("set_3") == said.count("few_shot") == 1


def test_stored_numbers_are_those_that_a_table_would_compute(cfg, tok, tmp_path):
    c = on(cfg, checkpoints=fake_run(tmp_path / "trained"))
    right = dict(zero_shot=3, few_shot=12, step_10=9, step_20=15)
    res = go(c, Fake(tok, lambda arm, i: i < right[arm]))
    empty = dict(p_holm=None, detectable=None)
    bare = res.model_copy(update=dict(paired=[p.model_copy(update=empty) for p in res.paired]))
    assert completed(bare) == res and markdown(bare) == markdown(res)
    assert {p.a for p in res.paired if p.detectable} == {"few_shot", "step_10", "step_20"}
    same = go(
        on(cfg, output=str(tmp_path / "same" / "results.json")), Fake(tok, lambda arm, i: i < 3)
    )
    assert same.paired[0].detectable == "none" and completed(same) == same


def test_numbers_in_csv_are_not_rounded(cfg, tok):
    res = go(cfg, Fake(tok, lambda arm, i: i < 7))
    line = as_csv(res).splitlines()[1].split(",")
    assert float(line[7]) == res.conditions["zero_shot"].ci95[0] and line[6] == "20"


def test_a_bar_in_a_name_does_not_break_the_markdown():
    from icl_distill.evaluation.tables import as_markdown

    assert "a\\|b" in as_markdown([{"condition": "a|b", "n": "1"}], [])


def test_report_imports_little(tmp_path):
    "A stored table is printed without torch, transformers, scipy, statsmodels or pandas."
    scores = dict(accuracy=0.5, n=9, ci95=(0.2, 0.8), truncated=0.0, accuracy_flexible=0.5)
    scores |= dict(mean_tokens=3.0, mean_prompt_tokens=3.0, n_shots=0, context="0")
    about = dict(model="m", task="t", split="test", set="test", environment={}, seed=0)
    config = dict(evaluate=dict(max_new_tokens=9))
    engine = dict(name="e", why="w")
    res = Results(
        **about, engine=engine, config=config, conditions=dict(a=ConditionResult(**scores))
    )
    write_results(tmp_path / "results.json", res)
    code = (
        "import sys, time; from icl_distill.evaluation.seeds import report\n"
        "report(sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'scipy', 'statsmodels', 'pandas', 'peft'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "print('CPU', time.process_time())"
    )
    for path in (tmp_path, RESULTS / "quickstart"):
        out = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env=quiet_environment(),
            capture_output=True,
            text=True,
        )
        if path == tmp_path or '"p_holm"' in (path / "results.json").read_text():
            assert out.returncode == 0, out.stderr


# progress


def test_the_bar_counts_all_conditions_and_says_how_they_do(cfg, tok, capsys):
    evaluate(cfg, engine=Fake(tok, lambda arm, i: i < (5 if arm == "zero_shot" else 15)))
    err = capsys.readouterr().err
    assert (
        "52/52" in err
        and "zero_shot 25.0 %" in err
        and "few_shot 75.0 %" in err
        and "few_shot, hard 100.0 %" in err
    )


# the real command, killed

command = [sys.executable, "-c", "from icl_distill.app.cli import main; main()"]
env = quiet_environment(COLUMNS="160", PYTHONPATH=str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The arguments of a small evaluation: a tiny model, its own questions, a further test set."
    d = tmp_path_factory.mktemp("small")
    tiny_folder(d / "model", **LOUD)
    f = {k: write_set(d / f"{k}.jsonl", k, n) for k, n in dict(train=20, test=30, hard=4).items()}
    return [
        "evaluate",
        "quickstart",
        f"model.name={d / 'model'}",
        "model.dtype=float32",
        "task.name=jsonl",
        f"task.path={f['train']}",
        "task.n_train=null",
        "task.n_test=null",
        "task.n_dev=5",
        f"task.test_path={f['test']}",
        f"task.test_sets={{hard: {f['hard']}}}",
        "context.n_shots=2",
        "batch_size=1",
        "max_new_tokens=24",
    ]


def by_command(small, run, *args):
    return subprocess.run(
        [*command, *small, f"run={run}", *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def done(small, run, *args):
    p = by_command(small, run, *args)
    assert p.returncode == 0, p.stdout + p.stderr
    folder = Path(run) / "evaluation"
    return (
        p,
        read_results(folder / "results.json"),
        {
            f.name: sorted(items(f), key=lambda r: r["id"])
            for f in sorted((folder / "records").iterdir())
        },
    )


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    return done(small, tmp_path_factory.mktemp("whole") / "run")


def without_time(res):
    timed = dict(seconds=None, latency=None)
    return {k: c.model_copy(update=timed) for k, c in res.conditions.items()}


def test_killed_and_finished(small, whole, tmp_path):
    "The same command again asks only what is missing, and ends where the uninterrupted did."
    run, path = tmp_path / "run", tmp_path / "run" / "evaluation" / "records" / "zero_shot.jsonl"
    p = subprocess.Popen(
        [*command, *small, f"run={run}"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while p.poll() is None and not (path.exists() and path.read_text().count("\n") >= 4):
            time.sleep(0.005)
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert p.returncode == -signal.SIGKILL
    kept = path.read_text()
    assert 3 <= kept.count("\n") < 31 and not (run / "evaluation" / "results.json").exists()
    other = by_command(small, run, "max_new_tokens=25")
    assert (
        other.returncode == 2
        and "holds answers to something else" in other.stderr
        and path.read_text() == kept
    )
    _, res, records = done(small, run)
    assert path.read_text().startswith(kept[: kept.rindex("\n") + 1])
    assert (
        records == whole[2]
        and without_time(res) == without_time(whole[1])
        and res.paired == whole[1].paired
    )


def test_test_sets_are_columns(whole):
    p, res, records = whole
    assert (
        list(records)
        == ["few_shot.hard.jsonl", "few_shot.jsonl", "zero_shot.hard.jsonl", "zero_shot.jsonl"]
        and len(records["few_shot.hard.jsonl"]) == 4
    )
    assert re.search(r"accuracy \[95 %\].*hard", p.stdout) and "| hard |" in squeezed(markdown(res))
    assert (
        all(c.sets["hard"].n == 4 for c in res.conditions.values())
        and as_csv(res).count(",hard,") == 2
    )


# several processes


SHARD = """
import sys
from icl_distill.core.config import load_config
from icl_distill.evaluation.evaluate import evaluate
print(evaluate(load_config(sys.argv[1], sys.argv[2:], "evaluate"), progress=False) is not None)
"""


def start_shard(small, run, shard):
    args = [*small[1:], f"run={run}", f"shard={shard}"]
    return subprocess.Popen(
        [sys.executable, "-c", SHARD, *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, message):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert re.search(message, err), err
    return out.strip() == "True"


def outcome(run):
    folder = Path(run) / "evaluation"
    files = sorted(p for p in (folder / "records").rglob("*") if p.is_file())
    rows = {p.name: sorted(items(p), key=lambda r: r["id"]) for p in files}
    return read_results(folder / "results.json"), rows


def test_three_shards_are_one_run(small, whole, tmp_path):
    "Three real processes, two of them at the same time, the third when they have ended."
    run = tmp_path / "run"
    pair = [start_shard(small, run, shard) for shard in ("1/3", "3/3")]
    written = [ended(p, r"shards? .*2/3.* not there yet: results are written when") for p in pair]
    records = run / "evaluation" / "records"
    assert written == [False, False] and not (run / "evaluation" / "results.json").exists()
    assert sorted(p.name for p in records.iterdir()) == ["shard-1-of-3", "shard-3-of-3"]
    first = lines(records / "shard-1-of-3" / "zero_shot.jsonl")[0]
    assert (
        "shard" not in first["identity"]
        and len(items(records / "shard-1-of-3" / "zero_shot.jsonl")) == 10
    )
    assert ended(start_shard(small, run, "2/3"), "")
    res, rows = outcome(run)
    assert rows == whole[2] and without_time(res) == without_time(whole[1])
    assert res.paired == whole[1].paired and res.config["evaluate"]["shard"] is None
    assert sorted(p.name for p in records.iterdir()) == sorted(whole[2])
    one = [json.loads(x) for x in (records / "zero_shot.jsonl").read_text().splitlines()]
    assert one[0]["identity"]["condition"] == "zero_shot"


def test_shards_at_the_same_time(cfg, tok):
    "Whole and shards exclude each other; two shards do not."
    place = Path(cfg.run) / "evaluation"
    with run_lock(place / "records" / "shard-1-of-2", "evaluating"):
        with pytest.raises(InputError, match="another process is evaluating"):
            go(cfg, Fake(tok))
        with pytest.raises(InputError, match="another process is evaluating shard 1/2"):
            go(on(cfg, shard="1/2"), Fake(tok))
        assert go(on(cfg, shard="2/2"), Fake(tok)) is None
    with run_lock(place, "evaluating"), pytest.raises(InputError, match="evaluating in"):
        go(on(cfg, shard="1/2"), Fake(tok))
    assert go(on(cfg, shard="1/2"), Fake(tok)).conditions.keys() == {"zero_shot", "few_shot"}


@settings(max_examples=15, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 2)), max_size=5),
    cut=st.integers(0, 12),
)
def test_shards_in_any_order_and_killed(tok, tmp_path_factory, calls, cut):
    "Whoever answers what, however often they are stopped: every item once, the results of one run."
    tmp = tmp_path_factory.mktemp("shards")
    f = {k: write_set(tmp / f"{k}.jsonl", k, n) for k, n in dict(train=8, test=10).items()}
    cfg = Config(
        model=ModelConfig(name=REAL_MODEL, dtype="float32"),
        task=TaskConfig(name="jsonl", path=f["train"], test_path=f["test"], n_dev=2),
        prompt=PromptConfig(template="plain"),
        context=ContextConfig(n_shots=2),
        evaluate=EvaluateConfig(max_new_tokens=12),
        run=str(tmp / "run"),
    )
    right = lambda arm, i: i % 3 == (arm == "few_shot")  # noqa: E731
    asked = []
    for count, number in calls:
        shard = Shard(min(number + 1, count), count)
        e = Fake(tok, right, stop_after=cut)
        with suppress(KeyboardInterrupt):
            go(on(cfg, shard=str(shard)), e)
        asked += e.asked
    last = Fake(tok, right)
    res = go(cfg, last)
    assert (
        sorted(asked + last.asked) == sorted(set(asked + last.asked))
        and len(asked + last.asked) == 20
    )
    alone = go(replace(cfg, run=str(tmp / "alone")), Fake(tok, right))
    assert without_time(res) == without_time(alone) and res.paired == alone.paired
    folder = Path(cfg.run) / "evaluation" / "records"
    assert sorted(p.name for p in folder.iterdir()) == ["few_shot.jsonl", "zero_shot.jsonl"]
    for name, c in res.conditions.items():
        assert len(items(folder / f"{name}.jsonl")) == c.n == 10


def test_a_merge_that_was_interrupted_counts_nothing_twice(cfg, tok, monkeypatch):
    go(on(cfg, shard="1/2"), Fake(tok))
    unlink = Path.unlink

    def stopped(self, *args, **kw):
        if self.suffix == ".jsonl":
            raise KeyboardInterrupt
        unlink(self, *args, **kw)

    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(KeyboardInterrupt):
        go(on(cfg, shard="2/2"), Fake(tok))
    monkeypatch.undo()
    e = Fake(tok)
    res = go(cfg, e)
    assert not e.asked and res.conditions["zero_shot"].n == 20
    folder = Path(cfg.run) / "evaluation" / "records"
    sessions = [r for r in lines(folder / "zero_shot.jsonl") if "seconds" in r]
    assert sum(s["n"] for s in sessions) == 20 and len(list(folder.iterdir())) == 4


# a run's own config


def test_a_run_is_evaluated_with_what_it_was_trained_with(cfg, tok, tmp_path):
    run = fake_run(tmp_path / "moved", (10, 20))
    odd = replace(
        cfg,
        prompt=replace(cfg.prompt, question_format="Question: {question}"),
        evaluate=replace(cfg.evaluate, steps=[3], checkpoints="elsewhere", output="x.json"),
        loss=LossConfig(weight=0),
    )
    Run(run).config_path.write_text(to_yaml(odd))
    c = config_for_evaluation(run)
    assert (c.model, c.task, c.prompt, c.context) == (odd.model, odd.task, odd.prompt, odd.context)
    assert (c.evaluate.conditions, c.evaluate.checkpoints, c.run) == ([], run, run)
    assert c.evaluate.steps == [] and c.evaluate.output is None
    assert c.evaluate.max_new_tokens == 12 and c.loss == odd.loss
    res = go(c, Fake(tok))
    assert list(res.conditions) == ["step_10", "step_20"]
    assert Run(run).results() == res
    c = config_for_evaluation(run, ["conditions=[few_shot]", "evaluate.steps=[20]", "split=dev"])
    assert list(go(c, Fake(tok)).conditions) == ["few_shot", "step_20"]
    one = str(Run(run).checkpoint_path(20))
    (Path(one) / "config.yaml").write_text(to_yaml(odd))
    c = config_for_evaluation(one)
    assert c.evaluate.checkpoints == one and c.run == odd.run
    with pytest.raises(InputError, match="without config.yaml"):
        config_for_evaluation(str(tmp_path))
    assert config_for_evaluation("quickstart", ["n_samples=3"]).evaluate.n_samples == 3
    with pytest.raises(InputError):
        config_for_evaluation(str(tmp_path / "none.yaml"))


def test_a_folder_with_a_quote_in_its_name(cfg, tmp_path):
    run = fake_run(tmp_path / "it's: [mine] #1", (10,))
    Run(run).config_path.write_text(to_yaml(cfg))
    assert config_for_evaluation(run).evaluate.checkpoints == run


# reading the answers


def test_answers_side_by_side(cfg, tok, tmp_path):
    go(
        cfg,
        Fake(
            tok, lambda arm, i: i < (5 if arm == "zero_shot" else 3) or arm == "few_shot" and i > 16
        ),
    )
    rows = answered(cfg.run, "zero_shot", "few_shot")
    assert list(rows.index) == [e.id for e in load_task(cfg.task).tests["test"]]
    assert rows.equals(answered(Path(cfg.run) / "evaluation" / "results.json"))
    zero, few = (rows[f"{k} prompt"].iloc[2] for k in ("zero_shot", "few_shot"))
    assert few.endswith(zero) and few.count("Question:") == 4 and zero.count("Question:") == 1
    assert rows.question.iloc[2] in zero
    ids = {
        k: [int(q.split()[2][:-1]) for q in chosen(rows, k, "zero_shot", "few_shot").question]
        for k in SHOW
    }
    assert ids == dict(
        all=[*range(20)],
        right=[0, 1, 2, 3, 4],
        wrong=[*range(5, 20)],
        flipped=[3, 4, 17, 18, 19],
        lost=[3, 4],
        won=[17, 18, 19],
    )
    frame = records_frame(cfg.run)
    assert len(frame) == 40 and set(frame.condition) == {"zero_shot", "few_shot"}
    assert frame.groupby("condition").correct.sum().to_dict() == dict(zero_shot=5, few_shot=6)
    for bad, why in ((dict(show="odd"), "must be one of"), (dict(show="won"), "name another")):
        with pytest.raises(InputError, match=why):
            chosen(rows, a="zero_shot", **bad)
    with pytest.raises(InputError, match="'nobody'.*zero_shot, few_shot"):
        answered(cfg.run, "nobody")


def test_a_prompt_that_was_not_asked_is_not_shown(cfg, tok):
    go(cfg, Fake(tok))
    path = Path(cfg.run) / "evaluation" / "results.json"
    res = json.loads(path.read_text())
    res["config"]["prompt"]["question_format"] = "Q: {question}"
    path.write_text(json.dumps(res))
    with pytest.raises(InputError, match="another prompt today"):
        answered(cfg.run)
    (path.parent / "records" / "zero_shot.jsonl").unlink()
    with pytest.raises(InputError, match="zero_shot.jsonl.*[Nn]o such file"):
        answered(cfg.run, "zero_shot")


def test_what_a_model_wrote_is_escaped():
    import pandas as pd

    row = {"question": "1 < 2?", "gold": "<3>", "c": "<script>x</script> & </pre>"}
    row |= {"c right": False, "c truncated": True, "c prompt": "<s>"}
    items = pd.DataFrame([row], index=pd.Index(["a<b"], name="item"))
    out = page(items)
    assert (
        not re.search(r"<script|<s>|a<b|1 < 2|<3>", out)
        and "&lt;script&gt;" in out
        and "✗ wrong, truncated" in out
        and out._repr_html_() == out
        and "prompt of c" in out
    )
    assert page(items[:0]).count("<tr>") == 0


def test_browser(cfg, tok, monkeypatch):
    go(cfg, Fake(tok, lambda arm, i: i < (5 if arm == "zero_shot" else 9)))
    pytest.importorskip("itables")
    table = browse(cfg.run, "zero_shot", "few_shot", show="flipped", n=2)
    assert "flipped: 4 of 20 items" in table and '"pageLength": 2' in table
    rows = chosen(answered(cfg.run, "zero_shot", "few_shot"), "flipped", "zero_shot", "few_shot")
    assert len(rows) == 4 and all(item in table for item in rows.index)
    assert "https://cdn" not in table and "jsdelivr" not in table  # it works without a network
    assert "lost: 0 of 20 items" in browse(cfg.run, "zero_shot", "few_shot", show="lost")
    for show in ("flipped", "lost", "won"):
        with pytest.raises(InputError, match="name another"):
            browse(cfg.run, "zero_shot", show=show)
    assert "right: 5 of 20 items" in browse(cfg.run, "zero_shot", show="right")
    monkeypatch.setitem(sys.modules, "itables", None)
    first = browse(cfg.run, "zero_shot", "few_shot", show="flipped", n=2)
    assert first == page(rows[:2]) and first.count("<tr>") == 2
