"""cgroup arithmetic, layouts, and the device program run by an interpreter against the rules' own meaning."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import HYBRID, V1, V2, FakeFacts
from hypothesis import given
from hypothesis import strategies as st

from dolium.errors import InvalidArgument
from dolium.linux.cgroup import bpf_devices, tree, v1, v2
from dolium.runtime import plan as P
from dolium.runtime.cgroups import add_limits, check


@pytest.mark.parametrize(("shares", "weight"), [(0, 0), (2, 1), (1024, 39), (262144, 10000), (512, 20), (2048, 79)])
def test_cpu_shares_to_weight(shares: int, weight: int) -> None:
    assert v2.weight_of_shares(shares) == weight


@given(st.integers(2, 262143))
def test_more_shares_never_weigh_less(shares: int) -> None:
    assert 1 <= v2.weight_of_shares(shares) <= v2.weight_of_shares(shares + 1) <= 10000


@pytest.mark.parametrize(("blkio", "weight"), [(0, 0), (10, 1), (1000, 10000), (500, 4950), (100, 910)])
def test_blkio_weight(blkio: int, weight: int) -> None:
    assert v2.weight_of_blkio(blkio) == weight


@pytest.mark.parametrize(("limits", "wanted"), [
    ({"limit": 100}, [("memory.max", "100")]),
    ({"limit": -1}, [("memory.max", "max"), ("memory.swap.max", "max")]),
    ({"limit": -1, "swap": -1}, [("memory.max", "max"), ("memory.swap.max", "max")]),
    ({"limit": 100, "swap": 150}, [("memory.max", "100"), ("memory.swap.max", "50")]),
    ({"limit": 100, "swap": 100}, [("memory.max", "100"), ("memory.swap.max", "0")]),
    ({"reservation": 5}, [("memory.low", "5")]),
    ({}, []),
])
def test_v2_memory(limits: dict[str, int], wanted: list[tuple[str, str]]) -> None:
    assert v2.memory(limits) == wanted


@pytest.mark.parametrize(("limits", "wanted"), [
    ({"quota": 50000, "period": 100000}, [("cpu.max", "50000 100000")]),
    ({"quota": 50000}, [("cpu.max", "50000 100000")]),
    ({"quota": -1}, [("cpu.max", "max 100000")]),
    ({"period": 5000}, [("cpu.max", "max 5000")]),
    ({"shares": 1024, "cpus": "0-1", "mems": "0", "burst": 7, "idle": 1},
     [("cpu.weight", "39"), ("cpu.idle", "1"), ("cpu.max.burst", "7"), ("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]),
    ({"shares": 1024, "idle": 0}, [("cpu.idle", "0"), ("cpu.weight", "39")]),
    ({}, []),
])
def test_v2_cpu(limits: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert v2.cpu(limits) == wanted


def test_zeros_are_no_limits() -> None:
    """As runc has it: Go's empty values. A limit of 0 would kill what is to start."""
    nothing = {"limit": 0, "swap": 0, "reservation": 0, "kernelTCP": 0, "shares": 0, "quota": 0, "period": 0, "realtimePeriod": 0,
               "realtimeRuntime": 0, "cpus": "", "mems": ""}
    assert v1.memory(nothing) == v1.cpu(nothing) == v2.memory(nothing) == v2.cpu(nothing) == []
    assert v1.cpu({"burst": 0, "idle": 0}) == [("cpu", "cpu.cfs_burst_us", "0"), ("cpu", "cpu.idle", "0")]


def test_v1_memory_and_cpu_are_written_in_an_order_the_kernel_takes() -> None:
    assert v1.memory({"limit": 5, "swap": 9, "reservation": 3, "swappiness": 0, "disableOOMKiller": True}) == [
        ("memory", "memory.limit_in_bytes", "5"), ("memory", "memory.memsw.limit_in_bytes", "9"),
        ("memory", "memory.soft_limit_in_bytes", "3"), ("memory", "memory.swappiness", "0"), ("memory", "memory.oom_control", "1")]
    files = [file for _, file, _ in v1.cpu({"quota": 5, "period": 6, "shares": 7, "cpus": "0", "mems": ""})]
    assert files == ["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpuset.cpus"]


