"""The authors' weights by one command: what Google Drive gives is checked, kept, written down and used, or refused.

Drive is imitated by drive_server.py, over real HTTPS; weights are seeded numbers in the authors' layout.
"""
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import timm
import torch
from authors import author_state_dict
from drive_server import QUOTA, Drive, serve
from hub_server import serve as serve_hub
from test_hub import ROOT, VARIANTS, digest, environment

from timm_mobileformer.authors import AUTHORS_FILES
from timm_mobileformer.cli import main

pytest.importorskip('gdown', reason='gdown asks Google Drive')
pytestmark = pytest.mark.skipif(not shutil.which('openssl'), reason='openssl makes the certificate of the imitation')
NAME, FILE = 'mobileformer_26m', 'mobile-former-26m.pth.tar'
ID = AUTHORS_FILES[NAME]
Weights = Dict[str, bytes]


def checkpoint(variant: str, seed: int = 0) -> bytes:
    """A file as the authors' training script writes them."""
    content = io.BytesIO()
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in author_state_dict(variant, seed).items()}
    torch.save({'epoch': 449, 'state_dict': tensors}, content)
    return content.getvalue()


@pytest.fixture(scope='module')
def authors() -> Weights:
    return {AUTHORS_FILES[f'mobileformer_{variant}']: checkpoint(variant) for variant in VARIANTS}


@pytest.fixture(scope='module')
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    with serve(tmp_path_factory.mktemp('drive')) as drive:
        yield drive


@pytest.fixture
def drive(running: Drive, authors: Weights, monkeypatch: pytest.MonkeyPatch) -> Drive:
    """Google Drive with the authors' files, for this process and those that it starts."""
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    running.files, running.ways = dict(authors), {}
    running.log.clear()
    return running


def of_file(content: bytes, folder: Path, name: str = NAME) -> str:
    """The digest of the model that a checkpoint makes."""
    (folder / 'reference.pth').write_bytes(content)
    overlay = dict(file=str(folder / 'reference.pth'))
    return digest(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay))


def refused(capsys: Any, *args: Any) -> str:
    assert main([*map(str, args)]) == 2
    line, end = capsys.readouterr().err.split('\n')
    assert line.startswith('error: ') and not end
    return line.removeprefix('error: ')


def tree(folder: Path) -> List[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if not p.is_dir())


def test_one_command_publishes_from_the_authors_links_and_goes_on_where_it_was_stopped(drive, authors, tmp_path):
    downloads = tmp_path / 'downloads'
    with serve_hub(tmp_path / 'hub') as hub:
        def publish(*args: str) -> subprocess.CompletedProcess:
            drive.log.clear()
            return subprocess.run(
                [sys.executable, 'hub_upload.py', *args, '--namespace', 'others', '--download-dir', str(downloads)],
                env=environment(hub, tmp_path / 'home', HF_TOKEN='hf_writer'), cwd=ROOT, capture_output=True, text=True)

        drive.ways = {AUTHORS_FILES['mobileformer_52m']: 'confirm', AUTHORS_FILES['mobileformer_214m']: 'quota'}
        stopped = publish('--all')
        assert stopped.returncode == 2 and QUOTA in stopped.stderr and not hub.log
        assert len(stopped.stderr.splitlines()) == 1
        assert len(tree(downloads)) == 8  # four files and what was written down about each
        del drive.ways[AUTHORS_FILES['mobileformer_214m']]
        done = publish('--all')
        assert done.returncode == 0, done.stderr
        assert drive.log == [AUTHORS_FILES[f'mobileformer_{v}'] for v in ('214m', '294m', '508m')]
        for name, file_id in AUTHORS_FILES.items():
            repo, content = f'others/{name}.ms_in1k', authors[file_id]
            assert f'{repo}: downloaded again, same answer to the bit' in done.stdout
            record = json.loads((downloads / f'mobile-former-{name.split("_")[1]}.pth.tar.json').read_text())
            assert record == {'url': f'https://drive.google.com/file/d/{file_id}/view', 'size': len(content),
                              'sha256': hashlib.sha256(content).hexdigest()}
            card = hub.files(repo)['README.md'].decode()
            assert f'SHA-256 `{record["sha256"]}`, {len(content):,} bytes, from {record["url"]}' in card
        again = publish('--model', NAME)
        assert 'unchanged, the Hub holds these files already' in again.stdout and not drive.log


def test_weights_writes_a_folder_that_timm_loads_once(drive, authors, tmp_path, capsys):
    folder = tmp_path / "author's weights"
    args = ['weights', NAME, '--output', str(folder), '--download-dir', str(tmp_path / 'downloads')]
    assert main(args) == 0 and drive.log == [ID]
    call, = re.findall(r'^timm\.create_model\(.*?pretrained=True\)', capsys.readouterr().out, re.MULTILINE)
    assert digest(eval(call)) == of_file(authors[ID], tmp_path)
    assert tree(folder) == ['config.json', 'model.safetensors']
    before = {path.name: path.stat() for path in folder.iterdir()}
    assert main(args) == 0 and drive.log == [ID]
    assert call in capsys.readouterr().out and {path.name: path.stat() for path in folder.iterdir()} == before
    (folder / 'model.safetensors').unlink()  # as if it had been stopped
    assert main(args) == 0 and drive.log == [ID] and tree(folder) == ['config.json', 'model.safetensors']
    assert 'holds mobileformer_26m.ms_in1k, not mobileformer_52m.ms_in1k; name another --output' in refused(
        capsys, 'weights', 'mobileformer_52m', '--output', folder)
    by_hand = tmp_path / 'downloads' / FILE
    assert main(['weights', NAME, '--checkpoint', str(by_hand), '--output', str(tmp_path / 'second')]) == 0
    assert main(['weights', '--all', str(by_hand.parent), '--output', str(tmp_path / 'all')]) == 0
    assert drive.log == [ID]
    for written in tmp_path / 'second', tmp_path / 'all' / 'mobileformer_26m.ms_in1k':
        assert all((written / name).read_bytes() == (folder / name).read_bytes() for name in before)


