from pathlib import Path

import asynchronous
import asynchronous_rllib
import pytest
from bench_io import read_csv


def test_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "N_STEPS", 8)
    monkeypatch.setattr(asynchronous, "N_ENVS", 4)
    path = tmp_path / "rates.csv"
    arguments = ["rate", "--cases", "cartpole", "cartpole-balanced", "--repeats", "2", "--steps", "64"]
    assert asynchronous.main([*arguments, "--output", str(path)]) == 0
    rows = read_csv(path)
    assert [(row["case"], row["epochs"]) for row in rows] == [("cartpole", "1"), ("cartpole-balanced", "4")]
    for row in rows:
        assert float(row["async_rate"]) > 0
        assert float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert 0 < float(row["update"]) < 1


def test_lags(tmp_path: Path) -> None:
    path = tmp_path / "lags.csv"
    arguments = ["lag", "--lags", "1", "3", "--seeds", "1", "--steps", "1500", "--output", str(path)]
    assert asynchronous.main(arguments) == 0
    assert path.with_suffix(".png").is_file()
    rows = read_csv(path)
    assert [(row["lag"], row["correction"]) for row in rows] == [
        (lag, correction) for lag in ("1", "3") for correction in ("none", "vtrace")
    ]
    assert all(0 < float(row["measured_lag"]) <= float(row["lag"]) for row in rows)


@pytest.mark.parametrize("wrong", [["rate", "--repeats", "0"], ["rate", "--n-actors", "3"], ["lag", "--lags", "0"], []])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        asynchronous.main(wrong)


def test_what_rllib_returns() -> None:
    assert asynchronous_rllib.steps_of({"env_runners": {"num_env_steps_sampled_lifetime": 7.0}}) == 7
