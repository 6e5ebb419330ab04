"""To those who know nothing of actors, they are an ordinary VecEnv."""

import copy
import gc
import pickle
import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch as th
from gymnasium.envs.registration import register, registry
from gymnasium.wrappers import OrderEnforcing
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from sb3_pg import ActorCritic, GradientDiagnosticsCallback, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.envs import ActorVecEnv, get_env_state, make_vec_env, set_env_state
from sb3_pg.rollout import Collector
from tests.helpers import TRANSPORTS, ScriptedEnv, parameters

pytestmark = pytest.mark.usefixtures("one_thread")
N_ENVS = 5


@pytest.fixture(scope="module", params=TRANSPORTS)
def env(request: pytest.FixtureRequest) -> Iterator[VecEnv]:
    made = make_vec_env(
        "CartPole-v1", N_ENVS, "actors", seed=1, n_actors=2, backend_kwargs={"transport": request.param}
    )
    yield made
    made.close()


def dummy(n_envs: int = N_ENVS, env_id: str = "CartPole-v1") -> VecEnv:
    return make_vec_env(env_id, n_envs, "dummy", seed=1)


def serial(env_id: str = "CartPole-v1", n_envs: int = N_ENVS, n_actors: int = 2) -> Any:
    return make_vec_env(env_id, n_envs, "actors", 1, n_actors=n_actors, backend_kwargs={"transport": "serial"})


def without_time(infos: Any) -> list[dict[str, Any]]:
    return [{name: {**value, "t": 0} if name == "episode" else value for name, value in info.items()} for info in infos]


def test_steps_are_those_of_dummy(env: VecEnv) -> None:
    other = dummy()
    env.seed(1)
    np.testing.assert_array_equal(env.reset(), other.reset())
    for _ in range(40):
        actions = np.arange(N_ENVS) % 2
        got, expected = env.step(actions), other.step(actions)
        pairs: Any = zip(got[:3], expected[:3], strict=True)
        for mine, theirs in pairs:
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype
        np.testing.assert_equal(without_time(got[3]), without_time(expected[3]))
    env.seed(7)
    env.set_options({"low": -0.01, "high": 0.01})
    other.seed(7)
    other.set_options({"low": -0.01, "high": 0.01})
    np.testing.assert_array_equal(env.reset(), other.reset())
    other.seed(8)
    env.seed(8)
    np.testing.assert_array_equal(env.reset(), other.reset())  # the options were for one reset


def test_attributes_and_methods(env: VecEnv) -> None:
    assert env.get_attr("gravity") == [9.8] * N_ENVS
    env.set_attr("gravity", 5.0, indices=[1, 4])
    assert env.get_attr("gravity", [4, 0, 1]) == [5.0, 9.8, 5.0]
    assert env.get_attr("gravity", -1) == [5.0]
    env.set_attr("gravity", 9.8)
    assert env.env_is_wrapped(Monitor, 2) == [True]
    assert env.env_is_wrapped(OrderEnforcing) == [True] * N_ENVS
    assert env.env_is_wrapped(DummyVecEnv) == [False] * N_ENVS  # type: ignore[arg-type]
    assert env.has_attr("gravity")
    assert not env.has_attr("levity")
    assert len(env.env_method("get_wrapper_attr", "gravity", indices=range(3))) == 3
    with pytest.raises(AttributeError, match="levity"):
        env.get_attr("levity")
    with pytest.raises(IndexError):
        env.get_attr("gravity", N_ENVS)
    env.set_attr("odd", 1)
    assert env.get_attr("odd") == [1] * N_ENVS
    assert env.render_mode == "rgb_array"
    env.reset()
    frame = env.render()
    assert frame is not None
    assert frame.ndim == 3


def test_sb3_trains_with_it(env: VecEnv) -> None:
    trained = []
    for one in (env, dummy()):
        one.seed(3)
        trained.append(parameters(PPO("MlpPolicy", one, n_steps=8, batch_size=20, seed=0, device="cpu").learn(80)))
    assert th.equal(*trained)


