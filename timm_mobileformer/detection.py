"""Feature pyramid networks on timm models, as backbones of torchvision's detectors.

    RetinaNet(fpn_backbone('mobileformer_294m', (2, 3, 4), LastLevelP6P7(256, 256), pretrained=True), num_classes=91)
    FasterRCNN(fpn_backbone('mobileformer_294m', (1, 2, 3, 4), LastLevelMaxPool(), pretrained=True), num_classes=91)
"""
from typing import Any, Dict, Optional, Sequence

import timm
import torch
import torch.nn as nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

__all__ = ['fpn_backbone']


class _Backbone(nn.Module):

    def __init__(self, body: nn.Module, fpn: FeaturePyramidNetwork, out_channels: int):
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = out_channels  # read by torchvision's detectors

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        return self.fpn({str(i): m for i, m in enumerate(self.body(x))})


def fpn_backbone(
        model_name: str,
        out_indices: Sequence[int] = (2, 3, 4),
        extra_blocks: Optional[ExtraFPNBlock] = None,
        out_channels: int = 256,
        **kwargs: Any,
) -> nn.Module:
    """Build a feature pyramid network on the feature maps of a timm model.

    The paper's RetinaNet (Sec. 5.2) uses the maps of stride 8, 16 and 32 and two coarser ones, which
    `LastLevelP6P7(out_channels, out_channels)` adds.

    Args:
        model_name: Name of a model that supports `features_only`.
        out_indices: Indices of the feature maps; 0 to 4 have stride 2 to 32.
        extra_blocks: Block that adds coarser maps: torchvision's `LastLevelP6P7` or `LastLevelMaxPool`.
        out_channels: Number of channels of every map of the pyramid.
        **kwargs: Further arguments of `timm.create_model`, such as `pretrained` or `drop_path_rate`.

    Returns:
        A module that maps images (B, 3, H, W) to an ordered dictionary of maps (B, out_channels, H / stride,
        W / stride), the finest first, with the keys '0', '1', ... and those of the extra blocks.
    """
    body: Any = timm.create_model(model_name, features_only=True, out_indices=out_indices, **kwargs)
    fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, extra_blocks)
    return _Backbone(body, fpn, out_channels)
