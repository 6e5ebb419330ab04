"""What a user may get wrong at first contact is named, with what to do, before anything happens."""

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.envs import GymVectorAdapter
from tests.algorithms.every_algorithm import FEW_STEPS
from tests.helpers import OBSERVATION_SPACES, ScriptedEnv, policy_for, vec

each_class = pytest.mark.parametrize("cls", FEW_STEPS)
CPU: dict[str, Any] = {"device": "cpu", "seed": 0}


def make(cls: Any, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return cls(policy, env, **{**FEW_STEPS[cls], **CPU, **kwargs})


class Unsteppable(ScriptedEnv):
    def reset(self, **_: Any) -> Any:
        raise AssertionError("reset")


# ---------------------------------------------------------------- learn's arguments


class Silent(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        *[("log_interval", value, ValueError) for value in (0, -1)],
        *[("log_interval", value, TypeError) for value in (2.5, "4", True)],
        *[("callback", value, TypeError) for value in (3, "callback", Silent, (Silent(),), [lambda *_: True])],
        ("tb_log_name", 3, TypeError),
        ("progress_bar", "yes", TypeError),
        ("reset_num_timesteps", None, TypeError),
    ],
)
@each_class
def test_arguments_of_learn_are_named(cls: Any, name: str, value: Any, error: type[Exception]) -> None:
    model = make(cls, Unsteppable())
    with pytest.raises(error, match=rf"^{name} must be .*got {re.escape(repr(value))}"):
        model.learn(16, **{name: value})
    assert model.num_timesteps == 0


@pytest.mark.parametrize("callback", [Silent(), [Silent()], CallbackList([Silent()]), lambda *_: True, None])
@each_class
def test_every_kind_of_callback_and_no_log_are_taken(cls: Any, callback: Any) -> None:
    model = make(cls, ScriptedEnv()).learn(16, callback, log_interval=None)
    assert model.num_timesteps >= 16


# ---------------------------------------------------------------- observation spaces

DISCRETE, SHIFTED = spaces.Discrete(5), spaces.Discrete(5, start=3)
UNFIT = {
    "discrete": (
        SHIFTED,
        r"observation_space must count from 0, got Discrete\(5, start=3\).*obs - 3, gymnasium.spaces.Discrete\(5\)\)",
    ),
    "below 0": (spaces.Discrete(5, start=-1), r"observation_space must count from 0.*obs - -1"),
    "multi-discrete": (
        spaces.MultiDiscrete([2, 3], start=[0, 1]),
        r"observation_space must count from 0.*- np.array\(\[0, 1\]\), gymnasium.spaces.MultiDiscrete\(\[2, 3\]\)\)",
    ),
    "in a dict": (spaces.Dict({"a": SHIFTED, "b": DISCRETE}), r"observation_space\['a'\] must count from 0"),
    "matrix": (
        spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
        "observation_space must be a MultiDiscrete of one dimension.*FlattenObservation",
    ),
    "tuple": (
        spaces.Tuple([DISCRETE, DISCRETE]),
        r"observation_space must be a Box, .* or one Dict of these, got Tuple.*FlattenObservation",
    ),
    "text": (spaces.Text(3), r"observation_space must be a Box, .* got Text"),
    "sequence": (spaces.Sequence(DISCRETE), r"observation_space must be a Box, .* got Sequence"),
    "graph": (spaces.Graph(DISCRETE, None), r"observation_space must be a Box, .* got Graph"),
    "nested": (
        spaces.Dict({"a": spaces.Dict({"b": DISCRETE})}),
        r"observation_space\['a'\] must be a Box, .* got Dict",
    ),
    "tuple in a dict": (spaces.Dict({"a": spaces.Tuple([DISCRETE])}), r"observation_space\['a'\] must be .* got Tuple"),
    "empty": (spaces.Dict({}), "observation_space must have at least one key"),
    "scalar": (
        spaces.Box(-1, 1, ()),
        r"observation_space must have at least one dimension.*ReshapeObservation\(env, \(1,\)\)",
    ),
    "no number": (spaces.Box(-1, 1, (0,)), "observation_space must hold at least one number"),
}


@pytest.mark.parametrize("kind", UNFIT)
@each_class
def test_observations_that_no_policy_takes_are_named_at_construction(cls: Any, kind: str) -> None:
    space, message = UNFIT[kind]
    policy = policy_for(space)
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        make(cls, ScriptedEnv(observation_space=space), policy)


@each_class
def test_observations_that_no_policy_takes_are_named_wherever_an_env_is_set(cls: Any, tmp_path: Any) -> None:
    model = make(cls, ScriptedEnv(observation_space=DISCRETE))
    model.save(tmp_path / "model")
    unfit = ScriptedEnv(observation_space=SHIFTED)
    with pytest.raises(ValueError, match="observation_space must count from 0"):
        model.set_env(unfit)
    with pytest.raises(ValueError, match="observation_space must count from 0"):
        cls.load(tmp_path / "model", env=unfit)


