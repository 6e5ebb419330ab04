"""rl_zoo3's own scripts, run in this process with our algorithms, which importing this package has registered.

Each takes the arguments of the script it runs, all of them; its ``--help`` lists them.
"""

import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import rl_zoo3.enjoy
import rl_zoo3.train

from sb3_pg.extras import extra_hints
from sb3_pg.zoo.experiment import Experiment, own_experiments

# Ahead of the user's arguments, so that theirs win: rl_zoo3 looks for agents of its own hub unless told otherwise.
_TRAINED_HERE: Final = ("--folder", "logs")


def train(arguments: Sequence[str]) -> None:
    """Train an agent, or optimize hyperparameters: ``rl_zoo3.train``, with what :class:`Experiment` adds to it.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: the environment or an option needs an optional dependency
    """
    try:
        with _command_line("train", arguments), own_experiments():
            rl_zoo3.train.train()
    except (SystemExit, ImportError) as error:
        _remove_unused_run(error)
        raise


def enjoy(arguments: Sequence[str]) -> None:
    """Watch or score a trained agent: ``rl_zoo3.enjoy``, on the folder ``logs`` that ``train`` writes by default.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: rendering or the environment needs an optional dependency
    """
    with _command_line("enjoy", (*_TRAINED_HERE, *arguments)):
        rl_zoo3.enjoy.enjoy()


def record_video(arguments: Sequence[str]) -> None:
    """Record a video of a trained agent: ``rl_zoo3.record_video``, on the folder ``logs`` by default.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: recording or the environment needs an optional dependency
    """
    with _command_line("record-video", (*_TRAINED_HERE, *arguments)):
        # The script has no function to call: all of it stands under `if __name__ == "__main__"`.
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")


@contextmanager
def _command_line(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Show rl_zoo3's scripts, which read ``sys.argv``, this command line; report errors as a command does."""
    before = sys.argv
    sys.argv = [f"sb3-pg {command}", *arguments]
    try:
        with extra_hints():
            yield
    except Exception as error:
        message = _wrong_call(error)
        if message is None:
            raise
        print(f"{sys.argv[0]}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        sys.argv = before


# Where rl_zoo3 checks what it was asked for.
_CHECKS: Final = {
    ("rl_zoo3.train", "train"),
    ("rl_zoo3.utils", "get_model_path"),
    ("rl_zoo3.exp_manager", "read_hyperparameters"),
}
# Where it imports what it was given the name of.
_IMPORTS: Final = {
    *_CHECKS,
    ("rl_zoo3.enjoy", "enjoy"),
    ("rl_zoo3.exp_manager", "_create_sampler"),
    ("rl_zoo3.utils", "get_wrapper_class"),
    ("rl_zoo3.utils", "get_class_by_name"),
    ("rl_zoo3.utils", "get_callback_list"),
}
_SETUP: Final = ("rl_zoo3.exp_manager", "setup_experiment")
_TRIAL: Final = ("rl_zoo3.exp_manager", "load_trial")
_EVALUATION: Final = ("rl_zoo3.utils", "__call__")


def _wrong_call(error: Exception) -> str | None:
    """What to tell the user if ``error`` refuses what was asked for.

    None if it is anything else, whose traceback is nobody's to hide.
    """
    frames = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    module, function = frames[-1]
    if isinstance(error, (ImportError, AttributeError)):
        asked = [frame for frame in frames if not frame[0].startswith("importlib") and frame[1] != "__getattr__"]
        return str(error) if asked[-1] in _IMPORTS else None
    if isinstance(error, (KeyError, IndexError)):
        return f"--study-name, --storage and --trial-id name no trial: {error}" if _TRIAL in frames else None
    if isinstance(error, FileNotFoundError):
        return str(error) if frames[-1] in _CHECKS else None
    if not isinstance(error, (AssertionError, NameError, SyntaxError, TypeError, ValueError)):
        return None
    if _EVALUATION in frames:
        return f"""{error}: write KEY:VALUE with VALUE in Python, such as gamma:0.9 or baseline:"'mean'\""""
    # Our constructors refuse arguments, which rl_zoo3 takes from the config file and from --hyperparams.
    refused_by_us = _SETUP in frames and module.startswith("sb3_pg.") and not isinstance(error, AssertionError)
    # SB3 refuses spaces and what wraps them.
    refused_by_theirs = (
        _SETUP in frames
        and module.startswith(("stable_baselines3.", "sb3_contrib."))
        and isinstance(error, (AssertionError, ValueError))
    )
    unexpected = "unexpected keyword argument" in str(error)
    unknown_to_theirs = frames[-1] == _SETUP and unexpected
    unknown_to_env = (module, function) == ("gymnasium.envs.registration", "make") and unexpected
    if frames[-1] in _CHECKS or refused_by_us or refused_by_theirs or unknown_to_theirs or unknown_to_env:
        return str(error)
    return None


def _remove_unused_run(error: BaseException) -> None:
    """Remove the folder that rl_zoo3 made for a run before it was refused."""
    # What refused the run; an exit that nothing caused is somebody's own.
    link = error if isinstance(error, ImportError) else error.__cause__
    while link is not None:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            manager = frame.f_locals.get("self")
            if isinstance(manager, Experiment):
                manager.remove_if_unused()
                return
        link = link.__cause__
