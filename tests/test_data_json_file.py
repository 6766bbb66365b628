"""Every JSON file is read as Python's own parser reads it, whichever parser is faster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.data.json_file import read_json
from detector.errors import InputError

CONTENT = {"b": [1, -0.0, 1e-310, 2**70, None, True, "é\U0001f600"], "a": {"": []}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("hook", [None, dict])
def test_encodings(tmp_path: Path, encoding: str, hook: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CONTENT, ensure_ascii=False), encoding=encoding)
    found = read_json(tmp_path / "a.json", "file", hook)
    assert repr(found) == repr(CONTENT)  # types, order and the sign of zero too


@pytest.mark.parametrize("text", ['["\\ud800"]', '{"a": 1, "a": 2}', "[NaN, -Infinity, 1e400]"])
def test_what_is_no_strict_json_is_read_as_python_reads_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert repr(read_json(tmp_path / "a.json", "file")) == repr(json.loads(text))


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**63, 5000).view(np.float64)
    values = values[np.isfinite(values)].tolist() + (rng.random(5000) * 640).tolist()
    (tmp_path / "a.json").write_text(json.dumps(values))
    assert read_json(tmp_path / "a.json", "file") == values


@pytest.mark.parametrize("text", ["", "[1] x", "[01]", '"a\nb"'])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: not valid JSON \(.+ line 1 .+\); the file is damaged"):
        read_json(tmp_path / "a.json", "file")


def test_lists_too_deep_inside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    for hook in (None, dict):
        with pytest.raises(InputError, match=r"deep\.json: lists or objects too deep"):
            read_json(path, "annotation file", hook)
