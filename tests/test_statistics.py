"Statistics: known cases from the literature, and laws that hold for any data."

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from icl_distill.core.files import InputError
from icl_distill.evaluation.power import detectable_difference, holm, mcnemar_power
from icl_distill.evaluation.statistics import (
    bootstrap_ci,
    combine_seeds,
    compare,
    mcnemar_exact,
    mean_se,
    paired_bootstrap,
    paired_table,
    verdict_words,
    wilson,
)

bits = st.lists(st.booleans(), min_size=2, max_size=60)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def test_no_torch():
    code = (
        "import sys, icl_distill.evaluation.statistics, icl_distill.evaluation.power\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'scipy', 'statsmodels', 'pandas'}\n"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "k,n,known",
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_newcombe(k, n, known):
    np.testing.assert_allclose(wilson(k, n), known, atol=5e-5)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_laws(kn):
    k, n = kn
    lo, hi = wilson(k, n)
    assert 0 <= lo < hi <= 1 and lo <= k / n + 1e-12 and hi >= k / n - 1e-12
    np.testing.assert_allclose(
        wilson(n - k, n), (1 - hi, 1 - lo), atol=1e-9
    )  # right and wrong swapped
    wide = wilson(k, n, level=0.99)
    assert wide[0] <= lo + 1e-12 and wide[1] >= hi - 1e-12


@pytest.mark.parametrize("k,n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(InputError):
        wilson(k, n)


@given(pairs)
def test_mcnemar_is_a_binomial_test(ab):
    a, b = zip(*ab, strict=True)
    only_a, only_b = sum(x and not y for x, y in ab), sum(y and not x for x, y in ab)
    t = paired_table(a, b)
    assert (
        t.sum() == len(ab)
        and t[0, 1] == only_a
        and t[1, 0] == only_b
        and t[0].sum() == sum(a)
        and t[:, 0].sum() == sum(b)
    )
    known = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    assert math.isclose(mcnemar_exact(a, b), known, rel_tol=1e-9) and mcnemar_exact(
        a, b
    ) == mcnemar_exact(b, a)


def test_mcnemar_agresti():
    a, b = (np.repeat(v, [794, 150, 86, 570]) for v in ([1, 1, 0, 0], [1, 0, 1, 0]))
    np.testing.assert_allclose(mcnemar_exact(a, b), 3.716e-05, rtol=1e-4)


def test_mcnemar_keeps_its_level():
    "Under the null hypothesis p <= 0.05 happens in at most 5 % of the cases."
    rng = np.random.default_rng(0)
    p = [mcnemar_exact(*(rng.random((2, 80)) < 0.6)) for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) < 0.07


@settings(max_examples=30, deadline=None)
@given(pairs, st.integers(0, 5))
def test_paired_bootstrap_laws(ab, seed):
    a, b = zip(*ab, strict=True)
    d, lo, hi = paired_bootstrap(a, b, seed, n_resamples=500)
    assert math.isclose(d, np.mean(a) - np.mean(b), abs_tol=1e-12) and -1 <= lo <= hi <= 1
    assert paired_bootstrap(a, b, seed, n_resamples=500) == (d, lo, hi)
    back = paired_bootstrap(b, a, seed, n_resamples=500)
    np.testing.assert_allclose(back, (-d, -hi, -lo), atol=1e-9)


def test_bootstrap_is_normal_for_many_items():
    x = np.random.default_rng(0).normal(3, 2, 4000)
    half = 1.96 * x.std() / math.sqrt(len(x))
    np.testing.assert_allclose(
        bootstrap_ci(x), (x.mean() - half, x.mean() + half), atol=0.06 * half
    )
    assert bootstrap_ci(np.ones(7)) == (1, 1)


def test_bad_outcomes():
    for a, b in (
        ([1, 0], [1, 0, 1]),
        ([1, 0.5], [1, 0]),
        ([1, None], [1, 0]),
        ([], []),
        ([[1]], [[1]]),
    ):
        for f in (mcnemar_exact, paired_bootstrap, paired_table):
            with pytest.raises(InputError):
                f(a, b)
    with pytest.raises(InputError):
        bootstrap_ci([1, math.nan])
    with pytest.raises(InputError):
        bootstrap_ci([1])


def test_compare_by_id():
    a, b = {"x": True, "y": False, "z": True}, {"z": False, "y": False, "x": True}
    r = compare(a, b)
    assert (
        r["n"] == 3
        and r["only_a"] == 1
        and r["only_b"] == 0
        and math.isclose(r["difference"], 1 / 3)
        and r["p_mcnemar"] == 1
    )
    with pytest.raises(InputError, match="same items.*'w'"):
        compare(a, {**b, "w": True})
    with pytest.raises(InputError):
        compare({}, {})


def test_seeds():
    m = np.random.default_rng(0).random((5, 200)) < 0.5
    r = combine_seeds(m)
    assert (
        math.isclose(r.mean, m.mean())
        and math.isclose(r.se, stats.sem(m.mean(1)))
        and r.per_seed == m.mean(1).tolist()
    )
    np.testing.assert_allclose(r.t_ci, stats.t.interval(0.95, 4, r.mean, r.se))
    assert r.ci[0] < r.mean < r.ci[1] and combine_seeds(m) == r
    assert combine_seeds(m, n_resamples=50).ci != combine_seeds(m, n_resamples=50, seed=1).ci
    d = combine_seeds(m.astype(int) - m[::-1])  # differences are welcome too
    assert abs(d.mean) < 1e-12


def test_the_wider_interval_and_the_test_over_seeds():
    d = np.repeat([[0.02], [0.05], [0.03], [0.06]], 8, 1)
    r = combine_seeds(d)
    assert r.wider == r.t_ci and math.isclose(r.p, stats.ttest_1samp(d[:, 0], 0).pvalue)
    row = np.arange(100) < 40
    assert combine_seeds([row] * 3).wider == combine_seeds([row] * 3).ci
    assert combine_seeds(np.ones((3, 5))).p == 0 and combine_seeds(np.zeros((3, 5))).p == 1


def test_seeds_that_are_equal_leave_it_to_the_items():
    "The test then agrees with the interval: nothing is certain because two seeds are alike."
    few, many = np.repeat([1, 0], [2, 98]), np.repeat([1, 0], [12, 88])
    for row, sure in ((few, False), (many, True)):
        r = combine_seeds([row, row[::-1]])
        assert r.se == 0 and (r.wider[0] > 0) == (r.p < 0.05) == sure


def test_seeds_known_cases():
    row = np.arange(1000) < 620
    np.testing.assert_allclose(combine_seeds([row] * 4).ci, wilson(620, 1000), atol=2.5e-3)
    per = np.array([0.5, 0.6, 0.7, 0.9])
    ci = combine_seeds(
        np.repeat(per[:, None], 10, 1)
    ).ci  # all the chance is in four seeds: enumerate their 256 draws
    draws = np.array(np.meshgrid(*[per] * 4)).reshape(4, -1).mean(0)
    np.testing.assert_allclose(ci, np.quantile(draws, [0.025, 0.975]), atol=0.011)


@pytest.mark.parametrize("bad", [[[1, 0, 1]], [1, 0], [[1, 0], [1]], [[1, math.nan], [0, 1]]])
def test_seeds_refuse(bad):
    with pytest.raises(InputError):
        combine_seeds(bad)


def test_one_seed_says_so():
    with pytest.raises(InputError, match="at least two seeds"):
        mean_se([0.5])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_laws(p):
    adj = holm(p)
    assert len(adj) == len(p) and all(
        x <= y + 1e-12 <= 1 + 1e-9 for x, y in zip(p, adj, strict=True)
    )
    assert all(
        y <= min(1, x * len(p)) + 1e-12 for x, y in zip(p, adj, strict=True)
    )  # never worse than Bonferroni
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adj)[order]) >= -1e-12).all()


