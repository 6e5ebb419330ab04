"""Learn from episodes that another program has logged, with the log-probs of its actions."""

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_pg import OffPolicyPG
from sb3_pg.rollout import Trajectory

env = gym.make("CartPole-v1")
rng = np.random.default_rng(0)


def log_episode(seed: int) -> Trajectory:
    """Act by a rule, at random in one case of four, as some other program might."""
    observations, actions, log_probs, rewards = [], [], [], []
    obs, _ = env.reset(seed=seed)
    terminated = truncated = False
    while not (terminated or truncated):
        p_right = 0.75 if obs[2] + 0.5 * obs[3] > 0 else 0.25
        action = int(rng.random() < p_right)
        observations.append(obs)
        actions.append(action)
        log_probs.append(np.log(p_right if action else 1 - p_right))
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(float(reward))
    return Trajectory(
        np.array(observations),
        np.array(actions),
        np.array(rewards),
        np.array(log_probs),
        terminated=terminated,
        truncated=truncated and not terminated,
        final_observation=obs,
    )


if __name__ == "__main__":
    model = OffPolicyPG("MlpPolicy", env, max_ratio=5.0, buffer_trajectories=64, seed=1, device="cpu")
    model.add_trajectories([log_episode(seed) for seed in range(64)])
    before, _ = evaluate_policy(model, Monitor(env), n_eval_episodes=20)
    model.learn(1)  # sets up the logger; collects 8 episodes of its own
    model.train(gradient_steps=100, batch_size=None)
    after, _ = evaluate_policy(model, Monitor(env), n_eval_episodes=20)
    print(f"mean return before {before:.0f}, after {after:.0f}")
