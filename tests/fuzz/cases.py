"""Random cases: a class, its arguments, envs that may be faulty, and how each case may end."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_pg import (
    NPG,
    TRPO,
    ActorCritic,
    AsyncActorCritic,
    DemonstrationLoss,
    Demonstrations,
    KLAnchor,
    KLPenaltyPG,
    Memory,
    OffPAC,
    OffPolicyPG,
    Reinforce,
)
from sb3_pg.action_masks import mask_sizes
from sb3_pg.algorithms.shell import LEARN_CHECKS
from sb3_pg.envs import ActorVecEnv
from sb3_pg.rollout import EndlessEpisodeError
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, BatchNormExtractor, policy_for

# ---------------------------------------------------------------- envs

ODD_OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "scalar": spaces.Box(-1, 1, ()),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "half bounded": spaces.Box(0, np.inf, (2,), np.float64),
    "integers": spaces.Box(-5, 300, (2,), np.int64),
    "bytes": spaces.Box(0, 255, (4,), np.uint8),
    "one number": spaces.Box(-1, 1, (1,)),
    "no number": spaces.Box(-1, 1, (0,)),
    "small image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "channels first": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    "float image": spaces.Box(0, 1, (36, 36, 1), np.float32),
    "one choice": spaces.Discrete(1),
    "from 2": spaces.Discrete(3, start=2),
    "matrix of bits": spaces.MultiBinary([2, 2]),
    "matrix of choices": spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])),
    "dict of images": spaces.Dict({"a": OBSERVATION_SPACES["image"], "b": spaces.Box(-1, 1, (2,))}),
    "dict of a scalar": spaces.Dict({"a": spaces.Box(-1, 1, ())}),
    "empty dict": spaces.Dict({}),
    "dict of dicts": spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}),
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]),
    "text": spaces.Text(3),
}
ODD_ACTIONS: dict[str, spaces.Space[Any]] = {
    "one-sided": spaces.Box(0, np.inf, (2,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (1,)),
    "scalar": spaces.Box(-1, 1, ()),
    "no number": spaces.Box(-1, 1, (0,)),
    "point": spaces.Box(np.zeros(2, np.float32), np.array([0, 1], np.float32)),
    "huge": spaces.Box(-3e38, 3e38, (2,)),
    "double": spaces.Box(-1e300, 1e300, (2,), np.float64),
    "integers": spaces.Box(-3, 4, (2,), np.int64),
    "bytes": spaces.Box(0, 255, (2,), np.uint8),
    "one choice": spaces.Discrete(1),
    "from 2": spaces.Discrete(3, start=2),
    "below 0": spaces.Discrete(3, start=-1),
    "choices from 1": spaces.MultiDiscrete([2, 3], start=[1, 1]),
    "matrix of choices": spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])),
    "matrix of bits": spaces.MultiBinary([2, 2]),
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]),
    "dict": spaces.Dict({"a": spaces.Discrete(2)}),
}


class EnvError(Exception):
    """What a faulty env raises."""


FAULTS = (
    *("NaN reward", "NaN observation", "inf observation", "huge reward", "large reward", "array as reward"),
    *("None as reward", "string as reward", "observation of another dtype", "observation of another shape"),
    *("None as observation", "raises", "never ends", "ends at once", "terminated and truncated", "four values"),
    *("None as info", "NaN reset", "reset without info", "None as reset", "reset raises", "bits as endings"),
    *("mask that allows nothing", "mask of another length", "None as mask", "text as mask"),
)


class FuzzEnv(gym.Env[Any, Any]):
    """Gives random observations, and has one fault.

    :param fault: one of ``FAULTS``, or None
    :param at: the step at which the fault occurs, or the reset, counted from 1. Some faults last from then on
    :param masks: where it gives random action masks: "method", "info" or "none"
    :param strict: whether it raises where a masked action is taken
    """

    def __init__(
        self,
        observations: Any,
        actions: Any,
        length: int,
        fault: str | None,
        at: int,
        seed: int,
        masks: str,
        strict: bool,
    ) -> None:
        # each with a generator of its own
        self.observation_space, self.action_space = copy.deepcopy(observations), copy.deepcopy(actions)
        self.length, self.fault, self.at, self.own_seed = length, fault, at, seed
        self.t = self.life = self.resets = 0
        self.observation_space.seed(seed)
        self.rng = np.random.default_rng(seed)
        self.masks, self.strict = masks if mask_sizes(actions) else "none", strict
        if self.masks == "method":
            self.action_masks = lambda: self.mask
        elif self.masks == "info":
            self.action_mask = self._draw_mask  # as Taxi has, so that its masks are found
        self.mask: Any = self._draw_mask()

    def _draw_mask(self) -> Any:
        """Draw a mask that allows an action, or the faulty one."""
        sizes = mask_sizes(self.action_space)
        parts = [np.zeros(0, bool), *(self.rng.random(size) < 0.5 for size in sizes)]
        for part in parts[1:]:
            part[self.rng.integers(len(part))] = True
        mask = np.concatenate(parts)
        faulty: Any = {
            "mask that allows nothing": np.zeros_like(mask),
            "mask of another length": mask[1:],
            "None as mask": None,
            "text as mask": "all",
        }
        return faulty[self.fault] if self.life == self.at and self.fault in faulty else mask

    def _require_allowed(self, action: Any) -> None:
        sizes = mask_sizes(self.action_space)
        start = getattr(self.action_space, "start", 0)
        choices = np.ravel(np.asarray(action) - start).astype(int)
        places = np.cumsum([0, *sizes])[:-1] + choices
        assert self.mask[places].all(), f"action {action} is masked: {self.mask}"

    def _info(self) -> dict[str, Any]:
        self.mask = self._draw_mask()
        return {"action_mask": self.mask} if self.masks == "info" else {}

    def _spoiled(self, obs: Any, value: float) -> Any:
        if isinstance(obs, dict):
            return {key: self._spoiled(part, value) for key, part in obs.items()}
        array = np.asarray(obs)
        return np.full_like(array, value) if array.dtype.kind == "f" else obs

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.resets = 0, self.resets + 1
        obs, now = self.observation_space.sample(), self.resets == self.at
        if now and self.fault == "reset raises":
            raise EnvError("reset")
        if now and self.fault == "reset without info":
            return obs
        if now and self.fault == "None as reset":
            return None
        if now and self.fault == "NaN reset":
            obs = self._spoiled(obs, np.nan)
        return obs, self._info()

    def step(self, action: Any) -> Any:
        if self.strict and self.masks != "none":
            self._require_allowed(action)
        self.t, self.life = self.t + 1, self.life + 1
        obs, reward = self.observation_space.sample(), float(self.rng.normal())
        truncated, info = self.t % 7 == 0, self._info()
        terminated = self.t >= self.length and not truncated
        now, since, fault = self.life == self.at, self.life >= self.at, self.fault
        result: Any = {
            "NaN reward": lambda: (obs, math.nan, terminated, truncated, info),
            "NaN observation": lambda: (self._spoiled(obs, np.nan), reward, terminated, truncated, info),
            "inf observation": lambda: (self._spoiled(obs, np.inf), reward, terminated, truncated, info),
            "huge reward": lambda: (obs, 3e38, terminated, truncated, info),
            "large reward": lambda: (obs, 1e18, terminated, truncated, info),
            "None as reward": lambda: (obs, None, terminated, truncated, info),
            "string as reward": lambda: (obs, "one", terminated, truncated, info),
            "observation of another shape": lambda: (np.zeros((3, 5)), reward, terminated, truncated, info),
            "None as observation": lambda: (None, reward, terminated, truncated, info),
            "four values": lambda: (obs, reward, terminated, info),
            "None as info": lambda: (obs, reward, terminated, truncated, None),
            "terminated and truncated": lambda: (obs, reward, True, True, info),
        }
        always: Any = {
            "array as reward": lambda: (obs, np.array([reward]), terminated, truncated, info),
            "observation of another dtype": lambda: (_as_double(obs), reward, terminated, truncated, info),
            "never ends": lambda: (obs, reward, False, False, info),
            "ends at once": lambda: (obs, reward, True, False, info),
            "bits as endings": lambda: (obs, reward, np.bool_(terminated), int(truncated), info),
        }
        if now and fault == "raises":
            raise EnvError("step")
        if now and fault in result:
            return result[fault]()
        return always[fault]() if since and fault in always else (obs, reward, terminated, truncated, info)


def _as_double(obs: Any) -> Any:
    return {key: _as_double(part) for key, part in obs.items()} if isinstance(obs, dict) else np.asarray(obs, float)


WRAPPERS = ("none", "monitor", "normalize", "normalize rewards", "vec monitor", "stack", "normalize stack")


def wrapped(env: VecEnv, wrapper: str) -> VecEnv:
    """Return the envs in a wrapper, or as they are if it does not take their observations."""
    space = env.observation_space
    boxes = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    only_boxes = bool(boxes) and all(isinstance(part, spaces.Box) and part.shape for part in boxes)
    floats = only_boxes and all(part.dtype == np.float32 for part in boxes)
    if wrapper.startswith("normalize"):
        if wrapper == "normalize stack" and floats:
            env = VecFrameStack(env, 2)
        return VecNormalize(env, norm_obs=only_boxes and wrapper != "normalize rewards")
    if wrapper == "vec monitor":
        return VecMonitor(env)
    return VecFrameStack(env, 2) if wrapper == "stack" and floats else env


# ---------------------------------------------------------------- arguments

CLASSES: tuple[Any, ...] = (Reinforce, ActorCritic, AsyncActorCritic, NPG, TRPO, KLPenaltyPG, OffPolicyPG, OffPAC)
#: What makes each class learn from a few steps.
SMALL: dict[Any, dict[str, Any]] = {
    Reinforce: {"n_episodes": None, "n_critic_updates": 2},
    ActorCritic: {"n_steps": 5},
    AsyncActorCritic: {"n_steps": 5},
    NPG: {"n_steps": 8, "batch_size": 8, "n_critic_updates": 2, "cg_max_steps": 3},
    TRPO: {"n_steps": 8, "batch_size": 8, "n_critic_updates": 2, "cg_max_steps": 3},
    KLPenaltyPG: {"n_steps": 8, "batch_size": 8, "n_epochs": 2},
    OffPolicyPG: {"train_freq": 8, "gradient_steps": 2, "buffer_size": 500},
    OffPAC: {"learning_starts": 8, "batch_size": 8, "buffer_size": 64},
}


class Named:
    """A function with a name that a report can print."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def __call__(self, progress: Any) -> Any:
        return self.function(progress)

    def __repr__(self) -> str:
        return self.name


