"""Actors on Ray: deaths, interrupts, several machines, and ends. What all transports share is tested beside them."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_pg import ActorCritic, AsyncActorCritic
from sb3_pg.envs import ActorVecEnv, make_vec_env
from sb3_pg.extras import MissingExtraError
from sb3_pg.rollout import EnvWorkerError
from tests.envs.actors.test_failures import actors_of_ended_learner, is_alive, wait_until
from tests.helpers import ScriptedEnv, parameters

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_thread")]


class Killed(ScriptedEnv):
    """Its process is killed at a step."""

    def step(self, action: Any) -> Any:
        if self.reward == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Slow(ScriptedEnv):
    def step(self, action: Any) -> Any:
        time.sleep(0.05)
        return super().step(action)


def test_an_actor_that_dies() -> None:
    env = ActorVecEnv([ScriptedEnv, ScriptedEnv, Killed], 2, "ray")
    model = ActorCritic("MlpPolicy", env, n_steps=8, seed=0, device="cpu").learn(48)
    before = parameters(model)
    with pytest.raises(EnvWorkerError, match=r"The actor of envs 2 to 2 on Ray has died\. Make new envs"):
        model.learn(48)
    assert th.equal(before, parameters(model))
    with pytest.raises(EnvWorkerError) as caught:  # again
        env.reset()
    assert "its worker process has died" in str(caught.value.__cause__)
    env.close()


def test_dead_actors_are_started_again() -> None:
    env = ActorVecEnv([lambda: Killed((4,))] * 2, 2, "ray")
    model = AsyncActorCritic("MlpPolicy", env, n_steps=8, max_restarts=4, seed=0, device="cpu")
    with pytest.warns(UserWarning, match="is started again: The actor of envs .* on Ray has died"):
        model.learn(6 * 8)
    assert model.num_timesteps == 6 * 8
    env.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="it interrupts itself")
def test_a_rollout_that_is_interrupted_ends_early() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    env = ActorVecEnv([Slow, Slow], 2, "ray")
    model = ActorCritic("MlpPolicy", env, n_steps=400, seed=0, device="cpu")  # a rollout takes 20 seconds
    env.reset()
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            model.learn(1600)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    began = time.monotonic()
    env.reset()
    assert time.monotonic() - began < 5
    env.close()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'ray is not installed: pip install "sb3_pg\[ray\]"'):
        make_vec_env("CartPole-v1", 2, "ray", n_actors=1)


# ---------------------------------------------------------------- scripts of their own

TWO_MACHINES = """
    import signal, threading

    import ray
    import torch as th
    from ray.cluster_utils import Cluster

    from sb3_pg import ActorCritic
    from sb3_pg.envs import ActorVecEnv, make_vec_env

    def trained(env):
        model = ActorCritic("MlpPolicy", env, n_steps=16, seed=0, device="cpu").learn(200)
        return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])

    def node():
        return ray.get_runtime_context().get_node_id()

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    env = make_vec_env("CartPole-v1", 5, "ray", seed=0)
    nodes = {ray.get(worker._actor.__ray_call__.remote(lambda _: node())) for worker in env._workers}
    print("actors", len(env.shares), "machines", len(nodes))
    serial = make_vec_env("CartPole-v1", 5, "actors", seed=0, n_actors=2, backend_kwargs={"transport": "serial"})
    print("equal", th.equal(trained(env), trained(serial)))

    # no CPU is left for this one, until the other one is closed
    threading.Timer(12.0, env.close).start()
    other = make_vec_env("CartPole-v1", 2, "ray", n_actors=1)
    print("shape", other.reset().shape)
    other.close()
    ray.shutdown()
    cluster.shutdown()
"""


def run(script: str, tmp_path: Path, seconds: float = 150) -> "subprocess.CompletedProcess[str]":
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=seconds, check=False)


def test_two_machines(tmp_path: Path) -> None:
    done = run(TWO_MACHINES, tmp_path)
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()
    assert {"actors 2 machines 2", "equal True", "shape (2, 4)"} <= set(lines)
    assert "2 of 2 actors have started on Ray" in done.stderr
    assert "0 of 1 actors have started on Ray, 10 s. Each actor takes one CPU. The cluster has 2, and 0" in done.stderr


LEARNER = """
    import os

    import ray

    from sb3_pg import ActorCritic
    from sb3_pg.envs import make_vec_env

    env = make_vec_env("Pendulum-v1", 2, "ray", n_actors=2)
    print(*(ray.get(worker._actor.__ray_call__.remote(lambda _: os.getpid())) for worker in env._workers), flush=True)
    ActorCritic("MlpPolicy", env, n_steps=10**6, device="cpu").learn(10**8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_actors_end_with_their_learner(number: int, tmp_path: Path) -> None:
    actors = actors_of_ended_learner(LEARNER, number, tmp_path)
    assert len(actors) == 2
    assert wait_until(lambda: not any(map(is_alive, actors)))
