from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import baselines_plot
import baselines_run
import numpy as np
import pytest
import torch as th
from baselines_spec import ESTIMATORS, REFERENCE, Run
from bench_io import read_csv
from stable_baselines3.common.env_util import make_vec_env

WORDS = ["--env", "CartPole-v1", "--seeds", "100", "--steps", "600", "--jobs", "1"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    options = baselines.parse_options(
        [*WORDS, "--estimator", REFERENCE, "--hyperparams", "gamma:0.99", "--output", str(tmp_path)]
    )
    (planned,) = baselines.plan(options)
    return replace(planned, evaluations=2, evaluation_episodes=2, stops=(0.0, 0.5, 1.0), probe_episodes=16)


def test_only_the_estimator_differs(tmp_path: Path) -> None:
    runs = baselines.plan(baselines.parse_options([*WORDS, "--output", str(tmp_path)]))
    assert [run.estimator for run in runs] == list(ESTIMATORS)
    shared = [{k: v for k, v in run.settings if k not in ESTIMATORS[run.estimator]} for run in runs]
    assert all(settings == shared[0] for settings in shared)
    for run in runs:
        model: Any = baselines_run.build(run, run.estimator, make_vec_env("CartPole-v1", 4), seed=0)
        assert type(model.policy.optimizer) is th.optim.Adam
        assert (model.n_steps, model.n_episodes, model.normalize_advantage) == (None, 8, False)
        assert (model.max_grad_norm, model.truncation, model.gamma) == (None, "terminal", 1.0)
    assert len({run.config_hash for run in runs}) == len(runs)


def test_variance_is_that_of_episodes_differentiated_one_by_one(run: Run) -> None:
    """The same numbers from loops in plain numpy and one backward pass per episode."""
    model: Any = baselines_run.build(run, REFERENCE, make_vec_env("CartPole-v1", 4), seed=3)
    stop, gamma = baselines_run.Stop.of(model.learn(500), 0.5), 0.99
    earlier, batch = (baselines_run.collect(run, stop, n, seed) for n, seed in ((8, 1), (16, 2)))
    found = baselines_run.measure(run, stop, earlier, batch)
    assert isinstance(batch.observations, th.Tensor)
    assert batch.values is not None
    assert found.mean.shape[0] == len(ESTIMATORS)
    expected = model.policy.predict_values(batch.flat_observations).flatten() * model.value_scale
    assert model.value_scale > 2
    th.testing.assert_close(batch.select(batch.values).float(), expected.detach())

    valid = batch.valid.numpy()
    episodes = [np.argwhere((batch.episodes.numpy() == i) & valid)[:, 0] for i in range(16)]
    envs = [np.argwhere((batch.episodes.numpy() == i) & valid)[0, 1] for i in range(16)]
    rewards, values = batch.rewards.numpy(), batch.values.numpy()
    to_go, deltas = [], []
    for steps, env in zip(episodes, envs, strict=True):
        r, v = rewards[steps, env], values[steps, env]
        to_go.append(np.array([sum(gamma**k * x for k, x in enumerate(r[t:])) for t in range(len(r))]))
        deltas.append(r + gamma * np.append(v[1:], 0.0) - v)
    mean = np.concatenate(to_go).mean()
    credit = {
        "total return": [np.full(len(g), g[0]) for g in to_go],
        "reward-to-go": to_go,
        "mean": [g - mean for g in to_go],
        "value": [g - values[s, e] for g, s, e in zip(to_go, episodes, envs, strict=True)],
        "GAE": [
            np.array([sum((gamma * 0.95) ** k * x for k, x in enumerate(d[t:])) for t in range(len(d))]) for d in deltas
        ],
    }
    actor = list(model.learner.parameters.actor.values())
    for name, weights in credit.items():
        rows = []
        for steps, env, weight in zip(episodes, envs, weights, strict=True):
            distribution = model.policy.get_distribution(batch.observations[steps, env])
            log_prob = distribution.log_prob(batch.actions[steps, env].flatten())
            gradient = th.autograd.grad((th.as_tensor(weight, dtype=th.float32) * log_prob).sum(), actor)
            rows.append(th.cat([g.flatten() for g in gradient]).numpy())
        expected = np.var(rows, axis=0, ddof=1).sum()
        k = list(ESTIMATORS).index(name)
        assert float(found.total_variance[k]) == pytest.approx(expected, rel=1e-4), name


def test_a_run_measures_at_its_stops_and_is_not_touched_by_that(run: Run) -> None:
    result = baselines_run.train(run)
    plain = baselines_run.train(replace(run, stops=()))
    assert result.learning == plain.learning
    assert plain.variance == []
    assert [row["estimator"] for row in result.variance] == 3 * list(ESTIMATORS)
    steps = sorted({row["step"] for row in result.variance})
    assert steps[0] == 0
    assert [row["stop"] for row in result.variance[:: len(ESTIMATORS)]] == [0.0, 0.5, 1.0]
    assert 300 <= steps[1] < 600 <= steps[2]
    assert {row["episodes"] for row in result.variance} == {16}
    assert all(float(row["gradient_variance"]) > 0 for row in result.variance)


@pytest.mark.slow
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Run, "probe_episodes", 8)
    words = [*WORDS, "--output", str(tmp_path), "--estimator", "reward-to-go", REFERENCE]
    assert baselines.main(words) == 0
    learning, variance = map(read_csv, baselines.files(tmp_path))
    assert {row["estimator"] for row in learning} == {"reward-to-go", REFERENCE}
    assert {row["estimator"] for row in variance} == set(ESTIMATORS)
    assert (tmp_path / "baselines.png").stat().st_size > 10_000
    monkeypatch.setattr(baselines, "work", None)
    assert baselines.main(words) == 0
    assert "2 runs, 2 finished before" in capsys.readouterr().out


def test_a_failed_run_is_reported_and_the_others_are_saved(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(run, env="NoSuchEnv-v0")
    assert baselines.run_all([broken, replace(run, stops=())], 1, tmp_path) == 1
    assert {row["env"] for row in read_csv(baselines.files(tmp_path)[0])} == {"CartPole-v1"}
    assert "NoSuchEnv-v0 value seed 100: FAILED" in capsys.readouterr().err


def test_tuning_seeds_stay_out_of_the_results() -> None:
    with pytest.raises(SystemExit):
        baselines.parse_options(["--seeds", "100"])
    with pytest.raises(SystemExit):
        baselines.parse_options(["--seeds", "-1", "--output", "elsewhere"])


def test_curves_average_over_seeds_on_the_logarithm() -> None:
    rows = [
        {
            "estimator": "mean",
            "seed": str(seed),
            "steps": "100",
            "stop": str(stop),
            "gradient_variance": f"1e{seed + 4}",
        }
        for seed in (0, 2)
        for stop in (0.5, 1.0)
    ]
    (curve,) = baselines_plot.log_variances(rows)
    assert curve.x.tolist() == [50.0, 100.0]
    assert curve.mean.tolist() == [5.0, 5.0]
