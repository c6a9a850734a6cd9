"""Fine-tune a Mobile-Former, or any timm model, on folders of pictures; without one, on real handwritten digits.

The same seed gives the same result, in one go or interrupted and resumed, bit for bit on a CPU as long as threads and
workers stay the same in number: every epoch begins with seeds of its own, and takes along the model, the state of the
optimizer and what was measured, nothing else.
"""
import argparse
import csv
import hashlib
import importlib.util
import math
import os
import textwrap
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_state_dict, save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed, update_summary
from torch.utils.data import WeightedRandomSampler

from .data import Data, check_images, open_data, read_image
from .digits import folder_or_digits
from .files import save_figure, whole
from .load import find_model, load_model, model_args, pick_device, set_data_config
from .terminal import InputError, abbreviate, progress, quote, reason

PATHS = 'data_dir', 'labels', 'checkpoint'
History = List[Dict[str, Any]]  # of every epoch, the arguments of timm's update_summary


def best_epoch(history: History) -> int:
    """That of the highest held-out top-1, and of the lowest loss among those."""
    metrics = [row['eval_metrics'] for row in history]
    return max(range(len(history)), key=lambda epoch: (metrics[epoch]['top1'], -metrics[epoch]['loss']))


def make_loaders(args: argparse.Namespace, data: Data, model: nn.Module, device: torch.device) -> Tuple[Any, Any]:
    """Batches to train on and to evaluate; workers live for an epoch, whose seed theirs follow."""
    settings = dict(resolve_model_data_config(model, vars(args)), device=device, num_workers=args.workers,
                    persistent_workers=False)
    try:
        train = create_loader(
            data.train,  # type: ignore[arg-type]  # it asks for no more than a dataset with a transform
            batch_size=min(args.batch_size, len(data.train)), is_training=True, scale=args.scale, hflip=args.hflip,
            auto_augment=args.aa, **settings)
    except AssertionError as e:  # timm knows no such policy
        raise InputError(f'--aa {args.aa}: {e}') from e
    if args.balanced:
        targets = torch.tensor([target for _, target in data.train.samples])
        train.batch_sampler.sampler = WeightedRandomSampler((1 / targets.bincount())[targets].tolist(), len(targets))
    return train, create_loader(
        data.held_out, batch_size=args.batch_size, **settings)  # type: ignore[arg-type]


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, classes) and targets (N) of all pictures, in the order of the dataset."""
    model.eval()
    outputs = [(model(images).float().cpu(), target.cpu()) for images, target in loader]
    logits, targets = zip(*outputs, strict=True)
    return torch.cat(logits), torch.cat(targets)


def measure(logits: torch.Tensor, targets: torch.Tensor) -> Dict[str, float]:
    """Loss, top-1 and top-5 in percent, as timm's train.py has them."""
    top1, top5 = accuracy(logits, targets, (1, 5))
    return {'loss': F.cross_entropy(logits, targets).item(), 'top1': top1.item(), 'top5': top5.item()}


