"""One rollout as tensors: what estimators, baselines and updates read."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch as th

from sb3_pg.functional.returns import episode_starts
from sb3_pg.policies.observations import Observations


@dataclass
class RolloutBatch:
    """A rollout, time-major: ``(n_steps, n_envs)`` and whatever follows. Rewards are the environment's, unedited.

    :param observations: as acted upon (normalized, stacked, ...), or a dict of those
    :param actions: as sampled, before clipping or rescaling to the environment's bounds
    :param rewards: r_t, reward units
    :param terminated: True where step t ended its episode in a terminal state
    :param truncated: True where step t was the last before a time limit, and not terminal
    :param timesteps: index of step t within its episode, carried across rollouts
    :param mask: True where a step is valid; None means everywhere
    :param bootstrap: value of the state that follows a truncated or cut-off step, 0 elsewhere
    :param values: V(s_t) of the policy's critic, None where no critic is in use
    :param log_probs: log pi(a_t|s_t) of the policy that collected, nats
    :param log_ratio: logarithm of each action's importance ratio: its log-prob now, less ``log_probs``; None on-policy
    :param log_weights: logarithms of the importance weights made of them; None on-policy
    :param n_episodes: number of complete episodes in the batch, None for segments of fixed length
    :param bootstrap_observations: the states behind ``bootstrap``, and their places in it (step * n_envs + env), for
        critics that are refitted
    :param advantages: what actions are credited with, reward units, once it is estimated
    :param returns: what critic or baseline are fitted to, likewise
    :param distributions: of the actions at the valid steps, in chunks, where they are known
    :param evaluation: the forward of the valid steps with its graph, where it was kept
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
    n_episodes: int | None = None
    bootstrap_observations: tuple[Observations, th.Tensor] | None = None
    advantages: th.Tensor | None = None
    returns: th.Tensor | None = None
    distributions: list[Any] | None = None
    evaluation: Any = None

    @cached_property
    def ends(self) -> th.Tensor:
        """True where step t is the last of its episode."""
        return self.terminated | self.truncated

    @cached_property
    def valid(self) -> th.Tensor:
        """The mask, spelled out where there is none."""
        return th.ones_like(self.ends) if self.mask is None else self.mask

    @cached_property
    def flat_observations(self) -> Any:
        """The valid observations, one row per sample."""
        return self.select(self.observations)

    @cached_property
    def episodes(self) -> th.Tensor:
        """Number of the episode, or piece of one, that each step belongs to: ``(n_steps, n_envs)``, from 0.

        Numbers run along one env's column, then on to the next; they mean nothing in the padding.
        """
        starts = episode_starts(self.ends) & self.valid
        return (starts.T.flatten().cumsum(0) - 1).view(starts.shape[1], -1).T

    def select(self, x: Any) -> Any:
        """The valid rows of ``x`` (a tensor or a dict of them), time and env axes flattened to one."""
        if isinstance(x, dict):
            return {key: self.select(value) for key, value in x.items()}
        return x.flatten(0, 1) if self.mask is None else x[self.mask]

    def restore(self, x: th.Tensor) -> th.Tensor:
        """Inverse of :meth:`select` for one number per sample; 0 in the padding."""
        if self.mask is None:
            return x.view(self.rewards.shape)
        full = th.zeros(self.rewards.shape, dtype=x.dtype, device=x.device)
        full[self.mask] = x
        return full
