"""Run an expert, and keep its episodes as the env has shown them."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_pg.action_masks import MASK_KEY
from sb3_pg.checkpoints import unchanged_random_state
from sb3_pg.demonstrations.checks import check_observations, require_count
from sb3_pg.envs import GymVectorAdapter, NormalizationWithMasks, make_vec_env, with_action_masks
from sb3_pg.envs.action_masks import OBSERVATION_KEY
from sb3_pg.policies import has_masks, map_observations
from sb3_pg.rollout import EndlessEpisodeError, naming_env_errors, skip_reset_steps

#: What ``Demonstrations.from_model`` takes as an env.
EnvLike = str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv
#: Envs that are made of an id, at most.
_MOST_ENVS = 8


def record(
    model: BaseAlgorithm,
    env: EnvLike,
    n_episodes: int,
    deterministic: bool,
    seed: int | None,
    n_envs: int | None,
    max_episode_steps: int,
) -> dict[str, Any]:
    """Run an expert. See ``Demonstrations.from_model`` for the arguments and errors.

    :return: arguments of ``Demonstrations``
    """
    if not isinstance(model, BaseAlgorithm):
        raise TypeError(f"model must be a model of Stable-Baselines3, sb3-contrib or sb3_pg, got {model!r}")
    for name, value in (("n_episodes", n_episodes), ("n_envs", n_envs), ("max_episode_steps", max_episode_steps)):
        if value is not None or name != "n_envs":
            require_count(name, value)
    with ExitStack() as stack:
        stack.enter_context(unchanged_random_state(model.device))
        made = _made(model, env, n_episodes, n_envs)
        if isinstance(env, str):
            stack.callback(made.close)
        expert = _Expert(model, made, deterministic)
        stack.enter_context(_not_normalizing(made))
        stack.callback(setattr, model, "action_space", model.action_space)
        model.action_space = copy.deepcopy(model.action_space)  # DQN's random actions come from it
        if seed is not None:
            model.action_space.seed(seed)
            set_random_seed(seed)
            made.seed(seed)
        stack.enter_context(naming_env_errors(made))
        episodes = _run(expert, made, n_episodes, max_episode_steps)
    return _joined(episodes)


class _Episode:
    """Rows of one episode.

    :param observations: what the env showed before each step
    :param actions: what the env took
    :param rewards: what it paid
    """

    def __init__(self) -> None:
        self.observations: list[Any] = []
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.final_observation: Any = None
        self.is_truncated = False

    def __len__(self) -> int:
        return len(self.rewards)


class _Expert:
    """Acts on what the env shows, normalized and with masks as the model was trained.

    :param model: the model
    :param env: the envs
    :param deterministic: whether to take the most likely action
    """

    def __init__(self, model: BaseAlgorithm, env: VecEnv, deterministic: bool) -> None:
        self.model, self.deterministic = model, deterministic
        normalizer = model.get_vec_normalize_env() or unwrap_vec_normalize(env)
        self._normalize: Callable[[Any], Any] = lambda obs: obs
        if normalizer is not None and normalizer.norm_obs:
            self._normalize = _normalizing(normalizer, env)
        self._masks_apart = isinstance(model.policy, MaskableActorCriticPolicy)
        self._state: Any = None

    def require_fit(self, obs: Any) -> None:
        """Require observations that the model can act on.

        :param obs: what the envs show
        :raises ValueError: it cannot
        """
        space, seen = self.model.observation_space, self._seen(obs)[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about bounds
                check_observations("env's observations", seen, space, "env")
        except ValueError as error:
            raise ValueError(f"{error}. Give a VecEnv with the wrappers that the model was trained with") from error

    def act(self, obs: Any, starts: np.ndarray) -> np.ndarray:
        """Return the envs' actions.

        :param obs: what the envs show
        :param starts: whether each env's episode begins
        """
        seen, masks = self._seen(self._normalize(obs))
        actions: Any
        actions, self._state = self.model.predict(seen, self._state, starts, self.deterministic, **masks)
        return np.asarray(actions)

    def _seen(self, obs: Any) -> tuple[Any, dict[str, Any]]:
        """Return what the model takes as the observation, and as its masks if it takes them apart."""
        if not self._masks_apart:
            return obs, {}
        parts = {key: part for key, part in obs.items() if key != MASK_KEY}
        is_dict = isinstance(self.model.observation_space, spaces.Dict)
        return parts if is_dict else parts[OBSERVATION_KEY], {"action_masks": obs[MASK_KEY]}


def _made(model: BaseAlgorithm, env: EnvLike, n_episodes: int, n_envs: int | None) -> VecEnv:
    """Return vectorized envs that give masks if the model needs some.

    :raises TypeError: ``env`` is no env
    :raises ValueError: it is the model's own, has no masks, or other actions
    """
    needs_masks = has_masks(model.policy) or isinstance(model.policy, MaskableActorCriticPolicy)
    made: VecEnv
    if isinstance(env, str):
        n_envs = min(n_episodes, _MOST_ENVS if n_envs is None else n_envs)
        made = make_vec_env(env, n_envs, "dummy", use_action_masks=needs_masks)
    elif n_envs is not None:
        raise ValueError(f"n_envs must be None, since env is not the id of one, got {n_envs}")
    elif isinstance(env, VectorEnv):
        made = GymVectorAdapter(env)
    elif isinstance(env, gym.Env):
        made = DummyVecEnv([lambda: env])
    elif isinstance(env, VecEnv):
        made = env
    else:
        raise TypeError(f"env must be the id of a registered env, an env or a VecEnv, got {env!r}")
    own = model.get_env()
    if own is not None and own.unwrapped is made.unwrapped:
        raise ValueError("env must not be the model's own, whose episodes would be cut: make another one")
    if made.action_space != model.action_space:
        raise ValueError(f"env must have the model's actions, {model.action_space}, got {made.action_space}")
    return with_action_masks(made, True, probe=True) if needs_masks else made


def _normalizing(normalizer: VecNormalize, env: VecEnv) -> Callable[[Any], Any]:
    """Return a function that normalizes observations, but not their masks.

    :param normalizer: the statistics, which stay as they are
    :param env: gives the observations
    :raises ValueError: the statistics are of observations of another shape
    """
    fixed: Any = copy.copy(normalizer)  # it goes on to normalize where the original is switched off
    parts, known = _parts(env.observation_space), _parts(fixed.observation_space)
    if MASK_KEY in parts and MASK_KEY not in known:
        fixed = NormalizationWithMasks(fixed, np.zeros(0))
    if any(key != MASK_KEY and key in parts and parts[key].shape != part.shape for key, part in known.items()):
        raise ValueError(
            f"env must have its VecNormalize around all wrappers that change a shape, got {fixed.observation_space} "
            f"that is normalized, and {env.observation_space} that is acted on"
        )
    normalize: Callable[[Any], Any] = fixed.normalize_obs
    return normalize


def _parts(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """Return the space of each key, or of the only observation."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {OBSERVATION_KEY: space}


