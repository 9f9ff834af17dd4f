"Drawn answers beside the greedy one: the nucleus, pass@k, intervals over items, and what is kept."

import itertools
import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

from icl_distill.core.config import (
    Config,
    ContextConfig,
    EvaluateConfig,
    ModelConfig,
    PromptConfig,
    SamplingConfig,
    TaskConfig,
    replace,
)
from icl_distill.core.results import read_results
from icl_distill.evaluation.draws import clustered_ci, pass_at_k
from icl_distill.evaluation.evaluate import evaluate
from icl_distill.evaluation.seeds import report
from icl_distill.evaluation.statistics import bootstrap_ci, wilson
from icl_distill.evaluation.tables import as_csv, markdown
from icl_distill.models.decoding import Sampling, nucleus, pick
from icl_distill.models.generation import TransformersEngine
from icl_distill.testing import (
    REAL_MODEL,
    FakeEngine,
    counting_questions,
    fake_run,
    raises,
    real_tokenizer,
    tiny_model,
)
from icl_distill.training.on_policy import answer_seed

tok = real_tokenizer()


# --- the nucleus


@given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(0.2, 8.0))
def test_the_nucleus_is_that_of_transformers(seed, top_p, scale):
    logits = scale * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    theirs = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    p = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    if (p - top_p).abs().min() < 1e-5:
        return  # on the very edge rounding decides, and both sums are right
    assert torch.equal(nucleus(logits, top_p), theirs)


def test_the_edges_of_the_nucleus():
    logits = torch.tensor([[0.0, 2.0, 1.0, -torch.inf]])
    assert torch.equal(nucleus(logits, 1.0), logits)
    assert nucleus(logits, 1e-9).isfinite().tolist() == [[False, True, False, False]]
    assert nucleus(torch.zeros(1, 4), 0.5).isfinite().sum() == 2  # equals: the first of them
    streams = [torch.Generator().manual_seed(i) for i in range(200)]
    drawn = pick(logits.expand(200, -1), streams, 1.0, 0.7)
    assert set(drawn.tolist()) == {1, 2}  # 0.67 alone is not enough


# --- pass@k


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_choices(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 1), (8, 3), (8, 8), (200, 100)])
def test_pass_at_k_is_unbiased(p, n, k):
    "Its expectation is the chance that one of k answers is right."
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_nothing_is_refused(n, c, k):
    with raises("from 1 to n"):
        pass_at_k(n, c, k)


# --- intervals over items


def test_the_interval_is_that_of_clusters():
    "Cluster-robust: the spread of the items' means, not that of the answers."
    rng = np.random.default_rng(0)
    right = rng.binomial(8, rng.beta(0.5, 0.5, size=400))
    low, high = clustered_ci(right / 8)
    mean, half = right.mean() / 8, 1.96 * (right / 8).std(ddof=1) / 20
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)
    alone = wilson(int(right.sum()), 8 * 400)
    assert high - low > 1.8 * (alone[1] - alone[0])
    assert (low, high) == bootstrap_ci(right / 8)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_items_that_are_all_alike_are_not_certain(share):
    low, high = clustered_ci([share] * 20)
    assert low <= share <= high and high - low > 0.1
    if share in (0, 1):
        assert (low, high) == wilson(int(20 * share), 20)
    assert clustered_ci([share])[0] <= share  # one item


def test_no_shares():
    for bad in ([], [1.5], [-0.1], [[0.5]]):
        with raises("between 0 and 1"):
            clustered_ci(bad)


# --- an evaluation


class Drawing(FakeEngine):
    "A fake whose drawn answers are right where their seed is even."

    def generate(self, prompts, adapter, max_new_tokens, sampling=None):
        if sampling is None:
            yield from super().generate(prompts, adapter, max_new_tokens)
            return
        assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
        for n in reversed(range(len(prompts))):
            text = self.tok.decode(prompts[n])
            right, self.right = self.right, lambda *_, n=n: sampling.seeds[n] % 2 == 0
            if self.stop_after == len(self.asked):
                raise KeyboardInterrupt
            answer = self._answer("drawn", text[text.rindex("In ") :])
            self.right = right
            yield n, answer


@pytest.fixture
def cfg(tmp_path):
    files = {k: counting_questions(tmp_path / f"{k}.jsonl", k, 12) for k in ("train", "test")}
    drawn = SamplingConfig(n=5, temperature=0.7, top_p=0.9, seed=3)
    return Config(
        model=ModelConfig(name=REAL_MODEL, dtype="float32"),
        task=TaskConfig(name="jsonl", path=files["train"], test_path=files["test"], n_dev=2),
        prompt=PromptConfig(template="plain"),
        context=ContextConfig(n_shots=2),
        evaluate=EvaluateConfig(max_new_tokens=6, engine="transformers", sampling=drawn),
        run=str(tmp_path / "run"),
    )