def test_weights_go_into_the_cache_of_the_hub_and_only_when_asked_for(drive, tmp_path):
    env = {**os.environ, 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}

    def run(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, '-m', 'timm_mobileformer', *args], env=env, cwd=tmp_path, text=True,
                              capture_output=True)

    missing = run('publish', '--model', NAME, '--pretrained', '--dry-run', 'x')
    line, = missing.stderr.splitlines()
    assert missing.returncode == 2 and not drive.log
    assert 'HF_HUB_OFFLINE is set' in line and 'pretrained_cfg_overlay' not in line
    assert line.endswith(f'; --checkpoint FILE takes the weights from a file, and timm-mobileformer weights {NAME} '
                         "fetches the authors' into a folder for --model")
    written = run('weights', NAME)
    assert written.returncode == 0 and not written.stderr
    cache = 'assets/timm_mobileformer'
    assert tree(tmp_path) == [
        f'{cache}/downloads/{FILE}', f'{cache}/downloads/{FILE}.json',
        f'{cache}/{NAME}.ms_in1k/config.json', f'{cache}/{NAME}.ms_in1k/model.safetensors']
    assert written.stdout.rstrip().endswith(f'--model {tmp_path}/{cache}/{NAME}.ms_in1k')


@pytest.mark.parametrize('way, said', [
    ('quota', QUOTA),
    ('sign in', 'Cannot retrieve the public link'),
    ('gone', 'Cannot retrieve the public link'),
    ('error', 'Cannot retrieve the public link'),
    ('html', 'a web page, not the file'),
    ('short', 'it is damaged or no checkpoint'),
    ('drop', ''),
    ('another', 'The checkpoint does not fit'),
    ('code', 'is refused: it is not a checkpoint, or loading it would execute code'),
    ('offline', ''),
])
def test_what_is_no_file_of_weights_is_not_kept_and_a_line_says_how_to_go_on(
        drive, authors, way, said, tmp_path, capsys, monkeypatch):
    drive.ways[ID] = way
    if way == 'another':
        drive.files[ID] = authors[AUTHORS_FILES['mobileformer_52m']]
    if way == 'code':
        drive.files[ID] = b"cos\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / 'executed')
    if way == 'offline':
        monkeypatch.setenv('HTTPS_PROXY', 'http://127.0.0.1:9')
    downloads = tmp_path / 'downloads'
    for args in ['weights', NAME, '--output', tmp_path / 'out'], ['publish', '--model', NAME]:
        line = refused(capsys, *args, '--download-dir', downloads)
        assert said in line and line.startswith(f'{NAME}: ')
        assert line.endswith(f'; open https://drive.google.com/file/d/{ID}/view in a browser, save the file as '
                             f'{downloads / FILE} and run this again, or name it with --checkpoint')
        assert not tree(tmp_path) and not downloads.exists()


def test_a_download_that_is_killed_leaves_nothing_that_is_taken_for_weights(drive, authors, tmp_path):
    args = ['weights', NAME, '--output', str(tmp_path / 'out'), '--download-dir', str(tmp_path / 'downloads')]
    process = subprocess.Popen([sys.executable, '-m', 'timm_mobileformer', *args], stdout=subprocess.DEVNULL)
    drive.ways[ID] = process.kill
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / 'downloads' / FILE).exists() and not (tmp_path / 'out').exists()
    drive.ways.clear()
    assert main(args) == 0
    assert tree(tmp_path / 'downloads') == [FILE, f'{FILE}.json']  # nothing of the first attempt
    assert digest(timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True)) == of_file(authors[ID], tmp_path)


def test_a_file_that_is_another_one_than_before_is_not_taken_unseen(drive, authors, tmp_path, capsys):
    def hashes(line: str) -> List[str]:
        return re.findall('[0-9a-f]{64}', line)

    downloads = tmp_path / 'downloads'
    args = ['publish', '--model', NAME, '--dry-run', tmp_path / 'out', '--download-dir', downloads]
    assert main([*map(str, args)]) == 0
    capsys.readouterr()
    first, second = authors[ID], checkpoint('26m', 1)
    both = [hashlib.sha256(content).hexdigest() for content in (second, first)]
    (downloads / FILE).write_bytes(second)
    line = refused(capsys, *args)
    assert 'the file was changed' in line and hashes(line) == both
    (downloads / FILE).unlink()
    drive.files[ID] = second
    line = refused(capsys, *args)
    assert 'Google Drive has another file now' in line and hashes(line) == both
    assert tree(downloads) == [f'{FILE}.json']
    (downloads / f'{FILE}.json').unlink()  # as the line says
    assert main([*map(str, args)]) == 0
    assert both[0] in (tmp_path / 'out' / 'README.md').read_text()


def test_a_file_that_was_saved_by_hand_is_checked_and_taken(drive, authors, tmp_path, capsys):
    drive.ways[ID] = 'quota'
    args = ['weights', NAME, '--output', str(tmp_path / 'out'), '--download-dir', str(tmp_path)]
    (tmp_path / FILE).write_text('<html>saved the page instead</html>')
    assert refused(capsys, *args).startswith(f'{tmp_path / FILE}: a web page, not the file; open https://')
    (tmp_path / FILE).write_bytes(authors[ID])
    assert main(args) == 0 and not drive.log
    assert json.loads((tmp_path / f'{FILE}.json').read_text())['size'] == len(authors[ID])
