"""AsyncActorCritic. The stream of fragments alone: tests/envs/actors/test_stream.py."""

import copy
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_pg import ActorCritic, AsyncActorCritic, Memory, NonFiniteError, ResumeCallback
from sb3_pg.envs import ActorVecEnv, make_vec_env
from sb3_pg.rollout import EnvWorkerError
from tests.envs.actors.test_failures import Slow, is_alive, shared_memory, wait_until
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, FaultyEnv, ScriptedEnv, parameters, policy_for, two_envs

pytestmark = pytest.mark.usefixtures("one_thread")
N_STEPS, N_ENVS, N_ACTORS = 8, 5, 2


def fns(action: str = "discrete", observation: str = "vector") -> list[Callable[[], Any]]:
    """Episodes of unequal length, every other one truncated."""

    def make(i: int) -> Any:
        lengths = (3, 4 + i, 9)
        spaces = copy.deepcopy((OBSERVATION_SPACES[observation], ACTION_SPACES[action]))
        return Monitor(ScriptedEnv(lengths, (False, True), -5.0, *spaces))

    return [lambda i=i: make(i) for i in range(N_ENVS)]  # type: ignore[misc]


def actors(transport: Any = "processes", action: str = "discrete", observation: str = "vector") -> VecEnv:
    env = ActorVecEnv(fns(action, observation), N_ACTORS, transport)
    env.seed(0)
    return env


