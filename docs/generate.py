"""Pages and tables of the documentation that are made from the package and from ``benchmarks/results/``.

``main`` runs before each build. It writes ``algorithms/<name>.md``, one page for each row of ``ALGORITHMS`` in
``sb3_pg/algorithms/__init__.py``, from ``algorithms/template.md``, ``algorithms/texts/<name>.md`` and the class; and
``_tables/<name>.md``, which other pages include. Git ignores what it writes.
"""

import csv
import inspect
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import asynchronous
import demonstrations
import memory
import race
import replay
import tables
from bench_io import read_csv

from sb3_pg.algorithms import ALGORITHMS
from sb3_pg.algorithms.validation import split_doc
from sb3_pg.reporting.plots import draw
from sb3_pg.reporting.report import learning_curves
from sb3_pg.reporting.scores import read_results
from sb3_pg.zoo.registry import config_path

DOCS: Final = Path(__file__).resolve().parent
PAGES: Final = DOCS / "algorithms"
TABLES: Final = DOCS / "_tables"
FIGURES: Final = DOCS / "_figures"
RESULTS: Final = DOCS.parent / "benchmarks" / "results"
#: Peers in the results and curves of a page.
PEERS: Final = {**tables.PEERS, **tables.OFF_POLICY_PEERS}


def main() -> None:
    """Write all pages, tables and figures that have changed."""
    for name in ALGORITHMS:
        write(PAGES / f"{name}.md", algorithm_page(name))
    for name, table in all_tables().items():
        write(TABLES / f"{name}.md", table)


def write(path: Path, text: str) -> None:
    """Write a file, unless it holds this text already: Sphinx reads changed files again."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# -------------------------------------------------------------------- one page an algorithm


def algorithm_page(name: str) -> str:
    """Fill the template for one algorithm.

    :param name: a key of ``ALGORITHMS``
    :raises ValueError: the text has not the sections that the template asks for
    """
    cls = ALGORITHMS[name]
    before, arguments, _ = split_doc(inspect.getdoc(cls) or "")
    text = sections((PAGES / "texts" / f"{name}.md").read_text())
    template = (PAGES / "template.md").read_text()
    parts = {
        "class": cls.__name__,
        "name": name,
        "docstring": "\n".join(before),
        "arguments": argument_table(cls, arguments),
        "logged": logged_table(name),
        "results": result_table(name),
        "config": config_path(name).relative_to(DOCS.parent).as_posix(),
        **text,
    }
    wanted = set(re.findall(r"\{\{ ([\w -]+) \}\}", template))
    if wanted != parts.keys():
        raise ValueError(f"{name}: the template has {sorted(wanted)}, its text and the class {sorted(parts)}")
    return re.sub(r"\{\{ ([\w -]+) \}\}", lambda match: parts[match[1]], template)


def sections(text: str) -> dict[str, str]:
    """Split a text at its headings of level 2: heading in lower case -> text. What comes before them is "intro"."""
    intro, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    parts = (section.split("\n", 1) for section in rest)
    return {"intro": intro.strip(), **{heading.strip().lower(): body.strip() for heading, body in parts}}


def argument_table(cls: type, texts: Mapping[str, str]) -> str:
    """A reStructuredText table of a class's arguments: name, default, meaning."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 22 18 60", ""]
    lines += ["   * - argument", "     - default", "     - meaning"]
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name.startswith("_") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = "" if parameter.default is parameter.empty else f"``{parameter.default!r}``"
        # ":param name: text" over several lines
        meaning = " ".join(texts[parameter.name].partition(": ")[2].split())
        lines += [f"   * - ``{parameter.name}``", f"     - {default}", f"     - {meaning}"]
    return "\n".join(lines)


def logged_names() -> list[dict[str, str]]:
    """Rows of ``logged_names.csv``: what the algorithms log, and what a bad value means."""
    with (DOCS / "logged_names.csv").open() as file:
        return list(csv.DictReader(file, delimiter=";"))


def logged_table(name: str | None = None) -> str:
    """Logged names with unit and meaning.

    :param name: an algorithm, None for all
    """
    rows = [row for row in logged_names() if name is None or logs(row, name)]
    return tables.markdown(
        ["name", "unit", "meaning"],
        [[f"`{row['name']}` {row['when']}".strip(), row["unit"], row["meaning"]] for row in rows],
    )


def logs(row: Mapping[str, str], name: str) -> bool:
    """Whether an algorithm logs a name."""
    return row["algorithms"] == "all" or name in row["algorithms"].split()


