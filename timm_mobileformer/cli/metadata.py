"""Metadata of exported files: preprocessing, inputs, outputs and class names.

They are stored in a JSON file next to each exported file and in the metadata of ONNX files. The keys are those of timm
where they exist: `architecture`, `input_size`, `interpolation`, `crop_pct`, `crop_mode`, `mean`, `std`, `label_names`.
"""
import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from .console import InputError, abbreviate
from .load import reading_options

__all__ = [
    'PREPROCESSING', 'ExportMetadata', 'describe', 'fingerprint_weights', 'is_raw', 'make_transform', 'read_metadata',
    'remove_outdated', 'to_pixels', 'write_metadata']

ExportMetadata = Dict[str, Any]
PREPROCESSING = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'
KEYS = 'input_name', 'input_dtype', 'output_name', 'label_names'  # required
OPTIONAL = {'input_color': 'RGB', 'input_white_level': None}  # defaults for files without these keys


def describe(model: Any, data_config: Dict[str, Any], label_names: List[str], raw: bool = False) -> ExportMetadata:
    """Return the metadata of a model.

    Args:
        model: timm model.
        data_config: Preprocessing, from `model_data_config`.
        label_names: Class names by index.
        raw: Whether the file includes the preprocessing and returns probabilities.
    """
    channels, height, width = data_config['input_size']
    reading, preprocessing = reading_options(model), {key: data_config[key] for key in PREPROCESSING}
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'input_name': 'image' if raw else 'images',
        'input_shape': ['height', 'width', channels] if raw else ['batch', channels, height, width],
        'input_layout': 'HWC' if raw else 'NCHW',
        'input_color': reading['mode'],
        'input_orientation': 'upright, as EXIF says',
        'input_profile': 'ICC profile converted to sRGB',
        'input_transparency': 'over white',
        'input_white_level': reading['white_level'],  # for 16-bit grayscale; for null see `images.to_8_bits`
        'input_dtype': 'uint8' if raw else 'float32',  # from 0 to 255, or normalized
        **({'included_preprocessing': preprocessing} if raw else preprocessing),
        'output_name': 'probabilities' if raw else 'logits',
        'label_names': label_names,
    }


def fingerprint_weights(model: torch.nn.Module) -> str:
    """Return the SHA-256 of the parameters and buffers of a model."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def write_metadata(about: ExportMetadata, path: Path) -> None:
    """Write metadata to `NAME.json` next to the exported file `NAME` and, for ONNX, to the file itself."""
    lines = (f'  {json.dumps(key)}: {json.dumps(value)}' for key, value in about.items())
    path.with_name(f'{path.name}.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='ascii')
    if path.suffix == '.onnx':
        import onnx

        file = onnx.load(path)
        onnx.helper.set_model_props(file, {key: json.dumps(value) for key, value in about.items()})
        onnx.save(file, path)


def remove_outdated(folder: Path, about: ExportMetadata) -> List[str]:
    """Remove files of the same architecture with other weights, preprocessing or input, and return their names."""
    removed = []
    for path in sorted(folder.glob(f'{about["architecture"]}.*.json')):
        file = path.with_suffix('')
        try:
            found = json.loads(path.read_text())
            is_other = found['input_name'] and any(
                found.get(key) != json.loads(json.dumps(value)) for key, value in about.items() if key != 'input_shape')
        except (ValueError, LookupError, TypeError):
            continue  # not written by this command
        if is_other:
            for old in path, file, file.with_suffix('.bin'):  # OpenVINO's weights
                if old.exists() and (old.suffix != '.bin' or file.suffix == '.xml'):
                    old.unlink()
            removed.append(file.name)
    return removed


def read_metadata(metadata: Dict[str, str], path: Path) -> ExportMetadata:
    """Parse the metadata of an ONNX file.

    Raises:
        InputError: Keys are missing.
    """
    try:
        about = {**OPTIONAL, **{key: json.loads(value) for key, value in metadata.items()}}
        if not (lacking := [key for key in (KEYS if is_raw(about) else PREPROCESSING + KEYS) if key not in about]):
            return about
    except ValueError:
        lacking = ['values in JSON']
    raise InputError(f'{path} has no metadata of timm-mobileformer export that describes its preprocessing; '
                     f'missing: {abbreviate(lacking)}')


def is_raw(about: ExportMetadata) -> bool:
    """Return whether a file includes the preprocessing and returns probabilities."""
    return about.get('input_dtype') == 'uint8'


def to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def make_transform(about: ExportMetadata) -> Callable[[Image.Image], Any]:
    """Make a transform from an image to a normalized tensor (C, H, W), or to one (H, W, C) in uint8 for a raw file."""
    return to_pixels if is_raw(about) else create_transform(**{key: about[key] for key in PREPROCESSING})
