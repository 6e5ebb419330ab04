"""The benchmark scripts are no package: they run from their folder. Worker processes inherit the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
