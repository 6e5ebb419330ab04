"""The state of MuJoCo's simulations, exact to the bit.

``mjSTATE_INTEGRATION`` decides all later steps. Positions, velocities and forces that MuJoCo derives from it lag behind
by one computation, and envs read them before the next step (Ant its torso's position). They are saved too: all arrays
of floating-point numbers in the main buffer of ``MjData``. Contacts are not saved; the next step computes them anew.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np


def get_data(data: Any) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Return what ``mj_getState`` gives, the names of derived arrays, and these arrays as one vector.

    :param data: an ``MjData``
    """
    mujoco, model = import_module("mujoco"), data.model
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, integration, kind)
    names = _derived(data)
    return integration, names, np.concatenate([getattr(data, name).ravel() for name in names])


def set_data(data: Any, integration: np.ndarray, names: tuple[str, ...], derived: np.ndarray) -> None:
    """Set what :func:`get_data` returns.

    :raises ValueError: the simulation has arrays of other names or sizes
    """
    mujoco, names_now = import_module("mujoco"), _derived(data)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    arrays = [getattr(data, name) for name in names_now]
    sizes = mujoco.mj_stateSize(data.model, kind), sum(array.size for array in arrays)
    if (names, integration.size, derived.size) != (names_now, *sizes):
        raise ValueError(
            f"MuJoCo's state must have {integration.size} and {derived.size} numbers, as the saved env's; it has "
            f"{sizes[0]} and {sizes[1]}: the model or MuJoCo's version differs"
        )
    mujoco.mj_setState(data.model, data, integration, kind)
    start = 0
    for array in arrays:
        array[...] = derived[start : start + array.size].reshape(array.shape)
        start += array.size


def why_not_saved(data: Any) -> str:
    """Return why the state of a simulation cannot be saved; empty if it can.

    :param data: an ``MjData``
    """
    mujoco, model = import_module("mujoco"), data.model
    if model.nplugin:
        return "is a simulation with plugins, whose state MuJoCo does not give"
    for name in ("mjENBL_SLEEP", "mjENBL_IPC"):
        flag = getattr(mujoco.mjtEnableBit, name, None)
        if flag is not None and model.opt.enableflags & int(flag):
            return f"is a simulation with {name}, whose state is not in mjSTATE_INTEGRATION"
    return ""


def get_model(model: Any) -> dict[str, Any]:
    """Return all floating-point numbers of a model, which wrappers and envs may change (domain randomization).

    :param model: an ``MjModel``
    """
    return {name: np.array(value) for name, value in _numbers(model)}


def set_model(model: Any, numbers: dict[str, Any]) -> None:
    """Set what :func:`get_model` returns.

    :raises ValueError: the model has arrays of other names or shapes
    """
    now: dict[str, Any] = dict(_numbers(model)) if numbers else {}
    for name, value in numbers.items():
        if name not in now or np.shape(now[name]) != value.shape:
            raise ValueError(f"{name} of the MuJoCo model must have the shape {value.shape}, as the saved env's")
        owner = model.opt if name.startswith("opt.") else model
        if value.ndim:
            now[name][...] = value
        else:
            setattr(owner, name.removeprefix("opt."), float(value))


def _numbers(model: Any) -> Iterator[tuple[str, Any]]:
    for prefix, owner in (("", model), ("opt.", model.opt)):
        for name in dir(owner):
            value = None if name.startswith("_") else getattr(owner, name)
            if isinstance(value, float) or (isinstance(value, np.ndarray) and value.size and value.dtype.kind == "f"):
                yield prefix + name, value


def _derived(data: Any) -> tuple[str, ...]:
    """Return the names of the floating-point arrays in the main buffer, and ``energy``.

    Other arrays are in MuJoCo's arena: their memory moves from step to step.
    """
    start = _address(data.qpos)
    arrays = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    return ("energy", *(name for name, array in arrays.items() if _is_derived(array, start, data.nbuffer)))


def _is_derived(value: Any, start: int, size: int) -> bool:
    floating = isinstance(value, np.ndarray) and value.size and value.dtype == np.float64
    return bool(floating) and 0 <= _address(value) - start < size


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
