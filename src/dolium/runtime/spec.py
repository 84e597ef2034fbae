"""config.json: reading it and refusing what is wrong, before anything is changed (OCI runtime spec, config.md). Cold.

Every message names the field. The configuration stays the plain JSON object that it is; the helpers below check kinds.
"""

from __future__ import annotations

import json

from dolium.errors import InvalidArgument
from dolium.linux.capabilities import NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION = "1.3.0"

NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "pid": 0x20000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}
RLIMITS = {
    "RLIMIT_CPU": 0, "RLIMIT_FSIZE": 1, "RLIMIT_DATA": 2, "RLIMIT_STACK": 3, "RLIMIT_CORE": 4, "RLIMIT_RSS": 5,
    "RLIMIT_NPROC": 6, "RLIMIT_NOFILE": 7, "RLIMIT_MEMLOCK": 8, "RLIMIT_AS": 9, "RLIMIT_LOCKS": 10,
    "RLIMIT_SIGPENDING": 11, "RLIMIT_MSGQUEUE": 12, "RLIMIT_NICE": 13, "RLIMIT_RTPRIO": 14, "RLIMIT_RTTIME": 15,
}
ATTRIBUTES = {"scheduler", "ioPriority", "execCPUAffinity"}  # of a process; attributes.py knows them
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")

_U64 = (1 << 64) - 1
_KINDS = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def wrong(field: str, why: str, hint: str = "") -> InvalidArgument:
    """The error for a field."""
    return InvalidArgument(f"config.json: {field}: {why}", hint=hint)


def take(parent: dict[str, Any], key: str, kind: str, field: str, *, required: bool = False) -> Any:
    """``parent[key]`` checked to be of a JSON kind; None when absent or null. Raises InvalidArgument."""
    value = parent.get(key)
    name = f"{field}.{key}" if field else key
    if value is None:
        if required:
            raise wrong(name, "is required")
        return None
    expected = _KINDS[kind]
    if not isinstance(value, expected) or (kind == "integer" and isinstance(value, bool)):
        raise wrong(name, f"must be {'an' if kind[0] in 'aoi' else 'a'} {kind}, not {json.dumps(value)[:60]}")
    return value


def strings(parent: dict[str, Any], key: str, field: str) -> list[str]:
    """An array of strings without NUL; empty when absent."""
    values: list[str] = take(parent, key, "array", field) or []
    for index, value in enumerate(values):
        name = f"{field}.{key}[{index}]"
        if not isinstance(value, str):
            raise wrong(name, "must be a string")
        if "\0" in value:
            raise wrong(name, "must not contain a NUL byte")
    return values


def objects(parent: dict[str, Any], key: str, field: str) -> list[dict[str, Any]]:
    """An array of objects; empty when absent."""
    values: list[dict[str, Any]] = take(parent, key, "array", field) or []
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise wrong(f"{field}.{key}[{index}]", "must be an object")
    return values


