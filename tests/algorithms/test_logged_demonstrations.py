"""Demonstrations as logged data of OffPolicyPG."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import Demonstrations, Memory, OffPolicyPG
from tests.algorithms.off_policy_pg import rows
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, parameters, two_envs

SMALL: dict[str, Any] = {"device": "cpu", "seed": 0, "policy_kwargs": {"net_arch": [8]}}
LENGTHS = (3, 1, 4)


def demos_of(actions: spaces.Space[Any], observations: Any = OBSERVATION_SPACES["vector"], **kwargs: Any) -> Any:
    """Three episodes: the second is truncated, the others terminate."""
    seen, taken = copy.deepcopy((observations, actions))
    seen.seed(0)
    taken.seed(0)
    n, ends = sum(LENGTHS), np.cumsum(LENGTHS) - 1
    flags = {"terminated": np.isin(np.arange(n), ends[[0, 2]]), "truncated": np.arange(n) == ends[1]}
    rewards = np.arange(n, dtype=float)
    finals = np.stack([seen.sample() for _ in LENGTHS])
    arguments = {"rewards": rewards, "final_observations": finals, **flags, **kwargs}
    return Demonstrations(np.stack([seen.sample() for _ in range(n)]), [taken.sample() for _ in range(n)], **arguments)


def make(actions: str = "discrete", **kwargs: Any) -> Any:
    return OffPolicyPG("MlpPolicy", two_envs(ACTION_SPACES[actions]), **{**SMALL, **kwargs})


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_log_probs_of_the_policy_that_acted(actions: str) -> None:
    demos, model = demos_of(ACTION_SPACES[actions]), make(actions)
    known = np.linspace(-3, -0.1, demos.n_steps)
    model.add_trajectories(demos, log_prob=known)
    stored = model.replay_buffer.trajectories
    assert [one.length for one in stored] == list(LENGTHS)
    assert [one.terminated for one in stored] == [True, False, True]
    assert np.allclose(rows(model, "log_probs"), known)
    assert np.array_equal(rows(model, "observations"), demos.observations)
    assert np.array_equal(rows(model, "rewards"), demos.rewards)
    assert np.array_equal(rows(model, "actions").reshape(demos.n_steps, -1), demos.actions.reshape(demos.n_steps, -1))
    assert np.array_equal(model.replay_buffer.next_observations[3, 0], demos.final_observations[1])
    before = parameters(model)
    model.learn(0)
    model.train(gradient_steps=2, batch_size=None)
    assert parameters(model).isfinite().all()
    assert not th.equal(before, parameters(model))


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_log_probs_of_a_clone(actions: str) -> None:
    demos, model = demos_of(ACTION_SPACES[actions]), make(actions)
    with pytest.warns(UserWarning, match=r"log_prob='cloned'.*relative to it, and its error biases"):
        model.add_trajectories(demos, log_prob="cloned")
    taken = th.as_tensor(demos.actions).reshape(demos.n_steps, -1)
    taken = taken.flatten() if actions == "discrete" else taken.float()
    with th.no_grad():
        expected = model.policy.evaluate_actions(th.as_tensor(demos.observations), taken)[1]
    assert np.allclose(rows(model, "log_probs"), expected.numpy(), atol=1e-6)
    model.learn(0)
    model.train(gradient_steps=1, batch_size=None)
    assert model.logger.name_to_value["train/largest_weight"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.filterwarnings("ignore:log_prob='cloned'")
def test_a_clone_with_memory_remembers_the_episode() -> None:
    demos, model = demos_of(ACTION_SPACES["discrete"]), make(memory=Memory("gru", 4))
    model.add_trajectories(demos, log_prob="cloned")
    expected = []
    for episode in demos.episodes:
        state = None
        for t in range(episode.start, episode.stop):
            seen = th.as_tensor(demos.observations[t : t + 1])
            distribution, state = model.policy.next_distribution(seen, state)
            expected.append(distribution.log_prob(th.as_tensor(demos.actions[t : t + 1])).item())
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)


def test_they_are_normalized_as_the_envs_are() -> None:
    env: Any = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))
    model: Any = OffPolicyPG("MlpPolicy", env, max_episode_steps=200, train_freq=(2, "episode"), **SMALL).learn(1)
    demos = demos_of(env.action_space, env.venv.observation_space)
    model.replay_buffer.reset()
    model.add_trajectories(demos, log_prob=np.zeros(demos.n_steps))
    assert np.allclose(rows(model, "observations"), env.normalize_obs(demos.observations))
    assert np.allclose(rows(model, "rewards"), env.normalize_reward(demos.rewards))
    assert not np.allclose(rows(model, "observations"), demos.observations)


@pytest.mark.filterwarnings("ignore:log_prob='cloned'")
def test_actions_as_the_policy_draws_them() -> None:
    """Choices from the space's start, and squashed actions."""
    demos, model = (
        demos_of(spaces.Discrete(3, start=2)),
        OffPolicyPG("MlpPolicy", two_envs(spaces.Discrete(3, start=2))),
    )
    model.add_trajectories(demos, log_prob="cloned")
    assert np.array_equal(rows(model, "actions").ravel(), demos.actions - 2)
    squashed = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
    space: Any = ACTION_SPACES["box"]
    demos, model = demos_of(space), make("box", **squashed)
    model.add_trajectories(demos, log_prob="cloned")
    expected = 2 * (demos.actions - space.low) / (space.high - space.low) - 1
    assert np.allclose(rows(model, "actions"), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "log_prob", "match"),
    [
        ({}, None, r"log_prob must be the log-probs .* of shape \(8,\), or 'cloned'.*got None"),
        ({}, np.zeros(3), r"log_prob must be .* got shape \(3,\)"),
        ({}, np.full(8, -np.inf), r"log_probs must be finite"),
        ({}, "expert", "log_prob must be an array or 'cloned', got 'expert'"),
        ({"rewards": None}, "cloned", "trajectories must have rewards"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], log_prob: Any, match: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=match):
        model.add_trajectories(demos_of(ACTION_SPACES["discrete"], **changes), log_prob=log_prob)
    assert not model.replay_buffer.trajectories


def test_trajectories_have_log_probs_already() -> None:
    with pytest.raises(ValueError, match="log_prob must be None for trajectories"):
        make().add_trajectories([], log_prob="cloned")


def test_without_final_observations_a_cut_episode_counts_as_terminated() -> None:
    model = make()
    demos = demos_of(ACTION_SPACES["discrete"], final_observations=None)
    model.add_trajectories(demos, log_prob=np.zeros(demos.n_steps))
    assert all(one.terminated for one in model.replay_buffer.trajectories)
