"""Hyperparameter search: what Optuna tries, and how a trial becomes arguments of an algorithm.

rl_zoo3 calls the sampler for each new trial, and only the converter when it reloads a trial (``--trial-id``). So the
converter is a pure function of the trial's parameters, which decide every argument. Every trial of an algorithm
suggests the same parameters, even those without effect in this trial, because rl_zoo3's multivariate TPE draws
parameters at random that some trials lack. Arguments that exclude or need another one are always set, if only to None,
because those of a config file would remain otherwise.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import optuna
from torch import nn

Params = dict[str, Any]
_NET_ARCH: Final[Mapping[str, list[int]]] = {"tiny": [32], "small": [64, 64], "medium": [256, 256]}
_ACTIVATION: Final[Mapping[str, type[nn.Module]]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
#: Arguments that are computed from parameters of another name. They are added to the parameters that Optuna reports.
_REPORTED: Final = ["gamma", "gae_lambda", "batch_size", "n_episodes", "n_steps", "train_freq", "buffer_trajectories"]


class Search(NamedTuple):
    """The search space of an algorithm.

    :param suggest: takes a trial and the number of envs, and returns the trial's parameters, name -> value
    :param convert: takes a trial's parameters, which it leaves unchanged, and returns the algorithm's keyword arguments
    """

    suggest: Callable[[optuna.Trial, int], Params]
    convert: Callable[[Params], Params]

    def sample(self, trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Params) -> Params:
        """Return keyword arguments for one trial. The signature is that of rl_zoo3's samplers.

        :param trial: Optuna's trial
        :param n_actions: dimensions of the action space, not used
        :param n_envs: number of environments; numbers of episodes are multiples of it
        :param additional_args: arguments of rl_zoo3's off-policy algorithms, not used
        :return: keyword arguments
        """
        del n_actions, additional_args
        params = self.convert(self.suggest(trial, n_envs))
        for name in _REPORTED:
            if name in params:
                trial.set_user_attr(name, params[name])
        return params


# -------------------------------------------------------------------- parts


def _suggest_common(trial: optuna.Trial, n_envs: int = 1, largest_rate: float = 3e-2) -> Params:
    """Suggest step size, discount, and size and activation of the networks."""
    del n_envs
    return {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-4, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", largest_rate / 300, largest_rate, log=True),
        "net_arch": trial.suggest_categorical("net_arch", list(_NET_ARCH)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(_ACTIVATION)),
    }


def _convert_common(sampled_params: Params) -> Params:
    """Replace the parameters of gamma and ``policy_kwargs`` by these."""
    params = dict(sampled_params)
    params["gamma"] = 1 - params.pop("one_minus_gamma")
    net_arch, activation = _NET_ARCH[params.pop("net_arch")], _ACTIVATION[params.pop("activation_fn")]
    params["policy_kwargs"] = {"net_arch": net_arch, "activation_fn": activation}
    return params


def _suggest_on_policy(trial: optuna.Trial, least_n_steps_pow: int) -> Params:
    """Suggest the parameters of every on-policy algorithm with a critic."""
    return _suggest_common(trial) | {
        "n_steps_pow": trial.suggest_int("n_steps_pow", least_n_steps_pow, 11),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 1, 20),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "log_std_init": trial.suggest_float("log_std_init", -2.0, 0.5),  # without effect on discrete actions
    }


def _suggest_pseudo_loss(trial: optuna.Trial, n_envs: int, least_n_steps_pow: int) -> Params:
    """Suggest the parameters of every algorithm with one gradient step per batch of episodes or segments."""
    return (
        {
            "rollout": trial.suggest_categorical("rollout", ["episodes", "steps"]),
            "n_episodes": trial.suggest_categorical("n_episodes", _multiples(n_envs)),
            "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        }
        | _suggest_on_policy(trial, least_n_steps_pow)
        | _suggest_gradient_steps(trial)
    )


def _suggest_trust_region(trial: optuna.Trial) -> Params:
    """Suggest the parameters of every algorithm with a limit of the KL and generalized advantages of segments."""
    return _suggest_on_policy(trial, least_n_steps_pow=5) | {
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.005, 1.0, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 10),
        "target_kl": trial.suggest_float("target_kl", 1e-3, 0.2, log=True),
    }


def _suggest_gradient_steps(trial: optuna.Trial) -> Params:
    return {
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-2, log=True),
        "max_grad_norm": trial.suggest_float("max_grad_norm", 0.3, 2.0),
    }


def _convert_on_policy(sampled_params: Params) -> Params:
    """Replace the parameters that go by another name than their arguments."""
    params = _convert_common(sampled_params)
    params["policy_kwargs"]["log_std_init"] = params.pop("log_std_init")
    if "one_minus_gae_lambda" in params:
        # lambda has an effect only with these values; a config file may have others
        params |= {"gae_lambda": 1 - params.pop("one_minus_gae_lambda"), "advantage": "gae", "critic_target": None}
    if "batch_size_pow" in params:
        params |= {"batch_size": 2 ** params.pop("batch_size_pow"), "critic_batch_size": None}
    n_steps = 2 ** params.pop("n_steps_pow")
    in_steps = params.pop("rollout", "steps") == "steps"
    return params | ({"n_episodes": None, "n_steps": n_steps} if in_steps else {"n_steps": None})


def _multiples(n_envs: int) -> list[int]:
    """Return multiples of ``n_envs``, about 8 to 64."""
    return sorted({-(-target // n_envs) * n_envs for target in (8, 16, 32, 64)})


# -------------------------------------------------------------------- algorithms


def _suggest_reinforce(trial: optuna.Trial, n_envs: int) -> Params:
    baselines = ["mean", "leave_one_out", "time", "linear", "value"]
    return {"baseline": trial.suggest_categorical("baseline", baselines)} | _suggest_pseudo_loss(trial, n_envs, 5)


def _convert_reinforce(sampled_params: Params) -> Params:
    params = sampled_params | {"baseline_kwargs": None}
    if params["baseline"] != "value":  # no critic to fit, nor to cut an episode short with
        params |= {"rollout": "episodes", "critic_learning_rate": None, "n_critic_updates": 1, "truncation": None}
    return _convert_on_policy(params)


def _suggest_actor_critic(trial: optuna.Trial, n_envs: int) -> Params:
    """Suggest generalized advantages, and a critic with an optimizer of its own."""
    return {
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.005, 1.0, log=True),
        "critic_fit": trial.suggest_categorical("critic_fit", ["after", "before"]),
        "use_rms_prop": trial.suggest_categorical("use_rms_prop", [False, True]),
    } | _suggest_pseudo_loss(trial, n_envs, 3)


def _suggest_async_actor_critic(trial: optuna.Trial, n_envs: int) -> Params:
    """Suggest fragments, and a critic with an optimizer of its own."""
    del n_envs
    return (
        {
            "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.005, 1.0, log=True),
            "use_rms_prop": trial.suggest_categorical("use_rms_prop", [False, True]),
            "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        }
        | _suggest_on_policy(trial, least_n_steps_pow=4)
        | _suggest_gradient_steps(trial)
    )


def _convert_async_actor_critic(sampled_params: Params) -> Params:
    params = _convert_on_policy(sampled_params)
    return {name: value for name, value in params.items() if name not in ("n_episodes", "advantage", "critic_target")}


def _suggest_trpo(trial: optuna.Trial, n_envs: int) -> Params:
    """``learning_rate`` is the critic's."""
    del n_envs
    return _suggest_trust_region(trial) | {"cg_damping": trial.suggest_float("cg_damping", 1e-3, 3.0, log=True)}


