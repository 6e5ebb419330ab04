"""rl_zoo3's training run as ``sb3-pg train`` makes it."""

import inspect
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import gymnasium as gym
import numpy as np
import rl_zoo3.train
import torch as th
import yaml  # type: ignore[import-untyped]
from gymnasium import spaces
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_wrapper_class
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg.algorithms.off_policy import ReplayingAlgorithm
from sb3_pg.algorithms.on_policy import PolicyGradientAlgorithm
from sb3_pg.zoo.options import VECTOR_BACKENDS, TrainParser
from sb3_pg.zoo.registry import ALGORITHMS, config_path
from sb3_pg.zoo.spaces import fit_to_observations
from sb3_pg.zoo.vec_env import from_functions, refuse_late_resets

N_EVALUATIONS: Final = 20
"""Evaluations in a run, after the one of the untrained policy, unless ``--eval-freq`` says otherwise."""
_LEAST_EVAL_FREQ: Final = 1000


@contextmanager
def own_experiments() -> Iterator[None]:
    """Within it, ``rl_zoo3.train`` reads :class:`TrainParser`'s command line and runs an :class:`Experiment`."""
    script: Any = rl_zoo3.train
    before = script.argparse, script.ExperimentManager
    script.argparse, script.ExperimentManager = SimpleNamespace(ArgumentParser=TrainParser), Experiment
    try:
        yield
    finally:
        script.argparse, script.ExperimentManager = before


class Experiment(ExperimentManager):
    """A run of ``sb3-pg train``; arguments are ``ExperimentManager``'s.

    It differs from rl_zoo3's in this:

    - The ``default:`` block of our algorithms is fitted to the observation space, by
      :func:`~sb3_pg.zoo.spaces.fit_to_observations`.
    - Training envs may be those of :func:`~sb3_pg.envs.make_vec_env`.
    - The policy is evaluated before the first step too. Evaluations change nothing in training.
    - A run that continues another one continues its count of steps.
    - Our algorithms log about every 500 steps of each env.
    """

    # These two of rl_zoo3.train's arguments may be None: their values follow from others.
    eval_freq: Any
    n_eval_envs: Any
    vec_env_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._backend = kwargs.get("vec_env_type")
        if self._backend in VECTOR_BACKENDS:
            kwargs["vec_env_type"] = "dummy"  # of the evaluation
        else:
            self._backend = None
        super().__init__(*args, **kwargs)

    # ---------------------------------------------------------------- hyperparameters

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As rl_zoo3's; what a ``default:`` block leaves to the observation space is filled in.

        :raises ValueError: the configuration has nothing for this environment, or no policy takes its observations
        """
        is_default = self._takes_our_default()
        hyperparams, saved = super().read_hyperparameters()
        if is_default:
            space = self._observation_space(hyperparams)
            fitted = fit_to_observations(space, hyperparams, self._buffer_size())
            fitted = {name: value for name, value in fitted.items() if name not in (self.custom_hyperparams or {})}
            if fitted:
                print(f"For {space}: {fitted}")
                hyperparams.update(fitted)
                saved = type(saved)((name, hyperparams[name]) for name in sorted(hyperparams))
        return hyperparams, saved

    def _takes_our_default(self) -> bool:
        if self.algo not in ALGORITHMS or self.config != str(config_path(self.algo)):
            return False
        blocks = yaml.safe_load(Path(self.config).read_text())
        if self._is_atari and "atari" not in blocks:
            self._is_atari = False  # rl_zoo3 looks for this block and for no other
        return self.env_name.gym_id not in blocks and not self._is_atari

    def _observation_space(self, hyperparams: dict[str, Any]) -> spaces.Space[Any]:
        wrap = get_wrapper_class(hyperparams)
        kwargs = self.env_kwargs or hyperparams.get("env_kwargs", {})
        env = gym.spec(self.env_name.gym_id).make(**kwargs)
        try:
            return (env if wrap is None else wrap(env)).observation_space
        finally:
            env.close()

    def _buffer_size(self) -> int | None:
        """Transitions that the algorithm's replay buffer has room for by default, None if it keeps none."""
        for cls in ALGORITHMS[self.algo].__mro__:  # the first that lists it; others pass it on
            argument = inspect.signature(cls).parameters.get("buffer_size")
            if argument is not None:
                return int(argument.default)
        return None

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        n_envs = hyperparams.get("n_envs", 1)
        if not isinstance(n_envs, int) or n_envs < 1:
            raise ValueError(f"n_envs must be an integer of at least 1, got {n_envs!r}")
        result = super()._preprocess_hyperparams(hyperparams)
        if self.eval_freq is None:
            self.eval_freq = max(_LEAST_EVAL_FREQ, self.n_timesteps // N_EVALUATIONS)
        if self.n_eval_envs is None:
            self.n_eval_envs = max(1, min(self.n_eval_episodes, self.n_envs))
        # What is saved with the run says what was used.
        self.args.eval_freq, self.args.n_eval_envs = self.eval_freq, self.n_eval_envs
        return result

    # ---------------------------------------------------------------- envs, callbacks

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """As rl_zoo3's; training envs are those of ``--vec-env``.

        :raises ValueError: the algorithm, or something around the envs, does not go together with them
        """
        if self._backend is None:
            return super().create_envs(n_envs, eval_env, no_log)
        # Evaluation envs must reset at once.
        self.vec_env_class = DummyVecEnv if eval_env else partial(from_functions, self._backend)
        env = super().create_envs(n_envs, eval_env, no_log)
        ours = issubclass(ALGOS[self.algo], (PolicyGradientAlgorithm, ReplayingAlgorithm))
        refuse_late_resets(env, self._backend, None if ours else self.algo)
        return env

    def create_callbacks(self) -> None:
        """As rl_zoo3's; the policy is evaluated before the first step too."""
        eval_freq, self.eval_freq = self.eval_freq, -1
        super().create_callbacks()  # type: ignore[no-untyped-call]
        if eval_freq > 0 and not self.optimize_hyperparameters:
            self.eval_freq = max(eval_freq // self.n_envs, 1)
            if self.verbose > 0:
                print("Creating test environment")
            self.callbacks.append(
                Evaluation(
                    self.create_envs(self.n_eval_envs, eval_env=True),
                    callback_on_new_best=SaveVecNormalizeCallback(save_freq=1, save_path=self.params_path),
                    best_model_save_path=self.save_path,
                    n_eval_episodes=self.n_eval_episodes,
                    log_path=self.save_path,
                    eval_freq=self.eval_freq,
                    deterministic=self.deterministic_eval,
                )
            )

    # ---------------------------------------------------------------- searching

    def hyperparameters_optimization(self) -> None:
        """As rl_zoo3's; the folder of a run that it has made remains only if something is in it."""
        super().hyperparameters_optimization()
        self.remove_if_unused()

    def remove_if_unused(self) -> None:
        """Remove the run's folder, which ``enjoy`` would take for the latest run, if nothing was trained.

        Nothing is removed but what rl_zoo3 writes before the first episode ends.
        """
        run = Path(self.save_path)
        if all(_is_unused(path) for path in run.rglob("*") if path.is_file()):
            shutil.rmtree(run, ignore_errors=True)

    # ---------------------------------------------------------------- learning

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        try:
            model = super()._load_pretrained_agent(hyperparams, env)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.trained_agent} cannot be continued with --algo {self.algo} --env {self.env_name.gym_id} and "
                f"these hyperparameters: {error}"
            ) from error
        before, after = model.num_timesteps, model.num_timesteps + self.n_timesteps
        self.args.num_timesteps_before = before
        print(
            f"Continuing at {before:,} env steps, for {self.n_timesteps:,} more. Schedules (lin_...) are those of one "
            f"run of {after:,} steps: {before / after:.0%} of it is done."
        )
        return model

    def learn(self, model: BaseAlgorithm) -> None:
        """As rl_zoo3's; a run that continues another one continues its count of steps.

        :param model: as :meth:`setup_experiment` returns it
        """
        if self.algo == "ars":  # rl_zoo3 gives it more arguments
            super().learn(model)
            return
        kwargs: dict[str, Any] = {"reset_num_timesteps": not self.continue_training}
        if self.log_interval > -1:
            kwargs["log_interval"] = self.log_interval
        elif self.log_interval < -1:
            kwargs["log_interval"] = None
        elif self.algo in ALGORITHMS:
            kwargs["log_interval"] = "auto"
        try:
            with _refilled_buffer(model) if self.continue_training else nullcontext():
                model.learn(self.n_timesteps, callback=self.callbacks or None, **kwargs)
        except KeyboardInterrupt:
            pass  # what was learned is saved
        finally:
            if self.callbacks and self.callbacks[0].locals:  # training has begun
                self.callbacks[0].on_training_end()  # removes the progress bar
            assert model.env is not None
            with suppress(EOFError):  # the interrupt has ended worker processes too
                model.env.close()


