"""The surrogate objective: its gradient, its gain, its entropy, and the policies that it cannot be computed of."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    CategoricalDistribution,
    Distribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import NPG, TRPO, DemonstrationLoss, Demonstrations, KLPenaltyPG
from sb3_pg.learner.trust_region import SurrogateObjective
from sb3_pg.policies import policy_actions, score_actions
from sb3_pg.rollout import RolloutBatch
from tests.algorithms.steps import AtRolloutEnd, own_joint_kl, update
from tests.helpers import OwnForward, ScriptedEnv, vec

N = 40


def make_policy(space: spaces.Space[Any], cls: type[ActorCriticPolicy] = ActorCriticPolicy) -> ActorCriticPolicy:
    th.manual_seed(0)
    policy = cls(spaces.Box(-1, 1, (3,)), space, lambda _: 1e-3, net_arch=[4])
    policy.set_training_mode(False)
    return policy


def batch_of(observations: th.Tensor, actions: th.Tensor) -> RolloutBatch:
    """One env's segment."""
    zeros = th.zeros(len(observations), 1)
    flags = {"terminated": zeros.bool(), "truncated": zeros.bool(), "timesteps": zeros.long()}
    return RolloutBatch(observations.unsqueeze(1), actions.unsqueeze(1), zeros, **flags)  # type: ignore[arg-type]


def sampled(policy: ActorCriticPolicy) -> tuple[RolloutBatch, th.Tensor]:
    """A batch of the policy's own actions, and a credit for each."""
    observations = th.randn(N, 3)
    with th.no_grad():
        actions = policy.get_distribution(observations).sample().reshape(N, -1)
    return batch_of(observations, actions.float()), th.randn(N)


def objective_of(policy: Any, batch: RolloutBatch, credit: th.Tensor, *args: Any, **kwargs: Any) -> SurrogateObjective:
    actions = policy_actions(batch.select(batch.actions), policy.action_space)
    return SurrogateObjective(policy, batch.flat_observations, actions, credit, *args, **kwargs)


def vector(gradients: Any) -> th.Tensor:
    return th.cat([gradient.flatten() for gradient in gradients])


def actor(policy: ActorCriticPolicy) -> list[th.nn.Parameter]:
    return [parameter for name, parameter in policy.named_parameters() if "value" not in name]


SPACES = {"discrete": spaces.Discrete(3), "box": spaces.Box(-1, 1, (2,)), "multi_binary": spaces.MultiBinary(3)}


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("chunk_size", [7, N])
def test_the_gradient_is_that_of_the_mean_credited_log_prob(space: str, chunk_size: int) -> None:
    policy = make_policy(SPACES[space])
    batch, credit = sampled(policy)
    gradient = objective_of(policy, batch, credit, chunk_size=chunk_size).gradient(actor(policy))
    actions = batch.select(batch.actions)
    actions = actions.long().flatten() if space == "discrete" else actions
    _, log_prob, _ = policy.evaluate_actions(batch.flat_observations, actions)
    expected = vector(th.autograd.grad((credit * log_prob).mean(), actor(policy)))
    assert th.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [7, N])
def test_the_effect_of_a_step_by_its_definition(chunk_size: int) -> None:
    """Joint KL, mean of (rho - 1) A, the gain in entropy, the largest ratio, (sum rho)^2 / (n sum rho^2)."""
    policies: list[Any] = [make_policy(SPACES["box"]) for _ in range(2)]
    policy, old = policies
    batch, credit = sampled(policy)
    objective = objective_of(policy, batch, credit, ent_coef=0.5, chunk_size=chunk_size)
    objective.gradient(actor(policy))
    with th.no_grad():
        for parameter in actor(policy):
            parameter.add_(0.05 * th.randn_like(parameter))
        effect = objective.effect()
        log_probs = [
            p.evaluate_actions(batch.flat_observations, batch.select(batch.actions))[1].double() for p in (policy, old)
        ]
        wider = (policy.log_std - old.log_std).sum()
        kl = own_joint_kl(old, policy, batch.flat_observations)
    rho = (log_probs[0] - log_probs[1]).exp()
    surrogate = float(((rho - 1) * credit).mean())
    assert effect.joint_kl == pytest.approx(kl, rel=1e-4)
    assert effect.gain == pytest.approx(surrogate + 0.5 * float(wider), rel=1e-4)
    assert effect.largest_ratio == pytest.approx(float(rho.max()), rel=1e-4)
    assert effect.effective_sample_size == pytest.approx(float(rho.sum() ** 2 / (rho**2).sum() / N), rel=1e-4)


