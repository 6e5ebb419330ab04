"""How far a rollout is: which envs still contribute, and when it is complete."""

import numpy as np


class EndlessEpisodeError(RuntimeError):
    """An episode did not end within ``max_episode_steps``."""


class RolloutProgress:
    """Counts steps and episodes of one rollout; exactly one of ``n_steps`` and ``episodes_per_env`` is given.

    :param n_envs: number of parallel environments
    :param n_steps: steps per env
    :param episodes_per_env: complete episodes per env
    :param max_episode_steps: longest episode that is waited for
    """

    def __init__(self, n_envs: int, n_steps: int | None, episodes_per_env: int | None, max_episode_steps: int) -> None:
        self.n_steps = 0
        #: False where an env has contributed its episodes and only waits; None if no env ever waits
        self.active: np.ndarray | None = None if episodes_per_env is None else np.ones(n_envs, dtype=bool)
        self._wanted_steps = n_steps
        self._remaining = np.full(n_envs, episodes_per_env or 0)
        self._max_episode_steps = max_episode_steps
        #: row at which each env's current episode began, 0 if before the rollout
        self.began = np.zeros(n_envs, dtype=np.int64)
        self._oldest = 0

    def record(self, ended: np.ndarray) -> None:
        """Note that the episodes of these envs ended with the latest step."""
        self.began[ended] = self.n_steps
        if self.active is not None:
            self._remaining[ended] -= 1
            self.active = self._remaining > 0
            self._find_oldest()

    def record_resets(self, resetting: np.ndarray) -> None:
        """Note that in the latest step, which has been counted, these envs were only reset."""
        self.began[resetting] = self.n_steps
        if self.active is not None:
            self._find_oldest()
        if self._wanted_steps is not None and resetting.all():
            self._wanted_steps += 1  # nothing has come of it

    def _find_oldest(self) -> None:
        self._oldest = int(self.began[self.active].min(initial=self.n_steps))

    def is_complete(self) -> bool:
        """Whether all is there.

        :raises EndlessEpisodeError: an episode that is waited for has become too long
        """
        if self.active is None:
            return self.n_steps == self._wanted_steps
        if self._oldest == self.n_steps and not self.active.any():
            return True
        if self.n_steps - self._oldest >= self._max_episode_steps:
            env = int(np.argmin(np.where(self.active, self.began, self.n_steps)))
            raise EndlessEpisodeError(
                f"The episode of env {env} has not ended after max_episode_steps={self._max_episode_steps} steps, and "
                "complete-episode mode waits for it. Give the env a time limit (gymnasium.wrappers.TimeLimit), raise "
                "max_episode_steps, or collect segments with n_steps= and baseline='value'."
            )
        return False
