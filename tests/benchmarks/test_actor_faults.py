from pathlib import Path

import actor_faults
import pytest
from bench_io import read_csv


def test_kills(tmp_path: Path) -> None:
    path = tmp_path / "kills.csv"
    with pytest.warns(UserWarning, match="is started again"):
        assert actor_faults.main(["kills", "--kills", "2", "--output", str(path)]) == 0
    rows = read_csv(path)
    assert [row["kill"] for row in rows] == ["1", "2"]
    assert all(float(row["recovery"]) > 0 for row in rows)


def test_long(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    assert actor_faults.main(["long", "--seconds", "3", "--every", "0.2", "--output", str(path)]) == 0
    rows = read_csv(path)
    assert len(rows) >= 3
    assert all(float(row["learner_mib"]) > 10 and float(row["actors_mib"]) > 10 for row in rows)
    assert int(rows[-1]["timesteps"]) > 0


@pytest.mark.parametrize("wrong", [["kills", "--kills", "0"], ["long", "--every", "0"], ["kills", "--n-actors", "9"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        actor_faults.main(wrong)
