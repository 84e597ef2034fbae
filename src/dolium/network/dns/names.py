"""Pure: who is called what. Each network has names of its own; a container sees those of the networks it is in."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dolium.network.dns import wire
from dolium.network.dns.wire import Found, Query


@dataclass(frozen=True, slots=True)
class Entry:
    """A container in a network. ``names``: all that it is called there, the first one in answers to look-ups by address;
    ``address6``: "" without IPv6."""

    container: str
    names: tuple[str, ...]
    address: str
    address6: str = ""


@dataclass(slots=True)
class Zone:
    """One network's. ``name``: what may follow a container's name, after a dot."""

    name: str
    entries: dict[str, Entry] = field(default_factory=dict)


class Names:
    """All networks. Names are compared without their case."""

    def __init__(self, shuffle: Callable[[list[str]], None] = random.shuffle) -> None:
        self._zones: dict[str, Zone] = {}
        self._shuffle = shuffle

    def put(self, network: str, network_name: str, entry: Entry) -> None:
        """Insert or replace a container's entry in a network."""
        zone = self._zones.setdefault(network, Zone(network_name.lower()))
        zone.entries[entry.container] = replace(entry, names=tuple(name.lower() for name in entry.names))

    def drop(self, container: str) -> None:
        """Out of all networks; idempotent."""
        for identity, zone in list(self._zones.items()):
            zone.entries.pop(container, None)
            if not zone.entries:
                del self._zones[identity]

    def containers(self) -> set[str]:
        """All that have an entry."""
        return {container for zone in self._zones.values() for container in zone.entries}

    def addresses(self, networks: Sequence[str], name: str) -> list[str]:
        """Of all containers of this name in these networks, of both families, in an order of chance; [] for none."""
        name, found = name.lower(), []
        for network in networks:
            zone = self._zones.get(network)
            if zone is not None:
                bare = name.removesuffix(f".{zone.name}")
                found += [address for entry in zone.entries.values() if name in entry.names or bare in entry.names
                          for address in (entry.address, entry.address6) if address]
        found = list(dict.fromkeys(found))
        self._shuffle(found)
        return found

    def name_of(self, networks: Sequence[str], address: str) -> list[str]:
        """What look-ups by address say: the container's name and the network's."""
        return [f"{entry.names[0]}.{zone.name}" for network in networks if (zone := self._zones.get(network)) is not None
                for entry in zone.entries.values() if address in (entry.address, entry.address6) and entry.names]

    def look_up(self, networks: Sequence[str], query: Query) -> Found | None:
        """What a question is to be told; None when the name, or the address that it stands for, is not known."""
        address = wire.reverse_of(query.name)
        if address:
            names = self.name_of(networks, address)
            if not names:
                return None
            return Found(names=tuple(names) if query.kind in (wire.PTR, wire.ANY) else ())
        addresses = self.addresses(networks, query.name)
        if not addresses:
            return None
        return Found(tuple(address for address in addresses
                           if query.kind in (wire.ANY, wire.AAAA if ":" in address else wire.A)))
