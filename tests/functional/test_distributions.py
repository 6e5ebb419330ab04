import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch as th
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
    TanhTransform,
    TransformedDistribution,
)

from sb3_pg.functional import distribution_parameters, joint_kl, with_parameters

N = 5


def real(*shape: int) -> th.Tensor:
    return th.randn(*shape, dtype=th.float64)


def positive(*shape: int) -> th.Tensor:
    return th.rand(*shape, dtype=th.float64) + 0.5


def triangular(n: int) -> th.Tensor:
    return real(n, 2, 2).tril(-1) + positive(n, 2).diag_embed()


class Kind(NamedTuple):
    make: Callable[..., Distribution | list[Distribution]]
    parameters: Callable[[int], tuple[th.Tensor, ...]]


def gaussian(n: int) -> tuple[th.Tensor, ...]:
    return real(n, 3), positive(n, 3)


KINDS = {
    "categorical": Kind(lambda z: Categorical(logits=z), lambda n: (real(n, 4).log_softmax(1),)),
    "categoricals": Kind(
        lambda *z: [Categorical(logits=part) for part in z],
        lambda n: (real(n, 2).log_softmax(1), real(n, 3).log_softmax(1)),
    ),
    "bernoulli": Kind(lambda z: Bernoulli(logits=z), lambda n: (real(n, 3),)),
    "normal": Kind(Normal, gaussian),
    "independent": Kind(lambda m, s: Independent(Normal(m, s), 1), gaussian),
    "squashed": Kind(
        lambda m, s: TransformedDistribution(Independent(Normal(m, s), 1), [TanhTransform(cache_size=1)]), gaussian
    ),
    "log-normal": Kind(LogNormal, gaussian),
    "multivariate": Kind(lambda m, c: MultivariateNormal(m, scale_tril=c), lambda n: (real(n, 2), triangular(n))),
    "beta": Kind(Beta, lambda n: (positive(n, 2), positive(n, 2))),
    "gamma": Kind(Gamma, lambda n: (positive(n, 2), positive(n, 2))),
    "mixed": Kind(
        lambda z, m, s: [Categorical(logits=z), Independent(Normal(m, s), 1)],
        lambda n: (real(n, 4).log_softmax(1), *gaussian(n)),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def listed(distribution: Distribution | Sequence[Distribution]) -> list[Distribution]:
    return [distribution] if isinstance(distribution, Distribution) else list(distribution)


def assert_same(a: Distribution | Sequence[Distribution], b: Distribution | Sequence[Distribution]) -> None:
    """Of one kind, with the same shapes and densities."""
    for first, second in zip(listed(a), listed(b), strict=True):
        assert type(first) is type(second)
        assert (first.batch_shape, first.event_shape) == (second.batch_shape, second.event_shape)
        values = first.sample()
        th.testing.assert_close(first.log_prob(values), second.log_prob(values))


@each_kind
def test_parameters_are_what_it_was_made_from(kind: Kind) -> None:
    th.manual_seed(0)
    given = kind.parameters(N)
    found = distribution_parameters(kind.make(*given))
    for mine, theirs in zip(found, given, strict=True):
        th.testing.assert_close(mine, theirs)


@each_kind
def test_round_trip(kind: Kind) -> None:
    th.manual_seed(0)
    distribution = kind.make(*kind.parameters(N))
    assert_same(with_parameters(distribution, distribution_parameters(distribution)), distribution)


@each_kind
def test_others_of_another_batch_size(kind: Kind) -> None:
    th.manual_seed(0)
    distribution, others = kind.make(*kind.parameters(N)), kind.parameters(N + 2)
    assert_same(with_parameters(distribution, others), kind.make(*others))


@each_kind
def test_the_graph_reaches_what_it_was_made_from_and_the_others(kind: Kind) -> None:
    th.manual_seed(0)
    given = [z.requires_grad_() for z in kind.parameters(N)]
    distribution = kind.make(*given)
    values = [part.sample() for part in listed(distribution)]
    parameters = distribution_parameters(distribution)
    remade = with_parameters(distribution, parameters)
    gradients = [
        th.autograd.grad([p.log_prob(a).sum() for p, a in zip(parts, values, strict=True)], given, retain_graph=True)
        for parts in (listed(distribution), remade)
    ]
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        th.testing.assert_close(found, expected)


@pytest.mark.parametrize("cls", [Categorical, Bernoulli])
def test_probs_are_taken_as_logits(cls: type[Distribution]) -> None:
    th.manual_seed(0)
    z = real(N, 3)
    probs = z.softmax(1) if cls is Categorical else z.sigmoid()
    distribution = cls(probs=probs)  # type: ignore[call-arg]
    (logits,) = distribution_parameters(distribution)
    th.testing.assert_close(logits, z.log_softmax(1) if cls is Categorical else z)
    assert_same(with_parameters(distribution, [logits]), distribution)


@pytest.mark.parametrize("given", ["covariance", "precision"])
def test_a_covariance_is_taken_by_its_factor(given: str) -> None:
    th.manual_seed(0)
    factor = triangular(N)
    covariance = factor @ factor.mT
    if given == "covariance":
        distribution = MultivariateNormal(real(N, 2), covariance_matrix=covariance)
    else:
        distribution = MultivariateNormal(real(N, 2), precision_matrix=covariance.inverse())
    loc, scale_tril = distribution_parameters(distribution)
    th.testing.assert_close(scale_tril, factor)
    assert_same(with_parameters(distribution, [loc, scale_tril]), distribution)


def test_a_distribution_that_masks_is_made_anew_as_it_is_now() -> None:
    class Masked(Categorical):
        """As sb3_contrib's: its constructor may be given a mask, which then is in the logits."""

        def __init__(
            self,
            probs: th.Tensor | None = None,
            logits: th.Tensor | None = None,
            validate_args: bool | None = None,
            masks: th.Tensor | None = None,
        ) -> None:
            assert logits is not None
            masked = logits if masks is None else logits.masked_fill(~masks, -1e8)
            super().__init__(probs, masked, validate_args)

    th.manual_seed(0)
    distribution = Masked(logits=real(N, 4), masks=th.tensor([True, False, True, True]))
    (remade,) = with_parameters(distribution, distribution_parameters(distribution))
    assert isinstance(remade, Masked)
    th.testing.assert_close(remade.probs, distribution.probs)
    assert remade.probs[:, 1].tolist() == [0] * N


class Silent(Distribution):
    """Without ``arg_constraints``."""

    def __init__(self, loc: th.Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)


class Inherited(Distribution):
    """Without a constructor of its own, either."""


@pytest.mark.parametrize(
    "distribution",
    [
        Silent(th.zeros(N)),
        Inherited(validate_args=False),
        Independent(Silent(th.zeros(N, 2)), 1, validate_args=False),
        [Normal(th.zeros(N), 1.0), Silent(th.zeros(N))],
        MixtureSameFamily(Categorical(th.ones(N, 2)), Normal(th.zeros(N, 2), 1.0)),
    ],
    ids=["own constructor", "inherited", "wrapped", "listed", "mixture"],
)
def test_a_class_that_does_not_say_what_it_is_made_from(distribution: Distribution | list[Distribution]) -> None:
    message = "does not list its parameters in arg_constraints"
    with pytest.raises(TypeError, match=message):
        distribution_parameters(distribution)
    with pytest.raises(TypeError, match=message):
        with_parameters(distribution, [th.zeros(N)] * 3)


# -------------------------------------------------------------------- divergence


def enumerated(old: list[Categorical], new: list[Categorical]) -> th.Tensor:
    """sum over joint actions of p log(p / q)."""
    total = th.zeros(N, dtype=th.float64)
    for actions in itertools.product(*(range(d.probs.shape[1]) for d in old)):
        p = th.stack([d.probs[:, a] for d, a in zip(old, actions, strict=True)]).prod(0)
        q = th.stack([d.probs[:, a] for d, a in zip(new, actions, strict=True)]).prod(0)
        total += p * (p / q).log()
    return total


def test_categorical_and_multi_categorical_by_enumeration() -> None:
    th.manual_seed(0)
    old, new = ([Categorical(logits=real(N, n)) for n in (2, 3, 4)] for _ in range(2))
    assert th.allclose(joint_kl(old, new), enumerated(old, new))
    assert th.allclose(joint_kl(old[1], new[1]), enumerated(old[1:2], new[1:2]))
    assert th.allclose(joint_kl(old, old), th.zeros(N, dtype=th.float64))


def test_bernoulli_by_enumeration() -> None:
    th.manual_seed(0)
    p, q = th.rand(N, 3, dtype=th.float64), th.rand(N, 3, dtype=th.float64)
    pairs = [[Categorical(th.stack((1 - x[:, i], x[:, i]), 1)) for i in range(3)] for x in (p, q)]
    assert th.allclose(joint_kl(Bernoulli(p), Bernoulli(q)), enumerated(*pairs))


def test_gaussian_is_summed_over_dimensions() -> None:
    """sum_d log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2, from the density."""
    th.manual_seed(0)
    (m, s), (m2, s2) = ((real(N, 17), th.rand(N, 17, dtype=th.float64) + 0.5) for _ in range(2))
    expected = ((s2 / s).log() + (s**2 + (m - m2) ** 2) / (2 * s2**2) - 0.5).sum(1)
    assert th.allclose(joint_kl(Normal(m, s), Normal(m2, s2)), expected)


def test_it_is_of_old_to_new() -> None:
    old, new = (Categorical(th.tensor([[p, 1 - p]])) for p in (0.5, 0.9))
    forward, backward = float(joint_kl(old, new)), float(joint_kl(new, old))
    assert forward == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert backward != pytest.approx(forward, rel=0.1)


def test_unknown_pairs_and_unequal_numbers_are_errors() -> None:
    class Own(Distribution):
        """Torch knows no divergence of this one."""

    categorical = Categorical(th.ones(2, 2))
    with pytest.raises(NotImplementedError):
        joint_kl(Own(validate_args=False), categorical)
    with pytest.raises(ValueError):  # noqa: PT011 (zip's own)
        joint_kl([categorical], [categorical, categorical])
