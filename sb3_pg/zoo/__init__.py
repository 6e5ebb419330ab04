"""The algorithms of this package in rl_zoo3.

Importing ``sb3_pg.zoo`` registers them in rl_zoo3's tables::

    import sb3_pg.zoo  # noqa: F401
    from rl_zoo3.train import train

    train()  # --algo reinforce works, with the hyperparameters of zoo_configs/ unless --conf-file says otherwise

One of rl_zoo3's names changes: ``trpo`` is our TRPO, and ``contrib_trpo`` is sb3_contrib's, with rl_zoo3's search and
hyperparameters as before. Its other entries stay. Nothing else in rl_zoo3 is changed.

``python -m rl_zoo3.train`` does not import this package, so it does not know our algorithms. ``sb3-pg train`` (or
``python -m sb3_pg train``) is the same script after this import. It also fits the ``default:`` blocks to the
observation space, evaluates more often, and continues the count of steps with ``-i``: see
:class:`sb3_pg.zoo.experiment.Experiment`.
"""

from sb3_pg.algorithms import ALGORITHMS
from sb3_pg.zoo.registry import config_path, register

__all__ = ["ALGORITHMS", "config_path", "register"]

register()
