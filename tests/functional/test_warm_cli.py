"""`dolium` behaves as if the program ran in place: by the C front and a warm compiler, and by Python alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DOLIUM, Daemon, eventually
from terminal import Terminal

pytestmark = pytest.mark.leaves("links", "nft")


class Line:
    """`dolium` in one of its two ways."""

    def __init__(self, engine: Daemon, warm: bool) -> None:
        self.engine = engine
        self.warm = warm
        self.env = engine.env if warm else {**engine.env, "DOLIUM_WARM": "off"}

    def __call__(self, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 60, "check": False, "env": self.env, **options}
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run([DOLIUM, *words], **options)  # type: ignore[call-overload,no-any-return]

    def popen(self, *words: str, **options: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([DOLIUM, *words], env=self.env, **options)  # type: ignore[call-overload,no-any-return]

    def terminal(self, *words: str, size: tuple[int, int] = (24, 80)) -> Terminal:
        return Terminal(self.engine, DOLIUM, *words, size=size, DOLIUM_WARM=self.env["DOLIUM_WARM"])


@pytest.fixture(params=["warm", "cold"])
def line(engine: Daemon, request: pytest.FixtureRequest) -> Iterator[Line]:
    yield Line(engine, request.param == "warm")
    names = engine.docker("ps", "-aq").stdout.split()
    if names:
        engine.docker("rm", "-f", *names)


def runs_python(pid: int) -> bool:
    return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_which_way_it_goes(line: Line) -> None:
    with line.popen("run", "--rm", "--name", "box", "base:1", "sh", "-c", "echo up; exec sleep 100", stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"up\n"
        assert runs_python(one.pid) is not line.warm
        line("kill", "box")
        assert one.wait(30) == 137


def test_output_codes_and_errors(line: Line) -> None:
    done = line("run", "--rm", "base:1", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)
    done = line("run", "--rm", "base:1", "nosuch")
    assert done.returncode == 127 and done.stderr.startswith("dolium: ") and "nosuch" in done.stderr
    done = line("run", "--rm", "base:1", "/etc")
    assert done.returncode == 126 and "permission denied" in done.stderr
    done = line("run", "--nosuch", "base:1")
    assert done.returncode == 125 and "unknown flag: --nosuch\n`dolium run --help` shows how" in done.stderr
    done = line("exec", "nobody", "true")
    assert "No such container: nobody" in done.stderr and done.returncode != 0
    done = line("run", "--rm", "--pull", "never", "nosuch:1", "true")
    assert done.returncode == 125 and "No such image: nosuch:1" in done.stderr
    done = line("run", "--rm", "--env-file", "/nosuch", "base:1", "true")
    assert done.returncode == 125 and "--env-file /nosuch: No such file or directory" in done.stderr


def test_commands_that_only_ask(line: Line) -> None:
    identity = line("run", "-d", "--name", "box", "-e", "FROM_HERE", "base:1", "sleep", "100",
                    env={**line.env, "FROM_HERE": "yes"}).stdout.strip()
    assert len(identity) == 64
    assert line("ps", "-q", "--no-trunc").stdout == f"{identity}\n"
    found = json.loads(line("inspect", "box").stdout)[0]
    assert found["Id"] == identity and "FROM_HERE=yes" in found["Config"]["Env"]
    assert line("exec", "-w", "/tmp", "box", "pwd").stdout == "/tmp\n"
    assert line("exec", "box", "sh", "-c", "exit 4").returncode == 4
    assert line("rename", "box", "box2").returncode == 0
    assert line("stop", "-t", "0", "box2").stdout == "box2\n"
    assert line("rm", "box2", "nosuch").returncode == 1
    assert "base" in line("images").stdout
    assert line("version").stdout.startswith("client  dolium")


def test_logs(line: Line) -> None:
    line("run", "--name", "box", "base:1", "sh", "-c", "echo one; echo two >&2; exit 3")
    done = line("logs", "box")
    assert (done.stdout, done.stderr, done.returncode) == ("one\n", "two\n", 0)
    assert line("logs", "--tail", "0", "box").stdout == ""
    done = line("logs", "nosuch")
    assert done.returncode == 1 and "No such container: nosuch" in done.stderr
    with line.popen("run", "-d", "-t", "--name", "talk", "base:1", "sh", "-c", "echo first; sleep 100", stdout=subprocess.DEVNULL) as one:
        assert one.wait(30) == 0
    with line.popen("logs", "-f", "talk", stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"first\r\n"
        one.send_signal(signal.SIGINT)
        assert one.wait(30) in (130, -signal.SIGINT)


def test_a_large_input_and_output(line: Line) -> None:
    data = os.urandom(3_000_000)
    done = line("run", "-i", "--rm", "base:1", "cat", input=data, text=False)
    assert done.stdout == data and done.returncode == 0
    done = line("run", "-i", "--rm", "base:1", "sh", "-c", "dd bs=1 count=3 of=/dev/null 2>/dev/null; sleep 0.2; md5sum", input=b"abc" + data, text=False)
    assert done.stdout.split()[0].decode() == subprocess.run(["md5sum"], input=data, capture_output=True, check=True).stdout.split()[0].decode()


def test_a_reader_that_goes_away(line: Line) -> None:
    read, write = os.pipe()
    with line.popen("run", "--rm", "--name", "box", "base:1", "yes", stdout=write) as one:
        os.close(write)
        assert os.read(read, 4) == b"y\ny\n"
        os.close(read)
        assert one.wait(30) == 141
    line("rm", "-f", "box")


def test_an_output_that_is_non_blocking_and_full(line: Line) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with line.popen("run", "--rm", "base:1", "sh", "-c", "seq 100000", stdout=write) as one:
        os.close(write)
        with open(read, "rb") as stream:
            assert stream.read() == b"".join(b"%d\n" % number for number in range(1, 100_001))
        assert one.wait(30) == 0


def test_signals_go_to_the_container(line: Line) -> None:
    script = "trap 'echo int' INT; trap 'echo usr; exit 9' USR1; echo ready; while :; do sleep 0.05; done"
    with line.popen("run", "--rm", "base:1", "sh", "-c", script, stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"ready\n"
        one.send_signal(signal.SIGINT)
        assert one.stdout.readline() == b"int\n"
        one.send_signal(signal.SIGUSR1)
        assert one.stdout.read() == b"usr\n"
        assert one.wait(30) == 9


def test_without_sig_proxy_they_end_the_client(line: Line) -> None:
    with line.popen("run", "--name", "box", "--sig-proxy=false", "base:1", "sh", "-c", "echo ready; sleep 100",
                    stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"ready\n"
        one.send_signal(signal.SIGTERM)
        assert one.wait(30) == -signal.SIGTERM
    assert json.loads(line("inspect", "box").stdout)[0]["State"]["Running"] is True


def test_a_terminal(line: Line) -> None:
    script = ("trap 'echo interrupted' INT; stty size; tty; until [ \"$(stty size)\" = '40 120' ]; do sleep 0.01; done; "
              "echo resized; cat; exit 6")
    one = line.terminal("run", "-it", "--rm", "base:1", "sh", "-c", script, size=(31, 99))
    one.expect("31 99\r\n/dev/pts/0\r\n")
    termios.tcsetwinsize(one.fd, (40, 120))
    one.expect("resized")
    one.send(b"word\n")
    one.expect("word\r\nword\r\n")  # the terminal's echo, and cat's own
    one.send(b"\x03")  # the container's own terminal makes it a signal
    one.expect("^C")
    one.expect("interrupted")
    assert one.end() == 6


def test_the_terminal_is_as_before(line: Line) -> None:
    shell = Terminal(line.engine, "sh", "-c", f"stty -a > before; {DOLIUM} run -it --rm base:1 sh; echo code $?; stty -a > after; "
                     "cmp before after && echo sa''me", PWD="/tmp", DOLIUM_WARM=line.env["DOLIUM_WARM"])
    shell.expect("/ # ")
    shell.send(b"exit 2\n")
    shell.expect("code 2")
    shell.expect("same")
    assert shell.end() == 0
    for name in ("before", "after"):
        os.unlink(name)


def test_stopped_from_outside_and_back(engine: Daemon) -> None:
    """By the front alone: Python in its place leaves a stop signal to the kernel, raw terminal and all."""
    one = Line(engine, True).terminal("run", "-it", "--rm", "base:1", "sh")
    one.expect("/ # ")
    raw = termios.tcgetattr(one.fd)[3]
    assert not raw & termios.ICANON
    os.kill(one.pid, signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(one.pid, os.WUNTRACED)[1])
    assert termios.tcgetattr(one.fd)[3] & termios.ICANON
    os.kill(one.pid, signal.SIGCONT)
    eventually(lambda: not termios.tcgetattr(one.fd)[3] & termios.ICANON, "it is raw again")
    one.send(b"echo ba''ck; exit\n")
    one.expect("back")
    assert one.end() == 0


def test_a_terminal_that_is_closed(line: Line) -> None:
    one = line.terminal("run", "-it", "--name", "box", "base:1", "sh", "-c", "trap 'exit 3' HUP; echo ready; while :; do sleep 0.05; done")
    one.expect("ready")
    os.close(one.fd)
    os.waitpid(one.pid, 0)
    eventually(lambda: json.loads(line("inspect", "box").stdout)[0]["State"]["ExitCode"] == 3, "it got the hang-up")


def test_detaching(line: Line) -> None:
    one = line.terminal("run", "-it", "--name", "box", "base:1", "sh")
    one.expect("/ # ")
    one.send(b"\x10\x11")
    assert one.end() == 0
    assert json.loads(line("inspect", "box").stdout)[0]["State"]["Running"] is True


def test_exec_at_a_terminal(line: Line) -> None:
    line("run", "-d", "--name", "box", "base:1", "sleep", "100")
    one = line.terminal("exec", "-it", "box", "sh", size=(33, 77))
    one.expect("/ # ")
    one.send(b"stty size\n")
    one.expect("33 77")
    one.expect("/ # ")  # in raw mode again: a ^D that came before would be read as a NUL, and be no end
    one.send(b"\x04")
    assert one.end() == 0


def test_timings(line: Line) -> None:
    done = line("run", "--rm", "--timings", "base:1", "echo", "hi")
    assert done.stdout == "hi\n" and "where the time of the start went" in done.stderr and done.returncode == 0
    assert line("ps", "-aq").stdout == ""


def test_a_cidfile_is_written_once(line: Line, tmp_path: Path) -> None:
    path = tmp_path / "cid"
    assert line("run", "--rm", "--cidfile", str(path), "base:1", "true").returncode == 0
    assert len(path.read_text()) == 64
    assert line("run", "--rm", "--cidfile", str(path), "base:1", "true").returncode == 125


# -- what only the warm way can meet --


class Compiler:
    """A warm compiler that this test may kill."""

    def __init__(self, engine: Daemon, folder: Path) -> None:
        self.folder = folder
        self.env = {**engine.env, "DOLIUM_WARM": str(folder)}

    def pids(self) -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
        return found

    def heat(self) -> int:
        subprocess.run([DOLIUM, "--help"], env=self.env, check=True, capture_output=True)
        found: list[int] = eventually(lambda: self.folder.exists() and list(self.folder.iterdir()) and self.pids(), "it listens")
        return found[0]


@pytest.fixture
def compiler(engine: Daemon, tmp_path: Path) -> Iterator[Compiler]:
    one = Compiler(engine, tmp_path / "warm")
    yield one
    for pid in one.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: not one.pids(), "it is gone")


def test_the_compiler_is_killed_during_a_session(engine: Daemon, compiler: Compiler) -> None:
    pid = compiler.heat()
    with subprocess.Popen([DOLIUM, "run", "-i", "--name", "box", "base:1", "sh", "-c", "echo ready; read x; echo $x; exit 5"],
                          env=compiler.env, stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        assert one.stdout is not None and one.stdin is not None and one.stderr is not None
        assert one.stdout.readline() == b"ready\n"
        os.kill(pid, signal.SIGKILL)
        one.stdin.write(b"word\n")
        one.stdin.close()
        assert one.stdout.read() == b"word\n"
        assert one.wait(30) == 5
        assert one.stderr.read() == b""
    assert len(engine.docker("ps", "-aq").stdout.split()) == 1  # it ran once
    engine.docker("rm", "-f", "box")


def test_the_compiler_is_killed_between_two_deeds(engine: Daemon, compiler: Compiler) -> None:
    """What was asked for once is not asked for again."""
    script = "trap 'echo asked; sleep 1; exit' TERM; echo up; while :; do sleep 0.05; done"
    engine.docker("run", "-d", "--name", "box", "base:1", "sh", "-c", script)
    eventually(lambda: engine.docker("logs", "box").stdout == "up\n", "its trap is set")
    engine.docker("create", "--name", "box2", "base:1", "true")
    pid = compiler.heat()
    with subprocess.Popen([DOLIUM, "stop", "box", "box2"], env=compiler.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        eventually(lambda: "asked" in engine.docker("logs", "box").stdout, "the first request is under way")
        os.kill(pid, signal.SIGKILL)
        out, err = one.communicate(timeout=60)
    assert (out, err, one.returncode) == (b"box\nbox2\n", b"", 0)
    assert engine.docker("logs", "box").stdout == "up\nasked\n"
    engine.docker("rm", "-f", "box", "box2")


def test_the_python_beside_a_wrapper_is_not_ours(tmp_path: Path) -> None:
    """A shell names `timeout` in "_" for `timeout dolium`; only beside a dolium is a Python that has dolium."""
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 42\n")
    (tmp_path / "python3").chmod(0o755)
    for name, code in (("timeout", 0), ("dolium", 42)):
        env = {**os.environ, "_": str(tmp_path / name), "DOLIUM_WARM": "off"}
        assert subprocess.run([DOLIUM, "--help"], env=env, capture_output=True, check=False, timeout=60).returncode == code
