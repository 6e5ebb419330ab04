"""TRPO and NPG: the step, its divergence, whom it moves, and what happens where there is none to take."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pg import NPG, TRPO, NonFiniteError
from tests.algorithms.steps import AtRolloutEnd, Update, history, own_joint_kl, plant, update
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, vec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE = OBSERVATION_SPACES["image"]
#: name -> (class, what makes it that); "fixed" with a step of a usual length
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, {}),
    "npg": (NPG, {}),
    "npg-fixed": (NPG, {"step": "fixed", "step_size": 0.01}),
}
all_methods = pytest.mark.parametrize("method", list(METHODS))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(n_threads)


def make(
    method: str = "trpo",
    actions: Any = "discrete",
    observations: spaces.Space[Any] = OBSERVATION_SPACES["vector"],
    policy: Any = "MlpPolicy",
    **kwargs: Any,
) -> Any:
    """A model on two envs whose rewards grow with time, and episodes of which every other one is truncated."""
    space = ACTION_SPACES[actions] if isinstance(actions, str) else actions
    envs = [
        ScriptedEnv(lengths, (False, True), reward, *copy.deepcopy((observations, space)))
        for lengths, reward in (((3, 4, 9), -5.0), ((2, 9, 4), 1.0))
    ]
    cls, chosen = METHODS[method]
    return cls(
        policy, vec(*envs), **{"n_steps": 32, "batch_size": None, "seed": 0, "device": "cpu", **chosen, **kwargs}
    )


# --- the divergence of the step ---


@pytest.mark.parametrize("n_updates", [1, 5])
@pytest.mark.parametrize(
    ("actions", "kwargs"),
    [
        *((spaces.Box(-1, 1, (d,)), {}) for d in (1, 6, 17)),
        *((name, {}) for name in ("discrete", "multi_discrete", "multi_binary", "matrix")),
        ("box", {"use_sde": True, "sde_sample_freq": 4}),
        ("box", {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    ],
    ids=["box-1", "box-6", "box-17", "discrete", "multi_discrete", "multi_binary", "matrix", "gsde", "squashed"],
)
def test_the_joint_kl_of_a_step_is_within_the_trust_region(
    actions: Any, kwargs: dict[str, Any], n_updates: int
) -> None:
    """Of the whole action vector, however many dimensions it has, and what is logged is what it is."""
    model = make("trpo", actions, target_kl=0.01, **kwargs)
    for _ in range(n_updates):
        step = update(model)
    kl = own_joint_kl(step.old, step.new, step.batch.flat_observations)
    assert step.log["train/step_outcome"] == "accepted"
    assert 0.002 < kl <= 0.01 * (1 + 1e-4)
    assert step.log["train/joint_kl"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("d", [1, 6, 17])
def test_the_natural_gradient_alone_comes_near_its_kl(d: int) -> None:
    """Without damping the KL's quadratic model says target_kl."""
    step = update(make("npg", spaces.Box(-1, 1, (d,)), n_steps=256, target_kl=1e-5, cg_damping=1e-5, cg_max_steps=50))
    assert step.log["train/joint_kl"] == pytest.approx(1e-5, rel=0.1)


def test_rejected_steps_are_shortened() -> None:
    """Where the whole step is too long, the first of the shorter ones that is not: a factor more would be."""
    kwargs: dict[str, Any] = {"target_kl": 0.5, "cg_damping": 1e-4}
    whole, part = update(make("npg", **kwargs)), update(make("trpo", line_search_shrinking_factor=0.9, **kwargs))
    n = part.log["train/line_search_steps"]
    assert n > 1
    assert whole.log["train/joint_kl"] > 0.5 >= part.log["train/joint_kl"]
    for name in ("step_size", "surrogate_predicted"):
        assert part.log[f"train/{name}"] == pytest.approx(0.9 ** (n - 1) * whole.log[f"train/{name}"], rel=1e-4)


