"""From a configuration to operations: each test names what would go wrong on a machine if the plan were another."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hosts import DIRECTORY, FILE, HYBRID, V1, V2, FakeFacts, Wish, compiled, config, namespaces, only, order

from dolium.errors import InvalidArgument
from dolium.linux import capabilities, mounts
from dolium.linux.cgroup import tree
from dolium.runtime import plan as P
from dolium.runtime.compile import Launch, compile_container, compile_exec
from dolium.runtime.spec import HOOKS
from dolium.runtime.spec import NAMESPACES as FLAGS

MAPS = {"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}, {"containerID": 10, "hostID": 5000, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 3}]}


# -- namespaces --

@pytest.mark.parametrize("kind", [kind for kind in FLAGS if kind not in ("mount", "cgroup", "time", "user")])
def test_a_new_namespace_is_a_flag_of_clone(kind: str) -> None:
    with_it = compiled(config(hostname="", linux={"namespaces": namespaces(mount="", **{kind: ""})}))
    without = compiled(config(hostname="", linux={"namespaces": namespaces(mount="")}))
    assert only(with_it, "clone").args == (FLAGS["mount"] | FLAGS[kind], 0)
    assert only(without, "clone").args == (FLAGS["mount"], 0)


def test_a_cgroup_namespace_is_unshared_after_the_group_was_joined() -> None:
    plan = compiled(config())
    assert only(plan, "clone").args[0] & FLAGS["cgroup"] == 0
    stage = order(plan, P.CHILD_BEFORE_PIVOT)
    assert only(plan, "unshare").args == (FLAGS["cgroup"],)
    assert max(i for i, name in enumerate(stage) if name == "cg_join") < stage.index("unshare") < stage.index("root_attach")


def test_a_time_namespace_is_unshared_later_and_its_offsets_written_before_anything_runs_in_it() -> None:
    plan = compiled(config(linux={"namespaces": namespaces(mount="", uts="", time=""),
                                  "timeOffsets": {"boottime": {"secs": 5}, "monotonic": {"nanosecs": 7}}}))
    assert only(plan, "clone").args == (FLAGS["mount"] | FLAGS["uts"], FLAGS["time"])
    assert [(op.stage, op.args) for op in plan.named("proc_write")] == [
        (P.PARENT_AFTER_CLONE, ("timens_offsets", "boottime 5 0")),
        (P.PARENT_AFTER_CLONE, ("timens_offsets", "monotonic 0 7"))]


def test_namespaces_by_path_are_joined_user_first_and_mount_last() -> None:
    paths = {kind: f"/ns/{kind}" for kind in FLAGS}
    plan = compiled(config(linux={"namespaces": namespaces(**paths)}))
    joined = [op.args[1] for op in plan.named("ns_join")]
    assert joined[0] == FLAGS["user"] and joined[-1] == FLAGS["mount"] and sorted(map(str, joined)) == sorted(
        map(str, FLAGS.values()))
    assert only(plan, "clone").args == (0, 0)
    opened = {op.args[0]: (op.args[1], op.args[2]) for op in plan.named("ns_open")}
    for op in plan.named("ns_join"):
        kind = next(kind for kind, flag in FLAGS.items() if flag == op.args[1])
        assert opened[op.args[0]] == (f"/ns/{kind}", op.args[1])
    assert order(plan, P.PARENT_AFTER_CLONE) == [] and plan.named("loopback") == [] and len(plan.named("become_root")) == 1


def test_a_namespace_that_is_not_listed_is_neither_new_nor_joined() -> None:
    plan = compiled(config(hostname="", linux={"namespaces": namespaces(mount="")}))
    assert plan.named("ns_open") == plan.named("ns_join") == plan.named("unshare") == plan.named("loopback") == []


def test_loopback_is_brought_up_only_in_a_network_namespace_of_its_own() -> None:
    assert len(compiled(config()).named("loopback")) == 1
    assert compiled(config(), joined={"network": 230}).named("loopback") == []
    joined = compiled(config(), joined={"network": 230})
    assert only(joined, "ns_join").args == (230, FLAGS["network"])


# -- user namespaces --

def test_maps_are_written_by_the_parent_gid_before_uid() -> None:
    made = config(linux={"namespaces": namespaces(mount="", uts="", user=""), **MAPS})
    plan = compiled(made)
    maps = [("gid_map", "0 2000 3\n"), ("uid_map", "0 1000 10\n10 5000 1\n")]
    assert [op.args for op in plan.stage(P.PARENT_AFTER_CLONE)] == maps
    # without rights setgroups must be denied first
    assert [op.args for op in compiled(made, uid=1000).stage(P.PARENT_AFTER_CLONE)] == [("setgroups", "deny"), *maps]


def test_devices_in_a_user_namespace_are_binds_of_the_hosts() -> None:
    made = config(linux={"namespaces": namespaces(mount="", uts="", user=""), **MAPS,
                         "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]})
    plan = compiled(made)
    assert plan.named("mknod") == []
    slots = {op.args[0]: op.args[1] for op in plan.named("open_tree")}
    binds = {op.args[1]: slots[op.args[0]] for op in plan.named("mount_tree") if op.args[2:] == (0, 0o666)}
    assert binds["/dev/fuse"] == "/dev/fuse" and binds["/dev/null"] == "/dev/null" and len(binds) == 7


def test_the_child_becomes_root_before_it_mounts() -> None:
    plan = compiled(config(linux={"namespaces": namespaces(mount="", uts="", user=""), **MAPS}))
    stage = order(plan, P.CHILD_BEFORE_PIVOT)
    assert stage.index("cg_join") < stage.index("become_root") < stage.index("root_attach") < stage.index("mount_fs")
    assert compiled(config()).named("become_root") == []


# -- cgroups --

@pytest.mark.parametrize("layout", [V1, HYBRID, V2], ids=["v1", "hybrid", "v2"])
def test_every_hierarchy_is_made_joined_and_undone(layout: tree.Layout) -> None:
    plan = compiled(config(linux={"cgroupsPath": "/a/b"}), layout)
    made = {op.args[1]: op for op in plan.named("cg_mkdir")}
    folders = layout.paths("/a/b")
    assert len(folders) == {"v1": 8, "hybrid": 9, "v2": 1}["v2" if layout is V2 else "hybrid" if layout is HYBRID else "v1"]
    ways = [*plan.named("cg_join"), *plan.named("cg_clone")]
    assert [op.args[0] for op in ways] == [made[folder].args[0] for folder in folders]
    assert len({op.args[0] for op in ways}) == len(folders)
    # a thread moves itself by v1's tasks, clone3 puts it into the v2 folder: neither waits for a grace period
    assert [made[folder].args[3] for folder in folders] == [1] * len(plan.named("cg_join")) + [2] * (layout is not V1)
    assert len(plan.named("cg_clone")) == (layout is not V1)
    assert [op.args[0] for op in plan.named("cg_rmdir") if op.stage == P.ON_FAILURE] == folders
    kill = next(op for op in plan.named("cg_kill"))
    assert kill.stage == P.ON_FAILURE and kill.args == (folders,)
    # the first is the one that tells another container's group; before its success nothing may be cleaned up
    assert made[folders[0]].flags & P.NOTHING_OURS and made[folders[0]].args[2] & 2
    assert not any(made[folder].flags & P.NOTHING_OURS for folder in folders[1:])
    names = [op.name for op in plan.ops]
    assert names.index("cg_mkdir") < names.index("cg_kill")


def test_a_v1_cpuset_gets_its_parents_values() -> None:
    plan = compiled(config(linux={"cgroupsPath": "/g"}))
    inherit = {op.args[1] for op in plan.named("cg_mkdir") if isinstance(op.args[2], int) and op.args[2] & 1}
    assert inherit == {"/sys/fs/cgroup/cpuset/g"}


def test_v2_hands_controllers_down_above_the_group_and_not_in_it() -> None:
    resources = {"blockIO": {"weight": 100}, "memory": {"limit": 5}}
    plan = compiled(config(linux={"cgroupsPath": "/a/b/c", "resources": resources}), V2)
    handed = [(op.args[0], op.args[1]) for op in plan.named("cg_write") if str(op.args[0]).endswith("subtree_control")]
    assert {path for path, _ in handed} == {f"/sys/fs/cgroup{group}/cgroup.subtree_control" for group in ("", "/a", "/a/b")}
    assert {value for _, value in handed} >= {"+io", "+memory", "+pids", "+cpu"}
    assert all(op.flags & P.OPTIONAL for op in plan.named("cg_write") if "subtree" in str(op.args[0]))


@pytest.mark.parametrize(("layout", "wanted"), [
    (V1, [("/sys/fs/cgroup/memory/g/memory.limit_in_bytes", "1024"), ("/sys/fs/cgroup/pids/g/pids.max", "7")]),
    (HYBRID, [("/sys/fs/cgroup/memory/g/memory.limit_in_bytes", "1024"), ("/sys/fs/cgroup/pids/g/pids.max", "7")]),
    (V2, [("/sys/fs/cgroup/g/memory.max", "1024"), ("/sys/fs/cgroup/g/pids.max", "7")])], ids=["v1", "hybrid", "v2"])
def test_limits_go_where_the_controller_is(layout: tree.Layout, wanted: list[tuple[str, str]]) -> None:
    resources = {"memory": {"limit": 1024}, "pids": {"limit": 7}}
    plan = compiled(config(linux={"cgroupsPath": "/g", "resources": resources}), layout)
    found = [op.args[:2] for op in plan.named("cg_write") if "subtree" not in str(op.args[0])]
    assert found == wanted


def test_devices_are_bpf_on_v2_and_files_on_v1() -> None:
    rules = {"devices": [{"allow": False, "access": "rwm"}]}
    v2 = compiled(config(linux={"cgroupsPath": "/g", "resources": rules}), V2)
    assert only(v2, "cg_bpf_devices").args[0] == "/sys/fs/cgroup/g"
    v1 = compiled(config(linux={"cgroupsPath": "/g", "resources": rules}), V1)
    assert v1.named("cg_bpf_devices") == []
    assert v1.named("cg_write")[0].args[:2] == ("/sys/fs/cgroup/devices/g/devices.deny", "a")


def test_cgroup_mounts_per_layout() -> None:
    def shown(layout: tree.Layout, own: bool) -> dict[str, str]:
        kinds = {"mount": "", "uts": "", **({"cgroup": ""} if own else {})}
        plan = compiled(config(linux={"cgroupsPath": "/g", "namespaces": namespaces(**kinds)}), layout)
        found = {str(op.args[4]): str(op.args[0]) for op in plan.named("mount_fs") if "cgroup" in str(op.args[4])}
        trees = {op.args[0]: str(op.args[1]) for op in plan.named("open_tree")}
        found.update({str(op.args[1]): trees[op.args[0]] for op in plan.named("mount_tree")})
        return found

    base = "/sys/fs/cgroup"
    assert shown(V2, True) == {base: "cgroup2"} and shown(V2, False) == {base: f"{base}/g"}
    v1 = shown(V1, True)
    assert v1[base] == "tmpfs" and v1[f"{base}/memory"] == "cgroup" and f"{base}/unified" not in v1
    assert shown(HYBRID, True)[f"{base}/unified"] == "cgroup2"
    assert shown(HYBRID, False)[f"{base}/memory"] == f"{base}/memory/g"
    links = {op.args for op in compiled(config()).named("symlink")}
    assert ("cpu,cpuacct", f"{base}/cpu") in links and ("cpu,cpuacct", f"{base}/cpuacct") in links


# -- mounts --

def bound(*options: str, source: str = "/data", info: bytes = DIRECTORY) -> P.Plan:
    made = config(mounts=[{"destination": "/in", "type": "bind", "source": source, "options": list(options)}])
    return compiled(made, facts=FakeFacts(stats={source if source.startswith("/") else f"/bundle/{source}": info}))


def attributes(plan: P.Plan) -> list[tuple[object, ...]]:
    slot = plan.named("mount_tree")[0].args[0]
    return [op.args[1:5] for op in plan.named("mount_attr") if op.args[0] == slot]


def test_a_bind_is_a_copy_made_by_the_parent_and_attached_by_the_child() -> None:
    plan = bound("bind")
    tree_op = next(op for op in plan.named("open_tree") if op.args[1] == "/data")
    assert (tree_op.stage, tree_op.args[2:]) == (P.PARENT_BEFORE_CLONE, (0, 1))
    attach = only(plan, "mount_tree")
    assert (attach.stage, attach.args) == (P.CHILD_BEFORE_PIVOT, (tree_op.args[0], "/in", 1, 0))
    assert attributes(plan) == [(0, 0, mounts.MS_SLAVE, 1)]  # never a peer of the host's mount


@pytest.mark.parametrize(("options", "wanted"), [
    (("bind", "ro"), [(mounts.ATTR_RDONLY, 0, mounts.MS_SLAVE, 0), (0, 0, mounts.MS_SLAVE, 1)]),
    (("rbind", "rro"), [(0, 0, mounts.MS_SLAVE, 1), (mounts.ATTR_RDONLY, 0, 0, 1)]),
    (("bind", "rprivate"), [(0, 0, mounts.MS_PRIVATE, 1)]),
    (("bind", "shared"), [(0, 0, mounts.MS_SHARED, 0)]),
    (("rbind", "rshared", "rw"), [(0, mounts.ATTR_RDONLY, mounts.MS_SHARED, 0), (0, 0, mounts.MS_SHARED, 1)]),
    (("bind", "noexec", "nosuid"), [(mounts.ATTR_NOEXEC | mounts.ATTR_NOSUID, 0, mounts.MS_SLAVE, 0),
                                    (0, 0, mounts.MS_SLAVE, 1)]),
])
def test_bind_options(options: tuple[str, ...], wanted: list[tuple[int, ...]]) -> None:
    plan = bound(*options)
    assert attributes(plan) == wanted
    assert next(op for op in plan.named("open_tree") if op.args[1] == "/data").args[2] == int("rbind" in options)


def test_a_bind_of_a_file_and_of_a_relative_source() -> None:
    plan = bound("bind", info=FILE, source="file")
    assert next(op for op in plan.named("open_tree") if op.args[1] == "/bundle/file").args[3] == 2
    assert only(plan, "mount_tree").args[2] == 0


def test_an_absent_source_is_told_before_anything_is_made() -> None:
    with pytest.raises(InvalidArgument, match=r"mounts\[0\].source: /data does not exist"):
        compiled(config(mounts=[{"destination": "/in", "type": "bind", "source": "/data"}]))


def test_too_many_binds_are_refused_not_overflowed() -> None:
    many = [{"destination": f"/m{n}", "type": "bind", "source": "/data"} for n in range(300)]
    with pytest.raises(InvalidArgument, match="more than"):
        compiled(config(mounts=many), facts=FakeFacts(stats={"/data": DIRECTORY}))


def test_tmpfs_options_are_split_into_attributes_and_data() -> None:
    made = config(mounts=[{"destination": "tmp/", "type": "tmpfs", "source": "src",
                           "options": ["nosuid", "noexec", "ro", "size=5k", "mode=700"]}])
    assert only(compiled(made), "mount_fs").args == (
        "tmpfs", "src", ["size=5k", "mode=700"], mounts.ATTR_NOSUID | mounts.ATTR_NOEXEC | mounts.ATTR_RDONLY, "/tmp", 0)


def test_copy_up_fills_first_and_closes_after() -> None:
    made = config(mounts=[{"destination": "/etc", "type": "tmpfs", "options": ["tmpcopyup", "ro", "nodev"]}])
    plan = compiled(made)
    assert only(plan, "mount_fs").args[3:] == (mounts.ATTR_NODEV, "/etc", P.MOUNT_COPY_UP)
    assert plan.named("remount")[0].args == ("/etc", mounts.ATTR_RDONLY, 0)


def test_mounts_keep_their_order() -> None:
    made = config(mounts=[{"destination": "/b", "type": "tmpfs"}, {"destination": "/in", "type": "bind", "source": "/data"},
                          {"destination": "/a", "type": "tmpfs"}])
    plan = compiled(made, facts=FakeFacts(stats={"/data": DIRECTORY}))
    stage = [op.label for op in plan.stage(P.CHILD_BEFORE_PIVOT) if op.name in ("mount_fs", "mount_tree")]
    assert stage == ["mount tmpfs on /b", "bind /data on /in", "mount tmpfs on /a"]


def test_all_sources_are_asked_for_in_one_round() -> None:
    made = config(mounts=[{"destination": f"/{n}", "type": "bind", "source": f"/s{n}"} for n in range(3)])
    wishes = Wish().first(lambda facts: compile_container(made, facts, Launch("box", "/bundle", V1)))
    assert wishes == ["stat:/s0", "stat:/s1", "stat:/s2"]


def test_hidden_folders_are_covered_after_all_mounts() -> None:
    plan = compiled(config(), hidden=["/var/lib/dolium"])
    last = [op for op in plan.stage(P.CHILD_BEFORE_PIVOT) if op.name in ("mount_fs", "mount_tree")][-1]
    assert last.args[4] == "/var/lib/dolium" and last.args[2] == ["size=0", "mode=0"]


def test_devices_are_nodes_with_their_mode() -> None:
    made = config(linux={"devices": [{"path": "/dev/x", "type": "b", "major": 8, "minor": 1, "fileMode": 0o640, "uid": 3},
                                     {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600},
                                     {"path": "/p", "type": "p", "fileMode": 0}]})
    nodes = {op.args[0]: op.args[1:] for op in compiled(made).named("mknod")}
    assert nodes["/dev/x"] == (0o060640, 8, 1, 3, 0) and nodes["/p"] == (0o010000, 0, 0, 0, 0)
    assert nodes["/dev/null"][0] == 0o020600 and len(nodes) == 8  # given once, the configuration's wins


def test_a_bound_dev_gets_no_default_devices() -> None:
    made = config(mounts=[{"destination": "/dev", "type": "bind", "source": "/dev"}])
    plan = compiled(made, facts=FakeFacts(stats={"/dev": DIRECTORY}))
    assert plan.named("mknod") == [] and not any(op.args[1] == "/dev/fd" for op in plan.named("symlink"))


# -- pivot and around it --

def test_the_root_is_readonly_after_everything_was_made_in_it() -> None:
    made = config(root={"path": "/image", "readonly": True})
    stage = order(compiled(made), P.CHILD_AFTER_PIVOT)
    assert stage.index("pivot") < stage.index("remount") < stage.index("readonly") < stage.index("mask")
    assert ("/", mounts.ATTR_RDONLY, 0) in [op.args for op in compiled(made).stage(P.CHILD_AFTER_PIVOT)]
    assert "remount" not in order(compiled(config(root={"path": "r"})), P.CHILD_AFTER_PIVOT)
    assert next(op for op in compiled(config(root={"path": "r"})).named("open_tree")).args[1] == "/bundle/r"
    assert next(op for op in compiled(made).named("open_tree")).args[1] == "/image"


def test_the_host_never_sees_what_is_mounted() -> None:
    assert only(compiled(config()), "propagation").args == (mounts.MS_REC | mounts.MS_SLAVE,)
    private = compiled(config(linux={"rootfsPropagation": "private"}))
    assert only(private, "propagation").args == (mounts.MS_REC | mounts.MS_SLAVE,)
    assert ("/", 0, mounts.MS_PRIVATE) in [op.args for op in private.stage(P.CHILD_AFTER_PIVOT)]
    shared = compiled(config(linux={"rootfsPropagation": "rshared"}))
    assert only(shared, "propagation").args == (mounts.MS_REC | mounts.MS_SLAVE,)  # else the root lies on the host's "/"
    assert ("/", 0, mounts.MS_REC | mounts.MS_SHARED) in [op.args for op in shared.stage(P.CHILD_AFTER_PIVOT)]
    slots = {op.args[0] for op in shared.named("open_tree")}
    cut = {op.args[0] for op in shared.named("mount_attr") if op.args[3] in (mounts.MS_SLAVE, mounts.MS_PRIVATE)}
    assert slots and cut == slots  # a copy of a shared mount is its peer


def test_hooks_are_in_their_stages_in_order() -> None:
    hooks = {kind: [{"path": f"/{kind}/{n}", "timeout": 2, "env": ["A=1"]} for n in range(2)] for kind in HOOKS}
    plan = compiled(config(hooks=hooks), start_socket="/run/s")
    found = [(op.stage, op.args[0]) for op in plan.named("hook")]
    assert found == [(stage, f"/{kind}/{n}") for kind, stage in (
        ("prestart", P.PARENT_BEFORE_PIVOT), ("createRuntime", P.PARENT_BEFORE_PIVOT),
        ("createContainer", P.CHILD_AFTER_PIVOT), ("startContainer", P.AFTER_START)) for n in range(2)]
    assert all(op.args[1:4] == ([op.args[0]], ["A=1"], 2000) for op in plan.named("hook"))
    stage = order(plan, P.CHILD_AFTER_PIVOT)
    assert stage[:3] == ["hook", "hook", "pivot"]  # createContainer: the container's namespaces, the host's root
    assert order(plan, P.AFTER_START) == ["wait_start", "hook", "hook", "exec"]
    assert '"status": "creating"' in str(plan.named("hook")[0].args[4]) and P.PID in str(plan.named("hook")[0].args[4])


def test_names_and_sysctls_are_set_in_the_container() -> None:
    plan = compiled(config(hostname="h", domainname="d", linux={"sysctl": {"net.ipv4.ip_forward": "1", "net/a.b/c": "2"}}))
    assert {op.args for op in plan.named("sysctl")} == {("net/ipv4/ip_forward", "1"), ("net/a.b/c", "2")}
    assert {op.stage for name in ("hostname", "domainname", "sysctl") for op in plan.named(name)} == {P.CHILD_AFTER_PIVOT}


# -- the process --

CAPS = {"bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"],
        "inheritable": ["CAP_CHOWN"], "ambient": []}


def test_capabilities_are_dropped_in_the_one_order_that_works() -> None:
    plan = compiled(config(process={"capabilities": CAPS, "user": {"uid": 5, "gid": 6, "additionalGids": [7]}}))
    stage = order(plan, P.CHILD_AFTER_PIVOT)
    places = [stage.index(name) for name in ("pivot", "rlimit", "drop_bounding", "keep_caps", "user", "capabilities",
                                             "find_executable")]
    assert places == sorted(places)
    assert only(plan, "drop_bounding").args == (capabilities.mask(["CAP_KILL", "CAP_CHOWN"]),)
    assert only(plan, "capabilities").args == (1 << 5, 1 << 5, 1, 0)
    assert only(plan, "user").args == (5, 6, ["7"])


def test_without_capabilities_all_are_dropped() -> None:
    made = config()
    del made["process"]["capabilities"]
    plan = compiled(made)
    assert only(plan, "drop_bounding").args == (0,) and only(plan, "capabilities").args == (0, 0, 0, 0)


@pytest.mark.parametrize("no_new_privs", [True, False])
def test_the_filters_flags_are_those_of_the_profile(no_new_privs: bool) -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}
    made = config(process={"noNewPrivileges": no_new_privs}, linux={"seccomp": profile})
    assert only(compiled(made, seccomp=b"\0" * 8), "seccomp").args == (6, b"\0" * 8)


@pytest.mark.parametrize("no_new_privs", [True, False])
def test_the_filter_is_as_late_as_its_rights_allow(no_new_privs: bool) -> None:
    plan = compiled(config(process={"noNewPrivileges": no_new_privs}), seccomp=b"\0" * 8)
    load = only(plan, "seccomp")
    names = order(plan)
    assert load.args == (0, b"\0" * 8)
    if no_new_privs:
        assert load.stage == P.AFTER_START and order(plan, P.AFTER_START)[-2:] == ["seccomp", "exec"]
        assert len(plan.named("no_new_privs")) == 1
    else:  # it needs CAP_SYS_ADMIN, which is dropped next
        assert load.stage == P.CHILD_AFTER_PIVOT and names.index("seccomp") < names.index("drop_bounding")
        assert names.index("pivot") < names.index("seccomp") and plan.named("no_new_privs") == []


def test_limits_umask_and_score() -> None:
    plan = compiled(config(process={"oomScoreAdj": -5, "rlimits": [
        {"type": "RLIMIT_NOFILE", "soft": 5, "hard": (1 << 64) - 1}], "user": {"umask": 0}}))
    assert only(plan, "rlimit").args == (7, 5, -1) and only(plan, "umask").args == (0,)
    assert only(plan, "proc_write").args == ("oom_score_adj", "-5")
    assert only(compiled(config()), "umask").args == (0o022,)


def test_cwd_is_tried_as_root_and_must_work_as_the_user() -> None:
    plan = compiled(config(process={"cwd": "/work"}))
    first, second = plan.named("cwd")
    assert first.flags & P.OPTIONAL and not second.flags & P.OPTIONAL
    names = order(plan)
    user = names.index("user")
    assert names.index("cwd") < user < len(names) - 1 - names[::-1].index("cwd")
    assert only(plan, "mkdir_in_root").args == ("/work", 0o755)


def test_preserved_fds() -> None:
    assert only(compiled(config(), preserve_fds=3), "preserve_fds").args == (3,)
    assert compiled(config()).named("preserve_fds") == []


def test_terminals() -> None:
    made = config(process={"terminal": True, "consoleSize": {"height": 5, "width": 6}})
    relayed = compiled(made)
    assert only(relayed, "console").args == (-1, 5, 6) and relayed.named("connect") == []
    sent = compiled(made, console_socket="/c")
    assert only(sent, "connect").args[1] == "/c" and only(sent, "console").args[0] == only(sent, "connect").args[0]
    stage = order(sent, P.CHILD_BEFORE_PIVOT)
    assert stage.index("setsid") < stage.index("console") and stage.index("mount_fs") < stage.index("console")
    shim = compiled(config(), stdio=True)
    assert only(shim, "stdio").args == (P.SLOT_STDIN, P.SLOT_STDOUT, P.SLOT_STDERR) and shim.named("console") == []


def test_waiting_for_start_comes_before_anything_of_the_container_runs() -> None:
    plan = compiled(config(), start_socket="/run/start.sock")
    assert order(plan, P.AFTER_START) == ["wait_start", "exec"]
    assert only(plan, "listen").args[1] == "/run/start.sock"
    assert only(plan, "listen").args[0] == only(plan, "wait_start").args[0]
    names = order(plan, P.PARENT_BEFORE_CLONE)
    assert names[-2:] == ["listen", "clone"]
    assert compiled(config()).named("wait_start") == []


def test_every_slot_is_filled_before_it_is_used() -> None:
    made = config(linux={"namespaces": namespaces(mount="", uts="", user="", network="/n"), **MAPS},
                  process={"terminal": True},
                  mounts=[{"destination": "/in", "type": "bind", "source": "/data"}])
    plan = compiled(made, HYBRID, FakeFacts(stats={"/data": DIRECTORY}), console_socket="/c", start_socket="/s")
    filled: set[Any] = set()
    for op in sorted(plan.ops, key=lambda op: op.stage):
        if op.name in ("open_tree", "ns_open", "connect", "listen", "cg_mkdir", "open_path", "userns"):
            assert op.args[0] == -1 or op.args[0] not in filled, op
            filled.add(op.args[0])
        elif op.name in ("ns_join", "cg_join", "root_attach", "mount_tree", "console", "mount_attr", "wait_start"):
            assert op.args[0] in filled, op
        elif op.name == "mask":
            assert op.args[1] in filled
    assert all(isinstance(slot, int) and slot < P.SLOT_STDIN for slot in filled)


def test_the_plan_of_the_default_configuration_reads_well_and_encodes() -> None:
    plan = compiled(config())
    text = plan.describe()
    for words in ("parent-before-clone", "clone3", "child-before-pivot", "mount proc on /proc", "pivot_root", "exec sh"):
        assert words in text
    assert len(P.decode(plan.encode()).ops) == len(plan.ops)


# -- exec --

def test_exec_joins_what_the_container_declared_and_checks_its_init() -> None:
    made = config(linux={"namespaces": namespaces(mount="", uts="", pid="", user="/u", network="/n")})
    process = {"args": ["x"], "cwd": "/", "env": ["A=1"], "user": {"uid": 1}}
    plan = compile_exec(made, process, FakeFacts(), 77, 88, Launch("box", "/b", V1), ["/sys/fs/cgroup/pids/g", "/sys/fs/cgroup/memory/g"])
    assert [op.args[1] for op in plan.named("ns_open")] == [f"/proc/77/ns/{name}" for name in ("user", "uts", "net", "pid",
                                                                                              "mnt")]
    names = order(plan, P.PARENT_BEFORE_CLONE)
    last_open = len(names) - 1 - names[::-1].index("ns_open")
    assert last_open < names.index("signal") < names.index("clone")
    assert only(plan, "signal").args == (77, 88, 0) and only(plan, "clone").args == (0, 0)
    assert [op.args[1] for op in plan.named("open_path")] == ["/sys/fs/cgroup/pids/g/tasks",
                                                              "/sys/fs/cgroup/memory/g/tasks"]
    assert len(plan.named("cg_join")) == 2 and len(plan.named("become_root")) == 1
    assert plan.named("pivot") == plan.named("mount_fs") == plan.named("hook") == []


@pytest.mark.parametrize("user", [False, True])
def test_who_joined_a_user_namespace_moves_by_the_file_that_was_opened_before(user: bool) -> None:
    made = config(linux={"namespaces": namespaces(mount="", pid="", **({"user": "/u"} if user else {})), "cgroupsPath": "/g"})
    process = {"args": ["x"], "cwd": "/"}
    for plan in (compile_exec(made, process, FakeFacts(), 7, 8, Launch("box", "/b", V2), V2.paths("/g")), compiled(made, V2)):
        assert len(plan.named("cg_clone")) == (not user) and len(plan.named("cg_join")) == user
        first = order(plan, P.PARENT_BEFORE_CLONE)
        assert user or first.index("cg_clone") < first.index("clone")


def test_exec_has_the_filter_and_the_capabilities_too() -> None:
    process = {"args": ["x"], "cwd": "/", "noNewPrivileges": True, "capabilities": CAPS}
    launch = Launch("box", "/b", V1)
    launch.seccomp = b"\0" * 8
    plan = compile_exec(config(), process, FakeFacts(), 1, 2, launch, [])
    assert order(plan, P.AFTER_START) == ["seccomp", "exec"] and only(plan, "drop_bounding").args == (0b100001,)


# -- the seccomp listener --

NOTIFY = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "agent", "listenerMetadata": '"@PID@', "syscalls": [
    {"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_a_listener_goes_out_before_the_container_is_created(no_new_privs: bool) -> None:
    made = config(linux={"seccomp": NOTIFY}, process={"noNewPrivileges": no_new_privs})
    plan = compiled(made, seccomp=b"\0" * 8)
    stage = order(plan, P.CHILD_AFTER_PIVOT)
    assert (stage.index("seccomp_listener") < stage.index("drop_bounding")) is not no_new_privs
    assert plan.named("seccomp") == [] and (stage[-1] == "seccomp_listener") is no_new_privs
    connect = only(plan, "connect")
    assert connect.args[1] == "/bundle/agent" and only(plan, "close").args == connect.args[:1] and connect.stage == P.PARENT_BEFORE_CLONE
    state = json.loads(str(only(plan, "seccomp_listener").args[3]).replace(P.PID, "7"))
    assert state["pid"] == state["state"]["pid"] == 7 and state["metadata"] == '"@PID@' and state["fds"] == ["seccompFd"]
