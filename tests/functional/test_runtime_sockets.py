"""What a caller hands over by its environment or by sockets: LISTEN_FDS, NOTIFY_SOCKET, --pidfd-socket. runc is the control."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import FRONT, RUNC, Bundle, Runtime, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs
PROGRAMS = ["dolium-runtime", "runc"]


@pytest.fixture(params=PROGRAMS)
def words(request: pytest.FixtureRequest, runtime: Runtime) -> Iterator[list[str]]:
    """A runtime with the state folder of ``runtime``; what is left of container c is deleted by it."""
    program = FRONT if request.param == "dolium-runtime" else RUNC
    if program is None:
        pytest.skip("needs the package runc")
    base = [program, "--root", str(runtime.root)]
    yield base
    subprocess.run([*base, "delete", "--force", "c"], capture_output=True, timeout=60, check=False)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "manager"))
        made.settimeout(30)
        yield made


def activated(base: list[str], bundle: Bundle, listen_pid: str) -> list[str]:
    """A shell that becomes ``run`` with fds 3 and 4, as systemd would start it."""
    script = f"exec 3< /etc/hostname 4< /etc/hostname; export LISTEN_FDS=2 LISTEN_PID={listen_pid}; exec {' '.join(base)} run --bundle {bundle.path} c"
    return ["bash", "-c", script]


def test_fds_of_socket_activation_arrive(words: list[str], bundle: Bundle) -> None:
    """runc hands them on by other numbers than it got them, and counts its own among them: 3 and 4 there are what matters."""
    bundle.sh("echo $LISTEN_FDS $LISTEN_PID; cmp /proc/self/fd/3 /proc/self/fd/4 && echo same; test -e /proc/self/fd/5; echo $?").write()
    done = subprocess.run(activated(words, bundle, "$$"), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["2", "1", "same", "1"], done


def test_fds_that_were_for_another_process_do_not(words: list[str], bundle: Bundle) -> None:
    bundle.sh("echo ${LISTEN_FDS:-none}; test -e /proc/self/fd/3; echo $?").write()
    done = subprocess.run(activated(words, bundle, "1"), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["none", "1"], done


def test_readiness_reaches_the_manager_and_start_waits_for_it(words: list[str], runtime: Runtime, bundle: Bundle,
                                                              manager: socket.socket) -> None:
    env = {**os.environ, "NOTIFY_SOCKET": manager.getsockname()}
    bundle.sh("echo $NOTIFY_SOCKET > /tmp/told; exec sleep 1000").write()
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": env}
    subprocess.run([*words, "create", "--bundle", str(bundle.path), "c"], check=True, timeout=60, **quiet)  # type: ignore[call-overload]
    started = subprocess.Popen([*words, "start", "c"], **quiet)  # type: ignore[call-overload]
    told = bundle.rootfs / "tmp/told"
    until(lambda: told.exists() and told.read_text(), "the program runs")
    assert told.read_text() == "/run/notify/notify.sock\n" and started.poll() is None
    pid = int(subprocess.run([*words, "state", "c"], capture_output=True, text=True, check=True).stdout.split('"pid": ')[1].split(",")[0])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inside:
        for message in (b"STATUS=soon", b"READY=1\nSTATUS=now"):  # runc sees the word at a message's begin alone
            inside.sendto(message, f"/proc/{pid}/root/run/notify/notify.sock")
        said = manager.recv(4096)
        while b"MAINPID" not in said:  # runc says it apart
            said += manager.recv(4096)
    assert b"READY=1\n" in said and f"MAINPID={pid}\n".encode() in said and b"STATUS" not in said
    assert started.wait(30) == 0


def test_a_container_that_ends_before_it_is_ready_ends_the_wait(runtime: Runtime, bundle: Bundle, manager: socket.socket) -> None:
    env = {**os.environ, "NOTIFY_SOCKET": manager.getsockname()}
    runtime.run(bundle.sh("exit 3"), "--detach", code=0, env=env)
    runtime.wait_status("stopped")
    runtime("delete", "c")
    assert runtime.left() == []
    runtime.run(bundle.sh("exit 3"), code=3, env=env)
    assert runtime.left() == []


def test_a_start_that_waits_can_be_interrupted_and_the_container_deleted(runtime: Runtime, bundle: Bundle,
                                                                         manager: socket.socket) -> None:
    env = {**os.environ, "NOTIFY_SOCKET": manager.getsockname()}
    runtime.create(bundle.sh("exec sleep 1000"), env=env)
    first = runtime.popen("start", "c", env=env)
    runtime.wait_status("running")
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == -signal.SIGTERM
    runtime("delete", "--force", "c")
    assert runtime.left() == []


def take_pidfd(listener: socket.socket, taken: list[tuple[bytes, int]]) -> None:
    connection, _ = listener.accept()
    with connection:
        data, fds, _, _ = socket.recv_fds(connection, 64, 1)
        taken.append((data, fds[0]))
        assert connection.recv(1) == b""  # nobody else has the connection: not the waiting init


def test_a_pidfd_of_init_and_of_an_exec(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    taken: list[tuple[bytes, int]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "pidfd"))
        listener.listen()
        for call in (lambda: runtime.create(bundle.sh("exec sleep 1000"), "--pidfd-socket", str(tmp_path / "pidfd")),
                     lambda: runtime("exec", "--pidfd-socket", str(tmp_path / "pidfd"), "c", "true")):
            thread = threading.Thread(target=take_pidfd, args=(listener, taken))
            thread.start()
            call()
            thread.join(30)
            assert not thread.is_alive()
    assert [data for data, _ in taken] == [b"standard", b"setns"]
    pid = runtime.state()["pid"]
    text = Path(f"/proc/self/fdinfo/{taken[0][1]}").read_text()
    assert f"Pid:\t{pid}\n" in text
    for _, fd in taken:
        os.close(fd)


def test_a_pidfd_socket_that_is_not_there_leaves_nothing(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    result = runtime.run(bundle, "--pidfd-socket", str(tmp_path / "nosuch"), code=1)
    assert "connect to pidfd socket" in result.err and runtime.left() == [] and bundle.groups() == []
