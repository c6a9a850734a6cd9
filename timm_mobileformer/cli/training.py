"""Fine-tune a Mobile-Former, or any timm model, on a folder of images; without one, on handwritten digits.

The same seed gives the same result, in one go or interrupted and resumed: bit for bit on a CPU with the same number of
threads and workers. Each epoch therefore sets a seed of its own, and depends on nothing but the model, the state of
the optimizer and the metrics of the epochs before.
"""
import argparse
import importlib.util
import math
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch.optim.swa_utils import update_bn

from .batches import make_loaders, set_batches
from .console import InputError, progress, quote
from .data import BAD_IMAGES, Data, open_data
from .digits import folder_or_digits
from .files import atomic_dir
from .heap import keep_heap
from .image_checks import check_images
from .images import read_image
from .load import (
    HAVE_WEIGHTS,
    find_model,
    load_model,
    model_args,
    pick_device,
    reading_options,
    set_data_config,
    set_white_level,
)
from .options import data_arguments
from .report import History, best_epoch, score, write_report
from .report_figures import draw_curve
from .run_state import PATHS, check_is_free, claim, fingerprint, read_state, save_epoch

BATCH_NORM_IMAGES = 256  # that the statistics are estimated on


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
    """Train for an epoch, after `step` steps; returns the mean loss.

    While weights change fast, BatchNorm's running averages lag behind them: in short runs so far that the model
    predicts at chance. At the end of the epoch the last batches therefore pass through the model once more, and its
    statistics become theirs.
    """
    loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    device_type = next(model.parameters()).device.type
    autocast = torch.autocast(device_type, torch.bfloat16) if args.amp else nullcontext()
    losses = AverageMeter()
    last_batches: deque = deque(maxlen=math.ceil(BATCH_NORM_IMAGES / args.batch_size))
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
        last_batches.append(images)
        bar.update()
        if step % 10 == 0:  # seldom, since the device is waited for
            bar.set_postfix(loss=f'{losses.avg:.3f}')
            if not math.isfinite(losses.avg):
                break
    with autocast:
        update_bn(last_batches, model)
    return float(losses.avg)


def train(args: argparse.Namespace, model: nn.Module, loaders: Tuple[Any, Any], history: History, save: Any,
          optimizer_state: Any = None) -> None:
    """Train from where `history` ends, and append to it; `save` gets optimizer and history after every epoch."""
    loader, val_loader = loaders
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=args.epochs / 10, warmup_lr=args.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
        scheduler.step_update(len(history) * len(loader))  # --epochs may have been raised
    with progress(desc='training', total=args.epochs * len(loader), initial=len(history) * len(loader)) as bar:
        for epoch in range(len(history), args.epochs):
            if args.patience and history and epoch - 1 - best_epoch(history) >= args.patience:
                bar.write(f'no better epoch in {args.patience}: training ends')
                break
            random_seed(int(np.random.SeedSequence((args.seed, epoch)).generate_state(1)[0]))
            loss = train_epoch(args, model, loader, optimizer, scheduler, epoch * len(loader), bar)
            if not math.isfinite(loss):
                raise InputError(f'the loss became {loss} in epoch {epoch + 1}; a smaller --lr may help')
            metrics = measure(*evaluate(model, val_loader))
            rates = [group['lr'] for group in optimizer.param_groups]
            row = dict(epoch=epoch, train_metrics={'loss': loss}, eval_metrics=metrics, lr=sum(rates) / len(rates))
            save(optimizer, [*history, row])
            history.append(row)
            bar.write(f'epoch {epoch + 1:3} of {args.epochs}: loss {loss:.4f}, validation loss {metrics["loss"]:.4f}, '
                      f'top-1 {metrics["top1"]:.2f} %')


def make_model(args: argparse.Namespace, classes: List[str], state: Optional[Dict[str, Any]]) -> Any:
    """The model to train, with a `pretrained_cfg` that describes what it becomes."""
    model = load_model(args, len(classes), weights=not state, drop_rate=args.drop, drop_path_rate=args.drop_path)
    if state:
        model.load_state_dict(state['state_dict'])
    set_data_config(model, vars(args))
    model.pretrained_cfg.update(
        tag='finetuned', num_classes=len(classes), label_names=classes, label_descriptions=None, label_offset=None,
        test_input_size=None, test_pool_size=None, test_crop_pct=None)
    return model


