"""Errors that name what went wrong and where."""


class SingleStepError(ValueError, AssertionError):
    """A batch is a single step, of which normalizing leaves nothing.

    It is an AssertionError too, which is what sb3_contrib's TRPO raises.
    """


class NonFiniteError(FloatingPointError, ValueError):
    """A NaN or infinity where a number is needed; nothing was updated with it.

    It is a ValueError too, since hyperparameter searches (Optuna in rl_zoo3) prune a trial on one.

    :param tensor: what is not finite, e.g. ``"reward"``, ``"gradient of action_net.weight"``
    :param value: the offending value
    :param env: index of the environment, if it can be told
    :param step: time step within the rollout, if it can be told
    :param hint: what may help
    """

    def __init__(
        self, tensor: str, value: float, env: int | None = None, step: int | None = None, hint: str = ""
    ) -> None:
        where = "" if env is None else f" in env {env}"
        when = "" if step is None else f" at step {step} of the rollout"
        super().__init__(f"{tensor} is {value}{where}{when}. {hint}".rstrip())
        self.tensor, self.value, self.env, self.step = tensor, value, env, step
