"""OffPAC: critic targets and actor gradients against oracles, stored log-probs, and what it owes to SB3."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_pg import NonFiniteError, OffPAC
from sb3_pg.algorithms import actor_gradients
from sb3_pg.algorithms.actor_gradients import ACTOR_LOSSES, Scene, draw, entropies
from sb3_pg.algorithms.q_policies import Critic
from sb3_pg.rollout import BehaviorReplayBuffer, BehaviorSamples, DictBehaviorReplayBuffer
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, FaultyEnv, ScriptedEnv, vec

NAN, INF = float("nan"), float("inf")
#: The gradients that exist for an action space.
GRADIENTS = {
    name: [
        *(["expected"] if name == "discrete" else []),
        *(["reparameterized"] if isinstance(space, spaces.Box) else []),
        "score",
        "importance",
    ]
    for name, space in ACTION_SPACES.items()
}
EVERY_GRADIENT = [(space, gradient) for space, gradients in GRADIENTS.items() for gradient in gradients]
SGD = {"optimizer_class": th.optim.SGD}


def make(env: Any, **kwargs: Any) -> OffPAC:
    """A small model."""
    observation_space = env.observation_space
    policy, policy_kwargs = "MlpPolicy", {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    if isinstance(observation_space, spaces.Dict):
        policy = "MultiInputPolicy"
    elif len(observation_space.shape) == 3:
        policy, policy_kwargs["features_extractor_kwargs"] = "CnnPolicy", {"features_dim": 8}
    small = {"buffer_size": 300, "learning_starts": 8, "batch_size": 8, "device": "cpu", "seed": 0}
    return OffPAC(policy, env, policy_kwargs=policy_kwargs, **{**small, **kwargs})


def envs(action_space: str, n: int = 1, observation_space: str = "vector", **kwargs: Any) -> Any:
    """Episodes of two and three steps, of which every third is truncated; rewards tell envs and steps apart."""
    arguments = {"lengths": (3, 2), "truncate": (False, False, True), **kwargs}
    arguments |= {"action_space": ACTION_SPACES[action_space]}
    arguments |= {"observation_space": OBSERVATION_SPACES[observation_space]}
    return vec(*(ScriptedEnv(first_reward=1000.0 * i + 1, **arguments) for i in range(n)))


def filled(action_space: str, n_steps: int = 40, **kwargs: Any) -> OffPAC:
    """A model with transitions to replay, whose critic, target and actor have nothing in common."""
    model = make(envs(action_space), gradient_steps=0, **kwargs).learn(n_steps)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * th.randn_like(parameter))
    return model


def sample(model: OffPAC, n: int = 16) -> Any:
    assert model.replay_buffer is not None
    return model.replay_buffer.sample(n)


def parameters(module: th.nn.Module) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def rows(q: th.Tensor) -> np.ndarray:
    return q.detach().numpy().astype(np.float64)


# -------------------------------------------------------------------- the critic's target


def one_q(critic: Critic, i: int, obs: th.Tensor, action: np.ndarray) -> float:
    """Q_i(s, a) of one state, by the network itself."""
    space, features = critic.action_space, obs.flatten()
    if isinstance(space, spaces.Discrete):
        return float(critic.q_networks[i](features)[int(action.item())].detach())
    if isinstance(space, spaces.MultiDiscrete):
        action = np.concatenate([np.eye(n)[int(a)] for n, a in zip(space.nvec, action, strict=True)])
    return float(critic.q_networks[i](th.cat([features, th.as_tensor(action).float().flatten()])).detach())


def loss_of(model: OffPAC, samples: Any, next_values: list[float]) -> float:
    """Half the mean squared errors, summed over networks."""
    loss = 0.0
    n = len(next_values)
    for i, t in itertools.product(range(model.critic.n_critics), range(n)):
        y = float(samples.rewards[t]) + model.gamma * (1 - float(samples.dones[t])) * next_values[t]
        q = one_q(model.critic, i, samples.observations[t], samples.actions[t].numpy())
        loss += 0.5 * (q - y) ** 2 / n
    return loss


@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_the_target_of_discrete_actions_is_the_expectation_of_the_smallest_q(n_critics: int) -> None:
    model = filled("discrete", gamma=0.9, policy_kwargs={"n_critics": n_critics})
    samples = sample(model)
    assert 0 < samples.dones.sum() < 16
    next_values = []
    for obs in samples.next_observations:
        probabilities = model.actor.distribution(obs[None]).distribution.probs[0].tolist()
        least = [
            min(one_q(model.critic_target, i, obs, np.array(a)) for i in range(n_critics))
            for a in range(len(probabilities))
        ]
        next_values.append(sum(p * q for p, q in zip(probabilities, least, strict=True)))
    wanted = loss_of(model, samples, next_values)
    assert float(model._fit_critic(samples)["critic_loss"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("action_space", [name for name in ACTION_SPACES if name != "discrete"])
def test_the_target_of_other_actions_is_the_smallest_q_of_one_drawn(
    action_space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled(action_space, gamma=0.9)
    samples = sample(model)
    drawn = draw(model.actor.distribution(samples.next_observations)).detach()
    monkeypatch.setattr(actor_gradients, "draw", lambda _: drawn)
    pairs = list(zip(samples.next_observations, drawn.numpy(), strict=True))
    next_values = [min(one_q(model.critic_target, i, obs, action) for i in range(2)) for obs, action in pairs]
    wanted = loss_of(model, samples, next_values)
    assert float(model._fit_critic(samples)["critic_loss"]) == pytest.approx(wanted, rel=1e-5)


def test_the_critics_step_is_the_gradient_of_half_the_squared_error_and_leaves_the_rest_alone() -> None:
    model = filled("box", learning_rate=1e-2, gamma=0.0, policy_kwargs=SGD)
    samples = sample(model)
    networks = copy.deepcopy(model.critic.q_networks)
    before = parameters(model.actor), parameters(model.critic_target)
    model._fit_critic(samples)
    for network, stepped in zip(networks, model.critic.q_networks, strict=True):
        q = network(th.cat([samples.observations, samples.actions], 1))
        gradients = th.autograd.grad(0.5 * (q - samples.rewards).square().mean(), list(network.parameters()))
        for was, gradient, now in zip(network.parameters(), gradients, stepped.parameters(), strict=True):
            assert th.allclose(was - 1e-2 * gradient, now, rtol=1e-4, atol=1e-5)
    assert th.equal(before[0], parameters(model.actor))
    assert th.equal(before[1], parameters(model.critic_target))


def test_rewards_of_n_steps_bring_their_own_discount() -> None:
    steps = {"n_steps": 2, "gamma": 0.5}
    model = filled("discrete", gamma=0.9, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=steps)
    samples = sample(model)
    assert 0.25 in samples.discounts
    values = actor_gradients.state_values(
        model.critic_target, samples.next_observations, model.actor.distribution(samples.next_observations)
    )
    y = samples.rewards[:, 0] + samples.discounts[:, 0] * (1 - samples.dones[:, 0]) * values
    chosen = th.cat(model.critic(samples.observations, samples.actions), 1)
    wanted = 0.5 * (chosen - y[:, None]).square().mean(0).sum().item()
    assert float(model._fit_critic(samples)["critic_loss"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_q_values_of_several_actions_per_state_are_those_of_one_at_a_time(action_space: str) -> None:
    model = filled(action_space)
    samples = sample(model, 5)
    distribution = model.actor.distribution(samples.observations)
    actions = th.stack([draw(distribution) for _ in range(3)]).detach()
    q_values = model.critic.q_values(samples.observations, actions).detach()
    assert q_values.shape == (2, 3, 5)
    for i, k, t in itertools.product(range(2), range(3), range(5)):
        wanted = one_q(model.critic, i, samples.observations[t], actions[k, t].numpy())
        assert float(q_values[i, k, t]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_the_target_takes_on_its_share_of_the_critic(tau: float) -> None:
    model = filled("discrete", tau=tau)
    critic, target = parameters(model.critic), parameters(model.critic_target)
    model._move_target()
    assert th.allclose(parameters(model.critic_target), (1 - tau) * target + tau * critic, atol=1e-6)
    assert th.equal(parameters(model.critic), critic)


class BatchNormExtractor(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 3)
        self.norm = th.nn.BatchNorm1d(3)

    def forward(self, x: th.Tensor) -> Any:
        return self.norm(x)


def test_the_target_has_the_critics_batch_norm_statistics_and_does_not_make_its_own() -> None:
    model = make(envs("discrete"), policy_kwargs={"features_extractor_class": BatchNormExtractor}).learn(30)
    ours, theirs = dict(model.critic.named_buffers()), dict(model.critic_target.named_buffers())
    assert ours["features_extractor.norm.num_batches_tracked"] > 0
    assert ours.keys() == theirs.keys()
    assert all(th.equal(ours[name], theirs[name]) for name in ours)


# -------------------------------------------------------------------- the actor's gradient


def gradient_of(model: OffPAC, samples: Any, kind: str, n_actions: int = 2, max_ratio: float | None = None) -> Any:
    """Gradient of the objective, minus the loss."""
    distribution = model.actor.distribution(samples.observations)
    loss, _ = ACTOR_LOSSES[kind](Scene(samples, distribution, model.critic, n_actions, max_ratio))
    return -by_last_layer(model, loss)


def by_last_layer(model: OffPAC, output: th.Tensor) -> th.Tensor:
    """Gradient by the layer that gives logits, or means."""
    head = model.actor.mu if isinstance(model.action_space, spaces.Box) else model.actor.logits
    return th.cat([g.flatten() for g in th.autograd.grad(output.sum(), list(head.parameters()))])


def probabilities_and_q(model: OffPAC, samples: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each state: pi, the smallest Q of each action, and what the last layer takes."""
    latent = model.actor.latent_pi(samples.observations)
    logits = rows(model.actor.logits(latent))
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    q = np.minimum(*(rows(network(samples.observations)) for network in model.critic.q_networks))
    return pi, q, rows(latent)


