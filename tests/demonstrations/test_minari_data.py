"""Demonstrations go to Minari and come back as they were, and Minari's own datasets are read."""

import importlib
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sb3_pg import Demonstrations
from sb3_pg.extras import MissingExtraError
from tests.demonstrations.test_data import arrays, require_same
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES
from tests.test_extras import hide

ID = "my/expert-v0"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def minari() -> Any:
    return pytest.importorskip("minari")


@pytest.mark.usefixtures("minari")
@pytest.mark.parametrize("space", OBSERVATION_SPACES)
def test_round_trip(space: str) -> None:
    demos = Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES[space], ACTION_SPACES["box"]))
    demos.to_minari(ID)
    require_same(Demonstrations.from_minari(ID), demos)


@pytest.mark.usefixtures("minari")
@pytest.mark.parametrize("space", ACTION_SPACES)
def test_round_trip_of_actions(space: str) -> None:
    demos = Demonstrations.from_arrays(**arrays(action_space=ACTION_SPACES[space]))
    demos.to_minari(ID, observation_space=OBSERVATION_SPACES["vector"], action_space=ACTION_SPACES[space])
    require_same(Demonstrations.from_minari(ID), demos)


def cart_pole() -> Demonstrations:
    observations = np.zeros((5, 4), np.float32)
    actions = np.array([0, 0, 0, 0, 0])
    return Demonstrations(observations, actions, np.ones(5), final_observations=np.full((1, 4), 0.1, np.float32))


def test_those_who_read_it_can_make_the_env(minari: Any) -> None:
    cart_pole().to_minari(ID, "CartPole-v1", author="me", algorithm_name="TRPO")
    dataset = minari.load_dataset(ID)
    env = dataset.recover_environment()
    assert env.spec.id == "CartPole-v1"
    assert dataset.action_space == env.action_space == spaces.Discrete(2)
    assert dataset.observation_space == env.observation_space
    assert dataset.storage.metadata["algorithm_name"] == "TRPO"


def test_spaces_follow_from_the_numbers_where_there_is_no_env(minari: Any) -> None:
    given = arrays(OBSERVATION_SPACES["image"]) | {"actions": np.array([-1, 0, 2, 0, 0, 0, 0, 0])}
    Demonstrations.from_arrays(**given).to_minari(ID)
    dataset = minari.load_dataset(ID)
    assert dataset.action_space == spaces.Discrete(4, start=-1)
    assert dataset.observation_space == OBSERVATION_SPACES["image"]


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_a_dataset_without_final_observations(minari: Any) -> None:
    buffer_of = importlib.import_module("minari.data_collector").EpisodeBuffer
    rows = np.arange(6.0).reshape(3, 2)
    flags = np.zeros(3, bool)
    given: dict[str, Any] = {"actions": rows, "rewards": np.ones(3), "terminations": flags, "truncations": flags}
    buffers = [buffer_of(observations=rows, **given) for _ in range(2)]
    space = spaces.Box(-1, 9, (2,), np.float64)
    minari.create_dataset_from_buffers(ID, buffers, observation_space=space, action_space=space)
    demos = Demonstrations.from_minari(ID)
    assert demos.episodes == [slice(0, 3), slice(3, 6)]
    assert demos.truncated.tolist() == [False, False, True] * 2
    assert demos.final_observations is None


@pytest.mark.usefixtures("minari")
def test_what_is_written_stays_and_what_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demos = cart_pole()
    demos.to_minari(ID)
    with pytest.raises(ValueError, match="dataset_id must be a new one, got 'my/expert-v0', which is in "):
        demos.subset(1).to_minari(ID)
    require_same(Demonstrations.from_minari(ID), demos)

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes", fail)
    with pytest.raises(OSError, match="the disk is full"):
        demos.to_minari("my/other-v0")
    assert not (folder / "my/other-v0").exists()


@pytest.mark.usefixtures("minari")
def test_what_is_refused(folder: Path) -> None:
    demos = cart_pole()
    with pytest.raises(ValueError, match="Malformed dataset ID: no version"):
        demos.to_minari("no version")
    with pytest.raises(ValueError, match=r"actions must have shape \(1,\) a row"):
        demos.to_minari(ID, "Pendulum-v1", observation_space=spaces.Box(-1, 1, (4,)))
    with pytest.raises(ValueError, match="rewards must be known"):
        Demonstrations(demos.observations, demos.actions).to_minari(ID)
    with pytest.raises(ValueError, match="final_observations must be known"):
        Demonstrations(demos.observations, demos.actions, demos.rewards).to_minari(ID)
    with pytest.raises(gym.error.NameNotFound):
        demos.to_minari(ID, "NoSuchEnv-v0")
    with pytest.raises(FileNotFoundError, match=r"my/expert-v0 not found locally"):
        Demonstrations.from_minari(ID)
    assert not folder.exists() or not list(folder.rglob("*.hdf5"))


def test_without_minari(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "minari", "h5py")
    for call in (lambda: Demonstrations.from_minari(ID), lambda: cart_pole().to_minari(ID)):
        with pytest.raises(MissingExtraError, match=r'minari is not installed: pip install "sb3_pg\[minari\]"'):
            call()
    with pytest.raises(MissingExtraError, match=r'h5py is not installed: pip install "sb3_pg\[minari\]"'):
        Demonstrations.load(tmp_path / "medium.hdf5")
