"""Where something runs under Lightning. A module of its own: to know the options, nobody needs Lightning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from detector.options import Count, Natural, Options


class DeviceOptions(Options):
    """Where something runs under Lightning, and how often it says so."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    """auto takes the GPUs that torch sees, or else the CPU"""
    devices: Annotated[
        Literal["auto"] | Count | Annotated[tuple[Natural, ...], Field(min_length=1)],
        "auto, a whole number from 1, or a list of device numbers",
    ] = "auto"
    """auto: all GPUs, or one CPU process; N: data parallel (DDP) over N; [0, 3]: these"""
    nodes: Count = 1
    """machines, each with `devices`"""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """bf16-mixed on GPUs that have it, and on CPUs with AVX-512 BF16"""
    progress_every: Count = 5
    """steps between updates of the progress bar"""
