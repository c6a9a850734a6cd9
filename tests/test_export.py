"""`timm-mobileformer export`: files that answer as PyTorch does and say how they are used, and what is refused."""
import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import KINDS, PROFILES
from test_model import THREE_BLOCKS
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    create_dataset,
    create_loader,
    create_transform,
    resolve_model_data_config,
)
from timm.utils import accuracy, reparameterize_model

from timm_mobileformer import MobileFormer
from timm_mobileformer.cli import exporting, formats, main, options
from timm_mobileformer.cli.console import InputError
from timm_mobileformer.cli.images import read_image
from timm_mobileformer.cli.metadata import to_pixels


def needs(name):
    """Skip a test whose format cannot be exported on this machine, with the reason."""
    problem = ''
    try:
        options.parse(['export', name])
    except InputError as e:
        problem = str(e)
    return pytest.mark.skipif(bool(problem), reason=problem or 'nothing is missing')


def run_here(*args):
    return main(['export', *map(str, args), '--workers', '0'])


@pytest.fixture(scope='module')
def validation_set(finetuned, digits):
    """The model by timm alone, the images of the validation set, and their classes."""
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
        assert run_here('onnx', 'onnx-int8') == 0
    return finetuned[0] / 'output' / 'export', table(printed.getvalue())


@pytest.fixture
def copied(exported, monkeypatch):
    """Exporters that copy what is there, since to make it takes its time; `copied(name, of)` takes another's file."""
    def copy(name, of=None):
        path = exported[0] / f'mobileformer_52m{formats.FORMATS[of or name].suffix}'
        form = formats.FORMATS[name]._replace(export=lambda model, images, to, opset=None: shutil.copy(path, to))
        monkeypatch.setitem(formats.FORMATS, name, form)
    return copy


@needs('onnx')
def test_one_command_exports_checks_and_compares(exported, validation_set):
    from onnxruntime import InferenceSession

    model, images, targets = validation_set
    out, rows = exported
    assert list(rows) == ['PyTorch, as trained', 'PyTorch, reparameterized', 'ONNX Runtime', 'ONNX Runtime, int8']
    files = {'mobileformer_52m.onnx', 'mobileformer_52m.int8.onnx'}
    assert {path.name for path in out.iterdir()} == files | {f'{name}.json' for name in files}

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
    assert str(exporting.__file__).encode() not in (out / 'mobileformer_52m.onnx').read_bytes()


@needs('onnx')
def test_an_onnx_file_has_the_opset_asked_for(tmp_path):
    import onnx

    model = reparameterize_model(MobileFormer(8, 2, 32, THREE_BLOCKS[:1], 32, num_classes=10).eval())
    images = torch.randn(2, 3, 64, 64)
    formats.to_onnx(model, images, tmp_path / 'model.onnx', opset=18)
    assert {o.domain: o.version for o in onnx.load(tmp_path / 'model.onnx').opset_import}[''] == 18
    torch.testing.assert_close(formats.load_onnx(tmp_path / 'model.onnx', 1)(images), model(images))
    with pytest.raises(InputError, match='cannot write opset 99'):
        formats.to_onnx(model, images, tmp_path / 'model.onnx', opset=99)


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
    formats.to_onnx(model, images, paths[0])
    monkeypatch.setattr(formats, 'to_onnx', lambda model, images, to, opset=None: shutil.copy(paths[0], to))
    formats.to_onnx_int8(model, images, paths[1])
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
    stages = THREE_BLOCKS[:1 if name == 'aoti' else 2]  # that compiles long, and test_model compiles them all
    model = MobileFormer(8, 2, 32, stages, 32, num_classes=10).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    images = torch.randn(3, 3, 64, 64)
    path = tmp_path / f'model{formats.FORMATS[name].suffix}'
    formats.FORMATS[name].export(reparameterize_model(model), images, path)
    run = formats.FORMATS[name].load(path, 1)
    with torch.inference_mode():
        for batch in images, images[:1], torch.randn(5, 3, 64, 64):
            torch.testing.assert_close(run(batch), model(batch), atol=1e-4, rtol=0)


