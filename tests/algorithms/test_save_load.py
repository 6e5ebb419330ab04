"""What is saved, and what loading it gives."""

import copy
import pickle
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import OffPolicyPG, Reinforce
from tests.algorithms.clock import ClockEnv
from tests.algorithms.every_algorithm import ALGORITHMS, CLASSES, JOINT, Make
from tests.algorithms.off_policy_pg import envs, stored_rewards, trained
from tests.algorithms.off_policy_pg import make as make_off_policy
from tests.helpers import (
    parameters,
    rollout_of,
    vec,
)

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")


def test_save_and_load_are_exact(make: Make, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    model = make(env).learn(300)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=env)
    assert th.equal(parameters(model), parameters(loaded))
    before, after = model.get_parameters(), loaded.get_parameters()
    assert before.keys() == after.keys()
    assert ("critic_optimizer" in before) == (model.critic_optimizer is not None)
    for name in before:
        assert str(before[name]) == str(after[name])
    assert loaded.num_timesteps == model.num_timesteps
    assert loaded.learn(100, reset_num_timesteps=False).num_timesteps > model.num_timesteps


def test_a_model_without_env_predicts(make: Make, tmp_path: Path) -> None:
    model = make("CartPole-v1")
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    obs = model.get_env().reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_a_model_can_be_loaded_on_another_number_of_envs(make: Make, tmp_path: Path) -> None:
    make("CartPole-v1").save(tmp_path / "model")
    env = make_vec_env("CartPole-v1", 4)
    model = type(make("CartPole-v1")).load(tmp_path / "model", env=env)
    assert model.learn(200).n_envs == 4


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("first", [{}, {"critic_learning_rate": 1e-3}])
@pytest.mark.parametrize("then", [{}, {"critic_learning_rate": 1e-3}])
def test_a_model_can_be_loaded_with_or_without_a_critics_own_optimizer(
    cls: Any, first: dict[str, float], then: dict[str, float], tmp_path: Path
) -> None:
    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu", **{**JOINT, **first}).learn(32)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=model.get_env(), **{**JOINT, **then})
    assert (loaded.critic_optimizer is not None) == bool(then)
    assert th.equal(parameters(model), parameters(loaded))
    loaded.learn(32)


def test_pickle_and_deepcopy(make: Make) -> None:
    fresh = make("CartPole-v1")
    copy.deepcopy(fresh.policy)
    model = fresh.learn(200)
    again = pickle.loads(cloudpickle.dumps(model))  # as SB3 does: envs are made by local functions
    assert th.equal(parameters(model), parameters(again))
    assert again.learn(100).num_timesteps >= 100


def test_a_fitted_baseline_is_loaded_unless_another_is_asked_for(tmp_path: Path) -> None:
    def predicted(model: Any) -> th.Tensor:
        """What the baseline says of each step of one more rollout, before it is fitted to it."""
        model.learn(1)
        rollout = rollout_of(model)
        return (rollout.returns - rollout.advantages).flatten()

    model = ALGORITHMS["reinforce-linear"](vec(ClockEnv()), device="cpu", seed=0).learn(100)
    model.save(tmp_path / "model")
    same = Reinforce.load(tmp_path / "model", env=vec(ClockEnv()), device="cpu")
    expected = predicted(model)
    assert len(expected) == 4 * 3
    assert expected.abs().min() > 1
    assert predicted(same) == pytest.approx(expected, rel=1e-3)  # differences of returns in float32
    another: dict[str, Any] = {"baseline_kwargs": {"regularization": 1.0}}
    other = Reinforce.load(tmp_path / "model", env=vec(ClockEnv()), device="cpu", **another)
    assert not predicted(other).any()


def test_load_takes_attributes_too(tmp_path: Path) -> None:
    Reinforce("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "model")
    assert Reinforce.load(tmp_path / "model", num_timesteps=7).num_timesteps == 7


@pytest.mark.parametrize("cls", CLASSES)
def test_set_parameters_still_wants_all_of_them(cls: Any) -> None:
    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, critic_learning_rate=1e-3, device="cpu")
    params = model.get_parameters()
    del params["critic_optimizer"]
    with pytest.raises(ValueError, match="critic_optimizer"):
        model.set_parameters(params, exact_match=True)


def test_model_and_replay_buffer_go_on_together(tmp_path: Path) -> None:
    model = make_off_policy(VecNormalize(envs(2)), train_freq=(4, "episode")).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded: Any = OffPolicyPG.load(tmp_path / "model", env=VecNormalize(envs(2)), device="cpu")
    assert loaded.replay_buffer.trajectories == []
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert stored_rewards(loaded) == stored_rewards(model)
    logs = [trained(m, 2) for m in (model, loaded)]
    assert th.equal(parameters(model), parameters(loaded))
    assert logs[0]["train/staleness"] == logs[1]["train/staleness"] > 0
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps >= 80


@pytest.mark.parametrize("train_freq", [(4, "episode"), 5])
def test_a_replay_buffer_serves_any_number_of_envs(train_freq: Any, tmp_path: Path) -> None:
    model: Any = make_off_policy(envs(2), train_freq=train_freq, gradient_steps=1).learn(40)
    for n_envs in (1, 4):
        n_updates, n_kept = model._n_updates, len(model.replay_buffer.trajectories)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        model = OffPolicyPG.load(tmp_path / "model", env=envs(n_envs), device="cpu")
        model.load_replay_buffer(tmp_path / "buffer")
        model.learn(20, reset_num_timesteps=False)
        assert model._n_updates > n_updates
        assert len(model.replay_buffer.trajectories) > n_kept


def test_load_may_change_how_many_trajectories_are_kept(tmp_path: Path) -> None:
    make_off_policy(envs(), train_freq=4, gradient_steps=0, buffer_trajectories=9).save(tmp_path / "model")
    loaded: Any = OffPolicyPG.load(tmp_path / "model", env=envs(), buffer_trajectories=2, device="cpu").learn(40)
    assert len(loaded.replay_buffer.trajectories) == 2


def test_an_old_buffer_does_not_pass_for_new(tmp_path: Path) -> None:
    """Its trajectories were collected after more updates than the new model has taken."""
    old = make_off_policy(envs(), train_freq=(4, "episode"), gradient_steps=3).learn(33)
    old.save_replay_buffer(tmp_path / "buffer")
    model = make_off_policy(envs(), train_freq=(4, "episode"), gradient_steps=0)
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(11)
    assert all(chosen in model.replay_buffer.choose(5) for chosen in model.replay_buffer.trajectories[-4:])
    assert len([*iter(model.replay_buffer.drop_oldest, False)]) > 0
    assert [len(r) for r in stored_rewards(model)] == [3, 1, 5, 2]
