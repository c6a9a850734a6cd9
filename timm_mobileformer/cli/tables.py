"""Tables of labels: reading CSV and JSON lines."""
import io
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .columns import SAMPLE, Columns, ImageIndex
from .console import InputError, abbreviate, missing, plural, reason
from .folders import Splits, natural_order, relative, split_of

__all__ = ['read_labels']

NO_LABEL = ('', 'nan', '<na>', 'n/a', 'null')  # in any case; without None, which may be the name of a class
SEPARATORS = (',', ';', '\t', '|', r'\s+')


def read_text(file: Path) -> Tuple[str, List[str]]:
    """Read the text of a file; return it with a remark if the encoding was guessed."""
    data = file.read_bytes()
    if data[:2] in (b'\xff\xfe', b'\xfe\xff'):
        return data.decode('utf-16', 'replace'), []
    if b'\0' in data:
        raise InputError(f'{file} is not a text file; save the table as CSV')
    try:
        return data.decode('utf-8-sig'), []
    except UnicodeDecodeError:
        return data.decode('cp1252', 'replace'), [f'{file} is not UTF-8, and was read as Latin-1 (Windows-1252)']


def read_json_lines(file: Path) -> Any:
    """Read JSON lines as a data frame of text whose first row is the names of the columns."""
    import pandas as pd

    try:
        records = {i: json.loads(line) for i, line in enumerate(read_text(file)[0].split('\n'), 1) if line.strip()}
        rows = pd.DataFrame(list(records.values()), list(records), dtype=object)
    except (ValueError, AttributeError) as e:
        raise InputError(f'{file} cannot be read as JSON lines: {reason(e)}') from e

    def text(value: Any) -> str:
        if isinstance(value, list):
            return '|'.join(map(str, value))
        return '' if value is None or value != value else str(value)

    names = pd.DataFrame([[str(name) for name in rows.columns]], [0])
    return pd.concat([names, rows.map(text).set_axis(range(rows.shape[1]), axis=1)])


def read_rows(file: Path, index: ImageIndex) -> Tuple[Any, List[str]]:
    """Read a table as a data frame of text, indexed by line number, the header included.

    Args:
        file: Path to the table.
        index: Images, which choose the separator: that for which the most values are paths of images.

    Returns:
        The data frame, and remarks.

    Raises:
        InputError: The file cannot be read as a table.
    """
    import pandas as pd

    if file.suffix.lower() in ('.jsonl', '.ndjson'):
        return read_json_lines(file), []
    text, remarks = read_text(file)
    lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
    separators: Sequence[str] = SEPARATORS
    if named := re.fullmatch(r'"?sep=(.)"?', lines[0].strip('\ufeff'), re.IGNORECASE):  # written for Excel
        separators, lines[0] = (named[1],), ''
    quotes = comments = 0
    for i, line in enumerate(lines):
        if line.startswith('#') and not quotes % 2 and not index.candidates(re.split(r'[,;\t|]', line)[0].strip()):
            lines[i], comments = '', comments + 1
        quotes += line.count('"')
    if comments:
        remarks.append(f'{file}: skipped {plural(comments, "line")} that began with #')
    start = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if lines[start].strip().isdigit():
        raise InputError(f'the first line of {file} is only a number, {lines[start].strip()}, such as a count of rows; '
                         'remove it')
    text = '\n'.join(lines[start:])

    def parse(separator: str, nrows: Optional[int] = None) -> Any:
        rows = pd.read_csv(
            io.StringIO(text), sep=separator, nrows=nrows, header=None, dtype=str, keep_default_na=False,
            skip_blank_lines=False, skipinitialspace=True).fillna('')
        rows.index += start + 1
        rows = rows.apply(lambda column: column.str.strip())
        return rows[(rows != '').any(axis=1)]

    def num_files(separator: str) -> int:
        try:
            head = parse(separator, SAMPLE)
        except ValueError:  # rows of unequal length with this separator
            return 0
        return max((sum(map(bool, index.locate(head[c].unique()).values())) for c in head), default=0
                   ) if head.shape[1] > 1 else 0

    try:
        return parse(max(separators, key=num_files)), remarks
    except ValueError as e:
        raise InputError(f'{file} cannot be read as a table: {reason(e)}') from e


