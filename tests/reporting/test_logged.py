"""Metrics from ``progress.csv``: plots, the overview of one run, and the page that follows running trainings."""

from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.logger import CSVOutputFormat

from sb3_pg.cli import main
from sb3_pg.reporting import report
from sb3_pg.reporting.curves import LogError
from sb3_pg.reporting.logged import FILE, STEPS, full_name, overview, read_logged, read_rows
from sb3_pg.reporting.watch import LAYOUT, Follower


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose second row has more names than its first, and a word."""
    folder = tmp_path / "logs" / "npg" / "CartPole-v1_1"
    folder.mkdir(parents=True)
    log = CSVOutputFormat(str(folder / FILE))
    log.write({STEPS: 100, "rollout/ep_rew_mean": 20.0}, {})
    log.write({STEPS: 200, "rollout/ep_rew_mean": 30.0, "train/joint_kl": 0.01, "train/step_outcome": "accepted"}, {})
    log.write({STEPS: 300, "rollout/ep_rew_mean": 40.0, "train/joint_kl": 0.02, "train/step_outcome": "kl"}, {})
    log.close()
    np.savez(folder / "evaluations.npz", timesteps=[100, 300], results=[[20.0, 21.0], [40.0, 41.0]])
    return folder


def test_metrics_are_read_as_they_were_logged(run: Path) -> None:
    assert read_rows(run / FILE)[0] == {STEPS: 100, "rollout/ep_rew_mean": 20}
    (kl,) = read_logged(run, ["joint_kl"])
    assert (kl.label, kl.env) == ("npg", "CartPole-v1: train/joint_kl")
    assert kl.x.tolist() == [200, 300]
    assert kl.returns.tolist() == [[0.01, 0.02]]
    assert [curve.env for curve in overview(run)] == ["CartPole-v1: rollout/ep_rew_mean", "CartPole-v1: train/joint_kl"]


def test_a_row_that_is_being_written_waits(run: Path) -> None:
    with (run / FILE).open("a") as file:
        file.write("400,0.0")
    assert len(read_rows(run / FILE)) == 3


def test_names_that_were_not_logged_are_errors(run: Path) -> None:
    with pytest.raises(
        LogError, match="'entropy' was not logged; logged are rollout/ep_rew_mean, time/total_timesteps, tr"
    ):
        read_logged(run, ["entropy"])
    with pytest.raises(LogError, match=r"no progress\.csv in"):
        read_rows(run / "somewhere" / FILE)
    assert full_name("joint_kl", ["train/joint_kl", "train/rejected_kl"]) == "train/joint_kl"


def test_plot_draws_metrics(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "metrics.png"
    assert main(["plot", str(run), "--metrics", "joint_kl,ep_rew_mean", "-o", str(figure)]) == 0
    assert figure.stat().st_size > 10_000
    for options in (["--metrics", "entropy"], ["--metrics", "joint_kl", "--x-axis", "time"]):
        with pytest.raises(SystemExit):
            main(["plot", str(run), *options])
    error = capsys.readouterr().err
    assert "'entropy' was not logged" in error
    assert "takes neither --source nor --x-axis" in error


def test_report_on_one_run_draws_what_the_run_has_logged(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    assert report.main([str(run.parents[1]), "-o", str(folder)]) == 0
    assert (folder / "overview.png").is_file()
    assert not (folder / "summary.png").exists()


def test_the_page_follows_runs(run: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    follower = Follower(run.parents[1], tmp_path / "events")
    assert follower.update() == 3
    assert follower.update() == 0
    with (run / FILE).open("a") as file:
        file.write((run / FILE).read_text().splitlines()[-1].replace("300", "400") + "\n")
    assert follower.update() == 1
    follower.close()
    events = accumulator.EventAccumulator(str(tmp_path / "events" / "npg" / "CartPole-v1_1"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/joint_kl")] == [200, 300, 400]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_the_page_shows_names_that_are_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "logged_names.csv").read_text()
    charted = [name for charts in LAYOUT.values() for names in charts.values() for name in names]
    ours = [name for name in charted if name.startswith(("train/", "diagnostics/"))]
    assert ours
    assert all(f"\n{name};" in documented for name in ours)


def test_watch_needs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["watch", str(tmp_path)])
    assert "no evaluations.npz" in capsys.readouterr().err
