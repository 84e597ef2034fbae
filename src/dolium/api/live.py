"""dolium's own requests that change a container while it runs: what Docker's API has no word for."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from dolium.api.docker.common import body, flag
from dolium.engine.live_volumes import LiveVolumes
from dolium.engine.model import Mount
from dolium.errors import InvalidArgument

routes = web.RouteTableDef()
VOLUMES = web.AppKey("live volumes", LiveVolumes)


def _described(mount: Mount) -> dict[str, Any]:
    return {"Name": mount.name, "Destination": mount.target, "RW": not mount.read_only}


@routes.post("/dolium/containers/{name}/volumes")
async def attach(request: web.Request) -> web.Response:
    """Body: ``Volume``, as -v has it."""
    wish = (await body(request)).get("Volume")
    if not isinstance(wish, str) or not wish:
        raise InvalidArgument("Volume is missing: NAME:/target, or NAME:/target:ro")
    done = await request.app[VOLUMES].attach(request.match_info["name"], wish)
    return web.json_response(_described(done), status=201)


@routes.delete("/dolium/containers/{name}/volumes")
async def detach(request: web.Request) -> web.Response:
    """``volume``: its name, or its target; ``force``: also while it is in use."""
    which = request.query.get("volume", "")
    if not which:
        raise InvalidArgument("volume is missing: a name, or the path where it is mounted")
    done = await request.app[VOLUMES].detach(request.match_info["name"], which, force=flag(request, "force"))
    return web.json_response(_described(done))