def read_labels(
        file: Path,
        root: Path,
        label_column: Optional[str] = None,
        skip_unlabeled: bool = False,
) -> Tuple[Splits, List[str]]:
    """Read a table of labels.

    Args:
        file: Path to a table separated by commas, semicolons, tabs, `|` or spaces, or to JSON lines.
        root: Folder of the images.
        label_column: Name of the column of labels, or its number, from 1, if there is no header.
        skip_unlabeled: Skip rows without a label.

    Returns:
        The images of each split, and remarks on how the table was read.

    Raises:
        InputError: The table cannot be read or is ambiguous, or images are missing, unlabeled or labeled twice.
    """
    if lack := missing('demo', 'pandas'):
        raise InputError(f'{file} {lack}')
    index = ImageIndex(root, file.parent)
    rows, remarks = read_rows(file, index)
    columns = Columns(file, rows, index, label_column)
    rows = columns.rows
    if len(columns.labels) > 1:
        on = columns.is_on(columns.labels)
        labels = on.idxmax(axis=1).map(lambda c: columns.names[c]).where(on.any(axis=1), '')
    else:
        labels = rows[columns.labels[0]]
    unlabeled = labels.str.lower().isin(NO_LABEL)
    if unlabeled.any():
        which = f'{unlabeled.sum():,} of {plural(len(rows), "row")} in {file} without a label'
        if not skip_unlabeled:
            raise InputError(f'{which}: {abbreviate(f"row {i}" for i in rows.index[unlabeled])}; use --skip-unlabeled '
                             'to skip them')
        remarks.append(f'skipped {which}')
    rows, labels = rows[~unlabeled], labels[~unlabeled]
    check_single_label(file, labels)

    found = index.locate(rows[columns.files].unique())
    check_found(file, root, found)
    paths = [found[name][0] for name in rows[columns.files]]
    if columns.split is not None:
        split_by, row_splits = f'column {columns.quoted([columns.split])}', list(rows[columns.split].map(split_of))
    else:
        split_by, row_splits = 'folders', [split_of(relative(path, root).split('/')[0]) for path in paths]
        if not {'train'} < set(row_splits) - {None}:
            split_by, row_splits = '', ['train'] * len(paths)
    seen: Dict[str, Tuple[int, str, str]] = {}
    for row, path, label, split in zip(rows.index, paths, labels, row_splits, strict=True):
        before = seen.setdefault(path, (row, label, split or 'train'))
        for one, other in zip(before[1:], (label, split or 'train'), strict=True):
            if one != other:
                raise InputError(f'{path} is both {one} and {other} in {file}, in rows {before[0]} and {row}')
    if len(seen) < len(paths):
        remarks.append(f'{file}: {plural(len(paths) - len(seen), "row")} with an image of another row')
    others = [(name, paths[0]) for name, paths in found.items()
              if os.path.normpath(paths[0]) not in [os.path.normpath(os.path.join(f, name)) for f in index.folders]]
    if others:
        remarks.append(f'{file}: {plural(len(others), "name")} other than the path of the image, such as '
                       f'{others[0][0]!r} for {others[0][1]}')
    classes = sorted(labels.unique(), key=natural_order)
    taken = [f'files in column {columns.quoted([columns.files])}',
             f'labels in column {columns.quoted(columns.labels)}, {plural(len(classes), "class")}: '
             + abbreviate(classes)]
    if split_by:
        taken.append(f'splits by {split_by}')
    if columns.unused:
        taken.append(f'unused columns: {columns.quoted(columns.unused)}')
    remarks.insert(0, f'{file}: ' + '; '.join(taken))
    splits: Splits = defaultdict(list)
    for path, (_, label, split) in sorted(seen.items()):
        splits[split].append((path, label))
    return splits, remarks


def check_single_label(file: Path, labels: Any) -> None:
    """Raise an `InputError` if a label is a list of labels, such as `cat|dog`."""
    classes = set(labels)
    for label in sorted(classes):
        for separator in '|;,':
            parts = [part.strip() for part in label.split(separator)]
            if len(parts) > 1 and (separator == '|' or classes.issuperset(parts)):
                raise InputError(f'row {labels.index[labels == label][0]} of {file} has {len(parts)} labels, {label}; '
                                 'an image must have one')


def check_found(file: Path, root: Path, found: Dict[str, List[str]]) -> None:
    """Raise an `InputError` if a name in the table matches no image or several."""
    for name, paths in found.items():
        if len(paths) > 1:
            raise InputError(f'{name!r} in {file} matches several images: {abbreviate(paths)}')
    if absent := [name or 'an empty name' for name, paths in found.items() if not paths]:
        raise InputError(f'{len(absent):,} of {plural(len(found), "file")} in {file} neither in {root} nor beside the '
                         'table: ' + abbreviate(absent))
