"""Errors that are raised in several modules."""

from typing import Any


class SingleStepError(ValueError, AssertionError):
    """A batch has a single step, whose normalized advantage would be 0.

    It is also an AssertionError, since sb3_contrib's TRPO raises that.
    """


class SpaceError(ValueError, AssertionError):
    """An observation or action space is not supported.

    It is also an AssertionError, since SB3 raises that.
    """


class NonFiniteError(FloatingPointError, ValueError):
    """A number is NaN or infinite. Nothing was updated with it.

    It is also a ValueError, since rl_zoo3's hyperparameter search prunes a trial that raises one.

    :param tensor: name of the number, such as ``"reward"`` or ``"gradient of action_net.weight"``
    :param value: its value
    :param env: index of the environment, None if unknown
    :param step: time step within the rollout, None if unknown
    :param hint: advice that is added to the message
    """

    def __init__(
        self, tensor: str, value: float, env: int | None = None, step: int | None = None, hint: str = ""
    ) -> None:
        where = "" if env is None else f" in env {env}"
        when = "" if step is None else f" at step {step} of the rollout"
        super().__init__(f"{tensor} is {value}{where}{when}. {hint}".rstrip())
        self.tensor, self.value, self.env, self.step, self.hint = tensor, value, env, step, hint

    def counted_from(self, first_env: int) -> "NonFiniteError":
        """Return the error with the number of the env among more envs, and the same cause.

        :param first_env: number of the first env that the error counts from
        """
        if self.env is None or not first_env:
            return self
        error = type(self)(self.tensor, self.value, self.env + first_env, self.step, self.hint)
        error.__cause__ = self.__cause__
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make the error anew, for pickle."""
        return type(self), (self.tensor, self.value, self.env, self.step, self.hint)


class UntrustedFileError(ValueError):
    """A file asks for a class or function that may run code. Nothing of it was run.

    :param what: the file, or the field of the file
    :param name: the class or function, as ``module.name``
    """

    def __init__(self, what: str, name: str) -> None:
        maker = name.startswith("cloudpickle.")
        kind = "code of its own" if maker else name
        advice = "" if maker else f"Name it in allow=[{name.rpartition('.')[2]}], or, if "
        super().__init__(
            f"{what} holds {kind}, which loading would run. {advice or 'If '}you trust whoever wrote the file, "
            "give trusted=True, which runs all code in it."
        )
        self.what, self.name = what, name


class DamagedFileError(ValueError):
    """A file is truncated, changed, or not of the expected kind.

    :param what: the file, or the field of the file
    :param why: what is wrong with it
    """

    def __init__(self, what: str, why: object) -> None:
        super().__init__(f"{what} cannot be read: {why}")
        self.what = what


class CheckpointError(ValueError):
    """A checkpoint is damaged, or its folder belongs to another run."""
