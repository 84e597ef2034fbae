"""Validation: for every field that can be wrong one configuration, and a message that names the field."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from dolium.errors import InvalidArgument
from dolium.runtime import spec
from dolium.runtime.default_spec import default_spec


def changed(path: str, value: object) -> dict[str, Any]:
    """The default configuration with one field set; ``a.b.0.c``. ``...`` removes the field."""
    config = copy.deepcopy(default_spec())
    at: Any = config
    *before, last = path.split(".")
    for key in before:
        at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
    if value is ...:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return config


NS = [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")]
MAPS = [{"containerID": 0, "hostID": 0, "size": 1}]

WRONG: list[tuple[str, object, str]] = [
    ("ociVersion", ..., "ociVersion: is required"),
    ("ociVersion", 1, "ociVersion: must be a string"),
    ("ociVersion", "2.0.0", "ociVersion: '2.0.0' is not supported"),
    ("root", ..., "root: is required"),
    ("root", [], "root: must be an object"),
    ("root", {}, "root.path: is required"),
    ("root.path", "", "root.path: must not be empty"),
    ("root.readonly", "yes", "root.readonly: must be a boolean"),
    ("hostname", "x" * 65, "hostname: is longer than 64 bytes"),
    ("hostname", 1, "hostname: must be a string"),
    ("domainname", "ü" * 33, "domainname: is longer than 64 bytes"),
    ("linux", [], "linux: must be an object"),
    ("linux.namespaces", {}, "linux.namespaces: must be an array"),
    ("linux.namespaces", ["pid"], "linux.namespaces[0]: must be an object"),
    ("linux.namespaces", [{}], "linux.namespaces[0].type: is required"),
    ("linux.namespaces", [{"type": "pids"}], "linux.namespaces[0].type: 'pids' is not one of"),
    ("linux.namespaces", [*NS, {"type": "pid"}], "linux.namespaces[6].type: 'pid' is listed twice"),
    ("linux.namespaces", [{"type": "pid", "path": "ns"}], "linux.namespaces[0].path: must be absolute"),
    ("linux.namespaces", NS[:4], "linux.namespaces: a mount namespace is required"),
    ("linux.namespaces", [NS[4]], "hostname: needs a uts namespace"),
    ("linux.timeOffsets", {"boottime": {"secs": 1}}, "linux.timeOffsets: needs a time namespace"),
    ("linux.uidMappings", MAPS, "linux.uidMappings: needs a user namespace"),
    ("linux.namespaces", [*NS, {"type": "user"}], "linux.uidMappings: a new user namespace needs"),
    ("linux.gidMappings", [{"containerID": 0}], "linux.gidMappings: needs a user namespace|linux.uidMappings"),
    ("process", [], "process: must be an object"),
    ("process.args", [], "process.args: must name a program"),
    ("process.args", [""], "process.args: must name a program"),
    ("process.args", ["sh", 1], "process.args[1]: must be a string"),
    ("process.args", ["sh", "a\0b"], "process.args[1]: must not contain a NUL byte"),
    ("process.env", ["A"], "process.env[0]: 'A' has no name before a '='"),
    ("process.env", ["A=", "=x"], "process.env[1]: '=x' has no name before a '='"),
    ("process.cwd", ..., "process.cwd: is required"),
    ("process.cwd", "x", "process.cwd: 'x' is not absolute"),
    ("process.terminal", 1, "process.terminal: must be a boolean"),
    ("process.user.uid", -1, "process.user.uid: is out of range"),
    ("process.user.gid", True, "process.user.gid: must be an integer"),
    ("process.user.umask", 1 << 32, "process.user.umask: is out of range"),
    ("process.user.additionalGids", ["x"], "process.user.additionalGids[0]: must be a group id"),
    ("process.capabilities.bounding", ["CAP_NOSUCH"], "process.capabilities.bounding[0]: 'CAP_NOSUCH' is not a capability"),
    ("process.capabilities.ambient", "CAP_KILL", "process.capabilities.ambient: must be an array"),
    ("process.rlimits", [{"type": "RLIMIT_X", "soft": 1, "hard": 1}], "process.rlimits[0].type: 'RLIMIT_X' is not"),
    ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}], "process.rlimits[0]: soft is above hard"),
    ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 0, "hard": 1 << 64}], "process.rlimits[0]: is out of range"),
    ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 0}], "process.rlimits[0].hard: is required"),
    ("process.oomScoreAdj", 1001, "process.oomScoreAdj: must be from -1000 to 1000"),
    ("process.consoleSize", {"height": 70000, "width": 1}, "process.consoleSize.height: is out of range"),
    ("process.scheduler", {"policy": "SCHED_NONE"}, "process.scheduler.policy: 'SCHED_NONE' is none of SCHED_OTHER"),
    ("process.scheduler", {"policy": "SCHED_FIFO", "priority": 100}, "process.scheduler.priority: 100 is not a number from 0 to 99"),
    ("process.scheduler", {"policy": "SCHED_OTHER", "priority": 1}, "process.scheduler.priority: is for SCHED_FIFO"),
    ("process.scheduler", {"policy": "SCHED_OTHER", "nice": -21}, "process.scheduler.nice"),
    ("process.scheduler", {"policy": "SCHED_OTHER", "runtime": 5}, "process.scheduler.runtime: runtime, deadline and period are for SCHED_DEADLINE alone"),
    ("process.scheduler", {"policy": "SCHED_OTHER", "flags": ["X"]}, "process.scheduler.flags[0]"),
    ("process.ioPriority", {"class": "x"}, "process.ioPriority.class: 'x' is none of IOPRIO_CLASS_RT"),
    ("process.ioPriority", {"class": "IOPRIO_CLASS_BE", "priority": 8}, "process.ioPriority.priority"),
    ("process.execCPUAffinity", {"initial": "0-"}, "process.execCPUAffinity.initial: '0-' is not a list"),
    ("process.execCPUAffinity", {"final": "3-1"}, "process.execCPUAffinity.final"),
    ("process.rlimits", [{"type": "RLIMIT_CPU", "soft": 1, "hard": 2}] * 2,
     "process.rlimits[1].type: 'RLIMIT_CPU' is listed twice"),
    ("process.noNewPrivileges", "no", "process.noNewPrivileges: must be a boolean"),
    ("process.selinuxLabel", 1, "process.selinuxLabel: must be a string"),
    ("process.apparmorProfile", [], "process.apparmorProfile: must be a string"),
    ("mounts", {}, "mounts: must be an array"),
    ("mounts", [{}], "mounts[0].destination: is required"),
    ("mounts", [{"destination": "", "type": "tmpfs"}], "mounts[0].destination: must not be empty"),
    ("mounts", [{"destination": "/x"}], "mounts[0].type: is required"),
    ("mounts", [{"destination": "/x", "type": "tmpfs", "options": ["a", 1]}], "mounts[0].options[1]: must be a string"),
    ("mounts", [{"destination": "/x", "type": "bind", "uidMappings": MAPS}], "mounts[0]: uidMappings and gidMappings must both"),
    ("mounts", [{"destination": "/x", "type": "tmpfs", "uidMappings": MAPS, "gidMappings": MAPS}], "mounts[0]: only a bind mount can be idmapped"),
    ("mounts", [{"destination": "/x", "type": "bind", "options": ["idmap"]}], "mounts[0].options: idmap without mappings needs a user namespace with linux.uidMappings"),
    ("mounts", [{"destination": "/x", "type": "bind", "uidMappings": [{"containerID": -1, "hostID": 0, "size": 1}],
                 "gidMappings": MAPS}], "mounts[0].uidMappings[0].containerID"),
    ("linux.maskedPaths", ["x"], "linux.maskedPaths[0]: 'x' is not absolute"),
    ("linux.readonlyPaths", ["x"], "linux.readonlyPaths[0]: 'x' is not absolute"),
    ("linux.sysctl", {"net.x": 1}, "linux.sysctl.net.x: must be a string"),
    ("linux.sysctl", {"kernel.panic": "1"}, "linux.sysctl.kernel.panic: is not in a separate kernel namespace"),
    ("linux.sysctl", {"net/../kernel/panic": "1"}, "linux.sysctl.net/../kernel/panic: is not a sysctl name"),
    ("linux.sysctl", {"/net": "1"}, "linux.sysctl./net: is not a sysctl name"),
    ("linux.devices", [{"path": "/d", "type": "x"}], "linux.devices[0].type: 'x' is not c, u, b or p"),
    ("linux.devices", [{"path": "d", "type": "p"}], "linux.devices[0].path: must be absolute"),
    ("linux.devices", [{"path": "/d", "type": "c", "minor": 1}], "linux.devices[0].major: is required"),
    ("linux.devices", [{"path": "/d", "type": "c", "major": -1, "minor": 1}], "linux.devices[0].major: is out of range"),
    ("linux.resources.memory", [], "linux.resources.memory: must be an object"),
    ("linux.resources.memory", {"limit": "1g"}, "linux.resources.memory.limit: must be an integer"),
    ("linux.resources.memory", {"limit": 10, "swap": 5}, "linux.resources.memory.swap: is below memory.limit"),
    ("linux.resources.cpu", {"quota": "x"}, "linux.resources.cpu.quota: must be an integer"),
    ("linux.resources.devices", [{"type": "x"}], "linux.resources.devices[0].type: 'x' is not a, b or c"),
    ("linux.resources.devices", [{"access": "rx"}], "linux.resources.devices[0].access: may hold only r, w and m"),
    ("linux.cgroupsPath", "/a/../b", "linux.cgroupsPath: must not contain '..'"),
    ("linux.rootfsPropagation", "x", "linux.rootfsPropagation: 'x' is not a propagation"),
    ("linux.seccomp", {}, "linux.seccomp.defaultAction: is required"),
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [1]}]},
     "linux.seccomp.syscalls[0].names[0]: must be a string"),
    ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [], "action": "SCMP_ACT_LOG"}]},
     "linux.seccomp.syscalls[0].names: must name a system call"),
    ("linux.intelRdt", [], "linux.intelRdt: must be an object"),
    ("linux.intelRdt", {"closID": "../x"}, "linux.intelRdt.closID: '../x' is not the name"),
    ("linux.intelRdt", {"memBwSchema": "L3:0=f"}, "linux.intelRdt.memBwSchema: must be one line"),
    ("linux.intelRdt", {"schemata": [1]}, "linux.intelRdt.schemata[0]: must be a string"),
    ("linux.netDevices", [], "linux.netDevices: must be an object"),
    ("linux.netDevices", {"a": 1}, "linux.netDevices.a: must be an object"),
    ("linux.netDevices", {"a": {"name": "x/y"}}, "linux.netDevices.a.name: 'x/y' is not the name of a link"),
    ("linux.netDevices", {"a" * 16: {}}, "linux.netDevices.aaaaaaaaaaaaaaaa.name: 'aaaaaaaaaaaaaaaa' is not the name of a link"),
    ("linux.netDevices", {"a": {"name": "e%d"}}, "linux.netDevices.a.name: "),
    ("linux.netDevices", {"a": {"name": "x"}, "b": {"name": "x"}}, "linux.netDevices.b: another device is to be called"),
    ("linux.resources.blockIO", {"weight": "x"}, "linux.resources.blockIO.weight: must be an integer"),
    ("linux.resources.blockIO", {"weightDevice": [{"major": 1}]}, "linux.resources.blockIO.weightDevice[0].minor: is required"),
    ("linux.resources.blockIO", {"throttleReadBpsDevice": True}, "linux.resources.blockIO.throttleReadBpsDevice: must be an array"),
    ("linux.resources.hugepageLimits", [{"pageSize": "2/B", "limit": 1}], "linux.resources.hugepageLimits[0].pageSize: '2/B' is not a size"),
    ("linux.resources.pids", {"limit": "5"}, "linux.resources.pids.limit: must be an integer"),
    ("linux.resources.devices", [{"major": "x"}], "linux.resources.devices[0].major: must be an integer"),
    ("linux.resources.network", {"priorities": [{"name": "x"}]}, "linux.resources.network.priorities[0].priority: is required"),
    ("process.scheduler", {"policy": []}, "process.scheduler.policy: [] is none of"),
    ("linux.resources.rdma", {"mlx": {}}, "linux.resources.rdma.mlx: must be an object with hcaHandles"),
    ("linux.personality", {"domain": "BSD"}, "linux.personality.domain: 'BSD' is none of LINUX, LINUX32"),
    ("linux.memoryPolicy", {"mode": "MPOL_BIND"}, "linux.memoryPolicy.nodes: MPOL_BIND needs nodes"),
    ("linux.memoryPolicy", {"mode": "MPOL_BIND", "nodes": "0", "flags": ["X"]}, "linux.memoryPolicy.flags[0]"),
    ("linux.mountLabel", 1, "linux.mountLabel: must be a string"),
    ("hooks", [], "hooks: must be an object"),
    ("hooks", {"prestart": [{}]}, "hooks.prestart[0].path: is required"),
    ("hooks", {"poststop": [{"path": "x"}]}, "hooks.poststop[0].path: 'x' is not absolute"),
    ("hooks", {"poststart": [{"path": "/x", "timeout": 0}]}, "hooks.poststart[0].timeout: must be above 0"),
    ("hooks", {"createRuntime": [{"path": "/x", "args": "x"}]}, "hooks.createRuntime[0].args: must be an array"),
    ("annotations", {"a": 1}, "annotations.a: must be a string"),
    ("annotations", {"": "a"}, "annotations: a key must not be empty"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=[f"{path}-{n}" for n, (path, _, _) in enumerate(WRONG)])
def test_what_is_wrong_is_named(path: str, value: object, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spec.validate(changed(path, value))
    assert any(str(caught.value).startswith(f"config.json: {one}") for one in message.split("|")), str(caught.value)


@pytest.mark.parametrize("config", [
    default_spec(),
    changed("linux.sysctl", {"net.ipv4.ip_forward": "1", "net/ipv4/x": "1", "kernel.shmmax": "1", "fs.mqueue.queues_max": "1"}),
    changed("linux.namespaces", [*NS, {"type": "user", "path": "/proc/1/ns/user"}]),
    changed("process", ...),
    changed("linux.resources.memory", {"limit": -1, "swap": -1}),
    changed("hooks", None),
    changed("linux.devices", [{"path": "/d", "type": "p"}]),
], ids=range(7))
def test_what_is_right_passes(config: dict[str, Any]) -> None:
    spec.validate(config)


def test_a_sysctl_needs_its_namespace() -> None:
    config = changed("linux.sysctl", {"net.ipv4.ip_forward": "1"})
    config["linux"]["namespaces"] = [entry for entry in NS if entry["type"] != "network"]
    with pytest.raises(InvalidArgument, match="needs a network namespace"):
        spec.validate(config)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"nul", b"[" * 100_000])
def test_text_that_is_no_object(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"b/config\.json"):
        spec.load(text, "b/config.json")


def test_load_gives_the_object() -> None:
    assert spec.load(json.dumps(default_spec()).encode(), "x") == default_spec()


def test_an_execs_process_is_checked_the_same() -> None:
    for process, message in (({}, "is empty"), ({"args": ["x"]}, "process.cwd: is required"),
                             ({"args": [], "cwd": "/"}, "must name a program")):
        with pytest.raises(InvalidArgument, match=message):
            spec.validate_process(process)


@pytest.mark.parametrize(("text", "message"), [
    (r'{"ociVersion": "1.0.0", "root": {"path": "a\u0000b"}}', "root.path: must not contain a NUL byte"),
    (r'{"ociVersion": "1.0.0", "mounts": [{"destination": "\ud800"}]}', r"mounts\[0\].destination: is not valid Unicode"),
    (r'{"a\u0000": 1}', "a key: must not contain a NUL byte"),
])
def test_text_that_no_call_can_take_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        spec.load(text.encode(), "config.json")


def test_the_process_of_an_exec_is_not_said_to_be_in_config_json() -> None:
    """It came by flags, or in a file of its own."""
    with pytest.raises(InvalidArgument, match=r"^process\.cwd: 'rel' is not absolute"):
        spec.validate_process({"args": ["true"], "cwd": "rel"})
