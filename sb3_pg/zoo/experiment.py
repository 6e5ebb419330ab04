"""The training run of ``sb3-pg train``, made from rl_zoo3's."""

import inspect
import io
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import gymnasium as gym
import yaml  # type: ignore[import-untyped]
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from rl_zoo3.callbacks import SaveVecNormalizeCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_class_by_name, get_wrapper_class
from stable_baselines3.common import utils
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import CSVOutputFormat
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    is_vecenv_wrapped,
)

from sb3_pg import compat
from sb3_pg.algorithms import ALGORITHMS, AsyncActorCritic
from sb3_pg.algorithms.async_actor_critic import is_asynchronous
from sb3_pg.algorithms.off_policy import OffPolicyShell
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.algorithms.pretraining import steps_for
from sb3_pg.checkpoints import ResumeCallback, latest_checkpoint, unchanged_random_state
from sb3_pg.demonstrations import DemonstrationLoss, Demonstrations, KLAnchor
from sb3_pg.envs import ActorVecEnv, GymVectorAdapter, has_native_vector, make_vec_env, subproc_vec_env
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner import Anchor
from sb3_pg.zoo.command_errors import CommandError
from sb3_pg.zoo.registry import config_path
from sb3_pg.zoo.safe_files import Loading, forget_trust
from sb3_pg.zoo.spaces import fit_to_observations

VECTOR_BACKENDS: Final = ("vector", "envpool", "actors", "ray")
"""Values of ``--vec-env`` besides rl_zoo3's own: backends of :func:`sb3_pg.envs.make_vec_env`."""
N_EVALUATIONS: Final = 20
"""Default number of evaluations in a run, without the one of the untrained policy."""
_LEAST_EVAL_FREQ: Final = 1000
CHECKPOINTS: Final = "checkpoints"
"""Folder of the checkpoints in the folder of a run. A run that has ended has none."""
#: Wrappers that Gymnasium puts around every env; vectorized envs do the same themselves.
_USUAL_WRAPPERS: Final = (OrderEnforcing, PassiveEnvChecker)


