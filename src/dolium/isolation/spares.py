"""Spare shims: forked, greeted, waiting in folders of their own for a sandbox, used once.

What has the name of a spare at a start of the daemon is an earlier one's, and is ended with the other orphans. A spare
whose daemon is gone ends by itself: it has no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Awaitable, Callable
from functools import partial

from dolium.errors import DoliumError
from dolium.isolation.shim import Closed, Event, Shim

_log = logging.getLogger(__name__)
SIZE = 4
FILL_PAUSE = 0.03
"""Seconds before spares are made again: the start that took one does not share the processor with that work."""
NAME = "spare-"


class Spares:
    """At most ``size`` shims. ``make``: a shim in the folder that is given, with its events' receiver."""

    def __init__(self, folder: str, make: Callable[[str, Callable[[Event], None]], Awaitable[Shim]],
                 size: int = SIZE) -> None:
        self._folder, self._make, self._size = folder, make, size
        self._ready: list[Shim] = []
        self._filling: asyncio.Task[None] | None = None
        self._closing = False

    def __len__(self) -> int:
        return len(self._ready)

    def take(self, folder: str, on_event: Callable[[Event], None]) -> Shim | None:
        """A shim that lives in ``folder`` from now on, where nothing is; None when there is no spare. Refills later."""
        found = None
        while self._ready and found is None:
            shim = self._ready.pop(0)
            if not shim.connected:
                shutil.rmtree(shim.handle.dir, ignore_errors=True)
                continue
            try:
                os.rename(shim.handle.dir, folder)
            except FileNotFoundError:
                shim.close()
            else:
                found = shim.taken(folder, on_event)
        self.fill()
        return found

    def fill(self) -> None:
        """Make what is missing, in the background."""
        if not self._closing and self._filling is None and len(self._ready) < self._size:
            self._filling = asyncio.get_running_loop().create_task(self._fill())
            self._filling.add_done_callback(self._filled)

    def _filled(self, task: asyncio.Task[None]) -> None:
        self._filling = None
        if task.cancelled():
            return
        if task.exception() is None:
            self.fill()  # for one that was taken just now
        else:
            # no memory, no fd: a start that finds no spare makes its own, and its caller is told
            _log.warning("cannot prepare shims: %s", task.exception())

    async def _fill(self) -> None:
        if self._ready:
            await asyncio.sleep(FILL_PAUSE)
        while not self._closing and len(self._ready) < self._size:
            folder = f"{self._folder}/{NAME}{secrets.token_hex(8)}"
            os.mkdir(folder, 0o700)
            try:
                shim = await self._make(folder, partial(self._lost, folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._ready.append(shim)

    def _lost(self, folder: str, event: Event) -> None:
        if not isinstance(event, Closed):
            return
        for shim in self._ready:
            if shim.handle.dir == folder:
                self._ready.remove(shim)
                shutil.rmtree(folder, ignore_errors=True)
                if not self._closing:
                    _log.warning("a spare shim is gone: %s", event.reason)
                return

    async def close(self) -> None:
        """End them. Idempotent."""
        self._closing = True
        if self._filling is not None:
            await asyncio.wait([self._filling])
        ready, self._ready = self._ready, []
        for shim in ready:
            with contextlib.suppress(DoliumError):  # it has died: as good
                await shim.end()
            shim.close()
            shutil.rmtree(shim.handle.dir, ignore_errors=True)
