"""dolium-runtime served by the warm compiler: no Python starts, and nothing in the caller's context is other than cold."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundles import Bundle, Runtime, alive, bundle, needs, runtime, until

import dolium

__all__ = ["bundle", "runtime"]
pytestmark = needs

PACKAGE = Path(dolium.__file__).parent


class Installation:
    """dolium installed once more, with a Python that counts its starts."""

    def __init__(self, base: Path) -> None:
        self.package = base / "site/dolium"
        self.warm = base / "warm"
        self.starts = base / "python-starts"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.front = self.package / "_native/dolium-front"
        python = self.package / "_native/python3"
        python.write_text(f'#!/bin/sh\necho "$5" >> {self.starts}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.env = {**{name: value for name, value in os.environ.items() if name != "_"}, "DOLIUM_WARM": str(self.warm)}

    def run(self, runtime: Runtime, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
        """The front with the runtime's state folder."""
        options: dict[str, object] = {"env": self.env, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True,
                                      "timeout": 60, "check": False, **more}
        return subprocess.run([str(self.front), "--root", str(runtime.root), *words], **options)  # type: ignore[call-overload,no-any-return]

    def colds(self) -> int:
        """How often Python was started as a cold compiler."""
        return self.starts.read_text().count("runtime.cold") if self.starts.exists() else 0

    def place(self) -> Path:
        """The warm compiler's socket, when it listens."""
        def listening() -> list[Path]:
            return [path for path in (self.warm.iterdir() if self.warm.exists() else []) if "." not in path.name]

        found: list[Path] = until(listening, "a warm compiler listens")
        return found[0]

    def workers(self) -> list[int]:
        """Pids of this installation's warm compilers."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if str(self.warm).encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
        return found

    def heat(self, runtime: Runtime) -> int:
        """Until a warm compiler listens; its pid."""
        assert self.run(runtime, "list").returncode == 0
        self.place()
        pids: list[int] = until(lambda: self.workers() if len(self.workers()) == 1 else [], "one warm compiler")
        return pids[0]

    def close(self) -> None:
        """End the warm compilers."""
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.workers(), "the warm compilers end")


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    one = Installation(tmp_path)
    yield one
    one.close()


def test_no_python_starts(installation: Installation, runtime: Runtime, bundle: Bundle) -> None:
    installation.heat(runtime)
    before = installation.colds()
    bundle.sh("echo hello").write()
    done = installation.run(runtime, "run", "--bundle", str(bundle.path), "c")
    assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)
    runtime.ids.append("d")
    bundle.sh("sleep 100").write()
    with open(os.devnull, "r+") as null:
        assert installation.run(runtime, "create", "--bundle", str(bundle.path), "d", capture_output=False, stdout=null,
                                stderr=null).returncode == 0
    assert '"created"' in installation.run(runtime, "state", "d").stdout
    for words in (("start", "d"), ("pause", "d"), ("resume", "d"), ("kill", "d", "KILL")):
        done = installation.run(runtime, *words)
        assert done.returncode == 0, (words, done.stderr)
    until(lambda: '"stopped"' in installation.run(runtime, "state", "d").stdout, "it is stopped")
    assert installation.run(runtime, "delete", "d").returncode == 0
    done = installation.run(runtime, "delete", "d")
    assert (done.returncode, done.stderr) == (1, "dolium-runtime: container d does not exist\n")
    assert installation.colds() == before


SHOW = """
exec 2>&1
grep -E 'Sig[PBIC]|ShdPnd|Umask|Seccomp|NoNew|Cap|Cpus_allowed_list|Uid|Gid|Groups' /proc/self/status
cut -d' ' -f 5-8,18,19,41 /proc/self/stat | cut -d' ' -f 4-
cat /proc/self/limits /proc/self/cgroup /proc/self/oom_score_adj
sed -n 's/.*keyring  *\\([^:]*\\).*/\\1/p' /proc/keys | grep -v '_ses\\.' | sort -u
ls /proc/self/fd; umask; pwd; env
"""
# What the front is, as a hook that is its child sees it.
HOOK = """
P=$PPID
exec > $0 2>&1
grep -E '^(Sig[PBIC]|Umask|Cap|Cpus_allowed_list|Uid|Gid|Groups|NoNew|Seccomp)' /proc/$P/status
set -- $(cut -d')' -f2 /proc/$P/stat)
echo "parent $2 group $(($3 - P)) session $(($4 - P)) terminal $5 priority ${16} nice ${17}"
cat /proc/$P/limits /proc/$P/cgroup /proc/$P/oom_score_adj
sed -n 's/.*keyring  *\\([^:]*\\).*/\\1/p' /proc/keys | sort -u
for i in cwd root ns/cgroup ns/ipc ns/mnt ns/net ns/pid ns/time ns/user ns/uts; do readlink /proc/$P/$i; done
tr '\\0' '\\n' < /proc/$P/environ
"""


def _strange_caller() -> None:
    os.setsid()
    os.umask(0o027)
    os.nice(3)
    os.sched_setaffinity(0, {0})
    resource.setrlimit(resource.RLIMIT_NOFILE, (333, 444))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    ctypes.CDLL(None).syscall(250, 1, b"strange")  # keyctl(JOIN_SESSION_KEYRING)
    Path("/proc/self/oom_score_adj").write_text("77")


def test_the_context_is_the_same_warm_and_cold(installation: Installation, runtime: Runtime, bundle: Bundle,
                                               tmp_path: Path) -> None:
    seen = {}
    for kind in ("cold", "warm"):
        if kind == "warm":
            installation.heat(runtime)
        before = installation.colds()
        record = tmp_path / "front"
        bundle.config.pop("hooks", None)
        bundle.hook("createRuntime", "/bin/sh", "-c", HOOK, str(record))
        bundle.process.pop("rlimits", None)
        bundle.sh(SHOW).write()
        with open(os.devnull) as null:
            extra = fcntl.fcntl(null, fcntl.F_DUPFD, 150)
        env = {**installation.env, "DOLIUM_WARM": str(installation.warm) if kind == "warm" else "off"}
        done = installation.run(runtime, "run", "--bundle", str(bundle.path), "same", preexec_fn=_strange_caller, env=env,
                                pass_fds=[extra], cwd=str(tmp_path))
        os.close(extra)
        assert done.returncode == 0, done.stderr
        assert installation.colds() == before + (kind == "cold")
        lines = [line for line in record.read_text().splitlines() if "DOLIUM_WARM" not in line]
        assert f"parent {os.getpid()} group 0 session 0 terminal 0 priority 23 nice 3" in lines
        seen[kind] = (done.stdout, lines)
    assert len(seen["cold"][0]) > 1500 and len(seen["cold"][1]) > 40
    assert seen["warm"][0] == seen["cold"][0]
    assert seen["warm"][1] == seen["cold"][1]


def test_init_becomes_the_sub_reapers_child(installation: Installation, runtime: Runtime, bundle: Bundle) -> None:
    installation.heat(runtime)
    before = installation.colds()
    libc = ctypes.CDLL(None)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    try:
        runtime.ids.append("c")
        bundle.sh("exit 5").write()
        with open(os.devnull, "r+") as null:
            installation.run(runtime, "create", "--bundle", str(bundle.path), "c", capture_output=False, stdout=null, stderr=null)
        pid = runtime.state()["pid"]
        assert int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
        assert installation.run(runtime, "start", "c").returncode == 0
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        assert installation.colds() == before
    finally:
        libc.prctl(36, 0, 0, 0, 0)


def test_the_compiler_stands_apart(installation: Installation, runtime: Runtime) -> None:
    pid = installation.heat(runtime)
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[1]) != os.getpid() and int(stat[3]) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    fds = {os.readlink(f"/proc/{pid}/fd/{name}").split(":")[0] for name in os.listdir(f"/proc/{pid}/fd")}
    assert fds == {"/dev/null", "socket", "anon_inode"}
    assert all(line.endswith(":/") for line in Path(f"/proc/{pid}/cgroup").read_text().split())
    assert Path(f"/proc/{pid}/environ").read_bytes() == b"PWD=/\0"  # by the counting shell
    assert installation.place().stat().st_mode & 0o777 == 0o700 and installation.warm.stat().st_mode & 0o777 == 0o700


def test_a_stopped_compiler_is_waited_for_in_vain(installation: Installation, runtime: Runtime) -> None:
    pid = installation.heat(runtime)
    before = installation.colds()
    os.kill(pid, signal.SIGSTOP)
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before + 1
    os.kill(pid, signal.SIGCONT)
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before + 1


def _after(frames: int, last: bytes) -> Callable[[Path, int], None]:
    """A compiler at that place that asks for so many facts, then sends ``last`` and ends."""

    def serve(place: Path, calls: int) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
            listener.listen()
            listener.settimeout(60)
            for _ in range(calls):
                caller = listener.accept()[0]
                with caller, caller.makefile("rwb") as stream:
                    for number in range(frames + 1):
                        stream.read(int.from_bytes(stream.read(4), "little"))
                        body = b"N" + len(query := b"read:/proc/self/stat").to_bytes(4, "little") + query + b"\0"
                        data = len(body).to_bytes(4, "little") + body if number < frames else last
                        stream.write(data)
                        stream.flush()

    return serve


@pytest.mark.parametrize("serve", [_after(0, b""), _after(0, b"\x10\0\0"), _after(1, b""), _after(3, b"\0\0\0\0"),
                                   _after(0, b"\xff\xff\xff\xff"), _after(1, b"\x02\0\0\0N\x05")])
def test_a_compiler_that_dies_in_the_middle(installation: Installation, runtime: Runtime, bundle: Bundle,
                                            serve: Callable[[Path, int], None]) -> None:
    os.kill(installation.heat(runtime), signal.SIGKILL)
    place = installation.place()
    place.unlink()
    before = installation.colds()
    thread = threading.Thread(target=serve, args=(place, 1))
    thread.start()
    until(place.exists, "the bad compiler listens")
    bundle.sh("echo fine").write()
    done = installation.run(runtime, "run", "--bundle", str(bundle.path), "c")
    thread.join()
    assert (done.stdout, done.stderr, done.returncode) == ("fine\n", "", 0)
    assert installation.colds() == before + 1


def test_another_users_compiler_is_not_asked(installation: Installation, runtime: Runtime) -> None:
    os.kill(installation.heat(runtime), signal.SIGKILL)
    place = installation.place()
    place.unlink()
    before = installation.colds()
    installation.warm.chmod(0o700)
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(place))
            os.setresuid(1000, 1000, 1000)
            listener.listen()  # now the peer's uid is 1000
            os.write(told, b"1")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"1"
        assert installation.run(runtime, "list").returncode == 0
        assert installation.colds() == before + 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
def test_a_folder_others_may_enter_is_not_used(installation: Installation, runtime: Runtime, mode: int) -> None:
    installation.heat(runtime)
    before = installation.colds()
    installation.warm.chmod(mode)
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before + 1
    installation.warm.chmod(0o700)
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before + 1


@pytest.mark.parametrize("flag", ["--mount", "--net", "--uts", "--ipc", "--cgroup"])
def test_a_caller_in_another_namespace_goes_cold(installation: Installation, runtime: Runtime, flag: str) -> None:
    installation.heat(runtime)
    before = installation.colds()
    done = subprocess.run(["unshare", flag, str(installation.front), "--root", str(runtime.root), "list"], env=installation.env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert installation.colds() == before + 1
    until(lambda: len(installation.workers()) == 2, "that caller's own compiler")


def test_an_upgrade_ends_the_old_compiler(installation: Installation, runtime: Runtime) -> None:
    old = installation.heat(runtime)
    version = installation.package / "__init__.py"
    text = version.read_text()
    version.write_text(text.replace('__version__ = "', '__version__ = "9.'))
    before = installation.colds()
    assert "version 9." in installation.run(runtime, "--version").stdout  # cold already: the old one knows that it is old
    assert installation.colds() == before + 1
    until(lambda: not alive(old), "the old compiler ends")
    installation.heat(runtime)
    after = installation.colds()
    assert "version 9." in installation.run(runtime, "--version").stdout
    assert installation.colds() == after


def test_a_new_front_does_not_ask_the_old_compiler(installation: Installation, runtime: Runtime) -> None:
    installation.heat(runtime)
    fresh = installation.front.with_name("fresh")
    shutil.copyfile(installation.front, fresh)
    fresh.chmod(0o755)
    before = installation.colds()
    fresh.rename(installation.front)
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before + 1


def test_a_compiler_without_its_socket_ends(installation: Installation, runtime: Runtime) -> None:
    pid = installation.heat(runtime)
    installation.place().unlink()
    until(lambda: not alive(pid), "it ends")


def test_many_first_callers_leave_one_compiler(installation: Installation, runtime: Runtime) -> None:
    callers = [subprocess.Popen([str(installation.front), "--root", str(runtime.root), "list"], env=installation.env,
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(6)]
    for caller in callers:
        assert caller.communicate(timeout=60)[1] == b"" and caller.returncode == 0
    installation.place()
    until(lambda: len(installation.workers()) == 1, "one stays")
    before = installation.colds()
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before


def test_bytes_that_are_no_request_end_their_own_conversation_only(installation: Installation, runtime: Runtime) -> None:
    installation.heat(runtime)
    place = str(installation.place())
    for data in (b"\x05\0\0\0hello", b"\xff\xff\xff\xff", b"\x01", b"\x00\0\0\0"):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(place)
            caller.sendall(data)
            caller.shutdown(socket.SHUT_WR)
            caller.settimeout(30)
            assert caller.recv(100) == b""
    before = installation.colds()
    assert installation.run(runtime, "list").returncode == 0
    assert installation.colds() == before
