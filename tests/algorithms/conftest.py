"""Fixtures of the algorithms' tests."""

import pytest

from tests.algorithms.every_algorithm import ALGORITHMS, Make


@pytest.fixture(params=list(ALGORITHMS))
def make(request: pytest.FixtureRequest) -> Make:
    return lambda env, **k: ALGORITHMS[request.param](env, **{"device": "cpu", "seed": 0, **k})
