"""OffPAC with action masks: that it keeps to them, replays those of the next states, and goes on with them."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_pg import OffPAC, OffPolicyPG, ResumeCallback
from sb3_pg.algorithms.off_pac.policies import DiscreteActor, OffPACPolicy
from sb3_pg.envs import ActionMaskVecEnv, GymVectorAdapter, make_vec_env
from sb3_pg.rollout import BehaviorReplayBuffer, DictBehaviorReplayBuffer
from tests.envs.masked import SIZES, Restless, RestlessVector, mask_at

GRADIENTS = {
    kind: [*(["expected"] if kind == "discrete" else []), "score", "importance"]
    for kind in ("discrete", "multi_discrete", "multi_binary")
}


def envs(n: int = 2, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Restless(**kwargs)] * n)


def make(env: Any, policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
    small = {"buffer_size": 400, "learning_starts": 20, "batch_size": 8, "device": "cpu", "seed": 0}
    policy_kwargs = {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    return OffPAC(policy, env, policy_kwargs=policy_kwargs, **{**small, **kwargs})


def replayed(model: Any) -> Any:
    buffer: Any = model.replay_buffer
    assert isinstance(buffer, DictBehaviorReplayBuffer)
    return buffer


def parameters(model: Any) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


class Crash(BaseCallback):
    """Stops a run."""

    def _on_step(self) -> bool:
        if self.num_timesteps >= 250:
            raise InterruptedError
        return True


# ---------------------------------------------------------------- collecting


@pytest.mark.parametrize("learning_starts", [0, 20, 10_000])
@pytest.mark.parametrize("kind", list(SIZES))
@pytest.mark.parametrize("source", ["method", "info", "key"])
def test_no_forbidden_action_is_taken_or_stored(source: str, kind: str, learning_starts: int) -> None:
    for gradient in GRADIENTS[kind]:
        model = make(
            envs(kind=kind, source=source),  # raises where a forbidden action is taken
            use_action_masks=True,
            learning_starts=learning_starts,
            actor_gradient=gradient,
            gradient_steps=1 if learning_starts < 100 else 0,
            ent_coef=0.01,
        ).learn(80)
        buffer = replayed(model)
        masks = buffer.observations["action_mask"][:40].reshape(80, -1)
        actions = buffer.actions[:40].reshape(80, -1).astype(int)
        for dimension, part in enumerate(np.split(masks, np.cumsum(SIZES[kind])[:-1], axis=1)):
            assert part[np.arange(80), actions[:, dimension]].all()
        assert bool(parameters(model).isfinite().all())


@pytest.mark.parametrize("kind", list(SIZES))
def test_uniform_actions_have_the_log_probs_of_what_is_allowed(kind: str) -> None:
    buffer = replayed(make(envs(kind=kind), learning_starts=1000, gradient_steps=0).learn(200))
    masks = buffer.observations["action_mask"][:100].reshape(200, -1)
    parts = np.split(masks, np.cumsum(SIZES[kind])[:-1], axis=1)
    wanted = -sum(np.log(part.sum(1)) for part in parts)
    np.testing.assert_allclose(buffer.log_probs[:100].flatten(), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", list(SIZES))
def test_later_actions_have_the_log_probs_of_the_masked_distribution(kind: str) -> None:
    model = make(envs(kind=kind), learning_starts=0, gradient_steps=0).learn(80)
    buffer = replayed(model)
    observations = {key: th.as_tensor(rows[:40].reshape(80, -1)) for key, rows in buffer.observations.items()}
    chosen = th.as_tensor(buffer.actions[:40].reshape(80, -1)).float()
    distribution = model.policy.get_distribution(observations)
    log_probs = distribution.log_prob(chosen[:, 0] if kind == "discrete" else chosen)
    th.testing.assert_close(log_probs.detach(), th.as_tensor(buffer.log_probs[:40].flatten()))


def masked_envs(backend: str, source: str, truncates: bool) -> Any:
    makers: list[Any] = [lambda: Restless(source=source, truncates=truncates)] * 2
    if backend == "dummy":
        return DummyVecEnv(makers)
    if backend == "subproc":
        return SubprocVecEnv(makers)
    gym.register("Restless-v0", lambda **_: makers[0]())
    try:
        return make_vec_env("Restless-v0", 2, backend)
    finally:
        del gym.registry["Restless-v0"]


@pytest.mark.parametrize(
    ("backend", "source"),
    [
        *(("dummy", source) for source in ("method", "info", "key")),
        *(("subproc", source) for source in ("info", "key")),
        ("vector", "method"),
    ],
)
@pytest.mark.parametrize("truncates", [False, True])
def test_next_states_are_replayed_with_their_own_masks(backend: str, source: str, truncates: bool) -> None:
    env = masked_envs(backend, source, truncates)
    buffer = replayed(make(env, use_action_masks=True).learn(60))
    env.close()
    ended = buffer.dones[:30].astype(bool)
    assert ended.sum() == 12
    assert (buffer.timeouts[:30].astype(bool) == (ended & truncates)).all()
    (key,) = buffer.observations.keys() - {"action_mask"}
    for name, rows in (("observation", buffer.observations), ("next", buffer.next_observations)):
        for row, i in np.ndindex(30, 2):
            if name == "next" and ended[row, i] and not truncates:
                continue  # no action is drawn there
            episode, t = (int(x) for x in rows[key][row, i])
            assert (rows["action_mask"][row, i] == mask_at("discrete", episode, t)).all()


def test_the_envs_of_a_dummy_vec_env_stay_what_they_are() -> None:
    env = envs()
    before = list(env.envs)
    make(env).learn(60)
    assert all(was is now for was, now in zip(before, env.envs, strict=True))


@pytest.mark.parametrize("learning_starts", [0, 1000])
def test_a_state_in_which_nothing_is_allowed(learning_starts: int) -> None:
    for source in ("method", "key"):
        env = DummyVecEnv([partial(Restless, source=source), partial(Restless, source=source, nothing_at=3)])
        with pytest.raises(ValueError, match=r"env 1 that allows none, at step 3 of the rollout \(time step 6\)"):
            make(env, learning_starts=learning_starts, train_freq=8).learn(40)


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("kind", list(SIZES))
@pytest.mark.parametrize("source", ["info", "key"])
def test_the_mask_of_a_last_state_may_be_empty(source: str, kind: str, truncates: bool) -> None:
    env = envs(kind=kind, source=source, nothing_at=5, truncates=truncates)
    model = make(env, use_action_masks=True).learn(100)
    buffer = replayed(model)
    assert not buffer.next_observations["action_mask"][:50][buffer.dones[:50].astype(bool)].any()
    assert bool(parameters(model).isfinite().all())


def test_native_vector_envs() -> None:
    model = make(GymVectorAdapter(RestlessVector(2, AutoresetMode.DISABLED)), use_action_masks=True).learn(60)
    assert isinstance(model.env, ActionMaskVecEnv)


def test_actions_that_count_from_another_number() -> None:
    class Shifted(Restless):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Discrete(4, start=5)

        def step(self, action: Any) -> Any:
            return super().step(action - 5)

    model = make(DummyVecEnv([Shifted] * 2)).learn(60)
    assert model.predict(np.zeros(2), action_masks=[0, 0, 1, 0])[0] == 7


def test_taxi_learns_with_its_masks() -> None:
    model = make("Taxi-v4", learning_starts=50).learn(150)
    assert model.uses_masks
    masks = replayed(model).observations["action_mask"][:150, 0]
    assert 0 < masks.mean() < 1
    assert masks[np.arange(150), replayed(model).actions[:150, 0, 0]].all()


@pytest.mark.slow
def test_the_grid_is_learned() -> None:
    """The shortest way takes 16 steps. A random walk that keeps to the masks takes about all of the 100 it may take."""
    kwargs = {"learning_starts": 500, "batch_size": 64, "buffer_size": 10_000, "ent_coef": 0.05}
    model = make("MaskedGrid-v0", learning_rate=3e-3, policy_kwargs={"net_arch": [64]}, **kwargs)
    model.learn(4000)
    mean, _ = evaluate_policy(model, make_vec_env("MaskedGrid-v0"), 2)
    assert mean == -16


# ---------------------------------------------------------------- what the networks see


class Images(Restless):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        return np.full((36, 36, 1), self.t, np.uint8), {}


def test_what_the_networks_see() -> None:
    model = make(Restless()).learn(40)
    assert model.policy.seen_space == spaces.Box(-100, 100, (2,), np.float32)
    assert model.actor.features_extractor.features_dim == 2
    assert set(make(Restless(as_dict=True), "MultiInputPolicy").learn(40).policy.seen_space.spaces) == {"vec", "class"}
    model = make(Restless(as_dict=True), "MultiInputPolicy", policy_kwargs={"observe_masks": True}).learn(40)
    assert set(model.policy.seen_space.spaces) == {"vec", "class", "action_mask"}
    assert model.critic.features_extractor.features_dim == 2 + 3 + 4
    assert set(make(Restless(), "MultiInputPolicy").learn(40).policy.seen_space.spaces) == {"observation"}
    model = make(Images(), "CnnPolicy", policy_kwargs={"features_extractor_kwargs": {"features_dim": 8}}).learn(40)
    assert model.policy.seen_space.shape == (1, 36, 36)
    shared = make(Restless(), policy_kwargs={"share_features_extractor": True}).learn(40)
    assert shared.actor.features_extractor is shared.critic.features_extractor


def test_a_policy_for_dicts_is_one_with_any_extractor() -> None:
    class Own(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Dict) -> None:
            super().__init__(space, int(np.prod(space["observation"].shape)))  # type: ignore[arg-type]

        def forward(self, observations: Any) -> th.Tensor:
            found: th.Tensor = observations["observation"]
            return found

    make(Restless(), "MultiInputPolicy", policy_kwargs={"features_extractor_class": Own}).learn(40)


def test_wrong_arguments_of_the_policy() -> None:
    with pytest.raises(ValueError, match="does not take"):
        make(Restless(), "CnnPolicy")
    with pytest.raises(TypeError, match="observe_masks"):
        make(Restless(), policy_kwargs={"observe_masks": 1})
    with pytest.raises(TypeError, match=r"policy_kwargs\['masks'\] is given by the algorithm"):
        make(Restless(), policy_kwargs={"masks": True})
    with pytest.raises(ValueError, match=r"observe_masks.\] must be left out: the env has no action masks"):
        make("CartPole-v1", policy_kwargs={"observe_masks": True})
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        make(Restless(as_dict=True, source="none"))


@pytest.mark.parametrize("use", [None, False])
def test_without_masks_nothing_is_changed(use: Any) -> None:
    env = Restless(source="none" if use is None else "method")
    env.source = "none"  # takes all actions
    model = make(env, use_action_masks=use).learn(40)
    assert not model.uses_masks
    assert model.observation_space == env.observation_space
    assert type(model.replay_buffer) is BehaviorReplayBuffer
    assert "masks" not in model.policy._get_constructor_parameters()


class OwnPolicy(OffPACPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"net_arch": [4]})


def test_a_policy_of_ones_own() -> None:
    model = make(envs(), OwnPolicy).learn(60)
    assert model.policy.masks
    assert model.actor.masks

    class Narrow(OffPACPolicy):
        def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, use_sde: bool = False) -> None:
            super().__init__(observation_space, action_space, lr_schedule, use_sde=use_sde)

    OffPAC(Narrow, "CartPole-v1", buffer_size=100)
    with pytest.raises(ValueError, match=r"policy Narrow must hand the argument masks on.*use_action_masks=False"):
        OffPAC(Narrow, envs(), buffer_size=100)

    class OtherActor(OffPACPolicy):
        def make_actor(self, features_extractor: Any = None) -> Any:
            kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
            return DiscreteActor(**kwargs | {"masks": False})

    with pytest.raises(ValueError, match="policy OtherActor must make its actor with masks=True"):
        make(envs(), OtherActor)

    class Stubborn(OffPACPolicy):
        def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
            return observation["action_mask"].argmin(1)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="policy Stubborn must draw actions that action_mask allows, got"):
        make(envs(), Stubborn, learning_starts=0).learn(40)


# ---------------------------------------------------------------- VecNormalize


def normalized(n: int = 2, **kwargs: Any) -> VecNormalize:
    return VecNormalize(envs(n, **kwargs), clip_obs=5.0)


@pytest.mark.parametrize("truncates", [False, True])
def test_normalization_equals_that_of_an_env_which_has_the_masks_itself(truncates: bool) -> None:
    """There, SB3's own code hands the Dict with the masks to the VecNormalize, which leaves them out."""
    inside = VecNormalize(envs(source="key", truncates=truncates), norm_obs_keys=["vec"], clip_obs=5.0)
    outside = normalized(truncates=truncates)
    runs = [make(env, use_action_masks=True).learn(100) for env in (inside, outside)]
    buffers = [replayed(model) for model in runs]
    for name in ("observations", "next_observations"):
        theirs, ours = (getattr(buffer, name) for buffer in buffers)
        np.testing.assert_array_equal(theirs["vec"], ours["observation"])
        ended = buffers[0].dones.astype(bool) & (name == "next_observations")
        np.testing.assert_array_equal(theirs["action_mask"][~ended], ours["action_mask"][~ended])
    assert th.equal(*(parameters(model) for model in runs))


