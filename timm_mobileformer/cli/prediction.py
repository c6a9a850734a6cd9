"""Classify pictures, with PyTorch or an exported file."""
import argparse
import csv
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, TextIO, Tuple, Union

import torch
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader, Dataset

from .console import InputError, abbreviate, progress, reason
from .data import ImageScan
from .files import atomic_dir
from .formats import Run, open_onnx
from .images import try_to_read
from .load import class_names, load_model, pick_device, read_names
from .metadata import ExportMetadata, describe, make_transform, read_metadata

__all__ = ['run']


class Attempts(Dataset):
    """Pictures as tensors, or, of those that cannot be read, why."""

    def __init__(self, paths: List[str], transform: Any):
        self.paths = paths
        self.transform = transform

    def __getitem__(self, index: int) -> Union[torch.Tensor, str]:
        picture = try_to_read(self.paths[index])
        return picture if isinstance(picture, str) else self.transform(picture)

    def __len__(self) -> int:
        return len(self.paths)


def open_model(args: argparse.Namespace) -> Tuple[Run, ExportMetadata]:
    """What answers to a batch as the transform makes it, with probabilities (B, classes); and what is to be known."""
    if args.model.endswith('.onnx'):
        path = Path(args.model)
        try:
            session = open_onnx(path)
        except Exception as e:  # ONNX Runtime has kinds of its own
            raise InputError(f'{path} cannot be read, it is damaged or no ONNX ({reason(e, 200)})') from e
        about = read_metadata(session.get_modelmeta().custom_metadata_map, path)
        if args.class_map:
            about['label_names'] = read_names(args.class_map, len(about['label_names']))
        raw = about['input_dtype'] == 'uint8'

        def run_file(images: torch.Tensor) -> torch.Tensor:
            inputs = images.permute(0, 2, 3, 1).contiguous() if raw else images
            answer = torch.from_numpy(session.run([about['output_name']], {about['input_name']: inputs.numpy()})[0])
            return answer if raw else answer.softmax(dim=1)

        return run_file, about
    device = pick_device(args)
    model = load_model(args).eval().to(device)
    about = describe(model, resolve_model_data_config(model, vars(args)), class_names(model, args.class_map))
    return lambda images: model(images.to(device)).softmax(dim=1).cpu(), about


@contextmanager
def open_table(path: Any) -> Iterator[TextIO]:
    """Standard output, or a file that is whole or not there, in which names that are not in UTF-8 keep their bytes."""
    if path is None:
        yield sys.stdout
        return
    with atomic_dir(path.parent, path.name) as folder, open(
            folder / path.name, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        yield file


def find_pictures(paths: List[Path]) -> List[str]:
    """The files that were named, and the pictures in and below the folders that were."""
    found = ImageScan()
    files = found.named(paths)
    for remark in found.remarks():
        print(remark, file=sys.stderr)
    if not files:
        raise InputError(f'no pictures in {abbreviate(paths)}')
    return files


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    paths = find_pictures(args.images)
    model, about = open_model(args)
    names = about['label_names']
    if args.topk > len(names):
        raise InputError(f'--topk {args.topk}: {args.model} has {len(names):,} classes')
    loader = DataLoader(Attempts(paths, make_transform(about)), args.batch_size, num_workers=args.workers,
                        collate_fn=list)  # type: ignore[arg-type]
    unread, remaining = 0, iter(paths)
    with open_table(args.output) as file, progress(total=len(paths), unit='picture') as bar:
        table = csv.writer(file, lineterminator='\n')
        numbers = ['', *range(2, args.topk + 1)]
        table.writerow(['path', *(f'{column}{n}' for n in numbers for column in ('label', 'probability')), 'problem'])
        for batch in loader:
            images = [image for image in batch if isinstance(image, torch.Tensor)]
            answers = iter(zip(*(t.tolist() for t in model(torch.stack(images)).topk(args.topk)), strict=True)
                           if images else ())
            for image, path in zip(batch, remaining, strict=False):
                if isinstance(image, str):
                    table.writerow([path, *[''] * (2 * args.topk), image])
                    unread += 1
                    continue
                cells = (cell for p, i in zip(*next(answers), strict=True) for cell in (names[i], f'{p:.4f}'))
                table.writerow([path, *cells, ''])
            bar.update(len(batch))
    if unread:
        print(f'{unread:,} of {len(paths):,} pictures could not be read, their rows say why', file=sys.stderr)
    return 1 if unread else 0