def test_npg_is_trpo_whose_first_step_is_accepted() -> None:
    n_steps, weights = [], []
    for method in ("trpo", "npg"):
        model = make(method, "box")
        logs = history(model, 4 * 64)
        n_steps += [log["train/line_search_steps"] for log in logs]
        weights.append(nn.utils.parameters_to_vector(model.policy.parameters()))
    assert n_steps == [1] * 8
    assert th.equal(*weights)


# --- whose parameters move ---


class OwnNames(ActorCriticPolicy):
    """Names that say the opposite of what they are."""

    optimizer_class: Any

    def _build(self, lr_schedule: Any) -> None:
        self.value_like_actor, self.action_net_of_critic = nn.Linear(3, 3), nn.Linear(3, 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def get_distribution(self, obs: Any) -> Distribution:
        return CategoricalDistribution(3).proba_distribution(self.value_like_actor(obs))

    def predict_values(self, obs: Any) -> th.Tensor:
        values: th.Tensor = self.action_net_of_critic(obs)
        return values

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class WithValueMap(spaces.Dict):
    def __init__(self) -> None:
        super().__init__({"value_map": spaces.Box(0, 255, (36, 36, 1), np.uint8), "vec": spaces.Box(-1, 1, (2,))})


#: (arguments, the beginnings of the actor's names)
SETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mlp": ({}, ("mlp_extractor.policy_net.", "action_net.")),
    "log_std": ({"actions": "box"}, ("mlp_extractor.policy_net.", "action_net.", "log_std")),
    "gsde": ({"actions": "box", "use_sde": True}, ("mlp_extractor.policy_net.", "action_net.", "log_std")),
    "shared-layers": (
        {"policy_kwargs": {"net_arch": [8]}, "observations": IMAGE, "policy": "CnnPolicy"},
        ("features_extractor.", "mlp_extractor.policy_net.", "action_net."),
    ),
    "value_map": (
        {"observations": WithValueMap(), "policy": "MultiInputPolicy"},
        ("features_extractor.extractors.value_map.", "mlp_extractor.policy_net.", "action_net."),
    ),
    "shared-cnn": ({"observations": IMAGE, "policy": "CnnPolicy"}, ("features_extractor.", "action_net.")),
    "separate-cnns": (
        {
            "observations": IMAGE,
            "policy": "CnnPolicy",
            "policy_kwargs": {"share_features_extractor": False},
        },
        ("features_extractor.", "pi_features_extractor.", "action_net."),
    ),
    "own-names": ({"policy": OwnNames}, ("value_like_actor.",)),
}


@pytest.mark.parametrize("rate", ["learning_rate", "critic_learning_rate"])
@pytest.mark.parametrize("case", list(SETS))
def test_actor_and_critic_share_nothing(case: str, rate: str) -> None:
    """Features that both use are the actor's, whichever optimizer the critic is trained by."""
    kwargs, names = SETS[case]
    small: dict[str, Any] = {"n_steps": 8, "n_critic_updates": 2, rate: 1e-3, **kwargs}
    actor = update(make(**{**small, rate: 0.0}))  # the critic stands still
    critic = update(make(**small, critic_warmup_updates=1))  # the actor does
    everything = {name for name, _ in actor.new.named_parameters()}
    expected = {name for name in everything if name.startswith(names)}
    assert expected
    assert actor.log["train/step_outcome"] == "accepted"
    assert actor.moved == expected
    assert critic.moved == everything - expected


FROZEN = ("action_net.bias", "mlp_extractor.policy_net.0.weight", "mlp_extractor.value_net.2.bias")


@all_methods
def test_frozen_parameters_stay(method: str) -> None:
    model = make(method, "box")
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    step = update(model)
    assert step.log["train/step_outcome"] == "accepted"
    assert step.moved == {name for name, _ in step.new.named_parameters()} - {*FROZEN}


