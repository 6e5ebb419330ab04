"""A policy's networks through ``torch.compile``: for the updates, which differentiate once."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_pg.rollout.structure import forget_structure, structure_of


def compile_networks(policy: BasePolicy) -> None:
    """Have the policy's feature extractors and multi-layer networks compiled, in place; parameters keep their names.

    :param policy: the policy
    :raises RuntimeError: there is no compiler for the policy's device
    """
    _try_compiler(policy.device)
    # A logged update differentiates its graph twice over: for the step, and for what the step is compared with.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    for network in _networks(policy):
        # As nn.Module.compile does it, which leaves torch's own modules as they are (pytorch/pytorch#150915).
        network._compiled_call_impl = th.compile(_calling(network), dynamic=True)  # batches may be of any size
    forget_structure(policy)


def eager(policy: BasePolicy) -> AbstractContextManager[None]:
    """Let the body call the policy's networks uncompiled: to differentiate twice, or to act, one small batch at a time.

    :param policy: any policy
    """
    if not structure_of(policy).is_compiled:
        return nullcontext()
    stance: AbstractContextManager[None] = th.compiler.set_stance("force_eager")
    return stance


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, FlattenExtractor):
            continue
        if isinstance(child, nn.Sequential | BaseFeaturesExtractor):
            yield child
        else:
            yield from _networks(child)


def _calling(network: nn.Module) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return network._call_impl(*args)

    return call


def _try_compiler(device: th.device) -> None:
    try:
        th.compile(lambda x: x + 1)(th.zeros(2, device=device))  # before training, rather than in the first update
    except Exception as error:
        raise RuntimeError(
            f"compile=True takes what torch.compile needs for device {str(device)!r}, a C++ compiler on the CPU and "
            f"Triton on a GPU: {error}"
        ) from error
