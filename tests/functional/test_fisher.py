"""Products against the explicit matrix E[score score^T], summed over actions with densities written out by hand."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gamma,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TanhTransform,
    TransformedDistribution,
)

from sb3_pg.functional import FisherVectorProduct
from sb3_pg.policies import action_distribution, torch_distributions

Distributions = Distribution | list[Distribution]
Density = Callable[[th.Tensor, th.Tensor], th.Tensor]  # outputs (m, k) of a net and m actions -> log-densities (m,)
Actions = Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]]  # outputs (k,) -> all actions, and their probabilities


class Family(NamedTuple):
    """A density, and what sums over it exactly, or to rounding."""

    log_density: Density
    actions: Actions


def explicit_fisher(outputs: th.Tensor, parameters: list[th.Tensor], family: Family) -> th.Tensor:
    """E[score score^T], averaged over the states that the outputs ``(n_states, k)`` belong to."""

    def gradient(output: th.Tensor) -> th.Tensor:
        parts: Any = th.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        return th.cat(
            [th.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(parts, parameters, strict=True)]
        )

    matrices = []
    for z in outputs:
        actions, probabilities = family.actions(z.detach())
        assert float(probabilities.sum()) == pytest.approx(1, abs=1e-9)
        at = z.detach().expand(len(actions), -1).clone().requires_grad_()
        (slopes,) = th.autograd.grad(family.log_density(at, actions).sum(), at)
        scores = slopes @ th.stack([gradient(output) for output in z]).to(slopes)
        matrices.append(scores.T @ (probabilities[:, None] * scores))
    return th.stack(matrices).mean(0)


def columns(product: FisherVectorProduct, parameters: list[th.Tensor]) -> th.Tensor:
    """The product's matrix."""
    units = th.eye(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    return th.stack([product(unit) for unit in units], 1)


def assert_close(found: th.Tensor, expected: th.Tensor, tolerance: float) -> None:
    """Column by column; those of parameters that nothing depends on are exactly zero."""
    assert expected.norm() > 1e-3
    error, size = (found.to(expected) - expected).norm(dim=0), expected.norm(dim=0)
    assert bool((error <= tolerance * size).all()), float((error / size).nan_to_num().max())


# Densities. A row of z is a net's output at a state.


def log_softmax_by_hand(z: th.Tensor) -> th.Tensor:
    return z - z.exp().sum(1, keepdim=True).log()


def categorical(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    return log_softmax_by_hand(z)[th.arange(len(a)), a[:, 0]]


def categoricals(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    """Of 2 and 3 actions."""
    return categorical(z[:, :2], a[:, :1]) + categorical(z[:, 2:], a[:, 1:])


def bernoulli(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    return (a * z - (1 + z.exp()).log()).sum(1)


def gaussian(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    """Of means and logs of standard deviations."""
    mean, log_std = z.chunk(2, 1)
    return (-((a - mean) ** 2) / (2 * (2 * log_std).exp()) - log_std - math.log(2 * math.pi) / 2).sum(1)


def squashed(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    return gaussian(z, a.atanh()) - (1 - a**2).log().sum(1)


def log_normal(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    return gaussian(z, a.log()) - a.log().sum(1)


def factor(z: th.Tensor) -> th.Tensor:
    """Of the covariance of two dimensions."""
    zero = th.zeros_like(z[:, 0])
    return th.stack((z[:, 2].exp(), zero, z[:, 4], z[:, 3].exp()), 1).view(-1, 2, 2)


def multivariate(z: th.Tensor, a: th.Tensor) -> th.Tensor:
    difference, covariance = a - z[:, :2], factor(z) @ factor(z).mT
    distance = (difference * th.linalg.solve(covariance, difference)).sum(1)
    log_density: th.Tensor = -(distance + th.linalg.det(covariance).log()) / 2 - math.log(2 * math.pi)
    return log_density


def gamma(z: th.Tensor, log_a: th.Tensor) -> th.Tensor:
    shape, rate, x = z[:, 0].exp(), z[:, 1].exp(), log_a[:, 0]
    return shape * rate.log() - shape.lgamma() + (shape - 1) * x - rate * x.exp()


def beta(z: th.Tensor, log_odds: th.Tensor) -> th.Tensor:
    a, b, t = z[:, 0].exp(), z[:, 1].exp(), log_odds[:, 0]
    log_x, log_1_x = nn.functional.logsigmoid(t), nn.functional.logsigmoid(-t)
    return (a + b).lgamma() - a.lgamma() - b.lgamma() + (a - 1) * log_x + (b - 1) * log_1_x


# Sums over actions.


def enumerated(density: Density, *sizes: int) -> Family:
    actions = th.tensor(list(itertools.product(*(range(size) for size in sizes))))
    return Family(density, lambda z: (actions, density(z.expand(len(actions), -1), actions).exp()))


def hermite(
    density: Density, place: Callable[[th.Tensor, th.Tensor], th.Tensor], squash: Callable[[th.Tensor], th.Tensor]
) -> Family:
    """Gauss-Hermite quadrature in two dimensions: three nodes each are exact for squares of a Gaussian's scores.

    :param place: outputs and standard normal numbers -> Gaussian numbers
    :param squash: Gaussian numbers -> actions
    """
    nodes, weights = (th.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(3))
    noise = th.cartesian_prod(nodes, nodes)
    probabilities = th.cartesian_prod(weights, weights).prod(1) / (2 * math.pi)

    def actions(z: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return squash(place(z.expand(len(noise), -1), noise)), probabilities

    return Family(density, actions)


def diagonal(z: th.Tensor, noise: th.Tensor) -> th.Tensor:
    mean, log_std = z.chunk(2, 1)
    return mean + log_std.exp() * noise


def trapezoidal(density: Density, log_slope: Callable[[th.Tensor], th.Tensor]) -> Family:
    """Over a line that a bounded or half-bounded action is stretched to: converges exponentially.

    :param log_slope: log of d action / d place on the line
    """
    grid, width = th.linspace(-100, 100, 8001, dtype=th.float64)[:, None], 200 / 8000

    def actions(z: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return grid, (density(z.expand(len(grid), -1), grid) + log_slope(grid[:, 0])).exp() * width

    return Family(density, actions)


CATEGORICAL = enumerated(categorical, 4)
CATEGORICALS = enumerated(categoricals, 2, 3)
BERNOULLI = enumerated(bernoulli, 2, 2)
GAUSSIAN = hermite(gaussian, diagonal, lambda u: u)
SQUASHED = hermite(squashed, diagonal, th.tanh)
LOG_NORMAL = hermite(log_normal, diagonal, th.exp)
MULTIVARIATE = hermite(multivariate, lambda z, noise: z[:, :2] + (factor(z) @ noise[..., None])[..., 0], lambda u: u)
GAMMA = trapezoidal(gamma, lambda t: t)
BETA = trapezoidal(beta, lambda t: nn.functional.logsigmoid(t) + nn.functional.logsigmoid(-t))


# Distributions of torch's.


class Kind(NamedTuple):
    make: Callable[[th.Tensor], Distributions]
    n_outputs: int
    family: Family


def normal(z: th.Tensor) -> Normal:
    mean, log_std = z.chunk(2, 1)
    return Normal(mean, log_std.exp())


def squashed_by_sb3(z: th.Tensor) -> Distributions:
    mean, log_std = z.chunk(2, 1)
    held = torch_distributions(SquashedDiagGaussianDistribution(2).proba_distribution(mean, log_std))
    assert held is not None
    return held


def probs(z: th.Tensor) -> th.Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


KINDS = {
    "categorical": Kind(lambda z: Categorical(logits=z), 4, CATEGORICAL),
    "categorical by probs": Kind(lambda z: Categorical(probs=probs(z)), 4, CATEGORICAL),
    "categoricals": Kind(lambda z: [Categorical(logits=z[:, :2]), Categorical(probs=probs(z[:, 2:]))], 5, CATEGORICALS),
    "bernoulli": Kind(lambda z: Bernoulli(logits=z), 2, BERNOULLI),
    "bernoulli by probs": Kind(lambda z: Bernoulli(probs=1 / (1 + (-z).exp())), 2, BERNOULLI),
    "normal": Kind(normal, 4, GAUSSIAN),
    "independent": Kind(lambda z: Independent(normal(z), 1), 4, GAUSSIAN),
    "squashed": Kind(
        lambda z: TransformedDistribution(Independent(normal(z), 1), [TanhTransform(cache_size=1)]), 4, SQUASHED
    ),
    "squashed by SB3": Kind(squashed_by_sb3, 4, SQUASHED),
    "log-normal": Kind(lambda z: LogNormal(z[:, :2], z[:, 2:].exp()), 4, LOG_NORMAL),
    "multivariate": Kind(lambda z: MultivariateNormal(z[:, :2], scale_tril=factor(z)), 5, MULTIVARIATE),
    "multivariate by covariance": Kind(
        lambda z: MultivariateNormal(z[:, :2], covariance_matrix=factor(z) @ factor(z).mT), 5, MULTIVARIATE
    ),
    "gamma": Kind(lambda z: Gamma(z[:, 0].exp(), z[:, 1].exp()), 2, GAMMA),
    "beta": Kind(lambda z: Beta(z[:, :1].exp(), z[:, 1:].exp()), 2, BETA),
}


def small_net(n_outputs: int) -> tuple[nn.Module, list[th.Tensor], th.Tensor]:
    """A net, its parameters with one in between that it does not use, and states."""
    th.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, n_outputs)).double()
    first, *others = net.parameters()
    return net, [first, nn.Parameter(th.randn(2, 2).double()), *others], th.randn(7, 3).double()


def in_chunks(make: Callable[[th.Tensor], Distributions], states: th.Tensor, size: int) -> list[Any]:
    return [lambda chunk=chunk: make(chunk) for chunk in states.split(size)]


@pytest.mark.parametrize("size", [7, 3], ids=["one chunk", "three chunks"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_the_explicit_matrix(kind: Kind, size: int) -> None:
    net, parameters, states = small_net(kind.n_outputs)
    product = FisherVectorProduct(in_chunks(lambda x: kind.make(net(x)), states, size), parameters)
    assert_close(columns(product, parameters), explicit_fisher(net(states), parameters, kind.family), 1e-8)


def test_actions_that_are_masked_out_have_no_part() -> None:
    net, parameters, states = small_net(4)
    mask = th.tensor([0.0, 0.0, 0.0, -math.inf]).double()
    product = FisherVectorProduct([lambda: Categorical(logits=net(states) + mask)], parameters)
    expected = explicit_fisher(net(states)[:, :3], parameters, enumerated(categorical, 3))
    assert_close(columns(product, parameters), expected, 1e-8)


@pytest.mark.parametrize("given", ["probs", "logits"])
@pytest.mark.parametrize("read", ["probs", "logits"])
@pytest.mark.parametrize("without_grad", [False, True])
def test_reading_what_a_distribution_computes_lazily_changes_nothing(given: str, read: str, without_grad: bool) -> None:
    net, parameters, states = small_net(4)

    def distribution() -> Categorical:
        z = net(states)
        made = Categorical(logits=z) if given == "logits" else Categorical(probs=probs(z))
        with th.set_grad_enabled(not without_grad):
            getattr(made, read)
            made.entropy()
        return made

    product = FisherVectorProduct([distribution], parameters)
    assert_close(columns(product, parameters), explicit_fisher(net(states), parameters, CATEGORICAL), 1e-8)


# Policies of SB3's.


def make_policy(action_space: spaces.Space[Any], **arguments: Any) -> ActorCriticPolicy:
    """With weights that are far from an initialization's symmetries."""
    th.manual_seed(0)
    box = spaces.Box(-1, 1, (3,), np.float32)
    policy = ActorCriticPolicy(box, action_space, lambda _: 1e-3, net_arch=[4], **arguments)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.7)
    return policy


def own_outputs(policy: ActorCriticPolicy, states: th.Tensor) -> tuple[th.Tensor, list[th.Tensor]]:
    """What the family's density is made from, in double, by hand; and the parameters that were used."""
    w = {name: p.detach().double().requires_grad_() for name, p in policy.named_parameters()}

    def linear(x: th.Tensor, name: str) -> th.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    latent = th.tanh(linear(states.double(), "mlp_extractor.policy_net.0"))
    z = linear(latent, "action_net")
    if "log_std" in w:
        log_std = w["log_std"].expand_as(z) if w["log_std"].dim() == 1 else _sde_log_std(policy, latent, w["log_std"])
        z = th.cat((z, log_std), 1)
    return z, list(w.values())


def _sde_log_std(policy: ActorCriticPolicy, latent: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """Raffin et al. (2021), eq. 6; SB3 adds 1e-6 to the variance, and stops the features' gradient by default."""
    assert isinstance(policy.action_dist, StateDependentNoiseDistribution)
    features = latent if policy.action_dist.learn_features else latent.detach()
    return (features**2 @ log_std.exp().expand(-1, 2) ** 2 + 1e-6).log() / 2


BOX = spaces.Box(-1, 1, (2,), np.float32)
SDE: dict[str, Any] = {"use_sde": True}
POLICIES: dict[str, tuple[spaces.Space[Any], dict[str, Any], Family]] = {
    "discrete": (spaces.Discrete(4), {}, CATEGORICAL),
    "multi-discrete": (spaces.MultiDiscrete([2, 3]), {}, CATEGORICALS),
    "multi-binary": (spaces.MultiBinary(2), {}, BERNOULLI),
    "box": (BOX, {}, GAUSSIAN),
    "sde": (BOX, SDE, GAUSSIAN),
    "sde, one std": (BOX, SDE | {"full_std": False}, GAUSSIAN),
    "sde, squashed": (BOX, SDE | {"squash_output": True}, SQUASHED),
}


def distributions_of(policy: ActorCriticPolicy) -> Callable[[th.Tensor], Distributions]:
    def make(states: th.Tensor) -> Distributions:
        held = torch_distributions(action_distribution(policy, states))
        assert held is not None
        return held

    return make


@pytest.mark.parametrize("size", [7, 3], ids=["one chunk", "three chunks"])
@pytest.mark.parametrize(("space", "arguments", "family"), POLICIES.values(), ids=POLICIES)
def test_equals_the_explicit_matrix_of_a_policy(
    space: spaces.Space[Any], arguments: dict[str, Any], family: Family, size: int
) -> None:
    """The critic's parameters, among all those of the policy, have zeros."""
    policy, states = make_policy(space, **arguments), th.rand(7, 3) * 2 - 1
    parameters: list[th.Tensor] = list(policy.parameters())
    found = columns(FisherVectorProduct(in_chunks(distributions_of(policy), states, size), parameters), parameters)
    assert_close(found, explicit_fisher(*own_outputs(policy, states), family), 1e-4)
    of_critic = th.cat([th.full((p.numel(),), "value" in name) for name, p in policy.named_parameters()])
    assert of_critic.any()
    assert not found[:, of_critic].any()
    assert not found[of_critic].any()


# Products.


@pytest.mark.parametrize("size", [7, 3, 1])
def test_damping_adds_to_the_diagonal(size: int) -> None:
    net, parameters, states = small_net(4)
    chunks = in_chunks(lambda x: normal(net(x)), states, size)
    plain, damped = (columns(FisherVectorProduct(chunks, parameters, c), parameters) for c in (0.0, 0.3))
    th.testing.assert_close(damped, plain + 0.3 * th.eye(len(plain), dtype=th.float64))


@pytest.mark.parametrize("size", [7, 3])
def test_products_leave_the_vector_and_the_gradients_alone(size: int) -> None:
    net, parameters, states = small_net(4)
    product = FisherVectorProduct(in_chunks(lambda x: normal(net(x)), states, size), parameters, 0.1)
    vector = th.randn(sum(p.numel() for p in parameters)).double()
    kept = vector.clone()
    with th.no_grad():
        first = product(vector)
    again = product(vector)
    assert th.equal(first, again)
    assert th.equal(vector, kept)
    assert not again.requires_grad
    assert all(p.grad is None for p in parameters)


def test_of_one_chunk_the_graph_is_kept_and_of_several_made_anew() -> None:
    net, parameters, states = small_net(4)
    n_forwards = 0

    def make(x: th.Tensor) -> Distributions:
        nonlocal n_forwards
        n_forwards += 1
        return normal(net(x))

    for size, expected in ((7, 1), (3, 9)):
        n_forwards = 0
        columns_of_three = FisherVectorProduct(in_chunks(make, states, size), parameters)
        for _ in range(3):
            columns_of_three(th.ones(sum(p.numel() for p in parameters)).double())
        assert n_forwards == expected


def test_what_it_cannot_be_had_for() -> None:
    _, parameters, states = small_net(4)
    with pytest.raises(ValueError, match="at least one chunk"):
        FisherVectorProduct([], parameters)
    z = parameters[0].sum().expand(len(states), 2)
    with pytest.raises(NotImplementedError):
        FisherVectorProduct([lambda: StudentT(2 + z.exp())], parameters)
    with pytest.raises(TypeError, match="MixtureSameFamily does not list its parameters"):
        FisherVectorProduct([lambda: MixtureSameFamily(Categorical(logits=z), Normal(z, 1.0))], parameters)


# Linux's own count of the peak, since that of getrusage starts at the parent's.
PEAK = """
import torch as th
from torch.distributions import Normal
from sb3_pg.functional import FisherVectorProduct

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

th.set_num_threads(1)
net = th.nn.Sequential(*(layer for n in (376, 256) for layer in (th.nn.Linear(n, 256), th.nn.Tanh())))
net.append(th.nn.Linear(256, 17))
log_std = th.nn.Parameter(th.zeros(17))
parameters = [*net.parameters(), log_std]
vector = th.ones(sum(p.numel() for p in parameters))
chunks = th.empty(200_000, 376).normal_().split(16_384)
before = peak()
FisherVectorProduct([lambda x=x: Normal(net(x), log_std.exp().expand(len(x), 17)) for x in chunks], parameters)(vector)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_one_chunk() -> None:
    """Humanoid's sizes: above data and net, chunks of the algorithms' default size take 0.4 GiB; a single one, 1.9."""
    run = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 0.8 * 2**30
