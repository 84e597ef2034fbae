"""dolium's own requests that change a container while it runs: what Docker's API has no word for."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from dolium.api.docker.common import ENGINE, body, flag
from dolium.api.docker.models import ports
from dolium.engine.live_ports import LivePorts
from dolium.engine.live_volumes import LiveVolumes
from dolium.engine.model import Mount
from dolium.engine.request import port_number
from dolium.errors import InvalidArgument
from dolium.network.base import PortBinding

routes = web.RouteTableDef()
VOLUMES = web.AppKey("live volumes", LiveVolumes)
PORTS = web.AppKey("live ports", LivePorts)


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


@routes.post("/dolium/containers/{name}/ports")
async def publish(request: web.Request) -> web.Response:
    """Body: ``PortBindings``, as in Docker's HostConfig. Answers with what is published then, as inspect has it."""
    engine, name = request.app[ENGINE], request.match_info["name"]
    container = engine.find(name)
    await request.app[PORTS].add(container.id, (await body(request)).get("PortBindings"))
    return web.json_response({"Ports": ports(container) if container.live else {}}, status=201)


@routes.delete("/dolium/containers/{name}/ports")
async def withdraw(request: web.Request) -> web.Response:
    """``port``: PORT/PROTOCOL of the container; ``host_ip``, ``host_port``: what of it, all without."""
    text, _, protocol = request.query.get("port", "").partition("/")
    inside, outside = port_number(text), request.query.get("host_port", "")
    await request.app[PORTS].remove(request.match_info["name"], PortBinding(
        inside, protocol or "tcp", request.query.get("host_ip", ""), port_number(outside) if outside else 0))
    return web.Response(status=204)
