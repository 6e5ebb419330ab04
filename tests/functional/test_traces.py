"""V-trace and Retrace against the sums that define them, and their identities where the policies are equal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch as th

from sb3_pg import functional as F  # noqa: N812
from tests.functional.rollouts import Rollout, random_rollout

if TYPE_CHECKING:
    from collections.abc import Callable

GAMMA, LAMBDA = 0.9, 0.7

# Below and above the length up to which a scan is one triangular system.
rollouts = pytest.mark.parametrize(
    "rollout", [random_rollout(n, padded) for n in (9, 20) for padded in (True, False)], ids=["9p", "9", "20p", "20"]
)


def log_ratio_of(rollout: Rollout) -> th.Tensor:
    return F.log_importance_ratio(rollout.log_prob, rollout.behavior_log_prob, rollout.mask)


def equal_policies(rollout: Rollout) -> Rollout:
    return rollout._replace(behavior_log_prob=rollout.log_prob)


def vtrace(
    r: Rollout, lam: float = 1, max_rho: float = 1, max_c: float = 1, log_ratio: th.Tensor | None = None
) -> th.Tensor:
    logs = log_ratio_of(r) if log_ratio is None else log_ratio
    return F.vtrace(r.rewards, r.values, logs, r.ends, GAMMA, lam, max_rho, max_c, r.bootstrap, r.mask)


def retrace(r: Rollout, lam: float = 1, max_c: float = 1, log_ratio: th.Tensor | None = None) -> th.Tensor:
    logs = log_ratio_of(r) if log_ratio is None else log_ratio
    q = (r.q_values, r.expected_q_values)
    return F.retrace(r.rewards, *q, logs, r.ends, GAMMA, lam, max_c, r.bootstrap, r.mask)


def next_values(rollout: Rollout, values: th.Tensor, steps: list[tuple[int, int]]) -> list[float]:
    """What follows each step of an episode: the next state's value, and b_t behind the last."""
    return [*(values[step].item() for step in steps[1:]), rollout.bootstrap[steps[-1]].item()]


def slow_vtrace(rollout: Rollout, lam: float, max_rho: float, max_c: float) -> th.Tensor:
    """Equation 1: V(s_t) + sum_k gamma^(k-t) c_t ... c_(k-1) delta_k, with lambda in each c."""
    found = {}
    for steps in rollout.episodes():
        ratios = [rollout.ratio(step) for step in steps]
        c = [lam * min(max_c, ratio) for ratio in ratios]
        delta = [
            min(max_rho, ratio) * (rollout.rewards[step].item() + GAMMA * following - rollout.values[step].item())
            for step, ratio, following in zip(steps, ratios, next_values(rollout, rollout.values, steps), strict=True)
        ]
        for t, step in enumerate(steps):
            trace = [GAMMA ** (k - t) * math.prod(c[t:k]) * delta[k] for k in range(t, len(steps))]
            found[step] = rollout.values[step].item() + math.fsum(trace)
    return rollout.fill(found)


def slow_retrace(rollout: Rollout, lam: float, max_c: float) -> th.Tensor:
    """Equation 3: Q(s_t, a_t) + sum_k gamma^(k-t) c_(t+1) ... c_k delta_k."""
    found = {}
    for steps in rollout.episodes():
        c = [lam * min(max_c, rollout.ratio(step)) for step in steps]
        delta = [
            rollout.rewards[step].item() + GAMMA * following - rollout.q_values[step].item()
            for step, following in zip(steps, next_values(rollout, rollout.expected_q_values, steps), strict=True)
        ]
        for t, step in enumerate(steps):
            trace = [GAMMA ** (k - t) * math.prod(c[t + 1 : k + 1]) * delta[k] for k in range(t, len(steps))]
            found[step] = rollout.q_values[step].item() + math.fsum(trace)
    return rollout.fill(found)


