"""Fitting the critic by itself, by its own optimizer."""

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.functional import value_loss
from sb3_pg.rollout import Observations


def make_critic_optimizer(parameters: list[th.nn.Parameter], learning_rate: float) -> th.optim.Optimizer:
    """Adam on the critic's parameters alone, fused where the device has it.

    :param parameters: what only the critic depends on
    :param learning_rate: initial step size
    :raises ValueError: there are none
    """
    if not parameters:
        raise ValueError(
            "The policy has no parameters that only its critic depends on, so that the critic cannot have an optimizer "
            "of its own: set critic_learning_rate=None and n_critic_updates=1"
        )
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return th.optim.Adam(parameters, lr=learning_rate, eps=1e-5, fused=fused)


def fit_critic(
    policy: ActorCriticPolicy,
    optimizer: th.optim.Optimizer,
    observations: Observations,
    targets: th.Tensor,
    n_updates: int,
    batch_size: int | None,
) -> th.Tensor:
    r"""Regress the critic on targets.

    .. math:: \phi \leftarrow \phi - \alpha \nabla_\phi \frac{1}{M} \sum_t (V_\phi(s_t) - y_t)^2

    :param policy: in train mode
    :param optimizer: over the critic's parameters
    :param observations: one row per sample
    :param targets: y_t, reward units, ``(n_samples,)``
    :param n_updates: passes over the samples
    :param batch_size: samples per step, None for all of them
    :return: mean loss of the last pass
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        return th.zeros(())  # all of it is frozen
    size = len(targets) if batch_size is None else batch_size
    losses: list[th.Tensor] = []
    for _ in range(n_updates):
        losses = []
        for rows in th.randperm(len(targets), device=targets.device).split(size):
            if isinstance(observations, dict):
                minibatch: Observations = {key: value[rows] for key, value in observations.items()}
            else:
                minibatch = observations[rows]
            loss = value_loss(policy.predict_values(minibatch).flatten(), targets[rows])
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            losses.append(loss.detach())
    return th.stack(losses).mean()
