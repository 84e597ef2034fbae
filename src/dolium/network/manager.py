"""All networks of an instance: the engine's ``NetworkManager``, over one driver per kind of network."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from typing import Any

from dolium.errors import InvalidArgument
from dolium.network import pool
from dolium.network.base import Known, NetworkRequest, Prepared
from dolium.network.drivers.base import Driver, Rows
from dolium.network.drivers.bridge import BridgeDriver
from dolium.network.drivers.none import NoneDriver

_INSTANCE = re.compile(r"[0-9a-f]{8}")
_CONTAINER = re.compile(r"[0-9a-f]{12,64}")


class Networks:
    """Implements ``dolium.network.base.NetworkManager``. All methods are called on one event loop."""

    def __init__(self, instance: str, store: Rows, *, run_dir: str, pool_size: int = pool.SIZE) -> None:
        """``instance``: 8 hex digits, in the name of every kernel object; ``run_dir``: the instance's folder for what
        does not outlive a boot, where this version puts nothing."""
        if not _INSTANCE.fullmatch(instance):
            raise ValueError(f"an instance is 8 hex digits, not {instance!r}")
        self.instance, self.run_dir = instance, run_dir
        self._bridge = BridgeDriver(instance, store, pool_size=pool_size)
        self._drivers: dict[str, Driver] = {driver.name: driver for driver in (NoneDriver(), self._bridge)}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def warnings(self) -> list[str]:
        """What an administrator should know (a foreign chain that drops all forwarded packets); after ``start``."""
        return list(self._bridge.warnings)

    def pool_figures(self) -> dict[str, int]:
        """``ready``, ``taken``, ``missed``: the pool of prepared namespaces, for memory figures and tests."""
        return self._bridge.pool_figures()

    async def start(self, live: dict[str, dict[str, Any]]) -> None:
        """See NetworkManager. Endpoints of networks that are not ours (host, another container's) are passed over."""
        for driver in self._drivers.values():
            await driver.start({container: endpoint for container, endpoint in live.items()
                                if endpoint.get("network") == driver.name})

    async def prepare(self, request: NetworkRequest, known: Known | None = None) -> Prepared:
        """See NetworkManager. A caller that is cancelled leaves nothing behind either."""
        driver = self._drivers.get(request.mode)
        if driver is None:
            raise InvalidArgument(f"network {request.mode} not found")
        if not _CONTAINER.fullmatch(request.container):
            raise InvalidArgument(f"invalid container id: {request.container!r}")
        task = self._task(driver.attach(request, known))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._task(self._undo(driver, request.container, task))
            raise

    async def _undo(self, driver: Driver, container: str, task: asyncio.Task[Prepared]) -> None:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            os.close(task.result().fd)
            await driver.detach(container)

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def release(self, container: str, endpoint: dict[str, Any]) -> None:
        """See NetworkManager. What another container has by now (an old record's address) is not touched."""
        driver = self._drivers.get(str(endpoint.get("network") or ""))
        if driver is not None:
            await asyncio.shield(self._task(driver.detach(container)))

    def describe(self) -> list[dict[str, Any]]:
        """See NetworkManager; ``Containers``' names are the caller's to fill in."""
        return [self._described("bridge", self._bridge.describe()), self._described("host", {}),
                self._described("none", self._drivers["none"].describe())]

    def _described(self, name: str, own: dict[str, Any]) -> dict[str, Any]:
        identity = hashlib.sha256(f"{self.instance}:{name}".encode()).hexdigest()
        return {"Name": name, "Id": identity, "Created": "0001-01-01T00:00:00Z", "Scope": "local",
                "Driver": "null" if name == "none" else name, "EnableIPv4": True, "EnableIPv6": False,
                "IPAM": {"Driver": "default", "Options": None, "Config": []}, "Internal": False, "Attachable": False,
                "Ingress": False, "ConfigFrom": {"Network": ""}, "ConfigOnly": False, "Containers": {}, "Options": {},
                "Labels": {}, **own}

    async def close(self) -> None:
        """See NetworkManager. With no live container nothing of the instance is left in the kernel."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        for driver in self._drivers.values():
            await driver.close()
