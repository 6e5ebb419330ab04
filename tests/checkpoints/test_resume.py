"""A resumed run equals one that was not interrupted, to the bit."""

import json
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger, configure
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_pg import (
    TRPO,
    ActorCritic,
    DemonstrationLoss,
    Demonstrations,
    KLAnchor,
    KLPenaltyPG,
    Memory,
    NonFiniteError,
    OffPAC,
    OffPolicyPG,
    Reinforce,
    ResumeCallback,
)
from sb3_pg.checkpoints import latest_checkpoint
from sb3_pg.checkpoints.folder import CheckpointFolder, Manifest
from sb3_pg.checkpoints.run_state import require_run_attributes
from sb3_pg.errors import CheckpointError, UntrustedFileError
from tests.algorithms.every_algorithm import ALGORITHMS, Make, scales_rewards
from tests.helpers import the_others_slow

STEPS = 480
MAKE: dict[str, Make] = {
    **ALGORITHMS,
    "off-pac": lambda env, **k: OffPAC(
        "MlpPolicy", env, **{"learning_starts": 40, "buffer_size": 200, "batch_size": 16, **k}
    ),
    "off-pac-episodes": lambda env, **k: OffPAC(
        "MlpPolicy", env, **{"learning_starts": 40, "train_freq": 8, "n_steps": 3, "batch_size": 16, **k}
    ),
    "off-policy-pg-steps": lambda env, **k: OffPolicyPG("MlpPolicy", env, **{"train_freq": (24, "step"), **k}),
    "actor-critic-memory": lambda env, **k: ActorCritic("MlpPolicy", env, **{"memory": "lstm", "n_steps": 7, **k}),
    "trpo-memory": lambda env, **k: TRPO(
        "MlpPolicy", env, **{"memory": Memory("gru", 8, 2, "shared"), "n_steps": 16, "batch_size": 32, **k}
    ),
    "off-policy-pg-memory": lambda env, **k: OffPolicyPG(
        "MlpPolicy", env, **{"memory": Memory("gru", 8), "train_freq": (24, "step"), **k}
    ),
    "trpo-kl-anchor": lambda env, **k: TRPO(
        "MlpPolicy", env, **{"n_steps": 32, "batch_size": 32, "anchor": KLAnchor(0.5, 0.9), **k}
    ),
    "actor-critic-kl-anchor-memory": lambda env, **k: ActorCritic(
        "MlpPolicy", env, **{"memory": Memory("gru", 8), "n_steps": 7, "anchor": KLAnchor(0.5, 0.9), **k}
    ),
    "kl-penalty-demonstrations": lambda env, **k: KLPenaltyPG(
        "MlpPolicy", env, **{"n_steps": 32, "n_epochs": 2, "anchor": demonstrated(env), **k}
    ),
    "actor-critic-sde": lambda env, **k: ActorCritic("MlpPolicy", env, **{"use_sde": True, "n_steps": 16, **k}),
}


def demonstrated(env: Any) -> DemonstrationLoss:
    rng = np.random.default_rng(0)
    observations = rng.normal(scale=0.1, size=(30, *env.observation_space.shape))
    actions = np.zeros((30, *env.action_space.shape), env.action_space.dtype)
    return DemonstrationLoss(Demonstrations(observations, actions), 0.5, decay=0.9, batch_size=8)


class KilledError(Exception):
    """Stands for a kill."""


class At(BaseCallback):
    """Calls a function at a number of env steps."""

    def __init__(self, n_steps: int, function: Callable[[], Any]) -> None:
        super().__init__()
        self.n_steps, self.function = n_steps, function

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.n_steps:
            self.function()
        return True


def interrupt() -> None:
    raise KilledError