@all_methods
@pytest.mark.parametrize("everything", [False, True])
def test_a_frozen_actor_stays_and_the_critic_learns(method: str, everything: bool) -> None:
    model = make(method)
    frozen = {name for name, _ in model.policy.named_parameters()} if everything else {*model.parameter_sets.actor}
    for name in frozen:
        model.policy.get_parameter(name).requires_grad_(False)
    step = update(model)
    assert step.log["train/step_outcome"] == "zero_gradient"
    assert step.log["train/joint_kl"] == 0
    assert step.moved == {name for name, _ in step.new.named_parameters()} - frozen


@all_methods
def test_only_the_width_is_trained(method: str) -> None:
    model = make(method, "box")
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name == "log_std")
    step = update(model)
    assert step.log["train/step_outcome"] == "accepted"
    assert step.moved == {"log_std"}


def test_gradients_that_somebody_has_left_behind_move_nothing() -> None:
    """The critic's steps are those of policy.optimizer, which holds the actor's parameters too."""
    clean, model = update(make()), make()
    for parameter in model.policy.parameters():
        parameter.grad = th.ones_like(parameter)
    left = update(model)
    assert all(th.equal(a, b) for a, b in zip(clean.new.parameters(), left.new.parameters(), strict=True))


# --- the step against a dense solution ---


def quadrature(held: Any) -> Iterator[tuple[th.Tensor, float]]:
    """Actions and weights whose sum is an expectation: exact for all that a score's square is made of."""
    if isinstance(held, th.distributions.Categorical):
        yield from ((th.tensor([a]), float(p)) for a, p in enumerate(held.probs.detach()[0]))
        return
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    for chosen in itertools.product(range(3), repeat=held.loc.shape[1]):
        z = th.tensor(nodes[list(chosen)], dtype=th.float64)
        yield (held.loc + held.scale * z).detach(), float(np.prod(weights[list(chosen)] / np.sqrt(2 * np.pi)))


class Dense:
    """F = E[score score^T] over the batch's states, and g of the pseudo-loss, in float64."""

    def __init__(self, policy: Any, batch: Any, credit: th.Tensor, ent_coef: float = 0.0) -> None:
        self.policy = copy.deepcopy(policy).double()
        self.names = [name for name, _ in policy.named_parameters() if "value" not in name]
        self.parameters = [self.policy.get_parameter(name) for name in self.names]
        observations = batch.flat_observations.double()
        self.fisher = th.stack([self._at(observation.unsqueeze(0)) for observation in observations]).mean(0)
        actions = batch.select(batch.actions)
        actions = actions.long().flatten() if isinstance(policy.action_space, spaces.Discrete) else actions.double()
        distribution = self.distribution(observations)
        pseudo = (distribution.log_prob(actions) * credit.double()).mean() + ent_coef * distribution.entropy().mean()
        self.gradient = self._flat(pseudo)

    def distribution(self, observations: th.Tensor) -> Any:
        """Without the feature extractor, which makes single precision of them."""
        return self.policy._get_action_dist_from_latent(self.policy.mlp_extractor.forward_actor(observations))

    def _flat(self, scalar: th.Tensor) -> th.Tensor:
        gradients = th.autograd.grad(scalar, self.parameters, retain_graph=True, materialize_grads=True)
        return th.cat([gradient.flatten() for gradient in gradients])

    def _at(self, observation: th.Tensor) -> th.Tensor:
        distribution = self.distribution(observation)
        points = list(quadrature(distribution.distribution))
        scores = [self._flat(distribution.log_prob(action).sum()) for action, _ in points]
        return th.stack([weight * th.outer(x, x) for x, (_, weight) in zip(scores, points, strict=True)]).sum(0)

    def change(self, policy: Any) -> th.Tensor:
        """What a step has added to theta."""
        pairs = zip(self.names, self.parameters, strict=True)
        changes = [policy.get_parameter(name).detach().double() - old.detach() for name, old in pairs]
        return th.cat([change.flatten() for change in changes])


