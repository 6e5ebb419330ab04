"""Asynchronous actor-critic: actors go on collecting while the learner learns."""

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Self, Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import ON_POLICY, SHARED, NewSharedArguments, SB3Arguments
from sb3_pg.algorithms.callback_locals import reads_infos
from sb3_pg.algorithms.learners import from_arguments, refresh_learner, take_update
from sb3_pg.algorithms.objective import OBJECTIVE, ObjectiveArguments, for_objective
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.algorithms.rms_prop import RMSPROP, with_rms_prop
from sb3_pg.algorithms.shell import LogInterval
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.envs import ActorVecEnv
from sb3_pg.envs.actors.stream import Delivery, FragmentStream, Waits
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner import Bootstrapped, Estimator, GradientStep, VTrace
from sb3_pg.policies import State, evaluation_mode, has_memory, map_observations, original
from sb3_pg.rollout import CollectorState, Order, TrajectoryRolloutBuffer, infos_of_episodes, score_again


class AsyncArguments(NewSharedArguments, ObjectiveArguments, SB3Arguments, total=False):
    """Keyword arguments that other algorithms have too."""

    ent_coef: float
    vf_coef: float
    max_grad_norm: float | None
    normalize_advantage: bool
    critic_learning_rate: float | str | Schedule | None
    n_critic_updates: int
    rms_prop_eps: float
    use_rms_prop: bool


def is_asynchronous(model: Any) -> bool:
    """Return whether the actors of a model's env go on while it learns.

    :param model: an :class:`AsyncActorCritic`
    """
    envs = None if model.env is None else model.env.unwrapped
    return isinstance(envs, ActorVecEnv) and (model.deterministic or not envs.is_serial)


def _without_effect(model: Any) -> dict[str, str]:
    unused: dict[str, str] = {}
    if model.correction == "none":
        unused |= dict.fromkeys(("max_ratio", "max_trace"), "correction='none'")
    if model.env is not None and not is_asynchronous(model):
        why = "an env without actor processes, where fragments are learned from at once"
        unused |= dict.fromkeys(("max_policy_lag", "queue_size", "actor_timeout", "max_restarts"), why)
    elif model.deterministic:
        unused["queue_size"] = "deterministic=True, where each actor has one fragment"
    return unused


_OWN_BUFFER = "fragments have the envs of one actor"
ASYNCHRONOUS = Group(
    """
    :param n_steps: steps per env and fragment. An update is made from one fragment
    :param gae_lambda: lambda, in [0, 1], a factor of each trace coefficient; with ``correction="none"`` that of
        generalized advantage estimation
    :param correction: "vtrace" corrects the lag of the actors' weights by importance ratios; "none" takes every
        fragment for one of the present policy, as A3C does
    :param max_ratio: rho_bar, bound of the ratio in TD residuals and weights, above 0; None for none. It decides which
        policy's value the critic learns
    :param max_trace: c_bar, bound of the ratio in trace coefficients, above 0; None for none
    :param max_policy_lag: a fragment whose weights are older is dropped, updates; None to learn from all. Its steps are
        counted
    :param queue_size: fragments that wait in the learner's process at most. The actors of others wait too
    :param deterministic: whether fragments come in the order of the actors, one of each, so that a seed gives the same
        run. The lag is then the number of actors (less in the first round)
    :param n_epochs: updates from each fragment; values and ratios are computed anew for each
    :param actor_timeout: seconds for a fragment, after which an actor counts as hanging and is started again; None for
        no limit
    :param max_restarts: how often actors are started again within one ``learn``, all together, because they have died
        or hang, or because an env has raised an error. The next such fault is an error
    """,
    {
        "n_steps": (64, arg.integer(1)),
        "correction": ("vtrace", arg.choice("vtrace", "none")),
        "max_ratio": (1.0, arg.positive(optional=True)),
        "max_trace": (1.0, arg.positive(optional=True)),
        "max_policy_lag": (None, arg.integer(0, optional=True)),
        "queue_size": (2, arg.integer(1)),
        "deterministic": (False, arg.instance(bool)),
        "n_epochs": (1, arg.integer(1)),
        "actor_timeout": (None, arg.positive(optional=True)),
        "max_restarts": (10, arg.integer(0)),
    },
    without_effect=_without_effect,
    tolerated=frozenset(
        {"max_ratio", "max_trace", "max_policy_lag", "queue_size", "actor_timeout", "max_restarts"},
    ),
    refused={
        "n_episodes": (None, "it learns from fragments of n_steps"),
        "rollout_buffer_class": (None, _OWN_BUFFER),
        "rollout_buffer_kwargs": (None, _OWN_BUFFER),
    },
)


