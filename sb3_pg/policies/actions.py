"""Convert actions between the numbers that a policy draws and those that an env takes. Buffers store the policy's.

Box: a policy draws floating numbers, in [-1, 1] if it is squashed. They are rescaled or clipped to the bounds and, if
the space has integers, rounded and cast to the space's dtype.
Discrete and MultiDiscrete: a policy counts from 0, the env from the space's ``start``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_pg.compat import predicted
from sb3_pg.errors import NonFiniteError
from sb3_pg.policies.policy_cache import has_own_predict

_PRECISE = (np.dtype(np.float32), np.dtype(np.float64))


def stored_dtype(space: spaces.Space[Any]) -> np.dtype[Any]:
    """Return the dtype to store actions with. It holds the numbers that were drawn, which log-probs belong to."""
    dtype = np.dtype(space.dtype)
    return np.dtype(np.float32) if isinstance(space, spaces.Box) and dtype not in _PRECISE else dtype


def first_choice(space: spaces.Space[Any]) -> Any:
    """Return the env's number for the policy's action 0: one per dimension of MultiDiscrete; 0 for Box, MultiBinary."""
    if isinstance(space, spaces.Discrete):
        return int(space.start)
    return space.start.astype(np.int64) if isinstance(space, spaces.MultiDiscrete) else 0


def takes_other_numbers(space: spaces.Space[Any]) -> bool:
    """Whether the env takes numbers that SB3's own loops do not give: integers of a Box, or counted from ``start``."""
    if isinstance(space, spaces.Box):
        return space.dtype not in _PRECISE
    if isinstance(space, spaces.Discrete):
        return bool(space.start)
    return isinstance(space, spaces.MultiDiscrete) and bool(space.start.any())


def to_env(policy: BasePolicy) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that converts the actions that a policy draws to those that the env takes.

    :param policy: the policy
    :return: takes and returns actions ``(n_envs, *action_shape)``
    """
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return partial(_counted, space=space) if _counts_otherwise(space) else lambda actions: actions
    if takes_other_numbers(space):
        return partial(_received, space=space, squashed=policy.squash_output)
    if policy.squash_output:
        return policy.unscale_action
    low, high = space.low, space.high
    return lambda actions: np.minimum(np.maximum(actions, low), high)


def from_env(actions: Any, space: spaces.Space[Any]) -> Any:
    """Convert Discrete and MultiDiscrete actions to the policy's numbers, which count from 0.

    :param actions: as the env numbers them, ``(n, *action_shape)``
    :param space: action space; actions of other spaces are returned unchanged
    """
    start = first_choice(space)
    return np.asarray(actions).astype(np.int64) - start if np.any(start) else actions


def predict(
    policy: BasePolicy,
    observation: Any,
    state: Any,
    episode_start: Any,
    deterministic: bool,
    action_masks: Any = None,
) -> Any:
    """Call the policy's ``predict``, and convert its actions to those that the env takes.

    :param policy: the policy
    :param observation: of one env, or of several
    :param state: state of a recurrent policy
    :param episode_start: where episodes of a recurrent policy begin
    :param deterministic: whether to return the distribution's mode instead of a sample
    :param action_masks: for a policy that was trained with masks
    :return: actions and the next state, as ``predict`` returns them
    :raises ValueError: masks were given, and the policy was trained without
    """
    with_masks = {} if action_masks is None else {"action_masks": action_masks}
    if with_masks and not getattr(policy, "masks", False):
        raise ValueError(
            f"action_masks must be None, since this policy was trained without masks, got {action_masks!r}"
        )
    space: Any = policy.action_space
    is_wide = isinstance(space, spaces.Box) and takes_other_numbers(space)
    if is_wide and policy.squash_output and not has_own_predict(policy):
        # SB3's predict would rescale in the space's own dtype, where a width like 127 - (-128) overflows.
        policy.set_training_mode(False)
        obs, is_vectorized = policy.obs_to_tensor(observation)
        with th.no_grad():
            drawn = predicted(policy, obs, deterministic)
        actions = to_env(policy)(drawn.cpu().numpy().reshape(-1, *space.shape))
        return actions if is_vectorized else actions.squeeze(axis=0), state
    actions, state = policy.predict(observation, state, episode_start, deterministic, **with_masks)
    if is_wide:
        actions = _received(actions, space=space, squashed=False)
    elif _counts_otherwise(space):
        actions = _counted(actions, space=space)
    return actions, state


def require_choices(actions: Any, space: spaces.Space[Any], start: Any, row: str, name: str = "actions") -> None:
    """Check that actions are in the space. A Box is not checked: actions outside its bounds are clipped later.

    :param actions: ``(n, *action_shape)``
    :param space: action space
    :param start: number of the first choice
    :param row: name of a row, for the error message: "step" or "env"
    :param name: name of the actions, for the error message
    :raises ValueError: an action is not in the space
    """
    if isinstance(space, spaces.Box):
        return
    n_choices: Any = 2
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        n_choices = int(space.n) if isinstance(space, spaces.Discrete) else space.nvec.astype(np.int64)
    rows = np.asarray(actions).reshape(len(actions), -1)
    bad = np.argwhere((rows < start) | (rows >= start + n_choices) | (rows != np.round(rows)))
    if len(bad):
        n, dim = (int(i) for i in bad[0])
        counted = " counted from 0" if np.any(first_choice(space)) and not np.any(start) else ""
        raise ValueError(f"{name} must be in {space}{counted}, got {rows[n, dim]} at {row} {n}")


def scaled(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Rescale actions from the bounds to [-1, 1], in double precision: the width may overflow the space's own dtype."""
    low = space.low.astype(np.float64)
    return 2 * (actions.astype(np.float64) - low) / (space.high.astype(np.float64) - low) - 1


def unscaled(actions: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Rescale actions from [-1, 1] to the bounds, in double precision."""
    low = space.low.astype(np.float64)
    return low + 0.5 * (actions.astype(np.float64) + 1) * (space.high.astype(np.float64) - low)


def _received(actions: np.ndarray, space: spaces.Box, squashed: bool) -> np.ndarray:
    """Rescale squashed actions, clip them, round them if the space has integers, and cast them to the space's dtype.

    :raises NonFiniteError: an action is NaN where the space has integers
    """
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    numbers = (unscaled(actions, space) if squashed else actions.astype(np.float64)).clip(low, high)
    if space.dtype.kind == "f":
        return numbers.astype(space.dtype)
    bad = np.argwhere(np.isnan(numbers))
    if len(bad):
        raise NonFiniteError("action", np.nan, int(bad[0][0]) if numbers.ndim > len(space.shape) else None)
    numbers = np.rint(numbers)
    inside = (numbers > low) & (numbers < high)  # a bound as a double may not fit the dtype, such as 2^63
    integers = np.where(inside, numbers, 0).astype(space.dtype)
    return np.where(inside, integers, np.where(numbers >= high, space.high, space.low))


def _counts_otherwise(space: spaces.Space[Any]) -> bool:
    """Whether the env's choices are not numbered 0, 1, 2, ... or, for MultiDiscrete, are not int64."""
    return takes_other_numbers(space) or (isinstance(space, spaces.MultiDiscrete) and space.dtype != np.int64)


def _counted(actions: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    return np.asarray(actions + first_choice(space), dtype=space.dtype)
