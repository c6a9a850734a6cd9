"""Evaluate a model on labelled images."""
import argparse
from functools import partial
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import torch

from .classifier import Classifier, open_classifier
from .console import InputError, abbreviate, plural
from .data import find_labels
from .digits import folder_or_digits
from .folders import Labelled, contents, split_of
from .heap import keep_heap
from .image_checks import try_to_read
from .labelled import TrainingData, match_classes, training_data
from .report import Scores, join, score, warn_without_matplotlib, write_report
from .run_state import claim
from .tables import read_labels

__all__ = ['run', 'score_images']


def find_images(args: argparse.Namespace, root: Path) -> Tuple[Labelled, str]:
    """Find the images to evaluate a model on.

    Args:
        args: Options of the command.
        root: Folder of the images.

    Returns:
        Paths and labels of the images, and a description of them.

    Raises:
        InputError: The folder has no labelled images, or only a training set.
    """
    folders = {split: f for f in contents(root)[0] if (split := split_of(f.name))
               and (contents(f)[0] or args.label_pattern)}
    if args.labels:
        splits, remarks = read_labels(args.labels, root, args.label_column, bool(args.skip_unlabeled))
    elif folders.keys() == {'train'}:
        raise InputError(f'{root} has only a training set; to evaluate on it, use --data-dir {folders["train"]}')
    else:
        root = folders.get('test') or folders.get('val') or root
        splits, remarks = find_labels(root, args.label_pattern, args.label_column, bool(args.skip_unlabeled))
    for remark in remarks:
        print(remark)
    name = next((name for name in ('test', 'val', 'train') if splits.get(name)), '')
    if not name:
        raise InputError(f'{args.labels or root} has no labelled images')
    return splits[name], f'{args.labels or root}' if len(splits) == 1 else f'{name} in {args.labels or root}'


def find_unseen_images(args: argparse.Namespace, root: Path, trained: Optional[TrainingData]) -> Tuple[Labelled, str]:
    """Find images like `find_images`; in the data set of a finetuned model, those that it was not trained on."""
    if data := trained and trained.open(root, args):
        images, what = (data.test, 'test set') if data.test else (data.val, 'validation set of the training')
        return [(path, data.classes[target]) for path, target in images.samples], what
    found = find_images(args, root)
    if trained and trained.root and trained.root.resolve() == root.resolve():
        print(f'{root} or its options are not those of the training of {args.model}: the images may include training '
              'images')
    return found


def score_images(
        classifier: Classifier,
        samples: Sequence[Tuple[str, int]],
        args: argparse.Namespace,
) -> Tuple[Scores, List[str], List[Tuple[str, int, str]]]:
    """Score the predictions of a model.

    Args:
        classifier: Model and preprocessing.
        samples: Path and class index of each image.
        args: Options `batch_size` and `workers`.

    Returns:
        The scores, the paths of the images that could be read, and path, class index and error of the others.
    """
    scores = [score(torch.empty(0, len(classifier.label_names)), torch.empty(0, dtype=torch.long))]
    paths: List[str] = []
    unread: List[Tuple[str, int, str]] = []
    for (path, target), logits in zip(
            samples, classifier.classify([path for path, _ in samples], args), strict=True):
        if isinstance(logits, str):
            unread.append((path, target, logits))
        else:
            paths.append(path)
            scores.append(score(logits[None], torch.tensor([target])))
    return join(scores), paths, unread


def evaluate(args: argparse.Namespace, root: Path, trained: Optional[TrainingData]) -> int:
    """Evaluate a model and write the report.

    Args:
        args: Options of the command.
        root: Folder of the images.
        trained: Data set that the model was trained on, if known.

    Returns:
        The exit status, 1 if some images could not be read.

    Raises:
        InputError: The images or the model cannot be used.
    """
    labelled, what = find_unseen_images(args, root, trained)
    classifier = open_classifier(args)
    index, remarks = match_classes({label for _, label in labelled}, classifier.label_names, args.model)
    samples = [(path, index[label]) for path, label in labelled if label in index]
    for remark in remarks:
        print(remark)
    warn_without_matplotlib()
    scores, paths, unread = score_images(classifier, samples, args)
    if not paths:
        raise InputError(f'none of {plural(len(samples), "image")} can be read: '
                         + abbreviate(f'{path} ({why})' for path, _, why in unread))
    print(write_report(args.output, scores, paths, classifier.label_names, root, what,
                       partial(try_to_read, read=classifier.read), unread=unread))
    if unread:
        print(f'{len(unread):,} of {plural(len(samples), "image")} could not be read, not counted in the metrics; for '
              'the errors, see predictions.csv')
    print(f'written to {args.output}: {", ".join(sorted(path.name for path in args.output.glob("[!.]*")))}')
    return 1 if unread else 0


def run(args: argparse.Namespace) -> int:
    keep_heap()
    trained = training_data(args.model)
    folder = args.data_dir or args.labels and args.labels.parent
    if not folder:
        if not trained:
            raise InputError('no images to evaluate on; name a folder with --data-dir')
        if gone := [path for path in trained.paths if not path.exists()]:
            raise InputError(f'{args.model} was trained on {abbreviate(gone)}, which does not exist; name another '
                             'folder with --data-dir')
        folder = trained.root
        trained.fill_in(args)
    with claim(args.output), folder_or_digits(folder) as root:
        return evaluate(args, root, trained)
