"""Peers that are measured where they are installed; none of them is needed here."""

import importlib.util

import pytest
import speed
import speed_peers
from speed_cases import actor_critic
from speed_timing import ROLLOUT, TrainingCase

from sb3_pg.envs import make_vec_env


@pytest.mark.parametrize(
    ("installed", "cases"),
    [((), []), (("sbx",), ["sbx-ppo-8"]), (("sbx", "tianshou"), ["sbx-ppo-8", "tianshou-a2c-8"])],
)
def test_a_peer_has_cases_where_it_is_installed(
    installed: tuple[str, ...], cases: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package in installed or None)
    assert [case.name for case in speed_peers.installed_cases()] == cases
    assert set(speed.ALL_CASES) >= set(speed_peers.CASES)


def test_tianshou_has_the_nets_and_takes_the_steps_of_ours() -> None:
    pytest.importorskip("tianshou")
    ours = actor_critic(make_vec_env("CartPole-v1", 8), 8, 0)
    theirs = speed_peers.tianshou_a2c()
    shapes = [sorted(tuple(p.shape) for p in module.parameters()) for module in (ours.policy, theirs)]
    assert shapes[0] == shapes[1]
    sample = speed_peers.time_tianshou(8, seed=0, steps=2 * ROLLOUT - 1)
    assert sample.steps == 2 * ROLLOUT
    assert 0 < sample.update_seconds < sample.seconds
    assert 10 < sample.episode < 100


def test_sbx_has_sb3_s_defaults() -> None:
    pytest.importorskip("sbx")
    (case,) = speed_peers.PEERS["sbx"]
    assert isinstance(case, TrainingCase)
    env = make_vec_env("CartPole-v1", 8)
    ours, theirs = (factory(env, 256, 0) for factory in (case.ours, case.peer))
    for name in ("n_steps", "n_envs", "batch_size", "n_epochs", "gamma", "gae_lambda"):
        assert getattr(ours, name) == getattr(theirs, name)
