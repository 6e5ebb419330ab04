"""Attributes that are set while training goes on: they count from then on, and are checked then."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPolicyPG, Reinforce
from sb3_pg.baselines import Baseline
from tests.helpers import FaultyEnv, ScriptedEnv, vec

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}


class Set(BaseCallback):
    """Sets attributes of the model at one of its hooks."""

    def __init__(self, hook: str, **values: Any) -> None:
        super().__init__()
        self.hook, self.values = hook, values

    def _set(self, hook: str) -> None:
        if hook == self.hook:
            vars(self.model).update(self.values)

    def _on_rollout_start(self) -> None:
        self._set("start")

    def _on_step(self) -> bool:
        self._set("step")
        return True

    def _on_rollout_end(self) -> None:
        self._set("end")


@pytest.mark.parametrize("hook", ["start", "step"])
@pytest.mark.parametrize("cls", [Reinforce, ActorCritic, TRPO])
def test_gamma_that_is_set_during_a_rollout_counts_in_its_returns(cls: Any, hook: str) -> None:
    env = vec(ScriptedEnv(lengths=(8,)))
    kwargs = {} if cls is Reinforce else {"n_steps": 8, "gae_lambda": 1.0}
    model = cls("MlpPolicy", env, **kwargs, **SMALL).learn(8, callback=Set(hook, gamma=0.0))
    buffer = model.rollout_buffer
    assert np.allclose(buffer.returns, buffer.rewards, atol=1e-5)


@pytest.mark.parametrize("hook", ["start", "step", "end"])
def test_the_penalty_that_is_set_during_a_rollout_that_is_skipped_stays(hook: str) -> None:
    env = vec(FaultyEnv("reward", 5))
    model = KLPenaltyPG("MlpPolicy", env, n_steps=16, batch_size=16, on_nonfinite="skip", **SMALL)
    with pytest.warns(UserWarning, match="Update skipped"):
        model.learn(16, callback=Set(hook, kl_coef=9.0))
    assert model.kl_coef == 9.0


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "fast"])
def test_a_rate_of_the_critic_is_checked_when_it_is_used(rate: Any) -> None:
    model: Any = Reinforce("MlpPolicy", vec(ScriptedEnv()), **SMALL).learn(24)
    model.critic_learning_rate = rate
    before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    with pytest.raises(ValueError, match="critic_learning_rate must be"):
        model.learn(24)
    assert th.equal(before, th.nn.utils.parameters_to_vector(model.policy.parameters()))


@pytest.mark.parametrize("cls", [Reinforce, ActorCritic])
def test_a_class_with_a_train_of_its_own_is_logged(cls: Any, tmp_path: Path) -> None:
    class Own(cls):  # type: ignore[misc]
        def train(self) -> None:
            self._n_updates += 1

    model = Own("MlpPolicy", make_vec_env("CartPole-v1", 1, seed=0), **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(2000, log_interval="auto")
    assert 2 <= len((tmp_path / "progress.csv").read_text().splitlines()) - 1 <= 6


def test_starts_of_episodes_are_those_of_the_step_while_callbacks_run() -> None:
    """As in SB3: True for the observation that begins an episode."""
    seen: list[list[bool]] = []

    def note(values: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append([bool(start) for start in values["self"]._last_episode_starts])
        return True

    ActorCritic("MlpPolicy", vec(ScriptedEnv(lengths=(3,))), n_steps=5, **SMALL).learn(10, callback=note)
    assert seen == [[n % 3 == 0] for n in range(10)]


@pytest.mark.parametrize("cls", [NPG, TRPO])
def test_updates_that_fail_after_the_step_count_as_failures_in_a_row(cls: Any) -> None:
    """The critic's gradient is NaN, so that each update is undone, the actor's step included."""
    model = cls("MlpPolicy", vec(ScriptedEnv()), n_steps=16, batch_size=16, on_nonfinite="skip", **SMALL)
    model.policy.value_net.weight.register_hook(lambda gradient: gradient * th.nan)
    with pytest.warns(UserWarning, match="has not moved for 3 updates in a row, now because of 'nonfinite'"):
        model.learn(16 * 4)
    assert model.logger.name_to_value.get("train/step_outcome", "nonfinite") == "nonfinite"


def test_a_zip_of_a2c_loads_into_an_off_policy_class(tmp_path: Path) -> None:
    A2C("MlpPolicy", "CartPole-v1", **SMALL).learn(10).save(tmp_path / "a2c")
    loaded = OffPolicyPG.load(tmp_path / "a2c", env=make_vec_env("CartPole-v1", 1, seed=0), device="cpu").learn(400)
    assert loaded._n_updates > 0


@pytest.mark.parametrize("cls", [Reinforce, TRPO, ActorCritic, KLPenaltyPG])
def test_arguments_of_the_optimizer_have_no_effect_on_a_zip(cls: Any, tmp_path: Path) -> None:
    cls("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="rms_prop_eps has no effect"):
        cls.load(tmp_path / "model", rms_prop_eps=0.1)


class OldValues:
    """A baseline that asks for the critic as version 0.1 had it."""

    uses_critic = True

    def fit(self, batch: Any, returns: th.Tensor) -> None:
        pass

    def predict(self, batch: Any) -> th.Tensor:
        values: th.Tensor | None = batch.values
        assert values is not None
        return values


def test_a_baseline_may_ask_for_the_critic_by_its_old_name() -> None:
    model = Reinforce("MlpPolicy", vec(ScriptedEnv()), baseline=OldValues(), n_steps=8, **SMALL).learn(16)
    assert model._n_updates == 2


class OldSubclass(Baseline):
    """A baseline as version 0.1 had it: ``Baseline`` was the type of objects with these two methods."""

    def fit(self, batch: Any, returns: th.Tensor) -> None:
        self.mean = float(returns.mean())

    def predict(self, batch: Any) -> float:
        return getattr(self, "mean", 0.0)


def test_a_subclass_of_baseline_may_have_fit_and_predict() -> None:
    baseline = OldSubclass()
    model = Reinforce("MlpPolicy", vec(ScriptedEnv()), baseline=baseline, **SMALL).learn(48)
    assert model._n_updates == 2
    buffer = model.rollout_buffer
    assert np.allclose(buffer.returns - buffer.advantages, buffer.returns[0, 0] - buffer.advantages[0, 0], atol=1e-4)
    assert buffer.returns[0, 0] > buffer.advantages[0, 0] > 0


def test_a_subclass_of_baseline_without_a_formula_is_refused() -> None:
    class Nothing(Baseline):
        """Neither advantages nor predict."""

    with pytest.raises(TypeError, match="an object with fit and predict"):
        Reinforce("MlpPolicy", vec(ScriptedEnv()), baseline=Nothing(), **SMALL)
