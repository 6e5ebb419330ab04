"""Optional dependencies: which extra of this package brings which module.

An error about a missing module names the module, not what to install here. :func:`extra_hints` turns it into one that
does::

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
    "tensorboard": "tensorboard",
    "wandb": "track",
    "moviepy": "video",
    "plotly": "plots",
    "rliable": "plots",
    "scipy": "plots",
    "seaborn": "plots",
}
"""Top-level module, in lower case, to the extra of ``sb3_pg`` that installs it."""


class MissingExtraError(ImportError):
    """An optional dependency is missing; the message names the extra that brings it, ``__cause__`` is the original."""


def explain_missing(error: BaseException) -> ImportError | None:
    """The error to raise instead of one that comes from a missing optional dependency.

    :param error: any exception
    :return: a :class:`MissingExtraError` caused by ``error``, or None if no module of an extra is missing
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
    """Within it, a missing optional dependency raises :class:`MissingExtraError`; other errors pass unchanged.

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
    """Top-level name of the module whose absence ``error`` reports, None if it reports none or is explained already."""
    if isinstance(error, MissingExtraError) or not isinstance(error, (ImportError, DependencyNotInstalled)):
        return None
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ModuleNotFoundError) and link.name is not None:
            return link.name.partition(".")[0]
        link = link.__cause__
    # SB3 raises the error on tensorboard long after the import failed, so that only the text tells.
    text = re.search(r"(\w+) is not installed", str(error))
    return text.group(1) if text else None
