"""How many actors can one learner take? The queue of AsyncActorCritic, simulated for 8 to 1,000 actors.

    python benchmarks/actor_queue.py                 # table, results/actor_queue.csv, results/actor_queue.png
    python benchmarks/actor_queue.py --simulate      # anew, from the times in results/actor_queue.csv

Protocol
--------
- Three times are measured, in seconds per fragment: ``collect``, which an actor takes from its order to its answer;
  ``message``, in which the learner reads an answer and sends the next order; ``update``, in which it plays the fragment
  and learns. ``hopper-64`` and ``hopper-256`` are fragments of so many steps of 4 Hopper-v5 envs, of one actor.
- The simulation does what ``FragmentStream`` does, with these times: actors collect at the same time, each on a core of
  its own. An answer waits in its actor until there is room in the learner's queue; the oldest orders come first. An
  actor gets its next order when its answer was read. ``collect`` varies by 10 % from fragment to fragment.
- ``sleep-32`` checks the simulation: an env that waits for a millisecond per step takes no core, so that many actors
  run on two cores. Rows of kind "measured" are real runs; ``times`` are those of its run with two actors.
- ``rate`` are fragments per second, ``lag`` is in updates, waits are shares of the time of the learner, and of all
  actors. ``saturated_at`` is ``1 + collect / (update + message)``: more actors only wait.
"""

import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from bench_io import date_and_versions, format_table, make_parser, read_csv, write_csv
from gymnasium.envs.registration import register
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_pg import AsyncActorCritic
from sb3_pg.envs import make_vec_env
from sb3_pg.envs.actors.stream import FragmentStream

RESULTS: Final = Path(__file__).resolve().parent / "results"
PACKAGES: Final = ("sb3_pg", "stable_baselines3", "gymnasium", "mujoco", "torch", "numpy")
#: Name -> env, envs of each actor, steps of each env in a fragment.
CASES: Final = {"hopper-64": ("Hopper-v5", 4, 64), "hopper-256": ("Hopper-v5", 4, 256), "sleep-32": ("Sleep-v0", 1, 32)}
N_SIMULATED: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
N_MEASURED: Final = (2, 4, 8, 16)
QUEUE_SIZE: Final = 1
SPREAD: Final = 0.1
TIMES: Final = ("collect", "message", "update")
FIGURES: Final = ("kind", "case", "n_actors", "rate", "lag", "learner_wait", "actor_wait")
COLUMNS: Final = (*FIGURES, *TIMES, "saturated_at", "date", "versions")
LOGGED: Final = (
    *("rollout/policy_lag_mean", "time/learner_wait_seconds", "time/actor_wait_seconds"),
    *("time/collect_seconds", "time/update_seconds"),
)
register("Sleep-v0", "actors:SlowEnv", kwargs={"spins": False})
COLORS: Final = {"hopper-64": "#CC3366", "hopper-256": "#117733", "sleep-32": "#4477AA"}


class Times(NamedTuple):
    """Seconds per fragment, see above."""

    collect: float
    message: float
    update: float

    @property
    def saturated_at(self) -> float:
        """Number of actors that keep the learner busy."""
        return 1 + self.collect / (self.update + self.message)


class Rows(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], *_: Any, **__: Any) -> None:
        """Keep one log."""
        self.rows.append(dict(key_values))

    def close(self) -> None:
        """Do nothing."""


class BusyStream(FragmentStream):
    """Measures the CPU seconds that the learner spends in reading answers and sending orders."""

    seconds = 0.0

    def next(self) -> Any:
        """As in the base class."""
        began = time.process_time()
        delivery = super().next()
        BusyStream.seconds += time.process_time() - began
        return delivery


def measure(case: str, n_actors: int, n_fragments: int) -> tuple[dict[str, float], Times]:
    """Train, and return what the run shows, and the times of one fragment.

    :param case: one of ``CASES``
    :param n_actors: processes
    :param n_fragments: to learn from
    """
    name, n_envs, n_steps = CASES[case]
    env = make_vec_env(name, n_envs * n_actors, "actors", 0, n_actors=n_actors)
    model = AsyncActorCritic("MlpPolicy", env, n_steps=n_steps, queue_size=QUEUE_SIZE, seed=0, device="cpu")
    logged = Rows()
    model.set_logger(Logger(None, [logged]))
    size = n_steps * n_envs
    model.learn(8 * n_actors * size, log_interval=None)
    BusyStream.seconds = 0.0
    began = time.perf_counter()
    model.learn(n_fragments * size, log_interval=1)
    seconds = time.perf_counter() - began
    env.close()
    rows = logged.rows[2 * n_actors :]  # in the first ones, the actors have begun at the same time
    lag, learner_wait, actor_wait, collect, update = (float(np.mean([row[name] for row in rows])) for name in LOGGED)
    rate = n_fragments / seconds
    message = BusyStream.seconds / n_fragments
    times = Times(n_actors / rate - actor_wait, message, collect + update - learner_wait - message)
    shown = {
        "rate": rate,
        "lag": lag,
        "learner_wait": learner_wait * rate,
        "actor_wait": actor_wait * rate / n_actors,
    }
    return shown, times


