"""Actor-critic, the batch and the online algorithm."""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from typing_extensions import Self, Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import ON_POLICY, SHARED
from sb3_pg.algorithms.critic_estimates import CRITIC_ESTIMATES, CriticArguments, estimator_with_critic
from sb3_pg.algorithms.learners import from_arguments
from sb3_pg.algorithms.objective import OBJECTIVE
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.algorithms.rms_prop import RMSPROP, with_rms_prop
from sb3_pg.algorithms.shell import LogInterval
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.learner import GradientStep, TraceStep
from sb3_pg.learner.estimators import Advantage, CriticTarget


class ActorCriticArguments(CriticArguments, total=False):
    """Keyword arguments that A2C does not have."""

    critic_learning_rate: float | str | Schedule | None
    n_critic_updates: int


@documented
class ActorCritic(OnPolicyPG):
    r"""Policy gradient whose advantage comes from a critic.

    .. math:: \nabla_\theta J \approx \hat E\left[\nabla_\theta \log \pi_\theta(a_t|s_t) \,\hat A_t\right], \qquad
              \phi \leftarrow \arg\min_\phi \hat E\left[(V_\phi(s_t) - y_t)^2\right]

    Source: Sutton and Barto (2018), section 13.5; Mnih et al. (2016), whose algorithm in its synchronous form is A2C;
    Schulman et al. (2016). For the forms of the advantage and of y_t see
    :class:`~sb3_pg.learner.estimators.Bootstrapped`.

    With its defaults it is :class:`stable_baselines3.A2C`. Its first arguments are those of A2C, in the same order and
    with the same meaning. It loads zips of A2C. The lecture's algorithms are:

    * batch: ``n_steps=2048`` (or ``n_steps=None, n_episodes=16``), ``advantage="td"``, ``critic_fit="before"``
    * online: ``n_steps=1``, ``advantage="td"``, ``critic_fit="before"``, any number of envs
    * online with eligibility traces, TD(lambda): ``n_steps=1``, ``advantage="td_lambda"``, ``gae_lambda=0.9``, any
      number of envs; see :class:`~sb3_pg.learner.TraceStep`
    * the critic as an unbiased baseline: ``n_steps=None, advantage="monte_carlo"``

    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, ON_POLICY, RMSPROP, CRITIC_ESTIMATES, OBJECTIVE)
    make_estimator = estimator_with_critic
    has_traces: ClassVar[bool] = True
    _gradient_step = from_arguments(GradientStep)
    _trace_step = from_arguments(TraceStep)
    advantage: Advantage
    critic_target: CriticTarget | None
    td_steps: int
    recompute_advantage: bool

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
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
        super().__init__(**with_rms_prop(type(self), arg.given(locals())))

    def make_step(self) -> GradientStep:
        """Make the step that the advantage asks for from the model's present arguments."""
        return self._trace_step() if self.advantage == "td_lambda" else self._gradient_step()

    def check_segments(self, name: str, n_steps: int | None) -> None:
        """Require one step of each env for ``advantage="td_lambda"``, besides what the base class requires."""
        if self.advantage == "td_lambda" and n_steps != 1:
            raise ValueError(
                f"{name} must be 1 with advantage='td_lambda', whose traces advance once per env step, got {n_steps}: "
                "give n_steps=1, or advantage='gae', the forward view within segments and episodes"
            )
        super().check_segments(name, n_steps)

    def check_given_estimates(self) -> None:
        """Require other advantages than those of traces, besides what the base class requires."""
        if self.advantage == "td_lambda":
            raise ValueError(
                "advantage='td_lambda' takes steps that follow each other, as collect_rollouts puts them into "
                "rollout_buffer: this one was filled otherwise; set advantage='td'"
            )
        super().check_given_estimates()

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 100,
        *args: Any,
        **kwargs: Any,
    ) -> Self:
        """As the base class, with A2C's default of one log in 100 updates."""
        return super().learn(total_timesteps, callback, log_interval, *args, **kwargs)
