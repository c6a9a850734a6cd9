"""Command-line options and their validation; does not import torch."""
import argparse
import math
import re
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, NoReturn, Optional, Sequence

from timm_mobileformer import __version__, versions

from .console import InputError, abbreviate, missing

__all__ = [
    'DATA_OPTIONS', 'SUBCOMMANDS', 'at_least', 'batch_size_option', 'check_exist', 'check_onnx', 'check_output',
    'class_map_option', 'data_arguments', 'data_options', 'device_option', 'existing_file', 'existing_folder',
    'folder_options', 'fraction',
    'img_size_option', 'model_options', 'option', 'parse', 'threads_option', 'workers_option']

SUBCOMMANDS = (
    'models', 'finetune', 'evaluate', 'predict', 'tokens', 'export', 'benchmark', 'weights', 'publish', 'recipe')
ARCHIVES = ('.7z', '.gz', '.rar', '.tar', '.tgz', '.zip')


# Values, as `type=` of argparse takes them. Each call with the same limits returns the same function, so that an option
# has one type in all subcommands.

@cache
def _number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    limits = f'at least {least}' if most == math.inf else f'from {least} to {most}'

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as e:
            name = 'an integer' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'must be {name}, not {text!r}') from e
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f'must be {limits}, not {value}')
        return value

    return convert


def at_least(least: int, most: float = math.inf) -> Callable[[str], float]:
    """Type of an integer option within limits."""
    return _number(int, least, most)


def fraction(least: float = 0, most: float = 1) -> Callable[[str], float]:
    """Type of a float option within limits."""
    return _number(float, least, most)


def existing_file(text: str) -> Path:
    """Type of an option that names a file to read."""
    path = Path(text)
    if not path.exists() or path.is_dir():
        raise argparse.ArgumentTypeError(f'no such file: {text}')
    return path


def existing_folder(text: str) -> Path:
    """Type of an option that names a folder to read."""
    path = Path(text)
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        raise argparse.ArgumentTypeError(f'{text} is an archive; unpack it, and name the folder')
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f'no such folder: {text}')
    return path


def pattern(text: str) -> str:
    """Type of an option that is a regular expression with a group."""
    try:
        groups = re.compile(text).groups
    except re.error as e:
        raise argparse.ArgumentTypeError(f'not a regular expression: {text!r} ({e})') from e
    if not groups:
        raise argparse.ArgumentTypeError(f'has no group in parentheses to take the label from: {text!r}')
    return text


# Options that several subcommands have

DATA_OPTIONS = 'labels', 'label_column', 'skip_unlabeled', 'label_pattern', 'val_split'  # arguments of `open_data`


def folder_options(group: Any, what: str) -> None:
    group.add_argument('--data-dir', metavar='DIR', type=existing_folder, help=what)
    group.add_argument('--labels', metavar='FILE', type=existing_file,
                       help='table of files in DIR and their labels, if there are no class folders')
    group.add_argument('--label-column', metavar='NAME',
                       help='column of labels in the table, or its number if there is no header (default: the one of a '
                            'usual name, or the only one)')
    group.add_argument('--skip-unlabeled', action='store_true', default=None,
                       help='leave out rows of the table that have no label')
    group.add_argument('--skip-bad-images', action='store_true', default=None,
                       help='leave out images that cannot be read')
    group.add_argument('--label-pattern', metavar='REGEX', type=pattern,
                       help='regular expression whose first group is the label in the path of an image, such as '
                            "'([^/]+)_[0-9]+'; a group named `split` may match train, val or test")


def data_options(group: Any, default: str) -> None:
    folder_options(group, 'folder with train/CLASS/… and val/CLASS/… (or validation, valid, eval, test), or only '
                          f'train/CLASS/… or CLASS/… (default: {default})')
    group.add_argument('--val-split', metavar='P', type=fraction(0.01, 0.99),
                       help='fraction of every class for validation if there is no validation folder (default: 0.2)')


def data_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """What the options of `data_options` that were given are as arguments of `open_data`."""
    return {key: value for key in DATA_OPTIONS if (value := getattr(args, key, None)) is not None}


