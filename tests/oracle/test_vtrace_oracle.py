"""V-trace against the enumeration of a tabular MDP in which an older policy acts: its limit, and its gradient.

The gradient goes through the learner. Its expectation is a backward induction over times and states.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_pg import functional as F  # noqa: N812
from sb3_pg.learner import GradientStep, Learner, VTrace
from sb3_pg.rollout import RolloutBatch, score_batch
from tests.oracle.harness import ATOL, BEHAVIOR, MDP, THETA, ObedientPolicy, columns_of, set_parameters
from tests.oracle.mdp import Array, Enumeration, TabularMDP, Trajectory, graph_mdp

GAMMA = 0.9
TASKS: dict[str, TabularMDP] = {"ends": MDP, "continues": graph_mdp(continues=True)[0]}
PI, MU = MDP.policy(THETA), MDP.policy(BEHAVIOR)
RATIO = PI / MU

both_tasks = pytest.mark.parametrize("task", list(TASKS))

# --- the critic: iteration of the expected operator, in the endless task, from every state ---

ENDLESS = replace(TASKS["continues"], initial=np.full(MDP.n_states, 1 / MDP.n_states))


@cache
def enumeration() -> tuple[Enumeration, dict[str, th.Tensor], th.Tensor, Array]:
    oracle = Enumeration(ENDLESS, THETA, "reward_to_go", GAMMA, False, behavior=BEHAVIOR)
    fields = columns_of(oracle, PI, MU)
    log_ratio = F.log_importance_ratio(fields["log_prob"], fields["behavior_log_prob"], fields["mask"])
    begins = oracle.probability * (oracle.state[:, 0] == np.arange(MDP.n_states)[:, None])  # (S, M)
    return oracle, fields, log_ratio, begins / begins.sum(axis=1, keepdims=True)


def operator(v: Array, lam: float, max_rho: float, max_c: float) -> Array:
    """E_mu[v_0 | s_0 = s] of the pieces of three steps that begin in s, (S,)."""
    oracle, fields, log_ratio, begins = enumeration()
    cut = th.tensor(
        [0.0 if tau.terminated else float(v[tau.last_state]) for tau in oracle.trajectories], dtype=th.float64
    )
    targets = F.vtrace(
        fields["rewards"],
        th.as_tensor(v[oracle.state.T]),
        log_ratio,
        fields["ends"],
        GAMMA,
        lam,
        max_rho,
        max_c,
        th.where(fields["ends"], cut, 0.0),
        fields["mask"],
    )
    found: Array = begins @ targets[0].numpy()
    return found


def between(max_rho: float) -> Array:
    """pi_rho: min(max_rho mu, pi), normalized (eq. 3), (S, A)."""
    odds = np.minimum(max_rho * MU, PI)
    found: Array = odds / odds.sum(axis=1, keepdims=True)
    return found


def value_of(policy: Array) -> Array:
    """V = r + gamma P V of a policy, by linear algebra, (S,)."""
    move = np.einsum("sa,saz->sz", policy, ENDLESS.transition[:, :, :-1])
    found: Array = np.linalg.solve(np.eye(MDP.n_states) - GAMMA * move, (policy * ENDLESS.reward).sum(axis=1))
    return found


@pytest.mark.parametrize("max_rho", [0.6, 1.0, 1.2, math.inf])
@pytest.mark.parametrize(("lam", "share"), [(1.0, 1.0), (1.0, 0.5), (0.7, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("start", [0, 1])
def test_iteration_converges_to_the_value_of_the_policy_between(
    max_rho: float, lam: float, share: float, start: int
) -> None:
    """Theorem 1: a contraction by at least 1 - (1 - gamma) min_s E_mu[rho | s], for c_bar = share * rho_bar."""
    truth = value_of(between(max_rho))
    rate = 1 - (1 - GAMMA) * (MU * np.minimum(max_rho, RATIO)).sum(axis=1).min()
    v = np.random.default_rng(start).normal(scale=10.0, size=MDP.n_states)
    error = np.abs(v - truth).max()
    for _ in range(300):
        v, before = operator(v, lam, max_rho, share * max_rho), error
        error = np.abs(v - truth).max()
        assert error <= rate * before + 1e-13
    assert error < 1e-11


def test_the_policies_between_differ() -> None:
    """An infinite bound gives the target's value, a bound near zero the behavior's."""
    assert np.allclose(value_of(between(math.inf)), value_of(PI), atol=1e-14)
    assert np.allclose(value_of(between(1e-9)), value_of(MU), atol=1e-14)
    found = [value_of(between(bound)) for bound in (1e-9, 0.6, 1.0, 1.2, math.inf)]
    assert all(np.abs(x - y).max() > 0.01 for i, x in enumerate(found) for y in found[:i])


# --- the actor ---


class Form(NamedTuple):
    trace_lambda: float = 1.0
    max_ratio: float = 1.0
    max_trace: float = 1.0
    correction: Any = "vtrace"
    state_discount: bool = False


FORMS = [
    Form(),
    Form(0.7, 1.2, 0.8),
    Form(0.0, math.inf),
    Form(1.0, math.inf, 1.0, state_discount=True),
    Form(1.0, math.inf, math.inf),
    Form(correction="none"),
    Form(0.7, 0.5, 0.5, "none", state_discount=True),
]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
#: After how many steps of an episode a piece of it ends.
PIECES = [3, 2, 1]


def expected(task: str, form: Form, critic: Array, length: int) -> Array:
    """E_mu[sum_t w_t rho_t score_t (r_t + gamma v_{t+1} - V(s_t))], by backward induction.

    :param critic: what the critic says of the state at each time, (H + 1, S)
    :param length: steps of a piece; behind its end the value is the critic's
    """
    mdp = TASKS[task]
    move, advantage, value = mdp.transition[:, :, :-1], np.zeros((mdp.horizon, *MU.shape)), critic.copy()
    ones = form.correction == "none"
    rho = np.ones_like(MU) if ones else np.minimum(RATIO, form.max_ratio)
    c = form.trace_lambda * (np.ones_like(MU) if ones else np.minimum(RATIO, form.max_trace))
    for t in reversed(range(mdp.horizon)):
        later = critic[t + 1] if (t + 1) % length == 0 else value[t + 1]  # E[v_{t+1} | s_{t+1}]
        delta = mdp.reward + GAMMA * move @ critic[t + 1] - critic[t][:, None]
        correction = rho * delta + GAMMA * c * (move @ (later - critic[t + 1]))
        value[t] = critic[t] + (MU * correction).sum(axis=1)
        advantage[t] = rho * (mdp.reward + GAMMA * move @ later - critic[t][:, None])
    # credited_gradient weights actions with pi.
    discount = GAMMA if form.state_discount else 1.0
    return mdp.credited_gradient(THETA, advantage / RATIO, discount, mdp.occupancy(BEHAVIOR))


def a_critic(task: str) -> Array:
    """A critic that knows nothing but that the end of a task is worth nothing, (H + 1, S)."""
    critic = np.random.default_rng(0).normal(scale=3.0, size=(MDP.horizon + 1, MDP.n_states))
    critic[-1] *= task == "continues"
    return critic


def learner_of(form: Form, critic: Array) -> Learner:
    """A learner whose steps have no length: they leave the gradient."""
    shape = (MDP.horizon + 1, MDP.n_states)
    policy = ObedientPolicy(
        spaces.Discrete(math.prod(shape)),
        spaces.Discrete(MDP.n_actions),
        lambda _: 0.0,
        net_arch=[],
        shape=shape,
        optimizer_class=th.optim.SGD,
    )
    set_parameters(SimpleNamespace(policy=policy), THETA, critic)
    return Learner(policy, VTrace(GAMMA, **form._asdict()), GradientStep(max_grad_norm=None))


def batch_of(learner: Learner, tau: Trajectory, length: int) -> RolloutBatch:
    """One episode, in pieces: each in a column of its own, padded with what must not matter."""
    n, estimator = len(tau.rewards), learner.estimator
    assert isinstance(estimator, VTrace)
    pieces = [slice(i, min(i + length, n)) for i in range(0, n, length)]

    def columns(numbers: Any, garbage: Any) -> th.Tensor:
        numbers, shape = th.as_tensor(numbers), (length, len(pieces))
        found = th.full(shape, garbage, dtype=numbers.dtype)
        for column, piece in enumerate(pieces):
            found[: piece.stop - piece.start, column] = numbers[piece]
        return found

    is_last = np.arange(n) == n - 1
    times, states = np.arange(n), np.array(tau.states)
    batch = RolloutBatch(
        observations=columns(times * MDP.n_states + states, 0),
        actions=columns(np.array(tau.actions), 1),
        rewards=columns(np.array(tau.rewards), 1e3),
        terminated=columns(is_last & tau.terminated, True),
        truncated=columns(is_last & (not tau.terminated), False),
        timesteps=columns(times, 9),
        mask=columns(np.ones(n, bool), False),
        log_probs=columns(np.log(MU[states, np.array(tau.actions)]), math.nan),
        n_episodes=1,
    )
    follows = [*states[1:], tau.last_state]
    cut = [(i, piece) for i, piece in enumerate(pieces) if piece.stop < n or not tau.terminated]
    if cut:
        behind = th.tensor([piece.stop * MDP.n_states + follows[piece.stop - 1] for _, piece in cut])
        places = th.tensor([(piece.stop - piece.start - 1) * len(pieces) + i for i, piece in cut])
        batch.bootstrap_observations = behind, places
    estimator.weigh(batch, score_batch(learner.policy, batch, with_values=True))
    return batch


def trained(task: str, form: Form, critic: Array, length: int = MDP.horizon) -> Array:
    """The expectation of the gradient that the actor ascends, over all episodes of the behavior."""
    oracle = Enumeration(TASKS[task], THETA, "reward_to_go", GAMMA, False, behavior=BEHAVIOR)
    learner, found = learner_of(form, critic), np.zeros(MDP.n_parameters)
    actor: Any = learner.policy.action_net
    for tau, probability in zip(oracle.trajectories, oracle.probability, strict=True):
        learner.update(batch_of(learner, tau, length), "nothing")
        found -= probability * th.cat([actor.weight.grad.flatten(), actor.bias.grad]).double().numpy()
    return found


@both_tasks
@each_form
@pytest.mark.parametrize("length", PIECES)
def test_the_expected_gradient_is_that_of_the_induction(task: str, form: Form, length: int) -> None:
    critic = a_critic(task)
    assert np.abs(trained(task, form, critic, length) - expected(task, form, critic, length)).max() < ATOL


def test_the_forms_and_the_pieces_differ() -> None:
    found = [expected("continues", form, a_critic("continues"), length) for form in FORMS for length in PIECES]
    found = [x for i, x in enumerate(found) if FORMS[i // 3].trace_lambda > 0 or i % 3 == 0]
    assert min(np.abs(x - y).max() for i, x in enumerate(found) for y in found[:i]) > 1e-3


def per_step(task: str, state_discount: bool = False) -> Array:
    """E_mu[sum_t w_t rho_t score_t Q_pi(t, s_t, a_t)]: the behavior's states, the policy's own actions and values."""
    mdp = TASKS[task]
    discount = GAMMA if state_discount else 1.0
    return mdp.credited_gradient(THETA, mdp.q_values(THETA, GAMMA), discount, mdp.occupancy(BEHAVIOR))


@both_tasks
@each_form
def test_without_a_bound_and_with_the_true_values_it_is_the_per_step_gradient(task: str, form: Form) -> None:
    """Whatever the traces; with a bound, or without a correction, it is not."""
    error = np.abs(trained(task, form, TASKS[task].values(THETA, GAMMA)) - per_step(task, form.state_discount)).max()
    assert error < ATOL if form.max_ratio == math.inf else error > 1e-2


@both_tasks
def test_without_bounds_any_critic_will_do(task: str) -> None:
    critic = a_critic(task)
    critic[-1] = TASKS[task].final_values(THETA, GAMMA)
    assert np.abs(trained(task, Form(1.0, math.inf, math.inf), critic) - per_step(task)).max() < ATOL
    assert np.abs(trained(task, Form(1.0, math.inf, 1.0), critic) - per_step(task)).max() > 1e-2


@both_tasks
def test_without_a_correction_it_is_the_behaviors_reward_under_the_policys_score(task: str) -> None:
    """A3C as printed: of its own actions' probabilities it takes no notice."""
    mdp, critic = TASKS[task], a_critic(task)
    critic[-1] = mdp.final_values(BEHAVIOR, GAMMA)
    credit = mdp.q_values(BEHAVIOR, GAMMA) - critic[:-1, :, None]
    found = mdp.credited_gradient(THETA, credit / RATIO, 1.0, mdp.occupancy(BEHAVIOR))
    assert np.abs(trained(task, Form(correction="none"), critic) - found).max() < ATOL
