"""Checkpoints as the authors' program writes them, filled with seeded numbers instead of trained weights.

The numbers depend on the seed and on each tensor's name alone, so that the authors' program and ours can run the same
network without having met. What theirs answered, run by record_authors.py, is kept in authors.safetensors.
"""
import zlib
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import numpy as np
import torch

# Stem channels, tokens, their width, hidden width of the classifier, groups of the 1x1 convolutions; and the blocks,
# each as [L]ite, [D]own (two expansions) or plain [B]lock with its expansions and its channels.
VARIANTS: Dict[str, Tuple[int, int, int, int, int, str]] = {
    '26m': (8, 3, 128, 1024, 4, 'L3:12 B3:12 D6,4:24 B3:24 D6,4:48 B4:48 B6:64 D6,4:96 B6:96'),
    '52m': (8, 3, 128, 1024, 1, 'L3:12 B3:12 D6,4:24 B3:24 D6,4:48 B4:48 B6:64 D6,4:96 B6:96'),
    '96m': (12, 4, 128, 1280, 1, 'L2:12 D6,4:16 D6,4:32 B3:32 D6,4:64 B4:64 B6:88 D6,4:128 B6:128'),
    '151m': (12, 6, 192, 1280, 1,
             'L2:12 D6,4:16 B3:16 D6,4:32 B3:32 D6,4:64 B4:64 B6:88 B6:88 D6,4:128 B6:128 B6:128'),
    '214m': (12, 6, 192, 1600, 1,
             'L2:12 D6,4:20 B3:20 D6,4:40 B4:40 D6,4:80 B4:80 B6:112 B6:112 D6,4:160 B6:160 B6:160'),
    '294m': (16, 6, 192, 1920, 1,
             'L2:16 D6,4:24 B4:24 D6,4:48 B4:48 D6,4:96 B4:96 B6:128 B6:128 D6,4:192 B6:192 B6:192'),
    '508m': (24, 6, 192, 1920, 1,
             'L2:24 D6,4:40 B3:40 D6,4:72 B3:72 D6,4:128 B4:128 B6:176 B6:176 D6,4:240 B6:240 B6:240'),
}
# Height, width, batch and seed of what was asked in evaluation and in training mode.
EVAL_CASES = ((224, 224, 2, 0), (160, 96, 2, 1), (45, 67, 1, 2))
TRAIN_CASE = (96, 64, 3, 3)
ANSWERS = Path(__file__).with_name('authors.safetensors')

Shapes = Iterator[Tuple[str, Tuple[int, ...]]]


def _norm(name: str, chs: int) -> Shapes:
    yield from ((f'{name}.weight', (chs,)), (f'{name}.bias', (chs,)))


def _batch_norm(name: str, chs: int) -> Shapes:
    yield from _norm(name, chs)
    yield from ((f'{name}.running_mean', (chs,)), (f'{name}.running_var', (chs,)), (f'{name}.num_batches_tracked', ()))


def _linear(name: str, inp: int, out: int) -> Shapes:
    yield from ((f'{name}.weight', (out, inp)), (f'{name}.bias', (out,)))


