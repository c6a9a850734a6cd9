"""`timm-mobileformer finetune`: what it reaches, what it leaves behind, how it goes on, and what it refuses."""
import argparse
import csv
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch.optim.swa_utils import update_bn
from torch.utils.data import RandomSampler

from timm_mobileformer.cli import main, training
from timm_mobileformer.cli.batches import EvenBatches, epoch_seed, make_loaders, set_batches
from timm_mobileformer.cli.data import open_data
from timm_mobileformer.cli.run_state import save_epoch

TINY = ('--model', 'test_mobileformer', '--img-size', '64', '--epochs', '2', '--batch-size', '16',
        '--epoch-repeats', '1', '--device', 'cpu', '--workers', '0')
EVERY_EPOCH = {'config.json', 'model.safetensors', 'last.pth.tar', 'summary.csv'}
FIGURES = {'curve.png', 'confusion.png', 'mistakes.png'}
FILES = EVERY_EPOCH | FIGURES | {
    'metrics.json', 'classes.csv', 'confusion.csv', 'predictions.csv', 'mistakes.csv'}


def command(*args):
    return [sys.executable, '-m', 'timm_mobileformer', 'finetune', *map(str, args)]


def run(*args, **kwargs):
    return subprocess.run(command(*args), capture_output=True, text=True, **kwargs)


def run_here(*args):
    """The same in this process, which spares the imports."""
    try:
        return main(['finetune', *map(str, args)])
    except SystemExit as stop:  # of argparse
        return stop.code


def refused(capsys, *args):
    """The one line on stderr with which `args` are refused."""
    assert run_here(*args) == 2
    *usage, line, end = capsys.readouterr().err.split('\n')
    assert 'error: ' in line and not end and all(line.startswith(('usage:', ' ')) for line in usage)
    return line


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def draw_shapes(root, train=24, val=8):
    """Filled circles and outlined squares, JPEG and PNG."""
    rng = random.Random(0)
    for split, count in ('train', train), ('val', val):
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


@pytest.fixture(scope='module')
def tiles(tmp_path_factory):
    """Five photographs in 48 tiles each, every other one for validation."""
    skimage = pytest.importorskip('skimage', reason='scikit-image brings photographs')
    sklearn = pytest.importorskip('sklearn', reason='scikit-learn brings photographs')
    root = tmp_path_factory.mktemp('tiles')
    for package, names in ((skimage, ('data/astronaut.png', 'data/coffee.png', 'data/rocket.jpg', 'data/ihc.png')),
                           (sklearn, ('datasets/images/flower.jpg',))):
        for path in (Path(package.__file__).parent / name for name in names):
            with Image.open(path) as photograph:
                width, height = photograph.width / 8, photograph.height / 6
                for i in range(48):
                    x, y = i % 8, i // 8
                    folder = root / ('val' if (x + y) % 2 else 'train') / path.stem
                    folder.mkdir(parents=True, exist_ok=True)
                    box = (x * width, y * height, (x + 1) * width, (y + 1) * height)
                    photograph.crop(tuple(map(round, box))).save(folder / f'{i}.png', icc_profile=None)  # as timm reads
    return root


def answers_by_timm(model, folder):
    """Logits and targets of the validation set by timm's own dataset and transforms."""
    loader = create_loader(
        create_dataset('', root=str(folder), split='validation'), batch_size=32, num_workers=0,
        device=torch.device('cpu'), **resolve_model_data_config(model))
    with torch.inference_mode():
        outputs = [(model.eval()(images), targets) for images, targets in loader]
    return tuple(torch.cat(tensors) for tensors in zip(*outputs, strict=True))


def top1_by_timm(model, folder):
    logits, targets = answers_by_timm(model, folder)
    return 100 * (logits.argmax(-1) == targets).float().mean().item()


def top1_printed(printed):
    return float(re.search(r'^validation set: top-1 ([\d.]+) %', printed, re.MULTILINE)[1])


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True)


def top1_by_epoch(folder):
    return [float(row['eval_top1']) for row in read_csv(folder / 'summary.csv')]


