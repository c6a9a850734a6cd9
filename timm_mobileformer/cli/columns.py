"""Which column of a table names the files, which the labels, and which the splits."""
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .console import InputError, abbreviate
from .folders import ImageScan, split_of
from .images import SUFFIXES

__all__ = ['SAMPLE', 'Columns', 'ImageIndex']

# Usual names of columns, in lower case and without anything but letters and digits
FILES = re.compile(r'(image|img|picture|photo)?s?(file|path|filename|filepath|fname|name|id)?s?')
LABELS = re.compile(r'(label|class|target|category|species|breed|diagnosis)(e?s|name|label)?')
LABEL_IDS = re.compile(r'(label|class|target|category)(id|index|idx|number|no|code)')
SPLITS = re.compile(r'(data)?(split|subset|set|partition)')

ON, OFF = ('1', '1.0', 'true'), ('0', '0.0', 'false')  # in one-hot columns, in any case
SAMPLE = 200  # rows that decide which column names the files


def normalize(path: str) -> str:
    """A path in the one spelling in which paths are compared."""
    return os.path.normpath(unicodedata.normalize('NFC', path.replace('\\', '/')).casefold()).lstrip('/')


class ImageIndex:
    """The images of a folder, to be found by the names that tables give them."""

    def __init__(self, root: Path, beside: Path) -> None:
        self.folders = list(dict.fromkeys([root, beside]))
        self.by_name: Dict[str, List[Tuple[str, str]]] = defaultdict(list)
        for path in ImageScan().search(root):
            key = normalize(path[len(str(root)):])
            for spelling in (key, os.path.splitext(key)[0]):
                self.by_name[os.path.basename(spelling)].append((spelling, os.path.normpath(path)))

    def candidates(self, name: str) -> List[str]:
        """Paths of the images that `name` may mean.

        It is a path as seen from the folder of the data or from that of the table; or else the end of such a path, with
        or without its extension, in any case, with slashes of either kind.
        """
        for folder in self.folders:
            if os.path.isfile(path := os.path.join(folder, name)):
                return [os.path.normpath(path)]
        wanted = normalize(name)
        found = [pair for pair in self.by_name.get(os.path.basename(wanted), ())
                 if pair[0] == wanted or pair[0].endswith('/' + wanted)]
        return list(dict.fromkeys(path for key, path in found if key == wanted)) or [path for _, path in found]

    def locate(self, names: Sequence[str]) -> Dict[str, List[str]]:
        """Candidates for all names; if there are none, then without the leading folders that all of them share."""
        found = {name: self.candidates(name) if name else [] for name in names}
        parts = {name: path.split('/') for name in names if '/' in (path := normalize(name))}
        for depth in range(len(os.path.commonprefix([p[:-1] for p in parts.values()])) if parts else 0):
            if any(found.values()):
                break
            found.update({name: self.candidates('/'.join(p[depth + 1:])) for name, p in parts.items()})
        return found


