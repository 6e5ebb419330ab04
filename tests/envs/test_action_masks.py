"""Masks reach observations from every place where envs give them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_wrapper,
)

from sb3_pg.envs import (
    ActionMaskVecEnv,
    GymVectorAdapter,
    MaskedGrid,
    make_vec_env,
    subproc_vec_env,
    with_action_masks,
)
from sb3_pg.envs.action_masks import masks_in_infos
from tests.envs.masked import SIZES, Restless, RestlessVector, mask_at

KINDS = ("discrete", "multi_discrete", "multi_binary")


def makers(n: int = 2, lengths: tuple[int, ...] = (3, 4), **kwargs: Any) -> list[Callable[[], gym.Env[Any, Any]]]:
    return [functools.partial(Restless, length=length, **kwargs) for length in lengths[:n]]


def allowed_actions(masks: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    actions = []
    for mask in masks:
        parts = np.split(mask.astype(bool), np.cumsum(SIZES[kind])[:-1])
        actions.append([rng.choice(np.flatnonzero(part)) for part in parts])
    found = np.array(actions)
    return found[:, 0] if kind == "discrete" else found


def play(env: VecEnv, kind: str = "discrete", n_steps: int = 15, key: str = "observation") -> None:
    """Take allowed actions, which the envs check, and compare every mask with that of the episode and time shown."""
    rng = np.random.default_rng(0)
    obs: Any = env.reset()
    for _ in range(n_steps):
        for shown, mask in zip(obs[key], obs["action_mask"], strict=True):
            assert mask.tolist() == mask_at(kind, *map(int, shown)).tolist()
        assert env.observation_space.contains({name: part[0] for name, part in obs.items()})
        obs, _, dones, infos = env.step(allowed_actions(obs["action_mask"], kind, rng))
        for done, info in zip(dones, infos, strict=True):
            if done:
                assert env.observation_space.contains(info["terminal_observation"])


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv, subproc_vec_env])
@pytest.mark.parametrize("source", ["method", "info"])
def test_masks_are_those_of_the_observation(vec_env: Any, source: str) -> None:
    kinds = KINDS if vec_env is DummyVecEnv else KINDS[:1]
    for kind in kinds:
        env = with_action_masks(vec_env(makers(kind=kind, source=source)), probe=True)
        assert isinstance(env, ActionMaskVecEnv)
        play(env, kind)
        env.close()


@pytest.mark.parametrize("source", ["method", "info"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_masks_of_gymnasiums_vector_envs(kind: str, source: str) -> None:
    cls = SyncVectorEnv if kind == "sync" else AsyncVectorEnv
    env = cls(makers(source=source), autoreset_mode=AutoresetMode.SAME_STEP)
    play(with_action_masks(GymVectorAdapter(env), probe=True))
    env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP])
def test_masks_of_native_vector_envs(mode: AutoresetMode) -> None:
    env: Any = with_action_masks(GymVectorAdapter(RestlessVector(2, mode)), probe=True)
    rng = np.random.default_rng(0)
    with env.skip_reset_steps() as resets:
        obs = env.reset()
        n_resets = 0
        for _ in range(20):
            for shown, mask in zip(obs["observation"], obs["action_mask"], strict=True):
                assert mask.tolist() == mask_at("discrete", *map(int, shown)).tolist()
            n_resets += 0 if resets is None else int(resets.sum())
            obs, _, _, _ = env.step(allowed_actions(obs["action_mask"], "discrete", rng))
    assert (n_resets > 0) == (mode is AutoresetMode.NEXT_STEP)


def test_the_mask_of_a_terminal_observation_is_that_of_its_infos_or_allows_all() -> None:
    for source in ("info", "method"):
        env = ActionMaskVecEnv(DummyVecEnv(makers(1, source=source, lengths=(1,))))
        obs: Any = env.reset()
        _, _, _, infos = env.step(allowed_actions(obs["action_mask"], "discrete", np.random.default_rng(0)))
        expected = mask_at("discrete", 0, 1) if source == "info" else np.ones(4)
        assert infos[0]["terminal_observation"]["action_mask"].tolist() == expected.tolist()


class Reused(gym.Env[Any, Any]):
    """Changes its mask in place. At time t it allows action t alone."""

    observation_space = spaces.Box(0, 9, (1,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, source: str, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.in_infos, self.own = source == "info", np.ones(3, dtype=bool)
        if source == "method":
            self.action_masks = lambda: self.own

    def _shown(self, t: int) -> tuple[Any, dict[str, Any]]:
        self.t = t
        self.own[:] = np.arange(3) == t
        return np.array([t], np.float32), {"action_mask": self.own} if self.in_infos else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._shown(0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, info = self._shown(self.t + 1)
        return observation, 0.0, False, self.t == 2, info


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        *[(kind, source) for kind in ("dummy", "sync", "make_vec_env") for source in ("method", "info")],
        ("subproc", "method"),
    ],
)
def test_an_env_may_reuse_its_array_of_the_mask(kind: str, source: str) -> None:
    made: list[Callable[[], gym.Env[Any, Any]]] = [functools.partial(Reused, source) for _ in range(2)]
    if kind == "sync":
        vec_env: VecEnv = GymVectorAdapter(SyncVectorEnv(made, autoreset_mode=AutoresetMode.SAME_STEP))
    elif kind == "make_vec_env":
        made_by_id: Any = Reused
        gym.register("Reused-v0", made_by_id)
        vec_env = make_vec_env("Reused-v0", 2, "vector", env_kwargs={"source": source})
        del gym.registry["Reused-v0"]
    else:
        vec_env = DummyVecEnv(made) if kind == "dummy" else subproc_vec_env(made)
    env = with_action_masks(vec_env, probe=True)
    kept: list[Any] = [env.reset()]
    for _ in range(4):
        obs, _, dones, infos = env.step(kept[-1]["action_mask"].argmax(1))
        kept.append(obs)
        if dones.all() and not (kind == "sync" and source == "method"):  # there, nobody can ask in time
            assert [info["terminal_observation"]["action_mask"].tolist() for info in infos] == [[0, 0, 1]] * 2
    assert [obs["action_mask"].argmax(1).tolist() for obs in kept] == [[0, 0], [1, 1], [0, 0], [1, 1], [0, 0]]
    env.close()


def test_dict_observations_get_one_more_key() -> None:
    env = with_action_masks(DummyVecEnv(makers(as_dict=True)))
    assert set(env.observation_space.spaces) == {"vec", "class", "action_mask"}  # type: ignore[attr-defined]
    play(env, key="vec")


def test_an_env_with_the_key_is_left_as_it_is() -> None:
    env = DummyVecEnv(makers(source="key"))
    assert with_action_masks(env) is env
    assert with_action_masks(env, use=True) is env


def test_envs_without_masks_are_left_as_they_are() -> None:
    for env in (DummyVecEnv(makers(source="none")), DummyVecEnv([lambda: gym.make("Pendulum-v1")])):
        assert with_action_masks(env, probe=True) is env
        with pytest.raises(ValueError, match="use_action_masks=True takes an env with"):
            with_action_masks(env, use=True)


def test_false_takes_masks_out_again() -> None:
    inner = DummyVecEnv(makers())
    assert with_action_masks(inner, use=False) is inner
    assert with_action_masks(with_action_masks(inner), use=False) is inner


def test_a_key_of_another_shape_is_no_mask() -> None:
    class Other(Restless):
        def __init__(self) -> None:
            super().__init__(source="none")
            self.observation_space = spaces.Dict({"action_mask": spaces.Box(0, 1, (7,))})

    env = DummyVecEnv([Other])
    assert with_action_masks(env) is env
    with pytest.raises(ValueError, match="use_action_masks=True takes an env with"):
        with_action_masks(env, use=True)


def test_a_look_at_infos_leaves_the_seeds_and_other_envs_alone() -> None:
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    env.seed(3)
    assert with_action_masks(env, probe=True) is env
    first = env.reset()
    other = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    other.seed(3)
    np.testing.assert_array_equal(first, other.reset())
    quiet = DummyVecEnv(makers(source="info"))
    assert with_action_masks(quiet) is quiet  # not reset
    assert quiet.envs[0].unwrapped.episode == -1  # type: ignore[attr-defined]
    quiet.reset()
    assert isinstance(with_action_masks(quiet), ActionMaskVecEnv)


def test_wrappers_inside_see_no_mask() -> None:
    inner = VecFrameStack(VecNormalize(DummyVecEnv(makers()), training=True), 2)
    env = with_action_masks(inner)
    rng = np.random.default_rng(0)
    obs: Any = env.reset()
    for _ in range(8):
        obs, _, dones, infos = env.step(allowed_actions(obs["action_mask"], "discrete", rng))
        assert obs["observation"].shape == (2, 4)
        for done, info in zip(dones, infos, strict=True):
            assert not done or info["terminal_observation"]["observation"].shape == (4,)


WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "normalize": VecNormalize,
    "stack": lambda env: VecFrameStack(env, 2),
    "stack first": lambda env: VecFrameStack(env, 3, channels_order="first"),
    "stack in normalize": lambda env: VecNormalize(VecFrameStack(env, 2)),
    "normalize in stack": lambda env: VecFrameStack(VecNormalize(env), 2),
    "nothing to normalize": lambda env: VecNormalize(env, norm_obs=False),
    "monitor around all": lambda env: VecMonitor(VecFrameStack(VecNormalize(env), 2)),
}


def statistics(env: VecEnv) -> Any:
    """Mean, variance and count of the observations that a VecNormalize has seen, without those of masks."""
    running = getattr(unwrap_vec_wrapper(env, VecNormalize), "obs_rms", None)
    running = running["observation"] if isinstance(running, dict) else running
    return running and {name: np.asarray(value).tolist() for name, value in vars(running).items()}


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_wrappers_around_masks_give_what_wrappers_inside_give(name: str) -> None:
    inside: Any = with_action_masks(WRAPPERS[name](DummyVecEnv(makers())))
    made = WRAPPERS[name](ActionMaskVecEnv(DummyVecEnv(makers())))
    for _ in range(2):  # once more does no harm
        assert with_action_masks(made) is made
    around: Any = made
    space = around.observation_space
    assert space["observation"] == inside.observation_space["observation"]
    assert space["action_mask"] == inside.observation_space["action_mask"]
    rng = np.random.default_rng(0)
    expected, found = inside.reset(), around.reset()
    for _ in range(12):
        for key in ("observation", "action_mask"):
            np.testing.assert_array_equal(found[key], expected[key])
            assert found[key].shape == (2, *space[key].shape)
        actions = allowed_actions(expected["action_mask"], "discrete", rng)
        expected, rewards, dones, infos = inside.step(actions)
        found, other_rewards, other_dones, other_infos = around.step(actions)
        np.testing.assert_array_equal(other_rewards, rewards)
        np.testing.assert_array_equal(other_dones, dones)
        for i in np.flatnonzero(dones):
            last, other = infos[i]["terminal_observation"], other_infos[i]["terminal_observation"]
            np.testing.assert_array_equal(other["observation"], last["observation"])
            assert other["action_mask"].tolist() == last["action_mask"].tolist()
    assert statistics(around) == statistics(inside)


@pytest.mark.parametrize("name", ["normalize", "stack", "stack in normalize", "normalize in stack"])
def test_masks_among_an_envs_own_keys_pass_wrappers(name: str) -> None:
    env: Any = with_action_masks(WRAPPERS[name](DummyVecEnv(makers(source="key"))))
    assert set(env.observation_space.spaces) == {"vec", "action_mask"}
    obs = env.reset()
    for _ in range(8):
        expected = np.stack([one.mask() for one in env.get_attr("unwrapped")])
        assert obs["action_mask"].tolist() == expected.astype(int).tolist()
        obs = env.step(allowed_actions(expected, "discrete", np.random.default_rng(0)))[0]
    if name == "normalize":
        assert set(env.obs_rms) == set(env.norm_obs_keys) == {"vec"}


def test_statistics_that_were_saved_fit_masks_again(tmp_path: Path) -> None:
    env = VecNormalize(ActionMaskVecEnv(DummyVecEnv(makers())))
    with_action_masks(env)
    env.reset()
    env.save(str(tmp_path / "statistics.pkl"))
    again: Any = VecNormalize.load(str(tmp_path / "statistics.pkl"), ActionMaskVecEnv(DummyVecEnv(makers())))
    assert set(np.unique(again.reset()["action_mask"])) <= {0, 1}
    assert again.obs_rms["observation"].count > env.obs_rms["observation"].count


def test_statistics_of_stacked_frames_are_loaded_around_masks_that_pass(tmp_path: Path) -> None:
    def stacked() -> VecEnv:
        return VecFrameStack(ActionMaskVecEnv(DummyVecEnv(makers())), 2)

    env = VecNormalize(stacked())
    with_action_masks(env)
    env.reset()
    env.save(str(tmp_path / "statistics.pkl"))
    again: Any = VecNormalize.load(str(tmp_path / "statistics.pkl"), with_action_masks(stacked()))
    obs = again.reset()
    assert obs["observation"].shape == (2, 4)
    assert obs["action_mask"].tolist() == [mask_at("discrete", 0, 0).tolist()] * 2
    assert again.obs_rms.keys() == {"observation"}


def test_images_are_transposed_beside_masks() -> None:
    class Images(Restless):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (36, 38, 1), np.uint8)

        def _shown(self) -> tuple[Any, dict[str, Any]]:
            return np.full((36, 38, 1), self.t, np.uint8), {}

    env: Any = with_action_masks(VecTransposeImage(VecFrameStack(ActionMaskVecEnv(DummyVecEnv([Images])), 4)))
    obs = env.reset()
    assert obs["observation"].shape == (1, 4, 36, 38)
    assert obs["action_mask"].tolist() == mask_at("discrete", 0, 0)[None].tolist()


def test_a_wrapper_that_leaves_the_mask_out_gets_one_around_it() -> None:
    env: Any = VecExtractDictObs(ActionMaskVecEnv(DummyVecEnv(makers())), "observation")
    env = with_action_masks(env)
    assert isinstance(env, ActionMaskVecEnv)
    play(env)


def test_masks_under_other_wrappers_cannot_be_taken_out() -> None:
    env = VecNormalize(ActionMaskVecEnv(DummyVecEnv(makers())))
    message = r"use_action_masks=False cannot take.*VecNormalize.*make_vec_env\(..., use_action_masks=False\)"
    with pytest.raises(ValueError, match=message):
        with_action_masks(env, use=False)
    own = VecNormalize(DummyVecEnv(makers(source="key")))
    assert with_action_masks(own, use=False) is own
    assert own.norm_obs_keys == ["action_mask", "vec"]  # then they are numbers as any others


class Counting(SubprocVecEnv):
    """Counts the messages to the processes that ask for masks."""

    n_calls = 0

    def env_method(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.n_calls += 1
        return super().env_method(*args, **kwargs)


def test_masks_of_processes_of_make_vec_env_travel_with_infos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_pg.envs.state.members.SubprocVecEnv", Counting)
    env: Any = make_vec_env("MaskedGrid-v0", 2, backend="subproc")
    assert isinstance(env.venv, Counting)
    obs = env.reset()
    for _ in range(3):
        obs, _, _, _ = env.step(obs["action_mask"].argmax(1))
    assert env.venv.n_calls == 0
    assert obs["action_mask"].tolist() == np.stack(env.env_method("action_masks")).astype(int).tolist()
    env.close()


@pytest.mark.parametrize("backend", ["auto", "dummy", "vector"])
def test_make_vec_env_adds_masks(backend: str) -> None:
    env = make_vec_env("MaskedGrid-v0", 2, backend=backend)
    assert isinstance(env, ActionMaskVecEnv)
    assert env.reset()["action_mask"].tolist() == [[0, 1, 1, 0]] * 2
    assert isinstance(
        make_vec_env("MaskedGrid-v0", backend=backend, use_action_masks=False), DummyVecEnv | GymVectorAdapter
    )
    assert isinstance(make_vec_env("Taxi-v4", backend=backend), ActionMaskVecEnv)
    assert not isinstance(make_vec_env("CartPole-v1", backend=backend), ActionMaskVecEnv)
    with pytest.raises(ValueError, match="use_action_masks=True"):
        make_vec_env("CartPole-v1", backend=backend, use_action_masks=True)


def test_an_env_without_a_mask_at_some_step_is_an_error() -> None:
    class Forgetful(Restless):
        def _shown(self) -> tuple[Any, dict[str, Any]]:
            observation, info = super()._shown()
            return observation, info if self.t < 2 else {}

    env = with_action_masks(DummyVecEnv([lambda: Forgetful(source="info")]), use=True)
    obs: Any = env.reset()
    obs = env.step(obs["action_mask"].argmax(1))[0]
    with pytest.raises(ValueError, match="env 0 gives no action mask"):
        env.step(obs["action_mask"].argmax(1))


@pytest.mark.parametrize("source", ["method", "info"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(3), r"got shape \(3,\)"),
        (np.ones((2, 4)), r"got shape \(2, 4\)"),
        (np.ones((3, 4)), r"got shape \(3, 4\)"),
        (np.ones(8), r"got shape \(8,\)"),
        (True, r"got shape \(\)"),
        ([2, 0, 0, 1], "got values other than 0 and 1: .*"),
        ([0.5, 0, 0, 1], "got values other than 0 and 1: .*"),
        ([np.nan, 0, 0, 1], "got values other than 0 and 1: .*"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_mask_that_does_not_fit_is_an_error(n: int, mask: Any, message: str, source: str) -> None:
    class Wrong(Restless):
        def mask(self) -> Any:
            return mask

    env = with_action_masks(DummyVecEnv([lambda: Wrong(source=source)] * n), use=True, probe=True)
    start = r"action_mask of env 0 must be an array of shape \(4,\), True where Discrete\(4\) allows a choice, "
    with pytest.raises(ValueError, match=f"^{start}{message}$"):  # nothing else is wrong, such as a VecNormalize
        env.reset()


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP])
def test_masks_of_all_envs_of_a_native_vector_env_come_at_once(mode: AutoresetMode) -> None:
    class AtOnce(RestlessVector):
        n_rows = 2

        def action_masks(self) -> np.ndarray:
            return np.ones((self.n_rows, 4), bool)

        def _batch(self, others: dict[str, Any]) -> Any:
            return super()._batch(others)[0], {}

    inner = AtOnce(2, mode)
    env: Any = with_action_masks(GymVectorAdapter(inner))
    assert env.reset()["action_mask"].tolist() == [[1] * 4] * 2
    inner.n_rows = 3
    with pytest.raises(ValueError, match=r"action_mask of env 0 must be an array of shape \(4,\).*got shape \(3, 4\)"):
        env.reset()


def with_member(member: Any) -> Any:
    return type("Odd", (Restless,), {"action_masks": member})


@pytest.mark.parametrize(
    "cls",
    [
        with_member(np.ones(4, bool)),
        with_member(property(lambda _: np.ones(4, bool))),
        with_member(lambda _, _state: np.ones(4, bool)),
    ],
    ids=["array", "property", "takes an argument"],
)
def test_masks_that_are_no_method_without_arguments_are_named(cls: Any) -> None:
    made = [lambda: cls(source="none")] * 2
    message = "action_masks of the env must be a method without arguments"
    env = DummyVecEnv(made)
    with pytest.raises(TypeError, match=message):
        with_action_masks(env)
    assert with_action_masks(env, use=False) is env
    for other in (ActionMaskVecEnv(env), with_action_masks(GymVectorAdapter(SyncVectorEnv(made)))):
        with pytest.raises(TypeError, match=message):
            other.reset()
    one = made[0]()
    assert masks_in_infos(one) is one


def test_lists_of_numbers_are_masks_too() -> None:
    class Listed(Restless):
        def _masks(self) -> Any:
            return [1, 0, 0, 1]

    env = with_action_masks(DummyVecEnv([Listed]))
    assert env.reset()["action_mask"].tolist() == [[1, 0, 0, 1]]  # type: ignore[call-overload]


def test_a_box_and_a_second_key_are_refused() -> None:
    with pytest.raises(ValueError, match="masks are for Discrete"):
        ActionMaskVecEnv(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    with pytest.raises(ValueError, match="have the key 'action_mask' already"):
        ActionMaskVecEnv(DummyVecEnv(makers(source="key")))


def test_the_grid_has_the_walls_of_its_map() -> None:
    env = MaskedGrid(("S#", ".G"), render_mode="ansi")
    assert env.reset()[0].tolist() == [-1, -1]
    assert env.action_masks().tolist() == [False, False, True, False]
    assert env.step(1)[1:3] == (-10, False)  # a wall
    assert env.step(2)[1:3] == (-1, False)
    assert env.render() == "S#\nAG"
    assert env.step(1)[1:3] == (-1, True)
    assert MaskedGrid(render_mode="rgb_array").render().shape == (192, 192, 3)
    for layout in (("S", ".G"), ("S.", ".."), ("SS", ".G")):
        with pytest.raises(ValueError, match="layout must have"):
            MaskedGrid(layout)
