"""Count the steps and episodes of a rollout, to know which envs still contribute and when it is complete."""

from typing import NamedTuple

import numpy as np


class EndlessEpisodeError(RuntimeError):
    """An episode did not end within ``max_episode_steps``."""


class EpisodeLimit(NamedTuple):
    """Longest episode to wait for.

    :param n_steps: env steps, ``max_episode_steps``
    :param advice: alternative for envs whose episodes have no end, for the error message
    """

    n_steps: int
    advice: str


class RolloutProgress:
    """Counts steps and episodes of one rollout. Exactly one of ``n_steps`` and ``episodes_per_env`` is given.

    :param n_envs: number of parallel environments
    :param n_steps: steps per env
    :param episodes_per_env: complete episodes per env
    :param limit: longest episode to wait for; None for no limit
    """

    def __init__(
        self, n_envs: int, n_steps: int | None, episodes_per_env: int | None, limit: EpisodeLimit | None
    ) -> None:
        self.n_steps = 0
        #: False where an env has contributed its episodes and waits; None if no env ever waits
        self.active: np.ndarray | None = None if episodes_per_env is None else np.ones(n_envs, dtype=bool)
        self._wanted_steps = n_steps
        self._remaining = np.full(n_envs, episodes_per_env or 0)
        self._limit = limit
        #: row at which each env's current episode began, 0 if it began before the rollout
        self.began = np.zeros(n_envs, dtype=np.int64)
        self._oldest = 0
        self._ages = np.zeros(n_envs, dtype=np.int64)

    def start(self, ages: np.ndarray) -> None:
        """Note how long each env's episode has lasted before the rollout.

        :param ages: steps, ``(n_envs,)``
        """
        if self._limit is not None:
            self._ages = ages.copy()
            self._find_oldest()

    def record(self, ended: np.ndarray) -> None:
        """Note that the episodes of these envs ended with the latest step."""
        self.began[ended] = self.n_steps
        if self.active is not None:
            self._remaining[ended] -= 1
            self.active = self._remaining > 0
        self._find_oldest()

    def record_resets(self, resetting: np.ndarray) -> None:
        """Note that the latest step, which has been counted, only reset these envs."""
        self.began[resetting] = self.n_steps
        self._find_oldest()
        if self._wanted_steps is not None and resetting.all():
            self._wanted_steps += 1  # the step has no valid transition

    def _find_oldest(self) -> None:
        if self.active is not None:
            self._oldest = int(self.began[self.active].min(initial=self.n_steps))
        elif self._limit is not None:
            self._oldest = int(self._beginnings.min())

    @property
    def _beginnings(self) -> np.ndarray:
        """Row at which each env's current episode began, negative if it began before the rollout."""
        return np.where(self.began > 0, self.began, -self._ages)

    def is_complete(self) -> bool:
        """Whether all steps or episodes are collected.

        :raises EndlessEpisodeError: an episode exceeds the limit
        """
        if self.active is not None and self._oldest == self.n_steps and not self.active.any():
            return True
        if self._limit is not None and self.n_steps - self._oldest >= self._limit.n_steps:
            waited_for = True if self.active is None else self.active
            env = int(np.argmin(np.where(waited_for, self._beginnings, self.n_steps)))
            raise EndlessEpisodeError(
                f"The episode of env {env} has not ended after max_episode_steps={self._limit.n_steps} steps, and "
                "updates take complete episodes. Give the env a time limit (gymnasium.wrappers.TimeLimit), raise "
                f"max_episode_steps, or {self._limit.advice}."
            )
        return self.active is None and self.n_steps == self._wanted_steps
