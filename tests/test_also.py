"""What is learnt beside an answer: its weight, its texts, and what is refused."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from helpers_training import TOY, config, equal, go, gradient_of, lines
from pyarrow import parquet
from torch.nn.functional import cross_entropy

from icl_distill.core.config import load_config
from icl_distill.core.runs import Run
from icl_distill.data.also import ALSO_FORMATS, context_text
from icl_distill.data.contexts import Context
from icl_distill.data.examples import Question
from icl_distill.data.prompts import Prompter
from icl_distill.models.loading import add_lora, frozen_head, trained_head
from icl_distill.objectives.sums import loss_metrics
from icl_distill.testing import answering_folder, raises, real_tokenizer, tiny_model
from icl_distill.training.batches import encoding_key, kept_data, micro_batches, prepare
from icl_distill.training.labels import train_on_answers
from icl_distill.training.setup import assemble
from icl_distill.training.state import Learner
from icl_distill.training.step import Student, backward_step

RATIONALE = ["answers={also: rationale, also_weight: 0.3}", "loss={weight: 0, ce: 0.7}"]
WORKED = dataclasses.replace(TOY, train=[e for e in TOY.train if e.answer.startswith("so")])
TOK = real_tokenizer()


def prepared(*over, task=WORKED):
    cfg = config("runs/x", *RATIONALE, "lora.dropout=0", *over)
    return cfg, prepare(cfg, task, Prompter(TOK, cfg.prompt))


def plain_ce(model, a):
    "Of each answer token: by all the logits of the example alone."
    ids = torch.tensor([a.student_ids])
    return cross_entropy(
        model(ids).logits[0, -a.n_answer - 1 : -1], ids[0, -a.n_answer :], reduction="none"
    )


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("head_of", [frozen_head, trained_head])
def test_two_means_are_weighed(size, head_of):
    "Of all label tokens of the step, and of all rationale tokens; whatever the micro-batches."
    cfg, data = prepared()
    model = add_lora(tiny_model(), cfg.lora)
    batch = data.batch(0, 5, seed=1)
    assert [a.also for a in batch] == [False] * 5 + [True] * 5
    labels, steps = (
        torch.cat([plain_ce(model, a) for a in some]) for some in (batch[:5], batch[5:])
    )
    want = 0.7 * labels.mean() + 0.3 * steps.mean()
    want.backward()
    naive = gradient_of(model)
    model.zero_grad()
    learner = Learner(Student(model), None, head_of(model), Accelerator(cpu=True), cfg.loss, 0)
    learner.also_weight = cfg.answers.also_weight
    sums = backward_step(learner, micro_batches(batch, size))
    row = loss_metrics(sums)
    for key, value in (("loss", want), ("ce", labels.mean()), ("also", steps.mean())):
        assert row[key] == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(gradient_of(model), naive, rtol=1e-3, atol=1e-6)


def test_the_weight_comes_from_the_config():
    cfg, data = prepared()
    model = add_lora(tiny_model(), cfg.lora)
    for given, weight in ((cfg, 0.3), (config("runs/x", "loss.weight=0"), 0.0)):
        state = assemble(given, Accelerator(cpu=True), model, TOK, data, "hash")
        assert state.learner.also_weight == weight


def test_labels_and_rationales():
    "Each under its own prefix; together they are the worked answer."
    cfg, data = prepared()
    examples = {e.id: e for e in WORKED.train}
    assert [a.id for a in data.aligned] == [a.id for a in data.also]
    for label, steps in zip(data.aligned, data.also, strict=True):
        e = examples[label.id]
        said = [TOK.decode(a.answer_ids, skip_special_tokens=True) for a in (steps, label)]
        assert "".join(said) == e.answer.replace(" ####", "####")
        prompts = [TOK.decode(a.student_ids[: -a.n_answer]) for a in (label, steps)]
        assert prompts[1] == prompts[0].replace(f"Question: {e.question}", f"Explain: {e.question}")
        assert steps.student_ids == steps.teacher_ids


def test_what_does_not_fit_goes_with_its_example():
    "A rationale that is too long takes its label along, and is named."
    most = max(len(a.student_ids) for a in prepared()[1].also) - 1
    limit = f"prompt.max_student_tokens={most}"
    with raises("training examples do not fit", f"({most + 1} would do)"):
        prepared(limit)
    _, data = prepared(limit, "prompt.too_long=drop")
    assert data.left_out["too_long"] and len(data.aligned) == len(data.also) < len(WORKED.train)


def kept(run):
    "The encoded examples that lie in a run's folder."
    about = parquet.read_schema(run.encoded_path).metadata[b"icl_distill"]
    return kept_data(run.encoded_path, json.loads(about)["key"])


def test_kept_data_has_both(tmp_path):
    run, over = Run(tmp_path), [*RATIONALE, "steps=1", "model.dtype=float32"]
    go(tmp_path, *over, task=WORKED)
    read, data = kept(run), prepared()[1]
    assert (read.aligned, read.also, read.hash) == (data.aligned, data.also, data.hash)
    assert data.hash != dataclasses.replace(data, also=[]).hash
    other = [dataclasses.replace(e, also=("?", "!")) for e in WORKED.train]
    cfg = config(tmp_path, *over)
    prompter = Prompter(TOK, cfg.prompt)
    keys = [
        encoding_key(cfg, dataclasses.replace(WORKED, train=some), prompter, None)
        for some in (WORKED.train, other)
    ]
    assert keys[0] != keys[1]


def test_an_interruption_changes_nothing(tmp_path):
    over = [*RATIONALE, "schedule=constant", "save_every=2", "log_every=1"]
    whole = go(tmp_path / "whole", *over, task=WORKED)
    go(tmp_path / "cut", *over, "steps=2", task=WORKED)
    cut = go(tmp_path / "cut", *over, task=WORKED)
    assert equal(whole, cut) and lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_answers_without_steps_are_refused():
    with raises("needs worked steps", "word_problems"):
        prepared(task=TOY)  # some have none


def test_the_prompt_is_written(tmp_path):
    "From the question and both answers, which show no prompt, to the prompt; the shots have none."
    folder = answering_folder(tmp_path / "model")
    shots = TOY.train[1:5]
    questions = [Question(f"asked-{e.id}", e.question) for e in TOY.train[5:9]]
    task = dataclasses.replace(TOY, train=shots, questions=questions, extract="exact")
    given = [f"model.name={folder}", "task.n_train=8", "evaluate.max_new_tokens=4"]
    given += ["train.steps=1", "train.save_every=1", f"run={tmp_path / 'run'}"]
    cfg = load_config("methods/genpi", given)
    train_on_answers(cfg, task=task, progress=False)
    run = Run(tmp_path / "run")
    data = kept(run)
    assert [a.id for a in data.also] == [q.id for q in questions]
    assert [a.id for a in data.aligned] == [q.id for q in questions]  # no shot is one
    prompt = f"Prompt:\n\n{context_text(Context(tuple(shots)))}\n\nReason: yes"
    for a, q in zip(data.also, questions, strict=True):
        assert TOK.decode(a.answer_ids, skip_special_tokens=True).strip() == prompt
        asked = TOK.decode(a.student_ids[: -a.n_answer])
        assert q.question in asked and not any(shot.question in asked for shot in shots)
        assert "Answer without the prompt: yes" in asked and "Answer with the prompt: yes" in asked
    row = run.metrics()[0]
    assert row["loss"] == pytest.approx(0.7 * row["ce"] + 0.3 * row["also"], rel=1e-5)


@pytest.mark.parametrize(
    "over,word",
    [
        (["answers.also=rationale", "loss.weight=0.5"], "loss.weight=0"),
        (["answers.also=rationale", "hidden.weight=1", "loss.weight=0"], "hidden.weight=0"),
        (["answers.also=prompt", "loss.weight=0"], "answers.source"),
        (["answers={also: rationale, source: student}", "loss={weight: 1, ce: 0}"], "'student'"),
    ],
)
def test_what_cannot_be_is_refused(over, word):
    with raises("answers.also", word):
        config("runs/x", *over)


def test_formats_differ():
    assert len({"Question: {question}", *ALSO_FORMATS.values()}) == 3
