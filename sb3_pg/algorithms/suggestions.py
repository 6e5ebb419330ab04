"""Suggest an argument for one that does not exist."""

import difflib
from collections.abc import Collection

#: Names in other classes and packages -> names of the same arguments here, the best first; empty if there is none.
FOREIGN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "alpha_lr", "pi_lr", "actor_lr", "learning_rate_actor", "policy_lr"), ("learning_rate",)),
    **dict.fromkeys(
        ("learning_rate_critic", "critic_lr", "lr_critic", "vf_lr", "value_lr", "q_lr", "qf_learning_rate"),
        ("critic_learning_rate", "learning_rate"),
    ),
    **dict.fromkeys(
        ("n_epochs", "num_epochs", "update_epochs", "epochs"), ("n_epochs", "n_critic_updates", "gradient_steps")
    ),
    **dict.fromkeys(("train_v_iters", "vf_iters", "critic_updates"), ("n_critic_updates", "gradient_steps")),
    **dict.fromkeys(("num_steps", "n_steps", "nsteps", "rollout_length", "horizon"), ("n_steps", "train_freq")),
    **dict.fromkeys(("num_episodes", "n_episodes", "episodes"), ("n_episodes", "train_freq")),
    **dict.fromkeys(("gae", "lam", "lambda", "lambda_", "gae_lam"), ("gae_lambda",)),
    **dict.fromkeys(("discount", "discount_factor"), ("gamma",)),
    **dict.fromkeys(
        ("entropy_coef", "entropy_coeff", "entropy_coefficient", "entropy_weight", "alpha", "temperature"),
        ("ent_coef",),
    ),
    **dict.fromkeys(("value_coef", "value_coeff", "value_loss_coef", "value_coefficient"), ("vf_coef",)),
    **dict.fromkeys(("grad_clip", "gradient_clip", "clip_grad", "max_gradient_norm"), ("max_grad_norm",)),
    **dict.fromkeys(("norm_adv", "normalize_advantages", "adv_norm"), ("normalize_advantage",)),
    **dict.fromkeys(("minibatch_size", "mini_batch_size", "batch_size"), ("batch_size", "critic_batch_size")),
    **dict.fromkeys(("clip_range", "clip_ratio", "clip_coef", "clip_param", "rho_bar"), ("max_ratio", "target_kl")),
    **dict.fromkeys(("max_kl", "kl_target", "desired_kl", "delta", "trust_region"), ("target_kl",)),
    **dict.fromkeys(("cg_iters", "cg_max_iter", "cg_iterations"), ("cg_max_steps",)),
    **dict.fromkeys(("damping", "damping_coef", "cg_damp", "reg_coeff"), ("cg_damping",)),
    "backtrack_coeff": ("line_search_shrinking_factor",),
    "backtrack_iters": ("line_search_max_iter",),
    **dict.fromkeys(("polyak", "soft_update"), ("tau",)),
    **dict.fromkeys(("replay_size", "memory_size", "replay_buffer_size"), ("buffer_size",)),
    **dict.fromkeys(("start_steps", "warmup_steps", "random_steps"), ("learning_starts",)),
    "update_every": ("train_freq",),
    "rollout_buffer_class": ("replay_buffer_class",),
    "rollout_buffer_kwargs": ("replay_buffer_kwargs",),
    "replay_buffer_class": ("rollout_buffer_class",),
    "replay_buffer_kwargs": ("rollout_buffer_kwargs",),
    **dict.fromkeys(("target_kl", "clip_range_vf", "vf_clip_param", "target_update_interval", "target_entropy"), ()),
    **dict.fromkeys(("exploration_fraction", "exploration_initial_eps", "exploration_final_eps"), ()),
    "use_sde_at_warmup": (),
}
#: Arguments of earlier versions -> what to do instead.
REMOVED = {"compile": "compile the policy itself, model.policy = th.compile(model.policy)"}
_ALIKE = 0.8


def suggestion(name: str, names: Collection[str]) -> str | None:
    """Return the argument that was probably meant: the same under another name, or a similar spelling; else None.

    :param name: the name that was given
    :param names: the arguments that exist
    """
    if name in FOREIGN:
        return next((word for word in FOREIGN[name] if word in names), None)
    close = difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)
    return close[0] if close else None
