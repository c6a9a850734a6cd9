"""`python -m timm_mobileformer.finetune`: what it reaches, what it leaves behind, and what it refuses."""
import os
import random
import re
import resource
import signal
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_dataset, create_loader, resolve_model_data_config

import timm_mobileformer  # noqa: F401  registers the models
from timm_mobileformer import finetune

TINY = ('--model', 'test_mobileformer', '--img-size', '64', '--epochs', '2', '-b', '16', '--device', 'cpu')
FILES = {'model_best.pth.tar', 'last.pth.tar', 'model.safetensors', 'config.json', 'predictions.png'}


def command(*args):
    return [sys.executable, '-m', 'timm_mobileformer.finetune', *map(str, args)]


def run(*args, **kwargs):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=900, **kwargs)


def run_here(*args):
    """The same in this process, which spares the imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['finetune', *map(str, args)])
        finetune.main()


def refused(capsys, *args):
    """The one line on stderr with which `args` are refused."""
    with pytest.raises(SystemExit) as stop:
        run_here(*args)
    assert stop.value.code == 2
    line, end = capsys.readouterr().err.split('\n')
    assert line.startswith('error: ') and not end
    return line


def draw_shapes(root, train=24, held_out=8, names=('train', 'validation')):
    """Filled circles and outlined squares, JPEG and PNG."""
    rng = random.Random(0)
    for split, count in zip(names, (train, held_out), strict=True):
        for shape in ('circle', 'square'):
            folder = root / split / shape
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new('RGB', (80, 64), tuple(rng.randrange(60) for _ in range(3)))
                x, y, r = rng.randrange(20, 60), rng.randrange(20, 44), rng.randrange(8, 18)
                draw, color = ImageDraw.Draw(image), tuple(rng.randrange(150, 256) for _ in range(3))
                if shape == 'circle':
                    draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
                else:
                    draw.rectangle((x - r, y - r, x + r, y + r), outline=color, width=3)
                image.save(folder / f'{i}.{"jpg" if i % 2 else "png"}')
    return root


@pytest.fixture
def shapes(tmp_path):
    return draw_shapes(tmp_path / 'shapes')


def loaded(printed):
    """The two models that the printed lines make."""
    calls = re.findall(r'^timm\.create_model\(.*?\)(?= )', printed, re.MULTILINE)
    assert len(calls) == 2
    return [eval(call, {'timm': timm}).eval() for call in calls]


def top1_by_timm(model, folder, **data_config):
    """Held-out accuracy by timm's own dataset and transforms."""
    loader = create_loader(
        create_dataset('', root=str(folder), split='validation'), batch_size=32, num_workers=0,
        device=torch.device('cpu'), **{**resolve_model_data_config(model), **data_config})
    with torch.inference_mode():
        hits = torch.cat([model(images).argmax(-1) == target for images, target in loader])
    return 100 * hits.float().mean().item()


@pytest.mark.timeout(900)
def test_the_digits_are_learnt_to_97_5_percent_by_the_bare_command(tmp_path):
    pytest.importorskip('sklearn', reason='scikit-learn brings the digits')
    pytest.importorskip('matplotlib', reason='matplotlib draws the picture')
    from timm_mobileformer.digits import write_digits

    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'training: 100%' in done.stderr
    assert '1,437 images to train on, 360 held out' in done.stdout
    top1 = float(re.search(r'^held-out top-1 ([\d.]+) %', done.stdout, re.MULTILINE)[1])
    assert top1 >= 97.5
    assert 'mistakes' in done.stdout

    output = tmp_path / 'output' / 'finetune'
    assert os.listdir(tmp_path) == ['output']
    assert {f.name for f in output.iterdir()} >= FILES
    assert min(Image.open(output / 'predictions.png').size) > 300

    write_digits(tmp_path / 'digits')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        by_checkpoint, by_folder = loaded(done.stdout)
    assert list(by_folder.pretrained_cfg['label_names']) == list('0123456789')
    assert top1_by_timm(by_checkpoint, tmp_path / 'digits', input_size=(3, 64, 64)) == pytest.approx(top1, abs=0.01)
    assert top1_by_timm(by_folder, tmp_path / 'digits') == pytest.approx(top1, abs=0.01)


