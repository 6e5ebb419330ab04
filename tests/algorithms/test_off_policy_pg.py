"""OffPolicyPG: what it keeps of what it has lived, and what it makes of it."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import NonFiniteError, OffPolicyPG, Reinforce
from sb3_pg.policies import policy_actions
from sb3_pg.rollout import Trajectory
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, BatchNormExtractor, FaultyEnv, ScriptedEnv, vec

POLICIES = {"dict": "MultiInputPolicy", "image": "CnnPolicy"}


def envs(n_envs: int = 1, observations: str = "vector", actions: str = "discrete", **kwargs: Any) -> Any:
    """Episodes of unequal length, every other one truncated."""
    made = []
    for i in range(n_envs):
        own = copy.deepcopy((OBSERVATION_SPACES[observations], ACTION_SPACES[actions]))  # each with its own generator
        lengths, truncate = kwargs.get("lengths", (3, 1, 5, 2)), kwargs.get("truncate", (False, True))
        made.append(ScriptedEnv(lengths, truncate, 0.5 * i - 4, *own))
    return vec(*made)


def make(env: Any, policy: str = "MlpPolicy", cls: Any = OffPolicyPG, **kwargs: Any) -> Any:
    defaults = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}, "n_critic_updates": 2}
    return cls(policy, env, **{**defaults, **kwargs})


def parameters(model: Any) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def log_prob(policy: Any, observations: Any, actions: np.ndarray) -> Any:
    """Of stored actions, by SB3's own method."""
    taken = policy_actions(th.as_tensor(actions), policy.action_space)
    with th.no_grad():
        return policy.evaluate_actions(obs_as_tensor(observations, policy.device), taken)[1].numpy()


def rows(model: Any, name: str) -> Any:
    """What the replay buffer holds, from the first step on."""
    buffer = model.replay_buffer
    assert not buffer.full
    array = getattr(buffer, name)
    return {key: x[: buffer.pos, 0] for key, x in array.items()} if isinstance(array, dict) else array[: buffer.pos, 0]


def stored_rewards(model: Any) -> list[list[float]]:
    buffer = model.replay_buffer
    return [buffer.rewards[t.start : t.start + t.length, 0].tolist() for t in buffer.trajectories]


class Watch(BaseCallback):
    """Does something at the start of training, of every rollout, and after every step."""

    def __init__(self, **acts: Callable[[Any], Any]) -> None:
        super().__init__()
        self.acts = acts

    def _act(self, when: str) -> Any:
        return self.acts[when](self) if when in self.acts else None

    def _on_training_start(self) -> None:
        self._act("training")

    def _on_rollout_start(self) -> None:
        self._act("rollout")

    def _on_step(self) -> bool:
        return self._act("step") is not False


# ---------------------------------------------------------------- on fresh data it is Reinforce

