"""Whatever ends training in the middle, the model is as before, says what has happened, and goes on."""

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_pg import ActorCritic, OffPAC
from sb3_pg.rollout import EnvWorkerError
from tests.algorithms.every_algorithm import ALGORITHMS
from tests.helpers import ScriptedEnv, vec

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")
MODELS: dict[str, Callable[..., Any]] = {
    **ALGORITHMS,
    "actor-critic-traces": lambda env, **k: ActorCritic(
        "MlpPolicy", env, **{"n_steps": 1, "advantage": "td_lambda", "gae_lambda": 0.9, **k}
    ),
    "off-pac": lambda env, **k: OffPAC(
        "MlpPolicy", env, **{"learning_starts": 8, "batch_size": 8, "buffer_size": 200, "train_freq": 8, **k}
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, env: Any) -> Any:
    return MODELS[name](env, device="cpu", seed=0, policy_kwargs={"net_arch": [8]})


def state(model: Any) -> dict[str, Any]:
    """A copy of all that training changes, but for the rollout buffer, which every rollout fills anew."""
    of_torch: Any = copy.deepcopy(model.get_parameters())
    for optimizer in of_torch.values():  # schedules set the rate anew before every update
        for group in optimizer.get("param_groups", []):
            group["lr"] = None
    buffer = getattr(model, "replay_buffer", None)
    kept = {} if buffer is None else {k: copy.deepcopy(v) for k, v in vars(buffer).items() if k != "device"}
    learner = getattr(model, "learner_state", None)
    return {
        "torch": of_torch,
        "buffer": kept,
        "learner": None if learner is None else copy.deepcopy(learner.state_dict()),
        "kl_coef": getattr(model, "kl_coef", None),
        "n_updates": model._n_updates,
    }


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, th.Tensor):
        assert th.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif not isinstance(one, np.random.Generator) and type(one).__module__.startswith(("builtins", "numpy")):
        assert one == other, where


def goes_on(model: Any, tmp_path: Path) -> None:
    """Require that the model saves, loads and learns."""
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert_equal(loaded.get_parameters()["policy"], model.get_parameters()["policy"])
    before = model._n_updates
    model.learn(200)
    assert model._n_updates > before


class Interrupt(BaseCallback):
    """Raises KeyboardInterrupt at a step, at the start or at the end of a rollout; keeps the model's state before.

    :param where: "step", "start" or "end"
    :param at: number of calls of this hook before
    """

    def __init__(self, where: str, at: int) -> None:
        super().__init__()
        self.where, self.at = where, at
        self.before: dict[str, Any] = {}

    def _now(self, where: str) -> None:
        if where == "start":
            self.before = state(self.model)
        if where == self.where:
            self.at -= 1
            if self.at < 0:
                raise KeyboardInterrupt

    def _on_step(self) -> bool:
        self._now("step")
        return True

    def _on_rollout_start(self) -> None:
        self._now("start")

    def _on_rollout_end(self) -> None:
        if self.where == "end":
            self.before = state(self.model)  # the rollout's episodes may be in the replay buffer now
        self._now("end")


@pytest.mark.parametrize(("where", "at"), [("step", 0), ("step", 77), ("start", 2), ("end", 1)])
@each_model
def test_an_interrupt_between_steps(name: str, where: str, at: int, tmp_path: Path) -> None:
    if name == "off-pac" and where == "step":
        pytest.skip("its transitions are stored one by one")
    model, callback = make(name, vec(ScriptedEnv((7, 3)), ScriptedEnv((4, 9)))), Interrupt(where, at)
    with pytest.raises(KeyboardInterrupt):
        model.learn(400, callback)
    assert_equal(state(model), callback.before)
    goes_on(model, tmp_path)


