"""Multiply-adds and training memory of a model."""
from typing import Dict

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs', 'saved_for_backward']


def count_macs(model: nn.Module, x: torch.Tensor) -> float:
    """Return the multiply-adds of convolutions and matrix products per image of a batch `x` of shape (B, C, H, W)."""
    # FlopCounterMode does not count the fused attention kernel of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


def saved_for_backward(model: nn.Module, x: torch.Tensor) -> float:
    """Return the bytes per image of a batch `x` of shape (B, C, H, W) that are kept for the backward pass.

    Parameters, buffers and the images themselves are not counted.
    """
    not_counted = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    kept: Dict[int, torch.UntypedStorage] = {}  # kept alive so that no address is reused

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage
        return t

    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).logsumexp(1).mean()
    return sum(s.nbytes() for s in kept.values()) / len(x)
