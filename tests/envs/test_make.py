"""One call, every backend."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import TimeAwareObservation
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_pg import Reinforce
from sb3_pg.envs import GymVectorAdapter, make_vec_env


def backend_of(env: VecEnv) -> Any:
    return type(env.env.unwrapped) if isinstance(env, GymVectorAdapter) else type(env)


NATIVE = type(gym.make_vec("CartPole-v1", vectorization_mode="vector_entry_point"))


@pytest.mark.parametrize(
    ("env_id", "kwargs", "expected"),
    [
        ("CartPole-v1", {}, NATIVE),
        ("Pendulum-v1", {}, DummyVecEnv),
        ("CartPole-v1", {"wrapper_class": TimeAwareObservation}, DummyVecEnv),
        ("CartPole-v1", {"backend": "dummy"}, DummyVecEnv),
        ("CartPole-v1", {"backend": "subproc"}, SubprocVecEnv),
        ("CartPole-v1", {"backend": "vector"}, NATIVE),
        ("Pendulum-v1", {"backend": "vector"}, SyncVectorEnv),
        ("CartPole-v1", {"backend": "vector", "backend_kwargs": {"vectorization_mode": "async"}}, AsyncVectorEnv),
    ],
)
def test_backends(env_id: str, kwargs: dict[str, Any], expected: Any) -> None:
    env = make_vec_env(env_id, 2, **kwargs)
    assert backend_of(env) is expected
    assert env.num_envs == 2
    assert env.env_is_wrapped(Monitor) == [True, True]
    assert len(env.reset()) == 2
    env.close()


def test_an_env_of_ones_own_with_a_wrapper_of_ones_own() -> None:
    sync: dict[str, Any] = {
        "env_kwargs": {"sutton_barto_reward": True},
        "backend_kwargs": {"vectorization_mode": "sync"},
    }
    env = make_vec_env("CartPole-v1", 2, "vector", 3, TimeAwareObservation, **sync)
    assert env.observation_space.shape == (5,)
    assert env.get_attr("_sutton_barto_reward") == [True, True]
    expected, _ = gym.make("CartPole-v1").reset(seed=4)
    observations: Any = env.reset()
    assert np.array_equal(observations[1, :4], expected)  # seed + i


def test_arguments_of_the_native_env() -> None:
    env = make_vec_env("CartPole-v1", 2, env_kwargs={"sutton_barto_reward": True})
    assert env.get_attr("_sutton_barto_reward") == [True, True]
    assert make_vec_env("CartPole-v0", 2).get_attr("max_episode_steps") == [200, 200]


def test_monitor_files(tmp_path: Path) -> None:
    make_vec_env("CartPole-v1", 2, "dummy", monitor_dir=str(tmp_path / "dummy")).close()
    assert len(list((tmp_path / "dummy").glob("*.monitor.csv"))) == 2
    env = make_vec_env("CartPole-v1", 2, monitor_dir=str(tmp_path / "vector"))
    model = Reinforce("MlpPolicy", env, n_steps=64, device="cpu").learn(256)
    env.close()
    results = load_results(str(tmp_path / "vector"))
    assert model.ep_info_buffer is not None
    seen = [(e["r"], e["l"]) for e in model.ep_info_buffer]
    assert list(zip(results["r"], results["l"], strict=True)) == seen
    assert (results["t"].diff().dropna() >= 0).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
        ({"n_envs": 0}, "n_envs must be at least 1, got 0"),
        (
            {"backend": "vector", "wrapper_class": TimeAwareObservation},
            "wrapper_class must be None .*native vector env",
        ),
    ],
)
def test_wrong_calls(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec_env("CartPole-v1", **kwargs)


def test_frames_can_be_had_whatever_the_backend() -> None:
    for kwargs in ({}, {"backend": "dummy"}, {"backend_kwargs": {"vectorization_mode": "sync"}, "backend": "vector"}):
        env = make_vec_env("CartPole-v1", 2, **kwargs)
        assert env.render_mode == "rgb_array"
        env.close()
