"""Steps of policies with memory: Fisher matrix, surrogate, minibatches, and gradients of single episodes."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import Memory
from sb3_pg.functional import FisherVectorProduct, episode_gradients
from sb3_pg.learner.critic import fit_critic
from sb3_pg.learner.trust_region import SurrogateObjective
from sb3_pg.policies import (
    History,
    Sequences,
    extended,
    functional_log_prob,
    minibatches,
    one_in,
    parameter_sets_of,
    policy_actions,
    uncompiled,
)
from tests.functional.test_fisher import (
    BERNOULLI,
    CATEGORICAL,
    CATEGORICALS,
    GAUSSIAN,
    Family,
    assert_close,
    columns,
    explicit_fisher,
)
from tests.recurrence import ByHand, masked, unpacked

SIZE, N_STEPS, N_ENVS = 2, 5, 3
kinds = pytest.mark.parametrize("kind", ["lstm", "gru"])
SPACES: dict[str, tuple[spaces.Space[Any], Family]] = {
    "discrete": (spaces.Discrete(4), CATEGORICAL),
    "multi-discrete": (spaces.MultiDiscrete([2, 3]), CATEGORICALS),
    "multi-binary": (spaces.MultiBinary(2), BERNOULLI),
    "box": (spaces.Box(-1, 1, (2,), np.float32), GAUSSIAN),
}


class Case:
    """A segment of three envs with ends in it, and a memory before it."""

    def __init__(self, memory: Memory, space: spaces.Space[Any] = SPACES["discrete"][0], carried: bool = True) -> None:
        th.manual_seed(0)
        box = spaces.Box(-1, 1, (2,), np.float32)
        make: Any = extended(ActorCriticPolicy)
        self.policy = make(box, space, lambda _: 1e-3, memory=memory, net_arch=[])
        with th.no_grad():
            for parameter in self.policy.parameters():
                parameter.normal_(0, 0.7)
        self.policy.set_training_mode(False)
        self.ends, self.mask = np.zeros((N_STEPS, N_ENVS), bool), np.ones((N_STEPS, N_ENVS), bool)
        self.ends[1, 0] = self.ends[2, 0] = self.ends[3, 1] = self.ends[4, 2] = True
        self.mask[4:, 1] = False
        n_parts = 2 if memory.kind == "lstm" else 1
        state = tuple(th.randn(memory.n_layers, N_ENVS, SIZE) for _ in range(n_parts))
        self.continued = np.array([True, False, True]) & carried
        self.state, states = state, {"actor": state}
        self.observations = th.rand(N_STEPS, N_ENVS, 2) * 2 - 1
        self.sequences = Sequences.of_rollout(self.ends, self.mask, th.device("cpu"), self.continued, states)
        self.history = History(self.select(self.observations), self.sequences)
        self.n = int(self.mask.sum())
        self.credit = th.randn(self.n)
        with th.no_grad():
            drawn = self.policy.get_distribution(self.history).sample()
        self.actions = policy_actions(drawn.reshape(self.n, -1), space)

    def select(self, x: th.Tensor) -> th.Tensor:
        return x[th.as_tensor(self.mask)]

    @property
    def actor(self) -> dict[str, th.nn.Parameter]:
        return parameter_sets_of(self.policy).actor

    def outputs(self, model: ByHand) -> th.Tensor:
        """Logits or means of the valid steps, by hand."""
        state = masked(unpacked(self.state), th.as_tensor(~self.continued))
        found = []
        for t in range(N_STEPS):
            if t:
                state = masked(state, th.as_tensor(self.ends[t - 1]))
            step = model(self.observations[t], state, state)
            state = step.actor
            found.append(step.outputs)
        return self.select(th.stack(found))


@pytest.mark.parametrize(
    ("space", "n_layers", "chunk_size"),
    [("discrete", 2, 100), ("discrete", 1, 5), ("multi-discrete", 1, 1), ("multi-binary", 1, 100), ("box", 1, 5)],
)
@kinds
def test_fisher_products_are_those_of_the_explicit_matrix(
    kind: Any, space: str, n_layers: int, chunk_size: int
) -> None:
    action_space, family = SPACES[space]
    case = Case(Memory(kind, SIZE, n_layers), action_space)
    objective = SurrogateObjective(case.policy, case.history, case.actions, case.credit, chunk_size=chunk_size)
    parameters: list[th.Tensor] = list(case.actor.values())
    product = FisherVectorProduct(objective.distributions_at(case.history), parameters)
    model = ByHand(case.policy)
    outputs = case.outputs(model)
    if space == "box":
        outputs = th.cat((outputs, model.w["log_std"].expand(len(outputs), 2)), 1)
    expected = explicit_fisher(outputs, [model.w[name] for name in case.actor], family)
    assert_close(columns(product, parameters), expected, 1e-4)


@kinds
def test_the_graph_that_the_gradient_leaves_gives_the_same_products(kind: Any) -> None:
    case = Case(Memory(kind, SIZE))
    objective = SurrogateObjective(case.policy, case.history, case.actions, case.credit)
    parameters: list[th.Tensor] = list(case.actor.values())
    objective.gradient(parameters)
    kept = objective.distribution
    assert kept is not None
    found = columns(FisherVectorProduct([lambda: kept], parameters), parameters)
    anew = columns(FisherVectorProduct(objective.distributions_at(case.history), parameters), parameters)
    assert th.allclose(found, anew, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [100, 5, 1])
@kinds
def test_the_surrogates_gradient_and_its_old_policy(kind: Any, chunk_size: int) -> None:
    case = Case(Memory(kind, SIZE))
    objective = SurrogateObjective(case.policy, case.history, case.actions, case.credit, chunk_size=chunk_size)
    found = objective.gradient(list(case.actor.values()))
    model = ByHand(case.policy)
    log_probs = case.outputs(model).log_softmax(1)
    log_prob = log_probs[th.arange(case.n), case.actions]
    gradients = th.autograd.grad((log_prob * case.credit).mean(), [model.w[name] for name in case.actor])
    expected = th.cat([gradient.flatten() for gradient in gradients])
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (objective.old_log_prob - log_prob).abs().max() < 2e-6
    _, (logits,) = objective.old_distribution
    assert (logits - log_probs).abs().max() < 2e-6
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(1).mean()
    assert float(objective.entropy) == pytest.approx(float(entropy), abs=1e-6)
    with th.no_grad():
        case.policy.action_net.bias.add_(th.tensor([0.3, 0.0, -0.2, 0.0]))
        effect = objective.effect()
        new = case.outputs(ByHand(case.policy)).log_softmax(1)
        ratio = (new - log_probs)[th.arange(case.n), case.actions].exp()
        kl = (log_probs.exp() * (log_probs - new)).sum(1).mean()
    assert effect.joint_kl == pytest.approx(float(kl), abs=1e-6)
    assert effect.gain == pytest.approx(float(((ratio - 1) * case.credit).mean()), abs=1e-6)


@pytest.mark.parametrize("shuffle", [False, True])
def test_minibatches_keep_rows_together(shuffle: bool) -> None:
    """Log-probs of minibatches are those of the whole batch."""
    case = Case(Memory("lstm", SIZE))
    with th.no_grad():
        whole = case.policy.evaluate_actions(case.history, case.actions)[1]
        seen = []
        for part, (actions, rows) in minibatches(case.history, [case.actions, th.arange(case.n)], 4, shuffle):
            assert th.allclose(case.policy.evaluate_actions(part, actions)[1], whole[rows], atol=1e-6)
            seen += rows.tolist()
    assert sorted(seen) == list(range(case.n))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_share_of_the_samples_is_whole_sequences(k: int) -> None:
    case = Case(Memory("gru", SIZE))
    part = one_in(k, case.history)
    assert -(-case.n // k) <= len(part.sequences) <= case.n
    whole = {tuple(x) for x in case.history.observations.tolist()}
    lengths = np.bincount(case.sequences.ids)
    assert {tuple(x) for x in part.observations.tolist()} <= whole
    assert set(np.bincount(part.sequences.ids)) <= set(lengths)


@kinds
def test_gradients_of_single_episodes(kind: Any) -> None:
    """For the optimal baseline: of each piece, with the memory before it."""
    case = Case(Memory(kind, SIZE, 2))
    ids = th.as_tensor(case.sequences.ids)
    weights = th.randn(2, case.n)
    parameters = {name: parameter.detach() for name, parameter in case.actor.items()}
    with functional_log_prob(case.policy) as log_prob:
        chunks = list(episode_gradients(log_prob, parameters, case.history, case.actions, weights, ids, 5_000))
    found = th.zeros(case.sequences.n_sequences, 2, sum(p.numel() for p in parameters.values()))
    for which, gradients in chunks:
        found[which] = gradients
    model = ByHand(case.policy)
    scores = case.outputs(model).log_softmax(1)[th.arange(case.n), case.actions]
    for i in range(case.sequences.n_sequences):
        for k in range(2):
            own = th.autograd.grad(
                (scores * weights[k])[ids == i].sum(), [model.w[name] for name in case.actor], retain_graph=True
            )
            expected = th.cat([gradient.flatten() for gradient in own])
            assert (found[i, k] - expected).norm() < 1e-5 * (1 + expected.norm())


def test_actor_and_critic_are_told_apart() -> None:
    for critic, shared in (("own", False), ("shared", True), ("none", False)):
        actor, values = parameter_sets_of(Case(Memory("lstm", SIZE, critic=critic)).policy)  # type: ignore[arg-type]
        both = actor.keys() & values.keys()
        assert any(".actor.layers" in name for name in both) == shared
        assert all(".actor.layers" in name for name in both)
        assert any(".critic.layers" in name for name in values) == (critic == "own")
        assert any(".project" in name for name in values) == (critic == "none")
        assert not any(".project" in name or ".critic" in name for name in actor)


def test_padding_and_other_episodes_have_no_gradient() -> None:
    """The score of one episode's steps does not reach the observations of another, nor those after it."""
    case = Case(Memory("lstm", SIZE))
    observations = case.history.observations.clone().requires_grad_()
    with uncompiled():
        log_prob = case.policy.evaluate_actions(History(observations, case.sequences), case.actions)[1]
    ids, steps = case.sequences.ids, case.sequences.steps
    for row in range(case.n):
        (gradient,) = th.autograd.grad(log_prob[row], observations, retain_graph=True)
        reached = gradient.abs().sum(1).numpy() > 0
        assert np.array_equal(reached, (ids == ids[row]) & (steps <= steps[row]))


