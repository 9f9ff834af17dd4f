"""The main job: from a few worked examples and questions to an adapter, a card and a report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icl_distill.app import cli
from icl_distill.app.bake import bake, bake_config, run_bake
from icl_distill.app.push import Destination
from icl_distill.core.config import load_config
from icl_distill.core.hub import load_tokenizer
from icl_distill.core.runs import Run
from icl_distill.data.tasks import load_task
from icl_distill.models.loading import load_adapter, load_model
from icl_distill.testing import answering_folder, quiet_environment, raises, tiny_folder
from icl_distill.training.labels import label

SMALL = ["model.dtype=float32", "train.steps=2", "save_every=2", "batch_size=2", "warmup_steps=0"]
SMALL += ["answers.labeller_steps=2", "answers.shot_repeats=1", "evaluate.max_new_tokens=6"]
SMALL += ["lora.r=2"]
FAMILIES = {  # kind, its template, and the last token of its prompts
    "llama": ("llama", "plain", ":", " yes"),
    "qwen3": ("qwen3", "chat", "\n", "yes"),
}


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path, monkeypatch):
    "Six shots, twenty questions, ten test items, all about even numbers."
    monkeypatch.chdir(tmp_path)
    rows = [
        dict(question=f"Is {n} even?", answer="no" if n % 2 else "yes") for n in range(100, 140)
    ]
    Path("shots.jsonl").write_text(lines(rows[:6]))
    Path("test.jsonl").write_text(lines(rows[6:16]))
    Path("questions.txt").write_text("".join(row["question"] + "\n" for row in rows[16:36]))
    Path("rules.txt").write_text("Answer yes or no.\n")
    return tmp_path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    "A tiny model's folder, and how it is asked."
    kind, template, after, answer = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("models") / request.param
    return str(answering_folder(folder, kind, answer, after)), [f"prompt.template={template}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(answering_folder(tmp_path_factory.mktemp("models") / "yes"))


def start(model: str, *over: str, test: str | None = "test.jsonl", out: str = "out"):
    overrides = ["prompt.template=plain", *SMALL, *over]
    return bake("shots.jsonl", "questions.txt", out, model, test, overrides)


def snapshot(*folders: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


# --- the whole of it


def test_all_of_it_in_two_model_families(files, family):
    folder, over = family
    baked = start(folder, *over)
    run = Run("out")
    assert list(baked.results.conditions) == ["zero_shot", "few_shot", "sft", "baked"]
    assert {c.n for c in baked.results.conditions.values()} == {10}
    assert baked.labels.questions == 20 and baked.labels.ended == 20
    compared = {(p.a, p.b) for p in baked.results.paired}
    assert {("baked", "few_shot"), ("baked", "sft")} <= compared
    assert run.results() == baked.results
    rows = run.answers_path("labelled").read_text().splitlines()
    assert len(rows) == 1 + 20
    card = (run.path / "adapter" / "README.md").read_text()
    assert "SFT on the shots" in card and "few_shot" in card and "| baked" in card
    assert "<table" in (run.path / "report.html").read_text()
    cfg = load_config(str(run.config_path))
    tok, base = load_tokenizer(folder), load_model(cfg.model)
    ids = tok("Is 7 even?", return_tensors="pt").input_ids
    before = base(input_ids=ids).logits.clone()
    student = load_adapter(base, run.checkpoints()[-1].folder)
    assert not torch.equal(student(input_ids=ids).logits, before)


def test_the_same_command_again_makes_nothing_anew(files, model, monkeypatch):
    start(model)
    kept = [Run("out").path / name for name in ("answers", "labeller", "checkpoints")]
    kept.append(Run("out").evaluation().records_folder)
    was, card = snapshot(*kept), Path("out/adapter/README.md").read_bytes()
    monkeypatch.setattr("icl_distill.app.preflight.look", None)  # it was measured
    flight = Path("out/preflight.json").read_bytes()
    start(model)
    assert snapshot(*kept) == was and Path("out/adapter/README.md").read_bytes() == card
    assert Path("out/preflight.json").read_bytes() == flight


def test_more_steps_go_on_and_never_mix_with_what_was_measured(files, model):
    start(model)
    answers = snapshot(Run("out").answers_path("teacher").parent)
    with raises("records/baked.jsonl", "something else", "Remove it"):
        start(model, "train.steps=4")
    assert [point.step for point in Run("out").checkpoints()] == [2, 4]
    Run("out").records_path("baked").unlink()
    baked = start(model, "train.steps=4")
    assert baked.results.conditions["baked"].step == 4
    assert snapshot(Run("out").answers_path("teacher").parent) == answers


def test_without_a_test_set_the_prompt_is_what_it_is_compared_with(files, model):
    baked = start(model, test=None)
    assert list(baked.results.conditions) == ["zero_shot", "sft", "baked"]
    assert baked.results.set == "prompt_answers" and baked.labels.questions == 16
    assert {c.n for c in baked.results.conditions.values()} == {4}
    assert "as the prompt does" in baked.verdict
    assert "no accuracy" in Path("out/adapter/README.md").read_text()


def test_a_development_set_chooses_the_baseline_and_not_the_student(files, model):
    rows = [dict(question=f"Is {n} even?", answer="no" if n % 2 else "yes") for n in range(8)]
    Path("dev.jsonl").write_text(lines(rows))
    baked = start(model, "task.dev_path=dev.jsonl")
    labeller = Run(Run("out").labeller_path)
    assert [point.step for point in labeller.checkpoints()] == [2, 4]
    assert baked.results.conditions["sft"].step in (2, 4)
    assert labeller.results("dev").conditions.keys() == {"step_2", "step_4"}
    answers = snapshot(Run("out").answers_path("teacher").parent)
    again = start(model, "task.dev_path=dev.jsonl")
    assert snapshot(Run("out").answers_path("teacher").parent) == answers
    assert again.results.conditions.keys() == baked.results.conditions.keys()


def test_instructions_in_place_of_shots(files, model):
    paths = {"system": Path("rules.txt"), "questions": Path("questions.txt")}
    paths["test"] = Path("test.jsonl")
    cfg = bake_config(model, paths, Path("out"), ["prompt.template=plain", *SMALL])
    assert cfg.answers.source == "teacher" and cfg.context.text == "Answer yes or no."
    baked = run_bake(cfg)
    assert list(baked.results.conditions) == ["zero_shot", "few_shot", "baked"]
    prompt, bare = (baked.results.conditions[k] for k in ("few_shot", "zero_shot"))
    assert prompt.n_shots == 0 and prompt.mean_prompt_tokens > bare.mean_prompt_tokens
    with raises("second labeller"):
        run_bake(bake_config(model, paths, Path("other"), ["answers.source=agreed"]))
    with raises("need a prompt", "context.kind text"):
        run_bake(bake_config(model, paths | {"system": None}, Path("other")))
    assert not Path("other").exists()


def test_the_command(files, model):
    command = [str(Path(sys.executable).with_name("icl-distill")), "bake", "--model", model]
    command += ["--shots", "shots.jsonl", "--questions", "questions.txt", "--test", "test.jsonl"]
    command += ["--system", "rules.txt", "--instruction", "Be brief: 'yes' or no.", "--merge"]
    command += ["--out", "out", "prompt.template=plain", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The baked model answers" in done.stdout and "few_shot" in done.stdout
    said = " ".join(done.stderr.split())
    order = ["6 worked examples", "All of it takes about", "The shots, each behind the others"]
    order += ["20 of 20 answers ended", "SFT:"]
    assert [x for x in order if x in said] == order
    assert sorted(order[:4], key=said.index) == order[:4]
    cfg = load_config(str(Run("out").config_path))
    assert cfg.prompt.system == "Be brief: 'yes' or no." and cfg.context.text == "Answer yes or no."
    merged = load_model(cfg.model.__class__(name="out/merged", dtype="float32"))
    base = load_model(cfg.model)
    ids = torch.tensor([[1, 5, 9, 30]])
    ours = load_adapter(base, Run("out").checkpoints()[-1].folder)(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)


# --- what cannot be baked


def nothing_baked():
    "What the labellers said stays; there is no student."
    assert not Path("out/adapter").exists() and not Run("out").checkpoints()


@pytest.mark.parametrize(
    "shots,questions,words",
    [
        ('{"question": "Is 1 even?", "answer": "no"}\n' * 3, None, ["1 worked example is too few"]),
        (
            lines(dict(question="Is 2 even?", answer=a) for a in ("no", "yes", "yes")),
            None,
            ["differently", "keep the one that is right"],
        ),
        (None, "", ["questions.txt", "no questions"]),
        (None, "Is 100 even?\n", ["asks the same as shot", "a leak"]),
        (None, "Is 107 even?\n", ["asks the same as test example", "a leak"]),
    ],
    ids=["too few shots", "shots contradict", "no questions", "a shot asked", "a test item asked"],
)
def test_files_that_cannot_be_used(shots, questions, words, files, model):
    if shots is not None:
        Path("shots.jsonl").write_text(shots)
    if questions is not None:
        Path("questions.txt").write_text(questions)
    with raises(*words):
        start(model)
    assert not Path("out").exists()


def test_a_teacher_that_never_ends_its_answers(files, tmp_path):
    endless = str(tiny_folder(tmp_path / "endless"))
    with raises("none of the teacher's 20 answers", "20 did not end"):
        start(endless)
    nothing_baked()


def test_drawn_answers_are_the_same_whatever_came_between(files, model):
    "One after the other, in other batches, and gone on with: the same answers, voted on alike."
    paths = {"shots": Path("shots.jsonl"), "questions": Path("questions.txt")}
    drawn = [*SMALL, "prompt.template=plain", "answers.source=teacher", "answers.temperature=1.2"]

    def labels(out, *over):
        cfg = bake_config(model, paths, Path(out), [*drawn, *over])
        base, tok = load_model(cfg.model), load_tokenizer(model)
        rows, _ = label(cfg, base, tok, load_task(cfg.task), False)
        path = Run(out).answers_path("drawn")
        said = map(json.loads, path.read_text().splitlines())
        return rows, {line["id"]: line for line in said if "id" in line}

    rows, said = labels("one", "answers.n=3")
    assert len(said) == 60 and len(rows) == 20 and len({x["text"] for x in said.values()}) > 1
    assert {row.votes for row in rows} <= {0, 1, 2, 3}
    once, first = labels("two", "task.n_questions=7")
    assert first == {id: line for id, line in said.items() if id in first} and len(first) == 7
    again, more = labels("two", "answers.n=3", "evaluate.batch_size=5")
    assert again == rows and more == said
    assert labels("two", "answers.n=3", "answers.vote=false")[0][1].id == "question-0#1"
    with raises("drawn.jsonl", "seed", "something else"):
        labels("two", "seed=1")


def test_gold_answers_are_no_bake(files, model):
    with raises("no gold answers", "teacher or agreed"):
        start(model, "answers.source=gold")
    assert not Path("out").exists()


def test_no_agreement_at_all_stops_where_it_must_not_fall_back(files, model, monkeypatch):
    monkeypatch.setattr("icl_distill.training.labels.why_not", lambda rule, a, b=None: b and "no")
    with raises("agree on 0 of 20", "fall_back=true"):
        start(model, "answers.fall_back=false")
    nothing_baked()
    baked = start(model)
    assert baked.labels.fell_back and baked.labels.used == 20
    assert "too few to train on alone" in Path("out/adapter/README.md").read_text()


def called(monkeypatch, *arguments: str):
    "The command, in this process."
    monkeypatch.setattr(sys, "argv", ["icl-distill", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code


@pytest.mark.parametrize("text", ['it\'s "so"', "two\nlines", "C:\\x \N{SLIGHTLY SMILING FACE}"])
def test_a_text_is_taken_as_it_is_given(text, files, monkeypatch):
    made = []
    monkeypatch.setattr("icl_distill.app.bake.run_bake", lambda cfg, **_: made.append(cfg) or 1 / 0)
    Path("rules.txt").write_text(text)
    command = ["icl-distill", "bake", "--shots", "shots.jsonl", "--questions", "questions.txt"]
    command += ["--out", "out", "--instruction", text, "--system", "rules.txt"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ZeroDivisionError):
        cli.main()
    assert made[0].prompt.system == made[0].context.text == text


def test_push_to_is_the_command_push(files, model, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr("icl_distill.app.push.push", lambda *given: pushed.append(given) or "there")
    monkeypatch.setattr("icl_distill.app.push._client", lambda to: "the client")
    command = ["bake", "--model", model, "--shots", "shots.jsonl", "--out", "out"]
    command += ["--questions", "questions.txt", "--test", "test.jsonl", "--push-to", "me/even"]
    called(monkeypatch, *command, "prompt.template=plain", *SMALL)
    assert pushed == [(Path("out/adapter").resolve(), Destination("me/even"), "the client")]
    assert capsys.readouterr().out.strip().endswith("there")
    card = Path("out/adapter/README.md").read_text()
    assert "# me/even" in card and 'adapter = "me/even"' in card
    assert "SFT on the shots" in card and "| baked" in card  # the bake's card, from its folder


def test_a_bake_is_a_run_like_any_other(files, model, monkeypatch, capsys):
    baked = start(model)
    called(monkeypatch, "report", "out")
    called(monkeypatch, "evaluate", "out", "output=again.json")
    assert "baked" in capsys.readouterr().out
    again = json.loads(Path("again.json").read_text())["conditions"]
    assert again["step_2"]["accuracy"] == baked.results.conditions["baked"].accuracy
