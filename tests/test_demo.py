"""``sb3-pg demo``: solves CartPole-v1, leaves its results behind, and admits it when it does not."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium.envs.classic_control import CartPoleEnv
from matplotlib import image

from sb3_pg import Reinforce
from sb3_pg.cli import main
from tests.helpers import parameters


def test_demo_that_stops_early_is_not_solved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path), "--n-timesteps", "5500"]) == 1
    output = capsys.readouterr()
    assert "is below 475.0" in output.err
    assert "not solved" in output.err
    assert Reinforce.load(tmp_path / "CartPole-v1.zip", device="cpu").num_timesteps >= 5500
    assert image.imread(tmp_path / "learning_curve.png").size > 0


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step: Any = CartPoleEnv.step
    left = iter(range(0))

    def counted(self: CartPoleEnv, action: Any) -> Any:
        if next(left, None) == 0:
            signal.raise_signal(signal.SIGINT)
        return step(self, action)

    def demo(folder: str) -> int:
        return main(["demo", "--output", str(tmp_path / folder), "--n-timesteps", "5500"])

    assert demo("whole") == 1
    with monkeypatch.context() as patched:
        patched.setattr(CartPoleEnv, "step", counted)
        for n_steps in (4000, 13_500):  # in the evaluation before the first step, and after it
            left = iter(range(n_steps, -1, -1))
            assert demo("cut") == 130
            assert "interrupted. Start it again to go on" in capsys.readouterr().err
    assert demo("cut") == 1
    assert "since it was resumed" in capsys.readouterr().out
    whole, cut = (Reinforce.load(tmp_path / folder / "CartPole-v1.zip", device="cpu") for folder in ("whole", "cut"))
    assert th.equal(parameters(cut), parameters(whole))


@pytest.mark.slow
def test_demo_solves_cartpole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert "20 episodes, deterministic" in capsys.readouterr().out
