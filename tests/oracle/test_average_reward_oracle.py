"""The average-reward objective against linear algebra: an ergodic MDP, whose terminations lead to a reset with a cost.

Every piece of ``T`` steps is enumerated, so that the expectation of an estimator is a finite sum. What it should be
follows from the stationary distribution and the differential values, which are solutions of linear equations.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch as th
from numpy.typing import NDArray

from sb3_pg import functional as F  # noqa: N812
from sb3_pg.learner import Bootstrapped, Differential, LearnerState, VTrace
from sb3_pg.rollout import RolloutBatch

Array = NDArray[np.float64]
S, A, T = 3, 2, 3
COST = 1.7
RANDOM = np.random.default_rng(5)
INITIAL = np.array([0.7, 0.3, 0.0])
REWARD = RANDOM.normal(size=(S, A))
_ALL = RANDOM.dirichlet(np.ones(S + 1), size=(S, A))
MOVE, END = _ALL[:, :, :S], _ALL[:, :, S]
THETA, BEHAVIOR = RANDOM.normal(size=(2, S, A)) * 0.6
ANYTHING: Any = None


# --- the truth ---


def policy(theta: Array) -> Array:
    odds = np.exp(theta)
    found: Array = odds / odds.sum(axis=1, keepdims=True)
    return found


def chain(pi: Array) -> Array:
    """Transition matrix of the states, resets included."""
    found: Array = np.einsum("sa,saz->sz", pi, MOVE + END[:, :, None] * INITIAL)
    return found


def stationary(pi: Array) -> Array:
    equations = np.concatenate([chain(pi).T - np.eye(S), np.ones((1, S))])
    found: Array = np.linalg.lstsq(equations, np.array([0.0] * S + [1.0]), rcond=None)[0]
    return found


def average(pi: Array) -> float:
    return float(stationary(pi) @ (pi * (REWARD - COST * END)).sum(axis=1))


def differential_values(pi: Array) -> tuple[Array, Array]:
    """V with mean 0, (S,), and q, (S, A)."""
    mu, rewards = stationary(pi), REWARD - COST * END - average(pi)
    v = np.linalg.solve(np.eye(S) - chain(pi) + np.outer(np.ones(S), mu), (pi * rewards).sum(axis=1))
    return v, rewards + (MOVE + END[:, :, None] * INITIAL) @ v


def credited(pi: Array, states: Array, q: Array) -> Array:
    """Sum of d(s) sum of the gradient of pi(a|s) q(s, a), for logits theta, (S, A)."""
    found: Array = states[:, None] * pi * (q - (pi * q).sum(axis=1, keepdims=True))
    return found


def test_the_truth_is_the_gradient_of_the_average_reward() -> None:
    pi, step = policy(THETA), 1e-6
    by_differences = np.zeros((S, A))
    for s, a in itertools.product(range(S), range(A)):
        change = np.zeros((S, A))
        change[s, a] = step
        by_differences[s, a] = (average(policy(THETA + change)) - average(policy(THETA - change))) / (2 * step)
    assert np.allclose(credited(pi, stationary(pi), differential_values(pi)[1]), by_differences, atol=1e-9)


# --- the enumeration ---


@dataclass
class Pieces:
    """Every piece of T steps, one per column: its probability, and what the library sees of it."""

    probability: Array
    states: NDArray[np.int64]
    actions: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    following: NDArray[np.int64]  # the state after the last step, or after each truncated one

    def batch(self, values: Array, cut: int | None, columns: slice = slice(None)) -> RolloutBatch:
        states, actions = self.states[:, columns], self.actions[:, columns]
        terminated = self.terminated[:, columns]
        truncated = np.zeros_like(terminated)
        if cut is not None:
            truncated[cut] = ~terminated[cut]
        bootstrap = np.zeros(states.shape)
        known = truncated.copy()
        known[-1] = True
        bootstrap[known] = values[self.following[:, columns][known]]
        return RolloutBatch(
            observations=th.as_tensor(states),
            actions=th.as_tensor(actions),
            rewards=th.as_tensor(REWARD[states, actions]),
            terminated=th.as_tensor(terminated),
            truncated=th.as_tensor(truncated),
            timesteps=th.zeros(states.shape, dtype=th.long),
            values=th.as_tensor(values[states]),
            bootstrap=th.as_tensor(bootstrap),
        )


@cache
def pieces(acting: str = "pi", cut: int | None = None) -> Pieces:
    """Pieces that begin in the stationary distribution. A time limit cuts after step ``cut``, and a reset follows."""
    pi = policy(THETA if acting == "pi" else BEHAVIOR)
    found: list[Any] = []

    def extend(t: int, s: int, p: float, taken: tuple[Any, ...]) -> None:
        if t == T:
            found.append((p, *taken))
            return
        for a, (z, ends) in itertools.product(range(A), [(z, e) for e in (False, True) for z in range(S)]):
            chance = pi[s, a] * (END[s, a] * INITIAL[z] if ends else MOVE[s, a, z])
            if chance == 0:
                continue
            if t == cut and not ends:
                for begun in np.flatnonzero(INITIAL):
                    extend(t + 1, int(begun), p * chance * INITIAL[begun], (*taken, (s, a, ends, z)))
            else:
                extend(t + 1, z, p * chance, (*taken, (s, a, ends, z)))

    for s, p in enumerate(stationary(pi)):
        extend(0, s, float(p), ())
    steps = np.array([[list(map(int, step)) for step in piece[1:]] for piece in found]).transpose(1, 0, 2)
    states, actions, terminated, following = np.moveaxis(steps, 2, 0)
    return Pieces(np.array([piece[0] for piece in found]), states, actions, terminated.astype(bool), following)


def rows(acting: str, cut: int | None) -> list[Array]:
    """Distribution of the state in each row."""
    pi = policy(THETA if acting == "pi" else BEHAVIOR)
    found = [stationary(pi)]
    for t in range(T - 1):
        moved = found[-1] @ chain(pi)
        if t == cut:  # both ends of an episode lead to a reset
            moved = INITIAL * found[-1].sum()
        found.append(moved)
    return found


def places(batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
    """Index of each step's entry in a table over states and actions."""
    assert isinstance(batch.observations, th.Tensor)
    return batch.observations, batch.actions


