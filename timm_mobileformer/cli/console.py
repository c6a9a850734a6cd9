"""What the user sees."""
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Iterable

from tqdm import tqdm

__all__ = ['InputError', 'close_bars', 'missing', 'progress', 'quiet_unless_it_fails', 'quote', 'reason',
           'abbreviate']


class InputError(Exception):
    """What the user gave cannot be used; the text says what was wrong and what would be right."""


def reason(error: BaseException, limit: int = 600) -> str:
    """What an error says, in a line; those of other libraries may fill a page."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f'{error.filename}: {error.strerror}'
    if isinstance(error, KeyError):
        text = f'there is no {text}'
    if isinstance(error, InputError):
        return text.replace('\n', ' ')  # with all spaces of what can be pasted
    text = ' '.join(text.split()) or type(error).__name__
    return text if len(text) <= limit else f'{text[:limit]} …'


def abbreviate(names: Iterable[Any], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    names = sorted(str(n) for n in names) if isinstance(names, Set) else [str(n) for n in names]
    return ', '.join(names[:limit]) + (f' and {len(names) - limit:,} more' if len(names) > limit else '')


def quote(text: Any) -> str:
    """`text` as it can be pasted into a shell."""
    return shlex.quote(str(text))


def missing(extra: str, *modules: str) -> str:
    """Which modules are not installed and which extra of this package brings them; '' if all are there."""
    absent = [name for name in modules if not find_spec(name)]
    return f"needs {', '.join(absent)}: pip install 'timm_mobileformer[{extra}]'" if absent else ''


class progress(tqdm):
    """tqdm, silent without a terminal, and gone when it is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{'leave': False, 'disable': None, **kwargs})


@contextmanager
def quiet_unless_it_fails() -> Iterator[None]:
    """Keep back what libraries write to standard error, by Python or not; it is shown if they fail."""
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
    """Take away the bars that are left where an error passed by, those of other libraries too."""
    for bar in list(tqdm._instances):
        bar.close()
