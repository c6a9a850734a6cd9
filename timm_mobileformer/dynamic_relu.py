"""Dynamic ReLU, the activation of Mobile-Former.

Paper: `Dynamic ReLU` - https://arxiv.org/abs/2003.10027, here with two slopes and no intercepts: ``max(a x, b x)``.
"""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['DynamicReLU', 'check_foldable', 'dynamic_relu', 'is_tracing_or_compiling']


def is_tracing_or_compiling() -> bool:
    """Whether a graph is being recorded (compiled, exported, traced), which plain operators serve best."""
    if not torch.jit.is_scripting():
        return torch.compiler.is_compiling() or torch.jit.is_tracing()
    return False


def check_foldable(layer: nn.Module) -> None:
    """Refuse a layer whose weight is kept elsewhere, which would not follow what is folded into it.

    Raises:
        TypeError: The weight is masked, parametrized or quantized, or has an adapter.
    """
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not isinstance(layer.weight, nn.Parameter):
        raise TypeError(
            f'nothing can be folded into a {type(layer).__name__} whose weight is not its own parameter: before '
            'reparameterize_model, remove pruning masks and parametrizations and merge adapters; quantize after it')


class DynamicReLUFunction(torch.autograd.Function):
    """``max(lo * x, hi * x)`` for ``0 < hi >= lo``, as ``prelu(x, lo / hi) * hi``.

    In two passes over the map, the second in place, where two products and a maximum take three: a quarter to a third
    of the time of 16 images on a CPU. Kept for backward are the map and the slopes, where autograd would keep both
    products too: 49 instead of 72 MB an image of 294M. The derivatives are made of differentiable operators.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        return torch._prelu_kernel(x, lo / hi).mul_(hi)  # F.prelu has no slopes of each image

    @staticmethod
    def setup_context(ctx, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, lo, hi = ctx.saved_tensors
        grad_positive = torch.ops.aten.threshold_backward(grad, x, 0)  # of the positions where x > 0
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
        a: One slope of each channel (B, C, 1, 1), greater than 0.
        b: The other slope of each channel (B, C, 1, 1).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, a script cannot read the rest
        # float16 cannot hold lo / hi where hi is close to 0; under autocast, a frozen norm leaves the map in float32
        if x.dtype == a.dtype != torch.float16 and not is_tracing_or_compiling():
            lo, hi = torch.minimum(a, b), torch.maximum(a, b)
            if torch.is_grad_enabled():
                return DynamicReLUFunction.apply(x, lo, hi)
            return DynamicReLUFunction.forward(x, lo, hi)  # saves 2 % of the time of one image
    return torch.maximum(a * x, b * x)


class DynamicReLU(nn.Module):
    """Dynamic ReLU driven by the first token (Sec. 3.2, "Mobile sub-block").

    ``max(a * x, b * x)`` per channel, where a small MLP makes the slopes from the first token:
    ``a = 2 theta_1`` in [0, 2] and ``b = 2 theta_2 - 1`` in [-1, 1], with
    ``theta = hard_sigmoid(W_2 relu(W_1 z_0))``. With ``t = W_2 relu(W_1 z_0)`` these are ``t_1 / 3 + 1`` and
    ``t_2 / 3``, clamped.

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
        # a is at least 0 in the paper; a number that nothing can feel keeps the quotient of the slopes finite
        return dynamic_relu(x, a.clamp(1e-18, 2.), b.clamp(-1., 1.))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold ``t / 3 + 1`` and ``t / 3`` into the second layer: 4 % of the time of one image of 52M."""
        if not self.folded:
            check_foldable(self.fc2)
            self.fc2.weight.div_(3)
            self.fc2.bias.div_(3).chunk(2)[0].add_(1)
            self.folded = True
        return self
