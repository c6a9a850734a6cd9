"""Finding the images of a data set, their classes and splits."""
import os
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Set, Tuple

from .console import InputError, abbreviate, quote
from .dataset import ImageDataset
from .duplicates import identical_files
from .folders import ImageScan, Labelled, Splits, contents, find_splits, natural_order, relative, split_of
from .tables import read_labels

__all__ = ['BAD_IMAGES', 'Data', 'ImageScan', 'find_labels', 'open_data']

BAD_IMAGES = 'bad_images.csv'  # file with the images that cannot be used
TABLES = 'metadata.csv', 'metadata.jsonl', '_classes.csv'  # found beside images without being named


def alike(names: Iterable[str]) -> List[str]:
    """A remark if some names of classes look the same: they differ in case, blanks or the form of Unicode only."""
    groups = defaultdict(list)
    for name in sorted(names):
        groups[' '.join(unicodedata.normalize('NFKC', name).casefold().split())].append(name)
    same = [' and '.join(repr(name) for name in group) for group in groups.values() if len(group) > 1]
    return [f'different classes whose names are nearly the same: {abbreviate(same)}'] if same else []


def split(labelled: Labelled, root: Path, share: float, groups: List[List[str]]) -> Tuple[Labelled, Labelled]:
    """Hold out a share of every class, at least one image and never all.

    Hashes of the paths say which: the same ones in every run, by every command, whatever `--seed` is and wherever the
    folder lies, and most stay where they are when images are added.

    Args:
        labelled: All images.
        root: Folder of the data set.
        share: Share to hold out.
        groups: Images that must lie on one side, since they are identical.
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
        most = max(1, round(share * len(paths)))
        for limit, enough in (most, most), (len(paths), 1):  # the second for classes of large groups only
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


def say_identical(splits: Splits, groups: List[List[str]]) -> List[str]:
    """Remarks on identical images: those in several splits, and those in several classes."""
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
                f'{len(copies):,} of {len(splits[split]):,} {name} images are identical to images of the training set, '
                f'{other:,} of them of another class only: {abbreviate(copies)}; the accuracy on them says little')
    if several := [group for group in groups if len({labels[path][1] for path in group}) > 1]:
        remarks.append(f'{sum(map(len, several)):,} images are identical to images of another class: '
                       + abbreviate(' = '.join(group) for group in several))
    return remarks


@dataclass
class Data:
    """Labelled images: the training set, the validation set, their classes by index, and remarks for the user."""
    train: ImageDataset
    val: ImageDataset
    classes: List[str]
    remarks: List[str]
    test: Optional[ImageDataset] = None  # where a folder of that name lies beside those of train and val
    validates_on_test: bool = False  # the folder test is all there is to validate on

    @property
    def sets(self) -> List[ImageDataset]:
        return [self.train, self.val, *([self.test] if self.test else [])]

    def paths(self) -> List[str]:
        return [path for images in self.sets for path, _ in images.samples]

    def leave_out(self, bad: Dict[str, str]) -> List[str]:
        """Leave out images that cannot be used, given why; returns a remark if there are some.

        Raises:
            InputError: Nothing to train on remains of a class, or nothing to validate on.
        """
        if not bad:
            return []
        for images in self.sets:
            images.samples = [sample for sample in images.samples if sample[0] not in bad]
        lost = set(range(len(self.classes))) - {target for _, target in self.train.samples}
        if lost or not self.val:
            what = f'of {abbreviate(self.classes[i] for i in sorted(lost))} to train on' if lost else 'to validate on'
            raise InputError(f'no image {what} can be used')
        return [f'{len(bad):,} images cannot be used, and are left out: '
                + abbreviate(f'{path} ({problem})' for path, problem in bad.items())]


def find_table(folder: Path) -> Optional[Path]:
    """A table that came with the images of a folder, as the Hugging Face Hub and Roboflow have them."""
    return next((path for name in TABLES if (path := folder / name).is_file()), None)


def find_labels(root: Path, pattern: Optional[str], label_column: Optional[str], skip_unlabeled: bool,
                ) -> Tuple[Splits, List[str]]:
    """Images by splits, labeled by tables beside them, by a pattern or by their folders; and remarks."""
    around = [root, *(f for f in contents(root)[0] if split_of(f.name))]
    tables = {folder: table for folder in around if (table := find_table(folder))}
    if (label_column or skip_unlabeled) and not tables:
        raise InputError('--label-column and --skip-unlabeled are for a table; name it with --labels')
    folders, beside = find_splits(root, flat=bool(pattern or tables.keys() - {root}))
    found = ImageScan()
    splits: Splits = defaultdict(list)
    remarks: List[str] = []
    for name, folder in folders.items():
        table = tables.get(folder)
        if pattern:
            parts = found.matches(folder, re.compile(pattern))
        elif table and (label_column or ImageScan().beside(folder)):
            parts, said = read_labels(table, folder, label_column, skip_unlabeled)
            remarks += said
        else:
            try:
                parts = {'train': found.classes(folder)}
            except InputError:
                if name != 'test' or 'val' not in folders:
                    raise
                beside.append(folder.name)  # a test set without labels
                continue
            if table:
                remarks.append(f'{table} is not used, since there are class folders; to use it, name it with --labels')
        for inner, labelled in parts.items():
            splits[name if len(folders) > 1 else inner] += labelled
    remarks += found.remarks() + ([f'left alone in {root}: {abbreviate(beside)}'] if beside else [])
    return splits, remarks


def open_data(root: Path, labels: Optional[Path] = None, val_split: float = 0.2,
              label_pattern: Optional[str] = None, label_column: Optional[str] = None,
              skip_unlabeled: bool = False) -> Data:
    """Find the images of a data set.

    Args:
        root: Folder with `train/CLASS/…` and `val/CLASS/…` (or `validation`, `valid`, `eval`, `test`, in any case),
            and perhaps `test/CLASS/…` beside both; with `train/CLASS/…` alone; or with `CLASS/…`.
        labels: Table of files and labels; instead of class folders.
        val_split: Share of every class to hold out, where no folder is.
        label_pattern: Regular expression that finds the label in the path of an image; instead of class folders. See
            `ImageScan.matches`.
        label_column: Name of the column of labels in a table.
        skip_unlabeled: Leave out the rows of a table that have no label.

    Raises:
        InputError: There is no such folder, or not two classes in it, or it is not clear which classes are meant.
    """
    if not root.is_dir():
        raise InputError(f'{root} is not a folder' if root.exists() else f'no such folder: {root}')
    if labels:
        splits, remarks = read_labels(labels, root, label_column, skip_unlabeled)
    else:
        splits, remarks = find_labels(root, label_pattern, label_column, skip_unlabeled)
    validates_on_test = 'test' in splits and 'val' not in splits
    if validates_on_test:
        splits['val'] = splits.pop('test')
    if not splits.get('train'):
        raise InputError(f'{labels or root} has no training set, only {abbreviate(splits)}')
    train, val, test = (splits.get(name, []) for name in ('train', 'val', 'test'))
    groups = identical_files(path for labelled in splits.values() for path, _ in labelled)
    remarks += say_identical(splits, groups)
    if not val:
        train, val = split(train, root, val_split, groups)
        share = len(val) / max(1, len(train) + len(val))
        if groups:
            remarks.append(f'{sum(map(len, groups)):,} images have identical copies, which lie on the same side: '
                           + abbreviate(' = '.join(group) for group in groups))
        remarks.append(f'validation set: {100 * share:.3g} % of the images, at least one of every class of two or more')
    names, others = {label for _, label in train}, {label for _, label in val}
    if len(names) < 2:
        inside = [] if labels else [f for name in names if (f := root / name).is_dir() and contents(f)[0]]
        raise InputError(f'{labels or root} has one class only ({abbreviate(names)}); at least two are needed'
                         + ''.join(f'; are they in --data-dir {quote(f)}?' for f in inside))
    if not others:
        raise InputError(f'{labels or root} has one image of every class (identical ones count as one); at least two '
                         'are needed, to hold one out')
    if not names & others:
        raise InputError(f'the training set and the validation set in {labels or root} share no class '
                         f'({abbreviate(names)}; {abbreviate(others)}); to hold out a part of the first, name it with '
                         '--data-dir')
    if others - names:
        remarks.append(f'only in the validation set, and left out: {abbreviate(others - names)}')
    if names - others:
        remarks.append(f'not in the validation set: {abbreviate(names - others)}')
    if others := {label for _, label in test} - names:
        remarks.append(f'only in the test set, and left out: {abbreviate(others)}')
    remarks += alike({label for labelled in splits.values() for _, label in labelled})
    classes = sorted(names, key=natural_order)
    index = {name: i for i, name in enumerate(classes)}

    def indexed(labelled: Labelled) -> ImageDataset:
        return ImageDataset([(path, index[label]) for path, label in labelled if label in index])

    return Data(indexed(train), indexed(val), classes, remarks, indexed(test) or None, validates_on_test)
