"""``sb3-pg train --vec-env``: rl_zoo3 trains on vectorized envs, evaluates on its own, and logs as ever."""

from pathlib import Path
from typing import Any

import pytest
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_pg.envs import ActorVecEnv, EnvPoolAdapter, GymVectorAdapter, get_env_state
from sb3_pg.zoo import scripts

SHORT = ["--verbose", "0", "--num-threads", "1", "--device", "cpu", "--eval-freq", "300", "--eval-episodes", "2"]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[VecEnv]:
    """The envs that rl_zoo3 has made, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    envs: list[VecEnv] = []
    create = ExperimentManager.create_envs

    def noted(self: Any, *args: Any, **kwargs: Any) -> VecEnv:
        envs.append(create(self, *args, **kwargs))
        return envs[-1]

    monkeypatch.setattr(ExperimentManager, "create_envs", noted)
    return envs


def train(algo: str, env: str, *others: str, params: tuple[str, ...] = ()) -> None:
    settings = ["-params", "n_envs:4", "policy_kwargs:dict(net_arch=[4])", *params]
    settings += ["n_steps:64"] if algo == "ppo" else []
    scripts.train(["--algo", algo, "--env", env, "-n", "1200", *SHORT, *others, *settings])


@pytest.mark.parametrize(
    ("algo", "env", "backend", "expected"),
    [
        ("reinforce", "CartPole-v1", "vector", GymVectorAdapter),
        ("off_policy_pg", "CartPole-v1", "vector", GymVectorAdapter),
        ("actor_critic", "Pendulum-v1", "vector", GymVectorAdapter),
        ("ppo", "Pendulum-v1", "vector", GymVectorAdapter),
        ("reinforce", "CartPole-v1", "envpool", EnvPoolAdapter),
        ("a2c", "CartPole-v1", "envpool", EnvPoolAdapter),
        ("actor_critic", "LunarLanderContinuous-v3", "envpool", EnvPoolAdapter),
        ("reinforce", "CartPole-v1", "dummy", DummyVecEnv),
        ("reinforce", "CartPole-v1", "actors", ActorVecEnv),
        ("async_actor_critic", "CartPole-v1", "actors", ActorVecEnv),
        pytest.param("actor_critic", "CartPole-v1", "ray", ActorVecEnv, marks=pytest.mark.ray),
    ],
)
def test_training_envs_are_of_the_backend(
    made: list[VecEnv], tmp_path: Path, algo: str, env: str, backend: str, expected: Any
) -> None:
    if backend == "envpool":
        pytest.importorskip("envpool", exc_type=ImportError)
    create = ExperimentManager.create_envs
    train(algo, env, "--vec-env", backend)
    assert ExperimentManager.create_envs is create
    tried, evaluation, training = (env.unwrapped for env in made)
    assert (type(tried), tried.num_envs) == (expected, 1)  # by which the hyperparameters were checked
    assert (type(training), training.num_envs) == (expected, 4)
    assert type(evaluation) is DummyVecEnv
    (run,) = (tmp_path / "logs" / algo).iterdir()
    assert (run / "evaluations.npz").is_file()
    results = load_results(str(run))
    assert 600 < results["l"].sum() <= 2500  # the episodes that have ended, of 1200 steps and what a rollout exceeds
    if env == "Pendulum-v1":
        assert results["l"].tolist() == [200] * 4
    else:
        assert len(results) > 10


def test_envs_in_processes_give_their_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[tuple[type, str]] = []
    create = ExperimentManager.create_envs

    def noted(self: Any, *args: Any, **kwargs: Any) -> VecEnv:
        self.vec_env_kwargs = {"start_method": "fork"} if self.vec_env_class is not DummyVecEnv else {}
        env = create(self, *args, **kwargs)
        made.append((type(env.unwrapped), get_env_state(env).inexact))
        return env

    monkeypatch.setattr(ExperimentManager, "create_envs", noted)
    train("actor_critic", "CartPole-v1", "--vec-env", "subproc", "--eval-freq", "-1")
    assert made == [(SubprocVecEnv, "")] * 2


@pytest.mark.usefixtures("made")
def test_what_would_take_false_steps_for_real_ones_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for algo in ("ppo", "off_pac"):
        with pytest.raises(SystemExit, match="2"):
            train(algo, "CartPole-v1", "--vec-env", "vector")
        assert f"which {algo} would take for a transition; use --vec-env dummy" in capsys.readouterr().err
    assert not list(tmp_path.glob("logs/*/*"))  # no folder that enjoy would take for a run


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("backend", ["vector", "envpool"])
def test_a_wrapper_of_each_env_is_refused(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(
            "reinforce",
            "CartPole-v1",
            "--vec-env",
            backend,
            params=("env_wrapper:'gymnasium.wrappers.TimeAwareObservation'",),
        )
    assert "cannot be wrapped one by one in TimeAwareObservation" in capsys.readouterr().err


@pytest.mark.usefixtures("made")
def test_stacked_frames_are_refused_before_anything_begins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("reinforce", "CartPole-v1", "--vec-env", "vector", params=("frame_stack:2",))
    assert "frame_stack would take for a transition" in capsys.readouterr().err
    assert not list(tmp_path.glob("logs/*/*"))


def test_of_several_time_limits_the_shortest_counts(made: list[VecEnv]) -> None:
    wrapper = "env_wrapper:[{'gymnasium.wrappers.TimeLimit':{'max_episode_steps':2000}}]"
    train("reinforce", "CartPole-v1", "--vec-env", "vector", params=(wrapper,))
    assert next(env for env in made if env.num_envs == 4).get_attr("max_episode_steps") == [500] * 4


def test_a_wrapper_of_each_of_gymnasiums_own_is_fine(made: list[VecEnv]) -> None:
    wrapper = "env_wrapper:'gymnasium.wrappers.TimeAwareObservation'"
    train("reinforce", "Pendulum-v1", "--vec-env", "vector", params=(wrapper,))
    assert made[0].observation_space.shape == (4,)


def test_actors_take_any_wrapper(made: list[VecEnv]) -> None:
    wrapper = "env_wrapper:'gymnasium.wrappers.TimeAwareObservation'"
    train("actor_critic", "CartPole-v1", "--vec-env", "actors", params=(wrapper, "frame_stack:2", "normalize:True"))
    assert made[0].observation_space.shape == (10,)


def test_arguments_of_the_env_arrive(made: list[VecEnv]) -> None:
    train("reinforce", "CartPole-v1", "--vec-env", "vector", "--env-kwargs", "sutton_barto_reward:True")
    assert next(env for env in made if env.num_envs == 4).get_attr("_sutton_barto_reward") == [True] * 4


def test_an_unknown_backend_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts.train(["--vec-env", "vectr"])
    message = capsys.readouterr().err
    assert "vectr" in message
    assert "envpool" in message
