"""Pure: which subnet a bridge gets, and which address of it a container."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import AddressValueError, IPv4Address, IPv4Network

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


class AddressPool:
    """Addresses of one subnet. The next one follows the last one given, so that an address comes back only after all others
    had their turn (neighbours' ARP entries, connections under way)."""

    def __init__(self, subnet: IPv4Network, *, gateway: IPv4Address | None = None, within: IPv4Network | None = None,
                 reserved: Iterable[IPv4Address] = ()) -> None:
        """``subnet`` has a prefix length of at most 30; ``gateway``: its first host when it is not named; ``within``: where
        those come from that nobody asked for by name; ``reserved``: never given."""
        self.subnet = subnet
        self.gateway = gateway or subnet.network_address + 1
        self._hosts = range(int(subnet.network_address) + 1, int(subnet.broadcast_address))
        pool = subnet if within is None else within
        self._pool = range(max(int(pool.network_address), self._hosts.start),
                           min(int(pool.broadcast_address) + 1, self._hosts.stop))
        self._reserved = {int(self.gateway), *map(int, reserved)}
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
        return len(self._pool) - sum(1 for number in self._reserved if number in self._pool)

    def allocate(self, wanted: str = "") -> IPv4Address:
        """The next free address, or the one that is wanted.

        Raises ResourceExhausted when none is left, InvalidArgument for an address that is no host's of this subnet,
        AlreadyExists for one in use.
        """
        if wanted:
            number = self._parse(wanted)
            if number in self._used:
                raise AlreadyExists(f"Address already in use: {wanted}")
        else:
            if self._inside >= self.capacity:
                raise ResourceExhausted(f"no available IPv4 addresses on this network's address pool: {self.subnet}")
            number = self._next
            while number in self._used or number in self._reserved:
                number = self._after(number)
            self._next = self._after(number)
        self._take(number)
        return IPv4Address(number)

    def _take(self, number: int) -> None:
        self._used.add(number)
        self._inside += number in self._pool

    def _after(self, number: int) -> int:
        return number + 1 if number + 1 in self._pool else self._pool.start

    def _parse(self, text: str) -> int:
        try:
            number = int(IPv4Address(text))
        except AddressValueError as error:
            raise InvalidArgument(f"invalid IPv4 address: {text!r}") from error
        if number not in self._hosts or number in self._reserved:
            raise InvalidArgument(f"{text} is not an address for a container on {self.subnet}")
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

    def release(self, address: IPv4Address) -> None:
        """Idempotent."""
        if int(address) in self._used:
            self._used.remove(int(address))
            self._inside -= int(address) in self._pool
