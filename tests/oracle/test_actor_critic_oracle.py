"""ActorCritic against the enumeration of a tabular MDP: every batch, its expectation, and its bias where there is one.

Two tasks: one that the time limit ends, and one that goes on behind it, where the state reached is worth what the
critic says. Two critics: the true V(t, s), and one that knows nothing.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from numpy.typing import NDArray

from sb3_pg import ActorCritic
from tests.oracle.harness import (
    ASCENT,
    ATOL,
    CRITIC,
    CRITIC_TABLE,
    MDP,
    THETA,
    ascent,
    episodes_of,
    playing_model,
    set_parameters,
    step,
)
from tests.oracle.mdp import Array, Enumeration, TabularMDP, graph_mdp

TASKS: dict[str, TabularMDP] = {"ends": MDP, "continues": graph_mdp(continues=True)[0]}


class Form(NamedTuple):
    """What is behind the first rewards of a return: lambda of "gae", n of "n_step"."""

    advantage: str
    parameter: float = 1.0

    @property
    def arguments(self) -> dict[str, Any]:
        names: dict[str, dict[str, Any]] = {
            "gae": {"gae_lambda": self.parameter},
            "n_step": {"td_steps": int(self.parameter)},
        }
        return {"advantage": self.advantage, **names.get(self.advantage, {})}

    def n_steps(self) -> int:
        """Rewards before the critic's value."""
        return {"td": 1, "n_step": int(self.parameter), "monte_carlo": MDP.horizon}[self.advantage]


class Discount(NamedTuple):
    gamma: float
    state_discount: bool


MONTE_CARLO = Form("monte_carlo")
FORMS = [
    *(Form("gae", lam) for lam in (0.0, 0.3, 0.95, 1.0)),
    Form("td"),
    *(Form("n_step", n) for n in (1, 2, 3, 7)),
    MONTE_CARLO,
]
#: All rewards to the end of the episode: no value of a state on the way is part of them.
WHOLE = {Form("gae", 1.0), Form("n_step", 3), Form("n_step", 7), MONTE_CARLO}
DISCOUNTS = [Discount(1.0, False), Discount(0.9, False), Discount(0.9, True)]

all_forms = pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.advantage}-{f.parameter:g}")
all_discounts = pytest.mark.parametrize("discount", DISCOUNTS, ids=lambda d: f"{d.gamma}-{d.state_discount}")
both_tasks = pytest.mark.parametrize("task", list(TASKS))
both_critics = pytest.mark.parametrize("critic", ["true", "wrong"])


@cache
def enumeration(task: str, discount: Discount) -> Enumeration:
    return Enumeration(TASKS[task], THETA, "reward_to_go", *discount)


def values_of(critic: str, task: str, discount: Discount) -> Array:
    """V(t, s) of the critic, (H + 1, S)."""
    if critic == "true":
        return TASKS[task].values(THETA, discount.gamma)
    wrong = np.tile(CRITIC, (MDP.horizon + 1, 1))
    wrong[-1] *= task == "continues"  # a state that nothing follows is not asked for its value
    return wrong


def make_model(
    form: Form,
    discount: Discount,
    task: str,
    values: Array,
    n_episodes: int,
    n_envs: int | None = None,
    **arguments: Any,
) -> ActorCritic:
    """A model on one env per episode, unless their number is given."""
    chosen: dict[str, Any] = {
        **ASCENT,
        **discount._asdict(),
        **form.arguments,
        "n_steps": None,
        "n_episodes": n_episodes,
        "truncation": "bootstrap" if task == "continues" else "terminal",
        **arguments,
    }
    return playing_model(ActorCritic, TASKS[task], THETA, n_envs or n_episodes, values, **chosen)


def library(form: Form, discount: Discount, task: str, values: Array, n: int) -> Array:
    """What the library makes of every batch of n episodes, (B, P)."""
    model = make_model(form, discount, task, values, n)
    index, _ = enumeration(task, discount).batches(n)
    return np.stack([ascent(model, episodes) for episodes in episodes_of(TASKS[task], index)])


@cache
def estimates(form: Form, discount: Discount, task: str, critic: str) -> Array:
    """Of every single episode."""
    return library(form, discount, task, values_of(critic, task, discount), 1)


def advantages(oracle: Enumeration, form: Form, values: Array) -> Array:
    """A_{i,t} of every trajectory by the enumeration's own formulas, (M, H)."""
    if form.advantage == "gae":
        returns = oracle.lambda_returns(values, form.parameter)
    else:
        returns = oracle.n_step_returns(values, form.n_steps())
    steps = np.arange(oracle.mask.shape[1])
    return returns - oracle.mask * values[steps, oracle.state]