def test_the_digits_are_learnt_without_a_folder_from_the_first_epochs_on(finetuned, digits):
    folder, printed = finetuned
    assert '1,437 training and 360 validation images' in printed
    assert len(re.findall(r'^epoch ', printed, re.MULTILINE)) == 4
    output = folder / 'output' / 'finetune'
    assert os.listdir(folder) == ['output'] and {f.name for f in output.iterdir()} == FILES
    top1 = top1_printed(printed)
    assert top1 >= 88 and top1 == pytest.approx(max(top1_by_epoch(output)), abs=0.01)
    model = load(output)
    assert list(model.pretrained_cfg['label_names']) == list('0123456789')
    assert top1_by_timm(model, digits) == pytest.approx(top1, abs=0.01)


def test_photographs_are_learnt_in_eighty_steps_and_what_is_reported_is_what_is_kept(tmp_path, capsys, tiles):
    """What is kept must not lag behind what was trained: averages of all, BatchNorm's averages too, have 20 to 40 %."""
    assert not run_here('--data-dir', tiles, '--model', 'mobileformer_52m', '--img-size', 64, '--epochs', 8,
                        '--batch-size', 12, '--epoch-repeats', 1, '--lr', 2e-3, '--scale', 0.7, 1, '--hflip', 0,
                        '--device', 'cpu', '--workers', 0, '--output', tmp_path / 'out')
    top1 = top1_printed(capsys.readouterr().out)
    assert top1 >= 50
    by_epoch = top1_by_epoch(tmp_path / 'out')
    assert top1 == pytest.approx(max(by_epoch), abs=0.01)
    assert top1 == pytest.approx(top1_by_timm(load(tmp_path / 'out'), tiles), abs=0.01)

    rows = read_csv(tmp_path / 'out' / 'classes.csv')
    assert [row['class'] for row in rows] == ['astronaut', 'coffee', 'flower', 'ihc', 'rocket']
    assert all(row['train'] == row['images'] == '24' for row in rows)
    assert sum(int(row['right']) for row in rows) == round(top1 / 100 * 120)
    confusion = Counter({(row['class'], row['prediction']): int(row['images'])
                         for row in read_csv(tmp_path / 'out' / 'confusion.csv')})
    for row in rows:
        assert confusion[row['class'], row['class']] == int(row['right'])
        assert sum(confusion[row['class'], r['class']] for r in rows) == 24
        assert float(row['recall']) == pytest.approx(int(row['right']) / 24)
        predicted = sum(confusion[r['class'], row['class']] for r in rows)
        assert int(row['predicted']) == predicted
        assert not predicted or float(row['precision']) == pytest.approx(int(row['right']) / predicted)


# Ctrl-C, which a terminal sends to the workers too, after the first step of the second epoch.
INTERRUPTED = '''
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from timm_mobileformer.cli import main

saved = os.path.join(sys.argv[-1], 'last.pth.tar')  # in --output
register_optimizer_step_post_hook(lambda *_: os.path.exists(saved) and os.killpg(0, signal.SIGINT))
sys.exit(main())
'''


def test_a_hundred_photographs_are_learnt_in_three_epochs(tmp_path, capsys):
    """Pieces of the two photographs inside scikit-learn."""
    for photograph in pytest.importorskip('sklearn.datasets').load_sample_images().images:
        rows = [column for row in np.array_split(photograph, 10) for column in np.array_split(row, 10, axis=1)]
        folder = tmp_path / 'pieces' / ('sky' if photograph[0, 0, 2] > 128 else 'flower')
        folder.mkdir(parents=True)
        for i, pixels in enumerate(rows[::2]):
            Image.fromarray(pixels).save(folder / f'{i}.png')
    assert not run_here('--data-dir', tmp_path / 'pieces', '--model', 'test_mobileformer', '--img-size', 32,
                        '--epochs', 3, '--device', 'cpu', '--workers', 0, '--output', tmp_path / 'out')
    printed = capsys.readouterr().out
    assert '80 training and 20 validation images' in printed
    assert 'an epoch is 8 passes over the images in 20 batches of up to 32' in printed
    assert top1_printed(printed) >= 80  # by a model for tests, of chance 50


