"""Checkpoints and weight files of other people: each is used as it is meant, or refused in one line."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detector.errors import InputError
from detector.inference.detector import Detector, read_checkpoint
from detector.models.backbones import build_backbone, parse_backbone
from detector.models.backbones.pretrained import load_weights
from detector.models.weights import DamagedFileError, misfits, read_tensors
from detector.training.resume import read_resumable

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
HALF = {"name": "shufflenet_v2", "stem_channels": 8, "channels": [16, 32, 64], "repeats": [2, 2, 2]}
HUGE = 10**9
KEY, VARIANCE = "network.backbone.conv1.0.weight", "network.backbone.conv1.1.running_var"


class Trap:
    """Code in a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def content(small_detector: Detector, tmp_path: Path) -> dict[str, Any]:
    small_detector.save(tmp_path / "whole.ckpt")
    found: dict[str, Any] = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    return found


def put(content: Any, path: str, value: Any) -> None:
    """Change what lies at "detector/spec/rpn/scales"; a function is given what was there."""
    *outer, last = path.split("/")
    for name in outer:
        content = content[name]
    content[last] = value(content[last]) if callable(value) else value


def one_line(error: InputError, name: str) -> str:
    text = str(error)
    assert name in text, text
    assert "\n" not in text
    assert len(text) < 700, text
    return text


