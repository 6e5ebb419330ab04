"""The policy on many samples at once: values, log-probs and distributions, with gradient or without."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Categorical, Distribution

from sb3_pg.functional import OfPerceptron
from sb3_pg.policies.mlp_fast_path import PlainLayers, plain_layers, value_function
from sb3_pg.policies.observations import Observations, split_observations
from sb3_pg.policies.policy_cache import (
    Snapshot,
    action_dist_kept,
    has_own_forward,
    has_own_head,
    overrides,
    structure_of,
    without_gradient,
)
from sb3_pg.policies.samplers import OF_OUTPUTS, unvalidated_distributions

#: Samples per forward without gradient; bounds the memory of image policies.
CHUNK_SIZE = 4096

EntropyUse = Literal["gradient", "value", "none"]
#: What torch knows a divergence of: one distribution, or one per action dimension.
Distributions = Distribution | list[Distribution]


def policy_actions(actions: th.Tensor, space: spaces.Space[Any]) -> th.Tensor:
    """Stored actions as the policy's distribution expects them: long for Discrete, floating otherwise."""
    return actions.long().flatten() if isinstance(space, spaces.Discrete) else actions.float()


def predict_values(policy: ActorCriticPolicy, observations: Observations) -> th.Tensor:
    """V(s) of the policy's critic, in chunks.

    :param policy: the policy
    :param observations: one row per sample
    :return: shape ``(n_samples,)``
    """
    predict = value_function(policy)
    with without_gradient(policy)():
        values = [predict(chunk) for chunk in split_observations(observations, CHUNK_SIZE)]
    return th.cat(values)  # concatenated outside, so that autograd may use the result as a constant


def predict_log_probs(
    policy: ActorCriticPolicy, observations: Observations, actions: th.Tensor
) -> tuple[th.Tensor, list[Callable[[], Distributions] | None]]:
    """Score actions, log pi(a|s), in chunks, without the critic.

    :param policy: the policy, which keeps SB3's ``get_distribution``
    :param observations: one row per sample
    :param actions: as the policy's distribution expects them
    :return: log-probs in nats, shape ``(n_samples,)``, and the distributions of the chunks
    """
    log_probs, distributions = [], []
    with without_gradient(policy)(), unvalidated_distributions(), action_dist_kept(policy):
        for chunk, action in zip(split_observations(observations, CHUNK_SIZE), actions.split(CHUNK_SIZE), strict=True):
            distribution = policy.get_distribution(chunk)
            log_probs.append(distribution.log_prob(action))
            distributions.append(_held(distribution))
    return th.cat(log_probs), distributions


def action_distribution(policy: ActorCriticPolicy, observations: Observations) -> SB3Distribution:
    """What the policy draws actions from, with gradient where that is enabled; the caller's own object.

    :param policy: the policy; of one that replaces other methods, what its ``get_distribution`` says counts
    :param observations: one row per sample
    """
    layers = None if has_own_forward(policy) else plain_layers(policy)
    with unvalidated_distributions(), action_dist_kept(policy):
        if layers is None:
            return policy.get_distribution(observations)
        return policy._get_action_dist_from_latent(layers.latent_pi(layers.features(observations)))


def perceptron_distribution(policy: ActorCriticPolicy, observations: Observations) -> OfPerceptron | None:
    """What one of SB3's standard MLP policies draws actions from, differentiable as far as its head's outputs.

    :param policy: the policy
    :param observations: one row per sample
    :return: None for any other policy
    """
    layers = None if has_own_forward(policy) or has_own_head(policy) else plain_layers(policy)
    if layers is None or type(policy.action_dist) not in OF_OUTPUTS:
        return None
    jacobian = layers.jacobian(layers.features(observations))
    if jacobian is None:
        return None
    with th.enable_grad(), unvalidated_distributions(), action_dist_kept(policy):
        outputs = jacobian.outputs.requires_grad_()
        dist: Any = policy.action_dist
        spread = (policy.log_std,) if type(dist) is DiagGaussianDistribution else ()
        distributions = torch_distributions(dist.proba_distribution(outputs, *spread))
    return None if distributions is None else OfPerceptron(distributions, outputs, jacobian)


def torch_distributions(distribution: SB3Distribution) -> Distributions | None:
    """The distribution of torch's, or one per action dimension, in one of SB3's; None where there is none.

    Squashing changes no divergence, so that it is left out.
    """
    held = _held(distribution)
    return None if held is None else held()


