"""What the user sees."""
import shlex
from collections.abc import Set
from typing import Any, Iterable

from tqdm import tqdm

__all__ = ['InputError', 'progress', 'quote', 'some']


class InputError(Exception):
    """What the user gave cannot be used; the text says what was wrong and what would be right."""


def some(names: Iterable[Any], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    names = sorted(str(n) for n in names) if isinstance(names, Set) else [str(n) for n in names]
    return ', '.join(names[:limit]) + (f' and {len(names) - limit:,} more' if len(names) > limit else '')


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm, silent without a terminal."""
    return tqdm(*args, **{'leave': False, 'disable': None, **kwargs})


def quote(text: Any) -> str:
    """`text` as it can be pasted into a shell."""
    return shlex.quote(str(text))
