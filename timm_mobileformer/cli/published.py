"""Published accuracies on ImageNet-1k."""
from typing import Dict, NamedTuple, Optional, Tuple

from timm_mobileformer.authors import PAPER_TOP1

__all__ = ['PEERS', 'Published', 'published']

# Pretrained tag, image size and ImageNet-1k top-1 in percent of timm models, from results/results-imagenet.csv of
# timm. The tags are the default ones, except for mobilenetv4_conv_medium, whose default is for larger images: the
# best at 224 x 224. fastvit_t8 has no weights for 224 x 224.
PEERS: Dict[str, Tuple[str, int, float]] = {
    'mobilenetv3_small_100': ('lamb_in1k', 224, 67.636),
    'mobilenetv3_large_100': ('ra_in1k', 224, 75.784),
    'mobilenetv4_conv_small': ('e2400_r224_in1k', 224, 73.756),
    'mobilenetv4_conv_medium': ('e500_r224_in1k', 224, 79.092),
    'efficientnet_b0': ('ra_in1k', 224, 77.698),
    'efficientvit_b0': ('r224_in1k', 224, 71.408),
    'ghostnetv2_100': ('in1k', 224, 75.186),
    'repvit_m0_9': ('dist_300e_in1k', 224, 78.652),
    'efficientformerv2_s0': ('snap_dist_in1k', 224, 76.102),
    'fastvit_t8': ('apple_in1k', 256, 76.184),
}


class Published(NamedTuple):
    """A published top-1 accuracy."""
    top1: float  # in percent
    size: int  # height and width of the images
    source: str


def published(name: str) -> Optional[Published]:
    """Return the published accuracy of a model, None if there is none."""
    if name in PAPER_TOP1:
        return Published(PAPER_TOP1[name], 224, 'the paper')
    if name in PEERS:
        tag, size, top1 = PEERS[name]
        return Published(top1, size, f'timm, `{tag}`')
    return None
