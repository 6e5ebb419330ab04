import time
from pathlib import Path

import actors
import pytest
from bench_io import read_csv


def test_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "N_STEPS", 8)
    monkeypatch.setattr(actors, "N_ENVS", 2)
    path = tmp_path / "actors.csv"
    arguments = ["--repeats", "2", "--steps", "32", "--n-actors", "2", "--output", str(path)]
    assert actors.main([*arguments, "--cases", "collect-hopper", "train-sleep"]) == 0
    rows = read_csv(path)
    assert [(row["case"], row["n_actors"]) for row in rows] == [("collect-hopper", "2"), ("train-sleep", "2")]
    for row in rows:
        assert all(float(row[f"{side}_rate"]) > 0 for side in actors.SIDES)
        assert float(row["of_dummy_min"]) <= float(row["of_dummy"]) <= float(row["of_dummy_max"])
    assert rows[0]["actors_update"] == ""
    assert 0 < float(rows[1]["actors_update"]) < 1


def test_an_env_that_spins_takes_a_millisecond_of_its_process() -> None:
    env = actors.SlowEnv(spins=True)
    env.reset(seed=0)
    before = time.process_time()
    for _ in range(10):
        env.step(0)
    assert time.process_time() - before >= 0.01


@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--n-actors", "17"], ["--steps", "0"], ["--cases", "none"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        actors.main(wrong)
