"""``pretrain`` of every class with an actor: what it learns, what it leaves alone, and what it reports."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import (
    NPG,
    TRPO,
    ActorCritic,
    DemonstrationLoss,
    Demonstrations,
    KLPenaltyPG,
    Memory,
    NonFiniteError,
    OffPAC,
    OffPolicyPG,
    PretrainReport,
    Reinforce,
    ResumeCallback,
)
from sb3_pg.algorithms import pretraining
from sb3_pg.demonstrations.critic_fit import ReturnTargets
from sb3_pg.envs import make_vec_env as make_vec_env_of
from tests.algorithms.every_algorithm import CLASSES, FEW_STEPS
from tests.demonstrations.demos import Masked, cart_poles, demos_in, masked_demos
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    BatchNormExtractor,
    Interrupts,
    parameters,
    policy_for,
    the_others_slow,
    two_envs,
    vec,
)

pytestmark = [pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"), pytest.mark.usefixtures("one_thread")]
SMALL: dict[str, Any] = {"device": "cpu", "seed": 0}
ALL = (*CLASSES, OffPolicyPG, OffPAC)
each_class = pytest.mark.parametrize("cls", ALL)


def make(cls: Any, env: Any = "CartPole-v1", policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    policy_kwargs = {"net_arch": [16], **kwargs.pop("policy_kwargs", {})}
    if policy == "CnnPolicy":
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    if "memory" in kwargs:
        policy_kwargs.pop("net_arch")
    return cls(policy, env, **{**FEW_STEPS[cls], **SMALL, "policy_kwargs": policy_kwargs, **kwargs})


def leaning(n: int = 200, rewards: bool = True) -> Any:
    """Push to where the pole leans to: 1 where its angle is positive. Episodes of 10 steps, half of them truncated."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-0.4, 0.4, size=(n, 4)).astype(np.float32)
    ends, even = np.arange(n) % 10 == 9, np.arange(n) // 10 % 2 == 0
    numbers = rng.normal(size=n) if rewards else None
    return Demonstrations(observations, (observations[:, 2] > 0).astype(int), numbers, ends & even, ends & ~even)


