"""What is cgroup v2's alone, on a machine without v1: `make test-vm` boots one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import CGROUPS, Bundle, Runtime, alive, bundle, needs, runtime, until
from daemon import Daemon, base_tar

__all__ = ["bundle", "runtime"]
pytestmark = [*needs, pytest.mark.skipif(not os.path.exists(f"{CGROUPS}/cgroup.controllers"),
                                         reason="needs cgroup v2 without v1 (the VM of make test-vm has it)")]
MIB = 1 << 20


def disk() -> str:
    """major:minor of some disk with a request queue: io.max takes no other."""
    names = [name for name in sorted(os.listdir("/sys/block")) if name.startswith(("vd", "sd", "nvme"))]
    if not names:
        pytest.skip("needs a disk for io.max")
    return Path("/sys/block", names[0], "dev").read_text().strip()


def value(bundle: Bundle, file: str) -> str:
    return Path(bundle.group(""), file).read_text().strip()


def table(bundle: Bundle, file: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in value(bundle, file).splitlines())


def test_every_limit_in_its_file(runtime: Runtime, bundle: Bundle) -> None:
    major, minor = map(int, disk().split(":"))
    rate = {"major": major, "minor": minor, "rate": MIB}
    bundle.linux["resources"].update({
        "memory": {"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB},
        "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 10_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 33},
        "blockIO": {"weight": 500, "throttleReadBpsDevice": [rate], "throttleWriteIOPSDevice": [{**rate, "rate": 100}]},
    })
    runtime.create(bundle)
    wanted = {"memory.max": str(64 * MIB), "memory.swap.max": str(32 * MIB), "memory.low": str(32 * MIB),
              "cpu.weight": "39", "cpu.max": "50000 100000", "cpu.max.burst": "10000", "cpuset.cpus": "0", "cpuset.mems": "0",
              "pids.max": "33", "io.weight": "default 4950", "io.max": f"{disk()} rbps={MIB} wbps=max riops=max wiops=100"}
    assert {file: value(bundle, file) for file in wanted} == wanted


def test_no_limit_is_max(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"].update({"memory": {"limit": -1, "swap": -1}, "pids": {"limit": -1},
                                      "cpu": {"quota": -1, "period": 50_000}})
    runtime.create(bundle)
    assert [value(bundle, file) for file in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")] == [
        "max", "max", "max", "max 50000"]


def test_idle_is_cpu_idle(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["cpu"] = {"idle": 1}
    runtime.create(bundle)
    assert value(bundle, "cpu.idle") == "1"


def test_huge_pages_reserved_ones_too(runtime: Runtime, bundle: Bundle) -> None:
    if "hugetlb" not in Path(CGROUPS, "cgroup.controllers").read_text().split():
        pytest.skip("needs the hugetlb controller")
    bundle.linux["resources"]["hugepageLimits"] = [{"pageSize": "2MB", "limit": 4 * MIB}]
    runtime.create(bundle)
    assert [value(bundle, f"hugetlb.2MB.{kind}max") for kind in ("", "rsvd.")] == [str(4 * MIB)] * 2


def test_update_is_checked_against_what_is_used(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.linux["resources"].update({"memory": {"limit": 64 * MIB, "swap": 96 * MIB}, "cpu": {"shares": 1024}})
    bundle.mount("/big", "tmpfs", "tmpfs", "size=60m")
    runtime.started(bundle.sh("head -c 30m /dev/zero > /big/file; touch /tmp/ready; exec sleep 1000"))
    until(lambda: (bundle.rootfs / "tmp/ready").exists(), "30 MiB are used")
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"memory": {"limit": 16 * MIB, "checkBeforeUpdate": True}}))
    assert "current usage" in runtime("update", "-r", str(file), "c", code=1).err
    assert value(bundle, "memory.max") == str(64 * MIB)
    runtime("update", "--memory-swap", "128m", "--cpu-idle", "1", "--blkio-weight", "200", "c")
    assert [value(bundle, name) for name in ("memory.swap.max", "cpu.idle", "io.weight")] == [str(64 * MIB), "1", "default 1920"]
    file.write_text(json.dumps({"memory": {"swappiness": 10}}))
    result = runtime("update", "-r", str(file), "c", code=1)
    assert "resources.memory.swappiness: cgroup v2 cannot do this" in result.err
    assert runtime.state()["status"] == "running"


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be frozen (fsfreeze): a write to it is an uninterruptible sleep, which v2's freezer
    cannot end (v1's can, since 6.1)."""
    image, place = tmp_path / "image", tmp_path / "stuck"
    place.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(place)], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs loop devices")
    yield place
    subprocess.run(["fsfreeze", "-u", str(place)], capture_output=True, check=False)
    until(lambda: subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0, "it is unmounted")


