"""Compute log-probs, entropies, values and distributions of many samples at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Categorical, Distribution

from sb3_pg import compat
from sb3_pg.policies.memory import Followers, History, State
from sb3_pg.policies.mlp_fast_path import MlpFastPath, mlp_fast_path, value_function
from sb3_pg.policies.observations import CHUNK_SIZE, Observations, split_observations
from sb3_pg.policies.policy_cache import OwnMethods, action_dist_kept, own_methods, without_gradient

#: Whether entropies are differentiated, computed without gradient, or left out.
#: One torch distribution, or one per action dimension. torch computes the divergences of these.
Distributions = Distribution | list[Distribution]


class ActionScores(NamedTuple):
    """What a policy computes for given observations and actions.

    :param log_prob: log pi(a|s), nats, ``(n_samples,)``
    :param entropy: nats, ``(n_samples,)``; None if it was not asked for or has no closed form
    :param values: V(s), ``(n_samples,)``; None if they were not asked for
    :param distribution: a function that returns the torch distributions, or None if they are not known;
        :func:`score_in_chunks` returns a list with one of these per chunk
    :param other_values: V(s) of the other observations; None if none were given or they were not valued
    :param critic_state: what a critic with a memory of its own remembers before each of the other observations
    """

    log_prob: th.Tensor
    entropy: Callable[[], th.Tensor | None]
    values: th.Tensor | None
    distribution: Any
    other_values: th.Tensor | None = None
    critic_state: State | None = None


def policy_actions(actions: th.Tensor, space: spaces.Space[Any]) -> th.Tensor:
    """Convert stored actions to the type that the policy's distribution takes: long for Discrete, else floating."""
    return actions.long().flatten() if isinstance(space, spaces.Discrete) else actions.float()


def predict_values(policy: ActorCriticPolicy, observations: Observations) -> th.Tensor:
    """Compute V(s) of the policy's critic in chunks, without gradient.

    :param policy: the policy
    :param observations: one row per sample
    :return: shape ``(n_samples,)``
    """
    predict = value_function(policy)
    with without_gradient(policy)():
        values = [predict(chunk) for chunk in split_observations(observations, CHUNK_SIZE)]
    return th.cat(values)  # concatenated outside, so that autograd may use the result as a constant


def predict_all_values(
    policy: ActorCriticPolicy, observations: Any, other_observations: Any
) -> tuple[th.Tensor, th.Tensor | None]:
    """Compute V(s) of a batch's samples and of the states that follow some of them, without gradient.

    :param policy: the policy
    :param observations: one row per sample, or their history
    :param other_observations: the states that follow; :class:`Followers` if ``observations`` are a history; may be None
    """
    if isinstance(observations, History):
        extended: Any = policy
        with without_gradient(policy)():
            values, others, _ = extended.values_over(observations, other_observations)
        return values.clone(), None if others is None else others.clone()
    others = None if other_observations is None else predict_values(policy, other_observations)
    return predict_values(policy, observations), others


def action_distribution(policy: ActorCriticPolicy, observations: Observations) -> SB3Distribution:
    """Return the policy's action distribution in a new object, which later forwards leave as it is.

    It has a gradient where autograd is enabled.

    :param policy: the policy; its own ``get_distribution`` is called if it has one
    :param observations: one row per sample
    """
    own = own_methods(policy)
    layers = None if own.forward else mlp_fast_path(policy, own.cache)
    with action_dist_kept(policy):
        if layers is None:
            return policy.get_distribution(observations)
        return _by_head(policy, layers, layers.features(observations))


def _by_head(policy: ActorCriticPolicy, layers: MlpFastPath, features: th.Tensor) -> SB3Distribution:
    distribution: SB3Distribution = getattr(policy, compat.HEAD)(layers.latent_pi(features))
    return distribution


def torch_distributions(distribution: SB3Distribution) -> Distributions | None:
    """Return the torch distribution in an SB3 distribution, or a list with one per action dimension; None if none.

    Squashing is left out, since it changes no divergence.
    """
    held = _held(distribution)
    return None if held is None else held()


def score_actions(
    policy: ActorCriticPolicy,
    observations: Observations | History,
    actions: th.Tensor,
    with_values: bool,
    other_observations: Any = None,
) -> ActionScores:
    """Compute log-probs and, if asked for, values, with gradient.

    :param policy: the policy
    :param observations: one row per sample, or their history
    :param actions: from :func:`policy_actions`
    :param with_values: whether to compute values
    :param other_observations: more observations to value, without gradient; they are valued only if that takes no
        second forward. They are :class:`Followers` of a history
    """
    own = own_methods(policy)
    layers = None if own.forward else mlp_fast_path(policy, own.cache)
    with th.enable_grad():
        if isinstance(observations, History):
            return _score_history(policy, observations, actions, with_values, other_observations)
        if layers is not None:
            others = None if own.values else other_observations
            return _score_by_layers(policy, layers, own, observations, actions, with_values, others)
        if with_values or own.forward or own.cache.calls_matter:
            # evaluate_actions extracts shared features once for actor and critic.
            scores = _score_by_evaluate_actions(policy, own, observations, actions)
            return scores if with_values else scores._replace(values=None)
        return _score_by_distribution(policy, policy.get_distribution, observations, actions)


