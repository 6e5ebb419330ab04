"""SB3's own callbacks, and what a callback changes in the buffer."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)

from sb3_pg import KLPenaltyPG
from tests.algorithms.every_algorithm import CLASSES, Make
from tests.helpers import (
    parameters,
)

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")


def test_evaluation_and_checkpoints(make: Make, tmp_path: Path) -> None:
    callbacks = [
        EvalCallback(gym.make("CartPole-v1"), eval_freq=100, n_eval_episodes=2, log_path=str(tmp_path), verbose=0),
        CheckpointCallback(save_freq=100, save_path=str(tmp_path)),
    ]
    model = make("CartPole-v1").learn(300, callback=callbacks)
    assert len(np.load(tmp_path / "evaluations.npz")["timesteps"]) >= 3
    type(model).load(tmp_path / "rl_model_100_steps", env=gym.make("CartPole-v1")).learn(50)


def test_a_reward_threshold_stops_training(make: Make) -> None:
    stop = StopTrainingOnRewardThreshold(reward_threshold=1.0)
    evaluate = EvalCallback(gym.make("CartPole-v1"), stop, eval_freq=50, n_eval_episodes=1, verbose=0)
    assert make("CartPole-v1").learn(100_000, callback=evaluate).num_timesteps == 50


def test_evaluation_does_not_change_training(make: Make) -> None:
    evaluate = EvalCallback(gym.make("CartPole-v1"), eval_freq=20, n_eval_episodes=1, verbose=0)
    assert th.equal(
        parameters(make("CartPole-v1").learn(200, callback=evaluate)), parameters(make("CartPole-v1").learn(200))
    )


def test_the_progress_bar_counts_every_step(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model = make("CartPole-v1").learn(100, progress_bar=True)
    assert f"{model.num_timesteps:,}/100" in capsys.readouterr().out


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_callback_writes_into_the_buffer_is_used(cls: Any) -> None:
    class NoAdvantage(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            model: Any = self.model
            model.rollout_buffer.advantages[:] = 0.0

    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu", seed=0)
    actor = list(model.learner.parameters.actor.values())
    before = th.nn.utils.parameters_to_vector(actor).detach().clone()
    model.learn(32, callback=NoAdvantage())
    moved = (th.nn.utils.parameters_to_vector(actor) - before).abs().max()
    assert moved <= (1e-4 if cls is KLPenaltyPG else 0)  # the divergence's gradient is 0 but for rounding
