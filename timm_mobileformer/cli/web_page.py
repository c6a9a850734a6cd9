"""Web page that classifies images in the browser."""
import base64
import hashlib
import re
import shutil
from pathlib import Path
from typing import List, Optional

from .console import InputError, abbreviate

__all__ = ['find_runtime', 'write_page']

PAGE = Path(__file__).parents[1] / 'web'


def find_runtime(folder: Path) -> List[Path]:
    """Find the files of onnxruntime-web that the page needs.

    Args:
        folder: The npm package, its `dist` folder, or the folder in which npm installed it.

    Raises:
        InputError: The files are missing or of another version.
    """
    script = (PAGE / 'script.js').read_text()
    digests = dict(re.findall(r"'([\w.-]+)': \[\d+, 'sha384-(.*)'\]", script))
    version, = re.findall(r'onnxruntime-web@([\d.]+)', script)
    way_on = f'npm install onnxruntime-web@{version} installs them to node_modules/onnxruntime-web'
    for place in folder, folder / 'dist', folder / 'node_modules/onnxruntime-web/dist':
        files = [place / name for name in digests]
        if all(file.is_file() for file in files):
            other = [file for file in files if digests[file.name] != base64.b64encode(
                hashlib.sha384(file.read_bytes()).digest()).decode()]
            if other:
                raise InputError(f'--runtime {folder}: files differ from onnxruntime-web {version}: '
                                 f'{abbreviate(other)}; {way_on}')
            return files
    raise InputError(f'--runtime {folder} does not contain {" and ".join(digests)}; {way_on}')


def write_page(folder: Path, runtime: Optional[List[Path]]) -> None:
    """Write the page to a folder.

    Args:
        folder: Folder that contains `model.onnx` and `model.onnx.json`.
        runtime: Files of onnxruntime-web to copy (default: the page loads them from a CDN).
    """
    for file in PAGE.iterdir():
        text = file.read_text(encoding='utf-8')
        if runtime:
            text = re.sub(r"'https://cdn\.jsdelivr\.net/.*'", "'./'", text).replace(' https://cdn.jsdelivr.net', '')
        (folder / file.name).write_text(text, encoding='utf-8')
    for file in runtime or ():
        shutil.copyfile(file, folder / file.name)