@pytest.mark.parametrize("size", [100, 4])
@pytest.mark.parametrize("critic", ["own", "none"])
def test_a_pass_of_the_critic_over_sequences(critic: Any, size: int) -> None:
    """One step against the gradient by hand; several small steps lead the same way."""
    case = Case(Memory("gru", SIZE, critic=critic), carried=False)
    policy, model, targets = case.policy, ByHand(case.policy), th.randn(case.n)
    named = parameter_sets_of(policy).critic
    parameters, rate = list(named.values()), 1.0 if size == 100 else 1e-3
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = th.optim.SGD(parameters, lr=rate)
    n_batches = len(list(case.sequences.minibatches(size, shuffle=False)))
    fit_critic(policy, optimizer, parameters, case.history, targets, 1, size)
    state = seen = model.blank(N_ENVS)
    values = []
    for t in range(N_STEPS):
        starts = th.as_tensor(case.ends[t - 1]) if t else th.ones(N_ENVS, dtype=th.bool)
        step = model(case.observations[t], state, masked(seen, starts))
        seen = step.critic
        values.append(step.values)
    errors = (case.select(th.stack(values)) - targets) ** 2
    wanted = th.autograd.grad(errors.mean(), [model.w[name] for name in named])
    moved = [(b - p.detach()) / rate for p, b in zip(parameters, before, strict=True)]
    if n_batches == 1:
        for found, expected in zip(moved, wanted, strict=True):
            assert (found - expected).norm() < 1e-5 * (1 + expected.norm())
    else:
        cosine = th.nn.functional.cosine_similarity(flat(moved), flat(wanted), 0)
        assert cosine > 0.5


def flat(parts: Any) -> th.Tensor:
    return th.cat([part.flatten().double() for part in parts])
