"""Publish weights of a Mobile-Former on the Hugging Face Hub."""
import argparse
import os
import tempfile
from contextlib import nullcontext
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models._hub import save_for_hf

from timm_mobileformer.authors import AUTHORS_FILES, AUTHORS_TAG, PAPER_TOP1
from timm_mobileformer.authors_weights import read_record
from timm_mobileformer.checkpoint import checkpoint_filter_fn
from timm_mobileformer.download_errors import why
from timm_mobileformer.pretrained import hub_repository

from .classifier import as_classifier
from .console import InputError, abbreviate, plural, progress, reason
from .evaluation import score_images
from .files import atomic_dir
from .folders import ImageScan
from .load import load_mobileformer, pick_device, read_checkpoint
from .model_card import model_card
from .prefetching import fetch
from .report import measure
from .run_state import claim

__all__ = ['run']

SUFFIXES = '.safetensors', '.pth', '.pt', '.tar', '.bin'
TOLERANCE = 0.3  # allowed shortfall from the top-1 accuracy in the paper, in percentage points


class Candidate(NamedTuple):
    """A model with verified weights, and its output for a random input."""
    model: Any
    source: str  # of --model or --checkpoint
    file: Optional[Path]  # local file of the weights
    x: torch.Tensor
    output: torch.Tensor


class Accuracy(NamedTuple):
    """Accuracy on ImageNet validation images in percent."""
    top1: float
    top5: float
    images: int
    paper: float  # top-1 in the paper

    @property
    def falls_short(self) -> bool:
        return self.top1 < self.paper - TOLERANCE


def find_variants(folder: Path, use_ema: bool) -> Dict[str, Path]:
    """Return the checkpoint of each variant in a folder, identified by its tensors, not by its name."""
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
                raise InputError(f'{found[variant]} and {path} are both checkpoints of {variant}; '
                                 'keep only one of them in the folder')
            found[variant] = path
            break
        else:
            raise InputError(f'{path} does not fit any Mobile-Former; remove it from the folder')
    if not found:
        raise InputError(f'{folder} contains no checkpoint ({", ".join(SUFFIXES)})')
    return found


