"""Batches of images to train on and to evaluate."""
import argparse
import math
from typing import Any, Iterator, List, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import create_loader, resolve_model_data_config
from torch.utils.data import DataLoader, RandomSampler, Sampler, WeightedRandomSampler

from .console import InputError
from .data import Data

__all__ = ['EvenBatches', 'Kept', 'make_loaders', 'set_batches']

MIN_BATCHES = 20  # in an epoch


def set_batches(args: argparse.Namespace, num_images: int) -> str:
    """Choose the batch size and the passes over the images in an epoch where they are not named; returns them in words.

    A few dozen images in one pass would be a single step. Passes are added until an epoch has `MIN_BATCHES`.
    """
    args.batch_size = args.batch_size or (64 if num_images >= 64 * MIN_BATCHES else 32)
    args.epoch_repeats = args.epoch_repeats or math.ceil(MIN_BATCHES * args.batch_size / num_images)
    num_batches = len(EvenBatches(range(args.epoch_repeats * num_images), args.batch_size))
    passes = f'{args.epoch_repeats} passes over the images' if args.epoch_repeats > 1 else 'one pass over the images'
    return f'an epoch is {passes} in {num_batches:,} batches of up to {args.batch_size}'


class EvenBatches(Sampler):
    """Batches of nearly the same size, of all indices that a sampler gives.

    Args:
        sampler: Gives indices of images.
        batch_size: Images in a batch at most, as long as none has a single one, on which BatchNorm cannot be trained.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler = sampler
        self.num_batches = max(1, min(math.ceil(len(sampler) / batch_size), len(sampler) // 2))

    def __iter__(self) -> Iterator[List[int]]:
        for indices in np.array_split(list(self.sampler), self.num_batches):
            yield indices.tolist()

    def __len__(self) -> int:
        return self.num_batches


class Kept:
    """Batches that are the same every time: kept in memory once they are read, if they fit into it.

    Validation images are read in full size, which takes longer than to train on as many.

    Args:
        loader: Yields images and targets.
        budget: Bytes that the images may take up.
    """

    def __init__(self, loader: Any, budget: int = 2 ** 30) -> None:
        self.loader = loader
        self.budget = budget
        self.batches: List[Tuple[torch.Tensor, torch.Tensor]] = []

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        if self.batches:
            yield from self.batches
            return
        batches, size = [], 0
        for images, targets in self.loader:
            size += images.nbytes
            if size <= self.budget:
                batches.append((images.clone(), targets.clone()))  # those of workers are in shared memory
            else:
                batches.clear()
            yield images, targets
        self.batches = batches

    def __len__(self) -> int:
        return len(self.loader)


def make_loaders(args: argparse.Namespace, data: Data, model: nn.Module, device: torch.device) -> Tuple[Any, Any]:
    """Batches to train on and to evaluate; workers live for an epoch, whose seed theirs follow."""
    settings = dict(resolve_model_data_config(model, vars(args)), device=device, num_workers=args.workers,
                    persistent_workers=False)
    try:
        train = create_loader(
            data.train,  # type: ignore[arg-type]  # it asks for no more than a dataset with a transform
            batch_size=args.batch_size, is_training=True, scale=args.scale, hflip=args.hflip, auto_augment=args.aa,
            **settings)
    except AssertionError as e:  # timm knows no such policy
        raise InputError(f'--aa {args.aa}: {e}') from e
    num_samples = args.epoch_repeats * len(data.train)
    sampler: Any = RandomSampler(data.train, num_samples=num_samples)
    if args.balanced:
        targets = torch.tensor([target for _, target in data.train.samples])
        sampler = WeightedRandomSampler((1 / targets.bincount())[targets].tolist(), num_samples)
    train.loader = DataLoader(  # as timm's, which drops the last batch
        data.train, batch_sampler=EvenBatches(sampler, args.batch_size), num_workers=args.workers,
        collate_fn=train.loader.collate_fn, worker_init_fn=train.loader.worker_init_fn)
    val: Any = create_loader(
        data.val, batch_size=args.batch_size, **settings)  # type: ignore[arg-type]
    val.loader = Kept(val.loader)  # in 8 bits, before they are normalized
    return train, val
