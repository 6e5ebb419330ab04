"""Each baseline by hand, on two ragged episodes."""

from collections.abc import Iterator
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
    NoBaseline,
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


def subtracted(baseline: Baseline, batch: RolloutBatch, returns: th.Tensor = RETURNS) -> th.Tensor:
    """What a baseline takes from each valid return, column after column; nothing is left of the padding."""
    advantages = baseline.advantages(batch, returns)
    assert advantages[~batch.valid].eq(0).all()
    difference = th.where(batch.valid, returns - advantages, 0.0).T
    return difference[batch.valid.T]


def test_none(batch: RolloutBatch) -> None:
    assert subtracted(NoBaseline(), batch).tolist() == [0.0] * 7


def test_mean_of_rewards_to_go_is_over_steps(batch: RolloutBatch) -> None:
    assert subtracted(MeanBaseline(), batch).tolist() == pytest.approx([(4 + 2 + 6 + 10 + 8 + 6 + 3) / 7] * 7)


def test_mean_of_total_returns_is_over_episodes(batch: RolloutBatch) -> None:
    returns = th.tensor([[1.0, 5.0], [1.0, 5.0], [3.0, 5.0], [999.0, 5.0]])
    assert subtracted(MeanBaseline(per_episode=True), batch, returns).tolist() == pytest.approx([(1 + 3 + 5) / 3] * 7)


def test_leave_one_out(batch: RolloutBatch) -> None:
    first, second, third = (6 + 27) / 5, (6 + 27) / 6, (6 + 6) / 3
    expected = [first, first, second, third, third, third, third]
    assert subtracted(LeaveOneOutBaseline(), batch).tolist() == pytest.approx(expected, abs=1e-5)


def test_leave_one_out_of_segments_leaves_out_whole_envs(batch: RolloutBatch) -> None:
    batch.n_episodes, batch.mask = None, None
    batch.__dict__.pop("valid", None)
    expected = [27 / 4] * 4 + [(4 + 2 + 6 + 999) / 4] * 4
    assert subtracted(LeaveOneOutBaseline(), batch).tolist() == pytest.approx(expected)


def test_leave_one_out_of_one_is_an_error(batch: RolloutBatch) -> None:
    one = RolloutBatch(
        **{
            n: getattr(batch, n)[:2, :1]
            for n in ("observations", "actions", "rewards", "terminated", "truncated", "timesteps")
        },
        n_episodes=1,
    )
    with pytest.raises(ValueError, match="at least 2 episodes"):
        LeaveOneOutBaseline().advantages(one, RETURNS[:2, :1])


def test_time(batch: RolloutBatch) -> None:
    at = [(4 + 6 + 10) / 3, (2 + 8) / 2, 6, 3]
    expected = [at[0], at[1], at[0], at[0], at[1], at[2], at[3]]
    assert subtracted(TimeBaseline(), batch).tolist() == pytest.approx(expected)


def test_optimal_scalar_and_component_wise(batch: RolloutBatch) -> None:
    x, y = th.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]]), th.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    scalar, vector = OptimalBaseline(), OptimalBaseline(component_wise=True)
    with pytest.raises(RuntimeError, match="fit_gradients"):
        scalar.advantages(batch, RETURNS)
    asked_for = []

    def gradients(weights: th.Tensor) -> Iterator[th.Tensor]:
        asked_for.append(weights)
        for i in range(2):  # chunks of one episode
            yield th.stack((x[i], y[i]))[None]

    weights = th.full((4, 2), 0.5)
    for baseline in (scalar, vector):
        baseline.fit_gradients(batch, RETURNS, weights, gradients)
    mean = (4 + 2 + 6 + 10 + 8 + 6 + 3) / 7
    assert th.allclose(asked_for[0], th.stack((0.5 * (RETURNS - mean), weights)))
    # X.Y = (2 + 3) + (2 - 1) = 6, Y.Y = (4 + 1) + (1 + 1) = 7; a coordinate without scores has no baseline.
    assert subtracted(scalar, batch).tolist() == pytest.approx([mean + 6 / 7] * 7)
    assert subtracted(vector, batch).tolist() == pytest.approx([mean] * 7)
    assert vector.parameter_constants is not None
    assert vector.parameter_constants.tolist() == pytest.approx([5 / 5, 1 / 2, 0])
    assert scalar.parameter_constants is None


