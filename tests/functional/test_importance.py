"""Importance weights against plain loops over episodes; what they do where a probability is 0, and at any size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch as th

from sb3_pg import functional as F  # noqa: N812
from tests.functional.rollouts import Rollout, Step, random_rollout

if TYPE_CHECKING:
    from collections.abc import Callable

GAMMA = 0.9
RATIOS = ["per_step", "prefix", "per_decision", "trajectory"]

all_ratios = pytest.mark.parametrize("ratio", RATIOS)
# Below and above the length up to which a scan is one triangular system.
rollouts = pytest.mark.parametrize(
    "rollout", [random_rollout(n, padded) for n in (9, 20) for padded in (True, False)], ids=["9p", "9", "20p", "20"]
)


def logs_of(rollout: Rollout, ratio: str) -> th.Tensor:
    log_ratio = F.log_importance_ratio(rollout.log_prob, rollout.behavior_log_prob, rollout.mask)
    return F.log_weights(log_ratio, rollout.ends, ratio, rollout.mask)


def slow_weights(rollout: Rollout, ratio: str) -> dict[Step, float]:
    """W_t of the module's table, as numbers."""
    found = {}
    for steps in rollout.episodes():
        ratios = [rollout.ratio(step) for step in steps]
        for i, step in enumerate(steps):
            counted = {"per_step": ratios[i : i + 1], "trajectory": ratios}.get(ratio, ratios[: i + 1])
            found[step] = math.prod(counted)
    return found


def numbers(logs: th.Tensor, rollout: Rollout) -> th.Tensor:
    return th.where(rollout.mask, logs.exp(), 0.0)


def poisoned(logs: th.Tensor, rollout: Rollout) -> th.Tensor:
    return th.where(rollout.mask, logs, math.nan)


def column(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)[:, None]


# --- the weights ---


@rollouts
@all_ratios
def test_weights_are_the_products_of_the_table(rollout: Rollout, ratio: str) -> None:
    logs = logs_of(rollout, ratio)
    assert logs.dtype == th.float64
    assert (logs[~rollout.mask] == 0).all()
    assert th.allclose(numbers(logs, rollout), rollout.fill(slow_weights(rollout, ratio)), rtol=1e-12)


@all_ratios
def test_no_mask_means_that_all_is_valid(ratio: str) -> None:
    rollout = random_rollout(9, padded=False)
    log_ratio = F.log_importance_ratio(rollout.log_prob, rollout.behavior_log_prob)
    logs = F.log_weights(log_ratio, rollout.ends, ratio)
    assert th.equal(logs, logs_of(rollout, ratio))
    assert th.equal(F.self_normalize(logs, rollout.ends), F.self_normalize(logs, rollout.ends, rollout.mask))


@all_ratios
def test_padding_of_the_ratios_is_ignored(ratio: str) -> None:
    rollout = random_rollout(9)
    log_ratio = rollout.log_prob - rollout.behavior_log_prob
    assert log_ratio[~rollout.mask].isnan().any()
    assert th.equal(F.log_weights(log_ratio, rollout.ends, ratio, rollout.mask), logs_of(rollout, ratio))


@all_ratios
def test_equal_policies_weigh_exactly_one(ratio: str) -> None:
    rollout = random_rollout(20)
    equal = rollout._replace(behavior_log_prob=rollout.log_prob)
    logs = logs_of(equal, ratio)
    assert (F.importance_weights(logs) == 1).all()
    assert F.self_normalize(logs, equal.ends, equal.mask).abs().max() < 1e-15
    assert F.effective_sample_size(logs, equal.mask) == pytest.approx(equal.mask.sum().item())


