"""What demonstrations buy, and whether a cloned policy keeps its score when it goes on learning.

    python benchmarks/demonstrations.py experts          # train the experts, record their demonstrations
    python benchmarks/demonstrations.py run              # 10 episodes, seeds 0 to 4: results/demonstrations.csv
    python benchmarks/demonstrations.py run --episodes 1 3 30 --methods recipe --seeds 0 1 2
    python benchmarks/demonstrations.py run --experts half --methods recipe --seeds 0 1 2
    python benchmarks/demonstrations.py run --envs Hopper-v5 --methods moving --seeds 0 1 2
    python benchmarks/demonstrations.py table            # the table, and results/demonstrations.png

Protocol
--------
- An expert is ``TASKS``' class, trained with its settings in ``zoo_configs/`` on seed 100. "half" is the same run when
  its score had come nearest to half of the final one. Their demonstrations, with sampled actions, which show how an
  expert recovers, are in ``--folder``.
- ``scratch``: the same class and settings without demonstrations. ``recipe``: ``pretrain`` with its default arguments,
  ``warm_up_critic`` and a ``KLAnchor`` as in ``TASKS``, then ``learn``. It was fixed on seeds from 100 up.
- ``moving`` is ``recipe`` with ``freeze_normalization=False``: the statistics of VecNormalize go on. It ends after
  50,000 steps.
- ``ppo`` and ``a2c`` are what people do by hand: the actor of SB3's class, with rl_zoo3's settings, is cloned by
  ``ActorCritic.pretrain`` without critic and with all of the expert's certainty (``min_std=0``), and learns on at once.
  Statistics of observations stay as they are for them too, which people do not do.
- Every ``every`` env steps the deterministic policy plays 20 episodes in envs of their own. Step 0 is the cloned
  policy, with 50 episodes. A run ends where 90 % of the expert's score is reached and 50,000 steps are over, or at the
  budget; those of ``ppo`` and ``a2c`` after 50,000 steps. Steps of ``warm_up_critic`` count.
- ``worst`` is the least evaluation in the first 50,000 steps, as a share of the cloned policy's score. ``steps_to_90``
  is the first evaluation with 90 % of the expert's score; ``with_demos`` adds the steps of the demonstrations.
"""

import contextlib
import copy
import io
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench_io import Row, cpu_count, date_and_versions, format_table, limit_threads, make_parser, merge_csv, read_csv

RESULTS: Final = Path(__file__).resolve().parent / "results" / "demonstrations.csv"
PACKAGES: Final = ("sb3_pg", "stable_baselines3", "rl_zoo3", "gymnasium", "mujoco", "torch", "numpy")
KEY: Final = ("env", "method", "expert", "episodes", "seed", "step")
COLUMNS: Final = (*KEY, "mean", "std", "expert_score", "demonstrated", "date", "versions")
FIGURES: Final = ("env", "method", "expert", "episodes", "seeds", "cloned", "worst", "steps_to_90", "with_demos")
METHODS: Final = ("scratch", "recipe", "ppo", "a2c", "moving")
SHORT: Final = ("ppo", "a2c", "moving")  # end after FIRST steps
EXPERT_SEED: Final = 100
FIRST: Final = 50_000  # env steps in which a collapse would show
SHARE: Final = 0.9


@dataclass(frozen=True)
class Task:
    """An env, who shows how it is done, and how the cloned policy goes on.

    :param algo: name of the class in rl_zoo3
    :param budget: env steps of the expert, and of each run at most
    :param every: env steps between evaluations
    :param anchor: arguments of ``KLAnchor``
    :param n_warm_ups: rollouts of ``warm_up_critic``
    """

    algo: str
    budget: int
    every: int
    anchor: dict[str, float]
    n_warm_ups: int = 5


TASKS: Final = {
    "CartPole-v1": Task("trpo", 100_000, 1000, {"coef": 1.0, "decay": 0.99}),
    "Hopper-v5": Task("trpo", 1_000_000, 5000, {"coef": 1.0, "decay": 0.99}),
    "HalfCheetah-v5": Task("trpo", 1_000_000, 5000, {"coef": 1.0, "decay": 0.99}),
}


@dataclass(frozen=True)
class Run:
    """A method, and what it has to learn from."""

    env: str
    method: str
    expert: str
    episodes: int
    seed: int
    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that tell runs apart."""
        return {name: getattr(self, name) for name in KEY if name != "step"}


def demonstrations_path(folder: Path, env: str, expert: str) -> Path:
    """File of an expert's demonstrations."""
    return folder / f"{env}_{expert}.npz"


def expert_scores(folder: Path, env: str) -> dict[str, float]:
    """Score of each expert: mean return of 50 episodes."""
    scores: dict[str, float] = json.loads((folder / f"{env}.json").read_text())
    return scores


# ---------------------------------------------------------------- one process each


