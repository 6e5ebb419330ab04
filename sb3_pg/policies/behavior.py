"""Behavior policies, which act instead of the policy that learns.

They return log-probs with their actions, because the log-probs of a function's actions cannot be computed later.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_pg.action_masks import MASK_KEY, first_forbidden, mask_starts
from sb3_pg.policies.actions import first_choice, from_env, require_choices, stored_dtype, takes_other_numbers, unscaled
from sb3_pg.policies.extended_policy import has_memory
from sb3_pg.policies.policy_cache import evaluation_mode

#: A function from the observations of all envs, ``(n_envs, ...)`` or a dict of those, to actions
#: ``(n_envs, *action_shape)`` and their log-probs ``(n_envs,)``. Discrete and MultiDiscrete actions are numbered as the
#: env numbers them. Box actions are floating numbers as the trained policy samples them, before clipping or rescaling.
BehaviorPolicy = Callable[[Any], tuple[Any, Any]]


class ActingModel(Protocol):
    """A model of SB3 or sb3-contrib."""

    @property
    def policy(self) -> BasePolicy:
        """The policy, which acts."""


#: Type of the argument ``behavior_policy``.
Behavior = ActingModel | BasePolicy | BehaviorPolicy

_ACCEPTED = (
    "an SB3 model or policy with get_distribution (A2C, PPO, TRPO, this package's), or a callable from observations to "
    "(actions, log_probs)"
)


class BehaviorSampler:
    """Draws actions from a callable, and keeps their log-probs.

    :param behavior: from observations to actions and log-probs
    :param action_space: action space
    :param squashed: whether the trained policy's actions lie in [-1, 1]
    :param masks: whether observations have an action mask, which the actions must keep to
    """

    def __init__(
        self, behavior: BehaviorPolicy, action_space: spaces.Space[Any], squashed: bool = False, masks: bool = False
    ) -> None:
        self.behavior = behavior
        self.action_space = action_space
        self.squashed = squashed and isinstance(action_space, spaces.Box)
        self.shape = action_space.shape or ()
        self.dtype = stored_dtype(action_space)
        self._starts = mask_starts(action_space) if masks else None
        self.log_probs: list[th.Tensor] = []

    def __call__(self, obs: Any, starts: np.ndarray | None = None) -> np.ndarray:
        """Draw actions, in the numbers and the dtype that buffers store.

        :raises TypeError: the callable did not return two arrays of numbers
        :raises ValueError: wrong shapes, an action that is not in the space or that the mask forbids, or a log-prob
            that is not finite
        """
        n_envs = _n_envs(obs)
        expected = f"actions of shape {(n_envs, *self.shape)} and log-probs of shape {(n_envs,)}"
        actions, log_probs = _two_arrays(self.behavior(obs), expected)
        if actions.shape != (n_envs, *self.shape) or log_probs.shape != (n_envs,):
            raise ValueError(f"behavior_policy must return {expected}, got {actions.shape} and {log_probs.shape}")
        if not np.isfinite(log_probs).all():
            env = int(np.flatnonzero(~np.isfinite(log_probs))[0])
            raise ValueError(
                f"behavior_policy must return finite log-probs, got {log_probs[env]} for env {env}: an importance "
                "ratio would be undefined"
            )
        self._check_actions(actions)
        self.log_probs.append(th.as_tensor(log_probs, dtype=th.float32))
        drawn: np.ndarray = np.asarray(from_env(actions, self.action_space)).astype(self.dtype, copy=False)
        if self._starts is not None:
            bad = first_forbidden(drawn, obs[MASK_KEY], self._starts)
            if bad is not None:
                raise ValueError(
                    f"behavior_policy must return actions that action_mask allows, got {drawn[bad]} for env {bad}"
                )
        return drawn

    def _check_actions(self, actions: np.ndarray) -> None:
        legal = np.isfinite(actions) & ((np.abs(actions) <= 1) | (not self.squashed))
        bad = np.argwhere(~legal)
        if len(bad):
            allowed = "in [-1, 1], the range of this squashed policy" if self.squashed else "that are finite"
            value = actions[tuple(bad[0])]
            raise ValueError(f"behavior_policy must return actions {allowed}, got {value} for env {bad[0][0]}")
        space = self.action_space
        require_choices(actions, space, first_choice(space), row="env", name="behavior_policy's actions")


def _two_arrays(returned: Any, expected: str) -> tuple[np.ndarray, np.ndarray]:
    """Convert the returned value of a callable to two arrays of numbers."""
    arrays: list[np.ndarray] = []
    if isinstance(returned, tuple | list) and len(returned) == 2:
        arrays = [array for array in map(_array, returned) if array is not None]
    if len(arrays) == 2:
        return arrays[0], arrays[1]
    got = type(returned).__name__
    if isinstance(returned, tuple | list):
        got += f" of {', '.join(type(part).__name__ for part in returned) or 'nothing'}"
    hint = ""
    if isinstance(returned, tuple) and len(returned) == 2 and returned[1] is None:
        hint = ". (A model's predict returns no log-probs: give the model itself.)"
    raise TypeError(f"behavior_policy must return a pair, {expected}, got {got}: {returned!r:.200}{hint}")


def _array(x: Any) -> np.ndarray | None:
    """Convert a value to an array of numbers, or return None if that is impossible."""
    if isinstance(x, th.Tensor):
        x = x.detach().cpu()
        array: np.ndarray = (x.float() if x.dtype == th.bfloat16 else x).numpy()
    else:
        try:
            array = np.asarray(x)
        except ValueError:  # rows of different lengths
            return None
    return array if array.dtype.kind in "biuf" else None


def _n_envs(obs: Any) -> int:
    return len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)


# -------------------------------------------------------------------- models and policies


def behavior_source(given: Any) -> Any:
    """Return the policy or callable that acts: a model's policy, or the given value itself.

    :param given: value of the argument ``behavior_policy``
    :raises TypeError: the value is no model, policy or callable, or the policy has no log-probs
    """
    if inspect.isclass(given):
        raise TypeError(f"behavior_policy must be {_ACCEPTED}, or None, got the class {given.__name__}: give an object")
    is_model = not callable(given) and isinstance(getattr(given, "policy", None), th.nn.Module)
    policy = given.policy if is_model else given
    remembers = isinstance(policy, BasePolicy) and has_memory(policy)
    if remembers or isinstance(policy, RecurrentActorCriticPolicy | MaskableActorCriticPolicy):
        raise TypeError(
            f"behavior_policy must be {_ACCEPTED}, got {type(given).__name__}, whose policy takes more than "
            "observations: give a callable that keeps its states or masks"
        )
    if callable(getattr(policy, "get_distribution", None)):
        return policy
    if callable(given) and not isinstance(given, BasePolicy):
        return given
    reason = ", whose policy has no log-probs" if isinstance(policy, th.nn.Module) else ""
    raise TypeError(f"behavior_policy must be {_ACCEPTED}, or None, got {given!r}{reason}")


def adopted(given: Any, learner: ActorCriticPolicy, env: VecEnv | None) -> tuple[Any, BehaviorPolicy | None]:
    """Make a callable that acts from the value of the argument ``behavior_policy``.

    :param given: value of the argument
    :param learner: the policy that learns
    :param env: the envs that are acted in, or None
    :return: the policy or callable, which replaces a model as the argument's value since it can be saved; and a
        callable that acts, or None if ``given`` is None
    :raises TypeError: see :func:`behavior_source`
    :raises ValueError: see :class:`PolicyBehavior`
    """
    if given is None:
        return None, None
    source = behavior_source(given)
    behavior = PolicyBehavior(source, learner) if callable(getattr(source, "get_distribution", None)) else source
    theirs = given.get_env() if source is not given and hasattr(given, "get_env") else None
    if theirs is not None and env is not None:
        _warn_of_other_statistics(theirs, env)
    return source, behavior


class PolicyBehavior:
    """Lets a policy act for another one that learns, in evaluation mode and without gradient.

    If the policy is squashed and the learner is not, actions are rescaled from [-1, 1] to the bounds. The log-probs are
    then those of the rescaled actions.

    :param policy: the policy that acts, on its own device
    :param learner: the policy that learns
    :raises ValueError: different spaces, or actions that the learner never draws
    """

    def __init__(self, policy: Any, learner: ActorCriticPolicy) -> None:
        for name in ("action_space", "observation_space"):
            theirs, ours = getattr(policy, name), getattr(learner, name)
            if theirs != ours:
                raise ValueError(f"behavior_policy must have the {name} of this algorithm, {ours}, got {theirs}")
        space: Any = learner.action_space
        is_box = isinstance(space, spaces.Box)
        if is_box and learner.squash_output and not policy.squash_output:
            raise ValueError(
                f"behavior_policy must squash its actions to [-1, 1] as the trained policy does, got "
                f"{type(policy).__name__} with squash_output=False, which draws actions that the trained one never does"
            )
        self.policy = policy
        self._start = first_choice(space)
        #: the space whose bounds actions are rescaled to; None for no rescaling
        self._bounds = space if is_box and policy.squash_output and not learner.squash_output else None
        self._has_noise = False

    def __call__(self, obs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Draw actions and compute their log-probs."""
        policy = self.policy
        with evaluation_mode(policy), th.no_grad():
            if getattr(policy, "use_sde", False) and not self._has_noise:
                policy.reset_noise(_n_envs(obs))
                self._has_noise = True
            observations = obs_as_tensor(obs, policy.device)
            if hasattr(policy, "evaluate_actions"):  # an actor-critic: SB3 calls its forward
                drawn, _, log_prob = policy(observations)
            else:
                distribution = policy.get_distribution(observations)
                drawn = distribution.get_actions()
                log_prob = distribution.log_prob(drawn)
        shape = (-1, *(policy.action_space.shape or ()))
        actions, log_probs = drawn.cpu().numpy().reshape(shape), log_prob.cpu().numpy()
        if self._bounds is None:
            return actions + self._start if np.any(self._start) else actions, log_probs
        half_width = 0.5 * (self._bounds.high.astype(np.float64) - self._bounds.low)
        return unscaled(actions, self._bounds), log_probs - np.log(half_width).sum()


