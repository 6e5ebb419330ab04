"""Importance-weighted gradients against the enumeration of a tabular MDP in which another policy acts.

Every batch, its expectation, and its bias where there is one. Weights and credits are the library's, in double
precision; scores and probabilities are the enumeration's.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch as th

from sb3_pg import functional as F  # noqa: N812
from tests.oracle.harness import BEHAVIOR, MDP, THETA, columns_of
from tests.oracle.mdp import Array, Enumeration, total_variance

EXACT = 1e-12


class Form(NamedTuple):
    ratio: str
    returns: str
    gamma: float
    state_discount: bool

    def state_weight(self) -> float:
        """What w_t is a power of."""
        return self.gamma if self.state_discount else 1.0


class Treatment(NamedTuple):
    """What is done to the weights."""

    max_ratio: float = math.inf
    normalize: bool = False


RATIOS = ["per_step", "prefix", "per_decision", "trajectory"]
DISCOUNTS = [(1.0, False), (0.9, False), (0.9, True)]
FORMS = [
    *(Form(ratio, "reward_to_go", *discount) for ratio in RATIOS for discount in DISCOUNTS),
    *(Form("trajectory", "total", gamma, False) for gamma in (1.0, 0.9)),
]
UNBIASED = [form for form in FORMS if form.ratio in ("per_decision", "trajectory")]
BIASED = [form for form in FORMS if form.ratio in ("per_step", "prefix")]
#: One of each kind, for what takes every triple of episodes.
FEW = [form for form in FORMS if form.state_discount or (form.returns == "total" and form.gamma < 1)]
PLAIN, TRUNCATED, NORMALIZED, BOTH = Treatment(), Treatment(1.2), Treatment(normalize=True), Treatment(1.2, True)


def each(forms: list[Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", forms, ids=lambda form: "-".join(map(str, form)))


all_baselines = pytest.mark.parametrize("baseline", ["none", "constant", "true_value"])


@cache
def enumeration(form: Form, behavior: str = "other") -> Enumeration:
    return Enumeration(MDP, THETA, *form[1:], behavior={"other": BEHAVIOR, "equal": THETA}[behavior])


def baseline_table(baseline: str, gamma: float) -> Array:
    """b(t, s), (H, S)."""
    if baseline == "true_value":
        return MDP.values(THETA, gamma)[:-1]
    return np.full((MDP.horizon, MDP.n_states), {"none": 0.0, "constant": 1.7}[baseline])


def baseline_of(form: Form, baseline: str) -> Array:
    """b(t, s_t) of every trajectory, (M, H)."""
    return baseline_table(baseline, form.gamma)[np.arange(MDP.horizon), enumeration(form).state]


def credit(form: Form, fields: dict[str, th.Tensor], b: th.Tensor, treatment: Treatment) -> th.Tensor:
    """What the library credits each action of a batch with."""
    rewards, ends, mask = fields["rewards"], fields["ends"], fields["mask"]
    log_ratio = F.log_importance_ratio(fields["log_prob"], fields["behavior_log_prob"], mask)
    logs = F.truncate(F.log_weights(log_ratio, ends, form.ratio, mask), treatment.max_ratio)
    logs = F.self_normalize(logs, ends, mask) if treatment.normalize else logs
    if form.ratio == "per_decision":
        returns = F.per_decision_return(rewards, logs, ends, form.gamma, mask=mask)
    elif form.returns == "total":
        returns = F.total_return(rewards, ends, form.gamma, mask=mask)
    else:
        returns = F.reward_to_go(rewards, ends, form.gamma, mask=mask)
    return F.importance_weights(logs) * (returns - b)


@cache
def library(form: Form, baseline: str, treatment: Treatment, n: int, behavior: str = "other") -> Array:
    """The library's estimate of every batch of n episodes, (B, P)."""
    oracle = enumeration(form, behavior)
    index, _ = oracle.batches(n)
    mu = MDP.policy({"other": BEHAVIOR, "equal": THETA}[behavior])
    fields, b = columns_of(oracle, MDP.policy(THETA), mu), th.as_tensor(baseline_of(form, baseline).T)
    if treatment.normalize:
        batches = (({name: x[:, i] for name, x in fields.items()}, b[:, i]) for i in index)
        found = np.stack([credit(form, *batch, treatment).T.numpy() for batch in batches])
    else:  # column by column
        found = credit(form, fields, b, treatment).T.numpy()[index]
    return oracle.credited(found[..., None], index)


def weights_of(form: Form) -> Array:
    """W_t, (M, H), from the probabilities; past the end of an episode it stays what it was."""
    oracle = enumeration(form)
    taken = (oracle.state, oracle.action)
    rho = np.where(oracle.mask, MDP.policy(THETA)[taken] / MDP.policy(BEHAVIOR)[taken], 1.0)
    if form.ratio == "per_step":
        last = oracle.mask.sum(axis=1, keepdims=True).astype(int) - 1
        return np.take_along_axis(rho, np.minimum(np.arange(MDP.horizon), last), axis=1)
    products: Array = rho.cumprod(axis=1)
    return np.repeat(products[:, -1:], MDP.horizon, axis=1) if form.ratio == "trajectory" else products


