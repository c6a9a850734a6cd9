"""What is installed: the wheel's files, and the version."""
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import timm_mobileformer

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_all_that_is_used_and_nothing_else(tmp_path):
    pytest.importorskip('hatchling', reason='hatchling builds the wheel')
    subprocess.run([sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(tmp_path)], cwd=ROOT,
                   check=True, capture_output=True)
    wheel, = tmp_path.iterdir()
    assert wheel.name == f'timm_mobileformer-{timm_mobileformer.__version__}-py3-none-any.whl'
    package = ROOT / 'timm_mobileformer'
    used = [package / 'py.typed', *package.glob('*.py'), *package.glob('cli/*.py'), *package.glob('recipes/*.yaml'),
            *(package / 'web').iterdir()]
    held = [name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name]
    assert sorted(held) == sorted(str(path.relative_to(ROOT)) for path in used)


def test_the_version_is_that_of_the_installed_package():
    assert timm_mobileformer.__version__ == version('timm_mobileformer')
