"""Run the tests of stable-baselines3, or of sb3-contrib, with a class of this package swapped in for theirs.

    python benchmarks/peer_tests.py ~/stable-baselines3              # A2C is ActorCritic
    python benchmarks/peer_tests.py ~/stable-baselines3-contrib      # TRPO is ours, then NPG; then RecurrentPPO and
                                                                     # MaskablePPO are KLPenaltyPG

Takes the path of a clone, at the tag of the version that is installed. The clone stays as it is: its tests are copied
into a temporary folder and run there in a process of their own, against the installed package.

A test takes part if it is parametrized with the class, or if it, a helper or a fixture that it uses mentions the class.
One that then makes no instance of the class counts as a test of something else. A test that fails is run again with the
peer's own class. If that fails too, the reason is not ours (a package or a download that is missing, most often), and
the test is left out, as are those that pytest skips, and those in DIFFERENCES if they fail with the error named there.

The exit status is 1 if a test fails, or if none ran.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench_io import make_parser, versions

#: Folder in the clone -> the classes that are replaced, and by which of ours.
SWAPS: dict[str, tuple[tuple[str, str], ...]] = {
    "stable_baselines3": (("A2C", "ActorCritic"),),
    "sb3_contrib": (
        ("TRPO", "TRPO"),
        ("TRPO", "NPG"),
        ("RecurrentPPO", "KLPenaltyPG"),
        ("MaskablePPO", "KLPenaltyPG"),
    ),
}


class Difference(NamedTuple):
    """A way in which our classes differ from the peer's on purpose, and the error in which it shows."""

    error: str
    reason: str


_NO_ERROR = "Failed: DID NOT RAISE"
_NEEDS_MASKS = Difference("predict needs action masks", "a policy that was trained with masks does not act without")
_INVALID = "tests/test_invalid_actions.py::test_"
#: Tests, of all parameters or of some, that fail because of a difference. With another error they count as failed.
DIFFERENCES: dict[str, Difference] = {
    "tests/test_tensorboard.py::test_tensorboard[a2c]": Difference(
        "assert", "the TensorBoard run is named after the class, not A2C"
    ),
    "tests/test_lstm.py::test_check": Difference(
        _NO_ERROR, "Memory's critic is one of three words, which cannot contradict each other as two flags can"
    ),
    "tests/test_lstm.py::test_ppo_lstm_performance": Difference(
        "Mean reward below threshold",
        "a score of 450 with one seed and PPO's settings; with seeds 0 to 4 KLPenaltyPG has 390 to 500, two above",
    ),
    f"{_INVALID}disabling_masking": _NEEDS_MASKS,
    f"{_INVALID}masked_evaluation": _NEEDS_MASKS,
    f"{_INVALID}supports_multi_envs": Difference(
        _NO_ERROR, "an env without masks is an error with use_action_masks=True, not with learn(use_masking=True)"
    ),
    f"{_INVALID}maskable_policy_required": Difference(_NO_ERROR, "SB3's own policies take masks"),
    f"{_INVALID}discrete_action_space_required": Difference(_NO_ERROR, "Box actions are learned too, without masks"),
}
PLUGIN = Path(__file__).with_name("peer_tests_plugin.py")
ARGUMENTS = Path(__file__).with_name("peer_arguments.py")


