"""A client for registries that speak the OCI distribution protocol (v1.1) or its ancestor, Docker's registry v2: what is
asked of them. How it is asked is ``transport``'s business.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, BinaryIO
from urllib.parse import quote

import aiohttp
from yarl import URL

from dolium.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from dolium.images.auth import Credentials
from dolium.images.content import CHUNK, Ingest, digest_of
from dolium.images.flight import settled
from dolium.images.hosts import Endpoint, Settings, is_loopback
from dolium.images.manifest import INDEXES, MANIFEST_MAX, MANIFESTS, OCI_INDEX, Descriptor, Index, parse_manifest
from dolium.images.reference import Reference, is_digest
from dolium.images.transport import Body, Broken, Transport, parse_json, read_limited

PART = 4 << 20  # bytes; a part is held in memory until it is its turn to be written
PARTS = 3  # of one blob, asked for at the same time
PARTS_FROM = 32 << 20  # bytes of a blob that is worth several connections
UPLOAD_CHUNK = 16 << 20  # bytes; what breaks off is sent again from the last whole chunk
_PAGES = 64
JsonObject = dict[str, Any]


class RegistryClient(Transport):
    """One registry and one repository, for the length of one pull or push."""

    def __init__(
        self, reference: Reference, credentials: Credentials | None = None, *, endpoint: Endpoint | None = None,
        actions: str = "pull", parts_from: int | None = None,
    ) -> None:
        """Nothing is sent yet. ``endpoint`` is where the repository is, by default at its own domain. Blobs of
        ``parts_from`` bytes come in parts; by default only from afar: on loopback one connection waits for nothing.
        """
        endpoint = endpoint or Settings().home(reference)
        super().__init__(endpoint, credentials, actions=actions, name=reference.name)
        local = is_loopback(self._base.host or "")
        self._parts_from = parts_from if parts_from is not None else None if local else PARTS_FROM

    async def manifest(self, name: str) -> tuple[bytes, str, str]:
        """The manifest or index of a tag or digest: its bytes, media type and digest.

        Raises NotFound, PermissionDenied, Unavailable; InvalidArgument when the bytes do not fit a digest asked for.
        """
        url = self._url("manifests", name)
        accept = ", ".join((*MANIFESTS, *INDEXES))

        async def once() -> tuple[bytes, str, str]:
            async with self._request("GET", url, {"Accept": accept}) as answer:
                if answer.status != 200:
                    raise await self._error(answer, f"manifest {name}")
                data = await read_limited(answer, MANIFEST_MAX, f"manifest {name}")
                return data, answer.content_type, answer.headers.get("Docker-Content-Digest", "")

        data, media_type, announced = await self._retry(f"manifest {name}", once)
        digest = digest_of(data)
        expected = name if is_digest(name) else announced
        if is_digest(expected) and expected != digest:
            raise InvalidArgument(f"{self._name}: manifest {name} has the wrong content: its digest is {digest}")
        return data, media_type, digest

    async def blob(self, descriptor: Descriptor, ingest: Ingest, progress: Callable[[int], None]) -> None:
        """Bring ``ingest`` to the descriptor's size, from where it stands, and commit it.

        A cut connection is resumed with a Range request; progress() gets the bytes there so far. Content that does
        not fit its digest is fetched once more from the start when part of it came from an earlier attempt.
        """
        url = self._url("blobs", descriptor.digest)
        what = f"blob {descriptor.digest}"
        while True:
            if self._parts_from is not None and descriptor.size - ingest.offset >= self._parts_from:
                await self._retry(what, lambda: self._blob_parts(url, descriptor, ingest, progress),
                                  lambda: ingest.offset)
            await self._retry(what, lambda: self._blob_rest(url, descriptor, ingest, progress), lambda: ingest.offset)
            if not ingest.resumed:
                await asyncio.to_thread(ingest.commit)
                return
            try:
                await asyncio.to_thread(ingest.commit)
                return
            except InvalidArgument:
                ingest.reopen()

    async def tags(self) -> list[str]:
        """All tags of the repository, page by page. Raises as ``manifest``."""
        url: URL | None = self._base.with_path(f"/v2/{self._repository}/tags/list")
        found: list[str] = []
        for _ in range(_PAGES):
            if url is None:
                break
            names, url = await self._tags_page(url)
            found += names
        return found

    async def _tags_page(self, url: URL) -> tuple[list[str], URL | None]:
        async def once() -> tuple[list[str], URL | None]:
            async with self._request("GET", url, {}) as answer:
                if answer.status != 200:
                    raise await self._error(answer, "list of tags")
                link = answer.links.get("next")
                after = link.get("url") if link is not None else None
                value = parse_json(await read_limited(answer, MANIFEST_MAX, "list of tags"))
                names = value.get("tags") if isinstance(value, dict) else None
                return [str(name) for name in names or []], self.sent_to(url, str(after)) if after else None

        return await self._retry("list of tags", once)

    async def blob_size(self, digest: str) -> int:
        """Bytes of a blob that no manifest told of. Raises NotFound, Unavailable when the registry does not say."""
        what = f"blob {digest}"

        async def once() -> int:
            async with self._request("HEAD", self._url("blobs", digest), {}) as answer:
                if answer.status != 200:
                    raise await self._error(answer, what)
                if answer.content_length is None:
                    raise Unavailable(f"{self._name}: the registry does not say how long {what} is")
                return answer.content_length

        return await self._retry(what, once)

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """A blob in memory, at most ``limit`` bytes. Raises InvalidArgument when it does not fit its digest."""
        what = f"blob {descriptor.digest}"

        async def once() -> bytes:
            async with self._request("GET", self._url("blobs", descriptor.digest), {}) as answer:
                if answer.status != 200:
                    raise await self._error(answer, what)
                return await read_limited(answer, limit, what)

        data = await self._retry(what, once)
        if digest_of(data) != descriptor.digest:
            raise InvalidArgument(f"{self._name}: {what} has the wrong content: its digest is {digest_of(data)}")
        return data

    async def _blob_rest(
        self, url: URL, descriptor: Descriptor, ingest: Ingest, progress: Callable[[int], None]
    ) -> None:
        start = ingest.offset
        if start == descriptor.size:
            return
        headers = {"Range": f"bytes={start}-{descriptor.size - 1}"} if start else {}
        async with self._request("GET", url, headers) as answer:
            if start and answer.status == 206:
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise Unavailable(f"{self._name}: the registry sent another range of {descriptor.digest}")
            elif answer.status == 200:
                if start:  # the whole blob, although the rest was asked for
                    ingest.reset()
            elif answer.status == 416:
                ingest.reset()
                raise Broken("the registry refused to resume")
            else:
                raise await self._error(answer, f"blob {descriptor.digest}")
            await self._receive(answer, ingest, progress)
        if ingest.offset < descriptor.size:
            raise Broken(f"the connection ended after {ingest.offset} of {descriptor.size} bytes")

    async def _receive(
        self, answer: aiohttp.ClientResponse, ingest: Ingest, progress: Callable[[int], None]
    ) -> None:
        """Write to disk in a thread while the next megabyte comes in; what came is kept when the connection breaks."""
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        writing: asyncio.Future[None] | None = None
        broken: Exception | None = None
        try:
            async for data in answer.content.iter_any():
                buffer += data
                if len(buffer) < CHUNK:
                    continue
                if writing is not None:
                    await asyncio.shield(writing)
                    progress(ingest.offset)
                writing = loop.run_in_executor(None, ingest.write, buffer)
                buffer = bytearray()
        except (aiohttp.ClientError, TimeoutError) as error:
            broken = error
        finally:
            if writing is not None:  # also when cancelled: the thread must be done before the file is closed
                await settled(writing)
        if writing is not None:
            writing.result()
        ingest.write(buffer)
        progress(ingest.offset)
        if broken is not None:
            raise broken

    async def _blob_parts(
        self, url: URL, descriptor: Descriptor, ingest: Ingest, progress: Callable[[int], None]
    ) -> None:
        """The blob in ranges over several connections, written in their order: whoever reads along sees one stream.

        Returns early, with nothing lost, when the registry knows no ranges.
        """
        waiting: deque[asyncio.Task[bytes | None]] = deque()
        begun = ingest.offset
        try:
            while ingest.offset < descriptor.size:
                while begun < descriptor.size and len(waiting) < PARTS:
                    end = min(begun + PART, descriptor.size)
                    waiting.append(asyncio.ensure_future(self._part(url, descriptor, begun, end)))
                    begun = end
                data = await waiting.popleft()
                if data is None:
                    return
                writing = asyncio.get_running_loop().run_in_executor(None, ingest.write, data)
                await settled(writing)  # also when cancelled: the thread must be done before the file is closed
                writing.result()
                progress(ingest.offset)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _part(self, url: URL, descriptor: Descriptor, start: int, end: int) -> bytes | None:
        """One range; None when the registry sends the whole blob instead."""
        what = f"blob {descriptor.digest}, bytes {start}-{end - 1}"

        async def once() -> bytes | None:
            async with self._request("GET", url, {"Range": f"bytes={start}-{end - 1}"}) as answer:
                if answer.status in (200, 416):
                    return None
                if answer.status != 206:
                    raise await self._error(answer, what)
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise Unavailable(f"{self._name}: the registry sent another range of {descriptor.digest}")
                data = await read_limited(answer, end - start, what)
            if len(data) < end - start:
                raise Broken(f"the connection ended after {len(data)} of {end - start} bytes")
            return data

        return await self._retry(what, once)

    # Pushing

    async def has_blob(self, digest: str) -> bool:
        """Is the blob in the repository already?"""
        async def once() -> bool:
            async with self._request("HEAD", self._url("blobs", digest), {}) as answer:
                if answer.status not in (200, 404):
                    raise await self._error(answer, f"blob {digest}")
                return answer.status == 200

        return await self._retry(f"blob {digest}", once)

    async def push_blob(
        self, digest: str, size: int, source: Callable[[], BinaryIO], progress: Callable[[int], None],
        mounts: Sequence[str] = (),
    ) -> str | None:
        """Have the blob in the repository: found there, mounted from one of ``mounts`` (repositories of the same host), or
        sent. ``source`` opens the blob; ``progress`` gets the bytes sent so far.

        Returns "" when it was there, the repository it was mounted from, None when it was sent. Raises PermissionDenied,
        Unavailable, and InvalidArgument when the registry finds another digest.
        """
        if await self.has_blob(digest):
            return ""
        upload = _Upload()
        for repository in mounts:
            if await self._begin(upload, mount=(digest, repository)):
                return repository
            if upload.location is not None:
                break  # it was not mounted, and an upload has begun instead
        await self._retry(f"push blob {digest}", lambda: self._upload(upload, digest, size, source, progress),
                          lambda: upload.offset)
        return None

    def sent_to(self, url: URL, text: str) -> URL:
        """Where the registry says an upload or a list goes on. Raises Unavailable for a place it may not send us to."""
        target = url.join(self._parse(text))
        if not self._may_visit(target):
            raise Unavailable(f"{self._domain}: refusing to go on at {target.scheme}://{target.host or ''}")
        return target

    async def _begin(self, upload: _Upload, mount: tuple[str, str] | None = None) -> bool:
        """Open an upload; True when the registry mounted the blob instead."""
        url = self._base.with_path(f"/v2/{self._repository}/blobs/uploads/")
        if mount is not None:
            url = url.with_query({"mount": mount[0], "from": mount[1]})
        what = "begin an upload"

        async def once() -> bool:
            async with self._request("POST", url, {"Content-Length": "0"}) as answer:
                if answer.status == 201 and mount is not None:
                    return True
                if mount is not None and answer.status in (401, 403, 404):
                    return False  # we may not read there, or it is gone: the blob is sent
                if answer.status != 202:
                    raise await self._error(answer, what)
                upload.move(self, url, answer)
                upload.offset = 0
                least = answer.headers.get("OCI-Chunk-Min-Length", "")
                upload.chunk = max(UPLOAD_CHUNK, int(least) if least.isascii() and least.isdigit() else 0)
                return False

        return await self._retry(what, once)

    async def _upload(
        self, upload: _Upload, digest: str, size: int, source: Callable[[], BinaryIO],
        progress: Callable[[int], None],
    ) -> None:
        """From where the upload stands to its end: a small blob in one request, a large one in chunks."""
        if upload.unsure:
            await self._where(upload)
        if upload.location is None:
            await self._begin(upload)
        upload.unsure = True
        what = f"push blob {digest}"
        while size > upload.chunk and upload.offset < size:
            start, end = upload.offset, min(upload.offset + upload.chunk, size)
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(end - start),
                       "Content-Range": f"{start}-{end - 1}"}
            url = upload.where()
            async with self._request("PATCH", url, headers, _body(source, start, end, progress)) as answer:
                if answer.status == 416:
                    raise Broken("the registry has another part of the blob")
                if answer.status not in (202, 204):
                    raise await self._error(answer, what)
                upload.move(self, url, answer)
                upload.offset = end
        start = upload.offset
        url = upload.where()
        url = URL(f"{url}{'&' if url.raw_query_string else '?'}digest={quote(digest, safe='')}", encoded=True)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size - start)}
        async with self._request("PUT", url, headers, _body(source, start, size, progress)) as answer:
            if answer.status == 400:
                raise InvalidArgument(f"{self._name}: {what}: the registry refused its content")
            if answer.status not in (201, 204):
                raise await self._error(answer, what)
        progress(size)

    async def _where(self, upload: _Upload) -> None:
        """How much of an upload that broke off the registry has; it begins again when it has forgotten it."""
        url = upload.where()
        async with self._request("GET", url, {}) as answer:
            first, _, last = answer.headers.get("Range", "").removeprefix("bytes=").partition("-")
            if answer.status == 204 and first == "0" and last.isascii() and last.isdigit():
                upload.move(self, url, answer)
                upload.offset = int(last) + 1 if int(last) else 0
            else:
                upload.location = None

    async def put_manifest(self, name: str, data: bytes, media_type: str, *, subject: Descriptor | None = None) -> str:
        """Store a manifest or index under a tag or digest; returns its digest. The blobs it names must be there.

        ``subject`` is the document's own: a registry that does not know referrers is told by the tag that distribution
        1.1 ("Unavailable Referrers API") has for that.
        """
        what, digest = f"manifest {name}", digest_of(data)

        async def once() -> bool:
            headers = {"Content-Type": media_type, "Content-Length": str(len(data))}
            async with self._request("PUT", self._url("manifests", name), headers, lambda: data) as answer:
                if answer.status not in (201, 202):
                    raise await self._error(answer, what)
                found = answer.headers.get("Docker-Content-Digest", "")
                if is_digest(found) and found != digest:
                    raise InvalidArgument(f"{self._name}: {what}: the registry made {found} of {digest}")
                return "OCI-Subject" in answer.headers

        known = await self._retry(what, once)
        if subject is not None and not known:
            await self._tag_referrer(subject.digest, data, media_type, digest)
        return digest

    async def _tag_referrer(self, subject: str, data: bytes, media_type: str, digest: str) -> None:
        tag = referrers_tag(subject)
        entries = [entry for entry in await self._tagged_referrers(subject) if entry.get("digest") != digest]
        entries.append(referrer_entry(data, media_type, digest))
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, separators=(",", ":"))
        await self.put_manifest(tag, index.encode(), OCI_INDEX)

    # Referrers

    async def referrers(self, digest: str, artifact_type: str = "") -> list[JsonObject]:
        """The descriptors of what refers to a manifest, in the registry's order: signatures, attestations and the like.

        By distribution 1.1's API, or by the tag that stands for it. Raises as ``manifest``.
        """
        url: URL | None = self._url("referrers", digest)
        if artifact_type and url is not None:
            url = url.with_query({"artifactType": artifact_type})
        found: list[JsonObject] = []
        for _ in range(_PAGES):
            if url is None:
                break
            page = await self._referrers_page(url, digest)
            if page is None:
                found = await self._tagged_referrers(digest)
                break
            entries, url = page
            found += entries
        return [entry for entry in found if not artifact_type or entry.get("artifactType") == artifact_type]

    async def _referrers_page(self, url: URL, digest: str) -> tuple[list[JsonObject], URL | None] | None:
        """One page and the next one's address; None when the registry has no such API."""
        what = f"referrers of {digest}"

        async def once() -> tuple[list[JsonObject], URL | None] | None:
            async with self._request("GET", url, {"Accept": OCI_INDEX}) as answer:
                if answer.status in (404, 405) or (answer.status == 200 and answer.content_type != OCI_INDEX):
                    return None
                if answer.status != 200:
                    raise await self._error(answer, what)
                link = answer.links.get("next")
                after = link.get("url") if link is not None else None
                entries = _entries(await read_limited(answer, MANIFEST_MAX, what), what)
                return entries, self.sent_to(url, str(after)) if after else None

        return await self._retry(what, once)

    async def _tagged_referrers(self, digest: str) -> list[JsonObject]:
        try:
            data, _, _ = await self.manifest(referrers_tag(digest))
        except NotFound:
            return []
        return _entries(data, f"referrers of {digest}")


