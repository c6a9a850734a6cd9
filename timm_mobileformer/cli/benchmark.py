"""Options of `timm-mobileformer benchmark`."""
import argparse
from pathlib import Path

from .console import InputError, missing
from .options import at_least, batch_size_option, device_option, img_size_option, threads_option

HELP = 'measure models beside each other'
WORK = 'benchmarking'
RUNTIMES = {'eager': 'PyTorch eager', 'compile': 'torch.compile', 'onnx': 'ONNX Runtime'}

def add_options(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument('--rounds', type=at_least(2), default=50, metavar='N',
                        help='measurements of each row (default: 50)')
    threads_option(parser)
    device_option(parser, 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/benchmark'), metavar='DIR',
                        help='folder for table.md and plot.png (default: output/benchmark)')


def resolve_options(args: argparse.Namespace) -> None:
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
