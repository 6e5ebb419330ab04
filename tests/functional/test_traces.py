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


def advantages(
    r: Rollout, lam: float = 1, max_rho: float = 1, max_c: float = 1, log_ratio: th.Tensor | None = None
) -> th.Tensor:
    """Of the policy gradient, with V-trace targets of the same arguments."""
    logs, targets = log_ratio_of(r) if log_ratio is None else log_ratio, vtrace(r, lam, max_rho, max_c, log_ratio)
    return F.vtrace_advantages(r.rewards, r.values, targets, logs, r.ends, GAMMA, max_rho, r.bootstrap, r.mask)


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


def slow_advantages(rollout: Rollout, lam: float, max_rho: float, max_c: float) -> th.Tensor:
    """Section 4.2: rho_t (r_t + gamma v_(t+1) - V(s_t))."""
    targets, found = slow_vtrace(rollout, lam, max_rho, max_c), {}
    for steps in rollout.episodes():
        for step, following in zip(steps, next_values(rollout, targets, steps), strict=True):
            credit = rollout.rewards[step].item() + GAMMA * following - rollout.values[step].item()
            found[step] = min(max_rho, rollout.ratio(step)) * credit
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
    assert th.allclose(advantages(rollout, *bounds), slow_advantages(rollout, *bounds))


@rollouts
def test_the_ratio_may_be_left_out_of_the_advantage(rollout: Rollout) -> None:
    r, logs, targets = rollout, log_ratio_of(rollout), vtrace(rollout)
    plain = F.vtrace_advantages(r.rewards, r.values, targets, None, r.ends, GAMMA, 1.0, r.bootstrap, r.mask)
    assert th.allclose(logs.exp().clamp(max=1) * plain, advantages(r))


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
    for function in (vtrace, advantages, retrace):
        assert function(single).dtype == th.float32
        assert th.allclose(function(single).double(), function(rollout), atol=1e-5)


def test_nothing_has_a_gradient() -> None:
    """Neither the ratios nor the critic's values: a target that follows its own prediction is another algorithm."""
    r = random_rollout(9, padded=False)
    log_ratio, values = log_ratio_of(r).requires_grad_(), r.values.clone().requires_grad_()
    targets = F.vtrace(r.rewards, values, log_ratio, r.ends, GAMMA)
    assert not targets.requires_grad
    targets.requires_grad_()
    assert not F.vtrace_advantages(r.rewards, values, targets, log_ratio, r.ends, GAMMA).requires_grad
    assert not F.retrace(r.rewards, values, values, log_ratio, r.ends, GAMMA).requires_grad


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
@pytest.mark.parametrize("bounds", [(1, 1), (3, math.inf)])
def test_vtrace_advantages_of_equal_policies_are_made_of_gae(rollout: Rollout, bounds: tuple[float, float]) -> None:
    """GAE for lambda = 1, the two-step advantage for lambda = 0, and in between delta_t + gamma A_{t+1}."""
    equal = equal_policies(rollout)
    rest, last = (rollout.rewards, rollout.values, rollout.ends, GAMMA), (rollout.bootstrap, rollout.mask)
    assert th.allclose(advantages(equal, 1.0, *bounds), F.gae(*rest, 1.0, *last))
    two_step = F.n_step_return(*rest, 2, *last) - th.where(rollout.mask, rollout.values, 0.0)
    assert th.allclose(advantages(equal, 0.0, *bounds), two_step)
    found = F.td_residual(*rest, *last)
    found[:-1] += GAMMA * th.where(rollout.ends, 0.0, rollout.mask.double())[:-1] * F.gae(*rest, LAMBDA, *last)[1:]
    assert th.allclose(advantages(equal, LAMBDA, *bounds), found)


# --- other policies ---


@rollouts
@pytest.mark.parametrize("bound", [0.5, 1, math.inf])
def test_one_bound_makes_the_advantage_the_correction_of_the_value(rollout: Rollout, bound: float) -> None:
    """v_t - V(s_t) = rho_t (r_t + gamma v_{t+1} - V(s_t)) if rho = c, whatever the policies."""
    correction = vtrace(rollout, 1, bound, bound) - th.where(rollout.mask, rollout.values, 0.0)
    assert th.allclose(advantages(rollout, 1, bound, bound), correction)


@rollouts
def test_without_bounds_and_critic_it_is_the_importance_sampled_return(rollout: Rollout) -> None:
    """sum_k gamma^(k-t) rho_t ... rho_k r_k (Precup et al. 2000)."""
    r = rollout._replace(values=th.zeros_like(rollout.values))
    logs = F.log_weights(log_ratio_of(r), r.ends, "per_decision", r.mask)
    later = F.per_decision_return(r.rewards, logs, r.ends, GAMMA, r.bootstrap, r.mask)
    for function in (vtrace, advantages):
        assert th.allclose(function(r, 1, math.inf, math.inf), log_ratio_of(r).exp() * later)