def by_head(by_logits: np.ndarray, latent: np.ndarray) -> np.ndarray:
    """Mean over states of the gradient by the last layer, from that by the logits."""
    weight = (by_logits[:, :, None] * latent[:, None, :]).mean(0)
    return np.concatenate([weight.flatten(), by_logits.mean(0)])


def test_expected_is_the_gradient_of_the_sum_over_actions() -> None:
    model = filled("discrete")
    samples = sample(model)
    pi, q, latent = probabilities_and_q(model, samples)
    wanted = by_head(pi * (q - (pi * q).sum(1, keepdims=True)), latent)
    assert np.allclose(gradient_of(model, samples, "expected"), wanted, rtol=1e-4, atol=1e-6)


def successive(actions: tuple[int, ...]) -> Callable[[Any], th.Tensor]:
    it: Iterator[int] = iter(actions)
    return lambda _: th.tensor([next(it)])


@pytest.mark.parametrize("n_actions", [2, 3])
def test_score_is_unbiased(n_actions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all tuples of the actions that may be drawn in a state."""
    model = filled("discrete")
    samples = sample(model, 1)
    pi = probabilities_and_q(model, samples)[0][0]
    mean = 0.0
    for actions in itertools.product(range(3), repeat=n_actions):
        monkeypatch.setattr(actor_gradients, "draw", successive(actions))
        mean += math.prod(pi[a] for a in actions) * gradient_of(model, samples, "score", n_actions)
    assert th.allclose(th.as_tensor(mean), gradient_of(model, samples, "expected"), atol=1e-6)


def test_score_of_a_batch_is_the_mean_of_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled("discrete")
    samples = sample(model, 5)
    drawn = th.randint(3, (4, 5))
    wanted = []
    for t in range(5):
        parts: Any = (None if part is None else part[t : t + 1] for part in samples)
        alone = BehaviorSamples(*parts)
        monkeypatch.setattr(actor_gradients, "draw", successive(tuple(drawn[:, t].tolist())))
        wanted.append(gradient_of(model, alone, "score", 4))
    it = iter(drawn)
    monkeypatch.setattr(actor_gradients, "draw", lambda _: next(it))
    assert th.allclose(gradient_of(model, samples, "score", 4), th.stack(wanted).mean(0), atol=1e-6)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("max_ratio", [None, 0.8])
def test_importance_has_the_expectation_that_its_truncation_leaves(on_policy: bool, max_ratio: float | None) -> None:
    model = filled("discrete")
    samples = sample(model, 1)
    pi, q, latent = probabilities_and_q(model, samples)
    mu = pi[0] if on_policy else np.array([0.6, 0.3, 0.1])
    advantage = q - (pi * q).sum()
    weight = pi if max_ratio is None else np.minimum(pi, max_ratio * mu)
    score = np.eye(3) - pi
    wanted = by_head(((weight * advantage)[0][:, None] * score).sum(0)[None], latent)
    mean = sum(
        mu[a]
        * gradient_of(
            model,
            samples._replace(actions=th.tensor([[a]]), log_probs=th.tensor([math.log(mu[a])])),
            "importance",
            max_ratio=max_ratio,
        )
        for a in range(3)
    )
    assert np.allclose(mean, wanted, atol=1e-5)
    unbiased = np.allclose(mean, gradient_of(model, samples, "expected"), atol=1e-5)
    assert unbiased == (max_ratio is None)


@pytest.mark.parametrize("action_space", ["box", "multi_discrete", "multi_binary"])
def test_importance_of_other_actions_in_a_plain_loop(action_space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(action_space)
    samples = sample(model, 4)
    ratios = th.tensor([0.2, 1.0, 1.6, 40.0])
    distribution = model.actor.distribution(samples.observations)
    log_probs = distribution.log_prob(samples.actions.float())
    samples = samples._replace(log_probs=log_probs.detach() - ratios.log())
    drawn = th.stack([draw(distribution) for _ in range(3)]).detach()
    wanted = th.zeros(())
    for t, ratio in enumerate(ratios.tolist()):
        *values, q = (
            min(one_q(model.critic, i, samples.observations[t], action.numpy()) for i in range(2))
            for action in (*drawn[:, t], samples.actions[t])
        )
        alone = model.actor.distribution(samples.observations[t : t + 1])
        score = by_last_layer(model, alone.log_prob(samples.actions[t : t + 1].float()))
        wanted = wanted + min(ratio, 1.5) * (q - sum(values) / 3) * score / 4
    it = iter(drawn)
    monkeypatch.setattr(actor_gradients, "draw", lambda _: next(it))
    assert th.allclose(gradient_of(model, samples, "importance", 3, max_ratio=1.5), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_sde", [False, True])
def test_reparameterized_differentiates_q_by_the_action_with_the_noise_fixed(use_sde: bool) -> None:
    """Against finite differences in double precision."""
    model, other = (
        filled("box", use_sde=use_sde, policy_kwargs={"activation_fn": th.nn.Tanh, "n_critics": 1}) for _ in range(2)
    )
    samples, actor = sample(model, 6), model.actor
    distribution = actor.distribution(samples.observations)
    gaussian = distribution.distribution
    th.manual_seed(0)
    noise = ((gaussian.rsample() - gaussian.mean) / gaussian.stddev).detach().double()
    moved, obs = other.actor.double(), samples.observations.double()
    q = copy.deepcopy(model.critic.q_networks[0]).double()
    directions = [th.randn_like(parameter) for parameter in moved.parameters()]

    def objective(step: float) -> float:
        """Of parameters moved along a direction."""
        for parameter, was, direction in zip(moved.parameters(), actor.parameters(), directions, strict=True):
            parameter.data = was.detach().double() + step * direction
        latent = moved.latent_pi(obs)
        std = (latent**2 @ moved.log_std.exp() ** 2 + 1e-6).sqrt() if use_sde else moved.log_std(latent).exp()
        return float(q(th.cat([obs, (moved.mu(latent) + std * noise).tanh()], 1)).detach().mean())

    th.manual_seed(0)
    loss, _ = ACTOR_LOSSES["reparameterized"](Scene(samples, distribution, model.critic, 2, None))
    gradients = th.autograd.grad(-loss, list(actor.parameters()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    assert -loss.item() == pytest.approx(objective(0.0), rel=1e-5)
    assert slope == pytest.approx((objective(1e-4) - objective(-1e-4)) / 2e-4, rel=1e-3)


def test_each_state_and_draw_has_noise_of_its_own_under_gsde() -> None:
    """SB3's has one matrix of noise for all: leave-one-out would leave nothing."""
    model = filled("box", use_sde=True, policy_kwargs={"log_std_init": 0.0})
    distribution = model.actor.distribution(th.zeros(4000, 3))
    noise = [(draw(distribution).atanh() - distribution.distribution.mean) for _ in range(2)]
    for drawn in noise:
        assert th.allclose(drawn.std(0), distribution.distribution.stddev[0], rtol=0.1)
    assert abs(float(np.corrcoef(noise[0][:, 0].detach(), noise[1][:, 0].detach())[0, 1])) < 0.1
    assert gradient_of(model, sample(model), "score").abs().max() > 1e-3


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("action_space", "gradient"), EVERY_GRADIENT)
def test_the_actors_step_leaves_the_critic_alone(action_space: str, gradient: str, share: bool) -> None:
    policy_kwargs = {"share_features_extractor": share}
    model = filled(action_space, actor_gradient=gradient, ent_coef=0.1, policy_kwargs=policy_kwargs)
    critic, actor = parameters(model.critic), parameters(model.actor)
    model.policy.critic.optimizer.zero_grad()
    model._move_actor(sample(model))
    assert th.equal(critic, parameters(model.critic))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.critic.parameters())
    assert not th.equal(actor, parameters(model.actor))