@pytest.mark.parametrize(("limit", "value"), [(5, "5"), (0, "max"), (-1, "max")])
def test_pids(limit: int, value: str) -> None:
    assert v1.writes_for({"pids": {"limit": limit}}) == [("pids", "pids.max", value)]
    assert v2.writes_for({"pids": {"limit": limit}}) == [("pids.max", value)]


def test_block_io() -> None:
    io = {"weight": 100, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 9}],
          "throttleWriteIOPSDevice": [{"major": 8, "minor": 1, "rate": 7}]}
    assert v2.block_io(io) == [("io.weight", "default 910"), ("io.max", "8:0 rbps=9"), ("io.max", "8:1 wiops=7")]
    assert v1.block_io({**io, "weightDevice": [{"major": 8, "minor": 2, "weight": 50}]}) == [
        ("blkio", "blkio.weight", "100"), ("blkio", "blkio.weight_device", "8:2 50"),
        ("blkio", "blkio.throttle.read_bps_device", "8:0 9"), ("blkio", "blkio.throttle.write_iops_device", "8:1 7")]


LACKING = {"/sys/fs/cgroup/blkio": ["blkio.bfq.io_serviced", "blkio.reset_stats"], "/sys/fs/cgroup/cpu,cpuacct": ["cpu.shares"],
           "/sys/fs/cgroup/memory": ["memory.limit_in_bytes"],
           "/sys/fs/cgroup": ["cgroup.procs", "init.scope", "system.slice", "memory.stat"],
           "/sys/fs/cgroup/init.scope": ["cpu.pressure", "cpu.stat", "cpu.weight", "memory.max"],
           "/sys/fs/cgroup/system.slice": ["io.bfq.weight", "io.max", "io.stat"]}
ON_V2 = {"/sys/fs/cgroup/cgroup.controllers": "cpu io memory"}


@pytest.mark.parametrize(("layout", "resources", "field"), [
    (V1, {"cpu": {"burst": 5}}, "cpu.burst"), (V1, {"cpu": {"idle": 1}}, "cpu.idle"), (V1, {"cpu": {"realtimeRuntime": 5}}, "cpu.realtimeRuntime"),
    (V1, {"memory": {"limit": 9, "swap": 9}}, "memory.swap"), (V1, {"memory": {"kernelTCP": 5}}, "memory.kernelTCP"),
    (V1, {"blockIO": {"leafWeight": 20}}, "blockIO.leafWeight"),
    (V2, {"cpu": {"burst": 5}}, "cpu.burst"), (V2, {"cpu": {"idle": 1}}, "cpu.idle"), (V2, {"memory": {"limit": 5, "swap": 9}}, "memory.swap")])
def test_a_file_that_the_kernel_lacks_is_told_by_its_field(layout: tree.Layout, resources: dict[str, Any], field: str) -> None:
    own = tree.Layout(dict(layout.v1), layout.unified)
    with pytest.raises(InvalidArgument, match=rf"^config.json: linux.resources.{field}: this kernel's cgroups have no "):
        check(FakeFacts(dict(ON_V2), lists=LACKING), own, resources)
    check(FakeFacts(dict(ON_V2)), own, resources)  # nobody knows: nothing is refused


def test_where_weights_are_the_schedulers_alone() -> None:
    io = {"weight": 100, "weightDevice": [{"major": 8, "minor": 2, "weight": 50}]}
    for layout, wanted in ((V1, [("blkio", "blkio.bfq.weight", "100"), ("blkio", "blkio.bfq.weight_device", "8:2 50")]),
                           (V2, [("io.bfq.weight", "default 100"), ("io.bfq.weight", "8:2 50")])):
        own = tree.Layout(dict(layout.v1), layout.unified)
        check(FakeFacts(dict(ON_V2), lists=LACKING), own, {"blockIO": io})
        assert (v1 if layout.v1 else v2).writes_for({"blockIO": io}, own.weights) == wanted


def test_no_swap_is_needed_for_none() -> None:
    """memory.swap.max says what holds there anyway."""
    for limits in ({"limit": 9, "swap": 9}, {"limit": 9, "swap": -1}, {"limit": -1}):
        check(FakeFacts(dict(ON_V2), lists=LACKING), V2, {"memory": limits})
        plan = P.Plan()
        add_limits(plan, P.PARENT_BEFORE_CLONE, V2, "/g", {"memory": limits})
        assert [op.flags for op in plan.ops if str(op.args[0]).endswith("/memory.swap.max")] == [P.OPTIONAL]


