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

Two streams run in parallel: a local feature map ``x: (B, C, H, W)`` and a few global tokens ``z: (B, M, d)``. Each
block passes them through the paper's four parts in this order (Fig. 3): Mobile->Former, Former, Mobile, Mobile<-Former.
Where the paper and the authors' code differ, the implementation follows the code, so that their checkpoints load: the
tokens are gated in Mobile->Former, and Former projects the queries only.
"""
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SelectAdaptivePool2d, use_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices

from .checkpoint import checkpoint_filter_fn
from .dynamic_relu import DynamicReLU
from .layers import ChannelShuffle, ConvNorm, LinearNorm, is_in_torch_compile
from .pretrained import resolve_weights

try:
    from timm.models import checkpoint
except ImportError:  # timm before 1.0.13
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

__all__ = ['MobileFormer']


@torch.fx.wrap
def attend(q: torch.Tensor, kv: torch.Tensor, fused_attn: bool) -> torch.Tensor:
    """Scaled dot-product attention with one tensor as both keys and values.

    Args:
        q: Queries (B, h, M, c).
        kv: Keys and values (B, h, N, c).
        fused_attn: Use the fused kernel if it can read `kv` without a copy: for tokens, and for a map in channels-last.

    Returns:
        (B, h, M, c)
    """
    if fused_attn and kv.stride(3) == 1:
        return F.scaled_dot_product_attention(q, kv, kv)
    shape = q.shape
    if is_in_torch_compile():  # see distribute
        q, kv = q.flatten(0, 1), kv.flatten(0, 1)
    attn = (q * shape[3] ** -0.5) @ kv.transpose(-2, -1)
    return (attn.softmax(dim=-1) @ kv).view(shape)


@torch.fx.wrap
def distribute(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Add to a map the attention in which its positions are the queries.

    Args:
        x: Map (B, C, H, W), contiguous or in channels-last.
        k: Keys (B, h, M, c), already scaled, with h * c = C.
        v: Values (B, h, M, c).

    Returns:
        (B, C, H, W)
    """
    B, C, H, W = x.shape
    h, M, c = k.shape[1:]
    q = x.view(B, h, c, H * W)
    if q.stride(2) == 1:  # channels-last: a batched product over the heads would copy the map
        heads: List[torch.Tensor] = []
        for q_h, k_h, v_h in zip(q.unbind(1), k.unbind(1), v.unbind(1)):  # noqa: B905, for TorchScript
            attn = (k_h @ q_h).softmax(dim=1)
            heads.append(torch.baddbmm(q_h.transpose(1, 2), attn.transpose(1, 2), v_h))
        return torch.cat(heads, dim=2).view(B, H, W, C).permute(0, 3, 1, 2)
    if is_in_torch_compile():  # 258 -> 151 s for 294m with dynamic=True, since the indices are simpler to Inductor
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        attn = (k @ q).softmax(dim=1)
        return torch.baddbmm(q, v.transpose(1, 2), attn).view(B, h, c, H * W).view(B, C, H, W)
    attn = (k @ q).softmax(dim=2)
    return (v.transpose(2, 3) @ attn).view(B, C, H, W).add_(x)


