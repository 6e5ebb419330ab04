"""What the first house saved, the layout before the modules moved, loads: see ``first_house/make.py``."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeAwareObservation
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import sb3_pg
from sb3_pg.checkpoints import safe_pickle
from sb3_pg.checkpoints.renamed_modules import MODULES, NAMES, current_name
from sb3_pg.checkpoints.vetted import resolve

FOLDER = Path(__file__).parent / "first_house"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
WITH_BUFFER = sorted(path.stem for path in FOLDER.glob("*.pkl"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"),
    pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning"),  # the files are those of NumPy 1.26
]


def timed(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return TimeAwareObservation(env, flatten=False)


def make_env(name: str) -> VecEnv:
    env_id, *wrapper = EXPECTED[name]["env"].split()
    return make_vec_env(env_id, seed=0, wrapper_class=timed if wrapper else None)


def load(name: str, **kwargs: Any) -> Any:
    cls = getattr(sb3_pg, EXPECTED[name]["class"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Could not deserialize")
        return cls.load(FOLDER / f"{name}.zip", device="cpu", **kwargs)


def observation(given: Any) -> Any:
    """An observation as the env returns it, from the lists of ``expected.json``."""
    if isinstance(given, dict):
        return {key: np.array(value, np.int32 if key == "time" else np.float32) for key, value in given.items()}
    return np.array(given, np.float32)


def test_every_algorithm_has_a_zip() -> None:
    assert {path.stem for path in FOLDER.glob("*.zip")} == set(EXPECTED)
    algorithms = {"Reinforce", "ActorCritic", "NPG", "TRPO", "KLPenaltyPG", "OffPolicyPG", "OffPAC"}
    assert {case["class"] for case in EXPECTED.values()} == algorithms
    assert {EXPECTED[name]["class"] for name in WITH_BUFFER} == {"OffPolicyPG", "OffPAC"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_zip_predicts_as_it_did(name: str) -> None:
    model = load(name)
    assert model.num_timesteps == EXPECTED[name]["steps"]
    for given, action in zip(EXPECTED[name]["observations"], EXPECTED[name]["actions"], strict=True):
        predicted, _ = model.predict(observation(given), deterministic=True)
        np.testing.assert_allclose(predicted, action, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_zip_goes_on_training(name: str) -> None:
    model = load(name, env=make_env(name))
    if name in WITH_BUFFER:
        model.load_replay_buffer(FOLDER / f"{name}.pkl")
    updates, before = model._n_updates, model.policy.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps >= EXPECTED[name]["steps"] + 64
    assert model._n_updates > updates
    assert any(not value.equal(before[key]) for key, value in model.policy.state_dict().items())


@pytest.mark.parametrize("name", WITH_BUFFER)
def test_a_replay_buffer_is_as_it_was(name: str) -> None:
    model = load(name)
    model.load_replay_buffer(FOLDER / f"{name}.pkl")
    buffer = model.replay_buffer
    assert type(buffer) is model.replay_buffer_class
    assert isinstance(buffer, ReplayBuffer)
    assert buffer.size() == EXPECTED[name]["stored"] >= 40
    assert buffer.rewards[: buffer.size()].sum() == pytest.approx(EXPECTED[name]["stored_rewards"])


def test_arguments_are_as_they_were() -> None:
    assert type(load("reinforce_baseline_object").baseline) is sb3_pg.baselines.LinearBaseline
    assert load("reinforce_critic").rollout_buffer_class is sb3_pg.rollout.TrajectoryRolloutBuffer
    assert load("actor_critic_dict").rollout_buffer_class is sb3_pg.rollout.DictTrajectoryRolloutBuffer
    assert load("off_policy_pg_behavior").replay_buffer_class is sb3_pg.rollout.TrajectoryReplayBuffer
    assert load("off_pac_class").policy_class is sb3_pg.OffPAC.policy_aliases["MlpPolicy"]
    scaled = load("actor_critic_scaled_targets")
    assert scaled.normalize_value_targets
    assert scaled.value_scale > 1.5  # Pendulum's returns are far from 1
    teacher = load("off_policy_pg_behavior").behavior_policy
    assert teacher.optimizer.param_groups[0]["lr"] == pytest.approx(7e-4)  # A2C's


def test_policy_kwargs_of_a_zip_may_be_replaced() -> None:
    model = load("actor_critic", policy_kwargs={"net_arch": [8]})
    assert model.policy_kwargs["optimizer_class"].__name__ == "RMSprop"


# -------------------------------------------------------------------- the tables


def found(module: str, name: str) -> Any:
    return resolve(":".join(current_name(module, name)))


def test_every_entry_leads_somewhere() -> None:
    for module in MODULES.values():
        __import__(module)
    for old in NAMES:
        assert isinstance(found(*old.split(":")), type)


def test_a_class_may_leave_a_module_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NAMES, "sb3_pg.rollout.buffers:FormerBuffer", "sb3_pg.rollout:TrajectoryRolloutBuffer")
    monkeypatch.setitem(NAMES, "sb3_pg.rollout.replay:Renamed", "sb3_pg.rollout:TrajectoryReplayBuffer")
    monkeypatch.setitem(NAMES, "sb3_pg.no.more:Former", "sb3_pg.baselines:LinearBaseline")
    kept = found("sb3_pg.rollout.buffers", "TrajectoryRolloutBuffer")
    assert found("sb3_pg.rollout.buffers", "FormerBuffer") is kept is sb3_pg.rollout.TrajectoryRolloutBuffer
    assert found("sb3_pg.rollout.replay", "Renamed") is sb3_pg.rollout.TrajectoryReplayBuffer
    assert found("sb3_pg.no.more", "Former") is sb3_pg.baselines.LinearBaseline
    with pytest.raises(ModuleNotFoundError, match="No module"):
        found("sb3_pg.no.more", "Other")
    assert not hasattr(sb3_pg.rollout.buffers, "FormerBuffer")


@pytest.mark.parametrize("trusted", [False, True])
def test_pickles_find_classes_under_their_old_names(trusted: bool) -> None:
    old = b"csb3_pg.rollout.replay\nTrajectoryReplayBuffer\n."
    assert safe_pickle.loads(old, "old", trusted=trusted) is sb3_pg.rollout.TrajectoryReplayBuffer
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(old)
