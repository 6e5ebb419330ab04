"""Observations as tensors: split them, and make examples of them."""

import copy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import obs_as_tensor

#: One row per sample, or a dict of such tensors.
Observations = th.Tensor | dict[str, th.Tensor]


def split_observations(observations: Observations, size: int, order: th.Tensor | None = None) -> list[Any]:
    """Split observations into pieces.

    :param observations: one row per sample
    :param size: rows per piece; the last may have fewer
    :param order: indices that reorder the rows first
    :return: the pieces, views of one copy
    """
    if isinstance(observations, dict):
        parts = {key: split_observations(value, size, order) for key, value in observations.items()}
        return [dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True)]
    return list((observations if order is None else observations[order]).split(size))


def zero_observation(policy: BasePolicy) -> Any:
    """Return one observation of zeros on the policy's device."""
    return obs_as_tensor(_zeros(policy.observation_space), policy.device)


def example_observation(policy: BasePolicy) -> Any:
    """Return one observation that is not zero, always the same, on the policy's device."""
    return obs_as_tensor(_example(policy.observation_space), policy.device)


def _example(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _example(subspace) for key, subspace in space.spaces.items()}
    space = copy.deepcopy(space)  # leaves the random numbers of the policy's space alone
    space.seed(0)
    sample = np.asarray(space.sample())[None]
    return np.clip(sample, -1, 1) if np.issubdtype(sample.dtype, np.floating) else sample


def _zeros(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _zeros(subspace) for key, subspace in space.spaces.items()}
    return np.zeros((1, *(space.shape or ())), dtype=space.dtype)
