"""Off-policy actor-critic: a stochastic actor and Q critics, trained on replayed transitions."""

import inspect
import warnings
from operator import attrgetter
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, Schedule, TrainFrequencyUnit
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Never, Self

from sb3_pg.action_masks import MASK_KEY, mask_starts, require_some_choice
from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.environments import require_normalized_last
from sb3_pg.algorithms.off_pac.losses import (
    ACTOR_LOSSES,
    ActorGradient,
    ActorLossInputs,
    critic_loss,
    default_actor_gradient,
    entropies,
    state_values,
)
from sb3_pg.algorithms.off_pac.policies import OffPACCnnPolicy, OffPACMultiInputPolicy, OffPACPolicy, act, move_target
from sb3_pg.algorithms.off_policy import REPLAY
from sb3_pg.algorithms.saved_files import load_replay_buffer, save_replay_buffer
from sb3_pg.algorithms.shell import Algorithm, LogInterval, waits_for_learning_starts
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.demonstrations.critic_fit import CriticToFit
from sb3_pg.envs import normalization_with_masks
from sb3_pg.learner.metrics import Metrics
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.learner.rollback import frozen, require_usable_std, undone_on_failure
from sb3_pg.policies import (
    from_env,
    masked_uniform_behavior,
    set_training_mode,
    to_env,
    uniform_behavior,
    unvalidated_distributions,
)
from sb3_pg.rollout import (
    BehaviorReplayBuffer,
    DictBehaviorReplayBuffer,
    NormalizationGuard,
    NStepBehaviorReplayBuffer,
    keep_what_is_drawn,
    naming_env_errors,
    require_finite_observation,
    require_finite_step,
    require_form,
)


def _check_policy(name: str, value: Any) -> None:
    if not (isinstance(value, str) or (inspect.isclass(value) and issubclass(value, OffPACPolicy))):
        raise TypeError(f"{name} must be a name or a subclass of OffPACPolicy, got {value!r}")


def _check(model: Any) -> None:
    space, kind, cls = model.action_space, model._gradient, model.replay_buffer_class
    if isinstance(space, spaces.Box) and not (space.low < space.high).all():
        raise ValueError(f"action_space must have a lower bound below the upper one in each dimension, got {space}")
    if kind == "expected" and not isinstance(space, spaces.Discrete):
        raise ValueError(f"actor_gradient='expected' sums over the actions of a Discrete space, got {space}")
    if kind == "reparameterized" and not isinstance(space, spaces.Box):
        raise ValueError(f"actor_gradient='reparameterized' differentiates Q by the action of a Box space, got {space}")
    if kind == "importance" and cls is not None and not issubclass(cls, BehaviorReplayBuffer):
        raise ValueError(
            "replay_buffer_class must be None or a subclass of BehaviorReplayBuffer, which stores the log-probs "
            f"that actor_gradient='importance' needs, got {cls.__name__}. For n-step rewards, give None and n_steps"
        )
    model._convert_train_freq()
    frequency: Any = model.train_freq
    if model.n_envs > 1 and frequency.unit == TrainFrequencyUnit.EPISODE:
        raise ValueError(f"train_freq must be in steps for more than one env, got episodes and {model.n_envs} envs")
    _check_buffer(model)


def _check_buffer(model: Any) -> None:
    default, cls = model._default_buffer, model.replay_buffer_class
    in_steps = issubclass(default or cls or ReplayBuffer, NStepReplayBuffer)
    argument = f"n_steps={model.n_steps}" if default else f"replay_buffer_class={cls and cls.__name__}"
    if isinstance(model.observation_space, spaces.Dict):
        if in_steps or cls in (ReplayBuffer, BehaviorReplayBuffer):
            _refuse_dicts(model, argument)
        if model.optimize_memory_usage:
            _refuse_dicts(model, "optimize_memory_usage=True")
    if in_steps and model.optimize_memory_usage:
        raise ValueError(f"{argument} needs every next observation: optimize_memory_usage must be False")
    if model._is_kept_by_load("replay_buffer_kwargs"):
        return
    for name in ("n_steps", "gamma") if default else ("gamma",) if in_steps else ():
        value = getattr(model, name)
        given = model.replay_buffer_kwargs.get(name, value)
        if given != value:
            raise ValueError(f"replay_buffer_kwargs[{name!r}] must be {name}={value} or left out, got {given}")


def _refuse_dicts(model: Any, argument: str) -> None:
    if model.uses_masks:
        raise ValueError(
            f"{argument} does not support action masks, which are kept in Dict observations, got "
            f"{model.observation_space}: leave it out, or give use_action_masks=False to ignore the masks"
        )
    raise ValueError(f"{argument} does not support Dict observations, got {model.observation_space}")


