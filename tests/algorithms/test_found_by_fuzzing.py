"""What random cases have found: numbers of NumPy, schedules, policy_kwargs, devices, odd spaces and poisoned data."""

import contextlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import NPG, TRPO, ActorCritic, AsyncActorCritic, NonFiniteError, OffPAC, OffPolicyPG
from tests.algorithms.every_algorithm import FEW_STEPS
from tests.helpers import ScriptedEnv, parameters, policy_for, vec

each_class = pytest.mark.parametrize("cls", FEW_STEPS)
each_policy_gradient = pytest.mark.parametrize("cls", [cls for cls in FEW_STEPS if cls is not OffPAC])
NAN, INF = math.nan, math.inf


def make(cls: Any, env: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
    env = ScriptedEnv() if env is None else env
    return cls(policy, env, **{**FEW_STEPS[cls], "device": "cpu", "seed": 0, **kwargs})


# ---------------------------------------------------------------- numbers


def in_numpy(value: Any) -> Any:
    """The same value with numbers of NumPy."""
    if isinstance(value, tuple):
        return tuple(map(in_numpy, value))
    return {bool: np.bool_, int: np.int64, float: np.float64}.get(type(value), lambda v: v)(value)


@each_class
def test_numpys_numbers_are_as_good_as_pythons_and_are_saved_as_those(cls: Any, tmp_path: Any) -> None:
    given = {**FEW_STEPS[cls], "ent_coef": 0.01, "gamma": 0.9, "seed": 3, "learning_rate": 1e-3}
    given |= {} if cls is OffPAC else {"max_episode_steps": 50, "normalize_advantage": True}
    models = [make(cls, **kwargs).learn(n) for kwargs, n in ((given, 24), (in_numpy_all(given), np.int64(24)))]
    assert th.equal(*map(parameters, models))
    models[1].save(tmp_path / "model")
    saved = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    for name, value in given.items():
        if isinstance(value, bool | int | float):
            assert saved[name] == value, name


def in_numpy_all(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: in_numpy(value) for name, value in arguments.items()}


def test_attributes_that_are_set_may_be_numpys_too(tmp_path: Any) -> None:
    model = make(TRPO)
    model.ent_coef, model.batch_size = np.float32(0.5), np.int32(4)
    assert type(model.learn(16).ent_coef) is float
    model.save(tmp_path / "model")
    loaded = TRPO.load(tmp_path / "model", env=ScriptedEnv(), batch_size=np.int64(2))
    assert type(loaded.batch_size) is int
    loaded.learn(16)


@each_class
def test_a_fraction_is_a_number(cls: Any) -> None:
    assert make(cls, gamma=Fraction(1, 2)).learn(16).gamma == 0.5


@pytest.mark.parametrize("value", [10**30, 10**400, -(10**400), Fraction(10**400), 1e308])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *[(cls, name) for cls in FEW_STEPS for name in ("gamma", "seed", "learning_rate")],
        *[(cls, "ent_coef") for cls in FEW_STEPS if cls is not NPG],
        *[(TRPO, "target_kl"), (TRPO, "batch_size"), (ActorCritic, "vf_coef"), (OffPAC, "buffer_size")],
        *[(OffPAC, "train_freq"), (OffPolicyPG, "max_ratio")],
    ],
)
def test_a_number_that_is_too_large_is_named(cls: Any, name: str, value: Any) -> None:
    if value == 10**30 and name in ("ent_coef", "learning_rate", "vf_coef", "max_ratio", "target_kl"):
        pytest.skip("single precision has this number")
    with pytest.raises((ValueError, TypeError), match=name):
        make(cls, **{name: value})


@each_class
def test_a_whole_number_that_only_single_precision_has_is_taken(cls: Any) -> None:
    model = make(cls, ent_coef=10**30)
    with contextlib.suppress(NonFiniteError):  # the gradient may be too large
        model.learn(16)
    assert model.ent_coef == 1e30
    assert parameters(model).isfinite().all()


