"""What a training step changes and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from detector.data.collate import Batch
from detector.data.preprocess import Preprocessing
from detector.errors import InputError
from detector.inference.detector import Detector
from detector.inference.operating_point import OperatingPoint
from detector.models.build import NetworkOptions
from detector.models.fuse import fuse
from detector.training.run_options import FreezeOptions
from detector.training.schedule import OptimizerOptions, ScheduleOptions, build_optimizer
from detector.training.task import DetectionTask, worth
from detector.training.trainer import NOISE

SGD = OptimizerOptions(lr=0.1, base_batch=None, weight_decay=0.1, lr_scales=None)
STAGES = {"conv1": 1, "stage2": 2, "stage3": 3, "stage4": 4}


def changed_by_a_step(task: DetectionTask, batch: Batch) -> dict[str, bool]:
    """Each tensor of the network, and whether two steps in training mode change it."""
    task.train()
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    optimizer = build_optimizer(task.network, SGD, 1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack(list(task.network(batch).values())).sum().backward()
        optimizer.step()
    return {name: not torch.equal(value, before[name]) for name, value in task.network.state_dict().items()}


def other(spec: dict[str, Any]) -> Detector:
    torch.manual_seed(1)
    return Detector(NetworkOptions.parse(spec), ("a", "b", "c"), Preprocessing(short_side=64, long_side=96))


@pytest.fixture
def batch(make_batch: Callable[..., Batch]) -> Batch:
    return make_batch([[(8, 8, 40, 40, 0), (50, 20, 90, 60, 2)], [(20, 10, 80, 50, 1)]])


@pytest.mark.parametrize("stages", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_freezing(small_detector: Detector, batch: Batch, stages: int, batch_norm: bool) -> None:
    task = DetectionTask(small_detector, freeze=FreezeOptions(stages=stages, batch_norm=batch_norm))
    norms = {
        f"{name}.{part}"
        for name, module in task.network.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    for name, changed in changed_by_a_step(task, batch).items():
        part, stage = (*name.split("."), "")[:2]
        frozen = part == "backbone" and (STAGES[stage] <= stages or (batch_norm and name in norms))
        assert changed != frozen, name


def test_extra_layers_of_v2star_are_never_frozen(small_spec: dict[str, Any], batch: Batch) -> None:
    """They begin as the identity: frozen there, V2* could not differ from V2."""
    small_spec["backbone"]["extra_depthwise"] = True
    task = DetectionTask(other(small_spec), freeze=FreezeOptions(stages=4, batch_norm=True))
    learnt = {name: changed for name, changed in changed_by_a_step(task, batch).items() if ".extra." in name}
    parameters = dict(task.network.named_parameters())
    assert any(name.startswith("backbone.stage2.") for name in learnt)
    assert all(changed for name, changed in learnt.items() if name in parameters)
    free = [name for name, value in parameters.items() if name.startswith("backbone.") and value.requires_grad]
    assert free == [name for name in learnt if name in parameters]


def test_evaluation_in_between_does_not_thaw(small_detector: Detector, batch: Batch) -> None:
    task = DetectionTask(small_detector, freeze=FreezeOptions(stages=0))
    task.eval()
    task.train()
    training = {name for name, module in task.network.backbone.named_modules() if module.training}
    assert not any(isinstance(task.network.backbone.get_submodule(name), torch.nn.BatchNorm2d) for name in training)
    assert "stage2" in training


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`", *(f"ignore:{message}" for message in NOISE))
def test_lightning_trains_the_identities_of_v2star_as_such(small_spec: dict[str, Any], batch: Batch) -> None:
    """With statistics of the batch a pretrained V2 would be another network from the first step on."""
    small_spec["backbone"]["extra_depthwise"] = True
    task = DetectionTask(other(small_spec), optimizer=SGD, schedule=ScheduleOptions())
    task.configure_optimizers = lambda: build_optimizer(task.network, SGD, 1)  # type: ignore[method-assign]
    extra = {name: value.clone() for name, value in task.network.named_buffers() if ".extra." in name}
    assert extra
    fit(task, batch)
    buffers = dict(task.network.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in extra.items())
    moved = [name for name in buffers if name.endswith("running_mean") and buffers[name].any()]
    assert moved, "the others did learn"


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`", *(f"ignore:{message}" for message in NOISE))
@pytest.mark.parametrize("stages", [0, 4])
def test_lightning_does_not_thaw(stages: int, small_spec: dict[str, Any], batch: Batch) -> None:
    """With a backbone whose normalisation is not computed with its convolutions: in training mode it would count."""
    small_spec["backbone"] = {"name": "torchvision", "model": "resnet18"}
    task = DetectionTask(
        other(small_spec),
        freeze=FreezeOptions(stages=stages, batch_norm=stages == 0),
        optimizer=SGD,
        schedule=ScheduleOptions(),
    )
    task.configure_optimizers = lambda: build_optimizer(task.network, SGD, 1)  # type: ignore[method-assign]
    buffers = {name: value.clone() for name, value in task.network.backbone.named_buffers()}
    assert len(buffers) == 60
    fit(task, batch)
    assert all(torch.equal(value, buffers[name]) for name, value in task.network.backbone.named_buffers())


def fit(task: DetectionTask, batch: Batch) -> None:
    """Two steps under Lightning."""
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=2, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader([batch, batch], batch_size=None))
    assert trainer.global_step == 2


def test_a_loss_that_is_not_finite_names_images_and_remedy(small_detector: Detector, batch: Batch) -> None:
    task = DetectionTask(small_detector).train()
    with torch.no_grad():
        small_detector.network.head.class_logits.bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"step 0 .*head_class nan.* images \[0, 1\].*optimizer\.lr.*last\.ckpt"):
        task.training_step(batch, 0)


def test_a_checkpoint_says_what_it_is(small_detector: Detector) -> None:
    task = DetectionTask(small_detector)
    task.metrics = {"AP": 0.25, "APl": None, "per_class": {"cat": 0.5}}
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    about = checkpoint["detector"]
    assert about["provenance"] == {"epoch": 0, "step": 0, "metrics": {"AP": 0.25, "APl": None}}
    assert about["class_names"] == ["cat", "dog", "bird"]
    assert "config" not in small_detector.provenance


def test_frozen_normalisation_is_computed_with_its_convolution(small_spec: dict[str, Any]) -> None:
    """In float64: the maps and gradients of layer by layer, the same checkpoint; and it can be fused."""
    folded = other(small_spec).network.backbone.double().train()
    norms = [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 1.5)
    plain = copy.deepcopy(folded)
    assert folded.freeze(0, batch_norm=True) == set(norms)
    folded = copy.deepcopy(folded)  # as an average of the weights has it
    calls = []
    for network in (folded, plain):
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().requires_grad_(False)
            if type(module) is torch.nn.BatchNorm2d:
                module.register_forward_hook(lambda *_, network=network: calls.append(network))
    images, results = torch.rand(2, 3, 64, 64, dtype=torch.float64), []
    for network in (folded, plain):
        maps = network(images)
        torch.stack([value.square().mean() for value in maps.values()]).sum().backward()
        results.append(maps | {name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert calls == [plain] * len(norms)
    results += [fuse(network)(images) for network in (folded, plain)]
    for one, another in (results[:2], results[2:]):
        assert one.keys() == another.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, another[name], msg=name)
    assert list(folded.state_dict()) == list(plain.state_dict())


def test_what_scores_are_worth_is_said_in_words() -> None:
    assert worth(OperatingPoint(), ["cat", "dog"]) == "scores: as the network gives them"
    # By hand: odds of 1 and 9, squared, times e**0.2: 1.2214 / 2.2214 and 98.93 / 99.93.
    point = OperatingPoint(calibration=(2.0, 0.2), thresholds=(0.4, 0.25))
    assert worth(point, ["cat", "dog"]) == (
        "scores: calibrated; 0.5 now reads 0.55, 0.9 now reads 0.99; "
        "score_threshold=auto shows a class from 0.25 (dog) to 0.40 (cat) on"
    )
