"""Anchors: what holds a policy near another one, or near data, while it learns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from typing_extensions import Self

from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import Distributions

#: The penalty at some states, nats: a scalar, with gradient where autograd is enabled. It takes their observations (one
#: row per state, or their history), and the policy's distributions there; None for the latter if they are not known.
Penalty = Callable[[Any, Distributions | None], th.Tensor]


class Anchor(ABC):
    r"""A penalty P of the actor, which the objective of each update is reduced by.

    .. math:: L_k(\theta) = L(\theta) - c\, d^k\, P(\theta)

    k counts the actor's updates with this anchor. It leaves out those that only train the critic, which
    ``train/n_updates`` counts, and those that fail. An update whose weight :math:`c\, d^k` is 0 is the same as without
    an anchor, to the bit.

    P is a mean over steps. Where a :class:`~sb3_pg.learner.GradientStep` sums L over the time of complete episodes, the
    weight is :math:`c\, d^k\, \bar T`, with the mean length :math:`\bar T` of the batch's episodes: c means the same
    as with segments, whose L is a mean over steps too.

    A copy shares what the anchor remembers, which is replaced and never changed in place.

    :param coef: c, reward units per nat
    :param decay: d, in [0, 1]
    :raises TypeError: an argument is no number
    :raises ValueError: an argument is out of range
    """

    #: name of the penalty in the log
    name: ClassVar[str]
    #: whether the penalty depends on the states that it is taken at
    uses_states: ClassVar[bool] = True
    #: Attributes that are made anew when they are needed: neither copied nor stored.
    transient: ClassVar[tuple[str, ...]] = ("normalize", "fits")
    #: function from raw observations to those that the policy gets at present; None for no change
    normalize: Callable[[Any], Any] | None = None
    #: whether the anchor is known to fit the policy
    fits = False

    def __init__(self, coef: float, decay: float = 1.0) -> None:
        self.coef, self.decay = coef, decay
        self.n_updates = 0
        self.require_valid()

    @property
    def weight(self) -> float:
        """The present weight c d^k, reward units per nat."""
        return self.coef * self.decay**self.n_updates

    @property
    def what_is_missing(self) -> str:
        """Which data a step needs that a model's file has left out, and how to give them; empty if there are none."""
        return ""

    @abstractmethod
    def draw(self, policy: ActorCriticPolicy) -> Penalty:
        """Return the penalty of a step. It stays the same function of the policy's parameters.

        :param policy: the policy that is trained
        :raises ValueError: the anchor does not fit the policy
        """

    def require_fit(self, policy: ActorCriticPolicy, observation_space: spaces.Space[Any] | None = None) -> None:
        """Require a policy that the anchor can hold.

        :param policy: the policy that is trained
        :param observation_space: space of raw observations; None for the policy's
        :raises ValueError: it cannot
        """
        del policy, observation_space
        self.fits = True

    def require_valid(self) -> None:
        """Check the attributes, which users set and files fill.

        :raises TypeError: one is of the wrong type
        :raises ValueError: one is out of range
        """
        self.coef = _number("coef", self.coef, math.inf)
        self.decay = _number("decay", self.decay, 1.0)
        n: Any = self.n_updates
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
            raise ValueError(f"n_updates must be a whole number of at least 0, got {n!r}")

    def restart(self) -> None:
        """Forget all updates: the next one is the first."""
        self.n_updates = 0

    def metrics(self, penalty: th.Tensor) -> Metrics:
        """Return what is logged of an update.

        :param penalty: its penalty, nats
        """
        return {f"anchor/{self.name}": penalty, "anchor/coef": self.weight}

    def state_dict(self) -> dict[str, Any]:
        """Return what the anchor remembers, as dicts of numbers, which ``torch.load(weights_only=True)`` reads."""
        return {"n_updates": self.n_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what the anchor remembers.

        :param state: the result of :meth:`state_dict`
        :raises ValueError: a key is missing or unknown, or a value is out of range; the state stays as it is then
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state must have the keys {list(self.state_dict())}, got {list(state)}")
        made = self.__copy__()
        vars(made).update(state)
        made.require_valid()
        vars(self).update(state, fits=False)

    def __copy__(self) -> Self:
        made = object.__new__(type(self))
        vars(made).update((name, value) for name, value in vars(self).items() if name not in self.transient)
        return made

    def __deepcopy__(self, _memo: Any) -> Self:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and for a model's file."""
        return {name: value for name, value in vars(self).items() if name not in self.transient}


def _number(name: str, value: Any, high: float) -> float:
    allowed = "a finite number of at least 0" if high == math.inf else f"a number in [0, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    number = float(value)
    if not (0 <= number <= high and number < math.inf):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return number
