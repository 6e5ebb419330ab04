"""Optional dependencies, and the extra of this package that installs each of them.

An error about a missing module does not say what to install. :func:`extra_hints` turns it into one that does::

    with extra_hints():
        env = gym.make("LunarLander-v3")  # MissingExtraError: ... pip install "sb3_pg[envs]"
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gymnasium.error import DependencyNotInstalled

EXTRAS: Final = {
    "envpool": "envpool",
    "box2d": "envs",
    "mujoco": "envs",
    "pygame": "envs",
    "popgym": "memory-envs",
    "h5py": "minari",
    "minari": "minari",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "wandb": "track",
    "moviepy": "video",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "plotly": "plots",
    "rliable": "plots",
    "scipy": "plots",
    "seaborn": "plots",
}
"""Top-level module, in lower case -> extra of ``sb3_pg`` that installs it."""


class MissingExtraError(ImportError):
    """An optional dependency is missing. The message names the extra that installs it."""


def explain_missing(error: BaseException) -> ImportError | None:
    """Return a :class:`MissingExtraError` for an error about a missing optional dependency.

    :param error: any exception
    :return: the new error, whose ``__cause__`` is ``error``; None for other errors
    """
    module = _missing_module(error)
    if module is None or module.lower() not in EXTRAS:
        return None
    extra = EXTRAS[module.lower()]
    explained = MissingExtraError(f'{module} is not installed: pip install "sb3_pg[{extra}]"', name=module)
    explained.__cause__ = error
    return explained


@contextmanager
def extra_hints() -> Iterator[None]:
    """Context in which a missing optional dependency raises :class:`MissingExtraError`. Other errors are unchanged.

    :raises MissingExtraError: a module is missing that an extra of this package installs
    """
    try:
        yield
    except Exception as error:
        explained = explain_missing(error)
        if explained is None:
            raise
        raise explained from error


def _missing_module(error: BaseException) -> str | None:
    """Return the top-level name of the module that ``error`` reports as missing; None for other errors."""
    if isinstance(error, MissingExtraError) or not isinstance(error, (ImportError, DependencyNotInstalled)):
        return None
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ModuleNotFoundError) and link.name is not None:
            return link.name.partition(".")[0]
        link = link.__cause__
    # SB3 raises its error about tensorboard long after the failed import: only its text names the module.
    text = re.search(r"(\w+) is not installed", str(error))
    return text.group(1) if text else None
