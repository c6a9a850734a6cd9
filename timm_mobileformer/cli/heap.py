"""Settings of the C library's heap."""
import ctypes
import platform

__all__ = ['keep_heap']

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_heap() -> None:
    """Let glibc keep the memory of freed tensors for the next ones; elsewhere, do nothing.

    By default it takes blocks of more than 32 MB from the system each time and gives them back, at the price of a page
    fault for every 4 KB. Child processes inherit the setting. See docs/benchmark.md for what it changes.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)
