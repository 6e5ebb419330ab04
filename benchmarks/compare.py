"""Speed: this checkout against another one, in turns, one thread; the cases of speed.py.

    git worktree add /tmp/before COMMIT
    python benchmarks/compare.py /tmp/before --cases cartpole-1 a2c-5-1 --repeats 9

Two processes stay alive, each with one checkout's package and benchmarks. They time one repetition of a case after the
other, never at the same time: what the machine does meanwhile hits both. ``ratio`` is the median of the pairwise ratios
of env steps per second, this checkout / the other, with the least and greatest beside it. Who goes first alternates.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench_io import THREAD_VARIABLES, format_table, make_parser

HERE: Final = Path(__file__).resolve().parents[1]
FIGURES: Final = ("case", "this_rate", "other_rate", "ratio", "ratio_min", "ratio_max")


class Worker:
    """A process that times cases with one checkout's package.

    :param checkout: its root
    """

    def __init__(self, checkout: Path) -> None:
        paths = [str(checkout), str(checkout / "benchmarks")]
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1"), "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.argv = ['serve']\n{_SERVE}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=checkout / "benchmarks",
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """What the process answers.

        :raises RuntimeError: it has ended
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that times {request} has ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


# Standard output is for answers alone: whatever else is printed goes to standard error.
_SERVE: Final = """
import json, os
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch
from speed import ALL_CASES
from stable_baselines3.common.utils import set_random_seed
import sb3_pg
torch.set_num_threads(1)
cases = {case.name: case for case in ALL_CASES}
for line in sys.stdin:
    request = json.loads(line)
    if request:
        set_random_seed(request["repetition"])
        answer = cases[request["case"]].measures(request["repetition"], request["steps"])[0]().rate
    else:
        answer = [sb3_pg.__file__, *cases]
    print(json.dumps(answer), file=answers, flush=True)
"""


def measure(this: Any, other: Any, case: str, repeats: int, steps: int) -> dict[str, Any]:
    """One row: ``repeats`` times this and other, who begins alternating.

    :param this: has ``ask``, like the next
    :param other: likewise
    """
    pairs = []
    for repetition in range(repeats + 1):
        request = {"case": case, "repetition": repetition, "steps": steps}
        sides = (this, other) if repetition % 2 else (other, this)
        rates = [side.ask(request) for side in sides]
        pairs.append(rates if repetition % 2 else rates[::-1])
    pairs = pairs[1:]  # the first warms up
    ratios = [mine / theirs for mine, theirs in pairs]
    return {
        "case": case,
        "this_rate": round(statistics.median(mine for mine, _ in pairs)),
        "other_rate": round(statistics.median(theirs for _, theirs in pairs)),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen cases and print the table.

    :return: exit code: 1 if a ratio is below ``--least``
    """
    parser = make_parser(__doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--cases", nargs="+", help="default: all that both checkouts have")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20480, help="env steps per timing, about (default: %(default)s)")
    parser.add_argument("--least", type=float, default=0.0, help="exit with 1 where a ratio is lower")
    options = parser.parse_args(arguments)
    if not (options.other / "benchmarks" / "speed.py").is_file():
        parser.error(f"{options.other} is not the root of a checkout with benchmarks/speed.py")
    workers = Worker(HERE), Worker(options.other.resolve())
    (_, *mine), (_, *theirs) = (worker.ask({}) for worker in workers)
    shared = [case for case in mine if case in theirs]
    unknown = set(options.cases or ()).difference(shared)
    if unknown:
        parser.error(f"--cases: both checkouts have {', '.join(shared)}; not {', '.join(sorted(unknown))}")
    rows = []
    for case in options.cases or shared:
        print(f"{case} ...", file=sys.stderr, flush=True)
        rows.append(measure(*workers, case, options.repeats, options.steps))
    for worker in workers:
        worker.close()
    print(format_table(rows, FIGURES))
    return int(any(row["ratio"] < options.least for row in rows))


if __name__ == "__main__":
    sys.exit(main())
