"""What the store remembers: images, their names, unpacked layers, leases, artifacts and labels of blobs.

``Records`` is the interface; the engine owns the database and hands in a connection for ``SqliteImageRecords``.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dolium.errors import FailedPrecondition, Internal, ResourceExhausted

ROOM = "images"
VERSION = 3  # 1: dolium 0.1, without leases, artifacts and labels; 2: without indexes


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer of an image: the blob (``digest``, ``size`` as stored) and what it unpacks to (``diff_id``, chain)."""

    digest: str
    size: int
    media_type: str
    diff_id: str
    chain_id: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image; ``id`` is its config's digest, ``layers`` go bottom first. Names and unpacked sizes live elsewhere."""

    id: str
    manifest: str
    media_type: str
    platform: str
    created: str
    config_size: int
    layers: tuple[LayerRecord, ...]

    def blobs(self) -> set[str]:
        """Digests of all blobs the image needs."""
        return {self.id, self.manifest, *(layer.digest for layer in self.layers)}

    def chains(self) -> tuple[str, ...]:
        """Chain IDs, bottom first."""
        return tuple(layer.chain_id for layer in self.layers)

    def as_json(self) -> dict[str, object]:
        """The record as it is stored; ``from_json`` reads it back."""
        return {
            "manifest": self.manifest, "mediaType": self.media_type, "platform": self.platform,
            "created": self.created, "configSize": self.config_size,
            "layers": [[layer.digest, layer.size, layer.media_type, layer.diff_id, layer.chain_id]
                       for layer in self.layers],
        }

    @classmethod
    def from_json(cls, id: str, value: Mapping[str, object]) -> ImageRecord:
        """Read a stored record. Raises Internal: only this class writes them."""
        try:
            layers = value["layers"]
            if not isinstance(layers, list):
                raise TypeError("layers is not a list")
            return cls(
                id, str(value["manifest"]), str(value["mediaType"]), str(value["platform"]), str(value["created"]),
                int(str(value["configSize"])), tuple(LayerRecord(*layer) for layer in layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"the record of image {id} is damaged: {error}") from None


@dataclass(frozen=True, slots=True)
class Lease:
    """Blobs nobody may collect before ``expires`` (seconds since 1970; 0 for never), whether an image names them or not.

    A pull has one, so that what it brought outlives the daemon; programs may have their own. ``labels`` are theirs.
    """

    id: str
    created: float
    expires: float
    blobs: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The record as it is stored; ``from_json`` reads it back."""
        return {"created": self.created, "expires": self.expires, "blobs": list(self.blobs), "labels": dict(self.labels)}

    @classmethod
    def from_json(cls, id: str, value: Mapping[str, Any]) -> Lease:
        """Read a stored record. Raises Internal: only this class writes them."""
        try:
            return cls(id, float(value["created"]), float(value["expires"]), tuple(value["blobs"]), dict(value["labels"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"the record of lease {id} is damaged: {error}") from None


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """What a registry keeps that is no image (OCI image-spec 1.1, "Guidelines for Artifact Usage"): ``name`` is canonical,
    ``digest`` its manifest's; ``blobs`` are digest and bytes, config first.
    """

    name: str
    digest: str
    media_type: str
    artifact_type: str
    created: float
    blobs: tuple[tuple[str, int], ...]

    def digests(self) -> set[str]:
        """All blobs the artifact needs."""
        return {self.digest, *(digest for digest, _ in self.blobs)}

    def as_json(self) -> dict[str, object]:
        """The record as it is stored; ``from_json`` reads it back."""
        return {"digest": self.digest, "mediaType": self.media_type, "artifactType": self.artifact_type,
                "created": self.created, "blobs": [list(blob) for blob in self.blobs]}

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> ArtifactRecord:
        """Read a stored record. Raises Internal: only this class writes them."""
        try:
            return cls(name, value["digest"], value["mediaType"], value["artifactType"], float(value["created"]),
                       tuple((str(digest), int(size)) for digest, size in value["blobs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"the record of artifact {name} is damaged: {error}") from None


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """An index that is here with all its images. ``name`` is canonical; ``manifests`` are digest, bytes and media type, each
    after those it names, the index itself last; ``blobs`` digest and bytes of all configurations and layers.
    """

    name: str
    manifests: tuple[tuple[str, int, str], ...]
    blobs: tuple[tuple[str, int], ...]

    @property
    def digest(self) -> str:
        """The index's own."""
        return self.manifests[-1][0]

    def digests(self) -> set[str]:
        """All blobs the index needs."""
        return {*(manifest[0] for manifest in self.manifests), *(blob[0] for blob in self.blobs)}

    def called(self, name: str) -> IndexRecord:
        """The same index under another name."""
        return replace(self, name=name)

    def as_json(self) -> dict[str, object]:
        """The record as it is stored; ``from_json`` reads it back."""
        return {"manifests": [list(one) for one in self.manifests], "blobs": [list(one) for one in self.blobs]}

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> IndexRecord:
        """Read a stored record. Raises Internal: only this class writes them."""
        try:
            manifests = tuple((str(digest), int(size), str(kind)) for digest, size, kind in value["manifests"])
            if not manifests:
                raise ValueError("it has no manifest")
            return cls(name, manifests, tuple((str(digest), int(size)) for digest, size in value["blobs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Internal(f"the record of index {name} is damaged: {error}") from None


@dataclass(frozen=True, slots=True)
class Change:
    """What one transaction does. Tags are canonical references; ``layers`` are chain IDs with unpacked bytes; leases,
    artifacts and indexes are deleted by id and name; ``labels`` are (digest, key) with a value, and go with their digest.
    """

    put: Iterable[ImageRecord] = ()
    delete: Iterable[str] = ()
    tag: Mapping[str, str] = field(default_factory=dict)
    untag: Iterable[str] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    delete_layers: Iterable[str] = ()
    put_leases: Iterable[Lease] = ()
    delete_leases: Iterable[str] = ()
    put_artifacts: Iterable[ArtifactRecord] = ()
    delete_artifacts: Iterable[str] = ()
    put_indexes: Iterable[IndexRecord] = ()
    delete_indexes: Iterable[str] = ()
    labels: Mapping[tuple[str, str], str] = field(default_factory=dict)
    delete_labels: Iterable[str] = ()


class Records(Protocol):
    """Where records are kept. Called in the event loop's thread."""

    def images(self) -> list[ImageRecord]:
        """All images."""

    def tags(self) -> dict[str, str]:
        """Canonical reference -> image ID."""

    def layers(self) -> dict[str, int]:
        """Chain ID -> bytes of its files."""

    def leases(self) -> list[Lease]:
        """All leases, expired ones too."""

    def artifacts(self) -> list[ArtifactRecord]:
        """All artifacts."""

    def indexes(self) -> list[IndexRecord]:
        """All indexes."""

    def labels(self) -> dict[str, dict[str, str]]:
        """Digest of a blob -> its labels."""

    def commit(self, change: Change) -> None:
        """Do all of it or nothing. Returns when it is as durable as the database's settings make it. Raises
        ResourceExhausted on a full disk.
        """


def _no_room(error: sqlite3.OperationalError) -> ResourceExhausted:
    return ResourceExhausted(f"the image database cannot be written: {error}",
                             hint="is the disk of the state folder full?", errno=errno.ENOSPC)


class SqliteImageRecords:
    """Implements ``Records`` in seven tables of a database somebody else opened."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Make the tables, or add what an older dolium's lack. Raises FailedPrecondition when a newer one wrote them."""
        self._connection = connection
        with self._transaction():
            connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_versions (room TEXT PRIMARY KEY, version INTEGER NOT NULL)"
            )
            row = connection.execute("SELECT version FROM schema_versions WHERE room = ?", (ROOM,)).fetchone()
            if row is not None and row[0] > VERSION:
                raise FailedPrecondition(
                    f"the image database has version {row[0]}, this dolium reads {VERSION}", hint="use a newer dolium"
                )
            connection.execute("CREATE TABLE IF NOT EXISTS images (id TEXT PRIMARY KEY, record TEXT NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS tags (name TEXT PRIMARY KEY, image TEXT NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS snapshots (chain TEXT PRIMARY KEY, size INTEGER NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS leases (id TEXT PRIMARY KEY, record TEXT NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS artifacts (name TEXT PRIMARY KEY, record TEXT NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS indexes (name TEXT PRIMARY KEY, record TEXT NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS blob_labels "
                               "(digest TEXT, key TEXT, value TEXT NOT NULL, PRIMARY KEY (digest, key))")
            connection.execute("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (ROOM, VERSION))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Explicit, so that it does not matter how the connection's owner set isolation_level."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException as error:
            self._connection.rollback()
            if isinstance(error, sqlite3.OperationalError):
                raise _no_room(error) from error
            raise
        try:
            self._connection.commit()
        except sqlite3.OperationalError as error:
            self._connection.rollback()
            raise _no_room(error) from error

    def images(self) -> list[ImageRecord]:
        """See ``Records``."""
        rows = self._connection.execute("SELECT id, record FROM images").fetchall()
        return [ImageRecord.from_json(row[0], json.loads(row[1])) for row in rows]

    def tags(self) -> dict[str, str]:
        """See ``Records``."""
        return {row[0]: row[1] for row in self._connection.execute("SELECT name, image FROM tags")}

    def layers(self) -> dict[str, int]:
        """See ``Records``."""
        return {row[0]: row[1] for row in self._connection.execute("SELECT chain, size FROM snapshots")}

    def leases(self) -> list[Lease]:
        """See ``Records``."""
        rows = self._connection.execute("SELECT id, record FROM leases").fetchall()
        return [Lease.from_json(row[0], json.loads(row[1])) for row in rows]

    def artifacts(self) -> list[ArtifactRecord]:
        """See ``Records``."""
        rows = self._connection.execute("SELECT name, record FROM artifacts").fetchall()
        return [ArtifactRecord.from_json(row[0], json.loads(row[1])) for row in rows]

    def indexes(self) -> list[IndexRecord]:
        """See ``Records``."""
        rows = self._connection.execute("SELECT name, record FROM indexes").fetchall()
        return [IndexRecord.from_json(row[0], json.loads(row[1])) for row in rows]

    def labels(self) -> dict[str, dict[str, str]]:
        """See ``Records``."""
        found: dict[str, dict[str, str]] = {}
        for digest, key, value in self._connection.execute("SELECT digest, key, value FROM blob_labels"):
            found.setdefault(digest, {})[key] = value
        return found

    def commit(self, change: Change) -> None:
        """See ``Records``."""
        run = self._connection.executemany
        with self._transaction():
            run("INSERT OR REPLACE INTO snapshots VALUES (?, ?)", list(change.layers.items()))
            run("INSERT OR REPLACE INTO images VALUES (?, ?)",
                [(image.id, json.dumps(image.as_json())) for image in change.put])
            run("INSERT OR REPLACE INTO tags VALUES (?, ?)", list(change.tag.items()))
            run("DELETE FROM tags WHERE name = ?", [(name,) for name in change.untag])
            run("DELETE FROM images WHERE id = ?", [(id,) for id in change.delete])
            run("DELETE FROM snapshots WHERE chain = ?", [(chain,) for chain in change.delete_layers])
            run("INSERT OR REPLACE INTO leases VALUES (?, ?)",
                [(lease.id, json.dumps(lease.as_json())) for lease in change.put_leases])
            run("DELETE FROM leases WHERE id = ?", [(id,) for id in change.delete_leases])
            run("INSERT OR REPLACE INTO artifacts VALUES (?, ?)",
                [(artifact.name, json.dumps(artifact.as_json())) for artifact in change.put_artifacts])
            run("DELETE FROM artifacts WHERE name = ?", [(name,) for name in change.delete_artifacts])
            run("INSERT OR REPLACE INTO indexes VALUES (?, ?)",
                [(index.name, json.dumps(index.as_json())) for index in change.put_indexes])
            run("DELETE FROM indexes WHERE name = ?", [(name,) for name in change.delete_indexes])
            run("INSERT OR REPLACE INTO blob_labels VALUES (?, ?, ?)",
                [(digest, key, value) for (digest, key), value in change.labels.items()])
            run("DELETE FROM blob_labels WHERE digest = ?", [(digest,) for digest in change.delete_labels])
