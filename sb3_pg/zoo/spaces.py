"""Policy, normalization and buffer size for an observation space, which a ``default:`` block does not know."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

_FLATTEN: Final = "gymnasium.wrappers.FlattenObservation"
#: Height and width of the smallest image that the convolutions of SB3's ``CnnPolicy`` take.
_SMALLEST_IMAGE: Final = 36
#: A replay buffer of transitions takes at most this much memory, in bytes.
_LARGEST_BUFFER: Final = 4 * 2**30


def fit_to_observations(
    space: spaces.Space[Any], hyperparams: Mapping[str, Any], buffer_size: int | None = None
) -> dict[str, Any]:
    """Return the changes that an observation space needs in hyperparameters written for vectors.

    ================================== ========================= ======================================================
    observations                       policy                    normalization (if ``normalize`` is on)
    ================================== ========================= ======================================================
    Box                                as it is                  as it is
    images, at least 36 x 36           CnnPolicy                 rewards only: the policy divides pixels by 255
    smaller images                     as it is                  rewards only
    Discrete, MultiDiscrete,           as it is                  rewards only
    MultiBinary
    Dict of these                      MultiInputPolicy          keys that are a Box and not an image
    Tuple, nested Dict, and others     as it is                  as it is, after an ``env_wrapper`` has flattened the
    that SB3 does not support                                    observation
    ================================== ========================= ======================================================

    A replay buffer of transitions is limited to 4 GiB.

    :param space: observation space of a single environment
    :param hyperparams: hyperparameters in rl_zoo3's format
    :param buffer_size: default number of transitions in the algorithm's replay buffer, None if it has none
    :return: the hyperparameters that change, empty if all of them fit
    :raises ValueError: no policy takes observations of this space, and they cannot be flattened
    """
    changed: dict[str, Any] = {}
    if _needs_flattening(space):
        if not space.is_np_flattenable:
            raise ValueError(
                f"no policy takes observations of {space}: wrap the env (env_wrapper), so that they are a Box, "
                "Discrete, MultiDiscrete, MultiBinary, Dict or Tuple"
            )
        changed["env_wrapper"] = _FLATTEN
        space = spaces.flatten_space(space)
    normalized: list[str] | bool = _is_vector(space)
    policy = None
    if isinstance(space, spaces.Dict):
        policy = "MultiInputPolicy"
        keys = [key for key, part in space.items() if _is_vector(part)]
        normalized = len(keys) == len(space) or keys
    elif is_image_space(space) and _is_large(space):
        policy = "CnnPolicy"
    if policy is not None and hyperparams.get("policy") != policy:
        changed["policy"] = policy
    given = hyperparams.get("normalize", False)
    normalize = _normalize(given, normalized)
    if normalize != given:
        changed["normalize"] = normalize
    if buffer_size is not None:
        fits = max(1, _LARGEST_BUFFER // (2 * _n_bytes(space)))  # the observation before the step and after it
        if fits < hyperparams.get("buffer_size", buffer_size):
            changed["buffer_size"] = fits
    return changed


def _needs_flattening(space: spaces.Space[Any]) -> bool:
    """Whether SB3's policies do not support this space, or have no network for a part of it."""
    if isinstance(space, spaces.Dict):
        return any(
            isinstance(part, spaces.Dict) or _needs_flattening(part) or (is_image_space(part) and not _is_large(part))
            for part in space.values()
        )
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return bool(np.any(space.start)) or len(space.shape or ()) > 1
    return not isinstance(space, (spaces.Box, spaces.MultiBinary))


def _is_vector(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and not is_image_space(space)


def _is_large(image: spaces.Space[Any]) -> bool:
    assert isinstance(image, spaces.Box)
    sides = image.shape[1:] if is_image_space_channels_first(image) else image.shape[:2]
    return min(sides) >= _SMALLEST_IMAGE


def _normalize(given: Any, normalized: list[str] | bool) -> Any:
    """Return the value of ``normalize`` without the observations that cannot be normalized.

    :param given: a value that rl_zoo3 takes: True, False, or arguments of VecNormalize, as a dict or as Python code
    :param normalized: whether observations can be normalized, or the keys of those that can
    """
    kwargs = eval(given) if isinstance(given, str) else given  # as rl_zoo3 does
    if normalized is True or not given:
        return given
    kwargs = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    if not kwargs.get("norm_obs", True):
        return given
    kwargs |= {"norm_obs": bool(normalized), "norm_reward": kwargs.get("norm_reward", True)}
    if normalized:
        kwargs["norm_obs_keys"] = normalized
    elif not kwargs["norm_reward"]:
        return False
    return f"dict({', '.join(f'{name}={value!r}' for name, value in kwargs.items())})"


def _n_bytes(space: spaces.Space[Any]) -> int:
    """Return the number of bytes of one observation in a replay buffer."""
    if isinstance(space, spaces.Dict):
        return sum(map(_n_bytes, space.values()))
    dtype = space.dtype or np.dtype(np.float32)
    return int(np.prod(space.shape or ())) * dtype.itemsize