def result_table(name: str) -> str:
    """Final returns of an algorithm and of the peers that were run on the same tasks, and their learning curves."""
    cells = tables.read_cells(read_csv(RESULTS / "learning.csv"))
    chosen = tables.tasks(cells, [name], True)
    if not chosen:
        return "No task was measured."
    peers = {peer: label for peer, label in PEERS.items() if any(peer in cells[task] for task in chosen)}
    lines = []
    for env, steps in chosen:
        cell = cells[env, steps]
        finals = cell[name].finals
        worst_best = f"{tables.digits(min(finals))}, {tables.digits(max(finals))}"
        others = (str(cell.get(peer, "")) for peer in peers)
        lines.append([env, tables.budget(steps), str(cell[name]), worst_best, *others])
    header = ["env", "env steps", f"`{ALGORITHMS[name].__name__}`", "worst, best seed", *peers.values()]
    class_name = ALGORITHMS[name].__name__
    figure = f"![Learning curves of {class_name} and of its peers]({curves(name)})"
    return f"{tables.markdown(header, lines)}\n\n{figure}"


def curves(name: str) -> str:
    """Draw an algorithm's learning curves beside those of the peers; return the figure's path from the page."""
    path = FIGURES / f"{name}.png"
    source = RESULTS / "learning_curves.csv"
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        results = read_results(RESULTS / "learning.csv")
        tasks = {(result.env, result.steps) for result in results if result.label == name}
        labels = [name, *PEERS]
        chosen = [r for r in results if (r.env, r.steps) in tasks and r.label in labels and r.env in tables.ENVS]
        chosen.sort(key=lambda r: (tables.ENVS.index(r.env), labels.index(r.label)))
        path.parent.mkdir(exist_ok=True)
        draw(
            learning_curves(chosen), labels=[label for label in labels if any(r.label == label for r in chosen)]
        ).savefig(path)
    return f"../{path.relative_to(DOCS).as_posix()}"


# -------------------------------------------------------------------- tables that pages include


def all_tables() -> dict[str, str]:
    """Name -> Markdown table."""
    return {
        **tables.tables(),
        "logged": logged_table(),
        "speed": speed_table(SPEED_CASES),
        "speed_parts": speed_table(SPEED_PARTS),
        "trust_region": trust_region_table(),
        "race": race_table(),
        "replay": replay_table(),
        "memory": memory.table(read_csv(memory.RESULTS), memory.MEMORY),
        "masks": memory.table(read_csv(memory.RESULTS), memory.MASKS),
        "actors": actors_table(),
        "asynchronous": asynchronous_table(),
        "actors_learning": actors_learning_table(),
        "demonstrations": demonstrations_table(),
        "algorithms": algorithm_table(),
        "api_algorithms": api_of_algorithms(),
    }


#: What is measured -> words for it; and the names of envs in ``actors.csv``.
ACTOR_CASES: Final = {
    "collect": "collecting",
    "apart": "limit of collecting",
    "train": "`ActorCritic`",
    "trpo": "`TRPO`",
}
ACTOR_ENVS: Final = {
    "hopper": "Hopper-v5",
    "cheetah": "HalfCheetah-v5",
    "spin": "1 ms of computing a step",
    "sleep": "1 ms of waiting a step",
}


def actors_table() -> str:
    """Env steps per second of two actors beside SB3's vectorized envs."""
    lines = []
    for row in read_csv(RESULTS / "actors.csv"):
        what, _, env = row["case"].partition("-")
        if env not in ACTOR_ENVS:
            continue
        rates = (number(row[f"{side}_rate"]) for side in ("dummy", "subproc", "actors"))
        ratios = (ratio_of(row, f"of_{side}") for side in ("dummy", "subproc"))
        lines.append([ACTOR_CASES[what], ACTOR_ENVS[env], *rates, *ratios])
    header = ["what", "env", "Dummy", "Subproc", "actors", "actors / Dummy", "actors / Subproc"]
    return tables.markdown(header, lines)


def number(text: str) -> str:
    """A whole number with commas; nothing for nothing."""
    return f"{int(text):,}" if text else ""


def ratio_of(row: Mapping[str, Any], name: str) -> str:
    """Median of a ratio, with least and greatest: ``1.8 (1.7-1.9)``; nothing for nothing."""
    if not row[name]:
        return ""
    return f"{row[name]} ({row[f'{name}_min']}-{row[f'{name}_max']})"


def asynchronous_table() -> str:
    """Env steps per second of AsyncActorCritic beside one process and RLlib."""
    rllib = {(row["env"], row["n_envs"]): int(row["rate"]) for row in read_csv(RESULTS / "asynchronous_rllib.csv")}
    lines = []
    for row in read_csv(RESULTS / "asynchronous.csv"):
        env, rate = asynchronous.CASES[row["case"]].env, int(row["async_rate"])
        theirs = rllib[env, row["n_envs"]]
        peer = f"{theirs:,} ({rate / theirs:.0f})" if row["epochs"] == "1" else ""
        share = f"{100 * float(row['update']):.0f} %"
        rates = f"{rate:,}", f"{int(row['one_rate']):,}"
        lines.append([env, row["n_envs"], row["epochs"], share, *rates, ratio_of(row, "ratio"), row["lag"], peer])
    what = ["env", "envs", "`n_epochs`", "updates take"]
    header = [*what, "asynchronous", "one process", "ratio", "lag", "IMPALA (times)"]
    return tables.markdown(header, lines)


