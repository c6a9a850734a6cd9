"""What every subcommand can be told, and what is wrong with it as far as that can be said without PyTorch."""
import argparse
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, NoReturn, Optional, Sequence, Tuple

from .terminal import InputError

FOLDER: Dict[str, Any] = dict(
    val_split=0.2, scale=(0.35, 1.), hflip=0.5, workers=2, model='mobileformer_52m', pretrained=False, epochs=30,
    batch_size=64, lr=1e-3, weight_decay=0.05, smoothing=0.1, seed=42, balanced=False, amp=False,
    output=Path('output/finetune'))
DIGITS = {**FOLDER, **dict(img_size=64, epochs=12, lr=2e-3, scale=(0.7, 1.), hflip=0.)}  # without a folder
RESUMED = {'subcommand', 'resume', 'data_dir', 'labels', 'device', 'threads', 'workers'}  # may be named with --resume
RANGES: Dict[str, Tuple[float, float]] = dict(
    img_size=(32, math.inf), epochs=(1, math.inf), batch_size=(2, math.inf), workers=(0, math.inf),
    threads=(1, math.inf), patience=(1, math.inf), seed=(0, math.inf), lr=(0, math.inf), weight_decay=(0, math.inf),
    val_split=(0.01, 0.99), smoothing=(0, 0.99), hflip=(0, 1), drop=(0, 0.99), drop_path=(0, 0.99), layer_decay=(0, 1))

FINETUNE_EPILOG = """\
For everything else (several GPUs, mixup, other optimizers and schedules), timm's own train.py takes the models, and a
recipe that comes with them. It is in timm's source:

  git clone --depth 1 --branch v{timm} https://github.com/huggingface/pytorch-image-models
  python pytorch-image-models/train.py --config "$(timm-mobileformer recipe finetune)" \\
      --model mobileformer_52m --pretrained --num-classes N --data-dir DIR
"""


def finetune(parser: argparse.ArgumentParser) -> None:
    """Options are None where they are not named: --resume has to know."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        'Fine-tune a Mobile-Former, or any timm model, on a folder of images; without one, on the handwritten digits\n'
        'of scikit-learn. Options are called what they are called in train.py of timm.')
    parser.epilog = FINETUNE_EPILOG.format(timm=version('timm'))
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', metavar='DIR', type=Path,
                       help='folder with train/CLASS/… and val/CLASS/… (or validation, valid, eval, test), or with '
                            'train/CLASS/… or CLASS/… alone (default: the digits)')
    group.add_argument('--labels', metavar='CSV', type=Path,
                       help='table of files in DIR and their labels, instead of class folders')
    group.add_argument('--val-split', metavar='P', type=float,
                       help='part of every class to hold out where no folder is for that (default: 0.2)')
    group.add_argument('--img-size', metavar='N', type=int, help="default: the model's; digits: 64")
    group.add_argument('--scale', type=float, nargs=2, metavar='PCT',
                       help='area of the random crops in training (default: 0.35 1.0; digits: 0.7 1.0)')
    group.add_argument('--hflip', type=float, metavar='P',
                       help='probability of a horizontal flip in training (default: 0.5; digits: 0)')
    group.add_argument('--aa', metavar='NAME', help='AutoAugment policy, such as rand-m9-mstd0.5 (default: none)')
    group.add_argument('--balanced', action='store_true', default=None, help='train on all classes equally often')

    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='NAME',
                       help='name in timm, folder that finetune wrote, or hf-hub:… (default: mobileformer_52m)')
    group.add_argument('--pretrained', action='store_true', default=None,
                       help='start from the published weights of the model')
    group.add_argument('--checkpoint', metavar='FILE', type=Path,
                       help="start from the weights in a file, such as the authors'")
    group.add_argument('--drop', type=float, metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=float, metavar='P', help='stochastic depth')

    group = parser.add_argument_group('training')
    group.add_argument('--epochs', type=int, metavar='N', help='default: 30; digits: 12')
    group.add_argument('--patience', type=int, metavar='N', help='end after N epochs without a better one')
    group.add_argument('-b', '--batch-size', type=int, metavar='N', help='default: 64')
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
    group.add_argument('--device', help='default: the accelerator that PyTorch finds, else the CPU')
    group.add_argument('--amp', action='store_true', default=None, help='autocast to bfloat16')
    group.add_argument('-j', '--workers', type=int, metavar='N', help='processes that read images (default: 2)')
    group.add_argument('--threads', type=int, metavar='N', help="default: one a core, less --workers")


def check_finetune(args: argparse.Namespace) -> None:
    """Refuse what cannot be, and fill in the defaults of a new run."""
    if int(os.environ.get('WORLD_SIZE') or 1) > 1:
        raise InputError('finetune trains in one process; for torchrun there is train.py of timm with --config '
                         '"$(timm-mobileformer recipe finetune)", see finetune --help')
    named = {key for key, value in vars(args).items() if value is not None}
    if args.resume and named - RESUMED:
        others = ', '.join(sorted(map(option, named - RESUMED)))
        raise InputError(f'--resume goes on with the options of the run, and cannot change {others}')
    for key, (least, most) in RANGES.items():
        value = getattr(args, key)
        if value is not None and not least <= value <= most:
            limits = f'at least {least}' if most == math.inf else f'from {least} to {most}'
            raise InputError(f'{option(key)} must be {limits}, not {value}')
    if args.scale and not 0 < args.scale[0] <= args.scale[1] <= 1:
        raise InputError(f'--scale takes two parts of the area, the smaller first, such as 0.35 1, not {args.scale}')
    if not args.resume:
        defaults = FOLDER if args.data_dir or args.labels else DIGITS
        vars(args).update({key: value for key, value in defaults.items() if key not in named})


def option(key: str) -> str:
    return f'--{key.replace("_", "-")}'


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; {self.prog} --help says what there is')


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(prog='timm-mobileformer')
    subparsers = parser.add_subparsers(dest='subcommand', required=True, metavar='SUBCOMMAND')
    one = subparsers.add_parser('finetune', help='train on a folder of images')
    finetune(one)
    args = parser.parse_args(argv)
    check_finetune(args)
    return args