def train_epoch(args: argparse.Namespace, model: nn.Module, loader: Any, optimizer: Any, scheduler: Any, step: int,
                bar: Any) -> float:
    """One pass over the pictures, after `step` batches; returns the mean loss."""
    loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    device_type = next(model.parameters()).device.type
    autocast = torch.autocast(device_type, torch.bfloat16) if args.amp else nullcontext()
    losses = AverageMeter()
    model.train()
    for images, target in loader:
        with autocast:
            loss = loss_fn(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        scheduler.step_update(step)
        losses.update(loss.detach(), len(target))
        bar.update()
        if step % 10 == 0:  # seldom, since the device is waited for
            bar.set_postfix(loss=f'{losses.avg:.3f}')
            if not math.isfinite(losses.avg):
                break
    return float(losses.avg)


def train(args: argparse.Namespace, model: nn.Module, loaders: Tuple[Any, Any], history: History, save: Any,
          optimizer_state: Any = None) -> None:
    """Train from where `history` ends, and append to it; `save` gets optimizer and history after every epoch."""
    loader, held_out_loader = loaders
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=args.epochs / 10, warmup_lr=args.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
    with progress(desc='training', total=args.epochs * len(loader), initial=len(history) * len(loader)) as bar:
        for epoch in range(len(history), args.epochs):
            if args.patience and history and epoch - 1 - best_epoch(history) >= args.patience:
                bar.write(f'no better epoch in {args.patience}: training ends')
                break
            random_seed(int(np.random.SeedSequence((args.seed, epoch)).generate_state(1)[0]))
            loss = train_epoch(args, model, loader, optimizer, scheduler, epoch * len(loader), bar)
            if not math.isfinite(loss):
                raise InputError(f'the loss became {loss} in epoch {epoch + 1}; a smaller --lr may help')
            metrics = measure(*evaluate(model, held_out_loader))
            rates = [group['lr'] for group in optimizer.param_groups]
            row = dict(epoch=epoch, train_metrics={'loss': loss}, eval_metrics=metrics, lr=sum(rates) / len(rates))
            save(optimizer, [*history, row])
            history.append(row)
            bar.write(f'epoch {epoch + 1:3} of {args.epochs}: loss {loss:.4f}, held out: loss {metrics["loss"]:.4f}, '
                      f'top-1 {metrics["top1"]:.2f} %')


def save_epoch(args: argparse.Namespace, model: Any, classes: List[str], kwargs: Dict[str, Any], pictures: str,
               optimizer: Any, history: History) -> None:
    """Leave a folder from which the best weights can be loaded, and the run be continued."""
    state = dict(
        epoch=len(history) - 1, arch=model.pretrained_cfg['architecture'], state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        metric=history[-1]['eval_metrics']['top1'], version=2, history=history, pictures=pictures)
    try:
        if best_epoch(history) == len(history) - 1:
            with whole(args.output) as folder:
                save_for_hf(model, str(folder), {'label_names': classes}, kwargs, safe_serialization=True)
        with whole(args.output) as folder:  # last, so that what is continued has its weights
            torch.save(state, folder / 'last.pth.tar')
            for row in history:
                update_summary(**row, filename=folder / 'summary.csv', write_header=row is history[0])
    except (OSError, RuntimeError, SafetensorError) as e:  # PyTorch's writer makes the second of the first
        raise InputError(f'nothing could be written to {args.output}; is the disk full? ({e})') from e


def read_state(folder: Path) -> Dict[str, Any]:
    """What `save_epoch` left in a folder.

    Raises:
        InputError: It left nothing there.
    """
    path = folder / 'last.pth.tar'
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        args = {key: Path(value) if value and key in PATHS else value for key, value in state['args'].items()}
        return {**{key: state[key] for key in ('state_dict', 'optimizer', 'history', 'pictures')}, 'args': args}
    except FileNotFoundError as e:
        raise InputError(f'no run to go on with in {folder}: it has no last.pth.tar') from e
    except Exception as e:  # a damaged or foreign file fails in many ways
        raise InputError(f'{path} is not what finetune writes, or damaged: {reason(e, 300)}') from e


def fingerprint(data: Data, root: Path) -> str:
    """Of the names and classes of all pictures, wherever the folder lies."""
    names = [[(os.path.relpath(path, root), target) for path, target in side.samples]
             for side in (data.train, data.held_out)]
    return hashlib.sha256(repr((names, data.classes)).encode()).hexdigest()


def by_class(predictions: torch.Tensor, targets: torch.Tensor, data: Data) -> Tuple[Any, List[Dict[str, Any]]]:
    """The confusion matrix, true classes as rows, and what it says of every class."""
    n = len(data.classes)
    confusion = (targets * n + predictions).bincount(minlength=n * n).view(n, n)
    trained_on = Counter(target for _, target in data.train.samples)
    rows = []
    for i, (held_out, predicted, right) in enumerate(zip(
            confusion.sum(1).tolist(), confusion.sum(0).tolist(), confusion.diagonal().tolist(), strict=True)):
        rows.append({'class': data.classes[i], 'train': trained_on[i], 'held_out': held_out, 'predicted': predicted,
                     'right': right, 'precision': right / predicted if predicted else '',
                     'recall': right / held_out if held_out else ''})
    return confusion.tolist(), rows


def summarize(predictions: torch.Tensor, targets: torch.Tensor, rows: List[Dict[str, Any]]) -> str:
    """Accuracy, the classes told apart worst and the commonest mistakes, a line each."""
    right = int((predictions == targets).sum())
    lines = [f'held-out top-1 {100 * right / len(targets):.2f} % ({right:,} of {len(targets):,})']
    present = [row for row in rows if row['held_out']]
    if len({row['held_out'] for row in present}) > 1:
        lines[0] += f', mean over classes {100 * sum(row["recall"] for row in present) / len(present):.2f} %'
    pairs = Counter((t, p) for t, p in zip(targets.tolist(), predictions.tolist(), strict=True) if t != p).most_common()
    if pairs:
        worst = sorted((row for row in present if row['recall'] < 1), key=lambda row: row['recall'])
        lines += [
            'lowest top-1 by class: ' + abbreviate(
                (f'{row["class"]} {100 * row["recall"]:.1f} %' for row in worst), 10),
            'mistakes, class → predicted: ' + abbreviate(
                (f'{rows[t]["class"]} → {rows[p]["class"]} ({n}×)' for (t, p), n in pairs), 10)]
    return '\n'.join(lines)


def draw_curve(path: Path, history: History) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.2), dpi=150, layout='constrained')
    left, right = figure.subplots(1, 2)
    epochs, best = range(1, len(history) + 1), best_epoch(history)
    top1 = [row['eval_metrics']['top1'] for row in history]
    style = '.-' if len(history) < 40 else '-'
    left.plot(epochs, [row['train_metrics']['loss'] for row in history], style, label='training, labels smoothed')
    left.plot(epochs, [row['eval_metrics']['loss'] for row in history], style, label='held out')
    right.plot(epochs, top1, style + 'C1')
    right.plot(best + 1, top1[best], 'oC3', label=f'kept: epoch {best + 1}, {top1[best]:.2f} %')
    for axes, name in (left, 'loss'), (right, 'held-out top-1, %'):
        axes.set(xlabel='epoch', ylabel=name, xlim=(0.5, len(history) + 0.5))
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save_figure(figure, path)


