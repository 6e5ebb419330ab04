"""Make the zips beside this file: models that old releases of SB3 and sb3-contrib saved, with default settings.

Install a release into a folder, with the Gymnasium and NumPy of its time, and run the script with that folder first on
the path::

    pip install --no-deps --target old/2.0.0 stable-baselines3==2.0.0 sb3-contrib==2.0.0 gymnasium==0.28.1 numpy==1.26.4
    PYTHONPATH=old/2.0.0 python make.py FOLDER

NumPy is 1.26.4 up to release 2.4 of SB3, and Gymnasium 0.28.1 for 2.0, 0.29.1 for 2.1 to 2.3, 1.0.0 for 2.4 and 2.5,
1.1.1 for 2.6, and 1.2.1 from 2.7 on. The networks are small, and the rest are default settings; half of the models have
a seed, which puts a random generator into their spaces.
"""

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from sb3_contrib import TRPO
from stable_baselines3 import A2C

#: File name's beginning -> class, env, arguments.
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "a2c": (A2C, "CartPole-v1", {}),
    "a2c_seeded": (A2C, "Pendulum-v1", {"seed": 0, "use_sde": True}),
    "trpo": (TRPO, "CartPole-v1", {"n_steps": 128, "seed": 0}),
    "trpo_box": (TRPO, "Pendulum-v1", {"n_steps": 128}),
}


def make(name: str, folder: Path) -> None:
    """Train and save one model, with some of its predictions."""
    cls, env_id, arguments = CASES[name]
    th.manual_seed(0)
    model = cls("MlpPolicy", env_id, device="cpu", policy_kwargs={"net_arch": [4]}, **arguments)
    model.learn(130)
    held = io.BytesIO()
    model.save(held)
    observations = [gym.make(env_id).observation_space.sample() for _ in range(4)]
    actions = [model.predict(observation, deterministic=True)[0] for observation in observations]
    expected = {"observations": observations, "actions": actions, "steps": model.num_timesteps}
    target = folder / f"{name}-{stable_baselines3.__version__}.zip"
    with zipfile.ZipFile(held) as saved, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in saved.namelist():
            if part != "system_info.txt":
                packed.writestr(part, saved.read(part))
    table = folder / "expected.json"
    known = json.loads(table.read_text()) if table.exists() else {}
    known |= {target.stem: expected}
    table.write_text(json.dumps(dict(sorted(known.items())), default=np.ndarray.tolist, indent=0) + "\n")


def main() -> None:
    """Make all zips of the installed release."""
    th.set_num_threads(1)
    for name in CASES:
        make(name, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
