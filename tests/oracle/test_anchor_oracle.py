"""Anchored updates against the enumeration of a tabular MDP: the policy gradient, less that of the weighted penalty.

The penalties are written down in NumPy, and differentiated by central differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch as th

from sb3_pg import NPG, TRPO, DemonstrationLoss, Demonstrations, KLAnchor, KLPenaltyPG, Reinforce
from tests.oracle import test_natural_gradient_oracle as npg
from tests.oracle import test_off_policy_oracle as off_policy
from tests.oracle.harness import (
    ASCENT,
    ATOL,
    BEHAVIOR,
    CRITIC_TABLE,
    MDP,
    THETA,
    ascent,
    episodes_of,
    parameters,
    playing_model,
    set_parameters,
    step,
)
from tests.oracle.mdp import Array, Enumeration

if TYPE_CHECKING:
    from collections.abc import Callable

COEF, GAMMA = 0.7, 0.9
#: The demonstrations: pairs of state and action, in episodes of 3, 1 and 2 steps.
STATES, ACTIONS, ENDS = [0, 1, 1, 0, 2, 0], [1, 1, 0, 0, 1, 0], [2, 3, 5]


def divergence(theta: Array, visits: Array) -> float:
    """sum_s d(s) KL(pi_0 || pi), where pi_0 is the behavior's policy."""
    first = MDP.policy(BEHAVIOR)
    kl = (first * np.log(first / MDP.policy(theta))).sum(axis=1)
    return float(visits @ kl / visits.sum())


def surprise(theta: Array, _visits: Array) -> float:
    """Mean of -log pi(a | s) over the demonstrations."""
    return float(-np.log(MDP.policy(theta)[STATES, ACTIONS]).mean())


def slope(penalty: Callable[[Array, Array], float], visits: Array) -> Array:
    """Gradient of a penalty at THETA."""
    steps = 1e-5 * np.eye(THETA.size)
    return np.array([penalty(THETA + d, visits) - penalty(THETA - d, visits) for d in steps]) / 2e-5


PENALTIES = {"kl": divergence, "demonstrations": surprise}
both = pytest.mark.parametrize("name", PENALTIES)


def anchor(model: Any, name: str) -> None:
    """Give a model an anchor: pi_0 is the behavior's policy, or the demonstrations above."""
    if name == "kl":
        model.anchor = KLAnchor(COEF)
        set_parameters(model, BEHAVIOR)
        model.anchor.draw(model.policy)
        set_parameters(model, THETA)
    else:
        ends = np.isin(np.arange(len(STATES)), ENDS)
        model.anchor = DemonstrationLoss(Demonstrations(STATES, ACTIONS, terminated=ends), COEF, batch_size=None)


def visits_of(oracle: Enumeration, chosen: Any) -> Array:
    """How often each state is visited in some trajectories, (S,)."""
    mask, states = oracle.mask[chosen].flatten(), oracle.state[chosen].flatten()
    return np.bincount(states, mask, MDP.n_states).astype(float)


@both
def test_the_gradient_step_of_every_batch_and_its_expectation(name: str) -> None:
    """Sums over time: the penalty is that of the mean step, times the mean length of the episodes."""
    oracle = Enumeration(MDP, THETA, "reward_to_go", GAMMA, state_discount=True)
    chosen = {**ASCENT, "gamma": GAMMA, "state_discount": True, "baseline": "none", "n_episodes": 2}
    model = playing_model(Reinforce, MDP, THETA, 2, **chosen)
    anchor(model, name)
    index, probability = oracle.batches(2)
    found = np.stack([ascent(model, episodes) for episodes in episodes_of(MDP, index)])
    visits = np.stack([visits_of(oracle, chosen) for chosen in index])
    slopes = np.stack([slope(PENALTIES[name], v) * v.sum() / 2 for v in visits])
    assert np.abs(found - (oracle.estimates("none", index) - COEF * slopes)).max() < ATOL
    occupancy = MDP.occupancy(THETA).sum(axis=0)
    whole = MDP.policy_gradient(THETA, GAMMA, state_discount=True)
    whole = whole - COEF * slope(PENALTIES[name], occupancy) * occupancy.sum()
    assert np.abs(probability @ found - whole).max() < ATOL


@both
def test_the_natural_step_of_every_batch(name: str) -> None:
    """(F + c I)^-1 of the anchored gradient, with the Fisher matrix of the batch alone; both are means over steps."""
    oracle = Enumeration(MDP, THETA, "reward_to_go", GAMMA, state_discount=False)
    model = npg.make_model(MDP, THETA, 2)
    anchor(model, name)
    index, _ = oracle.batches(2)
    advantages = oracle.G - oracle.mask * CRITIC_TABLE[np.arange(MDP.horizon), oracle.state]
    gradients = oracle.credited(advantages[index][..., None], index)
    for chosen, gradient, episodes in zip(index, gradients, episodes_of(MDP, index), strict=True):
        visits = visits_of(oracle, chosen)
        anchored = gradient * len(chosen) / visits.sum() - COEF * slope(PENALTIES[name], visits)
        expected = npg.natural(npg.fisher(MDP, THETA, visits), anchored)
        set_parameters(model, THETA)
        assert step(model, episodes) == pytest.approx(expected, rel=1e-3, abs=2e-6)


