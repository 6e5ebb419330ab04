"""REINFORCE: the Monte-Carlo policy gradient."""

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from typing_extensions import Self, Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.learning import LogInterval
from sb3_pg.algorithms.monte_carlo import MonteCarloAlgorithm
from sb3_pg.algorithms.on_policy import PolicyGradientAlgorithm
from sb3_pg.algorithms.signature import OnPolicyArguments
from sb3_pg.baselines import Baseline, OptimalBaseline, ValueBaseline, make_baseline


class Reinforce(MonteCarloAlgorithm, PolicyGradientAlgorithm):
    r"""Monte-Carlo policy gradient with any return, discount form and baseline.

    .. math:: \nabla_\theta J \approx \frac{1}{N} \sum_{i=1}^N \sum_t w_t
              \nabla_\theta \log \pi_\theta(a_{i,t}|s_{i,t}) \,(G_{i,t} - b)

    Source: Williams (1992); Sutton and Barto (2018), section 13.3 and 13.4. The sum is over time and the mean over
    the N complete episodes of a batch; with ``n_steps`` it is the mean over steps. w_t is gamma^t with
    ``state_discount``, otherwise 1.

    ============== ================== ==========================================================================
    returns        state_discount     estimates
    ============== ================== ==========================================================================
    total          False              grad J_gamma
    reward_to_go   True, w_t=gamma^t  grad J_gamma (the slides' option 2)
    reward_to_go   False, w_t=1       sum_t E[score_t Q_gamma(s_t, a_t)] (option 1): for gamma < 1 the gradient of
                                      no objective (Nota and Thomas 2020), and what everybody uses
    ============== ================== ==========================================================================

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all other arguments
    :param env: likewise
    :param learning_rate: likewise
    :param returns: "reward_to_go": G_t is the reward from t on; "total": that of the whole episode
    :param baseline: b: "none", "mean", "leave_one_out", "time", "optimal", "linear", "value", or an object with
        ``fit(batch, returns)`` and ``predict(batch)``
    :param baseline_kwargs: arguments of the named baseline, e.g. ``{"component_wise": True}`` of "optimal"
    :param critic_learning_rate: likewise; None, with ``n_critic_updates=1``, trains actor and critic in one step as A2C
    :param n_critic_updates: likewise
    :param kwargs: arguments that all algorithms share
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 7e-3,
        returns: str = "reward_to_go",
        baseline: str | Baseline = "value",
        baseline_kwargs: dict[str, Any] | None = None,
        critic_learning_rate: float | str | Schedule | None = 3e-3,
        n_critic_updates: int = 10,
        **kwargs: Unpack[OnPolicyArguments],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            returns=returns,
            baseline=baseline,
            baseline_kwargs=baseline_kwargs,
            critic_learning_rate=critic_learning_rate,
            n_critic_updates=n_critic_updates,
            **arg.known_arguments(type(self), kwargs),
        )

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = "auto",
        *args: Any,
        **kwargs: Any,
    ) -> Self:
        """As SB3's, with a log entry about every 500 steps of each env, as often as A2C's default.

        ``log_interval`` counts updates.
        """
        return super().learn(total_timesteps, callback, log_interval, *args, **kwargs)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        baseline = make_baseline(self.baseline, self.baseline_kwargs, observation_space=self.observation_space)
        if self._has_foreign_buffer and type(baseline) is not ValueBaseline:
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} subtracts the critic's values itself: "
                f"it takes baseline='value', got {self.baseline!r}"
            )

    def _check_segments(self, name: str, n_steps: int | None) -> None:
        if self.returns == "total" and n_steps is not None:
            raise ValueError(f"returns='total' takes complete episodes, got {name}={n_steps}")
        super()._check_segments(name, n_steps)

    def _check_given_estimates(self) -> None:
        super()._check_given_estimates()
        if isinstance(self._baseline, OptimalBaseline) and self._baseline.component_wise:
            raise ValueError(
                "baseline='optimal' with component_wise=True has no advantage per step, which is what rollout_buffer "
                "holds: train from a rollout that collect_rollouts has collected"
            )

    @property
    def _for_segments(self) -> str:
        forward = " and returns='reward_to_go'" if self.returns == "total" else ""
        return f"n_steps=, baseline='value'{forward}"

    def _n_episodes_at_least(self) -> int:
        return self.n_envs * (self._episodes_per_env() or 1)