@pytest.mark.parametrize("value", [-1, NAN, INF, 10**400, "5", None])
@each_class
def test_the_number_of_steps_to_learn_is_named(cls: Any, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="total_timesteps must be"):
        make(cls).learn(value)


class WrongAtTheEnd(ScriptedEnv):
    """Its last observation has one number more than its space."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if truncated:
            observation = np.append(observation, 0)
        return observation, reward, terminated, truncated, info


@each_class
def test_a_last_observation_of_another_shape_is_named(cls: Any) -> None:
    model = make(cls, WrongAtTheEnd((3,), (True,)))
    with pytest.raises(ValueError, match="observations in observation_space"):
        model.learn(64)


@pytest.mark.parametrize("cls", [cls for cls in FEW_STEPS if cls is not AsyncActorCritic])  # which has none
def test_arguments_of_a_buffer_are_named(cls: Any) -> None:
    name = "replay_buffer_kwargs" if cls in (OffPolicyPG, OffPAC) else "rollout_buffer_kwargs"
    with pytest.raises(TypeError, match=f"{name} must have names among|unexpected keyword argument 'foo'"):
        make(cls, **{name: {"foo": 1}})


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("wrong", [lambda: 1e-3, lambda p, q: p * q, dict, len])
@each_class
def test_a_schedule_takes_one_number(cls: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match="learning_rate must be a function of the remaining progress"):
        make(cls, learning_rate=wrong)


@pytest.mark.parametrize("value", [None, "1", NAN, INF, -1e-3, 1e308, True])
@pytest.mark.parametrize(
    ("cls", "name", "arguments"),
    [
        *[(cls, "learning_rate", {}) for cls in FEW_STEPS],
        *[(cls, "critic_learning_rate", {"n_critic_updates": 2}) for cls in FEW_STEPS if cls is not OffPAC],
        *[(OffPAC, "critic_learning_rate", {}), (OffPAC, "ent_coef", {}), (TRPO, "target_kl", {})],
        (NPG, "step_size", {"step": "fixed"}),
    ],
)
def test_a_schedule_that_goes_wrong_is_named_with_value_and_progress(
    cls: Any, name: str, arguments: dict[str, Any], value: Any
) -> None:
    model = make(cls, **arguments | {name: lambda progress: 1e-3 if progress > 0.6 else value})
    error = ValueError if isinstance(value, float) else TypeError
    with pytest.raises(error, match=rf"{name} must be .*got {re.escape(repr(value))} at the remaining progress 0\.\d"):
        model.learn(64)
    assert parameters(model).isfinite().all()


# ---------------------------------------------------------------- policy_kwargs and devices

WRONG_KWARGS: list[tuple[str, Any]] = [
    *[("net_arch", value) for value in ([-1], [0], "64", [2.5], {"pi": [-1], "vf": [4], "qf": [4]}, 64)],
    *[("optimizer_class", value) for value in (th.optim.LBFGS, th.optim.SparseAdam, "Adam")],
    *[("activation_fn", value) for value in (th.nn.ReLU(), "relu")],
    *[("features_extractor_kwargs", value) for value in ({"foo": 1}, [1])],
    *[("squash_output", True), ("foo", 1), ("features_extractor_class", int), ("log_std_init", "large")],
    *[("normalize_images", "no"), ("lr_schedule", 1)],
]


@pytest.mark.parametrize(("key", "value"), WRONG_KWARGS)
@each_class
def test_a_wrong_argument_of_the_policy_is_named(cls: Any, key: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"policy_kwargs\['{key}'\]"):
        make(cls, policy_kwargs={key: value})


class Popping(ActorCriticPolicy):
    """Takes an argument out of its keywords."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.n_own = kwargs.pop("n_own")
        super().__init__(*args, **kwargs)


