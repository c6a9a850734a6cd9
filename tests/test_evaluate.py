"""`timm-mobileformer evaluate` and the report that it shares with finetune."""
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_mobileformer.cli import main
from timm_mobileformer.cli.console import InputError
from timm_mobileformer.cli.labelled import match_classes
from timm_mobileformer.cli.report import join, score, write_report
from timm_mobileformer.cli.report_figures import draw_confusion, draw_curve, draw_mistakes

TABLES = {'metrics.json', 'classes.csv', 'confusion.csv', 'predictions.csv', 'mistakes.csv'}
NAMES = ['bee', 'ant', 'fly', 'cat', 'dog', 'owl', 'emu']  # not sorted, as in a model from elsewhere


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A checkpoint, the names of its classes, and images of five of them and of one that it does not know."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'names.txt').write_text('\n'.join(NAMES))
    generator = torch.Generator().manual_seed(1)
    for name in 'ant', 'bee', 'cat', 'dog', 'owl', 'yak':
        (folder / 'images' / name).mkdir(parents=True)
        for i in range(6 if name == 'owl' else 4):
            pixels = torch.randint(256, (3, 3, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).resize((40, 36)).save(folder / 'images' / name / f'{i}.png')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=7)
    transform = create_transform(**resolve_model_data_config(model, {'img_size': 32}))
    images = torch.stack([transform(Image.open(path)) for path in sorted(folder.rglob('*.png'))])
    with torch.no_grad():  # predictions that are not all alike
        for _ in range(20):
            model.train()(images)
        logits = model.eval()(images)
        model.classifier.weight.div_(logits.std())
        model.classifier.bias.copy_(-logits.mean(0) / logits.std())
    torch.save(dict(state_dict=model.state_dict(), args=dict(img_size=32)), folder / 'weights.pth')
    return folder


@pytest.fixture
def run(work, tmp_path, capsys):
    """Run the command; its exit status, its folder, what it prints and its errors."""
    def run_here(*args, data=work / 'images'):
        status = main([
            'evaluate', '--model', 'test_mobileformer', '--checkpoint', str(work / 'weights.pth'), '--class-map',
            str(work / 'names.txt'), '--data-dir', str(data), '--workers', '0', '--batch-size', '4', '--device', 'cpu',
            '--output', str(tmp_path / 'out'), *map(str, args)])
        return status, tmp_path / 'out', *capsys.readouterr()
    return run_here


# The report

@pytest.mark.parametrize('num_classes', [2, 12])
def test_figures_are_those_of_scikit_learn_to_the_digit(tmp_path, num_classes):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is the other way to compute them')
    from sklearn.calibration import calibration_curve

    generator = torch.Generator().manual_seed(num_classes)
    n = 40 * num_classes
    targets = torch.randint(num_classes - (num_classes > 2), (n,), generator=generator)  # none of the last class
    logits = torch.randn(n, num_classes, generator=generator) * 2
    logits[torch.arange(n), targets] += 1.5
    scores = join([score(logits[:10], targets[:10]), score(logits[10:], targets[10:])])
    write_report(tmp_path, scores, [write_image(tmp_path)] * n, [f'c{i}' for i in range(num_classes)],
                 tmp_path, 'these', Image.open)

    true, probs = targets.numpy(), logits.double().softmax(-1).numpy()
    predictions, labels = probs.argmax(1), range(num_classes)
    found = json.loads((tmp_path / 'metrics.json').read_text())
    close = dict(rel=1e-12)
    assert found['images'] == n
    assert found['top1'] == pytest.approx(100 * metrics.accuracy_score(true, predictions), **close)
    top5 = metrics.top_k_accuracy_score(true, probs, k=5, labels=labels) if num_classes > 5 else 1
    assert found['top5'] == pytest.approx(100 * top5, **close)
    assert found['mean_class'] == pytest.approx(100 * metrics.balanced_accuracy_score(true, predictions), **close)
    assert found['loss'] == pytest.approx(metrics.log_loss(true, probs, labels=labels), **close)
    correct, confidence = predictions == true, probs.max(1)
    counts = torch.histogram(torch.from_numpy(confidence), 15, range=(0, 1)).hist
    accuracies, confidences = calibration_curve(correct, confidence, n_bins=15)
    ece = (abs(accuracies - confidences) * counts[counts > 0].numpy()).sum() / n
    assert found['ece'] == pytest.approx(100 * ece, rel=1e-9)

    confusion = metrics.confusion_matrix(true, predictions, labels=labels)
    assert read_csv(tmp_path / 'confusion.csv') == [
        {'class': f'c{i}', 'prediction': f'c{j}', 'images': str(confusion[i, j])} for i, j in np.argwhere(confusion)]
    columns = metrics.precision_recall_fscore_support(true, predictions, labels=labels, zero_division=0)
    for row, *wanted in zip(read_csv(tmp_path / 'classes.csv'), *columns, strict=True):
        assert [float(row[key] or 0) for key in ('precision', 'recall', 'f1', 'images')] == pytest.approx(
            wanted, **close)