def test_replayed_observations_are_those_before_normalization() -> None:
    model = make(normalized()).learn(60)
    assert isinstance(model.env, ActionMaskVecEnv)
    wrapper: Any = model.get_vec_normalize_env()
    assert wrapper.obs_rms.mean.shape == (2,)
    assert type(wrapper) is VecNormalize
    buffer = replayed(model)
    times = buffer.observations["observation"][:30, 0, 1]
    assert times.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] * 6
    np.testing.assert_allclose(buffer.next_observations["observation"][:30, 0, 1], times + 1, atol=1e-4)
    model.learn(20, reset_num_timesteps=False)
    model.learn(20)
    assert set(np.unique(buffer.observations["action_mask"])) == {0, 1}


def test_a_dict_that_is_normalized_and_an_env_that_is_wrapped_before() -> None:
    env = VecNormalize(envs(as_dict=True), norm_obs_keys=["vec"])
    make(env, "MultiInputPolicy").learn(60)
    make(ActionMaskVecEnv(normalized())).learn(60)
    make(VecNormalize(envs(), norm_obs=False)).learn(60)


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"n_steps": 3}, "n_steps=3"),
        ({"replay_buffer_class": ReplayBuffer}, "replay_buffer_class=ReplayBuffer"),
        ({"replay_buffer_class": BehaviorReplayBuffer}, "replay_buffer_class=BehaviorReplayBuffer"),
        ({"optimize_memory_usage": True}, "optimize_memory_usage=True"),
    ],
)
def test_buffers_that_take_no_dicts(kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} does not support action masks.*use_action_masks=False"):
        make(envs(), **kwargs)
    env = Restless()
    env.source = "none"
    if "optimize_memory_usage" in kwargs:
        kwargs |= {"replay_buffer_kwargs": {"handle_timeout_termination": False}}
    make(env, use_action_masks=False, **kwargs).learn(40)


