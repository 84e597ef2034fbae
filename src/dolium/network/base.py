"""What the engine asks of a network: a sandbox's namespace before the launch, and its release after the end.

- an *endpoint* is a container's place in a network: addresses, link, published ports; stored as a plain dict;
- a *prepared* network is an endpoint with the namespace it is in, as an fd that the launch joins. The namespace has no
  name in any file system: when the last process and fd are gone, it and its links are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias


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
class NetworkRequest:
    """``container``: full id; ``mode``: none, bridge; ``ports``: what to publish; ``mac``: "" for one made from the
    address; ``address``: "" for the next free one; ``namespace``: an fd of the one to furnish, which stays the
    caller's, -1 for a new one: a user namespace's own is made with it."""

    container: str
    mode: str
    ports: tuple[PortBinding, ...] = ()
    mac: str = ""
    address: str = ""
    namespace: int = -1


@dataclass(slots=True)
class Prepared:
    """``fd`` is the network namespace (the receiver closes it); ``endpoint`` goes into the container's record:
    ``network ip prefix gateway mac link ports`` (ports: ``[{container_port, protocol, host_ip, host_port}]``)."""

    fd: int
    endpoint: dict[str, Any] = field(default_factory=dict)


Known: TypeAlias = Callable[[dict[str, Any]], None]


class NetworkManager(Protocol):
    """All networks of one instance. Every kernel object it makes carries the instance's id."""

    async def start(self, live: dict[str, dict[str, Any]]) -> None:
        """Bring kernel and records together: ``live`` has the endpoint of every container that still runs; all else
        of this instance is removed."""

    async def prepare(self, request: NetworkRequest, known: Known | None = None) -> Prepared:
        """Make a namespace with its loopback up and its link, address, routes and ports in place. ``known`` is called with
        the endpoint as soon as it is decided, before the kernel is asked for it.

        Raises ResourceExhausted (no address or port left), AlreadyExists (``port is already allocated``),
        InvalidArgument. A failure leaves nothing behind.
        """

    async def release(self, container: str, endpoint: dict[str, Any]) -> None:
        """Give back address and ports; idempotent. The link goes with its namespace."""

    def describe(self) -> list[dict[str, Any]]:
        """Docker's network objects: Id, Name, Driver, Scope, IPAM, Options."""

    async def close(self) -> None:
        """Drop what is prepared and unused; networks of live containers stay."""
