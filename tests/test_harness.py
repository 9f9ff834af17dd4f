"""Tasks of lm-evaluation-harness: what is kept, what is compared, and which model is asked.

Where the package is there, the real harness measures a tiny model on tasks of its own; where not,
what it reports is made up and the rest is real.
"""

import importlib.util
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from icl_distill.app import cli
from icl_distill.core.runs import Run
from icl_distill.evaluation.evaluate import config_for_evaluation
from icl_distill.evaluation.harness import (
    Score,
    TaskScores,
    retention_rows,
    run_harness,
    scores_of,
)
from icl_distill.evaluation.statistics import bootstrap_ci
from icl_distill.models.loading import load_adapter
from icl_distill.testing import raises, real_tokenizer

HERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HERE, reason="lm-eval is not installed (pip install -e '.[lm_eval]')"
)
tok = real_tokenizer()
IDS = torch.tensor([tok("What is 1 + 1?").input_ids])
DOCS = 5


def number(model, doc):
    "Something that depends on the model and the item: a probability."
    with torch.no_grad():
        return model(input_ids=IDS).logits[0, -1].float().softmax(-1)[doc].item()


class Reports:
    "In place of the harness: numbers of the model that it is given."

    def __init__(self, monkeypatch):
        self.asked = []
        place = "icl_distill.evaluation.harness"
        monkeypatch.setattr(f"{place}._task_manager", lambda include, tasks: "tasks")
        monkeypatch.setattr(f"{place}._measure", self.measure)
        if not HERE:
            monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))

    def measure(self, cfg, model, tok, tasks, manager):
        assert not model.training and manager == "tasks"
        self.asked.append(tasks)
        each = [number(model, doc) for doc in range(DOCS)]
        samples = [dict(doc_id=i, filter="none", p=x) for i, x in reversed(list(enumerate(each)))]
        values = {"alias": "x", "p,none": sum(each) / DOCS, "p_stderr,none": 0.1}
        return dict(
            results=dict.fromkeys(tasks, values),
            samples=dict.fromkeys(tasks, samples),
            versions=dict.fromkeys(tasks, 1.0),
        )


def asked(uninterrupted, *over):
    return config_for_evaluation(str(uninterrupted), ["steps=[6, 12]", *over])


def the_models(uninterrupted):
    "Base and adapters, loaded each alone."
    name = Run(uninterrupted).config.model.name
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    yield "base", base
    for step in (6, 12):
        fresh = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        yield f"step_{step}", load_adapter(fresh, Run(uninterrupted).checkpoint_path(step)).eval()


def test_each_model_is_asked_and_only_once(uninterrupted, tmp_path, monkeypatch):
    reports, over = Reports(monkeypatch), f"output={tmp_path}/results.json"
    measured = run_harness(asked(uninterrupted, over), ["sums", "dates"])
    assert reports.asked == [["sums", "dates"]] * 3
    assert list(measured) == ["sums", "dates"] and list(measured["sums"]) == [
        "base",
        "step_6",
        "step_12",
    ]
    for name, model in the_models(uninterrupted):
        (score,) = measured["sums"][name].scores
        expected = [number(model, doc) for doc in range(DOCS)]
        assert score.items == pytest.approx(expected, rel=1e-4) and score.stderr == 0.1
    values = {name: one.scores[0].value for name, one in measured["sums"].items()}
    assert len(set(values.values())) == 3  # the adapters do change what is said
    files = {path.name for path in (tmp_path / "lm_eval").glob("*.json")}
    assert {"base.sums.json", "step_6.dates.json", "step_12.sums.json"} <= files
    again = run_harness(asked(uninterrupted, over), ["dates", "sums"])
    assert len(reports.asked) == 3 and again["sums"] == measured["sums"]
    run_harness(asked(uninterrupted, over), ["sums", "names"])
    assert reports.asked[3:] == [["names"]] * 3
    run_harness(asked(uninterrupted, over, "n_samples=2"), ["sums"])
    assert reports.asked[6:] == [["sums"]] * 3  # another limit is another measurement
    (tmp_path / "lm_eval" / "base.sums.json").write_text("{}")
    with raises("base.sums.json", "is missing"):
        run_harness(asked(uninterrupted, over), ["sums"])


