import math
from pathlib import Path

import pytest
import staleness
import torch as th
from bench_io import read_csv

HALF = math.log(0.5)


@pytest.mark.parametrize(
    ("ratio", "horizon", "weights"),
    [
        ("per_step", 0, [0.5, 1, 1, 2, 2]),
        ("per_step", 1, [0.5, 2]),
        ("prefix", 0, [0.5, 0.5, 0.5, 2, 4]),
        ("trajectory", 0, [0.5, 4]),
        ("trajectory", 2, [0.5, 4]),
        ("trajectory", 1, [0.5, 2]),
    ],
)
def test_figures_are_of_the_weights_of_whole_or_cut_episodes(ratio: str, horizon: int, weights: list[float]) -> None:
    # two episodes: ratios 1/2, 1, 1 and 2, 2 and padding
    log_ratio = th.tensor([[HALF, -HALF], [0, -HALF], [0, 99]])
    valid = th.tensor([[True, True], [True, True], [True, False]])
    found = staleness.figures(log_ratio, valid, ratio, horizon)
    w = th.tensor(weights, dtype=th.double)
    assert found["ess"] == pytest.approx(float(w.sum() ** 2 / (w**2).sum() / len(w)))
    assert found["spread"] == pytest.approx(float(w.log().std()))
    assert found["largest"] == pytest.approx(float(w.max()))


def test_fresh_weights_are_all_one_and_later_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staleness, "STALENESS", (0, 1))
    output = tmp_path / "stale.csv"
    assert staleness.main(["--seeds", "100", "--warmup", "1", "--episodes", "2", "--output", str(output)]) == 0
    rows = read_csv(output)
    assert len(rows) == 2 * len(staleness.HORIZONS) * len(staleness.RATIOS)
    for row in rows:
        fresh = row["staleness"] == "0"
        assert (float(row["ess"]) == pytest.approx(1)) == fresh
        assert (float(row["spread"]) == pytest.approx(0, abs=1e-5)) == fresh
    assert output.with_suffix(".png").stat().st_size > 0
    assert capsys.readouterr().out.split()[:3] == ["ratio", "staleness", "ess"]


def test_published_products_wear_out_sooner_than_single_ratios() -> None:
    rows = [row for row in read_csv(staleness.RESULTS / "staleness.csv") if row["horizon"] == "0"]

    def ess(ratio: str, k: int) -> float:
        found = [float(row["ess"]) for row in rows if (row["ratio"], int(row["staleness"])) == (ratio, k)]
        assert len(found) == 5
        return sum(found) / len(found)

    assert ess("per_step", 16) > 0.9 > ess("prefix", 16)
    assert all(0 < float(row["ess"]) <= 1 + 1e-9 for row in rows)