def with_draws(cfg, **changes):
    sampling = replace(cfg.evaluate.sampling, **changes)
    return replace(cfg, evaluate=replace(cfg.evaluate, sampling=sampling))


def go(cfg, engine):
    return evaluate(cfg, engine=engine, progress=False)


def drawn_lines(cfg, condition="zero_shot"):
    path = Path(cfg.run) / "evaluation" / "records" / "drawn" / f"{condition}.jsonl"
    rows = map(json.loads, path.read_text().splitlines())
    return {row["id"]: row for row in rows if "id" in row}


def test_what_is_measured_is_the_definition(cfg):
    results = go(cfg, Drawing(tok))
    place = Path(cfg.run) / "evaluation"
    assert read_results(place / "results.json") == results
    rows = drawn_lines(cfg)
    ids = {name.rpartition("#")[0] for name in rows}
    assert len(rows) == 60 and len(ids) == 12
    right = {item: [rows[f"{item}#{k}"]["correct"] for k in range(5)] for item in ids}
    for item, each in right.items():
        assert each == [answer_seed(3, 0, f"{item}#{k}") % 2 == 0 for k in range(5)]
    for c in results.conditions.values():
        s = c.sampled
        assert (s.n, s.temperature, s.top_p, s.seed) == (5, 0.7, 0.9, 3)
        assert s.mean == pytest.approx(sum(map(sum, right.values())) / 60)
        assert s.mean_ci95 == clustered_ci([sum(right[i]) / 5 for i in _order(rows)])
        assert [p.k for p in s.pass_at] == [2, 4, 5]
        for p in s.pass_at:
            each = [any(choice) for i in ids for choice in itertools.combinations(right[i], p.k)]
            assert p.value == pytest.approx(sum(each) / len(each))
            assert p.ci95[0] <= p.value <= p.ci95[1]
    plain = with_draws(replace(cfg, run=f"{cfg.run}-plain"), n=0)
    greedy = go(plain, Drawing(tok))
    for name, c in greedy.conditions.items():
        assert c.sampled is None
        mine = results.conditions[name]
        assert (c.accuracy, c.ci95, c.n) == (mine.accuracy, mine.ci95, mine.n)
    assert [p.difference for p in results.paired] == [p.difference for p in greedy.paired]


def _order(rows):
    "Items as the test set has them."
    return dict.fromkeys(sorted((i.rpartition("#")[0] for i in rows), key=lambda i: (len(i), i)))


def test_tables_show_the_drawn_answers(cfg):
    results = go(cfg, Drawing(tok))
    s, text = results.conditions["zero_shot"].sampled, markdown(results)
    assert "mean@5 [95 %]" in text and "pass@5 [95 %]" in text
    assert f"{100 * s.mean:.1f} % [{100 * s.mean_ci95[0]:.1f}" in text
    assert "5 answers to an item drawn at temperature 0.7, top_p 0.9, seed 3" in text
    head = as_csv(results).splitlines()[0]
    assert "mean_at_n,mean_at_n_low" in head and "pass_at_4" in head and "pass_at_5_high" in head
    plain = with_draws(replace(cfg, run=f"{cfg.run}-plain"), n=0)
    none = go(plain, Drawing(tok))
    assert "mean@" not in markdown(none) and "mean_at" not in as_csv(none)


@pytest.mark.parametrize("after", [0, 12, 13, 40, 83])
def test_a_kill_costs_nothing_and_changes_nothing(cfg, after):
    whole = go(replace(cfg, run=f"{cfg.run}-whole"), Drawing(tok))
    first, second = Drawing(tok, stop_after=after), Drawing(tok)
    with suppress(KeyboardInterrupt):
        go(cfg, first)
    results = go(cfg, second)
    assert len(first.asked) + len(second.asked) == 2 * (12 + 60)
    for name, c in whole.conditions.items():
        assert results.conditions[name].sampled == c.sampled
    third = Drawing(tok)
    go(cfg, third)
    assert not third.asked