def test_the_entropy_of_a_gaussian_pulls_at_its_width_alone() -> None:
    """H = sum log sigma + const."""
    policy = make_policy(SPACES["box"])
    batch, credit = sampled(policy)
    without, with_entropy = (objective_of(policy, batch, credit, c).gradient(actor(policy)) for c in (0.0, 0.3))
    expected = vector([th.full_like(p, 0.3 * (p is policy.log_std)) for p in actor(policy)])
    assert th.allclose(with_entropy - without, expected, atol=1e-6)


class SquashedPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = SquashedDiagGaussianDistribution(1)


def squashed(n: int) -> tuple[Any, RolloutBatch, th.Tensor]:
    """A squashed Gaussian at one state, a batch of actions at n quantiles, and their standard normal numbers."""
    policy: Any = make_policy(spaces.Box(-1, 1, (1,)), SquashedPolicy)
    with th.no_grad():
        policy.action_net.bias.fill_(0.4)
        policy.log_std.fill_(-0.7)
        z = th.distributions.Normal(0.0, 1.0).icdf((th.arange(n, dtype=th.float64) + 0.5) / n)
        mean = float(policy.get_distribution(th.zeros(1, 3)).distribution.mean)
        actions = (mean + policy.log_std.exp() * z).tanh().float()
    return policy, batch_of(th.zeros(n, 3), actions.unsqueeze(1)), z


def entropy_of_squashed(mean: th.Tensor, log_std: th.Tensor, z: th.Tensor) -> th.Tensor:
    """H of tanh(mean + sigma z): that of the Gaussian, and E[log(1 - tanh^2)]."""
    gaussian = log_std + 0.5 * np.log(2 * np.pi * np.e)
    entropy: th.Tensor = gaussian + (1 - (mean + log_std.exp() * z).tanh() ** 2).log().mean()
    return entropy


def test_the_entropy_of_a_squashed_gaussian_in_expectation() -> None:
    """Without closed form: E[-log pi grad log pi] = grad H, here over the quantiles."""
    policy, batch, z = squashed(20_000)
    parameters = [policy.action_net.bias, policy.log_std]
    objective = objective_of(policy, batch, th.zeros(len(z)), ent_coef=1.0)
    gradient = objective.gradient(parameters)
    mean = policy.get_distribution(th.zeros(1, 3)).distribution.mean.detach().double().requires_grad_()
    log_std = policy.log_std.detach().double().requires_grad_()
    entropy = entropy_of_squashed(mean, log_std, z).sum()
    expected = vector(th.autograd.grad(entropy, [mean, log_std]))
    assert gradient.tolist() == pytest.approx(expected.tolist(), abs=2e-3)
    assert float(objective.entropy) == pytest.approx(float(entropy.detach()), abs=2e-3)


def test_the_gain_of_a_squashed_gaussian_counts_its_entropy() -> None:
    policy, batch, z = squashed(20_000)
    objective = objective_of(policy, batch, th.zeros(len(z)), ent_coef=1.0)
    objective.gradient([policy.log_std])
    mean = policy.get_distribution(th.zeros(1, 3)).distribution.mean.detach().double()
    before = entropy_of_squashed(mean, policy.log_std.detach().double(), z).sum()
    with th.no_grad():
        policy.log_std -= 0.1
    after = entropy_of_squashed(mean, policy.log_std.detach().double(), z).sum()
    effect = objective.effect()
    assert float(effect.gain) == pytest.approx(float(after - before), abs=5e-3)


