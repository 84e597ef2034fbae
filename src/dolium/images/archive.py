"""Images from archives: an OCI image layout (directory or tar), ``docker save``'s archive, a root file system's tar.

An archive is read once, front to back, so that it may come from a pipe: every file in it goes into the content store as
it passes, and what no image turns out to need is collected afterwards. Everything here blocks.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from dolium.errors import InvalidArgument
from dolium.images import decompress
from dolium.images.content import CHUNK, ContentStore, Ingest
from dolium.images.decompress import Compression
from dolium.images.indexes import Tree
from dolium.images.manifest import (
    INDEXES,
    MANIFEST_MAX,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    parse_artifact,
    parse_manifest,
)
from dolium.images.platform import Platform, choose, describe
from dolium.images.records import IndexRecord
from dolium.images.reference import Reference, is_digest
from dolium.images.trust import DOCKER_ARCHIVE, OCI_ARCHIVE, OCI_FOLDER
from dolium.images.unpack import Cancelled

IMAGE_NAME = "io.containerd.image.name"  # the whole name, by containerd, BuildKit and Docker
REF_NAME = "org.opencontainers.image.ref.name"  # often only a tag
_LINKS = 10


@dataclass(frozen=True, slots=True)
class Found:
    """An image of an archive: its manifest, stored already, and the names the archive gives it. ``index``: what they stand
    for beside it, all of which is stored.
    """

    manifest: Manifest
    digest: str
    names: tuple[Reference, ...]
    index: IndexRecord | None = None
    label: str = ""  # its name in an OCI layout, as it is written there


@dataclass(slots=True)
class Archive:
    """What was read: the images, and every blob that was written for them or found; ``transport``: what containers' tools
    call the format.
    """

    images: list[Found] = field(default_factory=list)
    blobs: set[str] = field(default_factory=set)
    transport: str = DOCKER_ARCHIVE


class _Files(Protocol):
    """The files of an archive, in the content store once they were asked for."""

    def find(self, name: str) -> tuple[str, int] | None:
        """Digest and size of the file of that name, or None."""


def read_archive(
    content: ContentStore, source: Path | BinaryIO, platform: Platform, cancel: threading.Event, *, whole: bool = False
) -> Archive:
    """Read a directory, a file or a stream, compressed or not. ``platform`` chooses from nested indexes, which are kept
    ``whole`` under their names if asked for.

    Raises InvalidArgument when it is neither format or damaged, Cancelled. Blobs stored until then are left.
    """
    archive = Archive()
    if isinstance(source, Path) and source.is_dir():
        _read_files(content, _Directory(content, source, archive, cancel), archive, platform, whole)
    elif isinstance(source, Path):
        with open(source, "rb", buffering=0) as file:
            _read_files(content, _Tar(content, cast(BinaryIO, file), archive, cancel), archive, platform, whole)
    else:
        _read_files(content, _Tar(content, source, archive, cancel), archive, platform, whole)
    return archive


def _read_files(content: ContentStore, files: _Files, archive: Archive, platform: Platform, whole: bool) -> None:
    # Docker writes both since version 25; its manifest.json is the one with the names.
    if (found := files.find("manifest.json")) is not None:
        _docker_images(content, files, archive, found, whole)
    elif (found := files.find("index.json")) is not None:
        archive.transport = OCI_FOLDER if isinstance(files, _Directory) else OCI_ARCHIVE
        _layout_images(content, files, archive, found, platform, whole)
    else:
        raise InvalidArgument("no image in the archive: it has neither manifest.json nor index.json")


# Where files come from


class _Directory:
    def __init__(self, content: ContentStore, root: Path, archive: Archive, cancel: threading.Event) -> None:
        self._content, self._archive, self._cancel = content, archive, cancel
        self._root = root.resolve()
        self._found: dict[str, tuple[str, int]] = {}

    def find(self, name: str) -> tuple[str, int] | None:
        path = (self._root / _clean(name)).resolve()
        if not path.is_relative_to(self._root):
            raise InvalidArgument(f"{name}: leads out of the image layout")
        if name not in self._found:
            if not path.is_file():
                return None
            with open(path, "rb", buffering=0) as file:
                self._found[name] = _store(self._content, cast(BinaryIO, file), self._archive, self._cancel)
        return self._found[name]


class _Stream:
    """A file made of an iterator of chunks, for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        parts: list[memoryview] = []
        while size != 0:
            if not self._left:
                self._left = memoryview(next(self._chunks, b""))
                if not self._left:
                    break
            part = self._left[:size] if size > 0 else self._left
            self._left = self._left[len(part):]
            size -= len(part) if size > 0 else 0
            parts.append(part)
        return b"".join(parts)


