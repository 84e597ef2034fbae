"""``cni``: a network is a chain of CNI plugins, which decide all: addresses, routes, what is published.

Before a chain is run, what it takes to undo it is written to the run folder: when a daemon dies in between, the next one
runs it backwards. Addresses are known when the chain has run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from dolium import faults
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from dolium.network import cni
from dolium.network.addresses import check_mac
from dolium.network.antispoof import Sources
from dolium.network.base import Endpoint, Place, PortBinding
from dolium.network.cni import Attachment
from dolium.network.pool import open_namespace
from dolium.network.ports import Published
from dolium.network.records import Record
from dolium.network.switch import as_error

_log = logging.getLogger(__name__)
UNKNOWN = "0.0.0.0"
"""The gateway until the chain has said another one."""
faults.register("network.cni.intent", "network.cni.added", "network.cni.removed")


@dataclass(slots=True)
class _Network:
    record: Record
    held: dict[str, Endpoint]


class CniDriver:
    """Its networks' configuration is read when a container comes, and kept for when it goes."""

    name, publishes, late = "cni", False, True

    def __init__(self, run_dir: str) -> None:
        self._folder = f"{run_dir}/cni"
        self._networks: dict[str, _Network] = {}

    # -- start --

    async def start(self, records: Sequence[Record], live: dict[str, list[Endpoint]]) -> None:
        """See Driver. What a dead daemon has begun is undone."""
        self._networks = {record.name: _Network(record, {}) for record in records}
        known = set()
        for container, endpoints in live.items():
            for endpoint in endpoints:
                if endpoint["network"] in self._networks:
                    self._networks[endpoint["network"]].held[container] = endpoint
                    known.add(self._path(container, endpoint))
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                path = f"{self._folder}/{name}"
                if path not in known:
                    await asyncio.to_thread(self._undo, path, "")

    def _path(self, container: str, endpoint: Endpoint) -> str:
        return f"{self._folder}/{container}-{endpoint['network_id'][:12]}"

    # -- a container's --

    def _network(self, name: str) -> _Network:
        if name not in self._networks:
            raise NotFound(f"network {name} not found")
        return self._networks[name]

    def reserve(self, container: str, place: Place) -> Endpoint:
        """See Driver. The configuration is read here: what is wrong with it, or what it does not take, is an error before
        anything is made."""
        network = self._network(place.network)
        record = network.record
        if container in network.held:
            raise PermissionDenied(f"container {container} is in network {record.name} already")
        config = cni.read_config(record.options["config"])
        wishes: dict[str, Any] = {}
        takes = cni.capabilities(config)
        for capability, wish, what in (("mac", check_mac(place.mac) if place.mac else "", "a MAC address"),
                                       ("ips", [place.address] if place.address else [], "an address")):
            if wish and capability not in takes:
                raise InvalidArgument(f"network {record.name}: no plugin of {record.options['config']} takes {what}",
                                      hint=f"one of them needs the capability {capability!r}")
            if wish:
                wishes[capability] = wish
        sent, received = place.bandwidth
        if sent or received:
            if "bandwidth" not in takes:
                raise InvalidArgument(f"network {record.name}: no plugin of {record.options['config']} takes a bandwidth",
                                      hint="add the plugin bandwidth, with its capability")
            wishes["bandwidth"] = {key: value for direction, rate in (("egress", sent), ("ingress", received)) if rate
                                   for key, value in ((f"{direction}Rate", rate * 8), (f"{direction}Burst", rate * 8))}
        endpoint: Endpoint = {"network": record.name, "ip": "", "prefix": 0, "gateway": UNKNOWN, "mac": "", "link": "",
                              "ports": [], "network_id": record.id,
                              "cni": {"config": config, "bin": record.options.get("bin") or cni.FOLDERS, "wishes": wishes,
                                      "result": {}}}
        network.held[container] = endpoint
        return endpoint

    def publish(self, container: str, endpoint: Endpoint, ports: Sequence[PortBinding]) -> None:
        """See Driver: by the chain's own plugin."""
        if not ports:
            return
        if "portMappings" not in cni.capabilities(endpoint["cni"]["config"]):
            raise InvalidArgument(f"network {endpoint['network']}: no plugin publishes ports",
                                  hint="add the plugin portmap, with its capability portMappings")
        if any(not port.host_port or port.host_last > port.host_port for port in ports):
            raise InvalidArgument(f"network {endpoint['network']}: a CNI plugin publishes a port of the host that is named",
                                  hint="-p PORT:PORT")
        if endpoint["cni"]["result"]:
            raise _unchanging(endpoint)
        endpoint["ports"] = [
            Published(port.container_port, port.protocol, port.host_ip or "0.0.0.0", port.host_port).as_dict()
            for port in ports]
        endpoint["cni"]["wishes"]["portMappings"] = [
            {"hostPort": port.host_port, "containerPort": port.container_port, "protocol": port.protocol,
             **({"hostIP": port.host_ip} if port.host_ip else {})} for port in ports]

    async def make(self, container: str, endpoint: Endpoint, namespace: int) -> int:
        """See Driver."""
        try:
            fd, control = await asyncio.to_thread(open_namespace, namespace)
        except OSError as error:
            raise as_error(error, "cannot make a network namespace") from error
        control.close()
        try:
            await self._add(container, endpoint, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def join(self, container: str, endpoint: Endpoint, namespace: int, *, default: bool, default6: bool) -> None:
        """See Driver; which default route there is is the chain's own affair."""
        await self._add(container, endpoint, namespace)

    async def _add(self, container: str, endpoint: Endpoint, namespace: int) -> None:
        own = endpoint["cni"]
        path = self._path(container, endpoint)

        def work() -> dict[str, Any]:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            with open(path, "w") as file:
                json.dump({"container": container, "link": endpoint["link"], "cni": own}, file)
            faults.point("network.cni.intent")
            return cni.add(own["config"], own["bin"], Attachment(container, f"/proc/{os.getpid()}/fd/{namespace}",
                                                                 endpoint["link"], own["wishes"]))

        own["result"] = result = await asyncio.to_thread(work)
        faults.point("network.cni.added")
        try:
            address, prefix, gateway = cni.address_of(result)
        except ValueError as error:
            raise FailedPrecondition(f"network {endpoint['network']}: the plugins' result: {error}") from error
        endpoint |= {"ip": address, "prefix": prefix, "gateway": gateway or UNKNOWN,
                     "mac": cni.mac_of(result, endpoint["link"])}

    async def expose(self, container: str, endpoint: Endpoint) -> None:
        """Nothing: a chain publishes when it is run."""

    async def withdraw(self, container: str, endpoint: Endpoint, ports: Sequence[Published]) -> None:
        """Raises Unimplemented."""
        raise _unchanging(endpoint)

    async def leave(self, container: str, endpoint: Endpoint, namespace: int) -> None:
        """See Driver."""
        await self._remove(container, endpoint, f"/proc/{os.getpid()}/fd/{namespace}")

    async def release(self, container: str, endpoint: Endpoint) -> None:
        """See Driver. The namespace is on its way out: the plugins are told none."""
        await self._remove(container, endpoint, "")

    async def _remove(self, container: str, endpoint: Endpoint, namespace: str) -> None:
        network = self._networks.get(endpoint["network"])
        if network is not None:
            network.held.pop(container, None)
        path = self._path(container, endpoint)
        if os.path.exists(path):
            await asyncio.to_thread(self._undo, path, namespace, endpoint["cni"].get("result"))
        elif endpoint["cni"].get("result"):  # of before a reboot
            await asyncio.to_thread(self._backwards, container, endpoint["link"], endpoint["cni"], namespace)

    def _undo(self, path: str, namespace: str, result: dict[str, Any] | None = None) -> None:
        try:
            with open(path) as file:
                found = json.load(file)
            own = found["cni"]
            own["result"] = result or own.get("result") or {}
            self._backwards(found["container"], found["link"], own, namespace)
        except (ValueError, KeyError) as error:
            _log.warning("%s cannot be read, and is passed over: %r", path, error)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        faults.point("network.cni.removed")

    @staticmethod
    def _backwards(container: str, link: str, own: dict[str, Any], namespace: str) -> None:
        for failure in cni.remove(own["config"], own["bin"], Attachment(container, namespace, link, own["wishes"]),
                                  own["result"]):
            _log.warning("container %s: %s", container[:12], failure)

    # -- networks --

    async def create(self, record: Record) -> Record:
        """See Driver. The programs must be there."""
        config = await asyncio.to_thread(cni.read_config, record.options["config"])
        for plugin in config["plugins"]:
            cni.program(plugin["type"], record.options.get("bin") or cni.FOLDERS)
        self._networks[record.name] = _Network(record, {})
        return record

    async def remove(self, name: str) -> None:
        """See Driver."""
        if self._network(name).held:
            raise FailedPrecondition(f"network {name} has active endpoints")
        del self._networks[name]

    def describe(self, name: str) -> dict[str, Any]:
        """See Driver."""
        network = self._networks.get(name)
        if network is None:
            return {}
        return {"Created": network.record.created, "Options": network.record.options,
                "IPAM": {"Driver": "cni", "Options": {}, "Config": []},
                "Containers": {container: {
                    "Name": "", "EndpointID": hashlib.sha256(f"{container}:{network.record.id}".encode()).hexdigest(),
                    "MacAddress": endpoint["mac"], "IPv6Address": "",
                    "IPv4Address": f"{endpoint['ip']}/{endpoint['prefix']}" if endpoint["ip"] else ""}
                    for container, endpoint in network.held.items()}}

    def subnets(self) -> list[IPv4Network]:
        """None that it knows of."""
        return []

    def subnets6(self) -> list[IPv6Network]:
        """None."""
        return []

    def sources(self, name: str) -> Sources | None:
        """See Driver."""
        return None

    async def close(self) -> None:
        """Nothing is kept."""


def _unchanging(endpoint: Endpoint) -> Unimplemented:
    return Unimplemented(f"network {endpoint['network']}: ports of a CNI network do not change while a container runs")
