"""Mobile-Former

Paper: `Mobile-Former: Bridging MobileNet and Transformer` - https://arxiv.org/abs/2108.05895

Original code: https://github.com/AAboys/MobileFormer

@inproceedings{chen2022mobileformer,
  author={Chen, Yinpeng and Dai, Xiyang and Chen, Dongdong and Liu, Mengchen and Dong, Xiaoyi and Yuan, Lu and
          Liu, Zicheng},
  title={Mobile-Former: Bridging MobileNet and Transformer},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages={5270--5279},
  year={2022}
}

Two streams run side by side: a local feature map ``x: (B, C, H, W)`` and a few global tokens ``z: (B, M, d)``. Every
block takes both through the paper's four parts, in this order (Fig. 3): Mobile->Former, Former, Mobile, Mobile<-Former.
Where the paper and the authors' program differ, the program decides, so that their checkpoints load.
"""
import logging
import os
from functools import partial
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SelectAdaptivePool2d, get_device_dtype, use_fused_attn
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    clean_state_dict,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from .pretrained import explain_missing_weights

__all__ = ['DynamicReLU', 'MobileFormer', 'checkpoint_filter_fn']

_logger = logging.getLogger(__name__)


def check_foldable(*layers: nn.Module) -> None:
    """Refuse layers whose weights are kept elsewhere, which would not follow what is folded into them.

    Raises:
        TypeError: A weight is masked, parametrized or quantized, or has an adapter.
    """
    for layer in layers:
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not isinstance(layer.weight, nn.Parameter):
            raise TypeError(
                f'nothing can be folded into a {type(layer).__name__} whose weight is not its own parameter: before '
                'reparameterize_model, remove pruning masks and parametrizations and merge adapters; quantize after it')


class ConvNorm(nn.Sequential):
    """A convolution without bias and its BatchNorm; 'same' padding for odd kernels."""

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
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        check_foldable(self.conv)
        conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        for parameter in conv.parameters():  # PyTorch's function leaves the new bias frozen
            parameter.requires_grad_(self.conv.weight.requires_grad)
        return conv


