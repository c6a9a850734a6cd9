"""Files that are whole or not there."""
import hashlib
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from .console import InputError, progress

__all__ = ['save_figure', 'sha256', 'atomic_dir']


@contextmanager
def atomic_dir(folder: Path, name: str = 'all') -> Iterator[Path]:
    """A folder to write to; when all is written, its files take their places in `folder`, with usual permissions.

    Args:
        folder: Where the files belong; made if it is not there.
        name: Of what is written; another one for each process that may write there at once.

    Raises:
        InputError: `folder` cannot be written to.
    """
    temporary, is_new = folder / f'.{name}.unfinished', not folder.exists()
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as e:
            raise InputError(f'{folder} cannot be written to ({e.strerror}); name another') from e
        yield temporary
        written = sorted(temporary.iterdir())
        (usual := temporary / '.usual').touch()
        for path in written:
            shutil.copymode(usual, path)  # safetensors' files are their owner's alone
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
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
