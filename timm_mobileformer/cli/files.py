"""Atomic writes, checksums and figures."""
import hashlib
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator

from .console import InputError, progress

__all__ = ['save_figure', 'sha256', 'atomic_dir']


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved to `folder` once all of them are written.

    Nothing is moved if an exception is raised. The files get the permissions that the umask says. Several processes
    may write to one folder at once; of two files of one name, the one that is moved last remains.

    Args:
        folder: Where the files belong; made if it does not exist.

    Raises:
        InputError: `folder` cannot be written to.
    """
    is_new, temporary = not folder.exists(), None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp('.unfinished', '.', folder))
        except OSError as e:
            raise InputError(f'{folder} cannot be written to ({e.strerror}); name another') from e
        yield temporary
        written = sorted(temporary.iterdir())
        (usual := temporary / '.usual').touch()
        for path in written:
            shutil.copymode(usual, path)  # safetensors' files are their owner's alone
            os.replace(path, folder / path.name)
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file, progress(
            total=path.stat().st_size, desc=f'Hashing {path.name}', unit='B', unit_scale=True) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def save_figure(figure: Any, path: Path, **kwargs: Any) -> None:
    """Save a figure of matplotlib, with boxes for the letters that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        figure.savefig(path, **kwargs)
