"""What is compared of replayed transitions: OffPAC and SB3's own, at equal gradient steps."""

from typing import Any

from speed_timing import Case, TrainingCase
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import OffPAC

# one gradient step per env step, on both sides; a fixed weight of the entropy, since SAC's own takes a third optimizer
SAC_LIKE: dict[str, Any] = {"batch_size": 256, "buffer_size": 100_000, "learning_starts": 1000, "ent_coef": 0.1}
DQN_LIKE: dict[str, Any] = {"batch_size": 128, "buffer_size": 100_000, "learning_starts": 1000, "train_freq": 1}


def off_pac(env: VecEnv, _: int, seed: int) -> BaseAlgorithm:
    """OffPAC with SVG(0) and SAC's networks: an actor, two critics, two targets."""
    kwargs = {"net_arch": [256, 256]}
    return OffPAC("MlpPolicy", env, policy_kwargs=kwargs, seed=seed, device="cpu", **SAC_LIKE)


def sac(env: VecEnv, _: int, seed: int) -> BaseAlgorithm:
    """SB3's SAC with its defaults, but for the fixed weight of the entropy."""
    return SAC("MlpPolicy", env, seed=seed, device="cpu", **SAC_LIKE)


def off_pac_discrete(env: VecEnv, _: int, seed: int) -> BaseAlgorithm:
    """OffPAC with one critic and DQN's network, and an actor of the same size besides."""
    kwargs = {"net_arch": [64, 64], "n_critics": 1}
    return OffPAC("MlpPolicy", env, policy_kwargs=kwargs, seed=seed, device="cpu", **DQN_LIKE)


def dqn(env: VecEnv, _: int, seed: int) -> BaseAlgorithm:
    """SB3's DQN, its target moving as OffPAC's does."""
    target: dict[str, Any] = {"tau": 0.005, "target_update_interval": 1}
    return DQN("MlpPolicy", env, seed=seed, device="cpu", **DQN_LIKE, **target)


# past learning_starts; a gradient step per env step takes its time, so that fewer env steps are enough
COST: dict[str, Any] = {"log_interval": 100, "warm_up": 1100, "share": 0.1}

CASES: tuple[Case, ...] = (
    TrainingCase("off_pac-box-1", "OffPAC", off_pac, "SAC", sac, "Pendulum-v1", 1, **COST),
    TrainingCase("off_pac-discrete-1", "OffPAC", off_pac_discrete, "DQN", dqn, "CartPole-v1", 1, **COST),
)
