"""What is compared: our algorithms and functions, and their peers."""

import copy
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from unittest.mock import Mock, patch

import numpy as np
import sb3_contrib
import torch
from gymnasium import spaces
from speed_timing import ROLLOUT, Case, Clock, KernelCase, Sample, TrainingCase
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import TRPO, ActorCritic, KLPenaltyPG, Memory, Reinforce
from sb3_pg.functional import FisherVectorProduct, gae, joint_kl
from sb3_pg.policies import action_distribution, torch_distributions

HOPPER = "Hopper-v4"
Trpo = TypeVar("Trpo", TRPO, sb3_contrib.TRPO)


@dataclass(frozen=True)
class CriticCase:
    """Minibatch steps of the critic: the learner against the loop in sb3-contrib's TRPO."""

    name: str
    n_envs: int
    ours_name: str = "fit_critic"
    peer_name: str = "TRPO"

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours and the peer; ``steps`` counts samples that have been in a minibatch."""
        passes = max(4, steps // ROLLOUT)
        batch_size = 128
        settings: dict[str, Any] = {"n_steps": ROLLOUT // self.n_envs, "seed": repetition, "device": "cpu"}
        env = make_vec_env("CartPole-v1", n_envs=self.n_envs, seed=repetition)
        peer = sb3_contrib.TRPO("MlpPolicy", env, batch_size=batch_size, n_critic_updates=1, **settings).learn(ROLLOUT)
        ours = ActorCritic("MlpPolicy", env, n_critic_updates=passes, critic_batch_size=batch_size, **settings)
        ours.learn(ROLLOUT)
        batch = ours.rollout_batch
        assert batch is not None
        n_minibatches = ROLLOUT // batch_size

        def time_peer() -> Sample:
            start = copy.deepcopy(peer.policy.state_dict())

            def train(n: int) -> float:
                peer.policy.load_state_dict(start)  # so that both meet the same conjugate gradients and line search
                peer.n_critic_updates = n
                begin = time.perf_counter()
                peer.train()
                return time.perf_counter() - begin

            return Sample(passes * n_minibatches, train(passes + 1) - train(1))

        def time_ours() -> Sample:
            begin = time.perf_counter()
            ours.learner.fit_critic(batch)
            return Sample(passes * n_minibatches, time.perf_counter() - begin)

        time_ours()
        time_peer()
        return time_ours, time_peer


@dataclass(frozen=True)
class UpdateCase:
    """One ``train()`` of TRPO after another, all from the same policy and the same rollout of Hopper's."""

    name: str
    n_envs: int
    ours_name: str = "TRPO"
    peer_name: str = "contrib TRPO"

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours and the peer; ``steps`` counts samples that have been in an update."""
        ours, peer = self.build(repetition)
        make_updates_equal(ours, peer)
        n_updates = max(3, steps // ROLLOUT)
        return (lambda: time_updates(ours, n_updates), lambda: time_updates(peer, n_updates))

    def build(self, seed: int) -> tuple[TRPO, sb3_contrib.TRPO]:
        """Both with the same rollout and no update yet."""
        n_steps = ROLLOUT // self.n_envs

        def collected(factory: Callable[[VecEnv, int, int], Trpo]) -> Trpo:
            model = factory(make_vec_env(HOPPER, self.n_envs, seed), n_steps, seed)
            model.train = lambda: None  # type: ignore[method-assign]
            model.learn(ROLLOUT)
            del model.train
            return model

        return collected(partial(trpo, cg_tolerance=0.0, line_search_accept_ratio=0.0)), collected(contrib_trpo)


def time_updates(model: TRPO | sb3_contrib.TRPO, n_updates: int, clock: Clock = time.perf_counter) -> Sample:
    """Time updates, each from the policy as it is now, which is so afterwards."""
    start, seconds = copy.deepcopy(model.policy.state_dict()), 0.0
    gc.collect()
    for _ in range(n_updates):
        begin = clock()
        model.train()
        seconds += clock() - begin
        model.policy.load_state_dict(start)
    return Sample(n_updates * ROLLOUT, seconds)


def make_updates_equal(ours: TRPO, peer: sb3_contrib.TRPO) -> None:
    """Let ours do as many steps of the conjugate gradient as the peer does; check that they come out at one policy."""
    observations = torch.from_numpy(peer.rollout_buffer.observations).flatten(0, 1)
    for name in ("observations", "actions", "advantages"):
        mine, theirs = (getattr(model.rollout_buffer, name) for model in (ours, peer))
        np.testing.assert_allclose(mine.reshape(theirs.shape), theirs, rtol=1e-3, atol=1e-4)

    def updated(model: BaseAlgorithm) -> Any:
        """The distribution after an update, which is undone."""
        start = copy.deepcopy(model.policy.state_dict())
        model.train()  # type: ignore[attr-defined]
        after = distribution(model)
        model.policy.load_state_dict(start)
        return after

    def distribution(model: BaseAlgorithm) -> Any:
        with torch.no_grad():
            return model.policy.get_distribution(observations).distribution  # type: ignore[operator]

    before = distribution(peer)
    product = Mock(wraps=peer.hessian_vector_product)
    with patch.object(peer, "hessian_vector_product", product):
        theirs = updated(peer)
    ours.cg_max_steps = product.call_count - 2  # the first one makes its residual, the last one the step's length
    mine = updated(ours)
    step, apart = (float(joint_kl(old, new).mean()) for old, new in ((before, mine), (mine, theirs)))
    if not apart < 0.01 * step:
        raise AssertionError(f"KL between the two new policies is {apart:.3g}, that of the step {step:.3g}")


def reinforce(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """Reinforce set up as A2C is: segments, a critic, one step of the same optimizer per rollout; both learn alike."""
    rms_prop = {"optimizer_class": torch.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
    return Reinforce(
        "MlpPolicy",
        env,
        7e-4,
        baseline="value",
        critic_learning_rate=None,
        n_critic_updates=1,
        n_steps=n_steps,
        policy_kwargs=rms_prop,
        seed=seed,
        device="cpu",
    )


def actor_critic(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """ActorCritic with its defaults, which are A2C's."""
    return ActorCritic("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def lstm_actor_critic(env: VecEnv, n_steps: int, seed: int, **memory: Any) -> BaseAlgorithm:
    """ActorCritic with an LSTM of 64 units."""
    return ActorCritic("MlpPolicy", env, n_steps=n_steps, memory=Memory("lstm", **memory), seed=seed, device="cpu")


def recurrent_ppo(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """sb3-contrib's RecurrentPPO with one epoch and the same layers; minibatches are its default."""
    policy = {"lstm_hidden_size": 64, "net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    return sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy", env, n_steps=n_steps, n_epochs=1, policy_kwargs=policy, seed=seed, device="cpu"
    )


def a2c(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """SB3's A2C with its defaults."""
    return A2C("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def trpo(env: VecEnv, n_steps: int, seed: int, **settings: Any) -> TRPO:
    """TRPO with sb3-contrib's defaults, converted to its own units: the same steps."""
    d = math.prod(env.action_space.shape or ())
    settings = {"target_kl": 0.01 * d, "cg_damping": 0.1 * d, **settings}
    return TRPO("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu", **settings)


def contrib_trpo(env: VecEnv, n_steps: int, seed: int) -> sb3_contrib.TRPO:
    """sb3-contrib's TRPO with its defaults."""
    return sb3_contrib.TRPO("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def kl_penalty(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """KLPenaltyPG set up as PPO is: actor and critic in one step, as many minibatches, whatever the KL."""
    joint: dict[str, Any] = {"critic_learning_rate": None, "n_critic_updates": 1, "max_kl_ratio": None}
    return KLPenaltyPG("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu", **joint)


def ppo(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """SB3's PPO with its defaults."""
    return PPO("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def build_gae(n_envs: int, seed: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """GAE and returns of one rollout, by ``functional.gae`` and by SB3's buffer; episodes of 50 steps on average."""
    rng = np.random.default_rng(seed)
    gamma, gae_lambda = 0.99, 0.95
    buffer = RolloutBuffer(
        ROLLOUT, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", gae_lambda=gae_lambda, gamma=gamma, n_envs=n_envs
    )
    buffer.rewards = rng.standard_normal((ROLLOUT, n_envs), dtype=np.float32)
    buffer.values = rng.standard_normal((ROLLOUT, n_envs), dtype=np.float32)
    terminated = rng.random((ROLLOUT, n_envs)) < 0.02
    buffer.episode_starts = np.concatenate([np.ones((1, n_envs)), terminated[:-1]]).astype(np.float32)
    last_values, last_dones = torch.randn(n_envs, generator=torch.Generator().manual_seed(seed)), terminated[-1]

    rewards, values = torch.from_numpy(buffer.rewards), torch.from_numpy(buffer.values)
    ends = torch.from_numpy(terminated).clone()
    ends[-1] = True
    bootstrap = torch.zeros_like(rewards)
    bootstrap[-1] = torch.where(torch.from_numpy(last_dones), 0.0, last_values)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        advantages = gae(rewards, values, ends, gamma, gae_lambda, bootstrap)
        return advantages, advantages + values

    def peer() -> tuple[np.ndarray, np.ndarray]:
        buffer.compute_returns_and_advantage(last_values, last_dones)
        return buffer.advantages, buffer.returns

    for mine, theirs in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)
    return ours, peer


def build_fisher(hidden: int, n_samples: int, seed: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Fisher-vector products at one policy of Hopper's sizes, ours and those of sb3-contrib's TRPO, of kept graphs."""
    torch.manual_seed(seed)
    nets = {"net_arch": [hidden, hidden]}
    peer = sb3_contrib.TRPO("MlpPolicy", make_vec_env(HOPPER), policy_kwargs=nets, seed=seed, device="cpu")
    observations = torch.randn(n_samples, *(peer.observation_space.shape or ()))
    with torch.no_grad():
        old = copy.copy(peer.policy.get_distribution(observations))
    new = copy.copy(peer.policy.get_distribution(observations))
    parameters, _, slope, _ = peer._compute_actor_grad(
        kl_divergence(new, old).mean(), new.log_prob(new.sample()).mean()
    )
    made = torch_distributions(action_distribution(peer.policy, observations))  # as TRPO does
    assert made is not None
    product = FisherVectorProduct([lambda: made], parameters, damping := peer.cg_damping)
    vector = torch.randn(sum(parameter.numel() for parameter in parameters))

    def ours() -> torch.Tensor:
        return product(vector)

    def theirs() -> torch.Tensor:
        return peer.hessian_vector_product(parameters, slope, vector)

    # theirs is the Hessian of the KL's mean over action dimensions, not of its sum
    joint = (theirs() - damping * vector) * math.prod(peer.action_space.shape or ()) + damping * vector
    torch.testing.assert_close(ours(), joint, rtol=1e-3, atol=1e-4 * float(joint.abs().max()))
    return ours, theirs


def gae_case(n_envs: int) -> KernelCase:
    """GAE of one rollout."""
    build = partial(build_gae, n_envs)
    return KernelCase(f"gae-{n_envs}", "functional.gae", "RolloutBuffer", build, ROLLOUT * n_envs, n_envs)


def fisher_case(hidden: int, n_samples: int) -> KernelCase:
    """One Fisher-vector product."""
    build = partial(build_fisher, hidden, n_samples)
    return KernelCase(f"fisher-{hidden}-{n_samples}", "FisherVectorProduct", "contrib TRPO", build, n_samples)


LSTM = "ActorCritic, LSTM"
lstm_shared = partial(lstm_actor_critic, critic="shared")
lstm_256 = partial(lstm_actor_critic, critic="shared", hidden_size=256)
CASES: tuple[Case, ...] = (
    TrainingCase("cartpole-1", "Reinforce", reinforce, "A2C", a2c, "CartPole-v1", 1),
    TrainingCase("cartpole-8", "Reinforce", reinforce, "A2C", a2c, "CartPole-v1", 8),
    TrainingCase("a2c-5-1", "ActorCritic", actor_critic, "A2C", a2c, "CartPole-v1", 1, n_steps=5, log_interval=100),
    TrainingCase("a2c-5-8", "ActorCritic", actor_critic, "A2C", a2c, "CartPole-v1", 8, n_steps=5, log_interval=100),
    TrainingCase("hopper-8", "ActorCritic", actor_critic, "A2C", a2c, HOPPER, 8, log_interval=100),
    TrainingCase("halfcheetah-8", "ActorCritic", actor_critic, "A2C", a2c, "HalfCheetah-v4", 8, log_interval=100),
    CriticCase("critic-8", 8),
    TrainingCase("a2c-null", "A2C", a2c, "A2C", a2c, "CartPole-v1", 8),
    TrainingCase("trpo-cartpole-8", "TRPO", trpo, "contrib TRPO", contrib_trpo, "CartPole-v1", 8),
    TrainingCase("trpo-hopper-8", "TRPO", trpo, "contrib TRPO", contrib_trpo, HOPPER, 8),
    UpdateCase("trpo-update-8", 8),
    TrainingCase("kl_penalty-8", "KLPenaltyPG", kl_penalty, "PPO", ppo, "CartPole-v1", 8),
    TrainingCase("lstm-8", LSTM, lstm_actor_critic, "RecurrentPPO", recurrent_ppo, "CartPole-v1", 8, n_steps=128),
    TrainingCase("lstm-shared-8", LSTM, lstm_shared, "ActorCritic", actor_critic, "CartPole-v1", 8, n_steps=128),
    TrainingCase("lstm-256-shared-8", LSTM, lstm_256, "ActorCritic", actor_critic, "CartPole-v1", 8, n_steps=128),
    gae_case(1),
    gae_case(8),
    gae_case(64),
    fisher_case(64, 2048),
    fisher_case(64, 16000),
    fisher_case(256, 2048),
)
