"""What every subcommand can be told, and what is wrong with it as far as that can be said without PyTorch."""
import argparse
import math
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, NoReturn, Optional, Sequence, Tuple

from timm_mobileformer import versions

from .terminal import InputError, missing, quote, some

__all__ = ['RECIPES', 'parse']

RECIPES = Path(__file__).parents[1] / 'recipes'
PICTURES = '.pdf', '.png', '.svg', '.jpg', '.jpeg', '.tif', '.tiff', '.webp'  # that matplotlib writes
AUTHORS_TAG = 'ms_in1k'  # of the authors' weights
AUTHORS_FILES = {  # on Google Drive, by the table in the README of AAboys/MobileFormer
    'mobileformer_26m': '15uWYzx2VWWUjacZQHB56vOHzKxQDlp5O',
    'mobileformer_52m': '1ekq_FPl57gjIlYX16Ll0nBuEyB0pjgGt',
    'mobileformer_96m': '1kMbRceswujtliCHKr-nxMFsrkvBrEfrW',
    'mobileformer_151m': '1w4QO-zhJ8QI1zGu7iOZ7lXxYJ5G1VXdF',
    'mobileformer_214m': '13MOjdIMMBJgqyq_ld-grRhBBHOFU5Ggd',
    'mobileformer_294m': '1JBSM7NJ60fN9TgT5sMnbhmbZwrzcBd0r',
    'mobileformer_508m': '1bqLIcpbCaxK-Eb4wcxk0iJpFJ1nXfGuF',
}
RUNTIMES = {'eager': 'PyTorch eager', 'compile': 'torch.compile', 'onnx': 'ONNX Runtime'}
FORMATS: Dict[str, Tuple[str, ...]] = {  # the extra of this package and the modules that each needs
    'onnx': ('export', 'onnx', 'onnxscript', 'onnxruntime'),
    'onnx-int8': ('export', 'onnx', 'onnxscript', 'onnxruntime'),
    'openvino': ('openvino', 'openvino'),
    'executorch': ('executorch', 'executorch'),
    'executorch-int8': ('executorch', 'executorch', 'torchao'),
    'aoti': ('',),
}
FILES, FOLDERS = ('checkpoint', 'labels', 'class_map'), ('data_dir', 'resume', 'all', 'validate')  # that must be there

RANGES: Dict[str, Tuple[float, float]] = dict(
    img_size=(32, math.inf), epochs=(1, math.inf), batch_size=(1, math.inf), workers=(0, math.inf),
    threads=(1, math.inf), patience=(1, math.inf), seed=(0, math.inf), lr=(0, math.inf), weight_decay=(0, math.inf),
    val_split=(0.01, 0.99), smoothing=(0, 0.99), hflip=(0, 1), drop=(0, 0.99), drop_path=(0, 0.99), layer_decay=(0, 1),
    rounds=(2, math.inf), topk=(1, math.inf))


# What means the same in every subcommand that has it

def data_options(group: Any, default: str) -> None:
    group.add_argument('--data-dir', metavar='DIR', type=Path,
                       help='folder with train/CLASS/… and val/CLASS/… (or validation, valid, eval, test), or with '
                            f'train/CLASS/… or CLASS/… alone (default: {default})')
    group.add_argument('--labels', metavar='CSV', type=Path,
                       help='table of files in DIR and their labels, instead of class folders')
    group.add_argument('--val-split', metavar='P', type=float,
                       help='part of every class to hold out where no folder is for that (default: 0.2)')


def model_options(
        group: Any,
        default: Optional[str] = None,
        required: bool = False,
        note: str = '',
        size_note: str = '',
) -> None:
    group.add_argument('-m', '--model', metavar='NAME', default=default, required=required,
                       help=f'name in timm, folder that finetune wrote, or hf-hub:…{note}')
    weights = group.add_mutually_exclusive_group()
    weights.add_argument('--pretrained', action='store_true', default=None,
                         help='take the published weights of a model that is named as timm does')
    weights.add_argument('--checkpoint', metavar='FILE', type=Path,
                         help="take its weights from a file: of train.py, the authors', a state dict, safetensors")
    group.add_argument('--use-ema', action='store_true', default=None, help='take the averaged weights in the file')
    img_size_option(group, f"that of the weights' training, else the model's{size_note}")


