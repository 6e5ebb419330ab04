"""Returns and advantages: known values, identities, plain loops, and SB3's own buffer."""

from collections.abc import Callable

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_pg import functional as F  # noqa: N812

GAMMA, LAMBDA = 0.9, 0.7


def column(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float32)[:, None]


@pytest.fixture
def rollout() -> dict[str, th.Tensor]:
    """Random rewards and values; episodes of random length, some truncated; the last rows are cut."""
    generator = th.Generator().manual_seed(3)
    shape = (50, 4)
    ends = th.rand(shape, generator=generator) < 0.15
    truncated = ends & (th.rand(shape, generator=generator) < 0.5)
    needs_value = truncated.clone()
    needs_value[-1] |= ~ends[-1]
    return {
        "rewards": th.randn(shape, generator=generator, dtype=th.float64),
        "values": th.randn(shape, generator=generator, dtype=th.float64),
        "ends": ends,
        "bootstrap": th.where(needs_value, th.randn(shape, generator=generator, dtype=th.float64), 0.0),
    }


def slow_n_step(r: dict[str, th.Tensor], n: int) -> th.Tensor:
    """The definition, sample by sample."""
    rewards, values, ends, bootstrap = r["rewards"], r["values"], r["ends"], r["bootstrap"]
    n_steps, n_envs = rewards.shape
    out = th.zeros_like(rewards)
    for env in range(n_envs):
        for t in range(n_steps):
            total, k = 0.0, 0
            while True:
                total += GAMMA**k * rewards[t + k, env].item()
                k += 1
                last = t + k - 1
                if ends[last, env] or last == n_steps - 1:
                    total += GAMMA**k * bootstrap[last, env].item()
                    break
                if k == n:
                    total += GAMMA**k * values[t + k, env].item()
                    break
            out[t, env] = total
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 50, 1000])
def test_n_step_return_is_its_definition(rollout: dict[str, th.Tensor], n: int) -> None:
    result = F.n_step_return(rollout["rewards"], rollout["values"], rollout["ends"], GAMMA, n, rollout["bootstrap"])
    assert th.allclose(result, slow_n_step(rollout, n))


def test_reward_to_go_is_the_longest_n_step_return(rollout: dict[str, th.Tensor]) -> None:
    result = F.reward_to_go(rollout["rewards"], rollout["ends"], GAMMA, rollout["bootstrap"])
    assert th.allclose(result, slow_n_step(rollout, 10_000))


def test_lambda_return_mixes_n_step_returns(rollout: dict[str, th.Tensor]) -> None:
    # sum_n (1 - l) l^(n-1) G^(n); beyond the rollout all n-step returns are the same.
    mixture = sum((1 - LAMBDA) * LAMBDA ** (n - 1) * slow_n_step(rollout, n) for n in range(1, 51))
    mixture = mixture + LAMBDA**50 * slow_n_step(rollout, 10_000)
    rewards, values, ends = (rollout[k] for k in ("rewards", "values", "ends"))
    result = F.lambda_return(rewards, values, ends, GAMMA, LAMBDA, rollout["bootstrap"])
    assert th.allclose(result, mixture)


def test_gae_identities(rollout: dict[str, th.Tensor]) -> None:
    rewards, values, ends, bootstrap = (rollout[k] for k in ("rewards", "values", "ends", "bootstrap"))
    monte_carlo = F.reward_to_go(rewards, ends, GAMMA, bootstrap) - values
    assert th.allclose(F.gae(rewards, values, ends, GAMMA, 1.0, bootstrap), monte_carlo)
    td = F.td_residual(rewards, values, ends, GAMMA, bootstrap)
    assert th.allclose(F.gae(rewards, values, ends, GAMMA, 0.0, bootstrap), td)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_gae_equals_sb3s_buffer(n_envs: int) -> None:
    rng = np.random.default_rng(0)
    n_steps = 40
    buffer = RolloutBuffer(n_steps, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "cpu", LAMBDA, GAMMA, n_envs)
    buffer.rewards = rng.normal(size=(n_steps, n_envs)).astype(np.float32)
    buffer.values = rng.normal(size=(n_steps, n_envs)).astype(np.float32)
    dones = rng.random((n_steps, n_envs)) < 0.1
    buffer.episode_starts[1:] = dones[:-1]
    last_values = rng.normal(size=n_envs).astype(np.float32)
    values = th.tensor(buffer.values)
    buffer.compute_returns_and_advantage(th.tensor(last_values), dones[-1])

    bootstrap = th.zeros(n_steps, n_envs)
    bootstrap[-1] = th.tensor(np.where(dones[-1], 0, last_values))
    ours = F.gae(th.tensor(buffer.rewards), values, th.tensor(dones), GAMMA, LAMBDA, bootstrap)
    assert np.allclose(ours.numpy(), buffer.advantages, atol=1e-5)