def test_interrupted_and_resumed_it_comes_to_the_same_result_to_the_bit(tmp_path, shapes, capsys):
    settings = ('--data-dir', shapes, *TINY, '--epochs', 4, '--aa', 'rand-m5', '--drop', 0.1, '--drop-path', 0.1,
                '--balanced', '--threads', 1)
    assert not run_here(*settings, '--output', tmp_path / 'atomic_dir')
    once = capsys.readouterr().out

    part = tmp_path / 'a part'
    process = subprocess.run([sys.executable, '-c', INTERRUPTED, 'finetune', *map(str, settings), '--workers', '2',
                              '--output', part], capture_output=True, text=True, start_new_session=True)
    assert process.returncode == 130
    line, end = process.stderr.split('\n')
    assert f"finetune --resume '{part}'" in line and not end
    assert {f.name for f in part.iterdir()} == EVERY_EPOCH
    assert list(load(part).pretrained_cfg['label_names']) == ['circle', 'square']
    assert len(top1_by_epoch(part)) == 1

    assert not run_here('--resume', part, '--workers', 1)
    again = capsys.readouterr().out
    assert top1_printed(again) == top1_printed(once)
    for line, subcommand in zip(again.splitlines()[-2:], ('predict', 'export'), strict=True):
        _, name, *_, model = shlex.split(line.partition(': ')[2])
        assert (name, model) == (subcommand, str(part))
    assert {f.name for f in part.iterdir()} == FILES
    for name in FILES - {'last.pth.tar'}:
        assert (part / name).read_bytes() == (tmp_path / 'atomic_dir' / name).read_bytes(), name
    ends = [torch.load(run / 'last.pth.tar', weights_only=True) for run in (part, tmp_path / 'atomic_dir')]
    assert ends[0]['epoch'] == 3 and ends[0]['history'] == ends[1]['history']
    torch.testing.assert_close(ends[0]['state_dict'], ends[1]['state_dict'], rtol=0, atol=0)
    torch.testing.assert_close(ends[0]['optimizer'], ends[1]['optimizer'], rtol=0, atol=0)

    assert not run_here(*settings, '--seed', 1, '--output', tmp_path / 'other')
    assert (tmp_path / 'other' / 'model.safetensors').read_bytes() != (part / 'model.safetensors').read_bytes()


def test_a_run_is_resumed_as_it_was_and_on_the_same_images(tmp_path, shapes, capsys):
    out = tmp_path / 'out'
    assert not run_here('--data-dir', shapes, *TINY, '--output', out)
    assert '--lr' in refused(capsys, '--resume', out, '--lr', 1)
    assert 'has no run to resume' in refused(capsys, '--resume', shapes)
    shapes.rename(tmp_path / 'moved')
    assert f'no such folder: {shapes}' in refused(capsys, '--resume', out)
    assert not run_here('--resume', out, '--data-dir', tmp_path / 'moved')  # all epochs are there: the report alone
    next((tmp_path / 'moved' / 'val').rglob('*.png')).unlink()
    assert 'other images' in refused(capsys, '--resume', out, '--data-dir', tmp_path / 'moved')
    (out / 'last.pth.tar').write_bytes((out / 'last.pth.tar').read_bytes()[:1000])
    assert 'damaged' in refused(capsys, '--resume', out, '--data-dir', tmp_path / 'moved')
    assert 'is not empty' in refused(capsys, '--data-dir', tmp_path / 'moved', *TINY, '--output', out)


def test_a_run_is_resumed_from_another_directory_and_for_more_epochs(tmp_path, shapes, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not run_here('--data-dir', 'shapes', *TINY, '--epochs', 1, '--output', 'first')
    assert not run_here('--data-dir', 'shapes', *TINY, '--model', 'first', '--output', 'out')
    monkeypatch.chdir(shapes)
    assert 'can only raise' in refused(capsys, '--resume', tmp_path / 'out', '--epochs', 1)
    assert not run_here('--resume', tmp_path / 'out', '--epochs', 3)
    assert '2 of 3 epochs done' in capsys.readouterr().out
    rates = [float(row['lr']) for row in read_csv(tmp_path / 'out' / 'summary.csv')]
    assert len(rates) == 3 and rates[2] < 1e-5  # the schedule is that of 3 epochs


def test_a_run_of_a_model_of_a_fixed_size_is_resumed_with_the_size_of_its_weights(tmp_path, shapes):
    options = dict(img_size=96, crop_pct=0.8, mean=[0.3, 0.4, 0.5])  # of train.py
    weights = timm.create_model('test_vit', num_classes=4, img_size=96).state_dict()
    torch.save({'state_dict': weights, 'args': argparse.Namespace(**options)}, tmp_path / 'last.pth.tar')
    start = ('--data-dir', shapes, '--batch-size', 16, '--epoch-repeats', 1, '--epochs', 1, '--device', 'cpu',
             '--workers', 0)
    for name, size, *named in (('first', 96, 'test_vit', '--checkpoint', tmp_path / 'last.pth.tar'),
                               ('second', 64, tmp_path / 'first', '--img-size', 64)):
        assert not run_here(*start, '--output', tmp_path / name, '--model', *named)
        assert not run_here('--resume', tmp_path / name, '--epochs', 2)
        assert len(top1_by_epoch(tmp_path / name)) == 2
        config = resolve_model_data_config(model := load(tmp_path / name))
        assert config['input_size'] == (3, size, size)
        assert (config['crop_pct'], list(config['mean'])) == (0.8, options['mean'])
        assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 2)