class MobileToFormer(nn.Module):
    """Mobile->Former: the tokens attend to the map, local to global (Sec. 3.1, Eq. 1).

    ``LN(z + W_o (gate * [softmax(q_h x_h^T / sqrt(C/h)) x_h]_h))`` with ``q = W_q z``. Only the queries are projected;
    keys and values are the map. The gate ``2 hard_sigmoid(W_a z)`` is in the authors' code but not in the paper.

    Args:
        dim: Channels of the map, C.
        token_dim: Width of a token, d.
        num_heads: Number of heads, h.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, token_dim: int, num_heads: int = 2, drop_path: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(token_dim, dim, **dd)
        self.gate = nn.Linear(token_dim, dim, **dd)
        self.proj = nn.Linear(dim, token_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm = nn.LayerNorm(token_dim, **dd)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) and tokens (B, M, d) to tokens (B, M, d)."""
        B, C, H, W = x.shape
        M, h = z.shape[1], self.num_heads
        q = self.q(z).view(B, M, h, C // h).transpose(1, 2)
        kv = x.view(B, h, C // h, H * W).transpose(2, 3)
        o = attend(q, kv, self.fused_attn).transpose(1, 2).reshape(B, M, C)
        gate = (self.gate(z) / 3 + 1).clamp(0., 2.)
        return self.norm(z + self.drop_path(self.proj(gate * o)))


class Former(nn.Module):
    """Former: self-attention of the tokens and a feed-forward network, both post-norm (Sec. 3.2, "Former sub-block").

    Only the queries are projected; keys and values are the tokens.

    Args:
        token_dim: Width of a token, d.
        num_heads: Number of heads.
        drop_path: Stochastic depth rate of the attention branch; the feed-forward branch is never dropped.
    """

    def __init__(self, token_dim: int, num_heads: int = 4, drop_path: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
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
        h = self.num_heads
        q = self.q(z).view(B, M, h, d // h).transpose(1, 2)
        kv = z.view(B, M, h, d // h).transpose(1, 2)
        o = attend(q, kv, self.fused_attn).transpose(1, 2).reshape(B, M, d)
        z = self.norm1(z + self.drop_path(self.proj(o)))
        return self.norm2(z + self.fc2(F.gelu(self.fc1(z))))


class Mobile(nn.Module):
    """Mobile: an inverted bottleneck with dynamic ReLU (Sec. 3.2, "Mobile sub-block").

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansion ratio; the hidden width is expand * C_in.
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
        self.has_skip = in_chs == out_chs
        self.conv1 = ConvNorm(in_chs, mid_chs, groups=groups, **dd)
        self.shuffle1 = ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.act1 = DynamicReLU(mid_chs, token_dim, **dd)
        self.conv2 = ConvNorm(mid_chs, mid_chs, 3, dilation=dilation, groups=mid_chs, **dd)
        self.act2 = DynamicReLU(mid_chs, token_dim, **dd)
        self.conv3 = ConvNorm(mid_chs, out_chs, groups=groups, **dd)
        self.shuffle3 = ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z0: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) and first token (B, d) to a map (B, C_out, H, W)."""
        shortcut = x
        x = self.act1(self.shuffle1(self.conv1(x)), z0)
        x = self.act2(self.conv2(x), z0)
        x = self.shuffle3(self.conv3(x))
        if self.has_skip:
            x = shortcut + self.drop_path(x)
        return x


class MobileDown(nn.Module):
    """Mobile of a downsample block (Sec. 3.2, "Downsample Mobile-Former block").

    A depthwise convolution of stride 2 and a 1x1 convolution compute ``u``; a second pair, of stride 1, is a residual
    branch on ``u``.

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansion ratios; the hidden widths are expand[0] * C_in and expand[1] * C_out.
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
        self.conv1 = ConvNorm(in_chs, mid1, 3, stride=stride, dilation=dilation[0], groups=in_chs, **dd)
        self.shuffle1 = ChannelShuffle(in_chs) if groups > 1 else nn.Identity()
        self.act1 = DynamicReLU(mid1, token_dim, **dd)
        self.conv2 = ConvNorm(mid1, out_chs, groups=groups, **dd)
        self.conv3 = ConvNorm(out_chs, mid2, 3, dilation=dilation[1], groups=out_chs, **dd)
        self.shuffle3 = ChannelShuffle(out_chs) if groups > 1 else nn.Identity()
        self.act3 = DynamicReLU(mid2, token_dim, **dd)
        self.conv4 = ConvNorm(mid2, out_chs, groups=groups, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z0: torch.Tensor) -> torch.Tensor:
        """Map (B, C_in, H, W) and first token (B, d) to a map (B, C_out, H / stride, W / stride)."""
        x = self.act1(self.shuffle1(self.conv1(x)), z0)
        u = self.conv2(x)
        x = self.act3(self.shuffle3(self.conv3(u)), z0)
        return u + self.drop_path(self.conv4(x))


class FormerToMobile(nn.Module):
    """Mobile<-Former: the map attends to the tokens, global to local (Sec. 3.1, Eq. 2).

    ``x + [softmax(x_h k_h^T / sqrt(C/h)) v_h]_h`` with ``k = W_k z`` and ``v = W_v z``, softmax over the tokens. Keys
    and values are projected; the queries are the map.

    Args:
        dim: Channels of the map, C.
        token_dim: Width of a token, d.
        num_heads: Number of heads, h.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, token_dim: int, num_heads: int = 2, drop_path: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads = num_heads
        self.k = nn.Linear(token_dim, dim, **dd)
        self.v = nn.Linear(token_dim, dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) and tokens (B, M, d) to a map (B, C, H, W)."""
        (B, M, _), C, h = z.shape, x.shape[1], self.num_heads
        k = (self.k(z) * (C // h) ** -0.5).view(B, M, h, C // h).transpose(1, 2)
        v = self.drop_path(self.v(z)).view(B, M, h, C // h).transpose(1, 2)  # same as dropping the sum
        return distribute(x, k, v)


class LiteBottleneck(nn.Module):
    """Lite bottleneck, the first block (Sec. 3.3); it returns the tokens unchanged.

    Args:
        in_chs: Channels of the input, C_in.
        out_chs: Channels of the output, C_out.
        expand: Expansion ratio; the hidden width is expand * C_in.
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
        self.act = nn.ReLU6()
        self.shuffle = ChannelShuffle(in_chs) if groups > 1 else nn.Identity()
        self.conv2 = ConvNorm(in_chs * expand, out_chs, groups=groups, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, C_in, H, W) to a map (B, C_out, H / stride, W / stride), and the tokens as they are."""
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
        token_dim: Width of a token, d.
        mobile: The Mobile part: `Mobile`, or `MobileDown` in a downsample block.
        drop_path: Stochastic depth rate.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            token_dim: int,
            mobile: nn.Module,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.mobile_to_former = MobileToFormer(in_chs, token_dim, drop_path=drop_path, **dd)
        self.former = Former(token_dim, drop_path=drop_path, **dd)
        self.mobile = mobile
        self.former_to_mobile = FormerToMobile(out_chs, token_dim, drop_path=drop_path, **dd)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, C_in, H, W) and tokens (B, M, d) to a map (B, C_out, H / stride, W / stride) and tokens (B, M, d)."""
        z = self.mobile_to_former(x, z)
        z = self.former(z)
        x = self.mobile(x, z[:, 0])
        x = self.former_to_mobile(x, z)
        return x, z


class Stage(nn.ModuleList):
    """The blocks at one resolution."""

    def __init__(self, blocks: List[nn.Module]):
        super().__init__(blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, C, H, W) and tokens (B, M, d) to the stage's map and tokens."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, z = checkpoint(block, x, z)
            else:
                x, z = block(x, z)
        return x, z


class BlockCfg(NamedTuple):
    """A block, as in a row of the paper's Tables 1 and 11.

    Attributes:
        kind: 'bneck-lite' for a lite bottleneck, 'M-F' for a Mobile-Former block, 'M-F-down' for a downsample block.
        expand: Expansion ratio; a downsample block has two.
        out_chs: Channels of the output.
        stride: Stride, 1 for 'M-F'.
    """
    kind: str
    expand: Union[int, Tuple[int, int]]
    out_chs: int
    stride: int = 1


class MobileFormer(nn.Module):
    """Mobile-Former; the defaults are those of Mobile-Former-294M (Table 1).

    Args:
        stem_width: Channels of the stem.
        num_tokens: Number of global tokens, M.
        token_dim: Width of a token, d.
        stages: The blocks at each resolution.
        head_hidden_size: Width of the hidden layer of the classifier.
        groups: Groups of the 1x1 convolutions.
        in_chans: Channels of the images.
        num_classes: Number of classes; 0 for no classifier.
        global_pool: Pooling before the hidden layer; '' to apply the head at every position.
        output_stride: 8, 16 or 32; below 32, the last stages are dilated instead of strided.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it increases linearly over the blocks.
    """

    def __init__(
            self,
            stem_width: int = 16,
            num_tokens: int = 6,
            token_dim: int = 192,
            stages: Sequence[Sequence[BlockCfg]] = (
                (BlockCfg('bneck-lite', 2, 16),),
                (BlockCfg('M-F-down', (6, 4), 24, 2), BlockCfg('M-F', 4, 24)),
                (BlockCfg('M-F-down', (6, 4), 48, 2), BlockCfg('M-F', 4, 48)),
                (BlockCfg('M-F-down', (6, 4), 96, 2), BlockCfg('M-F', 4, 96),
                 BlockCfg('M-F', 6, 128), BlockCfg('M-F', 6, 128)),
                (BlockCfg('M-F-down', (6, 4), 192, 2), BlockCfg('M-F', 6, 192), BlockCfg('M-F', 6, 192)),
            ),
            head_hidden_size: int = 1920,
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
        self.stem_act = nn.ReLU6()

        # Stages of blocks
        rows: Any = [[BlockCfg(*block) for block in stage] for stage in stages]
        num_blocks = sum(len(stage) for stage in rows)
        chs, reduction, dilation, index = stem_width, 2, 1, 0
        feature_info: List[Dict[str, Any]] = []
        if rows[0][0].stride == 2:  # the stem's map is the last one of its size
            feature_info.append(dict(num_chs=chs, reduction=reduction, module='stem_act'))
        modules: List[nn.Module] = []
        for stage in rows:
            blocks: List[nn.Module] = []
            for kind, expand, out_chs, stride in stage:
                next_dilation = dilation
                if stride == 2 and reduction == output_stride:
                    stride, next_dilation = 1, 2 * dilation
                reduction *= stride
                kwargs: Any = dict(groups=groups, drop_path=drop_path_rate * (index + 1) / num_blocks, **dd)
                if kind == 'bneck-lite':
                    blocks.append(LiteBottleneck(chs, out_chs, expand, stride, **kwargs))
                else:
                    if kind == 'M-F-down':
                        mobile: nn.Module = MobileDown(
                            chs, out_chs, expand, token_dim, stride, (dilation, next_dilation), **kwargs)
                    else:
                        assert kind == 'M-F' and stride == 1, f'unknown kind of block or of stride: {kind!r}, {stride}'
                        mobile = Mobile(chs, out_chs, expand, token_dim, dilation, **kwargs)
                    blocks.append(MobileFormerBlock(chs, out_chs, token_dim, mobile, kwargs['drop_path'], **dd))
                chs, dilation, index = out_chs, next_dilation, index + 1
            modules.append(Stage(blocks))
            feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'stages.{len(modules) - 1}'))
        self.feature_info = feature_info
        self.stages = nn.ModuleList(modules)
        self.first_map = len(feature_info) - len(self.stages)  # index of the first stage in feature_info

        # The last bridge and the head
        self.mobile_to_former: Optional[nn.Module] = MobileToFormer(chs, token_dim, drop_path=drop_path_rate, **dd)
        self.shuffle = ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.final_conv: Optional[nn.Module] = ConvNorm(chs, 6 * chs, groups=groups, **dd)
        self.final_act = nn.ReLU6()
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
        """Initialize parameters and buffers as the authors do, after `to_empty()` and `reparameterize_model` too."""
        if self.tokens is not None:
            nn.init.normal_(self.tokens)
        named_apply(_init_weights, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()  # the authors apply weight decay to the tokens too

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
        assert pool.feat_mult() == 1, f"global_pool='{global_pool}' changes the width; use 'avg', 'max' or 'avgmax'"
        return pool

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the global pooling if `global_pool` is given."""
        p = next(self.parameters())
        dd: Any = {'device': p.device, 'dtype': p.dtype}
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
            return_prefix_tokens: Return each map with the global tokens (B, M, d), as a tuple.
            norm: Not used; the maps have no norm layer of their own.
            stop_early: Stop iterating over stages when the last desired map is reached.
            output_fmt: Format of the maps, must be 'NCHW'.
            intermediates_only: Only return the intermediate maps.

        Returns:
            The final features and the list of maps; only the list with `intermediates_only`.
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

        if not torch.jit.is_scripting() and return_prefix_tokens:  # TorchScript allows one type only
            assert self.tokens is not None, 'the tokens were pruned, since no remaining block uses them'
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
        if prune_head or prune_end:  # the last bridge and 1x1 convolution are part of the head
            self.mobile_to_former = self.final_conv = self.head_hidden = None
            self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs']
            if not any(isinstance(m, MobileFormerBlock) for m in self.modules()):
                self.tokens = None
            self.reset_classifier(0, '')
        return take_indices

    def forward_stem(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images (B, in_chans, H, W) to the first map (B, C, H / 2, W / 2) and tokens (B, M, d)."""
        x = self.stem_act(self.stem(x))
        if self.tokens is None:
            return x, x  # a placeholder for the tokens, which the remaining blocks do not use
        return x, self.tokens.repeat(x.shape[0], 1, 1)

    def forward_final(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The last Mobile->Former and 1x1 convolution; the first token is appended to every position as channels."""
        if self.mobile_to_former is None or self.final_conv is None:
            return x
        # The head uses the first token only. The copy has the same strides for every batch size; the slice itself is
        # contiguous for a batch of one, and exporters would specialize on that.
        z0 = self.mobile_to_former(x, z[:, :1].clone(memory_format=torch.contiguous_format))
        x = self.final_act(self.final_conv(self.shuffle(x)))
        z0 = z0.transpose(1, 2).unsqueeze(3).expand(-1, -1, x.shape[2], x.shape[3])
        return torch.cat([x, z0], dim=1)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to features (B, 6 C + d, H / output_stride, W / output_stride).

        The channels are those of the final map, then those of the first token.
        """
        x, z = self.forward_stem(x)
        for stage in self.stages:
            x, z = stage(x, z)
        return self.forward_final(x, z)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits (B, num_classes), or with `pre_logits` to the hidden layer's output (B, head_hidden_size).

        Without global pooling, the head is applied at every position and returns a map (B, ..., H, W).
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
            x = x.reshape(B, H, W, x.shape[1]).permute(0, 3, 1, 2)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class MobileFormerFeatures(FeatureGetterNet):
    """Feature extractor for `features_only`, which always returns a list so that it can be scripted."""

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=self.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True)
        if torch.jit.is_scripting():
            assert torch.jit.isinstance(maps, List[torch.Tensor])
        return maps


def _init_weights(module: nn.Module, name: str = '') -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels  # not divided by groups
        nn.init.normal_(module.weight, std=(2. / fan_out) ** 0.5)
        if module.bias is not None:  # of a BatchNorm that was folded
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
        module.reset_parameters()
    elif isinstance(module, DynamicReLU) and module.folded:  # after the linear layer in it
        module.folded = False
        module.fuse()


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'classifier',
        'license': 'unknown',  # as the Hub calls it; the authors state no licence for their weights
        'paper_ids': 'arXiv:2108.05895',
        'paper_name': 'Mobile-Former: Bridging MobileNet and Transformer',
        'origin_url': 'https://github.com/AAboys/MobileFormer',
        **kwargs,
    }


# If a repository does not exist, the weights come from the authors' file, see pretrained.py
default_cfgs = generate_default_cfgs({
    'mobileformer_26m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_26m.ms_in1k'),
    'mobileformer_52m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_52m.ms_in1k'),
    'mobileformer_96m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_96m.ms_in1k'),
    'mobileformer_151m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_151m.ms_in1k'),
    'mobileformer_214m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_214m.ms_in1k'),
    'mobileformer_294m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_294m.ms_in1k'),
    'mobileformer_508m.ms_in1k': _cfg(hf_hub_id='timm-mobileformer/mobileformer_508m.ms_in1k'),
    'test_mobileformer': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})