def test_known_values() -> None:
    rewards, ends = column(1, 2, 3, 10, 20), column(0, 0, 1, 0, 1).bool()
    assert F.reward_to_go(rewards, ends, 0.5).flatten().tolist() == [1 + 1 + 0.75, 2 + 1.5, 3, 20, 20]
    assert F.total_return(rewards, ends, 0.5).flatten().tolist() == [2.75, 2.75, 2.75, 20, 20]
    # A truncated end is worth what its last state is worth: 3 + 0.5 * 8.
    assert F.reward_to_go(rewards, ends, 0.5, column(0, 0, 8, 0, 0)).flatten().tolist() == [3.75, 5.5, 7, 20, 20]


def test_padding_never_leaks() -> None:
    rewards, ends = column(1, 2, 3, 4, 5, 6), column(0, 1, 0, 1, 0, 0).bool()
    mask = column(1, 1, 1, 1, 0, 0).bool()
    values = column(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    poisoned = th.where(mask, rewards, th.nan), th.where(mask, values, th.inf)
    for function in (
        lambda r, _, **k: F.reward_to_go(r, ends[: len(r)], GAMMA, **k),
        lambda r, _, **k: F.total_return(r, ends[: len(r)], GAMMA, **k),
        lambda r, v, **k: F.n_step_return(r, v, ends[: len(r)], GAMMA, 2, **k),
        lambda r, v, **k: F.lambda_return(r, v, ends[: len(r)], GAMMA, LAMBDA, **k),
        lambda r, v, **k: F.td_residual(r, v, ends[: len(r)], GAMMA, **k),
        lambda r, v, **k: F.gae(r, v, ends[: len(r)], GAMMA, LAMBDA, **k),
    ):
        padded = function(*poisoned, mask=mask)
        assert padded[4:].tolist() == [[0.0], [0.0]]
        assert th.allclose(padded[:4], function(rewards[:4], values[:4]))


def test_normalize() -> None:
    x = th.tensor([[1.0, 2.0], [3.0, 6.0]])
    y = F.normalize(x)
    assert th.allclose(y, (x - 3.0) / x.std())
    mask = th.tensor([[True, True], [True, False]])
    z = F.normalize(x, mask)
    assert th.allclose(z[mask], th.tensor([-1.0, 0.0, 1.0]))
    assert z[1, 1] == 0


@pytest.mark.parametrize("x", [[], [3.0], [0.1, 0.1, 0.1], [1e6 + 0.1] * 7])
def test_normalize_leaves_alone_what_has_no_spread(x: list[float]) -> None:
    assert F.normalize(th.tensor(x)).tolist() == th.tensor(x).tolist()


def test_normalize_leaves_rounding_alone() -> None:
    x = th.tensor([1e-13, -2e-13, 3e-13], dtype=th.float64)
    assert F.normalize(x).abs().max() > 1e-6
    assert th.equal(F.normalize(x, tolerance=th.tensor(1e-11)), x)
    assert F.normalize(x, tolerance=th.tensor(1e-14)).abs().max() > 1e-6


def test_normalize_of_one_valid_sample_is_a_no_op() -> None:
    assert F.normalize(th.tensor([[5.0], [7.0]]), th.tensor([[True], [False]])).tolist() == [[5.0], [0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.reward_to_go(th.zeros(3, 1), th.zeros(3, 2).bool(), 0.9), r"ends.*\(3, 2\)"),
        (lambda: F.reward_to_go(th.zeros(3, 1), th.zeros(3, 1).bool(), 1.1), "gamma.*1.1"),
        (lambda: F.gae(th.zeros(3, 1), th.zeros(3, 1), th.zeros(3, 1).bool(), 0.9, -0.1), "gae_lambda.*-0.1"),
        (
            lambda: F.n_step_return(th.zeros(3, 1), th.zeros(3, 1), th.zeros(3, 1).bool(), 0.9, 0),
            "n must be at least 1, got 0",
        ),
        (lambda: F.policy_gradient_loss(th.zeros(3), th.zeros(2)), "shape"),
        (lambda: F.policy_gradient_loss(th.zeros(3), th.zeros(3), n_episodes=0), "n_episodes"),
        (lambda: F.value_loss(th.zeros(3), th.zeros(3, 1)), "shapes"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_policy_gradient_loss_reductions() -> None:
    log_prob = th.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    advantages = th.tensor([[1.0, 2.0], [3.0, 100.0]])
    mask = th.tensor([[True, True], [True, False]])
    # Minus the sum of log pi * A over valid steps is 1 + 4 + 9 = 14: mean over 3 steps, or over 2 episodes.
    assert F.policy_gradient_loss(log_prob, advantages, mask).item() == pytest.approx(14 / 3)
    loss = F.policy_gradient_loss(log_prob, advantages, mask, n_episodes=2)
    assert loss.item() == pytest.approx(7)
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [[-0.5, -1.0], [-1.5, 0.0]]


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(rollout: dict[str, th.Tensor]) -> None:
    cuda = {key: value.cuda() for key, value in rollout.items()}
    cpu_result, cuda_result = (
        F.gae(x["rewards"], x["values"], x["ends"], GAMMA, LAMBDA, x["bootstrap"]) for x in (rollout, cuda)
    )
    assert th.allclose(cuda_result.cpu(), cpu_result)
