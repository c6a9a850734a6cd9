"""Decoding of images: orientation, color profiles, transparency, grayscale of more than 8 bits."""
import importlib
import importlib.util
import io
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Callable, Optional, TypeVar, Union

import numpy as np
from PIL import Image, ImageCms, ImageOps

__all__ = ['PLUGINS', 'SUFFIXES', 'TRUNCATED', 'decode', 'is_16_bit', 'max_of_bit_depth', 'read_image', 'use_image']

T = TypeVar('T')
TRUNCATED = 'truncated'  # key in `Image.info`, set by `complete_jpeg`
warnings.filterwarnings('ignore', module='PIL')  # on metadata and on large images, which are read nevertheless

Image.init()
# File suffix -> package of the Pillow plugin that reads it
PLUGINS = {'.heic': 'pillow-heif', '.heif': 'pillow-heif', '.hif': 'pillow-heif', '.jxl': 'pillow-jxl-plugin'}
for package, module in ('pillow_heif', 'pillow_heif.HeifImagePlugin'), ('pillow_jxl', 'pillow_jxl'):
    if importlib.util.find_spec(package):
        importlib.import_module(module)  # registers the plugin
NOT_READ = ('BUFR', 'GRIB', 'HDF5', 'MPEG', 'PALM', 'PDF', 'WMF')  # formats that Pillow identifies but cannot decode
SUFFIXES = frozenset(s for s, kind in Image.registered_extensions().items() if kind not in NOT_READ)


def is_16_bit(values: np.ndarray) -> bool:
    """Whether all values of a grayscale image are integers from 0 to 65535."""
    return values.dtype.kind in 'iu' and values.min() >= 0 and values.max() < 2 ** 16


def max_of_bit_depth(value: int) -> int:
    """Return the maximum of the smallest bit depth of cameras and scanners (8, 10, 12, 14 or 16) that holds `value`."""
    return next(2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if value < 2 ** bits)


def to_8_bits(image: Image.Image, white_level: Optional[int] = None) -> Image.Image:
    """Scale a grayscale image of more than 8 bits to the range 0 to 255.

    If all values are integers from 0 to 65535, they are divided by `white_level` and clipped. Other images (floats,
    negative or larger integers) are scaled by their own minimum and maximum.

    Args:
        image: Image in one of Pillow's modes I and F.
        white_level: Value that becomes white. By default, the maximum of the smallest bit depth that holds the values
            of this image; see `max_of_bit_depth`.
    """
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0., 0.)
    if is_16_bit(values):
        low, high = 0., white_level or max_of_bit_depth(int(high))
    scaled = ((values.astype(np.float64) - low) / ((high - low) or 1)).clip(0, 1)
    pixels = np.rint(255 * np.nan_to_num(scaled)).astype(np.uint8)
    pixels[values == image.info.get('transparency', -1)] = 255
    return Image.fromarray(pixels)


@lru_cache(maxsize=16)
def profile_transform(profile: bytes, mode: str) -> Optional[ImageCms.ImageCmsTransform]:
    """Build the transform from an ICC profile to sRGB for images of a mode.

    Returns:
        The transform, or None where the pixels should stay as they are: the profile is damaged or made for another
        mode (viewers ignore such profiles too), or it differs from sRGB by at most 1 of 255.
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


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Return `image.convert(mode)`, or the image itself instead of a copy if it has this mode."""
    return image if image.mode == mode else image.convert(mode)


def to_srgb(image: Image.Image, profile: Optional[bytes]) -> Image.Image:
    """Convert an image to RGB by its ICC profile; the alpha channel is dropped."""
    mode = {'1': 'L', 'L': 'L', 'LA': 'L', 'CMYK': 'CMYK', 'LAB': 'LAB'}.get(image.mode, 'RGB')
    transform = profile_transform(profile, mode) if profile else None
    image = convert(image, mode)
    return transform.apply(image) if transform else convert(image, 'RGB')


def decode(image: Image.Image, mode: str = 'RGB', white_level: Optional[int] = None) -> Image.Image:
    """Decode an open image, in place where possible; see `read_image`."""
    image.load()  # the file may be closed afterwards
    ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get('icc_profile')
    if image.mode[0] in 'IF':
        image = to_8_bits(image, white_level)
    alpha = image.convert('RGBA').getchannel('A') if image.has_transparency_data else None
    image = to_srgb(image, profile)
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return convert(image, mode)


def complete_jpeg(path: Union[str, Path]) -> Optional[Image.Image]:
    """Open a JPEG whose last bytes are missing.

    Returns:
        The image, or None if pixels are missing. No pixel is missing if the decoded pixels are the same whether zeros
        or other bytes are appended.
    """
    data = Path(path).read_bytes().rstrip(b'\xff')
    if not data.startswith(b'\xff\xd8'):
        return None
    first, second, image = (  # decoded lazily
        Image.open(io.BytesIO(data + following + b'\xff\xd9'), formats=['JPEG'])
        for following in (64 * b'\0', 64 * b'\xaa', b''))
    image.info[TRUNCATED] = True
    return image if np.array_equal(np.asarray(first), np.asarray(second)) else None


def use_image(path: Union[str, Path], use: Callable[[Image.Image], T]) -> T:
    """Open an image file and return `use(image)`; a JPEG whose last bytes are missing is completed if possible.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise exceptions of many types.
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
    """Read an image as a viewer shows it: upright, in sRGB, on a white background; of several frames, the first.

    Args:
        path: Path to the image file.
        mode: 'RGB', or 'L' for grayscale.
        white_level: Value of 16-bit grayscale images that becomes white; see `to_8_bits`.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise exceptions of many types.
    """
    return use_image(path, lambda image: decode(image, mode, white_level))
