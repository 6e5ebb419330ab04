"""One run that can be interrupted at any moment and started again: the worker of resume.py and of the tests.

    python benchmarks/resume_run.py TRPO Hopper-v5 dummy /tmp/run

Run again with the same arguments, it goes on from the newest checkpoint. At the end it writes ``digest.json``: digests
of the weights, of the optimizers' state, of the monitor files' rows, of everything that was logged but for wall-clock
times, and of the evaluations.
"""

import argparse
import csv
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

import sb3_pg
from sb3_pg.checkpoints import ResumeCallback, latest_checkpoint
from sb3_pg.envs import make_vec_env

N_ENVS: Final = 2
#: Arguments with which every class updates several times within ``STEPS`` steps.
ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "Reinforce": {"baseline": "value", "n_steps": 128},
    "ActorCritic": {"n_steps": 16},
    "NPG": {"n_steps": 128, "batch_size": 128},
    "TRPO": {"n_steps": 128, "batch_size": 128},
    "KLPenaltyPG": {"n_steps": 128, "batch_size": 128},
    "OffPolicyPG": {"train_freq": (128, "step"), "gradient_steps": 2},
    "OffPAC": {"learning_starts": 200, "buffer_size": 1000, "train_freq": 4, "batch_size": 32},
}
STEPS: Final = 1536
WALL_CLOCK: Final = re.compile("time/|seconds|fps")


class _StoppedError(Exception):
    """The run is cut."""


class _Stop(BaseCallback):
    """Cuts the run at a number of env steps, within a rollout."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            raise _StoppedError
        return True


class _Phase(BaseCallback):
    """Writes what the process is doing into a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_rollout_start(self) -> None:
        self.path.write_text("collecting")

    def _on_rollout_end(self) -> None:
        self.path.write_text("updating")

    def _on_step(self) -> bool:
        return True


def make_model(name: str, env_id: str, backend: str, folder: Path) -> Any:
    """Return a new model, or the one of the newest checkpoint, with VecNormalize around continuous observations."""
    cls = getattr(sb3_pg, name)
    quick = {"start_method": "fork"} if backend == "subproc" else None  # other processes would import torch anew
    monitors = str(folder / "monitor")
    env: Any = make_vec_env(env_id, N_ENVS, backend, seed=1, backend_kwargs=quick, monitor_dir=monitors)
    if env_id != "CartPole-v1":
        env = VecNormalize(env, gamma=0.99)
    if latest_checkpoint(folder / "checkpoints"):
        return cls.resume(folder / "checkpoints", env, device="cpu")
    return cls("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [16]}, **ARGUMENTS[name])


def run(name: str, env_id: str, backend: str, folder: Path, every: int, steps: int, stop_at: int | None) -> None:
    """Train, and write the digests."""
    model = make_model(name, env_id, backend, folder)
    model.set_logger(configure(str(folder / "log"), ["csv", "json", "log"]))
    eval_env: Any = make_vec_env(env_id, 1, "dummy", seed=2)
    if env_id != "CartPole-v1":
        eval_env = VecNormalize(eval_env, training=False, norm_reward=False)
    evaluation = EvalCallback(eval_env, n_eval_episodes=1, eval_freq=200, verbose=0, log_path=str(folder))
    saving = ResumeCallback(folder / "checkpoints", every=every)
    (folder / "resumed_at").write_text(str(model.num_timesteps))
    callbacks = [saving, evaluation, _Phase(folder / "phase"), *([] if stop_at is None else [_Stop(stop_at)])]
    try:
        model.learn(steps, callbacks)
    except _StoppedError:
        return
    finally:
        model.env.close()
    (folder / "digest.json").write_text(json.dumps(digests(model, evaluation, folder), indent=1))


def digests(model: Any, evaluation: EvalCallback, folder: Path) -> dict[str, str]:
    """Return digests of all that an interruption must not change."""
    monitors = {path.name: path.read_text().splitlines() for path in sorted((folder / "monitor").glob("*monitor.csv"))}
    rows = {name: [line.rpartition(",")[0] for line in lines[1:]] for name, lines in monitors.items()}
    with (folder / "log" / "progress.csv").open() as file:
        logged = [{k: v for k, v in sorted(row.items()) if not WALL_CLOCK.search(k)} for row in csv.DictReader(file)]
    lines = (folder / "log" / "progress.json").read_text().splitlines()
    as_json = [{k: v for k, v in sorted(json.loads(row).items()) if not WALL_CLOCK.search(k)} for row in lines]
    parameters = model.get_parameters()
    parts = {
        "weights": parameters.pop("policy"),
        "optimizers": parameters,
        "counters": [model.num_timesteps, model._n_updates],
        "monitor": rows,
        "logged": [logged, as_json],
        "evaluations": [evaluation.evaluations_timesteps, evaluation.evaluations_results],
        "best": str(evaluation.best_mean_reward),
        "normalization": [model.get_vec_normalize_env().obs_rms.mean] if model.get_vec_normalize_env() else [],
    }
    return {part: hashlib.sha256(repr(_plain(value)).encode()).hexdigest()[:16] for part, value in parts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, th.Tensor):
        return value.detach().cpu().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def is_possible(name: str, env_id: str, backend: str) -> bool:
    """Return whether an algorithm takes these envs: OffPAC does not take CartPole's own vector env."""
    return (name, env_id, backend) != ("OffPAC", "CartPole-v1", "vector")


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", help="names of algorithms, with commas between")
    parser.add_argument("env_ids", help="names of envs, with commas between")
    parser.add_argument("backend", choices=("dummy", "subproc", "vector"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=256, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="env steps (default: %(default)s)")
    parser.add_argument("--stop-at", type=int, help="cut the run at this number of steps, within a rollout")
    args = parser.parse_args()
    th.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)
    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # fork, on Python 3.12 and later
    warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
    for name in args.names.split(","):
        for env_id in args.env_ids.split(","):
            if not is_possible(name, env_id, args.backend):
                continue
            folder = args.folder / f"{name}-{env_id}"
            folder.mkdir(parents=True, exist_ok=True)
            run(name, env_id, args.backend, folder, args.every, args.steps, args.stop_at)


if __name__ == "__main__":
    main()
