"""Measure speed beside a named peer: both sides take turns in one process, ratios are medians over the turns.

python tools/benchmark.py peers                 our parts and torchvision's
python tools/benchmark.py peers out=peers.json  and write the figures down
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from detector.backbones import arguments_of
from detector.data.coco import load_coco
from detector.data.shapes import ensure_shapes
from detector.errors import InputError
from detector.files import write_json
from detector.lab.latency import Contest, machine
from detector.lab.peers import align_contests, backbone_contests, training_contest
from launch import launch, plain

log = logging.getLogger(__name__)
SUBJECTS = ("peers",)


def main(config: DictConfig) -> None:
    if config.what not in SUBJECTS:
        raise InputError(f"what={config.what}; there is: {', '.join(SUBJECTS)}.")
    results = list(tqdm(peers(config), total=6, desc="contests"))
    rows = [result.to_dict() for result in results]
    log.info("%s\n%s", machine(), render(results))
    if config.out:
        write_json(config.out, {"machine": machine(), "turns": config.turns, "contests": rows})
        log.info("%s", config.out)


def peers(config: DictConfig) -> Iterator[Contest]:
    yield from align_contests(config.turns)
    yield from backbone_contests(config.turns)
    values = plain(config)
    spec = {key: values[key] for key in ("backbone", "neck", "rpn", "light_head")}
    spec["backbone"] = arguments_of(spec["backbone"])
    with tempfile.TemporaryDirectory() as folder:
        # Other pictures than the training ones, at the size that both sides take in without shrinking.
        root = ensure_shapes(Path(folder) / "shapes", seed=1, train=32, val=1, size=320)
        index = load_coco(root / "annotations/train.json", root / "images")
        yield training_contest(spec, values["augment"], index, config.turns)


def render(results: list[Contest]) -> str:
    table = Table("what", "ours, ms", "torchvision, ms", "times faster")
    for row in (result.to_dict() for result in results):
        table.add_row(str(row["name"]), *(f"{row[key]:.{digits}f}" for key, digits in
                      (("ours_ms", 1), ("peer_ms", 1), ("ratio", 2))))  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


if __name__ == "__main__":
    # `benchmark.py peers` reads better than `benchmark.py what=peers`.
    sys.argv[1:] = [f"what={word}" if word in SUBJECTS else word for word in sys.argv[1:]]
    launch(main, config_name="benchmark")
