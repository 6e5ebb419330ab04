"""An env that shows the time, and models whose critic is a table over it: numbers that can be had by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch as th
from gymnasium import spaces

from sb3_pg import ActorCritic
from tests.helpers import Rollout, ScriptedEnv, rollout_of, vec

if TYPE_CHECKING:
    from collections.abc import Sequence

N_TIMES = 8
#: V(s_0), V(s_1), ... where s_t is the state after t steps.
VALUES = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)


class ClockEnv(ScriptedEnv):
    """Rewards 1, 2, 3, ...; what is observed is the number of steps since the episode began."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(observation_space=spaces.Discrete(N_TIMES), **kwargs)

    def _obs(self) -> int:
        return self.t


def clock_model(*envs: ScriptedEnv, **arguments: Any) -> ActorCritic:
    """V = VALUES, and gradient descent in place of RMSprop and Adam; nothing moves unless it is given a step size.

    A critic with an optimizer of its own is a table, too: only the weights are trained. In the joint step its bias is.
    """
    chosen: dict[str, Any] = {
        "learning_rate": 0.0,
        "gamma": 0.5,
        "max_grad_norm": None,
        "use_rms_prop": False,
        "policy_kwargs": {"net_arch": [], "optimizer_class": th.optim.SGD},
        "device": "cpu",
        "seed": 0,
        **arguments,
    }
    model = ActorCritic("MlpPolicy", vec(*envs), **chosen)
    set_values(model, VALUES)
    if model.critic_optimizer is not None:
        model.critic_optimizer = th.optim.SGD([model.policy.value_net.weight], lr=0.0)  # the schedule sets its rate
    return model


def set_values(model: ActorCritic, values: Sequence[float]) -> None:
    with th.no_grad():
        model.policy.value_net.weight.copy_(th.tensor(values))
        model.policy.value_net.bias.zero_()


def values_of(model: ActorCritic) -> list[float]:
    """The critic's weights: V(s_t), t = 0, 1, ..., less the bias."""
    weights: list[float] = model.policy.value_net.weight.detach().flatten().tolist()
    return weights


def update(model: ActorCritic, n_updates: int = 1) -> Rollout:
    """So many more updates.

    :return: the rollout of the last one
    """
    for _ in range(n_updates):
        model.learn(1, reset_num_timesteps=False)
    return rollout_of(model)
