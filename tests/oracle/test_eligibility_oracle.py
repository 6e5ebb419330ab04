"""TD(lambda): what the traces add up to over whole episodes, with constant parameters, is the forward view.

The forward view is the enumeration's: lambda-returns as mixtures of n-step returns, in NumPy. The model goes through
``learn``, one update per env step, with an optimizer that adds up gradients and moves nothing.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch as th

from sb3_pg import ActorCritic
from tests.oracle.harness import ATOL, CRITIC, MDP, THETA, Column, parameters, playing_model
from tests.oracle.mdp import Array, Enumeration, TabularMDP, graph_mdp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TASKS: dict[str, TabularMDP] = {"ends": MDP, "continues": graph_mdp(continues=True)[0]}
GAMMA = 0.9
VF_COEF = 0.75
#: V(t, s) of a critic that is wrong everywhere, also behind the time limit.
VALUES = CRITIC + 0.3 * np.arange(MDP.horizon + 1)[:, None]

both_tasks = pytest.mark.parametrize("task", list(TASKS))
all_lambdas = pytest.mark.parametrize("lam", [0.0, 0.3, 0.9, 1.0])
both_discounts = pytest.mark.parametrize("state_discount", [False, True])


class Sums(th.optim.Optimizer):
    """Adds up what it is to descend, and moves nothing."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.sums: dict[th.Tensor, th.Tensor] = {}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.sums[p] = self.sums.get(p, th.zeros_like(p)) - p.grad


def make_model(task: str, lam: float, n_envs: int, **arguments: Any) -> ActorCritic:
    own = "critic_learning_rate" in arguments
    chosen = {
        "n_steps": 1,
        "advantage": "td_lambda",
        "gae_lambda": lam,
        "gamma": GAMMA,
        **({} if own else {"vf_coef": VF_COEF}),
        "max_grad_norm": None,
        "policy_kwargs": {"optimizer_class": Sums},
        "truncation": "bootstrap" if task == "continues" else "terminal",
    }
    return playing_model(ActorCritic, TASKS[task], THETA, n_envs, VALUES, **{**chosen, **arguments})


def sums(model: ActorCritic, columns: Sequence[Column], own: bool = False) -> tuple[Array, Array]:
    """What all steps of these episodes add up to: for theta, and for V(t, s). Columns are equally long.

    :param own: whether the critic has an optimizer of its own
    """
    env: Any = model.get_env()
    optimizer: Any = model.policy.optimizer
    of_critic: Any = model.critic_optimizer if own else optimizer
    optimizer.sums, of_critic.sums = {}, {}
    env.play(columns)
    before, length = parameters(model), sum(len(episode.rewards) for episode in columns[0])
    model.learn(length * len(columns), log_interval=None)
    assert np.array_equal(parameters(model), before)
    actor, critic = model.policy.action_net, model.policy.value_net
    theta = th.cat([optimizer.sums[actor.weight].flatten(), optimizer.sums[actor.bias]])
    assert th.allclose(of_critic.sums[critic.weight].sum(), of_critic.sums[critic.bias], atol=1e-5)
    return theta.double().numpy(), of_critic.sums[critic.weight].double().numpy().reshape(VALUES.shape)


@cache
def forward_view(task: str, lam: float, state_discount: bool) -> tuple[Array, Array]:
    """sum_t w_t (G_t^lambda - V) score_t and sum_t (G_t^lambda - V) grad V of every trajectory."""
    oracle = Enumeration(TASKS[task], THETA, "reward_to_go", GAMMA, state_discount)
    values = VALUES.copy()
    values[-1] *= task == "continues"
    steps = np.arange(MDP.horizon)
    errors = oracle.lambda_returns(values, lam) - oracle.mask * values[steps, oracle.state]
    of_theta = np.einsum("itp,it->ip", oracle.U, errors)
    of_values = np.zeros((len(errors), *VALUES.shape))
    for i, t in np.argwhere(oracle.mask):
        of_values[i, t, oracle.state[i, t]] += errors[i, t]
    return of_theta, of_values


