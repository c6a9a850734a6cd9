"""Tables of images and labels."""
import csv
import io
from pathlib import Path
from typing import Dict

from .console import InputError, abbreviate
from .folders import Labelled
from .images import SUFFIXES

__all__ = ['read_labels']

FILE_COLUMNS, LABEL_COLUMNS = ('file', 'filename', 'file_name', 'path', 'image'), ('label', 'class', 'target')


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
