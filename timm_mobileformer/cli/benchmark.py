"""Options of `timm-mobileformer benchmark`."""
import argparse
from pathlib import Path

from .console import InputError, missing
from .options import at_least, batch_size_option, device_option, img_size_option, threads_option

HELP = 'compare the latency, memory and size of models'
WORK = 'benchmarking'
RUNTIMES = {'eager': 'PyTorch eager', 'compile': 'torch.compile', 'onnx': 'ONNX Runtime'}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Compare latency, training memory, parameters and multiply-adds of Mobile-Formers and other timm models in a table and a
plot.

Every model is measured as trained and, if timm.utils.reparameterize_model changes it, fused. The measurements are
interleaved in random order, so that other load on the machine affects all models alike. Weights are random; accuracies
are quoted."""
    parser.add_argument('-m', '--model', nargs='+', metavar='NAME',
                        help='model names of timm, folders written by finetune, or hf-hub:… (default: the '
                             'Mobile-Formers and ten other models)')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, metavar='RUNTIME',
                        help=f'one or more of {", ".join(RUNTIMES)} (default: eager and onnx on a CPU, else eager); '
                             'compiling takes up to a minute per row')
    batch_size_option(parser, 1)
    img_size_option(parser, 'that of the published accuracy, which is 224 for most models')
    parser.add_argument('--channels-last', action='store_true', help='use the channels-last memory format in PyTorch')
    parser.add_argument('--rounds', type=at_least(2), default=50, metavar='N',
                        help='number of measurements per row (default: 50)')
    threads_option(parser)
    device_option(parser, 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/benchmark'), metavar='DIR',
                        help='folder for table.md and plot.png (default: output/benchmark)')


def resolve_options(args: argparse.Namespace) -> None:
    """Fill in the default runtimes, and check that the packages they need are installed."""
    on_cpu = args.device == 'cpu'
    args.runtimes = list(dict.fromkeys(args.runtimes or (['eager', 'onnx'] if on_cpu else ['eager'])))
    lacks = [missing('demo', 'matplotlib', 'textalloc')]
    if 'onnx' in args.runtimes:
        lacks.append(missing('export', 'onnx', 'onnxruntime'))
        if not on_cpu:
            raise InputError(f'ONNX Runtime is measured on the CPU, not on {args.device}; remove onnx from --runtimes')
    if args.channels_last and args.runtimes == ['onnx']:
        raise InputError('--channels-last applies to PyTorch only; add eager or compile to --runtimes')
    if any(lacks):
        raise InputError(f'benchmark {"; ".join(filter(None, lacks))}')
