"""The report on a model's predictions for labelled images: tables, pictures and a summary."""
import argparse
import csv
import importlib.util
import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch

from .console import abbreviate
from .data import Data
from .files import atomic_dir, save_figure
from .images import read_image

__all__ = ['History', 'best_epoch', 'draw_curve', 'draw_predictions', 'report']

History = List[Dict[str, Any]]  # of every epoch, the arguments of timm's update_summary


def best_epoch(history: History) -> int:
    """That of the highest held-out top-1, and of the lowest loss among those."""
    metrics = [row['eval_metrics'] for row in history]
    return max(range(len(history)), key=lambda epoch: (metrics[epoch]['top1'], -metrics[epoch]['loss']))


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
                     white_level: Optional[int] = None, rows: int = 5, cols: int = 6) -> None:
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
        image = read_image(paths[i], white_level=white_level)
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
    with atomic_dir(args.output) as folder:
        for name, table in tables.items():
            with open(folder / name, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
                csv.writer(file).writerows(table)
        if importlib.util.find_spec('matplotlib'):
            draw_curve(folder / 'curve.png', history)
            draw_predictions(folder / 'predictions.png', [path for path, _ in data.held_out.samples],
                             logits.softmax(-1), targets, data.classes, data.held_out.reading.get('white_level'))
    return summarize(predictions, targets, rows)
