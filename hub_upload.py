#!/usr/bin/env python3
"""Publish weights of a Mobile-Former on the Hugging Face Hub, where `pretrained=True` finds them.

    python hub_upload.py mobileformer_294m --checkpoint FILE
    python hub_upload.py --all FOLDER --namespace ORG

A checkpoint, the authors' or one of ours, is read as data only and checked: every tensor fits and is finite, the model
answers, and, with --validate, it is as accurate as the paper says. Only then timm's own files for the Hub (config.json,
model.safetensors, README.md) go up in one commit, are downloaded into an empty cache, and must give the same answer to
the bit. Running it again sends what is missing, or nothing.
"""
import argparse
import errno
import hashlib
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageDataset, ImageNetInfo, create_loader, resolve_data_config
from timm.models._hub import generate_readme, save_for_hf
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from timm_mobileformer import checkpoint_filter_fn
from timm_mobileformer.pretrained import PAPER_TOP1, why

AUTHORS_TAG = 'ms_in1k'
TOLERANCE = 0.3  # points of top-1 that weights may miss of the paper's figure
SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin')


class Refused(Exception):
    """What is wrong and what to do about it, in one line."""


class Candidate(NamedTuple):
    """Weights ready to be published."""
    model: Any
    repo_id: str
    checkpoint: Path
    x: torch.Tensor
    answer: torch.Tensor


def read_checkpoint(path: Path, use_ema: bool) -> Dict[str, Any]:
    """The tensors of a checkpoint by name; nothing in the file is executed."""
    if not path.is_file():
        raise Refused(f'{path}: no such file')
    checkpoint: Any
    try:
        if path.suffix == '.safetensors':
            checkpoint = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py keeps its arguments
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        raise Refused(f'{path}: refused, it is no checkpoint or would run code when it is read') from e
    except Exception as e:  # whatever a reader says to bytes from somewhere
        raise Refused(f'{path}: cannot be read, it is damaged or no checkpoint ({_line(e)})') from e
    wrapped = ('state_dict_ema', 'model_ema') if use_ema else ('state_dict', 'model')
    tensors = checkpoint if isinstance(checkpoint, dict) else {}
    keys = [key for key in wrapped if isinstance(tensors.get(key), dict)]
    if use_ema and not keys:
        raise Refused(f'{path}: holds no EMA weights, leave out --use-ema')
    if keys:
        tensors = tensors[keys[0]]
    if not tensors or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise Refused(f'{path}: no checkpoint, it holds no tensors by name')
    return tensors


def load_model(variant: str, tensors: Dict[str, Any], tag: str) -> Any:
    """A model that holds exactly these tensors.

    Raises:
        RuntimeError: Tensors are missing, surplus or of the wrong shape.
    """
    source = {} if tag == AUTHORS_TAG else {'tag': tag, 'origin_url': None}
    model: Any = timm.create_model(variant, pretrained_cfg_overlay=source)
    tensors = checkpoint_filter_fn(tensors, model)
    if len(tensors['classifier.bias']) != model.num_classes:
        model.reset_classifier(len(tensors['classifier.bias']))
    model.load_state_dict(tensors)
    return model.eval()


def find_variants(folder: Path, use_ema: bool) -> Dict[str, Path]:
    """The checkpoint of each variant in a folder, told apart by their tensors, whatever their names."""
    if not folder.is_dir():
        raise Refused(f'{folder}: no such folder')
    found: Dict[str, Path] = {}
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    models = {variant: timm.create_model(variant, device='meta') for variant in PAPER_TOP1}
    for path in tqdm(files, desc='Looking for checkpoints', unit='file'):
        tensors = read_checkpoint(path, use_ema)
        for variant, model in models.items():
            try:
                checkpoint_filter_fn(tensors, model)
            except RuntimeError:
                continue
            if variant in found:
                raise Refused(f'{found[variant]} and {path} are both of {variant}: leave one in the folder')
            found[variant] = path
            break
        else:
            raise Refused(f'{path}: fits no Mobile-Former; take it out of the folder')
    if not found:
        raise Refused(f'{folder}: holds no checkpoint ({", ".join(SUFFIXES)})')
    return found


def check(variant: str, path: Path, repo_id: str, args: argparse.Namespace) -> Candidate:
    """Load a checkpoint and refuse what should not be published."""
    try:
        model = load_model(variant, read_checkpoint(path, args.use_ema), args.tag)
    except RuntimeError as e:
        raise Refused(f'{path}: no checkpoint of {variant}: {_line(e)}') from e
    num_classes = model.num_classes
    if args.tag == AUTHORS_TAG and num_classes != 1000:
        raise Refused(f'{path}: {num_classes} classes, but {AUTHORS_TAG} means the 1000 of ImageNet-1k: name a --tag')
    broken = [k for k, v in model.state_dict().items() if not v.isfinite().all()]
    if broken:
        raise Refused(f'{path}: NaN or infinity in {", ".join(broken[:5])}')
    x = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        answer = model(x)
    if not answer.isfinite().all():
        raise Refused(f'{path}: the model answers NaN or infinity')
    size = sum(p.numel() for p in model.parameters())
    print(f'{path.name}: fits {variant}, {size:,} parameters, all finite')
    if args.validate:
        validate(variant, model, args)
    return Candidate(model, repo_id, path, x, answer)


