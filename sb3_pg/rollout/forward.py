"""The policy on many samples at once: values, log-probs and distributions, with gradient or without."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Categorical, Distribution

from sb3_pg.rollout.batch import Observations
from sb3_pg.rollout.plain import plain_layers, value_function
from sb3_pg.rollout.samplers import unvalidated_distributions
from sb3_pg.rollout.structure import has_own_forward, overrides, parameter_version

#: Samples per forward without gradient; bounds the memory of image policies.
CHUNK_SIZE = 4096

EntropyUse = Literal["gradient", "value", "none"]
#: From the actor's last layer to its distribution.
_HEAD: Final = "_get_action_dist_from_latent"
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
) -> tuple[th.Tensor, list[Callable[[], Distributions]]]:
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
            distributions.append(_held(distribution))
    return th.cat(log_probs), distributions


class Evaluation(NamedTuple):
    """Log-probs, entropies and values of samples, with gradient.

    ``entropy`` is None where the distribution has none in closed form, ``values`` where they were not asked for, and
    ``distribution`` where only the policy itself knows it; ``version`` tells whether the policy has changed since.
    ``other_values`` are those of other observations, if they came along.
    """

    log_prob: th.Tensor
    entropy: th.Tensor | None
    values: th.Tensor | None
    distribution: Callable[[], Distributions] | None
    version: int
    other_values: th.Tensor | None = None

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether the policy's parameters are still those of this evaluation."""
        return self.version == parameter_version(policy)


def evaluate(
    policy: ActorCriticPolicy,
    observations: Observations,
    actions: th.Tensor,
    with_values: bool,
    entropy: EntropyUse = "gradient",
    other_observations: Observations | None = None,
) -> Evaluation:
    """Log-prob, entropy and, where asked for, values, with gradient.

    :param policy: the policy
    :param observations: one row per sample
    :param actions: as the policy's distribution expects them
    :param with_values: whether the critic is part of it
    :param entropy: "gradient" where it is to be differentiated, "value" where it is only to be known, or "none"
    :param other_observations: more observations, to be valued without gradient along with the others where that is
        one forward
    """
    version = parameter_version(policy)
    obs: Any = observations
    with th.enable_grad(), unvalidated_distributions():
        if has_own_forward(policy):
            v, log_prob, entropies = policy.evaluate_actions(obs, actions)
            return Evaluation(log_prob, entropies, v.flatten() if with_values else None, None, version)
        layers = plain_layers(policy)
        values: th.Tensor | None = None
        others: th.Tensor | None = None
        if layers is not None:
            features = layers.features(observations)
            if with_values and other_observations is not None:
                rows = th.cat((features, layers.features(other_observations)))
                values, others = layers.values(rows).split((len(features), len(rows) - len(features)))
            elif with_values:
                values = layers.values(features)
            if type(policy.action_dist) is CategoricalDistribution and not overrides(policy, _HEAD):
                log_probs = layers.action_outputs(features).log_softmax(1)
                log_prob = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
                entropies = _entropy(lambda: th.special.entr(log_probs.exp()).sum(1), entropy)
                held = partial(Categorical, logits=log_probs.detach())
                return Evaluation(log_prob, entropies, values, held, version, others)
            distribution = policy._get_action_dist_from_latent(layers.latent_pi(features))
        elif with_values:  # shared features once for both
            v, log_prob, entropies = policy.evaluate_actions(obs, actions)
            return Evaluation(log_prob, entropies, v.flatten(), _held(policy.action_dist), version)
        else:
            distribution = policy.get_distribution(obs)
        log_prob = distribution.log_prob(actions)
        entropies = _entropy(distribution.entropy, entropy)
        return Evaluation(log_prob, entropies, values, _held(distribution), version, others)


def _entropy(compute: Callable[[], th.Tensor | None], use: EntropyUse) -> th.Tensor | None:
    if use == "none":
        return None
    with th.set_grad_enabled(use == "gradient"):
        return compute()


def _held(distribution: Any) -> Callable[[], Distributions]:
    """What a distribution of SB3's holds now, which its next use replaces."""
    torch_distribution: Distributions = distribution.distribution
    return lambda: torch_distribution
