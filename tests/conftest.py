"""Lets the tests import the scripts, however pytest is started."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Under `nohup`, or behind a shell's `&`, signals that the tests send would be ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A run of seconds: every part of the default, small.
QUICK = ["--scale", "nano", "--device", "cpu", "--pictures", "16", "--batch-size", "4", "--image-size", "32",
         "--source-size", "32", "--local-size", "16", "--local-crops", "1", "--prototypes", "16", "--hidden", "16", "--log-every", "1",
         "--no-probe", "--steps", "4"]
