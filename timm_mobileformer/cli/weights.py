"""Options of `timm-mobileformer weights`."""
import argparse
from pathlib import Path
from typing import Any

from timm_mobileformer.authors import AUTHORS_FILES

from .console import InputError, abbreviate
from .options import existing_file, existing_folder

HELP = "fetch the authors' weights"
WORK = 'authors_weights'

def authors_options(group: Any) -> None:
    group.add_argument('--all', type=existing_folder, metavar='FOLDER', nargs='?', const=True,
                       help="every variant: the authors' files, or those in a folder")
    group.add_argument('--download-dir', type=Path, metavar='DIR',
                       help="folder that keeps the authors' files; those in it are not fetched again (default: in the "
                            'cache of huggingface_hub)')


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Fetch the authors' weights from the links in their README (Google Drive), once, and write a folder that timm loads:

  timm-mobileformer weights mobileformer_294m

A file is read as data only, every tensor must fit and be finite, and the model must answer; then the folder gets
config.json and model.safetensors, and its name is printed as --model and create_model take it."""
    parser.add_argument('model', nargs='?', metavar='NAME', choices=AUTHORS_FILES, help=abbreviate(AUTHORS_FILES, 7))
    authors_options(parser)
    parser.add_argument('--checkpoint', metavar='FILE', type=existing_file,
                        help='the file, downloaded by hand; nothing is fetched')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='folder to write; with --all, to write a folder a variant in (default: in the cache of '
                             'huggingface_hub)')
    parser.set_defaults(pretrained=None, use_ema=None, img_size=None, tag=None)  # of `publish`


def resolve_options(args: argparse.Namespace) -> None:
    if bool(args.all) == bool(args.model) or args.all and args.checkpoint:
        raise InputError('give NAME, NAME --checkpoint FILE, --all, or --all FOLDER')
    if args.checkpoint and not args.output:
        raise InputError("--checkpoint needs --output DIR: the cache is for what was fetched from the authors' links")
    if args.download_dir and (args.checkpoint or isinstance(args.all, Path)):
        raise InputError('nothing is fetched for --checkpoint FILE or --all FOLDER; leave out --download-dir')
