"""demonstrations.py: its figures, and short experts and runs of each method."""

import json
import math
from pathlib import Path
from typing import Any

import demonstrations
import pytest
from bench_io import read_csv

from sb3_pg import Demonstrations
from sb3_pg.zoo import config_path


def points(method: str, seed: int, curve: dict[int, float], demonstrated: int) -> list[dict[str, Any]]:
    same = {"env": "CartPole-v1", "method": method, "expert": "full", "episodes": 10, "seed": seed}
    same |= {"expert_score": 100.0, "demonstrated": demonstrated}
    return [same | {"step": step, "mean": mean} for step, mean in curve.items()]


def test_figures_are_those_of_the_curves() -> None:
    rows = points("recipe", 0, {0: 80.0, 1000: 60.0, 2000: 90.0, 60_000: 1.0}, 700)
    rows += points("recipe", 1, {0: 100.0, 1000: 95.0}, 700)
    rows += points("scratch", 0, {1000: 5.0, 2000: 6.0}, 0)
    recipe, scratch = demonstrations.figures(rows)
    assert recipe["cloned"] == 90.0  # mean of 80 and 100
    assert recipe["worst"] == 0.75  # 60 of 80; what comes after 50,000 steps does not count
    assert recipe["steps_to_90"] == 1000  # 2000, and 0: the clone of seed 1 is good enough
    assert recipe["with_demos"] == 1700
    assert (scratch["cloned"], scratch["worst"], scratch["steps_to_90"]) == ("", "", math.inf)


@pytest.mark.parametrize("env", demonstrations.TASKS)
def test_each_task_has_settings(env: str) -> None:
    task = demonstrations.TASKS[env]
    assert f"\n{env}:" in config_path(task.algo).read_text()
    assert task.budget % task.every == 0


@pytest.mark.slow
def test_experts_and_one_run_of_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = demonstrations.Task("trpo", 4000, 2000, {"coef": 1.0, "decay": 0.99}, 1)
    monkeypatch.setitem(demonstrations.TASKS, "CartPole-v1", short)
    monkeypatch.setattr(demonstrations, "in_processes", lambda _, function, arguments: map(function, arguments))
    output, common = tmp_path / "runs.csv", ["--envs", "CartPole-v1", "--folder", str(tmp_path / "demos")]
    assert demonstrations.main(["experts", *common]) == 0
    scores = json.loads((tmp_path / "demos" / "CartPole-v1.json").read_text())
    assert scores["half"] < scores["full"]
    demos = Demonstrations.load(tmp_path / "demos" / "CartPole-v1_full.npz")
    assert demos.n_episodes == 30
    command = [
        "run",
        *common,
        "--methods",
        *demonstrations.METHODS,
        "--seeds",
        "100",
        "--episodes",
        "3",
        "--output",
        str(output),
    ]
    assert demonstrations.main(command) == 0
    rows = read_csv(output)
    assert {row["method"] for row in rows} == set(demonstrations.METHODS)
    assert {row["method"] for row in rows if row["step"] == "0"} == set(demonstrations.METHODS) - {"scratch"}
    assert output.with_suffix(".png").is_file()
    assert demonstrations.main(command) == 0  # nothing is done twice
    assert read_csv(output) == rows


@pytest.mark.parametrize("wrong", [[], ["run", "--episodes", "0"], ["run", "--seeds", "-1"], ["run", "--envs", "X-v0"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demonstrations.main(wrong)