class Rows(KVWriter):
    """Keeps what is logged, but for wall-clock times."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        timeless = {name: value for name, value in key_values.items() if not name.startswith("time/")}
        self.rows.append((step, {name: value for name, value in timeless.items() if "seconds" not in name}))

    def close(self) -> None: ...


def make_env(env_id: str = "CartPole-v1", normalized: bool = False, norm_reward: bool = True) -> Any:
    env = make_vec_env(env_id, 2, seed=3)
    return VecNormalize(env, norm_reward=norm_reward, gamma=0.9) if normalized else env


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, th.Tensor):
        return th.equal(first, second)
    if isinstance(first, np.ndarray | float):
        return bool(np.array_equal(first, second, equal_nan=True))
    return bool(first == second)


def train(model: Any, folder: Path, *callbacks: BaseCallback, every: int = 64, steps: int = STEPS) -> Rows:
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    model.learn(steps, [*callbacks, ResumeCallback(folder, every=every)], log_interval=1)
    return rows


def interrupted(model: Any, folder: Path, *callbacks: BaseCallback, at: int = 330, every: int = 64) -> Rows:
    """Train until a moment within a rollout, and return what was logged before the newest checkpoint."""
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    with pytest.raises(KilledError):
        model.learn(STEPS, [*callbacks, At(at, interrupt), ResumeCallback(folder, every=every)], log_interval=1)
    return rows


def state_of(model: Any) -> dict[str, Any]:
    episodes = [{name: value for name, value in episode.items() if name != "t"} for episode in model.ep_info_buffer]
    return {"parameters": model.get_parameters(), "episodes": episodes, "n_updates": model._n_updates}


def require_the_same_run(
    make: Callable[[], Any], folder: Path, env_id: str = "CartPole-v1", norm_reward: bool = True
) -> None:
    """Train a model, and another one that is interrupted and resumed."""
    whole = make()
    rows = train(whole, folder / "whole").rows
    first = interrupted(make(), folder / "cut")
    again = type(whole).resume(folder / "cut", make_env(env_id, True, norm_reward), device="cpu")
    at = again.num_timesteps
    assert 0 < at < STEPS or env_id == "Pendulum-v1"  # two episodes of 200 steps are one rollout
    rest = train(again, folder / "cut").rows
    assert same(state_of(again), state_of(whole))
    kept = [row for row in first.rows if row[0] <= at]
    kept = kept[: len(rows) - len(rest)]  # a log at the boundary itself comes after the checkpoint
    assert rows
    assert same([*kept, *rest], rows)
    assert same(again.env.obs_rms.mean, whole.env.obs_rms.mean)
    assert same(again.env.returns, whole.env.returns)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("name", MAKE)
def test_equals_an_uninterrupted_run(name: str, env_id: str, tmp_path: Path) -> None:
    if name == "actor-critic-sde" and env_id == "CartPole-v1":
        pytest.skip("gSDE is for Box actions")
    scaled = scales_rewards(name)

    def model() -> Any:
        return MAKE[name](make_env(env_id, True, scaled), seed=0, device="cpu")

    require_the_same_run(model, tmp_path, env_id, scaled)


PRETRAINED = ["actor-critic-batch", "trpo-kl-anchor", "off-policy", "off-pac", "actor-critic-memory", "kl-penalty"]
OFTEN_PRETRAINED = ["actor-critic-batch", "trpo-kl-anchor", "off-pac"]


@pytest.mark.parametrize("name", the_others_slow(PRETRAINED, OFTEN_PRETRAINED))
def test_a_pretrained_model(name: str, tmp_path: Path) -> None:
    """What is left of pretraining is in the model, its VecNormalize and its anchor."""
    given = demonstrated(make_env()).demos
    assert given is not None
    rewards = np.linspace(0, 1, given.n_steps)
    demos = Demonstrations(given.observations, given.actions, rewards, given.terminated, given.truncated)

    def make() -> Any:
        warms_up = {} if name == "off-pac" else {"critic_warmup_updates": 2}
        model = MAKE[name](make_env(normalized=True), seed=0, device="cpu", **warms_up)
        model.pretrain(demos, n_epochs=3, validation=0)
        return model

    require_the_same_run(make, tmp_path)


def test_frame_stack_and_schedule_and_frozen_parameters(tmp_path: Path) -> None:
    def make() -> ActorCritic:
        model = ActorCritic("MlpPolicy", VecFrameStack(make_env(), 3), learning_rate="lin_1e-2", seed=0, device="cpu")
        model.policy.action_net.bias.requires_grad_(False)
        return model

    whole = make()
    train(whole, tmp_path / "whole")
    interrupted(make(), tmp_path / "cut")
    again = ActorCritic.resume(tmp_path / "cut", VecFrameStack(make_env(), 3), device="cpu")
    assert not again.policy.action_net.bias.requires_grad
    train(again, tmp_path / "cut")
    assert same(state_of(again), state_of(whole))


def test_interrupted_many_times(tmp_path: Path) -> None:
    whole = MAKE["off-pac"](make_env(), seed=0, device="cpu")
    train(whole, tmp_path / "whole")
    interrupted(MAKE["off-pac"](make_env(), seed=0, device="cpu"), tmp_path / "cut", at=90)
    for at in (150, 152, 290, 444):
        again = OffPAC.resume(tmp_path / "cut", make_env(), device="cpu")
        interrupted(again, tmp_path / "cut", at=at)
    again = OffPAC.resume(tmp_path / "cut", make_env(), device="cpu")
    train(again, tmp_path / "cut")
    assert same(state_of(again), state_of(whole))
    assert same(again.replay_buffer.observations, whole.replay_buffer.observations)  # type: ignore[union-attr]


# ---------------------------------------------------------------- the call of learn


def actor_critic(**kwargs: Any) -> ActorCritic:
    return ActorCritic("MlpPolicy", make_env(), seed=0, device="cpu", **kwargs)


def test_another_total_is_an_error(tmp_path: Path) -> None:
    interrupted(actor_critic(), tmp_path)
    model = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    with pytest.raises(ValueError, match=r"total_timesteps must be 480.*got 1000"):
        model.learn(1000)
    model.learn(STEPS)
    assert model.num_timesteps == STEPS


def test_total_counts_from_the_start_of_the_call(tmp_path: Path) -> None:
    def make() -> ActorCritic:
        return actor_critic(learning_rate="lin_1e-2").learn(100)

    whole = make().learn(STEPS, reset_num_timesteps=False)
    with pytest.raises(KilledError):
        make().learn(STEPS, [At(400, interrupt), ResumeCallback(tmp_path, every=50)], reset_num_timesteps=False)
    again = ActorCritic.resume(tmp_path, make_env(), device="cpu").learn(STEPS)
    assert again.num_timesteps == whole.num_timesteps == 100 + STEPS
    assert same(again.get_parameters(), whole.get_parameters())


def test_a_finished_run_keeps_its_logs(tmp_path: Path) -> None:
    for _ in range(3):
        found = latest_checkpoint(tmp_path / "ckpt")
        model = ActorCritic.resume(tmp_path / "ckpt", make_env(), device="cpu") if found else actor_critic()
        model.set_logger(configure(str(tmp_path), ["csv", "json"]))
        model.learn(STEPS, ResumeCallback(tmp_path / "ckpt"), log_interval=1)
        for name in ("progress.csv", "progress.json"):
            assert len((tmp_path / name).read_text().splitlines()) >= STEPS // 10


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    whole = actor_critic()
    train(whole, tmp_path)
    after = th.rand(3)
    again = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    assert again.learn(STEPS).num_timesteps == STEPS
    assert same(again.get_parameters(), whole.get_parameters())
    assert th.equal(th.rand(3), after)
    assert again.learn(20).num_timesteps == 20  # a new call
    assert again.learn(30, reset_num_timesteps=False).num_timesteps == 50


def test_a_run_that_a_callback_stopped_is_finished(tmp_path: Path) -> None:
    stop = StopTrainingOnMaxEpisodes(max_episodes=4)
    stopped = actor_critic()
    train(stopped, tmp_path, stop)
    again = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    train(again, tmp_path, StopTrainingOnMaxEpisodes(max_episodes=4))
    assert again.num_timesteps == stopped.num_timesteps < STEPS


def test_the_same_callback_serves_several_calls(tmp_path: Path) -> None:
    callback = ResumeCallback(tmp_path, every=50)
    model = actor_critic().learn(100, callback).learn(100, callback, reset_num_timesteps=False)
    assert ActorCritic.resume(tmp_path, make_env(), device="cpu").num_timesteps == model.num_timesteps == 200


def test_says_that_versions_have_changed(tmp_path: Path) -> None:
    interrupted(actor_critic(), tmp_path)
    folder = CheckpointFolder(tmp_path)
    checkpoint = folder.newest()
    assert checkpoint is not None
    checkpoint.manifest.versions["torch"] = "1.0"
    folder.write(checkpoint.manifest, checkpoint.files, {}, keep=3)
    with pytest.warns(UserWarning, match=r"written with torch 1\.0 \(now 2"):
        ActorCritic.resume(tmp_path, make_env(), device="cpu")


@pytest.mark.parametrize("as_path", [str, Path])
def test_refuses_what_it_cannot_resume(tmp_path: Path, as_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no valid checkpoint"):
        ActorCritic.resume(as_path(tmp_path), make_env())
    interrupted(actor_critic(), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoints of ActorCritic: use ActorCritic\.resume"):
        TRPO.resume(as_path(tmp_path), make_env())
    with pytest.raises(CheckpointError, match=r"checkpoints of another run.*ActorCritic\.resume"):
        train(actor_critic(), tmp_path)
    model = ActorCritic.resume(as_path(tmp_path), make_vec_env("CartPole-v1", 3), device="cpu")
    with pytest.raises(ValueError, match="n_envs is 3"):
        model.learn(STEPS)
    model = ActorCritic.resume(as_path(tmp_path), make_env(normalized=True), device="cpu")
    with pytest.raises(ValueError, match="VecNormalize > DummyVecEnv"):
        model.learn(STEPS)
    model.set_env(make_env())  # the next call goes on
    train(model, tmp_path)
    assert same(model.get_parameters(), actor_critic().learn(STEPS).get_parameters())


def test_one_run_at_a_time_uses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in use by another run"):
        actor_critic().learn(100, [At(10, lambda: train(actor_critic(), tmp_path)), ResumeCallback(tmp_path)])


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"folder": 3}, TypeError, "folder must be a path, got 3"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an integer"),
        ({"keep": True}, TypeError, "keep must be an integer"),
        ({"on_signals": ["SIGKILL"]}, ValueError, "on_signals must be names among"),
        ({"on_signals": "SIGTERM"}, ValueError, "on_signals must be names among"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ResumeCallback(**{"folder": "ckpt", **kwargs})


def test_needs_a_model_of_this_package(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="saves algorithms of sb3_pg, got PPO"):
        PPO("MlpPolicy", "CartPole-v1").learn(10, ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match="one ResumeCallback"):
        actor_critic().learn(10, [ResumeCallback(tmp_path / "a"), ResumeCallback(tmp_path / "b")])
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------- callbacks and logs


class Counts(BaseCallback):
    """Counts the calls of its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"training_start": 0, "rollout_start": 0, "step": 0, "rollout_end": 0}
        self.history: list[int] = []

    def _on_training_start(self) -> None:
        self.calls["training_start"] = 1

    def _on_rollout_start(self) -> None:
        self.calls["rollout_start"] += 1

    def _on_step(self) -> bool:
        self.calls["step"] += 1
        return True

    def _on_rollout_end(self) -> None:
        self.calls["rollout_end"] += 1
        self.history.append(self.num_timesteps)