def test_the_command_shows_what_is_retained(uninterrupted, tmp_path, monkeypatch, capsys):
    Reports(monkeypatch)
    command = ["icl-distill", "evaluate", str(uninterrupted), "steps=[12]", "--lm-eval", "sums"]
    monkeypatch.setattr(sys, "argv", [*command, f"output={tmp_path}/results.json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    out = capsys.readouterr().out
    assert "step_12" in out and "base" in out and "base [95 %]" in out
    base, tuned = (
        TaskScores(**json.loads((tmp_path / "lm_eval" / f"{name}.sums.json").read_text()))
        for name in ("base", "step_12")
    )
    _, row = retention_rows({"sums": dict(base=base, step_12=tuned)})
    each = [x - y for x, y in zip(tuned.scores[0].items, base.scores[0].items, strict=True)]
    low, high = bootstrap_ci(each)
    wanted = f"{sum(each) / DOCS:+.3f} [{low:+.3f}, {high:+.3f}]"
    assert row["against base [95 %]"] == wanted and wanted in out
    assert not (tmp_path / "results.json").exists()  # the run's own task is not measured


@pytest.mark.parametrize("tasks", ["", ",", " "])
def test_no_task(tasks, uninterrupted, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["icl-distill", "evaluate", str(uninterrupted), f"--lm-eval={tasks}"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "name a task" in capsys.readouterr().err


def test_without_the_package(uninterrupted, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with raises("icl_distill[lm_eval]", "pip install"):
        run_harness(asked(uninterrupted), ["gsm8k"])


def test_numbers_that_are_none_are_passed_over():
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "ppl,none": float("inf"),
        "samples": 3,
        "note,none": "text",
    }
    (score,) = scores_of(dict(results={"x": values}), "x")
    assert (score.metric, score.value, score.stderr, score.items) == ("acc", 0.5, None, None)


def test_a_group_has_its_own_row_and_a_tag_those_of_its_tasks():
    def scores(*tasks, value=0.5):
        about = dict(identity={}, version="", environment={}, config={})
        each = [Score(task=task, metric="acc", filter="none", value=value) for task in tasks]
        return TaskScores(scores=each, **about)

    both = dict(base=scores("all", "a", "b"), step_1=scores("all", "a", "b", value=0.25))
    rows = retention_rows(dict(all=both))
    assert [(r["model"], r["task"]) for r in rows] == [("base", "all"), ("step_1", "all")]
    assert rows[1]["against base [95 %]"] == "-0.250"
    tag = retention_rows(dict(tag=dict(base=scores("a", "b"))))
    assert [r["task"] for r in tag] == ["a", "b"]


# --- the real harness, on tasks of one's own


@pytest.fixture
def own_tasks(tmp_path):
    "A multiple choice, a generated answer, and a group of both, over local files."
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [dict(q=f"{n} + {n}", a=str(2 * n), wrong=str(2 * n + 1)) for n in range(1, 9)]
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
metadata: {{version: 1.0}}
"""
    (folder / "own_choice.yaml").write_text(
        common
        + """task: own_choice
output_type: multiple_choice
doc_to_choice: "{{[a, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    )
    (folder / "own_answer.yaml").write_text(
        common
        + """task: own_answer
output_type: generate_until
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    )
    (folder / "own_group.yaml").write_text(
        """group: own_group
task: [own_choice, own_answer]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 1.0}
"""
    )
    return folder, docs


@needs_harness
def test_the_real_harness(uninterrupted, tmp_path, own_tasks):
    folder, docs = own_tasks
    cfg = asked(uninterrupted, f"output={tmp_path}/results.json", "prompt.template=plain")
    measured = run_harness(cfg, ["own_choice", "own_answer"], folder)
    for name, model in the_models(uninterrupted):
        (acc,) = (s for s in measured["own_choice"][name].scores if s.metric == "acc")
        assert acc.items == [float(right_is_likelier(model, doc)) for doc in docs]
        assert acc.value == pytest.approx(sum(acc.items) / len(docs))
        (match,) = (s for s in measured["own_answer"][name].scores if s.metric == "exact_match")
        assert len(match.items) == len(docs)
    assert run_harness(cfg, ["own_choice"], folder)["own_choice"] == measured["own_choice"]


def right_is_likelier(model, doc):
    def log_p(answer):
        asked = tok(f"Question: {doc['q']}\nAnswer:").input_ids
        ids = tok(f"Question: {doc['q']}\nAnswer: {answer}").input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return sum(logits[i - 1, ids[i]].item() for i in range(len(asked), len(ids)))

    return log_p(doc["a"]) > log_p(doc["wrong"])


@needs_harness
def test_a_group_and_an_unknown_task(uninterrupted, tmp_path, own_tasks):
    cfg = asked(uninterrupted, f"output={tmp_path}/results.json", "prompt.template=plain")
    measured = run_harness(cfg, ["own_group"], own_tasks[0])
    tasks = {s.task for s in measured["own_group"]["base"].scores}
    assert {"own_choice", "own_answer"} <= tasks
    with raises("knows no task", "no_such_task"):
        run_harness(cfg, ["no_such_task"], own_tasks[0])
