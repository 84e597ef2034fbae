"""What stays and what goes: holds of calls under way, leases that outlive the daemon, and the collection of the rest. And
labels, which go with their blobs.

A blob or layer stays while an image or artifact names it, a lease that has not expired has it, or a call under way holds
it. What none of them wants is garbage, and goes as soon as it is known to be: when a call ends, when a record goes, when a
lease ends, and at the start. Layers have no leases: what a power cut may have torn cannot be checked again in them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from dolium import faults
from dolium.errors import (
    AlreadyExists,
    DoliumError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from dolium.images.content import ContentStore
from dolium.images.names import Removal
from dolium.images.records import Change, Lease, Records
from dolium.images.reference import check_digest
from dolium.images.snapshots.base import Snapshotter

_log = logging.getLogger(__name__)
PULL_LEASE = 24 * 3600.0
"""Seconds for which what a pull brought stays, when the daemon died before the image was complete."""
SOURCE = "dolium.distribution.source."
"""A blob's label, with a registry's name behind it: repositories there that have it, as containerd's label of that kind."""
SOURCES_KEPT = 4
_LEASE_ID = re.compile(r"[A-Za-z0-9][][A-Za-z0-9_.:/@ -]{0,511}", re.ASCII)
faults.register("lease.put", "lease.deleted")


class Hold:
    """Blobs and layers a call under way needs: not collected before it ends."""

    def __init__(self, held: Counter[str]) -> None:
        """Made by ``Keeper.holding``."""
        self._held = held
        self.items: set[str] = set()

    def add(self, items: Iterable[str]) -> None:
        """Hold these too."""
        new = set(items) - self.items
        self.items |= new
        self._held.update(new)

    def release(self) -> None:
        """Let all go; idempotent."""
        self._held.subtract(self.items)
        for item in self.items:
            if self._held[item] == 0:
                del self._held[item]


def disk_error(error: OSError) -> DoliumError:
    """What the disk under the store said, as one of the closed set."""
    message = f"image store: {error.filename or 'file system'}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
        return ResourceExhausted(message, errno=error.errno)
    if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
        return PermissionDenied(message, errno=error.errno)
    return Internal(message, errno=error.errno)


def chain_key(chain_id: str) -> str:
    """How a layer is told from a blob among the names that are held or garbage."""
    return f"chain {chain_id}"


