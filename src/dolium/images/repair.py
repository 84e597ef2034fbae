"""``dolium system check``: looks at all of a store, and with ``repair`` fetches what a registry still has, unpacks layers
anew, and drops what cannot be had again and nobody uses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from dolium.errors import DoliumError, FailedPrecondition, NotFound
from dolium.images.auth import Credentials, credentials_of
from dolium.images.check import Problem, check_blob, check_layer, check_record, needs, refuse_live
from dolium.images.content import Ingest
from dolium.images.installer import Fetch
from dolium.images.manifest import Descriptor
from dolium.images.records import ImageRecord, LayerRecord
from dolium.images.reference import Reference
from dolium.images.store import ImageStore


class Check:
    """One check of one store."""

    def __init__(
        self, store: ImageStore, *, quick: bool = False, credentials: Mapping[str, Credentials] | None = None,
        before_layers: Callable[[], None] = lambda: None,
    ) -> None:
        """``quick`` leaves out what is unpacked; ``credentials`` are by registry; ``before_layers`` is called before layers
        are exchanged: nothing may hold them.
        """
        self._store = store
        self._quick = quick
        self._credentials = credentials or {}
        self._before_layers = before_layers
        self.problems: list[Problem] = []
        self.blobs = self.layers = 0  # that were looked at

    async def run(self) -> list[Problem]:
        """Look at everything. Nothing is changed."""
        store, needed = self._store, {}  # type: ImageStore, dict[str, tuple[int | None, list[str]]]
        for record in store.records():
            for digest, size in ((record.manifest, None), (record.id, record.config_size),
                                 *((layer.digest, layer.size) for layer in record.layers)):
                needed.setdefault(digest, (size, []))[1].append(record.id)
        for artifact in store.artifacts():
            for digest, size in ((artifact.digest, None), *artifact.blobs):
                needed.setdefault(digest, (size, []))
        for index in store.indexes():
            for digest, size in (*(manifest[:2] for manifest in index.manifests), *index.blobs):
                needed.setdefault(digest, (size, []))
        bad = set()
        for digest in sorted({*needed, *store.content.digests()}):
            size, images = needed.get(digest, (None, []))
            self.blobs += 1
            said = await asyncio.to_thread(check_blob, store.content, digest, size)
            if said:
                bad.add(digest)
                self.problems.append(Problem("blob", digest, said, list(dict.fromkeys(images))))
        for artifact in store.artifacts():
            if lost := artifact.digests() & bad:
                self.problems.append(Problem("artifact", artifact.name, f"has lost {', '.join(sorted(lost))}"))
        for index in store.indexes():
            if lost := index.digests() & bad:
                self.problems.append(Problem("index", index.name, f"has lost {', '.join(sorted(lost))}"))
        for record in store.records():
            if not {record.manifest, record.id} & bad and (said := check_record(store.content, record)):
                self.problems.append(Problem("image", record.id, said, [record.id]))
        await self._layers(bad)
        for name in store.lost_names():
            self.problems.append(Problem("name", name, "stands for an image that is not there"))
        for lease in store.leases():
            gone = [digest for digest in lease.blobs if not store.content.has(digest)]
            if gone and not lease.id.startswith("pull "):  # a pull's are still to come
                self.problems.append(Problem("lease", lease.id, f"keeps {', '.join(gone)}, which is missing"))
        self.problems = [problem for problem in self.problems if self._still(problem)]
        return self.problems

    def _still(self, problem: Problem) -> bool:
        """Not when what it is about was removed meanwhile, by somebody who wanted it gone."""
        if problem.images:
            return any(self._store.find_record(image) is not None for image in problem.images)
        return problem.kind != "blob" or self._store.content.has(problem.subject) or any(
            problem.subject in digests for digests in (
                *(artifact.digests() for artifact in self._store.artifacts()),
                *(index.digests() for index in self._store.indexes())))

    async def _layers(self, bad: set[str]) -> None:
        users: dict[str, list[str]] = {}
        for record in self._store.records():
            for chain in record.chains():
                users.setdefault(chain, []).append(record.id)
        seen: set[str] = set()
        for record in self._store.records():
            for layer in record.layers:
                if layer.chain_id in seen:
                    continue
                seen.add(layer.chain_id)
                self.layers += 1
                images = list(dict.fromkeys(users[layer.chain_id]))
                if not self._store.snapshots.has_layer(layer.chain_id):
                    self.problems.append(Problem("layer", layer.chain_id, "missing", images))
                elif layer.digest not in bad:
                    packed, unpacked = await asyncio.to_thread(self._layer, layer)
                    if packed:
                        self.problems.append(Problem("blob", layer.digest, packed, images))
                    if unpacked:
                        self.problems.append(Problem("layer", layer.chain_id, unpacked, images))

    def _layer(self, layer: LayerRecord) -> tuple[str, str]:
        """What is wrong with the layer's blob, and with its files. Blocks."""
        if self._quick:
            return check_layer(self._store.content, layer, None)
        try:
            with self._store.snapshots.layer(layer.chain_id) as folder:
                return check_layer(self._store.content, layer, folder)
        except (DoliumError, OSError) as error:  # it cannot even be mounted
            return check_layer(self._store.content, layer, None)[0], str(error)

    # Repair

    async def repair(self) -> None:
        """Do what can be done about each problem; its ``outcome`` says what."""
        if any(problem.kind == "layer" for problem in self.problems):
            self._before_layers()
        for problem in self.problems:
            if problem.kind == "blob":
                self._store.content.delete(problem.subject)
                if not problem.images:
                    problem.outcome, problem.repaired = "removed: no image needs it", True
        for problem in self.problems:
            if problem.kind == "name":
                self._store.drop_name(problem.subject)
                problem.outcome, problem.repaired = "dropped", True
            elif problem.kind == "lease":
                self._store.end_lease(problem.subject)
                problem.outcome, problem.repaired = "dropped", True
            elif problem.kind == "artifact":
                await self._artifact(problem)
            elif problem.kind == "index":
                await self._index(problem)
        images = dict.fromkeys(image for problem in self.problems for image in problem.images if not problem.repaired)
        for image in images:
            record = self._store.find_record(image)
            if record is not None:
                mine = [problem for problem in self.problems if image in problem.images and not problem.repaired]
                await self._image(record, mine)

    async def _image(self, record: ImageRecord, problems: Sequence[Problem]) -> None:
        try:
            for problem in problems:
                if problem.kind == "layer":
                    refuse_live(self._store.live_users(problem.images))
                    self._store.snapshots.remove_layer(problem.subject)
            await self._store.reinstall(record, self._fetch(record), self._fetch_manifest(record))
        except DoliumError as error:
            for problem in problems:
                problem.outcome = f"cannot be repaired: {error}"
            if any(needs(problem, record) for problem in problems):
                self._drop(record, problems)
            return
        for problem in problems:
            problem.repaired, problem.outcome = True, "unpacked again" if problem.kind == "layer" else "fetched again"
            if problem.kind == "image":  # what its documents say is not what was pulled: only a new pull tells
                problem.repaired, problem.outcome = False, "pull it again"

    def _drop(self, record: ImageRecord, problems: Sequence[Problem]) -> None:
        try:
            self._store.drop_image(record.id)
        except FailedPrecondition as error:
            for problem in problems:
                problem.outcome += f"; kept: {error}"
            return
        for problem in problems:
            problem.images.remove(record.id)
            problem.outcome += f"; image {record.id} is dropped"
            problem.repaired = not problem.images

    def _references(self, record: ImageRecord) -> list[Reference]:
        """Where the image came from: repositories it has a digest in first."""
        names = sorted(self._store.names_of(record.id), key=lambda name: name.digest is None)
        return list({name.name: name for name in names}.values())

    def _fetch(self, record: ImageRecord) -> Fetch:
        async def fetch(descriptor: Descriptor, ingest: Ingest, progress: Callable[[int], None]) -> None:
            error: DoliumError = NotFound(f"no registry is known to have {descriptor.digest}")
            for reference in self._references(record):
                try:
                    if ingest.ended:
                        ingest.reopen()
                    async with self._store.sources(reference, credentials_of(self._credentials, reference.domain)) as found:
                        await found.blob(descriptor, ingest, progress)
                    return
                except DoliumError as one:
                    error = one
            raise error

        return fetch

    def _fetch_manifest(self, record: ImageRecord) -> Callable[[], Awaitable[bytes]]:
        async def fetch() -> bytes:
            error: DoliumError = NotFound(f"no registry is known to have manifest {record.manifest}")
            for reference in self._references(record):
                try:
                    async with self._store.sources(reference, credentials_of(self._credentials, reference.domain)) as found:
                        return (await found.manifest(record.manifest))[0]
                except DoliumError as one:
                    error = one
            raise error

        return fetch

    async def _artifact(self, problem: Problem) -> None:
        reference = Reference.parse(problem.subject)
        try:
            await self._store.pull_artifact(problem.subject, credentials=credentials_of(self._credentials, reference.domain))
            problem.outcome = "fetched again"
        except DoliumError as error:
            self._store.drop_artifact(problem.subject)
            problem.outcome = f"dropped: {error}"
        problem.repaired = True

    async def _index(self, problem: Problem) -> None:
        domain = Reference.parse(problem.subject).domain
        for index in self._store.indexes():
            if index.name != problem.subject:
                continue
            try:
                await self._store.refetch_index(index, credentials_of(self._credentials, domain))
                problem.outcome = "fetched again"
            except DoliumError as error:
                self._store.drop_index(index)
                problem.outcome = f"dropped, but for the image that is unpacked: {error}"
        problem.repaired = True
