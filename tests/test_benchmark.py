"""`timm-mobileformer benchmark`: what it writes, and what it refuses."""
import re
import sys

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

from timm_mobileformer.authors import PAPER_TOP1
from timm_mobileformer.cli import benchmark_figure, benchmarking, main
from timm_mobileformer.cli.benchmarking import Row, measure
from timm_mobileformer.cli.cost import count_macs, saved_for_backward
from timm_mobileformer.cli.published import PUBLISHED


def run_here(*args):
    threads = torch.get_num_threads()
    try:
        return main(['benchmark', *map(str, args)])
    finally:
        torch.set_num_threads(threads)


def refused(capsys, *args):
    """The line on stderr with which `args` are refused."""
    assert run_here(*args) == 2
    line, end = capsys.readouterr().err.split('\n')
    assert not end
    return line


# The counters

def test_multiply_adds_are_those_of_one_image():
    assert count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 10)) == 3 * 8 * 9 * 100


def test_saved_is_what_backward_needs_once_and_without_parameters_and_images():
    x = torch.randn(2, 16)
    logits = 4 * 4 + 4  # bytes for each image: logsumexp keeps its input and its output
    assert saved_for_backward(nn.Linear(16, 4), x) == logits
    hidden = 32 * 4  # the sigmoid's output, which two layers keep
    assert saved_for_backward(nn.Sequential(nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 4)), x) == logits + hidden


# Measuring

def test_all_rows_take_turns_in_an_order_of_its_own_each_round():
    calls = []
    rows = [Row(name, False, nn.Identity(), torch.empty(1, 3, 8, 8), 0, 0, None) for name in 'abcde']
    for row in rows:
        row.runs = {runtime: lambda turn=(row.name, runtime): calls.append(turn) for runtime in ('eager', 'onnx')}
    measure(rows, rounds=4, device=torch.device('cpu'))
    calls = calls[3 * 10:]  # after warming up
    assert calls[::2] == calls[1::2]  # once to warm the caches, once measured
    rounds = [calls[i:i + 20:2] for i in range(0, len(calls), 20)]
    assert [len(set(r)) for r in rounds] == [10] * 4
    assert len({tuple(r) for r in rounds}) == 4
    assert all(len(seconds) == 4 and min(seconds) > 0 for row in rows for seconds in row.seconds.values())


def test_top1_of_every_default_model_is_quoted_with_its_source():
    assert list(PUBLISHED)[:7] == list(PAPER_TOP1)
    for name, (top1, size, source) in PUBLISHED.items():
        if name in PAPER_TOP1:
            assert (top1, size, source) == (PAPER_TOP1[name], 224, 'the paper')
        else:
            tag = re.fullmatch('timm, `(.+)`', source)[1]
            assert f'{name}.{tag}' in timm.list_pretrained(f'{name}.*')


# The command

def test_table_and_plot(tmp_path, capsys):
    models = ['test_mobileformer', 'mobileformer_26m', 'mobilenetv3_small_100']
    assert not run_here('--model', *models, '--img-size', 64, '--batch-size', 2, '--rounds', 2,
                        '--output', tmp_path / 'new' / 'folder')
    table = (tmp_path / 'new' / 'folder' / 'table.md').read_text(encoding='utf-8')
    printed = capsys.readouterr().out
    assert table in printed and 'not in the plot: test_mobileformer\n' in printed and 'replacing' not in printed
    assert 'latencies are for images of 64 × 64 pixels, published accuracies for 224 × 224' in printed
    assert torch.__version__ in table and timm.__version__ in table and 'batch of 2' in table
    header, _, *lines = [line.strip('| ').split(' | ') for line in table.splitlines() if line.startswith('|')]
    assert [line[0] for line in lines] == [
        'test_mobileformer', 'test_mobileformer, fused', 'mobileformer_26m', 'mobileformer_26m, fused',
        'mobilenetv3_small_100']
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row['top-1 by'] for row in rows[3:]] == ['the paper at 224', 'timm, `lamb_in1k` at 224']
    assert [row['top-1, %'] for row in rows] == ['–', '–', '64.0', '64.0', '67.6']
    assert [row['parameters, M'] for row in rows[2::2]] == ['3.23', '2.54']
    assert all(row['image'] == '64×64' for row in rows)
    for row in rows:
        for runtime in 'PyTorch eager, ms', 'ONNX Runtime, ms':
            median, low, high = map(float, re.findall(r'[\d.]+', row[runtime]))
            assert 0 < low <= median <= high
    with Image.open(tmp_path / 'new' / 'folder' / 'plot.png') as plot:
        assert plot.width > 1000 and len(plot.convert('RGB').getcolors(plot.width * plot.height)) > 20