@needs('onnx')
def test_all_exports_for_what_is_installed_and_names_the_rest(copied, finetuned, digits, tmp_path, monkeypatch, capsys):
    copied('onnx')
    copied('onnx-int8')
    for name in 'openvino', 'executorch':
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv('CXX', 'no-such-compiler')
    (tmp_path / 'names.txt').write_text('\n'.join('0123456789'))
    assert run_here('all', '--class-map', tmp_path / 'names.txt',
                    '--model', 'mobileformer_52m', '--checkpoint', finetuned[0] / 'output/finetune/last.pth.tar',
                    '--data-dir', digits, '--output', tmp_path) == 0
    printed = capsys.readouterr().out
    assert list(table(printed))[2:] == ['ONNX Runtime', 'ONNX Runtime, int8']
    assert "skipped: openvino needs openvino: pip install 'timm_mobileformer[openvino]'" in printed
    assert "skipped: executorch needs executorch: pip install 'timm_mobileformer[executorch]'" in printed
    assert 'skipped: aoti needs a C++ compiler: install g++' in printed


# Metadata

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Two photographs inside scikit-learn, upright, lying, as panoramas and tiny."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp('photos')
    for i, pixels in enumerate(load_sample_images().images):
        for j, size in enumerate(((640, 427), (150, 301), (97, 96), (500, 60), (6, 5))):
            Image.fromarray(pixels).resize(size).save(folder / f'{i}{j}.png')
    return folder


@pytest.fixture(scope='module', params=['normalized', 'raw'])
def small(request, photos, tmp_path_factory):
    """The arguments of a model with weights in a checkpoint of train.py at 96 x 96, and its ONNX file, with no data."""
    folder = tmp_path_factory.mktemp('small')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(img_size=96)), folder / 'last.pth.tar')
    named = ['--model', 'test_mobileformer', '--checkpoint', str(folder / 'last.pth.tar')]
    with redirect_stdout(StringIO()) as printed:
        more = ['--raw', '--images', photos, '--max-drop', 100] if request.param == 'raw' else []
        status = run_here('onnx', 'onnx-int8', *named, '--output', folder, *more)
    if more:
        assert status == 0 and 'checked on 10 images' in printed.getvalue()
        rows = table(printed.getvalue())
        assert list(rows)[2:] == ['ONNX Runtime', 'ONNX Runtime, int8']
        assert {row['agreement with PyTorch, %'] for row in list(rows.values())[:3]} == {'100.00'}
        assert all(float(row['largest difference of a probability']) <= 0.01 for row in list(rows.values())[:3])
    else:
        assert status == 1 and 'checked on noise' in printed.getvalue()
        assert 'skipped: onnx-int8: calibration needs images' in printed.getvalue()
        assert list(table(printed.getvalue()))[2:] == ['ONNX Runtime']
    return named, folder / 'test_mobileformer.onnx'


@needs('onnx')
def test_what_stands_beside_a_file_and_inside_it_are_words_of_timm(small):
    import onnx

    _, file = small
    about = json.loads(Path(f'{file}.json').read_text())
    inside = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert inside == about
    data_config = resolve_model_data_config(timm.create_model('test_mobileformer'), {'img_size': 96})
    is_raw = about['input_name'] == 'image'
    preprocessing = about['included_preprocessing'] if is_raw else about
    assert preprocessing == json.loads(json.dumps({**preprocessing, **data_config}))
    assert about['input_shape'] == (['height', 'width', 3] if is_raw else ['batch', 3, 96, 96])
    assert not is_raw or not about.keys() & {*data_config}  # nobody is to preprocess twice
    assert about['architecture'] == 'test_mobileformer' and about['label_names'] == [f'class {i}' for i in range(7)]
    answer, = onnx.load(file).graph.output
    assert answer.name == about['output_name'] in ('logits', 'probabilities')


FOLLOWED = ('palette, one colour transparent', 'RGBA', 'gray with alpha', 'GIF, transparent', 'CMYK, TIFF', '16 bits',
            '12 of 16 bits', '8 of 16 bits', 'turned, PNG 6')  # by the lines in the docs