def load(text: bytes, path: str) -> dict[str, Any]:
    """The configuration in a file's text, validated. Raises InvalidArgument."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path}: the top level must be an object")
    if b"\\u" in text:  # what no path, name or argument of the kernel's can hold is written as an escape
        found = bad_text(config, "")
        if found:
            raise wrong(*found)
    validate(config)
    return config


def bad_text(value: Any, field: str) -> tuple[str, str] | None:
    """(Field, what is wrong) of the first string that a system call would not get as it is: a NUL would end it where it
    stands, half of a surrogate pair has no bytes. None when all are well."""
    inside: list[tuple[Any, str]] = []
    if isinstance(value, str):
        if "\0" in value:
            return field or "a key", "must not contain a NUL byte"
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            return field or "a key", "is not valid Unicode"
    elif isinstance(value, dict):
        for key, entry in value.items():
            inside += [(key, f"a key of {field}" if field else ""), (entry, f"{field}.{key}" if field else key)]
    elif isinstance(value, list):
        inside += [(entry, f"{field}[{index}]") for index, entry in enumerate(value)]
    for entry, place in inside:
        found = bad_text(entry, place)
        if found:
            return found
    return None


def validate(config: dict[str, Any]) -> None:
    """Refuse a configuration that cannot be run. Raises InvalidArgument naming the field."""
    version = take(config, "ociVersion", "string", "", required=True)
    if not version.startswith("1."):
        raise wrong("ociVersion", f"{version!r} is not supported", "dolium implements version 1 of the specification")
    root = take(config, "root", "object", "", required=True)
    if not take(root, "path", "string", "root", required=True):
        raise wrong("root.path", "must not be empty")
    take(root, "readonly", "boolean", "root")
    for key in ("hostname", "domainname"):
        name = take(config, key, "string", "")
        if name is not None and len(name.encode()) > 64:
            raise wrong(key, "is longer than 64 bytes")
    linux = take(config, "linux", "object", "") or {}
    _namespaces(config, linux)
    _process(take(config, "process", "object", "") or {}, "process")
    _mounts(config)
    _linux(linux)
    _hooks(config)
    for key, value in (take(config, "annotations", "object", "") or {}).items():
        if not isinstance(value, str):
            raise wrong(f"annotations.{key}", "must be a string")
        if not key:
            raise wrong("annotations", "a key must not be empty")


def namespaces(config: dict[str, Any]) -> dict[str, str]:
    """Type to path ("" for a new one) of ``linux.namespaces``."""
    return {entry["type"]: entry.get("path") or "" for entry in (config.get("linux") or {}).get("namespaces") or []}


def _namespaces(config: dict[str, Any], linux: dict[str, Any]) -> None:
    seen: set[str] = set()
    for index, entry in enumerate(objects(linux, "namespaces", "linux")):
        field = f"linux.namespaces[{index}]"
        kind = take(entry, "type", "string", field, required=True)
        if kind not in NAMESPACES:
            raise wrong(f"{field}.type", f"{kind!r} is not one of {', '.join(NAMESPACES)}")
        if kind in seen:
            raise wrong(f"{field}.type", f"{kind!r} is listed twice")
        seen.add(kind)
        path = take(entry, "path", "string", field)
        if path and not path.startswith("/"):
            raise wrong(f"{field}.path", "must be absolute")
    if "mount" not in seen:
        raise wrong("linux.namespaces", "a mount namespace is required: the root file system is changed in it")
    for key in ("hostname", "domainname"):
        if config.get(key) and "uts" not in seen:
            raise wrong(key, "needs a uts namespace in linux.namespaces")
    if take(linux, "timeOffsets", "object", "linux") and "time" not in seen:
        raise wrong("linux.timeOffsets", "needs a time namespace in linux.namespaces")
    mapped = objects(linux, "uidMappings", "linux") or objects(linux, "gidMappings", "linux")
    if mapped and "user" not in seen:
        raise wrong("linux.uidMappings", "needs a user namespace in linux.namespaces")
    if "user" in seen and not namespaces(config)["user"] and not (linux.get("uidMappings") and linux.get("gidMappings")):
        raise wrong("linux.uidMappings", "a new user namespace needs uidMappings and gidMappings")
    for key in ("uidMappings", "gidMappings"):
        for index, entry in enumerate(objects(linux, key, "linux")):
            for part in ("containerID", "hostID", "size"):
                value = take(entry, part, "integer", f"linux.{key}[{index}]", required=True)
                if not 0 <= value <= 0xFFFFFFFF:
                    raise wrong(f"linux.{key}[{index}].{part}", "is out of range")


def _process(process: dict[str, Any], field: str) -> None:
    if not process:
        return
    args = strings(process, "args", field)
    if not args or not args[0]:
        raise wrong(f"{field}.args", "must name a program")
    for index, entry in enumerate(strings(process, "env", field)):
        if "=" not in entry[1:]:
            raise wrong(f"{field}.env[{index}]", f"{entry!r} has no name before a '='")
    cwd = take(process, "cwd", "string", field, required=True)
    if not cwd.startswith("/"):
        raise wrong(f"{field}.cwd", f"{cwd!r} is not absolute")
    for key in ("terminal", "noNewPrivileges"):
        take(process, key, "boolean", field)
    user = take(process, "user", "object", field) or {}
    for key in ("uid", "gid", "umask"):
        value = take(user, key, "integer", f"{field}.user")
        if value is not None and not 0 <= value <= 0xFFFFFFFE:
            raise wrong(f"{field}.user.{key}", "is out of range")
    for index, gid in enumerate(take(user, "additionalGids", "array", f"{field}.user") or []):
        if not isinstance(gid, int) or not 0 <= gid <= 0xFFFFFFFE:
            raise wrong(f"{field}.user.additionalGids[{index}]", "must be a group id")
    capabilities = take(process, "capabilities", "object", field) or {}
    for kind in ("bounding", "effective", "permitted", "inheritable", "ambient"):
        for index, name in enumerate(strings(capabilities, kind, f"{field}.capabilities")):
            if name not in NUMBERS:
                raise wrong(f"{field}.capabilities.{kind}[{index}]", f"{name!r} is not a capability")
    kinds: list[str] = []
    for index, limit in enumerate(objects(process, "rlimits", field)):
        name = f"{field}.rlimits[{index}]"
        kind = take(limit, "type", "string", name, required=True)
        if kind not in RLIMITS:
            raise wrong(f"{name}.type", f"{kind!r} is not a resource limit")
        if kind in kinds:
            raise wrong(f"{name}.type", f"{kind!r} is listed twice")
        kinds.append(kind)
        soft = take(limit, "soft", "integer", name, required=True)
        hard = take(limit, "hard", "integer", name, required=True)
        if not 0 <= soft < 1 << 64 or not 0 <= hard < 1 << 64:
            raise wrong(name, "is out of range")
        if soft > hard:
            raise wrong(name, "soft is above hard")
    score = take(process, "oomScoreAdj", "integer", field)
    if score is not None and not -1000 <= score <= 1000:
        raise wrong(f"{field}.oomScoreAdj", "must be from -1000 to 1000")
    size = take(process, "consoleSize", "object", field) or {}
    for key in ("height", "width"):
        value = take(size, key, "integer", f"{field}.consoleSize")
        if value is not None and not 0 <= value <= 0xFFFF:
            raise wrong(f"{field}.consoleSize.{key}", "is out of range")
    if process.keys() & ATTRIBUTES:
        from dolium.runtime import attributes

        attributes.check(process, field)
    for key in ("apparmorProfile", "selinuxLabel"):
        take(process, key, "string", field)


def validate_process(process: dict[str, Any]) -> None:
    """The same checks for the process of an exec. Raises InvalidArgument."""
    if not process:
        raise InvalidArgument("the process to execute is empty")
    try:
        _process(process, "process")
    except InvalidArgument as error:  # it came by flags or a file of its own
        raise InvalidArgument(error.message.removeprefix("config.json: "), hint=error.hint) from None


def _mounts(config: dict[str, Any]) -> None:
    for index, entry in enumerate(objects(config, "mounts", "")):
        field = f"mounts[{index}]"
        if not take(entry, "destination", "string", field, required=True):
            raise wrong(f"{field}.destination", "must not be empty")
        options = strings(entry, "options", field)
        kind = take(entry, "type", "string", field)
        take(entry, "source", "string", field)
        if not kind and "bind" not in options and "rbind" not in options:
            raise wrong(f"{field}.type", "is required for a mount that is not a bind mount")
        _idmap(config, entry, options, kind or "", field)


def _idmap(config: dict[str, Any], entry: dict[str, Any], options: list[str], kind: str, field: str) -> None:
    """Mappings of one mount (config.md, Mounts): both or none, and only where a tree is bound."""
    given = [key for key in ("uidMappings", "gidMappings") if entry.get(key)]
    for key in given:
        for index, line in enumerate(objects(entry, key, field)):
            for part in ("containerID", "hostID", "size"):
                value = take(line, part, "integer", f"{field}.{key}[{index}]", required=True)
                if not 0 <= value <= 0xFFFFFFFF:
                    raise wrong(f"{field}.{key}[{index}].{part}", "is out of range")
    asked = {"idmap", "ridmap"} & set(options)
    if not given and not asked:
        return
    if kind != "bind" and not {"bind", "rbind"} & set(options):
        raise wrong(field, "only a bind mount can be idmapped")
    if len(given) == 1:
        raise wrong(field, "uidMappings and gidMappings must both be given")
    if not given and not (config.get("linux") or {}).get("uidMappings"):
        raise wrong(f"{field}.options", "idmap without mappings needs a user namespace with linux.uidMappings")


def _linux(linux: dict[str, Any]) -> None:
    for key in ("maskedPaths", "readonlyPaths"):
        for index, path in enumerate(strings(linux, key, "linux")):
            if not path.startswith("/"):
                raise wrong(f"linux.{key}[{index}]", f"{path!r} is not absolute")
    for name, value in (take(linux, "sysctl", "object", "linux") or {}).items():
        if not isinstance(value, str):
            raise wrong(f"linux.sysctl.{name}", "must be a string")
        if "" in name.replace("/", ".").split("."):  # "..", "//" and a leading or trailing separator too
            raise wrong(f"linux.sysctl.{name}", "is not a sysctl name")
        _sysctl_is_namespaced(linux, name)
    for index, device in enumerate(objects(linux, "devices", "linux")):
        field = f"linux.devices[{index}]"
        if take(device, "type", "string", field, required=True) not in ("c", "u", "b", "p"):
            raise wrong(f"{field}.type", f"{device['type']!r} is not c, u, b or p")
        if not take(device, "path", "string", field, required=True).startswith("/"):
            raise wrong(f"{field}.path", "must be absolute")
        for key in ("major", "minor", "fileMode", "uid", "gid"):
            value = take(device, key, "integer", field, required=key in ("major", "minor") and device["type"] != "p")
            if value is not None and value < 0:
                raise wrong(f"{field}.{key}", "is out of range")
    _resources(take(linux, "resources", "object", "linux") or {})
    _offsets(linux)
    path = take(linux, "cgroupsPath", "string", "linux")
    if path and ".." in path.split("/"):
        raise wrong("linux.cgroupsPath", "must not contain '..'")
    propagation = take(linux, "rootfsPropagation", "string", "linux")
    if propagation and propagation.removeprefix("r") not in ("private", "slave", "shared", "unbindable"):
        raise wrong("linux.rootfsPropagation", f"{propagation!r} is not a propagation")
    seccomp = take(linux, "seccomp", "object", "linux")
    if seccomp is not None:
        _validate_seccomp(seccomp)
    if linux.keys() & {"memoryPolicy", "personality"}:
        from dolium.runtime import attributes

        for key, read in (("memoryPolicy", attributes.memory_policy), ("personality", attributes.personality)):
            if linux.get(key) is not None:
                read(linux[key], f"linux.{key}")
    take(linux, "mountLabel", "string", "linux")
    if linux.get("netDevices") is not None:
        from dolium.runtime import net_devices

        net_devices.check(linux)
    if take(linux, "intelRdt", "object", "linux") is not None:
        from dolium.runtime import rdt

        rdt.check(linux["intelRdt"])


def _numbers(parent: dict[str, Any], field: str, lowest: int, highest: int, *keys: str) -> None:
    for key in keys:
        value = take(parent, key, "integer", field)
        if value is not None and not lowest <= value <= highest:
            raise wrong(f"{field}.{key}", f"must be from {lowest} to {highest}")


def _resources(resources: dict[str, Any]) -> None:
    """``linux.resources``: kinds and ranges, the same for both versions of cgroups."""
    field = "linux.resources"
    rooms = {key: take(resources, key, "object", field) or {} for key in (
        "memory", "cpu", "pids", "blockIO", "network", "rdma", "unified")}
    _devices(resources)
    for name, value in rooms["unified"].items():
        if "/" in name or "." not in name.strip(".") or not isinstance(value, str):
            raise wrong(f"{field}.unified.{name}", "must be the name of a file in the cgroup, with a string")
    memory, cpu, block = rooms["memory"], rooms["cpu"], rooms["blockIO"]
    _numbers(memory, f"{field}.memory", -1, _U64, "limit", "swap", "reservation", "kernel", "kernelTCP")
    _numbers(memory, f"{field}.memory", 0, 100, "swappiness")
    for key in ("disableOOMKiller", "checkBeforeUpdate"):
        take(memory, key, "boolean", f"{field}.memory")
    if memory.get("limit") and memory.get("swap") and 0 < memory["swap"] < memory["limit"]:
        raise wrong(f"{field}.memory.swap", "is below memory.limit; it counts memory and swap together")
    _numbers(cpu, f"{field}.cpu", 0, _U64, "shares", "period", "burst", "realtimePeriod")
    _numbers(cpu, f"{field}.cpu", -1 << 63, 1 << 63, "quota", "realtimeRuntime")
    _numbers(cpu, f"{field}.cpu", 0, 1, "idle")
    for key in ("cpus", "mems"):
        take(cpu, key, "string", f"{field}.cpu")
    _numbers(rooms["pids"], f"{field}.pids", -1 << 63, 1 << 63, "limit")
    _block_io(block, f"{field}.blockIO")
    for index, entry in enumerate(objects(resources, "hugepageLimits", field)):
        name = f"{field}.hugepageLimits[{index}]"
        size = take(entry, "pageSize", "string", name, required=True)
        if not size.removesuffix("B")[:-1].isdigit() or size[-2:] not in ("KB", "MB", "GB"):
            raise wrong(f"{name}.pageSize", f"{size!r} is not a size such as 2MB or 1GB")
        take(entry, "limit", "integer", name, required=True)
        _numbers(entry, name, 0, _U64, "limit")
    _numbers(rooms["network"], f"{field}.network", 0, 0xFFFFFFFF, "classID")
    for index, entry in enumerate(objects(rooms["network"], "priorities", f"{field}.network")):
        name = f"{field}.network.priorities[{index}]"
        take(entry, "name", "string", name, required=True)
        take(entry, "priority", "integer", name, required=True)
    for device, limits in rooms["rdma"].items():
        if not isinstance(limits, dict) or not device or set(device) & set(" \n="):
            raise wrong(f"{field}.rdma.{device}", "must be the name of a device, with an object")
        if not limits.keys() & {"hcaHandles", "hcaObjects"}:
            raise wrong(f"{field}.rdma.{device}", "must be an object with hcaHandles, hcaObjects or both")
        _numbers(limits, f"{field}.rdma.{device}", 0, 0xFFFFFFFF, "hcaHandles", "hcaObjects")


def _block_io(block: dict[str, Any], field: str) -> None:
    rows = [("", block)]
    rows += [(f".weightDevice[{index}]", entry) for index, entry in enumerate(objects(block, "weightDevice", field))]
    for part, entry in rows:
        for key in ("weight", "leafWeight"):
            if take(entry, key, "integer", f"{field}{part}") not in (None, 0) and not 10 <= entry[key] <= 1000:
                raise wrong(f"{field}{part}.{key}", "must be from 10 to 1000")
    for kind in ("Bps", "IOPS"):
        for way in ("Read", "Write"):
            key = f"throttle{way}{kind}Device"
            for index, entry in enumerate(objects(block, key, field)):
                take(entry, "rate", "integer", f"{field}.{key}[{index}]", required=True)
                rows.append((f".{key}[{index}]", entry))
    for part, entry in rows[1:]:
        for key in ("major", "minor"):
            take(entry, key, "integer", f"{field}{part}", required=True)


def _offsets(linux: dict[str, Any]) -> None:
    for clock, offset in (take(linux, "timeOffsets", "object", "linux") or {}).items():
        field = f"linux.timeOffsets.{clock}"
        if clock not in ("monotonic", "boottime"):
            raise wrong(field, "the clocks of a time namespace are monotonic and boottime")
        if not isinstance(offset, dict):
            raise wrong(field, "must be an object")
        for key in ("secs", "nanosecs"):
            take(offset, key, "integer", field)


def _devices(resources: dict[str, Any]) -> None:
    for index, rule in enumerate(objects(resources, "devices", "linux.resources")):
        field = f"linux.resources.devices[{index}]"
        if take(rule, "type", "string", field) not in (None, "", "a", "b", "c"):
            raise wrong(f"{field}.type", f"{rule['type']!r} is not a, b or c")
        if set(take(rule, "access", "string", field) or "") - set("rwm"):
            raise wrong(f"{field}.access", "may hold only r, w and m")
        take(rule, "allow", "boolean", field)
        for key in ("major", "minor"):
            take(rule, key, "integer", field)


def _validate_seccomp(seccomp: dict[str, Any]) -> None:
    """The kinds of its fields; what the words mean is the compiler's."""
    take(seccomp, "defaultAction", "string", "linux.seccomp", required=True)
    take(seccomp, "defaultErrnoRet", "integer", "linux.seccomp")
    for key in ("listenerPath", "listenerMetadata"):
        take(seccomp, key, "string", "linux.seccomp")
    if seccomp.get("listenerMetadata") and not seccomp.get("listenerPath"):
        raise wrong("linux.seccomp.listenerMetadata", "is for the agent at listenerPath, which is not set")
    for key in ("architectures", "flags"):
        strings(seccomp, key, "linux.seccomp")
    for index, rule in enumerate(objects(seccomp, "syscalls", "linux.seccomp")):
        field = f"linux.seccomp.syscalls[{index}]"
        if not strings(rule, "names", field):
            raise wrong(f"{field}.names", "must name a system call")
        take(rule, "action", "string", field, required=True)
        take(rule, "errnoRet", "integer", field)
        for number, argument in enumerate(objects(rule, "args", field)):
            take(argument, "op", "string", f"{field}.args[{number}]", required=True)
            for key in ("index", "value", "valueTwo"):
                take(argument, key, "integer", f"{field}.args[{number}]")


