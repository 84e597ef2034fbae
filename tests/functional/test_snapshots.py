"""One body of tests for all snapshot drivers: overlay, native and erofs, on the disk's file system and on others."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dolium.errors import AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound, ResourceExhausted
from dolium.images.snapshots import native
from dolium.images.snapshots.base import MountOptions, Snapshotter
from dolium.images.snapshots.drivers import DRIVERS, make_snapshotter
from dolium.images.snapshots.places import Places
from dolium.linux import loop, quota, user_namespaces, verity
from dolium.linux.user_namespaces import IdMap
from dolium.trash import Trash

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
BASE = 100_000
Fill = Callable[[Path], None]


def chain(number: int) -> str:
    return f"sha256:{number:064x}"


def add(driver: Snapshotter, number: int, fill: Fill) -> str:
    prepared = driver.begin_layer(chain(number))
    fill(prepared)
    driver.commit_layer(chain(number), prepared)
    return chain(number)


@contextlib.contextmanager
def mounted(driver: Snapshotter, key: str, chains: Sequence[str], options: MountOptions | None = None) -> Iterator[Path]:
    fd = driver.mount(key, chains, options or MountOptions())
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def tree(root: Path) -> dict[str, tuple[str, int, int, bytes]]:
    """Path to type and mode, owner, content or target."""
    found = {}
    for base, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(base, name)
            info = path.lstat()
            content = b"" if stat.S_ISDIR(info.st_mode) else os.readlink(path).encode() if path.is_symlink() else (
                path.read_bytes() if stat.S_ISREG(info.st_mode) else str(info.st_rdev).encode())
            found[str(path.relative_to(root))] = stat.filemode(info.st_mode), info.st_uid, info.st_gid, content
    return found


def lower(at: Path) -> None:
    for name in ("keep", "covered", "swapped-dir", "opaque/below", "gone-dir"):
        (at / name).mkdir(parents=True)
    (at / "keep/file").write_text("from below")
    (at / "covered/file").write_text("old")
    (at / "covered/stays").write_text("stays")
    (at / "swapped-dir/inside").write_text("x")
    (at / "swapped-file").write_text("x")
    (at / "opaque/below/deep").write_text("hidden")
    (at / "gone-dir/inside").write_text("x")
    (at / "gone").write_text("x")
    (at / "suid").write_text("#!")
    os.chown(at / "suid", 7, 8)
    os.chmod(at / "suid", 0o4755)
    with contextlib.suppress(OSError):  # a tmpfs of before Linux 6.6
        os.setxattr(at / "suid", "user.note", b"word")
    os.symlink("keep/file", at / "link")
    os.link(at / "keep/file", at / "keep/second")
    os.mknod(at / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(at / "fifo", 0o600)
    os.utime(at / "keep/file", ns=(1, 1_000_000_001_000_000_002))


def upper(at: Path) -> None:
    (at / "covered").mkdir(mode=0o700)
    (at / "covered/file").write_text("new")
    (at / "swapped-dir").write_text("now a file")
    (at / "swapped-file").mkdir()
    (at / "opaque").mkdir()
    os.setxattr(at / "opaque", "trusted.overlay.opaque", b"y")
    (at / "opaque/above").write_text("shown")
    for name in ("gone", "gone-dir"):
        os.mknod(at / name, stat.S_IFCHR, 0)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Snapshotter]:
    one = make_snapshotter(request.param, tmp_path)
    before = loops()
    yield one
    one.close()
    gone(before)


def gone(before: set[str]) -> None:
    """A loop device goes a moment after the last mount of it."""
    deadline = time.monotonic() + 10
    while loops() != before:
        assert time.monotonic() < deadline, loops() - before
        time.sleep(0.01)


def loops() -> set[str]:
    return {path.parent.parent.name for path in Path("/sys/block").glob("loop*/loop/backing_file")}


def test_layers_stack_and_snapshots_write_above_them(driver: Snapshotter, tmp_path: Path) -> None:
    chains = [add(driver, 1, lower), add(driver, 2, upper)]
    assert set(driver.layers()) == set(chains) and all(driver.has_layer(one) for one in chains)
    driver.prepare("one", chains)
    driver.prepare("two", chains)
    with mounted(driver, "one", chains) as root:
        found = tree(root)
        assert found["keep/file"] == ("-rw-r--r--", 0, 0, b"from below")
        assert found["covered/file"][3] == b"new" and found["covered/stays"][3] == b"stays"
        assert found["covered"][0] == "drwx------"
        assert found["swapped-dir"][3] == b"now a file" and found["swapped-file"][0].startswith("d")
        assert not {"gone", "gone-dir", "gone-dir/inside", "opaque/below", "swapped-dir/inside"} & found.keys()
        assert found["opaque/above"][3] == b"shown"
        assert found["suid"] == ("-rwsr-xr-x", 7, 8, b"#!") and os.getxattr(root / "suid", "user.note") == b"word"
        assert found["link"][3] == b"keep/file" and found["null"][3] == str(os.makedev(1, 3)).encode()
        assert found["fifo"] == ("prw-------", 0, 0, b"0")
        assert (root / "keep/file").stat().st_mtime_ns == 1_000_000_001_000_000_002
        assert (root / "keep/file").samefile(root / "keep/second")
        assert not [key for key in os.listxattr(root / "opaque") if "overlay" in key]
        (root / "keep/file").write_text("changed")
        (root / "covered/file").unlink()
        (root / "made").mkdir()
    with mounted(driver, "one", chains) as root:  # what was written is there again
        assert (root / "keep/file").read_text() == "changed" and (root / "made").is_dir()
        assert not (root / "covered/file").exists()
    with mounted(driver, "two", chains) as root:
        assert tree(root) == found
    found = {name: what for name, what in found.items() if name.split("/")[0] not in ("dev", "etc", "proc", "sys")}
    with driver.written("one", chains) as written:
        shown = tree(written)
        assert shown["covered/file"] == ("c---------", 0, 0, b"0") and shown["made"][0].startswith("d")
        assert shown["keep/file"][3] == b"changed"
        assert shown.keys() - {"keep/second"} == {"keep", "keep/file", "covered", "covered/file", "made"}
    with driver.written("two", chains) as written:
        assert tree(written) == {}
    with driver.view(chains, MountOptions()) as fd:
        assert tree(Path(f"/proc/self/fd/{fd}")) == found
    for _ in range(2):  # whether it is mounted or not
        with driver.view(chains, MountOptions(), "one") as fd:
            seen = tree(Path(f"/proc/self/fd/{fd}"))
            assert seen["keep/file"][3] == b"changed" and "covered/file" not in seen and "made" in seen
    with driver.layer(chains[1]) as folder:
        assert (folder / "opaque/above").read_text() == "shown" and stat.S_ISCHR((folder / "gone").lstat().st_mode)
    assert driver.usage("one").inodes >= 3


def test_keys_and_refusals(driver: Snapshotter) -> None:
    chains = [add(driver, 1, lower)]
    driver.prepare("one", chains)
    with pytest.raises(AlreadyExists):
        driver.prepare("one", chains)
    with pytest.raises(NotFound, match="not unpacked"):
        driver.prepare("two", [chain(9)])
    with pytest.raises(InvalidArgument):
        driver.prepare("../two", chains)
    with pytest.raises(InvalidArgument, match="at least"):
        driver.prepare("two", chains, size=1000)
    driver.prepare("two", [])
    with mounted(driver, "two", []) as root:
        assert {"native": {"dev", "etc", "proc", "sys"}}.get(driver.name, set()) == set(os.listdir(root))
    with pytest.raises(AlreadyExists):
        driver.rename("two", "one")
    driver.rename("two", "three")
    with pytest.raises(NotFound):
        driver.rename("two", "four")
    for missing in (lambda: driver.mount("two", [], MountOptions()), lambda: driver.usage("two")):
        with pytest.raises(NotFound):
            missing()
    assert set(driver.active()) == {"one", "three"}
    for _ in range(2):
        driver.remove("three")
    assert driver.active() == ["one"]


def test_a_layer_appears_once_and_goes_once(driver: Snapshotter, tmp_path: Path) -> None:
    first, second = driver.begin_layer(chain(1)), driver.begin_layer(chain(1))
    for prepared in (first, second):
        (prepared / "file").write_text("x")
        driver.commit_layer(chain(1), prepared)
    driver.prepare("one", [chain(1)])
    half = driver.begin_layer(chain(2))
    (half / "file").write_text("x")
    assert driver.layers() == [chain(1)] and not driver.has_layer(chain(2))
    driver.recover()
    assert not half.exists()
    with mounted(driver, "one", [chain(1)]) as root:
        driver.remove_layer(chain(1))  # nobody does while it is in use; who has it keeps it
        driver.remove_layer(chain(1))
        assert (root / "file").read_text() == "x" or driver.name == "overlay"
    assert driver.layers() == []


def test_the_root_looks_like_the_top_layers(driver: Snapshotter) -> None:
    def odd(at: Path) -> None:
        os.chown(at, 5, 6)
        os.chmod(at, 0o1777)

    chains = [add(driver, 1, lower), add(driver, 2, odd)]
    driver.prepare("one", chains)
    with mounted(driver, "one", chains) as root:
        info = root.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o1777, 5, 6)


def test_mount_points_are_there_though_images_lack_them(driver: Snapshotter, tmp_path: Path) -> None:
    (tmp_path / "points/etc").mkdir(parents=True)
    (tmp_path / "points/proc").mkdir()
    (tmp_path / "points/etc/hosts").touch()

    def linked(at: Path) -> None:
        (at / "elsewhere").mkdir()
        os.symlink("/elsewhere", at / "dev")

    chains = [add(driver, 1, linked)]
    driver.prepare("one", chains)
    with mounted(driver, "one", chains, MountOptions(lowest=str(tmp_path / "points"))) as root:
        assert (root / "proc").is_dir() and (root / "etc/hosts").is_file()
        assert os.readlink(root / "dev") == "/elsewhere" and os.listdir(root / "elsewhere") == []
    if driver.name != "native":
        assert driver.usage("one").inodes == 0


def test_a_hundred_and_twenty_layers(driver: Snapshotter) -> None:
    def one(number: int) -> Fill:
        def fill(at: Path) -> None:
            (at / f"own{number}").write_text(str(number))
            (at / "last").write_text(str(number))
        return fill

    chains = [add(driver, number, one(number)) for number in range(1, 121)]
    driver.prepare("deep", chains)
    with mounted(driver, "deep", chains) as root:
        assert (root / "last").read_text() == "120"
        assert len([name for name in os.listdir(root) if name.startswith(("own", "last"))]) == 121


def test_a_user_namespace_sees_owners_of_its_own_and_nothing_is_copied_for_it(driver: Snapshotter) -> None:
    chains = [add(driver, 1, lower), add(driver, 2, upper)]
    for turn in range(2):  # a new range each time
        base = BASE * (turn + 1)
        ids = [IdMap(0, base, 65536)]
        fd, _ = user_namespaces.make(ids, ids)
        try:
            key = f"mapped{turn}"
            driver.prepare(key, chains, owner=(base, base))
            with mounted(driver, key, chains, MountOptions(user_namespace=fd)) as root:
                assert ((root / "suid").stat().st_uid, (root / "suid").stat().st_gid) == (base + 7, base + 8)
                assert root.stat().st_uid == base
                assert {uid - base for _, uid, _, _ in tree(root).values()} == {0, 7}
                os.chown(root / "keep/file", base + 9, base + 9)
                assert (root / "keep/file").stat().st_uid == base + 9
            if driver.name != "native":
                assert driver.usage(key).inodes == 2  # keep and keep/file
        finally:
            os.close(fd)
    driver.prepare("plain", chains)
    with mounted(driver, "plain", chains) as root:
        assert tree(root)["suid"][1:3] == (7, 8)


def fill_up(root: Path, most: int) -> int:
    """Bytes that fit, for who has no CAP_SYS_RESOURCE, as containers: with it quotas do not count."""
    target = f"/proc/{os.getpid()}/{root.relative_to('/proc/self')}/big"
    words = ["setpriv", "--bounding-set=-sys_resource", "dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={most >> 20}",
             "conv=fsync"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0 or "No space left" in done.stderr or "Disk quota exceeded" in done.stderr, done.stderr
    return (root / "big").stat().st_size


def test_a_size_is_kept(driver: Snapshotter, tmp_path: Path) -> None:
    chains = [add(driver, 1, lower)]
    driver.prepare("small", chains, size=24 << 20)
    driver.rename("small", "renamed")
    with mounted(driver, "renamed", chains) as root:
        assert 8 << 20 < fill_up(root, 64 << 20) <= 24 << 20
        (root / "big").unlink()
        assert 8 << 20 < fill_up(root, 64 << 20) <= 24 << 20
        other = make_snapshotter(driver.name, tmp_path)  # the next daemon's, of the same file
        assert other.usage("renamed").size > 8 << 20
        other.close()
    driver.remove("renamed")
    driver.prepare("free", chains)
    with mounted(driver, "free", chains) as root:
        assert fill_up(root, 32 << 20) == 32 << 20


@contextlib.contextmanager
def disk(folder: Path, kind: str, *options: str, size: int = 300 << 20) -> Iterator[Path]:
    """A file system of its own, on a file."""
    image, at = folder / f"{kind}.img", folder / kind
    with open(image, "wb") as file:
        file.truncate(size)
    subprocess.run([f"mkfs.{kind}", "-q", *options, str(image)], check=True, capture_output=True)
    at.mkdir()
    flags = "loop,prjquota" if "project" in " ".join(options) else "loop"
    done = subprocess.run(["mount", "-o", flags, str(image), str(at)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this kernel does not mount {kind} {' '.join(options)}: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.parametrize("name", DRIVERS)
def test_btrfs_keeps_sizes_by_qgroups_and_shares_blocks(name: str, tmp_path: Path) -> None:
    with disk(tmp_path, "btrfs") as at:
        driver = make_snapshotter(name, at)
        chains = [add(driver, 1, lambda root: (root / "big").write_bytes(os.urandom(40 << 20)) and None)]
        os.sync()
        before = os.statvfs(at).f_bfree * os.statvfs(at).f_bsize
        driver.prepare("one", chains)
        os.sync()
        assert before - os.statvfs(at).f_bfree * os.statvfs(at).f_bsize < 20 << 20, "the image was copied"
        driver.prepare("small", [], size=24 << 20)
        assert quota.is_btrfs(str(at)) and not list(at.rglob("disk"))
        with mounted(driver, "small", []) as root:
            assert 8 << 20 < fill_up(root, 64 << 20) <= 24 << 20
        driver.remove("small")
        driver.remove("one")
        driver.close()


def test_xfs_shares_the_blocks_of_a_copy(tmp_path: Path) -> None:
    with disk(tmp_path, "xfs") as at:
        driver = make_snapshotter("native", at)
        chains = [add(driver, 1, lambda root: (root / "big").write_bytes(os.urandom(20 << 20)) and None)]
        os.sync()
        before = os.statvfs(at).f_bfree * os.statvfs(at).f_bsize
        driver.prepare("one", chains)
        os.sync()
        assert before - os.statvfs(at).f_bfree * os.statvfs(at).f_bsize < 10 << 20, "the image was copied"
        with mounted(driver, "one", chains) as root:
            assert (root / "big").stat().st_size == 20 << 20
        driver.remove("one")
        driver.close()


@pytest.mark.parametrize("name", DRIVERS)
def test_ext4_keeps_sizes_by_project_quotas(name: str, tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", "-O", "quota,project", "-E", "quotatype=prjquota") as at:
        driver = make_snapshotter(name, at)
        driver.prepare("small", [], size=24 << 20)
        if list(at.rglob("disk")):
            pytest.skip("this kernel has no project quotas (CONFIG_QUOTA)")
        with mounted(driver, "small", []) as root:
            assert 8 << 20 < fill_up(root, 64 << 20) <= 24 << 20
        driver.close()


@pytest.mark.parametrize("name", DRIVERS)
def test_a_tmpfs_holds_a_store_too(name: str, tmp_path: Path) -> None:
    """EROFS is not mounted from a file there: a loop device is taken."""
    at = tmp_path / "tmpfs"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(at)], check=True)
    try:
        driver = make_snapshotter(name, at)
        chains = [add(driver, 1, lower), add(driver, 2, upper)]
        driver.prepare("one", chains)
        with mounted(driver, "one", chains) as root:
            assert (root / "keep/file").read_text() == "from below"
        big = add(driver, 3, lambda root: (root / "big").write_bytes(os.urandom(20 << 20)) and None)
        if name == "native":
            with pytest.raises(ResourceExhausted, match="No space left"):
                driver.prepare("two", [big, big, big])
                driver.prepare("three", [big, big, big])
                driver.prepare("four", [big, big, big])
            assert set(driver.active()) <= {"one", "two", "three"}
        driver.close()
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_a_disk_that_two_threads_ask_for_is_mounted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two loop devices it would be two file systems, which write over each other."""
    held = Places(tmp_path, Trash(str(tmp_path / "trash")))
    try:
        held.make("one", 16 << 20)
    except FailedPrecondition as error:
        pytest.skip(str(error))
    if not (tmp_path / "active" / "one" / "disk").exists():
        pytest.skip("this file system has project quotas or qgroups")
    both, find, attached = threading.Barrier(2), loop.find, []

    def finds(path: str) -> tuple[int, str] | None:
        found = find(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # the other one comes here at the same time, or not before this is done
        attached.append(found)
        return found

    monkeypatch.setattr(loop, "find", finds)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(held.disk, ["one", "one"])
    assert first is second and attached == [None]
    again = Places(tmp_path, Trash(str(tmp_path / "trash")))  # the next daemon, while the mount is there
    assert again.disk("one") is not None and attached[1][1] == first.source
    for one in (held, again):
        one.close()


@pytest.mark.parametrize("size", [0, 16 << 20])
def test_what_a_killed_process_has_compared_goes(tmp_path: Path, size: int) -> None:
    driver = make_snapshotter("native", tmp_path)
    try:
        driver.prepare("one", [], size=size)
    except FailedPrecondition as error:
        pytest.skip(str(error))
    with driver.written("one", []) as first:
        left = first.with_name("written-0-0")
        (left / "folder").mkdir(parents=True)
        with driver.written("one", []):
            assert not left.exists() and first.exists()
        left.mkdir()
        os.close(driver.mount("one", [], MountOptions()))
        assert not left.exists() and first.exists()
    driver.close()


def test_what_is_exchanged_while_a_copy_is_compared_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container goes on: between the look at a name and its use that is another thing, or nothing."""
    driver = make_snapshotter("native", tmp_path)
    driver.prepare("one", [])
    root = driver.root / "active" / "one" / "root"
    (root / "stays").write_text("here")
    for name in ("file-gone", "file-folder", "file-link"):
        (root / name).write_text("x")
    for name in ("folder-gone", "folder-file", "folder-link"):
        (root / name).mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    look = native._lstat

    def looks(folder: int, name: str) -> os.stat_result | None:
        before, _, after = name.partition("-")
        info, path = look(folder, name), f"/proc/self/fd/{folder}/{name}"
        if info is not None and after and stat.S_ISDIR(info.st_mode) == (before == "folder"):
            (os.rmdir if before == "folder" else os.unlink)(path)
            if after == "folder":
                os.mkdir(path)
            elif after == "link":
                os.symlink(tmp_path / "outside", path)
            elif after == "file":
                Path(path).write_text("y")
        return info

    monkeypatch.setattr(native, "_lstat", looks)
    with driver.written("one", []) as written:
        assert sorted(path.name for path in written.iterdir()) == ["file-link", "stays"]
        assert (written / "file-link").is_symlink()
    driver.close()


def test_a_snapshot_of_another_driver_is_named(tmp_path: Path) -> None:
    overlay, native = make_snapshotter("overlay", tmp_path), make_snapshotter("native", tmp_path)
    overlay.prepare("one", [])
    native.prepare("two", [])
    with pytest.raises(FailedPrecondition, match="another snapshotter than native"):
        native.mount("one", [], MountOptions())
    with pytest.raises(FailedPrecondition, match="another snapshotter than overlay"):
        overlay.mount("two", [], MountOptions())
    with pytest.raises(InvalidArgument, match="no snapshotter"):
        make_snapshotter("zfs", tmp_path)


def test_an_erofs_layer_is_sealed_where_that_can_be(tmp_path: Path) -> None:
    with disk(tmp_path, "ext4", "-b", "4096", "-O", "verity") as at:
        driver = make_snapshotter("erofs", at)
        one = add(driver, 1, lower)
        image = next(at.rglob("image"))
        seal = image.with_name("verity")
        if not seal.exists():
            pytest.skip("this kernel has no fs-verity (CONFIG_FS_VERITY)")
        fd = os.open(image, os.O_RDONLY)
        assert verity.measure(fd) == seal.read_text()
        os.close(fd)
        with pytest.raises(PermissionError):
            open(image, "r+b")
        driver.prepare("one", [one])
        driver.close()
        seal.write_text("sha256:" + "0" * 64)
        other = make_snapshotter("erofs", at)
        with pytest.raises(Internal, match="fs-verity digest differs"):
            other.mount("one", [one], MountOptions())
        other.close()


def test_a_seal_that_the_file_does_not_have_is_told(tmp_path: Path) -> None:
    """Whatever the kernel has: a layer that was sealed once and is not is another file."""
    driver = make_snapshotter("erofs", tmp_path)
    one = add(driver, 1, lower)
    next(tmp_path.rglob("image")).with_name("verity").write_text("sha256:" + "0" * 64)
    driver.prepare("one", [])
    with pytest.raises(Internal, match="fs-verity digest differs"):
        driver.mount("one", [one], MountOptions())
    driver.close()


CHILD = """
import sys
from pathlib import Path
from dolium.images.snapshots.drivers import make_snapshotter
driver = make_snapshotter(sys.argv[1], Path(sys.argv[2]))
prepared = driver.begin_layer("sha256:" + "1" * 64)
(prepared / "file").write_text("x")
driver.commit_layer("sha256:" + "1" * 64, prepared)
driver.prepare("one", ["sha256:" + "1" * 64], size=16 << 20)
"""


@pytest.mark.parametrize(("name", "point"), [("erofs", "driver.packed"), ("native", "driver.copied"), ("native", "driver.sized"),
                                             ("overlay", "driver.sized"), ("erofs", "snapshot.layer.renamed")])
def test_a_kill_leaves_nothing_half_done(tmp_path: Path, name: str, point: str) -> None:
    """What is left of a layer goes by ``recover``; of a snapshot by ``remove``, since no container has its key."""
    before = loops()
    environment = {**os.environ, "DOLIUM_FAULT": point, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", CHILD, name, str(tmp_path)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    driver = make_snapshotter(name, tmp_path)
    driver.recover()
    whole = point != "driver.packed"
    assert driver.layers() == ["sha256:" + "1" * 64] * whole
    for key in driver.active():
        driver.remove(key)
    if whole:
        driver.remove_layer("sha256:" + "1" * 64)
    driver.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    gone(before)
