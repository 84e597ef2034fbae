"""Terminals: by console socket for engines, relayed by the front for a person at a terminal."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import FRONT, Bundle, Runtime, bundle, needs, runtime, until

DEADLINE = 15.0
__all__ = ["bundle", "runtime"]
pytestmark = needs


PIDS: list[int] = []


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """What a failed test left at a terminal ends here."""
    yield
    while PIDS:
        with contextlib.suppress(OSError):
            pid = PIDS.pop()
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class Screen:
    """What comes out of a pty's master, and typing into it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen = b""

    def read(self) -> bool:
        """Take in what is there; False at the end."""
        with contextlib.suppress(OSError):
            data = os.read(self.fd, 65536)
            self.seen += data
            return bool(data)
        return False

    def until(self, text: bytes) -> bytes:
        """All that came up to and with ``text``, which is taken away."""
        end = time.monotonic() + DEADLINE
        while text not in self.seen:
            ready = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready and self.read(), f"{text!r} did not come, only {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def rest(self) -> bytes:
        """All up to the end."""
        end = time.monotonic() + DEADLINE
        while select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0] and self.read():
            pass
        return self.seen

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)


@pytest.fixture
def console(tmp_path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console.sock"))
    listener.listen(1)
    listener.settimeout(DEADLINE)
    yield listener
    listener.close()


def receive(listener: socket.socket) -> Screen:
    connection, _ = listener.accept()
    with connection:
        fds = array.array("i")
        name, control, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
        ((level, kind, data),) = control
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and name
        fds.frombytes(data[:4])
    return Screen(fds[0])


def test_console_socket_gives_a_shell(runtime: Runtime, bundle: Bundle, console: socket.socket, tmp_path: Path) -> None:
    bundle.process.update(terminal=True, args=["sh"], consoleSize={"height": 33, "width": 77})
    runtime.create(bundle, "--console-socket", str(tmp_path / "console.sock"))
    screen = receive(console)
    runtime("start", "c")
    screen.type(b"stty size; tty; ls -l /dev/console | cut -c1; echo en''d\n")
    shown = screen.until(b"end\r\n")
    assert b"33 77" in shown and b"\r\nc\r\n" in shown
    screen.type(b"echo $((6*7)) > /dev/tty; exec 9< /dev/console && echo console; exit 3\n")
    assert b"42\r\n" in screen.rest() and b"console\r\n" in screen.seen
    os.close(screen.fd)
    runtime.wait_status("stopped")
    runtime("delete", "c")


def test_exec_with_a_console_socket(runtime: Runtime, bundle: Bundle, console: socket.socket, tmp_path: Path) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    runtime("exec", "--tty", "--detach", "--console-socket", str(tmp_path / "console.sock"), "c", "sh", "-c",
            "tty; read x; echo got $x; sleep 0")
    screen = receive(console)
    screen.until(b"/dev/pts/0\r\n")
    screen.type(b"word\n")
    screen.until(b"got word\r\n")
    screen.rest()
    os.close(screen.fd)


def test_console_socket_path_longer_than_a_socket_address(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    here = os.open(deep, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:  # closed where another runtime fails, too
        listener.bind(f"/proc/self/fd/{here}/s")
        listener.listen(1)
        listener.settimeout(DEADLINE)
        os.close(here)
        bundle.process.update(terminal=True)
        runtime.create(bundle, "--console-socket", f"{deep}/s")
        os.close(receive(listener).fd)
    runtime("delete", "c")


def test_terminal_flags_that_do_not_fit_are_refused(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.process["terminal"] = True
    path = str(bundle.write())
    assert "console socket" in runtime("create", "--bundle", path, "c", code=1).err
    bundle.process["terminal"] = False
    bundle.write()
    assert "console socket" in runtime("create", "--bundle", path, "--console-socket", "/x", "c", code=1).err
    bundle.process["terminal"] = True
    bundle.write()
    absent = runtime("create", "--bundle", path, "--console-socket", str(tmp_path / "absent"), "c", code=1)
    assert "connect to console socket" in absent.err
    assert runtime.left() == [] and bundle.groups() == []


def at_a_terminal(words: list[str], rows: int = 24, columns: int = 80) -> tuple[int, Screen]:
    """A process whose terminal is a new pty, and the near end of it."""
    pid, fd = pty.fork()
    if pid == 0:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execv(words[0], words)
        finally:
            os._exit(127)
    PIDS.append(pid)
    return pid, Screen(fd)


def test_run_in_the_foreground_with_a_terminal(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process.update(terminal=True, args=["sh"])
    runtime.ids.append("c")
    words = [FRONT, "--root", str(runtime.root), "run", "--bundle", str(bundle.write()), "c"]
    pid, screen = at_a_terminal(words, 40, 100)
    screen.until(b"# ")
    screen.type(b"stty size; test -t 0 && test -t 1 && echo ter''minal\r")
    assert b"40 100" in screen.until(b"terminal\r\n")
    # Ctrl-C is the container's: the front's terminal is raw
    screen.type(b"sleep 1000\r")
    until(lambda: b"sleep" in Path(f"/proc/{foreground(runtime)}/cmdline").read_bytes(), "sleep runs")
    screen.type(b"\x03")
    screen.until(b"^C")
    screen.type(b"echo code''=$?\r")
    screen.until(b"code=130\r\n")
    # a new size reaches the container: SIGWINCH goes to the front, the ioctl to the container's pty
    fcntl.ioctl(screen.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 11, 22, 0, 0))
    screen.type(b"until [ \"$(stty size)\" = '11 22' ]; do sleep 0.01; done; echo si''zed\r")
    screen.until(b"sized\r\n")
    screen.type(b"exit 6\r")
    screen.rest()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    os.close(screen.fd)


def foreground(runtime: Runtime) -> int:
    """The process in the foreground of the container's terminal."""
    init = runtime.state()["pid"]
    with open(f"/proc/{init}/stat") as file:
        group = int(file.read().rpartition(")")[2].split()[5])
    return group if group > 0 else init


def test_the_terminal_is_restored_even_when_init_is_killed(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process.update(terminal=True, args=["sh", "-c", "echo up; exec sleep 1000"])
    runtime.ids.append("c")
    script = (f"before=$(stty -g); {FRONT} --root {runtime.root} run --bundle {bundle.write()} c; echo code=$?;"
              " test \"$(stty -g)\" = \"$before\" && echo same")
    pid, screen = at_a_terminal(["/bin/sh", "-c", script])
    screen.until(b"up\r\n")
    raw = termios.tcgetattr(screen.fd)[3]
    assert not raw & termios.ICANON and not raw & termios.ECHO
    runtime("kill", "c", "KILL")
    screen.until(b"code=137\r\n")
    screen.until(b"same\r\n")
    screen.rest()
    os.waitpid(pid, 0)
    os.close(screen.fd)


def test_exec_in_the_foreground_with_a_terminal(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    pid, screen = at_a_terminal([FRONT, "--root", str(runtime.root), "exec", "-t", "c", "sh", "-c", "tty; read x; exit 8"])
    screen.until(b"/dev/pts/0\r\n")
    screen.type(b"x\r")
    screen.rest()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
    os.close(screen.fd)


def test_large_output_to_a_terminal_is_complete(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process.update(terminal=True, args=["sh", "-c", "seq 1 20000; echo last"])
    runtime.ids.append("c")
    pid, screen = at_a_terminal([FRONT, "--root", str(runtime.root), "run", "--bundle", str(bundle.write()), "c"])
    lines = screen.rest().split()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert lines == [str(number).encode() for number in range(1, 20001)] + [b"last"]
    os.close(screen.fd)


def test_a_hangup_of_the_callers_terminal_reaches_the_container(runtime: Runtime, bundle: Bundle) -> None:
    bundle.process.update(terminal=True, args=["sh", "-c", "trap 'echo hup > /tmp/hup; exit' HUP; echo up;"
                                               "while :; do sleep 0.01; done"])
    runtime.ids.append("c")
    pid, screen = at_a_terminal([FRONT, "--root", str(runtime.root), "run", "--bundle", str(bundle.write()), "c"])
    screen.until(b"up\r\n")
    os.kill(pid, signal.SIGHUP)
    os.waitpid(pid, 0)
    assert (bundle.rootfs / "tmp/hup").read_text() == "hup\n"
    os.close(screen.fd)
