"""The Pythons and the dependencies that pyproject.toml promises are those that the tests run on."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [
    match[1]
    for text in PROJECT["classifiers"]
    if (match := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text))
]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]

STUB_PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && echo {version}
"""
STUB_MAKE = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
echo 7 passed
case "$*" in *{broken}*) exit 1 ;; esac
"""


def test_requires_python_names_the_oldest_classifier() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert sorted(PYTHONS, key=Version) == PYTHONS


def test_readme_and_makefile_name_the_pythons() -> None:
    assert f"a machine with Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}, " in (ROOT / "README.md").read_text()
    assert f"# Needs Python {PYTHONS[0]} to {PYTHONS[-1]}, " in (ROOT / "Makefile").read_text()


def test_hosted_ci_runs_every_python() -> None:
    assert JOBS["pythons"]["strategy"]["matrix"]["python"] == PYTHONS


def test_hosted_ci_runs_targets_that_exist() -> None:
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    targets = {"test-all", "check", "docs", "test-wheel", "test-lowest", "test-newest"}
    assert {f"make {target}" for target in targets} == set(commands)
    for command in commands:
        subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)


def test_lowest_dependencies_run_on_the_oldest_python() -> None:
    (version,) = [step["with"]["python-version"] for step in JOBS["lowest"]["steps"] if "with" in step]
    assert version == PYTHONS[0]


def test_every_dependency_has_a_lower_bound_that_the_lowest_constraints_pin() -> None:
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    wanted = {
        requirement.name: requirement for requirement in map(Requirement, texts) if ">=" in str(requirement.specifier)
    }
    command = [sys.executable, str(ROOT / ".ci/lowest_constraints.py")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pinned = {requirement.name: requirement for requirement in map(Requirement, output.splitlines())}
    assert pinned.keys() == wanted.keys() == {Requirement(text).name for text in texts} - {"sb3_pg"}
    for name, requirement in wanted.items():
        (bound,) = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        assert pinned[name].specifier == SpecifierSet(f"=={bound}")
        assert str(pinned[name].marker) == str(requirement.marker)


def run_test_pythons(
    tmp_path: Path, installed: list[str], broken: str = "none", **environment: str
) -> tuple[int, str, list[str]]:
    """Run .ci/test-pythons where pyenv has ``installed`` and ``make`` fails for the Python ``broken``."""
    stubs = {f"pyenv/versions/{version}.1/bin/python3": STUB_PYTHON.format(version=version) for version in installed}
    stubs |= {f"bin/python{version}": "#!/bin/sh\nexit 127\n" for version in PYTHONS}  # pyenv's shims, none chosen
    stubs["bin/make"] = STUB_MAKE.format(broken=broken)
    for name, text in stubs.items():
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(text)
        stub.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    settings = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYENV_ROOT": str(tmp_path / "pyenv"),
        "CALLS": str(calls),
    }
    done = subprocess.run(
        [str(ROOT / ".ci/test-pythons")],
        env={**{name: value for name, value in os.environ.items() if name != "PYTHONS"}, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, calls.read_text().splitlines()


def test_test_pythons_runs_every_python(tmp_path: Path) -> None:
    status, output, calls = run_test_pythons(tmp_path, PYTHONS)
    assert status == 0
    assert calls == [
        f"test PYTHON={tmp_path}/pyenv/versions/{version}.1/bin/python3 VENV=.venv-{version}" for version in PYTHONS
    ]
    summary = output.splitlines()[-len(PYTHONS) :]
    for version, line in zip(PYTHONS, summary, strict=True):
        assert re.fullmatch(rf"Python {re.escape(version)}: passed in \d+ s: 7 passed", line)


def test_test_pythons_fails_where_one_python_fails_and_runs_the_others(tmp_path: Path) -> None:
    status, output, calls = run_test_pythons(tmp_path, PYTHONS, broken=PYTHONS[0])
    assert status == 1
    assert len(calls) == len(PYTHONS)
    assert f"Python {PYTHONS[0]}: FAILED" in output
    assert f"Python {PYTHONS[1]}: passed" in output


def test_test_pythons_passes_over_a_python_that_is_not_installed(tmp_path: Path) -> None:
    status, output, calls = run_test_pythons(tmp_path, PYTHONS[1:])
    assert status == 0
    assert len(calls) == len(PYTHONS) - 1
    assert f"Python {PYTHONS[0]}: not found" in output


@pytest.mark.parametrize(("chosen", "status"), [("3.10", 0), ("3.10 3.13", 0), ("3.10 3.99", 1)])
def test_test_pythons_runs_the_chosen_ones(tmp_path: Path, chosen: str, status: int) -> None:
    found, output, calls = run_test_pythons(tmp_path, PYTHONS, PYTHONS=chosen)
    assert found == status
    assert [call.partition("VENV=.venv-")[2] for call in calls] == [word for word in chosen.split() if word in PYTHONS]
    assert ("Python 3.99: not found" in output) == (status == 1)


def test_test_pythons_fails_where_no_python_is_found(tmp_path: Path) -> None:
    status, _, calls = run_test_pythons(tmp_path, [])
    assert status == 1
    assert not calls
