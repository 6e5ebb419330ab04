"""MuJoCo's simulations: what is read between two steps is restored as well."""

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from sb3_pg.envs import get_env_state, make_vec_env, set_env_state
from tests.envs.state.exactness import assert_continues, refuse, through_a_file

mujoco = pytest.importorskip("mujoco")
NAMES = ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "HumanoidStandup", "Swimmer", "Reacher", "Pusher"]
NAMES += ["InvertedPendulum", "InvertedDoublePendulum"]


@pytest.mark.filterwarnings("ignore:.*The environment .* is out of date")
@pytest.mark.parametrize("version", ["v5", "v4"])
@pytest.mark.parametrize("name", NAMES)
def test_envs_of_gymnasium(name: str, version: str) -> None:
    if (name, version) == ("Pusher", "v4"):
        pytest.skip("Pusher-v4 needs mujoco<3")
    make = partial(make_vec_env, f"{name}-{version}", 2, "dummy", 3, env_kwargs={"max_episode_steps": 50})
    assert assert_continues(make, n_after=60) >= 2


def test_derived_numbers_are_restored_not_computed() -> None:
    env, fresh = (make_vec_env("Ant-v5", 1, "dummy", 3) for _ in range(2))
    env.reset()
    env.step(env.action_space.sample()[None])
    set_env_state(fresh, through_a_file(get_env_state(env)), refuse)
    data, restored = env.get_attr("data")[0], fresh.get_attr("data")[0]
    assert np.array_equal(restored.xpos, data.xpos)
    mujoco.mj_kinematics(data.model, data)
    assert not np.array_equal(restored.xpos, data.xpos)


class Randomized(gym.Wrapper[Any, Any, Any, Any]):
    """Other masses and another gravity in each episode."""

    def reset(self, **kwargs: Any) -> Any:
        observation = self.env.reset(**kwargs)
        model = self.unwrapped.model  # type: ignore[attr-defined]
        model.body_mass *= self.np_random.uniform(0.8, 1.25)
        model.opt.gravity[2] = self.np_random.uniform(-10, -9)
        model.opt.density = self.np_random.uniform(0, 1)
        return observation


def test_a_model_that_a_wrapper_changes() -> None:
    kwargs: dict[str, Any] = {"wrapper_class": Randomized, "env_kwargs": {"max_episode_steps": 20}}
    assert assert_continues(partial(make_vec_env, "HalfCheetah-v5", 2, "dummy", 3, **kwargs)) >= 2


def test_a_simulation_of_another_model() -> None:
    env, fresh = (make_vec_env(name, 1, "dummy", 3) for name in ("Hopper-v5", "Walker2d-v5"))
    env.reset()
    state = get_env_state(env)
    with pytest.raises(ValueError, match=r"MuJoCo's state must have .* the model or MuJoCo's version differs"):
        set_env_state(fresh, state._replace(layout=get_env_state(fresh).layout), refuse)


def test_a_simulation_with_a_state_that_mujoco_does_not_give() -> None:
    if not hasattr(mujoco.mjtEnableBit, "mjENBL_SLEEP"):
        pytest.skip("this MuJoCo has no sleeping bodies")
    env = make_vec_env("Hopper-v5", 1, "dummy", 3)
    env.reset()
    env.get_attr("model")[0].opt.enableflags |= int(mujoco.mjtEnableBit.mjENBL_SLEEP)
    assert get_env_state(env).inexact == (
        "HopperEnv.data is a simulation with mjENBL_SLEEP, whose state is not in mjSTATE_INTEGRATION"
    )