def test_what_else_there_is() -> None:
    resources = {"hugepageLimits": [{"pageSize": "2MB", "limit": 4}], "unified": {"memory.high": 5},
                 "rdma": {"mlx5_0": {"hcaHandles": 3, "hcaObjects": 10}},
                 "network": {"classID": 3, "priorities": [{"name": "eth0", "priority": 2}]}}
    assert v2.writes_for(resources) == [("hugetlb.2MB.max", "4"), ("hugetlb.2MB.rsvd.max", "4"),
                                        ("rdma.max", "mlx5_0 hca_handle=3 hca_object=10"), ("memory.high", "5")]
    assert v1.writes_for(resources) == [("hugetlb", "hugetlb.2MB.limit_in_bytes", "4"),
                                        ("hugetlb", "hugetlb.2MB.rsvd.limit_in_bytes", "4"),
                                        ("rdma", "rdma.max", "mlx5_0 hca_handle=3 hca_object=10"), ("net_cls", "net_cls.classid", "3"),
                                        ("net_prio", "net_prio.ifpriomap", "eth0 2")]
    assert v2.controllers_needed([("cpu.max", ""), ("cpuset.cpus", ""), ("cgroup.x", ""), ("io.max", ""), ("cpu.idle", "")]) == [
        "cpu", "cpuset", "io"]


HOST_V2 = {"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids hugetlb\n"}
PAGES = {"/sys/kernel/mm/hugepages": ["hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB"]}


@pytest.mark.parametrize(("resources", "field"), [
    ({"memory": {"swappiness": 0}}, "memory.swappiness"),
    ({"memory": {"disableOOMKiller": True}}, "memory.disableOOMKiller"),
    ({"memory": {"kernelTCP": 1}}, "memory.kernelTCP"),
    ({"memory": {"swap": 5}}, "memory.swap"),
    ({"memory": {"swap": 5, "limit": -1}}, "memory.swap"),
    ({"cpu": {"realtimeRuntime": 5}}, "cpu.realtimeRuntime"),
    ({"cpu": {"realtimePeriod": 5}}, "cpu.realtimePeriod"),
    ({"blockIO": {"leafWeight": 10}}, "blockIO.leafWeight"),
    ({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "leafWeight": 10}]}}, r"blockIO.weightDevice\[0\].leafWeight"),
    ({"network": {"classID": 5}}, "network.classID"),
    ({"network": {"priorities": [{"name": "a", "priority": 1}]}}, "network.priorities"),
    ({"rdma": {"mlx5": {"hcaHandles": 1}}}, "rdma: the cgroup controller rdma is not available"),
    ({"unified": {"rdma.max": "mlx5 hca_handle=1"}}, "unified.rdma.max: the cgroup controller rdma is not available"),
    ({"unified": {"no.such": "1"}}, "unified.no.such: the cgroup controller no is not available"),
    ({"hugepageLimits": [{"pageSize": "16MB", "limit": 1}]}, r"hugepageLimits\[0\].pageSize: .*'16MB' \(it has 1GB, 2MB, 64KB"),
])
def test_v2_refuses_by_name(resources: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"linux.resources.{field}"):
        check(FakeFacts(HOST_V2, lists=PAGES), V2, resources)


@pytest.mark.parametrize("resources", [
    {}, {"memory": {"swap": -1, "limit": 5}}, {"memory": {"swap": -1}}, {"memory": {"disableOOMKiller": False, "kernel": 5}},
    {"cpu": {"shares": 2, "cpus": "0", "idle": 0, "burst": 0}}, {"hugepageLimits": [{"pageSize": "1GB", "limit": 1}]},
    {"blockIO": {"weight": 10}}, {"unified": {"cgroup.max.depth": "3", "io.latency": "x"}}, {"network": {}},
])
def test_v2_takes_the_rest(resources: dict[str, Any]) -> None:
    check(FakeFacts(HOST_V2, lists=PAGES), V2, resources)


