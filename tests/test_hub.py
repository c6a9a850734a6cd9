"""Published weights: what `timm-mobileformer publish` sends is what `pretrained=True` brings back, or nothing is.

Clients are processes of their own, with the real huggingface_hub client and empty caches, which speak HTTP to
hub_server.py. Weights are seeded numbers in the authors' layout.
"""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

import pytest
import timm
import torch
from authors import author_state_dict
from hub_server import TOKENS, Hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from timm_mobileformer.checkpoint import CheckpointMismatchError

ROOT = Path(__file__).parents[1]
VARIANTS = ['26m', '52m', '96m', '151m', '214m', '294m', '508m']
FILES = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
STEPS = ['create', 'info', 'yaml', 'preupload', 'batch', 'put', 'commit']


class Result(NamedTuple):
    status: Optional[int]  # None if it was killed
    out: str


def environment(hub: Hub, home: Path, **more: str) -> Dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'TIMM_'))}
    env.setdefault('HTTPS_PROXY', 'http://127.0.0.1:9')  # nobody asks the real Google Drive
    return {
        **env, 'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), env.get('PYTHONPATH', '')]), **more,
    }


def run(hub: Hub, home: Path, *args: str, **more: str) -> Result:
    """A fresh process of Python."""
    process = subprocess.run(
        [sys.executable, *args], env=environment(hub, home, **more), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return Result(process.returncode, process.stdout)


class Clients:
    """Many processes at once, see hub_clients.py."""

    def __init__(self, hub: Hub, home: Path):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'hub_clients.py')], text=True, env=environment(hub, home),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, folder: Path, jobs: Dict[str, str]) -> Dict[str, Result]:
        folder.mkdir(exist_ok=True)
        for old in folder.glob('*.status'):
            old.unlink()
        self.process.stdin.write(json.dumps([str(folder), jobs]) + '\n')
        self.process.stdin.flush()
        assert self.process.stdout.readline() == 'done\n'
        results = {}
        for name in jobs:
            status = folder / f'{name}.status'
            results[name] = Result(
                int(status.read_text()) if status.exists() else None, (folder / f'{name}.out').read_text())
        assert not any(token in r.out for token in TOKENS for r in results.values()), 'a token was printed'
        return results