def img_size_option(group: Any, default: str) -> None:
    group.add_argument('--img-size', type=int, metavar='N', help=f'height and width of images (default: {default})')


def batch_size_option(group: Any, default: Optional[int], shown: int) -> None:
    group.add_argument('-b', '--batch-size', type=int, metavar='N', default=default,
                       help=f'images at a time (default: {shown})')


def workers_option(group: Any, default: Optional[int] = 2) -> None:
    group.add_argument('-j', '--workers', type=int, metavar='N', default=default,
                       help='processes that read images (default: 2)')


def threads_option(group: Any, default: Optional[int] = 1, shown: str = '1') -> None:
    group.add_argument('--threads', type=int, metavar='N', default=default,
                       help=f'of the CPU that a model runs on (default: {shown})')


def device_option(group: Any, default: Optional[str] = None) -> None:
    shown = default or 'the accelerator that PyTorch finds, else cpu'
    group.add_argument('--device', default=default, help=f'to run models on (default: {shown})')


def check_output(path: Path, images: Sequence[Path]) -> None:
    """Refuse to write over a folder, a device, or a picture that is read."""
    if path.exists() and not path.is_file() or path.resolve() in [image.resolve() for image in images]:
        raise InputError(f'--output would overwrite {path}')


def check_paths(paths: Optional[Sequence[Path]]) -> None:
    if lacking := [path for path in paths or () if not path.exists()]:
        raise InputError(f'no such picture or folder: {some(lacking)}')


# finetune

FOLDER: Dict[str, Any] = dict(
    val_split=0.2, scale=(0.35, 1.), hflip=0.5, workers=2, model='mobileformer_52m', pretrained=False, epochs=30,
    batch_size=64, lr=1e-3, weight_decay=0.05, smoothing=0.1, seed=42, balanced=False, amp=False,
    output=Path('output/finetune'))
DIGITS = {**FOLDER, **dict(img_size=64, epochs=12, lr=2e-3, scale=(0.7, 1.), hflip=0.)}  # without a folder
RESUMED = {'subcommand', 'resume', 'data_dir', 'labels', 'device', 'threads', 'workers'}  # may be named with --resume

FINETUNE_EPILOG = """\
For everything else (several GPUs, mixup, other optimizers and schedules), timm's own train.py takes the models, and a
recipe that comes with them. It is in timm's source:

  git clone --depth 1 --branch v{timm} https://github.com/huggingface/pytorch-image-models
  python pytorch-image-models/train.py --config "$(timm-mobileformer recipe finetune)" \\
      --model mobileformer_52m --pretrained --num-classes N --data-dir DIR

--pretrained needs published weights; `timm-mobileformer weights` fetches the authors' into a folder for --model.
"""


