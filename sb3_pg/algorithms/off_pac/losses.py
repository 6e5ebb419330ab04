"""The actor's gradient at replayed states, as losses: expected, score, reparameterized, importance."""

import math
from typing import Any, NamedTuple, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    Distribution,
    StateDependentNoiseDistribution,
)
from torch.nn.functional import softplus

from sb3_pg.algorithms.off_pac.policies import Critic
from sb3_pg.functional import effective_sample_size
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import policy_actions
from sb3_pg.rollout import BehaviorSamples


class Scene(NamedTuple):
    """What an actor's loss is made of. The critic's parameters are frozen."""

    samples: BehaviorSamples
    distribution: Distribution
    critic: Critic
    n_actions: int
    max_ratio: float | None


def draw(distribution: Distribution) -> th.Tensor:
    """One action per state, with noise of its own even under gSDE; differentiable for Box."""
    if isinstance(distribution, StateDependentNoiseDistribution):
        gaussian: Any = distribution.distribution
        actions: th.Tensor = gaussian.rsample().tanh()
        return actions
    return distribution.sample()


def entropies(distribution: Distribution) -> th.Tensor:
    """H(pi(.|s)), nats, ``(n_samples,)``: exact, or a squashed Gaussian's with E log(1 - tanh(u)^2) by one sample."""
    exact = distribution.entropy()
    if exact is not None:
        return exact
    gaussian: Any = distribution.distribution
    u = gaussian.rsample()
    log_slope = 2 * (math.log(2) - u - softplus(-2 * u))
    return cast(th.Tensor, (gaussian.entropy() + log_slope).sum(1))


def smallest_q(critic: Critic, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """The least that any network says of Q(s, a), reward units, ``([n_actions,] n_samples)``."""
    return critic.q_values(observations, actions).amin(0)


def state_values(critic: Critic, observations: th.Tensor, distribution: Distribution, n_actions: int = 1) -> th.Tensor:
    """E_pi Q(s, .), reward units, ``(n_samples,)``: exact for Discrete, else the mean over sampled actions."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.distribution.probs * critic.all_q_values(observations).amin(0)).sum(1)
    actions = th.stack([draw(distribution) for _ in range(n_actions)])
    return smallest_q(critic, observations, actions).mean(0)


def expected(scene: Scene) -> tuple[th.Tensor, Metrics]:
    r"""-E_s[\sum_a pi(a|s) Q(s, a)], for Discrete."""
    return -state_values(scene.critic, scene.samples.observations, scene.distribution).mean(), {}


def reparameterized(scene: Scene) -> tuple[th.Tensor, Metrics]:
    """-E_s[Q(s, a(theta, noise))]: the gradient goes through the action."""
    return -smallest_q(scene.critic, scene.samples.observations, draw(scene.distribution)).mean(), {}


def score(scene: Scene) -> tuple[th.Tensor, Metrics]:
    """-E_s[log pi(a_k|s) (Q(s, a_k) - mean of the others')], the K actions being the policy's own."""
    observations = scene.samples.observations
    with th.no_grad():
        actions = th.stack([draw(scene.distribution) for _ in range(scene.n_actions)])
        q_values = smallest_q(scene.critic, observations, actions)
        others = (q_values.sum(0) - q_values) / (scene.n_actions - 1)
    log_probs = th.stack([scene.distribution.log_prob(action) for action in actions])
    return -(log_probs * (q_values - others)).mean(), {}


def importance(scene: Scene) -> tuple[th.Tensor, Metrics]:
    """-E_s[rho log pi(a|s) (Q(s, a) - V(s))], the actions being the replayed ones."""
    samples, critic = scene.samples, scene.critic
    if not isinstance(samples, BehaviorSamples):
        raise ValueError(f"actor_gradient='importance' takes a BehaviorReplayBuffer, got {type(samples).__name__}")
    actions = policy_actions(samples.actions, critic.action_space)
    log_prob = scene.distribution.log_prob(actions)
    with th.no_grad():
        values = state_values(critic, samples.observations, scene.distribution, scene.n_actions)
        advantages = smallest_q(critic, samples.observations, actions) - values
        log_ratio = log_prob - samples.log_probs
        ratio = weight = log_ratio.exp()
        metrics: Metrics = {
            "largest_weight": ratio.max(),
            "importance_ess": effective_sample_size(log_ratio) / len(ratio),
        }
        if scene.max_ratio is not None:
            weight = ratio.clamp(max=scene.max_ratio)
            metrics["truncated_fraction"] = (ratio > scene.max_ratio).float().mean()
    return -(weight * log_prob * advantages).mean(), metrics


ACTOR_LOSSES = {
    "expected": expected,
    "score": score,
    "reparameterized": reparameterized,
    "importance": importance,
}


def default_actor_gradient(space: spaces.Space[object]) -> str:
    """What has the least variance in an action space."""
    if isinstance(space, spaces.Discrete):
        return "expected"
    return "reparameterized" if isinstance(space, spaces.Box) else "score"
