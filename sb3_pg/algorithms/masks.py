"""Action masks in the making of a model: whether to use them, and the wrapper of its envs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

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


def fit_evaluations(callback: Any, uses_masks: bool, env: VecEnv) -> None:
    """Add masks to the observations of the envs of EvalCallbacks, or take out those that ``make_vec_env`` has added.

    :param callback: argument of ``learn``
    :param uses_masks: whether the model was made with masks
    :param env: the model's env
    :raises ValueError: it was made with masks, and such an env has none, or has its wrappers in another order
    """
    given = callback if isinstance(callback, list) else [callback]
    for one in [one for root in given if isinstance(root, BaseCallback) for one in callback_tree(root, set())]:
        if isinstance(one, EventCallback) and isinstance(watched := getattr(one, "eval_env", None), VecEnv):
            one.eval_env = fitted = with_action_masks(watched, use=uses_masks)  # type: ignore[attr-defined]
            if uses_masks:
                _require_same_order(fitted, env)


def _require_same_order(watched: VecEnv, env: VecEnv) -> None:
    """Require that an EvalCallback can copy the statistics of a VecNormalize, which masks may be inside or around."""
    theirs, ours = _wrappers(watched), _wrappers(env)
    places = [i for i, wrapper in enumerate(ours) if issubclass(wrapper, VecNormalize)]
    if any(i >= len(theirs) or not issubclass(theirs[i], VecNormalize) for i in places):
        orders = [[wrapper.__name__ for wrapper in wrappers] for wrappers in (ours, theirs)]
        raise ValueError(
            f"eval_env must have its VecNormalize where the model's env has it, among {orders[0]} from the outermost "
            f"to the innermost, got {orders[1]}: make both envs in the same way"
        )


def _wrappers(env: VecEnv) -> list[type[VecEnvWrapper]]:
    """Return the kinds of an env's wrappers, from the outermost to the innermost."""
    found = []
    while isinstance(env, VecEnvWrapper):
        found.append(type(env))
        env = env.venv
    return found
