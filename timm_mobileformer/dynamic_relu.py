"""Dynamic ReLU, the activation function of Mobile-Former.

Paper: `Dynamic ReLU` - https://arxiv.org/abs/2003.10027, here with two slopes and no intercepts: ``max(a x, b x)``.
"""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import check_foldable, is_tracing_or_compiling

__all__ = ['DynamicReLU', 'dynamic_relu']


class DynamicReLUFunction(torch.autograd.Function):
    """``max(lo * x, hi * x)`` for ``hi > 0`` and ``hi >= lo``, computed as ``prelu(x, lo / hi) * hi``.

    This takes two passes over the map, the second in place, instead of three for two products and a maximum. Only the
    map and the slopes are saved for the backward pass, whereas autograd would save both products too. The derivatives
    consist of differentiable operators, so that higher derivatives are available.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        return torch._prelu_kernel(x, lo / hi).mul_(hi)  # F.prelu does not take slopes per image

    @staticmethod
    def setup_context(ctx, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, lo, hi = ctx.saved_tensors
        grad_positive = torch.ops.aten.threshold_backward(grad, x, 0)  # 0 unless x > 0
        grad_hi = (grad_positive * x).sum((2, 3), keepdim=True)
        grad_lo = (grad * x).sum((2, 3), keepdim=True) - grad_hi
        return torch.addcmul(grad * lo, grad_positive, hi - lo), grad_lo, grad_hi

    @staticmethod
    def jvp(ctx, dx: torch.Tensor, dlo: torch.Tensor, dhi: torch.Tensor) -> torch.Tensor:
        x, lo, hi = ctx.saved_tensors
        return torch.where(x > 0, dhi * x + hi * dx, dlo * x + lo * dx)


@torch.fx.wrap
def dynamic_relu(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``max(a * x, b * x)``, per channel and per image.

    Args:
        x: Map (B, C, H, W).
        a: Slopes (B, C, 1, 1), greater than 0.
        b: Slopes (B, C, 1, 1).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript cannot compile the rest
        # Not in float16, where lo / hi overflows for hi close to 0, nor if autocast makes the dtypes differ
        if x.dtype == a.dtype != torch.float16 and not is_tracing_or_compiling():
            lo, hi = torch.minimum(a, b), torch.maximum(a, b)
            if torch.is_grad_enabled():
                return DynamicReLUFunction.apply(x, lo, hi)
            return DynamicReLUFunction.forward(x, lo, hi)
    return torch.maximum(a * x, b * x)


class DynamicReLU(nn.Module):
    """Dynamic ReLU driven by the first token (Sec. 3.2, "Mobile sub-block").

    ``max(a * x, b * x)`` per channel and image. A small MLP computes the slopes from the first token:
    ``a = 2 theta_1`` in [0, 2] and ``b = 2 theta_2 - 1`` in [-1, 1] with ``theta = hard_sigmoid(t)`` and
    ``t = W_2 relu(W_1 z_0)``. This is equal to ``a = t_1 / 3 + 1`` and ``b = t_2 / 3``, clamped to these ranges.

    Args:
        chs: Channels of the map, C.
        token_dim: Width of a token, d.
    """

    def __init__(self, chs: int, token_dim: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.folded = False
        self.fc1 = nn.Linear(token_dim, token_dim // 4, **dd)
        self.fc2 = nn.Linear(token_dim // 4, 2 * chs, **dd)

    def forward(self, x: torch.Tensor, z0: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) and first token (B, d) to a map (B, C, H, W)."""
        a, b = self.fc2(F.relu(self.fc1(z0))).unsqueeze(2).unsqueeze(3).chunk(2, dim=1)
        if not self.folded:
            a, b = a / 3 + 1, b / 3
        # a is clamped to 1e-18 instead of 0 so that lo / hi stays finite
        return dynamic_relu(x, a.clamp(1e-18, 2.), b.clamp(-1., 1.))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold ``t_1 / 3 + 1`` and ``t_2 / 3`` into the second linear layer."""
        if not self.folded:
            check_foldable(self.fc2)
            self.fc2.weight.div_(3)
            self.fc2.bias.div_(3).chunk(2)[0].add_(1)
            self.folded = True
        return self