SPEC = "detector/spec"
MUTANTS: list[tuple[str, Any, str]] = [
    # path, value, what the message says beside the file's name
    ("detector", [1], "not a detector checkpoint"),
    ("detector/format", 5, "not a detector checkpoint"),
    ("detector/version", "1", "not a detector checkpoint"),
    ("detector/version", HUGE, "update it"),
    ("detector/spec", None, "spec is missing"),
    ("detector/spec", {1: 2}, "1 is not an option"),
    (f"{SPEC}/backbone", 5, "backbone"),
    (f"{SPEC}/backbone/name", "resnet", "backbone.name=resnet"),
    (f"{SPEC}/backbone/name", None, "backbone"),
    (f"{SPEC}/backbone/name", "shufflenet_v1", "backbone"),
    (f"{SPEC}/backbone/channels", [HUGE] * 3, f"from 1 to {2**16}"),
    (f"{SPEC}/backbone/channels", [2**16] * 3, "backbone.stage2.0.branch1.3.bias is (8,), expected (32768,)"),
    (f"{SPEC}/backbone/channels", [20, 40, 80], "backbone.stage2.0.branch1.3.bias is (8,), expected (10,)"),
    (f"{SPEC}/backbone/repeats", [HUGE] * 3, "from 1 to 64"),
    (f"{SPEC}/backbone/repeats", [2, 2, 3], "stage4.2.branch2.0.weight is missing"),
    (f"{SPEC}/backbone/stem_channels", [8] * 10**5, "backbone.stem_channels"),
    (f"{SPEC}/neck/width", HUGE, "neck"),
    (f"{SPEC}/neck/width", "16", "neck.width=16: expected a whole number"),
    (f"{SPEC}/rpn", "none", "rpn"),
    (f"{SPEC}/rpn/scales", [1e300], "rpn.scales"),
    (f"{SPEC}/rpn/scales", [32.0] * 10**5, "rpn.scales"),
    (f"{SPEC}/rpn/ratios", [1e-300, 1.0, 1.0], "rpn.ratios"),
    (f"{SPEC}/rpn/test_limits/after_nms", HUGE, "rpn.test_limits.after_nms=1000000000"),
    (f"{SPEC}/rpn/nms_threshold", float("nan"), "rpn.nms_threshold"),
    (f"{SPEC}/light_head/mid_channels", HUGE, "light_head.mid_channels=1000000000: expected a whole number from 1 to"),
    (f"{SPEC}/light_head/mid_channels", 2**16, "head.thin.column_row.0.weight is (8, 16, 5, 1), expected (65536, 16,"),
    (f"{SPEC}/light_head/hidden_channels", 10**30, "light_head"),
    (f"{SPEC}/light_head/thin_channels", -3, "light_head.thin_channels=-3"),
    (f"{SPEC}/light_head/kernel_size", 9999, "expected (8, 16, 9999, 1)"),
    (f"{SPEC}/light_head/class_agnostic", None, "light_head.class_agnostic=null: expected true or false"),
    (f"{SPEC}/light_head/class_agnostic", False, "head.box_deltas.weight is (4, 64), expected (12, 64)"),
    ("detector/class_names", [], "head.class_logits.weight is (4, 64), expected (1, 64)"),
    ("detector/class_names", "cat", "class_names is missing"),
    ("detector/class_names", ["cat", "dog", "cat"], "'cat' is there 2 times"),
    ("detector/class_names", ["cat", "dog", 3], "a class name is no text"),
    ("detector/class_names", ["cat", "dog"], "head.class_logits.weight is (4, 64), expected (3, 64)"),
    ("detector/class_names", [str(i) for i in range(10**6)], "expected (1000001, 64)"),
    ("detector/preprocessing", {}, "preprocessing.long_side is missing"),
    ("detector/preprocessing/short_side", HUGE, "short_side=1000000000: expected a whole number from 1 to 16384"),
    ("detector/preprocessing/long_side", 1.5, "long_side=1.5: expected a whole number"),
    ("detector/provenance", [1, 2], "provenance is a list"),
    ("state_dict", [1], "not a detector checkpoint"),
    ("state_dict", {3: torch.zeros(2)}, "not a detector checkpoint"),
    ("state_dict", {}, "is missing, expected (8, 3, 3, 3)"),
    (f"state_dict/{KEY}", "text", "backbone.conv1.0.weight is a str, expected a tensor"),
    (f"state_dict/{KEY}", lambda x: x * float("nan"), "backbone.conv1.0.weight holds NaN, infinity or more"),
    (f"state_dict/{KEY}", lambda x: x * 1e30, "holds NaN, infinity or more than 1e+18"),
    (f"state_dict/{KEY}", lambda x: x.double() * 1e300, "holds NaN, infinity or more than 1e+18"),
    (f"state_dict/{KEY}", lambda x: x[:4], "conv1.0.weight is (4, 3, 3, 3), expected (8, 3, 3, 3)"),
    (f"state_dict/{KEY}", lambda x: x.to(torch.int8), "is of int8, expected float32"),
    (f"state_dict/{KEY}", lambda x: x.bool(), "is of bool, expected float32"),
    (f"state_dict/{KEY}", lambda x: x.to(torch.complex64), "is of complex64, expected float32"),
    (f"state_dict/{KEY}", lambda x: x.to(torch.float8_e4m3fn), "is of float8_e4m3fn, expected float32"),
    (f"state_dict/{KEY}", lambda x: x.to_sparse(), "is sparse"),
    (f"state_dict/{KEY}", lambda x: x[:1, :1, :1, :1].clone().expand(8, 3, 3, 3), "fewer numbers"),
    (f"state_dict/{VARIANCE}", lambda x: -x, "conv1.1.running_var holds variances below 0"),
    ("state_dict/network.backbone.surplus", torch.zeros(1), "backbone.surplus has no place here"),
]


