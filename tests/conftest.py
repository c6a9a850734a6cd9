import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Tuple

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: many tests start processes, which would fight for cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs, and their children, ignore it

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from device import DEVICE  # noqa: E402
from hub_server import Hub, serve  # noqa: E402


@pytest.fixture(scope='module')
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hugging Face Hub on loopback, without the repositories of other modules."""
    folder: Path = tmp_path_factory.mktemp('hub')
    with serve(folder) as running:
        yield running


@pytest.fixture
def exact_hardswish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace hardswish where PyTorch computes it less exactly than the dtype: CUDA rounds 1/6 to float32, always."""

    def hardswish(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return x * F.relu6(x + 3) / 6

    x = torch.linspace(-4, 4, 100, dtype=torch.float64, device=DEVICE)
    if (F.hardswish(x) - hardswish(x)).abs().max() > 1e-12:
        monkeypatch.setattr(F, 'hardswish', hardswish)


@pytest.fixture(scope='session')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits inside scikit-learn, in class folders."""
    pytest.importorskip('sklearn', reason='scikit-learn has the digits')
    from timm_mobileformer.cli.digits import write_digits

    folder = tmp_path_factory.mktemp('digits')
    write_digits(folder)
    return folder


@pytest.fixture(scope='session')
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, str]:
    """A folder in which `timm-mobileformer finetune` ran, on the digits in few epochs, and what it printed."""
    pytest.importorskip('sklearn', reason='scikit-learn has the digits')
    pytest.importorskip('matplotlib', reason='matplotlib draws the figures')
    folder = tmp_path_factory.mktemp('trained')
    done = subprocess.run([sys.executable, '-m', 'timm_mobileformer', 'finetune', '--epochs', '4', '--lr', '2e-3'],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and '\r' not in done.stderr, done.stderr  # without a terminal, no bars
    return folder, done.stdout
