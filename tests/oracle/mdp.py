"""A tabular MDP small enough to enumerate, in NumPy float64: the expectation of any estimator is a finite sum.

Nothing of ``sb3_pg`` is imported here: returns, baselines and estimators are written down a second time, so that
agreement with the library says something.

Shapes: S states, A actions, H the time limit, P = A * S + A policy parameters, M distinct trajectories,
B batches of N episodes each. theta is the flat vector (W, bias) of the logits W[a, s] + bias[a], W row by row, which
is the layout of a linear layer on the one-hot state.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    states: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    terminated: bool  # False: cut by the time limit
    dynamics: float  # product of the environment's own probabilities: p(s_0) and p(s_{t+1} | s_t, a_t)
    last_state: int = 0  # the state that follows the cut, where the task goes on behind it


@dataclass(frozen=True)
class TabularMDP:
    """MDP with a time limit. ``transition[s, a]`` has S + 1 entries, the last is the probability of termination.

    ``continues``: the task goes on behind the time limit, which only ends what is seen of it, and the state reached has
    the value of the endless task. Otherwise the time limit ends the task, and nothing is worth anything behind it.
    """

    initial: Array
    transition: Array
    reward: Array
    horizon: int
    continues: bool = False

    @property
    def n_states(self) -> int:
        return int(self.reward.shape[0])

    @property
    def n_actions(self) -> int:
        return int(self.reward.shape[1])

    @property
    def n_parameters(self) -> int:
        return self.n_actions * (self.n_states + 1)

    def trajectories(self) -> list[Trajectory]:
        """Every trajectory that has positive probability under a policy that gives each action some."""
        found: list[Trajectory] = []

        def extend(states: tuple[int, ...], actions: tuple[int, ...], rewards: tuple[float, ...], p: float) -> None:
            s = states[-1]
            for a in range(self.n_actions):
                taken, earned = (*actions, a), (*rewards, float(self.reward[s, a]))
                p_end = float(self.transition[s, a, -1])
                if p_end > 0:
                    found.append(Trajectory(states, taken, earned, True, p * p_end))
                following = self.transition[s, a, :-1]
                if len(states) < self.horizon:
                    for s_next in np.flatnonzero(following):
                        extend((*states, int(s_next)), taken, earned, p * float(following[s_next]))
                elif self.continues:
                    cut = Trajectory(states, taken, earned, False, p)
                    found.extend(
                        replace(cut, dynamics=p * float(following[z]), last_state=int(z))
                        for z in np.flatnonzero(following)
                    )
                elif p_end < 1:
                    found.append(Trajectory(states, taken, earned, False, p * (1 - p_end)))

        for s in np.flatnonzero(self.initial):
            extend((int(s),), (), (), float(self.initial[s]))
        return found

    def policy(self, theta: Array) -> Array:
        """pi(a | s), shape (S, A)."""
        n = self.n_actions * self.n_states
        logits = (theta[:n].reshape(self.n_actions, self.n_states) + theta[n:, None]).T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        pi: Array = odds / odds.sum(axis=1, keepdims=True)
        return pi

    def scores(self, theta: Array) -> Array:
        """grad_theta log pi(a | s), shape (S, A, P): d log pi(a|s) / d logit[b] = 1[a = b] - pi(b|s)."""
        d_logits = np.eye(self.n_actions)[None] - self.policy(theta)[:, None, :]  # (S, A, A)
        d_weight = np.einsum("sab,sz->sabz", d_logits, np.eye(self.n_states))  # only the column of s moves
        return np.concatenate([d_weight.reshape(*self.reward.shape, -1), d_logits], axis=2)

    def final_values(self, theta: Array, gamma: float) -> Array:
        """V(H, s) behind the time limit, (S,): v = r + gamma P v of the endless task, or 0."""
        if not self.continues:
            return np.zeros(self.n_states)
        pi = self.policy(theta)
        move = np.einsum("sa,saz->sz", pi, self.transition[:, :, :-1])
        v: Array = np.linalg.solve(np.eye(self.n_states) - gamma * move, (pi * self.reward).sum(axis=1))
        return v

    def q_values(self, theta: Array, gamma: float) -> Array:
        """Q(t, s, a) by backward induction, shape (H, S, A); where the time limit ends the task, it depends on t."""
        pi, v, q = self.policy(theta), self.final_values(theta, gamma), np.zeros((self.horizon, *self.reward.shape))
        for t in reversed(range(self.horizon)):
            q[t] = self.reward + gamma * self.transition[:, :, :-1] @ v
            v = (pi * q[t]).sum(axis=1)
        return q

    def values(self, theta: Array, gamma: float) -> Array:
        """V(t, s), shape (H + 1, S); the last row is what the state behind the time limit is worth."""
        within = (self.policy(theta) * self.q_values(theta, gamma)).sum(axis=2)
        return np.concatenate([within, self.final_values(theta, gamma)[None]])

    def n_step_q(self, theta: Array, gamma: float, values: Array, n: int) -> Array:
        """E[n rewards and the value behind them | s_t = s, a_t = a] for any critic, shape (H, S, A).

        Q^1(t) = r + gamma P V(t+1), Q^n(t) = r + gamma P E_pi[Q^{n-1}(t+1)], and Q^n = Q^1 in the last step.

        :param values: what the critic says of the state at each time, (H + 1, S)
        """
        pi, move = self.policy(theta), self.transition[:, :, :-1]
        q = np.stack([self.reward + gamma * move @ values[t + 1] for t in range(self.horizon)])
        for _ in range(n - 1):
            later = (pi * q).sum(axis=2)
            q = np.stack([*(self.reward + gamma * move @ later[t + 1] for t in range(self.horizon - 1)), q[-1]])
        return q

    def lambda_q(self, theta: Array, gamma: float, values: Array, lam: float) -> Array:
        """E[lambda-return | s_t = s, a_t = a] for any critic, shape (H, S, A), by backward induction.

        :param values: what the critic says of the state at each time, (H + 1, S)
        """
        pi, q = self.policy(theta), np.zeros((self.horizon, *self.reward.shape))
        later = values[-1]
        for t in reversed(range(self.horizon)):
            mixed = (1 - lam) * values[t + 1] + lam * later
            q[t] = self.reward + gamma * self.transition[:, :, :-1] @ mixed
            later = (pi * q[t]).sum(axis=1)
        return q

    def occupancy(self, theta: Array) -> Array:
        """P(s_t = s, episode still running), by forward induction, shape (H, S)."""
        move = np.einsum("sa,saz->sz", self.policy(theta), self.transition[:, :, :-1])
        return np.stack([self.initial @ np.linalg.matrix_power(move, t) for t in range(self.horizon)])

    def objective(self, theta: Array, gamma: float) -> float:
        """J_gamma = E[sum_t gamma^t r_t]."""
        return float(self.initial @ self.values(theta, gamma)[0])

    def policy_gradient(self, theta: Array, gamma: float, state_discount: bool) -> Array:
        """sum_t w_t E[score_t Q_gamma(s_t, a_t)]; with ``state_discount`` w_t = gamma^t, and it is grad J_gamma."""
        return self.credited_gradient(theta, self.q_values(theta, gamma), gamma if state_discount else 1.0)

    def credited_gradient(
        self, theta: Array, credit: Array, state_discount: float, occupancy: Array | None = None
    ) -> Array:
        """sum_t w_t E[score_t credit(t, s_t, a_t)] with w_t = state_discount^t, a sum over times, states and actions.

        :param credit: what an action is credited with, (H, S, A)
        :param occupancy: how often a state is met at each time, (H, S); that of theta if None
        """
        weight = state_discount ** np.arange(self.horizon)
        occupancy = self.occupancy(theta) if occupancy is None else occupancy
        pi, score = self.policy(theta), self.scores(theta)
        gradient: Array = np.einsum("t,ts,sa,tsa,sap->p", weight, occupancy, pi, credit, score)
        return gradient

    def finite_difference_gradient(self, theta: Array, gamma: float, step: float = 1e-5) -> Array:
        """grad J_gamma by central differences; error about step^2 + 1e-16 / step, so 1e-10."""
        steps = step * np.eye(theta.size)
        rise = [self.objective(theta + d, gamma) - self.objective(theta - d, gamma) for d in steps]
        return np.array(rise) / (2 * step)


class Enumeration:
    """All trajectories of an MDP under one policy, and every estimator of the gradient on every batch of them.

    Arrays over trajectories and steps are zero past the end of an episode. ``returns``, ``gamma`` and
    ``state_discount`` mean what they mean in the library; G is (M, H), U = w_t score_t is (M, H, P). ``behavior`` are
    the parameters of the policy that acts, where it is not the one whose scores these are.
    """

    def __init__(
        self,
        mdp: TabularMDP,
        theta: Array,
        returns: str,
        gamma: float,
        state_discount: bool,
        behavior: Array | None = None,
    ) -> None:
        self.trajectories = mdp.trajectories()
        self.total = returns == "total"
        shape = (len(self.trajectories), mdp.horizon)
        acting, score = mdp.policy(theta if behavior is None else behavior), mdp.scores(theta)
        self.gamma = gamma
        self.mask, self.state = np.zeros(shape), np.zeros(shape, dtype=np.int64)
        self.action, self.reward = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        self.probability = np.array([tau.dynamics for tau in self.trajectories])
        self.G, self.U = np.zeros(shape), np.zeros((*shape, mdp.n_parameters))
        for i, tau in enumerate(self.trajectories):
            length = len(tau.rewards)
            self.mask[i, :length] = 1
            self.state[i, :length] = tau.states
            self.action[i, :length] = tau.actions
            self.reward[i, :length] = tau.rewards
            for t, (s, a) in enumerate(zip(tau.states, tau.actions, strict=True)):
                first = 0 if self.total else t
                self.probability[i] *= acting[s, a]
                self.G[i, t] = sum(gamma ** (k - first) * tau.rewards[k] for k in range(first, length))
                self.U[i, t] = (gamma**t if state_discount else 1.0) * score[s, a]
        self.X = np.einsum("itp,it->ip", self.U, self.G)  # the estimate of one episode, without a baseline
        self.Y = self.U.sum(axis=1)  # what one unit of a constant baseline takes away from it; E[Y] = 0

    def mean(self, x: Array) -> Array:
        """E over one episode of a quantity with the trajectories first."""
        return np.tensordot(self.probability, x, axes=1)

    def batches(self, n: int) -> tuple[NDArray[np.int64], Array]:
        """Every multiset of n trajectories, (B, n), and its probability, (B,): n! prod_k p_k^m_k / m_k!.

        Episodes are independent and exchangeable, so the sum over ordered n-tuples needs each multiset only once.
        """
        multisets = list(itertools.combinations_with_replacement(range(len(self.trajectories)), n))
        orders = [math.factorial(n) / math.prod(map(math.factorial, Counter(m).values())) for m in multisets]
        index = np.array(multisets)
        return index, np.array(orders) * self.probability[index].prod(axis=1)

    def baseline(self, name: str, index: NDArray[np.int64]) -> Array:
        """What ``name`` subtracts in each batch, broadcastable to (B, N, H, P)."""
        b: Array
        if name == "none":
            return np.zeros((1, 1, 1, 1))
        if name in ("optimal", "optimal_component_wise"):
            x, y = self.X[index], self.Y[index]  # (B, N, P)
            over = 1 if name == "optimal_component_wise" else (1, 2)
            xy, yy = (x * y).sum(over, keepdims=True), (y * y).sum(over, keepdims=True)
            b = np.divide(xy, yy, out=np.zeros_like(xy), where=yy > 0)[:, :, None]
            return b
        counted = self.mask[index]  # (B, N, H)
        if name == "time":
            reached = np.maximum(counted.sum(1), 1)
            b = ((counted * self.G[index]).sum(1) / reached)[:, None, :, None]
            return b
        # The other two average G over steps. An episode's total return is one number, counted once: at its first step.
        if self.total:
            counted = counted * (np.arange(counted.shape[2]) == 0)
        gained = counted * self.G[index]
        if name == "mean":
            b = (gained.sum((1, 2)) / counted.sum((1, 2)))[:, None, None, None]
            return b
        if name == "leave_one_out":
            others = 1 - np.eye(index.shape[1])
            b = (gained.sum(2) @ others / (counted.sum(2) @ others))[:, :, None, None]
            return b
        raise ValueError(name)

    def estimates(self, baseline: str | Array, index: NDArray[np.int64]) -> Array:
        """(1/N) sum_i sum_t w_t score_{i,t} (G_{i,t} - b) of every batch, (B, P).

        :param baseline: its name, or b(tau, t) itself, (M, H)
        """
        b = self.baseline(baseline, index) if isinstance(baseline, str) else baseline[index][..., None]
        return self.credited(self.G[index][..., None] - b, index)

    def credited(self, advantages: Array, index: NDArray[np.int64]) -> Array:
        """(1/N) sum_i sum_t w_t score_{i,t} A_{i,t} of every batch, (B, P).

        :param advantages: broadcastable to (B, N, H, P)
        """
        found: Array = (self.U[index] * advantages).sum(axis=2).mean(axis=1)
        return found

    def n_step_returns(self, values: Array, n: int) -> Array:
        """n rewards, then the critic's value; fewer where the episode ends before, (M, H).

        :param values: what the critic says of the state at each time, (H + 1, S)
        """
        found = np.zeros_like(self.G)
        for i, tau in enumerate(self.trajectories):
            length = len(tau.rewards)
            worth = [values[t, s] for t, s in enumerate(tau.states)]
            worth.append(0.0 if tau.terminated else values[length, tau.last_state])
            for t in range(length):
                stop = min(t + n, length)
                rewards = sum(self.gamma ** (k - t) * tau.rewards[k] for k in range(t, stop))
                found[i, t] = rewards + self.gamma ** (stop - t) * worth[stop]
        return found

    def lambda_returns(self, values: Array, lam: float) -> Array:
        """(1 - lambda) sum_n lambda^(n-1) G^(n), and what is left of the weight on the longest of them, (M, H).

        :param values: what the critic says of the state at each time, (H + 1, S)
        """
        left = self.mask[:, ::-1].cumsum(axis=1)[:, ::-1]  # steps to the end of the episode, this one included
        found = np.zeros_like(self.G)
        for n in range(1, self.mask.shape[1] + 1):
            weight = np.where(n < left, (1 - lam) * lam ** (n - 1), np.where(n == left, lam ** (n - 1), 0.0))
            found += weight * self.n_step_returns(values, n)
        return found

    def optimal_constant(self) -> float:
        """b* = E[X.Y] / E[Y.Y]: the constant that minimizes the total variance of X - b Y."""
        return float(self.mean((self.X * self.Y).sum(1)) / self.mean((self.Y * self.Y).sum(1)))


def total_variance(estimates: Array, probability: Array) -> float:
    """Trace of the covariance of the estimates, (B, P), each with its probability."""
    mean = probability @ estimates
    return float(probability @ ((estimates - mean) ** 2).sum(axis=1))


class Spaces(gym.Env[np.int64, np.int64]):
    """An environment of which only the spaces matter: the trajectories are given."""

    def __init__(self, n_states: int, n_actions: int) -> None:
        self.observation_space = gym.spaces.Discrete(n_states)
        self.action_space = gym.spaces.Discrete(n_actions)


def graph_mdp(continues: bool = False) -> tuple[TabularMDP, Array]:
    """The MDP and policy of the tests: 11 trajectories of 1 to 3 steps, states revisited, and a time limit that cuts.

    Action 0 ends the episode. Action 1 leads from state 0 to 1 or 2 (by chance), from 1 to itself, from 2 to 0. There
    are 12 trajectories where the state behind the time limit matters.
    """
    transition = np.zeros((3, 2, 4))
    transition[:, 0, 3] = 1.0
    transition[0, 1, [1, 2]] = 0.6, 0.4
    transition[1, 1, 1] = 1.0
    transition[2, 1, 0] = 1.0
    mdp = TabularMDP(
        initial=np.array([0.7, 0.3, 0.0]),
        transition=transition,
        reward=np.array([[1.3, 0.7], [2.1, 0.4], [-0.6, 1.7]]),
        horizon=3,
        continues=continues,
    )
    #           W[0, s]           W[1, s]           bias
    theta = [-0.3, 0.5, -0.5, 0.4, -0.4, 0.3, -0.2, 0.1]
    return mdp, np.array(theta)


def chain_mdp() -> tuple[TabularMDP, Array]:
    """Three steps, always; reward 1 in the first, whatever the action, and a uniform policy."""
    transition = np.zeros((3, 2, 4))
    for s in range(3):
        transition[s, :, s + 1] = 1.0
    mdp = TabularMDP(
        initial=np.array([1.0, 0.0, 0.0]),
        transition=transition,
        reward=np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
        horizon=3,
    )
    return mdp, np.zeros(mdp.n_parameters)
