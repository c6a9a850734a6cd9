"""Columns of a table: which one has the files, the labels and the splits."""
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .console import InputError, abbreviate
from .folders import ImageScan, split_of, suffix
from .images import SUFFIXES

__all__ = ['SAMPLE', 'Columns', 'ImageIndex']

# Usual names of columns, reduced to lower-case letters and digits
FILES = re.compile(r'(?=.)(image|img|picture|photo)?s?(file|path|filename|filepath|fname|name|id)?s?')
LABELS = re.compile(r'(label|class|target|category|species|breed|diagnosis)(e?s|name|label)?')
LABEL_IDS = re.compile(r'(label|class|target|category)(id|index|idx|number|no|code)')
SPLITS = re.compile(r'(data)?(split|subset|set|partition)')

ON, OFF = ('1', '1.0', 'true'), ('0', '0.0', 'false')  # values of one-hot columns, in any case
SAMPLE = 200  # number of rows from which the column of files is chosen


def normalize(path: str) -> str:
    """Normalize a path for comparison: Unicode form, case, slashes."""
    return os.path.normpath(unicodedata.normalize('NFC', path.replace('\\', '/')).casefold()).lstrip('/')


class ImageIndex:
    """Lookup of images by the names that tables have for them.

    Args:
        root: Folder of the images.
        beside: Folder of the table.
    """

    def __init__(self, root: Path, beside: Path) -> None:
        self.folders = list(dict.fromkeys([root, beside]))
        self.by_name: Dict[str, List[Tuple[str, str]]] = defaultdict(list)
        for path in ImageScan().search(root):
            key = normalize(path[len(str(root)):])
            for spelling in (key, os.path.splitext(key)[0]):
                self.by_name[os.path.basename(spelling)].append((spelling, os.path.normpath(path)))

    def candidates(self, name: str) -> List[str]:
        """Return the paths of the images that match `name`.

        A name is a path relative to the folder of the images or of the table; or else the end of such a path, with or
        without its extension, in any case, with forward or backward slashes.
        """
        for folder in self.folders:
            if os.path.isfile(path := os.path.join(folder, name)):
                return [os.path.normpath(path)]
        wanted = normalize(name)
        found = [pair for pair in self.by_name.get(os.path.basename(wanted), ())
                 if pair[0] == wanted or pair[0].endswith('/' + wanted)]
        return list(dict.fromkeys(path for key, path in found if key == wanted)) or [path for _, path in found]

    def locate(self, names: Sequence[str]) -> Dict[str, List[str]]:
        """Return the candidates of each name; if no name has any, drop leading folders common to all names."""
        found = {name: self.candidates(name) if name else [] for name in names}
        parts = {name: path.split('/') for name in names if '/' in (path := normalize(name))}
        for depth in range(len(os.path.commonprefix([p[:-1] for p in parts.values()])) if parts else 0):
            if any(found.values()):
                break
            found.update({name: self.candidates('/'.join(p[depth + 1:])) for name, p in parts.items()})
        return found


