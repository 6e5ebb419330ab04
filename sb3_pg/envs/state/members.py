"""Envs and their wrappers: which there are, and what each of them has to save."""

import inspect
import random
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeGuard, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import CloudpickleWrapper, DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper

from sb3_pg import compat
from sb3_pg.envs.action_masks import masks_in_infos
from sb3_pg.envs.adapter import VectorAdapter
from sb3_pg.envs.envpool_adapter import EnvPoolAdapter
from sb3_pg.envs.gym_vector import GymVectorAdapter
from sb3_pg.envs.state.bit_generators import require_position
from sb3_pg.envs.state.encoding import CannotSaveError, Decoder, Encoder, pickles_in

EnvT = TypeVar("EnvT")
#: Attribute of an env in a worker process: the function that the main process calls.
_SERVICE: Final = "sb3_pg_state"
#: Attribute of such an env: what is to be restored. AsyncVectorEnv can send values to single envs only this way.
_PENDING: Final = "sb3_pg_pending_state"
#: Arguments of constructors, which Gymnasium's classes keep; a dictionary of class attributes; the last step's infos.
_EXCLUDED: Final = frozenset({"class_attributes", "buf_infos", *compat.CONSTRUCTOR_ARGUMENTS})
#: Pipes and processes. The other attributes are what this process knows of the envs.
_PROCESSES: Final = frozenset({"remotes", "work_remotes", "processes", "waiting", "closed"})
#: Attributes that lead to what is inside a member. They are the same in all envs that are made the same way.
_LINKS: Final = frozenset({"env", "venv", "envs"})
#: Whether the caller of an adapter is in ``skip_reset_steps``.
_OF_THE_CALLER: Final = frozenset({"_may_step"})
#: Packages whose envs and wrappers change neither MuJoCo's models nor the transition tables of "toy_text".
_KNOWN_PACKAGES: Final = ("gymnasium.", "stable_baselines3.", "sb3_contrib.", "rl_zoo3.", "sb3_pg.")


class HasWorkers(Protocol):
    """A VecEnv whose workers hold the envs. Each worker holds some of them."""

    def ask_workers(self, what: str, contents: list[Any] | None = None) -> list[Any]:
        """Return what :func:`layout_of`, :func:`worker_state` or :func:`set_worker_state` returns, for each worker.

        :param what: "layout", "get" or "set"
        :param contents: for "set": what each worker is to set
        """

    def workers_attributes(self) -> frozenset[str]:
        """Return the names of attributes by which it reaches its workers."""


class EnvState(NamedTuple):
    """The state of envs and all their wrappers: plain data, which executes no code when it is read.

    What can only be pickled is in it as ``("pickled", bytes)``.

    :param layout: classes, number of envs and spaces, as an env must have them to take this state
    :param members: the state of each env and wrapper, in the order of ``layout["classes"]``
    :param inexact: a sentence that says which state could not be saved, and why; empty if all was saved. Such envs go
        on from a reset
    """

    layout: dict[str, Any]
    members: list[Any]
    inexact: str


def get_env_state(env: VecEnv) -> EnvState:
    """Return the state of vectorized envs: of all wrappers, of each env, and of their random generators.

    An env or wrapper with methods ``get_state()`` and ``set_state(state)`` saves itself and all that is inside it.
    Attributes of the others are saved one by one, simulations of MuJoCo too. Renderers, files, functions and methods
    are left out. Of a space, only the random generator is saved.

    The state of EnvPool's envs, of Box2D's, and of a SubprocVecEnv that this package has not made cannot be saved;
    ``inexact`` says so.

    :param env: the envs; they do not change
    """
    members = _members(env)
    foreign = not all(type(member).__module__.startswith(_KNOWN_PACKAGES) for member in members)
    encoder = Encoder(members, with_models=foreign)
    reasons: list[str] = []
    entries = []
    for member in members:
        entry: dict[str, Any] = {}
        entries.append(entry)
        reason = _why_hidden(member)
        if reason:
            reasons.append(reason)
        elif _is_remote(member):
            entry["workers"] = workers = _ask(member, "get")
            reasons += [worker["state"][2] for worker in workers if worker["state"][2]]
        try:
            if _saves_itself(member):
                entry["own"] = encoder.own_state(member.get_state())
            else:
                entry["attributes"] = encoder.attributes(member, _excluded(member, foreign))
        except (CannotSaveError, NotImplementedError) as error:
            reasons.append(str(error))
            entry["attributes"] = encoder.random_states(member)
    return EnvState(_layout(env, members), entries, "; ".join(dict.fromkeys(reasons)))


