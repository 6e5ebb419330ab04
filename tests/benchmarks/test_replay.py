import math
from pathlib import Path
from typing import Any

import learning_run
import pytest
import replay
from bench_io import read_csv


@pytest.mark.parametrize(
    ("means", "steps"),
    [((480, 500), 100), ((480, 470, 480, 475), 300), ((500,), math.inf), ((500, 0, 500, 0), math.inf), ((), math.inf)],
)
def test_the_first_of_two_in_a_row_is_the_arrival(means: tuple[float, ...], steps: float) -> None:
    assert replay.arrival([(100 * i, float(mean)) for i, mean in enumerate(means, 1)], 475.0) == steps


def a_row(arm: str, steps: float, env: str = "CartPole-v1") -> dict[str, object]:
    return {"env": env, "arm": arm, "learning_rate": "0.01", "steps": str(steps)}


def test_medians_are_compared_within_an_env_and_count_who_does_not_arrive() -> None:
    rows = [a_row("replay", s) for s in (10, 20, math.inf)] + [a_row("fresh", s) for s in (30, 50, 90)]
    rows += [a_row("fresh", 1, "LunarLander-v3")]
    fresh, ours, other = replay.summarize(rows)
    assert (ours["arm"], ours["solved"], ours["median_steps"], ours["times_fewer"]) == ("replay", 2, 20, 2.5)
    assert (fresh["median_steps"], fresh["times_fewer"], other["times_fewer"]) == (50, 1.0, 1.0)


@pytest.mark.parametrize("arm", replay.ARMS)
def test_arms_differ_in_what_is_kept_alone(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    make_manager = learning_run.make_manager

    def kept(*arguments: Any) -> Any:
        manager = make_manager(*arguments)
        setup = manager.setup_experiment
        monkeypatch.setattr(manager, "setup_experiment", lambda: made.setdefault("experiment", setup()))
        return manager

    monkeypatch.setattr(learning_run, "make_manager", kept)
    settings = {"n_envs": 2, "train_freq": [2, "episode"], "buffer_trajectories": 8, "gradient_steps": 2}
    monkeypatch.setitem(replay.TASKS, "CartPole-v1", replay.Task(475.0, 1000, 100, settings, {}))
    row = replay.run(("CartPole-v1", arm, 1e-3, 100))
    model = made["experiment"][0]
    assert row["steps"] == math.inf
    assert row["gradient_steps"] == model._n_updates > 0
    assert len(row["evaluations"].split()) == 10
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5)] == [1e-3, 5e-4]
    collected, keeps = model.train_freq.frequency, model.buffer_trajectories
    assert (collected == keeps) == (arm != "replay")
    assert model.gradient_steps / collected == 1
    assert keeps == (2 if arm == "fresh" else 8)
    assert model.max_ratio == 2  # as in the YAML file


def test_seeds_of_tuning_are_kept_out_of_the_report() -> None:
    for options in (["--seeds", "100"], ["--tune", "--seeds", "0"], ["--tune"]):
        with pytest.raises(SystemExit):
            replay.main(options)


def test_published_runs_are_summarized_and_drawn(tmp_path: Path) -> None:
    rows = read_csv(replay.RESULTS / "replay.csv")
    lines = replay.summarize(rows)
    arms = {(env, arm): rate for env, task in replay.TASKS.items() for arm, rate in task.rates.items()}
    assert {(line["env"], line["arm"]): line["learning_rate"] for line in lines} == arms
    assert len(lines) == len(arms)
    assert sorted((row["env"], row["arm"], row["seed"]) for row in rows) == sorted(
        (*arm, s) for arm in arms for s in "01234"
    )
    replay.draw(rows).savefig(tmp_path / "replay.png")
