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
    'ARCHIVES', 'DATA_OPTIONS', 'SUBCOMMANDS', 'at_least', 'batch_size_option', 'check_alone', 'check_exist',
    'check_label_pattern', 'check_onnx', 'check_output', 'class_map_option', 'data_arguments', 'data_options',
    'device_option', 'existing_file', 'existing_folder', 'folder_options', 'fraction', 'img_size_option',
    'model_options', 'option', 'parse', 'threads_option', 'workers_option']

SUBCOMMANDS = (
    'models', 'finetune', 'evaluate', 'predict', 'tokens', 'export', 'benchmark', 'weights', 'publish', 'recipe')
ARCHIVES = ('.7z', '.gz', '.rar', '.tar', '.tgz', '.zip')


# Types of options, for `type=` of argparse. `_number` is cached, so that an option has the same type object in all
# subcommands.

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
    """Return the type of an integer option with limits."""
    return _number(int, least, most)


def fraction(least: float = 0, most: float = 1) -> Callable[[str], float]:
    """Return the type of a float option with limits."""
    return _number(float, least, most)


def existing_file(text: str) -> Path:
    """Type of an option that is the path to an existing file."""
    path = Path(text)
    if not path.exists() or path.is_dir():
        raise argparse.ArgumentTypeError(f'no such file: {text}')
    return path


def existing_folder(text: str) -> Path:
    """Type of an option that is the path to an existing folder."""
    path = Path(text)
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        raise argparse.ArgumentTypeError(f'{text} is an archive; unpack it and name the folder')
    if not path.is_dir():
        problem = f'{text} is a file, not a folder' if path.exists() else f'no such folder: {text}'
        raise argparse.ArgumentTypeError(problem)
    return path


def pattern(text: str) -> str:
    """Type of an option that is a regular expression with a group."""
    try:
        groups = re.compile(text).groups
    except re.error as e:
        raise argparse.ArgumentTypeError(f'invalid regular expression {text!r}: {e}') from e
    if not groups:
        raise argparse.ArgumentTypeError(f'must have a group in parentheses for the label, unlike {text!r}')
    return text


# Options of several subcommands

DATA_OPTIONS = 'labels', 'label_column', 'skip_unlabeled', 'label_pattern', 'val_split'  # arguments of `open_data`


def folder_options(group: Any, what: str) -> None:
    group.add_argument('--data-dir', metavar='DIR', type=existing_folder, help=what)
    source = group.add_mutually_exclusive_group()
    source.add_argument('--labels', metavar='FILE', type=existing_file,
                        help='table of files in DIR and their labels, instead of class folders')
    group.add_argument('--label-column', metavar='NAME',
                       help='column of labels in the table, or its number if there is no header (default: a column '
                            'with a usual name, or the only one)')
    group.add_argument('--skip-unlabeled', action='store_true', default=None,
                       help='skip rows of the table that have no label')
    source.add_argument('--label-pattern', metavar='REGEX', type=pattern,
                        help='regular expression whose first group is the label in the path of an image, instead of '
                             "class folders, such as '([^/]+)_[0-9]+'; a group `split` may match train, val, test")


def data_options(group: Any, default: str) -> None:
    folder_options(group, 'folder with train/CLASS/… and val/CLASS/… (or validation, valid, eval, test), or only '
                          f'train/CLASS/… or CLASS/… (default: {default})')
    group.add_argument('--skip-bad-images', action='store_true', default=None,
                       help='skip images that cannot be read')
    group.add_argument('--val-split', metavar='P', type=fraction(0.01, 0.99),
                       help='fraction of every class for validation if there is no validation folder (default: 0.2)')


def data_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """Return the given options of `data_options` as arguments of `open_data`."""
    return {key: value for key in DATA_OPTIONS if (value := getattr(args, key, None)) is not None}


