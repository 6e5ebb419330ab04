"""The stream of fragments: order, bounds, versions, faults. What is learned from it: tests/algorithms."""

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_pg.envs import ActorVecEnv
from sb3_pg.envs.actors.stream import Delivery, FragmentEnv, FragmentStream
from sb3_pg.rollout import CollectorState, EnvWorkerError, Order
from tests.helpers import TRANSPORTS, FaultyEnv, ScriptedEnv

pytestmark = pytest.mark.usefixtures("one_thread")
N_STEPS = 6


def policy_for(env: VecEnv) -> ActorCriticPolicy:
    th.manual_seed(0)
    return ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[8])


@contextmanager
def stream_of(
    env_fns: list[Callable[[], Any]],
    n_actors: int,
    transport: Any = "processes",
    wrap: Callable[[VecEnv], VecEnv] = lambda env: env,
    **arguments: Any,
) -> Iterator[tuple[FragmentStream, VecEnv, ActorCriticPolicy]]:
    envs = ActorVecEnv(env_fns, n_actors, transport)
    envs.seed(0)
    env = wrap(envs)
    policy = policy_for(env)
    assert envs.can_record(env, policy)
    n = env.num_envs
    state = CollectorState(env.reset(), np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64))
    given = {"queue_size": 1, "in_turn": False, "timeout": None, "max_restarts": 0, "seed": 7}
    stream = FragmentStream(
        env, policy, Order(N_STEPS, None, None, -1, True, state, apart=True), **{**given, **arguments}
    )
    try:
        yield stream, env, policy
    finally:
        stream.close()
        env.close()


def take(stream: FragmentStream, n: int = 99, delivered: list[Delivery] | None = None) -> None:
    """Take fragments until one is an error."""
    for _ in range(n):
        delivery = stream.next()
        if delivered is not None:
            delivered.append(delivery)


def scripted(*lengths: int) -> Callable[[], Any]:
    return lambda: Monitor(ScriptedEnv(lengths or (3, 4)))