def slow_q_lambda(rollout: Rollout, lam: float) -> th.Tensor:
    """Harutyunyan et al. (2016): the lambda-mixture of n-step returns, each reward behind the first one corrected.

    sum_n (1 - lambda) lambda^(n-1) G^(n), and what is left of the weight on the longest. With E_t = E_pi Q(s_t, .) and
    Q_t = Q(s_t, a_t), G^(n) = r_t + sum_{0 < k < n} gamma^k (r_{t+k} + E_{t+k} - Q_{t+k}) + gamma^n E_{t+n}.
    """
    found = {}
    for steps in rollout.episodes():
        following = next_values(rollout, rollout.expected_q_values, steps)
        for t, step in enumerate(steps):
            earned, mixture, left = rollout.rewards[step].item(), 0.0, 1.0
            for n in range(1, len(steps) - t + 1):
                share = left if n == len(steps) - t else (1 - lam) * left
                mixture += share * (earned + GAMMA**n * following[t + n - 1])
                left *= lam
                if n < len(steps) - t:
                    later = steps[t + n]
                    corrected = rollout.rewards[later] + rollout.expected_q_values[later] - rollout.q_values[later]
                    earned += GAMMA**n * corrected.item()
            found[step] = mixture
    return rollout.fill(found)


# --- definitions ---


@rollouts
@pytest.mark.parametrize("bounds", [(1, 1, 1), (LAMBDA, 1, 1), (1, 2, 0.5), (0, 1, 1), (1, math.inf, math.inf)])
def test_vtrace_is_its_definition(rollout: Rollout, bounds: tuple[float, float, float]) -> None:
    assert th.allclose(vtrace(rollout, *bounds), slow_vtrace(rollout, *bounds))


@rollouts
@pytest.mark.parametrize("bounds", [(1, 1), (LAMBDA, 1), (1, 0.5), (0, 1), (1, math.inf)])
def test_retrace_is_its_definition(rollout: Rollout, bounds: tuple[float, float]) -> None:
    assert th.allclose(retrace(rollout, *bounds), slow_retrace(rollout, *bounds))


def test_bounds_are_one_and_all_is_valid_unless_told() -> None:
    r = random_rollout(9, padded=False)
    q, logs = (r.q_values, r.expected_q_values), log_ratio_of(r)
    assert th.equal(F.vtrace(r.rewards, r.values, logs, r.ends, GAMMA, bootstrap=r.bootstrap), vtrace(r))
    assert th.equal(F.retrace(r.rewards, *q, logs, r.ends, GAMMA, bootstrap=r.bootstrap), retrace(r))


def test_dtype_is_that_of_the_rewards() -> None:
    rollout = random_rollout(20)
    names = ("rewards", "bootstrap", "values", "q_values", "expected_q_values")
    single = rollout._replace(**{name: getattr(rollout, name).float() for name in names})
    for function in (vtrace, retrace):
        assert function(single).dtype == th.float32
        assert th.allclose(function(single).double(), function(rollout), atol=1e-5)


def test_traces_of_ratios_are_constants() -> None:
    r = random_rollout(9, padded=False)
    log_ratio = log_ratio_of(r).requires_grad_()
    assert not F.vtrace(r.rewards, r.values, log_ratio, r.ends, GAMMA).requires_grad
    assert not F.retrace(r.rewards, r.q_values, r.expected_q_values, log_ratio, r.ends, GAMMA).requires_grad


# --- equal policies ---


@rollouts
@pytest.mark.parametrize("bounds", [(1, 1), (1, 2), (math.inf, 1), (3, math.inf)])
def test_vtrace_of_equal_policies_is_the_lambda_return(rollout: Rollout, bounds: tuple[float, float]) -> None:
    equal = equal_policies(rollout)
    rest = (rollout.rewards, rollout.values, rollout.ends, GAMMA)
    for lam in (0.0, LAMBDA, 1.0):
        expected = F.lambda_return(*rest, lam, rollout.bootstrap, rollout.mask)
        assert th.allclose(vtrace(equal, lam, *bounds), expected)
    n_step = F.n_step_return(*rest, len(rollout.rewards), rollout.bootstrap, rollout.mask)
    assert th.allclose(vtrace(equal, 1.0, *bounds), n_step)


@rollouts
@pytest.mark.parametrize("lam", [0.0, LAMBDA, 1.0])
def test_retrace_of_equal_policies_is_q_lambda(rollout: Rollout, lam: float) -> None:
    for max_c in (1, math.inf):
        assert th.allclose(retrace(equal_policies(rollout), lam, max_c), slow_q_lambda(rollout, lam))


# --- numbers that must not travel ---


