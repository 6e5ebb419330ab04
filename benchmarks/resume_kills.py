"""Exact resume: runs that are killed at random instants.

    python benchmarks/resume_kills.py --kills 100        # results/resume_kills.csv

The worker ``resume_run.py`` trains to the end once. Then it is started in another folder, killed (SIGKILL) at a random
instant of its training, and started again. A row is one kill: what the process was doing, and whether the run that
followed has the weights, optimizer state, monitor rows, logged values and evaluations of the uninterrupted one, to the
bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from bench_io import THREAD_VARIABLES, format_table, make_parser, merge_csv, versions

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results"
#: algorithm, env and backend of the runs that are killed, in turn
CASES: Final = (
    ("TRPO", "Hopper-v5", "dummy"),
    ("OffPAC", "Pendulum-v1", "dummy"),
    ("ActorCritic", "CartPole-v1", "vector"),
    ("Reinforce", "CartPole-v1", "subproc"),
    ("OffPolicyPG", "Hopper-v5", "subproc"),
)
KILL_COLUMNS: Final = ("case", "kill", "instant", "doing", "resumed_at", "exact", "versions")


class Run:
    """A run of resume_run.py in a folder, as a process.

    :param case: algorithm, env and backend
    :param folder: its folder
    :param every: steps between two checkpoints
    """

    def __init__(self, case: tuple[str, str, str], folder: Path, every: int) -> None:
        name, env_id, backend = case
        self.folder = folder / f"{name}-{env_id}"
        words = [sys.executable, str(HERE / "resume_run.py"), name, env_id, backend, str(folder), "--every", str(every)]
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")}
        (self.folder / "phase").unlink(missing_ok=True)
        self.process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, start_new_session=True)

    def wait_for_training(self) -> None:
        """Wait until the first rollout begins.

        :raises RuntimeError: the process has ended before
        """
        while self.phase == "starting":
            if self.process.poll() is not None:
                raise RuntimeError(self.error())
            time.sleep(0.01)

    @property
    def phase(self) -> str:
        """What the process is doing."""
        if list((self.folder / "checkpoints").glob(".*.tmp")):
            return "saving"
        path = self.folder / "phase"
        return (path.read_text() if path.exists() else "") or "starting"

    def end(self) -> dict[str, str]:
        """Wait for the end, and return the digests.

        :raises RuntimeError: the process has failed
        """
        if self.process.wait():
            raise RuntimeError(self.error())
        self.error()
        digests: dict[str, str] = json.loads((self.folder / "digest.json").read_text())
        return digests

    def kill(self) -> str:
        """Kill the process, and return what it was doing."""
        self.process.kill()
        self.process.wait()
        phase = self.phase
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # workers of a SubprocVecEnv
        self.error()
        return phase

    def error(self) -> str:
        """Return what the process has written to standard error."""
        assert self.process.stderr is not None
        with self.process.stderr as file:
            return file.read().decode()[-2000:]


def kill_runs(case: tuple[str, str, str], n_kills: int, seed: int, every: int) -> Iterator[dict[str, Any]]:
    """Kill runs of a case, and yield a row per kill.

    :param case: algorithm, env and backend
    :param n_kills: number of kills
    :param seed: of the instants
    :param every: steps between two checkpoints
    """
    instants = random.Random(f"{case} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(case, folder / "whole", every)
        run.wait_for_training()
        began = time.perf_counter()
        expected = run.end()
        duration = time.perf_counter() - began
        for kill in range(n_kills):
            run = Run(case, folder / str(kill), every)
            run.wait_for_training()
            instant = instants.uniform(0, duration)
            with_timeout = time.perf_counter() + instant
            while time.perf_counter() < with_timeout and run.process.poll() is None:
                time.sleep(0.001)
            doing = "ended" if run.process.poll() is not None else run.kill()
            again = Run(case, folder / str(kill), every)
            found = again.end()
            differences = [part for part in expected if found[part] != expected[part]]
            resumed_at = (again.folder / "resumed_at").read_text()
            shutil.rmtree(folder / str(kill))
            yield {
                "case": " ".join(case),
                "kill": kill,
                "instant": round(instant / duration, 3),
                "doing": doing,
                "resumed_at": resumed_at,
                "exact": "yes" if not differences else f"no: {' '.join(differences)}",
                "versions": versions("torch", "stable_baselines3", "gymnasium"),
            }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says.

    :return: exit code: 1 if a run has ended otherwise than the uninterrupted one
    """
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: %(default)s)")
    parser.add_argument("--every", type=int, default=128, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV file (default: %(default)s)")
    args = parser.parse_args(arguments)
    counts = [sum(1 for case in islice(cycle(CASES), args.kills) if case == wanted) for wanted in CASES]
    with ThreadPoolExecutor(args.processes) as pool:
        parts = pool.map(
            lambda pair: list(kill_runs(pair[0], pair[1], args.seed, args.every)), zip(CASES, counts, strict=True)
        )
        rows = [row for part in parts for row in part]
    merge_csv(args.output / "resume_kills.csv", rows, KILL_COLUMNS, ("case", "kill"))
    n_exact = sum(row["exact"] == "yes" for row in rows)
    print(format_table(rows, KILL_COLUMNS[:-1]))
    print(f"{n_exact} of {len(rows)} killed runs ended as the uninterrupted one, to the bit")
    return 0 if n_exact == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