def _convert_trpo(sampled_params: Params) -> Params:
    return _convert_on_policy(sampled_params) | {"critic_learning_rate": None}


def _convert_npg(sampled_params: Params) -> Params:
    # target_kl has an effect only with this step; a config file's step_size would contradict it
    return _convert_trpo(sampled_params) | {"step": "kl", "step_size": 0.1}


def _suggest_kl_penalty_pg(trial: optuna.Trial, n_envs: int) -> Params:
    del n_envs
    return (
        _suggest_trust_region(trial)
        | _suggest_gradient_steps(trial)
        | {
            "n_epochs": trial.suggest_int("n_epochs", 1, 20),
            "dual_learning_rate": trial.suggest_float("dual_learning_rate", 1.0, 500.0, log=True),
        }
    )


def _convert_kl_penalty_pg(sampled_params: Params) -> Params:
    return _convert_on_policy(sampled_params) | {"dual_update": "additive"}  # the one that has a dual_learning_rate


def _suggest_off_policy_pg(trial: optuna.Trial, n_envs: int) -> Params:
    """Suggest a number of complete episodes, and how they are weighted and replayed."""
    return _suggest_common(trial) | {
        "ratio": trial.suggest_categorical("ratio", ["per_step", "prefix", "per_decision", "trajectory"]),
        "max_ratio": trial.suggest_float("max_ratio", 1.0, 10.0, log=True),
        "self_normalize": trial.suggest_categorical("self_normalize", [False, True]),
        "baseline": trial.suggest_categorical("baseline", ["leave_one_out", "value"]),
        "n_episodes": trial.suggest_categorical("n_episodes", _multiples(n_envs)),
        "replayed": trial.suggest_int("replayed", 0, 7),
        "gradient_steps": trial.suggest_int("gradient_steps", 1, 10),
        "normalize_advantage": trial.suggest_categorical("normalize_advantage", [False, True]),
        "critic_learning_rate": trial.suggest_float("critic_learning_rate", 1e-4, 3e-2, log=True),
        "n_critic_updates": trial.suggest_int("n_critic_updates", 1, 10),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
    }


