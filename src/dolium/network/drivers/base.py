"""What the manager asks of a kind of network. The contracts are those of ``network.base.NetworkManager``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Protocol

from dolium.network.antispoof import Sources
from dolium.network.base import Endpoint, Place, PortBinding
from dolium.network.ports import Published
from dolium.network.records import Record

Row = dict[str, Any]


class Rows(Protocol):
    """The database, as this room uses it: documents by table and name."""

    def rows(self, table: str) -> list[Row]:
        """All documents of a table."""

    def put_row(self, table: str, name: str, doc: Row) -> None:
        """Insert or replace by name."""

    def delete_row(self, table: str, name: str) -> None:
        """Idempotent."""


@dataclass(frozen=True, slots=True)
class Others:
    """The subnets of other drivers' networks: of IPv4, of IPv6."""

    subnets: Callable[[], list[IPv4Network]]
    subnets6: Callable[[], list[IPv6Network]]


class Driver(Protocol):
    """One kind of network, with all its networks. First an endpoint is reserved, which blocks nothing, then it is made.
    What is made runs to its end: it is not cancelled. A failure leaves what is reserved to ``release``."""

    name: str
    publishes: bool
    """Can ports of the host lead to its containers, and change while they run?"""
    late: bool
    """Is an endpoint's address known only when it has been made?"""

    async def start(self, records: Sequence[Record], live: dict[str, list[Endpoint]]) -> None:
        """Kernel and records are brought together; ``live`` has endpoints of this driver alone."""

    def reserve(self, container: str, place: Place) -> Endpoint:
        """A container's place in a network, by the network's name."""

    def publish(self, container: str, endpoint: Endpoint, ports: Sequence[PortBinding]) -> None:
        """Reserve ports of the host for it, and write them into it."""

    async def make(self, container: str, endpoint: Endpoint, namespace: int) -> int:
        """A namespace with this endpoint in it, as an fd; or in a namespace that is given and has nothing yet."""

    async def join(self, container: str, endpoint: Endpoint, namespace: int, *, default: bool, default6: bool) -> None:
        """This endpoint too, in a namespace that has others; ``default``, ``default6``: with the default route of IPv4, of
        IPv6."""

    async def expose(self, container: str, endpoint: Endpoint) -> None:
        """Open the ports that were published since it was made."""

    async def withdraw(self, container: str, endpoint: Endpoint, ports: Sequence[Published]) -> None:
        """Ports that are published no more; ``endpoint`` says so, too."""

    async def leave(self, container: str, endpoint: Endpoint, namespace: int) -> None:
        """Out of a namespace (an fd) that goes on living; then as ``release``."""

    async def release(self, container: str, endpoint: Endpoint) -> None:
        """Give all back; idempotent."""

    async def create(self, record: Record) -> Record:
        """A new network; the record, completed."""

    async def remove(self, name: str) -> None:
        """A network nobody is in. Raises FailedPrecondition."""

    def describe(self, name: str) -> dict[str, Any]:
        """What differs from network to network in Docker's object: Created, IPAM, Containers, Options."""

    def subnets(self) -> list[IPv4Network]:
        """Of all its networks that can be used."""

    def subnets6(self) -> list[IPv6Network]:
        """As ``subnets``, of those with IPv6."""

    def sources(self, name: str) -> Sources | None:
        """The host's links of a network's containers; None where a container has none of its own there."""

    async def close(self) -> None:
        """Drop what is unused."""
