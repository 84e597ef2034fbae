"""From flags to Docker's request bodies. Pure, but for the caller's files: env files and seccomp profiles."""

from __future__ import annotations

from dolium.cli.flags import Flag, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dolium.cli.context import Context

RUN_FLAGS = [
    Flag("-d --detach", "bool", "run in the background and print the container's id"),
    Flag("-i --interactive", "bool", "keep standard input open"),
    Flag("-t --tty", "bool", "give it a terminal"),
    Flag("--rm", "bool", "remove the container and its anonymous volumes when it ends"),
    Flag("--name", "str", "a name for it", "NAME"),
    Flag("-e --env", "list", "set a variable; without = it is taken from here", "NAME=VALUE"),
    Flag("--env-file", "list", "read variables from a file", "FILE"),
    Flag("-w --workdir", "str", "folder the program starts in", "DIR"),
    Flag("-u --user", "str", "user to run as", "NAME[:GROUP]"),
    Flag("-v --volume", "list", "mount a volume or a host folder", "SOURCE:TARGET[:ro]"),
    Flag("--mount", "list", "mount, in the long form", "type=bind,src=…,dst=…"),
    Flag("--tmpfs", "list", "mount a tmpfs", "TARGET[:OPTIONS]"),
    Flag("--volumes-from", "list", "mount what another container mounts", "CONTAINER[:ro]"),
    Flag("-p --publish", "list", "publish a port", "[ADDRESS:]PORT:PORT[/udp]"),
    Flag("-P --publish-all", "bool", "publish every exposed port"),
    Flag("--expose", "list", "name a port", "PORT"),
    Flag("--network", "list", "none, host, bridge, container:NAME or a network's name", "NAME[,alias=…,ip=…]"),
    Flag("--net", "list", "the same as --network", "NAME"),
    Flag("--network-alias", "list", "one more name for it in its network", "NAME"),
    Flag("--ip", "str", "its address in its network", "ADDRESS"),
    Flag("--ip6", "str", "its IPv6 address there", "ADDRESS"),
    Flag("-h --hostname", "str", "its host name", "NAME"),
    Flag("--add-host", "list", "a line for /etc/hosts", "NAME:ADDRESS"),
    Flag("--dns", "list", "a name server", "ADDRESS"),
    Flag("--dns-search", "list", "a search domain", "DOMAIN"),
    Flag("--egress", "list", "what it may reach, all else is refused; none: nothing", "allow=NAME|ADDRESS[:PORT[/udp]]"),
    Flag("--ingress", "list", "who may reach it, all else is refused; none: nobody",
         "allow=NAME|label:KEY[=VALUE]|network:NAME|ADDRESS[:PORT[/udp]]"),
    Flag("--bandwidth", "str", "limit of what it sends and is sent", "10mbit|up=1mbit,down=10mbit"),
    Flag("--mac-address", "str", "address of its link", "MAC"),
    Flag("-m --memory", "str", "limit of memory", "64m"),
    Flag("--memory-swap", "str", "limit of memory and swap; -1 for none", "128m"),
    Flag("--memory-reservation", "str", "soft limit of memory", "32m"),
    Flag("--cpus", "str", "how many CPUs' time it may use", "1.5"),
    Flag("-c --cpu-shares", "int", "relative weight"),
    Flag("--cpuset-cpus", "str", "CPUs it may run on", "0-1"),
    Flag("--pids-limit", "int", "limit of processes"),
    Flag("--oom-score-adj", "int", "how willingly it is killed for memory"),
    Flag("--cap-add", "list", "give a capability", "CAP"),
    Flag("--cap-drop", "list", "take a capability; ALL for all", "CAP"),
    Flag("--security-opt", "list", "seccomp=FILE, seccomp=unconfined, no-new-privileges", "OPTION"),
    Flag("--read-only", "bool", "its root file system cannot be written"),
    Flag("--privileged", "bool", "all capabilities and devices, no filter"),
    Flag("--device", "list", "give a device of the host", "PATH[:PATH[:rwm]]"),
    Flag("--group-add", "list", "an additional group", "GROUP"),
    Flag("--ulimit", "list", "a resource limit", "nofile=1024:2048"),
    Flag("--sysctl", "list", "a kernel parameter of its namespaces", "NAME=VALUE"),
    Flag("--shm-size", "str", "size of /dev/shm", "64m"),
    Flag("--init", "bool", "a small init as pid 1 that forwards signals and reaps"),
    Flag("--entrypoint", "str", "program in place of the image's", "PROGRAM"),
    Flag("-l --label", "list", "a label", "NAME=VALUE"),
    Flag("--restart", "str", "no, always, unless-stopped or on-failure[:N]", "POLICY"),
    Flag("--stop-signal", "str", "signal that asks it to end", "SIGNAL"),
    Flag("--stop-timeout", "int", "seconds before it is killed"),
    Flag("--isolation", "str", "process, gvisor: how strong the wall is", "LEVEL"),
    Flag("--runtime", "str", "dolium, runc, crun, runsc, or one of daemon.json's", "NAME"),
    Flag("--userns", "str", "auto: a user namespace with ids of its own; host", "MODE"),
    Flag("--pid", "str", "host or container:NAME", "MODE"),
    Flag("--ipc", "str", "host, private, shareable or container:NAME", "MODE"),
    Flag("--uts", "str", "host", "MODE"),
    Flag("--cgroupns", "str", "host or private", "MODE"),
    Flag("--log-driver", "str", "json-file or none", "DRIVER"),
    Flag("--log-opt", "list", "max-size=20m, max-file=5", "NAME=VALUE"),
    Flag("--storage-opt", "list", "size=10G: what the container may write to its root", "NAME=VALUE"),
    Flag("--pull", "str", "missing, always or never", "WHEN"),
    Flag("--platform", "str", "what the image must be for; one for another is pulled anew", "linux/arm64"),
    Flag("--rootfs", "bool", "the argument is a root file system, not an image: PATH:O, a private layer above PATH"),
    Flag("--detach-keys", "str", "keys that leave it running", "ctrl-p,ctrl-q"),
    Flag("--sig-proxy", "bool", "signals go to the container; =false leaves them here", default=True),
    Flag("--cidfile", "str", "write the container's id there", "FILE"),
    Flag("--timings", "bool", "print where the time of the start went"),
]


