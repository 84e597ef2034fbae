"""Layers that hypothesis makes up, unpacked and stacked by dolium and by umoci: the trees are the same."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sqlite3
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from registry import CONFIG, LAYER, MANIFEST, digest_of

from dolium.images.platform import host
from dolium.images.records import SqliteImageRecords
from dolium.images.snapshots.base import MountOptions
from dolium.images.store import ImageStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
FOLDERS = ("a", "b", "a/c", "a/c/d", "b/c")
NAMES = ("f", "g", "c", "ü", "long" * 30)
_path = st.tuples(st.sampled_from(("", *FOLDERS)), st.sampled_from(NAMES)).map(lambda two: "/".join(filter(None, two)))
_entry = st.one_of(
    st.tuples(st.just("file"), _path, st.binary(max_size=20), st.sampled_from((0o644, 0o4755, 0o600))),
    st.tuples(st.just("dir"), st.sampled_from(FOLDERS), st.just(b""), st.sampled_from((0o755, 0o1777, 0o700))),
    st.tuples(st.just("symlink"), _path, st.sampled_from((b"f", b"../g", b"/etc")), st.just(0o777)),
    st.tuples(st.just("fifo"), _path, st.just(b""), st.just(0o640)),
    st.tuples(st.just("gone"), _path, st.just(b""), st.just(0)),
    st.tuples(st.just("opaque"), st.sampled_from(FOLDERS), st.just(b""), st.just(0)))
Entry = tuple[str, str, bytes, int]


def layer(entries: list[Entry], below: set[str]) -> bytes:
    """A layer as tools write one: parents first, a name once, links to what is there before them, whiteouts first and of what
    is ``below`` (overlayfs lists one that hides nothing). A symlink has nothing below it: what that means differs between
    those who stack layers and those who apply them. ``below`` is brought up to date."""
    out, seen, kinds = io.BytesIO(), set[str](), dict[str, str]()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, kind: bytes, mode: int, content: bytes = b"", link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname, info.size = kind, mode, link, len(content)
            info.uid, info.gid, info.mtime = len(name), 7, 1_000_000_000
            archive.addfile(info, io.BytesIO(content))

        first: dict[bytes, str] = {}
        for kind, path, content, mode in sorted(entries, key=lambda one: (one[0] not in ("gone", "opaque"), one[1].count("/"))):
            parents = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 1)]
            if path in seen or any(kinds.get(parent, "dir") != "dir" for parent in parents) or (kind == "gone" and path not in below):
                continue
            for parent in (*parents, *([path] if kind == "opaque" else [])):
                if parent not in kinds:
                    kinds[parent] = "dir"
                    seen.add(parent)
                    below.add(parent)
                    add(parent, tarfile.DIRTYPE, 0o755)
            if kind != "dir":
                below -= {path, *(one for one in below if one.startswith(f"{path}/"))} - (seen if kind == "opaque" else set())
            if kind not in ("gone", "opaque"):
                below.add(path)
            if kind == "opaque":
                add(f"{path}/.wh..wh..opq", tarfile.REGTYPE, 0)
                continue
            seen.add(path)
            kinds[path] = kind
            folder, _, name = path.rpartition("/")
            if kind == "gone":
                add(f"{folder}/.wh.{name}".lstrip("/"), tarfile.REGTYPE, 0)
            elif kind == "file" and content in first:
                add(path, tarfile.LNKTYPE, mode, link=first[content])
            elif kind == "file":
                first[content] = path
                add(path, tarfile.REGTYPE, mode, content)
            else:
                add(path, {"dir": tarfile.DIRTYPE, "fifo": tarfile.FIFOTYPE, "symlink": tarfile.SYMTYPE}[kind], mode,
                    link=content.decode() if kind == "symlink" else "")
    return out.getvalue()


def layout(folder: Path, layers: list[bytes]) -> None:
    """An OCI layout with one image."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    platform = host()
    config = {"architecture": platform.architecture, "os": "linux", "config": {},
              "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]}}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": put(json.dumps(config).encode(), CONFIG),
                "layers": [put(data, LAYER) for data in layers]}
    entry = {**put(json.dumps(manifest).encode(), MANIFEST), "annotations": {"org.opencontainers.image.ref.name": "x"}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def described(root: Path) -> dict[str, tuple[object, ...]]:
    """Path to kind and mode, owner, content or target, and the paths of the same file."""
    found: dict[str, tuple[object, ...]] = {}
    same: dict[int, list[str]] = {}
    for base, folders, files in os.walk(root):
        for name in sorted([*folders, *files]):
            path = Path(base, name)
            info, inner = path.lstat(), str(path.relative_to(root))
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
            names = same.setdefault(info.st_ino, []) if stat.S_ISREG(info.st_mode) else []
            names.append(inner)
            found[inner] = stat.filemode(info.st_mode), info.st_uid, info.st_gid, content, names
    for *_, names in found.values():
        assert isinstance(names, list)
        names.sort()
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(_entry, max_size=8), min_size=1, max_size=3))
@example([[("file", "a/f", b"1", 0o644), ("dir", "b", b"", 0o755)], [("opaque", "a", b"", 0), ("gone", "b", b"", 0), ("file", "a/g", b"2", 0o600)]])
@example([[("file", "f", b"", 0o644), ("file", "g", b"", 0o644)], [("file", "f", b"", 0o644)]])
@example([[("dir", "a", b"", 0o1777), ("file", "a/c", b"1", 0o644)], [("dir", "a/c", b"", 0o700)], [("file", "a/c/f", b"x", 0o4755)]])
def test_a_stack_of_layers_is_what_umoci_makes_of_it(layers: list[list[Entry]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        below = set[str]()
        layout(folder / "oci", [layer(entries, below) for entries in layers])
        subprocess.run(["umoci", "--log=error", "unpack", "--image", f"{folder}/oci:x", f"{folder}/bundle"], check=True, capture_output=True)

        async def ours() -> dict[str, tuple[object, ...]]:
            store = ImageStore(folder / "store", SqliteImageRecords(sqlite3.connect(folder / "db")))
            await store.recover()
            (image,) = await store.load(folder / "oci")
            with store.snapshots.view(image.chain_ids, MountOptions()) as root:
                found = described(Path(f"/proc/self/fd/{root}"))
            store.close()
            return found

        (folder / "store").mkdir()
        assert asyncio.run(ours()) == described(folder / "bundle/rootfs")