class LinearExtractor(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.net = th.nn.Linear(3, 4)

    def forward(self, x: th.Tensor) -> Any:
        return self.net(x)


def test_shared_features_are_trained_by_the_actors_loss_alone() -> None:
    model = filled("box", policy_kwargs={"features_extractor_class": LinearExtractor, "share_features_extractor": True})
    shared = model.actor.features_extractor
    assert model.critic.features_extractor is shared
    before = parameters(shared)
    model._fit_critic(sample(model))
    assert th.equal(before, parameters(shared))
    model._move_actor(sample(model))
    assert not th.equal(before, parameters(shared))


def test_a_frozen_critic_or_extractor_trains_the_rest() -> None:
    model = filled("discrete")
    model.critic.requires_grad_(False)
    model.actor.latent_pi.requires_grad_(False)
    before = parameters(model.critic), parameters(model.actor.latent_pi), parameters(model.actor.logits)
    model.train(2, 8)
    assert th.equal(before[0], parameters(model.critic))
    assert th.equal(before[1], parameters(model.actor.latent_pi))
    assert not th.equal(before[2], parameters(model.actor.logits))


# -------------------------------------------------------------------- the entropy bonus


def test_the_entropy_bonus_of_discrete_actions_adds_its_gradient() -> None:
    model = filled("discrete", learning_rate=0.1, ent_coef=2.0, policy_kwargs=SGD)
    samples = sample(model)
    pi, q, latent = probabilities_and_q(model, samples)
    entropy = -(pi * np.log(pi)).sum(1, keepdims=True)
    by_logits = pi * (q - (pi * q).sum(1, keepdims=True)) - 2.0 * pi * (np.log(pi) + entropy)
    before = rows(th.cat([model.actor.logits.weight.flatten(), model.actor.logits.bias]))
    metrics = model._move_actor(samples)
    after = rows(th.cat([model.actor.logits.weight.flatten(), model.actor.logits.bias]))
    assert np.allclose(after - before, 0.1 * by_head(by_logits, latent), atol=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(entropy.mean(), rel=1e-5)


@pytest.mark.parametrize("mean", [0.3, 6.0])
def test_the_entropy_of_a_squashed_gaussian_and_its_gradient(mean: float) -> None:
    """Against quadrature; at a mean of 6 the action is 1 to float32 precision most of the time."""
    z, weights = np.polynomial.hermite_e.hermegauss(120)
    weights /= weights.sum()
    std = 1.5
    u = mean + std * z
    slope = np.log(4) - 2 * np.logaddexp(u, -u)  # log(1 - tanh(u)^2)
    wanted = 0.5 * math.log(2 * math.pi * math.e * std**2) + weights @ slope
    by_mean, by_log_std = weights @ (-2 * np.tanh(u)), 1 + std * (weights @ (-2 * np.tanh(u) * z))
    th.manual_seed(0)
    inputs = [th.full((200_000, 1), x, requires_grad=True) for x in (mean, math.log(std))]
    estimate = entropies(SquashedDiagGaussianDistribution(1).proba_distribution(*inputs))
    gradients = th.autograd.grad(estimate.mean(), inputs)
    assert estimate.mean().item() == pytest.approx(wanted, abs=0.02)
    assert gradients[0].sum().item() == pytest.approx(by_mean, abs=0.02)
    assert gradients[1].sum().item() == pytest.approx(by_log_std, abs=0.02)


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_an_entropy_bonus_keeps_entropy_up(action_space: str) -> None:
    logged = []
    for ent_coef in (0.0, 100.0):
        model = filled(action_space, learning_rate=1e-2, ent_coef=ent_coef)
        model.train(30, 16)
        logged.append(model._move_actor(sample(model, 64))["entropy"])
    assert float(logged[1]) > float(logged[0]) + 0.05


# -------------------------------------------------------------------- learning, in every space


@pytest.mark.parametrize("observation_space", ["vector", "image", "dict"])
@pytest.mark.parametrize(("action_space", "gradient"), EVERY_GRADIENT)
def test_it_learns_in_every_space(action_space: str, gradient: str, observation_space: str) -> None:
    model = make(envs(action_space, 2, observation_space), actor_gradient=gradient, batch_size=4, train_freq=2)
    before = [parameters(module) for module in (model.actor, model.critic, model.critic_target)]
    model.learn(16)
    for was, module in zip(before, (model.actor, model.critic, model.critic_target), strict=True):
        assert not th.equal(was, parameters(module))
    logged = model.logger.name_to_value
    names = {"critic_loss", "q_value", "actor_loss", "entropy", "learning_rate", "n_updates"}
    if gradient == "importance":
        names |= {"largest_weight", "importance_ess", "truncated_fraction"}
    assert {name for name in logged if name.startswith("train/")} == {f"train/{name}" for name in names}
    assert all(np.isfinite(value) for value in logged.values())
    for deterministic in (False, True):
        action = model.predict(model.observation_space.sample(), deterministic=deterministic)[0]
        assert model.action_space.contains(action.astype(model.action_space.dtype))


@pytest.mark.parametrize("observation_space", OBSERVATION_SPACES)
def test_it_takes_every_observation_space(observation_space: str) -> None:
    model = make(envs("multi_discrete", 2, observation_space), batch_size=4)
    before = parameters(model.actor)
    model.learn(14)
    assert not th.equal(before, parameters(model.actor))


@pytest.mark.parametrize(
    ("action_space", "default"),
    [
        ("discrete", "expected"),
        ("box", "reparameterized"),
        ("multi_discrete", "score"),
        ("multi_binary", "score"),
    ],
)
def test_the_default_is_what_has_the_least_variance(action_space: str, default: str) -> None:
    plain, named = (make(envs(action_space), **k).learn(14) for k in ({}, {"actor_gradient": default}))
    assert th.equal(parameters(plain.policy), parameters(named.policy))


class Corridor(gym.Env[Any, Any]):
    """Two steps: what pays in the second depends on what was done in the first, which pays nothing."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space
        self.state = 0

    def _obs(self) -> Any:
        return np.eye(3, dtype=np.float32)[self.state]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.state = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        high = bool(np.ravel(action)[-1] > 0.5)
        if self.state == 0:
            self.state = 2 if high else 1
            return self._obs(), 0.0, False, False, {}
        reward = float(not high) if self.state == 2 else 0.3
        return self._obs(), reward, True, False, {}


@pytest.mark.parametrize(("action_space", "gradient"), [pair for pair in EVERY_GRADIENT if pair[0] != "matrix"])
def test_it_solves_two_steps(action_space: str, gradient: str) -> None:
    env = vec(*(Corridor(ACTION_SPACES[action_space]) for _ in range(8)))
    model = make(
        env,
        actor_gradient=gradient,
        learning_rate=1e-2,
        learning_starts=64,
        batch_size=64,
        tau=0.05,
        ent_coef=0.01,
        gradient_steps=1,
        max_ratio=2.0,
        buffer_size=4000,
        policy_kwargs={"net_arch": [16]},
    ).learn(3200)
    states = np.eye(3, dtype=np.float32)[[0, 2]]
    first, second = (action.ravel()[-1] > 0.5 for action in model.predict(states, deterministic=True)[0])
    assert (first, second) == (True, False)


# -------------------------------------------------------------------- behavior log-probs


class Witness(BaseCallback):
    """Keeps the observations that were acted upon."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        self.seen.append(copy.deepcopy(self.model._last_obs))
        return True


def stored(model: OffPAC, n_steps: int) -> tuple[th.Tensor, th.Tensor]:
    """Actions and log-probs."""
    buffer: Any = model.replay_buffer
    assert isinstance(buffer, BehaviorReplayBuffer)
    return th.as_tensor(buffer.actions[:n_steps]), th.as_tensor(buffer.log_probs[:n_steps])


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("action_space", "use_sde"), [*((name, False) for name in ACTION_SPACES), ("box", True), ("matrix", True)]
)
def test_stored_log_probs_are_those_of_the_stored_actions(action_space: str, use_sde: bool, normalized: bool) -> None:
    env = envs(action_space, 3)
    env = VecNormalize(env) if normalized else env
    model = make(env, learning_starts=0, gradient_steps=0, use_sde=use_sde, sde_sample_freq=2, train_freq=3)
    witness = Witness()
    model.learn(27, callback=witness)
    actions, log_probs = stored(model, 9)
    for obs, action, log_prob in zip(witness.seen, actions, log_probs, strict=True):
        as_drawn = action.flatten() if action_space == "discrete" else action.float()
        wanted = model.actor.distribution(th.as_tensor(obs).float()).log_prob(as_drawn)
        assert th.allclose(log_prob, wanted, atol=1e-5)
    assert len(log_probs.unique()) > 3


def test_the_log_probs_are_those_of_the_policy_that_acted_not_of_the_last_one() -> None:
    model = make(envs("box", 2), learning_starts=0, learning_rate=1e-1)
    current: list[Any] = []

    class Ask(Witness):
        def _on_step(self) -> bool:
            obs = th.as_tensor(self.model._last_obs)
            actions = th.as_tensor(self.locals["buffer_actions"])
            current.append(model.actor.distribution(obs).log_prob(actions).detach())
            return True

    model.learn(20, callback=Ask())
    assert th.allclose(stored(model, 10)[1], th.stack(current), atol=1e-4)


@pytest.mark.parametrize(
    ("action_space", "log_prob"),
    [
        ("discrete", -math.log(3)),
        ("box", -2 * math.log(2)),  # of the policy's own actions, in [-1, 1]
        ("matrix", -4 * math.log(2)),
        ("multi_discrete", -math.log(6)),
        ("multi_binary", -3 * math.log(2)),
    ],
)
def test_the_first_actions_are_uniform(action_space: str, log_prob: float) -> None:
    model = make(envs(action_space, 2), learning_starts=40)
    model.learn(40)
    actions, log_probs = stored(model, 20)
    assert np.allclose(log_probs, log_prob)
    if isinstance(model.action_space, spaces.Box):
        assert actions.min() < -0.7
        assert actions.max() > 0.7
        assert actions.abs().max() <= 1


@pytest.mark.parametrize("learning_starts", [0, 100])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_the_env_gets_the_stored_action_in_its_own_units(action_space: str, learning_starts: int) -> None:
    env = ScriptedEnv(action_space=ACTION_SPACES[action_space])
    model = make(vec(env), learning_starts=learning_starts, gradient_steps=0).learn(10)
    space = model.action_space
    actions = stored(model, 10)[0][:, 0].numpy()
    for sent, action in zip(env.actions, actions, strict=True):
        wanted = action.reshape(space.shape or ())
        if isinstance(space, spaces.Box):
            wanted = space.low + (wanted + 1) / 2 * (space.high - space.low)
        assert np.allclose(sent, wanted, atol=1e-6)
        assert space.contains(np.asarray(sent).astype(space.dtype))


def test_integers_are_stored_as_the_policy_sees_them() -> None:
    model = make(vec(ScriptedEnv(action_space=spaces.Box(0, 255, (2,), np.uint8))), learning_starts=30).learn(40)
    actions = stored(model, 40)[0]
    assert actions[:30].min() < -0.7
    assert actions[:30].max() > 0.7
    assert len(actions[30:].unique()) == 20


@pytest.mark.parametrize(
    ("observation_space", "optimize_memory_usage"), [("vector", False), ("vector", True), ("dict", False)]
)
def test_replayed_log_probs_belong_to_their_transitions(observation_space: str, optimize_memory_usage: bool) -> None:
    model = make(
        envs("box", 3, observation_space),
        gradient_steps=0,
        buffer_size=60,  # is written over
        optimize_memory_usage=optimize_memory_usage,
        replay_buffer_kwargs={"handle_timeout_termination": not optimize_memory_usage},
    ).learn(99)
    buffer: Any = model.replay_buffer
    assert buffer.full
    samples = buffer.sample(200)
    found = []
    for reward, action, log_prob in zip(samples.rewards, samples.actions, samples.log_probs, strict=True):
        (place,) = np.argwhere(buffer.rewards == reward.item())
        assert np.array_equal(buffer.actions[tuple(place)], action)
        assert buffer.log_probs[tuple(place)] == log_prob.item()
        found.append(int(place[1]))
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize(("space", "cls"), [("vector", BehaviorReplayBuffer), ("dict", DictBehaviorReplayBuffer)])
def test_what_is_replayed_is_what_sb3_would_replay(space: str, cls: type[ReplayBuffer]) -> None:
    drawn = []
    for replay_buffer_class in (cls, cls.__mro__[2] if space == "dict" else ReplayBuffer):
        model = make(envs("box", 3, space), gradient_steps=0, replay_buffer_class=replay_buffer_class).learn(60)
        np.random.seed(0)  # noqa: NPY002
        drawn.append([sample(model).rewards for _ in range(2)])
    assert all(th.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))