def make(env: VecEnv, cls: Any = AsyncActorCritic, **arguments: Any) -> Any:
    given = {"n_steps": N_STEPS, "seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [16]}}
    return cls(policy_for(env.observation_space), env, **{**given, **arguments})


# ---------------------------------------------------------------- lag 0


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gae_lambda": 0.9, "normalize_advantage": True, "state_discount": True, "ent_coef": 0.01},
        {"critic_learning_rate": 1e-3, "n_critic_updates": 3, "critic_batch_size": 16, "use_rms_prop": False},
        {"memory": "gru", "truncation": "terminal"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["dummy", "serial"])
def test_without_correction_and_lag_it_is_actor_critic(kind: str, arguments: dict[str, Any]) -> None:
    found = []
    for cls, more in ((ActorCritic, {}), (AsyncActorCritic, {"correction": "none"})):
        env = two_envs() if kind == "dummy" else actors("serial")
        env.seed(0)
        found.append(parameters(make(env, cls, **arguments, **more).learn(300)))
    assert th.equal(*found)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_with_correction_all_ratios_are_1(gae_lambda: float) -> None:
    """Targets are lambda-returns, and advantages are those of GAE where lambda is 1."""
    model = make(two_envs(), gae_lambda=gae_lambda)
    other = make(two_envs(), ActorCritic, gae_lambda=gae_lambda)
    for one in (model, other):
        one.set_logger(one.learn(0).logger)
        one.collect_rollouts(one.env, _silent(one), one.rollout_buffer, N_STEPS)
    batch, expected = model.rollout_batch, other.rollout_batch
    assert batch.log_ratio is None
    th.testing.assert_close(batch.returns, expected.returns)
    residual = expected.advantages if gae_lambda == 1 else None
    if residual is not None:
        th.testing.assert_close(batch.advantages, residual)
    model.train()
    assert model._n_updates == 1


def _silent(model: Any) -> BaseCallback:
    callback: BaseCallback = model._init_callback(None)
    return callback


def test_more_epochs_correct_for_the_earlier_ones() -> None:
    """After the first, ratios are those of the present policy to the one that acted; values are new too."""
    model = make(two_envs(), n_epochs=3, learning_rate=1e-2)
    model.learn(0)
    model.collect_rollouts(model.env, _silent(model), model.rollout_buffer, N_STEPS)
    batch = model.rollout_batch
    old, values = batch.log_probs.clone(), batch.values.clone()
    model.train()
    assert model._n_updates == 3
    assert th.equal(batch.log_probs, old)
    assert batch.log_ratio.abs().max() > 1e-4
    assert not th.equal(batch.values, values)


# ---------------------------------------------------------------- lag


class Watch(BaseCallback):
    """Keeps what each update was made from, and the weights of each version."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, th.Tensor]] = []
        self.batches: list[Any] = []
        self.n_steps: list[int] = []

    def _on_rollout_start(self) -> None:
        self.weights.append({name: value.clone() for name, value in self.model.policy.state_dict().items()})
        self.n_steps.append(0)

    def _on_step(self) -> bool:
        n = self.locals["env"].num_envs
        assert n == self.locals["env"].share.n_envs
        for name in ("infos", "rewards", "dones", "actions"):
            assert len(self.locals[name]) == n
        assert len(self.locals["values"]) == len(self.locals["log_probs"]) == n
        self.n_steps[-1] += n
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        self.batches.append(model.rollout_batch)


@pytest.mark.parametrize("correction", ["vtrace", "none"])
@pytest.mark.parametrize("action", ["discrete", "box"])
def test_what_is_learned_from_a_lagging_actor(correction: Any, action: str) -> None:
    """Log-probs are those of the weights two versions ago; ratios and targets follow by plain loops."""
    watch, gamma, lam, rho_bar, c_bar = Watch(), 0.9, 0.8, 1.01, 0.97
    model = make(
        actors("serial", action),
        deterministic=True,
        correction=correction,
        gamma=gamma,
        gae_lambda=lam,
        learning_rate=0.02,
        **({"max_ratio": rho_bar, "max_trace": c_bar} if correction == "vtrace" else {}),
    )
    model.learn(N_STEPS * N_ENVS * 4, watch)
    policy, clipped = model.policy, 0
    for version, batch in enumerate(watch.batches):
        observations, actions = batch.observations.flatten(0, 1), batch.actions.flatten(0, 1)
        actions = actions.flatten() if action == "discrete" else actions
        numbers = {}
        for name, of in (("old", max(0, version - N_ACTORS)), ("new", version)):
            policy.load_state_dict(watch.weights[of])
            with th.no_grad():
                values, log_probs, _ = policy.evaluate_actions(observations, actions)
            numbers[name] = log_probs.view(batch.rewards.shape).double()
        th.testing.assert_close(batch.log_probs.double(), numbers["old"], atol=1e-5, rtol=0)
        th.testing.assert_close(batch.log_ratio.double(), numbers["new"] - numbers["old"], atol=1e-5, rtol=0)
        th.testing.assert_close(batch.values, values.view(batch.rewards.shape).double(), atol=1e-5, rtol=0)
        ratio = (numbers["new"] - numbers["old"]).exp().numpy()
        clipped += int((ratio > rho_bar).sum())
        for env in range(batch.rewards.shape[1]):
            row: Any = {name: getattr(batch, name)[:, env].double().numpy() for name in ("rewards", "values")}
            ends, bootstrap = batch.ends[:, env].numpy(), batch.bootstrap[:, env].numpy()
            later_v, later_target = 0.0, 0.0
            for t in reversed(range(N_STEPS)):
                cut = ends[t] or t == N_STEPS - 1
                if cut:
                    later_v = later_target = bootstrap[t]
                r = ratio[t, env] if correction == "vtrace" else 1.0
                rho, c = (min(r, rho_bar), min(r, c_bar)) if correction == "vtrace" else (1.0, 1.0)
                v, reward = row["values"][t], row["rewards"][t]
                target = v + rho * (reward + gamma * later_v - v) + gamma * lam * c * (later_target - later_v)
                assert batch.returns[t, env] == pytest.approx(target, abs=1e-4)
                credit = reward + gamma * later_target - v if correction == "vtrace" else target - v
                assert batch.advantages[t, env] == pytest.approx(credit, abs=1e-4)
                later_v, later_target = v, target
    assert clipped > 5
    assert any(batch.truncated.any() for batch in watch.batches)


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"memory": "gru"},
    {"memory": Memory("lstm", 8), "n_epochs": 2},
    {"use_sde": True, "sde_sample_freq": 3, "action": "box"},
    {"observation": "image"},
    {"observation": "dict", "action": "multi_discrete"},
    {"critic_learning_rate": 1e-3, "n_critic_updates": 2, "critic_batch_size": 16, "normalize_value_targets": True},
    {"max_policy_lag": 1},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_deterministic_runs_are_reproducible(arguments: dict[str, Any]) -> None:
    """With processes and with actors in this process alike, to the bit."""
    arguments = dict(arguments)
    spaces = {name: arguments.pop(name) for name in ("action", "observation") if name in arguments}
    policy_kwargs = {} if spaces.get("observation") == "image" else {"net_arch": [16]}
    found, counts = [], set()
    for transport in ("processes", "serial", "serial"):
        env = actors(transport, **spaces)
        if "observation" not in spaces:
            env = VecNormalize(env)
        model = make(env, deterministic=True, policy_kwargs=policy_kwargs, **arguments).learn(200)
        env.close()
        found.append(parameters(model))
        counts.add((model.num_timesteps, model._n_updates, model.ep_info_buffer[-1]["r"]))
    assert th.equal(found[0], found[1])
    assert th.equal(found[1], found[2])
    assert len(counts) == 1


def test_old_fragments_are_dropped_and_counted() -> None:
    """With lag 2 for all but the first fragments, the limit of 1 leaves those two, and each one after a pause."""
    watch = Watch()
    env = actors("serial")
    model = make(env, deterministic=True, max_policy_lag=1, memory=Memory("gru", 8, critic="own")).learn(400, watch)
    recorded = model.logger.name_to_value
    n_learned = sum(watch.n_steps)
    n_dropped = recorded["rollout/fragments_dropped"]
    assert n_dropped > 2
    shares = [2, 3]
    assert model._n_updates == len(watch.batches) == len([n for n in watch.n_steps if n])
    assert n_learned < model.num_timesteps
    lost = model.num_timesteps - n_learned
    assert n_dropped * N_STEPS * min(shares) <= lost <= n_dropped * N_STEPS * max(shares)
    assert recorded["rollout/policy_lag_max"] == 2


def test_all_fragments_may_be_too_old() -> None:
    env = actors("serial")
    model = make(env, deterministic=True, max_policy_lag=0)
    model.learn(400)
    assert model.num_timesteps >= 400
    assert 0 < model._n_updates < 20


# ---------------------------------------------------------------- a run with processes


def test_a_run() -> None:
    before = set(multiprocessing.active_children()), shared_memory()
    watch, env = Watch(), VecNormalize(actors())
    model = make(env, queue_size=1).learn(600, watch, log_interval=None)
    statistics: Any = env.obs_rms
    recorded = dict(model.logger.name_to_value)
    assert sum(watch.n_steps) == model.num_timesteps >= 600
    assert model._n_updates == len(watch.batches)
    assert statistics.count >= model.num_timesteps
    assert 0 < recorded["rollout/policy_lag_mean"] <= recorded["rollout/policy_lag_max"]
    assert recorded["rollout/fragments_dropped"] == recorded["rollout/actor_restarts"] == 0
    assert recorded["time/fragments_per_second"] > 0
    assert recorded["time/learner_wait_seconds"] >= 0
    assert recorded["time/actor_wait_seconds"] >= 0
    assert model.rollout_buffer.n_envs == N_ENVS
    assert model._stream is None
    model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps >= 700
    assert evaluate_policy(model, DummyVecEnv(fns()), 5)[0] is not None
    env.reset()
    env.close()
    assert wait_until(lambda: set(multiprocessing.active_children()) <= before[0])
    assert shared_memory() <= before[1]


class Logs(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], *_: Any, **__: Any) -> None:
        self.rows.append(dict(key_values))


@pytest.mark.parametrize("log_interval", [1, 3])
def test_times_in_the_log_add_up(log_interval: int) -> None:
    """Those of a learner that mostly waits: a fragment takes 120 ms."""
    env, logs = ActorVecEnv([Slow, Slow], 2), Logs()
    model = make(env, n_steps=6)
    model.set_logger(Logger(None, [logs]))
    began = time.perf_counter()
    model.learn(6 * 18, log_interval=log_interval)
    seconds = time.perf_counter() - began
    env.close()
    n = log_interval * len(logs.rows)
    assert n == 18
    assert 0.7 * seconds < sum(log_interval / row["time/fragments_per_second"] for row in logs.rows) < seconds
    assert sum(row["time/learner_wait_seconds"] for row in logs.rows) > 0.6 * seconds


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < 11


def test_a_callback_stops() -> None:
    env = actors()
    model = make(env).learn(10_000, Stop())
    assert model._n_updates == 1
    assert N_STEPS * 2 <= model.num_timesteps <= N_STEPS * 3 + 9
    assert model.learn(100)._n_updates > 1
    env.close()


@pytest.mark.parametrize("callback", [None, lambda *_: True, [Stop()]])
def test_the_progress_bar_counts_the_steps_of_fragments(callback: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bar = pytest.importorskip("tqdm.rich").tqdm
    totals = []
    env = actors("serial")
    gc.collect()  # bars of earlier tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bar, "close", lambda self: totals.append((self.n, self.total)))
        model = make(env, deterministic=True).learn(200, callback, progress_bar=True)
    capsys.readouterr()
    assert set(totals) == {(model.num_timesteps, 200)}  # it is closed again when it is freed


def test_masks() -> None:
    """They are those of each actor's own envs: an invalid move would have the reward -10."""
    found = []
    for transport in ("serial", "processes"):
        kwargs = {"transport": transport}
        env = make_vec_env("MaskedGrid-v0", 4, "actors", n_actors=2, seed=0, backend_kwargs=kwargs)
        watch = Watch()
        model = make(env, deterministic=True).learn(400, watch)
        assert all((batch.rewards == -1).all() for batch in watch.batches)
        assert all(batch.log_ratio.isfinite().all() for batch in watch.batches)
        found.append(parameters(model))
        env.close()
    assert th.equal(*found)


def test_an_interrupt_leaves_a_model_and_envs_that_go_on() -> None:
    env = actors()
    model = make(env)
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        for seconds in (0.15, 0.2, 0.25):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with pytest.raises(KeyboardInterrupt):
                model.learn(10**9)
            assert model._stream is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert model.learn(100).num_timesteps >= 100
    env.close()


def test_save_within_a_run_and_load(tmp_path: Path) -> None:
    env = actors()
    model = make(env, max_policy_lag=7).learn(200, CheckpointCallback(20, str(tmp_path), verbose=0))
    env.close()
    saved = sorted(tmp_path.glob("*.zip"))
    assert len(saved) >= 2
    loaded = AsyncActorCritic.load(saved[0], actors("serial"), device="cpu")
    assert loaded.max_policy_lag == 7
    assert not {"_stream", "_buffers", "_window", "_critics_memory"} & vars(loaded).keys()
    assert loaded.learn(50).num_timesteps >= 50
    path = tmp_path / "last"
    model.save(path)
    assert th.equal(parameters(AsyncActorCritic.load(path, device="cpu")), parameters(model))


def test_what_is_refused(tmp_path: Path) -> None:
    env = actors()
    with pytest.raises(ValueError, match="callback must hold no ResumeCallback: what actors are collecting"):
        make(env).learn(100, [ResumeCallback(tmp_path / "run")])
    env.close()
    for given in ({"n_episodes": 4}, {"rollout_buffer_class": object}):
        with pytest.raises((TypeError, ValueError), match=next(iter(given))):
            make(two_envs(), **given)
    with pytest.raises(TypeError, match="n_steps"):
        make(two_envs(), n_steps=None)
    model = make(two_envs(), n_epochs=2)
    with pytest.raises(ValueError, match="n_epochs=2 estimates advantages anew"):
        model.train()


def test_a_serial_env_needs_no_exception_for_resuming(tmp_path: Path) -> None:
    model = make(two_envs()).learn(100, ResumeCallback(tmp_path / "run", every=50))
    assert model.num_timesteps >= 100


# ---------------------------------------------------------------- faults


class Killer(BaseCallback):
    """Kills a random actor now and then.

    :param n: how many times
    :param every: rollouts between two kills
    """

    def __init__(self, n: int, every: int = 2) -> None:
        super().__init__()
        self.n, self.every, self.n_rollouts, self.random = n, every, 0, random.Random(0)
        self.seconds: list[float] = []
        self.killed_at = self.n_learned = 0.0

    def _on_rollout_start(self) -> None:
        self.n_rollouts += 1
        if len(self.seconds) < self.n and self.n_rollouts % self.every == 0:
            workers: Any = self.training_env.unwrapped._workers  # type: ignore[attr-defined]
            with suppress(ProcessLookupError):  # that of the last kill, which was not noticed yet
                os.kill(self.random.choice(workers)._process.pid, signal.SIGKILL)
                self.seconds.append(time.monotonic())

    def _on_step(self) -> bool:
        self.n_learned += len(self.locals["dones"])
        return True


def killed(n: int, every: int = 2, steps: int = 600) -> None:
    env = actors()
    killer, model = Killer(n, every), make(env, max_restarts=n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(steps, killer, log_interval=None)
    assert len(killer.seconds) == n
    restarts = [one for one in caught if "is started again" in str(one.message)]
    # two kills may hit the same process, and the last one may not have been noticed
    assert n // 2 <= len(restarts) <= n
    assert model.logger.name_to_value["rollout/actor_restarts"] == len(restarts)
    assert killer.n_learned == model.num_timesteps >= steps
    env.close()


def test_killed_actors_are_started_again() -> None:
    killed(2)


@pytest.mark.slow
def test_actors_are_killed_50_times() -> None:
    killed(50, every=6, steps=60 * 6 * N_STEPS * 3)


def failing(at: int) -> VecEnv:
    return ActorVecEnv([*fns()[:2], *[lambda: Monitor(FaultyEnv("raise", at, lengths=(4,)))] * 2], 2)


def test_an_env_that_raises_again_and_again() -> None:
    env = failing(20)
    model = make(env, max_restarts=2)
    with (
        pytest.warns(UserWarning, match="envs 2 to 3 is started again: RuntimeError: the simulator crashed"),
        pytest.raises(RuntimeError, match="the simulator crashed") as error,
    ):
        model.learn(100_000)
    assert "In the actor of envs 2 to 3, at step 3 of the rollout, in env 2" in str(error.value.__cause__)
    assert model._stream is None
    assert model.num_timesteps % (N_STEPS * 2) == 0
    env.reset()  # is usable
    env.close()


def test_an_actor_that_is_dead_after_too_many_restarts() -> None:
    env = actors()
    with pytest.raises(EnvWorkerError, match=r"has died, exit code -9\..* max_restarts=0 is reached"):
        make(env, max_restarts=0).learn(10_000, Killer(1))
    env.close()


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_numbers_that_are_not_finite(on_nonfinite: Any) -> None:
    env = ActorVecEnv([*fns()[:2], *[lambda: Monitor(FaultyEnv("reward", 20, lengths=(4,)))] * 2], 2)
    model = make(env, on_nonfinite=on_nonfinite)
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="reward is nan in env 2 at step 3 of the rollout"):
            model.learn(400)
    else:
        with pytest.warns(UserWarning, match="Update skipped: reward is nan in env 2"):
            model.learn(400)
        assert model._n_skipped == 1
        assert model.num_timesteps >= 400
    env.close()


SCRIPT = """
    import os, sys, time
    from sb3_pg import AsyncActorCritic
    from sb3_pg.envs import make_vec_env
    if __name__ == "__main__":
        env = make_vec_env("CartPole-v1", 4, "actors", n_actors=2)
        model = AsyncActorCritic("MlpPolicy", env, device="cpu")
        if sys.argv[1] == "fork" and os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(30)
            os._exit(0)
        print(*(worker._process.pid for worker in env._workers), flush=True)
        model.learn(10**9)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize(("number", "forks"), [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, False)])
def test_actors_end_with_their_learner(number: int, forks: bool, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    before = shared_memory()
    with subprocess.Popen(
        [sys.executable, path, "fork" if forks else "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as learner:
        assert learner.stdout is not None
        lines = [[int(pid) for pid in learner.stdout.readline().split()] for _ in range(1 + forks)]
        pids = max(lines, key=len)
        assert len(pids) == 2
        time.sleep(0.5)
        (os.killpg if number == signal.SIGINT else os.kill)(learner.pid, number)
        learner.wait(20)
        assert wait_until(lambda: not any(map(is_alive, pids)), 10)
        for line in lines:
            if len(line) == 1:
                os.kill(line[0], signal.SIGKILL)
    assert shared_memory() <= before


def test_it_learns() -> None:
    env = make_vec_env("CartPole-v1", 8, "actors", n_actors=2, seed=0)
    model = AsyncActorCritic(
        "MlpPolicy",
        env,
        learning_rate="lin_0.01",
        n_steps=32,
        gamma=0.98,
        gae_lambda=0.98,
        use_rms_prop=False,
        critic_learning_rate=0.01,
        n_critic_updates=4,
        normalize_advantage=True,
        deterministic=True,
        seed=0,
        device="cpu",
    ).learn(25_000)
    env.close()
    assert model.ep_info_buffer is not None
    assert np.mean([info["r"] for info in model.ep_info_buffer][-20:]) > 150
