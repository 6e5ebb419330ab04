"""rl_zoo3's scripts, run in this process with our algorithms, which importing ``sb3_pg.zoo`` has registered.

Each function takes all arguments of the script that it runs; ``--help`` lists them. A command line is checked before
rl_zoo3 writes anything. If it asks for something impossible, the script prints one line and exits with code 2.
"""

import argparse
import difflib
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import gymnasium as gym
import rl_zoo3.enjoy
import rl_zoo3.train
import rl_zoo3.utils
import yaml  # type: ignore[import-untyped]
from huggingface_sb3 import EnvironmentName  # type: ignore[import-untyped]
from rl_zoo3.utils import StoreDict, create_test_env, get_model_path
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg.algorithms import ALGORITHMS
from sb3_pg.checkpoints import latest_checkpoint
from sb3_pg.demonstrations import Demonstrations
from sb3_pg.envs import with_action_masks
from sb3_pg.extras import extra_hints
from sb3_pg.rollout import EndlessEpisodeError
from sb3_pg.zoo.command_errors import CommandError
from sb3_pg.zoo.experiment import CHECKPOINTS, VECTOR_BACKENDS, Experiment, read_anchor, refusing, refusing_env
from sb3_pg.zoo.safe_files import SettingsLoader, replaced, safe_files

