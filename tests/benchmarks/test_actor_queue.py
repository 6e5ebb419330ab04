"""The simulation of the learner's queue keeps to the arithmetic, and the script writes what it says."""

from pathlib import Path

import actor_queue
import pytest
from actor_queue import Times, simulate
from bench_io import read_csv


def test_few_actors_keep_the_learner_waiting() -> None:
    times = Times(collect=1.0, message=0.01, update=0.04)
    assert times.saturated_at == pytest.approx(21)
    for n in (1, 4, 10):
        shown = simulate(n, times, 2000)
        assert shown["rate"] == pytest.approx(n / (times.collect + times.message), rel=0.1)
        assert shown["learner_wait"] == pytest.approx(1 - shown["rate"] * (times.message + times.update), abs=0.01)


@pytest.mark.parametrize("n", [40, 100, 1000])
def test_many_actors_wait_for_the_learner(n: int) -> None:
    """Each gets its turn after all others, and a fragment more waits in the queue."""
    times = Times(collect=1.0, message=0.01, update=0.04)
    shown = simulate(n, times, 2000)
    assert shown["rate"] == pytest.approx(1 / (times.message + times.update), rel=0.01)
    assert shown["lag"] == pytest.approx(n + actor_queue.QUEUE_SIZE, rel=0.02)
    assert shown["learner_wait"] < 0.01
    assert shown["actor_wait"] == pytest.approx(1 - 20 / n, abs=0.02)


def test_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_queue, "CASES", {"sleep-32": ("Sleep-v0", 1, 4)})
    monkeypatch.setattr(actor_queue, "N_MEASURED", (2,))
    path = tmp_path / "queue.csv"
    assert actor_queue.main(["--fragments", "20", "--updates", "50", "--output", str(path)]) == 0
    rows = read_csv(path)
    assert [row["kind"] for row in rows] == ["measured"] + ["simulated"] * len(actor_queue.N_SIMULATED)
    assert path.with_suffix(".png").is_file()
    assert actor_queue.main(["--simulate", "--updates", "50", "--output", str(path)]) == 0
    assert read_csv(path) == rows
