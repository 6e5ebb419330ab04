"""Tables of arguments that several algorithms share: the default, check and documentation of each."""

import math
from typing import Any, Literal, TypedDict

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.learners import critic_fit, require_valid_anchor, uses_critic
from sb3_pg.algorithms.validation import Group
from sb3_pg.learner import Anchor
from sb3_pg.policies import Memory, takes_other_numbers, to_memory

# -------------------------------------------------------------------- arguments of every policy gradient


class NewSharedArguments(TypedDict, total=False):
    """Keyword arguments that every policy-gradient algorithm has, and SB3's A2C does not."""

    state_discount: bool
    truncation: Literal["bootstrap", "terminal"] | None
    critic_batch_size: int | None
    critic_fit: Literal["after", "before"]
    critic_warmup_updates: int
    normalize_value_targets: bool
    max_episode_steps: int
    on_nonfinite: Literal["raise", "skip"]
    act_device: th.device | str | None
    memory: Memory | Literal["lstm", "gru"] | dict[str, Any] | None
    use_action_masks: bool | None
    anchor: Anchor | None


class SB3Arguments(TypedDict, total=False):
    """Keyword arguments of every algorithm of SB3."""

    use_sde: bool
    sde_sample_freq: int
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: th.device | str
    _init_setup_model: bool


class CommonArguments(NewSharedArguments, SB3Arguments, total=False):
    """Keyword arguments of every policy-gradient algorithm, without those of the critic's training."""

    gamma: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float | None
    normalize_advantage: bool


def _check_memory(_name: str, value: Any) -> None:
    to_memory(value)


def _check_anchor(name: str, value: Any) -> None:
    if value is not None:
        if not isinstance(value, Anchor):
            raise TypeError(f"{name} must be a KLAnchor, a DemonstrationLoss or None, got {value!r}")
        require_valid_anchor(value)


def _check_shared(model: Any) -> None:
    critic = uses_critic(model)
    if model.truncation == "bootstrap" and not critic:
        raise ValueError(
            "truncation='bootstrap' takes a critic to value truncated episodes: use baseline='value', or "
            "truncation='terminal'"
        )
    if model.critic_batch_size is not None and critic and not critic_fit(model).own_steps:
        raise ValueError(
            f"critic_batch_size={model.critic_batch_size} is for a critic with an optimizer of its own: set "
            "critic_learning_rate or n_critic_updates"
        )
    if (model.normalize_value_targets or model.critic_warmup_updates) and not critic:
        raise ValueError("normalize_value_targets and critic_warmup_updates are for a critic, and none is in use")


def _shared_without_effect(model: Any) -> dict[str, str]:
    if not model.learner.estimator.requires_critic:
        names = ("critic_learning_rate", "n_critic_updates", "critic_batch_size", "vf_coef")
        return dict.fromkeys(names, "no critic in use")
    if not model.learner.critic_in_step:
        return {"vf_coef": "a critic that has an optimizer of its own and shares no features with the actor"}
    return {}


SHARED = Group(
    """
    :param gamma: discount per env step, in [0, 1]
    :param ent_coef: weight of the entropy bonus, reward units per nat
    :param vf_coef: weight of the critic's loss, if one optimizer trains actor and critic, or if they share features
    :param max_grad_norm: largest norm of the gradient that ``policy.optimizer`` steps along, None for no clipping
    :param state_discount: whether each step's term in the gradient has the factor gamma^t
    :param normalize_advantage: whether to shift and scale each batch of advantages to mean 0 and standard deviation 1
    :param truncation: "bootstrap" counts the value of the last state where a time limit cuts an episode, "terminal"
        treats the time limit as part of the task; None is bootstrap where a critic is in use, and terminal elsewhere
    :param critic_learning_rate: step size or schedule of the critic's own optimizer; None for no own optimizer
    :param n_critic_updates: passes of the critic over each batch; more than 1 gives it an optimizer of its own
    :param critic_batch_size: samples per step of the critic's own optimizer, None for the whole batch
    :param critic_fit: "after" trains the critic (or fits the baseline) after the advantages are computed. "before"
        fits it to the batch before, as the slides' batch actor-critic does. This is biased, and gives the critic an
        optimizer of its own. Changes that a callback makes to the advantages count only with "after"
    :param critic_warmup_updates: number of updates at the start in which only the critic is trained
    :param normalize_value_targets: whether to train the critic on targets divided by their running standard deviation.
        Its values are multiplied by it (``value_scale``) wherever they are used
    :param max_episode_steps: longest episode that is waited for, env steps; a longer one is an error. It counts where
        complete episodes are collected, and in :class:`~sb3_pg.OffPolicyPG`, which learns only from complete episodes
    :param on_nonfinite: what to do if a number is NaN or infinite: "raise" a :class:`~sb3_pg.NonFiniteError`, or "skip"
        the update with a warning. Then NaN from a reset leads to another reset, up to 10 times in a row
    :param act_device: device that computes actions, with a copy of the policy that is updated before each rollout; None
        for ``device``. With small networks and ``device="cuda"``, "cpu" acts faster. A policy with hooks or replaced
        methods is not copied: it acts on ``device``, with a warning
    :param memory: recurrent layers between features and networks, so that actions depend on all observations of the
        episode: "lstm", "gru", a :class:`~sb3_pg.Memory`, or a dict of its arguments; None for no memory
    :param use_action_masks: whether the env says which actions are allowed, so that others get probability 0. None uses
        masks where the env has a method ``action_masks()`` (as in sb3-contrib), Dict observations with a key
        "action_mask", or "action_mask" in its infos. (Infos are seen if the env is given by its id, has been reset
        before, or has an attribute ``action_mask``; otherwise give True.) True requires masks, False ignores them. The
        networks see the mask with ``policy_kwargs={"observe_masks": True}`` and "MultiInputPolicy" only
    :param anchor: holds the policy near what it was pretrained to: a :class:`~sb3_pg.KLAnchor` or a
        :class:`~sb3_pg.DemonstrationLoss`; None for nothing. The model keeps a copy of it, ``model.anchor``
    """,
    {
        "gamma": (0.99, arg.real(0, 1)),
        "ent_coef": (0.0, arg.real(0)),
        "vf_coef": (0.5, arg.real(0)),
        "max_grad_norm": (0.5, arg.unless(math.inf, check=arg.positive(optional=True))),
        "state_discount": (False, arg.instance(bool)),
        "normalize_advantage": (False, arg.instance(bool)),
        "truncation": (None, arg.choice("bootstrap", "terminal", optional=True)),
        "critic_learning_rate": (None, arg.schedule(optional=True)),
        "n_critic_updates": (1, arg.integer(1)),
        "critic_batch_size": (None, arg.integer(1, optional=True)),
        "critic_fit": ("after", arg.choice("after", "before")),
        "critic_warmup_updates": (0, arg.integer(0)),
        "normalize_value_targets": (False, arg.instance(bool)),
        "max_episode_steps": (100_000, arg.integer(1)),
        "on_nonfinite": ("raise", arg.choice("raise", "skip")),
        "act_device": (None, arg.unless(None, check=arg.device)),
        "memory": (None, _check_memory),
        "use_action_masks": (None, arg.instance(bool, optional=True)),
        "anchor": (None, _check_anchor),
    },
    check=_check_shared,
    without_effect=_shared_without_effect,
    tolerated=frozenset({"critic_learning_rate", "n_critic_updates", "critic_batch_size", "vf_coef"}),
)


