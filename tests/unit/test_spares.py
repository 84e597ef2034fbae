"""Plans kept as templates, folders on their way out, roots and shims that are made ahead: what does not need a kernel."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dolium import trash
from dolium.engine.model import Container
from dolium.engine.rootfs import Roots
from dolium.engine.spare_roots import KINDS, SIZE, Kind, SpareRoots
from dolium.errors import Internal
from dolium.images.snapshots import places
from dolium.images.snapshots.base import Usage
from dolium.images.snapshots.layers import FolderLayers
from dolium.images.snapshots.overlay import OverlaySnapshotter
from dolium.images.snapshots.places import tree_usage
from dolium.isolation import spares
from dolium.isolation.shim import Closed, Event, Shim, ShimHandle
from dolium.isolation.spares import Spares
from dolium.isolation.templates import KEPT, Compiled, Templates
from dolium.linux import syscalls
from dolium.linux.cgroup import tree
from dolium.runtime import plan as P
from dolium.runtime.cgroups import remove
from dolium.runtime.compile import Launch, compile_container
from dolium.runtime.facts import Facts
from dolium.runtime.plan import Plan
from dolium.trash import Trash
from dolium.volumes.store import Volumes

LAYOUT = tree.Layout({"cpu": "/sys/fs/cgroup/cpu", "memory": "/sys/fs/cgroup/memory"}, "/sys/fs/cgroup/unified")


class Files(Facts):
    """Every path is a file, but what ends in a slash or was made a folder."""

    def __init__(self, folders: Sequence[str] = (), absent: Sequence[str] = ()) -> None:
        self.folders, self.absent = folders, absent

    def stat(self, path: str) -> tuple[int, int, int, int] | None:
        if path in self.absent:
            return None
        return (0o040755 if path in self.folders else 0o100644, 0, 0, 0)

    def want(self, *queries: str) -> None:
        return None


def config(identity: str, **changes: Any) -> dict[str, Any]:
    """As the engine builds one: the id is in paths, the short one is the hostname."""
    made: dict[str, Any] = {
        "ociVersion": "1.3.0", "hostname": identity[:12],
        "process": {"args": ["true"], "cwd": "/", "env": [f"HOSTNAME={identity[:12]}"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/etc/hosts", "type": "bind", "source": f"/run/shims/{identity}/hosts", "options": ["bind"]},
                   {"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}], "cgroupsPath": f"/dolium/i/{identity}",
                  "resources": {}}}
    made.update(changes)
    return made


def plan_of(identity: str, wanted: dict[str, Any], facts: Facts) -> Plan:
    launch = Launch(identity, "/", LAYOUT)
    launch.root_in_slot = launch.stdio = True
    plan = compile_container(wanted, facts, launch)
    remove(plan, P.AFTER_EXIT, LAYOUT.paths(wanted["linux"]["cgroupsPath"]))
    return plan


def get(templates: Templates, identity: str, wanted: dict[str, Any], facts: Facts | None = None, *marks: object) -> Compiled:
    chosen = facts or Files()
    return templates.get(identity, wanted, chosen, marks, lambda: plan_of(identity, wanted, chosen))


ids = st.text("0123456789abcdef", min_size=64, max_size=64)
words = st.text("abcdef0123 =/", max_size=20)


@given(one=ids, other=ids, env=st.lists(words, max_size=3), quote=st.booleans())
def test_a_template_gives_what_the_compiler_would(one: str, other: str, env: list[str], quote: bool) -> None:
    """Whatever else is in the configuration: parts of ids, and the id of the container that the template was made of."""
    templates = Templates()
    environment = [*env, one[:12], one] if quote else env
    first = config(one, process={"args": ["true"], "cwd": "/", "env": env})
    second = config(other, process={"args": ["true"], "cwd": "/", "env": environment})
    for identity, wanted in ((one, first), (other, second)):
        compiled, plan = get(templates, identity, wanted), plan_of(identity, wanted, Files())
        assert compiled.encoded == plan.encode()
        assert compiled.after_exit == plan.part(P.AFTER_EXIT).encode()
        assert [op.name for op in compiled.plan.ops] == [op.name for op in plan.ops]


def test_equal_kinds_are_compiled_once_and_others_anew() -> None:
    templates = Templates()
    a, b = "a" * 64, "b" * 64
    get(templates, a, config(a))
    get(templates, b, config(b))
    assert templates.used == 1
    get(templates, b, config(b, hostname="other"))
    get(templates, b, config(b), Files(folders=[f"/run/shims/{b}/hosts"]))
    get(templates, b, config(b), None, "another profile")
    assert templates.used == 1
    get(templates, "c" * 63, config("c" * 63))
    get(templates, "c" * 63, config("c" * 63))
    assert templates.used == 1
    for number in range(KEPT):
        get(templates, a, config(a, hostname=f"h{number}"))
    get(templates, a, config(a))  # the first kind went
    assert templates.used == 1


def test_what_is_not_there_is_the_compilers_error() -> None:
    templates, identity = Templates(), "d" * 64
    get(templates, identity, config(identity))
    with pytest.raises(Exception, match="does not exist"):
        get(templates, identity, config(identity), Files(absent=[f"/run/shims/{identity}/hosts"]))


def test_trash_frees_the_name_at_once_and_deletes_when_it_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trash, "QUIET", 3600.0)
    monkeypatch.setattr(trash, "LATEST", 3600.0)
    bin = Trash(str(tmp_path / "trash"))
    (tmp_path / "thing" / "inside").mkdir(parents=True)
    assert bin.discard(str(tmp_path / "thing")) and not (tmp_path / "thing").exists()
    assert not bin.discard(str(tmp_path / "thing"))
    assert [path.name.split("-")[0] for path in (tmp_path / "trash").iterdir()] == ["thing"]
    bin.close()
    assert list((tmp_path / "trash").iterdir()) == []


def test_trash_goes_at_once_when_room_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trash, "QUIET", 3600.0)
    monkeypatch.setattr(trash, "LATEST", 3600.0)
    bin = Trash(str(tmp_path / "trash"))
    for number in range(2):
        (tmp_path / "thing").mkdir()
        bin.discard(str(tmp_path / "thing"))
        bin.hurry()
        deadline = time.monotonic() + 10
        while list((tmp_path / "trash").iterdir()):
            assert time.monotonic() < deadline, number
            bin.hurry()
            time.sleep(0.001)
    bin.close()


def make_deep(path: Path, levels: int = 1500) -> Path:
    """Folders in folders, as a container makes them step by step: the whole path is longer than a path can be."""
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("deep", dir_fd=fd)
        inner = os.open("deep", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    return path


def test_folders_deeper_than_python_s_calls_do_not_stop_the_trash(tmp_path: Path) -> None:
    bin = Trash(str(tmp_path / "trash"))
    bin.discard(str(make_deep(tmp_path / "deep")))
    (tmp_path / "next").mkdir()
    bin.discard(str(tmp_path / "next"))
    bin.close()
    assert list((tmp_path / "trash").iterdir()) == []


def test_a_deep_volume_that_was_half_removed_does_not_stop_the_next_start(tmp_path: Path) -> None:
    class NoRows:
        def rows(self, table: str) -> list[dict[str, Any]]:
            return []

        def put_row(self, table: str, name: str, doc: dict[str, Any]) -> None:
            raise AssertionError

        def delete_row(self, table: str, name: str) -> None:
            raise AssertionError

    make_deep(tmp_path / ".trash-0")
    Volumes(str(tmp_path), NoRows()).recover(lambda name: False)
    assert list(tmp_path.iterdir()) == []


def test_usage_of_what_is_deeper_than_a_path_and_of_links_that_lead_out(tmp_path: Path) -> None:
    top = make_deep(tmp_path / "top", 2500)
    (top / "file").write_bytes(b"x" * 5000)
    os.link(top / "file", top / "again")
    found = tree_usage(top)
    assert 800 < found.inodes < 2502 and found.size >= 5000
    (tmp_path / "outside" / "folder").mkdir(parents=True)
    (top / "link").symlink_to(tmp_path / "outside")
    assert tree_usage(top).inodes == found.inodes + 1
    root = os.open(top, os.O_PATH)
    try:  # as when a container puts a link in a folder's place after that was listed
        assert list(places._entries(root, "./link")) == list(places._entries(root, "./link/folder")) == []
    finally:
        os.close(root)
    assert tree_usage(tmp_path / "absent") == Usage(0, 0)
    trash.delete(str(top))


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EDQUOT, errno.EXDEV])
def test_what_cannot_be_renamed_aside_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    """A full disk has no room for one more name in the trash, and a removal is what makes room."""
    bin = Trash(str(tmp_path / "trash"))
    (tmp_path / "thing" / "inside").mkdir(parents=True)

    def refuses(*paths: str) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "rename", refuses)
    assert bin.discard(str(tmp_path / "thing")) and not (tmp_path / "thing").exists()
    bin.close()


def test_a_root_is_not_mounted_before_its_last_mount_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two overlays with one upper folder corrupt it."""
    mounted: list[int] = []
    closing, close = threading.Event(), os.close

    def mount(lowers: list[str], upper: str, work: str, *, on: int, volatile: bool) -> int:
        assert all(not os.path.exists(f"/proc/self/fd/{fd}") for fd in mounted)
        mounted.append(os.open(upper, os.O_PATH))
        return mounted[-1]

    def slowly(fd: int) -> None:
        if fd in mounted:
            assert closing.wait(10)
        close(fd)

    monkeypatch.setattr(syscalls, "mount_overlay", mount)
    monkeypatch.setattr(os, "close", slowly)
    (tmp_path / "containers").mkdir()
    snapshots = OverlaySnapshotter(FolderLayers(tmp_path / "snapshots"))
    roots = Roots(snapshots, str(tmp_path / "points"), str(tmp_path / "containers"), lambda one: one.pid)
    container = Container("a" * 64, "one", 0.0, "", "", [], "", {}, {}, "true", [], [])
    snapshots.prepare(container.id, [])

    async def main() -> None:
        roots.release(container, await roots.mount(container))
        again = asyncio.ensure_future(roots.mount(container))
        await asyncio.sleep(0)
        assert not again.done()
        closing.set()
        roots.release(container, await again)
        await roots.close()

    asyncio.run(main())
    snapshots.close()


