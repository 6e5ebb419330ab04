"""Trajectories of the enumeration through the library: models with given parameters, batches, and their gradient.

The library computes in float32, the enumeration in float64; they agree to ``ATOL`` = 1e-5, in numbers of order 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch as th

from sb3_pg.algorithms.first_order import FirstOrderAlgorithm
from sb3_pg.rollout import RolloutBatch
from tests.oracle.mdp import Array, Enumeration, Spaces, TabularMDP, graph_mdp, pack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ATOL = 1e-5
MDP, THETA = graph_mdp()
#: Of a policy that acts in place of THETA's: ratios between 0.54 and 1.46, and products of up to 2.9.
BEHAVIOR = np.array([0.2, 0.1, -0.1, 0.3, 0.4, 0.2, 0.2, 0.1])
CRITIC = np.array([0.8, -1.1, 2.3])  # V(s) of a critic that knows nothing
#: That critic as a table over times and states: behind the time limit nothing is worth anything.
CRITIC_TABLE = np.concatenate([np.tile(CRITIC, (MDP.horizon, 1)), np.zeros((1, MDP.n_states))])

Model = TypeVar("Model", bound=FirstOrderAlgorithm)


def oracle_model(cls: type[Model], mdp: TabularMDP, theta: Array, **arguments: Any) -> Model:
    """A model whose gradient is the estimator and nothing else, with the enumeration's policy and CRITIC."""
    plain: dict[str, Any] = {
        "truncation": "terminal",
        "normalize_advantage": False,
        "ent_coef": 0.0,
        "max_grad_norm": None,
        "policy_kwargs": {"net_arch": []},
        "device": "cpu",
    }
    model = cls("MlpPolicy", Spaces(mdp.n_states, mdp.n_actions), **{**plain, **arguments})
    set_parameters(model, mdp, theta)
    return model


def set_parameters(model: FirstOrderAlgorithm, mdp: TabularMDP, theta: Array) -> None:
    """The enumeration's policy, and CRITIC."""
    weights = th.as_tensor(theta, dtype=th.float32)
    n_weights = mdp.n_states * mdp.n_actions
    with th.no_grad():
        model.policy.action_net.weight.copy_(weights[:n_weights].reshape(mdp.n_actions, mdp.n_states))
        model.policy.action_net.bias.copy_(weights[n_weights:])
        model.policy.value_net.weight.copy_(th.as_tensor(CRITIC))
        model.policy.value_net.bias.zero_()


def parameters(model: FirstOrderAlgorithm) -> Array:
    """The policy's parameters, laid out as the enumeration's theta."""
    actor = model.policy.action_net
    return th.cat([actor.weight.detach().flatten(), actor.bias.detach()]).double().numpy()


def ascent(model: FirstOrderAlgorithm, batch: RolloutBatch) -> Array:
    """The ascent direction that one batch gives theta: minus the gradient of the loss."""
    model._accumulate_gradient(batch)
    actor = model.policy.action_net
    return -th.cat([actor.weight.grad.flatten(), actor.bias.grad]).double().numpy()


def fields_of(
    mdp: TabularMDP, columns: list[list[int]], n_steps: int, values: Array = CRITIC_TABLE
) -> dict[str, th.Tensor]:
    """Columns of episodes, each given by its number in the enumeration, valued by a critic: a table, (H + 1, S)."""
    trajectories = mdp.trajectories()
    fields = pack([[trajectories[i] for i in column] for column in columns], n_steps, values)
    return {name: th.as_tensor(x, dtype=th.float32 if x.dtype.kind == "f" else None) for name, x in fields.items()}


def batches_of(mdp: TabularMDP, index: Iterable[Sequence[int]], values: Array = CRITIC_TABLE) -> Iterator[RolloutBatch]:
    """Batches of one episode per column, each with one row more than the longest: every column ends in padding."""
    fields = fields_of(mdp, [[i] for i in range(len(mdp.trajectories()))], mdp.horizon + 1, values)
    for i in index:
        yield RolloutBatch(**{name: x[:, i] for name, x in fields.items()}, n_episodes=len(i))


def columns_of(oracle: Enumeration, policy: Array, behavior: Array) -> dict[str, th.Tensor]:
    """Every trajectory in a column of its own, (H, M), double precision; what follows its end is not a number.

    :param policy: pi(a | s), (S, A)
    :param behavior: mu(a | s), (S, A)
    """
    mask, taken = oracle.mask.T.astype(bool), (oracle.state.T, oracle.action.T)
    numbers = {
        "rewards": oracle.reward.T,
        "log_prob": np.log(policy[taken]),
        "behavior_log_prob": np.log(behavior[taken]),
    }
    fields = {name: np.where(mask, x, np.nan) for name, x in numbers.items()}
    ends = mask & ~np.concatenate([mask[1:], np.zeros_like(mask[:1])])
    return {name: th.as_tensor(x) for name, x in {**fields, "mask": mask, "ends": ends}.items()}
