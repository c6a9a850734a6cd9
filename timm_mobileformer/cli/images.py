"""Reading images: decoding, orientation, transparency, grayscale of more than 8 bits."""
import os
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from .console import InputError, abbreviate, progress

__all__ = ['SUFFIXES', 'Pictures', 'check_images', 'read_image', 'try_to_read']

warnings.filterwarnings('ignore', module='PIL')  # about metadata, and sizes that are read all the same

Image.init()
NOT_READ = ('BUFR', 'GRIB', 'HDF5', 'MPEG', 'PALM', 'PDF', 'WMF')  # Pillow knows their names, and cannot decode them
SUFFIXES = frozenset(s for s, kind in Image.registered_extensions().items() if kind not in NOT_READ)

def to_8_bits(image: Image.Image) -> Image.Image:
    """A gray picture of more than 8 bits, scaled to 0 ... 255.

    Whole numbers are taken for 8, 12 or 16 bits, the fewest that hold those of the picture: a 16-bit PNG is what every
    viewer shows, and the 12 bits of many a camera and scanner are not left nearly black. Where there are fractions,
    negative or greater numbers, the smallest of the picture becomes black and the greatest white.
    """
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0., 0.)
    if values.dtype.kind in 'iu' and low >= 0 and high < 2 ** 16:
        low, high = 0., next(2. ** bits - 1 for bits in (8, 12, 16) if high < 2 ** bits)
    scaled = ((values.astype(np.float64) - low) / ((high - low) or 1)).clip(0, 1)
    pixels = np.rint(255 * np.nan_to_num(scaled)).astype(np.uint8)
    pixels[values == image.info.get('transparency', -1)] = 255
    return Image.fromarray(pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in 'IF':
        image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def read_image(path: Union[str, Path]) -> Image.Image:
    """The picture that a viewer shows, in RGB: upright, transparency over white, of several the first.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise many kinds.
    """
    with Image.open(path) as image:
        return to_rgb(image)


class Pictures(Dataset):
    """Paths and class indices as a dataset for timm's `create_loader`, which sets `transform`."""
    transform: Any = None

    def __init__(self, samples: Sequence[Tuple[str, int]]) -> None:
        self.samples = list(samples)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.samples[index]
        return self.transform(read_image(path)), target

    def __len__(self) -> int:
        return len(self.samples)


def try_to_read(path: str, fast: bool = False) -> Union[Image.Image, str]:
    """A picture as `read_image` gives it, or what keeps it from being read to its last byte or from being used.

    Args:
        path: Of the file.
        fast: A JPEG may come at an eighth of its size.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            return 'not a file'  # waiting for a pipe would take forever
        with Image.open(path) as image:
            if max(image.size) > 1000 * min(image.size):
                return f'{image.width} × {image.height} pixels'  # to a square, it would fill the memory
            if fast:
                image.draft('RGB', (1, 1))
            return to_rgb(image)
    except Exception as e:  # Pillow's decoders raise many kinds
        return getattr(e, 'strerror', None) or str(e).replace(repr(path), '').strip() or type(e).__name__


def why_unreadable(path: str) -> Optional[str]:
    """What keeps a picture from being used, or None."""
    picture = try_to_read(path, fast=True)
    return picture if isinstance(picture, str) else None


def check_images(paths: Sequence[str], workers: int) -> None:
    """Read all pictures once.

    Raises:
        InputError: Some cannot be read, or are too thin; names them.
    """
    with ThreadPool(max(workers, 1)) as pool:
        reasons = list(progress(pool.imap(why_unreadable, paths, chunksize=16), 'checking images', len(paths)))
    bad = [f'{path} ({why})' for path, why in zip(paths, reasons, strict=True) if why]
    if bad:
        raise InputError(f'{len(bad):,} of {len(paths):,} images cannot be used: {abbreviate(bad)}')
