"""Errors that are raised in several modules."""


class SingleStepError(ValueError, AssertionError):
    """A batch has a single step, whose normalized advantage would be 0.

    It is also an AssertionError, since sb3_contrib's TRPO raises that.
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
        self.tensor, self.value, self.env, self.step = tensor, value, env, step