def follows(first: Delivery, second: Delivery) -> None:
    """The second fragment goes on where the first has ended."""
    fragment, state = first.fragment, second.state
    np.testing.assert_array_equal(state.last_obs, fragment.observations[-1])
    np.testing.assert_array_equal(second.fragment.observations[0], fragment.observations[-1])
    assert state.episode_starts is not None
    np.testing.assert_array_equal(state.episode_starts, fragment.at_start[-1])
    # ScriptedEnv's rewards count the steps of its life
    np.testing.assert_array_equal(second.fragment.rewards[0], fragment.rewards[-1] + 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_actor_goes_on_where_it_was(transport: Any) -> None:
    with stream_of([scripted()] * 5, 2, transport, in_turn=True) as (stream, _, _):
        delivered = [stream.next() for _ in range(8)]
    assert [one.env.actor for one in delivered] == [0, 1] * 4
    assert [one.fragment.rewards.shape for one in delivered] == [(N_STEPS, 3), (N_STEPS, 2)] * 4
    for first, second in zip(delivered, delivered[2:], strict=False):
        follows(first, second)


def test_versions_are_those_of_the_weights() -> None:
    """Each fragment's log-probs are those of the weights with its version."""
    with stream_of([scripted()] * 4, 2, in_turn=True) as (stream, _, policy):
        weights, delivered = [], []
        for version in range(7):
            weights.append({name: value.clone() for name, value in policy.state_dict().items()})
            delivered.append(stream.next())
            assert delivered[-1].version == max(0, version - 2)
            with th.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(th.randn_like(parameter), alpha=0.1)
            stream.version += 1
    for version, (_, fragment, _, made_with) in enumerate(delivered):
        for known, state in enumerate(weights):
            policy.load_state_dict(state)
            with th.no_grad():
                _, log_probs, _ = policy.evaluate_actions(
                    th.from_numpy(fragment.observations[:-1]).flatten(0, 1), th.from_numpy(fragment.actions).flatten()
                )
            assert fragment.log_probs is not None
            same = np.allclose(fragment.log_probs.flatten(), log_probs, atol=1e-5)
            assert same == (known == made_with), (version, known)


@pytest.mark.parametrize("queue_size", [1, 3])
def test_actors_wait_when_the_queue_is_full(queue_size: int) -> None:
    with stream_of([scripted()] * 4, 4, queue_size=queue_size) as (stream, _, _):
        for n in range(1, 5):
            stream.next()
            time.sleep(0.1)  # long enough for many fragments
            assert stream.n_queued <= queue_size
            assert stream._n_orders <= 4 + n + queue_size
        workers: Any = stream._envs._workers
        time.sleep(0.1)
        assert all(worker.pipe.poll() for worker in workers)  # each has one finished fragment, and waits


def test_the_oldest_come_first() -> None:
    with stream_of([scripted()] * 3, 3, queue_size=2) as (stream, _, _):
        numbers = []
        for _ in range(9):
            before = {id(flight.env): flight.number for flight in stream._flights}
            delivery = stream.next()
            numbers.append(before[id(delivery.env)])
            time.sleep(0.05)  # all are ready
    assert numbers[3:] == sorted(numbers[3:])


def test_commands_in_between_lose_nothing() -> None:
    with stream_of([scripted()] * 4, 2, in_turn=True) as (stream, env, _):
        delivered = []
        for _ in range(6):
            delivered.append(stream.next())
            assert env.get_attr("lengths") == [(3, 4)] * 4
            assert delivered[-1].env.get_attr("lengths", 0) == [(3, 4)]
        with pytest.raises(ValueError, match=r"reset must wait for the end of learn\(\)"):
            env.reset()
    for first, second in zip(delivered, delivered[2:], strict=False):
        follows(first, second)


def test_the_envs_of_an_actor() -> None:
    env = ActorVecEnv([scripted(n + 2) for n in range(5)], 2, "serial")
    part = FragmentEnv(env, 1, env.shares[1])
    assert part.num_envs == 2
    assert part.get_attr("lengths") == [(5,), (6,)]
    assert part.get_attr("lengths", -1) == [(6,)]
    part.set_attr("mark", 1, [0])
    assert env.has_attr("mark") is False
    assert part.env_method("has_wrapper_attr", "mark") == [True, False]
    assert part.env_is_wrapped(Monitor) == [True, True]
    for call in (part.reset, part.step_wait):
        with pytest.raises(NotImplementedError, match="by the actor"):
            call()


class Counts(ScriptedEnv):
    """What is seen is the number of the episode and of the step."""

    def _obs(self) -> Any:
        return np.array([self.episode, self.t, self.episode * self.t], np.float32)


def seen_by(n_steps: int) -> np.ndarray:
    """What a VecEnv of one env returns from reset and steps."""
    env = Counts((3, 4))
    seen = [env.reset()[0]]
    for _ in range(n_steps):
        obs, _, terminated, truncated, _ = env.step(0)
        seen.append(env.reset()[0] if terminated or truncated else obs)
    return np.array(seen, np.float64)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("n_actors", [1, 3])
def test_statistics_are_those_of_all_that_was_seen(transport: Any, n_actors: int) -> None:
    def wrap(env: VecEnv) -> VecEnv:
        return VecNormalize(VecFrameStack(VecMonitor(env), 2))

    fns: Any = [lambda: Counts((3, 4))] * 4
    with stream_of(fns, n_actors, transport, wrap) as (stream, env, _):
        assert isinstance(env, VecNormalize)
        read = [stream.next() for _ in range(10)] + list(stream._queue)
        statistics: Any = env.obs_rms
        rows = [
            seen_by(sum(len(one.fragment) for one in read if one.env.actor == actor))
            for actor, share in enumerate(stream._envs.shares)
            for _ in range(share.n_envs)
        ]
        seen = np.concatenate(rows)
        n = statistics.count
        assert n == pytest.approx(len(seen) + 1e-4)
        # the latest frame is last; VecNormalize begins with a mean of 0 and a variance of 1, of weight 1e-4
        np.testing.assert_allclose(statistics.mean[3:], seen.sum(0) / n, rtol=1e-5)
        second = ((seen**2).sum(0) + 1e-4) / n
        np.testing.assert_allclose(statistics.var[3:] + statistics.mean[3:] ** 2, second, rtol=1e-5)
        stack: Any = env.venv
        monitor = stack.venv
        assert monitor.episode_count == sum(int(one.fragment.at_start.sum()) for one in read)


# ---------------------------------------------------------------- faults


class Hangs(ScriptedEnv):
    """Its 10th step takes for ever; the next env's, in another process, does not."""

    def __init__(self, at: int = 10) -> None:
        super().__init__()
        self.at = at

    def step(self, action: Any) -> Any:
        if self.reward == self.at:
            time.sleep(60)
        return super().step(action)


def test_an_actor_that_is_killed() -> None:
    with stream_of([scripted()] * 4, 2, max_restarts=3, in_turn=True) as (stream, env, _):
        first = [stream.next() for _ in range(2)]
        workers: Any = stream._envs._workers
        killed = workers[0]._process
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        began = time.monotonic()
        with pytest.warns(UserWarning, match="The actor of envs 0 to 1 is started again: .* exit code -9"):
            delivered = [stream.next() for _ in range(4)]
        assert time.monotonic() - began < 10
        assert stream.n_restarts == 1
        assert not any(process is killed for process in multiprocessing.active_children())
        assert env.get_attr("lengths") == [(3, 4)] * 4
    of_first = [one for one in delivered if one.env.actor == 0]
    begun = next(one for one in of_first if one.fragment.rewards[0, 0] == 1)
    assert begun.state.episode_starts is not None
    assert begun.state.episode_starts.all()
    assert not np.array_equal(begun.state.last_obs, first[0].state.last_obs)  # other seeds
    follows(first[1], next(one for one in delivered if one.env.actor == 1))


@pytest.mark.parametrize("transport", TRANSPORTS[1:])
def test_an_actor_that_hangs(transport: Any) -> None:
    with stream_of([scripted(), Hangs], 2, transport, max_restarts=1, timeout=0.5, in_turn=True) as (stream, _, _):
        with pytest.warns(UserWarning, match=r"envs 1 to 1 is started again: .* has not answered for 0\.5 s"):
            delivered = [stream.next() for _ in range(4)]
        assert [one.env.actor for one in delivered] == [0, 1, 0, 1]
        with pytest.raises(EnvWorkerError, match=r"has not answered for 0\.5 s\. max_restarts=1 is reached"):
            take(stream, 4)


class HangsAtOnce(ScriptedEnv):
    def step(self, action: Any) -> Any:
        time.sleep(60)
        return super().step(action)


@pytest.mark.parametrize("transport", TRANSPORTS[1:])
@pytest.mark.parametrize("in_turn", [True, False])
def test_an_actor_that_hangs_again(in_turn: bool, transport: Any) -> None:
    began = time.monotonic()
    with (
        stream_of([HangsAtOnce], 1, transport, max_restarts=2, timeout=0.5, in_turn=in_turn) as (stream, _, _),
        pytest.warns(UserWarning, match="is started again"),
        pytest.raises(EnvWorkerError, match=r"max_restarts=2 is reached"),
    ):
        stream.next()
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("max_restarts", [0, 2])
def test_an_env_that_raises(transport: Any, max_restarts: int) -> None:
    """Each life of the env ends at its 9th step: one fragment, then an error."""
    fns = [scripted(), lambda: Monitor(FaultyEnv("raise", 9))]
    with stream_of(fns, 2, transport, max_restarts=max_restarts, in_turn=True) as (stream, _, _):
        delivered: list[Delivery] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(RuntimeError, match="the simulator crashed") as error:
                take(stream, delivered=delivered)
        assert len([one for one in caught if "is started again" in str(one.message)]) == max_restarts
        assert stream.n_restarts == max_restarts
        assert [one.env.actor for one in delivered].count(1) == max_restarts + 1
        assert "In the actor of envs 1 to 1, at step 2 of the rollout, in env 1" in str(error.value.__cause__)
        assert "tests/helpers.py" in str(error.value.__cause__)


class FailsToReset(ScriptedEnv):
    def reset(self, **kwargs: Any) -> Any:
        if self.resets:
            raise OSError("the simulator is gone")
        return super().reset(**kwargs)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_env_that_cannot_be_reset(transport: Any) -> None:
    with (
        stream_of([FailsToReset, scripted()], 2, transport, max_restarts=1) as (stream, _, _),
        pytest.warns(UserWarning, match="started again: OSError: the simulator is gone"),
        pytest.raises(OSError, match="the simulator is gone"),
    ):
        take(stream)


def test_an_env_that_cannot_be_made_again() -> None:
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise FileNotFoundError("no such robot")
        return FaultyEnv("raise", 9)

    with (
        stream_of([make, scripted()], 2, "serial", max_restarts=3) as (stream, _, _),
        pytest.warns(UserWarning, match="started again"),
        pytest.raises(FileNotFoundError, match="no such robot"),
    ):
        take(stream)
    assert len(calls) == 4


def test_a_nan_is_no_fault() -> None:
    """The fragment is given to the learner, who raises or skips; then the actor begins anew."""
    with stream_of([lambda: FaultyEnv("observation", 8)], 1, "serial") as (stream, _, _):
        delivered = [stream.next() for _ in range(3)]
    assert [one.fragment.failure is None for one in delivered] == [True, False, True]
    assert delivered[2].state.episode_starts is not None
    assert delivered[2].state.episode_starts.all()
    assert stream.n_restarts == 0


def test_an_order_without_observations_begins_with_a_reset() -> None:
    with stream_of([scripted()] * 2, 1, "serial") as (stream, _, _):
        flight = stream._flights[0]
        flight.state = replace(flight.state, last_obs=None)
        delivery = stream.next()
    assert delivery.state.episode_starts is not None
    assert delivery.state.episode_starts.all()
    np.testing.assert_array_equal(delivery.state.last_obs, delivery.fragment.observations[0])