def test_the_same_seed_gives_the_same_weights(tmp_path, shapes):
    settings = ('--data-dir', shapes, *TINY, '--workers', 2)
    run(*settings, '--seed', 1, '--output', tmp_path / 'a', check=True)
    run(*settings, '--seed', 1, '--output', tmp_path / 'b', check=True)
    run_here(*settings, '--seed', 2, '--output', tmp_path / 'c')
    a, b, c = (timm.models.load_state_dict(str(tmp_path / output / 'last.pth.tar')) for output in 'abc')
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize('model, names', [
    ('test_mobileformer', ('train', 'val')),
    ('test_vit', ('training', 'validation')),  # built for one size, and with layers named otherwise
])
def test_a_folder_of_images_trains_a_model_of_timm(tmp_path, capsys, model, names):
    shapes = draw_shapes(tmp_path / 'shapes', names=names)
    before = sorted(shapes.rglob('*'))
    run_here('--data-dir', shapes, *TINY, '--model', model, '--layer-decay', 0.9, '--aa', 'rand-m5', '--amp',
             '--workers', 0, '--output', tmp_path / 'new' / 'run')
    assert sorted(shapes.rglob('*')) == before and {f.name for f in tmp_path.iterdir()} == {'shapes', 'new'}
    for built in loaded(capsys.readouterr().out):
        assert built(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_training_goes_on_from_a_checkpoint(tmp_path, shapes, capsys):
    torch.save(timm.create_model('test_mobileformer').state_dict(), tmp_path / 'published.pth')  # 1000 classes
    settings = ('--data-dir', shapes, *TINY, '--workers', 0)
    line = refused(capsys, *settings, '--initial-checkpoint', tmp_path / 'published.pth', '--output', tmp_path / 'no')
    assert 'published.pth' in line and 'classifier.weight' in line

    run_here(*settings, '--pretrained-path', tmp_path / 'published.pth', '--output', tmp_path / 'first')
    best = tmp_path / 'first' / 'model_best.pth.tar'
    run_here(*settings, '--lr', 0, '--initial-checkpoint', best, '--output', tmp_path / 'again')
    old, new = (timm.models.load_state_dict(str(tmp_path / run / 'model_best.pth.tar')) for run in ('first', 'again'))
    assert all(torch.allclose(old[k], new[k]) for k in old if not k.endswith(('_mean', '_var', '_tracked')))


def spoil(name, root):
    """Make of good class folders bad ones; returns what the error must name."""
    train, held_out = root / 'train', root / 'validation'
    if name == 'no folder':
        root.rename(root.with_name('elsewhere'))
        return str(root)
    if name == 'no train':
        train.rename(root / 'images')
        return 'train or training'
    if name == 'no validation':
        held_out.rename(root / 'test')
        return 'validation or val'
    if name == 'empty class':
        (train / 'triangle').mkdir()
        return str(train / 'triangle')
    if name == 'no images':
        for path in train.rglob('*.*'):
            path.unlink()
        return str(train)
    if name == 'one class':
        for split in train, held_out:
            (split / 'square').rename(root / split.name[0])
        return 'one class only (circle)'
    if name == 'other classes':
        (held_out / 'square').rename(held_out / 'triangle')
        return f'only in {train}: square; only in {held_out}: triangle'
    if name == 'loose image':
        (train / 'circle' / '0.png').rename(train / 'stray.png')
        return 'stray.png'
    path = held_out / 'circle' / {'truncated PNG': '2.png', 'truncated JPEG': '3.jpg', 'text': '2.png'}[name]
    path.write_bytes(b'no image' if name == 'text' else path.read_bytes()[:-40])
    return f'1 of 64 images cannot be read: {path}' if name != 'text' else str(path)


@pytest.mark.parametrize('name', [
    'no folder', 'no train', 'no validation', 'empty class', 'no images', 'one class', 'other classes', 'loose image',
    'truncated PNG', 'truncated JPEG', 'text',
])
def test_a_folder_that_cannot_be_learnt_is_refused_in_one_line(tmp_path, shapes, capsys, name):
    wanted = spoil(name, shapes)
    assert wanted in refused(capsys, '--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('option, value, wanted', [
    ('--model', 'mobileformer_25m', 'mobileformer_26m'),
    ('--model', 'resnet18.nobody', 'nobody'),
    ('--device', 'abacus', 'abacus'),
    ('--aa', 'bold', 'bold'),
    ('--initial-checkpoint', 'missing.pth', 'no such checkpoint: missing.pth'),
    ('--initial-checkpoint', __file__, 'test_finetune.py'),
    ('--pretrained-path', 'other', 'stages.'),
    ('--output', __file__, 'test_finetune.py is there already'),
])
def test_an_argument_that_cannot_be_used_is_refused_in_one_line(tmp_path, shapes, capsys, option, value, wanted):
    if value == 'other':
        value = tmp_path / 'other.pth'
        torch.save(timm.create_model('test_convnext').state_dict(), value)
    line = refused(capsys, '--data-dir', shapes, *TINY, '--output', tmp_path / 'out', option, value)
    assert wanted in line
    assert not (tmp_path / 'out').exists()