@each_model
def test_an_interrupt_as_autograd_is_switched_off(name: str) -> None:
    """Python may deliver ctrl-C between the first line of ``th.no_grad().__enter__`` and the block."""

    class Unlucky(BaseCallback):
        def _on_step(self) -> bool:
            th.set_grad_enabled(False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(name, vec(ScriptedEnv((7, 3)))).learn(400, Unlucky())
    is_on = th.is_grad_enabled()
    th.set_grad_enabled(True)
    assert is_on


def interrupt_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int) -> None:
    """Let a function raise KeyboardInterrupt after its n-th call has done its work."""
    done, calls = getattr(owner, name), [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = done(*args, **kwargs)
        calls[0] += 1
        if calls[0] == n:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("n", [1, 2, 4])
@each_model
def test_an_interrupt_within_an_update(name: str, n: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After a step of an optimizer, parameters and statistics are those from before the update."""
    model = make(name, vec(ScriptedEnv((7, 3)), ScriptedEnv((4, 9)))).learn(200)
    before: list[Any] = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            before[:] = [state(model)]

    look = Look()
    train = model.train
    if name.startswith("off-policy"):  # each of its gradient steps is an update of its own
        model.gradient_steps = 1
    if name.startswith("async"):  # so is each of its epochs
        model.n_epochs = 1
    with monkeypatch.context() as patched:
        optimizers = {id(o): o for o in _optimizers(model)}.values()
        for optimizer in optimizers:
            interrupt_after(patched, optimizer, "step", n)

        def looked(*args: Any, **kwargs: Any) -> None:
            before[:] = [state(model)]
            train(*args, **kwargs)

        patched.setattr(model, "train", looked)
        with pytest.raises(KeyboardInterrupt):
            model.learn(2000, look, reset_num_timesteps=False)
    assert_equal(state(model), before[0])
    goes_on(model, tmp_path)


def _optimizers(model: Any) -> list[Any]:
    if isinstance(model, OffPAC):
        return [model.actor.optimizer, model.critic.optimizer]
    return [one for one in (model.policy.optimizer, model.critic_optimizer) if one is not None]


class CrashError(Exception):
    pass


class CrashingEnv(ScriptedEnv):
    """Raises an error of its own at one step of its life.

    :param at: the step, from 1
    """

    def __init__(self, at: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.at, self.life = at, 0

    def step(self, action: Any) -> Any:
        self.life += 1
        if self.life == self.at:
            raise CrashError("the simulator has crashed")
        return super().step(action)


@pytest.mark.parametrize("normalized", [False, True])
@each_model
def test_an_error_of_an_env_goes_through(name: str, normalized: bool, tmp_path: Path) -> None:
    env: Any = vec(ScriptedEnv((7, 3)), CrashingEnv(50, lengths=(4, 9)))
    callback = Interrupt("never", 0)
    model = make(name, VecNormalize(env) if normalized else env)
    with pytest.raises(CrashError, match=r"^the simulator has crashed$"):
        model.learn(400, callback)
    after = state(model)
    assert_equal(after["torch"], callback.before["torch"])
    if name != "off-pac":
        assert_equal(after, callback.before)
    goes_on(model, tmp_path)


def _env() -> gym.Env[Any, Any]:
    return ScriptedEnv((7, 3))


def _crashing() -> gym.Env[Any, Any]:
    return CrashingEnv(20, lengths=(4, 9))


def forked(*envs: Callable[[], gym.Env[Any, Any]]) -> Any:
    """Envs in processes that begin at once. Each also holds the later ones' pipes, so only the first may die here."""
    return SubprocVecEnv(list(envs), start_method="fork")


class Kill(BaseCallback):
    """Kills the worker of env 0 at a step."""

    def _on_step(self) -> bool:
        if self.n_calls == 20:
            process = self.training_env.unwrapped.processes[0]  # type: ignore[attr-defined]
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return True


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a signal of POSIX")
@pytest.mark.parametrize("name", ["reinforce", "actor-critic", "trpo", "off-policy", "off-pac"])
def test_a_worker_that_dies_is_named(name: str, tmp_path: Path) -> None:
    env = forked(_env, _env)
    watch = Interrupt("never", 0)
    model = make(name, env)
    with pytest.raises(EnvWorkerError, match=r"worker process of env 0 has died, exit code -9.*set_env"):
        model.learn(400, [watch, Kill()])
    assert_equal(state(model)["torch"], watch.before["torch"])
    with pytest.raises(EnvWorkerError, match="worker process of env 0 has died"):
        model.learn(400)  # the reset fails too
    env.processes[1].kill()
    model.set_env(vec(ScriptedEnv((7, 3)), ScriptedEnv((4, 9))))
    goes_on(model, tmp_path)


@pytest.mark.parametrize("name", ["actor-critic", "off-pac"])
def test_an_error_in_a_worker_is_named(name: str) -> None:
    env = forked(_crashing, _env)
    with pytest.raises(EnvWorkerError, match=r"worker process of env 0 has died, exit code 1.*traceback is on stderr"):
        make(name, env).learn(400)
    env.processes[1].kill()


@pytest.mark.parametrize("name", ["actor-critic", "trpo", "off-policy", "off-pac"])
def test_an_interrupt_while_workers_step(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their answers are not taken for those of the next reset."""
    env = forked(_env, _env)
    model = make(name, env).learn(100)
    waits = env.step_wait

    def interrupted() -> Any:
        monkeypatch.setattr(env, "step_wait", waits)
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "step_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100)
    goes_on(model, tmp_path)
    env.close()
