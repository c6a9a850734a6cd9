"""Classification of images with a PyTorch model or an exported ONNX file."""
import argparse
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from .console import InputError, progress, reason, worker_errors
from .formats import open_onnx
from .image_checks import try_to_read
from .images import decode
from .load import class_names, load_model, model_data_config, pick_device, read_names
from .metadata import ExportMetadata, describe, is_raw, make_transform, read_metadata

__all__ = ['Classifier', 'as_classifier', 'open_classifier']


class ImagesOrErrors(Dataset):
    """Dataset of preprocessed images; an image that cannot be read is replaced by the error message."""

    def __init__(self, paths: Sequence[str], read: Any, transform: Any):
        self.paths = paths
        self.read = read
        self.transform = transform

    def __getitem__(self, index: int) -> Union[torch.Tensor, str]:
        image = try_to_read(self.paths[index], self.read)
        return image if isinstance(image, str) else self.transform(image)

    def __len__(self) -> int:
        return len(self.paths)


def collate(items: List[Union[torch.Tensor, str]]) -> Tuple[torch.Tensor, List[Optional[str]]]:
    """Stack the images of a batch into one tensor, since every tensor of a worker needs two file descriptors.

    Returns:
        The images that could be read, and for every image, None or the error message.
    """
    images = [image for image in items if isinstance(image, torch.Tensor)]
    stacked = default_collate(images) if images else torch.empty(0)
    return stacked, [image if isinstance(image, str) else None for image in items]


class Classifier(NamedTuple):
    """A model and its preprocessing.

    Attributes:
        transform: Preprocessing of an image into a tensor (C, H, W); for a raw ONNX file, (H, W, C) in uint8 at the
            original size.
        run: Function from a batch of N such tensors to logits or log-probabilities (N, classes) in float32 on the CPU.
        label_names: Class names, by index.
        read: Function that decodes an opened image file, such as `decode`.
        is_batched: The tensors have one size; if not, they are loaded one by one.
    """
    transform: Any
    run: Callable[[torch.Tensor], torch.Tensor]
    label_names: List[str]
    read: Callable[[Any], Any]
    is_batched: bool = True

    @torch.inference_mode()
    def classify(self, paths: Sequence[str], args: argparse.Namespace) -> Iterator[Union[torch.Tensor, str]]:
        """Classify image files, with a few batches in memory at a time.

        Args:
            paths: Paths of the images.
            args: Options `batch_size` and `workers`.

        Yields:
            For each image, its logits (classes), or an error message if it cannot be read.

        Raises:
            InputError: A worker was killed.
        """
        loader = DataLoader(
            ImagesOrErrors(paths, self.read, self.transform), args.batch_size if self.is_batched else 1,
            num_workers=args.workers, collate_fn=collate)
        with worker_errors(), progress(total=len(paths), unit='image') as bar:
            for images, problems in loader:
                logits = iter(self.run(images) if len(images) else ())
                yield from (problem or next(logits) for problem in problems)
                bar.update(len(problems))


def make_reader(about: ExportMetadata) -> Callable[[Any], Any]:
    """Return the function that decodes an opened image file with the color mode and white level of a model."""
    return partial(decode, mode=about['input_color'], white_level=about['input_white_level'])


def open_onnx_file(args: argparse.Namespace) -> Classifier:
    """Open the ONNX file `args.model` on the CPU.

    Raises:
        InputError: The file cannot be read, or was not written by `timm-mobileformer export`.
    """
    path = Path(args.model)
    try:
        session = open_onnx(path)
    except Exception as e:  # ONNX Runtime has its own exception types
        raise InputError(f'{path} cannot be read: it is damaged or not an ONNX file ({reason(e, 200)})') from e
    about = read_metadata(session.get_modelmeta().custom_metadata_map, path)

    def infer(inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([about['output_name']], {about['input_name']: inputs.numpy()})[0])

    def run(images: torch.Tensor) -> torch.Tensor:
        if not is_raw(about):
            return infer(images)
        probabilities = torch.stack(tuple(map(infer, images)))
        return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()

    names = about['label_names']
    names = read_names(args.class_map, len(names)) if args.class_map else names
    return Classifier(make_transform(about), run, names, make_reader(about), is_batched=not is_raw(about))


def as_classifier(model: Any, label_names: List[str], device: torch.device, args: argparse.Namespace) -> Classifier:
    """Return a timm model on a device with its preprocessing, which options such as `--img-size` may change."""
    model.eval().to(device)
    about = describe(model, model_data_config(model, vars(args)), label_names)
    return Classifier(make_transform(about), lambda images: model(images.to(device)).float().cpu(), label_names,
                      make_reader(about))


def open_classifier(args: argparse.Namespace) -> Classifier:
    """Open the model that `--model` and related options specify, see `load.load_model`, or an exported ONNX file.

    Raises:
        InputError: The model does not exist, has no weights, or the weights do not fit.
    """
    if args.model.endswith('.onnx'):
        return open_onnx_file(args)
    model = load_model(args)
    return as_classifier(model, class_names(model, args.class_map), pick_device(args), args)