@pytest.mark.parametrize("layout", [V1, HYBRID])
@pytest.mark.parametrize(("resources", "field"), [
    ({"unified": {"memory.max": "5"}}, "unified: this host's controllers are on cgroup v1"),
    ({"hugepageLimits": [{"pageSize": "2MB", "limit": 1}]}, "hugepageLimits: the cgroup controller hugetlb is not mounted"),
    ({"rdma": {"mlx5": {"hcaHandles": 1}}}, "rdma: the cgroup controller rdma is not mounted"),
    ({"network": {"classID": 0}}, "network.classID: the cgroup controller net_cls"),
    ({"network": {"priorities": [{"name": "a", "priority": 1}]}}, "network.priorities: the cgroup controller net_prio"),
])
def test_v1_refuses_what_is_not_mounted(layout: tree.Layout, resources: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"linux.resources.{field}"):
        check(FakeFacts(lists=PAGES), layout, resources)


@pytest.mark.parametrize("layout", [V1, V2])
@pytest.mark.parametrize("shares", [1, 262145])
def test_shares_that_the_kernel_would_change_are_refused(layout: tree.Layout, shares: int) -> None:
    with pytest.raises(InvalidArgument, match=f"linux.resources.cpu.shares: {shares} is not from 2 to 262144"):
        check(FakeFacts(HOST_V2), layout, {"cpu": {"shares": shares}})


