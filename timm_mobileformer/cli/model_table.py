"""Table of the Mobile-Former models."""
import argparse
from typing import Any

import timm
import torch

from timm_mobileformer.authors import AUTHORS_FILES, PAPER_TOP1
from timm_mobileformer.authors_weights import cached_weights, read_record
from timm_mobileformer.pretrained import cached_hub_file, hub_repository

from .cost import count_macs

__all__ = ['run']


def where_cached(variant: str) -> str:
    """Return which weights of a variant are in the cache, without network access."""
    if variant not in AUTHORS_FILES:
        return 'none'
    if cached_hub_file(repository := hub_repository(variant)):
        return f'cached, from hf-hub:{repository}'
    if weights := cached_weights(variant):
        return f'cached, from Google Drive, {read_record(weights.parent).get("date", "date unknown")}'
    return 'not cached'


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the work is too small for several threads
    print(f"{'model':<18} {'parameters':>10} {'MACs':>8} {'top-1':>6}  weights")
    for name in sorted(timm.list_models('*mobileformer*'), key=lambda n: PAPER_TOP1.get(n, 0)):
        model = timm.create_model(name)  # counting is faster on the CPU than on the meta device
        cfg: Any = model.pretrained_cfg
        params = sum(p.numel() for p in model.parameters())
        macs = f"{count_macs(model, torch.zeros(1, *cfg['input_size'])) / 1e6:.1f} M"
        print(f"{name:<18} {params:>10,} {macs:>8} {PAPER_TOP1.get(name, '-'):>6}  {where_cached(name)}")
    print("""
MACs: multiply-adds of convolutions and matrix products for an image of 224x224 (test_mobileformer: 160x160).
Top-1: accuracy on ImageNet-1k in percent, as reported in the paper (arXiv 2108.05895); not measured here.
Weights: loaded from the cache, the Hugging Face Hub or Google Drive by --pretrained and pretrained=True.""")
