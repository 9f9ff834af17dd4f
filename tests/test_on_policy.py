"""The student's own answers: that they are what is learnt from, and that a kill changes nothing."""

import dataclasses

import pytest
import torch
from helpers_training import TOY, config, equal, go, gradient_of, lines, steps_of

from icl_distill.core.runs import Run
from icl_distill.data.examples import Question
from icl_distill.models.generation import TransformersEngine
from icl_distill.testing import raises, real_tokenizer, tiny_model
from icl_distill.training import loop
from icl_distill.training.labels import train_on_answers
from icl_distill.training.on_policy import OwnAnswers, answer_seed

OWN = [
    "loss={kind: reverse_kl, weight: 1, ce: 0}",
    "answers={source: student, temperature: 1.0, refresh: 3}",
    "evaluate.max_new_tokens=6",
    "log_every=1",
]


def talkative():
    "A tiny model whose answers differ and do not all end at the limit."
    return tiny_model(initializer_range=0.3)


@pytest.mark.parametrize("drawn", [True, False])
def test_an_interruption_within_a_block_changes_nothing(tmp_path, drawn):
    "The answers in force were made by weights that are gone: they are part of the checkpoint."
    over = [*OWN, "schedule=constant", "save_every=2"]
    over += [] if drawn else ["answers.temperature=0"]
    whole = go(tmp_path / "whole", *over, base=talkative())
    go(tmp_path / "cut", *over, "steps=4", base=talkative())  # the second block: steps 3, 4, 5
    cut = go(tmp_path / "cut", *over, base=talkative())
    assert equal(whole, cut) and lines(tmp_path / "whole") == lines(tmp_path / "cut")
    with raises("another config", "evaluate.max_new_tokens"):
        go(tmp_path / "cut", *over, "evaluate.max_new_tokens=5", base=talkative())
    assert steps_of(tmp_path / "cut") == [1, 2, 3, 4, 5, 6]


def test_answers_are_the_students_of_the_blocks_first_step(tmp_path, monkeypatch):
    "Each block by the adapter as it is then: greedy, alone, with the engine that evaluates."
    seen = []
    own = OwnAnswers.__call__

    def watched(self, state):
        batch = own(self, state)
        if state.step % 3 == 0:
            prompts = [a.student_ids[: -a.n_answer] for a in batch]
            engine = TransformersEngine(state.model, state.tokenizer, [self.end], 1)
            said = dict(engine.generate(prompts, "default", 6))
            for i, a in enumerate(batch):
                end = [] if said[i].truncated else [self.end]
                assert a.answer_ids == said[i].ids + end
                assert a.teacher_ids[-a.n_answer :] == a.answer_ids
        seen.append(state.step)
        return batch

    monkeypatch.setattr(OwnAnswers, "__call__", watched)
    go(tmp_path / "run", *OWN, "answers.temperature=0", base=talkative())
    assert seen == [0, 1, 2, 3, 4, 5]


def test_an_answer_does_not_depend_on_its_batch(tmp_path, monkeypatch):
    blocks = []
    block = OwnAnswers._block
    monkeypatch.setattr(
        OwnAnswers, "_block", lambda self, state: blocks.append(block(self, state)) or blocks[-1]
    )
    for size in (1, 5):
        changes = ["steps=1", f"evaluate.batch_size={size}"]
        go(tmp_path / str(size), *OWN, *changes, base=talkative())
    assert blocks[0] == blocks[1] and len({tuple(ids) for ids in blocks[0][0]}) > 1


def test_questions_are_learnt_and_the_shots_are_read(tmp_path, monkeypatch):
    "Of a task with questions: nothing else is trained on, and no shot is a question."
    task = dataclasses.replace(
        TOY,
        train=TOY.train[:4],
        questions=[Question(f"asked-{e.id}", e.question) for e in TOY.train[4:12]],
    )
    batches = []
    examples = loop._examples
    monkeypatch.setattr(
        loop, "_examples", lambda state: batches.append(examples(state)) or batches[-1]
    )
    cfg = config(tmp_path / "run", *OWN, "context.kind=fixed", "steps=3")
    train_on_answers(cfg, talkative(), real_tokenizer(), task, progress=False)
    ids = {a.id for batch in batches for a in batch}
    assert ids == {q.id for q in task.questions}
    first = batches[0][0]
    assert len(first.teacher_ids) > len(first.student_ids) and first.context_key


def test_metrics_say_when_answers_do_not_end(tmp_path):
    go(tmp_path / "run", *OWN, base=talkative())
    rows = Run(tmp_path / "run").metrics()
    for row in rows:
        assert row["loss"] == pytest.approx(row["distill"]) and row["ce"] > 0
        assert 0 <= row["truncated"] <= 1 and 1 <= row["answer_tokens"] <= 6
        assert row["n_answer_tokens"] == pytest.approx(6 * row["answer_tokens"])


REFUSED = ["loss.ce=1", "loss={weight: 0, ce: 1}", "teacher.cache=ram", "loss.tail=false"]
REFUSED += ["loss.kind=centred_mse", "train.compile=true", "answers.n=2"]


POLICY = ["loss={kind: reverse_kl, weight: 1, ce: 0, policy: 0.5}", "teacher.keep=hidden"]
POLICY += ["answers={source: student, teacher_share: 0.2}", "evaluate.max_new_tokens=6"]
POLICY += ["log_every=1", "schedule=constant", "lora.dropout=0"]


def probabilities(model, ids, n):
    "Of all tokens, log, at the positions that predict the last n."
    return model(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)


