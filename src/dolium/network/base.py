"""What the engine asks of a network: a sandbox's namespace before the launch, and its release after the end.

- an *endpoint* is a container's place in one network: addresses, link, published ports; a plain dict. The first one has the
  container's default route and its ports, and is stored in the record, with the further ones as ``others`` in it;
- a *prepared* network is an endpoint with the namespace it is in, as an fd that the launch joins. The namespace has no
  name in any file system: when the last process and fd are gone, it and its links are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

Endpoint: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PortBinding:
    """One published port. ``host_port`` 0 asks for a free one, ``host_last`` above it for the first free one of a range;
    ``host_ip`` "" means every address."""

    container_port: int
    protocol: str  # tcp, udp
    host_ip: str = ""
    host_port: int = 0
    host_last: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a network as somebody wishes it. ``network``: a name or an id; ``mac``: "" for one made from the address;
    ``address``, ``address6`` (of IPv6): "" for the next free one; ``names``: what the container is called there, its own
    name first; ``bandwidth``: bytes a second that it may send, and be sent, by this network; 0 for no limit."""

    network: str
    address: str = ""
    mac: str = ""
    names: tuple[str, ...] = ()
    bandwidth: tuple[int, int] = (0, 0)
    address6: str = ""


@dataclass(frozen=True, slots=True)
class NetworkRequest:
    """``container``: full id; ``mode``, ``mac``, ``address``, ``address6``: the first network, as in ``Place``;
    ``others``: the further ones; ``ports``: what to publish; ``namespace``: an fd of the one to furnish, which stays the
    caller's, -1 for a new one: a user namespace's own is made with it; ``names``: in the first network, as in ``Place``;
    ``servers``: name servers that are asked about the world, None for the host's; ``egress``: what it may reach
    (network/egress.py), None for all; ``ingress``: what may reach it (network/ingress.py), None for all; ``bandwidth``: on
    each of its networks, as in ``Place``; ``own_stack``: its packets are not made by the namespace's kernel."""

    container: str
    mode: str
    ports: tuple[PortBinding, ...] = ()
    mac: str = ""
    address: str = ""
    namespace: int = -1
    others: tuple[Place, ...] = ()
    names: tuple[str, ...] = ()
    servers: tuple[str, ...] | None = None
    egress: tuple[str, ...] | None = None
    ingress: tuple[str, ...] | None = None
    bandwidth: tuple[int, int] = (0, 0)
    address6: str = ""
    own_stack: bool = False


@dataclass(slots=True)
class Prepared:
    """``fd`` is the network namespace (the receiver closes it); ``endpoint`` goes into the container's record:
    ``network network_id ip prefix gateway mac link ports`` (ports: ``[{container_port, protocol, host_ip, host_port}]``),
    ``names`` in a network of users' own, ``ip6 prefix6 gateway6`` in one with IPv6, and ``others``, a list of such,
    ``servers``, ``egress``, ``ingress`` and ``bandwidth``, when there are. The gateways are "" in an internal network."""

    fd: int
    endpoint: Endpoint = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """A packet that was not let out, to that address; ``incoming``: not let in, from it. ``port`` is the one it was for; 0:
    its protocol has none."""

    address: str
    protocol: str
    port: int
    incoming: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """What rules on who may reach a container know another one by."""

    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


Known: TypeAlias = Callable[[Endpoint], None]


def named(first: Endpoint) -> bool:
    """Has it a name server of ours: is one of its networks a user's own, where containers have names, or may it reach some
    alone?"""
    return "egress" in first or any("names" in endpoint for endpoint in endpoints(first))


def endpoints(first: Endpoint) -> list[Endpoint]:
    """All endpoints of a record's first one; none of a container that has no network of ours."""
    return [first, *(first.get("others") or [])] if first else []


class NetworkManager(Protocol):
    """All networks of one instance. Every kernel object it makes carries the instance's id. ``on_refused`` is told, on the
    loop, of a packet that a container was not let send or receive; ``peer_of`` says what a container, by its id, is called,
    and its labels."""

    on_refused: Callable[[str, Refused], None]
    peer_of: Callable[[str], Peer]

    async def start(self, live: dict[str, Endpoint], namespace_of: Callable[[str], int] | None = None) -> None:
        """Bring kernel and records together: ``live`` has the endpoint of every container that still runs; all else
        of this instance is removed. ``namespace_of``: opens the namespace of one of them; raises OSError."""

    async def prepare(self, request: NetworkRequest, known: Known | None = None) -> Prepared:
        """Make a namespace with its loopback up and its links, addresses, routes and ports in place. ``known`` is called
        with the endpoint as soon as it is decided, before the kernel is asked for it, where it is decided then.

        Raises NotFound, ResourceExhausted (no address or port left), AlreadyExists (``port is already allocated``),
        InvalidArgument. A failure leaves nothing behind.
        """

    async def release(self, container: str, endpoint: Endpoint) -> None:
        """Give back addresses and ports; idempotent. The links go with their namespace."""

    async def connect(self, container: str, place: Place, namespace: int, first: Endpoint,
                      ports: tuple[PortBinding, ...] = ()) -> Endpoint:
        """One more network for a container that runs: ``first`` is its endpoint. Returns what takes that one's place:
        the same, or the new one, with the default route and ``ports``, when there was no way out. Raises as ``prepare``, and
        PermissionDenied."""

    async def disconnect(self, container: str, network: str, namespace: int, first: Endpoint) -> Endpoint:
        """Out of a network, by name; what takes ``first``'s place, with its default route and ports; {} when it was the last
        one. Raises NotFound."""

    async def publish(self, container: str, first: Endpoint, ports: tuple[PortBinding, ...]) -> Endpoint:
        """More ports of a container that runs; what takes ``first``'s place. Raises as ``prepare``, and FailedPrecondition
        when it has no network with a way out."""

    async def withdraw(self, container: str, first: Endpoint, ports: tuple[PortBinding, ...]) -> Endpoint:
        """Ports are published no more: those with the container's port and protocol, and the host's address and port where
        they are given. What takes ``first``'s place. Raises NotFound."""

    async def rename(self, container: str, first: Endpoint, old: str, new: str) -> None:
        """A container that runs has another name."""

    async def create(self, wish: dict[str, Any]) -> str:
        """A new network, by Docker's object; its id. Raises AlreadyExists, InvalidArgument, PermissionDenied,
        Unimplemented, ResourceExhausted."""

    async def remove(self, reference: str) -> str:
        """Remove a network that no container is in; its name. Raises NotFound, PermissionDenied."""

    def find(self, reference: str) -> dict[str, Any]:
        """Docker's object of a network: by id, name, or the beginning of the id. Raises NotFound, InvalidArgument."""

    def describe(self) -> list[dict[str, Any]]:
        """Docker's network objects: Id, Name, Driver, Scope, IPAM, Options."""

    async def close(self) -> None:
        """Drop what is prepared and unused; networks of live containers stay."""
