"""Memory that predictions free and need again: page faults, as the system counts them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from detector.inference.detector import Detector
from detector.inference.memory import OWN_SETTINGS

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told")

# Three arrays of whole pages, freed together; the first round is of memory that is new.
COUNT = """
import resource
import sys
import numpy as np

if sys.argv[1] == "function":
    from detector.inference.memory import keep_freed_memory

    keep_freed_memory()
elif sys.argv[1] != "nothing":
    from detector.inference.detector import Detector

    Detector.load(sys.argv[1], device="cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [np.ones(size << 20, np.uint8) for size in (8, 16, 24)]
    del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(4)][-1])
"""


def faults_after(what: object, **environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(what)], capture_output=True, text=True, check=True, env=kept | environment
    )
    return int(done.stdout)


def test_freed_memory_is_kept(small_detector: Detector, tmp_path: Path) -> None:
    small_detector.save(tmp_path / "detector.ckpt")
    assert faults_after("nothing") > 500  # what is mended
    assert faults_after("function") < 50
    assert faults_after(tmp_path / "detector.ckpt") < 50


def test_the_users_own_settings_count() -> None:
    assert faults_after("function", MALLOC_TRIM_THRESHOLD_="131072") > 500