class Silent(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def __repr__(self) -> str:
        return "Silent()"


RATES = [
    *(1e-3, 0.0, 1, "lin_1e-3", np.float64(1e-3), np.float32(1e-3), Fraction(1, 1000)),
    *(Named("falling", lambda p: 1e-3 * p), Named("numpy", lambda p: np.float32(1e-3 * p))),
]
BOOLEANS: list[Any] = [True, False, np.bool_(True)]
FRACTIONS: list[Any] = [0.0, 0.5, 1.0, 1, np.float64(0.9), Fraction(1, 2)]
COUNTS: list[Any] = [1, 2, 5, np.int64(3), np.int32(2)]
SCALES: list[Any] = [0.1, 1.0, 3, 1e-6, np.float32(0.5)]
WEIGHTS: list[Any] = [0.0, *SCALES]
#: argument -> allowed values, each at least together with some other arguments
VALID: dict[str, list[Any]] = {
    "learning_rate": RATES,
    "critic_learning_rate": [None, *RATES],
    "step_size": RATES,
    "gamma": FRACTIONS,
    "gae_lambda": FRACTIONS,
    "tau": FRACTIONS,
    "line_search_accept_ratio": FRACTIONS,
    "ent_coef": WEIGHTS,
    "vf_coef": WEIGHTS,
    "kl_coef": WEIGHTS,
    "cg_damping": WEIGHTS,
    "cg_tolerance": WEIGHTS,
    "rms_prop_eps": WEIGHTS,
    "min_ess": [0.0, 0.1, np.float64(0.5)],
    "max_grad_norm": [None, math.inf, *SCALES],
    "max_ratio": [None, *SCALES],
    "max_trace": [None, *SCALES],
    "correction": ["vtrace", "none"],
    "max_policy_lag": [None, 0, 1, np.int64(3)],
    "queue_size": COUNTS,
    "deterministic": BOOLEANS,
    "actor_timeout": [None, 600, np.float64(100.0)],
    "max_restarts": [0, np.int64(2)],
    "max_kl_ratio": [None, 1.5, 2],
    "dual_learning_rate": SCALES,
    "target_kl": [0.01, 1, 1e-8, "lin_0.01", np.float64(0.02), Named("falling", lambda p: 0.01 * p)],
    "line_search_shrinking_factor": [0.5, 0.8, np.float32(0.9), 0.01],
    "state_discount": BOOLEANS,
    "normalize_advantage": BOOLEANS,
    "normalize_value_targets": BOOLEANS,
    "recompute_advantage": BOOLEANS,
    "use_rms_prop": BOOLEANS,
    "self_normalize": BOOLEANS,
    "use_sde": [False, np.bool_(False), True],
    "optimize_memory_usage": [False],
    "_init_setup_model": [True],
    "truncation": [None, "bootstrap", "terminal"],
    "critic_fit": ["after", "before"],
    "critic_warmup_updates": [0, 1, np.int64(2)],
    "critic_batch_size": [None, 4],
    "on_nonfinite": ["raise", "skip"],
    "act_device": [None, "cpu", th.device("cpu")],
    "memory": [None, "lstm", {"kind": "gru", "hidden_size": np.int64(3)}, Memory("gru", 2, 2, "none", 2)],
    "use_action_masks": [None, False],
    "anchor": [None, KLAnchor(0.0), KLAnchor(1, 0.5), KLAnchor(1e-3, 0.9)],
    "device": ["cpu", "auto", th.device("cpu")],
    "max_episode_steps": [30, np.int64(40), 10**9],
    "n_steps": [None, 4, 1, np.int64(6)],
    "n_episodes": [None, np.int64(6), 12],
    "rollout_buffer_class": [None],
    "rollout_buffer_kwargs": [None, {}],
    "returns": ["reward_to_go", "total"],
    "baseline": ["none", "mean", "leave_one_out", "time", "optimal", "linear", "value"],
    "baseline_kwargs": [None, {}],
    "advantage": ["gae", "td", "td_lambda", "n_step", "monte_carlo"],
    "critic_target": [None, "lambda", "td", "n_step", "monte_carlo"],
    "objective": ["discounted", "discounted", "average"],
    "average_reward_step_size": [None, 0.1, 1, np.float64(0.01)],
    "reset_cost": WEIGHTS,
    "value_center": FRACTIONS,
    "td_steps": COUNTS,
    "n_critic_updates": COUNTS,
    "n_epochs": COUNTS,
    "cg_max_steps": COUNTS,
    "line_search_max_iter": COUNTS,
    "batch_size": [1, 4, np.int64(8), 10**6],
    "dual_update": ["additive", "multiplicative"],
    "fisher_subsample": [1, np.int64(2)],
    "sub_sampling_factor": [1, np.int64(2)],
    "fisher_chunk_size": [1, 7, 10**6],
    "step": ["kl", "fixed"],
    "ratio": ["per_step", "prefix", "per_decision", "trajectory"],
    "buffer_size": [200, np.int64(300)],
    "buffer_trajectories": [1, 5, np.int64(8)],
    "learning_starts": [0, np.int64(4), 12],
    "train_freq": [1, np.int64(3), (4, "step"), [2, "step"], (np.int64(6), "episode")],
    "gradient_steps": [1, -1, np.int64(2)],
    "replay_buffer_class": [None],
    "replay_buffer_kwargs": [None, {}],
    "action_noise": [None],
    "behavior_policy": [None],
    "actor_gradient": [None, "score", "importance"],
    "n_actions": [2, np.int64(3)],
    "sde_sample_freq": [-1, 2],
    "stats_window_size": [1, np.int64(10)],
    "tensorboard_log": [None],
    "policy_kwargs": [
        *(None, {}, {"net_arch": []}, {"net_arch": [np.int64(4)]}, {"optimizer_class": th.optim.SGD}),
        *({"optimizer_kwargs": {"weight_decay": np.float64(1e-3)}}, {"activation_fn": th.nn.ReLU}),
        *({"log_std_init": -1}, {"share_features_extractor": False}, {"normalize_images": False}),
    ],
    "verbose": [0, 1, True, np.int64(0)],
    "seed": [None, 0, np.int64(3), 2**32 - 1],
}
ANYTHING: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3.5, 0.0, -0.5, math.nan, math.inf, -math.inf, 10**30, 10**400, 1e308, 1e-320),
    *("", "auto", "fast", "lin_x", "lin_1e400", "lin_-1", (), [], {}, [1], (1, 2), (1, "epoch"), ("1", "step")),
    *(Fraction(1, 3), Fraction(10**400), np.int64(-3), np.float64("nan"), np.float32("inf"), np.array([1.0])),
    *(object, dict, th.tensor(1.0), th.nn.ReLU, 1j, b"1", np.bool_(False), gym.spaces.Discrete(2)),
    *(Named("None", lambda _: None), Named("NaN later", lambda p: 0.01 if p > 0.7 else math.nan)),
    *(Named("negative later", lambda p: 0.01 if p > 0.7 else -1), Named("text", lambda _: "1")),
    *(lambda: 1, lambda a, b: a + b, Named("inf", lambda _: math.inf), Named("1e308", lambda _: 1e308)),
]
WRONG_POLICY_KWARGS: list[Any] = [
    *({"net_arch": [-1]}, {"net_arch": [0]}, {"net_arch": "64"}, {"net_arch": [2.5]}, {"net_arch": {"pi": [-3]}}),
    *({"squash_output": True}, {"optimizer_class": th.optim.LBFGS}, {"optimizer_class": th.optim.SparseAdam}),
    *({"optimizer_class": "Adam"}, {"optimizer_kwargs": {"betas": 3}}, {"optimizer_kwargs": {"lr": 1}}),
    *({"foo": 1}, {"activation_fn": th.nn.ReLU()}, {"activation_fn": "relu"}, {"ortho_init": "no"}),
    *({"features_extractor_class": NatureCNN}, {"features_extractor_class": int}, {"log_std_init": math.nan}),
    *({"features_extractor_kwargs": {"features_dim": -1}}, {"features_extractor_kwargs": [1]}, {"lr_schedule": 3}),
    *({"n_critics": 0}, {"use_sde": True}, {"observation_space": None}, {1: 2}, {"log_std_init": "x"}),
    {"features_extractor_class": BatchNormExtractor},
]
DEVICES: list[Any] = ["mps", "meta", "cuda:77", "gpu", "xpu", th.device("meta")]
#: argument -> wrong or odd values, besides those in ``ANYTHING``
WRONG: dict[str, list[Any]] = {
    "policy_kwargs": WRONG_POLICY_KWARGS,
    "policy": ["CnnPolicy", "MultiInputPolicy", "MlpLstmPolicy", "mlp", dict, BatchNormExtractor],
    "device": DEVICES,
    "act_device": DEVICES,
    "use_action_masks": [True],
    "anchor": [KLAnchor, 0.1, DemonstrationLoss(Demonstrations(np.zeros((4, 2)), np.zeros(4, int)), 1.0)],
    "memory": ["rnn", {"kind": "rnn"}, {"foo": 1}, Memory, {"n_layers": 0}, {1: 2}],
    "rollout_buffer_kwargs": [{"foo": 1}, {"n_envs": 9}, {1: 2}],
    "replay_buffer_kwargs": [{"foo": 1}, {"n_envs": 9}, {1: 2}],
    "baseline_kwargs": [{"foo": 1}, {"component_wise": True}],
}
LEARN: dict[str, list[Any]] = {
    "total_timesteps": [0, 1, np.int64(40), 40.0, -1, math.nan, 10**400, "1", None],
    "callback": [None, Silent(), [], [Silent()], lambda *_: True, 3, [3], Silent, "x"],
    "log_interval": [1, np.int64(2), None, "auto", 0, 2.5, "x"],
    "tb_log_name": [None, "x", 3],
    "reset_num_timesteps": [True, False, None],
    "progress_bar": [False, 3],
}


