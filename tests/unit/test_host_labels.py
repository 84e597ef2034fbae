"""Labels, classes of service and links: what the compiler makes of a host that has them, and of one that has not."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import pytest
from hosts import V1, FakeFacts, compiled, config, namespaces, only

from dolium.errors import InvalidArgument
from dolium.linux import links
from dolium.linux.cgroup import v1, v2
from dolium.runtime import lsm, rdt
from dolium.runtime import plan as P
from dolium.runtime.compile import Launch, compile_exec

APPARMOR = {lsm.APPARMOR_ENABLED: "Y\n"}
SELINUX = {lsm.SELINUX_ENABLED: "1"}


def test_an_apparmor_profile() -> None:
    made = config(process={"apparmorProfile": "docker-default"})
    with pytest.raises(InvalidArgument, match=r"process\.apparmorProfile: AppArmor is not enabled"):
        compiled(made)
    with pytest.raises(InvalidArgument, match=r"process\.apparmorProfile"):
        compiled(made, facts=FakeFacts({lsm.APPARMOR_ENABLED: "N\n"}))
    assert only(compiled(made, facts=FakeFacts(APPARMOR)), "lsm").args == ("self/attr/exec", "exec docker-default")
    newer = FakeFacts(APPARMOR, stats={lsm.APPARMOR_EXEC: b"33206 0 0 0"})
    assert only(compiled(made, facts=newer), "lsm").args == ("self/attr/apparmor/exec", "exec docker-default")
    assert compiled(config(process={"apparmorProfile": "unconfined"})).named("lsm") == []


def test_selinux_labels() -> None:
    for made, field in ((config(process={"selinuxLabel": "a:b:c:s0"}), "process.selinuxLabel"),
                        (config(linux={"mountLabel": "a:b:c:s0:c1,c2"}), "linux.mountLabel")):
        with pytest.raises(InvalidArgument, match=f"{field}: SELinux is not enabled"):
            compiled(made)
    made = config(process={"selinuxLabel": "a:b:c:s0"}, linux={"mountLabel": "a:b:c:s0:c1,c2"})
    plan = compiled(made, facts=FakeFacts(SELINUX))
    assert only(plan, "lsm").args == ("self/attr/exec", "a:b:c:s0")
    labelled = {op.args[4]: "context=a:b:c:s0:c1,c2" in op.args[2] for op in plan.named("mount_fs")}  # type: ignore[operator]
    assert labelled["/dev"] and labelled["/dev/shm"] and not labelled["/proc"] and not labelled["/sys"]


def told(**schemata: str) -> FakeFacts:
    """A host with resctrl and these classes of service."""
    files = {f"{rdt.ROOT}/{name}/schemata": text for name, text in schemata.items()}
    return FakeFacts({**files, f"{rdt.ROOT}/info/L3_MON/mon_features": "llc_occupancy\n"},
                     stats={f"{rdt.ROOT}/schemata": b"33188 0 0 0"})


def rdt_plan(facts: FakeFacts, **given: Any) -> P.Plan:
    return compiled(config(linux={"intelRdt": given}), facts=facts)


def done(plan: P.Plan, stage: int) -> list[tuple[str, object]]:
    return [(op.name, op.args[0]) for op in plan.stage(stage) if "linux.intelRdt" in op.label]


def test_rdt_is_refused_without_resctrl() -> None:
    for given in ({}, {"closID": "a"}, {"schemata": ["L3:0=f"]}):
        with pytest.raises(InvalidArgument, match=r"linux\.intelRdt: there is no resctrl"):
            rdt_plan(FakeFacts(), **given)


def test_a_class_of_its_own_is_made_and_removed() -> None:
    plan = rdt_plan(told(), l3CacheSchema="L3:0=f\nMB:0=1", memBwSchema="MB:0=20", schemata=["L2:0=3"], enableMonitoring=True)
    own = f"{rdt.ROOT}/box"
    assert done(plan, P.PARENT_BEFORE_CLONE) == [("mkdir", own), *[("cg_write", f"{own}/schemata")] * 3, ("mkdir", f"{own}/mon_groups/box")]
    assert [op.args[1] for op in plan.named("cg_write") if "intelRdt" in op.label] == ["L3:0=f\n", "MB:0=20\n", "L2:0=3\n"]
    assert done(plan, P.PARENT_AFTER_CLONE) == [("write_file", f"{own}/tasks"), ("write_file", f"{own}/mon_groups/box/tasks")]
    assert done(plan, P.ON_FAILURE) == [("cg_rmdir", f"{own}/mon_groups/box"), ("cg_rmdir", own)]


def test_a_named_class_is_joined_or_made_and_stays() -> None:
    plan = rdt_plan(told(gold="L3:0=0ff;1=0ff\n    MB:0= 20;1= 70\n"), closID="gold", schemata="L3:1=ff;0=ff")
    assert done(plan, P.PARENT_BEFORE_CLONE) == [] and done(plan, P.ON_FAILURE) == []
    assert done(plan, P.PARENT_AFTER_CLONE) == [("write_file", f"{rdt.ROOT}/gold/tasks")]
    with pytest.raises(InvalidArgument, match=r"closID: .*gold exists with another schemata"):
        rdt_plan(told(gold="L3:0=f\n"), closID="gold", schemata=["L3:0=7"])
    with pytest.raises(InvalidArgument, match=r"closID: .*gold does not exist"):
        rdt_plan(told(), closID="gold")
    made = rdt_plan(told(), closID="gold", schemata=["L3:0=7"])
    assert done(made, P.PARENT_BEFORE_CLONE)[0] == ("mkdir", f"{rdt.ROOT}/gold") and done(made, P.ON_FAILURE) == []
    with pytest.raises(InvalidArgument, match=r"linux\.intelRdt\.enableMBM: the processor"):
        rdt_plan(told(), enableMBM=True)
    assert done(rdt_plan(told(), enableCMT=True), P.PARENT_AFTER_CLONE)


def test_an_exec_joins_the_class() -> None:
    made = config(linux={"intelRdt": {"closID": "gold"}})
    plan = compile_exec(made, made["process"], FakeFacts(), 7, 8, Launch("box", "/b", V1), [])
    assert done(plan, P.PARENT_AFTER_CLONE) == [("write_file", f"{rdt.ROOT}/gold/tasks")]


def address(index: int, text: str, prefix: int, *, scope: int = 0, flags: int = 0x80, family: int = socket.AF_INET) -> bytes:
    raw = socket.inet_pton(family, text)
    attributes = b"".join(struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4) for kind, data in (
        (1, raw), (2, raw), (3, b"eth0\0"), (8, struct.pack("I", flags)), (6, bytes(16))))
    body = struct.pack("BBBBI", family, prefix, flags & 0xFF, scope, index) + attributes
    return struct.pack("IHHII", 16 + len(body), links.RTM_NEWADDR, 2, 1, 0) + body


def test_only_permanent_global_addresses_are_kept() -> None:
    told = b"".join((address(4, "192.0.2.1", 24), address(4, "169.254.1.1", 16, scope=253), address(5, "192.0.2.9", 24),
                     address(4, "192.0.2.2", 24, flags=0), address(4, "2001:db8::1", 64, family=socket.AF_INET6)))
    kept = links.addresses(told, 4)
    assert len(kept) == 2 and b"eth0" not in b"".join(kept)
    message = links.address(kept[0], 9)
    assert message[20:24] == b"\x09\0\0\0" and socket.inet_pton(socket.AF_INET, "192.0.2.1") in message


def test_no_bytes_hang_what_reads_them() -> None:
    for data in (b"", b"\0" * 40, b"\x10\0\0\0\x14\0" + b"\0" * 40, address(4, "192.0.2.1", 24)[:-3], b"\xff" * 99):
        assert links.addresses(data, 4) == [] and links.indexes(data) == {} and links.ended(data) in (True, False)


def test_devices_move_when_the_process_is_there() -> None:
    made = config(linux={"namespaces": namespaces(mount="", uts="", network=""), "netDevices": {"lan": {"name": "eth0"}}})
    plan = compiled(made, facts=FakeFacts({"/proc/self/net/dev": "Inter-|\n face |\n    lo: 0 0\n   lan: 1 2\n"}))
    (moved,) = (op for op in plan.stage(P.PARENT_AFTER_CLONE) if op.name == "hook")
    assert json.loads(str(moved.args[4]).replace(P.PID, "7")) == {"pid": 7, "devices": {"lan": "eth0"}}
    with pytest.raises(InvalidArgument, match=r"linux.netDevices.lan: there is no such link"):
        compiled(made, facts=FakeFacts({"/proc/self/net/dev": "    lo: 0 0\n"}))


RDMA = {"rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}, "rxe3": {"hcaObjects": 7}}}


def test_rdma_limits_on_both_versions() -> None:
    lines = ["mlx5_1 hca_handle=3 hca_object=10000", "rxe3 hca_object=7"]
    assert v1.writes_for(RDMA) == [("rdma", "rdma.max", line) for line in lines]
    assert v2.writes_for(RDMA) == [("rdma.max", line) for line in lines]
    assert v2.controllers_needed(v2.writes_for(RDMA)) == ["rdma"]
