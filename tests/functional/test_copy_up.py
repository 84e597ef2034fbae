"""What an image has at a volume's mount point, copied: owners, modes, times, kinds, and paths longer than the kernel takes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dolium.engine.rootfs import copy_up
from dolium.trash import delete

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")]
NAME, LEVELS = "n" * 200, 30  # 6,000 characters: PATH_MAX is 4096


def test_a_path_longer_than_path_max(tmp_path: Path) -> None:
    root, volume = tmp_path / "root", tmp_path / "volume"
    (root / "data").mkdir(parents=True)
    os.chown(root / "data", 5, 5)
    volume.mkdir()
    here = os.open(root / "data", os.O_RDONLY)
    for level in range(LEVELS):
        os.mkdir(NAME, 0o750, dir_fd=here)
        below = os.open(NAME, os.O_RDONLY, dir_fd=here)
        os.chown(below, level + 5, level + 6)
        os.close(here)
        here = below
    os.symlink("nowhere", "link", dir_fd=here)
    os.mknod("fifo", stat.S_IFIFO | 0o600, dir_fd=here)
    for name in ("link", "fifo"):
        os.chown(name, 5, 5, dir_fd=here, follow_symlinks=False)
    with open(os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here), "w") as file:
        file.write("at the end")
        os.fchown(file.fileno(), 1005, 1006)
        os.fchmod(file.fileno(), 0o4755)
    for name in ("link", "fifo", "file"):
        os.utime(name, (1, 2), dir_fd=here, follow_symlinks=False)
    os.utime(here, (3, 4))
    os.close(here)

    fd = os.open(root, os.O_PATH)
    copy_up(fd, "/data", str(volume), shift=5)
    copy_up(fd, "/absent", str(volume))
    os.close(fd)
    here = os.open(volume, os.O_RDONLY)
    for level in range(LEVELS):
        below = os.open(NAME, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        info = os.fstat(here)
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (level, level + 1, 0o750)
    assert sorted(os.listdir(here)) == ["fifo", "file", "link"] and info.st_mtime == 4
    assert os.readlink("link", dir_fd=here) == "nowhere"
    found = {name: os.stat(name, dir_fd=here, follow_symlinks=False) for name in os.listdir(here)}
    assert {info.st_mtime for info in found.values()} == {2}
    assert stat.S_ISFIFO(found["fifo"].st_mode) and stat.S_IMODE(found["fifo"].st_mode) == 0o600
    assert (found["file"].st_uid, found["file"].st_gid, stat.S_IMODE(found["file"].st_mode)) == (1000, 1001, 0o4755)
    with open(os.open("file", os.O_RDONLY, dir_fd=here)) as file:
        assert file.read() == "at the end"
    os.close(here)
    delete(str(root))
    delete(str(volume))