def own_credit(model: Any, batch: Any) -> th.Tensor:
    """gamma^t A_t, normalized where that is asked for."""
    credit = batch.advantages[batch.valid].double()
    if model.normalize_advantage:
        credit = (credit - credit.mean()) / credit.std()
    if model.state_discount:
        credit = credit * model.gamma ** batch.timesteps[batch.valid]
    return th.as_tensor(credit)


DENSE: dict[str, dict[str, Any]] = {
    "categorical": {},
    "gaussian": {"actions": "box"},
    "raw-advantages": {"normalize_advantage": False, "gamma": 0.9},
    "state-discount": {"state_discount": True, "gamma": 0.8},
    "episodes": {"n_steps": None, "n_episodes": 4, "state_discount": True, "gamma": 0.8},
    "monte-carlo": {"actions": "box", "n_steps": None, "n_episodes": 4, "advantage": "monte_carlo"},
    "entropy": {"actions": "box", "ent_coef": 0.7},
    "undamped": {"actions": "box", "cg_damping": 1e-3},
    "hidden-layer": {"policy_kwargs": {"net_arch": {"pi": [3], "vf": []}}},
}


def small(method: str, case: str, **kwargs: Any) -> Any:
    chosen = {"n_steps": 8, "policy_kwargs": {"net_arch": []}, "cg_max_steps": 60, "cg_tolerance": 1e-7}
    return make(method, **{**chosen, **DENSE[case], **kwargs})