def name_lines(name: str, width: int = 22, rows: int = 3) -> str:
    """A class name in a few short lines; where it is too long, its middle is left out."""
    room = width * rows - 8
    name = name.encode(errors='replace').decode()  # of a folder whose name is not in UTF-8
    name = name if len(name) <= room else f'{name[:room // 2]} … {name[-room // 2:]}'
    return '\n'.join(textwrap.wrap(name, width) or ['?'])


def draw_predictions(path: Path, paths: Sequence[str], probs: torch.Tensor, targets: torch.Tensor, classes: List[str],
                     rows: int = 5, cols: int = 6) -> None:
    """Draw pictures and predictions, the mistakes first and then the least certain."""
    from matplotlib.figure import Figure

    confidence, predictions = probs.max(-1)
    correct = predictions == targets
    order = sorted(range(len(targets)), key=lambda i: (correct[i].item(), probs[i, targets[i]].item()))[:rows * cols]
    cols = min(cols, len(order))
    rows = math.ceil(len(order) / cols)
    figure = Figure(figsize=(max(2 * cols, 6), 2.6 * rows + 0.6), dpi=110, layout='constrained')
    figure.suptitle(f'{(~correct).sum():,} of {len(targets):,} held-out images mistaken (red), then the least certain\n'
                    'above: prediction and its probability; below: the class of a mistaken one', fontsize=12)
    all_axes = figure.subplots(rows, cols, squeeze=False).ravel()
    for axes in all_axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for i, axes in zip(order, all_axes, strict=False):
        image = read_image(paths[i])
        image.thumbnail((400, 400))
        axes.imshow(image, interpolation='nearest' if max(image.size) < 64 else 'antialiased')
        axes.set_title(f'{name_lines(classes[predictions[i]])}\n{100 * confidence[i]:.0f} %', fontsize=10, pad=3,
                       color='k' if correct[i] else 'C3', parse_math=False)
        if not correct[i]:
            axes.spines[:].set(visible=True, color='C3', linewidth=2)
            axes.set_xlabel(name_lines(classes[targets[i]]), fontsize=10, color='k', parse_math=False)
    save_figure(figure, path)


