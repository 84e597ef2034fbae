"""Whole indexes: the images of all platforms, kept beside the one that is unpacked, so that they can be sent on.

An index is kept under names, as an artifact is: it stays while a name stands for it, and its blobs with it. The same name
stands for one image of it, which is the one that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dolium.errors import InvalidArgument
from dolium.images.content import ContentStore
from dolium.images.keeping import Hold
from dolium.images.manifest import INDEXES, MANIFESTS, Descriptor, Index, parse_artifact, parse_manifest
from dolium.images.puller import Manifests
from dolium.images.records import IndexRecord, Records

NESTING = 4
MANIFESTS_MAX = 1000


class Tree:
    """What an index names, at any depth, found while its manifests are read one after the other."""

    def __init__(self, top: Descriptor) -> None:
        """Begin with the index itself."""
        self.top = top
        self.blobs: dict[str, Descriptor] = {}  # configurations and layers
        self._pending = [(top, 0)]
        self._known = {top.digest: top}
        self._children: dict[str, Sequence[Descriptor]] = {}

    def next(self) -> Descriptor | None:
        """A manifest that ``take`` has not had yet."""
        return self._pending[-1][0] if self._pending else None

    def skip(self) -> None:
        """Go on without the one that ``next`` gave."""
        self._known.pop(self._pending.pop()[0].digest)

    def take(self, data: bytes) -> None:
        """The bytes of what ``next`` gave. Raises InvalidArgument for what does not fit, or is nested without end."""
        entry, depth = self._pending.pop()
        what = f"manifest {entry.digest}"
        if len(data) != entry.size:
            raise InvalidArgument(f"{what} has {len(data)} bytes, the index says {entry.size}")
        if entry.media_type not in INDEXES:
            found = parse_artifact(data, entry.media_type, what=what)
            self.blobs.update((blob.digest, blob) for blob in (found.config, *found.blobs))
            return
        parsed = parse_manifest(data, entry.media_type, what=what)
        if not isinstance(parsed, Index):
            raise InvalidArgument(f"{what} is no index, though it is said to be one")
        if depth >= NESTING:
            raise InvalidArgument(f"{what}: indexes are nested too deep")
        self._children[entry.digest] = parsed.manifests
        for child in parsed.manifests:
            if child.media_type not in (*MANIFESTS, *INDEXES):
                raise InvalidArgument(f"{what} names {child.digest}, which is no manifest: {child.media_type!r}")
            if child.digest not in self._known:
                self._known[child.digest] = child
                self._pending.append((child, depth + 1))
        if len(self._known) > MANIFESTS_MAX:
            raise InvalidArgument(f"{what} names more than {MANIFESTS_MAX} manifests")

    def images(self) -> list[Descriptor]:
        """All manifests that are no indexes."""
        return [entry for entry in self._known.values() if entry.digest not in self._children]

    def manifests(self) -> list[Descriptor]:
        """All manifests, each after those it names: the order a registry takes them in."""
        ordered: dict[str, Descriptor] = {}

        def visit(entry: Descriptor) -> None:
            for child in self._children.get(entry.digest, ()):
                if child.digest in self._known and child.digest not in ordered:
                    visit(child)
            ordered[entry.digest] = entry

        visit(self.top)
        return list(ordered.values())

    def record(self) -> IndexRecord:
        """What is kept of it, under no name yet."""
        return IndexRecord(
            "", tuple((entry.digest, entry.size, entry.media_type) for entry in self.manifests()),
            tuple((blob.digest, blob.size) for blob in self.blobs.values()))


async def read_tree(registry: Manifests, content: ContentStore, hold: Hold, top: str) -> Tree:
    """Fetch all manifests of the index ``top`` and keep them. Raises InvalidArgument and what the registry raises."""
    data, media_type, _ = await registry.manifest(top)
    tree = Tree(Descriptor(parse_manifest(data, media_type).media_type, top, len(data)))
    while (entry := tree.next()) is not None:
        if entry is not tree.top:
            data, _, _ = await registry.manifest(entry.digest)
        hold.add([entry.digest])
        content.put(data)
        tree.take(data)
    return tree


class Indexes:
    """Which names stand for an index that is here whole."""

    def __init__(self, records: Records) -> None:
        """Start from what the records hold."""
        self._kept = {record.name: record for record in records.indexes()}

    def get(self, name: str) -> IndexRecord | None:
        """The index of a canonical name."""
        return self._kept.get(name)

    def find(self, digest: str) -> IndexRecord | None:
        """An index by its digest, under whatever name."""
        return next((record for record in self._kept.values() if record.digest == digest), None)

    def all(self) -> list[IndexRecord]:
        """All of them, by name."""
        return sorted(self._kept.values(), key=lambda record: record.name)

    def digests(self) -> set[str]:
        """All blobs that indexes need."""
        return {digest for record in self._kept.values() for digest in record.digests()}

    def follow(self, tagged: Iterable[str], untagged: Iterable[str], index: IndexRecord | None) -> tuple[
            list[IndexRecord], list[str]]:
        """What to put and to delete when names move to an image, with its index or without, or go."""
        put = [index.called(name) for name in tagged] if index is not None else []
        gone = [name for name in (*tagged, *untagged) if name in self._kept]
        return put, [name for name in gone if all(name != record.name for record in put)]

    def update(self, put: Iterable[IndexRecord], gone: Iterable[str]) -> set[str]:
        """What the database has committed already. Returns blobs that nobody may need any more."""
        before = [self._kept.pop(name) for name in (*(record.name for record in put), *gone) if name in self._kept]
        self._kept.update((record.name, record) for record in put)
        return {digest for record in before for digest in record.digests()}


def to_send(record: IndexRecord, content: ContentStore, limit: int) -> list[tuple[Descriptor, Descriptor | None]]:
    """The manifests below an index in the order they go out, each with its subject. Blocks."""
    found: list[tuple[Descriptor, Descriptor | None]] = []
    for digest, size, media_type in record.manifests[:-1]:
        subject = None
        if media_type in MANIFESTS:
            subject = parse_artifact(content.read(digest, limit=limit), media_type).subject
        found.append((Descriptor(media_type, digest, size), subject))
    return found


def blobs_of(record: IndexRecord) -> Mapping[str, Descriptor]:
    """Its configurations and layers."""
    return {digest: Descriptor("", digest, size) for digest, size in record.blobs}
