"""The authors' weights: downloaded from Google Drive once, checked, and kept as safetensors in the cache."""
import argparse
import hashlib
import json
import os
import tempfile
import threading
from datetime import datetime, timezone
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, Dict, Optional, Union

import timm
import torch
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save

from .authors import AUTHORS_FILES, AUTHORS_TAG
from .checkpoint import checkpoint_filter_fn

__all__ = ['cache_folder', 'cached_weights', 'drive_page', 'file_by_hand', 'get_authors_weights', 'read_record']

STALL = 30  # seconds without a byte after which a download is given up
WEIGHTS, RECORD = 'model.safetensors', 'source.json'
Folder = Union[str, Path, None]


def drive_page(variant: str) -> str:
    """Address of the authors' file of a variant, for a browser."""
    return f'https://drive.google.com/file/d/{AUTHORS_FILES[variant]}/view'


def cache_folder(variant: str, cache_dir: Folder = None) -> Path:
    """Folder of a variant in `cache_dir`, by default that of huggingface_hub for files that are not of the Hub."""
    return Path(cache_dir or constants.HF_ASSETS_CACHE) / 'timm_mobileformer' / f'{variant}.{AUTHORS_TAG}'


def file_by_hand(variant: str, cache_dir: Folder = None) -> Path:
    """Where the authors' file is looked for before Google Drive is asked."""
    return cache_folder(variant, cache_dir) / f'mobile-former-{variant.split("_")[1]}.pth.tar'


def cached_weights(variant: str, cache_dir: Folder = None) -> Optional[Path]:
    """The authors' weights of a variant if they are in the cache."""
    weights = cache_folder(variant, cache_dir) / WEIGHTS
    return weights if weights.is_file() else None


def read_record(folder: Path) -> Dict[str, Any]:
    """Where weights in the cache come from: url, size, sha256 and date of the authors' file; empty if unknown."""
    record = folder / RECORD
    try:
        return json.loads(record.read_text()) if record.is_file() else {}
    except ValueError as e:
        raise ValueError(f'{record} is damaged; delete it') from e


def get_authors_weights(variant: str, cache_dir: Folder = None, file: Optional[Path] = None) -> Path:
    """Return the authors' weights as safetensors in the cache, downloaded from Google Drive if they are not there.

    Processes that call this at the same time wait for the first of them.

    Args:
        variant: Name of the model without a tag.
        cache_dir: Folder of the cache, see `cache_folder`.
        file: Take the authors' file from here instead, and replace what is in the cache.

    Raises:
        OSError: The cache cannot be written, or the connection failed.
        ValueError: The file is not what is expected.
        Exception: Google Drive does not give the file; see `download_errors.why`.
    """
    if not file and (weights := cached_weights(variant, cache_dir)):
        return weights
    folder = cache_folder(variant, cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / '.lock', mode=0o664):
        if not file and (weights := cached_weights(variant, cache_dir)):
            return weights
        by_hand = file or file_by_hand(variant, cache_dir)
        if by_hand.is_file():
            with by_hand.open('rb') as content:
                _convert(variant, content, folder)
        else:
            with tempfile.TemporaryFile(dir=folder) as content:
                _download(variant, content)
                _convert(variant, content, folder)
    return folder / WEIGHTS


def _download(variant: str, file: BinaryIO) -> None:
    """Write the authors' file from Google Drive to `file`, with a progress bar on a terminal."""
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled('HF_HUB_OFFLINE is set')
    import gdown
    from tqdm import tqdm

    stop = threading.Event()
    watch = threading.Timer(STALL, stop.set)  # gdown follows pages that lead to each other without an end
    watch.daemon = True
    with tqdm(desc=f'Downloading {variant}', unit='B', unit_scale=True, disable=None) as bar:

        def advance(done: int, total: Optional[int]) -> None:
            watch.cancel()
            bar.total = total
            bar.update(done - bar.n)

        watch.start()
        try:
            gdown.download(id=AUTHORS_FILES[variant], output=file, quiet=True, use_cookies=False, timeout=STALL,
                           cancel=stop, progress=advance)
        finally:
            watch.cancel()


def _convert(variant: str, file: BinaryIO, folder: Path) -> None:
    """Check the authors' file and write it as safetensors, with a record of where it came from.

    Raises:
        ValueError: It is no checkpoint of the variant, holds NaN or infinity, or is not the file of the record.
    """
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    source = dict(url=drive_page(variant), size=file.tell(), sha256=digest.hexdigest(),
                  date=datetime.now(timezone.utc).date().isoformat())
    known = read_record(folder)
    if known.get('sha256', source['sha256']) != source['sha256']:
        raise ValueError(f'the file has SHA-256 {source["sha256"]}, but {folder / RECORD} asks for {known["sha256"]}; '
                         'delete the record to take the file all the same')
    weights = checkpoint_filter_fn(_read(file), model := timm.create_model(variant, device='meta'))
    model.load_state_dict(weights, assign=True)  # refuses other numbers of classes and channels, too
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f'NaN or infinity in {", ".join(broken[:5])}')
    _write(folder / RECORD, json.dumps(source, indent=1).encode())
    _write(folder / WEIGHTS, save({name: tensor.contiguous() for name, tensor in weights.items()}))


def _read(file: BinaryIO) -> Dict[str, Any]:
    """The state dict in a checkpoint of the authors; nothing in it is executed."""
    file.seek(0)
    if file.read(100).lstrip().startswith(b'<'):
        raise ValueError('a web page, not the file')
    file.seek(0)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # their training script saved its arguments
            content = torch.load(file, map_location='cpu', weights_only=True)
    except UnpicklingError:
        raise
    except Exception as e:  # whatever a reader says to arbitrary bytes
        raise ValueError(f'the file is damaged or no checkpoint ({e})') from e
    tensors = content.get('state_dict', content) if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError('the file is no checkpoint, it holds no tensors by name')
    return tensors


def _write(path: Path, content: bytes) -> None:
    """Write a file that is complete or not there."""
    unfinished = path.with_name(f'{path.name}.unfinished')
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