def weighted(form: Form, baseline: str) -> Array:
    """Z_t, (M, H, P): the estimate of one episode is sum_t W_t Z_t, whatever the weights are."""
    oracle, b = enumeration(form), baseline_of(form, baseline)
    if form.ratio != "per_decision":
        return oracle.U * (oracle.G - b)[..., None]
    # W_k counts the reward of step k, for all actions up to then.
    z = -oracle.U * b[..., None]
    for k in range(MDP.horizon):
        discount = form.gamma ** (k - np.arange(k + 1))
        z[:, k] += np.einsum("t,itp,i->ip", discount, oracle.U[:, : k + 1], oracle.reward[:, k])
    return z


def expected(form: Form, baseline: str, treatment: Treatment, n: int) -> Array:
    """The same estimates by the enumeration's own formulas, (B, P)."""
    index, _ = enumeration(form).batches(n)
    weights = np.minimum(weights_of(form), treatment.max_ratio)[index]  # (B, N, H)
    if treatment.normalize:
        weights = weights / weights.mean(axis=1, keepdims=True)
    found: Array = np.einsum("bit,bitp->bp", weights, weighted(form, baseline)[index]) / n
    return found


def mean(form: Form, estimates: Array, n: int = 1) -> Array:
    found: Array = enumeration(form).batches(n)[1] @ estimates
    return found


def target(form: Form) -> Array:
    """What an estimator that is unbiased estimates: the same as if the target policy acted."""
    return MDP.policy_gradient(THETA, form.gamma, form.state_discount or form.returns == "total")


# --- the oracle itself ---


def test_the_policies_differ() -> None:
    weights = {form.ratio: weights_of(form) for form in FORMS}
    assert weights["per_step"].min() < 0.55
    assert weights["per_step"].max() > 1.45
    assert weights["trajectory"].max() > 2.9
    assert enumeration(FORMS[0]).probability.sum() == pytest.approx(1.0, abs=EXACT)
    difference = MDP.policy_gradient(THETA, 1.0, False) - MDP.policy_gradient(BEHAVIOR, 1.0, False)
    assert np.abs(difference).max() > 0.05


@each(FORMS[::3])
def test_products_have_mean_one_at_every_step_and_single_ratios_do_not(form: Form) -> None:
    """With the episodes that have finished at their last weight; an early end keeps its product a martingale."""
    found = enumeration(form).probability @ weights_of(form)
    if form.ratio == "per_step":
        assert found[0] == pytest.approx(1.0, abs=EXACT)
        assert np.all(found[1:] < 0.95)
    else:
        assert np.allclose(found, 1.0, atol=EXACT)


# --- every batch ---


@each(FORMS)
@all_baselines
def test_every_episode(form: Form, baseline: str) -> None:
    for treatment in (PLAIN, TRUNCATED):
        found = library(form, baseline, treatment, 1)
        assert np.abs(found - expected(form, baseline, treatment, 1)).max() < EXACT


@each(FORMS)
def test_every_pair(form: Form) -> None:
    found = library(form, "true_value", NORMALIZED, 2)
    assert np.abs(found - expected(form, "true_value", NORMALIZED, 2)).max() < EXACT


@each(FEW)
def test_every_batch(form: Form) -> None:
    for treatment, n in ((NORMALIZED, 1), (NORMALIZED, 3), (BOTH, 2)):
        found = library(form, "true_value", treatment, n)
        assert np.abs(found - expected(form, "true_value", treatment, n)).max() < EXACT


@each(FEW)
def test_equal_policies_give_the_on_policy_gradient(form: Form) -> None:
    """Batch by batch, whatever is done to weights of one."""
    oracle = enumeration(form, "equal")
    for treatment, n in ((PLAIN, 1), (NORMALIZED, 1), (BOTH, 2)):
        on_policy = oracle.estimates(baseline_of(form, "constant"), oracle.batches(n)[0])
        assert np.abs(library(form, "constant", treatment, n, "equal") - on_policy).max() < EXACT


# --- expectation ---


@each(UNBIASED)
@all_baselines
def test_unbiased(form: Form, baseline: str) -> None:
    assert np.abs(mean(form, library(form, baseline, PLAIN, 1)) - target(form)).max() < EXACT


@each(BIASED)
@all_baselines
def test_bias_is_the_predicted_one(form: Form, baseline: str) -> None:
    """After the action the rewards are the behavior's: Q_mu(t, s, a), in the states that the weights make it visit.

    A baseline adds nothing, since what it multiplies is E[score_t | s_t] = 0. The length of the bias is 0.20 to 0.23
    per step and 0.14 to 0.16 for prefixes, of gradients of length 0.36 to 0.44.
    """
    occupancy = MDP.occupancy(BEHAVIOR) if form.ratio == "per_step" else MDP.occupancy(THETA)
    behavior_q = MDP.q_values(BEHAVIOR, form.gamma)
    predicted = MDP.credited_gradient(THETA, behavior_q, form.state_weight(), occupancy)
    found = mean(form, library(form, baseline, PLAIN, 1))
    assert np.abs(found - predicted).max() < EXACT
    assert np.linalg.norm(found - target(form)) > 0.13


