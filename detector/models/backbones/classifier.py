"""Image classifier on a backbone: what the published costs count, and how a backbone is pre-trained."""

from __future__ import annotations

from torch import Tensor, nn

from detector.models.backbones import build_backbone
from detector.models.backbones.contract import Backbone, BackboneOptions, ClassifierOptions
from detector.models.layers import conv_bn


class ImageClassifier(nn.Module):
    """Backbone, conv5 (1x1, BN, activation) where there is one, global average, fully connected layer.

    Source: Ma et al. 2018, table 5; what a family has on top stands in its file of `conf/backbone/` as `classifier`.

    Args:
        backbone: whose c5 is classified.
        num_classes: 1000 for ImageNet.
    """

    def __init__(self, backbone: Backbone, num_classes: int, options: ClassifierOptions) -> None:
        super().__init__()
        self.backbone = backbone
        inputs, outputs = backbone.channels["c5"], options.conv5_channels
        self.conv5 = nn.Identity() if outputs is None else conv_bn(inputs, outputs, activation=options.activation)
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(outputs or inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images (N, 3, H, W) -> class logits (N, num_classes)."""
        x = self.conv5(self.backbone(images)["c5"])
        return self.fc(self.dropout(x.mean((2, 3))))


def build_classifier(options: BackboneOptions, num_classes: int) -> ImageClassifier:
    """The classifier of a backbone's options, with random weights."""
    return ImageClassifier(build_backbone(options), num_classes, options.classifier or ClassifierOptions())