def _without_effect(model: Any) -> dict[str, str]:
    unused = {}
    kind = model._gradient
    is_exact = kind == "importance" and isinstance(model.action_space, spaces.Discrete)
    if kind in ("expected", "reparameterized") or is_exact:
        unused["n_actions"] = f"actor_gradient={kind!r} and {model.action_space}"
    if kind != "importance":
        unused["max_ratio"] = f"actor_gradient={kind!r}: give actor_gradient='importance'"
    return unused


#: Arguments that OffPolicyPG's table checks too. Their defaults here are those of the constructor.
_OF_REPLAY = (
    *("buffer_size", "learning_starts", "train_freq", "gradient_steps"),
    *("replay_buffer_kwargs", "optimize_memory_usage", "action_noise"),
)
#: Arguments that SB3's OffPolicyAlgorithm takes.
_OF_SB3 = (*_OF_REPLAY, "batch_size", "tau", "gamma", "replay_buffer_class", "n_steps")
OFF_PAC = Group(
    """
    :param policy: "MlpPolicy", "CnnPolicy" (images), "MultiInputPolicy" (Dict observations), or a subclass of
        :class:`~sb3_pg.algorithms.off_pac.policies.OffPACPolicy`
    :param learning_rate: step size of actor and critic: a number, ``"lin_1e-3"`` (falls linearly to 0), or a function
        of the remaining progress (1 to 0)
    :param actor_gradient: gradient that the actor follows, see the table. None is "expected" for Discrete,
        "reparameterized" for Box, and "score" for MultiDiscrete and MultiBinary
    :param n_actions: actions per state: K of "score", at least 2. For "importance" in other spaces than Discrete, V(s)
        is the mean over this many actions
    :param max_ratio: c, the largest importance weight of "importance"; None for no limit
    :param ent_coef: weight of the entropy bonus, reward units per nat: a number, ``"lin_1.0"`` (falls linearly to 0),
        or a function of the remaining progress (1 to 0)
    :param critic_learning_rate: step size of the critic, in the forms of ``learning_rate``; None for the same
    :param buffer_size: transitions that the replay buffer can hold, over all envs
    :param learning_starts: env steps, over all envs, before the first update. Their actions are drawn uniformly
    :param batch_size: transitions per gradient step
    :param tau: part of the way that the target critic moves toward the critic per gradient step, in [0, 1]
    :param gamma: discount per env step, in [0, 1]
    :param train_freq: what is collected between two updates: n steps of each env as n or ``(n, "step")``, or n episodes
        of a single env as ``(n, "episode")``
    :param gradient_steps: gradient steps per update; -1 for as many as env steps were taken since the last update
    :param replay_buffer_class: class of the replay buffer; "importance" needs a subclass of
        :class:`~sb3_pg.rollout.BehaviorReplayBuffer`. None for the one that fits ``n_steps`` and the observations
    :param replay_buffer_kwargs: further arguments of the replay buffer
    :param optimize_memory_usage: whether to store each observation once, with the restrictions of SB3's ReplayBuffer
    :param n_steps: rewards that are summed before the bootstrap in the critic's target. They are not corrected for
        changes of the policy since. More than 1 does not support Dict observations. It is ignored with a warning beside
        a ``replay_buffer_class``, as in SB3: use ``replay_buffer_kwargs={"n_steps": 3}`` there
    :param action_noise: must be None, because the log-prob of a noisy action would be unknown
    :param use_action_masks: whether the policy keeps to the masks of an env that says which actions are allowed. None
        looks for masks, True requires them, False ignores them. With masks, the replay buffer must be one for Dict
        observations
    :param policy_kwargs: arguments of the policy, e.g. ``{"n_critics": 1}``
    """,
    {
        "policy": (inspect.Parameter.empty, _check_policy),
        "actor_gradient": (None, arg.choice(*ACTOR_LOSSES, optional=True)),
        "n_actions": (4, arg.integer(2)),
        "max_ratio": (1.0, arg.positive(optional=True)),
        "ent_coef": (0.0, arg.schedule()),
        "critic_learning_rate": (None, arg.schedule(optional=True)),
        **{name: REPLAY.arguments[name] for name in _OF_REPLAY},
        "batch_size": (256, arg.integer(1)),
        "tau": (0.005, arg.real(0, 1)),
        "gamma": (0.99, arg.real(0, 1)),
        "replay_buffer_class": (None, arg.subclass(ReplayBuffer)),
        "n_steps": (1, arg.integer(1)),
        "use_action_masks": (None, arg.instance(bool, optional=True)),
    },
    check=_check,
    without_effect=_without_effect,
    tolerated=frozenset({"n_actions", "max_ratio"}),
    refused={
        "memory": (
            None,
            "it replays single transitions, which do not say what came before. Use OffPolicyPG: it replays episodes",
        )
    },
)


