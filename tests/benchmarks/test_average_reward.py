"""average_reward.py: its figures, its settings, and short runs."""

from pathlib import Path
from typing import Any

import average_reward
import pytest
from bench_io import read_csv

from sb3_pg.envs import AccessControl


def row(seed: int, score: float, method: str = "average", overrides: str = "") -> dict[str, Any]:
    known = {"env": "Ant-v5", "steps": 10, "optimum": "", "episode_return": 100.0 * score}
    return known | {"method": method, "seed": seed, "average_reward": score, "overrides": overrides}


def test_figures() -> None:
    found, other = average_reward.figures([row(0, 1.0), row(1, 4.0), row(0, 9.0, overrides="gae_lambda=0.9")])
    assert (found["average_reward"], found["std"], found["worst"], found["seeds"]) == (2.5, 1.5, 1.0, 2)
    assert found["episode_return"] == 250.0
    assert other["method"] == "average gae_lambda=0.9"


def test_settings_differ_by_the_objective_alone() -> None:
    for env in average_reward.STEPS:
        average, discounted = (
            average_reward.hyperparams(average_reward.Run(env, method, 0, 10)) for method in ("average", "discounted")
        )
        assert discounted == {"gamma": 0.99}
        assert average.keys() <= {"objective", "normalize", "normalize_value_targets"}
        assert average["objective"] == "average"
        assert f"\n{env}:" in average_reward.CONFIG.read_text()
        assert "gamma" not in average_reward.CONFIG.read_text().replace("but for gamma", "")


@pytest.mark.slow
def test_short_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average_reward, "in_processes", lambda _, function, arguments: map(function, arguments))
    monkeypatch.setattr(average_reward, "HORIZON", 200)
    monkeypatch.setattr(average_reward, "N_EPISODES", 2)
    output = tmp_path / "runs.csv"
    command = ["run", "--envs", "AccessControl-v0", "--seeds", "100", "--steps", "6000", "--output", str(output)]
    assert average_reward.main(command) == 0
    rows = read_csv(output)
    assert [found["method"] for found in rows] == ["average", "discounted"]
    best = AccessControl().optimum()[0]
    for found in rows:
        assert 0.5 * best < float(found["average_reward"]) < 1.2 * best  # 2,000 steps are noisy
        assert float(found["optimum"]) == pytest.approx(best, abs=1e-4)
    before = output.read_bytes()
    assert average_reward.main(command) == 0  # done already
    assert output.read_bytes() == before


@pytest.mark.parametrize("wrong", [["--jobs", "0"], ["--seeds", "-1"], ["--steps", "0"]])
def test_wrong_options(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        average_reward.main(["table", *wrong])
