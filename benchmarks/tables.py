"""Tables of results for the documentation and the README, from the files in ``results/`` and ``published.csv``.

    python benchmarks/tables.py            # print them
    python benchmarks/tables.py --write    # put the README's table between its marks

A cell is the mean over seeds +- standard deviation of the final policy's return. ``targets.csv`` has what was aimed at:
a mean return that the best of some classes, or each of them, was to reach. ``published.csv`` has what others have
published, from these pages:

zoo        github.com/DLR-RM/rl-baselines3-zoo, benchmark.md: one run; the spread is that of its episodes
contrib    sb3-contrib.readthedocs.io, TRPO: three runs
tianshou   github.com/thu-ml/tianshou, examples/mujoco/README.md: ten runs, the best evaluation of each
omnisafe   github.com/PKU-Alignment/omnisafe, benchmarks/on-policy/README.md: five runs, on Safety-Gymnasium's variants
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_io import Row, make_parser, read_csv

from sb3_pg.reporting.curves import bootstrap_band
from sb3_pg.zoo import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
LEARNING = ROOT / "benchmarks" / "results" / "learning.csv"
IMPROVEMENTS = LEARNING.parent / "report" / "improvements.csv"
SPEED = LEARNING.parent / "speed.csv"
TRUST_REGION = LEARNING.parent / "trust_region.csv"
PUBLISHED = ROOT / "benchmarks" / "published.csv"
TARGETS = ROOT / "benchmarks" / "targets.csv"
README = ROOT / "README.md"

OURS = {name: algorithm.__name__ for name, algorithm in ALGORITHMS.items()}
OFF_POLICY = ("off_policy_pg", "off_pac")
OFF_POLICY_PEERS = {"ddpg": "DDPG", "sac": "SAC", "dqn": "DQN"}
PEERS = {"contrib_trpo": "sb3-contrib TRPO", "ppo": "SB3 PPO", "a2c": "SB3 A2C"}
ENVS = (
    *("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3", "LunarLanderContinuous-v3"),
    *("InvertedPendulum-v4", "Reacher-v4", "Swimmer-v4", "Hopper-v4", "HalfCheetah-v4", "Ant-v4"),
)


@dataclass(frozen=True)
class Cell:
    """The runs of one algorithm on one env and budget."""

    finals: Sequence[float]
    bests: Sequence[float]
    seconds: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.finals)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean."""
        low, high = bootstrap_band(np.array(self.finals)[:, None])
        return float(low[0]), float(high[0])

    def __str__(self) -> str:
        n = len(self.finals)
        few = "" if n == 5 else f" ({n} seed{'s' * (n > 1)})"
        return f"{spread(self.mean, statistics.stdev(self.finals) if n > 1 else 0)}{few}"


Cells = dict[tuple[str, int], dict[str, Cell]]  # (env, steps) -> algorithm -> its runs


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 2 else 2


def digits(value: float) -> str:
    """Three or four digits, as far as the numbers here tell anything."""
    return f"{value:.{_decimals(value)}f}"


def spread(mean: float, deviation: float) -> str:
    """``253 ± 27``, both with the decimals that the mean has."""
    return f"{digits(mean)} ± {deviation:.{_decimals(mean)}f}"


def budget(steps: int) -> str:
    """``300k``, ``1M``."""
    return f"{steps // 1000}k" if steps < 1_000_000 else f"{steps / 1e6:g}M"


def read_cells(rows: Iterable[Row]) -> Cells:
    """The runs by task and algorithm.

    :raises ValueError: runs of two configurations would be averaged
    """
    groups: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault((str(row["env"]), int(row["steps"])), {}).setdefault(str(row["algo"]), []).append(row)
    cells: Cells = {}
    for task, algos in groups.items():
        for algo, runs in algos.items():
            if len({run["config_hash"] for run in runs}) > 1:
                raise ValueError(f"{algo} on {task[0]} for {task[1]} steps: runs of several configurations")
            columns = ([float(run[name]) for run in runs] for name in ("final_mean", "best_eval_mean", "wall_seconds"))
            cells.setdefault(task, {})[algo] = Cell(*columns)
    return cells


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def tasks(cells: Cells, algos: Iterable[str], known: bool) -> list[tuple[str, int]]:
    """The tasks on which one of ``algos`` has runs: those of ENVS in its order, or (not ``known``) the others."""
    chosen = set(algos)
    found = [task for task, cell in cells.items() if chosen & set(cell) and (task[0] in ENVS) == known]
    return sorted(found, key=lambda task: (ENVS.index(task[0]) if known else 0, *task))


