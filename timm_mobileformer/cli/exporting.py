"""Export a model, verify the files against PyTorch, and write their metadata."""
import argparse
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_loader, create_transform
from timm.utils import accuracy, reparameterize_model
from torchvision.transforms import Compose

from .console import InputError, abbreviate, plural, progress, quiet_unless_it_fails, quote, reason, worker_errors
from .data import BAD_IMAGES, open_data
from .dataset import ImageDataset
from .digits import folder_or_digits
from .files import atomic_dir
from .folders import ImageScan
from .formats import FORMATS, Run, load_raw
from .image_checks import check_images
from .labelled import TrainingData, match_classes, training_data
from .load import class_names, load_model, model_data_config, reading_options
from .metadata import describe, fingerprint_weights, remove_outdated, to_pixels, write_metadata
from .options import data_arguments
from .raw_onnx import add_preprocessing, check_preprocessing
from .run_state import claim
from .web_page import find_runtime, write_page

__all__ = ['run']

NUM_CALIBRATION = 256  # images
RAW_TOLERANCE = 0.01  # of a probability
Loader = Any  # of batches (B, C, H, W) and targets (B)


class Inputs(NamedTuple):
    """Data on which exported files are verified."""
    loader: Loader
    calibration: Optional[Loader]  # images for calibration; None for noise
    targets: Optional[torch.Tensor]  # (N); None if there are no labels
    description: str
    decoded: Sequence[Tuple[torch.Tensor, int]]  # images (H, W, 3) in uint8 before preprocessing, and targets


def thin_out(samples: Sequence[Tuple[str, int]]) -> List[Tuple[str, int]]:
    """Return at most `NUM_CALIBRATION` evenly spaced samples."""
    return list(samples[::math.ceil(len(samples) / NUM_CALIBRATION)])


def open_inputs(args: argparse.Namespace, model: Any, names: List[str], data_config: Dict[str, Any],
                root: Optional[Path], trained: Optional[TrainingData]) -> Inputs:
    """Open the validation set of a folder of labelled images, else the images of `--images`, else generate noise.

    Args:
        args: Command-line options.
        model: timm model.
        names: Class names by index.
        data_config: Preprocessing, from `model_data_config`.
        root: Folder of labelled images.
        trained: Training data of the model, if known.

    Raises:
        InputError: Images cannot be read, or no image has a class of the model.
    """

    def decode(samples: Sequence[Tuple[str, int]]) -> Any:
        images = ImageDataset(samples, **reading_options(model))
        images.transform = Compose([to_pixels])
        return images

    def load(samples: Sequence[Tuple[str, int]]) -> Loader:
        return create_loader(
            ImageDataset(samples, **reading_options(model)), batch_size=32, num_workers=args.workers,  # type: ignore[arg-type]
            device=torch.device('cpu'), **data_config)

    if root:
        data = trained and trained.open(root, args)
        if trained and not data:
            print('the images or their options are not those of training: validation images may have been used for '
                  'training')
        data = data or open_data(root, **data_arguments(args))
        index, mismatches = match_classes(data.classes, names, args.checkpoint or args.model)
        for remark in [*data.remarks, *mismatches]:
            print(remark)
        val = [(path, index[name]) for path, target in data.val.samples
               if (name := data.classes[target]) in index]
        calibration = thin_out(data.train.samples)
        bad = check_images([path for path, _ in [*calibration, *val]], args.workers, args.output / BAD_IMAGES,
                           bool(args.skip_bad_images)).bad
        val, calibration = ([sample for sample in samples if sample[0] not in bad]
                            for samples in (val, calibration))
        if not val:
            raise InputError(f'{root} has no validation image of a class of {args.checkpoint or args.model}')
        targets = torch.tensor([target for _, target in val])
        return Inputs(load(val), load(calibration), targets, f'{plural(len(val), "image")} of the validation set',
                      decode(val))
    if args.images:
        paths = ImageScan().expand(args.images)
        check_images(paths, args.workers)
        samples = [(path, 0) for path in paths]
        return Inputs(load(samples), load(thin_out(samples)), None, plural(len(paths), 'image'), decode(samples))
    generator = torch.Generator().manual_seed(0)
    channels, *size = data_config['input_size']
    noise = torch.randint(256, (8, *size, channels), dtype=torch.uint8, generator=generator)
    transform = create_transform(**data_config)
    images = torch.stack([transform(Image.fromarray(pixels.squeeze(2).numpy())) for pixels in noise])
    return Inputs([(images, torch.zeros(8))], None, None, 'noise', [(pixels, 0) for pixels in noise])


