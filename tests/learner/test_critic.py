"""How ActorCritic trains its critic: scaled targets, warm-up, passes that follow the critic, online, without an end."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_pg import ActorCritic, NonFiniteError
from sb3_pg.learner.critic import ReturnScale
from tests.algorithms.clock import N_TIMES, VALUES, ClockEnv, clock_model, set_values, update, values_of
from tests.helpers import ScriptedEnv, vec

if TYPE_CHECKING:
    from pathlib import Path

V = np.array(VALUES)
TD: dict[str, Any] = {"n_steps": 3, "advantage": "td", "gamma": 0.5}
#: TD targets of the first three steps of a longer episode: r + V(s') / 2.
FIRST = np.array([1 + 10, 2 + 20, 3 + 40], dtype=float)


def flat(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=float).flatten()


# --- normalize_value_targets ---


@pytest.mark.parametrize(
    "arguments", [{"n_steps": 5}, {"n_steps": None, "n_episodes": 4}], ids=["segments", "episodes"]
)
def test_the_scale_is_the_standard_deviation_of_all_targets(arguments: dict[str, Any]) -> None:
    """Padding does not count, and the critic's learning does not matter."""
    envs = ClockEnv(lengths=(3, 1)), ClockEnv(lengths=(4,), truncate=(True,), first_reward=50)
    model = clock_model(*envs, normalize_value_targets=True, learning_rate=1e-3, **arguments)
    assert model.value_scale == 1.0
    seen: list[float] = []
    for _ in range(5):
        batch = update(model)
        seen += batch.select(batch.returns).tolist()
        assert model.value_scale == pytest.approx(np.std(seen), rel=1e-6)
    assert (~batch.valid).any() == ("n_episodes" in arguments)


def test_without_it_the_scale_is_one() -> None:
    model = clock_model(ClockEnv())
    update(model, 3)
    assert model.value_scale == 1.0


def test_targets_that_are_all_equal_have_no_scale() -> None:
    scale = ReturnScale()
    assert scale.value == 1.0
    assert scale.updated(th.full((7,), 1e6 / 3)).value == 1.0
    assert scale.updated(th.tensor([3.0])).updated(th.tensor([5.0])).value == pytest.approx(1.0)  # (5 - 3) / 2
    assert scale.value == 1.0  # itself it stays as it is


def test_values_are_in_reward_units_wherever_they_are_used() -> None:
    """The critic says VALUES before and after; it means VALUES times the scale, at the cut too."""
    model = clock_model(ClockEnv(lengths=(N_TIMES - 1,)), normalize_value_targets=True, **TD)
    batch = update(model)
    assert flat(batch.returns) == pytest.approx(FIRST)  # nothing is known of the scale yet
    scale = FIRST.std()
    batch = update(model)
    assert flat(batch.values) == pytest.approx(scale * V[3:6])
    assert flat(batch.bootstrap(0.5)) == pytest.approx([0, 0, scale * V[6]])
    returns = np.array([4, 5, 6]) + scale * V[4:7] / 2
    assert flat(batch.returns) == pytest.approx(returns)
    assert flat(batch.advantages) == pytest.approx(returns - scale * V[3:6])
    assert flat(model.rollout_buffer.values) == pytest.approx(scale * V[3:6])
    assert flat(model.rollout_buffer.advantages) == pytest.approx(returns - scale * V[3:6])
    assert model.value_scale == pytest.approx(np.std([*FIRST, *returns]))


def test_generalized_advantages_of_scaled_values() -> None:
    """delta_t + gamma lambda A_{t+1}, with the scale of the update before."""
    env = ClockEnv(lengths=(3,))
    model = clock_model(env, n_steps=3, gamma=0.5, gae_lambda=0.25, normalize_value_targets=True)
    scale = np.std(flat(update(model).returns))
    batch = update(model)
    v = scale * V[:3]
    delta = [4 + v[1] / 2 - v[0], 5 + v[2] / 2 - v[1], 6 - v[2]]
    a1 = delta[1] + delta[2] / 8
    assert flat(batch.advantages) == pytest.approx([delta[0] + a1 / 8, a1, delta[2]])


