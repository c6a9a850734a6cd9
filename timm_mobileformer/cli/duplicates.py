"""Byte-for-byte identical images."""
import os
import stat
from collections import defaultdict
from hashlib import sha256
from typing import Any, Callable, Dict, Iterable, List, Optional

from .console import progress

__all__ = ['identical_files']

HEAD = 1 << 16  # bytes


def size(path: str) -> Optional[int]:
    """Return the size of a regular, non-empty file, None for anything else."""
    try:
        status = os.stat(path)
    except OSError:  # reported by `check_images`
        return None
    return status.st_size or None if stat.S_ISREG(status.st_mode) else None


def digest(path: str, length: int = -1) -> Optional[bytes]:
    """Return the SHA-256 of the first `length` bytes of a file, by default of all; None if it cannot be read."""
    try:
        with open(path, 'rb', buffering=0) as file:
            return sha256(file.read(length)).digest()
    except OSError:
        return None


def divide(groups: Iterable[List[str]], key: Callable[[str], Any]) -> List[List[str]]:
    """Divide groups by a key, without items whose key is None or differs from all others in the group."""
    divided = []
    for group in groups:
        by_key: Dict[Any, List[str]] = defaultdict(list)
        for path in group:
            by_key[key(path)].append(path)
        by_key.pop(None, None)
        divided += [same for same in by_key.values() if len(same) > 1]
    return divided


def identical_files(paths: Iterable[str]) -> List[List[str]]:
    """Return groups of paths whose files, or targets of links, have the same content.

    Only files of the same size are read: the first 64 KiB and, if these are equal, the rest.
    """
    by_size = divide([list(dict.fromkeys(paths))], size)
    with progress(total=sum(map(len, by_size)), desc='comparing images') as bar:

        def head(path: str) -> Optional[bytes]:
            bar.update()
            return digest(path, HEAD)

        by_head = divide(by_size, head)
    return divide(by_head, lambda path: b'' if (size(path) or 0) <= HEAD else digest(path))
