"""What people type wrong or at a bad moment: ports, filters, waits, cp beside volumes, a full disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DOCKER, DOLIUM, Daemon, base_tar, eventually

pytestmark = pytest.mark.leaves("links", "nft")  # the daemon's pool of prepared networks fills in the background


def test_a_range_of_host_ports_gives_the_first_free_one(engine: Daemon) -> None:
    try:
        for name, port in (("p1", 18400), ("p2", 18401)):
            engine.docker("run", "-d", "--name", name, "-p", "127.0.0.1:18400-18401:80", "base:1", "sleep", "60")
            assert engine.docker("port", name, "80").stdout == f"127.0.0.1:{port}\n"
        done = engine.docker("run", "--rm", "-p", "127.0.0.1:18400-18401:80", "base:1", "true", check=False)
        assert (done.returncode, "port is already allocated" in done.stderr) == (125, True)
        status, body = engine.api("POST", "/containers/create", {"Image": "base:1", "HostConfig": {
            "PortBindings": {"80/tcp": [{"HostPort": "x"}]}}})
        assert (status, json.loads(body)["message"]) == (400, "invalid port range: 'x'")
    finally:
        engine.docker("rm", "-f", "p1", "p2")


def test_ps_filters(engine: Daemon) -> None:
    try:
        engine.docker("run", "-d", "--name", "web1", "-p", "127.0.0.1:18410:80", "base:1", "sleep", "60")
        for given, found in (("name=^web1$", "web1\n"), ("name=^/web", "web1\n"), ("name=^eb", ""), ("health=none", "web1\n"),
                             ("health=healthy", ""), ("publish=18410", "web1\n"), ("publish=1", ""), ("expose=80", "web1\n"),
                             ("expose=81/tcp", "")):
            assert engine.docker("ps", "-f", given, "--format", "{{.Names}}").stdout == found, given
        for wrong in ("status=nonsense", "exited=x", "health=x", "name=(", "nonsense=1"):
            assert "invalid filter" in engine.docker("ps", "-f", wrong, check=False).stderr, wrong
    finally:
        engine.docker("rm", "-f", "web1")


def test_a_wait_ends_when_a_restarting_container_is_stopped(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "again", "--restart", "always", "base:1", "sh", "-c", "exit 7")
    try:
        eventually(lambda: engine.inspect("again")["RestartCount"] >= 4, "it backs off")
        eventually(lambda: engine.inspect("again")["State"]["Status"] == "restarting", "it waits for its next start")
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.settimeout(10)
            waiting.connect(engine.socket)
            waiting.sendall(b"POST /containers/again/wait HTTP/1.1\r\nHost: d\r\n\r\n")
            data = waiting.recv(4096)  # the headers: it is in place
            engine.docker("stop", "again")
            while b"StatusCode" not in data:
                data += waiting.recv(4096)
            assert b'"StatusCode": 7' in data
    finally:
        engine.docker("rm", "-f", "again")


def test_cp_reaches_the_volume_of_a_stopped_container(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new\n")
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "f").write_text("host\n")
    engine.docker("run", "--rm", "-v", "kept:/data", "base:1", "true")
    engine.docker("create", "--name", "filled", "-v", "kept:/data", "-v", f"{tmp_path}/host:/host", "base:1", "cat",
                  "/data/new", "/data/seed", "/host/new")
    try:
        engine.docker("cp", str(tmp_path / "new"), "filled:/data/new")
        engine.dolium("cp", str(tmp_path / "new"), "filled:/host/new")
        engine.docker("cp", "filled:/host/f", str(tmp_path / "back"))
        assert (tmp_path / "back").read_text() == "host\n"
        assert engine.docker("start", "-a", "filled").stdout == "new\nseed\nnew\n"
        engine.docker("rm", "filled")
        engine.docker("create", "--name", "filled", "-v", "fresh:/data", "base:1", "cat", "/data/new", "/data/seed")
        engine.docker("cp", str(tmp_path / "new"), "filled:/data")
        assert engine.docker("start", "-a", "filled").stdout == "new\nseed\n"
    finally:
        engine.docker("rm", "-f", "filled")
        engine.docker("volume", "rm", "kept", "fresh")


def test_dolium_cp_to_a_new_name_and_to_where_it_is_refused(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(8 << 20))
    engine.docker("run", "-d", "--name", "to", "base:1", "sleep", "60")
    engine.docker("run", "-d", "--name", "ro", "--read-only", "base:1", "sleep", "60")
    try:
        engine.dolium("cp", str(tmp_path / "big"), "to:/tmp/other")
        assert engine.docker("exec", "to", "stat", "-c", "%s", "/tmp/other").stdout == f"{8 << 20}\n"
        for place, text in (("to:/no/such/big", "Could not find the file /no/such in container to"),
                            ("ro:/big", "container rootfs is marked read-only")):
            done = engine.dolium("cp", str(tmp_path / "big"), place, check=False)
            assert (done.returncode, text in done.stderr) == (1, True), done.stderr
    finally:
        engine.docker("rm", "-f", "to", "ro")


def test_dolium_run_refuses_before_it_makes_anything(engine: Daemon, tmp_path: Path) -> None:
    (tmp_path / "cid").touch()
    before = engine.docker("ps", "-aq").stdout
    for words, text in ((("--cidfile", str(tmp_path / "cid")), "container ID file found"),
                        (("-d", "--cidfile", str(tmp_path / "cid")), "container ID file found"),
                        (("--cidfile", str(tmp_path / "no" / "cid")), "no such folder"),
                        (("-t", "--detach-keys", "ctrl-no"), "Invalid detach keys"),
                        (("--network", "container:nosuch"), "No such container: nosuch"),
                        (("--cpus", "1000"), "range of CPUs is from 0.01 to"),
                        (("--restart", "always:3"), "maximum retry count can only be used with 'on-failure'")):
        done = engine.dolium("run", *words, "base:1", "true", check=False, timeout=10)
        assert (done.returncode, text in done.stderr) == (125, True), done.stderr
    assert engine.docker("ps", "-aq").stdout == before
    done = engine.docker("run", "--volumes-from", "x", "base:1", "true", check=False)
    assert "--volumes-from x: No such container: x" in done.stderr


def test_logs_since_a_while_ago(engine: Daemon) -> None:
    engine.docker("run", "--name", "said", "base:1", "echo", "hi")
    try:
        assert engine.dolium("logs", "--since", "10m", "said").stdout == "hi\n"
        assert engine.dolium("logs", "--since", "0s", "said").stdout == ""
        assert engine.dolium("logs", "--until", "10m", "said").stdout == ""
        assert "write 10m" in engine.dolium("logs", "--since", "soon", "said", check=False).stderr
    finally:
        engine.docker("rm", "said")


def test_with_the_hosts_network_comes_its_name(engine: Daemon) -> None:
    assert engine.docker("run", "--rm", "--network", "host", "base:1", "hostname").stdout == f"{os.uname().nodename}\n"
    assert engine.docker("run", "--rm", "--network", "host", "-h", "box", "base:1", "hostname").stdout == "box\n"


def test_words_of_kill(engine: Daemon) -> None:
    engine.docker("create", "--name", "still", "base:1", "true")
    try:
        assert "cannot kill container: still: container" in engine.docker("kill", "still", check=False).stderr
    finally:
        engine.docker("rm", "still")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon on a disk of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    daemon = Daemon(disk)
    try:
        daemon.start()
        daemon.import_base("base:1", 'CMD ["sh"]')
        yield daemon
    finally:
        daemon.close()
        eventually(lambda: subprocess.run(["umount", str(disk)], check=False, capture_output=True).returncode == 0,
                   "nothing uses the disk")


def test_a_container_that_fills_the_disk_ends_and_can_be_removed(small: Daemon) -> None:
    small.docker("run", "-d", "--name", "other", "base:1", "sleep", "60")
    done = small.docker("run", "--name", "fill", "base:1", "sh", "-c", "dd if=/dev/zero of=/big bs=64k; exit 3", check=False,
                        timeout=20)
    assert done.returncode == 3
    assert small.inspect("fill")["State"]["Status"] == "exited"
    refused = small.docker("run", "--rm", "base:1", "true", check=False)
    assert (refused.returncode, "is the disk of the state folder full?" in refused.stderr) == (125, True), refused.stderr
    small.docker("stop", "-t", "0", "other", timeout=20)
    small.docker("rm", "fill", timeout=20)
    eventually(lambda: small.docker("run", "--rm", "base:1", "echo", "again", check=False).stdout == "again\n",
               "there is room again")
    small.kill()
    small.start()
    assert small.docker("ps", "-a", "--format", "{{.Names}} {{.State}}").stdout == "other exited\n"




def test_a_stop_in_the_middle_of_a_restart_holds(engine: Daemon) -> None:
    """The launch of a restart policy takes ten milliseconds or so: many stops meet one."""
    names = [f"loop{number}" for number in range(8)]
    try:
        for name in names:
            engine.docker("run", "-d", "--name", name, "--restart", "always", "base:1", "false")
        stops = [subprocess.Popen([DOCKER, "stop", name], env=engine.env, stdout=subprocess.DEVNULL) for name in names]
        assert [stop.wait(30) for stop in stops] == [0] * len(names)
        assert {engine.inspect(name)["State"]["Status"] for name in names} == {"exited"}
    finally:
        engine.docker("rm", "-f", *names)


def test_a_remove_in_the_middle_of_a_start_leaves_no_shim(engine: Daemon) -> None:
    before = engine.shims()
    for number in range(6):
        name = f"gone{number}"
        engine.docker("create", "--name", name, "base:1", "sleep", "60")
        with subprocess.Popen([DOCKER, "start", name], env=engine.env, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as start:
            engine.docker("rm", "-f", name)
            start.wait(30)
    assert engine.docker("ps", "-aq", "--filter", "name=gone").stdout == ""
    assert engine.shims() == before


def test_who_joins_a_network_has_its_owners_names_and_leaves_them(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "owner1", "-h", "boxa", "--add-host", "there:10.1.2.3", "base:1", "sleep", "60")
    try:
        text = engine.docker("run", "--rm", "--network", "container:owner1", "base:1", "sh", "-c",
                             "hostname; cat /etc/hostname /etc/hosts").stdout
        assert text.splitlines()[:2] == ["boxa", "boxa"]
        assert "10.1.2.3\tthere" in text
        assert engine.docker("exec", "owner1", "hostname").stdout == "boxa\n"
    finally:
        engine.docker("rm", "-f", "owner1")


def test_words_for_what_cannot_be(engine: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for words, code, text in (
            (("-v", f"{file}:/etc"), 125, "mount a directory onto a file (or vice-versa)"),
            (("-v", f"{tmp_path}:/etc/passwd"), 125, "mount a directory onto a file (or vice-versa)"),
            (("-v", f"{file}/below:/x"), 125, f"mount source path '{file}/below': Not a directory"),
            (("--cpuset-cpus", "4095"), 125, "Requested CPUs are not available - requested 4095, available: "),
            (("--cpuset-cpus", "0-"), 125, "Invalid value 0- for cpuset CPUs"),
            (("--cpuset-mems", "77"), 125, "Requested memory nodes are not available")):
        done = engine.docker("run", "--rm", *words, "base:1", "true", check=False)
        assert text in done.stderr and done.returncode == code, (words, done.stderr)
    assert engine.docker("ps", "-aq").stdout == ""


def test_logs_that_were_not_kept_and_signals_that_are_none(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "quiet", "--log-driver", "none", "base:1", "sleep", "60")
    try:
        done = engine.docker("logs", "quiet", check=False)
        assert done.returncode == 1 and "configured logging driver does not support reading" in done.stderr
        done = engine.docker("kill", "-s", "BOGUS", "quiet", check=False)
        assert done.returncode == 1 and "Invalid signal: BOGUS" in done.stderr
        assert engine.inspect("quiet")["State"]["Running"] is True
    finally:
        engine.docker("rm", "-f", "quiet")


def test_image_filters(engine: Daemon) -> None:
    assert "invalid filter 'nonsense'" in engine.docker("images", "-f", "nonsense=1", check=False).stderr
    assert engine.docker("images", "-q", "-f", "before=base:1").stdout == ""
    assert engine.docker("images", "-q", "-f", "since=base:1").stdout == ""
    assert "No such image" in engine.docker("images", "-f", "before=absent", check=False).stderr


def test_when_run_with_rm_returns_the_container_is_gone(engine: Daemon) -> None:
    for number in range(12):
        assert engine.dolium("run", "--rm", "--name", "same", "-p", "127.0.0.1:18430:80", "base:1", "echo", str(number)).stdout == f"{number}\n"
        assert engine.docker("ps", "-aq").stdout == ""


def test_a_client_that_waits_for_the_removal_is_told_when_the_daemon_is_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    daemon = Daemon(tmp_path_factory.mktemp("dolium"))
    daemon.start()
    try:
        daemon.import_base("base:1", 'CMD ["sh"]')
        with subprocess.Popen([DOLIUM, "run", "--rm", "-i", "base:1", "sh", "-c", "echo up; read x; echo $x; exit 9"], env=daemon.env,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
            assert one.stdin is not None and one.stdout is not None and one.stdout.readline() == b"up\n"
            daemon.kill()
            one.stdin.write(b"word\n")
            one.stdin.flush()
            assert one.stdout.read() == b"word\n" and one.wait(30) == 9
        daemon.start()
        eventually(lambda: daemon.docker("ps", "-aq").stdout == "", "the new daemon removes it")
    finally:
        daemon.close()


def test_files_go_into_a_created_container_with_rm_before_its_start(engine: Daemon, tmp_path: Path) -> None:
    """Its root is mounted for each, and such a root refuses a second mount until its mark is gone."""
    (tmp_path / "in").write_text("from outside\n")
    for number in range(3):  # the first finds no spare root, the others do
        name = f"filled{number}"
        engine.docker("create", "--rm", "--name", name, "base:1", "cat", "/in")
        engine.docker("cp", str(tmp_path / "in"), f"{name}:/in")
        engine.docker("cp", f"{name}:/in", str(tmp_path / f"out{number}"))
        assert (tmp_path / f"out{number}").read_text() == "from outside\n"
        assert engine.docker("start", "-a", name).stdout == "from outside\n"
    eventually(lambda: engine.docker("ps", "-aq", "--filter", "name=filled").stdout == "", "they are removed")


def test_a_container_that_wrote_nothing_has_an_empty_layer(engine: Daemon) -> None:
    """The image has no /proc, /sys, /dev and /etc/hosts: what is mounted there is not made in the container's own layer."""
    engine.docker("run", "--name", "clean", "base:1", "sh", "-c", "cat /etc/hosts /etc/hostname /proc/uptime > /dev/null")
    try:
        upper = engine.folder / "data" / "snapshots" / "active" / engine.inspect("clean")["Id"] / "upper"
        assert list(upper.iterdir()) == []
        assert engine.docker("start", "-a", "clean").stdout == ""  # its root is no volatile one: it starts again
    finally:
        engine.docker("rm", "clean")