class _Tar:
    def __init__(self, content: ContentStore, file: BinaryIO, archive: Archive, cancel: threading.Event) -> None:
        self._files: dict[str, tuple[str, int]] = {}
        self._links: dict[str, str] = {}
        stream = cast(BinaryIO, _Stream(decompress.chunks(file)))
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:
                for member in tar:
                    self._take(content, tar, member, archive, cancel)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise InvalidArgument(f"not an image archive: {error}") from None

    def _take(
        self, content: ContentStore, tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Archive,
        cancel: threading.Event,
    ) -> None:
        name = _clean(member.name)
        if member.issym():
            # docker save before version 25 wrote one of two equal layers as a link to the other.
            self._links[name] = _clean(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            self._links[name] = _clean(member.linkname)
        elif member.isreg() and (data := tar.extractfile(member)) is not None:
            self._files[name] = _store(content, cast(BinaryIO, data), archive, cancel)

    def find(self, name: str) -> tuple[str, int] | None:
        name = _clean(name)
        for _ in range(_LINKS):
            if name not in self._links:
                break
            name = self._links[name]
        return self._files.get(name)


def _clean(name: str) -> str:
    clean = posixpath.normpath(name.lstrip("/"))
    if clean == ".." or clean.startswith("../"):
        raise InvalidArgument(f"{name}: leads out of the archive")
    return clean


def _copy(chunks: Iterator[bytes], ingest: Ingest, cancel: threading.Event) -> None:
    for data in chunks:
        if cancel.is_set():
            raise Cancelled
        ingest.write(data)


def _store(content: ContentStore, file: BinaryIO, archive: Archive, cancel: threading.Event) -> tuple[str, int]:
    with content.ingest(None) as ingest:
        _copy(iter(lambda: file.read(CHUNK), b""), ingest, cancel)
        digest = ingest.commit()
        archive.blobs.add(digest)
        return digest, ingest.offset


# What they say


def _document(content: ContentStore, found: tuple[str, int], what: str) -> object:
    try:
        return json.loads(content.read(found[0], limit=MANIFEST_MAX))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what}: not JSON: {error}") from None


