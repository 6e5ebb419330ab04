"""Training of the critic by steps of its own, and the scale of its values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from torch.nn.functional import mse_loss

from sb3_pg.functional.precision import precise
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.policies import minibatches, value_function


@dataclass
class CriticFit:
    """How a critic is trained: by the step that moves the actor, or by steps of its own.

    :param own_steps: whether the critic has steps of its own
    :param optimizer: takes these steps; None for ``policy.optimizer``
    :param n_passes: passes over each batch
    :param batch_size: samples per step, None for the whole batch
    :param before_actor: train the critic before the actor moves, and value the batch anew; otherwise afterwards
    :param warmup_updates: number of updates at the start in which only the critic is trained
    :param normalize_targets: divide the targets by their running standard deviation
    :param revalue: value the batch anew before each pass
    :param in_eval_mode: train a critic that shares features with the actor in evaluation mode, so that the statistics
        of a BatchNorm stay the actor's
    """

    own_steps: bool = False
    optimizer: th.optim.Optimizer | None = None
    n_passes: int = 1
    batch_size: int | None = None
    before_actor: bool = False
    warmup_updates: int = 0
    normalize_targets: bool = False
    revalue: bool = False
    in_eval_mode: bool = False


def make_critic_optimizer(parameters: list[th.nn.Parameter], learning_rate: float) -> th.optim.Optimizer:
    """Return Adam for the critic's parameters alone, with fused steps if the device has them.

    :param parameters: parameters that only the critic depends on
    :param learning_rate: initial step size
    :raises ValueError: there are no parameters
    """
    if not parameters:
        raise ValueError(
            "The policy has no parameters that only its critic depends on, so that the critic cannot have an optimizer "
            "of its own: set critic_learning_rate=None, n_critic_updates=1 and critic_fit='after'"
        )
    return with_fewer_operations(th.optim.Adam(parameters, lr=learning_rate, eps=1e-5))


def correct(corrections: Mapping[th.nn.Parameter, th.Tensor]) -> None:
    """Correct the gradients of parameters. One that has no gradient gets none.

    :param corrections: parameter -> what is subtracted from its ``grad``
    """
    for parameter, correction in corrections.items():
        if parameter.grad is not None:
            parameter.grad -= correction


def fit_critic(
    policy: ActorCriticPolicy,
    optimizer: th.optim.Optimizer,
    parameters: list[th.nn.Parameter],
    observations: Any,
    targets: th.Tensor,
    n_updates: int,
    batch_size: int | None,
    corrections: Mapping[th.nn.Parameter, th.Tensor] | None = None,
) -> th.Tensor:
    r"""Regress the critic on targets.

    .. math:: \phi \leftarrow \phi - \alpha \nabla_\phi \frac{1}{M} \sum_t (V_\phi(s_t) - y_t)^2

    :param policy: in train mode
    :param optimizer: its other parameters get no gradient
    :param parameters: those of the critic
    :param observations: one row per sample, or their history
    :param targets: y_t, reward units, ``(n_samples,)``
    :param n_updates: passes over the samples
    :param batch_size: samples per step, None for all of them
    :param corrections: parameter -> what is subtracted from its gradient in each step
    :return: mean loss of the last pass
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return th.zeros(())  # the whole critic is frozen
    optimizer.zero_grad()  # also the gradients of parameters that are not the critic's
    size = len(targets) if batch_size is None else batch_size
    predict = value_function(policy)
    losses: list[th.Tensor] = []
    for _ in range(n_updates):
        losses = []
        for minibatch, (y,) in minibatches(observations, [targets], size, shuffle=size < len(targets)):
            loss = mse_loss(predict(minibatch), y)
            gradients = th.autograd.grad(loss, parameters, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            correct(corrections or {})
            optimizer.step()
            losses.append(loss.detach())
    return th.stack(losses).mean()


class ReturnScale:
    """Running standard deviation of the critic's targets, over all of training. An object does not change."""

    def __init__(self, statistics: RunningMeanStd | None = None) -> None:
        self._statistics = statistics or RunningMeanStd(epsilon=0.0, shape=())

    @classmethod
    def from_moments(cls, mean: float, var: float, count: float) -> "ReturnScale":
        """Return the scale with these :attr:`moments`."""
        statistics = RunningMeanStd(epsilon=0.0, shape=())
        statistics.mean, statistics.var, statistics.count = np.asarray(mean), np.asarray(var), count
        return cls(statistics)

    @property
    def moments(self) -> dict[str, float]:
        """Mean, variance and number of all targets so far."""
        return {name: float(getattr(self._statistics, name)) for name in ("mean", "var", "count")}

    @property
    def value(self) -> float:
        """The standard deviation, reward units; 1 while all targets have been equal up to rounding."""
        variance, mean = float(self._statistics.var), float(self._statistics.mean)
        seen = self._statistics.count > 0
        return float(np.sqrt(variance)) if seen and variance > 1e-12 * mean**2 else 1.0

    def updated(self, targets: th.Tensor) -> "ReturnScale":
        """Return the scale after one more batch of targets.

        :param targets: reward units, one-dimensional
        """
        variance, mean = th.var_mean(precise(targets), correction=0)
        batch_variance, batch_mean = th.stack((variance, mean)).tolist()
        statistics = self._statistics.copy()
        statistics.update_from_moments(np.asarray(batch_mean), np.asarray(batch_variance), len(targets))
        return ReturnScale(statistics)
