"""What callbacks find in ``locals``: SB3's names, with SB3's values."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, SAC
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPolicyPG, Reinforce
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, OwnForward, ScriptedEnv, policy_for, ready_to_collect, vec

#: What SB3's on-policy loop computes at every step besides the actions.
COMPUTED = ("values", "log_probs", "obs_tensor")
pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")
ON_POLICY = (Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG)


class Recorder(BaseCallback):
    """Keeps what ``locals`` holds, at every step and at the end of every rollout."""

    def __init__(self, read: Callable[[dict[str, Any], str], Any] = dict.__getitem__) -> None:
        super().__init__()
        self.read, self.steps, self.ends = read, list[dict[str, Any]](), list[dict[str, Any]]()

    def _seen(self) -> dict[str, Any]:
        return {name: self.read(self.locals, name) for name in COMPUTED}

    def _on_step(self) -> bool:
        self.steps.append(self._seen())
        return True

    def _on_rollout_end(self) -> None:
        self.ends.append(self._seen())


def item(locals_: dict[str, Any], name: str) -> Any:
    return locals_[name]


def get(locals_: dict[str, Any], name: str) -> Any:
    assert name in locals_
    return locals_.get(name)


def keyword(locals_: dict[str, Any], name: str) -> Any:
    return dict(**locals_)[name]


def items(locals_: dict[str, Any], name: str) -> Any:
    assert len(locals_) == len(list(locals_)) == len(locals_.keys()) == len(locals_.values())
    return dict(locals_.items())[name]


def copied(locals_: dict[str, Any], name: str) -> Any:
    return locals_.copy()[name]


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        for name in COMPUTED:
            for a, b in zip(parts(mine[name]), parts(other[name]), strict=True):
                assert isinstance(a, th.Tensor)
                assert not a.requires_grad
                assert a.shape == b.shape
                assert th.allclose(a, b, atol=1e-5), name


def parts(x: Any) -> list[Any]:
    return list(x.values()) if isinstance(x, dict) else [x]


@pytest.mark.parametrize("read", [item, get, keyword, items, copied])
@pytest.mark.parametrize("policy", ["MlpPolicy", OwnForward])
def test_they_are_those_of_a2c(policy: Any, read: Any) -> None:
    recorders = []
    for cls in (A2C, ActorCritic):
        recorders.append(Recorder(item if cls is A2C else read))
        model: Any = cls(policy, make_vec_env("CartPole-v1", 2, seed=0), seed=0, device="cpu")
        model.learn(60, callback=recorders[-1])
    theirs, ours = recorders
    assert_same(ours.steps, theirs.steps)
    assert_same(ours.ends, theirs.ends)


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("observation_space", ["vector", "image", "dict", "discrete"])
def test_they_are_those_of_a2c_in_all_spaces(observation_space: str, action_space: str) -> None:
    policy = policy_for(OBSERVATION_SPACES[observation_space])
    recorders = []
    for cls in (A2C, ActorCritic):
        env = ScriptedEnv((4,), (False,), 1.0, OBSERVATION_SPACES[observation_space], ACTION_SPACES[action_space])
        recorders.append(Recorder(item))
        model: Any = cls(policy, vec(env), seed=0, device="cpu")
        model.learn(10, callback=recorders[-1])
    assert_same(recorders[1].steps, recorders[0].steps)


@pytest.mark.parametrize("kwargs", [{"n_steps": 8}, {"n_steps": None, "n_episodes": 2}])
@pytest.mark.parametrize("cls", ON_POLICY)
def test_they_are_the_policys(cls: Any, kwargs: dict[str, Any]) -> None:
    """Values and log-probs of the policy as it is, at the observations that were acted on."""
    n_read = 0

    class Checks(BaseCallback):
        before: Any = None

        def _on_step(self) -> bool:
            nonlocal n_read
            n_read += 1
            policy: Any = self.model.policy
            obs = self.locals["obs_tensor"]
            actions = th.as_tensor(self.locals["actions"])
            with th.no_grad():
                values, log_probs, _ = policy.evaluate_actions(obs, actions)
            assert th.allclose(self.locals["values"], values, atol=1e-5)
            assert th.allclose(self.locals["log_probs"], log_probs, atol=1e-5)
            if n_read > 1:
                before: Any = obs_as_tensor(self.before, self.model.device)
                assert th.equal(obs, before)
            self.before = self.locals["new_obs"]
            return True

    model = cls("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, device="cpu", **kwargs)
    model.learn(40, callback=Checks())
    assert n_read >= 20


@pytest.mark.parametrize("where", ["alone", "list", "list in list", "every n", "function", "several"])
def test_they_are_there_wherever_a_callback_stands(where: str) -> None:
    def run(cls: Any) -> list[dict[str, Any]]:
        recorder = Recorder(item)
        seen: list[dict[str, Any]] = []

        def function(locals_: dict[str, Any], _: dict[str, Any]) -> bool:
            seen.append({name: locals_[name] for name in COMPUTED})
            return True

        callback: Any = {
            "alone": recorder,
            "list": CallbackList([Recorder(item), recorder]),
            "list in list": CallbackList([CallbackList([recorder]), Recorder(item)]),
            "every n": EveryNTimesteps(4, recorder),
            "function": function,
            "several": [Recorder(item), recorder],
        }[where]
        model = cls("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, device="cpu")
        model.learn(40, callback=callback)
        model.learn(40, callback=callback, reset_num_timesteps=False)
        return recorder.steps + seen

    assert_same(run(ActorCritic), run(A2C))


def test_they_are_there_when_collect_rollouts_is_called_directly() -> None:
    def run(cls: Any) -> Recorder:
        model = cls("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), n_steps=5, seed=0, device="cpu")
        recorder = Recorder(item)
        ready_to_collect(model)
        recorder.init_callback(model)
        assert "values" not in recorder.locals
        model.collect_rollouts(model.env, recorder, model.rollout_buffer, 5)
        return recorder

    ours, theirs = run(ActorCritic), run(A2C)
    assert_same(ours.steps, theirs.steps)
    assert_same(ours.ends, theirs.ends)


def test_before_the_first_step_there_are_none() -> None:
    class AtStart(BaseCallback):
        n_rollouts = 0

        def _on_rollout_start(self) -> None:
            self.n_rollouts += 1
            if self.n_rollouts == 1:
                assert "values" not in self.locals
                assert self.locals.get("values") is None
                with pytest.raises(KeyError, match="values"):
                    self.locals["values"]

        def _on_step(self) -> bool:
            with pytest.raises(KeyError, match="no_such_name"):
                self.locals["no_such_name"]
            assert self.locals.get("no_such_name", 3) == 3
            return True

    callback = AtStart()
    ActorCritic("MlpPolicy", "CartPole-v1", seed=0, device="cpu").learn(10, callback=callback)
    assert callback.n_rollouts == 2


def test_who_does_not_read_them_pays_for_no_forward() -> None:
    class Counts(FlattenExtractor):
        n_calls = 0

        def forward(self, observations: th.Tensor) -> th.Tensor:
            Counts.n_calls += 1
            return super().forward(observations)

    class Reads(BaseCallback):
        def _on_step(self) -> bool:
            return bool(self.locals["new_obs"].size)

    def n_calls(callback: BaseCallback) -> int:
        Counts.n_calls = 0
        model.learn(50, callback=callback)
        return Counts.n_calls

    kwargs: dict[str, Any] = {"features_extractor_class": Counts}
    model = ActorCritic("MlpPolicy", "CartPole-v1", n_steps=50, policy_kwargs=kwargs, seed=0, device="cpu")
    n_without = n_calls(Reads())
    assert 50 <= n_without < 60
    assert n_calls(Recorder(item)) - n_without == 2 * 50 + 1  # values and log-probs, and at the end values


def test_reading_them_changes_nothing() -> None:
    weights = []
    for callback in (None, Recorder(item)):
        model = ActorCritic("MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=0), use_sde=True, seed=0, device="cpu")
        model.learn(60, callback=callback)
        weights.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert th.equal(*weights)


def test_values_are_in_reward_units() -> None:
    class Checks(Recorder):
        def _on_rollout_end(self) -> None:
            super()._on_rollout_end()
            values = th.cat([step["values"] for step in self.steps[-8:]]).flatten().numpy()
            assert np.allclose(values, self.locals["rollout_buffer"].values.flatten(), rtol=1e-4)
            model: Any = self.model
            assert (model.value_scale == 1) == (len(self.steps) == 8)  # before the first update

    env = vec(ScriptedEnv(lengths=(5,)))
    model = ActorCritic("MlpPolicy", env, n_steps=8, normalize_value_targets=True, seed=0, device="cpu")
    model.learn(32, callback=Checks(item))
    assert model.value_scale > 2


class OffPolicyRecorder(BaseCallback):
    """Keeps the names in ``locals``, and checks what they say of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()
        self.starts, self.ended = 0, 0

    def _on_rollout_start(self) -> None:
        self.starts, self.ended = self.model.num_timesteps, 0

    def _on_step(self) -> bool:
        seen = self.locals
        self.names |= set(seen)
        n_envs = self.training_env.num_envs
        assert seen["num_collected_steps"] == (self.model.num_timesteps - self.starts) / n_envs
        assert seen["num_collected_episodes"] == self.ended
        self.ended += int(np.sum(seen["dones"]))
        # bounds of -1 and 1, so that scaling changes nothing
        assert np.allclose(seen["actions"], np.clip(seen["buffer_actions"], -1, 1))
        return True


@pytest.mark.parametrize("train_freq", [(4, "step"), (2, "episode")])
def test_off_policy_pg_has_the_names_of_sb3s_off_policy_algorithms(train_freq: Any) -> None:
    class Short(gym.Env[Any, Any]):
        observation_space = spaces.Box(-1, 1, (2,), np.float32)
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.t = 0
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            self.t += 1
            return self.observation_space.sample(), 0.0, self.t == 3, False, {}

    theirs, ours = OffPolicyRecorder(), OffPolicyRecorder()
    SAC("MlpPolicy", vec(Short()), learning_starts=100, device="cpu").learn(20, callback=theirs)
    model = OffPolicyPG("MlpPolicy", vec(Short()), train_freq=train_freq, seed=0, device="cpu")
    model.learn(20, callback=ours)
    computed_by_sb3 = {"idx", "done", "kwargs"}  # helpers of SB3's loop
    assert theirs.names - computed_by_sb3 <= ours.names
    assert not {"rollout_buffer", "clipped_actions", "n_rollout_steps"} & ours.names