@dataclass
class Result:
    """What became of a peer's tests: names -> the reason, or the error."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    of_others: dict[str, str] = field(default_factory=dict)

    def counts(self) -> str:
        """How many tests there are of each kind."""
        return (
            f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.left_out)} left out, "
            f"{len(self.of_others)} of something else"
        )


def package_of(clone: Path) -> str:
    """The package of a clone.

    :raises ValueError: it is neither stable-baselines3 nor sb3-contrib, or has no tests
    """
    found = [package for package in SWAPS if (clone / package).is_dir()]
    if len(found) != 1 or not (clone / "tests").is_dir():
        allowed = " or ".join(f"{package}/" for package in SWAPS)
        raise ValueError(f"clone must be a folder that holds tests/ and {allowed}, got {clone}")
    return found[0]


def run_pytest(
    folder: Path, package: str, name: str, by: str | None, arguments: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Run tests in a process of their own.

    :param folder: it holds the copied tests, and takes what they write
    :param by: name of our class, None for the peer's own
    :param arguments: of pytest
    :return: as the plugin writes it
    :raises RuntimeError: pytest ended before it could run a test
    """
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    settings = {"package": package, "name": name, "by": by, "report": str(report)}
    paths = [str(folder / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PEER_TESTS": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder / "tmp"),  # SB3's logs
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        PLUGIN.stem,
        "-q",
        "--no-header",
        "--tb=short",
        "--continue-on-collection-errors",
    ]
    command += ["-p", "no:cacheprovider", "--basetemp", str(folder / "basetemp"), *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, check=False)
    if process.returncode not in (0, 1, 5) or not report.exists():  # all passed, some failed, none was collected
        raise RuntimeError(f"pytest ended with exit status {process.returncode}")
    found: dict[str, dict[str, Any]] = json.loads(report.read_text())
    return found


def copy_tests(clone: Path, folder: Path) -> None:
    """Put a clone's tests, their settings and the plugin into a folder."""
    shutil.copytree(clone / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for settings in ("pyproject.toml", "setup.cfg", "pytest.ini"):
        if (clone / settings).exists():
            shutil.copy(clone / settings, folder)
    for subfolder in ("plugin", "tmp"):
        (folder / subfolder).mkdir()
    for module in (PLUGIN, ARGUMENTS):
        shutil.copy(module, folder / "plugin")


def sort_out(found: dict[str, dict[str, Any]], name: str) -> Result:
    """What the plugin wrote, by kind."""
    result = Result(of_others=dict(found["left_out"]))
    for test, outcome in found["outcomes"].items():
        difference = DIFFERENCES.get(test) or DIFFERENCES.get(test.partition("[")[0])
        if outcome["outcome"] == "failed" and difference is not None and difference.error in outcome["why"]:
            result.left_out[test] = difference.reason
        elif outcome["outcome"] == "failed":
            result.failed[test] = outcome["why"]
        elif outcome["outcome"] == "skipped":
            result.left_out[test] = f"skipped: {outcome['why'].removeprefix('Skipped: ')}"
        elif outcome["made"]:
            result.passed.append(test)
        else:
            result.of_others[test] = f"makes no {name}"
    return result


def run_peer_tests(clone: Path, package: str, name: str, by: str, arguments: Sequence[str] = ()) -> Result:
    """Run a clone's tests with one class swapped in.

    :param arguments: of pytest, to choose among the tests
    """
    with tempfile.TemporaryDirectory(prefix="peer-tests-") as made:
        folder = Path(made)
        copy_tests(clone, folder)
        result = sort_out(run_pytest(folder, package, name, by, ["tests", *arguments]), name)
        if result.failed:
            for test, outcome in run_pytest(folder, package, name, None, list(result.failed))["outcomes"].items():
                if outcome["outcome"] == "failed":
                    del result.failed[test]
                    result.left_out[test] = f"fails with {package}.{name} too: {outcome['why']}"
    return result


def by_function(tests: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each test function and reason, with the number of its parametrizations."""
    counts: dict[tuple[str, str], int] = {}
    for test, reason in tests:
        key = test.partition("[")[0], reason
        counts[key] = counts.get(key, 0) + 1
    return [
        f"{test}{f' ({count})' if count > 1 else ''}{f': {reason}' if reason else ''}"
        for (test, reason), count in counts.items()
    ]


def describe(result: Result, title: str) -> str:
    """All tests, by what became of them."""
    parts = [
        ("passed", [(test, "") for test in result.passed]),
        ("of something else", list(result.of_others.items())),
        ("left out", list(result.left_out.items())),
        ("failed", list(result.failed.items())),
    ]
    lines = [title]
    for what, tests in parts:
        listed = [f"{test}: {why}" for test, why in tests] if what == "failed" else by_function(tests)
        lines += [f"{what}: {len(tests)}", *(f"  {line}" for line in listed)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script.

    :return: the exit status
    """
    parser = make_parser(__doc__)
    parser.add_argument("clone", type=Path, help="path of a clone of stable-baselines3 or stable-baselines3-contrib")
    parser.add_argument("--classes", nargs="+", help="the peer's classes, e.g. RecurrentPPO; default: all")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more arguments of pytest, e.g. -k cnn")
    args = parser.parse_args(arguments)
    try:
        package = package_of(args.clone)
    except ValueError as error:
        parser.error(str(error))
    version_file = args.clone / package / "version.txt"
    version = version_file.read_text().strip() if version_file.exists() else "unknown"
    known = [name for name, _ in SWAPS[package]]
    if unknown := set(args.classes or ()).difference(known):
        parser.error(f"argument --classes: must be among {sorted(set(known))}, got {sorted(unknown)}")
    swaps = [(name, by) for name, by in SWAPS[package] if name in (args.classes or known)]
    results = []
    for name, by in swaps:
        result = run_peer_tests(args.clone, package, name, by, args.pytest)
        results.append(result)
        print(describe(result, f"\n{package}.{name} is sb3_pg.{by}"), flush=True)
    print(f"\nclone: {package} {version}; installed: {versions('stable_baselines3', 'sb3_contrib', 'torch')}")
    for (name, by), result in zip(swaps, results, strict=True):
        print(f"{package}.{name} is sb3_pg.{by}: {result.counts()}")
    return 0 if all(result.passed and not result.failed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