def test_too_much_trash_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trash, "QUIET", 0.01)
    monkeypatch.setattr(trash, "LATEST", 3600.0)
    monkeypatch.setattr(trash, "MOST", 2)
    bin = Trash(str(tmp_path / "trash"))
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        bin.discard(str(tmp_path / str(number)))
    bin.recover()  # what is on its way already may be named twice
    bin.close()
    assert list((tmp_path / "trash").iterdir()) == []


class FakeShim:
    """What Spares uses of a Shim."""

    connected = True

    def __init__(self, folder: str, on_event: Any) -> None:
        self.handle, self.on_event, self.ended = ShimHandle(folder, "", 1, 1, "boot", "nonce"), on_event, False

    def taken(self, folder: str, on_event: Any) -> FakeShim:
        self.handle = ShimHandle(folder, os.path.basename(folder), 1, 1, "boot", "nonce")
        self.on_event = on_event
        return self

    async def end(self) -> None:
        self.ended = True

    def close(self) -> None:
        return None


def nothing(event: Event) -> None:
    return None


def test_spare_shims_are_used_once_and_end_with_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "FILL_PAUSE", 0.0)
    made: list[FakeShim] = []

    async def make(folder: str, on_event: Any) -> Shim:
        made.append(FakeShim(folder, on_event))
        return made[-1]  # type: ignore[return-value]

    async def main() -> None:
        pool = Spares(str(tmp_path), make, size=3)
        assert pool.take(str(tmp_path / "none"), nothing) is None

        async def full() -> None:
            async with asyncio.timeout(10):
                while len(pool) < 3:
                    await asyncio.sleep(0)

        await full()
        one = pool.take(str(tmp_path / "one"), nothing)
        assert one is not None and one.handle.id == "one"
        await full()
        lost = made[-1]
        lost.on_event(Closed("killed"))
        assert len(pool) == 2 and not os.path.exists(lost.handle.dir)
        await pool.close()
        assert os.listdir(tmp_path) == ["one"]
        assert all(shim.ended for shim in made if shim is not one and shim is not lost)
        assert pool.take(str(tmp_path / "two"), nothing) is None

    asyncio.run(main())