def test_v1_device_files() -> None:
    rules = [{"allow": False}, {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
             {"allow": True, "type": "a", "major": 7}]
    found = [(file, value) for _, file, value in v1.devices(rules)][:4]
    assert found == [("devices.deny", "a"), ("devices.allow", "c 10:229 rw"), ("devices.allow", "b 7:* rwm"),
                     ("devices.allow", "c 7:* rwm")]
    assert v1.devices([]) == []


# -- layouts --

def test_layouts() -> None:
    text = "3:cpu,cpuacct:/x\n2:name=systemd:/\n1:misc:/\n0::/y\n"
    found = tree.parse(text, ["cpu,cpuacct", "systemd", "unified", "cpu"], False)
    assert found.v1 == {"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
                        "name=systemd": "/sys/fs/cgroup/systemd"}
    assert found.unified == "/sys/fs/cgroup/unified" and not found.pure_v2
    assert found.paths("/g") == ["/sys/fs/cgroup/cpu,cpuacct/g", "/sys/fs/cgroup/systemd/g", "/sys/fs/cgroup/unified/g"]
    assert found.v1_path("cpuacct", "/g") == "/sys/fs/cgroup/cpu,cpuacct/g" and found.v1_path("memory", "/g") is None
    assert tree.parse_membership(text, found) == ["/sys/fs/cgroup/cpu,cpuacct/x", "/sys/fs/cgroup/systemd",
                                                  "/sys/fs/cgroup/unified/y"]
    pure = tree.parse("0::/y\n", [], True)
    assert pure.pure_v2 and pure.paths("/g") == ["/sys/fs/cgroup/g"]
    assert tree.parse_membership("0::/y\n", pure) == ["/sys/fs/cgroup/y"]


@pytest.mark.parametrize(("path", "group"), [("", "/dolium/id"), ("/a/b/", "/a/b"), ("a/./b", "/dolium/a/b"), ("/", "/dolium/id"),
                                             ("//a", "/a")])
def test_the_group_of_a_path(path: str, group: str) -> None:
    assert tree.group_of(path, "id") == group


def test_no_group_climbs() -> None:
    with pytest.raises(ValueError, match=r"'\.\.'"):
        tree.group_of("/a/../../b", "id")


# -- devices as a program --

def interpret(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """The part of eBPF the program uses; anything else, or a run past the end, is an error."""
    context = {0: access << 16 | kind, 4: major, 8: minor}
    instructions = [program[at : at + 8] for at in range(0, len(program), 8)]
    registers: dict[int, int] = {1: -1}
    at = steps = 0
    while True:
        assert 0 <= at < len(instructions) and steps < 10_000
        code, registers_byte = instructions[at][0], instructions[at][1]
        dst, src = registers_byte & 15, registers_byte >> 4
        offset = int.from_bytes(instructions[at][2:4], "little", signed=True)
        immediate = int.from_bytes(instructions[at][4:], "little", signed=True)
        at, steps = at + 1, steps + 1
        if code == 0x61:
            assert src == 1 and registers[1] == -1  # only the context is read
            registers[dst] = context[offset]
        elif code == 0xBC:
            registers[dst] = registers[src] & 0xFFFFFFFF
        elif code == 0xB7:
            registers[dst] = immediate & (1 << 64) - 1
        elif code == 0x54:
            registers[dst] = registers[dst] & immediate & 0xFFFFFFFF
        elif code == 0x74:
            registers[dst] = (registers[dst] & 0xFFFFFFFF) >> immediate
        elif code == 0x55:
            at += offset if registers[dst] != immediate & (1 << 64) - 1 else 0
        elif code == 0x15:
            at += offset if registers[dst] == immediate & (1 << 64) - 1 else 0
        elif code == 0x5D:
            at += offset if registers[dst] != registers[src] else 0
        elif code == 0x95:
            return registers[0]
        else:
            raise AssertionError(f"instruction {code:#x}")


ACCESS = {"m": 1, "r": 2, "w": 4}
ALWAYS = [{"allow": True, "type": kind, "major": major, "minor": minor, "access": access}
          for kind, major, minor, access in v1.DEFAULT_DEVICES]


def allowed(rules: list[dict[str, Any]], kind: str, access: int, major: int, minor: int) -> bool:
    """The last rule that applies decides; an allow must grant all that is asked, a deny matches any part of it."""
    for rule in reversed([*rules, *ALWAYS]):
        if rule.get("type") in ("b", "c") and rule["type"] != kind:
            continue
        if rule.get("major") is not None and rule["major"] >= 0 and rule["major"] != major:
            continue
        if rule.get("minor") is not None and rule["minor"] >= 0 and rule["minor"] != minor:
            continue
        mask = sum(ACCESS[letter] for letter in set(rule.get("access") or "rwm"))
        if rule["allow"] and access & mask == access:
            return True
        if not rule["allow"] and (mask == 7 or access & mask):
            return False
    return False


NUMBERS = st.sampled_from([None, -1, 0, 1, 3, 5, 136, 229, (1 << 12) - 1])
RULES = st.lists(st.fixed_dictionaries({"allow": st.booleans()}, optional={
    "type": st.sampled_from(["", "a", "b", "c"]), "major": NUMBERS, "minor": NUMBERS,
    "access": st.text("rwm", max_size=3)}), max_size=6)


@given(RULES, st.sampled_from("bc"), st.integers(1, 7), st.sampled_from([0, 1, 3, 5, 8, 136, 229]), st.sampled_from([0, 1, 2, 3, 9]))
def test_the_program_means_what_the_rules_mean(rules: list[dict[str, Any]], kind: str, access: int, major: int,
                                               minor: int) -> None:
    program = bpf_devices.program(rules)
    assert len(program) % 8 == 0
    number = {"b": 1, "c": 2}[kind]
    assert interpret(program, number, access, major, minor) == int(allowed(rules, kind, access, major, minor))


@given(RULES)
def test_every_instruction_can_be_reached(rules: list[dict[str, Any]]) -> None:
    """The kernel's verifier refuses a program where one cannot (EINVAL)."""
    program = bpf_devices.program(rules)
    reached, ahead = set(), [0]
    while ahead:
        at = ahead.pop()
        if at in reached:
            continue
        reached.add(at)
        code, offset = program[at * 8], int.from_bytes(program[at * 8 + 2 : at * 8 + 4], "little", signed=True)
        if code != 0x95:
            ahead += [at + 1] + ([at + 1 + offset] if code in (0x55, 0x5D, 0x15) else [])
    assert reached == set(range(len(program) // 8))


def test_every_jump_stays_inside_and_the_usual_rules_do_the_usual() -> None:
    program = bpf_devices.program([{"allow": False, "access": "rwm"}])
    assert interpret(program, 2, 6, 1, 3) == 1  # /dev/null, read and write
    assert interpret(program, 1, 2, 8, 0) == 0  # a disk
    assert interpret(program, 1, 1, 8, 0) == 1  # mknod is allowed, opening it is not
