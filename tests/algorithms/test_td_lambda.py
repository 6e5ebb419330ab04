"""ActorCritic with eligibility traces: what they have in common with TD(0), where they end, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure

from sb3_pg import NPG, TRPO, ActorCritic, KLAnchor, KLPenaltyPG, NonFiniteError, ResumeCallback
from sb3_pg.learner import Bootstrapped, CriticFit, GradientStep, Learner, MonteCarlo, TraceStep
from sb3_pg.policies import policy_actions
from sb3_pg.rollout import Collector, RolloutBatch
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    BatchNormExtractor,
    LinearExtractor,
    OwnForward,
    ScriptedEnv,
    parameters,
    policy_for,
    ready_to_collect,
    two_envs,
    vec,
)

Arguments = dict[str, Any]
TRACES: Arguments = {"n_steps": 1, "advantage": "td_lambda", "gae_lambda": 0.9}
#: Weights stay as they are, while gradients are computed.
FROZEN: Arguments = {
    "learning_rate": 0.0,
    "use_rms_prop": False,
    "max_grad_norm": None,
    "policy_kwargs": {"optimizer_class": th.optim.SGD, "net_arch": [5]},
}


def model_of(env: Any, **arguments: Any) -> ActorCritic:
    chosen: Arguments = {**TRACES, "device": "cpu", "seed": 0, **arguments}
    policy = chosen.pop("policy", "MlpPolicy")
    return ActorCritic(policy, env, **chosen)


def traces_of(model: Any) -> dict[str, th.Tensor]:
    held: dict[str, th.Tensor] = dict(model.learner_state.traces)
    return held


def same(one: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> bool:
    return one.keys() == other.keys() and all(th.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- lambda 0

ZERO: dict[str, Arguments] = {
    "defaults": {},
    "entropy": {"ent_coef": 0.1},
    "adam": {"use_rms_prop": False, "learning_rate": 0.01},
    "momentum and decay": {
        "use_rms_prop": False,
        "policy_kwargs": {
            "optimizer_class": th.optim.SGD,
            "optimizer_kwargs": {"momentum": 0.9, "weight_decay": 0.1},
        },
    },
    "clipped": {"max_grad_norm": 0.01},
    "not clipped": {"max_grad_norm": None},
    "critic's own optimizer": {"critic_learning_rate": 0.01},
    "warm-up": {"critic_warmup_updates": 9},
    "warm-up of the critic's own": {"critic_warmup_updates": 9, "critic_learning_rate": 0.01},
    "scaled": {"normalize_value_targets": True, "state_discount": True},
    "terminal": {"truncation": "terminal"},
    "anchor": {"anchor": KLAnchor(0.5)},
    "shared features": {"policy_kwargs": {"features_extractor_class": LinearExtractor}},
    "shared features, own optimizer": {
        "policy_kwargs": {"features_extractor_class": LinearExtractor},
        "critic_learning_rate": 0.01,
    },
    "batch norm": {"policy_kwargs": {"features_extractor_class": BatchNormExtractor}},
    "own forward": {"policy": OwnForward},
}


@pytest.mark.parametrize("name", ZERO)
def test_lambda_0_is_td(name: str) -> None:
    runs = [
        model_of(two_envs(), **{**ZERO[name], **form}).learn(60)
        for form in ({"advantage": "td", "gae_lambda": 1.0}, {"gae_lambda": 0.0}, {"gae_lambda": 0.9})
    ]
    td, zero, much = (parameters(model) for model in runs)
    assert th.allclose(td, zero, atol=1e-6)
    assert not th.allclose(td, much, atol=1e-4)


def test_one_env_too() -> None:
    td, zero = (
        model_of(vec(ScriptedEnv((3, 5), (False, True))), **form).learn(40)
        for form in ({"advantage": "td", "gae_lambda": 1.0}, {"gae_lambda": 0.0})
    )
    assert th.allclose(parameters(td), parameters(zero), atol=1e-6)


# ---------------------------------------------------------------- traces


class Kept(BaseCallback):
    """Keeps each update's batch, the traces before it, and those after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[RolloutBatch] = []
        self.traces: list[Any] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, ActorCritic)
        assert self.model.rollout_batch is not None
        self.batches.append(self.model.rollout_batch)
        self.traces.append(self.model.learner_state.traces)


