"""Options of `timm-mobileformer evaluate`."""
import argparse
from pathlib import Path

from .options import (
    batch_size_option,
    check_label_pattern,
    check_onnx,
    class_map_option,
    device_option,
    folder_options,
    model_options,
    workers_option,
)

HELP = 'evaluate a model on labelled images'
WORK = 'evaluation'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Evaluate a model on labelled images: top-1 and top-5 accuracy, mean accuracy over classes, precision and recall of each
class, loss, calibration error, confusion matrix and mistakes.

The images are the test set of a folder with splits, or its validation set if there is no test set; the validation set
of the training, if a finetuned model was trained on the folder without splits; or else all images in the folder.
Classes are matched by name."""
    folder_options(
        parser, 'folder with CLASS/…, or with test/CLASS/… or val/CLASS/… (default: the data of a finetuned model)')
    model_options(parser, required=True, note=', or an ONNX file written by export')
    class_map_option(parser)
    parser.add_argument('--output', type=Path, default=Path('output/evaluate'), metavar='DIR',
                        help='folder for the tables and figures (default: output/evaluate)')
    batch_size_option(parser)
    workers_option(parser)
    device_option(parser)


def resolve_options(args: argparse.Namespace) -> None:
    check_onnx(args)
    check_label_pattern(args)
