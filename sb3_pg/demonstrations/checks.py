"""Checks of arguments, and of arrays against a model's observation and action space."""

import inspect
import warnings
from numbers import Integral
from typing import Any, Final, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_pg.errors import SpaceError

#: Numbers that are compared at a time. It bounds the memory that memory-mapped arrays take.
CHUNK: Final = 1 << 24
#: Packages whose lines no warning names.
_OURS: Final = ("sb3_pg", "stable_baselines3")
#: How far an action may be outside of the bounds, as a fraction of their distance.
_ROUNDING: Final = 1e-6


def chunks(array: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Cut an array into pieces of at most :data:`CHUNK` numbers, or of one row.

    :param array: one row per step
    :return: first row and piece; the pieces are views
    """
    size = max(1, CHUNK // max(1, int(np.prod(array.shape[1:]))))
    return [(first, array[first : first + size]) for first in range(0, len(array), size)]


def require_count(name: str, value: Any, most: int | None = None) -> None:
    """Require a positive integer.

    :param name: name of the argument, for the error message
    :param value: its value
    :param most: largest value that is allowed
    :raises TypeError: it is no integer
    :raises ValueError: it is below 1 or too large
    """
    allowed = "at least 1" if most is None else f"in [1, {most}]"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer {allowed}, got {value!r}")
    if int(value) < 1 or (most is not None and int(value) > most):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_observations(name: str, observations: Any, space: spaces.Space[Any], row: str) -> None:
    """Require observations that fit a space.

    :param name: name of the observations, for the error message
    :param observations: one row per step or episode, or a dict of those
    :param space: a model's observation space; its images may have their channels first or last
    :param row: what a row is, for the error message
    :raises ValueError: keys, shape or type differ, or an integer is not in the space
    """
    if isinstance(space, spaces.Dict):
        given = list(observations) if isinstance(observations, dict) else []
        if set(given) != set(space.spaces):
            got = f"the keys {given}" if given else "no dict"
            raise ValueError(
                f"{name} must be a dict with the keys {list(space.spaces)} of the model's space, got {got}"
            )
        for key, part in space.spaces.items():
            check_observations(f"{name}[{key!r}]", observations[key], part, row)
        return
    if isinstance(observations, dict):
        raise ValueError(
            f"{name} must be an array, as in the model's space, got a dict with the keys {list(observations)}"
        )
    low, high = _bounds(space)
    shapes = [space.shape]
    if isinstance(space, spaces.Box) and is_image_space(space):
        channels_first, channels_last = np.roll(space.shape, 1), np.roll(space.shape, -1)
        shapes += [tuple(map(int, channels_last)), tuple(map(int, channels_first))]
    _require_form(name, observations, space, shapes)
    if observations.shape[1:] != space.shape:  # an image in the other layout, whose bounds are the same everywhere
        low, high = low.flat[0], high.flat[0]
    bad = _first_outside(observations, low, high)
    if bad is not None and _is_integer(space):
        raise ValueError(f"{name} must be in {bad.bounds}, got {bad.value} at {row} {bad.row}")
    if bad is not None:
        warnings.warn(
            f"{name} should be in {bad.bounds}, the bounds of the model's space, got {bad.value} at {row} {bad.row}. "
            "They are used as they are",
            stacklevel=_callers_level(),
        )


def check_actions(actions: np.ndarray, space: spaces.Space[Any], squashed: bool) -> None:
    """Require actions that a policy can learn. See ``Demonstrations.check_spaces`` for those outside of a Box.

    :param actions: as the env numbers them, one row per step
    :param space: a model's action space
    :param squashed: whether the policy squashes its actions
    :raises ValueError: shape or type differ, or an action is not in the space
    """
    low, high = _bounds(space)
    _require_form("actions", actions, space, [space.shape])
    # an action that was rescaled may miss the bound by its rounding
    margin = 0 if _is_integer(space) else _ROUNDING * (high.astype(np.float64) - low)
    bad = _first_outside(actions, low, high, margin)
    if bad is None:
        return
    got = f"got {bad.value} at step {bad.row}"
    if squashed or not isinstance(space, spaces.Box):
        why = ", since the policy squashes its own" if squashed else ""
        raise ValueError(f"actions must be in {bad.bounds}{why}, {got}")
    warnings.warn(
        f"actions of {bad.n_rows} of {len(actions)} steps are outside of the bounds, such as {bad.bounds}, {got}. They "
        "are learned as they are, as a Gaussian policy's own are before they are clipped. Make sure that they are in "
        "the units of the env",
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """Return the ``stacklevel`` with which a warning of the calling function names the user's line.

    That line has called this package, perhaps through methods of SB3.
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    return level


def _require_form(name: str, array: np.ndarray, space: spaces.Space[Any], shapes: list[Any]) -> None:
    """Require a row's shape, and a type whose numbers the space can have."""
    if array.shape[1:] not in shapes:
        raise ValueError(f"{name} must have shape {space.shape} a row, as in the model's space, got {array.shape[1:]}")
    if _is_integer(space) and array.dtype.kind == "f":
        raise ValueError(f"{name} must be integers, as in the model's space, got {array.dtype}")


def _is_integer(space: spaces.Space[Any]) -> bool:
    return space.dtype is None or np.dtype(space.dtype).kind != "f"


def _bounds(space: spaces.Space[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest number of each place in the space."""
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        start = space.start.astype(np.int64)
        return start, start + space.nvec.astype(np.int64) - 1
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, np.int8), np.ones(space.shape, np.int8)
    raise SpaceError(f"spaces must be Box, Discrete, MultiDiscrete, MultiBinary or Dict, got {space}")


class _Outside(NamedTuple):
    """The first number outside of the bounds.

    :param value: the number
    :param row: its row
    :param bounds: its bounds, as text
    :param n_rows: number of rows with a number outside
    """

    value: Any
    row: int
    bounds: str
    n_rows: int


def _first_outside(array: np.ndarray, low: Any, high: Any, margin: Any = 0) -> _Outside | None:
    """Return the first number outside of the bounds; None if there is none.

    :param margin: how far a number may be outside
    """
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        if (low <= limits.min).all() and (high >= limits.max).all():
            return None  # as in images: nothing to read
    found: _Outside | None = None
    for first, piece in chunks(array):
        outside = (piece < low - margin) | (piece > high + margin)
        n_rows = int(outside.reshape(len(piece), -1).any(axis=1).sum())
        if n_rows and found is None:
            place = tuple(np.argwhere(outside)[0])
            lowest, highest = (np.broadcast_to(bound, piece.shape[1:])[place[1:]] for bound in (low, high))
            found = _Outside(piece[place], first + int(place[0]), f"[{lowest}, {highest}]", n_rows)
        elif found is not None:
            found = found._replace(n_rows=found.n_rows + n_rows)
    return found
