"""rl_zoo3 with the algorithms of this package.

Importing this package registers them in rl_zoo3, in place::

    import sb3_pg.zoo  # noqa: F401
    from rl_zoo3.train import train

    train()  # --algo reinforce works, with the hyperparameters of zoo_configs/ unless --conf-file says otherwise

One of rl_zoo3's own names changes hands: ``trpo`` is our TRPO, and ``contrib_trpo`` is sb3_contrib's, with rl_zoo3's
search and hyperparameters as before. Its other entries stay as they are, and registering twice is registering once.

rl_zoo3's bare command line (``python -m rl_zoo3.train``) cannot offer ``--algo reinforce``, because it fixes the
choices before anybody can add to them; ``sb3-pg train`` (or ``python -m sb3_pg train``) is the same script with the
registration before it. It also fits the ``default:`` blocks to the observation space, evaluates more often, and
continues the count of steps with ``-i``: see :class:`sb3_pg.zoo.experiment.Experiment`.
"""

from sb3_pg.zoo.registry import ALGORITHMS, config_path, register

__all__ = ["ALGORITHMS", "config_path", "register"]

register()
