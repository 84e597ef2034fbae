"""One network of the bridge driver, as it is kept in memory: its bridge, its addresses, and who has them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from dolium.errors import DoliumError, Internal, PermissionDenied
from dolium.network.addresses import AddressPool, check_mac, mac_for
from dolium.network.base import Endpoint, Place
from dolium.network.firewall import Bridge
from dolium.network.ports import ANY, Published
from dolium.network.records import Record
from dolium.network.switch import Switch

DEFAULT = "bridge"


@dataclass(slots=True)
class Held:
    """What a container has in a network. ``link``: the host end's index, 0 when it is not known."""

    address: IPv4Address
    mac: str
    ports: tuple[Published, ...] = ()
    link: int = 0


class BridgeNetwork:
    """``broken``: why it cannot be used, which is every ``reserve``'s error."""

    def __init__(self, record: Record, switch: Switch) -> None:
        self.record, self.switch = record, switch
        self.held: dict[str, Held] = {}
        self.addresses: AddressPool
        self.broken: DoliumError | None = Internal(f"the network {record.name} was not started")

    @property
    def default(self) -> bool:
        """Is it the instance's own, that nobody made?"""
        return self.record.name == DEFAULT

    @property
    def subnet(self) -> IPv4Network:
        return self.addresses.subnet

    def settle(self, record: Record) -> None:
        """With its subnet known."""
        self.record = record
        self.addresses = AddressPool(
            IPv4Network(record.subnet), gateway=IPv4Address(record.gateway) if record.gateway else None,
            within=IPv4Network(record.within) if record.within else None,
            reserved=map(IPv4Address, record.reserved.values()))

    def rule(self) -> Bridge:
        """As the firewall knows it."""
        return Bridge(self.switch.name, self.subnet, self.record.internal, self.record.masquerade)

    def reserve(self, container: str, place: Place) -> Endpoint:
        """An address, and what comes of it. Raises as ``NetworkManager.prepare``."""
        if self.broken is not None:
            raise type(self.broken)(self.broken.message, hint=self.broken.hint, errno=self.broken.errno)
        if container in self.held:
            if self.default:
                raise Internal(f"container {container[:12]} has a place on the bridge already")
            raise PermissionDenied(f"container {container} is in network {self.record.name} already")
        mac = check_mac(place.mac) if place.mac else ""
        address = self.addresses.allocate(place.address)
        held = self.held[container] = Held(address, mac or mac_for(address))
        return {"network": self.record.name, "ip": str(address), "prefix": self.subnet.prefixlen,
                    "gateway": "" if self.record.internal else str(self.addresses.gateway), "mac": held.mac, "link": "",
                    "ports": [], "network_id": self.record.id}

    def describe(self, instance: str) -> dict[str, Any]:
        """What differs from network to network in Docker's object."""
        if self.broken is not None:
            return {}
        record = self.record
        pool = {"Subnet": str(self.subnet), "Gateway": str(self.addresses.gateway)}
        if record.within:
            pool["IPRange"] = record.within
        extra: dict[str, Any] = {"AuxiliaryAddresses": record.reserved} if record.reserved else {}
        return {
            "Created": record.created,
            "IPAM": {"Driver": "default", "Options": None if self.default else {}, "Config": [pool | extra]},
            "Containers": {container: {
                "Name": "", "EndpointID": endpoint_id(instance, container, record),
                "MacAddress": held.mac, "IPv4Address": f"{held.address}/{self.subnet.prefixlen}", "IPv6Address": ""}
                for container, held in self.held.items()},
            "Options": {
                "com.docker.network.bridge.default_bridge": "true",
                "com.docker.network.bridge.enable_icc": "true",
                "com.docker.network.bridge.enable_ip_masquerade": "true",
                "com.docker.network.bridge.host_binding_ipv4": ANY,
                "com.docker.network.bridge.name": self.switch.name,
                "com.docker.network.driver.mtu": str(self.switch.mtu)} if self.default else record.options}


def endpoint_id(instance: str, container: str, record: Record) -> str:
    """Of a container's place in a network; 64 digits."""
    name = "" if record.name == DEFAULT else f":{record.id}"
    return hashlib.sha256(f"{instance}:{container}{name}".encode()).hexdigest()
