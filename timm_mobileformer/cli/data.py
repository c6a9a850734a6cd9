"""Finding the images of a data set, their classes and splits."""
import csv
import io
import os
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from timm.utils.misc import natural_key

from .console import InputError, abbreviate, quote
from .images import SUFFIXES, Pictures

__all__ = ['Data', 'ImageScan', 'open_data']

TRAIN, HELD_OUT = ('train', 'training'), ('val', 'validation', 'valid', 'eval', 'evaluation', 'test')  # in any case
FILE_COLUMNS, LABEL_COLUMNS = ('file', 'filename', 'file_name', 'path', 'image'), ('label', 'class', 'target')

Labelled = List[Tuple[str, str]]  # path and class of every picture


def contents(folder: Path) -> Tuple[List[Path], List[Path]]:
    """Folders and files in a folder by name, without the hidden ones."""
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith('.')), key=lambda e: e.name)
    folders = [e.is_dir() for e in visible]
    return ([folder / e.name for e, is_dir in zip(visible, folders, strict=True) if is_dir],
            [folder / e.name for e, is_dir in zip(visible, folders, strict=True) if not is_dir])


@dataclass
class ImageScan:
    """What a search for pictures passed over."""
    types: Counter = field(default_factory=Counter)  # of files that are no pictures
    loops: List[Path] = field(default_factory=list)
    loose: List[Path] = field(default_factory=list)  # pictures outside of class folders
    empty: List[Path] = field(default_factory=list)  # class folders without pictures

    def pick(self, files: List[Path]) -> List[Path]:
        """The pictures among some files."""
        self.types.update(f.suffix.lower() or 'without a type' for f in files if f.suffix.lower() not in SUFFIXES)
        return [f for f in files if f.suffix.lower() in SUFFIXES]

    def search(self, folder: Path, above: Sequence[Path] = ()) -> List[Path]:
        """Pictures in and below a folder; `above` are the folders that links must not lead back to."""
        here = folder.resolve()
        if here in above:
            self.loops.append(folder)
            return []
        folders, files = contents(folder)
        return self.pick(files) + [path for f in folders for path in self.search(f, (*(above or here.parents), here))]

    def named(self, paths: Sequence[Path]) -> List[str]:
        """The files among some paths, and the pictures in and below the folders among them."""
        return [str(file) for path in paths for file in (self.search(path) if path.is_dir() else [path])]

    def classes(self, folder: Path) -> Labelled:
        """Pictures below the folders in `folder`, which name their classes."""
        labelled: Labelled = []
        folders, files = contents(folder)
        self.loose += self.pick(files)
        for inner in folders:
            pictures = self.search(inner, (*folder.resolve().parents, folder.resolve()))
            labelled += ((str(path), inner.name) for path in pictures)
            self.empty += [] if pictures or inner in self.loops else [inner]
        if not labelled:
            hint = '; name the classes of those beside each other in a CSV, --labels' if self.loose else ''
            raise InputError(f'{folder} has no folders with pictures{self.of_types(", only")}{hint}')
        return labelled

    def of_types(self, verb: str) -> str:
        return verb + ' ' + abbreviate(f'{n:,} {kind}' for kind, n in self.types.most_common()) if self.types else ''

    def remarks(self) -> List[str]:
        return [text for text in (
            self.of_types('passed over:'),
            self.loose and f'outside of class folders, and passed over: {abbreviate(self.loose)}',
            self.empty and f'without pictures, and no class: {abbreviate(self.empty)}',
            self.loops and f'links to a folder around them, not followed: {abbreviate(self.loops)}',
        ) if text]


def find_splits(root: Path) -> Tuple[Path, Optional[Path], List[str]]:
    """The folder to train on, that of held-out pictures if there is one, and the names of folders beside them."""
    folders = {f.name.lower(): f for f in contents(root)[0]}
    splits = {name: f for name, f in folders.items() if contents(f)[0]}  # not a class of this name, such as trains
    train, held_out = (next((splits[n] for n in names if n in splits), None) for names in (TRAIN, HELD_OUT))
    if train:
        return train, held_out, [f.name for f in folders.values() if f not in (train, held_out)]
    if held_out or folders and folders.keys() <= {*TRAIN, *HELD_OUT}:
        raise InputError(f'{root} has {abbreviate(f.name for f in folders.values())}, but no folder train with a '
                         'folder for every class; where pictures lie side by side, name their classes in a CSV '
                         'with --labels')
    return root, None, []