def test_memory_stays_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="memory"):
        make(envs(), memory="gru")


# ---------------------------------------------------------------- predicting, evaluating, saving


def test_predict() -> None:
    model = make(envs())
    obs, mask = np.zeros(2, np.float32), np.array([False, False, True, False])
    for predicting in (model, model.policy):
        assert predicting.predict(obs, action_masks=mask)[0] == 2
        assert predicting.predict({"observation": obs, "action_mask": mask})[0] == 2
        both, masks = np.stack([obs, obs]), np.stack([mask, mask[::-1]])
        assert predicting.predict(both, action_masks=masks)[0].tolist() == [2, 1]
        assert predicting.predict({"observation": both}, action_masks=masks)[0].tolist() == [2, 1]
        with pytest.raises(ValueError, match=r"predict needs action masks.*give action_masks="):
            predicting.predict(obs)
        with pytest.raises(ValueError, match=r"action_masks must be an array of shape \(4,\) or \(n_envs, 4\).*\(3,\)"):
            predicting.predict(obs, action_masks=mask[:3])
        with pytest.raises(ValueError, match="env 0 that allows none, given to predict"):
            predicting.predict(obs, action_masks=mask & False)
    other = make("CartPole-v1")
    for predicting in (other, other.policy):
        with pytest.raises(ValueError, match="action_masks must be None"):
            predicting.predict(np.zeros(4), action_masks=[1, 1])


