"""Containers over time: exec, logs, attach, stop, pause, restart policies, events, stats, cp; by the docker command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import tarfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DEADLINE, DOCKER, DOLIUM, Daemon, eventually
from terminal import Terminal

from dolium.engine.engine import host_layout
from dolium.linux.cgroup import manage

pytestmark = pytest.mark.leaves("links", "nft")


@pytest.fixture
def box(engine: Daemon) -> Iterator[str]:
    """A running container."""
    engine.docker("run", "-d", "--name", "box", "--init", "base:1", "sleep", "3600")
    yield "box"
    engine.docker("rm", "-f", "box", check=False)


def test_exec_output_codes_user_env_and_input(engine: Daemon, box: str) -> None:
    done = engine.docker("exec", box, "sh", "-c", "echo o; echo e >&2; exit 9", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("o\n", "e\n", 9)
    assert engine.docker("exec", "-u", "app", "-w", "/tmp", "-e", "X=y", box, "sh", "-c",
                         "id -un; pwd; echo $X $HOME").stdout == "app\n/tmp\ny /home/app\n"
    data = "line\n" * 50_000
    assert engine.docker("exec", "-i", box, "cat", input=data).stdout == data
    done = engine.docker("exec", box, "nope", check=False)
    assert done.returncode == 127
    assert "executable file not found" in done.stdout + done.stderr
    done = engine.docker("exec", "-u", "stranger", box, "true", check=False)
    assert (done.returncode, "unable to find user stranger" in done.stderr) == (126, True)


def test_exec_joins_namespaces_cgroup_filter_and_capabilities(engine: Daemon, box: str) -> None:
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "uts", "user")
    links = engine.docker("exec", box, "sh", "-c", "for i in self 1; do for k in " + " ".join(kinds) + "; do "
                          "readlink /proc/$i/ns/$k; done; done").stdout.split()
    assert len(links) == 2 * len(kinds)
    assert links[: len(kinds)] == links[len(kinds) :]
    assert links[0] != os.readlink("/proc/self/ns/cgroup")
    status = {line.split(":")[0]: line for line in
              engine.docker("exec", box, "cat", "/proc/self/status").stdout.splitlines()}
    init = {line.split(":")[0]: line for line in engine.docker("exec", box, "cat", "/proc/1/status").stdout.splitlines()}
    for key in ("CapBnd", "CapEff", "Seccomp", "NoNewPrivs"):
        assert status[key] == init[key]
    fds = engine.docker("exec", box, "ls", "/proc/self/fd").stdout.split()
    assert fds == ["0", "1", "2", "3"]  # 3 is ls's own


def test_exec_detached_and_inspected(engine: Daemon, box: str) -> None:
    engine.docker("exec", "-d", box, "touch", "/tmp/there")
    eventually(lambda: engine.docker("exec", box, "ls", "/tmp/there", check=False).returncode == 0, "the file is there")
    done = engine.docker("exec", "nobody-here", "true", check=False)
    assert "No such container" in done.stderr


def test_pause_refuses_exec(engine: Daemon, box: str) -> None:
    engine.docker("pause", box)
    assert "(Paused)" in engine.docker("ps", "--format", "{{.Status}}").stdout
    assert "is paused" in engine.docker("exec", box, "true", check=False).stderr
    assert "already paused" in engine.docker("pause", box, check=False).stderr
    engine.docker("unpause", box)
    engine.docker("exec", box, "true")
    engine.docker("pause", box)
    engine.docker("stop", "-t", "5", box)
    assert engine.inspect(box)["State"]["Status"] == "exited"


def test_logs(engine: Daemon) -> None:
    engine.docker("run", "--name", "talker", "base:1", "sh", "-c", "for i in 1 2 3 4 5; do echo $i; done; echo err >&2; "
                  "printf partial", check=False)
    try:
        done = engine.docker("logs", "talker")
        assert (done.stdout, done.stderr) == ("1\n2\n3\n4\n5\npartial", "err\n")
        assert engine.docker("logs", "-n", "2", "talker").stdout == "partial"
        stamped = engine.docker("logs", "-t", "talker").stdout.splitlines()
        assert stamped[0].endswith("Z 1")
        assert engine.docker("logs", "--since", "2100-01-01T00:00:00Z", "talker").stdout == ""
        engine.docker("start", "talker")
        engine.docker("wait", "talker")
        assert engine.docker("logs", "talker").stdout.count("1\n") == 2
    finally:
        engine.docker("rm", "-f", "talker")


def test_follow_ends_with_the_container(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "slow", "-i", "base:1", "sh", "-c", "echo begin; read line; echo end")
    try:
        with subprocess.Popen([DOCKER, "logs", "-f", "slow"], stdout=subprocess.PIPE, text=True, env=engine.env) as follower:
            assert follower.stdout is not None
            assert follower.stdout.readline() == "begin\n"
            engine.docker("attach", "slow", input="go\n")
            assert follower.stdout.read() == "end\n"
            assert follower.wait(20) == 0
    finally:
        engine.docker("rm", "-f", "slow")


def test_a_follower_that_never_reads_holds_up_nobody(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "loud", "-i", "base:1", "sh", "-c",
                  "read go; yes 0123456789 | head -c 20000000; echo; echo done")
    stalled = [subprocess.Popen([DOCKER, verb, *flags, "loud"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                env=engine.env) for verb, flags in (("logs", ["-f"]), ("attach", ["--no-stdin"]))]
    try:
        engine.docker("attach", "loud", input="go\n", timeout=60)
        assert engine.docker("wait", "loud", timeout=60).stdout == "0\n"
        assert engine.docker("logs", "-n", "1", "loud").stdout == "done\n"
    finally:
        for process in stalled:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        engine.docker("rm", "-f", "loud")


def test_replays_that_nobody_reads_hold_up_nobody(engine: Daemon) -> None:
    """More of them than the daemon has threads; the log is longer than a socket's buffers."""
    engine.docker("run", "-d", "--name", "long", "base:1", "sh", "-c", "yes 0123456789 | head -c 2200000; exec sleep 600")
    eventually(lambda: len(engine.docker("logs", "long").stdout) == 2200000, "the log is written")
    stalled = [socket.socket(socket.AF_UNIX) for _ in range(3 * (os.cpu_count() or 1) + 20)]
    try:
        for client in stalled:
            client.connect(engine.socket)
            client.sendall(b"POST /containers/long/attach?logs=1&stream=1&stdout=1 HTTP/1.1\r\nHost: d\r\n"
                           b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 101"
        engine.docker("run", "--rm", "base:1", "true")
        engine.docker("volume", "create", "brief")
        engine.docker("volume", "rm", "brief")
    finally:
        for client in stalled:
            client.close()
        engine.docker("rm", "-f", "long")


def test_a_terminal(engine: Daemon) -> None:
    terminal = Terminal(engine, DOCKER, "run", "--rm", "-it", "base:1", "sh", size=(33, 101))
    terminal.expect("# ")
    terminal.send(b"tty; echo size $(stty size) end; test -t 1 && echo is-tty\n")
    terminal.expect("size 33 101 end")
    terminal.expect("is-tty")
    termios.tcsetwinsize(terminal.fd, (44, 102))
    os.kill(terminal.pid, signal.SIGWINCH)
    terminal.send(b"while [ \"$(stty size)\" != '44 102' ]; do :; done; echo re''sized\n")
    terminal.expect("resized")
    # A shell that is not interactive dies of SIGINT at any moment; between its fork and exec an interactive one would not.
    terminal.send(b"sh -c \"echo sle''eping; sleep 100\"\n")
    terminal.expect("sleeping")
    terminal.send(b"\x03")
    terminal.expect("# ")
    terminal.send(b"exit 5\n")
    assert terminal.end() == 5


def test_detach_and_attach_again(engine: Daemon) -> None:
    terminal = Terminal(engine, DOCKER, "run", "-it", "--name", "det", "base:1", "sh")
    try:
        terminal.expect("# ")
        terminal.send(b"word=kept\n")
        terminal.expect("# ")
        terminal.send(b"\x10\x11")
        assert terminal.end() == 0
        assert engine.inspect("det")["State"]["Running"]
        terminal = Terminal(engine, DOCKER, "attach", "--detach-keys", "ctrl-a,x", "det")
        terminal.send(b"\n")
        terminal.expect("# ")
        terminal.send(b"echo it is $word\n")
        terminal.expect("it is kept")
        terminal.send(b"\x01x")
        terminal.end()
        assert engine.inspect("det")["State"]["Running"]
        terminal = Terminal(engine, DOLIUM, "attach", "det")
        terminal.send(b"echo closes $word\n")
        terminal.expect("closes kept")
        os.close(terminal.fd)  # the window is closed: the client goes, the container stays
        gone = os.pidfd_open(terminal.pid)
        assert select.select([gone], [], [], DEADLINE)[0]
        os.close(gone)
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == -signal.SIGHUP
        terminal = Terminal(engine, DOLIUM, "attach", "det")
        terminal.send(b"exit 6\n")
        assert terminal.end() == 6
    finally:
        engine.docker("rm", "-f", "det")


def test_exec_in_a_terminal(engine: Daemon, box: str) -> None:
    for program in (DOCKER, DOLIUM):
        terminal = Terminal(engine, program, "exec", "-it", box, "sh", size=(20, 70))
        terminal.expect("# ")
        terminal.send(b"echo size $(stty size) end\n")
        terminal.expect("size 20 70 end")
        terminal.send(b"exit 3\n")
        assert terminal.end() == 3


def test_signals_reach_the_container(engine: Daemon) -> None:
    script = "trap 'echo caught; exit 42' INT; echo ready; while :; do sleep 0.1; done"
    for program in (DOCKER, DOLIUM):
        with subprocess.Popen([program, "run", "--rm", "base:1", "sh", "-c", script], stdout=subprocess.PIPE, text=True,
                              env=engine.env) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "caught\n"
            assert process.wait(20) == 42


def test_stop_asks_then_kills(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "polite", "base:1", "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done")
    engine.docker("run", "-d", "--name", "deaf", "--stop-signal", "USR1", "base:1", "sh", "-c",
                  "trap 'echo asked' USR1; while :; do sleep 0.05; done")
    try:
        for name in ("polite", "deaf"):
            eventually(lambda name=name: "sleep" in engine.docker("top", name).stdout, "the trap is set")
        engine.docker("stop", "polite")
        assert engine.inspect("polite")["State"]["ExitCode"] == 7
        engine.docker("stop", "-t", "1", "deaf")
        assert engine.inspect("deaf")["State"]["ExitCode"] == 137
        assert engine.docker("logs", "deaf").stdout == "asked\n"
        assert engine.docker("kill", "polite", check=False).returncode == 1
    finally:
        engine.docker("rm", "-f", "polite", "deaf")


def test_rm_rename_and_conflicts(engine: Daemon, box: str) -> None:
    assert "container is running" in engine.docker("rm", box, check=False).stderr
    assert "already in use" in engine.docker("create", "--name", box, "base:1", check=False).stderr
    engine.docker("rename", box, "renamed")
    assert engine.inspect("renamed")["Name"] == "/renamed"
    engine.docker("rename", "renamed", box)
    prefix = engine.inspect(box)["Id"][:6]
    assert engine.inspect(prefix)["Name"] == f"/{box}"


def test_every_start_is_a_new_init_in_fresh_namespaces(engine: Daemon, box: str) -> None:
    engine.docker("exec", box, "sh", "-c", "echo kept > /kept; mount -t tmpfs none /mnt 2>/dev/null; hostname")
    before = engine.inspect(box)["State"]["Pid"]
    with open(f"/proc/{before}/ns/pid") as held:  # while it is open no other namespace gets its number
        engine.docker("restart", "-t", "0", box)
        after = engine.inspect(box)["State"]["Pid"]
        assert after != before
        assert os.stat(f"/proc/{after}/ns/pid").st_ino != os.fstat(held.fileno()).st_ino
    assert engine.docker("exec", box, "cat", "/kept").stdout == "kept\n"


@pytest.mark.parametrize(("policy", "code", "starts"), [("on-failure:2", 3, 3), ("on-failure", 0, 1), ("no", 1, 1)])
def test_restart_policies_that_end(engine: Daemon, policy: str, code: int, starts: int) -> None:
    engine.docker("run", "-d", "--name", "again", "--restart", policy, "base:1", "sh", "-c", f"echo run; exit {code}")
    try:
        eventually(lambda: engine.inspect("again")["State"]["Status"] == "exited", "it has ended for good")
        assert engine.docker("logs", "again").stdout == "run\n" * starts
        assert engine.inspect("again")["RestartCount"] == starts - 1
    finally:
        engine.docker("rm", "-f", "again")


def test_always_restarts_until_stopped(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "always", "--restart", "always", "base:1", "sh", "-c", "echo run; exit 0")
    try:
        eventually(lambda: engine.docker("logs", "always").stdout.count("run") >= 3, "three runs")
        engine.docker("stop", "always")
        assert engine.inspect("always")["State"]["Status"] == "exited"
        runs = engine.docker("logs", "always").stdout
        engine.docker("exec", "always", "true", check=False)
        assert engine.docker("logs", "always").stdout == runs
    finally:
        engine.docker("rm", "-f", "always")


def test_a_dead_shim_is_a_dead_container(engine: Daemon, box: str) -> None:
    pid = engine.inspect(box)["State"]["Pid"]
    with open(f"/proc/{pid}/stat") as file:
        shim = int(file.read().rpartition(")")[2].split()[1])
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: engine.inspect(box)["State"]["Status"] == "exited", "the container has ended")
    assert "shim" in engine.inspect(box)["State"]["Error"]
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "its init is dead")
    engine.docker("start", box)
    engine.docker("exec", box, "true")