@contextlib.contextmanager
def managed(algo: str, env: str, seed: int) -> Any:
    """Context with rl_zoo3's manager of a run, and the model that it makes."""
    import learning_run  # noqa: PLC0415 (after the limits)
    import torch  # noqa: PLC0415
    from stable_baselines3.common.utils import set_random_seed  # noqa: PLC0415

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        set_random_seed(seed)
        manager = learning_run.make_manager(algo, env, seed, TASKS[env].budget, {}, None, folder)
        experiment = manager.setup_experiment()
        assert experiment is not None
        yield manager, experiment[0]


def make_experts(env: str, folder: Path, episodes: int) -> None:
    """Train an expert, and record its demonstrations, and those of half an expert."""
    import learning_run  # noqa: PLC0415

    from sb3_pg import Demonstrations  # noqa: PLC0415

    task = TASKS[env]
    with managed(task.algo, env, EXPERT_SEED) as (manager, model):
        normalization = model.get_vec_normalize_env()

        def state() -> tuple[Any, Any]:
            statistics = None if normalization is None else (normalization.obs_rms, normalization.ret_rms)
            return copy.deepcopy((model.policy.state_dict(), statistics))

        snapshots: list[tuple[float, Any]] = []
        playground = learning_run.evaluation_env(manager, 10, learning_run.EVALUATION_SEED)
        evaluations = learning_run.Evaluations(
            playground, task.budget, 40, 10, True, lambda point: snapshots.append((point[1], state()))
        )
        model.learn(task.budget, evaluations, log_interval=None)
        final_env = learning_run.evaluation_env(manager, 50, learning_run.FINAL_SEED)
        score, _ = learning_run.evaluate(model, final_env, 50, True)
        half = min(snapshots, key=lambda snapshot: abs(snapshot[0] - 0.5 * score))[1]
        scores = {}
        for name, (weights, statistics) in {"full": state(), "half": half}.items():
            model.policy.load_state_dict(weights)
            if normalization is not None:
                normalization.obs_rms, normalization.ret_rms = statistics
            scores[name], _ = learning_run.evaluate(model, final_env, 50, True)
            demos = Demonstrations.from_model(model, env, episodes, deterministic=False, seed=EXPERT_SEED)
            demos.save(demonstrations_path(folder, env, name))
            print(f"{env}, {name}: {scores[name]:.0f}\n{demos.summary()}", file=sys.stderr, flush=True)
        (folder / f"{env}.json").write_text(json.dumps(scores))


