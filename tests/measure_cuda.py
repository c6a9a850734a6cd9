"""Everything for a CUDA machine, in eight minutes: parity, the tests of the device, and a table of what models cost.

    python tests/measure_cuda.py

Installs the package if it is not there, runs `test_parity.py` and `test_accelerator.py`, and measures latency at batch
1, throughput at batch 256 and training steps in the time that is left. What is slow to prepare comes last; a dash
stands for what no time or memory was left for, and rows of dashes are left out. The status is 1 if a test failed.

    TORCH_DEVICE=cpu python tests/measure_cuda.py --modes eager --rounds 2

tries it on a CPU, with tiny models.
"""
import argparse
import importlib.util
import os
import random
import subprocess
import sys
import time
from datetime import date
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, NamedTuple

HERE = Path(__file__).resolve().parent
BEGIN = time.monotonic()
os.environ.setdefault('TORCH_DEVICE', 'cuda')
if not importlib.util.find_spec('timm_mobileformer'):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '-e', f'{HERE.parent}[test]'], check=True)

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from device import DEVICE  # noqa: E402
from timm.utils import reparameterize_model  # noqa: E402

from timm_mobileformer.cli.benchmarking import describe, load, many_compiled  # noqa: E402

ON_CPU = DEVICE.type == 'cpu'
if ON_CPU:
    torch.set_num_threads(1)
MODELS = ('test_mobileformer', 'test_byobnet') if ON_CPU else (
    'mobileformer_52m', 'mobileformer_294m', 'mobileformer_508m', 'mobilenetv3_large_100', 'mobilenetv4_conv_medium',
    'efficientnet_b0', 'repvit_m0_9')
SIZE, BATCH = (32, 2) if ON_CPU else (224, 256)
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
COMPILED = 'reduce-overhead', 'max-autotune-no-cudagraphs'
MODES = ('eager', 'CUDA graph', *COMPILED)
TASKS = {'latency': 1, 'throughput': BATCH, 'training': BATCH}


class Cell(NamedTuple):
    """What is measured of every model."""
    task: str
    mode: str
    dtype: str
    channels_last: bool


USUAL = ('float32', False), ('float16', True)
OTHER = ('float16', False), ('bfloat16', True), ('float32', True), ('bfloat16', False)
CELLS = [Cell(task, mode, *form) for form in USUAL for mode in ('eager', 'CUDA graph') for task in TASKS]
CELLS += [Cell(task, 'eager', *form) for form in OTHER for task in TASKS]
CELLS += [Cell(task, 'CUDA graph', 'bfloat16', True) for task in TASKS]
CELLS += [Cell('latency', COMPILED[0], *form) for form in USUAL]
CELLS += [Cell('training', COMPILED[0], 'float16', True)]
CELLS += [Cell(task, COMPILED[1], 'float16', True) for task in ('throughput', 'training')]
CELLS += [Cell('throughput', COMPILED[1], 'float32', False)]


@lru_cache
def images(batch: int, memory_format: torch.memory_format) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, device=DEVICE).to(memory_format=memory_format)