def test_the_critic_is_trained_on_scaled_targets() -> None:
    """In the actor's step: dV = (y / scale - V) / 3. By itself with rate 3/2 it gets all the way to y / scale."""
    scaled = FIRST / FIRST.std()
    env = {"lengths": (N_TIMES - 1,)}
    joint = clock_model(ClockEnv(**env), learning_rate=1.0, vf_coef=0.5, normalize_value_targets=True, **TD)
    update(joint)
    assert values_of(joint) == pytest.approx([*(V[:3] + (scaled - V[:3]) / 3), *V[3:]])
    after = clock_model(ClockEnv(**env), critic_learning_rate=1.5, normalize_value_targets=True, **TD)
    update(after)
    assert values_of(after) == pytest.approx([*scaled, *V[3:]])
    before = clock_model(
        ClockEnv(**env), critic_learning_rate=1.5, normalize_value_targets=True, critic_fit="before", **TD
    )
    batch = update(before)
    assert values_of(before) == pytest.approx([*scaled, *V[3:]])
    # What the fitted critic means by that: the targets themselves, and at the cut what it said of it, scaled.
    cut = FIRST.std() * V[3]
    assert flat(batch.returns - batch.advantages) == pytest.approx(FIRST)
    assert flat(batch.bootstrap(0.5)) == pytest.approx([0, 0, cut])
    assert flat(batch.returns) == pytest.approx([1 + FIRST[1] / 2, 2 + FIRST[2] / 2, 3 + cut / 2])


def test_the_scale_is_saved_and_loaded(tmp_path: Path) -> None:
    model = clock_model(ClockEnv(), normalize_value_targets=True, **TD)
    first = flat(update(model).returns)
    model.save(tmp_path / "model")
    loaded = ActorCritic.load(tmp_path / "model", env=vec(ClockEnv()), device="cpu")
    assert loaded.value_scale == model.value_scale == pytest.approx(first.std())
    again = flat(update(loaded).returns)
    assert loaded.value_scale == pytest.approx(np.std([*first, *again]))  # the count is saved as well
    assert ActorCritic.load(tmp_path / "model", device="cpu").value_scale == model.value_scale


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_the_scale_is_restored_when_an_update_fails(on_nonfinite: str) -> None:
    """A reward of 1e30 is finite, but the gradient's norm is not."""
    env = ClockEnv()
    model = clock_model(
        env, n_steps=3, normalize_value_targets=True, learning_rate=1e-3, on_nonfinite=on_nonfinite, critic_target="td"
    )
    update(model)
    scale, weights = model.value_scale, copy.deepcopy(model.policy.state_dict())
    env.reward = 1e30
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteError):
            update(model)
    else:
        with pytest.warns(UserWarning, match="skipped"):
            update(model)
    assert model.value_scale == scale
    assert all(th.equal(weights[name], now) for name, now in model.policy.state_dict().items())
    env.reward = 1.0
    batch = update(model)
    assert model.value_scale != scale
    assert batch.returns.abs().max() < 1e4  # nothing of it is left


@pytest.mark.parametrize(
    "critic_fit",
    [
        "after",
        "before",
    ],
)
def test_the_critic_learns_on_after_an_update_that_fails(critic_fit: Literal["after", "before"]) -> None:
    """Adam divides by the root of its second moment: once that is infinite, nothing moves any more."""
    env = ClockEnv()
    model = ActorCritic(
        "MlpPolicy",
        vec(env),
        n_steps=3,
        critic_fit=critic_fit,
        critic_learning_rate=1e-2,
        on_nonfinite="skip",
        device="cpu",
    )
    update(model)
    env.reward = 1e30
    with pytest.warns(UserWarning, match="skipped"):
        update(model)
    env.reward = 1.0
    before = model.policy.value_net.weight.detach().clone()
    update(model)
    assert not th.equal(model.policy.value_net.weight, before)


# --- critic_warmup_updates ---


