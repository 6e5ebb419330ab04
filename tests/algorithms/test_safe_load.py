"""``load`` runs nothing that a file names, and ``save``, ``load`` and the replay buffers lose nothing."""

import io
import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import ActorCritic, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.checkpoints.model_file import MANIFEST
from sb3_pg.errors import DamagedFileError, UntrustedFileError
from tests.algorithms.every_algorithm import ALGORITHMS

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu"}


class OwnPolicy(ActorCriticPolicy):
    """A policy of the user, which can be imported."""


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pickled_in(path: Path) -> list[str]:
    found: list[str] = json.loads(entries(path)[MANIFEST])["pickled"]
    fields = json.loads(entries(path)["data"])
    assert found == [name for name, value in fields.items() if isinstance(value, dict) and ":serialized:" in value]
    return found


def an_off_pac(env: Any) -> OffPAC:
    return OffPAC("MlpPolicy", env, learning_starts=5, buffer_size=50, **SMALL)


@pytest.mark.parametrize("make", [*ALGORITHMS.values(), an_off_pac], ids=[*ALGORITHMS, "off-pac"])
def test_a_saved_model_holds_no_pickle(make: Any, tmp_path: Path) -> None:
    path, model = tmp_path / "model.zip", make("CartPole-v1")
    model.set_random_seed(0)
    model.learn(30).save(path)
    assert pickled_in(path) == []
    names = {"data", "policy.pth", "pytorch_variables.pth", "_stable_baselines3_version", "system_info.txt", MANIFEST}
    assert names <= entries(path).keys()
    assert b"serialized" not in entries(path)["data"]
    assert type(model).load(path, device="cpu").num_timesteps >= 30


def test_a_lambda_is_a_pickle_that_only_a_trusted_file_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    ActorCritic("MlpPolicy", "CartPole-v1", learning_rate=lambda left: 0.5 * left, **SMALL).save(path)
    assert pickled_in(path) == ["learning_rate"]
    with pytest.raises(UntrustedFileError, match=r"field 'learning_rate' of .*model\.zip holds code .*trusted=True"):
        ActorCritic.load(path)
    assert ActorCritic.load(path, trusted=True).lr_schedule(0.5) == 0.25
    for given in ({"custom_objects": {"learning_rate": 0.1}}, {"learning_rate": 0.1}):
        assert ActorCritic.load(path, **given).lr_schedule(0.5) == 0.1


def test_a_policy_class_of_the_user_is_stored_by_its_import_path(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    ActorCritic(OwnPolicy, "CartPole-v1", **SMALL).save(path)
    assert pickled_in(path) == []
    with pytest.raises(UntrustedFileError, match=r"field 'policy_class' of .*OwnPolicy.*allow=\[OwnPolicy\]"):
        ActorCritic.load(path)
    for given in ({"trusted": True}, {"allow": [OwnPolicy]}, {"custom_objects": {"policy_class": OwnPolicy}}):
        assert type(ActorCritic.load(path, **given).policy) is OwnPolicy


def test_a_class_that_cannot_be_imported_may_be_named_too(tmp_path: Path) -> None:
    class Local(ActorCriticPolicy):
        pass

    path = tmp_path / "model.zip"
    ActorCritic(Local, "CartPole-v1", **SMALL).save(path)
    assert pickled_in(path) == ["policy_class"]
    with pytest.raises(UntrustedFileError, match="field 'policy_class'"):
        ActorCritic.load(path)
    assert type(ActorCritic.load(path, allow=[Local]).policy) is Local
    assert type(ActorCritic.load(path, trusted=True).policy).__name__ == "Local"


def test_open_files_get_all_bytes_at_once(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        n_writes = 0

        def write(self, data: Any) -> int:
            self.n_writes += 1
            return super().write(data)

    model = OffPAC("MlpPolicy", "CartPole-v1", buffer_size=50, learning_starts=5, **SMALL).learn(10)
    for save in (model.save, model.save_replay_buffer):
        file = Counting()
        save(file)
        assert file.n_writes == 1
    with (tmp_path / "model").open("wb") as opened:
        model.save(opened)
    with (tmp_path / "model").open("rb") as saved:
        assert OffPAC.load(saved, device="cpu").num_timesteps == 10


# -------------------------------------------------------------------- random generators


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("with_env", [False, True])
def test_load_leaves_random_generators_as_they_were(with_env: bool, tmp_path: Path) -> None:
    env: Any = make_vec_env("Pendulum-v1") if with_env else None
    model = ActorCritic("MlpPolicy", "Pendulum-v1", seed=0, use_sde=True, **SMALL).learn(10)
    model.save(tmp_path / "model")
    drawn = model.action_space.sample()
    before = states()
    loaded = ActorCritic.load(tmp_path / "model", env=env, device="cpu")
    assert states() == before
    assert loaded.seed == 0
    np.testing.assert_array_equal(loaded.action_space.sample(), drawn)  # goes on where it was
    ActorCritic.load(tmp_path / "model", env=env, device="cpu", seed=0)
    first = states()
    assert first != before
    ActorCritic.load(tmp_path / "model", env=env, device="cpu", seed=0)
    assert states() == first


# -------------------------------------------------------------------- replay buffers


def off_pac(env: Any = "CartPole-v1", **arguments: Any) -> OffPAC:
    return OffPAC("MlpPolicy", env, learning_starts=5, **{"buffer_size": 50, **SMALL, **arguments}).learn(10)


def assert_kept(model: Any, path: Path, error: type[Exception], match: str) -> None:
    before = model.replay_buffer
    with pytest.raises(error, match=match):
        model.load_replay_buffer(path)
    assert model.replay_buffer is before
    model.learn(10, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: off_pac("Pendulum-v1"), "observation_space="),
        (lambda: off_pac("Acrobot-v1"), "observation_space="),
        (lambda: off_pac(make_vec_env("CartPole-v1", 2)), "n_envs=1"),
        (lambda: OffPolicyPG("MlpPolicy", "CartPole-v1", **SMALL).learn(10), "must hold a BehaviorReplayBuffer"),
    ],
)
def test_a_buffer_of_another_env_is_refused(other: Any, match: str, tmp_path: Path) -> None:
    other().save_replay_buffer(tmp_path / "buffer")
    assert_kept(off_pac(), tmp_path / "buffer", ValueError, rf"buffer.* {match}")