@needs('onnx')
def test_the_lines_in_the_docs_classify_as_pytorch_does(small, photos, tmp_path, monkeypatch, capsys):
    named, file = small
    is_raw = json.loads(Path(f'{file}.json').read_text())['input_name'] == 'image'
    docs = Path(exporting.__file__).parents[1] / 'docs' / 'deployment.md'
    code, = (block for block in re.findall(r'```python\n(.*?)```', docs.read_text(), re.DOTALL)
             if 'custom_metadata_map' in block and ("{'image'" in block) == is_raw)
    assert set(re.findall(r'^(?:import|from) (\w+)', code, re.MULTILINE)) <= {
        'io', 'json', 'math', 'sys', 'numpy', 'onnxruntime', 'PIL'}
    model = timm.create_model(
        'test_mobileformer', pretrained=True, pretrained_cfg_overlay=dict(file=named[-1], num_classes=7),
        num_classes=7).eval()
    transform = create_transform(**resolve_model_data_config(model, {'img_size': 96}))
    others = [] if is_raw else [*PROFILES.values(), *(KINDS[kind] for kind in FOLLOWED)]
    for i, (data, _) in enumerate(others):
        (tmp_path / f'{i}.image').write_bytes(data)
    for path in sorted([*photos.iterdir(), *tmp_path.iterdir()]):
        monkeypatch.setattr(sys, 'argv', ['classify.py', str(file), str(path)])
        exec(code, found := {})
        with torch.inference_mode():
            wanted = model(transform(read_image(path))[None])
        probabilities = torch.from_numpy(found['probabilities'])
        torch.testing.assert_close(probabilities, wanted.softmax(1)[0], atol=0.01 if is_raw else 1e-4, rtol=0)
        percent, name = capsys.readouterr().out.splitlines()[0].split(maxsplit=1)
        assert name == f'class {wanted.argmax()}'
        greatest = 100 * wanted.softmax(1).max().item()
        assert float(percent.strip('%')) == pytest.approx(greatest, abs=1 if is_raw else 0.02)


@needs('onnx')
def test_a_model_for_transformers_js_classifies_as_pytorch_does(small, photos, tmp_path, monkeypatch):
    named, file = small
    if json.loads(Path(f'{file}.json').read_text())['input_name'] != 'image':
        pytest.skip('for raw files only')
    docs = (Path(exporting.__file__).parents[1] / 'docs' / 'deployment.md').read_text().split('### transformers.js')[1]
    python, javascript = (re.search(rf'```{name}\n(.*?)```', docs, re.DOTALL)[1] for name in ('python', 'javascript'))
    monkeypatch.setattr(sys, 'argv', ['to_transformers_js.py', str(file), str(tmp_path / 'models' / 'mine')])
    exec(python, {})
    session, raw = (formats.open_onnx(path) for path in (tmp_path / 'models/mine/onnx/model.onnx', file))
    for path in sorted(photos.iterdir()):
        pixels = to_pixels(Image.open(path)).numpy()
        wanted, = raw.run(None, {'image': pixels})
        logits, = session.run(['logits'], {'pixel_values': pixels.transpose(2, 0, 1)[None].astype('float32')})
        torch.testing.assert_close(torch.from_numpy(logits).softmax(1)[0], torch.from_numpy(wanted), atol=1e-6, rtol=0)
    if not Path('node_modules/@huggingface/transformers').is_dir():
        pytest.skip('npm install @huggingface/transformers brings the pipeline')
    (tmp_path / 'node_modules').symlink_to(Path('node_modules').resolve())
    (tmp_path / 'classify.mjs').write_text(
        'console.log = found => process.stdout.write(JSON.stringify(found));\n' + javascript)
    model = timm.create_model(
        'test_mobileformer', pretrained=True, pretrained_cfg_overlay=dict(file=named[-1], num_classes=7),
        num_classes=7).eval()
    transform = create_transform(**resolve_model_data_config(model, {'img_size': 96}))
    for path in sorted(photos.iterdir())[:2]:
        shutil.copy(path, tmp_path / 'photo.png')
        done = subprocess.run(['node', 'classify.mjs'], cwd=tmp_path, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)[0]
        with torch.inference_mode():
            probabilities = model(transform(read_image(path))[None]).softmax(1)[0]
        assert found['label'] == f'class {probabilities.argmax()}'
        assert found['score'] == pytest.approx(probabilities.max().item(), abs=0.01)


@needs('onnx')
def test_a_file_predicts_what_its_model_does(small, photos, tmp_path, capsys):
    named, file = small
    rows = []
    for i, model in enumerate((named, ['--model', str(file)])):
        out = tmp_path / f'{i}.csv'
        assert main(['predict', str(photos), *model, '--topk', '3', '--workers', '0', '--batch-size', '4',
                     '--output', str(out)]) == 0
        rows.append(list(csv.DictReader(out.open())))
    assert len(rows[0]) == 10 and {row['label'] for row in rows[0]} <= {f'class {i}' for i in range(7)}
    for a, b in zip(*rows, strict=True):
        for key in a:
            if key.startswith('probability'):
                assert float(a[key]) == pytest.approx(float(b[key]), abs=2e-4)
        assert [a[key] for key in ('path', 'label', 'problem')] == [b[key] for key in ('path', 'label', 'problem')]


