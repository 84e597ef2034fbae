"""A client for registries that speak the OCI distribution protocol (v1.1) or its ancestor, Docker's registry v2.

Anonymous, basic and bearer authentication. Plain HTTP only to loopback addresses. Redirects are followed here, not by
the HTTP library: the Authorization header never goes to another origin, and no redirect leads from TLS to plain HTTP.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from dolium.errors import Internal, InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from dolium.images.auth import Challenge, Credentials, Token, parse_challenges
from dolium.images.content import CHUNK, Ingest, digest_of
from dolium.images.flight import settled
from dolium.images.manifest import INDEXES, MANIFEST_MAX, MANIFESTS, Descriptor
from dolium.images.reference import DEFAULT_DOMAIN, Reference, is_digest

ATTEMPTS = 5  # in a row without a byte of progress
_REDIRECTS = 5
_TOKEN_MAX = 1 << 20
_ERROR_MAX = 1 << 16
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
_DOCKER_HUB = "registry-1.docker.io"
_RETRIED = (408, 500, 502, 503, 504)

_T = TypeVar("_T")


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1 and the name localhost: the only places plain HTTP is spoken to."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _proxy(url: URL) -> str | None:
    """The proxy of HTTPS_PROXY and NO_PROXY. aiohttp's own trust_env would also send what ~/.netrc has for the host."""
    host = url.host or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    return getproxies().get(url.scheme)


class _Broken(Exception):
    """The connection broke, or the server had a bad moment: the request may be sent again."""


