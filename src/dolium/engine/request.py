"""A create request in Docker's terms, checked and completed from the image, before anything is made. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from dolium import policy
from dolium.errors import InvalidArgument, NotFound, Unimplemented
from dolium.images.manifest import ImageConfig
from dolium.images.platform import Platform
from dolium.linux.capabilities import NAMES, NUMBERS
from dolium.network.base import PortBinding
from dolium.network.egress import parse as parse_egress
from dolium.network.ingress import parse as parse_ingress
from dolium.runtime.cli import signal_number
from dolium.runtime.spec import bad_text
from dolium.units import parse_size

NAME = re.compile(r"^/?[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_MIN_MEMORY = 6 << 20
# what would change what runs, and is not there: better refused than passed over
_UNSUPPORTED = {
    "Links": "--link", "DeviceRequests": "--gpus",
    "CgroupParent": "--cgroup-parent", "DeviceCgroupRules": "--device-cgroup-rule",
    "BlkioWeightDevice": "--blkio-weight-device", "BlkioDeviceReadBps": "--device-read-bps",
    "BlkioDeviceWriteBps": "--device-write-bps", "BlkioDeviceReadIOps": "--device-read-iops",
    "BlkioDeviceWriteIOps": "--device-write-iops"}


def check_platform(name: str, found: Platform, wanted: str) -> None:
    """Is the image that is here for the machine asked for ("": whatever it is for)? Raises NotFound, upon which clients pull
    the other one, and InvalidArgument for what is no platform.
    """
    if wanted and not Platform.parse(wanted).accepts_machine(found):
        raise NotFound(f"No such image: {name} for {wanted}: the one that is here is for {found}")


def _numbers(text: str) -> set[int]:
    """The numbers of 0-2,5. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last if dash else first)
        if not 0 <= low <= high < 8192:
            raise ValueError(text)
        found.update(range(low, high + 1))
    return found


def _check_cpus(text: str, what: str, path: str) -> None:
    try:
        wanted = _numbers(text)
    except ValueError:
        raise InvalidArgument(f"Invalid value {text} for cpuset {what}") from None
    try:
        with open(path, encoding="ascii") as file:
            online = file.read().strip()
    except FileNotFoundError:
        return  # a kernel without nodes: the cgroup says what it has
    if not wanted <= _numbers(online):
        raise InvalidArgument(f"Requested {what} are not available - requested {text}, available: {online}")