class Features(BaseFeaturesExtractor):
    """Features with parameters, which actor and critic share by SB3's default."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, features_dim=4)
        self.layer = th.nn.Linear(3, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.layer(observations))


def is_critics_own(name: str) -> bool:
    return "value_net" in name or name.startswith("vf_features_extractor")


EXTRACTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"features_extractor_class": Features},
    "own": {"features_extractor_class": Features, "share_features_extractor": False},
}
STEPS: dict[str, dict[str, Any]] = {
    "joint": {},
    "separate-after": {"critic_learning_rate": 1e-2, "n_critic_updates": 2},
    "separate-before": {"critic_learning_rate": 1e-2, "critic_fit": "before"},
}


@pytest.mark.parametrize("extractor", list(EXTRACTORS))
@pytest.mark.parametrize("step", list(STEPS))
def test_only_the_critic_moves_during_warmup(step: str, extractor: str) -> None:
    """The features that both share are the actor's too."""
    model = ActorCritic(
        "MlpPolicy",
        vec(ScriptedEnv(), ScriptedEnv(lengths=(2, 5), truncate=(True,))),
        n_steps=8,
        learning_rate=1e-2,
        ent_coef=0.1,
        critic_warmup_updates=2,
        policy_kwargs={"net_arch": [4], **EXTRACTORS[extractor]},
        device="cpu",
        seed=0,
        **STEPS[step],
    )
    for i in range(4):
        before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
        update(model)
        moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
        critics = {name for name in before if is_critics_own(name)}
        assert moved == (critics if i < 2 else set(before))


@pytest.mark.parametrize("step", list(STEPS))
def test_warmup_is_what_the_critic_learns_anyway(step: str) -> None:
    """With actions that change nothing, the critic is trained by the same numbers whether the actor moves or not."""
    found = []
    for warmup in (0, 3):
        model = clock_model(ClockEnv(), learning_rate=0.1, critic_warmup_updates=warmup, **{**STEPS[step], **TD})
        update(model, 3)
        found.append(values_of(model))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][:3] != pytest.approx(VALUES[:3], rel=1e-3)


@pytest.mark.parametrize(
    "step",
    [
        "joint",
        "separate-after",
        "separate-before",
    ],
)
def test_warmup_with_a_frozen_part_of_the_critic(step: str) -> None:
    model = clock_model(ClockEnv(), learning_rate=0.1, critic_warmup_updates=1, **{**STEPS[step], **TD})
    model.policy.value_net.bias.requires_grad_(False)
    update(model)
    assert model.policy.value_net.bias.item() == 0.0
    assert values_of(model)[:3] != pytest.approx(VALUES[:3], rel=1e-3)


# --- recompute_advantage ---

#: What TD makes of V = 10, 20, 40 in an episode with rewards 1, 2, 3, pass by pass, where each gets all the way.
PASSES = [(1 + 10, 2 + 20, 3), (1 + 11, 2 + 1.5, 3), (1 + 1.75, 2 + 1.5, 3), (2.75, 3.5, 3)]


