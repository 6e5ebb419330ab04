"""Policies can be exported to ONNX, as ``docs/guides/onnx.md`` says, and give the same actions there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import Distribution

from sb3_pg import TRPO, ActorCritic, OffPAC, Reinforce

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

SQUASHED: dict[str, Any] = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "discrete": (Reinforce, "CartPole-v1", {"n_steps": 64}),
    "box": (TRPO, "Pendulum-v1", {"n_steps": 128}),
    "squashed": (ActorCritic, "Pendulum-v1", {"n_steps": 64, **SQUASHED}),
    "q-box": (OffPAC, "Pendulum-v1", {"learning_starts": 64, "batch_size": 8}),
}


class DeterministicActor(th.nn.Module):
    """From observations to the actions that the env receives."""

    def __init__(self, policy: Any, normalization: VecNormalize | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.is_box = isinstance(policy.action_space, spaces.Box)
        if self.is_box:
            self.register_buffer("low", th.as_tensor(policy.action_space.low))
            self.register_buffer("high", th.as_tensor(policy.action_space.high))
        self.clip: float | None = None
        if normalization is not None:
            statistics: Any = normalization.obs_rms
            self.clip = normalization.clip_obs
            self.register_buffer("mean", th.as_tensor(statistics.mean, dtype=th.float32))
            std = np.sqrt(statistics.var + normalization.epsilon)
            self.register_buffer("std", th.as_tensor(std, dtype=th.float32))

    def forward(self, observations: Any) -> Any:
        own: Any = self
        if self.clip is not None:
            observations = ((observations - own.mean) / own.std).clamp(-self.clip, self.clip)
        actions = self.policy.get_distribution(observations).mode()
        if not self.is_box:
            return actions
        low, high = own.low, own.high
        if self.policy.squash_output:
            actions = low + 0.5 * (actions + 1) * (high - low)
        return actions.clamp(low, high)


def exported(actor: DeterministicActor, path: Path) -> Any:
    """A session that runs the exported module."""
    space = actor.policy.observation_space
    example = th.as_tensor(np.stack([space.sample() for _ in range(2)]))
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)  # its checks cannot be exported
    try:
        th.onnx.export(
            actor.eval(),
            (example,),
            path,
            input_names=["observations"],
            output_names=["actions"],
            dynamic_shapes={"observations": {0: "n"}},
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    finally:
        Distribution.set_default_validate_args(before)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", list(CASES))
def test_actions_are_those_of_predict(name: str, tmp_path: Path) -> None:
    cls, env_id, kwargs = CASES[name]
    model = cls("MlpPolicy", env_id, seed=0, device="cpu", **kwargs).learn(128)
    session = exported(DeterministicActor(model.policy), tmp_path / "actor.onnx")
    env = make_vec_env(env_id, 3, seed=0)
    observations: Any = env.reset()
    for _ in range(20):
        (actions,) = session.run(None, {"observations": observations})
        expected, _ = model.predict(observations, deterministic=True)
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
        observations, _, _, _ = env.step(actions)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_normalization_can_be_part_of_the_file(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))
    model = ActorCritic("MlpPolicy", env, n_steps=64, seed=0, device="cpu").learn(256)
    session = exported(DeterministicActor(model.policy, env), tmp_path / "actor.onnx")
    raw: Any = make_vec_env("Pendulum-v1", 3, seed=1).reset()
    (actions,) = session.run(None, {"observations": raw})
    expected, _ = model.predict(env.normalize_obs(raw), deterministic=True)
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
