"""Figures of a report: learning curves, confusion matrix and mistakes."""
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

import torch

from .console import plural
from .files import save_figure

if TYPE_CHECKING:
    from .report import Confusion, History, Scores

__all__ = ['draw_confusion', 'draw_curve', 'draw_mistakes']

MAX_CLASSES = 200  # in the figure of a confusion matrix


def draw_curve(path: Path, history: 'History', best: int) -> None:
    """Draw loss and top-1 over the epochs.

    Args:
        path: File to write.
        history: Metrics of the epochs.
        best: Index of the best epoch, which is marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.2), dpi=150, layout='constrained')
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    top1 = [row['eval_metrics']['top1'] for row in history]
    style = '.-' if len(history) < 40 else '-'
    left.plot(epochs, [row['train_metrics']['loss'] for row in history], style, label='training (label smoothing)')
    left.plot(epochs, [row['eval_metrics']['loss'] for row in history], style, label='validation')
    right.plot(epochs, top1, style + 'C1')
    right.plot(best + 1, top1[best], 'oC3', label=f'best epoch: {best + 1}, {top1[best]:.2f} %')
    for axes, name in (left, 'loss'), (right, 'validation top-1, %'):
        axes.set(xlabel='epoch', ylabel=name, xlim=(0.5, len(history) + 0.5))
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save_figure(figure, path)


def shorten(name: str, room: int) -> str:
    """Return a class name in drawable characters, with the middle replaced by an ellipsis if it is too long."""
    name = name.encode(errors='replace').decode()  # names of folders need not be UTF-8
    name = name if len(name) <= room else f'{name[:room // 2]} … {name[-room // 2:]}'
    return ' '.join(name.split()) or '?'


def draw_confusion(path: Path, confusion: 'Confusion', classes: Sequence[str]) -> None:
    """Draw a confusion matrix, normalized by rows; up to 30 classes, with counts.

    Args:
        path: File to write.
        confusion: Number of images by true class (row) and prediction (column).
        classes: Class names. Of more than 200 classes, the 200 with the most mistakes are drawn.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    (targets, predictions), sizes = torch.tensor([*confusion]).T, torch.tensor([*confusion.values()])
    images = targets.bincount(sizes, len(classes))
    wrong = targets != predictions
    mistakes = torch.cat([targets[wrong], predictions[wrong]]).bincount(sizes[wrong].repeat(2), len(classes))
    shown = mistakes.argsort(descending=True, stable=True)[:MAX_CLASSES].sort().values.tolist()
    n = len(shown)
    counts = torch.tensor([[confusion[row, column] for column in shown] for row in shown])
    shares = (counts / images[shown, None]).numpy()  # nan (gray) without images
    names = [shorten(classes[i], 30) for i in shown]
    cell, font = (0.42, 9) if n <= 30 else (0.11, 6)  # inches, points
    margin = 0.011 * font * max(map(len, names)) + 0.6
    side = max(n * cell, 2)
    figure = Figure(figsize=(side + margin + 1, side + margin + 0.6), dpi=130, layout='constrained')
    axes = figure.subplots()
    axes.set_facecolor('0.85')
    image = axes.imshow(shares, cmap='Blues', norm=PowerNorm(0.5, 0, 1), interpolation='nearest')
    style: Any = dict(fontsize=font, parse_math=False)
    axes.set_xticks(range(n), names, rotation=90, **style)
    axes.set_yticks(range(n), names, **style)
    axes.set_xlabel('prediction')
    axes.set_ylabel('class')
    axes.set_title(f'the {n} of {len(classes):,} classes with the most mistakes' if n < len(classes) else
                   'images by class and prediction' if n <= 30 else 'fraction of the images of each class', fontsize=11)
    if n <= 30:
        for y, row in enumerate(counts.tolist()):
            for x, count in enumerate(row):
                if count:
                    axes.text(x, y, f'{count}', ha='center', va='center', fontsize=9 if count < 1000 else 6,
                              color='white' if shares[y, x] > 0.3 else 'black')
    else:
        axes.set_xticks([i - 0.5 for i in range(1, n)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, n)], minor=True)
        axes.grid(which='minor', color='0.9', linewidth=0.3)
        axes.tick_params(which='minor', length=0)
    figure.colorbar(image, ax=axes, label='fraction of the class', shrink=min(1, 4 / side), aspect=15)
    save_figure(figure, path)


def name_lines(name: str) -> str:
    """Wrap a class name into a few lines of at most 22 characters."""
    return '\n'.join(textwrap.wrap(shorten(name, 58), 22))


def draw_mistakes(path: Path, paths: Sequence[str], scores: 'Scores', classes: Sequence[str],
                  read: Callable[[str], Any]) -> None:
    """Draw up to 30 images with their predictions: mistakes, then others, each in descending order of the loss.

    Args:
        path: File to write.
        paths: Paths of the N images.
        scores: Predictions for the N images.
        classes: Class names.
        read: Function that reads an image.
    """
    from matplotlib.figure import Figure

    correct = (scores.predictions == scores.targets).tolist()
    predictions, targets, confidence = (
        values.tolist() for values in (scores.predictions, scores.targets, scores.confidence))
    order = sorted(range(len(targets)), key=lambda i: (correct[i], -scores.loss[i].item()))[:30]
    cols = min(6, len(order))
    rows = math.ceil(len(order) / cols)
    figure = Figure(figsize=(max(2 * cols, 6), 2.6 * rows + 0.6), dpi=110, layout='constrained')
    figure.suptitle(f'{correct.count(False):,} of {plural(len(targets), "image")} misclassified (red), then the least '
                    'certain\nabove: prediction and its probability; below: true class if misclassified', fontsize=12)
    all_axes = figure.subplots(rows, cols, squeeze=False).ravel()
    for axes in all_axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for i, axes in zip(order, all_axes, strict=False):
        image = read(paths[i]).convert('RGB')
        image.thumbnail((400, 400))
        axes.imshow(image, interpolation='nearest' if max(image.size) < 64 else 'antialiased')
        axes.set_title(f'{name_lines(classes[predictions[i]])}\n{100 * confidence[i]:.0f} %', fontsize=10, pad=3,
                       color='k' if correct[i] else 'C3', parse_math=False)
        if not correct[i]:
            axes.spines[:].set(visible=True, color='C3', linewidth=2)
            axes.set_xlabel(name_lines(classes[targets[i]]), fontsize=10, color='k', parse_math=False)
    save_figure(figure, path)
