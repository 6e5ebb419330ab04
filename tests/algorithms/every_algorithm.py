"""One table of algorithms, for the tests of what all of them owe to SB3."""

from collections.abc import Callable
from typing import Any

from sb3_pg import NPG, TRPO, ActorCritic, AsyncActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce

#: Actor and critic in one step, as in A2C.
JOINT: dict[str, Any] = {"critic_learning_rate": None, "n_critic_updates": 1}


Make = Callable[..., Any]


CLASSES = (Reinforce, ActorCritic, AsyncActorCritic, NPG, TRPO, KLPenaltyPG)

_IN_SEGMENTS: dict[str, Any] = {"n_steps": 8, "batch_size": 8}
#: What makes each class learn from a few steps.
FEW_STEPS: dict[Any, dict[str, Any]] = {
    Reinforce: {"n_steps": 8},
    ActorCritic: {"n_steps": 8},
    AsyncActorCritic: {"n_steps": 8},
    NPG: _IN_SEGMENTS,
    TRPO: _IN_SEGMENTS,
    KLPenaltyPG: _IN_SEGMENTS,
    OffPolicyPG: {"train_freq": (4, "episode")},
    OffPAC: {"learning_starts": 4, "batch_size": 8, "buffer_size": 100},
}


def scales_rewards(name: str) -> bool:
    """Whether an entry of ``ALGORITHMS`` takes a VecNormalize that scales rewards."""
    return "average" not in name


#: name -> model on an env; later algorithms add their line.
ALGORITHMS: dict[str, Make] = {
    "reinforce": lambda env, **k: Reinforce("MlpPolicy", env, **{"n_episodes": 4, "baseline": "leave_one_out", **k}),
    "reinforce-value": lambda env, **k: Reinforce("MlpPolicy", env, **{"n_steps": 16, **JOINT, **k}),
    "reinforce-own-critic": lambda env, **k: Reinforce(
        "MlpPolicy", env, **{"n_steps": 16, "critic_learning_rate": "lin_1e-2", "n_critic_updates": 2, **k}
    ),
    "reinforce-linear": lambda env, **k: Reinforce("MlpPolicy", env, **{"n_episodes": 4, "baseline": "linear", **k}),
    "actor-critic": lambda env, **k: ActorCritic("MlpPolicy", env, **k),
    "actor-critic-batch": lambda env, **k: ActorCritic(
        "MlpPolicy",
        env,
        **{
            "n_steps": 16,
            "advantage": "td",
            "critic_fit": "before",
            "critic_learning_rate": "lin_1e-2",
            "n_critic_updates": 2,
            "normalize_value_targets": True,
            "recompute_advantage": True,
            **k,
        },
    ),
    "actor-critic-episodes": lambda env, **k: ActorCritic(
        "MlpPolicy", env, **{"n_steps": None, "n_episodes": 4, "advantage": "n_step", "state_discount": True, **k}
    ),
    "actor-critic-traces": lambda env, **k: ActorCritic(
        "MlpPolicy", env, **{"n_steps": 1, "advantage": "td_lambda", "gae_lambda": 0.9, **k}
    ),
    "actor-critic-average": lambda env, **k: ActorCritic(
        "MlpPolicy",
        env,
        **{
            "n_steps": 16,
            "objective": "average",
            "average_reward_step_size": 0.1,
            "gae_lambda": 0.9,
            "reset_cost": 2.0,
            "normalize_value_targets": True,
            **k,
        },
    ),
    "async-actor-critic": lambda env, **k: AsyncActorCritic("MlpPolicy", env, **{"n_steps": 16, **k}),
    "async-actor-critic-epochs": lambda env, **k: AsyncActorCritic(
        "MlpPolicy",
        env,
        **{
            "n_steps": 16,
            "n_epochs": 2,
            "gae_lambda": 0.9,
            "critic_learning_rate": "lin_1e-2",
            "n_critic_updates": 2,
            "normalize_value_targets": True,
            **k,
        },
    ),
    "npg": lambda env, **k: NPG("MlpPolicy", env, **{"n_steps": 32, "batch_size": 32, "n_critic_updates": 2, **k}),
    "npg-fixed": lambda env, **k: NPG(
        "MlpPolicy",
        env,
        **{"n_steps": 32, "batch_size": None, "step": "fixed", "step_size": 1e-2, "n_critic_updates": 2, **k},
    ),
    "trpo": lambda env, **k: TRPO("MlpPolicy", env, **{"n_steps": 32, "batch_size": 16, "n_critic_updates": 2, **k}),
    "trpo-episodes": lambda env, **k: TRPO(
        "MlpPolicy", env, **{"n_steps": None, "n_episodes": 4, "n_critic_updates": 2, "state_discount": True, **k}
    ),
    "trpo-own-critic": lambda env, **k: TRPO(
        "MlpPolicy",
        env,
        **{
            "n_steps": 32,
            "ent_coef": 1e-3,
            "critic_learning_rate": "lin_1e-2",
            "critic_fit": "before",
            "n_critic_updates": 2,
            "normalize_value_targets": True,
            "critic_batch_size": 12,
            "cg_max_steps": 3,
            "fisher_subsample": 2,
            "fisher_chunk_size": 7,
            **k,
        },
    ),
    "kl-penalty": lambda env, **k: KLPenaltyPG(
        "MlpPolicy",
        env,
        **{"n_steps": 32, "n_epochs": 2, "critic_learning_rate": "lin_1e-2", "n_critic_updates": 2, **k},
    ),
    "kl-penalty-joint": lambda env, **k: KLPenaltyPG(
        "MlpPolicy",
        env,
        **{"n_steps": 32, "batch_size": 12, "n_epochs": 2, "dual_update": "multiplicative", **JOINT, **k},
    ),
    "off-policy": lambda env, **k: OffPolicyPG(
        "MlpPolicy", env, **{"train_freq": (4, "episode"), "buffer_trajectories": 8, "gradient_steps": 2, **k}
    ),
    "off-policy-steps": lambda env, **k: OffPolicyPG(
        "MlpPolicy",
        env,
        **{
            "train_freq": 16,
            "batch_size": 3,
            "gradient_steps": 2,
            "ratio": "per_decision",
            "max_ratio": 2.0,
            "self_normalize": True,
            "min_ess": 0.1,
            **JOINT,
            **k,
        },
    ),
}