def test_a_ratio_of_zero_cuts_the_trace() -> None:
    rollout = random_rollout(9, padded=False)
    log_prob = rollout.log_prob.clone()
    log_prob[4, 0] = -math.inf
    cut = rollout._replace(log_prob=log_prob, ends=th.zeros_like(rollout.ends))
    assert vtrace(cut)[4, 0] == cut.values[4, 0]
    q_target = cut.rewards[3, 0] + GAMMA * (cut.bootstrap[3, 0] + cut.expected_q_values[4, 0])
    assert retrace(cut)[3, 0] == pytest.approx(q_target.item())
    assert retrace(cut).isfinite().all()
    assert vtrace(cut).isfinite().all()


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_bounds_take_any_ratio(dtype: th.dtype) -> None:
    wild = th.tensor([[1e5], [-1e6], [800.0]], dtype=th.float64)
    x, ends = th.ones(3, 1, dtype=dtype), th.tensor([[False], [False], [True]])
    bounded = wild.clamp(max=math.log(2))
    assert th.allclose(
        F.vtrace(x, 2 * x, wild, ends, GAMMA, 1, 2, 2), F.vtrace(x, 2 * x, bounded, ends, GAMMA, 1, 2, 2)
    )
    assert th.allclose(F.retrace(x, x, x, wild, ends, GAMMA, 1, 2), F.retrace(x, x, x, bounded, ends, GAMMA, 1, 2))


both = pytest.mark.parametrize(("function", "bounds"), [(vtrace, (1, math.inf, math.inf)), (retrace, (1, math.inf))])


@both
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_of_the_ratios_is_ignored(
    function: Callable[..., th.Tensor], bounds: tuple[float, ...], garbage: float
) -> None:
    rollout = random_rollout(9)
    log_ratio = th.where(rollout.mask, log_ratio_of(rollout), garbage)
    assert th.equal(function(rollout, *bounds, log_ratio=log_ratio), function(rollout, *bounds))


@both
@pytest.mark.parametrize(("dtype", "log_ratio"), [(th.float64, 710.0), (th.float32, 89.0)])
def test_a_ratio_without_room_is_an_error(
    function: Callable[..., th.Tensor], bounds: tuple[float, ...], dtype: th.dtype, log_ratio: float
) -> None:
    rollout = random_rollout(9, padded=False)
    rollout = rollout._replace(rewards=rollout.rewards.to(dtype))
    with pytest.raises(OverflowError):
        function(rollout, *bounds, log_ratio=th.full_like(rollout.log_prob, log_ratio))


# --- bad input ---

ZEROS, WIDER = th.zeros(3, 1), th.zeros(3, 2)
NEVER = th.zeros(3, 1, dtype=th.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.vtrace(ZEROS, WIDER, ZEROS, NEVER, 0.9), r"values.*\(3, 2\)"),
        (lambda: F.vtrace(ZEROS, ZEROS, WIDER, NEVER, 0.9), r"log_ratio.*\(3, 2\)"),
        (lambda: F.vtrace(ZEROS, ZEROS, ZEROS, NEVER, 1.1), "gamma.*1.1"),
        (lambda: F.vtrace(ZEROS, ZEROS, ZEROS, NEVER, 0.9, -0.1), "gae_lambda.*-0.1"),
        (lambda: F.vtrace(ZEROS, ZEROS, ZEROS, NEVER, 0.9, max_rho=0.0), "max_rho must be positive, got 0"),
        (lambda: F.vtrace(ZEROS, ZEROS, ZEROS, NEVER, 0.9, max_c=-1.0), "max_c must be positive, got -1"),
        (lambda: F.retrace(ZEROS, WIDER, ZEROS, ZEROS, NEVER, 0.9), r"q_values.*\(3, 2\)"),
        (lambda: F.retrace(ZEROS, ZEROS, WIDER, ZEROS, NEVER, 0.9), r"expected_q_values.*\(3, 2\)"),
        (lambda: F.retrace(ZEROS, ZEROS, ZEROS, WIDER, NEVER, 0.9), r"log_ratio.*\(3, 2\)"),
        (lambda: F.retrace(ZEROS, ZEROS, ZEROS, ZEROS, NEVER, -0.1), "gamma.*-0.1"),
        (lambda: F.retrace(ZEROS, ZEROS, ZEROS, ZEROS, NEVER, 0.9, 1.1), "gae_lambda.*1.1"),
        (lambda: F.retrace(ZEROS, ZEROS, ZEROS, ZEROS, NEVER, 0.9, max_c=math.nan), "max_c must be positive, got nan"),
    ],
)
def test_bad_input_is_named(call: Callable[[], th.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
