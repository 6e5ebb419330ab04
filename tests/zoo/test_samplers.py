"""What Optuna tries are arguments that Reinforce takes, and a reloaded trial is the trial that ran."""

from typing import Any

import optuna
import pytest
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_pg import Reinforce
from sb3_pg.zoo.samplers import convert_reinforce_params, sample_reinforce_params

N_TRIALS = 60


def sample(n_envs: int) -> list[tuple[optuna.Trial, dict[str, Any]]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(N_TRIALS)]
    return [(trial, sample_reinforce_params(trial, 0, n_envs, {})) for trial in trials]


@pytest.mark.parametrize("n_envs", [1, 3, 8])
def test_every_trial_makes_a_model(n_envs: int) -> None:
    env = make_vec_env("CartPole-v1", n_envs)
    kinds = set()
    for _, hyperparams in sample(n_envs):
        model = Reinforce("MlpPolicy", env, device="cpu", **hyperparams)
        kinds.add((hyperparams["baseline"] == "value", model.n_steps is None))
        if hyperparams["n_episodes"] is not None:
            assert hyperparams["n_episodes"] % n_envs == 0
            assert hyperparams["n_episodes"] >= 2
    assert kinds == {(True, True), (True, False), (False, True)}  # nothing but a critic goes with n_steps


def test_reloaded_trial_is_what_ran() -> None:
    for trial, hyperparams in sample(n_envs=8):
        params = dict(trial.params)
        assert convert_reinforce_params(trial.params) == hyperparams
        assert trial.params == params
        assert {name: trial.user_attrs[name] for name in ("gamma", "n_episodes", "n_steps")} == {
            name: hyperparams[name] for name in ("gamma", "n_episodes", "n_steps")
        }


def test_all_trials_share_one_search_space() -> None:
    spaces = [trial.distributions for trial, _ in sample(n_envs=4)]
    assert all(space == spaces[0] for space in spaces)


def test_conversion() -> None:
    params = {
        "baseline": "value",
        "rollout": "steps",
        "n_episodes": 16,
        "n_steps_pow": 7,
        "one_minus_gamma": 0.25,
        "learning_rate": 1e-3,
        "critic_learning_rate": 2e-3,
        "n_critic_updates": 4,
        "ent_coef": 0.0,
        "max_grad_norm": 0.5,
        "normalize_advantage": True,
        "net_arch": "tiny",
        "activation_fn": "relu",
    }
    common = {"gamma": 0.75, "learning_rate": 1e-3, "ent_coef": 0.0, "max_grad_norm": 0.5, "normalize_advantage": True}
    common |= {"baseline_kwargs": None}
    common |= {"policy_kwargs": {"net_arch": {"pi": [32], "vf": [32]}, "activation_fn": nn.ReLU}}
    critic = {"critic_learning_rate": 2e-3, "n_critic_updates": 4}
    assert convert_reinforce_params(params) == common | critic | {
        "baseline": "value",
        "n_episodes": None,
        "n_steps": 128,
    }
    assert convert_reinforce_params(params | {"rollout": "episodes"}) == common | critic | {
        "baseline": "value",
        "n_episodes": 16,
        "n_steps": None,
    }
    assert convert_reinforce_params(params | {"baseline": "mean"}) == common | {
        "baseline": "mean",
        "n_episodes": 16,
        "n_steps": None,
        "critic_learning_rate": None,
        "n_critic_updates": 1,
        "truncation": None,
    }
