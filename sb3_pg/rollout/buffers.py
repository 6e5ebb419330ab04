"""SB3's rollout buffers with two additions: how each episode ended, and which steps are valid."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_pg.policies import States, map_observations, stored_dtype

#: Steps that a buffer without a fixed size has room for at first.
INITIAL_CAPACITY = 512

_SB3_ARRAYS = ("actions", "rewards", "returns", "episode_starts", "values", "log_probs", "advantages")
_OWN_ARRAYS = ("dones", "truncated", "mask")


def wide_enough(arrays: Any, values: Any) -> Any:
    """Make a buffer's integer arrays floating if the observations are floating, as a VecNormalize makes them.

    SB3 takes the type from the space, which a VecNormalize does not change, and would drop the decimals.

    :param arrays: an array, or a dict of arrays
    :param values: observations, in the same form
    """

    def widened(array: np.ndarray, value: Any) -> np.ndarray:
        return array.astype(np.float32) if array.dtype.kind != "f" and np.asarray(value).dtype.kind == "f" else array

    return map_observations(widened, arrays, values)


class TrajectoryRolloutBuffer(RolloutBuffer):
    """Rollout buffer that stores the env's own rewards and how each episode ended.

    :param buffer_size: steps per env, or None to grow with the episodes
    :param observation_space: observation space
    :param action_space: action space
    :param device: PyTorch device
    :param gae_lambda: lambda of :meth:`compute_returns_and_advantage`
    :param gamma: discount of :meth:`compute_returns_and_advantage`
    :param n_envs: number of parallel environments
    """

    dones: np.ndarray
    truncated: np.ndarray
    mask: np.ndarray

    def __init__(
        self,
        buffer_size: int | None,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
    ) -> None:
        self.fixed_size = buffer_size
        self.capacity = INITIAL_CAPACITY if buffer_size is None else buffer_size
        super().__init__(self.capacity, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def reset(self) -> None:
        """Empty the buffer. If it has no fixed size, it keeps the capacity that it has grown to."""
        if self.fixed_size is not None:
            self.capacity = self.fixed_size
        self.buffer_size = self.capacity
        super().reset()
        self.actions = self.actions.astype(stored_dtype(self.action_space), copy=False)
        shape = (self.buffer_size, self.n_envs)
        self.dones, self.truncated = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        self.mask = np.ones(shape, dtype=bool)
        #: whether :meth:`add` has been called, which the collector does not do
        self.filled_by_hand = False
        #: what a policy with memory remembered before the first row
        self.memory: States = {}
        #: value of the observation that followed a truncated step, if it is used; 0 elsewhere, reward units
        self.terminal_values: np.ndarray | float = 0.0
        #: (step, env) -> the observation that followed a truncated or cut-off step
        self.final_observations: dict[tuple[int, int], Any] = {}
        self.first_timesteps = np.zeros(self.n_envs, dtype=np.int64)
        self._order: np.ndarray | None = None
        #: share of valid steps
        self.valid_fraction = 1.0

    def add(self, obs: Any, *args: Any, **kwargs: Any) -> None:
        """Add one step as SB3's buffer does, for users who fill it themselves. Without a fixed size it grows."""
        if self.pos == self.buffer_size and self.fixed_size is None:
            self._grow()
        if self.pos == 0:
            self.observations = wide_enough(self.observations, obs)
        self.filled_by_hand = True
        super().add(obs, *args, **kwargs)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Compute lambda-returns and generalized advantages as SB3's buffer does.

        They include the values that follow truncated steps. SB3's collector adds these to the rewards; ours keeps them
        in ``terminal_values``.

        :param last_values: V of the observations that follow the last row, reward units, one per env
        :param dones: ``(n_envs,)``, True where the last row ended an episode
        """
        if self.filled_by_hand:
            if self.fixed_size is None:
                self._resize(self.pos)
                self.full = True
            self.dones[:-1] = self.episode_starts[1:] > 0
            self.dones[-1] = dones
        rewards, self.rewards = self.rewards, self.rewards + np.float32(self.gamma) * self.terminal_values
        try:
            super().compute_returns_and_advantage(last_values, dones)
        finally:
            self.rewards = rewards

    def append(
        self, obs: Any, actions: np.ndarray, rewards: np.ndarray, dones: np.ndarray, active: np.ndarray | None
    ) -> None:
        """Write one step of all envs.

        :param obs: as acted upon
        :param actions: as sampled, ``(n_envs, *action_shape)``
        :param rewards: ``(n_envs,)``
        :param dones: ``(n_envs,)``, True where the episode ended
        :param active: ``(n_envs,)``, False where an env waits; None if no env waits
        """
        if self.pos == self.buffer_size:
            self._grow()
        pos = self.pos
        observations: Any = self.observations
        if pos == 0:
            self.observations = observations = wide_enough(observations, obs)
        if isinstance(obs, dict):
            for key, array in observations.items():
                array[pos] = obs[key].reshape(array.shape[1:])
        else:
            observations[pos] = obs.reshape(observations.shape[1:])
        self.actions[pos] = actions.reshape(self.actions.shape[1:])
        self.rewards[pos] = rewards
        self.dones[pos] = dones
        if active is not None:
            self.mask[pos] = active
        self.pos = pos + 1

    def finish(self, episode_starts: np.ndarray, first_timesteps: np.ndarray, gaps: bool = False) -> None:
        """Close the rollout: cut the arrays to its length and set ``episode_starts``.

        :param episode_starts: ``(n_envs,)``, True where the first row began an episode
        :param first_timesteps: ``(n_envs,)``, index of the first row within its episode
        :param gaps: whether invalid steps may come before valid ones of the same env; the valid ones then move up
        """
        if self.pos < self.buffer_size:
            self._resize(self.pos)
        self.valid_fraction = float(self.mask.mean())
        if gaps and self.valid_fraction < 1:
            self._close_gaps()
        self.episode_starts[0] = episode_starts
        self.episode_starts[1:] = self.dones[:-1]
        self.first_timesteps = first_timesteps
        self.full = True

    def in_order(self, rows: th.Tensor) -> th.Tensor:
        """Reorder numbers of the steps, ``(n_steps, n_envs)``, as :meth:`finish` has reordered the steps."""
        if self._order is None:
            return rows
        order = th.as_tensor(self._order, device=rows.device)
        return rows.gather(0, order)[: self.buffer_size]

    @property
    def timesteps(self) -> np.ndarray:
        """Index of each step within its episode, ``(n_steps, n_envs)``."""
        rows = np.arange(self.buffer_size)[:, None]
        if not self.dones[:-1].any():
            return rows + self.first_timesteps
        latest_start = np.maximum.accumulate(np.where(self.episode_starts > 0, rows, -1), axis=0)
        return np.where(latest_start >= 0, rows - latest_start, rows + self.first_timesteps)

    def _close_gaps(self) -> None:
        order = np.argsort(~self.mask, axis=0, kind="stable")
        places = self.mask.cumsum(0) - 1
        self.final_observations = {
            (int(places[row, env]), env): obs for (row, env), obs in self.final_observations.items()
        }
        envs = np.arange(self.n_envs)
        self._change_arrays(lambda array: array[order, envs])
        self._order = order
        self._resize(int(self.mask.sum(0).max()))

    def _grow(self) -> None:
        self.capacity *= 2
        self._resize(self.capacity)

    def _resize(self, size: int) -> None:
        def resized(array: np.ndarray) -> np.ndarray:
            if size <= len(array):
                return array[:size]
            return np.concatenate((array, np.zeros((size - len(array), *array.shape[1:]), dtype=array.dtype)))

        before, self.buffer_size = len(self.mask), size
        self._change_arrays(resized)
        self.mask[before:] = True

    def _change_arrays(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
        for name in (*_SB3_ARRAYS, *_OWN_ARRAYS):
            setattr(self, name, change(getattr(self, name)))
        self.observations = map_observations(change, self.observations)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        """Return the samples with these indices, without the steps in which an env waited."""
        valid = self.mask.swapaxes(0, 1).reshape(-1)[batch_inds]
        return super()._get_samples(batch_inds[valid], env)


class DictTrajectoryRolloutBuffer(TrajectoryRolloutBuffer, DictRolloutBuffer):
    """:class:`TrajectoryRolloutBuffer` for Dict observations."""