def actors_learning_table() -> str:
    """Final returns with actors beside those without."""
    finals: dict[tuple[str, str, str, str], list[float]] = {}
    for row in read_csv(RESULTS / "actors_learning.csv"):
        task = row["env"], tables.budget(int(row["steps"])), tables.OURS[row["algo"]], row["n_actors"]
        finals.setdefault(task, []).append(float(row["final_mean"]))
    lines = []
    for (env, steps, name, n_actors), scores in sorted(finals.items()):
        score = tables.spread(statistics.fmean(scores), statistics.stdev(scores))
        lines.append([env, steps, f"`{name}`", n_actors or "none", score, tables.digits(min(scores))])
    return tables.markdown(["env", "steps", "class", "actors", "return", "worst seed"], lines)


#: Method of ``demonstrations.csv`` -> words for it.
DEMONSTRATION_METHODS: Final = {
    "scratch": "from scratch",
    "recipe": "the recipe",
    "moving": "the recipe, statistics go on",
    "ppo": "clone, then PPO",
    "a2c": "clone, then A2C",
}


def demonstrations_table() -> str:
    """What demonstrations buy, a line for each env, method, expert and number of episodes."""

    def number(value: Any, add: str = "") -> str:
        return "" if value == "" else "not reached" if value == math.inf else f"{value:,.0f}{add}"

    lines = []
    for row in demonstrations.figures(read_csv(demonstrations.RESULTS)):
        place = list(demonstrations.TASKS).index(row["env"]), list(DEMONSTRATION_METHODS).index(row["method"])
        line = [
            row["env"],
            DEMONSTRATION_METHODS[row["method"]],
            f"{row['expert_score']:,.0f}" + (" (half)" if row["expert"] == "half" else ""),
            number(row["episodes"]),
            number(row["cloned"]),
            "" if row["worst"] == "" else f"{row['worst']:.0%}",
            number(row["steps_to_90"]) if row["method"] not in demonstrations.SHORT else "",
            number(row["with_demos"]) if row["method"] == "recipe" else "",
            str(row["seeds"]),
        ]
        lines.append(((*place, row["expert"], int(row["episodes"] or 0)), line))
    header = ["env", "method", "expert", "episodes", "cloned policy", "worst in 50,000 steps", "steps to 90 %"]
    return tables.markdown([*header, "and steps shown", "seeds"], [line for _, line in sorted(lines)])


def algorithm_table() -> str:
    """Each algorithm with the first sentence of its page."""
    lines = []
    for name, cls in ALGORITHMS.items():
        intro = sections((PAGES / "texts" / f"{name}.md").read_text())["intro"]
        lines.append([f"[`{cls.__name__}`](/algorithms/{name}.md)", intro.split("\n\n")[0].replace("\n", " ")])
    return tables.markdown(["class", "is"], lines)


#: Methods that the API reference shows, beside those of every SB3 algorithm.
METHODS: Final = ("learn", "load", "collect_rollouts", "train", "predict", "add_trajectories")


def api_of_algorithms() -> str:
    """Entries of the API reference, one an algorithm."""
    entries = []
    for cls in ALGORITHMS.values():
        methods = ", ".join(name for name in METHODS if hasattr(cls, name))
        entries.append(f"```{{eval-rst}}\n.. autoclass:: sb3_pg.{cls.__name__}\n   :members: {methods}\n```")
    return "\n\n".join(entries)


#: Case of ``speed.csv`` -> how the table names it.
SPEED_CASES: Final = {
    "cartpole-1": "CartPole-v1, 1 env, 2048 steps per rollout",
    "cartpole-8": "CartPole-v1, 8 envs, 2048",
    "a2c-5-1": "CartPole-v1, 1 env, 5 (A2C's defaults)",
    "a2c-5-8": "CartPole-v1, 8 envs, 40 (A2C's defaults)",
    "hopper-8": "Hopper-v4, 8 envs, 2048",
    "halfcheetah-8": "HalfCheetah-v4, 8 envs, 2048",
    "vector-cartpole-64": "CartPole-v1, native vector env, 64 envs, 2048",
    "envpool-lander-64": "LunarLander-v3, EnvPool, 64 envs, 2048",
    "trpo-cartpole-8": "CartPole-v1, 8 envs, 2048",
    "trpo-hopper-8": "Hopper-v4, 8 envs, 2048",
}