def test_a_folder_belongs_to_one_run_until_its_process_ends(tmp_path, shapes, capsys):
    settings = ('--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    with subprocess.Popen(command(*settings, '--epoch-repeats', 10000, '--workers', 1), stdout=subprocess.PIPE,
                          text=True, env={**os.environ, 'PYTHONUNBUFFERED': '1'}, start_new_session=True) as first:
        next(line for line in first.stdout if 'training and ' in line)
        for named in settings, ('--resume', tmp_path / 'out'):
            assert f'another run is writing to {tmp_path / "out"}' in refused(capsys, *named)
        os.killpg(first.pid, signal.SIGKILL)  # before its first epoch ends; a worker that just starts would live on
    assert 'has no run to resume' in refused(capsys, '--resume', tmp_path / 'out')
    assert not run_here(*settings)
    assert {f.name for f in (tmp_path / 'out').iterdir()} == FILES


@pytest.mark.parametrize('num_images', [2, 3, 12, 13, 80, 216, 1279, 1437, 100_000])
def test_every_image_is_trained_on_in_enough_steps(num_images):
    args = argparse.Namespace(batch_size=None, epoch_repeats=None)
    printed = set_batches(args, num_images)
    batches = list(EvenBatches(RandomSampler(range(num_images), num_samples=args.epoch_repeats * num_images),
                               args.batch_size))
    sizes = {len(batch) for batch in batches}
    assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(num_images), args.epoch_repeats)
    assert max(sizes) - min(sizes) <= 1 and 16 <= max(sizes) <= 64
    assert len(batches) >= 20 and f'{len(batches):,} batches' in printed
    assert args.epoch_repeats == 1 or len(batches) <= 40


@pytest.mark.parametrize('num_images, batch_size', [(3, 2), (9, 2), (26, 5), (7, 100)])
def test_no_batch_has_a_single_image(num_images, batch_size):
    assert min(map(len, EvenBatches(range(num_images), batch_size))) >= 2


def test_statistics_of_batch_norm_belong_to_the_weights(tmp_path, shapes):
    """After six steps, running averages would still be half their initial values."""
    assert not run_here('--data-dir', shapes, *TINY, '--epoch-repeats', 1, '--output', tmp_path / 'out')
    model = load(tmp_path / 'out')
    loader = create_loader(
        create_dataset('', root=str(shapes), split='train'), batch_size=16, num_workers=0, device=torch.device('cpu'),
        **resolve_model_data_config(model))
    saved = {key: value.clone() for key, value in model.named_buffers()}
    update_bn(loader, model)
    for name, module in model.named_modules():
        if hasattr(module, 'running_mean'):
            mean, var = saved[f'{name}.running_mean'], saved[f'{name}.running_var']
            assert ((mean - module.running_mean).abs() / module.running_var.sqrt()).median() < 0.3
            assert (var / module.running_var).median() == pytest.approx(1, abs=0.3)


