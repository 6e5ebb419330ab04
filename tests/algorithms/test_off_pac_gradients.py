"""OffPAC: the critic's target, and every gradient of the actor's."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

from sb3_pg import OffPAC
from sb3_pg.algorithms.off_pac import losses as actor_gradients
from sb3_pg.algorithms.off_pac.losses import ACTOR_LOSSES, ActorLossInputs, critic_loss, draw, entropies
from sb3_pg.algorithms.off_pac.policies import Critic
from sb3_pg.rollout import BehaviorSamples
from tests.algorithms.off_pac import (
    EVERY_GRADIENT,
    SGD,
    envs,
    filled,
    make,
    rows,
    sample,
    train_on,
)
from tests.helpers import ACTION_SPACES, BatchNormExtractor, LinearExtractor, parameters

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
    assert critic_loss(model.policy, samples, model.gamma)[0].item() == pytest.approx(wanted, rel=1e-5)


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
    assert critic_loss(model.policy, samples, model.gamma)[0].item() == pytest.approx(wanted, rel=1e-5)


def test_the_critics_step_is_the_gradient_of_half_the_squared_error_and_leaves_the_rest_alone() -> None:
    rates: dict[str, Any] = {"learning_rate": 0.0, "critic_learning_rate": 1e-2, "tau": 0.0}
    model = filled("box", gamma=0.0, policy_kwargs=SGD, **rates)
    samples = sample(model)
    networks = copy.deepcopy(model.critic.q_networks)
    before = parameters(model.actor), parameters(model.critic_target)
    train_on(model, samples)
    for network, stepped in zip(networks, model.critic.q_networks, strict=True):
        q = network(th.cat([samples.observations, samples.actions], 1))
        gradients = th.autograd.grad(0.5 * (q - samples.rewards).square().mean(), list(network.parameters()))
        for was, gradient, now in zip(network.parameters(), gradients, stepped.parameters(), strict=True):
            assert th.allclose(was - 1e-2 * gradient, now, rtol=1e-4, atol=1e-5)
    assert th.equal(before[0], parameters(model.actor))
    assert th.equal(before[1], parameters(model.critic_target))


def test_rewards_of_n_steps_bring_their_own_discount() -> None:
    steps = {"n_steps": 2}
    model = filled("discrete", gamma=0.5, replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=steps)
    samples = sample(model)
    assert 0.25 in samples.discounts
    values = actor_gradients.state_values(
        model.critic_target, samples.next_observations, model.actor.distribution(samples.next_observations)
    )
    y = samples.rewards[:, 0] + samples.discounts[:, 0] * (1 - samples.dones[:, 0]) * values
    chosen = th.cat(model.critic(samples.observations, samples.actions), 1)
    wanted = 0.5 * (chosen - y[:, None]).square().mean(0).sum().item()
    assert critic_loss(model.policy, samples, model.gamma)[0].item() == pytest.approx(wanted, rel=1e-5)


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
    model = filled("discrete", tau=tau, learning_rate=0.0)
    critic, target = parameters(model.critic), parameters(model.critic_target)
    model.train(1, 8)
    assert th.allclose(parameters(model.critic_target), (1 - tau) * target + tau * critic, atol=1e-6)
    assert th.equal(parameters(model.critic), critic)


def test_the_target_has_the_critics_batch_norm_statistics_and_does_not_make_its_own() -> None:
    model = make(envs("discrete"), policy_kwargs={"features_extractor_class": BatchNormExtractor}).learn(30)
    ours, theirs = dict(model.critic.named_buffers()), dict(model.critic_target.named_buffers())
    assert ours["features_extractor.norm.num_batches_tracked"] > 0
    assert ours.keys() == theirs.keys()
    assert all(th.equal(ours[name], theirs[name]) for name in ours)


# -------------------------------------------------------------------- the actor's gradient


def gradient_of(model: OffPAC, samples: Any, kind: Any, n_actions: int = 2, max_ratio: float | None = None) -> Any:
    """Gradient of the objective, minus the loss."""
    distribution = model.actor.distribution(samples.observations)
    loss, _ = ACTOR_LOSSES[kind](ActorLossInputs(samples, distribution, model.critic, n_actions, max_ratio))
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
    loss, _ = ACTOR_LOSSES["reparameterized"](ActorLossInputs(samples, distribution, model.critic, 2, None))
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
    rates: dict[str, Any] = {"critic_learning_rate": 0.0, "tau": 0.0}
    policy_kwargs = {"share_features_extractor": share}
    model = filled(action_space, actor_gradient=gradient, ent_coef=0.1, policy_kwargs=policy_kwargs, **rates)
    critic, actor = parameters(model.critic), parameters(model.actor)
    samples, networks = sample(model), list(model.critic.parameters())
    th.manual_seed(0)
    of_critic = th.autograd.grad(critic_loss(model.policy, samples, model.gamma)[0], networks)
    th.manual_seed(0)
    train_on(model, samples)
    assert th.equal(critic, parameters(model.critic))
    for parameter, gradient_of_critic in zip(networks, of_critic, strict=True):
        assert th.equal(parameter.grad, gradient_of_critic)
        assert parameter.requires_grad
    assert not th.equal(actor, parameters(model.actor))


def test_shared_features_are_trained_by_the_actors_loss_alone() -> None:
    model = filled("box", policy_kwargs={"features_extractor_class": LinearExtractor, "share_features_extractor": True})
    shared = model.actor.features_extractor
    assert model.critic.features_extractor is shared
    before = parameters(shared)
    loss, _ = critic_loss(model.policy, sample(model), model.gamma)
    assert loss.requires_grad
    gradients: tuple[th.Tensor | None, ...] = th.autograd.grad(loss, list(shared.parameters()), allow_unused=True)
    assert gradients == (None, None)
    model.train(1, 8)
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


@pytest.mark.parametrize("ent_coef", [2.0, "lin_8", lambda left: 8 * left])
def test_the_entropy_bonus_of_discrete_actions_adds_its_gradient(ent_coef: Any) -> None:
    rates: dict[str, Any] = {"learning_rate": 0.1, "critic_learning_rate": 0.0, "tau": 0.0}
    model = filled("discrete", ent_coef=ent_coef, policy_kwargs=SGD, **rates)
    model._current_progress_remaining = 0.25
    samples = sample(model)
    pi, q, latent = probabilities_and_q(model, samples)
    entropy = -(pi * np.log(pi)).sum(1, keepdims=True)
    by_logits = pi * (q - (pi * q).sum(1, keepdims=True)) - 2.0 * pi * (np.log(pi) + entropy)
    before = rows(th.cat([model.actor.logits.weight.flatten(), model.actor.logits.bias]))
    logged = train_on(model, samples)
    after = rows(th.cat([model.actor.logits.weight.flatten(), model.actor.logits.bias]))
    assert np.allclose(after - before, 0.1 * by_head(by_logits, latent), atol=1e-5)
    assert logged["train/entropy"] == pytest.approx(entropy.mean(), rel=1e-5)


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
        logged.append(train_on(model, sample(model, 64))["train/entropy"])
    assert logged[1] > logged[0] + 0.05
