"""Train on 64 envs at once, with Gymnasium's native vector env of CartPole."""

import time

from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pg import ActorCritic
from sb3_pg.envs import make_vec_env

if __name__ == "__main__":
    env = make_vec_env("CartPole-v1", n_envs=64)
    model = ActorCritic(
        "MlpPolicy", env, "lin_0.01", 32, gae_lambda=0.9, normalize_advantage=True, seed=0, device="cpu"
    )
    start = time.perf_counter()
    model.learn(300_000)
    seconds = time.perf_counter() - start
    mean, std = evaluate_policy(model, make_vec_env("CartPole-v1", 10, backend="dummy"), n_eval_episodes=50)
    print(f"{300_000 / seconds:,.0f} env steps per second; mean return {mean:.0f} +- {std:.0f}")
