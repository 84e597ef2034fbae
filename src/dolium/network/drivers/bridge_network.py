"""One network of the bridge driver, as it is kept in memory: its bridge, its addresses, and who has them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from dolium.errors import DoliumError, Internal, PermissionDenied
from dolium.network.addresses import AddressPool, AddressPool6, check_mac, mac_for
from dolium.network.base import Endpoint, Place
from dolium.network.firewall import Bridge, Publication
from dolium.network.ipv6 import Six
from dolium.network.ports import ANY, Published
from dolium.network.records import Record
from dolium.network.switch import Switch

DEFAULT = "bridge"


@dataclass(slots=True)
class Held:
    """What a container has in a network. ``link``: the host end's index, 0 when it is not known; ``address6``: None without
    IPv6."""

    address: IPv4Address
    mac: str
    ports: tuple[Published, ...] = ()
    link: int = 0
    address6: IPv6Address | None = None

    @property
    def publication(self) -> Publication:
        """As the firewall knows it."""
        return Publication(self.address, self.ports, self.address6)


class BridgeNetwork:
    """``broken``: why it cannot be used, which is every ``reserve``'s error."""

    def __init__(self, record: Record, switch: Switch) -> None:
        self.record, self.switch = record, switch
        self.held: dict[str, Held] = {}
        self.addresses: AddressPool
        self.addresses6: AddressPool6 | None = None
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
        if record.ipv6:
            self.addresses6 = AddressPool6(
                IPv6Network(record.subnet6), gateway=IPv6Address(record.gateway6) if record.gateway6 else None,
                within=IPv6Network(record.within6) if record.within6 else None,
                reserved=map(IPv6Address, record.reserved6.values()))

    def rule(self) -> Bridge:
        """As the firewall knows it."""
        six = self.six
        gateways: tuple[IPv4Address | IPv6Address, ...] = (self.addresses.gateway, *([six.address] if six else []))
        return Bridge(self.switch.name, self.subnet, self.record.internal, self.record.masquerade,
                      six.subnet if six else None, self.record.tunnel_port, gateways)

    @property
    def six(self) -> Six | None:
        """The bridge's own IPv6 address."""
        return Six(self.addresses6.gateway, self.addresses6.subnet) if self.addresses6 is not None else None

    def six_of(self, held: Held, *, default: bool) -> Six | None:
        """A container's IPv6 address; with the default route."""
        if self.addresses6 is None or held.address6 is None:
            return None
        out = default and not self.record.internal
        return Six(held.address6, self.addresses6.subnet, self.addresses6.gateway if out else None)

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
        held = Held(address, mac or mac_for(address))
        endpoint: Endpoint = {
            "network": self.record.name, "ip": str(address), "prefix": self.subnet.prefixlen,
            "gateway": "" if self.record.internal else str(self.addresses.gateway), "mac": held.mac, "link": "",
            "ports": [], "network_id": self.record.id}
        if self.addresses6 is not None:
            try:
                held.address6 = self.addresses6.allocate(place.address6)
            except BaseException:
                self.addresses.release(address)
                raise
            endpoint |= {"ip6": str(held.address6), "prefix6": self.addresses6.subnet.prefixlen,
                         "gateway6": "" if self.record.internal else str(self.addresses6.gateway)}
        self.held[container] = held
        return endpoint

    def adopt(self, held: Held) -> str:
        """Take the addresses that a container already has; those that are not of this network, or another's too."""
        wrong = [] if self.addresses.adopt(str(held.address)) else [str(held.address)]
        if held.address6 is not None and (self.addresses6 is None or not self.addresses6.adopt(str(held.address6))):
            wrong.append(str(held.address6))
        return " and ".join(wrong)

    def give_back(self, held: Held) -> None:
        """A container's addresses are free. Idempotent."""
        self.addresses.release(held.address)
        if self.addresses6 is not None and held.address6 is not None:
            self.addresses6.release(held.address6)

    def describe(self, instance: str) -> dict[str, Any]:
        """What differs from network to network in Docker's object."""
        if self.broken is not None:
            return {}
        record = self.record
        pool = {"Subnet": str(self.subnet), "Gateway": str(self.addresses.gateway)}
        if record.within:
            pool["IPRange"] = record.within
        extra: dict[str, Any] = {"AuxiliaryAddresses": record.reserved} if record.reserved else {}
        pools = [pool | extra]
        if self.addresses6 is not None:
            pools.append({"Subnet": str(self.addresses6.subnet), "Gateway": str(self.addresses6.gateway)}
                         | ({"IPRange": record.within6} if record.within6 else {})
                         | ({"AuxiliaryAddresses": record.reserved6} if record.reserved6 else {}))
        return {
            "Created": record.created, "EnableIPv6": record.ipv6,
            "IPAM": {"Driver": "default", "Options": None if self.default else {}, "Config": pools},
            "Containers": {container: {
                "Name": "", "EndpointID": endpoint_id(instance, container, record),
                "MacAddress": held.mac, "IPv4Address": f"{held.address}/{self.subnet.prefixlen}",
                "IPv6Address": f"{held.address6}/{self.addresses6.subnet.prefixlen}"
                if self.addresses6 is not None and held.address6 is not None else ""}
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
