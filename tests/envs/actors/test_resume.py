"""A run with actors that was interrupted goes on to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_pg import ActorCritic, Reinforce, ResumeCallback
from sb3_pg.envs import make_vec_env
from tests.helpers import TRANSPORTS, Interrupts, parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def make(transport: str) -> VecEnv:
    env = make_vec_env("CartPole-v1", 4, "actors", seed=1, n_actors=2, backend_kwargs={"transport": transport})
    return VecNormalize(env)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("cls", [ActorCritic, Reinforce])
def test_a_resumed_run_equals_an_uninterrupted_one(cls: Any, transport: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"memory": "lstm", "n_steps": 8} if cls is ActorCritic else {"n_episodes": 8}
    whole = cls("MlpPolicy", make(transport), seed=0, device="cpu", **arguments).learn(600)
    begun = cls("MlpPolicy", make(transport), seed=0, device="cpu", **arguments)
    with pytest.raises(KeyboardInterrupt):
        begun.learn(600, [ResumeCallback(tmp_path, every=32, on_signals=()), Interrupts(300)])
    th.manual_seed(7)
    env = make(transport)
    resumed = cls.resume(tmp_path, env, device="cpu")
    resumed.learn(600, [ResumeCallback(tmp_path, every=32, on_signals=())])
    assert th.equal(parameters(whole), parameters(resumed))
    assert whole.num_timesteps == resumed.num_timesteps
    for model in (whole, begun, resumed):
        model.env.close()
