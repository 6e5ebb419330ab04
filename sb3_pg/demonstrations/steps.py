"""The steps of demonstrations as a policy takes them: read, normalized and put on its device piece by piece."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_pg.action_masks import MASK_KEY, first_forbidden, first_without_choice, mask_sizes, mask_starts
from sb3_pg.demonstrations.data import Demonstrations
from sb3_pg.policies import History, Sequences, from_env, has_masks, has_memory, map_observations, original
from sb3_pg.policies import policy_actions as as_drawn


class Minibatch(NamedTuple):
    """Some steps, on the policy's device.

    :param observations: one row per step; of a policy with memory, the history of whole episodes
    :param actions: as the policy's distribution takes them
    :param steps: numbers of the steps among all of the demonstrations
    :param counted: True where a step was asked for, ``(n_steps,)``; None if all were. The others are the rest of their
        episodes, which a policy with memory sees too
    """

    observations: Any
    actions: th.Tensor
    steps: th.Tensor
    counted: th.Tensor | None

    def select(self, numbers: th.Tensor) -> th.Tensor:
        """Return those of the counted steps.

        :param numbers: one per step in the last dimension
        """
        return numbers if self.counted is None else numbers[..., self.counted]


class DemonstratedSteps:
    """The steps of demonstrations, as a policy takes them. Arrays on the disk stay there.

    The demonstrations must fit the policy (:meth:`Demonstrations.check_spaces`). Where the policy has action masks, the
    demonstrations' observations hold them under the key "action_mask". Demonstrations without masks count as if every
    action had been allowed: the policy then learns each action among all of them, and is at least as likely to take it
    where a mask forbids others.

    :param demos: the demonstrations
    :param policy: the policy that learns from them
    :param normalize: function from observations without masks to those that the policy gets; None for no change
    :raises ValueError: a mask forbids the action of its step, or all actions; or the policy's networks see masks, and
        the demonstrations have none
    """

    def __init__(
        self, demos: Demonstrations, policy: BasePolicy, normalize: Callable[[Any], Any] | None = None
    ) -> None:
        self.demos, self.policy = demos, policy
        self._normalize = normalize or (lambda rows: rows)
        self._inner: Any = original(policy)
        self._masks, self._memory = has_masks(policy), has_memory(policy)
        if self._masks:
            self._check_masks()
        space = policy.action_space
        rows = _writable(demos.actions_for(policy))
        actions = th.as_tensor(rows if isinstance(space, spaces.Discrete) else rows.reshape(len(rows), -1))
        #: as the policy's distribution takes them
        self.actions = as_drawn(actions, space).to(policy.device)

    def __len__(self) -> int:
        return self.demos.n_steps

    def _check_masks(self) -> None:
        masks = self._given_masks
        if masks is None:
            if self._inner.observe_masks:
                raise ValueError(
                    "observations of the demonstrations must have the key 'action_mask', since policy_kwargs has "
                    f"observe_masks=True and the networks see it, got {self.demos!r}"
                )
            return
        space = self.policy.action_space
        starts = mask_starts(space)
        if (empty := first_without_choice(masks, starts)) is not None:
            raise ValueError(f"action_mask must allow at least one action, got one that allows none at step {empty[0]}")
        counted = np.asarray(from_env(self.demos.actions, space))
        if (step := first_forbidden(counted, masks, starts)) is not None:
            raise ValueError(
                f"actions must be allowed by the action_mask of their step, got {self.demos.actions[step]} at step "
                f"{step}, where the mask is {masks[step].tolist()}"
            )

    @property
    def _given_masks(self) -> np.ndarray | None:
        rows = self.demos.observations
        return np.asarray(rows[MASK_KEY]) if isinstance(rows, dict) and MASK_KEY in rows else None

    def seen(self, rows: Any) -> Any:
        """Return observations as the policy takes them.

        :param rows: as the demonstrations hold them, one row per observation
        """
        if not self._masks:
            return self._inner.obs_to_tensor(self._normalize(rows))[0]
        inner = self._inner
        keys = [key for key in inner.observation_space.spaces if key != MASK_KEY]
        parts = dict(rows) if isinstance(rows, dict) else dict.fromkeys(keys, rows)
        n_rows = len(next(iter(parts.values())))
        masks = parts.pop(MASK_KEY, np.ones((n_rows, sum(mask_sizes(inner.action_space)))))
        return inner.obs_to_tensor({**self._normalize(parts), MASK_KEY: np.asarray(masks).astype(np.int8)})[0]

    def observations(self, steps: np.ndarray | slice) -> Any:
        """Return the observations of some steps as the policy takes them, without their history."""
        return self.seen(map_observations(lambda array: _writable(array[steps]), self.demos.observations))

    def history(self, episodes: list[slice]) -> History:
        """Return the observations of whole episodes, or of their beginnings.

        :param episodes: the steps of each
        """
        lengths = np.array([steps.stop - steps.start for steps in episodes])
        ids = np.repeat(np.arange(len(episodes)), lengths)
        within = np.concatenate([np.arange(n) for n in lengths])
        rows = _numbers(episodes)
        return History(self.observations(rows), Sequences(ids, within, self.policy.device))

    def minibatches(self, steps: np.ndarray, size: int, rng: np.random.Generator | None = None) -> Iterator[Minibatch]:
        """Yield minibatches, of about equal size.

        Those of a policy with memory hold whole episodes, and so may have more steps.

        :param steps: numbers of the steps, at least one
        :param size: steps per minibatch
        :param rng: draws the order, None for the order of ``steps``
        """
        if self._memory:
            yield from self._of_episodes(steps, size, rng)
            return
        order = steps if rng is None else rng.permutation(steps)
        for chosen in np.array_split(order, -(-len(order) // size)):
            index = th.as_tensor(chosen, device=self.policy.device)
            yield Minibatch(self.observations(chosen), self.actions[index], index, None)

    def _of_episodes(self, steps: np.ndarray, size: int, rng: np.random.Generator | None) -> Iterator[Minibatch]:
        wanted = np.zeros(len(self), bool)
        wanted[steps] = True
        episodes = [episode for episode in self.demos.episodes if wanted[episode].any()]
        order = np.arange(len(episodes)) if rng is None else rng.permutation(len(episodes))
        chosen: list[slice] = []
        n = 0
        for i, number in enumerate(order):
            chosen.append(episodes[number])
            n += chosen[-1].stop - chosen[-1].start
            if n >= size or i == len(order) - 1:
                rows = _numbers(chosen)
                index, counted = (th.as_tensor(array, device=self.policy.device) for array in (rows, wanted[rows]))
                all_count = bool(wanted[rows].all())
                yield Minibatch(self.history(chosen), self.actions[index], index, None if all_count else counted)
                chosen, n = [], 0


def _writable(array: np.ndarray) -> np.ndarray:
    """Return the array, or a copy if it is part of a file: PyTorch warns of arrays that cannot be written to."""
    return np.asarray(array) if array.flags.writeable else np.array(array)


def _numbers(episodes: list[slice]) -> np.ndarray:
    """Return the numbers of the steps of some episodes."""
    return np.concatenate([np.arange(steps.start, steps.stop) for steps in episodes])
