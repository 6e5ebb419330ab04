"""Masked distributions against sums written out in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import make_proba_distribution
from torch.distributions import kl_divergence

from sb3_pg.functional import distribution_parameters, joint_kl, with_parameters
from sb3_pg.policies.masked_distributions import MaskedBernoulli, MaskedCategorical, mask_distribution

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(5, 4)) * 2
ALLOWED = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]], bool)
BITS = np.array([[[1, 1], [1, 0], [0, 1]], [[0, 1], [1, 1], [1, 1]]], bool)


def probabilities(z: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Softmax over the allowed choices, one by one."""
    p = np.zeros_like(z)
    for row, (numbers, mask) in enumerate(zip(z, allowed, strict=True)):
        total = sum(np.exp(x) for x, m in zip(numbers, mask, strict=True) if m)
        for i, (x, m) in enumerate(zip(numbers, mask, strict=True)):
            p[row, i] = np.exp(x) / total if m else 0.0
    return p


def entropies(p: np.ndarray) -> np.ndarray:
    return np.array([-sum(x * np.log(x) for x in row if x > 0) for row in p])


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.array(
        [sum(x * np.log(x / y) for x, y in zip(*rows, strict=True) if x > 0) for rows in zip(p, q, strict=True)]
    )


def tensors(*arrays: np.ndarray) -> list[th.Tensor]:
    return [th.from_numpy(array.copy()) for array in arrays]


def test_probabilities_entropy_and_divergence_are_those_of_the_allowed_choices() -> None:
    z, mask, other = tensors(Z, ALLOWED, Z[::-1] + 1)
    distribution, second = MaskedCategorical(z, mask), MaskedCategorical(other, mask)
    p, q = probabilities(Z, ALLOWED), probabilities(Z[::-1] + 1, ALLOWED)
    np.testing.assert_allclose(distribution.probs, p, atol=1e-12)
    assert (distribution.probs[~mask] == 0).all()
    np.testing.assert_allclose(distribution.entropy(), entropies(p), atol=1e-12)
    np.testing.assert_allclose(kl_divergence(distribution, second), divergences(p, q), atol=1e-12)
    best = p.argmax(1)
    assert distribution.mode.tolist() == best.tolist()
    np.testing.assert_allclose(distribution.log_prob(th.from_numpy(best)), np.log(p.max(1)), atol=1e-12)
    assert (distribution.log_prob(th.tensor([0, 1, 0, 0, 1]))[1:] == -th.inf).all()


def test_divergence_is_infinite_where_the_second_forbids_what_the_first_allows() -> None:
    p = MaskedCategorical(th.zeros(1, 3), th.tensor([[True, True, False]]))
    q = MaskedCategorical(th.zeros(1, 3), th.tensor([[True, False, True]]))
    assert kl_divergence(p, q).item() == th.inf


def test_a_mask_that_allows_all_changes_nothing() -> None:
    (z,) = tensors(Z)
    ours, theirs = MaskedCategorical(z, th.ones_like(z, dtype=th.bool)), th.distributions.Categorical(logits=z)
    th.testing.assert_close(ours.entropy(), theirs.entropy())
    th.testing.assert_close(ours.log_probs, theirs.logits)
    th.manual_seed(0)
    drawn = ours.sample()
    th.manual_seed(0)
    assert (drawn == theirs.sample()).all()