def copied(tensors: Any) -> list[th.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def equal(first: Any, second: Any) -> bool:
    return all(th.equal(one, other) for one, other in zip(first, second, strict=True))


def critics_own(model: Any) -> list[th.Tensor]:
    if isinstance(model, OffPAC):
        return copied([*model.policy.critic.parameters(), *model.policy.critic_target.parameters()])
    return copied(model.learner.critic_only.values())


# ---------------------------------------------------------------- what is learned


@each_class
def test_every_class_learns_what_was_shown(cls: Any) -> None:
    demos, model = leaning(), make(cls)
    before = critics_own(model)
    report = model.pretrain(demos, n_epochs=40, validation=0.1, learning_rate=0.01, critic=False)
    taken = model.predict(demos.observations, deterministic=True)[0]
    learned, held_out = demos.held_out_steps(0.1, None)
    assert (report.n_steps, report.n_held_out) == (len(learned), len(held_out)) == (180, 20)
    assert (taken == demos.actions).mean() > 0.9
    assert report.accuracy > 0.8
    assert report.losses[-1] < 0.3 < report.losses[0]
    assert (report.mean_absolute_error, report.critic_losses, report.explained_variance) == (None, [], None)
    assert equal(critics_own(model), before)
    assert model.num_timesteps == model._n_updates == 0
    optimizer = model.policy.actor.optimizer if cls is OffPAC else model.policy.optimizer
    assert not optimizer.state
    model.learn(64)


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_the_report_says_what_the_policy_does(validation: float) -> None:
    """Its numbers once more, by the policy's own methods, on the steps that it says they are of."""
    demos, model = leaning(), make(ActorCritic)
    report = model.pretrain(demos, n_epochs=15, validation=validation, critic=False, seed=3)
    rows = demos.held_out_steps(validation, 3)[1] if validation else np.arange(200)
    assert report.n_held_out == (50 if validation else 0)
    assert report.n_steps == 200 - report.n_held_out
    assert (report.n_epochs, len(report.held_out_losses)) == (15, 15 if validation else 0)
    observations, actions = demos.observations[rows], demos.actions[rows]
    with th.no_grad():
        log_prob = model.policy.evaluate_actions(th.as_tensor(observations), th.as_tensor(actions))[1]
    if validation:
        assert report.held_out_losses[report.best_epoch - 1] == pytest.approx(-log_prob.mean().item(), rel=1e-5)
        assert report.held_out_losses[report.best_epoch - 1] == min(report.held_out_losses)
    assert report.accuracy == pytest.approx((model.predict(observations, deterministic=True)[0] == actions).mean())
    text = str(report)
    assert text.startswith(f"Cloned {report.n_steps} steps, {report.n_held_out} held out.\n-log pi in nats: ")
    assert f"in epoch {report.best_epoch} of 15" in text
    assert "equal actions: " in text
    assert ("on held-out steps" if validation else "on these steps") in text


SPACES = [*(("vector", name) for name in ACTION_SPACES), *((name, "discrete") for name in OBSERVATION_SPACES)]


CASES = [(cls, *pair) for cls in (ActorCritic, OffPAC) for pair in dict.fromkeys(SPACES)]
OFTEN = [*(case for case in CASES if case[0] is ActorCritic and case[2] != "matrix"), (OffPAC, "vector", "box")]


@pytest.mark.parametrize(("cls", "observations", "actions"), the_others_slow(CASES, OFTEN))
def test_every_space(cls: Any, observations: str, actions: str) -> None:
    """Always the same action: the most probable one comes near."""
    seen, taken = OBSERVATION_SPACES[observations], ACTION_SPACES[actions]
    demos = demos_in(seen, taken, rewards=np.ones(12))
    demos.actions[:] = demos.actions[0] * (0.9 if actions in ("box", "matrix") else 1)
    model = make(cls, two_envs(taken, seen), policy_for(seen))
    rate = 0.005 if cls is OffPAC else 0.02
    report = model.pretrain(demos, n_epochs=60, learning_rate=rate, patience=None, batch_size=4, validation=0.0)
    rows = {k: v[:12] for k, v in demos.observations.items()} if observations == "dict" else demos.observations
    found = model.predict(rows, deterministic=True)[0]
    if isinstance(taken, spaces.Box):
        error = np.abs(found - demos.actions).mean()
        assert error < 0.3
        assert report.mean_absolute_error == pytest.approx(error, rel=1e-3)
        assert report.accuracy is None
    else:
        assert report.accuracy == pytest.approx((found == demos.actions).mean())
        assert report.accuracy > 0.9
    assert len(report.critic_losses) == 60
    assert parameters(model).isfinite().all()
    model.learn(24)


def test_actions_that_count_from_another_number() -> None:
    taken = spaces.Discrete(3, start=5)
    demos = demos_in(OBSERVATION_SPACES["vector"], taken)
    demos.actions[:] = 6
    model = make(ActorCritic, two_envs(taken))
    report = model.pretrain(demos, n_epochs=40, learning_rate=0.02, validation=0)
    assert report.accuracy == 1.0
    assert (model.predict(demos.observations, deterministic=True)[0] == 6).all()


BOUNDS = np.array([0, -3], np.float32), np.array([2, 1], np.float32)


@pytest.mark.parametrize("cls", [ActorCritic, TRPO])
@pytest.mark.parametrize("squashed", [False, True])
def test_gsde(cls: Any, squashed: bool) -> None:
    taken = spaces.Box(*BOUNDS, dtype=np.float32)
    demos = demos_in(OBSERVATION_SPACES["vector"], taken)
    demos.actions[:] = [1.5, -2.5]
    kwargs: dict[str, Any] = {"use_sde": True, "policy_kwargs": {"squash_output": squashed}}
    model = make(cls, two_envs(taken), **kwargs)
    report = model.pretrain(demos, n_epochs=150, learning_rate=0.02, validation=0, min_std=0.3)
    found = model.predict(demos.observations, deterministic=True)[0]
    assert report.mean_absolute_error == pytest.approx(np.abs(found - demos.actions).mean(), rel=1e-4)
    assert np.abs(found - demos.actions).mean() < 0.2
    with th.no_grad():
        std = model.policy.get_distribution(th.as_tensor(demos.observations)).distribution.stddev
    floor = 0.3 if squashed else 0.3 * th.tensor([1.0, 2.0])
    rms = std.square().mean(0).sqrt()
    assert (rms > floor * 0.999).all()
    assert (rms < floor * 1.2).all()
    model.learn(24)


# ---------------------------------------------------------------- the standard deviation


@pytest.mark.parametrize(("min_std", "expected"), [(0.1, 0.1 * np.array([1.0, 2.0])), (0.0, 0.0)])
def test_the_standard_deviation_has_a_floor(min_std: float, expected: Any) -> None:
    """A share of half the width of the action's range, which an expert that never errs would go below."""
    demos = demos_in(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"])
    demos.actions[:] = [0.1, -0.1]
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [], "log_std_init": -1.0}}
    model = make(ActorCritic, two_envs(ACTION_SPACES["box"]), **kwargs)
    model.pretrain(demos, n_epochs=150, learning_rate=0.01, validation=0, min_std=min_std)
    std = model.policy.log_std.detach().exp().numpy()
    assert np.allclose(std, expected, rtol=1e-5) if min_std else (std < [0.1, 0.2]).all()