def finetune(parser: argparse.ArgumentParser) -> None:
    """Options are None where they are not named: --resume has to know."""
    parser.description = (
        'Fine-tune a Mobile-Former, or any timm model, on a folder of images; without one, on the handwritten digits\n'
        'of scikit-learn. Options are called what they are called in train.py of timm.')
    parser.epilog = FINETUNE_EPILOG.format(timm=version('timm'))
    group = parser.add_argument_group('data')
    data_options(group, 'the digits')
    group.add_argument('--scale', type=float, nargs=2, metavar='PCT',
                       help='area of the random crops in training (default: 0.35 1.0; digits: 0.7 1.0)')
    group.add_argument('--hflip', type=float, metavar='P',
                       help='probability of a horizontal flip in training (default: 0.5; digits: 0)')
    group.add_argument('--aa', metavar='NAME', help='AutoAugment policy, such as rand-m9-mstd0.5 (default: none)')
    group.add_argument('--balanced', action='store_true', default=None, help='train on all classes equally often')

    group = parser.add_argument_group('model to start from')
    model_options(group, note=' (default: mobileformer_52m)', size_note='; digits: 64')
    group.add_argument('--drop', type=float, metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')

    group = parser.add_argument_group('training')
    group.add_argument('--epochs', type=int, metavar='N', help='default: 30; digits: 12')
    group.add_argument('--patience', type=int, metavar='N', help='end after N epochs without a better one')
    batch_size_option(group, None, 64)
    group.add_argument('--lr', type=float, help='of AdamW, at its highest (default: 1e-3; digits: 2e-3)')
    group.add_argument('--weight-decay', type=float, metavar='W', help='default: 0.05')
    group.add_argument('--layer-decay', type=float, metavar='R',
                       help='ratio of learning rates from one layer to the layer above')
    group.add_argument('--smoothing', type=float, metavar='P', help='of labels (default: 0.1)')
    group.add_argument('--seed', type=int, metavar='N', help='default: 42')

    group = parser.add_argument_group('where')
    group.add_argument('--output', type=Path, metavar='DIR',
                       help='new folder for all that is written, whole after every epoch (default: output/finetune)')
    group.add_argument('--resume', type=Path, metavar='DIR',
                       help='go on with the run in this folder, with its options; only --data-dir, --labels, --device, '
                            '--threads and --workers may be named again')
    device_option(group)
    group.add_argument('--amp', action='store_true', default=None, help='autocast to bfloat16')
    workers_option(group, None)
    threads_option(group, None, 'one a core, less --workers')


def check_finetune(args: argparse.Namespace) -> None:
    """Refuse what cannot be, and fill in the defaults of a new run."""
    if int(os.environ.get('WORLD_SIZE') or 1) > 1:
        raise InputError('finetune trains in one process; for torchrun there is train.py of timm with --config '
                         '"$(timm-mobileformer recipe finetune)", see finetune --help')
    named = {key for key, value in vars(args).items() if value is not None}
    if args.resume and named - RESUMED:
        others = ', '.join(sorted(map(option, named - RESUMED)))
        raise InputError(f'--resume goes on with the options of the run, and cannot change {others}')
    if args.batch_size == 1:
        raise InputError('--batch-size must be at least 2 in training, not 1')
    if args.scale and not 0 < args.scale[0] <= args.scale[1] <= 1:
        raise InputError(f'--scale takes two parts of the area, the smaller first, such as 0.35 1, not {args.scale}')
    if not args.resume:
        defaults = FOLDER if args.data_dir or args.labels else DIGITS
        vars(args).update({key: value for key, value in defaults.items() if key not in named})


# tokens

def tokens(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Draw what the tokens of a Mobile-Former attend to in images, block by block, in both directions, and print\n'
        'the five most likely classes.')
    parser.add_argument('images', metavar='IMAGE', type=Path, nargs='+')
    model_options(parser, required=True)
    parser.add_argument('--class-map', metavar='FILE', type=Path,
                        help='names of the classes, one a line (default: those that come with the weights)')
    parser.add_argument('--output', type=Path, default=Path('tokens.png'), metavar='FILE',
                        help='picture to write; of several images, numbered and named after each (default: tokens.png)')
    parser.add_argument('--npz', action='store_true',
                        help='write the attention maps of every block as arrays too, beside the picture, as .npz')


def check_tokens(args: argparse.Namespace) -> None:
    """Refuse what cannot be drawn, and make `output` a list, a file for each image."""
    if lack := missing('demo', 'matplotlib'):
        raise InputError(f'tokens {lack}')
    out = args.output
    if out.suffix.lower() not in PICTURES:
        raise InputError(f'--output {quote(out)} must end in one of {some(PICTURES, len(PICTURES))}')
    args.output = [out]
    if len(args.images) > 1:  # tokens-1-CAT.png, tokens-2-DOG.png
        digits = len(str(len(args.images)))
        args.output = [out.with_stem(f'{out.stem}-{i:0{digits}}-{p.stem}') for i, p in enumerate(args.images, 1)]
    for path in args.images:
        if path.is_dir():
            raise InputError(f'{path} is a folder; name the images in it, {quote(path)}/*')
    check_paths(args.images)
    for path in args.output:
        check_output(path, args.images)


# predict

def predict(parser: argparse.ArgumentParser) -> None:
    parser.description = 'Classify pictures: a table of comma-separated values with path, label and probability.'
    parser.add_argument('images', metavar='PATH', type=Path, nargs='+',
                        help='picture, or folder to search to its bottom')
    model_options(parser, required=True, note=', or an ONNX file that export wrote')
    parser.add_argument('--class-map', metavar='FILE', type=Path,
                        help='names of the classes, one a line (default: those that come with the weights)')
    parser.add_argument('--topk', type=int, default=1, metavar='K',
                        help='the K most likely classes: label, probability, label2, probability2, … (default: 1)')
    parser.add_argument('--output', type=Path, metavar='FILE', help='file for the table (default: standard output)')
    batch_size_option(parser, 64, 64)
    workers_option(parser)
    device_option(parser)


def check_predict(args: argparse.Namespace) -> None:
    check_paths(args.images)
    if args.output:
        check_output(args.output, args.images)
    if args.model.endswith('.onnx'):
        if not Path(args.model).is_file():
            raise InputError(f'no such file: {args.model}')
        if lack := missing('export', 'onnxruntime'):
            raise InputError(f'{args.model} {lack}')
        named = [key for key in ('checkpoint', 'pretrained', 'img_size', 'device') if getattr(args, key)]
        if named:
            raise InputError(f'{args.model} has weights and a size of its own, and runs on the CPU; leave out '
                             + ', '.join(map(option, named)))


# export

def export(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Export a model for devices: as trained, a folder of finetune, a checkpoint, published weights. Every file is\n'
        'checked against PyTorch, on the pictures held out in training where these are known, else on those of\n'
        '--data-dir or --images, else on noise. Beside it, and inside of ONNX, stands how to use it.')
    parser.add_argument('formats', nargs='+', choices=[*FORMATS, 'all'], metavar='FORMAT',
                        help=f'{", ".join(FORMATS)}, or all that can be written on this machine')
    model_options(parser, 'output/finetune', note=' (default: output/finetune)')
    parser.add_argument('--raw', action='store_true',
                        help='files take pictures (B, H, W, 3) of 0 ... 255 in the size of the model, and return '
                             'probabilities')
    data_options(parser, "that of a finetuned model's training, if it is still there")
    parser.add_argument('--images', metavar='PATH', type=Path, nargs='+',
                        help='pictures without labels, or folders of them, instead')
    parser.add_argument('--output', type=Path, default=Path('output/export'), metavar='DIR',
                        help='folder for the files (default: output/export)')
    parser.add_argument('--max-drop', type=float, default=1., metavar='P',
                        help='points of top-1 that int8 may lose, besides those that may be chance (default: 1)')
    threads_option(parser)
    workers_option(parser)


def check_export(args: argparse.Namespace) -> None:
    """Make `formats` those that can be written here; `left_out` says what the others lack."""
    check_paths(args.images)
    if args.images and (args.data_dir or args.labels):
        raise InputError('--images are pictures without labels, --data-dir and --labels have some; name one of both')
    every = 'all' in args.formats
    names = list(FORMATS) if every else list(dict.fromkeys(args.formats))
    lacks = {name: f'{name} {lack}' for name in names if (lack := missing(*FORMATS[name]))}
    if 'aoti' in names and not shutil.which(os.environ.get('CXX', 'g++')):
        lacks['aoti'] = 'aoti needs a C++ compiler: install g++, or name one in the environment variable CXX'
    args.formats, args.left_out = [name for name in names if name not in lacks], list(lacks.values())
    if lacks and (not every or not args.formats):
        raise InputError('; '.join(args.left_out))


# benchmark

def benchmark(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
What a Mobile-Former costs beside the timm models that one would pick instead: a table and a plot.

Every model runs as trained and, where timm.utils.reparameterize_model changes it, fused. All of them take turns, in
another order every round, so that whatever else the machine does hits all alike. Weights are random: they matter to
accuracy, which is quoted, not to time."""
    parser.add_argument('-m', '--model', nargs='+', metavar='NAME',
                        help='names in timm, folders that finetune wrote, or hf-hub:… (default: the Mobile-Formers and '
                             'ten others)')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, metavar='RUNTIME',
                        help=f'of {", ".join(RUNTIMES)} (default: eager and onnx on a CPU, else eager); compiling '
                             'takes up to a minute for each row')
    batch_size_option(parser, 1, 1)
    img_size_option(parser, 'that of the published accuracy, 224 for nearly all')
    parser.add_argument('--channels-last', action='store_true', help='maps in PyTorch lie as (B, H, W, C)')
    parser.add_argument('--rounds', type=int, default=50, metavar='N', help='measurements of each row (default: 50)')
    threads_option(parser)
    device_option(parser, 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/benchmark'), metavar='DIR',
                        help='folder for table.md and plot.png (default: output/benchmark)')


def check_benchmark(args: argparse.Namespace) -> None:
    """Refuse what is not installed, and fill in the runtimes."""
    on_cpu = args.device == 'cpu'
    args.runtimes = list(dict.fromkeys(args.runtimes or (['eager', 'onnx'] if on_cpu else ['eager'])))
    lacks = [missing('demo', 'matplotlib', 'textalloc')]
    if 'onnx' in args.runtimes:
        lacks.append(missing('export', 'onnx', 'onnxruntime'))
        if not on_cpu:
            raise InputError(f'ONNX Runtime is measured on the CPU, not on {args.device}; leave onnx out of --runtimes')
    if any(lacks):
        raise InputError(f'benchmark {"; ".join(filter(None, lacks))}')


# weights

def authors_options(group: Any) -> None:
    group.add_argument('--all', type=Path, metavar='FOLDER', nargs='?', const=True,
                       help="every variant: the authors' files, or those in a folder")
    group.add_argument('--download-dir', type=Path, metavar='DIR',
                       help="folder that keeps the authors' files; those in it are not fetched again (default: in the "
                            'cache of huggingface_hub)')


def weights(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Fetch the authors' weights from the links in their README (Google Drive), once, and write a folder that timm loads:

  timm-mobileformer weights mobileformer_294m

A file is read as data only, every tensor must fit and be finite, and the model must answer; then the folder gets
config.json and model.safetensors, and its name is printed as --model and create_model take it."""
    parser.add_argument('model', nargs='?', metavar='NAME', choices=AUTHORS_FILES, help=some(AUTHORS_FILES, 7))
    authors_options(parser)
    parser.add_argument('--checkpoint', metavar='FILE', type=Path,
                        help='the file, downloaded by hand; nothing is fetched')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='folder to write; with --all, to write a folder a variant in (default: in the cache of '
                             'huggingface_hub)')
    parser.set_defaults(pretrained=None, use_ema=None, img_size=None, tag=None)  # of `publish`


def check_weights(args: argparse.Namespace) -> None:
    if bool(args.all) == bool(args.model) or args.all and args.checkpoint:
        raise InputError('give NAME, NAME --checkpoint FILE, --all, or --all FOLDER')
    if args.checkpoint and not args.output:
        raise InputError("--checkpoint needs --output DIR: the cache is for what was fetched from the authors' links")
    if args.download_dir and (args.checkpoint or isinstance(args.all, Path)):
        raise InputError('nothing is fetched for --checkpoint FILE or --all FOLDER; leave out --download-dir')


# publish

def publish(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Publish weights of a Mobile-Former on the Hugging Face Hub, where pretrained=True finds them:

  timm-mobileformer publish --all --namespace ORG
  timm-mobileformer publish --model mobileformer_294m --checkpoint FILE

A checkpoint, fetched from the authors' links where none is named, is read as data only and checked: every tensor fits
and is finite, the model answers, and, with --validate, it is as accurate as the paper says. Only then timm's own files
for the Hub (config.json, model.safetensors, README.md) go up in one commit, are downloaded into an empty cache, and
must give the same answer to the bit. Running it again sends what is missing, or nothing."""
    group = parser.add_argument_group('what')
    model_options(group)
    authors_options(group)
    group = parser.add_argument_group('where')
    where = group.add_mutually_exclusive_group()
    where.add_argument('--namespace', metavar='ORG',
                       help='organisation or user (default: where pretrained=True looks)')
    where.add_argument('--repo-id', metavar='ORG/NAME', help='another repository than ORG/MODEL.TAG')
    group.add_argument('--tag', help=f"which weights these are (default: {AUTHORS_TAG}, the authors', or what the "
                                     'folder of finetune says)')
    group.add_argument('--private', action='store_true', help='make a new repository private')
    how = group.add_mutually_exclusive_group()
    how.add_argument('--revision', metavar='R', help='branch to commit to, made if absent (default: main)')
    how.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    group.add_argument('--dry-run', type=Path, metavar='DIR', help='write the files to a folder and send nothing')
    group.add_argument('--token', help='of the Hub; better log in with `hf auth login` or set HF_TOKEN, for others on '
                                       'this machine can see your command line')
    group = parser.add_argument_group('check')
    group.add_argument('--validate', type=Path, metavar='DIR',
                       help="folder of ImageNet's validation images in class folders; refuse weights worse than the "
                            'paper says')
    group.add_argument('--force', action='store_true', help='publish even so')
    group.add_argument('--validate-only', action='store_true',
                       help='publish nothing: print top-1 and top-5 beside the paper\'s; --model may be published, too')
    batch_size_option(group, 64, 64)
    workers_option(group)
    device_option(group)


def check_publish(args: argparse.Namespace) -> None:
    if bool(args.all) == bool(args.model) or args.all and (args.checkpoint or args.pretrained):
        raise InputError('give --model NAME, --model NAME --checkpoint FILE, --model FOLDER, --all, or --all FOLDER')
    if args.all and args.repo_id:
        raise InputError('--repo-id names one repository, --all needs --namespace')
    if args.validate_only and not args.validate:
        raise InputError("--validate-only needs the folder of ImageNet's validation images: --validate DIR")


# models and recipe

def models(parser: argparse.ArgumentParser) -> None:
    parser.description = 'List the Mobile-Formers, their size and cost, the paper\'s accuracy, and where weights are.'


def recipe(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the path of a recipe for timm's train.py; without a name, the names:\n\n"
        '  python train.py --config "$(timm-mobileformer recipe finetune)" --model mobileformer_52m --data-dir DIR …')
    parser.add_argument('name', nargs='?', metavar='NAME')


class Subcommand(NamedTuple):
    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None] = lambda args: None


SUBCOMMANDS = {
    'models': Subcommand('list the models', models),
    'finetune': Subcommand('train on a folder of images', finetune, check_finetune),
    'predict': Subcommand('classify pictures', predict, check_predict),
    'tokens': Subcommand('draw what the tokens attend to', tokens, check_tokens),
    'export': Subcommand('write files for devices', export, check_export),
    'benchmark': Subcommand('measure models beside each other', benchmark, check_benchmark),
    'weights': Subcommand("fetch the authors' weights", weights, check_weights),
    'publish': Subcommand('put weights on the Hugging Face Hub', publish, check_publish),
    'recipe': Subcommand("print the path of a recipe for timm's train.py", recipe),
}


def option(key: str) -> str:
    return f'--{key.replace("_", "-")}'


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; {self.prog} --help says what there is')


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line, those of the process by default.

    Raises:
        InputError: It is wrong, as far as that can be said without PyTorch.
    """
    parser = Parser(prog='timm-mobileformer', description='Mobile-Former for timm, from pictures to devices.')
    subparsers = parser.add_subparsers(dest='subcommand', required=True, metavar='SUBCOMMAND')
    for name, subcommand in SUBCOMMANDS.items():
        one = subparsers.add_parser(
            name, help=subcommand.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        subcommand.declare(one)
    args = parser.parse_args(argv)
    if args.subcommand != 'recipe' and versions.is_older(found := version('timm'), versions.COMMANDS):
        raise InputError(f'{args.subcommand} needs timm {versions.COMMANDS} or later, not {found}: '
                         f"pip install 'timm>={versions.COMMANDS}'")
    if getattr(args, 'use_ema', None) and not (args.checkpoint or isinstance(getattr(args, 'all', None), Path)):
        raise InputError('--use-ema is for a file with averaged weights, --checkpoint FILE')
    for key, (least, most) in RANGES.items():
        value = getattr(args, key, None)
        if value is not None and not least <= value <= most:
            limits = f'at least {least}' if most == math.inf else f'from {least} to {most}'
            raise InputError(f'{option(key)} must be {limits}, not {value}')
    for key in FILES + FOLDERS:
        path = getattr(args, key, None)
        if isinstance(path, Path) and (not path.exists() or path.is_dir() != (key in FOLDERS)):
            raise InputError(f'{option(key)}: no such {"folder" if key in FOLDERS else "file"}: {path}')
    SUBCOMMANDS[args.subcommand].check(args)
    return args
