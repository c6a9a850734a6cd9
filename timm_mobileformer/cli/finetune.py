"""Options of `timm-mobileformer finetune`."""
import argparse
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict

from .console import InputError
from .options import (
    at_least,
    batch_size_option,
    check_label_pattern,
    data_options,
    device_option,
    existing_folder,
    fraction,
    model_options,
    option,
    threads_option,
    workers_option,
)

HELP = 'fine-tune a model on a folder of images'
WORK = 'training'

FOLDER: Dict[str, Any] = dict(
    val_split=0.2, scale=(0.35, 1.), hflip=0.5, workers=2, model='mobileformer_52m', pretrained=False, epochs=30,
    lr=1e-3, weight_decay=0.05, smoothing=0.1, seed=42, balanced=False, amp=False,
    output=Path('output/finetune'))
DIGITS = {**FOLDER, **dict(img_size=64, epochs=16, scale=(0.7, 1.), hflip=0.)}  # without a folder
RESUMED = {'subcommand', 'resume', 'data_dir', 'labels', 'epochs', 'device', 'threads', 'workers'}  # beside --resume

EPILOG = """\
For several GPUs, mixup, other optimizers and schedules, use timm's train.py with the recipe of this package. It is part
of timm's source:

  git clone --depth 1 --branch v{timm} https://github.com/huggingface/pytorch-image-models
  python pytorch-image-models/train.py --config "$(timm-mobileformer recipe finetune)" \\
      --model mobileformer_52m --pretrained --num-classes N --data-dir DIR
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add options whose default is None, so that --resume can tell which were given."""
    parser.description = (
        'Fine-tune a Mobile-Former, or any timm model, on a folder of images; without one, on the handwritten digits\n'
        "of scikit-learn. Options have the names of those of timm's train.py.")
    parser.epilog = EPILOG.format(timm=version('timm'))
    group = parser.add_argument_group('data')
    data_options(group, 'the digits')
    group.add_argument('--scale', type=fraction(), nargs=2, metavar='PCT',
                       help='range of the area of random crops in training (default: 0.35 1.0; digits: 0.7 1.0)')
    group.add_argument('--hflip', type=fraction(), metavar='P',
                       help='probability of a horizontal flip in training (default: 0.5; digits: 0)')
    group.add_argument('--aa', metavar='NAME', help='AutoAugment policy, such as rand-m9-mstd0.5 (default: none)')
    group.add_argument('--crop-pct', type=fraction(0.1), metavar='PCT',
                       help="fraction of the side that evaluation crops keep (default: the model's)")
    group.add_argument('--crop-mode', choices=['center', 'border', 'squash'],
                       help="evaluation crops: from the center; of the image padded to a square; of the image squashed "
                            "to a square (default: the model's)")
    group.add_argument('--balanced', action='store_true', default=None, help='sample all classes equally often')

    group = parser.add_argument_group('model')
    model_options(group, note=' (default: mobileformer_52m)', size_note='; digits: 64')
    group.add_argument('--drop', type=fraction(most=0.99), metavar='P', help='dropout before the classifier')
    group.add_argument('--drop-path', type=fraction(most=0.99), metavar='P', help='stochastic depth')

    group = parser.add_argument_group('training')
    group.add_argument('--epochs', type=at_least(1), metavar='N', help='number of epochs (default: 30; digits: 16)')
    group.add_argument('--patience', type=at_least(1), metavar='N', help='stop after N epochs without improvement')
    batch_size_option(group, None, '64; 32 for fewer than 1,280 images')
    group.add_argument('--epoch-repeats', type=at_least(1), metavar='N',
                       help='passes over the images in an epoch (default: as many as make 20 batches)')
    group.add_argument('--lr', type=fraction(most=math.inf),
                       help='peak learning rate of AdamW (default: 1e-3)')
    group.add_argument('--weight-decay', type=fraction(most=math.inf), metavar='W', help='default: 0.05')
    group.add_argument('--layer-decay', type=fraction(), metavar='R',
                       help='ratio of the learning rates of successive layers')
    group.add_argument('--smoothing', type=fraction(most=0.99), metavar='P', help='label smoothing (default: 0.1)')
    group.add_argument('--seed', type=at_least(0, 2 ** 32 - 1), metavar='N', help='random seed (default: 42)')

    group = parser.add_argument_group('output and resources')
    group.add_argument('--output', type=Path, metavar='DIR',
                       help='new folder, complete after every epoch (default: output/finetune)')
    group.add_argument('--resume', type=existing_folder, metavar='DIR',
                       help='continue the run in this folder with its options; --data-dir, --labels, --device, '
                            '--threads and --workers may be changed, --epochs may be raised')
    device_option(group)
    group.add_argument('--amp', action='store_true', default=None, help='use mixed precision (bfloat16)')
    workers_option(group, None)
    threads_option(group, None, 'one per core, minus --workers')


def resolve_options(args: argparse.Namespace) -> None:
    """Check the options, and fill in the defaults of a new run."""
    if int(os.environ.get('WORLD_SIZE') or 1) > 1:
        raise InputError('finetune trains in one process; for torchrun there is train.py of timm with --config '
                         '"$(timm-mobileformer recipe finetune)", see finetune --help')
    named = {key for key, value in vars(args).items() if value is not None}
    if args.resume and named - RESUMED:
        others = ', '.join(sorted(map(option, named - RESUMED)))
        raise InputError(f'--resume continues with the options of the run; {others} cannot be changed')
    check_label_pattern(args)
    if args.batch_size == 1:
        raise InputError('--batch-size must be at least 2 in training, not 1')
    if args.scale and not 0 < args.scale[0] <= args.scale[1] <= 1:
        raise InputError(f'--scale takes two fractions, the smaller first, such as 0.35 1, not {args.scale}')
    if not args.resume:
        defaults = FOLDER if args.data_dir or args.labels else DIGITS
        vars(args).update({key: value for key, value in defaults.items() if key not in named})
