"""Several envs, envs that are set or normalized, and training that goes on in the middle of an episode."""

from typing import Any

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import Reinforce
from tests.algorithms.every_algorithm import ALGORITHMS, Make, scales_rewards
from tests.algorithms.off_policy_pg import Watch, consecutive, envs, stored_rewards
from tests.algorithms.off_policy_pg import make as make_off_policy
from tests.helpers import (
    ScriptedEnv,
    vec,
)

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")


def test_set_env_and_continue(make: Make) -> None:
    model = make("CartPole-v1").learn(100)
    seen = model.num_timesteps
    model.set_env(make_vec_env("CartPole-v1", seed=0))
    model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps >= seen + 100
    steps: list[int] = []

    def note(*_: Any) -> bool:
        steps.append(model.num_timesteps)
        return True

    model.learn(1, callback=note)
    assert steps == list(range(1, len(steps) + 1))
    assert model.num_timesteps == len(steps)


def test_continued_learning_does_not_reset_the_env_of_segments() -> None:
    env = ScriptedEnv(lengths=(1000,))
    model = Reinforce("MlpPolicy", vec(env), n_steps=8, device="cpu").learn(8)
    model.learn(8, reset_num_timesteps=False)
    assert env.resets == 1
    buffer: Any = model.rollout_buffer
    assert buffer.timesteps.flatten().tolist() == list(range(8, 16))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_normalized_envs(name: str) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), norm_reward=scales_rewards(name), gamma=0.99)
    model = ALGORITHMS[name](env, device="cpu", seed=0).learn(900)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 400


def test_several_envs_contribute_equally() -> None:
    env = vec(ScriptedEnv((2,)), ScriptedEnv((5,), first_reward=100))
    model = make_off_policy(env, train_freq=(6, "episode"), gradient_steps=0).learn(1, log_interval=None)
    assert sorted(map(len, stored_rewards(model))) == [2, 2, 2, 5, 5, 5]
    assert model.num_timesteps == 2 * 15
    assert len(model.ep_info_buffer) == 6
    assert model.logger.name_to_value["rollout/valid_fraction"] == pytest.approx(21 / 30)


def test_pieces_of_different_episodes_are_not_put_together() -> None:
    """The second episode is as old, where its beginning is lost, as the first, where its end is."""
    model = make_off_policy(envs(lengths=(12,)), train_freq=5, gradient_steps=0).learn(5)
    model.learn(100, Watch(step=lambda callback: callback.n_calls < 5))
    assert model.replay_buffer.trajectories == []
    model.learn(40, reset_num_timesteps=False)
    assert consecutive(model, 12)
    assert len(model.replay_buffer.trajectories) == 2


def test_learning_again_begins_with_a_new_episode() -> None:
    model = make_off_policy(envs(lengths=(6,)), train_freq=4, gradient_steps=0).learn(4).learn(8)
    assert consecutive(model, 6)


def test_learning_goes_on_in_the_middle_of_an_episode() -> None:
    model = make_off_policy(envs(lengths=(6,)), train_freq=4, gradient_steps=0).learn(4)
    model.learn(4, reset_num_timesteps=False)
    assert consecutive(model, 6)


def test_an_env_that_is_set_begins_new_episodes() -> None:
    model = make_off_policy(envs(lengths=(6,)), train_freq=4, gradient_steps=0).learn(4)
    model.set_env(envs(lengths=(5,)))
    model.learn(12, reset_num_timesteps=False)
    assert consecutive(model, 5)
