"""`timm-mobileformer`: what all subcommands share."""
import argparse
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import timm
import torch
from authors import author_state_dict
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

import timm_mobileformer
from timm_mobileformer.cli import console, main, options
from timm_mobileformer.cli.console import InputError, progress
from timm_mobileformer.cli.files import atomic_dir
from timm_mobileformer.cli.load import class_names, load_model
from timm_mobileformer.cli.run_state import claim

SUBCOMMANDS = {
    'benchmark', 'evaluate', 'export', 'finetune', 'models', 'predict', 'publish', 'recipe', 'tokens', 'weights'}


def command(*args, **kwargs):
    """A process of its own."""
    return subprocess.Popen([sys.executable, '-m', 'timm_mobileformer', *args], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def refused(capsys, *args):
    """The one line on stderr with which `args` are refused."""
    assert main([*map(str, args)]) == 2
    out, err = capsys.readouterr()
    line, end = err.split('\n')
    assert line.startswith('error: ') and not end and not out
    return line.removeprefix('error: ')


# The command

def test_the_installed_command_is_the_module():
    script, = entry_points(group='console_scripts', name='timm-mobileformer')
    assert script.load() is main
    out, _ = command('--help').communicate()
    assert set(re.findall(r'^    (\w+)', out, re.MULTILINE)) == SUBCOMMANDS == set(options.SUBCOMMANDS)


def test_help_and_wrong_arguments_are_answered_before_anything_heavy_is_imported(tmp_path):
    wrong = [['tokens', 'a.png', '--model', 'x', '--output', 'a.xyz'], ['export', 'tflite'], ['recipe', 'x'], [], ['x'],
             ['finetune', '--img-size', '8'], ['benchmark', '--rounds', '1'], ['publish'], ['weights', 'x'],
             ['models', '--colour'],
             ['tokens', 'a.png', '--model', 'x', '--checkpoint', 'missing.pth'], ['finetune', '--data-dir', 'missing']]
    code = f'''
import sys
from timm_mobileformer.cli import main
for argv in {[[name, '--help'] for name in sorted(SUBCOMMANDS)]!r}:
    try:
        main(argv)
    except SystemExit as e:
        assert e.code == 0
for argv in {wrong!r}:
    assert main(argv) == 2
assert not {{'torch', 'timm', 'numpy', 'PIL', 'matplotlib', 'huggingface_hub'}} & {{*sys.modules}}
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(wrong) and all(line.startswith('error: ') for line in lines)
    assert all(f'timm-mobileformer {name}' in done.stdout for name in SUBCOMMANDS)
    assert '\x1b' not in done.stdout  # no colours without a terminal


@pytest.mark.parametrize('args, wanted', [
    (('models', '--colour'), 'unrecognized arguments: --colour; see timm-mobileformer models --help'),
    (('finetune', '--seed', 2 ** 70), '--seed: must be from 0 to 4294967295, not 1180591620717411303424'),
    (('finetune', '--lr', 'fast'), "--lr: must be a number, not 'fast'"),
    (('export', 'onnx', '--threads', 0), '--threads: must be at least 1, not 0'),
    (('export', 'onnx', '--img-size', 16), '--img-size: must be at least 32, not 16'),
    (('export', 'onnx', '--val-split', 1), '--val-split: must be from 0.01 to 0.99, not 1.0'),
    (('export', 'onnx', '--labels', 'no.csv'), '--labels: no such file: no.csv'),
    (('export', 'onnx', '--data-dir', __file__), f'--data-dir: {__file__} is a file, not a folder'),
    (('export', 'onnx', '--model', 'x', '--pretrained', '--checkpoint', __file__), 'not allowed with argument'),
    (('publish', '--all', '.', '--model', 'x'), 'use --model NAME, --model NAME --checkpoint FILE, --model'),
    (('publish', '--all', '--validate-only'), '--validate-only needs a folder of ImageNet validation images'),
    (('weights', '--all', '--checkpoint', __file__), 'use NAME, NAME --checkpoint FILE, or --all'),
    (('publish', '--all', '.', '--repo-id', 'a/b'), '--repo-id is a single repository; use --namespace with --all'),
    (('recipe', 'mobileformer_1m'), 'there is no recipe mobileformer_1m; available recipes: finetune, '),
])
def test_a_wrong_argument_is_refused_in_one_line(capsys, args, wanted):
    assert wanted in refused(capsys, *args)


@pytest.mark.parametrize('args, key, other', [
    *(((*name, '--data-dir', '.', '--label-pattern', '(.)', *other), '--label-pattern', other[0])
      for name in (('finetune',), ('export', 'onnx'), ('evaluate', '--model', 'x'))
      for other in (('--label-column', 'x'), ('--skip-unlabeled',))),
    *((('export', 'onnx', '--images', '.', *other), '--images', other[0]) for other in (
        ('--data-dir', '.'), ('--labels', __file__), ('--label-column', 'x'), ('--label-pattern', '(.)'),
        ('--skip-unlabeled',), ('--skip-bad-images',), ('--val-split', '0.5'))),
    *((('publish', '--all', '--validate', '.', '--validate-only', *other), '--validate-only', other[0]) for other in (
        ('--namespace', 'x'), ('--private',), ('--revision', 'x'), ('--create-pr',), ('--dry-run', 'x'), ('--force',))),
])
def test_options_that_would_have_no_effect_together_are_refused(capsys, args, key, other):
    assert refused(capsys, *args) == f'not allowed with {key}: {other}'


@pytest.mark.parametrize('args, wanted', [
    (('export', 'executorch', 'aoti', '--max-drop', 0), '--max-drop applies to onnx-int8 and executorch-int8 only'),
    (('export', 'aoti', '--opset', 20), '--opset applies to onnx and onnx-int8 only'),
    (('export', 'aoti', '--runtime', '.'), '--runtime applies to web only'),
    (('benchmark', '--runtimes', 'onnx', '--channels-last'), '--channels-last applies to PyTorch only; add eager or'),
    (('publish', '--all', '--force'), '--force applies to --validate DIR only'),
    (('evaluate', '--model', 'x', '--skip-bad-images'), 'unrecognized arguments: --skip-bad-images'),
])
def test_an_option_that_would_have_no_effect_is_refused(capsys, args, wanted):
    assert wanted in refused(capsys, *args)


def test_a_timm_that_is_too_old_for_the_commands_is_named_beside_the_one_that_is_needed(capsys, monkeypatch):
    monkeypatch.setattr(options, 'version', {'timm': '1.0.28'}.get)
    for argv in ['models'], ['finetune'], ['export', 'onnx']:
        assert refused(capsys, *argv) == (
            f"{argv[0]} needs timm 1.0.29 or later, not 1.0.28: pip install 'timm>=1.0.29'")
    assert main(['recipe']) == 0


def test_an_option_is_called_and_read_the_same_in_every_subcommand():
    kinds = {}
    for name in options.SUBCOMMANDS:
        parser = argparse.ArgumentParser()
        import_module(f'timm_mobileformer.cli.{name}').add_options(parser)
        for action in parser._actions:
            for name in action.option_strings:
                is_flag = action.const is True  # perhaps with an optional value
                kinds.setdefault(name, set()).add((action.dest, None if is_flag else action.type))
    assert {'--model', '--checkpoint', '--pretrained', '--use-ema', '--img-size', '--batch-size', '--output',
            '--threads', '--workers', '--device', '--data-dir', '--labels', '--val-split'} <= kinds.keys()
    assert all(len(kind) == 1 for kind in kinds.values()), kinds


def test_the_models_are_listed_with_what_they_cost(capsys):
    assert main(['models']) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()
             if line.startswith('mobileformer_')}
    top1 = {'26m': 64.0, '52m': 68.7, '96m': 72.8, '151m': 75.2, '214m': 76.7, '294m': 77.9, '508m': 79.3}
    assert list(lines) == [f'mobileformer_{variant}' for variant in top1]
    for variant, (name, params, macs, _, found_top1, *_) in zip(top1, lines.values(), strict=True):
        model = timm.create_model(name, device='meta')
        assert int(params.replace(',', '')) == sum(p.numel() for p in model.parameters())
        assert 0.85 * int(variant[:-1]) < float(macs) <= int(variant[:-1])
        assert float(found_top1) == top1[variant]


def test_recipes_are_found_by_name(capsys):
    assert main(['recipe']) == 0
    names = capsys.readouterr().out.split()
    assert 'finetune' in names and len(names) == 8
    for name in names:
        assert main(['recipe', name]) == 0
        path = Path(capsys.readouterr().out.rstrip('\n'))
        assert path.stem == name and path.is_absolute() and path.is_file()


# What it is called from

def test_ctrl_c_during_imports_is_one_line_and_status_130(tmp_path):
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text(
        'import os, signal, time\n'
        'try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\nexcept BaseException as e:\n'
        '    raise ImportError("which many a package makes of anything") from e\n')
    process = command('models', env={**os.environ, 'PYTHONPATH': str(tmp_path), 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'})
    assert process.communicate() == ('', 'interrupted\n') and process.returncode == 130


def test_ctrl_c_during_work_is_one_line_and_status_130(capsys, monkeypatch):
    monkeypatch.setattr('timm_mobileformer.cli.model_table.count_macs', lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(['models']) == 130
    assert capsys.readouterr().err == 'interrupted\n'
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize('handler', [signal.SIG_IGN, lambda *_: None])
def test_a_program_may_call_it_from_any_thread_and_keeps_its_own_handler_of_ctrl_c(capsys, handler):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main(['recipe'])))
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert [*statuses, main(['recipe'])] == [0, 0] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--version'])
    assert stop.value.code == 0 and capsys.readouterr().out == f'timm-mobileformer {timm_mobileformer.__version__}\n'


def test_a_reader_that_has_enough_is_left_in_peace():
    process = command('recipe')
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (128 + signal.SIGPIPE, '')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'utf-8'])
def test_output_survives_any_encoding(tmp_path, monkeypatch, encoding):
    pytest.importorskip('matplotlib')
    Image.new('RGB', (40, 40)).save(tmp_path / 'été 日本.png')
    (tmp_path / 'names.txt').write_text('日本\nétoile\n→\n', encoding='utf-8')
    torch.save(timm.create_model('test_mobileformer', num_classes=3).state_dict(), tmp_path / 'weights.pth')
    monkeypatch.chdir(tmp_path)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(printed, encoding=encoding))
    assert main(['tokens', 'été 日本.png', '--model', 'test_mobileformer', '--checkpoint', 'weights.pth',
                 '--img-size', '32', '--class-map', 'names.txt']) == 0
    wanted = 'été 日本.png -> tokens.png'.encode(encoding, 'replace').decode(encoding)
    lines = printed.getvalue().decode(encoding).splitlines()
    assert lines[0] == wanted and len(lines) == 4
    for name in '日本', 'étoile', '→':
        assert any(line.endswith('%  ' + name.encode(encoding, 'replace').decode(encoding)) for line in lines)


@pytest.mark.skipif(not Path('/proc/self').exists(), reason='/proc is a folder that not even root can write to')
def test_it_works_without_a_home_and_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    torch.save(timm.create_model('test_mobileformer', num_classes=3).state_dict(), tmp_path / 'weights.pth')
    monkeypatch.chdir('/proc')
    for name in 'HOME', 'XDG_CACHE_HOME', 'HF_HOME':
        monkeypatch.delenv(name, raising=False)
    args = ('tokens', tmp_path / 'a.png', '--model', 'test_mobileformer', '--checkpoint', tmp_path / 'weights.pth')
    assert re.fullmatch(r'\. cannot be written to \(.*\); use another folder', refused(capsys, *args))
    assert main([*map(str, args), '--output', str(tmp_path / 'out.png')]) == 0
    assert (tmp_path / 'out.png').is_file()


def test_a_number_is_followed_by_the_right_form_of_its_noun():
    counts = ((0, 'image'), (1, 'image'), (1, 'validation batch'), (2, 'validation batch'), (3, 'class'),
              (1000, 'epoch'))
    assert [console.plural(*count) for count in counts] == [
        '0 images', '1 image', '1 validation batch', '2 validation batches', '3 classes', '1,000 epochs']


@pytest.mark.parametrize('is_terminal, seconds, shown', [
    (True, 30, r'\rcounting.*\r +\r'),  # a bar, removed when done
    (False, 30, ''),
    (False, 0, r'(counting: [^\r]*\n)+'),
])
def test_progress_is_a_bar_in_a_terminal_and_now_and_then_a_line_without_one(
        is_terminal, seconds, shown, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    monkeypatch.setattr(sys, 'stderr', stream := Stream())
    monkeypatch.setattr(console, 'SECONDS', seconds)
    assert list(progress(range(3), 'counting', mininterval=0)) == [0, 1, 2]
    assert re.fullmatch(shown, stream.getvalue(), re.DOTALL)


def test_what_is_to_be_pasted_into_a_shell_can_be(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    folder = tmp_path / 'it\'s  "mine" $HOME'
    folder.mkdir()
    for name in 'a.png', 'b.png':
        Image.new('RGB', (8, 8)).save(folder / name)
    line = refused(capsys, 'tokens', folder, '--model', 'x')
    pattern = line.partition('pass the images in it: ')[2]
    found = subprocess.run(['sh', '-c', f'ls {pattern}'], capture_output=True, text=True).stdout
    assert found.splitlines() == [f'{folder}/a.png', f'{folder}/b.png']
    line = refused(capsys, 'export', 'onnx', '--model', folder)
    assert shlex.split(line.partition('for a folder of train.py, use ')[2])[-1] == f'{folder}/model_best.pth.tar'


# Files

def test_files_are_whole_or_not_there_and_have_the_permissions_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_dir(tmp_path / 'new' / 'folder') as folder:
            save_file({'a': torch.ones(1)}, folder / 'a.safetensors')  # written for the owner alone
            (folder / 'b').write_text('first')
            assert os.listdir(tmp_path / 'new' / 'folder') == [folder.name]
    finally:
        os.umask(before)
    folder = tmp_path / 'new' / 'folder'
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {'a.safetensors': '0o640', 'b': '0o640'}
    assert folder.stat().st_mode & 0o777 == 0o750
    for where in folder, tmp_path / 'other':
        with pytest.raises(ZeroDivisionError), atomic_dir(where) as unfinished:
            (unfinished / 'b').write_text('second')
            1 / 0  # noqa: B018
    assert (folder / 'b').read_text() == 'first' and len(os.listdir(folder)) == 2
    assert os.listdir(tmp_path) == ['new']
    with (folder / 'b').open() as reader:  # of the file of before, which is replaced and not written into
        with atomic_dir(folder) as unfinished:
            (unfinished / 'b').write_text('second')
        assert (reader.read(), (folder / 'b').read_text()) == ('first', 'second')
    refusal = r'folder/b cannot be written to \(File exists\)'
    with pytest.raises(InputError, match=refusal), atomic_dir(folder / 'b'):
        pass


@pytest.mark.parametrize('args', [
    ('export', 'onnx', '--checkpoint', 'FILE', '--output'),
    ('evaluate', '--checkpoint', 'FILE', '--data-dir', '.', '--output'),
    ('publish', '--checkpoint', 'FILE', '--dry-run'),
    ('benchmark', '--output')])
def test_files_that_belong_together_are_of_one_command_since_a_second_is_refused(args, tmp_path, capsys, monkeypatch):
    if args[0] == 'export':
        pytest.importorskip('onnxscript')
    monkeypatch.chdir(tmp_path)
    Path('FILE').touch()
    with claim(Path('out')):
        assert refused(capsys, *args, 'out', '--model', 'test_mobileformer') == (
            'another run is writing to out; use another folder')
    assert os.listdir() == ['FILE']


def test_remains_of_a_killed_process_are_removed_and_what_another_is_writing_is_kept(tmp_path):
    def age(*paths):
        for path in paths:
            os.utime(path, (time.time() - 4000, time.time() - 4000))

    killed = tmp_path / '.killed.unfinished'
    killed.mkdir()
    (killed / 'model').touch()
    age(killed / 'model', killed)
    with atomic_dir(tmp_path) as slow:
        (slow / 'table.csv').touch()  # such as `predict --output` on many images, which adds to it all the time
        age(slow)
        with claim(tmp_path):
            assert not killed.exists()
        assert slow.exists()
    assert os.listdir(tmp_path) == ['table.csv']


def test_two_that_write_into_one_folder_at_once_publish_their_own_files_and_complete(tmp_path):
    out = tmp_path / 'out'
    with atomic_dir(out) as first:
        (first / 'model').write_text('half')
        with atomic_dir(out) as second:
            (second / 'model').write_text('of the second')
            (second / 'more').write_text('of the second')
        assert {p.name: p.read_text() for p in out.iterdir() if p.is_file()} == {
            'model': 'of the second', 'more': 'of the second'}
        with pytest.raises(ZeroDivisionError), atomic_dir(out) as third:
            (third / 'model').write_text('never')
            1 / 0  # noqa: B018
        (first / 'model').write_text('of the first')
    assert {p.name: p.read_text() for p in out.iterdir()} == {'model': 'of the first', 'more': 'of the second'}

    with atomic_dir(tmp_path / 'new') as first:  # one that fails leaves the folder to the other
        with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / 'new'):
            1 / 0  # noqa: B018
        (first / 'model').write_text('of the first')
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['model']


# A model and its weights

def parse(*args):
    return options.parse(['tokens', __file__, '--output', 'x.png', *map(str, args)])


def load(*args):
    return load_model(parse('--model', *args)).eval()


def size_of(model):
    return tuple(resolve_model_data_config(model)['input_size'][1:])


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Weights of three classes in files of every kind, and what they answer."""
    pytest.importorskip('matplotlib')
    folder = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=3).eval()
    tensors = {k: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(tensors)
    noise = {k: v * 0 for k, v in tensors.items()}
    of_train_py = argparse.Namespace(model='test_mobileformer', img_size=96, crop_pct=None, mean=None, interpolation='')
    parallel = {f'module.{k}': v for k, v in tensors.items()}
    torch.save(tensors, folder / 'plain.pth')
    save_file(tensors, folder / 'model.safetensors')
    torch.save({'state_dict': parallel, 'args': of_train_py}, folder / 'train.pth.tar')
    torch.save({'state_dict': noise, 'state_dict_ema': tensors, 'args': vars(of_train_py)}, folder / 'ema.pth.tar')
    torch.save({'model': {k: v for k, v in tensors.items() if 'classifier' not in k}}, folder / 'headless.pth')
    model.pretrained_cfg.update(input_size=(3, 96, 96), crop_pct=1.0)
    save_for_hf(model, folder / 'folder', {'label_names': ['a', 'b', 'c']}, safe_serialization=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        return folder, images, model(images)


@pytest.mark.parametrize('args, size', [
    (('test_mobileformer', '--checkpoint', 'plain.pth'), 160),
    (('test_mobileformer', '--checkpoint', 'model.safetensors'), 160),
    (('test_mobileformer', '--checkpoint', 'train.pth.tar'), 96),
    (('test_mobileformer', '--checkpoint', 'ema.pth.tar', '--use-ema'), 96),
    (('test_mobileformer', '--checkpoint', 'train.pth.tar', '--img-size', '64'), 64),
    (('folder',), 96),
    (('folder', '--img-size', '64'), 64),
    (('local-dir:folder',), 96),
])
def test_a_model_comes_with_its_weights_its_image_size_and_its_classes(weights, monkeypatch, args, size):
    folder, images, answer = weights
    monkeypatch.chdir(folder)
    model = load(*args)
    with torch.no_grad():
        torch.testing.assert_close(model(images), answer)
    assert size_of(model) == (size, size)
    assert class_names(model) == (['a', 'b', 'c'] if 'folder' in args[0] else ['class 0', 'class 1', 'class 2'])


def test_the_authors_files_and_models_that_are_built_for_one_size_load_too(tmp_path):
    torch.save({'state_dict': author_state_dict('26m', 0)}, tmp_path / '26m.pth.tar')
    model = load('mobileformer_26m', '--checkpoint', tmp_path / '26m.pth.tar')
    assert model.num_classes == 1000 and class_names(model)[0].startswith('tench')
    vit = timm.create_model('test_vit', num_classes=4, img_size=96)
    torch.save({'state_dict': vit.state_dict(), 'args': argparse.Namespace(img_size=96)}, tmp_path / 'vit.pth.tar')
    for size, more in (96, ()), (128, ('--img-size', 128)):
        model = load('test_vit', '--checkpoint', tmp_path / 'vit.pth.tar', *more)
        assert size_of(model) == (size, size) and model(torch.zeros(1, 3, size, size)).shape == (1, 4)


def test_a_model_begins_with_the_weights_and_gets_a_classifier_for_other_classes(weights, monkeypatch):
    folder, images, _ = weights
    monkeypatch.chdir(folder)
    features = load('folder').forward_features(images)
    for args in ('folder',), ('test_mobileformer', '--checkpoint', 'headless.pth'):
        model = load_model(parse('--model', *args), num_classes=7).eval()
        torch.testing.assert_close(model.forward_features(images), features)
        assert model(images).shape == (1, 7)
    untrained = load_model(parse('--model', 'test_mobileformer'), num_classes=7)
    assert untrained.num_classes == 7 and not torch.equal(untrained.tokens, model.tokens)


def test_a_timm_name_comes_before_a_folder_of_that_name(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(weights[0] / 'folder', 'test_mobileformer')
    with pytest.raises(InputError, match='test_mobileformer needs weights'):
        load('test_mobileformer')
    assert class_names(load('./test_mobileformer')) == ['a', 'b', 'c']


@pytest.mark.parametrize('args, wanted', [
    (('mobileformer_25m',), 'mobileformer_25m is neither a model of timm nor a folder; similar: mobileformer'),
    (('test_mobileformer',), 'test_mobileformer needs weights: --checkpoint FILE for your own, --pretrained for'),
    (('test_mobileformer', '--pretrained'), 'test_mobileformer: No pretrained weights exist for test_mobileformer'),
    (('test_mobileformer.x', '--pretrained'), 'Invalid pretrained tag (x) for test_mobileformer'),
    (('.',), '. has no config.json, so finetune did not write it'),
    (('folder', '--checkpoint', 'plain.pth'), 'folder has weights already'),
    (('broken',), 'broken: '),
    (('test_mobileformer', '--checkpoint', 'text.pth'), 'text.pth is refused: it is not a checkpoint, or loading it'),
    (('test_mobileformer', '--checkpoint', 'code.pth'), 'code.pth is refused: it is not a checkpoint, or loading it'),
    (('test_mobileformer', '--checkpoint', 'half.pth'), 'half.pth cannot be read: the file is damaged'),
    (('test_mobileformer', '--checkpoint', 'half.safetensors'), 'half.safetensors cannot be read: the file is damaged'),
    (('test_mobileformer', '--checkpoint', 'list.pth'), 'list.pth is not a checkpoint: it has no named tensors'),
    (('test_mobileformer', '--checkpoint', 'plain.pth', '--use-ema'), 'plain.pth has no averaged weights'),
    (('mobileformer_26m', '--checkpoint', 'plain.pth'), 'plain.pth as mobileformer_26m: The checkpoint does not fit'),
    (('test_convnext', '--checkpoint', 'plain.pth'), "plain.pth as test_convnext: there is no 'tokens'"),
    (('test_mobileformer', '--checkpoint', 'headless.pth'), 'the weights of headless.pth have no classifier'),
])
def test_a_model_that_cannot_be_had_is_refused_in_one_line(weights, monkeypatch, args, wanted):
    folder, *_ = weights
    monkeypatch.chdir(folder)
    Path('text.pth').write_text('no checkpoint')
    Path('code.pth').write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    for name, whole_file in ('half.pth', 'plain.pth'), ('half.safetensors', 'model.safetensors'):
        Path(name).write_bytes(Path(whole_file).read_bytes()[:100_000])
    torch.save([1, 2], 'list.pth')
    Path('broken').mkdir(exist_ok=True)
    Path('broken', 'config.json').write_text('{}')
    with pytest.raises(InputError) as refusal:
        load(*args)
    assert wanted in str(refusal.value) and '\n' not in str(refusal.value)
    assert not Path('executed').exists()


def test_a_file_of_names_must_name_every_class(weights, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('one\ntwo\n\n')
    model = load('test_mobileformer', '--checkpoint', weights[0] / 'plain.pth')
    with pytest.raises(InputError, match=r'names\.txt names 2 classes, the model has 3'):
        class_names(model, names)
    names.write_text('\ufeffeins\nzwei \ndrei', encoding='utf-8')
    assert class_names(model, names) == ['eins', 'zwei', 'drei']