@pytest.mark.filterwarnings("ignore:.*sparse")
@pytest.mark.parametrize(
    ("place", "value", "said"), MUTANTS, ids=[f"{number} {place}" for number, (place, _, _) in enumerate(MUTANTS)]
)
def test_a_checkpoint_that_is_wrong_is_refused_by_name_before_memory_is_taken(
    content: dict[str, Any], tmp_path: Path, place: str, value: Any, said: str
) -> None:
    put(content, place, value)
    torch.save(content, tmp_path / "odd.ckpt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        Detector.load(tmp_path / "odd.ckpt", "cpu")
    assert said in one_line(caught.value, "odd.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("epoch", "3", "its epoch is a str, expected a int"),
        ("global_step", None, "its global_step is a NoneType, expected a int"),
        ("optimizer_states", {}, "its optimizer_states is a dict, expected a list"),
        ("loops", [1], "its loops is a list, expected a dict"),
        ("detector/provenance", None, "holds no optimiser state"),
        ("detector/provenance/config", [], "its recipe_name is a NoneType, expected a str"),
        ("detector/provenance/config/overrides", "lr=1", "its overrides is a str, expected a list"),
    ],
)
def test_a_damaged_run_is_not_gone_on_with(
    content: dict[str, Any], tmp_path: Path, place: str, value: Any, said: str
) -> None:
    state = {"epoch": 3, "global_step": 9, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
    content["detector"]["provenance"] = {"config": {"recipe_name": "a", "backbone_name": "b", "overrides": []}}
    torch.save(content | state, tmp_path / "last.ckpt")
    assert read_resumable(str(tmp_path / "last.ckpt"), "detector", read_checkpoint)["epoch"] == 3
    put(content := content | state, place, value)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(InputError) as caught:
        read_resumable(str(tmp_path / "last.ckpt"), "detector", read_checkpoint)
    assert said in one_line(caught.value, "last.ckpt")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_precision_is_used(content: dict[str, Any], tmp_path: Path, kind: torch.dtype) -> None:
    content["state_dict"] = {
        key: value.to(kind) if value.is_floating_point() else value for key, value in content["state_dict"].items()
    }
    torch.save(content, tmp_path / "other.ckpt")
    state = Detector.load(tmp_path / "other.ckpt", "cpu", fused=False).network.state_dict()
    assert torch.equal(state[KEY.removeprefix("network.")], content["state_dict"][KEY].float())


def test_class_names_that_utf8_cannot_say_are_kept(content: dict[str, Any], tmp_path: Path) -> None:
    content["detector"]["class_names"] = ["\ud83d", "dog", ""]
    torch.save(content, tmp_path / "half.ckpt")
    assert Detector.load(tmp_path / "half.ckpt", "cpu").class_names == ("\ud83d", "dog", "")


def leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in ([f"{path}{key}", *leaves(item, f"{path}{key}/")])]
    return []


ODD_VALUES = [
    None, True, -1, 0, 3, 2.5, 10**9, 10**30, -1e308, float("nan"), float("inf"), "", "3", "\udcff", "x" * 10**5, b"3",
    [], [[]], [None], {}, {"name": 3}, {3: 4}, (1, 2), {"a"}, torch.zeros(2), torch.zeros(0), [10**9] * 3, ["a"] * 3,
]  # fmt: skip


def try_detector(path: Path) -> bool:
    """Whether the file is used: then it predicts; else it is refused in one line."""
    try:
        loaded = Detector.load(path, "cpu")
    except InputError as error:
        one_line(error, path.name)
        return False
    found = loaded.predict(IMAGE, score_threshold=0)[0]
    assert np.isfinite(found.boxes).all()
    assert (found.boxes >= 0).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    return True


def test_random_changes_of_a_description(content: dict[str, Any], tmp_path: Path) -> None:
    """One or two fields of each checkpoint hold something that somebody else may have written there."""
    rng = random.Random(0)
    places = [f"detector/{path}" for path in leaves(content["detector"])]
    used = 0
    for _ in range(60):
        changed = {"detector": copy.deepcopy(content["detector"]), "state_dict": dict(content["state_dict"])}
        for place in rng.sample(places, rng.choice((1, 1, 2))):
            try:
                put(changed, place, rng.choice(ODD_VALUES))
            except (TypeError, KeyError):  # the other change took its place away
                continue
        torch.save(changed, tmp_path / "odd.ckpt")
        used += try_detector(tmp_path / "odd.ckpt")
    assert 0 < used < 30  # some options may have other values


