"""What the collector writes, checked against environments whose every step is known."""

import doctest
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_pg import ActorCritic, NonFiniteError, Reinforce
from sb3_pg.rollout import Collector, CollectorState, EndlessEpisodeError, EpisodeLimit
from tests.algorithms.steps import AtRolloutEnd
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    FaultyEnv,
    Rollout,
    ScriptedEnv,
    policy_for,
    rollout_of,
    vec,
)

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu", "seed": 0}


class Recorder(BaseCallback):
    """Keeps what callbacks can see, and rollouts before they are used."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.steps: list[dict[str, Any]] = []
        self.batches: list[Rollout] = []

    def _on_step(self) -> bool:
        self.steps.append({k: np.copy(self.locals[k]) for k in ("rewards", "dones", "actions", "n_steps")})
        assert len(self.locals["infos"]) == self.training_env.num_envs
        assert self.locals["self"] is self.model
        return self.num_timesteps != self.stop_at

    def _on_rollout_end(self) -> None:
        self.batches.append(rollout_of(self.model))


class StepsOnly(BaseCallback):
    """Records steps for a recorder, on any algorithm."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def _on_step(self) -> bool:
        self.recorder.steps.append({"n_steps": np.copy(self.locals["n_steps"])})
        return True


def run(env: Any, total: int, callback: BaseCallback | None = None, **kwargs: Any) -> tuple[Reinforce, Recorder]:
    recorder = Recorder()
    model = Reinforce("MlpPolicy", env, **{**SMALL, **kwargs})
    model.learn(total, callback=recorder if callback is None else CallbackList([recorder, callback]))
    return model, recorder


def test_segments_keep_rewards_endings_and_timesteps() -> None:
    # Episodes of 3 (terminated) and 2 (truncated) steps, in segments of 4: | r0 r1 r2* | r3 r4+ ...
    env = ScriptedEnv(lengths=(3, 2), truncate=(False, True))
    _, seen = run(vec(env), 8, n_steps=4, gamma=0.5, truncation="bootstrap")
    first, second = seen.batches
    assert first.rewards.flatten().tolist() == [1, 2, 3, 4]
    assert second.rewards.flatten().tolist() == [5, 6, 7, 8]
    assert first.terminated.flatten().tolist() == [False, False, True, False]
    assert first.truncated.any().item() is False
    assert second.truncated.flatten().tolist() == [True, False, False, False]
    assert second.terminated.flatten().tolist() == [False, False, False, True]
    assert first.timesteps.flatten().tolist() == [0, 1, 2, 0]
    assert second.timesteps.flatten().tolist() == [1, 0, 1, 2]  # carried across rollouts
    assert first.valid.all()
    assert (first.bootstrap(0.5).flatten() != 0).tolist() == [False, False, False, True]  # the cut
    assert (second.bootstrap(0.5).flatten() != 0).tolist() == [True, False, False, False]  # the time limit, not the end
    # The returns are in the buffer when on_rollout_end is called.
    b = first.bootstrap(0.5)[3, 0].item()
    assert np.allclose(first.returns.flatten(), [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, 4 + 0.5 * b])


def test_the_cut_is_valued_at_the_observation_that_follows() -> None:
    model, seen = run(vec(ScriptedEnv(lengths=(100,))), 4, n_steps=4, learning_rate=0.0, critic_learning_rate=0.0)
    with th.no_grad():
        value = model.policy.predict_values(th.as_tensor(model._last_obs))
    bootstrap = seen.batches[0].bootstrap(model.gamma)
    assert bootstrap[3, 0].item() == pytest.approx(value.item())


