"""Actor-critic, batch and online."""

from typing import Any

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from typing_extensions import Self, Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.critic_estimates import CriticArguments, CriticEstimates
from sb3_pg.algorithms.effects import check_effects
from sb3_pg.algorithms.first_order import FirstOrderAlgorithm
from sb3_pg.algorithms.learning import LogInterval


class ActorCriticArguments(CriticArguments, total=False):
    """Keyword arguments beyond those of A2C."""

    critic_learning_rate: float | str | Schedule | None
    n_critic_updates: int


class ActorCritic(CriticEstimates, FirstOrderAlgorithm):
    r"""Policy gradient whose advantage comes from a critic.

    .. math:: \nabla_\theta J \approx \hat E\left[\nabla_\theta \log \pi_\theta(a_t|s_t) \,\hat A_t\right], \qquad
              \phi \leftarrow \arg\min_\phi \hat E\left[(V_\phi(s_t) - y_t)^2\right]

    Source: Sutton and Barto (2018), section 13.5; Mnih et al. (2016), of which A2C is the synchronous form; Schulman
    et al. (2016). The forms of the advantage and of y_t: :class:`~sb3_pg.algorithms.critic_estimates.CriticEstimates`.

    With its defaults it is :class:`stable_baselines3.A2C`, whose arguments come first, in their order, with their
    meaning, and whose zips it loads. The lecture's algorithms:

    * batch: ``n_steps=2048`` (or ``n_steps=None, n_episodes=16``), ``advantage="td"``, ``critic_fit="before"``
    * online: ``n_steps=1``, ``advantage="td"``, ``critic_fit="before"``, any number of envs
    * the critic as an unbiased baseline: ``n_steps=None, advantage="monte_carlo"``

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all arguments but these
    :param rms_prop_eps: added to RMSprop's root mean square
    :param use_rms_prop: RMSprop as in Mnih et al. (2016), unless ``policy_kwargs`` has an ``optimizer_class``
    :param kwargs: of :class:`~sb3_pg.algorithms.critic_estimates.CriticEstimates`, and those that all algorithms share
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 7e-4,
        n_steps: int | None = 5,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        rms_prop_eps: float = 1e-5,
        use_rms_prop: bool = True,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **kwargs: Unpack[ActorCriticArguments],
    ) -> None:
        arg.check_arguments(locals(), {"rms_prop_eps": arg.real(0), "use_rms_prop": arg.instance(bool)})
        arg.instance(dict, optional=True)("policy_kwargs", policy_kwargs)
        chosen = "optimizer_class" in (policy_kwargs or {})
        if chosen or not use_rms_prop:
            why = "an optimizer_class in policy_kwargs" if chosen else "use_rms_prop=False"
            check_effects(type(self), {"rms_prop_eps": rms_prop_eps}, {"rms_prop_eps": why}, {"rms_prop_eps"})
        else:
            rms_prop = {"alpha": 0.99, "eps": rms_prop_eps, "weight_decay": 0}
            policy_kwargs = {**(policy_kwargs or {}), "optimizer_class": th.optim.RMSprop, "optimizer_kwargs": rms_prop}
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
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
            **arg.known_arguments(type(self), kwargs),
        )

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 100,
        *args: Any,
        **kwargs: Any,
    ) -> Self:
        """As SB3's, with A2C's default of one log entry in 100 updates."""
        return super().learn(total_timesteps, callback, log_interval, *args, **kwargs)
