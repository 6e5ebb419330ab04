"""The estimator VTrace: what it makes of random batches of pieces of episodes, and its metrics.

``tests/oracle/test_vtrace_oracle.py`` checks the gradient that a learner takes from it.
"""

import math
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import functional as F  # noqa: N812
from sb3_pg.learner import GradientStep, Learner, VTrace
from sb3_pg.rollout import RolloutBatch
from tests.functional.rollouts import Rollout, random_rollout

GAMMA = 0.9
SHAPES = [(9, True), (9, False), (20, True), (20, False)]

rollouts = pytest.mark.parametrize("rollout", [random_rollout(*shape) for shape in SHAPES], ids=str)


def make_policy() -> ActorCriticPolicy:
    th.manual_seed(0)
    return ActorCriticPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(3), lambda _: 1e-2, net_arch=[8])


def batch_of(rollout: Rollout, log_ratio: th.Tensor | None = None) -> RolloutBatch:
    """The pieces of the rollout, whose padding has every number that must not matter."""
    shape, padded = rollout.ends.shape, not bool(rollout.mask.all())
    generator = th.Generator().manual_seed(0)
    log_probs = rollout.behavior_log_prob if log_ratio is None else rollout.log_prob - log_ratio
    return RolloutBatch(
        observations=th.rand((*shape, 3), generator=generator),
        actions=th.randint(3, (*shape, 1), generator=generator),
        rewards=rollout.rewards,
        terminated=rollout.ends,
        truncated=th.zeros_like(rollout.ends),
        timesteps=th.arange(shape[0])[:, None].expand(shape),
        mask=rollout.mask if padded else None,
        values=rollout.values,
        bootstrap=rollout.bootstrap,
        log_probs=log_probs,
    )


def estimated(estimator: VTrace, rollout: Rollout, log_ratio: th.Tensor | None = None) -> RolloutBatch:
    batch = batch_of(rollout, log_ratio)
    estimator.weigh(batch, rollout.log_prob)
    batch.returns, batch.advantages = estimator.estimate(batch, make_policy())
    return batch


def ratios(rollout: Rollout) -> th.Tensor:
    """One number per valid step, by a plain loop."""
    return th.tensor([rollout.ratio(step) for episode in rollout.episodes() for step in episode], dtype=th.float64)


@rollouts
@pytest.mark.parametrize("bounds", [(1.0, 1.0, 1.0), (0.7, 1.5, 0.5), (1.0, math.inf, math.inf)])
def test_targets_advantages_and_weights(rollout: Rollout, bounds: tuple[float, float, float]) -> None:
    estimator, r = VTrace(GAMMA, *bounds), rollout
    batch = estimated(estimator, rollout)
    logs = F.log_importance_ratio(r.log_prob, r.behavior_log_prob, r.mask)
    targets = F.vtrace(r.rewards, r.values, logs, r.ends, GAMMA, *bounds, r.bootstrap, r.mask)
    weighted = F.vtrace_advantages(r.rewards, r.values, targets, logs, r.ends, GAMMA, bounds[1], r.bootstrap, r.mask)
    assert batch.returns is not None
    assert th.equal(batch.returns, targets)
    learner = Learner(make_policy(), estimator, GradientStep())
    assert th.allclose(learner.credit(batch), weighted)
    weights = estimator.weights(batch)
    assert weights is not None
    assert th.allclose(weights[r.mask].sort()[0], ratios(r).clamp(max=bounds[1]).sort()[0])


@rollouts
@pytest.mark.parametrize("trace_lambda", [1.0, 0.7])
def test_without_a_correction_whoever_acted_has_no_effect(rollout: Rollout, trace_lambda: float) -> None:
    """Also bounds have none. With lambda = 1, returns are those of A3C: all rewards, then the critic's value."""
    r, last = rollout, (rollout.bootstrap, rollout.mask)
    estimator = VTrace(GAMMA, trace_lambda, 0.3, 0.2, correction="none")
    batch = estimated(estimator, rollout)
    assert estimator.weights(batch) is None
    assert batch.returns is not None
    assert batch.advantages is not None
    assert th.allclose(batch.returns, F.lambda_return(r.rewards, r.values, r.ends, GAMMA, trace_lambda, *last))
    if trace_lambda == 1:
        assert th.allclose(batch.returns, F.n_step_return(r.rewards, r.values, r.ends, GAMMA, len(r.rewards), *last))
        assert th.allclose(batch.advantages, F.gae(r.rewards, r.values, r.ends, GAMMA, 1.0, *last))
    same = estimated(VTrace(GAMMA, trace_lambda), rollout._replace(behavior_log_prob=rollout.log_prob))
    assert same.returns is not None
    assert same.advantages is not None
    assert th.allclose(batch.returns, same.returns)
    assert th.allclose(batch.advantages, same.advantages)


