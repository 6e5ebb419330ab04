import math
from pathlib import Path

import pytest
import race
import sb3_contrib
from bench_io import read_csv
from learning_run import Point
from rl_zoo3.utils import ALGOS

import sb3_pg


def points(*means: float) -> list[Point]:
    return [(2000 * i, mean, 0.0, float(i)) for i, mean in enumerate(means, 1)]


@pytest.mark.parametrize(
    ("means", "step"),
    [((475, 500), 2000), ((500, 474, 500, 480), 6000), ((100, 500), None), ((500, 0, 500, 0), None), ((), None)],
)
def test_the_first_of_two_in_a_row_is_the_finish(means: tuple[float, ...], step: int | None) -> None:
    found = race.finish(points(*means))
    assert (found and found[0]) == step


def test_who_does_not_arrive_is_in_the_median() -> None:
    rows = [{"algo": "actor_critic", "seconds": s, "steps": 1000 * s} for s in (1.0, 2.0, 3.0)]
    rows += [{"algo": "ppo", "seconds": s, "steps": 1000 * s} for s in (3.0, math.inf, math.inf)]
    ours, peer = race.summarize(rows)
    assert (ours["median_seconds"], ours["slower_than_actor_critic"], ours["solved"]) == (2.0, 1.0, 3)
    assert (peer["median_seconds"], peer["slower_than_actor_critic"], peer["solved"]) == (math.inf, math.inf, 1)


def test_a_race_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "race.csv"
    options = [
        "--algo",
        "actor_critic",
        "actor_critic:vector",
        "a2c",
        "--seeds",
        "100",
        "--limit",
        "4000",
        "--output",
        str(output),
    ]
    assert race.main(options) == 0
    rows = read_csv(output)
    assert [row["algo"] for row in rows] == ["a2c", "actor_critic", "actor_critic:vector"]
    assert all(len(row["evaluations"].split()) == 2 for row in rows)
    assert "slower_than_actor_critic" in capsys.readouterr().out


def test_both_trpos_race_under_names_of_their_own() -> None:
    assert (ALGOS["trpo"], ALGOS["contrib_trpo"]) == (sb3_pg.TRPO, sb3_contrib.TRPO)
    assert {"trpo", "contrib_trpo"} < set(race.ALGOS)


def test_published_races_can_be_summarized() -> None:
    rows = [row | {name: float(row[name]) for name in ("seconds", "steps")} for row in read_csv(race.OUTPUT)]
    summary = {line["algo"]: line for line in race.summarize(rows)}
    assert summary[race.REFERENCE]["slower_than_actor_critic"] == 1.0
    assert all(math.isfinite(line["least"]) for line in summary.values())