def _docker_images(
    content: ContentStore, files: _Files, archive: Archive, found: tuple[str, int], whole: bool
) -> None:
    entries = _document(content, found, "manifest.json")
    known, indexes = _layout_manifests(content, files, whole)
    if not isinstance(entries, list):
        raise InvalidArgument("manifest.json: not a list")
    for entry in entries:
        if not isinstance(entry, dict):
            raise InvalidArgument("manifest.json: an entry is not an object")
        config, layers, tags = entry.get("Config"), entry.get("Layers") or [], entry.get("RepoTags") or []
        if not isinstance(config, str) or not _all_strings(layers) or not _all_strings(tags):
            raise InvalidArgument("manifest.json: Config, Layers or RepoTags of an entry are of the wrong type")
        config_digest, config_size = _need(files, config)
        descriptors = []
        for layer in layers:
            digest, size = _need(files, layer)
            descriptors.append(Descriptor(layer_type(content, digest), digest, size))
        stated = known.get((config_digest, tuple(descriptor.digest for descriptor in descriptors)))
        stored = None
        if stated is not None:  # the archive is an OCI layout, too: the image keeps its digest
            stored = parse_manifest(content.read(stated.digest, limit=MANIFEST_MAX), stated.media_type)
        if stated is not None and isinstance(stored, Manifest):
            manifest, digest = stored, stated.digest
        else:
            manifest = Manifest(OCI_MANIFEST, Descriptor(OCI_CONFIG, config_digest, config_size), tuple(descriptors))
            digest = put_manifest(content, manifest)
        archive.blobs.add(digest)
        names = tuple(Reference.parse(tag).with_default_tag() for tag in tags)
        kept: dict[IndexRecord | None, list[Reference]] = {}
        for name in names:
            kept.setdefault(indexes.get(str(name)), []).append(name)
        for of, named in kept.items() or [(None, [])]:
            archive.images.append(Found(manifest, digest, tuple(named), of))


def _layout_manifests(
    content: ContentStore, files: _Files, whole: bool
) -> tuple[dict[tuple[str, tuple[str, ...]], Descriptor], dict[str, IndexRecord]]:
    """The manifests an archive's index.json leads to, by config and layers; and the indexes it names, if asked for."""
    known: dict[tuple[str, tuple[str, ...]], Descriptor] = {}
    indexes: dict[str, IndexRecord] = {}
    found = files.find("index.json")
    if found is None:
        return known, indexes
    index = parse_manifest(content.read(found[0], limit=MANIFEST_MAX), what="index.json")
    for entry in index.images if isinstance(index, Index) else ():
        names = _layout_names(entry.annotations)
        if files.find(_blob_path(entry.digest)) is None:
            continue
        keep = whole and bool(names) and entry.media_type in INDEXES
        tree = _layout_tree(content, files, entry, keep)
        if keep:
            indexes.update((str(name), tree.record()) for name in names)
        for each in tree.images():  # some are no images at all: what is in manifest.json tells which
            found_one = parse_artifact(content.read(each.digest, limit=MANIFEST_MAX), each.media_type)
            known[found_one.config.digest, tuple(blob.digest for blob in found_one.blobs)] = each
    return known, indexes


def _layout_tree(content: ContentStore, files: _Files, entry: Descriptor, whole: bool) -> Tree:
    """What an entry of index.json leads to. All of it must be there when it is to be kept ``whole``."""
    tree = Tree(entry)
    while (each := tree.next()) is not None:
        if not whole and files.find(_blob_path(each.digest)) is None:
            tree.skip()  # Docker saves an index with one platform's image alone
            continue
        _layout_blob(files, each)
        tree.take(content.read(each.digest, limit=MANIFEST_MAX))
    if whole:
        for blob in tree.blobs.values():
            _layout_blob(files, blob)
    return tree


def _blob_path(digest: str) -> str:
    algorithm, _, encoded = digest.partition(":")
    return f"blobs/{algorithm}/{encoded}"


def _all_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _need(files: _Files, name: str) -> tuple[str, int]:
    found = files.find(name)
    if found is None:
        raise InvalidArgument(f"the archive lacks {name}")
    return found


def layer_type(content: ContentStore, digest: str) -> str:
    """The OCI media type of a layer, by its first bytes. Raises InvalidArgument for what a manifest cannot name."""
    with content.open(digest) as file:
        kind = decompress.detect(file.read(6))
    suffixes = {Compression.NONE: "", Compression.GZIP: "+gzip", Compression.ZSTD: "+zstd"}
    if kind not in suffixes:
        raise InvalidArgument(f"layer {digest}: compressed with {kind.value}, which images do not use")
    return OCI_LAYER + suffixes[kind]