@pytest.mark.parametrize("case", list(DENSE))
def test_a_fixed_step_is_alpha_times_the_natural_gradient(case: str) -> None:
    """theta + alpha (F + c I)^-1 g."""
    model = small("npg-fixed", case, step_size=0.02)
    step = update(model)
    dense = Dense(step.old, step.batch, own_credit(model, step.batch), model.ent_coef)
    damped = dense.fisher + model.cg_damping * th.eye(len(dense.fisher))
    expected = 0.02 * th.linalg.solve(damped, dense.gradient)
    assert step.log["train/grad_norm"] == pytest.approx(float(dense.gradient.norm()), rel=1e-4)
    assert step.log["train/surrogate_predicted"] == pytest.approx(float(dense.gradient.dot(expected)), rel=1e-3)
    assert (dense.change(step.new) - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("case", list(DENSE))
def test_the_step_that_the_kl_allows(case: str) -> None:
    """sqrt(2 delta / x^T (F + c I) x) x."""
    model = small("npg", case, target_kl=1e-3)
    step = update(model)
    dense = Dense(step.old, step.batch, own_credit(model, step.batch), model.ent_coef)
    damped = dense.fisher + model.cg_damping * th.eye(len(dense.fisher))
    x = th.linalg.solve(damped, dense.gradient)
    expected = (2e-3 / x.dot(damped @ x)).sqrt() * x
    assert (dense.change(step.new) - expected).norm() < 2e-3 * expected.norm()
    assert step.log["train/step_size"] == pytest.approx(float(expected.norm()), rel=1e-3)


def test_a_fixed_step_follows_its_schedule() -> None:
    model = make("npg-fixed", n_steps=8, step_size="lin_0.02", learning_rate=0.0)
    step = update(model)  # of 16 steps where 1 was asked for: all of the progress is made
    assert step.moved == set()
    given, constant = (update(make("npg-fixed", n_steps=8, step_size=rate)) for rate in (lambda _: 0.01, 0.01))
    assert all(th.equal(a, b) for a, b in zip(given.new.parameters(), constant.new.parameters(), strict=True))


# --- entropy, chunks, subsamples ---


def zero_advantages(model: Any) -> None:
    model.rollout_buffer.advantages[:] = 0.0


@pytest.mark.parametrize("method", ["trpo", "npg"])
def test_entropy_alone_makes_a_step(method: str) -> None:
    """With no advantage the step goes where the policy is more random, and the line search counts that as gain."""
    model = make(method, "box", ent_coef=0.1, target_kl=0.02)
    entropy = float(model.policy.log_std.detach().sum())
    step = update(model, AtRolloutEnd(zero_advantages))
    assert step.log["train/step_outcome"] == "accepted"
    wider = float(step.new.log_std.detach().sum()) - entropy
    assert wider > 0.05
    assert step.log["train/surrogate_realized"] == pytest.approx(0.1 * wider, rel=1e-3)
    assert step.log["train/surrogate_predicted"] == pytest.approx(0.1 * wider, rel=1e-3)


@pytest.mark.parametrize("actions", ["discrete", "box", "multi_binary"])
@pytest.mark.parametrize("subsample", [1, 3])
def test_chunks_change_nothing(actions: str, subsample: int) -> None:
    kwargs: dict[str, Any] = {"ent_coef": 0.01, "fisher_subsample": subsample, "cg_max_steps": 8}
    whole, chunked = (update(make("trpo", actions, fisher_chunk_size=n, **kwargs)) for n in (16384, 7))
    for name in ("joint_kl", "grad_norm", "surrogate_realized", "entropy", "largest_ratio"):
        assert chunked.log[f"train/{name}"] == pytest.approx(whole.log[f"train/{name}"], rel=1e-3)
    for a, b in zip(whole.new.parameters(), chunked.new.parameters(), strict=True):
        assert th.allclose(a, b, atol=1e-4)


def test_a_subsample_thins_the_fisher_products_alone() -> None:
    whole, thinned = (update(make("trpo", "box", fisher_subsample=k)) for k in (1, 4))
    for name in ("grad_norm", "entropy"):
        assert thinned.log[f"train/{name}"] == whole.log[f"train/{name}"]
    kl = own_joint_kl(thinned.old, thinned.new, thinned.batch.flat_observations)  # on all states
    assert thinned.log["train/joint_kl"] == pytest.approx(kl, rel=1e-3)
    assert abs(kl / whole.log["train/joint_kl"] - 1) > 0.01
    with pytest.warns(UserWarning, match="sub_sampling_factor=4 thins the Fisher products alone"):
        model = make("trpo", "box", sub_sampling_factor=4)
    pairs = zip(update(model).new.parameters(), thinned.new.parameters(), strict=True)
    assert all(th.equal(a, b) for a, b in pairs)


# --- where there is no step to take, or hardly one ---

REASONS = {"accepted", "kl", "no_improvement", "nonfinite", "curvature", "zero_gradient"}


def require_explained(step: Update) -> None:
    """Finite, and the actor has moved if and only if that is what the log says."""
    outcome = step.log["train/step_outcome"]
    assert step.is_finite
    assert outcome in REASONS
    assert bool({name for name in step.moved if "value" not in name}) == (outcome == "accepted")
    assert step.log["train/joint_kl"] > (-1e-7 if outcome == "accepted" else -1e-30)  # rounding


def scaled(scale: float, env: str) -> Any:
    return make_vec_env(lambda: gym.wrappers.TransformReward(gym.make(env), lambda r: float(r) * scale), 2, seed=0)


@all_methods
@pytest.mark.parametrize("scale", [1e-9, 0.0, 1e9])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.filterwarnings("ignore:The policy has not moved")  # by a rate that has no scale of its own
def test_rewards_of_any_scale(method: str, scale: float, env: str, normalize_advantage: bool) -> None:
    cls, chosen = METHODS[method]
    kwargs = {**chosen, "n_steps": 64, "normalize_advantage": normalize_advantage}
    model = cls("MlpPolicy", scaled(scale, env), seed=0, device="cpu", **kwargs)
    for _ in range(3):
        require_explained(update(model))


@all_methods
@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 2}, {"n_steps": 1}], ids=str)
def test_one_step_episodes(method: str, kwargs: dict[str, Any]) -> None:
    envs = [ScriptedEnv((1,), first_reward=r) for r in (0.0, 5.0)]
    cls, chosen = METHODS[method]
    model = cls(
        "MlpPolicy", vec(*envs), seed=0, device="cpu", **{"n_steps": 32, "batch_size": None, **chosen, **kwargs}
    )
    for _ in range(5):
        require_explained(update(model))


