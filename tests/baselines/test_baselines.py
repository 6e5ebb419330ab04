"""Each baseline by hand, on two ragged episodes."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_pg.baselines import (
    BASELINES,
    Baseline,
    LeaveOneOutBaseline,
    LinearBaseline,
    MeanBaseline,
    OptimalBaseline,
    TimeBaseline,
    ValueBaseline,
    make_baseline,
)
from sb3_pg.rollout import RolloutBatch


@pytest.fixture
def batch() -> RolloutBatch:
    """Three episodes in two columns: of 2 and 1 steps in the first, of 4 in the second; one step of padding."""
    ends = th.tensor([[0, 0], [1, 0], [1, 0], [0, 1]]).bool()
    mask = th.tensor([[1, 1], [1, 1], [1, 1], [0, 1]]).bool()
    return RolloutBatch(
        observations=th.arange(8.0).view(4, 2, 1),
        actions=th.zeros(4, 2, 1),
        rewards=th.zeros(4, 2),
        terminated=ends,
        truncated=th.zeros_like(ends),
        timesteps=th.tensor([[0, 0], [1, 1], [0, 2], [1, 3]]),
        mask=mask,
        values=th.full((4, 2), 7.0),
        n_episodes=3,
    )


RETURNS = th.tensor([[4.0, 10.0], [2.0, 8.0], [6.0, 6.0], [999.0, 3.0]])


def test_mean_of_rewards_to_go_is_over_steps(batch: RolloutBatch) -> None:
    baseline = MeanBaseline()
    baseline.fit(batch, RETURNS)
    assert baseline.predict(batch).item() == pytest.approx((4 + 2 + 6 + 10 + 8 + 6 + 3) / 7)


def test_mean_of_total_returns_is_over_episodes(batch: RolloutBatch) -> None:
    baseline = MeanBaseline(per_episode=True)
    baseline.fit(batch, th.tensor([[1.0, 5.0], [1.0, 5.0], [3.0, 5.0], [999.0, 5.0]]))
    assert baseline.predict(batch).item() == pytest.approx((1 + 3 + 5) / 3)


def test_leave_one_out(batch: RolloutBatch) -> None:
    baseline = LeaveOneOutBaseline()
    baseline.fit(batch, RETURNS)
    first, second, third = (6 + 27) / 5, (6 + 27) / 6, (6 + 6) / 3
    expected = th.tensor([[first, third], [first, third], [second, third], [0.0, third]])
    assert th.allclose(baseline.predict(batch)[batch.valid], expected[batch.valid])


def test_leave_one_out_of_segments_leaves_out_whole_envs(batch: RolloutBatch) -> None:
    batch.n_episodes, batch.mask = None, None
    batch.__dict__.pop("valid", None)
    baseline = LeaveOneOutBaseline()
    baseline.fit(batch, RETURNS)
    expected = th.tensor([27 / 4, (4 + 2 + 6 + 999) / 4]).expand(4, 2)
    assert th.allclose(baseline.predict(batch), expected)


def test_leave_one_out_of_one_is_an_error(batch: RolloutBatch) -> None:
    one = RolloutBatch(
        *(
            getattr(batch, n)[:2, :1]
            for n in ("observations", "actions", "rewards", "terminated", "truncated", "timesteps")
        ),
        n_episodes=1,
    )
    with pytest.raises(ValueError, match="at least 2 episodes"):
        LeaveOneOutBaseline().fit(one, RETURNS[:2, :1])


def test_time(batch: RolloutBatch) -> None:
    baseline = TimeBaseline()
    baseline.fit(batch, RETURNS)
    at = [(4 + 6 + 10) / 3, (2 + 8) / 2, 6, 3]
    expected = th.tensor([[at[0], at[0]], [at[1], at[1]], [at[0], at[2]], [at[1], at[3]]])
    assert th.allclose(baseline.predict(batch)[batch.valid], expected[batch.valid])


def test_optimal_scalar_and_component_wise(batch: RolloutBatch) -> None:
    x, y = th.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]]), th.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    scalar, vector = OptimalBaseline(), OptimalBaseline(component_wise=True)
    for baseline in (scalar, vector):
        baseline.reset(th.tensor(10.0))
        for i in range(2):
            baseline.accumulate(th.stack((x[i], y[i]))[None])
        baseline.fit(batch, RETURNS)
    # X.Y = (2 + 3) + (2 - 1) = 6, Y.Y = (4 + 1) + (1 + 1) = 7; a coordinate without scores has no baseline.
    assert scalar.predict(batch).item() == pytest.approx(10 + 6 / 7)
    assert vector.constant.tolist() == pytest.approx([5 / 5, 1 / 2, 0])
    with pytest.raises(ValueError, match="one number per parameter"):
        vector.predict(batch)
    with pytest.raises(RuntimeError, match="accumulate"):
        scalar.fit(batch, RETURNS)


def test_linear_finds_a_function_that_its_features_span(batch: RolloutBatch) -> None:
    baseline = LinearBaseline(regularization=1e-10)
    assert baseline.predict(batch).abs().sum() == 0  # before the first fit
    s, t = batch.observations, batch.timesteps / 100.0  # type: ignore[operator]
    returns = 3.0 * s[..., 0] - 0.5 * s[..., 0] ** 2 + 20.0 * t + 1.0
    baseline.fit(batch, th.where(batch.valid, returns, th.nan))
    predicted = baseline.predict(batch)
    assert th.allclose(predicted[batch.valid], returns[batch.valid], atol=1e-3)
    assert predicted[~batch.valid].tolist() == [0.0]


def test_linear_features_are_those_of_duan_et_al() -> None:
    phi = LinearBaseline().features({"a": th.tensor([[20.0]]), "b": th.tensor([[[-2.0]]])}, th.tensor([200]))
    assert phi.tolist() == [[10, -2, 100, 4, 2, 4, 8, 1]]
    assert phi.dtype == th.float64


def test_linear_sees_discrete_states_one_hot_and_refuses_images() -> None:
    phi = LinearBaseline(observation_space=spaces.Discrete(3)).features(th.tensor([[2], [0]]), th.tensor([0, 0]))
    assert phi.tolist() == [[0, 0, 1, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match=r"baseline='linear'.*56452.*baseline='value'"):
        LinearBaseline(observation_space=spaces.Box(0, 255, (4, 84, 84), np.uint8))


def test_linear_survives_a_singular_regression() -> None:
    batch = RolloutBatch(
        th.full((3, 1, 2), 2.0),
        th.zeros(3, 1, 1),
        *[th.zeros(3, 1)] * 1,
        *[th.zeros(3, 1).bool()] * 2,
        th.zeros(3, 1).long(),
    )
    baseline = LinearBaseline(regularization=0.0)
    baseline.fit(batch, th.full((3, 1), 5.0))
    assert th.allclose(baseline.predict(batch), th.full((3, 1), 5.0), atol=1e-3)


def test_value_is_the_critics(batch: RolloutBatch) -> None:
    assert th.equal(ValueBaseline().predict(batch), th.full((4, 2), 7.0))
    batch.values = None
    with pytest.raises(ValueError, match="critic"):
        ValueBaseline().predict(batch)


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_name_makes_a_baseline(name: str) -> None:
    assert isinstance(make_baseline(name), Baseline)


class Mine:
    def fit(self, batch: Any, returns: Any) -> None:
        self.seen = returns

    def predict(self, batch: Any) -> Any:
        return np.float32(0)


def test_a_users_object_is_taken_as_it_is() -> None:
    mine = Mine()
    assert make_baseline(mine) is mine


@pytest.mark.parametrize(
    ("spec", "kwargs", "error", "message"),
    [
        ("median", None, ValueError, "'none', 'mean'.*got 'median'"),
        (None, None, TypeError, "fit and predict, got None"),
        (3, None, TypeError, "got 3"),
        (Mine, None, TypeError, "fit and predict"),
        ("mean", {"window": 3}, ValueError, r"baseline_kwargs of 'mean' must be among \[\], got \['window'\]"),
        ("optimal", {"componentwise": True}, ValueError, r"\['component_wise'\], got \['componentwise'\]"),
        ("linear", {"regularization": -1.0}, ValueError, "regularization.*-1"),
        (Mine(), {"window": 3}, ValueError, "named baselines"),
    ],
)
def test_bad_specifications(spec: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_baseline(spec, kwargs)
