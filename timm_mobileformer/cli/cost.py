"""Multiply-adds of a model, and the memory that its training keeps."""
from typing import Dict

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs', 'saved_for_backward']


def count_macs(model: nn.Module, x: torch.Tensor) -> float:
    """Multiply-adds of the convolutions and matrix products for each image of a batch (B, C, H, W)."""
    # PyTorch does not count the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


def saved_for_backward(model: nn.Module, x: torch.Tensor) -> float:
    """Bytes for each image of a batch (B, C, H, W) that a training step keeps for its backward pass.

    Parameters, buffers and the images themselves are there anyway and left out.
    """
    there = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    kept: Dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return t

    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).logsumexp(1).mean()
    return sum(s.nbytes() for s in kept.values()) / len(x)
