"""``none``: a namespace with a loopback and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from dolium.errors import InvalidArgument, PermissionDenied, ResourceExhausted
from dolium.network.antispoof import Sources
from dolium.network.base import Endpoint, Place, PortBinding
from dolium.network.local import new_namespace
from dolium.network.ports import Published
from dolium.network.records import Record


class NoneDriver:
    """Keeps nothing: there is nothing to give back."""

    name, publishes, late = "none", False, False

    async def start(self, records: Sequence[Record], live: dict[str, list[Endpoint]]) -> None:
        return None

    def reserve(self, container: str, place: Place) -> Endpoint:
        return {"network": self.name, "ip": "", "prefix": 0, "gateway": "", "mac": "", "link": "", "ports": []}

    def publish(self, container: str, endpoint: Endpoint, ports: Sequence[PortBinding]) -> None:
        return None  # as with Docker: they are in the request, and nobody hears of them

    async def make(self, container: str, endpoint: Endpoint, namespace: int) -> int:
        try:
            return await asyncio.to_thread(new_namespace, namespace)
        except PermissionError as error:
            raise PermissionDenied(f"cannot make a network namespace: {error}", errno=error.errno) from error
        except OSError as error:
            raise ResourceExhausted(f"cannot make a network namespace: {error}", errno=error.errno) from error

    async def join(self, container: str, endpoint: Endpoint, namespace: int, *, default: bool, default6: bool) -> None:
        return None

    async def expose(self, container: str, endpoint: Endpoint) -> None:
        return None

    async def withdraw(self, container: str, endpoint: Endpoint, ports: Sequence[Published]) -> None:
        return None

    async def leave(self, container: str, endpoint: Endpoint, namespace: int) -> None:
        return None

    async def release(self, container: str, endpoint: Endpoint) -> None:
        return None

    async def create(self, record: Record) -> Record:
        raise InvalidArgument("there is one network none")

    async def remove(self, name: str) -> None:
        raise InvalidArgument("the network none is always there")

    def describe(self, name: str) -> dict[str, Any]:
        return {}

    def subnets(self) -> list[IPv4Network]:
        return []

    def subnets6(self) -> list[IPv6Network]:
        """None."""
        return []

    def sources(self, name: str) -> Sources | None:
        """See Driver."""
        return None

    async def close(self) -> None:
        return None
