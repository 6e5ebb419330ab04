"""What is on the other side of a transport: some of the envs, and a copy of the policy that acts in them."""

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import CloudpickleWrapper, DummyVecEnv

from sb3_pg import compat
from sb3_pg.envs.action_masks import masks_in_infos
from sb3_pg.envs.actors.wrappers import WrapperState, taken_back, wrapped
from sb3_pg.envs.state.members import layout_of, set_worker_state, worker_state
from sb3_pg.policies import Share
from sb3_pg.rollout import Actor, Failure, Fragment, Order, env_of, naming_env_errors

EnvMaker = Callable[[], gym.Env[Any, Any]]


class Warned(NamedTuple):
    """A warning of another process."""

    text: str
    category: type[Warning]
    file: str
    line: int


class Collected(NamedTuple):
    """What an actor sends back.

    :param fragment: the steps
    :param wrappers: state of the wrappers after it, from the innermost to the outermost
    :param reset_infos: of the latest reset of each env
    :param warned: warnings that have not been shown yet
    :param waited: seconds between the answer before and the order for this
    """

    fragment: Fragment
    wrappers: list[WrapperState]
    reset_infos: list[dict[str, Any]]
    warned: list[Warned]
    waited: float


class Answer(NamedTuple):
    """What a command has returned, or the error that it has raised."""

    value: Any
    failure: Failure | None = None


class Broadcast:
    """An argument that several hosts get.

    :param value: the argument
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        #: what a transport sends in its place, which it makes once
        self.packed: Any = None


class Host:
    """Does what the learner's side asks for.

    :param share: which of all envs these are
    :param is_process: whether nothing else uses this process's global random generators
    """

    env: DummyVecEnv

    def __init__(self, share: Share, is_process: bool) -> None:
        self.share, self._is_process = share, is_process
        self._actor: Actor | None = None
        #: seconds between the latest answer and the command after it
        self.waited = 0.0

    def close(self) -> None:
        """Close the envs."""
        if "env" in vars(self):
            self.env.close()

    def answer(self, command: str, *args: Any) -> Answer:
        """Run one of the methods below.

        :param command: its name
        :param args: its arguments
        """
        try:
            return Answer(getattr(self, command)(*args))
        except Exception as error:  # noqa: BLE001 (the learner raises it)
            env = env_of(error)
            place = f"In {command} of the actor of {self.share}"
            return Answer(
                None, Failure.of(error, place if env is None else f"{place}, in env {self.share.first + env}")
            )

    # ---------------------------------------------------------------- as a VecEnv

    def make(self, env_fns: CloudpickleWrapper) -> tuple[Any, Any, Any]:
        """Make the envs. Return observation space, action space and metadata.

        :param env_fns: functions that make one env each
        """
        self.env = DummyVecEnv([partial(_made, env_fn) for env_fn in env_fns.var])
        return self.env.observation_space, self.env.action_space, self.env.metadata

    def reset(self, seeds: list[int | None], options: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        """Reset the envs. Return observations and infos.

        In a process of its own, seeds are also those of the global random generators, which some envs draw from.
        """
        self.seed(seeds, options)
        with naming_env_errors(self.env):
            return self.env.reset(), self.env.reset_infos

    def seed(self, seeds: list[int | None], options: list[dict[str, Any]]) -> None:
        """Set seeds and options of the next reset, as :meth:`reset` does."""
        if self._is_process and seeds[0] is not None:
            set_random_seed(seeds[0] % 2**32)
        compat.set_seeds_and_options(self.env, seeds, options)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, Sequence[Any], list[dict[str, Any]]]:
        """Step the envs. Return what a VecEnv returns, and the infos of the latest resets."""
        self.env.buf_infos = list(self.env.buf_infos)
        with naming_env_errors(self.env):
            return *self.env.step(actions), self.env.reset_infos

    def on_env(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the DummyVecEnv."""
        return getattr(self.env, method)(*args, **kwargs)

    def state(self, what: str, content: Any) -> Any:
        """Get or set the exact state of the envs.

        :param what: "layout", "get" or "set"
        :param content: for "set", see :func:`~sb3_pg.envs.state.members.set_worker_state`
        """
        if what == "layout":
            return layout_of(self.env)
        if what == "get":
            return worker_state(self.env, with_random_states=self._is_process)
        return set_worker_state(self.env, content)

    # ---------------------------------------------------------------- as an actor

    def hurry(self) -> None:
        """Do nothing: a fragment that was being collected when this came has ended early."""

    def policy(self, pickled: bytes) -> None:
        """Take a policy.

        :param pickled: the policy, pickled by cloudpickle
        """
        policy: ActorCriticPolicy = pickle.loads(pickled)
        self._actor = Actor(policy, self.share)
        self._weights = []
        for tensor in (*policy.parameters(), *policy.buffers()):
            tensor.data = tensor.data.contiguous()
            self._weights.append(_bytes_of(tensor))

    def collect(
        self,
        order: Order,
        weights: list[np.ndarray],
        random: np.ndarray,
        wrappers: list[WrapperState],
        is_orphan: Callable[[], bool] = lambda: False,
    ) -> Collected:
        """Collect a fragment.

        :param order: what to collect
        :param weights: the policy's parameters and buffers, as bytes
        :param random: state of torch's generator
        :param wrappers: around the envs, from the innermost to the outermost
        :param is_orphan: says whether the learner has stopped waiting for the fragment
        """
        assert self._actor is not None
        for mine, now in zip(self._weights, weights, strict=True):
            mine.copy_(th.from_numpy(now))
        env = wrapped(self.env, wrappers)
        self.env.buf_infos = list(self.env.buf_infos) if order.with_infos else _Infos(self.env.buf_infos)
        catching = warnings.catch_warnings(record=True) if self._is_process else nullcontext()
        with catching as caught:
            fragment = self._actor.collect(env, order, random, is_orphan)
        warned = [Warned(str(one.message), one.category, one.filename, one.lineno) for one in caught or ()]
        return Collected(fragment, taken_back(env), self.env.reset_infos, warned, self.waited)


class _Infos(list[dict[str, Any]]):
    """Infos of all envs. A deep copy copies only those of ended episodes deeply: the others are not kept.

    DummyVecEnv copies infos at every step. Without this, an actor takes a twelfth more time in HalfCheetah.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> list[dict[str, Any]]:
        return [copy.deepcopy(info, memo) if "terminal_observation" in info else dict(info) for info in self]


def _made(env_fn: EnvMaker) -> gym.Env[Any, Any]:
    return masks_in_infos(env_fn())


def _bytes_of(tensor: th.Tensor) -> th.Tensor:
    """Return the memory of a tensor on the CPU."""
    return tensor.detach().view(-1).view(th.uint8)


def weights_of(policy: ActorCriticPolicy) -> list[np.ndarray]:
    """Return the parameters and buffers of a policy as bytes.

    :param policy: on any device
    """
    tensors = (*policy.parameters(), *policy.buffers())
    return [_bytes_of(tensor.detach().cpu().contiguous()).numpy() for tensor in tensors]
