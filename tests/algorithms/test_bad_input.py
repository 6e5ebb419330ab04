"""Every argument out of range or of the wrong type is named, with its value and what is allowed, before any step."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, Reinforce
from tests.helpers import ScriptedEnv, vec

NAN, INF = float("nan"), float("inf")


CLASSES = (Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG)
each_class = pytest.mark.parametrize("cls", CLASSES)


class Unsteppable(ScriptedEnv):
    def step(self, action: Any) -> Any:
        raise AssertionError("stepped")


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("policy", 3, TypeError),
        ("policy", dict, TypeError),
        ("env", 3, TypeError),
        *[("learning_rate", v, ValueError) for v in (-1e-3, NAN, INF, "fast", "lin_x", "lin_-1", "exp_1e-3")],
        *[("learning_rate", v, TypeError) for v in (None, True, [1e-3])],
        *[("critic_learning_rate", v, ValueError) for v in (-1e-3, NAN, "lin_")],
        ("critic_learning_rate", [1], TypeError),
        *[("state_discount", v, TypeError) for v in (1, "yes", None)],
        *[("normalize_advantage", v, TypeError) for v in (1, None)],
        *[("n_steps", v, ValueError) for v in (0, -5)],
        *[("n_steps", v, TypeError) for v in (2.5, "5", True)],
        *[("n_episodes", v, ValueError) for v in (0, -5)],
        *[("n_episodes", v, TypeError) for v in (2.5, "5", True)],
        *[("gamma", v, ValueError) for v in (-0.1, 1.01, NAN)],
        *[("gamma", v, TypeError) for v in ("0.9", None, True)],
        *[("gae_lambda", v, ValueError) for v in (-0.1, 1.01)],
        *[("ent_coef", v, ValueError) for v in (-0.1, NAN, INF)],
        ("ent_coef", "auto", TypeError),
        ("truncation", "ignore", ValueError),
        ("truncation", True, TypeError),
        ("n_critic_updates", 0, ValueError),
        ("n_critic_updates", 1.5, TypeError),
        ("critic_batch_size", 0, ValueError),
        ("critic_batch_size", "64", TypeError),
        ("critic_fit", "during", ValueError),
        ("max_episode_steps", 0, ValueError),
        ("max_episode_steps", None, TypeError),
        ("on_nonfinite", "ignore", ValueError),
        ("use_sde", 1, TypeError),
        ("sde_sample_freq", -2, ValueError),
        ("rollout_buffer_class", dict, TypeError),
        ("rollout_buffer_class", RolloutBuffer(1, gym.spaces.Discrete(2), gym.spaces.Discrete(2)), TypeError),
        ("rollout_buffer_kwargs", 3, TypeError),
        ("stats_window_size", 0, ValueError),
        ("tensorboard_log", 3, TypeError),
        ("policy_kwargs", "dict()", TypeError),
        ("verbose", -1, ValueError),
        ("seed", -1, ValueError),
        ("seed", "0", TypeError),
        ("device", 3, TypeError),
        ("device", "gpu", ValueError),
    ],
)
@each_class
def test_an_argument_of_all_is_named_with_its_value(
    cls: Any, argument: str, value: Any, error: type[Exception]
) -> None:
    require_named(cls, argument, value, error)


@pytest.mark.parametrize(
    ("cls", "argument", "value", "error"),
    [
        *[(Reinforce, "returns", v, ValueError) for v in ("rtg", "")],
        (Reinforce, "returns", None, TypeError),
        (Reinforce, "baseline", "median", ValueError),
        (Reinforce, "baseline", 3, TypeError),
        (Reinforce, "baseline_kwargs", [1], TypeError),
        *[
            (cls, argument, value, error)
            for cls in (Reinforce, ActorCritic, KLPenaltyPG)
            for argument, value, error in (
                *[("vf_coef", v, ValueError) for v in (-0.1, NAN)],
                *[("max_grad_norm", v, ValueError) for v in (0, -1, math.nan)],
                ("max_grad_norm", "1", TypeError),
            )
        ],
        *[
            (cls, argument, value, error)
            for cls in (ActorCritic, NPG, TRPO, KLPenaltyPG)
            for argument, value, error in (
                ("advantage", "q", ValueError),
                ("advantage", None, TypeError),
                ("td_steps", 0, ValueError),
                ("critic_target", "gae", ValueError),
                ("recompute_advantage", 1, TypeError),
            )
        ],
        *[
            (cls, argument, value, error)
            for cls in (NPG, TRPO)
            for argument, value, error in (
                ("batch_size", 0, ValueError),
                ("batch_size", 64.0, TypeError),
                *[("cg_max_steps", v, ValueError) for v in (0, -1)],
                ("cg_max_steps", 2.5, TypeError),
                *[("cg_damping", v, ValueError) for v in (-0.1, NAN, INF)],
                ("cg_tolerance", -1e-9, ValueError),
                *[("line_search_shrinking_factor", v, ValueError) for v in (0, 1, 1.5, NAN)],
                ("line_search_max_iter", 0, ValueError),
                *[("line_search_accept_ratio", v, ValueError) for v in (-0.1, 1.1)],
                *[("target_kl", v, ValueError) for v in (0, -0.01, NAN, INF, "0.01", "lin_0")],
                *[("target_kl", v, TypeError) for v in (None, True)],
                ("sub_sampling_factor", 0, ValueError),
                ("fisher_chunk_size", 0, ValueError),
                ("fisher_subsample", 1.5, TypeError),
            )
        ],
        (NPG, "step", "line_search", ValueError),
        (NPG, "step", None, TypeError),
        *[(NPG, "step_size", v, ValueError) for v in (-0.1, NAN, "fast")],
        (NPG, "step_size", None, TypeError),
        *[(KLPenaltyPG, "batch_size", v, TypeError) for v in (None, "64")],
        *[(KLPenaltyPG, "n_epochs", v, ValueError) for v in (0, -1)],
        *[(KLPenaltyPG, "target_kl", v, ValueError) for v in (0, -0.01, NAN)],
        *[(KLPenaltyPG, "kl_coef", v, ValueError) for v in (-0.1, NAN, INF)],
        (KLPenaltyPG, "dual_update", "exact", ValueError),
        *[(KLPenaltyPG, "dual_learning_rate", v, ValueError) for v in (0, -1, NAN)],
        (KLPenaltyPG, "dual_learning_rate", "lin_50", TypeError),
        *[(KLPenaltyPG, "max_kl_ratio", v, ValueError) for v in (0, -1.5)],
    ],
)
def test_an_argument_is_named_with_its_value(cls: Any, argument: str, value: Any, error: type[Exception]) -> None:
    require_named(cls, argument, value, error)


def require_named(cls: Any, argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        cls(**{"policy": "MlpPolicy", "env": vec(Unsteppable()), argument: value})
    assert type(caught.value) is error
    assert argument in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 8, "n_episodes": 2}, "n_steps=8 and n_episodes=2"),
        ({"n_steps": 8, "baseline": "none"}, "n_steps=8 cuts episodes.*baseline='value'"),
        ({"n_steps": 8, "baseline": "linear"}, "n_steps=8 cuts episodes"),
        ({"n_episodes": 3}, "multiple of the number of envs, 2.*got 3"),
        ({"returns": "total", "state_discount": True, "gamma": 0.9}, "state_discount.*gamma=0.9.*discount twice"),
        ({"returns": "total", "truncation": "bootstrap"}, "truncation='bootstrap'.*returns='total'"),
        ({"returns": "total", "n_steps": 8}, "complete episodes, got n_steps=8"),
        ({"truncation": "bootstrap", "baseline": "mean"}, "truncation='bootstrap' takes a critic"),
        (
            {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}, "normalize_advantage": True},
            "normalize",
        ),
        ({"rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class.*n_steps="),
        (
            {"rollout_buffer_class": RolloutBuffer, "n_steps": 8, "critic_fit": "before"},
            "neither critic_fit='before' nor truncation='terminal'",
        ),
        (
            {"rollout_buffer_class": RolloutBuffer, "n_steps": 8, "state_discount": True},
            "RolloutBuffer.*neither state_discount",
        ),
    ],
)
def test_contradictions_are_explained(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reinforce("MlpPolicy", vec(Unsteppable(), Unsteppable()), **kwargs)


@pytest.mark.parametrize("cls", [ActorCritic, NPG, TRPO, KLPenaltyPG])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_episodes": 2}, r"n_steps=\d+ and n_episodes=2"),
        ({"n_steps": None, "n_episodes": 3}, "multiple of the number of envs, 2.*got 3"),
        ({"n_steps": None, "rollout_buffer_class": RolloutBuffer}, "rollout_buffer_class.*n_steps="),
        ({"rollout_buffer_class": RolloutBuffer, "truncation": "terminal"}, "nor truncation='terminal'"),
        ({"rollout_buffer_class": RolloutBuffer, "normalize_value_targets": True}, "nor normalize_value_targets"),
        ({"rollout_buffer_class": RolloutBuffer, "advantage": "td"}, "itself, once: got advantage='td'"),
    ],
)
def test_contradictions_of_a_critics_algorithms_are_explained(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls("MlpPolicy", vec(Unsteppable(), Unsteppable()), **kwargs)


@pytest.mark.parametrize("cls", [ActorCritic, NPG, TRPO, KLPenaltyPG])
def test_a_single_step_is_not_normalized(cls: Any) -> None:
    with pytest.raises(ValueError, match="nothing of a single step's advantage, got n_steps=1"):
        cls("MlpPolicy", vec(Unsteppable()), n_steps=1, normalize_advantage=True)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"baseline": "leave_one_out"},
        {"baseline": "time"},
        {"baseline": "mean", "returns": "total"},
        {"baseline": "optimal", "returns": "total"},
        {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}},
    ],
)
def test_a_single_episode_leaves_nothing_of_its_own_average(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{kwargs['baseline']}.*at least 2 episodes.*n_episodes=1"):
        Reinforce("MlpPolicy", vec(Unsteppable()), n_episodes=1, **kwargs)


def test_a_users_baseline_says_how_many_episodes_it_needs() -> None:
    class Choosy:
        min_episodes = 3

        def fit(self, batch: Any, returns: Any) -> None:
            raise AssertionError("not reached")

        predict: Any = fit

    with pytest.raises(ValueError, match=r"at least 3 episodes.*n_episodes=2"):
        Reinforce("MlpPolicy", vec(Unsteppable()), baseline=Choosy(), n_episodes=2)
    Reinforce("MlpPolicy", vec(Unsteppable()), baseline=Choosy(), n_episodes=3)


def test_a_users_baseline_may_read_the_critics_values() -> None:
    class OfCritic:
        requires_critic = True

        def fit(self, batch: Any, returns: Any) -> None:
            """Nothing."""

        def predict(self, batch: Any) -> Any:
            return 0.5 * batch.values

    model = Reinforce("MlpPolicy", vec(ScriptedEnv()), baseline=OfCritic(), n_steps=6, device="cpu").learn(6)
    buffer = model.rollout_buffer
    assert np.abs(buffer.values).min() > 0
    assert np.allclose(buffer.advantages, buffer.returns - 0.5 * buffer.values)


def test_total_with_state_discount_is_fine_without_discount() -> None:
    Reinforce("MlpPolicy", vec(Unsteppable()), returns="total", state_discount=True, gamma=1.0)


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", RecurrentActorCriticPolicy])
@each_class
def test_recurrent_policies_are_refused(cls: Any, policy: Any) -> None:
    with pytest.raises(ValueError, match="give memory='lstm' with policy='MlpPolicy'"):
        cls(policy, vec(Unsteppable()))


@each_class
def test_an_unknown_policy_name_lists_the_known(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy'\].*'MLPPolicy'"):
        cls("MLPPolicy", vec(Unsteppable()))


@each_class
def test_no_env_is_an_error_at_construction(cls: Any) -> None:
    with pytest.raises(ValueError, match="env must be an environment"):
        cls("MlpPolicy", None)


@pytest.mark.parametrize(
    ("cls", "typo", "meant"),
    [
        *[(cls, *names) for cls in CLASSES for names in (("gama", "gamma"), ("n_episode", "n_episodes"))],
        (Reinforce, "baselin", "baseline"),
        (TRPO, "line_search_accept", "line_search_accept_ratio"),
        (TRPO, "fisher_subsampling", "fisher_subsample"),
        (NPG, "stepsize", "step_size"),
        (KLPenaltyPG, "dual_rate", "dual_update"),
        (KLPenaltyPG, "n_epoch", "n_epochs"),
    ],
)
def test_a_mistyped_argument_is_corrected(cls: Any, typo: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument '{typo}'; did you mean '{meant}'"):
        cls("MlpPolicy", vec(Unsteppable()), **{typo: 1})


@each_class
@pytest.mark.parametrize("internal", ["args", "kwargs", "monitor_wrapper", "supported_action_spaces"])
def test_what_is_passed_on_inside_is_no_argument(cls: Any, internal: str) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no argument '{internal}'") as caught:
        cls("MlpPolicy", vec(Unsteppable()), **{internal: True})
    assert "support_multi_env" not in str(caught.value)


@each_class
def test_arguments_given_to_load_are_checked_too(cls: Any, tmp_path: Any) -> None:
    cls("MlpPolicy", vec(ScriptedEnv()), device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"gamma must be a number.*got 2"):
        cls.load(tmp_path / "model", gamma=2)


def test_a_baseline_of_the_wrong_shape() -> None:
    class Wrong:
        def fit(self, batch: Any, returns: Any) -> None:
            raise AssertionError("not reached")

        def predict(self, batch: Any) -> Any:
            return np.zeros(5)

    model = Reinforce("MlpPolicy", vec(ScriptedEnv()), baseline=Wrong(), n_episodes=1, device="cpu")
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*got \(5,\)"):
        model.learn(3)
