"""The pull-through cache as a registry: the pulling half of the OCI distribution protocol, v1.1."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from dolium.errors import (
    DoliumError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from dolium.images.content import CHUNK
from dolium.images.manifest import OCI_INDEX
from dolium.images.mirror import Filling, Mirror
from dolium.images.reference import Reference, is_digest

_log = logging.getLogger(__name__)
_READERS = 64  # clients that read along while a blob arrives; more wait
_STATUS: dict[type[DoliumError], tuple[int, str]] = {
    NotFound: (404, "NAME_UNKNOWN"), InvalidArgument: (400, "NAME_INVALID"), PermissionDenied: (403, "DENIED"),
    Unavailable: (503, "UNAVAILABLE"), ResourceExhausted: (429, "TOOMANYREQUESTS"), Unimplemented: (405, "UNSUPPORTED"),
}
_MIRROR = web.AppKey("mirror", Mirror)
_POOL = web.AppKey("pool", ThreadPoolExecutor)
_HEADERS = {"Docker-Distribution-API-Version": "registry/2.0"}
_PATH = r"/v2/{path:.+}"


def _refusal(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"errors": [{"code": code, "message": message}]}, status=status, headers=_HEADERS)


async def _base(request: web.Request) -> web.Response:
    return web.json_response({}, headers=_HEADERS)


async def _get(request: web.Request) -> web.StreamResponse:
    """GET and HEAD of manifests, blobs, tags and referrers."""
    mirror, path = request.app[_MIRROR], request.match_info["path"]
    kinds: dict[str, Callable[[web.Request, Reference, str], Awaitable[web.StreamResponse]]] = {
        "manifests": _manifest, "blobs": _blob, "referrers": _referrers}
    for kind, work in kinds.items():
        name, found, word = path.rpartition(f"/{kind}/")
        if found and "/" not in word:
            return await work(request, mirror.reference(name, request.query.get("ns", "")), word)
    if path.endswith("/tags/list"):
        repository = mirror.reference(path.removesuffix("/tags/list"), request.query.get("ns", ""))
        tags = {"name": path.removesuffix("/tags/list"), "tags": mirror.tags(repository)}
        return web.json_response(tags, headers=_HEADERS)
    return _refusal(404, "NAME_UNKNOWN", "no such path")


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except DoliumError as error:
        status, code = _STATUS.get(type(error), (500, "UNKNOWN"))
        if "/manifests/" in request.path and status == 404:
            code = "MANIFEST_UNKNOWN"
        return _refusal(status, code, str(error))


async def _manifest(request: web.Request, repository: Reference, name: str) -> web.Response:
    served = await request.app[_MIRROR].manifest(repository, name)
    headers = {**_HEADERS, "Docker-Content-Digest": served.digest, "ETag": f'"{served.digest}"',
               "Content-Type": served.media_type or "application/json"}
    if served.stale:
        headers["Warning"] = '110 dolium "the registry does not answer: this is what it was"'
    return web.Response(body=served.data, headers=headers)


async def _blob(request: web.Request, repository: Reference, digest: str) -> web.StreamResponse:
    if not is_digest(digest):
        raise InvalidArgument(f"{digest!r} is no digest")
    mirror = request.app[_MIRROR]
    with mirror.serving(digest):
        filling = await mirror.blob(repository, digest)
        headers = {**_HEADERS, "Docker-Content-Digest": digest, "Content-Type": "application/octet-stream"}
        if filling is not None and request.method == "GET" and "Range" not in request.headers:
            return await _along(request, filling, digest, headers)
        if filling is not None:
            await asyncio.shield(filling.task)
        response = web.FileResponse(mirror.content.path(digest), headers=headers, chunk_size=CHUNK)
        await response.prepare(request)
        return response


async def _along(request: web.Request, filling: Filling, digest: str, headers: dict[str, str]) -> web.StreamResponse:
    """Send a blob while it arrives. When it breaks off, so does the answer: the client asks for the rest, and gets it."""
    response = web.StreamResponse(headers={**headers, "Content-Length": str(filling.size)})
    loop, mirror, sent = asyncio.get_running_loop(), request.app[_MIRROR], 0
    try:
        follower = filling.ingest.follow()
    except FileNotFoundError:  # it came to its end just now
        await asyncio.shield(filling.task)
        return web.FileResponse(mirror.content.path(digest), headers=headers, chunk_size=CHUNK)
    try:
        while sent < filling.size:
            reading = loop.run_in_executor(request.app[_POOL], follower.read, CHUNK)
            try:
                data = await asyncio.shield(reading)
            except Unavailable:
                if sent:  # what was sent may not be what it should be
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                await asyncio.shield(filling.task)
                return web.FileResponse(mirror.content.path(digest), headers=headers, chunk_size=CHUNK)
            if not response.prepared:
                await response.prepare(request)
            if sent + len(data) == filling.size:
                await asyncio.shield(filling.task)  # the last bytes go out when the digest has been compared
            await response.write(data)
            sent += len(data)
    except DoliumError:
        if not response.prepared:
            raise
        assert request.transport is not None
        request.transport.abort()
    finally:
        follower.stop()
        follower.close()
    return response


async def _referrers(request: web.Request, repository: Reference, digest: str) -> web.Response:
    if not is_digest(digest):
        raise InvalidArgument(f"{digest!r} is no digest")
    kind = request.query.get("artifactType", "")
    found = await request.app[_MIRROR].referrers(repository, digest, kind)
    headers = {**_HEADERS, "Content-Type": OCI_INDEX, **({"OCI-Filters-Applied": "artifactType"} if kind else {})}
    return web.Response(body=json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}).encode(),
                        headers=headers)


async def _refuse(request: web.Request) -> web.Response:
    return _refusal(405, "UNSUPPORTED", "this registry only fills itself from others: push to the registry itself")


def make_app(mirror: Mirror) -> web.Application:
    """The application over one cache."""
    app = web.Application(middlewares=[_errors])
    app[_MIRROR], app[_POOL] = mirror, ThreadPoolExecutor(_READERS, thread_name_prefix="mirror")
    app.router.add_get("/v2/", _base)
    app.router.add_get(_PATH, _get)  # and HEAD
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        app.router.add_route(method, _PATH, _refuse)

    async def end(app: web.Application) -> None:
        await mirror.close()
        await asyncio.to_thread(app[_POOL].shutdown)

    app.on_cleanup.append(end)
    return app


async def serve(mirror: Mirror, host: str, port: int, *, tls: tuple[str, str] | None, stop: asyncio.Event,
                listening: asyncio.Future[int]) -> None:
    """Serve until ``stop``; ``listening`` gets the port. Raises OSError when it cannot listen."""
    context = None
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls)
    runner = web.AppRunner(make_app(mirror), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=context)
        await site.start()
        listening.set_result(runner.addresses[0][1])
        await stop.wait()
    finally:
        await runner.cleanup()