def model_options(
        group: Any,
        default: Optional[str] = None,
        required: bool = False,
        note: str = '',
        size_note: str = '',
) -> None:
    group.add_argument('-m', '--model', metavar='NAME', default=default, required=required,
                       help=f'model name of timm, folder written by finetune, or hf-hub:…{note}')
    weights = group.add_mutually_exclusive_group()
    weights.add_argument('--pretrained', action='store_true', default=None,
                         help='load the published weights of a model of timm')
    weights.add_argument('--checkpoint', metavar='FILE', type=existing_file,
                         help="load the weights from a file: checkpoint of train.py or of the authors, state dict, "
                              'or safetensors')
    group.add_argument('--use-ema', action='store_true', default=None,
                       help='load the averaged weights of the checkpoint')
    img_size_option(group, f'that of training, else that of the model{size_note}')


def class_map_option(group: Any) -> None:
    group.add_argument('--class-map', metavar='FILE', type=existing_file,
                       help='class names, one per line (default: those of the weights)')


def img_size_option(group: Any, default: str) -> None:
    group.add_argument('--img-size', type=at_least(32), metavar='N',
                       help=f'height and width of images (default: {default})')


def batch_size_option(group: Any, default: Optional[int], shown: object) -> None:
    group.add_argument('-b', '--batch-size', type=at_least(1), metavar='N', default=default,
                       help=f'images per batch (default: {shown})')


def workers_option(group: Any, default: Optional[int] = 2) -> None:
    group.add_argument('-j', '--workers', type=at_least(0), metavar='N', default=default,
                       help='worker processes that read images (default: 2)')


def threads_option(group: Any, default: Optional[int] = 1, shown: str = '1') -> None:
    group.add_argument('--threads', type=at_least(1), metavar='N', default=default,
                       help=f'CPU threads of the model (default: {shown})')


def device_option(group: Any, default: Optional[str] = None) -> None:
    shown = default or 'the accelerator that PyTorch finds, else cpu'
    group.add_argument('--device', default=default, help=f'device to run on (default: {shown})')


def check_onnx(args: argparse.Namespace) -> None:
    """Raise an `InputError` if `--model` is an ONNX file that cannot be run with the other options."""
    if not args.model.endswith('.onnx'):
        return
    if not Path(args.model).is_file():
        raise InputError(f'no such file: {args.model}')
    if lack := missing('export', 'onnxruntime'):
        raise InputError(f'{args.model} {lack}')
    named = [key for key in ('checkpoint', 'pretrained', 'use_ema', 'img_size', 'device') if getattr(args, key)]
    if named:
        raise InputError(f'{args.model} has its own weights and image size, and runs on the CPU; leave out '
                         + ', '.join(map(option, named)))


def check_output(path: Path, images: Sequence[Path]) -> None:
    """Raise an `InputError` if a file to write is a folder, a device, or one of the input images."""
    if path.exists() and not path.is_file() or path.resolve() in [image.resolve() for image in images]:
        raise InputError(f'--output would overwrite {path}')


def check_exist(paths: Optional[Sequence[Path]]) -> None:
    if lacking := [path for path in paths or () if not path.exists()]:
        raise InputError(f'no such image or folder: {abbreviate(lacking)}')


# The command line

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s that name the help of their own subcommand."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message.removeprefix("argument ")}; see {self.prog} --help')

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}')
        return known, unknown


def option(key: str) -> str:
    return f'--{key.replace("_", "-")}'


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, that of the process by default.

    Every subcommand is a module of this package that imports nothing heavy. It has a line of help, `HELP`; the name of
    the module whose `run(args)` does the work, `WORK`; `add_options(parser)`; and, where defaults or errors depend on
    several options, `resolve_options(args)`.

    Raises:
        InputError: The command line is wrong, as far as that can be told without importing torch.
    """
    parser = Parser(
        prog='timm-mobileformer',
        description='Train, evaluate, export and publish Mobile-Former and other timm models.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    subparsers = parser.add_subparsers(dest='subcommand', required=True, metavar='SUBCOMMAND')
    modules = {name: import_module(f'.{name}', __package__) for name in SUBCOMMANDS}
    for name, module in modules.items():
        module.add_options(subparsers.add_parser(
            name, help=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter))
    args = parser.parse_args(argv)
    if args.subcommand != 'recipe' and versions.is_older(found := version('timm'), versions.COMMANDS):
        raise InputError(f'{args.subcommand} needs timm {versions.COMMANDS} or later, not {found}: '
                         f"pip install 'timm>={versions.COMMANDS}'")
    if resolve := getattr(modules[args.subcommand], 'resolve_options', None):
        resolve(args)
    return args
