"""Options of `timm-mobileformer weights`."""
import argparse
from pathlib import Path

from timm_mobileformer.authors import AUTHORS_FILES

from .console import InputError, abbreviate
from .options import existing_file

HELP = "download the authors' weights ahead of time"
WORK = 'prefetching'

def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Download the authors' weights from Google Drive into the cache, where pretrained=True and --pretrained find them without
a network, or write them to a folder that timm loads:

  timm-mobileformer weights --all
  timm-mobileformer weights mobileformer_294m --output FOLDER"""
    parser.add_argument('model', nargs='?', metavar='NAME', choices=AUTHORS_FILES, help=abbreviate(AUTHORS_FILES, 7))
    parser.add_argument('--all', action='store_true', help='every variant')
    parser.add_argument('--checkpoint', metavar='FILE', type=existing_file,
                        help="the authors' file, downloaded by hand; replaces what is in the cache")
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='folder to write config.json and model.safetensors to; with --all, a folder with one for '
                             'each variant')


def resolve_options(args: argparse.Namespace) -> None:
    if args.all == bool(args.model) or args.all and args.checkpoint:
        raise InputError('give NAME, NAME --checkpoint FILE, or --all')
