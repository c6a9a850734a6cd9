"""`pretrained=True` loads the authors' weights from the first source that has them, or says why none has.

The Hub and Google Drive are imitated by hub_server.py and drive_server.py, clients are processes with the real
libraries. Weights are seeded numbers in the authors' layout: seed 0 on Drive, seed 1 on the Hub.
"""
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import timm
import torch
from authors import author_state_dict
from drive_server import QUOTA, Drive, serve
from hub_server import serve as serve_hub
from huggingface_hub import constants
from PIL import Image
from test_hub import ROOT, VARIANTS, Result, digest, environment, run
from test_hub import clients as clients  # a fixture
from timm.models import save_for_hf

from timm_mobileformer.authors import AUTHORS_FILES
from timm_mobileformer.authors_weights import cache_folder, file_by_hand, get_authors_weights
from timm_mobileformer.cli import main
from timm_mobileformer.detection import fpn_backbone

pytestmark = pytest.mark.skipif(not shutil.which('openssl'), reason='openssl makes the certificate of the imitation')
NAME = 'mobileformer_26m'
ID = AUTHORS_FILES[NAME]
KEPT = ['.lock', 'model.safetensors', 'source.json']  # in the cache
Weights = Dict[str, bytes]


def checkpoint(variant: str, seed: int = 0, **changes: Any) -> bytes:
    """A file as the authors' training script writes them."""
    content = io.BytesIO()
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in author_state_dict(variant, seed).items()}
    torch.save({'epoch': 449, 'state_dict': {**tensors, **changes}}, content)
    return content.getvalue()


@pytest.fixture(scope='module')
def authors() -> Weights:
    return {AUTHORS_FILES[f'mobileformer_{variant}']: checkpoint(variant) for variant in VARIANTS}


@pytest.fixture(scope='module')
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    with serve(tmp_path_factory.mktemp('drive')) as drive:
        yield drive