def test_a_thousand_single_precision_ratios_stay_finite() -> None:
    """Their product is about 2^-75 to 2^75 by chance, and 2^1000 or 2^-1000 where all are equal."""
    generator = th.Generator().manual_seed(1)
    log_prob = th.rand((1000, 4), generator=generator) * math.log(4) - math.log(2) - 3
    log_prob[:, 2], log_prob[:, 3] = math.log(2) - 3, -math.log(2) - 3
    behavior = th.full((1000, 4), -3.0)
    ends = th.zeros(1000, 4, dtype=th.bool)
    ends[-1] = True
    log_ratio = F.log_importance_ratio(log_prob, behavior)
    logs = {ratio: F.log_weights(log_ratio, ends, ratio) for ratio in RATIOS}
    for env in range(4):
        exact = math.fsum(p - b for p, b in zip(log_prob[:, env].tolist(), behavior[:, env].tolist(), strict=True))
        assert logs["prefix"][-1, env].item() == pytest.approx(exact, abs=1e-10)
        assert logs["trajectory"][:, env].tolist() == pytest.approx([exact] * 1000, abs=1e-10)
    assert logs["trajectory"][0].abs().max() > 600
    for found in logs.values():
        assert found.isfinite().all()
        assert 1 <= F.effective_sample_size(found) <= 4000
        assert F.self_normalize(found, ends).isfinite().all()


def test_weights_are_constants() -> None:
    rollout = random_rollout(9, padded=False)
    log_prob, behavior = (x.requires_grad_() for x in (rollout.log_prob.clone(), rollout.behavior_log_prob.clone()))
    logs = F.log_weights(F.log_importance_ratio(log_prob, behavior), rollout.ends, "trajectory")
    logs = F.self_normalize(F.truncate(logs, 1.5), rollout.ends)
    assert not F.importance_weights(logs).requires_grad
    assert not F.per_decision_return(rollout.rewards, logs, rollout.ends, GAMMA).requires_grad
    assert not F.log_weights(log_prob - behavior, rollout.ends, "prefix").requires_grad


# --- probabilities of 0, and what is no probability ---


@all_ratios
def test_what_the_target_never_does_weighs_nothing(ratio: str) -> None:
    """Three episodes in one column; in the second of them the target policy cannot take the second of four actions."""
    log_prob = column(-1, -2, -1, -math.inf, -0.5, -2, -1, -1)
    behavior = column(-1.5, -1, -2, -0.1, -3, -1, -2, -0.5)
    ends = column(0, 1, 0, 0, 0, 1, 0, 1).bool()
    logs = F.log_weights(F.log_importance_ratio(log_prob, behavior), ends, ratio)
    weights = F.importance_weights(logs)
    zeros = {"per_step": [3], "trajectory": [2, 3, 4, 5]}.get(ratio, [3, 4, 5])
    assert (weights == 0).nonzero()[:, 0].tolist() == zeros
    rollout = random_rollout(8)._replace(
        log_prob=log_prob, behavior_log_prob=behavior, ends=ends, mask=th.ones_like(ends)
    )
    assert th.allclose(weights, rollout.fill(slow_weights(rollout, ratio)), rtol=1e-9)
    normalized = F.self_normalize(logs, ends)
    assert (F.importance_weights(normalized) == 0).nonzero()[:, 0].tolist() == zeros


def test_later_ratios_do_not_bring_a_weight_back() -> None:
    log_prob = th.zeros(1001, 1)
    log_prob[0] = -math.inf
    behavior = th.full((1001, 1), -2.0)  # exp(2000), without the first step
    ends = th.zeros(1001, 1, dtype=th.bool)
    weights = F.log_weights(F.log_importance_ratio(log_prob, behavior), ends, "prefix").exp()
    assert (weights == 0).all()


@pytest.mark.parametrize("n_envs", [1, 3])
@all_ratios
def test_weights_that_are_all_zero_stay_zero_when_normalized(n_envs: int, ratio: str) -> None:
    log_prob = th.full((3, n_envs), -1.0)
    log_prob[1] = -math.inf
    log_ratio = F.log_importance_ratio(log_prob, th.full((3, n_envs), -1.5))
    ends = th.tensor([[False], [False], [True]]).expand(3, n_envs)
    normalized = F.importance_weights(F.self_normalize(F.log_weights(log_ratio, ends, ratio), ends))
    assert (normalized[1] == 0).all()


