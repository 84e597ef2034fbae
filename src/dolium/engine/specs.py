"""From a container's record to an OCI configuration, with what Docker injects. Pure but for the facts it is given."""

from __future__ import annotations

import json
import os
import platform
import socket
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dolium import policy
from dolium.engine import request
from dolium.engine.etc_files import ETC_FILES
from dolium.engine.model import Container, Mount
from dolium.engine.mounts import mappings
from dolium.engine.users import User
from dolium.errors import InvalidArgument, NotFound
from dolium.linux import capabilities
from dolium.linux.cgroup.tree import Layout
from dolium.linux.seccomp import resolve_profile
from dolium.runtime.default_spec import default_mounts
from dolium.runtime.spec import OCI_VERSION

_UNCHECKED = ("socket", "socketcall", "io_uring_setup", "io_uring_enter", "io_uring_register")
_NETLINK_AUDIT = 9
PROFILE_PATHS = (os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "seccomp.json"),
                 "/usr/share/containers/seccomp.json")
INIT_TARGET = "/sbin/docker-init"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(slots=True)
class Surroundings:
    """What the engine found or made for one start.

    ``user``: resolved inside the root; ``etc_folder``: on the host, with hosts, hostname and resolv.conf; ``namespaces``:
    type to a path to join, or "" for a new one, or None for the host's; ``group``: absolute cgroup; ``hostname``: what
    ``uname -n`` shows; ``kernel``: version; ``has_swap_limit``: memory.memsw exists; ``shm``: the shared /dev/shm on
    the host, "" for one of its own; ``sources``: by target, where a mount's source is instead of where its record says.
    """

    user: User
    etc_folder: str
    namespaces: dict[str, str | None]
    group: str
    hostname: str
    layout: Layout
    kernel: tuple[int, int]
    init_program: str
    has_swap_limit: bool = True
    shm: str = ""
    hidden: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)


def kernel_version() -> tuple[int, int]:
    """(6, 18) of 6.18.44-fc."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


@lru_cache(maxsize=1)
def default_profile() -> dict[str, Any]:
    """Docker's default seccomp profile, as Debian ships it. Raises NotFound with the package's name."""
    for path in PROFILE_PATHS:
        if os.path.exists(path):
            with open(path, "rb") as file:
                profile: dict[str, Any] = json.load(file)
                return profile
    raise NotFound("the default seccomp profile is not installed",
                   hint="apt-get install golang-github-containers-common, or --security-opt seccomp=unconfined")


def _internet_alone(resolved: dict[str, Any], *, audit: bool) -> dict[str, Any]:
    """A resolved profile that denies by default, where no socket is made but the host's own (unix, netlink) and those of the
    Internet protocols: others (vsock) pass by the packet filter. Nor is there what makes sockets that no filter of system
    calls sees: socketcall's argument lies in memory, io_uring's in a ring. ``audit``: netlink's audit, too."""
    rules = []
    for rule in resolved["syscalls"]:
        names = [name for name in rule["names"] if name not in _UNCHECKED]
        if names:
            rules.append(rule | {"names": names})
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
        tests = [{"index": 0, "value": int(family), "op": "SCMP_CMP_EQ"}]
        if family == socket.AF_NETLINK and not audit:
            tests.append({"index": 2, "value": _NETLINK_AUDIT, "op": "SCMP_CMP_NE"})
        rules.append({"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": tests})
    return resolved | {"syscalls": rules}


@lru_cache(maxsize=64)
def _resolved(text: str, caps: frozenset[str], kernel: tuple[int, int], restricted: bool) -> dict[str, Any]:
    profile = json.loads(text) if text else default_profile()
    resolved = resolve_profile(profile, set(caps), _ARCHITECTURES[platform.machine()], kernel)
    return _internet_alone(resolved, audit="CAP_AUDIT_WRITE" in caps) if restricted else resolved