class Columns:
    """What the columns of a table are.

    Args:
        file: Of the table, for errors.
        rows: Its cells, as `read_rows` gives them.
        index: The images.
        label_column: Name of the column of labels, if that is known.

    Attributes:
        rows: Without the header.
        names: Of all columns; their numbers from 1 where there is no header.
        files, labels, split: Indices of columns. There are several of labels if the table is one-hot, and
            there may be no split.

    Raises:
        InputError: It is not clear which columns they are.
    """

    def __init__(self, file: Path, rows: Any, index: ImageIndex, label_column: Optional[str]) -> None:
        self.file, self.rows = file, rows
        head = [str(name) for name in rows.iloc[0]] if len(rows) else []
        found = {c: index.locate(rows[c].head(SAMPLE).unique()) for c in rows}
        self.files = self.choose_files(head, found, index)
        is_header = not found[self.files].get(head[self.files]) and not any(
            os.path.splitext(name)[1].lower() in SUFFIXES or name and (rows[c].iloc[1:] == name).any()
            for c, name in enumerate(head))
        self.names = [name if is_header and name else str(i) for i, name in enumerate(head, 1)]
        self.rows = rows.iloc[1:] if is_header else rows
        n = num_images(found[self.files])
        rest = [c for c in rows if c != self.files]
        named = self.named(label_column, rest) if label_column else []
        self.split = self.choose_split([c for c in rest if c not in named])
        rest = [c for c in rest if c != self.split]
        self.labels = named or self.choose_labels(
            rest, [c for c in rest if not self.is_index(c) and num_images(found[c]) <= 0.9 * n])
        self.unused = [c for c in rest if c not in self.labels]

    def on(self, columns: Sequence[int]) -> Any:
        """Which cells of one-hot columns are 1."""
        return self.rows[columns].apply(lambda column: column.str.lower().isin(ON))

    def usual(self, pattern: re.Pattern, columns: Sequence[int]) -> List[int]:
        return [c for c in columns if pattern.fullmatch(re.sub('[^a-z0-9]', '', self.names[c].lower()))]

    def quoted(self, columns: Sequence[int]) -> str:
        return abbreviate((f'`{self.names[c]}`' for c in columns), 10)

    def choose_files(self, head: List[str], found: Dict[int, Dict[str, List[str]]], index: ImageIndex) -> int:
        """The column whose values are files; of several, that of a usual name, or of names with an extension."""
        self.names = head
        most = max(map(num_images, found.values()), default=0)
        if not most:
            raise InputError(f'no column of {self.file} names images in {abbreviate(index.folders)}; its first row is '
                             f'{abbreviate(map(repr, head), 10)}')
        columns = [c for c in found if num_images(found[c]) >= max(1, most / 2)]
        columns = self.usual(FILES, columns) or columns
        columns = [c for c in columns if any(os.path.splitext(name)[1].lower() in SUFFIXES for name, paths
                                             in found[c].items() if paths)] or columns
        if len({tuple(p for paths in found[c].values() for p in paths) for c in columns}) > 1:
            raise InputError(f'{self.file} names images in several columns, {self.quoted(columns)}; call the right one '
                             '`file`, and leave out the others')
        return columns[0]

    def named(self, name: str, columns: Sequence[int]) -> List[int]:
        exact = [c for c in columns if self.names[c] == name]
        columns = exact or [c for c in columns if self.names[c].lower() == name.lower()]
        if len(columns) != 1:
            raise InputError(f'{self.file} has {"several columns" if columns else "no column"} {name!r} beside that of '
                             f'files, but {self.quoted(range(len(self.names)))}')
        return columns[:1]

    def choose_split(self, columns: Sequence[int]) -> Optional[int]:
        """The column whose values are train, val or test, in any of their usual names."""
        found = []
        for c in columns:
            values = [split_of(value) for value in self.rows[c].unique()]
            if 'train' in values and all(values):
                found.append(c)
            elif any(values) and self.usual(SPLITS, [c]):
                raise InputError(f'column `{self.names[c]}` of {self.file} has to say train, val or test in every row, '
                                 f'not {abbreviate(self.rows[c].unique())}')
        found = self.usual(SPLITS, found) or found
        if len(found) > 1:
            raise InputError(f'{self.file} has several columns of splits, {self.quoted(found)}; leave out all but one')
        return found[0] if found else None

    def is_index(self, c: int) -> bool:
        """Whether a column says nothing, or counts the rows."""
        values = self.rows[c]
        return (values == '').all() or len(values) > 1 and bool(
            values.str.fullmatch('[0-9]{1,18}').all() and (values.astype(int).diff().iloc[1:] > 0).all())

    def choose_labels(self, columns: Sequence[int], informative: Sequence[int]) -> List[int]:
        """The column of labels: the one of a usual name, or else one-hot columns, or else the only one left."""
        usual = self.usual(LABELS, columns) or self.usual(LABEL_IDS, columns)
        if len(usual) > 1:  # numbers and names of the same classes are one choice
            distinct = len(self.rows[usual].drop_duplicates())
            if all(self.rows[c].nunique() == distinct for c in usual):
                usual = [c for c in usual if not self.rows[c].str.fullmatch('[0-9]*').all()][:1] or usual[:1]
        if len(usual) == 1:
            return usual
        binary = [c for c in informative if self.rows[c].str.lower().isin([*ON, *OFF]).all()]
        if len(binary) > 1 and not usual:
            on = self.on(binary)
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
        problem = f'which column of {self.file} has the labels is not clear' if usual or informative else (
            f'{self.file} has no column of labels')
        raise InputError(f'{problem}; it has {self.quoted(range(len(self.names)))}; {self.quoted([self.files])} is '
                         'that of files; name it with --label-column')


def num_images(found: Dict[str, List[str]]) -> int:
    return len({path for paths in found.values() for path in paths})