def test_evaluations() -> None:
    evaluation = EvalCallback(envs(1), eval_freq=20, n_eval_episodes=2, verbose=0, warn=False)
    make(envs(1)).learn(60, callback=evaluation)
    assert isinstance(evaluation.eval_env, ActionMaskVecEnv)
    assert evaluation.last_mean_reward > -np.inf
    with_statistics = EvalCallback(normalized(1), eval_freq=20, n_eval_episodes=2, verbose=0, warn=False)
    model = make(normalized(1)).learn(60, callback=with_statistics)
    evaluate_policy(model, make(normalized(1)).env, 2, warn=False)


@pytest.mark.parametrize("normalize", [False, True])
def test_save_and_load(normalize: bool, tmp_path: Path) -> None:
    wrap: Any = normalized if normalize else envs
    model = make(wrap()).learn(60)
    model.save(tmp_path / "model.zip")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    again = OffPAC.load(tmp_path / "model.zip", env=wrap(), device="cpu")
    again.load_replay_buffer(tmp_path / "buffer.pkl")
    assert th.equal(parameters(again), parameters(model))
    for name in ("observations", "next_observations"):
        for key, rows in getattr(replayed(model), name).items():
            np.testing.assert_array_equal(getattr(replayed(again), name)[key], rows)
    obs, mask = np.ones((1, 2), np.float32), np.array([[1, 0, 1, 1]])
    assert (
        again.predict(obs, action_masks=mask, deterministic=True)[0] == model.predict(obs, None, None, True, mask)[0]
    )[0]
    again.learn(40)
    alone = OffPAC.load(tmp_path / "model.zip", device="cpu")
    assert alone.uses_masks
    with pytest.raises(ValueError, match="env must give action masks, since the model was trained with them"):
        alone.set_env(envs(source="none"))
    with pytest.raises(ValueError, match="use_action_masks must be True, as when the model was made"):
        OffPAC.load(tmp_path / "model.zip", use_action_masks=False)


