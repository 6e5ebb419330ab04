"""Trajectories, whole episodes of one env, and how to cut a rollout into them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_pg.policies.actions import first_choice, from_env, require_choices
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer


@dataclass(frozen=True)
class Trajectory:
    """An episode of T steps, or a piece of one, as the acting policy saw it.

    :param observations: as acted upon (normalized, stacked, ...), ``(T, *obs_shape)``, or a dict of those
    :param actions: as sampled, before clipping or rescaling to the environment's bounds, ``(T, *action_shape)``.
        Discrete and MultiDiscrete ones count from 0 in a buffer, and from the space's ``start`` in what
        ``OffPolicyPG.add_trajectories`` takes
    :param rewards: r_t, reward units, ``(T,)``
    :param log_probs: log mu(a_t|s_t) of the policy that acted, nats, ``(T,)``
    :param terminated: whether it ended in a terminal state
    :param truncated: whether a time limit cut it, and it is not terminal; a piece that goes on is neither
    :param final_observation: what followed the last step, ``obs_shape``; may be None unless it is truncated
    """

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    log_probs: np.ndarray
    terminated: bool
    truncated: bool = False
    final_observation: Any = None

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def is_complete(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or self.truncated

    def as_drawn_by(self, policy: BasePolicy) -> "Trajectory":
        """Convert the env's numbers of the actions to the policy's, counted from 0.

        :param policy: policy that is to learn from the trajectory
        :raises ValueError: an action that is not in the space, or that a squashed policy cannot draw
        """
        actions, space = np.asarray(self.actions), policy.action_space
        if isinstance(space, spaces.Box) and policy.squash_output:
            bad = np.argwhere(np.abs(actions) > 1)
            if len(bad):
                value, step = actions[tuple(bad[0])], bad[0][0]
                raise ValueError(f"actions of a squashed policy must be in [-1, 1], got {value} at step {step}")
        start = first_choice(space)
        if not np.any(start) or actions.shape[1:] not in (space.shape, (get_action_dim(space),)):
            return self  # the buffer refuses a wrong shape
        require_choices(actions, space, start, "step")
        return replace(self, actions=from_env(actions, space))

    def followed_by(self, rest: "Trajectory") -> "Trajectory":
        """Join a piece and the next one of the same episode."""
        return Trajectory(
            _joined(self.observations, rest.observations),
            np.concatenate((self.actions, rest.actions)),
            np.concatenate((self.rewards, rest.rewards)),
            np.concatenate((self.log_probs, rest.log_probs)),
            rest.terminated,
            rest.truncated,
            rest.final_observation,
        )


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {key: np.concatenate((first[key], second[key])) for key in first}
    return np.concatenate((first, second))


class Pieces:
    """Joins the pieces of episodes that span several rollouts.

    :param n_envs: number of parallel environments
    """

    def __init__(self, n_envs: int) -> None:
        self._open: list[Trajectory | None] = [None] * n_envs

    def complete(self, buffer: TrajectoryRolloutBuffer) -> list[Trajectory]:
        """Cut a finished rollout at the ends of its episodes.

        :param buffer: finished, with the log-probs of its actions
        :return: the episodes that have ended, in the order of their ends, without those whose beginning is lost (after
            an interrupted rollout or a reset)
        """
        finished: list[tuple[int, Trajectory]] = []
        for env in range(buffer.n_envs):
            first, began = 0, int(buffer.first_timesteps[env])
            before, self._open[env] = self._open[env] if began else None, None
            length = int(buffer.mask[:, env].sum())
            whole = began == (0 if before is None else len(before))
            while first < length:
                ends = np.flatnonzero(buffer.dones[first:length, env])
                last = first + int(ends[0]) if len(ends) else length - 1
                piece = _cut(buffer, env, first, last)
                if before is not None and whole:
                    piece = before.followed_by(piece)
                if whole and piece.is_complete:
                    finished.append((last, piece))
                elif whole:
                    self._open[env] = piece
                first, before, whole = last + 1, None, True
        return [trajectory for _, trajectory in sorted(finished, key=lambda found: found[0])]


def _cut(buffer: TrajectoryRolloutBuffer, env: int, first: int, last: int) -> Trajectory:
    """Copy rows ``first`` to ``last`` of one env's column."""

    def rows(array: Any) -> Any:
        if isinstance(array, dict):
            return {key: rows(value) for key, value in array.items()}
        return array[first : last + 1, env].copy()

    final = buffer.final_observations.get((last, env))
    # Without the observation that followed there is nothing to bootstrap from: the episode counts as terminated.
    done, truncated = bool(buffer.dones[last, env]), bool(buffer.truncated[last, env]) and final is not None
    return Trajectory(
        rows(buffer.observations),
        rows(buffer.actions),
        rows(buffer.rewards),
        rows(buffer.log_probs),
        done and not truncated,
        truncated,
        final,
    )