class _Upload:
    """An upload under way: where it goes on, and how many bytes the registry has."""

    def __init__(self) -> None:
        self.location: URL | None = None
        self.offset = 0
        self.chunk = UPLOAD_CHUNK
        self.unsure = False  # a request broke off: what the registry has is to be asked for

    def where(self) -> URL:
        if self.location is None:
            raise Broken("the upload has to begin again")
        return self.location

    def move(self, client: RegistryClient, url: URL, answer: aiohttp.ClientResponse) -> None:
        """Follow the Location of an answer; without one the upload goes on where it was."""
        text = answer.headers.get("Location", "")
        self.location = client.sent_to(url, text) if text else self.location


def referrers_tag(digest: str) -> str:
    """``sha256-HEX``: distribution 1.1's tag for the referrers of a manifest."""
    return digest.replace(":", "-", 1)


def referrer_entry(data: bytes, media_type: str, digest: str) -> JsonObject:
    """The descriptor of a manifest among the referrers of its subject: with artifact type and annotations."""
    value = parse_json(data)
    document: JsonObject = value if isinstance(value, dict) else {}
    config: Any = document.get("config")
    entry: JsonObject = {"mediaType": media_type, "digest": digest, "size": len(data)}
    kind = document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else "")
    if kind:
        entry["artifactType"] = kind
    if document.get("annotations"):
        entry["annotations"] = document["annotations"]
    return entry


def _entries(data: bytes, what: str) -> list[JsonObject]:
    index = parse_manifest(data, OCI_INDEX, what=what)
    if not isinstance(index, Index):
        raise InvalidArgument(f"{what}: not an index")
    value = parse_json(data)
    return list(value["manifests"]) if isinstance(value, dict) and "manifests" in value else []


def _body(source: Callable[[], BinaryIO], start: int, end: int, progress: Callable[[int], None]) -> Body:
    """Bytes ``start`` to ``end`` of the blob, read in a thread."""
    async def chunks() -> AsyncIterator[bytes]:
        with source() as file:
            file.seek(start)
            at = start
            while at < end:
                data = await asyncio.to_thread(file.read, min(CHUNK, end - at))
                if not data:
                    raise FailedPrecondition("a blob of the store is shorter than its size", hint="dolium system check")
                yield data
                at += len(data)
                progress(at)

    return chunks if end > start else lambda: b""
