"""The fast and the general sampler draw from one distribution."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule, obs_as_tensor
from torch import nn
from torch.distributions import Distribution

from sb3_pg.policies.samplers import (
    DistributionSampler,
    ForwardSampler,
    MlpSampler,
    NumpySampler,
    Share,
    draws_by_share,
    make_sampler,
)
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, OwnForward

CPU = th.device("cpu")
N_SAMPLES = 20_000


def make_policy(observations: str, actions: str, cls: Any = ActorCriticPolicy, **kwargs: Any) -> ActorCriticPolicy:
    th.manual_seed(1)
    policy: ActorCriticPolicy = cls(
        OBSERVATION_SPACES[observations], ACTION_SPACES[actions], ConstantSchedule(1e-3), **kwargs
    )
    for parameter in policy.parameters():  # SB3's small last layer would make every distribution uniform
        nn.init.normal_(parameter, std=0.3)
    policy.set_training_mode(False)
    return policy


def same_observation(space: spaces.Space[Any], n: int) -> np.ndarray:
    space.seed(0)
    return np.stack([np.asarray(space.sample())] * n)


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("observations", ["vector", "double", "discrete"])
@pytest.mark.parametrize("actions", list(ACTION_SPACES))
def test_the_fast_samplers_outputs_are_the_policys(observations: str, actions: str) -> None:
    policy = make_policy(observations, actions)
    sampler = make_sampler(policy, CPU, 4)
    in_numpy = actions in ("discrete", "box", "matrix") and observations != "discrete"
    assert type(sampler) is (NumpySampler if in_numpy else MlpSampler)
    space = OBSERVATION_SPACES[observations]
    space.seed(3)
    obs = np.stack([np.asarray(space.sample()) for _ in range(4)])
    with th.no_grad():
        outputs = th.as_tensor(sampler.outputs(obs))
        policy.get_distribution(obs_as_tensor(obs, CPU))
        distribution = policy.action_dist
        if isinstance(distribution, DiagGaussianDistribution):
            expected = distribution.distribution.mean
        elif isinstance(distribution, MultiCategoricalDistribution):
            # torch keeps normalized logits, which differ by a constant per sub-action
            expected = th.cat([d.logits for d in distribution.distribution], dim=1)
            outputs = th.cat([x.log_softmax(1) for x in outputs.split([2, 3], 1)], dim=1)
        elif isinstance(distribution, CategoricalDistribution):
            expected, outputs = distribution.distribution.logits, outputs.log_softmax(1)
        else:
            assert isinstance(distribution, BernoulliDistribution)
            expected = distribution.distribution.logits
    assert th.allclose(outputs, expected, atol=1e-5)


# Quantiles of chi-squared at 1 - 1e-4 for 2, 5 and 7 degrees of freedom.
QUANTILES = {"discrete": 18.42, "multi_discrete": 25.74, "multi_binary": 29.88}


@pytest.mark.parametrize("actions", list(QUANTILES))
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "general"])
def test_samples_of_finite_actions_follow_the_policys_log_probs(actions: str, fast: bool) -> None:
    policy = make_policy("vector", actions)
    obs = same_observation(OBSERVATION_SPACES["vector"], N_SAMPLES)
    sampler = make_sampler(policy, CPU, N_SAMPLES) if fast else DistributionSampler(policy, CPU)
    if fast:
        assert type(sampler) is (NumpySampler if actions == "discrete" else MlpSampler)
    sampled = sampler(obs)
    space: Any = ACTION_SPACES[actions]
    assert sampled.shape == (N_SAMPLES, *space.shape)
    atoms, counts = np.unique(sampled.reshape(N_SAMPLES, -1), axis=0, return_counts=True)
    with th.no_grad():
        atom_actions = th.as_tensor(atoms).flatten() if actions == "discrete" else th.as_tensor(atoms)
        log_probs = policy.get_distribution(th.as_tensor(obs[: len(atoms)])).log_prob(atom_actions)
    probabilities = log_probs.exp().numpy()
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)  # every action occurred
    assert chi_squared(counts, probabilities) < QUANTILES[actions]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_logits_of_any_size_are_drawn_from(shift: float) -> None:
    """The exponential of 1000 is infinite, that of -1000 is 0; what matters are the differences."""
    policy = make_policy("vector", "discrete")
    head: Any = policy.action_net
    with th.no_grad():
        head.weight.zero_()
        head.bias.copy_(th.tensor([0.2, 0.5, 0.3]).log() + shift)
    sampler = make_sampler(policy, CPU, N_SAMPLES)
    assert type(sampler) is NumpySampler
    counts = np.bincount(sampler(same_observation(OBSERVATION_SPACES["vector"], N_SAMPLES)), minlength=3)
    assert chi_squared(counts, np.array([0.2, 0.5, 0.3])) < QUANTILES["discrete"]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "general"])
def test_gaussian_samples_follow_the_policys_distribution(fast: bool) -> None:
    policy = make_policy("vector", "box")
    obs = same_observation(OBSERVATION_SPACES["vector"], N_SAMPLES)
    sampler = make_sampler(policy, CPU, N_SAMPLES) if fast else DistributionSampler(policy, CPU)
    sampled = th.as_tensor(sampler(obs))
    with th.no_grad():
        normal: Any = policy.get_distribution(th.as_tensor(obs[:1])).distribution
        uniform = normal.cdf(sampled).numpy()
    for dimension in range(2):
        counts, _ = np.histogram(uniform[:, dimension], bins=20, range=(0, 1))
        assert chi_squared(counts, np.full(20, 0.05)) < 50.8  # 19 degrees of freedom, 1 - 1e-4
    assert abs(np.corrcoef(uniform.T)[0, 1]) < 0.03


def test_noise_is_fresh_at_every_step_and_repeats_with_the_seed() -> None:
    policy = make_policy("vector", "box")
    obs = same_observation(OBSERVATION_SPACES["vector"], 2)
    runs = []
    for _ in range(2):
        th.manual_seed(7)
        sampler = make_sampler(policy, CPU, 2)
        runs.append(np.stack([sampler(obs) for _ in range(600)]))
    assert np.array_equal(runs[0], runs[1])
    assert len(np.unique(runs[0])) == 600 * 2 * 2


@pytest.mark.parametrize("actions", list(ACTION_SPACES))
def test_every_sampler_draws_what_sb3_draws_from_the_same_seed(actions: str) -> None:
    policy = make_policy("vector", actions)
    obs = same_observation(OBSERVATION_SPACES["vector"], 4)
    samplers = [make_sampler(policy, CPU, 4), DistributionSampler(policy, CPU), ForwardSampler(policy, CPU)]
    runs = []
    for sampler in samplers:
        th.manual_seed(7)
        runs.append(np.stack([sampler(obs) for _ in range(200)]))
    assert len(np.unique(runs[0])) > 1
    for run in runs[1:]:
        assert np.allclose(runs[0], run, atol=1e-5)


class OwnLatent(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return super()._get_action_dist_from_latent(latent_pi)


class OwnExtraction(ActorCriticPolicy):
    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return super().extract_features(obs, features_extractor)


@pytest.mark.parametrize(
    ("cls", "observations", "kwargs", "expected"),
    [
        (ActorCriticPolicy, "vector", {}, NumpySampler),
        (ActorCriticPolicy, "vector", {"activation_fn": nn.ELU, "net_arch": [8]}, MlpSampler),
        (ActorCriticPolicy, "vector", {"use_sde": True}, DistributionSampler),
        (ActorCriticPolicy, "multi_discrete", {}, DistributionSampler),
        (OwnLatent, "vector", {}, ForwardSampler),
        (ActorCriticCnnPolicy, "image", {}, DistributionSampler),
        (MultiInputActorCriticPolicy, "dict", {}, DistributionSampler),
        (OwnForward, "vector", {}, ForwardSampler),
        (OwnExtraction, "vector", {}, ForwardSampler),
    ],
)
def test_the_sampler_honors_what_a_policy_overrides(cls: Any, observations: str, kwargs: Any, expected: type) -> None:
    if observations == "image":
        space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
        policy = cls(space, ACTION_SPACES["box"], ConstantSchedule(1e-3), **kwargs)
    else:
        policy = make_policy(observations, "box", cls, **kwargs)
    assert type(make_sampler(policy, CPU, 1)) is expected


def test_a_forward_hook_keeps_the_modules_in_use() -> None:
    policy = make_policy("vector", "discrete")
    calls: list[int] = []
    policy.mlp_extractor.policy_net[0].register_forward_hook(lambda *_: calls.append(1))
    sampler = make_sampler(policy, CPU, 1)
    sampler(same_observation(OBSERVATION_SPACES["vector"], 1))
    assert calls == [1]


def test_sampling_follows_the_parameters_wherever_they_are() -> None:
    """In place, by new memory, and (for the spread) in the middle of a rollout."""
    policy = make_policy("vector", "box")
    obs = same_observation(OBSERVATION_SPACES["vector"], 1)
    sampler = make_sampler(policy, CPU, 1)
    assert type(sampler) is NumpySampler
    head: Any = policy.action_net
    with th.no_grad():
        policy.log_std.fill_(-20)
        head.bias += 3
    assert np.allclose(sampler(obs), policy.get_distribution(th.as_tensor(obs)).mode().detach(), atol=1e-5)
    policy.load_from_vector(policy.parameters_to_vector() * 0.5)
    sampler = make_sampler(policy, CPU, 1)
    assert np.allclose(sampler(obs), policy.get_distribution(th.as_tensor(obs)).mode().detach(), atol=1e-3)


def test_a_head_without_bias() -> None:
    policy = make_policy("vector", "discrete")
    policy.action_net = nn.Linear(64, 3, bias=False)
    obs = same_observation(OBSERVATION_SPACES["vector"], 2)
    sampler = make_sampler(policy, CPU, 2)
    assert sampler(obs).shape == (2,)
    assert type(sampler) is MlpSampler


def test_sampling_leaves_torchs_validation_as_it_was() -> None:
    def validates() -> bool:
        try:
            th.distributions.Bernoulli(probs=th.tensor(2.0))
        except ValueError:
            return True
        return False

    policy = make_policy("multi_discrete", "discrete")
    try:
        for chosen in (False, True):
            Distribution.set_default_validate_args(chosen)
            make_sampler(policy, CPU, 1)(same_observation(OBSERVATION_SPACES["multi_discrete"], 1))
            assert validates() == chosen
    finally:
        Distribution.set_default_validate_args(__debug__)


@pytest.mark.parametrize("observations", ["vector", "discrete"])
@pytest.mark.parametrize("actions", list(ACTION_SPACES))
def test_shares_of_the_envs_draw_as_all_of_them(observations: str, actions: str) -> None:
    policy = make_policy(observations, actions)
    space = OBSERVATION_SPACES[observations]
    space.seed(5)
    obs = np.stack([np.asarray(space.sample()) for _ in range(6)])

    def drawn(share: Share) -> tuple[list[np.ndarray], th.Tensor]:
        th.manual_seed(3)
        sampler = make_sampler(policy, CPU, share)
        assert not draws_by_share(sampler)
        return [sampler(obs[share.rows]) for _ in range(50)], th.get_rng_state()

    expected, state = drawn(Share.whole(6))
    parts = [drawn(Share(first, n, 6)) for first, n in ((0, 3), (3, 1), (4, 2))]
    assert all(th.equal(state, other) for _, other in parts)
    for step, *of_parts in zip(expected, *(rows for rows, _ in parts), strict=True):
        np.testing.assert_allclose(np.concatenate(of_parts), step, atol=1e-5)


def test_shares_have_streams_of_their_own_where_the_policy_draws() -> None:
    policy = make_policy("vector", "box")
    states = []
    for share in (Share(0, 2, 4), Share(2, 1, 4), Share(3, 1, 4), Share(3, 1, 4)):
        th.manual_seed(3)
        before = th.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "get_distribution", policy.get_distribution)  # now it is a method of its own
            assert draws_by_share(make_sampler(policy, CPU, share))
        states.append(th.get_rng_state())
        assert th.equal(states[-1], before) == (share.first == 0)
    assert not th.equal(states[1], states[2])
    assert th.equal(states[2], states[3])


@pytest.mark.parametrize("shares", [[(0, 2), (2, 3)], [(0, 1), (1, 4)]])
def test_shares_have_the_same_gsde_noise(shares: list[tuple[int, int]]) -> None:
    policy = make_policy("vector", "box", use_sde=True)
    space = OBSERVATION_SPACES["vector"]
    space.seed(5)
    obs = np.stack([np.asarray(space.sample()) for _ in range(5)])

    def drawn(share: Share) -> np.ndarray:
        th.manual_seed(3)
        share.reset_noise(policy)
        sampler = make_sampler(policy, CPU, share)
        assert not draws_by_share(sampler)
        return sampler(obs[share.rows])

    parts = [drawn(Share(first, n, 5)) for first, n in shares]
    np.testing.assert_allclose(np.concatenate(parts), drawn(Share.whole(5)), atol=1e-5)
