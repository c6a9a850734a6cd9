"""`timm-mobileformer export`: files that answer as PyTorch does, the table, and what is refused."""
import argparse
import re
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils import accuracy, reparameterize_model

from timm_mobileformer import MobileFormer
from timm_mobileformer.cli import export, main, options
from timm_mobileformer.cli.terminal import InputError

pytestmark = pytest.mark.timeout(900)  # whichever test comes first trains


def needs(name):
    """Skip a test whose format cannot be exported on this machine, with the reason."""
    problem = ''
    try:
        options.check_export(argparse.Namespace(formats=[name]))
    except InputError as e:
        problem = str(e)
    return pytest.mark.skipif(bool(problem), reason=problem or 'nothing is missing')


def run_here(*args):
    return main(['export', *map(str, args), '--workers', '0'])


@pytest.fixture(scope='module')
def held_out(finetuned, digits):
    """The model by timm alone, its held-out images, and their classes."""
    model = timm.create_model(f'local-dir:{finetuned[0]}/output/finetune', pretrained=True).eval()
    loader = create_loader(
        create_dataset('', digits, split='validation'), batch_size=360, num_workers=0, device=torch.device('cpu'),
        **resolve_model_data_config(model))
    (images, targets), = loader
    return model, images, targets


def table(printed):
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in printed.splitlines() if line[:1] == '|']
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.fixture(scope='module')
def exported(finetuned):
    """Folder and table of one command, after finetune in the same folder."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(finetuned[0])
        assert run_here('onnx', 'int8') == 0
    return finetuned[0] / 'output' / 'export', table(printed.getvalue())


@pytest.fixture
def copied(exported, monkeypatch):
    """Exporters that copy what is there, since to make it takes its time; `copied(name, of)` takes another's file."""
    def copy(name, of=None):
        path = exported[0] / f'mobileformer_52m{export.FORMATS[of or name].suffix}'
        form = export.FORMATS[name]._replace(export=lambda model, images, to: shutil.copy(path, to))
        monkeypatch.setitem(export.FORMATS, name, form)
    return copy


@needs('onnx')
def test_one_command_exports_checks_and_compares(exported, held_out):
    from onnxruntime import InferenceSession

    model, images, targets = held_out
    out, rows = exported
    assert list(rows) == ['PyTorch, as trained', 'PyTorch, reparameterized', 'ONNX Runtime', 'ONNX Runtime, int8']
    assert {path.name for path in out.iterdir()} == {'mobileformer_52m.onnx', 'mobileformer_52m.int8.onnx'}

    with torch.inference_mode():
        wanted = model(images)
    answers = {}
    for title in 'ONNX Runtime', 'ONNX Runtime, int8':
        path = out / rows[title]['file']
        session = InferenceSession(path, providers=['CPUExecutionProvider'])
        answers[title] = torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])
        assert float(rows[title]['MB']) == pytest.approx(path.stat().st_size / 1e6, abs=0.006)
        assert float(rows[title]['top-1, %']) == pytest.approx(accuracy(answers[title], targets)[0].item(), abs=0.006)
        assert float(rows[title]['latency, ms']) > 0
    torch.testing.assert_close(answers['ONNX Runtime'], wanted, atol=1e-4, rtol=1e-4)
    top1 = accuracy(wanted, targets)[0].item()
    assert top1 > 88
    assert accuracy(answers['ONNX Runtime, int8'], targets)[0].item() >= top1 - 1
    assert str(export.__file__).encode() not in (out / 'mobileformer_52m.onnx').read_bytes()


@needs('onnx')
def test_int8_takes_little_more_than_a_quarter_and_leaves_in_float_what_is_at_risk(tmp_path, monkeypatch):
    import onnx

    torch.manual_seed(0)
    model = timm.create_model('mobileformer_26m', num_classes=10)
    with torch.no_grad():  # files share equal tensors, and fresh ones are full of zeros
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if 'running' in n)]:
            tensor.add_(torch.rand_like(tensor) / 100)
    model = reparameterize_model(model.eval())
    images = torch.randn(4, 3, 64, 64)
    paths = tmp_path / 'float.onnx', tmp_path / 'int8.onnx'
    export.to_onnx(model, images, paths[0])
    monkeypatch.setattr(export, 'to_onnx', lambda model, images, to: shutil.copy(paths[0], to))  # made already
    export.to_int8(model, images, paths[1])
    assert paths[0].stat().st_size > 3.45 * paths[1].stat().st_size  # the variant, and head, that gains least

    graph = onnx.load(paths[1]).graph
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    in_float = [node for node in graph.node if node.op_type in ('Conv', 'Gemm') and node.input[1] in shapes]
    in_int8 = [node for node in graph.node if node.op_type in ('Conv', 'Gemm') and node.input[1] in made_by]
    assert all(node.op_type == 'Conv' for node in in_float) and len(in_int8) > 50
    stem, *depthwise = in_float
    assert stem.input[0] == 'images' and all(shapes[node.input[1]][1] == 1 for node in depthwise)
    assert all(made_by[node.input[1]].op_type == 'DequantizeLinear' for node in in_int8)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=needs(name)) for name in ('openvino', 'executorch', 'aoti')])
