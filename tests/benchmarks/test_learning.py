import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import learning
import learning_run
import numpy as np
import pytest
from bench_io import read_csv, write_csv
from learning_spec import KEY, Run, parse_hyperparams

from sb3_pg.envs import ActorVecEnv

SHORT = Run("a2c", "CartPole-v1", 100, 600, ("n_envs:3",), evaluations=4, evaluation_episodes=2, final_episodes=3)


def rows_of(seeds: range, **settings: Any) -> list[dict[str, Any]]:
    return [{"algo": "a2c", "env": "E", "seed": s, "steps": 9, "config_hash": "c"} | settings for s in seeds]


@pytest.mark.parametrize(
    ("seeds", "output", "message"),
    [
        ([100], learning.REPORT, "for tuning"),
        ([0, 100], Path("other.csv"), "do not mix"),
        ([-1], Path("other.csv"), "seeds are 0 to"),
        ([10**6], Path("other.csv"), "seeds are 0 to"),
    ],
)
def test_seed_protocol(seeds: list[int], output: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning.check_seeds(seeds, output)


def test_a_file_of_tuning_seeds_takes_no_report_seeds(tmp_path: Path) -> None:
    output = tmp_path / "tuning.csv"
    write_csv(output, rows_of(range(100, 102)), KEY)
    learning.check_seeds([103], output)
    with pytest.raises(ValueError, match="do not mix"):
        learning.check_seeds([0], output)
    with pytest.raises(SystemExit):
        learning.main(["--algo", "a2c", "--env", "CartPole-v1", "--output", str(output)])


def test_hyperparameters_are_literals_or_text() -> None:
    words = ["gamma:0.9", "learning_rate:lin_0.001", "policy_kwargs:dict(net_arch=[8])", "normalize:True"]
    assert parse_hyperparams(words) == {
        "gamma": 0.9,
        "learning_rate": "lin_0.001",
        "policy_kwargs": "dict(net_arch=[8])",
        "normalize": True,
    }
    with pytest.raises(ValueError, match="name:value"):
        parse_hyperparams(["gamma=0.9"])


def test_config_hash_is_of_hyperparameters_and_protocol_not_of_the_budget() -> None:
    base = learning.config_hash({"gamma": 0.9, "n_envs": 2, "n_timesteps": 1e5}, SHORT)
    assert learning.config_hash({"n_envs": 2, "gamma": 0.9}, replace(SHORT, seed=3, steps=7)) == base
    assert learning.config_hash({"gamma": 0.8, "n_envs": 2}, SHORT) != base
    assert learning.config_hash({"gamma": 0.9, "n_envs": 2}, replace(SHORT, final_episodes=50)) != base
    assert learning.config_hash({"gamma": 0.9, "n_envs": 2}, replace(SHORT, n_actors=2)) != base


def test_row_says_how_to_repeat_it() -> None:
    words = replace(SHORT, n_actors=2).command.split()[2:]
    options = learning.parse_options([*words, "--output", "other.csv"])
    assert (options.algo, options.env, options.seeds, options.steps) == (["a2c"], ["CartPole-v1"], [100], 600)
    assert (options.evaluations, options.evaluation_episodes, options.final_episodes) == (4, 2, 3)
    assert options.hyperparams == ["n_envs:3"]
    assert options.n_actors == 2


def test_summary_has_every_seed_and_names_the_missing(tmp_path: Path) -> None:
    output = tmp_path / "learning.csv"
    finals = [10.0, 20.0, 30.0, 40.0, 1000.0]
    rows = [row | {"final_mean": mean} for row, mean in zip(rows_of(range(5)), finals, strict=True)]
    rows += [row | {"final_mean": 1.0} for row in rows_of(range(3), env="F")]
    write_csv(output, rows, (*KEY, "final_mean"))
    header, full, partial = (line.split() for line in learning.summarize(output).splitlines())
    assert dict(zip(header, full, strict=False)) == {
        "env": "E",
        "algo": "a2c",
        "steps": "9",
        "config": "c",
        "seeds": "5",
        "mean": "220.0",
        "std": "436.18",
        "min": "10.0",
        "max": "1000.0",
        "iqm": "30.0",
    }
    assert partial[-2:] == ["3", "4"]


@pytest.mark.parametrize("n_envs", [1, 3, 7, 60])
def test_evaluations_come_at_the_marks(monkeypatch: pytest.MonkeyPatch, n_envs: int) -> None:
    monkeypatch.setattr(learning_run, "evaluate", lambda *_: (1.0, 0.0))
    points: list[learning_run.Point] = []
    no_env: Any = None
    callback: Any = learning_run.Evaluations(no_env, 1000, 20, 5, True, points.append)
    callback.model = SimpleNamespace()
    for steps in range(n_envs, 1000 + 2 * n_envs, n_envs):
        callback.model.num_timesteps = steps
        assert callback.on_step()
    first = {-(-mark // n_envs) * n_envs for mark in range(50, 1001, 50)}  # the first step at or past each mark
    assert [point[0] for point in points] == sorted(first)


def test_evaluation_env_is_frozen_raw_and_elsewhere(tmp_path: Path) -> None:
    manager = learning_run.make_manager("a2c", "Acrobot-v1", 0, 100, {"n_envs": 2}, None, str(tmp_path))
    experiment: Any = manager.setup_experiment()
    model, _ = experiment
    env: Any = learning_run.evaluation_env(manager, 5, learning_run.EVALUATION_SEED)
    assert not np.isclose(env.reset()[:2], model.get_env().reset()).all(axis=1).any()
    model.learn(100)
    learning_run.evaluate(model, env, 1, True)
    trained = model.get_vec_normalize_env()
    assert (env.training, env.norm_reward, env.num_envs) == (False, False, 5)
    assert trained.obs_rms.count > 100
    assert np.array_equal(env.obs_rms.mean, trained.obs_rms.mean)


def test_evaluating_changes_nothing_in_training() -> None:
    once, often = (learning_run.train(replace(SHORT, seed=0, evaluations=n), lambda _: None)[0] for n in (1, 4))
    same = ("final_mean", "final_std", "timesteps", "n_envs")
    assert [once[name] for name in same] == [often[name] for name in same]


def test_actors_collect() -> None:
    with patch("learning_run.ActorVecEnv", wraps=ActorVecEnv) as made:
        measured, points = learning_run.train(replace(SHORT, algo="actor_critic", n_actors=2), lambda _: None)
    made.assert_called_once()
    assert made.call_args.kwargs == {"n_actors": 2}
    assert (measured["n_envs"], len(points)) == (3, SHORT.evaluations)


def test_a_failed_run_is_reported_and_the_others_are_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tuning.csv"
    broken = replace(SHORT, seed=101, overrides=("gamma:None",))
    assert learning.run_all([broken, SHORT], 2, output) == 1
    assert [row["seed"] for row in read_csv(output)] == ["100"]
    captured = capfd.readouterr()
    assert "a2c CartPole-v1 seed 101: FAILED, exit code 1" in captured.err
    assert "Traceback" in captured.err
    assert "a2c CartPole-v1 seed 100: done" in captured.out


def test_a_finished_run_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tuning.csv"
    words = ["--algo", "reinforce", "--env", "CartPole-v1", "--seeds", "100", "--steps", "3000", "--jobs", "1"]
    words += ["--evaluation-episodes", "2", "--final-episodes", "5", "--output", str(output)]
    assert learning.main(words) == 0
    (row,) = read_csv(output)
    assert (row["algo"], row["steps"], row["seed"]) == ("reinforce", "3000", "100")
    assert int(row["timesteps"]) >= 3000
    assert float(row["final_mean"]) > 8  # the shortest CartPole episodes last 8 steps
    curve = read_csv(learning.curves_path(output))
    n_envs = int(row["n_envs"])
    assert [int(point["step"]) for point in curve] == [-(-150 * k // n_envs) * n_envs for k in range(1, 21)]
    assert max(float(point["eval_mean"]) for point in curve) == float(row["best_eval_mean"])

    before = output.read_bytes()
    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", None)
    assert learning.main(words) == 0
    assert output.read_bytes() == before
    assert "1 runs, 1 finished before" in capsys.readouterr().out
