"""Learning to a score, with a margin, on one seed each."""

from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_pg import NPG, TRPO, KLPenaltyPG, Reinforce


def score(model: Any) -> float:
    mean, _ = evaluate_policy(model, Monitor(gym.make("CartPole-v1")), n_eval_episodes=10, warn=False)
    return float(mean)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_defaults_solve_cartpole() -> None:
    assert score(Reinforce("MlpPolicy", "CartPole-v1", seed=1, device="cpu").learn(50_000)) >= 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        {"baseline": "none", "returns": "total", "gamma": 1.0},
        {"baseline": "none"},
        {"baseline": "mean"},
        {"baseline": "leave_one_out"},
        {"baseline": "time"},
        {"baseline": "optimal"},
        {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}},
        {"baseline": "linear"},
        {"baseline": "value", "critic_fit": "before", "n_critic_updates": 5},
        {"baseline": "value", "state_discount": True, "gamma": 0.995},
        {"baseline": "value", "n_steps": 256, "normalize_advantage": True},
    ],
    ids=lambda kwargs: "-".join(str(value) for value in kwargs.values()),
)
def test_every_estimator_learns(kwargs: dict[str, Any]) -> None:
    """From about 20 (a random policy) to several times that; which one is best is a benchmark's business."""
    assert score(Reinforce("MlpPolicy", "CartPole-v1", seed=1, device="cpu", **kwargs).learn(25_000)) >= 80


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (TRPO, {"learning_rate": 3e-3, "target_kl": 0.02}),
        (NPG, {"learning_rate": 3e-3, "target_kl": 0.02}),
        (KLPenaltyPG, {"n_epochs": 5, "target_kl": 0.02}),
    ],
    ids=["trpo", "npg", "kl_penalty_pg"],
)
def test_steps_of_a_limited_divergence_solve_cartpole(cls: Any, kwargs: dict[str, Any]) -> None:
    model = cls("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=0), n_steps=128, seed=0, device="cpu", **kwargs)
    assert score(model.learn(24_000)) >= 300
