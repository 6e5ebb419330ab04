"""Every argument out of range or of the wrong type is named, with its value and what is allowed, before any step."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_pg import Reinforce
from tests.helpers import ScriptedEnv, vec

NAN, INF = float("nan"), float("inf")


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
        *[("returns", v, ValueError) for v in ("rtg", "")],
        ("returns", None, TypeError),
        ("baseline", "median", ValueError),
        ("baseline", 3, TypeError),
        ("baseline_kwargs", [1], TypeError),
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
        *[("vf_coef", v, ValueError) for v in (-0.1, NAN)],
        *[("max_grad_norm", v, ValueError) for v in (0, -1, math.nan)],
        ("max_grad_norm", "1", TypeError),
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
def test_an_argument_is_named_with_its_value(argument: str, value: Any, error: type[Exception]) -> None:
    env = vec(Unsteppable())
    with pytest.raises(error) as caught:
        Reinforce(**{"policy": "MlpPolicy", "env": env, argument: value})
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


def test_total_with_state_discount_is_fine_without_discount() -> None:
    Reinforce("MlpPolicy", vec(Unsteppable()), returns="total", state_discount=True, gamma=1.0)


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", RecurrentActorCriticPolicy])
def test_recurrent_policies_are_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="no recurrent policies"):
        Reinforce(policy, vec(Unsteppable()))


def test_an_unknown_policy_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy'\].*'MLPPolicy'"):
        Reinforce("MLPPolicy", vec(Unsteppable()))


def test_no_env_is_an_error_at_construction() -> None:
    with pytest.raises(ValueError, match="env must be an environment"):
        Reinforce("MlpPolicy", None)


@pytest.mark.parametrize(("typo", "meant"), [("gama", "gamma"), ("n_episode", "n_episodes"), ("baselin", "baseline")])
def test_a_mistyped_argument_is_corrected(typo: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"Reinforce has no argument '{typo}'; did you mean '{meant}'"):
        Reinforce("MlpPolicy", vec(Unsteppable()), **{typo: 1})


def test_arguments_given_to_load_are_checked_too(tmp_path: Any) -> None:
    Reinforce("MlpPolicy", vec(ScriptedEnv()), device="cpu").save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"gamma must be a number.*got 2"):
        Reinforce.load(tmp_path / "model", gamma=2)


def test_a_baseline_of_the_wrong_shape() -> None:
    class Wrong:
        def fit(self, batch: Any, returns: Any) -> None:
            raise AssertionError("not reached")

        def predict(self, batch: Any) -> Any:
            return np.zeros(5)

    model = Reinforce("MlpPolicy", vec(ScriptedEnv()), baseline=Wrong(), n_episodes=1, device="cpu")
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*got \(5,\)"):
        model.learn(3)
