"""Scores of several runs: read from both kinds of sources, and summarized by formulas that are known by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest

from sb3_pg.extras import MissingExtraError
from sb3_pg.reporting.curves import LogError, Run
from sb3_pg.reporting.scores import Result, improvements, matrices, profiles, read_results, score, with_common_steps


def result(label: str, final: float, env: str = "CartPole-v1", steps: int = 100) -> Result:
    return Result(label, env, steps, final, final + 1, 2.0, Run(label, env, np.array([steps]), np.array([[final]])))


def results(label: str, *finals: float, env: str = "CartPole-v1", steps: int = 100) -> list[Result]:
    return [result(label, final, env, steps) for final in finals]


def write_table(path: Path, rows: list[tuple[str, int, float]]) -> Path:
    """As benchmarks/learning.py does: two evaluations per run, the second of them 1 below the final mean."""
    key = ["algo", "env", "seed", "steps", "config_hash"]
    with path.open("w", newline="") as file, path.with_name(f"{path.stem}_curves.csv").open("w", newline="") as curves:
        table, points = csv.writer(file), csv.writer(curves)
        table.writerow([*key, "final_mean", "best_eval_mean", "wall_seconds"])
        points.writerow([*key, "step", "eval_mean"])
        for algo, seed, final in rows:
            run = [algo, "CartPole-v1", seed, 100, "abc"]
            table.writerow([*run, final, final + 5, 7.5])
            points.writerows([[*run, 100, final - 1], [*run, 50, 0.0]])
    return path


def test_results_of_a_table(tmp_path: Path) -> None:
    path = write_table(tmp_path / "learning.csv", [("npg", 0, 10.0), ("npg", 1, 20.0)])
    first, second = read_results(path)
    assert (first.label, first.task, first.final, first.best, first.seconds) == (
        "npg",
        ("CartPole-v1", 100),
        10,
        15,
        7.5,
    )
    assert second.final == 20
    np.testing.assert_array_equal(first.curve.x, [50, 100])
    np.testing.assert_array_equal(first.curve.returns, [[0, 9]])
    assert {found.label for found in read_results(path, "mine")} == {"mine"}


def test_other_settings_are_another_label(tmp_path: Path) -> None:
    path = write_table(tmp_path / "learning.csv", [("npg", 0, 10.0), ("npg", 1, 20.0), ("a2c", 0, 5.0)])
    for file in (path, tmp_path / "learning_curves.csv"):
        file.write_text(file.read_text().replace("npg,CartPole-v1,1,100,abc", "npg,CartPole-v1,1,100,def"))
    assert [found.label for found in read_results(path)] == ["npg abc", "npg def", "a2c"]


def test_lengths_that_differ_by_less_than_a_tenth_are_one() -> None:
    found = [*results("ours", 1.0, steps=1000), *results("peer", 2.0, steps=992), *results("ours", 3.0, steps=100)]
    other = results("ours", 4.0, env="Acrobot-v1", steps=992)
    common = with_common_steps([*found, *other])
    assert [result.steps for result in common] == [1000, 1000, 100, 992]
    assert [result.final for result in common] == [1, 2, 3, 4]
    ((probability, _, tasks),) = improvements(common, "peer").values()
    assert (probability, tasks) == (0, [("CartPole-v1", 1000)])


def test_results_of_a_folder_of_logs(tmp_path: Path) -> None:
    for number, last in ((1, 4.0), (2, 8.0)):
        folder = tmp_path / f"npg/CartPole-v1_{number}"
        folder.mkdir(parents=True)
        np.savez(folder / "evaluations.npz", timesteps=[50, 100], results=[[10.0, 12.0], [last, last + 2]])
    (tmp_path / "npg/CartPole-v1_3").mkdir()
    (tmp_path / "npg/CartPole-v1_3/0.monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n')
    first, second = read_results(tmp_path)
    assert (first.label, first.task, first.final, first.best, first.seconds) == (
        "npg",
        ("CartPole-v1", 100),
        5,
        11,
        None,
    )
    assert second.final == 9


def test_sources_without_results_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        LogError, match=r"nothing\.csv is not a table .* with a table of curves beside it: .*No such file"
    ):
        read_results(tmp_path / "nothing.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other_curves.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LogError, match=r"other\.csv is not a table .*'step'"):
        read_results(tmp_path / "other.csv")
    with pytest.raises(LogError, match="no run in"):
        read_results(write_table(tmp_path / "empty.csv", []))
    (tmp_path / "0.monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n')
    with pytest.raises(LogError, match=r"evaluations\.npz: train without --eval-freq -1"):
        read_results(tmp_path)


def test_scores_are_the_formulas() -> None:
    finals = [1.0, 2.0, 3.0, 4.0, 100.0]
    (line,) = score(results("npg", *finals))
    assert (line.n_runs, line.mean, line.worst, line.best_run, line.best_of_curve) == (5, 22, 1, 100, 23)
    assert line.std == pytest.approx(np.std(finals, ddof=1))
    assert line.iqm == 3  # without the quarter at each end, which of five runs is one
    low, high = line.interval
    assert 1 <= low < 3 < high <= 100
    assert line.seconds == 2
    assert score(results("npg", *finals)) == [line]  # the resampling is always the same, and nobody else's
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    score(results("npg", *finals))
    assert np.random.random() == expected  # noqa: NPY002
    (single,) = score(results("npg", 7.0))
    assert (single.std, single.iqm, single.interval) == (0, 7, (7, 7))


def test_other_budgets_are_other_tasks() -> None:
    lines = score([*results("npg", 1.0, steps=200), *results("npg", 2.0, steps=100), *results("a2c", 3.0)])
    assert [(line.steps, line.label) for line in lines] == [(100, "npg"), (100, "a2c"), (200, "npg")]


def test_matrices_have_the_common_tasks() -> None:
    found = [
        *results("a", 1.0, 2.0),
        *results("a", 3.0, 4.0, env="Acrobot-v1"),
        *results("b", 5.0, 6.0, env="Acrobot-v1"),
    ]
    tasks, scores = matrices(found, ["a", "b"])
    assert tasks == [("Acrobot-v1", 100)]
    np.testing.assert_array_equal(scores["a"], [[3], [4]])
    tasks, scores = matrices(found, ["a"])
    np.testing.assert_array_equal(scores["a"], [[3, 1], [4, 2]])
    with pytest.raises(LogError, match="common to a, b"):
        matrices([*results("a", 1.0), *results("b", 1.0, steps=200)], ["a", "b"])


def test_matrices_have_the_first_runs_where_a_task_has_more() -> None:
    found = [*results("a", 1.0, 2.0, 9.0), *results("a", 3.0, 4.0, env="Acrobot-v1"), *results("b", 5.0)]
    np.testing.assert_array_equal(matrices(found, ["a"])[1]["a"], [[3, 1], [4, 2]])
    np.testing.assert_array_equal(matrices(found, ["a", "b"])[1]["a"], [[1], [2], [9]])


def test_profile_is_the_share_of_runs_above() -> None:
    scores = {"a": np.array([[0.0], [10.0]]), "b": np.array([[20.0], [20.0]])}
    thresholds, shares, bounds = profiles(scores, n_points=5)  # 0, 5, 10, 15, 20
    np.testing.assert_array_equal(thresholds, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(shares["a"], [0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(shares["b"], [1, 1, 1, 1, 0])
    assert (bounds["a"][0] <= shares["a"]).all()
    assert (shares["a"] <= bounds["a"][1]).all()
    np.testing.assert_array_equal(profiles(scores, n_points=5)[2]["a"], bounds["a"])


def test_a_task_on_which_all_runs_are_equal_counts_as_solved_in_the_profile() -> None:
    scores = {"a": np.array([[0.0, 7.0]]), "b": np.array([[20.0, 7.0]])}
    _, shares, _ = profiles(scores, n_points=5)
    np.testing.assert_array_equal(shares["a"], [0.5, 0.5, 0.5, 0.5, 0])
    np.testing.assert_array_equal(shares["b"], [1, 1, 1, 1, 0])


def test_improvement_is_the_probability_of_a_higher_end() -> None:
    found = [*results("ours", 2.0, 4.0), *results("peer", 1.0, 3.0, 5.0), *results("alone", 1.0, env="Acrobot-v1")]
    better = improvements(found, "peer")
    assert list(better) == ["ours"]
    point, (low, high), tasks = better["ours"]
    assert point == pytest.approx((1 + 2) / 6)  # 2 is above one of three, 4 above two
    assert 0 <= low < point < high <= 1
    assert tasks == [("CartPole-v1", 100)]
    uneven = [*found, result("ours", 3.0, env="Acrobot-v1"), result("peer", 3.0, env="Acrobot-v1")]
    point, _, tasks = improvements(uneven, "peer")["ours"]
    assert point == pytest.approx((0.5 + 1) / 2)  # of the first run of each: 3 and 3, 2 above 1
    assert tasks == [("Acrobot-v1", 100), ("CartPole-v1", 100)]
    with pytest.raises(LogError, match="no run of 'nobody'; there are runs of ours, peer, alone"):
        improvements(found, "nobody")


def test_without_rliable_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rliable", None)
    monkeypatch.delitem(__import__("sys").modules, "rliable.library", raising=False)
    with pytest.raises(MissingExtraError, match=r'pip install "sb3_pg\[plots\]"'):
        score(results("npg", 1.0))
