"""Files and buffers of the native backend in huge pages: a page walk for every 4 KiB costs a decode a fifth.

A file gets them where its file system keeps large folios (ext4 and xfs on recent kernels): it is mapped at a multiple
of the huge page and read in under that advice. The pages are those of the page cache, so processes share them. Where
the kernel does not go along, small pages do the same work.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from contextlib import suppress

import torch

HUGE_PAGE_BYTES = 1 << 21
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def zeroed_buffer(num_bytes: int) -> torch.Tensor:
    """Zeroed uint8 memory; a page is taken when first touched."""
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = -address % HUGE_PAGE_BYTES
    with suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, offset, num_bytes)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=offset)


def map_file(descriptor: int) -> memoryview:
    """The whole file, read-only and shared, for as long as the view lives.

    Raises:
        ValueError: The file is empty.
        OSError: It cannot be mapped.
    """
    num_bytes = os.fstat(descriptor).st_size
    if num_bytes == 0:
        raise ValueError("it is empty")
    reserved_bytes = num_bytes + HUGE_PAGE_BYTES
    reserved = _mmap(None, reserved_bytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = reserved + -reserved % HUGE_PAGE_BYTES
    try:
        _mmap(address, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
    except OSError:
        _libc.munmap(reserved, reserved_bytes)
        raise
    _libc.madvise(address, num_bytes, mmap.MADV_HUGEPAGE)  # refused where there is no such thing
    _libc.madvise(address, num_bytes, mmap.MADV_WILLNEED)
    array = (ctypes.c_ubyte * num_bytes).from_address(address)
    weakref.finalize(array, _libc.munmap, reserved, reserved_bytes).atexit = False
    return memoryview(array).cast("B").toreadonly()


def forget_cached_pages(descriptor: int) -> None:
    """Write a new file out and drop it from the page cache, where it lies in small pages; the next to map it reads it
    into large ones."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _mmap(address: int | None, num_bytes: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, num_bytes, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
