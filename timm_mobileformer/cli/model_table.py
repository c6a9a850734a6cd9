"""A table of the models."""
import argparse
from typing import Any

import timm
import torch

import timm_mobileformer  # noqa: F401  registers the models
from timm_mobileformer.authors import PAPER_TOP1

from .cost import count_macs

__all__ = ['run']


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # several have too little to do, and wait for each other on a busy machine
    print(f"{'model':<18} {'parameters':>10} {'MACs':>8} {'top-1':>6}  weights")
    for name in sorted(timm.list_models('*mobileformer*'), key=lambda n: PAPER_TOP1.get(n, 0)):
        model = timm.create_model(name)  # PyTorch counts operations on the CPU faster than on the meta device
        cfg: Any = model.pretrained_cfg
        params = sum(p.numel() for p in model.parameters())
        macs = f"{count_macs(model, torch.zeros(1, *cfg['input_size'])) / 1e6:.1f} M"
        weights = f"hf-hub:{cfg['hf_hub_id']}" if cfg.get('hf_hub_id') else 'none'
        print(f"{name:<18} {params:>10,} {macs:>8} {PAPER_TOP1.get(name, '-'):>6}  {weights}")
    print("""
MACs of the convolutions and matrix products, for an image of 224x224 (test_mobileformer: 160x160).
Top-1 on ImageNet-1k in percent as the paper (arXiv 2108.05895) reports it; it was not measured here.
Weights: where --pretrained and pretrained=True load them from, once they are published; until then, there is
timm-mobileformer weights NAME.""")
