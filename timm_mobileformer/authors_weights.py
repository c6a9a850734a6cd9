"""Download the authors' weights from Google Drive, check them and cache them as safetensors."""
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

__all__ = [
    'WEIGHTS', 'cache_folder', 'cached_weights', 'drive_page', 'file_by_hand', 'get_authors_weights', 'read_record']

STALL = 30  # timeout in seconds without data
WEIGHTS, RECORD = 'model.safetensors', 'source.json'
Folder = Union[str, Path, None]


def drive_page(variant: str) -> str:
    """Return the URL of the authors' file of a variant on Google Drive."""
    return f'https://drive.google.com/file/d/{AUTHORS_FILES[variant]}/view'


def cache_folder(variant: str, cache_dir: Folder = None) -> Path:
    """Return the cache folder of a variant; `cache_dir` defaults to the assets cache of huggingface_hub."""
    return Path(cache_dir or constants.HF_ASSETS_CACHE) / 'timm_mobileformer' / f'{variant}.{AUTHORS_TAG}'


def file_by_hand(variant: str, cache_dir: Folder = None) -> Path:
    """Return the path where a manually downloaded file is looked for before downloading."""
    return cache_folder(variant, cache_dir) / f'mobile-former-{variant.split("_")[1]}.pth.tar'


def cached_weights(variant: str, cache_dir: Folder = None) -> Optional[Path]:
    """Return the path of the cached weights of a variant, None if they are not cached."""
    weights = cache_folder(variant, cache_dir) / WEIGHTS
    return weights if weights.is_file() else None


def read_record(folder: Path) -> Dict[str, Any]:
    """Return the url, size, sha256 and date of the file from which cached weights were converted, empty if unknown."""
    record = folder / RECORD
    try:
        return json.loads(record.read_text()) if record.is_file() else {}
    except ValueError as e:
        raise ValueError(f'{record} is damaged; delete it') from e


def get_authors_weights(variant: str, cache_dir: Folder = None, file: Optional[Path] = None) -> Path:
    """Return the path of the authors' weights in the cache, after downloading them from Google Drive if necessary.

    Concurrent calls wait for the first of them.

    Args:
        variant: Name of the model without a tag.
        cache_dir: Folder of the cache, see `cache_folder`.
        file: Local copy of the authors' file, to be used instead of the cached or the remote one.

    Raises:
        OSError: The cache cannot be written, or the connection failed.
        ValueError: The file is not a valid checkpoint of the variant.
        Exception: The download failed; see `download_errors.why`.
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
    """Download the authors' file from Google Drive to `file`, with a progress bar on a terminal."""
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled('HF_HUB_OFFLINE is set')
    import gdown
    from tqdm import tqdm

    stop = threading.Event()
    watch = threading.Timer(STALL, stop.set)  # gdown may follow confirmation pages forever
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
    """Check the authors' file and convert it to safetensors, with a record of its origin.

    Raises:
        ValueError: The file is not a checkpoint of the variant, contains NaN or infinity, or does not match the record.
    """
    file.seek(0)
    digest = hashlib.sha256(file.read()).hexdigest()
    source = dict(url=drive_page(variant), size=file.tell(), sha256=digest,
                  date=datetime.now(timezone.utc).date().isoformat())
    known = read_record(folder)
    if known.get('sha256', source['sha256']) != source['sha256']:
        raise ValueError(f'the file has SHA-256 {source["sha256"]}, but {folder / RECORD} requires {known["sha256"]}; '
                         'delete this record to accept the file')
    weights = checkpoint_filter_fn(_read(file), model := timm.create_model(variant, device='meta'))
    model.load_state_dict(weights, assign=True)  # also raises for other numbers of classes and channels
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f'NaN or infinity in {", ".join(broken[:5])}')
    _write(folder / RECORD, json.dumps(source, indent=1).encode())
    _write(folder / WEIGHTS, save({name: tensor.contiguous() for name, tensor in weights.items()}))


def _read(file: BinaryIO) -> Dict[str, Any]:
    """Read the state dict of an authors' checkpoint without executing code."""
    file.seek(0)
    if file.read(100).lstrip().startswith(b'<'):
        raise ValueError('a web page instead of a checkpoint')
    file.seek(0)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # their training script saved its arguments
            content = torch.load(file, map_location='cpu', weights_only=True)
    except UnpicklingError:
        raise
    except Exception as e:  # readers raise many types of errors for damaged files
        raise ValueError(f'the file is damaged or not a checkpoint ({e})') from e
    tensors = content.get('state_dict', content) if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError('the file is not a checkpoint: it has no named tensors')
    return tensors


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    unfinished = path.with_name(f'{path.name}.unfinished')
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
