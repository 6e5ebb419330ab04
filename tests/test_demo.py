"""``sb3-pg demo``: solves CartPole-v1, leaves its results behind, and admits it when it does not."""

from pathlib import Path

import pytest
from matplotlib import image

from sb3_pg import Reinforce
from sb3_pg.cli import main


def test_demo_that_stops_early_is_not_solved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path), "--n-timesteps", "5500"]) == 1
    output = capsys.readouterr()
    assert "is below 475.0" in output.err
    assert "not solved" in output.err
    assert Reinforce.load(tmp_path / "CartPole-v1.zip", device="cpu").num_timesteps >= 5500
    assert image.imread(tmp_path / "learning_curve.png").size > 0


@pytest.mark.slow
def test_demo_solves_cartpole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert "20 episodes, deterministic" in capsys.readouterr().out