# Comes before the user's arguments, which override it. By default, rl_zoo3 looks for agents of its own hub.
_TRAINED_HERE: Final = ("--folder", "logs")
#: Default of ``--checkpoint-every``, env steps.
CHECKPOINT_EVERY: Final = 50_000
#: Option of all scripts.
_TRUSTED: Final = "--trusted"
#: Options whose values rl_zoo3 imports or evaluates, or which name files with such values.
_RUNS_CODE: Final = ("gym_packages", "conf_file", "storage", "study_name")
#: Hyperparameters of the same kind.
_CODE_PARAMETERS: Final = frozenset(
    {"policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "normalize"}
    | {"env_wrapper", "vec_env_wrapper", "callback"}
)
_TRUSTED_HELP: Final = (
    "Run the code in saved agents, replay buffers, statistics and settings. Without it, a file may name only what is "
    "known to be harmless"
)
#: Options of ``rl_zoo3.train`` that differ here.
_CHANGED: Final[dict[str, dict[str, Any]]] = {
    "--vec-env": {
        "choices": ["dummy", "subproc", *VECTOR_BACKENDS],
        "help": "VecEnv of the training envs (default: dummy): SB3's, Gymnasium's vector env, EnvPool's (extra "
        "`envpool`), or actors, one process per CPU that collects whole rollouts; with ray, they are in a Ray cluster "
        "(extra `ray`)",
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


def unfinished_run(log_folder: str | Path, algo: str, env: str) -> Path | None:
    """Return the folder of the newest run that was interrupted and has a valid checkpoint; None if there is none.

    :param log_folder: the folder of all runs, ``--log-folder``
    :param algo: name of the algorithm
    :param env: id of the env
    """
    found = (Path(log_folder) / algo).glob(f"{EnvironmentName(env)}_*/{CHECKPOINTS}")
    newest_first = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path.parent for path in newest_first if latest_checkpoint(path)), None)


def saved_options(run: Path, env: str) -> dict[str, Any]:
    """Return the options that a run was started with.

    :param run: folder of the run
    :param env: id of the env
    :raises CommandError: the file is missing or damaged
    """
    path = run / EnvironmentName(env) / "args.yml"
    with refusing(OSError, yaml.YAMLError, TypeError, prefix="--resume: "), path.open() as file:
        saved = dict(yaml.load(file, Loader=SettingsLoader))
    return {name: value for name, value in saved.items() if name not in ("resume", "log_folder", "trusted")}


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
    members = {**_FOR_TRAINED_AGENTS, "argparse": SimpleNamespace(ArgumentParser=_AgentParser)}
    with _script("enjoy", (*_TRAINED_HERE, *arguments), rl_zoo3.enjoy, members):
        _import_gym_packages()
        rl_zoo3.enjoy.enjoy()


def record(arguments: Sequence[str]) -> None:
    """Record demonstrations of a trained agent, which is loaded as :func:`enjoy` does.

    :param arguments: the command line: that of :func:`enjoy` with other options for what is recorded
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: the environment needs an optional dependency
    """
    with _script("record", (*_TRAINED_HERE, *arguments), rl_zoo3.enjoy, _FOR_TRAINED_AGENTS):
        _import_gym_packages()
        agent = _LoadedAgent(rl_zoo3.enjoy)
        with closing(agent.env), refusing(EndlessEpisodeError, OSError, ValueError):
            seed, n_episodes, deterministic = agent.options.seed, agent.options.n_episodes, agent.deterministic
            demos = Demonstrations.from_model(
                agent.model, agent.env, n_episodes, deterministic=deterministic, seed=seed
            )
            path = demos.save(agent.options.output)
        print(f"{demos.summary()}\nWritten to {path}")


def record_video(arguments: Sequence[str]) -> None:
    """Record a video of a trained agent by ``rl_zoo3.record_video``. The default folder is ``logs``.

    It takes ``--trusted`` too, as :func:`enjoy` does.

    :param arguments: its command line, without the program's name
    :raises SystemExit: the arguments are wrong, or are ``--help``
    :raises MissingExtraError: recording or the environment needs an optional dependency
    """
    # The script has no function to call: its code is under `if __name__ == "__main__"`, and imports from utils.
    with _script("record-video", (*_TRAINED_HERE, *arguments), rl_zoo3.utils, _FOR_TRAINED_AGENTS):
        _import_gym_packages()
        sys.argv = [argument for argument in sys.argv if argument != _TRUSTED]
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
        with ExitStack() as stack:
            stack.enter_context(replaced(sys, {"argv": [name, *arguments]}))
            stack.enter_context(safe_files(_TRUSTED in arguments))
            stack.enter_context(replaced(module, members))
            stack.enter_context(extra_hints())
            yield
    except CommandError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


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

    def _add_options(self) -> None:
        """Add the options that rl_zoo3's script does not have."""
        self.add_argument(_TRUSTED, action="store_true", help=_TRUSTED_HELP)
        self.add_argument(
            "--checkpoint-every",
            type=int,
            default=CHECKPOINT_EVERY,
            metavar="N",
            help="env steps between two checkpoints, from which --resume goes on (default: %(default)s; 0 for none). "
            "They are deleted when the run has ended",
        )
        self.add_argument(
            "--resume",
            action="store_true",
            help="go on with the newest unfinished run of --algo on --env in --log-folder, as if it had not been "
            "interrupted. All other options are those of that run",
        )
        self.add_argument(
            "--pretrain",
            metavar="FILE",
            help="demonstrations that the policy learns from before training begins, and the critic too if they have "
            "rewards: an .npz, such as `sb3-pg record` writes, or HDF5 (extra `minari`)",
        )
        self.add_argument(
            "--anchor",
            type=_anchor_text,
            metavar="KIND:COEF[:DECAY]",
            help="hold the policy near the first one (kl:0.1), or near the demonstrations of --pretrain (demos:0.1), "
            "with this weight, which each update multiplies by DECAY (default: 1)",
        )

    def _take_saved_options(self, parsed: argparse.Namespace) -> None:
        """Replace the options by those of the run that is resumed.

        :raises SystemExit: there is no such run, or an option was given another value
        """
        run = unfinished_run(parsed.log_folder, parsed.algo, parsed.env)
        if run is None:
            self.error(
                f"argument --resume: {parsed.log_folder} has no unfinished run of {parsed.algo} on {parsed.env} with a "
                "checkpoint"
            )
        saved = saved_options(run, parsed.env)
        for name in () if parsed.trusted else (*_RUNS_CODE, "hyperparams"):
            is_code = name != "hyperparams" or not _CODE_PARAMETERS.isdisjoint(saved.get(name) or ())
            if is_code and saved.get(name) not in (None, self.get_default(name), vars(parsed)[name]):
                self.error(
                    f"argument --resume: the run in {run} was started with {name}={saved[name]!r}, which runs code. "
                    f"Give this option again, or, if you trust whoever wrote the folder, {_TRUSTED}"
                )
        for name, value in vars(parsed).items():
            if name in saved and value not in (saved[name], self.get_default(name)):
                self.error(
                    f"argument --resume: the run in {run} has {name}={saved[name]!r}, got {value!r}. Leave the option "
                    "out, or start a new run"
                )
        vars(parsed).update(saved, resume=str(run), log_folder=parsed.log_folder)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line, and check what would fail later.

        :raises SystemExit: it cannot be parsed, a number is out of range, or an env, file or module does not exist
        """
        self._add_options()
        parsed = super().parse_args(*args, **kwargs)
        if parsed.resume:
            self._take_saved_options(parsed)
        for name in ("eval_episodes", "n_eval_envs"):
            value = getattr(parsed, name)
            if value is not None and value < 1:
                self.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
        if parsed.pretrain is not None:
            self._check_pretrain(parsed)
        if parsed.anchor is not None:
            self._check_anchor(parsed)
        if parsed.log_interval == 0:
            self.error("argument --log-interval: must be at least 1, -1 (default) or -2 (no logging), got 0")
        for package in parsed.gym_packages:
            _import(self, "--gym-packages", package)
        if parsed.env not in gym.registry:
            close = difflib.get_close_matches(parsed.env, gym.registry, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            self.error(f"argument --env: no environment is registered as {parsed.env!r}{hint}")
        self._check_files(parsed)
        return parsed

    def _check_pretrain(self, parsed: argparse.Namespace) -> None:
        """Check that the algorithm has an actor that learns from demonstrations, and that there is a run.

        :raises SystemExit: it has none, or this is a search
        """
        able = [name for name, cls in ALGORITHMS.items() if hasattr(cls, "pretrain")]
        if parsed.algo not in able:
            self.error(f"argument --pretrain: {parsed.algo} has no pretrain, which these have: {', '.join(able)}")
        if parsed.optimize_hyperparameters:
            self.error("argument --pretrain: a search (--optimize-hyperparameters) has no model to pretrain")

    def _check_anchor(self, parsed: argparse.Namespace) -> None:
        """Check that the algorithm has anchors, and that there are demonstrations for one that needs them.

        :raises SystemExit: it has none, or there are none
        """
        cls = ALGORITHMS.get(parsed.algo)
        if "anchor" not in getattr(cls, "checks", ()):
            self.error(f"argument --anchor: {parsed.algo} has no anchors")
        if parsed.anchor.startswith("demos:") and parsed.pretrain is None:
            self.error(f"argument --anchor: {parsed.anchor} takes the demonstrations of --pretrain, which is not given")

    def _check_files(self, parsed: argparse.Namespace) -> None:
        """Check that the files that options name exist.

        :raises SystemExit: one does not
        """
        agent, config = Path(parsed.trained_agent), parsed.conf_file
        if parsed.trained_agent and not (agent.suffix == ".zip" and agent.is_file()):
            self.error(f"argument -i/--trained-agent: must be the path of a .zip file, got {str(agent)!r}")
        if config and config.endswith((".yml", ".yaml", ".py")):
            if not Path(config).is_file():
                self.error(f"argument -conf/--conf-file: there is no file {config!r}")
        elif config and not hasattr(_import(self, "-conf/--conf-file", config), "hyperparams"):
            self.error(f"argument -conf/--conf-file: module {config!r} has no dict 'hyperparams'")


def _anchor_text(text: str) -> str:
    """Return the value of ``--anchor``, once it is known to make one.

    :raises ArgumentTypeError: it makes none
    """
    try:
        read_anchor(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


class _AgentParser(argparse.ArgumentParser):
    """Builds the command line of a script for trained agents."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line.

        :raises SystemExit: it cannot be parsed
        """
        self.add_argument(_TRUSTED, action="store_true", help=_TRUSTED_HELP)
        return super().parse_args(*args, **kwargs)


class _RecordParser(_AgentParser):
    """Builds the command line of ``sb3-pg record``: that of enjoy, without what is for watching."""

    #: options of rl_zoo3 that are left out, by their destination, with their value
    LEFT_OUT: Final[Mapping[str, Any]] = {
        "n_timesteps": 1,  # all is recorded where the first action is asked for
        "no_render": True,
        "norm_reward": False,
        "reward_log": "",
        "progress": False,
    }

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an option, unless it is left out."""
        if names[-1].lstrip("-").replace("-", "_") in self.LEFT_OUT:
            return argparse.Action(names, "left_out")
        if "--n-envs" in names:
            options |= {"default": None, "help": "number of environments (default: 8, or one for each episode)"}
        return super().add_argument(*names, **options)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line.

        :raises SystemExit: it cannot be parsed, or a number is out of range
        """
        self.add_argument("--n-episodes", type=int, default=20, help="number of episodes (default: %(default)s)")
        self.add_argument(
            "-o", "--output", required=True, help="the file to write, .npz (Demonstrations.load reads it)"
        )
        self.set_defaults(**self.LEFT_OUT)
        parsed = super().parse_args(*args, **kwargs)
        if parsed.n_envs is None:
            parsed.n_envs = min(parsed.n_episodes, 8)
        for name in ("n_episodes", "n_envs"):
            if getattr(parsed, name) < 1:
                self.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {getattr(parsed, name)}")
        if Path(parsed.output).is_dir():
            self.error(f"argument -o/--output: must be a file, got the folder {parsed.output!r}")
        folder = next(path for path in Path(parsed.output).absolute().parents if path.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            self.error(f"argument -o/--output: nothing can be written to {str(folder)!r}")
        return parsed


class _FirstActionError(Exception):
    """The script asks its agent for the first action."""


class _LoadedAgent:
    """The agent and the envs that ``rl_zoo3.enjoy`` has made when it asks for the first action.

    :param script: the module, which makes envs and loads models by its members
    """

    model: Any
    env: VecEnv
    #: of the command line
    options: argparse.Namespace
    #: whether the script would take the most likely action
    deterministic: bool

    def __init__(self, script: Any) -> None:
        make_env: Callable[..., VecEnv] = script.create_test_env
        parser = _RecordParser()

        def parse_args() -> argparse.Namespace:
            self.options = parser.parse_args()
            return self.options

        def made(*args: Any, **kwargs: Any) -> VecEnv:
            self.env = make_env(*args, **kwargs | {"vec_env_cls": DummyVecEnv})  # processes take seconds to start
            return self.env

        def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self.model = cls.load(*args, **kwargs)
            self.model.env = None  # HER's is the one to record in
            return SimpleNamespace(predict=predict)

        def predict(*_: Any, deterministic: bool, **__: Any) -> None:
            self.deterministic = deterministic
            raise _FirstActionError

        members = {
            "argparse": SimpleNamespace(
                ArgumentParser=lambda: SimpleNamespace(add_argument=parser.add_argument, parse_args=parse_args)
            ),
            "create_test_env": made,
            "ALGOS": {name: SimpleNamespace(load=partial(load, cls)) for name, cls in script.ALGOS.items()},
        }
        with replaced(script, members), suppress(_FirstActionError):
            script.enjoy()


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


def _test_env(*args: Any, **kwargs: Any) -> Any:
    """Make envs as rl_zoo3 does, with the action masks that an agent of ours was trained with in their observations."""
    given: Mapping[str, Any] = kwargs.get("hyperparams") or {}
    use = False if given.get("use_action_masks") is False else None
    env = create_test_env(*args, **kwargs)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default="ppo")  # rl_zoo3's default
    is_ours = parser.parse_known_args()[0].algo in ALGORITHMS
    return with_action_masks(env, use, probe=True) if is_ours else env


#: Members of rl_zoo3's scripts for trained agents, with errors of the command line.
_FOR_TRAINED_AGENTS: Final = {
    "StoreDict": _PythonValues,
    "get_model_path": refusing(AssertionError, OSError, ValueError)(get_model_path),
    "create_test_env": refusing_env()(_test_env),
}
