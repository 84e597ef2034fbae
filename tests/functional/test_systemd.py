"""The systemd cgroup driver, with a systemd to talk to: `make test-vm`. A fake bus and a host without systemd, anywhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import CGROUPS, FRONT, Bundle, Runtime, alive, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs
MIB = 1 << 20
BOOTED = os.path.isdir("/run/systemd/system") and os.path.exists(f"{CGROUPS}/cgroup.controllers")
with_systemd = pytest.mark.skipif(not BOOTED, reason="needs systemd as init and cgroup v2 (the VM of make test-vm has them)")


class Systemd(Runtime):
    """The runtime as dockerd with native.cgroupdriver=systemd and CRI-O call it: --systemd-cgroup on every command."""

    def __call__(self, *words: str, **more: Any) -> Any:
        return super().__call__("--systemd-cgroup", *words, **more)

    def create(self, bundle: Bundle, *words: str, identity: str = "c", **more: Any) -> str:
        self.ids.append(identity)
        bundle.write()
        with open(os.devnull, "r+") as null, open(self.base / "create.err", "w") as err:
            subprocess.run([FRONT, "--root", str(self.root), "--systemd-cgroup", "create", "--bundle", str(bundle.path), *words,
                            identity], stdin=null, stdout=null, stderr=err, timeout=60, check=True)
        return identity


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Systemd]:
    one = Systemd(tmp_path)
    yield one
    one.close()
    if BOOTED:  # a slice stays, as systemd keeps it; these are the tests' own
        subprocess.run(["systemctl", "stop", "dolium.slice"], check=True, timeout=60)


@pytest.fixture
def unit(bundle: Bundle) -> str:
    """The bundle asks for a scope of a slice of its own; its name."""
    name = f"t{os.getpid()}"
    bundle.linux["cgroupsPath"] = f"dolium-test.slice:dolium:{name}"
    return f"dolium-{name}.scope"


def folder(unit: str) -> Path:
    return Path(f"{CGROUPS}/dolium.slice/dolium-test.slice/{unit}")


def show(unit: str, *names: str) -> dict[str, str]:
    done = subprocess.run(["systemctl", "show", *(f"-p{name}" for name in names), unit], capture_output=True, text=True, check=True,
                          timeout=60)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def value(unit: str, file: str) -> str:
    return (folder(unit) / file).read_text().strip()


LIMITS = {"memory": {"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB},
          "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
          "pids": {"limit": 33}, "blockIO": {"weight": 500}, "unified": {"memory.high": str(48 * MIB)},
          "hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}]}
FILES = {"memory.max": str(64 * MIB), "memory.swap.max": str(32 * MIB), "memory.low": str(32 * MIB), "memory.high": str(48 * MIB),
         "cpu.weight": "39", "cpu.max": "50000 100000", "cpuset.cpus": "0", "cpuset.mems": "0", "pids.max": "33",
         "io.weight": "default 4950", "hugetlb.2MB.max": str(4 * MIB)}
SHOWN = {"MemoryMax": str(64 * MIB), "MemorySwapMax": str(32 * MIB), "MemoryLow": str(32 * MIB), "MemoryHigh": str(48 * MIB),
         "CPUWeight": "39", "CPUQuotaPerSecUSec": "500ms", "CPUQuotaPeriodUSec": "100ms", "AllowedCPUs": "0", "TasksMax": "33",
         "AllowedMemoryNodes": "0", "IOWeight": "4950", "Delegate": "yes", "Slice": "dolium-test.slice", "ActiveState": "active"}


@with_systemd
def test_limits_are_properties_and_files_and_stay(driver: Systemd, bundle: Bundle, unit: str) -> None:
    if "hugetlb" not in Path(CGROUPS, "cgroup.controllers").read_text().split():
        pytest.skip("needs the hugetlb controller")
    bundle.linux["resources"].update(LIMITS)
    bundle.linux["devices"] = [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]
    bundle.config["annotations"] = {"org.systemd.property.TimeoutStopUSec": "uint64 3000000",
                                    "org.systemd.property.CollectMode": "'inactive-or-failed'"}
    driver.started(bundle.sh("while :; do (: < /dev/fuse) 2> /dev/null && touch /tmp/opened; sleep 0.2; done"))
    assert {file: value(unit, file) for file in FILES} == FILES
    assert show(unit, *SHOWN) == SHOWN
    assert show(unit, "TimeoutStopUSec", "CollectMode") == {"TimeoutStopUSec": "3s", "CollectMode": "inactive-or-failed"}
    pid = str(driver.state()["pid"])
    assert value(unit, "cgroup.procs").split()[0] == pid
    assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/dolium.slice/dolium-test.slice/{unit}\n"
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    subprocess.run(["systemctl", "set-property", "--runtime", unit, "CPUWeight=39"], check=True, timeout=60)  # realizes it again
    assert {file: value(unit, file) for file in FILES} == FILES
    assert driver("exec", "c", "sh", "-c", "cat /proc/self/cgroup; (: < /dev/fuse) || echo denied").out.splitlines() == [
        "0::/", "denied"]
    assert not (bundle.rootfs / "tmp/opened").exists()


@with_systemd
def test_the_life_of_a_container(driver: Systemd, bundle: Bundle, unit: str) -> None:
    driver.create(bundle.sh("echo $$ > /tmp/started; exec sleep 1000"))
    assert driver.state()["status"] == "created" and show(unit, "ActiveState")["ActiveState"] == "active"
    driver("start", "c")
    until(lambda: (bundle.rootfs / "tmp/started").exists(), "it runs")
    assert json.loads(driver("list", "-f", "json").out)[0]["status"] == "running"
    driver("exec", "c", "sh", "-c", "sleep 999 > /dev/null 2>&1 &")
    assert len(json.loads(driver("ps", "-f", "json", "c").out)) == 2 == len(value(unit, "cgroup.procs").split())
    driver("update", "--memory", "80m", "--pids-limit", "44", "--cpu-quota", "25000", "--cpu-period", "50000", "c")
    assert [value(unit, file) for file in ("memory.max", "pids.max", "cpu.max")] == [str(80 * MIB), "44", "25000 50000"]
    assert show(unit, "MemoryMax", "TasksMax", "CPUQuotaPerSecUSec") == {
        "MemoryMax": str(80 * MIB), "TasksMax": "44", "CPUQuotaPerSecUSec": "500ms"}
    subprocess.run(["systemctl", "daemon-reload"], check=True, timeout=60)
    assert value(unit, "memory.max") == str(80 * MIB)
    driver("pause", "c")
    assert driver.state()["status"] == "paused" and "frozen 1" in value(unit, "cgroup.events").splitlines()
    driver("resume", "c")
    pid = driver.state()["pid"]
    driver("kill", "-a", "c", "KILL")
    until(lambda: not alive(pid), "all are dead")
    driver("delete", "c")
    assert not folder(unit).exists() and driver.left() == []
    assert show(unit, "LoadState")["LoadState"] == "not-found"


@with_systemd
def test_stopping_the_scope_ends_the_container(driver: Systemd, bundle: Bundle, unit: str) -> None:
    driver.started(bundle.sh("trap 'exit 0' TERM; touch /tmp/ready; while :; do sleep 0.1; done"))
    until(lambda: (bundle.rootfs / "tmp/ready").exists(), "it listens to TERM")
    subprocess.run(["systemctl", "stop", unit], check=True, timeout=60)
    driver.wait_status("stopped")
    assert not folder(unit).exists()
    driver("delete", "c")
    assert driver.left() == []


@with_systemd
def test_run_in_the_foreground_leaves_nothing(driver: Systemd, bundle: Bundle, unit: str) -> None:
    bundle.write()
    result = driver("run", "--bundle", str(bundle.sh("cat /proc/self/cgroup; exit 7").write()), "c", code=7)
    assert result.out == "0::/\n"
    assert not folder(unit).exists() and show(unit, "LoadState")["LoadState"] == "not-found" and driver.left() == []


@with_systemd
@pytest.mark.parametrize(("path", "expected"), [
    (None, "/system.slice/dolium-c.scope"), ("", "/system.slice/dolium-c.scope"), ("::named", "/system.slice/-named.scope"),
    ("-.slice:dolium:top", "/dolium-top.scope")])
def test_where_the_scope_is(driver: Systemd, bundle: Bundle, path: str | None, expected: str) -> None:
    bundle.linux.pop("cgroupsPath")
    if path is not None:
        bundle.linux["cgroupsPath"] = path
    driver.started(bundle.sh("exec sleep 1000"))
    assert Path(f"/proc/{driver.state()['pid']}/cgroup").read_text() == f"0::{expected}\n"


@with_systemd
def test_without_a_cgroup_namespace_the_own_group_is_shown(driver: Systemd, bundle: Bundle, unit: str) -> None:
    bundle.namespace("cgroup", absent=True)
    bundle.linux["resources"]["pids"] = {"limit": 21}
    driver.started(bundle.sh("cat /sys/fs/cgroup/pids.max > /tmp/seen; touch /tmp/ready; exec sleep 1000"))
    until(lambda: (bundle.rootfs / "tmp/ready").exists(), "it has looked")
    assert (bundle.rootfs / "tmp/seen").read_text() == "21\n"


@with_systemd
def test_a_name_in_use_is_refused_and_left_alone(driver: Systemd, bundle: Bundle, unit: str, tmp_path: Path) -> None:
    driver.started(bundle.sh("exec sleep 1000"), identity="first")
    second = Bundle(tmp_path / "second", "true")
    second.linux["cgroupsPath"] = bundle.linux["cgroupsPath"]
    result = driver("run", "--bundle", str(second.write()), "second", code=1)
    assert f"unit {unit} exists already" in result.err and result.err.count("\n") == 1
    assert driver.state("first")["status"] == "running" and driver.left() == ["first"]
    assert show(unit, "ActiveState")["ActiveState"] == "active"


@with_systemd
def test_a_failed_unit_of_the_name_is_forgotten(driver: Systemd, bundle: Bundle, unit: str) -> None:
    bundle.linux["resources"].update({"memory": {"limit": 16 * MIB, "swap": 16 * MIB}})
    for _ in range(2):  # the second finds what the first has left
        bundle.sh("(exec tail /dev/zero); touch /tmp/past; exec sleep 1000")
        (bundle.rootfs / "tmp/past").unlink(missing_ok=True)
        driver.started(bundle)
        until(lambda: (bundle.rootfs / "tmp/past").exists(), "something in it was killed for want of memory")
        driver("kill", "c", "KILL")
        driver.wait_status("stopped")
        driver("delete", "c")
    assert show(unit, "LoadState")["LoadState"] == "not-found"


@with_systemd
def test_what_is_refused_before_anything_is_made(driver: Systemd, bundle: Bundle) -> None:
    resources = bundle.linux["resources"]
    for path, more, words in (("/a/b", {}, 'linux.cgroupsPath: expected "slice:prefix:name"'),
                              ("a:b:c:d", {}, 'linux.cgroupsPath: expected "slice:prefix:name"'),
                              ("no-such:b:c", {}, "'no-such' is not the name of a slice"),
                              ("a.slice:b:c.slice", {}, "is a slice"),
                              ("a.slice:b:c", {"cpu": {"cpus": "x"}}, "linux.resources.cpu.cpus")):
        bundle.linux.update(cgroupsPath=path, resources={**resources, **more})
        result = driver("run", "--bundle", str(bundle.write()), "c", code=1)
        assert words in result.err and result.err.count("\n") == 1 and driver.left() == []


@with_systemd
def test_what_systemd_refuses_is_told_and_undone(driver: Systemd, bundle: Bundle, unit: str) -> None:
    bundle.config["annotations"] = {"org.systemd.property.NoSuchThing": "true"}
    result = driver("run", "--bundle", str(bundle.write()), "c", code=1)
    assert "NoSuchThing" in result.err and unit in result.err and result.err.count("\n") == 1
    assert driver.left() == [] and not folder(unit).exists()


@with_systemd
def test_a_limit_the_kernel_refuses_is_undone(driver: Systemd, bundle: Bundle, unit: str) -> None:
    bundle.linux["resources"]["unified"] = {"memory.nothing": "1"}
    result = driver("run", "--bundle", str(bundle.write()), "c", code=1)
    assert "memory.nothing" in result.err and driver.left() == [] and not folder(unit).exists()
    assert show(unit, "LoadState")["LoadState"] == "not-found"


@with_systemd
def test_a_bus_that_hangs_is_given_up(runtime: Runtime, bundle: Bundle, unit: str, tmp_path: Path) -> None:
    """A socket that is accepted by the kernel and answered by nobody: one error within the deadline, and nothing stays."""
    with socket.socket(socket.AF_UNIX) as fake:
        fake.bind(str(tmp_path / "bus"))
        fake.listen()
        env = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/bus"}
        runtime.ids.append("c")
        result = runtime("--systemd-cgroup", "run", "--bundle", str(bundle.write()), "c", code=1, env=env, timeout=50)
    assert "no answer to authentication within 10 s" in result.err and unit in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and not folder(unit).exists()


@with_systemd
def test_deleting_without_a_bus_goes_on_by_file(driver: Systemd, bundle: Bundle, unit: str, tmp_path: Path) -> None:
    driver.started(bundle.sh("exec sleep 1000"))
    nobody = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={tmp_path}/nobody"}
    result = driver("update", "--pids-limit", "9", "c", code=1, env=nobody)
    assert "No such file or directory" in result.err and value(unit, "pids.max") != "9"
    driver("delete", "--force", "c", env=nobody)
    assert driver.left() == []
    until(lambda: not folder(unit).exists(), "systemd sees that it is empty")


@with_systemd
@pytest.mark.skipif(shutil.which("criu") is None, reason="needs the package criu")
def test_checkpoint_and_restore(driver: Systemd, bundle: Bundle, unit: str, tmp_path: Path) -> None:
    """The scope is another one with the same limits; a restore that fails leaves none."""
    images, flags = tmp_path / "images", ("-b", str(bundle.path), "--image-path", str(tmp_path / "images"))
    bundle.linux["resources"].update(LIMITS)
    bundle.linux["resources"].pop("hugepageLimits")
    driver.started(bundle.sh("i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done"))
    count = bundle.rootfs / "tmp/count"
    until(lambda: count.exists() and count.read_text() > "1", "it counts")
    driver("checkpoint", "--image-path", str(images), "c")
    assert not folder(unit).exists() and driver.left() == []

    bundle.hook("prestart", "/bin/false").write()
    assert "prestart hook /bin/false: exit status 1" in driver("restore", "-d", *flags, "c", code=1).err
    assert not folder(unit).exists() and driver.left() == [] and show(unit, "ActiveState")["ActiveState"] == "inactive"

    del bundle.config["hooks"]
    bundle.write()
    driver("restore", "-d", *flags, "c")
    before = int(count.read_text() or 0)
    until(lambda: int(count.read_text() or 0) > before + 2, "it goes on")
    state = driver.state()
    assert state["status"] == "running"
    inside = value(unit, "cgroup.procs").split()
    assert str(state["pid"]) in inside
    assert all(os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{state['pid']}/ns/pid") for pid in inside if alive(int(pid)))
    assert {name: value(unit, name) for name in FILES if "huge" not in name} == {
        name: text for name, text in FILES.items() if "huge" not in name}
    wanted = {name: text for name, text in SHOWN.items() if name != "Description"}
    assert show(unit, *wanted) == wanted
    driver("delete", "--force", "c")
    assert not folder(unit).exists() and driver.left() == []


@pytest.mark.skipif(BOOTED, reason="needs a machine whose init is not systemd")
def test_without_systemd_it_says_so(runtime: Runtime, bundle: Bundle) -> None:
    result = runtime("--systemd-cgroup", "run", "--bundle", str(bundle.write()), "c", code=1)
    assert "--systemd-cgroup: this host was not booted with systemd" in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and bundle.groups() == []