def test_the_best_epoch_is_what_is_kept_and_reported_and_patience_counts_from_it(tmp_path, shapes, capsys):
    shutil.rmtree(shapes / 'val')  # the training images with the labels exchanged: what is learnt makes it worse
    for label, other in ('circle', 'square'), ('square', 'circle'):
        shutil.copytree(shapes / 'train' / label, shapes / 'val' / other)
    out = tmp_path / 'out'
    assert not run_here('--data-dir', shapes, *TINY, '--epochs', 12, '--lr', 5e-3, '--scale', 1, 1, '--patience', 4,
                        '--output', out)
    losses = [float(row['eval_loss']) for row in read_csv(out / 'summary.csv')]
    best = max(range(len(losses)), key=lambda i: (top1_by_epoch(out)[i], -losses[i]))
    assert len(losses) == best + 5 < 12 and losses[best] + 0.01 < losses[-1]
    logits, targets = answers_by_timm(load(out), shapes)
    assert F.cross_entropy(logits, targets).item() == pytest.approx(losses[best], abs=1e-4)

    for predicted in 0, 1:  # what is reported is what model.safetensors answers, not what training ended with
        tensors = load_file(out / 'model.safetensors')
        tensors['classifier.weight'].zero_()
        tensors['classifier.bias'].copy_(torch.eye(2)[predicted])
        save_file(tensors, out / 'model.safetensors', metadata={'format': 'pt'})
        assert not run_here('--resume', out)
        assert [row['predicted'] for row in read_csv(out / 'classes.csv')] == ['48', '0'][::1 - 2 * predicted]


@pytest.fixture(scope='module')
def plain_run(tmp_path_factory):
    """Arguments of a short run, and the weights that it comes to."""
    folder = tmp_path_factory.mktemp('plain')
    args = ('--data-dir', draw_shapes(folder / 'shapes', train=8, val=2), *TINY)
    assert not run_here(*args, '--output', folder / 'out')
    return args, (folder / 'out' / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('option', [
    '', '--lr 2e-3', '--weight-decay 1', '--layer-decay 0.5', '--smoothing 0.3', '--amp', '--drop 0.5',
    '--drop-path 0.5', '--scale 0.2 0.3', '--hflip 0', '--aa rand-m9', '--seed 1', '--batch-size 8',
    '--epoch-repeats 2'])
def test_every_option_of_training_is_felt(plain_run, tmp_path, option):
    args, weights = plain_run
    assert not run_here(*args, *option.split(), '--output', tmp_path)
    assert ((tmp_path / 'model.safetensors').read_bytes() == weights) == (not option)


def test_a_run_is_not_resumed_with_other_labels_of_the_same_images(tmp_path, shapes, capsys):
    pytest.importorskip('pandas', reason='pandas reads tables')
    labels, names = tmp_path / 'labels.csv', [f'{i}.{"jpg" if i % 2 else "png"}' for i in range(24)]
    rows = [f'{name},{"ab"[i % 2]}\n' for i, name in enumerate(names)]
    labels.write_text('file,label\n' + ''.join(rows))
    data = ('--data-dir', shapes / 'train' / 'circle', '--labels', labels)
    assert not run_here(*data, *TINY, '--output', tmp_path / 'out')
    for others in rows[1:], [row.replace(',a', ',A') for row in rows], [
            row.translate({ord('a'): 'b', ord('b'): 'a'}) for row in rows]:
        labels.write_text('file,label\n' + ''.join(others))
        assert 'was trained on other' in refused(capsys, '--resume', tmp_path / 'out')


def test_uneven_classes_are_said_and_sampled_evenly_if_asked(tmp_path, shapes, capsys):
    for path in [*(shapes / 'train' / 'circle').iterdir()][6:] + [*(shapes / 'val' / 'circle').iterdir()][2:]:
        path.unlink()
    assert not run_here('--data-dir', shapes, *TINY, '--epochs', 1, '--output', tmp_path / 'out')
    recalls = [float(row['recall']) for row in read_csv(tmp_path / 'out' / 'classes.csv')]
    assert f'of 10), mean over classes {100 * sum(recalls) / 2:.2f} %' in capsys.readouterr().out

    shares = []
    for balanced in False, True:
        args = argparse.Namespace(batch_size=10, epoch_repeats=1, workers=0, scale=None, hflip=0, aa=None, img_size=32,
                                  balanced=balanced, seed=0, epochs=20)
        loader, _ = make_loaders(args, open_data(shapes), timm.create_model('test_mobileformer'), torch.device('cpu'))
        shares.append(torch.cat([target for _, target in loader]).float().mean().item())
    assert shares == pytest.approx([24 / 30, 1 / 2], abs=0.05)


@pytest.mark.parametrize('model', ['test_mobileformer', 'test_vit'])  # the second for one size, and with other names
def test_other_models_and_settings_can_be_trained_and_loaded(tmp_path, shapes, model):
    before = sorted(shapes.rglob('*'))
    assert not run_here('--data-dir', shapes, *TINY, '--model', model, '--layer-decay', 0.9, '--amp', '--epochs', 1,
                        '--output', tmp_path / 'new' / 'run')
    assert sorted(shapes.rglob('*')) == before and {f.name for f in tmp_path.iterdir()} == {'shapes', 'new'}
    assert load(tmp_path / 'new' / 'run').eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_training_starts_from_weights_by_every_name(tmp_path, shapes, capsys):
    torch.save(timm.create_model('test_mobileformer').state_dict(), tmp_path / 'published.pth')  # 1000 classes
    settings = ('--data-dir', shapes, *TINY, '--epochs', 1, '--lr', 0)
    assert not run_here(*settings, '--checkpoint', tmp_path / 'published.pth', '--output', tmp_path / 'first')
    assert not run_here(*settings, '--model', tmp_path / 'first', '--seed', 1, '--output', tmp_path / 'again')
    published, first, again = (timm.models.load_state_dict(str(tmp_path / name)) for name in (
        'published.pth', 'first/model.safetensors', 'again/model.safetensors'))
    for name, tensor in again.items():
        if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked')):
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=0)
            assert name.startswith('classifier.') or torch.equal(tensor, published[name])
    assert 'from scratch' not in capsys.readouterr().out


