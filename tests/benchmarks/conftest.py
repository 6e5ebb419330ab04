"""The benchmark scripts are no package: they run from their folder. Worker processes inherit the path."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "benchmarks"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the tests in this folder among the slow ones: they run scripts that users of the package do not have."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
