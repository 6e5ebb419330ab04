"""Trajectories of the enumeration through the library: an env that plays them, and the update made of them.

Everything goes through ``learn``, as a user's model does. The library computes in float32, the enumeration in float64;
they agree to ``ATOL`` = 1e-5, in numbers of order 1.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from tests.oracle.mdp import Array, Enumeration, TabularMDP, Trajectory, graph_mdp

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ATOL = 1e-5
MDP, THETA = graph_mdp()
#: Of a policy that acts in place of THETA's: ratios between 0.54 and 1.46, and products of up to 2.9.
BEHAVIOR = np.array([0.2, 0.1, -0.1, 0.3, 0.4, 0.2, 0.2, 0.1])
CRITIC = np.array([0.8, -1.1, 2.3])  # V(s) of a critic that knows nothing
#: That critic as a table over times and states: behind the time limit nothing is worth anything.
CRITIC_TABLE = np.concatenate([np.tile(CRITIC, (MDP.horizon, 1)), np.zeros((1, MDP.n_states))])

#: The episodes of one env, one after the other.
Column = list[Trajectory]
Model = TypeVar("Model", bound=BaseAlgorithm)


class Playback(VecEnv):
    """Plays given episodes, and tells an :class:`ObedientPolicy` which actions come next.

    The observation of state s at time t is t * S + s. An env that has played its episodes goes on with rewards of 1000
    and one episode per step, which must not matter.
    """

    policy: ObedientPolicy

    def __init__(self, horizon: int, n_states: int, n_actions: int, n_envs: int) -> None:
        self.n_states = n_states
        super().__init__(n_envs, spaces.Discrete((horizon + 1) * n_states), spaces.Discrete(n_actions))

    def play(self, columns: Sequence[Column]) -> None:
        """Play these episodes from the next reset on, a column in each env."""
        assert len(columns) == self.num_envs
        shape = (1 + max(sum(len(episode.rewards) for episode in column) for column in columns), self.num_envs)
        self.observations, self.actions = np.zeros(shape, np.int64), np.ones(shape, np.int64)
        self.rewards, self.dones = np.full(shape, 1e3, np.float32), np.ones(shape, bool)
        self.infos: list[list[dict[str, Any]]] = [[{} for _ in columns] for _ in range(shape[0])]
        for env, column in enumerate(columns):
            row = 0
            for episode in column:
                length = len(episode.rewards)
                here = slice(row, row + length), env
                self.observations[here] = np.arange(length) * self.n_states + episode.states
                self.actions[here], self.rewards[here] = episode.actions, episode.rewards
                self.dones[here] = np.arange(length) == length - 1
                row += length
                final = np.int64(length * self.n_states + episode.last_state)
                ending = {"TimeLimit.truncated": not episode.terminated, "terminal_observation": final}
                self.infos[row - 1][env] = ending

    def reset(self) -> np.ndarray:
        return self._show(0)

    def _show(self, row: int) -> np.ndarray:
        self.row = row
        self.policy.next_actions = th.as_tensor(self.actions[row])
        shown: np.ndarray = self.observations[row]
        return shown

    def step_async(self, actions: np.ndarray) -> None:
        assert np.array_equal(actions, self.actions[self.row])

    def step_wait(self) -> Any:
        row = self.row
        return self._show(row + 1), self.rewards[row], self.dones[row], self.infos[row]

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class TableExtractor(th.nn.Module):
    """From the one-hot observation: the state for the actor, and time and state, or the state, for the critic.

    :param shape: (H + 1, S)
    :param critic_sees_time: whether the critic is a table over times and states, rather than over states
    """

    def __init__(self, shape: tuple[int, int], critic_sees_time: bool) -> None:
        super().__init__()
        self.shape, self.critic_sees_time = shape, critic_sees_time
        self.latent_dim_pi = shape[1]
        self.latent_dim_vf = shape[0] * shape[1] if critic_sees_time else shape[1]

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        summed: th.Tensor = features.unflatten(-1, self.shape).sum(-2)
        return summed

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return features if self.critic_sees_time else self.forward_actor(features)


class ObedientPolicy(ActorCriticPolicy):
    """Linear on the states; its ``forward`` takes the actions that it was told to take."""

    next_actions: th.Tensor

    def __init__(self, *args: Any, shape: tuple[int, int], critic_sees_time: bool = True, **kwargs: Any) -> None:
        self.shape, self.critic_sees_time = shape, critic_sees_time
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        extractor: Any = TableExtractor(self.shape, self.critic_sees_time)
        self.mlp_extractor = extractor

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        values, log_prob, _ = self.evaluate_actions(obs, self.next_actions)
        return self.next_actions, values, log_prob


#: Of a model whose update is the estimator and nothing else.
PLAIN: dict[str, Any] = {
    "truncation": "terminal",
    "normalize_advantage": False,
    "ent_coef": 0.0,
    "device": "cpu",
}
#: The update adds the gradient to the parameters.
ASCENT: dict[str, Any] = {
    "learning_rate": 1.0,
    "max_grad_norm": None,
    "policy_kwargs": {"optimizer_class": th.optim.SGD},
}


def playing_model(
    cls: type[Model], mdp: TabularMDP, theta: Array, n_envs: int, values: Array = CRITIC_TABLE, **arguments: Any
) -> Model:
    """A model on a :class:`Playback`, with the enumeration's policy and a critic.

    :param values: what the critic says of the state at each time, (H + 1, S)
    """
    env = Playback(mdp.horizon, mdp.n_states, mdp.n_actions, n_envs)
    shape = (mdp.horizon + 1, mdp.n_states)
    policy_kwargs = {"net_arch": [], "shape": shape, **arguments.pop("policy_kwargs", {})}
    model = cls(ObedientPolicy, env, policy_kwargs=policy_kwargs, **{**PLAIN, **arguments})
    policy: Any = model.policy
    env.policy = policy
    model.set_logger(Logger(None, []))
    set_parameters(model, theta, values)
    return model


def set_parameters(model: Any, theta: Array, values: Array = CRITIC_TABLE) -> None:
    """The enumeration's policy, and V(t, s), or V(0, s) where the critic does not see the time."""
    actor, critic = model.policy.action_net, model.policy.value_net
    weights = th.as_tensor(theta, dtype=th.float32)
    with th.no_grad():
        actor.weight.copy_(weights[: actor.weight.numel()].reshape(actor.weight.shape))
        actor.bias.copy_(weights[actor.weight.numel() :])
        critic.weight.copy_(th.as_tensor(values).flatten()[: critic.weight.numel()])
        critic.bias.zero_()


def parameters(model: Any) -> Array:
    """The policy's parameters, laid out as the enumeration's theta."""
    actor = model.policy.action_net
    return th.cat([actor.weight.detach().flatten(), actor.bias.detach()]).double().numpy()


def step(model: Any, columns: Sequence[Column]) -> Array:
    """What one update from these episodes adds to theta."""
    before = parameters(model)
    model.get_env().play(columns)
    model.learn(1, log_interval=None)
    return parameters(model) - before


def ascent(model: Any, columns: Sequence[Column]) -> Array:
    """The same for a model of ``ASCENT``, whose policy is as it was afterwards: the gradient that theta ascends."""
    before = copy.deepcopy(model.policy.state_dict())
    found = step(model, columns)
    model.policy.load_state_dict(before)
    return found


def episodes_of(mdp: TabularMDP, index: Iterable[Sequence[int]]) -> Iterator[list[Column]]:
    """Episodes by their numbers in the enumeration, each in an env of its own."""
    trajectories = mdp.trajectories()
    for chosen in index:
        yield [[trajectories[i]] for i in chosen]


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
