"""Classify images with a PyTorch model or an exported ONNX file."""
import argparse
import csv
import sys
from contextlib import contextmanager
from typing import Any, Iterator, TextIO

from .classifier import open_classifier
from .console import InputError, plural, printable
from .files import atomic_dir, open_csv
from .folders import ImageScan
from .heap import keep_heap

__all__ = ['run']


@contextmanager
def open_table(path: Any) -> Iterator[TextIO]:
    """Open a file that is written atomically, or standard output if `path` is None."""
    if path is None:
        yield sys.stdout
        return
    with atomic_dir(path.parent) as folder, open_csv(folder / path.name) as file:
        yield file


def run(args: argparse.Namespace) -> int:
    keep_heap()
    scan = ImageScan()
    paths = scan.expand(args.images)
    for remark in scan.remarks():
        print(remark, file=sys.stderr)
    classifier = open_classifier(args)
    names = classifier.label_names
    if args.topk > len(names):
        raise InputError(f'--topk: must be at most {len(names):,}, the number of classes of {args.model}, not '
                         f'{args.topk}')
    unread = 0
    with open_table(args.output) as file:
        table = csv.writer(file, lineterminator='\n')
        clean = printable if file is sys.stdout and file.isatty() else str
        numbers = ['', *range(2, args.topk + 1)]
        table.writerow(['path', *(f'{column}{n}' for n in numbers for column in ('label', 'probability')), 'problem'])
        for path, logits in zip(paths, classifier.classify(paths, args), strict=True):
            if isinstance(logits, str):
                table.writerow([clean(path), *[''] * (2 * args.topk), clean(logits)])
                unread += 1
                continue
            top = zip(*(values.tolist() for values in logits.softmax(-1).topk(args.topk)), strict=True)
            table.writerow([clean(path), *(cell for p, i in top for cell in (clean(names[i]), f'{p:.4f}')), ''])
    if unread:
        print(f'{unread:,} of {plural(len(paths), "image")} could not be read; for the errors, see the column problem',
              file=sys.stderr)
    return 1 if unread else 0
