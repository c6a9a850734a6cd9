"""Reading images: decoding, orientation, colour profiles, transparency, grayscale of more than 8 bits."""
import csv
import importlib
import importlib.util
import io
import math
import os
import random
import warnings
from contextlib import suppress
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from .console import InputError, abbreviate, progress

__all__ = ['PLUGINS', 'SUFFIXES', 'ImageDataset', 'check_images', 'decode', 'read_crop', 'read_image',
           'try_to_read']

T = TypeVar('T')
TRUNCATED = 'lacks its last bytes'  # key of `Image.info`
warnings.filterwarnings('ignore', module='PIL')  # about metadata, and sizes that are read all the same

Image.init()
# Packages with plugins for what Pillow itself does not read, by suffix
PLUGINS = {'.heic': 'pillow-heif', '.heif': 'pillow-heif', '.hif': 'pillow-heif', '.jxl': 'pillow-jxl-plugin'}
for package, module in ('pillow_heif', 'pillow_heif.HeifImagePlugin'), ('pillow_jxl', 'pillow_jxl'):
    if importlib.util.find_spec(package):
        importlib.import_module(module)  # registers itself
NOT_READ = ('BUFR', 'GRIB', 'HDF5', 'MPEG', 'PALM', 'PDF', 'WMF')  # Pillow knows their names, and cannot decode them
SUFFIXES = frozenset(s for s, kind in Image.registered_extensions().items() if kind not in NOT_READ)


def is_16_bit(values: np.ndarray) -> bool:
    """Whether values of a grayscale image are integers from 0 to 65535."""
    return values.dtype.kind in 'iu' and values.min() >= 0 and values.max() < 2 ** 16


def fewest_bits(maximum: int) -> int:
    """The greatest value of the fewest bits, of those that cameras and scanners have, that hold `maximum`."""
    return next(2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if maximum < 2 ** bits)


def to_8_bits(image: Image.Image, white_level: Optional[int] = None) -> Image.Image:
    """Scale a grayscale image of more than 8 bits to 0 ... 255.

    Integers from 0 to 65535 are divided by `white_level`; greater ones become white. Where there are fractions, or
    integers that are negative or greater, the smallest value of the image becomes black and the greatest white.

    Args:
        image: Of one of Pillow's modes I and F.
        white_level: Which value is white; by default, the greatest of 8, 10, 12, 14 or 16 bits, the fewest that hold
            the values of this image.
    """
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0., 0.)
    if is_16_bit(values):
        low, high = 0., white_level or fewest_bits(int(high))
    scaled = ((values.astype(np.float64) - low) / ((high - low) or 1)).clip(0, 1)
    pixels = np.rint(255 * np.nan_to_num(scaled)).astype(np.uint8)
    pixels[values == image.info.get('transparency', -1)] = 255
    return Image.fromarray(pixels)


