"""dolium-untar against GNU tar, and against layers that mean harm. Root."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
from registry import Entry, entry, tar

from dolium import native

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and trusted xattrs need root"),
]

DIR, SYM, LNK, CHR, FIFO = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def untar(root: Path, data: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [native.program("dolium-untar"), *flags, str(root)], input=data, capture_output=True, check=False
    )


def extract(root: Path, *entries: Entry, flags: tuple[str, ...] = ()) -> None:
    done = untar(root, tar(entries), *flags)
    assert (done.returncode, done.stderr) == (0, b"")


def refused(root: Path, *entries: Entry, flags: tuple[str, ...] = ()) -> str:
    """The message; nothing may have appeared beside the root."""
    before = sorted(os.listdir(root.parent))
    done = untar(root, tar(entries), *flags)
    assert done.returncode == 1
    assert sorted(os.listdir(root.parent)) == before
    message = done.stderr.decode()
    assert message.startswith("untar: ") and message.count("\n") == 1
    return message


def xattrs(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}


def described(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything a tar can carry, by path; inode numbers replaced by the first path that has them."""
    first: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    paths = [root, *sorted(root.rglob("*"))]
    for path in paths:
        name = str(path.relative_to(root))
        info = path.lstat()
        same = first.setdefault(info.st_ino, name)
        content: object = None
        if stat.S_ISLNK(info.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        device = info.st_rdev if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode) else 0
        found[name] = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, same, content, device, xattrs(path))
    return found


