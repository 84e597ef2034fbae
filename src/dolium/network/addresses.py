"""Pure: which subnet a bridge gets, and which address of it a container."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

from dolium.errors import AlreadyExists, InvalidArgument, ResourceExhausted

_MAC = re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}")


def candidates() -> Iterator[IPv4Network]:
    """The subnets a bridge may have, best first: Docker's own defaults, without 172.17, which a Docker here has."""
    for second in range(18, 32):
        yield IPv4Network((f"172.{second}.0.0", 16))
    for third in range(0, 256, 16):
        yield IPv4Network((f"192.168.{third}.0", 20))


def choose_subnet(taken: Iterable[IPv4Network]) -> IPv4Network:
    """The first candidate that overlaps none of the routed networks; default routes do not count.

    Raises ResourceExhausted when all are taken.
    """
    networks = [network for network in taken if network.prefixlen]
    for subnet in candidates():
        if not any(subnet.overlaps(network) for network in networks):
            return subnet
    raise ResourceExhausted("no subnet is left for the bridge: the host routes all of 172.18-31 and 192.168")


def choose_subnet6(instance: str, taken: Iterable[IPv6Network]) -> IPv6Network:
    """A /64 of the instance's own /48 of unique local addresses (RFC 4193), whose 40 bits are made of its id: the first
    that overlaps none of the routed networks. Raises ResourceExhausted."""
    prefix = b"\xfd" + hashlib.sha256(f"dolium {instance}".encode()).digest()[:5]
    own = IPv6Network((prefix + bytes(10), 48))
    networks = [network for network in taken if network.prefixlen and network.overlaps(own)]
    if not any(own.subnet_of(network) for network in networks):
        for number in range(1 << 16):
            subnet = IPv6Network((prefix + number.to_bytes(2, "big") + bytes(8), 64))
            if not any(subnet.overlaps(network) for network in networks):
                return subnet
    raise ResourceExhausted(f"no IPv6 subnet is left of {own}")


def mac_for(address: IPv4Address) -> str:
    """Docker's rule: locally administered 02:42, then the address."""
    return "02:42:" + ":".join(f"{byte:02x}" for byte in address.packed)


def check_mac(text: str) -> str:
    """A unicast MAC address in lower case. Raises InvalidArgument."""
    if not _MAC.fullmatch(text):
        raise InvalidArgument(f"invalid MAC address: {text!r}")
    if int(text[:2], 16) & 1 or int(text.replace(":", ""), 16) == 0:
        raise InvalidArgument(f"{text} is not a unicast MAC address")
    return text.lower()


class _Numbers:
    """Addresses of one subnet, as numbers. The next one follows the last one given, so that an address comes back only after
    all others had their turn (neighbours' ARP entries, connections under way)."""

    def __init__(self, subnet: IPv4Network | IPv6Network, hosts: range, within: IPv4Network | IPv6Network | None,
                 reserved: Iterable[int], read: Callable[[str], int]) -> None:
        """``read``: an address that is written out, as a number; raises AddressValueError."""
        self._subnet, self._hosts, self._read, self.kind = subnet, hosts, read, f"IPv{subnet.version}"
        pool = subnet if within is None else within
        self._pool = range(max(int(pool.network_address), hosts.start), min(int(pool.broadcast_address) + 1, hosts.stop))
        self._reserved = set(reserved)
        self._used: set[int] = set()
        self._inside = 0  # of those in use, how many are of the pool
        self._next = self._pool.start
        while self._next in self._reserved and self._next + 1 in self._pool:
            self._next += 1

    def __len__(self) -> int:
        """How many are in use, without the gateway."""
        return len(self._used)

    @property
    def capacity(self) -> int:
        """How many can be given to those who do not ask for one by name."""
        # a range of more than 2^63 has no len()
        return self._pool.stop - self._pool.start - sum(1 for number in self._reserved if number in self._pool)

    def _allocate(self, wanted: str) -> int:
        if wanted:
            number = self._parse(wanted)
            if number in self._used:
                raise AlreadyExists(f"Address already in use: {wanted}")
        else:
            if self._inside >= self.capacity:
                raise ResourceExhausted(f"no available {self.kind} addresses on this network's address pool: {self._subnet}")
            number = self._next
            while number in self._used or number in self._reserved:
                number = self._after(number)
            self._next = self._after(number)
        self._take(number)
        return number

    def _take(self, number: int) -> None:
        self._used.add(number)
        self._inside += number in self._pool

    def _after(self, number: int) -> int:
        return number + 1 if number + 1 in self._pool else self._pool.start

    def _parse(self, text: str) -> int:
        try:
            number = self._read(text)
        except AddressValueError as error:
            raise InvalidArgument(f"invalid {self.kind} address: {text!r}") from error
        if number not in self._hosts or number in self._reserved:
            raise InvalidArgument(f"{text} is not an address for a container on {self._subnet}")
        return number

    def adopt(self, address: str) -> bool:
        """Take one that a container already has; False when it is not one of this subnet, or another has it."""
        try:
            number = self._parse(address)
        except InvalidArgument:
            return False
        if number in self._used:
            return False
        self._take(number)
        if number in self._pool and number >= self._next:
            self._next = self._after(number)
        return True

    def release(self, address: IPv4Address | IPv6Address) -> None:
        """Idempotent."""
        if int(address) in self._used:
            self._used.remove(int(address))
            self._inside -= int(address) in self._pool


class AddressPool(_Numbers):
    """Of an IPv4 subnet."""

    def __init__(self, subnet: IPv4Network, *, gateway: IPv4Address | None = None, within: IPv4Network | None = None,
                 reserved: Iterable[IPv4Address] = ()) -> None:
        """``subnet`` has a prefix length of at most 30; ``gateway``: its first host when it is not named; ``within``: where
        those come from that nobody asked for by name; ``reserved``: never given."""
        self.subnet = subnet
        self.gateway = gateway or subnet.network_address + 1
        super().__init__(subnet, range(int(subnet.network_address) + 1, int(subnet.broadcast_address)), within,
                         map(int, (self.gateway, *reserved)), lambda text: int(IPv4Address(text)))

    def allocate(self, wanted: str = "") -> IPv4Address:
        """The next free address, or the one that is wanted.

        Raises ResourceExhausted when none is left, InvalidArgument for an address that is no host's of this subnet,
        AlreadyExists for one in use.
        """
        return IPv4Address(self._allocate(wanted))


def _number6(text: str) -> int:
    if "%" in text:  # its scope says a link of the host
        raise AddressValueError(text)
    return int(IPv6Address(text))


class AddressPool6(_Numbers):
    """Of an IPv6 subnet: its first address is all routers' (RFC 4291, 2.6.1), its last one a host's."""

    def __init__(self, subnet: IPv6Network, *, gateway: IPv6Address | None = None, within: IPv6Network | None = None,
                 reserved: Iterable[IPv6Address] = ()) -> None:
        """As ``AddressPool``; ``subnet`` has a prefix length of at most 126."""
        self.subnet = subnet
        self.gateway = gateway or subnet.network_address + 1
        super().__init__(subnet, range(int(subnet.network_address) + 1, int(subnet.broadcast_address) + 1), within,
                         map(int, (self.gateway, *reserved)), _number6)

    def allocate(self, wanted: str = "") -> IPv6Address:
        """As ``AddressPool.allocate``."""
        return IPv6Address(self._allocate(wanted))
