"""Acting by something else than the policy: log-probs come along, since nobody can tell them later."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

#: obs, ``(n_envs, ...)``, to actions ``(n_envs, *action_shape)`` and their log-probs ``(n_envs,)``.
BehaviorPolicy = Callable[[Any], tuple[Any, Any]]


class BehaviorSampler:
    """Sampling from a callable that says how probable its choice was.

    :param behavior: obs to actions and log-probs; actions as the policy would sample them, before clipping
    :param action_space: action space
    """

    def __init__(self, behavior: BehaviorPolicy, action_space: spaces.Space[Any]) -> None:
        self.behavior = behavior
        self.shape = action_space.shape or ()
        self.dtype = action_space.dtype
        self.log_probs: list[th.Tensor] = []

    def __call__(self, obs: Any) -> np.ndarray:
        """Draw actions.

        :raises ValueError: shapes that do not fit, or a log-prob that is not finite
        """
        actions, log_probs = (_array(x) for x in self.behavior(obs))
        n_envs = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        if actions.shape != (n_envs, *self.shape) or log_probs.shape != (n_envs,):
            raise ValueError(
                f"behavior_policy must return actions of shape {(n_envs, *self.shape)} and log-probs of shape "
                f"{(n_envs,)}, got {actions.shape} and {log_probs.shape}"
            )
        if not np.isfinite(log_probs).all():
            env = int(np.flatnonzero(~np.isfinite(log_probs))[0])
            raise ValueError(
                f"behavior_policy must give what it does a positive, finite probability, got log-prob {log_probs[env]} "
                f"for env {env}: an importance ratio would be undefined"
            )
        self.log_probs.append(th.as_tensor(log_probs, dtype=th.float32))
        return actions.astype(self.dtype, copy=False)


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, th.Tensor) else np.asarray(x)


def uniform_behavior(space: spaces.Space[Any], squashed: bool) -> BehaviorPolicy:
    """All actions alike, drawn as SB3 draws them in its warm-up.

    :param space: Discrete, MultiDiscrete, MultiBinary, or a bounded Box
    :param squashed: whether the policy's actions are those of [-1, 1], to be rescaled to the bounds
    :raises ValueError: a Box without bounds, or without volume, which has no uniform density
    """
    log_prob = -_log_size(space, squashed)

    def behavior(obs: Any) -> tuple[np.ndarray, np.ndarray]:
        n_envs = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        actions = np.stack([space.sample() for _ in range(n_envs)])
        if isinstance(space, spaces.Box) and squashed:
            actions = 2 * ((actions - space.low) / (space.high - space.low)) - 1  # integers would overflow
        return actions, np.full(n_envs, log_prob)

    return behavior


def _log_size(space: spaces.Space[Any], squashed: bool) -> float:
    """Logarithm of the number of actions, or of their volume as the policy sees it."""
    if isinstance(space, spaces.Box):
        width = space.high.astype(np.float64) - space.low
        if not (np.isfinite(width) & (width > 0)).all():
            raise ValueError(
                f"learning_starts > 0 draws the first actions uniformly, which takes bounds, got {space}: set it to 0"
            )
        return float(np.log(np.full_like(width, 2.0) if squashed else width).sum())
    if isinstance(space, spaces.Discrete):
        return math.log(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return float(np.log(space.nvec.astype(np.float64)).sum())
    assert isinstance(space, spaces.MultiBinary)
    return math.prod(space.shape) * math.log(2)