def set_env_state(env: VecEnv, state: EnvState, unpickle: Callable[[bytes], Any]) -> None:
    """Give envs the state of others that were made the same way.

    If ``state.inexact`` is not empty, statistics of wrappers and random generators are restored; the caller resets the
    envs.

    :param env: the envs. They stay as they were if an error says that they differ, or if ``unpickle`` refuses a value
    :param state: as :func:`get_env_state` returns it
    :param unpickle: loads the values that are pickled, such as ``pickle.loads``
    :raises ValueError: classes of wrappers or envs, spaces or the number of envs differ
    """
    state = EnvState(*state)
    members = _members(env)
    difference = _difference(state.layout, _layout(env, members))
    if difference:
        raise ValueError(f"env must be made as the saved one: {difference}")
    for pickled, is_value in pickles_in(state.members):
        if is_value:
            unpickle(pickled)
    _set(members, state, unpickle)


def with_state(env: EnvT) -> EnvT:
    """Let another process get and set the state of this one's env, and return the env.

    It adds no wrapper: stepping takes as long as before, and all attributes are found where they were.

    :param env: with all its wrappers
    """
    vars(env).update({_SERVICE: partial(_serve, env), _PENDING: None})
    return env


def subproc_vec_env(env_fns: list[Callable[[], gym.Env[Any, Any]]], **kwargs: Any) -> SubprocVecEnv:
    """Make a SubprocVecEnv whose state can be saved, and whose infos have the masks of envs with ``action_masks()``.

    It serves as ``vec_env_cls`` of SB3.

    :param env_fns: functions that make one env each
    :param kwargs: arguments of ``SubprocVecEnv``
    """
    return SubprocVecEnv([partial(_made_with_state, env_fn) for env_fn in env_fns], **kwargs)