# -------------------------------------------------------------------- what it owes to SB3


def test_the_same_seed_gives_the_same_weights() -> None:
    a, b, other = (parameters(make(envs("box", 2), seed=seed).learn(40).policy) for seed in (3, 3, 4))
    assert th.equal(a, b)
    assert not th.equal(a, other)


def test_evaluation_does_not_change_training() -> None:
    evaluate = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=5, n_eval_episodes=1, verbose=0)
    one, other = (make(gym.make("CartPole-v1")).learn(30, callback=callback) for callback in (evaluate, None))
    assert th.equal(parameters(one.policy), parameters(other.policy))


@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_save_load_and_resume(action_space: str, tmp_path: Path) -> None:
    env = envs(action_space, 2)
    model = make(env, critic_learning_rate="lin_1e-2").learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = OffPAC.load(tmp_path / "model", env=env, device="cpu")
    before, after = model.get_parameters(), loaded.get_parameters()
    assert before.keys() == after.keys() == {"policy", "actor.optimizer", "critic.optimizer"}
    assert after["critic.optimizer"]["state"][0]["step"] == 16
    assert all(str(before[name]) == str(after[name]) for name in before)
    loaded.load_replay_buffer(tmp_path / "buffer")
    ours, theirs = (stored(m, 20) for m in (model, loaded))
    assert all(th.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60
    assert loaded._n_updates == 26
    assert not th.equal(parameters(model.policy), parameters(loaded.policy))


def test_resuming_is_going_on(tmp_path: Path) -> None:
    model = make(envs("box")).learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = OffPAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    for each in (model, loaded):
        th.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        each.train(3, 8)
    assert th.equal(parameters(model.policy), parameters(loaded.policy))


def test_a_model_without_env_predicts(tmp_path: Path) -> None:
    model = make(envs("discrete"))
    model.save(tmp_path / "model")
    loaded = OffPAC.load(tmp_path / "model")
    obs = model.observation_space.sample()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="set_env"):
        loaded.learn(10)


