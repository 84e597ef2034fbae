"""Requests to one registry host: redirects, authentication, retries. What they mean is ``registry``'s business.

Anonymous, basic and bearer authentication. Plain HTTP only where the endpoint allows it. Redirects are followed here, not
by the HTTP library: the Authorization header never goes to another origin, and no redirect leads from TLS to plain HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, TypeVar
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from dolium.errors import (
    DoliumError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from dolium.images.auth import Challenge, Credentials, Token, merge_scopes, parse_challenges, retry_after
from dolium.images.content import CHUNK
from dolium.images.hosts import Endpoint, is_loopback

ATTEMPTS = 5  # in a row without a byte of progress
_REDIRECTS = 5
_TOKEN_MAX = 1 << 20
_ERROR_MAX = 1 << 16
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
_RETRIED = (408, 500, 502, 503, 504)
_CLIENT_ID = "dolium"

_T = TypeVar("_T")
Body = Callable[[], bytes | AsyncIterator[bytes]]
"""Makes a request's body anew for each time it is sent."""


def _proxy(url: URL) -> str | None:
    """The proxy of HTTPS_PROXY and NO_PROXY. aiohttp's own trust_env would also send what ~/.netrc has for the host."""
    host = url.host or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    return getproxies().get(url.scheme)


class Broken(Exception):
    """The connection broke, or the server had a bad moment: the request may be sent again, after ``after`` seconds.

    ``final`` is the error for when it has been tried often enough.
    """

    def __init__(self, message: str, *, after: float = 0.0, final: type[DoliumError] = Unavailable) -> None:
        super().__init__(message)
        self.after = after
        self.final = final