def _warn_of_other_statistics(behavior_env: VecEnv, env: VecEnv) -> None:
    """Warn if the two envs normalize observations with different statistics."""
    theirs, ours = (_statistics(unwrap_vec_normalize(one)) for one in (behavior_env, env))
    if theirs.keys() != ours.keys() or not all(np.allclose(theirs[name], ours[name]) for name in theirs):
        warnings.warn(
            "behavior_policy was trained on observations that VecNormalize scales in another way than those of this "
            "env, which it will see: give both envs the same statistics (VecNormalize.save and load), or none",
            stacklevel=3,
        )


def _statistics(wrapper: VecNormalize | None) -> dict[str, np.ndarray]:
    """Return the mean and variance that observations are normalized with."""
    if wrapper is None or not wrapper.norm_obs:
        return {}
    running: Any = wrapper.obs_rms
    parts = running if isinstance(running, dict) else {"": running}
    return {f"{key} {name}": getattr(rms, name) for key, rms in parts.items() for name in ("mean", "var")}


# -------------------------------------------------------------------- uniform actions


def uniform_behavior(space: spaces.Space[Any], squashed: bool) -> BehaviorPolicy:
    """Return a behavior that draws uniform actions, as SB3 does before ``learning_starts``.

    :param space: Discrete, MultiDiscrete, MultiBinary, or a bounded Box; actions of a Box of integers are floating too
    :param squashed: whether the policy's actions lie in [-1, 1]
    :raises ValueError: a Box has no bounds or no volume, so that there is no uniform density
    """
    log_prob = -_log_size(space, squashed)

    def behavior(obs: Any) -> tuple[np.ndarray, np.ndarray]:
        n_envs = _n_envs(obs)
        if not isinstance(space, spaces.Box):
            return np.stack([space.sample() for _ in range(n_envs)]), np.full(n_envs, log_prob)
        low, high = space.low, space.high
        if takes_other_numbers(space):  # integers have no density, and their widths overflow
            low, high = low.astype(np.float64), high.astype(np.float64)
            actions = space.np_random.uniform(low, high, (n_envs, *space.shape))
        else:
            actions = np.stack([space.sample() for _ in range(n_envs)])
        if squashed:
            actions = 2 * ((actions - low) / (high - low)) - 1
        return actions, np.full(n_envs, log_prob)

    return behavior


def masked_uniform_behavior(space: spaces.Space[Any]) -> BehaviorPolicy:
    """Return a behavior that draws uniformly among the actions that the mask in the observations allows.

    :param space: Discrete, MultiDiscrete or MultiBinary
    """
    starts = mask_starts(space)
    start, shape = first_choice(space), (-1, *(space.shape or ()))

    def behavior(obs: Any) -> tuple[np.ndarray, np.ndarray]:
        masks = np.asarray(obs[MASK_KEY], dtype=bool)
        noise = np.where(masks, space.np_random.random(masks.shape), -1.0)
        drawn = [part.argmax(1) for part in np.split(noise, starts[1:], axis=1)]
        n_allowed = np.add.reduceat(masks, starts, axis=1, dtype=np.int64)
        return np.stack(drawn, 1).reshape(shape) + start, -np.log(n_allowed).sum(1)

    return behavior


def _log_size(space: spaces.Space[Any], squashed: bool) -> float:
    """Return the logarithm of the number of actions or, for a Box, of the volume that the policy's actions fill."""
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