def test_a_model_can_be_loaded_with_other_envs_and_arguments(tmp_path: Path) -> None:
    model = make(envs("box"), train_freq=(2, "episode")).learn(30)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"episodes takes one env, got 3"):
        OffPAC.load(tmp_path / "model", env=envs("box", 3))
    loaded = OffPAC.load(tmp_path / "model", env=envs("box", 3), train_freq=2, actor_gradient="score", gamma=0.5)
    assert (loaded.n_envs, loaded.gamma, loaded.actor_gradient) == (3, 0.5, "score")
    loaded.learn(30)
    make(gym.make("CartPole-v1")).save(tmp_path / "cartpole")
    OffPAC.load(tmp_path / "cartpole", env="CartPole-v1").learn(10)
    with pytest.raises(TypeError, match=r"has no argument 'gama'; did you mean 'gamma'"):
        OffPAC.load(tmp_path / "model", gama=0.3)
    with pytest.raises(ValueError, match=r"actor_gradient='expected' sums over the actions of a Discrete"):
        OffPAC.load(tmp_path / "model", actor_gradient="expected")


def test_what_is_saved_is_no_passing_thing(tmp_path: Path) -> None:
    model = make(VecNormalize(envs("box", 2))).learn(20)
    kept = model._excluded_save_params()
    assert {"_log_probs", "_n_collected", "replay_buffer"} <= {*kept}
    model.save(tmp_path / "model")
    assert OffPAC.load(tmp_path / "model")._log_probs is None


