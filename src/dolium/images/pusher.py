"""From the store to a registry: blobs that are not there yet, several at a time, then the manifest that names them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from dolium import faults
from dolium.errors import FailedPrecondition
from dolium.images.content import ContentStore
from dolium.images.flight import first_error
from dolium.images.manifest import MANIFEST_MAX, Descriptor
from dolium.images.progress import LayerProgress, Progress, ProgressEvent, Status
from dolium.images.registry import RegistryClient

UPLOADS = 4
MOUNTS_TRIED = 3
faults.register("push.blob.sent", "push.manifest.sent")


def require_blobs(content: ContentStore, blobs: Sequence[Descriptor], what: str) -> None:
    """Before anything is sent: every blob is there. Raises FailedPrecondition."""
    missing = [blob.digest for blob in blobs if not content.has(blob.digest, blob.size)]
    if missing:
        raise FailedPrecondition(f"{what} cannot be sent: the store has lost {', '.join(missing)}",
                                 hint="dolium system check --repair fetches what a registry has")


async def push(
    client: RegistryClient, content: ContentStore, manifest: Descriptor, blobs: Sequence[Descriptor],
    mounts: Mapping[str, Sequence[str]], tag: str, progress: Progress, *, subject: Descriptor | None = None,
    quiet: frozenset[str] = frozenset(), children: Sequence[tuple[Descriptor, Descriptor | None]] = (),
) -> None:
    """Send blobs, then the manifests an index names (``children``, each with its subject), then the manifest under ``tag``
    (and so under its digest), or under its digest alone when ``tag`` is "".

    ``mounts``: digest to repositories of the same host that have it; ``quiet``: digests without progress of their own
    (Docker shows layers only). On failure the rest is cancelled; what the registry has by then it keeps. Raises as
    ``RegistryClient.push_blob``.
    """
    unique = list({blob.digest: blob for blob in blobs}.values())
    sources = {digest: list(found)[:MOUNTS_TRIED] for digest, found in mounts.items()}
    client.also_pull(dict.fromkeys(repository for found in sources.values() for repository in found))
    loop = asyncio.get_running_loop()
    reports = {blob.digest: LayerProgress(progress, blob.digest, loop) for blob in unique if blob.digest not in quiet}
    for report in reports.values():
        report(Status.PREPARING)
    await client.ping()
    limit = asyncio.Semaphore(UPLOADS)

    async def one(blob: Descriptor) -> None:
        report = reports.get(blob.digest)

        def sending(done: int) -> None:
            if report is not None:
                report(Status.PUSHING, done, blob.size)

        async with limit:
            how = await client.push_blob(blob.digest, blob.size, partial(content.open, blob.digest), sending,
                                         sources.get(blob.digest, ()))
        faults.point("push.blob.sent")
        if report is not None:
            report(Status.PUSHED if how is None else Status.THERE if not how else f"{Status.MOUNTED} {how}")

    try:
        async with asyncio.TaskGroup() as group:
            for blob in unique:
                group.create_task(one(blob))
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    for child, about in children:
        data = await asyncio.to_thread(content.read, child.digest, limit=MANIFEST_MAX)
        await client.put_manifest(child.digest, data, child.media_type, subject=about)
    data = await asyncio.to_thread(content.read, manifest.digest, limit=MANIFEST_MAX)
    await client.put_manifest(tag or manifest.digest, data, manifest.media_type, subject=subject)
    faults.point("push.manifest.sent")
    progress(ProgressEvent("", f"{tag or manifest.digest}: digest: {manifest.digest} size: {len(data)}"))
    progress(ProgressEvent("", "", aux={"Tag": tag, "Digest": manifest.digest, "Size": len(data)}))