def test_bits_are_choices_between_0_and_logit() -> None:
    logits, mask = tensors(RNG.normal(size=(2, 3)), BITS)
    distribution = MaskedBernoulli(logits, mask)
    for row in range(2):
        for bit in range(3):
            p = probabilities(np.array([[0.0, logits[row, bit].item()]]), BITS[row, bit][None])
            assert distribution.probs[row, bit].item() == pytest.approx(p[0, 1], abs=1e-12)
            assert distribution.entropy()[row, bit].item() == pytest.approx(entropies(p)[0], abs=1e-12)
    drawn = distribution.sample((200,))
    assert drawn.shape == (200, 2, 3)
    assert (drawn[:, 0, 1] == 0).all()
    assert (drawn[:, 0, 2] == 1).all()
    assert set(drawn[:, 0, 0].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_first_and_second_derivatives_are_finite_and_right(scale: float) -> None:
    z, mask = tensors(Z * scale, ALLOWED)
    z.requires_grad_()
    distribution = MaskedCategorical(z, mask)
    chosen = distribution.probs.argmax(1)
    old = MaskedCategorical(z.detach(), mask)
    for number in (distribution.entropy(), distribution.log_prob(chosen), kl_divergence(old, distribution)):
        (gradient,) = th.autograd.grad(number.sum(), z, create_graph=True)
        (second,) = th.autograd.grad(gradient.square().sum() + gradient.sum(), z, retain_graph=True)
        assert gradient.isfinite().all()
        assert second.isfinite().all()
        assert (gradient[~mask] == 0).all()
    if scale == 1:
        assert th.autograd.gradgradcheck(lambda x: MaskedCategorical(x, mask).entropy(), (z,))
        other = MaskedCategorical(z.detach().flip(0), mask)
        assert th.autograd.gradgradcheck(lambda x: kl_divergence(other, MaskedCategorical(x, mask)), (z,))


def test_the_gradient_of_the_log_prob_is_the_score_of_the_masked_softmax() -> None:
    z, mask = tensors(Z, ALLOWED)
    z.requires_grad_()
    chosen = ALLOWED.argmax(1)
    MaskedCategorical(z, mask).log_prob(th.from_numpy(chosen)).sum().backward()
    score = np.eye(4)[chosen] - probabilities(Z, ALLOWED)
    assert z.grad is not None
    np.testing.assert_allclose(z.grad, score * ALLOWED, atol=1e-12)


def test_a_masked_choice_is_never_drawn() -> None:
    z = th.tensor([[50.0, 0.0, 40.0, 0.0]]).expand(10_000, 4)
    drawn = MaskedCategorical(z, th.tensor([[False, True, False, True]]).expand(10_000, 4)).sample()
    assert set(drawn.tolist()) == {1, 3}


CASES = {
    "discrete": (spaces.Discrete(4), ALLOWED),
    "multi_discrete": (
        spaces.MultiDiscrete([2, 3]),
        np.array([[1, 1, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 1, 1]], bool),
    ),
    "multi_binary": (spaces.MultiBinary(3), BITS.reshape(2, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_distributions_of_sb3_take_masks(name: str) -> None:
    space, allowed = CASES[name]
    n_outputs = {"discrete": 4, "multi_discrete": 5, "multi_binary": 3}[name]
    outputs = RNG.normal(size=(len(allowed), n_outputs))
    sizes = {"discrete": [4], "multi_discrete": [2, 3], "multi_binary": [2, 2, 2]}[name]
    z = outputs
    if name == "multi_binary":
        z = np.stack((np.zeros_like(outputs), outputs), -1).reshape(len(allowed), 6)
    cuts = np.cumsum(sizes)[:-1]
    parts = [probabilities(*pair) for pair in zip(np.split(z, cuts, 1), np.split(allowed, cuts, 1), strict=True)]

    distribution: Any = make_proba_distribution(space)
    distribution.proba_distribution(th.from_numpy(outputs))
    mask_distribution(distribution, th.from_numpy(allowed.astype(np.int8)))
    np.testing.assert_allclose(distribution.entropy(), sum(map(entropies, parts)), atol=1e-10)
    for actions in (distribution.sample(), distribution.mode()):
        choices = actions.numpy().reshape(len(allowed), -1).astype(int)
        rows = np.arange(len(allowed))
        expected = sum(np.log(p[rows, choices[:, d]]) for d, p in enumerate(parts))
        np.testing.assert_allclose(distribution.log_prob(actions), expected, atol=1e-10)

    # the functions of the natural gradient: other parameters, other batch sizes
    held = distribution.distribution
    parameters = distribution_parameters(held)
    half = [part[:1] for part in parameters]
    again = with_parameters(held, half)
    zero = joint_kl(again, with_parameters(held, half))
    assert zero.shape == (1,)
    np.testing.assert_allclose(zero, 0, atol=1e-12)
    moved = [part + 0.3 * th.arange(part.shape[-1]) if part.is_floating_point() else part for part in parameters]
    other: Any = make_proba_distribution(space)
    shift = np.concatenate([0.3 * np.arange(n) for n in ([4] if name == "discrete" else [2, 3])])
    shift = 0.3 * np.arange(3) if name == "multi_binary" else shift
    other.proba_distribution(th.from_numpy(outputs + shift))
    mask_distribution(other, th.from_numpy(allowed))
    q = z + (np.stack((0 * shift, shift), -1).reshape(-1) if name == "multi_binary" else shift)
    moved_parts = [probabilities(*pair) for pair in zip(np.split(q, cuts, 1), np.split(allowed, cuts, 1), strict=True)]
    expected_kl = sum(divergences(*pair) for pair in zip(parts, moved_parts, strict=True))
    np.testing.assert_allclose(joint_kl(held, with_parameters(held, moved)), expected_kl, atol=1e-10)
    np.testing.assert_allclose(joint_kl(held, other.distribution), expected_kl, atol=1e-10)


def test_a_box_has_no_masks() -> None:
    distribution = make_proba_distribution(spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="masks are for Discrete"):
        mask_distribution(distribution, th.ones(1, 2))
