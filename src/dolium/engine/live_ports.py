"""Ports published, and published no more, while a container runs; its later starts have what it has now."""

from __future__ import annotations

from typing import Any

from dolium.engine import request
from dolium.engine.engine import Engine
from dolium.engine.model import Container
from dolium.engine.networks import mode_of
from dolium.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from dolium.network.base import PortBinding
from dolium.network.ports import ANY, ANY6, at

Bindings = dict[str, list[dict[str, str]]]


class LivePorts:
    """All of one engine's."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def add(self, reference: str, bindings: Any) -> None:
        """``bindings``: Docker's PortBindings. Raises NotFound, InvalidArgument, AlreadyExists for a port that is taken,
        FailedPrecondition."""
        wanted = _parsed(bindings)
        if not wanted:
            raise InvalidArgument("no port is named", hint="[ADDRESS:]PORT:PORT[/udp]")
        container = self._engine.find(reference)
        async with self._engine.lock(container.id):
            container = self._engine.find(container.id)
            _check_mode(container)
            host = _explicit(container)
            known = {(port.container_port, port.protocol, port.host_ip, port.host_port)
                     for port in request.published(host, container.config)}
            for port in wanted:
                if port.host_port and (port.container_port, port.protocol, port.host_ip, port.host_port) in known:
                    raise AlreadyExists(f"container {container.name} publishes {_text(port)} already")
            if container.live:
                container.network = await self._engine.network.publish(container.id, container.network, tuple(wanted))
            now: Bindings = {key: list(entries or []) for key, entries in (host.get("PortBindings") or {}).items()}
            for key, entries in bindings.items():
                now.setdefault(_key(key), []).extend(entries or [{"HostIp": "", "HostPort": ""}])
            self._keep(container, host, now)

    async def remove(self, reference: str, port: PortBinding) -> None:
        """All that is published of a port of the container, or what is at the host's address and port where they are given.
        Raises NotFound, FailedPrecondition."""
        container = self._engine.find(reference)
        async with self._engine.lock(container.id):
            container = self._engine.find(container.id)
            _check_mode(container)
            host = _explicit(container)
            key = f"{port.container_port}/{port.protocol}"
            now: Bindings = {name: list(entries or [{}]) for name, entries in (host.get("PortBindings") or {}).items()}
            entries = _apart(now.get(key) or [], port, container)
            gone = [entry for entry in entries if _matches(entry, port, container)]
            if not gone:
                raise NotFound(f"container {container.name} does not publish {_text(port)}",
                               hint=f"`dolium port {container.name}` lists what it does")
            if container.live:
                container.network = await self._engine.network.withdraw(container.id, container.network, (port,))
            now[key] = [entry for entry in entries if entry not in gone]
            self._keep(container, host, {name: kept for name, kept in now.items() if kept})

    def _keep(self, container: Container, host: dict[str, Any], bindings: Bindings) -> None:
        host["PortBindings"] = bindings
        container.host_config = host
        exposed = dict(container.config.get("ExposedPorts") or {})
        container.config["ExposedPorts"] = {**exposed, **{key: {} for key in bindings}}
        self._engine.record(container)
        self._engine.event(container, "update")


def _parsed(bindings: Any) -> list[PortBinding]:
    """Raises InvalidArgument."""
    if not isinstance(bindings, dict) or not all(
            isinstance(entries or [], list) and all(isinstance(entry, dict) for entry in entries or [])
            for entries in bindings.values()):
        raise InvalidArgument("PortBindings must be an object of lists of HostIp and HostPort")
    for spec in bindings:  # it is to be found again by this key
        number, slash, protocol = spec.partition("/")
        request.port_number(number)
        if slash and protocol not in ("tcp", "udp"):
            raise InvalidArgument(f"cannot publish {spec}: only tcp and udp")
    return request.published({"PortBindings": bindings}, {})


def _key(spec: str) -> str:
    return spec if "/" in spec else f"{spec}/tcp"


def _text(port: PortBinding) -> str:
    where = f"{port.host_port}:{port.container_port}" if port.host_port else f"{port.container_port}"
    if port.host_ip:
        where = at(port.host_ip, port.host_port or port.container_port) + f":{port.container_port}" * bool(port.host_port)
    return f"{where}/{port.protocol}"


def _check_mode(container: Container) -> None:
    """Raises FailedPrecondition."""
    mode = mode_of(container)
    if mode in ("host", "none") or mode.startswith("container:"):
        raise FailedPrecondition(f"container {container.name} has the network {mode}: it has no ports of its own to publish")


def _explicit(container: Container) -> dict[str, Any]:
    """Its host configuration, where -P has become what it stands for: each port can go by itself."""
    host = dict(container.host_config)
    if host.get("PublishAllPorts"):
        found: Bindings = {}
        for port in request.published(host, container.config):
            asked = f"{port.host_port}-{port.host_last}" if port.host_last > port.host_port else str(port.host_port or "")
            entries = found.setdefault(f"{port.container_port}/{port.protocol}", [])
            entries.append({"HostIp": port.host_ip, "HostPort": asked})
        host |= {"PublishAllPorts": False, "PortBindings": found}
    return host


def _apart(entries: list[dict[str, str]], port: PortBinding, container: Container) -> list[dict[str, str]]:
    """Where one family's addresses are meant, a wish for all of both becomes two: the other one stays."""
    if port.host_ip not in (ANY, ANY6):
        return entries
    six = any((one["container_port"], one["protocol"], one["host_ip"]) == (port.container_port, port.protocol, ANY6)
              for one in container.network.get("ports") or [])
    return [{**entry, "HostIp": entry.get("HostIp") or address} for entry in entries
            for address in ([ANY, ANY6] if six and not entry.get("HostIp") else [entry.get("HostIp") or ""])]


def _matches(entry: dict[str, str], port: PortBinding, container: Container) -> bool:
    """Is that the wish for a port that goes? One of a port the kernel chose is known by what it got."""
    wished, address = entry.get("HostPort") or "", entry.get("HostIp") or ""
    if port.host_ip and (address or ANY) != port.host_ip:
        return False
    if not port.host_port or wished == str(port.host_port):
        return True
    return not wished.isdigit() and any(
        (one["container_port"], one["protocol"], one["host_port"])
        == (port.container_port, port.protocol, port.host_port) for one in container.network.get("ports") or [])