def seccomp_for(host: dict[str, Any], caps: list[str], kernel: tuple[int, int]) -> dict[str, Any] | None:
    """``linux.seccomp`` of a container; None for unconfined and privileged ones. Equal wishes get the same object, which
    nobody changes. Raises InvalidArgument, NotFound."""
    text = ""
    for option in host.get("SecurityOpt") or []:
        key, value = request.security_option(option)
        if key == "seccomp":
            if value == "unconfined":
                return None
            if value not in ("builtin", ""):
                text = value
    if host.get("Privileged"):
        return None
    try:
        return _resolved(text, frozenset(caps), kernel, bool(host.get("Egress")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"--security-opt seccomp: the profile is not valid: {error!r}") from error


def environment(container: Container, user: User) -> list[str]:
    """PATH, HOSTNAME, TERM and HOME where the image and the user say nothing."""
    given = list(container.config.get("Env") or [])
    names = {entry.partition("=")[0] for entry in given}
    own = []
    if "PATH" not in names:
        own.append(f"PATH={policy.DEFAULT_PATH}")
    if "HOSTNAME" not in names:
        own.append(f"HOSTNAME={container.config.get('Hostname') or container.short_id}")
    if container.config.get("Tty") and "TERM" not in names:
        own.append("TERM=xterm")
    if "HOME" not in names:
        given.append(f"HOME={user.home}")
    return own + given


def capability_sets(caps: list[str], user: User) -> dict[str, list[str]]:
    """The five sets: a user other than root starts without effective ones, as Docker does."""
    now = caps if user.uid == 0 else []
    return {"bounding": caps, "permitted": now, "effective": now, "inheritable": [], "ambient": []}


def process_for(container: Container, user: User, args: list[str], env: list[str], *, terminal: bool, cwd: str,
                privileged: bool) -> dict[str, Any]:
    """The specification's process object for init or an exec."""
    host = container.host_config
    caps = list(capabilities.NAMES) if privileged else request.capabilities(host)
    caps = capabilities.names(capabilities.mask(caps) & _own_capabilities())
    options = dict(request.security_option(option) for option in host.get("SecurityOpt") or [])
    process: dict[str, Any] = {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": args,
        "env": env,
        "cwd": cwd,
        "capabilities": capability_sets(caps, user),
        "noNewPrivileges": options.get("no-new-privileges") == "true",
        "rlimits": [{"type": f"RLIMIT_{limit['Name'].upper()}", "soft": _limit(limit["Soft"]), "hard": _limit(limit["Hard"])}
                    # of one that a body has twice the last holds; a specification may have it once
                    for limit in {limit["Name"].upper(): limit for limit in host.get("Ulimits") or []}.values()],
    }
    if host.get("OomScoreAdj") or _own_oom_score() < 0:  # a daemon's own protection is not for containers
        process["oomScoreAdj"] = host.get("OomScoreAdj") or 0
    size = host.get("ConsoleSize") or [0, 0]
    if terminal and size[0] and size[1]:
        process["consoleSize"] = {"height": size[0], "width": size[1]}
    return process


def _limit(value: int) -> int:
    return (1 << 64) - 1 if value < 0 else value


@lru_cache(maxsize=1)
def _own_capabilities() -> int:
    """What this daemon itself may give away: a container cannot get more."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("CapPrm:")).split()[1], 16)


@lru_cache(maxsize=1)
def _own_oom_score() -> int:
    """Its children inherit it; the systemd unit sets -500."""
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())


def resources(host: dict[str, Any], around: Surroundings) -> dict[str, Any]:
    """``linux.resources`` of a host config."""
    result: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    if host.get("Memory"):
        memory["limit"] = host["Memory"]
        swap = host.get("MemorySwap") or 0
        if around.has_swap_limit:
            memory["swap"] = swap if swap else host["Memory"] * 2
    if host.get("MemoryReservation"):
        memory["reservation"] = host["MemoryReservation"]
    if host.get("OomKillDisable"):
        memory["disableOOMKiller"] = True
    if memory:
        result["memory"] = memory
    cpu: dict[str, Any] = {}
    if host.get("CpuShares"):
        cpu["shares"] = host["CpuShares"]
    if host.get("NanoCpus"):
        cpu["period"] = 100_000
        cpu["quota"] = host["NanoCpus"] // 10_000
    for key, name in (("CpuPeriod", "period"), ("CpuQuota", "quota"), ("CpusetCpus", "cpus"), ("CpusetMems", "mems")):
        if host.get(key):
            cpu[name] = host[key]
    if cpu:
        result["cpu"] = cpu
    if host.get("PidsLimit"):
        result["pids"] = {"limit": host["PidsLimit"]}
    if host.get("BlkioWeight"):
        result["blockIO"] = {"weight": host["BlkioWeight"]}
    return result


def _device(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(linux.devices entry, device rule) of one --device. Raises InvalidArgument."""
    path = entry.get("PathOnHost") or ""
    try:
        info = os.stat(path)
    except OSError as error:
        raise InvalidArgument(f"error gathering device information while adding custom device {path!r}: "
                              f"{error.strerror}") from error
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    if not kind:
        raise InvalidArgument(f"error gathering device information while adding custom device {path!r}: not a device node")
    major, minor = os.major(info.st_rdev), os.minor(info.st_rdev)
    node = {"path": entry.get("PathInContainer") or path, "type": kind, "major": major, "minor": minor,
            "fileMode": stat.S_IMODE(info.st_mode), "uid": info.st_uid, "gid": info.st_gid}
    rule = {"allow": True, "type": kind, "major": major, "minor": minor,
            "access": entry.get("CgroupPermissions") or "rwm"}
    return node, rule


def all_host_devices() -> list[dict[str, Any]]:
    """What --privileged shows: every device node in /dev but terminals and what a container has of its own."""
    found = []
    for base, folders, names in os.walk("/dev"):
        folders[:] = [name for name in folders if name not in ("pts", "shm", "fd", "mqueue", ".udev", ".lxc")]
        for name in names:
            path = f"{base}/{name}"
            info = os.lstat(path)
            if name in ("console", "ptmx") or not (stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode)):
                continue
            found.append({"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rwm"})
    return found


