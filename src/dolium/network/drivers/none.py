"""``none``: a namespace with a loopback and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

from dolium.errors import PermissionDenied, ResourceExhausted
from dolium.network.base import Known, NetworkRequest, Prepared
from dolium.network.local import new_namespace


class NoneDriver:
    """Keeps nothing: there is nothing to give back."""

    name = "none"

    async def start(self, live: dict[str, dict[str, Any]]) -> None:
        return None

    async def attach(self, request: NetworkRequest, known: Known | None) -> Prepared:
        endpoint = {"network": self.name, "ip": "", "prefix": 0, "gateway": "", "mac": "", "link": "", "ports": []}
        if known is not None:
            known(endpoint)
        try:
            fd = await asyncio.to_thread(new_namespace, request.namespace)
        except PermissionError as error:
            raise PermissionDenied(f"cannot make a network namespace: {error}", errno=error.errno) from error
        except OSError as error:
            raise ResourceExhausted(f"cannot make a network namespace: {error}", errno=error.errno) from error
        return Prepared(fd, endpoint)

    async def detach(self, container: str) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        return None
