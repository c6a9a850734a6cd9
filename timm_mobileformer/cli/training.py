"""Fine-tune a Mobile-Former, or any timm model, on a folder of images or on the handwritten digits of scikit-learn.

Runs are reproducible: on a CPU with the same number of threads, the same seed gives the same result bit for bit,
whatever the number of workers, and whether or not the run was interrupted and resumed. To this end every epoch sets its
own seed, and depends only on the weights, the state of the optimizer and the metrics of the epochs before.
"""
import argparse
import importlib.util
import math
from collections import deque
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, random_seed
from torch.optim.swa_utils import update_bn

from .batches import epoch_seed, make_loaders, set_batches
from .console import InputError, plural, progress, quote, worker_errors
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
    model_data_config,
    pick_device,
    reading_options,
    set_data_config,
    set_white_level,
)
from .options import data_arguments
from .report import History, Scores, best_epoch, join, measure, score, warn_without_matplotlib, write_report
from .report_figures import draw_curve
from .run_state import PATHS, check_is_free, claim, fingerprint, read_state, save_epoch

BATCH_NORM_IMAGES = 256  # for estimating the statistics of BatchNorm


def resumed_options(args: argparse.Namespace, state: Dict[str, Any]) -> argparse.Namespace:
    """Return the options of the run to resume, updated with those given on the command line.

    Raises:
        InputError: `--epochs` is less than the number of epochs of the run.
    """
    named = {key: value for key, value in vars(args).items() if value is not None}
    if args.epochs and args.epochs < state['args']['epochs']:
        raise InputError(f'the run in {args.resume} has {plural(state["args"]["epochs"], "epoch")}; --epochs can '
                         'only raise that')
    return argparse.Namespace(
        **{**vars(args), **state['args'], **state['data_config'], **named, 'output': args.resume})


def make_absolute(args: argparse.Namespace) -> None:
    """Make the paths among the options absolute, so that the run can be resumed from any working directory."""
    for key in PATHS:
        if path := getattr(args, key):
            setattr(args, key, path.absolute())
    source, _, folder = find_model(args.model).partition(':')
    if source == 'local-dir':
        args.model = f'local-dir:{Path(folder).absolute()}'


def make_model(args: argparse.Namespace, classes: List[str], state: Optional[Dict[str, Any]]) -> Any:
    """Create the model to train, and update its `pretrained_cfg` with the classes and the preprocessing."""
    model = load_model(
        args, len(classes), state and state['data_config'], drop_rate=args.drop, drop_path_rate=args.drop_path)
    if state:
        model.load_state_dict(state['state_dict'])
    set_data_config(model, vars(args))
    model.pretrained_cfg.update(
        tag='finetuned', num_classes=len(classes), label_names=classes, label_descriptions=None, label_offset=None,
        test_input_size=None, test_pool_size=None, test_crop_pct=None)
    return model


def announce(args: argparse.Namespace, model: Any, data: Data, batches: str, device: torch.device, done: int) -> None:
    """Print the model, the data set, the batches, and where training starts."""
    _, height, width = model.pretrained_cfg['input_size']
    print(f'{args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}; '
          f'{len(data.classes):,} classes, {len(data.train):,} training and {plural(len(data.val), "validation image")}'
          f', {height} × {width} pixels; {batches}'
          + (f'; {done} of {plural(args.epochs, "epoch")} done' if done else ''))
    if not (done or args.pretrained or args.checkpoint or find_model(args.model).startswith(HAVE_WEIGHTS)):
        print(f'{args.model} is trained from scratch, with random initial weights; to start from trained weights, add '
              '--checkpoint FILE or --pretrained, or name a folder with --model')
    warn_without_matplotlib()


def train_epoch(args: argparse.Namespace, model: nn.Module, batches: Iterable[Any], optimizer: Any, scheduler: Any,
                step: int, bar: Any) -> float:
    """Train for one epoch.

    BatchNorm's running averages lag behind weights that change fast: after short runs, a model can predict at chance
    although its weights are good. The statistics are therefore estimated anew from the last batches of the epoch.

    Args:
        args: Options `amp`, `batch_size` and `smoothing`.
        model: Model to train.
        batches: Batches of images (B, C, H, W) and class indices (B).
        optimizer: Optimizer of the model.
        scheduler: Scheduler of timm, updated after every step.
        step: Number of steps of the epochs before.
        bar: Progress bar.

    Returns:
        The mean loss. If it is not finite, the epoch was ended early.
    """
    loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    device_type = next(model.parameters()).device.type
    autocast = torch.autocast(device_type, torch.bfloat16) if args.amp else nullcontext()
    losses = AverageMeter()
    last_batches: deque = deque(maxlen=math.ceil(BATCH_NORM_IMAGES / args.batch_size))
    model.train()
    for images, target in batches:
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
        if step % 10 == 0:  # not more often, since reading the loss synchronizes with the device
            bar.set_postfix(loss=f'{losses.avg:.3f}')
            if not math.isfinite(losses.avg):
                break
    with autocast:
        update_bn(last_batches, model)
    return float(losses.avg)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any) -> Scores:
    """Score the predictions for all images, in the order of the dataset."""
    model.eval()
    return join(score(model(images).float().cpu(), target.cpu()) for images, target in loader)


