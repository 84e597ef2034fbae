"""Whose groups a caller without rights may use, who writes its maps, and where the mounts are opened."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import HYBRID_TEXT, V1, V2, FakeFacts, compiled, config, namespaces
from test_runtime_cli import Host, ask

from dolium.errors import InvalidArgument
from dolium.runtime import plan as P
from dolium.runtime import rootless
from dolium.runtime.cgroups import rootless as is_rootless

MINE, ROOTS = b"16877 1000 1000 0", b"16877 0 0 0"
USER = namespaces(user="", mount="", pid="", uts="", cgroup="")
ONE = [{"containerID": 0, "hostID": 1000, "size": 1}]
RANGE = [*ONE, {"containerID": 1, "hostID": 100000, "size": 65536}]


def test_who_is_rootless() -> None:
    whole = FakeFacts({"/proc/self/uid_map": "         0          0 4294967295\n"})
    part = FakeFacts({"/proc/self/uid_map": "         0       1000          1\n"})
    assert (is_rootless(whole, 0), is_rootless(whole, 1000), is_rootless(part, 0)) == (False, True, True)


def test_groups_of_v1_that_are_mine() -> None:
    facts = FakeFacts({"/proc/self/cgroup": HYBRID_TEXT}, {"/sys/fs/cgroup/pids/a": MINE, "/sys/fs/cgroup": ROOTS, "/": ROOTS,
                                                          "/sys/fs/cgroup/memory/a": ROOTS, "/sys/fs/cgroup/cpuset": MINE})
    assert rootless.mine(facts, V1, "/a/b/c", 1000).v1 == {"pids": "/sys/fs/cgroup/pids", "cpuset": "/sys/fs/cgroup/cpuset"}


@pytest.mark.parametrize(("own", "usable"), [("/u/d/shell", True), ("/u/d", True), ("/u/session", False), ("/", False)])
def test_groups_of_v2_need_the_group_above_both(own: str, usable: bool) -> None:
    facts = FakeFacts({"/proc/self/cgroup": f"0::{own}\n"}, {"/sys/fs/cgroup": ROOTS, "/sys/fs/cgroup/u": ROOTS,
                                                            "/sys/fs/cgroup/u/d": MINE})
    assert (rootless.mine(facts, V2, "/u/d/c", 1000).unified is not None) is usable


def user(made: dict[str, Any]) -> Host:
    host = Host("", made)
    host.stats["/sys/fs/cgroup"] = host.stats["/"] = ROOTS
    host.stats["/usr/bin/newuidmap"] = host.stats["/usr/bin/newgidmap"] = b"35309 0 0 0"
    host.files["/proc/self/uid_map"] = "0 0 4294967295\n"
    return host


def asks(host: Host, *words: str, path: str = "/usr/bin") -> P.Plan:
    from dolium.runtime.cli import compile_request

    argv = [word.encode() for word in ("dolium-runtime", "--root", "/run", *words)]
    plan, error = compile_request({"argv": argv, "env": [f"PATH={path}".encode()], "cwd": [b"/work"], "uid": [b"1000"],
                                   "gid": [b"1000"], "now": [b"1"], "machine": [b"x86_64"]}, host)
    if plan is None:
        assert error is not None
        raise InvalidArgument(error[0])
    return plan


def test_an_ordinary_users_plan() -> None:
    made = config(linux={"namespaces": USER, "uidMappings": ONE, "gidMappings": ONE,
                         "resources": {"devices": [{"allow": False, "access": "rwm"}]}})
    plan = asks(user(made), "create", "-b", "bundle", "box")
    assert not [op for op in plan.ops if op.name.startswith("cg_") and op.stage != P.ON_FAILURE]
    assert not [op for op in plan.stage(P.PARENT_BEFORE_CLONE) if op.name in ("open_tree", "mount_attr")]
    child = [op.name for op in plan.stage(P.CHILD_BEFORE_PIVOT)]
    assert child.index("become_root") < child.index("open_tree") < child.index("root_attach")
    assert [op.args[0] for op in plan.named("proc_write")] == ["setgroups", "gid_map", "uid_map"] and not plan.named("hook")


def test_ranges_are_mapped_by_the_tools() -> None:
    made = config(linux={"namespaces": USER, "uidMappings": RANGE, "gidMappings": RANGE, "resources": {}})
    plan = asks(user(made), "create", "-b", "bundle", "box")
    assert not plan.named("proc_write")
    first, second = plan.named("hook")
    assert first.args[1][4:] == ["/usr/bin/newuidmap", "0", "1000", "1", "1", "100000", "65536"]  # type: ignore[index]
    assert first.args[4] == f"{P.PID}\n" and "newgidmap" in second.label and first.stage == P.PARENT_AFTER_CLONE
    with pytest.raises(InvalidArgument, match="needs newuidmap, which is not installed"):
        asks(user(made), "create", "-b", "bundle", "box", path="/nowhere")


def test_limits_that_no_group_holds() -> None:
    made = config(linux={"namespaces": USER, "uidMappings": ONE, "gidMappings": ONE, "resources": {"pids": {"limit": 5}}})
    with pytest.raises(InvalidArgument, match=r"linux.resources: pids\.max cannot be set"):
        asks(user(made), "create", "-b", "bundle", "box")


def test_root_with_all_rights_opens_mounts_as_ever() -> None:
    assert [op.name for op in compiled(config()).stage(P.PARENT_BEFORE_CLONE) if op.name == "open_tree"]
    assert ask(Host(""), "create", "-b", "bundle", "box").named("cg_mkdir")
