"""Options of `timm-mobileformer export`."""
import argparse
import os
import shutil
from pathlib import Path
from typing import Dict, Tuple

from .console import InputError, missing
from .options import (
    at_least,
    check_exist,
    check_label_pattern,
    class_map_option,
    data_options,
    existing_folder,
    model_options,
    threads_option,
    workers_option,
)

HELP = 'write files for devices'
WORK = 'exporting'
RAW = 'onnx', 'onnx-int8', 'web'  # that take images of any size
FORMATS: Dict[str, Tuple[str, ...]] = {  # the extra of this package and the modules that each needs
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
        'Export a model for devices: as trained, a folder of finetune, a checkpoint, published weights. Every file is\n'
        'checked against PyTorch, on the pictures held out in training where these are known, else on those of\n'
        '--data-dir or --images, else on noise. Beside it, and inside of ONNX, stands how to use it.')
    parser.add_argument('formats', nargs='+', choices=[*FORMATS, 'all'], metavar='FORMAT',
                        help=f'{", ".join(FORMATS)}, or all that can be written on this machine; web is a page for '
                             'browsers, in a folder of its own')
    model_options(parser, 'output/finetune', note=' (default: output/finetune)')
    class_map_option(parser)
    parser.add_argument('--raw', action='store_true',
                        help='write ONNX files that preprocess: they take one decoded image, (height, width, 3) in '
                             'uint8, RGB, of any size, and return probabilities')
    data_options(parser, "that of a finetuned model's training, if it is still there")
    parser.add_argument('--images', metavar='PATH', type=Path, nargs='+',
                        help='pictures without labels, or folders of them, instead')
    parser.add_argument('--runtime', type=existing_folder, metavar='DIR',
                        help='npm package onnxruntime-web, to be copied into the page of web (default: the page loads '
                             'it from a CDN)')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='folder for the files (default: output/export, or output/web for web)')
    parser.add_argument('--opset', type=at_least(18), metavar='N',
                        help='opset of ONNX files, from 18 to the newest of the installed exporter (default: that of '
                             'PyTorch)')
    parser.add_argument('--max-drop', type=float, default=1., metavar='P',
                        help='points of top-1 that int8 may lose, besides a standard error (default: 1)')
    threads_option(parser)
    workers_option(parser)


def resolve_options(args: argparse.Namespace) -> None:
    """Make `formats` those that can be written here; `left_out` says what the others lack."""
    check_exist(args.images)
    check_label_pattern(args)
    if args.images and (args.data_dir or args.labels):
        raise InputError('--images are pictures without labels, --data-dir and --labels have some; name one of both')
    if args.opset and not {'onnx', 'onnx-int8', 'all'}.intersection(args.formats):
        raise InputError('--opset is for onnx and onnx-int8, which are not among the formats')
    every = 'all' in args.formats
    names = [name for name in FORMATS if name != 'web'] if every else list(dict.fromkeys(args.formats))
    is_web = names == ['web']
    if 'web' in args.formats and not is_web:
        raise InputError('web is a folder of its own; export it by itself')
    if args.runtime and not is_web:
        raise InputError('--runtime is for web only')
    args.output = args.output or Path('output/web' if is_web else 'output/export')
    args.raw = args.raw or is_web
    lacks = {name: f'{name} {lack}' for name in names if (lack := missing(*FORMATS[name]))}
    if 'aoti' in names and not shutil.which(os.environ.get('CXX', 'g++')):
        lacks['aoti'] = 'aoti needs a C++ compiler: install g++, or name one in the environment variable CXX'
    if args.raw:
        lacks.update({name: f'{name} cannot be exported with --raw, only onnx and onnx-int8 can'
                      for name in names if name not in RAW})
    args.formats, args.left_out = [name for name in names if name not in lacks], list(lacks.values())
    if lacks and (not every or not args.formats):
        raise InputError('; '.join(args.left_out))
