"""Critic targets and advantages of ActorCritic through real envs, against numbers that were computed by hand.

gamma = 1/2, lambda = 1/4, n = 2, rewards 1, 2, 3, ..., and V(s_0), V(s_1), ... = 10, 20, 40, 80.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_pg import ActorCritic
from tests.algorithms.clock import VALUES, ClockEnv, clock_model, update, values_of

KINDS = ["monte_carlo", "n_step", "td", "lambda"]
#: advantage -> the target that goes with it
DEFAULT = {"monte_carlo": "monte_carlo", "n_step": "n_step", "td": "td", "gae": "lambda"}
NUMBERS: dict[str, Any] = {"gamma": 0.5, "gae_lambda": 0.25, "td_steps": 2}

#: y_0, y_1, y_2 where the third step ends in a terminal state, worth nothing.
TERMINAL = {
    "monte_carlo": [1 + 3.5 / 2, 2 + 3 / 2, 3],
    "n_step": [1 + 2 / 2 + 40 / 4, 2 + 3 / 2, 3],
    "td": [1 + 20 / 2, 2 + 40 / 2, 3],
    "lambda": [1 + (0.75 * 20 + 0.25 * 17.375) / 2, 2 + (0.75 * 40 + 0.25 * 3) / 2, 3],
}
#: The same where the task goes on behind the third step, in a state worth 80.
GOES_ON = {
    "monte_carlo": [1 + 23.5 / 2, 2 + 43 / 2, 3 + 80 / 2],
    "n_step": [1 + 2 / 2 + 40 / 4, 2 + 3 / 2 + 80 / 4, 3 + 80 / 2],
    "td": [1 + 20 / 2, 2 + 40 / 2, 3 + 80 / 2],
    "lambda": [1 + (0.75 * 20 + 0.25 * 22.375) / 2, 2 + (0.75 * 40 + 0.25 * 43) / 2, 3 + 80 / 2],
}
SEGMENT, EPISODE = {"n_steps": 3}, {"n_steps": None, "n_episodes": 1}
#: how the three steps end -> env, arguments, targets
ENDINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]] = {
    "terminated": ({}, SEGMENT, TERMINAL),
    "terminated-episodes": ({}, EPISODE, TERMINAL),
    "truncated": ({"truncate": (True,)}, SEGMENT, GOES_ON),
    "truncated-episodes": ({"truncate": (True,)}, EPISODE, GOES_ON),
    "truncated-bootstrap": ({"truncate": (True,)}, {**SEGMENT, "truncation": "bootstrap"}, GOES_ON),
    "truncated-terminal": ({"truncate": (True,)}, {**SEGMENT, "truncation": "terminal"}, TERMINAL),
    "truncated-terminal-episodes": ({"truncate": (True,)}, {**EPISODE, "truncation": "terminal"}, TERMINAL),
    "cut": ({"lengths": (5,)}, SEGMENT, GOES_ON),
    "cut-terminal": ({"lengths": (5,)}, {**SEGMENT, "truncation": "terminal"}, GOES_ON),  # no time limit in sight
}

every_ending = pytest.mark.parametrize("ending", list(ENDINGS))
every_advantage = pytest.mark.parametrize("advantage", list(DEFAULT))


def test_the_forms_differ() -> None:
    for table in (TERMINAL, GOES_ON):
        assert len({tuple(y) for y in table.values()}) == len(KINDS)


def close(found: Any, numbers: Any) -> bool:
    """Whether (n_steps, 1) holds these numbers: float32 values of order 100, sums in double."""
    return bool(np.asarray(found).flatten() == pytest.approx(numbers, rel=1e-6, abs=1e-6))


@every_ending
@every_advantage
@pytest.mark.parametrize("target", [None, *KINDS])
def test_targets_and_advantages(target: str | None, advantage: str, ending: str) -> None:
    env, arguments, numbers = ENDINGS[ending]
    model = clock_model(ClockEnv(**env), advantage=advantage, critic_target=target, **NUMBERS, **arguments)
    batch = update(model)
    returns = numbers[target or DEFAULT[advantage]]
    advantages = np.array(numbers[DEFAULT[advantage]]) - VALUES[:3]
    assert batch.rewards.flatten().tolist() == [1, 2, 3]
    assert batch.values.flatten().tolist() == list(VALUES[:3])
    assert close(batch.returns, returns)
    assert close(batch.advantages, advantages)
    buffer = model.rollout_buffer
    assert close(buffer.returns, returns)
    assert close(buffer.advantages, advantages)
    assert close(buffer.values, VALUES[:3])


@every_ending
@pytest.mark.parametrize("target", KINDS)
def test_the_critic_is_trained_on_the_target(target: str, ending: str) -> None:
    """In the actor's step, loss 1/2 mean (V - y)^2: dV_t = (y_t - V_t) / 3. By itself with rate 3/2: all of the way."""
    env, arguments, numbers = ENDINGS[ending]
    arguments = {"advantage": "td", "critic_target": target, **NUMBERS, **arguments}
    y, v = np.array(numbers[target]), np.array(VALUES[:3])
    joint = clock_model(ClockEnv(**env), learning_rate=1.0, vf_coef=0.5, **arguments)
    update(joint)
    assert close(values_of(joint), [*(v + (y - v) / 3), *VALUES[3:]])
    assert joint.policy.value_net.bias.item() == pytest.approx((y - v).mean(), rel=1e-6)
    for critic_fit in ("before", "after"):
        alone = clock_model(ClockEnv(**env), critic_learning_rate=1.5, critic_fit=critic_fit, **arguments)
        update(alone)
        assert close(values_of(alone), [*y, *VALUES[3:]])


