"""Mobile-Former (Chen et al., CVPR 2022) for timm: importing this package registers the models."""
from typing import Any

from .mobileformer import DynamicReLU, MobileFormer, checkpoint_filter_fn

__all__ = ['DynamicReLU', 'MobileFormer', 'attention_maps', 'checkpoint_filter_fn']


def __getattr__(name: str) -> Any:
    if name == 'attention_maps':  # lazily, the module is a program too
        from .attention import attention_maps
        return attention_maps
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
