"""The constant baseline that minimizes the variance of the gradient."""

import torch as th

from sb3_pg.baselines.base import Baseline, EpisodeGradients, subtract
from sb3_pg.rollout import RolloutBatch


class OptimalBaseline(Baseline):
    r"""Constant that minimizes the variance of the gradient, from per-episode gradients.

    With :math:`X = \sum_t w_t \nabla\log\pi_t\, G_t` and :math:`Y = \sum_t w_t \nabla\log\pi_t` of an episode, where
    w_t is gamma^t under ``state_discount`` and 1 otherwise:

    .. math:: b^* = \frac{E[X \cdot Y]}{E[Y \cdot Y]}, \qquad b^*_k = \frac{E[X_k Y_k]}{E[Y_k^2]}
              \quad\text{(component-wise)}

    Source: Peters and Schaal (2008), component-wise; for total returns it is the lecture's
    :math:`E[g^2 r] / E[g^2]`. (With reward-to-go, that formula can be worse than no baseline.) The expectations are
    averages over the batch that the baseline is subtracted from, which biases the gradient by O(1/N).

    :param component_wise: use one constant per parameter. The gradient is then ``mean X - b * mean Y``, which takes two
        backward passes, and a step has no single advantage
    :param per_episode: whether a return is one number per episode (total returns)
    """

    uses_gradients = True

    def __init__(self, component_wise: bool = False, per_episode: bool = False) -> None:
        self.component_wise = component_wise
        self.min_episodes = 2 if component_wise or per_episode else 1
        #: mean return, which is subtracted first, so that equal returns have exactly 0 advantage
        self.center = th.zeros(())
        #: b* - center, a scalar, or one number per actor parameter; None before the first fit
        self.constant: th.Tensor | None = None

    @property
    def per_parameter(self) -> bool:  # type: ignore[override]  # a constant in the base class
        """Whether it is component-wise."""
        return self.component_wise

    @property
    def parameter_constants(self) -> th.Tensor | None:  # type: ignore[override]  # as above
        """Component-wise, b* - center of each parameter."""
        return self.constant if self.component_wise else None

    def fit_gradients(
        self, batch: RolloutBatch, returns: th.Tensor, weights: th.Tensor, gradients: EpisodeGradients
    ) -> None:
        """Compute b* of the batch. With X = X' + c Y, b* = c + E[X'.Y] / E[Y.Y]."""
        self.center = batch.select(returns).mean()
        sums: th.Tensor | float = 0.0
        for chunk in gradients(th.stack((weights * (returns - self.center), weights))):
            x, y = chunk.unbind(1)
            sums = sums + th.stack(((x * y).sum(0), (y * y).sum(0)))
        assert isinstance(sums, th.Tensor)
        xy, yy = sums if self.component_wise else sums.sum(1)
        self.constant = th.where(yy > 0, xy / yy.where(yy > 0, th.ones_like(yy)), th.zeros_like(xy))

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less b*; component-wise, less their mean.

        :raises RuntimeError: b* of the batch is not known
        """
        if self.constant is None:
            raise RuntimeError("OptimalBaseline needs the episodes' gradients first: call fit_gradients")
        return subtract(self.center if self.component_wise else self.center + self.constant, batch, returns)
