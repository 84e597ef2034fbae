"""Engine objects in the shapes of Docker's API."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from dolium.engine import model
from dolium.engine.containers import Containers
from dolium.engine.engine import Engine
from dolium.engine.model import Container
from dolium.engine.networks import wished_of
from dolium.errors import DoliumError
from dolium.images.view import Image
from dolium.network.base import endpoints
from dolium.units import human_duration, rfc3339

ZERO_TIME = "0001-01-01T00:00:00Z"


def stamp(seconds: float) -> str:
    """RFC 3339; Go's zero time for never."""
    return rfc3339(seconds) if seconds else ZERO_TIME


def moment(text: str) -> float:
    """Unix time of an RFC 3339 text (UTC when it names no zone); 0 when it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def status_text(container: Container, now: float) -> str:
    """The words of ``docker ps``."""
    if container.status == model.RUNNING:
        return f"Up {human_duration(now - container.started_at)}"
    if container.status == model.PAUSED:
        return f"Up {human_duration(now - container.started_at)} (Paused)"
    if container.status == model.RESTARTING:
        return f"Restarting ({container.exit_code}) {human_duration(now - container.finished_at)} ago"
    if container.status == model.REMOVING:
        return "Removal In Progress"
    if container.status == model.DEAD:
        return "Dead"
    if not container.finished_at:
        return "Created"
    return f"Exited ({container.exit_code}) {human_duration(now - container.finished_at)} ago"


def state(container: Container) -> dict[str, Any]:
    """The State object of inspect."""
    return {
        "Status": container.status, "Running": container.live or container.status == model.RESTARTING,
        "Paused": container.status == model.PAUSED, "Restarting": container.status == model.RESTARTING,
        "OOMKilled": container.oom_killed, "Dead": container.status == model.DEAD, "Pid": container.pid,
        "ExitCode": container.exit_code, "Error": container.error, "StartedAt": stamp(container.started_at),
        "FinishedAt": stamp(container.finished_at),
    }


def mount_points(container: Container) -> list[dict[str, Any]]:
    """The Mounts list of inspect."""
    points = []
    for mount in container.mounts:
        point = {"Type": mount.kind, "Source": mount.source, "Destination": mount.target, "Mode": "",
                 "RW": not mount.read_only, "Propagation": (mount.propagation or "rprivate") if mount.kind == "bind" else ""}
        if mount.kind == "volume":
            point |= {"Name": mount.name, "Driver": "local"}
        points.append(point)
    return points


def ports(container: Container) -> dict[str, list[dict[str, str]] | None]:
    """NetworkSettings.Ports: exposed ports, with their bindings where published."""
    found: dict[str, list[dict[str, str]] | None] = dict.fromkeys(container.config.get("ExposedPorts") or {})
    for port in container.network.get("ports") or []:
        key = f"{port['container_port']}/{port['protocol']}"
        bindings = found.get(key) or []
        bindings.append({"HostIp": port["host_ip"] or "0.0.0.0", "HostPort": str(port["host_port"])})
        found[key] = bindings
    return found


def network_settings(container: Container) -> dict[str, Any]:
    """NetworkSettings of inspect. What is wished is there also while it does not run; addresses only then."""
    live = {endpoint["network"]: endpoint for endpoint in endpoints(container.network) if endpoint.get("network")}
    wished = wished_of(container)
    entries = {}
    for name in dict.fromkeys([*live, *wished]):
        wish, endpoint = wished.get(name) or {}, live.get(name) or {} if container.live else {}
        own = {key: wish[key] for key in ("IPv4Address", "IPv6Address") if wish.get(key)} or None
        aliases = wish.get("Aliases") or None
        user = name not in ("bridge", "host", "none")
        entries[name] = {
            "IPAMConfig": own, "Links": None, "Aliases": aliases,
            "MacAddress": endpoint.get("mac", "") or wish.get("MacAddress", ""), "DriverOpts": None, "GwPriority": 0,
            "NetworkID": live.get(name, {}).get("network_id", name),
            "EndpointID": container.id if endpoint.get("ip") else "", "Gateway": endpoint.get("gateway", ""),
            "IPAddress": endpoint.get("ip", ""), "IPPrefixLen": endpoint.get("prefix", 0),
            "IPv6Gateway": endpoint.get("gateway6", ""), "GlobalIPv6Address": endpoint.get("ip6", ""),
            "GlobalIPv6PrefixLen": endpoint.get("prefix6", 0),
            "DNSNames": [container.name, *(aliases or []), container.short_id] if user else None}
    default = entries.get("bridge") or {}
    return {
        "Bridge": "", "SandboxID": container.id if container.live else "", "SandboxKey": "",
        "Ports": ports(container) if container.live else {}, "EndpointID": default.get("EndpointID", ""),
        "Gateway": default.get("Gateway", ""), "IPAddress": default.get("IPAddress", ""),
        "IPPrefixLen": default.get("IPPrefixLen", 0), "MacAddress": default.get("MacAddress", ""), "IPv6Gateway": "",
        "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "Networks": entries}


def inspect(engine: Engine, containers: Containers, container: Container, execs: list[str], *,
            size: int | None = None) -> dict[str, Any]:
    """The whole of ``docker inspect``, with dolium's phases of the last start under ``Dolium``. ``size``: bytes it wrote."""
    folder = engine.paths.container(container.id)
    etc = {f"{key}Path": f"{folder}/{name}" if container.live else ""
           for key, name in (("ResolvConf", "resolv.conf"), ("Hostname", "hostname"), ("Hosts", "hosts"))}
    host = {"NetworkMode": "default", "LogConfig": {"Type": "json-file", "Config": {}},
            "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}, "IpcMode": "private", **container.host_config}
    host["NetworkMode"] = host["NetworkMode"] or "default"
    config = {"AttachStdin": False, "AttachStdout": False, "AttachStderr": False, "Tty": False, "OpenStdin": False,
              "StdinOnce": False, "Domainname": "", **container.config}
    found: dict[str, Any] = {
        "Id": container.id, "Created": stamp(container.created), "Path": container.path, "Args": container.args,
        "State": state(container), "Image": container.image_id or container.rootfs,
        **etc,
        "LogPath": containers.log_path(container), "Name": f"/{container.name}", "RestartCount": container.restart_count,
        "Driver": driver_name(engine), "Platform": "linux", "MountLabel": "", "ProcessLabel": "", "AppArmorProfile": "",
        "ExecIDs": execs or None, "HostConfig": host, "GraphDriver": {"Name": driver_name(engine), "Data": None},
        "Mounts": mount_points(container), "Config": config, "NetworkSettings": network_settings(container),
        "Dolium": {**_level(engine, container), "Timings": container.timings},
    }
    if size is not None:
        found["SizeRw"], found["SizeRootFs"] = size, size + image_size(engine, container)
    return found


def _level(engine: Engine, container: Container) -> dict[str, Any]:
    try:
        return engine.backend(container).describe()
    except DoliumError as error:  # its runtime has been taken away
        return {"Runtime": container.host_config.get("Runtime"), "Error": str(error)}


def image_size(engine: Engine, container: Container) -> int:
    """Bytes of the container's layers."""
    sizes = engine.images.layer_sizes()
    return sum(sizes.get(chain, 0) for chain in container.chain_ids)


def summary(engine: Engine, container: Container, now: float, *, size: int | None = None) -> dict[str, Any]:
    """One row of ``docker ps``. ``size``: bytes the container wrote, where they are asked for."""
    published = [
        {"IP": port["host_ip"] or "0.0.0.0", "PrivatePort": port["container_port"], "PublicPort": port["host_port"],
         "Type": port["protocol"]} for port in container.network.get("ports") or []] if container.live else []
    named = {(port["PrivatePort"], port["Type"]) for port in published}
    for spec in container.config.get("ExposedPorts") or {}:
        port, _, protocol = spec.partition("/")
        if container.live and port.isdigit() and (int(port), protocol or "tcp") not in named:
            published.append({"PrivatePort": int(port), "Type": protocol or "tcp"})
    row: dict[str, Any] = {
        "Id": container.id, "Names": [f"/{container.name}"], "Image": container.image, "ImageID": container.image_id,
        "Command": " ".join([container.path, *container.args]), "Created": int(container.created), "Ports": published,
        "Labels": container.config.get("Labels") or {}, "State": container.status,
        "Status": status_text(container, now),
        "HostConfig": {"NetworkMode": container.host_config.get("NetworkMode") or "default"},
        "NetworkSettings": {"Networks": network_settings(container)["Networks"]}, "Mounts": mount_points(container),
    }
    if size is not None:
        row["SizeRw"], row["SizeRootFs"] = size, size + image_size(engine, container)
    return row


def image_summary(image: Image, containers: int) -> dict[str, Any]:
    """One row of ``docker images``."""
    return {
        "Id": image.id, "ParentId": "", "RepoTags": list(image.repo_tags), "RepoDigests": list(image.repo_digests),
        "Created": int(moment(image.created)), "Size": image.size, "VirtualSize": image.size, "SharedSize": -1,
        "Labels": {}, "Containers": containers,
    }


def driver_name(engine: Engine) -> str:
    """Docker's name of the snapshotter: clients look for its own."""
    return "overlay2" if engine.snapshotter == "overlay" else engine.snapshotter


def image_inspect(engine: Engine, image: Image) -> dict[str, Any]:
    """``docker image inspect``."""
    config = engine.images.config(image.id)
    raw = config.raw.get("config")
    return {
        "Id": image.id, "RepoTags": list(image.repo_tags), "RepoDigests": list(image.repo_digests), "Parent": "",
        "Comment": "", "Created": config.created or ZERO_TIME, "DockerVersion": "", "Author": config.author,
        "Config": raw if isinstance(raw, dict) else {}, "Architecture": image.platform.architecture,
        "Variant": image.platform.variant, "Os": image.platform.os, "Size": image.size, "VirtualSize": image.size,
        "GraphDriver": {"Name": driver_name(engine), "Data": None},
        "RootFS": {"Type": "layers", "Layers": list(image.diff_ids)}, "Metadata": {"LastTagTime": ZERO_TIME},
    }


def host_memory() -> int:
    """Bytes of memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