@pytest.mark.parametrize("use_sde", [False, True])
def test_the_policy_alone_can_be_saved(use_sde: bool, tmp_path: Path) -> None:
    for action_space in ["box"] if use_sde else ["discrete", "box"]:
        policy = make(envs(action_space), use_sde=use_sde).learn(20).policy
        policy.save(str(tmp_path / "policy"))
        loaded = type(policy).load(str(tmp_path / "policy"), device="cpu")
        obs = policy.observation_space.sample()
        assert np.array_equal(policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_pickle_and_deepcopy() -> None:
    model = make(envs("box")).learn(20)
    assert th.equal(parameters(copy.deepcopy(model.policy)), parameters(model.policy))
    again = pickle.loads(cloudpickle.dumps(model))
    assert th.equal(parameters(model.policy), parameters(again.policy))
    assert again.learn(20).num_timesteps == 20


def test_set_env_and_continue() -> None:
    model = make(envs("discrete")).learn(20)
    model.set_env(envs("discrete"))
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 40
    assert model.learn(10).num_timesteps == 10


def test_setting_up_again_is_fine() -> None:
    model = make(envs("discrete")).learn(20)
    model._setup_model()
    model.learn(20)


@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "n_updates"), [(4, 1, 4), ((2, "step"), -1, 16), ((1, "episode"), 3, 21)]
)
def test_train_freq(train_freq: Any, gradient_steps: int, n_updates: int) -> None:
    model = make(envs("discrete"), train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=8).learn(24)
    assert model._n_updates == n_updates


def test_as_many_gradient_steps_as_env_steps_with_several_envs() -> None:
    model = make(envs("discrete", 3), train_freq=2, gradient_steps=-1, learning_starts=0).learn(6)
    assert model._n_updates == 6


def test_normalized_envs() -> None:
    env = VecNormalize(envs("box", 2))
    model = make(env, gradient_steps=2).learn(60)
    assert model.get_vec_normalize_env() is env
    samples = model.replay_buffer.sample(8, env=env)  # type: ignore[union-attr]
    assert samples.rewards.abs().max() <= 10
    assert model.replay_buffer.rewards.max() > 1000  # type: ignore[union-attr]


