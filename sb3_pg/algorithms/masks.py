"""Action masks in the making of a model: whether to use them, and the wrapper of its envs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.action_masks import has_mask_key
from sb3_pg.algorithms.callback_locals import callback_tree
from sb3_pg.envs import with_action_masks

#: ``use_action_masks`` of the model whose env is wrapped, and whether the env was given by its id. SB3's constructor
#: wraps the env by a class method, which does not know the model.
_USED: ContextVar[tuple[bool | None, bool]] = ContextVar("used_masks", default=(None, False))


def used_masks() -> bool | None:
    """Return ``use_action_masks`` of the model whose env is wrapped."""
    return _USED.get()[0]


@contextmanager
def using_masks(use: bool | None, by_id: bool = False) -> Iterator[None]:
    """Context in which an env is wrapped for a model with this ``use_action_masks``.

    :param by_id: whether the env was given by its id
    """
    token = _USED.set((use, by_id))
    try:
        yield
    finally:
        _USED.reset(token)


def with_masks(env: VecEnv, is_new: bool) -> VecEnv:
    """Add action masks to the observations of an env that has some, if the model is to use them.

    :param env: the env with all its wrappers
    :param is_new: whether the env was made just now, so that one reset more does not matter
    :raises ValueError: masks are required and not found
    """
    use, by_id = _USED.get()
    return with_action_masks(env, use, probe=is_new or by_id)


def masks_of(data: Mapping[str, Any], given: Any) -> bool | None:
    """Return whether the env of a model with these attributes must have masks; None if the model has had no env.

    :param data: attributes of a model
    :param given: value of ``use_action_masks`` in a call of ``load``, or None
    :raises ValueError: it contradicts the attributes
    """
    use: bool | None = data.get("use_action_masks")
    observation_space, action_space = data.get("observation_space"), data.get("action_space")
    if observation_space is None or action_space is None:
        return use
    uses = use is not False and has_mask_key(observation_space, action_space)
    if given is not None and given != uses:
        raise ValueError(f"use_action_masks must be {uses}, as when the model was made, got {given!r}")
    return uses


def fit_evaluations(callback: Any, uses_masks: bool) -> None:
    """Add masks to the observations of the envs of EvalCallbacks, or take out those that ``make_vec_env`` has added.

    :param callback: argument of ``learn``
    :param uses_masks: whether the model was made with masks
    :raises ValueError: it was, and such an env has none
    """
    given = callback if isinstance(callback, list) else [callback]
    for one in [one for root in given if isinstance(root, BaseCallback) for one in callback_tree(root, set())]:
        if isinstance(one, EventCallback) and isinstance(env := getattr(one, "eval_env", None), VecEnv):
            one.eval_env = with_action_masks(env, use=uses_masks)  # type: ignore[attr-defined]  # of an EvalCallback