def gradients_at(model: Any, batch: RolloutBatch, env: int) -> tuple[th.Tensor, th.Tensor]:
    """grad log pi(a_t|s_t) and grad V(s_t) of one env's step, by ``evaluate_actions`` of it alone."""
    observations: Any = batch.observations
    one = {key: x[0, env : env + 1] for key, x in observations.items()} if isinstance(observations, dict) else None
    obs = observations[0, env : env + 1] if one is None else one
    actions = policy_actions(batch.actions[0, env : env + 1], model.action_space)
    values, log_prob, _ = model.policy.evaluate_actions(obs, actions)
    actor, critic = model.learner.parameters

    def gradient(x: th.Tensor, of: dict[str, th.nn.Parameter]) -> th.Tensor:
        parts = th.autograd.grad(x.sum(), list(of.values()), retain_graph=True, materialize_grads=True)
        return th.cat([part.flatten() for part in parts])

    return gradient(log_prob, actor), gradient(values, critic)


def require_traces(model: Any, n_steps: int) -> Kept:
    """Require that traces are what a loop over steps and envs adds up, with constant weights."""
    kept = Kept()
    model.learn(n_steps * model.n_envs, kept)
    expected: list[Any] = [None] * model.n_envs
    for batch, traces in zip(kept.batches, [*kept.traces[1:], model.learner_state.traces], strict=True):
        for env in range(model.n_envs):
            if batch.valid[0, env]:
                z = gradients_at(model, batch, env)
                if expected[env] is not None:
                    z = tuple(
                        model.gamma * model.gae_lambda * old + new for old, new in zip(expected[env], z, strict=True)
                    )
                for name, one in zip(("actor", "critic"), z, strict=True):
                    assert th.allclose(traces[name][env], one, rtol=1e-4, atol=1e-5), (name, env)
                expected[env] = None if batch.ends[0, env] else z
    return kept


@pytest.mark.parametrize("actions", ACTION_SPACES)
@pytest.mark.parametrize("observations", ["vector", "dict", "multi_discrete"])
def test_in_all_spaces(actions: str, observations: str) -> None:
    env = two_envs(ACTION_SPACES[actions], OBSERVATION_SPACES[observations])
    model = model_of(env, policy=policy_for(env.observation_space), gamma=0.95, **FROZEN)
    kept = require_traces(model, 20)
    assert sum(int(batch.truncated.sum()) for batch in kept.batches) > 1
    assert sum(int(batch.terminated.sum()) for batch in kept.batches) > 1


def test_of_images_with_shared_features() -> None:
    env = two_envs(ACTION_SPACES["discrete"], OBSERVATION_SPACES["image"])
    require_traces(model_of(env, policy="CnnPolicy", **FROZEN), 8)


def test_of_generalized_exploration() -> None:
    require_traces(model_of(two_envs(ACTION_SPACES["box"]), use_sde=True, **FROZEN), 12)


class OnlySome(ScriptedEnv):
    """Allows two of three actions."""

    def action_masks(self) -> np.ndarray:
        masks: np.ndarray = np.array([True, self.t % 2 == 0, self.t % 2 == 1])
        return masks


def test_with_action_masks() -> None:
    model = model_of(vec(OnlySome((3, 5)), OnlySome((4,))), **FROZEN)
    assert model.uses_masks
    require_traces(model, 12)


class Reads(th.autograd.Function):
    """An operation whose backward reads numbers, which vmap does not support."""

    @staticmethod
    def forward(_ctx: Any, x: th.Tensor) -> th.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *gradients: th.Tensor) -> Any:
        return gradients[0] * float(gradients[0].isfinite().all())


class AwkwardExtractor(LinearExtractor):
    def forward(self, x: th.Tensor) -> Any:
        return Reads.apply(super().forward(x))  # type: ignore[no-untyped-call]


def test_of_a_policy_that_vmap_does_not_support() -> None:
    given = FROZEN["policy_kwargs"] | {"features_extractor_class": AwkwardExtractor}
    require_traces(model_of(two_envs(), **{**FROZEN, "policy_kwargs": given}), 12)


def test_of_an_env_that_resets_in_the_next_step() -> None:
    """The step that only resets an env is no step of its traces; the other env's go on."""
    makers = [lambda: ScriptedEnv((3, 2), (False, True)), lambda: ScriptedEnv((5, 4), (True, False))]
    env = VectorWrapper(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP))
    kept = require_traces(model_of(env, **FROZEN), 20)
    assert sum(not bool(batch.valid.all()) for batch in kept.batches) > 3
    assert any(bool(batch.valid.all()) for batch in kept.batches)


