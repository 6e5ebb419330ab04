"""What OffPolicyPG stores of what it and others have done, and when it is trained on."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from tests.algorithms.off_policy_pg import (
    Watch,
    envs,
    log_prob,
    make,
    rows,
)
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    parameters,
    policy_for,
)


@pytest.mark.parametrize(
    ("actions", "kwargs"),
    [
        *((actions, {}) for actions in ACTION_SPACES),
        ("box", {"use_sde": True, "sde_sample_freq": 4}),
        ("matrix", {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}}),
    ],
)
def test_stored_log_probs_are_those_of_the_stored_actions(actions: str, kwargs: dict[str, Any]) -> None:
    model = make(VecNormalize(envs(2, actions=actions)), train_freq=7, gradient_steps=0, **kwargs).learn(84)
    assert len(model.replay_buffer.trajectories) > 20
    expected = log_prob(model.policy, rows(model, "observations"), rows(model, "actions"))
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("observations", ["dict", "image"])
def test_log_probs_on_dicts_and_images(observations: str) -> None:
    model = make(envs(2, observations), policy_for(OBSERVATION_SPACES[observations]), gradient_steps=0).learn(40)
    expected = log_prob(model.policy, rows(model, "observations"), rows(model, "actions"))
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)
    assert expected.std() > 1e-4


def test_observations_are_stored_as_acted_upon_and_actions_as_sampled() -> None:
    env = envs(actions="box")
    seen: list[np.ndarray] = []
    watch = Watch(
        training=lambda callback: seen.append(callback.model._last_obs.copy()),
        step=lambda callback: seen.append(callback.locals["new_obs"].copy()),
    )
    model = make(VecNormalize(env), train_freq=11, gradient_steps=0).learn(33, watch)
    assert np.array_equal(rows(model, "observations"), np.concatenate(seen)[:-1])
    sampled, taken = rows(model, "actions"), np.array(env.envs[0].unwrapped.actions)
    space: Any = ACTION_SPACES["box"]
    assert np.array_equal(np.clip(sampled, space.low, space.high), taken)
    assert not np.array_equal(sampled, taken)
    assert len(rows(model, "rewards")) == 33


def test_an_episode_that_several_policies_have_lived_has_the_log_probs_of_each() -> None:
    policies: list[Any] = []
    watch = Watch(rollout=lambda callback: policies.append(copy.deepcopy(callback.model.policy)))
    model = make(envs(lengths=(7,)), train_freq=(3, "step"), learning_rate=0.1, ratio="per_step").learn(42, watch)
    assert [t.length for t in model.replay_buffer.trajectories] == [7] * 6
    expected = np.concatenate(
        [
            log_prob(policy, rows(model, "observations")[3 * i : 3 * i + 3], rows(model, "actions")[3 * i : 3 * i + 3])
            for i, policy in enumerate(policies)
        ]
    )
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)
    last = log_prob(policies[-1], rows(model, "observations"), rows(model, "actions"))
    assert np.abs(last - expected).max() > 0.1


@pytest.mark.parametrize(
    ("actions", "log_density", "kwargs"),
    [
        ("discrete", -math.log(3), {}),
        ("multi_binary", -math.log(8), {}),
        ("box", -math.log(8), {}),
        ("box", -math.log(4), {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}}),
    ],
)
def test_the_warm_up_is_uniform_and_says_so(actions: str, log_density: float, kwargs: dict[str, Any]) -> None:
    env = envs(2, actions=actions, lengths=(5,))
    model = make(env, train_freq=5, gradient_steps=0, learning_starts=20, **kwargs).learn(40)
    kept, expected = (
        rows(model, "log_probs"),
        log_prob(model.policy, rows(model, "observations"), rows(model, "actions")),
    )
    assert kept[:20] == pytest.approx(np.full(20, log_density))
    assert kept[20:] == pytest.approx(expected[20:], abs=1e-6)
    assert np.abs(kept[:20] - expected[:20]).max() > 1e-3
    taken = np.array(env.envs[0].unwrapped.actions[:10])
    if actions == "box":  # in all of its range, which squashed actions are stretched to
        space: Any = ACTION_SPACES["box"]
        low, high = space.low, space.high
        stored = rows(model, "actions")[[*range(5), *range(10, 15)]]
        assert np.allclose(taken, low + (stored + 1) * (high - low) / 2 if kwargs else stored, atol=1e-6)


def test_no_update_before_learning_starts() -> None:
    model = make(envs(lengths=(5,)), train_freq=5, learning_starts=20)
    before = parameters(model)
    model.learn(20)
    assert th.equal(parameters(model), before)
    model.learn(5, reset_num_timesteps=False)
    assert not th.equal(parameters(model), before)


def biased(obs: Any) -> tuple[np.ndarray, np.ndarray]:
    """A behavior policy that looks at nothing: action 0, 1, 2 with probability 0.8, 0.1, 0.1."""
    p = np.array([0.8, 0.1, 0.1])
    actions = np.random.default_rng().choice(3, len(obs), p=p)
    return actions, np.log(p[actions])


def test_a_behavior_policy_acts_and_its_log_probs_are_kept() -> None:
    seen: list[np.ndarray] = []

    def behavior(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(obs.copy())
        return biased(obs)

    env = VecNormalize(envs())
    model = make(env, behavior_policy=behavior, train_freq=11, learning_starts=5, gradient_steps=0).learn(22)
    assert np.array_equal(rows(model, "observations"), np.concatenate(seen))  # normalized
    expected = np.where(rows(model, "actions")[:, 0] == 0, math.log(0.8), math.log(0.1))
    assert rows(model, "log_probs") == pytest.approx(expected)


def test_train_freq_and_gradient_steps_in_all_their_forms() -> None:
    for train_freq, n_steps in ((4, 4 * 2), ((4, "step"), 4 * 2), ([4, "step"], 4 * 2), ((4, "episode"), 4 * 6)):
        model = make(envs(2, lengths=(6,)), train_freq=train_freq, gradient_steps=3)
        model.learn(1)
        assert model.num_timesteps == n_steps
    model = make(envs(2, lengths=(4,)), train_freq=4, gradient_steps=-1).learn(16)
    assert model._n_updates == 16
