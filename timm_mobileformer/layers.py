"""Building blocks shared by all parts of the network, and helpers for reparameterization and tracing."""
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

__all__ = [
    'ChannelShuffle', 'ConvNorm', 'DepthwiseConv2d', 'LinearNorm', 'check_foldable', 'depthwise_conv2d',
    'is_in_torch_compile', 'is_tracing_or_compiling']

_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # torch 2.6 cannot tell them apart


def is_tracing_or_compiling() -> bool:
    """Whether the model is being compiled, exported or traced, for which plain operators are best."""
    if not torch.jit.is_scripting():
        return torch.compiler.is_compiling() or torch.jit.is_tracing()
    return False


def is_in_torch_compile() -> bool:
    """Whether `torch.compile` compiles the model, and nothing exports it."""
    if not torch.jit.is_scripting():
        return torch.compiler.is_compiling() and not _is_exporting()
    return False


def check_foldable(layer: nn.Module) -> None:
    """Check that a layer holds its own weight, so that another layer can be folded into it.

    Raises:
        TypeError: The weight is masked, parametrized or quantized, or the layer has an adapter.
    """
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not isinstance(layer.weight, nn.Parameter):
        raise TypeError(
            f'nothing can be folded into a {type(layer).__name__} whose weight is not its own parameter: before '
            'reparameterize_model, remove pruning masks and parametrizations and merge adapters; quantize after it')


@torch.fx.wrap
def depthwise_conv2d(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        stride: Tuple[int, int],
        padding: Tuple[int, int],
        dilation: Tuple[int, int],
        groups: int,
) -> torch.Tensor:
    """Depthwise convolution of a map (B, groups, H, W) with several output channels per input channel.

    In 16 bits, each input channel is repeated first, once for each of its output channels, because cuDNN would run one
    kernel per input channel. This makes inference of 294m 1.7 times and training 1.9 times as fast on an H200 (256
    images, autocast to float16, channels-last). In autocast for CUDA, `x` may be in float32: timm's frozen BatchNorm
    returns it.
    """
    in_16_bits = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled()
    if in_16_bits and weight.shape[0] > groups:
        repeats = weight.shape[0] // groups
        groups = weight.shape[0]
        if x.is_contiguous():
            x = x.repeat_interleave(repeats, dim=1)
        else:  # channels-last, and it stays so
            x = x.permute(0, 2, 3, 1).repeat_interleave(repeats, dim=3).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with several output channels per input channel; see `depthwise_conv2d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return depthwise_conv2d(  # the types of nn.Conv2d are wider
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class ConvNorm(nn.Sequential):
    """A convolution without bias, padded to keep the size of the map at stride 1, followed by a BatchNorm."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            dilation: int = 1,
            groups: int = 1,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        layer = DepthwiseConv2d if 1 < groups == in_chs < out_chs else nn.Conv2d
        self.conv = layer(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Fold the BatchNorm into the convolution; raise a TypeError if `check_foldable` does."""
        check_foldable(self.conv)
        conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        for parameter in conv.parameters():  # fuse_conv_bn_eval leaves the new bias frozen
            parameter.requires_grad_(self.conv.weight.requires_grad)
        return conv


class LinearNorm(nn.Sequential):
    """A linear layer followed by a BatchNorm."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, **dd)
        self.bn = nn.BatchNorm1d(out_features, **dd)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """Fold the BatchNorm into the linear layer; raise a TypeError if `check_foldable` does."""
        check_foldable(self.linear)
        return fuse_linear_bn_eval(self.linear.eval(), self.bn.eval())


class ChannelShuffle(nn.Module):
    """Channel shuffle (ShuffleNet), which follows the grouped convolutions of Mobile-Former-26M."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        return x.view(B, self.groups, C // self.groups, H, W).transpose(1, 2).reshape(B, C, H, W)