@dataclass
class Case:
    """A model to make, and how to train it."""

    cls: Any
    observations: str
    actions: str
    n_envs: int
    wrapper: str
    length: int
    fault: str | None
    at: int
    masks: str = "none"
    arguments: dict[str, Any] = field(default_factory=dict)
    learn: dict[str, Any] = field(default_factory=dict)
    #: in this process; 0 for a DummyVecEnv
    n_actors: int = 0

    def env(self) -> gym.Env[Any, Any] | VecEnv:
        """Return new envs, the last one with the fault; a single env where SB3 cannot vectorize its observations."""
        observations = {**OBSERVATION_SPACES, **ODD_OBSERVATIONS}[self.observations]
        actions = {**ACTION_SPACES, **ODD_ACTIONS}[self.actions]

        alone = isinstance(observations, spaces.Tuple | spaces.Text) or self.observations == "dict of dicts"
        n_envs = 1 if alone else self.n_envs

        def make(i: int) -> gym.Env[Any, Any]:
            fault = self.fault if i == n_envs - 1 else None
            strict = self.arguments.get("use_action_masks") is not False
            env = FuzzEnv(observations, actions, self.length, fault, self.at, i, self.masks, strict)
            return Monitor(env) if self.wrapper == "monitor" else env

        if alone:
            return make(0)
        env_fns: Any = [lambda i=i: make(i) for i in range(self.n_envs)]
        n = min(self.n_actors, self.n_envs)
        return wrapped(ActorVecEnv(env_fns, n, "serial") if n else DummyVecEnv(env_fns), self.wrapper)