def test_a_finetuned_folder_is_finetuned_on_other_classes(tmp_path, shapes, capsys):
    assert not run_here('--data-dir', shapes, *TINY, '--epochs', 1, '--output', tmp_path / 'first')
    assert 'from scratch' in capsys.readouterr().out
    for split in 'train', 'val':
        (shapes / split / 'circle').rename(shapes / split / 'disc')
    assert not run_here('--data-dir', shapes, *TINY, '--epochs', 1, '--model', tmp_path / 'first', '--crop-mode',
                        'squash', '--crop-pct', 1, '--output', tmp_path / 'second')
    cfg = json.loads((tmp_path / 'second' / 'config.json').read_text())
    assert cfg['label_names'] == ['disc', 'square'] and 'circle' not in json.dumps(cfg)
    assert (cfg['pretrained_cfg']['crop_mode'], cfg['pretrained_cfg']['crop_pct']) == ('squash', 1)


@pytest.mark.parametrize('option, value, wanted', [
    ('--model', 'mobileformer_25m', 'mobileformer_26m'),
    ('--model', 'resnet18.nobody', 'nobody'),
    ('--device', 'abacus', 'abacus'),
    ('--device', 'meta', '--device meta holds shapes without values'),
    ('--aa', 'bold', 'bold'),
    ('--checkpoint', 'missing.pth', 'missing.pth'),
    ('--checkpoint', __file__, 'test_finetune.py'),
    ('--checkpoint', 'other', 'stages.'),
    ('--output', __file__, 'test_finetune.py is a file'),
    ('--epochs', 0, '--epochs: must be at least 1, not 0'),
    ('--val-split', 1, '--val-split'),
    ('--labels', 'missing.csv', 'missing.csv'),
    ('--colour', 'red', '--colour'),
])
def test_an_argument_that_cannot_be_used_is_refused_in_one_line(tmp_path, shapes, capsys, option, value, wanted):
    if value == 'other':
        value = tmp_path / 'other.pth'
        torch.save(timm.create_model('test_convnext').state_dict(), value)
    assert wanted in refused(capsys, '--data-dir', shapes, *TINY, '--output', tmp_path / 'out', option, value)
    assert not (tmp_path / 'out').exists()