# -------------------------------------------------------------------- arguments of on-policy algorithms


class OnPolicyArguments(CommonArguments, total=False):
    """Keyword arguments of every on-policy algorithm, without those of the critic's training."""

    n_steps: int | None
    n_episodes: int | None
    gae_lambda: float
    rollout_buffer_class: type[RolloutBuffer] | None
    rollout_buffer_kwargs: dict[str, Any] | None


def _check_on_policy(model: Any) -> None:
    if model.n_steps is not None and model.n_episodes is not None:
        raise ValueError(
            f"n_steps and n_episodes exclude each other, got n_steps={model.n_steps} and "
            f"n_episodes={model.n_episodes}: segments of fixed length, or complete episodes; set the other to None"
        )
    model.check_segments("n_steps", model.n_steps)
    if not model.has_foreign_buffer:
        return
    name = f"rollout_buffer_class={model.rollout_buffer_class}"
    if getattr(model.env, "next_step_autoreset", False):
        raise ValueError(
            f"{name} cannot leave out the steps that only reset an env, which the env has (NEXT_STEP): use another "
            "autoreset mode"
        )
    if model.n_steps is None:
        raise ValueError(f"{name} is filled by SB3's own contract, which has segments only: give n_steps=")
    if model.memory is not None:
        raise ValueError(f"{name} holds single steps, not the sequences that memory={model.memory!r} is run over")
    if model.critic_fit == "before" or model.truncation == "terminal":
        raise ValueError(
            f"{name} computes advantages itself, once, and bootstraps truncated episodes: it takes neither "
            "critic_fit='before' nor truncation='terminal'"
        )
    if takes_other_numbers(model.action_space):
        raise ValueError(
            f"{name} is filled by SB3's own loop, which neither rounds actions nor counts them from a start: it does "
            f"not take action_space {model.action_space}"
        )
    if model.state_discount or model.normalize_value_targets:
        raise ValueError(
            f"{name} knows neither each step's index nor a scale of the critic's values: it takes neither "
            "state_discount nor normalize_value_targets"
        )


def _on_policy_without_effect(model: Any) -> dict[str, str]:
    unused = {}
    if model.n_steps is not None:
        unused["max_episode_steps"] = f"n_steps={model.n_steps}, which cuts episodes: give n_steps=None"
    if model.has_foreign_buffer:
        unused["act_device"] = f"rollout_buffer_class={model.rollout_buffer_class}, which the policy itself fills"
    return unused


ON_POLICY = Group(
    """
    :param n_steps: steps per env and update: segments of episodes, whose ends are bootstrapped with the critic's value
    :param n_episodes: complete episodes per update, a multiple of the number of envs; excludes ``n_steps``. If both are
        None: 8, rounded up to a multiple of the number of envs
    :param gae_lambda: lambda of generalized advantage estimation, in [0, 1], if the algorithm or a foreign buffer
        uses it
    :param rollout_buffer_class: class of the rollout buffer. One that is not from this package is filled step by step,
        as SB3 does
    :param rollout_buffer_kwargs: further arguments of the rollout buffer
    """,
    {
        "n_steps": (None, arg.integer(1, optional=True)),
        "n_episodes": (None, arg.integer(1, optional=True)),
        "gae_lambda": (1.0, arg.real(0, 1)),
        "rollout_buffer_class": (None, arg.subclass(RolloutBuffer)),
        "rollout_buffer_kwargs": (None, arg.instance(dict, optional=True)),
    },
    check=_check_on_policy,
    without_effect=_on_policy_without_effect,
    tolerated=frozenset({"gae_lambda", "max_episode_steps"}),
)