def class_table(cells: Cells, known: bool = True) -> str:
    """All classes on all tasks."""
    chosen = tasks(cells, OURS, known)
    classes = [algo for algo in OURS if any(algo in cells[task] for task in chosen)]
    lines = [[env, budget(steps), *(str(cells[env, steps].get(algo, "")) for algo in classes)] for env, steps in chosen]
    return markdown(["env", "env steps", *(f"`{OURS[algo]}`" for algo in classes)], lines)


def published_text(published: Sequence[Row], env: str, steps: int) -> str:
    """``TRPO 3372 ± 215 (contrib, Hopper-v3); ...``: after as many steps, or, if there are none, after others."""
    of_env = [row for row in published if row["env"] == env]
    same = [row for row in of_env if int(row["steps"]) == steps]
    texts = []
    for row in same or of_env:
        score = f"{row['algorithm']} {spread(float(row['mean']), float(row['spread']))}"
        after = "" if same else f" after {budget(int(row['steps']))}"
        texts.append(f"{score}{after} ({row['source']}, {row['published_env']})")
    return "; ".join(texts)


def peer_table(cells: Cells, published: Sequence[Row]) -> str:
    """The best of our on-policy classes beside the peers' runs here, and beside what is published."""
    on_policy = [algo for algo in OURS if algo not in OFF_POLICY]
    chosen = tasks(cells, on_policy, True)
    peers = {algo: name for algo, name in PEERS.items() if any(algo in cells[task] for task in chosen)}
    lines = []
    for env, steps in chosen:
        cell = cells[env, steps]
        best = max((algo for algo in on_policy if algo in cell), key=lambda algo: cell[algo].mean)
        runs = cell[best]
        lines.append(
            [
                env,
                budget(steps),
                f"`{OURS[best]}` {runs}",
                f"{digits(min(runs.finals))}, {digits(max(runs.finals))}",
                digits(statistics.fmean(runs.bests)),
                f"{statistics.median(runs.seconds) / 60:.1f}",
                *(str(cell.get(peer, "")) for peer in peers),
                published_text(published, env, steps),
            ]
        )
    header = ["env", "env steps", "best of ours", "worst, best seed", "best of curve", "minutes", *peers.values()]
    return markdown([*header, "published"], lines)


def off_pac_table(cells: Cells) -> str:
    """``OffPAC`` beside SB3's off-policy algorithms."""
    lines = []
    for env, steps in tasks(cells, ["off_pac"], True):
        cell = cells[env, steps]
        line = [env, budget(steps)]
        for algo in ("off_pac", *OFF_POLICY_PEERS):
            runs = cell.get(algo)
            worst_best = f"{digits(min(runs.finals))}, {digits(max(runs.finals))}" if runs else ""
            line += [str(runs or ""), worst_best]
        lines.append(line)
    names = (f"`{OURS['off_pac']}`", *OFF_POLICY_PEERS.values())
    return markdown(["env", "env steps", *(text for name in names for text in (name, "worst, best"))], lines)


def target_table(cells: Cells, targets: Sequence[Row]) -> str:
    """What was aimed at, and what was reached by the best of several classes, or the last where each is to reach it."""
    lines = []
    for row in targets:
        env, steps, target, algos = row["env"], int(row["steps"]), float(row["target"]), row["algos"].split()
        cell = cells[env, steps]
        counts = {"best": max, "each": min}[row["by"]](algos, key=lambda algo: cell[algo].mean)
        names = (" or " if row["by"] == "best" else ", ").join(f"`{OURS[algo]}`" for algo in algos)
        low, high = cell[counts].interval
        short = target - cell[counts].mean
        lines.append(
            [
                env,
                budget(steps),
                f"{target:g}",
                names,
                f"`{OURS[counts]}` {cell[counts]}",
                f"{digits(low)} to {digits(high)}",
                f"**{digits(short)}**" if short > 0 else "",
            ]
        )
    return markdown(["env", "env steps", "aimed at", "by", "reached", "95 % interval of the mean", "missed by"], lines)


def improvement_table(lines: Sequence[Row]) -> str:
    """How often a run of each class ends higher than one of each peer, as ``sb3-pg report`` has it."""
    cells = {(line["label"], line["against"]): line for line in lines}
    peers = [peer for peer in PEERS if any(peer == against for _, against in cells)]

    def cell(algo: str, peer: str) -> str:
        line = cells.get((algo, peer))
        if line is None:
            return ""
        low, point, high = (float(line[name]) for name in ("low", "probability", "high"))
        return f"{point:.2f} ({low:.2f} to {high:.2f}), {line['envs']} envs"

    classes = [algo for algo in OURS if any((algo, peer) in cells for peer in peers)]
    body = [[f"`{OURS[algo]}`", *(cell(algo, peer) for peer in peers)] for algo in classes]
    return markdown(["", *(f"ends higher than {PEERS[peer]}" for peer in peers)], body)