def _user_mount(mount: Mount, ids: list[int], source: str) -> dict[str, Any]:
    mode = ["ro"] if mount.read_only else []
    if mount.kind == "tmpfs":
        options = mount.options or []
        base = ["nosuid", "nodev"] + ([] if {"exec", "noexec"} & set(options) else ["noexec"])
        return {"destination": mount.target, "type": "tmpfs", "source": "tmpfs", "options": [*base, *options, *mode]}
    top = mount.recursive in ("disabled", "writable")
    read_only = [] if not mount.read_only else ["ro"] if top else ["rro"]
    made: dict[str, Any] = {
        "destination": mount.target, "type": "bind", "source": source,
        "options": ["bind" if mount.recursive == "disabled" else "rbind", *read_only, mount.propagation or "rprivate"]}
    # a volume has the owners that are seen inside, whatever range its containers have
    if ids and (mount.kind == "volume" or mount.idmap == "idmap"):
        made["options"].append("idmap")
        made["uidMappings"] = made["gidMappings"] = [{"containerID": 0, "hostID": ids[0], "size": ids[1]}]
    elif mount.idmap:
        made["options"].append("idmap")
        made |= mappings(mount.idmap)
    return made


def _mounts(container: Container, around: Surroundings, privileged: bool) -> list[dict[str, Any]]:
    host = container.host_config
    targets = {mount.target for mount in container.mounts}
    mounts = []
    for entry in default_mounts():
        if entry["destination"] in targets:
            continue
        if privileged and entry["destination"] in ("/sys", "/sys/fs/cgroup"):
            entry = {**entry, "options": [option for option in entry["options"] if option != "ro"]}
        if entry["destination"] == "/dev/shm":
            if host.get("IpcMode") == "none":
                continue
            if host.get("IpcMode") == "host" or around.shm:
                entry = {"destination": "/dev/shm", "type": "bind", "source": around.shm or "/dev/shm",
                         "options": ["rbind", "rprivate", "nosuid", "nodev", "noexec"]}
            else:
                size = host.get("ShmSize") or policy.SHM_SIZE
                entry = {**entry, "options": [*entry["options"][:-1], f"size={size}"]}
        if entry["destination"] == "/dev/mqueue" and host.get("IpcMode") == "host":
            continue
        if entry["destination"] == "/sys" and around.namespaces.get("network") is None:
            # sysfs shows the network namespace it is mounted in; with the host's, the host's own tree is right, without
            # what is mounted below it (debugfs, tracefs, bpf): "ro" would not hold there
            entry = {"destination": "/sys", "type": "bind", "source": "/sys",
                     "options": ["rbind" if privileged else "bind", "nosuid", "noexec", "nodev",
                                 *([] if privileged else ["ro"])]}
        mounts.append(entry)
    mounts += [_user_mount(mount, container.ids, around.sources.get(mount.target, mount.source))
               for mount in container.mounts]
    for name in ETC_FILES:
        if f"/etc/{name}" not in targets:
            source = f"{around.etc_folder}/{name}"
            mounts.append({"destination": f"/etc/{name}", "type": "bind", "source": source,
                           "options": ["bind", "rprivate"]})
    if host.get("Init"):
        mounts.append({"destination": INIT_TARGET, "type": "bind", "source": around.init_program,
                       "options": ["bind", "ro", "rprivate"]})
    return mounts


