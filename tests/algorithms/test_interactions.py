"""Where several of these meet: patched or compiled policies, integers, segments, logs and saved classes."""

import importlib
import pkgutil
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

import sb3_pg
from sb3_pg import ActorCritic, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.rollout import BehaviorReplayBuffer, NStepBehaviorReplayBuffer
from tests.helpers import ScriptedEnv, ready_to_collect, vec

CPU: dict[str, Any] = {"seed": 0, "device": "cpu"}


def alternating_head(policy: Any) -> Any:
    """A head that prefers one action and then the other, call by call."""
    own, calls = type(policy)._get_action_dist_from_latent, [0]

    def head(self: Any, latent: th.Tensor) -> Any:
        calls[0] += 1
        distribution = own(self, latent)
        shift = th.tensor([3.0, 0.0]) if calls[0] % 2 else th.tensor([0.0, 3.0])
        return distribution.proba_distribution(distribution.distribution.logits + shift)

    return types.MethodType(head, policy)


@pytest.mark.parametrize("cls", [A2C, ActorCritic, OffPolicyPG])
def test_log_probs_of_a_head_that_changes_are_those_of_the_step(cls: Any) -> None:
    """As a mask does. The first and the likelier action of every step have log-probs near log 0.95."""
    env = vec(ScriptedEnv(lengths=(20,), action_space=spaces.Discrete(2)))
    kwargs = {"train_freq": (1, "episode"), "gradient_steps": 0} if cls is OffPolicyPG else {"n_steps": 20}
    model = cls("MlpPolicy", env, learning_rate=0.0, **kwargs, **CPU)
    model.policy._get_action_dist_from_latent = alternating_head(model.policy)
    model.learn(20)
    buffer = model.replay_buffer if cls is OffPolicyPG else model.rollout_buffer
    actions, log_probs = buffer.actions[:20].flatten(), buffer.log_probs[:20].flatten()
    preferred = actions == np.arange(20) % 2
    assert preferred.sum() >= 15
    assert np.allclose(log_probs[preferred], np.log(1 / (1 + np.exp(-3))), atol=0.02)
    assert np.allclose(log_probs[~preferred], -np.log(1 + np.exp(3)), atol=0.02)


