"""What AsyncActorCritic does when its actors are killed, and what an hour of it costs in memory.

    python benchmarks/actor_faults.py kills --kills 50
    python benchmarks/actor_faults.py long --seconds 3600

Protocol
--------
- CartPole-v1, 8 envs, ``--n-actors`` processes, 64 steps of each env per fragment, one torch thread per process.
- ``kills``: a random actor is killed (SIGKILL) when the actor that was killed before has recovered. ``recovery`` is the
  time from the signal until the learner gets a fragment of the actor that was started in its place. The model's
  count of steps must be that of all fragments. Rows are kills, in ``actor_kills.csv``.
- ``long``: every ``--every`` seconds, the resident memory of the learner and of its actors, the fragments that wait in
  the learner's process, and the largest lag since the latest row. ``slope`` is that of a straight line through the
  second half of the rows, in MiB per hour. Rows are in ``actor_memory.csv``.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
from bench_io import cpu_count, date_and_versions, format_table, make_parser, write_csv
from stable_baselines3.common.callbacks import BaseCallback

from sb3_pg import AsyncActorCritic
from sb3_pg.envs import make_vec_env
from sb3_pg.envs.actors.stream import Delivery, FragmentStream

RESULTS: Final = Path(__file__).resolve().parent / "results"
PACKAGES: Final = ("sb3_pg", "stable_baselines3", "gymnasium", "torch", "numpy")
N_ENVS, N_STEPS = 8, 64
KILLS_COLUMNS: Final = ("kill", "actor", "recovery", "n_actors", "cpu_count", "date", "versions")
LONG_COLUMNS: Final = (
    *("seconds", "learner_mib", "actors_mib", "queued", "lag_max", "timesteps"),
    *("n_actors", "cpu_count", "date", "versions"),
)


class KillingStream(FragmentStream):
    """Kills actors, one after the other."""

    #: how many it is to kill
    n_kills = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rng = random.Random(0)
        self.killed: int | None = None
        self.killed_at = 0.0
        self.recoveries: list[tuple[int, float]] = []
        #: in all fragments, and without the latest
        self.n_steps = self.n_steps_before = 0

    def next(self) -> Delivery:
        """As in the base class. Perhaps an actor is killed before."""
        if self.killed is None and len(self.recoveries) < self.n_kills:
            self.killed = self.rng.randrange(len(self._flights))
            worker: Any = self._envs.worker(self.killed)
            self.killed_at = time.monotonic()
            os.kill(worker._process.pid, signal.SIGKILL)
        delivery = super().next()
        assert delivery.state.timesteps is not None
        begins_anew = not delivery.state.timesteps.any()  # all envs were reset, as those of a new actor are
        if delivery.env.actor == self.killed and self.n_restarts > len(self.recoveries) and begins_anew:
            self.recoveries.append((self.killed, time.monotonic() - self.killed_at))
            self.killed = None
        self.n_steps_before = self.n_steps
        self.n_steps += delivery.fragment.rewards.size
        return delivery


class EndOfKills(BaseCallback):
    """Ends training when all kills are done, keeps the stream, and requires that all steps are counted.

    :raises RuntimeError: the model has not counted the steps of all fragments
    """

    stream: KillingStream

    def _on_rollout_start(self) -> None:
        stream: Any = self.model._stream  # type: ignore[attr-defined]
        self.stream = stream

        if self.model.num_timesteps != stream.n_steps_before:
            raise RuntimeError(f"{self.model.num_timesteps} steps were counted and {stream.n_steps_before} taken")

    def _on_step(self) -> bool:
        return len(self.stream.recoveries) < KillingStream.n_kills


def model_on(n_actors: int, **arguments: Any) -> AsyncActorCritic:
    """The algorithm with envs."""
    env = make_vec_env("CartPole-v1", N_ENVS, "actors", 0, n_actors=n_actors)
    return AsyncActorCritic("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu", **arguments)


def measure_kills(n_actors: int, n_kills: int) -> list[dict[str, Any]]:
    """One row per kill.

    :raises RuntimeError: the count of restarts is wrong
    """
    KillingStream.n_kills = n_kills
    end = EndOfKills()
    with patch("sb3_pg.algorithms.async_actor_critic.FragmentStream", KillingStream):
        model = model_on(n_actors, max_restarts=n_kills)
        model.learn(10**9, end)
    stream, env = end.stream, model.get_env()
    assert env is not None
    env.close()
    if stream.n_restarts != n_kills:
        raise RuntimeError(f"{stream.n_restarts} restarts")
    return [
        {"kill": i, "actor": actor, "recovery": round(seconds, 3)}
        for i, (actor, seconds) in enumerate(stream.recoveries, 1)
    ]


class Watch(BaseCallback):
    """Writes down what the processes hold, until the time is over.

    :param seconds: how long
    :param every: seconds between two rows
    """

    def __init__(self, seconds: float, every: float) -> None:
        super().__init__()
        self.seconds, self.every = seconds, every
        self.rows: list[dict[str, Any]] = []
        self.began = self.latest = time.monotonic()
        self.lag = self.queued = 0

    def _on_rollout_start(self) -> None:
        model: Any = self.model
        self.lag = max(self.lag, int(self.logger.name_to_value["rollout/policy_lag_max"]))
        self.queued = max(self.queued, model._stream.n_queued)
        now = time.monotonic()
        if now - self.latest < self.every:
            return
        self.latest = now
        workers = model._stream._envs._workers
        self.rows.append(
            {
                "seconds": round(now - self.began),
                "learner_mib": round(resident(os.getpid()), 1),
                "actors_mib": round(sum(resident(worker._process.pid) for worker in workers), 1),
                "queued": self.queued,
                "lag_max": self.lag,
                "timesteps": model.num_timesteps,
            }
        )
        self.lag = self.queued = 0
        print(self.rows[-1], file=sys.stderr, flush=True)

    def _on_step(self) -> bool:
        return time.monotonic() - self.began < self.seconds


def resident(pid: int) -> float:
    """Resident memory of a process, MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slope(rows: Sequence[dict[str, Any]], column: str) -> float:
    """MiB per hour, over the second half of the rows."""
    half = rows[len(rows) // 2 :]
    return float(np.polyfit([row["seconds"] / 3600 for row in half], [row[column] for row in half], 1)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save, print."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["kills", "long"])
    parser.add_argument("--n-actors", type=int, default=2)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    if options.kills < 1 or not 1 <= options.n_actors <= N_ENVS or min(options.seconds, options.every) <= 0:
        parser.error(f"--kills, --seconds and --every are more than 0, --n-actors is 1 to {N_ENVS}")
    torch.set_num_threads(1)
    stamps = {"n_actors": options.n_actors, "cpu_count": cpu_count(), **date_and_versions(PACKAGES)}
    if options.what == "kills":
        rows = measure_kills(options.n_actors, options.kills)
        seconds = [row["recovery"] for row in rows]
        write_csv(options.output or RESULTS / "actor_kills.csv", [row | stamps for row in rows], KILLS_COLUMNS)
        print(f"{len(rows)} kills, recovery {np.median(seconds):.2f} s, at most {max(seconds):.2f} s; steps exact")
        return 0
    watch = Watch(options.seconds, options.every)
    model = model_on(options.n_actors)
    model.learn(10**12, watch, log_interval=1000)
    env = model.get_env()
    assert env is not None
    env.close()
    write_csv(options.output or RESULTS / "actor_memory.csv", [row | stamps for row in watch.rows], LONG_COLUMNS)
    print(format_table(watch.rows[:: max(1, len(watch.rows) // 10)], LONG_COLUMNS[:6]))
    for column in ("learner_mib", "actors_mib"):
        print(f"slope of {column}: {slope(watch.rows, column):+.2f} MiB per hour")
    return 0


if __name__ == "__main__":
    sys.exit(main())