def strings(value: object, name: str) -> list[str]:
    """A list of texts, or one. Raises InvalidArgument."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise InvalidArgument(f"{name} must be a list of strings")


def check_name(name: str) -> str:
    """A container's name without the leading slash. Raises InvalidArgument in Docker's words."""
    if not NAME.match(name):
        raise InvalidArgument(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return name.removeprefix("/")


def merge_env(image: list[str], own: list[str]) -> list[str]:
    """The image's variables, overridden by the request's; a name without ``=`` unsets."""
    merged: dict[str, str | None] = {}
    for entry in [*image, *own]:
        key, equals, value = entry.partition("=")
        if not key:
            raise InvalidArgument(f"invalid environment variable: {entry}")
        merged[key] = value if equals else None
    return [f"{key}={value}" for key, value in merged.items() if value is not None]


def check_text(value: Any, field: str) -> None:
    """Refuse what no system call takes, in any string at any depth. Raises InvalidArgument naming the field."""
    found = bad_text(value, field)
    if found:
        raise InvalidArgument(f"{found[0]!r}: {found[1]}" if not found[0].isprintable() else f"{found[0]}: {found[1]}")


def complete(config: dict[str, Any], image: ImageConfig | None) -> tuple[dict[str, Any], list[str]]:
    """(Docker's Config with what the image says where the request is silent, the argument vector).

    An entrypoint of the request drops the image's command. Raises InvalidArgument.
    """
    done = dict(config)
    entrypoint = config.get("Entrypoint")
    command = strings(config.get("Cmd"), "Cmd")
    entry = strings(entrypoint, "Entrypoint")
    if entry == [""]:
        entry = []  # --entrypoint "": none
    if image is not None:
        if entrypoint is None:
            entry = list(image.entrypoint or ())
            command = command or list(image.cmd or ())
        done["Env"] = merge_env(list(image.env), strings(config.get("Env"), "Env"))
        done["Labels"] = {**image.labels, **(config.get("Labels") or {})}
        done["WorkingDir"] = config.get("WorkingDir") or image.working_dir
        done["User"] = config.get("User") or image.user
        done["StopSignal"] = config.get("StopSignal") or image.stop_signal
        done["Volumes"] = {**{path: {} for path in image.volumes}, **(config.get("Volumes") or {})}
        done["ExposedPorts"] = {**{port: {} for port in image.exposed_ports}, **(config.get("ExposedPorts") or {})}
    else:
        done["Env"] = merge_env([], strings(config.get("Env"), "Env"))
    done["Cmd"], done["Entrypoint"] = command, entry
    check_text(done, "Config")  # the image's part too: whoever made it may mean harm
    argv = [*entry, *command]
    if not argv:
        raise InvalidArgument("no command specified", hint="the image names none: give one after the image")
    if done.get("StopSignal"):
        signal_number(done["StopSignal"])
    cwd = done.get("WorkingDir") or "/"
    if not cwd.startswith("/"):
        raise InvalidArgument(f"the working directory {cwd!r} is invalid, it needs to be an absolute path")
    return done, argv


def check_host_config(host: dict[str, Any]) -> None:
    """Refuse values that cannot be run. Raises InvalidArgument, with Docker's words where its users know them."""
    check_text(host, "HostConfig")
    memory = host.get("Memory") or 0
    swap = host.get("MemorySwap") or 0
    if memory < 0 or 0 < memory < _MIN_MEMORY:
        raise InvalidArgument("Minimum memory limit allowed is 6MB")
    if swap > 0 and not memory:
        raise InvalidArgument("You should always set the Memory limit when using Memoryswap limit, see usage")
    if 0 < swap < memory:
        raise InvalidArgument("Minimum memoryswap limit should be larger than memory limit, see usage")
    count = os.cpu_count() or 1
    if host.get("NanoCpus") and not 10_000_000 <= host["NanoCpus"] <= count * 1_000_000_000:
        raise InvalidArgument(f"range of CPUs is from 0.01 to {count}.00, as there are only {count} CPUs available")
    if host.get("CpusetCpus"):
        _check_cpus(str(host["CpusetCpus"]), "CPUs", "/sys/devices/system/cpu/online")
    if host.get("CpusetMems"):
        _check_cpus(str(host["CpusetMems"]), "memory nodes", "/sys/devices/system/node/online")
    if 0 < memory < (host.get("MemoryReservation") or 0):
        raise InvalidArgument("Minimum memory limit can not be less than memory reservation limit, see usage")
    for key in ("CapAdd", "CapDrop"):
        for name in strings(host.get(key), key):
            if name.upper() != "ALL" and _capability(name) not in NUMBERS:
                raise InvalidArgument(f"invalid {key}: unknown capability: {name!r}")
    for key, modes in (("PidMode", ("", "host")), ("UTSMode", ("", "host")), ("UsernsMode", ("", "host", "auto")),
                       ("IpcMode", ("", "none", "private", "shareable", "host"))):
        value = host.get(key) or ""
        if value not in modes and not (key in ("PidMode", "IpcMode") and value.startswith("container:")):
            raise InvalidArgument(f"{key}: {value!r} is invalid", hint=f"one of {', '.join(filter(None, modes))}")
    for key, flag in _UNSUPPORTED.items():
        if host.get(key):
            raise Unimplemented(f"{flag} is not supported in this version")
    for key in ("Runtime", "Isolation"):
        if not isinstance(host.get(key) or "", str):
            raise InvalidArgument(f"{key} must be a text")
    policy_name = (host.get("RestartPolicy") or {}).get("Name") or "no"
    if policy_name not in ("no", "always", "unless-stopped", "on-failure"):
        raise InvalidArgument(f"invalid restart policy: unknown policy '{policy_name}'")
    retries = (host.get("RestartPolicy") or {}).get("MaximumRetryCount") or 0
    if retries and policy_name != "on-failure":
        raise InvalidArgument("invalid restart policy: maximum retry count can only be used with 'on-failure'")
    if retries < 0:
        raise InvalidArgument("invalid restart policy: maximum retry count cannot be negative")
    if host.get("AutoRemove") and policy_name != "no":
        raise InvalidArgument("can't create 'AutoRemove' container with restart policy")
    for option in strings(host.get("SecurityOpt"), "SecurityOpt"):
        security_option(option)
    storage_size(host)
    _log_config(host)


def storage_size(host: dict[str, Any]) -> int:
    """Bytes of ``--storage-opt size=``, 0 without. Raises InvalidArgument."""
    options = host.get("StorageOpt") or {}
    if not isinstance(options, dict):
        raise InvalidArgument("StorageOpt must be an object")
    for key in options:
        if key.lower() != "size":
            raise InvalidArgument(f"--storage-opt {key}: unknown option", hint="there is size=BYTES, as in size=10G")
    value = next(iter(options.values()), None)
    return 0 if value is None else parse_size(str(value), name="storage-opt size")


def _port_range(text: str) -> tuple[int, int]:
    """(first, last) of ``80`` or ``8000-8010``. Raises InvalidArgument in Docker's words."""
    first, dash, last = text.partition("-")
    words = (first, last) if dash else (first, first)
    if all(word.isascii() and word.isdigit() and len(word) <= 5 for word in words):
        low, high = int(words[0]), int(words[1])
        if low <= high <= 65535:
            return low, high
    raise InvalidArgument(f"invalid port range: {text!r}")


def port_number(text: str) -> int:
    """1 to 65535. Raises InvalidArgument."""
    low, high = _port_range(text)
    if low != high or low == 0:
        raise InvalidArgument(f"invalid port: {text!r}")
    return low


def published(host: dict[str, Any], config: dict[str, Any]) -> list[PortBinding]:
    """What -p and -P ask for; a range of host ports for one port of the container means: the first free one.

    Raises InvalidArgument.
    """
    ports = []
    for spec, bindings in (host.get("PortBindings") or {}).items():
        number, _, protocol = spec.partition("/")
        for binding in bindings or [{}]:
            if not isinstance(binding, dict) or not all(isinstance(binding.get(key) or "", str)
                                                        for key in ("HostIp", "HostPort")):
                raise InvalidArgument(f"PortBindings: {spec}: a list of objects whose HostIp and HostPort are texts")
            first, last = _port_range(binding.get("HostPort") or "0")
            ports.append(PortBinding(_port_range(number)[0], protocol or "tcp", binding.get("HostIp") or "", first, last))
    if host.get("PublishAllPorts"):
        named = {(port.container_port, port.protocol) for port in ports}
        for spec in config.get("ExposedPorts") or {}:
            number, _, protocol = spec.partition("/")
            first, last = _port_range(number)
            ports += [PortBinding(port, protocol or "tcp") for port in range(first, last + 1)
                      if (port, protocol or "tcp") not in named]
    return ports


def _capability(name: str) -> str:
    upper = name.upper()
    return upper if upper.startswith("CAP_") else f"CAP_{upper}"


RULES = {"Egress": parse_egress, "Ingress": parse_ingress}
_UNDO = ("CAP_ALL", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_PTRACE")
"""Capabilities with which a container could take its own rules away."""
_BYPASS = "CAP_NET_RAW"
"""And that with which it could send past them."""


def rules(host: dict[str, Any], config: dict[str, Any]) -> dict[str, list[str]]:
    """What --egress and --ingress say, or the labels ``dolium.egress`` and ``dolium.ingress`` for clients that have no such
    flags (words, with blanks between), by the names they have in the record; without those that are not given. Raises
    InvalidArgument, also for what would make the rules void."""
    found = {}
    labels = config.get("Labels") or {}
    for key, parse in RULES.items():
        wished = strings(host.get(key), key) or str(labels.get(f"dolium.{key.lower()}") or "").split()
        if wished:
            parse(wished)
            found[key] = wished
    mode = host.get("NetworkMode") or "default"
    if found and (mode in ("host", "none") or mode.startswith("container:")):
        raise InvalidArgument(f"--{next(iter(found)).lower()} does not go with --network {mode}: the container has no "
                              "network of its own")
    check_restricted(host, found)
    return found


_RATE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)(k|m|g)bit\Z", re.ASCII)


def bandwidth(host: dict[str, Any]) -> tuple[int, int]:
    """Bytes a second that a container may send, and be sent, on each of its networks; 0 for no limit. ``10mbit``, or
    ``up=1mbit,down=10mbit``: bits a second, powers of 1000. Raises InvalidArgument."""
    text = host.get("Bandwidth") or ""
    if not text:
        return 0, 0
    given: dict[str, int] = {}
    for part in str(text).split(","):
        key, equals, rate = part.rpartition("=")
        match = _RATE.match(rate)
        value = int(float(match.group(1)) * {"k": 1e3, "m": 1e6, "g": 1e9}[match.group(2)] / 8) if match else 0
        keys = (key,) if equals else ("up", "down")
        if value < 1000 or any(one not in ("up", "down") or one in given for one in keys):
            raise InvalidArgument(f"invalid --bandwidth {text!r}", hint="10mbit, or up=1mbit,down=10mbit; at least 8kbit")
        given.update(dict.fromkeys(keys, value))
    return given.get("up", 0), given.get("down", 0)


def check_restricted(host: dict[str, Any], rules: Collection[str]) -> None:
    """A container in a network namespace with rules (``Egress``, ``Ingress``) cannot have what makes them void. Raises
    InvalidArgument."""
    if not rules:
        return
    undo = (*_UNDO, _BYPASS) if "Egress" in rules else _UNDO
    given = [_capability(name) for name in host.get("CapAdd") or []]
    void = ["--privileged"] * bool(host.get("Privileged")) + [f"--cap-add {name}" for name in given if name in undo]
    for key, value in map(security_option, host.get("SecurityOpt") or []):
        if "Egress" in rules and key == "seccomp" and value not in ("builtin", ""):
            void.append("--security-opt seccomp=" + ("unconfined" if value == "unconfined" else "PROFILE"))
    if void:
        flag = "egress" if "Egress" in rules else "ingress"
        raise InvalidArgument(f"--{flag} does not go with {void[0]}: with that a container takes its own rules away, "
                              "or sends past them")


def capabilities(host: dict[str, Any]) -> list[str]:
    """The bounding set: Docker's defaults, with CapAdd and CapDrop (ALL among them) applied; with rules of --egress none
    that sends past them."""
    if host.get("Privileged"):
        return list(NAMES)
    add = {_capability(name) for name in host.get("CapAdd") or []}
    drop = {_capability(name) for name in host.get("CapDrop") or []}
    base: set[str] = set(policy.DEFAULT_CAPABILITIES)
    if "CAP_ALL" in add:
        base = set(NAMES)
    if "CAP_ALL" in drop:
        base = set()
    chosen = (base | add) - drop - {"CAP_ALL"} if "CAP_ALL" not in drop else add - {"CAP_ALL"}
    if host.get("Egress"):
        chosen.discard(_BYPASS)
    return [name for name in NAMES if name in chosen]


def security_option(option: str) -> tuple[str, str]:
    """(key, value) of one --security-opt; ``:`` is an old form of ``=``. Raises InvalidArgument."""
    if option in ("no-new-privileges", "no-new-privileges=true", "no-new-privileges:true"):
        return "no-new-privileges", "true"
    if option in ("no-new-privileges=false", "no-new-privileges:false"):
        return "no-new-privileges", "false"
    key, found, value = option.partition("=")
    if not found:
        key, found, value = option.partition(":")
    if key in ("seccomp", "apparmor", "label", "systempaths") and found:
        return key, value
    raise InvalidArgument(f"invalid --security-opt: {option!r}")


def _log_config(host: dict[str, Any]) -> None:
    log = host.get("LogConfig") or {}
    if (log.get("Type") or "json-file") not in ("json-file", "none"):
        raise InvalidArgument(f"logger: no log driver named '{log['Type']}' is registered")
    for key, value in (log.get("Config") or {}).items():
        if key == "max-size":
            if value != "-1":
                parse_size(value, name="log-opt max-size")
        elif key == "max-file":
            if not str(value).isdigit() or int(value) < 1:
                raise InvalidArgument(f"log-opt max-file: {value!r} must be 1 or more")
        else:
            raise InvalidArgument(f"unknown log opt {key!r} for json-file log driver")


def log_limits(host: dict[str, Any]) -> tuple[int, int]:
    """(bytes before rotation, number of files)."""
    options = (host.get("LogConfig") or {}).get("Config") or {}
    size = options.get("max-size")
    limit = policy.LOG_MAX_SIZE if size is None else 0 if size == "-1" else parse_size(size)
    return limit, int(options.get("max-file") or policy.LOG_MAX_FILES)