def _create_mobileformer(variant: str, pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    strict = kwargs.get('pretrained_strict', not kwargs.get('features_only', False))  # as in timm's load_pretrained
    with resolve_weights(variant, pretrained, kwargs) as kwargs:
        return build_model_with_cfg(
            MobileFormer,
            variant,
            pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, strict=strict),
            feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls=MobileFormerFeatures),
            **kwargs,
        )


# The variants of Table 11; that of Table 1, 294M, is the default of MobileFormer.
_52M = dict(
    stem_width=8, num_tokens=3, token_dim=128, head_hidden_size=1024,
    stages=(
        (BlockCfg('bneck-lite', 3, 12, 2), BlockCfg('M-F', 3, 12)),
        (BlockCfg('M-F-down', (6, 4), 24, 2), BlockCfg('M-F', 3, 24)),
        (BlockCfg('M-F-down', (6, 4), 48, 2), BlockCfg('M-F', 4, 48), BlockCfg('M-F', 6, 64)),
        (BlockCfg('M-F-down', (6, 4), 96, 2), BlockCfg('M-F', 6, 96)),
    ))
_96M = dict(
    stem_width=12, num_tokens=4, token_dim=128, head_hidden_size=1280,
    stages=(
        (BlockCfg('bneck-lite', 2, 12),),
        (BlockCfg('M-F-down', (6, 4), 16, 2),),
        (BlockCfg('M-F-down', (6, 4), 32, 2), BlockCfg('M-F', 3, 32)),
        (BlockCfg('M-F-down', (6, 4), 64, 2), BlockCfg('M-F', 4, 64), BlockCfg('M-F', 6, 88)),
        (BlockCfg('M-F-down', (6, 4), 128, 2), BlockCfg('M-F', 6, 128)),
    ))
