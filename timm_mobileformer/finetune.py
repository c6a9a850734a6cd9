"""Fine-tune a Mobile-Former, or any timm model, on a folder of images; without one, on real handwritten digits.

    python -m timm_mobileformer.finetune
    python -m timm_mobileformer.finetune --data-dir FOLDER --model mobileformer_294m --pretrained --layer-decay 0.75

FOLDER holds the usual class folders, `train/CLASS/…` and `validation/CLASS/…` (or `val/CLASS/…`). Everything is made of
timm's parts; for whatever is not an option here, timm's own train.py takes the models as well.

The same seed gives the same result, bit for bit on a CPU as long as threads and workers stay the same in number; on
an accelerator up to those of its kernels that add up in no fixed order.
"""
import argparse
import difflib
import importlib.util
import math
import os
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Set
from contextlib import nullcontext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from PIL import Image
from safetensors import SafetensorError
from timm.data import ImageDataset, create_dataset, create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint, resolve_model_input_args, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, random_seed
from tqdm import tqdm

from .digits import folder_or_digits

# what timm takes for the names of both splits
SPLITS = {'train': ('train', 'training'), 'validation': ('validation', 'val', 'valid', 'eval', 'evaluation')}
DIGITS = dict(img_size=64, epochs=12, lr=2e-3, scale=(0.7, 1.0), hflip=0.)  # instead of the defaults for a folder


class InputError(Exception):
    """What the user gave cannot be used; the text says what was wrong and what would be right."""


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_mobileformer.finetune',
        description='Fine-tune a Mobile-Former on a folder of images; without --data-dir, on the handwritten digits of '
                    'scikit-learn. Options are called what they are called in train.py of timm.')
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', metavar='DIR', type=Path,
                       help='folder with train/CLASS/… and validation/CLASS/… (default: the digits)')
    group.add_argument('--img-size', metavar='N', type=int, help="default: the model's; digits: 64")
    group.add_argument('--scale', type=float, nargs=2, default=(0.35, 1.0), metavar='PCT',
                       help='area of the random crops in training (default: 0.35 1.0; digits: 0.7 1.0)')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P',
                       help='probability of a horizontal flip in training (default: 0.5; digits: 0)')
    group.add_argument('--aa', metavar='NAME', help='AutoAugment policy, such as rand-m9-mstd0.5 (default: none)')
    group.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='processes that read images')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='mobileformer_52m', metavar='NAME')
    group.add_argument('--pretrained', action='store_true', help='start from the published weights of the model')
    group.add_argument('--pretrained-path', metavar='FILE',
                       help="start from this file as if it held the published weights (the authors' files, for one)")
    group.add_argument('--initial-checkpoint', metavar='FILE', help='start from a checkpoint of the same classes')
    group.add_argument('--drop', type=float, metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')

    group = parser.add_argument_group('training')
    group.add_argument('--epochs', type=int, default=30, metavar='N', help='default: 30; digits: 12')
    group.add_argument('-b', '--batch-size', type=int, default=64, metavar='N')
    group.add_argument('--lr', type=float, default=1e-3, help='of AdamW, at its highest (default: 1e-3; digits: 2e-3)')
    group.add_argument('--weight-decay', type=float, default=0.05, metavar='W')
    group.add_argument('--layer-decay', type=float, metavar='R',
                       help='ratio of learning rates from one layer to the layer above')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='P', help='of labels')
    group.add_argument('--seed', type=int, default=42, metavar='N')

    group = parser.add_argument_group('where')
    group.add_argument('--device', help='default: the accelerator that PyTorch finds, else the CPU')
    group.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    group.add_argument('--output', type=Path, default=Path('output/finetune'), metavar='DIR',
                       help='new folder for all that is written (default: output/finetune)')
    return parser


def parse_args() -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args()
    if args.data_dir is None:
        parser.set_defaults(**DIGITS)
        args = parser.parse_args()
    for name, least in dict(img_size=32, epochs=1, batch_size=2, workers=0, lr=0, weight_decay=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name.replace("_", "-")} must be at least {least}, not {value}')
    if not 0 <= args.smoothing < 1:
        parser.error(f'--smoothing must be at least 0 and less than 1, not {args.smoothing}')
    return args