def score_in_chunks(
    policy: ActorCriticPolicy,
    observations: Any,
    actions: th.Tensor,
    with_values: bool = False,
    other_observations: Any = None,
) -> ActionScores:
    """Compute log-probs and, if asked for, values, without gradient and in chunks; entropies are left out.

    :param policy: the policy
    :param observations: one row per sample
    :param actions: from :func:`policy_actions`
    :param with_values: whether to compute values
    :param other_observations: more observations to value; :class:`Followers` if ``observations`` are a history
    """
    if isinstance(observations, History):
        with without_gradient(policy)():
            scores = _score_history(policy, observations, actions, with_values, other_observations)
        return _copied(scores)  # outside, so that autograd may use the results as constants
    own = own_methods(policy)
    layers = None if own.forward else mlp_fast_path(policy, own.cache)
    is_single, values_along = len(actions) <= CHUNK_SIZE, with_values and not own.values
    with without_gradient(policy)():
        if layers is not None:
            others = other_observations if is_single and values_along else None
            score = partial(_score_by_layers, policy, layers, own, with_values=values_along, others=others)
        elif own.forward or (values_along and not own.cache.calls_matter):
            values_along &= not own.forward
            score = partial(_score_by_evaluate_actions, policy, own)
        else:
            values_along = False
            score = partial(_score_by_distribution, policy, policy.get_distribution)
        if is_single:
            chunks = [score(observations, actions)]
        else:
            rows = split_observations(observations, CHUNK_SIZE)
            chunks = [score(*chunk) for chunk in zip(rows, actions.split(CHUNK_SIZE), strict=True)]
    # concatenated outside, so that autograd may use the results as constants
    log_prob = th.cat([chunk.log_prob for chunk in chunks])
    values = other_values = None
    if values_along:
        values = th.cat([chunk.values for chunk in chunks if chunk.values is not None])
    elif with_values:
        values = predict_values(policy, observations)
    if chunks[0].other_values is not None:
        other_values = chunks[0].other_values.clone()
    elif other_observations is not None:
        other_values = predict_values(policy, other_observations)
    return ActionScores(log_prob, lambda: None, values, [chunk.distribution for chunk in chunks], other_values)


def _copied(scores: ActionScores) -> ActionScores:
    values, others = (None if x is None else x.clone() for x in (scores.values, scores.other_values))
    state = None if scores.critic_state is None else tuple(part.clone() for part in scores.critic_state)
    return ActionScores(scores.log_prob.clone(), lambda: None, values, [scores.distribution], others, state)


def _score_history(
    policy: Any, history: History, actions: th.Tensor, with_values: bool, followers: Followers | None
) -> ActionScores:
    """Score the actions of whole sequences, and value the observations that follow them."""
    if not with_values:
        return _score_by_distribution(policy, policy.get_distribution, history, actions)
    with action_dist_kept(policy):
        distribution, values, *others = policy.outputs_over(history, followers)
        log_prob = distribution.log_prob(actions)
        return ActionScores(log_prob, distribution.entropy, values, _held(distribution), *others)


def _score_by_evaluate_actions(
    policy: ActorCriticPolicy, own: OwnMethods, observations: Any, actions: th.Tensor
) -> ActionScores:
    with action_dist_kept(policy):
        values, log_prob, entropies = policy.evaluate_actions(observations, actions)
        distribution = None if own.forward else _held(policy.action_dist)
    return ActionScores(log_prob, lambda: entropies, values.flatten(), distribution)


def _score_by_distribution(
    policy: ActorCriticPolicy,
    make: Callable[[Any], SB3Distribution],
    inputs: Any,
    actions: th.Tensor,
) -> ActionScores:
    with action_dist_kept(policy):
        distribution = make(inputs)
        log_prob = distribution.log_prob(actions)
        return ActionScores(log_prob, distribution.entropy, None, _held(distribution))


def _score_by_layers(
    policy: ActorCriticPolicy,
    layers: MlpFastPath,
    own: OwnMethods,
    observations: Observations,
    actions: th.Tensor,
    with_values: bool,
    others: Observations | None = None,
) -> ActionScores:
    features = layers.features(observations)
    if type(policy.action_dist) is CategoricalDistribution and not own.head:
        log_probs = layers.action_outputs(features).log_softmax(1)
        log_prob = log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)
        entropy = partial(_categorical_entropy, log_probs)
        scores = ActionScores(log_prob, entropy, None, partial(Categorical, logits=log_probs, validate_args=False))
    else:
        scores = _score_by_distribution(policy, partial(_by_head, policy, layers), features, actions)
    if not with_values:
        return scores
    if others is None:
        return scores._replace(values=layers.values(features))
    rows = th.cat((features, layers.features(others)))
    values, other_values = layers.values(rows).split((len(features), len(rows) - len(features)))
    return scores._replace(values=values, other_values=other_values.detach())


def _held(distribution: Any) -> Callable[[], Distributions] | None:
    """Keep an SB3 distribution's torch distributions, which its next use replaces; None if it has none."""
    held: Any = getattr(distribution, "distribution", None)
    parts = held if isinstance(held, list) else [held]
    return (lambda: held) if all(isinstance(part, Distribution) for part in parts) else None


def _categorical_entropy(log_probs: th.Tensor) -> th.Tensor:
    finite = log_probs.clamp(min=th.finfo(log_probs.dtype).min)  # 0 log 0 = 0, in the gradient too
    return -(finite * log_probs.exp()).sum(1)
