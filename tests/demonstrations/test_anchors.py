"""Anchors in every policy-gradient class: what they hold, what they leave alone, and what is stored of them."""

import copy
import io
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_pg import (
    NPG,
    ActorCritic,
    DemonstrationLoss,
    Demonstrations,
    KLAnchor,
    KLPenaltyPG,
    Memory,
    NonFiniteError,
    OffPolicyPG,
    Reinforce,
)
from sb3_pg.errors import DamagedFileError
from sb3_pg.learner import Anchor, Bootstrapped, GradientStep, Learner
from sb3_pg.rollout import Collector
from tests.algorithms.every_algorithm import ALGORITHMS, CLASSES, FEW_STEPS
from tests.algorithms.steps import update
from tests.demonstrations.demos import Masked, cart_poles, demos_in, masked_demos
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, parameters, policy_for, two_envs, vec

pytestmark = [pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"), pytest.mark.usefixtures("one_thread")]
SMALL: dict[str, Any] = {"device": "cpu", "seed": 0}
ALL = (*CLASSES, OffPolicyPG)
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
each_class = pytest.mark.parametrize("cls", ALL)


def make(name: str, env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    return ALGORITHMS[name](env, **{**SMALL, **kwargs})


def actor_critic(env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    return ActorCritic(kwargs.pop("policy", "MlpPolicy"), env, **{**SMALL, **kwargs})


def divergence(first: Any, now: Any, env: Any) -> float:
    """Mean KL between two policies at states of an env, without the library's own."""
    rows = [env.reset(), *(env.step(np.arange(env.num_envs) % 2)[0] for _ in range(20))]
    obs = obs_as_tensor(np.concatenate(rows), th.device("cpu"))
    with th.no_grad():
        p, q = (policy.get_distribution(obs).distribution.logits.log_softmax(1) for policy in (first, now))
    return float((p.exp() * (p - q)).sum(1).mean())


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("anchor", [KLAnchor(0.0), DemonstrationLoss(cart_poles(), 0.0)], ids=["kl", "nll"])
@each_algorithm
def test_without_weight_it_changes_nothing(name: str, anchor: Anchor) -> None:
    """Nor does it draw random numbers."""
    found = []
    for given in (None, anchor):
        model = make(name, anchor=given).learn(300)
        found.append((parameters(model), th.get_rng_state()))
    assert all(th.equal(one, other) for one, other in zip(*found, strict=True))
    assert model.anchor.n_updates == model._n_updates
    assert "anchor/coef" not in model.logger.name_to_value


@each_algorithm
def test_the_policy_stays_near_the_first_one(name: str) -> None:
    fast = {} if name.startswith(("npg", "trpo")) else {"learning_rate": 0.02}
    found = []
    for anchor in (None, KLAnchor(30.0)):
        model = make(name, **fast, anchor=anchor)
        first = copy.deepcopy(model.policy)
        model.learn(600)
        found.append(divergence(first, model.policy, make_vec_env("CartPole-v1", 2, seed=1)))
    assert found[1] < 0.5 * found[0]


@each_algorithm
def test_the_demonstrations_become_likelier(name: str) -> None:
    demos, found = cart_poles(), []
    for anchor in (None, DemonstrationLoss(demos, 10.0, batch_size=16)):
        model = make(name, anchor=anchor).learn(600)
        with th.no_grad():
            _, log_prob, _ = model.policy.evaluate_actions(th.as_tensor(demos.observations), th.ones(64))
        found.append(float(log_prob.mean()))
    assert found[1] > found[0] + 0.02


def test_the_critic_gets_no_gradient_of_it() -> None:
    """Shared features do, as of the policy's loss."""
    critics, actors = [], []
    for anchor in (None, DemonstrationLoss(cart_poles(), 5.0)):
        kwargs = {"policy_kwargs": {"optimizer_class": th.optim.SGD}, "max_grad_norm": None, "learning_rate": 0.1}
        model = actor_critic(anchor=anchor, **kwargs)
        model.learn(5)
        critics.append([p.detach().clone() for p in model.learner.critic_only.values()])
        actors.append(parameters(model.policy.action_net))
    assert all(th.equal(one, other) for one, other in zip(*critics, strict=True))
    assert not th.equal(*actors)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [*(("vector", name) for name in ACTION_SPACES), ("discrete", "box"), ("dict", "discrete"), ("image", "box")],
)
@pytest.mark.parametrize("cls", [ActorCritic, NPG])
def test_every_space(cls: Any, observations: str, actions: str) -> None:
    seen, taken = OBSERVATION_SPACES[observations], ACTION_SPACES[actions]
    for anchor in (KLAnchor(1.0), DemonstrationLoss(demos_in(seen, taken), 1.0, batch_size=6)):
        model = cls(policy_for(seen), two_envs(taken, seen), anchor=anchor, **FEW_STEPS[cls], **SMALL)
        model.learn(16)
        first = model.logger.name_to_value[f"anchor/{anchor.name}"]
        assert first == pytest.approx(0.0, abs=1e-5) if anchor.name == "kl" else np.isfinite(first)
        model.learn(32, reset_num_timesteps=False)
        assert np.isfinite(model.logger.name_to_value[f"anchor/{anchor.name}"])
        assert model.anchor.n_updates == 3


@pytest.mark.parametrize("cls", [ActorCritic, NPG])
def test_squashed_actions_and_gsde(cls: Any) -> None:
    taken = spaces.Box(np.array([0, -3], np.float32), np.array([2, 1], np.float32), dtype=np.float32)
    demos = demos_in(OBSERVATION_SPACES["vector"], taken)
    for anchor in (KLAnchor(1.0), DemonstrationLoss(demos, 1.0, batch_size=None)):
        kwargs = {"use_sde": True, "policy_kwargs": {"squash_output": True}, **FEW_STEPS[cls], **SMALL}
        model = cls("MlpPolicy", two_envs(taken), anchor=anchor, **kwargs).learn(16)
        if anchor.name == "kl":
            assert model.logger.name_to_value["anchor/kl"] == pytest.approx(0.0, abs=1e-5)
            continue
        fresh = cls("MlpPolicy", two_envs(taken), **kwargs)
        drawn = th.as_tensor((demos.actions - taken.low) / (taken.high - taken.low) * 2 - 1)
        _, log_prob, _ = fresh.policy.evaluate_actions(th.as_tensor(demos.observations), drawn)
        assert model.logger.name_to_value["anchor/nll"] == pytest.approx(-log_prob.mean().item(), rel=1e-4)


@each_class
def test_action_masks(cls: Any) -> None:
    env = vec(*(Masked((3, 5)) for _ in range(2)))
    with pytest.raises(ValueError, match=r"actions must be allowed by the action_mask of their step, got 2 at step 5"):
        cls("MlpPolicy", env, anchor=DemonstrationLoss(masked_demos(forbidden=True), 1.0), **FEW_STEPS[cls], **SMALL)
    for anchor in (KLAnchor(1.0), DemonstrationLoss(masked_demos(forbidden=False), 1.0)):
        model = cls("MlpPolicy", env, anchor=anchor, **FEW_STEPS[cls], **SMALL).learn(64)
        assert model._n_updates > 1
        assert parameters(model).isfinite().all()
        assert model.logger.name_to_value[f"anchor/{anchor.name}"] < np.log(2) + 0.5


@each_class
def test_memory(cls: Any) -> None:
    """The first update finds no divergence, in pieces of episodes too; demonstrations are scored from their start."""
    demos = demos_in(OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"])
    for anchor in (KLAnchor(1.0), DemonstrationLoss(demos, 1.0, batch_size=None)):
        kwargs = {"memory": Memory("lstm", 8), **FEW_STEPS[cls], **SMALL}
        kwargs |= {"gradient_steps": 1} if cls is OffPolicyPG else {}
        model = cls("MlpPolicy", two_envs(), anchor=anchor, **kwargs)
        first = copy.deepcopy(model.policy)
        model.learn(1)
        found = model.logger.name_to_value[f"anchor/{anchor.name}"]
        if anchor.name == "kl":
            assert found < 1e-3 if cls is KLPenaltyPG else found == pytest.approx(0.0, abs=1e-6)
            continue
        expected = []
        for steps in demos.episodes:
            state = None
            for t in range(steps.start, steps.stop):
                seen = th.as_tensor(demos.observations[t : t + 1])
                distribution, state = first.next_distribution(seen, state)
                expected.append(-distribution.log_prob(th.as_tensor(demos.actions[t : t + 1])).item())
        if cls is not KLPenaltyPG:  # there the policy has moved
            assert found == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize(("size", "n_episodes"), [(1, 1), (15, 2)])
def test_the_mean_over_drawn_episodes_is_that_of_all_steps(size: int, n_episodes: int) -> None:
    """An episode that is drawn has 86 / 12 steps on average."""
    lengths = np.array([1, 2, 9, 1, 2, 9])
    n = int(lengths.sum())
    demos: Any = Demonstrations(
        np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32),
        np.repeat([0, 0, 1, 0, 0, 1], lengths),
        terminated=np.isin(np.arange(n), lengths.cumsum() - 1),
    )
    policy: Any = actor_critic(two_envs(), memory=Memory("gru", 4)).policy
    policy.action_net.bias.data = th.tensor([-1.0, 1.0, 0.0])

    def score(first: int, last: int) -> float:
        state, total = None, 0.0
        for t in range(first, last):
            distribution, state = policy.next_distribution(th.as_tensor(demos.observations[t : t + 1]), state)
            total -= distribution.log_prob(th.as_tensor(demos.actions[t : t + 1])).item()
        return total

    anchor = DemonstrationLoss(demos, 1.0, batch_size=size)
    th.manual_seed(0)
    with th.no_grad():
        totals = np.array([score(episode.start, episode.stop) for episode in demos.episodes])
        found = np.array([float(anchor.draw(policy)(None, None)) for _ in range(1000)])
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - totals.sum() / n) < 4 * error
    assert abs((totals / lengths).mean() - totals.sum() / n) > 10 * error  # were all episodes equally likely
    means = np.array(list(itertools.product(totals / lengths, repeat=n_episodes))).mean(axis=1)
    assert np.abs(found[:, None] - means).min(axis=1).max() < 1e-5


def test_observations_are_normalized_as_the_envs_are_now() -> None:
    demos = cart_poles()
    env = VecNormalize(make_vec_env("CartPole-v1", 2, seed=0))
    anchor = DemonstrationLoss(demos, 1.0, batch_size=None)
    model = actor_critic(env, anchor=anchor)
    model.learn(20)
    before = copy.deepcopy(model.policy)
    model.learn(10, reset_num_timesteps=False, log_interval=1)
    seen = th.as_tensor(env.normalize_obs(demos.observations))
    _, log_prob, _ = before.evaluate_actions(seen, th.ones(64))
    assert model.logger.name_to_value["anchor/nll"] == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    raw = before.evaluate_actions(th.as_tensor(demos.observations), th.ones(64))[1]
    assert abs((raw.mean() - log_prob.mean()).item()) > 1e-4


def test_images_with_channels_last() -> None:
    demos = demos_in(OBSERVATION_SPACES["image"], ACTION_SPACES["discrete"])
    model = actor_critic(two_envs(observation_space=OBSERVATION_SPACES["image"]), policy="CnnPolicy")
    assert model.observation_space.shape == (1, 36, 36)
    model.anchor = DemonstrationLoss(demos, 1.0, batch_size=None)
    with th.no_grad():
        seen = th.as_tensor(demos.observations).permute(0, 3, 1, 2)
        expected = -model.policy.evaluate_actions(seen, th.as_tensor(demos.actions))[1].mean()
        found = model.anchor.draw(model.policy)(None, None)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# ---------------------------------------------------------------- what counts as an update


def test_updates_of_the_critic_alone_do_not_count() -> None:
    model = actor_critic(anchor=KLAnchor(1.0), critic_warmup_updates=3)
    model.learn(15)
    assert (model._n_updates, model.anchor.n_updates, model.anchor.reference) == (3, 0, None)
    model.learn(10, reset_num_timesteps=False)
    assert model.anchor.n_updates == 2


@pytest.mark.filterwarnings("ignore:actions of .* are outside of")
@each_class
def test_a_failed_update_does_not_count(cls: Any) -> None:
    demos = demos_in(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"])
    impossible = Demonstrations(demos.observations, np.full_like(demos.actions, 1e30))
    kwargs: dict[str, Any] = {"on_nonfinite": "skip", **FEW_STEPS[cls], **SMALL}
    model = cls("MlpPolicy", two_envs(ACTION_SPACES["box"]), anchor=DemonstrationLoss(demos, 1.0), **kwargs).learn(64)
    n_updates, n_skipped = model.anchor.n_updates, model._n_skipped
    assert n_updates > 1
    model.anchor.demos = impossible
    before = parameters(model)
    with pytest.warns(UserWarning, match=r"Update skipped: anchor/nll is (inf|nan).*never takes an action"):
        model.learn(1, reset_num_timesteps=False)
    assert th.equal(parameters(model), before)
    assert model._n_skipped > n_skipped
    assert model.anchor.n_updates == n_updates
    model.on_nonfinite = "raise"
    with pytest.raises(NonFiniteError, match=r"anchor/nll is (inf|nan)"):
        model.learn(1, reset_num_timesteps=False)


def test_a_divergence_of_rounding_errors_makes_no_step() -> None:
    """NPG's step has a length of its own, however small the gradient is."""

    class Same(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 1.0, *rest

    kwargs: dict[str, Any] = {"advantage": "monte_carlo", "n_steps": None, "n_episodes": 2, "gamma": 0.0}
    model: Any = NPG("MlpPolicy", vec(Same(), Same()), anchor=KLAnchor(1e3), learning_rate=0.0, **kwargs, **SMALL)
    for parameter in model.learner.critic_only.values():
        parameter.data.zero_()
    actor = [parameter.detach().clone() for parameter in model.learner.actor.values()]
    update(model)
    assert model.logger.name_to_value["train/step_outcome"] == "zero_gradient"
    assert all(th.equal(then, now) for then, now in zip(actor, model.learner.actor.values(), strict=True))


def test_one_anchor_for_several_models() -> None:
    """Each model keeps a copy: the user's anchor remembers nothing."""
    anchor = KLAnchor(1.0, decay=0.9)
    models: list[Any] = [actor_critic(anchor=anchor, seed=i).learn(20) for i in range(2)]
    assert (anchor.n_updates, anchor.reference) == (0, None)
    first, second = (model.anchor.reference["action_net.weight"] for model in models)
    assert not th.equal(first, second)
    assert models[0].anchor.weight == pytest.approx(0.9**4)


def test_another_anchor_begins_with_the_policy_as_it_is() -> None:
    model = actor_critic(anchor=KLAnchor(1.0)).learn(20)
    model.anchor = KLAnchor(1.0, 0.5)
    now = model.policy.action_net.weight.detach().clone()
    model.learn(10, reset_num_timesteps=False)
    assert th.equal(model.anchor.reference["action_net.weight"], now)
    assert model.anchor.weight == 0.25
    now = model.policy.action_net.weight.detach().clone()
    model.anchor.restart()
    model.learn(5, reset_num_timesteps=False)
    assert th.equal(model.anchor.reference["action_net.weight"], now)
    assert model.anchor.n_updates == 1


def test_pretraining_makes_another_first_policy() -> None:
    model = actor_critic(anchor=KLAnchor(1.0, 0.5)).learn(20)
    model.pretrain(cart_poles(), n_epochs=2, critic=False)
    assert (model.anchor.n_updates, model.anchor.reference) == (0, None)
    now = model.policy.action_net.weight.detach().clone()
    model.learn(10, reset_num_timesteps=False)
    assert th.equal(model.anchor.reference["action_net.weight"], now)
    assert model.anchor.weight == 0.25


def test_a_learner_without_algorithm() -> None:
    model = actor_critic()
    policy = model.policy
    env: Any = model.get_env()
    collector = Collector(policy, env)
    learner = Learner(policy, Bootstrapped(), GradientStep(), anchor=KLAnchor(2.0, decay=0.5))
    batches: Any = (collector.collect(n_steps=16) for _ in range(2))
    metrics = [learner.update(batch) for batch in batches]
    assert [m["anchor/coef"] for m in metrics] == [2.0, 1.0]
    kls = [th.as_tensor(m["anchor/kl"]).item() for m in metrics]
    assert abs(kls[0]) < 1e-7
    assert kls[1] > 1e-6


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("anchor", [KLAnchor(0.5, 0.9), DemonstrationLoss(cart_poles(), 0.5, 0.9)], ids=["kl", "nll"])
@each_class
def test_save_and_load(cls: Any, anchor: Anchor, tmp_path: Path) -> None:
    model = cls("MlpPolicy", "CartPole-v1", anchor=anchor, **FEW_STEPS[cls], **SMALL).learn(64)
    model.save(tmp_path / "model")
    loaded: Any = cls.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    assert type(loaded.anchor) is type(anchor)
    assert loaded.anchor.weight == model.anchor.weight == pytest.approx(0.5 * 0.9**model._n_updates)
    if anchor.name == "kl":
        theirs, ours = (one.anchor.reference for one in (loaded, model))
        assert theirs.keys() == ours.keys()
        assert all(th.equal(value, theirs[name]) for name, value in ours.items())
    else:
        for name in ("observations", "actions", "terminated", "truncated"):
            ours, theirs = (getattr(one.anchor.demos, name) for one in (model, loaded))
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
    loaded.learn(64)
    again = pickle.loads(pickle.dumps(model.anchor))
    assert again.weight == model.anchor.weight
    without = cls.load(tmp_path / "model", env="CartPole-v1", device="cpu", anchor=None)
    assert without.learn(64).anchor is None


def test_demonstrations_on_the_disk_stay_there(tmp_path: Path) -> None:
    cart_poles().save(tmp_path / "demos.npz")
    demos = Demonstrations.load(tmp_path / "demos.npz", mmap=True)
    model = actor_critic(anchor=DemonstrationLoss(demos, 0.5, 0.9)).learn(20)
    model.save(tmp_path / "model")
    loaded: Any = ActorCritic.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    with pytest.raises(
        ValueError, match=r"anchor's demonstrations, 64 .*, are in '.*demos.npz'.*model.anchor.demos = "
    ):
        loaded.learn(10)
    assert loaded.num_timesteps == 20
    loaded.anchor.demos = demos
    loaded.learn(5)
    assert loaded.anchor.n_updates == 5
    loaded.anchor.demos = demos.subset(2)  # the numbers count only where the file has left them out
    loaded.learn(5)


def mapped(tmp_path: Path, name: str) -> Demonstrations:
    """Demonstrations whose observations are memory-mapped: a part of an ``.npz``, or an ``.npy``."""
    demos: Any = cart_poles()
    demos.save(tmp_path / "demos.npz")
    np.save(tmp_path / "rows.npy", demos.observations)
    if name == "npz":
        return Demonstrations.load(tmp_path / "demos.npz", mmap=True).subset(1)
    return Demonstrations(np.load(tmp_path / "rows.npy", mmap_mode="r"), demos.actions, terminated=demos.terminated)


@pytest.mark.parametrize(("name", "wanted"), [("npz", "8 steps in 1 episode"), ("npy", "64 steps in 8 episodes")])
def test_other_demonstrations_than_those_on_the_disk_are_refused(name: str, wanted: str, tmp_path: Path) -> None:
    actor_critic(anchor=DemonstrationLoss(mapped(tmp_path, name), 0.5)).learn(10).save(tmp_path / "model")
    loaded: Any = ActorCritic.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    loaded.save(tmp_path / "again")
    loaded = ActorCritic.load(tmp_path / "again", env="CartPole-v1", device="cpu")
    advice = "Demonstrations.load(path, mmap=True)" if name == "npz" else "Demonstrations(...) of the same arrays"
    with pytest.raises(ValueError, match=rf"demonstrations, {wanted}, are in '.*{name}'.*{re.escape(advice)}$"):
        loaded.learn(10)
    with pytest.raises(ValueError, match=rf"demos must have {wanted}, .* got 32 steps in 4 episodes.*another Demonstr"):
        loaded.anchor.demos = cart_poles(n=32)
    assert loaded.anchor.demos is None
    loaded.anchor.demos = mapped(tmp_path, name)
    loaded.learn(10)
    loaded.anchor = DemonstrationLoss(cart_poles(n=32), 0.5)
    loaded.learn(10)


@each_class
def test_missing_demonstrations_are_an_error_before_any_step(cls: Any, tmp_path: Path) -> None:
    cart_poles().save(tmp_path / "demos.npz")
    demos = Demonstrations.load(tmp_path / "demos.npz", mmap=True)
    model = cls("MlpPolicy", "CartPole-v1", anchor=DemonstrationLoss(demos, 0.5), **FEW_STEPS[cls], **SMALL)
    model.save(tmp_path / "model")
    loaded: Any = cls.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match="the anchor's demonstrations"):
        loaded.learn(64)
    assert (loaded.num_timesteps, loaded._last_obs) == (0, None)
    loaded.anchor.coef = 0.0  # then they are not needed
    loaded.learn(64)
    assert loaded.num_timesteps >= 64


def test_what_it_remembers_is_numbers() -> None:
    anchor: Any = KLAnchor(1.0)
    policy = actor_critic().policy
    anchor.draw(policy)
    anchor.n_updates = 3
    file = io.BytesIO()
    th.save(anchor.state_dict(), file)
    file.seek(0)
    other: Any = KLAnchor(1.0)
    other.load_state_dict(th.load(file, weights_only=True))
    assert other.n_updates == 3
    assert other.reference.keys() == anchor.reference.keys()
    with pytest.raises(ValueError, match="state must have the keys"):
        other.load_state_dict({"n_updates": 1})
    with pytest.raises(ValueError, match="n_updates must"):
        other.load_state_dict({"n_updates": -1, "reference": None})
    with pytest.raises(ValueError, match="reference must"):
        other.load_state_dict({"n_updates": 1, "reference": {"a": th.tensor(th.nan)}})
    assert other.n_updates == 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"coef": "x"}, "coef must"),
        ({"n_updates": -1}, "n_updates must"),
        ({"reference": 5}, "reference must"),
        ({"reference": {"action_net.weight": th.zeros(3)}}, "reference must be of a policy like"),
    ],
)
def test_a_file_with_another_anchor_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    model = actor_critic(anchor=KLAnchor(1.0)).learn(10)
    vars(model.anchor).update(change)
    model.save(tmp_path / "model")
    with pytest.raises(DamagedFileError, match=match):
        ActorCritic.load(tmp_path / "model", device="cpu")


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("make_anchor", "error", "match"),
    [
        (lambda: KLAnchor(-1.0), ValueError, r"coef must be a finite number of at least 0, got -1.0"),
        (lambda: KLAnchor(float("nan")), ValueError, "coef must"),
        (lambda: KLAnchor(float("inf")), ValueError, "coef must"),
        (lambda: KLAnchor("1"), TypeError, "coef must"),  # type: ignore[arg-type]
        (lambda: KLAnchor(1.0, decay=1.1), ValueError, r"decay must be a number in \[0, 1\], got 1.1"),
        (lambda: DemonstrationLoss(None, 1.0), TypeError, "demos must"),  # type: ignore[arg-type]
        (lambda: DemonstrationLoss(cart_poles(), 1.0, batch_size=0), ValueError, "batch_size must"),
        (lambda: DemonstrationLoss(cart_poles(), 1.0, batch_size=2.5), TypeError, "batch_size must"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make_anchor: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make_anchor()


def test_numbers_of_other_types() -> None:
    anchor = DemonstrationLoss(cart_poles(), np.float32(0.5), decay=1, batch_size=np.int64(4))  # type: ignore[arg-type]
    assert type(anchor.coef) is type(anchor.decay) is float
    assert type(anchor.batch_size) is int


@each_class
def test_an_anchor_that_does_not_fit_is_an_error_at_once(cls: Any) -> None:
    with pytest.raises(TypeError, match=r"anchor must be a KLAnchor, a DemonstrationLoss or None, got 0\.1"):
        cls("MlpPolicy", "CartPole-v1", anchor=0.1, **SMALL)
    with pytest.raises(ValueError, match=r"observations must have shape \(3,\)"):
        cls("MlpPolicy", "Pendulum-v1", anchor=DemonstrationLoss(cart_poles(), 1.0), **SMALL)
    model = cls("MlpPolicy", "CartPole-v1", **FEW_STEPS[cls], **SMALL)
    before = parameters(model)
    for wrong, error in ((3, TypeError), (DemonstrationLoss(demos_in(*SPACES), 1.0), ValueError)):
        model.anchor = wrong
        with pytest.raises(error, match=r"anchor must|observations must"):
            model.learn(64)
    model.anchor = KLAnchor(1.0)
    model.learn(0)
    model.anchor.coef = -1.0
    with pytest.raises(
        ValueError, match=r"^anchor must be a KLAnchor with valid attributes: coef must be .* at least 0, got"
    ):
        model.learn(64)
    assert th.equal(parameters(model), before)


SPACES = OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"]


def test_a_policy_with_hooks_cannot_be_copied() -> None:
    model = actor_critic(anchor=KLAnchor(1.0))
    model.policy.action_net.register_forward_hook(lambda *_: None)
    before = parameters(model)
    with pytest.raises(ValueError, match="policy must have no hooks"):
        model.learn(10)
    assert th.equal(parameters(model), before)


def test_copies_share_what_they_remember() -> None:
    model: Any = Reinforce("MlpPolicy", "CartPole-v1", anchor=KLAnchor(1.0), **SMALL).learn(100)
    again = copy.deepcopy(model)
    assert again.anchor is not model.anchor
    assert again.anchor.reference is model.anchor.reference
    n_updates = model.anchor.n_updates
    again.learn(100, reset_num_timesteps=False)
    assert again.anchor.n_updates > n_updates == model.anchor.n_updates
    assert isinstance(model.get_env(), DummyVecEnv)
