"""A pull-through cache: what a registry that fills itself from others keeps, and where it gets it.

    content/     blobs and manifests by digest, as in the engine's own store
    mirror.db    which name stood for which manifest, and what each repository may be asked for
    running      while it runs: the machine's boot it runs in

A tag is asked for again when what is known of it is older than ``fresh`` seconds; when its registry does not answer, what
is known is served: offline, everything that was ever fetched is there. A digest never changes. What one repository has is
not served as another's: each digest is served only for repositories whose registry has given it, or a manifest naming it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dolium.errors import DoliumError, FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from dolium.images.auth import Credentials
from dolium.images.content import ContentStore, Ingest
from dolium.images.flight import SingleFlight
from dolium.images.hosts import read_settings
from dolium.images.manifest import INDEXES, MANIFEST_MAX, Descriptor, Index, parse_artifact, parse_manifest
from dolium.images.platform import Platform, choose
from dolium.images.reference import Reference, is_digest
from dolium.images.registry import JsonObject
from dolium.images.sources import Sources
from dolium.images.trust import ACCEPT, enforce_served, read_policy

_log = logging.getLogger(__name__)
BOOT_ID = "/proc/sys/kernel/random/boot_id"
FILLS = 8  # blobs fetched at the same time
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS names (repository TEXT, tag TEXT, digest TEXT NOT NULL, checked REAL NOT NULL,
    PRIMARY KEY (repository, tag));
CREATE TABLE IF NOT EXISTS links (repository TEXT, digest TEXT, size INTEGER NOT NULL, media_type TEXT NOT NULL,
    PRIMARY KEY (repository, digest));
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A manifest: its bytes, media type and digest. ``stale``: its registry did not answer."""

    data: bytes
    media_type: str
    digest: str
    stale: bool = False


@dataclass(slots=True)
class Filling:
    """A blob that is arriving: whoever wants it reads along."""

    ingest: Ingest
    size: int
    task: asyncio.Task[None]


