"""The runner of the peers' tests, on a clone that is made up."""

import itertools
import os
from pathlib import Path
from typing import Any

import peer_arguments
import peer_tests
import pytest

from sb3_pg.policies import Memory

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
    for name, error in (("differs", "AssertionError"), ("ours_alone_fails", "another error")):
        difference = peer_tests.Difference(error, "on purpose")
        monkeypatch.setitem(peer_tests.DIFFERENCES, f"tests/test_made_up.py::test_{name}", difference)
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


TRPO_RUNS: list[Any] = [("sb3_contrib", "TRPO", "TRPO", []), ("sb3_contrib", "TRPO", "NPG", [])]
PPO_RUNS: list[Any] = [("sb3_contrib", name, "KLPenaltyPG", []) for name in ("RecurrentPPO", "MaskablePPO")]


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (peer_tests.Result(passed=["a"]), 0),
        (peer_tests.Result(passed=["a"], failed={"b": "wrong"}), 1),
        (peer_tests.Result(of_others={"b": "skipped"}), 1),
    ],
)
@pytest.mark.parametrize(
    ("classes", "expected"), [([], TRPO_RUNS + PPO_RUNS), (["TRPO"], TRPO_RUNS), (["MaskablePPO", "TRPO"], None)]
)
def test_sb3_contribs_are_run_with_all_classes_or_with_some(
    second: peer_tests.Result, status: int, classes: list[str], expected: Any, clone: Path, monkeypatch: Any
) -> None:
    (clone / "stable_baselines3").rename(clone / "sb3_contrib")
    runs: list[tuple[Any, ...]] = []

    def run(_: Path, *swap: Any) -> peer_tests.Result:
        runs.append(swap)
        return second if len(runs) == 2 else peer_tests.Result(passed=["a"])

    monkeypatch.setattr(peer_tests, "run_peer_tests", run)
    assert peer_tests.main([str(clone), *(["--classes", *classes] if classes else [])]) == status
    assert runs == (expected or [*TRPO_RUNS, PPO_RUNS[1]])


def test_classes_that_are_not_known(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peer_tests.main([str(clone), "--classes", "PPO"])
    assert "must be among ['A2C'], got ['PPO']" in capsys.readouterr().err


CONTRIB = """
import pytest
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

def test_memory():
    policy_kwargs = dict(lstm_hidden_size=4, n_lstm_layers=2, shared_lstm=True, enable_critic_lstm=False)
    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=16, clip_range=0.1, policy_kwargs=policy_kwargs)
    memory = model.learn(32).policy.memory
    assert (memory.hidden_size, memory.n_layers, memory.critic, model.n_steps) == (4, 2, "shared", 16)

def test_masks():
    model = MaskablePPO("MlpPolicy", InvalidActionEnvDiscrete(), n_steps=16, clip_range_vf=0.1, policy_kwargs=None)
    assert model.learn(32).uses_masks
"""


@pytest.mark.parametrize(("name", "test"), [("RecurrentPPO", "memory"), ("MaskablePPO", "masks")])
def test_our_classes_take_the_arguments_of_sb3_contribs(
    name: str, test: str, clone: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    (clone / "stable_baselines3").rename(clone / "sb3_contrib")
    (clone / "tests/test_broken.py").unlink()
    (clone / "tests/test_made_up.py").write_text(CONTRIB)
    assert peer_tests.main([str(clone), "--classes", name]) == 0
    printed = capfd.readouterr().out
    assert f"tests/test_made_up.py::test_{test}\n" in printed
    assert printed.rstrip().endswith(
        f"sb3_contrib.{name} is sb3_pg.KLPenaltyPG: 1 passed, 0 failed, 0 left out, 1 of something else"
    )


@pytest.mark.parametrize(
    ("flags", "critic"),
    [
        ({}, "own"),
        ({"enable_critic_lstm": False}, "none"),
        ({"enable_critic_lstm": False, "shared_lstm": True}, "shared"),
    ],
)
def test_recurrent_ppos_flags_are_a_word_of_memory(flags: dict[str, bool], critic: str) -> None:
    given = {"policy": "CnnLstmPolicy", "env": None, "policy_kwargs": {**flags, "lstm_kwargs": {}, "net_arch": [4]}}
    found = peer_arguments.of_recurrent_ppo(given)
    memory = Memory("lstm", 256, critic=critic)  # type: ignore[arg-type]
    rest = {"policy": "CnnPolicy", "policy_kwargs": {"net_arch": [4]}, "n_steps": 128, "env": None}
    assert found == {"memory": memory, **rest}
    with pytest.raises(ValueError, match="policy must be MlpLstmPolicy"):
        peer_arguments.of_recurrent_ppo({**given, "policy": "MlpPolicy"})


@pytest.mark.parametrize("missing", ["stable_baselines3", "tests"])
def test_no_clone(clone: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    (clone / missing).rename(clone / "moved")
    with pytest.raises(SystemExit):
        peer_tests.main([str(clone)])
    assert f"stable_baselines3/ or sb3_contrib/, got {clone}" in capsys.readouterr().err
