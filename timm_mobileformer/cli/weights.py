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
Download the authors' weights from Google Drive to the cache, for offline use with pretrained=True and --pretrained, or
write them to a folder for local-dir: and --model:

  timm-mobileformer weights --all
  timm-mobileformer weights mobileformer_294m --output FOLDER"""
    parser.add_argument('model', nargs='?', metavar='NAME', choices=AUTHORS_FILES, help=abbreviate(AUTHORS_FILES, 7))
    parser.add_argument('--all', action='store_true', help='download all variants')
    parser.add_argument('--checkpoint', metavar='FILE', type=existing_file,
                        help='manually downloaded file; replaces the cached weights')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='folder to write config.json and model.safetensors to; with --all, one subfolder for each '
                             'variant')


def resolve_options(args: argparse.Namespace) -> None:
    if args.all == bool(args.model) or args.all and args.checkpoint:
        raise InputError('use NAME, NAME --checkpoint FILE, or --all')
