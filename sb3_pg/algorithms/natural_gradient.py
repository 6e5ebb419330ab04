"""The arguments that NPG and TRPO share: those of sb3_contrib's TRPO, and more."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.critic_estimates import CriticArguments
from sb3_pg.algorithms.natural_step import NaturalStep

#: Arguments that the others share -> why there is no use for them here.
_OF_NO_USE = {
    "max_grad_norm": "the length of the actor's step follows from target_kl, not from the gradient's",
    "vf_coef": "the critic has steps of its own",
}


class NaturalGradientArguments(CriticArguments, total=False):
    """Keyword arguments that are passed on."""

    ent_coef: float
    critic_learning_rate: float | str | Schedule | None


class NaturalGradient(NaturalStep):
    """Steps along the natural gradient, with the arguments of sb3_contrib's TRPO.

    The formula is that of :class:`~sb3_pg.algorithms.natural_step.NaturalStep`. The arguments are those of
    :class:`sb3_contrib.TRPO`, in their order, and its zips load. One differs in its unit: ``target_kl`` is the joint
    KL(old || new), of the whole action vector, in nats. sb3_contrib averages over the d dimensions of Box and
    MultiBinary actions: its ``(target_kl, cg_damping)`` equals ours of ``(d * target_kl, d * cg_damping)``.

    The actor moves in evaluation mode, as the policy that acts. Features that actor and critic share belong to the
    actor; the critic trains its own parameters, with ``policy.optimizer`` as in sb3_contrib, or with an optimizer of
    its own if ``critic_learning_rate`` is given. A BatchNorm in shared features keeps its running statistics: they
    would move the policy outside the trust region.

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all arguments but these
    :param learning_rate: of the critic, unless ``critic_learning_rate`` is given; the actor's step follows from the
        trust region
    :param n_critic_updates: passes of the critic over each batch
    :param batch_size: samples per step of the critic, None for all; ``critic_batch_size``, if given, says the same
    :param cg_max_steps: most steps of the conjugate gradient
    :param cg_damping: c, added to the Fisher matrix's diagonal
    :param line_search_shrinking_factor: of TRPO; NPG, whose arguments are the same, takes the whole step
    :param line_search_max_iter: likewise
    :param line_search_accept_ratio: likewise: smallest gain that is accepted, as a share of the predicted one
    :param target_kl: delta, the joint KL of a step, nats: a number, ``"lin_0.01"`` (falls linearly to 0, where the last
        update takes no step), or a function of the remaining progress
    :param sub_sampling_factor: sb3_contrib's name for ``fisher_subsample``. There it thins the gradient and the line
        search as well, which makes them noisier; here the Fisher products alone
    :param cg_tolerance: residual, as a share of the gradient's norm, at which the conjugate gradient may stop
    :param fisher_chunk_size: samples per forward with graph (images want fewer). A batch of no more keeps its graph, a
        larger one makes it anew for each chunk and product, which bounds the memory
    :param fisher_subsample: k: one sample in k goes into the Fisher products, the same ones for all products of a step
    :param kwargs: of :class:`~sb3_pg.algorithms.critic_estimates.CriticEstimates`, and those that all algorithms share
    :raises ValueError: an argument out of range, arguments that contradict each other, or a policy whose distribution
        is not known
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    checks: ClassVar[Mapping[str, arg.Check]] = {
        **NaturalStep.checks,
        "batch_size": arg.integer(1, optional=True),
        "cg_max_steps": arg.integer(1),
        "cg_damping": arg.real(0),
        "cg_tolerance": arg.real(0),
        "line_search_shrinking_factor": arg.fraction,
        "line_search_max_iter": arg.integer(1),
        "line_search_accept_ratio": arg.real(0, 1),
        "target_kl": arg.schedule(above_0=True),
        "sub_sampling_factor": arg.integer(1),
        "fisher_chunk_size": arg.integer(1),
        "fisher_subsample": arg.integer(1),
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int | None = 2048,
        batch_size: int | None = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | str | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        line_search_accept_ratio: float = 0.1,
        cg_tolerance: float = 1e-5,
        fisher_chunk_size: int = 16384,
        fisher_subsample: int = 1,
        **kwargs: Unpack[NaturalGradientArguments],
    ) -> None:
        self.batch_size = batch_size
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.cg_tolerance = cg_tolerance
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.line_search_accept_ratio = line_search_accept_ratio
        self.target_kl = target_kl
        self.sub_sampling_factor = sub_sampling_factor
        self.fisher_chunk_size = fisher_chunk_size
        self.fisher_subsample = fisher_subsample
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            max_grad_norm=None,
            n_critic_updates=n_critic_updates,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            normalize_advantage=normalize_advantage,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
            **arg.known_arguments(type(self), kwargs, but=_OF_NO_USE),
        )
        if sub_sampling_factor > 1:
            warnings.warn(
                f"sub_sampling_factor={sub_sampling_factor} thins the Fisher products alone here, as fisher_subsample "
                "does: gradient and line search use the whole batch",
                stacklevel=2,
            )
        self._warn_of_small_minibatch()

    def _warn_of_small_minibatch(self) -> None:
        if self.env is None or self.n_steps is None or self.batch_size is None or self.critic_batch_size is not None:
            return
        size = self.n_steps * self.n_envs
        if size % self.batch_size:
            warnings.warn(
                f"batch_size={self.batch_size} does not divide the {size} samples of a batch (n_steps={self.n_steps}, "
                f"{self.n_envs} envs): the last of the critic's minibatches has {size % self.batch_size}, which count"
                " as much as those of the others",
                stacklevel=3,
            )

    def _setup_model(self) -> None:
        from_contrib = self._from_sb3
        if from_contrib:
            self.max_grad_norm = None  # sb3_contrib's TRPO says 0 for what it has no use for
        super()._setup_model()
        if from_contrib and isinstance(self.target_kl, int | float) and not self._is_given_to_load("target_kl"):
            self._warn_of_units(self.target_kl)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.fisher_subsample > 1 and self.sub_sampling_factor > 1:
            raise ValueError(
                f"sub_sampling_factor is another name for fisher_subsample: give one of them, got "
                f"{self.sub_sampling_factor} and {self.fisher_subsample}"
            )

    tolerated: ClassVar[frozenset[str]] = NaturalStep.tolerated | {"learning_rate", "batch_size"}

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect() | {"vf_coef": f"{type(self).__name__}: {_OF_NO_USE['vf_coef']}"}
        if self.critic_learning_rate is not None:
            unused["learning_rate"] = f"critic_learning_rate={self.critic_learning_rate!r}: no other step follows it"
        if self.critic_batch_size is not None:
            unused["batch_size"] = f"critic_batch_size={self.critic_batch_size}, which says the same"
        return unused

    def _warn_of_units(self, target_kl: float) -> None:
        space = self.action_space
        d = math.prod(space.shape or ()) if isinstance(space, spaces.Box | spaces.MultiBinary) else 1
        if d > 1:
            warnings.warn(
                f"target_kl={target_kl} of sb3_contrib's model is averaged over the {d} action dimensions, and is "
                f"the joint KL here: load(..., target_kl={d * target_kl:g}, cg_damping={d * self.cg_damping:g}) "
                "goes on with the same steps",
                stacklevel=3,
            )

    @property
    def _critic_is_separate(self) -> bool:
        return True

    @property
    def _critic_has_optimizer(self) -> bool:
        return self.critic_learning_rate is not None