def test_truncated_episodes_are_bootstrapped_and_terminated_ones_are_not() -> None:
    model = make(envs("discrete"), gradient_steps=0).learn(24)
    buffer: Any = model.replay_buffer
    ends = [2, 4, 7, 9, 12, 14, 17, 19, 22]  # episodes of 3 and 2 steps
    assert np.flatnonzero(buffer.dones[:24, 0]).tolist() == ends
    assert np.flatnonzero(buffer.timeouts[:24, 0]).tolist() == ends[2::3]
    samples = buffer._get_samples(np.arange(24))
    assert samples.dones.flatten().nonzero().flatten().tolist() == [e for i, e in enumerate(ends) if i % 3 != 2]


def test_schedules_of_actor_and_critic() -> None:
    """Never below 0, though the last rollout overshoots."""
    model = make(envs("discrete", 3), learning_rate="lin_1e-2", critic_learning_rate="lin_1e-1", train_freq=4)
    model.learn(31)
    rates = [o.param_groups[0]["lr"] for o in (model.actor.optimizer, model.critic.optimizer)]
    assert rates == [0.0, 0.0]
    model = make(envs("discrete"), learning_rate=lambda left: 0.1 + left, critic_learning_rate=0.2).learn(20)
    logged = model.logger.name_to_value
    assert logged["train/learning_rate"] == model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert logged["train/critic_learning_rate"] == model.critic.optimizer.param_groups[0]["lr"] == 0.2


def test_an_update_logs_the_mean_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled("discrete", actor_gradient="importance")
    made: list[Any] = []
    for name in ("_fit_critic", "_move_actor"):
        original = getattr(model, name)

        def noted(samples: Any, original: Any = original) -> Any:
            made.append(original(samples))
            return made[-1]

        monkeypatch.setattr(model, name, noted)
    model.train(3, 8)
    logged = model.logger.name_to_value
    assert logged["train/critic_loss"] == pytest.approx(np.mean([float(m["critic_loss"]) for m in made[::2]]))
    assert logged["train/entropy"] == pytest.approx(np.mean([float(m["entropy"]) for m in made[1::2]]))
    assert logged["train/largest_weight"] == pytest.approx(max(float(m["largest_weight"]) for m in made[1::2]))


def test_hindsight_replay() -> None:
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True), 1)
    model = OffPAC(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        buffer_size=200,
        learning_starts=20,
        batch_size=8,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
    ).learn(40)
    assert model._n_updates == 20


def test_optimize_memory_usage_is_sb3s() -> None:
    with pytest.raises(ValueError, match="handle_timeout_termination"):
        make(envs("discrete"), optimize_memory_usage=True)
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make(envs("discrete"), **kwargs).learn(20)
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        model.learn(20)


def test_a_callback_stops_training() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 10

    assert make(envs("discrete")).learn(100, callback=Stop()).num_timesteps == 10


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("action_space", "gradient"), EVERY_GRADIENT)
def test_trains_on_cuda(action_space: str, gradient: str) -> None:
    model = make(envs(action_space, 2), actor_gradient=gradient, device="cuda").learn(30)
    assert model.policy.device.type == "cuda"


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        *[("policy", v, TypeError) for v in (3, None, dict, ActorCriticPolicy, SACPolicy)],
        ("env", 3, TypeError),
        ("env", None, ValueError),
        *[("learning_rate", v, ValueError) for v in (-1e-3, NAN, "fast")],
        ("learning_rate", None, TypeError),
        *[("critic_learning_rate", v, ValueError) for v in (-1e-3, "lin_")],
        *[("actor_gradient", v, ValueError) for v in ("ddpg", "")],
        ("actor_gradient", 1, TypeError),
        *[("n_actions", v, ValueError) for v in (1, 0)],
        ("n_actions", 2.5, TypeError),
        *[("max_ratio", v, ValueError) for v in (0, -1.0, NAN)],
        *[("ent_coef", v, ValueError) for v in (-0.1, INF)],
        ("ent_coef", "auto", TypeError),
        *[("buffer_size", v, ValueError) for v in (0, -1)],
        ("buffer_size", 1e6, TypeError),
        ("learning_starts", -1, ValueError),
        *[("batch_size", v, ValueError) for v in (0, -1)],
        ("batch_size", None, TypeError),
        *[("tau", v, ValueError) for v in (-0.1, 1.1, NAN)],
        *[("gamma", v, ValueError) for v in (-0.1, 1.01)],
        *[("train_freq", v, ValueError) for v in (0, "4", ("1", "episode"), (1, "close"), (1, 2, 3), None)],
        *[("gradient_steps", v, ValueError) for v in (-2,)],
        ("gradient_steps", 1.0, TypeError),
        ("replay_buffer_class", dict, TypeError),
        ("replay_buffer_kwargs", 3, TypeError),
        ("optimize_memory_usage", 1, TypeError),
        ("action_noise", NormalActionNoise(np.zeros(1), np.ones(1)), ValueError),
        ("use_sde", 1, TypeError),
        ("sde_sample_freq", -2, ValueError),
        ("stats_window_size", 0, ValueError),
        ("policy_kwargs", "dict()", TypeError),
        ("seed", -1, ValueError),
        ("device", "gpu", ValueError),
    ],
)
def test_an_argument_is_named_with_its_value(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        OffPAC(**{"policy": "MlpPolicy", "env": envs("discrete"), "device": "cpu", argument: value})
    assert type(caught.value) is error
    assert argument in str(caught.value)


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="actor_gradints"):
        OffPAC("MlpPolicy", envs("discrete"), actor_gradints="score")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="n_critic"):
        make(envs("discrete"), policy_kwargs={"n_critic": 1})
    with pytest.raises(ValueError, match="LstmPolicy"):
        OffPAC("LstmPolicy", envs("discrete"))


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("gradient", ACTOR_LOSSES)
def test_what_an_action_space_cannot_have_is_refused(action_space: str, gradient: str) -> None:
    if gradient in GRADIENTS[action_space]:
        make(envs(action_space), actor_gradient=gradient)
    else:
        with pytest.raises(ValueError, match=f"actor_gradient='{gradient}'"):
            make(envs(action_space), actor_gradient=gradient)


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"must be a BehaviorReplayBuffer, got ReplayBuffer"):
        make(envs("discrete"), actor_gradient="importance", replay_buffer_class=ReplayBuffer)
    make(envs("discrete"), replay_buffer_class=ReplayBuffer).learn(14)
    with pytest.raises(ValueError, match=r"episodes takes one env, got 2"):
        make(envs("discrete", 2), train_freq=(1, "episode"))
    with pytest.raises(ValueError, match="continuous actions"):
        make(envs("discrete"), use_sde=True)
    for space in (spaces.Discrete(3, start=2), spaces.MultiDiscrete([2, 3], start=[0, 2])):
        with pytest.raises(ValueError, match="counted from 0"):
            make(vec(ScriptedEnv(action_space=space)))
    with pytest.raises(ValueError, match=r"bounds, which must differ"):
        make(vec(ScriptedEnv(action_space=spaces.Box(0.0, 0.0, (2,)))))