def test_what_cannot_be_sent_does_no_harm() -> None:
    env = make_vec_env("CartPole-v1", 2, "actors", n_actors=2)
    env.reset()
    env.render()
    with pytest.raises(Exception, match="pickle"):
        env.set_attr("function", lambda: None)
    with pytest.raises(Exception, match="pickle"):
        env.get_attr("screen")  # a surface of pygame
    assert env.get_attr("gravity") == [9.8] * 2
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_actors": 0}, ValueError, "n_actors must be from 1 to the number of envs, 2, or None, got 0"),
        ({"n_actors": 3}, ValueError, "n_actors must be from 1 to the number of envs, 2, or None, got 3"),
        ({"n_actors": 1.5}, TypeError, "n_actors must be a whole number or None, got 1.5"),
        ({"backend_kwargs": {"transport": "mail"}}, ValueError, "transport must be one of .* got 'mail'"),
        ({"backend_kwargs": {"start_method": "fork"}}, ValueError, "start_method must be one of .* got 'fork'"),
        (
            {"backend_kwargs": {"start_method": "spawn", "transport": "serial"}},
            ValueError,
            "start_method must be None with transport='serial', got 'spawn'",
        ),
        (
            {"n_actors": 2, "backend_kwargs": {"n_actors": 1}},
            ValueError,
            "n_actors is given twice: 2, and 1 in backend_kwargs",
        ),
        ({"backend": "dummy", "n_actors": 2}, ValueError, "n_actors must be None with backend='dummy', got 2"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_vec_env("CartPole-v1", 2, **{"backend": "actors", **kwargs})


def test_no_envs() -> None:
    with pytest.raises(ValueError, match="env_fns must have at least one function, got none"):
        ActorVecEnv([])


def test_neither_copied_nor_pickled(env: VecEnv) -> None:
    """A copy would share the actors, and end them."""
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="ActorVecEnv can be neither copied nor pickled"):
            copied(env)
    gc.collect()
    assert env.get_attr("gravity") == [9.8] * N_ENVS


def test_envs_need_not_be_a_multiple_of_actors() -> None:
    env = serial(n_envs=7, n_actors=3)
    assert [share.n_envs for share in env.shares] == [3, 2, 2]
    assert len(env.reset()) == 7
    env.close()
    env.close()
    with pytest.raises(ValueError, match="the envs are closed"):
        env.reset()


def test_monitor_files(tmp_path: Any) -> None:
    env = make_vec_env("CartPole-v1", 2, "actors", n_actors=2, monitor_dir=str(tmp_path))
    model = Reinforce("MlpPolicy", env, n_episodes=4, device="cpu").learn(1)
    env.close()
    found = load_results(str(tmp_path))
    assert model.ep_info_buffer is not None
    assert sorted(found["r"]) == sorted(info["r"] for info in model.ep_info_buffer)


def test_a_vec_monitor_writes_its_file(tmp_path: Any) -> None:
    files = []
    for number, inner in enumerate((dummy(), serial())):
        path = tmp_path / str(number)
        with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
            env = VecMonitor(inner, str(path / "0"))
        ActorCritic("MlpPolicy", env, n_steps=16, seed=0, device="cpu").learn(200)
        env.close()
        rows = (path / "0.monitor.csv").read_text().splitlines()[2:]
        files.append(([row.rpartition(",")[0] for row in rows], env.episode_count))
    assert files[0] == files[1]
    assert len(files[0][0]) == files[0][1] > 3


# ---------------------------------------------------------------- callbacks


