"""Algorithms that keep the next policy near the one that collected: what NPG, TRPO and KLPenaltyPG share."""

import torch as th

from sb3_pg.algorithms.critic_estimates import CriticEstimates
from sb3_pg.algorithms.estimation import rounding
from sb3_pg.learner.surrogate import require_known_divergence
from sb3_pg.rollout import RolloutBatch


class TrustRegionAlgorithm(CriticEstimates):
    """A policy whose divergence is known, minibatches, and advantages whose size does not matter."""

    batch_size: int | None

    def _setup_model(self) -> None:
        super()._setup_model()
        require_known_divergence(self.policy)

    @property
    def _critic_minibatch_size(self) -> int | None:
        return self.critic_batch_size or self.batch_size

    def _distinguishing_credit(self, batch: RolloutBatch) -> th.Tensor:
        """w_t A_t, ``(n_samples,)``; zeros where the advantages are nothing but rounding.

        Where a step's length does not follow from the gradient's, rounding would make a full one.
        """
        assert batch.advantages is not None
        advantages: th.Tensor = batch.select(batch.advantages)
        several = len(advantages) > 1
        size = advantages.std(correction=several) if self.normalize_advantage else advantages.abs().max()
        credit: th.Tensor = batch.select(self._credit(batch))
        return th.where(size <= rounding(batch), 0.0, credit)
