"""The application: routes with and without a version in the path, one error table, one connection handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from dolium.api.docker import archive, containers, images, networks, streams, system, volumes
from dolium.api.docker.common import API_VERSION, CONTAINERS, ENGINE, EXECS, MIN_API_VERSION
from dolium.api.docker.errors import begun, error_middleware, error_response
from dolium.engine.containers import Containers
from dolium.engine.engine import Engine
from dolium.engine.execs import Execs

MAX_BODY = 64 << 20  # of requests read whole; archives are streamed
_PREFIX = r"/v{api_version:\d+\.\d+}"
_NEWEST = tuple(int(part) for part in API_VERSION.split("."))
_OLDEST = tuple(int(part) for part in MIN_API_VERSION.split("."))


@web.middleware
async def version_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse clients that speak a version this server does not, in Docker's words."""
    word = request.match_info.get("api_version")
    if word is not None:
        version = tuple(int(part) for part in word.split("."))
        if version > _NEWEST:
            return error_response(400, f"client version {word} is too new. Maximum supported API version is {API_VERSION}")
        if version < _OLDEST:
            return error_response(400, f"client version {word} is too old. Minimum supported API version is "
                                       f"{MIN_API_VERSION}, please upgrade your client to a newer version")
    return await handler(request)


class Handler(RequestHandler):
    """aiohttp's, but a client that ends its sending side while it asks for an upgrade keeps its connection."""

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the transport open for writing (half-close)."""
        request = self._current_request
        return True if request is not None and "Upgrade" in request.headers else None


def make_app(engine: Engine, life: Containers, execs: Execs, extra: list[web.RouteTableDef]) -> web.Application:
    """The application over one engine; ``extra`` are the routes of dolium's own API."""
    app = web.Application(middlewares=[error_middleware, version_middleware], client_max_size=MAX_BODY)
    app.on_response_prepare.append(begun)
    app[ENGINE], app[CONTAINERS], app[EXECS] = engine, life, execs
    for table in (system.routes, containers.routes, streams.routes, archive.routes, images.routes,
                  networks.routes, volumes.routes, *extra):
        for route in table:
            assert isinstance(route, web.RouteDef)
            for path in (route.path, _PREFIX + route.path):
                app.router.add_route(route.method, path, route.handler, **route.kwargs)
    return app