@pytest.mark.parametrize(
    ("target", "behavior"),
    [(-1.0, -math.inf), (-1.0, math.nan), (-1.0, math.inf), (math.nan, -1.0), (math.inf, -1.0), (-math.inf, -math.inf)],
)
def test_an_undefined_ratio_is_named(target: float, behavior: float) -> None:
    log_prob, behavior_log_prob, mask = th.zeros(4, 3), th.zeros(4, 3), th.ones(4, 3, dtype=th.bool)
    log_prob[2:, 1], behavior_log_prob[2:, 1] = target, behavior
    with pytest.raises(ValueError, match=f"step 2 of column 1: log_prob={target}, behavior_log_prob={behavior}"):
        F.log_importance_ratio(log_prob, behavior_log_prob)
    mask[2:, 1] = False
    assert (F.log_importance_ratio(log_prob, behavior_log_prob, mask) == 0).all()


# --- truncation, normalization, size ---


@pytest.mark.parametrize("max_ratio", [0.5, 1.0, 3.0])
def test_truncation_is_a_minimum(max_ratio: float) -> None:
    rollout = random_rollout(20, padded=False)
    weights = slow_weights(rollout, "prefix")
    expected = rollout.fill({step: min(w, max_ratio) for step, w in weights.items()})
    assert th.allclose(F.truncate(logs_of(rollout, "prefix"), max_ratio).exp(), expected, rtol=1e-12)
    assert min(weights.values()) < max_ratio < max(weights.values())


def test_no_truncation() -> None:
    logs = column(-800, 0, 800)
    assert th.equal(F.truncate(logs, None), logs)
    assert th.equal(F.truncate(logs, math.inf), logs)


@rollouts
@pytest.mark.parametrize("max_ratio", [0.5, 1.0, 3.0, math.inf, None])
def test_the_truncated_fraction_counts_what_truncation_changes(rollout: Rollout, max_ratio: float | None) -> None:
    numbers = [w > (max_ratio or math.inf) for w in slow_weights(rollout, "prefix").values()]
    found = F.truncated_fraction(poisoned(logs_of(rollout, "prefix"), rollout), max_ratio, rollout.mask)
    assert found.item() == pytest.approx(sum(numbers) / len(numbers))
    assert (found > 0) == (max_ratio is not None and max_ratio < math.inf)


def test_a_weight_at_the_bound_is_not_truncated() -> None:
    assert F.truncated_fraction(column(0, 1e4, -1e4, 1e-9), 1.0).item() == 0.5


@rollouts
@all_ratios
def test_normalization_divides_by_the_mean_of_all_episodes(rollout: Rollout, ratio: str) -> None:
    weights, episodes, found = slow_weights(rollout, ratio), rollout.episodes(), {}
    for steps in episodes:
        for i, step in enumerate(steps):
            all_at_i = [weights[other[i] if i < len(other) else other[-1]] for other in episodes]
            found[step] = weights[step] / (math.fsum(all_at_i) / len(episodes))
    logs = F.self_normalize(poisoned(logs_of(rollout, ratio), rollout), rollout.ends, rollout.mask)
    assert (logs[~rollout.mask] == 0).all()
    assert th.allclose(numbers(logs, rollout), rollout.fill(found), rtol=1e-9)


def test_normalization_by_hand() -> None:
    """Episodes with the weights (1, 3), (3) and (2, 6, 8): means 2, then 12 / 3, then 14 / 3; however they lie."""
    expected = [1 / 2, 3 / 4, 3 / 2, 2 / 2, 6 / 4, 8 * 3 / 14]
    logs, ends = column(1, 3, 3, 2, 6, 8).log(), column(0, 1, 1, 0, 0, 1).bool()
    assert F.self_normalize(logs, ends).exp().flatten().tolist() == pytest.approx(expected)
    wide = [x.reshape(2, 3).T for x in (logs, ends)]
    assert F.self_normalize(*wide).exp().T.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shift", [-800.0, 800.0])
