"""``save``: images as one tar that is both an OCI image layout and what ``docker load`` reads, as Docker's is since 25.

    oci-layout, index.json          OCI image-spec 1.1; each image's names as annotations
    manifest.json, repositories     Docker's; paths lead into blobs/
    blobs/sha256/HEX                each once, as the store has them: digests are what they were when they were pulled

The same images under the same names make the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import tarfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

from dolium import faults
from dolium.images.archive import IMAGE_NAME, REF_NAME
from dolium.images.content import CHUNK, ContentStore
from dolium.images.manifest import OCI_INDEX
from dolium.images.platform import Platform
from dolium.images.records import ImageRecord, IndexRecord
from dolium.images.reference import Reference

faults.register("save.begun")


@dataclass(frozen=True, slots=True)
class Saved:
    """An image to save, and the names it shall have; none when it was asked for by its ID. ``indexes``: of names that shall
    stand for all of one.
    """

    record: ImageRecord
    names: tuple[Reference, ...]
    indexes: Mapping[str, IndexRecord] = field(default_factory=dict)

    def blobs(self) -> set[str]:
        """Digests of all it takes along."""
        return self.record.blobs().union(*(index.digests() for index in self.indexes.values()))


def _file(name: str) -> str:
    return "blobs/sha256/" + name.removeprefix("sha256:")


def index_json(images: Sequence[Saved], sizes: dict[str, int]) -> bytes:
    """The layout's index: an entry for each name, or one for an image without. ``sizes`` of manifests in bytes."""
    entries = []
    for image in images:
        platform = Platform.parse(image.record.platform)
        where = {"os": platform.os, "architecture": platform.architecture}
        if platform.variant:
            where["variant"] = platform.variant
        entry = {"mediaType": image.record.media_type, "digest": image.record.manifest,
                 "size": sizes[image.record.manifest], "platform": where}
        for name in image.names or (None,):
            named = {"annotations": {IMAGE_NAME: str(name), REF_NAME: name.tag or ""}} if name is not None else {}
            index = image.indexes.get(str(name))
            if index is not None:
                digest, size, media_type = index.manifests[-1]
                entries.append({"mediaType": media_type, "digest": digest, "size": size} | named)
            else:
                entries.append(entry | named)
    return _json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})


def manifest_json(images: Sequence[Saved]) -> bytes:
    """Docker's list: config, names as people write them, layers bottom first."""
    return _json([
        {"Config": _file(image.record.id), "RepoTags": [name.familiar() for name in image.names] or None,
         "Layers": [_file(layer.digest) for layer in image.record.layers]} for image in images
    ])


def repositories(images: Sequence[Saved]) -> bytes:
    """Docker's oldest: repository to tag to ID, which nobody needs any more and some still look for."""
    found: dict[str, dict[str, str]] = {}
    for image in images:
        for name in image.names:
            if name.tag:
                found.setdefault(name.familiar_name, {})[name.tag] = image.record.id.removeprefix("sha256:")
    return _json(found)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


async def archive(content: ContentStore, images: Sequence[Saved]) -> AsyncGenerator[bytes, None]:
    """The tar, piece by piece. The blobs must be held."""
    sizes = {image.record.manifest: content.size(image.record.manifest) for image in images}
    digests = sorted({digest for image in images for digest in image.blobs()})
    faults.point("save.begun")
    yield _header("oci-layout", len(_LAYOUT)) + _padded(_LAYOUT)
    for folder in ("blobs/", "blobs/sha256/"):
        yield _header(folder, 0, tarfile.DIRTYPE)
    async for data in _blobs(content, [(_file(digest), digest) for digest in digests]):
        yield data
    for name, data in (("index.json", index_json(images, sizes)), ("manifest.json", manifest_json(images)),
                       ("repositories", repositories(images))):
        yield _header(name, len(data)) + _padded(data)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


async def _blobs(content: ContentStore, files: Sequence[tuple[str, str]]) -> AsyncGenerator[bytes, None]:
    for name, digest in files:
        size = content.size(digest)
        yield _header(name, size)
        with content.open(digest) as file:
            left = size
            while left > 0 and (data := await asyncio.to_thread(file.read, min(CHUNK, left))):
                left -= len(data)
                yield data
        yield b"\0" * (left + -size % tarfile.BLOCKSIZE)


async def tar_blobs(content: ContentStore, files: Sequence[tuple[str, str]]) -> AsyncGenerator[bytes, None]:
    """A tar of blobs, each under the name given with its digest."""
    async for data in _blobs(content, files):
        yield data
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


_LAYOUT = _json({"imageLayoutVersion": "1.0.0"})


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode = size, kind, 0o755 if kind == tarfile.DIRTYPE else 0o444
    return info.tobuf(tarfile.GNU_FORMAT)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)