@needs('onnx')
def test_a_finetuned_model_is_checked_on_its_validation_set(
        copied, finetuned, digits, tmp_path, monkeypatch, capsys):
    copied('onnx')
    model = tmp_path / 'model'
    shutil.copytree(finetuned[0] / 'output/finetune', model)

    def said(*more):
        assert run_here('onnx', '--model', f'local-dir:{model}', '--output', tmp_path / 'out', *more) == 0
        return capsys.readouterr().out

    doubt = 'validation images may have been used for training'
    assert '360 images of the validation set' in (out := said()) and doubt not in out
    assert '360 images of the validation set' in (out := said('--data-dir', digits)) and doubt not in out
    assert doubt in said('--data-dir', digits / 'train', '--val-split', '0.1')
    assert doubt in said('--data-dir', digits, '--val-split', '0.1')  # not the fraction of the training

    state = torch.load(model / 'last.pth.tar', weights_only=True)
    state['args']['data_dir'] = str(tmp_path / 'moved')
    torch.save(state, model / 'last.pth.tar')
    out = said()
    assert f'was trained on {tmp_path}/moved, which no longer exists' in out and 'checked on noise' in out


@needs('onnx')
def test_a_format_that_fails_leaves_the_others(copied, finetuned, monkeypatch, capsys, tmp_path):
    def fail(model, images, path):
        path.write_text('half')
        print('a hint of the exporter', file=sys.stderr)
        raise RuntimeError('there is no such operator')

    copied('onnx')
    monkeypatch.setitem(formats.FORMATS, 'onnx-int8', formats.FORMATS['onnx-int8']._replace(export=fail))
    assert run_here('onnx-int8', 'onnx', '--model', finetuned[0] / 'output/finetune', '--output', tmp_path) == 1
    out, err = capsys.readouterr()
    assert list(table(out))[2:] == ['ONNX Runtime'] and 'skipped: onnx-int8: there is no such operator' in out
    assert 'a hint of the exporter' in err
    assert {path.name for path in tmp_path.iterdir()} == {'mobileformer_52m.onnx', 'mobileformer_52m.onnx.json'}