def report(args: argparse.Namespace, data: Data, logits: torch.Tensor, targets: torch.Tensor, history: History) -> str:
    """Write tables and pictures of the held-out images; returns the lines to print."""
    predictions = logits.argmax(-1)
    confusion, rows = by_class(predictions, targets, data)
    matrix = [[name, *counts] for name, counts in zip(data.classes, confusion, strict=True)]
    tables: Dict[str, Iterable[Iterable[Any]]] = {
        'classes.csv': [rows[0], *(row.values() for row in rows)], 'confusion.csv': [['class', *data.classes], *matrix]}
    with whole(args.output) as folder:
        for name, table in tables.items():
            with open(folder / name, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
                csv.writer(file).writerows(table)
        if importlib.util.find_spec('matplotlib'):
            draw_curve(folder / 'curve.png', history)
            draw_predictions(folder / 'predictions.png', [path for path, _ in data.held_out.samples],
                             logits.softmax(-1), targets, data.classes)
    return summarize(predictions, targets, rows)


def finetune(args: argparse.Namespace, root: Path, state: Optional[Dict[str, Any]]) -> None:
    data = open_data(root, args.labels, args.val_split)
    for remark in data.remarks:
        print(remark)
    pictures = fingerprint(data, root)
    if state and state['pictures'] != pictures:
        raise InputError(f'{args.output} was trained on other pictures than those in {root}')
    device = pick_device(args)
    if device.type == 'cpu':  # a thread that has to wait for its core stalls all the others
        torch.set_num_threads(args.threads or max(1, torch.get_num_threads() - args.workers))
    random_seed(args.seed)
    model = load_model(
        args, len(data.classes), weights=not state, drop_rate=args.drop, drop_path_rate=args.drop_path).to(device)
    history: History = []
    if state:
        model.load_state_dict(state['state_dict'])
        history = state['history']
    loaders = make_loaders(args, data, model, device)
    check_images([path for side in (data.train, data.held_out) for path, _ in side.samples], args.workers)
    data_config = set_data_config(model, vars(args))
    model.pretrained_cfg.update(
        tag='finetuned', num_classes=len(data.classes), label_offset=None, test_input_size=None, test_pool_size=None,
        test_crop_pct=None)
    kwargs = {**model_args(find_model(args.model), model.pretrained_cfg), 'num_classes': len(data.classes)}
    if not importlib.util.find_spec('matplotlib'):
        print("no pictures will be drawn: pip install 'timm_mobileformer[demo]' brings matplotlib")
    print(f'{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}; '
          f'{len(data.classes):,} classes, {len(data.train):,} images to train on, {len(data.held_out):,} held out, '
          f'{" × ".join(map(str, data_config["input_size"][1:]))} pixels'
          + (f'; {len(history)} of {args.epochs} epochs are done' if history else ''))

    with whole(args.output):  # refused before training if it cannot be written to
        pass
    try:
        save = partial(save_epoch, args, model, data.classes, kwargs, pictures)
        train(args, model, loaders, history, save, state and state['optimizer'])
    except (InputError, KeyboardInterrupt) as e:
        hint = (f'; {len(history)} of {args.epochs} epochs are done, to go on: '
                f'timm-mobileformer finetune --resume {quote(args.output)}')
        raise type(e)(f'{e}{hint}' if history else str(e)) from e
    model.load_state_dict(load_state_dict(str(args.output / 'model.safetensors')))  # what was saved is what is reported
    summary = report(args, data, *evaluate(model, loaders[1]), history)
    print(f'{summary}\nby the best epoch, {best_epoch(history) + 1} of {len(history)}; written to {args.output}: '
          f'{", ".join(sorted(path.name for path in args.output.iterdir()))}')
    print(f"timm.create_model({f'local-dir:{args.output}'!r}, pretrained=True) loads it")


def run(args: argparse.Namespace) -> None:
    state = None
    if args.resume:
        state = read_state(args.resume)
        named = {key: value for key, value in vars(args).items() if value is not None}
        args = argparse.Namespace(**{**state['args'], **named, 'output': args.resume})
    elif args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise InputError(f'{args.output} is there already; name a new folder with --output, remove it, or go on with '
                         f'--resume {quote(args.output)}')
    with folder_or_digits(args.data_dir or args.labels and args.labels.parent) as root:
        finetune(args, root, state)
