"""Finding the images of a data set, their classes and splits."""
import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from .console import InputError, abbreviate, quote
from .folders import ImageScan, Labelled, Splits, contents, find_splits
from .images import Pictures
from .tables import read_labels

__all__ = ['Data', 'ImageScan', 'open_data']


def alike(names: Iterable[str]) -> List[str]:
    """A remark if some names of classes look the same: they differ in case, blanks or the form of Unicode only."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[' '.join(unicodedata.normalize('NFKC', name).casefold().split())].append(name)
    same = [' and '.join(repr(name) for name in group) for group in groups.values() if len(group) > 1]
    return [f'different classes whose names are nearly the same: {abbreviate(same)}'] if same else []


def natural_order(name: str) -> Any:
    """Sort key of class names: that of timm, numbers by their values and letters in any case, and total.

    Names that tie there, such as `Cat` and `cat` or `1` and `01`, are told apart by their code points.
    """
    parts = re.split(r'([0-9]+)', name.lower())
    parts[1::2] = [(len(digits.lstrip('0')), digits.lstrip('0')) for digits in parts[1::2]]  # int() takes 4,300 digits
    return parts, name


def split(labelled: Labelled, root: Path, share: float) -> Tuple[Labelled, Labelled]:
    """Hold out a share of every class, at least one picture and never all.

    Which, hashes of the names say: the same ones in every run, by every command, whatever `--seed` is and wherever the
    folder lies, and most stay where they are when pictures are added.
    """
    by_class: Dict[str, List[str]] = defaultdict(list)
    for path, label in labelled:
        by_class[label].append(path)
    held_out = set()
    for paths in by_class.values():
        paths.sort(key=lambda path: sha256(os.fsencode(Path(os.path.relpath(path, root)).as_posix())).digest())
        held_out.update(paths[:min(max(1, round(share * len(paths))), len(paths) - 1)])
    return [s for s in labelled if s[0] not in held_out], [s for s in labelled if s[0] in held_out]


@dataclass
class Data:
    """Labelled images: the training set, the validation set, their classes by index, and remarks for the user."""
    train: Pictures
    held_out: Pictures
    classes: List[str]
    remarks: List[str]
    test: Optional[Pictures] = None  # where a folder of that name lies beside those of train and val
    validates_on_test: bool = False  # the folder test is all there is to validate on


def open_data(root: Path, labels: Optional[Path] = None, val_split: float = 0.2,
              label_pattern: Optional[str] = None) -> Data:
    """Find the pictures of a data set.

    Args:
        root: Folder with `train/CLASS/…` and `val/CLASS/…` (or `validation`, `valid`, `eval`, `test`, in any case),
            and perhaps `test/CLASS/…` beside both; with `train/CLASS/…` alone; or with `CLASS/…`.
        labels: CSV of files and labels; instead of class folders.
        val_split: Share of every class to hold out, where no folder is.
        label_pattern: Regular expression that finds the label in the path of an image; instead of class folders. See
            `ImageScan.matches`.

    Raises:
        InputError: There is no such folder, or not two classes in it, or the CSV does not fit.
    """
    if not root.is_dir():
        raise InputError(f'{root} is not a folder' if root.exists() else f'no such folder: {root}')
    found = ImageScan()
    splits: Splits = {}
    if labels:
        splits['train'] = read_labels(labels, root)
        remarks: List[str] = []
    else:
        folders, beside = find_splits(root, flat=bool(label_pattern))
        for name, folder in folders.items():
            if label_pattern:
                for inner, labelled in found.matches(folder, re.compile(label_pattern)).items():
                    splits.setdefault(name if len(folders) > 1 else inner, []).extend(labelled)
                continue
            try:
                splits[name] = found.classes(folder)
            except InputError:
                if name != 'test' or 'val' not in folders:
                    raise
                beside.append(folder.name)  # a test set without classes
        remarks = found.remarks() + ([f'left alone in {root}: {abbreviate(beside)}'] if beside else [])
    validates_on_test = 'test' in splits and 'val' not in splits
    if validates_on_test:
        splits['val'] = splits.pop('test')
    train, held_out, test = (splits.get(name, []) for name in ('train', 'val', 'test'))
    if not held_out:
        train, held_out = split(train, root, val_split)
        share = len(held_out) / max(1, len(train) + len(held_out))
        remarks.append(f'held out: {100 * share:.3g} % of the images, at least one of every class of two or more')
    names, others = {label for _, label in train}, {label for _, label in held_out}
    if len(names) < 2:
        inside = [] if labels else [f for name in names if contents(f := folders['train'] / name)[0]]
        raise InputError(f'{labels or root} has one class only ({abbreviate(names)}); at least two are needed'
                         + ''.join(f'; are they in --data-dir {quote(f)}?' for f in inside))
    if not others:
        raise InputError(f'{labels or root} has one picture of every class; at least two are needed, to hold one out')
    if not names & others:
        where = labels or ' and '.join(str(f) for f in folders.values())
        raise InputError(f'the training set and the validation set in {where} share no class ({abbreviate(names)}; '
                         f'{abbreviate(others)}); to hold out a part of the first, name it with --data-dir')
    if others - names:
        remarks.append(f'only among the held-out images, and left out: {abbreviate(others - names)}')
    if names - others:
        remarks.append(f'not among the held-out images: {abbreviate(names - others)}')
    if others := {label for _, label in test} - names:
        remarks.append(f'only in the test set, and left out: {abbreviate(others)}')
    remarks += alike(names | others)
    classes = sorted(names, key=natural_order)
    index = {name: i for i, name in enumerate(classes)}

    def indexed(labelled: Labelled) -> Pictures:
        return Pictures([(path, index[label]) for path, label in labelled if label in index])

    return Data(indexed(train), indexed(held_out), classes, remarks, indexed(test) or None, validates_on_test)
