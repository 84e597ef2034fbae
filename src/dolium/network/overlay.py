"""The bridge of an overlay: containers of several hosts on one network of layer 2, by VXLAN (RFC 7348).

The bridge has one port more, a VXLAN link, which sends what it knows no host for to all of them, and learns from what comes
where a MAC address is. Hosts are named by the network's options, and by a file that all of them can read. Nothing is
decided between them: each gives addresses of its own range, and is its containers' gateway.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from ipaddress import AddressValueError, IPv4Address, IPv4Network

from dolium import faults
from dolium.errors import FailedPrecondition
from dolium.network import netlink
from dolium.network.ipv6 import Six
from dolium.network.netlink import Netlink
from dolium.network.pool import write
from dolium.network.records import VXLAN_PORT, Record
from dolium.network.switch import Switch, make_marked

_log = logging.getLogger(__name__)
HEADERS = 50
"""Bytes that VXLAN takes of each packet of the network below."""
_LARGEST = 1 << 20
_IPV6 = "/proc/sys/net/ipv6/conf"
faults.register("network.vxlan.made")


class Overlay(Switch):
    """``Switch``, with the VXLAN link."""

    def __init__(self, instance: str, host: Netlink, record: Record, mtu: int) -> None:
        super().__init__(instance, host, record.short, mtu=record.mtu or mtu - HEADERS)
        self.wire = f"dw{record.short}"
        self._record = record
        self._wire_index = 0
        self._file_peers: set[IPv4Address] = set()
        self._said = ""

    @property
    def peers_file(self) -> str:
        """Where further hosts are named, and may change; ""."""
        return self._record.options.get("peers_file", "")

    @property
    def indices(self) -> set[int]:
        return super().indices | ({self._wire_index} if self._wire_index else set())

    def _make(self, subnet: IPv4Network, gateway: IPv4Address, keep: bool, six: Six | None) -> None:
        super()._make(subnet, gateway, keep, six)
        found = self.host.link(name=self.wire)
        if found is None:
            local = self._record.options.get("local")
            port = int(self._record.options.get("port") or VXLAN_PORT)
            data = netlink.vxlan_data(self._record.vni, port, IPv4Address(local) if local else None)
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

    def sync(self) -> None:
        """The hosts are those of the options and of the file; one that cannot be read leaves them as they are. Blocks.
        Raises OSError."""
        wanted = {peer for peer in {*self._record.peers, *self._in_file()} if not _is_here(peer)}
        there = self.host.flooded(self._wire_index)
        for peer in wanted - there:
            self.host.request(netlink.flood_to(self._wire_index, peer))
        for peer in there - wanted:
            self.host.request(netlink.flood_to(self._wire_index, peer, remove=True))
        if wanted != there:
            _log.info("network %s: its other hosts are %s", self._record.name, ", ".join(map(str, sorted(wanted))) or "none")

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
        if self._wire_index:
            self.delete(self._wire_index)
            self._wire_index = 0
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
