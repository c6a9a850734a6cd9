"""Heap settings of glibc."""
import ctypes
import platform

__all__ = ['keep_heap']

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_heap() -> None:
    """Make glibc keep freed memory for later allocations; without glibc, do nothing.

    By default, glibc maps blocks of more than 32 MB anew for each allocation, which costs a page fault for every 4 KB.
    Child processes inherit the setting. Measurements are in docs/benchmark.md.
    """
    if platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)