def train(args: argparse.Namespace, model: nn.Module, loaders: Tuple[Any, Any], history: History, save: Any,
          optimizer_state: Any = None) -> None:
    """Train and validate a model, and save it after every epoch.

    Args:
        args: Options of the run.
        model: Model to train.
        loaders: Batches of the training set and of the validation set, see `make_loaders`.
        history: Metrics of the epochs before; those of every further epoch are appended.
        save: Called after every epoch with the optimizer and the history.
        optimizer_state: State of the optimizer of a run to resume.

    Raises:
        InputError: The loss is not finite.
    """
    loader, val_loader = loaders
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, warmup_epochs=args.epochs / 10, warmup_lr=args.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    if optimizer_state:
        optimizer.load_state_dict(optimizer_state)
        scheduler.step_update(len(history) * len(loader))  # --epochs may have been raised
    batches = iter(loader)
    with progress(desc='training', total=args.epochs * len(loader), initial=len(history) * len(loader)) as bar:
        for epoch in range(len(history), args.epochs):
            if args.patience and history and epoch - 1 - best_epoch(history) >= args.patience:
                bar.write(f'training stops early: no improvement in the last {plural(args.patience, "epoch")}')
                break
            random_seed(epoch_seed(args, epoch))
            loss = train_epoch(
                args, model, islice(batches, len(loader)), optimizer, scheduler, epoch * len(loader), bar)
            if not math.isfinite(loss):
                raise InputError(f'the loss became {loss} in epoch {epoch + 1}; a smaller --lr may help')
            metrics = measure(evaluate(model, val_loader))
            rates = [group['lr'] for group in optimizer.param_groups]
            row = dict(epoch=epoch, train_metrics={'loss': loss}, lr=sum(rates) / len(rates),
                       eval_metrics={key: metrics[key] for key in ('loss', 'top1', 'top5')})
            save(optimizer, [*history, row])
            history.append(row)
            bar.write(f'epoch {epoch + 1:3} of {args.epochs}: loss {loss:.4f}, validation loss {metrics["loss"]:.4f}, '
                      f'top-1 {metrics["top1"]:.2f} %')


def report(args: argparse.Namespace, root: Path, data: Data, val_loader: Any, model: Any, history: History) -> None:
    """Evaluate the best epoch on the validation set and, if there is one, on the test set; write tables and figures."""
    device, best = next(model.parameters()).device, best_epoch(history)
    sets = [('validation set', data.val, val_loader, args.output)]
    if data.test:
        loader: Any = create_loader(
            data.test, batch_size=args.batch_size, num_workers=args.workers, device=device,  # type: ignore[arg-type]
            **model_data_config(model, vars(args)))
        sets.append(('test set', data.test, loader, args.output / 'test'))
    for what, images, loader, output in sets:
        print(write_report(
            output, evaluate(model, loader), [path for path, _ in images.samples], data.classes, root, what,
            partial(read_image, **images.reading), trained_on=[target for _, target in data.train.samples]))
    if data.validates_on_test:
        print('the best epoch was selected on the test set, so that its accuracy is optimistic; with a folder val '
              'beside train and test, the test set is evaluated only once, at the end')
    if importlib.util.find_spec('matplotlib'):
        with atomic_dir(args.output) as folder:
            draw_curve(folder / 'curve.png', history, best)
    print(f'results of the best epoch, {best + 1} of {len(history)}, are in {args.output}: '
          f'{", ".join(sorted(path.name for path in args.output.glob("[!.]*")))}')


def finetune(args: argparse.Namespace, root: Path, state: Optional[Dict[str, Any]]) -> None:
    """Train a model, and report on its best epoch.

    Args:
        args: Options of the run.
        root: Folder of the data set.
        state: State of the run to resume, as `read_state` returns it; None for a new run.

    Raises:
        InputError: The data set cannot be used, differs from that of the run to resume, or training failed, for
            instance since a worker was killed.
    """
    data = open_data(root, **data_arguments(args))
    for remark in data.remarks:
        print(remark)
    images_hash = fingerprint(data, root)
    if state and state['pictures'] != images_hash:
        raise InputError(f'the run in {args.output} was trained on other images than those in {root}')
    device = pick_device(args)
    if device.type == 'cpu':  # leave cores to the workers: a thread without one delays all others
        torch.set_num_threads(args.threads or max(1, torch.get_num_threads() - args.workers))
    random_seed(args.seed)
    model = make_model(args, data.classes, state).to(device)

    checked = check_images(data.paths(), args.workers, args.output / BAD_IMAGES, bool(args.skip_bad_images))
    for remark in data.leave_out(checked.bad) + checked.remarks():
        print(remark)
    args.white_level = checked.white_level
    set_white_level(model, args.white_level)
    for images in data.sets:
        images.reading = reading_options(model)
    batches = set_batches(args, len(data.train))
    history: History = state['history'] if state else []
    loaders = make_loaders(args, data, model, device, len(history))
    announce(args, model, data, batches, device, len(history))

    kwargs = {**model_args(find_model(args.model), model.pretrained_cfg), 'num_classes': len(data.classes)}
    save = partial(save_epoch, args, model, kwargs, images_hash)
    try:
        with worker_errors():
            train(args, model, loaders, history, save, state and state['optimizer'])
            model.load_state_dict(load_state_dict(str(args.output / 'model.safetensors')))  # report on saved weights
            report(args, root, data, loaders[1], model, history)
    except (InputError, KeyboardInterrupt) as e:
        hint = (f'; {len(history)} of {plural(args.epochs, "epoch")} done, to continue: '
                f'timm-mobileformer finetune --resume {quote(args.output)}')
        raise type(e)(f'{e}{hint}' if history else str(e)) from e
    print(f"to load the model: timm.create_model({f'local-dir:{args.output}'!r}, pretrained=True)")
    print(f'to classify images: timm-mobileformer predict IMAGES --model {quote(args.output)}')
    print(f'to export the model: timm-mobileformer export all --model {quote(args.output)}')


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
