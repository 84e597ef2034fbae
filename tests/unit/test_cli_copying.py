"""What ``dolium cp`` makes of a tar."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from dolium.cli import copying
from dolium.cli.transport import ApiError


def _tar(*members: tuple[str, bytes, int, str]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, mode, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname = kind, mode, link
            info.uid, info.gid = os.getuid(), os.getgid()
            archive.addfile(info)
    out.seek(0)
    return out


TREE = (("d", tarfile.DIRTYPE, 0o777, ""), ("d/f", tarfile.REGTYPE, 0o4777, ""), ("d/g", tarfile.LNKTYPE, 0o4777, "d/f"),
        ("d/l", tarfile.SYMTYPE, 0o777, "/etc"))


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_modes_and_links_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, filters: bool) -> None:
    if not filters:  # as with Debian 12's Python
        monkeypatch.setattr(copying, "_AS_IT_IS", {})
    place = tmp_path / "there"
    if keep:
        place.mkdir()
    copying._extract(_tar(*TREE), str(place), keep)
    made = place / "d" if keep else place
    assert (made / "f").stat().st_mode & 0o7777 == 0o4777
    assert made.stat().st_mode & 0o7777 == 0o777
    assert (made / "f").stat().st_ino == (made / "g").stat().st_ino
    assert os.readlink(made / "l") == "/etc"


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("d/../../x", "/x", "../x"):
        with pytest.raises(ApiError, match="leaves the folder"):
            copying._extract(_tar((name, tarfile.REGTYPE, 0o644, "")), str(tmp_path), True)
