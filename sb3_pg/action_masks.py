"""Action masks: which actions an env allows. Their layout, and the names under which envs give them.

A mask has one entry per choice, True where it is allowed, as in sb3-contrib: n entries for Discrete, the sum of
``nvec`` for MultiDiscrete, and 2 n for MultiBinary: of each bit whether 0, and whether 1 is allowed.
"""

from typing import Any, Final

import numpy as np
from gymnasium import spaces

#: Key of the mask in Dict observations and in infos.
MASK_KEY: Final = "action_mask"
#: Method of an env that returns its present mask.
MASK_METHOD: Final = "action_masks"


def mask_sizes(action_space: spaces.Space[Any]) -> list[int]:
    """Return the number of choices in each action dimension; empty for a Box, which has no masks.

    :param action_space: action space
    """
    if isinstance(action_space, spaces.Discrete):
        return [int(action_space.n)]
    if isinstance(action_space, spaces.MultiDiscrete):
        return [int(n) for n in action_space.nvec.flatten()]
    if isinstance(action_space, spaces.MultiBinary):
        return [2] * int(np.prod(action_space.shape))
    return []


def mask_starts(action_space: spaces.Space[Any]) -> np.ndarray:
    """Return the index of each action dimension's first entry in a mask, ``(n_dimensions,)``."""
    sizes = mask_sizes(action_space)
    return np.cumsum([0, *sizes])[:-1]


def has_mask_key(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> bool:
    """Whether observations are a Dict with the key "action_mask", whose space fits the actions.

    :param observation_space: observation space
    :param action_space: action space
    """
    if not isinstance(observation_space, spaces.Dict) or MASK_KEY not in observation_space.spaces:
        return False
    space, n_masks = observation_space[MASK_KEY], sum(mask_sizes(action_space))
    return isinstance(space, spaces.MultiBinary | spaces.Box) and n_masks > 0 and space.shape == (n_masks,)


def sources_of_masks(action_space: spaces.Space[Any]) -> str:
    """Return where an env may give masks for these actions, or which actions have masks, for error messages.

    :param action_space: action space
    """
    n_masks = sum(mask_sizes(action_space))
    if not n_masks:
        return "Discrete, MultiDiscrete or MultiBinary actions"
    return (
        f"a method {MASK_METHOD}(), or an entry {MASK_KEY!r}: in infos an array of shape {(n_masks,)}, in Dict "
        f"observations a Box or MultiBinary of shape {(n_masks,)}"
    )


def require_masks(name: str, masks: Any, action_space: spaces.Space[Any], of_one_env: bool = False) -> np.ndarray:
    """Return masks as an array of bool.

    :param name: what they are, for the error message
    :param masks: the masks
    :param action_space: action space
    :param of_one_env: whether it is what a single env has given. Otherwise wrappers of envs may have changed it
    :return: ``(n_rows, n_masks)``, or ``(n_masks,)`` if one was given or ``of_one_env`` is True
    :raises ValueError: they have another shape, or hold other values than 0 and 1
    """
    n_masks = sum(mask_sizes(action_space))
    allowed = f"({n_masks},)" if of_one_env else f"({n_masks},) or (n_envs, {n_masks})"
    wanted = f"{name} must be an array of shape {allowed}, True where {action_space} allows a choice"
    try:
        array = np.asarray(masks)
    except ValueError:  # rows of different lengths
        raise ValueError(f"{wanted}, got {masks!r}") from None
    changed = "; if a VecNormalize or VecFrameStack has changed it, evaluate sb3_pg.envs.with_action_masks(env) instead"
    changed = "" if of_one_env else changed
    if array.shape[-1:] != (n_masks,) or array.ndim > 2 or (of_one_env and array.size != n_masks):
        is_stacked = array.ndim > 0 and array.shape[-1] in range(2 * n_masks, array.size + 1, n_masks)
        raise ValueError(f"{wanted}, got shape {array.shape}{changed if is_stacked else ''}")
    if array.dtype != bool and (array.dtype.kind not in "iufO" or not np.isin(array, (0, 1)).all()):
        is_scaled = array.dtype.kind == "f"
        raise ValueError(f"{wanted}, got values other than 0 and 1: {array!r}{changed if is_scaled else ''}")
    array = array.astype(bool, copy=False)
    return array.reshape(n_masks) if of_one_env else array


def first_without_choice(masks: np.ndarray, starts: np.ndarray) -> tuple[int, int] | None:
    """Return row and action dimension of the first mask that allows nothing; None if there is none.

    :param masks: ``(n_rows, n_masks)``
    :param starts: from :func:`mask_starts`
    """
    some = np.logical_or.reduceat(masks, starts, axis=1)
    if some.all():
        return None
    row, dimension = np.argwhere(~some)[0]
    return int(row), int(dimension)


def nothing_allowed(env: int, dimension: int, n_dimensions: int, when: str) -> ValueError:
    """Return the error that an env allows no action.

    :param env: number of the env
    :param dimension: action dimension in which no choice is allowed
    :param n_dimensions: number of action dimensions
    :param when: when it was, such as "at step 3 of the rollout"
    """
    where = f" in action dimension {dimension}" if n_dimensions > 1 else ""
    return ValueError(
        f"action_mask must allow at least one action, got one of env {env} that allows none{where}, {when}"
    )


def require_some_choice(masks: np.ndarray, starts: np.ndarray, when: str) -> None:
    """Require masks that allow an action.

    :param masks: ``(n_envs, n_masks)``
    :param starts: from :func:`mask_starts`
    :param when: when they are acted on, such as "at step 3 of the rollout"
    :raises ValueError: naming the first env whose mask allows nothing
    """
    if (bad := first_without_choice(masks, starts)) is not None:
        raise nothing_allowed(*bad, len(starts), when)


def first_forbidden(actions: np.ndarray, masks: np.ndarray, starts: np.ndarray) -> int | None:
    """Return the first row whose action its mask forbids; None if there is none.

    :param actions: ``(n_rows, *action_shape)``, counted from 0
    :param masks: ``(n_rows, n_masks)``
    :param starts: from :func:`mask_starts`
    """
    places = starts + actions.reshape(len(actions), -1).astype(np.int64)
    allowed = np.take_along_axis(masks.astype(bool, copy=False), places, axis=1)
    return None if allowed.all() else int(np.argwhere(~allowed)[0][0])