def test_a_replay_buffer_without_log_probs_has_no_importance(tmp_path: Path) -> None:
    make(envs("discrete"), replay_buffer_class=ReplayBuffer).learn(14).save_replay_buffer(tmp_path / "buffer")
    model = make(envs("discrete"), actor_gradient="importance")
    model.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="takes a BehaviorReplayBuffer"):
        model.learn(14)


def test_learning_without_a_number_is_explained() -> None:
    model = make(envs("discrete"))
    with pytest.raises(TypeError, match=r"total_timesteps.*'100'"):
        model.learn("100")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"total_timesteps.*-5"):
        model.learn(-5)


# -------------------------------------------------------------------- NaN never travels


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("fault", ["reward", "observation"])
@pytest.mark.parametrize("at", [14, 15])  # in an episode, and at its end
@pytest.mark.parametrize("learning_starts", [8, 100])
def test_a_nan_of_the_env_is_named(fault: str, at: int, normalized: bool, learning_starts: int) -> None:
    env: Any = vec(ScriptedEnv(lengths=(5,)), FaultyEnv(fault, at, lengths=(5,)))
    env = VecNormalize(env) if normalized else env
    model = make(env, learning_starts=learning_starts, train_freq=3)
    before: list[Any] = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            before[:] = [parameters(model.policy), copy.deepcopy(getattr(env, "obs_rms", None))]

    with pytest.raises(NonFiniteError, match=rf"{fault}.* is nan in env 1 at step {(at - 1) % 3}") as caught:
        model.learn(100, callback=Keep())
    assert (caught.value.env, caught.value.step) == (1, (at - 1) % 3)
    assert th.equal(before[0], parameters(model.policy))
    buffer: Any = model.replay_buffer
    assert all(np.isfinite(array).all() for array in (buffer.rewards, buffer.observations, buffer.next_observations))
    if normalized:
        assert np.array_equal(before[1].mean, env.obs_rms.mean)
    model.learn(20, reset_num_timesteps=False)  # the env is reset, and it was only once
    assert parameters(model.policy).isfinite().all()


def test_a_nan_at_the_end_of_an_episode_of_dicts_is_named() -> None:
    class Faulty(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, *rest = super().step(action)
            return {**obs, "vec": obs["vec"] * NAN} if rest[1] else obs, *rest

    env = vec(Faulty(lengths=(5,), observation_space=OBSERVATION_SPACES["dict"]))
    with pytest.raises(NonFiniteError, match=r"'vec'.* is nan in env 0.*time step 5"):
        make(env).learn(20)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_nan_of_a_reset_is_named(normalized: bool) -> None:
    class Faulty(ScriptedEnv):
        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            return obs * NAN if self.resets == 1 else obs, info

    env: Any = vec(ScriptedEnv(), Faulty())
    env = VecNormalize(env) if normalized else env
    model = make(env)
    with pytest.raises(NonFiniteError, match=r"observation is nan in env 1.*reset"):
        model.learn(20)
    assert model.learn(20).num_timesteps == 20


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("name", ["actor.latent_pi.0.weight", "critic.qf0.0.weight"])
def test_a_nan_among_the_parameters_is_named(action_space: str, name: str) -> None:
    model = make(envs(action_space)).learn(20)
    with th.no_grad():
        model.policy.get_parameter(name)[0, 0] = NAN
    before = parameters(model.policy)
    with pytest.raises(NonFiniteError, match=rf"parameter {name} is nan"):
        model.learn(20)
    assert th.equal(before.nan_to_num(), parameters(model.policy).nan_to_num())


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_a_policy_that_is_not_finite_does_not_act(action_space: str) -> None:
    env = ScriptedEnv(action_space=ACTION_SPACES[action_space])
    model = make(vec(env), learning_starts=0, gradient_steps=0)
    with th.no_grad():
        model.actor.latent_pi[0].weight[0, 0] = INF
    with pytest.raises(NonFiniteError, match=r"parameter actor.latent_pi.0.weight is inf"):
        model.learn(5)
    assert env.actions == []


@pytest.mark.parametrize("optimizer", [th.optim.SGD, th.optim.Adam])
def test_a_failed_update_changes_nothing(optimizer: Any) -> None:
    kwargs = {"optimizer_class": optimizer, "features_extractor_class": BatchNormExtractor}
    model = make(envs("box"), policy_kwargs=kwargs, gradient_steps=3).learn(20)
    model.replay_buffer.rewards[:] = INF  # type: ignore[union-attr]
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError, match=r"finite before the step. A smaller learning rate"):
        model.train(3, 8)
    after = model.policy.state_dict()
    assert all(th.equal(before[name], after[name]) for name in before)
    model.replay_buffer.rewards[:] = 1.0  # type: ignore[union-attr]
    model.train(3, 8)
    assert parameters(model.policy).isfinite().all()