CASES: dict[str, dict[str, Any]] = {
    **{
        f"{baseline}-{returns}": {"baseline": baseline, "returns": returns, "truncation": "terminal"}
        for baseline in ("none", "mean", "leave_one_out", "time", "optimal", "linear", "value")
        for returns in ("reward_to_go", "total")
    },
    "component-wise": {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}},
    **{
        f"{ratio}-{n_envs}": {"ratio": ratio, "n_envs": n_envs}
        for ratio in ("per_step", "prefix", "per_decision", "trajectory")
        for n_envs in (1, 2)
    },
    "per_decision-total": {"ratio": "per_decision", "returns": "total", "baseline": "leave_one_out"},
    "treated": {"ratio": "trajectory", "max_ratio": 1.0, "self_normalize": True, "min_ess": 0.99},
    **{actions: {"actions": actions, "n_envs": 2, "ratio": "trajectory"} for actions in ACTION_SPACES},
    "gsde": {"actions": "box", "use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}},
    **{name: {"observations": name, "n_envs": 2} for name in ("double", "discrete", "dict", "image")},
    "discounted": {"state_discount": True, "gamma": 0.9, "ent_coef": 0.1, "normalize_advantage": True},
    "fitted-before": {"critic_fit": "before", "normalize_value_targets": True, "returns": "total"},
    "joint-critic": {"critic_learning_rate": None, "n_critic_updates": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_on_fresh_data_is_reinforces(case: str) -> None:
    kwargs = dict(CASES[case])
    where = {"n_envs": kwargs.pop("n_envs", 1)}
    where |= {name: kwargs.pop(name) for name in ("observations", "actions") if name in kwargs}
    policy = POLICIES.get(where.get("observations", ""), "MlpPolicy")
    own: dict[str, Any] = {
        name: kwargs.pop(name) for name in ("ratio", "max_ratio", "self_normalize", "min_ess") if name in kwargs
    }
    own |= {"train_freq": (4, "episode"), "buffer_trajectories": 4, "gradient_steps": 1}
    learned = []
    for cls, form in ((Reinforce, {"n_episodes": 4}), (OffPolicyPG, own)):  # one after the other: seeds are global
        model = make(envs(**where), policy, cls, learning_rate=1e-2, **kwargs, **form)
        before = parameters(model)
        learned.append((model.learn(45 * where["n_envs"]), parameters(model)))
        assert (learned[-1][1] - before).abs().max() > 1e-2
    (a, theirs), (b, ours) = learned
    assert a._n_updates == b._n_updates >= 4
    assert a.num_timesteps == b.num_timesteps
    assert th.allclose(theirs, ours, atol=1e-5)


# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize(
    ("actions", "kwargs"),
    [
        *((actions, {}) for actions in ACTION_SPACES),
        ("box", {"use_sde": True, "sde_sample_freq": 4}),
        ("matrix", {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}}),
    ],
)
def test_stored_log_probs_are_those_of_the_stored_actions(actions: str, kwargs: dict[str, Any]) -> None:
    model = make(VecNormalize(envs(2, actions=actions)), train_freq=7, gradient_steps=0, **kwargs).learn(84)
    assert len(model.replay_buffer.trajectories) > 20
    expected = log_prob(model.policy, rows(model, "observations"), rows(model, "actions"))
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("observations", ["dict", "image"])
def test_log_probs_on_dicts_and_images(observations: str) -> None:
    model = make(envs(2, observations), POLICIES[observations], gradient_steps=0).learn(40)
    expected = log_prob(model.policy, rows(model, "observations"), rows(model, "actions"))
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)
    assert expected.std() > 1e-4


def test_observations_are_stored_as_acted_upon_and_actions_as_sampled() -> None:
    env = envs(actions="box")
    seen: list[np.ndarray] = []
    watch = Watch(
        training=lambda callback: seen.append(callback.model._last_obs.copy()),
        step=lambda callback: seen.append(callback.locals["new_obs"].copy()),
    )
    model = make(VecNormalize(env), train_freq=11, gradient_steps=0).learn(33, watch)
    assert np.array_equal(rows(model, "observations"), np.concatenate(seen)[:-1])
    sampled, taken = rows(model, "actions"), np.array(env.envs[0].unwrapped.actions)
    space: Any = ACTION_SPACES["box"]
    assert np.array_equal(np.clip(sampled, space.low, space.high), taken)
    assert not np.array_equal(sampled, taken)
    assert len(rows(model, "rewards")) == 33


def test_an_episode_that_several_policies_have_lived_has_the_log_probs_of_each() -> None:
    policies: list[Any] = []
    watch = Watch(rollout=lambda callback: policies.append(copy.deepcopy(callback.model.policy)))
    model = make(envs(lengths=(7,)), train_freq=(3, "step"), learning_rate=0.1, ratio="per_step").learn(42, watch)
    assert [t.length for t in model.replay_buffer.trajectories] == [7] * 6
    expected = np.concatenate(
        [
            log_prob(policy, rows(model, "observations")[3 * i : 3 * i + 3], rows(model, "actions")[3 * i : 3 * i + 3])
            for i, policy in enumerate(policies)
        ]
    )
    assert np.allclose(rows(model, "log_probs"), expected, atol=1e-6)
    last = log_prob(policies[-1], rows(model, "observations"), rows(model, "actions"))
    assert np.abs(last - expected).max() > 0.1