@torch.inference_mode()
def run_all(run: Run, loader: Loader, desc: str) -> torch.Tensor:
    """Return the outputs of a model for all images (N, classes)."""
    return torch.cat([run(images) for images, _ in progress(loader, desc)])


@torch.inference_mode()
def latencies(runs: Dict[str, Run], inputs: Dict[str, Any]) -> Dict[str, float]:
    """Measure the median latency for one image in milliseconds, interleaved so that system load affects all alike."""
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in progress(range(50), 'latency'):
        for name, run in runs.items():
            run(inputs[name])  # warm up the caches
            start = time.perf_counter()
            run(inputs[name])
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def count_changes(outputs: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor) -> Tuple[int, int]:
    """Count the images that only PyTorch, and that only the exported file, classifies correctly."""
    right, was_right = (logits.argmax(1) == targets for logits in (outputs, expected))
    return int((was_right & ~right).sum()), int((right & ~was_right).sum())


def check_outputs(name: str, outputs: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor, max_drop: float,
                  raw: bool = False) -> None:
    """Raise an error if outputs differ from those of PyTorch or, for int8, if accuracy drops.

    Quantization changes some predictions at random. The difference between the numbers of lost and won predictions has
    a standard error of sqrt(lost + won) (McNemar 1947), which is tolerated in addition to `max_drop`.

    Raises:
        InputError: The outputs differ or the accuracy drops too much.
    """
    difference = (outputs - expected).abs().max().item()
    tolerance = RAW_TOLERANCE if raw else 1e-4 * max(1., expected.abs().max().item())
    if not name.endswith('int8'):
        if not difference <= tolerance:
            raise InputError(f'differs from PyTorch by {difference:.2g}, more than {tolerance:.2g}')
        return
    lost, won = count_changes(outputs, expected, targets)
    drop, by_chance = (100 * n / len(targets) for n in (lost - won, math.sqrt(lost + won)))
    if drop - by_chance > max_drop:
        raise InputError(f'loses {drop:.2f} points on {plural(len(targets), "image")} ({lost} lost, {won} won), more '
                         f'than --max-drop {max_drop:g} and the standard error of {by_chance:.2f}')


def compare(outputs: torch.Tensor, expected: torch.Tensor, targets: torch.Tensor, inputs: Inputs) -> List[str]:
    """Return the table cells top-1, agreement with PyTorch and largest difference; '–' if not available."""
    same = 100 * (outputs.argmax(1) == expected.argmax(1)).float().mean().item()
    return [f'{accuracy(outputs, targets)[0].item():.2f}' if inputs.targets is not None else '–',
            f'{same:.2f}' if inputs.calibration else '–', f'{(outputs - expected).abs().max().item():.1g}']


