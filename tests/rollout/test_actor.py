"""An actor alone, and what its fragments become."""

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg import NonFiniteError
from sb3_pg.policies import Share
from sb3_pg.rollout import Actor, Collector, CollectorState, Failure, Order, Playback, RemoteTraceback, order_for
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, FaultyEnv, ScriptedEnv

LENGTHS = (3, 7, 4, 2)


def policy() -> ActorCriticPolicy:
    th.manual_seed(0)
    return ActorCriticPolicy(OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"], lambda _: 1e-3)


def scripted(length: int) -> ScriptedEnv:
    return ScriptedEnv((length,), observation_space=copy.deepcopy(OBSERVATION_SPACES["vector"]))


def envs(lengths: tuple[int, ...] = LENGTHS) -> VecEnv:
    made = DummyVecEnv([lambda n=n: scripted(n) for n in lengths])  # type: ignore[misc]
    made.seed(0)
    return made


class Shared(DummyVecEnv):
    """The least that a collector wants of an env with actors: here two of them, with envs of their own."""

    def __init__(self) -> None:
        super().__init__([lambda n=n: scripted(n) for n in LENGTHS])  # type: ignore[misc]
        self.parts = [(Share(0, 3, 4), envs(LENGTHS[:3])), (Share(3, 1, 4), envs(LENGTHS[3:]))]

    def reset(self) -> Any:
        return np.concatenate([part.reset() for _, part in self.parts])

    def can_record(self, env: VecEnv, policy: ActorCriticPolicy) -> bool:
        return env is self and policy is not None

    def record(self, env: VecEnv, policy: ActorCriticPolicy, order: Order) -> Playback:
        random = th.get_rng_state().numpy()
        fragments = [Actor(policy, share).collect(part, order_for(order, share), random) for share, part in self.parts]
        playback = Playback(fragments, policy)
        th.set_rng_state(th.from_numpy(playback.random))
        return playback


@pytest.mark.parametrize("wanted", [{"n_steps": 9}, {"episodes_per_env": 2}])
def test_a_collector_plays_what_actors_have_collected(wanted: dict[str, int]) -> None:
    def collected(env: VecEnv) -> Any:
        collector = Collector(policy(), env)
        th.manual_seed(1)
        batches = [collector.collect(**wanted) for _ in range(3)]  # type: ignore[arg-type]
        return collector, batches, th.get_rng_state()

    alone, expected, random = collected(_seeded_by_part(envs()))
    shared, batches, same_random = collected(Shared())
    if "n_steps" in wanted:
        assert th.equal(random, same_random)
    # Waiting envs of finished actors are not stepped, so that their next episodes are others.
    n = len(batches) if "n_steps" in wanted else 1
    for batch, other in zip(batches[:n], expected[:n], strict=True):
        valid = other.valid
        assert th.equal(batch.valid, valid)
        compared = ["actions", "terminated", "truncated", "timesteps"]
        compared += ["rewards"] if "n_steps" in wanted else []  # they count the steps of waiting envs too
        for name in compared:
            assert th.equal(getattr(batch, name)[valid], getattr(other, name)[valid]), name
        assert th.allclose(batch.log_probs[valid], other.log_probs[valid], atol=1e-6)
    if "n_steps" in wanted:
        np.testing.assert_array_equal(shared.state.timesteps, alone.state.timesteps)
        np.testing.assert_array_equal(shared.state.episode_starts, alone.state.episode_starts)


def _seeded_by_part(env: VecEnv) -> VecEnv:
    env._seeds = [0, 1, 2, 0]  # as the parts are
    return env


def test_the_actors_of_finished_envs_do_nothing() -> None:
    env = Shared()
    collector = Collector(policy(), env)
    collector.collect(episodes_per_env=2)
    steps = [part.get_attr("reward") for _, part in env.parts]  # counts the steps of an env
    assert steps == [[15.0] * 3, [5.0]]


def order(state: CollectorState, **wanted: Any) -> Order:
    given = {"n_steps": None, "episodes_per_env": None, "limit": None, "sde_sample_freq": -1, "with_infos": False}
    return Order(**{**given, **wanted}, state=state)


def state_of(env: VecEnv) -> CollectorState:
    n = env.num_envs
    return CollectorState(env.reset(), np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64))


def test_a_fragment_is_small() -> None:
    """It holds no more infos than are wanted, and can be pickled."""
    sizes = []
    for with_infos in (True, False):
        env = envs()
        fragment = Actor(policy(), Share.whole(4)).collect(
            env, order(state_of(env), n_steps=9, with_infos=with_infos), th.get_rng_state().numpy()
        )
        assert len(fragment) == 9
        n_ended = int(fragment.at_start.sum())
        assert sum(map(len, fragment.infos)) == (36 if with_infos else n_ended)
        sizes.append(len(pickle.dumps(fragment)))
    assert sizes[1] < sizes[0]


def test_a_playback_is_freed_at_once() -> None:
    """Not when the garbage collector comes to it: fragments of images are large."""
    env = envs()
    fragment = Actor(policy(), Share.whole(4)).collect(env, order(state_of(env), n_steps=9), th.get_rng_state().numpy())
    gc.disable()
    try:
        playback = Playback([fragment], policy())
        playback.step(playback.sampler(None))
        freed = weakref.ref(playback)
        del playback
        assert freed() is None
    finally:
        gc.enable()


def test_an_orphan_stops() -> None:
    env = envs()
    fragment = Actor(policy(), Share.whole(4)).collect(
        env, order(state_of(env), n_steps=100_000), th.get_rng_state().numpy(), lambda: True
    )
    assert len(fragment) == 1


def test_of_two_errors_the_first_counts() -> None:
    fragments = []
    for first, at in ((0, 9), (2, 5)):
        env = DummyVecEnv([ScriptedEnv, lambda at=at: FaultyEnv("raise", at)])  # type: ignore[misc]
        made = order(state_of(env), n_steps=20)
        fragments.append(Actor(policy(), Share(first, 2, 4)).collect(env, made, th.get_rng_state().numpy()))
    playback = Playback(fragments, policy())
    assert playback.has_failed
    for step in range(4):
        playback.step(playback.sampler(None))
        playback.check(step)
    with pytest.raises(RuntimeError, match="the simulator crashed") as caught:
        playback.step(playback.sampler(None))
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "of envs 2 to 3, at step 4 of the rollout, in env 3" in str(caught.value.__cause__)


def test_errors_can_be_sent() -> None:
    sent = NonFiniteError("reward", float("inf"), 1, 2, "Look at it.")
    received = pickle.loads(pickle.dumps(sent))
    assert (str(received), vars(received)) == (str(sent), vars(sent))
    try:
        raise KeyError("left") from ValueError("right")
    except KeyError as error:
        failure = pickle.loads(pickle.dumps(Failure.of(error, "In a test")))
    with pytest.raises(KeyError, match="left") as caught:
        failure.reraise()
    assert str(caught.value.__cause__).startswith("\nIn a test:\nValueError: right")