@pytest.mark.parametrize(
    ("actions", "log_density", "kwargs"),
    [
        ("discrete", -math.log(3), {}),
        ("multi_binary", -math.log(8), {}),
        ("box", -math.log(8), {}),
        ("box", -math.log(4), {"use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}}),
    ],
)
def test_the_warm_up_is_uniform_and_says_so(actions: str, log_density: float, kwargs: dict[str, Any]) -> None:
    env = envs(2, actions=actions, lengths=(5,))
    model = make(env, train_freq=5, gradient_steps=0, learning_starts=20, **kwargs).learn(40)
    kept, expected = (
        rows(model, "log_probs"),
        log_prob(model.policy, rows(model, "observations"), rows(model, "actions")),
    )
    assert kept[:20] == pytest.approx(np.full(20, log_density))
    assert kept[20:] == pytest.approx(expected[20:], abs=1e-6)
    assert np.abs(kept[:20] - expected[:20]).max() > 1e-3
    taken = np.array(env.envs[0].unwrapped.actions[:10])
    if actions == "box":  # in all of its range, which squashed actions are stretched to
        space: Any = ACTION_SPACES["box"]
        low, high = space.low, space.high
        stored = rows(model, "actions")[[*range(5), *range(10, 15)]]
        assert np.allclose(taken, low + (stored + 1) * (high - low) / 2 if kwargs else stored, atol=1e-6)


def test_no_update_before_learning_starts() -> None:
    model = make(envs(lengths=(5,)), train_freq=5, learning_starts=20)
    before = parameters(model)
    model.learn(20)
    assert th.equal(parameters(model), before)
    model.learn(5, reset_num_timesteps=False)
    assert not th.equal(parameters(model), before)


def biased(obs: Any) -> tuple[np.ndarray, np.ndarray]:
    """A behavior policy that looks at nothing: action 0, 1, 2 with probability 0.8, 0.1, 0.1."""
    p = np.array([0.8, 0.1, 0.1])
    actions = np.random.default_rng().choice(3, len(obs), p=p)
    return actions, np.log(p[actions])


def test_a_behavior_policy_acts_and_its_log_probs_are_kept() -> None:
    seen: list[np.ndarray] = []

    def behavior(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(obs.copy())
        return biased(obs)

    env = VecNormalize(envs())
    model = make(env, behavior_policy=behavior, train_freq=11, learning_starts=5, gradient_steps=0).learn(22)
    assert np.array_equal(rows(model, "observations"), np.concatenate(seen))  # normalized
    expected = np.where(rows(model, "actions")[:, 0] == 0, math.log(0.8), math.log(0.1))
    assert rows(model, "log_probs") == pytest.approx(expected)


def test_train_freq_and_gradient_steps_in_all_their_forms() -> None:
    for train_freq, n_steps in ((4, 8), ((4, "step"), 8), ([4, "step"], 8), ((4, "episode"), 12)):
        model = make(envs(2, lengths=(6,)), train_freq=train_freq, gradient_steps=3)
        model.learn(1)
        assert model.num_timesteps == 2 * n_steps if n_steps == 12 else n_steps
    model = make(envs(2, lengths=(4,)), train_freq=4, gradient_steps=-1).learn(16)
    assert model._n_updates == 16


def test_several_envs_contribute_equally() -> None:
    env = vec(ScriptedEnv((2,)), ScriptedEnv((5,), first_reward=100))
    model = make(env, train_freq=(6, "episode"), gradient_steps=0).learn(1, log_interval=None)
    assert sorted(map(len, stored_rewards(model))) == [2, 2, 2, 5, 5, 5]
    assert model.num_timesteps == 2 * 15
    assert model._episode_num == 6
    assert model.logger.name_to_value["rollout/valid_fraction"] == pytest.approx(21 / 30)


# ---------------------------------------------------------------- interruptions


def consecutive(model: Any, length: int) -> bool:
    """Whether all stored episodes are whole: ScriptedEnv counts its rewards."""
    found = stored_rewards(model)
    return bool(found) and all(r == [r[0] + i for i in range(length)] for r in found)


def test_pieces_of_different_episodes_are_not_put_together() -> None:
    """The second episode is as old, where its beginning is lost, as the first, where its end is."""
    model = make(envs(lengths=(12,)), train_freq=5, gradient_steps=0).learn(5)
    model.learn(100, Watch(step=lambda callback: callback.n_calls < 5))
    assert model.replay_buffer.trajectories == []
    model.learn(40, reset_num_timesteps=False)
    assert consecutive(model, 12)
    assert len(model.replay_buffer.trajectories) == 2


def test_learning_again_begins_with_a_new_episode() -> None:
    model = make(envs(lengths=(6,)), train_freq=4, gradient_steps=0).learn(4).learn(8)
    assert consecutive(model, 6)


def test_learning_goes_on_in_the_middle_of_an_episode() -> None:
    model = make(envs(lengths=(6,)), train_freq=4, gradient_steps=0).learn(4)
    model.learn(4, reset_num_timesteps=False)
    assert consecutive(model, 6)


# ---------------------------------------------------------------- weights


def with_ratios(model: Any, *episodes: list[float], seed: int = 0) -> list[Trajectory]:
    """Logged episodes whose steps have these importance ratios under the model's policy."""
    model.observation_space.seed(seed)
    model.action_space.seed(seed)
    found = []
    for ratios in episodes:
        observations = np.stack([model.observation_space.sample() for _ in ratios])
        actions = np.stack([model.action_space.sample() for _ in ratios])
        log_probs = log_prob(model.policy, observations, actions) - np.log(ratios)
        found.append(Trajectory(observations, actions, np.arange(1.0, len(ratios) + 1), log_probs, True))
    return found


def next_batch(model: Any, batch_size: int | None = None) -> Any:
    model.set_logger(Logger(None, []))
    return model._next_batch(batch_size)


def trained(model: Any, gradient_steps: int = 1, batch_size: int | None = None) -> dict[str, Any]:
    """What training without collecting logs."""
    model.set_logger(Logger(None, []))
    model.train(gradient_steps, batch_size)
    return dict(model.logger.name_to_value)


@pytest.mark.parametrize(
    ("ratio", "weights"),
    [
        ("per_step", [2, 2, 0.5, 0.5, 0.5]),
        ("prefix", [2, 4, 0.5, 0.25, 0.125]),
        ("per_decision", [2, 4, 0.5, 0.25, 0.125]),
        ("trajectory", [4, 4, 0.125, 0.125, 0.125]),
    ],
)
@pytest.mark.parametrize("max_ratio", [None, 3.0, 1.5])
def test_weights_are_logged(ratio: str, weights: list[float], max_ratio: float | None) -> None:
    model = make(envs(), ratio=ratio, max_ratio=max_ratio, baseline="none")
    model.add_trajectories(with_ratios(model, [2, 2], [0.5, 0.5, 0.5]))
    log = trained(model)
    w = np.minimum(weights, max_ratio or np.inf)
    cut = np.mean(w < weights)
    if ratio == "trajectory":  # one for each
        w = w[[0, 2]]
    assert log["train/importance_ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum() / len(w), rel=1e-4)
    assert log["train/largest_weight"] == pytest.approx(w.max(), rel=1e-4)
    assert log["train/truncated_fraction"] == pytest.approx(cut)
    assert log["train/effective_sample_size"] > 0.99  # of the step that was taken, which was small


def test_staleness_is_counted_in_gradient_steps() -> None:
    model = make(envs(), train_freq=(4, "episode"), gradient_steps=3).learn(22, log_interval=None)
    assert model._n_updates == 6
    assert model.logger.name_to_value["train/staleness"] == (5 + 2) / 2  # half of the trajectories are from the start
    assert trained(model)["train/staleness"] == (6 + 3) / 2


def test_the_last_step_of_an_update_explains_itself() -> None:
    model = make(envs())
    model.add_trajectories(with_ratios(model, [1, 1], [1, 1, 1]))
    explained, explain = [], model._explain

    def watched(*args: Any) -> Any:
        explained.append(model._n_updates)
        return explain(*args)

    model._explain = watched
    trained(model, 3)
    assert explained == [2]


def test_the_critics_targets_are_v_traces() -> None:
    """Two steps by hand: rewards 1 and 2, ratios 1/2 and 4, a critic that says V."""
    model = make(envs(), gamma=0.9)
    model.add_trajectories(with_ratios(model, [0.5, 4.0]))
    batch = next_batch(model)
    v = batch.values.flatten().tolist()
    second = v[1] + 1.0 * (2 - v[1])
    first = v[0] + 0.5 * (1 + 0.9 * v[1] - v[0]) + 0.9 * 0.5 * (second - v[1])
    assert batch.returns.flatten().tolist() == pytest.approx([first, second], rel=1e-5)
    assert batch.advantages.flatten().tolist() == pytest.approx([1 + 0.9 * 2 - v[0], 2 - v[1]], rel=1e-5)


def test_with_total_returns_the_critic_is_about_the_whole_episode() -> None:
    model = make(envs(), returns="total", gamma=0.9)
    model.add_trajectories(with_ratios(model, [0.5, 4.0]))
    batch = next_batch(model)
    v, total = batch.values.flatten().tolist(), 1 + 0.9 * 2
    expected = [v[0] + 0.5 * (v[1] - v[0]) + 0.5 * (total - v[1]), total]
    assert batch.returns.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_a_weight_that_no_number_can_hold_is_explained_and_changes_nothing() -> None:
    model = make(envs(), ratio="trajectory")
    model.add_trajectories(with_ratios(model, [1e30] * 11))
    before = parameters(model)
    with pytest.raises(OverflowError, match="max_ratio"):
        trained(model)
    assert th.equal(parameters(model), before)
    model.max_ratio = 2.0
    assert trained(model)["train/largest_weight"] == pytest.approx(2)


# ---------------------------------------------------------------- min_ess


def test_stale_trajectories_leave_until_the_sample_is_effective() -> None:
    model = make(envs(), min_ess=0.9)
    for seed in range(2):
        model.add_trajectories(with_ratios(model, [9, 0.1], [0.1, 9], seed=seed))
    model.add_trajectories(with_ratios(model, [1, 1], [1, 1, 1], seed=2))
    log = trained(model)
    assert [t.length for t in model.replay_buffer.trajectories] == [2, 3]
    assert log["train/n_refused"] == 2
    assert log["train/importance_ess"] > 0.99
    assert model._n_updates == 1


def test_without_an_effective_sample_no_step_is_taken() -> None:
    model = make(envs(), min_ess=0.9)
    model.add_trajectories(with_ratios(model, [9, 0.1], [1, 1]))
    before = parameters(model)
    log = trained(model, 3)
    assert th.equal(parameters(model), before)
    assert model._n_updates == 0
    assert log["train/n_refused"] == 1
    assert "train/policy_loss" not in log
    assert len(model.replay_buffer.trajectories) == 2


def test_what_is_effective_enough_stays() -> None:
    model = make(envs(), min_ess=0.5)
    model.add_trajectories(with_ratios(model, [1.5, 0.8], seed=1))
    model.add_trajectories(with_ratios(model, [1, 1]))
    assert "train/n_refused" not in trained(model)
    assert len(model.replay_buffer.trajectories) == 2


def test_own_rollouts_do_not_suffer_from_logged_ones() -> None:
    """They are of the same age, as the policy has not been updated since."""
    model = make(envs(), min_ess=0.9, train_freq=(4, "episode"), gradient_steps=1, buffer_trajectories=1000)
    model.add_trajectories(with_ratios(model, *[[9, 0.1]] * 20))
    model.learn(11)
    assert model._n_updates == 1
    assert len(model.replay_buffer.trajectories) == 4


def test_a_small_batch_takes_the_newest_and_others() -> None:
    model = make(envs(), "MlpPolicy", train_freq=(2, "episode"), batch_size=3, gradient_steps=0).learn(22)
    newest = model.replay_buffer.trajectories[-2:]
    drawn = []
    for _ in range(30):
        batch = next_batch(model, 3)
        assert batch.n_episodes == 3
        assert batch.valid.sum(0).tolist()[1:] == [t.length for t in newest]
        drawn.append(float(batch.rewards[0, 0]))
    assert len(set(drawn)) == len(model.replay_buffer.trajectories) - 2


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize(("fault", "step"), [("reward", 1), ("observation", 2)])
def test_a_fault_raises_and_leaves_everything_as_it_was(fault: str, step: int) -> None:
    model = make(vec(FaultyEnv(fault, at=20, lengths=(3,))), train_freq=(2, "episode")).learn(18)
    before, kept = parameters(model), copy.deepcopy(vars(model.replay_buffer))
    with pytest.raises(NonFiniteError, match=f"{fault} is nan in env 0 at step {step} "):
        model.learn(6, reset_num_timesteps=False)
    assert th.equal(parameters(model), before)
    for name, value in vars(model.replay_buffer).items():
        assert np.array_equal(value, kept[name]) if isinstance(value, np.ndarray) else value == kept[name], name
    model.learn(6, reset_num_timesteps=False)
    assert not th.equal(parameters(model), before)


@pytest.mark.parametrize("train_freq", [(2, "episode"), 4])
def test_a_fault_can_be_skipped(train_freq: Any) -> None:
    env = vec(FaultyEnv("reward", at=20, lengths=(6,)))
    model = make(env, train_freq=train_freq, gradient_steps=1, on_nonfinite="skip", baseline="none")
    with pytest.warns(UserWarning, match="reward is nan in env 0"):
        model.learn(48, log_interval=None)
    assert consecutive(model, 6)
    assert model.logger.name_to_value["train/n_skipped"] == 1
    rewards = set(rows(model, "rewards"))
    assert max(rewards) > 40
    assert 20 not in rewards


def test_a_policy_that_says_nothing_of_an_action_is_an_error() -> None:
    model = make(envs(), train_freq=4).learn(8)
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = th.nan
    before = parameters(model)
    with pytest.raises(NonFiniteError, match=r"action_net\.weight"):
        trained(model)
    model.on_nonfinite = "skip"
    with pytest.warns(UserWarning, match=r"Update skipped.*action_net\.weight"):
        assert trained(model, 3)["train/n_skipped"] == 1
    assert th.equal(parameters(model).nan_to_num(), before.nan_to_num())


def test_only_gradient_steps_train_batch_norm() -> None:
    policy_kwargs = {"features_extractor_class": BatchNormExtractor}
    own: dict[str, Any] = {"train_freq": (4, "episode"), "gradient_steps": 2, "baseline": "none"}
    model = make(envs(), policy_kwargs=policy_kwargs, **own).learn(22)
    assert model.policy.features_extractor.norm.num_batches_tracked == model._n_updates == 4


# ---------------------------------------------------------------- saving


def test_model_and_replay_buffer_go_on_together(tmp_path: Path) -> None:
    model = make(VecNormalize(envs(2)), train_freq=(4, "episode")).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded: Any = OffPolicyPG.load(tmp_path / "model", env=VecNormalize(envs(2)), device="cpu")
    assert loaded.replay_buffer.trajectories == []
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert stored_rewards(loaded) == stored_rewards(model)
    logs = [trained(m, 2) for m in (model, loaded)]
    assert th.equal(parameters(model), parameters(loaded))
    assert logs[0]["train/staleness"] == logs[1]["train/staleness"] > 0
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps >= 80


@pytest.mark.parametrize("train_freq", [(4, "episode"), 5])
def test_a_replay_buffer_serves_any_number_of_envs(train_freq: Any, tmp_path: Path) -> None:
    model: Any = make(envs(2), train_freq=train_freq, gradient_steps=1).learn(40)
    for n_envs in (1, 4):
        n_updates, n_kept = model._n_updates, len(model.replay_buffer.trajectories)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "buffer")
        model = OffPolicyPG.load(tmp_path / "model", env=envs(n_envs), device="cpu")
        model.load_replay_buffer(tmp_path / "buffer")
        model.learn(20, reset_num_timesteps=False)
        assert model._n_updates > n_updates
        assert len(model.replay_buffer.trajectories) > n_kept


def test_an_env_that_is_set_begins_new_episodes() -> None:
    model = make(envs(lengths=(6,)), train_freq=4, gradient_steps=0).learn(4)
    model.set_env(envs(lengths=(5,)))
    model.learn(12, reset_num_timesteps=False)
    assert consecutive(model, 5)


def test_load_may_change_how_many_trajectories_are_kept(tmp_path: Path) -> None:
    make(envs(), train_freq=4, gradient_steps=0, buffer_trajectories=9).save(tmp_path / "model")
    loaded: Any = OffPolicyPG.load(tmp_path / "model", env=envs(), buffer_trajectories=2, device="cpu").learn(40)
    assert len(loaded.replay_buffer.trajectories) == 2


def test_an_old_buffer_does_not_pass_for_new(tmp_path: Path) -> None:
    """Its trajectories were collected after more updates than the new model has taken."""
    make(envs(), train_freq=(4, "episode"), gradient_steps=3).learn(33).save_replay_buffer(tmp_path / "buffer")
    model = make(envs(), train_freq=(4, "episode"), gradient_steps=0)
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(11)
    assert all(chosen in model.replay_buffer.choose(5) for chosen in model.replay_buffer.trajectories[-4:])
    assert len([*iter(model.replay_buffer.drop_oldest, False)]) > 0
    assert [len(r) for r in stored_rewards(model)] == [3, 1, 5, 2]


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"optimize_memory_usage": True}, ValueError, "optimize_memory_usage=True"),
        ({"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}, ValueError, "action_noise.*log-prob"),
        ({"train_freq": (3, "episode")}, ValueError, r"\(3, 'episode'\).*multiple of the number of envs, 2"),
        ({"train_freq": (3, "rollout")}, ValueError, r"train_freq\[1\].*'rollout'"),
        ({"train_freq": 0}, ValueError, r"train_freq\[0\].*0"),
        ({"gradient_steps": -2}, ValueError, "gradient_steps.*-2"),
        ({"ratio": "per_episode"}, ValueError, "ratio.*'trajectory'.*'per_episode'"),
        ({"max_ratio": 0}, ValueError, "max_ratio.*0"),
        ({"self_normalize": 1}, TypeError, "self_normalize"),
        ({"min_ess": 1.5}, ValueError, "min_ess.*1.5"),
        ({"batch_size": 0}, ValueError, "batch_size.*0"),
        ({"buffer_size": 0}, ValueError, "buffer_size.*0"),
        ({"buffer_trajectories": 0}, ValueError, "buffer_trajectories.*0"),
        ({"learning_starts": -1}, ValueError, "learning_starts.*-1"),
        ({"behavior_policy": "uniform"}, TypeError, "behavior_policy.*'uniform'"),
        ({"replay_buffer_class": ReplayBuffer}, TypeError, "replay_buffer_class.*TrajectoryReplayBuffer"),
        ({"n_episodes": 4}, TypeError, "no argument 'n_episodes'"),
        ({"returns": "total", "truncation": "bootstrap"}, ValueError, "truncation='bootstrap'"),
        ({"baseline": "leave_one_out", "train_freq": 8}, ValueError, "leave_one_out.*at least 2 episodes"),
        ({"baseline": "leave_one_out", "batch_size": 1}, ValueError, "leave_one_out.*at least 2 episodes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_arguments_are_checked(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(envs(2), **kwargs)


def test_a_space_without_volume_has_no_uniform_warm_up() -> None:
    env = ScriptedEnv(action_space=spaces.Box(np.array([0, -1], np.float32), np.array([0, 1], np.float32)))
    with pytest.raises(ValueError, match=r"learning_starts > 0.*set it to 0"):
        make(env, learning_starts=10)
    make(env, train_freq=4).learn(8)
    make(env, train_freq=4, learning_starts=10, behavior_policy=lambda _: (np.zeros((1, 2)), np.zeros(1))).learn(8)


def test_an_impossible_action_is_an_error_and_is_not_stored() -> None:
    calls: list[int] = []

    def behavior(_: Any) -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        return np.zeros(1, dtype=int), np.full(1, -1.0 if len(calls) < 8 else -np.inf)

    model = make(envs(), behavior_policy=behavior, train_freq=(4, "episode"))
    before = parameters(model)
    with pytest.raises(ValueError, match=r"positive, finite probability.*-inf for env 0"):
        model.learn(11)
    assert model.replay_buffer.trajectories == []
    assert th.equal(parameters(model), before)


def test_of_logged_trajectories_one_that_is_bad_spoils_all() -> None:
    model = make(envs())
    good, bad = with_ratios(model, [1, 1], [1, 1])
    bad.log_probs[1] = -np.inf
    with pytest.raises(ValueError, match=r"log_probs.*-inf at \[1\].*probability 0"):
        model.add_trajectories(iter([good, bad]))
    assert model.replay_buffer.trajectories == []


def test_an_episode_must_fit_into_the_buffer() -> None:
    with pytest.raises(ValueError, match="buffer_size=4 steps, got 5"):
        make(envs(), buffer_size=4, train_freq=(4, "episode")).learn(20)


# ---------------------------------------------------------------- learning


class TwoSteps(gym.Env[Any, Any]):
    """Action 0 pays 1/2, action 2 pays 1, and which step it is is all there is to see."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(3)
        self.t = 0

    def _obs(self) -> Any:
        return np.eye(2, dtype=np.float32)[min(self.t, 1)]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._obs(), (0.5, 0.0, 1.0)[int(action)], self.t == 2, False, {}


@pytest.mark.parametrize("ratio", ["per_step", "per_decision", "trajectory"])
def test_it_learns_from_what_others_do(ratio: str) -> None:
    """Of a behavior that takes action 0 with probability 0.8; without weights it would learn that."""
    rng = np.random.default_rng(0)
    p = np.array([0.8, 0.1, 0.1])

    def behavior(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = rng.choice(3, len(obs), p=p)
        return actions, np.log(p[actions])

    model = make(
        vec(*(TwoSteps() for _ in range(4))),
        behavior_policy=behavior,
        ratio=ratio,
        baseline="none",
        train_freq=(32, "episode"),
        buffer_trajectories=256,
        gradient_steps=8,
        learning_rate=3e-2,
    )
    model.learn(64 * 8)
    probabilities = model.policy.get_distribution(th.eye(2)).distribution.probs
    assert probabilities[:, 2].min() > 0.9