class Columns:
    """The columns of a table.

    Args:
        file: Path to the table, for errors.
        rows: Data frame that `read_rows` returned.
        index: Images.
        label_column: Name of the column of labels; by default, it is chosen by `choose_labels`.

    Attributes:
        rows: Data frame without the header.
        names: Names of the columns; their numbers, from 1, if there is no header.
        files: Index of the column of files.
        labels: Index of the column of labels, or indices of one-hot columns.
        split: Index of the column of splits, or None.
        unused: Indices of the other columns.

    Raises:
        InputError: The column of files, of labels or of splits is ambiguous or missing.
    """

    def __init__(self, file: Path, rows: Any, index: ImageIndex, label_column: Optional[str]) -> None:
        self.file, self.rows = file, rows
        head = [str(name) for name in rows.iloc[0]] if len(rows) else []
        found = {c: index.locate(rows[c].head(SAMPLE).unique()) for c in rows}
        self.files = self.choose_files(head, found, index)
        has_values = any(suffix(name) in SUFFIXES or name and (rows[c].iloc[1:] == name).any()
                         for c, name in enumerate(head))  # also if one-hot columns are named 0 and 1
        is_named = head[self.files] and self.usual(FILES, [self.files])
        is_header = not found[self.files].get(head[self.files]) and (is_named or not has_values)
        self.names = [name if is_header and name else str(i) for i, name in enumerate(head, 1)]
        self.rows = rows.iloc[1:] if is_header else rows
        n = num_images(found[self.files])
        rest = [c for c in rows if c != self.files]
        named = self.find_named(label_column, rest) if label_column else []
        self.split = self.choose_split([c for c in rest if c not in named])
        rest = [c for c in rest if c != self.split]
        self.labels = named or self.choose_labels(
            rest, [c for c in rest if not self.is_index(c) and num_images(found[c]) <= 0.9 * n])
        self.unused = [c for c in rest if c not in self.labels]

    def is_on(self, columns: Sequence[int]) -> Any:
        """Return a data frame of whether each cell of one-hot columns is 1."""
        return self.rows[columns].apply(lambda column: column.str.lower().isin(ON))

    def usual(self, pattern: re.Pattern, columns: Sequence[int]) -> List[int]:
        """Return the columns whose names match a pattern of usual names."""
        return [c for c in columns if pattern.fullmatch(re.sub('[^a-z0-9]', '', self.names[c].lower()))]

    def quoted(self, columns: Sequence[int]) -> str:
        return abbreviate((f'`{self.names[c]}`' for c in columns), 10)

    def choose_files(self, head: List[str], found: Dict[int, Dict[str, List[str]]], index: ImageIndex) -> int:
        """Choose the column whose values are images; of several, one with a usual name or with file extensions."""
        self.names = head
        most = max(map(num_images, found.values()), default=0)
        if not most:
            raise InputError(f'no column of {self.file} has names of images in {abbreviate(index.folders)}; its first '
                             f'row is {abbreviate(map(repr, head), 10)}')
        columns = [c for c in found if num_images(found[c]) >= max(1, most / 2)]
        columns = self.usual(FILES, columns) or columns
        columns = [c for c in columns if any(
            suffix(name) in SUFFIXES for name, paths in found[c].items() if paths)] or columns
        if len({tuple(p for paths in found[c].values() for p in paths) for c in columns}) > 1:
            raise InputError(f'{self.file} has several columns of images, {self.quoted(columns)}; rename the right one '
                             'to `file` and remove the others')
        return columns[0]

    def find_named(self, name: str, columns: Sequence[int]) -> List[int]:
        """Return the one column of a name, with the same case if there is one."""
        exact = [c for c in columns if self.names[c] == name]
        columns = exact or [c for c in columns if self.names[c].lower() == name.lower()]
        if len(columns) != 1:
            raise InputError(f'{self.file} has {"several columns" if columns else "no column"} {name!r} for labels; '
                             f'its columns are {self.quoted(range(len(self.names)))}')
        return columns[:1]

    def choose_split(self, columns: Sequence[int]) -> Optional[int]:
        """Choose the column whose values are usual names of train, val and test, if there is one.

        Without train, as in a table of a test set, the column must have a usual name and be the only one.
        """
        found, without_train = [], []
        for c in columns:
            values = [split_of(value) for value in self.rows[c].unique()]
            if 'train' in values and all(values):
                found.append(c)
            elif all(values) and self.usual(SPLITS, [c]):
                without_train.append(c)
            elif any(values) and self.usual(SPLITS, [c]):
                raise InputError(f'column `{self.names[c]}` of {self.file} must be train, val or test in every row; it '
                                 f'has {abbreviate(map(repr, self.rows[c].unique()))}')
        found = self.usual(SPLITS, found) or found or without_train
        if len(found) > 1:
            raise InputError(f'{self.file} has several columns of splits, {self.quoted(found)}; remove all but one')
        return found[0] if found else None

    def is_index(self, c: int) -> bool:
        """Return whether a column is empty or an ascending row number."""
        values = self.rows[c]
        return (values == '').all() or len(values) > 1 and bool(
            values.str.fullmatch('[0-9]{1,18}').all() and (values.astype(int).diff().iloc[1:] > 0).all())

    def choose_labels(self, columns: Sequence[int], informative: Sequence[int]) -> List[int]:
        """Choose the column of labels: one with a usual name, else one-hot columns, else the only informative one."""
        usual = self.usual(LABELS, columns) or self.usual(LABEL_IDS, columns)
        if len(usual) > 1:  # may be numbers and names of the same classes
            distinct = len(self.rows[usual].drop_duplicates())
            if all(self.rows[c].nunique() == distinct for c in usual):
                usual = [c for c in usual if not self.rows[c].str.fullmatch('[0-9]*').all()][:1] or usual[:1]
        if len(usual) == 1:
            return usual
        binary = [c for c in informative if self.rows[c].str.lower().isin([*ON, *OFF]).all()]
        if len(binary) > 1 and not usual:
            on = self.is_on(binary)
            counts = on.sum(axis=1)
            if (counts == 1).mean() > 0.5 and counts.max() == 1:
                return binary
            if counts.max() > 1 and len(binary) == len(informative):
                row = counts.idxmax()
                both = [c for c in binary if on[c][row]]
                raise InputError(f'row {row} of {self.file} has {len(both)} labels, {self.quoted(both)}; an image must '
                                 'have one')
        if len(informative) == 1 and not usual:
            return list(informative)
        problem = 'an ambiguous column of labels' if usual or informative else 'no column of labels'
        raise InputError(f'{self.file} has {problem}; its columns are {self.quoted(range(len(self.names)))}, files are '
                         f'in {self.quoted([self.files])}; name the column of labels with --label-column')


def num_images(found: Dict[str, List[str]]) -> int:
    """Return the number of different images that were found."""
    return len({path for paths in found.values() for path in paths})