def train(run: Run) -> list[Row]:
    """One run: its evaluations."""
    import learning_run  # noqa: PLC0415
    from stable_baselines3.common.callbacks import BaseCallback, CallbackList  # noqa: PLC0415

    from sb3_pg import ActorCritic, Demonstrations, KLAnchor  # noqa: PLC0415

    task, expert_score = TASKS[run.env], expert_scores(run.folder, run.env)[run.expert]
    demos = Demonstrations.load(demonstrations_path(run.folder, run.env, run.expert)).subset(max(run.episodes, 1))
    is_ours = run.method in ("scratch", "recipe", "moving")
    points: list[tuple[int, float, float]] = []
    with managed(task.algo if is_ours else run.method, run.env, run.seed) as (manager, model):

        def add(point: learning_run.Point) -> None:
            points.append(point[:3])

        class Enough(BaseCallback):
            """Ends the run where there is nothing more to see."""

            def _on_step(self) -> bool:
                reached = run.method in SHORT or any(mean >= SHARE * expert_score for _, mean, _ in points)
                return not (reached and self.num_timesteps >= (0 if run.method == "scratch" else FIRST))

        seed = learning_run.EVALUATION_SEED + 1000 * run.seed
        if run.method != "scratch":
            if is_ours:
                model.pretrain(demos, seed=run.seed, freeze_normalization=run.method == "recipe")
            else:
                clone = ActorCritic(
                    model.policy_class, model.get_env(), policy_kwargs=model.policy_kwargs, seed=run.seed, device="cpu"
                )
                clone.pretrain(demos, critic=False, min_std=0.0, seed=run.seed)
                model.policy.load_state_dict(clone.policy.state_dict())
            final_env = learning_run.evaluation_env(manager, 50, learning_run.FINAL_SEED + 1000 * run.seed)
            points.append((0, *learning_run.evaluate(model, final_env, 50, True)))
        playground = learning_run.evaluation_env(manager, 10, seed)
        evaluations = learning_run.Evaluations(playground, task.budget, task.budget // task.every, 20, True, add)
        if run.method in ("recipe", "moving"):
            model.anchor = KLAnchor(**task.anchor)
            model.warm_up_critic(task.n_warm_ups)
        model.learn(
            task.budget - model.num_timesteps,
            CallbackList([evaluations, Enough()]),
            log_interval=None,
            reset_num_timesteps=False,
        )
    stamps = {
        "expert_score": round(expert_score, 2),
        "demonstrated": 0 if run.method == "scratch" else demos.n_steps,
        **date_and_versions(PACKAGES),
    }
    return [
        run.identity | {"step": step, "mean": round(mean, 2), "std": round(std, 2)} | stamps
        for step, mean, std in points
    ]


# ---------------------------------------------------------------- table and figure


def figures(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One line for each method, expert and number of episodes: means over seeds, the worst of all seeds, medians."""
    runs: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        group = tuple(str(row[name]) for name in KEY[:4])
        runs.setdefault(group, {}).setdefault(str(row["seed"]), []).append(row)
    table = []
    for (env, method, expert, episodes), seeds in runs.items():
        cloned, worst, steps, demonstrated = [], [], [], 0
        for points in seeds.values():
            curve = sorted((int(row["step"]), float(row["mean"])) for row in points)
            target, demonstrated = SHARE * float(points[0]["expert_score"]), int(points[0]["demonstrated"])
            steps.append(next((step for step, mean in curve if mean >= target), math.inf))
            if curve[0][0] == 0:
                cloned.append(curve[0][1])
                worst.append(min(mean for step, mean in curve if step <= FIRST) / curve[0][1])
        median = statistics.median(steps)
        table.append(
            {
                "env": env,
                "method": method,
                "expert": expert,
                "episodes": int(episodes) if method != "scratch" else "",
                "expert_score": float(next(iter(seeds.values()))[0]["expert_score"]),
                "seeds": len(seeds),
                "cloned": round(statistics.fmean(cloned), 1) if cloned else "",
                "worst": round(min(worst), 2) if worst else "",
                "steps_to_90": median,
                "with_demos": median + demonstrated,
            }
        )
    return table


def draw(rows: Sequence[Row]) -> Any:
    """Return against env steps after cloning, a panel for each env, a line for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    colors = {"recipe": "#117733", "ppo": "#CC3366", "a2c": "#DDAA33"}
    names = {"recipe": "pretrain, warm_up_critic, KLAnchor", "ppo": "clone, then PPO", "a2c": "clone, then A2C"}
    envs = [env for env in TASKS if any(row["env"] == env for row in rows)]
    figure = Figure(figsize=(4 * len(envs), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(envs), squeeze=False)[0]
    for panel, env in zip(panels, envs, strict=True):
        for method, color in colors.items():
            seeds = sorted({str(row["seed"]) for row in rows if row["env"] == env})
            label: str | None = names[method]
            for seed in seeds:
                curve = sorted(
                    (int(row["step"]), float(row["mean"]))
                    for row in rows
                    if (row["env"], row["method"], str(row["seed"])) == (env, method, seed)
                    and (row["expert"], str(row["episodes"])) == ("full", "10")
                    and int(row["step"]) <= FIRST
                )
                if curve:
                    panel.plot(*zip(*curve, strict=True), "-", color=color, alpha=0.7, linewidth=1.2, label=label)
                    label = None
        score = next(float(row["expert_score"]) for row in rows if (row["env"], row["expert"]) == (env, "full"))
        panel.axhline(score, color="black", linestyle="--", linewidth=0.8, label="expert")
        panel.set(title=env, xlabel="Env steps after cloning", ylim=(min(0.0, panel.get_ylim()[0]), None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("Return, 20 episodes")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# ---------------------------------------------------------------- the command


def in_processes(jobs: int, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterable[Any]:
    """Yield the results of a function as they come, each from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=limit_threads, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(function, arguments)


def make_experts_of(task: tuple[str, Path, int]) -> None:
    """As :func:`make_experts`, with one argument."""
    make_experts(*task)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, save each run, print."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["experts", "run", "table"])
    parser.add_argument("--envs", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS[:-1]), help="default: without moving"
    )
    parser.add_argument("--experts", nargs="+", choices=["full", "half"], default=["full"])
    parser.add_argument("--episodes", nargs="+", type=int, default=[10], help="demonstrations; default: 10")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 to 4")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="processes, one thread each; default: all CPUs")
    parser.add_argument("--folder", type=Path, default=Path("demonstrations"), help="of the demonstrations")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; finished runs in it are kept")
    options = parser.parse_args(arguments)
    if min(options.jobs, *options.episodes) < 1 or min(options.seeds) < 0:
        parser.error("--jobs and --episodes are 1 or more, --seeds 0 or more")
    limit_threads()
    if options.what == "experts":
        options.folder.mkdir(parents=True, exist_ok=True)
        missing = [env for env in options.envs if not (options.folder / f"{env}.json").exists()]
        for _ in in_processes(options.jobs, make_experts_of, [(env, options.folder, 30) for env in missing]):
            pass
        return 0
    if options.what == "run":
        done = {tuple(row[name] for name in KEY[:5]) for row in read_csv(options.output)}
        runs = [
            Run(env, method, expert, 0 if method == "scratch" else episodes, seed, options.folder)
            for seed in options.seeds
            for env in options.envs
            for method in options.methods
            for expert in options.experts
            for episodes in options.episodes
        ]
        todo = [run for run in dict.fromkeys(runs) if tuple(map(str, run.identity.values())) not in done]
        for rows in in_processes(options.jobs, train, todo):
            merge_csv(options.output, rows, COLUMNS, KEY[:5])
            print(format_table(figures(rows), FIGURES), file=sys.stderr, flush=True)
    rows = read_csv(options.output)
    draw(rows).savefig(options.output.with_suffix(".png"))
    print(format_table(figures(rows), FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
