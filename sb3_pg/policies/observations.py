"""Observations, which are arrays or dicts of arrays: map a function over them, split them, make examples of them."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.action_masks import MASK_KEY

#: Samples per forward without gradient. It bounds the memory that image policies take.
CHUNK_SIZE = 4096
#: One row per sample, or a dict of such tensors.
Observations = th.Tensor | dict[str, th.Tensor]


def map_observations(function: Callable[..., Any], observations: Any, *others: Any) -> Any:
    """Call a function with observations, or with the array at each key of a dict of observations.

    :param function: takes one argument per given observations
    :param observations: an array, or a dict of arrays, whose keys count
    :param others: in the same form, to be passed along
    :return: what the function returns, as a dict if ``observations`` are one
    """
    if isinstance(observations, dict):
        return {key: function(array, *(other[key] for other in others)) for key, array in observations.items()}
    return function(observations, *others)


def n_rows(observations: Any) -> int:
    """Return the number of samples.

    :param observations: one row per sample, or a dict of those
    """
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)


def split_observations(observations: Observations, size: int, order: th.Tensor | None = None) -> list[Any]:
    """Split observations into pieces.

    :param observations: one row per sample
    :param size: rows per piece; the last may have fewer
    :param order: indices that reorder the rows first
    :return: the pieces; they are views of one tensor
    """
    if isinstance(observations, dict):
        parts = {key: split_observations(value, size, order) for key, value in observations.items()}
        return [dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True)]
    return list((observations if order is None else observations[order]).split(size))


def zero_observation(policy: BasePolicy) -> Any:
    """Return one observation of zeros on the policy's device."""
    return _observation(policy, lambda space: np.zeros((1, *(space.shape or ())), dtype=space.dtype))


def example_observation(policy: BasePolicy) -> Any:
    """Return one observation that is not zero, always the same, on the policy's device."""

    def example(space: spaces.Space[Any]) -> np.ndarray:
        space = copy.deepcopy(space)  # leaves the random numbers of the policy's space alone
        space.seed(0)
        sample = np.asarray(space.sample())[None]
        return np.clip(sample, -1, 1) if np.issubdtype(sample.dtype, np.floating) else sample

    return _observation(policy, example)


def _observation(policy: BasePolicy, make: Callable[[Any], np.ndarray]) -> Any:
    """Make an observation as a tensor, from the observation space or from each space of a Dict."""
    space = policy.observation_space
    made = map_observations(make, space.spaces if isinstance(space, spaces.Dict) else space)
    if getattr(policy, "masks", False):
        made[MASK_KEY] = np.ones_like(made[MASK_KEY])
    return obs_as_tensor(made, policy.device)
