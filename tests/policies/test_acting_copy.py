"""Acting on another device than learning. "cpu:0" is one, as far as devices are compared."""

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import get_device

from sb3_pg import NPG, ActorCritic, OffPolicyPG, Reinforce
from sb3_pg.policies.acting_copy import ActingCopy
from sb3_pg.policies.policy_cache import set_training_mode
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ActingPolicy, BatchNormExtractor, ScriptedEnv, vec

SMALL: dict[str, Any] = {"device": "cpu", "seed": 0, "learning_rate": 1e-2}


CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    **{name: (ActorCritic, "MlpPolicy", {}, {"action_space": space}) for name, space in ACTION_SPACES.items()},
    "episodes": (Reinforce, "MlpPolicy", {"n_episodes": 4}, {}),
    "natural": (NPG, "MlpPolicy", {"n_steps": 16, "batch_size": 32}, {}),
    "off-policy": (OffPolicyPG, "MlpPolicy", {"train_freq": (4, "episode")}, {}),
    "gsde": (ActorCritic, "MlpPolicy", {"use_sde": True, "sde_sample_freq": 2}, {"action_space": ACTION_SPACES["box"]}),
    "own forward": (ActorCritic, ActingPolicy, {}, {}),
    "dict": (ActorCritic, "MultiInputPolicy", {}, {"observation_space": OBSERVATION_SPACES["dict"]}),
    "image": (ActorCritic, "CnnPolicy", {}, {"observation_space": OBSERVATION_SPACES["image"]}),
    "batch norm": (ActorCritic, "MlpPolicy", {"policy_kwargs": {"features_extractor_class": BatchNormExtractor}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_copy_acts_as_the_policy_would(case: str) -> None:
    cls, policy, kwargs, spaces = CASES[case]
    if case == "dict":
        kwargs = {"policy_kwargs": {"net_arch": [8]}}
    learned = []
    for act_device in (None, "cpu:0"):
        env = vec(ScriptedEnv((3, 5), (False, True), **spaces), ScriptedEnv((2,), **spaces))
        model = cls(policy, env, act_device=act_device, **SMALL, **kwargs)
        before = th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
        model.learn(80)
        if policy is ActingPolicy:
            assert (ActingPolicy.last[0] is model.policy) == (act_device is None)
        learned.append(th.nn.utils.parameters_to_vector(model.policy.parameters()).detach())
        assert not th.equal(before, learned[-1])
    assert th.equal(*learned)


def test_what_a_callback_changes_at_the_start_of_a_rollout_acts() -> None:
    class Bias(BaseCallback):
        def _on_rollout_start(self) -> None:
            policy: Any = self.model.policy
            with th.no_grad():
                policy.action_net.bias.copy_(th.tensor([0.0, 100.0, 0.0]))

        def _on_step(self) -> bool:
            return bool((self.locals["actions"] == 1).all())

    model = Reinforce("MlpPolicy", vec(ScriptedEnv()), n_steps=8, act_device="cpu:0", **SMALL)
    model.learn(64, callback=Bias())
    assert model.num_timesteps == 64


def test_a_module_that_is_replaced_is_copied_anew() -> None:
    model = Reinforce(ActingPolicy, vec(ScriptedEnv()), n_steps=8, act_device="cpu:0", **SMALL).learn(8)
    model.policy.mlp_extractor.policy_net = th.nn.Sequential(th.nn.Linear(3, 64), th.nn.ReLU())
    model.learn(8, reset_num_timesteps=False)
    assert ActingPolicy.last[0] is not model.policy
    assert isinstance(ActingPolicy.last[0].mlp_extractor.policy_net[1], th.nn.ReLU)


def test_the_copy_has_no_optimizer_and_leaves_the_policy_alone() -> None:
    policy: Any = Reinforce("MlpPolicy", vec(ScriptedEnv()), n_steps=8, **SMALL).policy
    set_training_mode(policy, False)
    keeper = ActingCopy("cpu")
    acting: Any
    acting, device = keeper.of(policy)
    assert device == th.device("cpu")
    assert acting.optimizer is None
    assert policy.optimizer is not None
    assert not acting.training
    with th.no_grad():
        policy.action_net.bias += 1
    again: Any = keeper.of(policy)
    assert again[0] is acting
    assert th.equal(acting.action_net.bias, policy.action_net.bias)
    assert {p.data_ptr() for p in acting.parameters()}.isdisjoint(p.data_ptr() for p in policy.parameters())


def test_a_changed_attribute_is_copied() -> None:
    policy: Any = Reinforce("MlpPolicy", vec(ScriptedEnv()), n_steps=8, **SMALL).policy
    policy.features_extractor.register_module("slope", th.nn.LeakyReLU(0.5))
    policy.features_extractor.constant = th.zeros(2)
    set_training_mode(policy, False)
    keeper = ActingCopy("cpu")

    def extractor() -> Any:
        acting, _ = keeper.of(policy)
        return acting.features_extractor

    first = extractor()
    assert extractor() is first
    policy.features_extractor.slope.negative_slope = 0.25
    assert extractor().slope.negative_slope == 0.25
    policy.features_extractor.constant += 1
    assert th.equal(extractor().constant, th.ones(2))
    assert extractor() is extractor()


def test_a_device_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="act_device"):
        Reinforce("MlpPolicy", vec(ScriptedEnv()), act_device="gpu")


def test_auto_is_the_device_that_sb3_takes() -> None:
    Reinforce(ActingPolicy, vec(ScriptedEnv()), n_steps=8, act_device="auto", **SMALL).learn(8)
    assert ActingPolicy.last[0].device == get_device("auto")


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = Reinforce(ActingPolicy, vec(ScriptedEnv()), n_steps=8, act_device="cpu:0", **SMALL).learn(8)
    model.save(tmp_path / "model")
    loaded = Reinforce.load(tmp_path / "model", env=vec(ScriptedEnv()), device="cpu", allow=[ActingPolicy])
    assert loaded.act_device == "cpu:0"
    loaded.learn(8)
    assert ActingPolicy.last[0] is not loaded.policy


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("error:You are trying to run")
def test_act_on_the_cpu_and_learn_on_cuda() -> None:
    model = Reinforce(ActingPolicy, vec(ScriptedEnv()), n_steps=16, device="cuda", act_device="cpu", seed=0).learn(64)
    assert next(model.policy.parameters()).is_cuda
    assert not next(ActingPolicy.last[0].parameters()).is_cuda
    assert np.isfinite(model.rollout_buffer.log_probs).all()