@worker_errors()
def export(args: argparse.Namespace, root: Optional[Path], trained: Optional[TrainingData]) -> int:
    """Export a model, verify the files and print a table; return the exit status, 1 if a format failed."""
    runtime = find_runtime(args.runtime) if args.runtime else None
    model = load_model(args).eval()
    torch.set_num_threads(args.threads)
    data_config = model_data_config(model, vars(args))
    names = class_names(model, args.class_map)
    inputs = open_inputs(args, model, names, data_config, root, trained)
    if args.raw:
        check_preprocessing(data_config)
    architecture = model.pretrained_cfg['architecture']
    about = {**describe(model, data_config, names, args.raw), 'weights_sha256': fingerprint_weights(model)}

    plain: Any = reparameterize_model(model).requires_grad_(False)
    images = torch.cat([images for images, _ in inputs.calibration or inputs.loader])
    images = torch.cat([images, images]) if len(images) == 1 else images  # exporters need two for a dynamic batch size

    activation = nn.Softmax(dim=1) if args.raw else nn.Identity()
    modules = {'PyTorch, as trained': model, 'PyTorch, reparameterized': plain}
    by_pytorch = {title: activation(run_all(module, inputs.loader, title)) for title, module in modules.items()}
    expected = by_pytorch['PyTorch, as trained']
    targets = expected.argmax(1) if inputs.targets is None else inputs.targets
    runs: Dict[str, Run] = {**modules}
    rows = {}
    for title, outputs in by_pytorch.items():
        size = sum(tensor.nbytes for tensor in modules[title].state_dict().values())
        rows[title] = ['', f'{size / 1e6:.2f}', *compare(outputs, expected, targets, inputs)]
    failed: List[str] = []
    changes: List[str] = []
    removed: List[str] = []
    for name in progress(args.formats, 'export', unit='format'):
        form, options = FORMATS[name], {'opset': args.opset} if args.opset and name.startswith('onnx') else {}
        try:
            if name.endswith('int8') and not inputs.calibration:
                raise InputError('calibration needs images; use --images or --data-dir')
            with atomic_dir(args.output) as folder:
                path = folder / (('model' if name == 'web' else architecture) + form.suffix)
                with quiet_unless_it_fails():
                    form.export(plain, images, path, **options)
                    if args.raw:
                        add_preprocessing(path, data_config, with_crop=name == 'web')
                    size = sum(file.stat().st_size for file in folder.iterdir())  # OpenVINO writes two files
                    if name == 'web':
                        write_page(folder, runtime)
                    shape = about['input_shape']
                    write_metadata({**about, 'input_shape': shape if args.raw else [form.batch, *shape[1:]]}, path)
                    run = (load_raw if args.raw else form.load)(path, args.threads)
                outputs = run_all(run, (([image], y) for image, y in inputs.decoded) if args.raw else inputs.loader,
                                  form.title)
                check_outputs(name, outputs, expected, targets, args.max_drop, args.raw)
                rows[form.title] = [path.name, f'{size / 1e6:.2f}', *compare(outputs, expected, targets, inputs)]
                runs[form.title] = run
                if name.endswith('int8'):
                    lost, won = count_changes(outputs, expected, targets)
                    changes.append(f'{lost} lost, {won} won in {form.title}')
            removed += remove_outdated(args.output, about)
        except Exception as e:  # exporters raise many types of errors
            failed.append(f'{name}: {reason(e, 300)}')

    image, (decoded, _) = images[:1], inputs.decoded[0]
    raw_titles = runs.keys() - modules if args.raw else ()
    times = latencies(runs, {title: [decoded] if title in raw_titles else image for title in runs})
    input_size = ' × '.join(map(str, data_config['input_size']))
    print(f'{architecture}, images of {input_size}; checked on {inputs.description}')
    if len(rows) > 2:
        print(f'files in {args.output}, each with its metadata in a .json file')
    preprocessing = f', from {decoded.shape[1]} × {decoded.shape[0]} pixels in the raw files' if args.raw else ''
    print(f'latency of one image{preprocessing}, {plural(args.threads, "thread")}\n')
    print('| | file | MB | top-1, % | agreement with PyTorch, % |', 'largest difference of a',
          'probability' if args.raw else 'logit', '| latency, ms | speed, eager = 1 |')
    print('|---' * 8 + '|')
    eager = times['PyTorch, as trained']
    for title, row in rows.items():
        print('|', ' | '.join([title, *row, f'{times[title]:.2f}', f'{eager / times[title]:.2f}']), '|')
    if changes:
        print(f'\nint8: changed predictions on {plural(len(targets), "image")}: {"; ".join(changes)} (allowed loss: '
              f'--max-drop {args.max_drop:g} points and one standard error)')
    if removed:
        print(f'\nremoved outdated files from {args.output}: {", ".join(removed)}')
    if 'web' in args.formats and not failed:
        print(f'\nto serve the page on http://localhost:8000: python -m http.server --directory {quote(args.output)}')
    for problem in args.left_out + failed:
        print(f'\nskipped: {problem}')
    return 1 if failed else 0


def choose_data(args: argparse.Namespace, trained: Optional[TrainingData]) -> ContextManager[Optional[Path]]:
    """Choose the folder of labelled images: the given one, else that of training, and set the options accordingly."""
    folder = args.data_dir or args.labels and args.labels.parent
    if trained:
        args.val_split = args.val_split or trained.arguments.get('val_split')
    if folder:
        return folder_or_digits(folder)
    if args.images or not trained:
        return nullcontext()
    if gone := [path for path in trained.paths if not path.exists()]:
        print(f'{args.model} was trained on {abbreviate(gone)}, which no longer exists; --data-dir sets another one')
        return nullcontext()
    trained.fill_in(args)
    print(f'verified on the validation set of training, from {abbreviate(trained.paths) or "the digits"}')
    return folder_or_digits(trained.root)


def run(args: argparse.Namespace) -> int:
    trained = training_data(args.model)
    with claim(args.output), choose_data(args, trained) as root:
        return export(args, root, trained)
