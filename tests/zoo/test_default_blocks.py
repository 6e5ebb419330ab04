"""The ``default:`` blocks work on every observation space: trained, evaluated, watched, continued and searched."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from gymnasium import spaces
from gymnasium.envs.registration import register, registry
from rl_zoo3 import train as rl_zoo3_train
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg.zoo import ALGORITHMS, config_path, scripts
from sb3_pg.zoo.spaces import fit_to_observations
from tests.helpers import the_others_slow

IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
SMALL_IMAGE = spaces.Box(0, 255, (7, 7, 3), np.uint8)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
REWARDS_ONLY = "dict(norm_obs=False, norm_reward=True)"
FLATTENED = {"env_wrapper": "gymnasium.wrappers.FlattenObservation"}
SPACES: dict[str, spaces.Space[Any]] = {
    "Vector-v0": VECTOR,
    "Discrete-v0": spaces.Discrete(4),
    "MultiDiscrete-v0": spaces.MultiDiscrete([2, 3]),
    "MultiBinary-v0": spaces.MultiBinary(3),
    "Image-v0": IMAGE,
    "SmallImage-v0": SMALL_IMAGE,
    "Dict-v0": spaces.Dict({"image": IMAGE, "vector": VECTOR, "discrete": spaces.Discrete(3)}),
    "Tuple-v0": spaces.Tuple((spaces.Discrete(3), VECTOR)),
}


class AnyEnv(gym.Env[Any, Any]):
    """Episodes of 5 steps; observations are drawn from the space.

    :param name: a key of :data:`SPACES`
    """

    def __init__(self, name: str, render_mode: str | None = None) -> None:
        self.observation_space = SPACES[name]
        self.action_space = spaces.Discrete(2)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observation_space.sample(), float(action), self.t == 5, False, {}


class LikeAtariEnv(AnyEnv):
    """What rl_zoo3 takes for one of Atari's, by its name."""


@pytest.fixture(autouse=True)
def _envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in SPACES:
        register(name, entry_point=cast(Any, AnyEnv), kwargs={"name": name})
    yield
    for name in SPACES:
        del registry[name]


# Sizes alone, so that the tests are fast: neither policy nor normalization.
SIZES = {
    "reinforce": ["n_envs:2", "n_episodes:4"],
    "actor_critic": ["n_envs:2", "n_steps:16", "n_critic_updates:1", "critic_batch_size:16"],
    "async_actor_critic": ["n_envs:2", "n_steps:16", "n_critic_updates:1", "critic_batch_size:16"],
    "npg": ["n_envs:2", "n_steps:16", "n_critic_updates:1"],
    "trpo": ["n_envs:2", "n_steps:16", "n_critic_updates:1"],
    "kl_penalty_pg": ["n_envs:2", "n_steps:16", "n_epochs:1", "batch_size:16"],
    "off_policy_pg": ["n_envs:2", "train_freq:(4,'episode')", "gradient_steps:1"],
    "off_pac": ["learning_starts:20", "train_freq:8", "batch_size:4"],
}


def train(algo: str, env: str, *options: str, params: tuple[str, ...] = ()) -> Path:
    """``sb3-pg train`` for 40 steps.

    :return: the run's folder
    """
    command = f"--algo {algo} --env {env} -n 40 --eval-episodes 1 --num-threads 1 --device cpu --seed 0 --verbose 0"
    before = set(Path("logs").glob(f"{algo}/{env}_*"))
    scripts.train([*command.split(), *options, "-params", *SIZES[algo], *params])
    (run,) = set(Path("logs").glob(f"{algo}/{env}_*")) - before
    return run


def config(run: Path, env: str) -> dict[str, Any]:
    return dict(yaml.load((run / env / "config.yml").read_text(), yaml.UnsafeLoader))


