"""rl_zoo3's scripts, run in this process with our algorithms, which importing ``sb3_pg.zoo`` has registered.

Each function takes all arguments of the script that it runs; ``--help`` lists them. A command line is checked before
rl_zoo3 writes anything. If it asks for something impossible, the script prints one line and exits with code 2.
"""

import argparse
import difflib
import importlib
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import gymnasium as gym
import rl_zoo3.enjoy
import rl_zoo3.train
import rl_zoo3.utils
from rl_zoo3.utils import StoreDict, create_test_env, get_model_path

from sb3_pg.extras import extra_hints
from sb3_pg.zoo.experiment import VECTOR_BACKENDS, CommandError, Experiment, refusing, refusing_env

# Comes before the user's arguments, which override it. By default, rl_zoo3 looks for agents of its own hub.
_TRAINED_HERE: Final = ("--folder", "logs")
#: Options of ``rl_zoo3.train`` that differ here.
_CHANGED: Final[dict[str, dict[str, Any]]] = {
    "--vec-env": {
        "choices": ["dummy", "subproc", *VECTOR_BACKENDS],
        "help": "VecEnv of the training envs (default: dummy): SB3's, Gymnasium's vector env, or EnvPool's (extra "
        "`envpool`)",
    },
    "--trained-agent": {
        "help": "Path to a pretrained agent to continue training. The count of its steps goes on, and -n adds to it; "
        "schedules such as lin_0.01 are those of one run of all these steps",
    },
    "--log-interval": {
        "help": "Updates between two logs, or episodes for off-policy algorithms (default: -1, as many as make a log "
        "about every 500 steps of each env, as often as A2C's default; algorithms of rl_zoo3 keep their own default; "
        "-2: no logging)",
    },
    "--eval-freq": {
        "default": None,  # follows from the number of steps, which the config file has
        "help": "Evaluate the agent every n steps, and before the first (if negative, no evaluation; default: a "
        "twentieth of the run, but at least 1000). During hyperparameter optimization n-evaluations is used instead",
    },
    "--n-eval-envs": {
        "default": None,  # follows from the number of training envs, which the config file has
        "help": "Number of environments for evaluation (default: as many as training envs, but at most one for each "
        "episode)",
    },
    "--track": {
        "help": "if toggled, this experiment will be tracked with Weights and Biases (extra `track`)",
    },
}


def train(arguments: Sequence[str]) -> None:
    """Train an agent, or optimize hyperparameters, by ``rl_zoo3.train`` with :class:`Experiment`.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: the environment or an option needs an optional dependency
    """
    parsers = SimpleNamespace(ArgumentParser=_TrainParser)
    members = {"argparse": parsers, "StoreDict": _PythonValues, "ExperimentManager": Experiment}
    with _script("train", arguments, rl_zoo3.train, members):
        rl_zoo3.train.train()


def enjoy(arguments: Sequence[str]) -> None:
    """Watch or score a trained agent by ``rl_zoo3.enjoy``. The default folder is ``logs``, as in :func:`train`.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: rendering or the environment needs an optional dependency
    """
    with _script("enjoy", (*_TRAINED_HERE, *arguments), rl_zoo3.enjoy, _FOR_TRAINED_AGENTS):
        _import_gym_packages()
        rl_zoo3.enjoy.enjoy()


def record_video(arguments: Sequence[str]) -> None:
    """Record a video of a trained agent by ``rl_zoo3.record_video``. The default folder is ``logs``.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: recording or the environment needs an optional dependency
    """
    # The script has no function to call: its code is under `if __name__ == "__main__"`, and imports from utils.
    with _script("record-video", (*_TRAINED_HERE, *arguments), rl_zoo3.utils, _FOR_TRAINED_AGENTS):
        _import_gym_packages()
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")


@contextmanager
def _script(command: str, arguments: Sequence[str], module: Any, members: Mapping[str, Any]) -> Iterator[None]:
    """Context for a script of rl_zoo3, which parses ``sys.argv``.

    :param command: name of the command
    :param arguments: its command line
    :param module: module of rl_zoo3
    :param members: name -> what replaces this member of the module
    :raises SystemExit: the command line asks for something impossible; the reason is printed
    """
    name = f"sb3-pg {command}"
    try:
        with _replaced(sys, {"argv": [name, *arguments]}), _replaced(module, members), extra_hints():
            yield
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def _replaced(module: Any, members: Mapping[str, Any]) -> Iterator[None]:
    """Context in which members of a module are replaced."""
    before = {name: getattr(module, name) for name in members}
    vars(module).update(members)
    try:
        yield
    finally:
        vars(module).update(before)


class _PythonValues(StoreDict):
    """Parses rl_zoo3's ``KEY:VALUE``. A value that is not Python is an error of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)  # type: ignore[no-untyped-call]
        except (ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError, ValueError) as error:
            hint = f"""{error}: write KEY:VALUE with VALUE in Python, such as gamma:0.9 or baseline:"'mean'\""""
            raise argparse.ArgumentError(self, hint) from error


class _TrainParser(argparse.ArgumentParser):
    """Builds the command line of ``rl_zoo3.train`` while ``sb3-pg train`` runs."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an option, changed if it differs here."""
        changed = next((_CHANGED[name] for name in names if name in _CHANGED), {})
        return super().add_argument(*names, **options | changed)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line, and check what would fail later.

        :raises SystemExit: it cannot be parsed, a number is out of range, or an env, file or module does not exist
        """
        parsed = super().parse_args(*args, **kwargs)
        for name in ("eval_episodes", "n_eval_envs"):
            value = getattr(parsed, name)
            if value is not None and value < 1:
                self.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
        if parsed.log_interval == 0:
            self.error("argument --log-interval: must be at least 1, -1 (default) or -2 (no logging), got 0")
        for package in parsed.gym_packages:
            _import(self, "--gym-packages", package)
        if parsed.env not in gym.registry:
            close = difflib.get_close_matches(parsed.env, gym.registry, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            self.error(f"argument --env: no environment is registered as {parsed.env!r}{hint}")
        agent, config = Path(parsed.trained_agent), parsed.conf_file
        if parsed.trained_agent and not (agent.suffix == ".zip" and agent.is_file()):
            self.error(f"argument -i/--trained-agent: must be the path of a .zip file, got {str(agent)!r}")
        if config and config.endswith((".yml", ".yaml", ".py")):
            if not Path(config).is_file():
                self.error(f"argument -conf/--conf-file: there is no file {config!r}")
        elif config and not hasattr(_import(self, "-conf/--conf-file", config), "hyperparams"):
            self.error(f"argument -conf/--conf-file: module {config!r} has no dict 'hyperparams'")
        return parsed


def _import(parser: argparse.ArgumentParser, option: str, name: str) -> Any:
    """Import the module that an option names. If it does not exist, that is an error of the command line."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # the module exists, and imports a missing one
            raise
        return parser.error(f"argument {option}: {error}")


def _import_gym_packages() -> None:
    """Import the modules of ``--gym-packages``, which may register the env.

    :raises SystemExit: there is no such module
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    for package in parser.parse_known_args()[0].gym_packages:
        _import(parser, "--gym-packages", package)


#: Members of rl_zoo3's scripts for trained agents, with errors of the command line.
_FOR_TRAINED_AGENTS: Final = {
    "StoreDict": _PythonValues,
    "get_model_path": refusing(AssertionError, OSError, ValueError)(get_model_path),
    "create_test_env": refusing_env()(create_test_env),
}
