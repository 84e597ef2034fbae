"""Changes in a container's root, by properties: the layer made of them, put on the image, is what the container saw; and the
list of differences names each path that is not as it was, and no other.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dolium.images.difference import Kind, differences, pack
from dolium.linux import syscalls
from dolium.native import program

pytestmark = pytest.mark.root

NAMES = ("a", "b", "c")
_path = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
_change = st.one_of(
    st.tuples(st.just("write"), _path, st.binary(max_size=6)), st.tuples(st.just("mkdir"), _path, st.sampled_from([0o700, 0o1777])),
    st.tuples(st.just("remove"), _path, st.none()), st.tuples(st.just("symlink"), _path, _path), st.tuples(st.just("link"), _path, _path),
    st.tuples(st.just("chmod"), _path, st.sampled_from([0o600, 0o4755])), st.tuples(st.just("chown"), _path, st.sampled_from([0, 7])),
    st.tuples(st.just("xattr"), _path, st.binary(min_size=1, max_size=4)), st.tuples(st.just("fifo"), _path, st.none()),
    st.tuples(st.just("rename"), _path, _path),
)
Change = tuple[str, str, Any]


def make(root: Path, changes: list[Change]) -> None:
    """What of it can be done is done."""
    for verb, name, value in changes:
        path = root / name
        try:
            if verb == "write" and not path.is_fifo():  # that would wait for a reader
                path.write_bytes(value)
            elif verb == "mkdir":
                path.mkdir(value)
            elif verb == "remove":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            elif verb == "symlink":
                path.symlink_to(value)
            elif verb == "link":
                os.link(root / value, path, follow_symlinks=False)
            elif verb == "chmod":
                path.chmod(value & 0o777 if path.is_fifo() else value)
            elif verb == "chown":
                os.chown(path, value, value, follow_symlinks=False)
            elif verb == "xattr" and not path.is_symlink():
                os.setxattr(path, "user.test", value)
            elif verb == "fifo":
                os.mkfifo(path)
            elif verb == "rename":
                path.rename(root / value)
        except (OSError, shutil.Error):
            continue


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that matters of a tree, but times: files that are one have one number."""
    found: dict[str, tuple[object, ...]] = {}
    numbers: dict[tuple[int, int], int] = {}
    for base, folders, files in sorted(os.walk(root)):
        for name in sorted([*folders, *files]):
            path = Path(base) / name
            info = path.lstat()
            content: object = None
            if stat.S_ISREG(info.st_mode):
                content = path.read_bytes(), numbers.setdefault((info.st_dev, info.st_ino), len(numbers)), info.st_nlink
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            xattr = os.getxattr(path, "user.test") if not path.is_symlink() and "user.test" in os.listxattr(path) else b""
            found[str(path.relative_to(root))] = info.st_mode, info.st_uid, info.st_gid, content, xattr
    return found


def paths_changed(before: Path, after: Path) -> dict[str, Kind]:
    """By looking at both: folders above a change count as changed."""
    old, new = tree(before), tree(after)
    found = {f"/{name}": Kind.ADDED for name in set(new) - set(old)} | {f"/{name}": Kind.DELETED for name in set(old) - set(new)}
    found |= {f"/{name}": Kind.CHANGED for name in set(old) & set(new) if _shape(old[name]) != _shape(new[name])}
    for name in list(found):
        for above in Path(name).parents:
            if str(above) != "/" and str(above) not in found:
                found[str(above)] = Kind.CHANGED
    return {name: kind for name, kind in found.items()
            if kind is not Kind.DELETED or not any(found.get(str(above)) in (Kind.DELETED,) or not (after / str(above)[1:]).is_dir()
                                                    for above in Path(name).parents if str(above) != "/")}


def _shape(value: tuple[object, ...]) -> tuple[object, ...]:
    mode, uid, gid, content, xattr = value
    return mode, uid, gid, content[0] if isinstance(content, tuple) else content, xattr


@contextmanager
def folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def untar(data: bytes, target: Path) -> None:
    """Carry a layer out."""
    with folder(target) as fd:
        os.set_inheritable(fd, True)
        done = subprocess.run([program("dolium-untar"), "--apply", str(fd)], input=data, pass_fds=[fd], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


@settings(max_examples=60, deadline=None)
@given(st.lists(_change, max_size=12), st.lists(_change, max_size=12))
def test_a_layer_is_what_was_changed(first: list[Change], then: list[Change]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base, upper, work, lowest = (Path(scratch) / name for name in ("base", "upper", "work", "lowest"))
        for path in (base, upper, work, lowest):
            path.mkdir()
        make(base, first)
        for place, folders, names in os.walk(base):  # long ago: what is written now has another time
            for name in (*folders, *names):
                os.utime(Path(place) / name, (1e9, 1e9), follow_symlinks=False)
        mount = syscalls.mount_overlay([str(base), str(lowest)], str(upper), str(work))
        try:
            merged = Path(f"/proc/self/fd/{mount}")
            make(merged, then)
            seen = tree(merged)
            parts: list[bytes] = []
            with folder(upper) as top, folder(base) as below:
                pack(top, parts.append, layer=True)
                listed = differences(str(upper), below)
            target = Path(scratch) / "target"
            subprocess.run(["cp", "-a", str(base), str(target)], check=True)
            untar(b"".join(parts), target)
            assert _without_links(tree(target)) == _without_links(seen)
            expected = paths_changed(base, merged)
            told = {one.path: one.kind for one in listed}
            for path, kind in expected.items():
                assert told.get(path) is kind, (path, kind, told)
            for path in set(told) - set(expected):  # touched, and as it was before: that is told, too
                assert told[path] is Kind.CHANGED
        finally:
            os.close(mount)


def _without_links(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """A link to a file of the image is copied up alone: overlayfs has it as one more file."""
    return {name: _shape(value) for name, value in found.items()}