@st.composite
def cases(draw: Any) -> Case:
    """Draw a case. Seven in ten have valid arguments and envs; the others have something wrong."""
    kind = draw(st.sampled_from(["valid"] * 28 + ["argument"] * 4 + ["fault"] * 5 + ["odd space"] * 3 + ["learn"]))
    cls = draw(st.sampled_from(CLASSES))
    observations, actions = list(OBSERVATION_SPACES), list(ACTION_SPACES)
    if kind == "odd space":
        if draw(st.booleans()):
            observations = list(ODD_OBSERVATIONS)
        else:
            actions = list(ODD_ACTIONS)
    if draw(st.integers(0, 5)):  # images take long
        observations = [name for name in observations if "image" not in name]
    names = draw(st.lists(st.sampled_from(sorted(VALID.keys() & cls.checks.keys())), max_size=3, unique=True))
    arguments = {name: draw(st.sampled_from(VALID[name])) for name in names}
    if kind == "argument":
        name = draw(st.sampled_from(sorted(cls.checks.keys() - {"env"})))
        values = [*WRONG.get(name, []), *(() if name == "policy_kwargs" else ANYTHING)]
        arguments[name] = draw(st.sampled_from(values))
    learn = {}
    if kind == "learn":
        name = draw(st.sampled_from(sorted(LEARN)))
        learn[name] = draw(st.sampled_from(LEARN[name]))
    return Case(
        cls,
        draw(st.sampled_from(observations)),
        draw(st.sampled_from(actions)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(WRAPPERS)),
        draw(st.sampled_from([1, 2, 5, 9])),
        draw(st.sampled_from(FAULTS)) if kind == "fault" else None,
        draw(st.integers(1, 30)) if kind == "fault" else 0,
        draw(st.sampled_from(["none"] * 4 + ["method", "info"])),
        arguments,
        learn,
        draw(st.sampled_from([0, 0, 0, 1, 2, 3])),
    )


