"""The ``locals`` of SB3's callbacks, under SB3's names.

SB3's on-policy loop calls the critic at every step. The collector here does not. So ``values``, ``log_probs`` and
``obs_tensor`` are computed, with a forward pass, only when a callback reads one of them.
"""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import (
    ForwardSampler,
    History,
    Sampler,
    Sequences,
    States,
    action_dist_kept,
    has_memory,
    map_observations,
    policy_actions,
)
from sb3_pg.rollout import Collector


class _End(NamedTuple):
    """What is known at the end of a rollout.

    :param obs: observations that follow it
    :param starts: ``(n_envs,)``, True where they begin an episode
    :param stored: observations of a policy with memory, before the buffer is put in order
    """

    obs: Any
    starts: np.ndarray
    stored: Any


class StepOutputs:
    """Computes the policy's outputs at the latest step that SB3's loop has, when they are read."""

    NAMES = ("obs_tensor", "values", "log_probs")
    policy: ActorCriticPolicy
    value_scale: float
    _sampler: Sampler
    _actions: np.ndarray | None = None

    def begin(self, policy: ActorCriticPolicy, sampler: Sampler, value_scale: float, buffer: Any) -> None:
        """Begin a rollout.

        :param policy: the policy that is trained, in eval mode during the rollout
        :param sampler: sampler that draws the actions; a :class:`ForwardSampler` has values and log-probs already
        :param value_scale: factor that turns the critic's output into reward units
        :param buffer: holds the earlier steps of the rollout
        """
        self.policy, self.value_scale, self._sampler, self._buffer = policy, value_scale, sampler, buffer
        self._obs: Any = None
        self._actions = None
        #: of a policy with memory: where the steps begin episodes, what it remembers, and after how many steps
        self._starts: list[np.ndarray] | None = [] if has_memory(policy) else None
        self._memory: States | None = None
        self._n_remembered = 0
        self._end: _End | None = None
        self._known: dict[str, Any] = {}

    def step(self, obs: Any, actions: np.ndarray, starts: np.ndarray) -> None:
        """Keep the latest step's observations, as the policy got them, and actions, as it drew them."""
        self._obs, self._actions = obs, actions
        if self._starts is not None:
            self._starts.append(starts.copy())
        if self._known:
            self._known = {}

    def end(self, last_obs: Any, starts: np.ndarray) -> None:
        """Keep the observations that follow the rollout. At its end, SB3's ``values`` are theirs."""
        self._end = _End(last_obs, starts.copy(), self._buffer.observations if self._starts is not None else None)
        self._known.pop("values", None)

    def __contains__(self, name: object) -> bool:
        return name in self.NAMES and self._actions is not None

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        if name not in self._known:
            with th.no_grad(), action_dist_kept(self.policy):
                self._known[name] = getattr(self, f"_{name}")()
        return self._known[name]

    def _obs_tensor(self) -> Any:
        return obs_as_tensor(self._obs, self.policy.device)

    def _values(self) -> th.Tensor:
        if self._end is not None:
            values = self.policy.predict_values(self._seen(self._end.obs))
        elif isinstance(self._sampler, ForwardSampler):
            values = self._sampler.values[-1].reshape(-1, 1)
        else:
            values = self.policy.predict_values(self._seen(self._obs))
        return values if self.value_scale == 1 else values * self.value_scale

    def _log_probs(self) -> th.Tensor:
        if isinstance(self._sampler, ForwardSampler):
            return self._sampler.log_probs[-1]
        rows = th.as_tensor(self._actions, device=self.policy.device)
        actions = policy_actions(rows.reshape(len(rows), -1), self.policy.action_space)
        log_probs: th.Tensor = self.policy.get_distribution(self._seen(self._obs)).log_prob(actions)
        return log_probs

    def _seen(self, obs: Any) -> Any:
        """Return observations as the policy takes them, with what it remembers before them.

        :param obs: those of the latest step, or those that follow the rollout
        """
        policy: Any = self.policy
        seen = obs_as_tensor(obs, policy.device)
        if self._starts is None:
            return seen
        memory, starts = self._memory_before_latest(policy), self._starts[-1]
        if self._end is not None and obs is self._end.obs:
            memory = policy.memory_after(map_observations(lambda x: x[None], self._obs), starts[None], memory)
            starts = self._end.starts
        one = np.ones((1, len(starts)), dtype=bool)
        return History(seen, Sequences.of_rollout(one, one, policy.device, ~starts, memory))

    def _memory_before_latest(self, policy: Any) -> States:
        """Return what a policy with memory remembers before the latest step. Each step is run over once."""
        assert self._starts is not None
        if self._memory is None:
            self._memory = self._buffer.memory
        steps = slice(self._n_remembered, len(self._starts) - 1)
        if steps.start < steps.stop:
            stored = self._buffer.observations if self._end is None else self._end.stored
            before = map_observations(lambda x: x[steps], stored)
            self._memory = policy.memory_after(before, np.stack(self._starts[steps]), self._memory)
            self._n_remembered = steps.stop
        return self._memory