def gradient(batch: RolloutBatch, credit: th.Tensor, probability: Array) -> Array:
    """Expectation of the gradient that the shipped loss has, for logits theta."""
    theta = th.tensor(THETA, requires_grad=True)
    log_prob = theta.log_softmax(1)[places(batch)]
    weighted = credit * th.as_tensor(probability) * len(probability)
    loss = F.policy_gradient_loss(log_prob.flatten(), weighted.flatten())
    (found,) = th.autograd.grad(-loss, theta)
    result: Array = found.numpy()
    return result


FORMS: dict[str, dict[str, Any]] = {
    "lambda 0": {"gae_lambda": 0.0},
    "lambda 0.6": {"gae_lambda": 0.6},
    "lambda 1": {"gae_lambda": 1.0},
    "td": {"advantage": "td"},
    "2-step": {"advantage": "n_step", "td_steps": 2},
    "monte_carlo": {"advantage": "monte_carlo"},
}


def test_the_enumeration_is_complete() -> None:
    for cut in (None, 1):
        found = pieces("pi", cut)
        assert math.isclose(found.probability.sum(), 1.0, rel_tol=1e-12)
        for t, expected in enumerate(rows("pi", cut)):
            visited = np.bincount(found.states[t], found.probability, minlength=S)
            assert np.allclose(visited, expected, atol=1e-12)


@pytest.mark.parametrize("cut", [None, 0, 1])
@pytest.mark.parametrize("shift", [0.0, 4.2])
@pytest.mark.parametrize("form", list(FORMS))
def test_gradient_is_exact(form: str, shift: float, cut: int | None) -> None:
    """With the true average and values, which are known up to a constant, every form is unbiased."""
    pi, found = policy(THETA), pieces("pi", cut)
    v, q = differential_values(pi)
    estimator = Differential(Bootstrapped(1.0, **FORMS[form]), average(pi), step_size=0.1, reset_cost=COST)
    batch = found.batch(v + shift, cut)
    _, advantages = estimator.estimate(batch, ANYTHING)
    expected = sum((credited(pi, states, q) for states in rows("pi", cut)), start=np.zeros((S, A))) / T
    assert np.allclose(gradient(batch, advantages, found.probability), expected, atol=1e-12)
    if cut is None:
        assert np.allclose(expected, credited(pi, stationary(pi), q), atol=1e-12)


