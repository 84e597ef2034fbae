"""The bridge of an overlay: containers of several hosts on one network of layer 2, by VXLAN (RFC 7348).

The bridge has one port more, a VXLAN link, which sends what it knows no host for to all of them, and learns from what comes
where a MAC address is. Hosts are named by the network's options, and by a file that all of them can read. Nothing is
decided between them: each gives addresses of its own range, and is its containers' gateway.

An encrypted one has a WireGuard link below (wireguard.py), and its VXLAN link goes by the link-local addresses of that: what
comes by another link, from who knows the number alone, the kernel does not take for it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dolium import faults
from dolium.errors import FailedPrecondition, Unimplemented
from dolium.network import netlink, wireguard
from dolium.network.dns.across import Across
from dolium.network.ipv6 import Six
from dolium.network.netlink import Host, Netlink
from dolium.network.pool import write
from dolium.network.records import VXLAN_PORT, Record
from dolium.network.switch import Switch, make_marked
from dolium.network.wireguard import Peer

_log = logging.getLogger(__name__)
HEADERS, HEADERS6 = 50, 70
"""Bytes that VXLAN takes of each packet of the network below, by IPv4 and by IPv6."""
_LINK_LOCAL = IPv6Network("fe80::/64")
_LARGEST = 1 << 20
_IPV6 = "/proc/sys/net/ipv6/conf"
faults.register("network.vxlan.made", "network.tunnel.made")


class Overlay(Switch):
    """``Switch``, with the VXLAN link."""

    def __init__(self, instance: str, host: Netlink, record: Record, mtu: int) -> None:
        taken = HEADERS6 + wireguard.HEADERS if record.encrypted else HEADERS
        super().__init__(instance, host, record.short, mtu=record.mtu or mtu - taken)
        self.wire, self.tunnel = f"dw{record.short}", f"dg{record.short}"
        self._below = mtu - wireguard.HEADERS
        self._record = record
        self._wire_index = self._tunnel_index = 0
        self._secret, self._key = b"", wireguard.Key(b"", b"", IPv6Address(0))
        self._peers: dict[IPv4Address, Peer] | None = None  # as the tunnel knows them
        self._file_peers: set[IPv4Address] = set()
        self._said = ""
        self.across: Across | None = None
        """How the names of its other hosts' containers are asked for; None where nobody is."""

    @property
    def peers_file(self) -> str:
        """Where further hosts are named, and may change; ""."""
        return self._record.options.get("peers_file", "")

    @property
    def indices(self) -> set[int]:
        return super().indices | {index for index in (self._wire_index, self._tunnel_index) if index}

    def _make(self, subnet: IPv4Network, gateway: IPv4Address, keep: bool, six: Six | None) -> None:
        if self._record.encrypted:
            self._secret = wireguard.read_secret(self._record.options["key_file"])  # before anything is made
            self._key = wireguard.key_of(self._secret, self._record.vni, IPv4Address(self._record.options["local"]))
        super()._make(subnet, gateway, keep, six)
        local = self._record.options.get("local")
        own: Host | None = IPv4Address(local) if local else None
        port = self._record.tunnel_port
        if self._record.encrypted:
            own, port = self._make_tunnel(), VXLAN_PORT
        found = self.host.link(name=self.wire)
        if found is None:
            data = netlink.vxlan_data(self._record.vni, port, own, self._tunnel_index)
            try:
                found = make_marked(self.host, self.instance, lambda name: netlink.new_child(name, 0, "vxlan", data=data),
                                    self.wire, self.alias)
            except FileExistsError as error:
                raise FailedPrecondition(f"network {self._record.name}: the host has a VXLAN {self._record.vni} on port "
                                         f"{port} already", hint="another -o vni=, the same on all hosts") from error
            faults.point("network.vxlan.made")
        if os.path.isdir(f"{_IPV6}/{self.wire}"):
            write(f"{_IPV6}/{self.wire}/disable_ipv6", "1")
        self._wire_index = found.index
        self.host.request(netlink.set_link(found.index, mtu=self.mtu, master=self.index, up=True))
        self.sync()

    def _make_tunnel(self) -> IPv6Address:
        """The WireGuard link; this host's address on it."""
        found = self.host.link(name=self.tunnel)
        if found is None:
            try:
                found = make_marked(self.host, self.instance, lambda name: netlink.new_child(name, 0, "wireguard"),
                                    self.tunnel, self.alias)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP and netlink.UNKNOWN_KIND in (error.strerror or ""):
                    raise Unimplemented(f"network {self._record.name}: this kernel has no WireGuard, by which an overlay is "
                                        "encrypted", errno=error.errno) from error
                raise
            faults.point("network.tunnel.made")
        self._tunnel_index, self._peers = found.index, None
        if not os.path.isdir(f"{_IPV6}/{self.tunnel}"):
            raise FailedPrecondition(f"network {self._record.name}: this kernel runs without IPv6, by which the tunnels' "
                                     "ends have addresses", hint="take ipv6.disable=1 off the kernel's command line")
        write(f"{_IPV6}/{self.tunnel}/disable_ipv6", "0")
        self.host.request(netlink.set_link(found.index, mtu=self._below, up=True))
        try:
            self.host.request(netlink.new_address6(found.index, self._key.address, _LINK_LOCAL))
        except FileExistsError:
            _log.debug("the tunnel %s has its address already", self.tunnel)
        return self._key.address

    def _connect(self, hosts: set[IPv4Address]) -> set[Host]:
        """Tell WireGuard who the other hosts are, when it is not what it knows; their addresses within."""
        if self._peers is None or self._peers.keys() != hosts:
            known, number = self._peers or {}, self._record.vni
            peers = {host: known.get(host) or wireguard.peer_of(self._secret, number, host) for host in hosts}
            port = self._record.tunnel_port
            try:
                wireguard.configure(self._tunnel_index, self._key, port,
                                    [peer for host, peer in peers.items() if host not in known],
                                    None if self._peers is None else [known[host] for host in known.keys() - hosts])
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise FailedPrecondition(f"network {self._record.name}: UDP port {port} of the host is in use",
                                         hint="another -o port=, the same on all hosts", errno=error.errno) from error
            self._peers = peers
        return {peer.address for peer in self._peers.values()}

    def sync(self) -> None:
        """The hosts are those of the options and of the file; one that cannot be read leaves them as they are. Blocks.
        Raises OSError."""
        named = {*self._record.peers, *self._in_file()}
        hosts = {peer for peer in named if not _is_here(peer)}
        wanted: set[Host] = self._connect(hosts) if self._record.encrypted else {*hosts}
        there = self.host.flooded(self._wire_index)
        for peer in wanted - there:
            self.host.request(netlink.flood_to(self._wire_index, peer, link=self._tunnel_index))
        for peer in there - wanted:
            self.host.request(netlink.flood_to(self._wire_index, peer, link=self._tunnel_index, remove=True))
        if wanted != there:
            _log.info("network %s: its other hosts are %s", self._record.name, ", ".join(map(str, sorted(hosts))) or "none")
        self.across = self._names_across(hosts, named - hosts)

    def _names_across(self, hosts: set[IPv4Address], own: set[IPv4Address]) -> Across | None:
        """``own``: this host's addresses among those that the network names."""
        record = self._record
        if not hosts or not record.names_port:
            return None
        there, here, link = [str(host) for host in sorted(hosts)], {str(address) for address in own}, 0
        if self._peers is not None:
            there, here = [str(self._peers[host].address) for host in sorted(hosts)], {str(self._key.address)}
            link = self._tunnel_index
        elif record.options.get("local"):
            here = {record.options["local"]}
        elif not here:
            here = {address for host in hosts if (address := _way_to(host))}
        return Across(record.name, record.vni, record.names_port, tuple(sorted(here)), tuple(there),
                      tuple(filter(None, (record.subnet, record.subnet6))), link)

    def _in_file(self) -> set[IPv4Address]:
        path = self.peers_file
        if not path:
            return set()
        try:
            self._file_peers = read_peers(path)
            self._said = ""
        except (OSError, ValueError) as error:
            if str(error) != self._said:
                _log.warning("network %s: the hosts in %s: %s; they stay as they were", self._record.name, path, error)
            self._said = str(error)
        return self._file_peers

    def remove(self) -> None:
        """Remove bridge and VXLAN link. Idempotent."""
        for index in (self._wire_index, self._tunnel_index):
            if index:
                self.delete(index)
        self._wire_index = self._tunnel_index = 0
        self.across = None
        super().remove()


def read_peers(path: str) -> set[IPv4Address]:
    """The addresses in a file, one a line; what follows ``#`` is passed over. Raises OSError, ValueError."""
    with open(path) as file:
        text = file.read(_LARGEST)
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].strip()
        if word:
            try:
                found.add(IPv4Address(word))
            except AddressValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return found


def _way_to(host: IPv4Address) -> str:
    """The address by which this host sends there; "" without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((str(host), VXLAN_PORT))
        except OSError as error:
            _log.debug("no way to %s: %s", host, error)
            return ""
        return str(sock.getsockname()[0])


def _is_here(address: IPv4Address) -> bool:
    """Is it this host's own?"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return False
    return True