def _made_with_state(env_fn: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    return with_state(masks_in_infos(env_fn()))


# ---------------------------------------------------------------- one process


def _set(members: list[Any], state: EnvState, unpickle: Callable[[bytes], Any]) -> None:
    decoder = Decoder(members, unpickle)
    for member, entry in zip(members, state.members, strict=True):
        if "own" in entry:
            member.set_state(decoder.decode(entry["own"]))
        if "attributes" in entry:
            left_out = {_SERVICE, _PENDING, *_never_saved(member)}
            known = {name: item for name, item in entry["attributes"].items() if name not in left_out}
            links = {name: vars(member)[name] for name in _LINKS & vars(member).keys() if _inside(member)}
            decoder.set_attributes(member, known)
            vars(member).update(links)
        if "workers" in entry:
            _tell(member, entry["workers"], state.inexact, unpickle)
        if state.inexact and isinstance(member, Monitor):
            member.needs_reset = True  # the caller resets, which a Monitor may refuse in the middle of an episode


def _members(root: Any) -> list[Any]:
    """Return all wrappers and envs of this process, from outside to inside. What saves itself hides what is inside."""
    found, pending = [], [root]
    while pending:
        member = pending.pop(0)
        found.append(member)
        if not _saves_itself(member):
            pending[:0] = _inside(member)
    return found


def _inside(member: Any) -> list[Any]:
    if isinstance(member, (gym.Wrapper, VectorWrapper, GymVectorAdapter)):
        return [member.env]
    if isinstance(member, VecEnvWrapper):
        return [member.venv]
    return list(member.envs) if isinstance(member, (DummyVecEnv, SyncVectorEnv)) else []


def _saves_itself(member: Any) -> bool:
    """Whether a class has ``get_state()`` and ``set_state(state)``, other than MuJoCo's ``set_state(qpos, qvel)``."""
    getter, setter = (getattr(type(member), name, None) for name in ("get_state", "set_state"))
    return getter is not None and setter is not None and _takes(getter, 1) and _takes(setter, 2)


def _takes(method: Any, n_arguments: int) -> bool:
    try:
        inspect.signature(method).bind(*range(n_arguments))
    except TypeError:
        return False
    return True


def _excluded(member: Any, foreign: bool) -> Collection[str]:
    """Return the names of attributes that are not saved.

    :param foreign: whether there are envs or wrappers of other packages, which may change what Gymnasium's never do
    """
    if isinstance(member, gym.Env):
        has_table = type(member).__module__.startswith("gymnasium.envs.toy_text.")
        return _EXCLUDED | {"P"} if has_table and not foreign else _EXCLUDED  # Taxi's takes 11 ms and 110 kB
    return _EXCLUDED | _never_saved(member)


def _never_saved(member: Any) -> frozenset[str]:
    """Return the names of attributes by which a member reaches its envs and its caller."""
    if isinstance(member, SubprocVecEnv):
        return _PROCESSES
    if isinstance(member, AsyncVectorEnv):  # observations are in memory that its workers share
        return frozenset(vars(member))
    if _has_workers(member):
        return member.workers_attributes()
    if isinstance(member, VectorAdapter):
        return _OF_THE_CALLER | ({"env"} if isinstance(member, EnvPoolAdapter) else set())
    return frozenset()


def _layout(root: Any, members: list[Any]) -> dict[str, Any]:
    return {
        "n_envs": getattr(root, "num_envs", 1),
        "observation_space": str(root.observation_space),
        "action_space": str(root.action_space),
        "classes": [_name(member) for member in members],
        "workers": [layout for member in members if _is_remote(member) for layout in _ask(member, "layout")],
    }


def _name(member: Any) -> str:
    """Return the full name of a member's class. rl_zoo3 puts a class of its own into the place of TimeLimit."""
    kind = type(member)
    if kind.__module__ == "rl_zoo3.gym_patches":
        kind = kind.__mro__[1]
    return f"{kind.__module__}.{kind.__qualname__}"


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs between two layouts, in words; empty if nothing does."""
    for name in ("n_envs", "observation_space", "action_space"):
        if saved[name] != now[name]:
            return f"{name} is {now[name]}, the saved one's is {saved[name]}"
    if saved["classes"] != now["classes"]:
        short = [[name.rpartition(".")[2] for name in layout["classes"]] for layout in (now, saved)]
        now_short, saved_short = short if short[0] != short[1] else (now["classes"], saved["classes"])
        return f"from outside to inside it is {' > '.join(now_short)}, the saved one is {' > '.join(saved_short)}"
    if saved["workers"] and now["workers"] and len(saved["workers"]) != len(now["workers"]):
        return f"it has {len(now['workers'])} actors, the saved one has {len(saved['workers'])}"
    if len(saved["workers"]) != len(now["workers"]):
        return "either its workers or those of the saved one were made without sb3_pg.envs.make_vec_env"
    differences = map(_difference, saved["workers"], now["workers"])
    kind = "env" if all(worker["n_envs"] == 1 for worker in now["workers"]) else "actor"
    return next((f"{kind} {i}: {text}" for i, text in enumerate(differences) if text), "")


# ---------------------------------------------------------------- other processes


def _is_remote(member: Any) -> bool:
    """Whether a member's envs are in other processes, which give their state."""
    if _has_workers(member):
        return True
    if isinstance(member, SubprocVecEnv):
        return member.has_attr(_SERVICE)
    return isinstance(member, AsyncVectorEnv) and all(member.call("has_wrapper_attr", _SERVICE))


def _has_workers(member: Any) -> TypeGuard[HasWorkers]:
    return hasattr(type(member), "ask_workers")


def _why_hidden(member: Any) -> str:
    """Return why the state of a member's envs is out of reach; empty if it is not."""
    if isinstance(member, EnvPoolAdapter):
        return "EnvPool does not give the state of its envs"
    if isinstance(member, (SubprocVecEnv, AsyncVectorEnv)) and not _is_remote(member):
        kind = type(member).__name__
        return (
            f"the processes of this {kind} do not give the state of their envs; make it with sb3_pg.envs.make_vec_env"
        )
    if isinstance(member, AsyncVectorEnv) and member.autoreset_mode is AutoresetMode.NEXT_STEP:
        return "the processes of an AsyncVectorEnv with autoreset_mode NEXT_STEP do not say which envs reset next"
    return ""


def _ask(member: SubprocVecEnv | AsyncVectorEnv | HasWorkers, what: str) -> list[Any]:
    """Return an answer of :func:`_serve` per env, or per worker that has several."""
    if isinstance(member, SubprocVecEnv):
        return member.env_method(_SERVICE, what)
    if isinstance(member, AsyncVectorEnv):
        return list(member.call(_SERVICE, what))
    return member.ask_workers(what)


def _tell(
    member: SubprocVecEnv | AsyncVectorEnv | HasWorkers,
    states: list[Any],
    inexact: str,
    unpickle: Callable[[bytes], Any],
) -> None:
    """Let the processes of a member restore their envs' states.

    :raises ValueError: a process could not restore a state
    """
    contents = [{**state, "inexact": inexact, "unpickle": CloudpickleWrapper(unpickle)} for state in states]
    kind = "env"
    if isinstance(member, SubprocVecEnv):
        for i, content in enumerate(contents):
            member.set_attr(_PENDING, content, indices=i)
        errors = _ask(member, "set")
    elif isinstance(member, AsyncVectorEnv):
        member.set_attr(_PENDING, contents)
        errors = _ask(member, "set")
    else:
        kind, errors = "actor", member.ask_workers("set", contents)
    for i, error in enumerate(errors):
        if error:
            raise ValueError(f"{kind} {i}: {error}")


def _serve(env: Any, what: str) -> Any:
    """Do what the main process asks a worker for: give its env's layout or state, or set the state.

    The state includes that of the process's global random generators.
    """
    if what == "layout":
        return layout_of(env)
    if what == "get":
        return worker_state(env)
    content = vars(env)[_PENDING]
    vars(env)[_PENDING] = None
    return set_worker_state(env, content)


def layout_of(env: Any) -> dict[str, Any]:
    """Return the layout of a worker's envs, see :class:`EnvState`."""
    return _layout(env, _members(env))


def worker_state(env: Any, with_random_states: bool = True) -> dict[str, Any]:
    """Return the state of a worker's envs.

    :param env: the worker's env, or vectorized envs
    :param with_random_states: whether to add that of the process's global random generators
    """
    random = _global_random_states() if with_random_states else None
    return {"state": tuple(get_env_state(env)), "random": random}


def set_worker_state(env: Any, content: dict[str, Any]) -> str:
    """Set the state of a worker's envs.

    :param env: the worker's env, or vectorized envs
    :param content: from :func:`worker_state`, with "inexact" and "unpickle" of :func:`set_env_state`
    :return: why it is impossible; empty if it was done
    """
    layout, entries, _ = content["state"]
    try:
        _set(_members(env), EnvState(layout, entries, content["inexact"]), content["unpickle"].var)
    except Exception as error:  # noqa: BLE001 (it would end the process)
        return f"{type(error).__name__}: {error}"
    if content["random"] is not None:
        _set_global_random_states(content["random"])
    return ""


def _global_random_states() -> dict[str, Any]:
    states = np.random.get_state(legacy=False), random.getstate(), th.get_rng_state().numpy()  # noqa: NPY002
    return dict(zip(("numpy", "python", "torch"), states, strict=True))


def _set_global_random_states(states: dict[str, Any]) -> None:
    require_position(states["numpy"])
    np.random.set_state(states["numpy"])  # noqa: NPY002 (wrappers such as rl_zoo3's ActionNoiseWrapper use it)
    random.setstate(states["python"])
    th.set_rng_state(th.from_numpy(states["torch"].copy()))
