"""Experiments with the small detector of `examples/toy_detector`: which losses pay, for whom, at equal cost."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "toy_detector"))  # whose modules are scripts beside one another