@rollouts
def test_a_bound_near_zero_leaves_the_values_as_they_are(rollout: Rollout) -> None:
    assert th.allclose(vtrace(rollout, 1, 1e-12, 1e-12), th.where(rollout.mask, rollout.values, 0.0))
    assert th.allclose(advantages(rollout, 1, 1e-12, 1e-12), th.zeros_like(rollout.rewards, dtype=th.float64))


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
    assert advantages(cut)[4, 0] == 0


@pytest.mark.parametrize("n_steps", [9, 20])
@pytest.mark.parametrize("bounds", [(1, 1), (math.inf, math.inf)])
def test_nothing_crosses_the_end_of_an_episode(n_steps: int, bounds: tuple[float, float]) -> None:
    """In every column everything behind one end changes, and nothing before: truncated, terminated, or cut."""
    rollout = random_rollout(n_steps, padded=False)
    ends = rollout.ends.clone()
    ends[n_steps // 2] = True
    before = rollout._replace(ends=ends)
    behind = (th.arange(n_steps) > n_steps // 2)[:, None]
    names = ("rewards", "bootstrap", "values", "log_prob", "q_values", "expected_q_values")
    after = before._replace(
        **{name: th.where(behind, -2 * getattr(before, name) + 5, getattr(before, name)) for name in names}
    )
    after = after._replace(ends=ends ^ (behind & (th.arange(5) % 2 == 0)))
    first = slice(0, n_steps // 2 + 1)
    for function in (vtrace, advantages):
        assert th.equal(function(after, 1, *bounds)[first], function(before, 1, *bounds)[first])
        assert not th.isclose(function(after, 1, *bounds), function(before, 1, *bounds))[-1].any()


def test_a_truncated_episode_and_a_cut_one_are_worth_what_follows() -> None:
    """By hand: gamma = 1/2, ratios 1, V = 8. Truncated with 4 behind it, terminated, then cut with 6 behind it."""

    def numbers(*x: float) -> th.Tensor:
        return th.tensor(x, dtype=th.float64)[:, None]

    ends = th.tensor([[True], [True], [False], [False]])
    args = numbers(1, 2, 3, 4), numbers(8, 8, 8, 8)
    last = numbers(4, 0, 0, 6)
    targets = F.vtrace(*args, numbers(0, 0, 0, 0), ends, 0.5, bootstrap=last)
    assert targets.flatten().tolist() == [1 + 4 / 2, 2, 3 + 4 / 2 + 6 / 4, 4 + 6 / 2]
    found = F.vtrace_advantages(*args, targets, numbers(0, 0, 0, math.log(0.5)), ends, 0.5, bootstrap=last)
    assert found.flatten().tolist() == pytest.approx([3 - 8, 2 - 8, 6.5 - 8, (7 - 8) / 2])


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_bounds_take_any_ratio(dtype: th.dtype) -> None:
    wild = th.tensor([[1e4], [-1e4], [800.0]], dtype=th.float64)
    x, ends = th.ones(3, 1, dtype=dtype), th.tensor([[False], [False], [True]])
    bounded = wild.clamp(max=math.log(2))
    assert th.allclose(
        F.vtrace(x, 2 * x, wild, ends, GAMMA, 1, 2, 2), F.vtrace(x, 2 * x, bounded, ends, GAMMA, 1, 2, 2)
    )
    assert th.allclose(F.retrace(x, x, x, wild, ends, GAMMA, 1, 2), F.retrace(x, x, x, bounded, ends, GAMMA, 1, 2))
    found = F.vtrace_advantages(x, 2 * x, 3 * x, wild, ends, GAMMA, 2)
    assert found.flatten().tolist() == pytest.approx([2 * (1 + 3 * GAMMA - 2), 0, 2 * (1 - 2)])


every = pytest.mark.parametrize(
    ("function", "bounds"),
    [(vtrace, (1, math.inf, math.inf)), (advantages, (1, math.inf, 1)), (retrace, (1, math.inf))],
)


@every
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_of_the_ratios_is_ignored(
    function: Callable[..., th.Tensor], bounds: tuple[float, ...], garbage: float
) -> None:
    rollout = random_rollout(9)
    log_ratio = th.where(rollout.mask, log_ratio_of(rollout), garbage)
    assert th.equal(function(rollout, *bounds, log_ratio=log_ratio), function(rollout, *bounds))


@every
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
        (lambda: F.vtrace_advantages(ZEROS, WIDER, ZEROS, ZEROS, NEVER, 0.9), r"values.*\(3, 2\)"),
        (lambda: F.vtrace_advantages(ZEROS, ZEROS, WIDER, ZEROS, NEVER, 0.9), r"targets.*\(3, 2\)"),
        (lambda: F.vtrace_advantages(ZEROS, ZEROS, ZEROS, WIDER, NEVER, 0.9), r"log_ratio.*\(3, 2\)"),
        (lambda: F.vtrace_advantages(ZEROS, ZEROS, ZEROS, None, NEVER, -0.1), "gamma.*-0.1"),
        (lambda: F.vtrace_advantages(ZEROS, ZEROS, ZEROS, ZEROS, NEVER, 0.9, 0.0), "max_rho must be positive, got 0"),
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
