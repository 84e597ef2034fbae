"""The database: SQLite, WAL, short transactions, one writer. Containers are JSON documents with a version."""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any

from dolium import faults
from dolium.errors import AlreadyExists, FailedPrecondition, ResourceExhausted

ROOM = "engine"
VERSION = 1
faults.register("store.container.put", "store.container.deleted")


def open_database(path: str) -> sqlite3.Connection:
    """The connection all rooms share, in autocommit mode. A power cut may lose the last second, never consistency."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    os.chmod(path, 0o600)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA busy_timeout=5000")
    return connection


class Store:
    """Documents of containers and volumes, and settings of the instance."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Make the tables. Raises FailedPrecondition when a newer dolium wrote them."""
        self._connection = connection
        run = connection.execute
        run("CREATE TABLE IF NOT EXISTS schema_versions (room TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        row = run("SELECT version FROM schema_versions WHERE room = ?", (ROOM,)).fetchone()
        if row is not None and row[0] > VERSION:
            raise FailedPrecondition(f"the database has version {row[0]}, this dolium reads {VERSION}",
                                     hint="use a newer dolium")
        run("CREATE TABLE IF NOT EXISTS containers (id TEXT PRIMARY KEY, name TEXT UNIQUE NOT NULL, doc TEXT NOT NULL)")
        run("CREATE TABLE IF NOT EXISTS volumes (name TEXT PRIMARY KEY, doc TEXT NOT NULL)")
        run("CREATE TABLE IF NOT EXISTS networks (name TEXT PRIMARY KEY, doc TEXT NOT NULL)")
        run("CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        run("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (ROOM, VERSION))

    def setting(self, key: str, default: str) -> str:
        """A setting; the default is stored when it is absent."""
        self._connection.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, default))
        row = self._connection.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return str(row[0])

    def containers(self) -> list[dict[str, Any]]:
        """All documents."""
        return [json.loads(row[0]) for row in self._connection.execute("SELECT doc FROM containers")]

    def put_container(self, doc: dict[str, Any]) -> None:
        """Insert or replace by id. Raises AlreadyExists when another container has the name, ResourceExhausted."""
        try:
            self._connection.execute(
                "INSERT INTO containers VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET name = excluded.name, "
                "doc = excluded.doc", (doc["id"], doc["name"], json.dumps(doc, separators=(",", ":"))))
        except sqlite3.IntegrityError as error:
            raise AlreadyExists(f"the container name {doc['name']!r} is in use") from error
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error
        faults.point("store.container.put")

    def delete_container(self, identity: str) -> None:
        """Idempotent. Raises ResourceExhausted."""
        try:
            self._connection.execute("DELETE FROM containers WHERE id = ?", (identity,))
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error
        faults.point("store.container.deleted")

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All documents of ``volumes`` or ``networks``."""
        return [json.loads(row[0]) for row in self._connection.execute(f"SELECT doc FROM {_table(table)}")]

    def put_row(self, table: str, name: str, doc: dict[str, Any]) -> None:
        """Insert or replace by name. Raises ResourceExhausted."""
        try:
            self._connection.execute(f"INSERT OR REPLACE INTO {_table(table)} VALUES (?, ?)", (name, json.dumps(doc)))
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error

    def delete_row(self, table: str, name: str) -> None:
        """Idempotent. Raises ResourceExhausted."""
        try:
            self._connection.execute(f"DELETE FROM {_table(table)} WHERE name = ?", (name,))
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error


def _no_room(error: sqlite3.OperationalError) -> ResourceExhausted:
    return ResourceExhausted(f"the database cannot be written: {error}", hint="is the disk of the state folder full?")


def _table(name: str) -> str:
    if name not in ("volumes", "networks"):
        raise ValueError(name)
    return name
