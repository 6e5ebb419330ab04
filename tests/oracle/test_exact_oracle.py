"""Reinforce against the enumeration of a tabular MDP: every batch, its expectation, its bias and its variance."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th

from sb3_pg import Reinforce
from sb3_pg.rollout import RolloutBatch
from tests.oracle.harness import ASCENT, ATOL, CRITIC_TABLE, MDP, THETA, ascent, episodes_of, playing_model
from tests.oracle.mdp import Array, Enumeration, TabularMDP, chain_mdp, total_variance


class Form(NamedTuple):
    returns: str
    gamma: float
    state_discount: bool


FORMS = [
    Form("total", 1.0, False),
    Form("total", 0.9, False),
    Form("reward_to_go", 1.0, False),
    Form("reward_to_go", 0.9, False),
    Form("reward_to_go", 0.9, True),
]
UNBIASED = ["none", "leave_one_out", "true_value", "critic"]
BIASED = ["mean", "time", "optimal", "optimal_component_wise"]
# From the largest variance to the smallest, in this MDP and for all forms.
BY_VARIANCE = ["none", "leave_one_out", "true_value", "mean", "time", "optimal", "optimal_component_wise"]
# b does not depend on the batch, so the estimate is a mean over episodes: pairs say all that triples could.
LINEAR = {"none", "true_value", "critic"}
BATCH_SIZES = (2, 3)

all_forms = pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.returns}-{f.gamma}-{f.state_discount}")


class TableBaseline:
    """b(t, s) looked up in a table, through the interface that is open to everyone."""

    def __init__(self, table: Array) -> None:
        self.table = th.as_tensor(table, dtype=th.float32)

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """The table is what it is."""

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        observations: Any = batch.observations
        return self.table[batch.timesteps, observations.long().reshape(batch.timesteps.shape) % MDP.n_states]


def constant(b: float, mdp: TabularMDP = MDP) -> TableBaseline:
    return TableBaseline(np.full((mdp.horizon, mdp.n_states), b))


def baseline_arguments(name: str, gamma: float) -> dict[str, Any]:
    if name == "true_value":
        return {"baseline": TableBaseline(MDP.values(THETA, gamma))}
    if name == "critic":
        return {"baseline": "value"}
    if name == "optimal_component_wise":
        return {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}}
    return {"baseline": name}


def make_model(
    mdp: TabularMDP, theta: Array, form: Form, n_episodes: int, n_envs: int | None = None, **arguments: Any
) -> Reinforce:
    """A model on one env per episode, unless their number is given."""
    joint = {"critic_learning_rate": None, "n_critic_updates": 1}
    chosen = {**ASCENT, **joint, **form._asdict(), **arguments}
    return playing_model(Reinforce, mdp, theta, n_envs or n_episodes, n_episodes=n_episodes, **chosen)


def library(mdp: TabularMDP, theta: Array, form: Form, n: int, **arguments: Any) -> Array:
    """What the library makes of every batch of n episodes, (B, P)."""
    model = make_model(mdp, theta, form, n, **arguments)
    index, _ = Enumeration(mdp, theta, *form).batches(n)
    return np.stack([ascent(model, episodes) for episodes in episodes_of(mdp, index)])


@cache
def enumeration(form: Form) -> Enumeration:
    return Enumeration(MDP, THETA, *form)


@cache
def estimates(form: Form, name: str, n: int) -> Array:
    return library(MDP, THETA, form, n, **baseline_arguments(name, form.gamma))


def expected(form: Form, name: str, n: int) -> Array:
    """The same batches, by the enumeration's own formulas."""
    oracle, (index, _) = enumeration(form), enumeration(form).batches(n)
    tables = {"true_value": MDP.values(THETA, form.gamma), "critic": CRITIC_TABLE}
    steps = np.arange(MDP.horizon)
    return oracle.estimates(tables[name][steps, oracle.state] if name in tables else name, index)


def target(form: Form) -> Array:
    """What an unbiased estimator estimates: grad J_gamma, or sum_t E[score_t Q_gamma] for reward-to-go undiscounted."""
    return MDP.policy_gradient(THETA, form.gamma, state_discount=form.returns == "total" or form.state_discount)