def some(names: Iterable[Any], limit: int = 5) -> str:
    names = sorted(str(n) for n in names) if isinstance(names, Set) else [str(n) for n in names]
    return ', '.join(names[:limit]) + (f' and {len(names) - limit:,} more' if len(names) > limit else '')


def open_split(root: Path, split: str) -> ImageDataset:
    """The images of `root/split` in their class folders, every class with at least one."""
    if not root.is_dir():
        raise InputError(f'{root} is not a folder')
    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if folder is None:
        raise InputError(f'{root} has no folder {" or ".join(SPLITS[split])}, with a folder of images for every class')
    try:
        dataset = create_dataset('', root=str(folder), split=split, search_split=False)
    except RuntimeError as e:  # not one image
        raise InputError(str(e)) from e
    inside = [Path(name).parts for name in dataset.filenames()]
    loose = [parts[0] for parts in inside if len(parts) == 1]
    if loose:
        raise InputError(f'{folder} holds images outside of class folders: {some(loose)}')
    empty = sorted({f.name for f in folder.iterdir() if f.is_dir()} - {parts[0] for parts in inside})
    if empty:
        raise InputError(f'no image in {some(folder / name for name in empty)}; fill or remove it')
    return dataset


def open_data(root: Path) -> Tuple[ImageDataset, ImageDataset, List[str]]:
    """Both splits and the names of their classes, by index."""
    train, held_out = (open_split(root, split) for split in SPLITS)
    classes, others = train.reader.class_to_idx, held_out.reader.class_to_idx
    if classes != others:
        raise InputError(f'the classes differ: only in {train.reader.root}: {some(classes.keys() - others) or "none"}; '
                         f'only in {held_out.reader.root}: {some(others.keys() - classes) or "none"}')
    if len(classes) < 2:
        raise InputError(f'{train.reader.root} has one class only ({some(classes)}); at least two are needed')
    return train, held_out, list(classes)


def decode(path: str) -> Optional[str]:
    """Read an image to its last byte; what is wrong with it, or None."""
    try:
        with Image.open(path) as image:
            image.draft('RGB', (1, 1))  # a JPEG at an eighth of its size, the fastest
            image.load()
    except Exception as e:  # Pillow's decoders raise many kinds
        return f'{path} ({e})' if path not in str(e) else str(e)
    return None


def check_images(datasets: List[ImageDataset], workers: int) -> None:
    """Refuse images that cannot be read, which timm's datasets would replace by others."""
    paths = [path for dataset in datasets for path in dataset.filenames(absolute=True)]
    with ThreadPool(max(workers, 1)) as pool:
        results = tqdm(pool.imap(decode, paths, chunksize=16), 'checking images', len(paths), leave=False, delay=1)
        bad = [problem for problem in results if problem]
    if bad:
        raise InputError(f'{len(bad):,} of {len(paths):,} images cannot be read: {some(bad)}')


