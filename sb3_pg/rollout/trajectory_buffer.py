"""A replay buffer of whole trajectories, with the log-probs of the policies that acted."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_pg.functional.precision import precise
from sb3_pg.policies import map_observations, require_choices
from sb3_pg.rollout.batch import RolloutBatch
from sb3_pg.rollout.buffers import wide_enough
from sb3_pg.rollout.trajectories import Trajectory
from sb3_pg.rollout.transition_buffer import keep_what_is_drawn


class Stored(NamedTuple):
    """Place and age of a trajectory in the buffer."""

    start: int  # row, counted from the first that was ever written
    length: int
    terminated: bool
    collected: int  # number of updates taken before it was collected
    group: int  # the same for those that were added together, higher for later ones


class TrajectoryReplayBuffer(ReplayBuffer):
    """Ring of transitions that stores one trajectory behind the other, whatever the number of envs.

    Observations are stored as acted upon, since the log-probs belong to them, and rewards as collected. They are not
    normalized again when they are sampled. A trajectory is dropped as soon as the ring overwrites a part of it.

    :param buffer_size: transitions
    :param observation_space: observation space
    :param action_space: action space
    :param device: PyTorch device
    :param n_envs: has no effect
    :param optimize_memory_usage: must be False: one trajectory's end is not the next one's beginning
    :param handle_timeout_termination: must be True: the buffer stores which trajectories a time limit has cut
    :param max_trajectories: number of trajectories to keep; None for as many as fit
    :raises ValueError: ``optimize_memory_usage`` is True, or ``handle_timeout_termination`` is False
    """

    log_probs: np.ndarray

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        max_trajectories: int | None = None,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError(
                "optimize_memory_usage=True keeps one observation per row, in which the end of a trajectory is lost: "
                "it must be False"
            )
        if not handle_timeout_termination:
            raise ValueError("handle_timeout_termination=False loses which trajectories a time limit has cut")
        super().__init__(buffer_size, observation_space, action_space, device, n_envs=1)
        keep_what_is_drawn(self)
        self.log_probs = np.zeros((self.buffer_size, 1), dtype=np.float32)
        self.max_trajectories = max_trajectories
        self.trajectories: list[Stored] = []
        self._n_written = 0

    def reset(self) -> None:
        """Forget all trajectories."""
        super().reset()
        self.trajectories, self._n_written = [], 0

    def add(self, *_: Any, **__: Any) -> None:
        """Refuse single transitions: see :meth:`add_trajectories`.

        :raises TypeError: always
        """
        raise TypeError("TrajectoryReplayBuffer takes whole trajectories with their log-probs: call add_trajectories")

    def add_trajectories(self, trajectories: Iterable[Trajectory], collected: int = 0) -> None:
        """Append whole episodes, which overwrite the oldest ones if the ring is full.

        :param trajectories: they form a group, which :meth:`drop_oldest` drops together
        :param collected: number of updates taken before they were collected
        :raises ValueError: a trajectory is empty, not complete, longer than the buffer, or has arrays with wrong shapes
            or numbers that are not finite. No trajectory is added then
        """
        trajectories = list(trajectories)
        for trajectory in trajectories:
            self._check(trajectory)
        group = self.trajectories[-1].group + 1 if self.trajectories else 0
        for trajectory in trajectories:
            self._append(trajectory, collected, group)

    def _append(self, trajectory: Trajectory, collected: int, group: int) -> None:
        length = len(trajectory)
        rows = np.arange(self._n_written, self._n_written + length) % self.buffer_size
        self.observations = wide_enough(self.observations, trajectory.observations)
        self.next_observations = wide_enough(self.next_observations, trajectory.observations)
        self._write_observations(rows, trajectory)
        self.actions[rows, 0] = np.reshape(trajectory.actions, (length, self.action_dim))
        self.rewards[rows, 0] = trajectory.rewards
        self.log_probs[rows, 0] = trajectory.log_probs
        self.dones[rows, 0] = self.timeouts[rows, 0] = 0
        self.dones[rows[-1], 0] = 1
        self.timeouts[rows[-1], 0] = trajectory.truncated
        stored = Stored(self._n_written, length, trajectory.terminated, collected, group)
        self._n_written += length
        self.full = self._n_written >= self.buffer_size
        self.pos = self._n_written % self.buffer_size
        oldest = self._n_written - self.buffer_size
        kept = [*(t for t in self.trajectories if t.start >= oldest), stored]
        self.trajectories = kept if self.max_trajectories is None else kept[-self.max_trajectories :]

    def _write_observations(self, rows: np.ndarray, trajectory: Trajectory) -> None:
        """Write observations into these rows and, beside each, the one that followed."""

        def write(array: np.ndarray, following: np.ndarray, values: Any, final: Any) -> None:
            values = np.asarray(values).reshape(len(rows), *array.shape[2:])
            array[rows, 0] = values
            following[rows[:-1], 0] = values[1:]
            following[rows[-1], 0] = np.reshape(final, array.shape[2:])

        final = trajectory.final_observation
        if final is None:
            final = map_observations(lambda _, values: values[-1], self.observations, trajectory.observations)
        map_observations(write, self.observations, self.next_observations, trajectory.observations, final)

    def drop_oldest(self) -> bool:
        """Forget the group that was added first, unless it is the only one.

        :return: whether it was forgotten
        """
        newer = [t for t in self.trajectories if t.group > self.trajectories[0].group]
        self.trajectories = newer or self.trajectories
        return bool(newer)

    def discard(self, trajectories: Iterable[Stored]) -> None:
        """Forget these trajectories.

        :param trajectories: some of ``trajectories``
        """
        gone = set(trajectories)
        self.trajectories = [t for t in self.trajectories if t not in gone]

    def size_of_rewards(self, trajectory: Stored) -> float:
        """Return the sum of a trajectory's absolute rewards.

        :param trajectory: one of ``trajectories``
        """
        rows = np.arange(trajectory.start, trajectory.start + trajectory.length) % self.buffer_size
        return float(np.abs(self.rewards[rows, 0].astype(np.float64)).sum())

    def choose(self, n: int | None) -> list[Stored]:
        """Choose trajectories: the group that was added last, and others at random.

        :param n: number of trajectories, None for all. If the last group has more, its newest are chosen
        """
        everything = self.trajectories
        if n is None or n >= len(everything):
            return list(everything)
        n_newest = sum(t.group == everything[-1].group for t in everything)
        if n_newest >= n:
            return everything[-n:]
        older = len(everything) - n_newest
        drawn = th.randperm(older)[: n - n_newest].sort().values.tolist()
        return [*(everything[i] for i in drawn), *everything[older:]]

    def batch(self, chosen: Iterable[Stored], bootstrap_truncated: bool) -> RolloutBatch:
        """Make a batch with one trajectory per column, padded to the longest.

        :param chosen: some of ``trajectories``
        :param bootstrap_truncated: whether to add the states that follow truncated episodes
        :return: with the log-probs of the policies that acted
        """
        chosen = list(chosen)
        lengths = np.array([t.length for t in chosen])
        steps = np.arange(lengths.max())[:, None]
        starts = np.array([t.start for t in chosen])
        rows = (starts + steps) % self.buffer_size  # another trajectory's in the padding
        mask, last = steps < lengths, steps == lengths - 1
        terminated = last & np.array([t.terminated for t in chosen])
        truncated = last & ~terminated

        def tensor(array: Any) -> th.Tensor:
            return th.as_tensor(array, device=self.device)

        def observations_of(stored: Any, where: np.ndarray) -> Any:
            return map_observations(lambda array: tensor(array[where, 0]), stored)

        batch = RolloutBatch(
            observations=observations_of(self.observations, rows),
            actions=tensor(self.actions[rows, 0]),
            rewards=precise(tensor(self.rewards[rows, 0])),
            terminated=tensor(terminated),
            truncated=tensor(truncated),
            timesteps=tensor(np.broadcast_to(steps, mask.shape).copy()),
            mask=None if mask.all() else tensor(mask),
            log_probs=tensor(self.log_probs[rows, 0]),
            n_episodes=len(chosen),
        )
        if bootstrap_truncated and truncated.any():
            followers = observations_of(self.next_observations, rows[truncated])
            batch.bootstrap_observations = followers, tensor(np.flatnonzero(truncated))
        return batch

    def _check(self, trajectory: Trajectory) -> None:
        length = len(trajectory)
        if not 0 < length <= self.buffer_size:
            raise ValueError(f"a trajectory must have 1 to buffer_size={self.buffer_size} steps, got {length}")
        if not trajectory.is_complete or (trajectory.terminated and trajectory.truncated):
            raise ValueError(
                "a trajectory must be a whole episode, terminated or truncated, got "
                f"terminated={trajectory.terminated}, truncated={trajectory.truncated}"
            )
        if trajectory.truncated and trajectory.final_observation is None:
            raise ValueError(
                "final_observation is None: a truncated trajectory must have the observation after its last step"
            )
        _check_array("rewards", trajectory.rewards, (length,))
        _check_array(
            "actions", trajectory.actions, (length, *(self.action_space.shape or ())), (length, self.action_dim)
        )
        require_choices(trajectory.actions, self.action_space, start=0, row="step")
        behind = ": an importance ratio is undefined where the behavior policy gave its action the probability 0"
        _check_array("log_probs", trajectory.log_probs, (length,), hint=behind)
        self._check_observations("observations", trajectory.observations, (length,))
        if trajectory.final_observation is not None:
            self._check_observations("final_observation", trajectory.final_observation, ())

    def _check_observations(self, name: str, observations: Any, rows: tuple[int, ...]) -> None:
        stored: Any = self.observations
        space: Any = self.observation_space
        if not isinstance(stored, dict):
            _check_array(name, observations, (*rows, *(space.shape or ())), (*rows, *stored.shape[2:]))
            return
        given = sorted(observations) if isinstance(observations, dict) else type(observations)
        if not (isinstance(observations, dict) and observations.keys() >= stored.keys()):
            raise ValueError(f"{name} must be a dict with the keys {sorted(stored)}, got {given}")
        for key, array in stored.items():
            shapes = (*rows, *(space[key].shape or ())), (*rows, *array.shape[2:])
            _check_array(f"{name}[{key!r}]", observations[key], *shapes)

    @staticmethod
    def _normalize_obs(obs: Any, _env: Any = None) -> Any:
        """Return the observations as they are stored."""
        return obs

    @staticmethod
    def _normalize_reward(reward: np.ndarray, _env: Any = None) -> np.ndarray:
        """Return the rewards as they are stored."""
        return reward


def _check_array(name: str, values: Any, *shapes: tuple[int, ...], hint: str = "") -> None:
    """Check that an array has one of these shapes and finite numbers."""
    values = np.asarray(values)
    if values.shape not in shapes:
        raise ValueError(f"{name} must have the shape {shapes[0]}, got {values.shape}")
    bad = np.argwhere(~np.isfinite(values)).tolist()
    if bad:
        raise ValueError(f"{name} must be finite, got {values[tuple(bad[0])]} at {bad[0]}{hint}")


class DictTrajectoryReplayBuffer(TrajectoryReplayBuffer, DictReplayBuffer):
    """:class:`TrajectoryReplayBuffer` for Dict observations."""
