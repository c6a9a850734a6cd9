"""Published accuracies on ImageNet-1k."""
from typing import Dict, NamedTuple

from timm_mobileformer.authors import PAPER_TOP1

__all__ = ['PUBLISHED', 'Published']


class Published(NamedTuple):
    """A published top-1 accuracy."""
    top1: float  # in percent
    size: int  # height and width of the images
    source: str


# The Mobile-Formers from the paper, and other models from results/results-imagenet.csv of timm. The weights are the
# default ones, except for mobilenetv4_conv_medium, whose default is for larger images: the best at 224 x 224.
# fastvit_t8 has no weights for 224 x 224.
PUBLISHED: Dict[str, Published] = {
    **{name: Published(top1, 224, 'the paper') for name, top1 in PAPER_TOP1.items()},
    'mobilenetv3_small_100': Published(67.636, 224, 'timm, `lamb_in1k`'),
    'mobilenetv3_large_100': Published(75.784, 224, 'timm, `ra_in1k`'),
    'mobilenetv4_conv_small': Published(73.756, 224, 'timm, `e2400_r224_in1k`'),
    'mobilenetv4_conv_medium': Published(79.092, 224, 'timm, `e500_r224_in1k`'),
    'efficientnet_b0': Published(77.698, 224, 'timm, `ra_in1k`'),
    'efficientvit_b0': Published(71.408, 224, 'timm, `r224_in1k`'),
    'ghostnetv2_100': Published(75.186, 224, 'timm, `in1k`'),
    'repvit_m0_9': Published(78.652, 224, 'timm, `dist_300e_in1k`'),
    'efficientformerv2_s0': Published(76.102, 224, 'timm, `snap_dist_in1k`'),
    'fastvit_t8': Published(76.184, 256, 'timm, `apple_in1k`'),
}
