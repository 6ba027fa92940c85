"""Lets the tests import the scripts, however pytest is started."""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

sys.path.insert(0, str(Path(__file__).parent.parent))
