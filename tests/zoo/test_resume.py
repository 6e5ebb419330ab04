"""``sb3-pg train --resume`` goes on with an interrupted run."""

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import pytest
import torch as th
from gymnasium.envs.classic_control import CartPoleEnv

from sb3_pg import ActorCritic
from sb3_pg.cli import main
from sb3_pg.zoo.scripts import unfinished_run
from tests.demonstrations.demos import cart_poles
from tests.helpers import parameters

ENV = "Own/Balance-v0"
TRAIN = f"train --algo actor_critic --env {ENV} --num-threads 1"
NEW = f"{TRAIN} -n 400 --eval-freq -1 --checkpoint-every 100 --seed 3 -params n_envs:2"


class Interrupted(gym.Wrapper[Any, Any, Any, Any]):
    """Sends SIGINT to its process in one step."""

    steps_left: ClassVar[int] = 0

    def step(self, action: Any) -> Any:
        type(self).steps_left -= 1
        if self.steps_left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.env.step(action)


@pytest.fixture(autouse=True)
def _env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    gym.register(ENV, lambda **kwargs: Interrupted(CartPoleEnv(**kwargs)), max_episode_steps=200)
    yield
    gym.registry.pop(ENV)


def sb3_pg(command: str) -> int:
    try:
        return main(shlex.split(command))
    except SystemExit as error:
        return int(error.code or 0)


def interrupt(command: str, after: int) -> None:
    Interrupted.steps_left = after
    sb3_pg(command)
    assert Interrupted.steps_left <= 0


def weights(folder: str) -> th.Tensor:
    (path,) = Path(folder).glob("actor_critic/*/Own-Balance-v0.zip")
    return parameters(ActorCritic.load(path, device="cpu"))


def test_a_resumed_run_ends_as_one_that_was_not_interrupted() -> None:
    assert sb3_pg(f"{NEW} -f whole") == 0
    assert unfinished_run("whole", "actor_critic", ENV) is None
    interrupt(f"{NEW} -f cut", after=130)
    run = unfinished_run("cut", "actor_critic", ENV)
    assert run == Path("cut/actor_critic/Own-Balance-v0_1")
    interrupt(f"{TRAIN} -f cut --resume", after=150)
    assert not th.equal(weights("cut"), weights("whole"))
    assert sb3_pg(f"{TRAIN} -f cut --resume") == 0
    assert th.equal(weights("cut"), weights("whole"))
    assert unfinished_run("cut", "actor_critic", ENV) is None


def test_a_run_that_was_pretrained(capsys: pytest.CaptureFixture[str]) -> None:
    """The demonstrations are not learned from again, and their file is not needed; the anchor goes on."""
    cart_poles().save("demos.npz")
    options = "--pretrain demos.npz --anchor demos:0.5:0.9"
    assert sb3_pg(NEW.replace(" -params", f" {options} -f whole -params")) == 0
    interrupt(NEW.replace(" -params", f" {options} -f cut -params"), after=130)
    Path("demos.npz").unlink()
    capsys.readouterr()
    assert sb3_pg(f"{TRAIN} -f cut --resume") == 0
    assert "Cloned" not in capsys.readouterr().out
    assert th.equal(weights("cut"), weights("whole"))


def test_a_run_that_cannot_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sb3_pg(f"{TRAIN} -f cut --resume") == 2
    assert "cut has no unfinished run of actor_critic on Own/Balance-v0" in capsys.readouterr().err
    interrupt(f"{NEW} -f cut", after=130)
    assert sb3_pg(f"{TRAIN} -f cut --resume --seed 4") == 2
    assert "has seed=3, got 4. Leave the option out, or start a new run" in capsys.readouterr().err
    next(Path("cut").rglob("args.yml")).write_text("- 1")
    assert sb3_pg(f"{TRAIN} -f cut --resume") == 2
    assert "error: --resume: " in capsys.readouterr().err