def expected(form: Form, discount: Discount, task: str, values: Array, index: NDArray[np.int64]) -> Array:
    """The estimate of every batch by the enumeration's own formulas."""
    oracle = enumeration(task, discount)
    return oracle.credited(advantages(oracle, form, values)[index][..., None], index)


def target(task: str, discount: Discount) -> Array:
    """sum_t w_t E[score_t Q(t, s_t, a_t)]; with gamma^t or gamma 1, and where the time limit ends the task, grad J."""
    return TASKS[task].policy_gradient(THETA, *discount)


def predicted_bias(form: Form, discount: Discount, task: str, values: Array) -> Array:
    """sum_t w_t sum_s P(s_t = s) sum_a pi(a|s) score(s, a) (E[return | t, s, a] - Q(t, s, a)): no trajectory in it.

    What is subtracted, V(s_t) of whatever critic, adds nothing: E[score_t | s_t] = 0.
    """
    mdp = TASKS[task]
    if form.advantage == "gae":
        credit = mdp.lambda_q(THETA, discount.gamma, values, form.parameter)
    else:
        credit = mdp.n_step_q(THETA, discount.gamma, values, form.n_steps())
    wrong = credit - mdp.q_values(THETA, discount.gamma)
    return mdp.credited_gradient(THETA, wrong, discount.gamma if discount.state_discount else 1.0)


# --- the oracle itself ---


@both_tasks
def test_enumeration_is_complete(task: str) -> None:
    oracle = enumeration(task, DISCOUNTS[0])
    assert len(oracle.trajectories) == {"ends": 11, "continues": 12}[task]
    assert oracle.probability.sum() == pytest.approx(1.0, abs=1e-12)
    # What follows the time limit is as likely as the forward induction says.
    mdp, last = TASKS[task], np.zeros(MDP.n_states)
    for tau, p in zip(oracle.trajectories, oracle.probability, strict=True):
        last[tau.last_state] += 0.0 if tau.terminated else p
    move = np.einsum("sa,saz->sz", mdp.policy(THETA), mdp.transition[:, :, :-1])
    following = mdp.occupancy(THETA)[-1] @ move
    assert np.allclose(
        last if task == "continues" else last.sum(), following if task == "continues" else following.sum()
    )


@both_tasks
@all_discounts
def test_the_true_values_are_what_the_trajectories_earn(task: str, discount: Discount) -> None:
    """V(t, s) = E[G_t | s_t = s], where the cut is worth what solves the endless task's Bellman equation."""
    mdp, oracle = TASKS[task], enumeration(task, discount)
    values = mdp.values(THETA, discount.gamma)
    earned = oracle.n_step_returns(values, mdp.horizon)
    for t in range(mdp.horizon):
        for s in range(mdp.n_states):
            here = oracle.mask[:, t] * (oracle.state[:, t] == s) * oracle.probability
            assert here @ earned[:, t] == pytest.approx(here.sum() * values[t, s], abs=1e-12)
    if task == "continues":
        assert np.allclose(values, values[0], atol=1e-12)  # time changes nothing where nothing ends
    else:
        assert not np.allclose(values[:3], values[0], atol=0.1)


@both_tasks
@both_critics
@all_discounts
@all_forms
def test_two_derivations_of_the_expectation_agree(form: Form, discount: Discount, critic: str, task: str) -> None:
    """Sum over trajectories, and sum over times, states and actions."""
    oracle, values = enumeration(task, discount), values_of(critic, task, discount)
    mean = oracle.mean(np.einsum("itp,it->ip", oracle.U, advantages(oracle, form, values)))
    assert np.allclose(mean, target(task, discount) + predicted_bias(form, discount, task, values), atol=1e-12)


# --- every batch ---


@both_tasks
@all_discounts
@all_forms
def test_every_batch(form: Form, discount: Discount, task: str) -> None:
    """The estimate is a mean over episodes, so that pairs of one task and critic say how it depends on their number."""
    for critic, n in (("wrong", 1), ("true", 1), *([("wrong", 2)] if task == "ends" else [])):
        index, _ = enumeration(task, discount).batches(n)
        values = values_of(critic, task, discount)
        found = library(form, discount, task, values, n) if n > 1 else estimates(form, discount, task, critic)
        assert np.abs(found - expected(form, discount, task, values, index)).max() < ATOL


