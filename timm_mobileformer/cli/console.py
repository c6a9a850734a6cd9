"""Console output: progress bars, errors, formatting."""
import io
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Iterable

from tqdm import tqdm

__all__ = ['InputError', 'abbreviate', 'close_bars', 'missing', 'printable', 'progress', 'quiet_unless_it_fails',
           'quote', 'reason']

SECONDS = 30  # between lines of progress where there is no terminal


class InputError(Exception):
    """An input cannot be used; the message says what is wrong and what would be right."""


def printable(text: str) -> str:
    """Write control characters, such as those that begin escape sequences of terminals, as Python does: `\\x1b`."""
    return re.sub(r'[\x00-\x1f\x7f-\x9f]', lambda match: repr(match[0])[1:-1], text)


def reason(error: BaseException, limit: int = 600) -> str:
    """Return the message of an error in one line, shortened to `limit` characters."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f'{error.filename}: {error.strerror}'
    if isinstance(error, KeyError):
        text = f'there is no {text}'
    if isinstance(error, InputError):
        return printable(text.replace('\n', ' '))  # keeps the spaces of commands that can be pasted
    text = printable(' '.join(text.split()) or type(error).__name__)
    return text if len(text) <= limit else f'{text[:limit]} …'


def abbreviate(names: Iterable[Any], limit: int = 5) -> str:
    """Join the first `limit` names, in printable characters, and say how many more there are."""
    names = [printable(str(n)) for n in (sorted(names, key=str) if isinstance(names, Set) else names)]
    return ', '.join(names[:limit]) + (f' and {len(names) - limit:,} more' if len(names) > limit else '')


def quote(text: Any) -> str:
    """Quote a text for the shell."""
    return shlex.quote(str(text))


def missing(extra: str, *modules: str) -> str:
    """Return which modules are not installed and which extra installs them, '' if none is missing."""
    absent = [name for name in modules if not find_spec(name)]
    return f"needs {', '.join(absent)}: pip install 'timm_mobileformer[{extra}]'" if absent else ''


class ProgressLines(io.TextIOBase):
    """A file for tqdm where there is no terminal: passes a line to standard error every `SECONDS`."""

    def __init__(self) -> None:
        self.next = time.monotonic() + SECONDS

    def write(self, text: str) -> int:
        line = text.strip()  # of the codes that move a terminal's cursor
        if line and time.monotonic() >= self.next:
            print(line, file=sys.stderr, flush=True)
            self.next = time.monotonic() + SECONDS
        return len(text)


class progress(tqdm):
    """A tqdm progress bar that is removed when done; without a terminal, a line every half minute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file = None if sys.stderr.isatty() else ProgressLines()
        super().__init__(*args, **{'leave': False, 'file': file, **kwargs})


@contextmanager
def quiet_unless_it_fails() -> Iterator[None]:
    """Hide what libraries write to standard error, unless an exception is raised."""
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        shown = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception:
            kept.seek(0)
            os.write(shown, kept.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)


def close_bars() -> None:
    """Remove progress bars that are left after an error, including those of other libraries."""
    for bar in list(tqdm._instances):
        bar.close()
