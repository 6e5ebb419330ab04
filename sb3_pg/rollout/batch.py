"""One rollout as tensors, for estimators, baselines and updates."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch as th

from sb3_pg.functional.returns import episode_starts
from sb3_pg.policies import Followers, History, KeptScores, Observations, Sequences, State


@dataclass
class RolloutBatch:
    """A rollout, time-major: ``(n_steps, n_envs, ...)``. Rewards are the environment's, unedited.

    :param observations: as acted upon (normalized, stacked, ...), or a dict of those
    :param actions: as sampled, before clipping or rescaling to the environment's bounds
    :param rewards: r_t, reward units
    :param terminated: True where step t ended its episode in a terminal state
    :param truncated: True where step t was the last before a time limit and not terminal
    :param timesteps: index of step t within its episode, carried across rollouts
    :param mask: True where a step is valid; None if all are
    :param bootstrap: value of the state that follows a truncated or cut-off step, 0 elsewhere. For an estimator that
        ``continues``, a terminated step in the last row is cut off too: the reset gives the state that follows
    :param values: V(s_t) of the policy's critic, None if no critic is in use
    :param log_probs: log pi(a_t|s_t) of the policy that collected, nats
    :param log_ratio: logarithm of each action's importance ratio, its log-prob now minus ``log_probs``; None on-policy
    :param log_weights: logarithms of the importance weights; None on-policy
    :param average_reward: what the returns subtract from each reward, reward units per step; None where that is nothing
    :param n_episodes: number of complete episodes in the batch, None for segments of fixed length
    :param bootstrap_observations: the states whose values ``bootstrap`` holds, and their places: step * n_envs + env
    :param sequences: of a policy with memory: which valid steps follow each other; None for other policies
    :param advantages: what actions are credited with, reward units, once estimated
    :param returns: what the critic or baseline is fitted to, reward units, once estimated
    :param distributions: per chunk of valid steps, a function that returns the action distributions, or None if they
        are not known
    :param critic_state: what a critic with a memory of its own remembers before each of ``bootstrap_observations``
    :param kept_scores: scores of the valid steps with their graph, for an update that follows at once; None if unknown
    """

    observations: Observations
    actions: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    truncated: th.Tensor
    timesteps: th.Tensor
    mask: th.Tensor | None = None
    bootstrap: th.Tensor | None = None
    values: th.Tensor | None = None
    log_probs: th.Tensor | None = None
    log_ratio: th.Tensor | None = None
    log_weights: th.Tensor | None = None
    average_reward: th.Tensor | None = None
    n_episodes: int | None = None
    bootstrap_observations: tuple[Observations, th.Tensor] | None = None
    sequences: Sequences | None = None
    advantages: th.Tensor | None = None
    returns: th.Tensor | None = None
    distributions: list[Any] | None = None
    critic_state: State | None = None
    kept_scores: KeptScores | None = None

    @cached_property
    def ends(self) -> th.Tensor:
        """True where step t is the last of its episode."""
        return self.terminated | self.truncated

    @cached_property
    def valid(self) -> th.Tensor:
        """True where a step is valid, also if there is no mask."""
        return th.ones_like(self.ends) if self.mask is None else self.mask

    @cached_property
    def flat_observations(self) -> Any:
        """The valid observations, one row per sample; of a policy with memory, their history."""
        observations = self.select(self.observations)
        return observations if self.sequences is None else History(observations, self.sequences)

    @cached_property
    def followers(self) -> Any:
        """The states whose values ``bootstrap`` holds, or None; of a policy with memory, with their sequences."""
        if self.bootstrap_observations is None or self.sequences is None:
            return None if self.bootstrap_observations is None else self.bootstrap_observations[0]
        observations, places = self.bootstrap_observations
        terminated = self.terminated.reshape(-1)[places]
        return Followers(observations, self.episodes.reshape(-1)[places], terminated)

    @cached_property
    def episodes(self) -> th.Tensor:
        """Number of the episode, or piece of one, that each step belongs to, from 0: ``(n_steps, n_envs)``.

        Numbers run along one env's column, then on to the next. They mean nothing in the padding.
        """
        starts = episode_starts(self.ends) & self.valid
        return (starts.T.flatten().cumsum(0) - 1).view(starts.shape[1], -1).T

    def select(self, x: Any) -> Any:
        """Return the valid rows of a tensor, or of a dict of tensors, with time and env axes flattened to one."""
        if isinstance(x, dict):
            return {key: self.select(value) for key, value in x.items()}
        return x.flatten(0, 1) if self.mask is None else x[self.mask]

    def select_all(self, *columns: th.Tensor | None) -> list[Any]:
        """Call :meth:`select` with each of several tensors. None stays None."""
        return [None if column is None else self.select(column) for column in columns]

    def restore(self, x: th.Tensor) -> th.Tensor:
        """Undo :meth:`select` for one number per sample; the padding is 0."""
        if self.mask is None:
            return x.view(self.rewards.shape)
        full = th.zeros(self.rewards.shape, dtype=x.dtype, device=x.device)
        full[self.mask] = x
        return full
