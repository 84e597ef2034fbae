"""checkpoint and restore, by a CRIU that works (`make test-vm`: Debian's kernel) and by one that does not."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pty
import select
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from bundles import DEADLINE, FRONT, Bundle, Runtime, alive, bundle, needs, runtime, until
from test_runtime_terminal import Screen, receive

__all__ = ["bundle", "runtime"]
CRIU = shutil.which("criu")
WORKS = CRIU is not None and subprocess.run([CRIU, "check"], capture_output=True, check=False, timeout=60).returncode == 0
pytestmark = [*needs, pytest.mark.skipif(CRIU is None, reason="needs the package criu")]
works = pytest.mark.skipif(not WORKS, reason="needs a kernel on which `criu check` passes (the VM of make test-vm has one)")
COUNTS = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done"


_LIBC = ctypes.CDLL(None, use_errno=True)


def marked_session() -> None:
    """A session keyring with a key that only those see whose session it is."""
    _LIBC.syscall(250, 1, None)  # keyctl JOIN_SESSION_KEYRING
    key = _LIBC.syscall(248, b"user", b"callers-mark", b"x", ctypes.c_size_t(1), -3)
    _LIBC.syscall(250, 5, key, 0x3F000000)  # keyctl SETPERM: its possessor's alone


def count(bundle: Bundle) -> int:
    file = bundle.rootfs / "tmp/count"
    return int(file.read_text() or 0) if file.exists() else 0


@pytest.fixture
def counter(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle that counts, with a volume, a limit and a masked path."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/file").write_text("first")
    bundle.mount("/data", "bind", str(tmp_path / "volume"), "rbind", "rw")
    bundle.linux["resources"]["pids"] = {"limit": 40}
    bundle.config["hostname"] = "counter"
    return bundle.sh(COUNTS)


@works
def test_a_counter_goes_on_counting(runtime: Runtime, counter: Bundle, tmp_path: Path) -> None:
    images = tmp_path / "images"
    runtime.started(counter)
    until(lambda: count(counter) > 3, "it counts")
    pid = runtime.state()["pid"]
    runtime("checkpoint", "--image-path", str(images), "c")
    assert runtime.left() == [] and counter.groups() == [] and not alive(pid)
    reached = count(counter)
    assert reached > 3
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "pstree.img").write_bytes(b"no image")
    result = runtime("restore", "-d", "-b", str(counter.path), "--image-path", str(damaged), "c", code=1)
    assert "CRIU said: " in result.err and f"{damaged}/restore.log" in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and counter.groups() == []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "pidfd"))
        listener.listen()
        runtime("restore", "-d", "-b", str(counter.path), "--image-path", str(images), "--pid-file", str(tmp_path / "pid"),
                "--pidfd-socket", str(tmp_path / "pidfd"), "c")
        connection, _ = listener.accept()
        with connection:
            data, fds, _, _ = socket.recv_fds(connection, 64, 1)
    until(lambda: count(counter) > reached + 3, "it goes on")
    state = runtime.state()
    pid = state["pid"]
    assert data == b"standard" and f"Pid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{fds[0]}").read_text()
    os.close(fds[0])
    assert state["status"] == "running" and int((tmp_path / "pid").read_text()) == pid
    # as it was made the first time: namespaces, groups, limits, volume, masks, identity
    for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
    group = Path(counter.group("pids"))
    assert (group / "pids.max").read_text() == "40\n" and str(pid) in (group / "cgroup.procs").read_text().split()
    script = "cat /data/file; echo second > /data/file; hostname; cat /proc/kcore | wc -c; cat /proc/self/cgroup; cat /proc/1/comm"
    assert runtime("exec", "c", "sh", "-c", script).out.split() == ["firstcounter", "0", "0::/", "sh"]
    assert (tmp_path / "volume/file").read_text() == "second\n"
    assert [row["status"] for row in json.loads(runtime("list", "-f", "json").out)] == ["running"]
    runtime("pause", "c")
    still = count(counter)
    assert runtime.state()["status"] == "paused"
    runtime("resume", "c")
    until(lambda: count(counter) > still, "and on")
    runtime("kill", "c", "KILL")
    until(lambda: not alive(pid), "it ends")
    runtime("delete", "c")
    assert runtime.left() == [] and counter.groups() == []


@works
def test_leave_running_pre_dump_and_a_second_life_beside_the_first(runtime: Runtime, counter: Bundle, tmp_path: Path) -> None:
    """The images of a container that stays: another one, with another bundle, id and group, begins where they were made."""
    runtime.started(counter)
    until(lambda: count(counter) > 3, "it counts")
    runtime("checkpoint", "--image-path", str(tmp_path / "images/first"), "--pre-dump", "c")
    assert runtime.state()["status"] == "running"
    runtime("checkpoint", "--image-path", str(tmp_path / "images/second"), "--parent-path", "../first", "--leave-running",
            "--work-path", str(tmp_path / "work"), "--file-locks", "--tcp-established", "--ext-unix-sk", "c")
    assert (tmp_path / "work/dump.log").exists() and runtime.state()["status"] == "running"
    reached = count(counter)
    until(lambda: count(counter) > reached, "the first goes on")
    second = Bundle(tmp_path / "second", "true")
    config = counter.copy_config()
    config["linux"]["cgroupsPath"], config["linux"]["resources"]["pids"] = second.linux["cgroupsPath"], {"limit": 30}
    second.config = config
    runtime.ids.append("other")
    runtime("restore", "-d", "-b", str(second.write()), "--image-path", str(tmp_path / "images/second"), "--file-locks",
            "--tcp-established", "--ext-unix-sk", "other")
    until(lambda: count(second) > 3, "the second counts in its own root")
    assert Path(second.group("pids"), "pids.max").read_text() == "30\n"
    assert str(runtime.state("other")["pid"]) in Path(second.group("pids"), "cgroup.procs").read_text().split()
    assert Path(counter.group("pids"), "pids.max").read_text() == "40\n"
    runtime("delete", "--force", "other")
    assert runtime.left() == ["c"] and second.groups() == [] and runtime.state()["status"] == "running"


@works
def test_restored_in_the_foreground_with_the_callers_streams(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """Its streams, its signals from the first moment, its exit code; and the hooks that have their turn again."""
    images, told = str(tmp_path / "images"), tmp_path / "told"
    bundle.linux["maskedPaths"] = []  # /proc/keys
    bundle.sh("trap 'echo one' USR1; trap 'grep -c callers-mark /proc/keys' HUP; trap 'exit 7' TERM; touch /tmp/ready;"
              "while [ ! -e /tmp/go ]; do sleep 0.1; done; read word; echo said $word; while :; do sleep 0.1; done")
    bundle.write()
    first = runtime.popen("run", "--bundle", str(bundle.path), "c", stdin=subprocess.PIPE)
    until(lambda: (bundle.rootfs / "tmp/ready").exists(), "it runs")
    runtime("checkpoint", "--image-path", images, "c")
    first.communicate(timeout=60)
    flags = ("-b", str(bundle.path), "--image-path", images)

    bundle.hook("prestart", "/bin/sh", "-c", "echo no room >&2; exit 3").write()
    failed = runtime("restore", *flags, "c", code=1)
    assert failed.err.endswith("restore of c: prestart hook /bin/sh: exit status 3: no room\n") and failed.err.count("\n") == 1
    assert runtime.left() == [] and bundle.groups() == []

    del bundle.config["hooks"]
    bundle.hook("prestart", "/bin/sh", "-c", f"cat > {told}.state; readlink /proc/self/ns/mnt > {told}.mnt", env=[])
    bundle.hook("createRuntime", "/bin/sh", "-c", f"env > {told}.env; echo > {told}; while [ -e {told} ]; do sleep 0.01; done",
                env=["WORD=a b"])
    for kind in ("createContainer", "startContainer"):  # not theirs, as with runc
        bundle.hook(kind, "/bin/sh", "-c", "exit 9")
    bundle.write()
    second = runtime.popen("restore", *flags, "c", stdin=subprocess.PIPE, preexec_fn=marked_session)
    assert second.stdin is not None and second.stdout is not None
    until(told.exists, "the hooks run")
    second.send_signal(signal.SIGUSR1)  # there is no container yet
    state = json.loads((told.with_suffix(".state")).read_text())
    assert (state["status"], state["id"], state["bundle"]) == ("creating", "c", str(bundle.path))
    assert os.readlink(f"/proc/{state['pid']}/ns/net") != os.readlink("/proc/self/ns/net")
    assert told.with_suffix(".mnt").read_text().strip() == os.readlink("/proc/self/ns/mnt")
    assert "WORD=a b" in told.with_suffix(".env").read_text() and "HOME=" not in told.with_suffix(".env").read_text()
    told.unlink()
    assert second.stdout.readline() == "one\n"
    assert runtime.state()["pid"] == state["pid"]
    (bundle.rootfs / "tmp/go").touch()
    second.stdin.write("hello\n")
    second.stdin.flush()
    assert second.stdout.readline() == "said hello\n"
    second.send_signal(signal.SIGHUP)
    assert second.stdout.readline() == "0\n", "its session is its own"
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 7 and runtime.left() == [] and bundle.groups() == []


@pytest.mark.skipif(WORKS, reason="needs a kernel on which CRIU does not work: the host's 6.18")
def test_where_criu_does_not_work_it_is_told_what_it_said(runtime: Runtime, counter: Bundle, tmp_path: Path) -> None:
    runtime.started(counter)
    result = runtime("checkpoint", "--image-path", str(tmp_path / "images"), "c", code=1)
    assert "checkpoint of c: CRIU " in result.err and "dump.log" in result.err and result.err.count("\n") == 1
    assert runtime.state()["status"] == "running" and sorted(os.listdir(runtime.root / "c")) == ["config.json", "state.json"]
    before = count(counter)
    until(lambda: count(counter) > before, "it goes on")


def test_what_is_refused_before_criu_runs(runtime: Runtime, counter: Bundle, tmp_path: Path) -> None:
    images = str(tmp_path / "images")
    runtime.create(counter)
    assert "cannot be checkpointed in created state" in runtime("checkpoint", "--image-path", images, "c", code=1).err
    runtime("start", "c")
    for words, why in ((["--manage-cgroups-mode", "x"], "'x' is not one of"),
                       (["--parent-path", "/abs"], "must be relative"), (["--parent-path", "../no"], "does not exist"),
                       (["--empty-ns", "ipc"], "--empty-ns"), (["--page-server", "x"], "--page-server"),
                       (["--status-fd", "x"], "--status-fd")):
        result = runtime("checkpoint", "--image-path", images, *words, "c", code=1)
        assert why in result.err and result.err.count("\n") == 1
    assert "there is no dolium.json" in runtime("restore", "-b", str(counter.path), "--image-path", images, "d", code=1).err
    assert runtime.state()["status"] == "running" and runtime.left() == ["c"]


def test_a_criu_that_is_not_there(runtime: Runtime, counter: Bundle, tmp_path: Path) -> None:
    runtime.started(counter)
    for words, env in ((["--criu", "/no/such/criu"], os.environ), ([], {**os.environ, "PATH": "/nowhere"})):
        result = runtime(*words, "checkpoint", "--image-path", str(tmp_path / "images"), "c", code=1, env=env)
        assert "is not installed (Debian's package criu)" in result.err and result.err.count("\n") == 1
    assert runtime.state()["status"] == "running"


@works
def test_memory_comes_when_it_is_needed(runtime: Runtime, counter: Bundle, tmp_path: Path) -> None:
    """The dump serves its memory until the restored container has all of it."""
    images = tmp_path / "images"
    runtime.started(counter)
    until(lambda: count(counter) > 3, "it counts")
    before = runtime.state()["pid"]
    ready, said = os.pipe()
    dumping = runtime.popen("checkpoint", "--image-path", str(images), "--lazy-pages", "--page-server", "127.0.0.1:2791",
                            "--status-fd", str(said), "c", pass_fds=(said,))
    os.close(said)
    with os.fdopen(ready, "rb") as status:
        assert status.read(1) == b"\0", (images / "dump.log").read_text()[-2000:]  # it serves its memory
    assert CRIU is not None
    pages = subprocess.Popen([CRIU, "lazy-pages", "--images-dir", str(images), "--page-server", "--address", "127.0.0.1", "--port",
                              "2791"], cwd=images, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (images / "lazy-pages.socket").exists(), "somebody fetches it")
        counter.linux["cgroupsPath"] += "-other"  # as on another machine
        counter.write()
        runtime("restore", "-d", "-b", str(counter.path), "--image-path", str(images), "--lazy-pages", "other")
        runtime.ids.append("other")
        assert dumping.wait(60) == 0, dumping.stderr and dumping.stderr.read()
        assert not alive(before)
        reached = count(counter)
        until(lambda: count(counter) > reached + 3, "it goes on")
    finally:
        pages.terminate()
        pages.wait(30)
    runtime("delete", "--force", "other")


@works
def test_a_terminal_by_console_socket_and_in_the_foreground(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    images, console = tmp_path / "images", str(tmp_path / "console")
    bundle.process.update(terminal=True, args=["sh"], consoleSize={"height": 33, "width": 77})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(console)
        listener.listen()
        runtime.create(bundle, "--console-socket", console)
        screen = receive(listener)
        runtime("start", "c")
        screen.type(b"x=41; echo rea''dy\n")
        screen.until(b"ready\r\n")
        runtime("checkpoint", "--image-path", str(images), "c")
        flags = ("-b", str(bundle.path), "--image-path", str(images))
        assert "console socket" in runtime("restore", "-d", *flags, "c", code=1).err  # nobody would have the terminal
        runtime("restore", "-d", *flags, "--console-socket", console, "c")
        screen = receive(listener)
        screen.type(b"echo $((x+1)); stty size; tty; echo con > /dev/console; echo en''d\n")
        shown = screen.until(b"end\r\n")
        assert b"42\r\n" in shown and b"33 77\r\n" in shown and b"/dev/pts/0\r\n" in shown and b"\r\ncon\r\n" in shown
    runtime("checkpoint", "--image-path", str(images), "c")
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(FRONT, [FRONT, "--root", str(runtime.root), "restore", *flags, "c"])
    screen = Screen(fd)
    until(lambda: runtime("state", "c", code=None).code == 0, "it is restored", 2 * DEADLINE)
    screen.type(b"echo $((x+2)); exit 7\n")
    assert b"43\r\n" in screen.rest()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 and runtime.left() == []


class Ends:
    """Our ends of a container's descriptors from 3 on: it writes to the first, a pipe, to a file and to a socket."""

    def __init__(self, log: Path) -> None:
        self.says, out = os.pipe()
        into, self.tells = os.pipe()
        self.socket, other = socket.socketpair()
        self.log = log
        theirs = [out, into, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), other.detach()]
        self.theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in theirs]  # not among those that are to take their places
        for fd in theirs:
            os.close(fd)

    def call(self, runtime: Runtime, *words: str, count: int = 4, code: int = 0, before: str = "") -> str:
        """The runtime, with their ends. Standard error."""
        moved = " ".join(f"{number}<&{fd}" for number, fd in enumerate(self.theirs[:count], 3))
        with open(os.devnull, "r+") as null, open(runtime.base / "said", "w+") as said:
            done = subprocess.run(["bash", "-c", f'{before} exec "$@" {moved}', "bash", FRONT, "--root", str(runtime.root), *words],
                                  pass_fds=self.theirs, stdin=null, stdout=null, stderr=said, preexec_fn=marked_session, timeout=120)
            said.seek(0)
            assert done.returncode == code, said.read()
            return said.read()

    def ask(self, word: str) -> str:
        """What it says to a word by the pipe; the others must have said it as well."""
        os.write(self.tells, f"{word}\n".encode())
        told = b""
        while not told.endswith(b".\n"):
            assert select.select([self.says], [], [], DEADLINE)[0], f"it is silent after {told!r}"
            told += os.read(self.says, 1)
        assert self.log.read_text().endswith(f"file {word}\n") and self.socket.recv(64).decode() == f"socket {word}\n"
        return told.decode()

    def close(self) -> None:
        self.socket.close()
        for fd in (self.says, self.tells, *self.theirs):
            os.close(fd)


