"""The protocol between a baseline and the algorithm that subtracts it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch as th

from sb3_pg.rollout import RolloutBatch

#: Function that computes the gradients of each episode's weighted sums of log-probs. It takes weights
#: ``(k, n_steps, n_envs)`` and returns chunks of episodes, ``(n_episodes, k, n_parameters)``, where the parameters are
#: the actor's trained ones, in their order.
EpisodeGradients = Callable[[th.Tensor], Iterable[th.Tensor]]


class Baseline:
    """Subtracts the return that is expected anyway, so that an action is credited with the rest.

    A new baseline is a subclass with ``advantages`` (or with ``fit`` and ``predict``, see :class:`FitPredict`), and a
    line in ``sb3_pg.baselines.BASELINES``. Members that it does not define keep these defaults.

    For each batch the algorithm calls, in this order:

    1. ``fit_gradients``, if ``uses_gradients``;
    2. ``fit``, if ``uses_fit`` and the algorithm has ``critic_fit="before"``;
    3. ``advantages``;
    4. ``fit``, if ``uses_fit`` and the algorithm has ``critic_fit="after"`` (the default, which is unbiased).

    Then, if ``per_parameter``, it subtracts ``parameter_constants`` times the mean score from the gradient.
    """

    #: whether ``advantages`` reads ``batch.values``, so that the policy's critic must be trained
    requires_critic: bool = False
    #: least number of episodes per update; with fewer, the advantages are 0 or undefined
    min_episodes: int = 1
    #: whether ``fit`` learns something from a batch that ``advantages`` subtracts from a later one
    uses_fit: bool = False
    #: whether the algorithm must call ``fit_gradients``
    uses_gradients: bool = False
    #: whether each parameter of the actor has a baseline of its own: ``advantages`` then subtracts only a part of it,
    #: and callers that need one advantage per step refuse the baseline
    per_parameter: bool = False
    #: whether an advantage is the return less ``batch.values``, as in SB3's own rollout buffers
    subtracts_values: bool = False
    #: if ``per_parameter``, b of each trained actor parameter, less what ``advantages`` has already subtracted
    parameter_constants: th.Tensor | None = None

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Return less baseline of each step.

        :param batch: the rollout
        :param returns: returns of the steps, reward units, double precision, ``(n_steps, n_envs)``; any number in the
            padding
        :return: reward units, shape and dtype of ``returns``, 0 in the padding: see :func:`subtract`
        """
        raise NotImplementedError(f"{type(self).__name__} has neither advantages nor fit and predict")

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Learn from a batch. Arguments are those of :meth:`advantages`."""
        raise NotImplementedError(f"{type(self).__name__} has uses_fit=True, and no fit")

    def fit_gradients(
        self, batch: RolloutBatch, returns: th.Tensor, weights: th.Tensor, gradients: EpisodeGradients
    ) -> None:
        """Learn from the gradients of the batch's episodes.

        :param batch: the rollout
        :param returns: see :meth:`advantages`
        :param weights: w_t, the factor of each step's term in the policy gradient, ``(n_steps, n_envs)``
        :param gradients: returns the gradients for any weights
        """
        raise NotImplementedError(f"{type(self).__name__} has uses_gradients=True, and no fit_gradients")


@runtime_checkable
class FitPredict(Protocol):
    """A user's object that serves as ``baseline=``; :class:`ForeignBaseline` makes a :class:`Baseline` of it.

    By default (``critic_fit="after"``) it predicts before it is fitted to the same batch, which leaves the gradient
    unbiased. It may have the attributes ``fits_own_batch = True``, which asks for the fit first, and
    ``requires_critic`` and ``min_episodes`` as in :class:`Baseline`.
    """

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Learn from a batch.

        :param batch: the rollout
        :param returns: the returns that the baseline is subtracted from, ``(n_steps, n_envs)``, 0 in the padding;
            double precision, ``.float()`` to regress on observations
        """

    def predict(self, batch: RolloutBatch) -> th.Tensor | float:
        """Baseline of each step.

        :param batch: the rollout
        :return: reward units, ``(n_steps, n_envs)`` or a scalar
        """


class ForeignBaseline(Baseline):
    """An object with ``fit`` and ``predict`` as a baseline.

    :param model: the object
    """

    def __init__(self, model: FitPredict) -> None:
        self.model = model
        self._fits_own_batch = bool(getattr(model, "fits_own_batch", False))
        self.requires_critic = bool(getattr(model, "requires_critic", getattr(model, "uses_critic", False)))
        self.min_episodes = int(getattr(model, "min_episodes", 1))
        self.uses_fit = not self._fits_own_batch

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Fit the object."""
        self.model.fit(batch, returns)

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less the object's prediction.

        :raises ValueError: the prediction has neither the shape of ``returns`` nor that of a scalar
        """
        if self._fits_own_batch:
            self.model.fit(batch, returns)
        expected = th.as_tensor(self.model.predict(batch), dtype=returns.dtype, device=returns.device)
        if expected.dim() and expected.shape != returns.shape:
            raise ValueError(
                f"baseline.predict must return a scalar or shape {tuple(returns.shape)}, (n_steps, n_envs), got "
                f"{tuple(expected.shape)} from {self.model!r}"
            )
        return subtract(expected, batch, returns)


def subtract(baseline: Any, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
    """Returns less a baseline, 0 in the padding.

    :param baseline: reward units, ``(n_steps, n_envs)`` or a scalar
    :param batch: the rollout
    :param returns: ``(n_steps, n_envs)``
    """
    expected = th.as_tensor(baseline, dtype=returns.dtype, device=returns.device).detach()
    return th.where(batch.valid, returns - expected, 0.0)