@pytest.fixture(scope='module')
def clients(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    run_all = Clients(hub, tmp_path_factory.mktemp('clients'))
    yield run_all
    run_all.process.communicate()


def upload(*args: Any, token: str = 'hf_writer') -> str:
    """Code that publishes as the command line does."""
    argv = ['publish', *map(str, args), *(['--token', token] if token else [])]
    return f'import sys; from timm_mobileformer.cli import main; sys.exit(main({argv!r}))'


def weights(variant: str, file: Path) -> Tuple[Any, ...]:
    return '--model', f'mobileformer_{variant}', '--checkpoint', file


def digest(model: torch.nn.Module) -> str:
    """Of every tensor of a model."""
    content = b''.join(v.numpy().tobytes() for v in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def load(*args: str, cache: Path, token: str = '', **kwargs: Any) -> str:
    """Code that creates a model and prints its digest, or the error and the kind of its cause."""
    return f'''
import os, sys, timm, timm_mobileformer
sys.path.insert(0, {str(ROOT / 'tests')!r})
from test_hub import digest
if {token!r}:
    os.environ['HF_TOKEN'] = {token!r}
try:
    print(digest(timm.create_model(*{args!r}, pretrained=True, cache_dir={str(cache)!r}, **{kwargs!r})))
except RuntimeError as e:
    print(f'{{e}}\\ncause: {{type(e.__cause__).__name__}}')
    sys.exit(3)
'''


def message(result: Result) -> str:
    """The one line that publishing leaves a user with."""
    assert result.status == 2, result.out
    assert 'Traceback' not in result.out
    line, = re.findall(r'^error: (.*)$', result.out, re.MULTILINE)
    assert result.out.rstrip().endswith(line)
    return line


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of each variant as the authors' training script writes them."""
    folder = tmp_path_factory.mktemp('checkpoints')
    for i, variant in enumerate(VARIANTS):
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in author_state_dict(variant, 0).items()}
        if i % 2:
            tensors = {f'module.{k}': v for k, v in tensors.items()}
        torch.save({'epoch': 449, 'state_dict': tensors}, folder / f'{variant}.pth.tar')
    return folder


@pytest.fixture(scope='session')
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights for mobileformer_26m."""
    path = tmp_path_factory.mktemp('other') / 'other.pth'
    torch.save({k: v.float() for k, v in author_state_dict('26m', 1).items()}, path)
    return path


@pytest.fixture(scope='module')
def published(hub: Hub, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """All variants, published by one command."""
    result = run(hub, tmp_path_factory.mktemp('home'), 'hub_upload.py', '--all', str(checkpoints), HF_TOKEN='hf_writer')
    assert result.status == 0, result.out
    return result


def from_file(variant: str, file: Path) -> torch.nn.Module:
    return timm.create_model(f'mobileformer_{variant}', pretrained=True, pretrained_cfg_overlay={'file': str(file)})


def repository(variant: str, namespace: str = 'timm-mobileformer') -> str:
    return f'{namespace}/mobileformer_{variant}.ms_in1k'


# Resolving

@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_has_the_authors_weights_as_its_default(variant):
    name = f'mobileformer_{variant}'
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg.tag == 'ms_in1k' and cfg.hf_hub_id == repository(variant)
    assert cfg.input_size == (3, 224, 224) and cfg.crop_pct == 0.875 and cfg.interpolation == 'bilinear'
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert cfg.license == 'unknown' and '2108.05895' in cfg.paper_ids and cfg.origin_url.endswith('AAboys/MobileFormer')
    assert f'{name}.ms_in1k' in timm.list_pretrained('mobileformer*')
    assert f'{name}.ms_in1k' in timm.list_models(pretrained=True)


def test_pretrained_brings_back_what_was_published(published, hub, checkpoints, tmp_path):
    code = f'''
import sys, timm, timm_mobileformer, torch
from pathlib import Path
sys.path.insert(0, {str(ROOT / 'tests')!r})
from test_hub import digest
for variant in {VARIANTS!r}:
    print(digest(timm.create_model(f'mobileformer_{{variant}}', pretrained=True)))
'''
    result = run(hub, tmp_path, '-c', code + f'''
name, model = 'mobileformer_26m', timm.create_model('mobileformer_26m.ms_in1k', pretrained=True)
grey = timm.create_model(name, pretrained=True, in_chans=1)
torch.testing.assert_close(grey.stem.conv.weight, model.stem.conv.weight.sum(1, keepdim=True))
five = timm.create_model(name, pretrained=True, num_classes=5)
assert five.classifier.out_features == 5 and torch.equal(five.tokens, model.tokens)
maps = timm.create_model(name, pretrained=True, features_only=True)
assert torch.equal(maps.model.tokens, model.tokens) and len(maps(torch.ones(1, 3, 64, 64))) == 5
timm.create_model(name, pretrained=True, cache_dir='{tmp_path}/elsewhere')
assert list(Path('{tmp_path}/elsewhere').rglob('model.safetensors'))
''')
    assert result.status == 0, result.out
    assert result.out.split() == [digest(from_file(v, checkpoints / f'{v}.pth.tar')) for v in VARIANTS]
    offline = run(hub, tmp_path, '-c', code, HF_HUB_OFFLINE='1', HF_ENDPOINT='http://127.0.0.1:9')
    assert offline == result


def test_timms_own_download_tests_pass(published, hub, tmp_path):
    if not list(ROOT.glob('build/timm_suite/*.tar.gz')):
        pytest.skip("timm's tests are not here: `python tests/timm_suite.py` fetches them")
    result = run(hub, tmp_path, 'tests/timm_suite.py', '--downloads')
    assert result.status == 0, result.out
    assert ' passed' in result.out and 'skipped' not in result.out, result.out


def test_weights_published_elsewhere_load_by_namespace_overlay_and_hub_name_at_any_revision(
        hub, clients, published, checkpoints, other, tmp_path):
    repo = repository('26m', 'others')
    sent = clients(tmp_path, {
        'branch': upload(*weights('26m', other), '--namespace', 'others', '--revision', 'new'),
    })
    assert sent['branch'].status == 0
    assert set(hub.files(repo)) == {'.gitattributes'}  # nothing on main
    assert hub.load(repo)['refs'].keys() == {'main', 'new'}
    results = clients(tmp_path, {
        'overlay': load('mobileformer_26m', cache=tmp_path / '1', pretrained_cfg_overlay={'hf_hub_id': f'{repo}@new'}),
        'hub_name': load(f'hf-hub:{repo}@new', cache=tmp_path / '2'),
        'main': load(f'hf-hub:{repository("26m")}', cache=tmp_path / '3'),
    })
    code = load('mobileformer_26m', cache=tmp_path / '4')
    results['namespace'] = run(hub, tmp_path, '-c', code, TIMM_MOBILEFORMER_HUB='others@new')
    assert results.pop('main') == (0, digest(from_file('26m', checkpoints / '26m.pth.tar')) + '\n')
    assert results == dict.fromkeys(results, (0, digest(from_file('26m', other)) + '\n'))


# When weights cannot be had

def test_missing_weights_give_one_error_with_the_repository_the_reason_and_ways_on(
        hub, clients, published, checkpoints, tmp_path):
    good = hub.files(repository('26m'))['model.safetensors']
    bomb = tmp_path / 'bomb.bin'
    bomb.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / 'executed'))
    foreign = tmp_path / 'foreign.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), foreign)
    for name, files in {
        'private': {'model.safetensors': good},
        'forbidden': {'model.safetensors': good},
        'dropped': {'model.safetensors': good},
        'trouble': {'model.safetensors': good},
        'empty': {},
        'truncated': {'model.safetensors': good[:len(good) // 2]},
        'foreign': {'model.safetensors': foreign.read_bytes()},
        'code': {'pytorch_model.bin': bomb.read_bytes()},
    }.items():
        repo = f'others/{name}'
        hub.create(repo, private=name == 'private')
        hub.commit(repo, 'main', {path: hub.keep(repo, content, lfs=True) for path, content in files.items()}, name)
    hub.faults.update({
        ('others/forbidden', 'head'): 403, ('others/dropped', 'get'): 'drop', ('others/trouble', 'get'): 503,
    })
    reasons = {
        'missing': 'does not exist', 'private': 'is private', 'forbidden': '403', 'dropped': '', 'trouble': '503',
        'empty': 'it contains no model.safetensors', 'empty@nope': 'no such revision', 'truncated': 'damaged',
        'foreign': 'unexpected: bn1.bias', 'code': 'refused',
    }
    results = clients(tmp_path / 'jobs', {
        name: load('mobileformer_26m', cache=tmp_path / name, token='hf_reader' if name == 'private' else '',
                   pretrained_cfg_overlay={'hf_hub_id': f'others/{name}'}) for name in reasons
    })
    code = load('mobileformer_26m', cache=tmp_path / 'none')
    results['offline'] = run(hub, tmp_path, '-c', code, HF_HUB_OFFLINE='1')
    results['unreachable'] = run(hub, tmp_path, '-c', code, HF_ENDPOINT='http://127.0.0.1:9')
    reasons.update({'unreachable': 'Connection refused', 'offline': 'HF_HUB_OFFLINE is set'})
    for name, (status, out) in results.items():
        assert status == 3, (name, out)
        repo = repository('26m') if name in ('unreachable', 'offline') else f'others/{name}'
        assert f'Hugging Face repository {repo} (http://127.0.0.1:' in out
        assert reasons[name] in out, (name, out)
        assert "dict(file='FILE')" in out and 'TIMM_MOBILEFORMER_HUB' in out
        assert ('Google Drive' in out) == (name in ('unreachable', 'offline'))  # the others are named
        assert 'cause: NoneType' not in out
    assert not (tmp_path / 'executed').exists()
    # nothing of a half-downloaded file is there to be taken for weights, and the next attempt works
    assert not [p for p in (tmp_path / 'dropped').rglob('*') if p.is_file() and p.stat().st_size > 100_000]
    hub.faults.pop(('others/dropped', 'get'))
    again = load('mobileformer_26m', cache=tmp_path / 'dropped', pretrained_cfg_overlay={'hf_hub_id': 'others/dropped'})
    assert clients(tmp_path / 'jobs', {'again': again})['again'].status == 0


def test_errors_of_hf_xet_give_the_reason_and_another_way_to_download_or_the_next_source(
        hub, clients, published, checkpoints, tmp_path):
    pytest.importorskip('hf_xet')
    (tmp_path / 'hf_xet.py').write_text('XetFileInfo = None')  # a version that huggingface_hub cannot use
    own, default = 'others/xet', repository('26m')
    hub.create(own)
    content = hub.files(default)['model.safetensors']
    hub.commit(own, 'main', {'model.safetensors': hub.keep(own, content, lfs=True)}, 'weights')
    use_xet = 'from huggingface_hub import constants; constants.HF_HUB_DISABLE_XET = False\n'
    use_old = f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
    for name, fault, code, said in (
            ('storage', 0, use_xet, '404 Not Found'),  # RuntimeError
            ('token', 200, use_xet, 'Xet headers have not been correctly set by the server'),  # ValueError
            ('version', 0, use_xet + use_old, "cannot import name 'XetSession'")):  # ImportError
        hub.faults.update(dict.fromkeys([(own, 'xet'), (default, 'xet')], fault))
        results = clients(tmp_path / 'jobs', {
            'own': code + load('mobileformer_26m', cache=tmp_path / name, pretrained_cfg_overlay={'hf_hub_id': own}),
            'default': code + load('mobileformer_26m', cache=tmp_path / name),
        })
        for status, out in results.values():
            assert status == 3 and said in out and 'set HF_HUB_DISABLE_XET=1' in out, (name, out)
        assert f'From the Hugging Face repository {own} ' in results['own'].out
        assert "From the authors' file on Google Drive" in results['default'].out
    again = load('mobileformer_26m', cache=tmp_path / 'again', pretrained_cfg_overlay={'hf_hub_id': own})
    assert clients(tmp_path / 'jobs', {'again': again})['again'].status == 0  # with HF_HUB_DISABLE_XET=1
    for repo in own, default:
        hub.faults.pop((repo, 'xet'))


def test_errors_that_are_not_about_weights_of_the_hub_stay_what_they_are(tmp_path):
    name = 'mobileformer_26m'
    save_for_hf(timm.create_model(name), tmp_path / 'folder', safe_serialization=True)
    damaged = tmp_path / 'folder' / 'model.safetensors'
    damaged.write_bytes(damaged.read_bytes()[:1000])
    foreign = timm.create_model('test_resnet').state_dict()
    torch.save(foreign, tmp_path / 'foreign.pth')
    for model, overlay, kind in (
            (f'local-dir:{tmp_path}/folder', {}, SafetensorError),
            (name, {'file': str(damaged)}, SafetensorError),
            (name, {'file': str(tmp_path / 'missing.pth')}, FileNotFoundError),
            (name, {'file': str(tmp_path / 'foreign.pth')}, CheckpointMismatchError),
            (name, {'state_dict': foreign}, CheckpointMismatchError)):
        with pytest.raises(kind) as error:
            timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
        assert 'timm-mobileformer' not in str(error.value) and type(error.value) is kind
    named = dict(hf_hub_id='others/none')
    with pytest.raises(RuntimeError, match='device type'):
        timm.create_model(name, pretrained=True, device='no_such_device', pretrained_cfg_overlay=named)
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(name, pretrained=True, no_such_argument=1, pretrained_cfg_overlay=named)
    with pytest.raises(RuntimeError, match='No pretrained weights exist for test_mobileformer'):
        timm.create_model('test_mobileformer', pretrained=True)


# Publishing

@pytest.mark.parametrize('variant', VARIANTS)
def test_one_commit_holds_the_files_timm_writes(variant, published, hub):
    repo = repository(variant)
    assert set(hub.files(repo)) == FILES
    assert [c['title'] for c in hub.load(repo)['commits'].values()] == ['initial commit', 'Publish the weights']
    config = json.loads(hub.files(repo)['config.json'])
    assert config['architecture'] == f'mobileformer_{variant}' and config['pretrained_cfg']['tag'] == 'ms_in1k'
    card = ModelCard(hub.files(repo)['README.md'].decode())
    assert card.data.library_name == 'timm' and card.data.pipeline_tag == 'image-classification'
    assert card.data.license == 'unknown' and card.data.datasets == ['imagenet-1k']
    assert 'arxiv:2108.05895' in card.data.tags
    assert 'authors state no licence' in card.content and '@inproceedings{chen2022mobileformer' in card.content
    assert f'|mobileformer_{variant}|' in card.content and f'`{variant}.pth.tar`, SHA-256' in card.content
    assert f'{repo}: verified after download, outputs are bit-identical' in published.out
    assert 'hf_writer' not in published.out
    assert not any(b'hf_writer' in content for content in hub.files(repo).values())


def test_the_usage_in_the_model_card_runs(published, hub, clients, tmp_path):
    Image.new('RGB', (300, 250), 'orange').save(tmp_path / 'image.jpg')
    card = hub.files(repository('26m'))['README.md'].decode()
    blocks = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    results = clients(tmp_path, {
        f'block{i}': f'import os; os.chdir({str(tmp_path)!r})\n{block}' for i, block in enumerate(blocks)})
    assert len(results) == 3 and all(r.status == 0 for r in results.values()), results
    assert 'torch.Size([1, 96, 7, 7])' in results['block1'].out


def test_publishing_again_changes_nothing_and_says_so(published, hub, clients, checkpoints, tmp_path):
    repo, file = repository('26m'), checkpoints / '26m.pth.tar'
    before = hub.load(repo)
    result = clients(tmp_path, {'again': upload(*weights('26m', file))})['again']
    assert result.status == 0 and 'unchanged, the Hub has these files already' in result.out
    assert hub.load(repo) == before


def test_private_repositories_pull_requests_and_names(hub, clients, checkpoints, published, tmp_path):
    file = checkpoints / '26m.pth.tar'
    tensors = timm.create_model('mobileformer_26m', num_classes=10).state_dict()
    ten = tmp_path / 'ten.pth.tar'
    torch.save({'state_dict': {k: v + 1 for k, v in tensors.items()}, 'state_dict_ema': tensors}, ten)
    five = timm.create_model('mobileformer_26m', num_classes=5)
    five.pretrained_cfg.update(input_size=(3, 96, 96), tag='finetuned')
    save_for_hf(five, tmp_path / 'five', {'label_names': list('abcde')}, safe_serialization=True)
    before = hub.load(repository('52m'))
    hub.create('others/pr')
    results = clients(tmp_path, {
        'private': upload(*weights('26m', file), '--repo-id', 'others/mine', '--private'),
        'public': upload(*weights('52m', checkpoints / '52m.pth.tar'), '--private'),
        'pr': upload(*weights('26m', file), '--repo-id', 'others/pr', '--create-pr'),
        'five': upload('--model', tmp_path / 'five', '--namespace', 'others'),
        'ten': upload(*weights('26m', ten), '--namespace', 'others', '--tag', 'ten', '--use-ema'),
    })
    assert results['private'].status == 0 and hub.load('others/mine')['private']
    assert 'is public already' in message(results['public']) and hub.load(repository('52m')) == before
    assert results['pr'].status == 0 and 'others/pr/discussions/1' in results['pr'].out
    assert set(hub.files('others/pr')) == {'.gitattributes'} and set(hub.files('others/pr', 'refs/pr/1')) == FILES
    assert results['five'].status == 0
    config = json.loads(hub.files('others/mobileformer_26m.finetuned')['config.json'])['pretrained_cfg']
    assert config['label_names'] == list('abcde') and config['input_size'] == [3, 96, 96]
    assert results['ten'].status == 0
    files = hub.files('others/mobileformer_26m.ten')
    (tmp_path / 'ten.safetensors').write_bytes(files['model.safetensors'])
    sent = load_file(tmp_path / 'ten.safetensors')
    assert sent.keys() == tensors.keys() and all(torch.equal(sent[k], v) for k, v in tensors.items())
    assert json.loads(files['config.json'])['num_classes'] == 10
    assert b'not those of the authors' in files['README.md'] and b'imagenet-1k' not in files['README.md']


def test_a_dry_run_writes_what_would_be_sent_and_sends_nothing(published, hub, clients, checkpoints, tmp_path):
    seen = len(hub.log)
    (tmp_path / 'two').mkdir()
    for variant in '26m', '52m':
        os.symlink(checkpoints / f'{variant}.pth.tar', tmp_path / 'two' / f'{variant}.pth.tar')
    file = checkpoints / '26m.pth.tar'
    results = clients(tmp_path, {
        'one': upload(*weights('26m', file), '--dry-run', tmp_path / 'one', token=''),
        'all': upload('--all', tmp_path / 'two', '--dry-run', tmp_path / 'all', token=''),
    })
    assert results['one'].status == results['all'].status == 0, results
    assert len(hub.log) == seen
    sent = {path: content for path, content in hub.files(repository('26m')).items() if path != '.gitattributes'}
    for folder in tmp_path / 'one', tmp_path / 'all' / 'mobileformer_26m.ms_in1k':
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == sent
    assert len(list((tmp_path / 'all').iterdir())) == 2
    assert digest(timm.create_model(f'local-dir:{tmp_path / "one"}', pretrained=True)) == digest(from_file('26m', file))


def test_what_should_not_be_published_is_refused_before_anything_is_sent(hub, clients, checkpoints, tmp_path):
    good = author_state_dict('26m', 0)
    bomb = tmp_path / 'bomb.pth'
    bomb.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / 'executed'))
    (tmp_path / 'truncated.safetensors').write_bytes(b'\xff' * 1000)
    (tmp_path / 'truncated.pth').write_bytes((checkpoints / '26m.pth.tar').read_bytes()[:100_000])
    shutil.copy(checkpoints / '26m.pth.tar', tmp_path / 'ema.pth')
    for name, tensors in {
        'unexpected': {**good, 'extra': torch.zeros(3)},
        'missing': {k: v for k, v in good.items() if k != 'stem.1.running_var'},
        'mismatch': {**good, 'tokens.weight': torch.zeros(4, 128)},
        'nan': {**good, 'features.3.conv2.0.weight': good['features.3.conv2.0.weight'] / 0.},
        'explodes': {**good, 'classifier.fc.0.weight': good['classifier.fc.0.weight'] * 1e38},
        'classes': {**good, 'classifier.classifier.1.weight': good['classifier.classifier.1.weight'][:7],
                    'classifier.classifier.1.bias': torch.zeros(7)},
        'other': author_state_dict('52m', 0),
        'list': [1, 2],
        'twice/a': good,
        'twice/b': good,
    }.items():
        path = tmp_path / f'{name}.pth'
        path.parent.mkdir(exist_ok=True)
        torch.save(tensors, path)
    reasons = {
        'unexpected': 'unexpected: extra', 'missing': 'missing: stem.1.running_var',
        'mismatch': 'tokens.weight (4, 128)', 'other': 'size mismatch',
        'nan': 'NaN or infinity in stages.1.1', 'explodes': 'outputs NaN', 'classes': '7 classes',
        'list': 'no named tensors', 'bomb': 'would execute code', 'truncated': 'damaged', 'ema': 'no averaged weights',
        'absent': 'no such file',
    }
    jobs = {
        name: upload(*weights('26m', tmp_path / f'{name}.pth'), '--namespace', 'others',
                     *(['--use-ema'] if name == 'ema' else [])) for name in reasons
    }
    reasons.update({
        'damaged': 'damaged', 'twice': 'both checkpoints of mobileformer_26m', 'namespace': 'bad name',
        'folder': 'no such folder',
    })
    jobs.update({
        'damaged': upload(*weights('26m', tmp_path / 'truncated.safetensors')),
        'twice': upload('--all', tmp_path / 'twice'),
        'folder': upload('--all', tmp_path / 'nowhere'),
        'namespace': upload(*weights('26m', checkpoints / '26m.pth.tar'), '--namespace', 'bad name'),
    })
    seen = len(hub.log)
    for name, result in clients(tmp_path / 'jobs', jobs).items():
        assert reasons[name] in message(result), (name, result.out)
    assert len(hub.log) == seen and not (tmp_path / 'executed').exists()


def test_accuracy_on_real_images_is_compared_with_the_papers(hub, clients, checkpoints, published, tmp_path):
    """The images are noise; in the folder 'right' they lie in the classes that the model sees in them."""
    file = checkpoints / '26m.pth.tar'
    model = from_file('26m', file).eval()
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    names = ImageNetInfo('imagenet-1k').label_names()
    for i in range(5):
        pixels = torch.randint(256, (280, 240, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        best = model(transform(image).unsqueeze(0)).argmax().item()
        for folder, label in ('right', best), ('wrong', (best + 1) % 1000):
            (tmp_path / folder / names[label]).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / folder / names[label] / f'{i}.png')
    (tmp_path / 'unnamed' / 'cats').mkdir(parents=True)
    image.save(tmp_path / 'unnamed' / 'cats' / '1.png')
    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    seen = len(hub.log)
    results = clients(tmp_path / 'jobs', {
        **{name: upload(*weights('26m', file), '--dry-run', tmp_path / f'files-{name}', '--validate',
                        tmp_path / folder, *more)
           for name, folder, *more in (('right', 'right'), ('wrong', 'wrong'), ('forced', 'wrong', '--force'),
                                       ('unnamed', 'unnamed'))},
        **{name: upload('--validate-only', '--validate', tmp_path / folder, '--model', *which, token='')
           for name, folder, *which in (('published', 'right', f'hf-hub:{repository("26m")}'),
                                        ('by name', 'right', 'mobileformer_26m', '--pretrained'),
                                        ('folder', 'wrong', tmp_path / 'folder'))},
    })
    table = r'\n\n\| model \| top-1 .*\n\|(?:---\|)+\n\| mobileformer_26m \| (.*) \|\n\ntimm_mobileformer .*, torch '
    for name in 'published', 'by name':
        assert results[name].status == 0, results[name].out
        assert re.search(table, results[name].out)[1] == (
            '100.00 | 64.0 | 100.00 | 5 | `hf-hub:timm-mobileformer/mobileformer_26m.ms_in1k`')
    assert results['folder'].status == 1  # short of the paper
    assert re.search(table, results['folder'].out)[1].startswith('0.00 | 64.0 | ')
    assert '`model.safetensors`, SHA-256 `' in results['folder'].out
    assert not {step for _, step in hub.log[seen:]} - {'head', 'get', 'info', 'tree'}
    assert results['right'].status == 0 and 'top-1 100.00 on 5 images, 64.0 in the paper' in results['right'].out
    assert 'top-1 0.00 is more than 0.3 points below 64.0' in message(results['wrong'])
    assert results['forced'].status == 0
    assert 'with ImageNet names' in message(results['unnamed'])
    assert not (tmp_path / 'files-wrong').exists()


# Trouble while publishing

def snapshot(hub: Hub, repo: str) -> Any:
    return hub.exists(repo) and (hub.load(repo)['refs'], hub.files(repo))


def test_a_failure_at_any_step_gives_one_line_and_leaves_the_hub_as_it_was(published, hub, clients, other, tmp_path):
    base, file = hub.folder / repository('26m'), other.read_bytes()
    faults = {401: '(401); log in with', 403: '(403); ask others for permission', 404: '(404); check that',
              409: '(409); check it', 503: 'answered 503; try again later',
              'drop': 'run this again', 'lose': 'run this again'}
    jobs, before = {}, {}
    for step in ('put', 'batch', 'preupload', 'create', 'info', 'yaml', 'commit'):  # the patient ones first
        for fault in faults:
            if (step, fault) == ('create', 409) or fault == 'lose':
                continue  # it is there already; see the next test
            repo = f'others/{step}-{fault}'
            if step != 'create':
                shutil.copytree(base, hub.folder / repo)
            hub.faults[repo, step] = fault
            before[step, fault] = snapshot(hub, repo)
            jobs[f'{step}-{fault}'] = upload(*weights('26m', other), '--repo-id', repo)
    results = clients(tmp_path, jobs)
    for (step, fault), state in before.items():
        result = results[f'{step}-{fault}']
        assert faults[fault] in message(result), (step, fault, result.out)
        assert snapshot(hub, f'others/{step}-{fault}') == state, (step, fault)
    assert other.read_bytes() == file
    hub.create('others/unverified')
    hub.faults['others/unverified', 'head'] = 403
    readers = {
        name: upload(*weights('26m', other), '--namespace', 'others', token=token)
        for name, token in (('stranger', 'hf_unknown'), ('reader', 'hf_reader'), ('nobody', ''))
    }
    readers['unverified'] = upload(*weights('26m', other), '--repo-id', 'others/unverified')
    state = snapshot(hub, repository('26m', 'others'))
    results = clients(tmp_path, readers)
    assert '(401)' in message(results['stranger']) and '(403)' in message(results['reader'])
    assert '(401)' in message(results['nobody'])
    assert re.search('was published as .*, but cannot be loaded: the server answered 403',
                     message(results['unverified']))
    assert snapshot(hub, repository('26m', 'others')) == state


def test_what_somebody_else_commits_meanwhile_is_not_overwritten(published, hub, clients, other, tmp_path):
    repo = 'others/busy'
    shutil.copytree(hub.folder / repository('26m'), hub.folder / repo)

    def commit_first():
        hub.faults.pop((repo, 'preupload'))
        hub.commit(repo, 'main', {'notes.txt': hub.keep(repo, b'by somebody else')}, 'notes')

    hub.faults[repo, 'preupload'] = commit_first
    result = clients(tmp_path, {'late': upload(*weights('26m', other), '--repo-id', repo)})['late']
    assert 'the repository was changed in the meantime (412)' in message(result)
    assert hub.files(repo) == {**hub.files(repository('26m')), 'notes.txt': b'by somebody else'}


def test_an_upload_killed_at_any_step_leaves_nothing_visible_and_completes_when_run_again(
        published, hub, clients, other, tmp_path):
    def kill(name: str):
        return lambda: os.kill(int((tmp_path / f'{name}.pid').read_text()), signal.SIGKILL)

    jobs = {}
    for step in STEPS:
        name = f'killed-{step}'
        hub.faults[f'others/{name}', step] = kill(name)
        jobs[name] = upload(*weights('26m', other), '--repo-id', f'others/{name}')
    shutil.copytree(hub.folder / repository('26m'), hub.folder / 'others/lost')
    hub.faults['others/lost', 'commit'] = 'lose'
    jobs['lost'] = upload(*weights('26m', other), '--repo-id', 'others/lost')
    reading = {'hf_hub_id': repository('52m')}
    hub.faults[repository('52m'), 'get'] = kill('reader')
    jobs['reader'] = load('mobileformer_52m', cache=tmp_path / 'cache', pretrained_cfg_overlay=reading)
    results = clients(tmp_path, jobs)
    hub.faults.clear()
    assert 'run this again' in message(results.pop('lost'))
    assert {name: r.status for name, r in results.items()} == dict.fromkeys(results)  # all were killed
    for step in STEPS:
        repo = f'others/killed-{step}'
        assert not hub.exists(repo) or set(hub.files(repo)) == {'.gitattributes'}, step
    results = clients(tmp_path, jobs)
    assert all(r.status == 0 for r in results.values()), results
    assert 'unchanged' in results['lost'].out
    assert all(set(hub.files(f'others/killed-{step}')) == FILES for step in STEPS)


def test_a_full_disk_gives_one_line_and_leaves_nothing_behind(hub, clients, checkpoints, tmp_path):
    file = checkpoints / '26m.pth.tar'
    (tmp_path / 'tmp').mkdir()
    full = f'''
import os, resource, tempfile
tempfile.tempdir = {str(tmp_path / 'tmp')!r}
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
'''
    jobs = {
        'publish': full + upload(*weights('26m', file), '--repo-id', 'others/full'),
        'dry': full + upload(*weights('26m', file), '--dry-run', tmp_path / 'dry'),
    }
    for result in clients(tmp_path / 'jobs', jobs).values():
        assert 'free some space' in message(result)
    assert not hub.exists('others/full') and not (tmp_path / 'dry').exists() and not list((tmp_path / 'tmp').iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['jobs', 'tmp']
