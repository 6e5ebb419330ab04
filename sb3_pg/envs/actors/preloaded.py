"""What the fork server imports, so that a process starts in milliseconds. Nothing else imports this.

A process of the fork server has the random generators of the server. NumPy's and torch's are seeded anew here, or envs
that draw from them would draw the same in all processes, SubprocVecEnv's included. (Python's seeds itself.)
"""

import os

from stable_baselines3.common.utils import set_random_seed

from sb3_pg.envs.actors import transports


def seed_from_entropy() -> None:
    """Seed the global random generators of this process with a number of the operating system."""
    set_random_seed(int.from_bytes(os.urandom(4), "little"))


#: the module that processes run
SERVES = transports
os.register_at_fork(after_in_child=seed_from_entropy)
