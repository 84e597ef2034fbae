"""Where one name may be pulled from: mirrors and the registry itself, asked in turn until one has what is wanted."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TypeVar

from dolium.errors import (
    DeadlineExceeded,
    DoliumError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from dolium.images.auth import Credentials
from dolium.images.content import Ingest
from dolium.images.hosts import Settings
from dolium.images.manifest import Descriptor
from dolium.images.reference import DEFAULT_DOMAIN, Reference, is_domain
from dolium.images.registry import JsonObject, RegistryClient
from dolium.images.transport import Transport

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_PASSED_OVER = (NotFound, PermissionDenied, Unavailable, InvalidArgument, DeadlineExceeded)


class Sources:
    """The clients of one pull. An async context manager; for one event loop."""

    def __init__(self, reference: Reference, credentials: Credentials | None, settings: Settings) -> None:
        """Credentials are the registry's own: no mirror gets them. Raises PermissionDenied for a blocked registry."""
        self._clients = [
            RegistryClient(reference, None if endpoint.mirror else credentials, endpoint=endpoint)
            for endpoint in settings.sources(reference)
        ]
        self._pinged: set[RegistryClient] = set()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Sources:
        for client in self._clients:
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _first(self, work: Callable[[RegistryClient], Awaitable[_T]]) -> _T:
        """What the first client that succeeds gives; the last one's error when none does."""
        for client in list(self._clients):
            try:
                if client not in self._pinged:
                    await client.ping()
                    self._pinged.add(client)
                return await work(client)
            except DoliumError as error:
                mirrored = client.endpoint.mirror and (
                    isinstance(error, _PASSED_OVER) or (isinstance(error, ResourceExhausted) and error.errno is None))
                if not mirrored:
                    raise
                _log.info("mirror %s is passed over: %s", client.endpoint.host, error)
                if client not in self._pinged and client in self._clients:
                    self._clients.remove(client)  # not there: it is not asked for every blob again
        raise NotFound("no registry to ask")

    async def manifest(self, name: str) -> tuple[bytes, str, str]:
        """See ``RegistryClient.manifest``."""
        return await self._first(lambda client: client.manifest(name))

    async def blob(self, descriptor: Descriptor, ingest: Ingest, progress: Callable[[int], None]) -> None:
        """See ``RegistryClient.blob``. What one source began another goes on with; a digest proves it in the end."""
        async def one(client: RegistryClient) -> None:
            if ingest.ended:
                ingest.reopen()  # the source before sent something else under this digest
            await client.blob(descriptor, ingest, progress)

        await self._first(one)

    async def tags(self) -> list[str]:
        """See ``RegistryClient.tags``."""
        return await self._first(lambda client: client.tags())

    async def blob_size(self, digest: str) -> int:
        """See ``RegistryClient.blob_size``."""
        return await self._first(lambda client: client.blob_size(digest))

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """See ``RegistryClient.small_blob``."""
        return await self._first(lambda client: client.small_blob(descriptor, limit))

    async def referrers(self, digest: str, artifact_type: str = "") -> list[JsonObject]:
        """See ``RegistryClient.referrers``; the registry's own: a mirror that knows none does not decide."""
        client = self._clients[-1]
        if client not in self._pinged:
            await client.ping()
            self._pinged.add(client)
        return await client.referrers(digest, artifact_type)


async def login(server: str, credentials: Credentials, settings: Settings) -> str:
    """Have the registry at ``server`` (a host, or a URL as Docker keeps them) check credentials; returns an identity token
    to keep in place of the password, or "". Raises PermissionDenied, Unavailable, InvalidArgument.
    """
    host = server.partition("://")[2] or server
    host = host.partition("/")[0]
    if not host or host == "index.docker.io":
        host = DEFAULT_DOMAIN
    if not is_domain(host):
        raise InvalidArgument(f"{server!r} names no registry")
    async with Transport(settings.endpoint(f"{host}/"), credentials) as registry:
        return await registry.login()