@lru_cache(maxsize=16)
def profile_transform(profile: bytes, mode: str) -> Optional[ImageCms.ImageCmsTransform]:
    """The conversion of images of a mode from an ICC profile to sRGB.

    None if the profile is damaged or made for another mode, since viewers ignore those, or is sRGB itself to one level
    of 255, so that the usual photograph keeps its exact pixels.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile('sRGB'), mode, 'RGB')
    except (OSError, ImageCms.PyCMSError):
        return None
    bands = len(Image.new(mode, (1, 1)).getbands())
    grid = np.stack(np.meshgrid(*bands * [np.arange(0, 256, 15).astype(np.uint8)]), -1).reshape(1, -1, bands)
    colors = Image.frombytes(mode, grid.shape[1::-1], grid.tobytes())
    changes = np.asarray(transform.apply(colors), np.int16) - np.asarray(colors.convert('RGB'))
    return transform if np.abs(changes).max() > 1 else None


def to_srgb(image: Image.Image, profile: Optional[bytes]) -> Image.Image:
    """Convert an image, without its transparency, to RGB by its ICC profile."""
    mode = {'1': 'L', 'L': 'L', 'LA': 'L', 'CMYK': 'CMYK', 'LAB': 'LAB'}.get(image.mode, 'RGB')
    transform = profile_transform(profile, mode) if profile else None
    image = image.convert(mode)
    return transform.apply(image) if transform else image.convert('RGB')


def decode(image: Image.Image, mode: str = 'RGB', white_level: Optional[int] = None) -> Image.Image:
    """Convert an opened image, as `read_image` does one in a file."""
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get('icc_profile')
    if image.mode[0] in 'IF':
        image = to_8_bits(image, white_level)
    alpha = image.convert('RGBA').getchannel('A') if image.has_transparency_data else None
    image = to_srgb(image, profile)
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert(mode)


def complete_jpeg(path: Union[str, Path]) -> Optional[Image.Image]:
    """Open a JPEG that lacks its last bytes, if all of its pixels can be read.

    They can if they do not depend on what would come next: they are the same whether zeros or other bytes follow.
    """
    data = Path(path).read_bytes().rstrip(b'\xff')
    if not data.startswith(b'\xff\xd8'):
        return None
    first, second, image = (  # read when they are used
        Image.open(io.BytesIO(data + following + b'\xff\xd9'), formats=['JPEG'])
        for following in (64 * b'\0', 64 * b'\xaa', b''))
    image.info[TRUNCATED] = True
    return image if np.array_equal(np.asarray(first), np.asarray(second)) else None


def use_image(path: Union[str, Path], use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of the image in a file.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise many kinds.
    """
    try:
        with Image.open(path) as image:
            return use(image)
    except OSError as e:
        with suppress(OSError):
            if completed := complete_jpeg(path):
                return use(completed)
        raise e


def read_image(path: Union[str, Path], mode: str = 'RGB', white_level: Optional[int] = None) -> Image.Image:
    """Read an image as a viewer shows it: upright, in sRGB, over white where transparent, of several the first.

    Args:
        path: Of the file.
        mode: 'RGB', or 'L' for grayscale.
        white_level: Which value of a 16-bit grayscale image is white; see `to_8_bits`.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise many kinds.
    """
    return use_image(path, lambda image: decode(image, mode, white_level))


