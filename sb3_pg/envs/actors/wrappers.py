"""Wrappers of the VecEnv kind around envs whose parts collect by themselves: each part has them too.

The learner's wrappers hold the state. Before a fragment, each part gets the state of its own envs; after it, the
learner gets that back. The running statistics of VecNormalize are shared: each part goes on with its own copy, and what
all have seen is put together afterwards.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import (
    StackedObservations,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_pg.envs.action_masks import ActionMaskVecEnv
from sb3_pg.policies import Share, is_patched

#: Attributes with one row per env, by class.
_PER_ENV: Final[dict[type[VecEnvWrapper], frozenset[str]]] = {
    ActionMaskVecEnv: frozenset({"_resets"}),
    VecCheckNan: frozenset({"_actions", "_observations"}),
    VecFrameStack: frozenset({"stacked_obs"}),
    VecMonitor: frozenset({"episode_returns", "episode_lengths"}),
    VecNormalize: frozenset({"returns", "old_obs", "old_reward"}),
    VecTransposeImage: frozenset(),
}
#: Other attributes that a rollout changes. Those of all parts are put together.
_TOGETHER: Final[dict[type[VecEnvWrapper], frozenset[str]]] = {
    VecCheckNan: frozenset({"_user_warned"}),
    VecMonitor: frozenset({"episode_count"}),
    VecNormalize: frozenset({"obs_rms", "ret_rms"}),
}
#: Attributes that each part has of its own, or that stay with the learner.
_LEFT_OUT: Final = frozenset({"venv", "class_attributes", "num_envs", "results_writer", "_seeds", "_options"})


class WrapperState(NamedTuple):
    """A wrapper as it can be sent.

    :param cls: its class
    :param attributes: its attributes, those with rows for the envs of one part
    """

    cls: type[VecEnvWrapper]
    attributes: dict[str, Any]


def wrappers_around(env: VecEnv) -> list[VecEnvWrapper]:
    """Return the wrappers of an env, from the innermost to the outermost."""
    found = []
    while isinstance(env, VecEnvWrapper):
        found.append(env)
        env = env.venv
    return found[::-1]


def why_not_rebuilt(wrapper: VecEnvWrapper) -> str:
    """Return words for a wrapper that parts cannot have, empty if they can."""
    name = type(wrapper).__name__
    if type(wrapper) not in _PER_ENV:
        return name
    return f"{name} with replaced methods" if is_patched(wrapper) else ""


# ---------------------------------------------------------------- to the parts


def states_for(env: VecEnv, share: Share) -> list[WrapperState]:
    """Return the wrappers of an env for one part, from the innermost to the outermost.

    :param env: with known wrappers only
    :param share: the envs of the part
    """
    states = []
    for wrapper in wrappers_around(env):
        attributes = {name: value for name, value in vars(wrapper).items() if name not in _LEFT_OUT}
        for name in _PER_ENV[type(wrapper)] & attributes.keys():
            attributes[name] = _rows_of(attributes[name], share.rows)
        states.append(WrapperState(type(wrapper), attributes | {"reset_infos": [{}] * share.n_envs}))
    return states


def wrapped(env: VecEnv, states: Sequence[WrapperState]) -> VecEnv:
    """Return a part's envs in its wrappers.

    :param env: the envs of the part
    :param states: from :func:`states_for`
    """
    for state in states:
        wrapper = state.cls.__new__(state.cls)
        attributes = state.attributes | {name: copy.deepcopy(state.attributes[name]) for name in _changing(state)}
        members = dict(inspect.getmembers(state.cls))
        vars(wrapper).update(attributes, venv=env, num_envs=env.num_envs, class_attributes=members)
        if isinstance(wrapper, VecMonitor):
            wrapper.results_writer = None
        env = wrapper
    return env


# ---------------------------------------------------------------- and back


def taken_back(env: VecEnv) -> list[WrapperState]:
    """Return what a rollout has changed in the wrappers of a part, from the innermost to the outermost.

    :param env: from :func:`wrapped`
    """
    states = []
    for wrapper in wrappers_around(env):
        state = WrapperState(type(wrapper), vars(wrapper))
        states.append(WrapperState(state.cls, {name: state.attributes[name] for name in _changing(state)}))
    return states


def _changing(state: WrapperState) -> list[str]:
    """Return the names of attributes that a rollout changes."""
    changing = _PER_ENV[state.cls] | _TOGETHER.get(state.cls, frozenset())
    return [name for name in state.attributes if name in changing]


def put_together(env: VecEnv, parts: Sequence[Sequence[WrapperState]]) -> None:
    """Give the learner's wrappers the state of those of all parts.

    :param env: the learner's env with its wrappers
    :param parts: from :func:`taken_back`, in the order of the envs
    """
    for wrapper, *states in zip(wrappers_around(env), *parts, strict=True):
        attributes = vars(wrapper)
        for name in states[0].attributes:
            values = [state.attributes[name] for state in states]
            if name in _PER_ENV[type(wrapper)]:
                attributes[name] = _side_by_side(attributes.get(name), values)
            else:
                attributes[name] = _merged(attributes[name], values, attributes[name])


def put_back(env: VecEnv, sent: Sequence[WrapperState], returned: Sequence[WrapperState]) -> None:
    """Add what one part has seen to what the learner's wrappers share, while other parts go on.

    :param env: the learner's env with its wrappers
    :param sent: from :func:`shared_state`, when the part began
    :param returned: from :func:`taken_back`, of the part
    """
    for wrapper, before, after in zip(wrappers_around(env), sent, returned, strict=True):
        attributes = vars(wrapper)
        for name, value in before.attributes.items():
            attributes[name] = _merged(attributes[name], [after.attributes[name]], value)


def shared_state(states: Sequence[WrapperState]) -> list[WrapperState]:
    """Return a copy of what all parts have in common of what a rollout changes.

    :param states: from :func:`states_for`
    """
    shared = []
    for cls, attributes in states:
        names = _TOGETHER.get(cls, frozenset()) & attributes.keys()
        shared.append(WrapperState(cls, {name: copy.deepcopy(attributes[name]) for name in names}))
    return shared


def going_on(states: Sequence[WrapperState], returned: Sequence[WrapperState]) -> list[WrapperState]:
    """Return the learner's wrappers for a part that goes on where its latest fragment has ended.

    :param states: from :func:`states_for`
    :param returned: from :func:`taken_back`, of the part
    """
    return [
        WrapperState(
            cls, attributes | {name: after.attributes[name] for name in _PER_ENV[cls] & after.attributes.keys()}
        )
        for (cls, attributes), after in zip(states, returned, strict=True)
    ]


def _merged(now: Any, values: Sequence[Any], before: Any) -> Any:
    """Return what all parts have in common, with what they have seen.

    :param now: the learner's. Statistics are changed in place
    :param values: those of parts that have gone on from ``before``
    :param before: what these parts have begun with
    """
    if isinstance(now, dict):
        for key, rms in now.items():
            merge_statistics(rms, [value[key] for value in values], before[key])
    elif isinstance(now, RunningMeanStd):
        merge_statistics(now, values, before)
    elif isinstance(now, bool):
        return now or any(values)
    else:  # a count
        return now + sum(value - before for value in values)
    return now


def merge_statistics(
    base: RunningMeanStd, parts: Sequence[RunningMeanStd], before: RunningMeanStd | None = None
) -> None:
    r"""Add to running statistics what several copies have seen since.

    With n, m and M the count, the mean and the sum of squared deviations,

    .. math:: n = n_a + n_b, \quad m = m_a + \delta \frac{n_b}{n}, \quad M = M_a + M_b + \delta^2 \frac{n_a n_b}{n},
       \quad \delta = m_b - m_a

    is solved for b, which a copy has seen besides a, the base. Source: Chan, Golub and LeVeque (1983), eq. 2.1.

    :param base: is changed. Its object stays the same, since evaluation envs may share it
    :param parts: copies of ``before`` that have gone on, in the order of the envs. A single one replaces the numbers of
        ``base`` if these are still those of ``before``
    :param before: what the parts have begun with; None for ``base``
    """
    before = base.copy() if before is None or before is base else before
    if len(parts) == 1 and base.count == before.count:
        vars(base).update(vars(parts[0]))
        return
    for part in parts:
        count = part.count - before.count
        if count <= 0:
            continue
        mean = (part.mean * part.count - before.mean * before.count) / count
        delta = mean - before.mean
        squares = part.var * part.count - before.var * before.count - delta**2 * before.count * count / part.count
        base.update_from_moments(mean, np.maximum(squares, 0.0) / count, count)


# ---------------------------------------------------------------- rows


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to an array, to each array of a dict, or to those of stacked observations."""
    if isinstance(value, dict):
        return {key: function(array) for key, array in value.items()}
    return function(value)


def _rows_of(value: Any, rows: slice) -> Any:
    if isinstance(value, StackedObservations):
        taken: Any = copy.copy(value)
        if hasattr(value, "sub_stacked_observations"):
            inner = value.sub_stacked_observations.items()
            taken.sub_stacked_observations = {key: _rows_of(one, rows) for key, one in inner}
        else:
            taken.stacked_obs = value.stacked_obs[rows]
        return taken
    return _each(value, lambda array: array[rows])


def _side_by_side(old: Any, values: Sequence[Any]) -> Any:
    if isinstance(values[0], StackedObservations):
        if hasattr(values[0], "sub_stacked_observations"):
            for key, one in old.sub_stacked_observations.items():
                _side_by_side(one, [value.sub_stacked_observations[key] for value in values])
        else:
            old.stacked_obs = np.concatenate([value.stacked_obs for value in values])
        return old
    if isinstance(values[0], dict):
        return {key: np.concatenate([value[key] for value in values]) for key in values[0]}
    return np.concatenate(values)