@both_tasks
@all_forms
def test_state_discount_is_nothing_at_gamma_one(form: Form, task: str) -> None:
    off, on = (estimates(form, Discount(1.0, state_discount), task, "wrong") for state_discount in (False, True))
    assert np.abs(off - on).max() < 1e-6


@both_tasks
@all_forms
def test_layout_does_not_matter(form: Form, task: str) -> None:
    """Four episodes in four columns, two, or one."""
    discount, episodes = Discount(0.9, True), [3, 7, 6, 4]
    values = values_of("wrong", task, discount)
    formula = expected(form, discount, task, values, np.array([episodes]))
    trajectories = TASKS[task].trajectories()
    for columns in ([[i] for i in episodes], [episodes[:2], episodes[2:]], [episodes]):
        model = make_model(form, discount, task, values, 4, len(columns))
        played = [[trajectories[i] for i in column] for column in columns]
        assert np.abs(ascent(model, played) - formula).max() < ATOL


@both_tasks
@all_discounts
def test_identities(discount: Discount, task: str) -> None:
    """Of the gradient, batch by batch: the ends of both families are Monte Carlo and TD."""

    def found(*form: Any) -> Array:
        return estimates(Form(*form), discount, task, "wrong")

    for whole in WHOLE:
        assert np.abs(found(*whole) - found("monte_carlo")).max() < 1e-6
    for form in (("gae", 0.0), ("n_step", 1)):
        assert np.abs(found(*form) - found("td")).max() < 1e-6
    assert np.abs(found("monte_carlo") - found("td")).max() > 1.0


# --- expectation ---


@both_tasks
@all_discounts
@all_forms
def test_unbiased_with_the_true_values(form: Form, discount: Discount, task: str) -> None:
    probability = enumeration(task, discount).probability
    assert np.abs(probability @ estimates(form, discount, task, "true") - target(task, discount)).max() < ATOL


@all_discounts
@pytest.mark.parametrize("seed", range(3))
def test_monte_carlo_is_unbiased_with_any_critic(seed: int, discount: Discount) -> None:
    values = np.random.default_rng(seed).normal(scale=3.0, size=(MDP.horizon + 1, MDP.n_states))
    values[-1] = 0.0
    found = enumeration("ends", discount).probability @ library(MONTE_CARLO, discount, "ends", values, 1)
    assert np.abs(found - target("ends", discount)).max() < ATOL


@both_tasks
@all_discounts
@all_forms
def test_bias_of_a_wrong_critic_is_the_predicted_one(form: Form, discount: Discount, task: str) -> None:
    """Its length, for gradients of length 0.4 and 0.8 to 1.1:

    ============================= ============== ==============
    task                          ends           continues
    ============================= ============== ==============
    td, gae-0, n_step-1           1.04 to 1.22   1.56 to 1.98
    gae-0.3                       0.77 to 0.90   1.30 to 1.69
    n_step-2                      0.20 to 0.25   0.76 to 1.07
    gae-0.95                      0.06 to 0.07   0.64 to 0.92
    all rewards of the episode    0              0.58 to 0.85
    ============================= ============== ==============

    The last row of a task that goes on: the critic's value behind the cut is wrong.
    """
    found = enumeration(task, discount).probability @ estimates(form, discount, task, "wrong") - target(task, discount)
    assert np.abs(found - predicted_bias(form, discount, task, values_of("wrong", task, discount))).max() < ATOL
    size = float(np.linalg.norm(found))
    if form in WHOLE and task == "ends":
        assert size < ATOL
    else:
        assert size > {"ends": 0.06, "continues": 0.58}[task]  # thousands of times what rounding could explain


@both_tasks
@all_discounts
def test_the_later_it_bootstraps_the_less_bias(discount: Discount, task: str) -> None:
    """In this MDP, by at least 7% from form to form."""
    values = values_of("wrong", task, discount)
    for family in ([Form("gae", lam) for lam in (0.0, 0.3, 0.95, 1.0)], [Form("n_step", n) for n in (1, 2, 3)]):
        sizes = [float(np.linalg.norm(predicted_bias(form, discount, task, values))) for form in family]
        assert all(later < 0.93 * earlier + 1e-12 for earlier, later in pairwise(sizes)), sizes


# --- when the critic is fitted ---

# Gradient descent on the mean squared error of V(s) = w[s]: each pass multiplies the error of a state that makes up the
# share x of the batch by 1 - 2 RATE x. Pairs of episodes have 2 to 6 steps, so x is in [1/6, 1], where
# |1 - 12/7 x| <= 5/7: after N_PASSES the error is at most 5e-8 of what it was, which is below 5.
RATE, N_PASSES = 6 / 7, 50