class LinearNorm(nn.Sequential):
    """A linear layer and its BatchNorm."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, **dd)
        self.bn = nn.BatchNorm1d(out_features, **dd)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        check_foldable(self.linear)
        return fuse_linear_bn_eval(self.linear.eval(), self.bn.eval())


def _is_exporting() -> bool:
    """Whether a graph is being recorded for another runtime, for which plain operators serve better than fused ones."""
    if not torch.jit.is_scripting():
        return torch.jit.is_tracing() or torch.compiler.is_exporting()
    return False


class ChannelShuffle(nn.ChannelShuffle):
    """`nn.ChannelShuffle` that other runtimes take, which have no operator for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _is_exporting():
            B, C, H, W = x.shape
            return x.view(B, self.groups, C // self.groups, H, W).transpose(1, 2).reshape(B, C, H, W)
        return F.channel_shuffle(x, self.groups)


def channel_shuffle(groups: int, enabled: bool) -> nn.Module:
    """Interleave the channels of `groups` groups, which only the grouped variant (26m) needs."""
    return ChannelShuffle(groups) if enabled else nn.Identity()


class ReLU6Function(torch.autograd.Function):
    """ReLU6 that keeps for backward its result, which the next convolution keeps too, instead of its input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(x, 0., 6.)

    @staticmethod
    def setup_context(ctx, inputs: Tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.hardtanh_backward(grad, ctx.saved_tensors[0], 0., 6.)

    jvp = backward  # each number has a slope of its own


@torch.fx.wrap
def relu6(x: torch.Tensor) -> torch.Tensor:
    """ReLU6, in place where nothing is kept for backward."""
    if not torch.jit.is_scripting():  # noqa: SIM102, a script cannot read the rest
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return ReLU6Function.apply(x)
    return F.hardtanh(x, 0., 6., inplace=True)


class ReLU6(nn.ReLU6):
    """`nn.ReLU6` that is light on memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu6(x)


class DynamicReLUFunction(torch.autograd.Function):
    """``max(lo * x, hi * x)`` for ``0 < hi >= lo``: ``prelu(x, lo / hi)`` in one pass, then a scaling in place.

    Kept for backward are the input and the slopes alone; autograd would also keep both products. The backward pass is
    made of differentiable operators, so second derivatives are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        return torch._prelu_kernel(x, ratio).mul_(hi)

    @staticmethod
    def setup_context(ctx, inputs: Tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        x, lo, hi = ctx.saved_tensors
        grad_positive = torch.ops.aten.threshold_backward(grad, x, 0)  # of the positions where x > 0
        grad_hi = (grad_positive * x).sum((2, 3), keepdim=True)
        grad_lo = (grad * x).sum((2, 3), keepdim=True) - grad_hi
        return torch.addcmul(grad * lo, grad_positive, hi - lo), grad_lo, grad_hi, None

    @staticmethod
    def jvp(ctx, dx: torch.Tensor, dlo: torch.Tensor, dhi: torch.Tensor, _: None) -> torch.Tensor:
        x, lo, hi = ctx.saved_tensors
        return torch.where(x > 0, dhi * x + hi * dx, dlo * x + lo * dx)


@torch.fx.wrap
def dynamic_relu(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """The dynamic ReLU of given slopes: ``max(lo * x, hi * x)``, per channel and per image.

    Args:
        x: Map (B, C, H, W).
        lo: The smaller slope of each channel (B, C, 1, 1).
        hi: The larger slope of each channel (B, C, 1, 1), greater than 0.
        ratio: ``lo / hi``.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102, a script cannot read the rest
        # float16 cannot hold the ratio where hi is close to 0; under autocast, a frozen norm leaves the map in float32
        if x.dtype == lo.dtype != torch.float16 and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            if torch.is_grad_enabled():
                return DynamicReLUFunction.apply(x, lo, hi, ratio)
            return DynamicReLUFunction.forward(x, lo, hi, ratio)
    return torch.maximum(lo * x, hi * x)


@torch.fx.wrap
def limit_slopes(t: torch.Tensor, limits: torch.Tensor, folded: bool) -> List[torch.Tensor]:
    """Clamp what the MLPs of `DynamicReLU` answer.

    Args:
        t: Answers (..., 2, C, 1, 1).
        limits: Lower limit, centre and upper limit of both slopes (3, 2).
        folded: Whether ``t / 3 + centre`` is done.

    Returns:
        Smaller slope, larger slope and their ratio, each (..., C, 1, 1).
    """
    if limits.dtype != t.dtype:  # autocast
        limits = limits.to(t.dtype)
    lower, centre, upper = limits.view(3, 2, 1, 1, 1).unbind(0)
    if not folded:
        t = torch.add(centre, t, alpha=1 / 3)
    t = torch.clamp(t, lower, upper)
    if t.requires_grad:  # older releases of PyTorch have no derivative of aminmax
        t1, t2 = t.unbind(-4)
        lo, hi = torch.minimum(t1, t2), torch.maximum(t1, t2)
    else:
        lo, hi = torch.aminmax(t, dim=-4)
    return [lo, hi, (lo / hi).detach()]


class SlopesLinear(nn.Module):
    """The second linear layers of both MLPs of `DynamicReLU`, their rows in one tensor.

    It is no `nn.Linear`, so that what replaces or rewrites those (quantizers, adapters) leaves it alone.

    Args:
        in_features: Width of an input.
        chs: Channels under the first and under the second dynamic ReLU, with two slopes each.
    """

    def __init__(self, in_features: int, chs: Tuple[int, int], device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_features = in_features
        self.chs = chs
        self.folded = False
        self.weight = nn.Parameter(torch.empty(2 * sum(chs), in_features, **dd))
        self.bias = nn.Parameter(torch.empty(2 * sum(chs), **dd))

    def forward(self, h: torch.Tensor) -> List[torch.Tensor]:
        """Both inputs side by side (B, 2 * in_features) to (B, 2 C_1) and (B, 2 C_2), or to one tensor (2, B, 2 C)."""
        n1, n2 = self.chs
        if (self.folded or n1 == n2) and not _is_exporting():  # one batched product
            weight: torch.Tensor = self.weight
            bias: torch.Tensor = self.bias
            if not self.folded:
                weight, bias = weight.view(2, -1, self.in_features).transpose(1, 2), bias.view(2, 1, -1)
            return [torch.baddbmm(bias, h.view(-1, 2, self.in_features).transpose(0, 1), weight)]
        h1, h2 = h.chunk(2, 1)
        (weight1, bias1), (weight2, bias2) = self.layers()
        return [F.linear(h1, weight1, bias1), F.linear(h2, weight2, bias2)]

    def layers(self) -> Tuple[Tuple[torch.Tensor, torch.Tensor], Tuple[torch.Tensor, torch.Tensor]]:
        """Weight (2 C, in_features) and bias (2 C) of each layer."""
        n1, n2 = self.chs
        weight: torch.Tensor = self.weight
        bias: torch.Tensor = self.bias
        if self.folded:  # without the padding
            weight, bias = weight.view(2, self.in_features, 2, -1), bias.view(2, 2, -1)
            return (
                (weight[0, :, :, :n1].flatten(1).t(), bias[0, :, :n1].flatten()),
                (weight[1, :, :, :n2].flatten(1).t(), bias[1, :, :n2].flatten()),
            )
        return (weight[:2 * n1], bias[:2 * n1]), (weight[2 * n1:], bias[2 * n1:])

    def fold(self, centre: torch.Tensor) -> None:
        """Fold ``t / 3 + centre`` in, and pad the narrower layer to the width of the other for one batched product."""
        n = max(self.chs)
        weight, bias = self.weight.new_zeros(2, self.in_features, 2, n), self.bias.new_zeros(2, 1, 2, n)
        for i, (w, b) in enumerate(self.layers()):
            c = self.chs[i]
            weight[i, :, :, :c] = w.view(2, c, -1).permute(2, 0, 1) / 3
            bias[i, 0, :, :c] = b.view(2, c) / 3 + centre.view(2, 1)
        self.weight = nn.Parameter(weight.flatten(2), self.weight.requires_grad)
        self.bias = nn.Parameter(bias.flatten(2), self.bias.requires_grad)
        self.folded = True


def _limits_follow_weights(module: Any, incompatible_keys: Any) -> None:
    """Leave the meta device with the weights, after `load_state_dict(assign=True)`."""
    if module.limits.device != module.theta.weight.device:
        module.init_non_persistent_buffers()


class DynamicReLU(nn.Module):
    """The slopes of the two dynamic ReLUs of Mobile, driven by the first token (Sec. 3.2, "Mobile sub-block").

    A small MLP for each gives the two slopes of every channel, ``2 * theta_1`` in [0, 2] and ``2 * theta_2 - 1`` in
    [-1, 1], where ``theta = hard_sigmoid(W_2 relu(W_1 z_0))``; in other words ``t / 3 + 1`` and ``t / 3``, clamped.
    Both MLPs read the same token, so their first layers are one linear layer here.

    Args:
        token_dim: Width of a token, d.
        chs: Channels under the first and under the second dynamic ReLU.
    """

    limits: torch.Tensor

    def __init__(self, token_dim: int, chs: Tuple[int, int], device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(token_dim, 2 * (token_dim // 4), **dd)
        self.theta = SlopesLinear(token_dim // 4, chs, **dd)
        self.register_buffer('limits', torch.empty(3, 2, **dd), persistent=False)
        self.init_non_persistent_buffers()
        self.register_load_state_dict_post_hook(_limits_follow_weights)

    def init_non_persistent_buffers(self) -> None:
        """Set the lower limit, centre and upper limit of both slopes; a name that transformers calls.

        The lower limit of the first is 0 in the paper; a number that nothing can feel keeps ``lo / hi`` finite.
        """
        limits = [[1e-18, -1.], [1., 0.], [2., 1.]]
        self.limits = torch.tensor(limits, dtype=self.limits.dtype, device=self.theta.weight.device)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()  # float16 had no 1e-18
        return self

    def forward(self, z0: torch.Tensor) -> List[torch.Tensor]:
        """Slopes for `dynamic_relu`.

        Args:
            z0: The first token of every image (B, d).

        Returns:
            Smaller slope, larger slope and their ratio for the first, then for the second dynamic ReLU, each
            (B, C, 1, 1).
        """
        n1, n2 = self.theta.chs
        t = self.theta(F.relu(self.fc1(z0)))
        if _is_exporting():
            return self._plain(t[0]) + self._plain(t[1])
        if len(t) == 1:
            lo, hi, ratio = limit_slopes(t[0].view(2, z0.shape[0], 2, -1, 1, 1), self.limits, self.theta.folded)
            if n1 == n2:
                return [lo[0], hi[0], ratio[0], lo[1], hi[1], ratio[1]]
            return [lo[0, :, :n1], hi[0, :, :n1], ratio[0, :, :n1], lo[1, :, :n2], hi[1, :, :n2], ratio[1, :, :n2]]
        both = torch.cat([t[0].view(-1, 2, n1, 1, 1), t[1].view(-1, 2, n2, 1, 1)], dim=2)
        lo, hi, ratio = limit_slopes(both, self.limits, self.theta.folded)
        return [lo[:, :n1], hi[:, :n1], ratio[:, :n1], lo[:, n1:], hi[:, n1:], ratio[:, n1:]]

    def _plain(self, t: torch.Tensor) -> List[torch.Tensor]:
        """What one MLP answers (B, 2 C) in plain operators; the slopes in any order, which a maximum allows."""
        t1, t2 = t.view(t.shape[0], -1, 1, 1).chunk(2, dim=1)
        if not self.theta.folded:
            t1, t2 = t1 / 3 + 1, t2 / 3
        t1, t2 = t1.clamp(0., 2.), t2.clamp(-1., 1.)
        return [t1, t2, t1]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold ``t / 3 + centre`` into the second layers."""
        if not self.theta.folded:
            self.theta.fold(self.limits[1])
        return self


@torch.fx.wrap
def attend(q: torch.Tensor, kv: torch.Tensor, fused_attn: bool) -> torch.Tensor:
    """Attention of tokens whose keys and values are one tensor, not projected.

    Args:
        q: Scaled queries (B, h, M, c).
        kv: Keys, which are the values too, (B, h, c, N), read in place whatever its memory format.
        fused_attn: Use the fused kernel where it can read `kv` in place.

    Returns:
        (B, M, h, c), heads not yet concatenated.
    """
    if fused_attn and kv.stride(2) == 1 and not _is_exporting():
        kv = kv.transpose(2, 3)
        o = F.scaled_dot_product_attention(q, kv, kv, scale=1.)
    else:
        o = (q @ kv).softmax(dim=-1) @ kv.transpose(2, 3)
    return o.transpose(1, 2)


class MobileToFormer(nn.Module):
    """Mobile->Former, local to global: the tokens gather from the map (Sec. 3.1, Eq. 1).

    ``z + W_o [softmax(q_h x^T / sqrt(C/h)) x]_h * gate``, then LayerNorm, where ``q = W_q z`` and the gate, which the
    paper leaves out, is ``2 hard_sigmoid(W_a z)``. `q_gate` is both linear layers in one.

    Args:
        dim: Channels of the map, C.
        token_dim: Width of a token, d.
        num_heads: Number of heads, h.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            dim: int,
            token_dim: int,
            num_heads: int = 2,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.folded = False
        self.q_gate = nn.Linear(token_dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, token_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm = nn.LayerNorm(token_dim, **dd)

    def query_gate(self, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, M, d) to scaled queries and gates, both (B * M, C)."""
        q, gate = self.q_gate(z.contiguous().view(-1, z.shape[2])).chunk(2, dim=-1)
        if self.folded:
            return q, F.hardtanh(gate, 0., 2.)
        return q * self.scale, F.hardtanh(gate / 3. + 1., 0., 2.)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) and tokens (B, M, d) to tokens (B, M, d)."""
        B, C, H, W = x.shape
        h, c = self.num_heads, C // self.num_heads
        z = z.contiguous()
        q, gate = self.query_gate(z)
        o = attend(q.view(B, -1, h, c).transpose(1, 2), x.view(B, h, c, H * W), self.fused_attn)
        if _is_exporting():
            o = self.proj(gate * o.reshape(gate.shape))
        else:
            o = self.proj((gate.view(o.shape) * o).view(-1, C))
        if self.training:
            o = self.drop_path(o.view(z.shape)).view(o.shape)
        return self.norm(z.view(o.shape) + o).view(z.shape)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold the attention scale and the hard sigmoid's affine part into the linear layer."""
        if not self.folded:
            check_foldable(self.q_gate)
            for t, shift in (self.q_gate.weight, 0.), (self.q_gate.bias, 1.):
                t[:self.dim].mul_(self.scale)
                t[self.dim:].div_(3).add_(shift)
            self.folded = True
        return self


class ResidualLinear(nn.Module):
    """A linear layer without its bias and the residual it is added to, in one product; no `nn.Linear` either."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.addmm(residual, x, self.weight.t())


class Former(nn.Module):
    """Former: attention among the tokens and a feed-forward network, post-norm (Sec. 3.2, "Former sub-block").

    Only the query is projected; keys and values are the tokens.

    Args:
        token_dim: Width of a token, d.
        num_heads: Number of heads.
        drop_path: Stochastic depth rate of the attention; the feed-forward network has none.
    """

    folded: torch.jit.Final[bool]

    def __init__(self, token_dim: int, num_heads: int = 4, drop_path: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.scale = (token_dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.folded = False
        self.q = nn.Linear(token_dim, token_dim, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm1 = nn.LayerNorm(token_dim, **dd)
        self.fc1 = nn.Linear(token_dim, 2 * token_dim, **dd)
        self.fc2 = nn.Linear(2 * token_dim, token_dim, **dd)
        self.norm2 = nn.LayerNorm(token_dim, **dd)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Tokens (B, M, d) to tokens (B, M, d)."""
        B, M, d = z.shape
        z = z.contiguous().view(-1, d)
        h, c = self.num_heads, d // self.num_heads
        q = self.q(z)
        if not self.folded:
            q = q * self.scale
        o = attend(q.view(B, M, h, c).transpose(1, 2), z.view(B, M, h, c).permute(0, 2, 3, 1), self.fused_attn)
        o = self.proj(o.contiguous().view(-1, d))
        if self.training:
            o = self.drop_path(o.view(B, M, d)).view(-1, d)
        z = self.norm1(z + o)
        o = F.gelu(self.fc1(z))
        z = self.fc2(o, z) if self.folded else z + self.fc2(o)
        return self.norm2(z).view(B, M, d)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold the attention scale into the linear layer, and the last bias into the norm before it.

        ``fc2(h)`` and its residual are one product then; `fc1` takes off again what it must not see.
        """
        if not self.folded:
            check_foldable(self.q, self.fc1, self.fc2)
            self.q.weight.mul_(self.scale)
            self.q.bias.mul_(self.scale)
            self.norm1.bias.add_(self.fc2.bias)
            self.fc1.bias.sub_(self.fc1.weight @ self.fc2.bias)
            self.fc2 = ResidualLinear(self.fc2)  # type: ignore[assignment]
            self.folded = True  # type: ignore[misc]
        return self


@torch.fx.wrap
def spread_global(
        x: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        num_heads: int,
) -> torch.Tensor:
    """The map plus what its positions, as queries, take from the tokens.

    Args:
        x: Map (B, C, H, W), read in place whatever its memory format.
        k: Scaled keys (B * M, C).
        v: Values (B, M, C) or (B * M, C).
        num_heads: Number of heads, h.
    """
    B, C, H, W = x.shape
    k = k.view(B, -1, num_heads, C // num_heads).transpose(1, 2)
    v = v.view(B, -1, num_heads, C // num_heads).transpose(1, 2)
    q = x.view(B, num_heads, C // num_heads, H * W)
    if _is_exporting():  # a softmax over few tokens is slow in runtimes, its parts are not
        attn = k @ q
        attn = (attn - attn.amax(dim=-2, keepdim=True)).exp()
        attn = attn / attn.sum(dim=-2, keepdim=True)
        return x + (v.transpose(2, 3) @ attn).reshape(B, C, H, W)
    if q.stride(2) == 1:  # channels-last: all heads in one product, of keys and values that are block-diagonal
        q = x.permute(0, 2, 3, 1).view(B, H * W, C)
        k = torch.diag_embed(k.permute(0, 2, 3, 1), 0, 1, 3).view(B, -1, C)
        v = torch.diag_embed(v.permute(0, 2, 3, 1), 0, 1, 3).view(B, -1, C)
        attn = torch.bmm(k, q.transpose(1, 2)).view(B, num_heads, -1, H * W).softmax(dim=2).view(B, -1, H * W)
        return torch.baddbmm(q, attn.transpose(1, 2), v).view(B, H, W, C).permute(0, 3, 1, 2)
    attn = (k @ q).softmax(dim=-2).view(B * num_heads, -1, H * W)
    v = v.transpose(2, 3)
    v = v[0] if B == 1 else v.flatten(0, 1)
    return torch.baddbmm(q.contiguous().view(B * num_heads, -1, H * W), v, attn).view(B, C, H, W)


class FormerToMobile(nn.Module):
    """Mobile<-Former, global to local: every position of the map takes from the tokens (Sec. 3.1, Eq. 2).

    ``x + [softmax(x_h k_h^T / sqrt(C/h)) v_h]_h`` with ``k = W_k z``, ``v = W_v z``, softmax over the tokens. `kv` is
    both linear layers in one.

    Args:
        dim: Channels of the map, C.
        token_dim: Width of a token, d.
        num_heads: Number of heads, h.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            dim: int,
            token_dim: int,
            num_heads: int = 2,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.folded = False
        self.kv = nn.Linear(token_dim, 2 * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def key_value(self, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, M, d) to scaled keys and values, both (B * M, C)."""
        k, v = self.kv(z.contiguous().view(-1, z.shape[2])).chunk(2, dim=-1)
        return (k if self.folded else k * self.scale), v

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) and tokens (B, M, d) to a map (B, C, H, W)."""
        k, v = self.key_value(z)
        if self.training:  # the result is linear in the values: dropping them drops the path, at M / HW of the cost
            v = self.drop_path(v.view(z.shape[0], -1, self.dim))
        return spread_global(x, k, v, self.num_heads)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold the attention scale into the linear layer."""
        if not self.folded:
            check_foldable(self.kv)
            self.kv.weight[:self.dim].mul_(self.scale)
            self.kv.bias[:self.dim].mul_(self.scale)
            self.folded = True
        return self


class Mobile(nn.Module):
    """Mobile: an inverted bottleneck activated by dynamic ReLU (Sec. 3.2, "Mobile sub-block").

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansion, the hidden width over C_in.
        token_dim: Width of a token, d.
        dilation: Dilation of the depthwise convolution.
        groups: Groups of the 1x1 convolutions.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expand: int,
            token_dim: int,
            dilation: int = 1,
            groups: int = 1,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        mid_chs = in_chs * expand
        self.groups = groups
        self.has_skip = in_chs == out_chs
        self.slopes = DynamicReLU(token_dim, (mid_chs, mid_chs), **dd)
        self.conv1 = ConvNorm(in_chs, mid_chs, groups=groups, **dd)
        self.shuffle1 = channel_shuffle(groups, groups > 1)
        self.conv2 = ConvNorm(mid_chs, mid_chs, 3, dilation=dilation, groups=mid_chs, **dd)
        self.conv3 = ConvNorm(mid_chs, out_chs, groups=groups, **dd)
        self.shuffle3 = channel_shuffle(groups, groups > 1)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z0: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) and first token (B, d) to a map (B, C_out, H, W)."""
        lo1, hi1, ratio1, lo2, hi2, ratio2 = self.slopes(z0)
        shortcut = x
        x = self.shuffle1(self.conv1(x))
        x = dynamic_relu(x, lo1, hi1, ratio1)
        x = self.conv2(x)
        x = dynamic_relu(x, lo2, hi2, ratio2)
        x = self.conv3(x)
        if not self.has_skip:
            return self.shuffle3(x)
        x = self.drop_path(x)
        if self.groups == 1:
            return shortcut + x
        B, C, H, W = x.shape  # shuffle and add in one pass
        x = x.view(B, self.groups, -1, H, W).transpose(1, 2)
        return (shortcut.view(x.shape) + x).view(B, C, H, W)


class MobileDown(nn.Module):
    """Mobile of a downsample block (Sec. 3.2, "Downsample Mobile-Former block").

    A depthwise convolution of stride 2 with its 1x1 convolution gives ``u``; a second such pair, of stride 1, runs on
    ``u`` with a shortcut.

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansions: hidden width of the first pair over C_in, of the second over C_out.
        token_dim: Width of a token, d.
        stride: Stride of the first depthwise convolution.
        dilation: Dilations of the two depthwise convolutions.
        groups: Groups of the 1x1 convolutions.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expand: Tuple[int, int],
            token_dim: int,
            stride: int = 2,
            dilation: Tuple[int, int] = (1, 1),
            groups: int = 1,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        mid1, mid2 = in_chs * expand[0], out_chs * expand[1]
        self.slopes = DynamicReLU(token_dim, (mid1, mid2), **dd)
        self.conv1 = ConvNorm(in_chs, mid1, 3, stride=stride, dilation=dilation[0], groups=in_chs, **dd)
        self.shuffle1 = channel_shuffle(in_chs, groups > 1)
        self.conv2 = ConvNorm(mid1, out_chs, groups=groups, **dd)
        self.conv3 = ConvNorm(out_chs, mid2, 3, dilation=dilation[1], groups=out_chs, **dd)
        self.shuffle3 = channel_shuffle(out_chs, groups > 1)
        self.conv4 = ConvNorm(mid2, out_chs, groups=groups, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z0: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) and first token (B, d) to a map (B, C_out, H / 2, W / 2)."""
        lo1, hi1, ratio1, lo2, hi2, ratio2 = self.slopes(z0)
        x = self.shuffle1(self.conv1(x))
        x = dynamic_relu(x, lo1, hi1, ratio1)
        u = self.conv2(x)
        x = self.shuffle3(self.conv3(u))
        x = dynamic_relu(x, lo2, hi2, ratio2)
        return u + self.drop_path(self.conv4(x))


class LiteBottleneck(nn.Module):
    """The first block: a lite bottleneck (Sec. 3.3), which leaves the tokens alone.

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansion, the hidden width over C_in.
        stride: Stride of the depthwise convolution.
        groups: Groups of the 1x1 convolution.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expand: int,
            stride: int = 1,
            groups: int = 1,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.has_skip = stride == 1 and in_chs == out_chs
        self.conv1 = ConvNorm(in_chs, in_chs * expand, 3, stride=stride, groups=in_chs, **dd)
        self.act = ReLU6()
        self.shuffle = channel_shuffle(in_chs, groups > 1)
        self.conv2 = ConvNorm(in_chs * expand, out_chs, groups=groups, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, C_in, H, W) to a map (B, C_out, H / stride, W / stride); the tokens pass."""
        shortcut = x
        x = self.conv2(self.shuffle(self.act(self.conv1(x))))
        if self.has_skip:
            x = shortcut + self.drop_path(x)
        return x, z


class MobileFormerBlock(nn.Module):
    """A Mobile-Former block (Fig. 3): Mobile->Former, Former, Mobile, Mobile<-Former.

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansion; two of them make it a downsample block.
        token_dim: Width of a token, d.
        stride: Stride of a downsample block.
        dilation: Dilations of its depthwise convolutions before and after its stride.
        groups: Groups of the 1x1 convolutions.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expand: Tuple[int, ...],
            token_dim: int,
            stride: int = 1,
            dilation: Tuple[int, int] = (1, 1),
            groups: int = 1,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.mobile_to_former = MobileToFormer(in_chs, token_dim, drop_path=drop_path, **dd)
        self.former = Former(token_dim, drop_path=drop_path, **dd)
        if len(expand) == 2:
            self.mobile: nn.Module = MobileDown(
                in_chs, out_chs, expand, token_dim, stride, dilation, groups, drop_path=drop_path, **dd)
        else:
            self.mobile = Mobile(
                in_chs, out_chs, expand[0], token_dim, dilation[1], groups, drop_path=drop_path, **dd)
        self.former_to_mobile = FormerToMobile(out_chs, token_dim, drop_path=drop_path, **dd)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, C_in, H, W) and tokens (B, M, d) to a map (B, C_out, H / stride, W / stride) and tokens (B, M, d)."""
        z = self.mobile_to_former(x, z)
        z = self.former(z)
        x = self.mobile(x, z[:, 0])
        x = self.former_to_mobile(x, z)
        return x, z


class Stage(nn.ModuleList):
    """The blocks of one resolution."""

    def __init__(self, blocks: List[nn.Module]):
        super().__init__(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map and tokens (B, M, d) to the next map and tokens."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, z = checkpoint(block, x, z)
            else:
                x, z = block(x, z)
        return x, z


class MobileFormer(nn.Module):
    """Mobile-Former.

    Args:
        stem_width: Channels of the stem.
        num_tokens: Number of global tokens, M.
        token_dim: Width of a token, d.
        stages: For each resolution its blocks, each as (expansions, channels, stride). The first block is the lite
            bottleneck; two expansions make a downsample block.
        head_hidden_size: Width of the hidden layer of the classifier.
        groups: Groups of the 1x1 convolutions.
        in_chans: Channels of the images.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling before the hidden layer; '' to run the head at every position.
        output_stride: 8, 16 or 32; below 32, the last stages are dilated instead of strided.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate, which grows linearly over the blocks.
    """

    def __init__(
            self,
            stem_width: int,
            num_tokens: int,
            token_dim: int,
            stages: Tuple[Tuple[Tuple[Tuple[int, ...], int, int], ...], ...],
            head_hidden_size: int,
            groups: int = 1,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            output_stride: int = 32,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        assert output_stride in (8, 16, 32), f'output_stride must be 8, 16 or 32, not {output_stride}'
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.token_dim = token_dim
        self.drop_rate = drop_rate

        # Tokens and stem
        self.tokens: Optional[nn.Parameter] = nn.Parameter(torch.empty(num_tokens, token_dim, **dd))
        self.stem = ConvNorm(in_chans, stem_width, 3, stride=2, **dd)
        self.stem_act = ReLU6()

        # Stages of blocks
        feature_info: List[Dict[str, Any]] = []
        num_blocks = sum(len(s) for s in stages)
        chs, reduction, dilation, index = stem_width, 2, 1, 0
        modules: List[nn.Module] = []
        if stages[0][0][2] == 2:  # the stem's map is the last one of its size
            feature_info.append(dict(num_chs=chs, reduction=reduction, module='stem_act'))
        for stage in stages:
            blocks: List[nn.Module] = []
            for expand, out_chs, stride in stage:
                next_dilation = dilation
                if stride == 2:
                    if reduction == output_stride:
                        stride, next_dilation = 1, 2 * dilation
                    reduction *= stride
                kwargs = dict(groups=groups, drop_path=drop_path_rate * (index + 1) / num_blocks, **dd)
                if index == 0:
                    blocks.append(LiteBottleneck(chs, out_chs, expand[0], stride, **kwargs))
                else:
                    blocks.append(MobileFormerBlock(
                        chs, out_chs, expand, token_dim, stride, (dilation, next_dilation), **kwargs))
                chs, dilation, index = out_chs, next_dilation, index + 1
            modules.append(Stage(blocks))
            feature_info.append(dict(
                num_chs=chs, reduction=reduction, module=f'stages.{len(modules) - 1}'))
        self.feature_info = feature_info
        self.stages = nn.ModuleList(modules)
        self.first_map = len(feature_info) - len(self.stages)  # index of the first stage's map

        # The last bridge and the head
        self.mobile_to_former: Optional[nn.Module] = MobileToFormer(chs, token_dim, drop_path=drop_path_rate, **dd)
        self.shuffle = channel_shuffle(groups, groups > 1)
        self.final_conv: Optional[nn.Module] = ConvNorm(chs, 6 * chs, groups=groups, **dd)
        self.final_act = ReLU6()
        self.num_features = 6 * chs + token_dim
        self.head_hidden_size = head_hidden_size
        self.global_pool = self._create_pool(global_pool)
        self.head_hidden: Optional[nn.Module] = LinearNorm(self.num_features, head_hidden_size, **dd)
        self.head_drop = nn.Dropout(drop_rate) if drop_rate > 0. else nn.Identity()
        self.classifier = nn.Linear(head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.init_weights()

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter and buffer as the authors do, also after `to_empty()`."""
        if self.tokens is not None:
            nn.init.normal_(self.tokens)
        named_apply(_init_weights, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()  # the authors decayed the tokens too

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem|^tokens',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.(\d+)', None),
                (r'^mobile_to_former|^final_conv', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    @staticmethod
    def _create_pool(global_pool: str) -> SelectAdaptivePool2d:
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        assert pool.feat_mult() == 1, f"global_pool='{global_pool}' changes the pooled width; take avg, max or avgmax"
        return pool

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give the model a new classifier, and another global pooling if one is named."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._create_pool(global_pool).train(self.training)
        self.classifier = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        _init_weights(self.classifier)
        self.classifier.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Take the last n maps if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return the global tokens (B, M, d) beside each map.
            norm: Without effect, the maps have no norm layer of their own.
            stop_early: Stop iterating over stages when the last desired map is reached.
            output_fmt: Format of the maps, 'NCHW'.
            intermediates_only: Only return the intermediate maps.

        Returns:
            Final features and maps, the latter as (map, tokens) with `return_prefix_tokens`; or the maps only.
        """
        assert output_fmt in ('NCHW',), f'output_fmt must be NCHW, not {output_fmt}'
        first = self.first_map
        take_indices, max_index = feature_take_indices(first + len(self.stages), indices)
        last = max_index - first if stop_early else len(self.stages) - 1
        intermediates: List[torch.Tensor] = []
        prefix_tokens: List[torch.Tensor] = []

        x, z = self.forward_stem(x)
        if first == 1 and 0 in take_indices:
            intermediates.append(x)
            prefix_tokens.append(z)
        for i, stage in enumerate(self.stages):
            if i <= last:
                x, z = stage(x, z)
                if i + first in take_indices:
                    intermediates.append(x)
                    prefix_tokens.append(z)

        if not torch.jit.is_scripting() and return_prefix_tokens:  # one return type is all a script can have
            assert self.tokens is not None, 'the tokens were pruned, no block left reads them'
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))  # type: ignore[arg-type]
        if intermediates_only:
            return intermediates
        if last == len(self.stages) - 1:
            x = self.forward_final(x, z)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        num_stages = max_index + 1 - self.first_map
        prune_end = num_stages < len(self.stages)
        self.stages = self.stages[:num_stages]
        self.feature_info = self.feature_info[:max_index + 1]
        if prune_head or prune_end:  # the last bridge and 1x1 convolution belong to the head
            self.mobile_to_former = self.final_conv = self.head_hidden = None
            self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs']
            if not any(isinstance(m, MobileFormerBlock) for m in self.modules()):
                self.tokens = None
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images (B, in_chans, H, W) to the first map (B, C, H / 2, W / 2) and tokens (B, M, d)."""
        x = self.stem_act(self.stem(x))
        z = x  # stands in for the tokens of a model pruned to the blocks that need none
        if self.tokens is not None:
            z = self.tokens.repeat(x.shape[0], 1, 1)
        return x, z

    def forward_final(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The last bridge and 1x1 convolution; the first token joins the map as channels, the same at all positions."""
        if self.mobile_to_former is None or self.final_conv is None:
            return x
        z0 = self.mobile_to_former(x, z[:, :1])  # the head reads no other token
        x = self.final_act(self.final_conv(self.shuffle(x)))
        z0 = z0.transpose(1, 2).unsqueeze(3).expand(-1, -1, x.shape[2], x.shape[3])
        return torch.cat([x, z0], dim=1)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to features (B, 6 C + d, H / 32, W / 32): final map, then the first token."""
        x, z = self.forward_stem(x)
        for stage in self.stages:
            x, z = stage(x, z)
        return self.forward_final(x, z)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits (B, num_classes), or to the hidden layer's output (B, head_hidden_size).

        Without global pooling, the head runs at every position, to (B, num_classes or head_hidden_size, H, W).
        """
        B, _, H, W = x.shape
        x = self.global_pool(x)
        dense = self.global_pool.pool_type == ''
        if dense:
            x = x.permute(0, 2, 3, 1).flatten(0, 2)
        if self.head_hidden is not None:
            local, z0 = x.split([self.num_features - self.token_dim, self.token_dim], dim=1)
            x = torch.cat([F.hardswish(local), z0], dim=1)
            x = F.hardswish(self.head_hidden(x))
        x = self.head_drop(x)
        if not pre_logits:
            x = self.classifier(x)
        if dense:
            x = x.reshape(B, H, W, -1).permute(0, 3, 1, 2)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _init_weights(module: nn.Module, name: str = '') -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels  # not divided by groups
        nn.init.normal_(module.weight, std=(2. / fan_out) ** 0.5)
    elif isinstance(module, (nn.Linear, SlopesLinear)):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
        module.reset_parameters()
    elif isinstance(module, DynamicReLU):
        module.init_non_persistent_buffers()


# Our modules and the authors' that hold the same tensors, several where ours are one (concatenated).
_AUTHORS_MODEL: Dict[str, Tuple[str, ...]] = {
    '': ('tokens',),
    'stem.conv': ('stem.0',),
    'stem.bn': ('stem.1',),
    'final_conv.conv': ('classifier.conv.1',),
    'final_conv.bn': ('classifier.conv.2',),
    'head_hidden.linear': ('classifier.fc.0',),
    'head_hidden.bn': ('classifier.fc.1',),
    'classifier': ('classifier.classifier.1',),
}
_AUTHORS_LITE: Dict[str, Tuple[str, ...]] = {
    'conv1.conv': ('conv.0',),
    'conv1.bn': ('conv.1',),
    'conv2.conv': ('conv.4',),
    'conv2.bn': ('conv.5',),
}
_AUTHORS_BRIDGE: Dict[str, Tuple[str, ...]] = {
    'mobile_to_former.q_gate': ('local_global.q', 'local_global.alpha.0'),
    'mobile_to_former.proj': ('local_global.proj',),
    'mobile_to_former.norm': ('local_global.layer_norm',),
}
_AUTHORS_BLOCK: Dict[str, Tuple[str, ...]] = {
    **_AUTHORS_BRIDGE,
    'former.q': ('global_block.q',),
    'former.proj': ('global_block.channel_mlp',),
    'former.norm1': ('global_block.layer_norm',),
    'former.fc1': ('global_block.ffn.0',),
    'former.fc2': ('global_block.ffn.2',),
    'former.norm2': ('global_block.ffn_norm',),
    **{f'mobile.conv{i}.conv': (f'conv{i}.0',) for i in (1, 2, 3, 4)},
    **{f'mobile.conv{i}.bn': (f'conv{i}.1',) for i in (1, 2, 3, 4)},
    'former_to_mobile.kv': ('global_local.k', 'global_local.proj'),
}
_AUTHORS_SLOPES = {
    Mobile: {
        'mobile.slopes.fc1': ('hyper1.hyper.0', 'hyper2.hyper.0'),
        'mobile.slopes.theta': ('hyper1.hyper.2', 'hyper2.hyper.2'),
    },
    MobileDown: {
        'mobile.slopes.fc1': ('hyper1.hyper.0', 'hyper3.hyper.0'),
        'mobile.slopes.theta': ('hyper1.hyper.2', 'hyper3.hyper.2'),
    },
}


def _authors_modules(model: nn.Module) -> Dict[str, Tuple[str, ...]]:
    """Every module of ours that holds tensors, and the authors' modules that hold them."""
    out = {**_AUTHORS_MODEL, **_AUTHORS_BRIDGE}
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, (LiteBottleneck, MobileFormerBlock))]
    for i, (name, block) in enumerate(blocks):
        table = _AUTHORS_LITE
        if isinstance(block, MobileFormerBlock):
            table = {**_AUTHORS_BLOCK, **_AUTHORS_SLOPES[type(block.mobile)]}
        out.update({f'{name}.{ours}': tuple(f'features.{i}.{t}' for t in theirs) for ours, theirs in table.items()})
    return out


def _convert_authors(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
) -> Tuple[Dict[str, torch.Tensor], Set[str], Set[str]]:
    """The authors' layout in ours, the names in it that are missing, and those whose tensors cannot be merged."""
    modules = _authors_modules(model)
    target = model.state_dict()
    out: Dict[str, torch.Tensor] = {}
    missing: Set[str] = set()
    misshaped: Set[str] = set()
    used: Set[str] = set()
    for key in dict.fromkeys([*target, 'classifier.weight', 'classifier.bias']):
        module, _, tensor = key.rpartition('.')
        names = ['tokens.weight'] if key == 'tokens' else [f'{m}.{tensor}' for m in modules[module]]
        used.update(names)
        missing.update(n for n in names if n not in state_dict)
        if any(n not in state_dict for n in names):
            continue
        if len(names) == 1:
            out[key] = state_dict[names[0]]
            continue
        rows = [len(target[key]) // 2] * 2
        layer = model.get_submodule(module)
        if isinstance(layer, SlopesLinear):
            rows = [2 * n for n in layer.chs]
        found = {n: (tuple(state_dict[n].shape), (r, *target[key].shape[1:])) for n, r in zip(names, rows, strict=True)}
        misshaped.update(f'{n} {shape} instead of {right}' for n, (shape, right) in found.items() if shape != right)
        out[key] = torch.cat([state_dict[n] for n in names]) if not misshaped else target[key]
    out.update((k, v) for k, v in state_dict.items() if k not in used)  # surplus, to be named as such
    return out, missing, misshaped


def _name_some(names: Any, limit: int = 10) -> str:
    names = sorted(names)
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def checkpoint_filter_fn(
        state_dict: Dict[str, Any],
        model: nn.Module,
        strict: bool = True,
) -> Dict[str, torch.Tensor]:
    """Bring a checkpoint, the authors' or ours, into our layout, and refuse one that does not fit the model.

    Only the classifier and the channels of the images may differ, timm adapts those.

    Args:
        state_dict: Tensors by name, or a training checkpoint that holds them.
        model: The model to load.
        strict: Refuse missing and surplus tensors too; a warning names them otherwise.

    Raises:
        RuntimeError: Tensors are missing, surplus or of the wrong shape; the error names them.
    """
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    state_dict = clean_state_dict(state_dict)
    missing: Set[str] = set()
    misshaped: Set[str] = set()
    if 'tokens.weight' in state_dict:
        state_dict, missing, misshaped = _convert_authors(state_dict, model)

    target = model.state_dict()
    adaptable = ('classifier.weight', 'classifier.bias', 'stem.conv.weight')
    problems = {
        'missing': missing or {k for k in target if k not in state_dict},
        'surplus': {k for k in state_dict if k not in target},
        'misshaped': misshaped | {
            f'{k} {tuple(v.shape)} instead of {tuple(target[k].shape)}' for k, v in state_dict.items()
            if k in target and v.shape != target[k].shape
        },
    }
    found = {
        kind: f'{kind}: {_name_some(names)}' for kind, all_names in problems.items()
        if (names := {n for n in all_names if not n.startswith(adaptable)})
    }
    message = f'The checkpoint does not fit {type(model).__name__}; ' + '; '.join(found.values())
    if strict and found or 'misshaped' in found:
        raise RuntimeError(message)
    if found:
        _logger.warning(message)
    return state_dict


def _cfg(variant: str = '', **kwargs: Any) -> Dict[str, Any]:
    cfg = {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'classifier',
        'license': 'unknown',  # the Hub's word for it: the authors state none for their weights
        'paper_ids': 'arXiv:2108.05895',
        'paper_name': 'Mobile-Former: Bridging MobileNet and Transformer',
        'origin_url': 'https://github.com/AAboys/MobileFormer',
    }
    if variant:
        hub = os.environ.get('TIMM_MOBILEFORMER_HUB') or 'timm-mobileformer'
        namespace, at, revision = hub.partition('@')
        cfg['hf_hub_id'] = f'{namespace}/{variant}{at}{revision}'
    return {**cfg, **kwargs}


default_cfgs = generate_default_cfgs({
    **{f'mobileformer_{v}.ms_in1k': _cfg(f'mobileformer_{v}.ms_in1k') for v in (
        '26m', '52m', '96m', '151m', '214m', '294m', '508m')},
    'test_mobileformer': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})


def _create_mobileformer(variant: str, pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    strict = kwargs.get('pretrained_strict', not kwargs.get('features_only', False))  # as timm has it
    with explain_missing_weights(variant, kwargs):
        return build_model_with_cfg(
            MobileFormer,
            variant,
            pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, strict=strict),
            feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls='getter'),
            **kwargs,
        )


# The blocks of each variant, a stage a line: (expansions, channels, stride), Table 1 and Table 11 of the paper.
@register_model
def mobileformer_26m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-26M: 52M with 1x1 convolutions in 4 groups."""
    model_args = dict(
        stem_width=8, num_tokens=3, token_dim=128, groups=4, head_hidden_size=1024,
        stages=(
            (((3,), 12, 2), ((3,), 12, 1)),
            (((6, 4), 24, 2), ((3,), 24, 1)),
            (((6, 4), 48, 2), ((4,), 48, 1), ((6,), 64, 1)),
            (((6, 4), 96, 2), ((6,), 96, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_26m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobileformer_52m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-52M."""
    model_args = dict(
        stem_width=8, num_tokens=3, token_dim=128, head_hidden_size=1024,
        stages=(
            (((3,), 12, 2), ((3,), 12, 1)),
            (((6, 4), 24, 2), ((3,), 24, 1)),
            (((6, 4), 48, 2), ((4,), 48, 1), ((6,), 64, 1)),
            (((6, 4), 96, 2), ((6,), 96, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_52m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobileformer_96m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-96M."""
    model_args = dict(
        stem_width=12, num_tokens=4, token_dim=128, head_hidden_size=1280,
        stages=(
            (((2,), 12, 1),),
            (((6, 4), 16, 2),),
            (((6, 4), 32, 2), ((3,), 32, 1)),
            (((6, 4), 64, 2), ((4,), 64, 1), ((6,), 88, 1)),
            (((6, 4), 128, 2), ((6,), 128, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_96m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobileformer_151m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-151M."""
    model_args = dict(
        stem_width=12, num_tokens=6, token_dim=192, head_hidden_size=1280,
        stages=(
            (((2,), 12, 1),),
            (((6, 4), 16, 2), ((3,), 16, 1)),
            (((6, 4), 32, 2), ((3,), 32, 1)),
            (((6, 4), 64, 2), ((4,), 64, 1), ((6,), 88, 1), ((6,), 88, 1)),
            (((6, 4), 128, 2), ((6,), 128, 1), ((6,), 128, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_151m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobileformer_214m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-214M."""
    model_args = dict(
        stem_width=12, num_tokens=6, token_dim=192, head_hidden_size=1600,
        stages=(
            (((2,), 12, 1),),
            (((6, 4), 20, 2), ((3,), 20, 1)),
            (((6, 4), 40, 2), ((4,), 40, 1)),
            (((6, 4), 80, 2), ((4,), 80, 1), ((6,), 112, 1), ((6,), 112, 1)),
            (((6, 4), 160, 2), ((6,), 160, 1), ((6,), 160, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_214m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobileformer_294m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-294M."""
    model_args = dict(
        stem_width=16, num_tokens=6, token_dim=192, head_hidden_size=1920,
        stages=(
            (((2,), 16, 1),),
            (((6, 4), 24, 2), ((4,), 24, 1)),
            (((6, 4), 48, 2), ((4,), 48, 1)),
            (((6, 4), 96, 2), ((4,), 96, 1), ((6,), 128, 1), ((6,), 128, 1)),
            (((6, 4), 192, 2), ((6,), 192, 1), ((6,), 192, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_294m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mobileformer_508m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-508M."""
    model_args = dict(
        stem_width=24, num_tokens=6, token_dim=192, head_hidden_size=1920,
        stages=(
            (((2,), 24, 1),),
            (((6, 4), 40, 2), ((3,), 40, 1)),
            (((6, 4), 72, 2), ((3,), 72, 1)),
            (((6, 4), 128, 2), ((4,), 128, 1), ((6,), 176, 1), ((6,), 176, 1)),
            (((6, 4), 240, 2), ((6,), 240, 1), ((6,), 240, 1)),
        ),
    )
    return _create_mobileformer('mobileformer_508m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_mobileformer(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """A tiny Mobile-Former for tests and pipelines; nobody trained or will publish weights for it."""
    model_args = dict(
        stem_width=8, num_tokens=2, token_dim=32, head_hidden_size=128,
        stages=(
            (((2,), 8, 1),),
            (((2, 2), 8, 2), ((2,), 8, 1)),
            (((2, 2), 16, 2),),
            (((2, 2), 24, 2), ((2,), 32, 1)),
            (((2, 2), 32, 2), ((2,), 32, 1)),
        ),
    )
    return _create_mobileformer('test_mobileformer', pretrained=pretrained, **dict(model_args, **kwargs))
