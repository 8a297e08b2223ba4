"""What a process does with memory that it has freed."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def keep_freed() -> bool:
    """Have freed memory of this process kept for its next use, where glibc manages it; returns whether it does.

    A step frees and takes the same hundreds of megabytes again. By default glibc gives large pieces back to the system
    at once, which then fills every page with zeros anew. The process stays at its largest size, which it reaches in
    its first steps.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