def bias(form: Form, name: str, n: int) -> Array:
    """The bias the enumeration predicts."""
    _, probability = enumeration(form).batches(n)
    return probability @ expected(form, name, n) - target(form)


# --- the oracle itself ---


def test_enumeration_is_complete() -> None:
    oracle = enumeration(FORMS[0])
    assert len(oracle.trajectories) == 11
    assert {len(tau.rewards) for tau in oracle.trajectories} == {1, 2, 3}
    assert {tau.terminated for tau in oracle.trajectories} == {True, False}
    for n in BATCH_SIZES:
        assert oracle.batches(n)[1].sum() == pytest.approx(1.0, abs=1e-12)
    # The occupancies of the forward induction are those of the trajectories.
    assert np.allclose(oracle.mean(oracle.mask), MDP.occupancy(THETA).sum(axis=1), atol=1e-12)


@all_forms
def test_three_derivations_of_the_target_agree(form: Form) -> None:
    """Sum over trajectories, sum over states and times, and finite differences of the enumerated J."""
    oracle = enumeration(form)
    assert np.allclose(oracle.mean(oracle.X), target(form), atol=1e-12)
    difference = np.abs(MDP.finite_difference_gradient(THETA, form.gamma) - target(form)).max()
    if form == Form("reward_to_go", 0.9, False):
        assert difference > 1e-2
    else:
        assert difference < 1e-9


def test_undiscounted_states_give_the_gradient_of_no_objective() -> None:
    """A gradient's Jacobian is a Hessian, hence symmetric (Nota and Thomas 2020)."""

    def asymmetry(gamma: float, state_discount: bool) -> float:
        steps = 1e-5 * np.eye(THETA.size)
        field = [MDP.policy_gradient(THETA + sign * d, gamma, state_discount) for d in steps for sign in (1, -1)]
        jacobian = (np.array(field[::2]) - np.array(field[1::2])) / 2e-5
        return float(np.abs(jacobian - jacobian.T).max())

    assert asymmetry(0.9, True) < 1e-9
    assert asymmetry(1.0, False) < 1e-9
    assert asymmetry(0.9, False) > 1e-3


# --- every batch ---


@all_forms
@pytest.mark.parametrize("name", UNBIASED + BIASED)
def test_every_batch(form: Form, name: str) -> None:
    for n in BATCH_SIZES[:1] if name in LINEAR else BATCH_SIZES:
        assert np.abs(estimates(form, name, n) - expected(form, name, n)).max() < ATOL


@pytest.mark.parametrize("name", UNBIASED + BIASED)
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_state_discount_is_nothing_at_gamma_one(returns: str, name: str) -> None:
    on, off = (Form(returns, 1.0, state_discount) for state_discount in (True, False))
    assert np.abs(estimates(on, name, 2) - estimates(off, name, 2)).max() < 1e-6


def test_total_return_is_not_discounted_twice() -> None:
    with pytest.raises(ValueError, match="state_discount"):
        make_model(MDP, THETA, Form("total", 0.9, True), 2, baseline="none")


@all_forms
@pytest.mark.parametrize("name", UNBIASED + BIASED)
def test_layout_does_not_matter(form: Form, name: str) -> None:
    """Four episodes, of 3, 1, 3 and 2 steps, in four columns, two, or one."""
    episodes = [3, 7, 6, 4]
    oracle = enumeration(form)
    index, _ = oracle.batches(4)
    row = np.flatnonzero((index == sorted(episodes)).all(axis=1))
    trajectories = MDP.trajectories()
    for columns in ([[i] for i in episodes], [episodes[:2], episodes[2:]], [episodes]):
        model = make_model(MDP, THETA, form, 4, len(columns), **baseline_arguments(name, form.gamma))
        played = [[trajectories[i] for i in column] for column in columns]
        assert np.abs(ascent(model, played) - expected(form, name, 4)[row]).max() < ATOL


# --- expectation ---


@all_forms
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(form: Form, name: str) -> None:
    for n in BATCH_SIZES[:1] if name in LINEAR else BATCH_SIZES:
        _, probability = enumeration(form).batches(n)
        assert np.abs(probability @ estimates(form, name, n) - target(form)).max() < ATOL