def test_callbacks_go_on(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        evaluation = EvalCallback(make_env(normalized=True), eval_freq=40, n_eval_episodes=2, verbose=0)
        return [Counts(), evaluation, Counts()]

    whole, cut, again = callbacks(), callbacks(), callbacks()
    train(ActorCritic("MlpPolicy", make_env(normalized=True), seed=0, device="cpu"), tmp_path / "a", *whole)
    model = ActorCritic("MlpPolicy", make_env(normalized=True), seed=0, device="cpu")
    interrupted(model, tmp_path / "b", *cut)
    train(ActorCritic.resume(tmp_path / "b", make_env(normalized=True), device="cpu"), tmp_path / "b", *again)
    for i in (0, 2):
        assert again[i].calls == whole[i].calls
        assert again[i].history == whole[i].history
    assert again[1].evaluations_results == whole[1].evaluations_results
    assert again[1].best_mean_reward == whole[1].best_mean_reward
    assert again[1].n_calls == whole[1].n_calls


def test_arguments_of_callbacks_are_those_of_the_new_ones(tmp_path: Path) -> None:
    class Named(Counts):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    interrupted(actor_critic(), tmp_path, Named("old"))
    new = Named("new")
    train(ActorCritic.resume(tmp_path, make_env(), device="cpu"), tmp_path, new)
    assert new.name == "new"
    assert new.calls["step"] == STEPS // 2


def test_says_which_callbacks_are_missing(tmp_path: Path) -> None:
    interrupted(actor_critic(), tmp_path, Counts())
    model = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    with pytest.warns(UserWarning, match=r"were not passed to learn again.*Counts"):
        model.learn(STEPS)


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = event_accumulator.EventAccumulator(str(folder))
    log.Reload()
    names = [name for name in log.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(event.step, event.value) for event in log.Scalars(name)] for name in names}


