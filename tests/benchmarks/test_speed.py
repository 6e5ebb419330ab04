import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speed
import speed_cases
import speed_replay
import speed_timing
import speed_vector
import torch as th
from bench_io import read_csv
from speed_memory import peak_memory
from speed_timing import ROLLOUT, Envs, Sample, TrainingCase
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv


def ticking() -> Callable[[], float]:
    """A clock that shows 0, 1, 2, ... seconds."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


class FakeCase:
    """Ours takes 1, 2, 4 s for 8 steps, the peer 4 s, the env alone 0.5 s."""

    name, n_envs, ours_name, peer_name = "fake", 2, "Ours", "Peer"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        def take(who: str, sample: Sample) -> Sample:
            self.calls.append(who)
            return sample

        seconds = 2.0**repetition
        return (
            lambda: take("ours", Sample(steps, seconds, update_seconds=seconds / 4, episode=20.0)),
            lambda: take("peer", Sample(steps, 4.0, update_seconds=1.0, episode=30.0)),
            lambda: take("limit", Sample(steps, 0.5)),
        )


def test_sides_take_turns_and_the_row_is_their_arithmetic() -> None:
    case = FakeCase()
    row = speed.measure(case, repeats=3, steps=8)
    assert case.calls == ["ours", "peer", "limit"] * 3
    assert row == {
        "case": "fake",
        "ours": "Ours",
        "peer": "Peer",
        "n_envs": 2,
        "ours_rate": 4,  # median of 8, 4, 2
        "peer_rate": 2,
        "ratio": 2.0,  # median of 4, 2, 1
        "ratio_min": 1.0,
        "ratio_max": 4.0,
        "env_rate": 16,
        "ours_of_env": 0.25,
        "peer_of_env": 0.125,
        "ours_update": 0.25,
        "peer_update": 0.25,
        "ours_episode": 20.0,
        "peer_episode": 30.0,
        "ours_memory": "",
        "peer_memory": "",
    }


def test_calls_are_timed_without_the_first_one() -> None:
    calls: list[None] = []
    sample = speed_timing.time_calls(lambda: calls.append(None), size=100, n_calls=5, clock=ticking())
    assert (sample.steps, sample.seconds, len(calls)) == (500, 1.0, 6)
    assert math.isnan(sample.update_seconds)


CARTPOLE = Envs("CartPole-v1", 8)
FACTORIES = [getattr(speed_cases, name) for name in ("a2c", "reinforce", "trpo", "contrib_trpo", "kl_penalty", "ppo")]


@pytest.mark.parametrize("factory", FACTORIES)
def test_learning_is_timed_after_one_rollout(factory: Any) -> None:
    sample = speed_timing.time_learning(factory, CARTPOLE, 256, 1, seed=0, steps=2 * ROLLOUT, clock=ticking())
    assert sample.steps == 2 * ROLLOUT
    # ticks: start; start and end of each of the two updates; end
    assert (sample.seconds, sample.update_seconds) == (5.0, 2.0)
    assert 5 < sample.episode < 100


@pytest.mark.parametrize("case", speed_replay.CASES, ids=lambda case: case.name)
def test_sides_that_replay_take_equally_many_gradient_steps(case: Any) -> None:
    n_updates = []
    for factory in (case.ours, case.peer):
        env = Envs(case.env, case.n_envs).make(0)
        model = factory(env, 64, 0).learn(1024)
        n_updates.append(model._n_updates)
    assert n_updates[0] == n_updates[1] > 0


def test_both_sides_are_in_the_same_phase_of_training() -> None:
    ours, peer = (
        speed_timing.time_learning(factory, CARTPOLE, 256, 1, seed=0, steps=2 * ROLLOUT)
        for factory in (speed_cases.reinforce, speed_cases.a2c)
    )
    assert ours.episode == pytest.approx(peer.episode, rel=0.1)


def test_env_alone_takes_whole_vector_steps() -> None:
    sample = speed_timing.time_env(CARTPOLE, seed=0, steps=20, clock=ticking())
    assert (sample.steps, sample.seconds) == (24, 1.0)


def test_gae_case_compares_equals() -> None:
    speed_cases.build_gae(n_envs=3, seed=1)  # raises where the two disagree


def test_fisher_case_compares_equals() -> None:
    speed_cases.build_fisher(hidden=8, n_samples=50, seed=1)  # raises where the two disagree


def test_update_case_times_one_update_again_and_again() -> None:
    case = speed_cases.UpdateCase("update", 8)
    ours, theirs = case.build(1)
    speed_cases.make_updates_equal(ours, theirs)  # raises where they end up at two policies
    assert 5 < ours.cg_max_steps <= 15
    before = [p.clone() for p in ours.policy.parameters()]
    sample = speed_cases.time_updates(ours, 2, clock=ticking())
    assert (sample.steps, sample.seconds) == (2 * ROLLOUT, 2.0)
    assert ours.logger.name_to_value["train/cg_iterations"] == ours.cg_max_steps
    assert ours.logger.name_to_value["train/joint_kl"] > 0
    assert all(th.equal(p, q) for p, q in zip(ours.policy.parameters(), before, strict=True))


def test_units_are_converted_for_box_actions() -> None:
    env = make_vec_env("Hopper-v4")
    ours: Any = speed_cases.trpo(env, 128, 0)
    assert (ours.target_kl, ours.cg_damping) == (pytest.approx(0.03), pytest.approx(0.3))


def test_update_case_refuses_updates_that_differ() -> None:
    ours: Any
    ours, theirs = speed_cases.UpdateCase("update", 8).build(1)
    ours.target_kl *= 2
    with pytest.raises(AssertionError, match="KL between"):
        speed_cases.make_updates_equal(ours, theirs)


def test_command_keeps_the_rows_of_other_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed.csv"
    other = FakeCase()
    other.name = "other"
    options = ["--repeats", "1", "--steps", "8", "--output", str(output)]
    assert speed.main(options, cases=(FakeCase(), other)) == 0
    assert speed.main([*options, "--cases", "other"], cases=(FakeCase(), other)) == 0
    rows = read_csv(output)
    assert [row["case"] for row in rows] == ["fake", "other"]
    assert "torch=" in rows[0]["versions"]
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["case", "ours", "peer"]


@pytest.mark.parametrize("case", speed_vector.CASES, ids=lambda case: case.name)
def test_vectorized_envs_are_timed(case: Any) -> None:
    if case.backend == "envpool":
        pytest.importorskip("envpool", exc_type=ImportError)
    ours, peer, limit = (take() for take in case.measures(0, ROLLOUT))
    late = case.backend == "vector"  # steps that only reset an env are not counted
    assert all(0.8 * ROLLOUT < sample.steps < ROLLOUT if late else sample.steps == ROLLOUT for sample in (ours, limit))
    if late and case.name.startswith("floor"):  # its peer leaves out those steps too
        assert 0.8 * ROLLOUT < peer.steps < ROLLOUT
    else:
        assert peer.steps == ROLLOUT
    assert 0 < ours.update_seconds < ours.seconds
    assert ours.episode > 7  # CartPole cannot fall sooner, nor the lander land


def test_the_floor_is_the_bare_loop() -> None:
    envs = Envs("CartPole-v1", 64, "vector")
    sample = speed_timing.time_floor(speed_cases.reinforce, envs, 32, seed=0, steps=3 * ROLLOUT, clock=ticking())
    assert 0.8 * 3 * ROLLOUT < sample.steps < 3 * ROLLOUT
    assert sample.seconds == 1.0
    assert 15 < sample.episode < 40  # those of a random policy


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say")
def test_memory_is_that_of_a_side() -> None:
    small, large = (TrainingCase("x", "Ours", hold, "Peer", hold, "CartPole-v1", 1, n_steps=n) for n in (8, 64))
    assert 60 < float(peak_memory(large, 0, 8)) - float(peak_memory(small, 1, 8)) < 160
    assert peak_memory(FakeCase(), 0, 8) == ""


def hold(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """A2C that holds 2 MiB per step of a rollout."""
    model = speed_cases.a2c(env, n_steps, seed)
    model.ballast = np.ones((n_steps, 2**18))  # type: ignore[attr-defined]
    return model
