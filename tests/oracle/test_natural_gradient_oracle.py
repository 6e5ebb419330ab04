"""NPG against the enumeration of a tabular MDP: F, g and the step of every batch, and in expectation.

F is E[score score^T] by the enumeration's own scores, in float64; nothing of the library's products is in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sb3_pg import NPG
from tests.oracle.harness import CRITIC_TABLE, MDP, THETA, episodes_of, playing_model, set_parameters, step
from tests.oracle.mdp import Array, Enumeration, TabularMDP, chain_mdp

ALPHA, DAMPING, GAMMA = 0.05, 0.02, 0.9


def make_model(mdp: TabularMDP, theta: Array, n_episodes: int, **arguments: Any) -> Any:
    """NPG whose step is alpha (F + c I)^-1 g, solved to rounding, with the enumeration's policy."""
    chosen: dict[str, Any] = {
        "n_steps": None,
        "n_episodes": n_episodes,
        "step": "fixed",
        "step_size": ALPHA,
        "cg_damping": DAMPING,
        "cg_max_steps": 30,
        "cg_tolerance": 1e-7,
        "gamma": GAMMA,
        "advantage": "monte_carlo",
        "n_critic_updates": 1,
        "batch_size": None,
        **arguments,
    }
    return playing_model(NPG, mdp, theta, n_episodes, **chosen)


def fisher(mdp: TabularMDP, theta: Array, visits: Array) -> Array:
    """sum_s d(s) sum_a pi(a|s) score score^T.

    :param visits: how often each state was visited, (S,)
    """
    score = mdp.scores(theta)
    whole: Array = np.einsum("s,sa,sap,saq->pq", visits / visits.sum(), mdp.policy(theta), score, score)
    return whole


def natural(matrix: Array, gradient: Array) -> Array:
    damped = matrix + DAMPING * np.eye(len(gradient))
    return np.asarray(ALPHA * np.linalg.solve(damped, gradient), dtype=np.float64)


@pytest.mark.parametrize("state_discount", [False, True])
def test_the_step_of_every_batch(state_discount: bool) -> None:
    """All pairs of trajectories, of unequal length, with padding behind them, and a critic that knows nothing."""
    oracle = Enumeration(MDP, THETA, "reward_to_go", GAMMA, state_discount)
    model = make_model(MDP, THETA, 2, state_discount=state_discount)
    index, _ = oracle.batches(2)
    times = np.arange(oracle.mask.shape[1])
    advantages = oracle.G - oracle.mask * CRITIC_TABLE[times, oracle.state]
    gradients = oracle.credited(advantages[index][..., None], index)
    for chosen, gradient, episodes in zip(index, gradients, episodes_of(MDP, index), strict=True):
        mask = oracle.mask[chosen]
        visits = np.bincount(oracle.state[chosen].flatten(), mask.flatten(), MDP.n_states).astype(float)
        expected = natural(fisher(MDP, THETA, visits), gradient * len(chosen) / mask.sum())  # the mean is over steps
        set_parameters(model, THETA)
        assert step(model, episodes) == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_all_trajectories_at_once_give_the_natural_policy_gradient() -> None:
    """Each is as likely as any other: with every one in the batch, g is grad J / H and F that of the true states."""
    mdp, theta = chain_mdp()
    mdp = replace(mdp, reward=np.array([[1.0, 0.0], [0.5, 2.0], [-1.0, 0.3]]))
    n = len(mdp.trajectories())
    model = make_model(mdp, theta, n)
    set_parameters(model, theta, np.zeros((mdp.horizon + 1, mdp.n_states)))
    (episodes,) = episodes_of(mdp, [range(n)])
    taken = step(model, episodes)
    gradient = mdp.policy_gradient(theta, GAMMA, False) / mdp.horizon
    expected = natural(fisher(mdp, theta, mdp.occupancy(theta).sum(0)), gradient)
    assert taken == pytest.approx(expected, rel=1e-3, abs=2e-6)
