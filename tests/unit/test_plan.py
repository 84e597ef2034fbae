"""What a configuration becomes: the operations, their stages and their order."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dolium.errors import InvalidArgument
from dolium.linux.cgroup import tree
from dolium.runtime import plan as P
from dolium.runtime.compile import Launch, compile_container, compile_exec
from dolium.runtime.default_spec import default_spec
from dolium.runtime.facts import Facts
from dolium.runtime.spec import validate

HYBRID = tree.parse("3:memory:/\n2:cpuset:/\n1:cpu,cpuacct:/\n4:devices:/\n0::/\n",
                    ["memory", "cpuset", "cpu,cpuacct", "devices", "unified"], False)


def config(**changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(default_spec())
    made["process"]["terminal"] = False
    for path, value in changes.items():
        target = made
        *parents, last = path.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return made


def compiled(made: dict[str, Any], known: dict[str, list[bytes]] | None = None, **options: Any) -> P.Plan:
    validate(made)
    launch = Launch("c1", "/bundle", options.pop("layout", HYBRID))
    for name, value in options.items():
        setattr(launch, name, value)
    plan = compile_container(made, Facts(known or {}), launch)
    plan.encode()
    return plan


def labels(plan: P.Plan, stage: int) -> list[str]:
    return [op.label for op in plan.stage(stage)]


def index(plan: P.Plan, name: str) -> int:
    return next(number for number, op in enumerate(plan.ops) if op.name == name)


def test_new_namespaces_are_clone_flags_but_cgroup_is_after_the_join() -> None:
    plan = compiled(config())
    flags = plan.named("clone")[0].args[0]
    assert flags == 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x00020000
    child = [op.name for op in plan.stage(P.CHILD_BEFORE_PIVOT)]
    assert child.index("unshare") > max(number for number, name in enumerate(child) if name == "cg_join")
    assert plan.ops[-1].name == "clone"


def test_the_hosts_namespaces_are_left_and_given_ones_joined_user_first_mount_last() -> None:
    made = config(linux__namespaces=[{"type": "mount", "path": "/p/mnt"}, {"type": "network", "path": "/p/net"},
                                     {"type": "user", "path": "/p/user"}, {"type": "pid"}])
    del made["hostname"]
    plan = compiled(made)
    assert [op.label.split()[2] for op in plan.named("ns_join")] == ["user", "network", "mount"]
    assert plan.named("clone")[0].args[0] == 0x20000000
    assert not plan.named("loopback")


def test_a_time_namespace_is_unshared_before_its_offsets() -> None:
    made = config(linux__timeOffsets={"boottime": {"secs": 5}})
    made["linux"]["namespaces"].append({"type": "time"})
    plan = compiled(made)
    assert plan.named("clone")[0].args[1] == 0x80
    assert "set linux.timeOffsets.boottime" in labels(plan, P.PARENT_AFTER_CLONE)


def test_a_user_namespace_gets_maps_and_the_hosts_device_nodes() -> None:
    made = config(linux__uidMappings=[{"containerID": 0, "hostID": 1000, "size": 10}],
                  linux__gidMappings=[{"containerID": 0, "hostID": 2000, "size": 10}])
    made["linux"]["namespaces"].append({"type": "user"})
    plan = compiled(made)
    assert [op.args for op in plan.named("proc_write")] == [("gid_map", "0 2000 10\n"), ("uid_map", "0 1000 10\n")]
    assert plan.named("mount_tree")[0].args[1] == "/dev/null"
    assert not plan.named("mknod")


@pytest.mark.parametrize(("no_new_privs", "stage"), [(False, P.CHILD_AFTER_PIVOT), (True, P.AFTER_START)])
def test_the_filter_is_early_only_when_it_must_be(no_new_privs: bool, stage: int) -> None:
    plan = compiled(config(process__noNewPrivileges=no_new_privs), seccomp=b"\0" * 8)
    assert [op.stage for op in plan.named("seccomp")] == [stage]
    if not no_new_privs:
        assert index(plan, "seccomp") < index(plan, "user")


def test_privileges_go_in_the_only_order_the_kernel_takes() -> None:
    plan = compiled(config())
    order = [index(plan, name) for name in ("drop_bounding", "keep_caps", "user", "capabilities")]
    assert order == sorted(order)


def test_ambient_capabilities_the_kernel_would_refuse_are_passed_over() -> None:
    made = config()
    made["process"]["capabilities"] |= {"ambient": ["CAP_KILL", "CAP_CHOWN"], "inheritable": ["CAP_KILL"]}
    assert compiled(made).named("capabilities")[0].args[2:] == (1 << 5, 1 << 5)


def test_hooks_are_in_their_stages() -> None:
    kinds = ("prestart", "createRuntime", "createContainer", "startContainer")
    plan = compiled(config(hooks={kind: [{"path": f"/{kind}", "timeout": 2}] for kind in kinds}))
    where = {op.label.split()[0]: op.stage for op in plan.named("hook")}
    assert where == {"prestart": P.PARENT_BEFORE_PIVOT, "createRuntime": P.PARENT_BEFORE_PIVOT,
                     "createContainer": P.CHILD_AFTER_PIVOT, "startContainer": P.AFTER_START}
    assert plan.named("hook")[0].args[3] == 2000
    assert index(plan, "hook") < index(plan, "pivot")


def test_bind_mounts_are_cut_off_unless_shared_is_asked_for() -> None:
    known = {"stat:/src": [b"0", b"16877 0 0 0"]}
    for option, propagation in (([], 1 << 19), (["rprivate"], 1 << 18), (["rshared"], 1 << 20)):
        made = config(mounts=[{"destination": "/d", "source": "/src", "options": ["rbind", "ro", *option]}])
        plan = compiled(made, known)
        attrs = [op.args for op in plan.named("mount_attr") if op.args[0] == plan.named("mount_tree")[0].args[0]]
        assert attrs[0][1] == 1  # read-only
        assert {entry[3] for entry in attrs} == {propagation}


def test_a_missing_bind_source_is_named() -> None:
    made = config(mounts=[{"destination": "/d", "source": "/no", "options": ["bind"]}])
    with pytest.raises(InvalidArgument, match=r"mounts\[0\]\.source: /no does not exist"):
        compiled(made, {"stat:/no": [b"2"]})


def test_cgroups_of_each_layout() -> None:
    resources = {"memory": {"limit": 100}, "devices": [{"allow": False, "access": "rwm"}]}
    plan = compiled(config(linux__resources=resources))
    writes = {op.args[0]: op.args[1] for op in plan.named("cg_write")}
    assert writes["/sys/fs/cgroup/memory/dolium/c1/memory.limit_in_bytes"] == "100"
    assert not plan.named("cg_bpf_devices")
    assert [op.args[1] for op in plan.named("cg_mkdir")] == [f"{folder}/dolium/c1" for folder in (
        "/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpuset", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/devices",
        "/sys/fs/cgroup/unified")]
    assert [op.args[2] & 1 for op in plan.named("cg_mkdir")] == [0, 1, 0, 0, 0]
    pure = tree.parse("0::/\n", [], True)
    known = {"read:/sys/fs/cgroup/cgroup.controllers": [b"0", b"cpu memory pids\n"]}
    plan = compiled(config(linux__resources=resources), known, layout=pure)
    writes = {op.args[0]: op.args[1] for op in plan.named("cg_write")}
    assert writes["/sys/fs/cgroup/dolium/c1/memory.max"] == "100"
    assert "/sys/fs/cgroup/cgroup.subtree_control" in writes
    assert plan.named("cg_bpf_devices")


def test_what_failed_is_undone_and_a_losers_failure_undoes_nothing() -> None:
    plan = compiled(config())
    assert {op.name for op in plan.stage(P.ON_FAILURE)} >= {"cg_kill", "cg_rmdir"}
    assert plan.ops[0].name == "cg_mkdir"
    assert plan.ops[0].flags & P.NOTHING_OURS


def test_exec_checks_init_after_its_namespaces_are_open() -> None:
    made = config()
    plan = compile_exec(made, {**made["process"], "args": ["x"]}, Facts(), 77, 1234, Launch("c1", "/", HYBRID), ["/sys/fs/cgroup/x"])
    assert index(plan, "signal") > max(number for number, op in enumerate(plan.ops) if op.name == "ns_open")
    assert plan.named("signal")[0].args == (77, 1234, 0)
    assert plan.named("ns_join")[-1].label.endswith("mount namespace")
    plan.encode()


def test_a_plan_is_readable() -> None:
    text = compiled(config()).describe()
    for line in ("parent-before-clone", "  mount proc on /proc", "  pivot_root", "  become process.user 0:0", "  exec sh"):
        assert line in text.splitlines()