class Mirror:
    """One cache. For one event loop and one process."""

    def __init__(
        self, root: Path, *, etc: Path, upstream: str, credentials: Callable[[str], Credentials | None],
        fresh: float = 60.0, limit: int = 0,
    ) -> None:
        """Keep everything under ``root``. ``upstream`` is the registry of names that say none; ``credentials`` gives those
        for a registry; ``limit`` is how many bytes of blobs are kept, those read longest ago going first; 0 for all.
        Raises FailedPrecondition when another process has it, or a newer dolium wrote it.
        """
        self._etc, self._upstream, self._credentials = etc, upstream, credentials
        self._fresh, self._limit = fresh, limit
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise FailedPrecondition(f"another mirror keeps its blobs in {root}", hint="give another --store") from None
        self._mark = root / "running"
        self.content = ContentStore(root / "content")
        self.content.recover()
        self._database = sqlite3.connect(root / "mirror.db", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise FailedPrecondition(f"the mirror in {root} has version {version}, this dolium reads {_VERSION}",
                                     hint="use a newer dolium")
        self._database.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")
        self._filling: dict[str, Filling] = {}
        self._manifests: SingleFlight[Served] = SingleFlight()
        self._slots = asyncio.Semaphore(FILLS)
        self._served: dict[str, int] = {}  # blobs being sent: they are not made room with

    async def recover(self) -> int:
        """To be called before anything is served: after a power cut every blob is hashed again, for none was synced; returns
        how many had to go.
        """
        boot = Path(BOOT_ID).read_text()
        lost = 0
        if self._mark.exists() and self._mark.read_text() != boot:
            for digest in list(self.content.digests()):
                if not await asyncio.to_thread(self.content.verify, digest):
                    self.content.delete(digest)
                    lost += 1
        self._mark.write_text(boot)
        return lost

    async def close(self) -> None:
        """End what is arriving; it is resumed the next time."""
        for filling in list(self._filling.values()):
            filling.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, DoliumError):
                await filling.task
        self._database.close()
        await asyncio.to_thread(self.content.sync)
        self._mark.unlink(missing_ok=True)
        os.close(self._lock)

    def reference(self, path: str, namespace: str = "") -> Reference:
        """The repository a client means by a path: of the registry it names beside it (``ns``), or at the path's front, or
        of the one all others are of. Raises InvalidArgument.
        """
        head, slash, _ = path.partition("/")
        if namespace:
            return Reference.parse(f"{namespace}/{path}")
        if slash and "." in head:
            return Reference.parse(path)
        return Reference.parse(f"{self._upstream}/{path}")

    def _sources(self, repository: Reference) -> Sources:
        return Sources(repository, self._credentials(repository.domain), read_settings(self._etc))

    # Manifests

    async def manifest(self, repository: Reference, name: str) -> Served:
        """The manifest of a tag or digest. Raises NotFound, Unavailable, and what the registry client raises."""
        if is_digest(name):
            # One that came for another repository is asked for again: here it has passed when what it names is linked.
            if self._linked(repository, name) is not None and self.content.has(name) and all(
                    self._linked(repository, digest) is not None for digest in self._children(name)):
                return self._stored(repository, name)
        else:
            row = self._named(repository, name)
            if row is not None and time.time() - row[1] < self._fresh:
                return self._stored(repository, row[0])
        return await self._manifests.do((repository.name, name), lambda: self._fetch_manifest(repository, name))

    async def _fetch_manifest(self, repository: Reference, name: str) -> Served:
        try:
            async with self._sources(repository) as found:
                data, media_type, digest = await found.manifest(name)
                await self._enforce(repository, name, Served(data, media_type, digest), found)
        except (Unavailable, ResourceExhausted) as error:
            row = self._named(repository, name)
            if row is None:
                raise
            _log.warning("%s:%s is served as it was: %s", repository.name, name, error)
            served = self._stored(repository, row[0])
            return Served(served.data, served.media_type, served.digest, stale=True)
        except NotFound:
            self._database.execute("DELETE FROM names WHERE repository = ? AND tag = ?", (repository.name, name))
            raise
        await asyncio.to_thread(self.content.put, data)
        self._link(repository, [Descriptor(media_type, digest, len(data)), *_mentioned(data, media_type)])
        if not is_digest(name):
            self._database.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?)",
                                   (repository.name, name, digest, time.time()))
        return Served(data, media_type, digest)

    async def _enforce(self, repository: Reference, name: str, served: Served, found: Sources) -> None:
        """The signature policy, for what comes from a registry. Raises as ``trust.enforce``."""
        policy = read_policy(self._etc)
        if policy is ACCEPT:
            return
        indexes = self._database.execute(
            f"SELECT digest FROM links WHERE repository = ? AND media_type IN ({', '.join('?' * len(INDEXES))})",
            (repository.name, *INDEXES))
        parents = [digest for digest, in indexes.fetchall() if digest != served.digest and self.content.has(digest)
                   and served.digest in self._children(digest)]
        if is_digest(name):  # under that, or under any tag that leads to it
            tags = self._database.execute("SELECT tag, digest FROM names WHERE repository = ?", (repository.name,))
            words = [f":{tag}" for tag, digest in tags.fetchall() if digest in (served.digest, *parents)]
            names = [Reference.parse(repository.name + word) for word in (*words, f"@{name}")]
        else:
            names = [Reference.parse(f"{repository.name}:{name}")]
        kind = _kind_of(served.data, served.media_type)
        await enforce_served(policy, names, [served.digest, *parents], served.data, kind, found)

    def _children(self, digest: str) -> set[str]:
        return {one.digest for one in _mentioned(self.content.read(digest, limit=MANIFEST_MAX), "")}

    def _stored(self, repository: Reference, digest: str) -> Served:
        data = self.content.read(digest, limit=MANIFEST_MAX)
        os.utime(self.content.path(digest))
        row = self._database.execute("SELECT media_type FROM links WHERE repository = ? AND digest = ?",
                                     (repository.name, digest)).fetchone()
        return Served(data, row[0] if row else "", digest)

    def _named(self, repository: Reference, tag: str) -> tuple[str, float] | None:
        """(digest, when its registry was asked) of a tag whose manifest is there."""
        row = self._database.execute("SELECT digest, checked FROM names WHERE repository = ? AND tag = ?",
                                     (repository.name, tag)).fetchone()
        return (row[0], row[1]) if row is not None and self.content.has(row[0]) else None

    def _linked(self, repository: Reference, digest: str) -> int | None:
        """A blob's size when the repository may be asked for it, else None."""
        row = self._database.execute("SELECT size FROM links WHERE repository = ? AND digest = ?",
                                     (repository.name, digest)).fetchone()
        return None if row is None else int(row[0])

    def _link(self, repository: Reference, descriptors: Iterable[Descriptor]) -> None:
        self._database.executemany("INSERT OR REPLACE INTO links VALUES (?, ?, ?, ?)", [
            (repository.name, each.digest, each.size, each.media_type) for each in descriptors])

    def tags(self, repository: Reference) -> list[str]:
        """The tags known here."""
        rows = self._database.execute("SELECT tag FROM names WHERE repository = ? ORDER BY tag", (repository.name,))
        return [row[0] for row in rows]

    async def referrers(self, repository: Reference, digest: str, artifact_type: str) -> list[JsonObject]:
        """What refers to a manifest, as its registry says; nothing when it does not answer."""
        try:
            async with self._sources(repository) as found:
                return await found.referrers(digest, artifact_type)
        except Unavailable:
            return []

    # Blobs

    async def blob(self, repository: Reference, digest: str) -> Filling | None:
        """Have a blob: None when it is in ``content``, else one that is arriving. Raises NotFound, Unavailable,
        PermissionDenied.
        """
        size = self._linked(repository, digest)
        if size is not None and self.content.has(digest, size):
            os.utime(self.content.path(digest))  # read longest ago goes first
            return None
        if size is None:
            if not read_policy(self._etc).open_to(repository):
                raise PermissionDenied(
                    f"{digest} of {repository.name}: no manifest that containers/policy.json lets through names it")
            async with self._sources(repository) as found:
                size = await found.blob_size(digest)
            self._link(repository, [Descriptor("", digest, size)])
            if self.content.has(digest, size):
                return None
        filling = self._filling.get(digest)
        if filling is None:
            ingest = await asyncio.to_thread(self.content.ingest, digest, size)
            filling = self._filling.get(digest)  # another client may have been quicker
            if filling is None:
                task = asyncio.ensure_future(self._fill(repository, Descriptor("", digest, size), ingest))
                filling = self._filling[digest] = Filling(ingest, size, task)
                task.add_done_callback(lambda done: self._filled(digest, done))
            else:
                ingest.close()
        return filling

    async def _fill(self, repository: Reference, descriptor: Descriptor, ingest: Ingest) -> None:
        async with self._slots, self._sources(repository) as found:
            with ingest:
                await found.blob(descriptor, ingest, lambda done: None)
        self._make_room(descriptor.digest)

    def _filled(self, digest: str, task: asyncio.Task[None]) -> None:
        self._filling.pop(digest, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("blob %s: %s", digest, error)

    @contextlib.contextmanager
    def serving(self, digest: str) -> Iterator[None]:
        """While a blob is sent it stays."""
        self._served[digest] = self._served.get(digest, 0) + 1
        try:
            yield
        finally:
            self._served[digest] -= 1
            if not self._served[digest]:
                del self._served[digest]

    def _make_room(self, newest: str) -> None:
        """Remove what was read longest ago, until the rest fits."""
        if not self._limit:
            return
        sizes = {digest: self.content.path(digest).stat() for digest in self.content.digests()}
        total = sum(info.st_size for info in sizes.values())
        for digest in sorted(sizes, key=lambda one: sizes[one].st_mtime_ns):
            if total <= self._limit:
                return
            if digest != newest and digest not in self._served:
                self.content.delete(digest)
                total -= sizes[digest].st_size

    # Beforehand

    async def prefetch(self, name: str, platform: Platform | None) -> int:
        """Fetch all of an image, of one platform or of all; returns the number of blobs. Raises as ``manifest``."""
        reference = Reference.parse(name).with_default_tag()
        served = await self.manifest(reference, reference.digest or reference.tag or "")
        return await self._prefetch(reference, served, platform)

    async def _prefetch(self, repository: Reference, served: Served, platform: Platform | None) -> int:
        parsed = parse_manifest(served.data, served.media_type)
        if isinstance(parsed, Index):
            entries = list(parsed.images)
            if platform is not None:
                chosen = choose(platform, [(entry.platform, entry) for entry in entries])
                entries = [chosen] if chosen is not None else []
            return sum([await self._prefetch(repository, await self.manifest(repository, entry.digest), platform)
                        for entry in entries])
        blobs = {blob.digest for blob in (parsed.config, *parsed.layers)}
        fillings = [await self.blob(repository, digest) for digest in blobs]
        for filling in fillings:
            if filling is not None:
                await asyncio.shield(filling.task)
        return len(blobs)


def _kind_of(data: bytes, media_type: str) -> str:
    """A document's media type: its own word, else the registry's, else what is in it decides. Raises InvalidArgument."""
    try:
        return parse_artifact(data, media_type).media_type
    except DoliumError:
        return parse_manifest(data, media_type).media_type


def _mentioned(data: bytes, media_type: str) -> list[Descriptor]:
    """What a manifest or index names; nothing when it is neither."""
    try:
        return list(parse_artifact_or_index(data, media_type))
    except DoliumError:
        return []


def parse_artifact_or_index(data: bytes, media_type: str) -> Iterable[Descriptor]:
    """The descriptors in any manifest or index. Raises InvalidArgument."""
    try:
        found = parse_artifact(data, media_type)
    except DoliumError:
        parsed = parse_manifest(data, media_type)
        return parsed.manifests if isinstance(parsed, Index) else (parsed.config, *parsed.layers)
    return (found.config, *found.blobs)
