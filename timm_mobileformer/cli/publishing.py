"""Publish weights of a Mobile-Former on the Hugging Face Hub."""
import argparse
import os
import tempfile
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
from .console import InputError, abbreviate, progress, reason
from .data import ImageScan
from .evaluation import score_images
from .files import atomic_dir, sha256
from .load import load_mobileformer, pick_device, read_checkpoint
from .model_card import model_card
from .prefetching import fetch
from .report import measure

__all__ = ['run']

SUFFIXES = '.safetensors', '.pth', '.pt', '.tar', '.bin'
TOLERANCE = 0.3  # points of top-1 that weights may miss of the paper's figure


class Candidate(NamedTuple):
    """A model with weights that were checked, and what it answers."""
    model: Any
    source: str  # what --model or --checkpoint names
    file: Optional[Path]  # that holds them, if they are on this machine
    x: torch.Tensor
    answer: torch.Tensor


class Accuracy(NamedTuple):
    """Of a model on ImageNet's validation images, in percent."""
    top1: float
    top5: float
    images: int
    paper: float  # top-1; it gives no top-5

    @property
    def falls_short(self) -> bool:
        return self.top1 < self.paper - TOLERANCE


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


def every_model(args: argparse.Namespace) -> List[argparse.Namespace]:
    """The options of each model that is named; those of the authors are fetched where no other weights are named."""
    if args.all:
        files = {v: fetch(v) for v in AUTHORS_FILES} if args.all is True else find_variants(args.all, args.use_ema)
    elif args.model in AUTHORS_FILES and not (args.checkpoint or args.pretrained) and args.tag in (None, AUTHORS_TAG):
        files = {args.model: fetch(args.model)}
    else:
        return [args]
    return [argparse.Namespace(**{**vars(args), 'model': variant, 'checkpoint': file})
            for variant, file in files.items()]


def name_repository(cfg: Dict[str, Any], args: argparse.Namespace) -> str:
    """ORG/NAME to publish as; notes in the config whose weights these are."""
    cfg['tag'] = args.tag or cfg.get('tag')
    if not cfg['tag']:
        raise InputError(f'{args.model}: say with --tag which weights these are')
    if cfg['tag'] != AUTHORS_TAG:
        cfg['origin_url'] = None
    namespace = args.namespace or hub_repository(next(iter(AUTHORS_FILES))).split('/')[0]
    repo_id = args.repo_id or f'{namespace}/{cfg["architecture"]}.{cfg["tag"]}'
    try:
        validate_repo_id(repo_id)
    except ValueError as e:
        raise InputError(reason(e)) from e
    if repo_id.count('/') != 1:
        raise InputError(f'{repo_id!r} is no ORG/NAME')
    return repo_id


def validate(candidate: Candidate, args: argparse.Namespace) -> Accuracy:
    """Measure a model on a folder of ImageNet's validation images."""
    model, variant = candidate.model, candidate.model.pretrained_cfg['architecture']
    names = ImageNetInfo('imagenet-1k').label_names()
    index = {name: i for i, name in enumerate(names)}
    if model.num_classes != len(index) or variant not in PAPER_TOP1:
        raise InputError(f'{variant} of {model.num_classes} classes is not in the paper: leave out --validate')
    samples = [(path, index[name]) for path, name in ImageScan().classes(args.validate) if name in index]
    if not samples:
        raise InputError(f'{args.validate}: no images in class folders named as ImageNet names them (n01440764, …)')
    scores, _, unread = score_images(as_classifier(model, names, pick_device(args), args), samples, args)
    model.cpu()
    if unread:
        raise InputError(f'{len(unread):,} of {len(samples):,} images cannot be used: '
                         + abbreviate(f'{path} ({why})' for path, _, why in unread))
    metrics = measure(scores)
    found = Accuracy(metrics['top1'], metrics['top5'], len(samples), PAPER_TOP1[variant])
    print(f'{variant}: top-1 {found.top1:.2f} on {found.images:,} images, {found.paper} in the paper; '
          f'top-5 {found.top5:.2f}')
    return found


