"""Recurrent policies in every policy-gradient class: what they share with other policies, and what memory adds."""

import copy
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_pg import (
    NPG,
    TRPO,
    ActorCritic,
    GradientDiagnosticsCallback,
    KLPenaltyPG,
    Memory,
    NonFiniteError,
    OffPAC,
    OffPolicyPG,
    Reinforce,
)
from sb3_pg.checkpoints.model_file import MANIFEST
from sb3_pg.envs import GymVectorAdapter
from sb3_pg.errors import DamagedFileError
from sb3_pg.policies import ExtendedPolicy
from tests.algorithms.every_algorithm import CLASSES, FEW_STEPS
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, OwnForward, ScriptedEnv, parameters, policy_for, vec

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")
ALL = (*CLASSES, OffPolicyPG)
each_class = pytest.mark.parametrize("cls", ALL)
kinds = pytest.mark.parametrize("kind", ["lstm", "gru"])
SMALL: dict[str, Any] = {"device": "cpu", "seed": 0, "policy_kwargs": {"net_arch": [8]}}


def make(cls: Any, env: Any = "CartPole-v1", memory: Any = None, **kwargs: Any) -> Any:
    memory = Memory("gru", 8) if memory is None else memory
    return cls(kwargs.pop("policy", "MlpPolicy"), env, memory=memory, **{**SMALL, **FEW_STEPS[cls], **kwargs})


def scripted(action_space: str = "discrete", observation_space: str = "vector") -> VecEnv:
    spaces_of = OBSERVATION_SPACES[observation_space], ACTION_SPACES[action_space]
    envs = [
        ScriptedEnv(lengths, (False, True), reward, *copy.deepcopy(spaces_of))
        for lengths, reward in (((3, 4, 9), -5.0), ((2, 9, 4), 1.0))
    ]
    for seed, env in enumerate(envs):
        env.observation_space.seed(seed)
    return vec(*envs)


def late() -> VecEnv:
    """Envs that reset in the step after an episode's end."""
    envs: list[Any] = [ScriptedEnv((3, 1, 4), (False, True)), ScriptedEnv((2, 5), (True, False))]
    return GymVectorAdapter(
        VectorWrapper(
            SyncVectorEnv(
                [lambda env=env: env for env in envs],  # type: ignore[misc]
                autoreset_mode=AutoresetMode.NEXT_STEP,
            )
        )
    )


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("memory", ["lstm", Memory("lstm", 4, 2, "shared"), Memory("gru", 4, 1, "none", 3)], ids=str)
@each_class
def test_learns_with_each_kind(cls: Any, memory: Any) -> None:
    model = make(cls, memory=memory)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(150)
    assert model._n_updates > 0
    after = dict(model.policy.named_parameters())
    still = {name for name, value in before.items() if th.equal(value, after[name])}
    assert not still, still


@pytest.mark.parametrize(
    ("cls", "action_space"),
    [
        *((cls, name) for cls in (ActorCritic, OffPolicyPG) for name in (*ACTION_SPACES, "sde")),
        *((cls, name) for cls in (Reinforce, NPG, TRPO, KLPenaltyPG) for name in ("multi_discrete", "sde")),
    ],
)
def test_learns_in_each_action_space(cls: Any, action_space: str) -> None:
    kwargs = {"use_sde": True, "sde_sample_freq": 2} if action_space == "sde" else {}
    model = make(cls, scripted("box" if action_space == "sde" else action_space), **kwargs).learn(60)
    assert model._n_updates > 0
    assert model.policy.use_sde == (action_space == "sde")