# --- policies that it cannot be computed of ---


class Contradicting(ActorCriticPolicy):
    """Acts by other probabilities than it shows."""

    def get_distribution(self, obs: Any) -> Distribution:
        shown = super().get_distribution(obs)
        assert isinstance(shown, CategoricalDistribution)
        return shown.proba_distribution(2 * shown.distribution.logits + th.tensor([0.0, 0.0, 1.0]))


class Hidden(CategoricalDistribution):
    """Shows no distribution of torch's."""

    def proba_distribution(self, action_logits: th.Tensor) -> "Hidden":
        super().proba_distribution(action_logits)
        self.hidden: Any = self.distribution
        self.distribution: Any = None
        return self

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return th.zeros(len(actions)).add(self.hidden.logits.sum())

    def entropy(self) -> th.Tensor:
        result: th.Tensor = self.hidden.entropy()
        return result


class HiddenPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_dist = Hidden(3)


@pytest.mark.parametrize("cls", [TRPO, NPG, KLPenaltyPG])
def test_a_policy_that_contradicts_itself_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"get_distribution that agrees with evaluate_actions.*Contradicting gives"):
        cls(Contradicting, vec(ScriptedEnv()), device="cpu")


@pytest.mark.parametrize("cls", [TRPO, NPG, KLPenaltyPG])
def test_a_policy_without_a_distribution_of_torchs_is_refused_at_once(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"distribution of torch's.*HiddenPolicy has a Hidden without one"):
        cls(HiddenPolicy, vec(ScriptedEnv()), device="cpu")


def test_a_policy_with_methods_of_its_own_may_be_changed_between_rollout_and_update() -> None:
    """As a callback does that lowers the noise."""
    model = TRPO(OwnForward, vec(ScriptedEnv(action_space=gym.spaces.Box(-1, 1, (2,)))), n_steps=16, batch_size=16)
    widen = AtRolloutEnd(lambda model: model.policy.log_std.data.sub_(0.3))
    assert update(model, widen).log["train/step_outcome"] == "accepted"


@pytest.mark.parametrize("cls", [TRPO, KLPenaltyPG])
def test_a_policy_with_methods_that_agree_takes_the_usual_step(cls: Any) -> None:
    models = [
        cls(policy, vec(ScriptedEnv()), n_steps=16, batch_size=16, seed=0, device="cpu").learn(16)
        for policy in (ActorCriticPolicy, OwnForward)
    ]
    a, b = (th.nn.utils.parameters_to_vector(model.policy.parameters()) for model in models)
    assert th.allclose(a, b, atol=1e-4)


def test_a_penalty_that_uses_no_states_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the gradient, and for each effect; the results are those of a single chunk."""
    policy: Any = make_policy(SPACES["discrete"])
    batch, credit = sampled(policy)
    demos = Demonstrations(np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32), np.arange(9) % 3)
    n_scored: list[int] = []
    monkeypatch.setattr("sb3_pg.demonstrations.anchors.score_actions", scoring := counted(n_scored, score_actions))
    monkeypatch.setattr("sb3_pg.demonstrations.anchors.score_in_chunks", scoring)
    found = []
    for chunk_size in (N, 7):
        anchor = DemonstrationLoss(demos, 0.7, batch_size=None)
        objective = objective_of(policy, batch, credit, chunk_size=chunk_size, anchor=anchor)
        gradient = objective.gradient(actor(policy))
        metrics = objective.anchor_metrics
        with th.no_grad():
            policy.action_net.bias += 0.5
        gain = th.as_tensor(objective.effect().gain)
        with th.no_grad():
            policy.action_net.bias -= 0.5
        found.append(th.cat([gradient, th.stack([th.as_tensor(metrics["anchor/nll"]), gain])]))
        assert len(n_scored) == 2
        n_scored.clear()
    whole, in_chunks = found
    assert th.allclose(whole, in_chunks, rtol=1e-5, atol=1e-7)


def counted(calls: list[int], function: Any) -> Any:
    """The function, which counts its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return call