def test_the_discount_of_the_state_is_a_factor_of_the_score() -> None:
    model, kept = model_of(vec(ScriptedEnv((6,))), state_discount=True, gamma=0.5, **FROZEN), Kept()
    model.learn(3, kept)
    scores = [gradients_at(model, batch, 0)[0] for batch in kept.batches]
    z = sum(0.45 ** (2 - t) * 0.5**t * score for t, score in enumerate(scores))
    assert th.allclose(traces_of(model)["actor"][0], z, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def test_two_envs_are_the_mean_of_two_single_ones() -> None:
    """With constant weights, for all gradients that the optimizer is given."""
    given: dict[int, list[th.Tensor]] = {}

    def lengths() -> list[ScriptedEnv]:
        space = spaces.Box(0, 0, (3,), np.float32)  # all see, and do, the same
        return [
            ScriptedEnv((3, 4), (False, True), float(i), space, spaces.Discrete(1))
            if i
            else ScriptedEnv((5,), (False,), -2.0, space, spaces.Discrete(1))
            for i in range(2)
        ]

    for n, envs in enumerate([lengths(), lengths()[:1], lengths()[1:]]):
        model = model_of(vec(*envs), **FROZEN)
        seen = given[n] = []
        optimizer, step = model.policy.optimizer, model.policy.optimizer.step

        def kept(*args: Any, step: Any = step, model: Any = model, seen: Any = seen) -> Any:
            seen.append(th.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None]))
            return step(*args)

        optimizer.step = kept  # type: ignore[method-assign, assignment]
        model.learn(15 * len(envs))
    assert len(given[0]) == len(given[1]) == len(given[2]) == 15
    for both, one, other in zip(*given.values(), strict=True):
        assert th.allclose(both, (one + other) / 2, rtol=1e-4, atol=1e-5)
    assert not th.allclose(given[1][4], given[2][4], atol=0.1)


# ---------------------------------------------------------------- where they end, and what they outlast


def test_they_go_on_in_another_call_of_learn() -> None:
    whole = model_of(vec(ScriptedEnv((7, 9)))).learn(20)
    parts = model_of(vec(ScriptedEnv((7, 9)))).learn(5)
    for _ in range(5):
        parts.learn(3, reset_num_timesteps=False)
    assert th.equal(parameters(whole), parameters(parts))
    assert same(traces_of(whole), traces_of(parts))


def test_a_reset_of_the_env_ends_them() -> None:
    model, kept = model_of(vec(ScriptedEnv((9,))), **FROZEN).learn(5), Kept()
    assert float(traces_of(model)["decay"]) > 0
    model.learn(1, kept)
    for name, gradient in zip(("actor", "critic"), gradients_at(model, kept.batches[0], 0), strict=True):
        assert th.allclose(traces_of(model)[name][0], gradient, atol=1e-6)


class Poisoned(BaseCallback):
    """Makes the advantages of one update not finite."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps == self.at:
            self.model.rollout_buffer.advantages[:] = np.nan  # type: ignore[attr-defined]


def test_a_failed_update_leaves_them() -> None:
    model = model_of(vec(ScriptedEnv((9,)))).learn(4)
    traces = model.learner_state.traces
    with pytest.raises(NonFiniteError, match="advantage"):
        model.learn(2, Poisoned(5), reset_num_timesteps=False)
    assert model.learner_state.traces is traces


def test_after_a_skipped_update_they_begin_anew() -> None:
    """There is a gap: the skipped step's gradient is missing."""
    model, kept = model_of(vec(ScriptedEnv((9,))), on_nonfinite="skip", **FROZEN).learn(4), Kept()
    traces = model.learner_state.traces
    with pytest.warns(UserWarning, match="Update skipped"):
        model.learn(1, Poisoned(5), reset_num_timesteps=False)
    assert model.learner_state.traces is traces
    model.learn(1, kept, reset_num_timesteps=False)
    actor, _ = gradients_at(model, kept.batches[0], 0)
    assert th.allclose(traces_of(model)["actor"][0], actor, atol=1e-6)


def test_an_interrupted_update_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(vec(ScriptedEnv((9,)))).learn(4)
    traces, before = model.learner_state.traces, parameters(model)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.policy.optimizer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.learn(2, reset_num_timesteps=False)
    assert model.learner_state.traces is traces
    assert th.equal(parameters(model), before)


