"""Hyperparameter search: what Optuna tries, and how a trial becomes arguments of an algorithm.

rl_zoo3 calls the sampler for each new trial, and the converter alone when it reloads one (``--trial-id``). So all that
decides an argument is among the trial's own parameters, and the converter is a pure function of them.
"""

from typing import Any

import optuna
from torch import nn

NET_ARCH: dict[str, list[int]] = {"tiny": [32], "small": [64, 64], "medium": [256, 256]}
_ACTIVATION: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}

#: The step that target_kl means something for; a config file's step_size would contradict it.
_NPG: dict[str, Any] = {"step": "kl", "step_size": 0.1}


def sample_reinforce_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``Reinforce`` for one trial.

    Every trial suggests the same parameters, those of a critic that its baseline has no use for included: rl_zoo3's
    multivariate TPE draws at random whatever some trials lack.

    :param trial: Optuna's trial
    :param n_actions: dimensions of the action space, of no use here
    :param n_envs: number of environments, which ``n_episodes`` is a multiple of
    :param additional_args: for off-policy algorithms, of no use here
    :return: keyword arguments
    """
    del n_actions, additional_args
    params = {"baseline": trial.suggest_categorical("baseline", ["mean", "leave_one_out", "time", "linear", "value"])}
    params |= _suggest_pseudo_loss(trial, n_envs, n_steps_pow=(5, 11))
    return reported(trial, convert_reinforce_params(params))


def convert_reinforce_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``Reinforce`` from a trial's parameters.

    Arguments that exclude or need another one are set, if only to None: a config file's would remain beside them.

    :param sampled_params: the parameters that :func:`sample_reinforce_params` suggests, unchanged on return
    :return: keyword arguments
    """
    params = dict(sampled_params)
    params["baseline_kwargs"] = None
    if params["baseline"] != "value":  # no critic to fit, nor to cut an episode short with
        params |= {"rollout": "episodes", "critic_learning_rate": None, "n_critic_updates": 1, "truncation": None}
    return _convert_shared(params)


def sample_actor_critic_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``ActorCritic`` for one trial: generalized advantages, and a critic with an optimizer of its own.

    :param trial: Optuna's trial
    :param n_actions: dimensions of the action space, of no use here
    :param n_envs: number of environments, which ``n_episodes`` is a multiple of
    :param additional_args: for off-policy algorithms, of no use here
    :return: keyword arguments
    """
    del n_actions, additional_args
    params = {
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.005, 1.0, log=True),
        "critic_fit": trial.suggest_categorical("critic_fit", ["after", "before"]),
        "use_rms_prop": trial.suggest_categorical("use_rms_prop", [False, True]),
    }
    params |= _suggest_pseudo_loss(trial, n_envs, n_steps_pow=(3, 11))
    return reported(trial, convert_actor_critic_params(params))


def convert_actor_critic_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``ActorCritic`` from a trial's parameters.

    :param sampled_params: the parameters that :func:`sample_actor_critic_params` suggests, unchanged on return
    :return: keyword arguments
    """
    return _convert_shared(sampled_params)


def sample_npg_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``NPG`` for one trial; ``learning_rate`` is the critic's.

    The parameters are those of :func:`sample_trpo_params`.

    :return: keyword arguments
    """
    return sample_trpo_params(trial, n_actions, n_envs, additional_args) | _NPG


def convert_npg_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``NPG`` from a trial's parameters.

    :param sampled_params: the parameters that :func:`sample_npg_params` suggests, unchanged on return
    :return: keyword arguments
    """
    return convert_trpo_params(sampled_params) | _NPG


def sample_trpo_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``TRPO`` for one trial; ``learning_rate`` is the critic's.

    :param trial: Optuna's trial
    :param n_actions: dimensions of the action space, of no use here
    :param n_envs: number of environments, of no use here
    :param additional_args: for off-policy algorithms, of no use here
    :return: keyword arguments
    """
    del n_actions, n_envs, additional_args
    params = _suggest_trust_region(trial) | {"cg_damping": trial.suggest_float("cg_damping", 1e-3, 3.0, log=True)}
    return reported(trial, convert_trpo_params(params))


def convert_trpo_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``TRPO`` from a trial's parameters.

    :param sampled_params: the parameters that :func:`sample_trpo_params` suggests, unchanged on return
    :return: keyword arguments
    """
    return _convert_shared(sampled_params) | {"critic_learning_rate": None}


