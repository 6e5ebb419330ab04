"""What acts instead of the policy: a model, a policy, or a callable that returns actions and log-probs."""

import copy
import doctest
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_pg
from sb3_pg import ActorCritic, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.policies import policy_actions
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, policy_for, vec

SPACES: dict[str, spaces.Space[Any]] = {
    **ACTION_SPACES,
    "start": spaces.Discrete(3, start=2),
    "starts": spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "int8": spaces.Box(-128, 127, (2,), np.int8),
}
UNIT = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))


def an_env(space: spaces.Space[Any], observations: str = "vector") -> ScriptedEnv:
    observation_space = copy.deepcopy(OBSERVATION_SPACES[observations])
    return ScriptedEnv((2, 3), action_space=copy.deepcopy(space), observation_space=observation_space)


def make(env: Any, **kwargs: Any) -> Any:
    policy = policy_for(env.observation_space)
    small = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}, "train_freq": 20, "gradient_steps": 0}
    return OffPolicyPG(policy, env, **{**small, **kwargs})


def a_teacher(cls: Any, space: spaces.Space[Any], observations: str = "vector", **kwargs: Any) -> Any:
    policy = policy_for(OBSERVATION_SPACES[observations])
    kwargs = {"device": "cpu", "seed": 5, "policy_kwargs": {"net_arch": [8]}, **kwargs}
    return cls(policy, vec(an_env(space, observations)), **kwargs)


def rows(model: Any) -> tuple[Any, th.Tensor, np.ndarray]:
    """Observations, actions as a policy takes them, and log-probs, of one env."""
    buffer = model.replay_buffer
    n = buffer.pos
    assert not buffer.full
    assert n > 0
    observations: Any = buffer.observations
    if isinstance(observations, dict):
        obs: Any = {key: th.as_tensor(x[:n, 0]) for key, x in observations.items()}
    else:
        obs = th.as_tensor(observations[:n, 0])
    return obs, policy_actions(th.as_tensor(buffer.actions[:n, 0]), model.action_space), buffer.log_probs[:n, 0]


def log_prob(policy: Any, obs: Any, actions: th.Tensor) -> np.ndarray:
    with th.no_grad():
        return policy.get_distribution(obs).log_prob(actions).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SPACES)
def test_a_model_acts_and_its_log_probs_are_stored(name: str) -> None:
    space = SPACES[name]
    teacher = a_teacher(A2C, space)
    env = an_env(space)
    model = make(vec(env), behavior_policy=teacher).learn(20)
    obs, actions, stored = rows(model)
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)
    assert stored != pytest.approx(log_prob(model.policy, obs, actions), rel=1e-3)
    assert all(space.contains(action) for action in env.actions)
    if not isinstance(space, spaces.Box | spaces.MultiBinary):
        start = np.asarray(getattr(space, "start", 0))
        received = np.stack(env.actions)[: len(actions)] - start
        assert np.array_equal(received, actions.numpy().reshape(received.shape))


@pytest.mark.parametrize("observations", ["dict", "discrete", "double"])
def test_a_model_sees_the_observations_of_every_space(observations: str) -> None:
    teacher = a_teacher(PPO, SPACES["box"], observations, n_steps=8, batch_size=8)
    model = make(vec(an_env(SPACES["box"], observations)), behavior_policy=teacher).learn(20)
    obs, actions, stored = rows(model)
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cls", [PPO, sb3_contrib.TRPO, Reinforce, ActorCritic, sb3_pg.TRPO, OffPolicyPG, OffPAC])
def test_every_model_that_knows_its_log_probs_acts(cls: Any) -> None:
    teacher = a_teacher(cls, SPACES["start"])
    model = make(vec(an_env(SPACES["start"])), behavior_policy=teacher).learn(20)
    obs, actions, stored = rows(model)
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)
    assert model.behavior_policy is teacher.policy


