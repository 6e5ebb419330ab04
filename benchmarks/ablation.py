"""What matters on MuJoCo: TRPO's settings on Hopper-v4 and HalfCheetah-v4, changed one at a time.

    python benchmarks/ablation.py            # runs, table, results/ablation.csv, ablation_curves.csv and ablation.png
    python benchmarks/ablation.py --plot     # table and figure alone

Protocol: that of ``learning.py``, with 300k steps instead of the 1M of the configuration file's settings, and on
tuning seeds, as these runs were made to find settings. A change is on top of the configuration file and of STARTS,
which puts back what the file has taken from here; a schedule falls to 0 at the end of the shorter run.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import learning
from bench_io import cpu_count, format_table, make_parser, read_csv, row_key
from learning_spec import KEY, Run

OUTPUT = Path(__file__).resolve().parent / "results" / "ablation.csv"
ENVS = ("Hopper-v4", "HalfCheetah-v4")
STEPS = 300_000
SEEDS = (100, 101)
BASE = "unchanged"
STARTS: Mapping[str, tuple[str, ...]] = {"Hopper-v4": ("target_kl:lin_0.12",)}
CHANGES: Mapping[str, tuple[str, ...]] = {  # {policy_kwargs} stands for the configuration file's
    BASE: (),
    "2 passes of the critic": ("n_critic_updates:2",),
    "40 passes of the critic": ("n_critic_updates:40",),
    "critic's rate falls to 0": ("learning_rate:lin_0.001",),
    "batches of 512": ("n_envs:8", "n_steps:64"),
    "batches of 2048, 2 envs": ("n_envs:2", "n_steps:1024"),
    "batches of 2048, 32 envs": ("n_envs:32", "n_steps:64"),
    "no normalization": ("normalize:False",),
    "observations normalized alone": ("normalize:dict(norm_obs=True, norm_reward=False)",),
    "KL 0.02, constant": ("target_kl:0.02",),
    "KL 0.12, falling": ("target_kl:lin_0.12",),
    "damping 0.1": ("cg_damping:0.1",),
    "damping 2": ("cg_damping:2.0",),
    "lambda 0.9": ("gae_lambda:0.9",),
    "256 units": ("policy_kwargs:dict({policy_kwargs}, net_arch=[256, 256])",),
    "default init": ("policy_kwargs:dict({policy_kwargs}, ortho_init=False)",),
    "std 1 at first": ("policy_kwargs:dict({policy_kwargs}, log_std_init=0)",),
}


def plan(envs: Sequence[str], seeds: Sequence[int], steps: int) -> dict[str, list[Run]]:
    """The runs of each change; one that changes nothing on an env is left out there."""
    import learning_run  # noqa: PLC0415 (slow)

    runs: dict[str, list[Run]] = {}
    for env in envs:
        seen: set[str] = set()
        policy_kwargs = learning_run.resolve_hyperparams("trpo", env, {}, None).get("policy_kwargs", "dict()")
        for name, changes in CHANGES.items():
            changed = [change.replace("{policy_kwargs}", policy_kwargs) for change in changes]
            overrides = [*STARTS.get(env, ()), *changed]
            options = argparse.Namespace(
                algo=["trpo"], env=[env], seeds=seeds, steps=steps, hyperparams=overrides, config=None
            )
            for option in ("evaluations", "evaluation_episodes", "final_episodes"):
                setattr(options, option, getattr(Run, option))
            found = learning.plan(options)
            if found[0].config_hash not in seen:
                seen.add(found[0].config_hash)
                runs.setdefault(name, []).extend(found)
    return runs


def measured(runs: Mapping[str, Sequence[Run]], output: Path) -> dict[str, dict[str, list[float]]]:
    """Change -> env -> final returns of the runs that are done."""
    finals = {row_key(row, KEY): float(row["final_mean"]) for row in read_csv(output)}
    found: dict[str, dict[str, list[float]]] = {}
    for name, all_runs in runs.items():
        for run in all_runs:
            if run.key in finals:
                found.setdefault(name, {}).setdefault(run.env, []).append(finals[run.key])
    return found


def table(found: Mapping[str, Mapping[str, Sequence[float]]], envs: Sequence[str]) -> str:
    """One line per change: the mean on each env, and its difference from the settings unchanged."""
    lines = []
    for name, finals in found.items():
        line: dict[str, Any] = {"change": name}
        for env in envs:
            if env in finals:
                mean = statistics.fmean(finals[env])
                line |= {env: round(mean), f"seeds of {env}": " ".join(f"{value:.0f}" for value in finals[env])}
                line |= {f"+- {env}": round(mean - statistics.fmean(found[BASE][env]))}
        lines.append(line)
    columns = [column for env in envs for column in (env, f"+- {env}", f"seeds of {env}")]
    return format_table(lines, ("change", *columns))


def draw(found: Mapping[str, Mapping[str, Sequence[float]]], envs: Sequence[str]) -> Any:
    """A panel per env, a line per change: every run, and the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(4.6 * len(envs) + 1.6, 0.28 * len(found) + 1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(found)[::-1]
    for panel, env in zip(figure.subplots(1, len(envs), sharey=True, squeeze=False)[0], envs, strict=True):
        for height, name in enumerate(names):
            finals = found[name].get(env, ())
            panel.plot(finals, [height] * len(finals), "o", color="#88CCEE", markersize=4)
            if finals:
                panel.plot(statistics.fmean(finals), height, "|", color="#332288", markersize=11, markeredgewidth=2)
        panel.axvline(statistics.fmean(found[BASE][env]), color="gray", linewidth=0.8)
        panel.set(yticks=range(len(names)), title=env, xlabel="Return of the final policy")
        panel.set_yticklabels(names, fontsize="small")
        panel.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, print the table, draw the figure. 1 if a run failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--env", nargs="+", default=list(ENVS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="processes, one thread each; default: all CPUs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--plot", action="store_true", help="table and figure of what is done")
    options = parser.parse_args(arguments)
    if min(options.steps, options.jobs) < 1:
        parser.error("--steps and --jobs are 1 or more")
    try:
        learning.check_seeds(options.seeds, options.output)
    except ValueError as error:
        parser.error(str(error))
    runs = plan(options.env, options.seeds, options.steps)
    failed = 0
    if not options.plot:
        finished = {row_key(row, KEY) for row in read_csv(options.output)}
        todo = [run for all_runs in runs.values() for run in all_runs if run.key not in finished]
        failed = learning.run_all(todo, options.jobs, options.output)
    found = measured(runs, options.output)
    if any(env not in found.get(BASE, {}) for env in options.env):
        parser.error(f"{options.output} has no run of {BASE!r} on every env")
    print(table(found, options.env))
    draw(found, options.env).savefig(options.output.with_suffix(".png"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