@pytest.mark.parametrize(
    ("cls", "observation_space"),
    [
        *((ActorCritic, name) for name in OBSERVATION_SPACES),
        *((cls, name) for cls in ALL if cls is not ActorCritic for name in ("dict", "image")),
    ],
)
def test_learns_from_each_observation_space(cls: Any, observation_space: str) -> None:
    policy = policy_for(OBSERVATION_SPACES[observation_space])
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [4], "features_extractor_kwargs": {"features_dim": 4}}}
    model = make(
        cls,
        scripted(observation_space=observation_space),
        policy=policy,
        **(kwargs if observation_space == "image" else {}),
    )
    assert model.learn(40)._n_updates > 0
    obs = model.get_env().reset()
    _, state = model.predict(obs)
    assert state[0].shape == (1, 2, 8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"baseline": name, "n_steps": None, "n_episodes": 4}
        for name in ("none", "mean", "leave_one_out", "time", "optimal", "linear", "value")
    ]
    + [{"baseline": "optimal", "baseline_kwargs": {"component_wise": True}, "n_steps": None, "n_episodes": 4}],
    ids=lambda kwargs: kwargs["baseline"] + str("baseline_kwargs" in kwargs),
)
def test_learns_with_each_baseline(kwargs: dict[str, Any]) -> None:
    assert make(Reinforce, scripted(), **kwargs).learn(60)._n_updates > 0


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (ActorCritic, {"n_steps": 1}),
        (ActorCritic, {"critic_fit": "before", "n_critic_updates": 3, "critic_batch_size": 5}),
        (ActorCritic, {"critic_fit": "before", "n_critic_updates": 3, "recompute_advantage": True, "advantage": "td"}),
        (ActorCritic, {"normalize_value_targets": True, "n_critic_updates": 2, "critic_warmup_updates": 2}),
        (TRPO, {"fisher_chunk_size": 3, "fisher_subsample": 2, "n_steps": 16}),
        (NPG, {"step": "fixed", "step_size": 0.01, "n_steps": None, "n_episodes": 4, "batch_size": 5}),
        (KLPenaltyPG, {"batch_size": 3, "n_epochs": 3}),
        (OffPolicyPG, {"train_freq": 5, "batch_size": 3, "gradient_steps": 2, "ratio": "per_decision"}),
        (OffPolicyPG, {"learning_starts": 30, "train_freq": 7}),
    ],
    ids=str,
)
def test_learns_with_the_other_arguments(cls: Any, kwargs: dict[str, Any]) -> None:
    assert make(cls, scripted(), **kwargs).learn(160)._n_updates > 0


@each_class
def test_the_same_seed_gives_the_same_weights(cls: Any) -> None:
    a, b, other = (make(cls, seed=seed).learn(60) for seed in (3, 3, 4))
    assert th.equal(parameters(a), parameters(b))
    assert not th.equal(parameters(a), parameters(other))


@each_class
def test_envs_that_reset_late_and_normalized_observations(cls: Any) -> None:
    assert make(cls, late()).learn(60)._n_updates > 0
    assert make(cls, VecNormalize(scripted())).learn(60)._n_updates > 0


