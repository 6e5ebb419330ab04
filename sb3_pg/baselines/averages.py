"""Baselines that are averages of the batch's own returns.

Mind what the lecture warns of: with reward-to-go, later steps sum fewer rewards, so one constant for all steps fits
them badly; ``time`` or a baseline that sees the state fits better.
"""

import torch as th

from sb3_pg.rollout.batch import RolloutBatch


class NoBaseline:
    """b = 0."""

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Nothing to learn."""

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """Zero."""
        return batch.rewards.new_zeros(())


def _group_sums(
    returns: th.Tensor, groups: th.Tensor, valid: th.Tensor, per_episode: bool
) -> tuple[th.Tensor, th.Tensor]:
    """Sum of returns and number of terms of each group; a whole episode is one term if its return is one number."""
    index, values = groups[valid], returns[valid]
    counts = th.bincount(index).to(values.dtype)
    sums = th.zeros_like(counts).index_add_(0, index, values)
    return (sums / counts, th.ones_like(counts)) if per_episode else (sums, counts)


class MeanBaseline:
    r"""One constant for the batch.

    .. math:: b = \frac{1}{N} \sum_i R(\tau_i) \quad\text{(total)}, \qquad
              b = \frac{1}{M} \sum_{i,t} G_{i,t} \quad\text{(reward-to-go, M steps in all)}

    Source: the lecture's "average reward". It contains each episode's own return: with total returns the
    gradient is scaled by exactly 1 - 1/N, with rewards-to-go it is biased by O(1/N).

    :param per_episode: whether a return is one number per episode (total returns)
    """

    fits_own_batch = True

    def __init__(self, per_episode: bool = False) -> None:
        self.per_episode = per_episode
        self._mean = th.zeros(())

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Average the returns."""
        sums, counts = _group_sums(returns, batch.episodes, batch.valid, self.per_episode)
        self._mean = sums.sum() / counts.sum()

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """The average."""
        return self._mean


class LeaveOneOutBaseline:
    r"""The average over the *other* episodes, which keeps the gradient unbiased.

    .. math:: b_i = \frac{1}{N-1} \sum_{j \ne i} R(\tau_j)

    and, with reward-to-go, the average of G over all steps of the other episodes. In ``n_steps`` mode whole envs are
    left out instead. Source: Kool et al. (2019). It takes episodes that are independent of each other; gSDE's
    noise, held over several episodes of one env, makes them slightly less so.

    :param per_episode: whether a return is one number per episode (total returns)
    """

    fits_own_batch = True

    def __init__(self, per_episode: bool = False) -> None:
        self.per_episode = per_episode
        self._of_step = th.zeros(())

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Average over all groups but one, for each.

        :raises ValueError: fewer than two episodes (or envs, for segments)
        """
        if batch.n_episodes is None:
            groups = th.arange(returns.shape[1], device=returns.device).expand(returns.shape)
        else:
            groups = batch.episodes
        sums, counts = _group_sums(returns, groups, batch.valid, self.per_episode)
        if len(sums) < 2:
            raise ValueError(f"leave_one_out needs at least 2 episodes (or envs) in a batch, got {len(sums)}")
        others = (sums.sum() - sums) / (counts.sum() - counts)
        self._of_step = others[groups.clamp(0, len(others) - 1)]

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """The average of the others."""
        return self._of_step


class TimeBaseline:
    r"""The average over episodes at the same time step.

    .. math:: b_t = \frac{1}{N_t} \sum_{i:\, T_i > t} G_{i,t}, \qquad N_t = |\{i : T_i > t\}|

    Source: the lecture's :math:`b_t = \frac1N \sum_i Q(s_{i,t}, a_{i,t})`, with episodes of unequal length. It contains
    each episode's own return, which biases the gradient by O(1/N); where one episode alone reaches step t, that
    step's advantage is 0.
    """

    fits_own_batch = True

    def __init__(self) -> None:
        self._of_timestep = th.zeros(1)

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Average the returns at each step of the episode."""
        sums, counts = _group_sums(returns, batch.timesteps, batch.valid, per_episode=False)
        self._of_timestep = sums / counts.clamp(min=1)

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """b_t; 0 beyond the longest episode seen."""
        known = batch.timesteps < len(self._of_timestep)
        of_step = self._of_timestep[batch.timesteps.clamp(max=len(self._of_timestep) - 1)]
        return th.where(known, of_step, 0.0)