_151M = dict(
    stem_width=12, num_tokens=6, token_dim=192, head_hidden_size=1280,
    stages=(
        (BlockCfg('bneck-lite', 2, 12),),
        (BlockCfg('M-F-down', (6, 4), 16, 2), BlockCfg('M-F', 3, 16)),
        (BlockCfg('M-F-down', (6, 4), 32, 2), BlockCfg('M-F', 3, 32)),
        (BlockCfg('M-F-down', (6, 4), 64, 2), BlockCfg('M-F', 4, 64), BlockCfg('M-F', 6, 88), BlockCfg('M-F', 6, 88)),
        (BlockCfg('M-F-down', (6, 4), 128, 2), BlockCfg('M-F', 6, 128), BlockCfg('M-F', 6, 128)),
    ))
_214M = dict(
    stem_width=12, num_tokens=6, token_dim=192, head_hidden_size=1600,
    stages=(
        (BlockCfg('bneck-lite', 2, 12),),
        (BlockCfg('M-F-down', (6, 4), 20, 2), BlockCfg('M-F', 3, 20)),
        (BlockCfg('M-F-down', (6, 4), 40, 2), BlockCfg('M-F', 4, 40)),
        (BlockCfg('M-F-down', (6, 4), 80, 2), BlockCfg('M-F', 4, 80), BlockCfg('M-F', 6, 112), BlockCfg('M-F', 6, 112)),
        (BlockCfg('M-F-down', (6, 4), 160, 2), BlockCfg('M-F', 6, 160), BlockCfg('M-F', 6, 160)),
    ))