def build(container: Container, around: Surroundings) -> dict[str, Any]:
    """The configuration for ``runtime.compile``. Raises InvalidArgument, NotFound."""
    host, config = container.host_config, container.config
    privileged = bool(host.get("Privileged"))
    args = [container.path, *container.args]
    if host.get("Init"):
        args = [INIT_TARGET, "--", *args]
    process = process_for(container, around.user, args, environment(container, around.user),
                          terminal=bool(config.get("Tty")), cwd=config.get("WorkingDir") or "/", privileged=privileged)
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    nodes = []
    wanted = all_host_devices() if privileged else []
    for entry in [*wanted, *(host.get("Devices") or [])]:
        node, rule = _device(entry)
        nodes.append(node)
        rules.append(rule)
    if privileged:
        rules = [{"allow": True, "access": "rwm"}]
    limits = {**resources(host, around), "devices": rules}
    namespaces = [{"type": kind, **({"path": path} if path else {})}
                  for kind, path in around.namespaces.items() if path is not None]
    systempaths = dict(request.security_option(option) for option in host.get("SecurityOpt") or []).get("systempaths")
    hide = not privileged and systempaths != "unconfined"
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "cgroupsPath": around.group,
        "resources": limits,
        "maskedPaths": list(policy.MASKED_PATHS) if hide else [],
        "readonlyPaths": list(policy.READONLY_PATHS) if hide else [],
        "devices": nodes,
        "sysctl": _sysctls(host, around, container.ids),
    }
    seccomp = seccomp_for(host, process["capabilities"]["bounding"], around.kernel)
    if seccomp is not None:
        linux["seccomp"] = seccomp
    spec: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": "rootfs", "readonly": bool(host.get("ReadonlyRootfs"))},
        "mounts": _mounts(container, around, privileged),
        "linux": linux,
    }
    if around.namespaces.get("uts") == "":  # one that is joined has its owner's name
        spec["hostname"] = around.hostname
        if config.get("Domainname"):
            spec["domainname"] = config["Domainname"]
    return spec


def _sysctls(host: dict[str, Any], around: Surroundings, ids: list[int]) -> dict[str, str]:
    """Ports below 1024 and ping for everyone, in a network namespace of the container's own."""
    own: dict[str, str] = {}
    if around.namespaces.get("network") is not None and not (host.get("NetworkMode") or "").startswith("container:"):
        last = ids[1] - 1 if ids else 2147483647
        own = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": f"0 {last}"}
    return {**own, **(host.get("Sysctls") or {})}
