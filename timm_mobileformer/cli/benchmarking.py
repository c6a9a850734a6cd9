"""Compare the latency, training memory and size of models in a table and a figure."""
import argparse
import platform
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import quantiles
from typing import Any, ContextManager, Dict, List, Optional

import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from torch.optim.swa_utils import update_bn
from torch.utils.collect_env import get_cpu_info
from torch.utils.collect_env import run as run_command

from .benchmark import RUNTIMES
from .benchmark_figure import draw, other_sizes
from .console import InputError, plural, progress, reason
from .cost import count_macs, saved_for_backward
from .files import atomic_dir
from .formats import open_onnx
from .heap import keep_heap
from .load import find_model, known_config, model_args, pick_device
from .published import PUBLISHED
from .run_state import claim

__all__ = ['run']


@dataclass
class Row:
    """A model, as trained or fused, and its measurements.

    Attributes:
        name: Name in timm.
        fused: Whether the model was changed by `timm.utils.reparameterize_model`.
        model: The model.
        x: Images of shape (B, C, H, W).
        params: Number of parameters.
        macs: Multiply-adds per image.
        saved: Bytes per image that are kept for the backward pass; None for a fused model.
        runs: Function for each runtime that runs the model once.
        seconds: Measured times for each runtime.
    """
    name: str
    fused: bool
    model: nn.Module
    x: torch.Tensor
    params: int
    macs: float
    saved: Optional[float]
    runs: Dict[str, Callable[[], Any]] = field(default_factory=dict)
    seconds: Dict[str, List[float]] = field(default_factory=dict)

    def latency(self, runtime: str) -> List[float]:
        """Return the quartiles of the latency in milliseconds."""
        return [1e3 * s for s in quantiles(self.seconds[runtime], n=4, method='inclusive')]


def load(name: str, size: int, device: torch.device) -> nn.Module:
    """Create a model with random weights on images of `size` pixels.

    The statistics of BatchNorm are set so that activations have ordinary magnitudes, since denormal numbers are slow.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, device=device, **model_args(name, {'img_size': size}))
    images = torch.randn(4, 3, size, size, device=device)
    update_bn([images], model)
    with torch.inference_mode():
        model.eval()(images)  # fills caches, such as those of attention biases
    return model


def start(row: Row, runtime: str, threads: int) -> Callable[[], Any]:
    """Prepare a model for a runtime.

    Args:
        row: Model and images.
        runtime: Key of `RUNTIMES`.
        threads: Number of threads of ONNX Runtime.

    Returns:
        A function that runs one inference on the images.
    """
    model, x = row.model, row.x
    if runtime == 'onnx':
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            path = Path(folder, 'model.onnx')
            torch.onnx.export(model, (x,), path, dynamo=False)  # ten times as fast as the other exporter
            session = open_onnx(path, threads)
        feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
        return lambda: session.run(None, feed)
    call = torch.compile(model, fullgraph=True, dynamic=False) if runtime == 'compile' else model
    return lambda: call(x)


def many_compiled() -> ContextManager[Any]:
    """Raise the recompile limits of `torch.compile`, which count all models that share the code of `forward`."""
    return torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10000)


@torch.inference_mode()
def measure(rows: List[Row], rounds: int, device: torch.device) -> None:
    """Measure the latency of all rows in all their runtimes, interleaved in random order."""

    def wait() -> None:
        if device.type != 'cpu':
            torch.accelerator.synchronize(device)

    turns = [(row, runtime) for row in rows for runtime in row.runs]
    with many_compiled():
        for row, runtime in progress(turns, 'warming up'):
            for _ in range(3):
                row.runs[runtime]()
            row.seconds[runtime] = []
    shuffle = random.Random(0).shuffle
    for _ in progress(range(rounds), 'measuring', unit='round'):
        shuffle(turns)
        for row, runtime in turns:
            row.runs[runtime]()  # loads the weights into the caches
            wait()
            begin = time.perf_counter()
            row.runs[runtime]()
            wait()
            row.seconds[runtime].append(time.perf_counter() - begin)


def describe(device: torch.device, threads: int) -> str:
    """Return the name of the device and, for a CPU, the number of threads."""
    if device.type != 'cpu':
        return torch.get_device_module(device).get_device_name(device)
    found = re.search(r'Model name:\s*(.+)', get_cpu_info(run_command) or '')
    cpu = found.group(1) if found else platform.processor() or platform.machine()
    return f'{cpu}, {plural(threads, "thread")}'


def make_table(rows: List[Row], heading: str) -> str:
    """Return the rows as a Markdown table with an explanation of the columns."""
    runtimes = list(rows[0].runs)
    header = ['model', 'image', 'parameters, M', 'MACs, M', 'top-1, %', 'top-1 by']
    header += [f'{RUNTIMES[r]}, ms' for r in runtimes] + ['training, MB']
    lines = [header, ['---'] * 2 + ['---:'] * 3 + ['---'] + ['---:'] * (len(header) - 6)]
    for row in rows:
        top1 = PUBLISHED.get(row.name)
        times = [row.latency(r) for r in runtimes]
        lines.append([
            f'{row.name}, fused' if row.fused else row.name,
            '×'.join(str(n) for n in row.x.shape[2:]),
            f'{row.params / 1e6:.2f}',
            f'{row.macs / 1e6:.0f}',
            f'{top1.top1:.1f}' if top1 else '–',
            f'{top1.source} at {top1.size}' if top1 else '–',
            *(f'{median:.1f} ({low:.1f}–{high:.1f})' for low, median, high in times),
            '–' if row.saved is None else f'{row.saved / 1e6:.1f}',
        ])
    table = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
    return f"""{heading}

