"""Memory of the host that a process frees and takes again in each step."""

import ctypes
import os

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
THREAD_HEAP = 64 << 20  # bytes of a heap outside the main thread, in glibc on 64 bits
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have this process keep what it frees, up to its peak; does nothing where the C library is not glibc.

    By default glibc hands large blocks back to the kernel, so that each step's feature maps come as new pages, which
    the kernel clears: up to 158,000 page faults a step at full width. Ray's workers train in a thread, whose heap
    glibc shrinks by the padding alone, whatever the threshold.
    """
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except ValueError:  # another C library
        return
    if is_glibc:
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_THRESHOLD, NEVER), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, THREAD_HEAP)):
            libc.mallopt(parameter, value)