_508M = dict(
    stem_width=24, num_tokens=6, token_dim=192, head_hidden_size=1920,
    stages=(
        (BlockCfg('bneck-lite', 2, 24),),
        (BlockCfg('M-F-down', (6, 4), 40, 2), BlockCfg('M-F', 3, 40)),
        (BlockCfg('M-F-down', (6, 4), 72, 2), BlockCfg('M-F', 3, 72)),
        (BlockCfg('M-F-down', (6, 4), 128, 2), BlockCfg('M-F', 4, 128),
         BlockCfg('M-F', 6, 176), BlockCfg('M-F', 6, 176)),
        (BlockCfg('M-F-down', (6, 4), 240, 2), BlockCfg('M-F', 6, 240), BlockCfg('M-F', 6, 240)),
    ))
_TEST = dict(
    stem_width=8, num_tokens=2, token_dim=32, head_hidden_size=128,
    stages=(
        (BlockCfg('bneck-lite', 2, 8),),
        (BlockCfg('M-F-down', (2, 2), 8, 2), BlockCfg('M-F', 2, 8)),
        (BlockCfg('M-F-down', (2, 2), 16, 2),),
        (BlockCfg('M-F-down', (2, 2), 24, 2), BlockCfg('M-F', 2, 32)),
        (BlockCfg('M-F-down', (2, 2), 32, 2), BlockCfg('M-F', 2, 32)),
    ))


