"""What ``docker cp`` packs, while a container changes the tree under it."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from dolium.api.docker import archive
from dolium.api.docker.errors import error_middleware


def _packed(tree: Path) -> dict[str, tarfile.TarInfo]:
    fd = os.open(tree, os.O_PATH)
    out, into = os.pipe()
    try:
        archive._pack(fd, "tree", into)
        with open(out, "rb") as file, tarfile.open(fileobj=io.BytesIO(file.read())) as made:
            return {member.name: member for member in made}
    finally:
        os.close(fd)


def test_every_kind_of_entry(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "f").write_text("12345")
    os.link(tree / "d" / "f", tree / "d" / "g")
    os.symlink("/nowhere", tree / "l")
    os.mkfifo(tree / "p")
    made = _packed(tree)
    assert sorted(made) == ["tree", "tree/d", "tree/d/f", "tree/d/g", "tree/l", "tree/p"]
    assert (made["tree/l"].issym(), made["tree/l"].linkname) == (True, "/nowhere")
    assert made["tree/d/f"].size == 5
    assert (made["tree/d/g"].islnk(), made["tree/d/g"].linkname) == (True, "tree/d/f")
    assert made["tree/p"].isfifo()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_link_put_in_the_place_of_an_entry_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "secret").write_text("secret")
    tree = tmp_path / "tree"
    (tree / "x").mkdir(parents=True)
    (tree / "x" / "secret").write_text("inside")
    add, info_of = tarfile.TarFile.addfile, tarfile.TarFile.gettarinfo

    def swap(place: Path, target: Path) -> None:
        if not place.is_symlink():
            os.rename(place, tmp_path / "aside")
            os.symlink(target, place)

    def adds(self: tarfile.TarFile, info: tarfile.TarInfo, *rest: Any) -> None:
        add(self, info, *rest)
        if what == "folder" and info.name == "tree/x":
            swap(tree / "x", tmp_path / "host")

    def looks(self: tarfile.TarFile, *words: Any, **more: Any) -> Any:
        info = info_of(self, *words, **more)
        if what == "file" and info.name == "tree/x/secret":
            swap(tree / "x" / "secret", tmp_path / "host" / "secret")
        return info

    monkeypatch.setattr(tarfile.TarFile, "addfile", adds)
    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", looks)
    fd = os.open(tree, os.O_PATH)
    out, into = os.pipe()
    try:
        archive._pack(fd, "tree", into)
    finally:
        os.close(fd)
    with open(out, "rb") as file:
        data = file.read()
    with tarfile.open(fileobj=io.BytesIO(data)) as made:
        member = made.extractfile("tree/x/secret")
        assert member is not None
        assert member.read() == b"inside"


def test_what_is_nested_too_deeply_is_told_and_is_no_bug() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    answer = asyncio.run(error_middleware(make_mocked_request("GET", "/v1.47/containers/x/changes"), handler))
    assert isinstance(answer, web.Response) and answer.status == 400 and "nested too deeply" in str(answer.text)
