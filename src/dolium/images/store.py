"""The image store: what the engine calls. Pull, load, import, find, tag, remove.

One event loop, one process. Records are cached in memory, since only this object writes them; every change is one
transaction, made in the loop's thread after all files it speaks of are on the disk. Files without a record are garbage:
``recover`` removes them at the start, ``remove`` and failed calls as soon as nothing in flight holds them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from dolium import faults
from dolium.errors import DoliumError, FailedPrecondition, InvalidArgument, NotFound
from dolium.images import archive as archives
from dolium.images import artifacts, saver, view
from dolium.images.artifacts import is_image
from dolium.images.auth import Credentials
from dolium.images.changes import apply_changes
from dolium.images.commit import Layer, Write, config_document, new_manifest, write_layer
from dolium.images.content import ContentStore
from dolium.images.flight import settled
from dolium.images.hosts import read_settings
from dolium.images.indexes import Indexes, blobs_of, read_tree, to_send
from dolium.images.installer import Fetch, Installer, no_source
from dolium.images.keeping import PULL_LEASE, Hold, Keeper, chain_key
from dolium.images.manifest import (
    CONFIG_MAX,
    MANIFEST_MAX,
    OCI_CONFIG,
    OCI_MANIFEST,
    Artifact,
    Descriptor,
    ImageConfig,
    Manifest,
    parse_artifact,
    parse_config,
    parse_manifest,
)
from dolium.images.names import Names, Removal, Use, plan_removal
from dolium.images.platform import Platform, host
from dolium.images.progress import Progress, ProgressEvent, silent
from dolium.images.puller import resolve_manifest
from dolium.images.pusher import push, require_blobs
from dolium.images.records import ArtifactRecord, Change, ImageRecord, IndexRecord, Lease, Records
from dolium.images.reference import DEFAULT_DOMAIN, Reference
from dolium.images.registry import JsonObject, RegistryClient
from dolium.images.saver import Saved
from dolium.images.snapshots.base import Snapshotter
from dolium.images.snapshots.layers import FolderLayers
from dolium.images.snapshots.overlay import OverlaySnapshotter
from dolium.images.sources import Sources, login
from dolium.images.trust import TARBALL, enforce, enforce_file, read_policy
from dolium.images.view import HistoryLine, Image
from dolium.units import rfc3339

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

ETC = Path("/etc")
READERS = 16
"""Archives that are read and layers that are written at the same time, in threads of their own: a client may be slow."""

faults.register("image.committed", "image.dropped")


def unused(image_id: str) -> Sequence[Use]:
    """The ``in_use`` of a store without containers."""
    return ()


class ImageStore:
    """All images of one state directory: ``ROOT/content`` and ``ROOT/snapshots``."""

    def __init__(
        self, root: Path, records: Records, *, snapshots: Snapshotter | None = None,
        in_use: Callable[[str], Sequence[Use]] = unused, platform: Platform | None = None, unprivileged: bool = False,
        etc: Path = ETC,
    ) -> None:
        """Open the store; call ``recover`` before anything else and ``close`` at the end.

        ``in_use`` tells the containers made from an image; ``platform`` is what images are picked for, by default this
        machine's; ``unprivileged`` unpacks without owners and devices; ``etc`` has the registries' settings (``hosts``).
        """
        self._etc = etc
        self.content = ContentStore(root / "content")
        self.snapshots: Snapshotter = snapshots or OverlaySnapshotter(FolderLayers(root / "snapshots"))
        self._records = records
        self._in_use = in_use
        self._platform = platform or host()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="archive")
        self._installer = Installer(self.content, self.snapshots, unprivileged=unprivileged)
        self._images = {image.id: image for image in records.images()}
        self._names = Names(records.tags())
        self._sizes = records.layers()
        self._configs: dict[str, ImageConfig] = {}
        self._artifacts = {artifact.name: artifact for artifact in records.artifacts()}
        self._indexes = Indexes(records)
        self._keeper = Keeper(self.content, self.snapshots, records, self._referenced, self._sizes)

    async def recover(self) -> None:
        """Bring files and records together after a crash: drop temporaries, files without a record, and records whose
        files are gone (which only happens when somebody else removed them).
        """
        self.snapshots.recover()
        self.content.recover()
        for image in [image for image in self._images.values() if not self._complete(image)]:
            if await self._unpacked_again(image):
                continue
            _log.warning("image %s has lost files: its record is dropped", image.id)
            self._drop(image, tuple(str(name) for name in self._names.of(image.id)))
        await self._keeper.recover()

    async def _unpacked_again(self, image: ImageRecord) -> bool:
        """Have the layers that are missing, from the blobs: another snapshotter unpacked them elsewhere. False when that
        cannot be."""
        if not all(self.content.has(blob) for blob in image.blobs()):
            return False
        _log.info("image %s is unpacked for the snapshotter %s", image.id, self.snapshots.name)
        try:
            manifest = parse_manifest(self.content.read(image.manifest, limit=MANIFEST_MAX), image.media_type)
            if not isinstance(manifest, Manifest):
                return False
            config = await self._installer.config(manifest, no_source)
            await self._installer.layers(manifest, config, no_source, silent)
            await self._installer.sync()
        except (DoliumError, OSError) as error:
            _log.error("image %s cannot be unpacked again: %s", image.id, error)
            return False
        return True

    def close(self) -> None:
        """Wait for background work. Blocks; no call may be under way."""
        self._installer.close()
        self._readers.shutdown(wait=True)
        self.snapshots.close()

    # Bringing images in

    async def pull(
        self, name: str, *, platform: str | None = None, all_platforms: bool = False,
        credentials: Credentials | None = None, progress: Progress = silent,
    ) -> Image:
        """Pull an image and name it. With a tag and a digest the digest decides, and no tag is moved. ``all_platforms``
        keeps the whole index beside the image that is chosen from it and unpacked.

        Raises NotFound (no such manifest, or none for the platform: the message names those there are),
        PermissionDenied, Unavailable, InvalidArgument (content that does not fit its digest, a layer that leaves its
        directory), ResourceExhausted. After Unavailable or a cancellation what was downloaded is kept for the next try.
        """
        reference = Reference.parse(name).with_default_tag()
        if (reference.domain, reference.path) == (DEFAULT_DOMAIN, "library/scratch"):
            raise InvalidArgument("'scratch' is a reserved name")
        wanted = Platform.parse(platform) if platform else self._platform
        progress(ProgressEvent(reference.digest or reference.tag or "", f"Pulling from {reference.path}"))
        lease = f"pull {reference}"
        with self._keeper.holding(lease) as hold:
            async with self.sources(reference, credentials) as registry:
                found = await resolve_manifest(registry, reference, wanted)
                policy = read_policy(self._etc)
                await enforce(policy, reference, (found.top, found.digest), registry)
                manifest, index = found.manifest, None
                hold.add([found.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)])
                self.content.put(found.data)
                others: dict[str, Descriptor] = {}
                if all_platforms and found.top != found.digest:
                    tree = await read_tree(registry, self.content, hold, found.top)
                    for entry in tree.images():  # a signature of the index is one of each, one of ours is not
                        await enforce(policy, reference, (found.top, entry.digest), registry)
                    index = tree.record()
                    hold.add(index.digests())
                    others = {digest: blob for digest, blob in tree.blobs.items() if digest not in self._blobs(manifest)}
                self._keeper.lease(lease, life=PULL_LEASE, blobs=hold.items)
                config = await self._installer.config(manifest, registry.blob)
                found.check_platform(config.platform, wanted, reference)
                await self._installer.blobs(others.values(), registry.blob, progress)
                names = [str(reference.digested(found.top))]
                if reference.digest is None:
                    names.append(str(reference))
                known = all(self._names.get(each) == manifest.config.digest for each in names)
                image = await self._install(hold, manifest, found.digest, config, registry.blob, names, progress,
                                            index=index or self._indexes.find(found.top))
                self._keeper.came_from([*self._blobs(manifest), *others], reference.domain, reference.path)
        progress(ProgressEvent("", f"Digest: {found.top}"))
        status = "Image is up to date" if known else "Downloaded newer image"
        progress(ProgressEvent("", f"Status: {status} for {reference.familiar()}"))
        return image

    async def push(
        self, name: str, *, all_platforms: bool = False, credentials: Credentials | None = None,
        progress: Progress = silent,
    ) -> str:
        """Push what a name stands for, to the registry in it: under its tag, or under its digest for ``NAME@DIGEST``. With
        ``all_platforms``, and for an index's digest, the whole index. Returns the digest, which is the one that was
        pulled or loaded.

        Raises NotFound (no such name here), PermissionDenied, Unavailable, FailedPrecondition when blobs were lost, or
        when the name is one of an index of which only one image is here.
        """
        reference = Reference.parse(name).with_default_tag()
        try:
            image_id, _ = self._names.resolve(str(reference), self._images)
        except NotFound:
            raise NotFound(f"An image does not exist locally with the tag: {reference.familiar()}") from None
        record = self._images[image_id]
        index = self._indexes.get(str(reference))
        if reference.digest is not None:
            all_platforms = reference.digest != record.manifest
        if all_platforms and index is None and any(
                each.digest not in (None, record.manifest) for each in self._names.of(image_id)):
            raise FailedPrecondition(f"{reference.familiar()} is an index: only its image {record.manifest} is here",
                                     hint="dolium pull --all-platforms brings all of it")
        if all_platforms and index is not None:
            return await self._push_index(reference, record.id, index, credentials, progress)
        config = Descriptor("", record.id, record.config_size)
        blobs = [*(Descriptor(layer.media_type, layer.digest, layer.size) for layer in record.layers), config]
        progress(ProgressEvent("", f"The push refers to repository [{reference.name}]"))
        with self._keeper.holding() as hold:
            hold.add(record.blobs())
            manifest = Descriptor(record.media_type, record.manifest, self.content.size(record.manifest))
            subject = parse_artifact(self.content.read(record.manifest, limit=MANIFEST_MAX), record.media_type).subject
            await self._send(reference, credentials, manifest, blobs, reference.tag or "", progress, subject=subject,
                             quiet=frozenset([record.id]))
        return self._pushed(reference, record.id, record.manifest, record.blobs() - {record.manifest})

    async def _push_index(
        self, reference: Reference, image_id: str, index: IndexRecord, credentials: Credentials | None, progress: Progress
    ) -> str:
        digest, size, media_type = index.manifests[-1]
        blobs = blobs_of(index)
        progress(ProgressEvent("", f"The push refers to repository [{reference.name}]"))
        with self._keeper.holding() as hold:
            hold.add(index.digests())
            require_blobs(self.content, [Descriptor("", *each[:2]) for each in index.manifests], reference.familiar())
            children = await asyncio.to_thread(to_send, index, self.content, MANIFEST_MAX)
            await self._send(reference, credentials, Descriptor(media_type, digest, size), list(blobs.values()),
                             reference.tag or "", progress, children=children)
        return self._pushed(reference, image_id, digest, blobs, index)

    def _pushed(
        self, reference: Reference, image_id: str, digest: str, blobs: Iterable[str], index: IndexRecord | None = None
    ) -> str:
        self._keeper.came_from(blobs, reference.domain, reference.path)
        pushed = str(reference.digested(digest))
        if image_id in self._images and self._names.get(pushed) is None:
            self._rename(Change(tag={pushed: image_id}), index)
        return digest

    async def _send(
        self, reference: Reference, credentials: Credentials | None, manifest: Descriptor, blobs: Sequence[Descriptor],
        tag: str, progress: Progress, *, subject: Descriptor | None = None, quiet: frozenset[str] = frozenset(),
        children: Sequence[tuple[Descriptor, Descriptor | None]] = (),
    ) -> None:
        require_blobs(self.content, [*blobs, manifest], reference.familiar())
        endpoint = read_settings(self._etc).home(reference)
        async with RegistryClient(reference, credentials, endpoint=endpoint, actions="pull,push") as registry:
            await push(registry, self.content, manifest, blobs, self._elsewhere(reference, blobs), tag, progress,
                       subject=subject, quiet=quiet, children=children)

    def _elsewhere(self, reference: Reference, blobs: Iterable[Descriptor]) -> dict[str, list[str]]:
        """Blob to the other repositories of the host it was pulled from or pushed to."""
        found = {blob.digest: self._keeper.sources(blob.digest, reference.domain) for blob in blobs}
        return {digest: [path for path in paths if path != reference.path] for digest, paths in found.items()}

    async def login(self, server: str, credentials: Credentials) -> str:
        """See ``sources.login``."""
        return await login(server, credentials, read_settings(self._etc))

    async def load(
        self, source: Path | BinaryIO, *, all_platforms: bool = False, progress: Progress = silent
    ) -> list[Image]:
        """Load an OCI layout (directory or tar) or a ``docker save`` archive; plain or compressed, file or stream.
        ``all_platforms`` keeps whole the indexes that have a name in it.

        Names in the archive move to its images. Raises PermissionDenied by the signature policy; InvalidArgument and
        ResourceExhausted: the images before the one at fault are then loaded.
        """
        images: dict[str, Image] = {}
        path = source if isinstance(source, Path) else None
        with self._keeper.holding() as hold:
            read = await self._read(
                hold, lambda cancel: archives.read_archive(self.content, source, self._platform, cancel, whole=all_platforms)
            )
            hold.add(read.blobs)  # those that were there before, too
            for found in read.images:
                enforce_file(read_policy(self._etc), read.transport, path, found.label)
            for found in read.images:
                config = await self._installer.config(found.manifest, no_source)
                image = await self._install(
                    hold, found.manifest, found.digest, config, no_source, map(str, found.names), progress,
                    index=found.index)
                images[image.id] = image  # one that is there twice is told of once, with all its names
        for image in images.values():
            for tag in image.repo_tags or (image.id,):
                progress(ProgressEvent("", f"Loaded image{'' if image.repo_tags else ' ID'}: {tag}"))
        return list(images.values())

    async def import_tar(
        self, source: Path | BinaryIO, *, name: str | None = None, config: Mapping[str, object] | None = None,
        changes: Iterable[str] = (), message: str = "", platform: str | None = None, progress: Progress = silent,
    ) -> Image:
        """Make a root file system's tar a one-layer image. ``config`` has Docker's keys (Cmd, Env, Entrypoint,
        WorkingDir …); ``changes`` are Dockerfile instructions applied on top. Raises InvalidArgument,
        ResourceExhausted.
        """
        names = self._new_name(name)
        enforce_file(read_policy(self._etc), TARBALL)
        settings = apply_changes(config or {}, changes)
        target = Platform.parse(platform) if platform else self._platform
        with self._keeper.holding() as hold:
            layer = await self._read(hold, lambda cancel: archives.read_root(self.content, source, cancel))
            hold.add([layer.digest])
            unpacked = await self._installer.unpack_unknown(layer.digest, layer.size, progress)
            hold.add([chain_key(unpacked.diff_id)])
            created = rfc3339(time.time())
            document = {
                "architecture": target.architecture, "os": target.os, "created": created, "config": settings,
                "rootfs": {"type": "layers", "diff_ids": [unpacked.diff_id]},
                "history": [{"created": created, "comment": message or "Imported from -"}],
            }
            if target.variant:
                document["variant"] = target.variant
            data = json.dumps(document, separators=(",", ":")).encode()
            parsed = parse_config(data)  # before it is stored: a wrong `config` is the caller's mistake
            digest = self.content.put(data)
            manifest = Manifest(OCI_MANIFEST, Descriptor(OCI_CONFIG, digest, len(data)), (layer,))
            top = archives.put_manifest(self.content, manifest)
            hold.add([digest, top])
            self._sizes[unpacked.diff_id] = unpacked.size
            return await self._install(hold, manifest, top, parsed, no_source, names, progress)

    async def commit(
        self, image_id: str, pack: Callable[[Write], int], settings: Mapping[str, object], *, name: str | None = None,
        author: str = "", message: str = "", command: str = "",
    ) -> Image:
        """A new image: ``image_id`` and on top what ``pack`` writes as a tar, which returns the number of its entries and
        blocks. ``settings`` is the whole ``config`` object. Without an entry there is no new layer.

        Raises NotFound, InvalidArgument, FailedPrecondition when the image's own blobs were lost, ResourceExhausted.
        """
        reference = self._new_name(name)
        with self._keeper.holding() as hold:
            record, base = self._record(image_id), self.config(image_id)
            hold.add([*record.blobs(), *map(chain_key, record.chains())])
            below = [Descriptor(layer.media_type, layer.digest, layer.size) for layer in record.layers]
            require_blobs(self.content, below, f"image {image_id}")
            layer: Layer | None = await self._read(hold, lambda cancel: write_layer(self.content, pack, cancel))
            if layer is not None and not layer.entries:
                layer = None
            data = config_document(base, layer, settings, author=author, message=message, command=command)
            parsed = parse_config(data)
            config = Descriptor(OCI_CONFIG, self.content.put(data), len(data))
            manifest = new_manifest(below, layer, OCI_MANIFEST, config)
            top = archives.put_manifest(self.content, manifest)
            hold.add([config.digest, top])
            return await self._install(hold, manifest, top, parsed, no_source, reference, silent)

    @staticmethod
    def _new_name(name: str | None) -> list[str]:
        """The canonical form of a name to give, in a list; none without. Raises InvalidArgument."""
        if not name:
            return []
        reference = Reference.parse(name).with_default_tag()
        if reference.digest is not None:
            raise InvalidArgument(f"cannot give the name {reference.familiar()}: a digest is not a name to give")
        return [str(reference)]

    async def _read(self, hold: Hold, work: Callable[[threading.Event], _T]) -> _T:
        """Read an archive in a thread; every blob it brought is held before another call can collect it."""
        before = set(self.content.digests())
        cancel = threading.Event()
        self._keeper.reading += 1
        running = asyncio.get_running_loop().run_in_executor(self._readers, work, cancel)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            cancel.set()
            await settled(running)
            raise
        finally:
            # What is new came from this archive or belongs to a pull, which holds it too.
            hold.add(set(self.content.digests()) - before)
            self._keeper.reading -= 1

    async def _install(
        self, hold: Hold, manifest: Manifest, digest: str, config: ImageConfig, fetch: Fetch, names: Iterable[str],
        progress: Progress, *, index: IndexRecord | None = None,
    ) -> Image:
        hold.add([digest, *self._blobs(manifest), *map(chain_key, config.chain_ids)])
        self._sizes.update(await self._installer.layers(manifest, config, fetch, progress))
        await self._installer.sync()
        record = self._installer.record(manifest, digest, config)
        moved = dict.fromkeys(names, record.id)
        sizes = {chain: self._sizes.get(chain, 0) for chain in record.chains()}
        self._rename(Change(put=[record], tag=moved, layers=sizes), index)
        self._images[record.id] = record
        faults.point("image.committed")
        return self._view(record)

    def _rename(self, change: Change, index: IndexRecord | None = None) -> None:
        """Commit what moves or removes names: those that are moved stand for ``index`` as well, or for none any more."""
        put, gone = self._indexes.follow(change.tag, change.untag, index)
        self._records.commit(replace(change, put_indexes=put, delete_indexes=gone))
        self._names.update(change.tag, change.untag)
        self._keeper.suspect(self._indexes.update(put, gone))

    @staticmethod
    def _blobs(manifest: Manifest) -> list[str]:
        return [manifest.config.digest, *(layer.digest for layer in manifest.layers)]

    # Artifacts

    def artifacts(self) -> list[ArtifactRecord]:
        """All artifacts, by name."""
        return sorted(self._artifacts.values(), key=lambda artifact: artifact.name)

    def artifact(self, name: str) -> tuple[ArtifactRecord, bytes]:
        """An artifact's record and its manifest. Raises NotFound."""
        canonical = str(Reference.parse(name).with_default_tag())
        if canonical not in self._artifacts:
            raise NotFound(f"No such artifact: {name}")
        record = self._artifacts[canonical]
        return record, self.content.read(record.digest, limit=MANIFEST_MAX)

    async def pull_artifact(
        self, name: str, *, credentials: Credentials | None = None, progress: Progress = silent
    ) -> ArtifactRecord:
        """Fetch what a name stands for without unpacking it. Raises as ``pull``, InvalidArgument for an image or index."""
        reference = Reference.parse(name).with_default_tag()
        lease = f"pull {reference}"
        progress(ProgressEvent(reference.digest or reference.tag or "", f"Pulling from {reference.path}"))
        with self._keeper.holding(lease) as hold:
            async with self.sources(reference, credentials) as registry:
                data, media_type, digest = await registry.manifest(reference.digest or reference.tag or "")
                found = parse_artifact(data, media_type, what=f"manifest {reference.familiar()}")
                if is_image(found):
                    raise InvalidArgument(f"{reference.familiar()} is an image", hint="dolium pull")
                await enforce(read_policy(self._etc), reference, (digest,), registry)
                blobs = [found.config, *found.blobs]
                hold.add([digest, *(blob.digest for blob in blobs)])
                self._keeper.lease(lease, life=PULL_LEASE, blobs=hold.items)
                self.content.put(data)
                await self._installer.blobs({blob.digest: blob for blob in blobs}.values(), registry.blob, progress)
            record = await self._keep_artifact(reference, digest, found)
        progress(ProgressEvent("", f"Digest: {digest}"))
        return record

    async def make_artifact(
        self, name: str, source: BinaryIO, *, artifact_type: str, annotations: Mapping[str, str], subject: str = ""
    ) -> ArtifactRecord:
        """An artifact of a tar's files. ``subject`` is the name of an image here that it is about. Raises NotFound,
        InvalidArgument.
        """
        reference = Reference.parse(self._new_name(name)[0])
        about = self.manifest_descriptor(subject) if subject else None
        with self._keeper.holding() as hold:
            digest = await self._read(hold, lambda cancel: artifacts.make(
                self.content, source, artifact_type=artifact_type, annotations=annotations, subject=about, cancel=cancel))
            found = parse_artifact(self.content.read(digest, limit=MANIFEST_MAX))
            hold.add([digest, found.config.digest, *(blob.digest for blob in found.blobs)])
            return await self._keep_artifact(reference, digest, found)

    async def _keep_artifact(self, reference: Reference, digest: str, found: Artifact) -> ArtifactRecord:
        await self._installer.sync()
        record = ArtifactRecord(str(reference), digest, found.media_type, found.artifact_type, time.time(),
                                tuple((blob.digest, blob.size) for blob in (found.config, *found.blobs)))
        before = self._artifacts.get(record.name)
        self._records.commit(Change(put_artifacts=[record]))
        self._artifacts[record.name] = record
        if before is not None:
            self._keeper.suspect(before.digests())
        return record

    def manifest_descriptor(self, name: str) -> Descriptor:
        """The manifest of an image here, as others refer to it. Raises NotFound."""
        record = self._images[self._names.resolve(name, self._images)[0]]
        return Descriptor(record.media_type, record.manifest, self.content.size(record.manifest))

    async def push_artifact(
        self, name: str, *, credentials: Credentials | None = None, progress: Progress = silent
    ) -> str:
        """Push an artifact under its name; its subject's registry learns of it. Returns its digest. Raises as ``push``."""
        record, data = self.artifact(name)
        reference, found = Reference.parse(record.name), parse_artifact(data, record.media_type)
        progress(ProgressEvent("", f"The push refers to repository [{reference.name}]"))
        with self._keeper.holding() as hold:
            hold.add(record.digests())
            await self._send(reference, credentials, Descriptor(record.media_type, record.digest, len(data)),
                             [found.config, *found.blobs], reference.tag or "", progress, subject=found.subject)
        return record.digest

    def drop_artifact(self, name: str) -> str:
        """Remove an artifact; returns its digest. Raises NotFound."""
        record = self._artifacts.get(str(Reference.parse(name).with_default_tag()))
        if record is None:
            raise NotFound(f"No such artifact: {name}")
        self._records.commit(Change(delete_artifacts=[record.name]))
        del self._artifacts[record.name]
        self._keeper.suspect(record.digests())
        self._keeper.collect()
        return record.digest

    # What a registry says

    def sources(self, reference: Reference, credentials: Credentials | None = None) -> Sources:
        """Where a name is pulled from, mirrors included; to be entered. Raises PermissionDenied for a blocked registry."""
        return Sources(reference, credentials, read_settings(self._etc))

    async def remote_manifest(
        self, name: str, *, credentials: Credentials | None = None
    ) -> tuple[Descriptor, bytes]:
        """What a registry has under a name, not followed and not kept. Raises NotFound and what ``pull`` does."""
        reference = Reference.parse(name).with_default_tag()
        async with self.sources(reference, credentials) as registry:
            data, media_type, digest = await registry.manifest(reference.digest or reference.tag or "")
        return Descriptor(media_type, digest, len(data)), data

    async def remote_tags(self, name: str, *, credentials: Credentials | None = None) -> list[str]:
        """All tags of a repository in its registry. Raises as ``pull``."""
        async with self.sources(Reference.parse(name), credentials) as registry:
            return await registry.tags()

    async def referrers(
        self, name: str, *, artifact_type: str = "", credentials: Credentials | None = None
    ) -> tuple[str, list[JsonObject]]:
        """The digest a name stands for in its registry, and descriptors of what refers to it. Raises as ``pull``."""
        reference = Reference.parse(name).with_default_tag()
        async with self.sources(reference, credentials) as registry:
            digest = reference.digest or (await registry.manifest(reference.tag or ""))[2]
            return digest, await registry.referrers(digest, artifact_type)

    # Looking after it: see ``repair``

    def records(self) -> list[ImageRecord]:
        """All images' records."""
        return list(self._images.values())

    def find_record(self, image_id: str) -> ImageRecord | None:
        """An image's record, None when it is gone."""
        return self._images.get(image_id)

    def names_of(self, image_id: str) -> list[Reference]:
        """All references to an image."""
        return self._names.of(image_id)

    def live_users(self, image_ids: Iterable[str]) -> list[str]:
        """Running containers made from any of these images."""
        return [use.container for image in image_ids for use in self._in_use(image) if use.running]

    def indexes(self) -> list[IndexRecord]:
        """All indexes that are here whole, by name."""
        return self._indexes.all()

    async def refetch_index(self, index: IndexRecord, credentials: Credentials | None) -> None:
        """Have all blobs of an index again, from the registry of its name. Raises as ``pull``."""
        reference = Reference.parse(index.name)
        with self._keeper.holding() as hold:
            hold.add(index.digests())
            async with self.sources(reference, credentials) as registry:
                tree = await read_tree(registry, self.content, hold, index.digest)
                await self._installer.blobs(tree.blobs.values(), registry.blob, silent)
            await self._installer.sync()

    def drop_index(self, index: IndexRecord) -> None:
        """Keep no more of an index than the image that its name stands for."""
        self._records.commit(Change(delete_indexes=[index.name]))
        self._keeper.suspect(self._indexes.update([], [index.name]))
        self._keeper.collect()

    def lost_names(self) -> list[str]:
        """Canonical names that stand for an image that is not there."""
        return sorted(name for name, image in self._names.all().items() if image not in self._images)

    def drop_name(self, name: str) -> None:
        """Forget one canonical name."""
        self._rename(Change(untag=[name]))

    def drop_image(self, image_id: str) -> None:
        """Forget an image with all its names. Raises NotFound, FailedPrecondition when a container was made from it."""
        record = self._record(image_id)
        if uses := self._in_use(image_id):
            raise FailedPrecondition(f"container {uses[0].container[:12]} was made from it")
        self._drop(record, tuple(map(str, self._names.of(image_id))))
        self._keeper.collect()

    async def reinstall(self, record: ImageRecord, fetch: Fetch, fetch_manifest: Callable[[], Awaitable[bytes]]) -> None:
        """Bring back what an image has lost: manifest, config, blobs, unpacked layers. Raises what the fetches raise."""
        config = Descriptor(OCI_CONFIG, record.id, record.config_size)
        layers = tuple(Descriptor(layer.media_type, layer.digest, layer.size) for layer in record.layers)
        manifest = Manifest(record.media_type, config, layers)
        with self._keeper.holding() as hold:
            hold.add([*record.blobs(), *map(chain_key, record.chains())])
            if not self.content.has(record.manifest):
                data = await fetch_manifest()
                if self.content.put(data) != record.manifest:
                    raise InvalidArgument(f"manifest {record.manifest} has other content now")
            self._configs.pop(record.id, None)
            parsed = await self._installer.config(manifest, fetch)
            await self._install(hold, manifest, record.manifest, parsed, fetch, [], silent)

    # Taking images out

    def saving(
        self, names: Sequence[str], *, all_platforms: bool = False
    ) -> tuple[list[Saved], Callable[[], AsyncGenerator[bytes, None]]]:
        """What ``docker save`` of these names would take along, and the archive of it. A repository without a tag stands
        for all its tags, an ID for an image without a name. With ``all_platforms``, names of an index stand for all of it.

        Raises NotFound, InvalidArgument, FailedPrecondition when blobs were lost; nothing is read before the archive is
        iterated, and then what it needs is held.
        """
        wanted: dict[str, dict[str, Reference]] = {}
        for name in names:
            for image_id, reference in self._to_save(name):
                wanted.setdefault(image_id, {})
                if reference is not None:
                    wanted[image_id][str(reference)] = reference
        images = [
            Saved(self._images[id], tuple(found.values()), {
                name: index for name in found if all_platforms and (index := self._indexes.get(name)) is not None})
            for id, found in wanted.items()
        ]
        for image in images:
            blobs = [Descriptor("", layer.digest, layer.size) for layer in image.record.layers]
            blobs += [blob for index in image.indexes.values() for blob in blobs_of(index).values()]
            require_blobs(self.content, blobs, f"image {image.record.id}")

        async def read() -> AsyncGenerator[bytes, None]:
            with self._keeper.holding() as hold:
                for image in images:
                    hold.add(image.blobs())
                async for data in saver.archive(self.content, images):
                    yield data

        return images, read

    def _to_save(self, name: str) -> list[tuple[str, Reference | None]]:
        try:
            parsed: Reference | None = Reference.parse(name)
        except InvalidArgument:
            parsed = None
        if parsed is not None and parsed.tag is None and parsed.digest is None:
            tagged = [(image, each) for image in self._images for each in self._names.of(image)
                      if each.tag and each.name == parsed.name]
            if tagged:
                return [(image, each) for image, each in tagged]
        image_id, reference = self._names.resolve(name, self._images)
        return [(image_id, reference if reference is not None and reference.tag else None)]

    # Finding

    def resolve(self, name: str) -> Image:
        """The image of a name, digest, ID or ID prefix. Raises NotFound (``No such image: X``), InvalidArgument."""
        image_id, _ = self._names.resolve(name, self._images)
        return self._view(self._images[image_id])

    def images(self) -> list[Image]:
        """All images, newest first."""
        images = [self._view(record) for record in self._images.values()]
        return sorted(images, key=lambda image: (image.created, image.id), reverse=True)

    def config(self, image_id: str) -> ImageConfig:
        """The image's configuration, parsed; ``raw`` is the document itself. Raises NotFound."""
        record = self._record(image_id)
        if record.id not in self._configs:
            self._configs[record.id] = parse_config(self.content.read(record.id, limit=CONFIG_MAX))
        return self._configs[record.id]

    def history(self, image_id: str) -> list[HistoryLine]:
        """The lines of ``docker history``, newest first. Raises NotFound."""
        record = self._record(image_id)
        return view.history(record, self.config(image_id), self._sizes, self._view(record).repo_tags)

    def layer_sizes(self) -> dict[str, int]:
        """Chain ID -> bytes of its files, of every layer once: what ``docker system df`` adds up."""
        used = {chain for record in self._images.values() for chain in record.chains()}
        return {chain: self._sizes.get(chain, 0) for chain in used}

    def _record(self, image_id: str) -> ImageRecord:
        try:
            return self._images[image_id]
        except KeyError:
            raise NotFound(f"No such image: {image_id}") from None

    def _view(self, record: ImageRecord) -> Image:
        return view.image(record, self._names.of(record.id), self._sizes)

    # Changing

    def tag(self, source: str, target: str) -> Image:
        """Give an image another name; a name that is taken moves. Raises NotFound, InvalidArgument."""
        reference = Reference.parse(target).with_default_tag()
        if reference.digest is not None:
            raise InvalidArgument(f"refusing to create a tag with a digest reference: {target}")
        image_id, known = self._names.resolve(source, self._images)
        self._rename(Change(tag={str(reference): image_id}), self._indexes.get(str(known)) if known else None)
        self._keeper.collect()
        return self._view(self._images[image_id])

    async def remove(self, name: str, *, force: bool = False) -> Sequence[Removal]:
        """``docker rmi``: see ``names.plan_removal``. Layers and blobs other images share stay.

        Raises NotFound, FailedPrecondition; nothing is changed then.
        """
        image_id, reference = self._names.resolve(name, self._images)
        names = self._names.of(image_id)
        plan = plan_removal(names, image_id, reference, self._in_use(image_id), force)
        removals = [Removal("Untagged", Reference.parse(gone).familiar()) for gone in plan.untag]
        if plan.delete:
            record = self._images[image_id]
            self._drop(record, plan.untag)
            removals.append(Removal("Deleted", image_id))
            gone = {removal.value: removal for removal in self._keeper.collect()}
            removals += [gone[chain] for chain in reversed(record.chains()) if chain in gone]
        else:
            self._rename(Change(untag=plan.untag))
            self._keeper.collect()
        return removals

    def _drop(self, record: ImageRecord, untag: Sequence[str]) -> None:
        """The record goes before its files: an image that is listed is whole, and recovery finds the rest."""
        others = {chain for image in self._images.values() if image is not record for chain in image.chains()}
        self._rename(
            Change(delete=[record.id], untag=untag, delete_layers=[c for c in record.chains() if c not in others])
        )
        del self._images[record.id]
        self._configs.pop(record.id, None)
        self._keeper.suspect([*record.blobs(), *map(chain_key, record.chains())])
        faults.point("image.dropped")

    # Garbage

    async def prune(self, wanted: Callable[[Image], bool]) -> tuple[list[Removal], int]:
        """Remove the images that no container was made from and that ``wanted`` says yes to, with all their names.

        Returns ``docker rmi``'s lines, and the bytes of layers and blobs that went.
        """
        removals: list[Removal] = []
        before = self._keeper.freed
        self._keeper.drop_expired()
        for image in self.images():
            if self._in_use(image.id) or not wanted(image):
                continue
            names = self._names.of(image.id)
            removals += [Removal("Untagged", name.familiar()) for name in names]
            removals.append(Removal("Deleted", image.id))
            self._drop(self._images[image.id], tuple(map(str, names)))
        removals += self._keeper.collect()
        return removals, self._keeper.freed - before

    def leases(self) -> list[Lease]:
        """All leases, oldest first; those of pulls too."""
        return sorted(self._keeper.leases.values(), key=lambda lease: lease.created)

    def labels(self, digest: str) -> dict[str, str]:
        """The labels of a blob."""
        return dict(self._keeper.labels.get(digest, {}))

    def lease(self, id: str, *, life: float, blobs: Iterable[str] = (), labels: Mapping[str, str] | None = None) -> Lease:
        """A new lease: see ``Keeper.lease``."""
        return self._keeper.lease(id, life=life, blobs=blobs, labels=labels, new=True)

    def end_lease(self, id: str) -> None:
        """End a lease and collect what it alone kept. Raises NotFound."""
        self._keeper.release(id)
        self._keeper.collect()

    def content_bytes(self) -> int:
        """Bytes of all blobs, each once."""
        return sum(self.content.size(digest) for digest in self.content.digests())

    def _referenced(self) -> set[str]:
        """What the records name: blobs, and layers by their ``chain_key``."""
        referenced = self._indexes.digests()
        for image in self._images.values():
            referenced.update(image.blobs(), map(chain_key, image.chains()))
        for artifact in self._artifacts.values():
            referenced.update(artifact.digests())
        return referenced

    def _complete(self, image: ImageRecord) -> bool:
        """Layers, config and manifest are there; a compressed layer may be missing, an unpacked one may not."""
        return (
            all(self.snapshots.has_layer(chain) for chain in image.chains())
            and self.content.has(image.id)
            and self.content.has(image.manifest)
        )