# -------------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("space", "normalize", "expected"),
    [
        (VECTOR, True, {}),
        (spaces.Box(0, 255, (128,), np.uint8), True, {}),
        (spaces.Discrete(4), True, {"normalize": REWARDS_ONLY}),
        (spaces.Discrete(4), False, {}),
        (spaces.Discrete(4), REWARDS_ONLY, {}),
        (spaces.Discrete(4), "dict(norm_obs=True, norm_reward=False)", {"normalize": False}),
        (spaces.Discrete(4), {"clip_reward": 5.0}, {"normalize": f"dict(clip_reward=5.0, {REWARDS_ONLY[5:]}"}),
        (spaces.MultiDiscrete([2, 3]), True, {"normalize": REWARDS_ONLY}),
        (spaces.MultiBinary(3), True, {"normalize": REWARDS_ONLY}),
        (IMAGE, True, {"policy": "CnnPolicy", "normalize": REWARDS_ONLY}),
        (IMAGE, False, {"policy": "CnnPolicy"}),
        (spaces.Box(0, 255, (1, 84, 84), np.uint8), False, {"policy": "CnnPolicy"}),
        (SMALL_IMAGE, True, {"normalize": REWARDS_ONLY}),
        (spaces.Dict({"a": VECTOR, "b": VECTOR}), True, {"policy": "MultiInputPolicy"}),
        (
            SPACES["Dict-v0"],
            True,
            {
                "policy": "MultiInputPolicy",
                "normalize": "dict(norm_obs=True, norm_reward=True, norm_obs_keys=['vector'])",
            },
        ),
        (
            spaces.Dict({"a": spaces.Discrete(2), "b": IMAGE}),
            True,
            {"policy": "MultiInputPolicy", "normalize": REWARDS_ONLY},
        ),
        (SPACES["Tuple-v0"], True, FLATTENED),
        (spaces.Dict({"a": spaces.Dict({"b": VECTOR})}), True, FLATTENED),
        (spaces.Dict({"a": SMALL_IMAGE, "b": VECTOR}), True, FLATTENED),
        (spaces.MultiDiscrete(np.array([[2, 3], [2, 2]])), True, FLATTENED),
    ],
)
def test_decision(space: spaces.Space[Any], normalize: Any, expected: dict[str, Any]) -> None:
    hyperparams = {"policy": "MlpPolicy", "normalize": normalize}
    assert fit_to_observations(space, hyperparams) == expected
    assert hyperparams == {"policy": "MlpPolicy", "normalize": normalize}


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (VECTOR, None),
        (spaces.Box(-1, 1, (376,), np.float64), 2**32 // (2 * 376 * 8)),  # Humanoid
        (spaces.Box(0, 255, (84, 84, 4), np.uint8), 2**32 // (2 * 84 * 84 * 4)),
        (spaces.Dict({"a": spaces.Box(0, 255, (84, 84, 4), np.uint8), "b": VECTOR}), 2**32 // (2 * (28224 + 12))),
    ],
)
def test_a_replay_buffer_takes_no_more_than_four_gib(space: spaces.Space[Any], expected: int | None) -> None:
    assert fit_to_observations(space, {}, buffer_size=1_000_000).get("buffer_size") == expected
    assert "buffer_size" not in fit_to_observations(space, {"buffer_size": 1000}, buffer_size=1_000_000)
    assert "buffer_size" not in fit_to_observations(space, {})


# -------------------------------------------------------------------- training


@pytest.mark.parametrize("env", SPACES)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_default_block_trains(algo: str, env: str) -> None:
    run = train(algo, env)
    used, space = config(run, env), SPACES[env]
    model: Any = ALGOS[algo].load(run / f"{env}.zip", device="cpu")
    assert model.num_timesteps >= 40
    expected = {"Image-v0": "CnnPolicy", "Dict-v0": "MultiInputPolicy"}.get(env, "MlpPolicy")
    assert used["policy"] == expected
    assert type(model.policy) is model.policy_aliases[expected]
    with np.load(run / "evaluations.npz") as log:
        assert log["timesteps"][0] == 0
    normalizes = yaml.safe_load(config_path(algo).read_text())["default"].get("normalize", False)
    assert (run / env / "vecnormalize.pkl").is_file() is normalizes
    if normalizes:
        raw = gym.make(env) if env != "Tuple-v0" else gym.wrappers.FlattenObservation(gym.make(env))
        normalizer = VecNormalize.load(str(run / env / "vecnormalize.pkl"), _vec(raw))
        assert normalizer.norm_reward
        assert normalizer.norm_obs is (env in ("Vector-v0", "Dict-v0", "Tuple-v0"))
        if env == "Dict-v0":
            assert normalizer.norm_obs_keys == ["vector"]
    if algo == "off_pac" and space is IMAGE:
        assert model.replay_buffer is not None
        assert used["buffer_size"] == model.buffer_size == 2**32 // (2 * 36 * 36 * 3)


def _vec(env: gym.Env[Any, Any]) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: PLC0415

    return DummyVecEnv([lambda: env])


@pytest.mark.parametrize(
    ("algo", "env"),
    the_others_slow(
        product(["reinforce", "off_pac"], ["Discrete-v0", "Image-v0", "Dict-v0", "Tuple-v0"]),
        quick=[("reinforce", "Image-v0"), ("reinforce", "Discrete-v0"), ("off_pac", "Dict-v0")],
    ),
)
def test_run_is_watched_continued_and_searched(algo: str, env: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(algo, env)
    first = ALGOS[algo].load(run / f"{env}.zip", device="cpu")
    scripts.enjoy(f"--algo {algo} --env {env} --no-render -n 12 --device cpu".split())
    assert "2 Episodes" in capsys.readouterr().out
    again = train(algo, env, "-i", str(run / f"{env}.zip"))
    assert ALGOS[algo].load(again / f"{env}.zip", device="cpu").num_timesteps >= first.num_timesteps + 40
    search = "-optimize --n-trials 1 --n-evaluations 1 --no-optim-plots"
    scripts.train(
        [
            *f"--algo {algo} --env {env} -n 16 --eval-episodes 1 --num-threads 1 --device cpu --seed 0".split(),
            *search.split(),
            "-params",
            *SIZES[algo],
        ]
    )
    assert list(Path("logs", algo).glob("report_*.csv"))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_frozen_lake_as_the_user_types_it(algo: str) -> None:
    scripts.train(f"--algo {algo} --env FrozenLake-v1 -n 300 --num-threads 1 --device cpu --verbose 0".split())
    assert Path(f"logs/{algo}/FrozenLake-v1_1/FrozenLake-v1.zip").is_file()


@pytest.mark.parametrize("algo", ["off_policy_pg", "off_pac"])
def test_both_replay_buffers_fit_into_memory(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_pg.zoo.spaces._LARGEST_BUFFER", 2**20)
    run = train(algo, "Image-v0")
    model: Any = ALGOS[algo].load(run / "Image-v0.zip", device="cpu")
    assert config(run, "Image-v0")["buffer_size"] == model.buffer_size == 2**20 // (2 * 36 * 36 * 3)


def test_what_the_user_says_is_kept() -> None:
    run = train("reinforce", "Image-v0", params=("policy:'MlpPolicy'", "normalize:False"))
    assert (config(run, "Image-v0")["policy"], config(run, "Image-v0")["normalize"]) == ("MlpPolicy", False)


def test_a_wrapper_of_the_user_is_looked_through() -> None:
    run = train("reinforce", "Tuple-v0", params=("env_wrapper:'gymnasium.wrappers.FlattenObservation'",))
    assert config(run, "Tuple-v0")["normalize"] is True


def test_a_block_of_its_own_is_kept(tmp_path: Path) -> None:
    block = {"n_envs": 2, "n_timesteps": 40, "policy": "MlpPolicy", "n_episodes": 2, "normalize": REWARDS_ONLY}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"Image-v0": block}))
    run = train("reinforce", "Image-v0", "-conf", "mine.yml")
    assert (config(run, "Image-v0")["policy"], config(run, "Image-v0")["normalize"]) == ("MlpPolicy", REWARDS_ONLY)


def test_atari_without_a_block_takes_the_default_one() -> None:
    registry["Image-v0"].entry_point = cast(Any, LikeAtariEnv)
    assert ExperimentManager.is_atari("Image-v0")
    run = train("reinforce", "Image-v0")
    assert config(run, "Image-v0")["policy"] == "CnnPolicy"


def test_a_space_that_nothing_takes_is_an_error_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SPACES, "Tuple-v0", spaces.Sequence(VECTOR))
    with pytest.raises(SystemExit, match="2"):
        train("reinforce", "Tuple-v0")
    assert "error: no policy takes observations of Sequence(Box(-1.0, 1.0, (3,), float32)" in capsys.readouterr().err


def test_nothing_of_rl_zoo3_is_changed_afterwards() -> None:
    script: Any = rl_zoo3_train
    before = script.argparse, script.ExperimentManager, ExperimentManager.create_envs
    train("reinforce", "Discrete-v0")
    assert (script.argparse, script.ExperimentManager, ExperimentManager.create_envs) == before