def load_model(args: argparse.Namespace, num_classes: int) -> Tuple[nn.Module, Dict[str, int]]:
    """The model to start from, and the image size as an argument of it if it is built for one size."""
    try:
        input_args = resolve_model_input_args(args.model, {'img_size': args.img_size})
        size_args = {k: v for k, v in input_args.items() if k == 'img_size'}
        overlay = None
        if args.pretrained_path:
            overlay = dict(file=args.pretrained_path, num_classes=-1)  # -1: never its classifier, as train.py does
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained or overlay is not None,
            pretrained_cfg_overlay=overlay,
            checkpoint_path=args.initial_checkpoint,
            num_classes=num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **size_args,
        )
        return model, size_args
    except Exception as e:  # files, networks and models fail in ways of their own
        source = args.initial_checkpoint or args.pretrained_path
        if source and not os.path.isfile(source):
            raise InputError(f'no such checkpoint: {source}') from e
        reason = textwrap.shorten(str(e) or type(e).__name__, 600)
        if str(e).startswith('Unknown model'):
            similar = difflib.get_close_matches(args.model, timm.list_models())
            raise InputError(reason + (f'; similar: {some(similar)}' if similar else '')) from e
        raise InputError(f'{args.model} cannot start from {source}: {reason}' if source else reason) from e


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (N, classes) and targets (N) of all images, in the order of the dataset."""
    model.eval()
    outputs = [(model(images).float().softmax(-1).cpu(), target.cpu()) for images, target in loader]
    probs, targets = zip(*outputs, strict=True)
    return torch.cat(probs), torch.cat(targets)


def train(
        args: argparse.Namespace,
        model: nn.Module,
        loader: Any,
        held_out_loader: Any,
) -> Tuple[int, float]:
    """Train, and keep a checkpoint of the last and of the best epoch by held-out top-1.

    Returns:
        Which epoch was the best, from 0, and top-1 of the last one in percent.
    """
    device = next(model.parameters()).device
    loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=args.epochs / 10, warmup_lr=args.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)
    saved_args = argparse.Namespace(**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    saver = CheckpointSaver(model, optimizer, saved_args, ema, checkpoint_dir=str(args.output), max_history=1)
    autocast = torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()

    args.output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(desc='training', total=args.epochs * len(loader), unit='batch')
    try:
        for epoch in range(args.epochs):
            model.train()
            losses = AverageMeter()
            for i, (images, target) in enumerate(loader):
                with autocast:
                    loss = loss_fn(model(images), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step = epoch * len(loader) + i + 1
                scheduler.step_update(step)
                ema.update(model, step)
                losses.update(loss.detach(), len(target))
                if i % 10 == 0 or i == len(loader) - 1:  # seldom, since the device is waited for
                    if not math.isfinite(losses.avg):
                        raise InputError(f'the loss became {losses.avg} in epoch {epoch + 1}; a smaller --lr may help'
                                         + kept(args.output))
                    bar.set_postfix(loss=f'{losses.avg:.3f}')
                bar.update()
            probs, targets = evaluate(ema.module, held_out_loader)
            top1 = accuracy(probs, targets)[0].item()
            try:
                _, best_epoch = saver.save_checkpoint(epoch, top1)
            except RuntimeError as e:  # what PyTorch's writer makes of an OSError
                raise InputError(f'no checkpoint could be written to {args.output}; is the disk full? ({e})'
                                 + kept(args.output)) from e
            bar.write(f'epoch {epoch + 1:3} of {args.epochs}: loss {losses.avg:.4f}, held-out top-1 {top1:.2f} %')
    finally:
        bar.close()
        (args.output / 'tmp.pth.tar').unlink(missing_ok=True)  # of a checkpoint that could not be finished
        if not any(args.output.iterdir()):
            args.output.rmdir()
    return best_epoch, top1


def kept(output: Path) -> str:
    best = output / 'model_best.pth.tar'
    return f'; {best} is of the best epoch so far' if best.exists() else ''


def summarize(probs: torch.Tensor, targets: torch.Tensor, classes: List[str]) -> str:
    """The classes told apart worst and the commonest mistakes, a line each."""
    pred = probs.argmax(-1)
    wrong = (pred != targets).nonzero()[:, 0].tolist()
    if not wrong:
        return 'no mistakes'
    right = [(pred[targets == c] == c).float().mean().item() for c in range(len(classes))]
    worst = sorted((c for c in range(len(classes)) if right[c] < 1), key=lambda c: right[c])
    pairs = Counter((int(targets[i]), int(pred[i])) for i in wrong).most_common()
    return '\n'.join([
        'lowest top-1 by class: ' + some((f'{classes[c]} {100 * right[c]:.1f} %' for c in worst), 10),
        'mistakes, class → predicted: ' + some((f'{classes[t]} → {classes[p]} ({n}×)' for (t, p), n in pairs), 10),
    ])


def draw(
        path: Path,
        dataset: ImageDataset,
        probs: torch.Tensor,
        targets: torch.Tensor,
        classes: List[str],
        rows: int = 3,
        cols: int = 10,
) -> None:
    """Draw images and predictions, the mistakes first and then the least certain."""
    from matplotlib.figure import Figure

    confidence, pred = probs.max(-1)
    correct = pred == targets
    order = sorted(range(len(targets)), key=lambda i: (correct[i].item(), probs[i, targets[i]].item()))[:rows * cols]
    rows = math.ceil(len(order) / cols)
    figure = Figure(figsize=(cols, 1.22 * rows + 0.35), dpi=150, layout='constrained')
    figure.suptitle(f'{(~correct).sum():,} of {len(targets):,} held-out images mistaken (red), then the least certain: '
                    'prediction · probability', fontsize=10)
    all_axes = figure.subplots(rows, cols, squeeze=False).ravel()
    for axes in all_axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for i, axes in zip(order, all_axes, strict=False):
        with Image.open(dataset.filename(i, absolute=True)) as image:
            axes.imshow(image.convert('RGB'), interpolation='nearest' if max(image.size) < 64 else 'antialiased')
        name, true = (n if len(n) <= 12 else f'{n[:11]}…' for n in (classes[pred[i]], classes[targets[i]]))
        axes.set_title(f'{name} · {100 * confidence[i]:.0f} %', fontsize=8, pad=3, color='k' if correct[i] else 'C3')
        if not correct[i]:
            axes.spines[:].set(visible=True, color='C3', linewidth=2)
            axes.text(0.05, 0.05, f'is {true}', transform=axes.transAxes, fontsize=7, color='w',
                      bbox=dict(facecolor='C3', edgecolor='none', pad=1.5))
    figure.savefig(path)


def finetune(args: argparse.Namespace) -> None:
    output = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f'{output} is there already; name a new folder with --output, or remove it')
    *datasets, classes = open_data(args.data_dir)
    random_seed(args.seed)
    model, size_args = load_model(args, len(classes))
    if args.device is None:
        args.device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else 'cpu'
    try:
        device = torch.device(args.device)
        model.to(device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f'--device {args.device}: {textwrap.shorten(str(e), 300)}') from e
    check_images(datasets, args.workers)
    if device.type == 'cpu':  # a thread that has to wait for its core stalls all the others
        torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))
    picture = importlib.util.find_spec('matplotlib') is not None
    if not picture:
        print("no picture will be drawn: pip install 'timm_mobileformer[demo]' brings matplotlib")

    data_config = resolve_model_data_config(model, vars(args))
    try:
        loader, held_out_loader = (
            create_loader(
                dataset,
                batch_size=min(args.batch_size, len(dataset)),
                is_training=dataset is datasets[0],
                scale=args.scale,
                hflip=args.hflip,
                auto_augment=args.aa,
                num_workers=args.workers,
                device=device,
                **data_config,
            ) for dataset in datasets)
    except AssertionError as e:  # timm knows no such policy
        raise InputError(f'--aa {args.aa}: {e}') from e
    print(f'{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}; '
          f'{len(classes):,} classes, {len(datasets[0]):,} images to train on, {len(datasets[1]):,} held out, '
          f'{" × ".join(map(str, data_config["input_size"][1:]))} pixels')
    best_epoch, last = train(args, model, loader, held_out_loader)

    checkpoint = str(output / 'model_best.pth.tar')
    load_checkpoint(model, checkpoint)  # what was saved is what is reported
    probs, targets = evaluate(model, held_out_loader)
    model_config = {'label_names': classes, 'pretrained_cfg': {'tag': 'finetuned'}}
    with tempfile.TemporaryDirectory(dir=output) as complete:  # nothing half-written
        save_for_hf(model.cpu(), complete, model_config, safe_serialization=True, data_config=data_config)
        if picture:
            draw(Path(complete) / 'predictions.png', datasets[1], probs, targets, classes)
        for path in Path(complete).iterdir():
            os.replace(path, output / path.name)

    correct = (probs.argmax(-1) == targets).sum()
    print(f'held-out top-1 {accuracy(probs, targets)[0]:.2f} % ({correct:,} of {len(targets):,}), by the best epoch, '
          f'{best_epoch + 1}; {last:.2f} % by the last')
    print(summarize(probs, targets, classes))
    print(f'written to {output}: {", ".join(sorted(path.name for path in output.iterdir()))}')
    model_args = dict(num_classes=len(classes), checkpoint_path=checkpoint, **size_args)
    print(f"timm.create_model('{args.model}', {', '.join(f'{k}={v!r}' for k, v in model_args.items())}) loads it,")
    print(f"timm.create_model('local-dir:{output}', pretrained=True) with its class names and image size as well")


def main() -> None:
    args = parse_args()
    try:
        with folder_or_digits(args.data_dir) as args.data_dir:
            finetune(args)
    except (InputError, ModuleNotFoundError, OSError, SafetensorError) as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted' + kept(args.output), file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