def test_truncated_episodes_are_valued_at_their_last_observation() -> None:
    final: list[np.ndarray] = []

    class KeepsFinal(ScriptedEnv):
        def step(self, action: Any) -> Any:
            result = super().step(action)
            if result[3]:
                final.append(result[0])
            return result

    model, seen = run(
        vec(KeepsFinal(lengths=(3,), truncate=(True,))),
        3,
        n_episodes=1,
        truncation="bootstrap",
        learning_rate=0.0,
        critic_learning_rate=0.0,
    )
    with th.no_grad():
        value = model.policy.predict_values(th.as_tensor(final[0])[None])
    bootstrap = seen.batches[0].bootstrap(model.gamma)
    assert bootstrap.flatten().tolist() == pytest.approx([0, 0, value.item()])


def test_terminal_truncation_bootstraps_the_cut_only() -> None:
    env = ScriptedEnv(lengths=(3,), truncate=(True,))
    model, seen = run(vec(env), 4, n_steps=4, truncation="terminal")
    bootstrap = seen.batches[0].bootstrap(model.gamma)
    assert (bootstrap.flatten() != 0).tolist() == [False, False, False, True]


def test_complete_episodes_come_in_equal_numbers_and_waiting_is_masked() -> None:
    # Two envs, two episodes each: 1 + 2 steps and 3 + 3 steps.
    envs = ScriptedEnv(lengths=(1, 2)), ScriptedEnv(lengths=(3,), first_reward=100)
    model, seen = run(vec(*envs), 12, n_episodes=4, baseline="none")
    (batch,) = seen.batches
    assert batch.rewards.shape == (6, 2)
    assert batch.valid[:, 0].tolist() == [True] * 3 + [False] * 3
    assert batch.valid[:, 1].tolist() == [True] * 6
    assert batch.ends[:, 0].tolist() == [True, False, True, False, False, False]
    assert batch.ends[:, 1].tolist() == [False, False, True, False, False, True]
    assert batch.select(batch.rewards).sort().values.tolist() == [1, 2, 3, 100, 101, 102, 103, 104, 105]
    assert model.num_timesteps == 12  # waiting steps count
    assert model.logger.name_to_value.get("rollout/valid_fraction", 9 / 12) == pytest.approx(9 / 12)
    # Callbacks see no episode end while an env only waits.
    assert np.sum([step["dones"] for step in seen.steps]) == 4
    assert model.ep_info_buffer is not None
    assert sorted(info["l"] for info in model.ep_info_buffer) == [1, 2, 3, 3]


def test_complete_episodes_start_from_a_reset_and_are_not_length_biased() -> None:
    short, long = ScriptedEnv(lengths=(2,)), ScriptedEnv(lengths=(7,))
    _, seen = run(vec(short, long), 40, n_episodes=2)
    for batch in seen.batches:
        assert batch.timesteps[0].tolist() == [0, 0]
        assert batch.select(batch.ends).sum().item() == 2
        assert batch.valid.sum(0).tolist() == [2, 7]


def test_one_env_is_not_reset_twice_between_complete_episodes() -> None:
    env = ScriptedEnv(lengths=(3,))
    run(vec(env), 12, n_episodes=2)
    assert env.resets == 1 + 4  # learn()'s own, and one after each of 4 episodes


@pytest.mark.parametrize("mode", [{"n_steps": 16}, {"n_episodes": 4}])
def test_total_timesteps_is_overshot_by_less_than_one_rollout(mode: dict[str, Any]) -> None:
    model, seen = run(vec(*(ScriptedEnv(lengths=(5, 9)) for _ in range(2))), 100, **mode)
    last = seen.batches[-1].rewards.numel()
    assert 100 <= model.num_timesteps < 100 + last


@pytest.mark.parametrize("wrap", ["plain", "monitor", "normalize", "stack"])
def test_rewards_equal_the_envs_to_the_bit(wrap: str) -> None:
    env: Any = DummyVecEnv([lambda: ScriptedEnv(lengths=(4, 3), first_reward=0.1) for _ in range(2)])
    wraps: dict[str, Any] = {
        "plain": lambda: env,
        "monitor": lambda: VecMonitor(env),
        "normalize": lambda: VecNormalize(env),
        "stack": lambda: VecFrameStack(env, 3),
    }
    _, seen = run(wraps[wrap](), 60, n_steps=10)
    collected = np.concatenate([batch.rewards.numpy() for batch in seen.batches])
    stepped = np.stack([step["rewards"] for step in seen.steps]).astype(np.float32)
    assert np.array_equal(collected, stepped)


