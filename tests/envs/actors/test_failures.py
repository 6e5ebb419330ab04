"""Errors, deaths and ends leave neither processes nor memory behind, and parameters as they were."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecNormalize

from sb3_pg import TRPO, ActorCritic, NonFiniteError, Reinforce
from sb3_pg.envs import ActorVecEnv
from sb3_pg.rollout import EndlessEpisodeError, EnvWorkerError
from tests.helpers import TRANSPORTS, FaultyEnv, ScriptedEnv, parameters

pytestmark = pytest.mark.usefixtures("one_thread")
N_ENVS = 4


def env_fns(fault: str = "raise", at: int = 11, env: int = 2) -> list[Callable[[], Any]]:
    """``env`` goes wrong at one step, the last one two steps later."""

    def make(i: int) -> Any:
        step = {env: at, N_ENVS - 1: at + 2}.get(i, 10**9)
        return Monitor(FaultyEnv(fault, step, lengths=(4, 5)))

    return [lambda i=i: make(i) for i in range(N_ENVS)]  # type: ignore[misc]


def failure(env: VecEnv, wrap: Callable[[VecEnv], VecEnv], **arguments: Any) -> tuple[Exception, int, th.Tensor]:
    env.seed(0)
    model = ActorCritic("MlpPolicy", wrap(env), n_steps=8, seed=0, device="cpu", **arguments)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (compared below)
        model.learn(1000)
    env.close()
    return caught.value, model.num_timesteps, parameters(model)


def plain(env: VecEnv) -> VecEnv:
    return env


def checked(env: VecEnv) -> VecEnv:
    return VecCheckNan(env, raise_exception=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("fault", "wrap"), [("raise", plain), ("observation", plain), ("reward", plain), ("observation", checked)]
)
def test_an_env_that_fails_gives_the_error_of_dummy(
    fault: str, wrap: Callable[[VecEnv], VecEnv], transport: Any
) -> None:
    expected, n_timesteps, _ = failure(DummyVecEnv(env_fns(fault)), wrap)
    error, n, _ = failure(ActorVecEnv(env_fns(fault), 2, transport), wrap)
    assert type(error) is type(expected)
    known = str(expected).partition("action=")[0]  # an actor knows those of its envs
    assert str(error).startswith(known)
    assert n == n_timesteps
    if fault == "raise":
        assert "In the actor of envs 2 to 3, at step 2 of the rollout, in env 2" in str(error.__cause__)
        assert "the simulator crashed" in str(error.__cause__)


class OddReset(ScriptedEnv):
    def reset(self, **kwargs: Any) -> Any:
        return None


@pytest.mark.parametrize("make", [DummyVecEnv, lambda fns: ActorVecEnv(fns, 2, "serial")])
def test_a_reset_that_returns_something_else_is_named(make: Any) -> None:
    fns = [lambda i=i: (OddReset if i == 2 else ScriptedEnv)((5,)) for i in range(N_ENVS)]
    with pytest.raises(TypeError, match=r"env.reset \(observation, info\)") as caught:
        ActorCritic("MlpPolicy", make(fns), n_steps=8, device="cpu").learn(100)
    if make is not DummyVecEnv:
        assert "In reset of the actor of envs 2 to 3, in env 2" in str(caught.value.__cause__)


@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_numbers_are_checked_before_they_are_normalized(fault: str) -> None:
    results = []
    for env in (DummyVecEnv(env_fns(fault)), ActorVecEnv(env_fns(fault), 2, "serial")):
        normalized = VecNormalize(env)
        error, n, _ = failure(env, lambda _, wrapped=normalized: wrapped)  # type: ignore[misc]
        assert isinstance(error, NonFiniteError)
        statistics: Any = normalized.obs_rms
        assert np.isfinite(statistics.mean).all()
        results.append((str(error), error.env, error.step, n))
    assert results[0] == results[1]
    assert results[0][1] == 2


def test_training_goes_on_after_an_error() -> None:
    env = ActorVecEnv(env_fns(at=11, env=N_ENVS - 1), 2, "serial")
    model = ActorCritic("MlpPolicy", env, n_steps=8, seed=0, device="cpu")
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        model.learn(1000)
    before = parameters(model)
    model.learn(100)
    assert not th.equal(before, parameters(model))


def test_skipping() -> None:
    env = ActorVecEnv(env_fns("reward", at=20), 2, "serial")
    model = ActorCritic("MlpPolicy", env, n_steps=8, device="cpu", on_nonfinite="skip")
    with pytest.warns(UserWarning, match="Update skipped: reward is nan in env 2 at step 3 of the rollout"):
        model.learn(8 * N_ENVS * 6)
    assert model._n_skipped == 1


def test_endless_episodes() -> None:
    messages = []
    for env in (DummyVecEnv, lambda fns: ActorVecEnv(fns, 2, "serial")):
        made: Any = env([lambda n=n: ScriptedEnv((n,)) for n in (3, 4, 999, 5)])  # type: ignore[misc]
        model = Reinforce("MlpPolicy", made, n_episodes=4, max_episode_steps=20, device="cpu")
        with pytest.raises(EndlessEpisodeError, match="env 2") as caught:
            model.learn(10)
        messages.append((str(caught.value), model.num_timesteps))
    assert messages[0] == messages[1]


class CannotBePickled(Exception):  # noqa: N818
    def __init__(self) -> None:
        super().__init__("held fast")
        self.held = lambda: None


class Held(ScriptedEnv):
    def step(self, action: Any) -> Any:
        raise CannotBePickled


def test_an_error_that_cannot_be_sent() -> None:
    env = ActorVecEnv([Held, Held], 2)
    with pytest.raises(RuntimeError, match="CannotBePickled: held fast"):
        ActorCritic("MlpPolicy", env, n_steps=8, device="cpu").learn(10)
    env.close()


class Warns(ScriptedEnv):
    def step(self, action: Any) -> Any:
        warnings.warn("it is getting hot", RuntimeWarning, stacklevel=2)
        return super().step(action)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_warnings_reach_the_learner(transport: Any) -> None:
    env = ActorVecEnv([Warns, Warns], 2, transport)
    model = ActorCritic("MlpPolicy", env, n_steps=8, device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.learn(100)
    assert len([one for one in caught if "it is getting hot" in str(one.message)]) == 1  # as Python's filters say
    env.close()


def test_an_env_that_cannot_be_made() -> None:
    def fails() -> Any:
        raise FileNotFoundError("no such robot")

    before = multiprocessing.active_children()
    transports: Any = ("serial", "processes")
    for transport in transports:
        with pytest.raises(FileNotFoundError, match="no such robot"):
            ActorVecEnv([ScriptedEnv, fails], 2, transport)
    assert set(multiprocessing.active_children()) <= set(before)


# ---------------------------------------------------------------- ends


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def processes_of(env: ActorVecEnv) -> list[Any]:
    return [worker._process for worker in env._workers]  # type: ignore[attr-defined]


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_an_actor_that_dies() -> None:
    env = ActorVecEnv(env_fns(at=10**9), 2)
    model = ActorCritic("MlpPolicy", env, n_steps=8, seed=0, device="cpu").learn(64)
    before = parameters(model)
    processes = processes_of(env)
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(EnvWorkerError, match=r"The actor of envs 2 to 3 has died, exit code -9\. Make new envs"):
        model.learn(64)
    assert th.equal(before, parameters(model))
    env.close()
    assert not any(process.is_alive() for process in processes)


def test_close_and_garbage_collection_leave_nothing() -> None:
    before = shared_memory()
    env = ActorVecEnv(env_fns(at=10**9), 2)
    other = ActorVecEnv(env_fns(at=10**9), 2)
    ActorCritic("MlpPolicy", env, n_steps=200, device="cpu").learn(64)
    processes = processes_of(env) + processes_of(other)
    assert shared_memory() == before  # it has no name
    env.close()
    del other
    gc.collect()
    assert wait_until(lambda: not any(process.is_alive() for process in processes))


class Slow(ScriptedEnv):
    def step(self, action: Any) -> Any:
        time.sleep(0.02)
        return super().step(action)


class Interruptions:
    """Raises KeyboardInterrupt in this process after a time.

    Another thread is there, as those of torch often are: the system may give it the signal.
    """

    def __enter__(self) -> "Interruptions":
        self._end = threading.Event()
        threading.Thread(target=self._end.wait, daemon=True).start()

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        self._previous = signal.signal(signal.SIGALRM, interrupt)
        return self

    def after(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds, 3.0)  # again, if a destructor has swallowed the first one

    def call(self, seconds: float, function: Callable[..., Any], *args: Any) -> None:
        """Call a function, and interrupt it."""
        self.after(seconds)
        function(*args)

    def __exit__(self, *_: object) -> None:
        self.after(0)
        self._end.set()
        signal.signal(signal.SIGALRM, self._previous)


def interrupt(seconds: float, function: Callable[..., Any], *args: Any) -> None:
    """Call a function, and interrupt it after a time."""
    with Interruptions() as interruptions, pytest.raises(KeyboardInterrupt):
        interruptions.call(seconds, function, *args)


def test_an_interrupted_wait() -> None:
    env = ActorVecEnv([Slow, Slow], 2)
    model = ActorCritic("MlpPolicy", env, n_steps=1000, device="cpu")
    interrupt(0.2, model.learn, 10_000)
    began = time.monotonic()
    env.reset()  # ends the rollout, which would have taken 20 seconds
    assert time.monotonic() - began < 10
    model.n_steps = 5
    model.learn(10)
    assert model.num_timesteps == 10
    env.close()


def test_interrupts_at_any_time() -> None:
    """The answers are those of the latest questions, or an error says that there will be none."""
    env = ActorVecEnv([lambda: Monitor(ScriptedEnv((3, 5)))] * 4, 2)
    model = ActorCritic("MlpPolicy", env, n_steps=32, seed=0, device="cpu")
    random = np.random.default_rng(0)
    n_lost = 0
    with Interruptions() as interruptions:
        for i in range(30):
            with pytest.raises(KeyboardInterrupt):
                interruptions.call(random.uniform(0.001, 0.03), model.learn, 10**9)
            interruptions.after(30.0)  # instead of hanging
            try:
                env.set_attr("number", i)
                assert env.get_attr("number") == [i] * 4
                assert env.reset().shape[0] == 4
            except EnvWorkerError as error:
                if "can no longer be reached: a message was interrupted. Make new envs" not in str(error):
                    raise
                n_lost += 1
                env.close()
                env = ActorVecEnv([lambda: Monitor(ScriptedEnv((3, 5)))] * 4, 2)
                model.set_env(env)
            interruptions.after(0)
    assert n_lost < 10
    env.close()


class VerySlow(ScriptedEnv):
    def step(self, action: Any) -> Any:
        time.sleep(0.1)
        return super().step(action)


def test_a_slow_env_is_interrupted_within_a_second() -> None:
    env = ActorVecEnv([VerySlow, VerySlow], 2)
    model = ActorCritic("MlpPolicy", env, n_steps=1000, device="cpu")
    interrupt(0.3, model.learn, 10_000)
    began = time.monotonic()
    env.reset()
    assert time.monotonic() - began < 2
    env.close()


class Stubborn(ScriptedEnv):
    """Takes long, and ignores the signal to end."""

    def step(self, action: Any) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        return super().step(action)


def test_stubborn_envs_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_pg.envs.actors.vec_env.SECONDS_TO_END", 0.5)
    env = ActorVecEnv([Stubborn] * 2, 2)
    env.reset()
    processes = processes_of(env)
    interrupt(0.5, env.step, np.zeros(2, dtype=np.int64))
    began = time.monotonic()
    env.close()
    assert time.monotonic() - began < 5
    assert not any(process.is_alive() for process in processes)


SCRIPT = """
    import sys, time
    from sb3_pg import ActorCritic
    from sb3_pg.envs import make_vec_env
    if __name__ == "__main__":
        env = make_vec_env("CartPole-v1", 4, "actors", n_actors=2)
        model = ActorCritic("MlpPolicy", env, n_steps=100_000, device="cpu")
        print(*(worker._process.pid for worker in env._workers), flush=True)
        model.learn(10**9)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_script_without_a_guard_is_told_so(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    kwargs = f'backend_kwargs={{"start_method": "{start_method}"}}'
    path.write_text(
        f"from sb3_pg.envs import make_vec_env\nmake_vec_env('CartPole-v1', 2, 'actors', n_actors=1, {kwargs})"
    )
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode
    assert "does so under `if __name__ == '__main__':`" in done.stderr


def actors_of_ended_learner(script: str, number: int, tmp_path: Path) -> list[int]:
    """Run a script that prints the ids of its actors' processes, end it by a signal, and return the ids."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    with subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as learner:
        assert learner.stdout is not None
        actors = [int(pid) for pid in learner.stdout.readline().split()]
        time.sleep(0.5)  # in the middle of a fragment
        if number == signal.SIGINT:
            os.killpg(learner.pid, number)
        else:
            os.kill(learner.pid, number)
        learner.wait(30)
    return actors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_actors_end_with_their_learner(number: int, tmp_path: Path) -> None:
    before = shared_memory()
    actors = actors_of_ended_learner(SCRIPT, number, tmp_path)
    assert len(actors) == 2
    assert wait_until(lambda: not any(map(is_alive, actors)), 10)
    assert shared_memory() <= before


@pytest.mark.parametrize("method", ["reset", "step"])
def test_a_masked_env_whose_answer_has_another_form(method: str) -> None:
    """The wrapper that puts masks into infos leaves it to the vectorized env."""

    class Odd(ScriptedEnv):
        def action_masks(self) -> Any:
            return np.ones(3, bool)

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return np.int64(3)

    odd = Odd()
    setattr(odd, method, answer)
    env = ActorVecEnv([lambda: odd], 1, transport="serial")
    with pytest.raises(TypeError, match=r"env.step must return .* and env.reset \(observation, info\)"):
        TRPO("MlpPolicy", env, n_steps=8, device="cpu").learn(8)
    env.close()
