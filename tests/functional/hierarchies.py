"""cgroup v1 hierarchies of this machine that a peer wants and nobody has mounted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

HUGETLB = Path("/sys/fs/cgroup/hugetlb")


@contextlib.contextmanager
def hugetlb() -> Iterator[None]:
    """Debian's crun refuses a machine with v1 hierarchies that lacks this one. Taken away after."""
    if HUGETLB.is_mount() or os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        yield
        return
    shutil.rmtree(HUGETLB, ignore_errors=True)  # left by a session that was killed
    HUGETLB.mkdir()
    done = subprocess.run(["mount", "-t", "cgroup", "-o", "hugetlb", "cgroup", str(HUGETLB)], check=False, capture_output=True)
    try:
        yield
    finally:
        if done.returncode == 0:
            for base, folders, _ in os.walk(HUGETLB, topdown=False):  # a hierarchy with groups would outlive its mount
                for name in folders:
                    with contextlib.suppress(OSError):
                        os.rmdir(f"{base}/{name}")
            subprocess.run(["umount", str(HUGETLB)], check=True)
        HUGETLB.rmdir()
