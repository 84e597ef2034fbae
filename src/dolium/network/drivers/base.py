"""What the manager asks of a kind of network. The contracts are those of ``network.base.NetworkManager``."""

from __future__ import annotations

from typing import Any, Protocol

from dolium.network.base import Known, NetworkRequest, Prepared

Row = dict[str, Any]


class Rows(Protocol):
    """The database, as this room uses it: documents by table and name."""

    def rows(self, table: str) -> list[Row]:
        """All documents of a table."""

    def put_row(self, table: str, name: str, doc: Row) -> None:
        """Insert or replace by name."""

    def delete_row(self, table: str, name: str) -> None:
        """Idempotent."""


class Driver(Protocol):
    """``name`` is the network's own and its driver's."""

    name: str

    async def start(self, live: dict[str, dict[str, Any]]) -> None:
        """Kernel and records are brought together; ``live`` has endpoints of this network alone."""

    async def attach(self, request: NetworkRequest, known: Known | None) -> Prepared:
        """A namespace with this network in it; nothing is left by a failure. Runs to its end: it is not cancelled."""

    async def detach(self, container: str) -> None:
        """Give all back; idempotent."""

    def describe(self) -> dict[str, Any]:
        """What differs from network to network in Docker's object: Created, IPAM, Containers, Options."""

    async def close(self) -> None:
        """Drop what is unused."""