def _reason(error: Exception) -> str:
    """What went wrong with a connection, in words of ours: the library's name its own objects."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not accepted: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        number = 0 if isinstance(cause, ssl.SSLError) else cause.errno or 0
        return f"cannot connect: {os.strerror(number) if number > 0 else cause.strerror or cause}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed before an answer came"
    if isinstance(error, TimeoutError):
        return "no answer came in time"
    return str(error) or type(error).__name__


class Transport:
    """One endpoint and one repository, for the length of one pull or push. An async context manager; not shared by tasks
    of different event loops, but by any number of tasks of one.
    """

    def __init__(
        self, endpoint: Endpoint, credentials: Credentials | None = None, *, actions: str = "pull", name: str = "",
    ) -> None:
        """Nothing is sent yet. ``actions`` are what a token is asked for: ``pull`` or ``pull,push``; without a
        repository (a login) none is. ``name`` is what messages call the repository.
        """
        self.endpoint = endpoint
        self._repository = endpoint.repository
        self._domain = endpoint.host
        self._name = name or (f"{endpoint.host}/{endpoint.repository}" if endpoint.repository else endpoint.host)
        self._base = URL(f"{'http' if endpoint.plain_first else 'https'}://{endpoint.host}")
        self._credentials = credentials
        self._verb = "push" if "push" in actions else "pull"
        self._scopes = [f"repository:{self._repository}:{actions}"] if self._repository else []
        self._token: Token | None = None
        self._refresh = credentials.identity_token if credentials else ""
        self._challenge: Challenge | None = None
        self._auth_lock = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None
        self._context: ssl.SSLContext | bool | None = None

    async def __aenter__(self) -> Self:
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
        """Ask for ``/v2/``: settles the scheme of a registry that may be plain, and the way to authenticate.

        Raises Unavailable when nobody answers, or what answers is no registry.
        """
        async def once() -> None:
            try:
                async with self._send("GET", self._base.with_path("/v2/"), {}) as answer:
                    if answer.status == 400 and self._base.scheme == "http":  # Go's server, spoken to without TLS
                        self._base = self._base.with_scheme("https")
                        raise Broken("the registry wants TLS")
                    if answer.status == 401:
                        self._challenge = self._pick(answer)
                    elif answer.status != 200:
                        raise await self._error(answer, "ping")
            except (aiohttp.ClientConnectorError, aiohttp.ClientConnectorCertificateError):
                if self._base.scheme == "https" and self.endpoint.plain and not self.endpoint.plain_first:
                    self._base = self._base.with_scheme("http")  # a host that the administrator has named insecure
                    raise Broken("the registry does not speak TLS") from None
                raise

        await self._retry("ping", once)

    def also_pull(self, repositories: Iterable[str]) -> None:
        """Ask for a token that reads these repositories of the host, too: blobs are mounted from there."""
        self._scopes += [f"repository:{repository}:pull" for repository in repositories]

    async def login(self) -> str:
        """Have the registry check the credentials; returns the identity token it gives in place of the password, or "".

        Raises PermissionDenied, Unavailable.
        """
        await self.ping()
        challenge = self._challenge
        if challenge is None:
            return ""
        if challenge.scheme == "bearer":
            self._token = await self._retry("token", lambda: self._fetch_token(challenge, offline=True))
        async with self._request("GET", self._base.with_path("/v2/"), {}) as answer:
            if answer.status in (401, 403):
                raise PermissionDenied(f"{self._domain}: incorrect username or password: {await _message(answer)}")
            if answer.status != 200:
                raise await self._error(answer, "login")
        return self._refresh

    def _url(self, kind: str, name: str) -> URL:
        return self._base.with_path(f"/v2/{self._repository}/{kind}/{name}")

    async def _retry(self, what: str, once: Callable[[], Awaitable[_T]], made: Callable[[], int] = lambda: 0) -> _T:
        """Call ``once`` until it succeeds, fails for good, or breaks ATTEMPTS times without ``made()`` growing."""
        attempt, before = 0, made()
        while True:
            after = 0.0
            try:
                return await once()
            except aiohttp.ClientConnectorError as error:  # nobody there, no such host, a bad certificate
                raise Unavailable(f"{self._domain}: {_reason(error)}") from None
            except (Broken, aiohttp.ClientError, TimeoutError) as error:
                now = made()
                attempt = 1 if now > before else attempt + 1
                before = now
                final: type[DoliumError] = Unavailable
                if isinstance(error, Broken):
                    after, final = error.after, error.final
                if attempt >= ATTEMPTS:
                    raise final(f"{self._name}: {what}: {_reason(error)}") from None
            if after or attempt > 1:  # the first cut is resumed at once; later ones spread out
                await asyncio.sleep(max(after, 0.1 * 2**attempt * (0.5 + random.random()) if attempt > 1 else 0.0))

    @asynccontextmanager
    async def _request(
        self, method: str, url: URL, headers: Mapping[str, str], body: Body | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request with whatever authorization the registry asked for; a 401 is answered once."""
        ours = url.origin() == self._base.origin()
        for last in (False, True):
            token = await self._authorize() if ours else ""
            sent = dict(headers) | ({"Authorization": token} if token else {})
            async with self._send(method, url, sent, body) as answer:
                if answer.status != 401 or last or not ours:
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
            if self._credentials is not None and self._credentials.registry_token:
                return f"Bearer {self._credentials.registry_token}"
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

    async def _fetch_token(self, challenge: Challenge, *, offline: bool = False) -> Token:
        """A token of the server the registry names: by GET with a password, by OAuth 2's POST with an identity token
        (distribution's "token" and "oauth" specifications). ``offline`` asks for an identity token, too.
        """
        realm = self._parse(challenge.parameters.get("realm", ""))
        if not realm.is_absolute() or not self._may_visit(realm):
            raise PermissionDenied(f"{self._domain}: refusing to send credentials to token server {realm}")
        scopes = merge_scopes([*self._scopes, *challenge.parameters.get("scope", "").split(" ")])
        service = challenge.parameters.get("service", "")
        if self._refresh and not offline:
            form = {"grant_type": "refresh_token", "refresh_token": self._refresh, "client_id": _CLIENT_ID,
                    "service": service, "scope": " ".join(scopes)}
            sending = self._send("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"},
                                 lambda: URL.build(query=form).raw_query_string.encode())
        else:
            query = [("scope", scope) for scope in scopes]
            query += [("service", service)] if service else []
            headers = {}
            if self._credentials is not None and self._credentials.user:
                query += [("account", self._credentials.user), ("client_id", _CLIENT_ID)]
                query += [("offline_token", "true")] if offline else []
                headers["Authorization"] = self._credentials.basic()
            sending = self._send("GET", realm.update_query([*realm.query.items(), *query]), headers)
        async with sending as answer:
            if answer.status in (400, 401, 403):
                raise PermissionDenied(f"{self._domain}: authentication failed: {await _message(answer)}")
            if answer.status != 200:
                raise await self._error(answer, "token")
            value = parse_json(await read_limited(answer, _TOKEN_MAX, "token"))
        token = Token.parse(value)
        if isinstance(value, dict) and isinstance(value.get("refresh_token"), str):
            self._refresh = value["refresh_token"]
        return token

    def _parse(self, text: str) -> URL:
        """A URL the server named, spelled as it is: a presigned one's signature covers the spelling."""
        try:
            return URL(text, encoded=True)
        except ValueError as error:
            raise Unavailable(f"{self._domain}: the registry named an invalid URL: {error}") from None

    def _may_visit(self, url: URL) -> bool:
        """TLS anywhere; plain HTTP only from a registry that may be plain, to loopback or to itself."""
        return url.scheme == "https" or (
            url.scheme == "http" and self.endpoint.plain
            and (is_loopback(url.host or "") or url.host == self._base.host)
        )

    def _tls(self, url: URL) -> ssl.SSLContext | bool:
        """The certificates of the registry's own host; the system's for where it redirects to. One object for all
        requests: connections are used again only among those that share it.
        """
        if url.host != self._base.host or url.port != self._base.port:
            return True
        if self._context is None:
            self._context = self.endpoint.tls()
        return self._context

    @asynccontextmanager
    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], body: Body | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, redirects followed by the rules of this module."""
        if self._session is None:
            raise Internal("the registry client is used outside its context")
        for _ in range(_REDIRECTS + 1):
            async with self._session.request(
                method, url, headers=headers, data=body() if body is not None else None, allow_redirects=False,
                proxy=_proxy(url), ssl=self._tls(url) if url.scheme == "https" else True,
            ) as answer:
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
        """The error for a status that is not the one hoped for; Broken when it is worth another try."""
        said = await _message(answer)
        subject = f"{self._name}: {what}"
        if answer.status in _RETRIED:
            return Broken(f"HTTP {answer.status}: {said}", after=retry_after(answer.headers.get("Retry-After", "")))
        if answer.status == 429:
            return Broken(f"too many requests: {said}", after=retry_after(answer.headers.get("Retry-After", "")),
                          final=ResourceExhausted)
        if answer.status == 404:
            return NotFound(f"{subject} not found: {said}")
        if answer.status in (401, 403):
            return PermissionDenied(
                f"{self._verb} access denied for {self._name}: {said}",
                hint="the repository does not exist or needs a login",
            )
        return Unavailable(f"{subject}: HTTP {answer.status}: {said}")


async def read_limited(answer: aiohttp.ClientResponse, limit: int, what: str) -> bytes:
    """The whole body. Raises InvalidArgument when it is longer than ``limit`` bytes."""
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk
        if len(data) > limit:
            raise InvalidArgument(f"{what}: the answer is longer than {limit} bytes")
    return bytes(data)


def parse_json(data: bytes) -> object:
    """The value, None when it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


async def _message(answer: aiohttp.ClientResponse) -> str:
    """What the server says is wrong, in one printable line; its status line when it says nothing."""
    body = parse_json(await answer.content.read(_ERROR_MAX))
    said = ""
    if isinstance(body, dict):
        errors = body.get("errors")
        first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else body
        said = str(first.get("message") or first.get("code") or first.get("details") or "")
    said = "".join(character for character in said if character.isprintable())
    return said or f"{answer.status} {answer.reason}"
