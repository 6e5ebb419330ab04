"""A policy's networks through ``torch.compile``: in updates, where a graph is differentiated once."""

import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pg.policies.policy_cache import is_listened_to, is_patched

_IN_USE: ContextVar[bool] = ContextVar("compiled networks are in use", default=False)


def compile_networks(policy: BasePolicy) -> None:
    """Compile the policy's feature extractors and multi-layer networks, for use in :func:`compiled`; names stay.

    Copies of the policy are not compiled. For the whole process, compiled graphs keep what they need to be
    differentiated again.

    :param policy: the policy
    :raises RuntimeError: there is no compiler for the policy's device
    """
    _try_compiler(policy.device)
    # A logged update differentiates its graph for the step, and for what the step is compared with.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    networks = list(_networks(policy))
    if not networks:
        warnings.warn(
            f"compile=True has no effect: {type(policy).__name__} has no network of several layers", stacklevel=2
        )
    for network in networks:
        network._compiled_call_impl = _Compiled(network)  # where nn.Module.compile puts it


@contextmanager
def compiled(on: bool = True) -> Iterator[None]:
    """Let the body use compiled networks, where a policy has them; or the original ones, to differentiate twice.

    :param on: which of the two; False stops what the user has compiled, too
    """
    token = _IN_USE.set(on)
    try:
        with nullcontext() if on else th.compiler.set_stance("force_eager"):
            yield
    finally:
        _IN_USE.reset(token)


class _Compiled:
    """What is called in place of a network's ``_call_impl``.

    :param network: the network
    """

    #: what tells it from what the user has compiled
    for_updates_only = True

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._call: Callable[..., Any] = network._call_impl
        # Random numbers are those of the original.
        self._compiled: Callable[..., Any] = th.compile(_with_own_code(self._call), options={"fallback_random": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A graph does not know of hooks that came after it.
        modules = [*self._network.modules()]
        if _IN_USE.get() and not is_listened_to(modules) and not any(map(is_patched, modules)):
            return self._compiled(*args, **kwargs)
        return self._call(*args, **kwargs)


def _with_own_code(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same, with a code object of its own: torch keeps by code what it has compiled."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    code = called.__code__.replace()
    return types.FunctionType(code, called.__globals__, called.__name__, called.__defaults__, called.__closure__)


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, nn.Sequential | BaseFeaturesExtractor):
            yield from _networks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _try_compiler(device: th.device) -> None:
    try:
        th.compile(_with_own_code(th.neg))(th.zeros(2, device=device))
    except Exception as error:
        raise RuntimeError(
            f"compile=True takes what torch.compile needs for device {str(device)!r}, a C++ compiler on the CPU and "
            f"Triton on a GPU; give compile=False, to load() as well, to do without: {error}"
        ) from error
