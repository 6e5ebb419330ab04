"""The command line: ``sb3-pg COMMAND ...``, also ``python -m sb3_pg COMMAND ...``."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from sb3_pg import __version__
from sb3_pg.extras import MissingExtraError


class _Command(NamedTuple):
    help: str
    module: str  # imported when the command runs, so that `--help` is fast
    function: str


COMMANDS: Final = {
    "train": _Command("train an agent, or optimize hyperparameters (rl_zoo3.train)", "sb3_pg.zoo.scripts", "train"),
    "enjoy": _Command("watch or score an agent trained here (rl_zoo3.enjoy)", "sb3_pg.zoo.scripts", "enjoy"),
    "record": _Command("record demonstrations of an agent trained here", "sb3_pg.zoo.scripts", "record"),
    "record-video": _Command(
        "record a video of an agent trained here (rl_zoo3.record_video)", "sb3_pg.zoo.scripts", "record_video"
    ),
    "plot": _Command("draw learning curves with confidence bands", "sb3_pg.reporting.plots", "main"),
    "report": _Command("scores, curves and comparisons of several algorithms", "sb3_pg.reporting.report", "main"),
    "watch": _Command("follow running trainings on a local page (TensorBoard)", "sb3_pg.reporting.watch", "main"),
    "demo": _Command("learn CartPole-v1 in under a minute", "sb3_pg.demo", "main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    :param argv: the command and its arguments; None for those of the process
    :return: exit code: 0 for success, 1 if the command failed, 2 if there is no command
    :raises SystemExit: after ``--help`` and ``--version``, and if the arguments cannot be parsed
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    name = parser.parse_args(argv[:1]).command
    if name is None:
        parser.print_help(sys.stderr)
        return 2
    if name not in COMMANDS:
        closest = [command for command in COMMANDS if command.startswith(name)]
        closest = closest or difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {closest[0]!r}?" if closest else f"choose from {', '.join(COMMANDS)}"
        parser.error(f"unknown command {name!r}: {hint}")
    command = COMMANDS[name]
    try:
        code: int | None = getattr(importlib.import_module(command.module), command.function)(argv[1:])
    except MissingExtraError as error:
        print(f"sb3-pg {name}: error: {error}", file=sys.stderr)
        return 1
    return code or 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="sb3-pg",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Policy-gradient algorithms for Gymnasium and Stable-Baselines3.",
        epilog="\n".join(["commands:", *lines, "", "sb3-pg COMMAND --help lists the options of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    return parser