@pytest.mark.parametrize("mode", [{"n_steps": 8}, {"n_episodes": 4}])
@pytest.mark.parametrize("actions", list(ACTION_SPACES))
@pytest.mark.parametrize("observations", list(OBSERVATION_SPACES))
def test_all_spaces(observations: str, actions: str, mode: dict[str, Any]) -> None:
    envs = [
        ScriptedEnv((3, 5), (False, True), 1.0, OBSERVATION_SPACES[observations], ACTION_SPACES[actions])
        for _ in range(2)
    ]
    policy = policy_for(OBSERVATION_SPACES[observations])
    kwargs = (
        SMALL
        if observations != "image"
        else {**SMALL, "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 8}}}
    )
    model = Reinforce(policy, vec(*envs), **mode, **kwargs)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(40)
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    for env in envs:
        assert all(env.action_space.contains(np.asarray(a, env.action_space.dtype)) for a in env.actions)


@pytest.mark.parametrize(
    "kwargs", [{}, {"sde_sample_freq": 3}, {"policy_kwargs": {"squash_output": True, "net_arch": [4]}}]
)
def test_gsde_and_squashed_actions(kwargs: dict[str, Any]) -> None:
    env = ScriptedEnv(action_space=ACTION_SPACES["box"])
    model, seen = run(vec(env), 32, n_steps=8, use_sde=True, **kwargs)
    assert model.policy.use_sde
    low, high = ACTION_SPACES["box"].low, ACTION_SPACES["box"].high  # type: ignore[attr-defined]
    assert all(np.all(a >= low) and np.all(a <= high) for a in env.actions)
    if "policy_kwargs" in kwargs:
        stored = seen.batches[0].actions
        assert (stored.abs() <= 1).all()  # as sampled, before they were scaled to the bounds
        assert np.allclose(model.policy.unscale_action(stored[0].numpy()), env.actions[0])


def test_callbacks_see_sb3s_step_count() -> None:
    """n_steps in the locals is the number of steps before this one, as in SB3's loop."""
    counts = []
    for cls in (Reinforce, A2C):
        recorder = Recorder()
        kwargs: dict[str, Any] = {"n_steps": 3, **SMALL}
        cls("MlpPolicy", vec(ScriptedEnv()), **kwargs).learn(6, callback=CallbackList([StepsOnly(recorder)]))
        counts.append([int(step["n_steps"]) for step in recorder.steps])
    assert counts[0] == counts[1] == [0, 1, 2, 0, 1, 2]


def test_stored_actions_and_log_probs_are_those_before_clipping() -> None:
    env = ScriptedEnv(action_space=ACTION_SPACES["box"])
    model, seen = run(vec(env), 64, n_steps=64, learning_rate=0.0, critic_learning_rate=0.0)
    (batch,) = seen.batches
    assert (batch.actions.abs() > 1).any()
    with th.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(batch.select(batch.observations), batch.select(batch.actions))
    assert th.allclose(batch.log_probs.flatten(), log_prob, atol=1e-5)


def test_subprocesses_give_what_a_single_process_gives() -> None:
    results = []
    for cls in (DummyVecEnv, SubprocVecEnv):
        env = make_vec_env("CartPole-v1", 2, seed=1, vec_env_cls=cls)
        model, _ = run(env, 64, n_steps=32)
        results.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
        env.close()
    assert th.equal(*results)


def test_a_callback_stops_training_at_once() -> None:
    model = Reinforce("MlpPolicy", vec(ScriptedEnv(lengths=(5,))), n_steps=8, **SMALL)
    recorder = Recorder(stop_at=11)
    model.learn(1000, callback=recorder)
    assert model.num_timesteps == 11
    assert len(recorder.batches) == 1
    model.learn(8, reset_num_timesteps=False)  # the state is that of the env: it goes on
    assert model.num_timesteps == 19
    buffer: Any = model.rollout_buffer
    assert buffer.rewards.flatten().tolist() == [12, 13, 14, 15, 16, 17, 18, 19]
    assert buffer.timesteps.flatten().tolist() == [1, 2, 3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("mode", [{"n_steps": 8}, {"n_episodes": 2}])
def test_stop_training_on_max_episodes(mode: dict[str, int]) -> None:
    callback = StopTrainingOnMaxEpisodes(max_episodes=3)
    model, _ = run(vec(ScriptedEnv(lengths=(5,)), ScriptedEnv(lengths=(2,))), 10_000, callback, **mode)
    assert model.num_timesteps < 100
    assert callback.n_episodes >= 6


def test_infos_are_read_only_where_an_episode_ended() -> None:
    class Untouchable(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise AssertionError("read in the middle of an episode")

    class Venv(DummyVecEnv):
        def step_wait(self) -> Any:
            obs, rewards, dones, infos = super().step_wait()
            return (
                obs,
                rewards,
                dones,
                [info if done else Untouchable() for info, done in zip(infos, dones, strict=True)],
            )

    run(Venv([lambda: ScriptedEnv(lengths=(4,))]), 20, n_steps=10)


@pytest.mark.parametrize("fault", ["reward", "observation"])
@pytest.mark.parametrize("mode", [{"n_steps": 10}, {"n_episodes": 2}])
@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_nan_from_the_env_is_named_and_changes_nothing(fault: str, mode: dict[str, Any], actions: str) -> None:
    space = ACTION_SPACES[actions]
    envs = ScriptedEnv(lengths=(9,), action_space=space), FaultyEnv(fault, 6, lengths=(9,), action_space=space)
    model = Reinforce("MlpPolicy", vec(*envs), **mode, **SMALL)
    before = [p.detach().clone() for p in model.policy.parameters()]
    with pytest.raises(NonFiniteError, match=f"{fault} is nan in env 1 at step") as caught:
        model.learn(100)
    assert caught.value.env == 1
    assert caught.value.step == (5 if fault == "reward" else 6)
    assert isinstance(caught.value, FloatingPointError)
    assert isinstance(caught.value, ValueError)  # Optuna's pruning in rl_zoo3 catches it
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    model.learn(40)  # the fault is over: training goes on from a reset


def test_nan_is_named_by_the_general_sampler_too() -> None:
    env = FaultyEnv("observation", 3, lengths=(9,))
    model = Reinforce("MlpPolicy", vec(env), n_steps=10, **SMALL)
    model.policy.mlp_extractor.register_forward_hook(lambda *_: None)
    with pytest.raises(NonFiniteError, match="observation is nan in env 0 at step 3"):
        model.learn(100)


def test_nonfinite_updates_can_be_skipped() -> None:
    env = FaultyEnv("reward", 6, lengths=(9,))
    model = Reinforce("MlpPolicy", vec(env), n_steps=10, on_nonfinite="skip", **SMALL)
    logged: list[float] = []
    keep = AtRolloutEnd(lambda model: logged.append(model.logger.name_to_value.get("train/n_skipped", 0)))
    with pytest.warns(UserWarning, match="Update skipped: reward is nan in env 0 at step 5"):
        model.learn(40, keep)
    assert model._n_updates == 3
    assert max(logged) == 1


def test_an_env_that_raises_is_heard_and_the_model_survives(tmp_path: Any) -> None:
    model = Reinforce("MlpPolicy", vec(FaultyEnv("raise", 6)), n_steps=10, **SMALL)
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        model.learn(100)
    model.save(tmp_path / "model")
    Reinforce.load(tmp_path / "model")
    model.learn(20)


def test_an_endless_episode_is_an_error_with_advice() -> None:
    envs = ScriptedEnv(lengths=(3,)), ScriptedEnv(lengths=(10**9,))
    model = Reinforce("MlpPolicy", vec(*envs), n_episodes=2, max_episode_steps=50, **SMALL)
    with pytest.raises(EndlessEpisodeError, match=r"env 1 .*max_episode_steps=50.*TimeLimit.*n_steps="):
        model.learn(1000)


def test_an_episode_of_exactly_the_longest_length_is_fine() -> None:
    run(vec(ScriptedEnv(lengths=(50,))), 100, n_episodes=2, max_episode_steps=50)


@pytest.mark.parametrize("fault", ["reward", "observation"])
@pytest.mark.parametrize("stacked", [False, True])
def test_nan_behind_vecnormalize_names_the_env_and_spares_the_statistics(fault: str, stacked: bool) -> None:
    normalized = VecNormalize(vec(ScriptedEnv(lengths=(9,)), FaultyEnv(fault, 6, lengths=(9,))))
    env: Any = VecFrameStack(normalized, 2) if stacked else normalized
    model = Reinforce("MlpPolicy", env, n_steps=20, **SMALL)
    with pytest.raises(NonFiniteError, match=f"{fault} is nan in env 1 at step 5"):
        model.learn(100)
    statistics: Any = normalized.obs_rms
    assert np.isfinite(statistics.mean).all()
    assert np.isfinite(normalized.ret_rms.var)
    model.learn(40)


def test_an_env_that_refuses_nan_actions_does_not_hide_its_own_nan() -> None:
    class Strict(FaultyEnv):
        def step(self, action: Any) -> Any:
            assert np.isfinite(action).all(), "bad action"
            return super().step(action)

    env = Strict("observation", 3, lengths=(9,), action_space=ACTION_SPACES["box"])
    with pytest.raises(NonFiniteError, match="observation is nan in env 0 at step 3"):
        run(vec(env), 100, n_steps=10)


def test_a_nan_in_the_last_observation_of_a_truncated_episode_is_named() -> None:
    env = FaultyEnv("observation", 3, lengths=(3,), truncate=(True,))
    with pytest.raises(NonFiniteError, match="observation that followed is nan in env 0 at step 2"):
        run(vec(env), 100, n_steps=10)


def test_skipping_never_goes_on_without_a_step() -> None:
    class Hopeless(ScriptedEnv):
        def _obs(self) -> Any:
            return np.full(3, np.nan, np.float32)

    model = Reinforce("MlpPolicy", vec(Hopeless()), n_steps=10, on_nonfinite="skip", **SMALL)
    model.policy.mlp_extractor.register_forward_hook(lambda *_: None)  # the sampler that raises on NaN
    with pytest.raises(NonFiniteError, match="observation is nan"):
        model.learn(100)


@pytest.mark.parametrize("step", [1, 3])
def test_a_nan_behind_vecnormalize_can_be_skipped(step: int) -> None:
    """The step counts, also if it is the rollout's first, so that training ends."""
    env = VecNormalize(vec(FaultyEnv("reward", step, lengths=(9,))))
    model = Reinforce("MlpPolicy", env, n_steps=4, on_nonfinite="skip", **SMALL)
    with pytest.warns(UserWarning, match="Update skipped: reward is nan in env 0"):
        model.learn(8)
    assert model.num_timesteps == 8 + step
    assert model._n_updates == 2


@pytest.mark.parametrize("wrap", ["plain", "normalize", "stack", "both"])
def test_truncated_states_are_valued_as_the_wrappers_show_them(wrap: str) -> None:
    env: Any = vec(*(ScriptedEnv(lengths=(3,), truncate=(True,)) for _ in range(2)))
    if wrap in ("normalize", "both"):
        env = VecNormalize(env)
    if wrap in ("stack", "both"):
        env = VecFrameStack(env, 2)
    finals: list[Any] = []
    step_wait = env.step_wait

    def spy() -> Any:
        result = step_wait()
        finals.extend(info["terminal_observation"] for info in result[3] if "terminal_observation" in info)
        return result

    env.step_wait = spy
    model, seen = run(env, 6, n_episodes=2, learning_rate=0.0, critic_learning_rate=0.0, truncation="bootstrap")
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(np.stack(finals))).flatten()
    bootstrap = seen.batches[0].bootstrap(model.gamma)
    assert th.allclose(bootstrap[2].float(), values)


def test_envs_that_end_together_are_not_reset_again() -> None:
    env = ScriptedEnv(lengths=(3,))
    run(vec(env, ScriptedEnv(lengths=(3,))), 24, n_episodes=2)
    assert env.resets == 1 + 4


def test_advantages_are_in_the_buffer_when_the_rollout_ends() -> None:
    class Keeps(Recorder):
        def _on_rollout_end(self) -> None:
            super()._on_rollout_end()
            model: Any = self.model
            buffer = model.rollout_buffer
            assert np.allclose(buffer.advantages, buffer.returns - buffer.values, atol=1e-5)
            assert np.abs(buffer.advantages).max() > 0

    run(vec(ScriptedEnv()), 16, Keeps(), n_steps=8)


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_nan_in_a_reset_behind_vecnormalize_is_named_and_forgotten(when: str) -> None:
    class Once(ScriptedEnv):
        bad = 1 if when == "first" else 3

        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            return (np.full_like(obs, np.nan) if self.resets == self.bad else obs), info

    normalized = VecNormalize(vec(ScriptedEnv(lengths=(5,)), Once(lengths=(8,))))
    statistics: Any = normalized.obs_rms
    model = Reinforce("MlpPolicy", normalized, n_episodes=2, **SMALL)
    with pytest.raises(NonFiniteError, match="observation is nan in env 1"):
        model.learn(100)
    assert np.isfinite(statistics.mean).all()
    assert normalized.obs_rms is statistics  # evaluation envs may share the object
    model.learn(40)


class OddEnv(ScriptedEnv):
    """Its observations are what a VecEnv makes rows of, and not of the space's shape."""

    def _obs(self) -> Any:
        obs = super()._obs()
        if isinstance(obs, dict):
            return {**obs, "debug": "text"}
        return obs[0] if len(obs) == 1 else obs[None]


@pytest.mark.parametrize(
    "space",
    [spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (3,)), spaces.Dict({"x": spaces.Box(-1, 1, (2,))})],
    ids=["scalar", "row", "more keys"],
)
def test_final_observations_may_have_another_shape(space: spaces.Space[Any]) -> None:
    policy = policy_for(space)
    env = vec(*(OddEnv((3,), (True,), observation_space=space) for _ in range(2)))
    model = ActorCritic(policy, env, n_steps=8, device="cpu", seed=0).learn(32)
    assert model.num_timesteps == 32
    buffer: Any = model.rollout_buffer
    assert len(buffer.final_observations) == 8  # in the second rollout: three ends, and where it was cut, of each


# ---------------------------------------------------------------- a collector alone


def actor_critic_for(env: Any) -> ActorCriticPolicy:
    th.manual_seed(0)
    return ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3)