@pytest.mark.parametrize("space", [SHIFTED, spaces.MultiDiscrete([2, 3], start=[4, 1])], ids=["discrete", "multi"])
@each_class
def test_the_wrapper_that_is_named_makes_observations_fit(cls: Any, space: Any) -> None:
    env = ScriptedEnv(observation_space=space)
    with pytest.raises(ValueError, match="observation_space") as caught:
        make(cls, env)
    line = str(caught.value).split("e.g. ")[1]
    wrapped = eval(line, {"gymnasium": gym, "env": env, "np": np})
    make(cls, wrapped).learn(16)


@each_class
def test_a_policy_for_dicts_is_named_where_there_is_none(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"policy='MultiInputPolicy' is for Dict observations.*got|with Box"):
        make(cls, ScriptedEnv(), "MultiInputPolicy")


@each_class
def test_no_env_is_named(cls: Any) -> None:
    model = make(cls, ScriptedEnv())
    for wrong in (None, 3):
        with pytest.raises(TypeError, match=rf"env must be .*got {wrong}"):
            model.set_env(wrong)


# ---------------------------------------------------------------- images and VecNormalize


def images(transposed: bool, **kwargs: Any) -> Any:
    """Normalized; SB3 transposes images itself, after that, where nobody has before."""
    env = vec(ScriptedEnv(observation_space=OBSERVATION_SPACES["image"]))
    return VecNormalize(VecTransposeImage(env) if transposed else env, **kwargs)


@each_class
def test_images_that_are_transposed_after_vecnormalize(cls: Any, tmp_path: Any) -> None:
    kwargs: dict[str, Any] = {
        "policy": "CnnPolicy",
        "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 4}},
    }
    env = images(transposed=False, norm_obs=False)
    if cls is not OffPAC:
        make(cls, env, **kwargs).learn(16)
        return
    wanted = r"env must have its VecNormalize around VecTransposeImage.*VecNormalize\(VecTransposeImage\(env\)\)"
    with pytest.raises(ValueError, match=wanted):
        make(cls, env, **kwargs)
    model = make(cls, images(transposed=True, norm_obs=False), **kwargs).learn(16)
    with pytest.raises(ValueError, match=wanted):
        model.set_env(env)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=wanted):
        cls.load(tmp_path / "model", env=env)


@each_class
def test_normalized_images_that_are_transposed(cls: Any) -> None:
    kwargs: dict[str, Any] = {"features_extractor_kwargs": {"features_dim": 4}, "normalize_images": False}
    make(cls, images(transposed=True), "CnnPolicy", policy_kwargs=kwargs).learn(16)


def test_frames_that_are_stacked_after_vecnormalize() -> None:
    env = vec(ScriptedEnv())
    with pytest.raises(ValueError, match="VecNormalize around VecFrameStack"):
        make(OffPAC, VecFrameStack(VecNormalize(env), 2))
    make(OffPAC, VecNormalize(VecFrameStack(env, 2))).learn(16)


# ---------------------------------------------------------------- standard deviations

BOX = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize("log_std_init", [-60, -21, 60, float("nan")])
@pytest.mark.parametrize("cls", [cls for cls in FEW_STEPS if cls is not OffPAC])
def test_a_standard_deviation_that_no_density_has_is_named(cls: Any, log_std_init: float) -> None:
    message = rf"policy_kwargs\['log_std_init'\] must be in \[-20, 20\], got {log_std_init}"
    with pytest.raises(ValueError, match=message):
        make(cls, ScriptedEnv(action_space=BOX), policy_kwargs={"log_std_init": log_std_init})


@each_class
def test_gsde_has_no_lowest_standard_deviation(cls: Any) -> None:
    env = ScriptedEnv(action_space=BOX)
    make(cls, env, use_sde=True, policy_kwargs={"log_std_init": -60}).learn(16)
    with pytest.raises(ValueError, match=r"policy_kwargs\['log_std_init'\] must be at most 20, got 60"):
        make(cls, env, use_sde=True, policy_kwargs={"log_std_init": 60})


@pytest.mark.parametrize("cls", [cls for cls in FEW_STEPS if cls is not OffPAC])
@pytest.mark.parametrize("log_std_init", [-5, 2])
def test_the_standard_deviations_that_are_allowed_work(cls: Any, log_std_init: float) -> None:
    model = make(cls, ScriptedEnv(action_space=BOX), policy_kwargs={"log_std_init": log_std_init})
    model.learn(16)
    assert th.isfinite(th.nn.utils.parameters_to_vector(model.policy.parameters())).all()


# ---------------------------------------------------------------- Gymnasium's vector envs


def vector_env(mode: str, n_envs: int = 2) -> Any:
    """One of each autoreset mode; a wrapper keeps the adapter from switching NEXT_STEP."""
    fns = [lambda: ScriptedEnv((3, 2), (False, True))] * n_envs
    env = SyncVectorEnv(fns, autoreset_mode=AutoresetMode[mode])
    return VectorWrapper(env) if mode == "NEXT_STEP" else env