@each_policy_gradient
def test_arguments_of_a_policy_of_ones_own(cls: Any) -> None:
    assert make(cls, policy=Popping, policy_kwargs={"n_own": 3}).learn(16).policy.n_own == 3
    with pytest.raises(TypeError, match="'foo'"):
        make(cls, policy=Popping, policy_kwargs={"n_own": 3, "foo": 1})


@pytest.mark.parametrize("cls", [cls for cls in FEW_STEPS if cls not in (ActorCritic, AsyncActorCritic)])
def test_a_wrong_argument_of_the_optimizer_is_named(cls: Any) -> None:
    for value in ({"foo": 1}, {"betas": (2, 3)}, {"lr": 1}, [1]):
        with pytest.raises((ValueError, TypeError), match=r"policy_kwargs\['optimizer_kwargs'\]"):
            make(cls, policy_kwargs={"optimizer_kwargs": value})


@each_class
def test_images_that_no_network_takes_are_named(cls: Any) -> None:
    small = ScriptedEnv(observation_space=spaces.Box(0, 255, (8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"policy=.* does not take Box\(0, 255, \(3, 8, 8\)"):
        make(cls, small, "CnnPolicy")
    with pytest.raises(ValueError, match=r"policy=.* does not take Box\(-10"):
        make(cls, ScriptedEnv(), "CnnPolicy")


@each_class
def test_a_device_that_this_machine_lacks_is_named(cls: Any) -> None:
    lacking = [name for name in ("mps", "xpu", "meta", "cuda:77") if not (name[:4] == "cuda" and not _has_cuda())]
    for value in [*lacking, *map(th.device, lacking)]:
        if str(value) == "mps" and th.backends.mps.is_available():
            continue
        with pytest.raises(ValueError, match=r"^device must be a device of this machine"):
            make(cls, device=value)
        if cls is not OffPAC:
            with pytest.raises(ValueError, match=r"^act_device must be a device of this machine"):
                make(cls, act_device=value)


def _has_cuda() -> bool:
    return th.cuda.is_available()


@each_class
def test_a_model_without_a_policy_does_not_learn(cls: Any) -> None:
    with pytest.raises(ValueError, match="_init_setup_model"):
        make(cls, _init_setup_model=False).learn(1)


# ---------------------------------------------------------------- spaces

ODD_ACTIONS: dict[str, Any] = {
    "one-sided": spaces.Box(0, np.inf, (2,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "no number": spaces.Box(-1, 1, (0,)),
    "tuple": spaces.Tuple([spaces.Discrete(2)]),
    "dict": spaces.Dict({"a": spaces.Discrete(2)}),
    "matrix of choices": spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])),
    "matrix of bits": spaces.MultiBinary([2, 2]),
}


@pytest.mark.parametrize("kind", ODD_ACTIONS)
@each_class
def test_actions_that_no_policy_has_are_named(cls: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=r"^action_space must .*got "):
        make(cls, ScriptedEnv(action_space=ODD_ACTIONS[kind]))


@each_class
def test_choices_as_observations_under_vecnormalize(cls: Any) -> None:
    space, models = spaces.Discrete(3), []
    for normalized in (False, True):
        env = vec(*(ScriptedEnv((3,), (False, True), observation_space=space) for _ in range(2)))
        env.seed(0)
        if normalized:
            env = VecNormalize(env, norm_obs=False, norm_reward=False)
        models.append(make(cls, env, policy_for(space)).learn(48))
    assert th.equal(*map(parameters, models))


# ---------------------------------------------------------------- policies and data with NaN


class Counting(ScriptedEnv):
    """Fails if an action is not a number."""

    def step(self, action: Any) -> Any:
        assert np.isfinite(action).all()
        return super().step(action)


@pytest.mark.parametrize("name", ["action_net.weight", "value_net.bias"])
@each_policy_gradient
def test_a_policy_with_nan_does_not_act(cls: Any, name: str) -> None:
    env = Counting(action_space=spaces.Box(-1, 1, (2,)))
    model = make(cls, env).learn(24)
    n_actions = len(env.actions)
    with th.no_grad():
        model.policy.get_parameter(name).view(-1)[0] = NAN
    for on_nonfinite in ("raise", "skip"):
        model.on_nonfinite = on_nonfinite
        with pytest.raises(NonFiniteError, match=f"^parameter {name} is nan"):
            model.learn(24)
    assert len(env.actions) == n_actions


def test_offpacs_actor_with_nan_does_not_act() -> None:
    env = Counting(action_space=spaces.Box(-1, 1, (2,)))
    model = make(OffPAC, env).learn(24)
    n_actions = len(env.actions)
    with th.no_grad():
        model.actor.mu.bias[0] = NAN
    with pytest.raises(NonFiniteError, match=r"^parameter actor\.mu\.bias is nan"):
        model.learn(24, reset_num_timesteps=False)
    assert len(env.actions) == n_actions


class HugeReward(ScriptedEnv):
    """Gives the reward 3e38 at two steps of its life."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, 3e38 if reward in (14, 15) else reward, *rest


@pytest.mark.parametrize("baseline", ["value", "mean", "none"])
@pytest.mark.parametrize("batch_size", [None, 6])
def test_a_huge_reward_does_not_stay_in_the_buffer(baseline: str, batch_size: int | None) -> None:
    model = make(OffPolicyPG, vec(HugeReward((3,))), baseline=baseline, batch_size=batch_size, gamma=1.0)
    before = None
    for _ in range(4):
        before = parameters(model)
        try:
            model.learn(12, reset_num_timesteps=False)
        except NonFiniteError:
            assert th.equal(parameters(model), before)
            break
    else:
        pytest.fail("no update has failed")
    for _ in range(3):
        try:
            model.learn(12, reset_num_timesteps=False)
        except NonFiniteError:
            continue
    model.learn(24, reset_num_timesteps=False)
    assert not th.equal(parameters(model), before)
    largest = max(model.replay_buffer.size_of_rewards(t) for t in model.replay_buffer.trajectories)
    assert largest < 1e12


class NaNReset(ScriptedEnv):
    """Returns NaN from the first resets.

    :param n: number of such resets
    """

    def __init__(self, n: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        return (np.full_like(obs, NAN) if self.resets <= self.n else obs), info


def _normalized(env: Any) -> Any:
    return VecNormalize(vec(env))


@pytest.mark.parametrize("wrap", [vec, _normalized])
@each_policy_gradient
def test_nan_from_a_reset_is_skipped_but_not_for_ever(cls: Any, wrap: Callable[[Any], Any]) -> None:
    env = wrap(NaNReset(2))
    model = make(cls, env, on_nonfinite="skip")
    before = parameters(model)
    with pytest.warns(UserWarning, match=r"Update skipped: observation is nan in env 0 .*reset returned it"):
        model.learn(40)
    assert not th.equal(parameters(model), before)
    if isinstance(env, VecNormalize):
        statistics: Any = env.obs_rms
        assert np.isfinite(statistics.mean).all()
    model = make(cls, wrap(NaNReset(INF)), on_nonfinite="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteError, match="reset returned it"):
            model.learn(40)
    with pytest.raises(NonFiniteError, match="reset returned it"):
        make(cls, wrap(NaNReset(1))).learn(40)


@pytest.mark.parametrize("shape", [[2, 3], [1, 2, 2]])
def test_action_spaces_of_several_dimensions_are_refused_as_in_sb3(shape: list[int]) -> None:
    space = spaces.MultiBinary(shape)
    match = r"Multi-dimensional MultiBinary\(.*\) action space is not supported"
    for error in (ValueError, AssertionError):  # SB3's is the second
        with pytest.raises(error, match=match):
            ActorCritic("MlpPolicy", ScriptedEnv(action_space=space))