def test_an_image_goes_though_roots_were_made_ahead_of_it(engine: Daemon, tmp_path: Path) -> None:
    layers = engine.folder / "data" / "snapshots" / "layers"
    before = set(os.listdir(layers))
    (tmp_path / "ahead.tar").write_bytes(base_tar())
    with tarfile.open(tmp_path / "ahead.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("ahead"))
    engine.docker("import", str(tmp_path / "ahead.tar"), "ahead:1")
    (own,) = set(os.listdir(layers)) - before
    engine.docker("run", "--rm", "ahead:1", "true")
    active = engine.folder / "data" / "snapshots" / "active"
    eventually(lambda: any(name.startswith("spare-") for name in os.listdir(active)), "one is made ahead")
    engine.docker("rmi", "ahead:1")
    assert set(os.listdir(layers)) == before, own
    eventually(lambda: not any(name.startswith("spare-") for name in os.listdir(active)), "none holds its layers")
    engine.docker("run", "--rm", "base:1", "true")


BROKEN_CONNECT = """
import sys
from dolium.daemon import entry
from dolium.isolation import shim, spares
connect, left = shim.Shim.connect.__func__, [2]
async def fails(cls, folder, on_event, *rest):
    if left[0]:
        left[0] -= 1
        raise OSError(24, "Too many open files")
    return await connect(cls, folder, on_event, *rest)
shim.Shim.connect = classmethod(fails)
spares.Spares.fill = lambda self: None
sys.exit(entry())
"""


def _children(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def test_a_start_without_fds_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    """Twice the daemon has no descriptor left to talk to a shim that it has made: to a container, and to one with --rm."""
    one = Daemon(tmp_path)
    with open(one.log, "wb") as log:
        one.process = subprocess.Popen(
            [sys.executable, "-c", BROKEN_CONNECT, "-H", f"unix://{one.socket}", "--data-root", str(tmp_path / "data"),
             "--run-root", str(tmp_path / "run")], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    eventually(one.listening, "it listens")
    try:
        one.import_base()
        one.docker("create", "--name", "again", "base:1", "echo", "started")
        refused = one.docker("start", "-a", "again", check=False, timeout=20)
        assert refused.returncode == 1 and "prepare a shim: Too many open files" in refused.stderr
        refused = one.dolium("run", "--rm", "base:1", "true", check=False, timeout=20)
        assert refused.returncode == 125 and "prepare a shim: Too many open files" in refused.stderr
        eventually(lambda: one.docker("ps", "-aq").stdout.split() == [one.inspect("again")["Id"][:12]], "--rm removes")
        assert one.shims() == set()
        (spawner,) = _children(one.process.pid)
        eventually(lambda: _children(spawner) == [], "no shim is left")
        assert one.docker("start", "-a", "again", timeout=20).stdout == "started\n"
        one.docker("rm", "again")
    finally:
        one.close()


def test_the_end_of_a_container_that_cannot_be_removed_is_kept(tmp_path: Path) -> None:
    """With --rm the shim alone knows how it ended, until it is removed; here that fails, and then the daemon is killed."""
    one = Daemon(tmp_path)
    one.start()
    trash = tmp_path / "data" / "trash"
    try:
        one.import_base()
        subprocess.run(["chattr", "+i", str(trash)], check=True)
        assert one.docker("run", "-d", "--rm", "--name", "stays", "base:1", "sh", "-c", "exit 7").returncode == 0
        eventually(lambda: "remove container" in one.log.read_text(), "the removal fails")
        one.kill()
        one.start()
        state = one.inspect("stays")["State"]
        assert (state["Status"], state["ExitCode"]) in (("removing", 7), ("exited", 7)), state
    finally:
        subprocess.run(["chattr", "-i", str(trash)], check=True)
    try:
        one.stop()
        one.start()
        eventually(lambda: one.docker("ps", "-aq").stdout == "", "the next daemon removes it")
    finally:
        one.close()


def test_what_is_written_to_etc_hosts_is_not_the_hosts_memory(engine: Daemon) -> None:
    """A container may write to its /etc/hosts as much as it likes, as to its layer: it lies on the same disk."""
    engine.docker("run", "-d", "--name", "writes", "base:1", "sleep", "600")
    try:
        engine.docker("exec", "writes", "sh", "-c", "dd if=/dev/zero bs=1M count=2 >> /etc/hosts")
        found = engine.inspect("writes")
        for key in ("HostsPath", "HostnamePath", "ResolvConfPath"):
            assert Path(found[key]).parent == engine.folder / "data" / "containers" / found["Id"]
        assert Path(found["HostsPath"]).stat().st_size > 2 << 20
        engine.docker("restart", "-t", "0", "writes")
        assert engine.docker("exec", "writes", "cat", "/etc/hosts").stdout == Path(found["HostsPath"]).read_text()
        assert Path(found["HostsPath"]).stat().st_size < 1000
    finally:
        engine.docker("rm", "-f", "writes")


def test_cp_follows_links_inside_the_root(engine: Daemon, tmp_path: Path) -> None:
    links = "echo inside > /data/file; ln -s /two /one; ln -s data/three /two; ln -s ../data/./file /data/three; ln -s /loop /loop"
    engine.docker("run", "--name", "linked", "base:1", "sh", "-c", links)
    try:
        engine.docker("cp", "-L", "linked:/one", str(tmp_path / "out"))
        assert (tmp_path / "out").read_text() == "inside\n"
        (tmp_path / "in").write_text("from outside\n")
        engine.docker("cp", str(tmp_path / "in"), "linked:/two")
        engine.docker("cp", "linked:/data/file", str(tmp_path / "back"))
        assert (tmp_path / "back").read_text() == "from outside\n"
        engine.docker("cp", "linked:/one", str(tmp_path / "link"))
        assert os.readlink(tmp_path / "link") == "/two"
        assert engine.api("HEAD", "/containers/linked/archive?path=/loop")[0] == 400
    finally:
        engine.docker("rm", "linked")


def test_a_container_does_not_start_while_files_are_copied_out_of_it(engine: Daemon) -> None:
    """Two mounts of one upper folder at once would corrupt it."""
    engine.docker("run", "--name", "big", "base:1", "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=8")
    try:
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(engine.socket)
            reader.sendall(b"GET /containers/big/archive?path=/big HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
            assert reader.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
            with subprocess.Popen([DOLIUM, "start", "-a", "big"], env=engine.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as start:
                # a second copy is under way for as long as the first: the request behind both is answered, the start is not
                engine.docker("ps")
                assert start.poll() is None and engine.inspect("big")["State"]["Status"] == "exited"
                while reader.recv(1 << 20):
                    continue
                assert start.wait(30) == 0
    finally:
        engine.docker("rm", "big")


def test_a_shared_dev_shm(engine: Daemon) -> None:
    mounts = Path("/proc/self/mountinfo")
    before = mounts.read_text().count(f"{engine.folder}/run/shm")
    engine.docker("run", "-d", "--name", "donor", "--ipc", "shareable", "--shm-size", "8m", "base:1", "sleep", "600")
    engine.docker("run", "-d", "--name", "private", "base:1", "sleep", "600")
    try:
        engine.docker("exec", "donor", "sh", "-c", "echo word > /dev/shm/file")
        join = ("run", "--rm", "--ipc", "container:donor", "base:1", "sh", "-c")
        assert engine.docker(*join, "cat /dev/shm/file; df -k /dev/shm | tail -1 | tr -s ' ' | cut -d ' ' -f 2; echo more > /dev/shm/other").stdout == "word\n8192\n"
        assert engine.docker("exec", "donor", "cat", "/dev/shm/other").stdout == "more\n"
        refused = engine.docker("run", "--rm", "--ipc", "container:private", "base:1", "true", check=False)
        assert refused.returncode == 125 and "non-shareable IPC (hint: use IpcMode:shareable for the donor container)" in refused.stderr
        assert engine.docker("run", "--rm", "--ipc", "none", "base:1", "sh", "-c", "grep -c /dev/shm /proc/mounts", check=False).stdout == "0\n"
        engine.docker("restart", "-t", "0", "donor")
        assert engine.docker("exec", "donor", "ls", "/dev/shm").stdout == ""
        engine.dolium("run", "-d", "--name", "mapped", "--userns", "auto", "--ipc", "shareable", "base:1", "sleep", "600")
        engine.docker("exec", "mapped", "sh", "-c", "echo x > /dev/shm/own")
    finally:
        engine.docker("rm", "-f", "donor", "private", "mapped", check=False)
    assert mounts.read_text().count(f"{engine.folder}/run/shm") == before


def test_an_answer_that_breaks_off_says_so_in_the_log_and_writes_no_second_one(engine: Daemon) -> None:
    """That no more files can be opened is found when the archive is half sent."""
    deep = "mkdir /deep; cd /deep; i=0; while [ $i -lt 1200 ]; do mkdir d; cd d; i=$((i+1)); done"
    engine.docker("run", "--name", "deep", "base:1", "sh", "-c", deep)
    assert engine.process is not None
    limit = resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE)
    try:
        resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE, (600, limit[1]))  # a level takes two
        status, answer = engine.api("GET", "/containers/deep/archive?path=/deep")
        assert status == 200 and answer.count(b"HTTP/1.1") == 0 and not answer.endswith(b"0\r\n\r\n")
        eventually(lambda: "the answer had begun and breaks off" in engine.log.read_text(), "the log has it")
        assert engine.docker("ps", "-as", "--filter", "name=deep", "--format", "{{.Names}}").stdout == "deep\n"
    finally:
        resource.prlimit(engine.process.pid, resource.RLIMIT_NOFILE, limit)
        engine.docker("rm", "deep")


def test_folders_deeper_than_a_path_may_be(engine: Daemon) -> None:
    """1,900 levels; what a container can make, one can look at, take out, keep and remove."""
    engine.docker("run", "--name", "deep", "base:1", "sh", "-c",
                  "n=0; while [ $n -lt 1900 ]; do mkdir d && cd d || exit 3; n=$((n+1)); done; echo end > file")
    try:
        changed = engine.docker("diff", "deep").stdout.splitlines()
        assert len(changed) == 1901 and changed[-1].endswith("d/file")
        members = subprocess.run(f"{DOCKER} export deep | tar -tf - | grep -c 'd/d'", shell=True, env=engine.env, check=True,
                                 capture_output=True, text=True).stdout
        assert int(members) == 1900
        copied = subprocess.run(f"{DOCKER} cp deep:/d - | tar -tf - | wc -l", shell=True, env=engine.env, check=True,
                                capture_output=True, text=True).stdout
        assert int(copied) == 1901
        engine.docker("commit", "deep", "deep:1")
        down = "n=0; while cd d 2>/dev/null; do n=$((n+1)); done; echo $n; cat file"
        assert engine.docker("run", "--rm", "deep:1", "sh", "-c", down).stdout == "1900\nend\n"
        assert engine.docker("run", "--rm", "-v", "deep:/d", "deep:1", "sh", "-c", "cd /d; " + down).stdout == "1899\nend\n"
    finally:
        engine.docker("rm", "-f", "deep")
        engine.docker("rmi", "-f", "deep:1", check=False)
        engine.docker("volume", "rm", "-f", "deep")


@pytest.mark.parametrize(("part", "field"), [
    ({"Cmd": ["a\0b"]}, "Config.Cmd[0]"), ({"WorkingDir": "/a\0b"}, "Config.WorkingDir"), ({"Volumes": {"/v\0w": {}}}, "a key of Config.Volumes"),
    ({"Env": ["A=\ud800"]}, "Config.Env"), ({"HostConfig": {"Binds": ["/tmp\0x:/y"]}}, "HostConfig.Binds[0]"),
    ({"HostConfig": {"Tmpfs": {"/a\0": ""}}}, "a key of HostConfig.Tmpfs")])
def test_what_no_system_call_takes_is_refused_before_anything_is_made(engine: Daemon, part: dict[str, object], field: str) -> None:
    before = engine.docker("ps", "-aq").stdout
    status, body = engine.api("POST", "/containers/create", {"Image": "base:1", **part})
    message = json.loads(body)["message"]
    assert (status, message.startswith(field)) == (400, True), message
    assert engine.docker("ps", "-aq").stdout == before


def test_an_image_that_means_harm_by_a_nul(engine: Daemon, tmp_path: Path) -> None:
    """What is no text for the kernel in an image's configuration is the same error."""
    engine.docker("save", "-o", str(tmp_path / "saved.tar"), "base:1")
    with tarfile.open(tmp_path / "saved.tar") as saved:
        files = {one.name: (saved.extractfile(one) or io.BytesIO()).read() for one in saved if one.isfile()}
    manifest = json.loads(files["manifest.json"])
    document = json.loads(files.pop(manifest[0]["Config"]))
    document["config"]["WorkingDir"] = "/a\0b"
    data = json.dumps(document).encode()
    manifest[0].update(Config=f"blobs/sha256/{hashlib.sha256(data).hexdigest()}", RepoTags=["harm:1"])
    with tarfile.open(tmp_path / "harm.tar", "w") as harm:
        for name in (manifest[0]["Config"], *manifest[0]["Layers"], "manifest.json"):
            content = {manifest[0]["Config"]: data, "manifest.json": json.dumps(manifest).encode()}.get(name) or files[name]
            info = tarfile.TarInfo(name)
            info.size = len(content)
            harm.addfile(info, io.BytesIO(content))
    engine.docker("load", "-i", str(tmp_path / "harm.tar"))
    try:
        done = engine.dolium("run", "--rm", "harm:1", "pwd", check=False)
        assert (done.returncode, done.stderr) == (125, "dolium: Config.WorkingDir: must not contain a NUL byte\n")
    finally:
        engine.docker("rmi", "-f", "harm:1")


def test_a_failure_nobody_thought_of_is_no_success(engine: Daemon) -> None:
    """The native requests answer before they start anything: what goes wrong then, whatever it is, is told by a frame."""
    engine.docker("run", "-d", "--name", "box", "base:1", "sleep", "60")
    try:
        wish = {"container": "box", "exec": {"Cmd": ["true"], "AttachStdout": True, "Tty": True}, "size": ["x", "y"]}
        status, stream = engine.api("POST", "/dolium/exec", wish)
        assert status == 200
        assert b'"message": "OCI runtime exec failed' in stream and b'"code": 0' not in stream
    finally:
        engine.docker("rm", "-f", "box")


def test_the_daemon_takes_all_open_files_and_containers_have_what_it_was_given(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    daemon = Daemon(tmp_path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (777, hard))
    try:
        daemon.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert daemon.process is not None and resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
        (tmp_path / "root.tar").write_bytes(base_tar())
        daemon.docker("import", str(tmp_path / "root.tar"), "base:1")
        limits = "ulimit -Sn; ulimit -Hn"
        assert daemon.docker("run", "--name", "limits", "-d", "base:1", "sh", "-c", limits + "; sleep 1000").returncode == 0
        eventually(lambda: daemon.docker("logs", "limits").stdout.split() == ["777", str(hard)], "what it was given is said")
        assert daemon.docker("exec", "limits", "sh", "-c", limits).stdout.split() == ["777", str(hard)]
        daemon.docker("rm", "-f", "limits")
        for _ in range(6):  # more than there are spare shims
            assert daemon.dolium("run", "--rm", "base:1", "sh", "-c", limits).stdout.split() == ["777", str(hard)]
    finally:
        daemon.stop()