@works
def test_descriptors_from_outside_the_session_and_a_root_to_pivot_from(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    """--preserve-fds, --no-new-keyring and --no-pivot of a restore, in one: each takes seconds."""
    images = str(tmp_path / "images")
    with contextlib.closing(Ends(tmp_path / "first")) as first, contextlib.closing(Ends(tmp_path / "second")) as second:
        _move_about(runtime, bundle, images, first, second, tmp_path / "root")


def _move_about(runtime: Runtime, bundle: Bundle, images: str, first: Ends, second: Ends, root: Path) -> None:
    bundle.linux["maskedPaths"] = []
    bundle.namespace("network", absent=True)  # CRIU knows no sockets of another one
    bundle.sh("while read -r word <&4; do echo file $word >&5; echo socket $word >&6; grep -c callers-mark /proc/keys >&3;"
              "echo pipe $word. >&3; done")
    runtime.ids.append("c")
    first.call(runtime, "run", "-d", "-b", str(bundle.write()), "--preserve-fds", "4", "c")
    assert first.ask("one") == "0\npipe one.\n"
    runtime("checkpoint", "--image-path", images, "c")
    words = ("restore", "-d", "-b", str(bundle.path), "--image-path", images)
    assert "6 of the checkpointed container was its caller's (socket:[" in second.call(runtime, *words, "--preserve-fds", "3", "c", code=1)
    assert "passed no file descriptor 5" in second.call(runtime, *words, "--preserve-fds", "4", "c", count=2, code=1)
    # a caller whose root is no mount point, so that nobody can pivot from it
    root.mkdir()
    tops = " ".join(name for name in sorted(os.listdir("/")) if os.path.isdir(f"/{name}") and name not in ("lost+found", "tmp"))
    script = (f"cd {root}; for top in tmp {tops}; do if [ -L /$top ]; then cp -dn /$top .; else mkdir -p $top;"
              f" mount --rbind /$top $top; fi; done; cd /;")
    inside = ("unshare", "-m", "--propagation", "slave", "bash", "-c", f'{script} exec chroot {root} "$@"', "bash")
    before = f'set -- {shlex.join(inside)} "$@";'
    refused = second.call(runtime, *words, "--preserve-fds", "4", "c", code=1, before=before)
    assert "CRIU said: " in refused and '"/"' in refused
    second.call(runtime, *words, "--preserve-fds", "4", "--no-pivot", "--no-new-keyring", "c", before=before)
    assert second.ask("two") == "1\npipe two.\n" and second.ask("three") == "1\npipe three.\n"
    assert first.log.read_text() == "file one\n" and second.log.read_text() == "file two\nfile three\n"
    runtime("checkpoint", "--image-path", f"{images}/second", "c")  # what it got now is known as well
    had = json.loads(Path(f"{images}/second/dolium.json").read_text())["preserved"]
    assert [had[number][0].partition("[")[0] for number in "3456"] == ["pipe:", "pipe:", "file", "socket:"]
