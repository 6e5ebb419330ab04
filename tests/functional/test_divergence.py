import itertools
import math

import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from sb3_pg.functional import joint_kl

N = 5


def logits(*shape: int) -> th.Tensor:
    return th.randn(*shape, dtype=th.float64)


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
    old, new = ([Categorical(logits=logits(N, n)) for n in (2, 3, 4)] for _ in range(2))
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
    (m, s), (m2, s2) = ((logits(N, 17), th.rand(N, 17, dtype=th.float64) + 0.5) for _ in range(2))
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