def same(a: Any, b: Any) -> bool:
    return all(th.equal(x, y) for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["SAME_STEP", "DISABLED", "NEXT_STEP"])
@each_class
def test_gymnasiums_vector_envs_are_adapted(cls: Any, mode: str, tmp_path: Any) -> None:
    def learned(env: Any) -> Any:
        return make(cls, env).learn(24)

    if cls is OffPAC and mode == "NEXT_STEP":
        with pytest.raises(ValueError, match=r"NEXT_STEP.*OffPAC cannot.*backend='dummy'"):
            make(cls, vector_env(mode))
        return
    model = learned(vector_env(mode))
    assert isinstance(model.get_env(), GymVectorAdapter)
    assert len(model.ep_info_buffer) > 0
    assert same(model, learned(GymVectorAdapter(vector_env(mode))))
    model.set_env(vector_env(mode))
    assert isinstance(model.get_env(), GymVectorAdapter)
    model.learn(24)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=vector_env(mode, 4))
    assert (loaded.n_envs, type(loaded.get_env())) == (4, GymVectorAdapter)
    loaded.learn(24)


def test_the_issues_own_line_learns() -> None:
    four: Any = gym.make_vec("CartPole-v1", 4)
    model = Reinforce("MlpPolicy", four, **CPU).learn(400)
    assert model._n_updates > 0
    two: Any = gym.make_vec("CartPole-v1", 2)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        OffPAC("MlpPolicy", two, **CPU)


# ---------------------------------------------------------------- words of other packages


@pytest.mark.parametrize(
    ("classes", "word", "ours"),
    [
        ((Reinforce, ActorCritic, NPG, TRPO, OffPolicyPG), "n_epochs", "n_critic_updates"),
        ((OffPAC,), "n_epochs", "gradient_steps"),
        (FEW_STEPS, "lr", "learning_rate"),
        (FEW_STEPS, "learning_rate_critic", "critic_learning_rate"),
        ((Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG), "num_steps", "n_steps"),
        ((OffPolicyPG,), "n_steps", "train_freq"),
        ((Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG), "lam", "gae_lambda"),
        (FEW_STEPS, "entropy_coef", "ent_coef"),
        ((Reinforce, ActorCritic, KLPenaltyPG, OffPolicyPG), "value_coef", "vf_coef"),
        ((NPG, TRPO, KLPenaltyPG), "clip_range", "target_kl"),
        ((OffPolicyPG, OffPAC), "clip_range", "max_ratio"),
        ((Reinforce, ActorCritic), "batch_size", "critic_batch_size"),
        (FEW_STEPS, "gama", "gamma"),
        (FEW_STEPS, "learning_rte", "learning_rate"),
    ],
)
def test_another_word_for_an_argument_names_ours(classes: Any, word: str, ours: str) -> None:
    argument: dict[str, Any] = {word: 4}
    for cls in classes:
        with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument '{word}'; did you mean '{ours}'\?"):
            make(cls, ScriptedEnv(), **argument)


def test_n_epochs_of_kl_penalty_pg_is_its_own() -> None:
    assert make(KLPenaltyPG, ScriptedEnv(), n_epochs=4).n_epochs == 4


@pytest.mark.parametrize(
    ("cls", "word"),
    [
        (Reinforce, "target_kl"),
        (ActorCritic, "clip_range"),
        (TRPO, "clip_range_vf"),
        (OffPAC, "use_sde_at_warmup"),
        (OffPAC, "target_entropy"),
        (OffPAC, "target_update_interval"),
        (ActorCritic, "tau"),
        (OffPAC, "lam"),
    ],
)
def test_where_nothing_is_meant_nothing_is_suggested(cls: Any, word: str) -> None:
    argument: dict[str, Any] = {word: 0.5}
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument '{word}'; it has \[") as caught:
        make(cls, ScriptedEnv(), **argument)
    assert "did you mean" not in str(caught.value)


@each_class
def test_load_names_ours_too(cls: Any, tmp_path: Any) -> None:
    make(cls, ScriptedEnv()).save(tmp_path / "model")
    with pytest.raises(TypeError, match="has no argument 'lr'; did you mean 'learning_rate'"):
        cls.load(tmp_path / "model", lr=1e-3)


# ---------------------------------------------------------------- arguments of earlier versions


@each_class
def test_compile_names_what_to_do_instead(cls: Any, tmp_path: Any) -> None:
    hint = r"has no argument 'compile': .*th\.compile\(model\.policy\)"
    with pytest.raises(TypeError, match=rf"{cls.__name__} {hint}"):
        make(cls, ScriptedEnv(), compile=True)
    make(cls, ScriptedEnv()).save(tmp_path / "model")
    with pytest.raises(TypeError, match=rf"{cls.__name__} {hint}"):
        cls.load(tmp_path / "model", compile=False)


@each_class
def test_a_zip_that_holds_compile_loads_without_it(cls: Any, tmp_path: Any) -> None:
    model = make(cls, ScriptedEnv())
    model.compile = True
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=model.get_env())
    assert not hasattr(loaded, "compile")
    loaded.learn(8)