{table}

- fused: after `timm.utils.reparameterize_model`; it does not change models without such a row.
- MACs: multiply-adds of convolutions and matrix products, half of what PyTorch's `FlopCounterMode` counts.
- top-1: accuracy on ImageNet-1k, not measured here: from the paper (arXiv 2108.05895), or from timm's
  `results/results-imagenet.csv` for the weights named; its image size may differ from that of the latency.
- ms: median (quartiles) for the whole batch.
- training: memory kept for the backward pass per image, without parameters.
"""


def make_rows(name: str, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Yield a model as trained and, if fusing changes it, fused, ready to be measured.

    Raises:
        InputError: The images of the model are not square, and `--img-size` is not given.
    """
    cfg, _ = known_config(name)
    _, height, width = cfg['input_size']
    if height != width and not args.img_size:
        raise InputError(f'its images are not square ({height} × {width}); choose a size with --img-size')
    size = args.img_size or (PUBLISHED[name].size if name in PUBLISHED else width)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = load(name, size, device).to(memory_format=memory_format)
    images = torch.randn(max(args.batch_size, 4), 3, size, size, device=device).to(memory_format=memory_format)
    saved = saved_for_backward(load(name, size, device).to(memory_format=memory_format), images[:4])
    as_trained = 0
    for fused in False, True:
        net = reparameterize_model(model) if fused else model
        params = sum(p.numel() for p in net.parameters())
        if params != as_trained:
            row = Row(name, fused, net, images[:args.batch_size], params, count_macs(net, images[:1]),
                      None if fused else saved)
            row.runs = {runtime: start(row, runtime, args.threads) for runtime in args.runtimes}
            yield row
        as_trained = params


def run(args: argparse.Namespace) -> None:
    keep_heap()
    names = [find_model(name) for name in args.model or PUBLISHED]
    device = pick_device(args)
    torch.set_num_threads(args.threads)
    versions = f'PyTorch {torch.__version__}, timm {timm.__version__}'
    if 'onnx' in args.runtimes:
        import onnxruntime
        versions += f', ONNX Runtime {onnxruntime.__version__}'
    maps = 'float32, channels-last' if args.channels_last else 'float32'
    heading = f'{describe(device, args.threads)}; batch of {args.batch_size}, {maps}; {versions}; {date.today()}'
    with claim(args.output), atomic_dir(args.output) as folder:
        rows: List[Row] = []
        for name in progress(names, 'preparing', unit='model'):
            try:
                rows += make_rows(name, args, device)
            except Exception as e:  # models raise errors of many types
                raise InputError(f'{name} cannot be measured: {reason(e)}') from e
        measure(rows, args.rounds, device)
        table = make_table(rows, f'{heading}. Medians of {args.rounds} rounds.')
        print(table)
        if drawn := [row for row in rows if row.name in PUBLISHED]:
            draw(drawn, heading, folder / 'plot.png')
        if remark := other_sizes(drawn):
            print(remark)
        (folder / 'table.md').write_text(table, encoding='utf-8')
        written = ', '.join(sorted(path.name for path in folder.iterdir()))
        earlier = [path for name in ('plot.png', 'table.md') if (path := args.output / name).exists()]
        for path in earlier:  # table and plot must be of the same run
            path.unlink()
    if left_out := list(dict.fromkeys(row.name for row in rows if row not in drawn)):
        print(f'without published accuracy, hence not in the plot: {", ".join(left_out)}')
    print(f'written to {args.output}: {written}{", replacing those of an earlier run" if earlier else ""}')
