"""OpenVINO in a process that gets signals: one Core, and the stack of signal handlers left as it was.

Each openvino.Core gives the thread in which it begins a stack for signal handlers, and takes it away when it ends, in
use or not (SigAltStackSetup in openvino's src/plugins/intel_cpu/src/plugin.cpp). After two that did not end in the
reverse order of their beginning the next signal, Ctrl-C or the end of a child process, ends Python with a segmentation
fault.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_ONE_AT_A_TIME = threading.Lock()


def openvino_core() -> Any:
    """The openvino.Core of this process, for everything that reads or compiles. It never ends."""
    with _ONE_AT_A_TIME:
        return _core()


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


class _SignalStack(ctypes.Structure):
    """stack_t of Linux's sigaltstack(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """For what makes Cores of its own, as NNCF does: this thread's signal handlers keep the stack that they have."""
    if sys.platform != "linux":
        yield
        return
    system, before = ctypes.CDLL(None), _SignalStack()
    system.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        system.sigaltstack(ctypes.byref(before), None)