def test_a_frozen_standard_deviation_stays() -> None:
    demos = demos_in(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"])
    model = make(ActorCritic, two_envs(ACTION_SPACES["box"]), policy_kwargs={"log_std_init": -6.0})
    model.policy.log_std.requires_grad_(False)
    model.pretrain(demos, n_epochs=2, validation=0)
    assert (model.policy.log_std == -6.0).all()


def test_the_floor_of_a_standard_deviation_that_depends_on_the_state() -> None:
    """The root mean square over the demonstrated states; the squashed action's before the squashing."""
    demos = demos_in(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"])
    demos.actions[:] = [0.5, -1.0]
    model = make(OffPAC, two_envs(ACTION_SPACES["box"]))
    model.pretrain(demos, n_epochs=200, learning_rate=0.005, validation=0, min_std=0.4)
    with th.no_grad():
        std = model.policy.actor.distribution(th.as_tensor(demos.observations)).distribution.stddev
    assert (std.square().mean(0).sqrt() > 0.3999).all()
    assert (std.min(0).values < 0.4).any()


# ---------------------------------------------------------------- when to stop


def noise(n: int = 40) -> Any:
    """Nothing that could be learned: the epochs only make the held-out actions less likely."""
    rng = np.random.default_rng(1)
    observations = rng.uniform(-0.4, 0.4, size=(n, 4)).astype(np.float32)
    return Demonstrations(observations, rng.integers(2, size=n), terminated=np.arange(n) % 4 == 3)


def test_it_stops_early_and_keeps_the_best() -> None:
    demos, kwargs = noise(), {"batch_size": 8, "learning_rate": 0.03, "validation": 0.3, "seed": 0}
    model = make(ActorCritic)
    report = model.pretrain(demos, n_epochs=300, patience=7, **kwargs)
    assert report.n_epochs == report.best_epoch + 7 < 300
    assert report.losses[-1] < report.losses[0]
    rows = demos.held_out_steps(0.3, 0)[1]
    with th.no_grad():
        seen, taken = th.as_tensor(demos.observations[rows]), th.as_tensor(demos.actions[rows])
        log_prob = model.policy.evaluate_actions(seen, taken)[1]
    if report.best_epoch:
        assert -log_prob.mean().item() == pytest.approx(min(report.held_out_losses), rel=1e-5)
    assert -log_prob.mean().item() < report.held_out_losses[-1] - 0.01


@pytest.mark.parametrize(
    ("rate", "followed"),
    [("lin_0.1", [0.1, 0.075, 0.05, 0.025]), (0.2, [0.2] * 4), (lambda p: p / 8, [1 / 8, 3 / 32, 1 / 16, 1 / 32])],
)
def test_the_learning_rate_follows_its_schedule(rate: Any, followed: list[float]) -> None:
    """It falls over the epochs; a standard deviation takes ten times the size."""
    seen: list[tuple[float, ...]] = []
    step = th.optim.Adam.step

    def record(self: th.optim.Adam, closure: Any = None) -> Any:
        seen.append(tuple(group["lr"] for group in self.param_groups))
        return step(self, closure)

    model = make(ActorCritic, two_envs(action_space=ACTION_SPACES["box"]))
    observations = np.zeros((8, 3), np.float32)
    demos = Demonstrations(observations, np.zeros((8, 2), np.float32), np.ones(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th.optim.Adam, "step", record)
        model.pretrain(demos, n_epochs=4, batch_size=8, learning_rate=rate, critic=False)
    assert seen == [pytest.approx((lr, 10 * lr)) for lr in followed]


def test_parameters_from_before_are_kept_if_nothing_was_better() -> None:
    demos, first = leaning(rewards=False), make(ActorCritic)
    first.pretrain(demos, n_epochs=60, learning_rate=0.01)
    before = parameters(first)
    report = first.pretrain(demos, n_epochs=4, validation=0.1, learning_rate=0.5, patience=None)
    assert report.best_epoch == 0
    assert th.equal(parameters(first), before)
    assert "not better than before in 4 epochs, and kept from before" in str(report)


def test_a_single_episode_holds_out_steps_of_its_own() -> None:
    observations = leaning().observations
    demos = Demonstrations(observations, (observations[:, 2] > 0).astype(int))
    report = make(ActorCritic).pretrain(demos, n_epochs=3, validation=0.2)
    assert (report.n_steps, report.n_held_out) == (160, 40)
    one = Demonstrations(np.zeros((1, 4), np.float32), [1])
    assert make(ActorCritic).pretrain(one, n_epochs=2, validation=0.5).n_held_out == 0


def test_the_seed_decides_everything() -> None:
    demos = leaning()
    found = []
    for seed in (1, 1, 2, None, None):
        model = make(ActorCritic, seed=0)
        report = model.pretrain(demos, n_epochs=3, seed=seed)
        found.append((parameters(model), report))
    assert th.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not th.equal(found[0][0], found[2][0])
    assert th.equal(found[3][0], found[4][0])
    state = th.get_rng_state()
    model.pretrain(demos, n_epochs=1, seed=0)
    assert th.equal(th.get_rng_state(), state)


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    make(ActorCritic).pretrain(leaning(), n_epochs=3)
    assert not capsys.readouterr().err
    make(ActorCritic).pretrain(leaning(), n_epochs=3, progress_bar=True)
    assert "6/6" in capsys.readouterr().err


# ---------------------------------------------------------------- masks, memory


@each_class
def test_action_masks(cls: Any) -> None:
    env = vec(*(Masked((3, 5)) for _ in range(2)))
    model = make(cls, env)
    before = parameters(model)
    with pytest.raises(ValueError, match=r"actions must be allowed by the action_mask of their step, got 2 at step 5"):
        model.pretrain(masked_demos(forbidden=True))
    assert th.equal(parameters(model), before)
    demos: Any = masked_demos(forbidden=False)
    demos.actions[:] = 1
    for given in (demos, Demonstrations(demos.observations["observation"], demos.actions)):
        model = make(cls, env)
        report = model.pretrain(given, n_epochs=60, learning_rate=0.02, validation=0)
        masks = np.array([[1, 1, 0]])
        taken = model.predict(demos.observations["observation"], deterministic=True, action_masks=masks.repeat(12, 0))
        assert report.accuracy == 1.0
        assert (taken[0] == 1).all()
    model.learn(64)


def test_masks_that_are_allowed_make_actions_likelier() -> None:
    """-log pi of two actions that are equally likely is log 2 with masks, and log 3 without."""
    env = vec(*(Masked((3, 5)) for _ in range(2)))
    demos: Any = masked_demos(forbidden=False)
    losses = []
    for given in (demos, Demonstrations(demos.observations["observation"], demos.actions)):
        model = make(ActorCritic, env)
        for parameter in model.policy.action_net.parameters():
            parameter.data.zero_()
        losses.append(model.pretrain(given, n_epochs=1, batch_size=12, validation=0).losses[0])
    assert losses == pytest.approx([np.log(2), np.log(3)], abs=1e-5)


MEMORIES = [(cls, kind) for cls in (ActorCritic, TRPO, OffPolicyPG) for kind in ("lstm", "gru")]


@pytest.mark.parametrize(("cls", "kind"), the_others_slow(MEMORIES, [(ActorCritic, "lstm"), (TRPO, "gru")]))
def test_memory(cls: Any, kind: Any) -> None:
    """The action is the sign of the first observation of the episode."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, size=(160, 3)).astype(np.float32)
    first = observations[::4, 0] > 0
    ends = np.arange(160) % 4 == 3
    demos = Demonstrations(observations, first.repeat(4).astype(int), rng.normal(size=160), ends)
    model = make(cls, two_envs(), memory=Memory(kind, 16))
    report = model.pretrain(demos, n_epochs=25, batch_size=16, validation=0.1, learning_rate=0.03, seed=0)
    assert (report.n_steps, report.n_held_out) == (144, 16)
    right = []
    for episode in demos.episodes:
        state, start = None, np.ones(1, bool)
        for t in range(episode.start, episode.stop):
            action, state = model.predict(observations[t : t + 1], state, start, deterministic=True)
            right.append(action[0] == demos.actions[t])
            start = np.zeros(1, bool)
    assert np.mean(right) > 0.9
    held_out = demos.held_out_steps(0.1, 0)[1]
    assert report.accuracy == pytest.approx(np.array(right)[held_out].mean())
    assert len(report.critic_losses) > 1
    model.learn(24)


# ---------------------------------------------------------------- VecNormalize


def test_statistics_are_those_of_the_demonstrations() -> None:
    """As if the wrapper had seen these steps in one env."""
    demos: Any = leaning()
    env: Any = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0), gamma=0.9)
    observed, earned, now = copy.deepcopy((env.obs_rms, env.ret_rms, env.returns))
    model = make(ActorCritic, env)
    model.pretrain(demos, n_epochs=30, learning_rate=0.01, freeze_normalization=False)
    observed.update(demos.observations)
    returns, total = [], 0.0
    for t, reward in enumerate(demos.rewards):
        total = 0.9 * (0.0 if t % 10 == 0 else total) + reward
        returns.append(total)
    earned.update(np.array(returns))
    for found, expected in ((env.obs_rms, observed), (env.ret_rms, earned)):
        assert np.allclose(found.mean, expected.mean)
        assert np.allclose(found.var, expected.var)
        assert found.count == pytest.approx(expected.count)
    assert np.array_equal(env.returns, now)
    taken = model.predict(env.normalize_obs(demos.observations), deterministic=True)[0]
    assert (taken == demos.actions).mean() > 0.95


@pytest.mark.parametrize("backend", ["dummy", "actors"])
@pytest.mark.parametrize("freeze", [True, False])
def test_statistics_of_observations_stay_while_it_learns_on(freeze: bool, backend: str) -> None:
    """The cloned policy gets the same inputs in the same states as before. Rewards are scaled anew."""
    serial: dict[str, Any] = {"backend_kwargs": {"transport": "serial"}, "n_actors": 2} if backend == "actors" else {}
    env: Any = VecNormalize(make_vec_env_of("CartPole-v1", 4, backend, 0, **serial))
    model = make(ActorCritic, env)
    model.pretrain(leaning(), n_epochs=2, freeze_normalization=freeze)
    observed, earned = copy.deepcopy((env.obs_rms, env.ret_rms))
    model.learn(600)
    is_kept = np.allclose(env.obs_rms.mean, observed.mean, rtol=0, atol=1e-8)
    is_kept &= np.allclose(env.obs_rms.var, observed.var, rtol=1e-8)
    assert is_kept == freeze
    assert env.ret_rms.count >= earned.count + 600


def test_a_number_that_never_changes_keeps_its_scale() -> None:
    given = leaning()
    rows = np.array(given.observations)
    rows[:, 1] = 0.5
    env: Any = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    make(ActorCritic, env).pretrain(Demonstrations(rows, given.actions, given.rewards), n_epochs=2)
    assert env.obs_rms.var[1] == 1.0
    assert np.allclose(env.obs_rms.var[[0, 2, 3]], rows.var(0)[[0, 2, 3]], rtol=0.05)


def vec_normalize() -> Any:
    return VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))


def test_what_the_statistics_have_learned_stays_learned() -> None:
    """A number that is the same in these demonstrations need not have been before."""
    given, env = leaning(), vec_normalize()
    model = make(ActorCritic, env).learn(300)
    before = env.obs_rms.var[1]
    rows = np.array(given.observations)
    rows[:, 1] = env.obs_rms.mean[1]
    model.pretrain(Demonstrations(rows, given.actions, given.rewards), n_epochs=2)
    assert 0.3 * before < env.obs_rms.var[1] < before
    frozen = env.obs_rms.mean.copy(), env.obs_rms.var.copy()
    model.pretrain(given, n_epochs=2)  # the policy's inputs stay
    assert np.allclose((env.obs_rms.mean, env.obs_rms.var), frozen, rtol=0, atol=1e-8)


def test_rounding_is_no_change() -> None:
    given, env = leaning(), vec_normalize()
    rows = np.array(given.observations)
    rows[:, 1] = 1.0
    rows[7, 1] = 1.0000001
    make(ActorCritic, env).pretrain(Demonstrations(rows, given.actions, given.rewards), n_epochs=2)
    assert env.obs_rms.var[1] == 1.0


@pytest.mark.parametrize("cls", [ActorCritic, OffPAC])
def test_frozen_statistics_stay(cls: Any) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0), training=False)
    before = copy.deepcopy((vars(env.obs_rms), vars(env.ret_rms)))
    make(cls, env).pretrain(leaning(), n_epochs=2)
    assert repr((vars(env.obs_rms), vars(env.ret_rms))) == repr(before)


def test_statistics_beside_masks() -> None:
    demos: Any = masked_demos(forbidden=False)
    rows = demos.observations["observation"]
    for given in (demos, Demonstrations(rows, demos.actions)):
        env: Any = VecNormalize(vec(Masked((3, 5)), Masked((3, 5))), norm_reward=False)
        make(ActorCritic, env).pretrain(given, n_epochs=2)
        assert np.allclose(env.obs_rms.mean, rows.mean(0), atol=1e-3)


def test_statistics_of_a_dict() -> None:
    seen = OBSERVATION_SPACES["dict"]
    demos = demos_in(seen, ACTION_SPACES["discrete"])
    env = VecNormalize(two_envs(observation_space=seen), norm_obs_keys=["vec"])
    make(ActorCritic, env, "MultiInputPolicy").pretrain(demos, n_epochs=2)
    assert np.allclose(env.obs_rms["vec"].mean, demos.observations["vec"].mean(0), atol=1e-3)
    assert env.ret_rms.count == pytest.approx(1e-4)


# ---------------------------------------------------------------- the critic


@pytest.mark.parametrize("cls", the_others_slow(ALL, [ActorCritic, OffPolicyPG, OffPAC]))
def test_the_critic_learns_the_returns(cls: Any) -> None:
    """The reward is the angle, episodes have one step: V(s) is the angle."""
    demos = leaning()
    rewards = 5.0 + 20.0 * demos.observations[:, 2]
    demos = Demonstrations(demos.observations, demos.actions, rewards, np.ones(200, bool))
    model = make(cls)
    before = critics_own(model)
    report = model.pretrain(demos, n_epochs=60, learning_rate=0.01)
    assert not equal(critics_own(model), before)
    assert report.explained_variance > 0.9
    assert report.critic_losses[-1] < 0.1 * rewards.var()
    seen = th.as_tensor(demos.observations)
    with th.no_grad():
        if cls is OffPAC:
            values = model.policy.critic.q_values(seen, th.as_tensor(demos.actions)).mean(0)
            assert equal(model.policy.critic.parameters(), model.policy.critic_target.parameters())
        else:
            values = model.policy.predict_values(seen)[:, 0]
    assert np.abs(values.numpy() - rewards).mean() < 1.0
    assert model.num_timesteps == 0
    model.learn(64)


def test_the_explained_variance_is_that_of_the_held_out_steps() -> None:
    demos, model = (
        leaning(),
        make(Reinforce, baseline="value", gamma=0.8, truncation="terminal", critic_learning_rate=1e-3),
    )
    report = model.pretrain(demos, n_epochs=5, learning_rate=0.01, seed=2, validation=0.3)
    returns, later = np.zeros(200), 0.0
    for t in reversed(range(200)):
        later = demos.rewards[t] + 0.8 * (0.0 if t % 10 == 9 else later)
        returns[t] = later
    rows = demos.held_out_steps(0.3, 2)[1]
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(demos.observations))[:, 0].numpy()
    expected = 1 - np.var((returns - values)[rows]) / np.var(returns[rows])
    assert report.explained_variance == pytest.approx(expected, abs=1e-4)


#: name -> arguments, and what the value of the observation behind a truncated episode counts
ENDINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "bootstrap": ({"truncation": "bootstrap"}, True),
    "terminal": ({"truncation": "terminal"}, False),
    "total": ({"returns": "total", "gamma": 1.0}, False),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("knows_finals", [False, True])
def test_targets(name: str, knows_finals: bool) -> None:
    """Four episodes: terminated, truncated, truncated after one step, truncated."""
    arguments, bootstraps = ENDINGS[name]
    rng, lengths = np.random.default_rng(0), (3, 2, 1, 4)
    stops = np.cumsum(lengths)
    n, ends = stops[-1], np.isin(np.arange(stops[-1]), stops - 1)
    observations = rng.normal(size=(n, 3)).astype(np.float32)
    finals = rng.normal(size=(4, 3)).astype(np.float32)
    rewards = rng.normal(size=n)
    demos = Demonstrations(
        observations,
        np.zeros(n, int),
        rewards,
        ends & (np.arange(n) < 3),
        ends,
        final_observations=finals if knows_finals else None,
    )
    kwargs = {"baseline": "value", "n_steps": None, "n_episodes": 2, "gamma": 0.9, **arguments}
    model = make(Reinforce, two_envs(), **kwargs)

    def value(seen: np.ndarray) -> float:
        with th.no_grad():
            return float(model.policy.predict_values(th.as_tensor(seen)[None]))

    expected, counts = np.zeros(n), np.ones(n, bool)
    for i, (stop, length) in enumerate(zip(stops, lengths, strict=True)):
        steps = list(range(stop - length, stop))
        later = 0.0
        if bootstraps and i > 0:
            later = value(finals[i] if knows_finals else observations[stop - 1])
            if not knows_finals:
                counts[steps.pop()] = False
        for t in reversed(steps):
            later = expected[t] = rewards[t] + model.gamma * later
        if name == "total":
            expected[steps] = later
    targets = ReturnTargets(pretraining.steps_for(model, demos), rewards, model._critic_to_fit())
    assert np.array_equal(targets.counted, counts)
    found = targets.present(lambda values: values).numpy()
    assert np.allclose(found[counts], expected[counts], atol=1e-6)


# ---------------------------------------------------------------- rewards


@each_class
def test_demonstrations_without_rewards_leave_the_critic(cls: Any) -> None:
    demos, model = leaning(rewards=False), make(cls)
    actor, critic = parameters(model), critics_own(model)
    with pytest.raises(ValueError, match=r"critic=True takes demonstrations with rewards, got some without"):
        model.pretrain(demos, critic=True)
    assert th.equal(parameters(model), actor)
    report = model.pretrain(demos, n_epochs=2)
    assert equal(critics_own(model), critic)
    assert not th.equal(parameters(model), actor)
    assert (report.critic_losses, report.explained_variance) == ([], None)


def test_without_a_critic() -> None:
    model = make(Reinforce, baseline="mean", n_steps=None, n_episodes=2)
    with pytest.raises(ValueError, match=r"critic=True trains a critic on .* none is in use: use baseline='value'"):
        model.pretrain(leaning(), critic=True)
    assert model.pretrain(leaning(), n_epochs=2).critic_losses == []


@pytest.mark.parametrize("cls", [ActorCritic, NPG])
def test_features_that_are_shared_are_left_to_the_actor(cls: Any) -> None:
    """The critic trains its own head only. Statistics of a BatchNorm are the actor's too."""
    kwargs: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": BatchNormExtractor}}
    models = [make(cls, two_envs(), **kwargs) for _ in range(2)]
    demos = demos_in(*VECTORS, rewards=np.arange(12.0))
    for model, critic in zip(models, (True, False), strict=True):
        model.pretrain(demos, n_epochs=3, critic=critic, seed=0)
    ours, theirs = (model.policy for model in models)
    own = models[0].learner.critic_only.keys()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert th.equal(one, other) != (name in own), name
    assert equal(ours.buffers(), theirs.buffers())


# ---------------------------------------------------------------- failures


def state_of(model: Any) -> Any:
    """What a failure must not change."""
    optimizers = [model.policy.actor, model.policy.critic] if isinstance(model, OffPAC) else [model.policy]
    env = model.get_vec_normalize_env()
    return copy.deepcopy(
        (
            [tensor.tolist() for tensor in model.policy.state_dict().values()],
            [one.optimizer.state_dict() for one in optimizers],
            [vars(env.obs_rms), vars(env.ret_rms)],
            [] if isinstance(model, OffPAC) else model.learner_state.state_dict(),
            model.policy.training,
            [parameter.requires_grad for parameter in model.policy.parameters()],
            model.num_timesteps,
        )
    )


def trained(cls: Any, **kwargs: Any) -> Any:
    """A model that has learned already, so that its optimizers remember something."""
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    if cls is not OffPAC:
        kwargs["normalize_value_targets"] = True
    return make(cls, env, **kwargs).learn(64)


class StopsAt:
    """Stands for the bar that is shown, and is interrupted."""

    def __init__(self, n: int, error: BaseException) -> None:
        self.left, self.error = n, error

    def __call__(self, **_: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        self.n = 0
        return self

    def __exit__(self, *_: Any) -> None: ...

    def update(self, _n: int = 1) -> None:
        self.left -= 1
        if not self.left:
            raise self.error


#: Ticks of the bar: in the actor's epochs, and in the critic's.
@pytest.mark.parametrize("at", [2, 8])
@pytest.mark.parametrize("cls", [ActorCritic, TRPO, OffPolicyPG, OffPAC])
def test_an_interrupt_undoes_it(cls: Any, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(cls)
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "tqdm", StopsAt(at, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model.pretrain(leaning(), n_epochs=6, patience=None)
    assert repr(state_of(model)) == repr(before)
    model.pretrain(leaning(), n_epochs=6, patience=None)
    assert repr(state_of(model)) != repr(before)


@pytest.mark.parametrize("cls", the_others_slow(ALL, [Reinforce, KLPenaltyPG, OffPAC]))
def test_a_loss_that_is_not_finite_undoes_it(cls: Any) -> None:
    model = trained(cls)
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"-log pi of .*epoch \d+ is .*A smaller learning rate may help|is nan"):
        model.pretrain(leaning(), n_epochs=30, learning_rate=1e38)
    assert repr(state_of(model)) == repr(before)
    model.learn(64, reset_num_timesteps=False)


@pytest.mark.parametrize("cls", [ActorCritic, OffPAC])
def test_a_critic_that_is_not_finite_undoes_all(cls: Any) -> None:
    demos = leaning()
    demos = Demonstrations(demos.observations, demos.actions, np.full(200, 1e300), demos.terminated, demos.truncated)
    model = make(cls)
    before = parameters(model)
    with pytest.raises(NonFiniteError, match="critic's loss of epoch 1 is"):
        model.pretrain(demos, n_epochs=2)
    assert th.equal(parameters(model), before)


def test_numbers_that_are_not_finite_are_refused_early() -> None:
    observations = np.zeros((4, 4), np.float32)
    observations[2, 1] = np.nan
    with pytest.raises(NonFiniteError, match="observations at step 2 of the demonstrations"):
        Demonstrations(observations, np.zeros(4, int))


VECTORS = OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"demos": "demos.npz"}, TypeError, "demos must be Demonstrations, got 'demos.npz'"),
    ({"n_epochs": 0}, ValueError, "n_epochs must be .*got 0"),
    ({"n_epochs": 2.5}, TypeError, "n_epochs must be .*got 2.5"),
    ({"batch_size": 0}, ValueError, "batch_size must be .*got 0"),
    ({"validation": 1.0}, ValueError, "validation must be below 1, .*got 1.0"),
    ({"validation": -0.1}, ValueError, "validation must be .*got -0.1"),
    ({"validation": "some"}, TypeError, "validation must be .*got 'some'"),
    ({"validation": float("nan")}, ValueError, "validation must be .*got nan"),
    ({"critic": "yes"}, TypeError, "critic must be .*got 'yes'"),
    ({"learning_rate": 0.0}, ValueError, "learning_rate must be .*got 0.0"),
    ({"learning_rate": float("inf")}, ValueError, "learning_rate must be .*got inf"),
    ({"min_std": -1.0}, ValueError, "min_std must be .*got -1.0"),
    ({"patience": 0}, ValueError, "patience must be .*got 0"),
    ({"seed": -1}, ValueError, "seed must be .*got -1"),
    ({"progress_bar": 1}, TypeError, "progress_bar must be .*got 1"),
    ({"demos": demos_in(*VECTORS)}, ValueError, r"observations must have shape \(4,\) a row, .*got \(3,\)"),
    (
        {"demos": Demonstrations(np.zeros((2, 4), np.float32), [0, 2])},
        ValueError,
        r"actions must be in \[0, 1\], got 2 at step 1",
    ),
]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"), BAD, ids=[f"{next(iter(one[0]))}-{i}" for i, one in enumerate(BAD)]
)
@pytest.mark.parametrize("cls", [ActorCritic, OffPAC])
def test_bad_arguments_are_named(cls: Any, kwargs: dict[str, Any], error: Any, match: str) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    model = make(cls, env)
    before, drawn = state_of(model), th.get_rng_state()
    with pytest.raises(error, match=match):
        model.pretrain(**{"demos": leaning(), **kwargs})
    assert repr(state_of(model)) == repr(before)
    assert th.equal(th.get_rng_state(), drawn)


def test_numbers_of_numpy() -> None:
    numbers: dict[str, Any] = {"n_epochs": np.int64(2), "validation": np.float32(0.5), "batch_size": np.int32(50)}
    report = make(ActorCritic).pretrain(leaning(), **numbers)
    assert (report.n_epochs, report.n_held_out) == (2, 100)


def test_a_model_without_policy() -> None:
    with pytest.raises(ValueError, match=r"pretrain\(\) needs a policy"):
        ActorCritic("MlpPolicy", "CartPole-v1", _init_setup_model=False).pretrain(leaning())


# ---------------------------------------------------------------- before and after


class Noting(BaseCallback):
    """Keeps a number of each step."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.read = read
        self.found: list[Any] = []

    def _on_step(self) -> bool:
        self.found.append(self.read(self))
        return True


@each_class
def test_save_and_load(cls: Any, tmp_path: Path) -> None:
    model = make(cls)
    model.pretrain(leaning(), n_epochs=5)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    assert equal(model.policy.state_dict().values(), loaded.policy.state_dict().values())
    observations: Any = leaning().observations
    first, second = (one.predict(observations, deterministic=True)[0] for one in (model, loaded))
    assert np.array_equal(first, second)
    before = parameters(loaded)
    loaded.pretrain(leaning(), n_epochs=2, patience=None, validation=0)  # the loaded model learns as well
    assert not th.equal(parameters(loaded), before)
    loaded.learn(64)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_acts_afterwards_is_the_clone(cls: Any) -> None:
    """Samplers keep copies of the policy's layers."""
    model = make(cls, make_vec_env("CartPole-v1", 2, seed=0))
    taken: list[list[np.ndarray]] = []
    for n_steps in (16, 8):
        noted = Noting(lambda callback: callback.locals["actions"].copy())
        model.learn(n_steps, noted)
        taken.append(noted.found)
        model.pretrain(cart_poles(), n_epochs=40, learning_rate=0.03, batch_size=16, validation=0)
    before, after = map(np.concatenate, taken)
    assert before.mean() < 0.9
    assert after.mean() == 1.0


@pytest.mark.parametrize("cls", [ActorCritic, OffPAC])
def test_demonstrations_on_the_disk(cls: Any, tmp_path: Path) -> None:
    """The same as in memory. Tensors do not share the memory of a file, which cannot be written to."""
    leaning().save(tmp_path / "demos.npz")
    on_disk: Any = Demonstrations.load(tmp_path / "demos.npz", mmap=True)
    assert not on_disk.observations.flags.writeable
    steps = pretraining.steps_for(make(cls), on_disk)
    assert not np.shares_memory(steps.actions.numpy(), on_disk.actions)
    assert not np.shares_memory(steps.observations(slice(None)).numpy(), on_disk.observations)
    found = []
    for demos in (leaning(), on_disk):
        model = make(cls)
        model.pretrain(demos, n_epochs=3, seed=0)
        found.append(parameters(model))
    assert th.equal(*found)
    if cls is ActorCritic:
        model.anchor = DemonstrationLoss(on_disk, 1.0, batch_size=None)
        model.learn(8)


def test_another_pretraining_goes_on() -> None:
    demos, model = leaning(), make(ActorCritic)
    first = model.pretrain(demos, n_epochs=10, seed=0)
    second = model.pretrain(demos, n_epochs=10, seed=0)
    assert second.losses[0] < first.losses[-1]


def test_it_comes_before_learn(tmp_path: Path) -> None:
    model = make(ActorCritic)
    with pytest.raises(KeyboardInterrupt):
        model.learn(400, [ResumeCallback(tmp_path, every=50), Interrupts(200)])
    again: Any = ActorCritic.resume(tmp_path, "CartPole-v1", device="cpu")
    goes_on = "comes before learn, and this model goes on with a run that has begun"
    with pytest.raises(ValueError, match=f"pretrain {goes_on}"):
        again.pretrain(leaning())
    with pytest.raises(ValueError, match=f"warm_up_critic {goes_on}"):
        again.warm_up_critic(1)
    again.learn(400)


# ---------------------------------------------------------------- warming up the critic


WITH_CRITIC = (*CLASSES, OffPolicyPG)


@pytest.mark.parametrize("cls", WITH_CRITIC)
def test_warm_up_trains_the_critic_alone(cls: Any) -> None:
    model = make(cls, learning_rate="lin_1e-2", **BASELINE.get(cls, {}))
    model.pretrain(leaning(), n_epochs=2)
    actor, critic = copied(model.learner.actor.values()), critics_own(model)
    noted = Noting(lambda callback: callback.model.policy.optimizer.param_groups[0]["lr"])
    assert model.warm_up_critic(3, noted) is model
    assert equal(model.learner.actor.values(), actor)
    assert not equal(critics_own(model), critic)
    assert model.num_timesteps == len(noted.found) > 0
    assert set(noted.found) == {1e-2}
    assert model.learner_state.n_warmed_up == model._n_updates == 3
    if cls is not OffPolicyPG:
        assert model.num_timesteps == 3 * 8
    n = model.num_timesteps
    model.learn(300, reset_num_timesteps=False)
    assert model.num_timesteps >= n + 300
    assert not equal(model.learner.actor.values(), actor)


#: what gives a class a critic
BASELINE: dict[Any, dict[str, Any]] = {OffPolicyPG: {"gradient_steps": 1}}


def test_warm_up_needs_a_critic_and_a_number() -> None:
    model = make(Reinforce, baseline="mean", n_steps=None, n_episodes=2)
    with pytest.raises(ValueError, match="warm_up_critic trains a critic, and none is in use: use baseline='value'"):
        model.warm_up_critic(1)
    model = make(ActorCritic)
    for n, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"n_rollouts must be .*got {n}"):
            model.warm_up_critic(n)
    with pytest.raises(ValueError, match="callback must hold no ResumeCallback"):
        model.warm_up_critic(1, [ResumeCallback("folder")])
    with pytest.raises(TypeError, match="callback must be"):
        model.warm_up_critic(1, 3)
    assert model.num_timesteps == 0


