"""The parameters of a policy's actor and critic."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_pg.policies.observations import zero_observation
from sb3_pg.policies.policy_cache import PolicyCache, action_dist_kept, original, policy_cache, uncompiled
from sb3_pg.policies.score_actions import policy_actions


class ParameterSets(NamedTuple):
    """Parameters of actor and critic by name. The parameters of shared features are in both."""

    actor: dict[str, th.nn.Parameter]
    critic: dict[str, th.nn.Parameter]


_KNOWN: WeakKeyDictionary[PolicyCache, ParameterSets] = WeakKeyDictionary()


def parameter_sets_of(policy: ActorCriticPolicy) -> ParameterSets:
    """Return :func:`reachable_parameters`, which are computed again only after a module or parameter was replaced."""
    cache = policy_cache(policy)
    known = _KNOWN.get(cache)
    return _KNOWN.setdefault(cache, reachable_parameters(policy)) if known is None else known


def reachable_parameters(policy: ActorCriticPolicy) -> ParameterSets:
    """Find the parameters of actor and critic by autograd.

    Log-prob and entropy depend on the actor's, the value depends on the critic's. Names cannot tell them apart: an
    observation key called ``value_map`` has parameters of the actor too.

    :param policy: any policy with SB3's ``evaluate_actions``
    """
    policy = original(policy)
    training = policy.training
    policy.set_training_mode(False)
    named = dict(policy.named_parameters())
    frozen = [parameter for parameter in named.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # frozen parameters may be trained later
    space = policy.action_space
    actions = th.zeros((1, get_action_dim(space)), device=policy.device)
    devices = [policy.device] if policy.device.type == "cuda" else []
    # A hook or an own method may draw random numbers. The generator is reset, so that training draws the same ones.
    with th.random.fork_rng(devices), uncompiled(), th.enable_grad(), action_dist_kept(policy):
        values, log_prob, entropy = policy.evaluate_actions(zero_observation(policy), policy_actions(actions, space))
        actor_output = log_prob.sum() if entropy is None else log_prob.sum() + entropy.sum()
        sets = ParameterSets(_reached(actor_output, named), _reached(values.sum(), named))
    for parameter in frozen:
        parameter.requires_grad_(False)
    policy.set_training_mode(training)
    return sets


def _reached(output: th.Tensor, named: dict[str, th.nn.Parameter]) -> dict[str, th.nn.Parameter]:
    if not output.requires_grad:
        return {}
    gradients: Any = th.autograd.grad(output, list(named.values()), allow_unused=True, retain_graph=True)
    reached = zip(named.items(), gradients, strict=True)
    return {name: parameter for (name, parameter), gradient in reached if gradient is not None}
