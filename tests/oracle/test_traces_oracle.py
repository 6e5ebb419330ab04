"""V-trace and Retrace against the enumeration of a tabular MDP in which another policy acts: what they converge to.

Two tasks: one that the time limit ends, and one that goes on behind it, where the state reached is worth its value.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_pg import functional as F  # noqa: N812
from tests.oracle.harness import BEHAVIOR, MDP, THETA, columns_of
from tests.oracle.mdp import Array, Enumeration, TabularMDP, graph_mdp

GAMMA = 0.9
TASKS: dict[str, TabularMDP] = {"ends": MDP, "continues": graph_mdp(continues=True)[0]}
PI, MU = MDP.policy(THETA), MDP.policy(BEHAVIOR)
STEPS = np.arange(MDP.horizon)

both_tasks = pytest.mark.parametrize("task", list(TASKS))


@cache
def enumeration(task: str) -> Enumeration:
    return Enumeration(TASKS[task], THETA, "reward_to_go", GAMMA, False, behavior=BEHAVIOR)


def fields_of(task: str, behind: Array) -> dict[str, Any]:
    """What both targets take, but for the values.

    :param behind: the value of each state behind the time limit, (S,)
    """
    oracle = enumeration(task)
    fields = columns_of(oracle, PI, MU)
    log_ratio = F.log_importance_ratio(fields["log_prob"], fields["behavior_log_prob"], fields["mask"])
    cut = [0.0 if tau.terminated else float(behind[tau.last_state]) for tau in oracle.trajectories]
    bootstrap = th.where(fields["ends"], th.tensor(cut, dtype=th.float64), 0.0)
    return {"log_ratio": log_ratio, "bootstrap": bootstrap, **{k: fields[k] for k in ("rewards", "ends", "mask")}}


def vtrace(task: str, values: Array, lam: float, max_rho: float, max_c: float) -> Array:
    """v_t of every trajectory, (M, H), for a critic (H + 1, S)."""
    table = th.as_tensor(values[STEPS, enumeration(task).state].T)
    bounds: dict[str, Any] = {"gae_lambda": lam, "max_rho": max_rho, "max_c": max_c}
    found: Array = F.vtrace(values=table, gamma=GAMMA, **bounds, **fields_of(task, values[-1])).T.numpy()
    return found


def retrace(task: str, q: Array, behind: Array, lam: float, max_c: float) -> Array:
    """y_t of every trajectory, (M, H), for a critic (H, S, A) and the value of each state behind the limit, (S,)."""
    oracle = enumeration(task)
    q_values = th.as_tensor(q[STEPS, oracle.state, oracle.action].T)
    expected_q_values = th.as_tensor((PI * q).sum(axis=2)[STEPS, oracle.state].T)
    arguments: dict[str, Any] = {"q_values": q_values, "expected_q_values": expected_q_values, "gamma": GAMMA}
    found: Array = F.retrace(**arguments, gae_lambda=lam, max_c=max_c, **fields_of(task, behind)).T.numpy()
    return found


def conditional_error(task: str, targets: Array, truth: Array) -> float:
    """The largest |E[target_t | s_t] - truth(t, s_t)|, or given s_t and a_t, over what the behavior policy meets.

    :param truth: (H, S) or (H, S, A)
    """
    oracle = enumeration(task)
    where = (oracle.state,) if truth.ndim == 2 else (oracle.state, oracle.action)
    errors: list[float] = []
    for t in STEPS:
        for cell in np.ndindex(truth.shape[1:]):
            here = oracle.mask[:, t] * np.all([x[:, t] == i for x, i in zip(where, cell, strict=True)], axis=0)
            weight = here * oracle.probability
            if weight.any():
                errors.append(abs(float(weight @ targets[:, t] / weight.sum() - truth[t][cell])))
    assert len(errors) == 6 * (1 if truth.ndim == 2 else MDP.n_actions)  # two of the three states at each time
    return max(errors)


def a_critic(task: str) -> Array:
    """A critic that knows nothing but what is behind the time limit, (H + 1, S)."""
    values = np.random.default_rng(0).normal(scale=3.0, size=(MDP.horizon + 1, MDP.n_states))
    values[-1] = TASKS[task].final_values(THETA, GAMMA)
    return values


# --- V-trace ---


@both_tasks
@pytest.mark.parametrize(("lam", "max_c"), [(1.0, 1.0), (1.0, 0.6), (0.7, 1.2), (0.0, 1.0), (1.0, math.inf)])
def test_the_target_policys_value_is_vtraces_fixed_point_without_a_bound(task: str, lam: float, max_c: float) -> None:
    values = TASKS[task].values(THETA, GAMMA)
    assert conditional_error(task, vtrace(task, values, lam, math.inf, max_c), values[:-1]) < 1e-12
    assert conditional_error(task, vtrace(task, values, lam, 1.0, max_c), values[:-1]) > 0.01


@both_tasks
@pytest.mark.parametrize("max_rho", [0.6, 1.0, 1.4])
def test_a_bound_makes_it_the_value_of_a_policy_between(task: str, max_rho: float) -> None:
    """Of min(max_rho mu, pi), normalized (Espeholt et al. 2018, eq. 3)."""
    odds = np.minimum(max_rho * MU, PI)
    between = np.concatenate([np.log(odds / odds.sum(axis=1, keepdims=True)).T.flatten(), np.zeros(MDP.n_actions)])
    assert MDP.policy(between)[0, 0] > PI[0, 0] + 0.005
    values = TASKS[task].values(between, GAMMA)
    assert conditional_error(task, vtrace(task, values, 1.0, max_rho, 0.8), values[:-1]) < 1e-12


@both_tasks
def test_without_bounds_vtrace_is_unbiased_for_any_critic(task: str) -> None:
    truth, critic = TASKS[task].values(THETA, GAMMA)[:-1], a_critic(task)
    assert conditional_error(task, vtrace(task, critic, 1.0, math.inf, math.inf), truth) < 1e-12
    for lam, max_rho, max_c in ((0.7, math.inf, math.inf), (1.0, 1.0, math.inf), (1.0, math.inf, 1.0)):
        assert conditional_error(task, vtrace(task, critic, lam, max_rho, max_c), truth) > 0.05


# --- Retrace ---


@both_tasks
@pytest.mark.parametrize(("lam", "max_c"), [(1.0, 1.0), (1.0, 0.6), (0.7, 1.2), (0.0, 1.0), (1.0, math.inf)])
def test_the_target_policys_q_is_retraces_fixed_point(task: str, lam: float, max_c: float) -> None:
    q, behind = TASKS[task].q_values(THETA, GAMMA), TASKS[task].final_values(THETA, GAMMA)
    assert conditional_error(task, retrace(task, q, behind, lam, max_c), q) < 1e-12
    # Of the behavior's own Q it is not.
    q = TASKS[task].q_values(BEHAVIOR, GAMMA)
    behind = TASKS[task].final_values(BEHAVIOR, GAMMA)
    assert conditional_error(task, retrace(task, q, behind, lam, max_c), q) > 0.01


@both_tasks
def test_without_a_bound_retrace_is_unbiased_for_any_critic(task: str) -> None:
    truth, behind = TASKS[task].q_values(THETA, GAMMA), TASKS[task].final_values(THETA, GAMMA)
    critic = np.random.default_rng(0).normal(scale=3.0, size=truth.shape)
    assert conditional_error(task, retrace(task, critic, behind, 1.0, math.inf), truth) < 1e-12
    for lam, max_c in ((0.7, math.inf), (1.0, 1.0)):
        assert conditional_error(task, retrace(task, critic, behind, lam, max_c), truth) > 0.05
