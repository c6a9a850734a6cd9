"""`python -m timm_mobileformer.export`: files that answer as PyTorch does, the table, and what is refused."""
import re
import shutil
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils import accuracy, reparameterize_model

from timm_mobileformer import MobileFormer, export, finetune
from timm_mobileformer.digits import write_digits

pytest.importorskip('sklearn', reason="scikit-learn is missing, pip install 'timm_mobileformer[demo]' brings it")


def needs(name):
    """Skip a test whose format cannot be exported on this machine, with the reason."""
    return pytest.mark.skipif(bool(export.lacks(name)), reason=export.lacks(name) or 'nothing is missing')


def run_here(module, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [module.__name__, *map(str, args)])
        module.main()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    write_digits(folder)
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory, digits):
    """What finetune leaves behind."""
    folder = tmp_path_factory.mktemp('trained') / 'finetune'
    run_here(finetune, '--data-dir', digits, '--model', 'test_mobileformer', '--img-size', 32, '--epochs', 8,
             '--lr', 4e-3, '--scale', 0.7, 1, '--hflip', 0, '-j', 0, '--device', 'cpu', '--output', folder)
    return folder


@pytest.fixture(scope='module')
def held_out(trained, digits):
    """The model by timm alone, its held-out images, and their classes."""
    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    loader = create_loader(
        create_dataset('', digits, split='validation'), batch_size=360, num_workers=0, device=torch.device('cpu'),
        **resolve_model_data_config(model))
    (images, targets), = loader
    return model, images, targets


def table(printed):
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in printed.splitlines() if line[:1] == '|']
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.fixture(scope='module')
def exported(trained, digits, tmp_path_factory):
    """Folder and table of one command."""
    out = tmp_path_factory.mktemp('exported') / 'out'
    with redirect_stdout(StringIO()) as printed:
        run_here(export, 'onnx', 'int8', '--checkpoint', trained, '--data-dir', digits, '--output', out, '-j', 0)
    return out, table(printed.getvalue())


def copies(path):
    """An exporter that takes its file from `path`, since to make one takes its time."""
    return lambda model, images, to: shutil.copy(path, to)


@needs('onnx')
def test_one_command_exports_checks_and_compares(exported, held_out):
    from onnxruntime import InferenceSession

    model, images, targets = held_out
    out, rows = exported
    assert list(rows) == ['PyTorch, as trained', 'PyTorch, reparameterized', 'ONNX Runtime', 'ONNX Runtime, int8']
    assert {path.name for path in out.iterdir()} == {'test_mobileformer.onnx', 'test_mobileformer.int8.onnx'}

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
    torch.testing.assert_close(answers['ONNX Runtime'], wanted, atol=1e-4, rtol=0)
    top1 = accuracy(wanted, targets)[0].item()
    assert top1 > 90
    assert accuracy(answers['ONNX Runtime, int8'], targets)[0].item() >= top1 - 1
    assert str(finetune.__file__).encode() not in (out / 'test_mobileformer.onnx').read_bytes()


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
    monkeypatch.setattr(export, 'to_onnx', copies(paths[0]))
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


@needs('onnx')
def test_int8_of_a_deep_model_whose_layers_share_biases_loads(tmp_path):
    model = reparameterize_model(timm.create_model('mobileformer_294m', num_classes=10).eval())  # untrained: all are 0
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    export.to_int8(model, images, tmp_path / 'int8.onnx')
    assert export.load_onnx(tmp_path / 'int8.onnx', 1)(images).shape == (2, 10)


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
def test_all_exports_for_what_is_installed_and_names_the_rest(exported, trained, digits, tmp_path, monkeypatch, capsys):
    present = export.FORMATS['onnx']._replace(export=copies(exported[0] / 'test_mobileformer.onnx'))
    absent = export.FORMATS['openvino']._replace(modules=('no_such_runtime',))
    monkeypatch.setattr(export, 'FORMATS', {'onnx': present, 'openvino': absent})
    run_here(export, 'all', '--checkpoint', trained / 'model_best.pth.tar', '--model', 'test_mobileformer',
             '--img-size', 32, '--data-dir', digits, '--output', tmp_path, '-j', 0)
    printed = capsys.readouterr().out
    assert list(table(printed))[2:] == ['ONNX Runtime']
    assert "openvino needs no_such_runtime: pip install 'timm_mobileformer[openvino]'" in printed


