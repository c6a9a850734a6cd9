"""From a model to files that run on devices, each checked against PyTorch, with what is to be known to use them."""
import argparse
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import create_loader, resolve_model_data_config
from timm.utils import accuracy, reparameterize_model

from .console import InputError, abbreviate, progress, quiet_unless_it_fails, reason
from .data import ImageScan, open_data
from .digits import folder_or_digits
from .files import atomic_dir
from .formats import FORMATS, Raw, Run
from .images import Pictures, check_images
from .load import class_names, load_model, reading_options
from .metadata import describe, write_metadata
from .options import DATA_OPTIONS, data_arguments
from .run_state import fingerprint, read_state

__all__ = ['run']

NUM_CALIBRATION = 256  # images
Loader = Any  # of batches (B, C, H, W) and targets (B)


class Inputs(NamedTuple):
    """What files are checked on."""
    loader: Loader
    calibration: Optional[Loader]  # of pictures; None if there are none
    targets: Optional[torch.Tensor]  # (N); None if there are no labels
    what: str  # these are, in words


def thin_out(samples: Sequence[Tuple[str, int]], limit: int = NUM_CALIBRATION) -> List[Tuple[str, int]]:
    """At most `limit` of the pictures, from all over."""
    return list(samples[::math.ceil(len(samples) / limit)])


def open_inputs(args: argparse.Namespace, model: Any, data_config: Dict[str, Any], root: Optional[Path]) -> Inputs:
    """Labelled pictures, if there is a folder of them; else the pictures that `--images` names; else noise.

    Raises:
        InputError: They cannot be read, or are labelled otherwise than the model is.
    """

    def load(samples: Sequence[Tuple[str, int]]) -> Loader:
        return create_loader(
            Pictures(samples, **reading_options(model)), batch_size=32, num_workers=args.workers,  # type: ignore[arg-type]
            device=torch.device('cpu'), **data_config)

    if root:
        data = open_data(root, **data_arguments(args))
        for remark in data.remarks:
            print(remark)
        check_classes(args, model, data.classes)
        held_out, calibration = data.held_out.samples, thin_out(data.train.samples)
        check_images([path for path, _ in [*calibration, *held_out]], args.workers)
        if args.pictures not in ('', fingerprint(data, root)):
            print('these are not the pictures of its training, or otherwise held out: it may have been trained on some')
        targets = torch.tensor([target for _, target in held_out])
        return Inputs(load(held_out), load(calibration), targets, f'{len(held_out):,} held-out pictures')
    if args.images:
        found = ImageScan()
        paths = found.named(args.images)
        if not paths:
            raise InputError(f'no pictures in {abbreviate(args.images)}{found.of_types(", only")}')
        check_images(paths, args.workers)
        loader = load([(path, 0) for path in paths])
        return Inputs(loader, load(thin_out([(path, 0) for path in paths])), None, f'{len(paths):,} pictures')
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pixels = torch.randint(256, (8, *data_config['input_size']), generator=generator)
    return Inputs([((pixels / 255 - mean) / std, torch.zeros(8))], None, None, 'noise')


def check_classes(args: argparse.Namespace, model: Any, classes: List[str]) -> None:
    known = list(model.pretrained_cfg.get('label_names') or ())
    if model.num_classes != len(classes) or known and known != classes:
        raise InputError(f'{args.checkpoint or args.model} has {model.num_classes:,} classes '
                         f'({abbreviate(known) or "without names"}), the data {len(classes):,} '
                         f'({abbreviate(classes)}); give the --data-dir that it was trained on, or pictures of any '
                         'kind with --images')


@torch.inference_mode()
def run_all(run: Run, loader: Loader, desc: str) -> torch.Tensor:
    """What a model answers to all images (N, classes), in their order."""
    return torch.cat([run(images) for images, _ in progress(loader, desc)])


@torch.inference_mode()
def latencies(runs: Dict[str, Run], inputs: Dict[str, torch.Tensor], rounds: int = 50) -> Dict[str, float]:
    """Median milliseconds for one image, taken in turns so that a busy machine hits all alike."""
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in progress(range(rounds), 'latency'):
        for name, run in runs.items():
            run(inputs[name])  # warm caches, which the runtime before has filled
            start = time.perf_counter()
            run(inputs[name])
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def check_answers(name: str, answers: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor, max_drop: float,
                  ) -> None:
    """Refuse answers that are not PyTorch's, or, of int8, that are right too seldom.

    Of a few pictures, one or two change sides by chance. The number of those that were right in one of the two only
    says how many (McNemar's test): twice its root is forgiven.

    Raises:
        InputError: They are refused.
    """
    difference, tolerance = (answers - wanted).abs().max().item(), 1e-4 * max(1., wanted.abs().max().item())
    if not name.endswith('int8'):
        if not difference <= tolerance:
            raise InputError(f'differs from PyTorch by {difference:.2g}, more than {tolerance:.2g}')
        return
    right, was_right = (logits.argmax(1) == targets for logits in (answers, wanted))
    lost, won = (was_right & ~right).sum().item(), (right & ~was_right).sum().item()
    drop, by_chance = (100 * n / len(targets) for n in (lost - won, 2 * math.sqrt(lost + won)))
    if drop - by_chance > max_drop:
        raise InputError(f'loses {drop:.2f} points on {len(targets):,} pictures ({lost} lost, {won} won), more than '
                         f'--max-drop {max_drop:g} and the {by_chance:.2f} that may be chance')