def read_labels(file: Path, root: Path) -> Labelled:
    """Pictures and classes of a CSV, with or without a header; files as seen from `root` or from the CSV."""
    try:
        text = file.read_text('utf-8-sig')  # spreadsheets begin with a mark
    except UnicodeDecodeError as e:
        raise InputError(f'{file} is not in UTF-8') from e
    delimiter = max(',;\t', key=text.partition('\n')[0].count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    columns = 0, 1
    if rows and Path(rows[0][0]).suffix.lower() not in SUFFIXES:  # a header
        head = [name.strip().lower() for name in rows.pop(0)]
        files, classes = ([head.index(n) for n in names if n in head] for names in (FILE_COLUMNS, LABEL_COLUMNS))
        columns = (files[0], classes[0]) if files and classes else columns
    labels: Dict[str, str] = {}
    missing = []
    for row in rows:
        if len(row) <= max(columns) or not all(row[c].strip() for c in columns):
            raise InputError(f'{file} needs a file and a label in every row, not {delimiter.join(row)!r}')
        name, label = (row[c].strip() for c in columns)
        path = next((str(p / name) for p in (root, file.parent) if (p / name).exists()), None)
        if path is None:
            missing.append(name)
        elif labels.setdefault(path, label) != label:
            raise InputError(f'{file} calls {name} both {labels[path]} and {label}')
    if missing:
        raise InputError(f'{len(missing):,} of {len(rows):,} files in {file} are neither in {root} nor beside it: '
                         + abbreviate(missing))
    return list(labels.items())


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


def open_data(root: Path, labels: Optional[Path] = None, val_split: float = 0.2) -> Data:
    """Find the pictures of a data set.

    Args:
        root: Folder with `train/CLASS/…` and `val/CLASS/…` (or `validation`, `valid`, `eval`, `test`, in any case),
            and perhaps `test/CLASS/…` beside both; with `train/CLASS/…` alone; or with `CLASS/…`.
        labels: CSV of files and labels; instead of class folders.
        val_split: Share of every class to hold out, where no folder is.

    Raises:
        InputError: There is no such folder, or not two classes in it, or the CSV does not fit.
    """
    if not root.is_dir():
        raise InputError(f'{root} is not a folder' if root.exists() else f'no such folder: {root}')
    found = ImageScan()
    held_out: Labelled = []
    test: Labelled = []
    validates_on_test = False
    remarks: List[str] = []
    if labels:
        train = read_labels(labels, root)
    else:
        train_folder, held_out_folder, beside = find_splits(root)
        train = found.classes(train_folder)
        held_out = found.classes(held_out_folder) if held_out_folder else []
        validates_on_test = bool(held_out_folder and held_out_folder.name.lower() == 'test')
        test_folder = next((root / name for name in beside if name.lower() == 'test'), None)
        if held_out_folder and test_folder:
            with suppress(InputError):  # without class folders it is left alone
                test = found.classes(test_folder)
                beside.remove(test_folder.name)
        remarks = found.remarks() + ([f'left alone in {root}: {abbreviate(beside)}'] if beside else [])
    if not held_out:
        train, held_out = split(train, root, val_split)
        share = len(held_out) / max(1, len(train) + len(held_out))
        remarks.append(f'held out: {100 * share:.3g} % of the images, at least one of every class of two or more')
    names, others = {label for _, label in train}, {label for _, label in held_out}
    if len(names) < 2:
        inside = [] if labels else [f for name in names if contents(f := train_folder / name)[0]]
        raise InputError(f'{labels or root} has one class only ({abbreviate(names)}); at least two are needed'
                         + ''.join(f'; are they in --data-dir {quote(f)}?' for f in inside))
    if not others:
        raise InputError(f'{labels or root} has one picture of every class; at least two are needed, to hold one out')
    if not names & others:
        raise InputError(f'{train_folder} and {held_out_folder} share no class ({abbreviate(names)}; '
                         f'{abbreviate(others)}); to hold out a part of the first, name it with --data-dir')
    if others - names:
        remarks.append(f'only among the held-out images, and left out: {abbreviate(others - names)}')
    if names - others:
        remarks.append(f'not among the held-out images: {abbreviate(names - others)}')
    classes = sorted(names, key=natural_key)
    index = {name: i for i, name in enumerate(classes)}

    def indexed(labelled: Labelled) -> Pictures:
        return Pictures([(path, index[label]) for path, label in labelled if label in index])

    if others := {label for _, label in test} - names:
        remarks.append(f'only in the test set, and left out: {abbreviate(others)}')
    return Data(indexed(train), indexed(held_out), classes, remarks, indexed(test) or None, validates_on_test)