@all_methods
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_two_steps_of_one_env(method: str, env: str) -> None:
    cls, chosen = METHODS[method]
    model = cls("MlpPolicy", env, n_steps=2, batch_size=None, seed=0, device="cpu", **chosen)
    for _ in range(8):
        require_explained(update(model))


def test_a_single_step_has_no_normalized_advantage() -> None:
    with pytest.raises(ValueError, match="normalize_advantage=True leaves nothing of a single step's advantage"):
        TRPO("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=None)
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=None, normalize_advantage=False, seed=0)
    for _ in range(5):
        require_explained(update(model))


def equal_advantages(model: Any) -> None:
    model.rollout_buffer.advantages[:] = 3.0


class MostlyNothing(ScriptedEnv):
    """Shows something in one state of each episode, and nothing in the others."""

    def _obs(self) -> Any:
        return super()._obs() if self.t == 1 else np.zeros(3, np.float32)


def without_bias() -> Any:
    """A policy whose Fisher matrix at most states is zero, since it is the same whatever theta.

    With this seed the one sample in 64 is never one of the two others, where F has rank 1 and rounding decides.
    """
    env = vec(MostlyNothing((32,)), MostlyNothing((32,)))
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": []}, "cg_damping": 0.0, "fisher_subsample": 64}
    model = NPG("MlpPolicy", env, n_steps=32, batch_size=None, seed=1, device="cpu", **kwargs)
    model.policy.action_net.bias.requires_grad_(False)
    return model


#: reason -> model, and what a callback does before each update
FAILURES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "kl": (lambda: make("trpo", target_kl=0.5, cg_damping=1e-4, line_search_max_iter=1), id),
    "no_improvement": (lambda: make("trpo", target_kl=10.0, cg_damping=1e-4, line_search_accept_ratio=1.0), id),
    "nonfinite": (lambda: make("npg-fixed", step_size=1e30), id),
    "curvature": (without_bias, id),
    "zero_gradient": (lambda: make("npg"), equal_advantages),
}


@pytest.mark.parametrize("reason", list(FAILURES))
def test_a_failure_has_a_name_and_leaves_the_actor_as_it_was(reason: str) -> None:
    factory, act = FAILURES[reason]
    step = update(factory(), AtRolloutEnd(act))
    assert step.log["train/step_outcome"] == reason
    assert step.moved == {name for name, _ in step.new.named_parameters() if "value" in name}  # the critic learns
    for name in ("joint_kl", "step_size", "surrogate_predicted", "surrogate_realized"):
        assert step.log[f"train/{name}"] == 0
    assert step.log["train/largest_ratio"] == 1


@pytest.mark.parametrize("reason", list(FAILURES))
def test_three_failures_in_a_row_are_warned_of_once(reason: str) -> None:
    factory, act = FAILURES[reason]
    model, callback = factory(), AtRolloutEnd(act)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert update(model, callback).log["train/step_outcome"] == reason
    with pytest.warns(UserWarning, match=f"has not moved for 3 updates in a row.*'{reason}'"):
        update(model, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert update(model, callback).log["train/step_outcome"] == reason


def test_advantages_that_differ_by_rounding_are_equal() -> None:
    """Neither scaled to full size nor taken as they are."""

    def one_differs(model: Any) -> None:
        buffer = model.rollout_buffer
        equal_advantages(model)
        buffer.advantages[0, 0] += 2 * np.abs(buffer.returns).max() * np.finfo(np.float32).eps

    assert update(make("npg"), AtRolloutEnd(one_differs)).log["train/step_outcome"] == "zero_gradient"


def test_failures_with_a_success_between_them_are_not_warned_of() -> None:
    model = make()
    fail = AtRolloutEnd(equal_advantages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for callback in (fail, fail, None, fail, fail):
            update(model, callback)
    with pytest.warns(UserWarning, match="'zero_gradient'"):
        update(model, fail)


@all_methods
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_in_the_advantages_is_named(method: str, bad: float) -> None:
    model = make(method)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError, match=r"advantage.*env.*0.*step.*0"):
        update(model, plant(bad))
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())
    assert model.logger.name_to_value["train/step_outcome"] == "nonfinite"
    assert update(model).log["train/step_outcome"] == "accepted"