@documented
class OffPAC(Algorithm, OffPolicyAlgorithm):
    r"""Actor-critic on replayed transitions: the slides' off-policy algorithm, with both of its fixes.

    The critic's target takes an action of the current policy in the next state (fix 1), and the smallest Q of
    ``n_critics`` target networks. For Discrete it is the expectation over actions (Expected SARSA, van Seijen et al.
    2009), for other spaces one sample.

    .. math:: y = r + \gamma (1 - d) \sum_{a'} \pi_\theta(a'|s') \min_i Q_{\bar\phi_i}(s', a')

    The actor follows one of four gradients of :math:`E_\pi[Q(s, a)] + c_{ent} H(\pi(\cdot|s))` at replayed states:

    ================ ================================================================== ===============================
    actor_gradient   estimate                                                           actions, spaces
    ================ ================================================================== ===============================
    expected         :math:`\sum_a \nabla \pi(a|s) Q(s, a)`                             all; Discrete
    score            :math:`\nabla \log \pi(a_k|s) (Q(s, a_k) - \bar Q_k(s))`           the policy's own (fix 2); all
    reparameterized  :math:`\nabla_\theta Q(s, a_\theta(s, \epsilon))`, SVG(0)          the policy's own; Box
    importance       :math:`\min(\rho, c) \nabla \log \pi(a|s) (Q(s, a) - V(s))`        the replayed; all
    ================ ================================================================== ===============================

    Here :math:`\bar Q_k` is the mean of Q over the other K - 1 actions, and :math:`\rho = \pi / \mu`. With action
    masks, :math:`\pi` is 0 for actions that a state forbids: the target's sum runs over those that s' allows.

    Sources: Degris et al. (2012), eq. 4 and 5, for the objective and ``importance``; Heess et al. (2015) for SVG(0);
    the slides' "Off-Policy Actor-Critic" for ``score``. The states are those of the buffer, a broader distribution than
    the policy's own. As in the slides, this is not corrected. SB3's DDPG is the deterministic case.

    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": OffPACPolicy,
        "CnnPolicy": OffPACCnnPolicy,
        "MultiInputPolicy": OffPACMultiInputPolicy,
    }
    groups: ClassVar[tuple[Group, ...]] = (SB3, OFF_PAC)
    load_replay_buffer = load_replay_buffer
    save_replay_buffer = save_replay_buffer
    policy: OffPACPolicy
    actor_gradient: ActorGradient | None
    n_actions: int
    max_ratio: float | None
    ent_coef: float | str | Schedule
    critic_learning_rate: float | str | Schedule | None
    actor: Any = property(attrgetter("policy.actor"))
    critic: Any = property(attrgetter("policy.critic"))
    critic_target: Any = property(attrgetter("policy.critic_target"))
    #: log-probs of the latest actions, one per env
    _log_probs: np.ndarray | None = None
    #: steps of each env in this rollout
    _n_collected = 0

    def __init__(
        self,
        policy: str | type[OffPACPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 3e-4,
        actor_gradient: ActorGradient | None = None,
        n_actions: int = 4,
        max_ratio: float | None = 1.0,
        ent_coef: float | str | Schedule = 0.0,
        critic_learning_rate: float | str | Schedule | None = None,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, Literal["step", "episode"]] = 1,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        action_noise: ActionNoise | None = None,
        use_action_masks: bool | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **unknown: Never,
    ) -> None:
        self._construct(arg.given(locals()), _OF_SB3, support_multi_env=True)

    # ---------------------------------------------------------------- updating

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Take gradient steps of critic and actor. If one fails, all parameters stay as they were before the call.

        :param gradient_steps: number of steps
        :param batch_size: transitions per step
        :raises NonFiniteError: a parameter would not be finite
        :raises ValueError: critic and target critic have layers of different shapes
        """
        policy, buffer, progress = self.policy, self.replay_buffer, self._current_progress_remaining
        actor, critic = policy.actor, policy.critic
        assert buffer is not None
        self._set_discount()
        normalization = self._normalization(self._last_obs)
        set_training_mode(policy, True)
        rate = critic_rate = self.lr_schedule(progress)
        if self.critic_learning_rate is not None:
            critic_rate = arg.to_schedule(self.critic_learning_rate, "critic_learning_rate")(progress)
            self.logger.record("train/critic_learning_rate", critic_rate)
        update_learning_rate(actor.optimizer, rate)
        update_learning_rate(critic.optimizer, critic_rate)
        ent_coef = arg.to_schedule(self.ent_coef, "ent_coef")(progress)
        steps: list[Metrics] = []
        with undone_on_failure(policy, actor.optimizer, critic.optimizer), unvalidated_distributions():
            for _ in range(gradient_steps):
                samples: Any = buffer.sample(batch_size, env=normalization)
                loss, metrics = critic_loss(policy, samples, self.gamma)
                _descend(loss, critic.optimizer)

                with frozen(critic.optimizer):
                    distribution = actor.distribution(samples.observations)
                    inputs = ActorLossInputs(samples, distribution, critic, self.n_actions, self.max_ratio)
                    loss, of_actor = ACTOR_LOSSES[self._gradient](inputs)
                with th.set_grad_enabled(ent_coef > 0):
                    entropy = entropies(distribution).mean()
                _descend(loss - ent_coef * entropy, actor.optimizer)

                move_target(critic, policy.critic_target, self.tau)
                steps.append(metrics | of_actor | {"actor_loss": loss.detach(), "entropy": entropy.detach()})
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/ent_coef", ent_coef)
        if steps:
            rows = th.stack([th.stack([th.as_tensor(value) for value in metrics.values()]) for metrics in steps])
            for name, values in zip(steps[0], rows.T.tolist(), strict=True):
                largest = name == "largest_weight"
                self.logger.record(f"train/{name}", max(values) if largest else sum(values) / len(values))

    @property
    def _gradient(self) -> ActorGradient:
        return self.actor_gradient or default_actor_gradient(self.action_space)

    def _critic_to_fit(self) -> CriticToFit:
        """Return Q, which learns the returns of demonstrated actions."""
        policy, critic = self.policy, self.policy.critic

        def value_after(_: Any, observations: Any) -> th.Tensor:
            return state_values(critic, observations, policy.actor.distribution(observations), self.n_actions)

        return CriticToFit(
            [parameter for group in critic.optimizer.param_groups for parameter in group["params"]],
            critic.q_values,
            value_after,
            [last for network in critic.q_networks if isinstance(last := [*network.children()][-1], th.nn.Linear)],
            self.gamma,
            finish=lambda: move_target(critic, policy.critic_target, 1.0),
        )

    # ---------------------------------------------------------------- collecting

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for a number of env steps. The arguments are those of SB3's ``learn``, with these differences.

        :param log_interval: episodes between two logs; "auto" logs about every 500 steps of each env, as often as A2C
        :param tb_log_name: name of the TensorBoard run, None for the name of the class
        :raises ValueError: an argument out of range, or a model without env
        :raises TypeError: an argument of the wrong type
        """
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """Collect transitions as SB3 does.

        :raises NonFiniteError: a reward or an observation is not finite
        """
        assert self.env is not None
        self._at_boundary()
        self._n_collected = 0
        auto = self._log_steps > 0 and kwargs.get("log_interval") is not None
        if auto:
            kwargs["log_interval"] = None  # otherwise SB3 would log by the number of episodes
        try:
            with NormalizationGuard(self.env).statistics_kept(), naming_env_errors(self.env):
                result = super().collect_rollouts(*args, **kwargs)
        except BaseException:
            self._last_obs = None  # the env may be in any state, so the next rollout resets it
            raise
        if auto and self._is_time_to_log():
            self.dump_logs()
        return result

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        space, masks = self.action_space, self.policy.masks
        obs: Any = self._last_obs
        if masks:
            when = f"at step {self._n_collected} of the rollout (time step {self.num_timesteps})"
            require_some_choice(obs[MASK_KEY], mask_starts(space), when)
        if self.num_timesteps < learning_starts:
            behavior = masked_uniform_behavior(space) if masks else uniform_behavior(space, squashed=True)
            actions, self._log_probs = behavior(obs)
            actions = from_env(actions, space)
        else:
            actions, self._log_probs = act(self.policy, obs, self._n_collected)
        return to_env(self.policy)(actions), actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        step, hint = self._n_collected, f"The env returned it, at time step {self.num_timesteps}."
        assert self.env is not None
        NormalizationGuard(self.env).check(step)
        require_finite_step("reward", reward, step, hint)
        require_finite_step("observation", new_obs, step, hint)
        for i in np.flatnonzero(dones):
            final = infos[i].get("terminal_observation")
            if final is not None:
                require_form(final, self.observation_space, int(i))
            require_finite_observation("observation at the end", final, int(i), step, hint)
        self._n_collected += 1
        normalize = self._vec_normalize_env
        if normalize is not None and isinstance(self.observation_space, spaces.Discrete):
            # Nothing normalizes such observations, and SB3 takes them for arrays.
            self._vec_normalize_env, reward = None, normalize.get_original_reward()
        elif normalize is not None and self.policy.masks:
            self._vec_normalize_env = self._normalization(new_obs)
        try:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        finally:
            self._vec_normalize_env = normalize
        if isinstance(replay_buffer, BehaviorReplayBuffer):
            assert self._log_probs is not None
            replay_buffer.record_log_probs(self._log_probs)

    def _normalization(self, obs: Any) -> Any:
        """Return the env's VecNormalize in the form that replay code takes: for observations with masks, if there are.

        :param obs: the latest observations
        """
        if self._vec_normalize_env is None or not self.policy.masks:
            return self._vec_normalize_env
        assert self.env is not None
        masks = np.zeros(0) if obs is None else obs[MASK_KEY]
        return normalization_with_masks(self.env, masks) or self._vec_normalize_env

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """Prepare training as the other classes do. What a VecNormalize has got, and is replayed, has its masks too."""
        result = super()._setup_learn(*args, **kwargs)
        original: Any = self._last_original_obs
        has_masks = isinstance(original, dict) and MASK_KEY in original
        if self._vec_normalize_env is not None and self.policy.masks and self._last_obs is not None and not has_masks:
            self._last_original_obs = self._normalization(self._last_obs).get_original_obs()
        return result

    def _why_no_update(self) -> str:
        waits = self.gradient_steps != 0 and self.num_timesteps <= self.learning_starts
        return waits_for_learning_starts(self) if waits else ""

    # ---------------------------------------------------------------- setting up

    def _setup_model(self) -> None:
        self._check_again()
        self._check_combinations()
        self._check_effects()
        default = self._default_buffer
        if default is not None:
            steps = {"n_steps": self.n_steps, "gamma": self.gamma}
            others = {name: value for name, value in self.replay_buffer_kwargs.items() if name not in steps}
            self.replay_buffer_kwargs = others | (steps if self.n_steps > 1 else {})
            self.replay_buffer_class = default
        if self.replay_buffer_class is not None:
            arg.require_keywords("replay_buffer_kwargs", self.replay_buffer_class, self.replay_buffer_kwargs)
        with warnings.catch_warnings():
            if default is not None:
                warnings.filterwarnings("ignore", "`n_steps=.* is ignored")  # SB3 takes the class for the user's
            with self._extended_policy():
                super()._setup_model()
        assert self.replay_buffer is not None
        keep_what_is_drawn(self.replay_buffer)
        self._set_discount()
        require_usable_std(self.policy.actor, self.policy_kwargs, self.use_sde)
        for module in (self.policy.actor, self.policy.critic):
            module.optimizer = with_fewer_operations(module.optimizer)

    @property
    def _default_buffer(self) -> type[BehaviorReplayBuffer] | None:
        """The buffer's class for ``n_steps`` and the observations; None if the user has given a class."""
        is_dict, given = isinstance(self.observation_space, spaces.Dict), self.replay_buffer_class
        defaults = (DictBehaviorReplayBuffer if is_dict else BehaviorReplayBuffer, NStepBehaviorReplayBuffer)
        default = defaults[self.n_steps > 1]
        # A zip always holds a class: the default for the n_steps at that time, or the user's.
        was_default = given is default or (given in defaults and self._is_given_to_load("n_steps"))
        is_free = given is None or (was_default and self._is_kept_by_load("replay_buffer_class"))
        return default if is_free else None

    def _set_discount(self) -> None:
        """Set the discount of an n-step replay buffer to the model's ``gamma``, which the user may have changed."""
        if isinstance(self.replay_buffer, NStepReplayBuffer):
            self.replay_buffer.gamma = self.gamma

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_log_probs"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []

    # ---------------------------------------------------------------- checking arguments

    @classmethod
    def _check_env(cls, env: VecEnv) -> None:
        require_normalized_last(env)
        if getattr(env, "next_step_autoreset", False):
            raise ValueError(
                f"env must not reset in the step after an episode's end (NEXT_STEP), which {cls.__name__} cannot leave "
                f"out, got a {type(env).__name__}: use another autoreset mode, or an env of "
                "sb3_pg.envs.make_vec_env(..., backend='dummy')"
            )


def _descend(loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    optimizer.zero_grad()
    if loss.requires_grad:  # some parameter is not frozen
        loss.backward()
    optimizer.step()
