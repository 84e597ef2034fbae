"""Limits as the kernel has them, and what happens at them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bundles import CGROUPS, RUNC, Bundle, Runtime, bundle, needs, runtime, until

__all__ = ["bundle", "runtime"]
pytestmark = needs
V1 = os.path.isdir(f"{CGROUPS}/memory")
MIB = 1 << 20


def limits(bundle: Bundle) -> Bundle:
    bundle.linux["resources"].update({
        "memory": {"limit": 64 * MIB, "reservation": 32 * MIB},
        "pids": {"limit": 33},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"},
    })
    return bundle


def test_limits_are_in_the_kernel(runtime: Runtime, bundle: Bundle) -> None:
    runtime.create(limits(bundle))
    if V1:
        wanted = {"memory": {"memory.limit_in_bytes": str(64 * MIB), "memory.soft_limit_in_bytes": str(32 * MIB)},
                  "pids": {"pids.max": "33"}, "cpuset": {"cpuset.cpus": "0"},
                  "cpu": {"cpu.shares": "512", "cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}}
    else:
        wanted = {"memory": {"memory.max": str(64 * MIB), "memory.low": str(32 * MIB)}, "pids": {"pids.max": "33"},
                  "cpuset": {"cpuset.cpus": "0"}, "cpu": {"cpu.weight": "20", "cpu.max": "50000 100000"}}
    for controller, files in wanted.items():
        for name, value in files.items():
            assert Path(bundle.group(controller), name).read_text().strip() == value, name
    pid = str(runtime.state()["pid"])
    for folder in bundle.groups():
        assert Path(folder, "cgroup.procs").read_text().split() == [pid], folder


@pytest.mark.skipif(not V1 or not os.path.exists(f"{CGROUPS}/blkio/blkio.bfq.io_serviced"), reason="needs the BFQ scheduler on v1")
def test_weights_of_the_scheduler_that_has_them(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["blockIO"] = {"weight": 300}
    runtime.create(bundle)
    file = Path(bundle.group("blkio"), "blkio.bfq.weight")
    assert file.read_text() == "300\n"
    runtime("update", "--blkio-weight", "400", "c")
    assert file.read_text() == "400\n"


def test_the_callers_own_groups_are_not_touched(runtime: Runtime, bundle: Bundle) -> None:
    before = Path("/proc/self/cgroup").read_text()
    runtime.run(limits(bundle).sh("true"))
    assert Path("/proc/self/cgroup").read_text() == before and bundle.groups() == []


def test_pids_limit_is_felt(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["pids"] = {"limit": 5}
    bundle.sh("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo past")
    result = runtime.run(bundle, code=None)
    assert "fork" in result.err and "past" not in result.out


def test_out_of_memory_kills_in_the_container_only(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["memory"] = {"limit": 16 * MIB, "swap": 16 * MIB} if os.path.exists(
        f"{CGROUPS}/memory/memory.memsw.limit_in_bytes") else {"limit": 16 * MIB}
    bundle.mount("/big", "tmpfs", "tmpfs", "size=200m")
    bundle.sh("dd if=/dev/zero of=/big/x bs=1M count=100 2> /dev/null; echo code=$?; rm /big/x")
    assert runtime.run(bundle).out == "code=137\n"


def test_a_memory_limit_too_small_to_start_in_is_told(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["memory"] = {"limit": 4096}
    result = runtime.run(bundle.sh("true"), code=1)
    assert "memory" in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and bundle.groups() == []


def test_another_containers_group_is_refused_and_left_alone(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    runtime.started(bundle.sh("exec sleep 1000"), identity="first")
    second = Bundle(tmp_path / "second", "true")
    second.linux["cgroupsPath"] = bundle.linux["cgroupsPath"]
    assert "it holds processes already" in runtime.run(second, identity="second", code=1).err
    assert runtime.state("first")["status"] == "running" and runtime.left() == ["first"]
    assert len(bundle.groups()) > 0


def test_default_group_is_below_dolium(runtime: Runtime, bundle: Bundle) -> None:
    del bundle.linux["cgroupsPath"]
    identity = f"default-{os.getpid()}"
    bundle.namespace("cgroup", absent=True).process["args"] = ["cat", "/proc/self/cgroup"]
    # a hierarchy that lives on after its mount has gone is nobody's to join
    mounted = {name for one in os.listdir("/sys/fs/cgroup") for name in one.split(",")} | {""}
    lines = [line for line in runtime.run(bundle, identity=identity).out.split()
             if line.split(":")[1].split(",")[0].removeprefix("name=") in mounted]
    assert lines and all(line.endswith(f":/dolium/{identity}") for line in lines)


def test_groups_made_inside_are_removed_too(runtime: Runtime, bundle: Bundle) -> None:
    runtime.started(bundle.sh("exec sleep 1000"))
    for folder in bundle.groups():
        os.makedirs(f"{folder}/one/two")
    runtime("delete", "--force", "c")
    assert bundle.groups() == []


@pytest.mark.skipif(not V1, reason="needs cgroup v1 controllers: the unified key is v2's")
def test_device_rules_are_in_the_kernel(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["devices"] = [{"allow": False, "access": "rwm"},
                                            {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}]
    runtime.create(bundle)
    rules = Path(bundle.group("devices"), "devices.list").read_text().splitlines()
    assert "c 10:229 rw" in rules and "c 1:3 rwm" in rules and "a *:* rwm" not in rules
    none = {"allow": False, "access": "rwm"}
    runtime("update", "-r", "-", "c", stdin=json.dumps({"devices": [none, {"allow": True, "type": "c", "major": 10, "minor": 200}]}))
    now = Path(bundle.group("devices"), "devices.list").read_text().splitlines()
    assert "c 10:200 rwm" in now and "c 10:229 rw" not in now and "c 1:3 rwm" in now
    refused = {"devices": [none, {"allow": True, "type": "c", "major": 1 << 33, "minor": 1}]}  # by the kernel, after the first
    assert "set devices.allow" in runtime("update", "-r", "-", "c", stdin=json.dumps(refused), code=1).err
    assert sorted(Path(bundle.group("devices"), "devices.list").read_text().splitlines()) == sorted(now)


def test_freezing_what_forks_all_the_time_and_killing_it(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["pids"] = {"limit": 60}
    bundle.sh("f() { while :; do sleep 0.01 || :; done; }; for i in $(seq 25); do f & done 2> /dev/null; f")
    runtime.started(bundle)
    procs = Path(bundle.group("pids"), "cgroup.procs")
    until(lambda: len(procs.read_text().split()) > 20, "the bomb grows")
    runtime("pause", "c")
    runtime("delete", "--force", "c")
    assert bundle.groups() == [] and runtime.left() == []


@pytest.mark.parametrize(("resources", "field"), [
    ({"rdma": {"mlx5_0": {"hcaHandles": 1}}}, "rdma"),
    ({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}, "hugepageLimits"),
    ({"memory": {"swappiness": 5, "kernelTCP": 5}} if not V1 else {"unified": {"memory.max": "5"}}, "unified" if V1 else "memory"),
    ({"network": {"classID": 5}}, "network.classID"),
    ({"blockIO": {"weight": 5}}, "blockIO.weight"),
    ({"blockIO": {"leafWeight": 300}}, "blockIO.leafWeight"),
    ({"cpu": {"idle": 2}}, "cpu.idle"),
])
def test_what_this_host_lacks_is_named_before_anything_is_made(runtime: Runtime, bundle: Bundle, resources: dict[str, object],
                                                               field: str) -> None:
    bundle.linux["resources"].update(resources)
    result = runtime.run(bundle.sh("true"), code=1)
    assert f"linux.resources.{field}" in result.err and result.err.count("\n") == 1
    assert runtime.left() == [] and bundle.groups() == []


def _value(bundle: Bundle, controller: str, file: str) -> str:
    return (Path(bundle.group(controller)) / file).read_text().strip()


@pytest.mark.skipif(not os.path.isdir(f"{CGROUPS}/memory"), reason="needs the v1 memory controller (the VM has v2)")
def test_update_changes_limits_and_a_refused_one_changes_none(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    bundle.sh("sleep 100")
    runtime.started(bundle)
    runtime("update", "--memory", "64m", "--pids-limit", "50", "--cpu-share", "256", "c")
    assert _value(bundle, "memory", "memory.limit_in_bytes") == str(64 << 20)
    assert _value(bundle, "pids", "pids.max") == "50" and _value(bundle, "cpu", "cpu.shares") == "256"
    resources = json.dumps({"memory": {"limit": 128 << 20}, "cpu": {"quota": 20000, "period": 100000}})
    runtime("update", "-r", "-", "c", stdin=resources)
    assert _value(bundle, "memory", "memory.limit_in_bytes") == str(128 << 20)
    assert _value(bundle, "cpu", "cpu.cfs_quota_us") == "20000"
    done = runtime("update", "--memory", "32m", "--cpuset-cpus", "4000", "c", code=1)
    assert "cpuset.cpus" in done.err
    assert _value(bundle, "memory", "memory.limit_in_bytes") == str(128 << 20)  # put back
    runtime("update", "--memory-swap", "256m", "c")
    runtime("update", "--memory", "-1", "c")  # and so no limit of memory and swap together
    assert _value(bundle, "memory", "memory.memsw.limit_in_bytes") == _value(bundle, "memory", "memory.limit_in_bytes")
    runtime("update", "--memory", "300m", "c")
    assert _value(bundle, "memory", "memory.limit_in_bytes") == str(300 << 20)


def _form(value: Any) -> Any:
    """A statistic's form, without the numbers: keys and lengths."""
    if isinstance(value, dict):
        return {key: _form(part) for key, part in value.items()}
    return [_form(part) for part in value] if isinstance(value, list) else type(value).__name__


