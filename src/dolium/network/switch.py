"""The bridge in the kernel: made or adopted, links plugged in and swept up. Everything here blocks; nothing is awaited.

Every object carries the instance's id: the bridge and the host ends of used pairs in their ifalias
(``dolium:INSTANCE[:CONTAINER]``), unused pairs in their name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from dolium import faults
from dolium.errors import AlreadyExists, DoliumError, FailedPrecondition, Internal, PermissionDenied, ResourceExhausted
from dolium.network import ipv6, netlink
from dolium.network.addresses import choose_subnet, mac_for
from dolium.network.ipv6 import Six
from dolium.network.netlink import Link, Netlink
from dolium.network.pool import Slot, prefix, spare_name, write

_log = logging.getLogger(__name__)
faults.register("network.bridge.made", "network.bridge.ready", "network.link.plugged", "network.link.configured",
                "network.link.removed")
_IPV4 = "/proc/sys/net/ipv4"
_IPV6 = "/proc/sys/net/ipv6/conf"
_FORWARD = f"{_IPV4}/ip_forward"
_CHOOSING = "\0dolium-choosing-a-subnet"
_CHOOSING_SECONDS = 5.0
_POLL_SECONDS, _GONE_SECONDS = 0.005, 0.0002


def link_name(container: str) -> str:
    """The host end of a container's pair."""
    return f"dv{container[:10]}"


@contextlib.contextmanager
def choosing() -> Iterator[None]:
    """One instance at a time looks for a free subnet and takes it. The lock is a name of this network namespace, and
    goes with its owner; who only holds it back is waited for a few seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        until = time.monotonic() + _CHOOSING_SECONDS
        while True:
            try:
                lock.bind(_CHOOSING)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if time.monotonic() < until:
                    time.sleep(_POLL_SECONDS)
                    continue
                _log.warning("another instance has been choosing a subnet for %g s: not waiting", _CHOOSING_SECONDS)
            break
        yield


def as_error(error: OSError, what: str) -> DoliumError:
    """The kernel's refusal, as one of the closed set."""
    text = f"{what}: {error.strerror or error}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return PermissionDenied(text, hint="CAP_NET_ADMIN and CAP_SYS_ADMIN are needed", errno=error.errno)
    if error.errno == errno.EXFULL:
        return ResourceExhausted(text, hint="a bridge has at most 1024 ports", errno=error.errno)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ENOBUFS):
        return ResourceExhausted(text, errno=error.errno)
    return Internal(text, errno=error.errno)


def owner(instance: str, link: Link) -> tuple[str, str] | None:
    """(container, network) of one of the instance's links, the network by the first 12 digits of its id, "" for the default;
    the container is "" for a bridge and for what is unused. None when it is not the instance's."""
    kind, _, rest = link.alias.partition(":")
    if kind == "dolium" and rest.partition(":")[0] == instance:
        container, _, network = rest.partition(":")[2].partition(":")
        return container, network
    return ("", "") if re.fullmatch(f"{prefix(instance)}[0-9a-f]{{4}}x", link.name) else None


def make_marked(host: Netlink, instance: str, message: Callable[[str], bytes], name: str, alias: str) -> Link:
    """A new link of the host, which at no moment is without a sign of whose it is: ``message`` makes one of a name, and name
    and alias are set in one. Raises OSError; then there is none."""
    first = spare_name(instance)
    host.request(message(first))
    made = host.link(name=first)
    if made is None:
        raise OSError(errno.ENODEV, f"the link {name} was removed while it was made")
    try:
        host.request(netlink.set_link(made.index, name=name, alias=alias))
    except OSError:
        host.request(netlink.delete_link(made.index))
        raise
    return replace(made, name=name, alias=alias)


def default_mtu(host: Netlink) -> int:
    """That of the link of the host's default route; 1500 without one."""
    links = {link.index: link for link in host.links()}
    found = next((links[route.link] for route in host.routes() if not route.network.prefixlen and route.link in links), None)
    return found.mtu if found is not None and found.mtu >= 576 else 1500