def test_a_policy_that_fails_with_this_pillow_is_refused_with_one_that_does_not(tmp_path, shapes, capsys):
    settings = ('--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    try:
        ImageOps.posterize(Image.new('RGB', (1, 1)), 0)
    except ValueError:
        assert '--aa rand-m10-inc1-mmax9' in refused(capsys, *settings, '--aa', 'rand-m10-inc1')
    assert not run_here(*settings, '--epochs', 8, '--aa', 'rand-m10-inc1-mmax9')  # 51 times Posterize on average


def test_several_processes_are_sent_to_train_py(tmp_path, shapes, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # as torchrun does
    line = refused(capsys, '--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    assert 'train.py' in line and 'timm-mobileformer recipe finetune' in line
    assert not (tmp_path / 'out').exists()


def test_pictures_that_cannot_be_read_are_named_before_training(tmp_path, shapes, capsys):
    path = shapes / 'val' / 'circle' / '3.jpg'
    path.write_bytes(path.read_bytes()[:-40])
    line = refused(capsys, '--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    assert f'1 of 64 images cannot be used: {path}' in line
    assert os.listdir(tmp_path / 'out') == ['bad_images.csv']  # the same command starts once the image is mended


@pytest.mark.parametrize('workers, spoil, problem', [
    (0, lambda path: path.write_bytes(path.read_bytes()[:-40]), ''),
    (1, lambda path: path.write_bytes(b'no image'), 'cannot identify image file'),
    (1, lambda path: path.unlink(), 'No such file or directory')])
def test_a_picture_that_is_spoilt_in_training_is_named_and_the_run_goes_on(
        tmp_path, shapes, capsys, monkeypatch, workers, spoil, problem):
    out, path = tmp_path / 'out', shapes / 'train' / 'circle' / '3.jpg'
    good = path.read_bytes()

    def save_and_spoil(*args):
        save_epoch(*args)
        if path.exists() and path.read_bytes() == good:
            spoil(path)

    monkeypatch.setattr(training, 'save_epoch', save_and_spoil)
    settings = ('--data-dir', shapes, *TINY, '--epochs', 4, '--workers', workers, '--output', out)
    line = refused(capsys, *settings)
    assert re.search(rf'^error: {path} can no longer be read: .*{problem}.*; \d of 4 epochs done, to continue: ', line)
    path.write_bytes(good)
    monkeypatch.undo()
    assert not run_here('--resume', out)
    assert len(top1_by_epoch(out)) == 4


def test_a_run_whose_worker_is_killed_or_whose_report_is_interrupted_ends_in_one_line_and_goes_on(
        tmp_path, shapes, capsys, monkeypatch):
    out = tmp_path / 'out'

    def kill_in_the_second_epoch(args, epoch):
        for worker in multiprocessing.active_children() if epoch == 1 else ():
            os.kill(worker.pid, signal.SIGKILL)  # as the kernel does when memory is full
        return epoch_seed(args, epoch)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, 'epoch_seed', kill_in_the_second_epoch)
    line = refused(capsys, '--data-dir', shapes, *TINY, '--epochs', 4, '--workers', 1, '--output', out)
    assert re.search('^error: a worker that reads images was killed .*; 1 of 4 epochs done, to continue: ', line)
    monkeypatch.undo()
    monkeypatch.setattr(training, 'report', interrupt)
    assert run_here('--resume', out) == 130
    assert 'interrupted; 4 of 4 epochs done, to continue: ' in capsys.readouterr().err
    monkeypatch.undo()
    assert not run_here('--resume', out)
    assert {f.name for f in out.iterdir()} == FILES


def test_a_loss_that_is_no_number_ends_training_in_one_line(tmp_path, shapes, capsys):
    line = refused(capsys, '--data-dir', shapes, *TINY, '--lr', 1e30, '--output', tmp_path / 'out')
    assert re.search('the loss became (nan|inf) in epoch 1; a smaller --lr may help', line)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, shapes):
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    done = run('--data-dir', shapes, *TINY, '--output', tmp_path / 'out', preexec_fn=no_large_files)
    assert done.returncode == 2
    line, end = done.stderr.split('\n')
    assert line.startswith(f'error: nothing could be written to {tmp_path / "out"}; ') and not end
    assert not (tmp_path / 'out').exists()


def test_files_have_the_permissions_that_the_umask_says(tmp_path, shapes):
    before = os.umask(0o027)
    try:
        assert not run_here('--data-dir', shapes, *TINY, '--epochs', 1, '--output', tmp_path / 'out')
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / 'out').iterdir()} == {0o640}


def test_without_the_demo_extra_it_says_what_to_install(tmp_path, shapes, capsys, monkeypatch):
    for package in 'sklearn', 'sklearn.datasets', 'matplotlib':
        monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'timm_mobileformer[demo]'" in refused(capsys, *TINY, '--output', tmp_path / 'digits')
    assert not run_here('--data-dir', shapes, *TINY, '--output', tmp_path / 'out')
    assert "no figures will be drawn: pip install 'timm_mobileformer[demo]'" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / 'out').iterdir()} == FILES - FIGURES