def test_spare_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dolium.engine.spare_roots.FILL_PAUSE", 0.0)
    snapshots = OverlaySnapshotter(FolderLayers(tmp_path / "snapshots"))
    active, folders = tmp_path / "snapshots" / "active", tmp_path / "containers"
    folders.mkdir()
    for number in range(KINDS):
        (tmp_path / "snapshots" / "layers" / f"{number:064x}" / "fs").mkdir(parents=True)
    broken = False

    def mount(key: str, kind: Kind) -> int:
        if broken:
            raise Internal("no room")
        return os.open(active / key, os.O_PATH | os.O_CLOEXEC)

    async def main() -> None:
        nonlocal broken
        roots = SpareRoots(snapshots, mount, str(folders))
        kind: Kind = ((), True)
        assert roots.take(kind, "a") is None

        async def until(count: int) -> None:
            async with asyncio.timeout(10):
                while len(list(active.glob("spare-*"))) != count:
                    await asyncio.sleep(0.001)

        await until(SIZE)
        fd = roots.take(kind, "b")
        assert fd is not None and os.readlink(f"/proc/self/fd/{fd}") == str(active / "b")
        assert sorted(os.listdir(folders / "b")) == ["hostname", "hosts", "network.json", "resolv.conf"]
        os.close(fd)
        await until(SIZE)
        for number in range(KINDS):  # the kind used longest ago goes
            assert roots.take(((f"sha256:{number:064x}",), True), "x") is None
        await until(KINDS * SIZE)
        assert roots.take(kind, "c") is None
        roots.drop()
        await until(0)
        broken = True
        assert roots.take(kind, "d") is None
        async with asyncio.timeout(10):
            while roots._filling is not None:
                await asyncio.sleep(0.001)
        broken = False
        assert roots.take(kind, "e") is None  # tried again after a failure
        await until(SIZE)
        await roots.close()
        assert list(active.glob("spare-*")) == [] and os.listdir(folders) == ["b"]

    asyncio.run(main())
    snapshots.close()
