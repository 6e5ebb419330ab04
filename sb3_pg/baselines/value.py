"""The policy's own critic as a baseline."""

import torch as th

from sb3_pg.baselines.base import Baseline, subtract
from sb3_pg.rollout import RolloutBatch


class ValueBaseline(Baseline):
    r"""b(s_t) = V(s_t), the value of the policy's critic in ``batch.values``.

    Like every function of the state, it leaves the gradient unbiased if it was fitted before this batch
    (``critic_fit="after"``: the critic is trained once the advantages are computed). The algorithm trains the critic,
    together with the actor or with an optimizer of its own.
    """

    requires_critic = True

    @property
    def subtracts_values(self) -> bool:  # type: ignore[override]  # a constant in the base class
        """True unless a subclass overrides :meth:`advantages`."""
        return type(self).advantages is ValueBaseline.advantages

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less V(s_t).

        :raises ValueError: the batch has no values
        """
        if batch.values is None:
            raise ValueError("baseline='value' needs the critic's values of the batch, got batch.values=None")
        return subtract(batch.values, batch, returns)
