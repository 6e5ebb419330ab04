from pathlib import Path
from typing import Any

import growth
import pytest
from bench_io import read_csv
from speed_cases import reinforce
from speed_timing import Envs


@pytest.mark.parametrize("axis", growth.AXES)
def test_an_axis_is_measured_saved_and_drawn(axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"n_envs": (2, 64), "hidden": (4, 8), "samples": (2048, 4096)}[axis]
    monkeypatch.setitem(growth.AXES, axis, points)
    monkeypatch.setattr(growth, "ROLLOUT", 512)
    output = tmp_path / "growth.csv"
    assert growth.main(["--axes", axis, "--repeats", "1", "--output", str(output)]) == 0
    rows = read_csv(output)
    assert {(row["x"], row["side"]) for row in rows} == {(str(x), side) for x in points for side in growth.SIDES[axis]}
    assert all(float(row["least"]) == float(row["seconds"]) == float(row["greatest"]) > 0 for row in rows)
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_the_width_is_that_of_the_nets() -> None:
    env = Envs(growth.ENV, 2).make(0)
    model: Any = growth.with_width(lambda: reinforce(env, 8, 0), 5)
    assert model.policy.mlp_extractor.policy_net[0].out_features == 5
    assert model.policy_kwargs["optimizer_kwargs"] == {"alpha": 0.99, "eps": 1e-5}
