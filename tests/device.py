"""The device that the models' tests run on: that of the environment variable TORCH_DEVICE, as in timm's own tests."""
import os

import pytest
import torch

__all__ = ['DEVICE', 'needs_float64']

DEVICE = torch.device(os.environ.get('TORCH_DEVICE', 'cpu'))


def has_float64() -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=DEVICE)
    except TypeError:  # of MPS
        return False
    return True


needs_float64 = pytest.mark.skipif(not has_float64(), reason=f'{DEVICE} has no float64')