def fitting_model(form: Form, discount: Discount, critic_fit: str) -> ActorCritic:
    """A step of theta is the gradient, and the critic is fitted to the batch's returns until nothing moves."""
    model = make_model(
        form,
        discount,
        "ends",
        CRITIC_TABLE,
        n_episodes=2,
        policy_kwargs={"optimizer_class": th.optim.SGD, "critic_sees_time": False},
        critic_target="monte_carlo",
        critic_fit=critic_fit,
        n_critic_updates=N_PASSES,
        critic_learning_rate=RATE,
    )
    model.critic_optimizer = th.optim.SGD([model.policy.value_net.weight], lr=RATE)
    return model


@cache
def updates(form: Form, discount: Discount, critic_fit: str) -> tuple[Array, Array]:
    """By how much an update from every pair of episodes moves theta, (B, P), and V(s) after it, (B, S)."""
    model = fitting_model(form, discount, critic_fit)
    steps, fitted = [], []
    index, _ = enumeration("ends", discount).batches(2)
    for episodes in episodes_of(MDP, index):
        set_parameters(model, THETA)
        steps.append(step(model, episodes))
        fitted.append(model.policy.value_net.weight.detach().flatten().double().numpy())
    return np.stack(steps), np.stack(fitted)


def fitted_values(oracle: Enumeration, index: NDArray[np.int64]) -> Array:
    """V(s) of least squares: the mean of G over the batch's visits to s, and CRITIC where there are none; (B, S)."""
    visits = oracle.mask[index][..., None] * np.eye(MDP.n_states)[oracle.state[index]]  # (B, N, H, S)
    count = visits.sum(axis=(1, 2))
    total = (visits * oracle.G[index][..., None]).sum(axis=(1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), CRITIC)


def expected_before(form: Form, discount: Discount, index: NDArray[np.int64]) -> Array:
    """Every batch's estimate with the critic that least squares makes of that batch, (B, P)."""
    oracle = enumeration("ends", discount)
    behind = np.zeros((1, MDP.n_states))
    found = []
    for batch, v in zip(index, fitted_values(oracle, index), strict=True):
        values = np.concatenate([np.tile(v, (MDP.horizon, 1)), behind])
        found.append(expected(form, discount, "ends", values, batch[None])[0])
    return np.stack(found)


fits = pytest.mark.parametrize("discount", [Discount(1.0, False), Discount(0.9, False)], ids=lambda d: str(d.gamma))


@fits
@pytest.mark.parametrize("form", [MONTE_CARLO, Form("td")], ids=lambda f: f.advantage)
@pytest.mark.parametrize("critic_fit", ["before", "after"])
def test_update_fits_before_or_after(critic_fit: str, form: Form, discount: Discount) -> None:
    """It becomes least squares either way; the actor's step is made of the critic after that, or before."""
    oracle = enumeration("ends", discount)
    index, _ = oracle.batches(2)
    steps, fitted = updates(form, discount, critic_fit)
    assert np.abs(fitted - fitted_values(oracle, index)).max() < ATOL
    before = expected_before(form, discount, index)
    after = expected(form, discount, "ends", values_of("wrong", "ends", discount), index)
    right, other = (before, after) if critic_fit == "before" else (after, before)
    assert np.abs(steps - right).max() < ATOL
    assert np.abs(steps - other).max() > 0.5


@fits
def test_a_critic_fitted_after_is_unbiased(discount: Discount) -> None:
    _, probability = enumeration("ends", discount).batches(2)
    steps, _ = updates(MONTE_CARLO, discount, "after")
    assert np.abs(probability @ steps - target("ends", discount)).max() < ATOL


@fits
def test_a_critic_fitted_before_is_biased(discount: Discount) -> None:
    """By as much as the enumeration says: 0.26, 0.21 and 0.19 for 2, 3 and 4 episodes, of a gradient of length 0.44.

    At gamma 0.9 by 0.23, 0.20 and 0.17, of 0.36.
    """
    oracle, unbiased = enumeration("ends", discount), target("ends", discount)
    steps, _ = updates(MONTE_CARLO, discount, "before")
    found = oracle.batches(2)[1] @ steps - unbiased
    sizes = []
    for n in (2, 3, 4):
        index, probability = oracle.batches(n)
        bias = probability @ expected_before(MONTE_CARLO, discount, index) - unbiased
        sizes.append(float(np.linalg.norm(bias)))
        if n == 2:
            assert np.abs(found - bias).max() < ATOL
    assert all(later < earlier for earlier, later in pairwise(sizes))
    assert sizes[-1] > 0.17
