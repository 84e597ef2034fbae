"""One conformance suite for all levels of isolation: what a container does is the same, whatever the wall around it.

Each body runs on dolium's own runtime, and on runc, crun and runsc under the same engine (make test-levels). What a level cannot
do is refused at create, in words that name a level that can: the table of those is here too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon import DOCKER, Daemon, eventually
from hierarchies import hugetlb

pytestmark = [pytest.mark.levels, pytest.mark.leaves("links", "netns")]  # prepared ones, of the daemon that all share

LEVELS = {"process": "dolium", "runc": "runc", "crun": "crun", "gvisor": "runsc"}


@pytest.fixture(scope="module")
def every_hierarchy() -> Iterator[None]:
    """For crun; before the daemon looks at what there is."""
    with hugetlb():
        yield


# runc behind a script, which does first what a file for the command says
FRONT = """#!/bin/sh
for word; do case $word in
    --version) echo runc version 1; exit ;;
    run | exec | state | pause | resume) command=$word; break ;;
esac; done
[ ! -e "$0.${command-other}" ] || . "$0.$command"
exec runc "$@"
"""


@pytest.fixture(scope="module")
def engine(every_hierarchy: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("levels"))
    (daemon.folder / "front").write_text(FRONT)
    (daemon.folder / "front").chmod(0o755)
    (daemon.folder / "etc/docker").mkdir(parents=True)
    (daemon.folder / "etc/docker/daemon.json").write_text(json.dumps(
        {"runtimes": {"front": {"path": str(daemon.folder / "front")}}, "default-runtime": "dolium"}))
    daemon.start()
    try:
        daemon.import_base("base:1", 'CMD ["sh"]')
        yield daemon
    finally:
        daemon.close()


class Level:
    """The docker command line with the level chosen."""

    def __init__(self, name: str, engine: Daemon) -> None:
        self.name, self.engine, self.runtime = name, engine, LEVELS[name]
        self.docker = engine.docker

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``docker run``."""
        return self.docker("run", "--runtime", self.runtime, *words, **options)

    def started(self, *words: str, name: str = "box") -> str:
        """A container of this name that runs; its id."""
        return self.run("-d", "--name", name, *words).stdout.strip()

    def exec(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``docker exec box``."""
        return self.docker("exec", "box", *words, **options)

    def inspect(self, name: str = "box") -> dict[str, Any]:
        return self.engine.inspect(name)

    def ended(self, name: str = "box") -> dict[str, Any]:
        """Its state once it has ended."""
        eventually(lambda: self.inspect(name)["State"]["Status"] == "exited", "it has ended")
        state: dict[str, Any] = self.inspect(name)["State"]
        return state


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, engine: Daemon) -> Iterator[Level]:
    if not any(os.path.exists(f"{place}/{LEVELS[request.param]}") for place in ("/usr/bin", "/usr/sbin")) and request.param != "process":
        pytest.skip(f"needs {LEVELS[request.param]}")
    one = Level(request.param, engine)
    yield one
    names = engine.docker("ps", "-aq").stdout.split()
    if names:
        engine.docker("rm", "-fv", *names)


# -- start, streams, exit --

def test_streams_and_exit_code(level: Level) -> None:
    done = level.run("--rm", "base:1", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_standard_input_is_read_to_its_end(level: Level) -> None:
    data = "0123456789abcdef" * 65536
    done = level.run("--rm", "-i", "base:1", "md5sum", input=data)
    assert done.stdout.split()[0] == hashlib.md5(data.encode()).hexdigest()
    assert level.run("--rm", "base:1", "cat", input="not for it").stdout == ""


@pytest.mark.parametrize(("program", "code"), [("nope", 127), ("/etc/passwd", 126), ("/nope/nope", 127)])
def test_a_program_that_cannot_be_run(level: Level, program: str, code: int) -> None:
    done = level.run("--name", "box", "base:1", program, check=False)
    assert done.returncode == code and program in done.stderr, done.stderr
    state = level.inspect()["State"]
    assert (state["Status"], state["ExitCode"], state["Pid"]) == ("created", code, 0) and program in state["Error"]
    assert level.engine.shims() == set()


def test_environment_user_and_place(level: Level) -> None:
    script = 'echo "$A|$HOME|$(id -u):$(id -g)|$(id -G)|$(pwd)|$(hostname)"'
    done = level.run("--rm", "-e", "A=b c", "-u", "app", "-w", "/made/here", "--hostname", "named", "base:1", "sh", "-c", script)
    assert done.stdout == "b c|/home/app|1000:1000|1000 2000|/made/here|named\n"


def test_a_terminal(level: Level) -> None:
    done = level.run("--rm", "-t", "base:1", "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && echo yes")
    assert done.stdout == "yes\n"  # what docker gets is raw; a pipe's reader sees its line ends turned
    level.started("-t", "base:1", "sh", "-c", "while :; do stty size; sleep 0.05; done")
    identity = level.inspect()["Id"]
    assert level.engine.api("POST", f"/containers/{identity}/resize?h=33&w=77")[0] == 200
    eventually(lambda: "33 77" in level.docker("logs", "box").stdout, "the new size is seen")


def test_init_is_pid_1_and_reaps(level: Level) -> None:
    assert level.run("--rm", "base:1", "sh", "-c", "echo $$").stdout == "1\n"
    level.started("--init", "base:1", "sh", "-c", "(sleep 0.01 &); sleep 600")
    level.exec("sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' ' | grep docker-init")
    assert level.docker("stop", "-t", "20", "box").returncode == 0
    assert level.inspect()["State"]["ExitCode"] == 143


def test_inspect_names_the_level(level: Level) -> None:
    level.started("base:1", "sleep", "600")
    found = level.inspect()
    own = found["Dolium"]
    assert own["Runtime"] == level.runtime == found["HostConfig"]["Runtime"]
    assert own["Isolation"] == ("gvisor" if level.name == "gvisor" else "process")
    assert ("Platform" in own) == (level.name == "gvisor")
    assert os.path.exists(f"/proc/{found['State']['Pid']}")
    assert own["Timings"]["total"] > 0


# -- files --

def test_root_is_read_only_on_request(level: Level) -> None:
    done = level.run("--rm", "--read-only", "--tmpfs", "/scratch:size=1m", "base:1", "sh", "-c",
                     "touch /x; echo kept > /scratch/x; cat /scratch/x; dd if=/dev/zero of=/scratch/y bs=1k count=2048 2>&1 | tail -n 1; "
                     "stat -c %s /scratch/y", check=False)
    assert "Read-only file system" in done.stderr
    assert done.stdout.startswith("kept\n") and int(done.stdout.split()[-1]) <= 1 << 20


def test_binds_and_volumes(level: Level, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from outside\n")
    done = level.run("--rm", "-v", f"{tmp_path}:/host", "-v", f"{tmp_path}:/ro:ro", "-v", "vol:/data", "base:1", "sh", "-c",
                     "cat /host/in; echo from inside > /host/out; touch /ro/x; cat /data/seed; echo more > /data/more", check=False)
    assert done.stdout == "from outside\nseed\n" and "Read-only file system" in done.stderr
    assert (tmp_path / "out").read_text() == "from inside\n" and not (tmp_path / "x").exists()
    assert level.run("--rm", "-v", "vol:/other", "base:1", "cat", "/other/more").stdout == "more\n"
    assert level.docker("run", "--rm", "-v", "vol:/other", "base:1", "ls", "/other").stdout == "more\nseed\n"
    level.docker("volume", "rm", "vol")


def test_what_is_written_stays_until_it_is_removed(level: Level) -> None:
    level.run("--name", "box", "base:1", "sh", "-c", "echo kept >> /kept; cat /kept; rm /data/seed")
    level.docker("start", "box")
    level.ended()
    assert level.docker("logs", "box").stdout == "kept\nkept\nkept\n"
    assert set(level.docker("diff", "box").stdout.split("\n")) >= {"A /kept", "D /data/seed"}
    level.docker("commit", "box", "made:1")
    assert level.run("--rm", "made:1", "cat", "/kept").stdout == "kept\nkept\n"
    level.docker("rm", "box")
    level.docker("rmi", "made:1")


def test_copies_in_and_out(level: Level, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("copied\n")
    level.started("base:1", "sh", "-c", "ls /tmp; while [ ! -e /tmp/file ]; do sleep 0.05; done; cat /tmp/file; exec sleep 600")
    eventually(lambda: level.exec("true", check=False).returncode == 0, "it runs")
    level.docker("cp", str(tmp_path / "file"), "box:/tmp/file")
    eventually(lambda: level.docker("logs", "box").stdout == "copied\n", "it sees the file")
    level.exec("sh", "-c", "echo theirs > /tmp/theirs")
    level.docker("cp", "box:/tmp/theirs", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "theirs\n"
    level.docker("stop", "-t", "0", "box")
    level.docker("cp", "box:/tmp/theirs", str(tmp_path / "again"))
    assert (tmp_path / "again").read_text() == "theirs\n"


# -- limits --

def test_memory_has_an_end(level: Level) -> None:
    level.run("--name", "box", "--memory", "64m", "base:1", "sh", "-c", "tail /dev/zero", check=False)
    state = level.ended()
    assert state["OOMKilled"] and state["ExitCode"] == 137


def test_limits_are_in_the_cgroup(level: Level) -> None:
    identity = level.started("--memory", "96m", "--pids-limit", "200", "--cpus", "0.5", "base:1", "sleep", "600")
    instance = json.loads(level.engine.api("GET", "/info")[1])["ID"]

    def value(controller: str, v1: str, v2: str) -> str:
        place = Path("/sys/fs/cgroup", controller)
        return (place / f"dolium/{instance}/{identity}/{v1}" if place.is_dir() else
                place.parent / f"dolium/{instance}/{identity}/{v2}").read_text().strip()

    assert value("memory", "memory.limit_in_bytes", "memory.max") == str(96 << 20)
    assert value("pids", "pids.max", "pids.max") == "200"
    assert value("cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    pid = level.inspect()["State"]["Pid"]
    assert identity in Path(f"/proc/{pid}/cgroup").read_text()
    shown = json.loads(level.docker("stats", "--no-stream", "--format", "json", "box").stdout)
    assert shown["MemUsage"].endswith("/ 96MiB") and not shown["MemUsage"].startswith("0B") and int(shown["PIDs"]) >= 1


def test_capabilities_and_limits_of_the_process(level: Level) -> None:
    script = "grep CapEff /proc/self/status; ulimit -n; chown 1 /tmp && echo may || echo may not"
    done = level.run("--rm", "--cap-drop", "ALL", "--ulimit", "nofile=123:456", "base:1", "sh", "-c", script, check=False)
    assert done.stdout.split("\n")[:3] == ["CapEff:\t0000000000000000", "123", "may not"]
    done = level.run("--rm", "--cap-add", "SYS_ADMIN", "--cap-drop", "CHOWN", "base:1", "grep", "CapEff", "/proc/self/status")
    held = int(done.stdout.split()[1], 16)
    assert held & 1 << 21 and not held & 1


# -- networks --

def test_two_talk_on_the_default_bridge(level: Level) -> None:
    level.started("base:1", "sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp")
    address = level.inspect()["NetworkSettings"]["IPAddress"]
    eventually(lambda: level.run("--rm", "base:1", "wget", "-qO-", f"http://{address}/", check=False).stdout == "hello\n", "an answer")
    assert level.docker("run", "--rm", "base:1", "wget", "-qO-", f"http://{address}/").stdout == "hello\n"  # from another level


def test_a_published_port(level: Level) -> None:
    level.started("-p", "127.0.0.1::80", "base:1", "sh", "-c", "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp")
    port = level.inspect()["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"]

    def asked() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=5) as answer:
                return bool(answer.read() == b"hello\n")
        except OSError:
            return False

    eventually(asked, "the port answers")
    level.docker("rm", "-f", "box")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(port)), 5)


def test_no_network(level: Level) -> None:
    done = level.run("--rm", "--network", "none", "base:1", "sh", "-c", "ip -4 addr | grep -c 'inet '; ping -c 1 -W 1 127.0.0.1 > /dev/null && echo lo")
    assert done.stdout == "1\nlo\n"


def test_names_on_a_network_of_ones_own(level: Level) -> None:
    level.docker("network", "create", "named")
    try:
        level.started("--network", "named", "--network-alias", "other", "base:1", "sh", "-c",
                      "echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp")
        for name in ("box", "other"):
            eventually(lambda name=name: level.run("--rm", "--network", "named", "base:1", "wget", "-qO-", f"http://{name}/",
                                                   check=False).stdout == "hello\n", f"{name} answers")
        level.exec("ping", "-c", "1", "-W", "5", "other")
        assert level.docker("run", "--rm", "--network", "named", "base:1", "wget", "-qO-", "http://box/").stdout == "hello\n"
        level.docker("rm", "-f", "box")
    finally:
        level.docker("network", "rm", "named")


@pytest.mark.leaves("children", "processes")
def test_a_name_server_that_dies_is_there_again_for_a_sandbox(engine: Daemon) -> None:
    """Whose packets never pass where others' name servers listen: it asks its bridge, at a port of its own."""
    engine.docker("network", "create", "named")
    try:
        engine.docker("run", "-d", "--name", "box", "--runtime", "runsc", "--network", "named", "base:1", "sleep", "600")
        server = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                  if f"{engine.folder}/run/dns.sock" in _words(pid)]
        assert len(server) == 1
        os.kill(server[0], signal.SIGKILL)
        eventually(lambda: engine.docker("exec", "box", "nslookup", "box", check=False).returncode == 0, "it answers again")
        engine.kill()
        engine.start()
        eventually(lambda: engine.docker("exec", "box", "nslookup", "box", check=False).returncode == 0, "with another daemon, too")
        engine.docker("rm", "-f", "box")
        assert "-names" not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        engine.docker("network", "create", "--internal", "inner")
        done = engine.docker("run", "--rm", "--runtime", "runsc", "--network", "inner", "base:1", "true", check=False)
        assert done.returncode == 125 and "internal" in done.stderr and "isolation process" in done.stderr
    finally:
        engine.docker("network", "rm", "-f", "named", "inner")


