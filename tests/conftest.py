"""Lets the tests import the scripts, however pytest is started."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Under `nohup` a closed terminal's signal is to be ignored, so there it can end nothing.
HANGUP = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []

# A run of seconds: every part of the default, small.
QUICK = ["--scale", "nano", "--device", "cpu", "--pictures", "16", "--batch-size", "4", "--image-size", "32",
         "--source-size", "32", "--local-size", "16", "--local-crops", "1", "--prototypes", "16", "--hidden", "16", "--log-every", "1",
         "--no-probe", "--steps", "4"]