@pytest.fixture
def drive(running: Drive, authors: Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drive:
    """Google Drive with the authors' files, for this process and those that it starts; an empty cache."""
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, 'HF_ASSETS_CACHE', str(tmp_path / 'assets'))
    running.files, running.ways = dict(authors), {}
    running.log.clear()
    return running


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The folder of NAME in the cache of this process."""
    return tmp_path / 'assets' / 'timm_mobileformer' / f'{NAME}.ms_in1k'


def model_of(content: bytes, folder: Path) -> torch.nn.Module:
    """The model that a checkpoint makes."""
    (folder / 'reference.pth').write_bytes(content)
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / 'reference.pth')))


def code(drive: Drive, cache: Path, repository: str = '', file_id: str = '', before: str = '', name: str = NAME,
         **kwargs: Any) -> str:
    """Code that creates a model and prints its digest; its repository and its file on Drive may be other ones."""
    return f'''
import logging, os, sys, timm, timm_mobileformer.authors_weights as authors_weights
from huggingface_hub import constants
from timm.models import _registry
sys.path.insert(0, {str(ROOT / 'tests')!r})
from test_hub import digest
os.environ.update({drive.env!r})
logging.basicConfig(format='%(message)s', stream=sys.stdout)
logging.getLogger('timm_mobileformer').setLevel('INFO')
_registry._model_pretrained_cfgs[{NAME!r}].hf_hub_id = {repository or f'timm-mobileformer/{NAME}.ms_in1k'!r}
authors_weights.AUTHORS_FILES[{NAME!r}] = {file_id or ID!r}
{before}
try:
    print(digest(timm.create_model({name!r}, pretrained=True, cache_dir={str(cache)!r}, **{kwargs!r})))
except RuntimeError as e:
    print(e)
    sys.exit(3)
'''


def tree(folder: Path) -> List[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if not p.is_dir())


def refused(capsys: Any, *args: Any) -> str:
    assert main([*map(str, args)]) == 2
    line, end = capsys.readouterr().err.split('\n')
    assert line.startswith('error: ') and not end
    return line.removeprefix('error: ')


# Sources

HUBS = {  # what the error says if Drive has nothing either
    'there': '', 'missing': 'it does not exist', 'private': 'is private', 'empty': 'no model.safetensors',
    'forbidden': 'answered 403', 'trouble': 'answered 503', 'dropped': '', 'slow': 'timed out',
}
DRIVES = {
    'there': '', 'quota': QUOTA.rstrip('.'), 'sign in': 'Cannot retrieve the public link',
    'gone': 'Cannot retrieve the public link', 'error': 'Cannot retrieve the public link', 'html': 'a web page',
    'short': 'damaged or not a checkpoint', 'drop': 'incomplete', 'stall': '', 'redirects': 'too many redirects',
    'pages': 'no data', 'another': 'does not fit', 'classes': 'size mismatch', 'nan': 'NaN or infinity in stem.conv',
    'code': 'refused',
}


@pytest.mark.timeout(900)
def test_the_hub_comes_first_then_drive_and_the_second_time_no_network_is_needed(
        hub, drive, authors, clients, tmp_path):
    on_hub, on_drive = model_of(checkpoint('26m', 1), tmp_path), model_of(authors[ID], tmp_path)
    save_for_hf(on_hub, tmp_path / 'files', safe_serialization=True)
    weights = (tmp_path / 'files' / 'model.safetensors').read_bytes()
    for name in HUBS.keys() - {'missing'}:
        hub.create(f'sources/{name}', private=name == 'private')
        if name != 'empty':
            files = {'model.safetensors': hub.keep(f'sources/{name}', weights, lfs=True)}
            hub.commit(f'sources/{name}', 'main', files, 'weights')
    hub.faults.update({
        ('sources/forbidden', 'head'): 403, ('sources/trouble', 'head'): 503, ('sources/dropped', 'get'): 'drop',
        ('sources/slow', 'head'): lambda: time.sleep(4)})
    bomb = tmp_path / 'executed'
    nan = torch.full((8, 3, 3, 3), torch.nan)
    seven = {'classifier.classifier.1.weight': torch.zeros(7, 1024), 'classifier.classifier.1.bias': torch.zeros(7)}
    drive.files.update(dict.fromkeys(DRIVES, authors[ID]), another=authors[AUTHORS_FILES['mobileformer_52m']],
                       code=b"cos\nsystem\n(S'touch %s'\ntR." % bytes(bomb), classes=checkpoint('26m', **seven),
                       nan=checkpoint('26m', **{'stem.0.weight': nan}))
    drive.ways.update({name: name for name in DRIVES})
    impatient = dict.fromkeys(['stall', 'pages'], 'authors_weights.STALL = 2')
    pairs = [(h, d) for h in HUBS for d in DRIVES if d in ('there', 'quota') or h == 'missing']
    results = clients(tmp_path / 'first', {
        f'{h}-{d}': code(drive, tmp_path / f'{h}-{d}', f'sources/{h}', d,
                         {'slow': 'constants.HF_HUB_ETAG_TIMEOUT = 2'}.get(h, impatient.get(d, ''))) for h, d in pairs})
    licence = '; the authors state no licence for them\n'
    for h, d in pairs:
        status, out = results[f'{h}-{d}']
        folder = cache_folder(NAME, tmp_path / f'{h}-{d}')
        if h == 'there':
            assert out == (f'{NAME}: loading weights from the Hugging Face repository sources/there{licence}'
                           f'{digest(on_hub)}\n')
            assert not folder.exists()
        elif d == 'there':
            assert out.endswith(f"{NAME}: loading weights from the authors' file https://drive.google.com/file/d/there/view"
                                f', cached in {folder}/model.safetensors{licence}{digest(on_drive)}\n')
            assert tree(folder) == KEPT
        else:
            assert status == 3 and f'repository sources/{h} (http' in out and "authors' file on Google Drive" in out
            assert HUBS[h] in out and DRIVES[d] in out, out
            assert f'open https://drive.google.com/file/d/{d}/view in a browser' in out and tree(folder) == ['.lock']
    assert not bomb.exists()

    drive.log.clear()
    drive.ways.update(dict.fromkeys(DRIVES, 'gone'))
    again = clients(tmp_path / 'again', {
        f'{h}-there': code(drive, tmp_path / f'{h}-there', f'sources/{h}', 'there') for h in HUBS})
    first = {name: results[name].out.splitlines()[-2:] for name in again}  # without what the Hub's client says before
    assert {name: r.out.splitlines()[-2:] for name, r in again.items()} == first and not drive.log
    down = 'constants.HF_HUB_OFFLINE = True'
    offline = clients(tmp_path / 'offline', {
        **{f'{h}-there': code(drive, tmp_path / f'{h}-there', f'sources/{h}', 'there', down) for h in HUBS},
        'nothing': code(drive, tmp_path / 'nothing', 'sources/there', 'there', down)})
    nothing = offline.pop('nothing')
    assert {name: r.out.splitlines()[-2:] for name, r in offline.items()} == first
    assert nothing.out.count('HF_HUB_OFFLINE is set') == 2 and not drive.log


def test_a_source_that_is_named_has_no_substitute(hub, drive, clients, tmp_path):
    missing = 'others/none'
    named = "os.environ['TIMM_MOBILEFORMER_HUB'] = "
    results = clients(tmp_path / 'jobs', {
        'variable': code(drive, tmp_path, before=f"{named}'others'"),
        'variable, default': code(drive, tmp_path, before=f"{named}'timm-mobileformer'", repository=f'none/{NAME}'),
        'overlay': code(drive, tmp_path, pretrained_cfg_overlay={'hf_hub_id': missing}),
        'overlay, default': code(drive, tmp_path, missing, pretrained_cfg_overlay={'hf_hub_id': missing}),
        **{kind: code(drive, tmp_path, pretrained_cfg_overlay={kind: value}) for kind, value in (
            ('file', '/none.pth'), ('url', 'http://127.0.0.1:9/none.pth'))},
        **{kind: code(drive, tmp_path, name=f'{kind}:{missing}') for kind in ('hf-hub', 'local-dir')},
        'authors only': code(drive, tmp_path, missing, pretrained_cfg_overlay={'hf_hub_id': None}),
    })
    assert results.pop('authors only').status == 0
    assert drive.log == [ID]
    assert all(r.status for r in results.values()), results
    for name in 'variable', 'overlay', 'overlay, default':
        assert results[name].status == 3 and 'it does not exist' in results[name].out
        assert 'Google Drive' not in results[name].out


def test_eight_processes_download_once_and_one_that_is_killed_is_not_in_the_way(hub, drive, authors, clients, tmp_path):
    drive.ways[ID] = lambda: os.kill(int((tmp_path / 'jobs' / 'killed.pid').read_text()), signal.SIGKILL)
    killed = clients(tmp_path / 'jobs', {'killed': code(drive, tmp_path / 'cache')})['killed']
    assert killed.status is None and tree(cache_folder(NAME, tmp_path / 'cache')) == ['.lock']
    drive.ways[ID] = 'slow'
    drive.log.clear()
    results = clients(tmp_path / 'jobs', {str(i): code(drive, tmp_path / 'cache') for i in range(8)})
    assert drive.log == [ID] and tree(cache_folder(NAME, tmp_path / 'cache')) == KEPT
    assert {r.status for r in results.values()} == {0}
    assert {r.out.split()[-1] for r in results.values()} == {digest(model_of(authors[ID], tmp_path))}


def test_a_cache_that_cannot_be_written_gives_the_same_error(drive, clients, tmp_path):
    full = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))'
    results = clients(tmp_path / 'jobs', {
        'full': code(drive, tmp_path / 'full', before=full), 'read-only': code(drive, Path('/proc/cache'))})
    assert tree(cache_folder(NAME, tmp_path / 'full')) == ['.lock']
    for name, said in ('full', 'free some space'), ('read-only', '/proc/cache'):
        assert results[name].status == 3 and said in results[name].out and 'in a browser' in results[name].out


# Wherever a model is created

@pytest.fixture
def cached(drive: Drive, here: Path, authors: Weights, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The authors' weights in the cache, and no network."""
    get_authors_weights(NAME)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    drive.ways[ID] = 'gone'
    return here