def in_uninterruptible_sleep(pids: list[str]) -> bool:
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # a short sleep of its, over since the list was read
        if state == "D":
            return True
    return False


def test_pause_waits_until_all_are_frozen(runtime: Runtime, bundle: Bundle, stuck: Path) -> None:
    """Nothing is called paused that still runs: what does not freeze is let go, and paused once it can be."""
    bundle.mount("/stuck", "bind", str(stuck), "rbind", "rw").sh("while [ ! -e /tmp/go ]; do sleep 0.05; done; : > /stuck/file; "
                                                                   "exec sleep 1000")
    bundle.process["capabilities"] = {kind: ["CAP_DAC_OVERRIDE"] for kind in ("bounding", "effective", "permitted")}
    runtime.started(bundle)
    subprocess.run(["fsfreeze", "-f", str(stuck)], check=True)
    (bundle.rootfs / "tmp/go").touch()
    procs = Path(bundle.group(""), "cgroup.procs")
    until(lambda: in_uninterruptible_sleep(procs.read_text().split()), "it waits for the frozen file system")
    result = runtime("pause", "c", code=1)
    assert "did not freeze within 10 s" in result.err and result.err.count("\n") == 1
    assert runtime.state()["status"] == "running"
    waiting = runtime.popen("pause", "c")
    until(lambda: value(bundle, "cgroup.freeze") == "1", "the second pause has asked")
    assert waiting.poll() is None
    subprocess.run(["fsfreeze", "-u", str(stuck)], check=True)
    assert waiting.wait(timeout=30) == 0 and runtime.state()["status"] == "paused"
    assert table(bundle, "cgroup.events")["frozen"] == "1"
    runtime("resume", "c")
    assert runtime.state()["status"] == "running"


def test_unified_files_are_written_last(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"].update({"memory": {"limit": 64 * MIB},
                                      "unified": {"memory.max": str(48 * MIB), "memory.high": str(40 * MIB), "memory.oom.group": "1"}})
    runtime.create(bundle)
    assert [value(bundle, file) for file in ("memory.max", "memory.high", "memory.oom.group")] == [
        str(48 * MIB), str(40 * MIB), "1"]


@pytest.mark.parametrize(("file", "word"), [("memory.nothing", "memory.nothing"), ("../cgroup.procs", "unified")])
def test_a_unified_file_that_is_none_is_told(runtime: Runtime, bundle: Bundle, file: str, word: str) -> None:
    bundle.linux["resources"]["unified"] = {file: "1"}
    result = runtime.run(bundle.sh("true"), code=1)
    assert word in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and bundle.groups() == []


def test_controllers_are_handed_down_on_the_whole_way(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["cgroupsPath"] = f"/dolium/deep{os.getpid()}/er/c"
    bundle.linux["resources"].update({"cpu": {"cpus": "0"}, "blockIO": {"weight": 100}})
    runtime.create(bundle)
    above = Path(bundle.group("")).parent
    try:
        while True:
            assert {"cpuset", "io", "memory", "pids", "cpu"} <= set((above / "cgroup.subtree_control").read_text().split()), above
            if str(above) == CGROUPS:
                break
            above = above.parent
    finally:
        runtime("delete", "--force", "c")
        for folder in (f"{CGROUPS}/dolium/deep{os.getpid()}/er", f"{CGROUPS}/dolium/deep{os.getpid()}"):
            os.rmdir(folder)  # groups above are nobody's to remove


# -- devices --

def devices(bundle: Bundle) -> Bundle:
    """Two nodes of the container's own: FUSE's and a disk. Only the rules decide who may open them."""
    if " fuse\n" not in Path("/proc/misc").read_text():
        pytest.skip("needs the fuse device")
    major, minor = map(int, disk().split(":"))
    bundle.linux["devices"] = [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                               {"path": "/dev/disk", "type": "b", "major": major, "minor": minor}]
    return bundle


DENY = {"allow": False, "access": "rwm"}
TRY = "for d in fuse disk null; do (: < /dev/$d) 2> /dev/null && echo $d; done; true"


@pytest.mark.parametrize(("rules", "opened"), [
    ([DENY], "null"),
    ([DENY, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "r"}], "fuse null"),
    ([DENY, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "w"}], "null"),
    ([DENY, {"allow": True, "type": "c", "access": "rw"}], "fuse null"),
    ([{"allow": True, "access": "rwm"}, {"allow": False, "type": "c", "major": 10, "minor": 229, "access": "r"}], "disk null"),
    ([{"allow": True, "access": "rwm"}], "fuse disk null"),
    ([DENY, {"allow": True, "type": "a", "major": -1, "minor": -1, "access": "rwm"}], "fuse disk null"),
    ([], "fuse disk null"),
])
def test_device_rules_are_felt(runtime: Runtime, bundle: Bundle, rules: list[dict[str, object]], opened: str) -> None:
    bundle.linux["resources"]["devices"] = rules
    assert runtime.run(devices(bundle).sh(TRY)).out.split() == opened.split()


