"""Fixtures of all tests."""

from __future__ import annotations

import multiprocessing.util
import os
import tempfile
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch as th

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that need Ray where it is not installed."""
    if find_spec("ray") is None:
        for item in items:
            if item.get_closest_marker("ray"):
                item.add_marker(pytest.mark.skip(reason="Ray is not installed"))


@pytest.fixture(autouse=True, scope="session")
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder for all temporary files, of child processes too, which is removed at the end.

    SB3 makes a folder of logs for every ``learn``, and torch and multiprocessing leave some of theirs.
    """
    tmp_path_factory.getbasetemp()  # stays outside: pytest keeps those of the last three runs
    multiprocessing.util.get_temp_dir()  # this too: it is removed when the process ends, which must find it
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="sb3_pg-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        yield
        variable, tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        if variable is not None:
            os.environ["TMPDIR"] = variable


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For thousands of tiny batches: more threads only get in each other's way."""
    n_threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(n_threads)