def check(args: argparse.Namespace) -> Candidate:
    """Load a model and verify its weights.

    Raises:
        InputError: The weights do not fit, or contain or produce NaN or infinity.
    """
    model = load_mobileformer(args).eval()
    source, file = str(args.checkpoint or args.model), args.checkpoint
    if (weights := Path(args.model.removeprefix('local-dir:'), 'model.safetensors')).is_file() and not file:
        file = weights
    if args.pretrained:
        source, cached = f'hf-hub:{model.pretrained_cfg["hf_hub_id"]}', model.pretrained_cfg.get('file')
        if cached and read_record(Path(cached).parent):
            source, file = "the authors' file", Path(cached)
    broken = [k for k, v in model.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise InputError(f'{source}: NaN or infinity in {abbreviate(broken)}')
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(x)
    if not output.isfinite().all():
        raise InputError(f'{source}: the model outputs NaN or infinity')
    variant = model.pretrained_cfg['architecture']
    print(f'{source}: fits {variant}, {sum(p.numel() for p in model.parameters()):,} parameters, all finite')
    return Candidate(model, source, file, x, output)


def save(candidate: Candidate, folder: Path, repo_id: str) -> None:
    """Write config.json and model.safetensors with timm, and a model card."""
    card = model_card(candidate.model, repo_id, origin(candidate))
    try:
        save_for_hf(candidate.model, str(folder), safe_serialization=True)
        (folder / 'README.md').write_text(card, encoding='utf-8')
    except (OSError, SafetensorError) as e:
        raise InputError(f'{folder}: cannot be written ({reason(e)}); free some space, or set TMPDIR') from e


def verify(name: str, candidate: Candidate) -> None:
    """Load a published model with timm into an empty cache and compare its output."""
    with tempfile.TemporaryDirectory() as cache:
        model = timm.create_model(name, pretrained=True, cache_dir=cache).eval()
    with torch.inference_mode():
        output = model(candidate.x)
    if not torch.equal(output, candidate.output):
        raise InputError(f'the outputs of {name} differ from those of {candidate.source}')


def every_model(args: argparse.Namespace) -> List[argparse.Namespace]:
    """Return the options for each model; the authors' weights are downloaded if no other weights are given."""
    if args.all:
        files = {v: fetch(v) for v in AUTHORS_FILES} if args.all is True else find_variants(args.all, args.use_ema)
    elif args.model in AUTHORS_FILES and not (args.checkpoint or args.pretrained) and args.tag in (None, AUTHORS_TAG):
        files = {args.model: fetch(args.model)}
    else:
        return [args]
    return [argparse.Namespace(**{**vars(args), 'model': variant, 'checkpoint': file})
            for variant, file in files.items()]


def name_repository(cfg: Dict[str, Any], args: argparse.Namespace) -> str:
    """Return the repository ORG/NAME, and set the tag in the config."""
    cfg['tag'] = args.tag or cfg.get('tag')
    if not cfg['tag']:
        raise InputError(f'{args.model}: --tag is required to identify the weights')
    if cfg['tag'] != AUTHORS_TAG:
        cfg['origin_url'] = None
    namespace = args.namespace or hub_repository(next(iter(AUTHORS_FILES))).split('/')[0]
    repo_id = args.repo_id or f'{namespace}/{cfg["architecture"]}.{cfg["tag"]}'
    try:
        validate_repo_id(repo_id)
    except ValueError as e:
        raise InputError(reason(e)) from e
    if repo_id.count('/') != 1:
        raise InputError(f'{repo_id!r} does not have the form ORG/NAME')
    return repo_id


def validate(candidate: Candidate, args: argparse.Namespace) -> Accuracy:
    """Evaluate a model on a folder of ImageNet validation images."""
    model, variant = candidate.model, candidate.model.pretrained_cfg['architecture']
    names = ImageNetInfo('imagenet-1k').label_names()
    index = {name: i for i, name in enumerate(names)}
    if model.num_classes != len(index) or variant not in PAPER_TOP1:
        raise InputError(f'{variant} with {plural(model.num_classes, "class")} is not in the paper; omit --validate')
    samples = [(path, index[name]) for path, name in ImageScan().classes(args.validate) if name in index]
    if not samples:
        raise InputError(f'{args.validate}: no images in class folders with ImageNet names (n01440764, …)')
    scores, _, unread = score_images(as_classifier(model, names, pick_device(args), args), samples, args)
    model.cpu()
    if unread:
        raise InputError(f'{len(unread):,} of {plural(len(samples), "image")} cannot be read: '
                         + abbreviate(f'{path} ({why})' for path, _, why in unread))
    metrics = measure(scores)
    found = Accuracy(metrics['top1'], metrics['top5'], len(samples), PAPER_TOP1[variant])
    print(f'{variant}: top-1 {found.top1:.2f} on {plural(found.images, "image")}, {found.paper} in the paper; '
          f'top-5 {found.top5:.2f}')
    return found


def validate_only(args: argparse.Namespace) -> int:
    """Print a table of the accuracies and return the exit status, 1 if a model is worse than in the paper."""
    measured = [(c, validate(c, args)) for c in map(check, every_model(args))]
    print('\n| model | top-1 | in the paper | top-5 | images | weights |\n|---|---|---|---|---|---|')
    for candidate, found in measured:
        print(f'| {candidate.model.pretrained_cfg["architecture"]} | {found.top1:.2f} | {found.paper} | '
              f'{found.top5:.2f} | {found.images:,} | {origin(candidate)} |')
    print(f'\ntimm_mobileformer {version("timm_mobileformer")}, timm {timm.__version__}, torch {torch.__version__}, '
          f'{pick_device(args)}')
    return int(any(found.falls_short for _, found in measured))


def prepare(args: argparse.Namespace) -> Tuple[Candidate, str]:
    """Return a model that is ready for publishing, and the name of its repository."""
    candidate = check(args)
    cfg, classes = candidate.model.pretrained_cfg, candidate.model.num_classes
    repo_id = name_repository(cfg, args)
    if cfg['tag'] == AUTHORS_TAG and classes != 1000:
        raise InputError(f'{candidate.source}: {plural(classes, "class")}, but the tag {AUTHORS_TAG} is for the 1000 '
                         'classes of ImageNet-1k; use another --tag')
    if args.validate:
        found = validate(candidate, args)
        if found.falls_short and not args.force:
            raise InputError(f'{cfg["architecture"]}: top-1 {found.top1:.2f} is more than {TOLERANCE} points below '
                             f'{found.paper} in the paper; check the weights and images, or use --force')
    return candidate, repo_id


def origin(candidate: Candidate) -> str:
    """Return the origin of the weights, with the checksum of their file."""
    if not (file := candidate.file):
        return f'`{candidate.source}`'
    if source := read_record(file.parent):
        return f'{source["url"]}, SHA-256 `{source["sha256"]}`, {source["size"]:,} bytes'
    return f'`{file.name}`, SHA-256 `{sha256(file.read_bytes()).hexdigest()}`, {file.stat().st_size:,} bytes'


def send(repo_id: str, folder: Path, args: argparse.Namespace) -> Tuple[CommitInfo, bool]:
    """Upload the files of a folder in one commit; return the latest commit and whether it is new."""
    api = HfApi(token=args.token, library_name='timm', library_version=timm.__version__)
    api.create_repo(repo_id, private=args.private or None, exist_ok=True)
    try:
        head = api.model_info(repo_id, revision=args.revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
        head = api.model_info(repo_id, revision=args.revision)
    if args.private and not head.private:
        raise InputError(f'{repo_id} is public already; make it private on its settings page, or omit --private')
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())],
        commit_message='Publish the weights',
        revision=args.revision,
        create_pr=args.create_pr,
        parent_commit=head.sha,
    )
    return commit, commit.oid != head.sha


