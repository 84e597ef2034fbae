"""The ground: what an idle process keeps. glibc gives every thread a heap of its own and holds on to what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_ARENA_MAX = -8  # mallopt(3)


def one_heap() -> None:
    """One for all threads: those here wait for the kernel, not for each other. Before the first thread."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Return what is free to the kernel. Takes some milliseconds, for which nothing else is allocated."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