@needs('onnx')
@pytest.mark.parametrize('labelled', [True, False])
def test_int8_is_calibrated_on_training_images_from_all_over(tmp_path, monkeypatch, labelled):
    counts = {('train', 'class 0'): 400, ('train', 'class 1'): 200, ('val', 'class 0'): 8, ('val', 'class 1'): 8}
    for kind, (folders, count) in enumerate(counts.items()):
        tmp_path.joinpath('data', *folders).mkdir(parents=True)
        for i in range(count):  # whose colours say which it is
            color = 10 * (i // 20), 12 * (i % 20), 60 * kind
            Image.new('RGB', (32, 32), color).save(tmp_path.joinpath('data', *folders, f'{i:03}.png'))
    torch.save(timm.create_model('test_mobileformer', num_classes=2).state_dict(), tmp_path / 'model.pth')
    seen = []

    def calibrate(model, images, *_):
        colors = 255 * (images[:, :, 16, 16] * torch.tensor(IMAGENET_DEFAULT_STD) + torch.tensor(IMAGENET_DEFAULT_MEAN))
        seen.extend(colors.round().int().tolist())
        raise RuntimeError('enough seen')

    monkeypatch.setitem(formats.FORMATS, 'onnx-int8', formats.FORMATS['onnx-int8']._replace(export=calibrate))
    run_here('onnx-int8', '--model', 'test_mobileformer', '--checkpoint', tmp_path / 'model.pth', '--img-size', 32,
             '--output', tmp_path / 'out', *(['--data-dir', tmp_path / 'data'] if labelled else
                                             ['--images', tmp_path / 'data' / 'train']))
    found = [(blue // 60, 20 * (red // 10) + green // 12) for red, green, blue in seen]
    assert 100 <= len(found) == len(set(found)) <= 300
    assert {kind for kind, _ in found} == {0, 1}  # none of the validation set, where there is one
    for kind, count in enumerate([400, 200]):
        quarters = Counter(4 * i // count for k, i in found if k == kind)
        share = len(found) * count / 600 / 4
        assert all(0.6 * share < quarters[q] < 1.5 * share for q in range(4)), quarters


def test_int8_may_lose_the_maximum_drop_and_a_standard_error():
    def check(lost, won, number, max_drop=1.):
        targets = torch.zeros(number, dtype=torch.long)
        wanted = torch.tensor([[1., 0.]]).repeat(number, 1)
        answers = wanted.clone()
        wanted[:won] = wanted[:won].flip(1)
        answers[won:won + lost] = answers[won:won + lost].flip(1)
        exporting.check_outputs('onnx-int8', answers, wanted, targets, max_drop)

    for lost, won, number in (1, 0, 8), (1, 0, 20), (2, 1, 20), (2, 0, 100), (12, 8, 360), (157, 43, 10_000):
        check(lost, won, number)
    for lost, won, number in (2, 0, 20), (4, 0, 20), (3, 0, 100), (12, 3, 360), (158, 42, 10_000):
        with pytest.raises(InputError, match=f'{lost} lost, {won} won'):
            check(lost, won, number)
    with pytest.raises(InputError):
        check(2, 0, 100, max_drop=0.)


@needs('onnx')
def test_files_of_another_model_do_not_stay_beside_those_of_this_one(copied, finetuned, tmp_path, monkeypatch, capsys):
    def fail(model, images, path):
        raise RuntimeError('no')

    copied('onnx')
    copied('onnx-int8')
    model = tmp_path / 'model'
    shutil.copytree(finetuned[0] / 'output/finetune', model)
    out = tmp_path / 'out'
    assert run_here('onnx', 'onnx-int8', '--model', model, '--output', out) == 0
    (out / 'mobileformer_52m.txt').touch()
    (out / 'mobileformer_52m.notes.json').write_text('{}')
    before = {path.name for path in out.iterdir()}
    assert run_here('onnx', '--model', model, '--output', out) == 0  # the same weights: both belong together
    assert {path.name for path in out.iterdir()} == before and 'removed' not in capsys.readouterr().out

    weights = load_file(model / 'model.safetensors')
    weights['tokens'] = weights['tokens'] + 1e-6
    save_file(weights, model / 'model.safetensors')
    monkeypatch.setitem(formats.FORMATS, 'onnx-int8', formats.FORMATS['onnx-int8']._replace(export=fail))
    assert run_here('onnx', 'onnx-int8', '--model', model, '--output', out) == 1
    assert f'removed outdated files from {out}: mobileformer_52m.int8.onnx' in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == before - {
        'mobileformer_52m.int8.onnx', 'mobileformer_52m.int8.onnx.json'}


# Refusals

def test_an_opset_is_refused_without_an_onnx_format(capsys):
    assert run_here('aoti', '--opset', 18) == 2
    assert '--opset applies to onnx and onnx-int8' in capsys.readouterr().err


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
    assert 'none of the classes of the images (cat, dog) is a class of ' in line
    assert '(0, 1, 2, 3, 4 and 5 more)' in line
    assert not (tmp_path / 'out').exists()


def test_missing_runtime_names_the_extra_that_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'executorch', None)
    line = refused(capsys, 'executorch', '--output', tmp_path / 'out')
    assert line == "error: executorch needs executorch: pip install 'timm_mobileformer[executorch]'"
    assert not (tmp_path / 'out').exists()


@needs('onnx')
@pytest.mark.parametrize('name, more, problem', [
    ('onnx', (), r'onnx: differs from PyTorch by 0\..*'),
    ('onnx-int8', ('--max-drop', -99), r'onnx-int8: loses .* on 360 images \(\d+ lost, \d+ won\), more than .*'),
])
def test_a_file_that_answers_otherwise_or_loses_accuracy_is_not_kept(
        copied, finetuned, digits, tmp_path, capsys, name, more, problem):
    copied(name, of='onnx-int8')
    before = tmp_path / f'mobileformer_52m{formats.FORMATS[name].suffix}'
    before.write_text('of before')
    assert run_here(name, '--model', finetuned[0] / 'output/finetune', '--data-dir', digits, '--output', tmp_path,
                    *more) == 1
    assert re.fullmatch('skipped: ' + problem, capsys.readouterr().out.splitlines()[-1])
    assert list(tmp_path.iterdir()) == [before] and before.read_text() == 'of before'