def test_a_saved_policy_keeps_its_masks(tmp_path: Path) -> None:
    make(envs()).policy.save(str(tmp_path / "policy.pth"))
    again = OffPACPolicy.load(str(tmp_path / "policy.pth"))
    assert again.masks
    assert again.predict(np.zeros(2), action_masks=np.array([0, 0, 0, 1]))[0] == 3


def test_it_may_act_for_another() -> None:
    OffPolicyPG("MlpPolicy", envs(), behavior_policy=make(envs()), train_freq=(4, "episode"), device="cpu").learn(40)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_run_that_was_interrupted_goes_on_exactly(normalize: bool, tmp_path: Path) -> None:
    def env() -> Any:
        made = make_vec_env("MaskedGrid-v0", 2, seed=0, use_action_masks=False)
        return VecNormalize(made) if normalize else made

    whole = make(env()).learn(400)
    with pytest.raises(InterruptedError):
        make(env()).learn(400, callback=[ResumeCallback(tmp_path, every=20), Crash()])
    resumed = OffPAC.resume(tmp_path, env(), device="cpu").learn(400, callback=[ResumeCallback(tmp_path, every=20)])
    assert th.equal(parameters(whole), parameters(resumed))
    for key, rows in replayed(whole).next_observations.items():
        np.testing.assert_array_equal(replayed(resumed).next_observations[key], rows)
