"""Every code block of the README and of the docs runs as it stands, or says why it does not.

The blocks of a page run one after the other in a process of its own, in a folder that holds what they name: pictures,
weights, the outcome of `timm-mobileformer finetune`; the Hugging Face Hub and Google Drive are imitated on loopback.
A comment of HTML before a block says what is else with it:

    <!-- not run here: WHY -->
    <!-- run by tests/FILE.py::TEST -->    what the block says runs there
    <!-- needs: NAME NAME -->              runs where these modules are installed
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('timm_mobileformer/docs/*.md'))]
RUN = 'bash', 'python'
SHOWN = '', 'bibtex'  # what commands print, and a citation


class Block(NamedTuple):
    language: str
    line: int  # of the page, before the first of the code
    code: str
    mark: str  # what the comment before it says


def read_blocks(page: Path) -> List[Block]:
    text = page.read_text(encoding='utf-8')
    return [
        Block(found['language'], text[:found.start('code')].count('\n'), found['code'], found['mark'] or '')
        for found in re.finditer(
            r'^(?:<!-- (?P<mark>.*) -->\n)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$', text, re.MULTILINE)]


def run_blocks(page: str, blocks: List[Any]) -> None:
    """Run them in this process, all those in Python with the same names; stop at the first that fails."""
    names: Dict[str, Any] = {'__name__': '__main__'}
    for language, line, code, _ in blocks:
        if language == 'python':
            exec(compile('\n' * line + code, page, 'exec'), names)
        elif subprocess.run(['bash', '-euo', 'pipefail', '-c', code]).returncode:
            sys.exit(f'{page}:{line + 1}: failed')


def why_not_run(mark: str) -> str:
    """Why a block is left out here; nothing if it is to be run."""
    kind, _, rest = mark.partition(': ')
    if mark.startswith('run by '):
        file, test = mark.removeprefix('run by ').split('::')
        assert re.search(rf'^def {test}\(', (ROOT / file).read_text(), re.MULTILINE), f'there is no test {file}::{test}'
        return mark
    if kind == 'needs':
        lacks = [name for name in rest.split() if importlib.util.find_spec(name) is None]
        return f'{" ".join(lacks)} not installed' if lacks else ''
    assert kind == 'not run here' or not mark, f'a comment before a block cannot say {mark}'
    return rest


@pytest.fixture(scope='module')
def given(tmp_path_factory: pytest.TempPathFactory, finetuned: Any) -> Path:
    """A folder with all that blocks name."""
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from test_weights import checkpoint
    from timm.models import save_for_hf

    folder: Path = tmp_path_factory.mktemp('given')
    for name, pixels in zip(('temple', 'flower'), load_sample_images().images, strict=True):
        (folder / 'PHOTOS' / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pixels).crop((200 * i, 100, 200 * i + 200, 300)).save(folder / 'PHOTOS' / name / f'{i}.jpg')
    shutil.copy(folder / 'PHOTOS' / 'flower' / '1.jpg', folder / 'IMAGE.jpg')
    (folder / 'mobile-former-294m.pth.tar').write_bytes(checkpoint('294m'))
    (folder / 'FILE').write_bytes(checkpoint('52m'))
    overlay = dict(file=str(folder / 'mobile-former-294m.pth.tar'))
    model = timm.create_model('mobileformer_294m', pretrained=True, pretrained_cfg_overlay=overlay)
    save_for_hf(model, str(folder / 'FOLDER'), safe_serialization=True)
    shutil.copytree(finetuned[0] / 'output', folder / 'output')
    return folder


@pytest.fixture
def env(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dict[str, str]]:
    """Variables for a process that finds this Python, this command, a Hub with weights, and Drive."""
    from drive_server import serve as serve_drive
    from hub_server import serve as serve_hub
    from test_hub import environment

    from timm_mobileformer.authors import AUTHORS_FILES

    (tmp_path / 'drive').mkdir()
    with serve_hub(tmp_path / 'hub') as hub, serve_drive(tmp_path / 'drive') as drive:
        drive.files[AUTHORS_FILES['mobileformer_294m']] = (given / 'mobile-former-294m.pth.tar').read_bytes()
        for repo in 'timm-mobileformer/mobileformer_294m.ms_in1k', 'my-org/mobileformer_294m.ms_in1k':
            hub.create(repo)
            files = {file.name: hub.keep(repo, file.read_bytes(), lfs=file.suffix == '.safetensors')
                     for file in (given / 'FOLDER').iterdir()}
            for revision in 'main', 'v1':
                hub.commit(repo, revision, files, 'weights', base='main')
        yield {**environment(hub, tmp_path / 'home', HF_TOKEN='hf_writer'), **drive.env,
               'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])}


@pytest.mark.parametrize('page', [str(page.relative_to(ROOT)) for page in PAGES])
def test_every_block_runs_or_says_why_not(page, given, env, tmp_path, capsys):
    blocks = [block for block in read_blocks(ROOT / page) if block.language not in SHOWN]
    assert len(re.findall('^ *```', (ROOT / page).read_text(), re.MULTILINE)) == 2 * len(read_blocks(ROOT / page))
    left_out = {block.line: why for block in blocks if (why := why_not_run(block.mark))}
    assert {block.language for block in blocks if block.line not in left_out} <= {*RUN}, 'in a language nobody runs'
    shutil.copytree(given, tmp_path / 'work')
    done = subprocess.run(
        [sys.executable, __file__, str(ROOT / page)], input=json.dumps([b for b in blocks if b.line not in left_out]),
        cwd=tmp_path / 'work', env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    with capsys.disabled():
        print(f'\n{page}: {len(blocks) - len(left_out)} blocks run, {len(left_out)} left out',
              *(f'  line {line}: {why}' for line, why in left_out.items()), sep='\n')


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r'\]\(((?!http)[^)]+)\)', page.read_text()):
            path, _, anchor = link.partition('#')
            there = page.parent / path if path else page
            assert there.is_file(), f'{page}: {link}'
            headings = re.findall(r'^#+ (.*)$', there.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings]
            assert not anchor or anchor in anchors, f'{page}: {link}'


def rows(page: str) -> Dict[str, List[str]]:
    """The cells of the tables on a page by the first of each row, without quartiles."""
    lines = (line.strip('| ').split(' | ') for line in (ROOT / page).read_text().splitlines() if line.startswith('| '))
    return {name.strip('`'): [cell.partition(' (')[0] for cell in cells] for name, *cells in lines}


def test_the_numbers_in_the_readme_are_those_that_the_commands_print(capsys):
    from timm_mobileformer.cli import main

    assert main(['models']) == 0
    listed = re.findall(r'^(mobileformer\w+) +(\S+) +(\S+ M) +(\S+)', capsys.readouterr().out, re.MULTILINE)
    quoted, measured = rows('README.md'), rows('timm_mobileformer/docs/benchmark.md')
    assert len(listed) == 7
    for name, *costs in listed:
        assert quoted.pop(name)[1:] == [*costs, measured[f'{name}, fused'][6]]
    chosen = quoted.keys() & measured.keys() - {'model'}
    assert len(chosen) > 5
    for name in chosen:
        assert quoted[name] == [measured[name][i] for i in (3, 2, 6, 5)]


if __name__ == '__main__':
    run_blocks(sys.argv[1], json.load(sys.stdin))
