"""`timm-mobileformer predict`: a table of pictures and their classes."""
import csv
import io
import os
import re
import resource
import signal

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_mobileformer.cli import classifier, main
from timm_mobileformer.cli.images import read_image


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with weights, and with pictures as people have them."""
    folder = tmp_path_factory.mktemp('work')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=4)
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # answers that are not all alike
    torch.save(model.state_dict(), folder / 'weights.pth')
    inside = folder / 'photos' / 'a, "b"' / 'deep'
    inside.mkdir(parents=True)
    (folder / 'photos' / '.hidden').mkdir()
    generator = torch.Generator().manual_seed(0)
    for path in (inside / '1.png', inside / '2.JPG', folder / 'photos/rotated.jpg', folder / 'photos/.hidden/3.png'):
        pixels = torch.randint(256, (4, 5, 3), generator=generator, dtype=torch.uint8).numpy()
        exif = Image.Exif()
        exif[0x0112] = 6  # Orientation: to be turned
        Image.fromarray(pixels).resize((200, 120)).save(path, exif=exif)
    (folder / 'photos' / 'cut.jpg').write_bytes((folder / 'photos' / 'rotated.jpg').read_bytes()[:700])
    (folder / 'photos' / 'notes.txt').write_text('no picture')
    return folder


@pytest.fixture
def run(work, monkeypatch, capsys):
    """Run the command in the folder; its exit status, its rows, and what it says."""
    monkeypatch.chdir(work)

    def run_here(*args):
        status = main(['predict', *map(str, args), '--model', 'test_mobileformer', '--checkpoint', 'weights.pth',
                       '--workers', '0'])
        out, err = capsys.readouterr()
        return status, list(csv.DictReader(io.StringIO(out))), err
    return run_here


def test_every_picture_in_a_folder_gets_a_row_also_one_that_cannot_be_read(run, work):
    status, rows, err = run('photos', '--topk', 2, '--batch-size', 2)
    assert status == 1
    assert list(rows[0]) == ['path', 'label', 'probability', 'label2', 'probability2', 'problem']
    deep = os.path.join('photos', 'a, "b"', 'deep')
    assert [row['path'] for row in rows] == [
        'photos/cut.jpg', 'photos/rotated.jpg', os.path.join(deep, '1.png'), os.path.join(deep, '2.JPG')]
    assert rows[0]['problem'] and not any(rows[0][key] for key in ('label', 'probability', 'label2', 'probability2'))
    assert 'ignored files: 1 .txt' in err and '1 of 4 images could not be read' in err

    model = timm.create_model('test_mobileformer', num_classes=4, checkpoint_path=work / 'weights.pth').eval()
    transform = create_transform(**resolve_model_data_config(model))
    for row in rows[1:]:
        with torch.inference_mode():
            p, i = model(transform(read_image(work / row['path']))[None]).softmax(1)[0].topk(2)
        assert not row['problem'] and [row['label'], row['label2']] == [f'class {k}' for k in i]
        assert [row['probability'], row['probability2']] == [f'{v:.4f}' for v in p]


def test_the_help_names_the_columns_of_the_table(run, capsys):
    _, rows, _ = run('photos', '--topk', 2)
    with pytest.raises(SystemExit):
        main(['predict', '--help'])
    assert {*rows[0]} <= {*re.findall(r'\w+', capsys.readouterr().out)}


def test_it_is_the_same_whatever_the_batch_and_where_the_table_goes(run, tmp_path):
    files = ['photos/rotated.jpg', 'photos']
    status, rows, _ = run(*files, '--batch-size', 1)
    assert len(rows) == 5 and rows[0] == rows[2]
    assert run(*files, '--output', tmp_path / 'table.csv')[:2] == (1, [])
    with open(tmp_path / 'table.csv', encoding='utf-8', newline='') as file:
        assert list(csv.DictReader(file)) == rows


def test_a_batch_may_have_more_images_than_files_may_be_open(run, work, tmp_path, capsys):
    for i in range(300):
        source = 'cut.jpg' if i == 100 else 'a, "b"/deep/1.png' if i % 3 else 'rotated.jpg'
        os.link(work / 'photos' / source, tmp_path / f'{i:03}.{source[-3:]}')
    wanted = run(tmp_path, '--batch-size', 32, '--img-size', 32)[:2]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        status = main(['predict', str(tmp_path), '--model', 'test_mobileformer', '--checkpoint', 'weights.pth',
                       '--workers', '1', '--batch-size', '300', '--img-size', '32'])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert (status, rows) == wanted and status == 1 and len(rows) == 300 and rows[100]['problem']


def test_a_worker_that_is_killed_is_one_line(work, monkeypatch, capsys):
    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is full

    monkeypatch.chdir(work)
    monkeypatch.setattr(classifier.ImagesOrErrors, '__getitem__', kill)
    assert main(['predict', 'photos', '--model', 'test_mobileformer', '--checkpoint', 'weights.pth', '--workers', '1']
                ) == 2
    out, err = capsys.readouterr()
    assert re.search('^error: a worker that reads images was killed .*; if memory ran out, try fewer --workers$', err,
                     re.MULTILINE)
    assert 'Traceback' not in err


def test_a_table_and_nothing_else_is_written_whatever_it_is_called(run, work):
    (work / '.table').mkdir()
    (work / '.table' / 'mine').touch()
    for name in 'table', '.hidden.csv':
        assert run('photos/rotated.jpg', '--output', name)[0] == 0 and (work / name).is_file()
        (work / name).unlink()
    assert (work / '.table' / 'mine').exists()
    assert {path.name for path in work.iterdir()} == {'.table', 'photos', 'weights.pth'}


def test_a_name_that_is_not_utf_8_is_written_as_it_is(run, tmp_path):
    (tmp_path / os.fsdecode(b'caf\xe9.png')).touch()
    assert run(tmp_path, '--output', tmp_path / 'table.csv')[0] == 1
    assert b'/caf\xe9.png,,,' in (tmp_path / 'table.csv').read_bytes()


def test_classes_have_the_names_of_a_file(run, tmp_path):
    (tmp_path / 'names.txt').write_text('Ameise\nBiene\nKuh\nSchaf\n')
    _, rows, _ = run('photos/rotated.jpg', '--class-map', tmp_path / 'names.txt', '--topk', 4)
    assert sorted(rows[0][key] for key in rows[0] if 'label' in key) == ['Ameise', 'Biene', 'Kuh', 'Schaf']


@pytest.mark.parametrize('args, problem', [
    (['missing.jpg'], 'no such image or folder: missing.jpg'),
    (['photos/.hidden/none', 'photos'], 'no such image or folder: photos/.hidden/none'),
    (['photos', '--topk', '5'], '--topk: must be at most 4, the number of classes of test_mobileformer, not 5'),
    (['photos', '--topk', '0'], '--topk: must be at least 1, not 0; see timm-mobileformer predict --help'),
    (['photos/rotated.jpg', '--output', 'photos/rotated.jpg'], '--output would overwrite photos/rotated.jpg'),
    (['photos', '--output', '/dev/null'], '--output would overwrite /dev/null'),
])
def test_what_cannot_be_is_refused_in_one_line(run, args, problem):
    status, rows, err = run(*args)
    lines = [line for line in err.splitlines() if 'ignored files' not in line]
    assert (status, rows, lines) == (2, [], [f'error: {problem}'])


def test_an_exported_file_must_say_how_it_is_used(tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    model = timm.create_model('test_mobileformer', num_classes=4).eval()
    torch.onnx.export(model, (torch.randn(1, 3, 64, 64),), str(tmp_path / 'foreign.onnx'), dynamo=False)
    Image.new('RGB', (80, 80)).save(tmp_path / 'a.png')
    assert main(['predict', str(tmp_path / 'a.png'), '--model', str(tmp_path / 'foreign.onnx')]) == 2
    line = capsys.readouterr().err
    assert 'describes its preprocessing' in line and 'missing: input_size, interpolation, ' in line
    (tmp_path / 'damaged.onnx').write_text('no ONNX')
    assert main(['predict', str(tmp_path / 'a.png'), '--model', str(tmp_path / 'damaged.onnx')]) == 2
    assert 'damaged.onnx cannot be read: it is damaged or not an ONNX file' in capsys.readouterr().err
    assert main(['predict', str(tmp_path / 'a.png'), '--model', str(tmp_path / 'missing.onnx')]) == 2
    assert capsys.readouterr().err.startswith('error: no such file: ')
