"""Options of `timm-mobileformer predict`."""
import argparse
from pathlib import Path

from .options import (
    at_least,
    batch_size_option,
    check_exist,
    check_onnx,
    check_output,
    class_map_option,
    device_option,
    model_options,
    workers_option,
)

HELP = 'classify images'
WORK = 'prediction'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Classify images, and write a CSV table with the columns path, label, probability and problem. The problem is\n'
        'the error of an image that cannot be read; other images have none.')
    parser.add_argument('images', metavar='PATH', type=Path, nargs='+',
                        help='image, or folder to search recursively')
    model_options(parser, required=True, note=', or an ONNX file written by export')
    class_map_option(parser)
    parser.add_argument('--topk', type=at_least(1), default=1, metavar='K',
                        help='number of classes per image, as columns label, probability, label2, probability2, … '
                             '(default: 1)')
    parser.add_argument('--output', type=Path, metavar='FILE', help='file for the table (default: standard output)')
    batch_size_option(parser)
    workers_option(parser)
    device_option(parser)


def resolve_options(args: argparse.Namespace) -> None:
    check_exist(args.images)
    if args.output:
        check_output(args.output, args.images)
    check_onnx(args)
