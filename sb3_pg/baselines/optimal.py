"""The constant baseline of least variance."""

import torch as th

from sb3_pg.rollout.batch import RolloutBatch


class OptimalBaseline:
    r"""Constant that minimizes the variance of the gradient, from per-episode gradients.

    With :math:`X = \sum_t w_t \nabla\log\pi_t\, G_t` and :math:`Y = \sum_t w_t \nabla\log\pi_t` of an episode, where
    w_t is gamma^t under ``state_discount`` and 1 otherwise:

    .. math:: b^* = \frac{E[X \cdot Y]}{E[Y \cdot Y]}, \qquad b^*_k = \frac{E[X_k Y_k]}{E[Y_k^2]}
              \quad\text{(component-wise)}

    Source: Peters and Schaal (2008), component-wise; for total returns it is the lecture's
    :math:`E[g^2 r] / E[g^2]`, which with reward-to-go can be worse than no baseline. The expectations are averages
    over the batch that the baseline then corrects, which biases the gradient by O(1/N).

    :param component_wise: one constant per parameter; the gradient is then ``mean X - b * mean Y``, two backward
        passes, and there is no single advantage
    """

    fits_own_batch = True
    needs_episode_gradients = True

    def __init__(self, component_wise: bool = False) -> None:
        self.component_wise = component_wise
        #: what was subtracted before, to be added to ``constant``; equal returns then leave nothing, to the bit
        self.center = th.zeros(())
        #: b* - center, a scalar, or one number per actor parameter
        self.constant = th.zeros(())

    def reset(self, center: th.Tensor) -> None:
        """Begin a new batch.

        :param center: constant that was subtracted from the returns in X. With X = X' + c Y, b* = c + E[X'.Y] / E[Y.Y]
        """
        self.center = center
        self._xy: th.Tensor | float = 0.0
        self._yy: th.Tensor | float = 0.0

    def accumulate(self, gradients: th.Tensor) -> None:
        """Add episodes.

        :param gradients: X' and Y of some episodes, ``(n_episodes, 2, n_parameters)``
        """
        x, y = gradients.unbind(1)
        self._xy = self._xy + (x * y).sum(0)
        self._yy = self._yy + (y * y).sum(0)

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Close the batch whose episodes were accumulated.

        :raises RuntimeError: none were
        """
        if not isinstance(self._xy, th.Tensor) or not isinstance(self._yy, th.Tensor):
            raise RuntimeError("OptimalBaseline.fit needs the episodes' gradients first: call accumulate")
        xy, yy = (self._xy, self._yy) if self.component_wise else (self._xy.sum(), self._yy.sum())
        self.constant = th.where(yy > 0, xy / yy.where(yy > 0, th.ones_like(yy)), th.zeros_like(xy))
        self._xy = self._yy = 0.0

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """b*.

        :raises ValueError: component-wise, where no single number belongs to a step
        """
        if self.component_wise:
            raise ValueError("A component-wise baseline has one number per parameter, none per step")
        return self.center + self.constant
