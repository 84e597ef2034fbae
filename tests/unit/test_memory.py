"""What is free goes back to the kernel, and threads have no heaps of their own. In a process of its own: both are for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, threading
from dolium import memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4

def heaps():
    with open("/proc/self/maps") as file:  # a thread's heap is reserved by 64 MiB
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in file if " ---p " in line]
    return sum(end - start > 60 << 20 for start, end in spans)

memory.one_heap()
threads = [threading.Thread(target=lambda: [libc.free(libc.malloc(1000)) for _ in range(1000)]) for _ in range(4)]
before = heaps()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert heaps() == before, "threads have heaps"
pieces = [libc.malloc(1000) for _ in range(32 << 10)]
for piece in pieces:
    ctypes.memset(piece, 1, 1000)
for piece in pieces[:-1]:
    libc.free(piece)
held = resident()
memory.give_back()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps what is freed")
def test_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20 << 10  # of 32 MiB
