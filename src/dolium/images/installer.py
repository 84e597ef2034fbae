"""From a manifest to unpacked layers: fetch what is missing, unpack what is not there, both once however many ask.

The installer changes no record. It leaves complete blobs in the content store and complete layers in the snapshot
driver; whoever calls it holds their names (so that no removal takes them away meanwhile) and commits the record.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dolium import faults
from dolium.errors import DoliumError, InvalidArgument
from dolium.images.content import ContentStore, Ingest, syncfs
from dolium.images.flight import SingleFlight, first_error, settled
from dolium.images.manifest import CONFIG_MAX, Descriptor, ImageConfig, Manifest, parse_config
from dolium.images.progress import LayerProgress, Progress, Status
from dolium.images.records import ImageRecord, LayerRecord
from dolium.images.snapshots.base import Snapshotter
from dolium.images.unpack import Source, Unpacked, unpack

DOWNLOADS = 4
FLUSH_EARLY = 8 << 20  # bytes of a blob worth writing out while its layer is being unpacked

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
        self._flushing: asyncio.Future[None] | None = None
        self._downloads = asyncio.Semaphore(DOWNLOADS)
        # One for each download that is unpacked as it comes: those wait more than they work.
        self._pool = ThreadPoolExecutor(max(DOWNLOADS, os.cpu_count() or 1), thread_name_prefix="unpack")

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
            if not self._snapshots.has_layer(chain_id):
                work = partial(self._layer, layer, diff_id, chain_id, fetch, report)
                sizes[chain_id] = await self._unpacks.do(chain_id, work)
            # Still missing when the layer came from a blob that is compressed in another way.
            await self._blob(layer, fetch, lambda done: report(Status.DOWNLOADING, done, layer.size))
            report(Status.COMPLETE)

        try:
            async with asyncio.TaskGroup() as group:
                for layer, diff_id, chain_id in zip(manifest.layers, config.diff_ids, config.chain_ids, strict=True):
                    group.create_task(one(layer, diff_id, chain_id))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return sizes

    async def blobs(self, descriptors: Iterable[Descriptor], fetch: Fetch, progress: Progress) -> None:
        """Have blobs that are not to be unpacked: an artifact's. As ``layers`` on failure."""
        async def one(blob: Descriptor) -> None:
            report = LayerProgress(progress, blob.digest, asyncio.get_running_loop())
            if self._content.has(blob.digest, blob.size):
                report(Status.EXISTS)
                return
            await self._blob(blob, fetch, lambda done: report(Status.DOWNLOADING, done, blob.size))
            report(Status.DOWNLOADED)

        try:
            async with asyncio.TaskGroup() as group:
                for blob in descriptors:
                    group.create_task(one(blob))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None

    def _flush_early(self) -> None:
        """Start writing to the disk while the processors are busy; ``sync`` finds less to do. Nothing depends on it."""
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.get_running_loop().run_in_executor(None, syncfs, self._content.root)

    async def sync(self) -> None:
        """Put blobs and layers on the disk: once per image, before its record commits."""
        if self._flushing is not None:
            await settled(self._flushing)  # its error, if any, comes again below
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
        with self._content.open(digest) as blob:
            prepared, unpacked = await self._unpack(
                blob, lambda: None, digest, None, "import", lambda done: report(Status.EXTRACTING, done, size)
            )
        self._snapshots.commit_layer(unpacked.diff_id, prepared)
        return unpacked

    async def _blob(
        self, descriptor: Descriptor, fetch: Fetch, report: Callable[[int], None],
        begun: Callable[[Ingest], None] = lambda ingest: None,
    ) -> None:
        """Have a blob; ``begun`` gets its ingest when it is this call that fetches it."""
        if self._content.has(descriptor.digest, descriptor.size):
            return

        async def work() -> None:
            async with self._downloads:
                ingest = await asyncio.to_thread(self._content.ingest, descriptor.digest, descriptor.size)
                with ingest:
                    begun(ingest)
                    await fetch(descriptor, ingest, report)

        await self._fetches.do(descriptor.digest, work)

    async def _layer(
        self, layer: Descriptor, diff_id: str, chain_id: str, fetch: Fetch, report: LayerProgress
    ) -> int:
        """Fetch and unpack at the same time; the layer appears when the blob's digest and the diff ID have both been
        compared. Should unpacking fail, the fetched blob is the judge: it is unpacked again, once it is complete.
        """
        fetched, extracted = False, 0

        def extracting(done: int) -> None:
            nonlocal extracted
            extracted = done
            if fetched:  # Docker's clients expect a layer's phases one after the other
                report(Status.EXTRACTING, done, layer.size)

        early: list[asyncio.Task[tuple[Path, Unpacked]]] = []

        def begun(ingest: Ingest) -> None:
            follower = ingest.follow()
            task = asyncio.ensure_future(
                self._unpack(follower, follower.stop, layer.digest, diff_id, chain_id, extracting)
            )
            task.add_done_callback(lambda task: follower.close())
            early.append(task)

        try:
            await self._blob(layer, fetch, lambda done: report(Status.DOWNLOADING, done, layer.size), begun)
            report(Status.DOWNLOADED)
            faults.point("pull.layer.fetched")
            fetched = True
            report(Status.EXTRACTING, extracted, layer.size)
            if layer.size >= FLUSH_EARLY:
                self._flush_early()
            prepared, unpacked = await self._unpacked(early, layer, diff_id, chain_id, extracting)
        except BaseException:
            for task in early:
                task.add_done_callback(self._abort)
                task.cancel()
                await settled(task)
            raise
        self._snapshots.commit_layer(chain_id, prepared)
        faults.point("pull.layer.unpacked")
        return unpacked.size

    def _abort(self, task: asyncio.Task[tuple[Path, Unpacked]]) -> None:
        """Drop what a task unpacked that came to its end although nobody wants it any more."""
        if not task.cancelled() and task.exception() is None:
            self._snapshots.abort_layer(task.result()[0])

    async def _unpacked(
        self, early: list[asyncio.Task[tuple[Path, Unpacked]]], layer: Descriptor, diff_id: str, chain_id: str,
        report: Callable[[int], None],
    ) -> tuple[Path, Unpacked]:
        for task in early:
            if await settled(task):
                return task.result()
        with self._content.open(layer.digest) as blob:
            return await self._unpack(blob, lambda: None, layer.digest, diff_id, chain_id, report)

    async def _unpack(
        self, source: Source, stop: Callable[[], None], digest: str, diff_id: str | None, name: str,
        report: Callable[[int], None],
    ) -> tuple[Path, Unpacked]:
        """Unpack into a prepared directory, which is the caller's to commit; dropped on failure."""
        prepared = self._snapshots.begin_layer(name)
        cancel = threading.Event()

        def work() -> Unpacked:
            return unpack(
                source, prepared, diff_id=diff_id, cancel=cancel, stop=stop, unprivileged=self._unprivileged,
                report=report,
            )

        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return prepared, await asyncio.shield(running)
        except DoliumError as error:
            self._snapshots.abort_layer(prepared)
            raise type(error)(f"layer {digest}: {error.message}", hint=error.hint, errno=error.errno) from None
        except BaseException:
            cancel.set()  # a thread cannot be cancelled: have it stop, and wait, before its directory goes
            stop()
            try:
                await settled(running)
            finally:
                self._snapshots.abort_layer(prepared)
            raise