def test_a_sandbox_s_name_server_answers_nobody_else(engine: Daemon) -> None:
    """It is at an address of the host's, which other networks' containers can reach, and those from afar."""
    engine.docker("network", "create", "named")
    try:
        engine.docker("run", "-d", "--name", "box", "--runtime", "runsc", "--network", "named", "base:1", "sleep", "600")
        instance = json.loads(engine.api("GET", "/info")[1])["ID"]
        table = subprocess.run(["nft", "list", "map", "ip", f"dolium-{instance}-names", "who"], capture_output=True, text=True, check=True)
        place = re.search(r": (\S+) \. (\d+)", table.stdout)
        assert place is not None, table.stdout
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((place[1], int(place[2])))
            sock.send(b"\0\7\1\0\0\1\0\0\0\0\0\0\3box\0\0\1\0\1")
            engine.docker("exec", "box", "nslookup", "box")  # by the same socket, later
            with pytest.raises(BlockingIOError):
                sock.recv(512, socket.MSG_DONTWAIT)
    finally:
        engine.docker("rm", "-f", "box")
        engine.docker("network", "rm", "named")


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_what_a_sandbox_lacks_becomes_an_event(engine: Daemon) -> None:
    engine.docker("run", "--name", "lacks", "--runtime", "runsc", "base:1", "true")  # busybox's start asks for rseq
    seen = engine.docker("events", "--since", "60s", "--until", f"{time.time() + 0.01:.6f}", "--filter", "container=lacks", "--filter",
                         "event=unsupported-syscall", "--format", "{{.Actor.Attributes.syscall}}").stdout.split()
    assert seen == ["rseq"]
    engine.docker("rm", "lacks")


