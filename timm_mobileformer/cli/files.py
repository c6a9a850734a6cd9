"""Atomic writes, CSV files and figures."""
import os
import shutil
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, TextIO

from .console import InputError

__all__ = ['atomic_dir', 'open_csv', 'remove_unfinished', 'save_figure']


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved to `folder` once all of them are written.

    Nothing is moved if an exception is raised. File permissions follow the umask. Several processes may write to one
    folder at once; of two files with the same name, the one moved last remains. Commands whose files belong together
    lock the folder with `run_state.claim`.

    Args:
        folder: Destination, created if it does not exist.

    Raises:
        InputError: `folder` cannot be written to.
    """
    is_new, temporary = not folder.exists(), None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp('.unfinished', '.', folder))
        except OSError as e:
            raise InputError(f'{folder} cannot be written to ({e.strerror}); use another folder') from e
        yield temporary
        written = sorted(temporary.iterdir())
        (usual := temporary / '.usual').touch()
        for path in written:
            shutil.copymode(usual, path)  # safetensors creates files with mode 0600
            os.replace(path, folder / path.name)
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # folder is not empty
                folder.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Remove temporary folders of `atomic_dir` that were left by killed processes: those unchanged for an hour."""
    for unfinished in folder.glob('.*.unfinished'):
        with suppress(OSError):  # moved into place in the meantime
            changed = max(path.stat().st_mtime for path in [unfinished, *unfinished.iterdir()])
            if time.time() - changed > 3600:
                shutil.rmtree(unfinished)


def open_csv(path: Path) -> TextIO:
    """Open a file for `csv.writer`; names of files that are not valid UTF-8 are written as they are."""
    return path.open('w', newline='', encoding='utf-8', errors='surrogateescape')


def save_figure(figure: Any, path: Path, **kwargs: Any) -> None:
    """Save a matplotlib figure without warnings about missing glyphs."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        figure.savefig(path, **kwargs)