class Experiment(ExperimentManager):
    """A run of ``sb3-pg train``; arguments are ``ExperimentManager``'s.

    It differs from rl_zoo3's run:

    - Before the log folder is made, the hyperparameters are tried out: a model is made with a single env.
    - The ``default:`` block of our algorithms is fitted to the observation space, by
      :func:`~sb3_pg.zoo.spaces.fit_to_observations`.
    - Training envs may be those of :func:`~sb3_pg.envs.make_vec_env`.
    - The policy is also evaluated before the first step. Evaluations do not change training.
    - A run that continues another one continues its count of steps.
    - Our algorithms log about every 500 steps of each env.
    """

    eval_freq: Any  # None: computed from the number of steps
    n_eval_envs: Any  # None: computed from the number of training envs
    vec_env_class: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._backend = kwargs.get("vec_env_type")
        if self._backend in VECTOR_BACKENDS:
            kwargs["vec_env_type"] = "dummy"  # for the evaluation
        else:
            self._backend = None
        super().__init__(*args, **kwargs)
        #: folder of the run that is resumed, None for a new run
        self.resumed: str | None = getattr(self.args, "resume", None) or None
        if self.resumed is not None:
            self.save_path = self.resumed
            self.params_path = f"{self.save_path}/{self.env_name}"
        #: what the model learns from before it is trained; None for nothing
        self.demos: Demonstrations | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.save_path) / CHECKPOINTS

    # ---------------------------------------------------------------- hyperparameters

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the hyperparameters as rl_zoo3 does, and fit a ``default:`` block of ours to the observation space.

        :raises CommandError: the configuration has no block for this environment, no policy takes its observations, or
            a hyperparameter names a class that cannot be imported
        """
        is_default = self._takes_our_default()
        with refusing(ValueError):
            hyperparams, saved = super().read_hyperparameters()
        n_envs = hyperparams.get("n_envs", 1)
        if not isinstance(n_envs, int) or n_envs < 1:
            raise CommandError(f"n_envs must be an integer of at least 1, got {n_envs!r}")
        for key in ("policy", "env_wrapper", "vec_env_wrapper", "callback"):
            for name in _class_names(hyperparams.get(key)):
                with refusing(ImportError, AttributeError):
                    get_class_by_name(name)
        if is_default:
            space = self._observation_space(hyperparams)
            with refusing(ValueError):
                fitted = fit_to_observations(space, hyperparams, self._buffer_size())
            fitted = {name: value for name, value in fitted.items() if name not in (self.custom_hyperparams or {})}
            if fitted:
                print(f"For {space}: {fitted}")
                hyperparams.update(fitted)
                saved = type(saved)((name, hyperparams[name]) for name in sorted(hyperparams))
        if getattr(self.args, "pretrain", None) and self.resumed is None:
            with refusing(OSError, TypeError, ValueError, prefix="--pretrain: "):
                self.demos = Demonstrations.load(self.args.pretrain)
        if getattr(self.args, "anchor", None) and self.resumed is None:  # that of the checkpoint otherwise
            with refusing(ValueError, prefix="--anchor: "):
                hyperparams["anchor"] = read_anchor(self.args.anchor, self.demos)
        self._given = hyperparams  # rl_zoo3 turns this dict into the model's arguments, in place
        return hyperparams, saved

    def load_trial(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a trial as rl_zoo3 does.

        :raises CommandError: there is no such trial
        """
        with refusing(KeyError, IndexError, prefix="--study-name, --storage and --trial-id name no trial: "):
            return super().load_trial(*args, **kwargs)

    def _takes_our_default(self) -> bool:
        if self.algo not in ALGORITHMS or self.config != str(config_path(self.algo)):
            return False
        blocks = yaml.safe_load(Path(self.config).read_text())
        is_atari = self.is_atari(self.env_name.gym_id)
        if is_atari and "atari" not in blocks:
            compat.use_default_block(self)
            is_atari = False
        return self.env_name.gym_id not in blocks and not is_atari

    def _observation_space(self, hyperparams: dict[str, Any]) -> spaces.Space[Any]:
        wrap = get_wrapper_class(hyperparams)
        kwargs = self.env_kwargs or hyperparams.get("env_kwargs", {})
        with refusing_env():
            env = gym.spec(self.env_name.gym_id).make(**kwargs)
        try:
            return (env if wrap is None else wrap(env)).observation_space
        finally:
            env.close()

    def _buffer_size(self) -> int | None:
        """Return the default number of transitions in the algorithm's replay buffer, None if it has none."""
        for cls in ALGORITHMS[self.algo].__mro__:  # the first class that lists the argument; subclasses pass it on
            argument = inspect.signature(cls).parameters.get("buffer_size")
            if argument is not None:
                return int(argument.default)
        return None

    # ---------------------------------------------------------------- before anything is written

    def create_log_folder(self) -> None:
        """Try the hyperparameters out, then make the log folder as rl_zoo3 does. A search has no log folder.

        :raises CommandError: the environment or the algorithm refuses its arguments
        :raises ImportError: ``--tensorboard-log`` is given, and TensorBoard is not installed
        """
        if self.eval_freq is None:
            self.eval_freq = max(_LEAST_EVAL_FREQ, self.n_timesteps // N_EVALUATIONS)
        if self.n_eval_envs is None:
            self.n_eval_envs = max(1, min(self.n_eval_episodes, self.n_envs))
        # The arguments are saved with the run.
        self.args.eval_freq, self.args.n_eval_envs = self.eval_freq, self.n_eval_envs
        if self.tensorboard_log is not None and utils.SummaryWriter is None:  # type: ignore[attr-defined]
            raise ImportError("tensorboard is not installed")
        with unchanged_random_state(utils.get_device(self.device)):
            n_steps_before = None if self.resumed else self._try_out()
        if n_steps_before is not None:
            self.args.num_timesteps_before = n_steps_before
            after = n_steps_before + self.n_timesteps
            print(
                f"Continuing at {n_steps_before:,} env steps, for {self.n_timesteps:,} more. Schedules (lin_...) are "
                f"those of one run of {after:,} steps: {n_steps_before / after:.0%} of it is done."
            )
        if not self.optimize_hyperparameters:
            super().create_log_folder()  # type: ignore[no-untyped-call]

    def _try_out(self) -> int | None:
        """Make env and model as in the run, but with a single env, and without files and output.

        :return: env steps of the model that is continued, None for a new one
        :raises CommandError: the environment or the algorithm refuses its arguments
        """
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run gives the same ones
            with refusing_env():
                if self.eval_env_kwargs != self.env_kwargs:
                    self.create_envs(1, eval_env=True, no_log=True).close()
                env = self.create_envs(1, no_log=True)
            try:
                hyperparams = compat.with_action_noise(self, deepcopy(self._given), env)
                many = _SizedVecEnv(env, self.n_envs)
                kwargs: dict[str, Any] = {"env": many, "seed": self.seed, "device": self.device}
                if self.continue_training:
                    errors = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
                    prefix = (
                        f"{self.trained_agent} cannot be continued with --algo {self.algo} --env "
                        f"{self.env_name.gym_id} and these hyperparameters: "
                    )
                    for name in ("policy", "policy_kwargs"):  # the saved model has its own
                        hyperparams.pop(name, None)
                    with refusing(*errors, prefix=prefix):
                        loading = Loading(ALGOS[self.algo], self.args.trusted)
                        model = loading.load(self.trained_agent, **kwargs, **hyperparams)
                    self._check_demonstrations(model)
                    return int(model.num_timesteps)
                if not self.optimize_hyperparameters:  # a search replaces some of the hyperparameters
                    with refusing(AssertionError, TypeError, ValueError):
                        model = ALGOS[self.algo](**kwargs, **hyperparams)
                    self._check_demonstrations(model)
            finally:
                env.close()
        return None

    def _check_demonstrations(self, model: BaseAlgorithm) -> None:
        """Check that the demonstrations fit a model.

        :raises CommandError: they do not
        """
        if self.demos is not None:
            with refusing(ValueError, prefix="--pretrain: "):
                steps_for(model, self.demos)

    def setup_experiment(self) -> Any:
        """Make callbacks, envs and model as rl_zoo3 does. A run that is resumed loads its newest checkpoint instead.

        :return: the model, and the hyperparameters as they are saved; None for a search
        """
        with nullcontext() if self.resumed is None else compat.loaded_by(self, self._resume):
            made = super().setup_experiment()
        if made is not None:
            forget_trust(made[0])
        return made

    def _resume(self, _hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        with refusing(ValueError, FileNotFoundError):
            cls: Any = ALGORITHMS[self.algo]
            model: BaseAlgorithm = cls.resume(self.checkpoints, env, self.device, trusted=self.args.trusted)
        print(f"Resuming {self.save_path} at {model.num_timesteps:,} of {self.n_timesteps:,} steps.")
        return model

    # ---------------------------------------------------------------- envs, callbacks

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """Make envs as rl_zoo3 does, training envs as ``--vec-env`` says. A search writes no monitor files.

        :raises CommandError: the algorithm or a wrapper does not support these envs
        """
        no_log = no_log or self.optimize_hyperparameters
        if self._backend is None:
            if self.vec_env_class is SubprocVecEnv:
                self.vec_env_class = subproc_vec_env
            return super().create_envs(n_envs, eval_env, no_log)
        # Evaluation needs envs that reset in the step that ends an episode.
        self.vec_env_class = DummyVecEnv if eval_env else partial(from_functions, self._backend)
        env = super().create_envs(n_envs, eval_env, no_log)
        if getattr(env, "next_step_autoreset", False):
            ours = issubclass(ALGOS[self.algo], (OnPolicyPG, OffPolicyShell))
            confused = "frame_stack" if is_vecenv_wrapped(env, VecFrameStack) else None if ours else self.algo
            if confused is not None:
                env.close()
                raise CommandError(
                    f"--vec-env {self._backend}: these vector envs reset in the step after an episode's end, "
                    f"which {confused} would take for a transition; use --vec-env dummy or envpool"
                )
        return env

    def create_callbacks(self) -> None:
        """Make callbacks as rl_zoo3 does, with an evaluation before the first step."""
        eval_freq, self.eval_freq = self.eval_freq, -1
        super().create_callbacks()  # type: ignore[no-untyped-call]
        if self.optimize_hyperparameters:
            return
        every = getattr(self.args, "checkpoint_every", 0)
        if every > 0 and self.algo in ALGORITHMS:
            self.callbacks.append(ResumeCallback(self.checkpoints, every=every))
        self.callbacks.append(ProgressFile(Path(self.save_path) / "progress.csv"))
        if eval_freq > 0:
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

    # ---------------------------------------------------------------- learning

    def learn(self, model: BaseAlgorithm) -> None:
        """Train the model as rl_zoo3 does. A run that continues another one continues its count of steps.

        With ``--pretrain``, the model learns from the demonstrations first. If that is interrupted, nothing is saved.

        :param model: as :meth:`setup_experiment` returns it
        :raises CommandError: a number that is not finite in what it learns from the demonstrations
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
        if isinstance(model, AsyncActorCritic) and is_asynchronous(model):
            self._fit_callbacks_to_fragments(model)
        try:
            if self.demos is not None:
                self._pretrain(model, self.demos)
            with self._ended_by_interrupt(), _refilled_buffer(model) if self.continue_training else nullcontext():
                model.learn(self.n_timesteps, callback=self.callbacks or None, **kwargs)
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        finally:
            if self.callbacks and self.callbacks[0].locals:  # training has begun
                self.callbacks[0].on_training_end()  # removes the progress bar
            assert model.env is not None
            with suppress(EOFError):  # the interrupt has ended worker processes too
                model.env.close()

    def _pretrain(self, model: Any, demos: Demonstrations) -> None:
        with refusing(NonFiniteError, prefix="--pretrain: "):
            report = model.pretrain(demos, progress_bar=self.show_progress)
        print(report)

    @contextmanager
    def _ended_by_interrupt(self) -> Iterator[None]:
        """Context that an interrupt ends, after which the model is saved as it is."""
        try:
            yield
        except KeyboardInterrupt:
            if latest_checkpoint(self.checkpoints) is not None:
                where = f"--env {self.env_name.gym_id} -f {shlex.quote(str(self.log_folder))}"
                print(f"Interrupted. Go on with: sb3-pg train --algo {self.algo} {where} --resume")

    def _fit_callbacks_to_fragments(self, model: BaseAlgorithm) -> None:
        """Leave out checkpoints to resume from, which need a boundary between rollouts, and keep frequencies.

        :param model: learns from fragments, each of one actor. Callbacks are called at each of their steps
        """
        assert model.env is not None
        self.callbacks = [one for one in self.callbacks if not isinstance(one, ResumeCallback)]
        for one in self.callbacks:
            for name in {"eval_freq", "save_freq"} & vars(one).keys():
                setattr(one, name, getattr(one, name) * len(cast(ActorVecEnv, model.env.unwrapped).shares))
        if self.verbose > 0:
            print("This run cannot be resumed: what its actors are collecting is not saved.")


def read_anchor(text: str, demos: Demonstrations | None = None) -> Anchor | None:
    """Make the anchor that ``--anchor`` asks for.

    :param text: ``KIND:COEF`` or ``KIND:COEF:DECAY``, with the kind "kl" or "demos"
    :param demos: the demonstrations for "demos"; None to check the text alone
    :return: None for "demos" without demonstrations
    :raises ValueError: the text has another form, or a number is out of range
    """
    kind, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if kind not in ("kl", "demos") or len(values) not in (1, 2):
        raise ValueError(f"must be kl:COEF, kl:COEF:DECAY, demos:COEF or demos:COEF:DECAY, got {text!r}")
    held = KLAnchor(*values)  # checks the numbers
    if kind == "kl":
        return held
    return None if demos is None else DemonstrationLoss(demos, held.coef, held.decay)


@contextmanager
def refusing(*errors: type[Exception], prefix: str = "") -> Iterator[None]:
    """Context that turns these errors into errors of the command line.

    :raises CommandError: instead of one of ``errors``
    """
    try:
        yield
    except errors as error:
        raise CommandError(f"{prefix}{error}") from error


@contextmanager
def refusing_env() -> Iterator[None]:
    """Context in which an env or wrapper that refuses its arguments is an error of the command line.

    :raises CommandError: instead of the env's error
    """
    try:
        with refusing(AssertionError, ValueError):
            yield
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise CommandError(str(error)) from error


def _class_names(value: Any) -> Iterator[str]:
    """Yield the dotted names in a hyperparameter: a name, a dict from a name to its arguments, or a list of both."""
    for entry in value if isinstance(value, list) else [value]:
        for name in entry if isinstance(entry, dict) else [entry]:
            if isinstance(name, str) and "." in name:
                yield name


class _SizedVecEnv(VecEnvWrapper):
    """A VecEnv that claims to have ``n_envs`` envs, for a model that is never trained."""

    def __init__(self, venv: VecEnv, n_envs: int) -> None:
        super().__init__(venv)
        self.num_envs = n_envs

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


def from_functions(backend: str, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
    """Make the vectorized env of a backend that equals these single envs. It serves as ``vec_env_cls`` of SB3.

    :param backend: one of ``VECTOR_BACKENDS``
    :param env_fns: functions that make one env each
    :raises ValueError: the envs have a wrapper that the vectorized env cannot have
    """
    if backend in ("actors", "ray"):
        return ActorVecEnv(env_fns, transport="ray" if backend == "ray" else "processes")
    env = env_fns[0]()
    spec, monitor, foreign, limits = env.spec, None, [], []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Monitor):
            monitor = env.results_writer
            foreign += [f"Monitor(info_keywords={env.info_keywords})"] if env.info_keywords else []
        elif isinstance(env, TimeLimit):
            limits.append(compat.time_limit(env))
        elif not isinstance(env, _USUAL_WRAPPERS):
            foreign.append(type(env).__name__)
        env = env.env
    env.close()
    assert spec is not None
    if backend == "vector" and not has_native_vector(spec.id):
        return GymVectorAdapter(SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP))
    if foreign:
        raise ValueError(
            f"--vec-env {backend}: the envs of {spec.id} step together, and cannot be wrapped one by one in "
            f"{', '.join(foreign)}"
        )
    folder = None
    if monitor is not None:
        monitor.close()
        folder = str(Path(monitor.file_handler.name).parent)
    registered = gym.spec(spec.id).kwargs  # native envs and EnvPool's have these already
    env_kwargs = {
        name: value for name, value in spec.kwargs.items() if value is not None and registered.get(name) != value
    }
    if limits:
        env_kwargs["max_episode_steps"] = min(limits)
    return make_vec_env(spec.id, len(env_fns), backend, env_kwargs=env_kwargs, monitor_dir=folder)


class ProgressFile(BaseCallback):
    """Writes what is logged into a CSV file too, which ``sb3-pg plot --metrics`` and ``sb3-pg watch`` read.

    :param path: the file
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_training_start(self) -> None:
        self._format = CSVOutputFormat(str(self.path))
        self.logger.output_formats.append(self._format)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._format in self.logger.output_formats:  # an interrupted run ends twice
            self.logger.output_formats.remove(self._format)
            self._format.close()


class Evaluation(EvalCallback):
    """SB3's callback with an evaluation before the first step. It changes neither training nor what training logs."""

    def _init_callback(self) -> None:
        with warnings.catch_warnings():  # training envs may be those of another backend
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
            super()._init_callback()

    def _on_training_start(self) -> None:
        if not self.evaluations_timesteps:  # a resumed run has evaluated already
            self._on_step()  # n_calls is 0, a multiple of every eval_freq

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq:
            return True
        log: Any = self.logger
        tables = log.name_to_value, log.name_to_count, log.name_to_excluded
        kept = [dict(table) for table in tables]
        for table in tables:
            table.clear()
        with unchanged_random_state(self.model.device):
            goes_on = super()._on_step()
        for table, values in zip(tables, kept, strict=True):
            table.update(values)  # training logs these itself
        return goes_on


@contextmanager
def _refilled_buffer(model: Any) -> Iterator[None]:
    """Context in which an empty replay buffer is filled for ``learning_starts`` steps before it is used."""
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
