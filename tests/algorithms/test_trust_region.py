"""TRPO and NPG: the step, its divergence, whom it moves, and what happens where there is none to take."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from tests.algorithms.steps import AtRolloutEnd, history, own_joint_kl, update
from tests.algorithms.trust_region import DENSE, make, small

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_thread")


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
        policy = self.policy
        outputs = policy.action_net(policy.mlp_extractor.forward_actor(observations))
        gaussian = isinstance(policy.action_space, spaces.Box)
        return policy.action_dist.proba_distribution(*((outputs, policy.log_std) if gaussian else (outputs,)))

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