class Keeper:
    """One store's. For one event loop; its file system work is renames and unlinks."""

    def __init__(
        self, content: ContentStore, snapshots: Snapshotter, records: Records, referenced: Callable[[], set[str]],
        sizes: dict[str, int],
    ) -> None:
        """``referenced`` tells what the store's records name; ``sizes``, by chain ID, loses what goes."""
        self._content, self._snapshots, self._records = content, snapshots, records
        self._referenced, self._sizes = referenced, sizes
        self._held: Counter[str] = Counter()
        self._garbage: set[str] = set()  # perhaps: what is held or referenced is passed over
        self.reading = 0  # archives being read: their blobs are not known yet, so none is collected meanwhile
        self.leases = {lease.id: lease for lease in records.leases()}
        self.labels = records.labels()
        self.freed = 0  # bytes of what was collected so far

    @contextmanager
    def holding(self, lease: str = "") -> Iterator[Hold]:
        """Hold what a call adds; at its end everything it added is up for collection, and its lease goes, unless it may be
        resumed: the registry was not there, or wanted no more requests, or the caller went away.
        """
        hold = Hold(self._held)
        try:
            yield hold
        except BaseException as error:
            if isinstance(error, (Unavailable, asyncio.CancelledError)) or (
                    isinstance(error, ResourceExhausted) and error.errno is None):
                hold.release()
                raise
            self._end(hold, lease)
            if isinstance(error, OSError):
                raise disk_error(error) from error
            raise
        self._end(hold, lease)

    def _end(self, hold: Hold, lease: str) -> None:
        hold.release()
        self._garbage.update(hold.items)
        ended = self.leases.pop(lease, None)  # two pulls of one name have one
        if ended is not None:
            self._garbage.update(ended.blobs)
        self.collect()
        if ended is not None:
            try:
                self._records.commit(Change(delete_leases=[lease]))
            except ResourceExhausted as error:  # the disk is full: the content has gone all the same
                _log.warning("the record of lease %s stays until it expires: %s", lease, error)
            faults.point("lease.deleted")

    def suspect(self, items: Iterable[str]) -> None:
        """These may be garbage: ``collect`` looks at them."""
        self._garbage.update(items)

    def collect(self) -> list[Removal]:
        """Delete garbage that is neither referenced nor held; what is held stays garbage for the next time.

        Returns Docker's line for each layer that went.
        """
        if self.reading:
            return []
        self.drop_expired()
        wanted = self._referenced()
        for lease in self.leases.values():
            wanted.update(lease.blobs)
        waiting = {item for item in self._garbage if self._held[item] > 0}
        unlabelled: list[str] = []
        gone: list[Removal] = []
        for item in self._garbage - waiting - wanted:
            kind, _, chain_id = item.rpartition(" ")
            if not kind:
                if self._content.has(item):
                    self.freed += self._content.size(item)
                    self._content.delete(item)
                if self.labels.pop(item, None) is not None:
                    unlabelled.append(item)
                continue
            if self._snapshots.has_layer(chain_id):
                self._snapshots.remove_layer(chain_id)
                gone.append(Removal("Deleted", chain_id))
            self.freed += self._sizes.pop(chain_id, 0)
        self._garbage = waiting
        if unlabelled:
            try:
                self._records.commit(Change(delete_labels=unlabelled))
            except ResourceExhausted as error:  # the disk is full: they name what is gone, and harm nobody
                _log.warning("labels of removed blobs stay: %s", error)
        return gone

    # Labels

    def came_from(self, blobs: Iterable[str], domain: str, repository: str) -> None:
        """Remember that a registry's repository has these blobs: they can be mounted from there."""
        key, changed = f"{SOURCE}{domain}", {}
        for digest in blobs:
            known = self.labels.get(digest, {}).get(key, "").split(",")
            if repository not in known:
                latest = [repository, *filter(None, known)][:SOURCES_KEPT]
                changed[digest, key] = ",".join(latest)
        if changed:
            self._records.commit(Change(labels=changed))
            for (digest, _), value in changed.items():
                self.labels.setdefault(digest, {})[key] = value

    def sources(self, digest: str, domain: str) -> list[str]:
        """The repositories of a registry that are known to have a blob, the latest first."""
        return list(filter(None, self.labels.get(digest, {}).get(f"{SOURCE}{domain}", "").split(",")))

    # Leases

    async def recover(self) -> None:
        """After a start: expired leases go; what a lease alone keeps is hashed again, for the daemon may have ended by a
        power cut. All else that nothing names is collected.
        """
        self.drop_expired()
        leased = {digest for lease in self.leases.values() for digest in lease.blobs} - self._referenced()
        for digest in leased:
            if self._content.has(digest) and not await asyncio.to_thread(self._content.verify, digest):
                self._content.delete(digest)
        self._garbage.update(self._content.digests())
        self._garbage.update(map(chain_key, self._snapshots.layers()))
        self.collect()

    def drop_expired(self) -> None:
        """Let go of what expired leases kept. Nothing is collected yet."""
        now = time.time()
        expired = [lease.id for lease in self.leases.values() if lease.expires and lease.expires <= now]
        for id in expired:
            self._garbage.update(self.leases.pop(id).blobs)
        if expired:
            try:
                self._records.commit(Change(delete_leases=expired))
            except ResourceExhausted as error:  # the disk is full: their content goes all the same
                _log.warning("the records of expired leases stay: %s", error)

    def lease(
        self, id: str, *, life: float = 0.0, blobs: Iterable[str] = (), labels: Mapping[str, str] | None = None,
        new: bool = False,
    ) -> Lease:
        """Make a lease, or have an existing one keep these blobs too and live longer. ``life`` in seconds, 0 for ever.

        Raises InvalidArgument, AlreadyExists when it must be ``new``, NotFound for a blob that is not there (of a new one).
        """
        if not _LEASE_ID.fullmatch(id):
            raise InvalidArgument(f"invalid lease id {id!r}")
        known, blobs = self.leases.get(id), tuple(map(check_digest, blobs))
        if new:
            if known is not None:
                raise AlreadyExists(f"lease {id} exists already")
            for digest in blobs:
                if not self._content.has(digest):
                    raise NotFound(f"lease {id}: no blob {digest} in the content store")
        now = time.time()
        made = known or Lease(id, now, 0.0, (), dict(labels or {}))
        made = replace(made, expires=now + life if life else 0.0, blobs=tuple(dict.fromkeys((*made.blobs, *blobs))))
        self._records.commit(Change(put_leases=[made]))
        self.leases[id] = made
        faults.point("lease.put")
        return made

    def release(self, id: str) -> None:
        """End a lease; what it kept is suspect. Raises NotFound."""
        if id not in self.leases:
            raise NotFound(f"no lease {id}")
        self._records.commit(Change(delete_leases=[id]))
        self._garbage.update(self.leases.pop(id).blobs)
        faults.point("lease.deleted")
