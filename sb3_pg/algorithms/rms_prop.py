"""The optimizer of SB3's A2C, for the algorithms that have it by default."""

from collections.abc import Mapping
from typing import Any

import torch as th

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.validation import Group

RMSPROP = Group(
    """
    :param rms_prop_eps: epsilon, added to RMSprop's root mean square
    :param use_rms_prop: whether to use RMSprop as in Mnih et al. (2016) instead of Adam. An ``optimizer_class`` in
        ``policy_kwargs`` comes before both
    """,
    {
        "rms_prop_eps": (1e-5, arg.real(0)),
        "use_rms_prop": (True, arg.instance(bool)),
    },
)


def with_rms_prop(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's arguments with the optimizer that they ask for in ``policy_kwargs``.

    :param cls: the algorithm
    :param given: all arguments of its constructor that are in the group ``RMSPROP``, and others
    :raises ValueError: an argument is out of range
    :raises TypeError: an argument is of the wrong type
    """
    arg.check_arguments(given, arg.checks_of([RMSPROP]))
    arg.instance(dict, optional=True)("policy_kwargs", given["policy_kwargs"])
    of_policy = given["policy_kwargs"] or {}
    chosen = "optimizer_class" in of_policy
    if chosen or not given["use_rms_prop"]:
        why = "an optimizer_class in policy_kwargs" if chosen else "use_rms_prop=False"
        arg.check_effects(cls, given, {"rms_prop_eps": why}, {"rms_prop_eps"})
        return dict(given)
    rms_prop = {"alpha": 0.99, "eps": given["rms_prop_eps"], "weight_decay": 0}
    optimizer = {"optimizer_class": th.optim.RMSprop, "optimizer_kwargs": rms_prop}
    return {**given, "policy_kwargs": {**of_policy, **optimizer}}
