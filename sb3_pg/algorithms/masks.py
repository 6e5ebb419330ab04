"""Action masks in the making of a model: whether to use them, and the wrapper of its envs."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_pg.action_masks import MASK_KEY, has_mask_key, mask_sizes, sources_of_masks
from sb3_pg.algorithms.callback_locals import callback_tree
from sb3_pg.envs import with_action_masks


class _Use(NamedTuple):
    """What is known of the model whose env is wrapped: ``use_action_masks``, and how it comes by the env."""

    masks: bool | None = None
    #: whether the env was given by its id
    by_id: bool = False
    #: whether the model was made before, so that ``masks`` is what it was made with
    is_made: bool = False


_UNKNOWN: Final = _Use()
#: SB3's constructor wraps the env by a class method, which does not know the model.
_USED: ContextVar[_Use] = ContextVar("used_masks", default=_UNKNOWN)


def used_masks() -> bool | None:
    """Return ``use_action_masks`` of the model whose env is wrapped."""
    return _USED.get().masks


@contextmanager
def using_masks(use: bool | None, by_id: bool = False, is_made: bool = False) -> Iterator[None]:
    """Context in which an env is wrapped for a model with this ``use_action_masks``.

    :param by_id: whether the env was given by its id
    :param is_made: whether the model was made before, so that the env must have masks or not as ``use`` says
    """
    token = _USED.set(_Use(use, by_id, is_made))
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
    use = _USED.get()
    if use.is_made and use.masks:
        return _with_masks_as_trained(env, "env")
    fitted = with_action_masks(env, use.masks, probe=is_new or use.by_id)
    if use.masks is None:
        _warn_of_misfit(fitted)
    return fitted


def _with_masks_as_trained(env: VecEnv, name: str) -> VecEnv:
    """Add masks to the observations of an env for a model that was made with masks.

    :param env: the env
    :param name: name of the env, for the error message
    :raises ValueError: it has no masks
    """
    fitted = with_action_masks(env, probe=True)
    if has_mask_key(fitted.observation_space, fitted.action_space):
        return fitted
    raise ValueError(
        f"{name} must give action masks, since the model was trained with them, by "
        f"{sources_of_masks(env.action_space)}; got observation_space {env.observation_space} and action_space "
        f"{env.action_space}"
    )


def _warn_of_misfit(env: VecEnv) -> None:
    """Warn of observations with the key of masks that are no masks of the actions."""
    space, actions = env.observation_space, env.action_space
    if not (isinstance(space, spaces.Dict) and MASK_KEY in space.spaces and mask_sizes(actions)):
        return
    if not has_mask_key(space, actions):
        warnings.warn(
            f"observation_space[{MASK_KEY!r}] is {space[MASK_KEY]}, which fits no masks of {actions}, and is an "
            f"observation as any other. Masks are a Box or MultiBinary of shape {(sum(mask_sizes(actions)),)}; "
            "use_action_masks=False ends this warning",
            stacklevel=2,
        )


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
            fitted = _with_masks_as_trained(watched, "eval_env") if uses_masks else with_action_masks(watched, False)
            one.eval_env = fitted  # type: ignore[attr-defined]
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