class Listener:
    """Keeps what it is told, and stops at a step.

    :param stop_at: number of the step; None for never
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.told, self.steps = stop_at, list[str](), list[dict[str, Any]]()

    def start(self, policy: ActorCriticPolicy, sampler: Any) -> None:
        assert not policy.training
        assert callable(sampler)
        self.told.append("start")

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        self.told.append("step")
        self.steps.append({"obs": np.copy(obs), **names})
        return len(self.steps) != self.stop_at

    def episodes_ended(self, infos: list[dict[str, Any]]) -> None:
        self.told.append(f"{len(infos)} ended")

    def end(self, last_obs: Any, starts: np.ndarray) -> None:
        self.told.append(f"end {last_obs.shape}")


def test_a_collector_alone_collects_segments() -> None:
    env = vec(ScriptedEnv(lengths=(3, 2), truncate=(False, True)))
    policy = actor_critic_for(env)
    collector = Collector(policy, env)
    first, second = (collector.collect(n_steps=4) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.rewards.flatten().tolist() == [1, 2, 3, 4]
    assert second.timesteps.flatten().tolist() == [1, 0, 1, 2]
    assert first.n_episodes is None
    rows = first.flat_observations
    values, log_prob, _ = policy.evaluate_actions(rows, first.actions.flatten())
    assert th.allclose(first.values.flatten().float(), values.flatten(), atol=1e-6)  # type: ignore[union-attr]
    assert th.allclose(first.log_probs.flatten(), log_prob, atol=1e-6)  # type: ignore[union-attr]
    # of the second rollout, the time limit and the cut count, and not the terminal state between them
    assert (second.bootstrap.flatten() != 0).tolist() == [True, False, False, False]  # type: ignore[union-attr]
    third = collector.collect(n_steps=4, bootstrap_truncated=False, with_values=False)
    assert third is not None
    assert third.values is None


def test_a_collector_alone_collects_complete_episodes() -> None:
    env = vec(ScriptedEnv(lengths=(1, 2)), ScriptedEnv(lengths=(3,), first_reward=100))
    listener = Listener()
    collector = Collector(actor_critic_for(env), env)
    batch = collector.collect(episodes_per_env=2, listener=listener, value_scale=2.0)
    assert batch is not None
    assert batch.n_episodes == 4
    assert batch.valid.sum(0).tolist() == [3, 6]
    assert batch.select(batch.rewards).sort().values.tolist() == [1, 2, 3, 100, 101, 102, 103, 104, 105]
    values = collector.policy.predict_values(batch.flat_observations).flatten()
    assert th.allclose(batch.select(batch.values).float(), 2 * values, atol=1e-5)
    expected = ["start", "step", "1 ended", "step", "step", "2 ended", "step", "step", "step", "1 ended", "end (2, 3)"]
    assert listener.told == expected
    assert [names["n_steps"] for names in listener.steps] == list(range(6))
    assert np.array_equal(listener.steps[1]["obs"], listener.steps[0]["new_obs"])
    assert np.all(collector.state.episode_starts)
    assert collector.n_steps == 6


def test_a_rollout_that_is_stopped_goes_on_where_it_was() -> None:
    env = vec(ScriptedEnv(lengths=(5,)))
    state = CollectorState()
    assert Collector(actor_critic_for(env), env, state).collect(n_steps=8, listener=Listener(stop_at=3)) is None
    assert state.timesteps is not None
    assert state.timesteps.tolist() == [3]
    batch = Collector(actor_critic_for(env), env, state).collect(n_steps=4)
    assert batch is not None
    assert batch.rewards.flatten().tolist() == [4, 5, 6, 7]
    assert batch.timesteps.flatten().tolist() == [3, 4, 0, 1]


def test_a_collector_that_fails_resets_the_envs() -> None:
    env = vec(FaultyEnv("reward", 2, lengths=(5,)))
    collector = Collector(actor_critic_for(env), env)
    with pytest.raises(NonFiniteError, match="reward is nan in env 0 at step 1"):
        collector.collect(n_steps=4)
    assert collector.state.last_obs is None
    batch = collector.collect(n_steps=4)
    assert batch is not None
    assert batch.timesteps.flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises(EndlessEpisodeError, match=r"max_episode_steps=3 .* or wait\."):
        collector.collect(episodes_per_env=1, limit=EpisodeLimit(3, "wait"))


@pytest.mark.parametrize("given", [{}, {"n_steps": 3, "episodes_per_env": 1}])
def test_a_collector_takes_segments_or_episodes(given: dict[str, int]) -> None:
    env = vec(ScriptedEnv())
    with pytest.raises(ValueError, match="exactly one of n_steps and episodes_per_env"):
        Collector(actor_critic_for(env), env).collect(**given)  # type: ignore[arg-type]


def test_the_example_of_the_collector_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(Collector, globs={})
    assert len(example.examples) > 3
    assert doctest.DocTestRunner().run(example).failed == 0
