"""Puts this folder on the path, because the scripts of a run on a GPU import each other by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
