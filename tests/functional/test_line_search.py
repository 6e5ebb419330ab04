"""On a parabola: from theta = 1, a step of length d gains d - d^2 and costs a divergence of d^2 / 2."""

import math
from collections.abc import Callable

import pytest
import torch as th

from sb3_pg.functional import LineSearch, line_search

INF, NAN = math.inf, math.nan
STEP = 4.0  # all lengths that halving gives are exact


def parabola(theta: th.Tensor, start: float = 1.0) -> Callable[[], th.Tensor]:
    def measure() -> th.Tensor:
        d = theta.squeeze() - start
        return th.stack((d**2 / 2, d - d**2))

    return measure


def search(max_kl: float, accept_ratio: float | None, max_iter: int = 10) -> tuple[float, LineSearch]:
    theta = th.ones(1)
    found = line_search([theta], [th.tensor([STEP])], parabola(theta), STEP, max_kl, accept_ratio, 0.5, max_iter)
    return float(theta), found


@pytest.mark.parametrize(
    ("max_kl", "accept_ratio", "length"),
    [
        (INF, None, 4.0),  # the whole step
        (8.0, None, 4.0),  # the divergence may be just the limit
        (7.9, None, 2.0),
        (2.0, None, 2.0),
        (INF, 0.0, 0.5),  # the gain is 0 at length 1, which is none
        (INF, 0.5, 0.5),  # d - d^2 = d / 2: may be just the share
        (INF, 0.51, 0.25),
        (INF, 0.9, 0.0625),
        (0.02, 0.0, 0.125),  # the divergence decides
        (0.02, 0.9, 0.0625),  # both have to hold
    ],
)
def test_takes_the_longest_that_keeps_both_conditions(max_kl: float, accept_ratio: float | None, length: float) -> None:
    theta, found = search(max_kl, accept_ratio)
    assert theta == 1 + length
    assert found == LineSearch(length / STEP, 1 + round(math.log2(STEP / length)), "accepted")


@pytest.mark.parametrize(
    ("max_kl", "accept_ratio", "max_iter", "reason"),
    [
        (1e-9, 0.0, 4, "kl"),
        (1e-9, None, 1, "kl"),
        (INF, 0.0, 3, "no_improvement"),
        (INF, 1.0, 10, "no_improvement"),
        (7.9, 0.0, 2, "no_improvement"),  # of the last one, not of the first, which is above the limit
        (1.9, 0.0, 1, "kl"),  # both conditions fail
    ],
)
def test_says_why_the_last_one_was_not_taken(
    max_kl: float, accept_ratio: float | None, max_iter: int, reason: str
) -> None:
    theta, found = search(max_kl, accept_ratio, max_iter)
    assert theta == 1
    assert found == LineSearch(0.0, max_iter, reason)


@pytest.mark.parametrize("numbers", [(NAN, 1.0), (0.0, NAN), (INF, 1.0), (0.0, INF), (-INF, 1.0)])
@pytest.mark.parametrize(("max_iter", "accept_ratio"), [(1, None), (3, 0.0)])
def test_what_is_not_finite_is_not_taken(numbers: tuple[float, float], max_iter: int, accept_ratio: None) -> None:
    theta = th.ones(1)
    found = line_search(
        [theta], [th.ones(1)], lambda: th.tensor(numbers), 1.0, accept_ratio=accept_ratio, max_iter=max_iter
    )
    assert float(theta) == 1
    assert found == LineSearch(0.0, max_iter, "nonfinite")


def test_goes_back_from_where_it_is_not_finite() -> None:
    theta = th.ones(1)
    measure = parabola(theta)
    found = line_search(
        [theta], [th.tensor([STEP])], lambda: measure() if theta < 1.3 else measure() * NAN, STEP, shrinking_factor=0.5
    )
    assert found == LineSearch(1 / 16, 5, "accepted")


def test_one_try_without_a_gain_takes_everything_finite() -> None:
    """NPG: the whole step, whatever it does."""
    theta = th.ones(1)
    found = line_search(
        [theta], [th.tensor([-3.0])], lambda: th.tensor([1e30, -1e30]), 1.0, accept_ratio=None, max_iter=1
    )
    assert float(theta) == -2
    assert found == LineSearch(1.0, 1, "accepted")


def several() -> tuple[list[th.Tensor], list[th.Tensor]]:
    """Parameters that no subtraction of the step would bring back, -0 among them."""
    th.manual_seed(0)
    parameters: list[th.Tensor] = [th.nn.Parameter(th.randn(3, 2) * 1e-3), th.nn.Parameter(th.tensor([-0.0, 1.0]))]
    return parameters, [1e4 * th.randn(3, 2), 1e4 * th.randn(2)]


def bits(tensors: list[th.Tensor]) -> list[list[int]]:
    return [tensor.detach().flatten().view(th.int32).tolist() for tensor in tensors]


@pytest.mark.parametrize("numbers", [(1.0, 1.0), (0.0, -1.0), (NAN, NAN)])
def test_no_step_leaves_the_parameters_to_the_bit(numbers: tuple[float, float]) -> None:
    parameters, step = several()
    before = bits(parameters)
    found = line_search(parameters, step, lambda: th.tensor(numbers), 1.0, max_kl=0.5)
    assert found.fraction == 0
    assert bits(parameters) == before


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_parameters_to_the_bit(error: type[BaseException], at: int) -> None:
    parameters, step = several()
    before, n_calls = bits(parameters), 0

    def measure() -> th.Tensor:
        nonlocal n_calls
        n_calls += 1
        assert bits(parameters) != before
        if n_calls == at:
            raise error
        return th.tensor([1.0, 1.0])

    with pytest.raises(error):
        line_search(parameters, step, measure, 1.0, max_kl=0.5)
    assert n_calls == at
    assert bits(parameters) == before


def test_every_try_is_measured_at_its_share_of_the_step() -> None:
    parameters, step = several()
    before = [parameter.detach().clone() for parameter in parameters]
    seen: list[list[th.Tensor]] = []

    def measure() -> th.Tensor:
        seen.append([parameter.detach().clone() for parameter in parameters])
        return th.tensor([1.0, 1.0])

    line_search(parameters, step, measure, 1.0, max_kl=0.5, shrinking_factor=0.8, max_iter=4)
    assert len(seen) == 4
    for k, at in enumerate(seen):
        for found, start, part in zip(at, before, step, strict=True):
            th.testing.assert_close(found, start + 0.8**k * part)


def test_what_is_taken_stays_a_leaf_with_gradient() -> None:
    parameters, step = several()
    expected = [parameter.detach() + part for parameter, part in zip(parameters, step, strict=True)]
    line_search(parameters, step, lambda: th.tensor([0.1, 1.0]), 1.0)
    for parameter, value in zip(parameters, expected, strict=True):
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert th.equal(parameter, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"shrinking_factor": beta}, "shrinking_factor must lie in") for beta in (0.0, 1.0, -0.5, NAN)),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    theta = th.ones(1)
    with pytest.raises(ValueError, match=message):
        line_search([theta], [th.ones(1)], parabola(theta), 1.0, **arguments)  # type: ignore[arg-type]
    assert float(theta) == 1