@all_forms
def test_what_is_fitted_before_this_batch_is_unbiased(form: Form) -> None:
    """A regression on two earlier episodes leaves the mean alone; one on the very batch that it corrects does not."""
    index, probability = enumeration(form).batches(2)

    def mean_error(critic_fit: str) -> float:
        model = make_model(MDP, THETA, form, 2, baseline="linear", critic_fit=critic_fit)
        found = []
        for earlier, episodes in zip(episodes_of(MDP, [[3, 6]] * len(index)), episodes_of(MDP, index), strict=True):
            ascent(model, earlier)
            found.append(ascent(model, episodes))
        return float(np.abs(probability @ np.stack(found) - target(form)).max())

    assert mean_error("after") < ATOL
    assert mean_error("before") > 0.05


@all_forms
@pytest.mark.parametrize("name", BIASED)
def test_bias_is_the_predicted_one_and_shrinks(form: Form, name: str) -> None:
    size = {}
    for n in BATCH_SIZES:
        _, probability = enumeration(form).batches(n)
        found = probability @ estimates(form, name, n) - target(form)
        assert np.abs(found - bias(form, name, n)).max() < ATOL
        size[n] = np.linalg.norm(found)
    assert size[2] > size[3] > 0.05  # some 1e4 times what rounding could explain


@pytest.mark.parametrize("form", [f for f in FORMS if f.returns == "total"], ids=lambda f: str(f.gamma))
def test_mean_of_total_returns_scales_the_gradient(form: Form) -> None:
    """b holds R_i / N of the episode itself, and E[Y_i R_j] = 0 for the others: E = (1 - 1/N) grad J, at any gamma."""
    for n in BATCH_SIZES:
        _, probability = enumeration(form).batches(n)
        assert np.abs(probability @ estimates(form, "mean", n) - (1 - 1 / n) * target(form)).max() < ATOL


@all_forms
def test_time_baseline_scales_each_step(form: Form) -> None:
    """Where k of the N episodes reach step t, b_t holds G_{i,t} / k of the episode itself.

    So E = sum_t (1 - E[1/k]) E[U_t G_t], where k - 1 is binomial (N - 1, p_t), p_t = P(an episode reaches t), and
    E[1/k] = (1 - (1 - p_t)^N) / (N p_t).
    """
    oracle = enumeration(form)
    p = oracle.mean(oracle.mask)
    step_gradient = oracle.mean(oracle.U * oracle.G[..., None])  # (H, P)
    for n in BATCH_SIZES:
        _, probability = oracle.batches(n)
        scaled = (1 - (1 - (1 - p) ** n) / (n * p)) @ step_gradient
        assert np.abs(probability @ estimates(form, "time", n) - scaled).max() < ATOL


def first_order_bias(oracle: Enumeration, name: str) -> Array:
    """lim N * bias, by the delta method: b = b_0 + (1/N) sum_j c_j + O(1/N), E[c_j] = 0, gives -E[Y_i c_i]."""
    x, y = oracle.X, oracle.Y
    if name == "time":
        bias: Array = -(oracle.mean(oracle.U * oracle.G[..., None]) / oracle.mean(oracle.mask)[:, None]).sum(axis=0)
        return bias
    if name == "mean" and oracle.total:
        return -oracle.mean(x)
    if name == "mean":  # sum of G over sum of lengths
        gained, length = oracle.G.sum(axis=1), oracle.mask.sum(axis=1)
        c = (gained - oracle.mean(gained) / oracle.mean(length) * length) / oracle.mean(length)
        return -oracle.mean(y * c[:, None])
    if name == "optimal":
        yy = (y * y).sum(axis=1)
        c = ((x * y).sum(axis=1) - oracle.optimal_constant() * yy) / oracle.mean(yy)
        return -oracle.mean(y * c[:, None])
    yy = oracle.mean(y * y)
    return -oracle.mean(y * (x * y - oracle.mean(x * y) / yy * y * y) / yy)


@all_forms
@pytest.mark.parametrize("name", BIASED)
def test_bias_is_of_order_one_over_n(form: Form, name: str) -> None:
    """N * bias goes to the limit that the delta method gives, with an error that is itself at most 2.5 / N."""
    limit = first_order_bias(enumeration(form), name)
    sizes = (2, 3, 4, 5, 6)
    errors = [float(np.linalg.norm(n * bias(form, name, n) - limit)) for n in sizes]
    assert all(n * error < 2.5 for n, error in zip(sizes, errors, strict=True))
    if not (name == "mean" and form.returns == "total"):  # there it is exact for every N
        assert errors == sorted(errors, reverse=True)


