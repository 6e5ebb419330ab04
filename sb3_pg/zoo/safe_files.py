"""Read what a run has saved without running what its files name: model, replay buffer, statistics and settings.

rl_zoo3 reads them with ``pickle``, ``yaml.UnsafeLoader`` and ``eval``. While a script runs, these are replaced.
"""

import ast
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.utils
import yaml  # type: ignore[import-untyped]
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_pg.algorithms.saved_files import as_zip
from sb3_pg.algorithms.shell import Algorithm
from sb3_pg.checkpoints import read_buffer, read_model, safe_pickle
from sb3_pg.checkpoints.safe_pickle import Vetted
from sb3_pg.errors import DamagedFileError, UntrustedFileError
from sb3_pg.zoo.command_errors import CommandError

#: Wrappers that a run's settings may name.
_WRAPPERS: Final = frozenset(
    {"stable_baselines3.common.atari_wrappers.AtariWrapper", "sb3_contrib.common.wrappers.TimeFeatureWrapper"}
    | {
        f"gymnasium.wrappers.{name}"
        for name in (
            *("ClipAction", "FlattenObservation", "FrameStackObservation", "GrayscaleObservation", "RescaleAction"),
            *("NormalizeObservation", "NormalizeReward", "ResizeObservation", "TimeAwareObservation", "TimeLimit"),
        )
    }
    | {
        f"rl_zoo3.wrappers.{name}"
        for name in (
            *("ActionNoiseWrapper", "ActionSmoothingWrapper", "DelayedRewardWrapper", "FrameSkip", "HistoryWrapper"),
            *("HistoryWrapperObsDict", "MaskVelocityWrapper", "TruncatedOnSuccessWrapper"),
            "YAMLCompatResizeObservation",
        )
    }
)
#: Tensors of SB3's algorithms that are neither in a policy nor in an optimizer.
_VARIABLES: Final = frozenset({"ent_coef_tensor", "log_ent_coef"})


@contextmanager
def safe_files(trusted: bool) -> Iterator[None]:
    """Context in which rl_zoo3 reads files without running what they name, unless they are trusted.

    :param trusted: whether to run what the files name
    """
    algorithms = {name: Loading(cls, trusted) for name, cls in ALGOS.items()}
    patches: list[tuple[Any, Mapping[str, Any]]] = [
        (module, {"ALGOS": algorithms}) for module in (rl_zoo3.enjoy, rl_zoo3.exp_manager, rl_zoo3.utils)
    ]
    if not trusted:
        normalizer = {"VecNormalize": _SafeVecNormalize()}
        patches += [
            (rl_zoo3.exp_manager, normalizer),
            (rl_zoo3.utils, normalizer),
            (yaml, {"UnsafeLoader": SettingsLoader}),
        ]
    with ExitStack() as stack:
        for module, members in patches:
            stack.enter_context(replaced(module, members))
        yield


@contextmanager
def replaced(module: Any, members: Mapping[str, Any]) -> Iterator[None]:
    """Context in which members of a module are replaced.

    :param module: the module
    :param members: name -> what replaces it
    """
    before = {name: getattr(module, name) for name in members}
    vars(module).update(members)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def _refusing(advice: str = "") -> Iterator[None]:
    """Context in which a file that cannot be loaded is an error of the command line.

    :raises CommandError: instead of the file's error
    """
    try:
        yield
    except UntrustedFileError as error:
        raise CommandError(
            f"{error.what} names {error.name}, which loading would run. If you trust whoever wrote the file, add "
            f"--trusted{advice}"
        ) from error
    except DamagedFileError as error:
        raise CommandError(str(error)) from error


class Loading:
    """An algorithm's class, whose ``load`` runs nothing that a file names, unless it is trusted.

    :param cls: a class of this package, of SB3 or of sb3-contrib
    :param trusted: whether to run what files name
    """

    def __init__(self, cls: Any, trusted: bool) -> None:
        self.cls, self.trusted = cls, trusted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make a new model."""
        return self.cls(*args, **kwargs)

    def load(self, path: str, custom_objects: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Load a model as the class does.

        :param path: path of the zip
        :param custom_objects: as in SB3
        :raises CommandError: the file is damaged, or asks for code and is not trusted
        """
        cls: Any = self.cls
        with _refusing():
            if issubclass(cls, Algorithm):
                model = cls.load(path, custom_objects=custom_objects, trusted=self.trusted, **kwargs)
                load_buffer = partial(cls.load_replay_buffer, model, trusted=self.trusted) if _replays(cls) else None
            elif self.trusted:
                return cls.load(path, custom_objects=custom_objects, **kwargs)
            else:
                saved = read_model(path, replaced=custom_objects, device=kwargs.get("device", "auto"))
                if unknown := saved.variables.keys() - _VARIABLES:
                    raise DamagedFileError(path, f"it has the tensors {sorted(unknown)}")
                model = cls.load(as_zip(saved, with_variables=True), custom_objects=saved.data, **kwargs)
                load_buffer = partial(_load_buffer, model) if _replays(cls) else None
        if load_buffer is not None:
            vars(model)["load_replay_buffer"] = load_buffer
        return model


