"""Finding images in folders: class folders, splits, and layouts that can be read in two ways."""
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from .console import InputError, abbreviate, quote
from .images import PLUGINS, SUFFIXES
from .options import ARCHIVES

__all__ = ['ImageScan', 'Labelled', 'Splits', 'contents', 'find_splits', 'natural_order', 'relative', 'split_of']

SPLITS = {  # the usual names, in any case
    'train': ('train', 'training'),
    'val': ('val', 'validation', 'valid', 'eval', 'evaluation', 'dev'),
    'test': ('test', 'testing'),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
NO_DATA = ('__MACOSX', '@eaDir')  # copies and thumbnails that macOS and Synology write beside the images
SPLIT_WORD = re.compile(  # in train2017, seg_train, test_set, images_part_1
    rf'(?<![a-z])({"|".join(SPLIT_OF)}|part|fold|batch|shard)(?![a-z])')
FIRST_FOLDER = '^([^/]+)/'  # as a pattern for labels

Labelled = List[Tuple[str, str]]  # path and class of every image
Splits = Dict[str, Labelled]  # by 'train', 'val' and 'test'


def split_of(name: str) -> Optional[str]:
    """'train', 'val' or 'test', if `name` is a usual name for it."""
    return SPLIT_OF.get(name.strip().lower())


def natural_order(name: str) -> Any:
    """Sort key of class names: that of timm, numbers by their values and letters in any case, and total.

    Names that tie there, such as `Cat` and `cat` or `1` and `01`, are told apart by their code points.
    """
    parts = re.split(r'([0-9]+)', name.lower())
    parts[1::2] = [(len(digits.lstrip('0')), digits.lstrip('0')) for digits in parts[1::2]]  # int() takes 4,300 digits
    return parts, name


def relative(path: str, root: Path) -> str:
    """A path as seen from `root`, with slashes; quick where it begins with `root`."""
    start = os.path.join(root, '')
    inside = path[len(start):] if path.startswith(start) else os.path.relpath(path, root)
    return inside.replace(os.sep, '/')


def contents(folder: Path) -> Tuple[List[Path], List[Path]]:
    """Folders and files in a folder, sorted by name, without hidden ones."""
    folders, files = list_folder(str(folder))
    return [Path(f) for f in folders], [Path(f) for f in files]


def list_folder(folder: str) -> Tuple[List[str], List[str]]:
    with os.scandir(folder) as entries:
        visible = sorted((e.name, e.path, e.is_dir()) for e in entries
                         if not e.name.startswith('.') and e.name not in NO_DATA)
    return [path for _, path, is_dir in visible if is_dir], [path for _, path, is_dir in visible if not is_dir]


def suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@dataclass
class ImageScan:
    """A search for images, and what it passed over."""
    types: Counter = field(default_factory=Counter)  # of files that are no images
    loops: List[str] = field(default_factory=list)
    loose: List[str] = field(default_factory=list)  # images outside of class folders
    empty: List[str] = field(default_factory=list)  # class folders without images

    def pick(self, files: Sequence[str]) -> List[str]:
        """The images among some files."""
        kinds = [(f, suffix(f)) for f in files]
        self.types.update(kind or 'without a type' for _, kind in kinds if kind not in SUFFIXES)
        return [f for f, kind in kinds if kind in SUFFIXES]

    def search(self, folder: Path, above: Sequence[str] = ()) -> List[str]:
        """Paths of the images in and below a folder; `above` are the folders that links must not lead back to."""
        here = os.path.realpath(folder)
        if here in above:
            self.loops.append(str(folder))
            return []
        return self._search(str(folder), (*(above or map(str, Path(here).parents)), here))

    def _search(self, folder: str, chain: Tuple[str, ...]) -> List[str]:
        folders, files = list_folder(folder)
        images = self.pick(files)
        for inner in folders:
            if os.path.islink(inner):
                images += self.search(Path(inner), chain)
            else:
                images += self._search(inner, (*chain, os.path.join(chain[-1], os.path.basename(inner))))
        return images

    def named(self, paths: Sequence[Path]) -> List[str]:
        """The files among some paths, and the images in and below the folders among them."""
        return [file for path in paths for file in (self.search(path) if path.is_dir() else [str(path)])]

    def beside(self, folder: Path) -> bool:
        """Whether images lie in `folder` itself or in one folder inside of it, so that folders do not name classes."""
        folders, files = list_folder(str(folder))
        return bool(self.pick(files)) or sum(bool(self.search(Path(f))) for f in folders) < 2

    def classes(self, folder: Path) -> Labelled:
        """Images below the folders in `folder`, which name their classes.

        Raises:
            InputError: There are none, or the folders inside of the classes may be the classes as well.
        """
        labelled: Labelled = []
        folders, files = contents(folder)
        self.loose += self.pick([str(f) for f in files])
        here = folder.resolve()
        for inner in folders:
            images = self.search(inner, (*map(str, here.parents), str(here)))
            labelled += ((path, inner.name) for path in images)
            self.empty += [] if images or str(inner) in self.loops else [str(inner)]
        if not labelled:
            raise InputError(f'{folder} has no folders with images{self.of_types(", only")}{self._way_on(folder)}')
        check_levels(folder, labelled)
        check_names(folder, [label for _, label in labelled], folders)
        return labelled

    def _way_on(self, folder: Path) -> str:
        if any(kind in ARCHIVES for kind in self.types):
            return '; unpack the archive first'
        if not self.loose:
            return ''
        names = [os.path.basename(path) for path in self.loose]
        pattern = "'([^/]+)_[0-9]+'"  # Oxford-IIIT Pet, and many others
        numbered = sum(bool(re.search(r'[^/]_[0-9]+\.', name)) for name in names) > len(names) / 2
        return ('; where images lie side by side, name their classes in a table with --labels'
                + (f', or take them from the names of files with --label-pattern {pattern}' if numbered else ''))

    def matches(self, folder: Path, pattern: re.Pattern) -> Splits:
        """Images in and below a folder, with labels, and perhaps splits, that a pattern finds in their paths.

        Args:
            folder: Folder to search.
            pattern: Searched in the paths relative to `folder`. The label is its group `label`, or else the first; the
                split is its group `split`, if it has one.

        Raises:
            InputError: Some paths do not match, or name a split that is none.
        """
        splits: Splits = defaultdict(list)
        paths = self.search(folder)
        found = [pattern.search(relative(path, folder)) for path in paths]
        group = 'label' if 'label' in pattern.groupindex else 1
        if unmatched := [path for path, match in zip(paths, found, strict=True) if not match or not match[group]]:
            raise InputError(f'{len(unmatched):,} of {len(paths):,} images do not match the pattern '
                             f'{pattern.pattern!r} for labels: {abbreviate(unmatched)}')
        for path, match in zip(paths, found, strict=True):
            assert match
            name = match['split'] if 'split' in pattern.groupindex else 'train'
            if not (split := split_of(name)):
                raise InputError(f'{name!r} is no split; the group `split` of --label-pattern must match train, val or '
                                 f'test, unlike in {path}')
            splits[split].append((path, match[group]))
        return splits

    def of_types(self, verb: str) -> str:
        hints = {kind: f' (pip install {PLUGINS[kind]} reads them)' for kind in self.types if kind in PLUGINS}
        kinds = [f'{n:,} {kind}{hints.get(kind, "")}' for kind, n in self.types.most_common()]
        return f'{verb} {abbreviate(kinds)}' if kinds else ''

    def remarks(self) -> List[str]:
        return [text for text in (
            self.of_types('passed over:'),
            self.loose and f'outside of class folders, and passed over: {abbreviate(self.loose)}',
            self.empty and f'without images, and no class: {abbreviate(self.empty)}',
            self.loops and f'links to a folder around them, not followed: {abbreviate(self.loops)}',
        ) if text]


def check_names(folder: Path, labels: Sequence[str], folders: Sequence[Path]) -> None:
    """Refuse class folders whose names say that they are no classes.

    Raises:
        InputError: They are splits, or the images and boxes of a data set for detection.
    """
    names = list(dict.fromkeys(labels))
    if len(names) > 1 and all(SPLIT_WORD.search(name.lower()) for name in names):
        raise InputError(f'{folder} has {abbreviate(names)}, which look like splits or parts, but no folder train with '
                         'a folder for every class; name the classes in a table with --labels, or, if these are the '
                         f'classes, say so with --label-pattern {quote(FIRST_FOLDER)}')
    boxes = next((f for f in folders if f.name.lower() == 'labels'), None)
    if boxes and [name.lower() for name in names] == ['images']:
        raise InputError(f'{folder} has images and {boxes.name} beside each other, as data sets for the detection of '
                         'objects have them; to classify images, name one class for each in a table with --labels')


def check_levels(folder: Path, labelled: Labelled) -> None:
    """Refuse class folders if most images lie in folders inside of them that bear the same names in several classes.

    Their names may be the classes, as in `fold1/cat`, `fold1/dog`, `fold2/cat`, `fold2/dog`, or the splits, as in
    `cat/train`, `cat/test`, `dog/train`, `dog/test`.

    Raises:
        InputError: Says both readings, and how to choose each of them.
    """
    classes_of: Dict[Tuple[int, str], Set[str]] = defaultdict(set)  # by level and name of a folder inside of classes
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
            f'several folders in {folder} have folders of the same names inside, so that it is not clear which of them '
            f'are the classes: {abbreviate(outer)} (--label-pattern {quote(FIRST_FOLDER)}), {other[0]} '
            f'(--label-pattern {quote(other[1])})?')


def find_splits(root: Path, flat: bool = False) -> Tuple[Dict[str, Path], List[str]]:
    """The folders of the splits, and the names of the folders beside them; without splits, `root` is to train on.

    Args:
        root: Folder of the data set.
        flat: Images may lie side by side in the folders of the splits. Otherwise a folder such as `train` that has no
            folders inside is taken for a class.
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
                         'every class; where images lie side by side, name their classes in a table with --labels')
    return {'train': root}, []