@both_tasks
@both_discounts
@all_lambdas
def test_every_episode(lam: float, state_discount: bool, task: str) -> None:
    model = make_model(task, lam, 1, state_discount=state_discount)
    of_theta, of_values = forward_view(task, lam, state_discount)
    trajectories = TASKS[task].trajectories()
    assert any(tau.terminated for tau in trajectories)
    assert any(not tau.terminated for tau in trajectories)
    for tau, theta, values in zip(trajectories, of_theta, of_values, strict=True):
        found = sums(model, [[tau]])
        assert np.allclose(found[0], theta, atol=ATOL)
        assert np.allclose(found[1], 2 * VF_COEF * values, atol=ATOL)


@both_tasks
def test_lambda_matters(task: str) -> None:
    """By thousands of times what the tests of equality tolerate."""
    none, much = (forward_view(task, lam, False) for lam in (0.0, 0.9))
    longer = np.array([len(tau.rewards) > 1 for tau in TASKS[task].trajectories()])
    for a, b in zip(none, much, strict=True):
        differences = np.abs(a - b).reshape(len(a), -1).max(1)
        assert (differences[longer] > 0.05).all()
        assert (differences[~longer] < 1e-12).all()


@both_tasks
def test_episodes_one_after_the_other(task: str) -> None:
    """Both endings cut the traces."""
    of_theta, of_values = forward_view(task, 0.9, False)
    trajectories = TASKS[task].trajectories()
    numbers = [*range(len(trajectories)), *range(len(trajectories))[::-1]]
    found = sums(make_model(task, 0.9, 1), [[trajectories[i] for i in numbers]])
    assert np.allclose(found[0], 2 * of_theta.sum(0), atol=1e-4)
    assert np.allclose(found[1], 4 * VF_COEF * of_values.sum(0), atol=1e-4)


@both_tasks
def test_envs_have_traces_of_their_own(task: str) -> None:
    """Episodes of different lengths side by side: the mean over envs of what each gives alone."""
    of_theta, of_values = forward_view(task, 0.9, False)
    trajectories = TASKS[task].trajectories()
    numbers: dict[int, list[int]] = {n: [] for n in (1, 2, 3)}
    for i, tau in enumerate(trajectories):
        numbers[len(tau.rewards)].append(i)
    (one, other), two, three = numbers[1][:2], numbers[2][0], numbers[3]
    columns = [[one, two, three[0]], [three[1], other, two], [three[-1], three[-2]]]
    found = sums(make_model(task, 0.9, 3), [[trajectories[i] for i in column] for column in columns])
    assert np.allclose(found[0], sum(of_theta[i] for column in columns for i in column) / 3, atol=ATOL)
    of_all = sum(of_values[i] for column in columns for i in column) / 3
    assert np.allclose(found[1], 2 * VF_COEF * of_all, atol=ATOL)


def test_a_critic_with_an_optimizer_of_its_own() -> None:
    """Its steps are those of the mean squared error, without ``vf_coef``."""
    of_theta, of_values = forward_view("continues", 0.9, False)
    model = make_model("continues", 0.9, 1, critic_learning_rate=0.1)
    model.critic_optimizer = Sums(model.policy.value_net.parameters(), 0.1)
    for tau, theta, values in zip(TASKS["continues"].trajectories(), of_theta, of_values, strict=True):
        found = sums(model, [[tau]], own=True)
        assert np.allclose(found[0], theta, atol=ATOL)
        assert np.allclose(found[1], 2 * values, atol=ATOL)


def test_a_critic_that_warms_up() -> None:
    """It has its traces, and the actor stays."""
    _, of_values = forward_view("continues", 0.9, False)
    for own in ({}, {"critic_learning_rate": 0.1}):
        model = make_model("continues", 0.9, 1, critic_warmup_updates=10**6, **own)
        actor, critic = model.policy.action_net, model.policy.value_net
        if own:
            model.critic_optimizer = Sums(critic.parameters(), 0.1)
        optimizer: Any = model.critic_optimizer or model.policy.optimizer
        for tau, values in zip(TASKS["continues"].trajectories(), of_values, strict=True):
            optimizer.sums = {}
            env: Any = model.get_env()
            env.play([[tau]])
            model.learn(len(tau.rewards), log_interval=None)
            found = optimizer.sums[critic.weight].double().numpy().reshape(VALUES.shape)
            assert np.allclose(found, (2 if own else 2 * VF_COEF) * values, atol=ATOL)
            assert actor.weight not in optimizer.sums
