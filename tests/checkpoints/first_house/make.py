"""Make the files beside this one: models and replay buffers that the first house saved.

The first house is the layout before the modules moved. Run this script in a checkout of commit 9a0060e, the last one
with that layout, with this folder as the argument. Use NumPy 1.26, whose pickles NumPy 2 reads too. No model has a
seed: a seeded space is pickled with a random generator, and NumPy 1 and 2 do not read each other's.
"""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.wrappers import TimeAwareObservation
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

import sb3_pg
from sb3_pg.baselines import LinearBaseline
from sb3_pg.rollout import TrajectoryReplayBuffer, TrajectoryRolloutBuffer

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu"}
SEGMENTS: dict[str, Any] = {**SMALL, "n_steps": 16}
EPISODES: dict[str, Any] = {**SMALL, "train_freq": (2, "episode"), "buffer_size": 400}
TRANSITIONS: dict[str, Any] = {**SMALL, "buffer_size": 60, "learning_starts": 0, "batch_size": 8}


def timed(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """The env with Dict observations: its own, and the time."""
    return TimeAwareObservation(env, flatten=False)


def make_env(env_id: str) -> VecEnv:
    """One env; ``"CartPole-v1 timed"`` has Dict observations."""
    name, *wrapper = env_id.split()
    return make_vec_env(name, wrapper_class=timed if wrapper else None)


def off_pac_policy() -> type:
    """The class that "MlpPolicy" stands for in OffPAC."""
    return sb3_pg.OffPAC.policy_aliases["MlpPolicy"]


def behavior() -> sb3_pg.ActorCritic:
    """A policy that acts for another one; its optimizer is RMSprop."""
    return sb3_pg.ActorCritic("MlpPolicy", "CartPole-v1", **SMALL)


#: File name -> class, env, policy, other arguments.
CASES: dict[str, tuple[str, str, Any, Callable[[], dict[str, Any]]]] = {
    "reinforce": ("Reinforce", "CartPole-v1", "MlpPolicy", lambda: {**SMALL, "n_episodes": 2}),
    "reinforce_baseline_object": (
        "Reinforce",
        "CartPole-v1",
        "MlpPolicy",
        lambda: {**SMALL, "n_episodes": 2, "baseline": LinearBaseline()},
    ),
    "reinforce_critic": (
        "Reinforce",
        "CartPole-v1",
        "MlpPolicy",
        lambda: {
            **SEGMENTS,
            "baseline": "value",
            "critic_learning_rate": 1e-3,
            "rollout_buffer_class": TrajectoryRolloutBuffer,
        },
    ),
    "actor_critic": ("ActorCritic", "CartPole-v1", "MlpPolicy", lambda: {**SMALL, "n_steps": 5}),
    "actor_critic_scaled_targets": (
        "ActorCritic",
        "Pendulum-v1",
        "MlpPolicy",
        lambda: {
            **SEGMENTS,
            "normalize_value_targets": True,
            "critic_learning_rate": "lin_1e-3",
            "n_critic_updates": 2,
            "use_sde": True,
        },
    ),
    "actor_critic_compiled": ("ActorCritic", "CartPole-v1", "MlpPolicy", lambda: {**SMALL, "compile": True}),
    "actor_critic_dict": ("ActorCritic", "CartPole-v1 timed", "MultiInputPolicy", lambda: {**SMALL}),
    "npg": ("NPG", "CartPole-v1", "MlpPolicy", lambda: {**SEGMENTS}),
    "trpo": ("TRPO", "Pendulum-v1", "MlpPolicy", lambda: {**SEGMENTS}),
    "kl_penalty_pg": ("KLPenaltyPG", "CartPole-v1", "MlpPolicy", lambda: {**SEGMENTS}),
    "off_policy_pg": ("OffPolicyPG", "CartPole-v1", "MlpPolicy", lambda: {**EPISODES}),
    "off_policy_pg_behavior": (
        "OffPolicyPG",
        "CartPole-v1",
        "MlpPolicy",
        lambda: {
            **EPISODES,
            "behavior_policy": behavior(),
            "replay_buffer_class": TrajectoryReplayBuffer,
            "baseline": "linear",
        },
    ),
    "off_pac": ("OffPAC", "CartPole-v1", "MlpPolicy", lambda: {**TRANSITIONS}),
    "off_pac_class": (
        "OffPAC",
        "Pendulum-v1",
        off_pac_policy(),
        lambda: {**TRANSITIONS, "n_steps": 2, "actor_gradient": "importance"},
    ),
    "off_pac_dict": ("OffPAC", "CartPole-v1 timed", "MultiInputPolicy", lambda: {**TRANSITIONS}),
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """Train and save one model, and its replay buffer if it has one.

    :return: what a test needs to know of it
    """
    cls, env_id, policy, arguments = CASES[name]
    set_random_seed(0)
    env = make_env(env_id)
    env.seed(0)
    model: BaseAlgorithm = getattr(sb3_pg, cls)(policy, env, **arguments())
    model.learn(60)
    held = io.BytesIO()
    model.save(held)
    with zipfile.ZipFile(held) as saved, zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in saved.namelist():
            if part != "system_info.txt":
                packed.writestr(part, saved.read(part))
    observations = [env.observation_space.sample() for _ in range(6)]
    actions = [model.predict(observation, deterministic=True)[0] for observation in observations]
    expected: dict[str, Any] = {"class": cls, "env": env_id, "observations": observations, "actions": actions}
    expected["steps"] = model.num_timesteps
    if isinstance(model, OffPolicyAlgorithm):
        buffer = model.replay_buffer
        assert buffer is not None
        model.save_replay_buffer(folder / f"{name}.pkl")
        expected["stored"] = buffer.size()
        expected["stored_rewards"] = float(buffer.rewards[: buffer.size()].sum())
    return expected


def main() -> None:
    """Make all zips."""
    folder = Path(sys.argv[1])
    th.set_num_threads(1)
    expected = {name: make(name, folder) for name in CASES}
    (folder / "expected.json").write_text(json.dumps(expected, default=np.ndarray.tolist, indent=1) + "\n")


if __name__ == "__main__":
    main()
