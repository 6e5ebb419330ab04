"""Baselines that are averages of the batch's own returns.

As the lecture warns, the reward-to-go of later steps sums fewer rewards, so one constant for all steps fits badly.
``time``, or a baseline that depends on the state, fits better.
"""

import torch as th

from sb3_pg.baselines.base import Baseline, subtract
from sb3_pg.rollout import RolloutBatch


class NoBaseline(Baseline):
    """b = 0."""

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """The returns."""
        return subtract(0.0, batch, returns)


def _group_sums(
    returns: th.Tensor, groups: th.Tensor, valid: th.Tensor, per_episode: bool
) -> tuple[th.Tensor, th.Tensor]:
    """Return sum and number of the returns of each group. If ``per_episode``, all returns of a group count as one."""
    index, values = groups[valid], returns[valid]
    counts = th.bincount(index).to(values.dtype)
    sums = th.zeros_like(counts).index_add_(0, index, values)
    return (sums / counts, th.ones_like(counts)) if per_episode else (sums, counts)


class MeanBaseline(Baseline):
    r"""One constant for the batch.

    .. math:: b = \frac{1}{N} \sum_i R(\tau_i) \quad\text{(total)}, \qquad
              b = \frac{1}{M} \sum_{i,t} G_{i,t} \quad\text{(reward-to-go, M steps in all)}

    Source: the lecture's "average reward". The average contains each episode's own return. With total returns this
    scales the gradient by exactly 1 - 1/N; with rewards-to-go it biases the gradient by O(1/N).

    :param per_episode: whether a return is one number per episode (total returns)
    """

    def __init__(self, per_episode: bool = False) -> None:
        self.per_episode = per_episode
        self.min_episodes = 2 if per_episode else 1

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less their average."""
        sums, counts = _group_sums(returns, batch.episodes, batch.valid, self.per_episode)
        return subtract(sums.sum() / counts.sum(), batch, returns)


class LeaveOneOutBaseline(Baseline):
    r"""The average over the *other* episodes, which keeps the gradient unbiased.

    .. math:: b_i = \frac{1}{N-1} \sum_{j \ne i} R(\tau_j)

    With reward-to-go it is the average of G over all steps of the other episodes. In ``n_steps`` mode whole envs are
    left out instead of episodes. Source: Kool et al. (2019). The episodes must be independent of each other; gSDE noise
    that is kept over several episodes of one env makes them slightly dependent.

    :param per_episode: whether a return is one number per episode (total returns)
    """

    min_episodes = 2

    def __init__(self, per_episode: bool = False) -> None:
        self.per_episode = per_episode

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less the average of the others.

        :raises ValueError: fewer than two episodes (or envs, for segments)
        """
        if batch.n_episodes is None:
            groups = th.arange(returns.shape[1], device=returns.device).expand(returns.shape)
        else:
            groups = batch.episodes
        sums, counts = _group_sums(returns, groups, batch.valid, self.per_episode)
        if len(sums) < 2:
            raise ValueError(
                f"baseline='leave_one_out' needs at least 2 episodes (or envs) in a batch, got {len(sums)}"
            )
        others = (sums.sum() - sums) / (counts.sum() - counts)
        return subtract(others[groups.clamp(0, len(others) - 1)], batch, returns)


class TimeBaseline(Baseline):
    r"""The average over episodes at the same time step.

    .. math:: b_t = \frac{1}{N_t} \sum_{i:\, T_i > t} G_{i,t}, \qquad N_t = |\{i : T_i > t\}|

    Source: the lecture's :math:`b_t = \frac1N \sum_i Q(s_{i,t}, a_{i,t})`, for episodes of unequal length. The average
    contains each episode's own return, which biases the gradient by O(1/N). If only one episode reaches step t, the
    advantage of that step is 0.
    """

    min_episodes = 2

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less b_t."""
        sums, counts = _group_sums(returns, batch.timesteps, batch.valid, per_episode=False)
        averages = sums / counts.clamp(min=1)
        return subtract(averages[batch.timesteps.clamp(max=len(averages) - 1)], batch, returns)