@both
@pytest.mark.parametrize("chunk_size", [3, 1000])
def test_what_the_line_search_predicts_and_measures(name: str, chunk_size: int) -> None:
    """Both are of the anchored objective: L(theta) = E[rho A] - c P, mean over the steps of a batch."""
    oracle = Enumeration(MDP, THETA, "reward_to_go", GAMMA, state_discount=False)
    index = np.array([[2, 7]])
    arguments: dict[str, Any] = {"gamma": GAMMA, "advantage": "monte_carlo", "n_critic_updates": 1, "batch_size": None}
    arguments |= {"n_steps": None, "n_episodes": 2, "target_kl": 0.02, "fisher_chunk_size": chunk_size}
    model: Any = playing_model(TRPO, MDP, THETA, 2, **arguments)
    anchor(model, name)
    (episodes,) = episodes_of(MDP, index)
    taken = step(model, episodes)
    visits = visits_of(oracle, index[0])
    mask = oracle.mask[index[0]].astype(bool)
    states, actions = oracle.state[index[0]][mask], oracle.action[index[0]][mask]
    credit = (oracle.G - CRITIC_TABLE[np.arange(MDP.horizon), oracle.state])[index[0]][mask]

    def objective(theta: Array) -> float:
        ratio = MDP.policy(theta)[states, actions] / MDP.policy(THETA)[states, actions]
        return float((ratio * credit).mean()) - COEF * PENALTIES[name](theta, visits)

    rises = [objective(THETA + d) - objective(THETA - d) for d in 1e-5 * np.eye(THETA.size)]
    logged: dict[str, Any] = model.logger.name_to_value
    assert logged["train/step_outcome"] == "accepted"
    assert logged["train/surrogate_predicted"] == pytest.approx(np.array(rises) / 2e-5 @ taken, rel=1e-4)
    assert logged["train/surrogate_realized"] == pytest.approx(objective(THETA + taken) - objective(THETA), rel=1e-3)
    assert logged[f"anchor/{model.anchor.name}"] == pytest.approx(PENALTIES[name](THETA, visits), rel=1e-5)
    assert logged["anchor/coef"] == pytest.approx(COEF)


@both
def test_the_first_step_under_a_kl_penalty(name: str) -> None:
    """The divergence from the policy before the step has no slope there."""
    oracle = Enumeration(MDP, THETA, "reward_to_go", GAMMA, state_discount=False)
    arguments = {**ASCENT, "gamma": GAMMA, "advantage": "monte_carlo", "n_steps": None, "n_episodes": 2}
    arguments |= {"n_epochs": 1, "batch_size": 100, "critic_learning_rate": None, "n_critic_updates": 1}
    model = playing_model(KLPenaltyPG, MDP, THETA, 2, **arguments)
    anchor(model, name)
    index = np.array([[0, 9], [3, 10]])
    advantages = oracle.G - oracle.mask * CRITIC_TABLE[np.arange(MDP.horizon), oracle.state]
    gradients = oracle.credited(advantages[index][..., None], index)
    for chosen, gradient, episodes in zip(index, gradients, episodes_of(MDP, index), strict=True):
        visits = visits_of(oracle, chosen)
        expected = gradient * len(chosen) / visits.sum() - COEF * slope(PENALTIES[name], visits)
        assert np.abs(ascent(model, episodes) - expected).max() < ATOL


@both
def test_the_off_policy_step_of_every_trajectory(name: str) -> None:
    """The states are those of the policy that acted, whose importance weights are not those of the penalty."""
    form = off_policy.Form("per_decision", "reward_to_go", GAMMA, state_discount=True)
    model, trajectories = off_policy.make(form, baseline="none"), off_policy.stored(MDP)
    anchor(model, name)
    oracle = Enumeration(MDP, THETA, *form[1:], behavior=BEHAVIOR)
    free = off_policy.make(form, baseline="none")
    slopes = []
    for i, trajectory in enumerate(trajectories):
        visits = visits_of(oracle, [i])
        slopes.append(slope(PENALTIES[name], visits) * visits.sum())
        difference = off_policy.ascent(model, [trajectory]) - off_policy.ascent(free, [trajectory])
        assert np.abs(difference + COEF * slopes[-1]).max() < ATOL
    found = np.stack([off_policy.ascent(model, [trajectory]) for trajectory in trajectories])
    whole = off_policy.target(form) - COEF * oracle.mean(np.stack(slopes))
    assert np.abs(oracle.mean(found) - whole).max() < ATOL


@pytest.mark.parametrize("cls", [Reinforce, NPG, KLPenaltyPG])
def test_the_weight_decays_by_updates(cls: Any) -> None:
    arguments: dict[str, Any] = {"n_steps": None, "n_episodes": 2, **({} if cls is NPG else {"learning_rate": 1e-9})}
    model = playing_model(cls, MDP, THETA, 2, **arguments)
    model.anchor = KLAnchor(COEF, decay=0.5)
    (episodes,) = episodes_of(MDP, [[1, 4]])
    for k in range(3):
        step(model, episodes)
        assert model.logger.name_to_value["anchor/coef"] == pytest.approx(COEF * 0.5**k)
        assert model.anchor.n_updates == k + 1
    assert not th.as_tensor(parameters(model)).isnan().any()