class Evaluation(NamedTuple):
    """Log-probs, entropies and values of samples, with gradient.

    ``entropy`` is None where the distribution has none in closed form, ``values`` where they were not asked for, and
    ``distribution`` where only the policy itself knows it. ``other_values`` are those of other observations, if they
    came along. ``parameters`` are those that it was made with, where somebody has noted them.
    """

    log_prob: th.Tensor
    entropy: th.Tensor | None
    values: th.Tensor | None
    distribution: Callable[[], Distributions] | None
    other_values: th.Tensor | None = None
    entropy_use: EntropyUse = "gradient"
    parameters: Snapshot | None = None

    def serves(self, parameters: Snapshot, entropy: EntropyUse) -> bool:
        """Whether a new evaluation would give the same: with these parameters, and the entropy for this use."""
        same_use = entropy in ("none", self.entropy_use)
        return same_use and self.parameters is not None and self.parameters.equals(parameters)


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
    :param other_observations: more observations, to be valued along with the others where that is one forward
    """
    layers = None if has_own_forward(policy) else plain_layers(policy)
    with th.enable_grad():
        if layers is None:
            with unvalidated_distributions(), action_dist_kept(policy):
                evaluation = _evaluate(policy, observations, actions, with_values, entropy)
        else:
            # an own predict_values may say something else than the layers do
            others = None if overrides(policy, "predict_values") else other_observations
            evaluation = _evaluate_plain(policy, layers, observations, actions, with_values, entropy, others)
    return evaluation._replace(entropy_use=entropy)


def _evaluate(
    policy: ActorCriticPolicy, observations: Any, actions: th.Tensor, with_values: bool, entropy: EntropyUse
) -> Evaluation:
    """Through the policy's own methods."""
    # shared features once for both
    if with_values or has_own_forward(policy) or structure_of(policy).calls_matter:
        values, log_prob, entropies = policy.evaluate_actions(observations, actions)
        distribution = None if has_own_forward(policy) else _held(policy.action_dist)
        return Evaluation(log_prob, entropies, values.flatten() if with_values else None, distribution)
    return _score(policy.get_distribution(observations), actions, entropy)


def _evaluate_plain(
    policy: ActorCriticPolicy,
    layers: PlainLayers,
    observations: Observations,
    actions: th.Tensor,
    with_values: bool,
    entropy: EntropyUse,
    other_observations: Observations | None,
) -> Evaluation:
    """Through the bare layers."""
    features = layers.features(observations)
    if type(policy.action_dist) is CategoricalDistribution and not has_own_head(policy):
        log_probs = layers.action_outputs(features).log_softmax(1)
        log_prob = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
        entropies = _entropy(partial(_categorical_entropy, log_probs), entropy)
        evaluation = Evaluation(log_prob, entropies, None, partial(Categorical, logits=log_probs))
    else:
        with unvalidated_distributions(), action_dist_kept(policy):
            evaluation = _score(policy._get_action_dist_from_latent(layers.latent_pi(features)), actions, entropy)
    if not with_values:
        return evaluation
    if other_observations is None:
        return evaluation._replace(values=layers.values(features))
    rows = th.cat((features, layers.features(other_observations)))
    values, others = layers.values(rows).split((len(features), len(rows) - len(features)))
    return evaluation._replace(values=values, other_values=others.detach())


def _score(distribution: Any, actions: th.Tensor, entropy: EntropyUse) -> Evaluation:
    """By a distribution of SB3's."""
    log_prob = distribution.log_prob(actions)
    return Evaluation(log_prob, _entropy(distribution.entropy, entropy), None, _held(distribution))


def _entropy(compute: Callable[[], th.Tensor | None], use: EntropyUse) -> th.Tensor | None:
    if use == "none":
        return None
    with th.set_grad_enabled(use == "gradient"):
        return compute()


def _held(distribution: Any) -> Callable[[], Distributions] | None:
    """What a distribution of SB3's holds now, which its next use replaces; None where that is nothing of torch's."""
    held: Any = getattr(distribution, "distribution", None)
    parts = held if isinstance(held, list) else [held]
    return (lambda: held) if all(isinstance(part, Distribution) for part in parts) else None


def _categorical_entropy(log_probs: th.Tensor) -> th.Tensor:
    finite = log_probs.clamp(min=th.finfo(log_probs.dtype).min)  # 0 log 0 = 0, in the gradient too
    return -(finite * log_probs.exp()).sum(1)
