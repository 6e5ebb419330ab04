"""A pytest plugin that swaps a class in for a peer's, runs the tests that exercise it, and writes what became of them.

``peer_tests.py`` copies it beside a peer's tests and tells it by the variable PEER_TESTS what to swap.
"""

import ast
import functools
import importlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peer_arguments import with_arguments_of
from stable_baselines3.common.base_class import BaseAlgorithm

#: package, name: what is replaced; by: its replacement in sb3_pg, None for itself; report: the file to write
SETTINGS: dict[str, Any] = json.loads(os.environ.get("PEER_TESTS", "{}"))


class Recorder:
    """Selects tests, and records which of them make an instance of the class under test, and their outcomes."""

    def __init__(self, package: str, name: str, by: str | None, report: str) -> None:
        self.name, self.report = name, Path(report)
        self.left_out: dict[str, str] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.made = False
        peer = importlib.import_module(package)
        ours = importlib.import_module("sb3_pg")
        self.tested: type[BaseAlgorithm] = getattr(peer, name)
        if by is not None:
            self.tested = with_arguments_of(name, getattr(ours, by))
        setattr(peer, name, self.tested)
        construct = BaseAlgorithm.__init__

        @functools.wraps(construct)
        def construct_and_record(model: BaseAlgorithm, *args: Any, **kwargs: Any) -> None:
            self.made = self.made or isinstance(model, self.tested)
            construct(model, *args, **kwargs)

        base: Any = BaseAlgorithm
        base.__init__ = construct_and_record

    @pytest.hookimpl(trylast=True)  # after -k and -m
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out tests of other classes."""
        selected, rest = [], []
        for item in items:
            reason = self.reason_to_leave_out(item)
            if reason is None:
                selected.append(item)
            else:
                self.left_out[item.nodeid] = reason
                rest.append(item)
        items[:] = selected
        config.hook.pytest_deselected(items=rest)

    def reason_to_leave_out(self, item: pytest.Item) -> str | None:
        """Why a test does not exercise the class; None where it may."""
        parameters = getattr(item, "callspec", None)
        classes = set(algorithms(parameters.params.values())) if parameters else set()
        if classes:
            return None if self.tested in classes else "parametrized with other classes"
        function = getattr(item, "originalname", item.name)
        return None if self.name in names_reached(item.path, function) else f"does not mention {self.name}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep files that cannot be imported, and those that skip themselves."""
        if report.outcome != "passed":
            self.outcomes[report.nodeid] = {"outcome": report.outcome, "why": why(report), "made": False}

    def pytest_runtest_setup(self) -> None:
        """Forget the last test's instances."""
        self.made = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst outcome of setup, call and teardown."""
        kept = self.outcomes.setdefault(report.nodeid, {"outcome": "passed", "why": ""})
        kept["made"] = self.made
        if report.outcome != "passed" and kept["outcome"] != "failed":
            kept["outcome"], kept["why"] = report.outcome, why(report)

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        self.report.write_text(json.dumps({"left_out": self.left_out, "outcomes": self.outcomes}))


def algorithms(values: Iterable[Any]) -> Iterator[type[BaseAlgorithm]]:
    """The algorithm classes among parameters of a test."""
    for value in values:
        if isinstance(value, type) and issubclass(value, BaseAlgorithm):
            yield value
        elif isinstance(value, list | tuple):
            yield from algorithms(value)


@functools.cache
def definitions(path: Path) -> dict[str, set[str]]:
    """Each module-level name of a file -> the names that its definition mentions, fixtures among them."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        mentioned: set[str] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                mentioned.add(part.id)
            elif isinstance(part, ast.arg):
                mentioned.add(part.arg)
            elif isinstance(part, ast.alias):
                mentioned.add(part.name)
        for name in defined:
            found.setdefault(name, set()).update(mentioned)
    return found


def names_reached(path: Path, function: str) -> set[str]:
    """The names that a test mentions, and those that the helpers and fixtures of its file mention for it."""
    reached, waiting = set(), [function]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += definitions(path).get(name, ())
    return reached


def why(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The reason of a skip, or the error of a traceback."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = report.longreprtext.strip().splitlines() or [report.outcome]
    return next((line.removeprefix("E").strip() for line in lines if line.startswith("E ")), lines[-1])


def pytest_configure(config: pytest.Config) -> None:
    """Swap the class before any test is imported."""
    config.pluginmanager.register(Recorder(**SETTINGS))
