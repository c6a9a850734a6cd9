"""Dataset of labelled images, and fast reading of random crops for training."""
import math
import random
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from .console import InputError, reason
from .images import decode, read_image, use_image

__all__ = ['ImageDataset', 'read_crop']


def read_crop(
        path: Union[str, Path],
        crop: RandomResizedCropAndInterpolation,
        mode: str = 'RGB',
        white_level: Optional[int] = None,
) -> Image.Image:
    """Read a random crop of an image, like `crop(read_image(path, …))` but faster for large JPEGs.

    JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, the smallest at which the crop is still at least twice as wide
    and high as the output, so that it is not blurred. The random numbers and the crop are those of the full size.

    Args:
        path: Path to the image file.
        crop: Random crop of timm's training transforms.
        mode: 'RGB', or 'L' for grayscale.
        white_level: Value of 16-bit grayscale images that becomes white; see `read_image`.

    Raises:
        Exception: The file cannot be read; Pillow's decoders raise exceptions of many types.
    """
    height, width = crop.size

    def read(file: Image.Image) -> Image.Image:
        is_jpeg = isinstance(file, JpegImageFile)
        image = file if is_jpeg else decode(file, mode, white_level)  # a JPEG is decoded below, when the crop is known
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
            # the decoder rounds the size up, which pads the right and bottom edges of the file; after EXIF
            # orientation, these may be the left and top edges of the image
            padding = np.array(image.size) - np.array(size) / divisor
            turned = [orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)]
            box = box / divisor + np.tile(padding * turned, 2)
        x, y = math.floor(box[0]), math.floor(box[1])
        image = image.crop((x, y, math.ceil(box[2]), math.ceil(box[3])))
        return image.resize((width, height), Image.Resampling[resample.name], tuple(box - (x, y, x, y)))

    return use_image(path, read)


class ImageDataset(Dataset):
    """Dataset of labelled image files, for timm's `create_loader`, which sets `transform`.

    If the transform begins with timm's random crop (training), images are read by `read_crop`, otherwise by
    `read_image`.

    Args:
        samples: Path and class index of each image.
        **reading: Keyword arguments of `read_crop` and `read_image`.

    Raises:
        InputError: An image cannot be read, for instance since its file was changed or removed after `check_images`.
    """
    transform: Any = None

    def __init__(self, samples: Sequence[Tuple[str, int]], **reading: Any) -> None:
        self.samples = list(samples)
        self.reading = reading

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, target = self.samples[index]
        transforms = self.transform.transforms
        is_crop = isinstance(transforms[0], RandomResizedCropAndInterpolation)
        try:
            image = read_crop(path, transforms[0], **self.reading) if is_crop else read_image(path, **self.reading)
        except Exception as e:  # Pillow's decoders raise exceptions of many types
            raise InputError(f'{path} can no longer be read: {getattr(e, "strerror", None) or reason(e)}') from e
        return Compose(transforms[is_crop:])(image), target

    def __len__(self) -> int:
        return len(self.samples)