def test_a_buffer_of_another_action_space_is_refused(tmp_path: Path) -> None:
    class Three(gym.ActionWrapper[Any, Any, Any]):
        def __init__(self, env: gym.Env[Any, Any]) -> None:
            super().__init__(env)
            self.action_space = spaces.Discrete(3)

        def action(self, action: Any) -> Any:
            return action % 2

    off_pac(Three(gym.make("CartPole-v1"))).save_replay_buffer(tmp_path / "buffer")
    assert_kept(off_pac(), tmp_path / "buffer", ValueError, r"action_space=Discrete\(2\)")


def test_damaged_and_hostile_buffers_are_refused(tmp_path: Path) -> None:
    model, path = off_pac(), tmp_path / "buffer.pkl"
    model.save_replay_buffer(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert_kept(model, path, DamagedFileError, r"buffer\.pkl cannot be read")
    path.write_bytes(pickle.dumps([1]))
    assert_kept(model, path, DamagedFileError, "it is no ReplayBuffer, but list")
    path.write_bytes(b"cos\nsystem\n(Vtrue\ntR.")
    assert_kept(model, path, UntrustedFileError, r"buffer\.pkl holds os\.system")
    buffer: Any = pickle.loads(whole)
    for name, value in (("rewards", np.zeros((3, 1))), ("actions", np.zeros((50, 1, 2))), ("pos", 99), ("pos", "a")):
        right = getattr(buffer, name)
        setattr(buffer, name, value)
        path.write_bytes(pickle.dumps(buffer))
        setattr(buffer, name, right)
        assert_kept(model, path, DamagedFileError, f"buffer.pkl cannot be read: .*{name}")
    path.write_bytes(whole)
    model.load_replay_buffer(path)


class OwnBuffer(ReplayBuffer):
    """A buffer of the user."""


def test_buffer_classes_of_the_user_are_named(tmp_path: Path) -> None:
    model = off_pac(replay_buffer_class=OwnBuffer)
    model.save_replay_buffer(tmp_path / "buffer")
    assert_kept(model, tmp_path / "buffer", UntrustedFileError, r"allow=\[OwnBuffer\]")
    for given in ({"allow": [OwnBuffer]}, {"trusted": True}):
        model.load_replay_buffer(tmp_path / "buffer", **given)
        assert type(model.replay_buffer) is OwnBuffer


# -------------------------------------------------------------------- parameters


def test_parameters_that_do_not_fit_change_nothing() -> None:
    model = Reinforce("MlpPolicy", "CartPole-v1", **SMALL).learn(10)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    wrong: Any = model.get_parameters()
    wrong["policy"] = {name: value + 1 for name, value in wrong["policy"].items()}
    wrong["policy"]["value_net.bias"] = th.zeros(7)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.set_parameters(wrong)
    wrong["policy"]["value_net.bias"] = th.full((1,), th.nan)
    with pytest.raises(ValueError, match=r"policy\.value_net\.bias is nan"):
        model.set_parameters(wrong)
    assert all(value.equal(before[name]) for name, value in model.policy.state_dict().items())
