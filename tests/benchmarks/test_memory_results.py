"""memory.py: its cases, its table, and one short run of each kind."""

from pathlib import Path
from typing import Any

import memory
import pytest
from bench_io import read_csv

from sb3_pg.zoo import ALGORITHMS, config_path


def row(case: memory.Case, algo: str, changes: tuple[str, ...], seed: int, final: float) -> dict[str, Any]:
    command = " ".join(["python benchmarks/learning.py", *(["--hyperparams", *changes] if changes else [])])
    measured = {"final_mean": final, "best_eval_mean": final, "wall_seconds": 60}
    return {"algo": algo, "env": case.env, "seed": seed, "steps": case.steps, "command": command} | measured


@pytest.mark.parametrize("name", memory.CASES)
def test_each_case_has_settings_and_names_its_variants_again(name: str) -> None:
    case = memory.CASES[name]
    assert f"\n{case.env}:" in config_path(case.algo).read_text()
    for variant, changes in case.variants.items():
        assert memory.variant_of(row(case, case.algo, changes, 0, 1.0)) == variant
    assert memory.variant_of(row(case, case.peer, case.of_peer, 0, 1.0)) == case.peer


def test_the_table_has_means_and_spreads_of_each_variant() -> None:
    case, rows = memory.CASES["cartpole"], []
    for seed, final in enumerate((400.0, 500.0)):
        rows += [row(case, case.algo, changes, seed, final) for changes in list(memory.MEMORY.values())[:2]]
    rows += [row(case, "ppo_lstm", (), seed, 500.0) for seed in range(5)]
    header, _, line = memory.table(rows, memory.MEMORY).splitlines()
    assert "RecurrentPPO" in header
    assert "| 450 ± 71 (2 seeds) | 450 ± 71 (2 seeds) | | 500 ± 0 |" in line


@pytest.mark.parametrize("name", ["cartpole", "grid", "taxi"])
def test_every_variant_and_peer_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = memory.CASES[name]
    short = memory.Case(case.algo, case.env, 1_200, case.variants, case.peer, case.of_peer)
    monkeypatch.setattr(memory, "CASES", {name: short})
    monkeypatch.setattr("learning.Run.evaluations", 1)
    output = tmp_path / "memory.csv"
    assert memory.main(["--cases", name, "--seeds", "100", "--jobs", "1", "--output", str(output)]) == 0
    rows = read_csv(output)
    assert sorted(map(memory.variant_of, rows)) == sorted([*case.variants, case.peer])
    assert len({r["config_hash"] for r in rows if r["algo"] in ALGORITHMS}) == len(case.variants)