def test_an_exec_is_under_the_rules_too(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(devices(bundle).sh("exec sleep 1000"))
    assert runtime("exec", "c", "sh", "-c", TRY).out.split() == ["null"]


def test_update_replaces_the_device_rules(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(devices(bundle).sh("exec sleep 1000"))
    rules = [DENY, {"allow": True, "type": "b", "access": "r"}]
    runtime("update", "-r", "-", "c", stdin=json.dumps({"devices": rules}))
    assert runtime("exec", "c", "sh", "-c", TRY).out.split() == ["disk", "null"]


# -- a running container --

def test_update_changes_limits_and_a_refused_one_changes_none(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    runtime("update", "--memory", "64m", "--memory-swap", "96m", "--pids-limit", "50", "--cpu-share", "512", "--cpu-quota", "20000",
            "c")
    wanted = {"memory.max": str(64 * MIB), "memory.swap.max": str(32 * MIB), "pids.max": "50", "cpu.weight": "20", "cpu.max": "20000 100000"}
    assert {file: value(bundle, file) for file in wanted} == wanted
    runtime("update", "-r", "-", "c", stdin=json.dumps({"unified": {"memory.high": str(60 * MIB)}}))
    assert value(bundle, "memory.high") == str(60 * MIB)
    done = runtime("update", "--memory", "32m", "--cpuset-cpus", "4000", "c", code=1)
    assert "cpuset.cpus" in done.err and {file: value(bundle, file) for file in wanted} == wanted


def test_a_controller_that_was_not_handed_down_comes_with_an_update(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    runtime("update", "--cpuset-cpus", "0", "c")
    assert value(bundle, "cpuset.cpus") == "0"


def test_pause_is_over_when_all_are_frozen(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("while :; do :; done & while :; do true; done"))
    runtime("pause", "c")
    assert value(bundle, "cgroup.freeze") == "1" and runtime.state()["status"] == "paused"
    until(lambda: table(bundle, "cgroup.events")["frozen"] == "1", "all are frozen")
    runtime("resume", "c")
    assert value(bundle, "cgroup.freeze") == "0" and runtime.state()["status"] == "running"


def test_statistics(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"].update({"memory": {"limit": 64 * MIB}, "pids": {"limit": 20}})
    runtime.started(bundle.sh("i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; exec sleep 1000"))
    until(lambda: json.loads(runtime("events", "--stats", "c").out)["data"]["cpu"]["usage"]["total"] > 0, "time is counted")
    data = json.loads(runtime("events", "--stats", "c").out)["data"]
    assert data["memory"]["usage"]["limit"] == 64 * MIB and 0 < data["memory"]["usage"]["usage"] < 64 * MIB
    assert data["pids"] == {"current": 1, "limit": 20} and data["memory"]["raw"]["anon"] > 0


# -- groups that are handed on --

def delegated(bundle: Bundle) -> Bundle:
    """A container with its own groups writable, as systemd inside wants them."""
    for mount in bundle.config["mounts"]:
        if mount["destination"] == "/sys/fs/cgroup":
            mount["options"] = [option for option in mount["options"] if option != "ro"]
    for mount in bundle.config["mounts"]:
        if mount["destination"] == "/sys":
            mount["options"] = [option for option in mount["options"] if option != "ro"]
    return bundle


MANAGES = ("cd /sys/fs/cgroup; mkdir init work; echo 0 > init/cgroup.procs; echo '+memory +pids' > cgroup.subtree_control || exit 7;"
           "echo 10 > work/pids.max; sh -c 'echo 0 > work/cgroup.procs; exec sleep 1000' & touch /tmp/ready; exec sleep 1000")


def test_a_container_manages_groups_of_its_own(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["pids"] = {"limit": 30}
    runtime.started(delegated(bundle).sh(MANAGES))
    until(lambda: (bundle.rootfs / "tmp/ready").exists(), "the groups are made")
    until(lambda: value(bundle, "work/cgroup.procs"), "work has a process")
    assert value(bundle, "work/pids.max") == "10" and value(bundle, "pids.max") == "30" and value(bundle, "cgroup.procs") == ""
    assert runtime("exec", "c", "cat", "/proc/self/cgroup").out == "0::/init\n"  # beside init: the top may hold no process
    assert len(json.loads(runtime("ps", "-f", "json", "c").out)) == 2
    runtime("delete", "--force", "c")
    assert bundle.groups() == [] and runtime.left() == []


def test_what_hides_in_a_group_below_is_killed_too(runtime: Runtime, bundle: Bundle) -> None:
    """Without a pid namespace nothing but the groups tells what belongs to the container."""
    bundle.namespace("pid", absent=True)
    runtime.started(delegated(bundle).sh(MANAGES))
    until(lambda: (bundle.rootfs / "tmp/ready").exists() and value(bundle, "work/cgroup.procs"), "work has a process")
    pid = int(value(bundle, "work/cgroup.procs").split()[0])
    runtime("delete", "--force", "c")
    assert bundle.groups() == []
    until(lambda: not alive(pid), "it is dead")


def test_another_containers_group_is_refused_when_its_processes_are_below(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    runtime.started(delegated(bundle).sh(MANAGES), identity="first")
    until(lambda: (bundle.rootfs / "tmp/ready").exists() and value(bundle, "work/cgroup.procs"), "work has a process")
    second = Bundle(tmp_path / "second", "true")
    second.linux["cgroupsPath"] = bundle.linux["cgroupsPath"]
    assert "it holds processes already" in runtime.run(second, identity="second", code=1).err
    assert runtime.state("first")["status"] == "running" and runtime.left() == ["first"]


def test_below_a_group_with_processes_no_limit_is_pretended(runtime: Runtime, bundle: Bundle) -> None:
    """v2 hands no controller down from a group that holds processes: systemd's service that runs these tests is one."""
    own = Path("/proc/self/cgroup").read_text().strip().removeprefix("0::")
    if own in ("/", ""):
        pytest.skip("needs to run in a cgroup of its own (systemd's)")
    bundle.linux["cgroupsPath"] = f"{own}/c"
    bundle.linux["resources"]["memory"] = {"limit": 64 * MIB}
    result = runtime.run(bundle.sh("true"), code=1)
    assert "memory.max" in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and bundle.groups() == []
    assert Path("/proc/self/cgroup").read_text().strip().removeprefix("0::") == own


def test_systemd_leaves_the_limits_alone(runtime: Runtime, bundle: Bundle) -> None:
    if not os.path.isdir("/run/systemd/system"):
        pytest.skip("needs systemd as init")
    bundle.linux["resources"].update({"memory": {"limit": 64 * MIB}, "cpu": {"cpus": "0"}, "blockIO": {"weight": 100}})
    runtime.started(bundle.sh("exec sleep 1000"))
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    subprocess.run(["systemd-run", "--wait", "--quiet", "-p", "MemoryMax=1G", "true"], check=True, timeout=60)
    assert (value(bundle, "memory.max"), value(bundle, "cpuset.cpus")) == (str(64 * MIB), "0")
    assert runtime.state()["status"] == "running"


# -- the daemon --

@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with an image, driven by `dolium` alone: the docker command line is not in the VM."""
    daemon = Daemon(tmp_path / "dolium")
    daemon.folder.mkdir()
    daemon.start()
    try:
        (daemon.folder / "base.tar").write_bytes(base_tar())
        daemon.dolium("import", str(daemon.folder / "base.tar"), "base:1")
        yield daemon
    finally:
        names = daemon.dolium("ps", "-aq", check=False).stdout.split()
        if names:
            daemon.dolium("rm", "-fv", *names, check=False)
        daemon.stop()


def test_the_engine_limits_and_tells_oom(engine: Daemon) -> None:
    script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; (: < /dev/null) && cat /proc/self/cgroup"
    done = engine.dolium("run", "--rm", "-m", "64m", "--pids-limit", "20", "--cpus", "0.5", "base:1", "sh", "-c", script)
    assert done.stdout.split("\n")[:4] == [str(64 * MIB), "20", "50000 100000", "0::/"]
    engine.dolium("run", "-d", "--name", "life", "-m", "32m", "base:1", "sleep", "1000")
    engine.dolium("pause", "life")
    assert "Paused" in engine.dolium("ps").stdout
    engine.dolium("unpause", "life")
    assert engine.dolium("exec", "life", "cat", "/sys/fs/cgroup/memory.max").stdout == f"{32 * MIB}\n"
    assert "32MiB" in engine.dolium("stats", "--no-stream", "life").stdout
    code = engine.dolium("run", "--name", "eats", "-m", "16m", "base:1", "sh", "-c", "exec tail /dev/zero", check=False).returncode
    assert code == 137
    status, text = engine.api("GET", "/containers/eats/json")
    assert status == 200 and json.loads(text)["State"]["OOMKilled"] is True
