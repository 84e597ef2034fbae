"""What the store remembers: one record per image, one row per name, one per unpacked layer.

``Records`` is the interface; the engine owns the database and hands in a connection for ``SqliteImageRecords``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from dolium.errors import FailedPrecondition, Internal

ROOM = "images"
VERSION = 1


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
class Change:
    """What one transaction does. Tags are canonical references; ``layers`` are chain IDs with unpacked bytes."""

    put: Iterable[ImageRecord] = ()
    delete: Iterable[str] = ()
    tag: Mapping[str, str] = field(default_factory=dict)
    untag: Iterable[str] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    delete_layers: Iterable[str] = ()


class Records(Protocol):
    """Where records are kept. Called in the event loop's thread."""

    def images(self) -> list[ImageRecord]:
        """All images."""

    def tags(self) -> dict[str, str]:
        """Canonical reference -> image ID."""

    def layers(self) -> dict[str, int]:
        """Chain ID -> bytes of its files."""

    def commit(self, change: Change) -> None:
        """Do all of it or nothing. Returns when it is as durable as the database's settings make it."""


class SqliteImageRecords:
    """Implements ``Records`` in three tables of a database somebody else opened."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Make the tables. Raises FailedPrecondition when a newer dolium wrote them."""
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
            connection.execute("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (ROOM, VERSION))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Explicit, so that it does not matter how the connection's owner set isolation_level."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._connection.commit()

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