@pytest.mark.parametrize("center", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("form", list(FORMS))
def test_true_values_are_the_critics_fixed_point(form: str, center: float) -> None:
    """E[y_t | s_t] = V(s_t), less a share of the batch's mean value."""
    pi, found = policy(THETA), pieces()
    v = differential_values(pi)[0] + 3.0
    estimator = Differential(Bootstrapped(1.0, **FORMS[form]), average(pi), 0.1, COST, center)
    batch = found.batch(v, None)
    returns, _ = estimator.estimate(batch, ANYTHING)
    mean = v[found.states].mean()
    for t, s in itertools.product(range(T), range(S)):
        here = found.probability * (found.states[t] == s)
        expected = v[s] - center * mean
        assert math.isclose((here @ returns[t].numpy()) / here.sum(), expected, abs_tol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_mean_of_the_batch_is_biased_by_the_predicted_amount(lam: float) -> None:
    """A batch of one piece: its mean reward is correlated with its own scores.

    The gradient loses E[score_t sum_j lambda^j mean_k r_k]. Scores are uncorrelated with rewards before t, and a reward
    at k >= t has the expectation P^(k - t - 1) r given s_t and a_t.
    """
    pi, found = policy(THETA), pieces()
    v, q = differential_values(pi)
    estimator = Differential(Bootstrapped(1.0, lam), reset_cost=COST)
    advantages = []
    for i in range(len(found.probability)):
        batch = found.batch(v, None, slice(i, i + 1))
        advantages.append(estimator.estimate(batch, ANYTHING)[1])
        assert batch.average_reward is not None
        rewards = REWARD[found.states[:, i], found.actions[:, i]] - COST * found.terminated[:, i]
        assert math.isclose(float(batch.average_reward), rewards.mean(), abs_tol=1e-12)
    total = gradient(found.batch(v, None), th.cat(advantages, dim=1), found.probability)
    mu, rewards, move = stationary(pi), REWARD - COST * END, MOVE + END[:, :, None] * INITIAL
    bias = np.zeros((S, A))
    for t in range(T):
        later, ahead = rewards.copy(), (pi * rewards).sum(axis=1)
        for _ in range(t + 1, T):
            later += move @ ahead
            ahead = chain(pi) @ ahead
        bias += credited(pi, mu, later) / T * sum(lam**j for j in range(T - t)) / T
    assert np.abs(bias).max() > 0.01
    assert np.allclose(total, credited(pi, mu, q) - bias, atol=1e-10)


@pytest.mark.parametrize("error", [0.0, -1.3])
def test_step_of_the_average_goes_to_the_truth(error: float) -> None:
    """With true values, E[delta] is r(pi) less the present estimate."""
    pi, found = policy(THETA), pieces("pi", 1)
    v = differential_values(pi)[0]
    expected = average(pi) + error
    estimator = Differential(Bootstrapped(1.0), expected, step_size=0.25, reset_cost=COST)
    moved = 0.0
    for i, p in enumerate(found.probability):
        batch, state = found.batch(v, 1, slice(i, i + 1)), LearnerState()
        estimator.estimate(batch, ANYTHING)
        estimator.remember(batch, state)
        assert state.average_reward is not None
        moved += p * state.average_reward
    assert math.isclose(moved, expected - 0.25 * error, abs_tol=1e-10)


@pytest.mark.parametrize("lam", [1.0, 0.6])
@pytest.mark.parametrize("cut", [None, 1])
def test_off_policy_gradient_is_exact(lam: float, cut: int | None) -> None:
    """V-trace without bounds, of steps that another policy has taken: states are those of that policy."""
    pi, found = policy(THETA), pieces("mu", cut)
    v, q = differential_values(pi)
    batch = found.batch(v, cut)
    ratio = pi / policy(BEHAVIOR)
    batch.log_ratio = th.as_tensor(np.log(ratio))[places(batch)]
    estimator = Differential(VTrace(1.0, lam, math.inf, math.inf), average(pi), step_size=0.1, reset_cost=COST)
    _, advantages = estimator.estimate(batch, ANYTHING)
    weights = estimator.weights(batch)
    assert weights is not None
    expected = sum((credited(pi, states, q) for states in rows("mu", cut)), start=np.zeros((S, A))) / T
    assert np.allclose(gradient(batch, weights * advantages, found.probability), expected, atol=1e-10)
    assert not np.allclose(gradient(batch, advantages, found.probability), expected, atol=1e-3)


def test_mean_of_the_batch_counts_importance_weights() -> None:
    """The average is that of the policy that is trained, in the states of the one that acted."""
    pi, found = policy(THETA), pieces("mu")
    batch = found.batch(np.zeros(S), None)
    batch.log_ratio = th.as_tensor(np.log(pi / policy(BEHAVIOR)))[places(batch)]
    Differential(VTrace(1.0, 1.0, math.inf, math.inf), reset_cost=COST).estimate(batch, ANYTHING)
    assert batch.average_reward is not None
    ratio = np.exp(batch.log_ratio.numpy())
    rewards = REWARD[found.states, found.actions] - COST * found.terminated
    assert math.isclose(float(batch.average_reward), (ratio * rewards).sum() / ratio.sum(), rel_tol=1e-10)
