"""Losses of OffPAC: one for the critic, and one for each of the actor's four gradients."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    Distribution,
    StateDependentNoiseDistribution,
)
from torch.nn.functional import mse_loss, softplus

from sb3_pg.algorithms.off_pac.policies import Critic, OffPACPolicy
from sb3_pg.functional import effective_sample_size
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import policy_actions
from sb3_pg.rollout import BehaviorSamples

#: Names of the gradients that the actor can follow.
ActorGradient = Literal["expected", "score", "importance", "reparameterized"]


def draw(distribution: Distribution) -> th.Tensor:
    """Draw one action per state, differentiably for Box. Each state has its own noise, also with gSDE."""
    if isinstance(distribution, StateDependentNoiseDistribution):
        gaussian: Any = distribution.distribution
        actions: th.Tensor = gaussian.rsample().tanh()
        return actions
    return distribution.sample()


def entropies(distribution: Distribution) -> th.Tensor:
    """Return the entropies H(pi(.|s)), nats, ``(n_samples,)``.

    They are exact, except for a squashed Gaussian, where one sample estimates E log(1 - tanh(u)^2).
    """
    exact = distribution.entropy()
    if exact is not None:
        return exact
    gaussian: Any = distribution.distribution
    u = gaussian.rsample()
    log_slope = 2 * (math.log(2) - u - softplus(-2 * u))
    return cast(th.Tensor, (gaussian.entropy() + log_slope).sum(1))


def smallest_q(critic: Critic, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Return the smallest Q(s, a) of the critic's networks, reward units, ``([n_actions,] n_samples)``."""
    return critic.q_values(observations, actions).amin(0)


def state_values(critic: Critic, observations: th.Tensor, distribution: Distribution, n_actions: int = 1) -> th.Tensor:
    """Return E_pi Q(s, .), reward units, ``(n_samples,)``, exact for Discrete, else a mean of ``n_actions`` samples."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.distribution.probs * critic.all_q_values(observations).amin(0)).sum(1)
    actions = th.stack([draw(distribution) for _ in range(n_actions)])
    return smallest_q(critic, observations, actions).mean(0)


def critic_loss(policy: OffPACPolicy, samples: BehaviorSamples, gamma: float) -> tuple[th.Tensor, Metrics]:
    r"""Return half the mean squared error of each critic network, summed over networks.

    .. math:: y = r + \gamma (1 - d) E_{a' \sim \pi(\cdot|s')} \min_i Q_{\bar\phi_i}(s', a')

    :param policy: the actor, the critic and the target critic
    :param samples: replayed transitions. Transitions of n steps contain the discount of the next state's value
    :param gamma: discount per env step
    :return: loss, squared reward units, and the metrics "critic_loss" and "q_value"
    """
    critic = policy.critic
    with th.no_grad():
        next_actions = policy.actor.distribution(samples.next_observations)
        next_values = state_values(policy.critic_target, samples.next_observations, next_actions)
        discounts = gamma if samples.discounts is None else samples.discounts.squeeze(1)
        targets = samples.rewards.squeeze(1) + discounts * (1 - samples.dones.squeeze(1)) * next_values
    q_values = critic.q_values(samples.observations, policy_actions(samples.actions, critic.action_space))
    loss = mse_loss(q_values, targets.expand_as(q_values)) * (0.5 * len(q_values))
    return loss, {"critic_loss": loss.detach(), "q_value": q_values.detach().mean()}


class ActorLossInputs(NamedTuple):
    """Inputs of the actor's losses.

    :param samples: replayed transitions
    :param distribution: the actor's distribution at ``samples.observations``
    :param critic: the critic, with frozen parameters
    :param n_actions: actions drawn per state
    :param max_ratio: largest importance weight, None for no limit
    """

    samples: BehaviorSamples
    distribution: Distribution
    critic: Critic
    n_actions: int
    max_ratio: float | None


def expected(inputs: ActorLossInputs) -> tuple[th.Tensor, Metrics]:
    """Return -E_s[sum_a pi(a|s) Q(s, a)], for Discrete."""
    return -state_values(inputs.critic, inputs.samples.observations, inputs.distribution).mean(), {}


def reparameterized(inputs: ActorLossInputs) -> tuple[th.Tensor, Metrics]:
    """Return -E_s[Q(s, a(theta, noise))]. The gradient flows through the action."""
    return -smallest_q(inputs.critic, inputs.samples.observations, draw(inputs.distribution)).mean(), {}


def score(inputs: ActorLossInputs) -> tuple[th.Tensor, Metrics]:
    """Return -E_s[log pi(a_k|s) (Q(s, a_k) - mean of the other Q(s, a_j))] for ``n_actions`` actions of the policy."""
    observations = inputs.samples.observations
    with th.no_grad():
        actions = th.stack([draw(inputs.distribution) for _ in range(inputs.n_actions)])
        q_values = smallest_q(inputs.critic, observations, actions)
        others = (q_values.sum(0) - q_values) / (inputs.n_actions - 1)
    log_probs = th.stack([inputs.distribution.log_prob(action) for action in actions])
    return -(log_probs * (q_values - others)).mean(), {}


def importance(inputs: ActorLossInputs) -> tuple[th.Tensor, Metrics]:
    """Return -E_s[rho log pi(a|s) (Q(s, a) - V(s))] for the replayed actions.

    :raises ValueError: the replay buffer stores no log-probs
    """
    samples, critic = inputs.samples, inputs.critic
    if not isinstance(samples, BehaviorSamples):
        raise ValueError(
            f"actor_gradient='importance' needs samples of a BehaviorReplayBuffer, got {type(samples).__name__}"
        )
    actions = policy_actions(samples.actions, critic.action_space)
    log_prob = inputs.distribution.log_prob(actions)
    with th.no_grad():
        values = state_values(critic, samples.observations, inputs.distribution, inputs.n_actions)
        advantages = smallest_q(critic, samples.observations, actions) - values
        log_ratio = log_prob - samples.log_probs
        ratio = weight = log_ratio.exp()
        metrics: Metrics = {
            "largest_weight": ratio.max(),
            "importance_ess": effective_sample_size(log_ratio) / len(ratio),
        }
        if inputs.max_ratio is not None:
            weight = ratio.clamp(max=inputs.max_ratio)
            metrics["truncated_fraction"] = (ratio > inputs.max_ratio).float().mean()
    return -(weight * log_prob * advantages).mean(), metrics


ACTOR_LOSSES: dict[ActorGradient, Callable[[ActorLossInputs], tuple[th.Tensor, Metrics]]] = {
    "expected": expected,
    "score": score,
    "reparameterized": reparameterized,
    "importance": importance,
}


def default_actor_gradient(space: spaces.Space[object]) -> ActorGradient:
    """Return the gradient with the smallest variance in an action space."""
    if isinstance(space, spaces.Discrete):
        return "expected"
    return "reparameterized" if isinstance(space, spaces.Box) else "score"