def read_crop(
        path: Union[str, Path],
        crop: RandomResizedCropAndInterpolation,
        mode: str = 'RGB',
        white_level: Optional[int] = None,
) -> Image.Image:
    """Read a random crop of an image: `crop(read_image(path, …))`, but for JPEGs that are larger than needed.

    These are decoded at 1/2, 1/4 or 1/8 of their size, the smallest at which the crop still has twice the width and
    height that are asked for, so that nothing is blurred. The crop is that of the full size, drawn by the same random
    numbers.
    """
    height, width = crop.size

    def read(file: Image.Image) -> Image.Image:
        is_jpeg = isinstance(file, JpegImageFile)  # whose size comes from the header, decoded and turned it is later
        image = file if is_jpeg else decode(file, mode, white_level)
        orientation = file.getexif().get(ExifTags.Base.Orientation) if is_jpeg else 1
        size = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        top, left, h, w = crop.get_params(torch.empty(size[::-1], device='meta'), crop.scale, crop.ratio)
        resample = crop.interpolation
        resample = random.choice(resample) if isinstance(resample, (tuple, list)) else resample
        box = np.array([left, top, left + w, top + h], float)
        if is_jpeg:
            divisor = max(d for d in (1, 2, 4, 8) if d == 1 or d <= min(w // (2 * width), h // (2 * height)))
            file.draft(None, (file.width // divisor, file.height // divisor))
            image = decode(file, mode, white_level)
            padding = np.array(image.size) - np.array(size) / divisor  # at the right and bottom edges of the file,
            turned = [orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)]  # which may be at the left and the top
            box = box / divisor + np.tile(padding * turned, 2)
        x, y = math.floor(box[0]), math.floor(box[1])
        image = image.crop((x, y, math.ceil(box[2]), math.ceil(box[3])))
        return image.resize((width, height), Image.Resampling[resample.name], tuple(box - (x, y, x, y)))

    return use_image(path, read)


class ImageDataset(Dataset):
    """Paths and class indices as a dataset for timm's `create_loader`, which sets `transform`.

    Where that begins with timm's random crop, to train, images are read by `read_crop`, else by `read_image`.

    Args:
        samples: Path and class index of each image.
        **reading: Arguments of these functions.
    """
    transform: Any = None

    def __init__(self, samples: Sequence[Tuple[str, int]], **reading: Any) -> None:
        self.samples = list(samples)
        self.reading = reading

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.samples[index]
        first, *others = self.transform.transforms
        if isinstance(first, RandomResizedCropAndInterpolation):
            image = read_crop(path, first, **self.reading)
        else:
            image = first(read_image(path, **self.reading))
        return Compose(others)(image), target

    def __len__(self) -> int:
        return len(self.samples)


def try_to_read(path: str, read: Callable[[Image.Image], T]) -> Union[T, str]:
    """What `read` makes of the image in a file once it is opened, or what keeps the image from being used."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            return 'not a file'  # waiting for a pipe would take forever

        def read_if_square_enough(image: Image.Image) -> Union[T, str]:
            if max(image.size) > 1000 * min(image.size):
                return f'{image.width} × {image.height} pixels'  # to a square, it would fill the memory
            return read(image)

        return use_image(path, read_if_square_enough)
    except Exception as e:  # Pillow's decoders raise many kinds
        return getattr(e, 'strerror', None) or str(e).replace(repr(path), '').strip() or type(e).__name__


def check(image: Image.Image) -> Tuple[int, bool]:
    """Decode an image to its last byte, a JPEG at an eighth of its size.

    Returns:
        The greatest value of 16-bit grayscale, 0 for other images; and whether the file lacks its last bytes.
    """
    image.draft('RGB', (1, 1))
    values = np.asarray(image) if image.mode[0] == 'I' else np.zeros(1)
    is_truncated = TRUNCATED in image.info
    decode(image)
    return int(values.max()) if is_16_bit(values) else 0, is_truncated


class Checked(NamedTuple):
    """What reading images once has shown."""
    white_level: Optional[int]  # of all 16-bit grayscale images together, None if there are none; see `to_8_bits`
    bad: Dict[str, str]  # paths of images that cannot be used, and why
    truncated: List[str]  # paths of JPEGs that lack their last bytes, but no pixel

    def remarks(self) -> List[str]:
        return [f'used, although their files lack the last bytes, since no pixel is missing: '
                f'{abbreviate(self.truncated)}'] if self.truncated else []


def check_images(
        paths: Sequence[str],
        workers: int,
        listing: Optional[Path] = None,
        skip_bad: bool = False,
) -> Checked:
    """Read all images once.

    Args:
        paths: Of the images.
        workers: Threads that read.
        listing: CSV to write if some images cannot be used, with all of their paths and what is wrong.
        skip_bad: Do not raise an error then.

    Raises:
        InputError: Some cannot be read, or are too thin; names them.
    """
    with ThreadPool(max(workers, 1)) as pool:
        read = partial(try_to_read, read=check)
        results = list(progress(pool.imap(read, paths, chunksize=16), 'checking images', len(paths)))
    bad = {path: result for path, result in zip(paths, results, strict=True) if isinstance(result, str)}
    where = ''
    if bad and listing:
        listing.parent.mkdir(parents=True, exist_ok=True)
        with listing.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            csv.writer(file).writerows([('path', 'problem'), *bad.items()])
        where = f'; {listing} names all of them, and --skip-bad-images leaves them out'
    if bad and not skip_bad:
        raise InputError(f'{len(bad):,} of {len(paths):,} images cannot be used: '
                         + abbreviate(f'{path} ({problem})' for path, problem in bad.items()) + where)
    good = [(path, *result) for path, result in zip(paths, results, strict=True) if not isinstance(result, str)]
    maximum = max((value for _, value, _ in good), default=0)
    return Checked(fewest_bits(maximum) if maximum else None, bad, [path for path, _, cut in good if cut])
