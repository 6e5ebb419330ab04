"""Arguments of sb3-contrib's RecurrentPPO and MaskablePPO in the words of KLPenaltyPG, which has PPO's shape.

``peer_tests_plugin.py`` makes a class of it that takes the peer's arguments. Left out are arguments for which there is
nothing of ours: ``clip_range``, ``clip_range_vf`` and ``lstm_kwargs``.
"""

from collections.abc import Callable
from typing import Any

from sb3_pg.policies import Memory

#: Arguments that limit PPO's steps; KLPenaltyPG limits them by ``target_kl``.
CLIPPING = ("clip_range", "clip_range_vf")


def of_maskable_ppo(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of KLPenaltyPG for those of MaskablePPO. Masks are found by themselves."""
    return {name: value for name, value in given.items() if name not in CLIPPING}


def of_recurrent_ppo(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of KLPenaltyPG for those of RecurrentPPO.

    :raises ValueError: the policy is none with an LSTM
    """
    arguments = {"n_steps": 128, **of_maskable_ppo(given)}
    policy_kwargs = dict(arguments.pop("policy_kwargs", None) or {})
    policy_kwargs.pop("lstm_kwargs", None)
    shared, own = policy_kwargs.pop("shared_lstm", False), policy_kwargs.pop("enable_critic_lstm", True)
    arguments["memory"] = Memory(
        "lstm",
        hidden_size=policy_kwargs.pop("lstm_hidden_size", 256),
        n_layers=policy_kwargs.pop("n_lstm_layers", 1),
        critic="shared" if shared else "own" if own else "none",
    )
    policy = arguments["policy"]
    if not (isinstance(policy, str) and "Lstm" in policy):
        raise ValueError(f"policy must be MlpLstmPolicy, CnnLstmPolicy or MultiInputLstmPolicy, got {policy!r}")
    return {**arguments, "policy": policy.replace("Lstm", ""), "policy_kwargs": policy_kwargs}


#: Name of a peer's class -> what translates its arguments.
TRANSLATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "MaskablePPO": of_maskable_ppo,
    "RecurrentPPO": of_recurrent_ppo,
}


def with_arguments_of(name: str, cls: Any) -> Any:
    """Return a class of ours that takes a peer's arguments.

    :param name: name of the peer's class
    :param cls: our class; it is returned as it is if it takes the same arguments
    """
    translate = TRANSLATIONS.get(name)
    if translate is None:
        return cls

    def construct(self: Any, policy: Any, env: Any, **given: Any) -> None:
        cls.__init__(self, **translate({"policy": policy, "env": env, **given}))

    return type(cls.__name__, (cls,), {"__init__": construct, "__module__": cls.__module__})
