"""Read files in which modules have the names of earlier layouts of the package.

A pickle stores a class as the name of its module and its own name. The tables below say where the class is now.
"""

#: Old module -> the module that has its classes now.
MODULES: dict[str, str] = {
    "sb3_pg.algorithms.actor_gradients": "sb3_pg.algorithms.off_pac.losses",
    "sb3_pg.algorithms.base": "sb3_pg.algorithms.on_policy",
    "sb3_pg.algorithms.critic": "sb3_pg.learner.critic",
    "sb3_pg.algorithms.explanation": "sb3_pg.learner.metrics",
    "sb3_pg.algorithms.guards": "sb3_pg.learner.rollback",
    "sb3_pg.algorithms.parameters": "sb3_pg.policies.parameter_sets",
    "sb3_pg.algorithms.q_policies": "sb3_pg.algorithms.off_pac.policies",
    "sb3_pg.algorithms.replaying": "sb3_pg.algorithms.off_policy",
    "sb3_pg.algorithms.scores": "sb3_pg.policies.functional_policy",
    "sb3_pg.algorithms.surrogate": "sb3_pg.learner.trust_region",
    "sb3_pg.algorithms.transition_replay": "sb3_pg.algorithms.off_pac.off_pac",
    "sb3_pg.rollout.acting": "sb3_pg.policies.acting_copy",
    "sb3_pg.rollout.actions": "sb3_pg.policies.actions",
    "sb3_pg.rollout.behavior": "sb3_pg.policies.behavior",
    "sb3_pg.rollout.evaluation": "sb3_pg.rollout.make_batch",
    "sb3_pg.rollout.finite": "sb3_pg.rollout.nonfinite",
    "sb3_pg.rollout.forward": "sb3_pg.policies.score_actions",
    "sb3_pg.rollout.plain": "sb3_pg.policies.mlp_fast_path",
    "sb3_pg.rollout.progress": "sb3_pg.rollout.rollout_counter",
    "sb3_pg.rollout.replay": "sb3_pg.rollout.trajectory_buffer",
    "sb3_pg.rollout.samplers": "sb3_pg.policies.samplers",
    "sb3_pg.rollout.structure": "sb3_pg.policies.policy_cache",
    "sb3_pg.rollout.transitions": "sb3_pg.rollout.transition_buffer",
}
#: Old "module:name" -> new "module:name", for classes that MODULES does not place correctly, or that have a new name.
#: The old module may still exist.
NAMES: dict[str, str] = {"sb3_pg.algorithms.flat_step:FlatRMSprop": "torch.optim.rmsprop:RMSprop"}


def current_name(module: str, name: str) -> tuple[str, str]:
    """Return where a class is now that a file names.

    >>> current_name("sb3_pg.rollout.replay", "TrajectoryReplayBuffer")
    ('sb3_pg.rollout.trajectory_buffer', 'TrajectoryReplayBuffer')

    :param module: its module when the file was saved
    :param name: its name then
    :return: its module and its name
    """
    new_module, _, new_name = NAMES.get(f"{module}:{name}", f"{MODULES.get(module, module)}:{name}").partition(":")
    return new_module, new_name
