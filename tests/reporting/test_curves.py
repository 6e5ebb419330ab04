"""Logs become curves: read back what SB3 writes, aggregate runs, and put an honest band around the mean."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.monitor import ResultsWriter

from sb3_pg.reporting.curves import (
    LogError,
    Run,
    aggregate,
    bootstrap_band,
    env_of,
    find_runs,
    group,
    read_evaluations,
    read_training,
)


def write_monitor(
    folder: Path, index: int, episodes: list[tuple[float, int, float]], start: float = 100.0, env: str = "CartPole-v1"
) -> Path:
    """Log episodes (return, length, seconds since ``start``) as SB3's Monitor does."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ResultsWriter(str(folder / str(index)), header={"t_start": start, "env_id": env})
    for reward, length, time in episodes:
        writer.write_row({"r": reward, "l": length, "t": time})
    writer.close()
    return folder / f"{index}.monitor.csv"


def write_evaluations(folder: Path, steps: list[int], results: list[list[float]]) -> None:
    """Log evaluations as SB3's EvalCallback does."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "evaluations.npz", timesteps=steps, results=results, ep_lengths=results)


def run(x: list[float], *returns: list[float], label: str = "reinforce", env: str = "CartPole-v1") -> Run:
    return Run(label, env, np.array(x), np.array(returns))


def test_find_runs(tmp_path: Path) -> None:
    write_evaluations(tmp_path / "a2c/Env-v0_1", [1], [[0.0]])
    write_monitor(tmp_path / "a2c/Env-v0_1", 0, [])
    write_monitor(tmp_path / "a2c/Env-v0_2", 0, [])
    (tmp_path / "a2c/Env-v0_3").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a2c/Env-v0_1", tmp_path / "a2c/Env-v0_2"]
    assert find_runs(tmp_path / "a2c/Env-v0_2") == [tmp_path / "a2c/Env-v0_2"]
    with pytest.raises(LogError, match=r"no evaluations\.npz and no \*\.monitor\.csv in .*Env-v0_3"):
        find_runs(tmp_path / "a2c/Env-v0_3")


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("CartPole-v1_12", "CartPole-v1"),
        ("Some_Env-v0_1_6f9619ff-8b86-d011-b42d-00cf4fc964ff", "Some_Env-v0"),
        ("plain", "plain"),
    ],
)
def test_env_from_folder(name: str, env: str, tmp_path: Path) -> None:
    write_evaluations(tmp_path / name, [1], [[0.0]])
    assert env_of(tmp_path / name) == env


def test_env_from_monitor_wins(tmp_path: Path) -> None:
    write_monitor(tmp_path / "ALE-Pong-v5_1", 0, [], env="ALE/Pong-v5")
    assert env_of(tmp_path / "ALE-Pong-v5_1") == "ALE/Pong-v5"


def test_read_evaluations(tmp_path: Path) -> None:
    write_evaluations(tmp_path / "ppo/CartPole-v1_1", [10, 20, 30], [[1.0, 3.0], [2.0, 4.0], [5.0, 9.0]])
    read = read_evaluations(tmp_path / "ppo/CartPole-v1_1")
    assert (read.label, read.env) == ("ppo", "CartPole-v1")
    np.testing.assert_array_equal(read.x, [10, 20, 30])
    np.testing.assert_array_equal(read.returns, [[1, 2, 5], [3, 4, 9]])
    assert read_evaluations(tmp_path / "ppo/CartPole-v1_1", "mine").label == "mine"
    (tmp_path / "ppo/CartPole-v1_2").mkdir()
    with pytest.raises(LogError, match=r"no evaluations\.npz in .*CartPole-v1_2"):
        read_evaluations(tmp_path / "ppo/CartPole-v1_2")


def test_read_training_merges_envs_in_order_of_time(tmp_path: Path) -> None:
    folder = tmp_path / "ppo/CartPole-v1_1"
    write_monitor(folder, 0, [(1.0, 10, 1.0), (3.0, 30, 3.0)], start=100.0)
    write_monitor(folder, 1, [(2.0, 20, 1.5), (4.0, 40, 3.5)], start=100.5)
    steps = read_training(folder, window=1)
    np.testing.assert_array_equal(steps.returns, [[1, 2, 3, 4]])
    np.testing.assert_array_equal(steps.x, [10, 30, 60, 100])
    seconds = read_training(folder, "time", window=1)
    np.testing.assert_allclose(seconds.x, [1, 2, 3, 4])


def test_read_training_windows(tmp_path: Path) -> None:
    write_monitor(tmp_path / "ppo/Env-v0_1", 0, [(float(i), 2, float(i)) for i in range(50)])
    read = read_training(tmp_path / "ppo/Env-v0_1", window=4)
    assert read.returns.shape == (4, 47)
    np.testing.assert_array_equal(read.returns[:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(read.returns[:, -1], [46, 47, 48, 49])
    np.testing.assert_array_equal(read.x, np.arange(4, 51) * 2)
    # never wider than a fifth of the episodes
    assert read_training(tmp_path / "ppo/Env-v0_1", window=1000).returns.shape == (10, 41)


def test_read_training_of_a_killed_run(tmp_path: Path) -> None:
    path = write_monitor(tmp_path / "ppo/Env-v0_1", 0, [(1.0, 5, 1.0), (2.0, 5, 2.0)])
    path.write_text(path.read_text() + "3.0,5")
    np.testing.assert_array_equal(read_training(tmp_path / "ppo/Env-v0_1", window=1).returns, [[1, 2]])
    write_monitor(tmp_path / "ppo/Env-v0_2", 0, [])
    with pytest.raises(LogError, match="no finished episode"):
        read_training(tmp_path / "ppo/Env-v0_2")


def test_band_covers_the_mean_as_often_as_it_says() -> None:
    samples: NDArray[np.float64] = np.random.default_rng(0).normal(3.0, 2.0, (40, 1000))
    low, high = bootstrap_band(samples, level=0.9)
    covered = np.mean((low < 3.0) & (high > 3.0))
    # 1000 trials have a standard error of 1 %; percentile bands of 40 samples are a little narrow
    assert 0.85 < covered < 0.93
    assert np.mean(high - low) == pytest.approx(2 * 1.645 * 2.0 / np.sqrt(40), rel=0.05)


def test_band_of_two_samples_spans_them() -> None:
    low, high = bootstrap_band(np.array([[1.0, 5.0], [3.0, 5.0]]))
    np.testing.assert_allclose((low, high), ([1, 5], [3, 5]))


def test_single_run_has_a_band_over_its_episodes() -> None:
    curve = aggregate([run([1, 2], [0, 4], [2, 4])])
    assert curve.n_runs == 1
    np.testing.assert_allclose((curve.low, curve.mean, curve.high), ([0, 4], [1, 4], [2, 4]))


def test_several_runs_are_interpolated_where_all_are_known() -> None:
    curve = aggregate([run([0, 10, 20], [0, 10, 20]), run([5, 15, 25, 35], [5, 5, 5, 5])])
    assert curve.n_runs == 2
    np.testing.assert_array_equal(curve.x, [5, 10, 15, 20])
    np.testing.assert_allclose(curve.mean, [5, 7.5, 10, 12.5])
    np.testing.assert_allclose((curve.low, curve.high), ([5, 5, 5, 5], [5, 10, 15, 20]))
    with pytest.raises(LogError, match="have no x in common"):
        aggregate([run([0, 1], [0, 0]), run([2, 3], [0, 0])])


def test_group_keeps_algorithms_and_envs_apart() -> None:
    point = ([1.0], [1.0])
    curves = group([run(*point), run(*point, label="ppo"), run(*point), run(*point, env="Acrobot-v1")])
    assert [(curve.label, curve.env, curve.n_runs) for curve in curves] == [
        ("reinforce", "CartPole-v1", 2),
        ("ppo", "CartPole-v1", 1),
        ("reinforce", "Acrobot-v1", 1),
    ]
