"""Checks of all images before work begins: which cannot be used, and which bit depth they have."""
import csv
import os
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
from PIL import Image

from .console import InputError, abbreviate, plural, progress
from .files import open_csv
from .images import TRUNCATED, decode, is_16_bit, max_of_bit_depth, use_image

__all__ = ['check_images', 'try_to_read']

T = TypeVar('T')


def try_to_read(path: str, read: Callable[[Image.Image], T]) -> Union[T, str]:
    """Open an image file and return `read(image)`, or a description of the problem if the image cannot be used."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            return 'not a file'  # reading a pipe would block forever

        def read_if_square_enough(image: Image.Image) -> Union[T, str]:
            if max(image.size) > 1000 * min(image.size):
                return f'{image.width} × {image.height} pixels'  # resized to a square crop, it would exhaust the memory
            return read(image)

        return use_image(path, read_if_square_enough)
    except Exception as e:  # Pillow's decoders raise exceptions of many types
        return getattr(e, 'strerror', None) or str(e).replace(repr(path), '').strip() or type(e).__name__


def check(image: Image.Image) -> Tuple[int, bool]:
    """Decode an image completely; a JPEG at 1/8 of its size, which reads the whole file too.

    Returns:
        The maximum of a 16-bit grayscale image, 0 for other images; and whether the last bytes of the file are missing.
    """
    image.draft('RGB', (1, 1))
    values = np.asarray(image) if image.mode[0] == 'I' else np.zeros(1)
    is_truncated = TRUNCATED in image.info
    decode(image)
    return int(values.max()) if is_16_bit(values) else 0, is_truncated


class CheckResult(NamedTuple):
    """Result of `check_images`.

    Attributes:
        white_level: White level common to all 16-bit grayscale images, None if there are none; see `to_8_bits`.
        bad: Path of each image that cannot be used -> description of the problem.
        truncated: Paths of JPEGs whose last bytes, but no pixels, are missing.
    """
    white_level: Optional[int]
    bad: Dict[str, str]
    truncated: List[str]

    def remarks(self) -> List[str]:
        return [f'JPEGs whose last bytes are missing are used, since no pixel is missing: {abbreviate(self.truncated)}'
                ] if self.truncated else []


def check_images(
        paths: Sequence[str],
        workers: int,
        listing: Optional[Path] = None,
        skip_bad: bool = False,
) -> CheckResult:
    """Read every image once, and report those that cannot be used.

    Args:
        paths: Paths of the images.
        workers: Number of threads.
        listing: CSV file to write if images cannot be used, with the path and the problem of each.
        skip_bad: Return the images that cannot be used instead of raising an error.

    Raises:
        InputError: Images cannot be read, or one side is more than 1000 times as long as the other; not with
            `skip_bad`.
    """
    with ThreadPool(max(workers, 1)) as pool:
        read = partial(try_to_read, read=check)
        results = list(progress(pool.imap(read, paths, chunksize=16), 'checking images', len(paths)))
    bad = {path: result for path, result in zip(paths, results, strict=True) if isinstance(result, str)}
    where = ''
    if bad and listing:
        listing.parent.mkdir(parents=True, exist_ok=True)
        with open_csv(listing) as file:
            csv.writer(file).writerows([('path', 'problem'), *bad.items()])
        where = f'; {listing} lists all of them, --skip-bad-images leaves them out'
    if bad and not skip_bad:
        raise InputError(f'{len(bad):,} of {plural(len(paths), "image")} cannot be used: '
                         + abbreviate(f'{path} ({problem})' for path, problem in bad.items()) + where)
    good = [(path, *result) for path, result in zip(paths, results, strict=True) if not isinstance(result, str)]
    maximum = max((value for _, value, _ in good), default=0)
    return CheckResult(max_of_bit_depth(maximum) if maximum else None, bad, [path for path, _, cut in good if cut])