def size(text: str, flag: str) -> int:
    """Bytes of 64m. Raises UsageError."""
    units = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    word = text.strip().lower().removesuffix("ib").removesuffix("b") or text
    power = units.get(word[-1:])
    digits = word[:-1] if power is not None else word
    try:
        return int(float(digits) * 1024 ** (power or 0))
    except ValueError:
        raise UsageError(f"invalid argument {text!r} for {flag}: write a size, as in 64m") from None


def pair(text: str, flag: str) -> tuple[str, str]:
    """NAME=VALUE. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"invalid argument {text!r} for {flag}: write NAME=VALUE")
    return name, value


def environment(context: Context, options: dict[str, Any]) -> list[str]:
    """--env-file, then -e; a bare name takes this side's value or unsets."""
    entries = []
    for path in options.get("env_file") or []:
        try:
            lines = [line.strip() for line in context.read_text(path).splitlines()]
        except OSError as error:
            raise UsageError(f"--env-file {path}: {error.strerror}") from error
        entries += [line for line in lines if line and not line.startswith("#")]
    entries += options.get("env") or []
    return [entry if "=" in entry else f"{entry}={context.env[entry]}" if entry in context.env else entry
            for entry in entries]


def ports(values: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(PortBindings, ExposedPorts) of -p. Ranges of equal length on both sides. Raises UsageError."""
    bindings: dict[str, list[dict[str, str]]] = {}
    for value in values:
        spec, slash, protocol = value.partition("/")
        protocol = protocol if slash else "tcp"
        address = ""
        if spec.startswith("["):
            address, _, spec = spec[1:].partition("]")
            spec = spec.removeprefix(":")
        parts = spec.split(":")
        if len(parts) == 3:
            address, parts = parts[0], parts[1:]
        if len(parts) > 2 or protocol not in ("tcp", "udp"):
            raise UsageError(f"invalid argument {value!r} for --publish: write [ADDRESS:][HOST:]CONTAINER[/tcp|udp]")
        inside = _range(parts[-1], value)
        outside = _range(parts[0], value) if len(parts) == 2 and parts[0] else [0] * len(inside)
        if len(inside) == 1 < len(outside):  # the first free one of a range
            bindings.setdefault(f"{inside[0]}/{protocol}", []).append({"HostIp": address, "HostPort": parts[0]})
            continue
        if len(inside) != len(outside):
            raise UsageError(f"invalid argument {value!r} for --publish: the ranges have different lengths")
        for host, port in zip(outside, inside, strict=True):
            bindings.setdefault(f"{port}/{protocol}", []).append({"HostIp": address, "HostPort": str(host or "")})
    return bindings, {key: {} for key in bindings}


def _range(text: str, whole: str, flag: str = "--publish") -> list[int]:
    first, dash, last = text.partition("-")
    try:
        low, high = int(first), int(last) if dash else int(first)
    except ValueError:
        raise UsageError(f"invalid argument {whole!r} for {flag}: {text!r} is not a port") from None
    if not 0 < low <= high <= 65535:
        raise UsageError(f"invalid argument {whole!r} for {flag}: {text!r} is not a port or range")
    return list(range(low, high + 1))


def _yes(key: str, text: str) -> bool:
    if text not in ("", "1", "true", "True", "0", "false", "False"):
        raise UsageError(f"invalid value for {key}: {text}")
    return text in ("", "1", "true", "True")


def _recursive(mount: dict[str, Any], how: str) -> None:
    """bind-recursive, when all other keys are known. Raises UsageError."""
    options = mount.setdefault("BindOptions", {})
    if how == "disabled":
        options["NonRecursive"] = True
    elif how in ("writable", "readonly"):
        options["ReadOnlyNonRecursive" if how == "writable" else "ReadOnlyForceRecursive"] = True
        if not mount.get("ReadOnly"):
            raise UsageError(f"option 'bind-recursive={how}' requires 'readonly' to be specified in conjunction")
        if how == "readonly" and options.get("Propagation") != "rprivate":
            raise UsageError("option 'bind-recursive=readonly' requires 'bind-propagation=rprivate' to be specified in "
                             "conjunction")
    elif how != "enabled":
        raise UsageError(f"invalid value for bind-recursive: {how} (must be one of \"enabled\", \"disabled\", \"writable\", "
                         "or \"readonly\")")


_PLAIN = {"type": "Type", "source": "Source", "src": "Source", "target": "Target", "dst": "Target", "destination": "Target"}


def _long_mount(value: str) -> dict[str, Any]:
    mount: dict[str, Any] = {"Type": "volume"}
    recursive = ""
    for part in value.split(","):
        key, _, text = part.partition("=")
        group = mount.setdefault(f"{key.split('-')[0].title()}Options", {}) if "-" in key else {}
        if key in _PLAIN:
            mount[_PLAIN[key]] = text
        elif key in ("readonly", "ro"):
            mount["ReadOnly"] = _yes(key, text)
        elif key == "bind-propagation":
            group["Propagation"] = text
        elif key == "bind-nonrecursive":
            group["NonRecursive"] = _yes(key, text)
        elif key == "bind-recursive":
            recursive = text
        elif key == "bind-create-src":
            group["CreateMountpoint"] = _yes(key, text)
        elif key == "idmap":
            mount.setdefault("BindOptions", {})["IDMap"] = part
        elif key == "volume-nocopy":
            group["NoCopy"] = _yes(key, text)
        elif key == "volume-subpath":
            group["Subpath"] = text
        elif key == "volume-label":
            name, _, word = text.partition("=")
            group.setdefault("Labels", {})[name] = word
        elif key == "volume-driver":
            group.setdefault("DriverConfig", {})["Name"] = text
        elif key == "volume-opt":
            name, _, word = text.partition("=")
            group.setdefault("DriverConfig", {}).setdefault("Options", {})[name] = word
        elif key == "tmpfs-size":
            group["SizeBytes"] = size(text, "--mount tmpfs-size")
        elif key == "tmpfs-mode":
            try:
                group["Mode"] = int(text, 8)
            except ValueError:
                raise UsageError(f"invalid value for tmpfs-mode: {text}") from None
        elif key in ("z", "Z", "relabel", "consistency"):
            continue  # there is no SELinux label to set
        else:
            raise UsageError(f"invalid argument {value!r} for --mount: unknown key {key!r}")
    if recursive:
        _recursive(mount, recursive)
    return mount


def long_mounts(context: Context, values: list[str]) -> list[dict[str, Any]]:
    """--mount. Raises UsageError."""
    mounts = []
    for value in values:
        mount = _long_mount(value)
        if mount["Type"] == "bind" and mount.get("Source"):
            mount["Source"] = context.path(mount["Source"])
        mounts.append(mount)
    return mounts


def _binds(context: Context, values: list[str]) -> tuple[list[str], dict[str, Any]]:
    binds: list[str] = []
    volumes: dict[str, Any] = {}
    for value in values:
        source, colon, rest = value.partition(":")
        if not colon:
            volumes[source] = {}
        elif source.startswith((".", "~")) or ("/" in source and not source.startswith("/")):
            binds.append(f"{context.path(source)}:{rest}")
        else:
            binds.append(value)
    return binds, volumes


def _devices(values: list[str]) -> list[dict[str, str]]:
    devices = []
    for value in values:
        parts = value.split(":")
        access = parts.pop() if len(parts) > 1 and not parts[-1].startswith("/") else "rwm"
        devices.append({"PathOnHost": parts[0], "PathInContainer": parts[-1], "CgroupPermissions": access})
    return devices


def _ulimits(values: list[str]) -> list[dict[str, Any]]:
    limits = []
    for value in values:
        name, text = pair(value, "--ulimit")
        soft, colon, hard = text.partition(":")
        try:
            limits.append({"Name": name, "Soft": int(soft), "Hard": int(hard) if colon else int(soft)})
        except ValueError:
            raise UsageError(f"invalid argument {value!r} for --ulimit: write NAME=SOFT[:HARD]") from None
    return limits


def _security(context: Context, values: list[str]) -> list[str]:
    options = []
    for value in values:
        key, _, path = value.partition("=")
        if key == "seccomp" and path not in ("unconfined", "builtin"):
            try:
                value = f"seccomp={context.read_text(path)}"
            except OSError as error:
                raise UsageError(f"--security-opt seccomp={path}: {error.strerror}") from error
        options.append(value)
    return options


def networks(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(NetworkMode, EndpointsConfig) of --network, --network-alias, --ip, --ip6. Raises UsageError."""
    found: dict[str, Any] = {}
    for value in [*options["network"], *options["net"]] or ["default"]:
        name, settings = _long_network(value) if "=" in value else (value, {})
        if name in found:
            raise UsageError(f"network {name!r} is specified multiple times")
        found[name] = settings
    mode = next(iter(found))
    first = found[mode]
    if options["network_alias"]:
        first["Aliases"] = [*first.get("Aliases", []), *options["network_alias"]]
    for flag, key in (("ip", "IPv4Address"), ("ip6", "IPv6Address")):
        if options[flag]:
            first["IPAMConfig"] = {**first.get("IPAMConfig", {}), key: options[flag]}
    return mode, found if len(found) > 1 or first else {}


def _long_network(value: str) -> tuple[str, dict[str, Any]]:
    name = ""
    settings: dict[str, Any] = {}
    for part in value.split(","):
        key, _, text = part.partition("=")
        if key == "name":
            name = text
        elif key == "alias":
            settings["Aliases"] = [*settings.get("Aliases", []), text]
        elif key in ("ip", "ip6"):
            family = "IPv6Address" if key == "ip6" else "IPv4Address"
            settings["IPAMConfig"] = {**settings.get("IPAMConfig", {}), family: text}
        elif key == "mac-address":
            settings["MacAddress"] = text
        else:
            raise UsageError(f"--network {value}: {key!r} is not known: name, alias, ip, ip6 and mac-address are")
    if not name:
        raise UsageError(f"--network {value}: name=… is missing")
    return name, settings


def restart(text: str) -> dict[str, Any]:
    """``--restart POLICY[:N]`` as the API has it. Raises UsageError; which policies there are, the daemon says."""
    name, colon, retries = text.partition(":")
    if not name:
        raise UsageError(f"--restart {text}: no policy before the colon")
    try:
        return {"Name": name, "MaximumRetryCount": int(retries) if colon else 0}
    except ValueError:
        raise UsageError(f"--restart {text}: the number of retries must be a whole number") from None


def create_body(context: Context, options: dict[str, Any], image: str, command: list[str],
                window: tuple[int, int]) -> dict[str, Any]:
    """The body of a create request. Raises UsageError."""
    bindings, exposed = ports(options["publish"])
    for value in options["expose"]:
        text, _, protocol = value.partition("/")
        exposed.update({f"{port}/{protocol or 'tcp'}": {} for port in _range(text, value, "--expose")})
    binds, volumes = _binds(context, options["volume"])
    network, networking = networks(options)
    host: dict[str, Any] = {
        "AutoRemove": options["rm"], "Binds": binds, "Mounts": long_mounts(context, options["mount"]),
        "VolumesFrom": options["volumes_from"],
        "Tmpfs": {target: rest for target, _, rest in (value.partition(":") for value in options["tmpfs"])},
        "PortBindings": bindings, "PublishAllPorts": options["publish_all"], "NetworkMode": network,
        "ExtraHosts": options["add_host"], "Dns": options["dns"], "DnsSearch": options["dns_search"],
        "Egress": options["egress"], "Ingress": options["ingress"], "Bandwidth": options["bandwidth"] or "",
        "CapAdd": options["cap_add"], "CapDrop": options["cap_drop"],
        "SecurityOpt": _security(context, options["security_opt"]), "ReadonlyRootfs": options["read_only"],
        "Privileged": options["privileged"], "Devices": _devices(options["device"]), "GroupAdd": options["group_add"],
        "Ulimits": _ulimits(options["ulimit"]), "Sysctls": dict(pair(value, "--sysctl") for value in options["sysctl"]),
        "Init": options["init"], "Isolation": options["isolation"] or "", "Runtime": options["runtime"] or "",
        "UsernsMode": options["userns"] or "", "PidMode": options["pid"] or "",
        "IpcMode": options["ipc"] or "", "UTSMode": options["uts"] or "", "CgroupnsMode": options["cgroupns"] or "",
        "RestartPolicy": restart(options["restart"] or "no"),
        "ConsoleSize": list(window),
        "LogConfig": {"Type": options["log_driver"] or "json-file",
                      "Config": dict(pair(value, "--log-opt") for value in options["log_opt"])},
        "StorageOpt": dict(pair(value, "--storage-opt") for value in options["storage_opt"]),
    }
    for key, flag in (("Memory", "memory"), ("MemoryReservation", "memory_reservation"), ("ShmSize", "shm_size")):
        if options[flag]:
            host[key] = size(options[flag], f"--{flag.replace('_', '-')}")
    if options["memory_swap"]:
        host["MemorySwap"] = -1 if options["memory_swap"] == "-1" else size(options["memory_swap"], "--memory-swap")
    if options["cpus"]:
        try:
            host["NanoCpus"] = int(float(options["cpus"]) * 1e9)
        except ValueError:
            raise UsageError(f"invalid argument {options['cpus']!r} for --cpus: not a number") from None
    for key, flag in (("CpuShares", "cpu_shares"), ("CpusetCpus", "cpuset_cpus"), ("PidsLimit", "pids_limit"),
                      ("OomScoreAdj", "oom_score_adj")):
        if options[flag] is not None:
            host[key] = options[flag]
    body: dict[str, Any] = {
        "Image": image, "Cmd": command or None, "Env": environment(context, options), "Tty": options["tty"],
        "OpenStdin": options["interactive"], "StdinOnce": options["interactive"] and not options["detach"],
        "AttachStdin": options["interactive"] and not options["detach"], "AttachStdout": not options["detach"],
        "AttachStderr": not options["detach"], "WorkingDir": options["workdir"] or "", "User": options["user"] or "",
        "Hostname": options["hostname"] or "", "Labels": dict((*value.partition("=")[::2],) for value in options["label"]),
        "ExposedPorts": exposed, "Volumes": volumes, "HostConfig": host, "NetworkingConfig": {"EndpointsConfig": networking},
    }
    if options["entrypoint"] is not None:
        body["Entrypoint"] = [options["entrypoint"]]
    if options["stop_signal"]:
        body["StopSignal"] = options["stop_signal"]
    if options["stop_timeout"] is not None:
        body["StopTimeout"] = options["stop_timeout"]
    if options["mac_address"]:
        body["MacAddress"] = options["mac_address"]
    return body
