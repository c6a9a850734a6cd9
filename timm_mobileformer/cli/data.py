"""Labelled data sets: finding images and labels, splitting, and remarks on the result."""
import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Set, Tuple

from .console import InputError, abbreviate, plural, quote
from .dataset import ImageDataset
from .duplicates import identical_files
from .folders import ImageScan, Labelled, Splits, contents, find_splits, natural_order, relative, split_of
from .tables import read_labels

__all__ = ['BAD_IMAGES', 'Data', 'find_labels', 'open_data']

BAD_IMAGES = 'bad_images.csv'  # name of the list of images that cannot be used
TABLES = 'metadata.csv', 'metadata.jsonl', '_classes.csv'  # read without --labels if they lie beside the images


def similar_names_remark(names: Iterable[str]) -> List[str]:
    """Return a remark if class names differ only in case, spaces or Unicode form; otherwise an empty list."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[' '.join(unicodedata.normalize('NFKC', name).casefold().split())].append(name)
    similar = [' and '.join(repr(name) for name in group) for group in groups.values() if len(group) > 1]
    return [f'class names that differ only in case, spaces or Unicode form: {abbreviate(similar)}'] if similar else []


def train_val_split(
        labelled: Labelled,
        root: Path,
        val_split: float,
        groups: List[List[str]],
) -> Tuple[Labelled, Labelled]:
    """Split images into a training set and a validation set, class by class.

    The split depends only on hashes of the paths relative to `root`: it is the same in every run and command, whatever
    the seed and the location of the folder, and most images keep their split when others are added.

    Args:
        labelled: Path and class of every image.
        root: Folder of the data set.
        val_split: Fraction of every class for validation; at least one image, and never all.
        groups: Groups of identical images, each of which is kept in one split.

    Returns:
        The training set and the validation set.
    """
    ranks = {path: sha256(os.fsencode(relative(path, root))).digest() for path, _ in labelled}
    group_of = {path: group for group in groups for path in group}
    labels = dict(labelled)
    by_class: Dict[str, List[str]] = defaultdict(list)
    for path, label in labelled:
        by_class[label].append(path)
    val: Set[str] = set()
    remaining = Counter(labels.values())
    for label, paths in by_class.items():
        paths.sort(key=ranks.__getitem__)
        most = max(1, round(val_split * len(paths)))
        for limit, enough in (most, most), (len(paths), 1):  # the second applies if all groups are too large
            for path in paths:
                taken = len(paths) - remaining[label]
                if taken >= enough:
                    break
                group = group_of.get(path, [path])
                sizes = Counter(labels[member] for member in group)
                if path not in val and taken + sizes[label] <= limit and all(
                        n < remaining[inside] for inside, n in sizes.items()):
                    val.update(group)
                    remaining.subtract(sizes)
    return [s for s in labelled if s[0] not in val], [s for s in labelled if s[0] in val]


def duplicate_remarks(splits: Splits, groups: List[List[str]]) -> List[str]:
    """Return remarks on identical images in different splits or classes."""
    labels = {path: (split, label) for split, labelled in splits.items() for path, label in labelled}
    remarks = []
    for split, name in ('val', 'validation'), ('test', 'test'):
        both = [group for group in groups if {'train', split} <= {labels[path][0] for path in group}]
        copies, other = [], 0
        for group in both:
            trained = [path for path in group if labels[path][0] == 'train']
            for path in (path for path in group if labels[path][0] == split):
                copies.append(f'{path} = {trained[0]}')
                other += labels[path][1] not in {labels[one][1] for one in trained}
        if copies:
            remarks.append(
                f'{len(copies):,} of {plural(len(splits[split]), f"{name} image")} identical to training images, '
                f'{other:,} of them only to images of another class: {abbreviate(copies)}; accuracy on them is not '
                'meaningful')
    if several := [group for group in groups if len({labels[path][1] for path in group}) > 1]:
        remarks.append(f'{sum(map(len, several)):,} images are identical to images of another class: '
                       + abbreviate(' = '.join(group) for group in several))
    return remarks


@dataclass
class Data:
    """A labelled data set.

    Attributes:
        train: Training set.
        val: Validation set.
        classes: Class names, by index.
        remarks: Remarks for the user.
        test: Test set, if there is one besides the validation set.
        validates_on_test: Whether `val` is the test set, since there is no other validation set.
    """
    train: ImageDataset
    val: ImageDataset
    classes: List[str]
    remarks: List[str]
    test: Optional[ImageDataset] = None
    validates_on_test: bool = False

    @property
    def sets(self) -> List[ImageDataset]:
        """The training, validation and test set, without the test set if there is none."""
        return [self.train, self.val, *([self.test] if self.test else [])]

    def paths(self) -> List[str]:
        """Return the paths of all images."""
        return [path for images in self.sets for path, _ in images.samples]

    def leave_out(self, bad: Dict[str, str]) -> List[str]:
        """Remove images that cannot be used.

        Args:
            bad: Path of each image -> description of the problem.

        Returns:
            A remark, or an empty list if `bad` is empty.

        Raises:
            InputError: No training image of a class remains, or no validation image.
        """
        if not bad:
            return []
        for images in self.sets:
            images.samples = [sample for sample in images.samples if sample[0] not in bad]
        lost = set(range(len(self.classes))) - {target for _, target in self.train.samples}
        if lost or not self.val:
            which = f'training image of {abbreviate(self.classes[i] for i in sorted(lost))}' if lost else (
                'validation image')
            raise InputError(f'no {which} can be used')
        return [f'skipped {plural(len(bad), "image")} that cannot be used: '
                + abbreviate(f'{path} ({problem})' for path, problem in bad.items())]


def find_table(folder: Path) -> Optional[Path]:
    """Return the path of the table of labels in a folder of images, as the Hugging Face Hub and Roboflow write it."""
    return next((path for name in TABLES if (path := folder / name).is_file()), None)


def find_labels(
        root: Path,
        pattern: Optional[str],
        label_column: Optional[str],
        skip_unlabeled: bool,
) -> Tuple[Splits, List[str]]:
    """Find labelled images without a table that the user names: by a pattern, tables beside them, or class folders.

    Args:
        root: Folder of the data set.
        pattern: Regular expression for labels, which takes precedence; see `ImageScan.match_labels`.
        label_column: Name of the column of labels in a table.
        skip_unlabeled: Skip the rows of a table that have no label.

    Returns:
        The images of each split, and remarks.

    Raises:
        InputError: The images or their labels cannot be determined.
    """
    around = [root, *(f for f in contents(root)[0] if split_of(f.name))]
    tables = {folder: table for folder in around if (table := find_table(folder))}
    if (label_column or skip_unlabeled) and not tables:
        raise InputError('--label-column and --skip-unlabeled need a table; add --labels FILE')
    folders, beside = find_splits(root, flat=bool(pattern or tables.keys() - {root}))
    scan = ImageScan()
    splits: Splits = defaultdict(list)
    remarks: List[str] = []
    for name, folder in folders.items():
        table = tables.get(folder)
        if pattern:
            parts = scan.match_labels(folder, re.compile(pattern))
        elif table and (label_column or ImageScan().is_flat(folder)):
            parts, table_remarks = read_labels(table, folder, label_column, skip_unlabeled)
            remarks += table_remarks
        else:
            try:
                parts = {'train': scan.classes(folder)}
            except InputError:
                if name != 'test' or 'val' not in folders:
                    raise
                beside.append(folder.name)  # a test set without labels
                continue
            if table:
                remarks.append(f'{table} is not used, since there are class folders; to use it, add --labels')
        for inner, labelled in parts.items():
            splits[name if len(folders) > 1 else inner] += labelled
    remarks += scan.remarks() + ([f'ignored folders in {root}: {abbreviate(beside)}'] if beside else [])
    return splits, remarks


def open_data(root: Path, labels: Optional[Path] = None, val_split: float = 0.2,
              label_pattern: Optional[str] = None, label_column: Optional[str] = None,
              skip_unlabeled: bool = False) -> Data:
    """Open a labelled data set.

    Args:
        root: Folder with `train/CLASS/…` and `val/CLASS/…` (or `validation`, `valid`, `eval`, `test`, in any case), and
            optionally `test/CLASS/…` beside both; with `train/CLASS/…` alone; or with `CLASS/…`.
        labels: Table of files and labels, instead of class folders.
        val_split: Fraction of every class for validation if there is no validation set.
        label_pattern: Regular expression that matches the label in the path of an image, instead of class folders; see
            `ImageScan.match_labels`.
        label_column: Name of the column of labels in a table.
        skip_unlabeled: Skip the rows of a table that have no label.

    Returns:
        The data set.

    Raises:
        InputError: The folder does not exist, has fewer than two classes, or can be read in more than one way.
    """
    if not root.is_dir():
        raise InputError(f'{root} is not a folder' if root.exists() else f'no such folder: {root}')
    if labels:
        splits, remarks = read_labels(labels, root, label_column, skip_unlabeled)
    else:
        splits, remarks = find_labels(root, label_pattern, label_column, skip_unlabeled)
    if not splits.get('train'):
        raise InputError(f'{labels or root} has no training set, only {abbreviate(splits)}')
    validates_on_test = 'test' in splits and 'val' not in splits
    if validates_on_test:
        splits['val'] = splits.pop('test')
    train, val, test = (splits.get(name, []) for name in ('train', 'val', 'test'))
    groups = identical_files(path for labelled in splits.values() for path, _ in labelled)
    remarks += duplicate_remarks(splits, groups)
    if not val:
        train, val = train_val_split(train, root, val_split, groups)
        share = len(val) / max(1, len(train) + len(val))
        if groups:
            remarks.append(f'{sum(map(len, groups)):,} images have identical copies, which are kept in the same split: '
                           + abbreviate(' = '.join(group) for group in groups))
        remarks.append(f'validation set: {100 * share:.3g} % of the images, including at least one of every class that '
                       'has two or more')
    names, others = {label for _, label in train}, {label for _, label in val}
    if len(names) < 2:
        inside = [] if labels else [f for name in names if (f := root / name).is_dir() and contents(f)[0]]
        tables = [] if labels else [f for f in contents(root)[1] if f.suffix.lower() in ('.csv', '.tsv')]
        raise InputError(f'{labels or root} has only one class ({abbreviate(names)}); at least two are needed'
                         + ''.join(f'; if its folders are the classes, use --data-dir {quote(f)}' for f in inside)
                         + ''.join(f'; if {f.name} has the labels, add --labels {quote(f)}' for f in tables))
    if not others:
        raise InputError(f'{labels or root} has only one image per class (identical images count as one); at least two '
                         'are needed, one of them for validation')
    if not names & others:
        raise InputError(f'the training set and the validation set in {labels or root} share no class '
                         f'({abbreviate(names)}; {abbreviate(others)}); to split the training set instead, name its '
                         'folder with --data-dir')
    if others - names:
        remarks.append(f'classes only in the validation set, ignored: {abbreviate(others - names)}')
    if names - others:
        remarks.append(f'classes missing from the validation set: {abbreviate(names - others)}')
    if others := {label for _, label in test} - names:
        remarks.append(f'classes only in the test set, ignored: {abbreviate(others)}')
    remarks += similar_names_remark({label for labelled in splits.values() for _, label in labelled})
    classes = sorted(names, key=natural_order)
    index = {name: i for i, name in enumerate(classes)}

    def indexed(labelled: Labelled) -> ImageDataset:
        return ImageDataset([(path, index[label]) for path, label in labelled if label in index])

    return Data(indexed(train), indexed(val), classes, remarks, indexed(test) or None, validates_on_test)