@contextmanager
def _not_normalizing(env: VecEnv) -> Iterator[None]:
    """Context in which a VecNormalize among the wrappers lets everything pass, and learns nothing."""
    normalizer = unwrap_vec_normalize(env)
    names = ("training", "norm_obs", "norm_reward")
    before = {name: getattr(normalizer, name) for name in names if normalizer is not None}
    try:
        for name in before:
            setattr(normalizer, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(normalizer, name, value)


def _run(expert: _Expert, env: VecEnv, n_episodes: int, max_episode_steps: int) -> list[_Episode]:
    """Return complete episodes, those of each env's first turn first.

    How many each env contributes is fixed before, so that short episodes are not more likely to be kept. Envs that have
    contributed theirs run on until the others have.
    """
    n_envs = env.num_envs
    quotas = [(n_episodes + n_envs - 1 - i) // n_envs for i in range(n_envs)]
    finished: list[list[_Episode]] = [[] for _ in range(n_envs)]
    running = [_Episode() for _ in range(n_envs)]
    obs: Any = env.reset()
    expert.require_fit(obs)
    starts = np.ones(n_envs, bool)
    with skip_reset_steps(env) as resetting:
        while any(len(done) < quota for done, quota in zip(finished, quotas, strict=True)):
            actions = expert.act(obs, starts)
            skipped = np.zeros(n_envs, bool) if resetting is None else resetting.copy()
            next_obs, rewards, starts, infos = env.step(actions)
            for i in range(n_envs):
                episode = running[i]
                if skipped[i] or len(finished[i]) == quotas[i]:
                    continue
                episode.observations.append(map_observations(lambda rows: np.array(rows[i]), obs))  # noqa: B023
                episode.actions.append(actions[i])
                episode.rewards.append(rewards[i])
                if starts[i]:
                    episode.is_truncated = bool(infos[i].get("TimeLimit.truncated", False))
                    episode.final_observation = infos[i]["terminal_observation"]
                    finished[i].append(episode)
                    running[i] = _Episode()
                elif len(episode) == max_episode_steps:
                    raise EndlessEpisodeError(
                        f"The episode of env {i} has not ended after max_episode_steps={max_episode_steps} steps. Give "
                        "the env a time limit (gymnasium.wrappers.TimeLimit), or raise max_episode_steps."
                    )
            obs = next_obs
            if resetting is not None:
                starts = skipped  # the episode begins with the observation of the reset
    turns = max(quotas)
    return [finished[i][turn] for turn in range(turns) for i in range(n_envs) if turn < quotas[i]]


def _joined(episodes: list[_Episode]) -> dict[str, Any]:
    """Return the arguments of ``Demonstrations``, whose arrays hold the episodes one after the other."""
    lengths = [len(episode) for episode in episodes]
    is_last = np.zeros(sum(lengths), bool)
    is_last[np.cumsum(lengths) - 1] = True
    is_truncated = np.repeat([episode.is_truncated for episode in episodes], lengths)
    observations = [obs for episode in episodes for obs in episode.observations]
    return {
        "observations": _stacked(observations),
        "actions": np.array([action for episode in episodes for action in episode.actions]),
        "rewards": np.array([reward for episode in episodes for reward in episode.rewards]),
        "terminated": is_last & ~is_truncated,
        "truncated": is_last & is_truncated,
        "final_observations": _stacked([episode.final_observation for episode in episodes]),
    }


def _stacked(rows: list[Any]) -> Any:
    """Return observations as an array, or as a dict of arrays."""
    if isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)