@pytest.mark.parametrize("correction", ["vtrace", "none"])
def test_the_discount_of_the_state_is_a_weight(correction: Any) -> None:
    rollout = random_rollout(9)
    plain, discounted = (VTrace(GAMMA, correction=correction, state_discount=on) for on in (False, True))
    batch = estimated(plain, rollout)
    weights = plain.weights(batch)
    discount = (GAMMA ** th.arange(9).double())[:, None] * th.ones(1, 5)
    found = discounted.weights(batch)
    assert found is not None
    assert th.allclose(found[rollout.mask], (discount if weights is None else discount * weights)[rollout.mask])


def test_advantages_are_normalized_before_they_are_weighted() -> None:
    """Only so the mean that is subtracted has, in expectation, no effect on the gradient."""
    rollout, estimator = random_rollout(20), VTrace(GAMMA)
    batch = estimated(estimator, rollout)
    weights, advantages = estimator.weights(batch), batch.advantages
    assert weights is not None
    assert advantages is not None
    valid = advantages[rollout.mask]
    expected = weights[rollout.mask] * (valid - valid.mean()) / valid.std()
    found = Learner(make_policy(), estimator, GradientStep(), normalize_advantage=True).credit(batch)
    assert th.allclose(found[rollout.mask], expected)
    assert (found[~rollout.mask] == 0).all()


@rollouts
@pytest.mark.parametrize("correction", ["vtrace", "none"])
def test_metrics_are_of_the_ratios_before_they_are_bounded(rollout: Rollout, correction: Any) -> None:
    estimator = VTrace(GAMMA, max_ratio=0.9, correction=correction)
    found, rho = estimator.describe(estimated(estimator, rollout)), ratios(rollout)
    assert float(found["importance_ess"]) == pytest.approx(float(rho.sum() ** 2 / (rho**2).sum() / len(rho)))
    assert float(found["largest_weight"]) == pytest.approx(float(rho.max()))
    assert float(found["truncated_fraction"]) == pytest.approx(float((rho > 0.9).double().mean()))
    assert 0 < found["truncated_fraction"] < 1


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("correction", ["vtrace", "none"])
def test_an_update_takes_any_ratio(dtype: th.dtype, correction: Any) -> None:
    """Parameters, gradients and metrics are finite with log-ratios of up to 10,000."""
    r, policy = random_rollout(20), make_policy()
    names = ("log_prob", "rewards", "bootstrap", "values")
    r = r._replace(**{name: getattr(r, name).to(dtype) for name in names})
    wild = th.linspace(-1e4, 1e4, r.ends.numel(), dtype=dtype).view(r.ends.shape)
    estimator, batch = VTrace(GAMMA, correction=correction), batch_of(r, wild)
    estimator.weigh(batch, r.log_prob)
    Learner(policy, estimator, GradientStep()).update(batch, "nothing")
    assert batch.returns is not None
    assert batch.returns.dtype == dtype
    assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()) for p in policy.parameters())
    metrics = estimator.describe(batch)
    assert all(math.isfinite(x) for x in metrics.values()), metrics
    assert float(metrics["truncated_fraction"]) == pytest.approx(float((wild > 0)[r.mask].double().mean()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.1}, "gamma must lie in .*1.1"),
        ({"trace_lambda": -0.1}, "trace_lambda must lie in .*-0.1"),
        ({"max_ratio": 0.0}, "max_ratio must be positive, got 0"),
        ({"max_trace": math.nan}, "max_trace must be positive, got nan"),
        ({"correction": "ppo"}, r"correction must be one of \['vtrace', 'none'\], got 'ppo'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VTrace(**arguments)