def test_cached_weights_hold_wherever_a_model_is_created(cached, authors, tmp_path):
    whole = model_of(authors[ID], tmp_path)
    shutil.rmtree(cached / '.lock', ignore_errors=True)
    five = timm.create_model(NAME, pretrained=True, num_classes=5)
    assert five.num_classes == 5 and torch.equal(five.tokens, whole.tokens)
    grey = timm.create_model(f'{NAME}.ms_in1k', pretrained=True, in_chans=1)
    torch.testing.assert_close(grey.stem.conv.weight, whole.stem.conv.weight.sum(1, keepdim=True))
    maps = timm.create_model(NAME, pretrained=True, features_only=True)
    assert torch.equal(maps.model.tokens, whole.tokens)
    assert torch.equal(fpn_backbone(NAME, (2, 3), pretrained=True).body.model.tokens, whole.tokens)


@pytest.mark.parametrize('module, create', [
    ('segmentation_models_pytorch', lambda smp: smp.Unet(f'tu-{NAME}', encoder_weights='imagenet').encoder.model.model),
    ('transformers', lambda transformers: transformers.TimmBackbone.from_pretrained(NAME)._backbone.model),
])
def test_libraries_load_cached_weights_by_name(module, create, cached, authors, tmp_path):
    assert torch.equal(create(pytest.importorskip(module)).tokens, model_of(authors[ID], tmp_path).tokens)


def test_a_file_that_was_saved_by_hand_is_checked_and_taken(drive, authors, here, capsys):
    file_by_hand(NAME).parent.mkdir(parents=True)
    file_by_hand(NAME).write_text('<html>saved the page instead</html>')
    assert refused(capsys, 'weights', NAME).startswith(f'{NAME}: a web page instead of a checkpoint; open https://')
    file_by_hand(NAME).write_bytes(authors[ID])
    assert main(['weights', NAME]) == 0 and not drive.log
    record = json.loads((here / 'source.json').read_text())
    assert record == {'url': f'https://drive.google.com/file/d/{ID}/view', 'size': len(authors[ID]),
                      'sha256': hashlib.sha256(authors[ID]).hexdigest(), 'date': record['date']}
    assert f'SHA-256 {record["sha256"]}' in capsys.readouterr().out