def put_manifest(content: ContentStore, manifest: Manifest) -> str:
    """Write an OCI manifest for a config and layers that came without one; returns its digest."""
    document = {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": manifest.config.as_json(),
        "layers": [layer.as_json() for layer in manifest.layers],
    }
    return content.put(json.dumps(document, separators=(",", ":")).encode())


def _layout_images(
    content: ContentStore, files: _Files, archive: Archive, found: tuple[str, int], platform: Platform, whole: bool
) -> None:
    top = parse_manifest(content.read(found[0], limit=MANIFEST_MAX), what="index.json")
    if not isinstance(top, Index) or not top.images:
        raise InvalidArgument("index.json: no image in it")
    for entry in top.images:
        names = _layout_names(entry.annotations)
        manifest, digest = _layout_manifest(content, files, entry, platform)
        for descriptor in (manifest.config, *manifest.layers):
            _layout_blob(files, descriptor)
        keep = whole and names and entry.media_type in INDEXES
        index = _layout_tree(content, files, entry, True).record() if keep else None
        archive.images.append(Found(manifest, digest, names, index, entry.annotations.get(REF_NAME, "")))


def _layout_blob(files: _Files, descriptor: Descriptor) -> None:
    digest, _size = _need(files, _blob_path(descriptor.digest))
    if digest != descriptor.digest:
        raise InvalidArgument(f"blob {descriptor.digest} has the wrong content: its digest is {digest}")


def _layout_manifest(
    content: ContentStore, files: _Files, entry: Descriptor, platform: Platform
) -> tuple[Manifest, str]:
    for _ in range(_LINKS):  # an index may hold indexes
        _layout_blob(files, entry)
        data = content.read(entry.digest, limit=MANIFEST_MAX)
        parsed = parse_manifest(data, entry.media_type, what=f"manifest {entry.digest}")
        if isinstance(parsed, Manifest):
            return parsed, entry.digest
        offers = [(image.platform, image) for image in parsed.images]
        chosen = choose(platform, offers) or (offers[0][1] if len(offers) == 1 else None)
        if chosen is None:
            raise InvalidArgument(f"no image for {platform} in the archive: it has {describe([p for p, _ in offers])}")
        entry = chosen
    raise InvalidArgument(f"index {entry.digest}: nested too deep")


def _layout_names(annotations: Mapping[str, str]) -> tuple[Reference, ...]:
    """The entry's whole name; a bare tag names no repository and is left out."""
    name = annotations.get(IMAGE_NAME) or annotations.get(REF_NAME, "")
    if not name or not ("/" in name or ":" in name or IMAGE_NAME in annotations) or is_digest(name):
        return ()
    return (Reference.parse(name).with_default_tag(),)


# Root file systems


def read_root(content: ContentStore, source: Path | BinaryIO, cancel: threading.Event) -> Descriptor:
    """Store a root file system's tar as a layer blob. Plain, gzip and zstd stay as they are; bzip2 and xz, which no
    layer may have, are decompressed. Raises InvalidArgument, Cancelled.
    """
    if isinstance(source, Path):
        with open(source, "rb", buffering=0) as file:
            return read_root(content, cast(BinaryIO, file), cancel)
    first = b""
    while len(first) < 6 and (more := source.read(CHUNK)):
        first += more
    whole = cast(BinaryIO, _Stream(_prepend(first, source)))
    if decompress.detect(first) in (Compression.BZIP2, Compression.XZ):
        chunks = decompress.chunks(whole)
    else:
        chunks = iter(lambda: whole.read(CHUNK), b"")
    with content.ingest(None) as ingest:
        _copy(chunks, ingest, cancel)
        if ingest.offset == 0:
            raise InvalidArgument("the root file system's archive is empty")
        digest = ingest.commit()
    return Descriptor(layer_type(content, digest), digest, ingest.offset)


def _prepend(first: bytes, file: BinaryIO) -> Iterator[bytes]:
    if first:
        yield first
    while data := file.read(CHUNK):
        yield data