def simulate(n_actors: int, times: Times, n_updates: int, seed: int = 0) -> dict[str, float]:
    """Run the queue with simulated time, and return what a run would show.

    :param n_actors: number of actors
    :param times: of a fragment
    :param n_updates: that are counted, after as many rounds as make the start forgotten
    """
    rng = np.random.default_rng(seed)
    now = learner_wait = actor_wait = 0.0
    version, n_orders = 0, n_actors
    orders, versions = np.arange(n_actors), np.zeros(n_actors, dtype=int)
    ready_at = times.collect * rng.uniform(1 - SPREAD, 1 + SPREAD, n_actors)
    queue: deque[int] = deque()

    def read(block: bool) -> None:
        nonlocal now, learner_wait, actor_wait, n_orders
        if len(queue) >= QUEUE_SIZE:
            return
        if block and ready_at.min() > now:
            learner_wait += ready_at.min() - now
            now = float(ready_at.min())
        ready = np.flatnonzero(ready_at <= now)
        for i in ready[np.argsort(orders[ready])][: QUEUE_SIZE - len(queue)]:
            now += times.message
            queue.append(int(versions[i]))
            actor_wait += now - ready_at[i]
            orders[i], versions[i], n_orders = n_orders, version, n_orders + 1
            ready_at[i] = now + times.collect * rng.uniform(1 - SPREAD, 1 + SPREAD)

    lags: list[int] = []
    n_first = 4 * n_actors
    began = 0.0
    for update in range(n_first + n_updates):
        if update == n_first:
            began, learner_wait, actor_wait, lags = now, 0.0, 0.0, []
        read(block=False)
        while not queue:
            read(block=True)
        lags.append(version - queue.popleft())
        read(block=False)
        now += times.update
        version += 1
    seconds = now - began
    return {
        "rate": n_updates / seconds,
        "lag": float(np.mean(lags)),
        "learner_wait": learner_wait / seconds,
        "actor_wait": actor_wait / seconds / n_actors,
    }


def measured(n_fragments: int) -> list[dict[str, Any]]:
    """Return the rows of real runs: one of each case, and those that check the simulation."""
    rows = []
    with patch("sb3_pg.algorithms.async_actor_critic.FragmentStream", BusyStream):
        for case in CASES:
            for n_actors in N_MEASURED if case == "sleep-32" else (1,):
                print(f"{case}, {n_actors} actors ...", file=sys.stderr, flush=True)
                shown, times = measure(case, n_actors, n_fragments)
                rows.append({"kind": "measured", "case": case, "n_actors": n_actors, **shown, **times._asdict()})
    return rows


def simulated(rows: Sequence[dict[str, Any]], n_updates: int) -> list[dict[str, Any]]:
    """Return the rows of simulations, with the times of each case's first measured row."""
    made = []
    for case in CASES:
        row = next(row for row in rows if row["case"] == case)
        times = Times(*(float(row[name]) for name in TIMES))
        fixed = {
            **times._asdict(),
            "saturated_at": times.saturated_at,
            "date": row["date"],
            "versions": row["versions"],
        }
        for n in N_SIMULATED:
            shown = simulate(n, times, n_updates)
            made.append(rounded({"kind": "simulated", "case": case, "n_actors": n, **shown, **fixed}))
    return made


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Fragments per second, lag and waiting against the number of actors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for case, color in COLORS.items():
        for kind in ("simulated", "measured"):
            of_case = [row for row in rows if (row["kind"], row["case"]) == (kind, case)]
            if not of_case:
                continue
            x = [int(row["n_actors"]) for row in of_case]

            def column(name: str, of_case: Any = of_case) -> list[float]:
                return [float(row[name]) for row in of_case]

            style = "-" if kind == "simulated" else "o"
            label = f"{case}, {kind}"
            panels[0].plot(x, column("rate"), style, color=color, label=label)
            panels[1].plot(x, column("lag"), style, color=color, label=label)
            panels[2].plot(x, column("actor_wait"), style, color=color)
            if kind == "simulated":
                panels[2].plot(x, column("learner_wait"), ":", color=color)
                for panel in panels:
                    panel.axvline(float(of_case[0]["saturated_at"]), color=color, alpha=0.3, linewidth=1)
    for panel, name in zip(panels, ("Fragments per second", "Lag [updates]", "Share of time waiting"), strict=True):
        panel.set(xlabel="Actors", ylabel=name, xscale="log")
        panel.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].set_yscale("log")
    panels[0].legend()
    for style, label in (("-", "actors"), (":", "learner")):
        panels[2].plot([], [], style, color="black", label=label)
    panels[2].legend(loc="center right")
    return figure


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Round to four digits."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, simulate, save, print, draw."""
    parser = make_parser(__doc__)
    parser.add_argument("--simulate", action="store_true", help="with the times in the file")
    parser.add_argument("--fragments", type=int, default=1000, help="of each measured run")
    parser.add_argument("--updates", type=int, default=5000, help="of each simulated run")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "actor_queue.csv", help="CSV file; the figure is beside"
    )
    options = parser.parse_args(arguments)
    if min(options.fragments, options.updates) < 1:
        parser.error("--fragments and --updates are 1 or more")
    if options.simulate:
        rows: list[dict[str, Any]] = [row for row in read_csv(options.output) if row["kind"] != "simulated"]
    else:
        torch.set_num_threads(1)
        rows = [rounded(row) | date_and_versions(PACKAGES) for row in measured(options.fragments)]
    rows += simulated(rows, options.updates)
    write_csv(options.output, rows, COLUMNS)
    print(format_table(rows, (*FIGURES, *TIMES, "saturated_at")))
    draw(rows).savefig(options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
