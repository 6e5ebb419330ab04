"""What a step has done to a policy, by formulas of the tests' own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from tests.helpers import Rollout, rollout_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from stable_baselines3.common.policies import ActorCriticPolicy


class Update(NamedTuple):
    """One update: the policy before it, a copy; the policy after it; what both were measured on; and the log."""

    old: ActorCriticPolicy
    new: ActorCriticPolicy
    batch: Rollout
    log: dict[str, Any]

    @property
    def moved(self) -> set[str]:
        """Names of the parameters that are not the same to the bit."""
        pairs = zip(self.old.named_parameters(), self.new.parameters(), strict=True)
        return {name for (name, old), new in pairs if not th.equal(old, new)}

    @property
    def is_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.new.parameters())


def update(model: Any, callback: BaseCallback | None = None) -> Update:
    """One more update of a model; of one that has failed, the batch is the one it failed on."""
    if model.use_sde:
        with th.no_grad():
            model.policy.reset_noise()  # the first noise has a graph, which cannot be copied
    old = copy.deepcopy(model.policy)
    model.learn(1, callback, reset_num_timesteps=False)
    return Update(old, model.policy, rollout_of(model), dict(model.logger.name_to_value))


class AtRolloutEnd(BaseCallback):
    """Does something with the model between a rollout and the update from it."""

    def __init__(self, act: Callable[[Any], object]) -> None:
        super().__init__()
        self.act = act

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.act(self.model)


def plant(value: float) -> AtRolloutEnd:
    """Let the first advantage of every rollout be this."""

    def act(model: Any) -> None:
        model.rollout_buffer.advantages[0, 0] = value

    return AtRolloutEnd(act)


def history(model: Any, total_timesteps: int) -> list[dict[str, Any]]:
    """What the updates of a training have logged."""
    logs: list[dict[str, Any]] = []
    model.learn(total_timesteps, AtRolloutEnd(lambda m: logs.append(dict(m.logger.name_to_value))))
    return [*logs[1:], dict(model.logger.name_to_value)]


def own_joint_kl(old: ActorCriticPolicy, new: ActorCriticPolicy, observations: Any) -> float:
    """KL(old || new) of the whole action vector, nats, averaged over states."""
    return float(mean_joint_kl(old, new, observations).detach())


def mean_joint_kl(old: ActorCriticPolicy, new: ActorCriticPolicy, observations: Any) -> th.Tensor:
    """The same with its graph."""
    held: list[Any] = [policy.get_distribution(observations).distribution for policy in (old, new)]
    p, q = (whole if isinstance(whole, list) else [whole] for whole in held)
    return th.stack([_kl(a, b) for a, b in zip(p, q, strict=True)]).sum(0).mean()


def _kl(p: Any, q: Any) -> th.Tensor:
    if isinstance(p, th.distributions.Normal):
        m, s, n, t = (x.double() for x in (p.loc, p.scale, q.loc, q.scale))
        gaussian: th.Tensor = ((t / s).log() + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum(1)
        return gaussian
    a, b = p.probs.double(), q.probs.double()
    whole: th.Tensor = a * (a / b).log()
    if isinstance(p, th.distributions.Bernoulli):
        whole = whole + (1 - a) * ((1 - a) / (1 - b)).log()
    else:
        assert isinstance(p, th.distributions.Categorical)
    return whole.sum(1)
