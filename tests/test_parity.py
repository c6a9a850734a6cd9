"""Our network computes what the authors' program computes, to 1e-9 in float64, and its gradients."""
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from authors import (
    ANSWERS,
    EVAL_CASES,
    TRAIN_CASE,
    VARIANTS,
    along,
    author_input,
    author_state_dict,
    direction,
    gradients,
    parts,
    sketch,
)
from device import DEVICE, needs_float64
from safetensors.torch import load_file
from timm.utils import reparameterize_model

from timm_mobileformer import checkpoint_filter_fn

pytestmark = [needs_float64, pytest.mark.usefixtures('exact_hardswish')]
ANSWER = load_file(ANSWERS)


def assert_same(ours: torch.Tensor, authors: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(ours, authors, rtol=1e-9, atol=1e-9, msg=lambda m: f'{what}: {m}')


def with_author_weights(variant: str, seed: int) -> Any:
    model = timm.create_model(f'mobileformer_{variant}', dtype=torch.float64)
    model.load_state_dict(checkpoint_filter_fn(author_state_dict(variant, seed), model))
    return model.to(DEVICE).eval()


@pytest.mark.parametrize('height, width, batch, seed', EVAL_CASES)
@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_inference_equals_the_authors(variant, height, width, batch, seed):
    model = with_author_weights(variant, seed)
    x = author_input(height, width, batch, seed).to(DEVICE)
    answer = f'{variant}.{height}x{width}'

    blocks = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(lambda m, args, out: blocks.append(out))
    logits = model(x)

    for i, (ours, tokens) in enumerate(blocks):  # the first that differs shows where we left their road
        assert_same(sketch(ours.cpu()), ANSWER[f'{answer}.maps'][i], f'map after block {i}')
        assert_same(sketch(tokens.cpu()), ANSWER[f'{answer}.tokens'][i], f'tokens after block {i}')
    assert_same(sketch(logits.cpu()), ANSWER[f'{answer}.logits'], 'logits')

    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert_same(sketch(model(channels_last).cpu()), ANSWER[f'{answer}.logits'], 'logits, channels-last')
    fused = reparameterize_model(model)
    assert_same(sketch(fused(x).cpu()), ANSWER[f'{answer}.logits'], 'logits, reparameterized')


@pytest.mark.parametrize('variant', VARIANTS)
def test_training_equals_the_authors(variant):
    """Loss, gradients of the image and of every parameter, and the statistics that BatchNorm keeps."""
    height, width, batch, seed = TRAIN_CASE
    model = with_author_weights(variant, seed).train()
    x = author_input(height, width, batch, seed).to(DEVICE).requires_grad_()

    loss = F.cross_entropy(model(x), torch.arange(batch, device=DEVICE))
    loss.backward()
    model.cpu()

    assert_same(loss.cpu(), ANSWER[f'{variant}.train.loss'], 'loss')
    assert_same(sketch(x.grad.cpu()), ANSWER[f'{variant}.train.grad_input'], 'gradient of the image')
    buffers = {k: b for k, b in model.named_buffers() if k in model.state_dict()}
    for i, part in enumerate(parts(variant)):
        way = checkpoint_filter_fn(direction(variant, part), model)
        assert_same(along(way, gradients(model)), ANSWER[f'{variant}.train.grad'][i], f'gradient of {part}')
        assert_same(along(way, buffers), ANSWER[f'{variant}.train.stats'][i], f'statistics of {part}')
    assert all(b == 1 for k, b in buffers.items() if k.endswith('num_batches_tracked'))
