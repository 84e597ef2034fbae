"""``macvlan`` and ``ipvlan``: each container has a link of its own above a link of the host, on whose network it is.

Nothing of it is in the host's namespace but the parent: a link that exists, a VLAN of one (``eth0.20``), or, when none is
named, one that leads nowhere. The last two are made with the network and go with it. The host itself does not reach its
containers by the parent: the kernel sends nothing from there to what is above it.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypeVar

from dolium import faults
from dolium.errors import (
    AlreadyExists,
    DoliumError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
)
from dolium.network import ipv6, netlink
from dolium.network.addresses import (
    AddressPool,
    AddressPool6,
    check_mac,
    choose_subnet,
    choose_subnet6,
    mac_for,
)
from dolium.network.antispoof import Sources
from dolium.network.base import Endpoint, Place, PortBinding
from dolium.network.drivers.base import Others
from dolium.network.ipv6 import Six
from dolium.network.local import announce
from dolium.network.netlink import Link, Netlink
from dolium.network.pool import open_namespace
from dolium.network.ports import Published
from dolium.network.records import Record
from dolium.network.switch import as_error, choosing, make_marked, remove_link

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
ON_LINK, ON_LINK6 = "0.0.0.0", "::"
"""The gateway of an ipvlan in a mode of layer 3: the kernel routes, whoever is asked for."""
_GRACE_SECONDS, _POLL_SECONDS = 5.0, 0.005
faults.register("network.parent.made", "network.child.made")


@dataclass(slots=True)
class _Held:
    address: IPv4Address
    mac: str
    address6: IPv6Address | None = None


class _Network:
    """``broken``: why it cannot be used, which is every ``reserve``'s error."""

    def __init__(self, record: Record) -> None:
        subnet, self.record = IPv4Network(record.subnet), record
        self.held: dict[str, _Held] = {}
        self.broken: DoliumError | None = None
        self.addresses = AddressPool(
            subnet, gateway=IPv4Address(record.gateway) if record.gateway else None,
            within=IPv4Network(record.within) if record.within else None,
            reserved=map(IPv4Address, record.reserved.values()))
        self.addresses6 = AddressPool6(
            IPv6Network(record.subnet6), gateway=IPv6Address(record.gateway6) if record.gateway6 else None,
            within=IPv6Network(record.within6) if record.within6 else None,
            reserved=map(IPv6Address, record.reserved6.values())) if record.ipv6 else None

    def _way_out(self, gateway: IPv4Address | IPv6Address, on_link: str) -> str:
        if self.record.internal or not self.record.parent:
            return ""
        return on_link if self.record.mode in ("l3", "l3s") else str(gateway)

    @property
    def gateway(self) -> str:
        """"" when nothing leads out."""
        return self._way_out(self.addresses.gateway, ON_LINK)

    @property
    def gateway6(self) -> str:
        """As ``gateway``; "" without IPv6, too."""
        return self._way_out(self.addresses6.gateway, ON_LINK6) if self.addresses6 is not None else ""

    def six_of(self, endpoint: Endpoint, *, default: bool) -> Six | None:
        """A container's IPv6 address; with the default route."""
        if self.addresses6 is None or not endpoint.get("ip6"):
            return None
        gateway = IPv6Address(endpoint["gateway6"]) if default and endpoint["gateway6"] else None
        return Six(IPv6Address(endpoint["ip6"]), self.addresses6.subnet, gateway)

    def adopt(self, held: _Held) -> str:
        """Take the addresses that a container already has; those that are not of this network, or another's too."""
        wrong = [] if self.addresses.adopt(str(held.address)) else [str(held.address)]
        if held.address6 is not None and (self.addresses6 is None or not self.addresses6.adopt(str(held.address6))):
            wrong.append(str(held.address6))
        return " and ".join(wrong)

    def give_back(self, held: _Held) -> None:
        """A container's addresses are free."""
        self.addresses.release(held.address)
        if self.addresses6 is not None and held.address6 is not None:
            self.addresses6.release(held.address6)