def test_frozen_parameters_have_none() -> None:
    model = model_of(vec(ScriptedEnv((9,)))).learn(3)
    n, bias = traces_of(model)["actor"].shape[1], model.policy.action_net.bias
    assert isinstance(bias, th.Tensor)
    bias.requires_grad_(False)
    before = bias.detach().clone()
    model.learn(3, reset_num_timesteps=False)  # those of other parameters begin anew
    assert traces_of(model)["actor"].shape[1] == n - bias.numel()
    assert th.equal(bias, before)


def test_they_are_saved(tmp_path: Path) -> None:
    model = model_of(two_envs()).learn(10)
    model.save(tmp_path / "model")
    loaded = ActorCritic.load(tmp_path / "model", two_envs(), device="cpu")
    assert same(traces_of(loaded), traces_of(model))
    assert loaded.learn(20).learner_state.traces is not None
    state = model.learner_state.state_dict()
    th.save(state, tmp_path / "state")
    fresh = model_of(two_envs()).learner_state
    assert fresh.state_dict()["traces"] is None
    fresh.load_state_dict(th.load(tmp_path / "state", weights_only=True))
    assert fresh.traces is not None
    assert same(fresh.traces, traces_of(model))


def test_a_state_from_before_there_were_traces_loads(tmp_path: Path) -> None:
    model = model_of(two_envs(), advantage="td", gae_lambda=1.0).learn(4)
    old = model.learner_state.state_dict()
    del old["traces"]
    model.learner_state.load_state_dict(old)
    assert model.learner_state.traces is None
    wrong = model_of(two_envs()).learn(4).learner_state.state_dict()
    wrong["traces"] = {"actor": th.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"state\['traces'\] must have the keys .*missing"):
        model.learner_state.load_state_dict(wrong)
    del vars(model.learner_state)["traces"]  # as in such a zip
    model.save(tmp_path / "model")
    loaded = ActorCritic.load(tmp_path / "model", two_envs(), device="cpu")
    assert "traces" not in vars(loaded.learner_state)
    loaded.advantage, loaded.gae_lambda = "td_lambda", 0.9
    assert traces_of(loaded.learn(10))["actor"].abs().max() > 0


class CrashError(Exception):
    pass


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """The checkpoint is within an episode, whose traces go on."""

    def make() -> ActorCritic:
        return model_of(make_vec_env("CartPole-v1", 2, seed=3))

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps >= 150:
                raise CrashError
            return True

    whole = make().learn(240, ResumeCallback(tmp_path / "whole", every=50))
    with pytest.raises(CrashError):
        make().learn(240, [Stop(), ResumeCallback(tmp_path / "cut", every=50)])
    again = ActorCritic.resume(tmp_path / "cut", make_vec_env("CartPole-v1", 2, seed=3), device="cpu")
    assert again.num_timesteps == 100
    assert traces_of(again)["decay"].max() > 0
    again.learn(240, ResumeCallback(tmp_path / "cut", every=50))
    assert th.equal(parameters(again), parameters(whole))
    assert same(traces_of(again), traces_of(whole))


# ---------------------------------------------------------------- learning