def test_linear_finds_a_function_that_its_features_span(batch: RolloutBatch) -> None:
    baseline = LinearBaseline(regularization=1e-10)
    assert baseline.predict(batch).abs().sum() == 0  # before the first fit
    s: Any = batch.observations
    t = batch.timesteps / 100.0
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
        th.zeros(3, 1),
        th.zeros(3, 1).bool(),
        th.zeros(3, 1).bool(),
        th.zeros(3, 1).long(),
    )
    baseline = LinearBaseline(regularization=0.0)
    baseline.fit(batch, th.full((3, 1), 5.0))
    assert th.allclose(baseline.predict(batch), th.full((3, 1), 5.0), atol=1e-3)


def test_linear_subtracts_what_it_predicts(batch: RolloutBatch) -> None:
    baseline = LinearBaseline()
    baseline.fit(batch, RETURNS)
    predicted = baseline.predict(batch)
    assert predicted.abs().sum() > 1
    assert th.allclose(subtracted(baseline, batch), predicted.T[batch.valid.T], atol=1e-5)


def test_value_is_the_critics(batch: RolloutBatch) -> None:
    assert subtracted(ValueBaseline(), batch).tolist() == [7.0] * 7
    batch.values = None
    with pytest.raises(ValueError, match="critic"):
        ValueBaseline().advantages(batch, RETURNS)


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_name_makes_its_class(name: str) -> None:
    assert type(make_baseline(name)) is BASELINES[name]


#: name -> (requires_critic, min_episodes with rewards-to-go, min_episodes with total returns, uses_fit)
MEMBERS = {
    "none": (False, 1, 1, False),
    "mean": (False, 1, 2, False),
    "leave_one_out": (False, 2, 2, False),
    "time": (False, 2, 2, False),
    "optimal": (False, 1, 2, False),
    "linear": (False, 1, 1, True),
    "value": (True, 1, 1, False),
}


@pytest.mark.parametrize("name", list(BASELINES))
def test_what_a_baseline_says_about_itself(name: str) -> None:
    per_step, total = make_baseline(name), make_baseline(name, per_episode=True)
    said = (per_step.requires_critic, per_step.min_episodes, total.min_episodes, per_step.uses_fit)
    assert said == MEMBERS[name]


def test_component_wise_takes_two_episodes() -> None:
    baseline = make_baseline("optimal", {"component_wise": True})
    assert (baseline.min_episodes, baseline.per_parameter) == (2, True)
    assert not make_baseline("optimal").per_parameter


def test_only_the_critics_own_values_are_what_foreign_buffers_subtract() -> None:
    class Clipped(ValueBaseline):
        def advantages(self, batch: Any, returns: Any) -> Any:
            return super().advantages(batch, returns).clamp(-1, 1)

    assert ValueBaseline().subtracts_values
    assert not Clipped().subtracts_values
    assert not LinearBaseline().subtracts_values


class Mine:
    """Predicts the last return that it has seen."""

    last = 0.0

    def fit(self, batch: Any, returns: Any) -> None:
        self.last = float(returns[-1, -1])

    def predict(self, batch: Any) -> Any:
        return np.float32(self.last)


class Eager(Mine):
    fits_own_batch = True
    requires_critic = True
    min_episodes = 3


def test_a_users_object_predicts_before_it_is_fitted(batch: RolloutBatch) -> None:
    baseline = make_baseline(Mine())
    assert (baseline.requires_critic, baseline.min_episodes, baseline.uses_fit) == (False, 1, True)
    assert subtracted(baseline, batch).tolist() == [0.0] * 7
    baseline.fit(batch, RETURNS)
    assert subtracted(baseline, batch).tolist() == [3.0] * 7


def test_a_users_object_may_be_fitted_to_the_batch_it_corrects(batch: RolloutBatch) -> None:
    baseline = make_baseline(Eager())
    assert (baseline.requires_critic, baseline.min_episodes, baseline.uses_fit) == (True, 3, False)
    assert subtracted(baseline, batch).tolist() == [3.0] * 7


def test_a_users_subclass_is_taken_as_it_is() -> None:
    mine = MeanBaseline()
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
        (Mine(), {"window": 3}, ValueError, "baseline_kwargs must be None for a baseline that is an object"),
    ],
)
def test_bad_specifications(spec: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_baseline(spec, kwargs)
