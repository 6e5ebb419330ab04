"""ActorCritic in A2C's place: the same arguments, zips, random stream and steps."""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_pg import ActorCritic
from sb3_pg.rollout import TrajectoryRolloutBuffer
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, OwnForward, ScriptedEnv, policy_for, vec

N_STEPS, N_ENVS = 8, 2


def make(cls: Any, actions: str = "discrete", observations: str = "vector", policy: Any = None, **kwargs: Any) -> Any:
    """A model on episodes of which every other one is truncated, within rollouts and at their end."""

    def env(first_reward: float) -> ScriptedEnv:
        spaces = {"observation_space": OBSERVATION_SPACES[observations], "action_space": ACTION_SPACES[actions]}
        return ScriptedEnv((3, 4, 9), (False, True), first_reward, **deepcopy(spaces))  # each with its own generator

    policy = policy or policy_for(OBSERVATION_SPACES[observations])
    return cls(policy, vec(env(-5.0), env(1.0)), **{"n_steps": N_STEPS, "seed": 0, "device": "cpu", **kwargs})


def difference(a: Any, b: Any) -> float:
    pairs = zip(a.policy.parameters(), b.policy.parameters(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


def test_every_argument_of_a2c_has_its_place_and_default() -> None:
    theirs = list(inspect.signature(A2C.__init__).parameters.values())
    ours = list(inspect.signature(ActorCritic.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    theirs, ours = (list(inspect.signature(cls.learn).parameters.values()) for cls in (A2C, ActorCritic))
    assert [(p.name, p.default) for p in ours[:4]] == [(p.name, p.default) for p in theirs[:4]]


class Keep(BaseCallback):
    """What callbacks see in the buffer at the end of each rollout."""

    NAMES = ("actions", "episode_starts", "values", "log_probs", "returns", "advantages")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for name in self.NAMES:
            setattr(self.model, name, getattr(self.locals["rollout_buffer"], name).copy())


CASES: dict[str, dict[str, Any]] = {
    "discrete": {},
    "box": {"actions": "box"},
    "matrix": {"actions": "matrix"},
    "multi_discrete": {"actions": "multi_discrete"},
    "multi_binary": {"actions": "multi_binary"},
    "gsde": {"actions": "box", "use_sde": True, "sde_sample_freq": 3},
    "dict": {"actions": "box", "observations": "dict"},
    "image": {"observations": "image"},
    "discrete-observations": {"observations": "discrete"},
    "double": {"observations": "double"},
    "normalized": {"normalize_advantage": True},
    "adam": {"use_rms_prop": False},
    "entropy": {"ent_coef": 0.1, "actions": "multi_discrete"},
    "lambda": {"gae_lambda": 0.8, "gamma": 0.9, "actions": "box"},
    "unclipped": {"max_grad_norm": 1e9, "vf_coef": 0.1, "learning_rate": 1e-4},
    "one-step": {"n_steps": 1},
    "own-forward": {"policy": OwnForward},
    "sb3s-buffer": {"rollout_buffer_class": RolloutBuffer, "actions": "box", "gae_lambda": 0.9},
}


@pytest.mark.parametrize("case", list(CASES))
def test_learning_is_a2cs(case: str) -> None:
    a, b = (make(cls, **CASES[case]) for cls in (A2C, ActorCritic))
    for n_updates, tolerance in ((1, 1e-6), (20, 1e-5)):
        for model in (a, b):
            model.set_random_seed(n_updates)  # both draw from torch's one generator
            model.learn(n_updates * a.n_steps * N_ENVS, Keep(), reset_num_timesteps=False)
        assert a.num_timesteps == b.num_timesteps
        for name in Keep.NAMES:
            assert np.allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4), name
        assert difference(a, b) < tolerance


@pytest.mark.parametrize("case", ["discrete", "gsde", "dict", "image", "adam"])
def test_a_zip_of_a2c_goes_on_learning(case: str, tmp_path: Path) -> None:
    a = make(A2C, **CASES[case]).learn(4 * N_STEPS * N_ENVS)
    a.save(tmp_path / "a2c")
    env = make(ActorCritic, **CASES[case]).get_env()
    b = ActorCritic.load(tmp_path / "a2c", env=env, device="cpu")
    assert isinstance(b.rollout_buffer, TrajectoryRolloutBuffer)
    assert isinstance(b.policy.optimizer, type(a.policy.optimizer))
    obs = a.get_env().reset()
    assert np.array_equal(a.predict(obs, deterministic=True)[0], b.predict(obs, deterministic=True)[0])
    theirs, ours = (m.policy.optimizer.state_dict() for m in (a, b))
    assert theirs["param_groups"] == ours["param_groups"]
    for i, state in theirs["state"].items():
        assert all(th.equal(th.as_tensor(value), th.as_tensor(ours["state"][i][k])) for k, value in state.items())
    steps = b.num_timesteps
    b.learn(2 * N_STEPS * N_ENVS, reset_num_timesteps=False)
    assert b.num_timesteps == steps + 2 * N_STEPS * N_ENVS
    assert difference(a, b) > 1e-6


@pytest.mark.parametrize("cls", [A2C, ActorCritic])
@pytest.mark.parametrize("use_rms_prop", [True, False])
def test_policy_kwargs_may_be_given_again_to_load(cls: Any, use_rms_prop: bool, tmp_path: Path) -> None:
    given = {"net_arch": [8]}
    model = make(cls, policy_kwargs=dict(given), use_rms_prop=use_rms_prop)
    model.save(tmp_path / "model")
    loaded = ActorCritic.load(tmp_path / "model", policy_kwargs=given)
    assert given == {"net_arch": [8]}
    assert loaded.policy_kwargs == model.policy_kwargs
    assert isinstance(loaded.policy.optimizer, type(model.policy.optimizer))
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        ActorCritic.load(tmp_path / "model", policy_kwargs={"net_arch": [9]})


def test_tensorboard_log_may_be_a_path(tmp_path: Path) -> None:
    assert make(ActorCritic, tensorboard_log=tmp_path).tensorboard_log == tmp_path