@register_model
def mobileformer_26m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-26M: Mobile-Former-52M with 4 groups in its 1x1 convolutions."""
    return _create_mobileformer('mobileformer_26m', pretrained=pretrained, **{**_52M, 'groups': 4, **kwargs})


@register_model
def mobileformer_52m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-52M."""
    return _create_mobileformer('mobileformer_52m', pretrained=pretrained, **dict(_52M, **kwargs))


@register_model
def mobileformer_96m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-96M."""
    return _create_mobileformer('mobileformer_96m', pretrained=pretrained, **dict(_96M, **kwargs))


@register_model
def mobileformer_151m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-151M."""
    return _create_mobileformer('mobileformer_151m', pretrained=pretrained, **dict(_151M, **kwargs))


@register_model
def mobileformer_214m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-214M."""
    return _create_mobileformer('mobileformer_214m', pretrained=pretrained, **dict(_214M, **kwargs))


@register_model
def mobileformer_294m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-294M."""
    return _create_mobileformer('mobileformer_294m', pretrained=pretrained, **kwargs)


@register_model
def mobileformer_508m(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """Mobile-Former-508M."""
    return _create_mobileformer('mobileformer_508m', pretrained=pretrained, **dict(_508M, **kwargs))


@register_model
def test_mobileformer(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    """A tiny Mobile-Former for tests, without pretrained weights."""
    return _create_mobileformer('test_mobileformer', pretrained=pretrained, **dict(_TEST, **kwargs))
