"""Containers' volumes and host folders: made for a container, mounted for its run, filled at first use, given back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from dolium.engine.engine import Engine, cleanup_step
from dolium.engine.model import Container, Mount
from dolium.engine.mounts import from_others, lend
from dolium.engine.rootfs import copy_up
from dolium.errors import DoliumError, InvalidArgument, NotFound
from dolium.images.snapshots.places import tree_usage
from dolium.volumes.store import Volume


def check_sources(mounts: Iterable[Mount]) -> None:
    """Raises InvalidArgument for a host folder that is not there and shall not be made."""
    for mount in mounts:
        if mount.kind == "bind" and mount.must_exist and not os.path.exists(mount.source):
            raise InvalidArgument(f"invalid mount config for type \"bind\": bind source path does not exist: {mount.source}")


def _make_source(path: str) -> None:
    """What -v does for a host folder that is not there yet. Raises InvalidArgument."""
    if os.path.exists(path):
        return
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"error while creating mount source path '{path}': {error.strerror}") from error


class ContainerVolumes:
    """Those of all containers of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._holding: set[str] = set()  # ids of containers whose volumes are mounted, besides those that run
        # by volume: it is mounted, filled or unmounted
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lent(self, host: dict[str, Any]) -> list[Mount]:
        """The mounts of --volumes-from. Raises InvalidArgument."""
        found: dict[str, Mount] = {}
        for text in host.get("VolumesFrom") or []:
            name, read_only = from_others(text)
            try:
                other = self._engine.find(name)
            except NotFound as error:  # not as 404: clients take that for a missing image, and pull
                raise InvalidArgument(f"--volumes-from {text}: {error}") from error
            found |= {mount.target: mount for mount in lend(other.mounts, read_only)}
        return list(found.values())

    async def make(self, container: Container) -> None:
        """What its mounts speak of and is not there yet. Raises as ``Volumes.ensure``."""
        for mount in container.mounts:
            if mount.kind == "bind":
                _make_source(mount.source)
            elif mount.kind == "volume":
                mount.name = (await self._engine.volumes.ensure(mount.name, labels=mount.labels,
                                                                options=mount.driver_options, owner=container.id)).name
                mount.source = self._engine.volumes.path(mount.name)

    async def mount(self, container: Container, root: int) -> None:
        """All is where its record says, until ``release``: what a volume's options name is mounted there, and what the image
        has at a new volume's mount point becomes its first content. Raises FailedPrecondition, NotFound."""
        self._holding.add(container.id)
        for mount in container.mounts:
            if mount.kind == "volume":
                await self.mount_one(container, mount, root)

    async def mount_one(self, container: Container, mount: Mount, root: int) -> None:
        """As ``mount``, of one of them."""
        volume = self._engine.volumes.get(mount.name)
        if not volume.options and not volume.fresh:
            return
        async with self._locks.setdefault(mount.name, asyncio.Lock()):
            if volume.options:
                await asyncio.to_thread(self._engine.volumes.mount, volume)
            if volume.fresh and not mount.no_copy and not mount.subpath:  # others that start meanwhile wait for its content
                shift = container.owner[0]
                await asyncio.to_thread(self._engine.volumes.fill, volume,
                                        partial(copy_up, root, mount.target, shift=shift))
            self._engine.volumes.used(volume)

    async def release(self, container: Container) -> None:
        """It has ended, or did not start. What its volumes' options name is unmounted, where no other container has it.
        Idempotent."""
        self._holding.discard(container.id)
        for mount in container.mounts:
            if mount.kind == "volume":
                await self.unused(mount.name, container.id)

    async def settle(self) -> None:
        """After a daemon's start, when it is known which containers run."""
        for volume in self._engine.volumes.all():
            await self.unused(volume.name)

    async def unused(self, name: str, but: str = "") -> None:
        """Unmount what a volume's options name, unless a container has it (``but``: this one has not). Idempotent."""
        volume: Volume | None = None
        try:
            volume = self._engine.volumes.get(name)
        except NotFound as error:
            cleanup_step(f"unmount volume {name}", error)
        if volume is None or not volume.options:
            return
        async with self._locks.setdefault(name, asyncio.Lock()):
            if not any(one.id in self._holding or (one.id != but and (one.live or one.starting))
                       for one in self._engine.containers.values() if any(mount.name == name for mount in one.mounts)):
                try:
                    await asyncio.to_thread(self._engine.volumes.unmount, volume)
                except OSError as error:
                    cleanup_step(f"unmount volume {name}", error)

    async def drop_anonymous(self, container: Container) -> None:
        """Remove the volumes that nobody gave a name, unless another container has them, too."""
        for mount in container.mounts:
            if mount.anonymous and mount.name:
                try:
                    others = [one for one in self._engine.volume_users(mount.name) if one != container.id]
                    if not others:  # else it goes with the last of them
                        await self._engine.remove_volume(mount.name, others)
                except DoliumError as error:
                    cleanup_step(f"remove volume {mount.name}", error)


async def volume_size(engine: Engine, name: str) -> int:
    """Bytes that a volume takes on the host's disk. Raises NotFound."""
    engine.volumes.get(name)
    disk = engine.volumes.disk(name)
    if disk:
        return os.stat(disk).st_blocks * 512
    return (await asyncio.to_thread(tree_usage, Path(engine.volumes.path(name)))).size
