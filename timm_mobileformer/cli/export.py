"""Options of `timm-mobileformer export`."""
import argparse
import os
import shutil
from pathlib import Path
from typing import Dict, Tuple

from .console import InputError, missing
from .options import (
    DATA_OPTIONS,
    at_least,
    check_alone,
    check_exist,
    check_label_pattern,
    class_map_option,
    data_options,
    existing_folder,
    model_options,
    threads_option,
    workers_option,
)

HELP = 'export a model to ONNX, OpenVINO, ExecuTorch, AOTInductor or a web page'
WORK = 'exporting'
RAW = 'onnx', 'onnx-int8', 'web'  # formats with preprocessing
FORMATS: Dict[str, Tuple[str, ...]] = {  # format: extra of this package, required modules...
    'onnx': ('export', 'onnx', 'onnxscript', 'onnxruntime'),
    'onnx-int8': ('export', 'onnx', 'onnxscript', 'onnxruntime'),
    'web': ('export', 'onnx', 'onnxscript', 'onnxruntime'),
    'openvino': ('openvino', 'openvino'),
    'executorch': ('executorch', 'executorch'),
    'executorch-int8': ('executorch', 'executorch', 'torchao'),
    'aoti': ('',),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Export a model and verify the files against PyTorch: on the validation set of its training, if it\n'
        'still exists, else on the images of --data-dir or --images, else on noise. Preprocessing and class names are\n'
        'written to a JSON file next to each file, and to the metadata of ONNX files.')
    parser.add_argument('formats', nargs='+', choices=[*FORMATS, 'all'], metavar='FORMAT',
                        help=f'{", ".join(FORMATS)}, or all, for every format whose packages are installed; web is a '
                             'web page and is exported to its own folder')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='output folder (default: output/export, or output/web for web)')
    threads_option(parser)
    workers_option(parser)

    group = parser.add_argument_group('model')
    model_options(group, 'output/finetune', note=' (default: output/finetune)')
    class_map_option(group)

    group = parser.add_argument_group('data for verification and int8 calibration')
    data_options(group, 'the training data of a finetuned model, if it still exists')
    group.add_argument('--images', metavar='PATH', type=Path, nargs='+',
                       help='unlabelled images, or folders of images, to use instead')

    group = parser.add_argument_group('onnx and onnx-int8')
    group.add_argument('--raw', action='store_true',
                       help='include the preprocessing in ONNX files: their input is one decoded RGB image of any '
                            'size, uint8 (height, width, 3), their output probabilities')
    group.add_argument('--opset', type=at_least(18), metavar='N',
                       help='ONNX opset version, 18 or later (default: that of the PyTorch exporter)')

    group = parser.add_argument_group('onnx-int8 and executorch-int8')
    group.add_argument('--max-drop', type=float, metavar='P',
                       help='allowed loss of top-1 accuracy in int8, in percentage points, in addition to one '
                            'standard error (default: 1)')

    group = parser.add_argument_group('web')
    group.add_argument('--runtime', type=existing_folder, metavar='DIR',
                       help='npm package onnxruntime-web, to copy into the web page (default: the page loads it from '
                            'a CDN)')


def resolve_options(args: argparse.Namespace) -> None:
    """Keep the formats whose packages are installed, and list the reasons for the others in `left_out`."""
    check_exist(args.images)
    check_alone(args, 'images', 'data_dir', 'skip_bad_images', *DATA_OPTIONS)
    check_label_pattern(args)
    if args.opset and not {'onnx', 'onnx-int8', 'all'}.intersection(args.formats):
        raise InputError('--opset applies to onnx and onnx-int8 only')
    if args.max_drop is None:
        args.max_drop = 1.
    elif not {'onnx-int8', 'executorch-int8', 'all'}.intersection(args.formats):
        raise InputError('--max-drop applies to onnx-int8 and executorch-int8 only')
    every = 'all' in args.formats
    names = [name for name in FORMATS if name != 'web'] if every else list(dict.fromkeys(args.formats))
    is_web = names == ['web']
    if 'web' in args.formats and not is_web:
        raise InputError('web is exported to its own folder; export it separately')
    if args.runtime and not is_web:
        raise InputError('--runtime applies to web only')
    args.output = args.output or Path('output/web' if is_web else 'output/export')
    args.raw = args.raw or is_web
    lacks = {name: f'{name} {lack}' for name in names if (lack := missing(*FORMATS[name]))}
    if 'aoti' in names and not shutil.which(os.environ.get('CXX', 'g++')):
        lacks['aoti'] = 'aoti needs a C++ compiler: install g++, or set the environment variable CXX'
    if args.raw:
        lacks.update({name: f'{name} does not support --raw, only onnx and onnx-int8 do'
                      for name in names if name not in RAW})
    args.formats, args.left_out = [name for name in names if name not in lacks], list(lacks.values())
    if lacks and (not every or not args.formats):
        raise InputError('; '.join(args.left_out))
