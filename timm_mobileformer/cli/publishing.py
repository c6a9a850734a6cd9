"""Publish weights of a Mobile-Former on the Hugging Face Hub."""
import argparse
import errno
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.data import ImageNetInfo
from timm.models._hub import generate_readme

from timm_mobileformer.authors import AUTHORS_FILES, AUTHORS_TAG, PAPER_TOP1
from timm_mobileformer.pretrained import why

from .authors_weights import CACHE, Candidate, check, fetch, find_variants, read_record, save, verify
from .classifier import as_classifier
from .console import InputError, abbreviate, reason
from .data import ImageScan
from .evaluation import score_images
from .files import atomic_dir, sha256
from .load import pick_device
from .report import measure

__all__ = ['run']

TOLERANCE = 0.3  # points of top-1 that weights may miss of the paper's figure


class Accuracy(NamedTuple):
    """Of a model on ImageNet's validation images, in percent."""
    top1: float
    top5: float
    images: int
    paper: float  # top-1; it gives no top-5

    @property
    def falls_short(self) -> bool:
        return self.top1 < self.paper - TOLERANCE


def every_model(args: argparse.Namespace) -> List[argparse.Namespace]:
    """The options of each model that is named; those of the authors are fetched where no other weights are named."""
    folder = args.download_dir or CACHE / 'downloads'
    if args.all:
        files = {v: fetch(v, folder) for v in AUTHORS_FILES} if args.all is True else find_variants(
            args.all, args.use_ema)
    elif args.model in AUTHORS_FILES and not (args.checkpoint or args.pretrained) and args.tag in (None, AUTHORS_TAG):
        files = {args.model: fetch(args.model, folder)}
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
    published: Any = timm.models.get_pretrained_cfg_value(f'{next(iter(PAPER_TOP1))}.{AUTHORS_TAG}', 'hf_hub_id')
    repo_id = args.repo_id or f'{args.namespace or published.split("/")[0]}/{cfg["architecture"]}.{cfg["tag"]}'
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
    fetched, digest = read_record(file), sha256(file)
    link = f', from {fetched["url"]}' if fetched.get('sha256') == digest else ''
    return f'`{file.name}`, SHA-256 `{digest}`, {file.stat().st_size:,} bytes{link}'


def model_card(candidate: Candidate, repo_id: str) -> str:
    model = candidate.model
    cfg = model.pretrained_cfg
    variant, paper = cfg['architecture'], 'https://arxiv.org/abs/2108.05895'
    is_authors = cfg['tag'] == AUTHORS_TAG
    what = f'{variant} is a Mobile-Former: a MobileNet and a transformer of a few global tokens side by side, joined ' \
        'by a two-way bridge in every block. '
    if is_authors:
        what += 'These are the weights that the authors of the paper trained on ImageNet-1k and published, renamed ' \
            'for timm. The authors state no licence for them.'
    else:
        what += f'These weights (tag `{cfg["tag"]}`) are not those of the authors of the paper.'
    size = sum(p.numel() for p in model.parameters()) / 1e6
    height, width = cfg['input_size'][1:]
    details: Dict[str, Any] = {
        'Model Type': 'Image classification / feature backbone',
        'Model Stats': {'Params (M)': f'{size:.1f}', 'Image size': f'{height} x {width}', 'Classes': model.num_classes},
        'Papers': [f'{cfg["paper_name"]}: {paper}'],
    }
    if is_authors:
        details['Dataset'] = 'ImageNet-1k'
        details['Original'] = cfg['origin_url']
    details['Source'] = origin(candidate)
    return generate_readme({
        'tags': ['image-classification', 'timm', 'mobile-former', f'arxiv:{paper.rsplit("/")[-1]}'],
        'license': cfg['license'],
        'description': what,
        'details': details,
        'usage': USAGE.format(repo_id=repo_id),
        'comparison': COMPARISON,
        'citation': CITATION,
    }, repo_id.split('/')[1])