@torch.inference_mode()
def validate(variant: str, model: Any, args: argparse.Namespace) -> None:
    """Top-1 on a folder of ImageNet's validation images, compared with the paper's figure."""
    names = ImageNetInfo('imagenet-1k').label_names()
    if model.num_classes != len(names):
        raise Refused(f'{model.num_classes} classes cannot be validated on ImageNet-1k: leave out --validate')
    try:
        dataset = ImageDataset(str(args.validate), class_map={name: i for i, name in enumerate(names)})
    except RuntimeError as e:
        raise Refused(f'{args.validate}: no images in class folders named as ImageNet names them (n01440764, …)') from e
    data = resolve_data_config(model=model)
    loader = create_loader(
        dataset, data['input_size'], batch_size=64, use_prefetcher=False, interpolation=data['interpolation'],
        mean=data['mean'], std=data['std'], crop_pct=data['crop_pct'], num_workers=min(4, os.cpu_count() or 1),
    )
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as e:
        raise Refused(f'--device {args.device}: {_line(e)}') from e
    top1 = AverageMeter()
    for images, target in tqdm(loader, desc=f'Validating {variant}', unit='batch'):
        hits, = accuracy(model(images.to(args.device)), target.to(args.device), topk=(1,))
        top1.update(hits.item(), len(images))
    model.cpu()
    paper = PAPER_TOP1[variant]
    print(f'{variant}: top-1 {top1.avg:.2f} on {top1.count:,} images, {paper} in the paper')
    if top1.avg < paper - TOLERANCE and not args.force:
        raise Refused(f'{variant}: top-1 {top1.avg:.2f} is more than {TOLERANCE} short of the {paper} of the paper: '
                      'wrong weights or images; --force publishes all the same')


def model_card(candidate: Candidate, tag: str, digest: str) -> str:
    model, repo_id = candidate.model, candidate.repo_id
    cfg = model.pretrained_cfg
    variant, paper = cfg['architecture'], 'https://arxiv.org/abs/2108.05895'
    is_authors = tag == AUTHORS_TAG
    what = f'{variant} is a Mobile-Former: a MobileNet and a transformer of a few global tokens side by side, joined ' \
        'by a two-way bridge in every block. '
    if is_authors:
        what += 'These are the weights that the authors of the paper trained on ImageNet-1k and published, renamed ' \
            'for timm. The authors state no licence for them.'
    else:
        what += f'These weights (tag `{tag}`) are not those of the authors of the paper.'
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
    details['Source'] = f'`{candidate.checkpoint.name}`, SHA-256 `{digest}`'
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


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file, tqdm(
            total=path.stat().st_size, desc=f'Hashing {path.name}', unit='B', unit_scale=True) as progress:
        while block := file.read(1 << 20):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()


def write_files(candidate: Candidate, folder: Path, tag: str) -> None:
    """The files of a repository, by timm's own code."""
    card = model_card(candidate, tag, sha256(candidate.checkpoint))
    try:
        save_for_hf(candidate.model, str(folder), safe_serialization=True)
        (folder / 'README.md').write_text(card, encoding='utf-8')
    except (OSError, SafetensorError) as e:
        raise Refused(f'{folder}: cannot be written ({_line(e)}); free some space, or set TMPDIR') from e


def publish(repo_id: str, folder: Path, args: argparse.Namespace) -> Tuple[CommitInfo, bool]:
    """Send the files of a folder in one commit; that commit, or the last one if it holds them already."""
    api = HfApi(token=args.token, library_name='timm', library_version=timm.__version__)
    api.create_repo(repo_id, private=args.private or None, exist_ok=True)
    try:
        head = api.model_info(repo_id, revision=args.revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
        head = api.model_info(repo_id, revision=args.revision)
    if args.private and not head.private:
        raise Refused(f'{repo_id} is public already: make it private on its settings page, or leave out --private')
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())],
        commit_message='Publish the weights',
        revision=args.revision,
        create_pr=args.create_pr,
        parent_commit=head.sha,
    )
    return commit, commit.oid != head.sha


def verify(name: str, candidate: Candidate) -> None:
    """Load what was published with timm, by way of an empty cache, and ask it the same."""
    with tempfile.TemporaryDirectory() as cache:
        model = timm.create_model(name, pretrained=True, cache_dir=cache).eval()
    with torch.inference_mode():
        answer = model(candidate.x)
    if not torch.equal(answer, candidate.answer):
        raise Refused(f'{name} gives other answers than {candidate.checkpoint}')


