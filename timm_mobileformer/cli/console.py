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

__all__ = ['InputError', 'abbreviate', 'close_bars', 'missing', 'plural', 'printable', 'progress',
           'quiet_unless_it_fails', 'quote', 'reason', 'worker_errors']

SECONDS = 30  # between lines of progress without a terminal


class InputError(Exception):
    """Error in an input of the user; the message states the problem and, where possible, the solution."""


def printable(text: str) -> str:
    """Escape control characters, such as those of terminal escape sequences, as Python does: `\\x1b`."""
    return re.sub(r'[\x00-\x1f\x7f-\x9f]', lambda match: repr(match[0])[1:-1], text)


def reason(error: BaseException, limit: int = 600) -> str:
    """Return the message of an error in one line, shortened to `limit` characters."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f'{error.filename}: {error.strerror}'
    if isinstance(error, KeyError):
        text = f'there is no {text}'
    if isinstance(error, InputError):
        return printable(text.replace('\n', ' '))  # keep spaces: there may be commands to copy
    text = printable(' '.join(text.split()) or type(error).__name__)
    return text if len(text) <= limit else f'{text[:limit]} …'


def abbreviate(names: Iterable[Any], limit: int = 5) -> str:
    """Join the first `limit` names, with control characters escaped, and the number of the others."""
    names = [printable(str(n)) for n in (sorted(names, key=str) if isinstance(names, Set) else names)]
    return ', '.join(names[:limit]) + (f' and {len(names) - limit:,} more' if len(names) > limit else '')


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `1,000 epochs`, `0 batches`."""
    ending = '' if number == 1 else 'es' if noun.endswith(('tch', 's')) else 's'
    return f'{number:,} {noun}{ending}'


def quote(text: Any) -> str:
    """Quote a string for the shell."""
    return shlex.quote(str(text))


def missing(extra: str, *modules: str) -> str:
    """Return a message with the missing modules and the extra that installs them, '' if none is missing."""
    absent = [name for name in modules if not find_spec(name)]
    return f"needs {', '.join(absent)}: pip install 'timm_mobileformer[{extra}]'" if absent else ''


class ProgressLines(io.TextIOBase):
    """Output file for tqdm without a terminal: prints a line to standard error every `SECONDS`."""

    def __init__(self) -> None:
        self.next = time.monotonic() + SECONDS

    def write(self, text: str) -> int:
        line = text.strip()  # remove carriage returns and other cursor codes
        if line and time.monotonic() >= self.next:
            print(line, file=sys.stderr, flush=True)
            self.next = time.monotonic() + SECONDS
        return len(text)


class progress(tqdm):
    """tqdm progress bar that disappears when done; without a terminal, it prints a line every 30 seconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file = None if sys.stderr.isatty() else ProgressLines()
        super().__init__(*args, **{'leave': False, 'file': file, **kwargs})


@contextmanager
def quiet_unless_it_fails() -> Iterator[None]:
    """Hide the standard error of libraries unless an exception is raised."""
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


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise an `InputError` of one line for the errors of a DataLoader's workers.

    PyTorch raises the `InputError` of a worker with a traceback in its message, and errors of several types if a worker
    was killed.
    """
    try:
        yield
    except InputError as e:
        raise InputError(str(e).rpartition('InputError: ')[2].rstrip()) from e
    except (ConnectionError, EOFError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not str(e).startswith('DataLoader worker'):
            raise
        raise InputError(
            f'a worker that reads images was killed ({reason(e)}); if memory ran out, try fewer --workers') from e


def close_bars() -> None:
    """Close all open progress bars, including those of other libraries, before an error is printed."""
    for bar in list(tqdm._instances):
        bar.close()