class LazyLocals(dict[str, Any]):
    """A dictionary with additional items that are computed when they are read.

    ``BaseCallback.update_locals`` copies all items into the callback's own dictionary, which would compute them at
    every step. So the callback's own dictionary is replaced by this one, see :func:`offer`.

    :param items: the ordinary items, which come first
    :param outputs: the computed items
    """

    def __init__(self, items: dict[str, Any], outputs: StepOutputs) -> None:
        super().__init__(items)
        self.outputs = outputs

    def __missing__(self, name: str) -> Any:
        return self.outputs[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.outputs

    def get(self, name: str, default: Any = None) -> Any:
        """As in a dictionary."""
        if name not in self:
            return default
        return self[name]

    def __iter__(self) -> Iterator[str]:
        yield from super().__iter__()
        own = super().__contains__
        yield from (name for name in StepOutputs.NAMES if name in self.outputs and not own(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        """Return an ordinary dictionary with all items, computed now."""
        return {name: self[name] for name in self}

    def keys(self) -> Any:
        """As in a dictionary."""
        return KeysView(self)

    def items(self) -> Any:
        """As in a dictionary. The computed items are computed when they are reached."""
        return ItemsView(self)

    def values(self) -> Any:
        """As in a dictionary. The computed items are computed when they are reached."""
        return ValuesView(self)


def offer(callback: BaseCallback, outputs: StepOutputs) -> None:
    """Put the policy's outputs into the ``locals`` of a callback, and of all callbacks that it holds.

    :param callback: callback that ``learn`` or the user passes to ``collect_rollouts``
    :param outputs: outputs of the rollout that begins
    """
    replaced: dict[int, LazyLocals] = {}
    for one in callback_tree(callback, set()):
        given = one.locals
        if isinstance(given, LazyLocals):
            given.outputs = outputs
        else:  # several callbacks may share one dictionary
            one.locals = replaced.setdefault(id(given), LazyLocals(given, outputs))


def callback_tree(callback: BaseCallback, seen: set[int]) -> Iterator[BaseCallback]:
    """Yield a callback and the callbacks in its attributes, such as those of a CallbackList."""
    if id(callback) in seen:
        return
    seen.add(id(callback))
    yield callback
    for value in list(vars(callback).values()):
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, BaseCallback):
                yield from callback_tree(one, seen)


def reads_infos(callback: BaseCallback) -> bool:
    """Whether a callback, or one that it holds, may read the infos of all steps.

    :param callback: as in :func:`offer`
    """
    return any(map(_reads_infos, callback_tree(callback, set())))


def _reads_infos(callback: BaseCallback) -> bool:
    """Whether a callback may read infos. SB3's and ours do not, but for that which calls a function of the user's."""
    if isinstance(callback, ConvertCallback):
        return callback.callback is not None
    return not type(callback).__module__.startswith((BaseCallback.__module__, "sb3_pg."))


class _Listener:
    """Gives the callbacks of a rollout their ``locals``, and keeps the model's counts.

    :param model: the algorithm, whose ``num_timesteps``, ``_last_obs`` and ``ep_info_buffer`` are kept up to date
    :param callback: callback that ``learn`` or the user passes to ``collect_rollouts``
    :param names: the items of ``locals`` that do not change during the rollout
    """

    def __init__(self, model: BaseAlgorithm, callback: BaseCallback, names: dict[str, Any]) -> None:
        self._model, self._callback, self._names = model, callback, names
        #: whether a callback may read the infos of all steps
        self.reads_infos = reads_infos(callback)

    def start(self, policy: ActorCriticPolicy, sampler: Sampler) -> None:
        """Write the items that do not change."""
        del policy, sampler
        self._callback.update_locals({"callback": self._callback, **self._names})

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        """Count the step and call ``on_step``."""
        self._model.num_timesteps += len(names["dones"])
        self._model._last_obs, self._model._last_episode_starts = obs, starts
        self._callback.update_locals(names)
        return self._callback.on_step()

    def episodes_ended(self, infos: list[dict[str, Any]]) -> None:
        """Keep the returns and lengths of the episodes for the log."""
        self._model._update_info_buffer(infos, np.ones(len(infos), dtype=bool))

    def end(self, last_obs: Any, starts: np.ndarray) -> None:
        """Do nothing at the end of the rollout."""


class OnPolicyListener(_Listener):
    """Gives callbacks the names of SB3's on-policy loop. Values and log-probs are computed when a callback reads them.

    Its arguments are those of the base class.
    """

    def __init__(self, model: BaseAlgorithm, callback: BaseCallback, names: dict[str, Any]) -> None:
        super().__init__(model, callback, names)
        self._outputs = StepOutputs()

    def start(self, policy: ActorCriticPolicy, sampler: Sampler) -> None:
        """Offer the policy's outputs to the callbacks, and write the items that do not change."""
        scale = getattr(self._model, "value_scale", 1.0)
        self._outputs.begin(policy, sampler, scale, self._names.get("rollout_buffer"))
        offer(self._callback, self._outputs)
        super().start(policy, sampler)

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        """Count the step and call ``on_step``."""
        self._outputs.step(obs, names["actions"], starts)
        return super().step(obs, starts, names)

    def end(self, last_obs: Any, starts: np.ndarray) -> None:
        """Make ``values`` those of the observations that follow the rollout, as SB3 does."""
        self._outputs.end(last_obs, starts)


class OffPolicyListener(_Listener):
    """Gives callbacks the names of SB3's off-policy loop. Its arguments are those of the base class."""

    _n_episodes = 0

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        """Count the step and call ``on_step``. As in SB3, the episodes that end with the step are not counted yet."""
        names = {
            "num_collected_steps": names["n_steps"] + 1,
            "num_collected_episodes": self._n_episodes,
            "actions": names["clipped_actions"],
            "buffer_actions": names["actions"],
            **{name: names[name] for name in ("new_obs", "rewards", "dones", "infos")},
        }
        return super().step(obs, starts, names)

    def episodes_ended(self, infos: list[dict[str, Any]]) -> None:
        """Count the episodes, and keep their returns and lengths for the log."""
        self._n_episodes += len(infos)
        super().episodes_ended(infos)


@contextmanager
def collecting(model: Any, env: VecEnv) -> Iterator[Collector]:
    """Yield the model's collector with the state of the envs, and copy the state back into the model afterwards.

    SB3 keeps the state of the envs in attributes of the model. A step with numbers that are not finite counts in
    ``num_timesteps`` too.

    :param model: the algorithm
    :param env: its envs
    """
    if model._collector is None or model._collector.env is not env:
        model._collector = Collector(model.policy, env, act_device=model.act_device)
    collector: Collector = model._collector
    steps_before, state = model.num_timesteps, collector.state
    collector.policy, collector.sde_sample_freq = model.policy, model.sde_sample_freq
    state.last_obs, state.episode_starts = model._last_obs, model._last_episode_starts
    state.timesteps, state.memory = vars(model).get("_timesteps"), model._memory or {}
    try:
        yield collector
    except NonFiniteError:
        model.num_timesteps = steps_before + collector.n_steps * env.num_envs
        raise
    finally:
        model._last_obs, model._last_episode_starts = state.last_obs, state.episode_starts
        model._timesteps, model._memory = state.timesteps, state.memory