def tables() -> dict[str, str]:
    """Those of the documentation, by name."""
    cells = read_cells(read_csv(LEARNING))
    made = {
        "peers": peer_table(cells, read_csv(PUBLISHED)),
        "classes": class_table(cells),
        "off_pac": off_pac_table(cells),
        "targets": target_table(cells, read_csv(TARGETS)),
        "improvements": improvement_table(read_csv(IMPROVEMENTS)),
    }
    return made | ({"untuned": class_table(cells, known=False)} if tasks(cells, OURS, False) else {})


#: Peer -> cases of ``speed.csv`` in the README.
README_SPEED = {
    "SB3's A2C": ("a2c-5-1", "a2c-5-8", "cartpole-1", "cartpole-8", "hopper-8", "halfcheetah-8", "vector-cartpole-64"),
    "sb3-contrib's TRPO": ("trpo-cartpole-8", "trpo-hopper-8"),
}
README_TASKS = (("Hopper-v4", 1_000_000), ("HalfCheetah-v4", 1_000_000), ("Ant-v4", 1_000_000))


def why_table(cells: Cells, speed: Sequence[Row], trust_region: Sequence[Row]) -> str:
    """Why somebody should take this package: speed, scores, correctness, compatibility; for the README."""
    ratios = {str(row["case"]): float(row["ratio"]) for row in speed}
    faster = []
    for peer, cases in README_SPEED.items():
        of_peer = [ratios[case] for case in cases]
        faster.append(f"{min(of_peer):.1f} to {max(of_peer):.1f} times the env steps per second of {peer}")
    scores = []
    for env, steps in README_TASKS:
        means = {algo: cell.mean for algo, cell in cells[env, steps].items()}
        best = [max(means[algo] for algo in algos if algo in means) for algos in (OURS, PEERS)]
        scores.append(f"{env} {digits(best[0])} (peers {digits(best[1])})")
    excess: dict[bool, list[float]] = {True: [], False: []}
    for row in trust_region:
        if row["dims"] == "17":
            excess[row["implementation"] == "ours"].append(float(row["mean_kl"]) / float(row["target_kl"]))
    peers = f"best of ours and of the peers ({', '.join(PEERS.values())})"
    (our_least, our_most), (least, most) = ((min(excess[side]), max(excess[side])) for side in (True, False))
    kl = f"sb3-contrib's TRPO allows 17 times `target_kl` and takes steps of {least:.1f} to {most:.1f} times"
    kl += f", ours of {our_least:.1f} to {our_most:.1f} times"
    oracle = "the expectation of every estimator equals an exact sum over all trajectories of a small MDP"
    drop_in = (
        "SB3's tests of A2C and sb3-contrib's tests of TRPO pass with our classes, but for the name of one folder; "
    )
    drop_in += "of 46 tests of RecurrentPPO and MaskablePPO, 38 pass, 7 ask for what differs on purpose, and one asks "
    drop_in += "for a score that two seeds of five reach"
    lines = [
        ["Speed", f"{'; '.join(faster)}, one thread, CPU", "`benchmarks/speed.py`"],
        ["Scores", f"after 1M steps, mean of 5 seeds, {peers}: {', '.join(scores)}", "`benchmarks/learning.py`"],
        [
            "Correctness",
            f"{oracle}; with 17 action dimensions {kl}",
            "`tests/oracle`, `benchmarks/trust_region.py`",
        ],
        ["Compatibility", drop_in, "`benchmarks/peer_tests.py`"],
    ]
    return markdown(["", "measured", "by"], lines)


def readme_tables() -> dict[str, str]:
    """Those of the README, by the name in their marks."""
    cells = read_cells(read_csv(LEARNING))
    return {"why": why_table(cells, read_csv(SPEED), read_csv(TRUST_REGION))}


def insert(text: str, made: dict[str, str]) -> str:
    """The text with the tables between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.

    :raises ValueError: a table has no place in the text
    """
    end = "<!-- end of table -->"
    for name, table in made.items():
        start = f"<!-- table: {name} -->"
        if text.count(start) != 1:
            raise ValueError(f"{start} is in the text {text.count(start)} times, not once")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, or write."""
    parser = make_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="put the README's table into it")
    options = parser.parse_args(arguments)
    made = tables()
    if options.write:
        README.write_text(insert(README.read_text(), readme_tables()))
    else:
        print("\n\n".join(made.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