@pytest.mark.parametrize("what", ["method", "hook"])
@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG])
def test_a_change_within_a_rollout_is_warned_of(cls: Any, what: str) -> None:
    class Changes(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 3:
                policy: Any = self.model.policy
                if what == "hook":
                    policy.register_forward_hook(lambda *_: None)
                else:
                    policy.evaluate_actions = types.MethodType(type(policy).evaluate_actions, policy)
            return True

    kwargs: dict[str, Any] = {"n_steps": 10} if cls is ActorCritic else {"train_freq": 10}
    model = cls("MlpPolicy", vec(ScriptedEnv(lengths=(5,))), **kwargs, **CPU)
    with pytest.warns(UserWarning, match="changed within a rollout"):
        model.learn(10, callback=Changes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(20)


@pytest.mark.parametrize("dtype", [np.int8, np.int64])
def test_a_compiled_policy_predicts_integers(dtype: type) -> None:
    space = spaces.Box(-100, 100, (2,), dtype)
    model = OffPAC("MlpPolicy", vec(ScriptedEnv(action_space=space)), learning_starts=0, gradient_steps=0, **CPU)
    obs = np.zeros(3, np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    compiled: Any = th.compile(model.policy, backend="eager")
    model.policy = compiled
    actions, _ = model.predict(obs, deterministic=True)
    assert space.contains(actions)
    assert np.array_equal(actions, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
@pytest.mark.parametrize("cls", [SAC, OffPAC])
def test_a_policys_own_predict_acts(cls: Any, dtype: type) -> None:
    """SB3's off-policy loop calls it, in training too. (SAC hands integers of a Box to the env as floats.)"""
    space = spaces.Box(-5, 5, (1,), dtype)
    env = ScriptedEnv(action_space=space)
    model = cls("MlpPolicy", vec(env), learning_starts=2, buffer_size=100, gradient_steps=0, **CPU)
    model.policy.predict = lambda obs, *_, **__: (np.full((len(obs), 1), 3, dtype), None)
    model.learn(10)
    assert all(action == pytest.approx(3, abs=1e-4) for action in env.actions[3:])
    stored = 0.0 if (cls, dtype) == (SAC, np.int64) else 0.6  # SB3's buffer cuts off what follows the point
    assert model.replay_buffer.actions[4:10].flatten() == pytest.approx(stored, abs=1e-4)
    if cls is OffPAC:
        assert all(space.contains(action) for action in env.actions)
        assert model.predict(np.zeros((1, 3), np.float32))[0] == 3


def test_total_returns_take_no_segments_from_collect_rollouts_either() -> None:
    model = Reinforce("MlpPolicy", vec(ScriptedEnv(lengths=(10,))), returns="total", n_episodes=2, **CPU)
    callback = ready_to_collect(model)
    with pytest.raises(ValueError, match=r"complete episodes, got n_rollout_steps=16"):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)  # type: ignore[arg-type]
    assert model.num_timesteps == 0


@pytest.mark.parametrize(("n_steps", "expected"), [(30, [30]), (60, [30, 60]), (3000, [540, 1050, 1560, 2070, 2580])])
def test_log_interval_auto_writes_of_the_first_rollout_too(tmp_path: Path, n_steps: int, expected: list[int]) -> None:
    """Runs of one rollout are logged, and longer ones about every 500 steps, with the update that follows these."""
    env = vec(ScriptedEnv(lengths=(30,)))
    model = Reinforce("MlpPolicy", env, n_episodes=1, baseline="none", **CPU)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(n_steps, log_interval="auto")
    rows = (tmp_path / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("time/total_timesteps")
    written = [int(float(row.split(",")[column])) for row in rows[1:]]
    assert written == expected


def test_the_advice_on_max_episode_steps_can_be_followed() -> None:
    env = vec(ScriptedEnv())
    with pytest.warns(UserWarning, match=r"max_episode_steps=50 has no effect with n_steps=5.*give n_steps=None"):
        ActorCritic("MlpPolicy", env, max_episode_steps=50, **CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ActorCritic("MlpPolicy", env, max_episode_steps=50, n_steps=None, **CPU).learn(10)


def test_n_steps_beside_a_replay_buffer_class_is_ignored_with_sb3s_warning(tmp_path: Path) -> None:
    env = vec(ScriptedEnv())
    kwargs: dict[str, Any] = {"n_steps": 3, "buffer_size": 100, **CPU}
    with pytest.warns(UserWarning, match="n_steps"):
        model = OffPAC("MlpPolicy", env, replay_buffer_class=BehaviorReplayBuffer, **kwargs)
    assert type(model.replay_buffer) is BehaviorReplayBuffer
    model.save(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert type(OffPAC.load(tmp_path / "own", env=env).replay_buffer) is BehaviorReplayBuffer
    chosen = OffPAC("MlpPolicy", env, **kwargs)
    assert type(chosen.replay_buffer) is NStepBehaviorReplayBuffer
    chosen.save(tmp_path / "chosen")
    assert type(OffPAC.load(tmp_path / "chosen", env=env).replay_buffer) is NStepBehaviorReplayBuffer
    assert type(OffPAC.load(tmp_path / "chosen", env=env, n_steps=1).replay_buffer) is BehaviorReplayBuffer


MODULES = [sb3_pg, *(importlib.import_module(f"sb3_pg.{m.name}") for m in pkgutil.iter_modules(sb3_pg.__path__))]


@pytest.mark.parametrize("module", [m for m in MODULES if hasattr(m, "__all__")], ids=lambda module: module.__name__)
def test_all_names_of_all_are_there(module: types.ModuleType) -> None:
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