# -- signals, states --

def test_stop_asks_first(level: Level) -> None:
    level.started("base:1", "sh", "-c", "trap 'echo asked; exit 3' TERM; trap 'echo told' USR1; echo up; while :; do sleep 0.05; done")
    eventually(lambda: level.docker("logs", "box").stdout == "up\n", "it is up")
    level.docker("kill", "-s", "USR1", "box")
    eventually(lambda: level.docker("logs", "box").stdout == "up\ntold\n", "it was told")
    level.docker("stop", "-t", "20", "box")
    assert level.docker("logs", "box").stdout == "up\ntold\nasked\n"
    assert level.inspect()["State"]["ExitCode"] == 3


def test_stop_kills_what_does_not_listen(level: Level) -> None:
    level.started("base:1", "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done")
    level.docker("stop", "-t", "1", "box")
    assert level.inspect()["State"]["ExitCode"] == 137


def test_pause(level: Level) -> None:
    level.started("base:1", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    eventually(lambda: level.docker("logs", "box").stdout, "it counts")
    level.docker("pause", "box")
    before = level.docker("logs", "box").stdout
    assert level.inspect()["State"]["Paused"]
    assert "is paused" in level.exec("true", check=False).stderr
    assert level.docker("logs", "box").stdout == before
    level.docker("unpause", "box")
    eventually(lambda: level.docker("logs", "box").stdout != before, "it goes on")
    level.docker("pause", "box")
    level.docker("kill", "box")
    assert level.ended()["ExitCode"] == 137


def test_restarts(level: Level) -> None:
    level.started("--restart", "on-failure:2", "base:1", "sh", "-c", "echo run; exit 3")
    assert level.ended()["ExitCode"] == 3
    assert level.docker("logs", "box").stdout == "run\n" * 3
    level.docker("rm", "box")
    level.started("base:1", "sh", "-c", "date +%N; exec sleep 600")
    before = level.inspect()["State"]["Pid"]
    level.docker("restart", "-t", "0", "box")
    after = level.inspect()["State"]["Pid"]
    assert after != before and os.path.exists(f"/proc/{after}")
    eventually(lambda: len(level.docker("logs", "box").stdout.split()) == 2, "it ran twice")


def test_events(level: Level) -> None:
    name = f"of-{level.name}"
    level.run("--name", name, "--rm", "base:1", "true")
    eventually(lambda: not level.docker("ps", "-aq").stdout, "it is gone")
    seen = level.docker("events", "--since", "60s", "--until", f"{time.time():.6f}", "--filter", f"container={name}", "--filter", "type=container",
                        "--format", "{{.Action}}").stdout.split()
    assert [one for one in seen if one not in ("attach", "unsupported-syscall")] == ["create", "start", "die", "destroy"]


# -- in a running one --

def test_exec(level: Level) -> None:
    level.started("-e", "A=of the container", "base:1", "sleep", "600")
    done = level.exec("sh", "-c", "echo $A; echo err >&2; exit 5", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (5, "of the container\n", "err\n")
    done = level.docker("exec", "-u", "app", "-w", "/data", "-e", "B=own", "box", "sh", "-c", "id -u; pwd; echo $B")
    assert done.stdout == "1000\n/data\nown\n"
    assert level.docker("exec", "-i", "box", "md5sum", input="typed").stdout.split()[0] == hashlib.md5(b"typed").hexdigest()
    assert level.docker("exec", "-t", "box", "sh", "-c", "test -t 0 && echo terminal").stdout == "terminal\n"
    done = level.exec("nope", check=False)
    assert done.returncode == 127 and "nope" in done.stdout + done.stderr
    assert level.exec("sh", "-c", "kill -9 $$", check=False).returncode == 137
    level.docker("exec", "-d", "box", "sh", "-c", "echo there > /tmp/there")
    eventually(lambda: level.exec("cat", "/tmp/there", check=False).stdout == "there\n", "it ran in the background")


def test_attach(level: Level) -> None:
    level.started("-i", "base:1", "sh", "-c", "read line; echo got $line; exit 4")
    done = level.docker("attach", "--sig-proxy=false", "box", input="a line\n", check=False)
    assert (done.returncode, done.stdout) == (4, "got a line\n")


def test_top(level: Level) -> None:
    level.started("base:1", "sh", "-c", "sleep 601 & exec sleep 600")
    lines = level.docker("top", "box").stdout.splitlines()
    assert "PID" in lines[0]
    eventually(lambda: sum("sleep" in line for line in level.docker("top", "box").stdout.splitlines()) == 2, "both are listed")


# -- what goes wrong --

@pytest.mark.leaves("children", "processes")
def test_the_daemon_dies_and_another_one_comes(level: Level) -> None:
    level.started("base:1", "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; echo last words; exit 9")
    level.started("base:1", "sh", "-c", "trap 'exit 8' TERM; while :; do sleep 0.05; done", name="stays")
    pids = [level.inspect(name)["State"]["Pid"] for name in ("box", "stays")]
    level.exec("touch", "/tmp/go", check=False)  # it may end with the container
    level.engine.kill()
    eventually(lambda: not os.path.exists(f"/proc/{pids[0]}"), "one has ended with nobody there")
    level.engine.start()
    state = level.inspect()["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 9)
    assert level.docker("logs", "box").stdout == "last words\n"
    assert level.inspect("stays")["State"]["Pid"] == pids[1]
    assert level.docker("exec", "stays", "echo", "here").stdout == "here\n"
    level.docker("pause", "stays")
    level.engine.kill()
    level.engine.start()
    assert level.inspect("stays")["State"]["Paused"]
    level.docker("unpause", "stays")
    level.docker("stop", "-t", "20", "stays")
    assert level.inspect("stays")["State"]["ExitCode"] == 8


@pytest.mark.leaves("children", "processes")
@pytest.mark.parametrize("point", ["start.network", "start.launched", "exit.recorded", "remove.intent"])
def test_the_daemon_dies_in_the_middle(level: Level, point: str) -> None:
    engine = level.engine
    engine.stop()
    engine.start(fault=point)
    ends = "true" if point.startswith("exit") else "sleep"
    level.run("-d", "--name", "box", "base:1", ends, "600", check=False)
    if point.startswith("remove"):
        level.docker("rm", "-f", "box", check=False)
    assert engine.wait() == -9, f"{point} was never passed"
    engine.start()
    state = engine.docker("ps", "-a", "--format", "{{.State}}").stdout.strip()
    assert state in {"start.network": ("created",), "start.launched": ("running",), "exit.recorded": ("exited",),
                     "remove.intent": ("",)}[point]
    if state == "running":
        level.exec("true")
    if state:
        level.docker("rm", "-f", "box")
    level.run("--rm", "base:1", "true")
    states = engine.folder / "run/runtimes" / level.runtime
    eventually(lambda: not states.exists() or not list(states.iterdir()), "the runtime keeps nothing")
    assert engine.shims() == set()


def test_init_is_killed_from_outside(level: Level) -> None:
    level.started("base:1", "sh", "-c", "sleep 600 & exec sleep 600")
    os.kill(level.inspect()["State"]["Pid"], signal.SIGKILL)
    assert level.ended()["ExitCode"] == 137
    assert level.engine.shims() == set()
    level.docker("start", "box")
    level.exec("true")


@pytest.mark.leaves("processes")
def test_the_shim_is_killed(level: Level) -> None:
    level.started("base:1", "sleep", "600")
    pid = level.inspect()["State"]["Pid"]
    stat = Path(f"/proc/{pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    assert "shim" in level.ended()["Error"]
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "nothing of it runs")
    level.docker("start", "box")
    level.exec("true")


class Front:
    """A container on a runtime that misbehaves on command."""

    def __init__(self, engine: Daemon) -> None:
        self.engine = engine

    def does(self, command: str, script: str) -> None:
        """From now on, instead of, or before, the command."""
        (self.engine.folder / f"front.{command}").write_text(script)

    def behaves(self) -> None:
        for path in self.engine.folder.glob("front.*"):
            path.unlink()


@pytest.fixture
def front(engine: Daemon) -> Iterator[Front]:
    if not any(os.path.exists(f"{place}/runc") for place in ("/usr/bin", "/usr/sbin")):
        pytest.skip("needs runc")
    one = Front(engine)
    yield one
    one.behaves()
    engine.docker("rm", "-f", "box", check=False)


@pytest.mark.leaves("processes")
def test_the_shim_is_killed_while_a_runtime_works(front: Front) -> None:
    """What the runtime has begun is undone: nothing of it runs, and the container starts again."""
    engine, told = front.engine, front.engine.folder / "made"
    front.does("run", f'runc "$@" && echo $PPID > {told}.new && mv {told}.new {told}; exec sleep 600')
    engine.docker("create", "--name", "box", "--runtime", "front", "base:1", "sleep", "600")
    identity = engine.inspect("box")["Id"]
    with subprocess.Popen([DOCKER, "start", "box"], env=engine.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as starting:
        eventually(told.exists, "the container was made")
        states = engine.folder / "run/runtimes/front" / identity
        pid = json.loads((states / "state.json").read_text())["init_process_pid"]
        os.kill(int(told.read_text()), signal.SIGKILL)
        assert b"shim" in starting.communicate()[0] and starting.returncode == 1
    assert not states.exists()
    eventually(lambda: not os.path.exists(f"/proc/{pid}/exe") and "sleep 600" not in _words(pid), "nothing of it runs")
    front.behaves()
    engine.docker("start", "box")
    engine.docker("exec", "box", "true")


def test_a_paused_one_whose_runtime_fails(front: Front) -> None:
    """It is not said to go on, and can be killed."""
    engine = front.engine
    engine.docker("run", "-d", "--name", "box", "--runtime", "front", "base:1", "sleep", "600")
    engine.docker("pause", "box")
    for command in ("resume", "state"):
        front.does(command, "echo no >&2; exit 1")
    done = engine.docker("unpause", "box", check=False)
    assert done.returncode == 1 and "resume: no" in done.stderr, done.stderr
    assert engine.inspect("box")["State"]["Paused"]
    engine.docker("kill", "box")
    eventually(lambda: engine.inspect("box")["State"]["ExitCode"] == 137, "it has ended")


@pytest.mark.leaves("children", "processes")
@pytest.mark.parametrize("answer", ["nonsense", "[]", "{}", "\\377"])
def test_a_runtime_whose_state_is_nonsense_keeps_no_daemon_from_starting(front: Front, answer: str) -> None:
    engine = front.engine
    engine.docker("run", "-d", "--name", "box", "--runtime", "front", "base:1", "sleep", "600")
    front.does("state", f"printf '{answer}'; exit 0")
    engine.kill()
    engine.start()
    assert engine.inspect("box")["State"]["Status"] == "running"
    assert "no answer that is understood" in engine.tail()
    front.does("pause", "exit 1")
    done = engine.docker("pause", "box", check=False)
    assert done.returncode == 1 and "front pause" in done.stderr, done.stderr


@pytest.mark.leaves("children", "processes")
def test_a_shim_in_the_middle_of_an_exec_is_waited_for(front: Front) -> None:
    """By the next daemon: a runtime that takes its time ends no container."""
    engine, told = front.engine, front.engine.folder / "told"
    engine.docker("run", "-d", "--name", "box", "--runtime", "front", "base:1", "sleep", "600")
    pid = engine.inspect("box")["State"]["Pid"]
    front.does("exec", f"touch {told}; sleep 11; exit 1")
    with subprocess.Popen([DOCKER, "exec", "box", "true"], env=engine.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as asking:
        eventually(told.exists, "the exec is under way")
        engine.kill()
        asking.communicate()
    engine.start()
    assert engine.inspect("box")["State"]["Pid"] == pid
    front.behaves()
    engine.docker("exec", "box", "true")


# -- what a level cannot do --

REFUSED = {
    "gvisor": ["--network host", "--pid host", "--ipc host", "--uts host", "--device /dev/null", "--sysctl net.core.somaxconn=5",
               "--egress allow=example.org:443", "--userns auto", "--ipc shareable"],
    "runc": ["-v /tmp:/tmp:rshared"], "crun": ["-v /tmp:/tmp:rshared"]}


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, many in REFUSED.items() for flags in many])
def test_what_a_level_cannot_do_is_refused_at_create(engine: Daemon, name: str, flags: str) -> None:
    words = flags.split()
    done = engine.dolium("create", "--runtime", LEVELS[name], *words, "base:1", "true", check=False)
    assert done.returncode == 1 and words[0].replace("-v", "propagation shared") in done.stderr, done.stderr
    assert f"runtime {LEVELS[name]}" in done.stderr and "--isolation process" in done.stderr
    assert engine.docker("ps", "-aq").stdout == ""
    engine.docker("rm", engine.dolium("create", *words, "base:1", "true").stdout.strip())


def test_what_does_not_reach_a_sandbox_is_refused(engine: Daemon) -> None:
    engine.docker("network", "create", "late")
    engine.docker("run", "-d", "--name", "box", "--isolation", "gvisor", "base:1", "sleep", "600")
    try:
        for done in (engine.docker("network", "connect", "late", "box", check=False),
                     engine.dolium("volume", "attach", "box", "vol:/mnt", check=False)):
            assert done.returncode == 1 and "runs with isolation gvisor" in done.stderr, done.stderr
        engine.docker("stop", "-t", "0", "box")
        engine.docker("network", "connect", "late", "box")
        engine.docker("start", "box")
        assert engine.docker("exec", "box", "sh", "-c", "ip addr | grep -c eth").stdout >= "2"
    finally:
        engine.docker("rm", "-fv", "box")
        engine.docker("network", "rm", "late")


def test_a_sandbox_shares_its_namespaces_with_nobody(engine: Daemon) -> None:
    engine.docker("run", "-d", "--name", "box", "--runtime", "runsc", "base:1", "sleep", "600")
    for flag in ("--network", "--pid"):
        done = engine.docker("create", flag, "container:box", "base:1", "true", check=False)
        assert done.returncode == 1 and "keeps its namespaces to itself" in done.stderr, done.stderr
    engine.docker("rm", "-f", "box")


def test_names_of_levels_and_runtimes(engine: Daemon) -> None:
    def create(*words: str) -> subprocess.CompletedProcess[str]:
        return engine.docker("create", *words, "base:1", "true", check=False)

    assert "unknown or invalid runtime name: other" in create("--runtime", "other").stderr
    assert "invalid isolation" in create("--isolation", "hyperv").stderr
    assert "does not go with --runtime crun" in create("--isolation", "gvisor", "--runtime", "crun").stderr
    assert "does not go with --runtime runsc" in create("--isolation", "process", "--runtime", "runsc").stderr
    for words, runtime in (((), "dolium"), (("--isolation", "process"), "dolium"), (("--isolation", "gvisor"), "runsc"),
                           (("--runtime", "runc"), "runc")):
        made = create(*words).stdout.strip()
        assert engine.inspect(made)["HostConfig"]["Runtime"] == runtime
        engine.docker("rm", made)
    info = json.loads(engine.docker("info", "--format", "json").stdout)
    assert {"dolium", "runc", "crun", "runsc"} <= info["Runtimes"].keys() and info["DefaultRuntime"] == "dolium"
