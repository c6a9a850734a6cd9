"""Get weights, the authors' own by default, check them, and write folders that timm loads."""
import argparse
import io
import json
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

import timm
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from timm.models._hub import save_for_hf
from torchvision.datasets.utils import download_file_from_google_drive

from timm_mobileformer import checkpoint_filter_fn
from timm_mobileformer.authors import AUTHORS_FILES, AUTHORS_TAG, PAPER_TOP1
from timm_mobileformer.checkpoint import CheckpointMismatchError

from .console import InputError, abbreviate, missing, progress, quote, reason
from .files import atomic_dir, sha256
from .load import load_mobileformer, read_checkpoint

__all__ = ['CACHE', 'Candidate', 'check', 'fetch', 'find_variants', 'read_record', 'run', 'save', 'verify']

CACHE = Path(constants.HF_ASSETS_CACHE) / 'timm_mobileformer'
SUFFIXES = '.safetensors', '.pth', '.pt', '.tar', '.bin'


class Candidate(NamedTuple):
    """A model with weights that were checked, and what it answers."""
    model: Any
    source: str  # what --model or --checkpoint names
    file: Optional[Path]  # that holds them, if they are on this machine
    x: torch.Tensor
    answer: torch.Tensor


# The authors' files

def read_record(file: Path) -> Dict[str, Any]:
    """What was written down about a file when it was fetched: url, size, sha256; nothing about others."""
    record = Path(f'{file}.json')
    try:
        found = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as e:
        raise InputError(f'{record} is damaged; delete it, and {quote(file)} with it, to fetch both again') from e
    return found


def download(variant: str, file: Path) -> None:
    """Ask Google Drive for the authors' file.

    Raises:
        InputError: It does not give one.
    """
    if lack := missing('publish', 'gdown'):
        raise InputError(lack)
    from gdown.exceptions import FileURLRetrievalError

    print(f'{variant}: asking Google Drive')
    try:
        with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # gdown's bar is for terminals
            download_file_from_google_drive(AUTHORS_FILES[variant], file.parent, file.name)
    except Exception as e:  # gdown, requests and urllib3 fail in ways of their own
        if getattr(e, 'errno', None):
            raise  # the disk's
        said = e.__context__ if isinstance(e, FileURLRetrievalError) else None  # by Drive's page
        raise InputError(f'Google Drive did not give it ({reason(said or e, 300)})') from e


def examine(file: Path, variant: str) -> None:
    """Refuse a file that does not hold weights of a variant."""
    with file.open('rb') as content:
        if content.read(100).lstrip().startswith(b'<'):
            raise InputError('a web page, not the file')
    try:
        checkpoint_filter_fn(read_checkpoint(file)[0], timm.create_model(variant, device='meta'))
    except CheckpointMismatchError as e:
        raise InputError(reason(e)) from e


def fetch(variant: str, folder: Path) -> Path:
    """The authors' checkpoint of a variant in a folder that keeps it, fetched if it is not there yet.

    Raises:
        InputError: It cannot be had, is no checkpoint of the variant, or another one than before; nothing is kept then.
    """
    url = f'https://drive.google.com/file/d/{AUTHORS_FILES[variant]}/view'
    file = folder / f'mobile-former-{variant.split("_")[1]}.pth.tar'
    is_new = not file.exists()
    with atomic_dir(folder) as temporary:
        here = temporary / file.name if is_new else file
        try:
            if is_new:
                download(variant, here)
            examine(here, variant)
        except InputError as e:
            raise InputError(f'{variant if is_new else file}: {reason(e).removeprefix(f"{here}: ")}; open {url} in a '
                             f'browser, save the file as {quote(file)} and run this again, or name it with --checkpoint'
                             ) from e
        except OSError as e:
            raise InputError(f'{folder} cannot be used ({e.strerror or e}); free some space, or name another '
                             '--download-dir') from e
        found = {'url': url, 'size': here.stat().st_size, 'sha256': sha256(here)}
        known = read_record(file)
        if known and known['sha256'] != found['sha256']:
            raise InputError(f'{file}: SHA-256 {found["sha256"]}, but {known["sha256"]} when it was fetched first: '
                             + ('Google Drive has another file now' if is_new else 'the file was changed, delete it to '
                                'fetch it again') + f'; to take it all the same, delete {quote(file)}.json')
        if not known:
            (temporary / f'{file.name}.json').write_text(json.dumps(found, indent=1))
    if is_new:
        print(f'{file}: fetched, {found["size"]:,} bytes, SHA-256 {found["sha256"]}')
    return file


# What publishing needs, too

