"""Private names of other packages, each with what breaks if it goes.

Nothing else in the package uses a private name of another package, but for hooks that SB3 documents for subclasses
(``BaseCallback._on_step`` and the like). Sections are by project. rl_zoo3 is not imported
here: ``import sb3_pg`` does without it.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch as th
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.module import _has_any_global_hook

# ---------------------------------------------------------------- Python: pickle


#: The unpickler in Python. The one in C cannot check what an opcode does. Without it no pickle loads untrusted.
PythonUnpickler: Any = pickle._Unpickler


# ---------------------------------------------------------------- torch: modules


#: Whether there are hooks on the calls of all modules. Without it they are not called where bare layers stand in.
has_global_hooks: Callable[[], bool] = _has_any_global_hook


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries of hooks on a module's calls: those on its forward, then the others; they stay up to date."""
    # Module._forward_hooks and the like: without them hooks are not called where bare layers replace the modules.
    forward = [module._forward_hooks, module._forward_pre_hooks]
    return [*forward, module._backward_hooks, module._backward_pre_hooks]


def contents_of(module: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries of a module's own submodules, parameters and buffers; they stay up to date."""
    # Module._modules, _parameters, _buffers: without them a replaced layer or weight goes unnoticed.
    return [module._modules, module._parameters, module._buffers]


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether the user has called ``module.compile()``."""
    # Module._compiled_call_impl: without it bare layers replace what the user has compiled.
    return module._compiled_call_impl is not None


def compiled_original(module: nn.Module) -> Any:
    """The module that ``torch.compile`` has wrapped into this one; None if it has not."""
    # "_orig_mod": without it a policy behind torch.compile is not told from one with methods of its own.
    return module._modules.get("_orig_mod")


# ---------------------------------------------------------------- torch: tensors and distributions


#: All tensors, of one kind, as one vector; of one tensor it is a view. torch.cat does the same, slower.
flatten: Callable[..., Any] = _flatten_dense_tensors
#: The inverse of ``flatten``, in the shapes of other tensors. split and view do the same, slower.
unflatten: Callable[..., Any] = _unflatten_dense_tensors
#: Multiply tensors in place by a scalar tensor. One by one it takes longer.
scale_all: Callable[..., Any] = th._foreach_mul_


#: How often a tensor was changed in place. Without it training fails with an error of autograd where a callback writes
#: the parameters' own values into them, see sb3_pg/policies/kept_scores.py.
version_of: Callable[[th.Tensor], Any] = attrgetter("_version")


#: Name of the attribute that says whether torch's distributions check their arguments. Without it the user's own
#: ``set_default_validate_args`` cannot be put back.
VALIDATE_ARGS = "_validate_args"


# ---------------------------------------------------------------- Stable-Baselines3: policies

#: ActorCriticPolicy's way from the actor's last layer to the distribution. Without the name a policy with such a method
#: of its own (an action mask) is sampled and scored without it.
HEAD = "_get_action_dist_from_latent"


#: BasePolicy's way from observations to actions. Without the name a policy with such a method of its own is sampled
#: without it.
PREDICT = "_predict"


def predicted(policy: Any, observations: Any, deterministic: bool) -> th.Tensor:
    """Actions as a policy draws them, before clipping or rescaling."""
    # See PREDICT: without it squashed policies cannot predict actions of a Box of integers.
    actions: th.Tensor = policy._predict(observations, deterministic=deterministic)
    return actions


# ---------------------------------------------------------------- Stable-Baselines3: VecEnv


def seeds_and_options(env: Any) -> tuple[list[int | None], list[dict[str, Any]]]:
    """Seeds and options for the next reset of a VecEnv, one per env."""
    # VecEnv._seeds, _options: without them `seed` and `set_options` have no effect on our vectorized envs.
    return env._seeds, env._options


def clear_seeds_and_options(env: Any) -> None:
    """Use each seed and option for one reset only, as SB3's VecEnvs do."""
    # VecEnv._reset_seeds, _reset_options: without them every reset of our vectorized envs repeats the same episodes.
    env._reset_seeds()
    env._reset_options()


def set_seeds_and_options(env: Any, seeds: list[int | None], options: list[dict[str, Any]]) -> None:
    """Set seeds and options for the next reset of a VecEnv."""
    # VecEnv._seeds, _options: without them a reset that looks for action masks in infos uses up the user's seeds.
    env._seeds, env._options = seeds, options


def env_indices(env: Any, indices: Any) -> Iterable[int]:
    """The envs that ``indices`` of a VecEnv's method means: None is all of them."""
    # VecEnv._get_indices: without it `get_attr`, `set_attr`, `env_method` of our vectorized envs fail.
    return env._get_indices(indices)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- Gymnasium


def time_limit(wrapper: Any) -> int:
    """Longest episode that a ``TimeLimit`` allows."""
    # TimeLimit._max_episode_steps: without it `sb3-pg train --vec-env vector` cannot keep a changed time limit.
    return int(wrapper._max_episode_steps)


#: Names of attributes in which Gymnasium's wrappers and EzPickle keep the arguments of their constructor. Without them
#: these arguments are saved with an env's state, and envs with arguments that cannot be pickled are not saved.
CONSTRUCTOR_ARGUMENTS = ("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs")


def generator_of_space(space: Any) -> Any:
    """A space's random generator; None if it has not drawn yet."""
    # Space._np_random: Space.np_random would make a generator. Without it spaces' random states are not saved.
    return space._np_random


def set_generator_of_space(space: Any, generator: Any) -> None:
    """Give a space a random generator, or None."""
    space._np_random = generator


# ---------------------------------------------------------------- rl_zoo3: ExperimentManager


def use_default_block(manager: Any) -> None:
    """Let an Atari env have the ``default:`` block of a config file that has no ``atari:`` block."""
    # ExperimentManager._is_atari: without it `sb3-pg train` on Atari raises KeyError for our algorithms.
    manager._is_atari = False


def with_action_noise(manager: Any, hyperparams: dict[str, Any], env: Any) -> dict[str, Any]:
    """Hyperparameters in which a noise object stands for ``noise_type`` and ``noise_std``."""
    # ExperimentManager._preprocess_action_noise: without it `sb3-pg train` refuses hyperparameters with action noise.
    return manager._preprocess_action_noise(hyperparams, {}, env)  # type: ignore[no-any-return]


@contextmanager
def loaded_by(manager: Any, load: Callable[[dict[str, Any], Any], Any]) -> Iterator[None]:
    """Context in which ``setup_experiment`` gets its model from this function of hyperparameters and env."""
    # ExperimentManager._load_pretrained_agent, continue_training: without them `sb3-pg train --resume` starts anew.
    manager._load_pretrained_agent, manager.continue_training = load, True
    try:
        yield
    finally:
        manager.continue_training = False
        del manager._load_pretrained_agent