def test_an_earlier_result_is_replaced_as_a_whole_and_with_a_remark(tmp_path, capsys):
    for name in 'table.md', 'plot.png':
        (tmp_path / name).write_text('of before')
    assert not run_here('--model', 'test_mobileformer', '--runtimes', 'eager', '--rounds', 2, '--output', tmp_path)
    assert f'written to {tmp_path}: table.md, replacing those of an earlier run' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['table.md']  # no plot without a published accuracy


@pytest.mark.parametrize('names', [
    ['mobileformer_52m'], ['mobileformer_52m', 'mobilenetv3_small_100'], [*PUBLISHED]], ids=len)
def test_plots_of_any_number_of_models_have_ticks_and_every_name_apart_from_the_others(names, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(benchmark_figure, 'save_figure', lambda figure, path: figures.append(figure))
    rows = []
    for i, name in enumerate(names):
        row = Row(name, False, nn.Identity(), torch.empty(1, 3, 8, 8), 0, 0, None)
        row.runs, row.seconds = {'eager': print}, {'eager': [0.002 + 0.001 * (7 * i % len(names))] * 3}
        rows.append(row)
    benchmark_figure.draw(rows, 'a heading', tmp_path / 'plot.png')
    figure, = figures
    figure.draw_without_rendering()
    assert 'latencies are for images of 8 × 8 pixels, published accuracies for 224 × 224' in figure.get_suptitle()
    axes, = figure.axes
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(names) and all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
                                            for box in boxes)
    assert sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0


def test_channels_last_reaches_the_model(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(benchmarking, 'measure', lambda rows, *args: measured.extend(rows) or measure(rows, *args))
    assert not run_here('--model', 'test_mobileformer', '--channels-last', '--img-size', 64, '--rounds', 2,
                        '--output', tmp_path)
    assert 'channels-last' in (tmp_path / 'table.md').read_text(encoding='utf-8')
    for row in measured:
        features = row.model.forward_intermediates(row.x, intermediates_only=True)
        assert all(map_.is_contiguous(memory_format=torch.channels_last) for map_ in features)


@pytest.mark.parametrize(('args', 'reason'), [
    (('--model', 'mobileformer_1m', 'resnet18'), 'mobileformer_1m is neither a model of timm nor a folder'),
    (('--rounds', 1), '--rounds: must be at least 2, not 1'),
    (('--img-size', 16), '--img-size: must be at least 32, not 16'),
    (('--device', 'abacus'), '--device abacus: '),
    (('--device', 'meta', '--runtimes', 'onnx'), 'ONNX Runtime is measured on the CPU'),
])
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys, args, reason):
    assert refused(capsys, *args, '--output', tmp_path / 'new').startswith(f'error: {reason}')
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(('module', 'extra'), [('onnxruntime', 'export'), ('matplotlib', 'demo')])
def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path, capsys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, '--output', tmp_path / 'new')
    assert module in line and f"pip install 'timm_mobileformer[{extra}]'" in line
    assert not (tmp_path / 'new').exists()


def test_a_file_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert str(tmp_path / 'file') in refused(capsys, '--output', tmp_path / 'file')
