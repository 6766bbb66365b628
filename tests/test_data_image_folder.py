"""Class folders and views, against torchvision's own on Pillow images, and against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from classified_data import CLASSES, write_classified_data
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from detector.data.image_folder import (
    ImageFolder,
    PretrainAugment,
    PretrainInput,
    check_same_classes,
    collate_images,
    draws,
    eval_view,
    train_view,
)
from detector.errors import InputError


def unchanged(image: Tensor) -> Tensor:
    return image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_classified_data(tmp_path / "data")


def random_view() -> Callable[[Tensor], Tensor]:
    return train_view(32, PretrainAugment(scale=(0.2, 1.0), flip=0.5, colour=0.4))


def test_the_same_samples_as_torchvision(root: Path) -> None:
    (root / "train" / "bee" / "deeper").mkdir()
    (root / "train" / "bee" / "0.png").rename(root / "train" / "bee" / "deeper" / "x.PNG")
    ours, theirs = ImageFolder(root / "train", unchanged), torchvision.datasets.ImageFolder(str(root / "train"))
    assert ours.classes == theirs.classes == list(CLASSES)
    assert ours.samples == theirs.samples
    for i in range(len(theirs)):
        image, label, path = ours[i]
        picture, expected = theirs[i]
        assert (label, path) == (expected, theirs.samples[i][0])
        assert image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture))


def test_hidden_files_and_other_files_are_left_out(root: Path) -> None:
    for path in ("ant/.0.png", "ant/notes.txt", ".cache/0.png"):
        (root / "train" / path).parent.mkdir(exist_ok=True)
        (root / "train" / path).write_bytes(b"no picture")
    folder = ImageFolder(root / "train", unchanged)
    assert folder.classes == list(CLASSES)
    assert len(folder) == 12


def test_images_are_turned_as_exif_says(root: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:, 0] = 255  # the right half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: red below
    Image.fromarray(pixels).save(root / "train/ant/0.png", exif=exif)
    image, _, _ = ImageFolder(root / "train", unchanged)[0]
    assert image.shape == (3, 16, 8)
    assert image[0, 8:].min() == 255
    assert image[0, :8].max() == 0


def test_the_view_for_scoring_is_torchvisions() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((300, 400), (500, 280), (100, 90)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height))
        theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(coarse)
        ours = eval_view(PretrainInput(size=224, resize=256))(torch.from_numpy(np.array(coarse)).permute(2, 0, 1))
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
        assert difference.max() <= 1, "rounding of an antialiased resize"


def test_a_training_view_without_changes_is_the_image() -> None:
    image = torch.arange(3 * 16 * 16, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 16, 16)
    assert torch.equal(train_view(16, PretrainAugment(scale=(1, 1), flip=0, colour=0))(image), image)
    assert torch.equal(train_view(16, PretrainAugment(scale=(1, 1), flip=1, colour=0))(image), image.flip(2))


def test_the_share_of_the_area_that_is_seen() -> None:
    """On a ramp the range of values tells how wide, and how high, the part is that was cut out."""
    ramp = torch.arange(200).expand(200, 200)
    image = torch.stack([ramp, ramp.T, ramp]).to(torch.uint8)
    view, shares, ratios = train_view(200, PretrainAugment(scale=(0.3, 0.5), flip=0.5, colour=0)), [], []
    with draws((0,)):
        for _ in range(100):
            x, y, _ = view(image).flatten(1).double()
            width, height = (x.max() - x.min() + 1).item(), (y.max() - y.min() + 1).item()
            shares.append(width * height / 200**2)
            ratios.append(width / height)
    assert 0.28 < min(shares) < 0.33
    assert 0.47 < max(shares) < 0.52
    assert 0.72 < min(ratios) < 0.85
    assert 1.18 < max(ratios) < 1.37


def test_colours_change_by_so_much() -> None:
    """Of an even grey, contrast and saturation leave everything, and brightness multiplies."""
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    view = train_view(8, PretrainAugment(scale=(1, 1), flip=0, colour=0.4))
    values = []
    with draws((0,)):
        for _ in range(200):
            seen = view(grey)
            assert seen.min() == seen.max()
            values.append(int(seen.max()))
    assert 59 <= min(values) < 66
    assert 134 < max(values) <= 140


def test_a_draw_follows_from_seed_epoch_and_place(root: Path) -> None:
    folder, twin = (ImageFolder(root / "train", random_view(), seed=3) for _ in range(2))
    first = folder[2, 5][0]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    again = twin[2, 5][0]
    assert torch.equal(first, again)
    for other in (folder[2, 6][0], folder[2][0], ImageFolder(root / "train", random_view(), seed=4)[2, 5][0]):
        assert not torch.equal(first, other)
    torch.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_random_numbers_go_on_as_if_nothing_had_been_drawn(root: Path) -> None:
    folder = ImageFolder(root / "train", random_view())
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    seen = [torch.rand(1), folder[0, 1], torch.rand(1)]
    assert torch.equal(torch.cat([seen[0], seen[2]]), expected)  # type: ignore[list-item]


def test_loader_processes_change_nothing(root: Path) -> None:
    folder = ImageFolder(root / "train", random_view())
    keys = [(index, 1) for index in range(12)]
    batches = [
        list(DataLoader(folder, 4, sampler=keys, num_workers=workers, collate_fn=collate_images)) for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.paths == other.paths


def test_batches() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = collate_images([(images[0], 2, "a"), (images[1], 0, "b")])
    assert torch.equal(batch.images, images)
    assert batch.labels.tolist() == [2, 0]
    assert batch.labels.dtype == torch.int64
    assert batch.paths == ("a", "b")
    empty = collate_images([])
    assert (len(empty.images), len(empty.labels), empty.paths) == (0, 0, ())
    assert empty.labels.dtype == torch.int64


def test_what_is_wrong_with_folders_is_said(root: Path) -> None:
    with pytest.raises(InputError, match=r"No folder .*test here.*DIR/train/CLASS/ and DIR/val/CLASS/"):
        ImageFolder(root / "test", unchanged)
    with pytest.raises(InputError, match=r"ant: 0 class folders \(none\), but a classifier needs"):
        ImageFolder(root / "train" / "ant", unchanged)
    (root / "one" / "ant").mkdir(parents=True)
    with pytest.raises(InputError, match=r"one: 1 class folders \(ant\), but .* two or more"):
        ImageFolder(root / "one", unchanged)
    (root / "one" / "bee").mkdir()
    with pytest.raises(InputError, match=r"ant: no image in this class folder"):
        ImageFolder(root / "one", unchanged)


def test_the_first_class_that_differs_is_named(root: Path) -> None:
    train = ImageFolder(root / "train", unchanged)
    check_same_classes(train, ImageFolder(root / "val", unchanged))
    (root / "val/bee").rename(root / "val/wasp")
    with pytest.raises(InputError, match=r"'bee' is a folder of \S+train, but not of \S+val\."):
        check_same_classes(train, ImageFolder(root / "val", unchanged))
    (root / "train/ant").rename(root / "train/wasp")
    with pytest.raises(InputError, match=r"'ant' is a folder of \S+val, but not of \S+train\."):
        check_same_classes(ImageFolder(root / "train", unchanged), ImageFolder(root / "val", unchanged))


def test_a_broken_image_is_named(root: Path) -> None:
    path = root / "train/bee/1.png"
    path.write_bytes(path.read_bytes()[:60])
    folder = ImageFolder(root / "train", unchanged)
    with pytest.raises(InputError, match=r"bee/1\.png: "):
        folder[5]


@pytest.mark.parametrize("scale", [[0.0, 1.0], [0.6, 0.5], [0.5, 1.5]])
def test_impossible_shares_are_refused(scale: list[float]) -> None:
    with pytest.raises(InputError, match=r"augment\.scale="):
        PretrainAugment.parse({"scale": scale}, "augment")


def test_a_square_larger_than_the_image_is_refused() -> None:
    with pytest.raises(InputError, match=r"input\.resize=200 is less than input\.size=224"):
        PretrainInput.parse({"size": 224, "resize": 200}, "input")