_IPC_SYSCTLS = ("kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
                "kernel.shmmni", "kernel.shm_rmid_forced")


def _sysctl_is_namespaced(linux: dict[str, Any], name: str) -> None:
    """A sysctl of the host itself must not change: refuse what no namespace of the container holds."""
    kinds = {entry["type"] for entry in linux.get("namespaces") or []}
    dotted = name.replace("/", ".")
    if dotted.startswith("net."):
        needed = "network"
    elif dotted.startswith("fs.mqueue.") or dotted in _IPC_SYSCTLS:
        needed = "ipc"
    elif dotted in ("kernel.hostname", "kernel.domainname"):
        needed = "uts"
    else:
        raise wrong(f"linux.sysctl.{name}", "is not in a separate kernel namespace: it would change the host")
    if needed not in kinds:
        raise wrong(f"linux.sysctl.{name}", f"needs a {needed} namespace: it would change the host")


def _hooks(config: dict[str, Any]) -> None:
    hooks = take(config, "hooks", "object", "") or {}
    for kind in HOOKS:
        for index, hook in enumerate(objects(hooks, kind, "hooks")):
            field = f"hooks.{kind}[{index}]"
            if not take(hook, "path", "string", field, required=True).startswith("/"):
                raise wrong(f"{field}.path", f"{hook['path']!r} is not absolute")
            strings(hook, "args", field)
            strings(hook, "env", field)
            timeout = take(hook, "timeout", "integer", field)
            if timeout is not None and timeout <= 0:
                raise wrong(f"{field}.timeout", "must be above 0")
