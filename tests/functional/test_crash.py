"""Crash-only: the daemon is killed -9 at every fault point, then at random moments under load, and a new one started.

A witness container runs all the time: it must keep its init, its log must have no hole, and its end must be recorded.
Nothing of a half-done operation may be left, and what was acknowledged may not be lost.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon import DOCKER, Daemon, eventually

import dolium
from dolium import faults

pytestmark = pytest.mark.crash

for module in pkgutil.walk_packages(dolium.__path__, "dolium."):
    if not module.name.startswith("dolium.cli") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)

# test_crash_images.py and test_images_faults.py pass these, against a registry; test_snapshots.py those of drivers that are not
# the default.
BY_IMAGE_TESTS = {point for point in faults.POINTS if point.split(".")[0] in (
    "pull", "push", "image", "content", "snapshot", "driver", "lease", "commit", "save")}
# The witness keeps the bridge, and the kernel removes links with their namespaces: test_network_crash.py passes these.
BY_NETWORK_TESTS = {"network.bridge.made", "network.link.removed", "network.record.deleted", "dns.started", "dns.sandbox",
                    "network.parent.made", "network.child.made", "network.vxlan.made", "network.tunnel.made", "network.cni.intent",
                    "network.cni.added", "network.cni.removed"}
# Only passed when something ended meanwhile: test_ends_while_no_daemon_runs_are_recorded.
BY_ENDS = {"reconcile.cleaned"}
POINTS = sorted(faults.POINTS - BY_IMAGE_TESTS - BY_NETWORK_TESTS - BY_ENDS)
WITNESS = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path)
    one.start()
    one.import_base("base:1", 'CMD ["sh"]')
    one.docker("run", "-d", "--name", "witness", "base:1", "sh", "-c", WITNESS)
    try:
        yield one
    finally:
        one.close()


def check(daemon: Daemon, pid: int) -> None:
    """The invariants of a daemon that has come back."""
    state = daemon.inspect("witness")["State"]
    assert state["Running"], state
    assert state["Pid"] == pid
    numbers = [int(line) for line in daemon.docker("logs", "witness").stdout.split()]
    assert numbers == list(range(len(numbers)))
    daemon.docker("exec", "witness", "true")
    known = set(daemon.docker("ps", "-aq", "--no-trunc").stdout.split())
    data, run = daemon.folder / "data", daemon.folder / "run"
    roots = set(os.listdir(data / "snapshots" / "active"))
    spares = {name for name in roots if name.startswith("spare-")}
    assert roots - spares == known
    assert len(spares) <= 2 * 2, "an earlier daemon's spares are left"  # with --rm and without
    assert set(os.listdir(data / "containers")) - spares == known
    live = set(daemon.docker("ps", "-q", "--no-trunc").stdout.split())
    shims = set(os.listdir(run / "shims"))
    spares = {name for name in shims if name.startswith("spare-")}
    assert shims - spares == live
    assert len(spares) <= 4, "an earlier daemon's spare shims are left"
    instance = json.loads(daemon.api("GET", "/info")[1])["ID"]
    for hierarchy in os.listdir("/sys/fs/cgroup"):
        group = f"/sys/fs/cgroup/{hierarchy}/dolium/{instance}"
        if os.path.isdir(group):
            assert {name for name in os.listdir(group) if os.path.isdir(f"{group}/{name}")} - {"shims"} == live
    for name in live:
        assert daemon.inspect(name)["State"]["Pid"] > 0


def volumes_of(daemon: Daemon) -> tuple[list[str], list[str]]:
    """(folders of volumes, mounts in them)."""
    folder = daemon.folder / "data" / "volumes"
    with open("/proc/self/mountinfo") as file:
        return os.listdir(folder), [line.split()[4] for line in file if line.split()[4].startswith(f"{folder}/")]


def script(daemon: Daemon) -> None:
    """One of everything; stops when the daemon is gone."""
    for words in (("volume", "create", "--opt", "size=8m", "vol"),
                  ("create", "--name", "one", "-v", "vol:/data", "-v", "/anon", "-p", "127.0.0.1::80", "base:1", "sleep", "600"),
                  ("start", "one"), ("exec", "one", "true"), ("pause", "one"), ("unpause", "one"), ("stop", "-t", "0", "one"),
                  ("start", "one"), ("dolium", "volume", "attach", "one", "more:/mnt"),
                  ("dolium", "volume", "detach", "one", "more"), ("rm", "-fv", "one"), ("run", "--rm", "base:1", "echo", "done"),
                  ("volume", "rm", "vol"), ("create", "--name", "two", "base:1", "true"), ("rm", "two")):
        done = daemon.dolium(*words[1:], check=False) if words[0] == "dolium" else daemon.docker(*words, check=False)
        if done.returncode and daemon.process is not None and daemon.process.poll() is not None:
            return


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_point(daemon: Daemon, point: str) -> None:
    pid = daemon.inspect("witness")["State"]["Pid"]
    daemon.stop()
    daemon.start(fault=point)
    assert daemon.process is not None
    if daemon.process.poll() is None:
        script(daemon)
    if daemon.process.poll() is None:
        daemon.process.terminate()  # points on the way down
    assert daemon.wait() == -9, f"{point} was never passed"
    daemon.start()
    check(daemon, pid)
    if "one" in daemon.docker("ps", "--format", "{{.Names}}").stdout.split():
        mounts = [mount["Destination"] for mount in daemon.inspect("one")["Mounts"]]
        seen = daemon.docker("exec", "one", "cat", "/proc/mounts").stdout
        assert ("/mnt" in mounts) == (" /mnt " in seen), "the record and the kernel agree"
    # what was going on can be done, or ended, now
    created = daemon.docker("ps", "-aq", "--filter", "status=created").stdout.split()
    daemon.docker("rm", "-fv", "one", *created, check=False)
    assert daemon.docker("run", "--rm", "-v", "vol:/data", "base:1", "ls", "-A", "/data").stdout == "seed\n"
    daemon.docker("volume", "rm", "vol")
    daemon.docker("volume", "rm", "more", check=False)
    assert volumes_of(daemon) == ([], [])
    daemon.docker("run", "--name", "one", "-p", "127.0.0.1::80", "base:1", "true")
    daemon.docker("rm", "one")
    eventually(lambda: set(daemon.docker("ps", "-a", "--format", "{{.Names}}").stdout.split()) == {"witness"}, "all else is gone")
    check(daemon, pid)


def test_ends_while_no_daemon_runs_are_recorded(daemon: Daemon, tmp_path: Path) -> None:
    """Also when the next daemons are killed in the middle of recording them."""
    gate = tmp_path / "gate"
    gate.mkdir()
    wait = "while [ ! -e /gate/go ]; do sleep 0.01; done; echo last words; exit 33"
    daemon.docker("run", "-d", "--name", "ends", "-v", f"{gate}:/gate", "base:1", "sh", "-c", wait)
    daemon.docker("run", "-d", "--rm", "--name", "goes", "-v", f"{gate}:/gate", "base:1", "sh", "-c", wait)
    daemon.docker("run", "-d", "--name", "again", "--restart", "always", "-v", f"{gate}:/gate", "base:1", "sh", "-c",
                  "[ -e /gate/go ] && sleep 600; " + wait)
    pids = [daemon.inspect(name)["State"]["Pid"] for name in ("ends", "goes", "again")]
    daemon.kill()
    (gate / "go").touch()
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "all have ended")
    for point in ("reconcile.cleaned", "exit.recorded", "exit.shim"):
        daemon.start(fault=point)
        assert daemon.wait() == -9, point
    daemon.start()
    state = daemon.inspect("ends")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 33)
    assert daemon.docker("logs", "ends").stdout == "last words\n"
    eventually(lambda: "goes" not in daemon.docker("ps", "-a", "--format", "{{.Names}}").stdout, "--rm is kept")
    eventually(lambda: daemon.inspect("again")["State"]["Running"], "the restart policy is kept")


def test_an_end_between_two_runs_is_stored_as_one(daemon: Daemon) -> None:
    """Killed right after an end is on record: the restart policy is kept, as it is with no daemon killed."""
    daemon.stop()
    daemon.start(fault="exit.recorded")
    daemon.docker("run", "-d", "--name", "again", "--restart", "on-failure", "base:1", "sh", "-c",
                  "[ -e /ran ] && sleep 600; > /ran; exit 3", check=False)
    assert daemon.wait() == -9
    daemon.start()
    eventually(lambda: daemon.inspect("again")["State"]["Running"], "it runs again")
    assert daemon.inspect("again")["RestartCount"] == 1


def test_a_dead_shim_while_no_daemon_runs(daemon: Daemon) -> None:
    daemon.docker("run", "-d", "--name", "poor", "base:1", "sleep", "600")
    pid = daemon.inspect("poor")["State"]["Pid"]
    with open(f"/proc/{pid}/stat") as file:
        shim = int(file.read().rpartition(")")[2].split()[1])
    daemon.kill()
    os.kill(shim, 9)
    daemon.start()
    state = daemon.inspect("poor")["State"]
    assert state["Status"] == "exited"
    assert state["Error"]
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "its init is dead")


def test_an_attach_survives_the_daemon(daemon: Daemon) -> None:
    # by `attach`: with `run -i` output may come before the answer to `start` does, and without that docker gives up
    daemon.docker("create", "-i", "--name", "talk", "base:1", "cat")
    daemon.docker("start", "talk")
    with subprocess.Popen([DOCKER, "attach", "talk"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=daemon.env, text=True) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write("before\n")
        client.stdin.flush()
        assert client.stdout.readline() == "before\n"
        daemon.kill()
        client.stdin.write("without\n")
        client.stdin.flush()
        assert client.stdout.readline() == "without\n"
        daemon.start()
        client.stdin.write("after\n")
        client.stdin.close()
        assert client.stdout.read() == "after\n"
        client.wait(30)
    eventually(lambda: daemon.inspect("talk")["State"]["Status"] == "exited", "its end is recorded")
    assert daemon.inspect("talk")["State"]["ExitCode"] == 0


def test_killed_at_random_moments_under_load(daemon: Daemon) -> None:
    rng = random.Random(20261124)
    pid = daemon.inspect("witness")["State"]["Pid"]
    for turn in range(50):
        stop = threading.Event()

        def load(worker: int, stop: threading.Event = stop, turn: int = turn) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                name = f"w{turn}-{worker}-{number}"
                daemon.docker("run", "-d", "--name", name, "base:1", "sh", "-c", "echo x", check=False)
                daemon.docker("rm", "-f", name, check=False)

        workers = [threading.Thread(target=load, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        stop.wait(rng.uniform(0.02, 0.6))  # the random moment itself
        daemon.kill()
        stop.set()
        for worker in workers:
            worker.join()
        daemon.start()
        if turn % 5 == 4:
            check(daemon, pid)
    names = daemon.docker("ps", "-aq").stdout.split()
    assert names
    for container in json.loads(daemon.docker("inspect", *names).stdout):
        if container["Name"] != "/witness" and container["State"]["Status"] == "exited":
            assert container["State"]["ExitCode"] in (0, 137), container["State"]
    check(daemon, pid)



@pytest.mark.parametrize("run_folder_kept", [False, True])
def test_a_reboot(tmp_path: Path, run_folder_kept: bool) -> None:
    """All processes die at once, what the kernel held is gone, and the kernel calls itself by another boot id."""
    daemon = Daemon(tmp_path)
    daemon.start()
    daemon.import_base("base:1", 'CMD ["sh"]')
    sleep = ("base:1", "sh", "-c", "echo up; exec sleep 600")
    for name, policy in (("no", "no"), ("always", "always"), ("unless", "unless-stopped"), ("failure", "on-failure:3"),
                         ("stopped", "unless-stopped"), ("put-down", "always")):
        daemon.docker("run", "-d", "--name", name, "--restart", policy, "-p", "127.0.0.1::80", *sleep)
    daemon.docker("run", "-d", "--rm", "--name", "goes", *sleep)
    daemon.docker("stop", "-t", "0", "stopped", "put-down")
    before = {name: daemon.inspect(name)["State"] for name in ("no", "always")}
    instance = json.loads(daemon.api("GET", "/info")[1])["ID"]
    power_cut(daemon, instance)
    if not run_folder_kept:
        shutil.rmtree(tmp_path / "run")
    other = tmp_path / "boot_id"
    other.write_text("6f1a2c1e-0000-4000-8000-000000000001\n")
    daemon.start(boot_id=other)
    try:
        running = {"always", "unless", "failure", "put-down"}
        eventually(lambda: set(daemon.docker("ps", "--format", "{{.Names}}").stdout.split()) == running, "policies are kept")
        assert set(daemon.docker("ps", "-a", "--format", "{{.Names}}").stdout.split()) == running | {"no", "stopped"}
        state = daemon.inspect("no")["State"]
        assert (state["Status"], state["StartedAt"]) == ("exited", before["no"]["StartedAt"])
        assert state["Error"]
        assert daemon.inspect("always")["State"]["Pid"] != before["always"]["Pid"]
        eventually(lambda: daemon.docker("logs", "always").stdout == "up\nup\n", "the log goes on where it was")
        addresses = [daemon.inspect(name)["NetworkSettings"]["IPAddress"] for name in running]
        assert len(set(addresses)) == len(running)
        again = daemon.inspect("put-down")["State"]["Pid"]  # it was stopped by a person once; it is as any other now
        os.kill(again, signal.SIGKILL)
        eventually(lambda: daemon.inspect("put-down")["State"]["Pid"] not in (0, again), "its policy is kept from then on")
        daemon.docker("start", "no")
    finally:
        daemon.close()


def power_cut(daemon: Daemon, instance: str) -> None:
    """Ends every process of the instance at once, and takes what a kernel that stops takes along."""
    groups = sorted(glob.glob(f"/sys/fs/cgroup/*/dolium/{instance}"))
    daemon.kill()

    def alive() -> set[int]:
        found = set()
        for group in groups:
            for folder, _, _ in os.walk(group):
                found |= {int(pid) for pid in Path(folder, "cgroup.procs").read_text().split()}
        return found

    def dead() -> bool:
        for pid in alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not alive()

    eventually(dead, "all is dead")
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)
    for mount in Path("/proc/self/mountinfo").read_text().splitlines():
        if mount.split()[4].startswith(str(daemon.folder)):
            subprocess.run(["umount", "-l", mount.split()[4]], check=True)
    subprocess.run(["nft", "delete", "table", "ip", f"dolium-{instance}"], check=True)
    subprocess.run(["ip", "link", "del", f"dol{instance}"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")


@pytest.mark.timeout(300)
def test_a_hundred_at_once_have_a_hundred_addresses_also_when_the_daemon_dies_in_between(daemon: Daemon) -> None:
    daemon.docker("network", "create", "crowd")
    wish = {"Image": "base:1", "Cmd": ["sleep", "1000"], "HostConfig": {"NetworkMode": "crowd"}}
    for number in range(100):
        assert daemon.api("POST", f"/containers/create?name=one{number}", wish)[0] == 201

    def start_all(half: bool) -> None:
        begun = threading.Semaphore(0)
        answers: list[tuple[int, bytes]] = []

        def start(number: int) -> None:
            with contextlib.suppress(OSError, IndexError):  # the daemon is killed, and gives no answer
                answers.append(daemon.api("POST", f"/containers/one{number}/start"))
            begun.release()
        threads = [threading.Thread(target=start, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        if half:
            for _ in range(50):
                begun.acquire()
            daemon.kill()
        for thread in threads:
            thread.join()
        assert half or ({status for status, _ in answers} <= {204, 304} and len(answers) == 100), answers
    start_all(half=True)
    daemon.start()
    before = {name: daemon.inspect(name)["State"]["Pid"] for name in daemon.docker("ps", "-q").stdout.split()}
    assert len(before) > 50, "those that were told they run, and the witness"
    start_all(half=False)
    (row,) = json.loads(daemon.docker("network", "inspect", "crowd").stdout)
    assert len({one["IPv4Address"] for one in row["Containers"].values()}) == 100
    assert {name: daemon.inspect(name)["State"]["Pid"] for name in before} == before
    ends = [f"one{number}" for number in range(100)]
    said = daemon.docker("exec", "one0", "sh", "-c", " ".join(
        f"ping -c1 -W3 {name} > /dev/null && echo {name};" for name in ends[1::9]), check=False).stdout.split()
    assert said == ends[1::9], "by their names, each"
    daemon.docker("rm", "-f", *ends)
    daemon.docker("network", "rm", "crowd")
