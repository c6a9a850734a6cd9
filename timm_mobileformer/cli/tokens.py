"""Options of `timm-mobileformer tokens`."""
import argparse
from pathlib import Path

from .console import InputError, abbreviate, missing, quote
from .options import check_exist, check_output, class_map_option, model_options

SUFFIXES = '.pdf', '.png', '.svg', '.jpg', '.jpeg', '.tif', '.tiff', '.webp'  # supported by matplotlib
HELP = 'draw the attention maps of the tokens'
WORK = 'attention_figure'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Draw the attention maps of the tokens of a Mobile-Former over images, for every block and both directions,\n'
        'and print the five most likely classes.')
    parser.add_argument('images', metavar='IMAGE', type=Path, nargs='+')
    model_options(parser, required=True)
    class_map_option(parser)
    parser.add_argument('--output', type=Path, default=Path('tokens.png'), metavar='FILE',
                        help='output file; for several images, numbers and image names are appended (default: '
                             'tokens.png)')
    parser.add_argument('--npz', action='store_true',
                        help='also write the attention maps of every block as arrays, to an .npz file')


def resolve_options(args: argparse.Namespace) -> None:
    """Turn `output` into a list with one file per image.

    Raises:
        InputError: An image does not exist or an output cannot be written.
    """
    if lack := missing('demo', 'matplotlib'):
        raise InputError(f'tokens {lack}')
    out = args.output
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f'--output {quote(out)} must end in one of {abbreviate(SUFFIXES, len(SUFFIXES))}')
    args.output = [out]
    if len(args.images) > 1:  # tokens-1-CAT.png, tokens-2-DOG.png
        digits = len(str(len(args.images)))
        args.output = [out.with_stem(f'{out.stem}-{i:0{digits}}-{p.stem}') for i, p in enumerate(args.images, 1)]
    for path in args.images:
        if path.is_dir():
            raise InputError(f'{path} is a folder; pass the images in it: {quote(path)}/*')
    check_exist(args.images)
    for path in args.output:
        check_output(path, args.images)