def find_variants(folder: Path, use_ema: bool) -> Dict[str, Path]:
    """The checkpoint of each variant in a folder, told apart by their tensors, whatever their names."""
    found: Dict[str, Path] = {}
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    models = {variant: timm.create_model(variant, device='meta') for variant in PAPER_TOP1}
    for path in progress(files, 'Looking for checkpoints', unit='file'):
        tensors, _ = read_checkpoint(path, use_ema)
        for variant, model in models.items():
            try:
                checkpoint_filter_fn(tensors, model)
            except RuntimeError:
                continue
            if variant in found:
                raise InputError(f'{found[variant]} and {path} are both of {variant}: leave one in the folder')
            found[variant] = path
            break
        else:
            raise InputError(f'{path}: fits no Mobile-Former; take it out of the folder')
    if not found:
        raise InputError(f'{folder}: holds no checkpoint ({", ".join(SUFFIXES)})')
    return found


def check(args: argparse.Namespace) -> Candidate:
    """Load a model and refuse weights that nobody can use."""
    model = load_mobileformer(args).eval()
    published = f'hf-hub:{model.pretrained_cfg["hf_hub_id"]}' if args.pretrained else args.model
    source, file = str(args.checkpoint or published), args.checkpoint
    if (weights := Path(args.model.removeprefix('local-dir:'), 'model.safetensors')).is_file() and not file:
        file = weights
    broken = [k for k, v in model.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise InputError(f'{source}: NaN or infinity in {abbreviate(broken)}')
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answer = model(x)
    if not answer.isfinite().all():
        raise InputError(f'{source}: the model answers NaN or infinity')
    variant = model.pretrained_cfg['architecture']
    print(f'{source}: fits {variant}, {sum(p.numel() for p in model.parameters()):,} parameters, all finite')
    return Candidate(model, source, file, x, answer)


def save(candidate: Candidate, folder: Path, card: str = '') -> None:
    """Write config.json and model.safetensors, by timm's own code, and a model card."""
    try:
        save_for_hf(candidate.model, str(folder), safe_serialization=True)
        if card:
            (folder / 'README.md').write_text(card, encoding='utf-8')
    except (OSError, SafetensorError) as e:
        raise InputError(f'{folder}: cannot be written ({reason(e)}); free some space, or set TMPDIR') from e


def verify(name: str, candidate: Candidate) -> None:
    """Load what was published with timm, by way of an empty cache, and ask it the same."""
    with tempfile.TemporaryDirectory() as cache:
        model = timm.create_model(name, pretrained=True, cache_dir=cache).eval()
    with torch.inference_mode():
        answer = model(candidate.x)
    if not torch.equal(answer, candidate.answer):
        raise InputError(f'{name} gives other answers than {candidate.source}')


# The subcommand

def is_written(folder: Path, variant: str) -> bool:
    """Weights of a variant are in a folder already.

    Raises:
        InputError: Others are.
    """
    if not (folder / 'config.json').exists():
        return False
    try:
        config = json.loads((folder / 'config.json').read_text())
        holds = f'{config.get("architecture")}.{config.get("pretrained_cfg", {}).get("tag")}'
    except (ValueError, AttributeError):
        holds = "a config.json that is none of timm's"
    if holds != f'{variant}.{AUTHORS_TAG}':
        raise InputError(f'{folder} holds {holds}, not {variant}.{AUTHORS_TAG}; name another --output')
    return (folder / 'model.safetensors').exists()


def write(args: argparse.Namespace, folder: Path) -> None:
    """Write the folder of a variant, unless it is there."""
    if not is_written(folder, args.model) or args.checkpoint:
        args.checkpoint = args.checkpoint or fetch(args.model, args.download_dir or CACHE / 'downloads')
        candidate = check(args)
        if candidate.model.num_classes != 1000:
            raise InputError(f"{args.checkpoint} tells {candidate.model.num_classes} classes apart, the authors' 1000; "
                             'weights of your own can be used as they are, by --model and --checkpoint')
        with atomic_dir(folder) as temporary:
            save(candidate, temporary)
        verify(f'local-dir:{folder}', candidate)
    print(f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True) loads {args.model}; "
          f'timm-mobileformer takes it as --model {quote(folder)}')


def run(args: argparse.Namespace) -> None:
    files: Dict[str, Optional[Path]] = {args.model: args.checkpoint}
    if args.all:
        files = dict.fromkeys(AUTHORS_FILES) if args.all is True else {**find_variants(args.all, args.use_ema)}
    for variant, file in files.items():
        folder = args.output or CACHE
        if args.all or not args.output:
            folder /= f'{variant}.{AUTHORS_TAG}'
        write(argparse.Namespace(**{**vars(args), 'model': variant, 'checkpoint': file}), folder)
