"The losses: chunked equals plain, agreement with torch, the laws of the distillation term."

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from icl_distill.core.config import LossConfig
from icl_distill.core.files import InputError
from icl_distill.objectives.chunked_loss import chunked_loss
from icl_distill.objectives.losses import (
    KINDS,
    centred_mse,
    distill_loss,
    mse,
    plain_loss,
    standardised_mse,
)
from icl_distill.objectives.sums import SUMS, loss_metrics
from icl_distill.objectives.targets import Head, HiddenTargets, Targets, topk_targets

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(max_examples=30, deadline=None)


def _head(g, V, D, bias, scale, softcap):  # in float64
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    b = torch.randn(V, generator=g, dtype=torch.float64) if bias else None
    return Head(weight, b, scale, softcap)


def _run(f, hidden, labels, head, targets, cfg, **kw):
    h = hidden.detach().clone().requires_grad_()
    parts = f(h, labels, head, targets, cfg, **kw)
    (parts.total * 0.37).backward()
    return parts.total.detach(), parts.sums, h.grad


@st.composite
def cases(draw):
    "hidden, labels, head, targets, config over shapes, kinds, temperatures and chunk sizes"
    A, V, D = draw(st.integers(1, 9)), draw(st.integers(2, 40)), draw(st.integers(1, 8))
    K, kind = draw(st.integers(1, V)), draw(st.sampled_from(KINDS))
    T = 1.0 if kind.endswith("mse") else draw(st.sampled_from([0.5, 1.0, 2.0, 7.0]))
    weight = draw(st.sampled_from([0.0, 0.5, 3.0]))
    cfg = LossConfig(
        kind=kind,
        weight=weight,
        ce=draw(st.sampled_from([0.0, 1.0, 0.3] if weight else [1.0, 0.3])),
        temperature=T,
        beta=draw(st.sampled_from([0.1, 0.5, 0.9])),
        tail=draw(st.booleans()),
        policy=draw(st.sampled_from([0.0, 0.7])),
        chunk_size=draw(st.integers(1, 11)),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1])),
        match_gradient=draw(st.sampled_from([False, False, True])),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    head = _head(
        g,
        V,
        D,
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.25, 3.0])),
        draw(st.sampled_from([None, 1.5, 30.0])),
    )
    hidden, other = (torch.randn(A, D, generator=g, dtype=torch.float64) for _ in range(2))
    targets = draw(
        st.sampled_from([topk_targets(head(other), K, T), HiddenTargets(other, head), None])
    )
    if targets is not None and draw(st.booleans()):
        drawn = torch.randn(A, 2, generator=g, dtype=torch.float64) - torch.tensor([0.0, 3.0])
        targets = replace(targets, drawn=drawn)
    return hidden, torch.randint(V, (A,), generator=g), head, targets, cfg


@quick
@given(cases(), st.booleans())
def test_chunked_equals_plain(case, diagnose):
    for a, b in zip(
        _run(plain_loss, *case, diagnose=diagnose),
        _run(chunked_loss, *case, diagnose=diagnose),
        strict=True,
    ):
        assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [True, False])
