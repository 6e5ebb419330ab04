"""One training run on rl_zoo3's own path (its ExperimentManager, our algorithms registered), with our evaluations.

Heavy imports live here and not in ``learning.py``: a worker sets its thread limits before it imports this module.
"""

import argparse
import contextlib
import importlib
import io
import math
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from learning_spec import Run
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked_policy
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization

import sb3_pg.zoo  # noqa: F401  (registers the algorithms and their configurations)
from sb3_pg.envs import ActorVecEnv, with_action_masks

with contextlib.suppress(ImportError):  # the extra memory-envs
    importlib.import_module("popgym")  # registers its envs
ALGOS["maskable_ppo"] = MaskablePPO  # not in rl_zoo3; its configurations are in masked_peer.yml

# Training env i is seeded with seed + i. These offsets keep the evaluation episodes away from the training episodes,
# the final ones away from those that picked the best evaluation, and those of different seeds away from each other.
EVALUATION_SEED = 1_000_000_000
FINAL_SEED = 2_000_000_000
MAX_EVALUATION_ENVS = 10

# (env steps, mean return, standard deviation over episodes, training seconds so far)
Point = tuple[int, float, float, float]


def make_manager(
    algo: str, env: str, seed: int, steps: int, hyperparams: dict[str, Any], config: str | None, log_folder: str
) -> ExperimentManager:
    """rl_zoo3's manager without its EvalCallback.

    That one counts calls (of n_envs steps), so that its evaluations drift from the 5 % marks, and seeds the evaluation
    env like the training env.
    """
    arguments = argparse.Namespace(algo=algo, env=env, seed=seed, n_timesteps=steps)
    return ExperimentManager(
        arguments,
        algo,
        env,
        log_folder,
        n_timesteps=steps,
        eval_freq=-1,
        hyperparams=deepcopy(hyperparams),
        seed=seed,
        log_interval=-1,
        verbose=0,
        device="cpu",
        config=config,
    )


def resolve_hyperparams(algo: str, env: str, hyperparams: dict[str, Any], config: str | None) -> dict[str, Any]:
    """The hyperparameters that a run will use: those of the YAML file, with ``hyperparams`` on top."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        manager = make_manager(algo, env, 0, 0, hyperparams, config, folder)
        return dict(manager.read_hyperparameters()[1])


def evaluate(model: BaseAlgorithm, env: VecEnv, n_episodes: int, deterministic: bool) -> tuple[float, float]:
    """Mean and standard deviation of the unnormalized return under the training env's present statistics."""
    training_env = model.get_env()
    if model.get_vec_normalize_env() is not None and training_env is not None:
        sync_envs_normalization(training_env, env)
    evaluation: Any = evaluate_masked_policy if isinstance(model, MaskablePPO) else evaluate_policy
    returns, _ = evaluation(
        model, env, n_eval_episodes=n_episodes, deterministic=deterministic, return_episode_rewards=True
    )
    return float(np.mean(returns)), float(np.std(returns))


class Evaluations(BaseCallback):
    """Evaluate at the first step at or past each k/n of the budget, whatever the number of envs.

    :param env: evaluation env, seeded already
    :param budget: env steps of the whole run
    :param n_evaluations: n; the last one comes at the whole budget, before the update that may follow
    :param report: called with every new point
    """

    def __init__(
        self,
        env: VecEnv,
        budget: int,
        n_evaluations: int,
        n_episodes: int,
        deterministic: bool,
        report: Callable[[Point], None],
    ) -> None:
        super().__init__()
        self.env = env
        self.n_episodes = n_episodes
        self.deterministic = deterministic
        self.report = report
        self.due = [math.ceil(budget * k / n_evaluations) for k in range(n_evaluations, 0, -1)]
        self.points: list[Point] = []
        self.seconds = 0.0  # spent here, to be taken off the training time
        self.start = 0.0

    def _on_training_start(self) -> None:
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        if not self.due or self.num_timesteps < self.due[-1]:
            return True
        while self.due and self.num_timesteps >= self.due[-1]:
            self.due.pop()
        before = time.perf_counter()
        mean, std = evaluate(self.model, self.env, self.n_episodes, self.deterministic)
        training_seconds = before - self.start - self.seconds
        self.seconds += time.perf_counter() - before
        self.points.append((self.num_timesteps, mean, std, training_seconds))
        self.report(self.points[-1])
        return True


def evaluation_env(manager: ExperimentManager, n_episodes: int, seed: int, masks: bool = False) -> VecEnv:
    """rl_zoo3's evaluation env (own VecNormalize, frozen, rewards as they are), seeded anew; with action masks or not.

    Several envs share the cost of a forward pass; ``evaluate_policy`` fixes each one's number of episodes beforehand,
    so that short episodes count no more than long ones.
    """
    env = manager.create_envs(min(n_episodes, MAX_EVALUATION_ENVS), eval_env=True)
    env.seed(seed)
    return with_action_masks(env, use=True) if masks else env


def train(run: Run, report: Callable[[Point], None]) -> tuple[dict[str, Any], list[Point]]:
    """Train and evaluate once.

    :return: the measured columns of ``learning.csv``, and the evaluations
    :raises RuntimeError: training ended before its budget (a callback of the configuration, an interrupt)
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    # rl_zoo3 prints its configuration whatever its verbosity
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        set_random_seed(run.seed)
        manager = make_manager(run.algo, run.env, run.seed, run.steps, run.hyperparams, run.config, folder)
        envs: Any = partial(ActorVecEnv, n_actors=run.n_actors) if run.n_actors else DummyVecEnv
        manager.vec_env_class = envs
        experiment = manager.setup_experiment()
        manager.vec_env_class = DummyVecEnv  # for evaluations
        assert experiment is not None
        model = experiment[0]
        masks = getattr(model, "uses_masks", False)
        deterministic = manager.deterministic_eval  # rl_zoo3's rule: everywhere but on Atari and MiniGrid
        evaluations = Evaluations(
            evaluation_env(manager, run.evaluation_episodes, EVALUATION_SEED + 1000 * run.seed, masks),
            run.steps,
            run.evaluations,
            run.evaluation_episodes,
            deterministic,
            report,
        )
        manager.callbacks.append(evaluations)
        start = time.perf_counter()
        manager.learn(model)
        train_seconds = time.perf_counter() - start - evaluations.seconds
        if model.num_timesteps < run.steps:
            raise RuntimeError(f"training ended at step {model.num_timesteps} of {run.steps}")
        final_env = evaluation_env(manager, run.final_episodes, FINAL_SEED + 1000 * run.seed, masks)
        final_mean, final_std = evaluate(model, final_env, run.final_episodes, deterministic)
        evaluations.env.close()
        final_env.close()
    best = max(evaluations.points, key=lambda point: point[1])
    measured = {
        "timesteps": model.num_timesteps,
        "n_envs": manager.n_envs,
        "final_mean": round(final_mean, 4),
        "final_std": round(final_std, 4),
        "best_eval_mean": round(best[1], 4),
        "best_eval_step": best[0],
        "wall_seconds": round(time.perf_counter() - begin, 2),
        "steps_per_second": round(model.num_timesteps / train_seconds),
    }
    return measured, evaluations.points