# ---------------------------------------------------------------- how a case may end


class WrongError(AssertionError):
    """A case ended in a way that is not allowed."""


class _Watch(BaseCallback):
    """Keeps the parameters of the latest beginning or end of a rollout."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.latest: th.Tensor | None = None
        self.n_steps = n_steps

    def _look(self) -> None:
        policy: Any = self.model.policy
        self.latest = th.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()

    def _on_rollout_start(self) -> None:
        self._look()

    def _on_rollout_end(self) -> None:
        self._look()

    def _on_step(self) -> bool:
        return self.num_timesteps < self.n_steps

    def __repr__(self) -> str:
        return "_Watch()"


_TENSORS = {
    *("observation", "observations", "reward", "rewards", "action", "actions", "gradient", "parameter", "advantage"),
    *("log_prob", "value", "importance", "observation_space", "action_space", "env", "train_freq"),
    "action_mask",
}


def _names_something(cls: Any, message: str) -> bool:
    words = set(re.findall(r"\w+", message))
    return bool(words & {*cls.checks, *LEARN_CHECKS, *_TENSORS})


def summarized(error: BaseException) -> str:
    """Return an error's message without its numbers and names."""
    message = re.sub(r", got .*", "", str(error), flags=re.DOTALL)
    message = re.sub(r"=[^ ]+|\[[^]]*\]|'[^']*'", "=…", message)
    message = re.sub(r"-?\b\d[\d.e+]*|\bnan\b|-?\binf\b", "#", message)
    return f"{type(error).__name__}: {message[:90]}"


