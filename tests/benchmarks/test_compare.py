from pathlib import Path
from typing import Any

import compare
import pytest

ROOT = Path(__file__).resolve().parents[2]


class Clocked:
    """Answers with given rates, and notes in which order the sides are asked."""

    def __init__(self, name: str, rates: list[float], log: list[str]) -> None:
        self.name, self.rates, self.log = name, rates, log

    def ask(self, request: dict[str, Any]) -> float:
        self.log.append(f"{self.name}{request['repetition']}")
        rate: float = self.rates[request["repetition"]]
        return rate


def test_sides_take_turns_and_the_ratio_is_within_a_repetition() -> None:
    log: list[str] = []
    this, other = Clocked("this", [1, 10, 40, 90], log), Clocked("other", [9, 20, 40, 30], log)
    row = compare.measure(this, other, "fake", repeats=3, steps=8)
    assert log == ["other0", "this0", "this1", "other1", "other2", "this2", "this3", "other3"]
    assert row == {
        "case": "fake",
        "this_rate": 40,
        "other_rate": 30,
        "ratio": 1.0,  # median of 0.5, 1, 3; the first repetition warms up
        "ratio_min": 0.5,
        "ratio_max": 3.0,
    }


def test_a_checkout_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ROOT), "--cases", "gae-1", "--repeats", "1", "--steps", "64", "--least", "1000"]
    assert compare.main(arguments) == 1
    assert "gae-1" in capsys.readouterr().out


def test_each_process_has_the_package_of_its_checkout() -> None:
    worker = compare.Worker(ROOT)
    package, *cases = worker.ask({})
    worker.close()
    assert Path(package).parent.parent == ROOT
    assert "cartpole-1" in cases


def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert "not the root of a checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(ROOT), "--cases", "cartpole-none"])
    assert "not cartpole-none" in capsys.readouterr().err