def test_a_record_pins_the_file(drive, authors, here, capsys):
    here.mkdir(parents=True)
    (here / 'source.json').write_text(json.dumps({'sha256': 'another'}))
    assert f'{here / "source.json"} requires another' in refused(capsys, 'weights', NAME)
    assert tree(here) == ['.lock', 'source.json']
    (here / 'source.json').write_text(json.dumps({'sha256': hashlib.sha256(authors[ID]).hexdigest()}))
    assert main(['weights', NAME]) == 0


# The commands

def test_weights_writes_a_folder_that_timm_loads(drive, authors, here, tmp_path, capsys):
    folder = tmp_path / "author's weights"
    args = ['weights', NAME, '--output', str(folder)]
    assert main(args) == 0 and main(args) == 0 and drive.log == [ID]
    call = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('timm.create_model('))
    assert digest(eval(call.partition(' loads ')[0])) == digest(model_of(authors[ID], tmp_path))
    assert tree(folder) == ['config.json', 'model.safetensors'] and tree(here) == KEPT
    assert 'contains mobileformer_26m.ms_in1k, not mobileformer_52m.ms_in1k; use another --output' in refused(
        capsys, 'weights', 'mobileformer_52m', '--output', folder)
    (tmp_path / 'hand.pth').write_bytes(checkpoint('26m', 1))
    line = refused(capsys, 'weights', NAME, '--checkpoint', tmp_path / 'hand.pth')
    assert line.startswith(f'{tmp_path}/hand.pth: the file has SHA-256')
    (here / 'source.json').unlink()  # as the line says
    assert main(['weights', NAME, '--checkpoint', str(tmp_path / 'hand.pth')]) == 0
    assert digest(timm.create_model(NAME, pretrained=True, cache_dir=None, pretrained_cfg_overlay={'hf_hub_id': None})
                  ) == digest(model_of(checkpoint('26m', 1), tmp_path))


def test_models_says_what_is_in_the_cache(cached, capsys):
    assert main(['models']) == 0
    weights = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if 'mobileformer' in line}
    date = json.loads((cached / 'source.json').read_text())['date']
    assert weights[NAME].endswith(f'cached, from Google Drive, {date}')
    assert weights['mobileformer_52m'].endswith('not cached')


def test_one_command_publishes_from_the_authors_links_and_goes_on_where_it_was_stopped(drive, authors, tmp_path):
    with serve_hub(tmp_path / 'hub') as hub:
        def publish(*args: str) -> subprocess.CompletedProcess:
            drive.log.clear()
            return subprocess.run(
                [sys.executable, 'hub_upload.py', *args, '--namespace', 'others'], cwd=ROOT, text=True,
                env=environment(hub, tmp_path / 'home', HF_TOKEN='hf_writer'), capture_output=True)

        drive.ways = {AUTHORS_FILES['mobileformer_52m']: 'confirm', AUTHORS_FILES['mobileformer_214m']: 'quota'}
        stopped = publish('--all')
        assert stopped.returncode == 2 and QUOTA.rstrip('.') in stopped.stderr and not hub.log
        assert len(stopped.stderr.splitlines()) == 1
        del drive.ways[AUTHORS_FILES['mobileformer_214m']]
        done = publish('--all')
        assert done.returncode == 0, done.stderr
        assert drive.log == [AUTHORS_FILES[f'mobileformer_{v}'] for v in ('214m', '294m', '508m')]
        for name, file_id in AUTHORS_FILES.items():
            repo, content = f'others/{name}.ms_in1k', authors[file_id]
            assert f'{repo}: verified after download, outputs are bit-identical' in done.stdout
            assert (f'https://drive.google.com/file/d/{file_id}/view, SHA-256 `{hashlib.sha256(content).hexdigest()}`, '
                    f'{len(content):,} bytes') in hub.files(repo)['README.md'].decode()
        again = publish('--model', NAME)
        assert 'unchanged, the Hub has these files already' in again.stdout and not drive.log


def test_the_first_block_of_the_readme_runs_again_with_both_servers_stopped(running, authors, tmp_path):
    block = (ROOT / 'README.md').read_text().partition('```python\n')[2].partition('```')[0]
    assert "timm.create_model('mobileformer_294m', pretrained=True)" in block
    Image.new('RGB', (300, 400)).save(tmp_path / 'IMAGE.jpg')
    block = f'import os; os.chdir({str(tmp_path)!r})\n{block}'
    with serve_hub(tmp_path / 'hub') as hub:
        running.files, running.ways = dict(authors), {}
        first = run(hub, tmp_path / 'home', '-c', block, **running.env)
    assert first == Result(0, ''), first
    assert run(hub, tmp_path / 'home', '-c', block, HTTPS_PROXY='http://127.0.0.1:9') == first