def validate_only(args: argparse.Namespace) -> int:
    """Print a table that can be pasted into an issue; the status is 1 if a model falls short of the paper."""
    measured = [(c, validate(c, args)) for c in map(check, every_model(args))]
    print('\n| model | top-1 | in the paper | top-5 | images | weights |\n|---|---|---|---|---|---|')
    for candidate, found in measured:
        print(f'| {candidate.model.pretrained_cfg["architecture"]} | {found.top1:.2f} | {found.paper} | '
              f'{found.top5:.2f} | {found.images:,} | {origin(candidate)} |')
    print(f'\ntimm_mobileformer {version("timm_mobileformer")}, timm {timm.__version__}, torch {torch.__version__}, '
          f'{pick_device(args)}')
    return int(any(found.falls_short for _, found in measured))


def prepare(args: argparse.Namespace) -> Tuple[Candidate, str]:
    """A model that may be published, and the name of its repository."""
    candidate = check(args)
    cfg, classes = candidate.model.pretrained_cfg, candidate.model.num_classes
    repo_id = name_repository(cfg, args)
    if cfg['tag'] == AUTHORS_TAG and classes != 1000:
        raise InputError(f'{candidate.source}: {classes} classes, but {AUTHORS_TAG} means the 1000 of ImageNet-1k: '
                         'name a --tag')
    if args.validate:
        found = validate(candidate, args)
        if found.falls_short and not args.force:
            raise InputError(f'{cfg["architecture"]}: top-1 {found.top1:.2f} is more than {TOLERANCE} short of the '
                             f'{found.paper} of the paper: wrong weights or images; --force publishes all the same')
    return candidate, repo_id


def origin(candidate: Candidate) -> str:
    """Where weights are from, for others to compare."""
    if not (file := candidate.file):
        return f'`{candidate.source}`'
    if source := read_record(file.parent):
        return f'{source["url"]}, SHA-256 `{source["sha256"]}`, {source["size"]:,} bytes'
    return f'`{file.name}`, SHA-256 `{sha256(file)}`, {file.stat().st_size:,} bytes'


def send(repo_id: str, folder: Path, args: argparse.Namespace) -> Tuple[CommitInfo, bool]:
    """Send the files of a folder in one commit; that commit, or the last one if it holds them already."""
    api = HfApi(token=args.token, library_name='timm', library_version=timm.__version__)
    api.create_repo(repo_id, private=args.private or None, exist_ok=True)
    try:
        head = api.model_info(repo_id, revision=args.revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
        head = api.model_info(repo_id, revision=args.revision)
    if args.private and not head.private:
        raise InputError(f'{repo_id} is public already: make it private on its settings page, or leave out --private')
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
    with tempfile.TemporaryDirectory() as folder:
        save(candidate, Path(folder), model_card(candidate.model, repo_id, origin(candidate)))
        try:
            commit, is_new = send(repo_id, Path(folder), args)
        except InputError:
            raise
        except Exception as e:
            text = reason(e) if isinstance(e, ValueError) else why(e, repo_id.split('/')[0])
            raise InputError(f'{repo_id} is not published: {text} ({constants.ENDPOINT}); run this again') from e
    print(f'{repo_id}: published as {commit.pr_url or commit.commit_url}' if is_new else
          f'{repo_id}: unchanged, the Hub holds these files already')
    try:
        verify(f'hf-hub:{repo_id}@{commit.pr_revision or commit.oid}', candidate)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f'{repo_id} is published as {commit.oid}, but does not load: {why(e)}; '
                         'run this again to check it') from e
    print(f'{repo_id}: downloaded again, same answer to the bit')


def write_dry(candidate: Candidate, repo_id: str, target: Path) -> None:
    """Put the files into a folder instead, complete or not at all."""
    with atomic_dir(target) as folder:
        save(candidate, folder, model_card(candidate.model, repo_id, origin(candidate)))
    verify(f'local-dir:{target}', candidate)
    print(f'{target}: written, nothing sent; loads as local-dir:{target}, same answer to the bit')


def publish(args: argparse.Namespace) -> int:
    if args.validate_only:
        return validate_only(args)
    for candidate, repo_id in list(map(prepare, every_model(args))):  # all of them before the first is sent
        if args.dry_run:
            write_dry(candidate, repo_id, args.dry_run / repo_id.split('/')[1] if args.all else args.dry_run)
        else:
            publish_and_verify(candidate, repo_id, args)
    return 0


def run(args: argparse.Namespace) -> int:
    if args.token:  # timm's loader takes it from there
        os.environ['HF_TOKEN'] = args.token
    try:
        return publish(args)
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt('; run it again to complete') from e
    except InputError as e:
        token = get_token()
        raise InputError(str(e).replace(token, '***') if token else str(e)) from e