def announce(args: argparse.Namespace, model: Any, data: Data, batches: str, device: torch.device, done: int) -> None:
    """Print what is trained, on what and from what."""
    _, height, width = model.pretrained_cfg['input_size']
    print(f'{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}; '
          f'{len(data.classes):,} classes, {len(data.train):,} images to train on, {len(data.val):,} for validation, '
          f'{height} × {width} pixels; {batches}' + (f'; {done} of {args.epochs} epochs are done' if done else ''))
    if not (done or args.pretrained or args.checkpoint or find_model(args.model).startswith(HAVE_WEIGHTS)):
        print(f'{args.model} starts from scratch, with random weights; to start from trained ones, add --checkpoint '
              'FILE or --pretrained, or name a folder with --model')
    if not importlib.util.find_spec('matplotlib'):
        print("no pictures will be drawn: pip install 'timm_mobileformer[demo]' brings matplotlib")


def report(args: argparse.Namespace, root: Path, data: Data, model: Any, history: History) -> None:
    """Measure a model on the validation set and, apart, on the test set if there is one; write tables and figures."""
    device, best = next(model.parameters()).device, best_epoch(history)
    for what, images, output in (('validation set', data.val, args.output),
                                 ('test set', data.test, args.output / 'test')):
        if not images:
            continue
        loader: Any = create_loader(
            images, batch_size=args.batch_size, num_workers=args.workers, device=device,  # type: ignore[arg-type]
            **resolve_model_data_config(model, vars(args)))
        print(write_report(
            output, score(*evaluate(model, loader)), [path for path, _ in images.samples], data.classes, root, what,
            partial(read_image, **images.reading), trained_on=[target for _, target in data.train.samples]))
    if data.validates_on_test:
        print('the best epoch was chosen on the images of test, which flatters it; beside train and val, a test set is '
              'measured once at the end')
    if importlib.util.find_spec('matplotlib'):
        with atomic_dir(args.output) as folder:
            draw_curve(folder / 'curve.png', history, best)
    print(f'by the best epoch, {best + 1} of {len(history)}; written to {args.output}: '
          f'{", ".join(sorted(path.name for path in args.output.glob("[!.]*")))}')


def finetune(args: argparse.Namespace, root: Path, state: Optional[Dict[str, Any]]) -> None:
    """Train on the images in `root`, from `state` where a run is resumed, and report on the best epoch."""
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
    model = make_model(args, data.classes, state).to(device)
    checked = check_images(data.paths(), args.workers, args.output / BAD_IMAGES, bool(args.skip_bad_images))
    for remark in data.leave_out(checked.bad) + checked.remarks():
        print(remark)
    args.white_level = checked.white_level
    set_white_level(model, args.white_level)
    batches = set_batches(args, len(data.train))
    loaders = make_loaders(args, data, model, device)
    for images in data.sets:
        images.reading = reading_options(model)
    history: History = state['history'] if state else []
    announce(args, model, data, batches, device, len(history))

    kwargs = {**model_args(find_model(args.model), model.pretrained_cfg), 'num_classes': len(data.classes)}
    try:
        save = partial(save_epoch, args, model, kwargs, pictures)
        train(args, model, loaders, history, save, state and state['optimizer'])
    except (InputError, KeyboardInterrupt) as e:
        hint = (f'; {len(history)} of {args.epochs} epochs are done, to go on: '
                f'timm-mobileformer finetune --resume {quote(args.output)}')
        raise type(e)(f'{e}{hint}' if history else str(e)) from e
    model.load_state_dict(load_state_dict(str(args.output / 'model.safetensors')))  # what was saved is what is reported
    report(args, root, data, model, history)
    print(f"timm.create_model({f'local-dir:{args.output}'!r}, pretrained=True) loads it")


def resumed_options(args: argparse.Namespace, state: Dict[str, Any]) -> argparse.Namespace:
    """The options of the run to resume, and over them those that the command line names.

    Raises:
        InputError: They cannot be changed like that.
    """
    named = {key: value for key, value in vars(args).items() if value is not None}
    if args.epochs and args.epochs < state['args']['epochs']:
        raise InputError(f'the run in {args.resume} has {state["args"]["epochs"]} epochs; --epochs can only raise that')
    return argparse.Namespace(**{**vars(args), **state['args'], **named, 'output': args.resume})


def make_absolute(args: argparse.Namespace) -> None:
    """Let paths among the options hold in any working directory, in which the run may be resumed."""
    for key in PATHS:
        if path := getattr(args, key):
            setattr(args, key, path.absolute())
    source, _, folder = find_model(args.model).partition(':')
    if source == 'local-dir':
        args.model = f'local-dir:{Path(folder).absolute()}'


def run(args: argparse.Namespace) -> None:
    keep_heap()
    state = None
    with claim(args.resume or args.output):
        if args.resume:
            state = read_state(args.resume)
            args = resumed_options(args, state)
        else:
            check_is_free(args.output)
        make_absolute(args)
        with folder_or_digits(args.data_dir or args.labels and args.labels.parent) as root:
            finetune(args, root, state)
