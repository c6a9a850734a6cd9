"""Batches of the training set and of the validation set."""
import argparse
import math
import random
from typing import Any, Iterator, List, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_loader
from timm.data.auto_augment import AugmentOp
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

from .console import InputError, plural
from .data import Data
from .load import model_data_config

__all__ = ['CachedBatches', 'EvenBatches', 'epoch_seed', 'make_loaders', 'set_batches']

MIN_BATCHES = 20  # per epoch


def set_batches(args: argparse.Namespace, num_images: int) -> str:
    """Fill in the options `batch_size` and `epoch_repeats` if they are None.

    One pass over a few dozen images would be a single step, so small training sets are repeated until an epoch has
    `MIN_BATCHES` batches.

    Args:
        args: Options of the run.
        num_images: Size of the training set.

    Returns:
        A description to print.
    """
    args.batch_size = args.batch_size or (64 if num_images >= 64 * MIN_BATCHES else 32)
    args.epoch_repeats = args.epoch_repeats or math.ceil(MIN_BATCHES * args.batch_size / num_images)
    num_batches = len(EvenBatches(range(args.epoch_repeats * num_images), args.batch_size))
    passes = f'{args.epoch_repeats} passes over the images' if args.epoch_repeats > 1 else 'one pass over the images'
    return f'an epoch is {passes} in {plural(num_batches, "batch")} of up to {args.batch_size}'


def epoch_seed(args: argparse.Namespace, epoch: int) -> int:
    """Return the random seed of an epoch of the run."""
    return int(np.random.SeedSequence((args.seed, epoch)).generate_state(1)[0])


class EvenBatches(Sampler):
    """Batch sampler that distributes all indices over batches whose sizes differ by one at most.

    Args:
        sampler: Sampler of the indices.
        batch_size: Maximum size of a batch. It is exceeded rather than leave a batch with a single image, since
            BatchNorm cannot be trained on one.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler = sampler
        self.num_batches = max(1, min(math.ceil(len(sampler) / batch_size), len(sampler) // 2))

    def __iter__(self) -> Iterator[List[int]]:
        for indices in np.array_split(list(self.sampler), self.num_batches):
            yield indices.tolist()

    def __len__(self) -> int:
        return self.num_batches


class EpochBatches(Sampler):
    """Batch sampler that repeats another one for several epochs, so that workers read on between epochs.

    Args:
        batches: Batch sampler of one epoch, which draws from `generator`.
        generator: Random number generator.
        seeds: Seed of each epoch.
    """

    def __init__(self, batches: EvenBatches, generator: torch.Generator, seeds: List[int]) -> None:
        self.batches = batches
        self.generator = generator
        self.seeds = seeds

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        """Yield batches of pairs of an index and a random seed, see `SeededImages`."""
        for seed in self.seeds:
            self.generator.manual_seed(seed)
            for batch in self.batches:
                seeds = torch.randint(2 ** 32, (len(batch),), generator=self.generator)
                yield list(zip(batch, seeds.tolist(), strict=True))

    def __len__(self) -> int:
        """Return the number of batches in one epoch."""
        return len(self.batches)


class SeededImages(Dataset):
    """Dataset that transforms every image with its own random seed, so that images do not depend on the workers."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            return self.images[index]


class CachedBatches:
    """Loader that keeps its batches in memory after the first pass, if they fit.

    Validation images are decoded at full size, which takes longer than a training step on as many images.

    Args:
        loader: Loader that yields the same images and targets in every pass.
        budget: Maximum size of the cached images in bytes.
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
                batches.append((images.clone(), targets.clone()))  # out of the workers' shared memory
            else:
                batches.clear()
            yield images, targets
        self.batches = batches

    def __len__(self) -> int:
        return len(self.loader)


def check_policy(policy: str) -> None:
    """Check that an AutoAugment policy works with the installed Pillow: from version 13 on, it cannot keep 0 bits.

    Raises:
        InputError: The policy would fail for some of the images.
    """
    if '-inc' in policy and 'mmax' not in policy:
        try:
            AugmentOp('PosterizeIncreasing', prob=1., magnitude=10)(Image.new('RGB', (1, 1)))
        except ValueError as e:
            raise InputError(f'--aa {policy}: at magnitude 10, timm\'s Posterize fails with this version of Pillow '
                             f'({e}); limit the magnitude with --aa {policy}-mmax9') from e


def make_loaders(args: argparse.Namespace, data: Data, model: nn.Module, device: torch.device,
                 done: int = 0) -> Tuple[Any, Any]:
    """Create the loaders of the training set and of the validation set.

    The first yields the batches of all epochs in turn; its length is that of one epoch. The batches do not depend on
    the number of workers, nor on how many epochs were done before.

    Args:
        args: Options of the run.
        data: Data set.
        model: Model whose `pretrained_cfg` has the preprocessing.
        device: Device of the batches.
        done: Number of epochs that are done already.

    Raises:
        InputError: timm does not know the AutoAugment policy `--aa`, or it does not work with the installed Pillow.
    """
    check_policy(args.aa or '')
    settings = dict(model_data_config(model, vars(args)), device=device, num_workers=args.workers,
                    persistent_workers=False)
    try:
        train = create_loader(
            data.train,  # type: ignore[arg-type]  # any dataset with a transform works
            batch_size=args.batch_size, is_training=True, scale=args.scale, hflip=args.hflip, auto_augment=args.aa,
            **settings)
    except AssertionError as e:  # from timm, for an unknown policy
        raise InputError(f'--aa {args.aa}: {e}') from e
    num_samples, generator = args.epoch_repeats * len(data.train), torch.Generator()
    sampler: Any = RandomSampler(data.train, num_samples=num_samples, generator=generator)
    if args.balanced:
        targets = torch.tensor([target for _, target in data.train.samples])
        weights = (1 / targets.bincount())[targets].tolist()
        sampler = WeightedRandomSampler(weights, num_samples, generator=generator)
    seeds = [epoch_seed(args, epoch) for epoch in range(done, args.epochs)]
    train.loader = DataLoader(  # like timm's, which would drop the last batch
        SeededImages(data.train), batch_sampler=EpochBatches(EvenBatches(sampler, args.batch_size), generator, seeds),
        num_workers=args.workers, collate_fn=train.loader.collate_fn, generator=generator)
    val: Any = create_loader(
        data.val, batch_size=args.batch_size, **settings)  # type: ignore[arg-type]
    val.loader = CachedBatches(val.loader)  # images in uint8, not normalized yet
    return train, val
