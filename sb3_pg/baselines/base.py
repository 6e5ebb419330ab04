"""The protocol of what is subtracted from a return."""

from typing import Protocol, runtime_checkable

import torch as th

from sb3_pg.rollout.batch import RolloutBatch


@runtime_checkable
class Baseline(Protocol):
    """Predicts the return that is expected anyway, so that an action is credited with the rest.

    Any object with these two methods serves as ``baseline=``. By default (``critic_fit="after"``) it predicts before
    it is fitted to the same batch, which leaves the gradient unbiased; a class attribute ``fits_own_batch = True``
    asks for the fit first.
    """

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Learn from a batch.

        :param batch: the rollout
        :param returns: the returns that the baseline is subtracted from, ``(n_steps, n_envs)``, 0 in the padding;
            double precision, ``.float()`` to regress on observations
        """

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """Baseline of each step.

        :param batch: the rollout
        :return: reward units, ``(n_steps, n_envs)`` or a scalar
        """