def damage(whole: bytes, rng: random.Random, count: int, end: int) -> bytes:
    """Other values in so many places before `end`."""
    damaged = bytearray(whole)
    for place in rng.sample(range(end), count):
        damaged[place] ^= rng.randrange(1, 256)
    return bytes(damaged)


def numbers(detector: Detector) -> Any:
    """The bytes of all tensors."""
    return np.concatenate([value.numpy().ravel().view(np.uint8) for value in detector.network.state_dict().values()])


def test_random_damage_of_the_bytes(content: dict[str, Any], small_detector: Detector, tmp_path: Path) -> None:
    """A part of a file, and other bytes in it, are refused; those between its entries are nobody's."""
    path = tmp_path / "odd.ckpt"
    torch.save(content, path)
    whole, rng = path.read_bytes(), random.Random(0)
    for cut in (1, len(whole), *rng.sample(range(1, len(whole)), 10)):
        path.write_bytes(whole[:-cut])
        assert not try_detector(path), cut
    used = {0: 0, 1: 0, 100: 0}
    for count in (0, *(1,) * 16, *(100,) * 8):
        path.write_bytes(damage(whole, rng, count, len(whole)))
        if try_detector(path):
            used[count] += 1
            found = numbers(Detector.load(path, "cpu", fused=False))
            assert np.array_equal(found, numbers(small_detector))
    assert used[0] == 1
    assert used[1] < 16
    assert used[100] == 0


def test_a_bit_of_a_number_is_missed(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.ckpt"
    torch.save(content, path)
    whole = path.read_bytes()
    numbers = content["state_dict"][KEY].numpy().tobytes()
    at = whole.index(numbers)
    path.write_bytes(whole[:at] + bytes([numbers[0] ^ 1]) + whole[at + 1 :])
    with pytest.raises(InputError, match=r"odd\.ckpt.*its entry odd/data/\d+ has other bytes than were written"):
        Detector.load(path)


def test_a_file_that_was_written_without_sums_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "other.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert try_detector(tmp_path / "other.ckpt")


def state_of(spec: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_backbone(parse_backbone(spec)).state_dict()


def try_weights(path: Path, **options: Any) -> str:
    backbone = build_backbone(parse_backbone(HALF))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(backbone, path, **options)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    return one_line(caught.value, path.name)


WEIGHTS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: x * float("inf"), "conv1.0.weight holds NaN, infinity or more"),
    (lambda x: x.to(torch.uint8), "conv1.0.weight is of uint8, expected float32"),
    (lambda x: x.to(torch.float8_e5m2), "conv1.0.weight is of float8_e5m2, expected float32"),
    (lambda x: x.to_sparse(), "conv1.0.weight is sparse"),
    (lambda x: x.flatten()[:1].clone().expand(HUGE, HUGE), "conv1.0.weight is (1000000000, 1000000000), but has fewer"),
    (lambda x: x[0], "conv1.0.weight is (3, 3, 3), expected (8, 3, 3, 3)"),
    (lambda x: x.tolist(), "holds no state dict"),
    (lambda _: "text", "holds no state dict"),
]


@pytest.mark.filterwarnings("ignore:.*sparse")
@pytest.mark.parametrize(("change", "said"), WEIGHTS, ids=[said for _, said in WEIGHTS])
def test_weights_that_are_wrong_are_refused_by_name(tmp_path: Path, change: Callable[[Tensor], Any], said: str) -> None:
    state = state_of(HALF)
    torch.save(state | {"conv1.0.weight": change(state["conv1.0.weight"])}, tmp_path / "odd.pth")
    assert said in try_weights(tmp_path / "odd.pth")