@pytest.mark.skipif(not V1, reason="needs cgroup v1 controllers: Debian's runc knows less of v2")
def test_statistics_have_runcs_form(runtime: Runtime, bundle: Bundle) -> None:
    if RUNC is None:
        pytest.skip("needs the package runc")
    limits(bundle).sh("while :; do sleep 0.05; done")
    runtime.started(bundle)
    ours = json.loads(runtime("events", "--stats", "c").out)["data"]
    runc = [RUNC, "--root", str(runtime.base / "runc")]
    bundle.linux["cgroupsPath"] += "-runc"
    bundle.write()
    with open(os.devnull, "r+") as null:
        subprocess.run([*runc, "run", "--detach", "--bundle", bundle.path, "other"], stdin=null, stdout=null, stderr=null, check=True)
    try:
        done = subprocess.run([*runc, "events", "--stats", "other"], check=True, capture_output=True)
    finally:
        subprocess.run([*runc, "delete", "--force", "other"], check=True)
    theirs = json.loads(done.stdout)["data"]
    for data in (ours, theirs):  # what is there only when it is not 0
        for part in ("max", "usage"):
            for kind in data["memory"].values():
                if isinstance(kind, dict):
                    kind.pop(part, None)
        data["cpu"].pop("throttling"), data.pop("blkio"), data["memory"].pop("cache", None)
    assert _form(ours) == _form(theirs)
    assert ours["cpuset"] == theirs["cpuset"] and ours["memory"]["usage"]["limit"] == 64 * MIB and ours["pids"]["limit"] == 33


def test_events_end_with_the_container_and_tell_oom_kills(runtime: Runtime, bundle: Bundle) -> None:
    bundle.linux["resources"]["memory"] = {"limit": 16 << 20}
    bundle.sh("while ! [ -e /tmp/go ]; do sleep 0.05; done; tail /dev/zero; sleep 100")
    runtime.started(bundle)
    stats = json.loads(runtime("events", "--stats", "c").out)
    assert stats["type"] == "stats" and stats["id"] == "c" and stats["data"]["pids"]["current"] >= 1
    assert stats["data"]["memory"]["usage"]["usage"] > 0 and stats["data"]["cpu"]["usage"]["total"] > 0
    watching = runtime.popen("events", "--interval", "1s", "c")
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline())["type"] == "stats"
    (bundle.rootfs / "tmp/go").touch()
    until(lambda: json.loads(str(watching.stdout and watching.stdout.readline()))["type"] == "oom", "the kill is told")
    runtime("kill", "c", "KILL")
    watching.stdout.read()
    assert watching.wait(30) == 0
    assert runtime("events", "c", code=1).err == "dolium-runtime: container c is not running\n"