class RememberTheFirst(gym.Env[Any, Any]):
    """The action in the last of three steps is to be what the first observation showed."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)

    def _obs(self) -> np.ndarray:
        return np.array([self.shown if self.t == 0 else 0, self.t == 2], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t, self.shown = 0, int(self.np_random.integers(2)) * 2 - 1
        return self._obs(), {}

    def step(self, action: int) -> Any:
        self.t += 1
        ends = self.t == 3
        reward = float(ends and action == (self.shown > 0))
        return self._obs(), reward, ends, False, {}


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (TRPO, {"memory": Memory("lstm", 16), "n_steps": 48, "target_kl": 0.05, "batch_size": 384}),
        (OffPolicyPG, {"memory": Memory("gru", 16), "train_freq": (64, "episode"), "learning_rate": 1e-2}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_memory_is_for(cls: Any, kwargs: dict[str, Any]) -> None:
    """Without memory the mean reward is 1/2."""
    env = make_vec_env(RememberTheFirst, 8, seed=0)
    model = make(cls, env, **kwargs).learn(12_000)
    reward: Any = evaluate_policy(model, make_vec_env(RememberTheFirst, 4, seed=1), 100)[0]
    assert reward > 0.95


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("train_freq", [7, (4, "episode")])
@pytest.mark.parametrize("n_warmup", [0, 25])
@kinds
def test_ratios_of_a_policy_to_itself_are_one(kind: Any, train_freq: Any, n_warmup: int) -> None:
    """Of trajectories that several rollouts have collected, and replayed ones."""
    model = make(OffPolicyPG, scripted(), Memory(kind, 6), train_freq=train_freq, learning_rate=0.0, baseline="none")
    ratios = []
    estimator = type(model.make_estimator())
    weigh = estimator.weigh

    def keep(self: Any, batch: Any, log_prob: th.Tensor) -> None:
        weigh(self, batch, log_prob)
        ratios.append(batch.log_ratio[batch.valid].exp())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimator, "weigh", keep)
        model.learn(100)
    assert len(ratios) > 3
    assert th.cat(ratios).sub(1).abs().max() < 2e-6
    if n_warmup:  # uniform actions have a log-prob of their own
        model = make(OffPolicyPG, scripted(), learning_starts=n_warmup, train_freq=train_freq).learn(100)
        assert model._n_updates > 0


@pytest.mark.parametrize("kwargs", [{"n_steps": 6}, {"n_steps": None, "n_episodes": 4}], ids=str)
@pytest.mark.parametrize("critic", ["own", "shared", "none"])
@pytest.mark.parametrize("make_env", [scripted, late])
@pytest.mark.parametrize("every", [1, 3])
def test_callbacks_find_values_and_log_probs_of_the_memory(
    every: int, make_env: Any, critic: Any, kwargs: dict[str, Any]
) -> None:
    """They are those that the batched forward finds later, whichever steps are read."""

    class Reads(BaseCallback):
        n_rollouts = 0

        def _on_rollout_start(self) -> None:
            self.values: list[th.Tensor] = []
            self.log_probs: list[th.Tensor] = []
            self.n_active: list[np.ndarray] = []

        def _on_step(self) -> bool:
            is_read = self.n_calls % every == 0
            for name, kept in (("values", self.values), ("log_probs", self.log_probs)):
                kept.append(self.locals[name].flatten().clone() if is_read else th.full((2,), th.nan))
            assert self.locals["obs_tensor"].shape == (2, 3)
            return True

        def _on_rollout_end(self) -> None:
            model: Any = self.model
            buffer, after = model.rollout_buffer, self.locals["values"].flatten()
            values, log_probs = (buffer.in_order(th.stack(x)) for x in (self.values, self.log_probs))
            valid = th.as_tensor(buffer.mask)
            mask = valid & ~values.isnan()
            assert mask.any()
            assert th.allclose(values[mask], th.as_tensor(buffer.values)[mask], atol=2e-6)
            assert th.allclose(log_probs[mask], th.as_tensor(buffer.log_probs)[mask], atol=2e-6)
            bootstrap = model.rollout_batch.bootstrap
            last = valid.sum(0) - 1
            cut = [i for i in range(2) if not buffer.dones[last[i], i]]
            assert cut or kwargs["n_steps"] is None or self.n_rollouts
            for i in cut:
                assert float(after[i]) == pytest.approx(float(bootstrap[last[i], i]), abs=2e-6)
            self.n_rollouts += 1

    reads = Reads()
    make(ActorCritic, make_env(), Memory("lstm", 5, critic=critic), **kwargs).learn(60, callback=reads)
    assert reads.n_rollouts > 2


@pytest.mark.parametrize("observation_space", OBSERVATION_SPACES)
def test_callbacks_find_values_for_each_observation_space(observation_space: str) -> None:
    """Also at the end of the rollout, where log-probs are still those of its last step."""

    class Reads(BaseCallback):
        def _on_rollout_start(self) -> None:
            self.values: list[th.Tensor] = []

        def _on_step(self) -> bool:
            self.values.append(self.locals["values"].flatten().clone())
            return self.n_calls < 15

        def _on_rollout_end(self) -> None:
            buffer = self.locals["rollout_buffer"]
            assert th.allclose(th.stack(self.values), th.as_tensor(buffer.values), atol=2e-6)
            after = self.locals["values"].flatten()
            assert not th.allclose(after, self.values[-1])
            assert th.allclose(self.locals["log_probs"], th.as_tensor(buffer.log_probs[-1]), atol=2e-6)

    policy = policy_for(OBSERVATION_SPACES[observation_space])
    env = scripted("discrete", observation_space)
    model = make(ActorCritic, env, Memory("gru", 5), policy=policy, n_steps=6).learn(100, callback=Reads())
    assert model.num_timesteps == 30
    assert model._memory.keys() == {"actor", "critic"}


@pytest.mark.parametrize("critic", ["own", "shared"])
@pytest.mark.parametrize("every", [1, 10])
def test_the_time_of_reading_values_at_every_step_is_linear(every: int, critic: Any) -> None:
    class Counts(FlattenExtractor):
        n_rows = 0

        def forward(self, observations: th.Tensor) -> th.Tensor:
            Counts.n_rows += len(observations)
            return super().forward(observations)

    class Reads(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % every == 0:
                assert self.locals["values"].shape == (2, 1)
                assert self.locals["log_probs"].shape == (2,)
            return True

    def rows(n_steps: int) -> int:
        kwargs = {"net_arch": [8], "features_extractor_class": Counts}
        model = make(ActorCritic, scripted(), Memory("gru", 5, critic=critic), n_steps=n_steps, policy_kwargs=kwargs)
        Counts.n_rows = 0
        model.learn(2 * n_steps, callback=Reads())
        return Counts.n_rows

    assert rows(200) < 2.1 * rows(100)


@pytest.mark.parametrize("kwargs", [{"n_steps": 8}, {"n_steps": None, "n_episodes": 4}], ids=str)
@pytest.mark.parametrize("n_steps", [1, 5, 6, 7])
@pytest.mark.parametrize("critic", ["own", "shared"])
@pytest.mark.parametrize("make_env", [scripted, late])
def test_what_is_remembered_after_a_callback_has_stopped_a_rollout(
    make_env: Any, critic: Any, n_steps: int, kwargs: dict[str, Any]
) -> None:
    """It is that of a rollout that has ended there, and training goes on with it."""

    class Stops(BaseCallback):
        def _on_step(self) -> bool:
            return bool(self.n_calls < whole._collector.n_steps)

    memory = Memory("lstm", 5, critic=critic)
    whole = make(ActorCritic, make_env(), memory, learning_rate=0.0, n_steps=n_steps).learn(2 * n_steps)
    model = make(ActorCritic, make_env(), memory, learning_rate=0.0, **kwargs).learn(100, callback=Stops())
    assert model._n_updates == 0
    goes_on = ~whole._last_episode_starts
    assert goes_on.any() or n_steps == 5
    assert model._memory.keys() == whole._memory.keys() == ({"actor", "critic"} if critic == "own" else {"actor"})
    for name, state in model._memory.items():
        for part, expected in zip(state, whole._memory[name], strict=True):
            assert th.allclose(part[:, goes_on], expected[:, goes_on], atol=1e-6)
            assert (part[:, goes_on] != 0).all()
    model.learn(16, reset_num_timesteps=False)
    assert model._n_updates > 0


def test_rollouts_of_a_model_go_on_where_the_last_one_ended() -> None:
    model = make(ActorCritic, scripted(), Memory("gru", 5), n_steps=4, learning_rate=0.0)
    first = model.learn(8)._memory
    assert first.keys() == {"actor", "critic"}
    whole = make(ActorCritic, scripted(), Memory("gru", 5), n_steps=8, learning_rate=0.0).learn(16)._memory
    second = model.learn(8, reset_num_timesteps=False)._memory
    for name in ("actor", "critic"):
        assert th.allclose(second[name][0], whole[name][0], atol=1e-6)
        assert not th.allclose(first[name][0], whole[name][0], atol=1e-3)


def test_act_device() -> None:
    plain, copied = (
        make(ActorCritic, scripted(), "lstm", n_steps=5, act_device=device).learn(60) for device in (None, "cpu:0")
    )
    assert copied._collector.acting is not copied.policy
    assert th.allclose(parameters(plain), parameters(copied), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.compile")
@pytest.mark.parametrize("cls", [ActorCritic, TRPO, OffPolicyPG])
def test_a_compiled_policy_remembers(cls: Any) -> None:
    plain, compiled = (make(cls, scripted(), "gru") for _ in range(2))
    compiled.policy = th.compile(compiled.policy, backend="eager")
    for model in (plain, compiled):
        model.set_random_seed(0)
        model.learn(40)
    assert th.allclose(parameters(plain), parameters(compiled), atol=1e-5)


def test_gradient_diagnostics_of_episodes() -> None:
    callback = GradientDiagnosticsCallback()
    make(Reinforce, scripted(), n_steps=None, n_episodes=4).learn(40, callback=callback)
    assert callback.diagnostics is not None
    assert float(callback.diagnostics.batch_variance) > 0
    with pytest.raises(ValueError, match="unit='sample' and memory"):
        make(Reinforce, scripted()).learn(40, callback=GradientDiagnosticsCallback(unit="sample"))


def test_gradient_diagnostics_of_one_episode_give_advice_that_can_be_followed(capsys: Any) -> None:
    memory: Any
    for memory, advice in (("lstm", "collect from more envs, or more steps or episodes"), (None, "use unit='sample'")):
        model = Reinforce("MlpPolicy", "CartPole-v1", n_episodes=1, memory=memory, **SMALL)
        model.learn(20, callback=GradientDiagnosticsCallback(verbose=1))
        assert f"this rollout has 1; {advice}\n" in capsys.readouterr().out


# ---------------------------------------------------------------- SB3's contracts


@each_class
def test_predict_and_evaluation(cls: Any, tmp_path: Path) -> None:
    model = make(cls, make_vec_env("CartPole-v1", 2))
    callback = EvalCallback(make_vec_env("CartPole-v1", 1), n_eval_episodes=2, eval_freq=20, log_path=str(tmp_path))
    model.learn(60, callback=callback)
    assert callback.last_mean_reward > 0
    obs = np.ones((2, 4), np.float32)
    actions, state = model.predict(obs, deterministic=True)
    assert actions.shape == (2,)
    again, other = model.predict(obs, state, np.array([True, False]), deterministic=True)
    assert np.allclose(other[0][:, 0], state[0][:, 0])
    assert not np.allclose(other[0][:, 1], state[0][:, 1])
    assert again[0] == actions[0]
    with pytest.raises(ValueError, match=r"state must be a tuple .* shapes \[\(1, 1, 8\)\], got \[\(1, 2, 8\)\]"):
        model.predict(obs[0], state)


@pytest.mark.parametrize("shift", ["start", "integers", "squashed"])
def test_actions_that_envs_number_in_their_own_way(shift: str) -> None:
    space: Any = spaces.Discrete(3, start=5)
    kwargs: dict[str, Any] = {}
    if shift != "start":
        space = spaces.Box(np.array([-3, 0]), np.array([3, 7]), dtype=np.int64)
    if shift == "squashed":
        kwargs = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
    model = make(ActorCritic, vec(ScriptedEnv((4,), action_space=space)), **kwargs).learn(16)
    obs = model.get_env().reset()
    action, state = model.predict(obs)
    assert space.contains(space.dtype.type(action[0]) if shift == "start" else action[0])
    after = model.predict(obs, state)[1]
    assert state is not None
    assert not np.array_equal(after[0], state[0])


@pytest.mark.parametrize("memory", ["lstm", Memory("gru", 4, 2, "none", 5)], ids=["lstm", "gru"])
@each_class
def test_saved_and_loaded_untrusted(cls: Any, memory: Any, tmp_path: Path) -> None:
    env = scripted()
    model = make(cls, env, memory).learn(40)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=env, device="cpu")
    assert loaded.memory == model.memory
    assert isinstance(loaded.policy, ExtendedPolicy)
    assert loaded.policy_class is ActorCriticPolicy
    assert th.equal(parameters(model), parameters(loaded))
    obs, state, own = np.ones((2, 3), np.float32), None, None
    for _ in range(3):
        a, state = model.predict(obs, state, deterministic=True)
        b, own = loaded.predict(obs, own, deterministic=True)
        assert np.array_equal(a, b)
        assert state is not None
        assert own is not None
        assert all(map(np.array_equal, state, own))
    assert loaded.learn(40, reset_num_timesteps=False).num_timesteps > model.num_timesteps
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert json.loads(archive.read(MANIFEST))["pickled"] == []
        saved = json.loads(archive.read("data"))
    assert saved["memory"][":object:"] == "sb3_pg.policies.memory:Memory"
    assert "_memory" not in saved


def test_a_file_with_an_impossible_memory_is_damaged(tmp_path: Path) -> None:
    make(ActorCritic, scripted()).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for state in ({"hidden_size": -1}, {"kind": "rnn"}, {"hidden_size": 8, "extra": 1}):
        data = json.loads(files["data"])
        data["memory"]["state"] |= state
        manifest = json.loads(files[MANIFEST])
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
            for name, content in (files | {"data": json.dumps(data).encode()}).items():
                archive.writestr(name, content)
        assert manifest
        with pytest.raises((DamagedFileError, ValueError, TypeError)):
            ActorCritic.load(tmp_path / "other.zip", device="cpu")


def test_a_loaded_policy_keeps_its_layers(tmp_path: Path) -> None:
    make(ActorCritic, scripted(), Memory("gru", 8)).save(tmp_path / "model")
    for other in ("lstm", Memory("gru", 9), Memory("gru", 8, critic="none"), None):
        with pytest.raises(ValueError, match=r"memory must be that of the saved policy .* Memory\("):
            ActorCritic.load(tmp_path / "model", memory=other)
    with pytest.raises(ValueError, match="memory must be one of"):
        ActorCritic.load(tmp_path / "model", memory="rnn")
    loaded: Any = ActorCritic.load(tmp_path / "model", env=scripted(), memory=Memory("gru", 8, backprop_steps=2))
    assert loaded.policy.mlp_extractor.actor.backprop_steps == 2
    loaded.learn(20)


@each_class
def test_policies_without_memory_are_saved_as_before(cls: Any, tmp_path: Path) -> None:
    model = cls("MlpPolicy", scripted(), **{**SMALL, **FEW_STEPS[cls]}).learn(20)
    assert type(model.policy) is ActorCriticPolicy
    assert model.predict(np.ones((2, 3), np.float32))[1] is None
    model.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        saved = json.loads(archive.read("data"))
    assert saved["memory"] is None
    del saved["memory"]  # as in a zip of a version without it
    assert not any("memory" in name for name in saved if name != "optimize_memory_usage")


@each_class
def test_pickled_and_copied(cls: Any) -> None:
    model = make(cls, scripted()).learn(40)
    copy.deepcopy(model.policy)
    for again in (pickle.loads(cloudpickle.dumps(model)), copy.deepcopy(model)):
        assert th.equal(parameters(model), parameters(again))
        again.learn(20)


def test_another_env_begins_anew() -> None:
    model = make(ActorCritic, scripted()).learn(20)
    model.set_env(make_vec_env(lambda: ScriptedEnv((4,)), 2))
    model.learn(20, reset_num_timesteps=False)
    model.set_env(model.get_env())
    model.learn(20, reset_num_timesteps=False)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("part", ["actor", "critic"])
def test_a_layer_that_is_not_finite_never_acts(part: str, name: str) -> None:
    env = scripted()
    model = make(ActorCritic, env, "lstm")
    with th.no_grad():
        getattr(getattr(model.policy.mlp_extractor, part).layers, name).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"{part}\.layers\.{name}"):
        model.learn(20)
    assert not any(one.unwrapped.actions for one in env.envs)  # type: ignore[attr-defined]


def test_off_pac_refuses_and_says_why() -> None:
    with pytest.raises(TypeError, match=r"OffPAC has no argument 'memory': it replays single transitions.*OffPolicyPG"):
        OffPAC("MlpPolicy", "CartPole-v1", memory="lstm")  # type: ignore[arg-type]
    OffPAC("MlpPolicy", "CartPole-v1", device="cpu")


@each_class
def test_wrong_memories_are_refused_by_name(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"memory must be one of \['lstm', 'gru'\], a Memory or None, got 'rnn'"):
        make(cls, memory="rnn")
    with pytest.raises(TypeError, match=r"memory must be one of .*got 64"):
        make(cls, memory=64)
    with pytest.raises(TypeError, match=r"memory must have the names .*got \['layers'\]"):
        make(cls, memory={"layers": 3})
    assert make(cls, memory={"kind": "lstm", "hidden_size": 3}).memory == Memory("lstm", 3)


@each_class
@pytest.mark.parametrize("name", ["MlpLstmPolicy", "CnnLstmPolicy"])
def test_the_names_of_recurrent_policies_lead_to_memory(cls: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{name}'; give memory='lstm' with policy='MlpPolicy'"):
        cls(name, "CartPole-v1")


@each_class
def test_policies_that_would_lose_a_method_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"memory replaces the methods \['forward'\] of policy OwnForward"):
        make(cls, policy=OwnForward)


class OwnNets(ActorCriticPolicy):
    """A policy of the user's own whose methods are SB3's."""


def test_policies_that_lose_none_remember() -> None:
    model = make(ActorCritic, scripted(), policy=OwnNets).learn(20)
    assert isinstance(model.policy, OwnNets)
    assert model.policy_class is OwnNets


@pytest.mark.parametrize("cls", [ActorCritic, TRPO])
def test_buffers_of_sb3_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"RolloutBuffer.* holds single steps, not the sequences that memory="):
        make(cls, rollout_buffer_class=RolloutBuffer)


def test_a_policy_with_memory_is_no_behavior_policy() -> None:
    teacher = make(ActorCritic, scripted())
    for given in (teacher, teacher.policy):
        with pytest.raises(TypeError, match=r"behavior_policy must be .*whose policy takes more than observations"):
            OffPolicyPG("MlpPolicy", scripted(), behavior_policy=given, device="cpu")


def test_a_behavior_policy_may_act_for_a_policy_with_memory() -> None:
    teacher = ActorCritic("MlpPolicy", scripted(), device="cpu")
    assert make(OffPolicyPG, scripted(), behavior_policy=teacher).learn(60)._n_updates > 0


def test_a_critic_that_shares_memory_shares_features() -> None:
    with pytest.raises(ValueError, match=r"critic='shared'.*share_features_extractor=True"):
        make(
            ActorCritic,
            scripted(),
            Memory(critic="shared"),
            policy_kwargs={"share_features_extractor": False},
        )


# ---------------------------------------------------------------- buffers filled by hand


def filled(model: Any) -> Any:
    """The model's buffer with made-up steps, in SB3's way."""
    rng, buffer = np.random.default_rng(0), model.rollout_buffer
    buffer.reset()
    starts, state = np.ones(2, bool), None
    for _ in range(8):
        obs = rng.normal(size=(2, 3)).astype(np.float32)
        with th.no_grad():
            distribution, state = model.policy.next_distribution(th.as_tensor(obs), state, th.as_tensor(starts))
            actions = distribution.sample()
        buffer.add(obs, actions.numpy(), rng.normal(size=2), starts, th.zeros(2), distribution.log_prob(actions))
        starts = rng.random(2) < 0.3
    buffer.compute_returns_and_advantage(th.zeros(2), starts)
    return buffer


def test_a_buffer_that_is_filled_by_hand_is_read_in_sequences() -> None:
    model = make(ActorCritic, scripted(), n_steps=8)
    model.learn(0)
    buffer = filled(model)
    model.train()
    assert model._n_updates == 1
    assert model.rollout_batch.sequences.n_sequences == int(buffer.episode_starts.sum())
    buffer = filled(model)
    next(buffer.get(4))
    with pytest.raises(ValueError, match="has been read by its get, which loses the order of the steps"):
        model.train()


def test_a_deep_copy_remembers_what_the_model_remembers() -> None:
    model = make(ActorCritic, scripted(), n_steps=7).learn(14)
    again = copy.deepcopy(model)
    for one in (model, again):
        th.manual_seed(3)
        one.learn(28, reset_num_timesteps=False)
    assert th.equal(parameters(model), parameters(again))


@each_class
@pytest.mark.parametrize("other", ["lstm", Memory("gru", 8, backprop_steps=3), None])
def test_a_memory_that_is_set_after_construction_is_an_error(cls: Any, other: Any) -> None:
    model = make(cls)
    model.memory = other
    with pytest.raises(ValueError, match=r"memory must be that of the policy, .*hidden_size=8.*, got"):
        model.learn(64)
    model.memory = Memory("gru", 8)
    model.learn(64)


def test_a_memory_that_is_set_on_a_model_without_is_an_error() -> None:
    model = ActorCritic("MlpPolicy", "CartPole-v1", **SMALL)
    model.memory = "lstm"
    with pytest.raises(ValueError, match=r"memory must be that of the policy, None, got 'lstm'"):
        model.learn(64)
