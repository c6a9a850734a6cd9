"""The default data set: the 1,797 handwritten digits of 8x8 pixels of scikit-learn."""
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from .console import InputError, missing

__all__ = ['folder_or_digits', 'write_digits']


def write_digits(root: Path) -> None:
    """Write the digits to class folders, `train/0` ... `validation/9`, with a fifth of every class for validation.

    Args:
        root: Folder to write to, created if it does not exist.

    Raises:
        InputError: scikit-learn is not installed.
    """
    if lack := missing('demo', 'sklearn'):
        raise InputError(f'the default data set, digits of scikit-learn, {lack}')
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0 ... 16
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    for split, indices in ('train', train), ('validation', val):
        for i in indices:
            path = root / split / str(labels[i]) / f'{i:04}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(path)


@contextmanager
def folder_or_digits(folder: Optional[Path]) -> Iterator[Path]:
    """Yield the data folder of a command or, if it is None, a temporary folder with the digits.

    Raises:
        InputError: scikit-learn is not installed.
    """
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_digits(Path(temporary))
        yield Path(temporary)