def test_tensorboard_goes_on_without_rows_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    whole = actor_critic(tensorboard_log=str(tmp_path / "whole")).learn(STEPS, log_interval=5)
    assert whole.num_timesteps == STEPS
    cut = actor_critic(tensorboard_log=str(tmp_path / "cut"))
    with pytest.raises(KilledError):
        cut.learn(STEPS, [At(330, interrupt), ResumeCallback(tmp_path / "ckpt", every=100)], log_interval=5)
    other = actor_critic(tensorboard_log=str(tmp_path / "cut")).learn(20)  # a run that began later
    for at in (360, None):
        again = ActorCritic.resume(tmp_path / "ckpt", make_env(), device="cpu")
        if at is not None:
            with pytest.raises(KilledError):
                again.learn(STEPS, [At(at, interrupt), ResumeCallback(tmp_path / "ckpt", every=100)], log_interval=5)
        else:
            again.learn(STEPS, log_interval=5)
    assert other.num_timesteps == 20
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["ActorCritic_1", "ActorCritic_2"]
    assert events(tmp_path / "cut" / "ActorCritic_1") == events(tmp_path / "whole" / "ActorCritic_1")


def test_text_logs_go_on(tmp_path: Path) -> None:
    def logs(name: str) -> Logger:
        return configure(str(tmp_path / name), ["csv", "json", "log"])

    whole = actor_critic()
    whole.set_logger(logs("whole"))
    whole.learn(STEPS, log_interval=1)
    cut = actor_critic()
    cut.set_logger(logs("cut"))
    with pytest.raises(KilledError):
        cut.learn(STEPS, [At(330, interrupt), ResumeCallback(tmp_path / "ckpt", every=100)], log_interval=1)
    again = ActorCritic.resume(tmp_path / "ckpt", make_env(), device="cpu")
    again.set_logger(logs("cut"))
    again.learn(STEPS, log_interval=1)
    for name in ("progress.csv", "progress.json", "log.txt"):
        lines = [len((tmp_path / run / name).read_text().splitlines()) for run in ("whole", "cut")]
        assert lines[0] == lines[1] > 10
    rows = [
        [json.loads(line) for line in (tmp_path / run / "progress.json").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    timeless = [[{name: value for name, value in row.items() if "time/" not in name} for row in run] for run in rows]
    assert timeless[0] == timeless[1]
    assert [row["time/total_timesteps"] for row in rows[0]] == [row["time/total_timesteps"] for row in rows[1]]


# ---------------------------------------------------------------- signals


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_saves_the_latest_boundary_at_once(number: int, error: Any, tmp_path: Path) -> None:
    whole = TRPO("MlpPolicy", make_env(), n_steps=64, batch_size=64, seed=0, device="cpu").learn(640)
    handlers = signal.getsignal(number)
    model = TRPO("MlpPolicy", make_env(), n_steps=64, batch_size=64, seed=0, device="cpu")
    with pytest.raises(error) as raised:
        model.learn(640, [At(500, send(number)), ResumeCallback(tmp_path, every=10_000)])
    assert model.num_timesteps == 500  # the rollout was not finished
    if error is SystemExit:
        assert raised.value.code == 128 + number
    assert signal.getsignal(number) is handlers
    again = TRPO.resume(tmp_path, make_env(), device="cpu")
    assert 0 <= again.num_timesteps <= 384
    again.learn(640, [At(10_000, interrupt), ResumeCallback(tmp_path)])
    assert same(again.get_parameters(), whole.get_parameters())


def test_a_signal_during_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TRPO("MlpPolicy", make_env(), n_steps=64, batch_size=64, seed=0, device="cpu").learn(640)
    model = TRPO("MlpPolicy", make_env(), n_steps=64, batch_size=64, seed=0, device="cpu")
    step = th.optim.Adam.step

    def interrupting(self: Any, *args: Any) -> Any:
        if model.num_timesteps >= 384:
            send(signal.SIGTERM)()
        return step(self, *args)

    monkeypatch.setattr(th.optim.Adam, "step", interrupting)
    with pytest.raises(SystemExit):
        model.learn(640, ResumeCallback(tmp_path))
    monkeypatch.undo()
    again = TRPO.resume(tmp_path, make_env(), device="cpu").learn(640)
    assert same(again.get_parameters(), whole.get_parameters())


def test_a_full_replay_buffer_that_was_written_to_waits_for_the_boundary(tmp_path: Path) -> None:
    def make() -> OffPAC:
        kwargs: dict[str, Any] = {"train_freq": 16, "learning_starts": 20, "buffer_size": 100, "batch_size": 16}
        return OffPAC("MlpPolicy", make_env(), seed=0, device="cpu", **kwargs)

    whole, model = make().learn(480), make()
    with pytest.raises(SystemExit):
        model.learn(480, [At(400, send(signal.SIGTERM)), ResumeCallback(tmp_path, every=10_000)])
    assert model.num_timesteps == 416  # the end of the rollout
    again = OffPAC.resume(tmp_path, make_env(), device="cpu")
    assert again.num_timesteps == 416
    again.learn(480, [At(10_000, interrupt), ResumeCallback(tmp_path)])
    assert same(again.get_parameters(), whole.get_parameters())


def test_no_handler_is_installed_without_signals(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    callback = At(100, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    actor_critic().learn(110, [callback, ResumeCallback(tmp_path, on_signals=())])
    assert set(seen) == {before}


# ---------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "how"),
    the_others_slow(
        product(["model.zip", "state", "manifest.json", "block"], ["removed", "truncated", "flipped"]),
        quick=[("model.zip", "flipped"), ("state", "truncated"), ("manifest.json", "removed"), ("block", "flipped")],
    ),
)
def test_a_damaged_checkpoint_is_skipped(name: str, how: str, tmp_path: Path) -> None:
    make = MAKE["off-pac"]
    interrupted(make(make_env(), seed=0, device="cpu"), tmp_path)
    newest, before, *_ = (tmp_path / f"{number:06d}" for number in CheckpointFolder(tmp_path).numbers)
    if name == "block":
        manifests = [Manifest.from_json((path / "manifest.json").read_bytes()) for path in (newest, before)]
        blocks = [{block for array in manifest.arrays.values() for block in array.blocks} for manifest in manifests]
        damage(tmp_path / "blocks" / min(blocks[0] - blocks[1]), how)
    else:
        damage(newest / name, how)
    with pytest.warns(UserWarning, match=f"Checkpoint .*{newest.name} is skipped"):
        assert latest_checkpoint(tmp_path) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = OffPAC.resume(tmp_path, make_env(), device="cpu")
    train(again, tmp_path)
    whole = make(make_env(), seed=0, device="cpu").learn(STEPS)
    assert same(again.get_parameters(), whole.get_parameters())


def test_no_valid_checkpoint_is_left(tmp_path: Path) -> None:
    interrupted(actor_critic(), tmp_path)
    for path in tmp_path.glob("*/state"):
        damage(path, "flipped")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(FileNotFoundError, match="no valid checkpoint"):
        ActorCritic.resume(tmp_path, make_env())


def test_keeps_the_newest(tmp_path: Path) -> None:
    MAKE["off-pac"](make_env(), seed=0, device="cpu").learn(STEPS, ResumeCallback(tmp_path, every=50, keep=2))
    folder = CheckpointFolder(tmp_path)
    assert len(folder.numbers) == 2
    used = {block for manifest in folder.manifests() for array in manifest.arrays.values() for block in array.blocks}
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == used
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fsync, n_calls = actor_critic(), os.fsync, 0

    def full(file: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if model.num_timesteps > 200:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"No checkpoint at .* steps: .*No space left on device"):
        train(model, tmp_path, every=50)
    assert n_calls
    assert model.num_timesteps == STEPS
    monkeypatch.undo()
    assert 150 <= ActorCritic.resume(tmp_path, make_env(), device="cpu").num_timesteps <= 200
    assert not list(tmp_path.glob(".*.tmp"))


# ---------------------------------------------------------------- what cannot be exact, what is not run


class Opaque(gym.Wrapper[Any, Any, Any, Any]):
    """An env whose state cannot be pickled."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.lock: Any = (item for item in "cannot be pickled")


def test_says_from_where_it_is_exact(tmp_path: Path) -> None:
    def envs() -> Any:
        return VecNormalize(make_vec_env("CartPole-v1", 2, seed=3, wrapper_class=Opaque))

    with pytest.warns(UserWarning, match=r"will go on from a reset.*Opaque\.lock"):
        interrupted(ActorCritic("MlpPolicy", envs(), seed=0, device="cpu"), tmp_path)
    ends = []
    for _ in range(2):
        again = ActorCritic.resume(tmp_path, envs(), device="cpu")
        with pytest.warns(UserWarning, match=r"goes on from a reset.*Opaque\.lock"):
            again.learn(STEPS)
        ends.append(again)
    assert ends[0].num_timesteps == STEPS
    assert same(ends[0].get_parameters(), ends[1].get_parameters())


class Thing:
    """A class that no list names."""

    def __init__(self) -> None:
        self.value = 0


class Keeps(Counts):
    """A callback that makes an object as it goes."""

    thing: Thing | None = None

    def _on_rollout_end(self) -> None:
        self.thing = self.thing or Thing()
        self.thing.value += 1


def test_objects_of_unknown_classes_are_allowed_by_name(tmp_path: Path) -> None:
    interrupted(actor_critic(), tmp_path, Keeps())
    model = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    with pytest.raises(UntrustedFileError, match=r"test_resume\.Thing.*allow=\[Thing\]"):
        train(model, tmp_path, Keeps())
    for kwargs in ({"allow": [Thing]}, {"trusted": True}):
        keeps = Keeps()
        model = ActorCritic.resume(tmp_path, make_env(), device="cpu", **kwargs)
        with pytest.raises(KilledError):
            model.learn(STEPS, [keeps, At(0, interrupt)])
        assert keeps.thing is not None
        assert keeps.thing.value > 10


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import os; os.environ['SB3_PG_TEST_HOSTILE'] = '1'",)


@pytest.mark.parametrize("where", ["state", "callback", "env"])
def test_a_hostile_checkpoint_runs_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SB3_PG_TEST_HOSTILE", raising=False)
    interrupted(actor_critic(), tmp_path, Counts())
    folder = CheckpointFolder(tmp_path)
    checkpoint = folder.newest()
    assert checkpoint is not None
    parts: Any = pickle.loads(checkpoint.files["state"])
    hostile = pickle.dumps(Hostile())
    if where == "state":
        parts["x"] = Hostile()
    elif where == "callback":
        (name,) = (name for name in parts["callbacks"] if "Counts" in name)
        parts["callbacks"][name]["attributes"]["x"] = hostile
    else:
        parts["env"][1][0]["attributes"]["x"] = ("pickled", hostile)
    arrays = {name: checkpoint.arrays(name)[""] for name in checkpoint.manifest.arrays}
    folder.write(checkpoint.manifest, {**checkpoint.files, "state": pickle.dumps(parts)}, arrays, keep=9)
    with pytest.raises(UntrustedFileError, match="trusted=True"):
        ActorCritic.resume(tmp_path, make_env(), device="cpu").learn(STEPS, Counts())
    assert "SB3_PG_TEST_HOSTILE" not in os.environ


def test_an_error_of_the_env_leaves_the_checkpoints(tmp_path: Path) -> None:
    def spoil() -> None:
        with th.no_grad():
            next(model.policy.action_net.parameters()).fill_(th.nan)

    model = actor_critic()
    with pytest.raises(NonFiniteError):
        train(model, tmp_path, At(300, spoil))
    again = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    train(again, tmp_path, At(10_000, spoil))
    assert same(again.get_parameters(), actor_critic().learn(STEPS).get_parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["trpo", "off-pac", "actor-critic"])
def test_equals_an_uninterrupted_run_on_cuda(name: str, tmp_path: Path) -> None:
    def make() -> Any:
        return MAKE[name](make_env("Pendulum-v1"), seed=0, device="cuda")

    whole = make()
    train(whole, tmp_path / "whole")
    interrupted(make(), tmp_path / "cut")
    again = type(whole).resume(tmp_path / "cut", make_env("Pendulum-v1"), device="cuda")
    train(again, tmp_path / "cut")
    assert same(state_of(again), state_of(whole))


def test_reinforce_with_a_fitted_baseline_object(tmp_path: Path) -> None:
    def make() -> Reinforce:
        return Reinforce("MlpPolicy", make_env(), n_episodes=4, baseline="time", seed=0, device="cpu")

    whole = make()
    train(whole, tmp_path / "whole")
    interrupted(make(), tmp_path / "cut", at=400)
    again = Reinforce.resume(tmp_path / "cut", make_env(), device="cpu")
    train(again, tmp_path / "cut")
    assert same(state_of(again), state_of(whole))


def test_the_memory_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    def make() -> Any:
        return MAKE["actor-critic-memory"](make_env(), seed=0, device="cpu")

    first = make()
    interrupted(first, tmp_path, at=150, every=14)
    again = ActorCritic.resume(tmp_path, make_env(), device="cpu")
    assert again._memory is None  # until learn has put the envs where they were
    seen: list[Any] = []

    def look() -> None:
        buffer: Any = again.rollout_buffer
        seen.append(buffer.memory)
        interrupt()

    with pytest.raises(KilledError):
        again.learn(STEPS, At(1, look))
    (memory,) = seen
    assert memory.keys() == {"actor", "critic"}
    assert all(part.shape == (1, 2, 64) and part.abs().max() > 0 for state in memory.values() for part in state)


@pytest.mark.parametrize(
    "value",
    [
        {"actor": (th.zeros(1, 2, 64),)},
        {"actor": (th.zeros(1, 3, 64),) * 2},
        {"actor": (th.zeros(1, 2, 64).long(),) * 2},
        {"actor": [th.zeros(1, 2, 64)] * 2},
        {"other": (th.zeros(1, 2, 64),) * 2},
        {"actor": 3},
        7,
    ],
    ids=str,
)
def test_a_memory_of_other_layers_or_envs_is_refused(value: Any) -> None:
    model = MAKE["actor-critic-memory"](make_env(), seed=0, device="cpu")
    require_run_attributes(model, {"_memory": {"actor": (th.zeros(1, 2, 64),) * 2}})
    require_run_attributes(model, {"_memory": None})
    with pytest.raises(ValueError, match="the attribute _memory is"):
        require_run_attributes(model, {"_memory": value})
    plain = actor_critic()
    require_run_attributes(plain, {"_memory": {}})
    with pytest.raises(ValueError, match="the attribute _memory is"):
        require_run_attributes(plain, {"_memory": {"actor": (th.zeros(1, 2, 64),) * 2}})