def test_a_loss_that_is_no_number_ends_training_in_one_line(tmp_path, shapes, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here('--data-dir', shapes, *TINY, '--lr', 1e30, '--workers', 0, '--output', tmp_path / 'out')
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()  # under the progress bar
    assert line.startswith('error: the loss became nan in epoch ')


def test_a_finished_run_is_never_overwritten(tmp_path, shapes):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'last.pth.tar').write_text('precious')
    done = run('--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    assert done.returncode == 2
    assert done.stderr == f'error: {tmp_path / "out"} is there already; name a new folder with --output, or remove it\n'
    assert (tmp_path / 'out' / 'last.pth.tar').read_text() == 'precious'


def test_interrupted_training_keeps_its_best_checkpoint(tmp_path, shapes):
    args = command('--data-dir', shapes, *TINY, '--epochs', 1000, '--workers', 2, '--output', tmp_path / 'out')
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          env={**os.environ, 'PYTHONUNBUFFERED': '1'}) as process:
        next(line for line in process.stdout if line.startswith('epoch   2 of'))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers too
        _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert 'Traceback' not in errors
    assert errors.splitlines()[-1].startswith(f'interrupted; {tmp_path / "out" / "model_best.pth.tar"}')
    timm.create_model('test_mobileformer', num_classes=2, checkpoint_path=tmp_path / 'out' / 'model_best.pth.tar')
    assert not (tmp_path / 'out' / 'tmp.pth.tar').exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path, shapes):
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = run('--data-dir', shapes, *TINY, '--workers', 0, '--output', tmp_path / 'out', preexec_fn=no_large_files)
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'error: no checkpoint could be written to {tmp_path / "out"}; ')
    assert not (tmp_path / 'out').exists()


def test_without_the_demo_extra_it_says_what_to_install(tmp_path, shapes, capsys, monkeypatch):
    for package in 'sklearn', 'sklearn.datasets', 'matplotlib':
        monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'timm_mobileformer[demo]'" in refused(capsys, *TINY, '--output', tmp_path / 'digits')

    run_here('--data-dir', shapes, *TINY, '--workers', 0, '--output', tmp_path / 'out')
    assert "no picture will be drawn: pip install 'timm_mobileformer[demo]'" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / 'out').iterdir()} >= FILES - {'predictions.png'}
    assert not (tmp_path / 'out' / 'predictions.png').exists()