def outcome(case: Case, made: list[Any] | None = None) -> str:
    """Run a case.

    :param made: the model is added to it, if there is one
    :return: "learned", "the env's own error", or the message of the refusal without numbers and names
    :raises WrongError: it ended in another way, or the parameters have changed
    """
    set_random_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return _outcome(case, [] if made is None else made)


def _outcome(case: Case, made: list[Any]) -> str:
    env = case.env()
    watch, model = _Watch(60 * case.n_envs), None
    learn = {"total_timesteps": 20 * case.n_envs, "callback": watch, **case.learn}
    try:
        model = case.cls(env=env, **_arguments(case, env.observation_space))
        made.append(model)
        model.learn(**learn)
    except EnvError:
        _require_unchanged(case, model, watch)
        if case.fault not in ("raises", "reset raises"):
            raise WrongError("an error of an env without fault") from None
        return "the env's own error"
    except (ValueError, TypeError, EndlessEpisodeError) as error:
        if not _names_something(case.cls, str(error)):
            raise WrongError(f"names nothing: {summarized(error)}") from error
        _require_unchanged(case, model, watch)
        return summarized(error)
    except Exception as error:
        raise WrongError(summarized(error)) from error
    if not all(parameter.isfinite().all() for parameter in model.policy.parameters()):
        raise WrongError("learned, and a parameter is not finite")
    return "learned"


