"""Learn from demonstrations: episodes of an expert, of a dataset or of a logged policy."""

from sb3_pg.demonstrations.anchors import DemonstrationLoss, KLAnchor
from sb3_pg.demonstrations.data import Demonstrations
from sb3_pg.demonstrations.report import PretrainReport

__all__ = ["DemonstrationLoss", "Demonstrations", "KLAnchor", "PretrainReport"]
