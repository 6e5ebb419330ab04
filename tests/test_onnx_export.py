"""Policies can be exported to ONNX, as ``docs/guides/onnx.md`` says, and give the same actions there."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_pg import TRPO, ActorCritic, Memory, OffPAC, Reinforce
from sb3_pg.envs import make_vec_env, with_action_masks
from tests.envs.masked import Restless

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "onnx.md"
SQUASHED: dict[str, Any] = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "discrete": (Reinforce, "CartPole-v1", {"n_steps": 64}),
    "box": (TRPO, "Pendulum-v1", {"n_steps": 128}),
    "squashed": (ActorCritic, "Pendulum-v1", {"n_steps": 64, **SQUASHED}),
    "q-box": (OffPAC, "Pendulum-v1", {"learning_starts": 64, "batch_size": 8}),
    "lstm": (ActorCritic, "Pendulum-v1", {"n_steps": 16, "memory": "lstm"}),
    "gru, squashed": (ActorCritic, "Pendulum-v1", {"n_steps": 16, "memory": Memory("gru", 8, 2, "shared"), **SQUASHED}),
    "masks": (TRPO, "MaskedGrid-v0", {"n_steps": 64}),
    "q-masks": (OffPAC, "MaskedGrid-v0", {"learning_starts": 64, "batch_size": 8}),
    "masks and gru": (ActorCritic, "MaskedGrid-v0", {"n_steps": 16, "memory": Memory("gru", 8)}),
    **{
        f"{kind}, masks and lstm": (Reinforce, kind, {"n_steps": 16, "memory": Memory("lstm", 8)})
        for kind in ("discrete", "multi_discrete", "multi_binary")
    },
}


def of_guide() -> Any:
    """What the guide's blocks define that only define something."""
    names: dict[str, Any] = {"np": np}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        if "class " in block:
            exec(block, names)
    return names


def session_of(actor: Any, path: Path) -> Any:
    of_guide()["export"](actor, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def envs(name: str, n: int) -> Any:
    if "-v" in name:
        return make_vec_env(name, n, "dummy", seed=0)
    # lengths of the episodes differ, and keys are three with the mask
    return with_action_masks(DummyVecEnv([partial(Restless, name, length=3 + i, as_dict=True) for i in range(n)]))


#: Exports take seconds each.
_ALWAYS = ("discrete", "box", "lstm", "masks and gru")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _ALWAYS else [pytest.mark.slow]) for name in CASES]
)
def test_actions_are_those_of_predict(name: str, tmp_path: Path) -> None:
    """Also within episodes, where a policy with memory remembers what came before."""
    cls, env_id, kwargs = CASES[name]
    env = envs(env_id, 3)
    is_dict = isinstance(env.observation_space, spaces.Dict)
    policy = "MultiInputPolicy" if is_dict and "-v" not in env_id else "MlpPolicy"
    model = cls(policy, envs(env_id, 1), seed=0, device="cpu", **kwargs).learn(128)
    session = session_of(of_guide()["DeterministicActor"](model.policy), tmp_path / "actor.onnx")
    names = [given.name for given in session.get_inputs()]
    observations, starts, expected_state = env.reset(), np.ones(3, dtype=bool), None
    memory: Any = model.policy.memory if "memory" in kwargs else None
    parts = [] if memory is None else ["h", "c"][: memory.n_parts]
    assert names == [*(env.observation_space.spaces if is_dict else ["observations"]), *parts]
    state = [np.zeros((memory.n_layers, 3, memory.hidden_size), np.float32) for _ in parts]
    n_ended = 0
    for _ in range(20):
        state = [np.where(starts[:, None], np.float32(0), part) for part in state]
        given = observations if is_dict else {"observations": observations}
        actions, *state = session.run(None, {**given, **dict(zip(parts, state, strict=True))})
        expected, expected_state = model.predict(observations, expected_state, starts, deterministic=True)
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
        observations, _, starts, _ = env.step(expected)
        n_ended += int(starts.sum())
    assert n_ended or "-v" in env_id


def test_normalization_can_be_part_of_the_file(tmp_path: Path) -> None:
    for memory in (None, Memory("lstm", 8)):
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))
        model = ActorCritic("MlpPolicy", env, n_steps=64, memory=memory, seed=0, device="cpu").learn(256)
        session = session_of(of_guide()["NormalizedActor"](model.policy, env), tmp_path / "actor.onnx")
        raw: Any = make_vec_env("Pendulum-v1", 3, seed=1).reset()
        state = {} if memory is None else dict.fromkeys("hc", np.zeros((1, 3, 8), np.float32))
        actions = session.run(None, {"observations": raw, **state})[0]
        expected, _ = model.predict(env.normalize_obs(raw), deterministic=True)
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