def _is_unused(path: Path) -> bool:
    if path.name.endswith(".monitor.csv"):
        return path.stat().st_size < 10_000 and len(path.read_bytes().splitlines()) <= 2  # a header of two lines
    return path.name in ("args.yml", "config.yml", "command.txt")


class Evaluation(EvalCallback):
    """SB3's, before the first step too. Training is the same with it and without, and its log has its own numbers."""

    def _init_callback(self) -> None:
        with warnings.catch_warnings():  # training envs may be those of another backend
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
            super()._init_callback()

    def _on_training_start(self) -> None:
        self._on_step()  # n_calls is 0, a multiple of every eval_freq

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq:
            return True
        log: Any = self.logger
        tables = log.name_to_value, log.name_to_count, log.name_to_excluded
        kept = [dict(table) for table in tables]
        for table in tables:
            table.clear()
        with _unchanged_random_state(self.model.device):
            goes_on = super()._on_step()
        for table, values in zip(tables, kept, strict=True):
            table.update(values)  # of training, which logs them itself
        return goes_on


@contextmanager
def _unchanged_random_state(device: th.device) -> Iterator[None]:
    """Within it, drawing random numbers changes nothing afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generator that SB3 seeds)
    with th.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _refilled_buffer(model: Any) -> Iterator[None]:
    """Within it, an empty replay buffer is filled for ``learning_starts`` steps, as at first, before it is used."""
    buffer = getattr(model, "replay_buffer", None)
    if buffer is None or buffer.size() or not model.learning_starts:
        yield
        return
    first = model.learning_starts
    print(f"The replay buffer was not saved with the agent: {first:,} steps fill it before the first update.")
    model.learning_starts += model.num_timesteps
    try:
        yield
    finally:
        model.learning_starts = first
