import os
from pathlib import Path
from typing import Iterator

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: many tests start processes, which would fight for cores

import pytest  # noqa: E402
from hub_server import Hub, serve  # noqa: E402


@pytest.fixture(scope='session')
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hugging Face Hub on loopback."""
    folder: Path = tmp_path_factory.mktemp('hub')
    with serve(folder) as running:
        yield running
