"""Evaluation report: metrics, tables, figures and a summary of predictions for labelled images."""
import csv
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F

from .console import abbreviate
from .files import atomic_dir, open_csv
from .folders import relative
from .report_figures import draw_confusion, draw_mistakes

__all__ = ['History', 'Scores', 'best_epoch', 'join', 'measure', 'score', 'warn_without_matplotlib',
           'write_report']

Confusion = Counter[Tuple[int, int]]  # number of images by true and predicted class index
History = List[Dict[str, Any]]  # arguments of timm's update_summary for every epoch
NUM_BINS = 15  # of the calibration error


def best_epoch(history: History) -> int:
    """Return the index of the epoch with the highest top-1 on the validation set; ties are broken by the loss."""
    metrics = [row['eval_metrics'] for row in history]
    return max(range(len(history)), key=lambda epoch: (metrics[epoch]['top1'], -metrics[epoch]['loss']))


class Scores(NamedTuple):
    """Predictions for N labelled images, each of shape (N)."""
    targets: torch.Tensor  # class indices
    predictions: torch.Tensor  # class indices
    confidence: torch.Tensor  # probability of the prediction
    loss: torch.Tensor  # cross-entropy
    in_top5: torch.Tensor  # whether the target is among the five most likely classes


def score(logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Score logits (N, classes) against class indices (N), in float64."""
    logits = logits.double()
    confidence, predictions = logits.softmax(-1).max(-1)
    in_top5 = (logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]).any(-1)
    return Scores(targets, predictions, confidence, F.cross_entropy(logits, targets, reduction='none'), in_top5)


def join(scores: Iterable[Scores]) -> Scores:
    """Concatenate scores."""
    return Scores(*map(torch.cat, zip(*scores, strict=True)))


def measure(scores: Scores) -> Dict[str, float]:
    """Compute the metrics of a model.

    Returns:
        `images`, the number of images; `top1` and `top5` in percent; `mean_class`, top-1 averaged over the classes that
        have images, in percent; `loss`, the mean cross-entropy; and `ece`, the expected calibration error over 15 bins
        of confidence, in percent (Guo et al. 2017, arXiv 1706.04599, Eq. 3).
    """
    correct = (scores.predictions == scores.targets).double()
    by_class = scores.targets.bincount(correct) / scores.targets.bincount()  # nan without images
    bins = (scores.confidence * NUM_BINS).ceil().clamp(1, NUM_BINS).nan_to_num(1).long()
    gaps = bins.bincount(correct - scores.confidence).abs()
    return {
        'images': len(correct),
        'top1': 100 * correct.mean().item(),
        'top5': 100 * scores.in_top5.double().mean().item(),
        'mean_class': 100 * by_class.nanmean().item(),
        'loss': scores.loss.mean().item(),
        'ece': 100 * gaps.sum().item() / len(correct),
    }


def count_confusion(scores: Scores) -> Confusion:
    """Count the pairs of a true and a predicted class index that occur, in their order."""
    return Counter(sorted(zip(scores.targets.tolist(), scores.predictions.tolist(), strict=True)))


def rows_by_class(scores: Scores, classes: Sequence[str], trained_on: Counter) -> List[Dict[str, Any]]:
    """Return counts, precision, recall and F1 of every class; undefined values are ''."""
    rows = []
    hits = scores.targets[scores.predictions == scores.targets]
    counts = (indices.bincount(minlength=len(classes)).tolist() for indices in (*scores[:2], hits))
    for i, (images, predicted, right) in enumerate(zip(*counts, strict=True)):
        rows.append({
            'class': classes[i], **({'train': trained_on[i]} if trained_on else {}), 'images': images,
            'predicted': predicted, 'right': right, 'precision': right / predicted if predicted else '',
            'recall': right / images if images else '',
            'f1': 2 * right / (predicted + images) if predicted + images else ''})
    return rows


def summarize(scores: Scores, confusion: Confusion, rows: List[Dict[str, Any]], what: str) -> str:
    """Summarize the metrics, the classes with the lowest top-1 and the most frequent mistakes in one line each."""
    metrics = measure(scores)
    right = sum(row['right'] for row in rows)
    top5 = f'top-5 {metrics["top5"]:.2f} %, ' if len(rows) > 5 else ''
    lines = [f'{what}: top-1 {metrics["top1"]:.2f} % ({right:,} of {metrics["images"]:,}), '
             f'mean over classes {metrics["mean_class"]:.2f} %, {top5}loss {metrics["loss"]:.4f}, '
             f'calibration error {metrics["ece"]:.2f} %']
    mistakes = [(t, p, n) for (t, p), n in confusion.most_common() if t != p]
    if mistakes:
        worst = sorted((row for row in rows if row['images'] and row['recall'] < 1), key=lambda row: row['recall'])
        lines += [
            'lowest top-1 by class: ' + abbreviate(
                (f'{row["class"]} {100 * row["recall"]:.1f} %' for row in worst), 10),
            'most frequent mistakes, class → prediction: ' + abbreviate(
                (f'{rows[t]["class"]} → {rows[p]["class"]} ({n}×)' for t, p, n in mistakes), 10)]
    return '\n'.join(lines)


def warn_without_matplotlib() -> None:
    """Print a line if figures cannot be drawn."""
    if not importlib.util.find_spec('matplotlib'):
        print("no figures will be drawn: pip install 'timm_mobileformer[demo]' installs matplotlib")


def write_report(
        output: Path,
        scores: Scores,
        paths: Sequence[str],
        classes: Sequence[str],
        root: Path,
        what: str,
        read: Callable[[str], Any],
        trained_on: Iterable[int] = (),
        unread: Sequence[Tuple[str, int, str]] = (),
) -> str:
    """Write the tables and figures of a report.

    Args:
        output: Folder for `metrics.json`, `classes.csv`, `confusion.csv`, `predictions.csv` and `mistakes.csv` and,
            if matplotlib is installed, `confusion.png` and `mistakes.png`.
        scores: Predictions for N images.
        paths: Paths of the N images.
        classes: Class names of the model, by index.
        root: Folder of the data set; paths are written relative to it.
        what: Description of the images for the summary, such as 'validation set'.
        read: Function that reads an image, without preprocessing.
        trained_on: Class indices of the training set, if known.
        unread: Path, class index and error of each image that could not be read.

    Returns:
        The summary to print.
    """
    confusion = count_confusion(scores)
    rows = rows_by_class(scores, classes, Counter(trained_on))
    predictions = [
        [relative(path, root), classes[target], classes[predicted], f'{confidence:.4f}', '']
        for path, target, predicted, confidence in zip(
            paths, *(values.tolist() for values in scores[:3]), strict=True)]
    mistakes = sorted((row for row in predictions if row[1] != row[2]), key=lambda row: row[3], reverse=True)
    predictions += [[relative(path, root), classes[target], '', '', problem]
                    for path, target, problem in unread]
    header = ['path', 'class', 'prediction', 'probability']
    tables: Dict[str, Iterable[Iterable[Any]]] = {
        'classes.csv': [rows[0], *(row.values() for row in rows)],
        'confusion.csv': [['class', 'prediction', 'images'],
                          *([classes[t], classes[p], n] for (t, p), n in confusion.items())],
        'predictions.csv': [[*header, 'problem'], *predictions],
        'mistakes.csv': [header, *(row[:4] for row in mistakes)]}
    with atomic_dir(output) as folder:
        for name, table in tables.items():
            with open_csv(folder / name) as file:
                csv.writer(file).writerows(table)
        (folder / 'metrics.json').write_text(json.dumps(measure(scores), indent=2) + '\n', encoding='ascii')
        if importlib.util.find_spec('matplotlib'):
            draw_confusion(folder / 'confusion.png', confusion, classes)
            draw_mistakes(folder / 'mistakes.png', paths, scores, classes, read)
    return summarize(scores, confusion, rows, what)
