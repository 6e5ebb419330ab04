"""What policies with action masks have in common, whatever their networks are."""

from typing import Any, ClassVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_pg.action_masks import MASK_KEY, mask_starts, require_masks, require_some_choice
from sb3_pg.policies.observations import n_rows


def seen_space(
    space: spaces.Space[Any], policy: type[BasePolicy], extractor: type[BaseFeaturesExtractor], observe_masks: bool
) -> spaces.Space[Any]:
    """Return the space of what the networks of a policy with action masks see.

    It is the Dict without the mask or, if one other key is left and the policy is not one for Dict observations, the
    space of that key.

    :param space: observation space with the key "action_mask"
    :param policy: class of the policy
    :param extractor: class of its features extractor
    :param observe_masks: whether the networks see the mask too
    """
    parts = cast(spaces.Dict, space).spaces
    rest = parts if observe_masks else {key: part for key, part in parts.items() if key != MASK_KEY}
    takes_dict = issubclass(policy, MultiInputActorCriticPolicy) or getattr(policy, "takes_dict", False)
    takes_dict |= issubclass(extractor, CombinedExtractor)
    return next(iter(rest.values())) if len(rest) == 1 and not takes_dict else spaces.Dict(rest)


def seen_part(observations: dict[str, Any], space: spaces.Space[Any]) -> Any:
    """Return the part of observations that is in a :func:`seen_space`.

    :param observations: with action masks
    :param space: the space
    """
    if isinstance(space, spaces.Dict):
        return {key: observations[key] for key in space.spaces}
    return next((part for key, part in observations.items() if key != MASK_KEY), observations[MASK_KEY])


class MaskedPolicy(BasePolicy):
    """Base class of policies that may keep to action masks. The other arguments are those of the next base class.

    With masks, observations are a Dict with the key "action_mask" (:mod:`sb3_pg.action_masks`). A subclass lets its
    networks see :meth:`seen` of them, and masks its distributions.

    :param masks: whether there are action masks
    :param observe_masks: whether the networks see the mask. It takes a policy for Dict observations
    :raises ValueError: ``observe_masks`` without masks
    """

    #: whether the policy is one for Dict observations, with any features extractor
    takes_dict: ClassVar[bool] = False
    masks: bool = False
    observe_masks: bool = False
    #: space of the part of the observations that the networks see
    seen_space: spaces.Space[Any]

    def __init__(self, *args: Any, masks: bool = False, observe_masks: bool = False, **kwargs: Any) -> None:
        if observe_masks and not masks:
            raise ValueError("observe_masks must be False without action masks, got True")
        self.masks, self.observe_masks = masks, observe_masks
        super().__init__(*args, **kwargs)

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Make a features extractor, as in SB3, for the part of the observations that the networks see."""
        self.seen_space = self.observation_space
        if self.masks:
            kinds = type(self), self.features_extractor_class
            self.seen_space = seen_space(self.observation_space, *kinds, self.observe_masks)
        return self.features_extractor_class(self.seen_space, **self.features_extractor_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"masks": True, "observe_masks": self.observe_masks} if self.masks else {}
        return super()._get_constructor_parameters() | own

    def seen(self, observations: Any) -> Any:
        """Return the part of observations that the networks see.

        :param observations: one row per sample, or a dict of those
        """
        return seen_part(observations, self.seen_space) if self.masks else observations

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions, as in SB3.

        :param observation: of one env, or of several
        :param state: is returned
        :param episode_start: has no effect
        :param deterministic: whether to return the distribution's mode instead of a sample
        :param action_masks: ``(n_masks,)``, or ``(n_envs, n_masks)`` for several envs; None if ``observation`` has them
            under the key "action_mask", or if there are none
        :return: actions, and ``state``
        :raises ValueError: masks are missing, are not expected, have another shape or number, or allow no action; or
            keys of ``observation`` are missing or unknown
        """
        return super().predict(self.with_masks(observation, action_masks), state, episode_start, deterministic)

    def with_masks(self, observation: Any, masks: Any) -> Any:
        """Return the argument ``observation`` of :meth:`predict` with its masks, which are checked.

        :param observation: of one env, or of several
        :param masks: argument ``action_masks``
        :raises ValueError: masks are missing, are not expected, have another shape, or allow no action; or
            ``observation`` is what ``reset`` of an env of Gymnasium returns
        """
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            raise ValueError(
                "You have passed a tuple to the predict() function instead of a Numpy array or a Dict: give the "
                "observation alone, obs of `obs, info = env.reset()`"
            )
        if not self.masks:
            if masks is not None:
                raise ValueError(
                    f"action_masks must be None, since this policy was trained without masks, got {masks!r}"
                )
            return observation
        is_dict = isinstance(observation, dict)
        if masks is None and not (is_dict and MASK_KEY in observation):
            raise ValueError(
                "predict needs action masks, since this policy was trained with them: give action_masks=, or an "
                "observation that has them under the key 'action_mask', as envs of sb3_pg.envs.make_vec_env have, and "
                "any VecEnv in an sb3_pg.envs.ActionMaskVecEnv"
            )
        name = "observation['action_mask']" if masks is None else "action_masks"
        masks = require_masks(name, observation[MASK_KEY] if masks is None else masks, self.action_space)
        require_some_choice(np.atleast_2d(masks), mask_starts(self.action_space), "given to predict")
        others = cast(spaces.Dict, self.observation_space).spaces.keys() - {MASK_KEY}
        if not is_dict:
            if len(others) > 1:
                raise ValueError(f"observation must be a dict with the keys {sorted(others)}, got {type(observation)}")
            observation = dict.fromkeys(others, observation)
        return {**observation, MASK_KEY: masks.astype(np.int8)}

    def obs_to_tensor(self, observation: Any) -> tuple[PyTorchObs, bool]:
        """Convert observations as SB3's method does, and check the keys and numbers of rows of a dict.

        :param observation: of one env, or of several. A mask may be a row, even for one env
        :return: observations with a row per env, and whether they are of several envs
        :raises ValueError: keys are missing or unknown, or the parts are of different numbers of envs
        """
        if not isinstance(observation, dict) or not isinstance(self.observation_space, spaces.Dict):
            return super().obs_to_tensor(observation)
        others = {key: part for key, part in observation.items() if not (self.masks and key == MASK_KEY)}
        known = self.observation_space.spaces.keys() - ({MASK_KEY} if self.masks else set())
        if others.keys() != known:
            raise ValueError(f"observation must have the keys {sorted(known)}, got {sorted(others, key=str)}")
        if not others:
            return super().obs_to_tensor(observation)
        obs: Any
        obs, is_vectorized = super().obs_to_tensor(others)
        n_envs = {key: len(part) for key, part in obs.items()}
        if len(set(n_envs.values())) > 1:
            raise ValueError(f"observation must have as many rows for each key, got {n_envs}")
        if self.masks and MASK_KEY in observation:
            masks = np.atleast_2d(observation[MASK_KEY])
            n = n_rows(obs)
            if len(masks) != n:
                raise ValueError(
                    f"action_masks must have as many rows as there are observations, {n}, got {len(masks)}"
                )
            obs[MASK_KEY] = th.as_tensor(masks, device=self.device)
        return {key: obs[key] for key in self.observation_space.spaces if key in obs}, is_vectorized