class RegistryClient:
    """One registry and one repository, for the length of one pull. An async context manager; not shared by tasks of
    different event loops, but by any number of tasks of one.
    """

    def __init__(self, reference: Reference, credentials: Credentials | None = None) -> None:
        """Nothing is sent yet."""
        self._repository = reference.path
        self._domain = reference.domain
        host = _DOCKER_HUB if reference.domain == DEFAULT_DOMAIN else reference.domain
        self._plain_allowed = is_loopback(URL(f"https://{host}").host or "")
        self._base = URL(f"{'http' if self._plain_allowed else 'https'}://{host}")
        self._credentials = credentials
        self._token: Token | None = None
        self._challenge: Challenge | None = None
        self._auth_lock = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RegistryClient:
        # Blobs are stored as they come: content codings must not be undone, nor cookies carried along.
        self._session = aiohttp.ClientSession(
            auto_decompress=False, timeout=_TIMEOUT, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=CHUNK,
            headers={"User-Agent": "dolium", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ping(self) -> None:
        """Ask for ``/v2/``: settles the scheme of a loopback registry and the way to authenticate.

        Raises Unavailable when nobody answers, or what answers is no registry.
        """
        async def once() -> None:
            async with self._send(self._base.with_path("/v2/"), {}) as answer:
                if answer.status == 400 and self._base.scheme == "http":  # Go's server, spoken to without TLS
                    self._base = self._base.with_scheme("https")
                    raise _Broken("the registry wants TLS")
                if answer.status == 401:
                    self._challenge = self._pick(answer)
                elif answer.status != 200:
                    raise await self._error(answer, "ping")

        await self._retry("ping", once)

    async def manifest(self, name: str) -> tuple[bytes, str, str]:
        """The manifest or index of a tag or digest: its bytes, media type and digest.

        Raises NotFound, PermissionDenied, Unavailable; InvalidArgument when the bytes do not fit a digest asked for.
        """
        url = self._url("manifests", name)
        accept = ", ".join((*MANIFESTS, *INDEXES))

        async def once() -> tuple[bytes, str, str]:
            async with self._request(url, {"Accept": accept}) as answer:
                if answer.status != 200:
                    raise await self._error(answer, f"manifest {name}")
                data = await _read(answer, MANIFEST_MAX, f"manifest {name}")
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
            await self._retry(what, lambda: self._blob_rest(url, descriptor, ingest, progress), lambda: ingest.offset)
            if not ingest.resumed:
                await asyncio.to_thread(ingest.commit)
                return
            try:
                await asyncio.to_thread(ingest.commit)
                return
            except InvalidArgument:
                ingest.reopen()

    async def _blob_rest(
        self, url: URL, descriptor: Descriptor, ingest: Ingest, progress: Callable[[int], None]
    ) -> None:
        start = ingest.offset
        if start == descriptor.size:
            return
        headers = {"Range": f"bytes={start}-{descriptor.size - 1}"} if start else {}
        async with self._request(url, headers) as answer:
            if start and answer.status == 206:
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise Unavailable(f"{self._name}: the registry sent another range of {descriptor.digest}")
            elif answer.status == 200:
                if start:  # the whole blob, although the rest was asked for
                    ingest.reset()
            elif answer.status == 416:
                ingest.reset()
                raise _Broken("the registry refused to resume")
            else:
                raise await self._error(answer, f"blob {descriptor.digest}")
            await self._receive(answer, ingest, progress)
        if ingest.offset < descriptor.size:
            raise _Broken(f"the connection ended after {ingest.offset} of {descriptor.size} bytes")

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

    @property
    def _name(self) -> str:
        return f"{self._domain}/{self._repository}"

    def _url(self, kind: str, name: str) -> URL:
        return self._base.with_path(f"/v2/{self._repository}/{kind}/{name}")

    async def _retry(self, what: str, once: Callable[[], Awaitable[_T]], made: Callable[[], int] = lambda: 0) -> _T:
        """Call ``once`` until it succeeds, fails for good, or breaks ATTEMPTS times without ``made()`` growing."""
        attempt, before = 0, made()
        while True:
            try:
                return await once()
            except aiohttp.ClientConnectorError as error:  # nobody there, no such host, a bad certificate
                raise Unavailable(f"{self._domain}: {error}") from None
            except (_Broken, aiohttp.ClientError, TimeoutError) as error:
                now = made()
                attempt = 1 if now > before else attempt + 1
                before = now
                if attempt >= ATTEMPTS:
                    raise Unavailable(f"{self._name}: {what}: {str(error) or type(error).__name__}") from None
            if attempt > 1:  # the first cut is resumed at once; later ones spread out
                await asyncio.sleep(0.1 * 2**attempt * (0.5 + random.random()))

    @asynccontextmanager
    async def _request(self, url: URL, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET with whatever authorization the registry asked for; a 401 is answered once."""
        for last in (False, True):
            token = await self._authorize()
            sent = dict(headers) | ({"Authorization": token} if token else {})
            async with self._send(url, sent) as answer:
                if answer.status != 401 or last:
                    yield answer
                    return
                challenge = self._pick(answer)
            async with self._auth_lock:
                self._challenge = challenge
                if self._token is not None and token == f"Bearer {self._token.value}":
                    self._token = None  # refused: expired early, or for another scope

    async def _authorize(self) -> str:
        """The Authorization header to send, or ''. One token request at a time."""
        async with self._auth_lock:
            challenge = self._challenge
            if challenge is None:
                return ""
            if challenge.scheme == "basic":
                return self._credentials.basic() if self._credentials else ""
            if self._token is None or not self._token.fresh:
                self._token = await self._retry("token", lambda: self._fetch_token(challenge))
            return f"Bearer {self._token.value}"

    def _pick(self, answer: aiohttp.ClientResponse) -> Challenge:
        """The best challenge of a 401: bearer, then basic when there are credentials."""
        challenges = parse_challenges(answer.headers.getall("WWW-Authenticate", []))
        for scheme in ("bearer", "basic"):
            for challenge in challenges:
                if challenge.scheme == scheme and (scheme == "bearer" or self._credentials is not None):
                    return challenge
        if any(challenge.scheme == "basic" for challenge in challenges):
            raise PermissionDenied(f"{self._domain}: no basic auth credentials", hint="log in to the registry first")
        raise PermissionDenied(f"{self._domain}: the registry asks for an authentication dolium does not know")

    async def _fetch_token(self, challenge: Challenge) -> Token:
        realm = self._parse(challenge.parameters.get("realm", ""))
        if not realm.is_absolute() or not self._may_visit(realm):
            raise PermissionDenied(f"{self._domain}: refusing to send credentials to token server {realm}")
        query = {"scope": challenge.parameters.get("scope") or f"repository:{self._repository}:pull"}
        if service := challenge.parameters.get("service"):
            query["service"] = service
        headers = {}
        if self._credentials is not None:
            query["account"] = self._credentials.user
            headers["Authorization"] = self._credentials.basic()
        async with self._send(realm.update_query(query), headers) as answer:
            if answer.status in (400, 401, 403):
                raise PermissionDenied(f"{self._domain}: authentication failed: {await _message(answer)}")
            if answer.status != 200:
                raise await self._error(answer, "token")
            return Token.parse(_json(await _read(answer, _TOKEN_MAX, "token")))

    def _parse(self, text: str) -> URL:
        """A URL the server named, spelled as it is: a presigned one's signature covers the spelling."""
        try:
            return URL(text, encoded=True)
        except ValueError as error:
            raise Unavailable(f"{self._domain}: the registry named an invalid URL: {error}") from None

    def _may_visit(self, url: URL) -> bool:
        """TLS anywhere; plain HTTP only from a loopback registry to loopback."""
        return url.scheme == "https" or (
            url.scheme == "http" and self._plain_allowed and is_loopback(url.host or "")
        )

    @asynccontextmanager
    async def _send(self, url: URL, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """One GET, redirects followed by the rules of this module."""
        if self._session is None:
            raise Internal("the registry client is used outside its context")
        for _ in range(_REDIRECTS + 1):
            async with self._session.get(url, headers=headers, allow_redirects=False, proxy=_proxy(url)) as answer:
                if answer.status not in (301, 302, 303, 307, 308):
                    yield answer
                    return
                target = url.join(self._parse(answer.headers.get("Location", "")))
            if not self._may_visit(target):
                raise Unavailable(f"{self._domain}: refusing the redirect to {target.scheme}://{target.host or ''}")
            if target.origin() != url.origin():
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
            url = target
        raise Unavailable(f"{self._domain}: more than {_REDIRECTS} redirects")

    async def _error(self, answer: aiohttp.ClientResponse, what: str) -> Exception:
        """The error for a status that is not the one hoped for; _Broken when it is worth another try."""
        said = await _message(answer)
        subject = f"{self._name}: {what}"
        if answer.status in _RETRIED:
            return _Broken(f"HTTP {answer.status}: {said}")
        if answer.status == 404:
            return NotFound(f"{subject} not found: {said}")
        if answer.status in (401, 403):
            return PermissionDenied(
                f"pull access denied for {self._name}: {said}",
                hint="the repository does not exist or needs a login",
            )
        if answer.status == 429:
            return ResourceExhausted(f"{subject}: too many requests: {said}")
        return Unavailable(f"{subject}: HTTP {answer.status}: {said}")


async def _read(answer: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk
        if len(data) > limit:
            raise InvalidArgument(f"{what}: the answer is longer than {limit} bytes")
    return bytes(data)


def _json(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


async def _message(answer: aiohttp.ClientResponse) -> str:
    """What the server says is wrong, in one printable line; its status line when it says nothing."""
    body = _json(await answer.content.read(_ERROR_MAX))
    said = ""
    if isinstance(body, dict):
        errors = body.get("errors")
        first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else body
        said = str(first.get("message") or first.get("code") or first.get("details") or "")
    said = "".join(character for character in said if character.isprintable())
    return said or f"{answer.status} {answer.reason}"
