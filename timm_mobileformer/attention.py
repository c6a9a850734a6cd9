"""Attention maps between the feature map and the tokens."""
from contextlib import ExitStack, contextmanager
from typing import Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from einops import rearrange
from timm.models._features import FeatureGetterNet

from .mobileformer import FormerToMobile, MobileFormer, MobileToFormer

__all__ = ['BridgeAttention', 'attention_maps', 'recording']


class BridgeAttention(NamedTuple):
    """Attention weights of the bridges of one block, or of the last bridge (Sec. 3.1, Eq. 1 and 2).

    Attributes:
        name: Name of the block, such as 'stages.1.0', or 'mobile_to_former' for the last bridge.
        mobile_to_former: Mobile->Former (B, heads, M, H, W), from each token to the positions of the block's input;
            sums to 1 over the positions. The last bridge has the first token only: (B, heads, 1, H, W).
        former_to_mobile: Mobile<-Former (B, heads, M, H / stride, W / stride), from each position of the block's output
            to the tokens; sums to 1 over the tokens. None for the last bridge, which does not have this direction.
    """
    name: str
    mobile_to_former: torch.Tensor
    former_to_mobile: Optional[torch.Tensor]


def _scores(tokens: torch.Tensor, x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute the attention scores (B, heads, M, H, W) of tokens (B, M, C) and positions (B, C, H, W)."""
    tokens = rearrange(tokens, 'b m (n c) -> b n m c', n=num_heads)
    x = rearrange(x, 'b (n c) h w -> b n c h w', n=num_heads)
    return torch.einsum('bnmc,bnchw->bnmhw', tokens * tokens.shape[3] ** -0.5, x)


def _runs_without_hooks(module: nn.Module) -> bool:
    """Return whether a module is compiled or scripted, so that hooks of its submodules may not be called."""
    return (module._compiled_call_impl is not None or hasattr(module, '_orig_mod')
            or isinstance(module, torch.jit.ScriptModule))


@contextmanager
def recording(model: nn.Module) -> Iterator[List[BridgeAttention]]:
    """Put the model in evaluation mode and record the attention weights of every bridge."""
    net = model.model if isinstance(model, FeatureGetterNet) else model
    unreadable = [f'{type(m).__name__} {name}'.strip() for name, m in model.named_modules() if _runs_without_hooks(m)]
    if unreadable or not isinstance(net, MobileFormer):
        raise TypeError(
            'attention_maps takes a Mobile-Former from create_model, with or without features_only, before it or a '
            'part of it is compiled, scripted or wrapped; not a '
            f'{"compiled or scripted " + unreadable[0] if unreadable else type(net).__name__}')

    bridges = {m: name for name, m in net.named_modules() if isinstance(m, (MobileToFormer, FormerToMobile))}
    called: List[Tuple[nn.Module, torch.Tensor]] = []
    maps: List[BridgeAttention] = []

    def record(bridge: nn.Module, args: Tuple[torch.Tensor, torch.Tensor]) -> None:
        x, z = args
        if isinstance(bridge, MobileToFormer):
            scores = _scores(bridge.q(z), x, bridge.num_heads)
            called.append((bridge, scores.flatten(3).softmax(dim=3).view_as(scores)))
        elif isinstance(bridge, FormerToMobile):
            called.append((bridge, _scores(bridge.k(z), x, bridge.num_heads).softmax(dim=2)))

    modes = [(m, m.training) for m in model.modules()]
    checkpointing = [(stage, stage.grad_checkpointing) for stage in net.stages]
    with ExitStack() as hooks:
        for bridge in bridges:
            hooks.enter_context(bridge.register_forward_pre_hook(record))
        try:
            model.eval()
            net.set_grad_checkpointing(False)  # recomputation in the backward pass would bypass the hooks
            yield maps
            if [module for module, _ in called] != [*bridges]:
                raise TypeError('attention cannot be read: not every bridge of the model was called once and in order')
            for module, attn in called:
                if isinstance(module, MobileToFormer):
                    maps.append(BridgeAttention(bridges[module].removesuffix('.mobile_to_former'), attn, None))
                else:
                    maps[-1] = maps[-1]._replace(former_to_mobile=attn)
        finally:
            for stage, enabled in checkpointing:
                stage.grad_checkpointing = enabled
            for module, mode in modes:
                module.training = mode


def attention_maps(model: nn.Module, images: torch.Tensor) -> List[BridgeAttention]:
    """Compute the attention weights of a Mobile-Former, in both directions of every bridge.

    The model is run once in evaluation mode; its training mode is restored. The results are part of the autograd graph
    unless gradients are disabled with `torch.no_grad()`, so they can be used in a loss or a saliency method.

    Args:
        model: A Mobile-Former, with or without `features_only` and `reparameterize_model`.
        images: Preprocessed images (B, in_chans, H, W).

    Returns:
        One `BridgeAttention` for each Mobile-Former block in order, then one for the last bridge, which a model with
        `features_only` does not have.

    Raises:
        TypeError: The model is not a Mobile-Former, or a part of it is compiled, scripted or wrapped.
    """
    with recording(model) as maps:
        model(images)
    return maps
