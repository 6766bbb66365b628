"""Imported by the server that forks a rank's loader processes: it ends when the rank does, and they with it.

Without this a rank that is killed leaves them behind for ever: to them the server is the parent, and it waits for a
rank that can ask no more. Linux alone has a signal for it.
"""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