def test_normalization_knows_no_scale(shift: float) -> None:
    rollout = random_rollout(9)
    logs = logs_of(rollout, "prefix")
    first, second = (F.self_normalize(x, rollout.ends, rollout.mask) for x in (logs, logs + shift))
    assert th.allclose(first, second, atol=1e-10)


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ([0.0], 1),
        ([1e5], 1),
        ([-1e6], 1),
        ([1e5, -1e6], 1),
        ([1e5, 1e5, -1e6, 3.0], 2),
        ([-1e6] * 7, 7),
        ([1e5] * 7, 7),
        ([0.1] * 3, 3),
        ([1e300, -1e300], 1),
        ([800.0, 799.0, -800.0], (1 + math.exp(-1)) ** 2 / (1 + math.exp(-2))),
    ],
)
def test_effective_sample_size_of_wild_weights(logs: list[float], expected: float) -> None:
    size = F.effective_sample_size(th.tensor(logs, dtype=th.float64)).item()
    assert 1 <= size <= len(logs)
    assert size == pytest.approx(expected)


@rollouts
def test_effective_sample_size_is_kishs(rollout: Rollout) -> None:
    logs = poisoned(logs_of(rollout, "prefix"), rollout)
    weights = slow_weights(rollout, "prefix").values()
    expected = math.fsum(weights) ** 2 / math.fsum(w * w for w in weights)
    size = F.effective_sample_size(logs, rollout.mask)
    assert size.shape == ()
    assert size.item() == pytest.approx(expected)
    assert F.effective_sample_size(logs[rollout.mask] + 1e4).item() == pytest.approx(expected)


def test_a_weight_without_room_is_named() -> None:
    logs = th.zeros(5, 2, dtype=th.float64)
    logs[3, 1], logs[4, 0] = 710.0, 800.0
    with pytest.raises(OverflowError, match=r"exp\(710\) at step 3 of column 1.*max_ratio.*per_step"):
        F.importance_weights(logs)
    assert F.importance_weights(F.truncate(logs, 1e3)).max().item() == pytest.approx(1e3)


# --- per-decision return ---


@rollouts
@pytest.mark.parametrize("bootstrapped", [True, False])
def test_per_decision_return_is_its_formula(rollout: Rollout, bootstrapped: bool) -> None:
    """The left side: inside the sum, the ratios from t + 1 on."""
    found = {}
    for steps in rollout.episodes():
        ratios = [rollout.ratio(step) for step in steps]
        rewards = [(rollout.rewards[s] + GAMMA * rollout.bootstrap[s] * bootstrapped).item() for s in steps]
        for t, step in enumerate(steps):
            weighted = [GAMMA ** (k - t) * rewards[k] * math.prod(ratios[t + 1 : k + 1]) for k in range(t, len(steps))]
            found[step] = math.fsum(weighted)
    bootstrap = rollout.bootstrap if bootstrapped else None
    logs = poisoned(logs_of(rollout, "per_decision"), rollout)
    result = F.per_decision_return(rollout.rewards, logs, rollout.ends, GAMMA, bootstrap, rollout.mask)
    assert th.allclose(result, rollout.fill(found))


def test_per_decision_return_takes_any_weights() -> None:
    """G_2 = 3 + 8 / 2, G_1 = 2 + 4 / 2 G_2 / 2, G_0 = 1 + 2 / 0.5 G_1 / 2, and G = 10 + 2 / 2 of the next episode."""
    rewards, ends, weights = column(1, 2, 3, 10), column(0, 0, 1, 1).bool(), column(0.5, 2, 4, 3)
    result = F.per_decision_return(rewards, weights.log(), ends, 0.5, column(0, 0, 8, 2))
    assert result.flatten().tolist() == pytest.approx([19, 9, 7, 11])