USAGE = '''
`import timm_mobileformer` registers the model with timm.

### Image classification
```python
from PIL import Image
import timm
import timm_mobileformer
import torch

image = Image.open('image.jpg').convert('RGB')

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

logits = model(transform(image).unsqueeze(0))  # (1, classes)
probabilities, classes = logits.softmax(dim=1).topk(5)
```

### Feature maps
```python
from PIL import Image
import timm
import timm_mobileformer

image = Image.open('image.jpg').convert('RGB')

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, features_only=True).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

for x in model(transform(image).unsqueeze(0)):  # one map each at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size
    print(x.shape)
```

### Image embeddings
```python
from PIL import Image
import timm
import timm_mobileformer

image = Image.open('image.jpg').convert('RGB')

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, num_classes=0).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

embedding = model(transform(image).unsqueeze(0))  # (1, head_hidden_size)
features = model.forward_features(transform(image).unsqueeze(0))  # (1, num_features, 7, 7) at 224 x 224
```
'''
COMPARISON = '''
As the paper reports them; FLOPs count multiply-adds, top-1 is that of ImageNet-1k in percent.

|model|params (M)|FLOPs (M)|top-1|
|---|---|---|---|
''' + ''.join(
    f'|{variant}|{params}|{variant.split("_")[1][:-1]}|{PAPER_TOP1[variant]}|\n'
    for variant, params in zip(PAPER_TOP1, (3.2, 3.5, 4.6, 7.6, 9.4, 11.4, 14.0), strict=True))
CITATION = '''@inproceedings{chen2022mobileformer,
  author={Chen, Yinpeng and Dai, Xiyang and Chen, Dongdong and Liu, Mengchen and Dong, Xiaoyi and Yuan, Lu and
          Liu, Zicheng},
  title={Mobile-Former: Bridging MobileNet and Transformer},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages={5270--5279},
  year={2022}
}'''


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
        save(candidate, Path(folder), model_card(candidate, repo_id))
        try:
            commit, is_new = send(repo_id, Path(folder), args)
        except InputError:
            raise
        except Exception as e:
            raise InputError(f'{repo_id} is not published: {advice(e, repo_id)}') from e
    print(f'{repo_id}: published as {commit.pr_url or commit.commit_url}' if is_new else
          f'{repo_id}: unchanged, the Hub holds these files already')
    try:
        verify(f'hf-hub:{repo_id}@{commit.pr_revision or commit.oid}', candidate)
    except InputError:
        raise
    except Exception as e:
        cause = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ else e  # of the model's own error
        raise InputError(f'{repo_id} is published as {commit.oid}, but does not load: {why(cause)}; '
                      'run this again to check it') from e
    print(f'{repo_id}: downloaded again, same answer to the bit')


def write_dry(candidate: Candidate, repo_id: str, target: Path) -> None:
    """Put the files into a folder instead, complete or not at all."""
    with atomic_dir(target) as folder:
        save(candidate, folder, model_card(candidate, repo_id))
    verify(f'local-dir:{target}', candidate)
    print(f'{target}: written, nothing sent; loads as local-dir:{target}, same answer to the bit')


def advice(error: BaseException, repo_id: str) -> str:
    """What went wrong while publishing and what to do, in one line."""
    namespace = repo_id.split('/')[0]
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set, unset it'
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f'{reason(cause)}; free some space and run this again'
        if (response := getattr(cause, 'response', None)) is not None:
            status = response.status_code
            if status == 401:
                return 'the Hub knows no such token (401); log in with `hf auth login` or set HF_TOKEN'
            if status == 403:
                return f'the token may not write there (403); ask {namespace} for it, or name your own --namespace'
            if status == 404:
                return f'not found (404); is there a namespace {namespace}, and may the token write to it?'
            if status in (409, 412):
                return f'somebody else changed it meanwhile ({status}); look at it, and run this again'
            if status >= 500:
                return f'the Hub is in trouble ({status}); run this again later'
            return f'the Hub refuses ({status}): {reason(cause)}'
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ValueError):
        return reason(error)
    return f'the connection to {constants.ENDPOINT} failed ({type(error).__name__}: {reason(error)}); run this again'


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