def _arguments(case: Case, space: spaces.Space[Any]) -> dict[str, Any]:
    """Return the case's arguments, and others that make it short."""
    kwargs = {"policy": policy_for(space), **SMALL[case.cls], "device": "cpu", "seed": 0}
    if "max_episode_steps" in case.cls.checks:
        kwargs["max_episode_steps"] = 40
    kwargs |= case.arguments
    if kwargs.get("policy_kwargs") in (None, {}):
        small: dict[str, Any] = {"net_arch": [4]}
        is_image = kwargs["policy"] == "CnnPolicy"
        kwargs["policy_kwargs"] = small | ({"features_extractor_kwargs": {"features_dim": 4}} if is_image else {})
    return kwargs


def _require_unchanged(case: Case, model: Any, watch: _Watch) -> None:
    """Require that a failed update has changed nothing."""
    if model is None or not hasattr(model, "policy"):
        return
    now = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    if not now.isfinite().all():
        raise WrongError("parameters are not finite after an error")
    # An update of OffPolicyPG has several steps; those before the one that failed stay taken.
    if watch.latest is not None and case.cls is not OffPolicyPG and not th.equal(now, watch.latest):
        raise WrongError("parameters have changed with an error")


@dataclass
class Summary:
    """Counts how cases ended."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[Case]] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        """Run a case, and count how it ended."""
        try:
            self.counts[outcome(case)] += 1
        except WrongError as error:
            self.counts["WRONG"] += 1
            self.wrong.setdefault(str(error), []).append(case)

    @property
    def share_learned(self) -> float:
        return self.counts["learned"] / max(1, sum(self.counts.values()))

    def __str__(self) -> str:
        lines = [f"{n:6d}  {what}" for what, n in self.counts.most_common()]
        lines.append(f"{sum(self.counts.values())} cases, {self.share_learned:.1%} learned")
        for message, found in self.wrong.items():
            lines.append(f"WRONG {len(found)} times: {message}\n       {found[0]}")
        return "\n".join(lines)
