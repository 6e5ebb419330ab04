"""No argument is ignored silently: another value changes something, gives a warning, or is an error."""

import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_pg import (
    NPG,
    TRPO,
    ActorCritic,
    AsyncActorCritic,
    DemonstrationLoss,
    Demonstrations,
    KLPenaltyPG,
    OffPAC,
    OffPolicyPG,
    Reinforce,
)
from sb3_pg.algorithms.off_pac.policies import OffPACPolicy
from sb3_pg.envs import ActorVecEnv
from sb3_pg.rollout import BehaviorReplayBuffer, TrajectoryReplayBuffer, TrajectoryRolloutBuffer
from tests.helpers import FaultyEnv, ScriptedEnv, vec

Arguments = dict[str, Any]
IN_SEGMENTS: Arguments = {"n_steps": 16, "batch_size": 8}
#: What makes each class learn from a few steps.
CLASSES: dict[Any, Arguments] = {
    Reinforce: {"n_episodes": 4},
    ActorCritic: {"n_steps": 8},
    AsyncActorCritic: {"n_steps": 8},
    NPG: IN_SEGMENTS,
    TRPO: IN_SEGMENTS,
    KLPenaltyPG: IN_SEGMENTS,
    OffPolicyPG: {"train_freq": (4, "episode"), "gradient_steps": 2},
    OffPAC: {"learning_starts": 8, "batch_size": 8, "buffer_size": 200},
}
TRUST_REGION = (NPG, TRPO, KLPenaltyPG)


def constructors(cls: type) -> Iterator[Any]:
    """Those of a class and of its bases, without SB3's."""
    for base in cls.__mro__:
        if "__init__" in vars(base) and base.__module__.startswith("sb3_pg."):
            yield vars(base)["__init__"]


def argument_names(cls: type) -> list[str]:
    parameters = [p for init in constructors(cls) for p in inspect.signature(init).parameters.values()]
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
    return sorted(named)


# ---------------------------------------------------------------- what another value changes


