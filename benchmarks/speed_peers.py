"""Peers that need not be there: sbx's PPO, in JAX, and Tianshou's A2C. Their rows are measured where they are."""

import gc
import importlib
import importlib.util
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from speed_cases import actor_critic, kl_penalty
from speed_timing import ROLLOUT, Case, Clock, Envs, Sample, TrainingCase, time_env, time_learning
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

CARTPOLE = "CartPole-v1"


def sbx_ppo(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """Sbx's PPO with its defaults, which are SB3's, on one thread."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    model: BaseAlgorithm = importlib.import_module("sbx").PPO("MlpPolicy", env, n_steps=n_steps, seed=seed)
    return model


@dataclass(frozen=True)
class TianshouCase:
    """ActorCritic against Tianshou's A2C: the same nets, optimizer and rollouts, one gradient step for each."""

    name: str
    n_envs: int
    ours_name: str = "ActorCritic"
    peer_name: str = "Tianshou A2C"

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours, the peer, and SB3's DummyVecEnv alone."""
        envs = Envs(CARTPOLE, self.n_envs)
        return (
            lambda: time_learning(actor_critic, envs, ROLLOUT // self.n_envs, 100, repetition, steps),
            lambda: time_tianshou(self.n_envs, repetition, steps),
            lambda: time_env(envs, repetition, steps),
        )


def time_tianshou(n_envs: int, seed: int, steps: int, clock: Clock = time.perf_counter) -> Sample:
    """Time rollouts and updates, after one of each."""
    data, base = importlib.import_module("tianshou.data"), importlib.import_module("tianshou.algorithm.algorithm_base")
    venvs = importlib.import_module("tianshou.env").DummyVectorEnv([lambda: gym.make(CARTPOLE) for _ in range(n_envs)])
    venvs.seed(seed)
    torch.manual_seed(seed)
    algorithm = tianshou_a2c()
    buffer = data.VectorReplayBuffer(ROLLOUT, n_envs)
    collector = data.Collector(algorithm, venvs, buffer)
    collector.reset()
    update_seconds, lengths = 0.0, []

    def rollout() -> None:
        nonlocal update_seconds
        with base.policy_within_training_step(algorithm.policy):
            lengths.extend(collector.collect(n_step=ROLLOUT).lens)
            start = clock()
            algorithm.update(buffer=buffer, batch_size=None, repeat=1)
            update_seconds += clock() - start
        collector.reset_buffer(keep_statistics=True)

    rollout()
    update_seconds, lengths = 0.0, []
    n_rollouts = math.ceil(steps / ROLLOUT)
    gc.collect()
    start = clock()
    for _ in range(n_rollouts):
        rollout()
    seconds = clock() - start
    venvs.close()
    return Sample(n_rollouts * ROLLOUT, seconds, update_seconds, sum(map(int, lengths)) / max(len(lengths), 1))


def tianshou_a2c() -> Any:
    """Tianshou's A2C with the nets and the settings of SB3's."""
    discrete = importlib.import_module("tianshou.utils.net.discrete")
    net = importlib.import_module("tianshou.utils.net.common").Net
    space = gym.spaces.Discrete(2)

    def body() -> Any:
        return net(state_shape=4, hidden_sizes=[64, 64], activation=torch.nn.Tanh)

    policy = importlib.import_module("tianshou.algorithm.modelfree.reinforce").ProbabilisticActorPolicy(
        actor=discrete.DiscreteActor(preprocess_net=body(), action_shape=2, softmax_output=False),
        dist_fn=lambda logits: torch.distributions.Categorical(logits=logits, validate_args=False),
        action_space=space,
        action_scaling=False,
    )
    return importlib.import_module("tianshou.algorithm.modelfree.a2c").A2C(
        policy=policy,
        critic=discrete.DiscreteCritic(preprocess_net=body()),
        optim=importlib.import_module("tianshou.algorithm.optim").RMSpropOptimizerFactory(lr=7e-4, eps=1e-5),
        ent_coef=0.0,
        max_grad_norm=0.5,
        gae_lambda=1.0,
        max_batchsize=ROLLOUT,
    )


#: package -> the cases it takes part in
PEERS: dict[str, tuple[Case, ...]] = {
    "sbx": (TrainingCase("sbx-ppo-8", "KLPenaltyPG", kl_penalty, "sbx PPO", sbx_ppo, CARTPOLE, 8),),
    "tianshou": (TianshouCase("tianshou-a2c-8", 8),),
}


def installed_cases() -> tuple[Case, ...]:
    """Those of the packages that are here."""
    return tuple(case for package, cases in PEERS.items() if importlib.util.find_spec(package) for case in cases)


CASES = installed_cases()
