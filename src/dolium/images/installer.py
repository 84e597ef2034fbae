"""From a manifest to unpacked layers: fetch what is missing, unpack what is not there, both once however many ask.

The installer changes no record. It leaves complete blobs in the content store and complete layers in the snapshot
driver; whoever calls it holds their names (so that no removal takes them away meanwhile) and commits the record.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dolium import faults
from dolium.errors import DoliumError, InvalidArgument
from dolium.images.content import ContentStore, Ingest, syncfs
from dolium.images.flight import SingleFlight
from dolium.images.manifest import CONFIG_MAX, Descriptor, ImageConfig, Manifest, parse_config
from dolium.images.progress import LayerProgress, Progress, Status
from dolium.images.records import ImageRecord, LayerRecord
from dolium.images.snapshots.base import Snapshotter
from dolium.images.unpack import Unpacked, unpack

DOWNLOADS = 4

Fetch = Callable[[Descriptor, Ingest, Callable[[int], None]], Awaitable[None]]
"""Bring an ingest to its end and commit it; the callback gets the bytes there so far."""

faults.register("pull.layer.fetched", "pull.layer.unpacked", "pull.synced")


async def no_source(descriptor: Descriptor, ingest: Ingest, report: Callable[[int], None]) -> None:
    """The ``Fetch`` of an archive: all its blobs are in the store already, or it is incomplete."""
    raise InvalidArgument(f"the archive lacks blob {descriptor.digest}")


class Installer:
    """Shared by all pulls and loads of one store; for one event loop."""

    def __init__(self, content: ContentStore, snapshots: Snapshotter, *, unprivileged: bool = False) -> None:
        """``unprivileged`` leaves owners and devices out of layers: for a daemon that is not root."""
        self._content = content
        self._snapshots = snapshots
        self._unprivileged = unprivileged
        self._fetches: SingleFlight[None] = SingleFlight()
        self._unpacks: SingleFlight[int] = SingleFlight()
        self._downloads = asyncio.Semaphore(DOWNLOADS)
        # Each unpack keeps about two processors busy; more at once only pays when downloads are slow.
        self._pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), thread_name_prefix="unpack")

    def close(self) -> None:
        """Wait for running unpacks."""
        self._pool.shutdown(wait=True)

    async def config(self, manifest: Manifest, fetch: Fetch) -> ImageConfig:
        """The image's configuration, fetched if need be. Raises InvalidArgument when it does not fit the manifest."""
        await self._blob(manifest.config, fetch, lambda done: None)
        data = await asyncio.to_thread(self._content.read, manifest.config.digest, limit=CONFIG_MAX)
        config = parse_config(data, what=f"image config {manifest.config.digest}")
        if len(config.diff_ids) != len(manifest.layers):
            raise InvalidArgument(
                f"image config {manifest.config.digest} has {len(config.diff_ids)} diff IDs for "
                f"{len(manifest.layers)} layers"
            )
        return config

    async def layers(
        self, manifest: Manifest, config: ImageConfig, fetch: Fetch, progress: Progress
    ) -> dict[str, int]:
        """Have every layer fetched and unpacked; returns the unpacked bytes of those that were unpacked now.

        On failure the rest is cancelled; what is complete stays. One error is raised, the first.
        """
        sizes: dict[str, int] = {}

        async def one(layer: Descriptor, diff_id: str, chain_id: str) -> None:
            report = LayerProgress(progress, layer.digest, asyncio.get_running_loop())
            if self._snapshots.has_layer(chain_id) and self._content.has(layer.digest, layer.size):
                report(Status.EXISTS)
                return
            report(Status.PULLING)
            await self._blob(layer, fetch, lambda done: report(Status.DOWNLOADING, done, layer.size))
            report(Status.DOWNLOADED)
            faults.point("pull.layer.fetched")
            if not self._snapshots.has_layer(chain_id):
                work = partial(self._layer, layer, diff_id, chain_id, report)
                sizes[chain_id] = await self._unpacks.do(chain_id, work)
            report(Status.COMPLETE)

        try:
            async with asyncio.TaskGroup() as group:
                for layer, diff_id, chain_id in zip(manifest.layers, config.diff_ids, config.chain_ids, strict=True):
                    group.create_task(one(layer, diff_id, chain_id))
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        return sizes

    async def sync(self) -> None:
        """Put blobs and layers on the disk: once per image, before its record commits."""
        roots = {path.stat().st_dev: path for path in (self._content.root, self._snapshots.root)}
        for path in roots.values():
            await asyncio.to_thread(syncfs, path)
        faults.point("pull.synced")

    def record(self, manifest: Manifest, digest: str, config: ImageConfig) -> ImageRecord:
        """The record to commit once ``layers`` and ``sync`` have returned."""
        return ImageRecord(
            id=manifest.config.digest, manifest=digest, media_type=manifest.media_type, platform=str(config.platform),
            created=config.created, config_size=manifest.config.size,
            layers=tuple(
                LayerRecord(layer.digest, layer.size, layer.media_type, diff_id, chain_id)
                for layer, diff_id, chain_id in zip(manifest.layers, config.diff_ids, config.chain_ids, strict=True)
            ),
        )

    async def unpack_unknown(self, digest: str, size: int, progress: Progress) -> Unpacked:
        """Unpack a blob as a bottom layer whose diff ID nobody has told: an imported root file system."""
        report = LayerProgress(progress, digest, asyncio.get_running_loop())
        prepared, unpacked = await self._unpack(digest, size, None, "import", report)
        self._snapshots.commit_layer(unpacked.diff_id, prepared)
        return unpacked

    async def _blob(self, descriptor: Descriptor, fetch: Fetch, report: Callable[[int], None]) -> None:
        if self._content.has(descriptor.digest, descriptor.size):
            return

        async def work() -> None:
            async with self._downloads:
                ingest = await asyncio.to_thread(self._content.ingest, descriptor.digest, descriptor.size)
                with ingest:
                    await fetch(descriptor, ingest, report)

        await self._fetches.do(descriptor.digest, work)

    async def _layer(self, layer: Descriptor, diff_id: str, chain_id: str, report: LayerProgress) -> int:
        prepared, unpacked = await self._unpack(layer.digest, layer.size, diff_id, chain_id, report)
        self._snapshots.commit_layer(chain_id, prepared)
        faults.point("pull.layer.unpacked")
        return unpacked.size

    async def _unpack(
        self, digest: str, size: int, diff_id: str | None, name: str, report: LayerProgress
    ) -> tuple[Path, Unpacked]:
        prepared = self._snapshots.begin_layer(name)
        cancel = threading.Event()

        def work() -> Unpacked:
            with self._content.open(digest) as blob:
                return unpack(
                    blob, prepared, diff_id=diff_id, cancel=cancel, unprivileged=self._unprivileged,
                    report=lambda done: report(Status.EXTRACTING, done, size),
                )

        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return prepared, await asyncio.shield(running)
        except DoliumError as error:
            self._snapshots.abort_layer(prepared)
            raise type(error)(f"layer {digest}: {error.message}", hint=error.hint, errno=error.errno) from None
        except BaseException:
            cancel.set()  # a thread cannot be cancelled: have it stop, and wait, before its directory goes
            await asyncio.wait([running])
            self._snapshots.abort_layer(prepared)
            raise


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups, in the order tasks failed."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
