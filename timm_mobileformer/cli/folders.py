"""Image folders: class folders, splits, and errors for ambiguous layouts."""
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from .console import InputError, abbreviate, plural, quote
from .images import PLUGINS, SUFFIXES
from .options import ARCHIVES

__all__ = ['ImageScan', 'Labelled', 'Splits', 'contents', 'find_splits', 'natural_order', 'relative', 'split_of',
           'suffix']

SPLITS = {  # split -> usual names of its folder, in any case
    'train': ('train', 'training'),
    'val': ('val', 'validation', 'valid', 'eval', 'evaluation', 'dev'),
    'test': ('test', 'testing'),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
NO_DATA = ('__MACOSX', '@eaDir')  # metadata and thumbnails of macOS and Synology
SPLIT_WORD = re.compile(  # matches train2017, seg_train, test_set, images_part_1
    rf'(?<![a-z])({"|".join(SPLIT_OF)}|part|fold|batch|shard)(?![a-z])')
FIRST_FOLDER = '^([^/]+)/'  # label pattern: the first folder of a path

Labelled = List[Tuple[str, str]]  # path and class name of each image
Splits = Dict[str, Labelled]  # keys: 'train', 'val', 'test'


def split_of(name: str) -> Optional[str]:
    """Return 'train', 'val' or 'test' if `name` is a usual name of that split, otherwise None."""
    return SPLIT_OF.get(name.strip().lower())


def natural_order(name: str) -> Any:
    """Sort key of class names: timm's natural order (numbers by value, case ignored), made unambiguous.

    Ties, such as `Cat` and `cat` or `1` and `01`, are broken by code points.
    """
    parts = re.split(r'([0-9]+)', name.lower())
    parts[1::2] = [(len(digits.lstrip('0')), digits.lstrip('0')) for digits in parts[1::2]]  # int() has a limit
    return parts, name


def relative(path: str, root: Path) -> str:
    """Return a path relative to `root`, with forward slashes; fast if it begins with `root`."""
    start = os.path.join(root, '')
    inside = path[len(start):] if path.startswith(start) else os.path.relpath(path, root)
    return inside.replace(os.sep, '/')


def contents(folder: Path) -> Tuple[List[Path], List[Path]]:
    """Return the folders and the files in a folder, sorted by name, without hidden ones."""
    folders, files = list_folder(str(folder))
    return [Path(f) for f in folders], [Path(f) for f in files]


def list_folder(folder: str) -> Tuple[List[str], List[str]]:
    with os.scandir(folder) as entries:
        visible = sorted((e.name, e.path, e.is_dir()) for e in entries
                         if not e.name.startswith('.') and e.name not in NO_DATA)
    return [path for _, path, is_dir in visible if is_dir], [path for _, path, is_dir in visible if not is_dir]


def suffix(path: str) -> str:
    """Return the suffix of a path in lower case, such as `.jpg`."""
    return os.path.splitext(path)[1].lower()


@dataclass
class ImageScan:
    """Search for images that records what it ignores.

    Attributes:
        types: Number of ignored files by suffix.
        loops: Links to a parent folder.
        loose: Images outside of class folders.
        empty: Folders without images beside class folders.
    """
    types: Counter = field(default_factory=Counter)
    loops: List[str] = field(default_factory=list)
    loose: List[str] = field(default_factory=list)
    empty: List[str] = field(default_factory=list)

    def filter(self, files: Sequence[str]) -> List[str]:
        """Return the images among files."""
        kinds = [(f, suffix(f)) for f in files]
        self.types.update(kind or 'without extension' for _, kind in kinds if kind not in SUFFIXES)
        return [f for f, kind in kinds if kind in SUFFIXES]

    def search(self, folder: Path, above: Sequence[str] = ()) -> List[str]:
        """Return the paths of all images in a folder and its subfolders; links to folders in `above` are ignored."""
        here = os.path.realpath(folder)
        if here in above:
            self.loops.append(str(folder))
            return []
        return self._search(str(folder), (*(above or map(str, Path(here).parents)), here))

    def _search(self, folder: str, chain: Tuple[str, ...]) -> List[str]:
        folders, files = list_folder(folder)
        images = self.filter(files)
        for inner in folders:
            if os.path.islink(inner):
                images += self.search(Path(inner), chain)
            else:
                images += self._search(inner, (*chain, os.path.join(chain[-1], os.path.basename(inner))))
        return images

    def expand(self, paths: Sequence[Path]) -> List[str]:
        """Return the files among paths, and all images in the folders among them and their subfolders.

        Raises:
            InputError: There are no images.
        """
        files = [file for path in paths for file in (self.search(path) if path.is_dir() else [str(path)])]
        if not files:
            raise InputError(f'no images in {abbreviate(paths)}{self.ignored_types(", only")}')
        return files

    def is_flat(self, folder: Path) -> bool:
        """Return whether a folder has no class folders: images lie in it directly, or in at most one subfolder."""
        folders, files = list_folder(str(folder))
        return bool(self.filter(files)) or sum(bool(self.search(Path(f))) for f in folders) < 2

    def classes(self, folder: Path) -> Labelled:
        """Return the images in class folders, `folder/CLASS/…`.

        Raises:
            InputError: There are no images, or it is ambiguous which folders are the classes.
        """
        labelled: Labelled = []
        folders, files = contents(folder)
        self.loose += self.filter([str(f) for f in files])
        here = folder.resolve()
        for inner in folders:
            images = self.search(inner, (*map(str, here.parents), str(here)))
            labelled += ((path, inner.name) for path in images)
            self.empty += [] if images or str(inner) in self.loops else [str(inner)]
        if not labelled:
            raise InputError(f'{folder} has no folders with images{self.ignored_types(", only")}{self._hint()}')
        check_levels(folder, labelled)
        check_names(folder, [label for _, label in labelled], folders)
        return labelled

    def _hint(self) -> str:
        if any(kind in ARCHIVES for kind in self.types):
            return '; unpack the archive first'
        if not self.loose:
            return ''
        names = [os.path.basename(path) for path in self.loose]
        pattern = "'([^/]+)_[0-9]+'"  # Oxford-IIIT Pet, and many others
        labels = [match[1] for name in names if (match := re.search(r'([^/]+)_[0-9]+\.', name))]
        names_have_labels = len(labels) > len(names) / 2 and len(set(labels)) > 1  # unlike image_0001, image_0002
        return ('; without class folders, name a table of labels with --labels'
                + (f', or match the labels in file names with --label-pattern {pattern}' if names_have_labels else ''))

    def match_labels(self, folder: Path, pattern: re.Pattern) -> Splits:
        """Return all images in a folder and its subfolders, with labels and splits that a pattern matches.

        Args:
            folder: Folder to search.
            pattern: Pattern to search in paths relative to `folder`. The group `label`, or else the first group, is the
                label; the group `split`, if there is one, is the split.

        Raises:
            InputError: A path does not match, or the split is not a known one.
        """
        splits: Splits = defaultdict(list)
        paths = self.search(folder)
        matches = [pattern.search(relative(path, folder)) for path in paths]
        group = 'label' if 'label' in pattern.groupindex else 1
        if unmatched := [path for path, match in zip(paths, matches, strict=True) if not match or not match[group]]:
            raise InputError(f'{len(unmatched):,} of {plural(len(paths), "image")} without a match of the pattern '
                             f'{pattern.pattern!r} of --label-pattern: {abbreviate(unmatched)}')
        for path, match in zip(paths, matches, strict=True):
            assert match
            name = match['split'] if 'split' in pattern.groupindex else 'train'
            if not (split := split_of(name)):
                raise InputError(f'{name!r} in {path} is not a split; the group `split` of --label-pattern must match '
                                 'train, val or test')
            splits[split].append((path, match[group]))
        return splits

    def ignored_types(self, prefix: str) -> str:
        """Return `prefix` and the number of ignored files by suffix, '' if there are none."""
        hints = {kind: f' (to read them, pip install {PLUGINS[kind]})' for kind in self.types if kind in PLUGINS}
        kinds = [f'{n:,} {kind}{hints.get(kind, "")}' for kind, n in self.types.most_common()]
        return f'{prefix} {abbreviate(kinds)}' if kinds else ''

    def remarks(self) -> List[str]:
        """Return remarks on what was ignored."""
        return [text for text in (
            self.ignored_types('ignored files:'),
            self.loose and f'images outside of class folders, ignored: {abbreviate(self.loose)}',
            self.empty and f'folders without images, not used as classes: {abbreviate(self.empty)}',
            self.loops and f'links to a parent folder, not followed: {abbreviate(self.loops)}',
        ) if text]


def check_names(folder: Path, labels: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse class folders whose names do not look like classes.

    Raises:
        InputError: The folders look like splits, or like the images and boxes of a detection data set.
    """
    names = list(dict.fromkeys(labels))
    if len(names) > 1 and all(SPLIT_WORD.search(name.lower()) for name in names):
        raise InputError(f'{folder} has {abbreviate(names)}, which look like splits or parts, but no folder train with '
                         'a folder for every class; name a table of labels with --labels, or, if these are the '
                         f'classes, add --label-pattern {quote(FIRST_FOLDER)}')
    boxes = next((f for f in folders if f.name.lower() == 'labels'), None)
    if boxes and [name.lower() for name in names] == ['images']:
        raise InputError(f'{folder} has folders images and {boxes.name}, like data sets for object detection; for '
                         'classification, name a table with one label per image with --labels')


def check_levels(folder: Path, labelled: Labelled) -> None:
    """Refuse class folders if most images lie in subfolders whose names occur in several of the class folders.

    The subfolders may be the classes, as in `fold1/cat`, `fold1/dog`, `fold2/cat`, `fold2/dog`, or the splits, as in
    `cat/train`, `cat/test`, `dog/train`, `dog/test`.

    Raises:
        InputError: The layout is ambiguous; the message gives the `--label-pattern` of both readings.
    """
    classes_of: Dict[Tuple[int, str], Set[str]] = defaultdict(set)  # by depth and name of a subfolder
    inner = []
    for path, label in labelled:
        names = relative(path, folder).split('/')[1:-1]
        inner.append(list(enumerate(names)))
        for key in inner[-1]:
            classes_of[key].add(label)
    outer = list(dict.fromkeys(label for _, label in labelled))
    for level in sorted({level for level, _ in classes_of}):
        shared = {name for (at, name), classes in classes_of.items() if at == level and len(classes) > 1}
        n = sum(len(keys) > level and keys[level][1] in shared for keys in inner)
        if len(shared) < 2 or 2 * n <= len(labelled):
            continue
        between = '[^/]+/' * level
        if all(split_of(name) for name in shared):
            other = f'with {abbreviate(shared)} as splits', f'^(?P<label>[^/]+)/{between}(?P<split>[^/]+)/'
        else:
            other = f'or {abbreviate(shared)}', f'^[^/]+/{between}([^/]+)/'
        raise InputError(
            f'folders in {folder} have subfolders of the same names, so that the classes are ambiguous: '
            f'{abbreviate(outer)} (--label-pattern {quote(FIRST_FOLDER)}), {other[0]} (--label-pattern '
            f'{quote(other[1])})')


def find_splits(root: Path, flat: bool = False) -> Tuple[Dict[str, Path], List[str]]:
    """Find the folders of the splits.

    Args:
        root: Folder of the data set.
        flat: Whether the folders of the splits need no class folders. If False, a folder such as `train` without
            subfolders is a class.

    Returns:
        The folder of each split, only that of 'train', `root`, if there are no splits; and the names of other folders.

    Raises:
        InputError: There is a validation or test set without a training set.
    """
    folders = contents(root)[0]
    splits: Dict[str, Path] = {}
    for split, names in SPLITS.items():
        found = {f.name.lower(): f for f in folders if flat or list_folder(str(f))[0]}
        if usual := next((name for name in names if name in found), None):
            splits[split] = found[usual]
    if 'train' in splits:
        return splits, [f.name for f in folders if f not in splits.values()]
    if 'val' in splits or 'test' in splits and not flat:
        raise InputError(f'{root} has {abbreviate(f.name for f in folders)}, but no folder train with a folder for '
                         'every class; without class folders, name a table of labels with --labels')
    return {'train': root}, []