def test_chunked_equals_plain_float32(kind, tail):
    g = torch.Generator().manual_seed(1)
    A, V, D = 70, 5000, 32
    head = Head(torch.randn(V, D, generator=g) / 4)
    hidden = torch.randn(A, D, generator=g)
    targets = topk_targets(head(hidden + 0.3 * torch.randn(A, D, generator=g)), 64)
    args = (
        hidden,
        torch.randint(V, (A,), generator=g),
        head,
        targets,
        LossConfig(kind=kind, tail=tail, chunk_size=16),
    )
    for a, b in zip(
        _run(plain_loss, *args, diagnose=True),
        _run(chunked_loss, *args, diagnose=True),
        strict=True,
    ):
        assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_last_states_give_the_loss_over_all_logits(kind):
    "Uncached, in float32 and float64: whole rows of logits of both, torch's own functions."
    T = 1.0 if kind.endswith("mse") else 2.0
    cfg = LossConfig(kind=kind, temperature=T, ce=0.5, weight=0.7, beta=0.3, chunk_size=16)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-5)):
        g = torch.Generator().manual_seed(2)
        head = Head(torch.randn(5000, 32, generator=g).to(dtype) / 4)
        other = Head(torch.randn(5000, 24, generator=g).to(dtype) / 4)  # another model's
        hidden, states = (torch.randn(70, D, generator=g).to(dtype) for D in (32, 24))
        labels = torch.randint(5000, (70,), generator=g)
        h = hidden.clone().requires_grad_()
        s, t = head(h), other(states)
        lq, lp = (s / T).log_softmax(-1), (t / T).log_softmax(-1)
        m = (0.3 * lp.exp() + 0.7 * lq.exp()).log()
        delta = s - t
        d = {
            "mse": F.mse_loss(s, t, reduction="none").mean(-1),
            "centred_mse": delta.var(-1, correction=0),
            "standardised_mse": 2 - 2 * _correlation(s, t),
            "forward_kl": F.kl_div(lq, lp, log_target=True, reduction="none").sum(-1) * T**2,
            "reverse_kl": F.kl_div(lp, lq, log_target=True, reduction="none").sum(-1) * T**2,
            "jsd": T**2
            * sum(
                share * F.kl_div(m, x, log_target=True, reduction="none").sum(-1)
                for share, x in ((0.3, lp), (0.7, lq))
            ),
        }[kind]
        want = 0.5 * F.cross_entropy(s, labels, reduction="sum") + 0.7 * d.sum()
        (0.37 * want).backward()
        targets = HiddenTargets(states, other)
        for f in (plain_loss, chunked_loss):
            total, sums, grad = _run(f, hidden, labels, head, targets, cfg)
            assert_close(total, want.detach(), rtol=tolerance, atol=tolerance)
            assert_close(grad, h.grad, rtol=tolerance, atol=tolerance)
            assert_close(sums[SUMS.index("distill")], d.sum().detach(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("diagnose", [True, False])
def test_bf16_within_one_per_cent(softcap, diagnose):
    g = torch.Generator().manual_seed(2)
    A, V, D = 64, 3000, 64
    head = Head(torch.randn(V, D, generator=g).div(4).bfloat16(), softcap=softcap)
    hidden, labels = torch.randn(A, D, generator=g).bfloat16(), torch.randint(V, (A,), generator=g)
    targets = topk_targets(head(torch.randn(A, D, generator=g)), 32)
    assert targets.values.dtype == torch.bfloat16 and targets.logz.dtype == torch.float32
    for kind in KINDS:
        cfg = LossConfig(kind=kind, chunk_size=20)
        exact = _run(
            plain_loss,
            hidden.float(),
            labels,
            Head(head.weight.float(), softcap=softcap),
            targets.map(torch.clone),
            cfg,
        )
        for f in (plain_loss, chunked_loss):
            total, _, grad = _run(f, hidden, labels, head, targets, cfg, diagnose=diagnose)
            assert total.dtype == torch.float32 and grad.dtype == torch.bfloat16
            assert (
                abs(total - exact[0]) < 0.01 * exact[0]
                and (grad.float() - exact[2]).norm() < 0.01 * exact[2].norm()
            ), kind


def test_autocast_and_mixed_dtypes():
    g = torch.Generator().manual_seed(3)
    head, hidden, labels = (
        Head(torch.randn(300, 16, generator=g)),
        torch.randn(9, 16, generator=g),
        torch.randint(300, (9,), generator=g),
    )
    targets = topk_targets(head(hidden + 0.1), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (tp, _, gp), (tc, _, gc) = (
            _run(f, hidden, labels, head, targets, LossConfig(chunk_size=4))
            for f in (plain_loss, chunked_loss)
        )
    assert gc.dtype == gp.dtype == torch.float32
    assert abs(tp - tc) < 0.01 * tp and (gp - gc).norm() < 0.01 * gp.norm()
    (tp, _, gp), (tc, _, gc) = (
        _run(f, hidden, labels, Head(head.weight.bfloat16()), targets, LossConfig(chunk_size=4))
        for f in (plain_loss, chunked_loss)
    )
    assert (
        gc.dtype == gp.dtype == torch.float32
        and abs(tp - tc) < 0.01 * tp
        and (gp - gc).norm() < 0.01 * gp.norm()
    )


@pytest.mark.parametrize(
    "kind,tail,T",
    [
        ("mse", True, 1.0),
        ("centred_mse", True, 1.0),
        ("standardised_mse", True, 1.0),
        *((k, t, T) for k in KINDS[3:] for t in (True, False) for T in (1.0, 2.0)),
    ],
)
def test_gradcheck(kind, tail, T):
    g = torch.Generator().manual_seed(4)
    head = _head(g, 12, 5, True, 0.5, 3.0)
    hidden, labels = (
        torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True),
        torch.randint(12, (4,), generator=g),
    )
    targets = topk_targets(head(torch.randn(4, 5, generator=g, dtype=torch.float64)), 6, T)
    for smoothing in (0.0, 0.2):
        cfg = LossConfig(kind=kind, tail=tail, temperature=T, weight=0.7, beta=0.3, chunk_size=3)
        cfg.label_smoothing = smoothing
        assert torch.autograd.gradcheck(
            lambda h, cfg=cfg: chunked_loss(h, labels, head, targets, cfg).total, hidden
        )


def _kept(head, states, whole):
    "A teacher's targets, both kinds."
    return HiddenTargets(states, head) if whole else topk_targets(head(states), 6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("f", [plain_loss, chunked_loss])
def test_smoothed_labels_are_a_distribution(f, whole):
    "Cross-entropy with (1-ε) on the label and ε/V everywhere, written out."
    g = torch.Generator().manual_seed(3)
    head = _head(g, 12, 5, True, 0.5, 3.0)
    leaf, states = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(12, (7,), generator=g)
    leaf.requires_grad_()
    q = torch.full((7, 12), 0.2 / 12, dtype=torch.float64)
    q[range(7), labels] += 0.8
    want = -(q * head(leaf).log_softmax(-1)).sum()
    (slope,) = torch.autograd.grad(0.3 * want, leaf)
    cfg = LossConfig(label_smoothing=0.2, weight=0.0, ce=0.3, chunk_size=3)
    for targets in (None, _kept(head, states, whole)):
        total, sums, grad = _run(f, leaf, labels, head, targets, cfg)
        assert_close(total, 0.3 * want.detach())
        assert_close(sums[SUMS.index("ce")], want.detach())
        assert_close(grad, 0.37 * slope)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matched_term_pulls_as_hard_as_cross_entropy(kind, whole):
    "Position by position, at the logits; by hand, one position after the other."
    g = torch.Generator().manual_seed(5)
    head = _head(g, 12, 5, True, 1.0, None)
    hidden, states = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    labels, targets = torch.randint(12, (7,), generator=g), _kept(head, states, whole)
    plain = LossConfig(kind=kind, weight=1.0, ce=0.0, chunk_size=3)
    matched = plain.model_copy(update=dict(match_gradient=True, weight=0.4))
    want, value = torch.zeros(7, 5, dtype=torch.float64), 0.0
    for i in range(7):
        x = head(hidden[i : i + 1]).requires_grad_()  # its head is the identity below
        same = Head(torch.eye(12, dtype=torch.float64))
        row = targets.rows(i, i + 1)
        term = plain_loss(x, labels[i : i + 1], same, row, plain).total
        (of_term,) = torch.autograd.grad(term, x)
        (of_ce,) = torch.autograd.grad(F.cross_entropy(x, labels[i : i + 1]), x)
        factor = 0.4 * of_ce.norm() / of_term.norm()
        want[i] = (factor * of_term @ head.weight)[0]
        value += factor * term.detach()
    for f in (plain_loss, chunked_loss):
        total, _, grad = _run(f, hidden, labels, head, targets, matched)
        assert_close(total, value, rtol=1e-8, atol=1e-10)
        assert_close(grad, 0.37 * want, rtol=1e-8, atol=1e-10)
        with torch.no_grad():  # the same value where no gradient is wanted
            assert_close(f(hidden, labels, head, targets, matched).total, total)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_not_made_a_gradient(kind):
    "A teacher that differs by rounding alone: matched or not, next to nothing."
    hidden, labels, head, _ = _setup()
    near = topk_targets(head(hidden) * (1 + 1e-7), 5)
    for match in (False, True):
        cfg = LossConfig(kind=kind, weight=1.0, chunk_size=4, match_gradient=match)
        m = loss_metrics(_run(chunked_loss, hidden, labels, head, near, cfg, diagnose=True)[1])
        assert m["distill_grad_norm"] < 2e-3 * m["ce_grad_norm"]


# the distillation term


def _correlation(s, t):  # (A,K), (A,K) -> (A,)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s, t, strict=True)])


@quick
@given(st.integers(2, 40), st.floats(0.1, 10), st.floats(-50, 50), st.integers(0, 10**6))
def test_standardised_mse_is_two_minus_twice_the_correlation(k, scale, shift, seed):
    "Blind to the student's scale and shift; where all logits are equal there is no NaN."
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, 5, k, generator=g, dtype=torch.float64)
    assert_close(standardised_mse(s, t), 2 - 2 * _correlation(s, t), rtol=1e-7, atol=1e-9)
    assert_close(standardised_mse(scale * s + shift, t), standardised_mse(s, t))
    flat = torch.full_like(s, shift).requires_grad_()
    standardised_mse(flat, t).sum().backward()
    assert flat.grad.isfinite().all()


def _at(student, teacher, k, cfg):
    t = topk_targets(teacher, k, cfg.temperature)
    return distill_loss(
        student.gather(1, t.ids.long()), (student / cfg.temperature).logsumexp(-1), t, cfg
    )


logits = st.builds(
    lambda A, V, s, seed: (
        s * torch.randn(2, A, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ),
    st.integers(1, 5),
    st.integers(2, 30),
    st.sampled_from([0.1, 1.0, 4.0]),
    st.integers(0, 10**6),
)


@pytest.mark.parametrize("f", [plain_loss, chunked_loss])
@pytest.mark.parametrize("T", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_hintons_mixture(f, T, alpha):
    "(1-α)·CE + α·T²·KL (Hinton et al. 2015, arXiv 1503.02531), over the whole vocabulary."
    g = torch.Generator().manual_seed(0)
    head = Head(torch.randn(11, 5, generator=g, dtype=torch.float64))
    hidden, other = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    labels, leaf = torch.randint(11, (7,), generator=g), hidden.clone().requires_grad_()
    cold, warm = ((head(x) / T).log_softmax(-1) for x in (leaf, other))
    soft = F.kl_div(cold, warm, log_target=True, reduction="sum") * T * T
    want = (1 - alpha) * F.cross_entropy(head(leaf), labels, reduction="sum") + alpha * soft
    (slope,) = torch.autograd.grad(want, leaf)
    cfg = LossConfig(kind="forward_kl", tail=False, temperature=T, weight=alpha, ce=1 - alpha)
    total, _, grad = _run(f, hidden, labels, head, topk_targets(head(other), 11, T), cfg)
    assert_close(total, want.detach())
    assert_close(grad, 0.37 * slope)


@quick
@given(logits, st.floats(-50, 50), st.data())
def test_raw_mse_is_variance_plus_squared_shift_and_softmax_is_blind_to_it(x, c, data):
    s, t = x
    k = data.draw(st.integers(1, s.shape[1]))
    d = s[:, :k] - t[:, :k]
    assert_close(mse(s[:, :k], t[:, :k]), d.var(-1, correction=0) + d.mean(-1).square())
    assert_close(centred_mse(s[:, :k], t[:, :k]), d.var(-1, correction=0))
    assert_close((s + c).softmax(-1), s.softmax(-1))
    for kind in KINDS[1:]:
        for tail in (True, False):
            assert_close(
                _at(s + c, t, k, LossConfig(kind=kind, tail=tail)),
                _at(s, t, k, LossConfig(kind=kind, tail=tail)),
                rtol=1e-6,
                atol=1e-8,
            )
    assert_close(
        _at(t + c, t, k, LossConfig(kind="mse")), torch.full((len(t),), c * c, dtype=t.dtype)
    )


@quick
@given(logits, st.sampled_from([0.5, 1.0, 3.0]), st.data())
def test_zero_at_equality_positive_elsewhere(x, T, data):
    s, t = x
    k = data.draw(st.integers(1, s.shape[1]))
    for kind in KINDS:
        for tail in (True, False):
            cfg = LossConfig(kind=kind, tail=tail, temperature=1.0 if kind.endswith("mse") else T)
            leaf = t.clone().requires_grad_()
            d = _at(leaf, t, k, cfg)
            d.sum().backward()
            assert d.abs().max() < 1e-12
            assert (
                leaf.grad.abs().max() < 1e-5 * cfg.temperature
            )  # a tail under the floor counts as constant
            assert _at(s, t, k, cfg).min() > -1e-5 * T * T


@quick
@given(logits, st.sampled_from([0.5, 1.0, 3.0]))
def test_at_full_k_the_family_is_torchs(x, T):
    s, t = x
    lp, lq = (t / T).log_softmax(-1), (s / T).log_softmax(-1)
    forward, reverse = (
        F.kl_div(b, a, log_target=True, reduction="none").sum(-1) * T * T
        for a, b in ((lp, lq), (lq, lp))
    )
    m = (0.3 * lp.exp() + 0.7 * lq.exp()).log()
    jsd = (
        (
            0.3 * F.kl_div(m, lp, log_target=True, reduction="none")
            + 0.7 * F.kl_div(m, lq, log_target=True, reduction="none")
        ).sum(-1)
        * T
        * T
    )
    for kind, want in (("forward_kl", forward), ("reverse_kl", reverse), ("jsd", jsd)):
        for tail, tol in ((True, 1e-3), (False, 1e-9)):
            assert_close(
                _at(s, t, s.shape[1], LossConfig(kind=kind, tail=tail, temperature=T, beta=0.3)),
                want,
                rtol=tol,
                atol=tol,
            )
    assert_close(
        _at(s, t, s.shape[1], LossConfig(kind="mse")), F.mse_loss(s, t, reduction="none").mean(-1)
    )


@quick
@given(logits)
def test_with_a_tail_kl_grows_with_k_to_the_full_one(x):
    s, t = x
    order = t.argsort(dim=-1, descending=True)
    tails = torch.stack([1 - y.softmax(-1).gather(1, order).cumsum(-1) for y in (s, t)])[
        :, :, :-1
    ].amin(0)  # (A,V-1), of k=1…V-1
    seen = (tails > 1e-5).T
    for kind, full in (
        ("forward_kl", (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)),
        ("reverse_kl", (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)),
    ):
        by_k = torch.stack([_at(s, t, k, LossConfig(kind=kind)) for k in range(1, s.shape[1])])
        assert ((by_k.diff(dim=0) > -1e-9) | ~seen[1:]).all() and (
            (by_k <= full + 1e-9) | ~seen
        ).all()


def test_hot_kl_is_half_the_centred_mse():
    g = torch.Generator().manual_seed(5)
    s, t = torch.randn(2, 20, 50, generator=g, dtype=torch.float64)
    assert_close(
        _at(s, t, 16, LossConfig(kind="forward_kl", tail=False, temperature=1e4)),
        _at(s, t, 16, LossConfig(kind="centred_mse")) / 2,
        rtol=1e-3,
        atol=0,
    )


def test_sharp_distributions_stay_finite():
    t = torch.zeros(3, 100)
    t[:, 0] = 80.0
    s = torch.zeros(3, 100)
    s[:, 1] = 80.0
    for kind in KINDS:
        for tail in (True, False):
            for k in (1, 4, 100):
                leaf = s.clone().requires_grad_()
                d = _at(leaf, t, k, LossConfig(kind=kind, tail=tail))
                d.sum().backward()
                assert d.isfinite().all() and leaf.grad.isfinite().all(), (kind, tail, k)


# logging, edges, errors


def _setup(A=6, V=30, D=8, K=5):
    g = torch.Generator().manual_seed(6)
    head = Head(torch.randn(V, D, generator=g))
    return (
        torch.randn(A, D, generator=g),
        torch.randint(V, (A,), generator=g),
        head,
        topk_targets(head(torch.randn(A, D, generator=g)), K),
    )


def test_metrics_add_over_micro_batches():
    hidden, labels, head, t = _setup()
    cfg = LossConfig(kind="forward_kl", chunk_size=2)
    h = hidden.requires_grad_()
    whole = chunked_loss(h, labels, head, t, cfg, diagnose=True).sums
    parts = [
        chunked_loss(h[r], labels[r], head, t.rows(r.start, r.stop), cfg, diagnose=True).sums
        for r in (slice(0, 1), slice(1, 6))
    ]
    assert_close(sum(parts), whole)
    m = loss_metrics(whole)
    assert set(m) == {
        "loss",
        "ce",
        "distill",
        "topk_mass",
        "student_topk_mass",
        "shift_share",
        "ce_grad_norm",
        "distill_grad_norm",
    }
    assert (
        m["loss"] == pytest.approx(m["ce"] + cfg.weight * m["distill"], rel=1e-5)
        and 0 <= m["shift_share"] <= 1
    )
    assert 0 < m["topk_mass"] <= 1.00001 and 0 < m["student_topk_mass"] <= 1.00001


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_teacher_gives_no_gradient(kind):
    hidden, labels, head, _ = _setup()
    equal = topk_targets(head(hidden), 5)
    cfg = LossConfig(kind=kind, chunk_size=4)
    sums = _run(chunked_loss, hidden, labels, head, equal, cfg, diagnose=True)[1]
    metrics = loss_metrics(sums)
    assert abs(metrics["distill"]) < 1e-5
    assert metrics["distill_grad_norm"] < 1e-4 * metrics["ce_grad_norm"]


def test_gradient_norms_are_those_of_the_two_terms():
    hidden, labels, head, t = _setup()
    cfg = LossConfig(kind="mse", weight=0.5)
    ce = _run(chunked_loss, hidden, labels, head, None, cfg)[2] / 0.37
    both = _run(chunked_loss, hidden, labels, head, t, cfg)[2] / 0.37
    m = loss_metrics(_run(chunked_loss, hidden, labels, head, t, cfg, diagnose=True)[1])
    assert m["ce_grad_norm"] == pytest.approx(ce.norm().item() / 6, rel=1e-4) and m[
        "distill_grad_norm"
    ] == pytest.approx((both - ce).norm().item() / 6, rel=1e-4)


@pytest.mark.parametrize("f", [plain_loss, chunked_loss])
def test_weight_zero_is_sft_but_still_measures(f):
    hidden, labels, head, t = _setup()
    total, sums, grad = _run(f, hidden, labels, head, t, LossConfig(weight=0.0))
    sft = _run(f, hidden, labels, head, None, LossConfig())
    assert_close(total, sft[0])
    assert_close(grad, sft[2])
    assert loss_metrics(sums)["distill"] > 0 and set(loss_metrics(sft[1])) == {"loss", "ce"}


@pytest.mark.parametrize("f", [plain_loss, chunked_loss])
def test_no_positions_give_zeros(f):
    hidden, labels, head, t = _setup()
    total, sums, grad = _run(f, hidden[:0], labels[:0], head, t.rows(0, 0), LossConfig())
    assert (
        total == 0
        and sums.shape == (len(SUMS),)
        and not sums.any()
        and grad.shape == (0, 8)
        and loss_metrics(sums) == {}
    )


def test_no_gradient_wanted_none_made():
    hidden, labels, head, t = _setup()
    with torch.no_grad():
        parts = chunked_loss(
            hidden.requires_grad_(), labels, head, t, LossConfig(chunk_size=4), diagnose=True
        )
    assert not parts.total.requires_grad
    assert_close(parts.total, plain_loss(hidden, labels, head, t, LossConfig()).total.detach())
    assert not chunked_loss(hidden.detach(), labels, head, t, LossConfig()).total.requires_grad


def test_inputs_are_left_alone_and_the_head_gets_no_gradient():
    hidden, labels, head, t = _setup()
    before = [x.clone() for x in (hidden, labels, head.weight, t.values, t.ids, t.logz)]
    _run(chunked_loss, hidden, labels, head, t, LossConfig(kind="jsd"), diagnose=True)
    for a, b in zip(before, (hidden, labels, head.weight, t.values, t.ids, t.logz), strict=True):
        assert torch.equal(a, b)
    assert head.weight.grad is None


def test_no_tensor_grows_with_positions_times_vocabulary():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.numel = max(
                [self.numel, *(x.numel() for x in tree_leaves(out) if torch.is_tensor(x))]
            )
            return out

    g = torch.Generator().manual_seed(7)
    V, D, chunk = 1000, 4, 8
    head = Head(torch.randn(V, D, generator=g), softcap=10.0)
    for A in (50, 200):
        hidden, labels = (
            torch.randn(A, D, generator=g, requires_grad=True),
            torch.randint(V, (A,), generator=g),
        )
        t = topk_targets(head(torch.randn(A, D, generator=g)), 16, 2.0)
        with Largest() as largest:
            chunked_loss(
                hidden,
                labels,
                head,
                t,
                LossConfig(kind="jsd", temperature=2.0, chunk_size=chunk),
                diagnose=True,
            ).total.backward()
        assert largest.numel == chunk * V


def test_targets():
    g = torch.Generator().manual_seed(8)
    x = torch.randn(7, 20, generator=g)
    t = topk_targets(x, 5, temperature=2.0)
    assert t.ids.dtype == torch.int32 and len(t) == 7
    assert_close(t.values, x.gather(1, t.ids.long()))
    assert_close(t.logz, (x / 2).logsumexp(-1))
    assert (t.values.diff(dim=1) <= 0).all()
    again = Targets.cat([t.rows(0, 3), t.rows(3, 7)]).to("cpu")
    assert all(torch.equal(getattr(again, f), getattr(t, f)) for f in ("values", "ids", "logz"))
    for k in (0, 21):
        with pytest.raises(InputError, match="top_k"):
            topk_targets(x, k)


@pytest.mark.parametrize("f", [plain_loss, chunked_loss])
def test_errors(f):
    hidden, labels, head, t = _setup()
    for keys, word in (  # refused here, or already by the config
        ({"kind": "mse", "temperature": 2.0}, "loss.temperature"),
        ({"kind": "jsd", "beta": 0.0}, "loss.beta"),
        ({"kind": "l1"}, "loss.kind"),
        ({"kind": "jsd", "temperature": -1.0}, "loss.temperature"),
        ({"chunk_size": 0}, "loss.chunk_size"),
    ):
        with pytest.raises(InputError, match=word):
            f(hidden, labels, head, t, LossConfig(**keys))
    with pytest.raises(InputError, match="one label"):
        f(hidden, labels[1:], head, t, LossConfig())
    with pytest.raises(InputError, match="one label"):
        f(hidden, labels, head, t.rows(0, 2), LossConfig())


def test_a_trained_head_is_refused():
    hidden, labels, head, t = _setup()
    with pytest.raises(InputError, match="being trained"):
        chunked_loss(hidden, labels, Head(head.weight.requires_grad_()), t, LossConfig())
    assert math.isfinite(plain_loss(hidden, labels, head, t, LossConfig()).total.detach())


def test_every_metric_that_is_logged_is_explained():
    "And nothing else is: the reference's table is made from `METRICS`."
    from icl_distill.core.metrics import METRICS

    every = loss_metrics(torch.ones(len(SUMS)))
    assert METRICS.keys() == {"step", *every, "grad_norm", "lr", "n_answer_tokens"}