def test_runtime_agrees_on_any_batch(name, tmp_path):
    torch.manual_seed(0)
    model = MobileFormer(8, 2, 32, ('L2:8', 'D2,2:16'), 32, num_classes=10).eval()  # soon compiled
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    images = torch.randn(3, 3, 64, 64)
    path = tmp_path / f'model{export.FORMATS[name].suffix}'
    export.FORMATS[name].export(reparameterize_model(model), images, path)
    run = export.FORMATS[name].load(path, 1)
    with torch.inference_mode():
        for batch in images, images[:1], torch.randn(5, 3, 64, 64):
            torch.testing.assert_close(run(batch), model(batch), atol=1e-4, rtol=0)


@needs('onnx')
def test_all_exports_for_what_is_installed_and_names_the_rest(copied, finetuned, digits, tmp_path, monkeypatch, capsys):
    copied('onnx')
    copied('int8')
    for name in 'openvino', 'executorch':
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert run_here('all', '--model', 'mobileformer_52m', '--checkpoint', finetuned[0] / 'output/finetune/last.pth.tar',
                    '--data-dir', digits, '--output', tmp_path) == 0
    printed = capsys.readouterr().out
    assert list(table(printed))[2:] == ['ONNX Runtime', 'ONNX Runtime, int8']
    assert "left out: openvino needs openvino: pip install 'timm_mobileformer[openvino]'" in printed
    assert "left out: executorch needs executorch: pip install 'timm_mobileformer[executorch]'" in printed
    assert 'left out: aoti needs a C++ compiler: install g++' in printed


# Refusals

def refused(capsys, *args):
    """The one line on stderr with which `args` are refused."""
    assert run_here(*args) == 2
    line, end = capsys.readouterr().err.split('\n')
    assert line.startswith('error: ') and not end
    return line


@needs('onnx')
def test_data_of_other_classes_is_refused_before_anything_is_written(finetuned, digits, tmp_path, capsys):
    for number, animal in enumerate(('cat', 'dog')):
        shutil.copytree(digits / 'train' / str(number), tmp_path / 'animals' / animal)
    line = refused(capsys, 'onnx', '--model', finetuned[0] / 'output/finetune', '--data-dir', tmp_path / 'animals',
                   '--output', tmp_path / 'out')
    assert 'has 10 classes (0, 1, 2, 3, 4 and 5 more), the data 2 (cat, dog)' in line
    assert not (tmp_path / 'out').exists()


def test_missing_runtime_names_the_extra_that_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'executorch', None)
    line = refused(capsys, 'executorch', '--output', tmp_path / 'out')
    assert line == "error: executorch needs executorch: pip install 'timm_mobileformer[executorch]'"
    assert not (tmp_path / 'out').exists()


@needs('onnx')
@pytest.mark.parametrize('name, more, problem', [
    ('onnx', (), r'onnx differs from PyTorch by 0\..*'),
    ('int8', ('--max-drop', -9), 'int8 loses .* points of top-1, more than --max-drop'),
])
def test_a_file_that_answers_otherwise_or_loses_accuracy_is_not_kept(
        copied, finetuned, digits, tmp_path, capsys, name, more, problem):
    copied(name, of='int8')
    before = tmp_path / f'mobileformer_52m{export.FORMATS[name].suffix}'
    before.write_text('of before')
    line = refused(capsys, name, '--model', finetuned[0] / 'output/finetune', '--data-dir', digits,
                   '--output', tmp_path, *more)
    assert re.fullmatch('error: ' + problem, line)
    assert list(tmp_path.iterdir()) == [before] and before.read_text() == 'of before'
