"""What old releases of SB3 and sb3-contrib have saved loads untrusted: see ``sb3_releases/make.py``."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import TRPO, ActorCritic

FOLDER = Path(__file__).parent / "sb3_releases"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())

pytestmark = pytest.mark.filterwarnings("ignore:.*sb3_contrib.*:UserWarning", "ignore:target_kl:UserWarning")


def load(name: str, **kwargs: Any) -> Any:
    cls: Any = TRPO if name.startswith("trpo") else ActorCritic
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Could not deserialize")
        return cls.load(FOLDER / f"{name}.zip", device="cpu", **kwargs)


def test_each_release_has_its_zips() -> None:
    assert {path.stem for path in FOLDER.glob("*.zip")} == set(EXPECTED)
    assert {name.rpartition("-")[2].rpartition(".")[0] for name in EXPECTED} == {f"2.{minor}" for minor in range(10)}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_zip_predicts_as_it_did(name: str) -> None:
    model = load(name)
    assert model.num_timesteps == EXPECTED[name]["steps"]
    for given, action in zip(EXPECTED[name]["observations"], EXPECTED[name]["actions"], strict=True):
        predicted, _ = model.predict(np.array(given, np.float32), deterministic=True)
        np.testing.assert_allclose(predicted, action, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith(("2.0.0", "2.9.0"))])
def test_a_zip_goes_on_training(name: str, tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1" if "box" in name or "seeded" in name else "CartPole-v1")
    # Bounds of CartPole's observations have changed since.
    model = load(name, env=env, custom_objects={"observation_space": env.observation_space})
    updates = model._n_updates
    model.learn(130, reset_num_timesteps=False)
    assert model._n_updates > updates
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model", device="cpu")
    assert again.num_timesteps == model.num_timesteps >= EXPECTED[name]["steps"] + 130
