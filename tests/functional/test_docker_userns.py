"""Containers in user namespaces of their own, by the docker command line and dolium's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DOLIUM, Daemon, base_tar, eventually

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background
REMAPPED = 1_900_000_000


def ids_of(engine: Daemon, name: str) -> str:
    return Path(f"/proc/{engine.inspect(name)['State']['Pid']}/uid_map").read_text().split()[1]


def test_root_inside_is_nobody_outside(engine: Daemon) -> None:
    script = ("id -u; cat /proc/self/uid_map; stat -c '%u %g' /bin/busybox /data/seed /etc/hosts; echo made > /made; chown 7:8 /made; "
              "mkdir /data/dir; ping -c 1 -W 5 127.0.0.1 > /dev/null && echo pinged; hostname; exec sleep 600")
    engine.dolium("run", "-d", "--name", "mapped", "--userns", "auto", "-h", "inside", "-w", "/fresh/folder", "base:1", "sh", "-c", script)
    try:
        lines = eventually(lambda: (text := engine.docker("logs", "mapped").stdout.splitlines())[-1:] == ["inside"] and text, "it says so")
        assert lines[0] == "0" and lines[1].split()[0] == "0" and lines[1].split()[2] == "65536"
        base = int(lines[1].split()[1])
        assert base >= 0x70000000 and lines[2:] == ["0 0", "1000 1000", "0 0", "pinged", "inside"]
        pid = engine.inspect("mapped")["State"]["Pid"]
        assert os.stat(f"/proc/{pid}").st_uid == base
        assert os.stat(f"/proc/{pid}/root/made").st_uid == base + 7
        upper = engine.folder / "data" / "snapshots" / "active" / engine.inspect("mapped")["Id"] / "upper"
        assert (upper / "fresh" / "folder").stat().st_uid == base
        assert sorted(path.name for path in upper.iterdir()) == ["data", "fresh", "made"], "more was copied than was written"
        assert engine.docker("exec", "mapped", "sh", "-c", "id -u; cat /made; echo more >> /made; stat -c %u /made").stdout == "0\nmade\n7\n"
        assert engine.docker("exec", "-u", "app", "mapped", "sh", "-c", "id -u; cat /proc/self/uid_map").stdout.split()[:3:2] == ["1000", str(base)]
        assert engine.docker("exec", "mapped", "sh", "-c", "mount -t tmpfs none /tmp 2>&1; date -s 2020-01-01 2>&1; true").stdout.count("ermi") == 2
        engine.docker("restart", "-t", "0", "mapped")
        assert ids_of(engine, "mapped") == str(base)
        assert engine.docker("exec", "mapped", "cat", "/made").stdout.startswith("made")
    finally:
        engine.docker("rm", "-f", "mapped")


def test_two_have_two_ranges_and_share_a_volume(engine: Daemon) -> None:
    sleep = ("base:1", "sleep", "600")
    engine.dolium("run", "-d", "--name", "one", "--userns", "auto", "-v", "shared:/data", *sleep)
    engine.dolium("run", "-d", "--name", "two", "--userns", "auto", "-v", "shared:/data", *sleep)
    engine.docker("run", "-d", "--name", "host", "-v", "shared:/data", *sleep)
    try:
        assert ids_of(engine, "one") != ids_of(engine, "two") and ids_of(engine, "host") == "0"
        engine.docker("exec", "one", "sh", "-c", "echo word > /data/file; chown 5:6 /data/file")
        for name in ("one", "two", "host"):
            assert engine.docker("exec", name, "stat", "-c", "%u %g %n", "/data/file", "/data/seed").stdout.split() == [
                "5", "6", "/data/file", "1000", "1000", "/data/seed"]
        base = int(ids_of(engine, "one"))
        engine.docker("rm", "-f", "one")
        engine.dolium("run", "-d", "--name", "one", "--userns", "auto", *sleep)
        assert int(ids_of(engine, "one")) == base, "a range is used again"
    finally:
        engine.docker("rm", "-fv", "one", "two", "host")
        engine.docker("volume", "rm", "shared")


def test_two_that_are_made_at_once_have_two_ranges(engine: Daemon) -> None:
    """A root of a size takes a while to make."""
    names = ("first", "second")
    making = [subprocess.Popen([DOLIUM, "run", "-d", "--name", name, "--userns", "auto", "--storage-opt", "size=16m", "base:1", "sleep", "600"],
                               env=engine.env, stdout=subprocess.DEVNULL) for name in names]
    try:
        assert [one.wait() for one in making] == [0, 0]
        assert ids_of(engine, "first") != ids_of(engine, "second")
    finally:
        engine.docker("rm", "-f", *names)


def test_a_user_namespace_that_is_asked_for_is_not_left_out_silently(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "host", "base:1", "sleep", "600")
    try:
        for option in ("--network", "--ipc", "--pid"):
            refused = engine.dolium("run", "--rm", "--userns", "auto", option, "container:host", "base:1", "true", check=False)
            assert refused.returncode == 125 and "different user namespaces" in refused.stderr
    finally:
        engine.docker("rm", "-f", "host")


def test_who_is_joined_is_known_by_id_and_its_absence_is_no_missing_image(engine: Daemon) -> None:
    engine.docker("create", "--name", "first", "--ipc", "shareable", "base:1", "true")
    engine.docker("create", "--name", "second", "--ipc", "container:first", "--pid", "container:first", "base:1", "true")
    try:
        host, first = engine.inspect("second")["HostConfig"], engine.inspect("first")["Id"]
        assert host["IpcMode"] == host["PidMode"] == f"container:{first}"
        for option in ("--ipc", "--pid", "--network"):
            refused = engine.docker("create", option, "container:nobody", "base:1", check=False)
            assert refused.returncode == 1 and f"{option} container:nobody: No such container" in refused.stderr
            assert "Unable to find image" not in refused.stderr
    finally:
        engine.docker("rm", "-f", "second", "first")


def test_namespaces_are_shared_within_one_user_namespace(engine: Daemon) -> None:
    engine.dolium("run", "-d", "--name", "first", "--userns", "auto", "--ipc", "shareable", "base:1", "sh", "-c", "nc -l -p 81 -e echo hi; sleep 600")
    try:
        join = ("--network", "container:first", "--pid", "container:first", "--ipc", "container:first")
        inside = engine.docker("run", "--rm", *join, "base:1", "sh", "-c", "cat /proc/self/uid_map; nc 127.0.0.1 81").stdout
        assert inside.split()[1] == ids_of(engine, "first") and inside.endswith("hi\n")
        refused = engine.dolium("run", "--rm", "--userns", "auto", "--network", "container:first", "base:1", "true", check=False)
        assert refused.returncode == 125 and "different user namespaces" in refused.stderr
    finally:
        engine.docker("rm", "-f", "first")


def test_copies_have_the_owners_inside(engine: Daemon, tmp_path: Path) -> None:
    engine.dolium("run", "--name", "copied", "--userns", "auto", "-v", "/vol", "base:1", "sh", "-c", "echo x > /x; chown 5:6 /x; echo v > /vol/v; chown 9 /vol/v")
    try:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, owner in (("given", 12), ("own", 0)):
                info = tarfile.TarInfo(name)
                info.uid = info.gid = owner
                archive.addfile(info)
        for turn in range(2):  # stopped, then running
            for path, owner in (("/x", (5, 6)), ("/vol/v", (9, 0))):
                done = subprocess.run(["docker", "cp", f"copied:{path}", "-"], env=engine.env, capture_output=True, check=True)
                with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                    (member,) = archive.getmembers()
                assert (member.uid, member.gid) == owner
            for folder in ("/", "/vol"):
                subprocess.run(["docker", "cp", "-a", "-", f"copied:{folder}"], input=packed.getvalue(), env=engine.env, check=True)
            if not turn:
                engine.dolium("run", "-d", "--name", "other", "--userns", "auto", "base:1", "true")  # takes no range in between
                engine.docker("rm", "-f", "other")
                engine.docker("start", "copied")
                engine.docker("wait", "copied")
        engine.docker("start", "copied")
    finally:
        engine.docker("rm", "-fv", "copied")


@pytest.mark.parametrize("snapshotter", ["overlay", "native"])
def test_what_is_made_of_a_container_has_the_owners_inside(tmp_path: Path, snapshotter: str) -> None:
    engine = Daemon(tmp_path, "--snapshotter", snapshotter)
    engine.start()
    try:
        engine.import_base("base:1", 'CMD ["sh"]')
        engine.dolium("run", "--name", "box", "--userns", "auto", "base:1", "sh", "-c", "echo x > /x; chown 5:6 /x; mkdir /d; chown 7 /data/seed")
        assert set(engine.docker("diff", "box").stdout.splitlines()) == {"A /x", "A /d", "C /data", "C /data/seed"}
        with tarfile.open(fileobj=io.BytesIO(engine.output("export", "box"))) as archive:
            owners = {member.name: (member.uid, member.gid) for member in archive}
        assert (owners["x"], owners["d"], owners["data/seed"], owners["bin/busybox"]) == ((5, 6), (0, 0), (7, 1000), (0, 0))
        engine.docker("commit", "box", "made:1")
        stat = ("made:1", "stat", "-c", "%u %g", "/x", "/d", "/data/seed")
        for words in ((), ("--userns", "auto")):
            assert engine.dolium("run", "--rm", *words, *stat).stdout == "5 6\n0 0\n7 1000\n"
    finally:
        engine.close()


@pytest.mark.parametrize(("options", "words"), [
    (("--privileged",), "privileged mode is incompatible with user namespaces"),
    (("--network", "host"), "cannot share the host's network namespace"),
    (("--pid", "host"), "cannot share the host's PID namespace"),
])
def test_what_a_user_namespace_cannot_have_is_refused(engine: Daemon, options: tuple[str, ...], words: str) -> None:
    refused = engine.dolium("create", "--userns", "auto", *options, "base:1", "true", check=False)
    assert refused.returncode == 1 and words in refused.stderr
    assert engine.docker("ps", "-aq").stdout == ""


def test_other_networks_roots_and_sizes(engine: Daemon) -> None:
    assert engine.dolium("run", "--rm", "--userns", "auto", "--network", "none", "base:1", "ip", "-o", "link").stdout.count("\n") == 1
    assert engine.dolium("run", "--rm", "--userns", "auto", "--storage-opt", "size=16m", "base:1", "sh", "-c", "echo x > /y; cat /y").stdout == "x\n"
    assert engine.dolium("run", "--rm", "--userns", "auto", "--rootfs", "/:O", "sh", "-c", "id -u; stat -c %u /bin; touch /made").stdout == "0\n0\n"
    published = engine.dolium("run", "-d", "--name", "web", "--userns", "auto", "-p", "127.0.0.1::80", "base:1", "nc", "-l", "-p", "80", "-e", "echo", "hello")
    assert published.returncode == 0
    try:
        port = engine.docker("port", "web", "80").stdout.strip()

        def answer() -> bytes:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port.rpartition(":")[2])), 5) as sock:
                return sock.recv(100)
            return b""

        assert eventually(answer, "it answers") == b"hello\n"
    finally:
        engine.docker("rm", "-f", "web")


@pytest.fixture
def subids() -> Iterator[None]:
    """An entry in /etc/subuid and /etc/subgid, for this test."""
    before = {path: Path(path).read_text() if os.path.exists(path) else None for path in ("/etc/subuid", "/etc/subgid")}
    for path, text in before.items():
        Path(path).write_text(f"{text or ''}dolium-test:{REMAPPED}:65536\n")
    yield
    for path, text in before.items():
        if text is None:
            os.unlink(path)
        else:
            Path(path).write_text(text)


def test_a_daemon_that_remaps_all(tmp_path: Path, subids: None) -> None:
    """Docker's own way, for docker's command line, which knows no --userns but host."""
    one = Daemon(tmp_path, "--userns-remap", "dolium-test")
    one.start()
    try:
        path = tmp_path / "base.tar"
        path.write_bytes(base_tar())
        one.docker("import", str(path), "base:1")
        assert one.docker("run", "--rm", "base:1", "cat", "/proc/self/uid_map").stdout.split() == ["0", str(REMAPPED), "65536"]
        assert one.docker("run", "--rm", "--userns", "host", "--privileged", "base:1", "cat", "/proc/self/uid_map").stdout.split()[1] == "0"
        one.docker("run", "-d", "--name", "stays", "base:1", "sleep", "600")
        one.kill()
        one.start()
        assert one.docker("exec", "stays", "cat", "/proc/self/uid_map").stdout.split()[1] == str(REMAPPED)
        assert ids_of(one, "stays") == str(REMAPPED)
        refused = one.docker("run", "--rm", "--privileged", "base:1", "true", check=False)
        assert refused.returncode == 125 and "privileged mode is incompatible" in refused.stderr
        assert json.loads(one.docker("info", "--format", "{{json .SecurityOptions}}").stdout).count("name=userns") == 1
    finally:
        one.close()
    absent = Daemon(tmp_path, "--userns-remap", "nobody-has-this-name")
    absent.start(wait=False)
    assert absent.wait() == 1 and "has no entry in /etc/subuid" in absent.tail()