class _FragmentsBar(ProgressBarCallback):
    """SB3's progress bar, which counts the steps of fragments, those that were dropped too."""

    _shown = 0

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._shown)
        self._shown = self.num_timesteps
        return True


@dataclass
class _Window:
    """Fragments since the latest log.

    :param began: when the last fragment before them was got, seconds
    :param before: what had been waited until then
    :param n_fragments: their number
    :param lags: sum of their lags
    :param largest_lag: largest of their lags
    """

    began: float
    before: Waits
    n_fragments: int = 0
    lags: int = 0
    largest_lag: int = 0


@documented
class AsyncActorCritic(OnPolicyPG):
    r"""Actor-critic that learns while its actors collect, with V-trace for the lag between the two.

    Each actor collects fragments of ``n_steps`` with the weights :math:`\mu` that were the newest when the fragment
    began. The learner takes one fragment at a time, the oldest first, and makes an update from it:

    .. math:: \nabla_\theta J \approx \hat E\left[\rho_t \nabla_\theta \log \pi_\theta(a_t|s_t)
              \left(r_t + \gamma v_{t+1} - V_\phi(s_t)\right)\right], \qquad
              \rho_t = \min\left(\bar\rho, \frac{\pi_\theta(a_t|s_t)}{\mu(a_t|s_t)}\right)

    The critic is trained on the V-trace targets :math:`v_t`, see :func:`~sb3_pg.functional.vtrace`. Source: Espeholt et
    al. (2018). ``correction="none"`` leaves out the ratios: A3C (Mnih et al. 2016, algorithm S3), in which the actors
    also computed the gradients.

    The env is an :class:`~sb3_pg.envs.ActorVecEnv`: ``make_vec_env(..., backend="actors")``. With any other env, or
    actors in this process, it collects and learns in turn. The lag is 0 then, and with ``correction="none"`` it is
    :class:`~sb3_pg.ActorCritic`, to the bit.

    Callbacks see the steps of a fragment when it is learned from. Their ``locals`` have one entry per env of the
    fragment's actor in ``infos``, ``rewards``, ``dones`` and ``actions``. ``locals["env"]`` are these envs;
    ``locals["env"].share.first`` is the number of the first. ``num_timesteps`` counts all fragments that the learner
    has got, those that it dropped too. Fragments that are unfinished when ``learn`` ends are lost, and not counted; the
    next ``learn`` begins with a reset.

    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, ON_POLICY, RMSPROP, OBJECTIVE, ASYNCHRONOUS)
    make_step = from_arguments(GradientStep)
    n_steps: int
    state_discount: bool
    correction: Literal["vtrace", "none"]
    max_ratio: float | None
    max_trace: float | None
    max_policy_lag: int | None
    queue_size: int
    deterministic: bool
    n_epochs: int
    actor_timeout: float | None
    max_restarts: int
    #: the fragments of the run that ``learn`` is in; None where it collects and learns in turn
    _stream: FragmentStream | None = None
    _is_learning = False
    #: number of the first env of the fragment
    _first_env = 0

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 7e-4,
        n_steps: int = 64,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        correction: Literal["vtrace", "none"] = "vtrace",
        max_ratio: float | None = 1.0,
        max_trace: float | None = 1.0,
        max_policy_lag: int | None = None,
        queue_size: int = 2,
        deterministic: bool = False,
        n_epochs: int = 1,
        actor_timeout: float | None = None,
        max_restarts: int = 10,
        **kwargs: Unpack[AsyncArguments],
    ) -> None:
        given = {**arg.defaults_of([SB3, RMSPROP]), **arg.given(locals())}
        super().__init__(**with_rms_prop(type(self), given))

    def make_estimator(self) -> Estimator:
        """Make the estimator from the present arguments."""
        if self.correction == "none":
            return for_objective(self, Bootstrapped(self.gamma, self.gae_lambda, state_discount=self.state_discount))
        max_ratio, max_trace = (math.inf if bound is None else bound for bound in (self.max_ratio, self.max_trace))
        bounds = self.gae_lambda, max_ratio, max_trace
        return for_objective(self, VTrace(self.gamma, *bounds, state_discount=self.state_discount))

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 100,
        *args: Any,
        **kwargs: Any,
    ) -> Self:
        """As the base class, with one log in 100 fragments."""
        return super().learn(total_timesteps, callback, log_interval, *args, **kwargs)

    def _run(self, *arguments: Any) -> None:
        self._is_learning = True
        try:
            super()._run(*arguments)
        finally:
            self._is_learning = False
            self._end_stream()

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if progress_bar and is_asynchronous(self):
            listed = callback if isinstance(callback, list) else [callback] if callback else []
            own = [one if isinstance(one, BaseCallback) else ConvertCallback(one) for one in listed]
            callback, progress_bar = CallbackList([*own, _FragmentsBar()]), False
        made = super()._init_callback(callback, progress_bar)
        if self.checkpointer is not None and is_asynchronous(self):
            raise ValueError(
                "callback must hold no ResumeCallback: what actors are collecting is not saved, so that the run cannot "
                "go on exactly. Use CheckpointCallback, or actors in this process"
            )
        return made

    # ---------------------------------------------------------------- collecting

    def _collect(
        self, env: VecEnv, callback: BaseCallback, buffer: TrajectoryRolloutBuffer, n_steps: int | None
    ) -> bool:
        if self._stream is None and self._is_learning and is_asynchronous(self):
            self._begin_stream(env, callback)
        if self._stream is None:
            return super()._collect(env, callback, buffer, n_steps)
        delivery = self._next_fragment(self._stream)
        if delivery is None:
            return False
        actor, state, self._first_env = delivery.env.actor, delivery.state, delivery.env.share.first
        self.rollout_buffer = buffer = self._buffer_for(delivery.env.num_envs)
        self._last_obs, self._last_episode_starts = state.last_obs, state.episode_starts
        self._timesteps, self._memory = state.timesteps, {**state.memory, **self._critics_memory[actor]}
        try:
            return super()._collect(delivery.env, callback, buffer, n_steps)
        finally:
            self._critics_memory[actor] = _of_critic(self._memory)

    def _begin_stream(self, env: VecEnv, callback: BaseCallback) -> None:
        """Let the actors collect, if they can."""
        envs: Any = env.unwrapped
        if not envs.can_record(env, self.policy):
            return
        state = CollectorState()
        if self._last_obs is not None:
            timesteps = vars(self).get("_timesteps")
            if timesteps is None or len(timesteps) != env.num_envs:
                timesteps = np.zeros(env.num_envs, dtype=np.int64)
            state = CollectorState(self._last_obs, self._last_episode_starts, timesteps, self._memory or {})
        self._stream = FragmentStream(
            env,
            self.policy,
            Order(self.n_steps, None, None, self.sde_sample_freq, reads_infos(callback), state, apart=True),
            queue_size=self.queue_size,
            in_turn=self.deterministic,
            timeout=self.actor_timeout,
            max_restarts=self.max_restarts,
            seed=int(th.randint(1 << 62, (1,))),
        )
        self._whole_buffer = self.rollout_buffer
        self._buffers: dict[int, TrajectoryRolloutBuffer] = {}
        self._critics_memory: list[dict[str, State]] = [{} for _ in envs.shares]
        self._window = _Window(time.perf_counter(), Waits())
        self._next_window = self._window
        self._n_dropped = 0

    def _end_stream(self) -> None:
        """Leave the actors alone. Their envs have gone on: the next rollout begins with a reset."""
        if self._stream is None:
            return
        self._stream.close()
        self.rollout_buffer = self._whole_buffer
        self._first_env = 0
        self._stream = self._collector = self._last_obs = self._timesteps = self._memory = None
        del self._whole_buffer, self._buffers, self._critics_memory, self._window, self._next_window

    def _buffer_for(self, n_envs: int) -> TrajectoryRolloutBuffer:
        """Return a buffer for the fragments of so many envs."""
        if n_envs not in self._buffers:
            cls: Any = self.rollout_buffer_class
            self._buffers[n_envs] = cls(
                self.n_steps,
                self.observation_space,
                self.action_space,
                self.device,
                gae_lambda=self.gae_lambda,
                gamma=self.gamma,
                n_envs=n_envs,
            )
        return self._buffers[n_envs]

    def _next_fragment(self, stream: FragmentStream) -> Delivery | None:
        """Wait for a fragment to learn from. Return None if all steps were taken in fragments that were too old."""
        while True:
            delivery = stream.next()
            lag = stream.version - delivery.version
            is_too_old = self.max_policy_lag is not None and lag > self.max_policy_lag
            self._n_dropped += is_too_old
            self._log_fragment(stream, lag)
            if not is_too_old:
                return delivery
            self._drop(delivery)
            if self.num_timesteps >= self._total_timesteps:
                return None

    def _drop(self, delivery: Delivery) -> None:
        """Count the steps and episodes of a fragment, and let a critic with a memory of its own remember it."""
        fragment, actor = delivery.fragment, delivery.env.actor
        policy: Any = original(self.policy)
        self.num_timesteps += len(fragment) * delivery.env.num_envs
        ended = list(infos_of_episodes([fragment]))
        self._update_info_buffer(ended, np.ones(len(ended), dtype=bool))
        if has_memory(policy) and policy.memory.critic == "own":
            n, begun = len(fragment), delivery.state
            assert begun.episode_starts is not None
            with evaluation_mode(self.policy), th.no_grad():
                after = policy.memory_after(
                    map_observations(lambda x: x[:n], fragment.observations),
                    np.concatenate([begun.episode_starts[None], fragment.at_start])[:n],
                    {**begun.memory, **self._critics_memory[actor]},
                )
            self._critics_memory[actor] = _of_critic(after)

    # ---------------------------------------------------------------- learning

    def train(self) -> None:
        """Take ``n_epochs`` updates from the fragment. For each but the first, it is scored anew.

        :raises NonFiniteError: as in the base class
        :raises ValueError: as in the base class
        """
        super().train()
        for _ in range(1, self.n_epochs):
            if (batch := self.rollout_batch) is None:
                break
            learner = refresh_learner(self)
            with evaluation_mode(self.policy):
                score_again(self.policy, batch, learner.value_scale)
            learner.estimate(batch)
            take_update(self, batch, self._report)
        if self._stream is not None:
            self._stream.version += 1

    def check_given_estimates(self) -> None:
        """Require arguments with which the update can use the advantages in the buffer.

        :raises ValueError: an argument asks for new estimates
        """
        super().check_given_estimates()
        if self.n_epochs > 1:
            raise ValueError(
                f"n_epochs={self.n_epochs} estimates advantages anew, which takes a rollout that collect_rollouts has "
                "put into rollout_buffer: this one was filled otherwise; set n_epochs=1"
            )

    def _skip_or_raise(self, error: NonFiniteError, has_stepped: bool = True) -> None:
        super()._skip_or_raise(error.counted_from(self._first_env), has_stepped)

    def _log_fragment(self, stream: FragmentStream, lag: int) -> None:
        """Record what is known of the fragments since the latest log."""
        if "rollout/policy_lag_max" not in self.logger.name_to_value:  # the log has been written
            self._window = self._next_window
        window, waits, record = self._window, stream.waits, self.logger.record
        now = time.perf_counter()
        self._next_window = _Window(now, replace(waits))
        window.n_fragments += 1
        window.lags += lag
        window.largest_lag = max(window.largest_lag, lag)
        record("rollout/policy_lag_mean", window.lags / window.n_fragments)
        record("rollout/policy_lag_max", window.largest_lag)
        record("rollout/fragments_dropped", self._n_dropped)
        record("rollout/actor_restarts", stream.n_restarts)
        record("time/learner_wait_seconds", waits.learner - window.before.learner, self._detail)
        record("time/actor_wait_seconds", waits.actors - window.before.actors, self._detail)
        if now > window.began:
            record("time/fragments_per_second", window.n_fragments / (now - window.began), self._detail)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *_OF_A_RUN]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in _OF_A_RUN}


#: attributes of a run with actors
_OF_A_RUN = (
    "_stream",
    "_whole_buffer",
    "_buffers",
    "_critics_memory",
    "_window",
    "_next_window",
    "_is_learning",
    "_n_dropped",
    "_first_env",
)


def _of_critic(memory: Any) -> dict[str, State]:
    """Return the part of a policy's memory that is the critic's own."""
    return {name: state for name, state in (memory or {}).items() if name == "critic"}