class Seen(BaseCallback):
    """Keeps what it sees at each step, and stops at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.stop_at = stop_at

    def _on_step(self) -> bool:
        names = ("new_obs", "rewards", "dones", "actions", "clipped_actions", "values", "log_probs")
        step = {name: np.array(self.locals[name]) for name in names}
        infos = without_time(self.locals["infos"])
        self.steps.append({**step, "infos": infos, "n": self.num_timesteps, "obs": self.model._last_obs})
        return self.n_calls != self.stop_at


def test_callbacks_see_every_step() -> None:
    seen = []
    for env in (dummy(), serial(n_actors=1)):
        seen.append(Seen())
        ActorCritic("MlpPolicy", env, n_steps=8, seed=0, device="cpu").learn(200, seen[-1])
        env.close()
    np.testing.assert_equal(seen[0].steps, seen[1].steps)


def test_infos_that_nobody_reads_are_not_sent() -> None:
    env = serial("Pendulum-v1")
    sent: list[Any] = []
    record = env.record

    def spy(*args: Any) -> Any:
        sent.append(args[2].with_infos)
        return record(*args)

    env.record = spy
    model = ActorCritic("MlpPolicy", env, n_steps=8, device="cpu")
    model.learn(40)
    model.learn(40, progress_bar=False, callback=Seen())
    model.learn(40, callback=lambda *_: True)
    model.learn(40, callback=[StopTrainingOnMaxEpisodes(100), GradientDiagnosticsCallback()])
    Collector(model.policy, env).collect(n_steps=8)
    assert sent == [False, True, True, False, False]


@pytest.mark.parametrize("arguments", [{"n_steps": 8}, {"n_episodes": N_ENVS}])
def test_a_callback_stops_a_rollout(arguments: dict[str, Any]) -> None:
    env = serial()
    model = Reinforce("MlpPolicy", env, baseline="value", seed=0, device="cpu", **arguments)
    model.learn(1000, Seen(stop_at=3))
    assert model.num_timesteps == 3 * N_ENVS
    assert model._last_obs is None  # the envs have gone further
    model.learn(1, reset_num_timesteps=False)
    assert model.num_timesteps > 3 * N_ENVS
    assert model._n_updates


# ---------------------------------------------------------------- where actors cannot collect


class Halved(VecEnvWrapper):
    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards / 2, dones, infos


class OwnNormalize(VecNormalize):
    """A subclass may do anything."""


@pytest.mark.parametrize("wrapper", [Halved, OwnNormalize])
def test_other_wrappers_are_stepped(wrapper: Any, recwarn: pytest.WarningsRecorder) -> None:
    trained = []
    for env in (dummy(), serial()):
        model = ActorCritic("MlpPolicy", wrapper(env), n_steps=8, seed=0, device="cpu")
        trained.append(parameters(model.learn(200)))
        env.close()
    assert th.equal(*trained)
    messages = [str(one.message) for one in recwarn if "actors cannot have" in str(one.message)]
    reason = f"actors cannot have {wrapper.__name__} around their envs"
    assert messages == [f"The learner steps these envs, which takes longer than if actors collected: {reason}"]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wrapper_with_replaced_methods_is_stepped(transport: Any) -> None:
    env = VecNormalize(ActorVecEnv([ScriptedEnv] * 2, 2, transport))
    env.normalize_reward = lambda reward: 0 * reward  # type: ignore[method-assign]
    model = ActorCritic("MlpPolicy", env, n_steps=8, device="cpu")
    with pytest.warns(UserWarning, match="actors cannot have VecNormalize with replaced methods around their envs"):
        model.learn(16)
    assert not model.rollout_buffer.rewards.any()
    env.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_env_that_only_the_learner_has_registered(transport: Any) -> None:
    register("OnlyHere-v0", cast(Any, ScriptedEnv))
    try:
        kwargs = {"transport": transport}
        env = make_vec_env("OnlyHere-v0", 2, "actors", env_kwargs={"lengths": (4,)}, n_actors=2, backend_kwargs=kwargs)
    finally:
        del registry["OnlyHere-v0"]
    assert env.get_attr("lengths") == [(4,)] * 2
    env.close()


def test_a_policy_with_hooks_acts_in_the_learner() -> None:
    trained = []
    for env in (dummy(), serial()):
        model = ActorCritic("MlpPolicy", env, n_steps=8, seed=0, device="cpu")
        model.policy.action_net.register_forward_hook(lambda _module, _args, output: output * 0.5)
        if isinstance(env, ActorVecEnv):
            with pytest.warns(UserWarning, match="the policy has hooks or replaced methods"):
                model.learn(200)
        else:
            model.learn(200)
        trained.append(parameters(model))
    assert th.equal(*trained)


def test_a_behavior_policy_acts_in_the_learner() -> None:
    trained = []
    for env in (dummy(), serial()):
        behavior = ActorCritic("MlpPolicy", env, seed=5, device="cpu")
        model = OffPolicyPG("MlpPolicy", env, behavior_policy=behavior, seed=0, device="cpu", train_freq=(9, "step"))
        trained.append(parameters(model.learn(300)))
    assert th.equal(*trained)


def test_off_pac_steps() -> None:
    trained = []
    for env in (dummy(), serial()):
        model = OffPAC("MlpPolicy", env, learning_starts=20, batch_size=8, seed=0, device="cpu")
        trained.append(parameters(model.learn(100)))
    assert th.equal(*trained)


def test_another_policy_is_sent_anew() -> None:
    trained = []
    for env in (dummy(), serial(n_actors=1)):
        model = ActorCritic("MlpPolicy", env, n_steps=8, seed=0, device="cpu").learn(100)
        with th.no_grad():
            model.policy.action_net = th.nn.Linear(64, 2)
        model.learn(100, reset_num_timesteps=False)
        other = ActorCritic("MlpPolicy", env, n_steps=8, seed=1, policy_kwargs={"net_arch": [8]}, device="cpu")
        trained.append(th.cat([parameters(model), parameters(other.learn(100))]))
    assert th.equal(*trained)


class Scaled(FlattenExtractor):
    """Acts by an attribute that is no tensor."""

    def __init__(self, space: Any) -> None:
        super().__init__(space)
        self.scale = 1.0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) * self.scale


def test_attributes_of_the_policy_are_sent_anew() -> None:
    class Grows(BaseCallback):
        def _on_rollout_start(self) -> None:
            extractor: Any = self.model.policy.features_extractor
            extractor.scale = float(self.num_timesteps)

        def _on_step(self) -> bool:
            return True

    trained = []
    for env in (dummy(), serial(n_actors=1)):
        kwargs = {"features_extractor_class": Scaled}
        model = ActorCritic("MlpPolicy", env, n_steps=8, seed=0, policy_kwargs=kwargs, device="cpu")
        trained.append(parameters(model.learn(200, Grows())))
    assert th.equal(*trained)


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_a_policy_is_sent_once() -> None:
    env = serial("Pendulum-v1")
    sent: list[str] = []
    ask = env._ask

    def spy(command: str, *args: Any) -> Any:
        sent.append(command)
        return ask(command, *args)

    env._ask = spy
    for arguments in ({}, {"use_sde": True, "sde_sample_freq": 4}, {"memory": "gru"}):
        sent.clear()
        model: Any = ActorCritic("MlpPolicy", env, n_steps=8, device="cpu", **arguments)
        model.learn(8 * N_ENVS * 3, EvalCallback(dummy(1, "Pendulum-v1"), eval_freq=10, n_eval_episodes=1, verbose=0))
        assert (sent.count("policy"), sent.count("collect")) == (1, 3)


def test_predictions_with_gsde_have_the_noise_of_the_rollout() -> None:
    predicted = []
    for env in (dummy(env_id="Pendulum-v1"), serial("Pendulum-v1")):
        model = ActorCritic("MlpPolicy", env, n_steps=3, use_sde=True, seed=0, device="cpu")
        model.learn(3 * N_ENVS)
        predicted.append(model.predict(np.ones((N_ENVS, 3), np.float32))[0])
    np.testing.assert_allclose(predicted[0], predicted[1], atol=1e-4)


class Counts(ScriptedEnv):
    """Its resets have numbers."""

    n_resets = 0

    def reset(self, **kwargs: Any) -> Any:
        self.n_resets += 1
        return super().reset(**kwargs)[0], {"number": self.n_resets}


def test_reset_infos_are_those_of_the_latest_reset() -> None:
    found = []
    for env in (DummyVecEnv([Counts] * 3), ActorVecEnv([Counts] * 3, 2, "serial")):
        ActorCritic("MlpPolicy", env, n_steps=20, device="cpu").learn(60)
        found.append(env.reset_infos)
    assert found[0] == found[1]
    assert found[0][0]["number"] > 1


def test_act_device() -> None:
    env = serial()
    ActorCritic("MlpPolicy", env, n_steps=8, device="cpu", act_device="cpu").learn(40)
    policy = ActorCritic("MlpPolicy", env, device="cpu").policy
    with pytest.raises(ValueError, match="act_device must be None or 'cpu': actors act on the CPU, got 'meta'"):
        Collector(policy, env, act_device="meta")


# ---------------------------------------------------------------- exact state


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_state_of_the_envs(transport: Any) -> None:
    def make() -> VecEnv:
        env: VecEnv = ActorVecEnv([lambda i=i: Monitor(ScriptedEnv((3, 5 + i))) for i in range(4)], 2, transport)  # type: ignore[misc]
        return VecNormalize(env)

    def steps(env: VecEnv) -> list[Any]:
        return [env.step(np.zeros(4, dtype=np.int64))[:3] for _ in range(20)]

    env, other = make(), make()
    env.seed(0)
    env.reset()
    steps(env)
    state = get_env_state(env)
    assert not state.inexact
    expected = steps(env)
    set_env_state(other, state, _no_pickle)
    np.testing.assert_equal(steps(other), expected)
    three: VecEnv = ActorVecEnv([lambda: Monitor(ScriptedEnv()) for _ in range(4)], 3, "serial")
    with pytest.raises(ValueError, match="it has 3 actors, the saved one has 2"):
        set_env_state(VecNormalize(three), state, _no_pickle)
    for one in (env, other):
        one.close()


def _no_pickle(_: bytes) -> Any:
    raise AssertionError("nothing is pickled")


class Global(ScriptedEnv):
    """Draws from the global generators of its process."""

    def draw(self) -> tuple[float, float, float]:
        return np.random.random(), random.random(), float(th.rand(()))  # noqa: NPY002


def test_global_generators_differ_and_are_seeded() -> None:
    drawn = []
    for _ in range(2):
        env = ActorVecEnv([Global] * 3, 3)
        unseeded = env.env_method("draw")
        assert len(set(np.ravel(unseeded))) == 9  # though the processes come from one server
        env.seed(5)
        env.reset()
        drawn.append(env.env_method("draw"))
        assert len(set(np.ravel(drawn[-1]))) == 9
        env.close()
    assert drawn[0] == drawn[1]
