"""Trajectories, which are episodes of one env, and how to cut a rollout into them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_pg.policies import first_choice, from_env, map_observations, require_choices
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer


@dataclass(frozen=True)
class Trajectory:
    """An episode of T steps, or a piece of one.

    :param observations: as acted upon (normalized, stacked, ...), ``(T, *obs_shape)``, or a dict of those
    :param actions: as sampled, before clipping or rescaling to the environment's bounds, ``(T, *action_shape)``.
        Discrete and MultiDiscrete actions count from 0 in a buffer. ``OffPolicyPG.add_trajectories`` takes actions that
        count from the space's ``start``
    :param rewards: r_t, reward units, ``(T,)``
    :param log_probs: log mu(a_t|s_t) of the policy that acted, nats, ``(T,)``
    :param terminated: whether it ended in a terminal state
    :param truncated: whether a time limit cut it before a terminal state. Neither is set if the episode goes on
    :param final_observation: observation after the last step, ``obs_shape``; may be None unless it is truncated
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
        """Return the trajectory with actions that count from 0, as the policy's do, instead of the space's ``start``.

        :param policy: policy that is to learn from the trajectory
        :raises ValueError: an action is not in the space, or a squashed policy cannot draw it
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
        """Join this piece of an episode and the next one."""

        def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.concatenate((first, second))

        return Trajectory(
            map_observations(joined, self.observations, rest.observations),
            joined(self.actions, rest.actions),
            joined(self.rewards, rest.rewards),
            joined(self.log_probs, rest.log_probs),
            rest.terminated,
            rest.truncated,
            rest.final_observation,
        )


class Pieces:
    """Joins the pieces of episodes that span several rollouts.

    :param n_envs: number of parallel environments
    """

    def __init__(self, n_envs: int) -> None:
        self._open: list[Trajectory | None] = [None] * n_envs

    def state_dict(self) -> dict[str, Any]:
        """Return the pieces as plain dicts of arrays."""
        return {"pieces": [None if piece is None else dict(vars(piece)) for piece in self._open]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Pieces":
        """Return the pieces that :meth:`state_dict` has returned."""
        pieces = cls(len(state["pieces"]))
        pieces._open = [None if piece is None else Trajectory(**piece) for piece in state["pieces"]]
        return pieces

    def complete(self, buffer: TrajectoryRolloutBuffer) -> list[Trajectory]:
        """Cut a finished rollout at the ends of its episodes.

        :param buffer: finished, with the log-probs of its actions
        :return: the episodes that have ended, in the order of their ends. Episodes whose beginning was lost in an
            interrupted rollout or a reset are left out
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

    def rows(array: np.ndarray) -> np.ndarray:
        return array[first : last + 1, env].copy()

    final = buffer.final_observations.get((last, env))
    # Without the observation that followed there is no value to bootstrap from: the episode counts as terminated.
    done, truncated = bool(buffer.dones[last, env]), bool(buffer.truncated[last, env]) and final is not None
    return Trajectory(
        map_observations(rows, buffer.observations),
        rows(buffer.actions),
        rows(buffer.rewards),
        rows(buffer.log_probs),
        done and not truncated,
        truncated,
        final,
    )