def test_warm_up_needs_an_env_and_actions_of_the_policy(tmp_path: Path) -> None:
    model = make(ActorCritic)
    model.save(tmp_path / "model")
    loaded = ActorCritic.load(tmp_path / "model")
    progress = loaded._current_progress_remaining
    with pytest.raises(ValueError, match=r"warm_up_critic\(\) needs an environment: call set_env"):
        loaded.warm_up_critic(1)
    assert loaded._current_progress_remaining == progress
    with pytest.raises(ValueError, match="learning_starts must be at most num_timesteps=0 for that, got 30"):
        make(OffPolicyPG, learning_starts=30).warm_up_critic(1)


def test_a_warm_up_without_an_update_says_so() -> None:
    model = make(OffPolicyPG, train_freq=(4, "step"), baseline="value")
    critic = critics_own(model)
    with pytest.warns(
        UserWarning, match=r"warm_up_critic\(\) has not trained the critic: no episode has ended"
    ) as found:
        model.warm_up_critic(1)
    assert found[0].filename == __file__
    assert equal(critics_own(model), critic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.warm_up_critic(1, Stopping())


class Stopping(BaseCallback):
    """Stops at once."""

    def _on_step(self) -> bool:
        return False


def test_warm_up_and_training_have_a_tensorboard_run_of_their_own(tmp_path: Path) -> None:
    make(TRPO, tensorboard_log=str(tmp_path)).learn(16)
    model = make(TRPO, tensorboard_log=str(tmp_path)).warm_up_critic(1)
    model.learn(16, reset_num_timesteps=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["TRPO_1", "TRPO_2"]
    model.warm_up_critic(1, tb_log_name="more")
    assert [path.name for path in tmp_path.glob("more*")] == ["more_0"]


def test_a_warm_up_that_fails_leaves_the_next_learn_as_it_was() -> None:
    model = make(OffPolicyPG)
    with pytest.raises(KeyboardInterrupt):
        model.warm_up_critic(5, Interrupts(20))
    assert model._rollouts_left is None
    actor = copied(model.learner.actor.values())
    model.learn(100, reset_num_timesteps=False)
    assert not equal(model.learner.actor.values(), actor)


@pytest.mark.parametrize("cls", [ActorCritic, TRPO, KLPenaltyPG])
def test_warm_up_updates_count_after_pretraining(cls: Any) -> None:
    model = make(cls, critic_warmup_updates=2)
    model.learn(24)
    assert model.learner_state.n_warmed_up == 2
    model.pretrain(leaning(), n_epochs=2)
    assert model.learner_state.n_warmed_up == 0
    actor = copied(model.learner.actor.values())
    model.learn(16)
    assert equal(model.learner.actor.values(), actor)
    model.learn(8, reset_num_timesteps=False)
    assert not equal(model.learner.actor.values(), actor)


def test_the_report_says_why_nothing_is_explained() -> None:
    report = PretrainReport(10, 0, [1.0], [], 1, accuracy=0.5, critic_losses=[2.0], explained_variance=float("nan"))
    assert "the returns are all but equal" in str(report)
    assert "nan" not in str(report)


def test_an_interrupt_of_the_report_undoes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    model = make(ActorCritic)
    before = copied(model.policy.parameters())
    monkeypatch.setattr(pretraining, "agreement", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.pretrain(leaning(), n_epochs=2)
    assert equal(model.policy.parameters(), before)


def test_a_wrong_anchor_is_refused_before_anything_is_learned() -> None:
    model = make(ActorCritic)
    before = copied(model.policy.parameters())
    model.anchor = "kl"
    with pytest.raises(TypeError, match=r"anchor must be .*, got 'kl'"):
        model.pretrain(leaning(), n_epochs=2, critic=False)
    assert equal(model.policy.parameters(), before)
