"""The runner of the peers' tests, on a clone that is made up."""

import itertools
import os
from pathlib import Path
from typing import Any

import peer_tests
import pytest

CLONE = {
    "stable_baselines3/version.txt": "0.0.1\n",
    "tests/test_made_up.py": """
import pytest
from stable_baselines3 import A2C, PPO

@pytest.fixture
def model():
    return A2C("MlpPolicy", "CartPole-v1", device="cpu")

def helper(cls=A2C):
    return cls("MlpPolicy", "CartPole-v1", device="cpu")

def test_fixture(model, tmp_path):
    assert type(model).__module__.startswith("sb3_pg.")
    (tmp_path / "written").touch()

@pytest.mark.parametrize("cls", [A2C, PPO])
def test_classes(cls):
    assert cls("MlpPolicy", "CartPole-v1", device="cpu").learn(8).num_timesteps >= 8

@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_helper(name):
    assert (helper if name == "a2c" else PPO)

def test_ours_alone_fails():
    assert type(helper()).__name__ == "A2C", "it has another name"

def test_differs():
    assert type(helper()).__name__ == "A2C"

def test_both_fail():
    helper()
    raise ValueError("a package is missing")

@pytest.mark.skip(reason="not today")
def test_skipped():
    helper()

def test_something_else():
    assert PPO
""",
    "tests/test_broken.py": "import no_such_module\nfrom stable_baselines3 import A2C\n",
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name, text in CLONE.items():
        path = tmp_path / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "clone"


def test_tests_are_told_apart_and_the_clone_stays_as_it_is(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setitem(peer_tests.DIFFERENCES, "tests/test_made_up.py::test_differs", "on purpose")
    assert peer_tests.main([str(clone)]) == 1
    printed = capfd.readouterr().out
    printed = printed[printed.index("stable_baselines3.A2C is sb3_pg.ActorCritic") :]
    lines = [line.strip() for line in printed.splitlines()]
    name = "tests/test_made_up.py::test_"
    kinds = ("passed", "of something else", "left out", "failed", "clone")
    where = [next(i for i, line in enumerate(lines) if line.startswith(f"{kind}:")) for kind in kinds]
    passed, others, left_out, failed = (lines[i:j] for i, j in itertools.pairwise(where))
    assert passed == ["passed: 2", f"{name}fixture", f"{name}classes"]
    assert others == [
        "of something else: 4",
        f"{name}classes: parametrized with other classes",
        f"{name}something_else: does not mention A2C",
        f"{name}helper (2): makes no A2C",
    ]
    too = "fails with stable_baselines3.A2C too"
    assert left_out == [
        "left out: 4",
        f"{name}differs: on purpose",
        f"{name}skipped: skipped: not today",
        f"tests/test_broken.py: {too}: ModuleNotFoundError: No module named 'no_such_module'",
        f"{name}both_fail: {too}: ValueError: a package is missing",
    ]
    assert failed[0] == "failed: 1"
    assert failed[1].startswith(f"{name}ours_alone_fails: AssertionError: it has another name")
    assert lines[where[-1]].startswith("clone: stable_baselines3 0.0.1; installed: python=")
    assert lines[-1].endswith("2 passed, 1 failed, 4 left out, 4 of something else")
    assert {path.relative_to(clone).as_posix() for path in clone.rglob("*") if path.is_file()} == set(CLONE)


def test_arguments_of_pytest_choose_among_the_tests(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert peer_tests.main([str(clone), "--pytest", "-k", "classes", "--ignore=tests/test_broken.py"]) == 0
    assert "1 passed, 0 failed, 0 left out, 1 of something else" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([peer_tests.Result(passed=["a"]), peer_tests.Result(passed=["a"])], 0),
        ([peer_tests.Result(passed=["a"]), peer_tests.Result(passed=["a"], failed={"b": "wrong"})], 1),
        ([peer_tests.Result(passed=["a"]), peer_tests.Result(of_others={"b": "skipped"})], 1),
    ],
)
def test_sb3_contribs_are_run_with_both_classes(
    results: list[peer_tests.Result], status: int, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clone / "stable_baselines3").rename(clone / "sb3_contrib")
    runs: list[tuple[Any, ...]] = []

    def run(_: Path, *swap: Any) -> peer_tests.Result:
        runs.append(swap)
        return results[len(runs) - 1]

    monkeypatch.setattr(peer_tests, "run_peer_tests", run)
    assert peer_tests.main([str(clone)]) == status
    assert runs == [("sb3_contrib", "TRPO", "TRPO", []), ("sb3_contrib", "TRPO", "NPG", [])]


@pytest.mark.parametrize("missing", ["stable_baselines3", "tests"])
def test_no_clone(clone: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    (clone / missing).rename(clone / "moved")
    with pytest.raises(SystemExit):
        peer_tests.main([str(clone)])
    assert f"stable_baselines3/ or sb3_contrib/, got {clone}" in capsys.readouterr().err
