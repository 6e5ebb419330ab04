"""Runs in processes of their own: resumed, killed, and what checkpoints cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resume_cost
import resume_kills
import resume_run
from bench_io import read_csv

WORKER = Path(resume_run.__file__)
ENVS = ("CartPole-v1", "Pendulum-v1", "Hopper-v5")


def run(backend: str, folder: Path, *arguments: str) -> None:
    """Train each algorithm on each env in a process of its own."""
    names, env_ids = ",".join(resume_run.ARGUMENTS), ",".join(ENVS)
    command = [sys.executable, str(WORKER), names, env_ids, backend, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dummy", "subproc", "vector"])
def test_resumed_in_a_fresh_process_all_is_the_same(backend: str, tmp_path: Path) -> None:
    """Weights, optimizers, monitor rows, logged values and evaluations of 7 algorithms on 3 envs."""
    run(backend, tmp_path / "whole")
    run(backend, tmp_path / "cut", "--stop-at", "900")
    run(backend, tmp_path / "cut")
    for name in resume_run.ARGUMENTS:
        for env_id in ENVS:
            if not resume_run.is_possible(name, env_id, backend):
                continue
            whole, cut = (tmp_path / part / f"{name}-{env_id}" for part in ("whole", "cut"))
            digests = [json.loads((folder / "digest.json").read_text()) for folder in (whole, cut)]
            assert digests[0] == digests[1], f"{name} on {env_id}"
            assert 0 < int((cut / "resumed_at").read_text()) <= 900, f"{name} on {env_id}"
            assert (whole / "resumed_at").read_text() == "0"


@pytest.mark.slow
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path: Path) -> None:
    assert resume_kills.main(["--kills", "10", "--output", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "resume_kills.csv")
    assert len(rows) == 10
    assert {row["exact"] for row in rows} == {"yes"}
    assert len({row["case"] for row in rows}) == len(resume_kills.CASES)


def test_costs_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resume_cost.CASES, "cartpole-8", (20_000, 5_000))
    assert resume_cost.main(["--cases", "cartpole-8", "--repeats", "1", "--output", str(tmp_path)]) == 0
    (row,) = read_csv(tmp_path / "resume_cost.csv")
    assert int(row["checkpoints"]) >= 4
    assert 0 < float(row["seconds"]) < 10
    assert 0 < float(row["share"]) < 1
