"""Uploads, parts, waiting and mirrors against servers in this process that misbehave on purpose."""

from __future__ import annotations

import asyncio
import io
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from test_images_registry import BLOB, DIGEST, serve

from dolium.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from dolium.images import registry as module
from dolium.images import transport
from dolium.images.auth import Credentials, credentials_of, decode_header, merge_scopes, retry_after
from dolium.images.content import ContentStore, digest_of
from dolium.images.hosts import Endpoint, Settings, parse_registries, read_settings
from dolium.images.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor
from dolium.images.reference import Reference
from dolium.images.registry import RegistryClient
from dolium.images.sources import Sources

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits; how long it would have."""
    real, seen = asyncio.sleep, []  # type: tuple[Callable[[float], Awaitable[None]], list[float]]

    async def sleep(seconds: float) -> None:
        seen.append(seconds)
        await real(0)

    monkeypatch.setattr(transport.asyncio, "sleep", sleep)
    return seen


class Uploads:
    """A registry that takes uploads; ``fail`` may spoil a request: a status, or "cut"."""

    def __init__(self, fail: Callable[[str, int], int | str | None] = lambda method, count: None) -> None:
        self.fail, self.data, self.seen = fail, b"", []  # type: ignore[var-annotated]
        self.stored: dict[str, bytes] = {}
        self.mounts: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.knows_subjects = False

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request.method)
        wrong = self.fail(request.method, self.seen.count(request.method))
        if wrong == "cut":
            self.data += await request.content.readexactly(1 << 20)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(wrong, int):
            await request.content.read()
            return web.Response(status=wrong, headers={"WWW-Authenticate": "Basic realm=x"} if wrong == 401 else {})
        return await getattr(self, request.method.lower())(request)  # type: ignore[no-any-return]

    def _state(self, status: int) -> web.Response:
        return web.Response(status=status, headers={"Location": f"/v2/app/blobs/uploads/1?at={len(self.data)}",
                                                    "Range": f"0-{max(len(self.data) - 1, 0)}"})

    async def head(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.path.rpartition("/")[2] in self.stored else 404)

    async def get(self, request: web.Request) -> web.Response:
        if "uploads" in request.path:
            return self._state(204)
        name = request.path.rpartition("/")[2]
        if "manifests" in request.path and name in self.manifests:
            return web.Response(body=self.manifests[name], headers={"Content-Type": OCI_INDEX})
        return web.Response(status=404 if request.path != "/v2/" else 200)

    async def post(self, request: web.Request) -> web.Response:
        if request.query.get("mount") in self.mounts:
            return web.Response(status=201)
        self.data = b""
        return self._state(202)

    async def patch(self, request: web.Request) -> web.Response:
        start, end = map(int, request.headers["Content-Range"].split("-"))
        if start != len(self.data):
            return web.Response(status=416)
        self.data += await request.content.read()
        assert len(self.data) == end + 1
        return self._state(202)

    async def put(self, request: web.Request) -> web.Response:
        body = await request.content.read()
        if "manifests" in request.path:
            self.manifests[request.path.rpartition("/")[2]] = body
            headers = {"Docker-Content-Digest": digest_of(body)} | ({"OCI-Subject": "x"} if self.knows_subjects else {})
            return web.Response(status=201, headers=headers)
        self.data += body
        digest = request.query["digest"]
        if digest_of(self.data) != digest:
            return web.json_response({"errors": [{"code": "DIGEST_INVALID"}]}, status=400)
        self.stored[digest] = self.data
        return web.Response(status=201)


def push(server: Uploads, data: bytes = BLOB, digest: str = DIGEST, mounts: tuple[str, ...] = ()) -> str | None:
    async def main() -> str | None:
        async with serve(server) as address, \
                RegistryClient(Reference.parse(f"{address}/app:1"), actions="pull,push") as client:  # type: ignore[arg-type]
            await client.ping()
            return await client.push_blob(digest, len(data), lambda: io.BytesIO(data), lambda done: None, mounts)

    return asyncio.run(main())


def test_a_small_blob_is_one_request() -> None:
    server = Uploads()
    assert push(server) is None
    assert server.stored == {DIGEST: BLOB} and server.seen == ["GET", "HEAD", "POST", "PUT"]
    assert push(server) == "" and server.seen[4:] == ["GET", "HEAD"]
    empty = digest_of(b"")
    assert push(server, b"", empty) is None and server.stored[empty] == b""


def test_chunks_go_on_where_the_registry_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UPLOAD_CHUNK", 2 << 20)
    data = os.urandom(9 << 20)
    server = Uploads(lambda method, count: "cut" if method == "PATCH" and count == 2 else None)
    server_chunk = module._Upload
    monkeypatch.setattr(server_chunk, "__init__", _small(server_chunk))
    assert push(server, data, digest_of(data)) is None
    assert server.stored == {digest_of(data): data}
    assert server.seen.count("POST") == 1 and server.seen.count("GET") == 2  # the ping, and where it is


def _small(kind: type[module._Upload]) -> Callable[[module._Upload], None]:
    def init(self: module._Upload) -> None:
        self.location, self.offset, self.chunk, self.unsure = None, 0, 2 << 20, False

    return init


def test_a_forgotten_upload_begins_again() -> None:
    class Forgets(Uploads):
        async def get(self, request: web.Request) -> web.Response:
            return web.Response(status=404 if "uploads" in request.path else 200)

    server = Forgets(lambda method, count: 503 if method == "PUT" and count == 1 else None)
    assert push(server) is None
    assert server.stored == {DIGEST: BLOB} and server.seen.count("POST") == 2


def test_mounts_and_what_cannot_be_mounted() -> None:
    server = Uploads()
    server.mounts[DIGEST] = BLOB
    assert push(server, mounts=("other", "third")) == "other" and "PUT" not in server.seen
    server.mounts.clear()
    assert push(server, mounts=("other", "third")) is None and server.seen[-3:] == ["HEAD", "POST", "PUT"]


@pytest.mark.parametrize(("status", "error"), [(401, PermissionDenied), (403, PermissionDenied), (400, InvalidArgument),
                                               (500, Unavailable), (429, ResourceExhausted), (413, Unavailable)])
def test_what_a_registry_refuses_is_told(status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"127\.0\.0\.1"):
        push(Uploads(lambda method, count: status if method == "PUT" else None))


def test_manifests_and_their_subjects() -> None:
    subject = Descriptor(OCI_MANIFEST, digest_of(b"subject"), 7)
    data = b'{"schemaVersion":2,"artifactType":"a/b","config":{"mediaType":"c/d"},"annotations":{"k":"v"}}'

    async def main(server: Uploads) -> list[dict[str, object]]:
        async with serve(server) as address, \
                RegistryClient(Reference.parse(f"{address}/app:1")) as client:  # type: ignore[arg-type]
            for name in ("1", digest_of(data)):
                assert await client.put_manifest(name, data, OCI_MANIFEST, subject=subject) == digest_of(data)
            assert await client.referrers(subject.digest, "x/y") == []
            return await client.referrers(subject.digest)

    server = Uploads()
    found = asyncio.run(main(server))  # it knows no referrers: a tag stands for them, each once
    assert found == [{"mediaType": OCI_MANIFEST, "digest": digest_of(data), "size": len(data), "artifactType": "a/b",
                      "annotations": {"k": "v"}}]
    server = Uploads()
    server.knows_subjects = True
    asyncio.run(main(server))
    assert set(server.manifests) == {"1", digest_of(data)}


def test_referrers_come_in_pages() -> None:
    entries = [{"mediaType": OCI_MANIFEST, "digest": digest_of(bytes([n])), "size": 1, "artifactType": f"t/{n % 2}"}
               for n in range(4)]

    async def handler(request: web.Request) -> web.StreamResponse:
        page = int(request.query.get("page", "0"))
        headers = {"Link": f'<{request.path}?page={page + 1}>; rel="next"'} if page < 3 else {}
        return web.json_response({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries[page : page + 1]},
                                 headers=headers, content_type=OCI_INDEX)

    async def main() -> None:
        async with serve(handler) as address, RegistryClient(Reference.parse(f"{address}/app:1")) as client:
            assert await client.referrers(DIGEST) == entries
            assert await client.referrers(DIGEST, "t/1") == entries[1::2]  # it does not filter: we do

    asyncio.run(main())


@pytest.mark.parametrize("target", ["http://192.0.2.1/x", "file:///etc/passwd"])
def test_a_registry_leads_nobody_elsewhere(target: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            return web.Response(status=202, headers={"Location": target})
        if "referrers" in request.path or "tags" in request.path:
            return web.json_response({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "tags": ["1"]},
                                     headers={"Link": f'<{target}>; rel="next"'}, content_type=OCI_INDEX)
        return web.Response(status=200 if request.path == "/v2/" else 404)

    async def main() -> None:
        async with serve(handler) as address, RegistryClient(Reference.parse(f"{address}/app:1")) as client:
            for work in (client.tags(), client.referrers(DIGEST),
                         client.push_blob(DIGEST, len(BLOB), lambda: io.BytesIO(BLOB), lambda done: None)):
                with pytest.raises(Unavailable, match="refusing"):
                    await work

    asyncio.run(main())


def test_a_host_that_is_named_insecure_may_speak_plainly() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"{}")

    async def main() -> None:
        async with serve(handler) as address:
            reference = Reference.parse(f"{address}/app:1")
            for plain in (True, False):
                endpoint = Endpoint(address, "app", plain=plain, verify=False)
                async with RegistryClient(reference, endpoint=endpoint) as client:
                    if plain:
                        await client.ping()
                        assert (await client.manifest("1"))[0] == b"{}"
                    else:
                        with pytest.raises(Unavailable):
                            await client.ping()

    asyncio.run(main())


# Waiting


def test_retry_after_is_kept_to(waits: list[float]) -> None:
    count = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count in (2, 3):
            return web.Response(status=(429, 503)[count - 2], headers={"Retry-After": str(7 * count)})
        return web.Response(body=b"{}")

    async def main() -> None:
        async with serve(handler) as address, RegistryClient(Reference.parse(f"{address}/app:1")) as client:
            await client.ping()
            assert (await client.manifest("1"))[0] == b"{}"

    asyncio.run(main())
    assert [seconds for seconds in waits if seconds] == [14.0, 21.0]


@pytest.mark.parametrize(("text", "seconds"), [
    ("5", 5.0), ("0", 0.0), ("100000", 120.0), ("", 0.0), ("soon", 0.0), ("-3", 0.0),
    ("Thu, 01 Jan 1970 00:01:00 GMT", 50.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
])
def test_retry_after(text: str, seconds: float) -> None:
    assert retry_after(text, now=10.0) == seconds


# Parts


def parts_server(data: bytes, fail: Callable[[int], int | None] = lambda count: None) -> tuple[Handler, list[str]]:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if "blobs" not in request.path:
            return web.Response()
        asked.append(request.headers.get("Range", ""))
        if (status := fail(len(asked))) is not None:
            return web.Response(status=status, body=data if status == 200 else b"")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked[-1])
        assert match
        start, end = int(match[1]), int(match[2]) + 1
        return web.Response(status=206, body=data[start:end],
                            headers={"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    return handler, asked


def fetch_parts(root: Path, handler: Handler, data: bytes) -> ContentStore:
    async def main() -> ContentStore:
        store = ContentStore(root)
        async with serve(handler) as address, \
                RegistryClient(Reference.parse(f"{address}/app:1"), parts_from=1 << 20) as client:
            with store.ingest(digest_of(data), len(data)) as ingest:
                await client.blob(Descriptor("", digest_of(data), len(data)), ingest, lambda done: None)
        return store

    return asyncio.run(main())


def test_a_large_blob_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 1 << 20)
    data = os.urandom((7 << 20) + 3)
    handler, asked = parts_server(data, lambda count: 503 if count == 4 else None)
    store = fetch_parts(tmp_path, handler, data)
    assert store.read(digest_of(data), limit=len(data)) == data
    assert len(set(asked)) == 8 and len(asked) == 9


def test_parts_of_who_knows_no_ranges(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=data)

    assert fetch_parts(tmp_path, handler, data).has(digest_of(data))


# Mirrors


def sources(conf: Settings, name: str) -> list[str]:
    return [f"{'http' if e.plain_first else 'https'}://{e.host}/{e.repository}{'' if e.verify else ' unverified'}"
            for e in conf.sources(Reference.parse(name))]


def test_settings_of_the_host(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == Settings()
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/daemon.json").write_text(
        '{"registry-mirrors": ["http://127.0.0.1:5001/cache/", "https://m.example"], "insecure-registries": ["10.0.0.0/8", "lab:5000"]}')
    (tmp_path / "containers").mkdir()
    (tmp_path / "containers/registries.conf").write_text('''
unqualified-search-registries = ["docker.io"]
[[registry]]
prefix = "quay.io/team"
location = "inner.example/quay-team"
[[registry.mirror]]
location = "m1.example/q"
[[registry.mirror]]
location = "m2.example"
pull-from-mirror = "digest-only"
[[registry]]
location = "bad.example"
blocked = true
[[registry]]
prefix = "*.lab.example"
insecure = true
''')
    conf = read_settings(tmp_path)
    assert sources(conf, "debian") == ["http://127.0.0.1:5001/cache/library/debian", "https://m.example/library/debian",
                                       "https://registry-1.docker.io/library/debian"]
    assert sources(conf, "quay.io/team/app:1") == ["https://m1.example/q/app", "https://inner.example/quay-team/app"]
    assert sources(conf, f"quay.io/team/app@{DIGEST}")[1] == "https://m2.example/app"
    assert sources(conf, "quay.io/teams/app") == ["https://quay.io/teams/app"]
    assert sources(conf, "10.1.2.3:5000/app") == ["https://10.1.2.3:5000/app unverified"]
    assert sources(conf, "lab:5000/app") == ["https://lab:5000/app unverified"]
    assert sources(conf, "x.lab.example/app") == ["https://x.lab.example/app unverified"]
    with pytest.raises(PermissionDenied, match="blocked"):
        sources(conf, "bad.example/app")
    (tmp_path / "containers/registries.conf.d").mkdir()
    (tmp_path / "containers/registries.conf.d/a.conf").write_text('[[registry]]\nprefix = "quay.io/team"\nlocation = "late.example"\n')
    assert sources(read_settings(tmp_path), "quay.io/team/app:1") == ["https://late.example/app"]
    with pytest.raises(PermissionDenied, match="blocked"):
        conf.home(Reference.parse("bad.example/app"))


@pytest.mark.parametrize("value", [{"registry": 5}, {"registry": [{}]}, {"registry": [{"location": "a", "mirror": [{}]}]}])
def test_settings_that_make_no_sense(value: dict[str, object]) -> None:
    from dolium.errors import FailedPrecondition
    with pytest.raises(FailedPrecondition):
        parse_registries(value)


def test_a_mirror_is_asked_first_and_may_fail(tmp_path: Path) -> None:
    asked: list[str] = []

    def server(name: str, has: bool, body: bytes = BLOB) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            if request.path != "/v2/":
                asked.append(name)
                assert request.headers.get("Authorization") is None or name == "home"
            if not has and request.path != "/v2/":
                return web.Response(status=404)
            return web.Response(body=body)

        return handler

    async def main() -> None:
        async with serve(server("empty", False)) as empty, serve(server("lying", True, b"!" * len(BLOB))) as lying, \
                serve(server("home", True)) as home:
            rules = parse_registries({"registry": [{"location": home, "mirror": [
                {"location": "127.0.0.1:1"}, {"location": empty}, {"location": lying}]}]})
            store = ContentStore(tmp_path)
            async with Sources(Reference.parse(f"{home}/app:1"), Credentials("u", "p"), Settings(rules)) as found:
                with store.ingest(DIGEST, len(BLOB)) as ingest:
                    await found.blob(Descriptor("", DIGEST, len(BLOB)), ingest, lambda done: None)
            assert store.read(DIGEST, limit=len(BLOB)) == BLOB

    asyncio.run(main())
    assert asked == ["empty", "lying", "home"]


def test_two_blobs_pass_over_a_dead_mirror_at_once(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB[:9] if request.path.endswith(digest_of(BLOB[:9])) else BLOB)

    async def main() -> None:
        async with serve(handler) as home:
            rules = parse_registries({"registry": [{"location": home, "mirror": [{"location": "127.0.0.1:1"}]}]})
            store = ContentStore(tmp_path)

            async def one(found: Sources, data: bytes) -> None:
                with store.ingest(digest_of(data), len(data)) as ingest:
                    await found.blob(Descriptor("", digest_of(data), len(data)), ingest, lambda done: None)

            async with Sources(Reference.parse(f"{home}/app:1"), None, Settings(rules)) as found:
                await asyncio.gather(one(found, BLOB), one(found, BLOB[:9]))
            assert store.has(DIGEST) and store.has(digest_of(BLOB[:9]))

    asyncio.run(main())


def test_the_registry_s_own_answer_is_the_last(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if request.path == "/v2/" else 404)

    async def main() -> None:
        async with serve(handler) as home, Sources(Reference.parse(f"{home}/app:1"), None, Settings()) as found:
            with pytest.raises(NotFound, match=f"{home}/app"):
                await found.manifest("1")

    asyncio.run(main())


# Credentials


def test_scopes_are_merged() -> None:
    assert merge_scopes(["repository:a:pull", "repository:a:pull,push", "", "repository:b:pull", "odd"]) == [
        "repository:a:pull,push", "repository:b:pull", "odd"]
    assert merge_scopes(["repository:host:5000/a:pull"]) == ["repository:host:5000/a:pull"]


def test_credentials_of_clients() -> None:
    assert Credentials.parse({}) is None and Credentials.parse({"serveraddress": "x"}) is None
    assert Credentials.parse({"auth": "dTpwOnE="}) == Credentials("u", "p:q")
    assert Credentials.parse({"identitytoken": "t"}) == Credentials("", "", "t")
    for wrong in ([], {"username": 5}, {"auth": "!"}):
        with pytest.raises(InvalidArgument):
            Credentials.parse(wrong)
    assert decode_header("eyJhIjoxfQ") == {"a": 1}
    with pytest.raises(InvalidArgument):
        decode_header("!")
    known = {"https://index.docker.io/v1/": Credentials("hub", ""), "r:5000": Credentials("r", "")}
    assert credentials_of(known, "docker.io") == Credentials("hub", "") and credentials_of(known, "r") is None
    assert credentials_of(known, "r:5000") == Credentials("r", "")
