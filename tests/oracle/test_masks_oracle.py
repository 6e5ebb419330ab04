"""Gradients and Fisher matrices of policies with action masks against enumeration.

The expectation of a shipped gradient is a sum over all trajectories of a small decision process whose masks depend on
the state. The objective that it must be the gradient of is written out from the network's logits, with a softmax over
the allowed actions alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import Memory
from sb3_pg.baselines import NoBaseline
from sb3_pg.functional import FisherVectorProduct
from sb3_pg.learner import GradientStep, ImportanceSampled, Learner, MonteCarlo
from sb3_pg.learner.trust_region import SurrogateObjective
from sb3_pg.policies import History, Sequences, extended
from sb3_pg.rollout import RolloutBatch, score_batch

ALLOWED = [[0, 1], [1, 2], [0, 2]]  # in each state
HORIZON, N_STATES, N_ACTIONS = 3, 3, 3
GAMMA = 0.9
memories = pytest.mark.parametrize("memory", [None, "gru", "lstm"])


class Path(NamedTuple):
    """A trajectory."""

    states: list[int]
    actions: list[int]
    rewards: list[float]


def paths(
    states: tuple[int, ...] = (0,), actions: tuple[int, ...] = (), rewards: tuple[float, ...] = ()
) -> Iterator[Path]:
    """Yield every trajectory of allowed actions. The next state is s + a + 1 modulo 3; action 2 in state 2 ends it."""
    s = states[-1]
    for a in ALLOWED[s]:
        so_far = (*actions, a), (*rewards, 1.0 + s - 0.7 * a)
        if len(so_far[0]) == HORIZON or (s == 2 and a == 2):
            yield Path(list(states), list(so_far[0]), list(so_far[1]))
        else:
            yield from paths((*states, (s + a + 1) % 3), *so_far)


def make_policy(memory: Any, scale: float = 0.8) -> Any:
    th.manual_seed(0)
    space = spaces.Dict({"observation": spaces.Discrete(N_STATES), "action_mask": spaces.MultiBinary(N_ACTIONS)})
    policy: Any = extended(ActorCriticPolicy)(
        space,
        spaces.Discrete(N_ACTIONS),
        lambda _: 0.0,
        masks=True,
        memory=None if memory is None else Memory(memory, 2, critic="none"),
        net_arch=[],
        optimizer_class=th.optim.SGD,
    )
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, scale)
    policy.set_training_mode(False)
    return policy


def logits(policy: Any, states: list[int]) -> th.Tensor:
    """The network's outputs at each step of an episode, ``(n_steps, n_actions)``, by torch's own layers."""
    x = th.nn.functional.one_hot(th.tensor(states), N_STATES).float()
    if policy.memory is not None:
        x = policy.mlp_extractor.actor.layers(x[:, None])[0][:, 0]
    outputs: th.Tensor = policy.action_net(x)
    return outputs


def log_probs(policy: Any, path: Path) -> th.Tensor:
    """log pi(a_t | history) with a softmax over the allowed actions."""
    found = []
    for row, s, a in zip(logits(policy, path.states), path.states, path.actions, strict=True):
        found.append(row[a] - th.logsumexp(row[ALLOWED[s]], 0))
    return th.stack(found)


def masks_of(states: list[int]) -> np.ndarray:
    masks = np.zeros((len(states), N_ACTIONS), np.int8)
    for row, s in enumerate(states):
        masks[row, ALLOWED[s]] = 1
    return masks


def batch_of(policy: Any, path: Path) -> RolloutBatch:
    """One episode of one env, in the form of a rollout."""
    n = len(path.states)
    ends = np.arange(n)[:, None] == n - 1
    column = {
        "observation": th.tensor(path.states)[:, None],
        "action_mask": th.from_numpy(masks_of(path.states))[:, None],
    }
    sequences = None
    if policy.memory is not None:
        sequences = Sequences.of_rollout(ends, np.ones_like(ends), th.device("cpu"))
    return RolloutBatch(
        observations=column,
        actions=th.tensor(path.actions)[:, None],
        rewards=th.tensor(path.rewards, dtype=th.float64)[:, None],
        terminated=th.from_numpy(ends),
        truncated=th.zeros(n, 1, dtype=th.bool),
        timesteps=th.arange(n)[:, None],
        n_episodes=1,
        sequences=sequences,
    )


def actor(policy: Any) -> list[th.nn.Parameter]:
    skipped = ("value_net", "mlp_extractor.project")
    return [parameter for name, parameter in policy.named_parameters() if not name.startswith(skipped)]


def exact(policy: Any) -> th.Tensor:
    """The gradient of the expected discounted return."""
    total = sum(
        log_probs(policy, path).sum().exp() * sum(GAMMA**t * r for t, r in enumerate(path.rewards)) for path in paths()
    )
    gradients = th.autograd.grad(total, actor(policy), materialize_grads=True)  # type: ignore[arg-type]
    return th.cat([gradient.flatten() for gradient in gradients])


def shipped(policy: Any, estimator: Any, path: Path, log_prob: th.Tensor | None = None) -> th.Tensor:
    """The gradient that the library takes from one trajectory.

    :param log_prob: of the policy that acted; None if it is this one
    """
    batch = batch_of(policy, path)
    batch.log_probs = score_batch(policy, batch, with_values=False)
    if log_prob is not None:
        now, batch.log_probs = batch.log_probs, log_prob[:, None]
        estimator.weigh(batch, now)
    Learner(policy, estimator, GradientStep(max_grad_norm=None)).update(batch, "nothing")
    return -th.cat([th.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in actor(policy)])


def test_the_enumeration_is_complete() -> None:
    for memory in (None, "gru"):
        policy = make_policy(memory)
        assert sum(log_probs(policy, path).sum().exp().item() for path in paths()) == pytest.approx(1)
        assert len(list(paths())) > 5


@memories
@pytest.mark.parametrize("returns", ["reward_to_go", "total"])
def test_the_expected_gradient_is_that_of_the_objective(memory: Any, returns: Any) -> None:
    policy = make_policy(memory)
    estimator = MonteCarlo(GAMMA, returns, NoBaseline(), state_discount=returns == "reward_to_go")
    found = sum(log_probs(policy, path).sum().exp().detach() * shipped(policy, estimator, path) for path in paths())
    th.testing.assert_close(found, exact(policy), rtol=1e-4, atol=1e-5)


@memories
@pytest.mark.parametrize("ratio", ["trajectory", "per_decision"])
def test_the_expected_off_policy_gradient_is_that_of_the_objective(memory: Any, ratio: Any) -> None:
    policy = make_policy(memory)
    estimator = ImportanceSampled(MonteCarlo(GAMMA, "reward_to_go", NoBaseline(), state_discount=True), ratio)
    found = th.zeros(())
    for path in paths():
        behavior = th.tensor(
            [0.3 if a == ALLOWED[s][0] else 0.7 for s, a in zip(path.states, path.actions, strict=True)]
        )
        weight = behavior.prod()
        found = found + weight * shipped(policy, estimator, path, behavior.log())
    th.testing.assert_close(found, exact(policy), rtol=1e-4, atol=1e-5)


@memories
@pytest.mark.parametrize("chunk_size", [100, 2])
def test_fisher_products_are_those_of_the_explicit_matrix(memory: Any, chunk_size: int) -> None:
    policy = make_policy(memory)
    several = [path for path in paths() if len(path.states) > 1][:4]
    parameters = actor(policy)
    matrix, n = th.zeros(()), 0
    for path in several:
        rows = logits(policy, path.states)
        for t, s in enumerate(path.states):
            n += 1
            log_pi = rows[t, ALLOWED[s]].log_softmax(0)
            for log_p in log_pi:
                score = th.autograd.grad(log_p, parameters, retain_graph=True, materialize_grads=True)
                flat = th.cat([part.flatten() for part in score])
                matrix = matrix + log_p.detach().exp() * flat[:, None] * flat[None]
    matrix = matrix / n
    states = [s for path in several for s in path.states]
    obs: Any = {"observation": th.tensor(states), "action_mask": th.from_numpy(masks_of(states))}
    if memory is not None:
        ids = np.repeat(np.arange(len(several)), [len(path.states) for path in several])
        steps = np.concatenate([np.arange(len(path.states)) for path in several])
        obs = History(obs, Sequences(ids, steps, th.device("cpu")))
    actions = th.tensor([a for path in several for a in path.actions])
    objective = SurrogateObjective(policy, obs, actions, th.ones(n), chunk_size=chunk_size)
    product = FisherVectorProduct(objective.distributions_at(obs), parameters)
    basis = th.eye(len(matrix))
    found = th.stack([product(vector) for vector in basis])
    th.testing.assert_close(found, matrix, rtol=1e-4, atol=1e-5)
