"""Download the authors' weights ahead of time."""
import argparse
import json
from pathlib import Path
from typing import Optional

import timm
from timm.models._hub import save_for_hf

from timm_mobileformer.authors import AUTHORS_FILES, AUTHORS_TAG
from timm_mobileformer.authors_weights import drive_page, file_by_hand, get_authors_weights, read_record
from timm_mobileformer.download_errors import why

from .console import InputError, quote
from .files import atomic_dir

__all__ = ['fetch', 'run']


def fetch(variant: str, file: Optional[Path] = None) -> Path:
    """Return the path of the cached authors' weights of a variant, see `get_authors_weights`.

    Raises:
        InputError: The download failed, or the file is not a valid checkpoint.
    """
    try:
        weights = get_authors_weights(variant, file=file)
        source = read_record(weights.parent)
    except Exception as e:  # gdown, requests and urllib3 raise many types of errors
        raise InputError(
            f'{file or variant}: {why(e)}; open {drive_page(variant)} in a browser and save the file as '
            f'{quote(file_by_hand(variant))}, or use --checkpoint') from e
    print(f'{variant}: {weights}, ' + (
        f'from {source["url"]} on {source["date"]} ({source["size"]:,} bytes, SHA-256 {source["sha256"]})'
        if source else f'of unknown origin; delete {weights} to download it again'))
    return weights


def write(variant: str, weights: Path, folder: Path) -> None:
    """Write weights to a folder for `local-dir:`.

    Raises:
        InputError: The folder contains another model, or cannot be written to.
    """
    if (config := folder / 'config.json').exists():
        try:
            held = json.loads(config.read_text())
            name = f'{held["architecture"]}.{held["pretrained_cfg"]["tag"]}'
        except (ValueError, KeyError, TypeError):
            name = 'another config.json'
        if name != f'{variant}.{AUTHORS_TAG}':
            raise InputError(f'{folder} contains {name}, not {variant}.{AUTHORS_TAG}; use another --output')
    model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=dict(file=str(weights)))
    with atomic_dir(folder) as temporary:
        save_for_hf(model, str(temporary), safe_serialization=True)
    print(f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True) loads {variant}; "
          f'for timm-mobileformer, use --model {quote(folder)}')


def run(args: argparse.Namespace) -> None:
    for variant in AUTHORS_FILES if args.all else [args.model]:
        weights = fetch(variant, args.checkpoint)
        if args.output:
            write(variant, weights, args.output / f'{variant}.{AUTHORS_TAG}' if args.all else args.output)