@pytest.mark.parametrize(
    ("target", "numbers"),
    [
        ("monte_carlo", [*TERMINAL["monte_carlo"], 4 + 25 / 2, 5 + 40 / 2]),
        ("n_step", [*TERMINAL["n_step"], 4 + 5 / 2 + 40 / 4, 5 + 40 / 2]),
        ("td", [*TERMINAL["td"], 4 + 20 / 2, 5 + 40 / 2]),
        ("lambda", [*TERMINAL["lambda"], 4 + (0.75 * 20 + 0.25 * 25) / 2, 5 + 40 / 2]),
    ],
)
def test_a_segment_with_an_end_within(target: str, numbers: list[float]) -> None:
    """Five steps of episodes of three: cut before the sixth, with which the next segment begins."""
    model = clock_model(ClockEnv(), n_steps=5, critic_target=target, **NUMBERS)
    assert close(update(model).returns, numbers)
    batch = update(model)
    assert batch.rewards.flatten().tolist() == [6, 7, 8, 9, 10]
    assert batch.timesteps.flatten().tolist() == [2, 0, 1, 2, 0]
    first, last = batch.returns.flatten()[[0, -1]].tolist()
    assert (first, last) == (6, 10 + 20 / 2)


@pytest.mark.parametrize("target", KINDS)
def test_envs_that_wait_add_nothing(target: str) -> None:
    """One env has three steps and a terminal state, the other one step and a time limit; then it waits."""
    envs = ClockEnv(), ClockEnv(lengths=(1,), truncate=(True,))
    batch = update(clock_model(*envs, n_steps=None, n_episodes=2, critic_target=target, **NUMBERS))
    assert batch.valid[:, 1].tolist() == [True, False, False]
    assert close(batch.returns[:, 0], TERMINAL[target])
    assert close(batch.returns[:, 1], [1 + 20 / 2, 0, 0])
    assert close(batch.select(batch.returns), [TERMINAL[target][0], 1 + 20 / 2, *TERMINAL[target][1:]])


# --- identities ---


def credited(**arguments: Any) -> tuple[th.Tensor, th.Tensor]:
    """Returns and advantages of twenty steps of three envs: terminal states, time limits and cuts."""
    envs = (
        ClockEnv(lengths=(3, 1, 5), truncate=(False, True, True)),
        ClockEnv(lengths=(7,), truncate=(True,), first_reward=-20.0),
        ClockEnv(lengths=(6, 2)),
    )
    batch = update(clock_model(*envs, n_steps=20, **{"gamma": 0.9, **arguments}))
    return batch.returns, batch.advantages


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"advantage": "gae", "gae_lambda": 1.0}, {"advantage": "monte_carlo"}),
        ({"advantage": "gae", "gae_lambda": 0.0}, {"advantage": "td"}),
        ({"advantage": "n_step", "td_steps": 1}, {"advantage": "td"}),
        ({"advantage": "n_step", "td_steps": 7}, {"advantage": "monte_carlo"}),  # the longest episode
        ({"advantage": "n_step", "td_steps": 1000}, {"advantage": "monte_carlo"}),
    ],
    ids=lambda a: "-".join(map(str, a.values())),
)
def test_identities(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Numbers of order 1000 in double precision; the forms in between differ from both ends by far more."""
    for found, same in zip(credited(**one), credited(**other), strict=True):
        assert th.allclose(found, same, rtol=0, atol=1e-10)
    for form in ({"advantage": "gae", "gae_lambda": 0.5}, {"advantage": "n_step", "td_steps": 3}):
        assert (credited(**form)[1] - credited(**other)[1]).abs().max() > 1


def test_defaults_are_those_of_a2c() -> None:
    model: Any = ActorCritic("MlpPolicy", ClockEnv(), device="cpu")
    assert (model.advantage, model.gae_lambda, model.critic_target) == ("gae", 1.0, None)
    assert (model.n_steps, model.gamma, model.critic_fit) == (5, 0.99, "after")