#: Cases whose rates count other things than env steps, or whose peers are others than A2C and TRPO.
SPEED_PARTS: Final = {
    "trpo-update-8": "whole update of TRPO, 2048 samples",
    "fisher-64-2048": "Fisher-vector product, 64 hidden units, 2048 samples",
    "fisher-64-16000": "Fisher-vector product, 64 hidden units, 16000 samples",
    "fisher-256-2048": "Fisher-vector product, 256 hidden units, 2048 samples",
    "critic-8": "minibatch steps of the critic",
    "gae-1": "GAE, 2048 steps, 1 env",
    "gae-8": "GAE, 8 envs",
    "gae-64": "GAE, 64 envs",
    "kl_penalty-8": "CartPole-v1, 8 envs, the same minibatches",
    "sbx-ppo-8": "CartPole-v1, 8 envs, the same minibatches, JAX",
    "tianshou-a2c-8": "CartPole-v1, 8 envs, Tianshou",
    "off_pac-box-1": "gradient steps, continuous actions",
    "off_pac-discrete-1": "gradient steps, discrete actions",
}


def speed_table(cases: Mapping[str, str]) -> str:
    """Rates beside the peer's, from ``speed.csv``.

    :param cases: case -> what it measures
    """
    rows = {row["case"]: row for row in read_csv(RESULTS / "speed.csv")}
    lines = []
    for case, text in cases.items():
        row = rows[case]
        ratio, least, greatest = (f"{float(row[name]):.1f}" for name in ("ratio", "ratio_min", "ratio_max"))
        ours, peer = (f"{float(row[name]):,.0f}" for name in ("ours_rate", "peer_rate"))
        lines.append(
            [text, f"`{row['ours']}`", ours, row["peer"], peer, f"{ratio} ({least} to {greatest})", row["date"]]
        )
    header = ["measured", "ours", "per second", "peer", "per second", "ratio (least to greatest)", "date"]
    return tables.markdown(header, lines)


#: Entrant of ``race.csv`` -> how the table names it.
ENTRANTS: Final = {
    "actor_critic": "`ActorCritic`",
    "actor_critic:vector": "`ActorCritic`, native vector env",
    "trpo": "`TRPO`",
    "a2c": "SB3 A2C",
    "ppo": "SB3 PPO",
    "contrib_trpo": "sb3-contrib TRPO",
}


def trust_region_table() -> str:
    """Joint KL of the steps that two TRPOs take, from ``trust_region.csv``."""
    by_task: dict[tuple[int, str], dict[str, str]] = {}
    for row in read_csv(RESULTS / "trust_region.csv"):
        by_task.setdefault((int(row["dims"]), row["task"]), {})[row["implementation"]] = (
            f"{float(row['mean_kl']):.4f} ({float(row['max_kl']):.4f})"
        )
    lines = [[task, str(dims), kls["ours"], kls["sb3-contrib"]] for (dims, task), kls in sorted(by_task.items())]
    return tables.markdown(["task", "action dimensions", "`sb3_pg.TRPO`", "sb3-contrib's TRPO"], lines)


def race_table() -> str:
    """Seconds to solve CartPole-v1, from ``race.csv``."""
    rows: list[dict[str, Any]] = [
        {**row, "seconds": float(row["seconds"]), "steps": float(row["steps"])}
        for row in read_csv(RESULTS / "race.csv")
    ]
    summary = {line["algo"]: line for line in race.summarize(rows)}
    lines = []
    for algo, text in ENTRANTS.items():
        line = summary[algo]
        median, least, greatest = (seconds(line[name]) for name in ("median_seconds", "least", "greatest"))
        solved = f"{line['solved']} of {line['seeds']}"
        lines.append([text, f"{median} ({least} to {greatest})", f"{line['median_steps']:,.0f}", solved])
    return tables.markdown(["", "seconds, median (least to greatest)", "env steps, median", "solved"], lines)


def seconds(value: float) -> str:
    """Two decimals, or "never"."""
    return f"{value:.2f}" if math.isfinite(value) else "never"


#: Arm of ``replay.csv`` -> how the table names it.
ARMS: Final = {"replay": "new and replayed", "fresh": "new only", "large": "32 new"}


def replay_table() -> str:
    """Env steps until solved, with replayed trajectories and without, from ``replay.csv``."""
    lines = [
        [
            line["env"],
            ARMS.get(line["arm"], line["arm"]),
            f"{steps_text(line['median_steps'])} ({steps_text(line['least'])} to {steps_text(line['greatest'])})",
            f"{line['solved']} of {line['seeds']}",
        ]
        for line in replay.summarize(read_csv(RESULTS / "replay.csv"))
    ]
    return tables.markdown(["env", "trajectories of an update", "env steps until solved, median", "solved"], lines)


def steps_text(steps: float) -> str:
    """``6,500``, or "never"."""
    return f"{steps:,.0f}" if math.isfinite(steps) else "never"


if __name__ == "__main__":
    main()