def remove_link(index: int) -> None:
    """Remove a link of this network namespace. Comes back when it is gone for everybody, with its addresses and routes,
    after a millisecond or two; the kernel goes on for tens of them (RCU, with the rtnl lock for a part of that), in a thread
    that nobody waits for, and also when this process is killed. Idempotent. Raises OSError."""
    failure: list[OSError] = []

    def work() -> None:
        try:
            host = Netlink()  # of its own: who shares one waits for the answer
            try:
                host.request(netlink.delete_link(index))
            finally:
                host.close()
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="link-removal")
    thread.start()
    while thread.is_alive():
        try:
            socket.if_indextoname(index)  # asks without the rtnl lock
        except OSError:
            return
        time.sleep(_GONE_SECONDS)
    if failure and failure[0].errno != errno.ENODEV:
        raise failure[0]


class Switch:
    """A network's bridge. ``network``: the first 12 digits of its id, "" for the default one; ``name``: of the link, made of
    that when it is not named. ``index`` is 0 before ``make``. Methods raise OSError where nothing else is said."""

    def __init__(self, instance: str, host: Netlink, network: str = "", name: str = "", mtu: int = 1500) -> None:
        self.instance, self.network, self.host = instance, network, host
        self.name = name or f"dol{network or instance}"
        self.alias = f"dolium:{instance}::{network}" if network else f"dolium:{instance}"
        self.index = 0
        self.mtu = mtu
        self._making = threading.Lock()

    @property
    def indices(self) -> set[int]:
        """Of all its own links."""
        return {self.index} if self.index else set()

    def link_name(self, container: str) -> str:
        """The host end of a container's pair."""
        if not self.network:
            return link_name(container)
        return f"dv{hashlib.sha256(f'{container}:{self.network}'.encode()).hexdigest()[:10]}"

    def _link_alias(self, container: str) -> str:
        return f"dolium:{self.instance}:{container}" + (f":{self.network}" if self.network else "")

    def plan(self, stored: IPv4Network | None, others: Iterable[IPv4Network], *, keep: bool) -> IPv4Network:
        """The subnet to use: the stored one, unless the host now routes it elsewhere; with ``keep`` in any case, since
        containers have addresses of it. ``others``: of the instance's other networks.

        Raises ResourceExhausted.
        """
        own = next((link.index for link in self.host.links() if link.name == self.name), 0)
        taken = [route.network for route in self.host.routes() if route.link != own and route.network.prefixlen]
        if stored is not None:
            if keep or not any(stored.overlaps(network) for network in taken):
                return stored
            _log.warning("the host routes %s by now: the bridge %s gets another subnet", stored, self.name)
        return choose_subnet([*taken, *others])

    def make(self, subnet: IPv4Network, gateway: IPv4Address, *, keep: bool, six: Six | None = None) -> None:
        """Make the bridge or adopt what is there, and bring it up with the gateway's address, and with that of IPv6. Raises
        AlreadyExists when a link that is not ours has its name, FailedPrecondition, Unimplemented."""
        with self._making:
            if six is not None:
                ipv6.check(self.name, self.mtu)
            self._make(subnet, gateway, keep, six)

    def _make(self, subnet: IPv4Network, gateway: IPv4Address, keep: bool, six: Six | None) -> None:
        found = self.host.link(name=self.name)
        if found is not None and self.network and found.alias != self.alias:
            raise AlreadyExists(f"the host has a link {self.name} that is not of this network",
                                hint="choose another com.docker.network.bridge.name")
        if found is not None and not keep:
            # a killed daemon's; no container is on it, and it may have another subnet's address
            self.delete(found.index)
            found = None
        if found is None:
            found = make_marked(self.host, self.instance, lambda name: netlink.new_bridge(name, self.mtu, mac_for(gateway)),
                                self.name, self.alias)
            faults.point("network.bridge.made")
        self.index = found.index
        if six is not None:
            ipv6.enable_on(self.name)
        elif os.path.isdir(f"{_IPV6}/{self.name}"):
            write(f"{_IPV6}/{self.name}/disable_ipv6", "1")
        write(f"{_IPV4}/conf/{self.name}/route_localnet", "1")
        self.host.request(netlink.set_link(self.index, mtu=self.mtu, up=True))
        for address in (netlink.new_address(self.index, gateway, subnet),
                        *([netlink.new_address6(self.index, six.address, six.subnet)] if six is not None else [])):
            try:
                self.host.request(address)
            except FileExistsError:
                _log.debug("the bridge %s has its address already", self.name)
        if six is not None:
            ipv6.wait_for(self.host, six.address)
        faults.point("network.bridge.ready")

    def sweep(self, live: Iterable[str]) -> dict[str, int]:
        """The indices of the live containers' links, plugged in again if they were not."""
        wanted = {self.link_name(container): container for container in live}
        found: dict[str, int] = {}
        for link in self.host.links():
            container = wanted.get(link.name)
            if container is None or owner(self.instance, link) != (container, self.network):
                continue
            found[container] = link.index
            if link.master != self.index or not link.up:
                self.host.request(netlink.set_link(link.index, master=self.index, up=True),
                                  netlink.set_hairpin(link.index))
        for name, container in wanted.items():
            if container not in found:
                _log.warning("container %s has lost its link %s", container[:12], name)
        return found

    def plug(self, slot: Slot, container: str, address: IPv4Address, subnet: IPv4Network, mac: str, *,
             gateway: IPv4Address | None, hairpin: bool, alone: bool = False, mtu: int = 0,
             bandwidth: Sequence[int] = (0, 0), six: Six | None = None) -> None:
        """Join a slot to the bridge and give it its address: two requests, one on each side of the pair. ``gateway``: of its
        default route, None for none; ``alone``: the other ports of the bridge cannot be reached; ``mtu``: 0 is the slot's;
        ``bandwidth``: bytes a second that it may send, and be sent; ``six``: its IPv6 address, where its link has IPv6.

        Raises FailedPrecondition when the link's name is another's.
        """
        name = self.link_name(container)
        outside = [netlink.set_link(slot.host, name=name, alias=self._link_alias(container), master=self.index, mtu=mtu,
                                    up=True)]
        if alone:
            outside.append(netlink.set_isolated(slot.host))
        if hairpin:
            outside.append(netlink.set_hairpin(slot.host))
        sent, received = bandwidth
        if received:  # what the host's end sends
            outside.append(netlink.limit_rate(slot.host, received))
        try:
            self.host.request(*outside)
        except FileExistsError:
            # the container was restarted, and the namespace of its last run is still on its way out
            self._move_aside(name, container)
            self.host.request(*outside)
        faults.point("network.link.plugged")
        slot.control.request(netlink.set_link(slot.inside, mac=mac, mtu=mtu, up=True),
                             netlink.new_address(slot.inside, address, subnet),
                             *([netlink.new_default_route(slot.inside, gateway)] if gateway is not None else []),
                             *(ipv6.messages(slot.inside, six) if six is not None else []),
                             *([netlink.limit_rate(slot.inside, sent)] if sent else []))
        if six is not None:
            ipv6.wait_for(slot.control, six.address)
            self._announce(mac, six.address)
        faults.point("network.link.configured")

    def _announce(self, mac: str, address: IPv6Address) -> None:
        """Another container may have had it, with another MAC address: the host forgets that, the others are told."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self.host.request(netlink.forget_neighbour(self.index, address))
            ipv6.announce(self.index, mac, address)
        except OSError as error:
            _log.warning("who had %s before may be sent its packets for some seconds: %s: %s", address, self.name, error)

    def _move_aside(self, name: str, container: str) -> None:
        link = self.host.link(name=name)
        if link is None:
            return
        if owner(self.instance, link) != (container, self.network):
            raise FailedPrecondition(f"the link {name} exists and is not of container {container[:12]}")
        spare = netlink.set_link(link.index, name=f"dx{secrets.token_hex(5)}")
        try:
            self.host.request(spare)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            if error.errno != errno.EBUSY:
                raise
            # before Linux 6.2 a link that is up keeps its name
            self.host.request(netlink.set_link(link.index, down=True), spare)

    def delete(self, index: int) -> None:
        """As ``remove_link``."""
        remove_link(index)
        faults.point("network.link.removed")

    def reap(self, indices: Iterable[int], *, seconds: float = 0.0) -> None:
        """Links that should go with their namespaces: wait so long, then remove what something still holds on to."""
        until = time.monotonic() + seconds
        for index in indices:
            while True:
                link = self.host.link(index=index)
                if link is None or owner(self.instance, link) is None:
                    break
                if time.monotonic() >= until:
                    self.delete(index)
                    break
                time.sleep(_POLL_SECONDS)

    def remove(self) -> None:
        """Remove the bridge. Idempotent."""
        if self.index:
            self.delete(self.index)
            self.index = 0


def enable_forwarding() -> bool:
    """Let the host forward IPv4; whether it did not before. Never turned off: others may have come to rely on it."""
    with open(_FORWARD) as file:
        if file.read().strip() == "1":
            return False
    write(_FORWARD, "1")
    return True