def sample_kl_penalty_pg_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of ``KLPenaltyPG`` for one trial, with gradient steps of the dual.

    :param trial: Optuna's trial
    :param n_actions: dimensions of the action space, of no use here
    :param n_envs: number of environments, of no use here
    :param additional_args: for off-policy algorithms, of no use here
    :return: keyword arguments
    """
    del n_actions, n_envs, additional_args
    params = _suggest_trust_region(trial) | _suggest_gradient_steps(trial)
    params |= {
        "n_epochs": trial.suggest_int("n_epochs", 1, 20),
        "dual_learning_rate": trial.suggest_float("dual_learning_rate", 1.0, 500.0, log=True),
    }
    return reported(trial, convert_kl_penalty_pg_params(params))


def convert_kl_penalty_pg_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``KLPenaltyPG`` from a trial's parameters.

    :param sampled_params: the parameters that :func:`sample_kl_penalty_pg_params` suggests, unchanged on return
    :return: keyword arguments
    """
    return _convert_shared(sampled_params) | {"dual_update": "additive"}  # dual_learning_rate is of no other


def _suggest_trust_region(trial: optuna.Trial) -> dict[str, Any]:
    """What every algorithm with a limit of the KL searches; generalized advantages of segments."""
    return _suggest_shared(trial, n_steps_pow=(5, 11)) | {
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.005, 1.0, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "target_kl": trial.suggest_float("target_kl", 1e-3, 0.2, log=True),
    }


def _suggest_pseudo_loss(trial: optuna.Trial, n_envs: int, n_steps_pow: tuple[int, int]) -> dict[str, Any]:
    """What every algorithm with one gradient step per batch searches; complete episodes or segments."""
    params = {
        "rollout": trial.suggest_categorical("rollout", ["episodes", "steps"]),
        "n_episodes": trial.suggest_categorical("n_episodes", multiples(n_envs)),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
    }
    return params | _suggest_shared(trial, n_steps_pow) | _suggest_gradient_steps(trial)


def _suggest_gradient_steps(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-2, log=True),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
    }


def _suggest_shared(trial: optuna.Trial, n_steps_pow: tuple[int, int]) -> dict[str, Any]:
    """What every algorithm with a critic searches: batch, step size, discount, exploration and nets."""
    return {
        "n_steps_pow": trial.suggest_int("n_steps_pow", *n_steps_pow),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-2, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 1, 20),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "log_std_init": trial.suggest_float("log_std_init", -2.0, 0.5),  # without effect on discrete actions
    } | suggest_nets(trial)


def suggest_nets(trial: optuna.Trial) -> dict[str, Any]:
    """Size and activation of actor and critic."""
    return {
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCH)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(_ACTIVATION)),
    }


def _convert_shared(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Arguments in place of the parameters that go by another name, and the others as they are."""
    params = with_nets(sampled_params)
    params["policy_kwargs"]["log_std_init"] = params.pop("log_std_init")
    if "one_minus_gae_lambda" in params:
        # lambda means something for these alone, whatever a config file says
        params |= {"gae_lambda": 1 - params.pop("one_minus_gae_lambda"), "advantage": "gae", "critic_target": None}
    if "batch_size_pow" in params:
        params |= {"batch_size": 2 ** params.pop("batch_size_pow"), "critic_batch_size": None}
    n_steps = 2 ** params.pop("n_steps_pow")
    in_steps = params.pop("rollout", "steps") == "steps"
    return params | ({"n_episodes": None, "n_steps": n_steps} if in_steps else {"n_steps": None})


def with_nets(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with gamma and ``policy_kwargs`` in place of those that they are made of."""
    params = dict(sampled_params)
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    net_arch = NET_ARCH[params.pop("net_arch")]
    activation = _ACTIVATION[params.pop("activation_fn")]
    params["policy_kwargs"] = {"net_arch": {"pi": net_arch, "vf": net_arch}, "activation_fn": activation}
    return params


def reported(trial: optuna.Trial, hyperparams: dict[str, Any]) -> dict[str, Any]:
    """The same; those that go by another name in the trial are written beside its parameters.

    Optuna reports the parameters, the user wants the arguments.
    """
    for name in ("gamma", "gae_lambda", "batch_size", "n_episodes", "n_steps", "train_freq", "buffer_trajectories"):
        if name in hyperparams:
            trial.set_user_attr(name, hyperparams[name])
    return hyperparams


def multiples(n_envs: int) -> list[int]:
    """Batches of about 8 to 64 episodes that ``n_envs`` divides; at least two, for what leaves one out."""
    return sorted({-(-target // n_envs) * n_envs for target in (8, 16, 32, 64)})
