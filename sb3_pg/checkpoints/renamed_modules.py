"""Read files in which modules have the names of earlier layouts of the package.

A pickle stores a class as the name of its module and its own name. The tables below say where the class is now.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

#: Old module -> the module that has its classes now.
MODULES: dict[str, str] = {
    "sb3_pg.algorithms.actor_gradients": "sb3_pg.algorithms.off_pac.losses",
    "sb3_pg.algorithms.base": "sb3_pg.algorithms.on_policy",
    "sb3_pg.algorithms.critic": "sb3_pg.learner.critic",
    "sb3_pg.algorithms.explanation": "sb3_pg.learner.metrics",
    "sb3_pg.algorithms.guards": "sb3_pg.learner.rollback",
    "sb3_pg.algorithms.parameters": "sb3_pg.policies.parameter_sets",
    "sb3_pg.algorithms.q_policies": "sb3_pg.algorithms.off_pac.policies",
    "sb3_pg.algorithms.replaying": "sb3_pg.algorithms.off_policy",
    "sb3_pg.algorithms.scores": "sb3_pg.policies.functional_policy",
    "sb3_pg.algorithms.surrogate": "sb3_pg.learner.trust_region",
    "sb3_pg.algorithms.transition_replay": "sb3_pg.algorithms.off_pac.off_pac",
    "sb3_pg.rollout.acting": "sb3_pg.policies.acting_copy",
    "sb3_pg.rollout.actions": "sb3_pg.policies.actions",
    "sb3_pg.rollout.behavior": "sb3_pg.policies.behavior",
    "sb3_pg.rollout.evaluation": "sb3_pg.rollout.make_batch",
    "sb3_pg.rollout.finite": "sb3_pg.rollout.nonfinite",
    "sb3_pg.rollout.forward": "sb3_pg.policies.score_actions",
    "sb3_pg.rollout.plain": "sb3_pg.policies.mlp_fast_path",
    "sb3_pg.rollout.progress": "sb3_pg.rollout.rollout_counter",
    "sb3_pg.rollout.replay": "sb3_pg.rollout.trajectory_buffer",
    "sb3_pg.rollout.samplers": "sb3_pg.policies.samplers",
    "sb3_pg.rollout.structure": "sb3_pg.policies.policy_cache",
    "sb3_pg.rollout.transitions": "sb3_pg.rollout.transition_buffer",
}
#: Old "module:name" -> new "module:name", for classes that MODULES does not place correctly, or that have a new name.
#: The old module may still exist.
NAMES: dict[str, str] = {"sb3_pg.algorithms.flat_step:FlatRMSprop": "torch.optim:RMSprop"}

_lock = Lock()
_n_active = 0
_replaced: dict[str, ModuleType | None] = {}


class _OldModule(ModuleType):
    """Stands in for an old module, and imports the new one when a name is looked up."""

    def __init__(self, name: str, existing: ModuleType | None) -> None:
        super().__init__(name)
        self._existing = existing

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # for code that inspects all of sys.modules
            raise AttributeError(name)
        old = self.__name__
        if f"{old}:{name}" in NAMES:
            module, name = NAMES[f"{old}:{name}"].split(":")
        elif self._existing is not None:
            return getattr(self._existing, name)
        elif old in MODULES:
            module = MODULES[old]
        else:
            raise AttributeError(name)
        return getattr(import_module(module), name)


@contextmanager
def renamed_modules() -> Iterator[None]:
    r"""Let ``pickle`` find the package's classes under the module names of earlier layouts.

    ``sys.modules`` holds the old names inside the ``with`` block. If several blocks overlap, it is restored after the
    last one.

    >>> import pickle
    >>> with renamed_modules():
    ...     pickle.loads(b"csb3_pg.rollout.replay\nTrajectoryReplayBuffer\n.").__module__
    'sb3_pg.rollout.trajectory_buffer'
    """
    global _n_active  # noqa: PLW0603 (sys.modules is global too)
    with _lock:
        if _n_active == 0:
            moved_classes = {key.split(":")[0] for key in NAMES}
            existing = {name: _existing_module(name) for name in moved_classes if name not in MODULES}
            _replaced.update({name: sys.modules.get(name) for name in MODULES} | existing)
            sys.modules.update({name: _OldModule(name, module) for name, module in _replaced.items()})
        _n_active += 1
    try:
        yield
    finally:
        with _lock:
            _n_active -= 1
            if _n_active == 0:
                for name, module in _replaced.items():
                    if module is None:
                        del sys.modules[name]
                    else:
                        sys.modules[name] = module
                _replaced.clear()


def _existing_module(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