def forget_trust(model: Any) -> None:
    """Undo what :meth:`Loading.load` has added to a model.

    :param model: the model
    """
    vars(model).pop("load_replay_buffer", None)


def _replays(cls: Any) -> bool:
    return hasattr(cls, "load_replay_buffer")


def _load_buffer(model: Any, path: str, **kwargs: Any) -> None:
    """Load a replay buffer into a model of SB3, if reading it runs nothing."""
    with _refusing():
        read_buffer(path)
    type(model).load_replay_buffer(model, path, **kwargs)


class _SafeVecNormalize:
    """Stands for SB3's class in rl_zoo3's modules."""

    def __call__(self, *args: Any, **kwargs: Any) -> VecNormalize:
        """Make a wrapper with new statistics."""
        return VecNormalize(*args, **kwargs)

    def load(self, path: str, venv: VecEnv) -> VecNormalize:
        """Load statistics as SB3's method does."""
        with _refusing(), Path(path).open("rb") as file:
            normalizer = safe_pickle.load(file, path, allow=[VecNormalize])
            if not isinstance(normalizer, VecNormalize) or "set_venv" in vars(normalizer):
                raise DamagedFileError(path, "it is no VecNormalize")
            safe_pickle.read_checked(lambda: normalizer.set_venv(venv), path)
        return normalizer


class SettingsLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Loads what rl_zoo3 writes: dicts in their order, tuples, and classes that are known to be harmless."""

    def get_single_data(self) -> Any:
        """Return the document.

        :raises CommandError: it is damaged, or asks for code
        """
        name = os.fspath(getattr(self, "name", "the file"))
        try:
            with _refusing():
                return _checked(super().get_single_data(), name)
        except yaml.YAMLError as error:
            advice = "If you trust whoever wrote the file, add --trusted"
            raise CommandError(f"{name} cannot be read safely: {error}. {advice}") from error

    def named(self, path: str, _node: Any) -> Any:
        """Return a class."""
        module, _, name = path.rpartition(".")
        return Vetted(str(self.name)).find(module, name)

    def ordered(self, node: Any) -> OrderedDict[Any, Any]:
        """Return a dict."""
        (pairs,) = self.construct_sequence(node, deep=True)
        return OrderedDict(pairs)

    def tuple(self, node: Any) -> tuple[Any, ...]:
        """Return a tuple."""
        return tuple(self.construct_sequence(node, deep=True))


_PYTHON: Final = "tag:yaml.org,2002:python/"
SettingsLoader.add_constructor(f"{_PYTHON}object/apply:collections.OrderedDict", SettingsLoader.ordered)
SettingsLoader.add_constructor(f"{_PYTHON}tuple", SettingsLoader.tuple)
SettingsLoader.add_multi_constructor(f"{_PYTHON}name:", SettingsLoader.named)


def _checked(settings: Any, what: str) -> Any:
    """Return a run's settings, in which rl_zoo3 evaluates and imports some values."""
    if not isinstance(settings, dict):
        return settings
    if isinstance(settings.get("normalize"), str):
        settings["normalize"] = repr(_literal(settings["normalize"], f"'normalize' in {what}"))
    for key in ("env_wrapper", "vec_env_wrapper", "callback"):
        value = settings.get(key)
        for entry in value if isinstance(value, list) else [value]:
            for name in entry if isinstance(entry, dict) else [entry]:
                if name is not None and name not in _WRAPPERS:
                    raise UntrustedFileError(f"{key!r} in {what}", str(name))
    return settings


def _literal(text: str, what: str) -> Any:
    """Return the value of a Python literal, in which ``dict(a=1)`` stands for ``{"a": 1}``."""

    class Dicts(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            if isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
                keys: list[ast.expr | None] = [ast.Constant(keyword.arg) for keyword in node.keywords]
                return ast.Dict(keys, [keyword.value for keyword in node.keywords])
            return node

    try:
        return ast.literal_eval(Dicts().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError) as error:
        raise UntrustedFileError(what, text) from error
