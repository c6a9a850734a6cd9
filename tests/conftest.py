from pathlib import Path
from typing import Iterator

import pytest
from hub_server import Hub, serve


@pytest.fixture(scope='session')
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hugging Face Hub on loopback."""
    folder: Path = tmp_path_factory.mktemp('hub')
    with serve(folder) as running:
        yield running