class SharedLinkDriver:
    """One of the two kinds. ``others``: the subnets of networks of other drivers."""

    publishes = late = False

    def __init__(self, kind: str, instance: str, others: Others) -> None:
        self.name = kind
        self._instance, self._others = instance, others
        self._networks: dict[str, _Network] = {}
        self._changing = asyncio.Lock()
        self._host: Netlink | None = None

    def _kernel(self) -> Netlink:
        if self._host is None:
            self._host = Netlink()
        return self._host

    async def _run(self, work: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        return await asyncio.to_thread(functools.partial(work, *arguments, **named))

    # -- start --

    async def start(self, records: Sequence[Record], live: dict[str, list[Endpoint]]) -> None:
        """See Driver. A network whose parent is gone is named in the log; the rest works."""
        for record in records:
            network = self._networks[record.name] = _Network(record)
            try:
                await self._run(self._parent, record)
            except DoliumError as error:
                network.broken = error
                _log.error("network %s: %s", record.name, error)
        for container, endpoints in live.items():
            for endpoint in endpoints:
                self._adopt(container, endpoint)
        try:
            await self._run(self._sweep)
        except OSError as error:
            _log.warning("links that a dead daemon made for %s networks may remain: %s", self.name, error)

    def _adopt(self, container: str, endpoint: Endpoint) -> None:
        network = self._networks.get(endpoint["network"])
        if network is None:
            return
        try:
            held = _Held(IPv4Address(endpoint["ip"]), str(endpoint["mac"]),
                         IPv6Address(endpoint["ip6"]) if endpoint.get("ip6") else None)
        except (KeyError, ValueError) as error:
            _log.error("the record of container %s has no endpoint one can read: %r", container[:12], error)
            return
        wrong = network.adopt(held)
        if wrong:
            _log.warning("the address %s of container %s is not of %s, or another's too", wrong, container[:12],
                         network.record.name)
        network.held[container] = held

    def _sweep(self) -> None:
        """Parents that a dead daemon made for networks which have no record."""
        mine = {_alias(self._instance, network.record) for network in self._networks.values()}
        host = self._kernel()
        for link in host.links():
            if link.alias.startswith(f"dolium-{self.name}:{self._instance}:") and link.alias not in mine:
                host.request(netlink.delete_link(link.index))

    # -- the parent --

    def _parent(self, record: Record) -> Link:
        """The link that is shared, made if it is this network's own. Blocks. Raises NotFound, Unimplemented, Internal."""
        host, name = self._kernel(), record.parent or f"ds{record.short}"
        try:
            found = host.link(name=name)
            if found is None:
                found = self._make_parent(host, record, name)
            if not found.up:
                host.request(netlink.set_link(found.index, up=True))
            return found
        except OSError as error:
            raise as_error(error, f"network {record.name}: the parent {name}") from error

    def _make_parent(self, host: Netlink, record: Record, name: str) -> Link:
        below, _, number = name.rpartition(".")
        lower = host.link(name=below) if below else None
        if record.parent:
            if lower is None or not number.isdigit():
                raise NotFound(f"network {record.name}: the host has no link {name}",
                               hint="LINK, or LINK.NUMBER for a VLAN of one that is there")
            if not 0 < int(number) < 4095:
                raise InvalidArgument(f"network {record.name}: {name}: a VLAN's number is 1 to 4094")

        def message(first: str) -> bytes:
            if lower is None:
                return netlink.new_child(first, 0, "dummy")
            return netlink.new_child(first, lower.index, "vlan", data=netlink.vlan_data(int(number)))

        try:
            found = make_marked(host, self._instance, message, name, _alias(self._instance, record))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and netlink.UNKNOWN_KIND in (error.strerror or ""):
                what = "802.1q VLANs" if record.parent else "dummy links, which one without a parent needs"
                raise Unimplemented(f"network {record.name}: this kernel has no {what}", errno=error.errno) from error
            raise
        faults.point("network.parent.made")
        return found

    def _drop_parent(self, record: Record) -> None:
        host = self._kernel()
        found = host.link(name=record.parent or f"ds{record.short}")
        if found is not None and found.alias == _alias(self._instance, record):
            remove_link(found.index)

    # -- a container's --

    def _network(self, name: str) -> _Network:
        if name not in self._networks:
            raise NotFound(f"network {name} not found")
        return self._networks[name]

    def reserve(self, container: str, place: Place) -> Endpoint:
        """See Driver."""
        network = self._network(place.network)
        if network.broken is not None:
            raise type(network.broken)(network.broken.message, hint=network.broken.hint, errno=network.broken.errno)
        record = network.record
        if container in network.held:
            raise PermissionDenied(f"container {container} is in network {record.name} already")
        if place.mac and self.name == "ipvlan":
            raise InvalidArgument(f"network {record.name}: all links of an ipvlan have their parent's MAC address",
                                  hint="leave --mac-address out, or use macvlan")
        if place.bandwidth[1]:
            raise InvalidArgument(f"network {record.name}: what a {self.name} is sent does not pass the host: it cannot be "
                                  "limited", hint="--bandwidth up=10mbit limits what it sends")
        if record.mode == "passthru" and network.held:
            raise FailedPrecondition(f"network {record.name}: with macvlan_mode=passthru one container has the link")
        mac = check_mac(place.mac) if place.mac else ""
        address = network.addresses.allocate(place.address)
        held = _Held(address, mac or mac_for(address))
        endpoint: Endpoint = {
            "network": record.name, "ip": str(address), "prefix": network.addresses.subnet.prefixlen,
            "gateway": network.gateway, "mac": held.mac, "link": "", "ports": [], "network_id": record.id}
        if network.addresses6 is not None:
            try:
                held.address6 = network.addresses6.allocate(place.address6)
            except BaseException:
                network.addresses.release(address)
                raise
            endpoint |= {"ip6": str(held.address6), "prefix6": network.addresses6.subnet.prefixlen,
                         "gateway6": network.gateway6}
        network.held[container] = held
        return endpoint

    def publish(self, container: str, endpoint: Endpoint, ports: Sequence[PortBinding]) -> None:
        """Nothing, as with Docker: whoever is on the link's network reaches every port."""

    async def make(self, container: str, endpoint: Endpoint, namespace: int) -> int:
        """See Driver."""
        fd, control = await self._run(open_namespace, namespace)
        try:
            await self._plug(container, endpoint, fd, control, default=True, default6=True)
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def join(self, container: str, endpoint: Endpoint, namespace: int, *, default: bool, default6: bool) -> None:
        """See Driver."""
        fd, control = await self._run(open_namespace, os.dup(namespace))
        try:
            await self._plug(container, endpoint, fd, control, default=default, default6=default6)
        finally:
            os.close(fd)

    async def _plug(self, container: str, endpoint: Endpoint, fd: int, control: Netlink, *, default: bool,
                    default6: bool) -> None:
        network = self._network(endpoint["network"])
        try:
            await self._run(self._make_link, network, container, endpoint, fd, control, default, default6)
        except OSError as error:
            what = f"cannot put container {container[:12]} on {network.record.parent or network.record.name}"
            if error.errno == errno.EOPNOTSUPP and netlink.UNKNOWN_KIND in (error.strerror or ""):
                raise Unimplemented(f"{what}: this kernel has no {self.name} links", errno=error.errno) from error
            if error.errno == errno.EADDRINUSE:
                raise AlreadyExists(f"{what}: another link above it has the MAC address {endpoint['mac']}",
                                    errno=error.errno) from error
            if error.errno in (errno.EBUSY, errno.EINVAL):
                raise FailedPrecondition(f"{what}: {error.strerror}", errno=error.errno,
                                         hint="a link can have macvlans or ipvlans, or be a bridge's, and with passthru "
                                              "it has one") from error
            raise as_error(error, what) from error
        finally:
            control.close()

    def _make_link(self, network: _Network, container: str, endpoint: Endpoint, fd: int, control: Netlink,
                   default: bool, default6: bool) -> None:
        record, link = network.record, endpoint["link"]
        parent = self._parent(record)
        mapped = self.name == "macvlan"
        data = netlink.macvlan_data(record.mode) if mapped else netlink.ipvlan_data(record.mode, record.flag)
        name = f"dc{record.id[:10]}"
        passing = record.mode == "passthru"  # the parent's MAC address is its own
        self._kernel().request(netlink.new_child(name, parent.index, self.name, data=data, namespace=fd, mtu=record.mtu,
                                                 mac=endpoint["mac"] if mapped and not passing else ""))
        faults.point("network.child.made")
        made = control.link(name=name)
        if made is None:
            raise OSError(errno.ENODEV, "the link is gone")
        try:
            gateway = IPv4Address(endpoint["gateway"]) if default and endpoint["gateway"] else None
            six = network.six_of(endpoint, default=default6)
            control.request(netlink.set_link(made.index, name=link))
            if six is not None:
                ipv6.enable_inside(fd, link)
            _bring_up(control, made.index)
            control.request(netlink.new_address(made.index, IPv4Address(endpoint["ip"]), network.addresses.subnet),
                            *([netlink.new_default_route(made.index, gateway)] if gateway is not None else []),
                            *(ipv6.messages(made.index, six) if six is not None else []),
                            *([netlink.limit_rate(made.index, endpoint["bandwidth"][0])] if "bandwidth" in endpoint else []))
            endpoint["mac"] = network.held[container].mac = made.mac  # with ipvlan and passthru it is the parent's
            if record.mode not in ("l3", "l3s"):
                announce(fd, link, made.mac, endpoint["ip"])
            if six is not None:
                ipv6.wait_for(control, six.address)
                if record.mode not in ("l3", "l3s"):
                    ipv6.announce_inside(fd, made.index, made.mac, six.address)
        except BaseException:
            control.request(netlink.delete_link(made.index))
            raise

    async def expose(self, container: str, endpoint: Endpoint) -> None:
        """Nothing is published."""

    async def withdraw(self, container: str, endpoint: Endpoint, ports: Sequence[Published]) -> None:
        """Nothing is published."""

    async def leave(self, container: str, endpoint: Endpoint, namespace: int) -> None:
        """See Driver."""
        def work() -> None:
            _, control = open_namespace(namespace)
            try:
                found = control.link(name=endpoint["link"]) if endpoint["link"] else None
                if found is not None:
                    control.request(netlink.delete_link(found.index))
            finally:
                control.close()

        try:
            await self._run(work)
        except OSError as error:
            raise as_error(error, f"cannot take container {container[:12]} out of {endpoint['network']}") from error
        await self.release(container, endpoint)

    async def release(self, container: str, endpoint: Endpoint) -> None:
        """The link goes with its namespace."""
        network = self._networks.get(endpoint["network"])
        held = network.held.pop(container, None) if network is not None else None
        if network is not None and held is not None:
            network.give_back(held)

    # -- networks --

    async def create(self, record: Record) -> Record:
        """See Driver."""
        async with self._changing:
            for network in self._networks.values():
                if record.parent and network.record.parent == record.parent:
                    raise AlreadyExists(f"network {network.record.name} is already using parent interface {record.parent}")
            lock = choosing()
            await self._run(lock.__enter__)
            try:
                record = await self._run(self._with_subnets, record)
                try:
                    parent = await self._run(self._parent, record)
                    if record.ipv6:
                        ipv6.check(record.name, record.mtu or parent.mtu)
                except BaseException:
                    await self._run(self._drop_parent, record)
                    raise
                self._networks[record.name] = _Network(record)
            finally:
                await self._run(lock.__exit__, None, None, None)
        return record

    def _with_subnets(self, record: Record) -> Record:
        """As ``_with_subnet``, for both families."""
        record = self._with_subnet(record)
        if not record.ipv6:
            return record
        mine = [*self._others.subnets6(), *self.subnets6()]
        if not record.subnet6:
            routes = [route.network for route in self._kernel().routes6()]
            return replace(record, subnet6=str(choose_subnet6(self._instance, [*routes, *mine])))
        if any(IPv6Network(record.subnet6).overlaps(other) for other in mine):
            raise AlreadyExists(f"network {record.name}: {record.subnet6}: Pool overlaps with other one on this address "
                                "space")
        return record

    def _with_subnet(self, record: Record) -> Record:
        """Raises ResourceExhausted, AlreadyExists in Docker's words."""
        mine = [*self._others.subnets(), *self.subnets()]
        if not record.subnet:
            routes = [route.network for route in self._kernel().routes() if route.network.prefixlen]
            return replace(record, subnet=str(choose_subnet([*routes, *mine])))
        # the host's own routes are no obstacle: the subnet is that of the network the parent is on
        if any(IPv4Network(record.subnet).overlaps(other) for other in mine):
            raise AlreadyExists(f"network {record.name}: {record.subnet}: Pool overlaps with other one on this address "
                                "space")
        return record

    async def remove(self, name: str) -> None:
        """See Driver."""
        async with self._changing:
            network = self._network(name)
            if network.held:
                raise FailedPrecondition(f"network {name} has active endpoints")
            del self._networks[name]
            try:
                await self._run(self._drop_parent, network.record)
            except OSError as error:
                self._networks[name] = network
                raise as_error(error, f"cannot remove the network {name}") from error

    def describe(self, name: str) -> dict[str, Any]:
        """See Driver."""
        network = self._networks.get(name)
        if network is None:
            return {}
        record, addresses, addresses6 = network.record, network.addresses, network.addresses6
        pool: dict[str, Any] = {"Subnet": str(addresses.subnet), "Gateway": str(addresses.gateway)}
        if record.within:
            pool["IPRange"] = record.within
        if record.reserved:
            pool["AuxiliaryAddresses"] = record.reserved
        pools = [pool]
        if addresses6 is not None:
            pools.append({"Subnet": str(addresses6.subnet), "Gateway": str(addresses6.gateway)}
                         | ({"IPRange": record.within6} if record.within6 else {})
                         | ({"AuxiliaryAddresses": record.reserved6} if record.reserved6 else {}))
        return {
            "Created": record.created, "Options": record.options,
            "IPAM": {"Driver": "default", "Options": {}, "Config": pools},
            "Containers": {container: {
                "Name": "", "EndpointID": hashlib.sha256(f"{self._instance}:{container}:{record.id}".encode()).hexdigest(),
                "MacAddress": held.mac, "IPv4Address": f"{held.address}/{addresses.subnet.prefixlen}",
                "IPv6Address": f"{held.address6}/{addresses6.subnet.prefixlen}"
                if addresses6 is not None and held.address6 is not None else ""}
                for container, held in network.held.items()}}

    def subnets(self) -> list[IPv4Network]:
        """Of all its networks."""
        return [network.addresses.subnet for network in self._networks.values()]

    def subnets6(self) -> list[IPv6Network]:
        """Of all its networks with IPv6."""
        return [network.addresses6.subnet for network in self._networks.values() if network.addresses6 is not None]

    def sources(self, name: str) -> Sources | None:
        """See Driver."""
        return None

    async def close(self) -> None:
        """With live containers all stays; with none, the parents that were made go until the next start."""
        try:
            if not any(network.held for network in self._networks.values()):
                for network in self._networks.values():
                    await self._run(self._drop_parent, network.record)
        except OSError as error:
            raise as_error(error, f"cannot remove the links of {self.name} networks") from error
        finally:
            if self._host is not None:
                self._host.close()


def _bring_up(control: Netlink, index: int) -> None:
    """A macvlan whose MAC address is in use is refused: it may be that of a container's last run, whose namespace is on its
    way out. Raises OSError."""
    until = time.monotonic() + _GRACE_SECONDS
    while True:
        try:
            control.request(netlink.set_link(index, up=True))
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= until:
                raise
        time.sleep(_POLL_SECONDS)


def _alias(instance: str, record: Record) -> str:
    """The mark of a parent that was made for a network."""
    return f"dolium-{record.driver}:{instance}:{record.short}"
