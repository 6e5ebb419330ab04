"""Policies with action masks: that they keep to the masks, and are found, saved and evaluated with them."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_pg import (
    NPG,
    TRPO,
    ActorCritic,
    GradientDiagnosticsCallback,
    KLPenaltyPG,
    OffPolicyPG,
    Reinforce,
    ResumeCallback,
)
from sb3_pg.envs import ActionMaskVecEnv, GymVectorAdapter, make_vec_env, with_action_masks
from sb3_pg.policies import extended, make_sampler, set_training_mode
from tests.envs.masked import SIZES, Restless, RestlessVector

CASES: dict[Any, dict[str, Any]] = {
    Reinforce: {"n_episodes": 4},
    ActorCritic: {"n_steps": 7, "ent_coef": 0.01},
    NPG: {"n_steps": 16, "batch_size": 16},
    TRPO: {"n_steps": 16, "batch_size": 16},
    KLPenaltyPG: {"n_steps": 16, "batch_size": 8, "ent_coef": 0.01},
    OffPolicyPG: {"train_freq": (4, "episode"), "learning_starts": 12},
}


def make(cls: Any, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return cls(policy, env, **{"seed": 0, "device": "cpu", **CASES[cls], **kwargs})


def envs(n: int = 2, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Restless(**kwargs)] * n)


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("memory", [None, "gru"])
@pytest.mark.parametrize("kind", list(SIZES))
@pytest.mark.parametrize("cls", list(CASES))
def test_no_forbidden_action_is_taken(cls: Any, kind: str, memory: Any) -> None:
    before = {}

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            if cls is not OffPolicyPG:
                assert bool(self.locals["log_probs"].isfinite().all())
            return True

    model = make(cls, envs(kind=kind), memory=memory)  # the env raises where a forbidden action is taken
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    model.learn(60, callback=Watch())
    changed = [name for name, parameter in model.policy.named_parameters() if not th.equal(parameter, before[name])]
    assert any("action_net" in name for name in changed)


@pytest.mark.parametrize("kind", list(SIZES))
@pytest.mark.parametrize("memory", [None, "lstm"])
@pytest.mark.parametrize("fast", [True, False])
def test_no_forbidden_action_among_10000(kind: str, memory: Any, fast: bool) -> None:
    n, n_masks = 10_000, sum(SIZES[kind])
    action_space = Restless(kind).action_space
    space = spaces.Dict({"observation": spaces.Box(-5, 5, (3,)), "action_mask": spaces.MultiBinary(n_masks)})
    policy: Any = extended(ActorCriticPolicy)(
        space, action_space, lambda _: 1e-3, masks=True, memory=memory, net_arch=[8]
    )
    if not fast:
        policy.features_extractor.register_forward_hook(lambda *_: None)
    with th.no_grad():
        policy.action_net.bias += 20 * th.randn_like(policy.action_net.bias)
    set_training_mode(policy, False)
    sampler = make_sampler(policy, th.device("cpu"), n)
    rng = np.random.default_rng(0)
    parts = []
    for size in SIZES[kind]:
        part = rng.random((n, size)) < 0.4
        part[np.arange(n), rng.integers(size, size=n)] = True
        parts.append(part)
    obs = {
        "observation": rng.normal(size=(n, 3)).astype(np.float32),
        "action_mask": np.concatenate(parts, 1).astype(np.int8),
    }
    actions = sampler(obs, np.ones(n, bool)).reshape(n, -1)
    for dimension, part in enumerate(parts):
        assert part[np.arange(n), actions[:, dimension].astype(int)].all()


@pytest.mark.parametrize("memory", [None, "lstm"])
def test_the_numpy_sampler_draws_what_the_policy_draws(memory: Any) -> None:
    space = spaces.Dict({"observation": spaces.Box(-5, 5, (3,)), "action_mask": spaces.MultiBinary(4)})
    policy: Any = extended(ActorCriticPolicy)(space, spaces.Discrete(4), lambda _: 1e-3, masks=True, memory=memory)
    with th.no_grad():
        policy.action_net.weight *= 100
    set_training_mode(policy, False)
    rng = np.random.default_rng(0)
    fast = make_sampler(policy, th.device("cpu"), 50)
    assert "Numpy" in type(fast).__name__
    hook = policy.features_extractor.register_forward_hook(lambda *_: None)
    set_training_mode(policy, False)
    slow = make_sampler(policy, th.device("cpu"), 50)
    assert "Numpy" not in type(slow).__name__
    starts = np.ones(50, bool)
    for _ in range(5):
        masks = (rng.random((50, 4)) < 0.5).astype(np.int8)
        masks[:, 1] = 1
        obs = {"observation": rng.normal(size=(50, 3)).astype(np.float32), "action_mask": masks}
        drawn = []
        for sampler in (fast, slow):
            th.manual_seed(1)
            drawn.append(sampler(obs, starts).tolist())
        assert drawn[0] == drawn[1]
        starts = np.zeros(50, bool)
    hook.remove()


def test_uniform_warm_up_draws_among_what_is_allowed_with_its_log_probs() -> None:
    model = make(OffPolicyPG, envs(kind="multi_discrete"), learning_starts=10_000).learn(200)
    buffer = model.replay_buffer
    batch = buffer.batch(buffer.choose(None), False)
    masks = batch.select(batch.observations)["action_mask"].bool()
    expected = -sum(part.sum(1).log() for part in masks.split([2, 3], 1))
    th.testing.assert_close(batch.select(batch.log_probs).float(), expected)


@pytest.mark.parametrize("forbidden", [False, True])
def test_a_behavior_gets_the_masks_and_keeps_to_them(forbidden: bool) -> None:
    def behavior(obs: Any) -> Any:
        masks = obs["action_mask"].astype(bool)
        return (masks.argmin(1) if forbidden else masks.argmax(1)), np.zeros(len(masks))

    model = make(OffPolicyPG, envs(kind="discrete"), behavior_policy=behavior, learning_starts=0)
    if forbidden:
        with pytest.raises(ValueError, match="behavior_policy must return actions that action_mask allows, got"):
            model.learn(40)
    else:
        model.learn(40)


def test_a_policy_with_masks_may_act_for_another() -> None:
    teacher = make(ActorCritic, envs())
    make(OffPolicyPG, envs(), behavior_policy=teacher, learning_starts=0).learn(40)


def test_entropy_and_kl_are_of_the_masked_distribution() -> None:
    class Forced(Restless):
        def mask(self) -> np.ndarray:
            return np.array([i == self.t % 4 for i in range(4)])

    model = make(ActorCritic, Forced(), n_steps=8)
    model.learn(8, log_interval=1)
    assert model.logger.name_to_value["train/entropy_loss"] == 0
    assert model.logger.name_to_value["train/joint_kl"] == 0
    assert model.logger.name_to_value["train/largest_ratio"] == 1


@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG])
def test_actions_that_count_from_another_number(cls: Any) -> None:
    class Shifted(Restless):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.Discrete(4, start=5)

        def step(self, action: Any) -> Any:
            return super().step(action - 5)

    model = make(cls, DummyVecEnv([Shifted] * 2)).learn(60)
    assert model.predict(np.zeros(2), action_masks=[0, 0, 1, 0])[0] == 7


@pytest.mark.parametrize(
    "env",
    [
        InvalidActionEnvDiscrete(5, 10, 2),
        InvalidActionEnvMultiDiscrete([3, 4], 10, 2),
        InvalidActionEnvMultiBinary(3, 10, 2),
    ],
)
@pytest.mark.parametrize("cls", [Reinforce, TRPO])
def test_envs_of_sb3_contrib(cls: Any, env: Any) -> None:
    model = make(cls, env).learn(60)
    rows = model.rollout_batch.select(model.rollout_batch.observations)["action_mask"]
    actions = model.rollout_batch.select(model.rollout_batch.actions).reshape(len(rows), -1).long()
    n = {"InvalidActionEnvDiscrete": [5], "InvalidActionEnvMultiDiscrete": [3, 4]}.get(type(env).__name__, [2, 2, 2])
    assert bool((rows < 1).any())
    for dimension, part in enumerate(rows.split(n, 1)):
        assert bool(part.gather(1, actions[:, dimension : dimension + 1]).all())


# ---------------------------------------------------------------- where masks come from


@pytest.mark.parametrize("source", ["method", "info", "key"])
@pytest.mark.parametrize("memory", [None, "gru"])
def test_masks_are_found(source: str, memory: Any) -> None:
    kwargs: dict[str, Any] = {"use_action_masks": True} if source == "info" else {}
    model = make(ActorCritic, Restless(source=source), memory=memory, **kwargs).learn(30)
    assert model.uses_masks
    assert model.policy.seen_space == spaces.Box(-100, 100, (2,), np.float32)


def test_masks_in_infos_are_found_where_the_env_is_given_by_its_id() -> None:
    gym.register("Quiet-v0", lambda **_: Restless(source="info"))
    try:
        assert make(ActorCritic, "Quiet-v0").uses_masks
    finally:
        del gym.registry["Quiet-v0"]


@pytest.mark.parametrize("use", [None, False])
def test_envs_without_masks_and_masks_that_are_ignored(use: Any) -> None:
    env = Restless(source="none") if use is None else Restless(source="method")
    env.source = "none"  # takes all actions
    model = make(ActorCritic, env, use_action_masks=use).learn(20)
    assert not model.uses_masks
    assert type(model.policy) is ActorCriticPolicy
    assert model.observation_space == env.observation_space


def test_false_takes_the_masks_of_make_vec_env_out_again() -> None:
    model = make(ActorCritic, make_vec_env("MaskedGrid-v0"), use_action_masks=False).learn(20)
    assert isinstance(model.observation_space, spaces.Box)


def test_masks_that_are_required_and_missing() -> None:
    with pytest.raises(ValueError, match="use_action_masks=True takes an env with a method"):
        make(ActorCritic, "CartPole-v1", use_action_masks=True)
    with pytest.raises(ValueError, match="use_action_masks=True takes an env with Discrete"):
        make(ActorCritic, "Pendulum-v1", use_action_masks=True)
    with pytest.raises(TypeError, match="use_action_masks must be"):
        make(ActorCritic, "CartPole-v1", use_action_masks="yes")


def test_mlp_policy_still_refuses_other_dicts() -> None:
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        make(ActorCritic, Restless(as_dict=True, source="none"))


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("cls", [Reinforce, TRPO, OffPolicyPG])
def test_native_vector_envs(cls: Any, mode: AutoresetMode) -> None:
    env = GymVectorAdapter(RestlessVector(2, mode))
    model = make(cls, env, use_action_masks=True).learn(60)
    assert isinstance(model.env, ActionMaskVecEnv)


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("cls", [ActorCritic, TRPO])
def test_truncated_episodes(cls: Any, truncates: bool) -> None:
    make(cls, envs(truncates=truncates)).learn(60)


def test_dicts_images_and_masks_that_are_seen() -> None:
    model = make(ActorCritic, Restless(as_dict=True), "MultiInputPolicy").learn(20)
    assert set(model.policy.seen_space.spaces) == {"vec", "class"}
    model = make(ActorCritic, Restless(as_dict=True), "MultiInputPolicy", policy_kwargs={"observe_masks": True}).learn(
        20
    )
    assert set(model.policy.seen_space.spaces) == {"vec", "class", "action_mask"}
    assert model.policy.features_dim == 2 + 3 + 4
    model = make(ActorCritic, Restless(), "MultiInputPolicy").learn(20)
    assert set(model.policy.seen_space.spaces) == {"observation"}

    class Images(Restless):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

        def _shown(self) -> tuple[Any, dict[str, Any]]:
            return np.full((36, 36, 1), self.t, np.uint8), {}

    model = make(ActorCritic, Images(), "CnnPolicy", n_steps=4).learn(8)
    assert model.policy.seen_space.shape == (1, 36, 36)
    with pytest.raises(ValueError, match="does not take"):
        make(ActorCritic, Restless(), "CnnPolicy")
    with pytest.raises(TypeError, match="observe_masks"):
        make(ActorCritic, Restless(), policy_kwargs={"observe_masks": 1})
    with pytest.raises(TypeError, match="net_ach"):
        make(ActorCritic, Restless(), policy_kwargs={"net_ach": [4]})


def test_normalization_does_not_touch_masks() -> None:
    model = make(ActorCritic, VecNormalize(envs())).learn(40)
    assert isinstance(model.env, ActionMaskVecEnv)
    statistics = model.get_vec_normalize_env().obs_rms
    assert statistics.mean.shape == (2,)
    assert set(np.unique(model.rollout_buffer.observations["action_mask"])) == {0, 1}


def normalized(env: Any) -> Any:
    return VecNormalize(env)


def stacked(env: Any) -> Any:
    return VecFrameStack(env, 2)


def both(env: Any) -> Any:
    return VecNormalize(VecFrameStack(env, 2))


@pytest.mark.parametrize("wrapper", [normalized, stacked, both])
@pytest.mark.parametrize("cls", [cls for cls in CASES if cls is not OffPolicyPG])
def test_wrappers_around_make_vec_env_learn_what_wrappers_inside_learn(cls: Any, wrapper: Any) -> None:
    models = []
    for use in (None, False):
        env = wrapper(make_vec_env("MaskedGrid-v0", 2, use_action_masks=use))
        watched = wrapper(make_vec_env("MaskedGrid-v0", use_action_masks=use))
        evaluation = EvalCallback(watched, eval_freq=50, n_eval_episodes=1, verbose=0, warn=False)
        models.append(make(cls, env).learn(200, callback=evaluation))
        assert models[-1].uses_masks
        assert (models[-1].env is env) == (use is None)
        assert evaluation.last_mean_reward > -np.inf
    around, inside = models
    for name, parameter in around.policy.state_dict().items():
        assert th.equal(parameter, inside.policy.state_dict()[name]), name
    if wrapper is not stacked:
        of_inside = inside.get_vec_normalize_env().obs_rms
        of_around = around.get_vec_normalize_env().obs_rms
        assert list(of_around) == ["observation"]
        np.testing.assert_array_equal(of_around["observation"].mean, of_inside.mean)
        np.testing.assert_array_equal(of_around["observation"].var, of_inside.var)
    evaluate_policy(around, around.env, 1, warn=False)


@pytest.mark.parametrize("wrapper", [normalized, stacked])
def test_evaluating_wrappers_that_no_model_has_seen(wrapper: Any) -> None:
    model = make(ActorCritic, wrapper(make_vec_env("MaskedGrid-v0", 2)))
    other = wrapper(make_vec_env("MaskedGrid-v0", 2))
    with pytest.raises(ValueError, match=r"(?s)observation\['action_mask'\] must be .*with_action_masks\(env\)"):
        evaluate_policy(model, other, 1, warn=False)
    evaluate_policy(model, with_action_masks(other), 1, warn=False)


def test_an_evaluation_whose_wrappers_have_another_order_is_an_error_at_once() -> None:
    watched = VecNormalize(envs(1))
    evaluation = EvalCallback(watched, eval_freq=10_000, warn=False)
    model = make(ActorCritic, VecNormalize(ActionMaskVecEnv(envs())))
    with pytest.raises(ValueError, match=r"eval_env must .*VecNormalize.*ActionMaskVecEnv"):
        model.learn(20, callback=evaluation)


def test_a_foreign_buffer() -> None:
    make(ActorCritic, envs(), rollout_buffer_class=DictRolloutBuffer).learn(40)


def test_a_policy_with_methods_of_its_own_is_refused() -> None:
    class Own(ActorCriticPolicy):
        def forward(self, obs: Any, deterministic: bool = False) -> Any:
            return super().forward(obs, deterministic)

    with pytest.raises(ValueError, match=r"the methods \['forward'\] of policy Own, and so do action masks.*=False"):
        ActorCritic(Own, Restless())
    ActorCritic(Own, Restless(), use_action_masks=False)


def test_masks_that_are_seen_too_late_give_a_warning() -> None:
    env = Restless(source="info")
    model = make(ActorCritic, env)
    assert not model.uses_masks
    env.source = "none"  # takes all actions
    env._shown = lambda: (np.zeros(2, np.float32), {"action_mask": np.ones(4)})  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="infos have action masks, which were not seen before"):
        model.learn(10)


@pytest.mark.parametrize("baseline", ["optimal", "linear", "time", "value"])
@pytest.mark.parametrize("kind", list(SIZES))
def test_baselines(kind: str, baseline: str) -> None:
    make(Reinforce, envs(kind=kind), baseline=baseline).learn(40)
    make(OffPolicyPG, envs(kind=kind), baseline=baseline).learn(40)


def test_the_noise_of_the_gradient_is_measured() -> None:
    callback = GradientDiagnosticsCallback()
    make(Reinforce, envs(kind="multi_discrete")).learn(40, callback=callback)
    assert callback.diagnostics is not None


def test_images_of_make_vec_env() -> None:
    class Images(Restless):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

        def _shown(self) -> tuple[Any, dict[str, Any]]:
            return np.full((36, 36, 1), self.t, np.uint8), {}

    gym.register("MaskedImages-v0", Images)
    try:
        model = make(ActorCritic, make_vec_env("MaskedImages-v0"), "CnnPolicy", n_steps=4).learn(8)
    finally:
        del gym.registry["MaskedImages-v0"]
    assert model.policy.seen_space.shape == (1, 36, 36)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("source", ["method", "key"])
@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG])
def test_a_mask_that_allows_nothing_is_an_error_that_names_env_and_step(cls: Any, source: str) -> None:
    env = DummyVecEnv([lambda: Restless(source=source), lambda: Restless(source=source, nothing_at=3)])
    with pytest.raises(ValueError, match=r"env 1 that allows none, at step 3 of the rollout"):
        make(cls, env).learn(40)


def test_a_mask_whose_action_the_env_ignores_may_be_empty() -> None:
    class WithKey(RestlessVector):
        def __init__(self) -> None:
            super().__init__(2, AutoresetMode.NEXT_STEP)
            mask = spaces.Box(0, 1, (4,), np.int8)
            self.single_observation_space = spaces.Dict({"vec": self.single_observation_space, "action_mask": mask})
            self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, 2)

        def _batch(self, others: dict[str, Any]) -> Any:
            observations, infos = super()._batch(others)
            masks = infos.pop("action_mask").astype(np.int8) * ~self.ended[:, None]
            return {"vec": observations, "action_mask": masks}, {}

    model = make(ActorCritic, GymVectorAdapter(WithKey())).learn(60)
    assert model.uses_masks


def test_the_dimension_without_choice_is_named() -> None:
    class Half(Restless):
        def mask(self) -> np.ndarray:
            return np.array([1, 1, 0, 0, 0], bool)

    with pytest.raises(ValueError, match="in action dimension 1, at step 0"):
        make(ActorCritic, Half("multi_discrete")).learn(10)


@pytest.mark.parametrize("memory", [None, "lstm"])
def test_predict(memory: Any) -> None:
    model = make(ActorCritic, envs(), memory=memory)
    obs, mask = np.zeros(2, np.float32), np.array([False, False, True, False])
    assert model.predict(obs, action_masks=mask)[0] == 2
    assert model.policy.predict(obs, action_masks=mask)[0] == 2
    assert model.predict({"observation": obs, "action_mask": mask})[0] == 2
    both, masks = np.stack([obs, obs]), np.stack([mask, mask[::-1]])
    assert model.predict(both, action_masks=masks)[0].tolist() == [2, 1]
    assert model.predict({"observation": both}, action_masks=masks)[0].tolist() == [2, 1]
    state = model.predict(both, action_masks=masks)[1]
    assert (state is None) == (memory is None)
    with pytest.raises(ValueError, match=r"predict needs action masks.*give action_masks="):
        model.predict(obs)
    with pytest.raises(ValueError, match=r"action_masks must be an array of shape \(4,\) or \(n_envs, 4\).*\(3,\)"):
        model.predict(obs, action_masks=mask[:3])
    with pytest.raises(ValueError, match="env 0 that allows none, given to predict"):
        model.predict(obs, action_masks=mask & False)
    other = make(ActorCritic, "CartPole-v1")
    with pytest.raises(ValueError, match="action_masks must be None"):
        other.predict(np.zeros(4), action_masks=[1, 1])


# ---------------------------------------------------------------- evaluating, saving


@pytest.mark.parametrize("memory", [None, "gru"])
def test_evaluations(memory: Any) -> None:
    env = envs(1)
    evaluation = EvalCallback(env, eval_freq=10, n_eval_episodes=2, verbose=0, warn=False)
    model = make(ActorCritic, envs(1), memory=memory).learn(30, callback=CallbackList([evaluation]))
    assert isinstance(evaluation.eval_env, ActionMaskVecEnv)
    assert evaluation.evaluations_timesteps == [] or len(evaluation.evaluations_timesteps) == 3
    assert evaluation.last_mean_reward > -np.inf
    model.learn(30, callback=[evaluation])
    evaluate_policy(model, model.env, 3, warn=False)
    evaluate_policy(model, ActionMaskVecEnv(envs()), 3, warn=False)
    grid = make(ActorCritic, "MaskedGrid-v0")
    evaluate_policy(grid, make_vec_env("MaskedGrid-v0", 2), 2)


def test_an_evaluation_of_a_model_that_ignores_masks() -> None:
    evaluation = EvalCallback(make_vec_env("MaskedGrid-v0"), eval_freq=10, n_eval_episodes=1)
    make(ActorCritic, "MaskedGrid-v0", use_action_masks=False).learn(20, callback=evaluation)
    assert evaluation.last_mean_reward > -np.inf


def test_an_evaluation_without_masks_is_an_error() -> None:
    evaluation = EvalCallback(envs(1, source="none"), eval_freq=10, warn=False)
    with pytest.raises(ValueError, match="eval_env must give action masks, since the model was"):
        make(ActorCritic, envs(1)).learn(30, callback=evaluation)


@pytest.mark.parametrize("memory", [None, "gru"])
@pytest.mark.parametrize("cls", [TRPO, OffPolicyPG])
def test_save_and_load(cls: Any, memory: Any, tmp_path: Path) -> None:
    model = make(cls, envs(), memory=memory).learn(60)
    model.save(tmp_path / "model.zip")
    again = cls.load(tmp_path / "model.zip", env=envs(), device="cpu")
    assert isinstance(again.env, ActionMaskVecEnv)
    obs, mask = np.ones((1, 2), np.float32), np.array([[1, 0, 1, 1]])
    for deterministic in (True, False):
        th.manual_seed(0)
        first = model.predict(obs, action_masks=mask, deterministic=deterministic)[0]
        th.manual_seed(0)
        assert again.predict(obs, action_masks=mask, deterministic=deterministic)[0] == first
    again.learn(30)
    alone = cls.load(tmp_path / "model.zip", device="cpu")
    assert alone.uses_masks
    alone.set_env(envs())
    assert isinstance(alone.env, ActionMaskVecEnv)
    with pytest.raises(ValueError, match="env must give action masks, since the model was trained with them"):
        alone.set_env(envs(source="none"))
    with pytest.raises(ValueError, match="use_action_masks must be True, as when the model was made"):
        cls.load(tmp_path / "model.zip", use_action_masks=False)


def test_a_model_from_before_masks_loads_without_them(tmp_path: Path) -> None:
    model = make(ActorCritic, "MaskedGrid-v0", use_action_masks=False)
    model.save(tmp_path / "model.zip", exclude=["use_action_masks"])
    again = ActorCritic.load(tmp_path / "model.zip", env="MaskedGrid-v0")
    assert again.use_action_masks is False
    assert isinstance(again.observation_space, spaces.Box)


def test_a_saved_policy_keeps_its_masks(tmp_path: Path) -> None:
    policy = make(ActorCritic, envs()).policy
    policy.save(tmp_path / "policy.pth")
    again = type(policy).load(tmp_path / "policy.pth")
    assert again.masks
    assert again.predict(np.zeros(2), action_masks=[0, 0, 0, 1])[0] == 3


class Crash(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps >= 250:
            raise InterruptedError
        return True


@pytest.mark.parametrize("memory", [None, "lstm"])
@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG])
def test_a_run_that_was_interrupted_goes_on_exactly(cls: Any, memory: Any, tmp_path: Path) -> None:
    whole = make(cls, "MaskedGrid-v0", memory=memory, max_episode_steps=100).learn(400)
    first = make(cls, "MaskedGrid-v0", memory=memory, max_episode_steps=100)
    with pytest.raises(InterruptedError):
        first.learn(400, callback=[ResumeCallback(tmp_path, every=20), Crash()])
    resumed = cls.resume(tmp_path, "MaskedGrid-v0", device="cpu").learn(
        400, callback=[ResumeCallback(tmp_path, every=20)]
    )
    for mine, theirs in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(mine, theirs)


@pytest.mark.parametrize("wrapper", [normalized, stacked, both])
def test_a_run_with_wrappers_around_masks_goes_on_exactly(wrapper: Any, tmp_path: Path) -> None:
    def env() -> Any:
        return wrapper(make_vec_env("MaskedGrid-v0", 2))

    whole = make(ActorCritic, env()).learn(400)
    with pytest.raises(InterruptedError):
        make(ActorCritic, env()).learn(400, callback=[ResumeCallback(tmp_path, every=20), Crash()])
    resumed = ActorCritic.resume(tmp_path, env(), device="cpu").learn(400)
    for mine, theirs in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(mine, theirs)