# The same as GNU tar


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything."""
    top = tmp_path / "tree"
    top.mkdir()
    (top / "dir" / "sub").mkdir(parents=True)
    (top / "dir" / "file").write_bytes(b"hello\n")
    (top / "dir" / "empty").touch()
    (top / "big").write_bytes(random.Random(1).randbytes(700_001))
    os.link(top / "dir" / "file", top / "link")
    os.symlink("dir/file", top / "symlink")
    os.symlink("/nowhere/" + "x" * 150, top / "longlink")
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 300))
    long = top / ("d" * 90) / ("e" * 90)
    long.mkdir(parents=True)
    (long / ("f" * 200)).write_text("long")
    (top / "setuid").write_text("#!")
    os.chown(top / "setuid", 1234, 4321)
    os.chmod(top / "setuid", 0o6755)
    (top / "sticky").mkdir()
    os.chmod(top / "sticky", 0o1777)
    (top / "group").mkdir()
    os.chown(top / "group", 0, 77)
    os.chmod(top / "group", 0o2775)
    (top / "group" / "child").touch()
    os.chown(top / "group" / "child", 0, 0)
    (top / "closed").mkdir()
    (top / "closed" / "inner").touch()
    os.chmod(top / "closed", 0)
    os.lchown(top / "symlink", 5, 6)
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(0, 1_234_567_890_123_456_789), follow_symlinks=False)
    os.utime(top, ns=(0, 1_111_111_111_000_000_000))
    return top


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "posix"])
def test_same_tree_as_gnu_tar(tmp_path: Path, root: Path, tree: Path, format: str) -> None:
    packed = subprocess.run(
        ["tar", f"--format={format}", "-C", str(tree), "-c", "."], stdout=subprocess.PIPE, check=True
    ).stdout
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["tar", "-C", str(other), "-xp", "--numeric-owner", "--same-owner"], input=packed, check=True)
    done = untar(root, packed)
    assert done.stderr == b""
    assert described(root) == described(other)
    entries, size = done.stdout.split()
    assert int(entries) == len(described(other))
    assert int(size) == 6 + 700_001 + 4 + 2


@pytest.mark.parametrize("arguments", [
    ["--format=gnu"], ["--format=posix", "--sparse-version=0.0"], ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=1.0"],
])
def test_sparse_files(tmp_path: Path, root: Path, arguments: list[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "holes", "wb") as file:
        for i in range(60):  # more than the four and the 21 segments of old GNU's blocks
            file.seek(i * 1_000_000)
            file.write(b"data %d" % i)
        file.truncate(80_000_000)
    (source / "after").write_text("after")
    packed = subprocess.run(
        ["tar", *arguments, "-S", "-C", str(source), "-c", "holes", "after"], stdout=subprocess.PIPE, check=True
    ).stdout
    assert len(packed) < 10_000_000
    assert untar(root, packed).stderr == b""
    assert (root / "holes").read_bytes() == (source / "holes").read_bytes()
    assert (root / "holes").stat().st_blocks * 512 < 10_000_000
    assert (root / "after").read_text() == "after"


def test_xattrs_and_capabilities_outlive_chown(root: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    extract(
        root,
        (entry("ping", mode=0o4755, uid=5, gid=6, pax={
            "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
            "SCHILY.xattr.user.note": "text",
        }), b"x"),
        entry("dir", DIR, pax={"SCHILY.xattr.user.note": "on a directory"}),
        entry("link", SYM, link="ping", pax={"SCHILY.xattr.trusted.note": "on a link"}),
    )
    assert xattrs(root / "ping") == {"security.capability": capability, "user.note": b"text"}
    assert stat.S_IMODE((root / "ping").stat().st_mode) == 0o4755
    assert xattrs(root / "dir") == {"user.note": b"on a directory"}
    assert xattrs(root / "link") == {"trusted.note": b"on a link"}


@pytest.mark.skipif(tuple(map(int, os.uname().release.split(".")[:2])) < (6, 6), reason="needs fchmodat2 (Linux 6.6)")
def test_set_id_bits_of_nodes_outlive_chown(root: Path) -> None:
    extract(root, entry("fifo", FIFO, mode=0o6755, uid=5, gid=6), entry("null", tarfile.CHRTYPE, mode=0o2644, uid=7, device=(1, 3)))
    assert [stat.S_IMODE((root / name).lstat().st_mode) for name in ("fifo", "null")] == [0o6755, 0o2644]


def test_layers_do_not_write_overlays_own_xattrs(root: Path) -> None:
    extract(root, entry("dir", DIR, pax={
        "SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.user.overlay.metacopy": "", "SCHILY.xattr.trusted.mine": "stays",
    }))
    assert xattrs(root / "dir") == {"trusted.mine": b"stays"}


def test_global_pax_headers_apply_until_a_local_one(root: Path) -> None:
    done = tarfile.TarInfo("b")
    done.pax_headers = {"SCHILY.xattr.user.a": "local"}
    import io
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"SCHILY.xattr.user.a": "global", "mtime": "5.25"}) as archive:
        archive.addfile(tarfile.TarInfo("a"))
        archive.addfile(done)
    assert untar(root, out.getvalue()).stderr == b""
    assert xattrs(root / "a") == {"user.a": b"global"}
    assert xattrs(root / "b") == {"user.a": b"local"}
    assert (root / "a").stat().st_mtime_ns == 5_250_000_000


def test_times_before_1970_and_numbers_in_base_256(root: Path) -> None:
    extract(root, entry("pax", mtime=-1.5))
    data = tar([(entry("gnu", uid=3_000_000, mtime=-7), b"x")], format=tarfile.GNU_FORMAT)
    assert untar(root, data).stderr == b""
    assert (root / "pax").stat().st_mtime_ns == -1_500_000_000
    assert ((root / "gnu").stat().st_mtime, (root / "gnu").stat().st_uid) == (-7, 3_000_000)


def test_a_directorys_time_survives_what_is_put_into_it(root: Path) -> None:
    extract(root, entry("d", DIR, mtime=7), entry("d/f"), entry(".", DIR, mode=0o711, mtime=9))
    assert (root / "d").stat().st_mtime == 7
    assert (root.stat().st_mtime, stat.S_IMODE(root.stat().st_mode)) == (9, 0o711)


def test_the_later_entry_wins(root: Path) -> None:
    extract(
        root,
        (entry("file"), b"old"), (entry("file"), b"new"),
        entry("a", DIR), (entry("a/x"), b"1"), (entry("a"), b"now a file"),
        (entry("b"), b"file"), entry("b", DIR), (entry("b/y"), b"2"),
        entry("c", SYM, link="b"), entry("c", DIR), (entry("c/z"), b"3"),
        (entry("d"), b"file"), entry("d", SYM, link="b"),
        (entry("e"), b"file"), entry("e", LNK, link="file"),
    )
    assert (root / "file").read_bytes() == b"new"
    assert (root / "a").read_bytes() == b"now a file"
    assert os.listdir(root / "b") == ["y"]
    assert not (root / "c").is_symlink() and os.listdir(root / "c") == ["z"]
    assert os.readlink(root / "d") == "b"
    assert (root / "e").stat().st_ino == (root / "file").stat().st_ino


def test_names_are_cleaned_and_missing_parents_made(root: Path) -> None:
    extract(root, (entry("/abs/./x//y"), b"1"), (entry("./abs/z"), b"2"), entry("abs/l", LNK, link="/abs/z"))
    assert (root / "abs" / "x" / "y").read_bytes() == b"1"
    assert (root / "abs" / "l").read_bytes() == b"2"
    assert stat.S_IMODE((root / "abs").stat().st_mode) == 0o755


def test_symbolic_links_that_stay_inside_are_followed(root: Path) -> None:
    extract(
        root, entry("usr", DIR), entry("usr/lib", DIR), entry("lib", SYM, link="usr/lib"), (entry("lib/x"), b"1"),
        entry("usr/up", SYM, link="../usr/lib"), (entry("usr/up/deep/y"), b"2"), entry("l", LNK, link="lib/x"),
    )
    assert os.readlink(root / "lib") == "usr/lib"
    assert (root / "usr" / "lib" / "x").read_bytes() == b"1"
    assert (root / "usr" / "lib" / "deep" / "y").read_bytes() == b"2"
    assert (root / "l").stat().st_nlink == 2


# Whiteouts


def is_whiteout(path: Path) -> bool:
    info = path.lstat()
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def test_whiteouts_in_overlay_form(root: Path) -> None:
    extract(
        root, entry("d", DIR), entry("d/.wh.gone"), entry("o", DIR), entry("o/.wh..wh..opq"), (entry("o/f"), b"x"),
        entry("far/.wh.away"), entry(".wh..wh.plnk", DIR), entry("p/.wh..wh..opq"),
    )
    assert is_whiteout(root / "d" / "gone")
    assert is_whiteout(root / "far" / "away")
    assert xattrs(root / "o") == {"trusted.overlay.opaque": b"y"}
    assert xattrs(root / "p") == {"trusted.overlay.opaque": b"y"}
    assert sorted(os.listdir(root)) == ["d", "far", "o", "p"]


def test_whiteouts_do_not_touch_their_own_layer(root: Path) -> None:
    extract(
        root, (entry("before"), b"1"), entry(".wh.before"), entry(".wh.after"), (entry("after"), b"2"),
        entry("dir", DIR), (entry("dir/f"), b"3"), entry(".wh.dir"),
        entry(".wh.later"), entry("later", DIR), entry(".wh.implicit"), (entry("implicit/f"), b"4"),
    )
    assert (root / "before").read_bytes() == b"1"
    assert (root / "after").read_bytes() == b"2"
    for name in ("dir", "later", "implicit"):
        assert xattrs(root / name) == {"trusted.overlay.opaque": b"y"}, name
    assert (root / "dir" / "f").read_bytes() == b"3"


def test_apply_carries_whiteouts_out(root: Path) -> None:
    extract(
        root, (entry("file"), b"1"), entry("dir", DIR), (entry("dir/a"), b"1"), entry("dir/sub", DIR),
        (entry("dir/sub/b"), b"1"), (entry("keep/x"), b"1"), (entry("o/old/x"), b"1"), (entry("o/both/old"), b"1"),
    )
    extract(
        root, entry(".wh.file"), (entry("o/both/new"), b"2"), entry("o/.wh..wh..opq"), (entry("o/late"), b"2"),
        (entry("dir/new/f"), b"2"), entry(".wh.dir"), entry(".wh.never"), flags=("--apply",),
    )
    assert sorted(os.listdir(root)) == ["dir", "keep", "o"]
    assert sorted(str(p.relative_to(root / "dir")) for p in (root / "dir").rglob("*")) == ["new", "new/f"]
    assert sorted(str(p.relative_to(root / "o")) for p in (root / "o").rglob("*")) == ["both", "both/new", "late"]


def test_without_privileges(root: Path) -> None:
    extract(
        root, (entry("f", uid=9, gid=9, pax={"SCHILY.xattr.trusted.x": "1", "SCHILY.xattr.user.y": "2"}), b"x"),
        entry("null", CHR, device=(1, 3)), entry("fifo", FIFO), entry(".wh.gone"), entry("o/.wh..wh..opq"),
        flags=("--no-chown",),
    )
    assert sorted(os.listdir(root)) == ["f", "fifo", "gone", "o"]
    assert ((root / "f").stat().st_uid, xattrs(root / "f")) == (0, {"user.y": b"2"})
    assert xattrs(root / "o") == {"user.overlay.opaque": b"y"}


# Layers that mean harm


def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "victim").write_text("untouched")
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/../evil", "a/..", ".."])
def test_dotdot_in_a_name_is_refused(root: Path, name: str) -> None:
    message = refused(root, (entry(name), b"x"))
    assert "'..'" in message and message.startswith(f"untar: {name}: ")


@pytest.mark.parametrize("kind", [DIR, SYM, LNK, CHR, FIFO])
def test_dotdot_is_refused_for_every_type(root: Path, kind: bytes) -> None:
    assert "'..'" in refused(root, entry("../evil", kind, link="x"))


@pytest.mark.parametrize("target", ["absolute", "../outside", "a/../../outside", "../../../../../../../../../tmp"])
def test_a_parent_that_is_a_link_out_is_refused(tmp_path: Path, root: Path, target: str) -> None:
    victim = outside(tmp_path)
    link = str(victim) if target == "absolute" else target
    for kind in (tarfile.REGTYPE, DIR, SYM, FIFO):
        message = refused(root, entry("a", DIR), entry("evil", SYM, link=link), entry("evil/victim", kind, link="x"))
        assert message.startswith("untar: evil/victim") and ": refused: a symbolic link" in message
    refused(root, entry("evil", SYM, link=link), entry("evil/.wh.victim"))
    refused(root, entry("evil", SYM, link=link), entry("evil/.wh..wh..opq"), flags=("--apply",))
    assert os.listdir(victim) == ["victim"]
    assert xattrs(victim) == {}


def test_links_through_links_are_refused(tmp_path: Path, root: Path) -> None:
    victim = outside(tmp_path)
    refused(root, entry("a", SYM, link="b"), entry("b", SYM, link=str(victim)), (entry("a/x"), b"1"))
    refused(root, entry("proc", SYM, link="/proc/self/root"), (entry("proc/tmp/x"), b"1"))
    refused(root, entry("loop", SYM, link="loop"), (entry("loop/x"), b"1"))
    assert os.listdir(victim) == ["victim"]


def test_a_file_is_never_written_through_a_link(tmp_path: Path, root: Path) -> None:
    victim = outside(tmp_path) / "victim"
    extract(root, entry("f", SYM, link=str(victim)), (entry("f"), b"evil"))
    assert victim.read_text() == "untouched"
    assert (root / "f").read_bytes() == b"evil" and not (root / "f").is_symlink()


def test_a_nodes_mode_is_not_given_through_a_link_swapped_in(tmp_path: Path, root: Path) -> None:
    """--apply writes into running containers, which may exchange the node for a link to the host before its mode is set."""
    (tmp_path / "secret").touch(0o600)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                os.symlink(tmp_path / "secret", root / "new")
                os.rename(root / "new", root / "n")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(20):
            untar(root, tar([entry("n", FIFO, mode=0o666)] * 300), "--apply")
    finally:
        stop.set()
        thread.join()
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_directory_entry_never_changes_what_a_link_points_to(tmp_path: Path, root: Path) -> None:
    victim = outside(tmp_path)
    os.chmod(victim, 0o700)
    extract(root, entry("d", SYM, link=str(victim)), entry("d", DIR, mode=0o777, uid=5, mtime=1))
    extract(root, entry("e", DIR, mode=0o777, mtime=1), entry("e", SYM, link=str(victim)))
    info = victim.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o700, 0) and info.st_mtime != 1


@pytest.mark.parametrize("target", ["../outside/victim", "a/../../outside/victim"])
def test_hard_links_with_dotdot_are_refused(tmp_path: Path, root: Path, target: str) -> None:
    victim = outside(tmp_path)
    assert "hard link" in refused(root, entry("l", LNK, link=target))
    assert (victim / "victim").stat().st_nlink == 1


def test_hard_links_through_a_link_out_are_refused(tmp_path: Path, root: Path) -> None:
    victim = outside(tmp_path)
    for link in (str(victim), "../outside"):
        message = refused(root, entry("out", SYM, link=link), entry("l", LNK, link="out/victim"))
        assert message.startswith("untar: l: hard link refused: ")
    # An absolute target is one from the layer's root, so this one does not exist.
    assert "untar: l2: hard link" in refused(root, entry("l2", LNK, link=str(victim / "victim")))
    assert (victim / "victim").stat().st_nlink == 1


def test_a_hard_link_to_a_symbolic_link_does_not_follow_it(tmp_path: Path, root: Path) -> None:
    victim = outside(tmp_path) / "victim"
    extract(root, entry("s", SYM, link=str(victim)), entry("l", LNK, link="s"), (entry("l"), b"evil"))
    assert victim.read_text() == "untouched" and victim.stat().st_nlink == 1


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh..."])
def test_whiteouts_of_nothing_are_refused(root: Path, name: str) -> None:
    for flags in ((), ("--apply",)):
        (root.parent / "victim").touch()
        assert "whiteout" in refused(root, entry("d", DIR), entry(name), flags=flags)


def test_apply_does_not_follow_links_when_it_removes(tmp_path: Path, root: Path) -> None:
    victim = outside(tmp_path)
    (root / "d").mkdir()
    os.symlink(victim, root / "d" / "link")
    extract(root, entry(".wh.d"), flags=("--apply",))
    assert os.listdir(root) == [] and os.listdir(victim) == ["victim"]


def test_messages_carry_no_escape_sequences(root: Path) -> None:
    assert "\\033[2J" in refused(root, entry("../\x1b[2J"))


# Damaged archives


def damaged(root: Path, data: bytes, reason: str) -> None:
    done = untar(root, data)
    assert done.returncode == 1 and reason in done.stderr.decode(), done.stderr


def test_damage_is_named(root: Path) -> None:
    good = tar([(entry("f"), b"x" * 2000)])
    damaged(root, good[:700], "cut short")
    damaged(root, good[:300], "cut short")
    damaged(root, b"\1" + good[1:], "checksum")
    damaged(root, b"not a tar at all" * 100, "octal")


def test_archives_without_an_end_are_read_to_theirs(root: Path) -> None:
    good = tar([(entry("f"), b"x" * 2000)])
    for end in (512 + 2000, 512 + 2048, 512 + 2048 + 512):  # umoci's, without zero blocks, with one
        assert untar(root, good[:end]).stderr == b""
        assert (root / "f").read_bytes() == b"x" * 2000
    assert untar(root, b"").stdout == b"0 0\n"


def header(**fields: bytes) -> bytearray:
    block = bytearray(tar([entry("f")], format=tarfile.USTAR_FORMAT)[:512])
    places = {"size": 124, "type": 156, "uid": 108, "major": 329, "isextended": 482, "realsize": 483, "sparse": 386}
    for name, value in fields.items():
        block[places[name]:places[name] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def test_numbers_out_of_range(root: Path) -> None:
    damaged(root, bytes(header(size=b"\xff" * 12)), "negative")
    damaged(root, bytes(header(size=b"\x80" + b"\xff" * 11)), "too large")
    damaged(root, bytes(header(size=b"\x80\0\0\0\x7f" + b"\xff" * 7)), "out of range")
    damaged(root, bytes(header(uid=b"\xff" * 8)), "out of range")
    damaged(root, bytes(header(type=b"x", size=b"77777777777\0")), "too long")
    damaged(root, bytes(header(type=b"3", major=b"7777777\0")), "out of range")
    damaged(root, bytes(header(type=b"Z")), "unknown entry type")
    over = b"%011o\0%011o\0" % (100, 200)
    damaged(root, bytes(header(type=b"S", size=b"%011o\0" % 200, sparse=over, realsize=b"%011o\0" % 150)), "segment")


@pytest.mark.parametrize(("record", "reason"), [
    (b"0 path=x\n", "length is wrong"), (b"9999 path=x\n", "length is wrong"), (b"10 path=xyz", "length is wrong"),
    (b"11 path=x\0\n", "NUL"), (b"8 =abcd\n", "no key"), (b"12 size=12x\n", "not decimal"),
    (b"99999999999999999999999 a=b\n", "too large"), (b"15 uid=99999999\n"[:15] + b"\n", "length is wrong"),
    (b"22 GNU.sparse.major=2\n22 GNU.sparse.minor=0\n", "unknown GNU sparse"),
    (b"24 GNU.sparse.map=0,99,5\n"[:24], "length is wrong"), (b"26 GNU.sparse.numbytes=10\n", "no offset"),
])
def test_bad_pax_records(root: Path, record: bytes, reason: str) -> None:
    data = bytes(header(type=b"x", size=b"%011o\0" % len(record))) + record.ljust(512, b"\0") + bytes(header())
    damaged(root, data, reason)


def test_wrong_usage(root: Path) -> None:
    assert untar(root, b"", "--what").returncode == 2
    assert untar(root / "missing", b"").stderr.startswith(b"untar: ")


def test_it_reaches_its_directory_and_nothing_else(root: Path) -> None:
    """Whatever an archive makes of the program: its root is the directory, and it has only the rights that unpacking takes."""
    with subprocess.Popen([native.program("dolium-untar"), str(root)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        try:
            process.stdin.write(tar([(entry("first"), b"x"), (entry("second"), bytes(1 << 20))])[:200_000])
            process.stdin.flush()
            deadline = time.monotonic() + 10
            while not (root / "first").exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert os.readlink(f"/proc/{process.pid}/root") == str(root)
            status = dict(line.split(":\t") for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":\t" in line)
            kept = {"chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4, "sys_admin": 21, "mknod": 27, "setfcap": 31}
            assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == sum(1 << number for number in kept.values())
            assert status["NoNewPrivs"] == "1"
        finally:
            process.stdin.close()