def publish_and_verify(candidate: Candidate, repo_id: str, args: argparse.Namespace) -> None:
    """Upload a model, download it again and compare its output."""
    with tempfile.TemporaryDirectory() as folder:
        save(candidate, Path(folder), repo_id)
        try:
            commit, is_new = send(repo_id, Path(folder), args)
        except InputError:
            raise
        except Exception as e:
            text = reason(e) if isinstance(e, ValueError) else why(e, repo_id.split('/')[0])
            raise InputError(f'{repo_id} was not published: {text} ({constants.ENDPOINT}); run this again') from e
    print(f'{repo_id}: published as {commit.pr_url or commit.commit_url}' if is_new else
          f'{repo_id}: unchanged, the Hub has these files already')
    try:
        verify(f'hf-hub:{repo_id}@{commit.pr_revision or commit.oid}', candidate)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f'{repo_id} was published as {commit.oid}, but cannot be loaded: {why(e)}; '
                         'run this again to verify it') from e
    print(f'{repo_id}: verified after download, outputs are bit-identical')


def write_dry(candidate: Candidate, repo_id: str, target: Path) -> None:
    """Write the files to a folder atomically instead of uploading them."""
    with atomic_dir(target) as folder:
        save(candidate, folder, repo_id)
    verify(f'local-dir:{target}', candidate)
    print(f'{target}: written, nothing uploaded; loads as local-dir:{target}, outputs are bit-identical')


def publish(args: argparse.Namespace) -> int:
    if args.validate_only:
        return validate_only(args)
    with claim(args.dry_run) if args.dry_run else nullcontext():
        for candidate, repo_id in list(map(prepare, every_model(args))):  # check all before the first upload
            if args.dry_run:
                write_dry(candidate, repo_id, args.dry_run / repo_id.split('/')[1] if args.all else args.dry_run)
            else:
                publish_and_verify(candidate, repo_id, args)
    return 0


def run(args: argparse.Namespace) -> int:
    if args.token:  # read by timm's loader
        os.environ['HF_TOKEN'] = args.token
    try:
        return publish(args)
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt('; run it again to complete') from e
    except InputError as e:
        token = get_token()
        raise InputError(str(e).replace(token, '***') if token else str(e)) from e
