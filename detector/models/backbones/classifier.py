"""Image classifier on a backbone: what the published costs count, and how a backbone is pre-trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detector.errors import InputError
from detector.models.backbones import arguments_of, build_backbone
from detector.models.backbones.contract import Backbone
from detector.models.backbones.layers import activation_layer


class ImageClassifier(nn.Module):
    """Backbone, conv5 (1x1, BN, activation) where there is one, global average, fully connected layer.

    Source: Ma et al. 2018, table 5; what a family has on top stands in its file of `conf/backbone/` as `classifier`.

    Args:
        backbone: whose c5 is classified.
        conv5_channels: ShuffleNet V2: 1024, 2048 for the 2x width; None: the average of c5 is classified.
        activation: of conv5, see `activation_layer`.
        dropout: before the fully connected layer.
        num_classes: 1000 for ImageNet.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        conv5_channels: int | None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        inputs = backbone.channels["c5"]
        self.conv5: nn.Module = nn.Identity()
        if conv5_channels is not None:
            self.conv5 = nn.Sequential(
                nn.Conv2d(inputs, conv5_channels, 1, bias=False),
                nn.BatchNorm2d(conv5_channels),
                activation_layer(activation),
            )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(conv5_channels or inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images (N, 3, H, W) -> class logits (N, num_classes)."""
        x = self.conv5(self.backbone(images)["c5"])
        return self.fc(self.dropout(x.mean((2, 3))))


def build_classifier(entry: Mapping[str, Any], num_classes: int) -> ImageClassifier:
    """The classifier that a file of conf/backbone/ describes, with random weights; `classifier: null` is no conv5.

    Raises:
        InputError: the backbone cannot be built, or `classifier` holds what is no argument of ImageClassifier.
    """
    top = entry["classifier"] or {"conv5_channels": None}
    backbone = build_backbone(**arguments_of(entry))
    try:
        return ImageClassifier(backbone, num_classes=num_classes, **top)
    except TypeError as error:
        raise InputError(f"backbone.classifier={top}: {error}. Compare with the files in conf/backbone/.") from error
