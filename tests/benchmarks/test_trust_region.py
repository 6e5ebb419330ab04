from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import trust_region
from bench_io import read_csv
from torch.distributions import Bernoulli, Normal
from trust_region import Settings

TINY = Settings(seeds=(0,), updates=2, n_envs=2, n_steps=64)


def test_divergence_is_that_of_the_whole_action_vector() -> None:
    loc, scale = th.zeros(5, 3), th.ones(5, 3)
    # KL(N(0, 1) || N(m, s)) = log s + (1 + m^2) / (2 s^2) - 1/2, for each of 3 dimensions
    found = trust_region.joint_kl(Normal(loc, scale), Normal(loc + 0.3, 2 * scale))
    assert found == pytest.approx(3 * (np.log(2) + (1 + 0.09) / 8 - 0.5))
    found = trust_region.joint_kl(Bernoulli(loc + 0.5), Bernoulli(loc + 0.25))
    assert found == pytest.approx(3 * (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)))


@pytest.mark.parametrize(("task", "dims"), [("box-6", 6), ("multibinary-17", 17), ("Pendulum-v1", 1)])
def test_ours_keeps_to_the_joint_kl(task: str, dims: int) -> None:
    found_dims, kls = trust_region.divergences(task, "ours", 0, TINY)
    assert (found_dims, len(kls)) == (dims, TINY.updates)
    assert all(0 < kl <= trust_region.TARGET_KL for kl in kls)


@pytest.mark.parametrize("task", ["box-6", "multibinary-17"])
def test_the_average_over_dimensions_does_not(task: str) -> None:
    _, kls = trust_region.divergences(task, "sb3-contrib", 0, TINY)
    assert all(kl > 1.5 * trust_region.TARGET_KL for kl in kls)


def test_updates_without_a_step_are_counted_apart() -> None:
    assert trust_region.summarize([0.0, 0.004, 0.012, 0.0]) == {
        "target_kl": 0.01,
        "mean_kl": 0.008,
        "max_kl": 0.012,
        "above_target": 0.5,
        "accepted": 0.5,
    }


@pytest.mark.parametrize("task", ["box-3", "multibinary-6"])
def test_target_task(task: str) -> None:
    make: Any = trust_region.TASKS[task]
    env = make()
    assert isinstance(env, gym.Env)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    steps = [env.step(env.action_space.sample()) for _ in range(50)]
    assert observation in env.observation_space
    assert [done for _, _, done, _, _ in steps] == [False] * 49 + [True]
    assert all(float(reward) <= 0 for _, reward, *_ in steps)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "trust_region.csv"
    words = ["--tasks", "box-3", "--updates", "1", "--output", str(output)]
    assert trust_region.main(words, TINY) == 0
    rows = read_csv(output)
    assert [(row["task"], row["dims"], row["implementation"]) for row in rows] == [
        ("box-3", "3", "ours"),
        ("box-3", "3", "sb3-contrib"),
    ]
    assert {row["updates"] for row in rows} == {"1"}
    assert "sb3_contrib=" in rows[0]["versions"]
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["task", "dims", "implementation"]