def _convert_off_policy_pg(sampled_params: Params) -> Params:
    params = _convert_common(sampled_params)
    n_episodes = params.pop("n_episodes")
    params["train_freq"] = (n_episodes, "episode")
    params["buffer_trajectories"] = n_episodes * (1 + params.pop("replayed"))
    params |= {"batch_size": None, "baseline_kwargs": None}
    if params["baseline"] != "value":  # no critic to fit, nor to value a time limit with
        params |= {"critic_learning_rate": None, "n_critic_updates": 1, "truncation": None}
    return params


def _suggest_off_pac(trial: optuna.Trial, n_envs: int) -> Params:
    del n_envs
    return _suggest_common(trial, largest_rate=3e-3) | {
        "batch_size_pow": trial.suggest_int("batch_size_pow", 5, 9),
        "ent_coef": trial.suggest_float("ent_coef", 1e-4, 1.0, log=True),
        "tau": trial.suggest_float("tau", 1e-3, 0.1, log=True),
        "train_freq": trial.suggest_int("train_freq", 1, 8),
        "learning_starts": trial.suggest_categorical("learning_starts", [100, 1000, 5000]),
    }


def _convert_off_pac(sampled_params: Params) -> Params:
    """Set as many gradient steps as env steps."""
    params = _convert_common(sampled_params)
    params["batch_size"] = 2 ** params.pop("batch_size_pow")
    return params | {"gradient_steps": params["train_freq"]}


#: Search space of an algorithm that has none of its own.
COMMON: Final = Search(_suggest_common, _convert_common)
SEARCHES: Final[Mapping[str, Search]] = {
    "reinforce": Search(_suggest_reinforce, _convert_reinforce),
    "actor_critic": Search(_suggest_actor_critic, _convert_on_policy),
    "async_actor_critic": Search(_suggest_async_actor_critic, _convert_async_actor_critic),
    "npg": Search(_suggest_trpo, _convert_npg),
    "trpo": Search(_suggest_trpo, _convert_trpo),
    "kl_penalty_pg": Search(_suggest_kl_penalty_pg, _convert_kl_penalty_pg),
    "off_policy_pg": Search(_suggest_off_policy_pg, _convert_off_policy_pg),
    "off_pac": Search(_suggest_off_pac, _convert_off_pac),
}
"""Name of an algorithm to its search space."""
