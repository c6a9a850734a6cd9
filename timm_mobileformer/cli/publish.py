"""Options of `timm-mobileformer publish`."""
import argparse
from pathlib import Path

from timm_mobileformer.authors import AUTHORS_TAG

from .console import InputError
from .options import batch_size_option, check_alone, device_option, existing_folder, model_options, workers_option

HELP = 'publish weights on the Hugging Face Hub'
WORK = 'publishing'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Publish weights of a Mobile-Former on the Hugging Face Hub, where pretrained=True finds them:

  timm-mobileformer publish --all --namespace ORG
  timm-mobileformer publish --model mobileformer_294m --checkpoint FILE

A checkpoint, by default the authors', is loaded as data only and checked: every tensor fits and is finite, the output
of the model is finite, and, with --validate, its accuracy is that of the paper. Then config.json, model.safetensors and
README.md are uploaded in one commit, downloaded into an empty cache, and must give the same output bit for bit. Running
the command again uploads what is missing, or nothing."""
    group = parser.add_argument_group('what')
    model_options(group)
    group.add_argument('--all', type=existing_folder, metavar='FOLDER', nargs='?', const=True,
                       help="every variant: the authors' weights, or the checkpoints in a folder")
    group = parser.add_argument_group('where')
    where = group.add_mutually_exclusive_group()
    where.add_argument('--namespace', metavar='ORG',
                       help='organization or user (default: the namespace used by pretrained=True)')
    where.add_argument('--repo-id', metavar='ORG/NAME', help='repository (default: ORG/MODEL.TAG)')
    group.add_argument('--tag', help=f"which weights these are (default: {AUTHORS_TAG}, the authors', or the tag "
                                     'in the folder of finetune)')
    group.add_argument('--private', action='store_true', help='create a private repository')
    how = group.add_mutually_exclusive_group()
    how.add_argument('--revision', metavar='R', help='branch to commit to, created if necessary (default: main)')
    how.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    group.add_argument('--dry-run', type=Path, metavar='DIR', help='write the files to a folder without uploading them')
    group.add_argument('--token', help='Hub token; prefer `hf auth login` or HF_TOKEN, since other users of this '
                                       'machine can see command lines')
    group = parser.add_argument_group('check')
    group.add_argument('--validate', type=existing_folder, metavar='DIR',
                       help="folder of ImageNet's validation images in class folders; refuse weights with a lower "
                            'accuracy than in the paper')
    group.add_argument('--force', action='store_true', help='publish even if the accuracy is lower than in the paper')
    group.add_argument('--validate-only', action='store_true',
                       help='only print top-1 and top-5 next to the figures of the paper; also for published models')
    batch_size_option(group)
    workers_option(group)
    device_option(group)


def resolve_options(args: argparse.Namespace) -> None:
    if bool(args.all) == bool(args.model) or args.all and (args.checkpoint or args.pretrained):
        raise InputError('use --model NAME, --model NAME --checkpoint FILE, --model FOLDER, --all, or --all FOLDER')
    if args.all and args.repo_id:
        raise InputError('--repo-id is a single repository; use --namespace with --all')
    if args.validate_only and not args.validate:
        raise InputError('--validate-only needs a folder of ImageNet validation images: --validate DIR')
    if args.force and not args.validate:
        raise InputError('--force applies to --validate DIR only')
    check_alone(args, 'validate_only', 'namespace', 'repo_id', 'private', 'revision', 'create_pr', 'dry_run', 'force')