def test_a_report_does_not_grow_with_the_square_of_the_number_of_classes(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_mobileformer.cli.report_figures.MAX_CLASSES', 9)  # a large figure takes seconds
    classes = [f'c{i}' for i in range(50_000)]
    scores = score(F.one_hot(torch.tensor([7, 49_999, 7, 8]), len(classes)).float(), torch.tensor([7, 7, 7, 49_998]))
    write_report(tmp_path, scores, [write_image(tmp_path)] * 4, classes, tmp_path, 'these', Image.open)
    assert [[*row.values()] for row in read_csv(tmp_path / 'confusion.csv')] == [
        ['c7', 'c7', '2'], ['c7', 'c49999', '1'], ['c49998', 'c8', '1']]


def write_image(folder):
    Image.new('RGB', (8, 8)).save(folder / 'x.png')
    return str(folder / 'x.png')


@pytest.mark.parametrize('classes, images', [
    (['cat', 'dog'], 1), (['$5 bill$', 'a' * 200, '日本語', 'it\'s "_^', ' ', 'cl\udce9'], 12),
    ([f'class number {i} of a long-winded kind' for i in range(200)], 400),
])
def test_figures_are_drawn_whatever_the_classes_are_called_and_however_many(tmp_path, recwarn, classes, images):
    pytest.importorskip('matplotlib')
    for i in range(images):
        Image.new('RGB', (8 + i % 3, 8), (i % 256, 0, 0)).save(tmp_path / f'{i}.png')
    scores = score(torch.randn(images, len(classes), generator=torch.Generator().manual_seed(0)),
                   torch.arange(images) % len(classes))
    draw_mistakes(tmp_path / 'mistakes.png', [str(tmp_path / f'{i}.png') for i in range(images)], scores, classes,
                  Image.open)
    rows = -(-min(images, 30) // 6)
    assert Image.open(tmp_path / 'mistakes.png').size == (
        max(2 * min(images, 6), 6) * 110, pytest.approx((2.6 * rows + 0.6) * 110, abs=1))
    history = [dict(train_metrics={'loss': 1.}, eval_metrics={'loss': 1., 'top1': 50.})] * images
    draw_curve(tmp_path / 'curve.png', history, images - 1)
    assert min(Image.open(tmp_path / 'curve.png').size) > 300
    assert not [w for w in recwarn if w.category is UserWarning]


@pytest.mark.parametrize('number', [2, 30, 300])
def test_every_class_has_room_for_its_name_in_the_confusion_matrix(tmp_path, monkeypatch, number):
    pytest.importorskip('matplotlib')
    figures = []
    monkeypatch.setattr('timm_mobileformer.cli.report_figures.save_figure', lambda figure, path: figures.append(figure))
    confusion = Counter([(0, 1), (number - 1, 0), *((i, i) for i in range(number))])
    draw_confusion(tmp_path / 'confusion.png', confusion, [f'the class {i}' for i in range(number)])
    figure, = figures
    axes = figure.axes[0]
    figure.draw_without_rendering()
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert len(names) == min(number, 200) and {'the class 0', 'the class 1', f'the class {number - 1}'} <= {*names}
    boxes = [text.get_window_extent() for text in (*axes.get_yticklabels(), *axes.get_xticklabels())]
    assert all(figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max) for box in boxes)
    assert not any(a.overlaps(b) for labels in (boxes[:len(names)], boxes[len(names):])
                   for a, b in zip(labels, labels[1:], strict=False))
    assert max(figure.bbox.size) < 5000
    assert len(axes.texts) == (number + 2 if number <= 30 else 0)


# Classes

def test_classes_are_matched_by_name_whatever_their_order():
    assert match_classes(['dog', 'cat'], ['cat', 'dog'], 'm') == ({'cat': 0, 'dog': 1}, [])
    assert match_classes(['dog', 'yak'], ['cat', 'dog'], 'm') == (
        {'dog': 1}, ['not a class of m, and left out: yak', 'no images of 1 of the 2 classes of m: cat'])
    with pytest.raises(InputError, match=r'none of the classes of the images \(cat\) .* --class-map FILE'):
        match_classes(['cat'], ['class 0', 'class 1'], 'm')


def test_classes_of_imagenet_go_by_their_ids_and_by_names_that_are_not_ambiguous():
    names = list(map(timm.data.DatasetInfoLabelMapper(timm.data.ImageNetInfo('imagenet-1k')), range(1000)))
    found, _ = match_classes(['n01440764', 'goldfish, Carassius auratus', 'n03126707', 'crane'], names, 'm')
    assert found == {'n01440764': 0, 'goldfish, Carassius auratus': 1, 'n03126707': 517}


# The command

def test_a_folder_is_measured_and_reported(run, work):
    status, out, printed, _ = run()
    assert status == 0
    assert {path.name for path in out.iterdir()} >= TABLES
    assert 'not a class of test_mobileformer, and left out: yak' in printed
    assert 'no images of 2 of the 7 classes of test_mobileformer: fly, emu' in printed

    predict = ['predict', str(work / 'images'), '--model', 'test_mobileformer', '--checkpoint',
               str(work / 'weights.pth'), '--class-map', str(work / 'names.txt'), '--workers', '0',
               '--output', str(out / 'other.csv')]
    assert main(predict) == 0
    wanted = {row['path']: (row['label'], row['probability']) for row in read_csv(out / 'other.csv')}
    rows = read_csv(out / 'predictions.csv')
    assert len(rows) == 22 and len({row['prediction'] for row in rows}) > 2
    for row in rows:
        assert row['class'] == row['path'].split('/')[0]
        assert (row['prediction'], row['probability']) == wanted[str(work / 'images' / row['path'])]
    mistakes = [row for row in rows if row['prediction'] != row['class']]
    assert sorted(row['path'] for row in read_csv(out / 'mistakes.csv')) == sorted(row['path'] for row in mistakes)
    right = len(rows) - len(mistakes)
    assert f'top-1 {100 * right / 22:.2f} % ({right} of 22)' in printed and 'top-5' in printed


def test_of_splits_the_test_set_is_measured_or_else_the_validation_set(run, work, tmp_path):
    for split in 'train', 'val', 'test':
        shutil.copytree(work / 'images' / 'ant', tmp_path / 'data' / split / 'ant')
        shutil.copytree(work / 'images' / 'owl', tmp_path / 'data' / split / 'owl')
    for split in 'test', 'val':
        status, out, printed, _ = run(data=tmp_path / 'data')
        assert status == 0 and f'{split}: top-1 ' in printed
        assert all(row['path'].startswith(f'{split}/') for row in read_csv(out / 'predictions.csv'))
        shutil.rmtree(tmp_path / 'data' / split)
    status, _, _, error = run(data=tmp_path / 'data')
    assert status == 2 and f'--data-dir {tmp_path / "data" / "train"}' in error
    status, _, printed, _ = run(data=tmp_path / 'data' / 'train')
    assert status == 0 and f'{tmp_path / "data" / "train"}: top-1 ' in printed


def test_images_that_cannot_be_read_are_named_and_not_counted(run, work, tmp_path):
    shutil.copytree(work / 'images', tmp_path / 'images')
    (tmp_path / 'images' / 'ant' / '1.png').write_bytes(b'no image')
    shutil.copytree(work / 'images' / 'bee', tmp_path / 'images' / '\x1b[2Jx')
    status, out, printed, _ = run(data=tmp_path / 'images')
    assert status == 1 and '1 of 22 images could not be read' in printed and ' of 21)' in printed
    assert r'left out: \x1b[2Jx, yak' in printed and '\x1b' not in printed  # no command to the terminal
    problem = next(row for row in read_csv(out / 'predictions.csv') if row['problem'])
    assert problem['path'] == 'ant/1.png' and not problem['prediction']


def test_a_table_of_labels_is_measured(run, tmp_path):
    pytest.importorskip('pandas', reason='pandas reads tables')
    for splits in ('', '', ''), ('split', 'test', 'test'), ('subset', 'val', 'val'), ('split', 'train', 'test'):
        rows = zip(('file,label', 'ant/0.png,ant', 'owl/1.png,bee'), splits, strict=True)
        (tmp_path / 'labels.csv').write_text(''.join(f'{row},{split}\n' for row, split in rows))
        _, out, printed, _ = run('--labels', tmp_path / 'labels.csv')
        classes = ['bee'] if 'train' in splits else ['ant', 'bee']
        assert [row['class'] for row in read_csv(out / 'predictions.csv')] == classes
        assert f' of {len(classes)})' in printed


def test_a_finetuned_model_is_measured_on_what_it_was_not_trained_on(work, tmp_path, capsys):
    def finetune(data, *more):
        assert main(['finetune', '--data-dir', str(data), '--model', 'test_mobileformer', '--img-size', '32',
                     '--epochs', '1', '--batch-size', '8', '--epoch-repeats', '1', '--workers', '0', '--device', 'cpu',
                     '--output', str(tmp_path / 'run'), *more]) == 0
        return capsys.readouterr().out

    def evaluate(*args):
        assert main(['evaluate', '--model', str(tmp_path / 'run'), '--workers', '0', '--device', 'cpu',
                     '--output', str(tmp_path / 'out'), *map(str, args)]) == 0
        return capsys.readouterr().out

    def line(printed, what):
        return next(line for line in printed.splitlines() if line.startswith(what))

    trained = line(finetune(work / 'images'), 'validation set: top-1')
    for args in (), ('--data-dir', work / 'images'):  # the folder has no split, and most of it was trained on
        printed = evaluate(*args)
        assert line(printed, 'validation set of the training: top-1').split(':')[1] == trained.split(':')[1]
    copy = shutil.copytree(work / 'images', tmp_path / 'copy')
    for table, number in (copy / 'all.csv', None), (work / 'images' / 'one.csv', 1):
        table.write_text('file,label\n' + ''.join(
            f'{folder.name}/{name},{folder.name}\n' for folder in sorted(table.parent.iterdir()) if folder.is_dir()
            for name in os.listdir(folder)[:number]))
    printed = evaluate('--labels', copy / 'all.csv')
    assert line(printed, 'validation set of the training: top-1').split(':')[1] == trained.split(':')[1]
    printed = evaluate('--data-dir', work / 'images', '--labels', work / 'images' / 'one.csv')
    assert 'may include training images' in printed and 'validation set of the training' not in printed
    (work / 'images' / 'one.csv').unlink()
    evaluate()
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    for name in names - {'classes.csv', 'metrics.json'}:  # the first says how many were trained on, too
        assert (tmp_path / 'run' / name).read_bytes() == (tmp_path / 'out' / name).read_bytes(), name

    shutil.rmtree(tmp_path / 'run')
    for split in 'train', 'val', 'test':
        shutil.copytree(work / 'images', tmp_path / 'data' / split)
    shutil.rmtree(tmp_path / 'data' / 'test' / 'yak')
    printed = finetune(tmp_path / 'data')
    assert ' of 26)' in line(printed, 'validation set') and ' of 22)' in line(printed, 'test set')
    assert len(read_csv(tmp_path / 'run' / 'predictions.csv')) == 26
    assert len(read_csv(tmp_path / 'run' / 'test' / 'predictions.csv')) == 22
    assert line(evaluate(), 'test set') == line(printed, 'test set')

    shutil.rmtree(tmp_path / 'run')
    shutil.rmtree(tmp_path / 'data' / 'val')
    assert 'the best epoch was selected on the test set' in finetune(tmp_path / 'data')


def test_an_exported_file_is_measured_as_its_model(run, work, tmp_path, capsys):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    assert main(['export', 'onnx', '--model', 'test_mobileformer', '--checkpoint', str(work / 'weights.pth'),
                 '--class-map', str(work / 'names.txt'), '--output', str(tmp_path)]) == 0
    _, out, _, _ = run()
    shutil.move(out, tmp_path / 'by_pytorch')
    assert main(['evaluate', '--model', str(tmp_path / 'test_mobileformer.onnx'), '--data-dir', str(work / 'images'),
                 '--workers', '0', '--output', str(out)]) == 0
    for name in TABLES - {'metrics.json', 'predictions.csv', 'mistakes.csv'}:  # with probabilities
        assert (out / name).read_bytes() == (tmp_path / 'by_pytorch' / name).read_bytes()
    found, wanted = (json.loads((folder / 'metrics.json').read_text()) for folder in (out, tmp_path / 'by_pytorch'))
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize('args, problem', [
    (('--model', 'resnet18', '--pretrained'), '--pretrained: not allowed with argument --checkpoint'),
    (('--data-dir', 'missing'), '--data-dir: no such folder: missing'),
    (('--class-map', os.devnull), f'{os.devnull} names 0 classes, the model has 7'),
])
def test_what_cannot_be_used_is_refused_in_one_line(run, args, problem):
    status, out, printed, error = run(*args)
    assert status == 2 and error.startswith(f'error: {problem}') and error.count('\n') == 1
    assert not out.exists()


# The heap

@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='the heap of glibc is what is set')
def test_freed_memory_is_used_again_without_page_faults():
    code = """
import resource
from timm_mobileformer.cli.heap import keep_heap
keep_heap()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b'x' * 100_000_000
before = faults()
b'x' * 100_000_000
assert faults() - before < 1000, faults() - before
"""
    subprocess.run([sys.executable, '-c', code], check=True)
    with pytest.raises(subprocess.CalledProcessError):  # by default it has 24,000
        subprocess.run([sys.executable, '-c', code.replace('\nkeep_heap()', '')], check=True, capture_output=True)
