"""What Optuna tries are arguments that the algorithms take, and a reloaded trial is the trial that ran."""

from typing import Any

import optuna
import pytest
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_pg.zoo import ALGORITHMS
from sb3_pg.zoo.samplers import convert_actor_critic_params, convert_reinforce_params

N_TRIALS = 60
every_algorithm = pytest.mark.parametrize("algo", ALGORITHMS)


def sample(algo: str, n_envs: int) -> list[tuple[optuna.Trial, dict[str, Any]]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask() for _ in range(N_TRIALS)]
    return [(trial, HYPERPARAMS_SAMPLER[algo](trial, 0, n_envs, {})) for trial in trials]


@pytest.mark.parametrize("n_envs", [1, 3, 8])
@every_algorithm
def test_every_trial_makes_a_model(algo: str, n_envs: int) -> None:
    env = make_vec_env("CartPole-v1", n_envs)
    kinds = set()
    for _, hyperparams in sample(algo, n_envs):
        model = ALGORITHMS[algo]("MlpPolicy", env, device="cpu", **hyperparams)
        kinds.add((hyperparams.get("baseline"), hyperparams["n_steps"] is None))
        assert all(getattr(model, name) == value for name, value in hyperparams.items() if name in ("gamma", "n_steps"))
        if hyperparams["n_episodes"] is not None:
            assert hyperparams["n_episodes"] % n_envs == 0
            assert hyperparams["n_episodes"] >= 2
    # with n_steps goes nothing but a critic
    assert {baseline for baseline, in_episodes in kinds if not in_episodes} <= {None, "value"}
    assert {in_episodes for _, in_episodes in kinds} == {True, False}


@every_algorithm
def test_reloaded_trial_is_what_ran(algo: str) -> None:
    for trial, hyperparams in sample(algo, n_envs=8):
        params = dict(trial.params)
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == hyperparams
        assert trial.params == params
        assert {"gamma", "n_episodes", "n_steps"} <= trial.user_attrs.keys()
        assert all(trial.user_attrs[name] == hyperparams[name] for name in trial.user_attrs)


@every_algorithm
def test_all_trials_share_one_search_space(algo: str) -> None:
    spaces = [trial.distributions for trial, _ in sample(algo, n_envs=4)]
    assert all(space == spaces[0] for space in spaces)


SHARED = {
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
CONVERTED = {
    "n_episodes": None,
    "n_steps": 128,
    "gamma": 0.75,
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "n_critic_updates": 4,
    "ent_coef": 0.0,
    "max_grad_norm": 0.5,
    "normalize_advantage": True,
    "policy_kwargs": {"net_arch": {"pi": [32], "vf": [32]}, "activation_fn": nn.ReLU},
}
EPISODES = {"n_episodes": 16, "n_steps": None}


def test_conversion_for_reinforce() -> None:
    params = SHARED | {"baseline": "value"}
    expected = CONVERTED | {"baseline": "value", "baseline_kwargs": None}
    assert convert_reinforce_params(params) == expected
    assert convert_reinforce_params(params | {"rollout": "episodes"}) == expected | EPISODES
    no_critic = {"baseline": "mean", "critic_learning_rate": None, "n_critic_updates": 1, "truncation": None}
    assert convert_reinforce_params(params | {"baseline": "mean"}) == expected | EPISODES | no_critic


def test_conversion_for_actor_critic() -> None:
    own = {"critic_fit": "before", "use_rms_prop": True}
    params = SHARED | own | {"one_minus_gae_lambda": 0.125}
    expected = CONVERTED | own | {"gae_lambda": 0.875, "advantage": "gae", "critic_target": None}
    assert convert_actor_critic_params(params) == expected
    assert convert_actor_critic_params(params | {"rollout": "episodes"}) == expected | EPISODES