def _conv_norm(conv: str, norm: str, inp: int, out: int, kernel: int, groups: int) -> Shapes:
    yield f'{conv}.weight', (out, inp // groups, kernel, kernel)
    yield from _batch_norm(norm, out)


def _bridge(name: str, chs: int, dim: int) -> Shapes:
    yield from _linear(f'{name}.alpha.0', dim, chs)
    yield from _linear(f'{name}.q', dim, chs)
    yield from _linear(f'{name}.proj', chs, dim)
    yield from _norm(f'{name}.layer_norm', dim)


def _block(name: str, kind: str, expand: Tuple[int, ...], inp: int, out: int, dim: int, groups: int) -> Shapes:
    if kind == 'L':
        mid = inp * expand[0]
        yield from _conv_norm(f'{name}.conv.0', f'{name}.conv.1', inp, mid, 3, inp)
        yield from _conv_norm(f'{name}.conv.4', f'{name}.conv.5', mid, out, 1, groups)
        return
    if kind == 'D':  # the convolutions, and the number of the dynamic ReLU that follows
        mid1, mid2 = inp * expand[0], out * expand[1]
        convs = ((inp, mid1, 3, inp, 1), (mid1, out, 1, groups, 0), (out, mid2, 3, out, 3), (mid2, out, 1, groups, 0))
    else:
        mid = inp * expand[0]
        convs = ((inp, mid, 1, groups, 1), (mid, mid, 3, mid, 2), (mid, out, 1, groups, 0))
    for i, (*conv, hyper) in enumerate(convs, 1):
        yield from _conv_norm(f'{name}.conv{i}.0', f'{name}.conv{i}.1', *conv)
        if hyper:
            yield from _linear(f'{name}.hyper{hyper}.hyper.0', dim, dim // 4)
            yield from _linear(f'{name}.hyper{hyper}.hyper.2', dim // 4, 2 * conv[1])
    yield from _bridge(f'{name}.local_global', inp, dim)
    yield from _linear(f'{name}.global_block.ffn.0', dim, 2 * dim)
    yield from _linear(f'{name}.global_block.ffn.2', 2 * dim, dim)
    yield from _norm(f'{name}.global_block.ffn_norm', dim)
    yield from _linear(f'{name}.global_block.q', dim, dim)
    yield from _linear(f'{name}.global_block.channel_mlp', dim, dim)
    yield from _norm(f'{name}.global_block.layer_norm', dim)
    yield from _linear(f'{name}.global_local.k', dim, out)
    yield from _linear(f'{name}.global_local.proj', dim, out)


def _shapes(variant: str) -> Shapes:
    chs, num_tokens, dim, hidden, groups, blocks = VARIANTS[variant]
    yield 'tokens.weight', (num_tokens, dim)
    yield from _conv_norm('stem.0', 'stem.1', 3, chs, 3, 1)
    for i, block in enumerate(blocks.split()):
        expand, out = block[1:].split(':')
        yield from _block(
            f'features.{i}', block[0], tuple(map(int, expand.split(','))), chs, int(out), dim, groups)
        chs = int(out)
    yield from _bridge('local_global', chs, dim)
    yield from _conv_norm('classifier.conv.1', 'classifier.conv.2', chs, 6 * chs, 1, groups)
    yield from _linear('classifier.fc.0', 6 * chs + dim, hidden)
    yield from _batch_norm('classifier.fc.1', hidden)
    yield from _linear('classifier.classifier.1', hidden, 1000)


def seeded(shape: Tuple[int, ...], *key: object) -> torch.Tensor:
    """float64 numbers N(0, 1) which depend on nothing but the key."""
    seed = zlib.crc32(':'.join(map(str, key)).encode())
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def author_state_dict(variant: str, seed: int = 0) -> Dict[str, torch.Tensor]:
    """Every tensor of an authors' checkpoint, in their layout, float64.

    Args:
        variant: '26m', '52m', '96m', '151m', '214m', '294m' or '508m'.
        seed: Another seed, other numbers.
    """
    out = {}
    for name, shape in _shapes(variant):
        if not shape:
            out[name] = torch.zeros((), dtype=torch.long)
            continue
        values = seeded(shape, seed, name).numpy()
        if name.endswith('running_var'):
            values = np.exp(0.2 * values)
        elif len(shape) == 1:
            values = 0.1 * values + name.endswith('.weight')  # of a norm layer
        elif name != 'tokens.weight':
            values = values * (1.15 / np.sqrt(np.prod(shape[1:])))
        out[name] = torch.from_numpy(values)
    return out


def author_input(height: int = 224, width: int = 224, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """A float64 batch (B, 3, H, W) in about the range of normalised images."""
    return seeded((batch, 3, height, width), 'input', seed, batch, height, width)


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor (B, ...) in four numbers an image, products with random numbers: each feels every entry."""
    flat = tensor.flatten(1)
    return flat @ seeded((flat.shape[1], 4), 'sketch')


def parts(variant: str) -> List[str]:
    """The parts of an authors' network: 'tokens', 'stem', 'features.0', ..."""
    return list(dict.fromkeys(_part_of(name) for name, _ in _shapes(variant)))


def _part_of(name: str) -> str:
    return '.'.join(name.split('.')[:2 if name.startswith('features') else 1])


def direction(variant: str, part: str) -> Dict[str, torch.Tensor]:
    """An authors' checkpoint that is random in one part's tensors and 0 everywhere else.

    Gradients and statistics are compared along it. It goes through `checkpoint_filter_fn` like any checkpoint, so the
    comparison holds whatever tensors ours merges.
    """
    return {
        name: seeded(shape, 'direction', name) if shape and _part_of(name) == part else
        torch.zeros((), dtype=torch.float64).expand(shape)
        for name, shape in _shapes(variant)
    }


def along(way: Dict[str, torch.Tensor], tensors: Dict[str, torch.Tensor]) -> torch.Tensor:
    """The inner product of a direction and of what lies in it: gradients by parameter, or buffers, by name."""
    return sum(((way[k] * t).sum() for k, t in tensors.items()), torch.zeros((), dtype=torch.float64))


def gradients(model: torch.nn.Module) -> Dict[str, torch.Tensor]:
    return {k: p.grad for k, p in model.named_parameters()}
