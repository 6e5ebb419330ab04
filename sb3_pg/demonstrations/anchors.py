"""Anchors of a pretrained policy: its own earlier self, or the demonstrations that it has learned from."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar, Final

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.demonstrations.data import Demonstrations
from sb3_pg.demonstrations.steps import DemonstratedSteps
from sb3_pg.functional import behavior_cloning_loss, joint_kl, policy_gradient_loss
from sb3_pg.learner import Anchor, Penalty
from sb3_pg.learner.trust_region import require_known_divergence, require_torch_distributions
from sb3_pg.policies import (
    Distributions,
    action_distribution,
    can_be_copied,
    copy_without_optimizer,
    has_memory,
    original,
    parameter_sets_of,
    score_actions,
    score_in_chunks,
    set_training_mode,
)
from sb3_pg.rollout.nonfinite import require_finite_policy

#: A divergence that is nothing but rounding errors, nats. Its gradient is one of rounding errors too.
_ROUNDING: Final = 1e-7
#: What a :class:`Demonstrations` is made of.
_ARRAYS: Final = ("observations", "actions", "rewards", "terminated", "truncated", "final_observations")


class KLAnchor(Anchor):
    r"""Holds the policy near the one that it was at first.

    .. math:: P(\theta) = \hat E_s\big[D_{KL}(\pi_0(\cdot|s) \,\|\, \pi_\theta(\cdot|s))\big]

    The states are those of the batch, also off-policy, where they are replayed. The divergence is that of the whole
    action vector, nats (:func:`~sb3_pg.functional.joint_kl`). :math:`\pi_0` is a frozen copy of the policy, made at the
    first update with this anchor: after ``pretrain``, it is the pretrained policy. ``pretrain`` makes a new copy due.

    Source: Schmitt et al. (2018), kickstarting, equation 2, whose loss is the cross entropy of student and teacher,
    :math:`E_s[-\sum_a \pi_0(a|s) \log \pi_\theta(a|s)]`: it has the same gradient. There the teacher is another agent,
    and its weight is a schedule or is found by population-based training.

    :math:`\pi_0` gets the observations as the policy does: normalized by the present statistics of a VecNormalize. With
    ``memory``, it remembers the episode from its first step in the batch. If that step goes on with an earlier rollout,
    it begins with what the present policy remembers there; with complete episodes this does not occur.

    :class:`~sb3_pg.Reinforce`, :class:`~sb3_pg.OffPolicyPG` and ``ActorCritic(n_steps=None)`` sum over the time of
    complete episodes. They multiply P by the mean length of the batch's episodes, so that the same ``coef`` holds the
    policy as it does with segments.

    :param coef: c, reward units per nat
    :param decay: d, in [0, 1], factor of the weight per update
    :raises TypeError: an argument is no number
    :raises ValueError: an argument is out of range
    """

    name: ClassVar[str] = "kl"
    transient: ClassVar[tuple[str, ...]] = (*Anchor.transient, "_module")
    _module: ActorCriticPolicy | None = None

    def __init__(self, coef: float, decay: float = 1.0) -> None:
        #: parameters of pi_0's actor, and its buffers; None before the first update
        self.reference: dict[str, th.Tensor] | None = None
        super().__init__(coef, decay)

    def draw(self, policy: ActorCriticPolicy) -> Penalty:
        """Return the divergence from the first policy."""
        first = self._first(policy)

        def penalty(observations: Any, now: Distributions | None) -> th.Tensor:
            with th.no_grad():
                then = require_torch_distributions(first, action_distribution(first, observations))
            if now is None:
                now = require_torch_distributions(policy, action_distribution(policy, observations))
            kl = joint_kl(then, now).mean()
            return th.where(kl <= _ROUNDING, kl.detach(), kl)

        return penalty

    def require_fit(self, policy: ActorCriticPolicy, observation_space: spaces.Space[Any] | None = None) -> None:
        """Require distributions of known divergence, and parameters like those of the first policy."""
        require_known_divergence(policy)
        if self.reference is not None:
            _require_tensors(self.reference)
            self._require_like(policy)
        super().require_fit(policy, observation_space)

    def _require_like(self, policy: ActorCriticPolicy) -> None:
        assert self.reference is not None
        own = {name: tensor.shape for name, tensor in _tensors_of_actor(policy).items()}
        theirs = {name: tensor.shape for name, tensor in self.reference.items()}
        if own != theirs:
            different = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            raise ValueError(
                f"reference must be of a policy like the model's: its {different[0]!r} has the shape "
                f"{theirs.get(different[0])}, and the policy's {own.get(different[0])}"
            )

    def restart(self) -> None:
        """Forget all updates and the first policy: the next update makes a new copy."""
        super().restart()
        self.reference = self._module = None

    def state_dict(self) -> dict[str, Any]:
        """As the base class, with the parameters of the first policy."""
        return {**super().state_dict(), "reference": self.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As the base class."""
        if state.get("reference") is not None:
            _require_tensors(state["reference"])
        super().load_state_dict(state)
        self._module = None

    def _first(self, policy: ActorCriticPolicy) -> ActorCriticPolicy:
        """Return pi_0, in evaluation mode, on the policy's device."""
        if not self.fits:
            self.require_fit(policy)
        if self.reference is None:
            require_finite_policy(policy)
            self.reference = {name: tensor.detach().cpu().clone() for name, tensor in _tensors_of_actor(policy).items()}
            self._module = None
        if self._module is None or self._module.device != policy.device:
            module = original(policy)
            set_training_mode(module, module.training)  # brings its cache up to date
            if not can_be_copied(module):
                raise ValueError(
                    "policy must have no hooks and no methods that are replaced in the object: a KLAnchor copies it"
                )
            self._module = copy_without_optimizer(module)
            with th.no_grad():
                tensors = _tensors_of_actor(self._module)
                for name, value in self.reference.items():
                    tensors[name].copy_(value)
            set_training_mode(self._module, False)
        return self._module


