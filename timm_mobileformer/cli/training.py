"""Fine-tune a Mobile-Former, or any timm model, on folders of pictures; without one, on real handwritten digits.

The same seed gives the same result, in one go or interrupted and resumed, bit for bit on a CPU as long as threads and
workers stay the same in number: every epoch begins with seeds of its own, and takes along the model, the state of the
optimizer and what was measured, nothing else.
"""
import argparse
import hashlib
import importlib.util
import math
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

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

from .console import InputError, progress, quote, reason
from .data import Data, open_data
from .digits import folder_or_digits
from .files import atomic_dir
from .images import check_images
from .load import (
    find_model,
    load_model,
    model_args,
    pick_device,
    reading_options,
    set_data_config,
    set_white_level,
)
from .options import data_arguments
from .report import History, best_epoch, report

PATHS = 'data_dir', 'labels', 'checkpoint'


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
            with atomic_dir(args.output) as folder:
                save_for_hf(model, str(folder), {'label_names': classes}, kwargs, safe_serialization=True)
        with atomic_dir(args.output) as folder:  # last, so that what is continued has its weights
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


def finetune(args: argparse.Namespace, root: Path, state: Optional[Dict[str, Any]]) -> None:
    data = open_data(root, **data_arguments(args))
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
    args.white_level = check_images(
        [path for side in (data.train, data.held_out) for path, _ in side.samples], args.workers)
    set_white_level(model, args.white_level)
    data.train.reading = data.held_out.reading = reading_options(model)
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

    with atomic_dir(args.output):  # refused before training if it cannot be written to
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