def test_more_draws_are_added_and_fewer_are_read(cfg):
    go(with_draws(cfg, n=2), Drawing(tok))
    more = Drawing(tok)
    five = go(cfg, more)
    assert len(more.asked) == 2 * 12 * 3
    fresh = go(replace(cfg, run=f"{cfg.run}-fresh"), Drawing(tok))
    assert five.conditions["zero_shot"].sampled == fresh.conditions["zero_shot"].sampled
    none = Drawing(tok)
    one = go(with_draws(cfg, n=1), none).conditions["zero_shot"].sampled
    assert not none.asked and one.n == 1 and one.pass_at == []


@pytest.mark.parametrize("change", [dict(temperature=0.8), dict(top_p=0.8), dict(seed=4)])
def test_other_draws_are_not_mixed_in(cfg, change):
    go(cfg, Drawing(tok))
    with raises("answers to something else", "sampling", "drawn"):
        go(with_draws(cfg, **change), Drawing(tok))


def seeds_of(cfg, tmp_path, name, draws):
    "A run for each number of draws, with a checkpoint, its own seed and its own draws."
    for seed, n in enumerate(draws):
        run = fake_run(tmp_path / f"{name}{seed}", (10,))
        asked = replace(cfg.evaluate, conditions=["zero_shot"], checkpoints=str(run.path))
        here = replace(cfg, run=str(run.path), seed=seed, evaluate=asked)
        go(with_draws(here, n=n, seed=seed), Drawing(tok))
        yield run


def test_drawn_answers_are_combined_over_seeds(cfg, tmp_path, capsys):
    runs = list(seeds_of(cfg, tmp_path, "run", (5, 5, 5)))
    arm = report([run.path for run in runs])
    assert "mean@5" in capsys.readouterr().out
    results = [run.results() for run in runs]
    for measure, value in (
        ("mean@5", lambda s: s.mean),
        ("pass@5", lambda s: s.pass_at[-1].value),
    ):
        each = [value(r.conditions["step_10"].sampled) for r in results]
        found = arm.drawn["step_10"][measure]
        assert found.per_seed == pytest.approx(each)
        assert found.mean == pytest.approx(np.mean(each))
        assert found.se == pytest.approx(np.std(each, ddof=1) / math.sqrt(3))
        each = [value(r.conditions["zero_shot"].sampled) for r in results]
        base = arm.drawn["zero_shot"][measure]
        assert base.se is None and base.mean == pytest.approx(np.mean(each))
        assert base.interval[0] <= base.mean <= base.interval[1]
    rows = [drawn_lines(replace(cfg, run=str(run.path))) for run in runs]
    shares = [
        np.mean([r[f"test-{i}#{k}"]["correct"] for r in rows for k in range(5)]) for i in range(12)
    ]
    interval = arm.drawn["zero_shot"]["mean@5"].interval
    assert interval == pytest.approx(clustered_ci(shares), abs=5e-3)  # items in another order


def test_draws_that_differ_are_left_out_and_said(cfg, tmp_path, capsys):
    runs = seeds_of(cfg, tmp_path, "run", (2, 3))
    arm = report([run.path for run in runs])
    assert not arm.drawn and "left out: not all runs drew alike" in capsys.readouterr().out


def test_shards_draw_what_one_process_draws(cfg):
    whole = go(replace(cfg, run=f"{cfg.run}-whole"), Drawing(tok))
    for shard in ("2/2", "1/2"):
        results = go(replace(cfg, evaluate=replace(cfg.evaluate, shard=shard)), Drawing(tok))
    for name, c in whole.conditions.items():
        assert results.conditions[name].sampled == c.sampled


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", initializer_range=0.3, tie_word_embeddings=True)


def test_a_real_engine_draws_alike_in_any_batch(cfg, model, one_thread):
    said = {}
    for size in (1, 7, 64):
        here = with_draws(replace(cfg, run=f"{cfg.run}-{size}"), n=3)
        evaluate(here, engine=TransformersEngine(model, tok, [2], size), progress=False)
        said[size] = {name: row["text"] for name, row in drawn_lines(here).items()}
    assert said[1] == said[7] == said[64]
    assert len(set(said[1].values())) > 30  # drawn, and not one answer again and again


def test_top_p_reaches_the_engine(model, one_thread):
    "A nucleus of one token is greedy decoding."
    engine = TransformersEngine(model, tok, [2], 4)
    prompts = [tok(text).input_ids for text in ("In test 1", "a b", "Why?")]
    greedy = dict(engine.generate(prompts, None, 8))
    narrow = Sampling(1.0, [1, 2, 3], top_p=1e-6)
    assert dict(engine.generate(prompts, None, 8, sampling=narrow)) == greedy
    assert dict(engine.generate(prompts, None, 8, sampling=Sampling(1.0, [1, 2, 3]))) != greedy
