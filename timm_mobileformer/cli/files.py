"""Files that are whole or not there."""
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from .terminal import InputError

__all__ = ['save_figure', 'whole']


@contextmanager
def whole(folder: Path, name: str = '.unfinished') -> Iterator[Path]:
    """A folder to write to; when all is written, its files take their places in `folder`, with usual permissions.

    Args:
        folder: Where the files belong; made if it is not there.
        name: Of the folder inside of it that is written to; another one for each process that may write there at once.

    Raises:
        InputError: `folder` cannot be written to.
    """
    temporary, is_new = folder / name, not folder.exists()
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as e:
            raise InputError(f'{folder} cannot be written to ({e.strerror}); name another') from e
        yield temporary
        (usual := temporary / '.usual').touch()
        for path in sorted(temporary.glob('[!.]*')):
            shutil.copymode(usual, path)  # safetensors' files are their owner's alone
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def save_figure(figure: Any, path: Path, **kwargs: Any) -> None:
    """Save a figure of matplotlib, with boxes for the letters that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')
        figure.savefig(path, **kwargs)