def test_partial_leaves_broken_tensors_at_random(tmp_path: Path) -> None:
    state = state_of(HALF)
    torch.save(state | {"conv1.0.weight": state["conv1.0.weight"] * float("nan")}, tmp_path / "odd.pth")
    backbone = build_backbone(parse_backbone(HALF))
    report = load_weights(backbone, tmp_path / "odd.pth", partial=True)
    assert report.random == ("conv1.0.weight",)
    assert backbone.state_dict()["conv1.0.weight"].isfinite().all()


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    torch.save({"conv1.0.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    assert "not a whole file of torch weights" in try_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_an_archive_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path: Path) -> None:
    torch.save(state_of(HALF), tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
        with bomb.open("whole/data/bomb", "w") as stream:
            for _ in range(300):
                stream.write(bytes(2**20))
    assert (tmp_path / "bomb.pth").stat().st_size < 2**20
    assert "it unpacks to 31" in try_weights(tmp_path / "bomb.pth")


def test_safetensors_with_a_wrong_header(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")

    def write(header: bytes, length: int | None = None, data: bytes = b"") -> Path:
        path = tmp_path / "odd.safetensors"
        path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
        return path

    entry = {"dtype": "F32", "shape": [8, 3, 3, 3], "data_offsets": [0, 864]}
    headers = [
        b"", b"{}", b"[1]", b"{", json.dumps({"conv1.0.weight": entry | {"data_offsets": [0, HUGE]}}).encode(),
        json.dumps({"conv1.0.weight": entry | {"dtype": "F3"}}).encode(),
        json.dumps({"conv1.0.weight": entry | {"shape": [HUGE] * 4}}).encode(),
        json.dumps({"conv1.0.weight": entry | {"shape": [-1]}}).encode(), b"\xff" * 20,
    ]  # fmt: skip
    for header in headers:
        assert "backbone.weights=" in try_weights(write(header, data=bytes(864)))
    for length in (0, 10**6, 2**63, 2**64 - 1):
        assert "not a whole file of torch weights" in try_weights(write(b"{}", length))


def test_the_reader_names_any_damage_as_one(tmp_path: Path) -> None:
    state, path = state_of(HALF), tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as before torch 1.6
    whole, rng = path.read_bytes(), random.Random(0)

    def other_than_saved(content: bytes) -> list[str]:
        path.write_bytes(content)
        found = read_tensors(path)
        assert found.keys() == state.keys()
        return [name for name in state if not torch.equal(found[name], state[name])]

    def reason(content: bytes) -> str | None:
        path.write_bytes(content)
        try:
            read_tensors(path)
        except DamagedFileError as error:  # whatever torch raises
            return str(error)
        return None

    assert other_than_saved(whole) == []
    weight = state["conv1.0.weight"].numpy().tobytes()
    assert other_than_saved(whole.replace(weight, bytes(len(weight)))) == ["conv1.0.weight"]
    reasons = [reason(whole[:-cut]) for cut in (1, len(whole), *rng.sample(range(1, len(whole)), 20))]
    # The first bytes are structure and names; torch minds all but another letter in a name.
    reasons += [reason(damage(whole, rng, 100, 2000)) for _ in range(20)]
    for text in reasons:
        assert text is not None
        assert len(text.splitlines()) == 1
        assert len(text) <= 200
    assert 0 < sum(reason(damage(whole, rng, 1, 2000)) is None for _ in range(40)) < 40


def test_without_safetensors_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "odd.safetensors").touch()
    said = try_weights(tmp_path / "odd.safetensors")
    assert said.startswith(f"'{tmp_path / 'odd.safetensors'}' needs ")
    assert "pip install safetensors" in said


def test_misfits_are_named_in_the_order_of_the_network() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3), "count": torch.tensor(0)}
    assert misfits(own, own) == {}
    assert misfits(own, {"count": torch.tensor(0.5), "b": torch.zeros(2), "other": torch.zeros(1)}) == {
        "a": "a is missing, expected (2,)",
        "b": "b is (2,), expected (3,)",
        "count": "count is of float32, expected int64",
        "other": "other has no place here",
    }


def test_a_file_with_code_is_told_without_advice_to_run_it(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Code()}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"a\.ckpt.*may be code, and is not loaded") as refused:
        Detector.load(tmp_path / "a.ckpt")
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