# Refusals

def refused(capsys, *args):
    """The one line on stderr, progress bars aside, with which `args` are refused."""
    with pytest.raises(SystemExit) as stop:
        run_here(export, *args, '-j', 0)
    assert stop.value.code == 2
    line = re.split('[\r\n]', capsys.readouterr().err.strip())[-1]
    assert 'error: ' in line
    return line


@needs('onnx')
@pytest.mark.parametrize('case, problem', [
    ('no checkpoint', 'no such checkpoint: '),
    ('another file', 'cannot be loaded: '),
    ('another model', 'cannot be loaded: '),
    ('unknown model', 'Unknown model'),
    ('no model named', '--model must say which model'),
    ('empty folder', 'cannot be loaded: '),
    ('no data', 'is not a folder'),
    ('other classes', 'has 10 classes (0, 1, 2, 3, 4 and 5 more), the data 2 (cat, dog)'),
    ('tiny images', '--img-size must be at least 32, not 16'),
    ('unknown format', 'invalid choice'),
])
def test_mistakes_are_refused_before_anything_is_written(case, problem, trained, digits, tmp_path, capsys):
    out, text, best = tmp_path / 'out', tmp_path / 'notes.txt', trained / 'model_best.pth.tar'
    text.write_text('not a checkpoint')
    (tmp_path / 'empty').mkdir()
    for split in 'train', 'validation':
        for number, animal in enumerate(('cat', 'dog')):
            shutil.copytree(digits / split / str(number), tmp_path / 'animals' / split / animal)
    args = {'--checkpoint': trained, '--data-dir': digits, '--output': out} | {
        'no checkpoint': {'--checkpoint': tmp_path / 'absent'},
        'another file': {'--checkpoint': text, '--model': 'test_mobileformer'},
        'another model': {'--checkpoint': best, '--model': 'mobileformer_26m'},
        'unknown model': {'--checkpoint': best, '--model': 'mobileformer_27m'},
        'no model named': {'--checkpoint': best},
        'empty folder': {'--checkpoint': tmp_path / 'empty'},
        'no data': {'--data-dir': tmp_path / 'absent'},
        'other classes': {'--data-dir': tmp_path / 'animals'},
        'tiny images': {'--img-size': 16},
    }.get(case, {})
    formats = ['tflite'] if case == 'unknown format' else ['onnx']
    assert problem in refused(capsys, *formats, *(word for pair in args.items() for word in pair))
    assert not out.exists()


def test_missing_runtime_names_the_extra_that_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, 'find_spec', lambda name: None if name == 'executorch' else find_spec(name))
    line = refused(capsys, 'executorch', '--checkpoint', tmp_path, '--output', tmp_path / 'out')
    assert line == "error: executorch needs executorch: pip install 'timm_mobileformer[executorch]'"
    assert not (tmp_path / 'out').exists()


@needs('onnx')
def test_a_file_that_answers_otherwise_is_not_kept(exported, trained, digits, tmp_path, monkeypatch, capsys):
    (tmp_path / 'test_mobileformer.onnx').write_text('of before')
    wrong = export.FORMATS['onnx']._replace(export=copies(exported[0] / 'test_mobileformer.int8.onnx'))
    monkeypatch.setitem(export.FORMATS, 'onnx', wrong)
    line = refused(capsys, 'onnx', '--checkpoint', trained, '--data-dir', digits, '--output', tmp_path)
    assert line.startswith('error: onnx differs from PyTorch by 0.')
    assert [path.name for path in tmp_path.iterdir()] == ['test_mobileformer.onnx']
    assert (tmp_path / 'test_mobileformer.onnx').read_text() == 'of before'


@needs('onnx')
def test_int8_that_loses_accuracy_is_not_kept(exported, trained, digits, tmp_path, monkeypatch, capsys):
    int8 = export.FORMATS['int8']._replace(export=copies(exported[0] / 'test_mobileformer.int8.onnx'))
    monkeypatch.setitem(export.FORMATS, 'int8', int8)
    line = refused(capsys, 'int8', '--checkpoint', trained, '--data-dir', digits, '--output', tmp_path,
                   '--max-drop', -9)
    assert re.fullmatch(r'error: int8 loses .* points of top-1, more than --max-drop', line)
    assert not list(tmp_path.iterdir())