def _require_tensors(reference: Any) -> None:
    """Require the parameters of a policy, which may come from a file."""
    is_dict = isinstance(reference, dict) and all(isinstance(value, th.Tensor) for value in reference.values())
    if not (is_dict and all(value.isfinite().all() for value in reference.values())):
        raise ValueError("reference must be None, or a dict of finite tensors")


def _tensors_of_actor(policy: ActorCriticPolicy) -> dict[str, th.Tensor]:
    """Return the actor's parameters and all buffers, each once."""
    module = original(policy)
    return dict(chain(parameter_sets_of(module).actor.items(), module.named_buffers()))


class DemonstrationLoss(Anchor):
    r"""Adds the gradient of the demonstrations' log-likelihood to the policy gradient.

    .. math:: P(\theta) = \hat E_{(s, a) \in D}\big[-\log \pi_\theta(a|s)\big]

    Source: Rajeswaran et al. (2018), DAPG, equation 6, where the sum over D has the weight
    :math:`\lambda_0 \lambda_1^k \max_{s, a} A(s, a)`, the largest advantage of the batch. Their code (mjrl) has
    :math:`\lambda_0 \lambda_1^k` beside standardized advantages, with :math:`\lambda_0 = 1` and :math:`\lambda_1 =
    0.95`. This is the code's form, with the mean over D in place of the sum, so that the weight does not depend on how
    many demonstrations there are: ``coef`` is :math:`\lambda_0 n_D / n`, for n steps in a batch and
    ``normalize_advantage=True``. With NPG and TRPO the Fisher matrix is that of the batch alone, as in DAPG.

    :class:`~sb3_pg.Reinforce`, :class:`~sb3_pg.OffPolicyPG` and ``ActorCritic(n_steps=None)`` sum over the time of
    complete episodes. They multiply P by the mean length of the batch's episodes, so that this ``coef`` is right there
    too.

    Observations are normalized as the env's are, by the present statistics of a VecNormalize. Actions and action masks
    are treated as ``pretrain`` does. A policy with ``memory`` learns from whole episodes: an episode's probability to
    be drawn is proportional to its length, and P is estimated by the mean over the drawn episodes of each one's mean
    over steps. This is unbiased, as the mean over drawn steps is without memory.

    A model's file holds the demonstrations' arrays. Those that are memory-mapped stay in their own file: a model that
    was loaded wants them again before ``learn``, by ``model.anchor.demos = Demonstrations.load(path, mmap=True)`` for
    an ``.npz``. Other numbers of steps or episodes than it had are refused.

    :param demos: the demonstrations
    :param coef: c, reward units per nat
    :param decay: d, in [0, 1], factor of the weight per update
    :param batch_size: steps that are drawn for each gradient step, with replacement; None for all of them. With
        ``memory``, as many episodes are drawn, at least one, as have about so many steps on average
    :raises TypeError: an argument is of the wrong type
    :raises ValueError: an argument is out of range
    """

    name: ClassVar[str] = "nll"
    transient: ClassVar[tuple[str, ...]] = (*Anchor.transient, "_steps")
    uses_states: ClassVar[bool] = False
    _demos: Demonstrations | None
    #: of a model that was loaded without its demonstrations: how many there were
    _stored: str | None = None
    #: the demonstrations as the policy takes them, once they are known to fit
    _steps: DemonstratedSteps | None = None

    def __init__(self, demos: Demonstrations, coef: float, decay: float = 1.0, batch_size: int | None = 256) -> None:
        self.demos = demos
        self.path: str | None = None
        self.batch_size = batch_size
        super().__init__(coef, decay)

    @property
    def demos(self) -> Demonstrations | None:
        """The demonstrations; None in a model that was loaded, if they are in the file ``path``."""
        return self._demos

    @demos.setter
    def demos(self, demos: Demonstrations) -> None:
        if not isinstance(demos, Demonstrations):
            raise TypeError(f"demos must be Demonstrations, got {demos!r}")
        if self._stored is not None and self._stored != _size(demos):
            raise ValueError(
                f"demos must have {self._stored}, as those that the model was saved with, got {_size(demos)}: for "
                "others, give the model another DemonstrationLoss"
            )
        self._stored = None
        self._demos, self._steps, self.fits = demos, None, False

    def draw(self, policy: ActorCriticPolicy) -> Penalty:
        """Draw a minibatch, and return its mean of -log pi."""
        observations, actions, lengths = self._minibatch(policy)

        def penalty(_observations: Any, _distributions: Distributions | None) -> th.Tensor:
            score = score_actions if th.is_grad_enabled() else score_in_chunks
            log_prob = score(policy, observations, actions, with_values=False).log_prob
            if lengths is None:
                return behavior_cloning_loss(log_prob)
            shares = th.as_tensor(1 / lengths.repeat(lengths), dtype=log_prob.dtype, device=log_prob.device)
            return policy_gradient_loss(log_prob, shares, n_episodes=len(lengths))

        return penalty

    def require_fit(self, policy: ActorCriticPolicy, observation_space: spaces.Space[Any] | None = None) -> None:
        """Require demonstrations that fit the policy's spaces, and actions that their masks allow."""
        if (demos := self._demos) is not None:
            space = policy.observation_space if observation_space is None else observation_space
            demos.check_spaces(space, policy.action_space, squashed=policy.squash_output)
            self._steps = DemonstratedSteps(demos, policy, self._normalized)
        super().require_fit(policy, observation_space)

    def require_valid(self) -> None:
        """As the base class."""
        super().require_valid()
        size: Any = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer)):
            raise TypeError(f"batch_size must be a whole number of at least 1 or None, got {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1 or None, got {size}")
        self.batch_size = None if size is None else int(size)

    @property
    def what_is_missing(self) -> str:
        """As the base class: the demonstrations, if they are in the file ``path``."""
        if self._demos is not None:
            return ""
        is_npz = str(self.path).endswith(".npz")
        how = "Demonstrations.load(path, mmap=True)" if is_npz else "Demonstrations(...) of the same arrays"
        return (
            f"the anchor's demonstrations, {self._stored}, are in {self.path!r}, which loading a model does not open: "
            f"set model.anchor.demos = {how}"
        )

    def _normalized(self, rows: Any) -> Any:
        return rows if self.normalize is None else self.normalize(rows)

    def _minibatch(self, policy: ActorCriticPolicy) -> tuple[Any, th.Tensor, np.ndarray | None]:
        """Return observations, or their history, and actions, as the policy takes them.

        :return: the third are the lengths of the episodes, if some are drawn
        """
        demos = self._demos
        if demos is None:
            raise ValueError(self.what_is_missing)
        if self._steps is None or self._steps.policy is not policy:
            self.require_fit(policy)
        steps, size = self._steps, self.batch_size
        assert steps is not None
        draws = size is not None and size < demos.n_steps
        if has_memory(policy):
            lengths = np.array([episode.stop - episode.start for episode in demos.episodes])
            drawn = self._drawn_episodes(lengths) if draws else np.arange(len(lengths))
            episodes = [demos.episodes[number] for number in drawn]
            rows = np.concatenate([np.arange(episode.start, episode.stop) for episode in episodes])
            actions = steps.actions[th.as_tensor(rows, device=policy.device)]
            return steps.history(episodes), actions, lengths[drawn] if draws else None
        if not draws:
            return steps.observations(slice(None)), steps.actions, None
        chosen = th.randint(demos.n_steps, (size or 0,)).sort().values
        return steps.observations(chosen.numpy()), steps.actions[chosen.to(policy.device)], None

    def _drawn_episodes(self, lengths: np.ndarray) -> np.ndarray:
        """Draw numbers of episodes, with replacement, with probabilities proportional to their lengths."""
        expected = np.square(lengths, dtype=np.float64).sum() / lengths.sum()  # steps of an episode that is drawn
        n = max(1, round((self.batch_size or 0) / expected))
        ends = th.as_tensor(lengths.cumsum())
        return th.searchsorted(ends, th.randint(int(ends[-1]), (n,)), right=True).numpy()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and for a model's file: the demonstrations' arrays, or their path."""
        state = super().__getstate__()
        demos = state.pop("_demos")
        if demos is not None:
            state["path"] = _mapped_file(demos)
            state["_stored"] = None if state["path"] is None else _size(demos)
        if state["path"] is None:
            state["arrays"] = {name: getattr(demos, name) for name in _ARRAYS}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state.pop("arrays", None)
        vars(self).update(state, _demos=None if arrays is None else Demonstrations(**arrays))


def _size(demos: Demonstrations) -> str:
    return f"{demos.n_steps} steps in {demos.n_episodes} episode{'s' * (demos.n_episodes > 1)}"


def _mapped_file(demos: Demonstrations) -> str | None:
    """Return the file that observations or actions are memory-mapped from; None if they are in memory."""
    arrays = demos.observations.values() if isinstance(demos.observations, dict) else [demos.observations]
    for array in (*arrays, demos.actions):
        held: Any = array
        while isinstance(held, np.ndarray):
            if isinstance(held, np.memmap):
                return str(held.filename)
            held = held.base
    return None
