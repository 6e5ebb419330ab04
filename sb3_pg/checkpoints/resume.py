"""Exact resume: save a run as it goes, and go on from the newest checkpoint as if nothing had happened."""

import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.logger import configure

from sb3_pg.checkpoints.folder import Checkpoint, CheckpointFolder, Manifest
from sb3_pg.checkpoints.log_files import LoggerState, mark_event_folders
from sb3_pg.checkpoints.run_state import (
    RunState,
    Unpickle,
    callback_attributes,
    from_plain,
    has_state,
    names_of,
    require_run_attributes,
    require_tree,
    set_buffer_state,
    set_callback_state,
    set_random_states,
)
from sb3_pg.envs import EnvState, set_env_state
from sb3_pg.envs.state.encoding import with_results
from sb3_pg.errors import CheckpointError, UntrustedFileError
from sb3_pg.rollout import Pieces

#: Attributes of a model that belong to its envs.
_OF_ENVS: Final = ("_last_obs", "_last_original_obs", "_last_episode_starts", "_timesteps", "_memory")

#: Share of the training time that copies of the state, which signals need, may take.
SHARE_OF_TIME: Final = 0.005
#: Packages on whose versions the numbers of a run depend.
PACKAGES: Final = ("gymnasium", "numpy", "sb3_pg", "stable_baselines3", "torch")
SIGNALS: Final = tuple(name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class ResumeCallback(BaseCallback):
    """Save the run at update boundaries, so that ``resume`` goes on from there as if nothing had happened.

    A checkpoint holds the policy, all optimizers, counters, the replay buffer, the envs' state, VecNormalize's
    statistics, the state of the other callbacks, what was logged, and all random generators. The weights at the end of
    a resumed run are those of an uninterrupted run, to the bit::

        from sb3_pg import TRPO, ResumeCallback
        from sb3_pg.checkpoints import latest_checkpoint

        env = make_vec_env("Hopper-v5", n_envs=8)
        if latest_checkpoint("ckpt"):
            model = TRPO.resume("ckpt", env)
        else:
            model = TRPO("MlpPolicy", env, seed=0)
        model.learn(1_000_000, callback=ResumeCallback("ckpt", every=50_000))

    An update boundary is the moment after an update and before the next rollout. A signal does not wait for it: the
    state at the latest boundary is saved at once. For this, the state is copied at boundaries, as often as it takes at
    most 0.5 % of the time. If a full replay buffer has been written to since then, the signal waits for the next
    boundary.

    Each checkpoint is written into a temporary folder, which is then renamed. A folder belongs to one run. If a
    checkpoint cannot be written, a warning says why, and training goes on.

    :param folder: folder of the checkpoints
    :param every: env steps between two checkpoints
    :param keep: number of checkpoints to keep
    :param on_signals: names of the signals on which the run is saved. It then ends as it does without the callback:
        SIGINT raises KeyboardInterrupt, and other signals SystemExit
    :param verbose: 1 prints the path of each checkpoint
    :raises ValueError: an argument out of range; when training starts, a folder with the checkpoints of another run
    :raises TypeError: an argument of the wrong type; when training starts, a model that is not one of this package
    """

    def __init__(
        self,
        folder: str | Path,
        every: int = 50_000,
        keep: int = 3,
        on_signals: Collection[str] = ("SIGTERM", "SIGINT"),
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder must be a path, got {folder!r}")
        for name, value in (("every", every), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if isinstance(on_signals, str) or not set(on_signals) <= set(SIGNALS):
            raise ValueError(f"on_signals must be names among {SIGNALS}, got {on_signals!r}")
        self.folder, self.every, self.keep = CheckpointFolder(folder), int(every), int(keep)
        self.on_signals = tuple(on_signals)
        #: seconds that writing each checkpoint took
        self.write_seconds: list[float] = []
        #: seconds that copying the state took, all in all
        self.copy_seconds = 0.0
        self._run: str | None = None
        self._held = ExitStack()
        self._previous: dict[int, Any] = {}

    def _init_callback(self) -> None:
        model: Any = self.model
        if not hasattr(type(model), "resume"):
            raise TypeError(f"{type(self).__name__} saves algorithms of sb3_pg, got {type(model).__name__}")
        if model.checkpointer not in (None, self):
            raise ValueError("callback must hold one ResumeCallback at most")
        model.checkpointer = self

    def _on_step(self) -> bool:
        return True

    # ---------------------------------------------------------------- called by the algorithm

    def begin(self, callback: BaseCallback, asked: int, resumed_from: Checkpoint | None) -> None:
        """Begin a run, before its first rollout.

        :param callback: all callbacks of the run
        :param asked: ``total_timesteps`` as given to ``learn``
        :param resumed_from: the checkpoint that the model was resumed from
        :raises ValueError: the folder has checkpoints of another run
        """
        self._asked = asked
        self._callbacks = [(inner, callback_attributes(inner)) for inner in walk(callback)]
        self._held = self.folder.lock()
        found = next(self.folder.manifests(), None)
        if resumed_from is not None:
            self._run = resumed_from.manifest.run
        if found is not None and found.run != self._run:
            self._held.close()
            raise CheckpointError(
                f"{self.folder.path} has checkpoints of another run: go on with it by {found.algorithm}.resume(folder, "
                "env), or give an empty folder"
            )
        self._run = self._run or uuid.uuid4().hex
        mark_event_folders(self.model.logger, self._run)
        self._saved_at = self.model.num_timesteps if resumed_from is not None else -self.every
        self._copied_at, self._copy_seconds = -np.inf, 0.0
        self._latest: RunState | None = None
        self._waiting: int | None = None
        if threading.current_thread() is threading.main_thread():
            for name in self.on_signals:
                number = getattr(signal, name)
                self._previous[number] = signal.signal(number, self._on_signal)

    def at_boundary(self) -> None:
        """Save the run if it is time to, and copy its state for a signal that may come."""
        is_due = self.model.num_timesteps - self._saved_at >= self.every
        began = time.perf_counter()
        if is_due or self._waiting is not None or (self._previous and self._may_copy(began)):
            state = RunState.capture(self.model, self._callbacks)
            seconds = time.perf_counter() - began
            self.copy_seconds += seconds
            is_first = self._latest is None
            # The first copy takes longer than the next ones, and says nothing about them.
            self._copied_at, self._copy_seconds = began + seconds, 0.0 if is_first else seconds
            if is_first and (reason := EnvState(*state.parts["env"]).inexact):
                warnings.warn(f"A resumed run will go on from a reset of the envs: {reason}", stacklevel=2)
            self._latest = state
            if is_due:
                self._write(state)
        if self._waiting is not None:
            self._end_by(self._waiting, None)

    def _may_copy(self, now: float) -> bool:
        return now - self._copied_at >= self._copy_seconds / SHARE_OF_TIME

    def finish(self) -> None:
        """Save the run as finished."""
        self._write(RunState.capture(self.model, self._callbacks), finished=True)
        self._latest = None
        if self._waiting is not None:
            self._end_by(self._waiting, None)

    def close(self) -> None:
        """Give the signals back, and unlock the folder."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        self._held.close()
        self._latest = None
        self.model.checkpointer = None  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- saving

    def _write(self, state: RunState, finished: bool = False) -> Path | None:
        began = time.perf_counter()
        manifest = Manifest(
            run=str(self._run),
            algorithm=type(self.model).__name__,
            num_timesteps=state.num_timesteps,
            asked=self._asked,
            finished=finished,
            versions=installed_versions(),
        )
        self._saved_at = state.num_timesteps  # also if it fails: the next attempt is as far away
        try:
            path = self.folder.write(manifest, *state.to_files(), keep=self.keep)
        except OSError as error:  # training goes on
            warnings.warn(f"No checkpoint at {state.num_timesteps:,} steps: {error}", stacklevel=2)
            return None
        self.write_seconds.append(time.perf_counter() - began)
        if self.verbose >= 1:
            print(f"Saved {path} at {state.num_timesteps:,} steps")
        return path

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Save the state at the latest boundary, and end the run as without this callback."""
        if self._latest is not None and not self._latest.is_intact(self.model):
            self._waiting = number  # at_boundary goes on
            return
        self._end_by(number, frame)

    def _end_by(self, number: int, frame: FrameType | None) -> None:
        previous, latest = self._previous[number], self._latest
        if latest is not None:
            path = self._write(latest)
            # print() may be what the signal has interrupted
            text = f"\n{signal.Signals(number).name}: saved {path} at {latest.num_timesteps:,} steps\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
        self._waiting = None
        if callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            raise SystemExit(128 + number)


class Resumption:
    """A checkpoint that a model goes on from, in the first ``learn`` after ``resume``.

    :param checkpoint: the checkpoint
    :param unpickle: loads what could only be stored as a pickle
    """

    def __init__(self, checkpoint: Checkpoint, unpickle: Unpickle) -> None:
        self.checkpoint, self._unpickle = checkpoint, unpickle
        then, now = checkpoint.manifest.versions, installed_versions()
        if changed := [f"{name} {then.get(name)} (now {now[name]})" for name in now if then.get(name) != now[name]]:
            warnings.warn(
                f"The checkpoint was written with {', '.join(changed)}: the run may not go on to the bit", stacklevel=3
            )
        with self._reading():
            parts, results = unpickle(checkpoint.files["state"]), checkpoint.arrays("results/")
            require_tree(parts, len(checkpoint.files["state"]))
            parts["env"] = with_results(parts["env"], lambda path, _: results[path].tobytes())
            self._parts: dict[str, Any] = parts
            self._logger = LoggerState.from_plain(self._parts["logger"], checkpoint.arrays("log/"), unpickle)
            self._old_events = self._logger.event_files(checkpoint.manifest.run)
        self._callbacks: list[BaseCallback] = []

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Context in which any error says that the checkpoint cannot be read.

        :raises CheckpointError: instead of the error
        :raises UntrustedFileError: as it is
        """
        try:
            yield
        except UntrustedFileError:
            raise
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise CheckpointError(f"{self.checkpoint.path} cannot be resumed: {kind}{error}") from error

    def prepare(self, model: Any) -> None:
        """Give a loaded model what ``load`` does not: its counters, its replay buffer, and which parameters are frozen.

        :param model: the algorithm
        :raises ValueError: the replay buffer has another size
        """
        with self._reading():
            self._set_attributes(model, _OF_ENVS)  # those follow when the envs are known to be the same
            model.action_space, model.observation_space = model.env.action_space, model.env.observation_space
            for name, parameter in model.policy.named_parameters():
                parameter.requires_grad_(name not in self._parts["frozen"])
            if "buffer" in self._parts:
                arrays = self.checkpoint.arrays("buffer/")
                set_buffer_state(model.replay_buffer, self._parts["buffer"], arrays, self._unpickle)

    def require_same_total(self, total_timesteps: int) -> None:
        """Require the ``total_timesteps`` of the interrupted call.

        :raises ValueError: it is another number
        """
        asked = self.checkpoint.manifest.asked
        if total_timesteps != asked:
            raise ValueError(
                f"total_timesteps must be {asked}, as in the interrupted call, which the first learn after resume goes "
                f"on with; got {total_timesteps}"
            )

    def begin(
        self, model: Any, set_up: Callable[..., tuple[int, BaseCallback]], callback: Any, progress_bar: bool
    ) -> tuple[int, BaseCallback]:
        """Set ``learn`` up as SB3 does, at the place where it was interrupted.

        :param model: the algorithm
        :param set_up: SB3's ``_setup_learn``
        :param callback: argument of ``learn``
        :param progress_bar: argument of ``learn``
        :return: the step at which ``learn`` ends, and the callback
        :raises ValueError: the envs are not like those of the checkpoint
        """
        with self._reading():
            is_exact = self._set_envs(model)
            self._set_attributes(model, () if is_exact else _OF_ENVS)
            self._logger.cut_events(self._old_events)
        with self._same_folder(model):
            _, callback = set_up(0, callback, False, type(model).__name__, progress_bar)
        with self._reading():
            self._set_attributes(model, _OF_ENVS)
            model.start_time = time.time_ns() - int(self._parts["seconds"] * 1e9)
        end = model.num_timesteps if self.checkpoint.manifest.finished else model._total_timesteps
        return end, callback

    def set_callbacks(self, callback: BaseCallback) -> None:
        """Give the callbacks their state.

        :param callback: all callbacks of the run
        """
        self._callbacks = list(walk(callback))
        with self._reading():
            self._set_callbacks()
        given = dict(names_of(self._callbacks))
        missing = [name for name, state in self._parts["callbacks"].items() if name not in given and has_state(state)]
        if missing:
            names = ", ".join(sorted(name.split(" ")[0] for name in missing))
            warnings.warn(
                f"The checkpoint has the state of callbacks that were not passed to learn again: {names}",
                stacklevel=7,
            )

    def finish(self, model: Any) -> None:
        """Set what ``on_training_start`` of the callbacks may have changed, just before the first rollout.

        :param model: the algorithm
        """
        with self._reading():
            self._set_callbacks()
            self._logger.restore(model.logger)
            set_random_states(model, self._parts["random"], self._unpickle)

    def _set_envs(self, model: Any) -> bool:
        """Set the state of the envs. If they cannot be set exactly, they will be reset.

        :return: whether the state is exact
        """
        state = EnvState(*self._parts["env"])
        set_env_state(model.env, state, self._unpickle)
        if not state.inexact:
            return True
        message = f"The run goes on from a reset of the envs, and is exact from there only: {state.inexact}"
        warnings.warn(message, stacklevel=7)
        for name in _OF_ENVS:
            setattr(model, name, None)
        if model.seed is not None:  # another seed than at the beginning, whose episodes would come again
            model.env.seed(int(np.random.SeedSequence([model.seed, model.num_timesteps]).generate_state(1)[0]))
        return False

    def _set_attributes(self, model: Any, but: Collection[str] = ()) -> None:
        attributes = self._parts["attributes"].items()
        values = {name: from_plain(value, self._unpickle) for name, value in attributes if name not in but}
        require_run_attributes(model, values)
        for name, value in values.items():
            setattr(model, name, value)
        pieces = self._parts["pieces"]
        if pieces is not None and not but:
            model._pieces = Pieces.from_state_dict(pieces)

    def _set_callbacks(self) -> None:
        states = self._parts["callbacks"]
        given = dict(names_of(self._callbacks))
        for name in states.keys() & given.keys():
            set_callback_state(given[name], states[name], self._unpickle)

    @contextmanager
    def _same_folder(self, model: Any) -> Iterator[None]:
        """Let SB3 write to the interrupted run's TensorBoard folder, and not to that of the latest run."""
        folder = self._logger.event_folder
        if model._custom_logger or folder is None or not self._logger.is_of(self.checkpoint.manifest.run):
            yield
            return
        model.set_logger(configure(folder, ["stdout", "tensorboard"] if model.verbose else ["tensorboard"]))
        try:
            yield
        finally:
            model._custom_logger = False


@lru_cache
def installed_versions() -> dict[str, str]:
    """Return the versions of the packages on which the numbers of a run depend."""
    return {name: version(name) for name in PACKAGES}


def walk(callback: BaseCallback) -> Iterator[BaseCallback]:
    """Yield a callback and those inside it, without those that have no state of the run."""
    if not isinstance(callback, CallbackList | ProgressBarCallback | ResumeCallback):
        yield callback
    for value in vars(callback).values():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseCallback) and inner is not callback.parent:
                yield from walk(inner)
