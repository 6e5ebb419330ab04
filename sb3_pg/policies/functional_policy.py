"""The policy as a function of its parameters, for gradients of single episodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.func import functional_call

from sb3_pg.functional.episode_gradients import LogProb
from sb3_pg.policies.policy_cache import action_dist_kept, has_own_forward, original, uncompiled


class _LogProbModule(nn.Module):
    """A module whose forward is log pi(a|s), for ``functional_call``, which takes modules only."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.policy = policy
        self._has_own_forward = has_own_forward(policy)

    def forward(self, observations: Any, actions: th.Tensor) -> th.Tensor:
        if self._has_own_forward:
            return self.policy.evaluate_actions(observations, actions)[1]
        return self.policy.get_distribution(observations).log_prob(actions)


@contextmanager
def functional_log_prob(policy: ActorCriticPolicy) -> Iterator[LogProb]:
    """Yield the policy's log-prob as a function of parameters, observations and actions.

    :param policy: the policy; calls of the function do not change it
    """
    policy = original(policy)
    module = _LogProbModule(policy)
    # All names of each parameter. Shared modules are visited once: functional_call's own search for tied weights visits
    # them several times, and does not put their parameters back.
    places: dict[nn.Parameter, list[str]] = {}
    for path, submodule in module.named_modules():
        for attribute, parameter in submodule.named_parameters(recurse=False):
            places.setdefault(parameter, []).append(f"{path}.{attribute}")
    places_of = {name: places[parameter] for name, parameter in policy.named_parameters()}

    def log_prob(parameters: dict[str, th.Tensor], observations: Any, actions: th.Tensor) -> th.Tensor:
        named = {place: parameter for name, parameter in parameters.items() for place in places_of[name]}
        result: th.Tensor = functional_call(module, named, (observations, actions), tie_weights=False)
        return result

    with action_dist_kept(policy), uncompiled():
        yield log_prob