def test_it_learns() -> None:
    """It reaches 500 on this seed; ``advantage="td"`` stays below 60 in as many steps."""
    model = model_of(make_vec_env("CartPole-v1", 8, seed=0), learning_rate=2e-3).learn(14_000)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=1), 16, warn=False)
    assert float(mean) >= 150  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[Arguments, str]] = {
    "n_steps": ({"n_steps": 5}, r"^n_steps must be 1 with advantage='td_lambda'.* got 5.*gae"),
    "episodes": ({"n_steps": None}, r"^n_steps must be 1 .*got None"),
    "memory": ({"memory": "gru"}, r"^memory must be None with advantage='td_lambda', got .*gru"),
    "target": ({"critic_target": "lambda"}, r"^critic_target must be None .*got 'lambda'"),
    "normalized": ({"normalize_advantage": True}, r"^normalize_advantage must be False .*got True"),
    "again": ({"recompute_advantage": True}, r"^recompute_advantage must be False .*got True"),
    "before": ({"critic_fit": "before"}, r"^critic_fit must be 'after' .*got 'before'"),
    "passes": ({"n_critic_updates": 2}, r"^n_critic_updates must be 1 .*got 2"),
    "batches": ({"critic_batch_size": 1, "critic_learning_rate": 0.1}, r"^critic_batch_size must be None .*got 1"),
    "buffer": ({"rollout_buffer_class": RolloutBuffer}, r"^rollout_buffer_class=.*got advantage='td_lambda'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_traces_are_not_defined_for(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        model_of(two_envs(), **given)


@pytest.mark.parametrize("cls", [NPG, TRPO, KLPenaltyPG])
def test_other_classes(cls: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^advantage='td_lambda' is for ActorCritic.*: {cls.__name__} takes one of 'gae'"
    ):
        cls("MlpPolicy", two_envs(), n_steps=1, batch_size=2, advantage="td_lambda")


def test_gae_lambda_has_an_effect_and_td_steps_has_none(recwarn: pytest.WarningsRecorder) -> None:
    model_of(two_envs())
    assert not recwarn
    with pytest.warns(UserWarning, match=r"^td_steps=3 has no effect with advantage='td_lambda'"):
        model_of(two_envs(), td_steps=3)


def test_another_number_of_steps_in_a_rollout() -> None:
    model = model_of(two_envs())
    callback = ready_to_collect(model)
    with pytest.raises(ValueError, match=r"^n_rollout_steps must be 1 .*got 3"):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 3)  # type: ignore[arg-type]


def test_a_buffer_filled_by_hand() -> None:
    model = model_of(vec(ScriptedEnv()))
    model.set_logger(configure(None, []))
    buffer, one = model.rollout_buffer, th.zeros(1)
    buffer.add(np.zeros((1, 3)), np.zeros((1, 1)), np.zeros(1), np.ones(1), one, one)
    buffer.compute_returns_and_advantage(one, np.zeros(1))
    before = parameters(model)
    with pytest.raises(ValueError, match=r"advantage='td_lambda' takes steps that follow each other"):
        model.train()
    assert th.equal(parameters(model), before)


def test_a_step_that_is_given_what_it_cannot_take() -> None:
    """Where no arguments were checked: attributes that were set later, and learners without algorithm."""
    model = model_of(two_envs(), n_steps=4, advantage="td", gae_lambda=1.0)
    model.advantage = "td_lambda"
    before = parameters(model)
    with pytest.raises(ValueError, match=r"TraceStep takes batches of one step of each env.* got 4"):
        model.learn(8)
    assert th.equal(parameters(model), before)
    policy: Any = model.policy
    batch = Collector(policy, two_envs()).collect(n_steps=1)
    assert batch is not None
    cases: list[tuple[Callable[[], Learner], str]] = [
        (lambda: Learner(policy, Bootstrapped(advantage="td"), TraceStep(), normalize_advantage=True), "TD residuals"),
        (lambda: Learner(policy, Bootstrapped(), TraceStep(), CriticFit(True, None, 2)), "n_passes=2"),
        (lambda: Learner(policy, Bootstrapped(), TraceStep(), CriticFit(True, before_actor=True)), "before_actor=True"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make().update(batch)
    with pytest.raises(NotImplementedError, match="MonteCarlo has no eligibility traces"):
        Learner(policy, MonteCarlo(), TraceStep()).update(batch)
    assert th.equal(parameters(model), before)
    assert isinstance(model_of(two_envs(), advantage="td", gae_lambda=1.0).make_step(), GradientStep)


def test_the_average_reward_goes_on_after_terminations() -> None:
    """A terminated episode's traces go on in the state of the reset. Those of a truncated one end."""
    env = vec(ScriptedEnv((3,)), ScriptedEnv((3,), (True,)))
    average: Arguments = {"objective": "average", "average_reward_step_size": 0.1, **FROZEN}
    model = model_of(env, gae_lambda=0.5, **average)
    model.learn(6)
    before = traces_of(model)
    assert before["decay"].tolist() == [0.5, 0.0]
    model.learn(2, reset_num_timesteps=False)
    after, batch = traces_of(model), model.rollout_batch
    assert batch is not None
    values = model.policy.predict_values(batch.flat_observations).flatten()
    critic = [p for p in model.learner.parameters.critic.values() if p.requires_grad]
    for i, kept in enumerate((0.5, 0.0)):
        gradients = th.autograd.grad(values[i], critic, retain_graph=True, materialize_grads=True)
        own = th.cat([gradient.flatten() for gradient in gradients])
        assert th.allclose(after["critic"][i], kept * before["critic"][i] + own, atol=1e-6)
    assert model.learner_state.average_reward is not None
