"""What Optuna tries are arguments that the algorithms take, and a reloaded trial is the trial that ran."""

from typing import Any

import optuna
import pytest
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_pg.zoo import ALGORITHMS
from sb3_pg.zoo.samplers import COMMON, SEARCHES

N_TRIALS = 60
IN_EPISODES = ("reinforce", "actor_critic", "off_policy_pg")
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
        assert model.lr_schedule(1.0) == hyperparams["learning_rate"]
        names = {"gamma", "gae_lambda", "n_steps", "batch_size", "target_kl", "tau"} & hyperparams.keys()
        assert all(getattr(model, name) == hyperparams[name] for name in names)
        n_episodes = hyperparams.get("n_episodes")
        if algo == "off_policy_pg":
            n_episodes, _ = hyperparams["train_freq"]
            assert hyperparams["buffer_trajectories"] % n_episodes == 0
        if n_episodes is not None:
            assert n_episodes % n_envs == 0
            assert n_episodes >= 2
        kinds.add((hyperparams.get("baseline"), n_episodes is not None))
    # with n_steps goes nothing but a critic
    assert {baseline for baseline, in_episodes in kinds if not in_episodes} <= {None, "value"}
    segments = set() if algo == "off_policy_pg" else {False}
    assert {in_episodes for _, in_episodes in kinds} == segments | ({True} if algo in IN_EPISODES else set())


@every_algorithm
def test_reloaded_trial_is_what_ran(algo: str) -> None:
    for trial, hyperparams in sample(algo, n_envs=8):
        params = dict(trial.params)
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == hyperparams
        assert trial.params == params
        renamed = {
            "off_policy_pg": {"train_freq", "buffer_trajectories"},
            "off_pac": {"batch_size"},
            "async_actor_critic": {"n_steps"},
        }
        assert {"gamma", *renamed.get(algo, {"n_episodes", "n_steps"})} <= trial.user_attrs.keys()
        assert all(trial.user_attrs[name] == hyperparams[name] for name in trial.user_attrs)


@every_algorithm
def test_all_trials_share_one_search_space(algo: str) -> None:
    spaces = [trial.distributions for trial, _ in sample(algo, n_envs=4)]
    assert all(space == spaces[0] for space in spaces)


def test_an_algorithm_without_a_search_of_its_own_has_the_common_one() -> None:
    for cls in ALGORITHMS.values():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        hyperparams = COMMON.sample(study.ask(), 0, 2, {})
        model: Any = cls("MlpPolicy", make_vec_env("CartPole-v1", 2), device="cpu", **hyperparams)
        assert (model.gamma, model.lr_schedule(1.0)) == (hyperparams["gamma"], hyperparams["learning_rate"])


SHARED = {
    "n_steps_pow": 7,
    "one_minus_gamma": 0.25,
    "learning_rate": 1e-3,
    "n_critic_updates": 4,
    "ent_coef": 0.0,
    "log_std_init": -0.5,
    "net_arch": "tiny",
    "activation_fn": "relu",
}
CONVERTED = {
    "n_episodes": None,
    "n_steps": 128,
    "gamma": 0.75,
    "learning_rate": 1e-3,
    "n_critic_updates": 4,
    "ent_coef": 0.0,
    "policy_kwargs": {"net_arch": [32], "activation_fn": nn.ReLU, "log_std_init": -0.5},
}
UNCHANGED = {"critic_learning_rate": 2e-3, "max_grad_norm": 0.5}
EPISODES = {"n_episodes": 16, "n_steps": None}
GAE = {"gae_lambda": 0.875, "advantage": "gae", "critic_target": None}


def test_conversion_for_reinforce() -> None:
    own = UNCHANGED | {"baseline": "value", "normalize_advantage": True}
    params = SHARED | own | {"rollout": "steps", "n_episodes": 16}
    expected = CONVERTED | own | {"baseline_kwargs": None}
    assert SEARCHES["reinforce"].convert(params) == expected
    assert SEARCHES["reinforce"].convert(params | {"rollout": "episodes"}) == expected | EPISODES
    no_critic = {"baseline": "mean", "critic_learning_rate": None, "n_critic_updates": 1, "truncation": None}
    assert SEARCHES["reinforce"].convert(params | {"baseline": "mean"}) == expected | EPISODES | no_critic


def test_conversion_for_actor_critic() -> None:
    own = UNCHANGED | {"critic_fit": "before", "use_rms_prop": True, "normalize_advantage": False}
    params = SHARED | own | {"rollout": "steps", "n_episodes": 16, "one_minus_gae_lambda": 0.125}
    expected = CONVERTED | own | GAE
    assert SEARCHES["actor_critic"].convert(params) == expected
    assert SEARCHES["actor_critic"].convert(params | {"rollout": "episodes"}) == expected | EPISODES


def test_conversion_for_async_actor_critic() -> None:
    own = UNCHANGED | {"use_rms_prop": True, "normalize_advantage": False}
    params = SHARED | own | {"one_minus_gae_lambda": 0.125}
    expected = CONVERTED | own | {"gae_lambda": 0.875}
    del expected["n_episodes"]
    assert SEARCHES["async_actor_critic"].convert(params) == expected


TRUST_REGION = SHARED | {"one_minus_gae_lambda": 0.125, "batch_size_pow": 6, "target_kl": 0.02}
TRUST_REGION_CONVERTED = CONVERTED | GAE | {"batch_size": 64, "critic_batch_size": None, "target_kl": 0.02}


def test_conversion_for_natural_gradients() -> None:
    params = TRUST_REGION | {"cg_damping": 0.01}
    # the learning rate is the critic's, whatever a config file says
    expected = TRUST_REGION_CONVERTED | {"cg_damping": 0.01, "critic_learning_rate": None}
    assert SEARCHES["trpo"].convert(params) == expected
    assert SEARCHES["npg"].convert(params) == expected | {"step": "kl", "step_size": 0.1}


def test_conversion_for_kl_penalty_pg() -> None:
    own = UNCHANGED | {"n_epochs": 5, "dual_learning_rate": 30.0}
    expected = TRUST_REGION_CONVERTED | own | {"dual_update": "additive"}
    assert SEARCHES["kl_penalty_pg"].convert(TRUST_REGION | own) == expected