@all_methods
@pytest.mark.filterwarnings("ignore:The policy has not moved")
def test_a_nan_in_the_advantages_is_skipped(method: str) -> None:
    model, callback = make(method, on_nonfinite="skip"), plant(np.nan)
    for n in (1, 2, 3):
        with pytest.warns(UserWarning, match="Update skipped") as caught:
            step = update(model, callback)
        assert step.moved == set()
        assert step.log["train/step_outcome"] == "nonfinite"
        assert step.log["train/n_skipped"] == n
        named = [w for w in caught if "3 updates in a row" in str(w.message)]
        assert len(named) == (n == 3)
    assert update(model).log["train/step_outcome"] == "accepted"


def test_what_is_logged_is_complete() -> None:
    """What sb3_contrib's TRPO logs under other names, and how the step came about."""
    logs = history(make("trpo", "box"), 4 * 64)
    names = {
        *("joint_kl", "step_outcome", "step_size", "line_search_steps", "surrogate_predicted", "surrogate_realized"),
        *("cg_iterations", "cg_residual", "grad_norm", "entropy", "std", "value_loss", "explained_variance"),
        *("largest_ratio", "effective_sample_size", "clipped_action_fraction", "learning_rate", "n_updates"),
    }
    assert len(logs) == 4
    assert all({f"train/{name}" for name in names} <= log.keys() for log in logs)
    assert all(0 < log["train/effective_sample_size"] <= 1 < log["train/largest_ratio"] for log in logs)


class Normalized(BaseFeaturesExtractor):
    """Features with running statistics, which actor and critic share."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(observation_space.shape[0], 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.layers(observations)
        return result


@pytest.mark.parametrize("critic_fit", ["before", "after"])
def test_the_critic_does_not_move_the_policy_by_shared_statistics(critic_fit: str) -> None:
    kwargs = {"features_extractor_class": Normalized}
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=128, critic_fit=critic_fit, policy_kwargs=kwargs, seed=0)
    for _ in range(3):
        step = update(model)
        assert step.log["train/step_outcome"] == "accepted"
        for policy in (step.old, step.new):
            policy.set_training_mode(False)
        with th.no_grad():
            realized = own_joint_kl(step.old, step.new, step.batch.flat_observations)
        assert realized == pytest.approx(step.log["train/joint_kl"], rel=1e-3)


def test_an_update_that_is_undone_is_no_success() -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", learning_rate=1e30, n_steps=32, batch_size=32, on_nonfinite="skip", seed=0)
    with pytest.warns(UserWarning, match="Update skipped"):
        step = update(model)
    assert step.log["train/step_outcome"] == "nonfinite"
    assert not step.moved


@pytest.mark.parametrize("bad", [-0.01, float("nan")])
def test_a_schedule_that_goes_wrong_is_named(bad: float) -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, target_kl=lambda p: 0.01 if p == 1 else bad)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(ValueError, match="target_kl must be"):
        model.learn(32)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


def test_a_rejected_step_is_told() -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, line_search_accept_ratio=1.0, seed=0)
    model.line_search_max_iter, model.target_kl = 1, 50.0
    log = update(model).log
    assert log["train/step_outcome"] in ("kl", "no_improvement")
    assert log["train/rejected_kl"] > 0
    assert log["train/joint_kl"] == 0


def test_two_names_of_one_argument_are_not_given_both() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        TRPO("MlpPolicy", "CartPole-v1", sub_sampling_factor=2, fisher_subsample=2)
