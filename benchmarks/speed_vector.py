"""What is compared on vectorized envs: ours on native ones or EnvPool's, SB3's own on its DummyVecEnv."""

from speed_cases import a2c, actor_critic, kl_penalty, ppo
from speed_timing import Case, FloorCase, TrainingCase

CARTPOLE, LANDER = "CartPole-v1", "LunarLander-v3"
SIDES = ("ActorCritic", actor_critic, "A2C", a2c)  # log_interval=100 is the default of both

CASES: tuple[Case, ...] = (
    TrainingCase("vector-cartpole-64", *SIDES, CARTPOLE, 64, log_interval=100, backend="vector"),
    TrainingCase("vector-cartpole-64-ppo", "KLPenaltyPG", kl_penalty, "PPO", ppo, CARTPOLE, 64, backend="vector"),
    FloorCase("floor-cartpole-64", *SIDES[:2], CARTPOLE, 64, "vector"),
    TrainingCase("envpool-lander-64", *SIDES, LANDER, 64, log_interval=100, backend="envpool", n_threads=2),
    FloorCase("floor-lander-64", *SIDES[:2], LANDER, 64, "envpool", n_threads=2),
)
