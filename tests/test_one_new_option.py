"""A new option of a part is its definition and its use, in one file; everything else follows."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from scored_data import overrides_of, write_scored_data
from tool_runner import ROOT, run_process

from detector.inference.detector import Detector

DEFINITION = '''    dropout: Share = 0.0
    """Share of the hidden layer that is left out in training."""
    align_reduce: '''
USE = """        hidden = F.dropout(hidden, self.options.dropout, self.training)
        box_deltas = """


@pytest.mark.slow
def test_a_new_option_of_the_light_head(tmp_path: Path, small_detector: Detector) -> None:
    """It is in --help with its text, checked, used, and recorded by the run and by the checkpoint."""
    tree = tmp_path / "tree"
    for name in ("detector", "conf", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    head = tree / "detector/models/light_head.py"
    text = head.read_text()
    for old, new in (("    align_reduce: ", DEFINITION), ("        box_deltas = ", USE)):
        assert text.count(old) == 1
        text = text.replace(old, new)
    head.write_text(text)

    def tool(*words: str) -> list[str]:
        return [sys.executable, str(tree / "tools/train.py"), *words]

    path = {"PYTHONPATH": str(tree)}
    shown = run_process(tool("--help"), tmp_path, **path).ok().out
    assert any(
        "dropout: 0.0" in line and "Share of the hidden layer that is left out" in line for line in shown.splitlines()
    )
    assert "light_head.dropout=2" in run_process(tool("light_head.dropout=2"), tmp_path, **path).error()
    data = write_scored_data(tmp_path / "data", small_detector)
    run_process(
        tool(
            *overrides_of(small_detector.options.spec()), "light_head.dropout=0.25", "recipe=finetune",
            "backbone.weights=null", f"data.root={data}", "run_dir=run", "schedule.epochs=1", "workers=0",
            "input.short_side=64", "input.long_side=96", "train.batch_size=2", "trainer.accelerator=cpu",
        ),
        tmp_path,
        **path,
    ).ok()  # fmt: skip
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["light_head"]["dropout"] == 0.25
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["detector"]["spec"]["light_head"]["dropout"] == 0.25
