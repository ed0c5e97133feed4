"""Membership: scores on fixed log-probabilities, AUC, PrivLeak, and the Kolmogorov-Smirnov test."""

import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score, roc_curve

from icu_nb.errors import InputError
from icu_nb.evals.membership import (
    _ATTACKS,
    _compare_pairs,
    _Evidence,
    _gradient_norms,
    _lowest_mean,
    _token_evidence,
    _token_statistics,
    auc,
    auc_interval,
    bootstrap_weights,
    forget_quality,
    membership_scores,
    priv_leak,
    priv_leak_interval,
    roc,
    usable_length,
)
from icu_nb.text import real_tokens

scores = st.lists(st.integers(-5, 5).map(float), min_size=10, max_size=30)  # integers: ties happen


def test_statistics_against_plain_sums():
    generator = torch.Generator().manual_seed(0)
    logits, ids = 3 * torch.randn(2, 6, 9, generator=generator), torch.randint(9, (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    for b, row in enumerate(_token_statistics(logits, real_tokens(ids, mask))):
        assert row.shape == (3, int(mask[b].sum()) - 1)
        for t in range(row.shape[1]):
            exps = [math.exp(x) for x in logits[b, t].tolist()]
            p = [x / sum(exps) for x in exps]
            mean = sum(q * math.log(q) for q in p)
            spread = math.sqrt(sum(q * (math.log(q) - mean) ** 2 for q in p))
            assert row[:, t] == pytest.approx([math.log(p[ids[b, t + 1]]), mean, spread], abs=1e-5)


def evidence(seed=0):
    rng = np.random.default_rng(seed)
    tokens = [
        np.stack([-rng.exponential(size=n), -rng.exponential(size=n), rng.exponential(size=n) + 0.1])
        for n in (1, 5, 12)
    ]
    return _Evidence(
        tokens,
        np.array([30, 40, 50]),
        [row - rng.random(row.shape) for row in tokens],
        rng.exponential(size=3),
    )


def test_scores_against_references():
    e = evidence()
    for i, (log_p, mean, spread) in enumerate(e.tokens):
        n = len(log_p)
        k = max(1, math.floor(0.4 * n))
        standardized = [(a - b) / c for a, b, c in zip(log_p, mean, spread, strict=False)]
        expected = {
            "loss": sum(log_p) / n,
            "zlib": sum(log_p) / n / e.compressed[i],
            "min-k %": sum(sorted(log_p)[:k]) / k,
            "min-k++": sum(sorted(standardized)[:k]) / k,
            "reference": sum(log_p) / n - sum(e.reference[i][0]) / n,
            "gradient norm": -e.gradient[i],
        }
        assert expected.keys() == _ATTACKS.keys()
        assert {name: score(e)[i] for name, score in _ATTACKS.items()} == pytest.approx(expected)


def test_lowest_keeps_one_at_least():
    assert _lowest_mean(np.array([3.0, 1.0])) == 1.0
    assert _lowest_mean(np.array([5.0, 1.0, 2.0, 4.0, 3.0])) == 1.5


class Bigram(torch.nn.Module):
    "The next token from this one alone: an embedding and a head."

    def __init__(self, embedding, head):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.tensor(embedding, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.tensor(head, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.device, self.config = torch.device("cpu"), None

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.embedding[input_ids] @ self.head.T)


def test_gradient_norm_on_fixed_numbers():
    """By plain loops: norms of 1.8984222043 (embedding) and 1.0619455926 (head), and their mean."""
    model = Bigram([[0.5, -1.0], [1.5, 0.25], [-0.75, 2.0]], [[1.0, 0.5], [-0.5, 1.25], [0.25, -2.0]])
    found = _gradient_norms(model, real_tokens(torch.tensor([[0, 1, 2]])))
    assert found[0] == pytest.approx(1.4801838984490243, abs=1e-9)


def test_gradient_norm_against_backward(tiny):
    """As open-unlearning computes it: the norms of all weight tensors' gradients, averaged."""
    sequences, model = tiny.sequences[:3], tiny.copy()
    model.transformer.h[0].requires_grad_(False)  # the attacker has these weights, too
    trained = [weight.requires_grad for weight in model.parameters()]
    norms = _gradient_norms(model, sequences)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert [weight.requires_grad for weight in model.parameters()] == trained
    model.requires_grad_(True)
    for norm, tokens in zip(norms, sequences.tokens(), strict=False):
        ids = torch.tensor([tokens])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        each = [p.grad.norm(p=2) for p in model.parameters() if p.grad is not None]
        assert norm == pytest.approx(float(sum(each)) / len(each), rel=1e-4)


def test_batches_change_nothing_and_texts_are_cut(tiny):
    one, all_at_once = (_token_evidence(tiny.model, tiny.sequences, batch_size=size) for size in (1, 8))
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(one, all_at_once, strict=False))
    table = membership_scores(tiny.model, tiny.tokenizer, tiny.forget, max_length=20)
    assert list(table) == [name for name in _ATTACKS if name != "reference"] and len(table) == 8
    cut = tiny.tokenizer.decode(tiny.tokenizer(tiny.forget[0])["input_ids"][:20])
    assert table.zlib[0] == pytest.approx(table.loss[0] / len(zlib.compress(cut.encode())))
    assert usable_length(tiny.model) == 64 and usable_length(tiny.model, 20) == 20


def test_memorized_texts_look_like_members_to_every_attack(tiny):
    from icu_nb.models.tiny import tiny_gpt_neo

    stranger = tiny_gpt_neo(len(tiny.tokenizer), max_length=64, n_layers=2, hidden_size=32, n_heads=2)
    members, others = (
        membership_scores(tiny.model, tiny.tokenizer, texts, reference=stranger, max_length=48)
        for texts in (tiny.forget, tiny.heldout)
    )
    for name in _ATTACKS:  # eight of each: too few for `auc`, enough for their order
        assert members[name].median() > others[name].median(), name


def test_unknown_attack_and_missing_reference(tiny):
    with pytest.raises(InputError, match=r"\['guess'\] are not known.*min-k\+\+"):
        membership_scores(tiny.model, tiny.tokenizer, tiny.forget, attacks=["guess"])
    with pytest.raises(InputError, match="`reference`"):
        membership_scores(tiny.model, tiny.tokenizer, tiny.forget, attacks=["reference"])


@given(scores, scores)
def test_auc_and_roc_are_those_of_scikit_learn(members, others):
    truth, both = [1] * len(members) + [0] * len(others), members + others
    assert auc(members, others) == pytest.approx(roc_auc_score(truth, both))
    false, true, _ = roc_curve(truth, both, drop_intermediate=False)
    assert np.allclose(roc(members, others), (false, true))


def test_auc_is_one_when_all_members_score_higher():
    assert (
        auc(range(20, 40), range(20)) == 1
        and auc(range(20), range(20, 40)) == 0
        and auc([1] * 10, [1] * 10) == 0.5
    )


def test_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        _, low, high = auc_interval(rng.normal(0.5, 1, 64), rng.normal(0, 1, 64))
        covered += low <= 0.6382 <= high  # Phi(0.5/sqrt(2))
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_weights_and_repeatability():
    assert (
        np.allclose(bootstrap_weights(12).sum(1), 1)
        and np.array_equal(bootstrap_weights(12), bootstrap_weights(12))
        and not np.array_equal(bootstrap_weights(12), bootstrap_weights(12, seed=1))
    )


def test_redrawn_auc_is_the_auc_of_redrawn_texts():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=11), rng.normal(size=13)
    w, v = bootstrap_weights(11, 1)[0], bootstrap_weights(13, 1, seed=1)[0]
    copies = np.repeat(a, np.round(w * 11).astype(int)), np.repeat(b, np.round(v * 13).astype(int))
    assert w @ _compare_pairs(a, b) @ v == pytest.approx(auc(*copies))


@pytest.mark.parametrize("test", [auc, auc_interval, roc, forget_quality])
def test_fewer_than_ten_scores_are_refused(test):
    with pytest.raises(InputError, match="too few: chance alone would decide"):
        test(range(9), range(10))
    with pytest.raises(InputError, match="too few"):
        test(range(10), range(9))
    with pytest.raises(InputError, match="NaN or infinite"):
        test([math.nan] * 10, range(10))


def test_priv_leak_by_hand_and_its_limits():
    assert priv_leak(0.8, 0.6) == pytest.approx(100 * (0.2 - 0.4) / 0.4)
    with pytest.raises(InputError, match="`retrained`"):
        priv_leak(0.5, 1.0)
    with pytest.raises(InputError, match="`unlearned`"):
        priv_leak(1.5, 0.5)


def test_priv_leak_interval_redraws_the_same_texts_for_both_models():
    """Against a loop that draws texts; a model against itself is at 0 in every sample."""
    rng = np.random.default_rng(0)
    ours, theirs = [(rng.normal(0.4, 1, 30), rng.normal(0, 1, 40)) for _ in range(2)]
    value, low, high = priv_leak_interval(ours, theirs, seed=3)
    assert value == pytest.approx(priv_leak(auc(*ours), auc(*theirs))) and low < value < high
    n = np.rint(bootstrap_weights(30, seed=3) * 30).astype(int)
    m = np.rint(bootstrap_weights(40, seed=4) * 40).astype(int)
    looped = [
        priv_leak(*(auc(np.repeat(a, k), np.repeat(b, j)) for a, b in (ours, theirs)))
        for k, j in zip(n, m, strict=True)
    ]
    assert (low, high) == pytest.approx(tuple(np.quantile(looped, [0.025, 0.975])))
    assert priv_leak_interval(ours, ours) == pytest.approx((0, 0, 0))


def test_forget_quality_is_scipys_test():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=64), rng.normal(0.4, 1, size=64)
    theirs = ks_2samp(a, b)
    assert forget_quality(a, b) == pytest.approx((theirs.statistic, theirs.pvalue))
    grid = np.append(a, b)
    assert forget_quality(a, b)[0] == pytest.approx(max(abs((a <= s).mean() - (b <= s).mean()) for s in grid))