def test_a_model_may_have_learned_before_and_learn_on() -> None:
    teacher = a_teacher(A2C, SPACES["discrete"], learning_rate=0.1).learn(40)
    model = make(vec(an_env(SPACES["discrete"])), behavior_policy=teacher).learn(20)
    obs, actions, stored = rows(model)
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)
    n = len(stored)
    teacher.learn(40)
    model.learn(20, reset_num_timesteps=False)
    obs, actions, stored = rows(model)
    now = log_prob(teacher.policy, obs, actions)
    assert stored[n:] == pytest.approx(now[n:], rel=1e-5, abs=1e-5)
    assert stored[:n] != pytest.approx(now[:n], rel=1e-3)


class Masked(ActorCriticPolicy):
    """Never takes action 0."""

    def get_distribution(self, obs: Any) -> Any:
        distribution: Any = super().get_distribution(obs)
        distribution.distribution.logits[:, 0] = -1e9
        return distribution.proba_distribution(distribution.distribution.logits)

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


class Holder:
    """A callable that holds a policy and does not act by it."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self, obs: Any) -> Any:
        return np.ones(len(obs), np.int64), np.full(len(obs), -0.5)


def test_a_callable_that_holds_a_policy_is_called() -> None:
    space = ACTION_SPACES["discrete"]
    model = make(vec(an_env(space)), behavior_policy=Holder(a_teacher(A2C, space).policy)).learn(20)
    assert np.all(rows(model)[2] == -0.5)


def test_a_model_with_a_compiled_policy_acts() -> None:
    space = ACTION_SPACES["discrete"]
    teacher = a_teacher(A2C, space)
    teacher.policy = th.compile(teacher.policy, backend="eager")
    obs, actions, stored = rows(make(vec(an_env(space)), behavior_policy=teacher).learn(20))
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)


def test_a_policy_acts_as_its_own_forward_says() -> None:
    env = vec(an_env(SPACES["discrete"]))
    teacher = A2C(Masked, env, device="cpu", seed=1)
    model = make(vec(an_env(SPACES["discrete"])), behavior_policy=teacher.policy).learn(60)
    obs, actions, stored = rows(model)
    assert set(actions.tolist()) == {1, 2}
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)


def test_a_policy_acts_in_evaluation_mode_without_gradient() -> None:
    teacher = a_teacher(A2C, SPACES["discrete"])
    teacher.policy.mlp_extractor.policy_net.append(nn.Dropout(0.9))
    teacher.policy.set_training_mode(True)
    seen: list[tuple[bool, bool]] = []
    teacher.policy.action_net.register_forward_hook(
        lambda module, _, __: seen.append((module.training, th.is_grad_enabled()))
    )
    model = make(vec(an_env(SPACES["discrete"])), behavior_policy=teacher.policy).learn(20)
    assert set(seen) == {(False, False)}
    assert teacher.policy.training
    obs, actions, stored = rows(model)
    teacher.policy.set_training_mode(False)
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)


def test_a_policy_with_state_dependent_noise_draws_it_anew_in_every_rollout() -> None:
    teacher = a_teacher(A2C, SPACES["box"], use_sde=True)
    drawn: list[int] = []
    reset = teacher.policy.reset_noise

    def counted(n_envs: int = 1) -> None:
        drawn.append(n_envs)
        reset(n_envs)

    teacher.policy.reset_noise = counted
    env = vec(an_env(SPACES["box"]), an_env(SPACES["box"]))
    make(env, behavior_policy=teacher, train_freq=10).learn(60)
    assert drawn == [2, 2, 2]


# ---------------------------------------------------------------- squashed actions


def squashing(space: spaces.Space[Any]) -> Any:
    return a_teacher(A2C, space, use_sde=True, policy_kwargs={"net_arch": [8], "squash_output": True})


@pytest.mark.parametrize("teacher", ["A2C", "OffPAC"])
def test_actions_of_a_squashed_policy_are_rescaled_and_so_is_their_density(teacher: str) -> None:
    squashed = squashing(UNIT) if teacher == "A2C" else a_teacher(OffPAC, UNIT)
    env = an_env(UNIT)
    model = make(vec(env), behavior_policy=squashed).learn(20)
    obs, actions, stored = rows(model)
    assert np.stack(env.actions)[: len(actions)] == pytest.approx(actions.numpy(), abs=1e-5)  # what clipping left
    between = th.as_tensor(2 * (actions.numpy() - UNIT.low) / (UNIT.high - UNIT.low) - 1)
    assert between.abs().max() <= 1 + 1e-6
    expected = log_prob(squashed.policy, obs, between) - math.log(1) - math.log(4)
    assert stored == pytest.approx(expected, abs=2e-2)


def test_a_squashed_policy_learns_from_a_squashed_one() -> None:
    teacher = squashing(UNIT)
    env = an_env(UNIT)
    learner = {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}}
    model = make(vec(env), behavior_policy=teacher, **learner).learn(20)
    obs, actions, stored = rows(model)
    assert actions.abs().max() <= 1
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-4, abs=1e-4)
    assert np.stack(env.actions)[: len(actions)] == pytest.approx(teacher.policy.unscale_action(actions.numpy()))


def test_a_squashed_policy_does_not_learn_from_one_that_is_not() -> None:
    learner = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
    with pytest.raises(ValueError, match=r"behavior_policy must squash.*ActorCriticPolicy with squash_output=False"):
        make(vec(an_env(UNIT)), behavior_policy=a_teacher(A2C, UNIT), **learner)
    model = make(vec(an_env(UNIT)), behavior_policy=lambda _: (np.array([[0.0, 1.5]]), np.zeros(1)), **learner)
    with pytest.raises(ValueError, match=r"behavior_policy must return actions in \[-1, 1\].*got 1.5 for env 0"):
        model.learn(20)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("model", [True, False])
def test_other_spaces_are_refused(model: bool) -> None:
    env = vec(an_env(SPACES["discrete"]))
    for teacher, message in [
        (a_teacher(A2C, spaces.Discrete(4)), r"action_space.*Discrete\(3\), got Discrete\(4\)"),
        (a_teacher(A2C, SPACES["start"]), r"action_space.*Discrete\(3\), got Discrete\(3, start=2\)"),
        (a_teacher(A2C, SPACES["discrete"], "double"), r"observation_space.*float32\), got Box.*float64\)"),
    ]:
        with pytest.raises(ValueError, match="behavior_policy must have the " + message):
            make(env, behavior_policy=teacher if model else teacher.policy)


def sb3s(cls: Any, space: spaces.Space[Any], **kwargs: Any) -> Any:
    policy = "MlpLstmPolicy" if cls is RecurrentPPO else "MlpPolicy"
    return cls(policy, vec(an_env(space)), device="cpu", **kwargs)


@pytest.mark.parametrize(
    ("cls", "kwargs", "space", "message"),
    [
        (DQN, {"buffer_size": 10}, "discrete", "DQN.*has no log-probs"),
        (TD3, {"buffer_size": 10}, "box", "TD3.*has no log-probs"),
        (SAC, {"buffer_size": 10}, "box", "SAC.*has no log-probs"),
        (RecurrentPPO, {"n_steps": 8, "batch_size": 8}, "discrete", "takes more than observations"),
        (MaskablePPO, {"n_steps": 8, "batch_size": 8}, "discrete", "takes more than observations"),
    ],
)
def test_models_without_log_probs_of_their_own_are_refused(
    cls: Any, kwargs: dict[str, Any], space: str, message: str
) -> None:
    teacher = sb3s(cls, SPACES[space], **kwargs)
    for given in (teacher, teacher.policy):
        with pytest.raises(TypeError, match=r"behavior_policy must be an SB3 model or policy with get_distribution"):
            make(vec(an_env(SPACES[space])), behavior_policy=given)
    with pytest.raises(TypeError, match=message):
        make(vec(an_env(SPACES[space])), behavior_policy=teacher)


@pytest.mark.parametrize("given", ["uniform", 3, (lambda _: None,), A2C, ActorCriticPolicy])
def test_what_does_not_act_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"behavior_policy must be an SB3 model.*callable.*or None, got"):
        make(vec(an_env(SPACES["discrete"])), behavior_policy=given)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"got NoneType: None"),
        ("left", r"got str: 'left'"),
        (np.zeros(1, int), r"got ndarray"),
        ((np.zeros(1, int),), r"got tuple of ndarray"),
        ((), r"got tuple of nothing"),
        ((np.zeros(1, int), np.zeros(1), np.zeros(1)), r"got tuple of ndarray, ndarray, ndarray"),
        (
            (np.zeros(1, int), None),
            r"got tuple of ndarray, NoneType.*predict returns no log-probs: give the model itself",
        ),
        ((np.array(["a"]), np.zeros(1)), r"got tuple of ndarray, ndarray"),
        (([[1], [2, 3]], np.zeros(1)), r"got tuple of list, ndarray"),
        ({"actions": 0, "log_probs": 0}, r"got dict"),
    ],
    ids=str,
)
def test_a_callable_that_returns_no_pair_of_arrays_is_told_what_was_expected(returned: Any, message: str) -> None:
    model = make(vec(an_env(SPACES["discrete"])), behavior_policy=lambda _: returned)
    expected = r"behavior_policy must return a pair, actions of shape \(1,\) and log-probs of shape \(1,\), "
    with pytest.raises(TypeError, match=expected + message):
        model.learn(20)


@pytest.mark.parametrize(
    ("space", "actions", "log_probs", "message"),
    [
        ("discrete", np.zeros((1, 1), int), np.zeros(1), r"must return actions of shape \(1,\).*got \(1, 1\)"),
        ("box", np.zeros(2), np.zeros(1), r"actions of shape \(1, 2\) and log-probs of shape \(1,\), got \(2,\)"),
        ("discrete", 0, -1.0, r"actions of shape \(1,\).*got \(\) and \(\)"),
        ("discrete", np.zeros(1, int), np.zeros((1, 1)), r"log-probs of shape \(1,\), got \(1,\) and \(1, 1\)"),
        ("discrete", np.zeros(1, int), np.array([np.nan]), "must return finite log-probs, got nan for env 0"),
        ("box", np.array([[0.0, np.nan]]), np.zeros(1), "must return actions that are finite, got nan for env 0"),
        ("int8", np.array([[0.0, np.inf]]), np.zeros(1), "must return actions that are finite, got inf for env 0"),
        ("discrete", np.array([3]), np.zeros(1), r"actions must be in Discrete\(3\), got 3 at env 0"),
        ("discrete", np.array([0.5]), np.zeros(1), r"actions must be in Discrete\(3\), got 0.5 at env 0"),
        ("start", np.array([0]), np.zeros(1), r"actions must be in Discrete\(3, start=2\), got 0 at env 0"),
        ("starts", np.array([[5, 2]]), np.zeros(1), r"actions must be in MultiDiscrete.*got 2 at env 0"),
        ("multi_binary", np.array([[0, 2, 0]]), np.zeros(1), r"actions must be in MultiBinary\(3\), got 2 at env 0"),
    ],
)
def test_wrong_actions_and_log_probs_are_refused_before_the_env_sees_them(
    space: str, actions: Any, log_probs: Any, message: str
) -> None:
    env = an_env(SPACES[space])
    model = make(vec(env), behavior_policy=lambda _: (actions, log_probs))
    with pytest.raises(ValueError, match="behavior_policy.*" + message):
        model.learn(20)
    assert env.actions == []


@pytest.mark.parametrize(
    ("space", "returned", "stored"),
    [
        ("start", (np.array([4]), np.array([-1.0])), [[2]]),
        ("start", [th.tensor([3]), th.tensor([-1.0])], [[1]]),
        ("start", ([2], [-1.0]), [[0]]),
        ("starts", (np.array([[6, -1]], np.int8), np.array([-1.0])), [[1, 0]]),
        ("int8", (np.array([[0.75, -200.5]]), np.array([-1.0])), [[0.75, -200.5]]),
        ("int8", (th.tensor([[0.75, 3]], dtype=th.bfloat16), np.array([-1])), [[0.75, 3]]),
        ("int8", (np.array([[1, 2]]), np.array([-1.0])), [[1, 2]]),
    ],
)
def test_a_callable_speaks_the_envs_numbers_and_floating_ones_of_a_box(space: str, returned: Any, stored: Any) -> None:
    env = an_env(SPACES[space])
    model = make(vec(env), behavior_policy=lambda _: returned).learn(20)
    assert model.replay_buffer.actions[0].tolist() == stored
    assert (model.replay_buffer.log_probs[: model.replay_buffer.pos] == -1).all()
    assert all(env.action_space.contains(action) for action in env.actions)


# ---------------------------------------------------------------- VecNormalize


def test_other_statistics_of_a_vec_normalize_are_warned_of(tmp_path: Path) -> None:
    normalized = VecNormalize(vec(an_env(SPACES["discrete"])))
    teacher = A2C("MlpPolicy", normalized, device="cpu").learn(40)
    with pytest.warns(UserWarning, match=r"behavior_policy.*VecNormalize.*same statistics"):
        make(vec(an_env(SPACES["discrete"])), behavior_policy=teacher)
    with pytest.warns(UserWarning, match=r"behavior_policy.*VecNormalize.*same statistics"):
        make(VecNormalize(vec(an_env(SPACES["discrete"]))), behavior_policy=teacher)
    normalized.save(str(tmp_path / "statistics.pkl"))
    same = VecNormalize.load(str(tmp_path / "statistics.pkl"), vec(an_env(SPACES["discrete"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(same, behavior_policy=teacher).learn(20)
        make(
            VecNormalize(vec(an_env(SPACES["discrete"])), norm_obs=False),
            behavior_policy=a_teacher(A2C, SPACES["discrete"]),
        )
    obs, actions, stored = rows(model)  # as this env normalizes them
    assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)


# ---------------------------------------------------------------- saving, loading, changing


def biased(obs: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.full(len(obs), 1), np.full(len(obs), -0.5)


@pytest.mark.parametrize("kind", ["model", "policy", "callable"])
@pytest.mark.parametrize("learned", [False, True])
def test_what_acts_is_saved_loaded_and_copied(kind: str, learned: bool, tmp_path: Path) -> None:
    teacher = a_teacher(A2C, SPACES["discrete"]).learn(20)
    given = {"model": teacher, "policy": teacher.policy, "callable": biased}[kind]
    model = make(vec(an_env(SPACES["discrete"])), behavior_policy=given)
    if learned:
        model.learn(20)
    model.save(tmp_path / "model")
    env = vec(an_env(SPACES["discrete"]))
    loaded = OffPolicyPG.load(tmp_path / "model", env=env, allow=[biased]).learn(20)
    models = [loaded]
    if learned:  # before, the teacher's distribution has a graph, which nobody can copy
        models.append(copy.deepcopy(model).learn(20))
    for one in models:
        obs, actions, stored = rows(one)
        expected = np.full(len(stored), -0.5) if kind == "callable" else log_prob(teacher.policy, obs, actions)
        assert stored == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_what_acts_may_be_set_later_and_by_load(tmp_path: Path) -> None:
    teacher = a_teacher(A2C, SPACES["discrete"])
    model = make(vec(an_env(SPACES["discrete"])))
    model.save(tmp_path / "model")
    model.behavior_policy = teacher
    env = vec(an_env(SPACES["discrete"]))
    for one in (model, OffPolicyPG.load(tmp_path / "model", env=env, behavior_policy=teacher)):
        obs, actions, stored = rows(one.learn(20))
        assert stored == pytest.approx(log_prob(teacher.policy, obs, actions), rel=1e-5, abs=1e-5)
        one.save(tmp_path / "again")
    with pytest.raises(TypeError, match="behavior_policy must be"):
        OffPolicyPG.load(tmp_path / "model", env=env, behavior_policy=sb3s(DQN, SPACES["discrete"], buffer_size=10))


def test_the_example_in_the_docstring_runs() -> None:
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(OffPolicyPG) if test.examples)
    assert "behavior_policy" in (example.docstring or "")
    results = doctest.DocTestRunner(verbose=False).run(example)
    assert results.attempted >= 5
    assert results.failed == 0