def record(run: Callable[[], Any], pool: Any) -> Callable[[], Any]:
    """A CUDA graph of what `run` does. All share their memory, since they are replayed one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    graph.step = run  # type: ignore[attr-defined]  # with its model, which a graph reads but does not keep
    return graph.replay


def prepare(name: str, cell: Cell, pool: Any) -> Callable[[], Any]:
    """A step of training, or the inference of a batch, run three times to be warm.

    Inference is that of `reparameterize_model`; training is that of SGD, in 16 bits without scaling of gradients.
    """
    memory_format = torch.channels_last if cell.channels_last else torch.contiguous_format
    training = cell.task == 'training'
    model = load(name, SIZE, DEVICE)
    model = model.train() if training else reparameterize_model(model)
    model = model.to(memory_format=memory_format)
    x = images(TASKS[cell.task], memory_format)
    target = torch.arange(len(x), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    call: Any = torch.compile(model, fullgraph=True, dynamic=False, mode=cell.mode) if cell.mode in COMPILED else model
    dtype = DTYPES[cell.dtype]

    def run() -> None:
        with torch.set_grad_enabled(training), torch.autocast(
                DEVICE.type, dtype, enabled=dtype != torch.float32, cache_enabled=cell.mode != 'CUDA graph'):
            out = call(x)
            loss = F.cross_entropy(out.float(), target) if training else None
        if loss is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    ready = record(run, pool) if cell.mode == 'CUDA graph' else run
    for _ in range(3):
        ready()
    return ready


def wait() -> None:
    if not ON_CPU:
        torch.accelerator.synchronize(DEVICE)


def measure(cells: List[Cell], deadline: float, rounds: int) -> Dict[Cell, Dict[str, List[float]]]:
    """Seconds of every cell and model, all in turns, in another order every round."""
    runs, problems = {}, []
    pool = None if ON_CPU else torch.cuda.graph_pool_handle()
    with many_compiled():
        for cell in cells:
            for name in MODELS:
                if time.monotonic() > deadline - 0.2 * (deadline - BEGIN):  # which the rounds take
                    problems.append(f'no time left for {name}, {cell}')
                    continue
                try:
                    runs[name, cell] = prepare(name, cell, pool)
                except Exception as e:  # out of memory, or what a compiler cannot do
                    problems.append(f'{name}, {cell}: {" ".join(str(e).split())[:200] or type(e).__name__}')
        seconds: Dict[Cell, Dict[str, List[float]]] = {cell: {} for cell in cells}
        turns = list(runs)
        for done in range(rounds):
            if done >= 2 and time.monotonic() > deadline:
                break
            random.shuffle(turns)
            for name, cell in turns:
                runs[name, cell]()  # brings its weights into the caches
                wait()
                begin = time.perf_counter()
                runs[name, cell]()
                wait()
                seconds[cell].setdefault(name, []).append(time.perf_counter() - begin)
    for problem in problems:
        print(problem, file=sys.stderr)
    return seconds


def print_table(seconds: Dict[Cell, Dict[str, List[float]]]) -> None:
    """Milliseconds at batch 1, and images a second of larger batches."""
    versions = f'PyTorch {torch.__version__}, CUDA {torch.version.cuda}, timm {timm.__version__}'
    print(f'\n{describe(DEVICE, torch.get_num_threads())}; {versions}; {SIZE}×{SIZE}; medians; {date.today()}\n')
    print('| | ' + ' | '.join(MODELS) + ' |\n|---' + '|---:' * len(MODELS) + '|')
    for cell, times in seconds.items():
        if not times:
            continue
        unit = 'ms' if cell.task == 'latency' else 'images/s'
        what = [f'{cell.task} at batch {TASKS[cell.task]}, {unit}', cell.mode, cell.dtype]
        what += ['channels-last'] if cell.channels_last else []
        values = [median(times[name]) if name in times else None for name in MODELS]
        texts = ['–' if value is None else f'{1e3 * value:.2f}' if unit == 'ms' else f'{TASKS[cell.task] / value:,.0f}'
                 for value in values]
        print(f'| {", ".join(what)} | {" | ".join(texts)} |')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=8, help='to take at most (default: 8)')
    parser.add_argument('--rounds', type=int, default=50, help='measurements of each cell, at most (default: 50)')
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES, help='default: all')
    parser.add_argument('--no-tests', action='store_true', help='measure only')
    args = parser.parse_args()
    deadline = BEGIN + 60 * args.minutes
    failed = 0
    if not args.no_tests:
        files = [str(HERE / f'test_{name}.py') for name in ('parity', 'accelerator')]
        try:
            tests = [sys.executable, '-m', 'pytest', '-q', '-n', 'auto', '--maxprocesses', '8', *files]
            failed = subprocess.run(tests, cwd=HERE.parent, timeout=30 * args.minutes).returncode
        except subprocess.TimeoutExpired:
            print('the tests took more than half of the time, and were stopped')
            failed = 1
    modes = [mode for mode in args.modes if mode != 'CUDA graph' or not ON_CPU]
    print_table(measure([cell for cell in CELLS if cell.mode in modes], deadline, args.rounds))
    return int(failed != 0)


if __name__ == '__main__':
    sys.exit(main())