def over_histories(form: Form, baseline: str, max_ratio: float) -> Array:
    """sum over h = (s_0, a_0, ..., s_t, a_t) of P_mu(h) min(W, c) w_t score_t (Q_mu(t, s_t, a_t) - b(t, s_t))."""
    pi, mu, score = MDP.policy(THETA), MDP.policy(BEHAVIOR), MDP.scores(THETA)
    advantage = MDP.q_values(BEHAVIOR, form.gamma) - baseline_table(baseline, form.gamma)[..., None]
    found = np.zeros(MDP.n_parameters)

    def visit(t: int, s: int, probability: float, weight: float) -> None:
        for a in range(MDP.n_actions):
            p, w = probability * mu[s, a], weight * pi[s, a] / mu[s, a]
            found[:] += p * min(w, max_ratio) * form.state_weight() ** t * advantage[t, s, a] * score[s, a]
            for s_next in range(MDP.n_states):
                if t + 1 < MDP.horizon:
                    later = p * MDP.transition[s, a, s_next]
                    visit(t + 1, s_next, later, 1.0 if form.ratio == "per_step" else w)

    for s in range(MDP.n_states):
        visit(0, s, float(MDP.initial[s]), 1.0)
    return found


@each(BIASED)
@all_baselines
def test_bias_of_truncation_is_the_predicted_one(form: Form, baseline: str) -> None:
    found = mean(form, library(form, baseline, TRUNCATED, 1))
    assert np.abs(found - over_histories(form, baseline, TRUNCATED.max_ratio)).max() < EXACT


@each(FORMS)
@all_baselines
def test_truncation_pays_bias_for_variance(form: Form, baseline: str) -> None:
    """In this MDP, at a bound of 1.2; at a bound that no weight reaches it does nothing."""
    probability = enumeration(form).probability
    plain, truncated = (library(form, baseline, treatment, 1) for treatment in (PLAIN, TRUNCATED))
    assert total_variance(truncated, probability) < 0.95 * total_variance(plain, probability)
    assert np.linalg.norm(probability @ (truncated - plain)) > 0.007
    assert np.array_equal(library(form, baseline, Treatment(3.0), 1), plain)


def test_later_ratios_cost_variance() -> None:
    """Unbiased both: each reward with the ratios up to its own step, or all with the ratios of the whole episode."""
    for discount in DISCOUNTS:
        forms = [Form(ratio, "reward_to_go", *discount) for ratio in ("per_decision", "trajectory")]
        less, more = (total_variance(library(f, "none", PLAIN, 1), enumeration(f).probability) for f in forms)
        assert less < 0.9 * more


# --- self-normalized ---

CONSISTENT = [form for form in FORMS if form.ratio != "per_step"]


def normalization_bias(form: Form, baseline: str, n: int) -> Array:
    """How far the expectation is from that of the same weights without normalization."""
    return mean(form, expected(form, baseline, NORMALIZED, n), n) - mean(form, expected(form, baseline, PLAIN, 1))


@each(CONSISTENT)
@all_baselines
def test_bias_of_normalization_is_of_order_one_over_n(form: Form, baseline: str) -> None:
    """By the delta method: lim N * bias = sum_t E[W_t Z_t] E[W_t^2] - E[W_t^2 Z_t], here within 0.7 / N.

    Of one episode the only weight is 1, and the bias 0.06 to 0.69.
    """
    oracle, weights, z = enumeration(form), weights_of(form), weighted(form, baseline)
    first = oracle.mean(weights[..., None] * z) * oracle.mean(weights**2)[:, None]
    limit = (first - oracle.mean(weights[..., None] ** 2 * z)).sum(axis=0)
    bias = {n: normalization_bias(form, baseline, n) for n in (1, 2, 3, 4)}
    assert all(n * np.linalg.norm(n * b - limit) < 0.7 for n, b in bias.items())
    # The value of a state is no estimate of the total return: their difference changes sign.
    if (form.returns, baseline) != ("total", "true_value"):
        sizes = [float(np.linalg.norm(b)) for b in bias.values()]
        assert all(later < 0.95 * earlier for earlier, later in pairwise(sizes)), sizes


@each([form for form in FEW if form in UNBIASED and form.returns == "reward_to_go"])
def test_more_episodes_bring_the_library_closer_to_the_gradient(form: Form) -> None:
    estimates = {n: library(form, "true_value", NORMALIZED, n) for n in (1, 2, 3)}
    sizes = [float(np.linalg.norm(mean(form, x, n) - target(form))) for n, x in estimates.items()]
    assert all(later < 0.75 * earlier for earlier, later in pairwise(sizes)), sizes
