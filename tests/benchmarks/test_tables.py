"""The tables of README and documentation say what the files say."""

from itertools import product
from statistics import fmean

import learning
import learning_run
import pytest
import tables
from bench_io import read_csv
from learning_spec import Run


def row(algo: str, env: str, seed: int, final: float, **other: object) -> dict[str, object]:
    return {
        "algo": algo,
        "env": env,
        "seed": seed,
        "steps": 100_000,
        "final_mean": final,
        "best_eval_mean": final + 1,
        "wall_seconds": 60,
        "config_hash": "a",
    } | other


def test_readme_has_the_table_of_the_results() -> None:
    text = tables.README.read_text()
    assert tables.insert(text, tables.readme_tables()) == text, "run python benchmarks/tables.py --write"


def test_every_table_can_be_made() -> None:
    made = tables.tables()
    assert {"peers", "classes", "off_pac", "targets", "improvements"} <= made.keys()
    assert all(len(table.splitlines()) > 2 for table in made.values())


def test_results_are_of_the_settings_in_the_configuration_files() -> None:
    rows = read_csv(tables.LEARNING)
    for algo, env, steps in sorted({(row["algo"], row["env"], int(row["steps"])) for row in rows}):
        settings = learning_run.resolve_hyperparams(algo, env, {}, None)
        now = learning.config_hash(settings, Run(algo, env, seed=0, steps=steps))
        found = {
            row["config_hash"] for row in rows if (row["algo"], row["env"], int(row["steps"])) == (algo, env, steps)
        }
        assert found == {now}, f"{algo} on {env}: run benchmarks/learning.py again, or take the change back"


def test_report_is_of_the_results() -> None:
    cells = tables.read_cells(read_csv(tables.LEARNING))
    report = read_csv(tables.LEARNING.parent / "report" / "scores.csv")
    assert report
    for line in report:
        cell = cells[line["env"], int(line["steps"])][line["label"]]
        assert int(line["n_runs"]) == len(cell.finals), "run sb3-pg report again (benchmarks/README.md)"
        assert float(line["mean"]) == pytest.approx(cell.mean)


def test_improvements_are_of_the_results() -> None:
    cells = tables.read_cells(sorted(read_csv(tables.LEARNING), key=lambda line: int(line["seed"])))
    report = read_csv(tables.IMPROVEMENTS)
    assert {"npg", "trpo"} <= {line["label"] for line in report}
    for line in report:
        labels = line["label"], line["against"]
        both = [cell for (env, _), cell in cells.items() if env in tables.ENVS and set(labels) <= set(cell)]
        assert int(line["envs"]) == len(both), "run sb3-pg report again (benchmarks/README.md)"
        n_runs = {label: min(len(cell[label].finals) for cell in both) for label in labels}
        shares = []
        for cell in both:
            mine, theirs = (cell[label].finals[: n_runs[label]] for label in labels)
            shares.append(fmean((a > b) + (a == b) / 2 for a, b in product(mine, theirs)))
        assert float(line["probability"]) == pytest.approx(fmean(shares))


def test_peers_stand_beside_the_best_of_ours_on_the_same_budget() -> None:
    cells = tables.read_cells(
        [
            *(row("npg", "CartPole-v1", seed, value) for seed, value in enumerate((480, 500))),
            row("trpo", "CartPole-v1", 0, 100),
            row("off_pac", "CartPole-v1", 0, 500),  # not on-policy
            row("ppo", "CartPole-v1", 0, 450),
            row("a2c", "CartPole-v1", 0, 500, steps=200_000),
        ]
    )
    columns = ("env", "published_env", "steps", "algorithm", "mean", "spread", "source")
    published = [
        dict(zip(columns, ("CartPole-v1", "CartPole-v0", steps, "PPO", mean, 3, "s"), strict=True))
        for steps, mean in ((100_000, 495), (200_000, 500))
    ]
    (line,) = tables.peer_table(cells, published).splitlines()[2:]
    ours, peers = "`NPG` 490 ± 14 (2 seeds) | 480, 500 | 491 | 1.0", " 450 ± 0 (1 seed) "
    assert line == f"| CartPole-v1 | 100k | {ours} |{peers}| PPO 495 ± 3 (s, CartPole-v0) |"
    assert tables.published_text(published[1:], "CartPole-v1", 100_000) == "PPO 500 ± 3 after 200k (s, CartPole-v0)"


def test_targets_stand_beside_what_was_reached() -> None:
    finals = {"npg": (480, 500), "trpo": (470, 470)}
    rows = [row(algo, "CartPole-v1", seed, final) for algo, pair in finals.items() for seed, final in enumerate(pair)]
    columns = ("env", "steps", "target", "by", "algos")
    targets = [
        dict(zip(columns, ("CartPole-v1", "100000", "480", by, "npg trpo"), strict=True)) for by in ("best", "each")
    ]
    best, each = tables.target_table(tables.read_cells(rows), targets).splitlines()[2:]
    start = "| CartPole-v1 | 100k | 480 | "
    assert best == start + "`NPG` or `TRPO` | `NPG` 490 ± 14 (2 seeds) | 480 to 500 | |"
    assert each == start + "`NPG`, `TRPO` | `TRPO` 470 ± 0 (2 seeds) | 470 to 470 | **10.0** |"


def test_two_configurations_are_not_one_result() -> None:
    with pytest.raises(ValueError, match="npg on CartPole-v1 for 100000 steps: runs of several configurations"):
        tables.read_cells([row("npg", "CartPole-v1", seed, 0, config_hash=str(seed)) for seed in (0, 1)])


def test_every_published_figure_is_of_a_listed_env_and_source() -> None:
    published = read_csv(tables.PUBLISHED)
    assert published
    for line in published:
        assert line["env"] in tables.ENVS
        assert f"\n{line['source']} " in (tables.__doc__ or "")


def test_a_table_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="table: peers"):
        tables.insert("no marks", {"peers": "|"})
