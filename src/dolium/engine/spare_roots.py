"""Spare roots: a writable layer that is made and mounted before its container is known, for images that are in use; and
with it the container's own folder, with the files for its /etc.

Making one is mostly the host's file system at work, which is slow at it just after something was deleted (``trash``).
What has a spare's name when a daemon starts is an earlier one's, and goes with the other orphans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from dolium import faults
from dolium.engine.etc_files import ENDPOINT, ETC_FILES
from dolium.errors import DoliumError
from dolium.images.snapshots.base import Snapshotter

_log = logging.getLogger(__name__)
faults.register("root.spare.taken")
SIZE, KINDS = 2, 4
"""Spares of one kind, and kinds: layers and whether the root is volatile. The kind used longest ago goes first."""
FILL_PAUSE = 0.03
"""Seconds before spares are made again: the start that took one does not share the processor with that work."""

Kind = tuple[tuple[str, ...], bool]


@dataclass(slots=True)
class Spare:
    """A snapshot's key, and an fd of its overlay, detached."""

    key: str
    fd: int


def let_go(root: int) -> asyncio.Future[None]:
    """Close a root's fd in a thread: when it is the last one, and the root not volatile, the file system below is synced."""
    return asyncio.get_running_loop().run_in_executor(None, os.close, root)


class SpareRoots:
    """``mount``: (key, kind) to an fd; raises DoliumError, OSError. Used on one event loop; its work is done in a thread."""

    def __init__(self, snapshots: Snapshotter, mount: Callable[[str, Kind], int], folders: str) -> None:
        """``folders``: where each container has a folder of its own, named by its id."""
        self._snapshots, self._mount, self._folders = snapshots, mount, folders
        self._ready: dict[Kind, list[Spare]] = {}
        self._filling: asyncio.Task[None] | None = None
        self._generation = 0
        self._closing = False

    def take(self, kind: Kind, key: str) -> int | None:
        """The fd of a spare whose snapshot has ``key`` from now on; None when there is none. Refills later."""
        spares = self._ready.pop(kind, [])
        self._ready[kind] = spares
        while len(self._ready) > KINDS:
            self._discard(self._ready.pop(next(iter(self._ready))))
        spare = spares.pop(0) if spares else None
        self._fill_later()
        if spare is None:
            return None
        try:
            os.rename(self._folder(spare.key), self._folder(key))
            self._snapshots.rename(spare.key, key)
        except BaseException:
            self._discard([spare])
            raise
        faults.point("root.spare.taken")
        return spare.fd

    def _fill_later(self) -> None:
        if self._filling is None and not self._closing and self._missing() is not None:
            self._filling = asyncio.get_running_loop().create_task(self._fill())
            self._filling.add_done_callback(self._filled)

    def _filled(self, task: asyncio.Task[None]) -> None:
        self._filling = None
        if not task.cancelled():
            task.result()
            self._fill_later()  # for one that was taken just now

    def _missing(self) -> Kind | None:
        return next((kind for kind, spares in self._ready.items() if len(spares) < SIZE), None)

    async def _fill(self) -> None:
        await asyncio.sleep(FILL_PAUSE)
        while (kind := self._missing()) is not None:
            generation = self._generation
            try:
                spare = await asyncio.to_thread(self._make, kind)
            except (OSError, DoliumError) as error:
                # no room, no fd: a start that finds no spare makes its own, and its caller is told
                _log.warning("cannot prepare a root: %s", error)
                self._ready.pop(kind, None)
                continue
            if self._closing or generation != self._generation or kind not in self._ready:
                self._discard([spare])
            else:
                self._ready[kind].append(spare)

    def _make(self, kind: Kind) -> Spare:
        key = f"spare-{secrets.token_hex(8)}"
        try:
            os.mkdir(self._folder(key), 0o710)
            for name in (*ETC_FILES, ENDPOINT):
                os.close(os.open(f"{self._folder(key)}/{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
            self._snapshots.prepare(key, kind[0])
            return Spare(key, self._mount(key, kind))
        except BaseException:
            self._remove(key)
            raise

    def _folder(self, key: str) -> str:
        return f"{self._folders}/{key}"

    def _remove(self, key: str) -> None:
        shutil.rmtree(self._folder(key), ignore_errors=True)
        with contextlib.suppress(OSError):  # with the orphans, then
            self._snapshots.remove(key)

    def _discard(self, spares: list[Spare]) -> None:
        for spare in spares:
            let_go(spare.fd)
            self._remove(spare.key)

    def drop(self) -> None:
        """Drop all: an image is going."""
        self._generation += 1
        ready, self._ready = self._ready, {}
        for spares in ready.values():
            self._discard(spares)

    async def close(self) -> None:
        """Drop all, for good."""
        self._closing = True
        self.drop()
        if self._filling is not None:
            await asyncio.wait([self._filling])
