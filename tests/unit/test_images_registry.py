"""The registry client against servers in this process that misbehave on purpose."""

from __future__ import annotations

import asyncio
import base64
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from dolium.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from dolium.images import transport as module
from dolium.images.auth import Challenge, Credentials, Token, parse_challenges
from dolium.images.content import ContentStore, digest_of
from dolium.images.hosts import is_loopback
from dolium.images.manifest import OCI_MANIFEST, Descriptor
from dolium.images.reference import Reference
from dolium.images.registry import RegistryClient

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BLOB = os.urandom(3_000_000)
DIGEST = digest_of(BLOB)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.sleep
    monkeypatch.setattr(module.asyncio, "sleep", lambda seconds: real(0))


@asynccontextmanager
async def serve(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """A server that gives every request to ``handler``; yields host:port."""
    async def dispatch(request: web.BaseRequest) -> web.StreamResponse:
        return await handler(request)  # type: ignore[arg-type]

    runner = web.ServerRunner(web.Server(dispatch))
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    try:
        yield f"{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def client(address: str, credentials: Credentials | None = None) -> RegistryClient:
    return RegistryClient(Reference.parse(f"{address}/app:1"), credentials)


async def fetch(address: str, root: Path, *, size: int = len(BLOB), digest: str = DIGEST,
                credentials: Credentials | None = None) -> tuple[ContentStore, list[int]]:
    """Fetch one blob into a new store."""
    store, seen = ContentStore(root), []  # type: tuple[ContentStore, list[int]]
    async with client(address, credentials) as registry:
        await registry.ping()
        with store.ingest(digest, size) as ingest:
            await registry.blob(Descriptor("", digest, size), ingest, seen.append)
    return store, seen


async def cut_after(request: web.Request, data: bytes, start: int, end: int) -> web.StreamResponse:
    """Announce data[start:], send data[start:end], drop the connection."""
    answer = web.StreamResponse(status=206 if start else 200)
    answer.content_length = len(data) - start
    if start:
        answer.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    await answer.prepare(request)
    await answer.write(data[start:end])
    assert request.transport is not None
    request.transport.close()
    return answer


def range_start(request: web.Request) -> int:
    value = request.headers.get("Range", "bytes=0-")
    return int(value.removeprefix("bytes=").split("-")[0])


# Blobs


def test_a_blob_is_fetched_and_checked(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB if "blobs" in request.path else b"{}")

    async def main() -> None:
        async with serve(handler) as address:
            store, seen = await fetch(address, tmp_path)
            assert store.read(DIGEST, limit=len(BLOB)) == BLOB
            assert seen == sorted(seen) and seen[-1] == len(BLOB)

    asyncio.run(main())


def test_a_cut_connection_is_resumed_where_it_broke(tmp_path: Path) -> None:
    starts: list[int] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if "blobs" not in request.path:
            return web.Response()
        starts.append(range_start(request))
        end = {1: 1_500_000, 2: 2_500_000}.get(len(starts))
        if end is not None:
            return await cut_after(request, BLOB, starts[-1], end)
        start = starts[-1]
        headers = {"Content-Range": f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"}
        return web.Response(status=206, body=BLOB[start:], headers=headers)

    async def main() -> None:
        async with serve(handler) as address:
            store, _ = await fetch(address, tmp_path)
            assert store.has(DIGEST, len(BLOB))

    asyncio.run(main())
    assert starts[0] == 0 and len(starts) == 3
    assert 0 < starts[1] <= 1_500_000 and starts[1] < starts[2] <= 2_500_000


def test_many_cuts_are_no_failure_as_long_as_bytes_come(tmp_path: Path) -> None:
    count = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal count
        if "blobs" not in request.path:
            return web.Response()
        count += 1
        start = range_start(request)
        return await cut_after(request, BLOB, start, min(start + 200_000, len(BLOB)))

    async def main() -> None:
        async with serve(handler) as address:
            store, _ = await fetch(address, tmp_path)
            assert store.has(DIGEST)

    asyncio.run(main())
    assert count > module.ATTEMPTS


def test_a_server_without_ranges_sends_all_of_it_again(tmp_path: Path) -> None:
    count = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal count
        if "blobs" not in request.path:
            return web.Response()
        count += 1
        return await cut_after(request, BLOB, 0, 100_000) if count == 1 else web.Response(body=BLOB)

    async def main() -> None:
        async with serve(handler) as address:
            store, _ = await fetch(address, tmp_path)
            assert store.has(DIGEST)

    asyncio.run(main())
    assert count == 2


def test_a_download_of_an_earlier_call_is_resumed(tmp_path: Path) -> None:
    starts: list[int] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if "blobs" not in request.path:
            return web.Response()
        starts.append(range_start(request))
        headers = {"Content-Range": f"bytes {starts[-1]}-{len(BLOB) - 1}/{len(BLOB)}"}
        return web.Response(status=206, body=BLOB[starts[-1]:], headers=headers)

    async def main() -> None:
        with ContentStore(tmp_path).ingest(DIGEST, len(BLOB)) as ingest:
            ingest.write(BLOB[:1_000_000])
        async with serve(handler) as address:
            store, _ = await fetch(address, tmp_path)
            assert store.has(DIGEST)

    asyncio.run(main())
    assert starts == [1_000_000]


def test_a_damaged_partial_is_fetched_again_from_the_start(tmp_path: Path) -> None:
    starts: list[int] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if "blobs" not in request.path:
            return web.Response()
        start = range_start(request)
        starts.append(start)
        headers = {"Content-Range": f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"}
        return web.Response(status=206 if start else 200, body=BLOB[start:], headers=headers if start else {})

    async def main() -> None:
        with ContentStore(tmp_path).ingest(DIGEST, len(BLOB)) as ingest:
            ingest.write(b"\0" * 1_000_000)  # what a power cut leaves
        async with serve(handler) as address:
            store, _ = await fetch(address, tmp_path)
            assert store.has(DIGEST)

    asyncio.run(main())
    assert starts == [1_000_000, 0]


@pytest.mark.parametrize(("body", "reason"), [
    (BLOB[:-1] + b"!", "wrong content"), (BLOB + b"!", "longer than"),
])
def test_wrong_content_never_becomes_a_blob(tmp_path: Path, body: bytes, reason: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body if "blobs" in request.path else b"")

    async def main() -> None:
        async with serve(handler) as address:
            with pytest.raises(InvalidArgument, match=reason):
                await fetch(address, tmp_path)
        store = ContentStore(tmp_path)
        assert list(store.digests()) == []

    asyncio.run(main())


def test_a_server_that_only_breaks_is_unavailable(tmp_path: Path) -> None:
    count = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal count
        if "blobs" not in request.path:
            return web.Response()
        count += 1
        return web.Response(status=503)

    async def main() -> None:
        async with serve(handler) as address:
            with pytest.raises(Unavailable, match="503"):
                await fetch(address, tmp_path)

    asyncio.run(main())
    assert count == module.ATTEMPTS


def test_cancelling_keeps_what_came(tmp_path: Path) -> None:
    async def main() -> None:
        arrived, over, store = asyncio.Event(), asyncio.Event(), ContentStore(tmp_path)

        async def handler(request: web.Request) -> web.StreamResponse:
            if "blobs" not in request.path:
                return web.Response()
            answer = web.StreamResponse()
            answer.content_length = len(BLOB)
            await answer.prepare(request)
            await answer.write(BLOB[:-1])
            await over.wait()
            return answer

        def seen(done: int) -> None:
            arrived.set()

        async def download(address: str) -> None:
            async with client(address) as registry:
                with store.ingest(DIGEST, len(BLOB)) as ingest:
                    await registry.blob(Descriptor("", DIGEST, len(BLOB)), ingest, seen)

        async with serve(handler) as address:
            task = asyncio.create_task(download(address))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            over.set()
        with store.ingest(DIGEST, len(BLOB)) as ingest:
            assert ingest.offset >= 1 << 20

    asyncio.run(main())


# Manifests


def test_manifest_digests_are_checked() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": OCI_MANIFEST}
        if request.path.endswith("/lying"):
            headers["Docker-Content-Digest"] = DIGEST
        return web.Response(body=b"{}", headers=headers)

    async def main() -> None:
        async with serve(handler) as address, client(address) as registry:
            assert await registry.manifest("1") == (b"{}", OCI_MANIFEST, digest_of(b"{}"))
            for name in (DIGEST, "lying"):
                with pytest.raises(InvalidArgument, match="wrong content"):
                    await registry.manifest(name)

    asyncio.run(main())


@pytest.mark.parametrize(("status", "error", "words"), [
    (404, NotFound, "manifest unknown"), (403, PermissionDenied, "pull access denied"),
    (429, ResourceExhausted, "too many requests"), (418, Unavailable, "418"),
])
def test_what_the_server_says_reaches_the_message(status: int, error: type[Exception], words: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        body = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown\x1b[2J"}]}
        return web.json_response(body, status=status)

    async def main() -> None:
        async with serve(handler) as address, client(address) as registry:
            with pytest.raises(error, match=words) as caught:
                await registry.manifest("1")
            assert "\x1b" not in str(caught.value)

    asyncio.run(main())


def test_manifests_have_a_limit() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b" " * (5 << 20))

    async def main() -> None:
        async with serve(handler) as address, client(address) as registry:
            with pytest.raises(InvalidArgument, match="longer than"):
                await registry.manifest("1")

    asyncio.run(main())


def test_nobody_there() -> None:
    async def main() -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            return web.Response()

        async with serve(handler) as address:
            pass
        async with client(address) as registry:
            with pytest.raises(Unavailable, match=rf"^{re.escape(address)}: cannot connect: Connection refused$"):
                await registry.ping()

    asyncio.run(main())


def test_a_server_that_hangs_up_is_named_in_words_of_ours() -> None:
    async def main() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server, client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as registry:
            with pytest.raises(Unavailable, match=r"the connection was closed before an answer came$"):
                await registry.ping()

    asyncio.run(main())


# Authentication


def test_challenges() -> None:
    assert parse_challenges(['Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"']) == [
        Challenge("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"})
    ]
    assert parse_challenges(['Basic realm="a \\"b\\"", Bearer Realm=x , service="y"', "Negotiate"]) == [
        Challenge("basic", {"realm": 'a "b"'}), Challenge("bearer", {"realm": "x", "service": "y"}),
        Challenge("negotiate", {}),
    ]
    assert parse_challenges(["", "=", '"']) == []


def test_tokens() -> None:
    assert Token.parse({"access_token": "t", "expires_in": 300}).fresh
    assert Token.parse({"token": "t"}).value == "t"
    for answer in (None, {}, {"token": 5}, {"token": "a\nb"}, []):
        with pytest.raises(Unavailable):
            Token.parse(answer)
    assert "secret" not in repr(Credentials("user", "secret")) + repr(Token("secret", 1.0))


def test_the_bearer_way() -> None:
    tokens: list[tuple[str, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            tokens.append((request.query["scope"], request.headers.get("Authorization", "")))
            assert request.query["service"] == "srv"
            return web.json_response({"token": f"t{len(tokens)}"})
        if request.headers.get("Authorization") != "Bearer t1":
            challenge = f'Bearer realm="http://{request.host}/token",service="srv"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return web.Response(body=b"{}")

    async def main() -> None:
        async with serve(handler) as address, client(address) as registry:
            await registry.ping()
            assert (await registry.manifest("1"))[0] == b"{}"

    asyncio.run(main())
    assert tokens == [("repository:app:pull", "")]


def test_a_refused_token_is_replaced_once() -> None:
    issued = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal issued
        if request.path == "/token":
            issued += 1
            return web.json_response({"token": f"t{issued}"})
        if request.headers.get("Authorization") != "Bearer t2":
            return web.Response(status=401, headers={
                "WWW-Authenticate": f'Bearer realm="http://{request.host}/token"'})
        return web.Response(body=b"{}")

    async def main() -> None:
        async with serve(handler) as address, client(address) as registry:
            await registry.ping()
            assert (await registry.manifest("1"))[0] == b"{}"

    asyncio.run(main())
    assert issued == 2


def test_parallel_requests_share_one_token() -> None:
    issued = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal issued
        if request.path == "/token":
            issued += 1
            return web.json_response({"token": "t"})
        if request.headers.get("Authorization") != "Bearer t":
            return web.Response(status=401, headers={
                "WWW-Authenticate": f'Bearer realm="http://{request.host}/token"'})
        return web.Response(body=b"{}")

    async def main() -> None:
        async with serve(handler) as address, client(address) as registry:
            await registry.ping()
            await asyncio.gather(*(registry.manifest("1") for _ in range(8)))

    asyncio.run(main())
    assert issued == 1


def test_basic() -> None:
    expected = "Basic " + base64.b64encode(b"user:pass:word").decode()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != expected:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})
        return web.Response(body=b"{}")

    async def main() -> None:
        async with serve(handler) as address:
            async with client(address, Credentials("user", "pass:word")) as registry:
                await registry.ping()
                await registry.manifest("1")
            async with client(address, Credentials("user", "wrong")) as registry:
                await registry.ping()
                with pytest.raises(PermissionDenied, match="pull access denied"):
                    await registry.manifest("1")
            async with client(address) as registry:
                with pytest.raises(PermissionDenied, match="no basic auth credentials"):
                    await registry.ping()

    asyncio.run(main())


def test_wrong_password_at_the_token_server() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            assert request.query["account"] == "user"
            return web.json_response({"details": "incorrect username or password"}, status=401)
        return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="http://{request.host}/token"'})

    async def main() -> None:
        async with serve(handler) as address, client(address, Credentials("user", "x")) as registry:
            await registry.ping()
            with pytest.raises(PermissionDenied, match="incorrect username or password"):
                await registry.manifest("1")

    asyncio.run(main())


@pytest.mark.parametrize("realm", ["http://192.0.2.1/t", "http://example.com/t", "ftp://127.0.0.1/", "", "/token"])
def test_credentials_do_not_go_to_strange_token_servers(realm: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})

    async def main() -> None:
        async with serve(handler) as address, client(address, Credentials("user", "x")) as registry:
            await registry.ping()
            with pytest.raises(PermissionDenied, match="refusing to send credentials"):
                await registry.manifest("1")

    asyncio.run(main())


# Redirects


def test_a_redirect_to_another_host_drops_authorization(tmp_path: Path) -> None:
    seen: list[str | None] = []

    async def storage(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        assert request.rel_url.raw_query_string == "sig=a%2Fb%2Bc"
        return web.Response(body=BLOB)

    async def main() -> None:
        async with serve(storage, "localhost") as other:
            async def handler(request: web.Request) -> web.StreamResponse:
                if not request.headers.get("Authorization"):
                    return web.Response(status=401, headers={"WWW-Authenticate": "Basic realm=x"})
                if "blobs" in request.path:
                    return web.Response(status=307, headers={"Location": f"http://{other}/b?sig=a%2Fb%2Bc"})
                return web.Response()

            async with serve(handler) as address:
                await fetch(address, tmp_path, credentials=Credentials("u", "p"))

    asyncio.run(main())
    assert seen == [None]


def test_a_redirect_within_the_host_keeps_authorization(tmp_path: Path) -> None:
    seen: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if not request.headers.get("Authorization"):
            return web.Response(status=401, headers={"WWW-Authenticate": "Basic realm=x"})
        if "blobs" in request.path:
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        if request.path == "/elsewhere":
            seen.append(request.headers.get("Authorization"))
            return web.Response(body=BLOB)
        return web.Response()

    async def main() -> None:
        async with serve(handler) as address:
            await fetch(address, tmp_path, credentials=Credentials("u", "p"))

    asyncio.run(main())
    assert seen == [Credentials("u", "p").basic()]


@pytest.mark.parametrize("target", ["http://192.0.2.1/x", "http://example.com/x", "file:///etc/passwd", ""])
def test_bad_redirects(tmp_path: Path, target: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if "blobs" in request.path:
            return web.Response(status=302, headers={"Location": target} if target else {"Location": request.path})
        return web.Response()

    async def main() -> None:
        async with serve(handler) as address:
            with pytest.raises(Unavailable, match="redirect"):
                await fetch(address, tmp_path)

    asyncio.run(main())


def test_proxies_are_for_the_world_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "example.org")
    urls = ["https://quay.io/v2/", "https://example.org/v2/", "https://127.0.0.1:5000/v2/", "https://localhost/"]
    assert [module._proxy(module.URL(url)) for url in urls] == ["http://proxy:3128", None, None, None]


@pytest.mark.parametrize(("host", "expected"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("localhost.example.com", False), ("10.0.0.1", False), ("128.0.0.1", False), ("registry-1.docker.io", False),
    ("", False),
])
def test_plain_http_is_for_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