@pytest.mark.parametrize("critic_fit", ["before", "after"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_targets_follow_the_critic_pass_by_pass(n: int, critic_fit: str) -> None:
    arguments = {**TD, "critic_learning_rate": 1.5, "n_critic_updates": n, "critic_fit": critic_fit}
    following = clock_model(ClockEnv(), recompute_advantage=True, **arguments)
    batch = update(following)
    assert values_of(following)[:3] == pytest.approx(PASSES[n - 1])
    assert values_of(following)[3:] == list(VALUES[3:])
    fixed = clock_model(ClockEnv(), **arguments)
    fixed_batch = update(fixed)
    assert values_of(fixed)[:3] == pytest.approx(PASSES[0])
    if critic_fit == "before":  # advantages by the critic as it is after all passes
        again = PASSES[min(n, 3)]
        assert flat(batch.returns) == pytest.approx(again)
        assert flat(batch.advantages) == pytest.approx(np.subtract(again, PASSES[n - 1]), abs=1e-5)
        assert flat(fixed_batch.advantages) == pytest.approx(np.subtract(PASSES[1], PASSES[0]), abs=1e-5)


def test_passes_value_the_cut_anew() -> None:
    """A critic that says the same c of all states: y = r + c / 2, and the cut is worth the new c."""
    model = clock_model(
        ClockEnv(lengths=(N_TIMES - 1,)),
        **{**TD, "n_steps": 1},
        critic_learning_rate=0.5,
        n_critic_updates=2,
        recompute_advantage=True,
    )
    set_values(model, [0.0] * N_TIMES)
    model.critic_optimizer = th.optim.SGD([model.policy.value_net.bias], lr=0.0)
    update(model)
    assert model.policy.value_net.bias.item() == pytest.approx(1 + 1 / 2)  # 0 -> 1 + 0 / 2 -> 1 + 1 / 2


@pytest.mark.parametrize(
    "recompute_advantage",
    [False, True],
)
def test_the_actor_is_explained_by_the_advantages_it_was_moved_by(recompute_advantage: bool) -> None:
    """For a small step what the surrogate gains is what its gradient predicts, whatever the critic does afterwards."""
    model = clock_model(
        ClockEnv(lengths=(N_TIMES - 1,)),
        learning_rate=1e-5,
        **TD,
        critic_learning_rate=1.5,
        n_critic_updates=3,
        recompute_advantage=recompute_advantage,
    )
    model.learn(3, log_interval=2)  # the update before the log is written
    logged = model.logger.name_to_value
    assert logged["train/surrogate_realized"] == pytest.approx(logged["train/surrogate_predicted"], rel=0.02)


# --- online ---


class OnlineActorCritic:
    """One-step actor-critic (Sutton and Barto 2018, section 13.5) with tables, the critic first; NumPy, float64."""

    def __init__(self, model: ActorCritic, learning_rate: float, critic_learning_rate: float) -> None:
        actor: Any = model.policy.action_net
        self.weight, self.bias = (p.detach().double().numpy().copy() for p in (actor.weight, actor.bias))
        self.v = V.copy()
        self.gamma, self.rates = model.gamma, (learning_rate, critic_learning_rate)

    def step(self, transitions: list[tuple[int, int, float, int | None]]) -> None:
        """:param transitions: (s_t, a_t, r_t, s_{t+1}) of each env, None for a state that ended the episode"""
        n = len(transitions)
        errors = [self.error(s, r, s_next) for s, _, r, s_next in transitions]
        for (s, *_), error in zip(transitions, errors, strict=True):
            self.v[s] += self.rates[1] * 2 * error / n
        weight, bias = self.weight.copy(), self.bias.copy()
        for s, a, r, s_next in transitions:
            odds = np.exp(weight[:, s] + bias)
            score = np.eye(len(bias))[a] - odds / odds.sum()
            step = self.rates[0] * self.gamma**s * self.error(s, r, s_next) * score / n
            self.weight[:, s] += step
            self.bias += step

    def error(self, s: int, r: float, s_next: int | None) -> float:
        return float(r + (0.0 if s_next is None else self.gamma * self.v[s_next]) - self.v[s])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_online(n_envs: int) -> None:
    """Twelve updates of one step each, through terminal states and time limits, against the plain algorithm."""
    rates = 0.05, 0.3
    envs = [ClockEnv(lengths=(3 + i, 2), truncate=(i == 1, True), first_reward=1 + 5 * i) for i in range(n_envs)]
    model = clock_model(
        *envs,
        n_steps=1,
        advantage="td",
        gamma=0.5,
        state_discount=True,
        critic_fit="before",
        learning_rate=rates[0],
        critic_learning_rate=rates[1],
    )
    plain = OnlineActorCritic(model, *rates)
    start = [0] * n_envs
    n_terminal = n_limits = 0
    for k in range(12):
        episodes = [env.episode for env in envs] if k else [0] * n_envs
        update(model)
        transitions: list[tuple[int, int, float, int | None]] = []
        for i, env in enumerate(envs):
            ended = env.episode != episodes[i]
            limit = env.truncate[episodes[i] % 2]
            n_terminal, n_limits = n_terminal + (ended and not limit), n_limits + (ended and limit)
            s_next = None if ended and not limit else start[i] + 1
            transitions.append((start[i], int(env.actions[-1]), 1 + 5 * i + k, s_next))
            start[i] = 0 if ended else start[i] + 1
        plain.step(transitions)
        assert values_of(model) == pytest.approx(plain.v, rel=1e-5)
        actor: Any = model.policy.action_net
        assert flat(actor.weight.detach()) == pytest.approx(flat(plain.weight), abs=1e-4)
        assert flat(actor.bias.detach()) == pytest.approx(flat(plain.bias), abs=1e-4)
    assert n_terminal >= 2
    assert n_limits >= 2
    assert model._n_updates == 12
    assert model.num_timesteps == 12 * n_envs


# --- no end ---


class EndlessEnv(ScriptedEnv):
    """One state; action 1 earns ``good``, the others nothing."""

    def __init__(self, good: float = 1.0, otherwise: float = 0.0) -> None:
        super().__init__(lengths=(10**9,), observation_space=spaces.Discrete(1), action_space=spaces.Discrete(2))
        self.good, self.otherwise = good, otherwise

    def _obs(self) -> int:
        return 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, self.good if action == 1 else self.otherwise, terminated, truncated, info


def endless_model(env: EndlessEnv, **arguments: Any) -> ActorCritic:
    chosen = {
        "n_steps": 5,
        "gamma": 0.9,
        "max_grad_norm": None,
        "use_rms_prop": False,
        "policy_kwargs": {"net_arch": [], "optimizer_class": th.optim.SGD},
        "device": "cpu",
        "seed": 0,
        **arguments,
    }
    return ActorCritic("MlpPolicy", vec(env), **chosen)


def value(model: ActorCritic) -> float:
    return float(model.policy.predict_values(th.zeros((1, 1), dtype=th.long)).detach())


@pytest.mark.parametrize(
    ("advantage", "left"),
    [
        ("td", [0.9]),
        ("n_step", [0.9, 0.9**2, 0.9**3, 0.9**3, 0.9**3]),  # as they come: 3, 3, 3, 2, 1 rewards
        ("monte_carlo", [0.9, 0.9**2, 0.9**3, 0.9**4, 0.9**5]),  # up to the cut
    ],
)
def test_value_of_a_task_without_end(advantage: str, left: list[float]) -> None:
    r"""A reward of 1 for ever is worth :math:`V^* = 1 / (1 - \gamma) = 10`.

    With k rewards before the critic's value, :math:`y - V^* = \gamma^k (V - V^*)`. Weight and bias both move by
    -rate vf_coef 2 mean(V - y), so that with rate 1/4 and vf_coef 1/2 the error is multiplied by
    :math:`1 - \frac12 (1 - \overline{\gamma^k})` in every update, exactly.
    """
    env = EndlessEnv(otherwise=1.0)
    model: Any = endless_model(env, advantage=advantage, td_steps=3, learning_rate=0.25)
    error = value(model) - 10
    factor = 1 - (1 - float(np.mean(left))) / 2
    for n_updates in (1, 9, 190):
        update(model, n_updates)
        error *= factor**n_updates
        assert value(model) - 10 == pytest.approx(error, abs=1e-4)
    assert abs(error) < 1e-3
    assert env.resets == 1
    assert not model.rollout_buffer.dones.any()
    assert model.rollout_buffer.timesteps[-1, 0] == model.num_timesteps - 1 == 999


def test_learning_without_end() -> None:
    """The good action's share p grows to nearly 1, and V to p / (1 - gamma).

    A bad action lowers the returns before it by 1 in all times 1 / (1 - gamma lambda) = 5.3, their mean by 0.53 and V
    by 0.2 times that, 0.1. There is less than one of them in ten updates in the end, so 0.5 is far away.
    """
    model: Any = endless_model(EndlessEnv(), n_steps=10, learning_rate=0.2, gae_lambda=0.9)
    update(model, 400)
    with th.no_grad():
        p = float(model.policy.get_distribution(th.zeros((1, 1), dtype=th.long)).distribution.probs[0, 1])
    assert p > 0.97
    assert value(model) == pytest.approx(10 * p, abs=0.5)