def model_options(
        group: Any,
        default: Optional[str] = None,
        required: bool = False,
        note: str = '',
        size_note: str = '',
) -> None:
    group.add_argument('-m', '--model', metavar='NAME', default=default, required=required,
                       help=f'name of a timm model, folder written by finetune, or hf-hub:…{note}')
    weights = group.add_mutually_exclusive_group()
    weights.add_argument('--pretrained', action='store_true', default=None,
                         help='load the published weights of a timm model')
    weights.add_argument('--checkpoint', metavar='FILE', type=existing_file,
                         help="path to weights: checkpoint of timm's train.py or of the authors, state dict, or "
                              'safetensors')
    group.add_argument('--use-ema', action='store_true', default=None,
                       help='load the EMA weights of the checkpoint')
    img_size_option(group, f'the size used in training, else that of the model{size_note}')


def class_map_option(group: Any) -> None:
    group.add_argument('--class-map', metavar='FILE', type=existing_file,
                       help='file of class names, one per line (default: the names in the checkpoint)')


def img_size_option(group: Any, default: str) -> None:
    group.add_argument('--img-size', type=at_least(32), metavar='N',
                       help=f'height and width of the input (default: {default})')


def batch_size_option(group: Any, default: Optional[int] = 64, shown: str = '') -> None:
    group.add_argument('-b', '--batch-size', type=at_least(1), metavar='N', default=default,
                       help=f'images per batch (default: {shown or default})')


def workers_option(group: Any, default: Optional[int] = 2) -> None:
    group.add_argument('-j', '--workers', type=at_least(0), metavar='N', default=default,
                       help='worker processes that read images (default: 2)')


def threads_option(group: Any, default: Optional[int] = 1, shown: str = '') -> None:
    group.add_argument('--threads', type=at_least(1), metavar='N', default=default,
                       help=f'CPU threads of the model (default: {shown or default})')


def device_option(group: Any, default: Optional[str] = None) -> None:
    shown = default or 'the available accelerator, else cpu'
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
        raise InputError(f'{args.model} has fixed weights and image size and runs on the CPU; remove '
                         + ', '.join(map(option, named)))


def check_alone(args: argparse.Namespace, key: str, *others: str) -> None:
    """Raise an `InputError` if an option is given together with others that would have no effect."""
    given = [other for other in others if getattr(args, other) not in (None, False)]
    if getattr(args, key) and given:
        raise InputError(f'not allowed with {option(key)}: {", ".join(map(option, given))}')


def check_label_pattern(args: argparse.Namespace) -> None:
    """Raise an `InputError` if `--label-pattern` is given without `--data-dir` or with options of a table."""
    if args.label_pattern and not args.data_dir:
        raise InputError('--label-pattern needs --data-dir, the folder of the images')
    check_alone(args, 'label_pattern', 'label_column', 'skip_unlabeled')


def check_output(path: Path, images: Sequence[Path]) -> None:
    """Raise an `InputError` if a file to write is a folder, a device, or one of the input images."""
    if path.exists() and not path.is_file() or path.resolve() in [image.resolve() for image in images]:
        raise InputError(f'--output would overwrite {path}')


def check_exist(paths: Optional[Sequence[Path]]) -> None:
    """Raise an `InputError` if a path does not exist."""
    if lacking := [path for path in paths or () if not path.exists()]:
        raise InputError(f'no such image or folder: {abbreviate(lacking)}')


# The command line

class Parser(argparse.ArgumentParser):
    """Argument parser that raises an `InputError` which refers to `--help` of the subcommand."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message.removeprefix("argument ")}; see {self.prog} --help')

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}')
        return known, unknown


def option(key: str) -> str:
    """Return the option of an attribute of the parsed arguments: `--data-dir` for `data_dir`."""
    return f'--{key.replace("_", "-")}'


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line.

    Each subcommand is a module of this package that does not import torch. It defines `HELP`, a line of help; `WORK`,
    the name of the module whose `run(args)` does the work; `add_options(parser)`; and optionally
    `resolve_options(args)`, for defaults and errors that depend on several options.

    Args:
        argv: Arguments, by default those of the process.

    Returns:
        The parsed arguments.

    Raises:
        InputError: The arguments are invalid.
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