def test_top_stats_events_ps(engine: Daemon, box: str) -> None:
    assert "sleep 3600" in engine.docker("top", box).stdout
    assert "sleep 3600" in engine.docker("top", box, "-o", "pid,args").stdout
    row = json.loads(engine.docker("stats", "--no-stream", "--format", "json", box).stdout)
    assert row["Name"] == box
    assert int(row["PIDs"]) >= 1
    seen = engine.docker("events", "--since", "1h", "--until", str(int(time.time()) + 1), "--filter", f"container={box}",
                         "--format", "{{.Action}}").stdout.split()
    assert seen[:2] == ["create", "start"]
    assert engine.docker("ps", "-q", "--filter", f"name={box}").stdout.strip()
    assert engine.docker("ps", "-q", "--filter", "status=exited", "--filter", f"name={box}").stdout == ""


def test_cp_both_ways_running_and_stopped(engine: Daemon, box: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_text("a\n")
    os.symlink("a", tmp_path / "tree" / "link")
    for state in ("running", "stopped"):
        if state == "stopped":
            engine.docker("stop", "-t", "0", box)
        engine.docker("cp", str(tmp_path / "tree"), f"{box}:/tmp/{state}")
        engine.docker("cp", f"{box}:/tmp/{state}", str(tmp_path / f"back-{state}"))
        assert (tmp_path / f"back-{state}" / "a").read_text() == "a\n"
        assert os.readlink(tmp_path / f"back-{state}" / "link") == "a"
        packed = subprocess.run([DOCKER, "cp", f"{box}:/etc/passwd", "-"], capture_output=True, env=engine.env, check=True)
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            assert archive.getnames() == ["passwd"]
        engine.dolium("cp", f"{box}:/etc/passwd", str(tmp_path / f"passwd-{state}"))
        assert "app:x:1000" in (tmp_path / f"passwd-{state}").read_text()
    assert "Could not find the file" in engine.docker("cp", f"{box}:/nothing", str(tmp_path), check=False).stderr


def test_cp_does_not_follow_links_out(engine: Daemon, box: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host\n")
    engine.docker("exec", box, "sh", "-c", f"mkdir -p /out; ln -s {tmp_path} /out/dir; ln -s {secret} /out/file; "
                  "ln -s ../../../../../../../../.. /out/up")
    for path in ("/out/dir/secret", "/out/file", f"/out/up{secret}"):
        done = engine.docker("cp", "-L", f"{box}:{path}", str(tmp_path / "got"), check=False)
        assert done.returncode != 0
        assert not (tmp_path / "got").exists()
    engine.docker("cp", str(secret), f"{box}:/out/dir/planted", check=False)
    assert not (tmp_path / "planted").exists()


def has_stopped() -> bool:
    """Is the process of an exec stopped, on its way in or at its program?"""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{name}/stat").read_text().split()[1:3] in (["(dolium-shim)", "T"], ["(sleep)", "T"]):
                return True
    return False


def test_a_container_that_stops_what_comes_in_can_be_killed(engine: Daemon, tmp_path: Path) -> None:
    engine.docker("run", "-d", "--name", "stopper", "base:1", "sh", "-c", "while :; do kill -STOP -1 2>/dev/null; done")
    with subprocess.Popen([DOCKER, "exec", "stopper", "sleep", "100"], env=engine.env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        try:
            eventually(has_stopped, "what came in was stopped")
            engine.docker("rm", "-f", "stopper")
        finally:
            client.kill()


def test_errors_over_the_bare_api(engine: Daemon) -> None:
    for method, path, body, status in (
            ("GET", "/containers/nope/json", None, 404), ("GET", "/v1.10/info", None, 400), ("GET", "/v9.99/info", None, 400),
            ("GET", "/nothing", None, 404), ("POST", "/containers/create", {"Image": "base:1", "HostConfig": 3}, 400),
            ("POST", "/containers/create", {"Image": "base:1", "Cmd": 5}, 400), ("GET", "/_ping", None, 200),
            ("POST", "/containers/create", {"Image": "nope:1"}, 404), ("POST", "/exec/nope/start", {}, 404)):
        code, text = engine.api(method, path, body)
        assert code == status, (path, text)
        if status >= 400:
            assert json.loads(text.split(b"\r\n")[1] if text[:1] not in b"{" else text)["message"]


def test_half_sent_requests_and_dropped_connections_harm_nobody(engine: Daemon) -> None:
    for data in (b"", b"GET", b"POST /containers/create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", b"\x00\xff" * 100,
                 b"POST /containers/x/attach HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(engine.socket)
            sock.sendall(data)
    assert engine.api("GET", "/_ping")[1].endswith(b"OK")


def test_what_stays_here_and_what_is_told_early(engine: Daemon, tmp_path: Path) -> None:
    """--sig-proxy=false leaves a signal to this side; --cidfile is there while the container runs."""
    cid = tmp_path / "cid"
    with subprocess.Popen([DOLIUM, "run", "--rm", "--sig-proxy=false", "--cidfile", str(cid), "base:1", "sh", "-c",
                           "trap 'exit 42' USR1; echo ready; while :; do sleep 0.1; done"], stdout=subprocess.PIPE, text=True,
                          env=engine.env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        name = cid.read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == -signal.SIGUSR1
        assert engine.inspect(name)["State"]["Running"]
        engine.docker("rm", "-f", name)


def test_a_daemon_stops_while_clients_wait(tmp_path: Path) -> None:
    """And what they wait for goes on."""
    daemon = Daemon(tmp_path)
    daemon.start()
    daemon.import_base("base:1")
    daemon.docker("run", "-d", "--name", "long", "base:1", "sh", "-c", "yes 0123456789 | head -c 2200000; exec sleep 600")
    eventually(lambda: len(daemon.docker("logs", "long").stdout) == 2200000, "the log is written")
    pid = daemon.inspect("long")["State"]["Pid"]
    clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    try:
        for client, request in zip(clients, (
                "POST /containers/long/wait", "GET /containers/long/logs?follow=1&stdout=1&tail=1",
                "GET /containers/long/stats", "POST /containers/long/attach?logs=1&stream=1&stdout=1"), strict=True):
            client.settimeout(20)
            client.connect(daemon.socket)
            client.sendall(f"{request} HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n".encode())
            assert client.recv(9) == b"HTTP/1.1 "
        daemon.stop()
        daemon.start()
        assert daemon.inspect("long")["State"]["Pid"] == pid
    finally:
        for client in clients:
            client.close()
        daemon.close()


def test_a_socket_that_is_served_is_not_taken(engine: Daemon, tmp_path: Path) -> None:
    other = Daemon(tmp_path)
    other.socket = engine.socket
    other.start(wait=False)
    assert other.wait() == 1
    assert "another program listens there" in other.tail()
    assert engine.api("GET", "/_ping")[0] == 200


def test_a_refused_name_makes_no_host_folder(engine: Daemon, box: str, tmp_path: Path) -> None:
    done = engine.docker("create", "--name", box, "-v", f"{tmp_path}/made:/x", "base:1", check=False)
    assert "already in use" in done.stderr
    assert not (tmp_path / "made").exists()


def test_native_command_line(engine: Daemon) -> None:
    done = engine.dolium("run", "--rm", "base:1", "sh", "-c", "echo o; echo e >&2; exit 3", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("o\n", "e\n", 3)
    data = "x" * 300_000 + "\n"
    assert engine.dolium("run", "--rm", "-i", "base:1", "cat", input=data).stdout == data
    assert engine.dolium("run", "--rm", "base:1", "nope", check=False).returncode == 127
    assert engine.dolium("run", "--rm", "--pull", "never", "no:image", "x", check=False).returncode == 125
    done = engine.dolium("run", "--rm", "--timings", "base:1", "true")
    for phase in ("snapshot", "network", "cgroup", "namespaces", "root file system", "exec", "total"):
        assert f"  {phase} " in done.stderr
    engine.dolium("run", "-d", "--name", "cli", "base:1", "sleep", "600")
    try:
        assert engine.dolium("exec", "cli", "sh", "-c", "exit 4", check=False).returncode == 4
        assert "cli" in engine.dolium("ps").stdout
        assert json.loads(engine.dolium("ps", "--format", "json").stdout)["State"] == "running"
        timings = json.loads(engine.dolium("inspect", "cli").stdout)[0]["Dolium"]["Timings"]
        assert timings["total"] > 0
        assert "PIDS" in engine.dolium("stats", "--no-stream").stdout
    finally:
        engine.dolium("rm", "-f", "cli")
    for words in (["nope"], ["run"], ["run", "--bad", "x"], ["ps", "--filter", "x"], ["run", "-p", "x", "base:1"]):
        done = engine.dolium(*words, check=False)
        assert done.returncode in (1, 125)
        assert done.stderr.startswith("dolium: ")
    for name in ("run", "exec", "ps", "logs", "pull", "daemon"):
        assert engine.dolium(name, "--help").stdout.startswith(f"usage: dolium {name}")


def test_a_container_that_a_commit_froze_goes_on_when_the_daemon_died(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.start()
    try:
        daemon.import_base()
        daemon.docker("run", "-d", "--name", "frozen", "base:1", "sleep", "600")
        daemon.docker("run", "-d", "--name", "paused", "base:1", "sleep", "600")
        daemon.docker("pause", "paused")
        instance = json.loads(daemon.api("GET", "/info")[1])["ID"]
        folders = host_layout().paths(f"/dolium/{instance}/{daemon.inspect('frozen')['Id']}")
        daemon.kill()
        manage.freeze(folders, True)  # as commit does, which keeps no record of it
        daemon.start()
        states = {name: daemon.inspect(name)["State"]["Status"] for name in ("frozen", "paused")}
        assert states == {"frozen": "running", "paused": "paused"}
        daemon.docker("exec", "frozen", "true")
    finally:
        daemon.close()


def test_small_things_as_docker_says_them(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "small", "--tmpfs", "/t:size=1.5m", "base:1", "sleep", "600")
    try:
        assert "size=1536k" in engine.docker("exec", "small", "grep", " /t ", "/proc/mounts").stdout
        assert "same name as its current name" in engine.docker("rename", "small", "small", check=False).stderr
    finally:
        engine.docker("rm", "-f", "small")
