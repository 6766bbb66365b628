"""What glibc's allocator keeps between predictions on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# malloc.h. Setting one switches off that glibc moves both by itself.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
KEPT = 256 << 20  # bytes; the maps of eight images of 480 x 640 take half of it
OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> None:
    """Let the process keep up to KEPT bytes that it has freed, instead of giving them back after every prediction.

    A prediction needs the same few large maps as the one before. Where they happen to lie at the end of the heap, glibc
    returns them to the system, which hands them out anew page by page: 3,600 page faults a prediction of v2_1x at
    480 x 640, a fifth of its time, in most processes. Measured by this project.

    Of Linux with glibc alone, and nothing where the user has set the allocator by one of OWN_SETTINGS.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in OWN_SETTINGS):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT)
