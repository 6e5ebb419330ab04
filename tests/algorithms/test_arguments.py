"""Arguments that contradict each other, are missing or impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise

from sb3_pg import TRPO
from tests.algorithms.every_algorithm import Make
from tests.algorithms.off_policy_pg import envs, with_ratios
from tests.algorithms.off_policy_pg import make as make_off_policy
from tests.helpers import (
    ScriptedEnv,
    parameters,
    vec,
)

pytestmark = [pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"), pytest.mark.usefixtures("one_thread")]


def test_arguments_given_as_dicts_stay_as_they_were(make: Make) -> None:
    policy_kwargs: dict[str, Any] = {"net_arch": [4]}
    make(vec(ScriptedEnv()), policy_kwargs=policy_kwargs, device="cpu")
    assert policy_kwargs == {"net_arch": [4]}  # SB3's off-policy classes write into it


def test_learning_without_an_env_or_a_number_is_explained(make: Make, tmp_path: Path) -> None:
    model = make("CartPole-v1")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="set_env"):
        type(model).load(tmp_path / "model").learn(10)
    with pytest.raises(TypeError, match=r"total_timesteps.*'100'"):
        model.learn("100")
    with pytest.raises(TypeError, match="has no argument 'gama'; did you mean 'gamma'"):
        type(model).load(tmp_path / "model", gama=0.3)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"optimize_memory_usage": True}, ValueError, "optimize_memory_usage=True"),
        ({"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}, ValueError, "action_noise.*log-prob"),
        ({"train_freq": (3, "episode")}, ValueError, r"\(3, 'episode'\).*multiple of the number of envs, 2"),
        ({"train_freq": (3, "rollout")}, ValueError, r"train_freq\[1\].*'rollout'"),
        ({"train_freq": 0}, ValueError, r"train_freq\[0\].*0"),
        ({"gradient_steps": -2}, ValueError, "gradient_steps.*-2"),
        ({"ratio": "per_episode"}, ValueError, "ratio.*'trajectory'.*'per_episode'"),
        ({"max_ratio": 0}, ValueError, "max_ratio.*0"),
        ({"self_normalize": 1}, TypeError, "self_normalize"),
        ({"min_ess": 1.5}, ValueError, "min_ess.*1.5"),
        ({"batch_size": 0}, ValueError, "batch_size.*0"),
        ({"buffer_size": 0}, ValueError, "buffer_size.*0"),
        ({"buffer_trajectories": 0}, ValueError, "buffer_trajectories.*0"),
        ({"learning_starts": -1}, ValueError, "learning_starts.*-1"),
        ({"behavior_policy": "uniform"}, TypeError, "behavior_policy.*'uniform'"),
        ({"replay_buffer_class": ReplayBuffer}, TypeError, "replay_buffer_class.*TrajectoryReplayBuffer"),
        ({"n_episodes": 4}, TypeError, "no argument 'n_episodes'"),
        ({"returns": "total", "truncation": "bootstrap"}, ValueError, "truncation='bootstrap'"),
        ({"baseline": "leave_one_out", "train_freq": 8}, ValueError, "leave_one_out.*at least 2 episodes"),
        ({"baseline": "leave_one_out", "batch_size": 1}, ValueError, "leave_one_out.*at least 2 episodes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_arguments_are_checked(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_off_policy(envs(2), **kwargs)


def test_a_space_without_volume_has_no_uniform_warm_up() -> None:
    env = ScriptedEnv(action_space=spaces.Box(np.array([0, -1], np.float32), np.array([0, 1], np.float32)))
    with pytest.raises(ValueError, match=r"learning_starts > 0.*set it to 0"):
        make_off_policy(env, learning_starts=10)
    make_off_policy(env, train_freq=4).learn(8)
    by_others: dict[str, Any] = {"learning_starts": 10, "behavior_policy": lambda _: (np.zeros((1, 2)), np.zeros(1))}
    make_off_policy(env, train_freq=4, **by_others).learn(8)


def test_an_impossible_action_is_an_error_and_is_not_stored() -> None:
    calls: list[int] = []

    def behavior(_: Any) -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        return np.zeros(1, dtype=int), np.full(1, -1.0 if len(calls) < 8 else -np.inf)

    model = make_off_policy(envs(), behavior_policy=behavior, train_freq=(4, "episode"))
    before = parameters(model)
    with pytest.raises(ValueError, match=r"finite log-probs.*-inf for env 0"):
        model.learn(11)
    assert model.replay_buffer.trajectories == []
    assert th.equal(parameters(model), before)


def test_of_logged_trajectories_one_that_is_bad_spoils_all() -> None:
    model = make_off_policy(envs())
    good, bad = with_ratios(model, [1, 1], [1, 1])
    bad.log_probs[1] = -np.inf
    with pytest.raises(ValueError, match=r"log_probs.*-inf at \[1\].*probability 0"):
        model.add_trajectories(iter([good, bad]))
    assert model.replay_buffer.trajectories == []


def test_an_episode_must_fit_into_the_buffer() -> None:
    with pytest.raises(ValueError, match="buffer_size=4 steps, got 5"):
        make_off_policy(envs(), buffer_size=4, train_freq=(4, "episode")).learn(20)


def test_two_names_of_one_argument_are_not_given_both() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        TRPO("MlpPolicy", "CartPole-v1", sub_sampling_factor=2, fisher_subsample=2)
