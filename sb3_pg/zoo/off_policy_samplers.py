"""Hyperparameter search of the algorithms that replay; the rules are those of :mod:`sb3_pg.zoo.samplers`."""

from typing import Any

import optuna

from sb3_pg.zoo.samplers import NET_ARCH, multiples, reported, suggest_nets, with_nets


def sample_off_policy_pg_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``OffPolicyPG`` for one trial: complete episodes, and how they are weighted and replayed.

    :param trial: Optuna's trial
    :param n_actions: dimensions of the action space, of no use here
    :param n_envs: number of environments, which the number of episodes is a multiple of
    :param additional_args: of rl_zoo3's off-policy algorithms, of no use here
    :return: keyword arguments
    """
    del n_actions, additional_args
    params = {
        "ratio": trial.suggest_categorical("ratio", ["per_step", "prefix", "per_decision", "trajectory"]),
        "max_ratio": trial.suggest_float("max_ratio", 1.0, 10.0, log=True),
        "self_normalize": trial.suggest_categorical("self_normalize", [False, True]),
        "baseline": trial.suggest_categorical("baseline", ["leave_one_out", "value"]),
        "n_episodes": trial.suggest_categorical("n_episodes", multiples(n_envs)),
        "replayed": trial.suggest_int("replayed", 0, 7),
        "gradient_steps": trial.suggest_int("gradient_steps", 1, 10),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-2, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 1, 10),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
    }
    return reported(trial, convert_off_policy_pg_params(params | suggest_nets(trial)))


def convert_off_policy_pg_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``OffPolicyPG`` from a trial's parameters.

    :param sampled_params: the parameters that :func:`sample_off_policy_pg_params` suggests, unchanged on return
    :return: keyword arguments
    """
    params = with_nets(sampled_params)
    n_episodes = params.pop("n_episodes")
    params["train_freq"] = (n_episodes, "episode")
    params["buffer_trajectories"] = n_episodes * (1 + params.pop("replayed"))
    params |= {"batch_size": None, "baseline_kwargs": None}
    if params["baseline"] != "value":  # no critic to fit, nor to value a time limit with
        params |= {"critic_learning_rate": None, "n_critic_updates": 1, "truncation": None}
    return params


def sample_off_pac_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``OffPAC`` for one trial, with the actor's gradient that suits the action space.

    :param trial: Optuna's trial
    :param n_actions: dimensions of the action space, of no use here
    :param n_envs: number of environments, of no use here
    :param additional_args: of rl_zoo3's off-policy algorithms, of no use here
    :return: keyword arguments
    """
    del n_actions, n_envs, additional_args
    params = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        "ent_coef": trial.suggest_float("ent_coef", 1e-4, 1.0, log=True),
        "tau": trial.suggest_float("tau", 1e-3, 0.1, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 8),
        "learning_starts": trial.suggest_categorical("learning_starts", [100, 1000, 5000]),
    }
    return reported(trial, convert_off_pac_params(params | suggest_nets(trial)))


def convert_off_pac_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``OffPAC`` from a trial's parameters: as many gradient steps as env steps.

    :param sampled_params: the parameters that :func:`sample_off_pac_params` suggests, unchanged on return
    :return: keyword arguments
    """
    params = with_nets(sampled_params)
    params["policy_kwargs"]["net_arch"] = NET_ARCH[sampled_params["net_arch"]]
    params["batch_size"] = 2 ** params.pop("batch_size_pow")
    return params | {"gradient_steps": params["train_freq"]}