def publish_and_verify(candidate: Candidate, args: argparse.Namespace) -> None:
    repo_id = candidate.repo_id
    with tempfile.TemporaryDirectory() as folder:
        write_files(candidate, Path(folder), args.tag)
        try:
            commit, is_new = publish(repo_id, Path(folder), args)
        except Refused:
            raise
        except Exception as e:
            raise Refused(f'{repo_id} is not published: {_advice(e, repo_id)}') from e
    print(f'{repo_id}: published as {commit.pr_url or commit.commit_url}' if is_new else
          f'{repo_id}: unchanged, the Hub holds these files already')
    try:
        verify(f'hf-hub:{repo_id}@{commit.pr_revision or commit.oid}', candidate)
    except Refused:
        raise
    except Exception as e:
        cause = e.__cause__ if isinstance(e, RuntimeError) and e.__cause__ else e  # of the model's own error
        raise Refused(f'{repo_id} is published as {commit.oid}, but does not load: {why(cause)}; '
                      'run this again to check it') from e
    print(f'{repo_id}: downloaded again, same answer to the bit')


def write_dry(candidate: Candidate, target: Path, tag: str) -> None:
    """Put the files into a folder instead, complete or not at all."""
    if target.exists() and not target.is_dir():
        raise Refused(f'{target}: no folder')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            write_files(candidate, Path(folder), tag)
            target.mkdir(exist_ok=True)
            for file in Path(folder).iterdir():
                os.replace(file, target / file.name)
    except OSError as e:
        raise Refused(f'{target}: cannot be written ({_line(e)})') from e
    verify(f'local-dir:{target}', candidate)
    print(f'{target}: written, nothing sent; loads as local-dir:{target}, same answer to the bit')


def _line(e: BaseException) -> str:
    return ' '.join(str(e).split()) or type(e).__name__


def _advice(error: BaseException, repo_id: str) -> str:
    """What went wrong while publishing and what to do, in one line."""
    namespace = repo_id.split('/')[0]
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set, unset it'
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f'{_line(cause)}; free some space and run this again'
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
            return f'the Hub refuses ({status}): {_line(cause)}'
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ValueError):
        return _line(error)
    return f'the connection to {constants.ENDPOINT} failed ({type(error).__name__}: {_line(error)}); run this again'


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='hub_upload.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('variant', nargs='?', choices=list(PAPER_TOP1), metavar='VARIANT', help='say mobileformer_294m')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE',
                        help='of the authors, of train.py, a plain state dict or safetensors')
    parser.add_argument('--all', type=Path, metavar='FOLDER', help='publish every variant found in a folder')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--namespace', metavar='ORG',
                       help='organisation or user (default: where pretrained=True looks)')
    where.add_argument('--repo-id', metavar='ORG/NAME', help='another repository than ORG/VARIANT.TAG')
    parser.add_argument('--tag', default=AUTHORS_TAG,
                        help="which weights these are (default: %(default)s, the authors')")
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    how = parser.add_mutually_exclusive_group()
    how.add_argument('--revision', metavar='R', help='branch to commit to, made if absent (default: main)')
    how.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument('--dry-run', type=Path, metavar='DIR', help='write the files to a folder and send nothing')
    parser.add_argument('--validate', type=Path, metavar='IMAGENET_DIR',
                        help='folder of validation images in class folders; refuse weights worse than the paper says')
    parser.add_argument('--device', default='cpu', help='to validate on (default: %(default)s)')
    parser.add_argument('--force', action='store_true', help='publish even so')
    parser.add_argument('--token', help='of the Hub; better log in with `hf auth login` or set HF_TOKEN, for others on '
                                        'this machine can see your command line')
    args = parser.parse_args(argv)
    if bool(args.all) == bool(args.variant) or bool(args.variant) != bool(args.checkpoint):
        parser.error('give VARIANT --checkpoint FILE, or --all FOLDER')
    if args.all and args.repo_id:
        parser.error('--repo-id names one repository, --all needs --namespace')
    return args


def repo_id_of(variant: str, args: argparse.Namespace) -> str:
    published: Any = timm.models.get_pretrained_cfg_value(f'{variant}.{AUTHORS_TAG}', 'hf_hub_id')
    repo_id = args.repo_id or f'{args.namespace or published.split("/")[0]}/{variant}.{args.tag}'
    try:
        validate_repo_id(repo_id)
    except ValueError as e:
        raise Refused(_line(e)) from e
    if repo_id.count('/') != 1:
        raise Refused(f'{repo_id!r} is no ORG/NAME')
    return repo_id


def run(args: argparse.Namespace) -> None:
    if args.token:  # timm's loader takes it from there
        os.environ['HF_TOKEN'] = args.token
    paths = find_variants(args.all, args.use_ema) if args.all else {args.variant: args.checkpoint}
    repo_ids = {variant: repo_id_of(variant, args) for variant in paths}
    candidates = [check(variant, path, repo_ids[variant], args) for variant, path in paths.items()]
    for candidate in candidates:
        if args.dry_run:
            target = args.dry_run / candidate.repo_id.split('/')[1] if args.all else args.dry_run
            write_dry(candidate, target, args.tag)
        else:
            publish_and_verify(candidate, args)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except Refused as e:
        message = str(e)
    except KeyboardInterrupt:
        message = 'interrupted; run it again to complete'
    else:
        return 0
    for bar in list(tqdm._instances):  # the client leaves its own open where an upload fails
        bar.close()
    token = args.token or get_token()
    print('hub_upload.py: ' + (message.replace(token, '***') if token else message), file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