def test_a_policy_step_is_the_naive_one(tmp_path, monkeypatch):
    "Reverse KL over the whole vocabulary and PPO's term, from full logits of whole sequences."
    steps, backward = [], loop.backward_step

    def compared(learner, micro, diagnose):
        model, few = learner.student.model, [a for m in micro for a in m]
        singles, longs, gains, ratios = [], [], [], []
        for a in few:
            q = probabilities(model, a.student_ids, a.n_answer)
            with torch.no_grad(), model.disable_adapter():
                p = probabilities(model, a.teacher_ids, a.n_answer)
            said = torch.tensor(a.answer_ids)[:, None]
            q_y, p_y = q.gather(1, said)[:, 0], p.gather(1, said)[:, 0]
            singles.append((q.exp() * (q - p)).sum(-1))
            gain = (p_y - q_y).detach().tolist()
            for t in range(len(gain)):
                rest = [0.95**i * r for i, r in enumerate(gain[t + 1 :])]
                gains.append(sum(rest) / max(1, len(rest)))
            mixed = 0.2 * p_y.exp() + 0.8 * q_y.exp().detach()
            ratios.append(q_y.exp() / mixed)
        gains, ratios = torch.tensor(gains), torch.cat(ratios)
        advantage = (gains - gains.mean()) / gains.std(correction=0)
        longs = torch.minimum(advantage * ratios, advantage * ratios.clamp(0.8, 1.2))
        want = (torch.cat(singles) - 0.5 * longs).mean()
        naive = torch.autograd.grad(want, [p for p in model.parameters() if p.requires_grad])
        sums = backward(learner, micro, diagnose)
        torch.testing.assert_close(sums[0] / sums[3], want.detach(), rtol=1e-3, atol=1e-4)
        ours = gradient_of(model)
        torch.testing.assert_close(
            ours, torch.cat([x.flatten() for x in naive]), rtol=2e-3, atol=1e-5
        )
        assert (ratios < 0.8).any() or (ratios > 1.2).any()  # some are clipped
        steps.append(longs.abs().max())
        return sums

    monkeypatch.setattr(loop, "backward_step", compared)
    go(tmp_path / "run", *POLICY, "steps=2", "lr=5e-2", "warmup_steps=0", base=talkative())
    assert len(steps) == 2
    for row in Run(tmp_path / "run").metrics():
        assert row["loss"] == pytest.approx(row["distill"] + row["policy"], rel=1e-5)


def test_an_interruption_of_a_policy_run_changes_nothing(tmp_path):
    whole = go(tmp_path / "whole", *POLICY, "steps=2", base=talkative())
    go(tmp_path / "cut", *POLICY, "steps=1", base=talkative())
    cut = go(tmp_path / "cut", *POLICY, "steps=2", base=talkative())
    assert equal(whole, cut) and lines(tmp_path / "whole") == lines(tmp_path / "cut")


@pytest.mark.parametrize(
    "change,word",
    [
        ("answers.refresh=2", "answers.refresh=1"),
        ("answers.temperature=0.5", "answers.temperature=1"),
        ("answers.temperature=0", "temperature above 0"),
        ("teacher.keep=topk", "teacher.keep=hidden"),
        ("hidden.weight=1", "hidden.weight=0"),
        ("answers.source=gold", "answers.source=student"),
    ],
)
def test_a_policy_gradient_of_something_else_is_refused(tmp_path, change, word):
    with raises(word):
        config(tmp_path, *POLICY, change)


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    for change in REFUSED:
        with raises("answers.source", "'student'"):
            config(tmp_path, *OWN, change)
    assert config(tmp_path, *OWN, "answers.temperature=null").answers.drawn_at == 1
    with raises("evaluate.max_new_tokens", "prompt.max_student_tokens=512"):
        go(tmp_path / "run", *OWN, "evaluate.max_new_tokens=500", base=talkative())
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises("in one process"):
        go(tmp_path / "run", *OWN)


def test_seeds_differ():
    seeds = {answer_seed(s, step, name) for s in (0, 1) for step in range(9) for name in "abc"}
    assert len(seeds) == 54 and all(0 <= seed < 2**60 for seed in seeds)
    assert torch.Generator().manual_seed(max(seeds))


def test_a_run_begins_with_anothers_adapter(tmp_path):
    "On policy after SFT: its first answers are those of the adapter that SFT has made."
    sft = go(tmp_path / "sft", "loss.weight=0", "steps=2", base=talkative())
    begin = [*OWN, f"lora.init_from={tmp_path / 'sft'}"]
    first = go(tmp_path / "whole", *begin, base=talkative())
    go(tmp_path / "cut", *begin, "schedule=constant", "steps=2", base=talkative())
    again = go(tmp_path / "cut", *begin, "schedule=constant", base=talkative())
    fresh = go(tmp_path / "fresh", *OWN, base=talkative())
    named = go(tmp_path / "named", *OWN, f"lora.init_from={sft}", base=talkative())
    assert equal(first, again) and equal(first, named) and not equal(first, fresh)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    go(tmp_path / "sft", "loss.weight=0", "steps=2", base=talkative())
    begin = f"lora.init_from={tmp_path / 'sft'}"
    with raises("another rank"):
        go(tmp_path / "rank", begin, "lora.r=2", base=talkative())
    with raises("was trained on"):
        go(tmp_path / "base", begin, base=tiny_model(seed=1, initializer_range=0.3))
    with raises("no such folder"):
        go(tmp_path / "none", f"lora.init_from={tmp_path / 'nothing'}", base=talkative())