def compare(answers: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor, inputs: Inputs) -> List[str]:
    """Cells of the table: top-1, predictions that are PyTorch's, largest difference; '–' for what nobody can tell."""
    same = 100 * (answers.argmax(1) == wanted.argmax(1)).float().mean().item()
    return [f'{accuracy(answers, targets)[0].item():.2f}' if inputs.targets is not None else '–',
            f'{same:.2f}' if inputs.calibration else '–', f'{(answers - wanted).abs().max().item():.1g}']


def export(args: argparse.Namespace, root: Optional[Path]) -> int:
    model = load_model(args).eval()
    torch.set_num_threads(args.threads)
    data_config = resolve_model_data_config(model, vars(args))
    inputs = open_inputs(args, model, data_config, root)
    with atomic_dir(args.output):  # refused before the work if it cannot be written to
        pass
    architecture = model.pretrained_cfg['architecture']
    about = describe(model, data_config, class_names(model), args.raw)

    plain: Any = reparameterize_model(model).requires_grad_(False)
    raw = Raw(plain, data_config['mean'], data_config['std'])
    net, to_input = (raw, raw.unnormalize) if args.raw else (plain, nn.Identity())
    images = torch.cat([images for images, _ in inputs.calibration or inputs.loader])
    images = torch.cat([images, images]) if len(images) == 1 else images  # exporters take two for an open batch

    to_answer = nn.Softmax(dim=1) if args.raw else nn.Identity()
    modules = {'PyTorch, as trained': model, 'PyTorch, reparameterized': plain}
    by_pytorch = {title: to_answer(run_all(module, inputs.loader, title)) for title, module in modules.items()}
    wanted = by_pytorch['PyTorch, as trained']
    targets = wanted.argmax(1) if inputs.targets is None else inputs.targets
    runs: Dict[str, Run] = {**modules}
    rows = {}
    for title, answers in by_pytorch.items():
        size = sum(tensor.nbytes for tensor in modules[title].state_dict().values())
        rows[title] = ['', f'{size / 1e6:.2f}', *compare(answers, wanted, targets, inputs)]
    failed = []
    for name in progress(args.formats, 'export', unit='format'):
        form = FORMATS[name]
        try:
            if name.endswith('int8') and not inputs.calibration:
                raise InputError('must see pictures to find its scales: --images or --data-dir names some')
            with atomic_dir(args.output) as folder:
                path = folder / (architecture + form.suffix)
                with quiet_unless_it_fails():
                    form.export(net, to_input(images), path)
                    size = sum(file.stat().st_size for file in folder.iterdir())  # OpenVINO writes two
                    write_metadata({**about, 'input_shape': [form.batch, *about['input_shape'][1:]]}, path)
                    run = form.load(path, args.threads)
                answers = run_all(run, ((to_input(x), y) for x, y in inputs.loader), form.title)
                check_answers(name, answers, wanted, targets, args.max_drop)
                rows[form.title] = [path.name, f'{size / 1e6:.2f}', *compare(answers, wanted, targets, inputs)]
                runs[form.title] = run
        except Exception as e:  # exporters fail in ways of their own
            failed.append(f'{name}: {reason(e, 300)}')

    image = images[:1]
    times = latencies(runs, {title: image if title.startswith('PyTorch') else to_input(image) for title in runs})
    print(f'{architecture}, images of {" × ".join(map(str, data_config["input_size"]))}; checked on {inputs.what}')
    if len(rows) > 2:
        print(f'files in {args.output}, each with a .json that says how to use it')
    print(f'latency of one image, {args.threads} thread{"s"[:args.threads > 1]}\n')
    print('| | file | MB | top-1, % | predicted as by PyTorch, % |', 'largest difference of a',
          'probability' if args.raw else 'logit', '| latency, ms | speed, eager = 1 |')
    print('|---' * 8 + '|')
    eager = times['PyTorch, as trained']
    for title, row in rows.items():
        print('|', ' | '.join([title, *row, f'{times[title]:.2f}', f'{eager / times[title]:.2f}']), '|')
    for problem in args.left_out + failed:
        print(f'\nleft out: {problem}')
    return 1 if failed else 0


def take_data_of_training(args: argparse.Namespace) -> bool:
    """Where the folder of a run of finetune is exported, let its data be the default, and its share of held-out ones.

    Returns:
        Whether these are the digits.
    """
    try:
        state = read_state(Path(args.model.removeprefix('local-dir:')))
    except InputError:
        state = {'args': {}, 'pictures': ''}
    trained, args.pictures = state['args'], state['pictures']
    args.val_split = args.val_split or trained.get('val_split') or 0.2
    if args.images or args.data_dir or args.labels or not trained:
        return False
    paths = [path for key in ('data_dir', 'labels') if (path := trained[key])]
    if gone := [path for path in paths if not path.exists()]:
        print(f'{args.model} was trained on {abbreviate(gone)}, which is not there; --data-dir names another folder')
        return False
    vars(args).update({key: trained.get(key) for key in ('data_dir', *DATA_OPTIONS) if getattr(args, key) is None})
    print(f'checked on the pictures that were held out in training, of {abbreviate(paths) or "the digits"}')
    return not paths


def run(args: argparse.Namespace) -> int:
    are_digits = take_data_of_training(args)
    folder = args.data_dir or args.labels and args.labels.parent
    with folder_or_digits(folder) if folder or are_digits else nullcontext() as root:
        return export(args, root)