# --- variance ---


def variance(form: Form, name: str, n: int = 3) -> float:
    """Total variance of the library's estimator; n times it is comparable across n."""
    if name in LINEAR:
        return total_variance(estimates(form, name, 2), enumeration(form).batches(2)[1]) * 2 / n
    return total_variance(estimates(form, name, n), enumeration(form).batches(n)[1])


def mean_squared_error(form: Form, name: str, n: int = 3) -> float:
    return variance(form, name, n) + float(np.sum(bias(form, name, n) ** 2))


@all_forms
def test_variance_falls_from_baseline_to_baseline(form: Form) -> None:
    """In this MDP, at N = 3, by at least 5% each; what is biased pays for it, yet the order stays by squared error.

    Times N, for total return at gamma 1: 6.6, 2.02, 1.52, 0.90, 0.83, 0.68, 0.52. The last four shrink the estimate
    towards zero as well; leave-one-out is the mean without that.
    """
    for measure in (variance, mean_squared_error):
        found = [measure(form, name) for name in BY_VARIANCE]
        assert all(later < 0.95 * earlier for earlier, later in pairwise(found)), found


def test_reward_to_go_has_less_variance_than_total_return() -> None:
    """For the same gradient: without baseline, and with one that knows the step.

    One number for all steps fits the total return but not what is left of it: there reward-to-go can lose.
    """
    pairs = [(FORMS[0], FORMS[2]), (FORMS[1], FORMS[4])]
    for total, to_go in pairs:
        for name in ("none", "true_value", "time"):
            assert variance(to_go, name) < variance(total, name)
        assert variance(to_go, "leave_one_out") > variance(total, "leave_one_out")


@all_forms
def test_no_constant_beats_the_optimal_one(form: Form) -> None:
    """Var(X - bY) = Var(X - b*Y) + (b - b*)^2 E[Y.Y], since E[Y] = 0 and b* is where the derivative vanishes."""
    oracle = enumeration(form)
    best = oracle.optimal_constant()
    curvature = float(oracle.mean((oracle.Y**2).sum(axis=1)))

    def found(b: float) -> float:
        return total_variance(library(MDP, THETA, form, 1, baseline=constant(b)), oracle.probability)

    least = found(best)
    for b in (0.0, 0.9 * best, 1.1 * best, float(oracle.mean(oracle.G[:, 0]))):  # the last is the mean return
        assert found(b) > least
        assert found(b) == pytest.approx(least + (b - best) ** 2 * curvature, abs=1e-4)
    if form.returns == "total":  # X = R Y: the slides' E[g^2 r] / E[g^2]
        squared_score = (oracle.Y**2).sum(axis=1)
        slides = oracle.mean(squared_score * oracle.G[:, 0]) / oracle.mean(squared_score)
        assert best == pytest.approx(slides, abs=1e-12)


def test_slides_optimal_baseline_can_hurt_reward_to_go() -> None:
    """Three steps under a uniform policy, reward 1 in the first whatever the action, so R = 1 and grad J = 0.

    E[score_t . score_u] is (1/2 from the weights + 1/2 from the bias) = 1 for t = u, else 0. X = score_0 and
    Y = score_0 + score_1 + score_2, so E|X - bY|^2 = (1 - b)^2 + 2 b^2: 1 without baseline, 2 at the slides'
    b = E[g^2 r] / E[g^2] = 1, and 2/3 at b* = E[X.Y] / E[Y.Y] = 1/3.
    """
    mdp, theta = chain_mdp()
    form = Form("reward_to_go", 1.0, False)
    oracle = Enumeration(mdp, theta, *form)
    assert oracle.optimal_constant() == pytest.approx(1 / 3)

    def found(b: float) -> float:
        return total_variance(library(mdp, theta, form, 1, baseline=constant(b, mdp)), oracle.probability)

    assert found(0.0) == pytest.approx(1.0, abs=ATOL)
    assert found(1.0) == pytest.approx(2.0, abs=ATOL)
    assert found(1 / 3) == pytest.approx(2 / 3, abs=ATOL)
