"""The content store: immutable blobs named by their SHA-256.

    blobs/sha256/HEX     complete and checked: a blob appears here by rename, after its digest was compared
    ingest/HEX           a download under way, kept when it breaks off so that it can be resumed
    ingest/tmp-RANDOM    content whose digest is not known yet; useless once its process is gone

Nothing is fsynced blob by blob. ``sync`` flushes the file system once per image, before the image's record commits; a
blob without a record after a crash may be torn and is removed by the store's recovery, never trusted.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from dolium import faults
from dolium.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from dolium.images.reference import check_digest

CHUNK = 1 << 20
PARTIAL_MAX_AGE = 24 * 3600.0

faults.register("content.blob.renamed", "content.blob.deleted")
_libc = ctypes.CDLL(None, use_errno=True)


def syncfs(path: Path) -> None:
    """Flush the file system that holds ``path``. Blocks, without the GIL. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)


def digest_of(data: bytes) -> str:
    """``sha256:HEX`` of bytes in memory."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


class ContentStore:
    """Blobs under one directory, which one process writes. Blocking calls; safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        """Use ``root``, made if it is missing."""
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._ingests = root / "ingest"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # images may hold what is not for everybody
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._ingests.mkdir(exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob is or would be. Raises InvalidArgument for what is not a digest."""
        return self._blobs / check_digest(digest).removeprefix("sha256:")

    def has(self, digest: str, size: int | None = None) -> bool:
        """True when the blob is complete, and of that size where one is given."""
        try:
            found = self.path(digest).stat().st_size
        except FileNotFoundError:
            return False
        return size is None or found == size

    def size(self, digest: str) -> int:
        """Bytes. Raises NotFound."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise NotFound(f"no blob {digest} in the content store") from None

    def open(self, digest: str) -> BinaryIO:
        """The blob for reading, unbuffered. Raises NotFound."""
        try:
            return open(self.path(digest), "rb", buffering=0)
        except FileNotFoundError:
            raise NotFound(f"no blob {digest} in the content store") from None

    def read(self, digest: str, *, limit: int) -> bytes:
        """A small blob whole: checked against its digest again, refused above ``limit`` bytes. Raises NotFound."""
        if self.size(digest) > limit:
            raise InvalidArgument(f"blob {digest} is longer than the {limit} bytes expected of its kind")
        with self.open(digest) as file:
            data = file.read(limit + 1) or b""
        if digest_of(data) != digest:
            raise FailedPrecondition(f"blob {digest} is damaged on disk", hint="remove the image and pull it again")
        return data

    def verify(self, digest: str) -> bool:
        """Does the blob still have its digest? Blocks; False when it is not there."""
        found = hashlib.sha256()
        try:
            with self.open(digest) as file:
                while data := file.read(CHUNK):
                    found.update(data)
        except NotFound:
            return False
        return f"sha256:{found.hexdigest()}" == digest

    def put(self, data: bytes) -> str:
        """Store bytes in memory; returns their digest. Storing what is there already does nothing."""
        digest = digest_of(data)
        if not self.has(digest, len(data)):
            with self.ingest(None) as ingest:
                ingest.write(data)
                ingest.commit()
        return digest

    def ingest(self, digest: str | None, size: int | None = None) -> Ingest:
        """Begin or resume writing a blob; None for content whose digest is not known before its end.

        One ingest per digest at a time is the caller's care (single flight).
        """
        name = check_digest(digest).removeprefix("sha256:") if digest else f"tmp-{secrets.token_hex(8)}"
        return Ingest(self, self._ingests / name, digest, size)

    def delete(self, digest: str) -> bool:
        """Remove a blob; False when it was not there."""
        try:
            self.path(digest).unlink()
        except FileNotFoundError:
            return False
        faults.point("content.blob.deleted")
        return True

    def digests(self) -> Iterator[str]:
        """Every complete blob."""
        for name in os.listdir(self._blobs):
            yield f"sha256:{name}"

    def recover(self) -> None:
        """Remove what a dead process left in ``ingest/``: nameless content, and downloads nobody resumed for a day."""
        for entry in os.scandir(self._ingests):
            if entry.name.startswith("tmp-") or time.time() - entry.stat().st_mtime > PARTIAL_MAX_AGE:
                Path(entry.path).unlink(missing_ok=True)

    def sync(self) -> None:
        """Flush the store's file system."""
        syncfs(self.root)


class Ingest:
    """One blob being written. ``commit`` makes it appear; leaving the block without it keeps what can be resumed.

    ``offset`` is how many bytes are there: the place to resume a download from.
    """

    def __init__(self, store: ContentStore, path: Path, digest: str | None, size: int | None) -> None:
        """Open ``path``; what an earlier attempt left there is hashed again, not trusted."""
        self._store = store
        self._path = path
        self.digest = digest
        self.size = size
        self.committed = False
        self._grown = threading.Condition()
        self._generation = 0
        self._open()

    def _open(self) -> None:
        self._hash = hashlib.sha256()
        self._file = open(self._path, "a+b", buffering=0)  # closed by commit or close
        self.offset = 0
        self.resumed = self._rehash()

    def reopen(self) -> None:
        """Begin again after a ``commit`` that failed and dropped the content."""
        self._generation += 1
        self._open()

    def _rehash(self) -> bool:
        self._file.seek(0)
        while data := self._file.read(CHUNK):
            self._hash.update(data)
            self.offset += len(data)
        if self.size is not None and self.offset > self.size:
            self.reset()
        return self.offset > 0

    def reset(self) -> None:
        """Begin again at byte 0; what follows it breaks off."""
        with self._grown:
            self._file.truncate(0)
            self._generation += 1
            self._hash = hashlib.sha256()
            self.offset = 0
            self.resumed = False
            self._grown.notify_all()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. Raises InvalidArgument past the announced size, ResourceExhausted on a full disk."""
        if self.size is not None and self.offset + len(data) > self.size:
            raise InvalidArgument(f"blob {self.digest} is longer than the {self.size} bytes its descriptor says")
        view = memoryview(data)
        self._hash.update(view)
        while view:
            try:
                written = self._file.write(view)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                which = self.digest or "of unknown digest"
                raise ResourceExhausted(f"write blob {which}: {error.strerror}", errno=error.errno) from None
            view = view[written:]
        with self._grown:
            self.offset += len(data)
            self._grown.notify_all()

    def commit(self) -> str:
        """Compare size and digest, then rename into place; returns the digest.

        Raises InvalidArgument on a mismatch, and drops the content: it cannot be completed by resuming.
        """
        found = "sha256:" + self._hash.hexdigest()
        if self.size is not None and self.offset != self.size:
            self._drop()
            raise InvalidArgument(f"blob {self.digest} has {self.offset} bytes, its descriptor says {self.size}")
        if self.digest is not None and found != self.digest:
            self._drop()
            raise InvalidArgument(f"blob {self.digest} has the wrong content: its digest is {found}")
        os.replace(self._path, self._store.path(found))
        self.committed = True
        self._end()
        faults.point("content.blob.renamed")
        return found

    def follow(self) -> Follower:
        """The content from its start, for a thread that reads while this one writes."""
        return Follower(self, self._path, self._grown, self._generation)

    @property
    def generation(self) -> int:
        """How often the content began again."""
        return self._generation

    @property
    def ended(self) -> bool:
        """True when nothing more will be written."""
        return self._file.closed

    def _end(self) -> None:
        with self._grown:
            self._file.close()
            self._grown.notify_all()

    def _drop(self) -> None:
        self._end()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, ResourceExhausted) and error.errno is not None and not self.committed:
            self._drop()  # the disk is full: nothing half done stays on it
        self.close()

    def close(self) -> None:
        """Give up for now: a download stays for resuming, nameless content goes."""
        if self.committed or self._file.closed:
            return
        if self.digest is None:
            self._drop()
        else:
            self._end()


class Follower:
    """A blob that is still arriving, as a file: ``read`` waits for what has not come yet.

    Not checked by any digest: what is made of it may be used only once the ingest has committed. Raises Unavailable
    when the ingest gives up or begins again, and after ``stop``.
    """

    def __init__(self, ingest: Ingest, path: Path, grown: threading.Condition, generation: int) -> None:
        """Made by ``Ingest.follow``; ``close`` it."""
        self._ingest = ingest
        self._grown = grown
        self._generation = generation
        self._position = 0
        self._stopped = False
        self._file = open(path, "rb", buffering=0)  # closed by close

    def read(self, size: int = CHUNK) -> bytes:
        """At least one byte, or none at the end of a blob that was committed."""
        with self._grown:
            while self._position >= self._ingest.offset and not self._broken and not self._ingest.ended:
                self._grown.wait()
            if self._broken or (self._position >= self._ingest.offset and not self._ingest.committed):
                raise Unavailable("the download broke off")
            left = self._ingest.offset - self._position
        data = self._file.read(min(size, left) if size >= 0 else left)
        self._position += len(data)
        return data

    @property
    def _broken(self) -> bool:
        return self._stopped or self._ingest.generation != self._generation

    def stop(self) -> None:
        """End a ``read`` that waits in another thread."""
        with self._grown:
            self._stopped = True
            self._grown.notify_all()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
