"""Learning results of memory and of action masks, each beside the same class without, and beside the peer.

    python benchmarks/memory.py                      # everything that results/memory.csv does not have yet
    python benchmarks/memory.py --cases pendulum --seeds 0 1
    python benchmarks/memory.py --table

The protocol is that of ``learning.py``, and so are the columns. Each case trains one class with the settings in
``zoo_configs/``, and its variants change one argument: ``memory`` to None, then four observations side by side
(``frame_stack``), or ``use_action_masks`` to False. The settings were tuned with memory, and with masks. The peers are
sb3-contrib's RecurrentPPO with rl_zoo3's settings, where it has some, and MaskablePPO with its default arguments
(``masked_peer.yml``).
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import learning
from bench_io import Row, cpu_count, make_parser, read_csv

RESULTS: Final = Path(__file__).resolve().parent / "results" / "memory.csv"
MASKED_PEER: Final = str(Path(__file__).with_name("masked_peer.yml").relative_to(Path(__file__).resolve().parents[1]))
#: Name -> what it changes of the class's settings.
MEMORY: Final = {
    "memory": (),
    "4 observations": ("memory:None", "frame_stack:4"),
    "present observation": ("memory:None",),
}
#: SB3's VecFrameStack takes no Discrete observations, so they are made one-hot vectors before.
MEMORY_OF_DISCRETE: Final = MEMORY | {
    "4 observations": (*MEMORY["4 observations"], "env_wrapper:gymnasium.wrappers.FlattenObservation")
}
MASKS: Final = {"masks": (), "no masks": ("use_action_masks:False",)}


@dataclass(frozen=True)
class Case:
    """One class on one env.

    :param algo: name of the class in rl_zoo3
    :param env: id of the env
    :param steps: budget in env steps
    :param variants: what is changed of the class's settings
    :param peer: name of the peer in rl_zoo3, "" for none
    :param of_peer: arguments of ``learning.py`` for the peer
    """

    algo: str
    env: str
    steps: int
    variants: dict[str, tuple[str, ...]]
    peer: str = ""
    of_peer: tuple[str, ...] = ()

    def commands(self) -> Iterable[tuple[str, list[str]]]:
        """Yield the name of each variant and of the peer, and its arguments of ``learning.py``."""
        task = ["--env", self.env, "--steps", str(self.steps)]
        for name, changes in self.variants.items():
            yield name, ["--algo", self.algo, *task, *(["--hyperparams", *changes] if changes else [])]
        if self.peer:
            yield self.peer, ["--algo", self.peer, *task, *self.of_peer]


#: rl_zoo3 has no settings of RecurrentPPO for popgym.
_POPGYM_PEER = ("--hyperparams", "policy:MlpLstmPolicy", "n_envs:16", "n_steps:102", "batch_size:408", "gamma:0.9")
_MASKED_PEER = ("--config", MASKED_PEER)
#: rl_zoo3's settings for LunarLanderNoVel-v2, which is no longer registered.
_LUNAR_LANDER_PEER = (
    *("--hyperparams", "policy:MlpLstmPolicy", "normalize:True", "n_envs:32", "n_steps:512", "batch_size:128"),
    *("gae_lambda:0.98", "gamma:0.999", "n_epochs:4", "ent_coef:0.01"),
    "policy_kwargs:dict(ortho_init=False,activation_fn=nn.ReLU,lstm_hidden_size=64,net_arch=dict(pi=[64],vf=[64]))",
)
CASES: Final = {
    "cartpole": Case("kl_penalty_pg", "CartPoleNoVel-v1", 100_000, MEMORY, "ppo_lstm"),
    "pendulum": Case("trpo", "PendulumNoVel-v1", 100_000, MEMORY, "ppo_lstm"),
    "mountain-car": Case("trpo", "MountainCarContinuousNoVel-v0", 300_000, MEMORY, "ppo_lstm"),
    "lunar-lander": Case("kl_penalty_pg", "LunarLanderNoVel-v3", 300_000, MEMORY, "ppo_lstm", _LUNAR_LANDER_PEER),
    "repeat-previous": Case(
        "trpo", "popgym-RepeatPreviousEasy-v0", 200_000, MEMORY_OF_DISCRETE, "ppo_lstm", _POPGYM_PEER
    ),
    "position-only-cartpole": Case(
        "kl_penalty_pg", "popgym-PositionOnlyCartPoleHard-v0", 200_000, MEMORY, "ppo_lstm", _POPGYM_PEER
    ),
    "position-only-pendulum": Case(
        "trpo", "popgym-PositionOnlyPendulumHard-v0", 200_000, MEMORY, "ppo_lstm", _POPGYM_PEER
    ),
    "grid": Case("trpo", "MaskedGrid-v0", 50_000, MASKS, "maskable_ppo", _MASKED_PEER),
    "taxi": Case("actor_critic", "Taxi-v4", 200_000, MASKS, "maskable_ppo", _MASKED_PEER),
}
PEERS: Final = {"ppo_lstm": "RecurrentPPO", "maskable_ppo": "MaskablePPO"}


def variant_of(row: Row) -> str:
    """Return the name of a row's variant, or the peer's."""
    if row["algo"] in PEERS:
        return str(row["algo"])
    words = str(row["command"]).partition("--hyperparams")[2].split()
    (case,) = (case for case in CASES.values() if case.env == row["env"])
    (name,) = (name for name, changes in case.variants.items() if sorted(changes) == sorted(words))
    return name


def table(rows: Sequence[Row], variants: dict[str, tuple[str, ...]]) -> str:
    """Cases with these variants, one per line: mean over seeds +- standard deviation of the final policy's return.

    :param rows: of ``results/memory.csv``
    :param variants: the columns
    """
    # slow, and not before a worker has set its thread limits
    from tables import OURS, Cell, budget, markdown  # noqa: PLC0415

    lines, peers = [], set()
    for case in CASES.values():
        if set(case.variants) != set(variants):
            continue
        runs: dict[str, list[Row]] = {}
        for row in rows:
            if row["env"] == case.env and int(row["steps"]) == case.steps:
                runs.setdefault(variant_of(row), []).append(row)
        if not runs:
            continue
        columns = ("final_mean", "best_eval_mean", "wall_seconds")
        cells = {name: Cell(*([float(run[c]) for run in of_name] for c in columns)) for name, of_name in runs.items()}
        peers.add(PEERS[case.peer])
        names = (*variants, case.peer)
        minutes = (f"{sum(cells[n].seconds) / len(cells[n].seconds) / 60:.1f}" if n in cells else "" for n in names)
        shown = (str(cells.get(name, "")) for name in names)
        lines.append([case.env, budget(case.steps), f"`{OURS[case.algo]}`", *shown, ", ".join(minutes)])
    return markdown(["env", "env steps", "class", *variants, " ".join(sorted(peers)), "minutes of each"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, then print the tables. 1 if a run failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", help="variants and peers, default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(learning.REPORT_SEEDS))
    parser.add_argument("--jobs", type=int, default=cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables of --output and stop")
    options = parser.parse_args(arguments)
    failed = 0
    if not options.table:
        settings = ["--jobs", str(options.jobs), "--output", str(options.output), "--seeds", *map(str, options.seeds)]
        for case in options.cases:
            for name, command in CASES[case].commands():
                if options.only is None or name in options.only:
                    print(f"{case}, {name}", flush=True)
                    failed |= learning.main([*command, *settings])
    rows = read_csv(options.output)
    print(table(rows, MEMORY), table(rows, MASKS), sep="\n\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
