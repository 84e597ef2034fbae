"""Names, places and properties of a container's scope, and the plan that makes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hosts import V2, FakeFacts, compiled, config
from hypothesis import given
from hypothesis import strategies as st
from test_runtime_cli import Host, ask

from dolium.errors import InvalidArgument
from dolium.linux.cgroup import systemd
from dolium.runtime import plan as P
from dolium.runtime.systemd import Driver


@pytest.mark.parametrize(("path", "uid", "name", "group"), [
    ("", 0, "dolium-c.scope", "/system.slice/dolium-c.scope"),
    ("", 1000, "dolium-c.scope", "/user.slice/user-1000.slice/user@1000.service/user.slice/dolium-c.scope"),
    ("machine.slice:libpod:1f", 0, "libpod-1f.scope", "/machine.slice/libpod-1f.scope"),
    ("kubepods-besteffort-pod12_3.slice:crio:ab", 0, "crio-ab.scope",
     "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod12_3.slice/crio-ab.scope"),
    ("-.slice:a:b", 0, "a-b.scope", "/a-b.scope"),
    ("::b", 0, "-b.scope", "/system.slice/-b.scope"),
])
def test_names(path: str, uid: int, name: str, group: str) -> None:
    unit = systemd.unit_of(path, "c", uid)
    assert (unit.name, unit.group) == (name, group)


@pytest.mark.parametrize("path", ["/a", "a:b", "a.slice:b:c:d", "a:b:c", "a--b.slice:b:c", "-a.slice:b:c", "a/b.slice:b:c",
                                  "a.slice:b:c.slice", "a.slice:b/d:c"])
def test_names_that_are_none(path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.cgroupsPath"):
        systemd.unit_of(path, "c", 0)


@pytest.mark.parametrize(("resources", "wanted"), [
    ({"memory": {"limit": 100, "swap": 150}}, [("MemoryMax", "t", 100), ("MemorySwapMax", "t", 50)]),
    ({"memory": {"limit": -1}}, [("MemoryMax", "t", systemd.INFINITY), ("MemorySwapMax", "t", systemd.INFINITY)]),
    ({"memory": {"reservation": 7}}, [("MemoryLow", "t", 7)]),
    ({"pids": {"limit": 5}}, [("TasksMax", "t", 5)]),
    ({"pids": {"limit": 0}}, [("TasksMax", "t", systemd.INFINITY)]),
    ({"cpu": {"shares": 1024}}, [("CPUWeight", "t", 39)]),
    ({"cpu": {"quota": 50_000, "period": 100_000}}, [("CPUQuotaPerSecUSec", "t", 500_000), ("CPUQuotaPeriodUSec", "t", 100_000)]),
    ({"cpu": {"quota": 33_333}}, [("CPUQuotaPerSecUSec", "t", 340_000), ("CPUQuotaPeriodUSec", "t", 100_000)]),
    ({"cpu": {"quota": -1}}, [("CPUQuotaPerSecUSec", "t", systemd.INFINITY), ("CPUQuotaPeriodUSec", "t", 100_000)]),
    ({"cpu": {"cpus": "0-2,9", "mems": "0"}}, [("AllowedCPUs", "ay", [7, 2]), ("AllowedMemoryNodes", "ay", [1])]),
    ({"blockIO": {"weight": 10, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}]}}, [("IOWeight", "t", 1)]),
    ({"unified": {"memory.min": "5", "memory.high": "max", "cpu.max": "max 7000", "io.latency": "x"}},
     [("MemoryHigh", "t", systemd.INFINITY), ("MemoryMin", "t", 5), ("CPUQuotaPerSecUSec", "t", systemd.INFINITY),
      ("CPUQuotaPeriodUSec", "t", 7000)]),
    ({"devices": [{"allow": False}], "hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}, []),
])
def test_limits_as_properties(resources: dict[str, Any], wanted: list[systemd.Property]) -> None:
    assert systemd.properties(resources) == wanted


@given(st.sets(st.integers(0, 300), min_size=1))
def test_masks(cpus: set[int]) -> None:
    text = ",".join(map(str, sorted(cpus)))
    bits = int.from_bytes(bytes(systemd.mask(text, "x")), "little")
    assert {number for number in range(400) if bits >> number & 1} == cpus


@pytest.mark.parametrize("text", ["", "x", "1-", "3-1", "1,,2", "-1", "9999"])
def test_masks_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match="field"):
        systemd.mask(text, "field")


def test_annotations_are_properties() -> None:
    given_ = {"org.systemd.property.TimeoutStopUSec": "uint64 5", "org.systemd.property.CollectMode": "'inactive'",
              "org.systemd.property.After": "['a.service', \"b.service\"]", "org.systemd.property.Nice": "-3", "other": "x",
              "org.systemd.property.SendSIGHUP": "true", "org.systemd.property.RuntimeMaxSec": "uint64 2"}
    assert systemd.annotated(given_) == [
        ("TimeoutStopUSec", "t", 5), ("CollectMode", "s", "inactive"), ("After", "as", ["a.service", "b.service"]),
        ("Nice", "i", -3), ("SendSIGHUP", "b", True), ("RuntimeMaxUSec", "t", 2_000_000)]
    for name, text in (("A", "'"), ("A", "5 5"), ("A", "[1]"), ("A", "float 3"), ("A.B", "true"), ("ASec", "'x'"), ("A", "")):
        with pytest.raises(InvalidArgument, match=f"annotations.org.systemd.property.{name}"):
            systemd.annotated({f"org.systemd.property.{name}": text})


def test_the_plan_of_a_scope() -> None:
    """systemd gets the child before it goes on; limits follow by file; a name in use undoes nothing."""
    unit = systemd.unit_of("a.slice:b:c", "box", 0)
    made = config(linux={"resources": {"pids": {"limit": 5}, "devices": [{"allow": False, "access": "rwm"}]}})
    plan = compiled(made, V2, FakeFacts(), unit=unit, driver=Driver({}, 0))
    after = [(op.name, op.flags) for op in plan.stage(P.PARENT_AFTER_CLONE) if "subtree_control" not in str(op.args)
             and op.name != "cg_mkdir"]
    assert after == [("hook", P.NOTHING_OURS), ("cg_write", 0), ("cg_bpf_devices", 0)]
    request = json.loads(str(plan.named("hook")[0].args[4]).replace(P.PID, "4711"))
    assert (request["verb"], request["pid"], request["group"]) == ("start", 4711, "/a.slice/b-c.scope")
    assert ["TasksMax", "t", 5] in request["properties"] and ["Delegate", "b", True] in request["properties"]
    assert not plan.named("cg_clone") and not plan.named("cg_join")
    undo = [op.name for op in plan.stage(P.ON_FAILURE)]
    assert undo == ["cg_kill", "hook", "cg_rmdir"]
    assert plan.ops.index(plan.named("hook")[0]) < plan.ops.index(plan.named("cg_kill")[0])


def scoped(status: str) -> Host:
    host = Host(status, layout_v2=True)
    record = json.loads(host.files["/run/box/state.json"])
    host.files["/run/box/state.json"] = json.dumps({**record, "unit": "b-c.scope"})
    return host


def verbs(plan: P.Plan, stage: int) -> list[str]:
    return [json.loads(op.args[4] if isinstance(op.args[4], (str, bytes)) else "")["verb"] for op in plan.stage(stage)
            if op.name == "hook"]


def test_later_commands_look_at_the_state_not_at_the_flag() -> None:
    assert verbs(ask(scoped("stopped"), "delete", "box"), P.PARENT_BEFORE_CLONE) == ["stop"]
    assert verbs(ask(Host("stopped", layout_v2=True), "--systemd-cgroup", "delete", "box"), P.PARENT_BEFORE_CLONE) == []
    update = ask(scoped("running"), "update", "--pids-limit", "7", "box")
    assert verbs(update, P.PARENT_BEFORE_CLONE) == ["set"] and update.named("cg_write")


def test_a_half_made_scope_is_stopped_too() -> None:
    host = Host("half", layout_v2=True)
    host.files["/run/box/unit"] = "b-c.scope\n/sys/fs/cgroup/a.slice/b-c.scope\n"
    plan = ask(host, "delete", "--force", "box")
    assert [op.name for op in plan.ops] == ["lock", "cg_kill", "hook", "cg_rmdir", "remove_dir", "remove_dir"]
    assert plan.named("cg_rmdir")[0].args == ("/sys/fs/cgroup/a.slice/b-c.scope",)


def test_who_is_asked() -> None:
    assert Driver({}, 0).bus == "unix:path=/run/dbus/system_bus_socket"
    assert Driver({"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"}, 0).bus == "unix:path=/x"
    assert Driver({}, 1000).bus == "unix:path=/run/user/1000/bus"
    assert Driver({"XDG_RUNTIME_DIR": "/r"}, 1000).bus == "unix:path=/r/bus"
    assert Driver({"DBUS_SESSION_BUS_ADDRESS": "unix:path=/s", "XDG_RUNTIME_DIR": "/r"}, 1000).bus == "unix:path=/s"


def test_where_there_is_no_systemd() -> None:
    with pytest.raises(InvalidArgument, match="not booted with systemd"):
        ask(Host(layout_v2=True), "--systemd-cgroup", "create", "-b", "bundle", "box")
    host = Host()
    host.stats["/run/systemd/system"] = b"16877 0 0 0"
    with pytest.raises(InvalidArgument, match="cgroup v1 hierarchies"):
        ask(host, "--systemd-cgroup", "create", "-b", "bundle", "box")
