"""docker cp out of a container that changes meanwhile."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dolium.api.docker import archive


def packed(folder: Path) -> bytes:
    """The tar of a folder."""
    root = os.open(folder, os.O_PATH)
    try:
        with tempfile.TemporaryFile() as out:
            with contextlib.suppress(OSError):  # a file that becomes shorter while it is read ends the archive
                archive._pack(root, "root", os.dup(out.fileno()))
            out.seek(0)
            return out.read()
    finally:
        os.close(root)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_swapped_in_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The container exchanges what was looked at for a link to the host's, before it is read (CVE-2018-15664)."""
    outside, folder = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "secret").write_text("SECRET")
    (folder / "folder").mkdir(parents=True)
    (folder / "folder/own").write_text("mine..")
    (folder / "file").write_text("mine..")
    target = folder / what
    look = tarfile.TarFile.gettarinfo

    def looks(self: tarfile.TarFile, *args: Any, **more: Any) -> tarfile.TarInfo:
        info = look(self, *args, **more)
        if info.name == f"root/{what}":
            target.rename(tmp_path / "aside")
            target.symlink_to(outside if what == "folder" else outside / "secret")
        return info

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", looks)
    data = packed(folder)
    assert target.is_symlink() and b"SECRET" not in data and b"secret" not in data and data.count(b"mine..") == 2


def test_all_kinds_are_packed(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/file").write_text("content")
    os.link(folder / "sub/file", folder / "sub/hard")
    os.symlink("/etc/passwd", folder / "link")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "socket"))
    with tarfile.open(fileobj=io.BytesIO(packed(folder))) as tar:
        assert {member.name: member.type for member in tar} == {
            "root": tarfile.DIRTYPE, "root/sub": tarfile.DIRTYPE, "root/sub/file": tarfile.REGTYPE,
            "root/sub/hard": tarfile.LNKTYPE, "root/link": tarfile.SYMTYPE, "root/fifo": tarfile.FIFOTYPE}
        content = tar.extractfile("root/sub/file")
        assert content is not None and content.read() == b"content" and tar.getmember("root/link").linkname == "/etc/passwd"