@pytest.mark.parametrize(
    "interval, words",
    [
        ((0.01, 0.2), "better than"),
        ([-0.2, -0.01], "worse than"),
        ((-0.1, 0.1), "not distinguishable from"),
        ((0.0, 0.1), "not distinguishable from"),
        ((-0.1, 0.0), "not distinguishable from"),
    ],
)
def test_verdict_words(interval, words):
    assert verdict_words(interval) == words


def test_holm_known():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm({"b": 0.04, "a": 0.01}) == {"b": 0.04, "a": 0.02}
    for bad in ([1.2], [math.nan], [[0.1]]):
        with pytest.raises(InputError):
            holm(bad)


def test_detectable_known():
    d = detectable_difference(392, 0.5)  # Cohen: h = 0.2 needs 392 per sample
    np.testing.assert_allclose(2 * math.asin(math.sqrt(0.5 + d)) - math.pi / 2, 0.2, atol=1e-3)
    assert (
        detectable_difference(5, 0.95) == math.inf
        and detectable_difference(4, 0.5, discordant=0.5) == math.inf
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(60, 1500), st.floats(0.1, 0.5), st.floats(0.3, 0.6))
def test_detectable_pairs(n, psi, p):
    d = detectable_difference(n, p, discordant=psi)
    if d < math.inf:
        np.testing.assert_allclose(mcnemar_power(n, psi, d), 0.8, atol=1e-4)
        assert detectable_difference(2 * n, p, discordant=psi) < d < psi + 1e-9


def test_power_under_the_null_is_the_size():
    for n in (20, 100, 1000):
        assert mcnemar_power(n, 0.4, 0) <= 0.05


@pytest.mark.parametrize(
    "kw",
    [
        dict(n=0, p=0.5),
        dict(n=9, p=1.5),
        dict(n=9, p=0.5, power=1.0),
        dict(n=9, p=0.5, discordant=0.0),
        dict(n=9, p=0.5, alpha=0.0),
    ],
)
def test_detectable_refuses(kw):
    with pytest.raises(InputError):
        detectable_difference(**kw)
