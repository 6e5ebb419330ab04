"""Constructing, checking and setting up: all that happens before training."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.saving import SavedAlgorithm
from sb3_pg.algorithms.signature import CHECKS
from sb3_pg.extras import extra_hints
from sb3_pg.learner.critic import ReturnScale, make_critic_optimizer
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.learner.rollback import require_usable_std
from sb3_pg.policies import Structure, compile_networks, structure_of
from sb3_pg.policies.parameter_sets import ParameterSets, reachable_parameters


class ConfiguredAlgorithm(SavedAlgorithm):
    """Arguments that all algorithms with an actor and maybe a critic share, and what follows from them.

    It stands before one of SB3's two bases in the order of bases, on-policy or off-policy.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a subclass of SB3's ActorCriticPolicy
    :param env: environment, vectorized environment (SB3's or Gymnasium's), or the id of a registered one
    :param learning_rate: step size of ``policy.optimizer``: a number, ``"lin_1e-3"``, or a function of the remaining
        progress (1 to 0)
    :param gamma: discount per env step, in [0, 1]
    :param ent_coef: weight of the entropy bonus, nats
    :param vf_coef: weight of the critic's loss where actor and critic are trained by one optimizer or share features
    :param max_grad_norm: largest norm of the gradient that ``policy.optimizer`` steps along, None for no clipping
    :param state_discount: the factor gamma^t of each step's term in the gradient, on or off
    :param normalize_advantage: shift and scale each batch of advantages to mean 0 and standard deviation 1
    :param truncation: "bootstrap" counts the value of the last state where a time limit cuts an episode, "terminal"
        treats the time limit as part of the task. Default: bootstrap where the critic is in use
    :param critic_learning_rate: gives the critic an optimizer of its own, with this schedule
    :param n_critic_updates: passes of the critic over each batch; more than 1 gives it an optimizer of its own
    :param critic_batch_size: samples per step of the critic's own optimizer, None for the whole batch
    :param critic_fit: "after" trains the critic once the advantages are computed; "before" fits it to the batch it
        then corrects, as the slides' batch actor-critic does (biased), and gives it an optimizer of its own. What a
        callback changes in the advantages counts with "after" only
    :param critic_warmup_updates: updates at the start in which the critic alone is trained
    :param normalize_value_targets: train the critic on targets divided by the running standard deviation of the
        targets; its values are multiplied by it (``value_scale``) wherever they are used
    :param max_episode_steps: longest episode that is waited for: where complete episodes are collected, and in
        :class:`~sb3_pg.OffPolicyPG`, which learns from complete episodes only
    :param on_nonfinite: "raise" a :class:`~sb3_pg.NonFiniteError`, or "skip" the update with a warning
    :param act_device: device that actions are computed on, by a copy of the policy that is brought up to date before
        each rollout; None for ``device``. With small nets and ``device="cuda"``, "cpu" acts faster. A policy with hooks
        or replaced methods has no copy: it acts where it is, with a warning
    :param compile: whether the networks are compiled (``torch.compile``) for updates; results differ by rounding. Takes
        seconds at first and a C++ compiler (or, on a GPU, Triton). On a CPU it is for images: small MLPs lose by it
    :param use_sde: generalized state-dependent exploration
    :param sde_sample_freq: steps between new gSDE noise, -1 for once per rollout; it is for ``use_sde``
    :param stats_window_size: episodes that the logged means are taken over
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 nothing, 1 info, 2 debug
    :param seed: seed of all random generators
    :param device: PyTorch device, or "auto"
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases
    max_grad_norm: float | None
    checks: ClassVar[Mapping[str, arg.Check]] = CHECKS
    _parameter_sets: tuple[Structure, ParameterSets] | None = None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule,
        gamma: float = 0.99,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        state_discount: bool = False,
        normalize_advantage: bool = False,
        truncation: str | None = None,
        critic_learning_rate: float | str | Schedule | None = None,
        n_critic_updates: int = 1,
        critic_batch_size: int | None = None,
        critic_fit: str = "after",
        critic_warmup_updates: int = 0,
        normalize_value_targets: bool = False,
        max_episode_steps: int = 100_000,
        on_nonfinite: str = "raise",
        act_device: th.device | str | None = None,
        compile: bool = False,  # noqa: A002 (the name that its users know)
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        arg.check_arguments({**vars(self), **locals()}, self.checks)
        self.gamma = gamma
        self.ent_coef = ent_coef
        self.vf_coef = vf_coef
        self.max_grad_norm = max_grad_norm
        self.state_discount = state_discount
        self.normalize_advantage = normalize_advantage
        self.truncation = truncation
        self.critic_learning_rate = critic_learning_rate
        self.n_critic_updates = n_critic_updates
        self.critic_batch_size = critic_batch_size
        self.critic_fit = critic_fit
        self.critic_warmup_updates = critic_warmup_updates
        self.normalize_value_targets = normalize_value_targets
        self.max_episode_steps = max_episode_steps
        self.on_nonfinite = on_nonfinite
        self.act_device = act_device
        self.compile = compile
        self._return_scale = ReturnScale()
        self._from_sb3 = self._is_loading()  # a zip of ours says otherwise
        with extra_hints():
            super().__init__(
                policy,
                env,
                learning_rate=learning_rate,  # type: ignore[arg-type]
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=dict(policy_kwargs or {}),  # SB3 writes into it
                verbose=verbose,
                seed=seed,
                device=device,
                supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
                **self._sb3_arguments(),
            )
        if _init_setup_model:
            self._setup_model()

    @abstractmethod
    def _sb3_arguments(self) -> dict[str, Any]:
        """What SB3's own base class takes besides what all of them take."""

    def _uses_critic(self) -> bool:
        """Whether values are part of the estimate."""
        return True

    def _check_combinations(self) -> None:
        """Require arguments that agree with each other.

        :raises ValueError: naming those that do not
        """
        if self.truncation == "bootstrap" and not self._uses_critic():
            raise ValueError(
                "truncation='bootstrap' takes a critic to value truncated episodes: use baseline='value', or "
                "truncation='terminal'"
            )
        if self.critic_batch_size is not None and self._uses_critic() and not self._critic_is_separate:
            raise ValueError(
                f"critic_batch_size={self.critic_batch_size} is for a critic with an optimizer of its own: set "
                "critic_learning_rate or n_critic_updates"
            )
        if (self.normalize_value_targets or self.critic_warmup_updates) and not self._uses_critic():
            raise ValueError("normalize_value_targets and critic_warmup_updates are for a critic, and none is in use")

    tolerated: ClassVar[frozenset[str]] = SavedAlgorithm.tolerated | {
        "critic_learning_rate",
        "n_critic_updates",
        "critic_batch_size",
        "vf_coef",
    }

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect()
        if not self._uses_critic():
            names = ("critic_learning_rate", "n_critic_updates", "critic_batch_size", "vf_coef")
            unused |= dict.fromkeys(names, "no critic in use")
        elif not self._critic_shares_step:
            unused["vf_coef"] = "a critic that has an optimizer of its own and shares no features with the actor"
        return unused

    @property
    def _bootstraps_truncated(self) -> bool:
        return self._uses_critic() if self.truncation is None else self.truncation == "bootstrap"

    @property
    def _critic_is_separate(self) -> bool:
        """Whether the critic has steps of its own, rather than a share in the policy's."""
        alone = self.critic_learning_rate is not None or self.n_critic_updates > 1 or self.critic_fit == "before"
        return alone and self._uses_critic()

    @property
    def _critic_minibatch_size(self) -> int | None:
        """Samples per step of the critic, where it has steps of its own; None for all."""
        return self.critic_batch_size

    @property
    def _critic_has_optimizer(self) -> bool:
        """Whether the critic's steps are those of an optimizer of its own."""
        return self._critic_is_separate

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name in self.policy_aliases:
            return self.policy_aliases[policy_name]
        hint = ""
        if "lstm" in policy_name.lower() or "recurrent" in policy_name.lower():
            hint = f"; {type(self).__name__} has no recurrent policies"
        raise ValueError(f"policy must be one of {list(self.policy_aliases)} or a class, got {policy_name!r}{hint}")

    def _prepare(self) -> None:
        """Look at the arguments together, before buffers and policy are made.

        :raises ValueError: some of them contradict each other
        """
        self._check_combinations()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = arg.to_schedule(self.learning_rate)

    def _setup_model(self) -> None:
        self._check_again()
        self._prepare()
        super()._setup_model()  # type: ignore[safe-super]  # SB3's on- or off-policy base has it
        require_usable_std(self.policy, self.policy_kwargs, self.use_sde)
        self.policy.optimizer = with_fewer_operations(self.policy.optimizer)
        if self.compile:
            compile_networks(self.policy)
        self._parameter_sets = None
        self.critic_optimizer = None
        if self._critic_has_optimizer:
            rate = self.critic_lr_schedule(1.0)
            self.critic_optimizer = make_critic_optimizer(list(self._critic_only().values()), rate)
        self._check_effects()

    @property
    def critic_lr_schedule(self) -> Schedule:
        """Step size of the critic's own optimizer; the policy's where none is given."""
        rate = self.critic_learning_rate
        return self.lr_schedule if rate is None else arg.to_schedule(rate, "critic_learning_rate")

    @property
    def value_scale(self) -> float:
        """What the policy's critic is multiplied by to give reward units; 1 without ``normalize_value_targets``."""
        return self._return_scale.value if self.normalize_value_targets else 1.0

    @property
    def parameter_sets(self) -> ParameterSets:
        """The actor's and the critic's parameters, frozen ones included."""
        structure = structure_of(self.policy)
        if self._parameter_sets is None or self._parameter_sets[0] is not structure:
            self._parameter_sets = structure, reachable_parameters(self.policy)
        return self._parameter_sets[1]

    @property
    def _critic_shares_step(self) -> bool:
        """Whether the critic's loss is part of the loss that ``policy.optimizer`` steps along."""
        return self._uses_critic() and not (self._critic_is_separate and not self._shares_features)

    @property
    def _shares_features(self) -> bool:
        actor, critic = self.parameter_sets
        return not actor.keys().isdisjoint(critic)

    def _critic_only(self) -> dict[str, th.nn.Parameter]:
        actor, critic = self.parameter_sets
        return {name: parameter for name, parameter in critic.items() if name not in actor}