def test_per_decision_return_stops_counting_where_the_target_would_not_go() -> None:
    log_prob, ends = column(-1, -2, -math.inf, -0.5, -1), column(0, 0, 0, 1, 1).bool()
    logs = F.log_weights(F.log_importance_ratio(log_prob, column(-1, -1, -2, -3, -1)), ends, "per_decision")
    result = F.per_decision_return(column(1, 2, 4, 8, 16), logs, ends, 1.0)
    assert result[[0, 1, 4], 0].tolist() == pytest.approx([1 + 2 * math.exp(-1), 2, 16])
    assert result.isfinite().all()


@rollouts
@pytest.mark.parametrize("gamma", [0.0, GAMMA, 1.0])
def test_per_decision_return_of_equal_policies_is_the_reward_to_go(rollout: Rollout, gamma: float) -> None:
    logs = logs_of(rollout._replace(behavior_log_prob=rollout.log_prob), "per_decision")
    rest = (rollout.ends, gamma, rollout.bootstrap, rollout.mask)
    assert th.equal(F.per_decision_return(rollout.rewards, logs, *rest), F.reward_to_go(rollout.rewards, *rest))


@pytest.mark.parametrize("last", [-800.0, -math.inf])
@pytest.mark.parametrize("n_padded", [0, 1])
def test_per_decision_return_of_a_piece_that_ends_with_little_weight(last: float, n_padded: int) -> None:
    shape = (2 + n_padded, 1)
    ends, mask = th.zeros(shape, dtype=th.bool), th.arange(shape[0])[:, None] < 2
    log_prob = th.tensor([0.0, last, 0.0])[: shape[0], None]
    logs = F.log_weights(F.log_importance_ratio(log_prob, th.zeros(shape), mask), ends, "per_decision", mask)
    assert F.per_decision_return(th.ones(shape), logs, ends, GAMMA, mask=mask)[:2].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(("dtype", "log_ratio"), [(th.float64, 400.0), (th.float32, 50.0), (th.float32, 100.0)])
def test_a_product_without_room_is_an_error(dtype: th.dtype, log_ratio: float) -> None:
    log_prob, ends = th.zeros(4, 1), th.tensor([[False], [False], [False], [True]])
    logs = F.log_weights(F.log_importance_ratio(log_prob, log_prob - log_ratio), ends, "per_decision")
    with pytest.raises(OverflowError):
        F.per_decision_return(th.ones(4, 1, dtype=dtype), logs, ends, GAMMA)


# --- bad input ---

ZEROS, WIDER = th.zeros(3, 1), th.zeros(3, 2)
NEVER = th.zeros(3, 1, dtype=th.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.log_importance_ratio(ZEROS, WIDER), r"behavior_log_prob.*\(3, 2\)"),
        (lambda: F.log_weights(WIDER, NEVER), r"ends.*\(3, 1\)"),
        (lambda: F.log_weights(ZEROS, NEVER, "causal"), r"per_decision.*'causal'"),
        (lambda: F.self_normalize(WIDER, NEVER), r"ends.*\(3, 1\)"),
        (lambda: F.effective_sample_size(ZEROS, WIDER.bool()), r"mask.*\(3, 2\)"),
        (lambda: F.per_decision_return(ZEROS, WIDER, NEVER, 0.9), r"log_weights.*\(3, 2\)"),
        (lambda: F.per_decision_return(ZEROS, ZEROS, NEVER, 1.1), "gamma.*1.1"),
        (lambda: F.truncate(ZEROS, 0.0), "max_ratio must be positive, got 0"),
        (lambda: F.truncate(ZEROS, -1.0), "max_ratio must be positive, got -1"),
        (lambda: F.truncate(ZEROS, math.nan), "max_ratio must be positive, got nan"),
        (lambda: F.truncated_fraction(ZEROS, 0.0), "max_ratio must be positive, got 0"),
        (lambda: F.truncated_fraction(ZEROS, 1.0, th.ones(3, 2, dtype=th.bool)), r"mask.*\(3, 2\)"),
    ],
)
def test_bad_input_is_named(call: Callable[[], th.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
