"""Mobile-Former (Chen et al., CVPR 2022) for timm: importing this package registers the models."""
from .mobileformer import DynamicReLU, MobileFormer, checkpoint_filter_fn

__all__ = ['DynamicReLU', 'MobileFormer', 'checkpoint_filter_fn']
