"""The policy on many samples at once: values, log-probs and distributions, with gradient or without."""

from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Distribution

from sb3_pg.rollout.batch import Observations
from sb3_pg.rollout.plain import value_function
from sb3_pg.rollout.samplers import has_own_forward, unvalidated_distributions

#: Samples per forward without gradient; bounds the memory of image policies.
CHUNK_SIZE = 4096

#: What torch knows a divergence of: one distribution, or one per action dimension.
Distributions = Distribution | list[Distribution]


def policy_actions(actions: th.Tensor, space: spaces.Space[Any]) -> th.Tensor:
    """Stored actions as the policy's distribution expects them: long for Discrete, floating otherwise."""
    return actions.long().flatten() if isinstance(space, spaces.Discrete) else actions.float()


def split_observations(observations: Observations, size: int, order: th.Tensor | None = None) -> list[Any]:
    """Cut observations into pieces.

    :param observations: one row per sample
    :param size: rows per piece; the last may have fewer
    :param order: indices of the rows in the order wanted
    :return: the pieces, views of one copy
    """
    if isinstance(observations, dict):
        parts = {key: split_observations(value, size, order) for key, value in observations.items()}
        return [dict(zip(parts, piece, strict=True)) for piece in zip(*parts.values(), strict=True)]
    return list((observations if order is None else observations[order]).split(size))


def predict_values(policy: ActorCriticPolicy, observations: Observations) -> th.Tensor:
    """V(s) of the policy's critic, in chunks.

    :param policy: the policy
    :param observations: one row per sample
    :return: shape ``(n_samples,)``
    """
    predict = value_function(policy)
    with th.inference_mode():
        values = [predict(chunk) for chunk in split_observations(observations, CHUNK_SIZE)]
    return th.cat(values)  # concatenated outside, so that autograd may use the result as a constant


def predict_log_probs(
    policy: ActorCriticPolicy, observations: Observations, actions: th.Tensor
) -> tuple[th.Tensor, list[Distributions]]:
    """Score actions, log pi(a|s), in chunks, without the critic.

    :param policy: the policy, which keeps SB3's ``get_distribution``
    :param observations: one row per sample
    :param actions: as the policy's distribution expects them
    :return: log-probs in nats, shape ``(n_samples,)``, and the distributions of the chunks
    """
    log_probs, distributions = [], []
    with th.inference_mode(), unvalidated_distributions():
        for chunk, action in zip(split_observations(observations, CHUNK_SIZE), actions.split(CHUNK_SIZE), strict=True):
            distribution = policy.get_distribution(chunk)
            log_probs.append(distribution.log_prob(action))
            distributions.append(distribution.distribution)
    return th.cat(log_probs), distributions


class Evaluation(NamedTuple):
    """Log-probs, entropies and values of samples, with gradient.

    ``entropy`` is None where the distribution has none in closed form, ``values`` where they were not asked for, and
    ``distribution`` where only the policy itself knows it; ``version`` tells whether the policy has changed since.
    """

    log_prob: th.Tensor
    entropy: th.Tensor | None
    values: th.Tensor | None
    distribution: Distributions | None
    version: int

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether the policy's parameters are still those of this evaluation."""
        return self.version == parameter_version(policy)


def parameter_version(policy: ActorCriticPolicy) -> int:
    """Number that changes with every change of a parameter."""
    return sum(parameter._version for group in policy.optimizer.param_groups for parameter in group["params"])


def evaluate(
    policy: ActorCriticPolicy, observations: Observations, actions: th.Tensor, with_values: bool
) -> Evaluation:
    """Log-prob, entropy and, where asked for, values, with gradient.

    :param policy: the policy
    :param observations: one row per sample
    :param actions: as the policy's distribution expects them
    :param with_values: whether the critic is part of it
    """
    version = parameter_version(policy)
    obs: Any = observations
    with th.enable_grad(), unvalidated_distributions():
        if has_own_forward(policy):
            values, log_prob, entropy = policy.evaluate_actions(obs, actions)
            return Evaluation(log_prob, entropy, values.flatten() if with_values else None, None, version)
        if with_values:
            values, log_prob, entropy = policy.evaluate_actions(obs, actions)
            return Evaluation(log_prob, entropy, values.flatten(), policy.action_dist.distribution, version)
        distribution = policy.get_distribution(obs)
        log_prob = distribution.log_prob(actions)
        return Evaluation(log_prob, distribution.entropy(), None, distribution.distribution, version)