class TaggedRolloutBuffer(TrajectoryRolloutBuffer):
    def __init__(self, *args: Any, tag: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class TaggedTrajectoryBuffer(TrajectoryReplayBuffer):
    def __init__(self, *args: Any, tag: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class TaggedReplayBuffer(BehaviorReplayBuffer):
    def __init__(self, *args: Any, tag: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class OtherPolicy(ActorCriticPolicy):
    pass


class OtherOffPACPolicy(OffPACPolicy):
    pass


class WhoSees(FlattenExtractor):
    """Knows which of its copies have seen observations."""

    seen: ClassVar[set[int]] = set()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.seen.add(id(self))
        result: th.Tensor = super().forward(observations)
        return result


class OnlyTheFirst(ScriptedEnv):
    """Allows the first action alone."""

    def action_masks(self) -> np.ndarray:
        masks: np.ndarray = np.arange(int(getattr(self.action_space, "n", 0))) == 0
        return masks


def first_action(obs: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(obs), dtype=int), np.full(len(obs), -0.1)


def env_of(lengths: tuple[int, ...] = (3, 5), **kwargs: Any) -> Any:
    return vec(*(ScriptedEnv(lengths, (False, True), first_reward=10.0 * i, **kwargs) for i in range(2)))


def actors_of(make: Any) -> Any:
    return ActorVecEnv([lambda: Monitor(make()) for _ in range(2)], 2, "serial")


BOX: Arguments = {"env": lambda: env_of(action_space=spaces.Box(-1, 1, (2,)))}
SHARED_STEP: Arguments = {"critic_learning_rate": None, "n_critic_updates": 1}
OWN_STEP: Arguments = {"critic_learning_rate": 0.01}
REJECTED: Arguments = {"target_kl": 5.0, "line_search_accept_ratio": 0.9, "normalize_advantage": True}
FAULT: Arguments = {"env": lambda: vec(*(FaultyEnv("reward", 6, lengths=(9,)) for _ in range(2)))}
MASKED: Arguments = {"env": lambda: vec(*(OnlyTheFirst((3, 5)) for _ in range(2)))}
WATCHED: Arguments = {"policy_kwargs": {"features_extractor_class": WhoSees}}

ACTORS: Arguments = {"env": lambda: actors_of(ScriptedEnv), "deterministic": True}

#: Argument -> another value, and the other arguments beside which it has its effect.
AVERAGE: Arguments = {"objective": "average"}
CHANGES: dict[str, tuple[Any, Arguments]] = {
    "policy": (OtherPolicy, {}),
    "env": (lambda: env_of((4,)), {}),
    "learning_rate": (0.05, {}),
    "gamma": (0.5, {}),
    "ent_coef": (0.5, {}),
    "vf_coef": (3.0, SHARED_STEP),
    "max_grad_norm": (0.01, {}),
    "state_discount": (True, {"gamma": 0.9}),
    "normalize_advantage": (True, {}),
    "truncation": ("terminal", {}),
    "critic_learning_rate": (0.05, {}),
    "n_critic_updates": (3, {}),
    "critic_batch_size": (3, OWN_STEP),
    "critic_fit": ("before", OWN_STEP),
    "critic_warmup_updates": (1, {}),
    "normalize_value_targets": (True, {}),
    "max_episode_steps": (2, {"n_steps": None}),
    "on_nonfinite": ("skip", FAULT),
    "act_device": ("cpu:0", WATCHED),
    "memory": ("gru", {}),
    "use_action_masks": (False, MASKED),
    "anchor": (DemonstrationLoss(Demonstrations(np.zeros((4, 3)), np.zeros(4, int)), 1.0), {}),
    "use_sde": (True, BOX),
    "sde_sample_freq": (1, {**BOX, "use_sde": True}),
    "stats_window_size": (3, {}),
    "tensorboard_log": ("log", {}),
    "policy_kwargs": ({"net_arch": [4]}, {}),
    "verbose": (1, {}),
    "seed": (1, {}),
    "device": ("cpu:0", {}),
    "_init_setup_model": (False, {}),
    "n_steps": (4, {}),
    "n_episodes": (2, {"n_steps": None}),
    "gae_lambda": (0.5, {}),
    "rollout_buffer_class": (TaggedRolloutBuffer, {}),
    "rollout_buffer_kwargs": ({"tag": 1}, {"rollout_buffer_class": TaggedRolloutBuffer}),
    # Monte-Carlo
    "returns": ("total", {}),
    "baseline": ("mean", {}),
    "baseline_kwargs": ({"component_wise": True}, {"baseline": "optimal"}),
    # bootstrapped
    "advantage": ("td", {}),
    "td_steps": (2, {"advantage": "n_step"}),
    "critic_target": ("td", {}),
    "recompute_advantage": (True, {"n_critic_updates": 3}),
    "rms_prop_eps": (0.5, {}),
    "use_rms_prop": (False, {}),
    # a limit of the KL
    "batch_size": (4, {}),
    "cg_damping": (10.0, {}),
    "cg_max_steps": (1, {}),
    "cg_tolerance": (0.9, {}),
    "fisher_chunk_size": (3, {}),
    "fisher_subsample": (4, {}),
    "sub_sampling_factor": (4, {}),
    "line_search_shrinking_factor": (0.3, REJECTED),
    "line_search_max_iter": (1, REJECTED),
    "line_search_accept_ratio": (0.0, REJECTED),
    "target_kl": (0.1, {}),
    "step": ("fixed", {}),
    "step_size": (0.5, {"step": "fixed"}),
    "n_epochs": (2, {}),
    "kl_coef": (10.0, {}),
    "dual_update": ("multiplicative", {}),
    "dual_learning_rate": (500.0, {}),
    "max_kl_ratio": (None, {"learning_rate": 0.02}),
    # the average reward
    "objective": ("average", {}),
    "average_reward_step_size": (0.01, AVERAGE),
    "reset_cost": (3.0, AVERAGE),
    "value_center": (1.0, AVERAGE),
    # replaying
    "buffer_size": (9, {}),
    "buffer_trajectories": (3, {}),
    "learning_starts": (40, {}),
    "train_freq": (5, {}),
    "gradient_steps": (3, {}),
    "replay_buffer_class": (TaggedTrajectoryBuffer, {}),
    "replay_buffer_kwargs": ({"tag": 1}, {"replay_buffer_class": TaggedTrajectoryBuffer}),
    "optimize_memory_usage": (True, {}),
    "action_noise": (NormalActionNoise(np.zeros(1), np.ones(1)), {}),
    "behavior_policy": (first_action, {}),
    "ratio": ("prefix", {}),
    "max_ratio": (0.5, {}),
    "self_normalize": (True, {}),
    "min_ess": (1.0, {"ratio": "prefix"}),
    "actor_gradient": ("score", {}),
    "n_actions": (2, {"actor_gradient": "score"}),
    "tau": (0.5, {}),
    # asynchronous
    "correction": ("none", {"gae_lambda": 0.5}),
    "max_trace": (0.5, {}),
    "max_policy_lag": (1, ACTORS),
    "queue_size": (3, {}),
    "deterministic": (True, {"env": ACTORS["env"]}),
    "actor_timeout": (9.0, {}),
    "max_restarts": (1, {}),
}
#: Where a class wants another value, or other arguments beside it.
CHANGES_OF: dict[tuple[Any, str], tuple[Any, Arguments]] = {
    (OffPAC, "policy"): (OtherOffPACPolicy, {}),
    (Reinforce, "gae_lambda"): (0.5, {"n_episodes": None, "n_steps": 8, "rollout_buffer_class": RolloutBuffer}),
    (Reinforce, "n_steps"): (4, {"n_episodes": None}),
    (ActorCritic, "vf_coef"): (3.0, {}),
    (ActorCritic, "max_episode_steps"): (2, {"n_steps": None}),
    (AsyncActorCritic, "max_episode_steps"): (2, {}),
    (OffPolicyPG, "max_episode_steps"): (2, {}),
    (OffPolicyPG, "on_nonfinite"): ("skip", {**FAULT, "train_freq": (2, "episode")}),
    **{(cls, "max_episode_steps"): (2, {"n_steps": None, "n_episodes": 2}) for cls in TRUST_REGION},
    **{(cls, "normalize_advantage"): (False, {}) for cls in TRUST_REGION},
    (NPG, "target_kl"): (0.1, {}),
    (OffPAC, "replay_buffer_class"): (ReplayBuffer, {}),
    (OffPAC, "replay_buffer_kwargs"): ({"tag": 1}, {"replay_buffer_class": TaggedReplayBuffer}),
    (OffPAC, "max_ratio"): (0.5, {"actor_gradient": "importance"}),
    (OffPAC, "n_steps"): (3, {}),
    (OffPAC, "buffer_size"): (10, {}),
    (KLPenaltyPG, "critic_batch_size"): (3, {}),
    **{(cls, "critic_batch_size"): (3, {"batch_size": 128}) for cls in (NPG, TRPO)},
}
#: What an error says in an argument's stead, where an optional package is missing.
NAMES = {"tensorboard_log": "tensorboard"}
#: Another value gives a warning; "device": SB3 takes "cpu:0" for a GPU.
WARN: set[Any] = {
    *("sub_sampling_factor", "on_nonfinite", "learning_starts", "min_ess", "device"),
    *((AsyncActorCritic, name) for name in ("queue_size", "actor_timeout", "max_restarts")),
    (AsyncActorCritic, "max_episode_steps"),
    *((NPG, f"line_search_{name}") for name in ("shrinking_factor", "max_iter", "accept_ratio")),
}
#: Arguments of other classes that some do not take, which their error says.
REFUSED = {(NPG, "vf_coef"), (TRPO, "vf_coef"), (NPG, "max_grad_norm"), (TRPO, "max_grad_norm")}
CASES = [(cls, name) for cls in CLASSES for name in argument_names(cls)]


def trace(cls: Any, given: Arguments, capsys: Any, tmp_path: Path) -> dict[str, Any]:
    """What a short training leaves behind, or says."""
    env = given.get("env", env_of)()
    arguments = {**CLASSES[cls], "device": "cpu", "seed": 0, **{k: v for k, v in given.items() if k != "env"}}
    policy = arguments.pop("policy", "MlpPolicy")
    if "tensorboard_log" in arguments:
        arguments["tensorboard_log"] = str(tmp_path / arguments["tensorboard_log"])
    WhoSees.seen.clear()
    capsys.readouterr()
    left: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = cls(policy, env, **arguments)
            left["policy"] = type(getattr(model, "policy", None))
            if left["policy"] is not type(None):
                model.learn(64)
                left["weights"] = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
                left["window"] = model.ep_info_buffer.maxlen
                buffer = getattr(model, "rollout_buffer", None) or model.replay_buffer
                left["buffer"] = (type(buffer), getattr(buffer, "tag", None))
                left["steps"] = model.num_timesteps
            left["device"] = str(model.device)
        except Exception as error:  # noqa: BLE001  # it is what is looked at
            left["error"] = f"{type(error).__name__}: {error}"
    # a ResourceWarning may be of a file that an earlier test has left open
    left["warnings"] = sorted({str(one.message) for one in caught if one.category is not ResourceWarning})
    left["printed"] = re.sub(r"\d", "", capsys.readouterr().out)[:40]
    left["files"] = len(list(tmp_path.iterdir()))
    left["acting"] = len(WhoSees.seen)
    return left


def differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    names = []
    for name in sorted(a.keys() | b.keys()):
        one, other = a.get(name), b.get(name)
        if isinstance(one, th.Tensor) and isinstance(other, th.Tensor):
            names += [] if one.shape == other.shape and th.equal(one, other) else [name]
        elif one != other or type(one) is not type(other):
            names.append(name)
    return names


def test_every_argument_has_a_case() -> None:
    for cls in CLASSES:
        missing = [name for name in argument_names(cls) if name not in CHANGES and (cls, name) not in CHANGES_OF]
        assert missing == [], f"{cls.__name__}: say in CHANGES what another value changes"
    assert CHANGES.keys() <= {name for _, name in CASES}
    assert CHANGES_OF.keys() <= set(CASES)
    assert {name for _, name in CASES} >= {"n_steps", "gamma", "policy", "tau", "kl_coef", "cg_damping"}


@pytest.mark.parametrize("cls", CLASSES)
def test_two_trainings_alike_leave_the_same(cls: Any, capsys: Any, tmp_path: Path) -> None:
    traces = [trace(cls, {}, capsys, tmp_path) for _ in range(2)]
    assert differ(*traces) == []
    assert "error" not in traces[0]
    assert traces[0]["weights"].isfinite().all()


@pytest.mark.parametrize(("cls", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_another_value_changes_something(cls: Any, name: str, capsys: Any, tmp_path: Path) -> None:
    value, beside = CHANGES_OF.get((cls, name), CHANGES[name])
    known = argument_names(cls)
    beside = {argument: other for argument, other in beside.items() if argument in known}
    before = trace(cls, beside, capsys, tmp_path)
    after = trace(cls, {**beside, name: value}, capsys, tmp_path)
    changed = differ(before, after)
    assert changed, f"{cls.__name__}({name}={value!r}) changes nothing"
    if "error" in after and "error" not in before:
        assert NAMES.get(name, name) in after["error"]
    elif name not in WARN and (cls, name) not in WARN:
        assert set(after["warnings"]) <= set(before["warnings"])  # here it has an effect
    assert ((cls, name) in REFUSED) == after.get("error", "").startswith("TypeError")


# ---------------------------------------------------------------- where it has no effect

SEGMENTS: Arguments = {"n_steps": 8, "n_episodes": None}
NO_CRITIC: Arguments = {"baseline": "mean"}
#: Class, arguments, one that has no effect beside them, and what says so.
IDLE: list[tuple[Any, Arguments, Arguments, type[Exception]]] = [
    *[(cls, {}, {"sde_sample_freq": 4}, UserWarning) for cls in CLASSES],
    (NPG, {}, {"step_size": 1e6}, ValueError),
    (NPG, {"step": "fixed"}, {"target_kl": 0.05}, UserWarning),
    *[
        (NPG, {}, {f"line_search_{name}": value}, UserWarning)
        for name, value in {"shrinking_factor": 0.5, "max_iter": 3, "accept_ratio": 0.0}.items()
    ],
    *[(cls, {"critic_learning_rate": 0.01}, {"learning_rate": 0.1}, UserWarning) for cls in (NPG, TRPO)],
    *[(cls, {"critic_batch_size": 4, "batch_size": 128}, {"batch_size": 16}, UserWarning) for cls in (NPG, TRPO)],
    *[(cls, SEGMENTS, {"max_episode_steps": 100}, UserWarning) for cls in (Reinforce, ActorCritic, *TRUST_REGION)],
    *[(cls, {"advantage": "td"}, {"gae_lambda": 0.9}, UserWarning) for cls in (ActorCritic, *TRUST_REGION)],
    *[(cls, {}, {"td_steps": 3}, UserWarning) for cls in (ActorCritic, *TRUST_REGION)],
    (Reinforce, {}, {"gae_lambda": 0.9}, UserWarning),
    *[
        (cls, NO_CRITIC, argument, UserWarning)
        for cls in (Reinforce, OffPolicyPG)
        for argument in (
            {"critic_learning_rate": 0.1},
            {"n_critic_updates": 4},
            {"critic_batch_size": 4},
            {"vf_coef": 2.0},
        )
    ],
    *[(cls, NO_CRITIC, {"critic_fit": "before"}, ValueError) for cls in (Reinforce, OffPolicyPG)],
    *[(cls, {"baseline": "none"}, {"critic_fit": "before"}, ValueError) for cls in (Reinforce, OffPolicyPG)],
    *[
        (cls, {"critic_learning_rate": 0.01}, {"vf_coef": 2.0}, UserWarning)
        for cls in (ActorCritic, Reinforce, OffPolicyPG)
    ],
    (KLPenaltyPG, {}, {"vf_coef": 2.0}, UserWarning),
    (KLPenaltyPG, {"dual_update": "multiplicative"}, {"dual_learning_rate": 5.0}, ValueError),
    (ActorCritic, {"use_rms_prop": False}, {"rms_prop_eps": 1e-3}, UserWarning),
    (ActorCritic, {"policy_kwargs": {"optimizer_class": th.optim.SGD}}, {"rms_prop_eps": 1e-3}, UserWarning),
    (ActorCritic, {"rollout_buffer_class": RolloutBuffer}, {"act_device": "cpu:0"}, ValueError),
    (OffPAC, {}, {"n_actions": 8}, UserWarning),
    (OffPAC, {"actor_gradient": "importance"}, {"n_actions": 8}, UserWarning),
    (OffPAC, {"actor_gradient": "score"}, {"max_ratio": 2.0}, UserWarning),
    (OffPolicyPG, {}, {"replay_buffer_kwargs": {"max_trajectories": 3}}, ValueError),
]


@pytest.mark.parametrize(
    ("cls", "beside", "argument", "kind"), IDLE, ids=lambda x: getattr(x, "__name__", None) or "-".join(x)
)
def test_an_argument_without_effect_is_named(
    cls: Any, beside: Arguments, argument: Arguments, kind: type[Exception]
) -> None:
    ((name, value),) = argument.items()

    def make(**given: Any) -> Any:
        return cls("MlpPolicy", env_of(), **{**CLASSES[cls], "device": "cpu", **beside, **given})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
    if kind is ValueError:
        with pytest.raises(ValueError, match=rf"{name}.*"):
            make(**argument)
    else:
        with pytest.warns(UserWarning, match=rf"^{name}={value} has no effect with ") as caught:
            make(**argument)
        assert len(caught) == 1


def test_the_issues_own_line_says_what_to_do() -> None:
    message = r"^step_size=1000000.0 has no effect with step='kl': give step='fixed'$"
    with pytest.raises(ValueError, match=message):
        NPG("MlpPolicy", env_of(), step_size=1e6)


def test_a_critic_that_shares_features_has_a_weight() -> None:
    cls: Any = Reinforce
    shared = {"policy_kwargs": {"features_extractor_class": Shared}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls("MlpPolicy", env_of(), vf_coef=2.0, device="cpu", **shared)


class Shared(FlattenExtractor):
    """Features with a parameter, which actor and critic share."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space)
        self.scale = th.nn.Parameter(th.ones(1))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        result: th.Tensor = super().forward(observations) * self.scale
        return result


SAVED: list[tuple[Any, Arguments, Arguments]] = [
    (NPG, {"step": "fixed", "step_size": 0.5}, {"step": "kl"}),
    (ActorCritic, {"gae_lambda": 0.9}, {"advantage": "td"}),
    (Reinforce, {"n_episodes": 4, "max_episode_steps": 100}, {"n_episodes": None, "n_steps": 8}),
    (KLPenaltyPG, {"dual_learning_rate": 5.0}, {"dual_update": "multiplicative"}),
    (OffPolicyPG, {}, {"buffer_trajectories": 5}),
    (OffPAC, {"actor_gradient": "score", "n_actions": 8}, {"actor_gradient": None}),
]


@pytest.mark.parametrize(("cls", "saved", "given"), SAVED)
def test_a_saved_value_that_has_lost_its_effect_is_no_error(
    cls: Any, saved: Arguments, given: Arguments, tmp_path: Path
) -> None:
    cls("MlpPolicy", env_of(), **{**CLASSES[cls], "device": "cpu", **saved}).save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls.load(tmp_path / "model", env=env_of(), device="cpu", **given)


def test_what_load_is_given_is_not_ignored_either(tmp_path: Path) -> None:
    NPG("MlpPolicy", env_of(), device="cpu", **IN_SEGMENTS).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"step_size=0\.5 has no effect with step='kl'"):
        NPG.load(tmp_path / "model", env=env_of(), step_size=0.5)
    loaded = NPG.load(tmp_path / "model", env=env_of(), device="cpu", stats_window_size=3).learn(32)
    assert loaded.ep_info_buffer is not None
    assert loaded.ep_info_buffer.maxlen == 3
    ActorCritic("MlpPolicy", env_of(), device="cpu").save(tmp_path / "a2c")
    with pytest.warns(UserWarning, match="rms_prop_eps has no effect"):
        ActorCritic.load(tmp_path / "a2c", env=env_of(), rms_prop_eps=0.1)
