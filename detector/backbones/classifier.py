"""Image classifier on a backbone: what the published costs count, and how a backbone is pre-trained."""

from __future__ import annotations

from torch import Tensor, nn

from detector.backbones.contract import Backbone


class ImageClassifier(nn.Module):
    """Backbone, conv5 (1x1, BN, ReLU), global average, fully connected layer (Ma et al. 2018, table 5).

    Args:
        backbone: whose c5 is classified.
        conv5_channels: 1024; 2048 for the 2x width.
        num_classes: 1000 for ImageNet.
    """

    def __init__(self, backbone: Backbone, *, conv5_channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.conv5 = nn.Sequential(
            nn.Conv2d(backbone.channels["c5"], conv5_channels, 1, bias=False),
            nn.BatchNorm2d(conv5_channels),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(conv5_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float images (N, 3, H, W) -> class logits (N, num_classes)."""
        x = self.conv5(self.backbone(images)["c5"])
        return self.fc(x.mean((2, 3)))
